"""The audit log of the gate: what was done and what left, chained; who changes it or cuts it is found out; what cannot be noted does not happen."""
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import time
import types

import pytest

import suite
from ssh_door import Far
from suite import PYTHON, SITE, run, wait_until

poller = suite.module("mi_system_remote.py")
SECRET = "SECRET-42-never-told"
COPY = {"copy": "match = copy\nargv = /bin/sh\n  -c\n  echo seen; cat in.txt >out.txt; cp out.txt second.txt; echo %s >third.txt" % SECRET}
EVENTS = ["opened", "order", "start", "end", "leaves", "left"]


def lines_of(path):
    with open(path) as text:
        return [json.loads(line) for line in text]


def events_of(path, *but):
    return [entry["event"] for entry in lines_of(path) if entry["event"] not in but]


@contextlib.contextmanager
def written_to(path, **more):
    """This process writes the log at path meanwhile."""
    before = dict(poller.AUDIT)
    poller.AUDIT.update(path=os.fsencode(str(path)), rules="", to="", head="", late=False, **more)
    try:
        yield
    finally:
        poller.AUDIT.update(before)


def verdict(path, *heads):
    """(exit code, sentence) of `audit verify` with these heads."""
    return poller.verify_audit(os.fsencode(str(path)), poller.heads_told(" ".join(heads)))


def a_log(path, count=40):
    """A log with so many lines; its head."""
    with written_to(path):
        for number in range(count):
            poller.audit("leaves", "run-%d.1" % number, synced=number % 10 == 0, files=number, names=[["n%d" % number, 3, "ab"]])
        return poller.audit_head()


