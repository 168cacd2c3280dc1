"""The doors of the SSH way's far side: what the table says passes, everything else is refused; and each refusal is lost when its check is
taken out."""
import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import marshal
import os
import re
import shutil
import stat
import subprocess
import time
import zlib

import pytest

import ssh_lab
import suite
from test_ssh_logins import NODE
from ssh_door import IDENT, START, Far, Session, request, rewrite_end, runner
from suite import PYTHON

VERBS, STATES = runner.VERBS, runner.STATES


@pytest.fixture
def far(tmp_path):
    return Far(tmp_path)


# The table: every verb in every state, by every kind of session, through both doors. The doors serve in this process.

def served(rules, *requests):
    """The answers of a session to these requests, each a dictionary, or a pair of one and the bytes behind it. Nobody asks any more then."""
    source, into = os.pipe()
    fcntl.fcntl(into, 1031, 1 << 20)                   # F_SETPIPE_SZ: nobody reads yet
    answers = os.open("/tmp", os.O_RDWR | os.O_TMPFILE)
    mask = os.umask(0o077)
    try:
        for one in requests:
            one, data = one if isinstance(one, tuple) else (one, b"")
            os.write(into, (json.dumps(one).encode() + b"\n" if isinstance(one, dict) else one) + data)
        os.close(into)
        runner.Door(rules, runner.Channel(source, answers)).serve()
        os.lseek(answers, 0, 0)
        with os.fdopen(answers, "rb") as text:
            found = []
            for row in iter(text.readline, b""):
                found.append(json.loads(row.decode("ascii")))
                text.read(found[-1].get("size", 0))
            return found
    finally:
        os.umask(mask)
        os.close(source)


def hello(run, lane=""):
    return {"do": "hello", "v": 2, "run": run, "lane": lane, "turn": "t1"}


PUT = {"do": "put", "size": 1, "files": [["a", 1, 0o644, 10 ** 18]]}, b"x"
COMMAND = {"far": "echo out; sleep ${HOLD:-0}", "guard": "work.sh abc"}
ASKED = {                      # a request of each form that the table has
    "hello": [hello(None)],
    "put": [PUT, ({"do": "put", "size": 1, "name": "new", "at": 0, "end": [1, 0o644, 5]}, b"x")],
    "start": [{"do": "start", "command": None}],
    "state": [{"do": "state"}],
    "wait": [{"do": "wait", "offset": 0}],
    "cancel": [{"do": "cancel", "grace": 1}],
    "results": [{"do": "results", "from": 0}],
    "get": [{"do": "get", "names": ["b"]}, {"do": "get", "name": "b", "at": 0, "length": 0, "size": 1, "mtime": 0}],
    "fetched": [{"do": "fetched", "but": []}],
    "clean": [{"do": "clean", "discard": True}],
    "list": [{"do": "list", "after": ""}],
}
CHANGE = ("put", "start", "cancel", "fetched", "clean")


class Table:
    """Calculations in every state, below one base of each door."""

    def __init__(self, folder):
        self.far, self.rules = Far(folder), {}
        mask = os.umask(0o022)
        self.rules["guard"] = runner.guard_rules(argparse.Namespace(ini=self.far.path("ini"), key=None))
        os.umask(0o022)
        self.rules["far"] = dict(runner.far_rules(os.fsencode(self.far.path("free"))), env=dict(os.environ))
        os.umask(mask)
        for rules in self.rules.values():
            os.makedirs(os.path.join(rules["base"], b".mi"))

    def batch_system(self):
        """Programs of a batch system that has never heard of any job."""
        os.mkdir(self.far.path("bin"))
        for name in ("squeue", "sacct", "scancel"):
            with open(os.open(self.far.path("bin", name), os.O_WRONLY | os.O_CREAT, 0o755), "w") as out:
                out.write("#!/bin/sh\n")
        return self.far.path("bin")

    def control(self, door, ident, *parts):
        return os.path.join(os.fsdecode(self.rules[door]["base"]), ".mi", ident, *parts)

    def make(self, door, state):
        """The ID of a new calculation in that state."""
        ident, rules = self.far.fresh(), self.rules[door]
        if state == "none":
            return ident
        assert "sums" in served(rules, hello(ident), PUT)[1]
        if state == "taken":
            return ident
        hold = state in ("queued", "running")
        command = {"far": "sleep 300", "guard": "work.sh hold"}[door] if hold else COMMAND[door]
        told = served(rules, hello(ident), {"do": "start", "command": command})[1]["state"]
        assert told == "running" or told == "ended" and not hold       # a short one may be over by the answer
        if hold:
            suite.wait_until(lambda: runner.command_state(os.fsencode(self.control(door, ident)), time.time())[0] == "running")
            return ident if state == "running" else self.queue(door, ident)
        suite.wait_until(lambda: served(rules, hello(ident))[0]["state"] == "ended")
        if state == "lost":
            rewrite_end(self.control(door, ident), state="lost", exit_code=None, reason="the host was restarted")
        rows = {"fetched": ["results", "fetched"], "gone": ["clean"]}.get(state, [])
        served(rules, hello(ident), *[ASKED[verb][0] for verb in rows])
        return ident

    def queue(self, door, ident):
        """Makes it one that waits in a batch system."""
        self.end(door, ident)
        rewrite_end(self.control(door, ident))
        for name in ("start", "child", "end"):
            if os.path.exists(self.control(door, ident, name)):
                os.unlink(self.control(door, ident, name))
        os.unlink(self.control(door, ident, "cancelled"))
        for name, text in (("ready", " " * 256), ("batch", json.dumps({"system": "slurm", "run": ident + ".1", "submit": ["sbatch"], "sent": 1,
                                                                        "job": "7", "t": time.time()}))):
            with open(self.control(door, ident, name), "w") as out:
                out.write(text)
        open(self.control(door, "open", ident), "w").close()           # for a keeper
        return ident

    def end(self, door, ident):
        served(self.rules[door], hello(ident), {"do": "cancel", "grace": 0})


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    one, path = Table(tmp_path_factory.mktemp("table")), os.environ["PATH"]
    os.environ["PATH"] = one.batch_system() + ":" + path
    yield one
    for door in one.rules:
        for row in served(one.rules[door], hello(None), ASKED["list"][0])[1]["runs"]:
            one.end(door, row[0])
    os.environ["PATH"] = path


@pytest.mark.parametrize("door", ["far", "guard"])
@pytest.mark.parametrize("state", STATES)
def test_every_verb_in_every_state_by_every_session_does_what_the_table_says_and_nothing_else(table, door, state):
    assert set(ASKED) == set(VERBS)
    wrong, shared = [], table.make(door, state)
    before = served(table.rules[door], hello(shared))[0]
    assert before["state"] == state
    for verb, requests in ASKED.items():
        for lane in ("", "put", "get"):
            for one in requests:
                allowed = state in VERBS[verb].states and lane in VERBS[verb].lanes
                ident = table.make(door, state) if allowed and verb in CHANGE and state not in ("ended", "lost", "fetched", "gone") else shared
                if allowed and verb in ("fetched", "clean"):
                    ident = table.make(door, state)
                words = dict(one[0] if isinstance(one, tuple) else one)
                if verb == "start":
                    words["command"] = {"far": "sleep 300", "guard": "work.sh hold"}[door] if state in ("queued", "running") else COMMAND[door]
                answer = served(table.rules[door], hello(ident, lane), (words, one[1] if isinstance(one, tuple) else b""))[-1]
                refused = answer.get("no") in ("refused", "state", "gone") and not (verb == "fetched" and "not asked for" in answer["why"])
                if refused == bool(allowed and not (verb == "hello" and lane)):
                    wrong.append((verb, lane, words, answer))
    after = served(table.rules[door], hello(shared))[0]
    assert not wrong, "\n".join(map(repr, wrong))
    assert {key: after[key] for key in ("state", "code", "why")} == {key: before[key] for key in ("state", "code", "why")}


# Requests that make no sense

DO = {"put": {"do": "put", "size": 1}, "get": {"do": "get"}, "hello": hello(IDENT % 1)}


def with_(verb, data=b"", **words):
    found = dict(DO.get(verb, {"do": verb}), **{key.rstrip("_"): value for key, value in words.items()})
    return {key: value for key, value in found.items() if value is not ...}, data


def named(name):
    return with_("put", b"x", files=[[name, 1, 420, 5]])


PACKED = zlib.compress(b"xy")
FRAME = b"\x28\xb5\x2f\xfd\x20\x02\x11\0\0xy"        # the same by zstd
HOSTILE = [named(name) for name in (
    "", ".", "..", "/", "/etc/passwd", "../a", "a/../../b", "a//b", "a/", "/a/", "./a", "a/.", "a\n", "a\0b", "a\x1b[2J", "a\\b", "\ud800", "a\u202e", "n" * 256, "n/" * 501 + "n",
    None, 5, ["a"], {}, True)]
