"""PROTOCOL.md says what relay and far side do: each call, method, who may, state and field stands there, and nothing that does not exist.
(The table of 1.4 is made request by request in test_fielded_table.py.)"""
import os
import re

import documents
import suite

relay = suite.module("mi_dicomapi.py")
with open(os.path.join(suite.HERE, "PROTOCOL.md"), encoding="utf-8") as text:
    PROTOCOL = text.read()
with open(suite.script("mi_dicomapi.py"), encoding="utf-8") as text:
    SOURCE = text.read()


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


def test_the_tables_of_states_steps_calls_and_fields_are_those_of_the_relay():
    assert documents.written("PROTOCOL.md") == documents.made()["PROTOCOL.md"], "python3 tests/documents.py"
    assert len(table("2.5")) == len(relay.ROUTES) + 1 and len(tables("2.4")[1]) == len(relay.STEPS)


def test_the_relay_reads_each_field_of_its_routes_and_no_other():
    read = set(re.findall(r'call(?:\.(?:text|get|need|fields\.get|fields)[(\[]|\[)"([\w-]+)"', SOURCE))
    read |= {"missing", "refused", "started", "ended", "cpu", "maxrss"}         # by name of a loop
    named = set().union(*(route.fields for route in list(relay.ROUTES.values()) + list(relay.OPERATOR_CALLS.values())))
    assert named == set(relay.FIELDS)
    assert named - read == {"stop"}, "told, but read nowhere"
    assert read - named - {"v"} == set(), "read, but told nowhere"


def test_what_is_named_in_the_second_part_stands_in_the_relay_and_every_reason_is_named():
    second = PROTOCOL[PROTOCOL.index("## Part 2"):PROTOCOL.index("## Part 3")]
    reasons = set(re.findall(r'why="(\w+)"', SOURCE))
    for number, every in (("2.1", reasons), ("2.3", set(relay.version_answer(Relay, True))), ("2.9", set(relay.VERDICTS))):
        missing = {word for word in every if "`%s`" % word not in section(number)}
        assert not missing, (number, missing)
    words = set(re.findall(r"`([a-z][a-z0-9_-]*)`", second))
    unknown = {word for word in words if not re.search(r"[\"'/ ]%s[\"'/ ]" % re.escape(word), SOURCE)}
    assert unknown == {"stop", "phase", "node", "not_before"} & unknown and len(words) > 100, unknown


class Relay:
    """What relay.version_answer() looks at."""
    conf = {"limits": {"max_body": 1, "max_file": 0, "max_files": 0, "lanes_per_token": 1}, "times": {"wait": 1.0}}
    instance = "x"
    store = type("Store", (), {"free": staticmethod(int)})


def test_the_calls_of_the_fielded_part_are_those_that_the_relay_answers_so():
    named = set(re.findall(r"(?:GET|POST) /?([\w-]+)", " ".join(row[1] for row in table("1.3"))))
    assert named == set(relay.V1)
    assert {row[0].replace("cancel force", "cancel-wait-calc") for row in table("1.4")} == named - {"add-calcinfo", "get-calcinfo", "reload-ini"}
    progress = next(row[1] for row in table("1.2") if row[0] == "`calc_progress`")
    assert tuple(re.findall(r"`(.*?)`", progress)) == relay.V1_WORDS
    assert {relay.v1_word(state) for state in relay.WORDS} == set(relay.V1_WORDS)


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