def forked(deed):
    """deed() in a process of its own; how that ended (as waitpid has it)."""
    child = os.fork()
    if not child:
        try:
            deed()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A world in which one calculation was done: (world, path of the log, the workflow side's memory, the poller's ini)."""
    folder = tmp_path_factory.mktemp("audit")
    world = suite.World(str(folder), commands=list(COPY)).start()
    world.poller(COPY, ini="[outbound]\ndeny_names = third.txt\n")
    near = folder / "near"
    near.mkdir()
    (near / "in.txt").write_text("280,150\n")
    env = suite.clean_env(XDG_STATE_HOME=str(folder / "state"), HOME=str(folder))
    told = world.workflow("run", SITE, "copy", "--in", "in.txt", "--out", "**", "--allow-refused", cwd=str(near), env=env)
    assert told.returncode == 0, told.stdout + told.stderr
    path = str(folder / "poller" / "base" / ".mi" / "audit.log")
    wait_until(lambda: "left" in events_of(path))
    yield world, path, str(folder / "state"), str(folder / "poller" / "poller.ini")
    world.close()


def test_a_calculation_leaves_a_chain_that_says_what_was_done_and_what_left(done):
    world, path, state, ini = done
    entries = lines_of(path)
    assert events_of(path, "live", "reload") == EVENTS
    assert [entry["seq"] for entry in entries] == list(range(1, len(entries) + 1))
    leaves = next(entry for entry in entries if entry["event"] == "leaves")
    assert leaves["files"] == 5 and ["out.txt", 8] in [name[:2] for name in leaves["names"]] and leaves["to"].startswith("https://")
    assert leaves["stays"] == {"deny_names": 1} and leaves["verdicts"]["refused"] == 1
    assert re.match("[0-9a-f]{64}$", leaves["rules"]) and verdict(path)[0] == 0
    text = open(path).read()
    assert SECRET not in text and "280" not in re.sub("[0-9a-f]{64}|[0-9.]{8,}", "", text) and "third.txt" not in text


def test_relay_and_workflow_side_are_witnesses_of_the_logs_end(done):
    world, path, state, ini = done
    month, = os.listdir(os.path.join(state, "mi_distcomp_wf"))
    kept = open(os.path.join(state, "mi_distcomp_wf", month, "heads")).read()

    def told_there():
        found = run("mi_dicomapi.py", "--ini", world.ini, "witness", SITE).stdout
        return found if len(poller.HEAD.findall(found)) == 2 else ""         # of the poller, and of the result
    seen = wait_until(told_there, what="witness")
    assert len(poller.HEAD.findall(kept)) == 1 and verdict(path, seen, kept)[0] == 0
    lines = open(path).readlines()
    leaves = next(number for number, line in enumerate(lines) if '"event":"leaves"' in line)
    cut = path + "-cut"
    with open(cut, "w") as out:
        out.writelines(lines[:leaves])
    assert verdict(cut)[0] == 0
    for told in (seen, kept):
        code, text = verdict(cut, told)
        assert code == 65 and "cut off" in text


def test_the_report_says_what_left_in_both_languages_and_for_a_spreadsheet(done):
    world, path, state, ini = done
    told = run("mi_system_remote.py", "audit", "report", "--since", "1d", "--ini", ini)
    assert told.returncode == 0 and "results leave" in told.stdout and "files=5" in told.stdout and "-- whole" in told.stdout, told.stderr
    assert "結果が出ます" in run("mi_system_remote.py", "audit", "report", "--ini", ini, env=suite.clean_env(LANG="ja_JP.UTF-8")).stdout
    rows = run("mi_system_remote.py", "audit", "report", "--csv", "--ini", ini).stdout.splitlines()
    assert rows[0].startswith("time,event,run,command,files,bytes,to,rules") and any(",leaves," in row and "out.txt" in row for row in rows)
    assert run("mi_system_remote.py", "audit", "report", "--csv", "--since", "2100-01-01", "--ini", ini).stdout.splitlines() == rows[:1]
    assert run("mi_system_remote.py", "audit", "report", "--since", "soon", "--ini", ini).returncode == 64
    whole = run("mi_system_remote.py", "audit", "verify", "--ini", ini)
    assert whole.returncode == 0 and run("mi_system_remote.py", "audit", "verify", "--witness", whole.stdout.split()[-1], "--ini", ini).returncode == 0
    assert run("mi_system_remote.py", "audit", "verify", "--witness", "nothing", "--ini", ini).returncode == 64


def changed_at_random(chance, files):
    """Other contents of the log's files {name: bytes}: an edit, a cut or an insertion."""
    files = dict(files)
    name = chance.choice(sorted(files))
    data = files[name]
    lines = data.splitlines(True)
    at, place = chance.randrange(len(data)), chance.randrange(len(lines))
    forged = dict(json.loads(lines[place].decode()), bytes=chance.randrange(10 ** 6))
    forged["sum"] = poller.sum_of_bytes(poller.canonical({key: value for key, value in forged.items() if key != "sum"}))
    files[name] = chance.choice((
        lambda: data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1:],
        lambda: data[:at] + data[at + chance.randrange(1, 2000):],
        lambda: data[:at],
        lambda: b"".join(lines[:place]),
        lambda: b"".join(lines[:place] + lines[place + chance.randrange(1, 4):]),
        lambda: b"".join(lines[:place] + [chance.choice(lines)] + lines[place:]),
        lambda: b"".join(lines[:place] + [chance.choice((b"\n", b"{}\n", b"\xff\n", lines[place].replace(b":", b": ", 1)))] + lines[place:]),
        lambda: b"".join(lines[:place] + [poller.canonical(forged) + b"\n"] + lines[place + 1:]),
        lambda: b"".join(lines[:place] + lines[place:][::-1])))()
    return files


def test_every_one_of_a_thousand_random_edits_cuts_and_insertions_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(poller, "AUDIT_MOST", 1800)
    head = a_log(tmp_path / "audit.log", 14)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(str(tmp_path))}
    assert len(files) > 2 and verdict(tmp_path / "audit.log", head)[0] == 0
    chance, found = random.Random(5), {0: 0, 65: 0, 76: 0, 66: 0}
    while sum(found.values()) < 1000:
        changed = changed_at_random(chance, files)
        if changed == files:
            continue
        for name in [name for name in files if changed[name] != files[name]]:
            (tmp_path / name).write_bytes(changed[name])
        found[verdict(tmp_path / "audit.log", head)[0]] += 1
        assert not found[0], {name: changed[name] for name in files if changed[name] != files[name]}
        for name in files:
            (tmp_path / name).write_bytes(files[name])
    assert found[65] and found[76]


def test_a_log_that_was_written_anew_with_right_sums_is_found_by_its_witness(tmp_path):
    heads = [a_log(tmp_path / "audit.log", 10), a_log(tmp_path / "audit.log", 10)]
    a_log(tmp_path / "other.log", 30)
    assert verdict(tmp_path / "other.log")[0] == 0 and verdict(tmp_path / "other.log", heads[0])[0] == 76
    (tmp_path / "heads").write_text("of 2026-11 at u: %s\nand %s\n" % tuple(heads))
    assert poller.verify_audit(os.fsencode(str(tmp_path / "audit.log")), poller.heads_told(str(tmp_path / "heads")))[0] == 0
    assert verdict(tmp_path / "none.log")[0] == 66