HOSTILE += [with_("put", b"x", files=rows) for rows in (
    None, {}, "a", [["a"]], [["a", 1, 420]], [["a", 1, 420, 5, 5]], [["a", -1, 420, 5]], [["a", 2, 420, 5]], [["a", "1", 420, 5]], [["a", 1.0, 420, 5]],
    [["a", True, 420, 5]], [["a", 1, 0o10000, 5]], [["a", 1, -1, 5]], [["a", 1, 420, 1 << 70]], [["a", 1, 420, "5"]], [["a", 1, 420, 5], ["b", 1, 420, 5]],
    [["a", 1 << 60, 420, 5]], [["a/", 1, 420, 5]], [[["a"], 1, 420, 5]])]
HOSTILE += [with_("put", b"x", **words) for words in (
    {}, {"name": "a"}, {"name": "a", "at": -1}, {"name": "a", "at": 1 << 60}, {"name": "a", "at": "0"}, {"name": "a", "at": None}, {"name": "../a", "at": 0},
    {"name": "a", "at": 0, "length": -1}, {"name": "a", "at": 0, "length": 1 << 40}, {"name": "a", "at": 0, "length": 1}, {"name": "a", "at": 0, "end": [1]},
    {"name": "a", "at": 0, "end": [9, 420, 5]}, {"name": "a", "at": 0, "end": [1, 420, None]}, {"name": "a", "at": 0, "more": True}, {"name": "a", "at": 0, "files": []})]
HOSTILE += [with_("put", packed, size=len(packed), name="a", at=0, length=length)
            for packed in (PACKED, FRAME, FRAME[:-1], FRAME + b"xy") for length in (0, 1, 3, 1 << 26)]
HOSTILE += [with_("put", b"", size=size, files=[]) for size in (-1, "0", None, 1.5, True, [], 1 << 60)]
HOSTILE += [with_("hello", **words) for words in (
    {"v": 1}, {"v": "2"}, {"v": 2.0}, {"run": "../keep"}, {"run": IDENT % 1 + "\n"}, {"run": (IDENT % 1).upper()}, {"run": 5}, {"run": ...}, {"lane": "both"}, {"lane": None},
    {"turn": ""}, {"turn": "T"}, {"turn": "t" * 33}, {"turn": None}, {"check": 1}, {"more": True})]
HOSTILE += [with_("start", **words) for words in (
    {}, {"command": ""}, {"command": None}, {"command": ["true"]}, {"command": "true\0"}, {"command": "true\ntrue"}, {"command": "x" * 16001}, {"command": "work.sh 'x"},
    {"command": "rm -rf /"}, {"command": "work.sh $(id)"}, {"command": "true x"}, {"command": "true", "batch": ["slurm"]}, {"command": "true", "batch": "slurm"},
    {"command": "true", "batch": []}, {"command": "true", "batch": ["at"]}, {"command": "true", "boot": "x"}, {"command": "\ud800"})]
HOSTILE += [with_(verb, **words) for verb, words in (
    ("wait", {}), ("wait", {"offset": -1}), ("wait", {"offset": "0"}), ("wait", {"offset": 1 << 60}), ("cancel", {}), ("cancel", {"grace": -1}), ("cancel", {"grace": 1 << 40}),
    ("cancel", {"grace": 1.5}), ("results", {}), ("results", {"from": -1}), ("results", {"from": 0, "inputs": 1}), ("fetched", {}), ("fetched", {"but": "a"}),
    ("fetched", {"but": [5]}), ("clean", {"discard": None}), ("clean", {"force": True}), ("list", {}), ("list", {"after": "../x"}), ("list", {"after": None}), ("state", {"x": 1}),
    ("get", {}), ("get", {"names": []  , "name": "a"}), ("get", {"names": ["../ini"]}), ("get", {"names": ["/etc/passwd"]}), ("get", {"names": "a"}), ("get", {"names": ["a"] * 2001}),
    ("get", {"names": [None]}), ("get", {"name": "a"}), ("get", {"name": "a", "at": 0, "length": -1, "size": 1, "mtime": 1}),
    ("get", {"name": "a", "at": 0, "length": 1 << 40, "size": 1, "mtime": 1}), ("get", {"name": "a/../b", "at": 0, "length": 1, "size": 1, "mtime": 1}),
    ("touch evil", {}), ("", {}), ("_", {}), ("__init__", {}), ("serve", {}), ("one", {}), ("rsync", {"words": ["--server"]}))]
HOSTILE += [({"do": None}, b""), ({"do": ["put"]}, b""), ({"do": {}}, b""), ({}, b"")]
ENDS = [row + b"\n" for row in (                       # behind these nobody knows where a request begins
    b"", b"\0", b"[]", b"5", b'"put"', b"null", b"{", b'{"do": "state"} x', b"{'do': 'state'}", b'{"do": "\xff"}', b'{"do":' + b"[" * 20000, b"x" * 200000,
    b'{"do": "state", "x": "' + b"y" * 70000 + b'"}', b"GET / HTTP/1.0", b"C 1 0 1 a/", b"\x16\x03\x01\x02")]


def snapshot(top):
    """{path: bytes or mode} of all below top, but the log."""
    found = {}
    for folder, folders, names in os.walk(top):
        for name in folders + names:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            found[path] = open(path, "rb").read() if stat.S_ISREG(mode) else mode
    return {path: text for path, text in found.items() if not path.endswith((".mi/guard.log", ".mi/audit.log", ".mi/doors")) and ".mi/queue." not in path}


@pytest.mark.parametrize("door", ["guard", "far"])
def test_hostile_requests_are_refused_each_with_one_line_and_change_nothing(table, door):
    wrong, rules = [], table.rules[door]
    for state in ("taken", "ended"):
        ident = table.make(door, state)
        served(rules, hello(ident), {"do": "results", "from": 0})
        # it is a session that puts, which changes nothing that lasts
        served(rules, hello(ident), ({"do": "put", "size": 0, "files": []}, b""))
        before = snapshot(table.far.dir)
        for words, data in HOSTILE:
            if door == "far" and words.get("do") == "start" and "command" in words and isinstance(words["command"], str) and state == "taken" and re.match(
                    r"[^\0\n]{1,16000}\Z", words["command"]) and "boot" not in words:
                continue                               # a shell decides about these
            answers = served(rules, hello(ident), (words, data), {"do": "list", "after": ""})
            told = answers[1] if len(answers) > 1 else {}
            good = told.get("no") in ("refused", "state") and len(told["why"]) < 300 and not set(told) - {"no", "why", "state"}
            if not good or len(answers) != 3 or "runs" not in answers[2] or snapshot(table.far.dir) != before:
                wrong.append((state, words, data[:40], [str(one)[:200] for one in answers[1:]]))
                before = snapshot(table.far.dir)
        for row in ENDS:
            answers = served(rules, hello(ident), row, {"do": "list", "after": ""})
            if len(answers) != 2 or answers[1].get("no") != "refused" or snapshot(table.far.dir) != before:
                wrong.append((state, row[:60], answers[1:]))
    assert len(HOSTILE) + len(ENDS) > 150
    assert not wrong, "\n".join(str(one)[:600] for one in wrong)


def test_before_hello_and_after_it_in_a_lane_nothing_else_is_served(table):
    rules, ident = table.rules["guard"], table.make("guard", "ended")
    for verb, requests in ASKED.items():
        if verb != "hello":
            assert served(rules, requests[0])[0]["no"] == "refused", verb
    assert served(rules, hello(ident, "get"), hello(table.far.fresh()))[1]["no"] == "refused"
    assert served(rules, hello(None), ASKED["results"][0])[1]["no"] in ("refused", "gone")
    assert [row["state"] for row in served(rules, hello(ident), hello(table.far.fresh()), {"do": "state"})] == ["ended", "none", "none"]


def test_hello_tells_how_long_it_took_there(table):
    assert 0 < served(table.rules["far"], hello(table.make("far", "ended")))[0]["took"] < 10 ** 7


def test_small_results_come_together_and_of_any_number_only_some_bytes_at_once(table):
    ident, names = table.make("far", "ended"), ["s%02d" % n for n in range(40)]
    for name in names:
        with open(os.path.join(os.fsdecode(table.rules["far"]["base"]), ident, name), "wb") as out:
            out.write(name.encode() * 20000)
    told = served(table.rules["far"], hello(ident), {"do": "get", "names": names[:20] + ["absent"] + names[20:]})[1:]
    rows = [row for one in told for row in one["bundle"]]
    assert [row if isinstance(row, str) else row[0] for row in rows] == [60000] * 20 + ["missing"] + [60000] * 20
    assert 1 < len(told) < 12 and all(one["size"] <= runner.BLOCK + 60000 for one in told)
    assert rows[0][3] == hashlib.sha256(b"s00" * 20000).hexdigest()


