"""PROTOCOL.md says what relay and far side do: each call, method, who may, state and field stands there, and nothing that does not exist.
(The table of 1.4 is made request by request in test_fielded_table.py.)"""
import json
import os
import re

import suite

relay = suite.module("mi_dicomapi.py")
with open(os.path.join(suite.HERE, "PROTOCOL.md"), encoding="utf-8") as text:
    PROTOCOL = text.read()
with open(suite.script("mi_dicomapi.py"), encoding="utf-8") as text:
    SOURCE = text.read()
PLACES = {"": "files/ID/KIND", "/{n}": "files/ID/KIND/N", "/pack": "files/ID/KIND/pack"}


def section(number):
    """The text of a section."""
    return re.search(r"^### %s .*?\n(?=### |## |\Z)" % re.escape(number), PROTOCOL, re.M | re.S).group(0)


def tables(number):
    """The tables of a section, without their heads: [[[cell]]]."""
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()[2:]]
            for found in re.findall(r"(?:^\|.*\n)+", section(number), re.M)]


def table(number):
    """The rows of a section's first table."""
    return tables(number)[0]


def described():
    """{(method, path as PROTOCOL.md writes it): the fields} of openapi.json, without v."""
    with open(os.path.join(suite.HERE, "openapi.json"), encoding="utf-8") as found:
        paths, calls = json.load(found)["paths"], {}
    for path, methods in paths.items():
        name = path[len(relay.API_PATH):]
        if name.startswith("files/"):
            name = PLACES[name[len("files/{id}/{kind}"):]]
        for method, call in methods.items():
            fields = {one["name"] for one in call.get("parameters", ()) if one["in"] == "query"}
            body = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            calls[method.upper(), name] = (fields | set(body.get("properties", {}))) - {"v"}
    return calls


def test_the_steps_and_states_are_those_of_the_relay():
    states, steps = tables("2.4")
    assert [(row[0], row[1].split(" (")[0]) for row in states] == list(relay.WORDS.items())
    assert [tuple(row) for row in steps] == [(str(step.number), step.name, step.role, ", ".join(step.frm), step.to) for step in relay.STEPS]


def test_every_call_with_its_method_and_who_may_make_it_is_there_and_no_other():
    told = {(row[1], row[0]): (row[2], row[3]) for row in table("2.5")}
    real = {("GET", "version"): ("anybody", "no")}
    for (method, name), route in relay.ROUTES.items():
        if name == "files":
            real.update({(method, place): ("see 2.8", "no") for place in PLACES.values()})
        else:
            real[method, name] = (route.role or "anybody", "yes" if name in relay.V1 else "no")
    assert told == real
    assert set(relay.V2_ONLY) == {name for name in (name.split("/")[0] for (method, name), who in real.items() if who[1] == "no")} - {"version"}


def test_the_fields_of_every_call_are_those_of_the_description_and_the_relay_reads_each():
    told = {(row[1], row[0]): set(re.findall(r"[\w-]+", row[4])) for row in table("2.5")}
    assert told == described()
    read = set(re.findall(r'call\.(?:text|number|need|get|fields\.get|fields)[(\[]"([\w-]+)"', SOURCE))
    read |= {"missing", "refused", "started", "ended", "cpu", "maxrss"}         # by name of a loop
    named = set().union(*told.values())
    assert named - read == {"stop"}, "told, but read nowhere"
    assert read - named - {"v", "site_id", "claim"} == set(), "read, but told nowhere"


def test_what_is_named_in_the_second_part_stands_in_the_relay_and_every_reason_is_named():
    second = PROTOCOL[PROTOCOL.index("## Part 2"):PROTOCOL.index("## Part 3")]
    reasons = set(re.findall(r'why="(\w+)"', SOURCE))
    for number, every in (("2.1", reasons), ("2.3", set(relay.version_answer(Relay, True))), ("2.9", set(relay.VERDICTS))):
        missing = {word for word in every if "`%s`" % word not in section(number)}
        assert not missing, (number, missing)
    words = set(re.findall(r"`([a-z][a-z0-9_-]*)`", second))
    unknown = {word for word in words if not re.search(r"[\"'/ ]%s[\"'/ ]" % re.escape(word), SOURCE)}
    assert unknown == {"stop", "phase", "node"} & unknown and len(words) > 100, unknown


