"""Whole calculations with fielded programs on one or both ends: our relay with all four kinds of pairs, our programs on a fielded relay."""
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time

import fielded_stand_ins
import pytest
import suite
from fielded_peer import Peer
from suite import LOGS, wait_until

OURS, THEIRS = "u-ours", "u-theirs"                    # sites: with a poller of our own, with a fielded one
SCRIPTS = {"copy": "cat in.txt in.dat >out.dat; echo said; echo complained >&2",
           "fail": "cp in.txt out.dat; echo bad news >&2; exit 3",
           "nothing": "echo said",
           "deep": "mkdir sub; cp in.txt sub/out.dat",
           "slow": "echo $$ >>'%(here)s/ran'; sleep 60 & wait $!; echo done >out.dat",
           "unlisted": "echo never >>'%(here)s/never'; touch out.dat"}
INPUTS = {"in.txt": "入力 a\n".encode(), "in.dat": bytes(range(256)) * 40}
POLL = "poll = 0.2s\n"                                 # [poller]: our poller asks a fielded relay so often


class Program:
    """A stand-in as a process, its output in a file."""

    def __init__(self, folder, *words):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "output")
        with open(self.path, "ab") as out:
            self.popen = subprocess.Popen([sys.executable, os.path.join(suite.HERE, "fielded_stand_ins.py")] + list(words), cwd=folder, stdin=subprocess.DEVNULL,
                                          stdout=out, stderr=out, env=suite.clean_env(PYTHONUTF8="1", PYTHONDONTWRITEBYTECODE="1"))

    def text(self):
        with open(self.path, encoding="utf-8", errors="replace") as text:
            return text.read()

    def end(self, seconds=30):
        """Its exit code, once it has ended."""
        return self.popen.wait(seconds)

    def alive(self):
        return self.popen.poll() is None

    def kill(self):
        if self.alive():
            self.popen.kill()
        self.popen.wait()


class Place:
    """Where calculations run: scripts as commands, a relay (ours or fielded), pollers and workflow sides of both kinds."""

    def __init__(self, folder):
        self.here, self.programs, self.count = str(folder), [], 0
        self.commands = {}
        for name, text in SCRIPTS.items():
            path = self.commands[name] = os.path.join(self.here, name + ".sh")
            with open(path, "w", encoding="utf-8") as out:
                out.write("#!/bin/sh\n%s\n" % (text % {"here": self.here} if "%(" in text else text))
            os.chmod(path, 0o755)
        self.allowed = {name: "argv = %s\n" % path for name, path in self.commands.items() if name != "unlisted"}

    def folder(self, what):
        """A new directory, with the inputs in it."""
        self.count += 1
        path = os.path.join(self.here, "%s%d" % (what, self.count))
        os.makedirs(path)
        for name, data in INPUTS.items():
            with open(os.path.join(path, name), "wb") as out:
                out.write(data)
        return path

    def program(self, folder, *words):
        self.programs.append(Program(folder, *words))
        return self.programs[-1]

    def fielded_poller(self, site, url, token, *more):
        folder = self.folder("poller")
        return self.program(folder, "poller", site, url, token, "--base", os.path.join(folder, "base"), "--ask", "0.2", "--take", "0.1",
                "--retry", "5,0.2", *more)

    def fielded_workflow(self, url, site, token, command, outs, *more):
        """(process, its directory)."""
        folder = self.folder("wf")
        return self.program(folder, "workflow", url, site, token, self.commands[command], ":".join(INPUTS), ":".join(outs), "--ask", "0.1", *more), folder

    def ran(self, name="ran"):
        """Which process groups the slow command has run in, so far."""
        try:
            with open(os.path.join(self.here, name)) as text:
                return [int(line) for line in text]
        except FileNotFoundError:
            return []

    def close(self):
        for program in self.programs:
            program.kill()
        for pid in [child for pid in self.ran() for child in children(pid)] + self.ran():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass


def files(folder):
    """{name: bytes} of what is there beside the inputs and the output."""
    found = {}
    for name in os.listdir(folder.encode()):
        if name.decode() not in INPUTS and name != b"output" and os.path.isfile(os.path.join(folder.encode(), name)):
            with open(os.path.join(folder.encode(), name), "rb") as source:
                found[name.decode("utf-8")] = source.read()
    return found