def test_a_later_page_of_results_costs_no_more_than_the_first(table, monkeypatch):
    ident, made = table.make("far", "ended"), []
    for n in range(200):
        open(os.path.join(os.fsdecode(table.rules["far"]["base"]), ident, "p%03d" % n), "w").close()
    real = runner.Results.result_of_row
    monkeypatch.setattr(runner.Results, "result_of_row", lambda self, *row: made.append(1) or real(self, *row))
    monkeypatch.setattr(runner, "PAGE", 2000)
    costs = []
    for pages in [0], [0, 0], [0, 0, 180]:
        requests = [{"do": "results", "from": at, "inputs": True} for at in pages]
        told, before = served(table.rules["far"], hello(ident), *requests)[1:], len(made)
        costs.append(before - sum(costs))
        assert all("files" in one for one in told)
    assert 0 < costs[2] - costs[1] < 30, costs


# Attacks. Each returns True if it got what it wanted.

def outside_write(far):
    with far.open(far.fresh()) as one:
        one.put("x/../../../evil", b"evil")
        one.put("../evil", b"evil")
    return os.path.exists(far.path("evil")) or os.path.exists(far.path("base", "evil"))


def absolute_write(far):
    with far.open(far.fresh()) as one:
        one.put(far.path("evil"), b"evil")
    return os.path.exists(far.path("evil"))


def write_through_a_link(far):
    ident = far.fresh()
    with far.open(ident) as one:
        one.put("a", b"1")
        os.symlink(far.dir, far.path("base", ident, "link"))
        one.put("link/evil", b"evil")
    return os.path.exists(far.path("evil"))


def write_onto(make):
    """An attack: a piece of an input that is a link already."""
    def attack(far):
        ident = far.fresh()
        with far.open(ident) as one:
            one.put("a", b"1")
            make(far.path("secret"), far.path("base", ident, "link"))
            one.ask("put", b"evil", size=4, name="link", at=0)
        return open(far.path("secret")).read() != "TOP-SECRET"
    attack.__name__ = "write_onto_a_" + make.__name__
    return attack


def put_after_the_start(far):
    ident = far.ended()
    with far.open(ident) as one:
        one.put("r.txt", b"forged\n")
    return open(far.path("base", ident, "r.txt")).read() == "forged\n"


def get_before_the_end(far):
    ident = far.fresh()
    with far.open(ident) as one:
        one.put("a", b"1")
        one.ask("start", command="work.sh hold")
        one.results(inputs=True)
        got = one.ask("get", names=["a"])[0][1]
        one.ask("cancel", grace=0)
    return got == b"1"


def hard_link_out(far):
    return far.get(far.ended("work.sh hard"), "hardlink") == b"TOP-SECRET"


def soft_link_out(far):
    ident = far.ended("work.sh soft")
    return far.get(ident, "softlink") == b"TOP-SECRET" or far.get(ident, "out/secret") == b"TOP-SECRET"


def swapped_after_the_look(far):
    ident = far.ended()
    with far.open(ident) as one:
        one.results()
    with open(far.path("base", ident, "r.txt"), "w") as out:
        out.write("SECRET-")
    return far.get(ident, "r.txt", listed=False) == b"SECRET-"


def swapped_beneath_a_piece(far):
    ident = far.ended()
    with far.open(ident) as one:
        size, mtime, _x, _sum = one.results()[0]["r.txt"]
        with open(far.path("base", ident, "r.txt"), "w") as out:
            out.write("SECRET-")
        os.utime(far.path("base", ident, "r.txt"), ns=(mtime, mtime))
        return b"SECRET" in b"".join(data for _told, data in one.ask("get", name="r.txt", at=0, length=size, size=size, mtime=mtime))


def other_command(far):
    with far.open(far.fresh()) as one:
        one.put("a", b"1")
        one.run("touch %s" % far.path("evil"))
    return os.path.exists(far.path("evil"))


def log_of(far, command, **env):
    """What a command with an input writes on its log, as it is told live."""
    with far.open(far.fresh(), **env) as one:
        one.put("a", b"1")
        told, log = one.run(command)
        return log if "end" in told else b""


def more_arguments(far):
    return b"args abc" in log_of(far, "work.sh abc def")


def arguments_of_another_form(far):
    return b"args ../x" in log_of(far, "work.sh ../x")


def arguments_where_none_are_allowed(far):
    with far.open(far.fresh()) as one:
        one.put("a", b"1")
        return "end" in one.run("true x")[0]


def quoting_tricks(far):
    for word in ("work.sh $(touch evil)", "work.sh `touch evil`", "work.sh a;touch evil", "work.sh 'a b'", "work.sh a|touch evil", "work.sh $(touch${IFS}evil)"):
        log_of(far, word)
    return any("evil" in names for top, folders, names in os.walk(far.dir))


def a_second_run(far):
    ident = far.ended()
    before = os.stat(far.path("base", ".mi", ident, "child")).st_mtime_ns
    with far.open(ident) as one:
        one.ask("start", command="work.sh")
    time.sleep(0.3)
    return os.stat(far.path("base", ".mi", ident, "child")).st_mtime_ns != before


def another_command_for_a_run(far):
    ident = far.fresh()
    with far.open(ident) as one:
        one.put("a", b"1")
        one.run("work.sh abc")
        return "no" not in one.ask("start", command="true")[0][0]


def an_id_that_is_a_path(far):
    os.makedirs(far.path("keep"), exist_ok=True)
    with far.open("..") as one:
        one.ask("clean", discard=True)
    return not os.path.exists(far.path("keep"))


def another_form(far):
    good = request(*START)
    for text in ("touch evil", "sh -c 'touch evil'", "scp -t .", "rsync --server --daemon .", "internal-sftp", "", "exec sh -c 'touch evil'",
                 good + "; touch evil", "touch evil;" + good, good + "\ntouch evil"):
        if far.raw(text)[0] != 77:
            return True
    return any("evil" in names for top, folders, names in os.walk(far.dir))


def a_text_of_its_own(far):
    far.raw(request(*START).replace("'text'", "'touch evil'"))
    return os.path.exists(far.path("evil"))


def denied(far):
    return far.get(far.ended(), "secret.txt") is not None


def content_by_another_way(far):
    ident = far.ended()
    with far.open(ident) as one:
        one.results()
        size, mtime = 10, os.stat(far.path("base", ident, "secret.txt")).st_mtime_ns
        answers = one.ask("get", names=["secret.txt"]) + one.ask("get", name="secret.txt", at=0, length=size, size=size, mtime=mtime)
    return any(b"SECRET-42" in data or hashlib.sha256(b"SECRET-42\n").hexdigest() in str(told) for told, data in answers)


def live_log_beside_content_rules(far):
    return b"args" in log_of(far, "work.sh abc")


def live_log_over_a_limit(far):
    return b"args" in log_of(far, "work.sh abc")


def too_large_result(far):
    return far.get(far.ended(data=b"x" * 2000), "b") is not None


def too_much_in_all(far):
    ident = far.ended(data=b"x" * 900)
    with far.open(ident) as one:
        one.results(inputs=True)
        return all(data for _told, data in one.ask("get", names=["a", "b"]))


def too_much_input(far):
    with far.open(far.fresh()) as one:
        return all("sums" in one.put("f%d" % n, b"x" * 6000) for n in range(3))


def a_huge_sparse_file(far):
    ident = far.fresh()
    with far.open(ident) as one:
        one.ask("put", b"x", size=1, name="f", at=0)
        one.ask("put", size=0, name="f", end=[99999999999, 420, 5])
    return os.path.getsize(far.path("base", ident, "f")) > 10 ** 9


def a_byte_far_away(far):
    ident = far.fresh()
    with far.open(ident) as one:
        one.ask("put", b"x", size=1, name="f", at=99999999999)
    return os.path.getsize(far.path("base", ident, "f")) > 10 ** 9


def a_piece_that_unpacks_to_more(far):
    packed = zlib.compress(b"\0" * 100000)
    with far.open(far.fresh()) as one:
        return "sums" in one.ask("put", packed, size=len(packed), name="f", at=0, length=10)[0][0]


def a_piece_packed_by_native_code(far):
    with far.open(far.fresh()) as one:
        return one.ask("state", zstd=True)[0][0]["zstd"] or "sums" in one.ask("put", FRAME, size=len(FRAME), name="f", at=0, length=2)[0][0]


def entries_that_cost_nothing(far):
    ident = far.fresh()
    with far.open(ident) as one:
        one.ask("put", size=0, files=[["%d/%d" % (n, n), 0, 420, 5] for n in range(400)])
    return sum(len(folders) + len(files) for top, folders, files in os.walk(far.path("base", ident))) > 300


def directories_that_are_refused(far):
    ident = far.fresh()
    with far.open(ident) as one:
        for n in range(50):
            one.ask("put", size=0, files=[["d%d/" % n, 0, 420, 5]])
    return len(os.listdir(far.path("base", ident))) > 10


def a_book_of_inputs_without_end(far):
    ident = far.fresh()
    with far.open(ident) as one:
        for _n in range(10):
            one.ask("put", size=0, files=[["d" * 200 + "/", 0, 420, 5]] * 200)
    return os.path.getsize(far.path("base", ".mi", ident, "inputs")) > 100000


