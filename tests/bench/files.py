#!/usr/bin/env python3
"""Files through the whole suite: large ones against a plain TLS socket pair, many small ones, and the memory of all three processes.

The command moves what came in to what goes out. The times are those of the relay's log: registered -> allowed is the hop into it,
claimed -> complete the hop to the external computer's disk, and so back.
usage: files.py [--check] [--full] [--size MIB] [--pairs N] [--only large|small|huge]
--full: 1 GiB (instead of 256 MiB) five times in turn with the socket pair, small files three times, and 10 GiB once
"""
import datetime
import hashlib
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
import suite
from parts.common import CHUNK, Figures, Folder, client_context, median, status

REFERENCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "parts", "reference.py")
MOST_MEMORY = 48 << 20         # bytes of VmHWM of each process
HOPS = (("workflow side -> relay", "1 add-calcinfo", "2 allow-wait-calc"), ("relay -> external computer", "3 calc-request", "4 calc-params-complete"),
        ("external computer -> relay", "7 send-results", "8 end-send"), ("relay -> workflow side", "8 end-send", "9 finish"))


class Sink:
    """The plain Python TLS socket pair: the receiver is a process of its own, sha256 and the same disk."""

    def __init__(self, world, folder):
        os.makedirs(folder, exist_ok=True)
        self.folder, self.context = folder, client_context(world.cert)
        self.popen = subprocess.Popen([sys.executable, "-I", "-S", REFERENCE, "sink", world.cert, world.key, folder], stdout=subprocess.PIPE)
        self.port = int(self.popen.stdout.readline())

    def send(self, path, size, sum256):
        """Seconds for one file."""
        began = time.perf_counter()
        raw = socket.create_connection(("127.0.0.1", self.port), 300)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        view = memoryview(bytearray(CHUNK))
        with self.context.wrap_socket(raw, server_hostname="localhost") as sock, open(path, "rb", buffering=0) as source:
            sock.sendall(struct.pack(">Q", size))
            for count in iter(lambda: source.readinto(view), 0):
                sock.sendall(view[:count])
            found = sock.recv(32)
        assert found.hex() == sum256
        return time.perf_counter() - began

    def close(self):
        self.popen.kill()
        self.popen.wait()
        self.popen.stdout.close()


