"""Rewrites what documents repeat of the scripts: python3 tests/documents.py

PROTOCOL.md: the tables of 2.4 (states, steps) and 2.5 (calls, fields), of the relay's WORDS, STEPS, ROUTES and FIELDS. openapi.json.
The shipped ini: of each key of INI_KEYS its meaning; a key that is not there comes in, with its default (which else stays as it is written).
`test_protocol.py`, `test_openapi.py` and `test_configuration.py` fail as long as they are others.
"""
import json
import os
import re
import textwrap

import openapi
import suite

STATES, STEPS = "| relay | `calc_progress`, `progress` on the wire |", "| step | name | who | from | to |"
CALLS, FIELDS = "| call | method | who | v1 too | fields |", "| field | type | what it is |"
TYPES = {str: "text", int: "number", bool: "true or false", dict: "object", None: "any"}


def states(relay, before):
    """The states and their words; what stands in brackets behind a word stays."""
    notes = dict(re.findall(r"^\| (\w+) \| [^|(]*?( \(.*?\))? \|$", before, re.M))
    return ["| %s | %s%s |" % (state, word, notes.get(state, "")) for state, word in relay.WORDS.items()]


def steps(relay, before):
    """The steps."""
    return ["| %d | %s | %s | %s| %s |" % (step.number, step.name, step.role, "".join(", ".join(step.frm) + " " if step.frm else ""), step.to)
            for step in relay.STEPS]


def calls(relay, before):
    """The calls, by whom they may be made, and what they read."""
    rows = ["| version | GET | anybody | no | |"]
    for (method, name), route in relay.ROUTES.items():
        who = ", ".join([route.role] + sorted(route.also)) if route.role else "see 2.8" if "ID/KIND" in name else "anybody"
        fields = " ".join(field if field in route.needed else "[%s]" % field for field in route.fields)
        rows.append("| %s | %s | %s | %s | %s|" % (name, method, who, "yes" if name in relay.V1 else "no", fields + " " if fields else ""))
    return rows


def fields(relay, before):
    """What each field is."""
    return ["| %s | %s | %s |" % (name, TYPES[field.kind], field.what) for name, field in sorted(relay.FIELDS.items())]


def protocol(text):
    """PROTOCOL.md with these tables as they are now."""
    relay = suite.module("mi_dicomapi.py")
    for head, rows in ((STATES, states), (STEPS, steps), (CALLS, calls), (FIELDS, fields)):
        first, found, rest = text.partition(head + "\n")
        mark, before, rest = re.match(r"(\|[-|]+\n)((?:\|[^\n]*\n)*)(.*)\Z", rest, re.S).groups()
        text = first + found + mark + "".join(row + "\n" for row in rows(relay, before)) + rest
    return text


def ini_lines(key, value, meaning):
    """The lines of a key in the shipped ini."""
    head = ("# %s = %s" % (key, value)).rstrip()
    return textwrap.wrap("(%s)" % meaning, 120, initial_indent=head.ljust(33) if len(head) < 32 else head + "  ", subsequent_indent="#".ljust(34),
                         break_long_words=False, break_on_hyphens=False)


def as_written(default):
    """A key's default, as an ini says it."""
    if type(default) is bool:
        return "yes" if default else "no"
    if type(default) is float:
        return "%gs" % default
    return default or "" if type(default) in (str, int) else ""


def ini_section(text, keys):
    """The lines of a section (all behind its head), as the table of its keys has it."""
    found = {one.group(1): (one.group(2), one.group(0)) for one in re.finditer(r"^# ([a-z_]\w*) = ?(.*?)(?:  +\(.*)?\n(?:#    +.*\n)*", text, re.M)}
    before = ""
    for key, (kind, default, meaning) in keys.items():
        value, old = found.get(key, (as_written(default), None))
        new = "".join(line + "\n" for line in ini_lines(key, value, meaning))
        text = text.replace(old, new, 1) if old else text.replace(before, before + new, 1)
        before = new
    return text


def shipped_ini(text):
    """The shipped ini, its sections whose names are as they stand there."""
    for script in ("mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py", "execute_remote_command.py"):
        for section, keys in suite.module(script).INI_KEYS.items():
            first, head, rest = text.partition("\n[%s]\n" % section)
            body, end, rest = rest.partition("\n\n")
            if head and all(meaning for kind, default, meaning in keys.values()):      # [RemoteSites] is an example
                text = first + head + ini_section(body + "\n", keys)[:-1] + end + rest
    return text


INI = "../mi_distributed_computing_assist.ini"


def written(path):
    """Its text."""
    with open(os.path.join(suite.HERE, path), encoding="utf-8") as text:
        return text.read()


def made():
    """{file: its text as it must be}."""
    return {"PROTOCOL.md": protocol(written("PROTOCOL.md")), "openapi.json": json.dumps(openapi.description(), indent=1, ensure_ascii=False) + "\n",
            INI: shipped_ini(written(INI))}


if __name__ == "__main__":
    for path, text in made().items():
        if text != written(path):
            print("-> tests/" + path)
            with open(os.path.join(suite.HERE, path), "w", encoding="utf-8") as out:
                out.write(text)