def test_the_chain_goes_on_through_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(poller, "AUDIT_MOST", 3000)
    head = a_log(tmp_path / "audit.log", 30)
    files = [os.fsdecode(path) for path in poller.audit_files(os.fsencode(str(tmp_path / "audit.log")))]
    assert len(files) > 3 and all(lines_of(path)[0]["event"] == "rotated" for path in files[1:])
    assert [entry["seq"] for path in files for entry in lines_of(path)] == list(range(1, int(head.split(".")[0]) + 1))
    os.unlink(files[0])                                # its owner keeps the older ones elsewhere: said, and no break
    assert verdict(files[-1])[0] == 0 and verdict(files[-1], "1." + "0" * 64)[0] == 65
    os.unlink(files[2])
    assert verdict(files[-1])[0] == 76


@pytest.mark.parametrize("point", ["leaves unaudited", "leaves written", "leaves audited", "log put aside"])
def test_killed_at_any_point_the_chain_is_whole(tmp_path, monkeypatch, point):
    monkeypatch.setattr(poller, "AUDIT_MOST", 3000)
    a_log(tmp_path / "audit.log", 6)

    def dies():
        poller.fault = lambda name: name == point and os.kill(os.getpid(), signal.SIGKILL)
        a_log(tmp_path / "audit.log", 6)
    assert forked(dies) == signal.SIGKILL
    head = a_log(tmp_path / "audit.log", 3)
    assert verdict(tmp_path / "audit.log", head)[0] == 0


def test_what_a_crash_has_torn_is_explained_by_the_next_line_and_nothing_else_is(tmp_path):
    a_log(tmp_path / "audit.log", 5)
    with open(str(tmp_path / "audit.log"), "ab") as out:
        out.write(b'{"boot":"half a li\0\0')
    assert verdict(tmp_path / "audit.log")[0] == 76
    a_log(tmp_path / "audit.log", 2)
    text = (tmp_path / "audit.log").read_bytes()
    assert verdict(tmp_path / "audit.log")[0] == 0 and b'"event":"torn"' in text
    (tmp_path / "audit.log").write_bytes(text.replace(b"half a li", b"half a lx"))
    assert verdict(tmp_path / "audit.log")[0] == 76
    assert poller.finding_of_audit(os.fsencode(str(tmp_path / "audit.log")))[0]
    (tmp_path / "audit.log").write_bytes(b"no line of ours\n")
    with written_to(tmp_path / "audit.log"), pytest.raises(OSError):
        poller.audit("leaves")                         # nothing goes on behind what nobody can read
    good, text = poller.finding_of_audit(os.fsencode(str(tmp_path / "audit.log")))
    assert good is False and "move it away" in text


def test_several_writers_make_one_chain(tmp_path, monkeypatch):
    monkeypatch.setattr(poller, "AUDIT_MOST", 20000)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import suite\nfor name in ('mi_system_remote.py', 'execute_remote_command.py'):\n"
            "    m = suite.module(name); m.AUDIT_MOST = 20000; m.AUDIT['path'] = sys.argv[2].encode()\n"
            "    for n in range(30): m.audit('leaves', 'r', synced=n % 9 == 0, n=n)\n")
    writers = [subprocess.Popen([PYTHON, "-c", code, os.path.dirname(suite.__file__), str(tmp_path / "audit.log")]) for _n in range(3)]
    assert [writer.wait(120) for writer in writers] == [0] * 3
    assert verdict(tmp_path / "audit.log", "999.%s" % ("0" * 64))[0] == 65 and len(os.listdir(str(tmp_path))) > 2
    with open(str(tmp_path / "audit.log")) as text:
        assert json.loads(text.readlines()[-1])["seq"] >= 180


def test_a_line_that_has_no_room_is_no_line_and_an_error(tmp_path):
    path = tmp_path / "audit.log"
    a_log(path, 5)

    def full():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50,) * 2)
        with written_to(path), pytest.raises(OSError):
            poller.audit("leaves")
    before = path.read_bytes()
    assert forked(full) == 0 and path.read_bytes() == before


