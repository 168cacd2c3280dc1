#!/usr/bin/env python3
"""The torture: relay, poller and many workflow sides as real processes, a bad network between them, death at every named fault point and
at random times, full disks, clocks that are set, a reboot of the external computer, a relay restored from a backup. Then the checker: each
calculation came to exactly one end, its command ran at most once, every result arrived byte for byte, no temporary file, lock or process is
left.

usage: torture.py [--calculations N] [--minutes M] [--seed S] [--modules K] [--only EVENTS] [--rounds N] [--keep]
Prints a summary as JSON; exit code 1 if anything was violated. Full disks and reboots need root or user namespaces (unshare)."""
import argparse
import collections
import concurrent.futures
import fcntl
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import suite
from suite import SITE

CALLS = ("add-calcinfo allow-wait-calc calc-request calc-start calc-end send-results end-send get-calc-result finish files"
         " heartbeat calc-progress output cancel-wait-calc rerun").split()
JOBS = ("add-calcinfo", "allow-wait-calc", "calc-request", "calc-start", "calc-end", "calc-end abnormal", "send-results",
        "end-send", "finish", "cancel-wait-calc", "files", "files page", "contact", "lapse", "rerun")
NOTES = ("starting", "ended", "delivered")
SCRIPTS = ("mi_dicomapi.py", "mi_system_remote.py", "mi_system_wf.py")
LATER = (69, 75)               # a module that gets one of these asks again


def named(text):
    """The fault points that are named literally in a script's text, but for those that are reached ELSEWHERE."""
    return [name for name in re.findall(r'(?<!self\.)\bfault\("([^"]+)"\)', text) if name not in ELSEWHERE]           # self.fault: of a batch job


AFTER_A_RESTORE = {"hand over", "handed over", "control gone"}             # test_restored_relay.py
AFTER_AN_UPGRADE = {"old state kept"}
AT_AN_INIT = {"relay made", "site named", "kit made", "certificate made", "enrolled"}        # test_init.py
AT_A_LONG_LOG = {"log put aside"}                      # test_audit.py
BEFORE_A_PERSON = {"copy held", "held made", "held placed", "held dropped"}                  # test_hold.py
AT_A_SIGNED_ORDER = {"order written", "order placed", "order marked", "order used"}          # test_signed.py
ELSEWHERE = AFTER_A_RESTORE | AFTER_AN_UPGRADE | AT_AN_INIT | AT_A_LONG_LOG | BEFORE_A_PERSON | AT_A_SIGNED_ORDER


def fault_points(folder):
    """{"relay": [...], "poller": [...], "workflow": [...]}: every named fault point of the scripts in folder."""
    texts = []
    for name in SCRIPTS:
        with open(os.path.join(folder, name), encoding="utf-8") as text:
            texts.append(text.read())
    return {"relay": named(texts[0]) + [name + end for name in CALLS for end in (" received", " answered")]
            + [name + end for name in JOBS for end in (" uncommitted", " committed")],
            "poller": sorted(set(named(texts[1]))) + [name + end for name in NOTES for end in (" unnoted", " noted")], "workflow": named(texts[2])}


