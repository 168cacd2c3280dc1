"""State files that are empty, torn, zeros or something else: what they are of is named and left out, everything else goes on."""
import argparse
import errno
import io
import json
import os
import pathlib
import re
import shutil
import stat

import pytest

import suite
from ssh_door import Far
from test_ssh_runner import lab, run          # noqa: F401  (lab: a fixture)

runner, poller, workflow = suite.module("execute_remote_command.py"), suite.module("mi_system_remote.py"), suite.module("mi_system_wf.py")
DAMAGES = {"empty": b"", "a list": b"[1, 2]\n", "zeros": b"\0" * 300, "torn": b'{"host": "h", "t', "an object": b"{}\n", "no text": b"\xff\xfe\x80\n", "a number": b"5\n",
           "a text": b'"x"\n', "nested": b"[" * 100000, "of lists": b'{"rows": [[1]], "files": [1], "settings": [], "calc-info": [], "t": [], "step": [], "what": []}\n'}
IDENT = "0123abcd-0000-4000-8000-%012x"
SETTINGS = runner.Settings("~/x", 0, (5, 60.0), 20.0, 15.0, [], [], 0)._asdict()
ORDER = {"host": "h", "command": "c", "inputs": [], "into": "/", "mode": "run", "keep": False, "time": 1.0, "settings": SETTINGS}