def make_large(path, size):
    """A file of random bytes; its sha256."""
    digest, block = hashlib.sha256(), bytearray(os.urandom(16 << 20))
    with open(path, "wb") as out:
        for at in range(0, size, len(block)):
            block[:8] = struct.pack(">Q", at)          # no block equals another
            part = memoryview(block)[:size - at]
            out.write(part)
            digest.update(part)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def file_sum(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as source:
        view = memoryview(bytearray(CHUNK))
        for count in iter(lambda: source.readinto(view), 0):
            digest.update(view[:count])
    return digest.hexdigest()


def workflow(world, folder, words, timeout):
    """Runs the workflow side to its end: (time of its start, its VmHWM in bytes)."""
    began, peak = time.time(), 0
    with open(os.path.join(world.folder, "wf.out"), "ab") as out:
        popen = subprocess.Popen([suite.PYTHON, suite.script("mi_system_wf.py"), "run", suite.SITE] + words + world.reach(), cwd=folder,
                                 env=suite.clean_env(), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    while popen.poll() is None:
        try:
            peak = max(peak, status(popen.pid, "VmHWM"))
        except (AttributeError, OSError):              # it has just ended
            pass
        time.sleep(0.05)
        assert time.time() - began < timeout, "still not after %d s" % timeout
    with open(os.path.join(world.folder, "wf.out"), errors="replace") as text:
        assert popen.returncode == 0, text.read()[-2000:]
    return began, peak


def steps(world, since):
    """{step: time} of the last calculation, from what the relay logged from `since` (an offset) on."""
    found = {}
    for line in world.relay.text()[since:].splitlines():
        got = re.match(r"(\S+T\S+)([+-]\d\d):(\d\d) INFO \S+ (\d [a-z-]+)", line)
        if got:
            found[got.group(4)] = datetime.datetime.strptime(got.group(1) + got.group(2) + got.group(3), "%Y-%m-%dT%H:%M:%S.%f%z").timestamp()
    return found


def one_run(world, folder, words, timeout=600):
    """One calculation: ({hop: seconds}, seconds from the workflow side's start to complete on the external computer, its VmHWM)."""
    since = len(world.relay.text())
    began, peak = workflow(world, folder, words, timeout)
    found = steps(world, since)
    return [found[last] - found[first] for name, first, last in HOPS], found["4 calc-params-complete"] - began, peak


def started(folder, **keywords):
    """A relay and a poller whose one command moves `in` to `out`, and the workflow side's directory."""
    world = suite.World(folder, commands=["move"], **keywords).start()
    poller = world.poller({"move": "argv = /bin/mv\n    in\n    out\nmatch = move"})
    here = os.path.join(world.folder, "module")
    os.makedirs(here)
    return world, poller, here


def memory(figures, name, world, poller, peak):
    """VmHWM of each of the three."""
    for who, value in (("relay", world.relay.peak()), ("poller", poller.peak()), ("workflow side", peak)):
        figures.most("%s: VmHWM of the %s" % (name, who), value, "B", MOST_MEMORY)


def clear(world, here, sink):
    """What the last turn left, off the disk, the socket pair's files with it: memory that was just given back is quicker to write to, and who
    wrote last would have it."""
    for path in [os.path.join(here, "out"), os.path.join(world.state, "spool")] + [os.path.join(sink.folder, name) for name in os.listdir(sink.folder)] + [
            os.path.join(world.folder, "poller", "base", name) for name in os.listdir(os.path.join(world.folder, "poller", "base")) if "-" in name]:
        shutil.rmtree(path, ignore_errors=True)
        if os.path.isfile(path):
            os.unlink(path)


def large(figures, folder, size, pairs):
    """One large file, there and back, in turn with the socket pair, which carries it as often as it hops: many a disk is quick for its first
    bytes only. Each hop is compared with the socket pair's at the same place in the row."""
    world, poller, here = started(os.path.join(folder, "large"))
    try:
        path = os.path.join(here, "in")
        sum256, sink = make_large(path, size), Sink(world, os.path.join(folder, "sink"))
        rates, way, plain, peak = [[] for hop in HOPS], [], [], 0

        def calculation():
            found = one_run(world, here, ["move", "--in", "in", "--out", "out"])
            assert file_sum(os.path.join(here, "out")) == sum256
            return found

        def pair():
            return [sink.send(path, size, sum256) for hop in HOPS]

        for turn in range(pairs):
            found = {}
            for work in (pair, calculation) if turn % 2 else (calculation, pair):
                found[work] = work()
                clear(world, here, sink)
            (took, whole, high), base = found[calculation], found[pair]
            for hop, seconds in enumerate(took):
                rates[hop].append(base[hop] / seconds)
            way.append(base[0] / whole)
            plain.append(size / median(base))
            peak = max(peak, high)
        sink.close()
        name, base = "%d MiB" % (size >> 20), median(plain)
        for hop, ratios in zip(HOPS, rates):
            figures.least("%s: %s" % (name, hop[0]), median(ratios) * base, "B/s", 0.6, base, what="ratios %.2f..%.2f" % (min(ratios), max(ratios)))
        figures.least("%s: the whole way in, with start and sum" % name, median(way) * base, "B/s", 0.3, base, what="ratios %.2f..%.2f" % (min(way), max(way)))
        memory(figures, name, world, poller, peak)
    finally:
        world.close()


def small(figures, folder, count, turns):
    """Many files of 1 KiB, as inputs and as results."""
    world, poller, here = started(os.path.join(folder, "small"))
    try:
        os.mkdir(os.path.join(here, "in"))
        for n in range(count):
            with open(os.path.join(here, "in", "file-%05d.dat" % n), "wb") as out:
                out.write(b"%8d" % n * 128)
        rates, whole, peak = [[] for hop in HOPS], [], 0
        for turn in range(turns):
            began = time.perf_counter()
            to = "to-%d" % turn                        # nothing is deleted in between: ext4 then makes new files 20 times slower for a minute
            os.mkdir(os.path.join(here, to))
            took, way, high = one_run(world, here, ["move", "--in", "in/", "--out", "out/", "--to", to])
            whole.append(time.perf_counter() - began)
            assert len(os.listdir(os.path.join(here, to, "out"))) == count
            with open(os.path.join(here, to, "out", "file-%05d.dat" % (count - 1)), "rb") as found:
                assert found.read() == b"%8d" % (count - 1) * 128
            for hop, seconds in enumerate(took):
                rates[hop].append(count / seconds)
            peak = max(peak, high)
        name = "{:,} files of 1 KiB".format(count)
        for hop, found in zip(HOPS, rates):
            figures.least("%s: %s" % (name, hop[0]), median(found), "/s", 3000)
        figures.note("%s: there and back, whole process" % name, median(whole), "s")
        memory(figures, name, world, poller, peak)
    finally:
        world.close()


def huge(figures, folder, size):
    """One file, for the memory."""
    world, poller, here = started(os.path.join(folder, "huge"))
    try:
        sum256 = make_large(os.path.join(here, "in"), size)
        took, whole, peak = one_run(world, here, ["move", "--in", "in", "--out", "out"], 3600)
        assert file_sum(os.path.join(here, "out")) == sum256
        name = "%d GiB" % (size >> 30)
        for hop, seconds in zip(HOPS, took):
            figures.note("%s: %s" % (name, hop[0]), size / seconds, "B/s")
        memory(figures, name, world, poller, peak)
    finally:
        world.close()


def main():
    options = common.options(__doc__, size="MiB of the large file", pairs="how often, in turn with the socket pair", only="one part: large, small or huge")
    figures = Figures(options.check)
    size = int(options.size or (1024 if options.full else 256)) << 20
    with Folder() as folder:
        if options.only in (None, "large"):
            large(figures, folder, size, int(options.pairs or 5))
        if options.only in (None, "small"):
            small(figures, folder, 20000, 3 if options.full else 1)
        if options.only == "huge" or options.full and options.only is None:
            huge(figures, folder, 10 << 30)
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
