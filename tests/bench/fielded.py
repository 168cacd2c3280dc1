#!/usr/bin/env python3
"""The fielded ("v1") protocol on the relay: large bodies as streams, and polls beside many registered calculations.

usage: fielded.py [--check] [--full] [--only bodies|polls]       --full: 1 GiB after base64 each way, then a body of 2^31-1 bytes (4 GiB of disk)
"""
import base64
import hashlib
import http.client
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
import suite
from parts.common import Figures, Folder, load, median, request
import polls as other

MIB = 1 << 20
BLOCK = base64.b64encode(hashlib.sha512(b"x").digest() * 12288)       # 1 MiB of base64

# The reference, in a process of its own (it needs memory): json.loads and b64decode of a body of that many MiB, and the way back.
REFERENCE = """
import base64, json, resource, sys, time
block, count = sys.stdin.buffer.read(), int(sys.argv[1])
body = b'{"calc-info": {"parameter_files": {"big": ["' + block * count + b'", "a", "b"]}}}'
began = time.perf_counter()
data = base64.b64decode(json.loads(body.decode())["calc-info"]["parameter_files"]["big"][0])
read = time.perf_counter() - began
del body
began = time.perf_counter()
body = json.dumps({"big": base64.b64encode(data).decode()}).encode()
print(len(data), read, time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def calc_info():
    """A calc-info as the fielded workflow side sends it."""
    return {"command": "hello", "remote-site": suite.SITE, "parameters": "", "parameter_files": {"big": ["@", "a", "b"]},
            "result_files": {"out.txt": {"content": "", "mimetype1": "", "mimetype2": ""}}}


def in_memory(count):
    """(seconds to read, seconds to write, memory) of a body with count MiB of base64, the usual way."""
    done = subprocess.run([suite.PYTHON, "-I", "-S", "-c", REFERENCE, str(count)], input=BLOCK, stdout=subprocess.PIPE, check=True)
    size, read, write, memory = (float(word) for word in done.stdout.split())
    assert size == count * len(BLOCK) // 4 * 3
    return read, write, memory


def chunks(before, count, after):
    """A body as it goes out."""
    yield before
    for turn in range(count):
        yield BLOCK
    yield after


def send(world, name, before, count, after, length=None):
    """(seconds, errors[0]) of a long body; length: fill it up with blanks to exactly that."""
    if length is not None:
        after += b" " * (length - len(before) - count * MIB - len(after))
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/mi-distcomp-api/" + name, chunks(before, count, after), {
        "Authorization": "Bearer " + world.token, "Content-Length": str(len(before) + count * MIB + len(after))})
    answer = connection.getresponse()
    first = json.loads(answer.read().decode())["errors"][0]
    connection.close()
    return time.perf_counter() - began, first


def take(world, target, count):
    """Seconds of an answer with count MiB of base64 inside; its length must be exact, and its beginning and end right."""
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=600)
    began = time.perf_counter()
    connection.request("GET", "/mi-distcomp-api/" + target, None, {"Authorization": "Bearer " + world.token})
    answer, view, total, head, tail = connection.getresponse(), memoryview(bytearray(MIB)), 0, b"", b""
    while True:
        got = answer.readinto(view)
        if not got:
            break
        total += got
        head = head or bytes(view[:got])
        tail = (tail + bytes(view[max(0, got - 4096):got]))[-4096:]
    spent = time.perf_counter() - began
    assert total == int(answer.headers["Content-Length"]) and count * MIB < total < count * MIB + 8192
    end = tail.rindex(BLOCK[-200:]) + 200
    assert BLOCK[:40] in head and tail[end:end + 1] == b'"' and total - len(tail) + end > count * MIB
    connection.close()
    return spent


def one(world, count, length=None):
    """A calculation with count MiB of base64 each way: seconds of add-calcinfo, calc-params, send-results, get-calc-result."""
    def call(name, **fields):
        return world.client().ok("POST", name, fields)

    around = json.dumps({"calc-info": calc_info()}).encode().split(b"@")
    added, first = send(world, "add-calcinfo", around[0], count, around[1], length)
    assert first["code"] == 200, first
    me = {"accept_id": first["accept_id"], "site_id": suite.SITE}
    call("allow-wait-calc", accept_id=me["accept_id"])
    given = take(world, "calc-params?accept_id=%(accept_id)s&site_id=%(site_id)s" % me, count)
    call("calc-params-complete", **me)
    call("calc-start", **me)
    call("calc-end", result="calc end", **me)
    around = json.dumps(dict(me, result_files={"out.txt": {"content": "@", "mimetype1": "a", "mimetype2": "b"}})).encode().split(b"@")
    sent, first = send(world, "send-results", around[0], count, around[1], length)
    assert first["code"] == 200, first
    call("end-send", result="end send", **me)
    got = take(world, "get-calc-result?accept_id=" + me["accept_id"], count)
    return added, given, sent, got


def bodies(figures, folder, count, turns):
    """Large bodies each way, against the same in memory, in turn."""
    world = suite.World(os.path.join(folder, "bodies"), tls=False, commands=["hello"], ini="[times]\nkeep_fetched = 1s\n").start()
    try:
        taken, references = [], []
        for turn in range(turns):
            references.append(in_memory(count))
            taken.append(one(world, count))
        size, name = count * MIB, "%d MiB of base64: " % count
        read, write = median(found[0] for found in references), median(found[1] for found in references)
        for at, label, base in ((0, "add-calcinfo", read), (1, "calc-params", write), (2, "send-results", read), (3, "get-calc-result", write)):
            figures.least(name + label, size / median(found[at] for found in taken), "B/s", 0.5, size / base,
                          what="against %s in memory" % ("json.loads + b64decode" if base is read else "b64encode + json.dumps"))
        figures.most(name + "the relay's memory (VmHWM)", common.status(world.relay.pid, "VmHWM"), "B", 64 * MIB,
                what="in memory: %d MiB" % (references[0][2] // MIB))
    finally:
        world.close()


def largest(figures, folder):
    """A body of 2^31-1 bytes each way in; the relay's documented limit."""
    world = suite.World(os.path.join(folder, "largest"), tls=False, commands=["hello"]).start()
    try:
        taken = one(world, 2047, (1 << 31) - 1)
        figures.note("2^31-1 bytes: add-calcinfo", taken[0], "s")
        figures.note("2^31-1 bytes: send-results", taken[2], "s")
        figures.most("2^31-1 bytes: the relay's memory (VmHWM)", common.status(world.relay.pid, "VmHWM"), "B", 64 * MIB)
    finally:
        world.close()


