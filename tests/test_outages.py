"""What goes wrong in a long calculation: the poller dies, the relay is down, the line is cut again and again, the host stands still.
With --long in the lengths of real life; otherwise in short."""
import json
import os
import select
import signal
import socket
import subprocess
import time

import pytest

import suite
from suite import SITE, wait_until


class Line(suite.Listener):
    """A line between poller and relay: counts the bytes that reach the relay, and breaks as it is told to."""

    def __init__(self, port):
        self.target, self.up, self.cuts, self.every, self.ends = port, 0, 0, 0, []
        suite.Listener.__init__(self)

    def one(self, client):
        """One connection, until an end closes it, or `every` bytes have gone up."""
        try:
            relay = socket.create_connection(("127.0.0.1", self.target), 5)
        except OSError:
            return client.close()
        gone = 0
        with client, relay:
            try:
                while True:
                    for source in select.select([client, relay], [], [], 300)[0]:
                        data = source.recv(1 << 16)
                        if not data:
                            return
                        (relay if source is client else client).sendall(data)
                        if source is client:
                            self.up += len(data)
                            gone += len(data)
                    if self.every and gone >= self.every:
                        self.cuts += 1
                        relay.shutdown(socket.SHUT_WR)           # the relay reads what is under way: so it counts what it read
                        select.select([relay], [], [], 5)
                        return
            except OSError:
                pass


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


@pytest.fixture
def site(make_world):
    """A function: (world, poller) with a script as its command `solve`, over a Line if asked; files of both in world.folder."""
    lines = []

    def make(script, ini="", relay_ini="", line=False, **keywords):
        world = make_world(tls=not line, commands=["solve"], ini=relay_ini).start()
        path = os.path.join(world.folder, "solve.sh")
        with open(path, "w") as out:
            out.write('#!/bin/sh\necho "$MI_RUN" >>%s/ledger\n%s\n' % (world.folder, script.replace("FOLDER", world.folder)))
        os.chmod(path, 0o755)
        if line:
            world.line = Line(world.port)
            lines.append(world.line)
        near, world.url = world.url, "http://127.0.0.1:%d" % world.line.port if line else world.url
        world.again = lambda words=("poll",): world.poller({"solve": "match = solve\ngrace = 1s\nargv = %s" % path}, ini=ini, words=words)
        process, world.far = world.again(), world.url
        world.url = near
        return world, process

    yield make
    for line in lines:
        line.close()


def runs(world):
    path = os.path.join(world.folder, "ledger")
    return open(path).read().split() if os.path.exists(path) else []


def ended(world, accept_id, seconds):
    wait_until(lambda: world.state_of(accept_id) == "got", seconds, "the result")
    row, = world.rows("SELECT * FROM calculations WHERE accept_id = ?", accept_id)
    return row


def size_there(world, accept_id, n=0):
    """Bytes of a result that the relay's disk holds."""
    found = 0
    for folder, folders, names in os.walk(os.path.join(world.state, "spool", accept_id[:2], accept_id, "out")):
        found += sum(os.path.getsize(os.path.join(folder, name)) for name in names)
    return found


def test_the_poller_is_killed_under_a_command_and_started_again_later(site, tmp_path, long):
    work, away = (60, 10) if long else (6, 2)
    world, poller = site("sleep %d; echo x >out.txt" % work)
    words = ["run", SITE, "solve", "--out", "out.txt"]
    made = subprocess.Popen([suite.PYTHON, "-I", "-S", suite.script("mi_system_wf.py")] + words + world.reach(), cwd=str(tmp_path), env=suite.clean_env(),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: runs(world))
    poller.kill()
    time.sleep(away)                                   # that long nobody is there
    world.again()
    text = made.communicate(timeout=work + 60)[0].decode()
    assert made.returncode == 0 and (tmp_path / "out.txt").read_text() == "x\n" and len(runs(world)) == 1, text
    if long:                                           # compared with one that nothing befell
        plain = world.workflow(*words, cwd=str(tmp_path), timeout=work + 60)
        assert plain.returncode == 0 and len(text.splitlines()) <= len(plain.stdout.splitlines()) + 1, text
    assert "does not answer" not in text, text


