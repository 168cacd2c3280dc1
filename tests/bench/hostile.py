#!/usr/bin/env python3
"""An honest client beside 500 slow ones (TLS, a byte of a head each second) and 200 that say nothing at all, each of which comes again when it
is thrown out: first from other addresses (so many that all of them can hang on), then from the honest client's own.

usage: hostile.py [--check] [--full]
"""
import os
import resource
import socket
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
import suite
from parts.common import Figures, Folder, Wire, median, rank, request, status

SLOW, SILENT, AGAIN = 500, 200, 2.0


class Attacker:
    """One of many in a process of their own: connects, dribbles or is silent, and comes again."""

    def __init__(self, context, port, address, slow, at):
        self.context, self.port, self.address, self.slow, self.sock, self.at = context, port, address, slow, None, at

    def turn(self, now):
        """What it does when its time has come."""
        self.at = now + 1
        try:
            if self.sock is None:
                self.sock = socket.create_connection(("127.0.0.1", self.port), 1, (self.address, 0))
                if self.slow:
                    self.sock = self.context.wrap_socket(self.sock, server_hostname="localhost")
                    self.sock.send(b"GET /mi-distcomp-api/version HTTP/1.1\r\nX: ")
                self.sock.settimeout(0)
            elif self.slow:
                self.sock.send(b"a")
            if not self.slow or self.sock is not None:
                try:
                    if self.sock.recv(1) == b"":
                        raise OSError
                except (BlockingIOError, common.ssl.SSLWantReadError):
                    pass
        except OSError:
            if self.sock is not None:
                self.sock.close()
            self.sock, self.at = None, now + AGAIN


def attack(port, address, cert):
    """All of them, until standard input ends; says on its end how often they came in."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))
    context = common.client_context(cert)
    begun = time.monotonic()
    them = [Attacker(context, port, "127.0.9.%d" % (number % 12 + 1) if address == "others" else address, number < SLOW, begun + 2.0 * number / (SLOW + SILENT)) for number in range(SLOW + SILENT)]
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    told = False
    while not over.is_set():
        now = time.monotonic()
        for one in them:
            if one.at <= now:
                one.turn(now)
        if not told and now - begun > 4:
            told = True
            print(sum(one.sock is not None for one in them), flush=True)
        time.sleep(0.02)


class Honest:
    """An honest client: calls on a connection that stays, and now and then a new one."""

    def __init__(self, world, accept_id):
        self.world, self.context = world, common.client_context(world.cert)
        self.call = request("GET", "calc-progress?v=2&wait=0&known=&accept_id=" + accept_id, world.token)
        self.wire = Wire(world.port, self.context)

    def times(self, seconds):
        """(seconds of each call, seconds of each new connection with its first call, how many of those were refused)."""
        kept, new, refused, until = [], [], 0, time.monotonic() + seconds
        while time.monotonic() < until:
            for turn in range(10):
                begun = time.perf_counter()
                code, body = self.wire.call(self.call)
                kept.append(time.perf_counter() - begun)
                assert code == 200, body
                time.sleep(0.005)
            begun = time.perf_counter()
            try:
                wire = Wire(self.world.port, self.context, 5)
                assert wire.call(self.call)[0] == 200
                wire.close()
                new.append(time.perf_counter() - begun)
            except OSError:
                refused += 1
        return kept, new, refused


def measure(figures, world, honest, address, usual, seconds):
    """Both kinds of call while they hang on."""
    name = "from other addresses: " if address == "others" else "from its own address: "
    them = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--attack", str(world.port), address, world.cert], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)
    try:
        inside = int(them.stdout.readline())
        memory = status(world.relay.pid, "VmRSS")
        kept, new, refused = honest.times(seconds)
        figures.most(name + "a call, median", median(kept), "s", 2.0, median(usual[0]), what="%d of %d hang on" % (inside, SLOW + SILENT))
        figures.note(name + "a call, p99", rank(kept, 0.99), "s")
        figures.most(name + "a new connection and its call, median", median(new) if new else 99, "s", 2.0, median(usual[1]), what="%d, refused %d" % (len(new), refused))
        figures.must(name + "new connections come through", len(new) > (0 if address == "others" else 0.1) * refused and len(new) > 3)
        figures.must(name + "memory stays flat", status(world.relay.pid, "VmRSS") < memory + (4 << 20),
                     "%.1f -> %.1f MiB" % (memory / 1048576, status(world.relay.pid, "VmRSS") / 1048576))
    finally:
        them.stdin.close()
        them.wait(20)


def main():
    if sys.argv[1:2] == ["--attack"]:
        return attack(int(sys.argv[2]), sys.argv[3], sys.argv[4])
    options = common.options(__doc__)
    figures = Figures(options.check)
    with Folder() as folder:
        world = suite.World(os.path.join(folder, "hostile"), commands=["hello"]).start()
        try:
            honest = Honest(world, world.client().register("hello"))
            honest.times(0.5)
            usual = honest.times(10 if options.full else 3)
            figures.note("alone: a call, median", median(usual[0]), "s")
            figures.note("alone: a new connection and its call, median", median(usual[1]), "s")
            for address in ("others", "127.0.0.1"):
                measure(figures, world, honest, address, usual, 30 if options.full else 7)
            text = world.relay.text()
            figures.must("the relay's log holds no traceback", "Traceback" not in text and "bug=" not in text)
        finally:
            world.close()
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