GOOD = {"out.dat": INPUTS["in.txt"] + INPUTS["in.dat"], LOGS[0]: b"said\n", LOGS[1]: b"complained\n"}


# ---- our relay

class Mixed(Place):
    """Our relay with TLS, a poller of our own at one site, a fielded one at the other."""

    def __init__(self, folder, ini="", more=()):
        Place.__init__(self, folder)
        self.world = suite.World(os.path.join(self.here, "world"), commands=list(self.commands.values()), sites=(OURS, THEIRS,
                "u-late") + tuple(more), ini=ini).start()
        self.ca = ["--ca", self.world.cert]
        self.ours = self.world.poller(self.allowed, ini="jobs = 3\n")
        self.theirs = self.poller_at(THEIRS)

    def poller_at(self, site):
        return self.fielded_poller(site, self.world.url, self.world.token, *self.ca)

    def start(self, side, site, command, outs, *more):
        """(process, directory) of a workflow side: "fielded" or "our"."""
        if side == "fielded":
            return self.fielded_workflow(self.world.url, site, self.world.token, command, outs, *(self.ca + list(more)))
        folder = self.folder("wf")
        words = ["run", site, self.commands[command]]
        for name in INPUTS:
            words += ["--in", name]
        for name in outs:
            words += ["--out", name]
        process = suite.Process("mi_system_wf.py", words + self.world.reach() + ["--to", folder], os.path.join(folder), cwd=folder)
        self.programs.append(process)
        return process, folder

    def run(self, side, site, command, outs=("out.dat",)):
        """(exit code, {name: bytes}, what was said) of a whole calculation."""
        process, folder = self.start(side, site, command, outs)
        code = process.end() if side == "fielded" else process.popen.wait(30)
        found = files(folder)
        found.pop("mi_system_wf.py.out", None)
        return code, found, process.text()

    def newest(self):
        """The accept_id that was registered last."""
        return self.world.rows("SELECT accept_id FROM calculations ORDER BY seq DESC LIMIT 1")[0]["accept_id"]

    def close(self):
        Place.close(self)
        self.world.close()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    made = Mixed(tmp_path_factory.mktemp("mixed"))
    yield made
    assert made.ours.alive() and made.theirs.alive(), made.theirs.text()             # nothing that went wrong has killed a poller
    made.close()


PAIRS = [(side, site) for side in ("fielded", "our") for site in (THEIRS, OURS)]
each_pair = pytest.mark.parametrize("side, site", PAIRS, ids=["%s workflow side, %s poller" % (side,
        "our" if site == OURS else "fielded") for side, site in PAIRS])


@each_pair
def test_success(mixed, side, site):
    code, found, text = mixed.run(side, site, "copy")
    assert code == 0, text
    assert found == GOOD


