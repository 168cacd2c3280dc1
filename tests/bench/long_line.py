#!/usr/bin/env python3
"""The WebAPI way over emulated long lines (root, /dev/net/tun, gcc): lanes and packing against one lane that sends all as it is, in one run.

The relay stands in one network namespace, poller and workflow side in another one; a command moves what came in to what goes out, so each
calculation crosses the line four times. Both variants run turn by turn; a figure is the median of the ratios of their times (of both ways to
the relay, of both ways from it). Sums are included: to the relay from the workflow side's start to `allowed` and from the command's end to
`end-send`, from the relay from the claim to `complete` and from `end-send` to `finish`.
usage: long_line.py [--check] [--full] [--only EXPRESSION] [--turns N] [--ssh yes]
--check: small sizes, once; --full: the sizes of the specification, three times; --only: of the rows' titles; --ssh yes: execute_remote_command.py
on the same lines, too (put and get), and what part of its speed the slower of the two ways has."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
import files
import suite
from parts.common import Figures, Folder, median, status
from ssh_transfer import MIB, Bench, Wan, keep_memory
import ssh_lab

CLEAN = ["-d", "25", "-r", "1000", "-q", "6250"]
LINES = {                      # title: options of wanlink, settings of both namespaces
    "50 ms, 1 Gbit/s": (CLEAN, ()),
    "50 ms, 1 Gbit/s, 0.1 % loss": (CLEAN + ["-l", "0.1"], ()),
    "50 ms, 1 Gbit/s, windows of 1 MiB": (CLEAN, ("net.ipv4.tcp_rmem=4096 131072 1048576",)),
    "50 ms, 50 Mbit/s": (["-d", "25", "-r", "50", "-q", "312"], ()),
    "50 ms, 200 Mbit/s": (["-d", "25", "-r", "200", "-q", "1250"], ()),
    "no distance": ([], ()),
}
ROWS = [                       # line, kind, MiB (KiB of each of many) and how many; with --full; without; with --check, and its own least; at least, of one lane's speed
    ("50 ms, 1 Gbit/s", "random", (256, 1), (64, 1), (16, 1, 1.0), 1.6),
    ("50 ms, 1 Gbit/s", "small", (1, 20000), (1, 20000), (1, 2000, 1.0), 2.0),
    ("50 ms, 1 Gbit/s, 0.1 % loss", "random", (128, 1), (32, 1), None, 4.0),
    ("50 ms, 1 Gbit/s, windows of 1 MiB", "random", (64, 1), (64, 1), None, 2.5),
    ("50 ms, 50 Mbit/s", "text", (256, 1), (32, 1), (8, 1, 2.0), 4.0),
    ("50 ms, 200 Mbit/s", "random", (128, 1), (64, 1), None, 0.95),
    ("no distance", "random", (1024, 1), (256, 1), None, 0.95),
]
START = 16                     # MiB whose time is taken from that of a row with loss: what is left is its steady part


class LongLine:
    """A line with a relay at one end, and at the other one a poller for each variant."""

    def __init__(self, folder, title):
        options, settings = LINES[title]
        self.wan = Wan(options, settings)
        near, far = self.wan.names
        for name in self.wan.names:
            subprocess.check_call(["ip", "netns", "exec", name, "ip", "link", "set", "lo", "up"])
        self.near = self.python_in(folder, near)
        self.world = world = suite.World(folder, commands=["move"], sites=("u-one", "u-lanes"), python=self.python_in(folder, far), ini=(
            "[Server]\nipaddress = 10.99.0.2\n[limits]\nspool_free = 1%\n"))
        world.cert, world.key = suite.make_certificate(folder, names="IP:10.99.0.2")
        world.port = 50443
        world.write_ini(world.port)
        world.relay = suite.Process("mi_dicomapi.py", ["serve", "--ini", world.ini], folder, python=world.python)
        suite.wait_until(lambda: " listening url=" in world.relay.text() or not world.relay.alive(), what="relay")
        world.url, world.python, self.pollers = "https://10.99.0.2:%d" % world.port, self.near, {}
        for site, more in (("u-one", "lanes = 1\n"), ("u-lanes", "")):
            world.sites = (site,)
            self.pollers[site] = world.poller({"move": "argv = /bin/mv\n    in\n    out\nmatch = move"}, site, ini=more)
        self.here = os.path.join(folder, "module")
        os.mkdir(self.here)

    def python_in(self, folder, name):
        """A program that is Python in a namespace."""
        path = os.path.join(folder, "python-" + name)
        with open(path, "w") as out:
            out.write('#!/bin/sh\nexec ip netns exec %s %s "$@"\n' % (name, suite.PYTHON))
        os.chmod(path, 0o755)
        return path

    def calculate(self, site, source, to):
        """One calculation with `in`, whose copies are gone afterwards: its steps' times, and that of its start."""
        os.rename(source, os.path.join(self.here, "in"))
        since, began = len(self.world.relay.text()), time.time()
        name = "/" if os.path.isdir(os.path.join(self.here, "in")) else ""
        words = ["run", site, "move", "--in", "in" + name, "--out", "out" + name, "--to", to] + (["--lanes", "1"] if site == "u-one" else [])
        with open(os.path.join(self.world.folder, "wf.out"), "ab") as out:
            done = subprocess.run([self.near, suite.script("mi_system_wf.py")] + words + self.world.reach(), cwd=self.here, timeout=3000,
                                  env=suite.clean_env(), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        os.rename(os.path.join(self.here, "in"), source)
        with open(os.path.join(self.world.folder, "wf.out"), errors="replace") as text:
            assert done.returncode == 0, text.read()[-2000:]
        subprocess.check_call(["diff", "-r", source, os.path.join(self.here, to, "out")])
        shutil.rmtree(os.path.join(self.here, to))
        return dict(files.steps(self.world, since), began=began)

    def ways(self, site, source, to):
        """[seconds to the relay, seconds from it], both of both hops."""
        found = self.calculate(site, source, to)
        return [found["2 allow-wait-calc"] - found["began"] + found["8 end-send"] - found["6 calc-end"],
                found["4 calc-params-complete"] - found["3 calc-request"] + found["9 finish"] - found["8 end-send"]]

    def close(self):
        self.world.close()
        self.wan.close()


def solver_text(folder, side=16):
    """What CalculiX writes (.frd and .dat) of a block of side ** 3 elements under tension, as one text."""
    span, face = range(side + 1), [(j, k) for j in range(side + 1) for k in range(side + 1)]
    corners = (0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)

    def number(i, j, k):
        return 1 + i + (side + 1) * (j + (side + 1) * k)

    lines = ["*NODE,NSET=ALL"] + ["%d,%d,%d,%d" % (number(i, j, k), i, j, k) for k in span for j in span for i in span]
    lines += ["*ELEMENT,TYPE=C3D8,ELSET=E"] + ["%d,%s" % (e + 1, ",".join(
        str(number(e % side + a, e // side % side + b, e // side ** 2 + c)) for a, b, c in corners)) for e in range(side ** 3)]
    lines += ["*MATERIAL,NAME=M", "*ELASTIC", "210000.,0.3", "*SOLID SECTION,ELSET=E,MATERIAL=M", "*STEP", "*STATIC", "*BOUNDARY", "1,2,3",
              "%d,2" % number(0, 0, side)] + ["%d,1" % number(0, j, k) for j, k in face]
    lines += ["*CLOAD"] + ["%d,1,%r" % (number(side, j, k), 100.0 * (1 if 0 < j < side else 0.5) * (1 if 0 < k < side else 0.5)) for j, k in face]
    lines += ["*NODE FILE", "U", "*EL FILE", "S,E", "*NODE PRINT,NSET=ALL", "U", "*EL PRINT,ELSET=E", "S", "*END STEP", ""]
    with open(os.path.join(folder, "block.inp"), "w") as out:
        out.write("\n".join(lines))
    subprocess.run(["ccx", "block"], cwd=folder, stdout=subprocess.DEVNULL, check=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    found = b""
    for kind in ("frd", "dat"):
        with open(os.path.join(folder, "block." + kind), "rb") as text:
            found += text.read()
    return found


def make_source(folder, kind, size, count):
    """What a row sends: a file of size MiB, or count files of size KiB in a directory; its path."""
    path = os.path.join(folder, "source")
    if kind == "small":
        os.mkdir(path)
        for number in range(count):
            with open(os.path.join(path, "file-%05d.dat" % number), "wb") as out:
                out.write(b"%8d" % number * 128 * size)
    elif kind == "random":
        files.make_large(path, size * MIB)
    else:
        text, left = solver_text(folder), size * MIB
        with open(path, "wb") as out:
            while left:
                left -= out.write(text[:left])
    return path


def row(figures, folder, title, kind, amount, wanted, turns, with_ssh):
    """A row of the table: both ways, and the SSH way beside it."""
    size, count = amount[:2]
    wanted = amount[2] if len(amount) > 2 else wanted
    line = LongLine(folder, title)
    try:
        small = make_source(folder + "-start", "random", 1, 1)             # all has been read once
        for site in ("u-one", "u-lanes"):
            line.calculate(site, small, "first")
        os.unlink(small)
        source = make_source(folder, kind, size, count)
        name = "%s, %s" % (title, "%d x %d KiB" % (count, size) if kind == "small" else "%s %d MiB" % (kind, size))
        unit, total = ("/s", count) if kind == "small" else ("B/s", size * MIB)
        times = measure(line, source, turns)
        for way, where in enumerate(("to the relay", "from the relay")):
            show_way(figures, "%s: %s" % (name, where), [took[way] for took in times["u-one"]], [took[way] for took in times["u-lanes"]],
                     2 * total, unit, wanted)
        if "loss" in title and kind == "random" and size > START:
            first = measure(line, make_source(folder + "-start", kind, START, 1), turns)
            for way, where in enumerate(("to the relay", "from the relay")):
                start = {site: [took[way] for took in first[site]] for site in first}
                show_way(figures, "%s: %s, the first %d MiB" % (name, where, START), start["u-one"], start["u-lanes"], 2 * START * MIB, unit, None)
                show_way(figures, "%s: %s, all behind them" % (name, where), *[
                    [max(1e-3, took[way] - median(start[site])) for took in times[site]] for site in ("u-one", "u-lanes")],
                    2 * (total - START * MIB), unit, wanted)
        if with_ssh:
            beside_ssh(figures, name, line, source, times["u-lanes"], unit, total)
        for who, process in (("relay", line.world.relay), ("poller", line.pollers["u-lanes"])):
            figures.most("%s: VmHWM of the %s" % (name, who), status(process.pid, "VmHWM"), "B", files.MOST_MEMORY)
    finally:
        line.close()


def measure(line, source, turns):
    """{variant: [[seconds to the relay, seconds from it] of each turn]}, the variants turn by turn."""
    times = {"u-one": [], "u-lanes": []}
    for turn in range(turns):
        for site in sorted(times, reverse=bool(turn % 2)):
            times[site].append(line.ways(site, source, "to-%d" % len(times[site])))
    return times


def show_way(figures, name, one, lanes, amount, unit, wanted):
    """The speed of a way, against that of one lane."""
    ratios = [first / second for first, second in zip(one, lanes)]
    base, what = amount / median(one), "ratios %.2f..%.2f" % (min(ratios), max(ratios))
    if wanted is None:
        return figures.note(name, median(ratios) * base, unit, base, what)
    figures.least(name, median(ratios) * base, unit, wanted, base, what)


def beside_ssh(figures, name, line, source, times, unit, total):
    """The same by the SSH runner, a hop each way; ours are two."""
    bench = Bench(line.wan.lab, 1)
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    if folder != source:
        folder = os.path.join(folder, "for-ssh")
        os.makedirs(folder)
        os.link(source, os.path.join(folder, "in"))
    back = os.path.join(line.world.folder, "back")
    os.makedirs(back)
    took = [bench.ours("put", folder, 1, "auto")]
    bench.ours("start", folder, 1, "auto")
    took.append(bench.ours("get", back, 1, "auto"))
    for way, where in enumerate(("to the relay / put", "from the relay / get")):
        figures.least("%s: %s by the SSH runner" % (name, where), 2 * total / median([one[way] for one in times]), unit, 0.8, total / took[way])


def main():
    options = common.options(__doc__, only="an expression: the rows whose title it matches", turns="how often, in turn", ssh="yes: the SSH runner beside it")
    suite.needs("root", "ip", "gcc", "ccx")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))      # namespaces and daemons go, too
    ssh_lab.in_memory()
    figures = Figures(options.check)
    if options.full:
        keep_memory(3 << 30)
    for number, (title, kind, full, usual, small, wanted) in enumerate(ROWS):
        amount = full if options.full else small if options.check else usual
        if amount is None or not re.search(options.only or "", "%s, %s" % (title, kind)):
            continue
        with Folder() as folder:
            os.makedirs(os.path.join(folder, "row-start"))
            os.makedirs(os.path.join(folder, "row"))
            row(figures, os.path.join(folder, "row"), title, kind, amount, wanted, int(options.turns or (1 if options.check else 3)), options.ssh == "yes")
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
