#!/usr/bin/env python3
"""Many sites on one relay: parked polls (threads, memory, idle CPU, wake-up), calls and registrations a second.

usage: polls.py [--check] [--full] [--only parked|calls|registrations]     --full: also 10,000 sites
"""
import hashlib
import itertools
import json
import os
import resource
import selectors
import sqlite3
import subprocess
import sys
import time
import uuid

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
import suite
from parts.common import Figures, Folder, Wire, cpu, load, median, rank, request, status

SPREAD = "[limits]\nunauthenticated_per_address = 20000\nparked_per_token = 20000\ncalculations_per_user = 0\n"
REFERENCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "parts", "reference.py")


def tokens_for(world, sites):
    """A token per site, its user named as the site (straight into the database: 0.1 s each by command)."""
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    now, made = time.time(), {site: os.urandom(32).hex() for site in sites}
    db.executemany("INSERT INTO tokens (hash, user, roles, sites, issued, expires) VALUES (?, ?, 'workflow remote', ?, ?, ?)",
                   [(hashlib.sha256(token.encode()).hexdigest(), site, site, now, now + 86400) for site, token in made.items()])
    db.commit()
    db.close()
    return made


def polling(site, token, wait):
    """The request of a poller that waits for work."""
    return request("POST", "calc-request", token, json.dumps(
        {"v": 2, "site_id": site, "poller": "bench", "take": os.urandom(8).hex(), "wait": wait}).encode())


def registering(site, token, **more):
    """The request that registers a calculation without inputs and allows it at once."""
    return request("POST", "add-calcinfo", token, json.dumps({"v": 2, "request_id": os.urandom(12).hex(), "allow": True, "calc-info": dict({
        "command": "hello", "remote-site": site, "parameters": "", "parameter_files": {}, "result_files": {"out.txt": {}}}, **more)}).encode())


# ---- parked

class Sites:
    """Many sites, each with one connection that polls with wait = 50 for ever; its first wait is `first` seconds or up to 50, the sites spread,
    so that the renewals come as evenly. Each polls as soon as it is connected: the relay keeps no stranger for long."""

    def __init__(self, world, tokens, first):
        self.tokens, self.poll, self.wires = tokens, selectors.EpollSelector(), {}
        context = common.client_context(world.cert)
        for site in tokens:
            wire = self.wires[site] = Wire(world.port, context)
            wire.site = site
            wire.sock.settimeout(0)
            self.poll.register(wire.sock, selectors.EVENT_READ, wire)
            self.ask(site, first + len(self.wires) % (51 - first))

    def ask(self, site, wait=50):
        """The site polls."""
        self.wires[site].send(polling(site, self.tokens[site], wait))

    def pump(self, seconds, wanted=None):
        """Takes answers for that long, polls again for each "nothing to do". Returns what `wanted` got, at once, or the number of answers."""
        until, count = time.perf_counter() + seconds, 0
        while True:
            left = until - time.perf_counter()
            if left <= 0:
                return count if wanted is None else None
            for key, events in self.poll.select(left):
                wire = key.data
                assert wire.take(), "site %s was closed by the relay" % wire.site
                found = wire.answer()
                if not found:
                    continue
                count += 1
                first = json.loads(found[1].decode())["errors"][0]
                assert first["code"] in (200, "0300"), first
                if wire.site == wanted and first["code"] == 200:
                    return first
                self.ask(wire.site)

    def close(self):
        for wire in self.wires.values():
            wire.close()


def keep_alive_cost(pid, wire, requests, seconds=1.5):
    """Seconds of the relay's processor for a call that finds nothing, of a client that asks again at once."""
    began, until, count = common.cpu_of_threads(pid), time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        wire.call(next(requests))
        count += 1
    return (common.cpu_of_threads(pid) - began) / count