def test_the_relay_is_down_with_a_result_half_sent_and_it_goes_on_at_the_byte_where_it_stopped(site, long):
    size, down = (400 << 20, 600) if long else (60 << 20, 3)
    world, poller = site("head -c %d /dev/urandom >out.bin" % size, line=True)
    accept_id = world.client().register("solve", results=["out.bin"])
    wait_until(lambda: size_there(world, accept_id) > size // 4, 120, "half a result")
    world.relay.kill()
    there, before = size_there(world, accept_id), world.line.up
    time.sleep(down)
    world.start()
    assert ended(world, accept_id, 900)["status"] == "completed" and len(runs(world)) == 1
    sent = world.line.up - before
    print("relay killed at byte %d of %d; %.3f x the rest was sent after it" % (there, size, sent / (size - there)))
    assert there < size and sent <= (size - there) + (32 << 20) if not long else sent <= (size - there) * 1.10, (there, sent)


def test_a_large_result_over_a_line_that_is_cut_again_and_again_is_sent_hardly_more_than_once(site, long):
    size, every = (500 << 20, 20 << 20) if long else (64 << 20, 9 << 20)
    world, poller = site("head -c %d /dev/urandom >out.bin" % size, line=True)
    world.line.every = every
    accept_id = world.client().register("solve", results=["out.bin"])
    assert ended(world, accept_id, 900)["status"] == "completed" and len(runs(world)) == 1
    print("%d cuts; the relay read %.4f x the result" % (world.line.cuts, world.line.up / size))
    most = 1.10 * size if long else size + world.line.cuts * (5 << 18)             # what is on its way when the line is cut
    assert world.line.cuts >= size // every - 2 and world.line.up <= most, (world.line.cuts, world.line.up / size)


def test_cancel_reaches_children_that_left_the_session_and_forgot_who_they_are(site):
    world, poller = site("env -i /usr/bin/setsid /bin/sh -c 'echo $$ >FOLDER/one; trap \"\" TERM; while :; do /bin/sleep 1; done' &\n"
                         "(setsid sh -c 'echo $$ >FOLDER/two; exec sleep 600' &)\nwait")
    client = world.client()
    accept_id = client.register("solve")
    pids = [int(wait_until(lambda: os.path.exists(path) and open(path).read().strip(), 20)) for path in (
        os.path.join(world.folder, "one"), os.path.join(world.folder, "two"))]
    wait_until(lambda: world.state_of(accept_id) == "running")
    client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True, "reason": "enough"})
    began = time.monotonic()
    wait_until(lambda: not any(alive(pid) for pid in pids), 30)
    print("tree gone after %.2f s, of which 1 s is grace" % (time.monotonic() - began))
    assert ended(world, accept_id, 20)["reason"] == "cancelled: enough"


def alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as text:
            return text.read().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def test_a_poller_that_stands_still_for_a_while_keeps_its_claim(site, long):
    world, poller = site("sleep %d; echo x >out.bin" % (30 if long else 2), relay_ini="" if long else "[times]\nlease = 1s\n")
    accept_id = world.client().register("solve", results=["out.bin"])
    wait_until(lambda: runs(world))
    wait_until(lambda: world.state_of(accept_id) == "running")
    os.kill(poller.pid, signal.SIGSTOP)
    try:
        if long:
            time.sleep(60)
        else:                                          # its lease lapses, and nothing comes of it
            wait_until(lambda: "out-of-contact" in world.relay.text())
    finally:
        os.kill(poller.pid, signal.SIGCONT)
    assert ended(world, accept_id, 60)["status"] == "completed" and runs(world) == [accept_id + ".1"]
    assert ("out-of-contact" in world.relay.text()) == (not long)


ZEROS = {"1G": "49bc20df15e412a64472421e13fe86ff1c5165e18b2afccf160d4dc19fe68a14",          # SHA-256 of that many
         "20G": "6cb118a8f8b3c19385874297e291dcbcdf3a9837ba1ca7b00ace2491adbff551"}


def test_a_huge_result_is_hashed_while_all_cores_are_busy_and_no_lease_lapses(site, long):
    size, lease = ("20G", 60) if long else ("1G", 20)
    world, poller = site("truncate -s %s huge.bin; echo x >out.bin" % size, ini="[outbound]\ndeny_sums = %s\n" % ZEROS[size], relay_ini="[times]\nlease = %ds\n" % lease)
    burners = [subprocess.Popen([suite.PYTHON, "-c", "while True: pass"]) for core in range(os.cpu_count() if long else 1)]
    try:
        began = time.monotonic()
        accept_id = world.client().register("solve", results=["huge.bin", "out.bin"])
        row = ended(world, accept_id, 600)
        print("%s hashed and refused in %.0f s" % (size, time.monotonic() - began))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert json.loads(row["refused"]) == {"huge.bin": "refused"} and runs(world) == [accept_id + ".1"]
    assert "out-of-contact" not in world.relay.text() and "lapse" not in world.relay.text()
