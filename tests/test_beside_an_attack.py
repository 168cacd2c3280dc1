"""What a token holder can do to others. An honest client stands beside each attack: it is answered as ever, and disk and memory stay flat."""
import base64
import hashlib
import json
import os
import re
import socket
import sqlite3
import threading
import time

import pytest
import suite
from fielded_peer import Peer, calc_info
from suite import SITE, USER, entry, wait_until
from test_hostile_framing import BASE, Raw
from test_mutations import copy

relay = suite.module("mi_dicomapi.py")
INI = "[Server]\nloglevel = debug\n[limits]\nworkers = 8\nbytes_per_user = 64M\n[u-closed]\nusers = nobody\n"


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """A relay of few workers, which is impatient sooner than usual."""
    before, suite.ROOT = suite.ROOT, copy(str(tmp_path_factory.mktemp("town") / "scripts"), [
        ("mi_dicomapi.py", "RATE_OVER = 15 ", "RATE_OVER = 2 "), ("mi_dicomapi.py", "STALL = 60 ", "STALL = 3 ")])
    made = suite.World(tmp_path_factory.mktemp("town"), tls=False, commands=["hello"], sites=(SITE, "u-closed"), ini=INI).start()
    suite.ROOT = before
    yield made
    made.close()


class Honest:
    """A client that asks and uploads, and knows how long that takes it."""

    def __init__(self, world):
        self.world, self.client = world, world.client()
        self.accept_id = self.client.register("hello", allow=False)
        self.turn()
        self.usual, self.disk, self.memory = self.median(), self.spool(), self.resident()

    def turn(self):
        """One question and one file: seconds."""
        begun = time.monotonic()
        self.client.ok("GET", "calc-progress", {"v": 2, "accept_id": self.accept_id})
        self.client.register("hello", inputs={"a": b"x" * 70000}, allow=False)
        return time.monotonic() - begun

    def median(self):
        """Of a few turns."""
        return sorted(self.turn() for turn in range(15))[7]

    def spool(self):
        """Bytes of fielded bodies that are on their way."""
        return sum(os.path.getsize(os.path.join(folder, name)) for folder, folders, names in os.walk(os.path.join(self.world.state, "spool", "arriving"))
                   for name in names)

    def resident(self):
        """VmRSS of the relay in bytes."""
        with open("/proc/%d/status" % self.world.relay.pid) as text:
            return int(re.search(r"VmRSS:\s+(\d+)", text.read()).group(1)) * 1024

    def is_served(self, memory=48 << 20, disk=1 << 20):
        """Within twice its usual median (a busy machine has several tries), with disk and memory flat."""
        wait_until(lambda: self.median() <= 2 * self.usual, 30, "answered within twice the usual %.4f s" % self.usual)
        assert self.resident() - self.memory < memory, "memory grew by %d MiB" % (self.resident() - self.memory >> 20)
        assert self.spool() - self.disk < disk, "the spool grew by %d bytes" % (self.spool() - self.disk)


def post(token, name, length, body=b""):
    """The head of a POST that announces so many bytes, and its first ones."""
    return b"POST " + BASE + name + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (
        token.encode(), length, body)


def closed(sock):
    """Has the other side closed?"""
    sock.setblocking(False)
    try:
        return sock.recv(65536) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def arriving(world):
    """Fielded bodies that are on their way."""
    top = os.path.join(world.state, "spool", "arriving")
    return os.listdir(top) if os.path.isdir(top) else []


class Drip(threading.Thread):
    """Sends (or takes) a byte on each of its connections again and again, until the other side closes."""

    def __init__(self, raws, read=False):
        threading.Thread.__init__(self, daemon=True)
        self.raws, self.open, self.read = raws, len(raws), read
        self.start()

    def run(self):
        left = [raw.sock for raw in self.raws]
        while left:
            for sock in list(left):
                try:
                    sock.setblocking(False)
                    over = sock.recv(1) == b"" if self.read else sock.send(b"x") == 0
                except BlockingIOError:
                    over = False
                except OSError:
                    over = True
                if over:
                    left.remove(sock)
            self.open = len(left)
            time.sleep(0.1)