class Relay:
    """What relay.version_answer() looks at."""
    conf = {"limits": {"max_body": 1, "max_file": 0, "max_files": 0}, "times": {"wait": 1.0}}
    instance = "x"
    store = type("Store", (), {"free": staticmethod(int)})


def test_the_calls_of_the_fielded_part_are_those_that_the_relay_answers_so():
    named = set(re.findall(r"(?:GET|POST) /?([\w-]+)", " ".join(row[1] for row in table("1.3"))))
    assert named == set(relay.V1)
    assert {row[0].replace("cancel force", "cancel-wait-calc") for row in table("1.4")} == named - {"add-calcinfo", "get-calcinfo", "reload-ini"}
    progress = next(row[1] for row in table("1.2") if row[0] == "`calc_progress`")
    assert re.findall(r"`(.*?)`", progress) == list(dict.fromkeys(relay.WORDS.values()))


def test_the_numbers_are_those_of_the_relay():
    said, times, limits = " ".join(PROTOCOL.split()), relay.INI_KEYS["times"], relay.INI_KEYS["limits"]
    numbers = ["`%s` (%d s" % (name, times[name][1]) for name in ("v1_announce", "accept_lease", "lease")]
    numbers += ["`max_body` (%d MiB)" % (limits["max_body"][1] >> 20), "Head ≤ %d KiB (431)" % (relay.MAX_HEAD >> 10),
                "JSON bodies ≤ %d MiB" % (relay.MAX_JSON >> 20), "%d MiB of each are kept" % (relay.LIVE_OUTPUT >> 20),
                "≤ {:,} parts".format(relay.PARTS), "(≤ %d:" % relay.MAX_PATTERNS, "(≤ %d of each are kept)" % relay.VERDICT_NAMES,
                "(numbers, ≤ {:,})".format(relay.LISTED)]
    missing = [number for number in numbers if number not in said]
    assert not missing, missing


def test_the_codes_of_explain_are_those_of_the_scripts():
    rows = {row[0]: row[1].split(", ") for row in table("2.7")}
    poller, workflow = suite.module("mi_system_remote.py"), suite.module("mi_system_wf.py")
    codes = [cause.code for cause in relay.CAUSES]
    assert sum((told for name, told in rows.items() if name.startswith("v2/explain: ")), []) == codes
    assert rows["poller, besides"] == list(dict.fromkeys(cause.code for cause in poller.CAUSES if cause.code not in codes))
    kinds = re.search(r"kind is (.*)\.\Z", " ".join(workflow.RelayAway.__doc__.split())).group(1)
    assert rows["not reached"] == ["relay-" + kind for kind in re.findall(r"\w+", re.sub(r" \(.*?\)| or\b", "", kinds))]
    for name, where in (("relay's own word", "mi_dicomapi.py"), ("workflow side, where no relay tells", "mi_system_wf.py")):
        with open(suite.script(where), encoding="utf-8") as text:
            source = text.read()
        assert all('"%s"' % code in source for code in rows[name]), name


def test_the_requests_states_and_refusals_of_the_ssh_way_are_those_of_the_doors():
    runner = suite.module("execute_remote_command.py")
    rows = [[verb, "all" if one.states == runner.STATES else ", ".join(one.states), ", ".join(lane or "-" for lane in one.lanes), "; ".join(one.forms)]
            for verb, one in runner.VERBS.items()]
    assert table("3.4") == rows
    assert set(re.findall(r"`(\w+)` \(", section("3.3"))) | {"running"} >= set(runner.STATES)
    with open(suite.script("execute_remote_command.py"), encoding="utf-8") as text:
        said = set(re.findall(r'Refusal\(\s*"(\w+)"', text.read()))
    assert said <= {row[0] for row in table("3.2")}, said
