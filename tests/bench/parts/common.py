"""What the benches share: figures with their references, bare TLS peers, a load of many connections from one process.

A reference is measured in the same run as the figure it belongs to: absolute figures drift up to 3 times on a shared machine, ratios hold."""
import argparse
import os
import re
import selectors
import shutil
import socket
import ssl
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import suite          # noqa: F401  (the benches that import this find it so)

CHUNK = 256 << 10              # bytes of one read or write of the references
SLACK = 3.0                    # --check: how many times worse than its threshold a figure may be (CI machines are small and shared)


class Figures:
    """The figures of a run: printed as they come, one line each."""

    def __init__(self, check):
        self.check, self.failed, self.slow = check, [], []
        print("%-58s %12s %12s %8s %12s" % ("figure", "measured", "reference", "ratio", "threshold"), flush=True)

    def note(self, name, value, unit, reference=None, what=""):
        """A figure without a threshold."""
        ratio = "" if reference is None else "%.2f" % (value / reference)
        self.line(name, value, unit, reference, ratio, "", "-", what)

    def most(self, name, value, unit, threshold, reference=None, what=""):
        """A figure that should be at most threshold (times reference, where there is one)."""
        limit = threshold * (1 if reference is None else reference)
        self.judge(name, value, unit, reference, threshold, "<=", value / limit if limit else float(value > 0) * 1e9, what)

    def least(self, name, value, unit, threshold, reference=None, what=""):
        """A figure that should be at least threshold (times reference, where there is one)."""
        limit = threshold * (1 if reference is None else reference)
        self.judge(name, value, unit, reference, threshold, ">=", limit / value if value else 1e9, what)

    def must(self, name, true, what=""):
        """Something that has to be so, without slack."""
        print("%-58s %s  %s" % (name, "ok" if true else "WRONG", what), flush=True)
        if not true:
            self.failed.append(name)

    def judge(self, name, value, unit, reference, threshold, sign, worse, what):
        """ok, or SLOW and by how much."""
        verdict = "ok" if worse <= 1.0 else "SLOW (%.2f x)" % worse
        if worse > 1.0:
            self.slow.append(name)
        if worse > SLACK:
            self.failed.append(name)
        ratio = "" if reference is None else "%.2f" % (value / reference)
        self.line(name, value, unit, reference, ratio, "%s %s" % (sign, shape(threshold, unit) if reference is None else "%g" % threshold), verdict, what)

    def line(self, name, value, unit, reference, ratio, threshold, verdict, what):
        """One line."""
        shown = "" if reference is None else shape(reference, unit)
        print("%-58s %12s %12s %8s %12s  %s%s" % (name, shape(value, unit), shown, ratio, threshold, verdict, what and "   " + what), flush=True)

    def end(self):
        """The exit code: 1 if --check and something is worse than its slack allows."""
        print("%d slow, %d beyond the slack of %g x%s" % (len(self.slow), len(self.failed), SLACK, "".join("\n  " + name for name in self.failed)), flush=True)
        return 1 if self.check and self.failed else 0


def shape(value, unit):
    """A value for people."""
    if unit == "s":
        if value < 0.001:
            return "%.0f us" % (value * 1e6)
        return "%.1f ms" % (value * 1000) if value < 1 else "%.2f s" % value
    if unit == "B":
        return "%.1f MiB" % (value / (1 << 20))
    if unit == "B/s":
        return "%.0f MB/s" % (value / 1e6)
    return ("%.2f%s" if unit == "%" else "%.0f %s" if value >= 10 else "%.2f %s") % (value, unit)


def options(doc, **more):
    """The command line of a bench; more: name=(help text) of further switches."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure is worse than its threshold by more than %g times" % SLACK)
    parser.add_argument("--full", action="store_true", help="the sizes of the specification, and larger ones (minutes)")
    for name, text in more.items():
        parser.add_argument("--" + name, help=text)
    return parser.parse_args()


def median(values):
    return statistics.median(values)


def rank(values, share):
    """The value below which `share` of them are (0.99: p99)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Folder:
    """A directory that goes away, on the disk that TMPDIR says."""

    def __enter__(self):
        self.path = tempfile.mkdtemp(prefix="mi-bench-")
        return self.path

    def __exit__(self, *error):
        shutil.rmtree(self.path, ignore_errors=True)