def test_parameters_and_a_results_directory_in_our_fielded_words_hide_nothing_from_a_fielded_poller(mixed):
    folder = mixed.folder("wf")
    words = [mixed.world.url, THEIRS, mixed.world.token, mixed.commands["deep"], "in.txt", "sub/out.dat", "-n 3"]
    done = suite.run("mi_system_wf.py", *(words + ["--ca-file", mixed.world.cert]), cwd=folder, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(os.path.join(folder, "sub", "out.dat"), "rb") as text:
        assert text.read() == INPUTS["in.txt"]


def test_our_own_words_are_told_that_a_fielded_poller_will_not_take_parameters(mixed):
    done = mixed.world.workflow("run", THEIRS, mixed.commands["copy"], "--param=-n 3", "--deadline", "1s")
    assert done.returncode == 75 and re.search("warning: the poller of site %s is a fielded one" % THEIRS, done.stdout), done.stdout


@each_pair
def test_a_failing_command(mixed, side, site):
    code, found, text = mixed.run(side, site, "fail")
    assert found == {"out.dat": INPUTS["in.txt"], LOGS[0]: b"", LOGS[1]: b"bad news\n"}, text
    if side == "fielded":
        assert code == 1
    else:                                              # a fielded poller does not tell the exit code
        assert code == 3 if site == OURS else 0 < code < 128, text


@each_pair
def test_a_missing_result(mixed, side, site):
    code, found, text = mixed.run(side, site, "copy", ("out.dat", "absent.dat"))
    assert found == GOOD and "absent.dat" in text
    assert code == (0 if side == "fielded" else 65), text


@each_pair
def test_none_of_the_results(mixed, side, site):
    code, found, text = mixed.run(side, site, "nothing", ("absent.dat",))
    assert found == {LOGS[0]: b"said\n", LOGS[1]: b""}, text
    assert code == 1 if side == "fielded" else code > 0, text


@each_pair
def test_cancelled_while_it_runs(mixed, side, site):
    """A fielded workflow side leaves with force; ours is told 409 while a fielded poller holds it, and ends with the signal's 143 where it can be stopped."""
    before = len(mixed.ran())
    process, folder = mixed.start(side, site, "slow", ("out.dat",), *(["--leave", "1.5"] if side == "fielded" else []))
    pid = wait_until(lambda: mixed.ran()[before:], what="the command runs")[0]
    accept_id = mixed.newest()
    if side == "fielded":
        assert process.end() == 1 and "left: code = 200" in process.text()
        assert Peer.word(Tls(mixed.world), "calc-status", accept_id) == "abnormal"
        assert Peer.word(Tls(mixed.world), "calc-progress", accept_id) == "got return"
    else:
        status, first = mixed.world.client().call("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True, "reason": "enough"})
        assert (status, first["code"]) == ((200, 200) if site == OURS else (409, 409)), first
    if site == THEIRS:                                 # cannot be told: it goes on to its end, and then to the next calculation
        os.kill(pid, signal.SIGTERM)
        for child in children(pid):
            os.kill(child, signal.SIGTERM)
    else:
        wait_until(lambda: not running(pid), 15, "the command is stopped")
    if side == "our":
        code = process.popen.wait(30)
        assert code == 143 if site == OURS else 0 < code < 128, process.text()
    code, found, text = mixed.run("fielded", site, "copy")
    assert (code, found) == (0, GOOD), text + mixed.theirs.text()


class Tls(Peer):
    """A Peer over TLS."""

    def raw(self, method, target, body=None, headers=()):
        client = self.world.client()
        return client.raw(method, target, body, headers)


def running(pid):
    """Is there such a process (not yet a zombie)?"""
    try:
        with open("/proc/%d/stat" % pid) as text:
            return text.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    """Its children."""
    try:
        with open("/proc/%d/task/%d/children" % (pid, pid)) as text:
            return [int(word) for word in text.read().split()]
    except OSError:
        return []


@pytest.mark.parametrize("side", ["fielded", "our"])
def test_cancelled_before_it_is_claimed(mixed, side):
    process, folder = mixed.start(side, "u-late", "slow", ("out.dat",), *(["--leave", "0.5", "--gently"] if side == "fielded" else []))
    if side == "fielded":
        assert process.end() == 1 and "left: code = 200" in process.text()
        accept_id = mixed.newest()
    else:
        accept_id = wait_until(lambda: mixed.world.rows("SELECT accept_id FROM calculations WHERE site = 'u-late' AND state = 'allowed'"))[0]["accept_id"]
        mixed.world.client().ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True, "reason": "enough"})
        assert process.popen.wait(30) == 130, process.text()
    assert mixed.world.state_of(accept_id) == "finished"
    assert Tls(mixed.world).code("calc-request", site_id="u-late") == (200, "0300") and mixed.world.client().claim(site="u-late") is None