def test_however_long_names_and_lists_are_the_log_can_be_gone_on_with(tmp_path):
    path, name = tmp_path / "audit.log", "/".join(["\U0001f600" * 60] * 4)      # each sign has four bytes in a name, and twelve in a line
    found = types.SimpleNamespace(found=[poller.Result(None, 1, "%s/%d" % (name, n), b"1" * 32, False, 0) for n in range(200)], folders=[], total=200,
                                  kept_by_rule={}, verdicts={})
    with written_to(path):
        poller.audit_leaving("r.1", "a", found)
        poller.audit("leaves", "r.1", verdicts={"%d " % n + "x" * 99: 1 for n in range(2000)}, names=[["n", 1, "ab"]])
        poller.audit("left", "r.1")
    first, second, third = lines_of(path)
    assert verdict(path)[0] == 0 and first["files"] == 200 and len(first["names"]) > 3 and second["verdicts"] == {} and second["names"] == [] and second["of"]
    assert poller.report_row(second)["verdicts"] == ""
    path.write_bytes(b"x" * (poller.AUDIT_LINE + 1))
    with written_to(path), pytest.raises(OSError):     # what is no log is not gone on with
        poller.audit("left", "r.1")


def test_lines_with_right_sums_and_values_of_other_kinds_are_told_as_broken_and_written_behind_by_nobody(tmp_path, capsys):
    path, kinds, good = tmp_path / "audit.log", [None, True, 1e400, float("nan"), 10 ** 400, "\x1b[31m", [1], [[]], {"a": 1}], {}
    with written_to(path):
        good = poller.audit_entry(poller.NOTHING, {"boot": "b", "t": 1.0, "up": 1.0, "rules": "r" * 64}, "leaves", "r.1",
                                  {"names": [["a", 1, "s"]], "verdicts": {"x": 1}, "manifest": "m", "by": "", "to": "x", "files": 1})
        for key, value in itertools.product(good, kinds):
            entry = dict({name: one for name, one in good.items() if name != "sum"}, **{key: value})
            path.write_bytes(poller.canonical(dict(entry, sum=poller.sum_of_bytes(poller.canonical(entry)))) + b"\n")
            for csv in (False, True):
                code = poller.audit_report(os.fsencode(str(path)), types.SimpleNamespace(since="", csv=csv, json=False))
                assert code == verdict(path)[0] and "\x1b" not in capsys.readouterr().out, (key, value)
            with contextlib.suppress(OSError):
                poller.audit("left", "r.1")


def test_the_log_counts_what_stays_by_the_owners_rules_and_has_no_word_of_a_file():
    found = poller.Collector({key: row[1] for key, row in poller.gate_keys()["outbound"].items()}, lambda name, why, aloud: None)
    for code, why in (("held", "SECRET-1 in zip: encrypted"), ("refused", "deny_names secret*"), ("refused", "deny_sums: the whole"), ("held", "types: csv: line 1")):
        found.keep_here("r", poller.Stays(code, why), False)
    assert found.kept_by_rule == {"held": 1, "deny_names": 1, "deny_sums": 1, "types": 1}


def test_a_clock_that_was_set_and_rules_that_were_changed_are_events(tmp_path, monkeypatch):
    path = tmp_path / "audit.log"
    a_log(path, 2)
    real = time.time
    monkeypatch.setattr(poller.time, "time", lambda: real() - 3600)
    a_log(path, 1)
    monkeypatch.undo()
    with written_to(path):
        poller.AUDIT["rules"] = "a" * 64
        poller.audit("end")
        poller.AUDIT["rules"] = ""                     # who does not say, changes nothing
        poller.audit("end")
    entries = lines_of(path)
    assert [entry["event"] for entry in entries] == ["leaves", "leaves", "clock", "leaves", "clock", "rules", "end", "end"]
    assert -3601 < entries[2]["by"] < -3599 and entries[-1]["rules"] == "a" * 64 and verdict(path)[0] == 0


def test_the_sum_of_the_rules_is_of_the_rules_alone(tmp_path):
    def sum_of(text):
        (tmp_path / "ini").write_text(text)
        return poller.audit_rules(str(tmp_path / "ini"))
    one = sum_of("[outbound]\nmax_file = 1M\n[command a]\nargv = /bin/true\n[poller]\njobs = 1\n")
    assert one == sum_of("[command a]\nargv = /bin/true   # the same\n[poller]\njobs = 2\n[outbound]\nmax_file = 1M\n")
    assert len({one, sum_of("[outbound]\nmax_file = 2M\n[command a]\nargv = /bin/true\n"), sum_of("[command a]\nargv = /bin/true\n")}) == 3


