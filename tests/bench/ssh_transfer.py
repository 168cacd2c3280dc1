#!/usr/bin/env python3
"""Transfer speed of the SSH runner against `rsync -av` in the same run; up and down, sums included, processes started from cold.

ssh_transfer.py            short: loopback, 256 MiB and 2,000 files
ssh_transfer.py --full     1 GiB, and the emulated long lines (root, /dev/net/tun, gcc); mscp beside it where it is installed
ssh_transfer.py --check    each once; exit 1 if a ratio is below a third of what it should be
Prints one line per case: name, seconds of both, ratio (above 1: faster than rsync), the ratio it should have."""
import argparse
import atexit
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import ssh_lab                                         # noqa: E402

IDENT = "00000000-0000-4000-8000-%012x"


class Bench:
    """One link: rsync and the runner over it, turn by turn."""

    def __init__(self, lab, repeats):
        self.lab, self.repeats, self.number = lab, repeats, 0
        self.results = []

    def data(self, kind, size, count=1):
        """A directory with test data."""
        folder = tempfile.mkdtemp(prefix="data-", dir=self.lab.dir)
        source = random.Random(1)
        text = b"".join(b"step %6d residual %12.5e time %9.4f s converged no\n" % (n, source.random(), n * 0.01) for n in range(20000))
        for n in range(count):
            where = os.path.join(folder, "d%02d" % (n % 20)) if count > 1 else folder
            os.makedirs(where, exist_ok=True)
            with open(os.path.join(where, "f%05d" % n), "wb") as out:
                left = size
                while left:
                    step = min(left, 1 << 20)
                    out.write(os.urandom(step) if kind == "random" else (text * (step // len(text) + 1))[:step])
                    left -= step
        return folder

    def timed(self, words):
        began = time.monotonic()                       # no timeout here: Python would look for the end every 50 ms only
        subprocess.check_call(["timeout", "600"] + words, stdout=subprocess.DEVNULL, env=dict(os.environ, XDG_STATE_HOME=self.lab.path("state")))
        return time.monotonic() - began

    def ours(self, way, folder, number, streams):
        return self.timed(self.lab.client + [sys.executable, "-I", "-S", os.path.join(HERE, "ssh_worker.py"), way, self.lab.path("far"),
                                             self.lab.path("config"), folder, IDENT % number, streams])

    def rsync(self, source, goal, extra=()):
        return self.timed(self.lab.client + ["rsync", "-av"] + list(extra) + ["-e", "ssh -F " + self.lab.path("config"), source, goal])

    def case(self, title, folder, wanted, streams="auto", scp=None, mscp=False, ways=("put", "get")):
        """Both ways, best of `repeats` each; prints and keeps the ratios. Who comes first changes: the later ones find less memory at hand."""
        times = {}
        for turn in range(self.repeats):
            self.number += 1
            far = self.lab.path("far", IDENT % self.number)
            back, other = tempfile.mkdtemp(dir=self.lab.dir), tempfile.mkdtemp(dir=self.lab.dir)
            reference = self.lab.path("far", "reference")
            os.mkdir(reference)
            deeds = {"rsync put": lambda: self.rsync(folder + "/", "hpc:" + reference + "/"), "ours put": lambda: self.ours("put", folder, self.number, streams),
                     "rsync get": lambda: self.rsync("hpc:" + reference + "/", other + "/"), "ours get": lambda: self.ours("get", back, self.number, streams)}
            for way in ways:
                if way == "get":                       # results are only of what has run
                    self.ours("start", folder, self.number, streams)
                for who in ("rsync ", "ours ")[::-1 if turn % 2 else 1]:
                    times.setdefault(who + way, []).append(deeds[who + way]())
            if "get" in ways:
                subprocess.check_call(["diff", "-r", folder, back])
            subprocess.check_call(["diff", "-r", "-x", "remote_program_exec.log", folder, far])
            if scp and not turn:
                times["scp put"] = [self.timed(self.lab.client + ["scp", "-q", "-r", "-F", self.lab.path("config"), folder, "hpc:" + reference + "/scp"])]
            if mscp and not turn and shutil.which("mscp"):
                times["mscp put"] = [self.timed(self.lab.client + ["mscp", "-q", "-F", self.lab.path("config"), folder, "hpc:" + reference + "/mscp"])]
            for one in (far, back, other, reference):
                shutil.rmtree(one)
        for way in ways:
            ours, theirs = min(times["ours " + way]), min(times["rsync " + way])
            self.say("%s, %s" % (title, way), ours, theirs, wanted)
        for name in ("scp", "mscp"):
            if name + " put" in times:
                self.say("%s, put, against %s" % (title, name), min(times["ours put"]), times[name + " put"][0], scp if name == "scp" else 1.0)

    def say(self, title, ours, theirs, wanted):
        ratio = theirs / ours
        self.results.append((title, ratio, wanted))
        print("%-64s ours %7.2f s  reference %7.2f s  ratio %6.2f  wanted %5.2f  %s" % (
            title, ours, theirs, ratio, wanted, "ok" if ratio >= wanted else "BELOW"), flush=True)


class Wan:
    """Two network namespaces joined by wanlink; the lab's sshd stands in the second."""

    def __init__(self, options, sysctl=()):
        self.tmp = tempfile.mkdtemp(prefix="mi-wan-")
        link = os.path.join(self.tmp, "wanlink")
        subprocess.check_call(["gcc", "-O2", "-pthread", "-o", link, os.path.join(ssh_lab.HERE, "wanlink.c")])
        allow_cubic()
        self.names = ["mia%d" % os.getpid(), "mib%d" % os.getpid()]
        for name in self.names:
            subprocess.check_call(["ip", "netns", "add", name])
            for setting in ("net.ipv4.tcp_congestion_control=cubic", "net.ipv4.tcp_no_metrics_save=1") + tuple(sysctl):
                subprocess.call(["ip", "netns", "exec", name, "sysctl", "-qw", setting])
        self.link = subprocess.Popen(["chrt", "-f", "1", link, "-n", ",".join(self.names)] + options, stderr=subprocess.DEVNULL)
        time.sleep(0.7)
        inside = [["ip", "netns", "exec", name] for name in self.names]
        self.lab = ssh_lab.Lab("10.99.0.2", prefix=inside[1], client=inside[0]).start()

    def close(self):
        self.lab.close()
        self.link.terminate()
        self.link.wait()
        for name in self.names:
            subprocess.call(["ip", "netns", "del", name])
        shutil.rmtree(self.tmp)


def allow_cubic():
    """Namespaces may choose cubic, as most hosts have it, only if the machine allows it."""
    path = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
    with open(path) as text:
        words = text.read().split()
    if "cubic" not in words:
        with open(path, "w") as text:
            text.write(" ".join(words + ["cubic"]))


def keep_memory(size):
    """A virtual machine that hands freed memory back to its host pays for each page that it takes again some ten times what writing it
    costs. That is no property of a line: meanwhile it keeps its memory, of which size bytes are touched once."""
    path = "/sys/module/page_reporting/parameters/page_reporting_order"
    if not os.path.exists(path):
        return
    with open(path) as text:
        before = text.read()

    def write(order):
        with open(path, "w") as text:
            text.write(order)
    write("10")                                        # of pages, 4 MiB: no larger block is ever free as one
    atexit.register(write, before)
    with tempfile.TemporaryFile() as touched:
        for _n in range(size >> 20):
            touched.write(bytes(1 << 20))


MIB = 1 << 20
WAN = [                        # title, wanlink options, sysctl, cases (kind, size, count, wanted, scp)
    ("50 ms, 1 Gbit/s", ["-d", "25", "-r", "1000", "-q", "6250"], (), [("random", 512 * MIB, 1, 2.0, None), ("random", 16384, 2000, 1.1, None), ("random", 16384, 100, 0.9, 10.0)]),
    ("50 ms, 1 Gbit/s, 0.1 % loss", ["-d", "25", "-r", "1000", "-q", "6250", "-l", "0.1"], (), [("random", 64 * MIB, 1, 4.0, None)]),
    ("50 ms, 1 Gbit/s, windows of 1 MiB", ["-d", "25", "-r", "1000", "-q", "6250"],
     ("net.ipv4.tcp_rmem=4096 131072 1048576",), [("random", 256 * MIB, 1, 3.0, None)]),
    ("50 ms, 200 Mbit/s", ["-d", "25", "-r", "200", "-q", "1250"], (), [("text", 512 * MIB, 1, 4.0, None), ("random", 256 * MIB, 1, 0.9, None)]),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--wan", help="only the long lines whose title has this expression in it")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--streams", default="auto")
    parser.add_argument("--case", type=int, help="only the case of this number (from 0) of each long line")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))      # namespaces and daemons go, too
    ssh_lab.in_memory()
    results = []
    if not options.wan:
        lab = ssh_lab.Lab().start()
        try:
            bench = Bench(lab, 1 if options.check else options.repeats)
            size = 1024 if options.full else 256
            bench.case("loopback, %d MiB" % size, bench.data("random", size * MIB), 0.9, options.streams)
            bench.case("loopback, 2,000 x 16 KiB", bench.data("random", 16384, 2000), 1.1, options.streams)
            results += bench.results
        finally:
            lab.close()
    if options.full or options.wan:
        keep_memory(3 << 30)
    for title, words, sysctl, cases in WAN if options.full or options.wan else ():
        if options.wan and not re.search(options.wan, title):
            continue
        wan = Wan(words, sysctl)
        try:
            bench = Bench(wan.lab, 1)
            for kind, size, count, wanted, scp in cases if options.case is None else cases[options.case:options.case + 1]:
                name = "%s, %s %s" % (title, kind, "%d MiB" % (size // MIB) if count == 1 else "%d x %d KiB" % (count, size // 1024))
                bench.case(name, bench.data(kind, size, count), wanted, options.streams, scp, mscp=count == 1)
            results += bench.results
        finally:
            wan.close()
    if options.check and any(ratio < wanted / 3 for title, ratio, wanted in results):
        return 1


if __name__ == "__main__":
    sys.exit(main())