def test_the_poller_is_lost(tmp_path_factory):
    """kill -9 of both pollers in mid-run, in all four pairs at once: after lost_after each workflow side ends in order, the fielded ones with 1."""
    mixed = Mixed(tmp_path_factory.mktemp("lost"), more=["u-second"],
                  ini="[times]\nlease = 1s\naccept_lease = 1s\nv1_lost_after = 20s\nlost_after = 2.5s\n")
    try:
        second = mixed.poller_at("u-second")
        started = [(side, mixed.start(side, site, "slow", ("out.dat",))) for side, site in
                   (("fielded", OURS), ("our", OURS), ("fielded", THEIRS), ("our", "u-second"))]
        wait_until(lambda: len(mixed.ran()) == 4, what="all four run")
        mixed.ours.kill()
        mixed.theirs.kill()
        second.kill()
        for side, (process, folder) in started:
            code = process.popen.wait(40)
            found = files(folder)
            assert code == (1 if side == "fielded" else 69), (side, process.text())
            assert "out.dat" not in found and b"lost" in found[LOGS[1]], (side, found)
            assert "Traceback" not in process.text()
    finally:
        mixed.close()


class Cutter(suite.Listener):
    """Passes connections on to a relay; the answers (or the requests) of the named calls are cut off."""

    def __init__(self, world):
        self.world, self.lose, self.deaf = world, [], []
        suite.Listener.__init__(self)

    def one(self, sock):
        data = b""
        while b"\r\n\r\n" not in data:
            data += sock.recv(65536)
        head, body = data.split(b"\r\n\r\n", 1)
        length = re.search(rb"content-length: *(\d+)", head.lower())
        while length and len(body) < int(length.group(1)):
            body += sock.recv(1 << 20)
        name = re.match(rb"[A-Z]+ /mi-distcomp-api/([a-z-]+)", head).group(1).decode()
        if name in self.deaf:
            self.deaf.remove(name)
            return sock.close()
        words = head.decode().split("\r\n")
        connection = http.client.HTTPConnection("127.0.0.1", self.world.port, timeout=30)
        method, target, version = words[0].split(" ")
        connection.request(method, target, body or None, dict(line.split(": ", 1) for line in words[1:]))
        answer = connection.getresponse()
        found = answer.read()
        connection.close()
        if name in self.lose:
            self.lose.remove(name)
            return sock.close()
        sock.sendall(b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (answer.status,
                len(found)) + found)
        sock.close()


@pytest.fixture
def cut(tmp_path_factory):
    """A relay over plain http and a Cutter before it, v1_lost_after short."""
    place = Place(tmp_path_factory.mktemp("cut"))
    world = suite.World(os.path.join(place.here, "world"), tls=False, commands=list(place.commands.values()), sites=("u-test",),
                        ini="[times]\nv1_lost_after = 1.5s\nlost_after = 2s\nv1_announce = 1s\n").start()
    place.world, place.cutter = world, Cutter(world)
    yield place
    place.close()
    place.cutter.listener.close()
    world.close()


@pytest.mark.parametrize("name", ["calc-params", "calc-start"])
def test_a_lost_answer_kills_the_fielded_poller_and_the_calculation_ends_lost_and_the_poller_that_is_started_again_goes_on(cut, name):
    poller = cut.fielded_poller("u-test", cut.cutter.url, cut.world.token)
    cut.cutter.lose.append(name)
    process, folder = cut.fielded_workflow(cut.world.url, "u-test", cut.world.token, "copy", ("out.dat",))
    assert poller.end() == 1 and "Traceback" in poller.text()
    again = cut.fielded_poller("u-test", cut.cutter.url, cut.world.token)
    assert process.end() == 1 and b"lost" in files(folder)[LOGS[1]]
    process, folder = cut.fielded_workflow(cut.world.url, "u-test", cut.world.token, "copy", ("out.dat",))
    assert process.end() == 0 and files(folder) == GOOD and again.alive()
    assert [row["attempt"] for row in cut.world.rows("SELECT attempt FROM calculations")] == [1, 1]          # neither was handed out twice


def test_lost_answers_that_the_fielded_poller_asks_again_for_do_no_harm(cut):
    cut.fielded_poller("u-test", cut.cutter.url, cut.world.token)
    cut.cutter.lose += ["calc-request", "calc-params-complete", "calc-end", "end-send"]
    process, folder = cut.fielded_workflow(cut.world.url, "u-test", cut.world.token, "copy", ("out.dat",))
    assert process.end() == 0 and files(folder) == GOOD and cut.cutter.lose == []