def test_bodies_that_drip_leave_slots_to_others_and_end_within_seconds(town):
    honest, mallory = Honest(town), town.client(town.issue("m" + os.urandom(4).hex()))
    files = {"f%02d" % number: entry(b"%d" % number * 5000000) for number in range(6)}
    accept_id = mallory.ok("POST", "add-calcinfo", {"v": 2, "request_id": "drip", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameter_files": files}})["accept_id"].encode()
    drip = Drip([Raw(town).send(post(mallory.token, b"files/%s/input/%d?v=2&offset=0" % (accept_id, number), 5000000, b"x" * 100)) for number in range(6)])
    honest.is_served()
    wait_until(lambda: not drip.open, 40, "they are dropped, however regular they are")


def test_answers_that_are_read_byte_by_byte_leave_slots_to_others_and_end_within_seconds(town):
    """Fielded ones, too, which have files inside."""
    honest, mallory = Honest(town), town.client(town.issue("m" + os.urandom(4).hex()))
    accept_id = mallory.register("hello", results=["r"])
    data = os.urandom(1 << 20) * 14
    mallory.walk(accept_id, mallory.claim()[1], "end-send", {"r": data})
    raws = []
    for number in range(8):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", town.port))
        target = b"get-calc-result?accept_id=%s" if number % 2 else b"files/%s/result/0?v=2"
        sock.sendall(b"GET " + BASE + target % accept_id.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n" % mallory.token.encode())
        raws.append(type("Plain", (), {"sock": sock}))
    drip = Drip(raws, read=True)
    before = town.relay.text().count(" dropped ")
    honest.is_served()
    wait_until(lambda: town.relay.text().count(" dropped ") >= before + 8, 40, "they are dropped")
    assert drip.is_alive()


def test_one_who_keeps_the_rate_is_not_dropped(town):
    client = town.client()
    accept_id = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": os.urandom(4).hex(), "calc-info": {
        "command": "hello", "remote-site": SITE, "parameter_files": {"a": entry(b"y" * 10000)}}})["accept_id"]
    raw = Raw(town).send(post(client.token, b"files/%s/input/0?v=2&offset=0" % accept_id.encode(), 10000))
    for turn in range(10):
        raw.send(b"y" * 1000)
        time.sleep(0.3)
    assert raw.answer() == (200, {"code": 200, "message": "complete", "offset": 10000, "complete": True})


FIELDED = {                    # a fielded body that nobody has asked for: (who sends it, which call, HTTP status)
    "a user with no site": (("--sites", "u-closed"), b"add-calcinfo", 202),
    "more than a user may hold": ((), b"add-calcinfo", 202),
    "results of no calculation": ((), b"send-results", 200),
}


@pytest.mark.parametrize("what", FIELDED)
def test_a_fielded_body_is_refused_before_it_is_on_the_disk(town, what):
    words, name, status = FIELDED[what]
    honest, token = Honest(town), town.issue("mallory%d" % len(what), *words)
    flood, answers = b'{"x":{"content":"' + b"QUJD" * 250000, []
    raws = [Raw(town) for number in range(6)]

    def send(raw):
        raw.send(post(token, name, 150 << 20))
        for turn in range(20):
            raw.send(flood)

    threads = [threading.Thread(target=send, args=(raw,), daemon=True) for raw in raws]
    for thread in threads:
        thread.start()
    honest.is_served()
    for raw, thread in zip(raws, threads):
        thread.join(30)
        try:
            answers.append(raw.answer()[0])
        except (OSError, AssertionError):              # it did not stop sending: the answer was lost with the connection
            answers.append(status)
    assert answers == [status] * 6
    assert honest.spool() == 0