def environment(far):
    return b"evil 1" in log_of(far, "work.sh", EVIL="1")


def control_characters_in_the_log(far):
    far.raw("evil\nFORGED \x1b[2J")
    text = open(far.path("base", ".mi", "guard.log"), "rb").read()
    return b"\x1b" in text or b"\nFORGED" in text


def names_after_a_cancel(far):
    far.write("work.sh", "mkdir -p SECRET-42; : >SECRET-43\n")
    ident = far.ended()
    open(far.path("base", ".mi", ident, "cancelled"), "w").close()
    with far.open(ident) as one:
        return "SECRET-4" in str(one.results())


def what_a_command_left_that_did_not_end_by_itself(far):
    ident = far.ended()
    # a batch system's limit, an OOM killer: wrapper and command are gone, without an end
    rewrite_end(far.path("base", ".mi", ident), state="lost", exit_code=None, reason="end unknown")
    with far.open(ident) as one:
        assert one.hello["state"] == "lost"
    return far.get(ident, "r.txt") == b"result\n"


def older_lines_of_the_log(far):
    """By looking again and again."""
    ident = far.ended()
    for _n in range(2):
        with far.open(ident) as one:
            for _n in range(3):
                one.results()
    return open(far.path("base", ".mi", "guard.log")).read().count("refused=secret.txt") != 1


def older_lines_by_two_kinds_of_look(far):
    ident = far.fresh()
    with far.open(ident) as one:
        one.put("secret.in", b"1")
        one.run()
        for n in range(6):
            one.results(inputs=n % 2 == 0)
    return open(far.path("base", ".mi", "guard.log")).read().count("refused=secret.txt") > 2


def older_lines_by_hellos(far):
    ident = far.ended()
    with far.open() as one:
        for n in range(100):
            one.ask("hello", v=2, run=ident if n % 2 else far.fresh(), lane="", turn="t1")
    return open(far.path("base", ".mi", "guard.log")).read().count(" hello ") > 60


def memory_for_what_did_not_arrive(far):
    with far.open(far.ended()) as one:
        one.results()

        def held():
            return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/%d/status" % one.process.pid).read()).group(1))
        before = held()
        for _n in range(30):
            one.ask("fetched", but=["%05d" % n for n in range(7000)], more=True)
        return held() - before > 10000


def descriptors_for_each_look(far):
    with far.open(far.ended()) as one:
        for _n in range(20):
            one.results()
        return len(os.listdir("/proc/%d/fd" % one.process.pid)) > 15


def rules_of_a_session_that_stays(far):
    ident = far.ended()
    with far.open(ident) as one:
        one.results()
        far.write("ini", open(far.path("ini")).read() + "[outbound]\ndeny_names = secret*\n")
        return one.ask("get", names=["secret.txt"])[0][1] == b"SECRET-42\n"


def a_log_that_the_owner_keeps_by_now(far):
    """To a session that waits."""
    ident = far.fresh()
    far.write("work.sh", "echo one; while [ ! -e ../go ]; do sleep 0.05; done; echo two; while [ ! -e ../stop ]; do sleep 0.05; done\n")
    with far.open(ident) as one:
        one.put("a", b"1")
        one.ask("start", command="work.sh")
        one.send("wait", offset=0)
        while one.read()[1] != b"one\n":
            pass
        far.write("ini", open(far.path("ini")).read() + "[outbound]\ndeny_names = remote_program_exec.log\n")
        far.write("base/go", "")
        told, data = one.read()
        while told and not data:
            told, data = one.read()
        far.write("base/stop", "")
        return data == b"two\n"


def older_lines_by_refusals(far):
    with far.open() as one:
        for n in range(200):
            one.ask("evil%d" % n)
    return open(far.path("base", ".mi", "guard.log")).read().count("refused") > 100


def names_of_what_is_refused(far):
    far.write("work.sh", "mkdir -p secret_dir secret_empty open/empty; echo 1 >secret_dir/secret_file; echo 1 >open/file; cp a b\n")
    with far.open(far.ended()) as one:
        files, folders, verdicts = one.results()
        assert folders == ["open/empty/"] and "open/file" in files and verdicts["refused"]["count"] == 2, (files, folders, verdicts)
        return "secret" in str((files, folders, verdicts))


def what_the_owner_keeps(far):
    ident = far.ended()
    with far.open(ident) as one:
        one.results()
        one.ask("fetched", but=[])
        one.ask("clean", discard=True)
    return not os.path.exists(far.path("base", ident, "secret.txt"))


def what_was_not_fetched(far):
    ident = far.ended()
    with far.open(ident) as one:
        one.results()
        one.ask("fetched", but=["r.txt"])
        one.ask("clean")
    return not os.path.exists(far.path("base", ident, "r.txt"))


def rules_of_another_time(far):
    """What an older ini let out."""
    ident = far.ended()
    far.get(ident, "secret.txt")
    far.write("ini", open(far.path("ini")).read() + "[outbound]\ndeny_names = secret*\n")
    return far.get(ident, "secret.txt", listed=False) is not None


