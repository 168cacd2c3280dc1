"""What no honest client sends: framing that two programs can read in two ways, silence, floods, JSON that is none.
Always an answer in the envelope or a closed connection; never HTML, never 500, never a second answer to one request."""
import json
import os
import random
import re
import socket
import ssl
import time

import pytest
import suite
from suite import SITE, entry

relay = suite.module("mi_dicomapi.py")
BASE = b"/mi-distcomp-api/"


class Raw:
    """A bare connection, TLS where the world has it."""

    def __init__(self, world, source="127.0.0.1", tls=True):
        self.sock = socket.create_connection(("127.0.0.1", world.port), 10, (source, 0))
        if world.tls and tls:
            self.sock = ssl.create_default_context(cafile=world.cert).wrap_socket(self.sock, server_hostname="127.0.0.1")

    def send(self, data):
        """Sends; a peer that has closed already is no failure."""
        try:
            self.sock.sendall(data)
        except OSError:
            pass
        return self

    def rest(self, seconds=10):
        """All that comes until the other side closes. AssertionError if it does not."""
        self.sock.settimeout(seconds)
        got = b""
        while True:
            try:
                data = self.sock.recv(65536)
            except socket.timeout:
                raise AssertionError("still open after %s s, got %r" % (seconds, got))
            except OSError:
                return got
            if not data:
                return got
            got += data

    def answer(self):
        """One answer: (status, errors[0] or the whole object)."""
        self.sock.settimeout(10)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = self.sock.recv(1)
            assert data, head
            head += data
        length, body = int(re.search(rb"Content-Length: (\d+)", head).group(1)), b""
        while len(body) < length:
            body += self.sock.recv(length - len(body))
        return int(head[9:12]), one(json.loads(body.decode()))

    def closed_within(self, seconds):
        """Seconds until the other side closed."""
        begun = time.monotonic()
        self.rest(seconds)
        return time.monotonic() - begun


def one(parsed):
    """errors[0] of an envelope; `version` has none."""
    return parsed["errors"][0] if "errors" in parsed else parsed


def answers(got):
    """What came on a connection as a list of (status, errors[0]); everything in it must be our JSON."""
    found = []
    while got:
        head, mark, got = got.partition(b"\r\n\r\n")
        assert mark and re.match(rb"HTTP/1\.1 \d{3} ", head), head
        assert b"\r\nContent-Type: application/json; charset=utf-8\r\n" in head and b"\r\nCache-Control: no-store, no-transform" in head, head
        length = int(re.search(rb"Content-Length: (\d+)", head).group(1))
        body, got = got[:length], got[length:]
        assert b"<" not in body[:1]
        found.append((int(head[9:12]), one(json.loads(body.decode("utf-8")))))
    return found


def request(world, line=b"GET " + BASE + b"calc-progress?v=2&accept_id=x HTTP/1.1", headers=(), body=b"", token=True):
    """A request's bytes with a good token."""
    head = [line, b"Host: localhost"] + ([b"Authorization: Bearer " + world.token.encode()] if token else []) + list(headers)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