@pytest.mark.parametrize("lost", ["lose", "deaf"], ids=["the answer is lost", "nothing arrives"])
def test_an_upload_that_failed_makes_no_empty_success_though_the_fielded_poller_says_end_send(cut, lost):
    poller = cut.fielded_poller("u-test", cut.cutter.url, cut.world.token)
    getattr(cut.cutter, lost).append("send-results")
    process, folder = cut.fielded_workflow(cut.world.url, "u-test", cut.world.token, "copy", ("out.dat",))
    code = process.end()
    if lost == "lose":                                 # all was there: only the answer was not
        assert code == 0 and files(folder) == GOOD
    else:
        assert code == 1 and "out.dat" not in files(folder) and b"results" in files(folder)[LOGS[1]], process.text()
    assert "send-results failed" in poller.text() and poller.alive()


# ---- a fielded relay

class Fielded(Place):
    """A fielded relay (in this process, so that a test can look into it) over plain http on loopback."""

    def __init__(self, folder, tokens=("f" * 64,)):
        Place.__init__(self, folder)
        self.token = "f" * 64
        self.relay = fielded_stand_ins.Relay([OURS, THEIRS], list(self.commands.values()), tokens).start()
        self.url = self.relay.url

    def our_poller(self, site=OURS, words=None, ini="", token=None):
        """A poller of our own."""
        folder = self.folder("poller")
        path = os.path.join(folder, "poller.ini")
        with open(path, "w", encoding="utf-8") as out:
            if words is None:
                tokens = os.path.join(folder, "token")
                with open(os.open(tokens, os.O_WRONLY | os.O_CREAT, 0o600), "w") as text:
                    text.write(token or self.token)
                ini = "site = %s\nurl = %s\ntoken_file = %s\ncalc_base = %s\n%s" % (site, self.url, tokens, os.path.join(folder, "base"), ini)
            out.write("[poller]\n%s%s" % (POLL, ini))
            for command, text in self.allowed.items():
                out.write("[command %s]\n%s\n" % (command, text))
        made = suite.Process("mi_system_remote.py", (["poll"] if words is None else list(words)) + ["--ini", path], folder)
        self.programs.append(made)
        return made

    def our_workflow(self, site, command, outs=("out.dat",), words=False, wait=True):
        """(exit code or process, files, text) of a workflow side of our own; words: the fielded command line."""
        folder = self.folder("wf")
        if words:
            line = [self.url, site, self.token, self.commands.get(command, command), ":".join(INPUTS), ":".join(outs)]
        else:
            tokens = os.path.join(folder, "..", "token")
            with open(os.open(tokens, os.O_WRONLY | os.O_CREAT, 0o600), "w") as text:
                text.write(self.token)
            line = ["run", site, self.commands.get(command, command), "--url", self.url, "--token-file", tokens]
            for name in INPUTS:
                line += ["--in", name]
            for name in outs:
                line += ["--out", name]
        process = suite.Process("mi_system_wf.py", line, os.path.join(folder), cwd=folder)
        self.programs.append(process)
        if not wait:
            return process, folder
        code = process.popen.wait(40)
        found = files(folder)
        found.pop("mi_system_wf.py.out", None)
        return code, found, process.text()

    def close(self):
        Place.close(self)
        self.relay.stop()
        assert not any("Traceback" in program.text() or "bug=" in program.text() for program in self.programs if isinstance(program, suite.Process))


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A fielded relay with a poller of our own at one site and a fielded one at the other."""
    made = Fielded(tmp_path_factory.mktemp("old"))
    made.ours, made.theirs = made.our_poller(), made.fielded_poller(THEIRS, made.url, made.token)
    yield made
    assert made.ours.alive() and made.theirs.alive(), made.ours.text() + made.theirs.text()
    made.close()


@pytest.fixture
def alone(tmp_path_factory):
    """A fielded relay of the test's own, nobody on it."""
    made = Fielded(tmp_path_factory.mktemp("alone"))
    yield made
    made.close()


V1_PAIRS = PAIRS[1:]                                   # at least one of ours
on_each_pair = pytest.mark.parametrize("side, site", V1_PAIRS, ids=["%s workflow side, %s poller" % (side, "our" if site == OURS else "fielded")
                                                                    for side, site in V1_PAIRS])


