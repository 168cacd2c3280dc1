"""The owner's rules: one table of (ini, request, verdict), written by thinking, and both doors of the gate give that verdict."""
import contextlib
import json
import os
import re
import time

import pytest

import suite
from suite import LOGS, SITE, wait_until
from ssh_door import Far

DOORS = {"poller": suite.module("mi_system_remote.py"), "guard": suite.module("execute_remote_command.py")}
NO, BAD = 77, 78               # the request is refused, the ini is refused
ECHO = "match = solve\nargv = /bin/echo\n  {parameters}\n"
ONE = ECHO + "argument.1 = [0-9]+\n"
TWO = ONE + "argument.2 = [a-z]+|a b\n"
E = ["/bin/echo"]

# (the lines of [command NAME], {request: verdict}); verdict: the argument vector, NO, or BAD
RUN = [
    # no arguments
    ("match = solve\nargv = /bin/echo", {"solve": E, "solve x": NO, "solve ''": NO, "other": NO, "": NO, "Solve": NO, "solve.": NO, "/bin/echo": NO}),
    ("argv = /bin/echo", {"/bin/echo": E, "echo": NO, "/bin/echo x": NO, "/bin/../bin/echo": NO}),
    ("match = solve\nargv = /bin/echo\n  a b\n  $HOME\n  x;id", {"solve": E + ["a b", "$HOME", "x;id"]}),
    ("match = solve\nargv = /bin/echo\nparameters = no", {"solve": E, "solve 5": NO}),
    # one
    (ONE, {"solve": E, "solve 5": E + ["5"], "solve 55": E + ["55"], "solve 5 6": NO, "solve x": NO, "solve 5x": NO, "solve -5": NO, "solve ''": NO,
           "solve '5'": E + ["5"], "solve \"5\"": E + ["5"], "solve 5\\ 6": NO, "solve '5": NO, "solve 5;id": NO, "solve $(id)": NO, "solve `id`": NO,
           "solve 5\n": NO, "solve 5\t6": NO, "solve 5\x00": NO, "solve 5\u202e": NO, "solve 5\x1b": NO, "solve  5": E + ["5"], "solve \u0665": NO,
           "solve #5": NO, "solve 5 #6": NO, "solve 5|id": NO, "solve --": NO}),
    (ONE + "parameters = yes", {"solve": E, "solve 5": E + ["5"], "solve 5 6": NO, "solve x": NO}),
    (ONE + "parameters = no", {"solve": BAD, "solve 5": BAD}),
    (ONE + "parameters = perhaps", {"solve": BAD}),
    # two, gaps
    (TWO, {"solve 5 ab": E + ["5", "ab"], "solve 5 'a b'": E + ["5", "a b"], "solve 5": E + ["5"], "solve ab 5": NO, "solve 5 ab 7": NO, "solve 5 ''": NO,
           "solve '' ab": NO}),
    (TWO + "parameters = yes", {"solve 5 ab": E + ["5", "ab"], "solve 5 ab ab": NO}),
    (ECHO + "argument.2 = [a-z]+", {"solve": E, "solve x": NO, "solve 5": NO, "solve x ab": NO, "solve '' ab": NO}),
    (ECHO + "parameters = yes\nargument.2 = [a-z]+", {"solve x": NO, "solve x ab": NO}),
    (ECHO + "argument.1 = .*\nargument.3 = x", {"solve a": E + ["a"], "solve a b": NO, "solve a b x": NO}),
    (ECHO + "argument.1 = .*", {"solve ''": E + [""], "solve 'a b  c'": E + ["a b  c"], "solve $(id)": E + ["$(id)"], "solve a b": NO, "solve -rf": E + ["-rf"],
                                "solve {parameters}": E + ["{parameters}"]}),
    (ECHO + "argument.1 =", {"solve ''": E + [""], "solve x": NO, "solve": E}),
    (ECHO + "argument.1 = a|b", {"solve a": E + ["a"], "solve b": E + ["b"], "solve ab": NO, "solve ac": NO}),
    (ECHO + "argument.1 = ^a$", {"solve a": E + ["a"], "solve ab": NO}),
    (ECHO + "argument.1 = (?i)[a-z]+", {"solve AB": E + ["AB"]}),
    # argv and its place for arguments
    ("match = solve\nargv = /bin/echo\n  first\n  {parameters}\n  last\nargument.1 = x", {"solve x": E + ["first", "x", "last"], "solve": E + ["first", "last"]}),
    ("match = solve\nargv = /bin/echo\nargument.1 = x", {"solve": BAD, "solve x": BAD}),
    (ECHO, {"solve": BAD}),
    (ECHO + "parameters = yes", {"solve": BAD, "solve x": BAD}),
    (ECHO + "parameters = no", {"solve": BAD}),
    ("match = solve\nargv = /bin/echo\n  {parameters}\n  {parameters}\nargument.1 = x", {"solve x": BAD}),
    ("match = solve\nargv = echo", {"solve": BAD}),
    ("match = solve\nargv = ./echo", {"solve": BAD}),
    ("match = solve\nargv =", {"solve": BAD}),
    ("match = solve", {"solve": BAD}),
    ("match = solve\nargv = {parameters}\nargument.1 = .*", {"solve /bin/sh": BAD}),
    ("match = solve\nargv = /nonexistent/echo", {"solve": "unfit"}),
    ("match = solve\nargv = /etc/passwd", {"solve": "unfit"}),
    ("match = solve\nargv = /bin", {"solve": "unfit"}),
    ("match = two words\nargv = /bin/echo", {"'two words'": E, "two words": NO, "two": NO}),
    ("match = 計算\nargv = /bin/echo", {"計算": E, "計": NO}),
    # comments behind values, as the README prints them
    ("match = solve      # the word\nargv = /bin/echo    # absolute\n  {parameters}   # where they go\nargument.1 = [0-9]+   # more are refused",
     {"solve 5": E + ["5"], "solve 5 6": NO, "solve #": NO, "solve": E}),
    (ECHO + "argument.1 = a#b", {"solve a#b": E + ["a#b"], "solve a": NO}),
    (ONE + "# argument.2 = .*", {"solve 5 x": NO}),
    # keys that are wrong
    (ONE + "argument.0 = x", {"solve 5": BAD}), (ONE + "argument.x = x", {"solve 5": BAD}), (ONE + "argument.-1 = x", {"solve 5": BAD}),
    (ONE + "argument.01 = x", {"solve 5": BAD}), (ONE + "argument = x", {"solve 5": BAD}), (ECHO + "argument.1 = [", {"solve 5": BAD}),
    (ONE + "argument.1 = [a-z]+", {"solve 5": BAD}), (ONE + "argumnet.2 = x", {"solve 5": BAD}),
    (ONE + "env.A-B = x", {"solve 5": BAD}), (ONE + "env.1 = x", {"solve 5": BAD}), (ONE + "env.GOOD_1 = x", {"solve 5": E + ["5"]}),
    (ONE + "run_as = root", {"solve 5": BAD}), (ONE + "run_as = no", {"solve 5": BAD}),
    (ONE + "nice = 20", {"solve 5": BAD}), (ONE + "nice = -1", {"solve 5": BAD}), (ONE + "nice = 5", {"solve 5": ["/usr/bin/nice", "-n", "5"] + E + ["5"]}),
    (ONE + "after_stop = some", {"solve 5": BAD}), (ONE + "after_stop = all", {"solve 5": E + ["5"]}), (ONE + "after_stop =", {"solve 5": E + ["5"]}),
    (ONE + "patterns = maybe", {"solve 5": BAD}), (ONE + "logs = maybe", {"solve 5": BAD}), (ONE + "leftovers = kill", {"solve 5": BAD}),
    (ONE + "input_names = ../x", {"solve 5": BAD}), (ONE + "input_names = /x", {"solve 5": BAD}),
    (ONE + "[command again]\nmatch = solve\nargv = /bin/true", {"solve 5": BAD}),
    (ONE + "[command again]\nmatch = other\nargv = /bin/true", {"solve 5": E + ["5"], "other": ["/bin/true"], "other 5": NO}),
    (ONE + "[command again]\nargv = true", {"solve 5": BAD}),
    # options of a batch system are not arguments
    (ONE + "batch_changeable =\n  cores=1 --cpus={} [1-4]", {"solve batch.cores=2": NO, "solve 5 batch.cores=2": NO}),
    # [outbound] that is wrong is no rule at all
    (ONE + "[outbound]\ndeny_names = *.inp, *.inc", {"solve 5": BAD}), (ONE + "[outbound]\ndeny_content = [", {"solve 5": BAD}),
    (ONE + "[outbound]\ndeny_sums = abc", {"solve 5": BAD}), (ONE + "[outbound]\nmax_file = many", {"solve 5": BAD}),
    (ONE + "[outbound]\nmax_files = 0", {"solve 5": BAD}), (ONE + "[outbound]\nhold = perhaps", {"solve 5": BAD}), (ONE + "hold = perhaps", {"solve 5": BAD}),
    (ONE + "[outbound]\nhold = yes", {"solve 5": E + ["5"]}), (ONE + "[outbound]\nhold_for = soon", {"solve 5": BAD}),
    (ONE + "[outbound]\ndeny_nmaes = x", {"solve 5": BAD}), (ONE + "[outbound]\ndeny_pieces = x", {"solve 5": BAD}),
]