def fsync_time(folder, count=5):
    """Seconds for that many fsyncs, one after the other, each after 4 KiB more in a file there."""
    path = os.path.join(folder, "fsync")
    with open(path, "ab", buffering=0) as out:
        began = time.perf_counter()
        for turn in range(count):
            out.write(b"x" * 4096)
            os.fsync(out.fileno())
        return time.perf_counter() - began


def status(pid, key):
    """A number of /proc/PID/status; kB become bytes."""
    with open("/proc/%d/status" % pid) as text:
        found = re.search(r"^%s:\s+(\d+)( kB)?" % key, text.read(), re.M)
    return int(found.group(1)) * (1024 if found.group(2) else 1)


def cpu(pid):
    """Seconds of a core that a process has used."""
    with open("/proc/%d/stat" % pid) as text:
        words = text.read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of_threads(pid):
    """The same to the nanosecond, of the threads that are there."""
    spent = 0
    for thread in os.listdir("/proc/%d/task" % pid):
        with open("/proc/%d/task/%s/schedstat" % (pid, thread)) as text:
            spent += int(text.read().split()[0])
    return spent / 1e9


# ---- bare peers: no http.client, so that the load costs little beside what it measures

def client_context(cert):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cert)
    return context


def server_context(cert, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def request(method, target, token="", body=b""):
    """A request as bytes."""
    head = "%s /mi-distcomp-api/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % (method, target, len(body))
    if token:
        head += "Authorization: Bearer %s\r\n" % token
    return (head + "Content-Type: application/json\r\n\r\n").encode() + body


class Wire:
    """One bare connection: send() a request, answer() its (status, body) or None while it is not complete."""

    def __init__(self, port, context=None, timeout=30):
        sock = socket.create_connection(("127.0.0.1", port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = context.wrap_socket(sock, server_hostname="localhost") if context else sock
        self.buffer, self.tag = b"", None

    def send(self, data):
        self.sock.sendall(data)

    def take(self):
        """Reads what is there (or waits, on a blocking socket). False at the end of the connection."""
        try:
            data = self.sock.recv(65536)
        except (ssl.SSLWantReadError, BlockingIOError):
            return True
        self.buffer += data
        return bool(data)

    def answer(self):
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15:head.find(b"\r\n", at) if head.find(b"\r\n", at) > 0 else None])
        if len(self.buffer) < end + 4 + length:
            return None
        found = int(head[9:12]), self.buffer[end + 4:end + 4 + length]
        self.buffer = self.buffer[end + 4 + length:]
        return found

    def call(self, data):
        """Sends and waits: (status, body)."""
        self.send(data)
        while True:
            found = self.answer()
            if found:
                return found
            if not self.take():
                raise ConnectionError("closed by the other end")

    def close(self):
        self.sock.close()


def load(port, context, requests, connections, seconds=None, good=(200,)):
    """Calls per second of that many keep-alive connections, each with one request in flight. requests: an iterator of bytes.
    Ends after `seconds`, or when requests is exhausted. Returns (calls/s, bodies of the last answers)."""
    requests = iter(requests)
    wires = [Wire(port, context) for turn in range(connections)]
    poll = selectors.DefaultSelector()
    for wire in wires:                                 # all are connected and known before the clock starts
        wire.sock.settimeout(0)
        poll.register(wire.sock, selectors.EVENT_READ, wire)
    count, flying, bodies = 0, 0, []
    began = time.perf_counter()
    until = None if seconds is None else began + seconds
    for wire in wires:
        data = next(requests, None)
        if data is not None:
            wire.send(data)
            flying += 1
    while flying:
        for key, events in poll.select(10):
            wire = key.data
            if not wire.take():
                raise ConnectionError("closed by the other end")
            found = wire.answer()
            if not found:
                continue
            assert found[0] in good, found
            count, flying = count + 1, flying - 1
            bodies.append(found[1])
            data = next(requests, None) if until is None or time.perf_counter() < until else None
            if data is not None:
                wire.send(data)
                flying += 1
    spent = time.perf_counter() - began
    for wire in wires:
        wire.close()
    return count / spent, bodies