def on_old(old, side, site, command, outs=("out.dat",), words=True):
    """(exit code, files, text) of a calculation through the fielded relay."""
    if side == "our":
        return old.our_workflow(site, command, outs, words=words)
    process, folder = old.fielded_workflow(old.url, site, old.token, command, outs)
    return process.end(), files(folder), process.text()


@on_each_pair
def test_success_on_a_fielded_relay(old, side, site):
    code, found, text = on_old(old, side, site, "copy")
    assert (code, found) == (0, GOOD), text + old.ours.text()
    assert not old.relay.table                         # fetched and forgotten


@on_each_pair
def test_a_failing_command_on_a_fielded_relay(old, side, site):
    code, found, text = on_old(old, side, site, "fail")
    assert code == 1 and found == {"out.dat": INPUTS["in.txt"], LOGS[0]: b"", LOGS[1]: b"bad news\n"}, text


@on_each_pair
def test_a_missing_result_on_a_fielded_relay(old, side, site):
    code, found, text = on_old(old, side, site, "copy", ("out.dat", "absent.dat"))
    assert (code, found) == (0, GOOD) and "absent.dat" in text, text


def test_our_workflow_sides_own_words_on_a_fielded_relay(old):
    code, found, text = old.our_workflow(THEIRS, "copy", ("out.dat", "absent.dat"))
    assert (code, found) == (65, GOOD), text
    code, found, text = old.our_workflow(OURS, "fail")
    assert 0 < code < 128 and found[LOGS[1]] == b"bad news\n", text


@pytest.mark.parametrize("site", [OURS, THEIRS])
def test_cancelled_on_a_fielded_relay_sends_our_workflow_side_away(old, site):
    before = len(old.ran())
    process, folder = old.our_workflow(site, "slow", words=True, wait=False)
    pid = wait_until(lambda: old.ran()[before:])[0]
    accept_id = list(old.relay.table)[-1]
    first = fielded_stand_ins.Api(old.url, old.token).call("POST", "cancel-wait-calc", body={"accept_id": accept_id, "delete": "force"})["errors"][0]
    assert first["code"] == 200
    assert process.popen.wait(30) == 1, process.text()                # forgotten there: a fielded one would wait for ever, or crash
    for child in [pid] + children(pid):
        os.kill(child, signal.SIGTERM)
    code, found, text = on_old(old, "our", site, "copy")
    assert (code, found) == (0, GOOD), text + (old.ours if site == OURS else old.theirs).text()


def test_our_poller_refuses_what_its_list_lacks_by_walking_the_steps_without_running_anything(old):
    process, folder = old.fielded_workflow(old.url, OURS, old.token, "unlisted", ("out.dat",))
    assert process.end() == 1 and not os.path.exists(os.path.join(old.here, "never"))
    assert old.commands["unlisted"].encode() in files(folder)[LOGS[1]]
    accept_id = re.search(r"accept_id = (\S+)", process.text()).group(1)
    calls = [name for method, name, fields in old.relay.calls if fields.get("accept_id") == accept_id and name in fielded_stand_ins.REMOTE]
    assert calls == list(fielded_stand_ins.REMOTE)


def test_our_poller_makes_the_fielded_calls_in_their_order_and_nothing_else(alone):
    alone.our_poller()
    process, folder = alone.fielded_workflow(alone.url, OURS, alone.token, "copy", ("out.dat", "absent.dat"))
    assert process.end() == 0
    accept_id = re.search(r"accept_id = (\S+)", process.text()).group(1)
    mine = [(method, name, fields) for method, name, fields in alone.relay.calls if fields.get("accept_id") == accept_id and name in fielded_stand_ins.REMOTE]
    assert [name for method, name, fields in mine] == list(fielded_stand_ins.REMOTE)
    assert all("v" not in fields and fields["site_id"] == OURS for method, name, fields in mine)
    sent = mine[4][2]["result_files"]
    assert set(sent) == {"out.dat", "absent.dat"} | set(LOGS)
    assert sent["absent.dat"]["content"] == "" and sent["absent.dat"]["mimetype1"] == "Error" and sent["absent.dat"]["mimetype2"]
    assert all(set(entry) == {"content", "mimetype1", "mimetype2"} for entry in sent.values())
    assert mine[3][2]["result"] == "calc end" and mine[5][2]["result"] == "end send"


