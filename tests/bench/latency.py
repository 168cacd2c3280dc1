#!/usr/bin/env python3
"""How long a trivial calculation takes: the whole process of the workflow side, and from "allowed" to the command's own time stamp.

Relay, poller and workflow side as in use, TLS on loopback.
usage: latency.py [--check] [--full]     --full: 1,000 pick-ups and 200 whole processes instead of 200 and 40
"""
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
import suite
from parts.common import Figures, Folder, fsync_time, median, rank


def spent(words, folder):
    """Seconds from the start of a process to its exit; it must succeed."""
    began = time.perf_counter()
    done = subprocess.run(words, cwd=folder, env=suite.clean_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    took = time.perf_counter() - began
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")
    return took


def whole(figures, world, folder, count):
    """The workflow side from start to exit, in turn with a bare start of the same interpreter."""
    with open(os.path.join(folder, "in.txt"), "w") as out:
        out.write("hello\n")
    words = [suite.PYTHON, suite.script("mi_system_wf.py"), "run", suite.SITE, "hello", "--in", "in.txt", "--out", "out.txt"] + world.reach()
    bare = [suite.PYTHON, "-c", "import ssl, http.client, json"]
    mine, starts = [], []
    for turn in range(count + 3):
        os.path.exists(os.path.join(folder, "out.txt")) and os.unlink(os.path.join(folder, "out.txt"))
        took, start = spent(words, folder), spent(bare, folder)
        assert os.path.getsize(os.path.join(folder, "out.txt")) == 6
        if turn >= 3:                                  # the first ones fill caches
            mine.append(took)
            starts.append(start)
    figures.most("whole process of a trivial calculation, median", median(mine), "s", 0.20, what="n = %d, p90 %.0f ms" % (count, 1000 * rank(mine, 0.9)))
    figures.most("... against a bare start of the interpreter", median(mine), "s", 4, median(starts))


def pickup(figures, world, base, count):
    """Registered without inputs and allowed at once; the command is `date`, whose stamp is in the poller's control directory."""
    client, late, five = world.client(), [], []
    for turn in range(count + 5):
        five.append(fsync_time(base, 5))
        time.sleep(0.01)                               # the poller is back in its wait
        accept_id = client.register("date")
        answered = time.time()
        stamp = {"progress": "", "stamp": "0"}
        while stamp["progress"] != "got return":
            stamp = client.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id, "wait": 10, "known": stamp["stamp"]})
        assert stamp["status"] == "completed", stamp
        with open(os.path.join(base, ".mi", accept_id, "stdout")) as text:
            late.append(float(text.read()) - answered)
    late, five = late[5:], five[5:]
    limit = 0.020 + median(five)
    figures.most("pick-up: allowed -> the command's own time stamp, median", median(late), "s", round(limit, 4),
                 what="n = %d; limit 20 ms + five fsyncs of %.2f ms" % (count, 1000 * median(five)))
    figures.most("pick-up, p99", rank(late, 0.99), "s", 0.100)


def main():
    options = common.options(__doc__)
    figures = Figures(options.check)
    with Folder() as folder:
        world = suite.World(os.path.join(folder, "world"), commands=["hello", "date"]).start()
        try:
            world.poller({"hello": "argv = /bin/cp\n    in.txt\n    out.txt\nmatch = hello", "date": "argv = /bin/date\n    +%s.%N\nmatch = date"})
            here = os.path.join(folder, "module")
            os.makedirs(here)
            whole(figures, world, here, 200 if options.full else 40)
            pickup(figures, world, os.path.join(world.folder, "poller", "base"), 1000 if options.full else 200)
        finally:
            world.close()
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