NAMES = "[outbound]\ndeny_names = secret*\n"
CONTENT = "[outbound]\ndeny_content = SECRET-[0-9]+\n"
SHAPES = "if place not in command[\"shapes\"] or not command[\"shapes\"][place].fullmatch(argument):"
ANY_NAME = ("        return check_name(value) is value\n", "        return isinstance(value, str)\n")
ANY_STATE = ("    if state not in told.states:\n", "    if False:\n")
ATTACKS = [                    # (attack, ini, the check to take out, what to put there, and again where more than one check stands in the way)
    (outside_write, "") + ANY_NAME,
    (absolute_write, "") + ANY_NAME + ("        parts = utf8(name).split(b\"/\")\n        os.rename(", "        parts = [utf8(name)]\n        os.rename("),
    (write_through_a_link, "", "there = os.open(part, os.O_RDONLY | FOLDER_FLAGS, dir_fd=here)", "there = os.open(part, os.O_RDONLY, dir_fd=here)"),
    (write_onto(os.symlink), "", "os.O_WRONLY | os.O_CREAT | PLAINLY", "os.O_WRONLY | os.O_CREAT"),
    (write_onto(os.link), "", "        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:\n            os.close(fd)\n            raise Refusal(",
     "        if False:\n            raise Refusal("),
    (put_after_the_start, "", "            if state not in NEW:\n", "            if False:\n") + ANY_STATE,
    (get_before_the_end, "") + ANY_STATE,
    (hard_link_out, NAMES, "if self.has_rules and result and info.st_nlink > 1:", "if False:"),
    (swapped_after_the_look, CONTENT, "if hashlib.sha256(piece).digest() != self.source.sums", "if False and self.source.sums"),
    (swapped_beneath_a_piece, CONTENT, "if hashlib.sha256(piece).digest() != self.source.sums", "if False and self.source.sums"),
    (other_command, "", "        raise Forbidden(_(\"no [command NAME] for",
     "        return dict(list(commands.values())[0], options=[]), [word] + arguments\n        raise Forbidden(_(\"no [command NAME] for"),
    (more_arguments, "", SHAPES, "if place in command[\"shapes\"] and not command[\"shapes\"][place].fullmatch(argument):"),
    (arguments_of_another_form, "", SHAPES, "if place not in command[\"shapes\"]:"),
    (arguments_where_none_are_allowed, "", SHAPES, "if False:"),
    (quoting_tricks, "", "log 2>&1; exec \"$@\"'\n", "log 2>&1; eval \"$*\"'\n", SHAPES, "if False:"),
    (a_second_run, "", "            if place.state()[\"state\"] == \"taken\":\n", "            if True:\n",
     "2>/dev/null || exit 75", "2>/dev/null"),
    (another_command_for_a_run, "", "            if place.noted(b\"command\").get(\"text\", text) != text:\n", "            if False:\n"),
    (an_id_that_is_a_path, "", "\"run\": lambda value: value is None or text_like(IDENT)(value)", "\"run\": lambda value: True"),
    (another_form, "", "        raise Refusal(\"refused\", \"not a request of this program\")", "        return os._exit(os.system(text) and 0)"),
    (a_text_of_its_own, "", "    found = FORM.match(text)\n    if not found:\n        raise Refusal(", "    os.system(text)\n    found = FORM.match(text)\n    if not found:\n        raise Refusal("),
    (denied, NAMES, "            self.apply_rule(name, rule_against_name(self.rules, one))\n", "            pass\n"),
    (denied, CONTENT, "            self.apply_rule(name, str(stays), stays.code)\n", "            pass\n"),
    (denied, "[outbound]\ndeny_sums = %s\n" % hashlib.sha256(b"SECRET-42\n").hexdigest(), "        if whole.hexdigest() in self.rules[\"deny_sums\"]:\n", "        if False:\n"),
    (content_by_another_way, CONTENT, "row, data = self.results().read_small(name)", "row, data = UnjudgedResults(self.place).read_small(name)"),
    (content_by_another_way, CONTENT, "partial(self.results().read_piece", "partial(UnjudgedResults(self.place).read_piece"),
    (live_log_beside_content_rules, CONTENT, "    return whole[0] if whole else (rule_against_name", "    return \"\" if whole else (rule_against_name"),
    (live_log_over_a_limit, "[outbound]\nmax_file = 10\n", "or rule_against_size(rules, length, 0, others))", "or \"\")"),
    (live_log_over_a_limit, "[outbound]\nmax_total = 10\n", "or rule_against_size(rules, length, 0, others))", "or \"\")"),
    (too_large_result, "[outbound]\nmax_file = 1K\n", "if rules[\"max_file\"] and length > rules[\"max_file\"]:", "if False:"),
    (too_much_in_all, "[outbound]\nmax_total = 1K\n", "if rules[\"max_total\"] and total + length > rules[\"max_total\"]:", "if False:"),
    (too_much_input, "[ssh guard]\nmax_bytes = 10K\n", "            if max(used, end) > most:\n                raise Refusal(", "            if False:\n                raise Refusal("),
    (a_byte_far_away, "[ssh guard]\nmax_bytes = 1M\n", "            if max(used, end) > most:\n                raise Refusal(", "            if used > most:\n                raise Refusal("),
    (a_huge_sparse_file, "", "            raise Refusal(\"refused\", \"pieces of it are missing\")\n", "            os.ftruncate(fd, size)\n"),
    (a_piece_packed_by_native_code, "", "libzstd() if self.native else None", "libzstd()"),
    (a_piece_that_unpacks_to_more, "", "return memoryview(found) if len(found) == length else None\n", "return memoryview(found)\n"),
    (entries_that_cost_nothing, "[ssh guard]\nmax_bytes = 1M\n", "ENTRY_COST = 4096 ", "ENTRY_COST = 0"),
    (directories_that_are_refused, "[ssh guard]\nmax_bytes = 10K\n", "                    os.rmdir(part, dir_fd=here)\n                    raise\n",
     "                    raise\n"),
    (a_book_of_inputs_without_end, "[ssh guard]\nmax_bytes = 64K\n", "        self.count_bytes(len(text))\n", ""),
    (environment, "", "    env = {key: value for key, value in os.environ.items() if PASSED_ENV.match(key)\n", "    env = {key: value for key, value in os.environ.items() if True\n"),
    (control_characters_in_the_log, "", "        value = printable(value)\n", "        value = str(value)\n",
     "json.dumps(value, ensure_ascii=False) if re.search(r'[\\s\"]|^$', value) else value", "value", "asked=printable(text[-200:])", "asked=text[-200:]"),
    (names_after_a_cancel, "", "        if \"patterns\" in self.kinds:\n", "        if True:\n"),
    (what_a_command_left_that_did_not_end_by_itself, "", "        stopped = (lost or found", "        stopped = (found"),
    (older_lines_of_the_log, NAMES, "            for name, why in self.notes if said != self.said.get(kind) else ():\n", "            for name, why in self.notes:\n"),
    (older_lines_by_two_kinds_of_look, NAMES, "dict(self.said, **{kind: said})", "{kind: said}"),
    (older_lines_by_hellos, "", "        if run not in self.greeted and (told", "        if True or (told"),
    (memory_for_what_did_not_arrive, "", "self.incomplete = self.incomplete or bool(but) ", "self.incomplete = (self.incomplete or []) + but"),
    (descriptors_for_each_look, "", "            self.judged.tree.close()\n", "            pass\n"),
    (rules_of_a_session_that_stays, "", "            words = parse_request(self.wire.request_line())\n            self.check_rules()\n", "            words = parse_request(self.wire.request_line())\n"),
    (a_log_that_the_owner_keeps_by_now, "", "                self.check_rules()\n", ""),
    (older_lines_by_refusals, "", "self.refusals <= LOGGED_REFUSALS", "True"),
    (names_of_what_is_refused, NAMES, "        told = by_name or stays.code != \"refused\" and not self.rule_against_name(name)\n", "        told = True\n"),
    (what_the_owner_keeps, NAMES, "            kept = \"its results were not fetched\" if unfetched else self.why_kept()\n", "            kept = None\n"),
    (what_was_not_fetched, "", "            unfetched = state in OVER", "            unfetched = False and state in OVER",
     "            if not self.incomplete and not", "            if True or not self.incomplete and not"),
    (rules_of_another_time, "", "        return found if found.get(\"stamp\") == self.stamp else {}\n", "        return found\n"),
]


@pytest.mark.parametrize("case", ATTACKS, ids=lambda case: case[0].__name__)
def test_an_attack_gets_nothing_and_would_without_its_check(case, tmp_path):
    attack, ini, texts = case[0], case[1], case[2:]
    os.mkdir(str(tmp_path / "real"))
    assert not attack(Far(tmp_path / "real", ini))
    os.mkdir(str(tmp_path / "mutant"))
    mutant = Far(tmp_path / "mutant", ini, list(zip(texts[::2], texts[1::2])))
    assert attack(mutant), "the check is not needed, or not the one"


def test_links_that_lead_out_are_not_followed(far):
    assert not soft_link_out(far)


# Over a real sshd: what got through once.