def test_our_workflow_side_registers_as_a_fielded_one_does(alone):
    process, folder = alone.our_workflow(THEIRS, "copy", words=True, wait=False)
    wait_until(lambda: any(calc.allow != "none" for calc in alone.relay.table.values()), 20)
    calc, = alone.relay.table.values()
    assert set(calc.info["parameter_files"]) == set(INPUTS) and set(calc.info["result_files"]) == {"out.dat"} | set(LOGS)
    for name, (content, mime, charset) in calc.info["parameter_files"].items():
        assert mime.endswith(";") and charset.startswith("charset=")
        if charset in fielded_stand_ins.TEXTS:
            INPUTS[name].decode("utf-8")               # a fielded poller would die of it otherwise
    assert {"command", "remote-site", "parameters"} <= set(calc.info) and all(set(entry) == {"content", "mimetype1", "mimetype2"}
                                                                             for entry in calc.info["result_files"].values())
    process.kill()


@pytest.mark.parametrize("lost", ["calc-params-complete", "calc-start", "calc-end", "send-results", "end-send"])
def test_an_answer_that_is_lost_on_the_way_from_a_fielded_relay_does_not_end_the_calculation(alone, lost):
    poller = alone.our_poller(ini="retry = 5,0.2\n")
    alone.relay.lose.append(lost)
    process, folder = alone.fielded_workflow(alone.url, OURS, alone.token, "copy", ("out.dat",))
    assert process.end() == 0 and files(folder) == GOOD and poller.alive(), poller.text()
    assert not alone.relay.lose


def test_a_lost_answer_to_calc_params_costs_that_calculation_only(alone):
    poller = alone.our_poller(ini="retry = 5,0.2\n")
    alone.relay.lose.append("calc-params")
    first = alone.fielded_workflow(alone.url, OURS, alone.token, "copy", ("out.dat",))[0]
    wait_until(lambda: not alone.relay.lose, 20)
    process, folder = alone.fielded_workflow(alone.url, OURS, alone.token, "copy", ("out.dat",))
    assert process.end() == 0 and poller.alive(), poller.text()
    first.kill()


def test_a_fielded_relay_that_is_away_for_a_while_is_asked_again(alone):
    poller = alone.our_poller(ini="retry = 50,0.2\n")
    wait_until(lambda: alone.relay.names(), 20)
    port = alone.relay.server_port
    alone.relay.stop()
    time.sleep(1)
    alone.relay = fielded_stand_ins.Relay([OURS, THEIRS], list(alone.commands.values()), [alone.token], port=port).start()
    assert on_old(alone, "fielded", OURS, "copy")[:2] == (0, GOOD) and poller.alive()


MANUAL = r"""site id = u-ours
base url = %(url)s
token = \S+
\d{4}/\d\d/\d\d \d\d:\d\d:\d\d:send %(url)s/mi-distcomp-api/calc-request\?site_id=u-ours
code = 0300 / message = There is no information for accept_id\(None\), about the your site id\(u-ours\)
"""


def test_the_manuals_lines_on_a_fielded_relay(alone):
    poller = alone.our_poller(words=[OURS, alone.url, alone.token, "calc_base:" + os.path.join(alone.here, "base")])
    wait_until(lambda: "0300" in poller.text(), 20)
    lines = "".join(line + "\n" for line in poller.text().split("\n") if re.match(r"site id|base url|token =|\d{4}/|code =", line))
    assert re.match(MANUAL % {"url": re.escape(alone.url)}, lines), poller.text()
    assert alone.token not in poller.text()
    poller.popen.send_signal(signal.SIGINT)
    assert poller.popen.wait(15) == 130 and "Ctrl + C スクリプト停止要求受付" in poller.text()


