#!/usr/bin/env python3
"""How many trivial calculations a second go through one poller with jobs = 8: claimed, started under the wrapper, ended, logs delivered.

Relay and poller as in use, TLS on loopback; all calculations are there before the poller starts. The reference is what no way around can
spare: a shell that starts the command, and the fsyncs of a calculation on both sides, one after the other on the same disk.
usage: throughput.py [--check] [--full]     --full: 500 calculations instead of 200
"""
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
from parts.common import Figures, Folder, fsync_time
import suite

FSYNCS = 12                    # of a calculation: order, journal and spare of the poller, the relay's steps
JOBS = 8


def reference(folder, count=40):
    """Calculations per second with nothing but their processes and fsyncs, one after the other."""
    began = time.perf_counter()
    for turn in range(count):
        subprocess.run(["/bin/sh", "-c", "sh -c 'exec /bin/true'; exit $?"], check=True)
        fsync_time(folder, FSYNCS)
    return count / (time.perf_counter() - began)


def through(figures, world, count):
    """`count` calculations from the poller's first claim to the last delivery."""
    client = world.client()
    ids = [client.register("true") for turn in range(count)]
    least = reference(world.folder)
    poller = world.poller({"true": "argv = /bin/true\nmatch = true"}, ini="jobs = %d\n" % JOBS)
    suite.wait_until(lambda: " 3 calc-request " in poller.text(), 30)
    began, before = time.perf_counter(), common.cpu(poller.pid) + common.cpu(world.relay.pid)
    suite.wait_until(lambda: world.rows("SELECT count(*) AS n FROM calculations WHERE state = 'got'")[0]["n"] == count, 300)
    spent = time.perf_counter() - began
    used = common.cpu(poller.pid) + common.cpu(world.relay.pid) - before
    figures.least("trivial calculations through one poller, jobs = 8", count / spent, "/s", 20, what="n = %d" % count)
    figures.least("... against their bare processes and fsyncs", count / spent, "/s", 0.2, least)
    figures.most("processor time of relay and poller for each", used / count, "s", 0.050)
    good = world.rows("SELECT count(*) AS n FROM calculations WHERE status = 'completed' AND attempt = 1")[0]["n"]
    figures.must("each was run once and completed", good == len(set(ids)) == count, "%d of %d" % (good, count))


def main():
    options = common.options(__doc__)
    figures = Figures(options.check)
    with Folder() as folder:
        world = suite.World(os.path.join(folder, "world"), commands=["true"]).start()
        try:
            through(figures, world, 500 if options.full else 200)
        finally:
            world.close()
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
