"""How the workflow side puts results into a directory: what is there already, whose it is, what may not be there, and what is told of the rest."""
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest

import suite
from fake_relay import ACCEPT_ID
from test_workflow import ask, everything, failed, fake, here, token     # noqa: F401 (fixtures)

NAME = "mi_system_wf.py"
OWN = ["mi_dicomapi.py", "mi_system_remote.py", "mi_distributed_computing_assist.ini", "a.pth", "sitecustomize.py", "UserCustomize.py", "b.pyc",
       "sub/__pycache__/json.cpython-311.pyc"]


def words_for(one, token, *more):
    return list(more) + ["--url", one.url, "--token-file", token]


def test_what_was_declared_is_known_on_this_side_or_must_be_said(fake, here, token, tmp_path):
    one, env = fake(results={"a": b"new", ".ssh/authorized_keys": b"ssh-rsa theirs"}), suite.clean_env(HOME=str(tmp_path))
    one.info = {"result_names": ["a", ".ssh/authorized_keys"], "result_patterns": ["**"]}     # as a relay that means harm says
    target = tmp_path / "target"
    target.mkdir()
    done = suite.run(NAME, *words_for(one, token, "result", ACCEPT_ID), cwd=str(target), env=env)
    assert failed(done, 64, ACCEPT_ID, "--out") and everything(target) == []
    assert suite.run(NAME, *words_for(one, token, "submit", "s", "c", "--out", "a"), cwd=str(target), env=env).returncode == 0
    done = suite.run(NAME, *words_for(one, token, "result", ACCEPT_ID), cwd=str(target), env=env)
    assert failed(done, 76, ".ssh/authorized_keys was not declared") and ".ssh" not in os.listdir(str(target))
    del one.results[".ssh/authorized_keys"]
    assert suite.run(NAME, *words_for(one, token, "result", ACCEPT_ID), cwd=str(target), env=env).returncode == 0
    assert (target / "a").read_bytes() == b"new" and everything(target) == ["a"]
    other = fake(results=one.results)                  # what another relay's calculation of that number has declared is something else
    assert failed(suite.run(NAME, *words_for(other, token, "result", ACCEPT_ID), cwd=str(target), env=env), 64, "--out")