def test_the_manuals_lines_for_a_wrong_site_and_a_wrong_token(alone):
    poller = alone.our_poller(words=["typo", alone.url, alone.token, "calc_base:" + os.path.join(alone.here, "base1")])
    wait_until(lambda: "code = 400 / message = Your site-id(typo) does not match in the list that acceptable to." in poller.text(), 20)
    poller.kill()
    poller = alone.our_poller(words=[OURS, alone.url, "e" * 64, "calc_base:" + os.path.join(alone.here, "base2")])
    assert poller.popen.wait(20) == 77, poller.text()
    assert re.search(r'\d{4}/\d\d/\d\d \d\d:\d\d:\d\d:status code = 403 / reason = .*"0005".*/mi-distcomp-api/calc-request への実行権がありません。', poller.text())


def test_our_workflow_side_is_told_the_reason_by_a_fielded_relay(alone):
    for site, command, says in (("typo", "copy", "does not match"), (OURS, "/bin/rm -rf /", "not acceptable")):
        code, found, text = alone.our_workflow(site, command)
        assert code == 77 and says in text and found == {}, (code, text)
    alone.token = "e" * 64
    code, found, text = alone.our_workflow(OURS, "copy")
    assert code == 77 and not alone.relay.table, (code, text)


def test_what_a_fielded_relay_cannot_do_is_refused_before_anything_is_registered(alone):
    code, found, text = alone.our_workflow(OURS, "copy", ("*.dat",))
    assert code == 64, (code, text)
    assert not alone.relay.table


@pytest.mark.parametrize("version", [(404, b"<html><body>Not Found</body></html>"), (403, b"<html>Forbidden</html>"), (200, b"<html>portal</html>"),
                                     (405, b""), (403, json.dumps({"errors": [{"code": "0005", "message": "x"}]}).encode())],
                         ids=["404 HTML", "403 HTML", "200 HTML", "405", "403 of the gateway"])
def test_whatever_is_no_version_two_answer_is_a_fielded_relay(tmp_path_factory, version):
    place = Fielded(tmp_path_factory.mktemp("version"))
    place.relay.version = version
    try:
        poller = place.our_poller()
        wait_until(lambda: "calc-request" in place.relay.names(), 20, poller.text())
    finally:
        place.close()


def test_calculix_through_the_fielded_protocol(tmp_path_factory):
    suite.needs("ccx")
    """A cantilever between fielded peers on our relay: the mesh goes in as text, the displacements come back. (Ours on a fielded relay:
    test_fielded_clients.py.)"""
    place = Place(tmp_path_factory.mktemp("ccx"))
    command = os.path.join(place.here, "solve.sh")
    with open(command, "w") as out:
        out.write("#!/bin/sh\nexec ccx job\n")
    os.chmod(command, 0o755)
    folder = place.folder("wf")
    with open(os.path.join(folder, "job.inp"), "w") as out:
        out.write(JOB)
    world = suite.World(os.path.join(place.here, "world"), tls=False, commands=[command], sites=(OURS,)).start()
    try:
        place.fielded_poller(OURS, world.url, world.token)
        process = place.program(folder, "workflow", world.url, OURS, world.token, command, "job.inp", "job.dat:job.frd", "--ask", "0.1")
        assert process.end(60) == 0, process.text()
        text = files(folder)["job.dat"].decode()
        tip = [float(line.split()[3]) for line in text.split("\n") if re.match(r"\s+[5678]\s", line)]
        assert len(tip) == 4 and all(-1e-2 < value < -1e-6 for value in tip), text
    finally:
        place.close()
        world.close()


JOB = """*NODE, NSET=ALL
1, 0, 0, 0
2, 0, 1, 0
3, 0, 1, 1
4, 0, 0, 1
5, 5, 0, 0
6, 5, 1, 0
7, 5, 1, 1
8, 5, 0, 1
*ELEMENT, TYPE=C3D8, ELSET=BEAM
1, 1, 2, 3, 4, 5, 6, 7, 8
*NSET, NSET=TIP
5, 6, 7, 8
*BOUNDARY
1, 1, 3
2, 1, 3
3, 1, 3
4, 1, 3
*MATERIAL, NAME=STEEL
*ELASTIC
210000, 0.3
*SOLID SECTION, ELSET=BEAM, MATERIAL=STEEL
*STEP
*STATIC
*CLOAD
TIP, 3, -1.0
*NODE PRINT, NSET=TIP
U
*NODE FILE
U
*END STEP
"""
