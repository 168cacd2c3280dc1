"""Fielded bodies hold whole files as base64 in JSON: read and written as streams, strictly, with memory that does not grow with the files."""
import base64
import hashlib
import http.client
import json
import os
import random
import shutil
import socket
import tempfile

import pytest
import suite
from fielded_peer import Peer, b64, calc_info, results, unknown
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st
from suite import LOGS, SITE, wait_until

configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "mi-hypothesis"))
relay = suite.module("mi_dicomapi.py")
MIB = 1 << 20
LONG = 5 * MIB                 # over MAX_JSON: such a body is read as a stream


@pytest.fixture
def small(monkeypatch):
    """The reader's sizes made small, so that short strings take all of its ways."""
    monkeypatch.setattr(relay, "LONG_STRING", 300)


def in_pieces(body, sizes):
    """The body in views of these sizes, again and again."""
    at, turn = 0, 0
    while at < len(body):
        size = sizes[turn % len(sizes)]
        yield memoryview(body)[at:at + size]
        at, turn = at + size, turn + 1


def read(body, sizes=(7,)):
    """What BodyReader makes of a body, its Blobs as ("file", bytes); ValueError or No where it refuses. Their sums and sizes are right."""
    folder = tempfile.mkdtemp(prefix="mi-body-").encode()
    try:
        return unblob(relay.BodyReader(in_pieces(body, sizes), folder, relay.parse_json, relay.MAX_JSON).parse())
    finally:
        shutil.rmtree(folder)


def unblob(found):
    if isinstance(found, relay.Blob):
        with open(found.path, "rb") as source:
            data = source.read()
        assert (found.size, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        return "file", data
    if isinstance(found, dict):
        return {key: unblob(value) for key, value in found.items()}
    return [unblob(value) for value in found] if isinstance(found, list) else found


def same(found, wanted):
    """Is found the same as json.loads made of it, where each Blob stands for a text that b64decode gives its bytes?"""
    if isinstance(found, tuple):
        return isinstance(wanted, str) and base64.b64decode(wanted.replace("\n", "").replace("\r", "")) == found[1]
    if isinstance(found, dict):
        return isinstance(wanted, dict) and list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in found)
    if isinstance(found, list):
        return isinstance(wanted, list) and len(found) == len(wanted) and all(same(*pair) for pair in zip(found, wanted))
    return type(found) is type(wanted) and found == wanted


def spelled(body, rng):
    """The same JSON, spelled otherwise: escapes where they are legal, also in base64, and blanks between the tokens."""
    text, out, inside, at = body, [], False, 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            length = 6 if text[at + 1] == "u" else 2
            out.append(text[at:at + length])
            at += length
            continue
        if char == '"':
            inside = not inside
        if inside and char == "/" and rng.random() < 0.5:
            char = "\\/"
        elif inside and char in "+/=abcXYZ019" and rng.random() < 0.1:
            char = "\\u%04x" % ord(char) if rng.random() < 0.5 else "\\u%04X" % ord(char)
        elif not inside and char in "{}[],:" and rng.random() < 0.3:
            char += rng.choice([" ", "\n", "\t ", "\r\n"])
        out.append(char)
        at += 1
    return "".join(out)


names = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
texts = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)
contents = st.binary(max_size=1000).map(b64)
leaves = st.one_of(texts, contents, st.none(), st.booleans(), st.integers(-10 ** 15, 10 ** 15), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)), max_leaves=12)
bodies = st.dictionaries(names, values, max_size=5)
SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], database=None)