def test_fielded_bodies_on_their_way_count_as_their_users_bytes(town):
    token, part = town.issue("twice"), b'{"calc-info": {"x": "' + b"QUJD" * 20000
    first = Raw(town).send(post(token, b"add-calcinfo", 60 << 20, part))
    wait_until(lambda: arriving(town), 10)
    assert Raw(town).send(post(token, b"add-calcinfo", 60 << 20, part)).answer() == (202, {
        "code": 429, "message": "user twice holds 0 bytes; try again later", "why": "bytes_per_user", "said": "bytes_per_user", "told": {"user": "twice", "count": 0}})
    first.sock.close()
    wait_until(lambda: not arriving(town), 10)
    assert Peer(town, token).code("add-calcinfo", **{"calc-info": calc_info(SITE)}) == (200, 200)


def test_what_waits_holds_no_body(town):
    honest, token = Honest(town), town.issue("m" + os.urandom(4).hex())
    body = json.dumps({"v": 2, "site_id": SITE, "poller": "x" * 3000000, "take": "take-it-now", "wait": 50, "free": 0}).encode()
    raws = [Raw(town).send(post(token, b"calc-request", len(body), body)) for number in range(40)]
    assert [raw.answer()[1]["code"] for raw in raws] == ["0300"] * 40    # beyond what a user's waiting calls may hold they do not wait
    honest.is_served(memory=64 << 20)
    small = json.dumps({"v": 2, "site_id": SITE, "poller": "p", "take": "take-it-now", "wait": 50, "free": 0}).encode()
    waits = Raw(town).send(post(token, b"calc-request", len(small), small))
    time.sleep(0.3)
    assert not closed(waits.sock)


def test_every_text_that_is_kept_counts_as_its_users_bytes(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nbytes_per_user = 100K\n").start()
    large = {"note": "x" * 60000}

    def add(number, **more):
        return client.call("POST", "add-calcinfo", {"v": 2, "request_id": "r%d" % number, "allow": True, "calc-info": dict({
            "command": "hello", "remote-site": SITE}, **more)})

    for more in (large, {"result_files": ["n%05d" % number for number in range(6000)]}, {"parameter_files": {"f%03d" % n: entry(b"") for n in range(400)}}):
        client = world.client(world.issue("u" + os.urandom(4).hex()))
        assert add(1, **more)[0] == 200 and add(1, **more)[0] == 200     # the same one again
        status, first = add(2, **more)
        assert (status, first.get("why")) == (429, "bytes_per_user"), more.keys()
    client = world.client(world.issue("fielded"))
    peer = Peer(world, client.token)
    assert peer.code("add-calcinfo", **{"calc-info": calc_info(SITE, **large)}) == (200, 200)
    assert peer.code("add-calcinfo", **{"calc-info": calc_info(SITE, **large)}) == (202, 429)
    client = world.client(world.issue("reasons"))
    accept_id = client.register("hello", results=["r"])
    claim = client.claim()[1]
    client.walk(accept_id, claim, "calc-end")
    for turn in range(2):                              # another manifest takes the place of the one before
        client.ok("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": {}, "missing": {
            "m%05d" % number: "why %d" % turn for number in range(4000)}})
    used = world.rows("SELECT texts FROM calculations WHERE accept_id = ?", accept_id)[0]["texts"]
    assert 70000 < used < 80000 and add(2, **large)[0] == 429