# (the lines of [outbound], {name of a result: does it leave?})
OUT = [
    ("", {"a": True, "sub/a": True, "計算.txt": True, "A B": True}),
    ("deny_names = secret*", {"secret": False, "secret.csv": False, "Secret.csv": False, "SECRET": False, "sub/secret/a.csv": False, "sub/a.secret": True,
                              "sub/secret.csv": False, "a/Secrets/b/c": False, "nosecret": True, "s/ecret": True}),
    ("deny_names = *.inp *.inc", {"a.inp": False, "A.INP": False, "sub/a.Inp": False, "a.inp/b": False, "a.inp.txt": True, "ainp": True, ".inp": False}),
    ("deny_names = *.inp   # the models\n", {"a.inp": False, "the": True, "models": True, "#": True}),
    ("deny_names = sub/secret", {"sub/secret": False, "sub/secret/a": False, "Sub/SECRET/a": False, "x/sub/secret": True, "secret": True, "sub/secrets": True}),
    ("deny_names = sub/", {"sub/a": False, "sub": False, "a/sub/b": False, "subs/a": True}),
    ("deny_names = sub/*", {"sub/a": False, "sub/a/b": False, "sub2/a": True, "x/sub/a": True}),
    ("deny_names = *", {"a": False, "sub/b": False}),
    ("deny_names = [a-c]?", {"a1": False, "B2": False, "d1": True, "a": True, "x/c9/y": False}),
    ("deny_names = caf\u00e9", {"cafe\u0301": False, "CAF\u00c9": False, "cafe": True}),
    ("deny_names = stra\u00dfe", {"STRASSE": False, "strasse": False, "Stra\u00dfe": False}),
    ("deny_names =\n  one\n  two", {"one": False, "TWO/x": False, "three": True}),
    ("allow_names = *.csv", {"a.csv": True, "a.CSV": False, "sub/a.csv": True, "a.csv.gz": False, "csv": False}),
    ("allow_names = life.json", {"life.json": True, "sub/life.json": False, "life.json/x": False, "Life.json": False}),
    ("allow_names = out/*", {"out/a": True, "out/a/b": True, "a": False, "x/out/a": False}),
    ("allow_names = *.csv *.txt\ndeny_names = secret*", {"a.csv": True, "b.txt": True, "secret.csv": False, "Secret/b.txt": False, "c.dat": False}),
    ("allow_names =", {"a": False}),
    ("max_file = 4", {"1234": True, "12345": False}),       # each file here holds its own name
    ("max_file = 1K", {"a": True}),
]