class Proxy(suite.Listener):
    """Stands between clients and relay and does what bad networks do. rate: share of requests that something happens to."""

    def __init__(self, port, seed, rate):
        self.target, self.rate, self.random, self.counts = port, rate, random.Random(seed), collections.Counter()
        suite.Listener.__init__(self)

    def one(self, client):
        """One connection of a client: request after request."""
        client.settimeout(120)
        source = client.makefile("rb", 1 << 16)
        try:
            while self.request(client, source):
                pass
        except (OSError, ValueError):
            pass
        finally:
            source.close()
            client.close()

    @staticmethod
    def head(source):
        """(first line, head bytes, content length) of what comes; None at the end."""
        lines, length = [source.readline(65536)], 0
        while lines[-1] not in (b"", b"\r\n"):
            lines.append(source.readline(65536))
            if lines[-1].lower().startswith(b"content-length:"):
                length = int(lines[-1].split(b":")[1])
        return (lines[0], b"".join(lines), length) if lines[-1] else None

    def fate(self, line, length):
        """What happens to a request."""
        if self.random.random() > self.rate:
            return "pass"
        kinds = ["cut before", "cut within", "stall", "drop answer", "cut answer", "502"]
        if line.startswith(b"GET"):
            kinds.append("repeat")
        if b"/files/" in line and length > 65536:
            kinds += ["413", "413", "cut within"]
        kind = self.random.choice(kinds)
        self.counts[kind] += 1
        return kind

    def request(self, client, source):
        """One request. True if the connection can go on."""
        found = self.head(source)
        if found is None:
            return False
        line, head, length = found
        kind = self.fate(line, length)
        if kind == "cut before":
            return False
        if kind in ("413", "502"):
            text = b"<html><body><h1>%s</h1>a proxy in between</body></html>" % kind.encode()
            client.sendall(b"HTTP/1.1 %s Something\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                           % (kind.encode(), len(text), text))
            return False
        if kind == "stall":
            time.sleep(self.random.uniform(0.2, 3))
        for again in ("repeat", "") if kind == "repeat" else ("",):
            try:
                upstream = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                return False
            with upstream:
                upstream.settimeout(120)
                upstream.sendall(head)
                left = length // 2 if kind == "cut within" else length
                while left and not again:
                    data = source.read1(min(left, 1 << 16))
                    if not data:
                        return False
                    upstream.sendall(data)
                    left -= len(data)
                if kind == "cut within":
                    return False
                if again:
                    upstream.settimeout(0.3)
                if not self.answer(client, upstream, kind if not again else "drop answer") and not again:
                    return False
        return True

    def answer(self, client, upstream, kind):
        """Passes an answer on. False if it was not passed in full."""
        while not select.select([upstream, client], [], [], 120)[0]:
            return False
        if select.select([client], [], [], 0)[0] and not client.recv(1, socket.MSG_PEEK):
            return False                               # the client is gone: the relay is to see that
        with upstream.makefile("rb", 1 << 16) as source:
            try:
                found = self.head(source)
                if found is None or kind == "drop answer":
                    return False
                line, head, left = found
                client.sendall(head)
                most = left // 2 if kind == "cut answer" else left
                while most:
                    data = source.read1(min(most, 1 << 16))
                    if not data:
                        return False
                    client.sendall(data)
                    most -= len(data)
            except socket.timeout:
                return False
        return kind != "cut answer" and b"connection: close" not in head.lower()


WORK = """#!/bin/sh
read -r number kind <order.txt
echo "$number $MI_RUN" >>%s
echo "number $number" || exit 1
echo "complaint of $number" >&2
case $kind in
slow) sleep 1.5;;
cancel) sleep %d; exit 1;;
rerun) case $MI_RUN in *.1) exit 3;; esac;;
fail) cat in.bin in.bin >out.bin || exit 1; exit 3;;
esac
cat in.bin in.bin >out.bin || exit 1
case $kind in
links) mkdir -p d/ro && ln out.bin again.bin && ln out.bin d/ro/third.bin && ln -s ro d/l && chmod 555 d/ro || exit 1;;
locked) mkdir d && cp out.bin d/open && echo secret >d/shut && chmod 000 d/shut && mkfifo d/pipe || exit 1;;
changing) cd / && env -i PATH="$PATH" sh -c 'n=0
    while [ $n -lt 150 ]; do n=$((n+1)); printf %%04000d 0 | tr 0 $((n %% 10)) >"$1"; sleep 0.01; done' - "$CALC_DIR/res.chg" >/dev/null 2>&1 &
    sleep 0.1;;
esac
exit 0
"""
CLOCK = """
import time
def set_clock(real=time.time, stat=os.stat):
    return real() + stat(%r).st_mtime - 2e9
time.time = set_clock
"""                            # in each script's copy: its host's clock, wrong by as much as the date of a file says
JUMPS = (-6 * 3600, -1500, -20, 20, 1500, 6 * 3600)    # seconds
NAPS = {"lapse": "inputs here", "contact": "wrapper started"}             # where a poller dies and sleeps on, so that its claims lapse
EXPECTED = {"plain": (0,), "slow": (0,), "big": (0,), "many": (0,), "fail": (3,), "refused": (77,), "cancel": (1, 130, 143, 137), "rerun": (0,),
            "links": (0,), "locked": (65,), "changing": (0, 65), "two": (0,)}
ASKED = {"links": ["again.bin", "d/"], "locked": ["d/"], "changing": ["res.*"]}            # beside out.bin
DOUBLED = {"links": ["again.bin", "d/ro/third.bin", "d/l/third.bin"], "locked": ["d/open"]}                  # what else holds the same


class Host:
    """Keeps one process (relay or poller) alive, and kills it: at its next fault point, or at some moment."""

    def __init__(self, torture, name, start):
        self.torture, self.name, self.start_process = torture, name, start
        self.points = collections.deque(torture.points[name])
        torture.random.shuffle(self.points)
        self.hit, self.kills, self.process, self.held = set(), 0, None, threading.Lock()
        self.calm, self.over, self.spared = False, False, 0.0         # spared: not killed before that moment
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        rng = random.Random("%s %s" % (self.name, self.torture.seed))
        while not self.over:
            with self.held:                            # restore and reboot hold it
                point = self.points[0] if self.points and not self.calm and self.torture.deadly and time.monotonic() > self.spared else ""
                patience = 9 if point.split(" ")[0] in NAPS else rng.uniform(1, 2.5) if point else rng.uniform(2, 8)
                nap = self.torture.nap if self.name == "poller" and self.torture.deadly else ""
                if self.name == "relay":
                    self.torture.nap = point.split(" ")[0] if point.split(" ")[0] in NAPS else ""
                point = NAPS.get(nap, point)
                self.process = self.start_process(suite.clean_env(MI_FAULT=point) if point else suite.clean_env())
                until = max(time.monotonic() + patience, self.spared)
                while self.process.alive() and not self.over and (time.monotonic() < until or self.calm or not self.torture.deadly):
                    time.sleep(0.02)
                    if self.torture.wants or self.name == "poller" and self.torture.deadly and self.torture.nap and not nap:
                        break
                died = not self.process.alive()
                if not self.over or died:
                    self.note(point, died)
            if not self.over and not self.torture.wants and (nap or self.name == "poller" and rng.random() < 0.1) and not self.calm:
                time.sleep(3.2)                        # long enough for its claims to lapse
            while self.torture.wants and not self.over:
                time.sleep(0.02)

    def note(self, point, died):
        """The process has died at its fault point, or is killed now."""
        if died and self.process.popen.returncode != -signal.SIGKILL:
            self.torture.violation("%s ended with %s: %s" % (self.name, self.process.popen.returncode, self.process.text()[-600:]))
        if died and point:
            self.hit.add(point)
            if point in self.points:
                self.points.remove(point)
        elif self.points and not died:
            self.points.rotate(-1)
        self.kills += 1
        self.process.kill()


class Torture:
    """Everything of one run."""

    def __init__(self, options, folder):
        self.options, self.seed, self.random, self.folder = options, options.seed, random.Random(options.seed), folder
        self.violations, self.outcomes, self.lock, self.counts = [], {}, threading.Lock(), collections.Counter()
        self.deadly, self.wants, self.nap, self.todo = True, "", "", collections.deque()
        self.began = time.monotonic()
        suite.ROOT = os.path.join(folder, "scripts")
        os.mkdir(suite.ROOT)
        for name in SCRIPTS:
            with open(os.path.join(suite.HERE, "..", name), encoding="utf-8") as text:
                found = text.read()
            for old, new in (("\nDISK_PAUSE = 30 ", "\nDISK_PAUSE = 1 "),              # impatient, or an hour would not do
                             ("\nORPHAN_GRACE = 10 ", "\nORPHAN_GRACE = 2 "),           # less than a poller lives here
                             ("        self.most = most\n        self.now = 1.0\n", "        self.most = min(most, 2)\n        self.now = 0.25\n")):
                found = found.replace(old, new)
            clock = os.path.join(folder, "clock of " + name)
            open(clock, "w").close()
            os.utime(clock, (2e9, 2e9))
            found = found.replace("\nimport time\n", CLOCK % clock, 1)
            with open(os.path.join(suite.ROOT, name), "w", encoding="utf-8") as out:
                out.write(found)
        self.points = fault_points(suite.ROOT)
        self.flows, self.flow_hit = collections.deque(self.points["workflow"]), set()

    def violation(self, text):
        with self.lock:
            self.violations.append(text)
        sys.stderr.write("VIOLATION: %s\n" % text)

    def trace(self, name):
        """What a control directory tells."""
        found = {}
        for part in ("journal", "carrier", "start", "child", "end", "end.tmp", "stderr"):
            try:
                with open(os.path.join(self.folder, "poller", "base", ".mi", name, part), errors="replace") as text:
                    found[part] = text.read().rstrip()[-1500:]
            except OSError as error:
                found[part] = error.strerror
        found["processes"] = subprocess.run("ps -eo pid,ppid,stat,etimes,args | grep -e %s | grep -v grep" % name, shell=True, stdout=subprocess.PIPE).stdout.decode()
        return found

    # -- the machines

    def build(self):
        """State and working directories (on small disks of their own, where that is possible), relay, proxies, poller."""
        self.ledger = os.path.join(self.folder, "ledger")
        open(self.ledger, "w").close()
        self.disks = {}
        for name in ("state", os.path.join("poller", "base")) if self.options.namespace else ():
            path = os.path.join(self.folder, name)
            os.makedirs(path, 0o700)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m,mode=700", "torture", path], check=True)
            self.disks[name] = path
        if self.options.namespace:
            self.boot = os.path.join(self.folder, "boot_id")
            self.new_boot()
            subprocess.run(["mount", "--bind", self.boot, "/proc/sys/kernel/random/boot_id"], check=True)
        self.world = suite.World(self.folder, tls=False, commands=["work", "unlisted"], ini=(
            "[times]\naccept_lease = 1s\nlease = 2s\nrestore_grace = 4s\n[limits]\nspool_free = 0\n[u-test]\nmax_waiting = 0\n"))
        self.world.start()
        self.world.relay.kill()
        rate = self.options.rate
        self.near, self.far = Proxy(self.world.port, self.seed + 1, rate), Proxy(self.world.port, self.seed + 2, rate)
        script = os.path.join(self.folder, "work.sh")
        with open(script, "w") as out:
            out.write(WORK % (self.ledger, 20 if "restore" in self.options.only else 300))          # a restored relay has forgotten a cancel
        os.chmod(script, 0o755)
        self.plain = os.path.join(self.folder, "plain-python")                # to whom mode 000 means something, also as root
        with open(self.plain, "w") as out:
            out.write('#!/bin/sh\nexec setpriv --inh-caps=-all --bounding-set=-all "%s" "$@"\n' % suite.PYTHON if os.geteuid() == 0
                      else '#!/bin/sh\nexec "%s" "$@"\n' % suite.PYTHON)
        os.chmod(self.plain, 0o755)
        self.world.url = self.far.url
        self.poller_ini = self.world.poller({"work": "match = work\nargv = %s\ngrace = 1s\n" % script}, start=False, ini="jobs = 8\nkeep_free = 20M\nkeep_workdirs = 60s\n")[1]
        self.world.url = self.near.url
        self.reach = self.world.reach()
        self.relay = Host(self, "relay", self.start_relay)
        self.poller = Host(self, "poller", self.start_poller)
        for host in (self.relay, self.poller):
            host.thread.start()

    def new_boot(self):
        with open(self.boot, "w") as out:
            out.write("%032x\n" % random.getrandbits(128))

    def start_relay(self, env):
        process = suite.Process("mi_dicomapi.py", ["serve", "--ini", self.world.ini], self.folder, env=env)
        while process.alive():
            try:
                socket.create_connection(("127.0.0.1", self.world.port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        return process

    def start_poller(self, env):
        return suite.Process("mi_system_remote.py", ["poll", "--ini", self.poller_ini], os.path.dirname(self.poller_ini), env=env, python=self.plain)

    # -- what happens to them

    def hold(self, name, work):
        """work() while that host's process is dead and stays so."""
        host = getattr(self, name)
        self.wants = name
        try:
            with host.held:
                host.process.kill()
                work()
        finally:
            self.wants = ""

    def reboot(self):
        """The external computer goes down with all its processes and comes up with another boot id."""
        def work():
            for turn in range(10):                     # one that is in exec shows no environment for a moment
                for pid in self.of_the_run():
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except OSError:
                        pass
                time.sleep(0.03)
            self.new_boot()
        self.hold("poller", work)

    def backup(self):
        done = suite.run("mi_dicomapi.py", "backup", os.path.join(self.folder, "backup"), "--ini", self.world.ini)
        if done.returncode:
            self.violation("backup: " + done.stderr)

    def restore(self):
        """The relay's state is lost, and an older one is put in its place."""
        def work():
            for name in os.listdir(self.world.state):
                path = os.path.join(self.world.state, name)
                try:
                    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
                except FileNotFoundError:
                    pass
            done = suite.run("mi_dicomapi.py", "restore", os.path.join(self.folder, "backup"), "--ini", self.world.ini)
            if done.returncode:
                self.violation("restore: " + done.stderr)
            self.relay.spared = time.monotonic() + 6   # its grace begins anew at each start
        self.hold("relay", work)

    def fill(self, name):
        """That disk is full for a moment."""
        path = os.path.join(self.disks[name], "filler")
        try:
            with open(path, "wb", buffering=0) as out:
                while True:
                    out.write(bytes(1 << 20))
        except OSError:
            pass
        time.sleep(2)
        os.unlink(path)

    def shoot(self):
        """A wrapper or a command dies."""
        found = self.of_the_run()
        if found:
            try:
                os.kill(self.random.choice(found), signal.SIGKILL)
            except OSError:
                pass

    def jump(self):
        """The clock of one host is set, forwards or backwards."""
        clock, by = os.path.join(self.folder, "clock of " + self.random.choice(SCRIPTS)), self.random.choice(JUMPS)
        os.utime(clock, (2e9, os.stat(clock).st_mtime + by))
        sys.stderr.write("       %s: %+d s\n" % (clock, by))

    def of_the_run(self):
        """The pids of wrappers and commands."""
        mark, found = os.path.join(self.folder, "poller", "base", ".mi").encode(), []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                with open("/proc/%d/environ" % pid, "rb") as text:
                    env = text.read()
                with open("/proc/%d/cmdline" % pid, "rb") as text:
                    if b"\0MI_RUN=" in b"\0" + env and mark.rpartition(b"/")[0] in env or mark in text.read():
                        found.append(pid)
            except OSError:
                pass
        return found

    def events(self):
        """The thread that lets things happen, one after the other, in the order of --only."""
        known = {"reboot": self.reboot, "backup": self.backup, "restore": self.restore, "shoot": self.shoot, "clock": self.jump,
                 "full relay": lambda: self.fill("state"), "full poller": lambda: self.fill(os.path.join("poller", "base"))}
        plan = [word for word in self.options.only.split(",") if word] * self.options.rounds
        for number, word in enumerate(plan):
            share = (number + 1) / (len(plan) + 1)
            while not self.over and self.progress() < share:
                time.sleep(0.1)
            if self.over or word not in ("backup", "restore", "shoot", "clock") and not self.options.namespace:
                continue
            self.counts[word] += 1
            sys.stderr.write("%4d s: %s\n" % (time.monotonic() - self.began, word))
            try:
                known[word]()
            except Exception as error:
                self.violation("%s: %s: %s" % (word, type(error).__name__, error))

    def progress(self):
        """How far the run is, 0 to 1."""
        return max(len(self.outcomes) / self.options.calculations, (time.monotonic() - self.began) / (60 * self.options.minutes))

    # -- the modules

    def module(self):
        """A thread: one calculation after the other."""
        while True:
            with self.lock:
                if not self.todo or time.monotonic() - self.began > 60 * self.options.minutes:
                    return
                number, kind = self.todo.popleft()
            try:
                self.calculate(number, kind)
            except Exception as error:
                self.violation("%d %s: %s: %s" % (number, kind, type(error).__name__, error))

    def workflow(self, number, words, rng, deadly=True):
        """One workflow side, killed and started again until it ends by itself: (exit code, its output)."""
        until = time.monotonic() + self.options.patience
        folder = os.path.join(self.folder, "wf", "%d" % number)
        while True:
            point = ""
            with self.lock:
                if deadly and self.deadly and rng.random() < 0.3:
                    point = self.flows[0]
                    self.flows.rotate(-1)
            env = suite.clean_env(MI_FAULT=point) if point else suite.clean_env()
            with tempfile.TemporaryFile() as out:
                program = suite.started_as([suite.PYTHON, "-I", "-S", suite.script("mi_system_wf.py")], env)
                process = subprocess.Popen(program + words + self.reach, cwd=folder, env=env,
                                           stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
                limit = rng.uniform(0.2, 3) if deadly and self.deadly and rng.random() < 0.1 else max(1, until - time.monotonic())
                try:
                    code = process.wait(limit)
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = process.wait()
                out.seek(0)
                text = out.read().decode("utf-8", "replace")
            self.counts["workflow sides"] += 1
            if code == -signal.SIGKILL and point and limit > 5:
                self.flow_hit.add(point)
            if time.monotonic() > until:
                raise AssertionError("stuck, after %d s: %s" % (self.options.patience, text[-500:]))
            if "Traceback" in text or code == 70:
                self.violation("%d: %s" % (number, text))
            restored = self.counts["restore"] and (code == 64 and "knows no such calculation" in text or code == 66 and "lacks inputs" in text
                                                   or words[0] == "status" and "inputs are not complete" in text)
            if code not in LATER + (-signal.SIGKILL,) and not restored or code == 69 and self.lost(number):
                return code, text
            if restored and words[0] not in ("run", "submit"):
                return None, text
            time.sleep(0.2)

    def lost(self, number):
        """The reason, if the calculation ended for one that only a reboot or a killed wrapper explains."""
        if self.wants == "relay":
            return ""                                  # its database is being replaced
        try:
            found = self.world.rows("SELECT reason FROM calculations WHERE request_id = ? AND state IN ('got', 'finished')", "r%d" % number)
        except Exception:                              # too busy
            return ""
        reason = found[0]["reason"] if found else ""
        return reason if (reason == "the host was restarted" and self.counts["reboot"] or reason in ("end unknown", "could not be started")
                          and self.counts["shoot"] + self.counts["reboot"]) else ""

    def calculate(self, number, kind):
        """One calculation, from its inputs to its end."""
        rng = random.Random("%d %d" % (self.seed, number))
        folder = os.path.join(self.folder, "wf", "%d" % number)
        os.makedirs(os.path.join(folder, "many"))
        data = bytes(rng.getrandbits(8) for byte in range(rng.randrange(300))) * {"big": 20000, "two": 6000}.get(kind, rng.choice((1, 7, 400)))       # some travel along with their names
        with open(os.path.join(folder, "in.bin"), "wb") as out:
            out.write(data)
        with open(os.path.join(folder, "order.txt"), "w") as out:
            out.write("%d %s\n" % (number, kind))
        for n in range(2100 if kind == "many" else 0):
            open(os.path.join(folder, "many", "%d" % n), "w").close()
        words = [SITE, "unlisted" if kind == "refused" else "work", "--in", "in.bin", "order.txt"] + (["many/"] if kind == "many" else []) + [
            "--out", "out.bin"] + ASKED.get(kind, []) + ["--request-id", "r%d" % number]
        if kind == "two":
            code, text = self.by_two(number, words, rng)
        elif kind in ("cancel", "rerun"):
            code, text = self.by_steps(number, kind, words, rng)
        else:
            code, text = self.workflow(number, ["run"] + words + ["--to", "to"], rng)
        with self.lock:
            self.outcomes[number] = code
        lost = self.lost(number)
        bad_luck = (code == 137 and self.counts["shoot"] or code in (1, 2) and self.counts["full poller"]
                    or kind == "rerun" and code == 3 and self.counts["restore"])              # the rerun was forgotten
        if code not in EXPECTED[kind] and not (code in (69, 77) and lost) and not bad_luck:
            self.violation("%d %s ended with %s: %s" % (number, kind, code, text[-700:]))
        elif code == 0 or code in EXPECTED[kind] and kind in ("fail", "locked", "changing"):
            for name in ["out.bin"] + DOUBLED.get(kind, []):
                self.compare(number, os.path.join(folder, "to", name), lambda have: have == data + data)
            if kind == "changing" and (code == 0 or os.path.exists(os.path.join(folder, "to", "res.chg"))):
                self.compare(number, os.path.join(folder, "to", "res.chg"), lambda have: have == have[:1] * len(have))
            if kind == "locked" and not ("unreadable" in text and "d/shut" in text):
                self.violation("%d: the unreadable result is not named: %s" % (number, text[-500:]))
            with open(os.path.join(os.fsencode(folder), b"to", suite.LOGS[0].encode()), "rb") as have:
                if have.read() != b"number %d\n" % number:
                    self.violation("%d: the log differs" % number)
        left = [name for name in os.listdir(os.path.join(folder, "to")) if name.startswith(".mi")] if os.path.isdir(os.path.join(folder, "to")) else []
        if left and not self.counts["restore"]:        # then it may have got another id
            self.violation("%d: temporary files: %s" % (number, left))
        elif not self.violations:
            shutil.rmtree(folder)

    def compare(self, number, path, good):
        """A result is there and as it should be."""
        try:
            with open(path, "rb") as have:
                if good(have.read()):
                    return
            self.violation("%d: %s differs" % (number, os.path.basename(path)))
        except OSError as error:
            self.violation("%d: %s" % (number, error))

    def by_two(self, number, words, rng):
        """submit, then two that wait for it and fetch it into the same directory: the worse (exit code, output)."""
        code, text = self.workflow(number, ["submit"] + words + ["--json"], rng)
        if code:
            return code, text
        accept_id = json.loads(next(line for line in text.splitlines() if line.startswith("{")))["accept_id"]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            seeds = [random.Random(rng.random()) for one in range(2)]
            ended = list(pool.map(lambda one: self.workflow(number, ["wait", accept_id, "--to", "to"], one), seeds))
        return max(ended, key=lambda one: (one[0] is not None, one[0] or 0))

    def by_steps(self, number, kind, words, rng):
        """submit, cancel or rerun, wait: (exit code, output)."""
        while True:
            code, text = self.workflow(number, ["submit"] + words + ["--json"], rng)
            if code:
                return code, text
            accept_id = json.loads(next(line for line in text.splitlines() if line.startswith("{")))["accept_id"]
            time.sleep(rng.uniform(0, 1.5))
            if kind == "cancel":
                code, text = self.workflow(number, ["cancel", accept_id], rng)
            else:
                until = time.monotonic() + self.options.patience
                while code == 0 and "got return" not in text:
                    assert time.monotonic() < until, "%s does not end: %s" % (accept_id, text[-500:])
                    code, text = self.workflow(number, ["status", accept_id, "--json"], rng)
                    time.sleep(0.3)
                if code == 0:
                    code, text = self.workflow(number, ["rerun", accept_id], rng)
            if code is not None:
                code, text = self.workflow(number, ["wait", accept_id, "--to", "to"], rng)
            if code is not None or not self.counts["restore"]:              # None: a restored relay has forgotten the calculation
                return code, text

    # -- the end

    def run(self):
        """The whole run; the summary."""
        self.over = False
        self.build()
        kinds = ["plain"] * 32 + ["slow"] * 4 + ["big", "fail", "refused", "cancel", "rerun"] * 4 + ["many"] * 2 + ["links", "locked", "changing", "two"] * 3
        kinds *= self.options.calculations // len(kinds) + 1
        kinds = kinds[:self.options.calculations]
        self.random.shuffle(kinds)
        self.todo.extend(enumerate(kinds))
        self.kinds = kinds
        modules = [threading.Thread(target=self.module, daemon=True) for k in range(self.options.modules)]
        events = threading.Thread(target=self.events, daemon=True)
        for thread in modules + [events]:
            thread.start()
        for thread in modules:
            thread.join(max(0.0, self.began + 60 * self.options.minutes + 5 - time.monotonic()))
        self.deadly = False                            # who is silent for a lease is missed only if nobody dies meanwhile
        for thread in modules:
            thread.join()
        self.deadly = True
        busy = time.monotonic() - self.began
        self.over = True
        events.join(60)
        self.more_points()
        self.calm_down()
        self.check()
        found = {"seed": self.seed, "calculations": len(self.outcomes), "seconds": round(busy), "violations": self.violations,
                 "kills": {"relay": self.relay.kills, "poller": self.poller.kills}, "network": dict(self.near.counts + self.far.counts),
                 "events": {key: value for key, value in self.counts.items()}, "namespace": self.options.namespace,
                 "points hit": {"relay": len(self.relay.hit), "poller": len(self.poller.hit), "workflow": len(self.flow_hit)},
                 "points missed": {name: sorted(set(self.points[name]) - hit) for name, hit in (
                     ("relay", self.relay.hit), ("poller", self.poller.hit), ("workflow", self.flow_hit))}}
        return found

    def more_points(self):
        """More calculations while there are fault points that nobody has died at, and time."""
        rng, number = random.Random(self.seed), self.options.calculations
        until = self.began + 60 * self.options.minutes + self.options.extra
        while self.options.all_points and time.monotonic() < until and (
                self.relay.points or self.poller.points or set(self.points["workflow"]) - self.flow_hit):
            self.options.calculations = number + 12
            batch = []
            for n in range(12):
                left = " ".join(self.relay.points)
                kind = rng.choice(["plain", "slow"] + [kind for kind, word in (
                    ("rerun", "rerun"), ("cancel", "cancel"), ("refused", "abnormal"), ("big", "piece"), ("many", "page")) if word in left] * 2)
                self.kinds.append(kind)
                batch.append(threading.Thread(target=self.calculate, args=(number + n, kind), daemon=True))
            number += 12
            for thread in batch:
                thread.start()
            for thread in batch:
                thread.join()

    def calm_down(self):
        """Nothing bad happens any more: what is under way comes to its end, then everything stops."""
        self.deadly, self.near.rate, self.far.rate = False, 0, 0
        for host in (self.relay, self.poller):
            host.calm = True
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                done = suite.run("mi_system_remote.py", "list", "--json", "--ini", self.poller_ini)
                known = {row["accept_id"] for row in self.world.rows("SELECT accept_id FROM calculations")}
                busy = [row for row in json.loads(done.stdout) if row["state"] not in ("delivered", "kept")
                        and (row["id"].split(".")[0] in known or not self.counts["restore"])]
            except (ValueError, subprocess.SubprocessError):
                busy = [done.stderr]
            if not busy and self.poller.process.alive() and self.relay.process.alive():
                break
            time.sleep(0.3)
        else:
            self.violation("the poller still holds %s: %s" % (busy, [self.trace(row["id"]) for row in busy if isinstance(row, dict)]))
        for host in (self.poller, self.relay):
            host.over = True
            host.thread.join(15)
            code = host.process.stop()
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM):        # SIGTERM: it had only just begun
                self.violation("%s: exit code %s after SIGTERM: %s" % (host.name, code, host.process.text()[-500:]))
        self.near.close()
        self.far.close()
        for pid in self.of_the_run() if self.counts["restore"] else ():
            os.kill(pid, signal.SIGKILL)

    def check(self):
        """The promises."""
        restored = self.counts["restore"]
        runs = collections.Counter()
        with open(self.ledger) as text:
            for line in text:
                number, run = line.split()
                runs[run] += 1
                runs[int(number)] += 1
        for run, count in runs.items():
            most = 1 if isinstance(run, str) else (2 if self.kinds[run] == "rerun" else 1) * (2 if restored else 1)      # registered anew
            if count > most:
                self.violation("%s ran %d times" % (run, count))
        for number, code in self.outcomes.items():
            if code == 0 and not runs[number]:
                self.violation("%d succeeded without having run" % number)
            if self.kinds[number] == "refused" and runs[number]:
                self.violation("%d was refused and ran" % number)
        attempts = collections.Counter(run.split(".")[0] for run in runs if isinstance(run, str))
        rows = self.world.rows("SELECT * FROM calculations")
        for row in rows:
            if not re.match(r"r\d+$", row["request_id"]):
                self.violation("%s was registered by nobody (as a fielded one?): %s" % (row["accept_id"], row["request_id"]))
                continue
            number = int(row["request_id"][1:])
            if row["state"] not in ("finished", "got") and not restored:
                self.violation("%s (%d) is %s at the end" % (row["accept_id"], number, row["state"]))
            if number in self.outcomes and row["state"] in ("finished", "got") and self.outcomes[number] == 0 and row["status"] != "completed" and not restored:
                self.violation("%d: success there, %s here" % (number, row["status"]))
            if attempts[row["accept_id"]] > (2 + bool(restored) if self.kinds[number] == "rerun" else 1):
                self.violation("%s ran in %d attempts" % (row["accept_id"], attempts[row["accept_id"]]))
        if not restored and len({row["request_id"] for row in rows}) != len(rows):
            self.violation("one request, two calculations")
        self.check_ends()
        self.check_leftovers(rows)

    def check_ends(self):
        """Each calculation came to its end once: as the relay's log has it."""
        ends, twice = collections.Counter(), {"r%d" % number for number, kind in enumerate(self.kinds) if kind == "rerun"}
        rerun = {row["accept_id"] for row in self.world.rows("SELECT accept_id, request_id FROM calculations") if row["request_id"] in twice}
        with open(os.path.join(self.folder, "mi_dicomapi.py.out"), encoding="utf-8") as text:
            for line in text:
                found = re.search(r" ([0-9a-f-]{36}) (?:8 end-send|8 lost|2 cancel-wait-calc|3 cancelled) site=", line)       # (who cancelled: by=)
                if found and not self.counts["restore"]:
                    ends[found.group(1)] += 1
                if "bug=" in line or "Traceback" in line:
                    self.violation("relay: " + line)
        for accept_id, count in ends.items():
            if count > (2 if accept_id in rerun else 1):
                self.violation("%s came to its end %d times" % (accept_id, count))

    def check_leftovers(self, rows):
        """No temporary file, lock or process is left."""
        ids = {row["accept_id"] for row in rows}
        noted = {tuple(row.values()) for row in self.world.rows("SELECT DISTINCT accept_id, CASE kind WHEN 'input' THEN 'in' ELSE 'out' END, blob"
                                                                " FROM files JOIN calculations ON calc = seq")}
        for above, folders, names in os.walk(os.path.join(self.world.state, "spool")):
            for name in names:
                place = tuple(os.path.join(above, name).split(os.sep)[-3:])
                if name.endswith(".part") or not ids & set(above.split(os.sep)) or (
                        place[1] in ("in", "out") and place not in noted and not self.counts["restore"]):
                    self.violation("spool: %s" % os.path.join(above, name))
            for name in folders:
                if re.match(r"out\.[0-9a-f]{8}$", name):
                    self.violation("spool: %s" % os.path.join(above, name))
        base = os.path.join(self.folder, "poller", "base")
        for name in sorted(os.listdir(os.path.join(base, ".mi"))):
            path = os.path.join(base, ".mi", name)
            if not os.path.isdir(path) or name == "spare":
                continue
            left = set(os.listdir(path)) & {"take", "run", "ready", "alive", "end.tmp"} | {n for n in os.listdir(path) if n.startswith("part")}
            with open(os.path.join(path, "carrier")) as text:
                if left and '"kept"' not in text.read() and (name.split(".")[0] in ids or not self.counts["restore"]):
                    self.violation("poller: %s: %s" % (name, sorted(left)))
        for path, lock in ((os.path.join(self.world.state, "lock"), fcntl.flock), (os.path.join(base, ".mi", "lock"), fcntl.lockf)):
            with open(path, "a") as held:
                try:
                    lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    self.violation("%s is still held" % path)
        time.sleep(0.5)
        for pid in self.of_the_run() if not self.counts["restore"] else ():      # a restored relay may have forgotten what runs
            with open("/proc/%d/cmdline" % pid, "rb") as text:
                self.violation("process %d is left: %s" % (pid, text.read().replace(b"\0", b" ").decode("utf-8", "replace")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calculations", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--extra", type=float, default=60, help="seconds more for fault points that were not reached")
    parser.add_argument("--all-points", action="store_true", help="go on until every fault point was reached")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--modules", type=int, default=24, help="workflow sides at once")
    parser.add_argument("--rate", type=float, default=0.08, help="share of the requests that the network spoils")
    parser.add_argument("--patience", type=float, default=150, help="seconds after which a calculation counts as stuck")
    parser.add_argument("--only", default="clock,full relay,clock,full poller,shoot,clock,reboot,clock,shoot,clock", help="what happens, in this order (backup,restore,...)")
    parser.add_argument("--rounds", type=int, default=1, help="how often all that happens")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    options.namespace = os.environ.get("MI_TORTURE_NAMESPACE") == "yes"
    if not options.namespace and "MI_TORTURE_NAMESPACE" not in os.environ:
        for words in (["unshare", "-m"], ["unshare", "-rm"]):
            if shutil.which("unshare") and subprocess.run(words + ["mount", "-t", "tmpfs", "t", "/mnt"], stderr=subprocess.DEVNULL).returncode == 0:
                os.environ["MI_TORTURE_NAMESPACE"] = "yes"
                os.execvp("unshare", words + [sys.executable] + sys.argv)
    folder = tempfile.mkdtemp(prefix="mi-torture-")
    found = None
    try:
        found = Torture(options, folder).run()
    finally:
        for name in ("state", "poller/base") if options.namespace and not options.keep and not (found and found["violations"]) else ():
            subprocess.run(["umount", "-l", os.path.join(folder, name)], stderr=subprocess.DEVNULL)
        if found and not found["violations"] and not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            sys.stderr.write("kept: %s\n" % folder)
    print(json.dumps(found, indent=1))
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