def fill(world, rows):
    """Registered calculations straight into the database: of the site and user that is measured, and of others; none is for its poller now."""
    other.fill(world, rows)
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    db.execute("UPDATE calculations SET state = 'registered' WHERE site = ? AND user = ?", (suite.SITE, suite.USER))
    count, = db.execute("SELECT COUNT(*) FROM calculations WHERE site = ? AND user = ?", (suite.SITE, suite.USER)).fetchone()
    db.commit()
    db.close()
    return count


def many(figures, folder, rows, turns, seconds):
    """v1 polls beside that many registered calculations, against those with none; one connection each, as fielded clients do."""
    empty = suite.World(os.path.join(folder, "empty"), tls=False, commands=["hello"], ini=other.SPREAD).start()
    full = suite.World(os.path.join(folder, "full"), tls=False, commands=["hello"], ini=other.SPREAD)
    mine = fill(full, rows)
    full.start()
    try:
        def polling(world):
            """calc-requests that find nothing allowed."""
            return load(world.port, None, itertools.repeat(request("GET", "calc-request?site_id=" + suite.SITE, world.token)), 8, seconds)[0]

        other.compare(figures, "%d registered calculations (%d of this site and user): v1 polls" % (rows, mine), turns,
                      lambda: polling(full), lambda: polling(empty), 0.85)
        asks = {}
        for world in (empty, full):
            accept_id = world.client().ok("POST", "add-calcinfo", {"calc-info": dict(calc_info(), parameter_files={})})["accept_id"]
            asks[world] = request("GET", "calc-status?accept_id=" + accept_id, world.token)
        other.compare(figures, "%d registered calculations: v1 calc-status" % rows, turns,
                      lambda: load(full.port, None, itertools.repeat(asks[full]), 8, seconds)[0],
                      lambda: load(empty.port, None, itertools.repeat(asks[empty]), 8, seconds)[0], 0.85)
    finally:
        empty.close()
        full.close()


def main():
    options = common.options(__doc__, only="one part: bodies or polls")
    figures = Figures(options.check)
    with Folder() as folder:
        if options.only in (None, "polls"):
            many(figures, folder, 20000, 9 if options.full else 5, 1.0 if options.full else 0.5)
        if options.only in (None, "bodies"):
            bodies(figures, folder, 1024 if options.full else 128, 3)
            if options.full:
                largest(figures, folder)
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