def parked(figures, folder, count, most_memory, wakes):
    """count sites wait; nobody has anything to do; then one of them has."""
    names = ["site-%05d" % n for n in range(count)]
    world = suite.World(os.path.join(folder, "parked"), commands=["hello"], sites=names, ini=SPREAD + "[times]\naccept_lease = 1h\n")
    tokens = tokens_for(world, names)
    world.start()
    try:
        began, first = time.perf_counter(), 15 if count <= 2000 else 34   # seconds: nobody renews while the idle relay is looked at
        sites = Sites(world, tokens, first)
        asked = time.perf_counter()
        sites.pump(1.0)                                # the last ones are parked
        name, pid = "%d sites parked: " % count, world.relay.pid
        figures.note(name + "to connect, TLS, each with its first poll", (asked - began) / count, "s")
        before = cpu(pid), time.perf_counter()
        answers = sites.pump(10)
        used = 100 * (cpu(pid) - before[0]) / (time.perf_counter() - before[1])
        figures.most(name + "idle CPU, of a core", used, "%", 2.0, what="%d polls renewed meanwhile" % answers)
        one = Wire(world.port, common.client_context(world.cert))
        asked_of = itertools.repeat(polling(names[0], tokens[names[0]], 0))
        kept = [keep_alive_cost(pid, one, asked_of)]
        sites.pump(max(0, asked + first - time.perf_counter()))
        before = common.cpu_of_threads(pid), time.perf_counter()
        answers = sites.pump(10)
        spent = common.cpu_of_threads(pid) - before[0]
        used = 100 * spent / (time.perf_counter() - before[1])
        figures.note(name + "CPU with waits of 50 s renewed (%d/s)" % (count / 50), used * count / 50 / (answers / 10), "%",
                     what="measured: %.1f%% at %d/s" % (used, answers / 10))
        kept.append(keep_alive_cost(pid, one, asked_of))
        figures.most(name + "a wait that is renewed / a keep-alive call, of CPU", spent / answers, "s", 2.0, median(kept),
                     what="n = %d" % answers)
        late, whole, wire = [], [], Wire(world.port, common.client_context(world.cert))
        for turn in range(wakes):
            site = names[turn * 7919 % count]
            sent = time.perf_counter()
            code, body = wire.call(registering(site, tokens[site]))
            answered = time.perf_counter()
            assert code == 200, body
            assert sites.pump(10, site), "site %s was not woken" % site
            now = time.perf_counter()
            late.append(now - answered)
            whole.append(now - sent)
            sites.ask(site)
            sites.pump(0.002)
        figures.note(name + "registration sent -> claim answered, median", median(whole), "s")
        figures.note(name + "wake-up after the registration's answer, median", median(late), "s")
        figures.most(name + "wake-up after the registration's answer, p99", rank(late, 0.99), "s", 0.020, what="n = %d" % wakes)
        figures.most(name + "threads", status(pid, "Threads"), "", 50)
        figures.most(name + "memory (VmRSS), after all that", status(pid, "VmRSS"), "B", most_memory << 20)
        sites.close()
    finally:
        world.close()


# ---- calls a second

class Hello:
    """The bare http.server."""

    def __init__(self, *words):
        self.popen = subprocess.Popen([sys.executable, "-I", "-S", REFERENCE, "hello"] + list(words), stdout=subprocess.PIPE)
        self.port = int(self.popen.stdout.readline())

    def close(self):
        self.popen.kill()
        self.popen.wait()
        self.popen.stdout.close()


def fill(world, rows):
    """Registered calculations straight into the database: most of other sites and users, some of the site and user that is measured."""
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    now, info = time.time(), json.dumps({"parameters": "", "result_names": ["out.txt"], "result_patterns": [], "extra": {}})
    db.executemany(
        "INSERT INTO calculations (accept_id, user, request_id, site, command, info, needs_v2, state, registered, touched, allowed)"
        " VALUES (?, ?, ?, ?, 'hello', ?, 0, ?, ?, ?, ?)",
        ((str(uuid.uuid4()), suite.USER if n % 10 == 0 else "user-%d" % (n % 500), "r%d" % n,
          suite.SITE if n % 4 == 0 else "site-%d" % (n % 100), info, "registered" if n % 2 == 0 else "allowed", now, now, None if n % 2 == 0 else now)
         for n in range(rows)))
    db.execute("INSERT INTO past SELECT seq, accept_id, user, site, command, registered FROM calculations")          # which gives the numbers
    db.commit()
    db.close()


def compare(figures, name, turns, measured, reference, threshold):
    """Runs both in turn; the median of the ratios against the threshold (None: only shown)."""
    pairs = []
    for turn in range(turns):
        pairs.append((measured(), reference()) if turn % 2 else (reference(), measured())[::-1])
    ratio = median(mine / other for mine, other in pairs)
    base = median(other for mine, other in pairs)
    if threshold is None:
        return figures.note(name, ratio * base, "/s", base, what="median of %d pairs" % turns)
    figures.least(name, ratio * base, "/s", threshold, base, what="median of %d pairs" % turns)