SECOND = b"GET " + BASE + b"version HTTP/1.1\r\nHost: smuggled\r\n\r\n"
POST = b"POST " + BASE + b"allow-wait-calc HTTP/1.1"
FRAMES = {                     # what: (request line or None, headers, body, statuses)
    "two Content-Lengths": (POST, [b"Content-Length: 2", b"Content-Length: 40"], b"{}", (400,)),
    "the same Content-Length twice": (POST, [b"Content-Length: 2", b"Content-Length: 2"], b"{}", (400,)),
    "a list as Content-Length": (POST, [b"Content-Length: 2, 2"], b"{}", (400,)),
    "Transfer-Encoding with Content-Length": (POST, [b"Content-Length: 2", b"Transfer-Encoding: chunked"], b"0\r\n\r\n", (400,)),
    "Transfer-Encoding alone": (POST, [b"Transfer-Encoding: chunked"], b"2\r\n{}\r\n0\r\n\r\n", (411,)),
    "another Transfer-Encoding": (POST, [b"Transfer-Encoding: xchunked"], b"", (411,)),
    "Transfer-Encoding after a tab": (POST, [b"Transfer-Encoding:\tchunked", b"Content-Length: 2"], b"{}", (400,)),
    "a negative length": (POST, [b"Content-Length: -1"], b"", (400,)),
    "a signed length": (POST, [b"Content-Length: +2"], b"{}", (400,)),
    "a hexadecimal length": (POST, [b"Content-Length: 0x2"], b"{}", (400,)),
    "two words as length": (POST, [b"Content-Length: 2 2"], b"{}", (400,)),
    "an empty length": (POST, [b"Content-Length:"], b"{}", (400,)),
    "a length in other digits": (POST, ["Content-Length: \u00b2".encode("latin-1")], b"{}", (400,)),
    "a length without end": (POST, [b"Content-Length: " + b"9" * 40], b"{}", (400,)),
    "a length of a terabyte": (POST, [b"Content-Length: 1000000000000"], b"{}", (413,)),
    "a header with a blank before it": (None, [b" X: folded"], b"", (400,)),
    "a folded header": (None, [b"X: a", b"\tfolded"], b"", (400,)),
    "a blank before the colon": (POST, [b"Content-Length : 2"], b"{}", (400,)),
    "a header without a colon": (None, [b"nonsense"], b"", (400,)),
    "a header without a name": (None, [b": x"], b"", (400,)),
    "NUL in a header": (None, [b"X: a\0b"], b"", (400,)),
    "a bare carriage return": (None, [b"X: a\rContent-Length: 5"], b"", (400,)),
    "a control character": (None, [b"X: a\x1bb"], b"", (400,)),
    "a head of 20 KiB": (None, [b"X: " + b"a" * 20480], b"", (431,)),
    "two hundred headers": (None, [b"X-%d: a" % n for n in range(200)], b"", (431,)),
    "two tokens": (None, [b"Authorization: Bearer " + b"0" * 64], b"", (400,)),
    "two Hosts": (None, [b"Host: other"], b"", (400,)),
    "PUT": (b"PUT " + BASE + b"version HTTP/1.1", [], b"", (405,)),
    "HEAD": (b"HEAD " + BASE + b"version HTTP/1.1", [], b"", (405,)),
    "OPTIONS": (b"OPTIONS * HTTP/1.1", [], b"", (400, 405)),
    "CONNECT": (b"CONNECT other:443 HTTP/1.1", [], b"", (400, 405)),
    "a method in small letters": (b"get " + BASE + b"version HTTP/1.1", [], b"", (405,)),
    "an absolute target": (b"GET http://other" + BASE + b"version HTTP/1.1", [], b"", (400,)),
    "a target with a blank": (b"GET " + BASE + b"version x HTTP/1.1", [], b"", (400,)),
    "two blanks": (b"GET  " + BASE + b"version HTTP/1.1", [], b"", (400,)),
    "a tab": (b"GET\t" + BASE + b"version\tHTTP/1.1", [], b"", (400,)),
    "a fragment": (b"GET " + BASE + b"version#x HTTP/1.1", [], b"", (400,)),
    "a target beyond ASCII": (b"GET " + BASE + b"versi\xc3\xb6n HTTP/1.1", [], b"", (400,)),
    "HTTP/2.0": (b"GET " + BASE + b"version HTTP/2.0", [], b"", (400,)),
    "HTTP/1.10": (b"GET " + BASE + b"version HTTP/1.10", [], b"", (400,)),
    "no version": (b"GET " + BASE + b"version", [], b"", (400,)),
    "a field given twice": (b"GET " + BASE + b"calc-progress?v=2&accept_id=a&accept_id=b HTTP/1.1", [], b"", (400,)),
    "a query that is not UTF-8": (b"GET " + BASE + b"calc-progress?v=2&accept_id=%ff HTTP/1.1", [], b"", (400,)),
    "a target in brackets": (b"GET //[x HTTP/1.1", [], b"", (400,)),
}