# (the lines of [command NAME], {name of an input: may it come?})
IN = [
    ("", {"a": True, "material.inp/x": True, "sub/a": True}),
    ("input_names = *.json loads.csv", {"a.json": True, "loads.csv": True, "sub/a.json": False, "loads.csv/x": False, "material.inp": False,
                                        "material.inp/x.json": False, "A.JSON": False, ".a.json": False, "loads.csv2": False}),
    ("input_names = in/", {"in/a": True, "in/b/c": True, "a": False, "inn/a": False, "x/in/a": False}),
    ("input_names = **/*.dat", {"a.dat": True, "x/y/a.dat": True, "a.txt": False}),
    ("input_names = data?", {"data1": True, "data": False, "data12": False, "data1/x": False}),
]

# (lines of [command NAME], how it ended) -> what leaves: logs, names, patterns
WAYS = {("", "by itself"): "logs names patterns", ("", "stopped"): "logs names", ("after_stop = all", "stopped"): "logs names patterns",
        ("after_stop = logs", "stopped"): "logs", ("after_stop = logs", "by itself"): "logs names patterns", ("patterns = no", "by itself"): "logs names",
        ("patterns = no\nafter_stop = all", "stopped"): "logs names", ("logs = no", "by itself"): "names patterns", ("logs = no", "stopped"): "names",
        ("logs = no\nafter_stop = logs", "stopped"): "", ("logs = no\npatterns = no", "by itself"): "names"}