def test_what_is_there_and_not_of_this_calculation_is_replaced_only_where_that_was_agreed(fake, here, token, tmp_path):
    data = os.urandom(2 << 20)
    one, env = fake(results={"a": b"new", "b": data, "c": b"c"}), suite.clean_env(HOME=str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert suite.run(NAME, *words_for(one, token, "submit", "s", "c", "--out", "a", "b", "c"), cwd=str(here), env=env).returncode == 0
    for name in ("a", "b"):
        (elsewhere / name).write_text("mine")
    done = suite.run(NAME, *words_for(one, token, "result", ACCEPT_ID, "--json"), cwd=str(elsewhere), env=env)
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 65 and found["files"] == ["c"] and found["verdicts"] == {"name": {"count": 2, "names": ["a", "b"]}}
    assert (elsewhere / "a").read_text() == (elsewhere / "b").read_text() == "mine" and everything(elsewhere) == ["a", "b", "c"]
    assert "is there already" in found["missing"]["a"] and "finish" not in one.names()
    for name, data_there in (("a", b"new"), ("b", data)):
        (elsewhere / name).write_bytes(data_there)     # the very results: there is nothing to replace
    assert suite.run(NAME, *words_for(one, token, "result", ACCEPT_ID), cwd=str(elsewhere), env=env).returncode == 0
    for words in (["--to", "."], ["--out", "a", "b", "c"]):
        (elsewhere / "a").write_text("mine")
        done = suite.run(NAME, *words_for(one, token, "result", ACCEPT_ID, *words), cwd=str(elsewhere), env=env)
        assert done.returncode == 0 and (elsewhere / "a").read_bytes() == b"new", done.stderr


def test_a_second_fetcher_is_told_so_and_what_a_killed_one_left_goes_away(fake, here, token):
    one = fake(results={"a": b"x", "b": os.urandom(2 << 20)})
    nest = here / (".mi-" + ACCEPT_ID)
    nest.mkdir(0o700)
    with open(str(nest / "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert failed(ask(one, here, token, "--out", "a", "b"), 75, "another program", ACCEPT_ID)
    (nest / "0").write_text("left by a killed one")
    (nest / "1").write_bytes(b"wrong")
    assert ask(one, here, token, "--out", "a", "b").returncode == 0
    assert everything(here) == ["a", "b"] and (here / "b").read_bytes() == one.results["b"]


def test_no_result_can_have_the_name_of_what_arrives_for_another_one(fake, here, token):
    names = [".mi-%s/1" % ACCEPT_ID, ".MI-%s" % ACCEPT_ID.upper(), ".mi-%s/0" % ACCEPT_ID.replace("0a1b", "ffff"), "d/.mi-%s" % ACCEPT_ID]
    one = fake(results=dict({name: b"evil" for name in names}, big=os.urandom(2 << 20), small=b"s"))
    done = ask(one, here, token, "--out", "small", "big", ".mi-*/*", ".MI-*", "d/", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 65 and found["verdicts"]["name"]["count"] == 4 and sorted(found["files"]) == ["big", "small"]
    assert everything(here) == ["big", "small"] and (here / "big").read_bytes() == one.results["big"]


def test_results_named_like_our_own_files_are_not_put_where_this_program_lies(fake, here, token):
    shutil.copy(suite.script(NAME), str(here))
    one = fake(results=dict({name: b"raise SystemExit(99)" for name in OWN + [NAME]}, ok=b"ok"))
    done = subprocess.run([suite.PYTHON, "-I", "-S", NAME, "run", "s", "c", "--out", "**", "--json", "--url", one.url, "--token-file", token], cwd=str(here),
                          env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    found = json.loads(done.stdout.decode())
    assert done.returncode == 65 and found["files"] == ["ok"] and found["verdicts"]["name"]["count"] == len(OWN) + 1, done.stderr
    assert sorted(everything(here)) == sorted(["ok", NAME]) and (here / NAME).read_bytes() == open(suite.script(NAME), "rb").read()
    assert ask(one, here, token, "--out", "**", "--to", "elsewhere").returncode == 0       # there it does not lie


VERDICTS = [                       # what the relay tells, what was asked for, more words, the exit code of a command that ended with 0
    ({"unreadable": 1}, ["*"], [], 65), ({"changing": 2}, ["d/"], [], 65), ({"name": 1}, ["**"], [], 65), ({"limit": 3}, ["*"], [], 65),
    ({"refused": 1}, ["*"], [], 65), ({"refused": 1}, ["*"], ["--allow-refused"], 0), ({"refused": 1, "limit": 1}, ["*"], ["--allow-refused"], 65),
    ({"outside": 1, "special": 2}, ["**"], [], 0), ({"outside": 1}, ["gone"], [], 65), ({}, ["none*"], [], 0), ({}, ["a"], [], 0), ({}, ["gone"], [], 65)]


@pytest.mark.parametrize("told, asked, words, code", VERDICTS)
def test_what_was_asked_for_and_stays_there_is_told_and_decides_the_exit_code(fake, here, token, told, asked, words, code):
    one = fake(results={"a": b"x"})
    one.info = {"verdicts": {name: {"count": count, "names": ["k/\u202e%d" % n for n in range(count)]} for name, count in told.items()}}
    done = ask(one, here, token, "--out", "a", *asked, *words)
    assert done.returncode == code and all("%s %d" % pair in done.stdout for pair in told.items()) and "\u202e" not in done.stdout
    found = json.loads(ask(one, here, token, "--out", "a", *asked, *words, "--json").stdout)
    assert found["exit_code"] == code and {name: one["count"] for name, one in found["verdicts"].items()} == told
    one.info = {"exit_code": 3}
    assert ask(one, here, token, "--out", "a", *asked, *words).returncode == 3


def test_an_older_poller_that_only_counts_is_understood(fake, here, token):
    one = fake(results={"a": b"x"})
    one.info = {"refused": {"*": "Permission denied: 2, max_file: 1"}}
    found = json.loads(ask(one, here, token, "--out", "*", "--json").stdout)
    assert found["exit_code"] == 65 and found["verdicts"] == {"refused": {"count": 3, "names": []}}


def test_inputs_that_link_to_one_another_come_to_an_end(fake, here, token):
    for name in "abc":
        (here / "in" / name).mkdir(parents=True)
        (here / "in" / name / "file").write_text(name)
        for other in set("abc") - {name}:
            (here / "in" / name / other).symlink_to("../" + other)
    one = fake(results={"r": b"x"})
    assert ask(one, here, token, "--in", "in/", "--out", "r").returncode == 0
    assert len(one.manifest) == 3 + 6 + 6              # each chain of different directories
    for number in range(12):
        (here / "many" / str(number)).mkdir(parents=True)
        for other in range(12):
            (here / "many" / str(number) / ("to%d" % other)).symlink_to("../%d" % other)
    assert failed(ask(fake(), here, token, "--in", "many/", "--out", "r"), 66, "many/")


@pytest.fixture
def site(make_world):
    """A relay without a poller."""
    return make_world(commands=["c"]).start()


def test_marks_times_empty_directories_and_holes_travel_both_ways(site, tmp_path):
    folder = tmp_path / "w"
    (folder / "d" / "empty").mkdir(parents=True)
    (folder / "d" / "go.sh").write_text("#!/bin/sh\n")
    (folder / "d" / "go.sh").chmod(0o755)
    os.utime(str(folder / "d" / "go.sh"), (1000000000.25, 1000000000.25))
    done = site.workflow("submit", suite.SITE, "c", "--in", "d/", "--out", "out/", "--url", site.url, cwd=str(folder))
    accept_id, client = done.stdout.strip(), site.client()
    first = client.ok("POST", "calc-request", {"v": 2, "site_id": suite.SITE, "poller": "old", "take": "12345678", "wait": 0})
    assert list(first["inputs"]["files"]) == ["d/go.sh"]               # who does not know empty directories is told of none
    first = client.ok("POST", "calc-request", {"v": 2, "site_id": suite.SITE, "poller": "old", "take": "12345678", "wait": 0, "dirs": True})
    sent = first["inputs"]["files"]
    assert list(sent) == ["d/go.sh", "d/empty/"] and sent["d/go.sh"]["x"] is True and sent["d/go.sh"]["mtime"] == 1000000000.25
    claim, holes = first["claim"], b"begin" + bytes(8 << 20) + b"end"
    results = {"out/big": holes, "out/run": b"#!/bin/sh\n", "out/text": b"t"}
    for name, more in (("calc-params-complete", {}), ("calc-start", {}), ("calc-end", {"result": "calc end", "exit_code": 0})):
        client.ok("POST", name, dict({"v": 2, "accept_id": accept_id, "claim": claim}, **more))
    listed = {name: dict(suite.entry(data), mtime=1234567890) for name, data in results.items()}
    listed["out/run"]["x"] = True
    listed["out/empty/"] = suite.entry(b"")
    fields = {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": listed, "verdicts": {"outside": {"count": 1, "names": ["out/l\x9b"]}}}
    client.ok("POST", "send-results", fields)
    for number, data in enumerate(results.values()):
        client.ok("POST", "files/%s/result/%d?v=2&offset=0&claim=%s" % (accept_id, number, claim), body=data)
    client.ok("POST", "end-send", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "end send"})
    assert list(client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]["result_files"]) == list(results)
    code = "import os, sys; os.umask(0o027); os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", code, suite.PYTHON, "-I", "-S", suite.script(NAME), "result", accept_id, "--out", "out/", "--json"] + site.reach()
    done = subprocess.run(words, cwd=str(folder), env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    found = json.loads(done.stdout.decode())
    assert done.returncode == 0 and sorted(found["files"]) == sorted(list(results) + ["out/empty/"]) and found["verdicts"]["outside"]["names"] == ["out/l\\x9b"], done.stderr
    modes = {name: stat.S_IMODE(os.stat(str(folder / "out" / name)).st_mode) for name in ("run", "text", "big", "empty")}
    assert modes == {"run": 0o750, "text": 0o640, "big": 0o640, "empty": 0o750} and (folder / "out" / "big").read_bytes() == holes
    info = os.stat(str(folder / "out" / "big"))
    assert info.st_mtime == 1234567890 and info.st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("entry_of, code", [({"mtime": "x"}, 400), ({"mtime": float("inf")}, 400), ({"mtime": True}, 400), ({"mtime": -5}, 200), ({"x": 1}, 200)])
def test_a_mark_that_is_none_is_refused(world, entry_of, code):
    page = {"a": dict(suite.entry(b"x"), **entry_of)}
    status, first = world.client().call("POST", "add-calcinfo", {"v": 2, "request_id": os.urandom(8).hex(), "calc-info": {
        "command": "hello", "remote-site": suite.SITE, "parameters": "", "result_files": {}, "parameter_files": page}})
    assert first["code"] == code


@pytest.mark.parametrize("found", [{"nonsense": {"count": 1}}, {"limit": {"count": 0}}, {"limit": {"count": "1"}}, {"limit": 1}, {"limit": {"count": 1, "names": [1]}},
                                   {"limit": {"count": 1, "names": "a"}}, []])
def test_verdicts_that_are_none_are_refused(world, found):
    client = world.client()
    accept_id = client.register("hello", results=["a"])
    taken = client.claim()
    while taken[0] != accept_id:
        taken = client.claim()
    client.walk(*taken, upto="calc-end")
    fields = {"v": 2, "accept_id": accept_id, "claim": taken[1], "result_files": {}, "verdicts": found}
    assert client.call("POST", "send-results", fields)[1]["code"] == 400


# ---- two at once, at each named point of storing: the block itself, in forked processes

wf = suite.module(NAME)
IDS = {"A": ACCEPT_ID, "B": ACCEPT_ID[:-1] + "f"}


def of(mark):
    """The results of a calculation, told apart from another's by each byte."""
    return {b"a": mark.encode() * 3000, b"d/b": mark.encode() * 300000, b"z": mark.encode()}


def stores(to, mark, **how):
    """Stores of(mark) as a fetch does; the exit code: 0, 75 another one is at it, 65 something must stay as it is."""
    kept = []
    try:
        target = wf.Target(to, IDS[mark], **how)
    except wf.Stop as stop:
        return stop.code
    for number, (name, data) in enumerate(of(mark).items()):
        if not target.agreed and target.has_file(name.decode(), len(data), hashlib.sha256(data).hexdigest()):
            continue
        try:
            if len(data) > 100000:
                with open(target.part_path(number), "wb") as out:
                    out.write(data)
            target.store(number, name, None if len(data) > 100000 else data, name == b"z", 10 ** 18)
        except wf.NotStored:
            kept.append(name)
    target.make_directory(b"e/f")
    target.close(True)
    return 65 if kept else 0


def begun(act, at):
    """act() in a child that stops at its fault point number `at`: (pid, True if it has come so far)."""
    child = os.fork()
    if not child:
        count, code = iter(range(10 ** 6)), 70
        wf.fault = lambda name: next(count) == at and os.kill(os.getpid(), signal.SIGSTOP)
        try:
            code = act()
        finally:
            os._exit(code)
    status = os.waitpid(child, os.WUNTRACED)[1]
    return child, None if os.WIFSTOPPED(status) else os.WEXITSTATUS(status)


def ended(child, number):
    """The exit code of a stopped child that is sent this signal."""
    os.kill(child, number)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def whole(to, marks, before=None):
    """{mark of whose results each file is}, of all that is there; a mixture fails. before: what may still be there."""
    found = set()
    for top, folders, names in os.walk(str(to)):
        for name in names if not os.path.relpath(top, str(to)).startswith(".mi-") else ():
            path = os.path.join(top, name)
            with open(path, "rb") as source:
                data, name = source.read(), os.fsencode(os.path.relpath(path, str(to)))
            found |= {"-"} if data == before else {mark for mark in marks if of(mark)[name] == data} or {(name, data[:9])}
    assert found <= set(marks) | {"-"}, found
    return found


@pytest.mark.parametrize("first, second, how, signal_number", [
    ("A", "A", {}, 9), ("A", "A", {}, 18), ("A", "B", {"sync": False, "began": 1 << 62}, 9), ("A", "B", {}, 18), ("A", "A", {"agreed": False}, 9), ("A", "A", {"agreed": False}, 18)])
def test_two_that_store_at_once_leave_whole_files_whichever_point_one_stands_at_or_is_killed_at(tmp_path, monkeypatch, first, second, how, signal_number):
    for name in ("fsync", "sync"):                     # processes die here, not the host
        monkeypatch.setattr(os, name, lambda *words: None)
    at, over = 0, False
    while not over:
        to = str(tmp_path / str(at))
        os.mkdir(to)
        if how.get("agreed", True):
            (tmp_path / str(at) / "a").write_bytes(b"mine")
        child, code = begun(lambda: stores(to, first, **how), at)
        over = code is not None
        assert code in (None, 0)
        whole(to, first, b"mine")
        other = stores(to, second, **how)
        assert other in (0, 75) and (other == 0 or first == second), (at, other)
        whole(to, (first, second), b"mine")
        last = code if over else ended(child, signal_number)
        assert last in (0, -9, 75) and (signal_number == 9 or 0 in (other, last)), (at, other, last)
        whole(to, (first, second), b"mine")
        assert [stores(to, mark, **how) for mark in (first, second)] == [0, 0], at
        assert whole(to, second) == {second} and everything(to) == ["a", "d/b", "z"] and os.listdir(to + "/e") == ["f"], at
        assert not [name for name in os.listdir(to) if name.startswith(".mi")], (at, os.listdir(to))
        shutil.rmtree(to)
        at += 1
    assert at > 15


def test_a_target_that_is_removed_meanwhile_is_said(tmp_path):
    to = str(tmp_path / "to")
    child, code = begun(lambda: 74 if isinstance(failure_of(wf.Target, to, ACCEPT_ID), FileNotFoundError) else 1, 0)
    assert code is None
    shutil.rmtree(to)
    assert ended(child, 18) == 74


def failure_of(act, *words):
    """What act() raises."""
    try:
        return act(*words)
    except Exception as error:
        return error