@pytest.fixture
def told(monkeypatch):
    """What the program writes into its log."""
    monkeypatch.setitem(poller.SAY, "log", io.StringIO())
    return lambda: poller.SAY["log"].getvalue()


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_runners_broken_record_is_named_and_the_others_are_listed_and_cleaned(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for n in range(3):
        runner.Record(IDENT % n, ORDER, lock=False).note_step("ordered")
    folder = tmp_path / "mi_distcomp_ssh"
    for name in ("order.json", "journal"):
        (folder / (IDENT % 1) / name).write_bytes(DAMAGES[damage])
        runner.main(["list"])
        out, err = capsys.readouterr()
        assert [row.split()[0] for row in out.splitlines()] == [IDENT % n for n in range(3) if n != 1 or name == "journal"], name
        assert name == "journal" or "its record cannot be read (%s" % (folder / (IDENT % 1) / name) in err
        (folder / (IDENT % 1) / name).write_bytes(json.dumps(ORDER).encode() if name == "order.json" else b"")
    (folder / (IDENT % 1) / "order.json").write_bytes(DAMAGES[damage])
    assert runner.main(["clean", IDENT % 1, IDENT % 0]) == 74 and "remove the directory" in capsys.readouterr()[0]
    assert runner.main(["clean", "--older", "0s"]) == 0 and sorted(os.listdir(str(folder))) == [IDENT % 1]
    with pytest.raises(runner.Stop) as stop:
        runner.main(["resume", IDENT % 1])
    assert stop.value.code == 74


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_broken_connection_budget_is_begun_anew(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    runner.spend_connection("place", 3)
    book = [tmp_path / "mi_distcomp_ssh" / name for name in os.listdir(str(tmp_path / "mi_distcomp_ssh"))][0]
    kept = book.read_bytes()
    book.write_bytes(kept + DAMAGES[damage])
    runner.spend_connection("place", 3)
    assert re.match(rb"([0-9]+\.[0-9]{3}\n){1,2}\Z", book.read_bytes())


def test_a_run_goes_its_way_beside_broken_records_and_a_broken_budget(lab, tmp_path):
    (tmp_path / "budget.ini").write_text(open(lab.path("ini")).read().replace("connects = 0", "connects = 100"))
    assert run(lab, tmp_path, "--ini", "budget.ini", "run", "hpc", "true")[0] == 0
    top = lab.path("state", "mi_distcomp_ssh")
    for name in os.listdir(top):
        path = os.path.join(top, name) if name.startswith("connects.") else os.path.join(top, name, "order.json")
        with open(path, "wb") as out:
            out.write(b"\0" * 100)
    code, out = run(lab, tmp_path, "--ini", "budget.ini", "run", "hpc", "echo 1 >r")
    assert code == 0 and (tmp_path / "r").exists(), out


GUARDS = ["batch", "lost", "out", "command", "end", "start", "child", "end.tmp", "fetched", "inputs", "began", "journal", "queue.slurm"]


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_what_is_broken_of_one_calculation_hides_none_from_a_guards_key_and_can_be_cleaned(damage, tmp_path):
    far = Far(tmp_path, "[outbound]\nkeep_refused = 0s\n")         # (of what has no end all is kept from leaving)
    whole = far.ended("true")
    os.unlink(far.path("base", ".mi", whole, "alive")) # (no FIFO can be copied)
    idents = [far.fresh() for _name in GUARDS + ["none"]]
    for ident in idents:
        for place in ("base", "base/.mi"):
            shutil.copytree(far.path(place, whole), far.path(place, ident))
    for place in ("base", "base/.mi"):
        shutil.rmtree(far.path(place, whole))
    for ident, name in zip(idents, GUARDS):
        with open(far.path("base", ".mi", ident if name != "queue.slurm" else "", name), "wb") as out:
            out.write(DAMAGES[damage])
        for name in ("start", "child"):                # long ago: what has no end is lost
            os.utime(far.path("base", ".mi", ident, name), (0, 0))
    with far.open() as one:
        rows = one.ask("list", after="")[0][0]["runs"]
        assert [row[0] for row in rows] == idents and rows[-1][1:2] + rows[-1][4:] == ["ended", 0]
        for ident, name in zip(idents, GUARDS):
            told = one.ask("hello", v=2, run=ident, lane="", turn="t1")[0][0]
            if told["state"] == "running":             # what was torn is its end: nobody knows of one
                one.ask("cancel", grace=0)
            one.results()
            told = one.ask("clean", discard=True)[0][0]
            assert told.get("state") == "gone" and not os.path.exists(far.path("base", ident)), (name, told)
        one.ask("hello", v=2, run=idents[-1], lane="", turn="t1")
        assert one.results()[0], "the others are as they were"


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_broken_memory_of_the_workflow_side_is_as_none_and_stops_nothing(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    options, relay = argparse.Namespace(agreed=False, words=["result", IDENT % 1], allow_refused=False), argparse.Namespace(url="https://r")
    note = pathlib.Path(os.fsdecode(workflow.memory_folder())) / (IDENT % 1)
    note.parent.mkdir(parents=True)
    for text in (DAMAGES[damage], json.dumps({"url": "https://r", "to": 5, "names": [["x"]], "patterns": {}}).encode()):
        note.write_bytes(text)
        with pytest.raises(workflow.Stop) as stop:
            workflow.recall(relay, IDENT % 1, str(tmp_path), options)
        assert stop.value.code == 64 and "--out" in str(stop.value)
    workflow.remember(relay, IDENT % 1, argparse.Namespace(names=["a"], patterns=["b/"]))
    assert workflow.recall(relay, IDENT % 1, str(tmp_path), options)[:2] == (["a"], ["b/"])


POLLERS = ["order.json", "journal", "waits", "batch", "end", "start", "child"]


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_what_is_broken_of_one_calculation_hides_none_from_a_pollers_list_and_outbox(damage, tmp_path, told, capsys):
    base = os.fsencode(str(tmp_path))
    order = {"accept_id": "", "claim": "c", "attempt": 1, "calc-info": {"command": "c"}, "protocol": 2, "site": "s", "t": 1.0}
    for n in range(len(POLLERS) + 1):
        control = tmp_path / ".mi" / (IDENT % n)
        control.mkdir(parents=True)
        (control / "order.json").write_text(json.dumps(dict(order, accept_id=IDENT % n)))
        (control / "journal").write_bytes(b'{"what": "starting", "t": 1}\n{"what": "ended", "t": 2}\n')
        (control / "waits").write_text('{"next": 1, "why": "because"}')
        if n < len(POLLERS):
            (control / POLLERS[n]).write_bytes(DAMAGES[damage])
    (tmp_path / ".mi" / "settings").write_bytes(DAMAGES[damage])
    found = [calc.name for calc in poller.on_disk(base)]
    assert sorted(found) == [IDENT % n for n in range(1, len(POLLERS) + 1)]
    assert "unreadable" in told() and IDENT % 0 in told()
    poller.cmd_outbox(base, 0, False)
    rows = capsys.readouterr()[0].splitlines()
    assert len(rows) >= len(POLLERS) - 1 and any(row.startswith(IDENT % len(POLLERS)) for row in rows), rows
    assert {calc.state() for calc in poller.on_disk(base)} <= {"undelivered", "claimed", "lost", "starting"}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_pollers_own_small_files_are_made_anew(damage, tmp_path):
    base = os.fsencode(str(tmp_path))
    (tmp_path / ".mi" / "spare").mkdir(parents=True)
    for name in ("poller", "spare/take", "spare/ready"):
        (tmp_path / ".mi" / name).write_bytes(DAMAGES[damage])
    name = poller.poller_name(base)
    assert re.match(r"[!-~]+\Z", name) and poller.poller_name(base) == name


@pytest.mark.parametrize("damage", ["empty", "zeros", "no text", "a list"])
def test_a_relay_starts_and_checks_beside_its_broken_small_files(damage, tmp_path):
    world = suite.World(tmp_path, tls=False)
    try:
        for name in ("instance", "maintenance", "settings", "lock", "restored"):
            (tmp_path / "state" / name).write_bytes(DAMAGES[damage])
        world.start()
        done = suite.run("mi_dicomapi.py", "check", "--ini", world.ini)
        assert "Traceback" not in done.stderr and "a bug" not in done.stderr + done.stdout, done
        assert re.match(r"[!-~]{1,100}\n", (tmp_path / "state" / "instance").read_text())
        assert suite.run("mi_dicomapi.py", "list", "--ini", world.ini).returncode == 0
    finally:
        world.close()


@pytest.mark.parametrize("name", ["execute_remote_command.py", "mi_system_remote.py", "mi_dicomapi.py"])
def test_a_file_system_that_knows_no_fsync_of_directories_is_no_failure(name, tmp_path, monkeypatch):
    module = suite.module(name)
    sync, real = module.sync_path, os.fsync
    for number, of_directories in ((errno.EINVAL, True), (errno.EIO, False)):
        def fsync(fd):
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(number, os.strerror(number))
            return real(fd)
        monkeypatch.setattr(os, "fsync", fsync)
        try:
            sync(os.fsencode(str(tmp_path)))
            good = True
        except OSError:
            good = False
        assert good == of_directories


def test_a_program_whose_first_line_ends_with_cr_lf_is_called_that_by_guard_and_poller(tmp_path):
    program = tmp_path / "solve.sh"
    program.write_bytes(b"#!/bin/sh\r\necho 1\r\n")
    program.chmod(0o755)
    far = Far(tmp_path / "far" if (tmp_path / "far").mkdir() is None else None, "[command crlf]\nargv = %s\nmatch = crlf\n" % program)
    with far.open(far.fresh()) as one:
        one.put("in", b"x")
        told = one.run("crlf")[0]
    assert told["no"] == "refused" and "%s: its first line ends with CR LF" % program in told["why"], told
    (tmp_path / "poller.ini").write_text("[poller]\nsite = s\nurl = https://127.0.0.1:1\ncalc_base = %s\n[command crlf]\nargv = %s\n" % (tmp_path / "base", program))
    (tmp_path / "poller.ini").chmod(0o600)
    done = suite.run("mi_system_remote.py", "check", "--ini", str(tmp_path / "poller.ini"), cwd=str(tmp_path))
    assert "its first line ends with CR LF" in done.stdout, done
    program.write_bytes(b"#!/bin/sh\necho 1\n")
    far.ended("crlf")