# (the lines of [outbound], or logs of [command NAME], {bytes that stand in stdout, and in stderr: which of them the poller sends while the command
# runs, and what a guard sends, which has one log with the bytes of both})
LIVE = [
    ("", {(9, 9): ("out err", "log"), (9, 0): ("out", "log"), (0, 9): ("err", "log")}),
    ("max_file = 10", {(10, 0): ("out", "log"), (10, 10): ("out err", ""), (11, 0): ("", ""), (11, 9): ("err", ""), (0, 11): ("", "")}),
    ("max_total = 10", {(10, 0): ("out", "log"), (5, 5): ("out err", "log"), (5, 6): ("", ""), (11, 0): ("", ""), (0, 11): ("", ""), (10, 1): ("", "")}),
    ("max_file = 8\nmax_total = 10", {(8, 0): ("out", "log"), (8, 2): ("out err", ""), (8, 3): ("", ""), (9, 1): ("err", ""), (9, 2): ("", "")}),
    ("deny_pieces = /x", {(1, 1): ("", "")}), ("types = * text", {(1, 1): ("", "")}),
    ("deny_content = x", {(1, 1): ("", "")}), ("deny_sums = " + 64 * "a", {(1, 1): ("", "")}), ("deny_content = x\ndry_run = yes", {(1, 1): ("", "")}),
    ("allow_names = *.dat", {(1, 1): ("", "")}), ("deny_names = *出力.txt *.log", {(1, 1): ("", "")}), ("deny_names = *エラー*", {(1, 1): ("out", "log")}),
    ("max_file = 4\ndry_run = yes", {(5, 0): ("", "")}), ("max_files = 1", {(1, 0): ("out", "log")}), ("dry_run = yes", {(1, 1): ("out err", "log")}),
    ("logs = no", {(1, 1): ("", ""), (1, 0): ("", "")}),
]


def test_the_table_is_large_enough():
    assert sum(len(table) for rows in (RUN, OUT, IN) for ini, table in rows) + len(WAYS) >= 150


def asked(door, ini, request):
    """What a door says to a request: the argument vector, NO, BAD, or "unfit" (the owner's program is not there)."""
    module = DOORS[door]
    try:
        if door == "poller":
            commands = module.commands_of(ini, module.read_ini(ini, module.INI_KEYS))
        else:
            commands = module.guard_rules(type("Options", (), {"ini": ini}))
    except module.Stop as stop:
        assert stop.code == BAD and ini in str(stop)
        return BAD
    try:
        if door == "guard":
            return module.permitted_command(commands, request)[1]
        found = re.match(r"'([^']*)'(.*)\Z|(\S*) ?(.*)\Z", request, re.S)        # the two fields of calc-info
        command, argv = module.permit_command(commands, found.group(1) or found.group(3), module.shell_words(found.group(2) or found.group(4) or ""))
        module.check_command(ini, command)
        return argv
    except module.Forbidden:
        return NO
    except (module.Stop, getattr(module, "Refusal", module.Stop)):
        return "unfit"