@pytest.mark.parametrize("what", FRAMES)
def test_a_request_that_can_be_read_in_two_ways_is_refused_and_ends_its_connection(world, what):
    line, headers, body, statuses = FRAMES[what]
    data = request(world, line, headers, body) if line else request(world, headers=headers, body=body)
    found = answers(Raw(world).send(data + SECOND).rest())
    assert len(found) == 1 and found[0][0] in statuses, (what, found)
    assert found[0][1]["code"] == found[0][0] and found[0][1]["message"]


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\nHost: x\n\n", b"GET / HTTP/1.1\r\nHost: x\n\r\n", b"\n\n\n", b"GET / HTTP/1.1\r\nX: a\nContent-Length: 5\r\n\r\nhello",
                                  b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"\0" * 20000, b"A" * 100000, b"\r\n\r\n", b"GET\r\n\r\n", bytes(range(256)) * 100])
def test_what_is_no_http_is_refused(world, data):
    found = answers(Raw(world).send(data).rest())
    assert len(found) == 1 and 400 <= found[0][0] < 500


def test_a_refused_client_that_goes_on_sending_still_reads_its_answer(world):
    raw = Raw(world).send(request(world, POST, [b"Content-Length: 50000000"]))
    for turn in range(100):
        raw.send(b"x" * 20000)
    (status, first), = answers(raw.rest())
    assert status == 413


def test_a_plain_http_request_to_the_tls_port_is_closed_without_a_word_of_html(world):
    got = Raw(world, tls=False).send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").rest()
    assert b"<" not in got and b"HTTP" not in got


def test_blanks_in_a_header_cost_no_time(world):
    raws = [Raw(world) for number in range(20)]
    begun = time.monotonic()
    for raw in raws:
        raw.send(request(world, headers=[b"X: a" + b" " * 15000 + b"\x01"]))
    assert world.client().raw("GET", "version")[0] == 200
    for raw in raws:
        assert answers(raw.rest())[0][0] == 400
    assert time.monotonic() - begun < 3


def test_pipelined_requests_are_answered_in_their_order_up_to_the_one_that_is_refused(world):
    client = world.client()
    ids, sent, wanted = [client.register("hello", request_id="piped %d" % number, allow=False) for number in range(5)], b"", []
    for number in range(60):
        if number % 3 == 0:
            sent += SECOND
            wanted.append((200, None))
        elif number % 3 == 1:
            sent += request(world, b"GET " + BASE + b"get-calc-result?v=2&accept_id=" + ids[number % 5].encode() + b" HTTP/1.1")
            wanted.append((409, "the result is not there yet"))
        else:
            body = json.dumps({"v": 2, "accept_id": "unknown-%d" % number}).encode()
            sent += request(world, POST, [b"Content-Length: %d" % len(body)], body)
            wanted.append((404, "There is no information for accept_id(unknown-%d)" % number))
    sent += request(world, b"GET " + BASE + b"nothing HTTP/1.1") + SECOND          # what follows a refusal is not to be trusted
    wanted.append((404, "/mi-distcomp-api/nothing: no such call"))
    got = answers(Raw(world).send(sent).rest())
    assert [(status, first.get("message")) for status, first in got] == wanted


def test_many_pipelined_calls_on_one_connection(world):
    client = world.client()
    accept_id = client.register("hello", allow=False)
    line = b"GET " + BASE + b"calc-progress?v=2&accept_id=%s HTTP/1.1"
    sent = b"".join(request(world, line % name) for name in [accept_id.encode()] * 100) + request(world, line % accept_id.encode(), [b"Connection: close"])
    got = answers(Raw(world).send(sent).rest())
    assert [status for status, first in got] == [200] * 101


