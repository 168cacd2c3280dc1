#!/usr/bin/env python3
"""From the workflow side's cancel to the end of the command's last process, for families of the kinds of tests/process_families.py.

Relay and poller as in use, TLS on loopback; the cancel comes 0 ... 2 s after the command is up, as it happens.
usage: cancel.py [--check] [--full]     --full: 20 cancels of each instead of 5
"""
import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
import process_families
import suite
from parts.common import Figures, Folder, median

GRACE = {"grace 10 s": ("", 10), "grace 0.5 s": ("\ngrace = 0.5s", 0.5)}     # the default, and a short one


def seconds(world, made, kind, command, count):
    """Seconds from each of so many cancels, one after the other, until nothing is left of the command."""
    client, took = world.client(), []
    for turn in range(count):
        accept_id = client.register(command)
        alive = made.alive(accept_id + ".1")
        time.sleep(random.uniform(0, 2))
        began = time.monotonic()
        client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})
        found = process_families.gone({kind: alive}, 40)
        took.append(found.get(kind, began + 40) - began)
    return took


def main():
    options = common.options(__doc__)
    figures = Figures(options.check)
    wanted = [(grace, kind) for grace in GRACE for kind in ("plain", "orphan", "deaf", "all") if not (kind == "deaf" and grace == "grace 10 s")]
    with Folder() as folder:
        commands = {"%s-%d" % (kind, number): (grace, kind) for number, (grace, kind) in enumerate(wanted)}
        world = suite.World(os.path.join(folder, "world"), commands=list(commands)).start()
        try:
            made = process_families.Family(os.path.join(folder, "family"))
            world.poller({name: "argv = %s\n    %s\nmatch = %s%s" % (made.command, kind, name, GRACE[grace][0]) for name, (grace, kind) in commands.items()})
            for name, (grace, kind) in commands.items():
                took = seconds(world, made, kind, name, 20 if options.full else 5)
                late = 2 + (GRACE[grace][1] if kind in ("deaf", "all") else 0)
                figures.most("cancel to the last process gone: %s, %s, median" % (kind, grace), median(took), "s", late,
                             what="n = %d, max %.2f s" % (len(took), max(took)))
        finally:
            world.close()
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