@pytest.fixture
def umask():
    mask = os.umask(0o022)                             # guard_rules() sets it
    yield
    os.umask(mask)


@pytest.mark.parametrize("door", DOORS)
def test_a_request_gets_the_verdict_that_stands_in_the_table(door, tmp_path, umask):
    wrong = []
    for number, (lines, table) in enumerate(RUN):
        ini = tmp_path / ("%d.ini" % number)
        ini.write_text("[command it]\n" + lines + "\n", encoding="utf-8")
        ini.chmod(0o600)
        for request, verdict in table.items():
            found = asked(door, str(ini), request)
            if found != verdict:
                wrong.append((lines, request, "wanted", verdict, "got", found))
    assert not wrong, wrong


def settled(door, folder, ini, names, ended=" exit 0"):
    """An ended calculation with a file of each name, as this door keeps it: (module, rules of the ini, what serves it)."""
    module = DOORS[door]
    table = module.INI_KEYS
    rules = module.read_ini(ini, table)
    rules.update(commands=module.commands_of(ini, rules), base=os.fsencode(str(folder)), top=os.fsencode(str(folder)), key="")
    ident = "01234567-0123-4123-8123-0123456789ab"
    work, control = os.path.join(str(folder), ident), os.path.join(str(folder), ".mi", ident)
    os.makedirs(work)
    os.makedirs(control)
    for name in names:
        path = os.path.join(work, name)
        with contextlib.suppress(FileExistsError):
            os.makedirs(os.path.dirname(path))
        with open(path, "w") as out:
            out.write(os.path.basename(name))
    for name, text in (("start", "started"), ("child", "running"), ("end", "exit 0"), ("stdout", None), ("stderr", None)):
        with open(os.path.join(control, name), "w") as out:
            out.write("%-255s\n" % ("1 1 %s h %s" % (module.boot_id(), text)) if text else "")
    return module, rules, ident, control


def left(door, folder, ini, names):
    """Which of these results a door lets out."""
    module, rules, ident, control = settled(door, folder, ini, names)
    if door == "guard":
        place = module.Place(dict(rules, key="", top=rules["base"], commands={}, **{"ssh guard": {"audit_log": ""}}), ident)
        return {result.name for result in module.JudgedResults(place).collect(False).found}
    order = {"t": 1, "accept_id": ident, "claim": "c", "attempt": 1, "protocol": 2,
             "calc-info": {"command": "solve", "parameters": "", "result_files": {}, "result_patterns": ["**", ".*", ".*/**"]}}
    with open(os.path.join(control, "journal"), "w") as out:
        out.write(json.dumps({"t": time.time(), "boot": "b", "step": 6, "what": "ended", "exit_code": 0, "reason": "", "whole": True}) + "\n")
    calc = module.Calculation(rules["base"], ident, order)
    found = calc.run.collect(rules["outbound"], module.leaving_kinds({"after_stop": "", "hold": False}, False))
    calc.run.close_trees()
    return {result.name for result in found.found} - set(module.LOG_NAMES)


@pytest.mark.parametrize("door", DOORS)
def test_a_result_leaves_or_stays_as_the_table_says(door, tmp_path):
    wrong = []
    for number, (lines, table) in enumerate(OUT):
        ini = tmp_path / "ini"
        ini.write_text("[outbound]\n" + lines + "\n", encoding="utf-8")
        for turn, name in enumerate(table):            # one directory each: a name may be another's directory
            found = left(door, tmp_path / ("%d.%d" % (number, turn)), str(ini), [name])
            if (name in found) != table[name] or len(found) > 1:
                wrong.append((lines, name, "wanted", table[name], "got", found))
    assert not wrong, wrong