def test_a_request_in_single_bytes_is_a_request(world):
    body = json.dumps({"v": 2, "accept_id": "x"}).encode()
    raw = Raw(world)
    for byte in request(world, POST, [b"Content-Length: %d" % len(body)], body):
        raw.send(bytes([byte]))
    assert raw.answer()[0] == 404
    raw.send(request(world))                           # and its connection goes on
    assert raw.answer()[0] == 404


# ---- silence and floods

@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A relay with short deadlines and small caps."""
    made = suite.World(tmp_path_factory.mktemp("strict"), commands=["hello"], ini="[limits]\nheaders = 1s\nhandshake = 1s\nunauthenticated_per_address = 8\n"
                       "parked_per_token = 3\nworkers = 8\nidle = 1s\n").start()
    yield made
    made.close()


def test_a_client_that_says_nothing_is_dropped(strict):
    begun = time.monotonic()
    for raw in [Raw(strict, tls=False), Raw(strict), Raw(strict).send(b"GET /mi-distcomp-api/ver"), Raw(strict).send(request(strict)[:-2])]:
        raw.rest(4)                                    # no handshake, no head, half a line, half a head
    assert 1 <= time.monotonic() - begun < 4


def test_a_head_that_trickles_is_dropped_at_the_same_deadline(strict):
    raw, begun = Raw(strict), time.monotonic()
    raw.sock.settimeout(0.15)
    for byte in request(strict):
        raw.send(bytes([byte]))
        try:
            if not raw.sock.recv(1):
                break
        except socket.timeout:
            continue
        except OSError:
            break
    assert time.monotonic() - begun < 4


def test_an_idle_connection_is_closed_and_never_in_the_middle(strict):
    raw = Raw(strict)
    for turn in range(3):
        raw.send(request(strict))
        assert raw.answer()[0] == 404
        time.sleep(0.4)
    assert raw.closed_within(6) < 4


def test_silent_clients_of_one_address_do_not_keep_an_honest_one_out(strict):
    honest = strict.client()
    accept_id = honest.register("hello", allow=False)
    silent = [Raw(strict, tls=False) for number in range(8)]
    begun = time.monotonic()
    assert Raw(strict, tls=False).closed_within(2) < 0.5                 # the ninth stranger of this address
    assert honest.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})           # the connection that showed a token
    other = Raw(strict, source="127.0.0.2").send(request(strict))        # another address
    assert other.answer()[0] == 404 and time.monotonic() - begun < 1
    for raw in silent:
        raw.rest(4)
    assert strict.client().ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})


def test_a_hundred_silent_clients_and_wrong_tokens_leave_nothing_behind(strict):
    def handles():
        return len(os.listdir("/proc/%d/fd" % strict.relay.pid))

    before, raws = handles(), []
    for number in range(100):
        raws.append(Raw(strict, source="127.0.1.%d" % (number % 30 + 1), tls=number % 2 == 0))
        if number % 2 == 0:
            raws[-1].send(request(strict, headers=[b"Authorization: Bearer " + b"0" * 64], token=False))
    for raw in raws:
        found = answers(raw.rest(5))
        assert not found or found[0][0] == 403
        raw.sock.close()
    suite.wait_until(lambda: handles() <= before + 1, 5)


def test_uploads_that_stand_still_do_not_hold_up_the_short_calls(strict):
    client = strict.client()
    accept_id = client.register("hello", inputs={"a": b"x" * 200000}, allow=False)
    data = {name: entry(b"y" * 200000) for name in ("f%02d" % n for n in range(20))}
    accept_id = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "stalled", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameter_files": data}})["accept_id"]
    stalled = [Raw(strict, source="127.0.2.%d" % (number + 1)).send(request(
        strict, b"POST " + BASE + b"files/%s/input/%d?v=2&offset=0 HTTP/1.1" % (accept_id.encode(), number), [b"Content-Length: 200000"], b"y" * 100))
        for number in range(20)]
    begun = time.monotonic()
    for turn in range(20):
        assert client.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})
    assert time.monotonic() - begun < 1
    for raw in stalled:
        raw.sock.close()


def test_waiting_calls_of_one_token_are_capped(strict):
    waiting = [Raw(strict) for number in range(4)]
    token, statuses = strict.issue("waiter"), []
    for number, raw in enumerate(waiting):
        body = json.dumps({"v": 2, "site_id": SITE, "poller": "p", "take": "take-%04d" % number, "wait": 1}).encode()
        raw.send(request(strict, b"POST " + BASE + b"calc-request HTTP/1.1",
                         [b"Authorization: Bearer " + token.encode(), b"Content-Length: %d" % len(body)], body, token=False))
        time.sleep(0.1)
    for raw in waiting:
        statuses.append(raw.answer())
    assert [status for status, first in statuses] == [200, 200, 200, 429]
    assert [first["code"] for status, first in statuses] == ["0300"] * 3 + [429]


# ---- JSON

DEEP = 100000
BODIES = {
    "nothing": b"", "null": b"null", "a list": b"[]", "a text": b'"x"', "a number": b"1", "half": b'{"v":2', "more behind it": b'{"v":2}{"v":2}', "a comma": b'{"v":2,}',
    "the same key twice": b'{"v":2,"accept_id":"a","accept_id":"b"}', "the same key twice within": b'{"v":2,"accept_id":"a","x":{"y":1,"y":2}}',
    "an escaped key twice": b'{"v":2,"accept_id":"a","accept_\\u0069d":"b"}', "NaN": b'{"v":2,"x":NaN}', "Infinity": b'{"v":2,"x":Infinity}',
    "-Infinity": b'{"v":2,"x":[-Infinity]}', "1e999": b'{"v":2,"x":1e999}', "a lone surrogate": b'{"v":2,"accept_id":"\\ud800"}',
    "a lone low surrogate as key": b'{"v":2,"\\udc00":1}', "surrogates the wrong way round": b'{"v":2,"accept_id":"\\udc00\\ud800"}',
    "a raw surrogate": b'{"v":2,"accept_id":"\xed\xa0\x80"}', "not UTF-8": b'{"v":2,"accept_id":"\xff"}', "overlong UTF-8": b'{"v":2,"accept_id":"\xc0\xaf"}',
    "UTF-16": '{"v":2}'.encode("utf-16"), "a byte order mark": b'\xef\xbb\xbf{"v":2}', "a control character": b'{"v":2,"accept_id":"a\nb"}', "NUL": b'{"v":2}\0',
    "lists %d deep" % DEEP: b'{"v":2,"x":' + b"[" * DEEP + b"]" * DEEP + b"}", "objects %d deep" % DEEP: b'{"v":2,"x":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "unclosed lists": b"[" * DEEP, "lists 500 deep": b'{"v":2,"x":' + b"[" * 500 + b"]" * 500 + b"}",
    "a number of 5,000 digits": b'{"v":2,"x":' + b"9" * 5000 + b"}", "a number of a million digits": b'{"v":2,"x":' + b"9" * 1000000 + b"}",
    "a number beyond 64 bits": b'{"v":2,"accept_id":"a","wait":99999999999999999999}', "a form": b"v=2&accept_id=a", "HTML": b"<html></html>", "single quotes": b"{'v':2}",
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_is_not_strict_json_is_400_for_every_call(world, what):
    for method, name in sorted(relay.ROUTES):
        if method == "POST" and relay.ROUTES[method, name].role in (relay.WORKFLOW, relay.REMOTE):
            begun = time.monotonic()
            status, data, headers = world.client().raw("POST", name + ("?v=2" if what in ("nothing", "a list") else ""), BODIES[what])
            assert status == json.loads(data.decode())["errors"][0]["code"] == 400, (name, what, data[:300])
            assert headers["Content-Type"].startswith("application/json") and time.monotonic() - begun < 2


ODD = (None, True, False, 0, 1, -1, 1 << 59, 10 ** 18 - 1, 1.5, -0.0, 1e300, "", "x", "-1", "9" * 18, "\u0000", "\u202e\u001b[2J", "\U0001f600", "x" * 100000, [], [[]], {}, {"": ""},
       {"a": None}, [None] * 100, "../../etc/passwd", "%s%n", "'; DROP TABLE calculations; --")


def test_no_field_of_any_type_makes_the_relay_fail(world):
    client, roll = world.client(), random.Random(20261120)
    accept_id = client.register("hello", results=["r"])
    found, claim = client.claim()
    good = {"v": 2, "accept_id": accept_id, "claim": claim, "site_id": SITE, "take": "12345678", "poller": "p", "wait": 0, "have": {accept_id: claim}, "free": 1,
            "request_id": "r", "calc-info": {"command": "hello", "remote-site": SITE, "parameters": "", "parameter_files": {}, "result_files": {}, "result_patterns": []},
            "more": False, "total": 0, "allow": True, "result": "abnormal", "exit_code": 0, "signal": None, "reason": "", "started": 1, "ended": 2, "cpu": 0.5, "maxrss": 1,
            "result_files": {}, "missing": {}, "refused": {}, "from": 0, "files": {}, "stop": True, "calcs": {accept_id: {"claim": claim, "phase": "x"}}, "known": "x", "force": True, "offset": 0, "stream": "out",
            "size": 0, "transfer": "12345678"}
    calls = [(method, name) for method, name in sorted(relay.ROUTES) if relay.ROUTES[method, name].role in (relay.WORKFLOW, relay.REMOTE)]
    calls += [("POST", "files/%s/input" % accept_id), ("POST", "files/%s/result" % accept_id), ("GET", "files/%s/input" % accept_id),
              ("GET", "files/%s/input/0" % accept_id), ("GET", "files/%s/result/pack" % accept_id), ("GET", "v2/pieces/%s/input/0" % accept_id),
              ("POST", "v2/pieces/%s/result/0" % accept_id), ("GET", "v2/missing/%s/result/0" % accept_id)]
    for turn in range(900):
        method, name = calls[turn % len(calls)]
        fields = json.loads(json.dumps(good))
        for change in range(roll.choice((1, 1, 2, 3))):
            place = fields if roll.random() < 0.7 else fields["calc-info"] if isinstance(fields["calc-info"], dict) else fields
            place[roll.choice(sorted(place) or ["x"])] = roll.choice(ODD)
        fields["v"] = 2
        if method == "GET":
            fields = {key: value for key, value in fields.items() if isinstance(value, (str, int)) and len(str(value)) < 3000}
            from urllib.parse import urlencode
            status, data, headers = client.raw("GET", name + "?" + urlencode(fields))
        else:
            status, data, headers = client.raw("POST", name, json.dumps(fields).encode())
        assert status < 500 and "errors" in json.loads(data.decode()), (method, name, fields, data[:300])
    assert world.relay.alive() and "bug=" not in world.relay.text()


def test_what_was_registered_can_be_told_again_however_deep_it_is(world):
    client = world.client(world.issue("deep"))
    for depth in (1, 20, 50, 55, 58, 60, 61, 62, 63, 64, 65, 100, 900):
        note = json.loads("[" * depth + "]" * depth)
        status, first = client.call("POST", "add-calcinfo", {"v": 2, "request_id": "deep %d" % depth, "allow": True, "calc-info": {
            "command": "hello", "remote-site": SITE, "note": note}})
        if status == 200:
            found = client.ok("POST", "calc-request", {"v": 2, "site_id": SITE, "poller": "p", "take": "take-%05d" % depth, "wait": 0})
            assert found["calc-info"]["note"] == note
        else:
            assert status == 400 and depth > 50


def test_the_relay_has_no_bug_to_tell_after_all_this(world, strict):
    for one_world in (world, strict):
        assert one_world.relay.alive() and one_world.client().register("hello", allow=False)
        assert "bug=" not in one_world.relay.text() and "Traceback" not in one_world.relay.text()