class Real(Far):
    """The same through a real sshd, over one connection per key; attacks may hold sessions open."""

    def __init__(self, lab, folder, ini="", mutation=(), key=""):
        Far.__init__(self, folder, ini, mutation)
        self.lab, self.controls = lab, []
        self.use(key)

    def use(self, key):
        """From here on with a key of this name."""
        words = [PYTHON, self.script, "guard", "--ini", self.path("ini"), "--print-key-line", self.lab.path("gid.pub")]
        with_key(self.lab, subprocess.check_output(words + (["--key", key] if key else [])).decode())
        self.controls.append(subprocess.Popen(["ssh", "-F", self.lab.path("config"), "-M", "-S", self.path("c%d" % len(self.controls)), "-N", "guarded"]))
        suite.wait_until(lambda: os.path.exists(self.path("c%d" % (len(self.controls) - 1))))
        return self

    def close(self):
        for one in self.controls:
            one.kill()                                 # (it misses a SIGTERM that comes just before it begins to wait)
            one.wait(20)
        with_key(self.lab, self.lab.line)

    def popen(self, command, **env):
        return subprocess.Popen(["ssh", "-T", "-F", self.lab.path("config"), "-S", self.path("c%d" % (len(self.controls) - 1)), "guarded", command],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def started(self, command="work.sh slow"):
        """The ID of one that runs; its inputs: a."""
        ident = self.fresh()
        with self.open(ident) as one:
            one.put("a", b"0123456789")
            assert one.ask("start", command=command)[0][0]["state"] == "running"
        return ident


def with_key(lab, line):
    lab.keys = [lab.keys[0], line]
    lab.authorize()


def rsync_without_a_path(far):
    ident = far.ended()
    far.write("shell", "#!/bin/sh\nssh -F %s -S %s guarded \"$(cat %s) --server --sender -vtrpe.LsfxCIvu .\" | { read -r x; exec cat; }\n" % (
        far.lab.path("config"), far.path("c0"), far.path("request")))
    far.write("request", request("2", "rsync", "b", ident))
    os.chmod(far.path("shell"), 0o755)
    subprocess.run(["rsync", "-vtrp", "-e", far.path("shell"), "host:", far.path("stolen") + "/"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return os.path.exists(far.path("stolen", "secret.txt"))


def half_a_piece(far, ident, turn, count=2 * runner.BLOCK):
    """A session that puts a piece of an input `a` (9s), of which a block has arrived and the rest has not."""
    one = far.open(ident, "put", turn)
    one.send("put", size=count, name="a", at=0)
    one.process.stdin.write(b"9" * (count // 2))
    one.process.stdin.flush()
    path = far.path("base", ident, "a")
    suite.wait_until(lambda: os.path.exists(path) and os.path.getsize(path))
    return one


def piece_held_over_the_start(far):
    ident = far.fresh()
    held = half_a_piece(far, ident, "t1")
    with far.open(ident) as one:
        assert one.run("true")[0].get("end"), one.close()
    before = open(far.path("base", ident, "a"), "rb").read()
    try:
        held.process.communicate(b"8" * runner.BLOCK, timeout=30)
    except BrokenPipeError:
        pass
    return open(far.path("base", ident, "a"), "rb").read() != before


def session_that_stays_after_the_start(far):
    ident = far.fresh()
    held = far.open(ident, "put")
    held.put("a", b"1")
    with far.open(ident) as one:
        one.run("true")
    try:
        return held.process.wait(5) == 0
    except subprocess.TimeoutExpired:
        held.process.kill()
        return True


def late_bytes_of_a_line_that_was_lost(far):
    ident = far.fresh()
    held = half_a_piece(far, ident, "t1")
    with far.open(ident, turn="t2") as one:
        one.ask("put", b"7" * 2 * runner.BLOCK, size=2 * runner.BLOCK, name="a", at=0)
    try:
        held.process.communicate(b"8" * runner.BLOCK, timeout=30)
    except BrokenPipeError:
        pass
    return open(far.path("base", ident, "a"), "rb").read() != b"7" * 2 * runner.BLOCK


def base_that_others_prepared(far):
    os.chmod(far.base, 0o777)
    with far.open(far.fresh()) as one:
        return bool(one.first)


def base_below_a_directory_of_others(far):
    os.makedirs(far.path("common", "base"))
    os.chmod(far.path("common"), 0o777)
    text = open(far.path("ini")).read()
    far.write("ini", text.replace("base = %s\n" % far.base, "base = %s\n" % far.path("common", "base")))
    with far.open(far.fresh()) as one:
        return bool(one.first)


def calculations_of_another_key(far):
    far.use("one")
    ident = far.ended()
    far.use("two")
    with far.open(ident) as one:
        listed = one.ask("list", after="")[0][0]
        seen = one.hello["state"] != "none" or ident in str(listed)
        one.ask("clean", discard=True)
    return seen or not os.path.exists(far.path("base", "one", ident, "r.txt"))


def a_cancel_by_another_key_that_knows_the_id(far):
    far.use("two")
    ident = far.started("work.sh hold")
    far.use("one")                                     # his is the younger one: what ran before a calculation is never ended with it
    with far.open(ident) as mine:
        mine.put("a", b"1")
        mine.ask("start", command="work.sh hold")
        with far.use("two").open(ident) as other:
            assert other.ask("cancel", grace=1)[0][0]["state"] == "ended"
        time.sleep(1)
        state = mine.ask("state")[0][0]["state"]
        mine.ask("cancel", grace=0)
    return state != "running"


def a_log_without_end(far):
    far.write("guard.py", open(far.script).read().replace("LOG_MOST, LOG_KEEP = 16 << 20, 8 ", "LOG_MOST, LOG_KEEP = 300, 1"))
    for n in range(8):
        far.raw("x" * 1000)
    return sum(os.path.getsize(far.path("base", ".mi", name)) for name in os.listdir(far.path("base", ".mi")) if name.startswith("guard.log")) > 2 * 900


FIT = ("    why = open_to_others(rules[\"base\"])\n", "    why = None\n", "    if open_to_others(rules[\"base\"]):\n", "    if False:\n")
ENDED = ("        place.end_lanes()\n        if self.putting:", "        if self.putting:")
HOLES = [                      # as ATTACKS
    (rsync_without_a_path, NAMES, "'[^']*'((?: '[^']*'){4,8})\\Z", "'[^']*'((?: '[^']*'){4,8})",
     "            raise Refusal(\"refused\", \"an unknown verb\")\n", "            os.write(1, b\"mi_distcomp\\n\")\n            os.chdir(os.path.join(rules[\"base\"], words[3].encode()))\n"
     "            os.execvp(\"rsync\", \"rsync --server --sender -vtrpe.LsfxCIvu .\".split())\n"),
    (piece_held_over_the_start, "") + ENDED,
    (session_that_stays_after_the_start, "") + ENDED,
    (late_bytes_of_a_line_that_was_lost, "", "            self.end_lanes(turn)\n", ""),
    (base_that_others_prepared, "") + FIT,
    (base_below_a_directory_of_others, "") + FIT,
    (calculations_of_another_key, "", "os.path.join(rules[\"top\"], utf8(name)) if name else", "rules[\"top\"] if name else"),
    (a_cancel_by_another_key_that_knows_the_id, "", "b\"CALC_DIR=\" + self.work if self.ruled else", "b\"MI_RUN=\" + name + b\".1\" if self.ruled else"),
    (a_log_without_end, "", "    if os.fstat(fd).st_size < LOG_MOST:\n", "    if True:\n"),
]


@pytest.fixture(scope="module")
def lab():
    one = ssh_lab.Lab()
    one.line = one.guard("\n[command work]\nargv = /bin/true\nmatch = true\n", python=PYTHON)
    one.start()
    yield one
    one.close()


@pytest.mark.parametrize("case", HOLES, ids=lambda case: case[0].__name__)
def test_what_got_through_an_sshd_once_does_not_and_would_without_its_check(case, lab, tmp_path):
    attack, ini, texts = case[0], case[1], case[2:]
    for who, mutation, wanted in (("real", (), False), ("mutant", list(zip(texts[::2], texts[1::2])), True)):
        os.mkdir(str(tmp_path / who))
        far = Real(lab, tmp_path / who, ini, mutation)
        try:
            assert attack(far) == wanted, who
        finally:
            far.close()


def test_hostile_command_lines_are_refused_by_the_guard_each_with_one_line(lab, tmp_path):
    far, wrong = Real(lab, tmp_path), []
    good = request(*START)
    try:
        far.raw("first")                               # makes the base
        before = snapshot(far.dir)
        for text in ("", "ls", "-", "x" * 100000, "\udcff\udcfe", good + " more", good * 2, good + " '", good.replace("'2'", "'3'"), good.replace("'2'", "'-1'"),
                     good.replace("'door'", "'guard'"), good.replace("'door'", "'door\n'"), request("2"), request("2", "rsync", "b", "c"), request(*("2", "door") + ("x",) * 9),
                     request("1", "hold", "b", "-").replace("'hold'", "'rsync'"), good.replace("exec sh", "exec bash"), good.replace("mi_distcomp", "mi_distcomp2")):
            code, out, err = far.raw(text)
            if code != 77 or not re.match(rb"refused by the guard: [^\n]{5,300}\n\Z", err) or b"mi_distcomp 2" in out:
                wrong.append((text[:80], code, out[:80], err[-300:]))
        assert not wrong and snapshot(far.dir) == before, wrong
    finally:
        far.close()


# What the owner meets

def test_directories_without_end_and_very_many_refused_results_hinder_nothing(tmp_path):
    for name in ("deep", "many"):
        os.mkdir(str(tmp_path / name))
    far = Far(tmp_path / "deep")
    ident = far.ended("work.sh deep")
    assert far.get(ident, "r.txt") == b"result\n"
    with far.open(ident) as one:
        assert one.ask("clean", discard=True)[0][0]["state"] == "gone"
    assert not os.path.exists(far.path("base", ident))               # (else pytest, too, cannot remove it)
    far = Far(tmp_path / "many", "[outbound]\ndeny_names = secret*\n")
    with far.open(far.ended("work.sh many")) as one:
        assert one.results()[2]["refused"]["count"] == 1101 and one.ask("get", names=["r.txt"])[0][1] == b"result\n"
    text = open(far.path("base", ".mi", "guard.log"), encoding="utf-8").read()
    assert text.count("refused=secret") <= 1001 and " more=101" in text


def test_what_is_refused_is_logged_with_the_reason(far):
    far.raw("cat /etc/passwd")
    with far.open(far.fresh()) as one:
        one.put("a", b"1")
        assert one.run("rm -rf /")[0]["no"] == "refused"
    text = open(far.path("base", ".mi", "guard.log"), encoding="utf-8").read()
    assert "refused" in text and "cat /etc/passwd" in text and "no [command NAME] for rm" in text


def test_rules_that_the_guard_cannot_keep_stop_it(tmp_path):
    for ini in ("[outbound]\nholds = yes\n", "[outbound]\nkeep_all = x\n"):
        os.mkdir(str(tmp_path / ini[11:13]))
        code, out, err = Far(tmp_path / ini[11:13], ini).raw(request(*START))
        assert code == 78 and b"is not a key" in err
    far = Far(tmp_path)
    os.chmod(far.path("ini"), 0o666)
    assert far.raw(request(*START))[0] == 78


def test_no_command_section_means_no_command(far):
    far.write("ini", "[ssh guard]\nbase = %s\n" % far.base)
    with far.open(far.fresh()) as one:
        one.put("a", b"1")
        assert "no [command NAME] for true" in one.run("true")[0]["why"]


def test_a_slow_pattern_ends_the_look_and_the_file_stays(tmp_path):
    far = Far(tmp_path, "[outbound]\ndeny_content = (x+x+)+[yz]\nscan_timeout = 1s\n")
    with far.open(far.ended(data=b"x" * 5000)) as one:
        began = time.monotonic()
        files, _folders, verdicts = one.results(inputs=True)
        assert "a" not in files and verdicts["held"]["count"] == 2 and time.monotonic() - began < 15


def test_dry_run_only_logs(tmp_path):
    far = Far(tmp_path, "[outbound]\ndeny_names = secret*\ndry_run = yes\n")
    assert far.get(far.ended(), "secret.txt") == b"SECRET-42\n"
    assert "deny_names" in open(far.path("base", ".mi", "guard.log")).read()


def test_no_word_from_the_wire_reaches_a_shell():
    text = open(ssh_lab.SCRIPT, encoding="utf-8").read()
    doors = text[text.index("# ==== the doors of the gate ===="):text.index("DECODE_WORDS = r")]
    assert "os.system" not in doors and "shell=True" not in doors and "popen" not in doors.lower() and "eval(" not in doors and "exec(" not in doors
    assert re.findall(r'"sh", "-c", (\w+)', doors) == ["INTO_LOG"]


@pytest.mark.parametrize("cleaners", range(3))
def test_of_two_at_once_one_starts_it_nothing_comes_in_beside_it_and_a_clean_takes_all_or_nothing(far, cleaners):
    ident = far.fresh()
    with far.open(ident) as one:
        one.put("a", b"1" * 10000)

    def puts(turn):
        with far.open(ident, "put", turn) as one:
            for n in range(200):
                if "no" in one.put("a", b"%d" % (n % 10) * 10000):
                    return

    def runs():
        with far.open(ident) as one:
            return one.run()[0]

    def cleans():
        with far.open(ident) as one:
            return one.ask("clean", discard=True)[0][0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        putting = [pool.submit(puts, "t%d" % n) for n in range(2)]
        running, cleaning = [pool.submit(runs) for _n in range(2)], [pool.submit(cleans) for _n in range(2 * cleaners)]
    told = [one.result() for one in putting + running + cleaning][2:]
    if any(one.get("state") == "gone" for one in told):
        assert not os.path.exists(far.path("base", ident)) or "no" in told[0] and "no" in told[1], told
    else:
        a, b = (open(far.path("base", ident, name), "rb").read() for name in "ab")
        assert a == b and len(set(a)) == 1 and all(one.get("end") and one["code"] == 0 for one in told[:2]), told
    assert not [name for name in os.listdir(far.path("base", ".mi")) if name.startswith(".new")]


def test_two_sessions_that_ask_for_the_results_of_one_run_at_once_both_get_them_right(tmp_path):
    far = Far(tmp_path, "[outbound]\ndeny_names = secret*\n")
    far.write("work.sh", "mkdir many; i=0; while [ $i -lt 500 ]; do i=$((i + 1)); echo $i >many/file$i; done\n")
    ident = far.ended()

    def asks(inputs):
        with far.open(ident) as one:
            found = []
            for _n in range(8):
                files, _folders, verdicts = one.results(inputs=inputs)
                told, data = one.ask("get", names=["many/file7"])[0]
                # an input that nobody touched leaves to whoever asks for inputs, whatever others ask for meanwhile
                more = one.ask("get", names=["a"])[0][1] if inputs else b"input"
                found.append((len(files), "no" in verdicts, data, more))
            return set(found)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        plain, plain2, whole = [one.result() for one in [pool.submit(asks, inputs) for inputs in (False, False, True)]]
    assert plain == plain2 == {(501, False, b"7\n", b"input")} and whole == {(502, False, b"7\n", b"input")}, (plain, plain2, whole)
    assert not [name for name in os.listdir(far.path("base", ".mi", ident)) if name.endswith(".new")]


def test_a_session_of_another_node_counts_as_gone_only_when_it_writes_nothing_any_more(tmp_path):
    suite.needs("root", "unshare")
    if os.geteuid() != 0:
        suite.pytest.skip("needs root itself: mount namespaces")
    (tmp_path / "boot").write_text("00000000-1111-4222-8333-444444444444\n")
    (tmp_path / "node").write_text(NODE)
    far = Far(tmp_path, mutation=[("LANE_NOTES, LANE_SILENT = 15, 60", "LANE_NOTES, LANE_SILENT = 0, 60"), ("KILL_TRIES = 5\n", "KILL_TRIES = 0.1\n")])
    far.write("work.sh", "cp big copy\n")
    ident, at_node = far.fresh(), ["sh", str(tmp_path / "node"), "node2", str(tmp_path / "boot")]
    first = far.open(ident)
    half = runner.BLOCK                                # is written when it is there
    first.send("put", b"1" * half, size=2 * half, name="big", at=0)
    suite.wait_until(lambda: os.path.exists(far.path("base", ident, "big")) and os.path.getsize(far.path("base", ident, "big")))
    second = Session(far.popen(request(*START), before=at_node), ident, turn="t2")
    told = second.ask("put", b"2" * 2 * half, size=2 * half, name="big", at=0)[0][0]
    assert told["no"] == "host" and "counts as gone when" in told["why"], told       # it may write every moment
    lane, = (os.path.join(far.path("base", ".mi", ident), name) for name in os.listdir(far.path("base", ".mi", ident)) if name.startswith("lane."))
    os.utime(lane, (time.time() - 61,) * 2)            # its line is silent
    assert second.ask("put", b"2" * 2 * half, size=2 * half, name="big", at=0, end=[2 * half, 0o644, 5])[0][0].get("sums")
    first.process.stdin.write(b"1" * half)             # it was only slow
    first.process.stdin.flush()
    assert first.read()[0]["no"] in ("state", "host")
    assert second.run("work.sh")[0]["code"] == 0
    assert {open(far.path("base", ident, name)).read() for name in ("big", "copy")} == {"2" * 2 * half}
    first.close(), second.close()


def test_on_a_full_disk_there_nothing_leaves_unnoted_a_cancel_counts_and_all_comes_when_there_is_room(disk_of, tmp_path):
    disk, filled = disk_of("4m"), []

    def fill():
        with contextlib.suppress(OSError), open(str(disk / "fill"), "wb", 0) as out:
            while True:
                filled.append(out.write(b"x" * 4096))
    (tmp_path / "far").mkdir()
    far = Far(disk, NAMES, [("KEEPER_AGAIN = 30 ", "KEEPER_AGAIN = 1 "), ("KILL_TRIES = 5\n", "KILL_TRIES = 0.5\n")])
    ended = far.ended()
    far.write("work.sh", "echo 1 >r; while [ ! -e %s/go ]; do sleep 0.05; done; exit 4\n" % tmp_path)
    idents = [far.fresh() for _n in range(2)]
    for ident in idents:
        with far.open(ident) as one:
            one.put("a", b"1"), one.ask("start", command="work.sh")
    suite.wait_until(lambda: all(os.path.exists(far.path("base", ident, "r")) for ident in idents))
    fill()
    with far.open(ended) as one:                       # that it leaves cannot be noted: it waits
        told = one.results()[2]
        assert told["no"] == "disk", told
        assert one.ask("fetched", but=[])[0][0].get("no") in ("disk", "state")
    with far.open(far.fresh()) as one:
        assert one.put("a", b"1" * 9000)["no"] == "disk"
    with far.open(idents[0]) as one:                   # whatever the answer is: it ends
        one.ask("cancel", grace=0)
    suite.wait_until(lambda: runner.command_state(os.fsencode(far.path("base", ".mi", idents[0])), time.time())[0] == "ended")
    (tmp_path / "go").write_text("")
    suite.wait_until(lambda: "it is tried again" in open(far.path("base", ".mi", "guard.log")).read())
    (disk / "fill").unlink()
    with far.open(ended) as one:                       # nothing of it is lost
        assert "r.txt" in one.results()[0] and one.ask("get", names=["r.txt"])[0][1] == b"result\n"
        assert one.ask("fetched", but=[])[0][0].get("no") is None
    for ident, code in zip(idents, (143, 4)):
        with far.open(ident) as one:
            told = one.ask("wait", offset=0)[-1][0]
            assert (told["state"], told["code"], told["cancelled"]) == ("ended", code, code == 143), told
            assert ("r" in one.results()[0]) == (code == 4)


def test_a_key_has_no_more_runs_and_sessions_than_its_owner_says_and_another_key_has_its_own(tmp_path):
    far = Far(tmp_path, "[ssh guard]\nmax_runs = 2\nmax_sessions = 2\n")
    idents = [far.fresh() for _n in range(3)]
    with far.open(idents[0]) as one, far.open(idents[1]) as two:
        assert "sums" in one.put("a", b"1") and "sums" in two.put("a", b"1")
        other = far.open(idents[2])
        assert other.first == b"mi_distcomp 2 no 75 all sessions of this key are taken (max_sessions)\n" and other.close()[0] == 75
        two.process.kill()                             # a session that was killed holds none
        two.process.wait()
        with far.open(idents[2]) as three:
            told = three.put("a", b"1")
            assert told["no"] == "refused" and "2 calculations of this key are here (max_runs)" in told["why"], told
            assert one.ask("clean")[0][0]["state"] == "gone" and "sums" in three.put("a", b"1")
            for _n in range(5):                        # nor very many that are gone
                three.ask("clean"), three.ask("hello", v=2, run=far.fresh(), lane="", turn="t1"), three.put("a", b"1")
            assert len([name for name in os.listdir(far.path("base", ".mi")) if re.match(IDENT[:8], name)]) <= 4


def test_a_cancel_ends_also_what_left_session_and_environment(far):
    with far.open(far.fresh()) as one:
        one.put("a", b"1")
        one.ask("start", command="work.sh leave")
        written = far.path("base", "pids")
        suite.wait_until(lambda: os.path.exists(written) and len(open(written).read().split()) == 3)
        pids = [int(word) for word in open(written).read().split()]
        told = one.ask("cancel", grace=1)[0][0]
        assert (told["state"], told["code"], told["cancelled"]) == ("ended", 143, True)
    for pid in pids:
        assert not os.path.exists("/proc/%d" % pid), pids


# The door `far`, which is brought

class Free(Far):
    """An external computer without a guard; open() is what its log-in shell would do."""

    def __init__(self, folder, shell=("sh", "-c")):
        Far.__init__(self, folder)
        self.shell, self.sum = list(shell), hashlib.sha256(open(ssh_lab.SCRIPT, "rb").read()).hexdigest()[:16]

    def popen(self, command="", **env):
        text = command or "exec sh -c 'eval \"$(printf %b \"$1\")\"' mi_distcomp " + " ".join(
            runner.quoted_word(word) for word in (runner.LOADER, "2", "door", self.base, self.sum))
        env = dict({"PATH": os.path.dirname(PYTHON) + ":" + os.environ["PATH"], "HOME": self.dir}, **env)
        return subprocess.Popen(self.shell + [text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env=env)

    def bring(self):
        """The file comes there: the line with which the session goes on, and the session."""
        process = self.popen()
        row = b""
        while not row.startswith(b"mi_distcomp"):
            row = process.stdout.readline() or pytest.fail("no answer: %r" % process.stderr.read())
        assert row == b"mi_distcomp 2 bring z\n"
        data = zlib.compress(open(ssh_lab.SCRIPT, "rb").read())
        process.stdin.write(b"%d\n" % len(data) + data)
        process.stdin.flush()
        return Session(process, self.fresh())

    def open(self, run=None, lane="", turn="t1", **env):
        return Session(self.popen(**env), run, lane, turn)

    def brought(self):
        with self.bring() as one:
            assert one.first == b"mi_distcomp 2 door\n"
        return self

    def gates(self):
        return sorted(name for name in os.listdir(self.path("base", ".mi")) if name.startswith("gate."))


def test_the_file_is_brought_once_and_run_from_bytecode_that_nobody_else_may_write(tmp_path):
    far = Free(tmp_path).brought()
    source, cached = far.gates()
    assert source == "gate." + far.sum and cached.startswith(source + ".cpython-3")
    for path in (far.path("base", ".mi"), far.path("base", ".mi", source), far.path("base", ".mi", cached)):
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
    before = os.stat(far.path("base", ".mi", cached)).st_ino
    with far.open(far.fresh()) as one:
        assert one.hello["door"] == "far" and one.hello["sum"] == far.sum
    assert os.stat(far.path("base", ".mi", cached)).st_ino == before
    for damage in (b"", b"\0" * 100, open(far.path("base", ".mi", cached), "rb").read()[:5000]):      # it is made anew
        open(far.path("base", ".mi", cached), "wb").write(damage)
        with far.open(far.fresh()) as one:
            assert one.hello["door"] == "far"
    os.chmod(far.path("base", ".mi", cached), 0o622)
    open(far.path("base", ".mi", cached), "wb").write(marshal.dumps(compile("import os; os.write(1, b'EVIL'); os._exit(0)", "x", "exec")))
    with far.open(far.fresh()) as one:
        assert one.hello["door"] == "far"
    assert os.stat(far.path("base", ".mi", cached)).st_mode & 0o022 == 0


def test_what_is_torn_of_the_program_is_brought_again_and_a_full_disk_does_not_matter(tmp_path):
    far = Free(tmp_path).brought()
    for name in far.gates():
        with open(far.path("base", ".mi", name), "wb") as out:
            out.write(open(ssh_lab.SCRIPT, "rb").read()[:90000])
    far.brought()
    for name in far.gates():
        os.unlink(far.path("base", ".mi", name))
    far.shell = ["sh", "-c", "ulimit -f 0; exec sh -c \"$0\""]
    with far.bring() as one:
        assert one.hello["door"] == "far" and far.gates() == []


def test_programs_of_versions_of_long_ago_go(tmp_path):
    far = Free(tmp_path)
    os.makedirs(far.path("base", ".mi"), 0o700)
    for name in ("gate.0000", "gate.0000.cpython-36.3379", "other"):
        open(far.path("base", ".mi", name), "w").close()
        os.utime(far.path("base", ".mi", name), (10 ** 9, 10 ** 9))
    far.brought()
    assert len(far.gates()) == 2 and os.path.exists(far.path("base", ".mi", "other"))


def test_where_others_could_have_put_the_program_nothing_is_run(tmp_path):
    far = Free(tmp_path).brought()
    for path, mode in ((far.path("base", ".mi"), 0o770), (far.path("base"), 0o777)):
        os.chmod(path, mode)
        with far.open(far.fresh()) as one:
            assert re.match(rb"mi_distcomp 2 no 77 %s there belongs to somebody else, or others may write to it\n" % os.fsencode(path), one.first), one.first
        os.chmod(path, 0o700)


def test_another_program_than_was_told_of_is_not_kept(tmp_path):
    far = Free(tmp_path)
    far.sum = "0" * 16
    with far.bring() as one:
        assert one.first.startswith(b"mi_distcomp 2 no 76 "), one.first
    assert far.gates() == []


def test_without_a_python_that_is_new_enough_there_is_the_plain_way(tmp_path):
    far = Free(tmp_path)
    for name, text in (("python3", "#!/bin/sh\nexit 127\n"), ("sh", None), ("cat", None), ("printf", None)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text) if text else path.symlink_to(shutil.which(name))
        path.chmod(0o755)
    text = runner.LOADER.replace("PATH=$PATH:/usr/bin:/bin\n", "").replace(" /usr/bin/python3 /usr/libexec/platform-python", "")
    command = "exec sh -c 'eval \"$(printf %b \"$1\")\"' mi_distcomp " + " ".join(runner.quoted_word(word) for word in (text, "2", "door", far.base, far.sum))
    code, out, err = far.raw(command, PATH=str(tmp_path / "bin"))
    assert out.startswith(b"\nmi_distcomp 2 plain there is no python3") and not os.path.exists(far.path("base", ".mi")), (out, err)


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "tcsh", "fish"])
def test_every_log_in_shell_starts_it_behind_whatever_it_prints(tmp_path, shell):
    suite.needs(shell)
    far = Free(tmp_path, (shell, "-c")).brought()
    far.shell = ["sh", "-c", "printf '\\033]0;host\\007'; exec %s -c \"$0\"" % shell]
    with far.open(far.fresh()) as one:
        assert one.first == b"mi_distcomp 2 door\n"
        one.put("a b", b"1")
        told, log = one.run("cat 'a b'; echo \"$0\" $SHLVL; exit 7")
        assert told["code"] == 7 and log.startswith(b"1")


def test_the_command_sees_what_the_log_in_has_set_and_its_umask(tmp_path):
    far = Free(tmp_path).brought()
    far.shell = ["sh", "-c", "umask 027; exec sh -c \"$0\""]
    with far.open(far.fresh(), OWN="mine", LANG="C", LC_TIME="C") as one:
        one.put("a", b"1", 0o777)
        log = one.run("echo $OWN; env | grep ^LC_; umask; : >new; stat -c %a a new; echo $MI_RUN")[1].decode().split("\n")
    assert log[:2] == ["mine", "LC_TIME=C"] and int(log[2], 8) == 0o27 and log[3:5] == ["750", "640"] and log[5].endswith(".1"), log


def test_a_base_without_a_home_directory_is_said(tmp_path):
    far = Free(tmp_path).brought()
    far.base = "~nobody-of-this-name/x"
    with far.open() as one:
        assert one.first == b"mi_distcomp 2 no 78 no home directory is known there: give an absolute path as base\n"


def test_what_a_version_of_before_has_started_is_seen_fetched_and_cleaned(tmp_path):
    far = Free(tmp_path).brought()
    ident = far.fresh()
    work, control = far.path("base", ident), far.path("base", ".mi", ident)
    os.makedirs(work)
    os.makedirs(control)
    for name, text in (("start", "1 1 %s h started"), ("child", "1 1 %s h running"), ("end", "1 1 %s h exit 3"), ("run", None), ("command", None), ("end.tmp", None)):
        with open(os.path.join(control, name), "w") as out:
            out.write("%-255s\n" % (text % runner.boot_id()) if text else "sh -c 'true'")
    for name, text in (("remote_program_exec.log", "said\n"), ("res", "result\n")):
        with open(os.path.join(work, name), "w") as out:
            out.write(text)
    with far.open(ident) as one:
        rows = one.ask("wait", offset=0)               # a keeper looks at it first
        assert b"".join(data for _told, data in rows) == b"said\n" and (rows[-1][0]["state"], rows[-1][0]["code"]) == ("ended", 3)
        assert sorted(one.results()[0]) == ["remote_program_exec.log", "res"] and one.ask("get", names=["res"])[0][1] == b"result\n"
        assert one.ask("clean")[0][0]["left"] == ["its results were not fetched"]
        assert one.ask("fetched", but=[])[0][0]["state"] == "fetched" and one.ask("clean")[0][0]["state"] == "gone"
    assert not os.path.exists(work)