def test_a_call_that_waits_ends_with_its_token(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    tokens = [world.issue(USER), world.token]
    number = world.rows("SELECT MAX(number) AS number FROM tokens")[0]["number"]
    body = json.dumps({"v": 2, "site_id": SITE, "poller": "p", "take": "take-it-now", "wait": 20}).encode()
    raws = []
    for token in tokens:                               # the one whose token ends waits longer, and would be the first
        raws.append(Raw(world).send(post(token, b"calc-request", len(body), body)))
        time.sleep(0.3)
    assert suite.run("mi_dicomapi.py", "token", "revoke", str(number), "--ini", world.ini).returncode == 0
    wait_until(lambda: world.client(tokens[0]).call("GET", "calc-progress", {"v": 2, "accept_id": "x"})[0] == 403, 5)
    accept_id = world.client().register("hello")
    assert raws[0].answer()[0] == 403
    assert raws[1].answer()[1]["accept_id"] == accept_id


def test_a_poller_waits_and_is_told_that_there_is_nothing_while_every_worker_is_busy(make_world, tmp_path):
    go, found = tmp_path / "go", []
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nworkers = 4\n").start(suite.clean_env(MI_FAULT="hold News.since %s 4" % go))
    asked = json.dumps({"v": 2, "site_id": SITE, "poller": "p", "take": "take-it-now", "wait": 1}).encode()
    poller = Raw(world).send(post(world.token, b"calc-request", len(asked), asked))
    assert poller.answer()[1]["code"] == "0300"        # from now on that is known
    (tmp_path / "go.armed").write_text("")
    held = [threading.Thread(target=lambda: found.append(world.client().call("GET", "v2/list", {})[0])) for turn in range(4)]
    for one in held:
        one.start()
    wait_until(lambda: (tmp_path / "go.here").exists())
    for turn in range(3):
        assert poller.send(post(world.token, b"calc-request", len(asked), asked)).answer()[1]["code"] == "0300"
    assert found == []
    go.write_text("")
    for one in held:
        one.join()
    assert found == [200] * 4
    accept_id, waits = world.client().register("hello"), json.dumps(dict(json.loads(asked.decode()), wait=20)).encode()
    assert poller.send(post(world.token, b"calc-request", len(waits), waits)).answer()[1]["accept_id"] == accept_id


# ---- what a list or a number from outside costs: counted by the relay, not by a clock

SIZES = ("empty", "one", "huge", "negative", "repeated")
NAMES = ["n%05d" % number for number in range(25000)]


def of_size(kind, size):
    """A list, object or number of that size; None where there is no such."""
    many = {"empty": [], "one": NAMES[:1], "huge": NAMES, "repeated": NAMES[:1] * 25000 if kind == "list" else None}.get(size)
    return {
        "number": {"empty": "", "one": 1, "huge": 10 ** 17, "negative": -1, "repeated": [1] * 1000}[size],
        "list": many,
        "names": many and {name: {} for name in many} if many is not None else None,
        "files": {name: entry(b"") for name in many} if many is not None else None,
        "claims": {name: "1.x" for name in many} if many is not None else None,
        "beats": {name: {} for name in many} if many is not None else None,
        "texts": {name: "why" for name in many} if many is not None else None,
    }[kind]


FIELDS = {                     # every list and number that a call takes: call -> {field: kind}; a dot leads into calc-info
    "add-calcinfo": {".parameter_files": "files", ".result_files": "list", ".result_patterns": "list", ".note": "list", "total": "number"},
    "calc-request": {"have": "claims", "free": "number", "wait": "number"},
    "heartbeat": {"calcs": "beats", "wait": "number"},
    "calc-end": {"exit_code": "number", "signal": "number", "started": "number", "ended": "number", "cpu": "number", "maxrss": "number"},
    "send-results": {"result_files": "files", "missing": "texts", "refused": "texts"},
    "files/%s/input": {"files": "files", "from": "number"},
    "files/%s/input/pack": {"from": "number", "count": "number"},
    "files/%s/input/0": {"offset": "number"},
    "output": {"offset": "number", "wait": "number"},
    "calc-progress": {"wait": "number"},
}
CASES = [(call, field, size) for call, fields in sorted(FIELDS.items()) for field in sorted(fields) for size in SIZES
         if of_size(fields[field], size) is not None]


def test_no_list_or_number_costs_more_than_a_call_may_cost(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[Server]\nloglevel = debug\n[times]\nwait = 0s\n").start()
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"), timeout=30)
    db.executemany("INSERT INTO tokens (hash, user, roles, sites, issued, expires) VALUES (?, ?, 'workflow remote', '', 1, 1e11)",
                   [(hashlib.sha256(b"%d" % number).hexdigest(), "u%d" % number) for number in range(len(CASES))])
    db.commit()
    db.close()
    for number, (call, field, size) in enumerate(CASES):
        user = world.client("%d" % number)             # each of a user of his own: nobody owes for another
        accept_id = user.register("hello", inputs={"a": b"x"}, results=["r"], allow=call not in ("files/%s/input/0", "files/%s/input", "files/%s/input/pack"))
        fields = {"v": 2, "accept_id": accept_id, "site_id": SITE, "poller": "p", "take": os.urandom(8).hex(), "wait": 0, "request_id": os.urandom(8).hex(),
                  "calcs": {}, "stream": "out", "offset": 0, "result": "calc end", "from": 0, "count": 1,
                  "calc-info": {"command": "hello", "remote-site": SITE}}
        if call in ("calc-end", "send-results"):
            fields["claim"] = user.claim()[1]
            user.walk(accept_id, fields["claim"], "calc-start" if call == "calc-end" else "calc-end")
        place, value = fields["calc-info"] if field[0] == "." else fields, of_size(FIELDS[call][field], size)
        place[field.strip(".")] = value
        before = len(world.relay.text())
        if call in ("output", "calc-progress") or call.endswith(("pack", "0")):
            from urllib.parse import urlencode
            keys = ("v", "from", "count") if call.endswith("pack") else ("v", "offset") if call.endswith("0") else tuple(fields)
            method = "POST" if call.endswith("0") else "GET"
            target = (call % accept_id if "%s" in call else call) + "?" + urlencode({key: fields[key] for key in keys if not isinstance(fields[key], dict)})[:8000]
            status, data, headers = user.raw(method, target, b"y" if method == "POST" else None)
        else:
            status, data, headers = user.raw("POST", call % accept_id if "%s" in call else call, json.dumps(fields).encode())
        assert status in (200, 206, 400, 404, 409, 413, 416, 422, 503), (call, field, size, status, data[:200])
        spent = [int(work) for work in re.findall(r" work=(\d+)", world.relay.text()[before:])]
        assert sum(spent) <= relay.MOST_WORK, (call, field, size, spent)
        assert len(data) < 1 << 20
    assert world.relay.alive() and "bug=" not in world.relay.text()


def test_patterns_that_are_hard_to_match_cost_their_user_and_nobody_else(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[Server]\nloglevel = debug\n").start()
    honest, mallory = Honest(world), world.client(world.issue("mallory"))
    info = {"command": "hello", "remote-site": SITE}
    add = {"v": 2, "allow": True, "request_id": "many", "calc-info": dict(info, result_patterns=["*a" * 100 + "%d" % n for n in range(1000)])}
    assert mallory.call("POST", "add-calcinfo", add)[0] == 400
    add["calc-info"]["result_patterns"] = add["calc-info"]["result_patterns"][:100]
    mallory.ok("POST", "add-calcinfo", add)
    accept_id, claim = mallory.claim()
    mallory.walk(accept_id, claim, "calc-end")
    for length, names, status in ((240, 50, 413), (200, 2000, 413), (200, 1, 400)):
        files = {"a" * (length - 5) + "%05d" % number: entry(b"") for number in range(names)}
        body = json.dumps({"v": 2, "accept_id": accept_id, "claim": claim, "result_files": files}).encode()
        raws = [Raw(world).send(post(mallory.token, b"send-results", len(body), body)) for number in range(32)]
        honest.is_served()
        assert {raw.answer()[0] for raw in raws} <= {status, 400, 503}, length
    spent = [int(work) for work in re.findall(r"send-results work=(\d+)", world.relay.text())]
    assert spent and "bug=" not in world.relay.text()


@pytest.mark.parametrize("who", ["a token's", "nobody's, beside the gateway"])
def test_connections_that_are_all_taken_do_not_keep_others_out(make_world, who):
    """A good token is limited in what it asks, and in how often it waits; this is about connections on which nothing happens any more."""
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nconnections = 40\n")
    mallory = world.issue("mallory").encode() if who.startswith("a token") else b"none"
    if who.startswith("nobody"):
        secret = os.path.join(world.folder, "secret")
        with open(os.open(secret, os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
            out.write("X-Gateway-Secret: 0123456789abcdef\n")
        world.extra += "[Server]\nauth = gateway\ntrusted_proxies = 127.0.0.1\ngateway_secret_file = %s\n" % secret
    world.start()
    head = b"GET " + BASE + b"version HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n" % mallory
    raws = [Raw(world).send(head) for number in range(40)]

    def served():
        try:
            return world.client().raw("GET", "calc-progress?v=2&accept_id=x", headers={"X-Gateway-Secret": "0123456789abcdef"})[0] == 404
        except OSError:
            return False

    wait_until(served, 20, "somebody else is let in")
    assert sum(not closed(raw.sock) for raw in raws) >= 30, "no more than needed are closed"


def test_the_output_of_running_commands_counts_as_its_users_bytes(make_world):
    """Also after a restart. What is not kept keeps no heartbeat from getting through; all of it comes with the results."""
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nbytes_per_user = 1M\n").start()
    client, have = world.client(), [0, 0]
    accept_id = client.register("hello")
    claim = client.claim()[1]
    client.walk(accept_id, claim, "calc-start")

    def beat(size):
        data = base64.b64encode(b"x" * size).decode()
        entries = {stream: [have[place], data] for place, stream in enumerate(("out", "err"))}
        have[:] = client.ok("POST", "heartbeat", {"v": 2, "site_id": SITE, "poller": "test", "calcs": {accept_id: dict(
            entries, claim=claim)}})["output"][accept_id]
        return sum(have)

    kept = [beat(200000) for turn in range(4)]
    assert kept[0] == 400000 and kept[-1] == kept[-2] <= 1 << 20, kept
    world.relay.kill()
    world.start()
    client = world.client()
    assert beat(200000) == kept[-1]
    assert client.call("POST", "add-calcinfo", {"v": 2, "request_id": "more", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameter_files": {"a": entry(b"y" * 300000)}}})[1]["code"] == 429


def test_very_many_small_files_fill_no_disk(make_world, disk_of):
    """What they cost is more than their bytes, and there are only so many inodes. What was fetched makes room for them, too."""
    disk = disk_of("64m,nr_inodes=400")
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nspool_free = 20%%\n[Server]\nstate_dir = %s\n" % (disk / "state"))
    world.state = str(disk / "state")
    client = world.start().client()
    old = client.register("hello", results=["%02d" % number for number in range(60)])
    client.walk(old, client.claim()[1], "end-send", {"%02d" % number: b"x" for number in range(60)})
    accept_id = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "many", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameter_files": {"%04d" % number: entry(b"x") for number in range(600)}}})["accept_id"]
    number, status = 0, 200
    while status == 200:
        status, first = client.call("POST", "files/%s/input/%d?v=2&offset=0" % (accept_id, number), body=b"x")
        number += 1
    assert (status, first["why"]) == (507, "disk") and os.statvfs(str(disk)).f_favail >= 30
    again = {"v": 2, "request_id": "one more", "calc-info": {"command": "hello", "remote-site": SITE}}
    assert client.call("POST", "add-calcinfo", again)[0] == 507
    client.ok("POST", "finish", {"v": 2, "accept_id": old})
    wait_until(lambda: client.call("POST", "files/%s/input/%d?v=2&offset=0" % (accept_id, number - 1), body=b"x")[0] == 200)
    world.relay.stop()


def test_notes_of_why_something_waits_do_not_keep_the_writer_from_others(make_world):
    """Each of them is a change in the database, a line in the log, and news for who waits."""
    world = make_world(tls=False, commands=["hello"]).start()
    client, waiting = world.client(), 30
    for number in range(waiting):
        client.register("hello", inputs={"a": b"x"})
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"), timeout=30)
    db.execute("UPDATE calculations SET bytes = 9000000")                    # inputs that are larger than what any of these pollers has room for
    db.commit()
    db.close()
    for turn in range(40):
        status, first = client.call("POST", "calc-request", {
            "v": 2, "site_id": SITE, "poller": "test", "take": "12345678", "free": turn % 8 << 20})
        assert first["code"] in ("0300", 503)
    assert waiting <= world.relay.text().count(" it waits ") <= waiting * 20, "half of the turns, on a machine that takes very long for them"
