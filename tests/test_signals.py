"""SIGTERM and Ctrl+C end each program soon, with the documented exit code, wherever it stands: at each named step, in waits that no signal ends, and
with nobody reading what it writes."""
import fcntl
import os
import re
import signal
import subprocess
import time

import pytest
import suite
import torture
from suite import PYTHON, SITE, wait_until

POLLER, WORKFLOW, RELAY = "mi_system_remote.py", "mi_system_wf.py", "mi_dicomapi.py"
HOOKED = """import ctypes, importlib.util, os, socket, sys
spec = importlib.util.spec_from_file_location("program", %r)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
def stand_still(*words, **more):   # as C code does that waits for a name server or a dead disk: no signal ends it
    open(%r, "w").close()
    system, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    system.pthread_mutex_lock(lock)
    system.pthread_mutex_lock(lock)
%s
sys.argv[0] = %r
program.run_as_program(program.main)
"""
with open(suite.script(POLLER), encoding="utf-8") as source:
    POINTS = sorted(set(torture.named(source.read()))) + ["starting noted", "ended noted"]


class Held:
    """A program that stands still where `hook` (lines of Python) makes it."""

    def __init__(self, name, hook, words, folder, **how):
        self.mark = os.path.join(str(folder), "stands still")
        code = HOOKED % (suite.script(name), self.mark, hook, name)
        self.popen = subprocess.Popen([PYTHON, "-I", "-S", "-c", code] + [str(word) for word in words], cwd=str(folder), stdin=subprocess.DEVNULL,
                                      env=suite.clean_env(), **dict({"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, **how))

    def stands(self):
        wait_until(lambda: os.path.exists(self.mark) or self.popen.poll() is not None)

    def ended(self, number):
        """(exit code, seconds, what it wrote) after that signal."""
        began = time.monotonic()
        self.popen.send_signal(number)
        try:
            text = self.popen.communicate(timeout=20)[0] or b""
        finally:
            self.popen.kill()
        return self.popen.returncode, time.monotonic() - began, text.decode("utf-8")


def poller(world, folder, hook, url=None, **how):
    """A poller that stands still there. (What its command writes is too much to travel along with its name.)"""
    path = world.poller({"solve": "argv = /usr/bin/head\n    -c\n    40000\n    /dev/zero\nmatch = solve"}, name=os.path.join(str(folder), "p"), start=False)[1]
    if url:
        with open(path) as text:
            text = re.sub("url = .*", "url = " + url, text.read())
        with open(path, "w") as out:
            out.write(text)
    return Held(POLLER, hook, ["poll", "--ini", path], folder, **how)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = suite.World(tmp_path_factory.mktemp("signals"), commands=["solve"]).start()
    yield made
    made.close()


@pytest.mark.parametrize("name", POINTS)
def test_sigterm_at_each_named_step_ends_the_poller_with_0(site, tmp_path, name):
    site.client().register("solve")
    held = poller(site, tmp_path, "program.fault = lambda name: name == %r and stand_still()" % name)
    held.stands()
    code, took, text = held.ended(signal.SIGTERM)
    assert code == 0 and " stopped; what runs here runs on" in text, text
    assert took < 10


class Mute(suite.Listener):
    """Accepts, and says nothing."""

    def one(self, sock):
        time.sleep(60)


@pytest.mark.parametrize("hook", ["program.socket.getaddrinfo = stand_still", "program.os.statvfs = stand_still", "program.ssl.SSLContext.wrap_socket = stand_still"])
@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_name_server_a_disk_or_tls_that_hangs_does_not_hold_the_poller(site, tmp_path, hook, number, expected):
    held = poller(site, tmp_path, hook)
    held.stands()
    code, took, text = held.ended(number)
    assert code == expected and " stopped; what runs here runs on" in text and took < 10, text


def test_a_relay_that_never_answers_does_not_hold_the_poller(site, tmp_path):
    mute = Mute()
    try:
        held = poller(site, tmp_path, "", url=mute.url.replace("http:", "https:"))
        wait_until(lambda: b" polling " in held.popen.stdout.readline())
        assert held.ended(signal.SIGTERM)[0] == 0
    finally:
        mute.close()


def full_pipe():
    """A pipe that nobody reads and that takes nothing more: (end to read, end to write)."""
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETFL, os.O_NONBLOCK)
    try:
        while True:
            os.write(into, b"\n" * 65536)
    except BlockingIOError:
        fcntl.fcntl(into, fcntl.F_SETFL, 0)
    return out, into


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", [POLLER, RELAY])
def test_a_log_that_nobody_reads_does_not_hold_it(site, tmp_path, name, number, expected):
    out, into = full_pipe()
    try:
        if name == POLLER:
            hook = "program.Poller.tell_manual = lambda self, line: (os.dup2(%d, 2), open(%r, 'w').close())" % (into, str(tmp_path / "stands still"))
            held = poller(site, tmp_path, hook, pass_fds=[into])
        else:
            own = suite.World(tmp_path / "own", tls=False)
            hook = "program.LEAVE = 1\nprogram.log = lambda *words, **more: (open(%r, 'w').close(), os.write(2, b'x'))" % str(tmp_path / "stands still")
            held = Held(RELAY, hook, ["serve", "--ini", own.ini], tmp_path, stderr=into)
        held.stands()
        time.sleep(0.5)                                # it hangs in the write, or is about to
        assert held.ended(number)[0] == expected
    finally:
        os.close(out)
        os.close(into)


def test_a_name_server_that_hangs_does_not_hold_the_workflow_side(site, tmp_path):
    for words, said, number, expected in ((["run", SITE, "solve"], "interrupted; nothing was registered", signal.SIGTERM, 75),
                                          (["run", SITE, "solve"], "interrupted; nothing was registered", signal.SIGINT, 130),
                                          (["status", "1" * 8 + "-1111-4111-8111-" + "1" * 12], "interrupted", signal.SIGINT, 130)):
        held = Held(WORKFLOW, "program.socket.getaddrinfo = stand_still", words + site.reach(), tmp_path)
        held.stands()
        code, took, text = held.ended(number)
        assert code == expected and text == "mi_system_wf: %s\n" % said and took < 10, text
        os.unlink(held.mark)


def test_output_that_nobody_reads_does_not_hold_the_workflow_side(site, tmp_path):
    out, into = full_pipe()
    try:
        hook = "program.LEAVE, connect = 1, program.relay_of_options\nprogram.relay_of_options = lambda options: (open(%r, 'w').close(), connect(options))[1]" % (
            str(tmp_path / "stands still"))
        held = Held(WORKFLOW, hook, ["run", SITE, "solve"] + site.reach(), tmp_path, stdout=into, stderr=into)
        held.stands()
        time.sleep(0.5)
        assert held.ended(signal.SIGTERM)[0] == 75
    finally:
        os.close(out)
        os.close(into)


def lines_of(path):
    """How many lines of a log there are; 0 without it."""
    return path.read_text().count("\n") if path.exists() else 0


def test_after_logrotate_has_renamed_its_log_the_relay_writes_a_new_one(tmp_path, make_world):
    log = tmp_path / "relay.log"
    world = make_world(tls=False, commands=["solve"], ini="[Server]\nlogfile = %s\n" % log)
    world.write_ini(suite.a_port())
    made = suite.Process(RELAY, ["serve", "--ini", world.ini], str(tmp_path))
    try:
        wait_until(lambda: log.exists() and " listening " in log.read_text())
        log.rename(tmp_path / "relay.log.1")
        made.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: log.exists() and " reload " in log.read_text())
        assert " reload " not in (tmp_path / "relay.log.1").read_text() and made.alive()
    finally:
        made.stop()


def test_sighup_reopens_the_pollers_log_and_takes_the_ini_or_keeps_the_old_one(site, tmp_path):
    log, script = tmp_path / "poller.log", tmp_path / "solve"
    script.write_text("#!/bin/sh\necho $0 >out.txt\n")
    script.chmod(0o755)
    folder, path = site.poller({"other": "match = other\nargv = /bin/true"}, name="hung", ini="logfile = %s\n" % log, start=False)
    with open(path) as text:
        before = text.read()
    made = suite.Process(POLLER, ["poll", "--ini", path], folder)
    try:
        wait_until(lambda: log.exists() and " polling " in log.read_text())
        log.rename(tmp_path / "poller.log.1")
        with open(path, "w") as out:
            out.write(before + "[nonsense\n")
        made.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: log.exists() and "the old ini stays in force" in log.read_text())
        with open(path, "w") as out:
            out.write(before.replace("[command other]", "[command solve]\nmatch = solve\nargv = %s\n[command other]" % script).replace("[poller]\n", "[poller]\nproxy = http://x:1\n"))
        made.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: log.read_text().count(" reload ") == 3)
        assert 'key=proxy why="takes effect at the next start"' in log.read_text() and "commands=\"other solve\"" in log.read_text()
        accept_id = site.client().register("solve", results=["out.txt"])
        wait_until(lambda: site.state_of(accept_id) == "got")
        assert lines_of(tmp_path / "poller.log.1") and made.stop() == 0
    finally:
        made.kill()