@SETTINGS
@given(found=bodies, seed=st.integers(0, 2 ** 32), ascii_only=st.booleans(), sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_a_good_body_is_read_as_json_loads_and_b64decode_read_it_in_whatever_pieces_it_comes(small, found, seed, ascii_only, sizes):
    body = spelled(json.dumps(found, ensure_ascii=ascii_only), random.Random(seed)).encode("utf-8")
    assert json.loads(body.decode("utf-8")) == found
    assert same(read(body, sizes), found)


@SETTINGS
@given(found=bodies, seed=st.integers(0, 2 ** 32), sizes=st.lists(st.integers(1, 90), min_size=1, max_size=3))
def test_a_damaged_body_is_refused_or_read_as_json_loads_reads_it(small, found, seed, sizes):
    rng, body = random.Random(seed), bytearray(json.dumps(found).encode())
    for turn in range(rng.randrange(1, 4)):
        at = rng.randrange(len(body))
        rng.choice([lambda: body.__setitem__(at, rng.choice(b'"\\{}[]:,=A/+\x00\xff1')), lambda: body.__delitem__(slice(at, at + rng.randrange(1, 5))),
                    lambda: body.insert(at, rng.choice(b'"\\=A1 ')), lambda: body.__delitem__(slice(at, None))])()
        if not body:
            return
    try:
        got = read(bytes(body), sizes)
    except (ValueError, relay.ApiError):
        return
    assert same(got, json.loads(bytes(body).decode("utf-8")))


def test_the_escapes_of_json_in_base64_are_understood_wherever_a_piece_of_the_body_ends(small):
    data = bytes(range(256)) + b"\xff\xef\xbe\xfb" * 30               # base64 with many + and /
    plain = b64(data)
    for text in (plain, plain.replace("/", "\\/"), plain.replace("+", "\\u002b").replace("/", "\\u002F"), plain.replace("A", "\\u0041")):
        body = ('{"content": "%s", "x": [1]}' % text).encode()
        for size in list(range(1, 30)) + [len(body)]:
            assert read(body, (size,)) == {"content": ("file", data), "x": [1]}, (size, text[:40])


def test_a_string_of_any_length_around_the_limit_is_read_right(small):
    for length in list(range(4)) + list(range(215, 232)):
        data = os.urandom(length)
        for size in (1, 5, 64, 1000):
            found = read(('{"a": ["%s", "t"]}' % b64(data)).encode(), (size,))
            assert same(found, {"a": [b64(data), "t"]}), (length, size)


LONG_TEXT = b64(bytes(range(256)) * 2)
BAD = {
    "a character that is not base64": '{"a": "%s!%s"}' % (LONG_TEXT, LONG_TEXT),
    "a blank in base64": '{"a": "%s %s"}' % (LONG_TEXT[:-4], LONG_TEXT[:-4]),
    "padding in the middle": '{"a": "%s%s"}' % (b64(b"x" * 1000), b64(b"x" * 1000)),
    "padding in the middle of four": '{"a": "%s=A%s"}' % (LONG_TEXT[:-4], LONG_TEXT[:-2]),
    "too much padding": '{"a": "%sA==="}' % LONG_TEXT[:-4],
    "only padding at the end": '{"a": "%s===="}' % LONG_TEXT[:-4],
    "a length that is not a multiple of four": '{"a": "%s"}' % LONG_TEXT.rstrip("=")[:-1],
    "an escape that is not base64": '{"a": "%s\\t%s"}' % (LONG_TEXT[:-4], LONG_TEXT),
    "an escaped quote": '{"a": "%s\\"%s"}' % (LONG_TEXT[:-4], LONG_TEXT),
    "an escape that is not JSON": '{"a": "%s\\x41%s"}' % (LONG_TEXT[:-4], LONG_TEXT),
    "a broken \\u": '{"a": "%s\\u00"}' % LONG_TEXT[:-4],
    "a lone surrogate": '{"a": "%s", "b": "\\ud800"}' % LONG_TEXT,
    "a raw control character": '{"a": "%s", "b": "\x01"}' % LONG_TEXT,
    "a letter beyond ASCII": '{"a": "%sあ%s"}' % (LONG_TEXT, LONG_TEXT),
    "an end within the string": '{"a": "%s' % LONG_TEXT,
    "an end after the string": '{"a": "%s"' % LONG_TEXT,
    "an end after a backslash": '{"a": "%s\\' % LONG_TEXT[:-4],
    "something behind it": '{"a": "%s"} x' % LONG_TEXT,
    "two objects": '{"a": "%s"}{"a": 1}' % LONG_TEXT,
    "a key twice": '{"a": "%s", "a": 1}' % LONG_TEXT,
    "a key twice, spelled in two ways": '{"a": "%s", "\\u0061": 1}' % LONG_TEXT,
    "a key twice inside": '{"a": {"b": 1, "b": "%s"}}' % LONG_TEXT,
    "a name that is too long": '{"%s": 1}' % LONG_TEXT,
    "a list": '["%s"]' % LONG_TEXT,
    "a string": '"%s"' % LONG_TEXT,
    "NaN": '{"a": "%s", "b": NaN}' % LONG_TEXT,
    "Infinity": '{"a": "%s", "b": -Infinity}' % LONG_TEXT,
    "a number without end": '{"a": "%s", "b": 1e999}' % LONG_TEXT,
    "a number of a thousand digits": '{"a": "%s", "b": %s}' % (LONG_TEXT, "9" * 1000),
    "nesting": '{"a": "%s", "b": %s1%s}' % (LONG_TEXT, "[" * 100, "]" * 100),
    "endless nesting": '{"a": "%s", "b": %s' % (LONG_TEXT, "[" * 100000),
    "single quotes": "{'a': \"%s\"}" % LONG_TEXT,
    "a comma too much": '{"a": "%s",}' % LONG_TEXT,
    "a byte order mark": '\ufeff{"a": "%s"}' % LONG_TEXT,
    "nothing": "",
}


@pytest.mark.parametrize("what", BAD)
def test_a_body_that_is_not_as_it_should_be_is_refused_in_whatever_pieces_it_comes(small, what):
    body = BAD[what].encode("utf-8")
    for size in (1, 3, 50, 257, len(body) or 1):
        with pytest.raises((ValueError, relay.ApiError)):
            read(body, (size,))


def test_bytes_that_are_not_utf_8_are_refused(small):
    for body in (b'{"a": "%s", "b": "\xff"}' % LONG_TEXT.encode(), b'{"a": "%s\xff"}' % LONG_TEXT.encode()):
        with pytest.raises((ValueError, relay.ApiError)):
            read(body)


def test_what_is_no_file_may_not_grow_without_end(small):
    with pytest.raises(ValueError):
        relay.BodyReader(in_pieces(b'{"a": [' + b"1," * 100000 + b"1]}", (65536,)), b"/nonexistent", relay.parse_json, 100000).parse()
    with pytest.raises(ValueError):
        relay.BodyReader(in_pieces(b'{"a": [' + b'"text",' * 100000 + b"1]}", (65536,)), b"/nonexistent", relay.parse_json, 100000).parse()


# ---- over real sockets

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = suite.World(tmp_path_factory.mktemp("bodies"), tls=False, commands=["hello"], ini="[limits]\nv1_max_body = 400M\n").start()
    yield made
    made.close()


@pytest.fixture
def peer(world):
    return Peer(world)


def ids(world):
    """All calculations, and what is in the spool: directories of calculations, and anything in its arrival hall."""
    spool = os.path.join(world.state, "spool")
    found = {name for above in os.listdir(spool) if above != "arriving" for name in os.listdir(os.path.join(spool, above))}
    hall = os.path.join(spool, "arriving")
    return {row["accept_id"] for row in world.rows("SELECT accept_id FROM calculations")}, found, os.listdir(hall) if os.path.isdir(hall) else []


def unchanged(world, before, accept_id=None):
    """Nothing is half registered, and no file is left over."""
    wait_until(lambda: ids(world) == before, 3)
    if accept_id:
        assert world.state_of(accept_id) == "ended" and not os.path.exists(os.path.join(world.state, "spool", accept_id[:2], accept_id, "out"))


def wrapped(text, name):
    """A bad body around a good one that is longer than MAX_JSON, for this call."""
    filler = b64(b"\0" * (LONG // 4 * 3))
    info = calc_info(SITE, files={})
    return ('{"calc-info": %s, "result_files": {"out.txt": {"content": "%s", "mimetype1": "a", "mimetype2": "b"}}, %s' % (
        json.dumps(dict(info, parameter_files={"big": ["FILLER", "a", "b"]})).replace("FILLER", filler), "eHh4" * 20000, text)).encode("utf-8")


def test_the_body_around_the_bad_ones_is_a_good_one(world, peer):
    status, data, headers = peer.raw("POST", "add-calcinfo", wrapped('"a": "%s"}' % (LONG_TEXT[:-4] * 200), "add-calcinfo"))
    accept_id = json.loads(data)["errors"][0]["accept_id"]
    peer.ok("allow-wait-calc", accept_id=accept_id)
    peer.walk(accept_id, "calc-end")
    status, data, headers = peer.raw("POST", "send-results", wrapped('"accept_id": "%s", "site_id": "%s"}' % (accept_id, SITE), "send-results"))
    assert json.loads(data)["errors"][0]["code"] == 200
    peer.ok("cancel-wait-calc", accept_id=accept_id, delete="force")


ENDS = ["a character that is not base64", "padding in the middle", "a lone surrogate", "an end within the string", "an end after the string",
        "something behind it",
        "a key twice", "a name that is too long", "NaN", "nesting", "a number without end", "an escaped quote", "a broken \\u"]


@pytest.fixture(scope="module")
def ended(world):
    """A fielded calculation that waits for its results."""
    accept_id = Peer(world).register()
    Peer(world).walk(accept_id, "calc-end")
    return accept_id


@pytest.mark.parametrize("what", ENDS)
def test_a_large_bad_body_is_400_in_the_envelope_and_nothing_is_half_registered(world, peer, ended, what):
    text = BAD[what].replace(LONG_TEXT[:-4], LONG_TEXT[:-4] * 200).replace(b64(b"x" * 1000), b64(b"x" * 100000))[1:]      # over LONG_STRING
    before = ids(world)
    for name, more in (("add-calcinfo", ""), ("send-results", '"accept_id": "%s", "site_id": "%s", ' % (ended, SITE))):
        status, data, headers = peer.raw("POST", name, wrapped(more + text, name))
        first = json.loads(data)["errors"][0]
        assert (status, first["code"]) == (400, 400) and "json" in headers["Content-Type"], (name, first)
        assert "/" not in first["message"].replace("/mi-", "") and len(first["message"]) < 400          # no path of ours
        unchanged(world, before, ended)


@pytest.mark.parametrize("what", ["a character that is not base64", "padding in the middle", "a length that is not a multiple of four", "an escaped quote"])
def test_a_small_file_that_is_not_base64_is_refused_as_well(world, peer, ended, what):
    content, before = json.loads(BAD[what].replace("\\t", ""))["a"], ids(world)
    info = dict(calc_info(SITE), parameter_files={"a": [content, "text/plain;", "charset=us-ascii"]})
    assert peer.code("add-calcinfo", **{"calc-info": info})[1] == 400
    entry = {"content": content, "mimetype1": "text/plain;", "mimetype2": "charset=us-ascii"}
    assert peer.code("send-results", accept_id=ended, site_id=SITE, result_files={"out.txt": entry})[1] == 400
    unchanged(world, before, ended)


def test_a_body_that_is_cut_leaves_nothing_behind(world, peer, ended):
    before, body = ids(world), wrapped('"accept_id": "%s", "site_id": "%s"}' % (ended, SITE), "send-results")
    for name in ("add-calcinfo", "send-results"):
        for part in (100, 300000, len(body) - 1):
            sock = socket.create_connection(("127.0.0.1", world.port))
            sock.sendall(("POST /mi-distcomp-api/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n" % (
                name, world.token, len(body))).encode() + body[:part])
            sock.close()
            unchanged(world, before, ended)


def test_a_body_beyond_v1_max_body_is_413_in_the_envelope(world, peer):
    for name in ("add-calcinfo", "send-results"):
        sock = socket.create_connection(("127.0.0.1", world.port))
        sock.sendall(("POST /mi-distcomp-api/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n" % (
            name, world.token, 400 * MIB + 1)).encode())
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 413 and json.loads(answer.read())["errors"][0]["code"] == 413
        sock.close()


@pytest.mark.parametrize("where", [{"command": "x" * 100000}, {"note": "A" * 200000}, {"note": [{"deep": "A" * 200000}]},
        {"remote-site": "A" * 100000}, {"parameters": "A" * 70000}],
                         ids=["command", "an unknown key", "deep in an unknown key", "site", "parameters"])
def test_a_long_text_where_no_file_belongs_is_refused_in_order(world, peer, where):
    before = ids(world)
    info = dict(calc_info(SITE), parameter_files={"big": [b64(b"\0" * LONG), "a", "b"]}, **where)
    status, first = peer.call("add-calcinfo", **{"calc-info": info})
    assert status in (400, 202) and first["code"] in (400, "400", 401) and "Blob" not in first["message"] and "spool" not in first["message"]
    unchanged(world, before)


def test_a_long_accept_id_is_refused_in_order(world, peer, ended):
    body = {"accept_id": "A" * 100000, "site_id": SITE, "result_files": results({"out.txt": b"\0" * LONG})}
    assert peer.code("send-results", **body) == (200, 400)
    body = {"accept_id": ended, "site_id": SITE, "result_files": {"out.txt": {"content": b64(b"\0" * LONG), "mimetype1": "Error", "mimetype2": "A" * 100000}}}
    status, first = peer.call("send-results", **body)
    assert first["code"] == 200 or first["code"] == 400, first


def test_many_files_that_are_small_one_by_one_come_and_go_in_one_body(world, peer):
    """None of them is long, all together are more than JSON may be."""
    site, rng = SITE, random.Random(5)
    files = {"f%03d.dat" % number: bytes(rng.randrange(256) for turn in range(97)) * rng.randrange(1, 500) for number in range(300)}
    assert sum(map(len, files.values())) * 4 // 3 > 2 * relay.MAX_JSON and max(map(len, files.values())) * 4 // 3 < relay.LONG_STRING
    accept_id = peer.register(site, files=files, names=tuple(files))
    found = peer.call("calc-params", accept_id=accept_id, site_id=site)[1]["calc-info"]["parameter_files"]
    assert {name: base64.b64decode(entry[0]) for name, entry in found.items()} == files
    for name, more in (("calc-params-complete", {}), ("calc-start", {}), ("calc-end", {"result": "calc end"}), ("send-results",
            {"result_files": results(files)}),
                       ("end-send", {"result": "end send"})):
        peer.ok(name, accept_id=accept_id, site_id=site, **more)
    found = peer.ok("get-calc-result", accept_id=accept_id)["result-info"]["result_files"]
    assert {name: base64.b64decode(entry["content"]) for name, entry in found.items() if name not in LOGS} == files


def test_files_that_are_not_results_leave_nothing_in_the_spool(world, peer):
    info = calc_info(SITE, files={"a": b"\1" * LONG})
    info["result_files"]["out.txt"]["content"] = b64(b"\2" * 100000)
    accept_id = peer.ok("add-calcinfo", **{"calc-info": info})["accept_id"]
    assert [size for name, size in world.picture(accept_id)[2]] == [LONG]
    peer.ok("cancel-wait-calc", accept_id=accept_id, delete="force")


def test_a_peer_of_our_own_reads_the_same_bytes_and_the_other_way_round(world, peer):
    data = os.urandom(LONG + 1)
    peer.ok("allow-wait-calc", accept_id=peer.ok("add-calcinfo", **{"calc-info": calc_info(SITE, files={"a": data, "b": b""})})["accept_id"])
    client = world.client()
    accept_id, claim = client.claim()
    for number, wanted in enumerate((data, b"")):
        assert client.raw("GET", "files/%s/input/%d?v=2&claim=%s" % (accept_id, number, claim))[1] == wanted
    client.walk(accept_id, claim, "end-send", {"out.txt": data[::-1]})
    found = peer.ok("get-calc-result", accept_id=accept_id)["result-info"]["result_files"]
    assert base64.b64decode(found["out.txt"]["content"]) == data[::-1]


class Long:
    """A body or an answer with one long file inside, as a stream; its base64 is a block again and again."""

    block = base64.b64encode(bytes(range(256)) * 3 * 1024)            # 1 MiB

    def __init__(self, before, count, after):
        self.before, self.count, self.after = before.encode("utf-8"), count, after.encode("utf-8")
        self.length = len(self.before) + count * len(self.block) + len(self.after)

    def __iter__(self):
        yield self.before
        for turn in range(self.count):
            yield self.block
        yield self.after


def post(world, name, body):
    """(HTTP status, errors[0]) of a body that is sent as a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=120)
    connection.request("POST", "/mi-distcomp-api/" + name, iter(body), {"Authorization": "Bearer " + world.token, "Content-Length": str(body.length)})
    answer = connection.getresponse()
    found = json.loads(answer.read().decode())["errors"][0]
    connection.close()
    return answer.status, found


def take(world, target, count):
    """Reads an answer with that many blocks inside as a stream: it with the file taken out, parsed. Its length is exact."""
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=120)
    connection.request("GET", "/mi-distcomp-api/" + target, None, {"Authorization": "Bearer " + world.token})
    answer, size = connection.getresponse(), len(Long.block)
    length, head = int(answer.headers["Content-Length"]), b""
    while Long.block[:1000] not in head:
        head += answer.read(1000)
        assert len(head) < 100000
    at = head.index(Long.block[:1000])
    around, rest = head[:at], head[at:]
    for turn in range(count):
        rest += answer.read(size - len(rest))
        assert rest == Long.block, turn
        rest = b""
    around += answer.read()
    assert length == len(around) + count * size
    connection.request("GET", "/mi-distcomp-api/calc-status?accept_id=" + unknown(), None, {"Authorization": "Bearer " + world.token})
    assert connection.getresponse().status == 200      # the connection goes on where the answer ended
    connection.close()
    return json.loads(around.decode("utf-8"))


def test_a_body_of_300_mib_each_way_takes_less_than_64_mib_of_memory(world, peer):
    count, results_count = 300, 100
    info = json.dumps(dict(calc_info(SITE), parameter_files={"big": ["@", "a", "b"]}), ensure_ascii=False)
    status, first = post(world, "add-calcinfo", Long('{"calc-info": ' + info.split("@")[0], count, info.split("@")[1] + "}"))
    assert (status, first["code"]) == (200, 200)
    accept_id, me = first["accept_id"], {"accept_id": first["accept_id"], "site_id": SITE}
    peer.ok("allow-wait-calc", accept_id=accept_id)
    found = take(world, "calc-params?accept_id=%s&site_id=%s" % (accept_id, SITE), count)
    assert found["calc-info"]["parameter_files"]["big"] == ["", "application/octet-stream;", "charset=binary"]
    peer.ok("calc-params-complete", **me)
    peer.ok("calc-start", **me)
    peer.ok("calc-end", result="calc end", **me)
    text = json.dumps(dict(me, result_files={"out.txt": {"mimetype1": "a", "content": "@", "mimetype2": "b"}}))
    status, first = post(world, "send-results", Long(text.split("@")[0], results_count, text.split("@")[1]))
    assert (status, first["code"]) == (200, 200)
    peer.ok("end-send", result="end send", **me)
    found = take(world, "get-calc-result?accept_id=" + accept_id, results_count)
    assert found["errors"][0]["result-info"]["result_files"]["out.txt"]["content"] == ""
    assert world.relay.peak() <= 64 * MIB