@pytest.mark.parametrize("door", DOORS)
def test_an_input_comes_or_not_as_the_table_says(door, tmp_path):
    wrong = []
    for number, (lines, table) in enumerate(IN):
        ini = tmp_path / "ini"
        ini.write_text("[command it]\nmatch = solve\nargv = /bin/echo\n" + lines + "\n", encoding="utf-8")
        for turn, name in enumerate(table):
            module, rules, ident, control = settled(door, tmp_path / ("%d.%d" % (number, turn)), str(ini), [name])
            try:
                if door == "guard":
                    module.permit_inputs(module.Place(rules, ident), rules["commands"]["solve"])
                else:
                    module.permit_input(rules["commands"]["solve"], name)
                found = True
            except module.Forbidden:
                found = False
            if found != table[name]:
                wrong.append((lines, name, "wanted", table[name]))
    assert not wrong, wrong


@pytest.mark.parametrize("door", DOORS)
def test_what_leaves_of_a_command_that_was_stopped_is_what_its_owner_says(door, tmp_path):
    module, wrong = DOORS[door], []
    for (lines, how), verdict in WAYS.items():
        ini = tmp_path / "ini"
        ini.write_text("[command it]\nmatch = solve\nargv = /bin/echo\n" + lines + "\n")
        command = module.commands_of(str(ini), module.read_ini(str(ini), module.INI_KEYS))["solve"]
        found = " ".join(sorted(module.leaving_kinds(command, how == "stopped")))
        if found != verdict:
            wrong.append((lines, how, "wanted", verdict, "got", found))
    assert not wrong, wrong


def live(door, folder, ini, sizes, kinds):
    """Which of its logs, with so many bytes each, a door sends while the command runs; and how often its own log says that no more does."""
    module, rules, ident, control = settled(door, folder, ini, [])
    said = []
    if door == "guard":
        made = module.Door(dict(rules, key="", **{"ssh guard": {"audit_log": ""}}), None)
        made.place = module.Place(made.rules, ident)
        with open(os.path.join(str(folder), ident, module.LOG), "wb") as out:
            out.write(b"x" * (sum(sizes) - 1) + b"\n")
        found = [made.live_log(0, kinds) for _turn in range(3)][-1]
        assert found in (b"", b"x" * (sum(sizes) - 1) + b"\n")
        with contextlib.suppress(FileNotFoundError), open(os.path.join(str(folder), ".mi", "guard.log")) as text:
            said = re.findall("no more live output", text.read())
        return "log" if found else "", len(said)
    for name, size in zip(("stdout", "stderr", "journal"), sizes + (0,)):
        with open(os.path.join(control, name), "wb") as out:
            out.write(b"x" * (size - 1) + b"\n" if size else b"")
    calc = module.Calculation(rules["base"], ident, {"t": 1, "accept_id": ident, "claim": "c", "attempt": 1, "protocol": 2, "calc-info": {
        "command": "solve", "parameters": "", "result_files": {}, "result_patterns": []}})
    calc.run.leaving_kinds = lambda: kinds
    beats, kept = module.Heartbeats.__new__(module.Heartbeats), module.log
    beats.poller = type("Poller", (), {"rules": rules["outbound"]})
    module.log = lambda *words, **values: said.append(words)
    try:
        parts = [beats.output_parts(calc, [0, 0], 1 << 20) for _turn in range(3)][-1]
    finally:
        module.log = kept
    return " ".join(parts), len(said)


@pytest.mark.parametrize("door", DOORS)
def test_what_leaves_while_the_command_runs_is_what_the_rules_let_leave_at_its_end(door, tmp_path):
    """Once all that it wrote is over a limit, none of it goes on leaving, and that is said once."""
    wrong = []
    for number, (lines, table) in enumerate(LIVE):
        ini, section = tmp_path / "ini", lines.startswith("logs")
        ini.write_text("[command it]\nmatch = solve\nargv = /bin/echo\n%s\n[outbound]\n%s\n" % ((lines, "") if section else ("", lines)), encoding="utf-8")
        module = DOORS[door]
        kinds = module.leaving_kinds(module.commands_of(str(ini), module.read_ini(str(ini), module.INI_KEYS))["solve"], False)
        for turn, (sizes, (parts, log)) in enumerate(table.items()):
            wanted = log if door == "guard" else parts
            found, said = live(door, tmp_path / ("%d.%d" % (number, turn)), str(ini), sizes, kinds)
            over = re.search("max_(file|total)", lines) and wanted not in ("out err", "log") and (wanted, sizes[1]) != ("out", 0)
            if found != wanted or said != bool(over):
                wrong.append((lines, sizes, "wanted", wanted, "got", found, said))
    assert not wrong, wrong