def calls(figures, folder, turns, rows, seconds=1.0):
    """Polls that find nothing, over keep-alive."""
    empty = suite.World(os.path.join(folder, "empty"), commands=["hello"], ini=SPREAD).start()
    plain = suite.World(os.path.join(folder, "plain"), tls=False, commands=["hello"], ini=SPREAD).start()
    full = suite.World(os.path.join(folder, "full"), commands=["hello"], ini=SPREAD, sites=(suite.SITE,))
    fill(full, rows)
    full.start()
    bare, bare_tls = Hello(), Hello(empty.cert, empty.key)
    try:
        context = {world: world.tls and common.client_context(world.cert) for world in (empty, full, plain)}
        progress = {}
        for world in (empty, full, plain):
            accept_id = world.client().register("hello", site=suite.SITE, inputs={"a": b"a"}, allow=False)
            progress[world] = request("GET", "calc-progress?v=2&accept_id=" + accept_id, world.token)

        def polls(world, connections=1):
            return load(world.port, context[world], itertools.repeat(polling(suite.SITE, world.token, 0)), connections, seconds)[0]

        def asks(world, connections=1):
            return load(world.port, context[world], itertools.repeat(progress[world]), connections, seconds)[0]

        def hello(server, tls, world, which, connections=1):         # answers the very same request
            asked = polling(suite.SITE, world.token, 0) if which == "calc-request" else progress[world]
            return load(server.port, tls, itertools.repeat(asked), connections, seconds)[0]

        for count, least in ((1, 1), (8, None)):
            for which, mine in (("calc-request", polls), ("calc-progress", asks)):
                for how, world, other in (("TLS", empty, bare_tls), ("plain", plain, bare)):
                    compare(figures, "%d keep-alive client%s: %s, %s / bare http.server" % (count, "s"[:count - 1], which, how), turns,
                            lambda: mine(world, count), lambda: hello(other, context[world] or None, world, which, count), least)
        compare(figures, "calc-request with {:,} calculations / with none".format(rows), turns, lambda: polls(full), lambda: polls(empty), 0.85)
        compare(figures, "calc-progress with {:,} calculations / with none".format(rows), turns, lambda: asks(full), lambda: asks(empty), 0.85)
    finally:
        for thing in (bare, bare_tls, empty, plain, full):
            thing.close()


# ---- registrations a second

def registrations(figures, folder, count, clients=8):
    """Each from its own connection, answered when it is on disk; the relay is killed (-9) at the end, and all that was answered is there."""
    names = ["site-%02d" % n for n in range(20)]
    world = suite.World(os.path.join(folder, "registrations"), commands=["hello"], sites=names, ini=SPREAD).start()
    try:
        made = [registering(names[n % 20], world.token) for n in range(count)]
        context, sync = common.client_context(world.cert), [common.fsync_time(world.state, 1) for turn in range(20)]
        rate, bodies = load(world.port, context, made, clients)
        world.relay.kill()
        answered = {json.loads(body.decode())["errors"][0]["accept_id"] for body in bodies}
        figures.least("registrations from %d clients, durable when answered" % clients, rate, "/s", 1000,
                      what="n = %d; an fsync here: %.2f ms" % (count, 1000 * median(sync)))
        db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
        there = {row[0] for row in db.execute("SELECT accept_id FROM calculations WHERE state = 'allowed'")}
        db.close()
        figures.must("registrations answered are there after kill -9", len(answered) == count and answered <= there, "%d of %d" % (len(answered & there), count))
    finally:
        world.close()


def main():
    options = common.options(__doc__, only="one part: parked, calls or registrations")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    figures = Figures(options.check)
    with Folder() as folder:
        if options.only in (None, "registrations"):
            registrations(figures, folder, 20000 if options.full else 4000)
        if options.only in (None, "calls"):
            calls(figures, folder, 9 if options.full else 3, 100000, 2.0 if options.full else 0.7)
        if options.only in (None, "parked"):
            parked(figures, folder, 2000, 100, 1000 if options.full else 300)
            if options.full:
                parked(figures, folder, 10000, 300, 1000)
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