def test_what_cannot_be_noted_by_the_poller_does_not_run_and_does_not_leave_and_is_not_lost(tmp_path):
    world = suite.World(str(tmp_path), commands=["mark"]).start()
    try:
        mark = {"mark": "match = mark\nargv = /bin/sh\n  -c\n  echo run >>%s; echo x >out.txt" % (tmp_path / "ran")}
        first = world.poller(mark, ini="[outbound]\naudit_log = /dev/full\n")
        client = world.client()
        ident = client.register("mark", results=["out.txt"])
        wait_until(lambda: "No space left" in first.text(), what="a line")
        first.stop()
        assert not os.path.exists(str(tmp_path / "ran")) and world.state_of(ident) in ("allowed", "sending")
        world.poller(mark)
        wait_until(lambda: world.state_of(ident) == "got", what="its result")
        assert (tmp_path / "ran").read_text() == "run\n"
    finally:
        world.close()


def test_the_poller_killed_at_any_event_leaves_a_whole_chain_and_each_start_has_its_end(tmp_path):
    world = suite.World(str(tmp_path), commands=list(COPY)).start()
    try:
        client, path = world.client(), str(tmp_path / "poller" / "base" / ".mi" / "audit.log")
        for point in ("order written", "start unaudited", "start audited", "end written", "leaves audited", "left written"):
            ident = client.register("copy", results=["out.txt"])
            dies = world.poller(COPY, env=suite.clean_env(MI_FAULT=point), words=("poll",))
            wait_until(lambda: not dies.alive(), what=point)
            after = world.poller(COPY)
            wait_until(lambda: world.state_of(ident) == "got", what=point)
            wait_until(lambda: events_of(path)[-1] == "left", what=point)
            after.stop()
            told = [entry["event"] for entry in lines_of(path) if entry["run"].startswith(ident)]
            assert {"order", "start", "end", "leaves", "left"} <= set(told) and told[-1] == "left", (point, told)
            assert verdict(path)[0] == 0
    finally:
        world.close()


# The guard

def test_the_guard_notes_the_same_in_its_base(tmp_path):
    far = Far(tmp_path, "[outbound]\ndeny_names = secret*\n")
    ident = far.ended()
    with far.open(ident, SSH_CONNECTION="192.0.2.7 1 2 3") as one:
        one.results()
        told = one.ask("results", from_=0)[0][0]
        one.ask("fetched", but=[])
    far.raw("cat /etc/passwd")
    path = far.path("base", ".mi", "audit.log")
    assert [event for event in events_of(path) if event not in ("live", "reload")] == ["order", "start", "end", "leaves", "left", "refused"]
    leaves = next(entry for entry in lines_of(path) if entry["event"] == "leaves")
    assert leaves["to"] == "ssh 192.0.2.7" and leaves["stays"] == {"deny_names": 1} and leaves["run"] == ident + ".1"
    assert verdict(path, told["audit"])[0] == 0 and "SECRET" not in open(path).read()
    assert told["audit"] == "%d.%s" % (leaves["seq"], leaves["sum"])
    said = subprocess.run([PYTHON, "-I", "-S", far.script, "audit", "verify", "--witness", told["audit"], "--ini", far.path("ini")], stdout=subprocess.PIPE)
    assert said.returncode == 0 and said.stdout.startswith(b"whole")
    with open(path, "r+b") as log:
        log.truncate(300)
    said = subprocess.run([PYTHON, "-I", "-S", far.script, "audit", "verify", "--ini", far.path("ini")], stdout=subprocess.PIPE)
    assert said.returncode == 76 and said.stdout.startswith(b"broken")


def test_what_the_guard_cannot_note_does_not_leave(tmp_path):
    far = Far(tmp_path)
    ident = far.ended()
    with open(far.path("ini")) as text:
        ini = text.read()
    far.write("ini", ini + "[outbound]\naudit_log = /dev/full\n")
    with far.open(ident) as one:
        assert one.ask("results", from_=0)[0][0]["no"] == "disk"
        assert b"result" not in repr(one.ask("get", names=["r.txt"])).encode()
        assert one.ask("wait", offset=0)[0][1] == b""
    with far.open(far.fresh()) as one:
        one.put("a", b"1")
        assert one.run()[0]["no"] == "disk"
    far.write("ini", ini)
    assert far.get(ident, "r.txt") == b"result\n"


def test_looking_again_and_again_makes_no_line_again_and_again(tmp_path):
    far = Far(tmp_path)
    ident = far.ended()
    with far.open(ident) as one:
        for _n in range(20):
            one.results()
            one.ask("put", size=0, files=[])
    assert events_of(far.path("base", ".mi", "audit.log")).count("leaves") == 1