# both doors as processes

SECRET = """#!/bin/sh
[ "$1" ] && cat in* >/dev/null
echo Al-7075 >material.inp
echo result >res.txt
echo told
echo $$ >%s
sleep 60
"""


def scripts(folder):
    """{name: lines of its section}: a command that has an intermediate secret for a while, one that says a secret, and one with rules for names."""
    found = {}
    for name, text, more in (("long", SECRET % os.path.join(folder, "began"), ""), ("loud", "#!/bin/sh\necho Al-7075\necho result >res.txt\n", "logs = no\n"),
                             ("chatty", "#!/bin/sh\ni=0; while [ $i -lt 999 ]; do echo Al-7075 $i; i=$((i + 1)); done; echo result >res.txt; sleep 2\n", ""),
                             ("strict", "#!/bin/sh\necho result >res.txt\n", "input_names = *.json\npatterns = no\n")):
        path = os.path.join(folder, name + ".sh")
        with open(path, "w") as out:
            out.write(text)
        os.chmod(path, 0o755)
        found[name] = "match = %s\nargv = %s\ngrace = 1s\n%s" % (name, path, more)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = suite.World(tmp_path_factory.mktemp("rules"), commands=["long", "loud", "chatty", "strict"]).start()
    made.poller(scripts(made.folder), ini="jobs = 4\n[outbound]\nmax_file = 8K\n")
    yield made
    made.close()


def files(folder):
    """{name: content} of a directory of results."""
    found = {}
    for top, folders, names in os.walk(os.fsencode(str(folder))):
        for name in names:
            with open(os.path.join(top, name), "rb") as text:
                found[os.path.relpath(os.path.join(top, name), os.fsencode(str(folder))).decode()] = text.read()
    return found


def test_a_cancel_at_the_right_moment_fetches_no_intermediate_secret(site, tmp_path):
    accept_id = site.workflow("submit", SITE, "long", "--out", "res.txt", "--out", "**", cwd=str(tmp_path)).stdout.strip()
    wait_until(lambda: os.path.exists(os.path.join(site.folder, "began")))
    assert site.workflow("cancel", accept_id, cwd=str(tmp_path)).returncode == 0
    assert site.workflow("wait", accept_id, cwd=str(tmp_path)).returncode == 143
    found = files(tmp_path)
    assert found.pop(LOGS[1]).endswith(b"mi_system_remote: cancelled\n") and found == {"res.txt": b"result\n", LOGS[0]: b"told\n"}


@pytest.mark.parametrize("command, code, more", [("loud", 0, {}), ("chatty", 65, {LOGS[1]: b""})])
def test_logs_that_stay_at_home_are_neither_shown_nor_sent(command, code, more, site, tmp_path):
    """Because of `logs = no`, or of a limit that they are over."""
    done = site.workflow("run", SITE, command, "--out", "res.txt", cwd=str(tmp_path))
    assert done.returncode == code and "Al-7075" not in done.stdout + done.stderr and files(tmp_path) == dict(more, **{"res.txt": b"result\n"})
    assert not [name for top, folders, names in os.walk(site.state) for name in names if b"Al-7075" in open(os.path.join(top, name), "rb").read()]


def test_inputs_of_other_names_and_results_by_pattern_are_refused_before_anything_runs(site, tmp_path):
    for name, out, code in (("a.json", "res.txt", 0), ("a.txt", "res.txt", 77), ("d/a.json", "res.txt", 77), ("a.json", "*.txt", 77), ("a.json", "d/", 77)):
        folder = tmp_path / str(len(os.listdir(str(tmp_path))))
        (folder / "d").mkdir(parents=True)
        (folder / name).write_text("x")
        done = site.workflow("run", SITE, "strict", "--in", name, "--out", out, cwd=str(folder))
        assert done.returncode == code and (code == 0) == (folder / "res.txt").exists(), (name, out, done.stdout)


def guarded(folder):
    """An external computer whose guard has the same commands."""
    sections = "".join("[command %s]\n%s" % pair for pair in scripts(str(folder)).items()).replace("grace = 1s\n", "")
    return Far(folder, sections)


def test_the_guard_keeps_after_a_cancel_what_was_not_declared_and_logs_that_stay_at_home(tmp_path):
    far = guarded(tmp_path)
    ident = far.fresh()
    with far.open(ident) as one, far.open(ident) as other:
        one.put("in", b"x")
        one.ask("start", command="long")
        one.send("wait", offset=0)
        wait_until((tmp_path / "began").exists)
        told = other.ask("cancel", grace=1)[0][0]
        assert (told["state"], told["code"], told["cancelled"]) == ("ended", 143, True)
        rows = [one.read()]
        while "end" not in rows[-1][0]:
            rows.append(one.read())
    assert b"told" in b"".join(data for _told, data in rows)
    assert far.get(ident, "material.inp") is None and far.get(ident, "remote_program_exec.log").startswith(b"told")
    ident = far.ended("loud")
    assert far.get(ident, "res.txt").startswith(b"result") and far.get(ident, "remote_program_exec.log") is None
    with far.open(far.fresh()) as one:
        one.put("in", b"x")
        assert b"Al-7075" not in one.run("loud")[1]


def test_the_guard_refuses_inputs_of_other_names_and_gives_nothing_by_pattern(tmp_path):
    far = guarded(tmp_path)
    for name, good in (("a.json", True), ("a.txt", False), ("d/a.json", False)):
        ident = far.fresh()
        with far.open(ident) as one:
            assert "sums" in one.put(name, b"x")
            told = one.run("strict")[0]
        assert ("end" in told) == good and (good or "input_names does not allow" in told["why"]), (name, told)
        assert far.get(ident, "res.txt") is None


def test_the_guard_starts_only_the_command_that_was_asked_for_first(tmp_path):
    far = guarded(tmp_path)
    with far.open(far.fresh()) as one:
        one.put("a.json", b"x")
        assert "end" in one.run("loud")[0]
        told = one.ask("start", command="strict")[0][0]
        assert told["no"] == "refused" and "another command" in told["why"]


def test_the_guards_example_in_the_readme_is_accepted_by_both_and_means_the_same(tmp_path):
    with open(os.path.join(suite.ROOT, "README.md"), encoding="utf-8") as text:
        block = re.search(r"^       (\[ssh guard\]\n(?:       .*\n)+)", text.read(), re.M).group(1)
    lines = block.replace("\n       ", "\n")
    argv = re.search(r"argv = (\S+)", lines).group(1)
    script = tmp_path / "program.sh"
    script.write_text("#!/bin/sh\necho args $*\necho x >a.inp\necho y >res\nmkdir sub\necho z >sub/Secret.csv\n")
    script.chmod(0o755)
    lines = lines.replace(argv, str(script)).replace("~/.mi_distcomp", str(tmp_path / "base"))
    far = Far(tmp_path)
    far.write("ini", lines)
    os.chmod(far.path("ini"), 0o600)
    ident = far.ended("solve.sh 5")
    assert far.get(ident, "res") == b"y\n" and far.get(ident, "a.inp") is None and far.get(ident, "sub/Secret.csv") is None
    for text in ("solve.sh 5 6", "solve.sh x"):
        with far.open(far.fresh()) as one:
            one.put("in", b"x")
            assert one.run(text)[0]["no"] == "refused"
    poller = DOORS["poller"]
    settings = poller.read_ini(far.path("ini"), poller.INI_KEYS)
    commands = poller.allow_list(far.path("ini"), settings)
    assert poller.permit_command(commands, "solve.sh", ["5"])[1] == [str(script), "5"]
    for words in (["5", "6"], ["x"]):
        with pytest.raises(poller.Forbidden):
            poller.permit_command(commands, "solve.sh", words)
