"""The shared block `wire`: the relay's client, over lines and through proxies that do everything wrong that lines and proxies do."""
import base64
import hashlib
import http.client
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import pytest

import suite
sys.path.insert(0, suite.ROOT)
import mi_system_wf as wf
from fake_relay import ACCEPT_ID, Cut, Fake, entry

INPUT, RESULT = "files/%s/input" % ACCEPT_ID, "files/%s/result" % ACCEPT_ID
HTML = (502, b"<html>bad gateway</html>", {"Content-Type": "text/html"})


@pytest.fixture
def make(request):
    """A function that makes a Fake and a Relay that talks to it; the Relay never really sleeps, but notes its pauses and notices."""
    def made(**keywords):
        fake = Fake(**keywords)
        request.addfinalizer(fake.stop)
        return fake, client(fake)
    return made


def client(fake):
    relay = wf.RelayClient(fake.url, lambda: "token")
    relay.pauses, relay.notices = [], []
    relay.pause, relay.on_outage = relay.pauses.append, relay.notices.append
    return relay


def offer(fake, tmp_path, *datas):
    """Files on the disk, as upload_all() takes them, and in the fake's manifest."""
    files = []
    for n, data in enumerate(datas):
        path = os.fsencode(str(tmp_path / ("%05d" % n)))
        with open(path, "wb") as out:
            out.write(data)
        files.append((path, len(data)))
    fake.manifest = [("%05d" % n, entry(data)) for n, data in enumerate(datas)]
    return files


# ---- calls

def test_a_kept_connection_that_was_dropped_meanwhile_is_opened_again_without_a_word(make):
    def drop(request):
        request.close_connection = True                # after this answer, without saying so
    fake, relay = make(misbehave=drop)
    for n in range(3):
        assert relay.call("GET", "calc-progress", {"v": 2})["code"] == 200
        assert relay.call("POST", "finish", {"v": 2})["code"] == 200
    assert not relay.notices and not relay.pauses


def test_a_kept_connection_is_kept(make):
    fake, relay = make()
    relay.learn()
    before = relay.connection.sock.getsockname()
    for n in range(5):
        relay.call("POST", "finish", {"v": 2})
    with pytest.raises(wf.RelayRefused):
        fake.misbehave = lambda request: request.no(404)
        relay.call("POST", "finish", {"v": 2})
    assert relay.connection.sock.getsockname() == before


def test_html_of_a_gateway_is_away_and_is_asked_again_with_one_notice_for_all(make):
    count = []

    def three(request):
        count.append(1)
        return HTML if len(count) < 4 else None
    fake, relay = make(misbehave=three)
    assert relay.ask("GET", "calc-progress", {"v": 2})["progress"] == "got return"
    assert len(relay.notices) == 2 and relay.notices[1] is None and "HTTP 502" in str(relay.notices[0])
    assert len(relay.pauses) == 3 and all(0.4 < pause < 7 for pause in relay.pauses)


def test_patience_is_counted_in_seconds_and_then_the_last_error_is_raised(make):
    fake, relay = make(misbehave=lambda request: HTML)
    relay.pause = wf.time.sleep
    begun = wf.time.monotonic()
    with pytest.raises(wf.RelayAway) as caught:
        relay.ask("GET", "calc-progress", {"v": 2}, patience=0.3)
    assert caught.value.kind == "between" and 0.25 < wf.time.monotonic() - begun < 2


def test_a_redirect_is_not_followed_and_the_token_stays_here(make):
    other, ignored = make()
    fake, relay = make(misbehave=lambda request: (302, b"", {"Location": other.url + "/mi-distcomp-api/version"}))
    with pytest.raises(wf.RelayAway):
        relay.call("POST", "finish", {"v": 2})
    assert relay.learn() == (1, {})
    assert not other.calls


@pytest.mark.parametrize("answer", [(404, b"<html>", {}), (403, b"{}", {}), (200, b"[1]", {}), (200, b"\xff", {}), (200, b'{"errors":[]}', {}),
                                    (200, b'{"errors":[{"code":"0005","message":"no"}]}', {}), (301, b"", {"Location": "http://127.0.0.1:1/"})])
def test_whatever_is_no_version_2_is_a_fielded_relay(make, answer):
    fake, relay = make(misbehave=lambda request: answer)
    assert relay.learn(0)[0] == 1


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b'{"errors":{}}', b'{"errors":[{}]}', b'{"errors":[[]]}', b"[" * 100000, b"\xff\xfe", b'"text"'])
def test_an_answer_that_is_not_the_relays_is_never_more_than_away(make, body):
    fake, relay = make(misbehave=lambda request: (200, body, {}))
    with pytest.raises(wf.RelayAway):
        relay.call("POST", "finish", {"v": 2})


def test_an_answer_without_end_is_cut_off(make):
    def endless(request):
        request.send_response(200)
        request.end_headers()
        while True:
            request.wfile.write(b" " * 65536)
    fake, relay = make(misbehave=endless)
    with pytest.raises(wf.RelayAway) as caught:
        relay.call("POST", "finish", {"v": 2})
    assert "without end" in str(caught.value)


def test_an_answer_in_chunks_of_a_proxy_is_read(make):
    def chunked(request):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for part in (b'{"errors":[{"code":200,', b'"x":1}]}'):
            request.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        request.wfile.write(b"0\r\n\r\n")
        request.wfile.flush()
        raise Cut
    fake, relay = make(misbehave=chunked)
    assert relay.call("POST", "finish", {"v": 2})["x"] == 1


HEADS = {                      # the head of an answer: (status, bytes of its body that are due, does the line end?), or what is said of it
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n": (200, 5, False),
    b"HTTP/1.1 200\nCONTENT-length:5\n\n": (200, 5, False),
    b"HTTP/1.0 404 no such thing\r\nContent-Length:  5 \r\n\r\n": (404, 5, True),
    b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: Keep-Alive\r\n\r\n": (200, 5, False),
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: x, Close\r\n\r\n": (200, 5, True),
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n": (200, 5, False),
    b"HTTP/1.1 200 OK\r\nX: a\r\n Content-Length: 9\r\nContent-Length: 5\r\n\r\n": (200, 5, False),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nContent-Length: 5\r\n\r\n": (200, None, False),
    b"HTTP/1.1 200 OK\r\n\r\n": (200, None, True),
    b"HTTP/1.1 204 No Content\r\n\r\n": (204, 0, False),
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n": (101, None, True),
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n": (200, 5, False),
    b"HTTP/1.1 102 Processing\r\n\r\n" * 101: "an answer without end",
    b"": "closed connection without response",
    b"HTTP/1.1 200 OK\r\nContent-Le": "cut off",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000: "an answer without end",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000: "an answer without end",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n": "Content-Length",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n": "Content-Length '-5'",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n": "Content-Length '999",
    b"HTTP/1.1 200 OK\r\nContent-Length: \x1b[2J\r\n\r\n": "Content-Length '\\x1b[2J'",
    "HTTP/1.1 200 OK\r\nContent-Length: \u00b2\r\n\r\n".encode("latin-1"): "Content-Length",
    b"\x15\x03\x03\x00\x02\x02F\n\n": "not an HTTP answer",
    b"HTTP/2 200\r\n\r\n": "not an HTTP answer",
    b"HTTP/1.1 2000 OK\r\n\r\n": "not an HTTP answer",
    b"HTTP/1.1 003 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n": "not an HTTP answer",
    b"\r\n\r\n": "not an HTTP answer"}


def test_the_head_of_an_answer_says_what_is_due_or_is_none():
    for head, wanted in HEADS.items():
        try:
            answer = wf.HttpAnswer(io.BufferedReader(io.BytesIO(head)))
            found = answer.status, answer.length, answer.will_close
        except ConnectionError as error:
            found = str(error)
        assert found == wanted or isinstance(wanted, str) and wanted in found, (head[:200], found)


CHUNKS = {                     # a body in chunks: what it is, or what is said of it
    b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n": b"abcde",
    b"3\r\nabc\r\n0\r\nX: y\r\n\r\n": b"abc",
    b"3\r\nabc\r\n": "cut off",
    b"3\r\nab": "cut off",
    b"-3\r\nabc\r\n0\r\n\r\n": "cut off",
    b"_3\r\nabc\r\n0\r\n\r\n": "cut off",
    b"0x3\r\nabc\r\n0\r\n\r\n": "cut off",
    b"f" * 5000 + b"\r\nabc": "cut off",
    b"0\r\n" + b"X: y\r\n" * 1000: "an answer without end"}


def test_a_body_in_chunks_is_read_to_its_end_or_not_believed():
    for body, wanted in CHUNKS.items():
        found, view = b"", memoryview(bytearray(100))
        try:
            answer = wf.HttpAnswer(io.BufferedReader(io.BytesIO(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)))
            for got in iter(lambda: answer.readinto(view), 0):
                found += view[:got]
        except ConnectionError as error:
            found = str(error)
        assert found == wanted, (body[:200], found)


def test_nothing_that_is_not_one_line_goes_into_the_head_of_a_request(make):
    fake, relay = make()
    for target in ("version?v=2 HTTP/1.1\r\nX: y", "version HTTP/1.1", "version\0"):
        with pytest.raises(wf.RelayAway):
            relay.exchange("GET", target)
    with pytest.raises(wf.RelayAway):
        relay.exchange("GET", "version", headers=[("Range", "bytes=1-\r\nX: y")])
    assert not fake.calls


def test_what_a_relay_says_is_printable_and_short(make):
    fake, relay = make(misbehave=lambda request: request.no(404, message="\x1b[2J\nfake" + "x" * 100000))
    with pytest.raises(wf.RelayRefused) as caught:
        relay.call("POST", "finish", {"v": 2})
    assert str(caught.value).startswith("\\x1b[2J\\x0afake") and len(str(caught.value)) < 5000


# ---- uploads

def test_a_large_file_goes_in_pieces_and_arrives_whole(make, tmp_path):
    fake, relay = make()
    data = os.urandom(3000001)
    files, moved = offer(fake, tmp_path, data), []
    relay.piece_size = relay.piece_max = 1 << 20
    relay.upload_all(INPUT, files, moved=moved.append)
    assert fake.uploads[0] == data and sum(moved) == len(data)


def test_an_upload_that_is_cut_in_mid_piece_goes_on_where_it_stopped(make, tmp_path):
    fake, relay = make()
    data = os.urandom(3 << 20)
    files, moved = offer(fake, tmp_path, data), []
    relay.piece_size = relay.piece_max = 1 << 20
    cuts = []

    def twice(request):
        if len(cuts) < 2 and request.method == "POST" and int(request.query["offset"]) > 0:
            cuts.append(1)
            fake.uploads[0] += request.take(300001)
            raise Cut
    fake.misbehave = twice
    relay.upload_all(INPUT, files, moved=moved.append)
    assert fake.uploads[0] == data and sum(moved) == len(data) and len(cuts) == 2
    assert [call for call in fake.calls if call[0] == "GET"] and relay.notices[-1] is None


def test_an_upload_whose_last_answer_was_lost_is_not_sent_twice(make, tmp_path):
    fake, relay = make()
    data = os.urandom(100000)
    files = offer(fake, tmp_path, data)

    def lose(request):
        if request.method == "POST":
            request.proper()
            fake.misbehave = lambda request: None
            raise Cut
    fake.misbehave = lose
    relay.upload(INPUT + "/0", files[0][0], len(data))
    assert fake.uploads[0] == data and len([1 for call in fake.calls if call[0] == "POST"]) == 1


@pytest.mark.parametrize("html", [False, True])
def test_a_413_halves_the_pieces_for_good_and_without_a_pause(make, tmp_path, html):
    fake, relay = make()
    data = os.urandom(2000003)
    files = offer(fake, tmp_path, data)

    def small(request):
        if request.length > 300000:
            return (413, b"<html>too large</html>", {"Connection": "close"}) if html else request.no(413)
    fake.misbehave = small
    relay.upload_all(INPUT, files)
    assert fake.uploads[0] == data and relay.piece_max <= 300000 and not relay.pauses
    sent = [call for call in fake.calls if call[0] == "POST"]
    assert len(sent) < 20


def test_a_line_that_breaks_off_large_bodies_without_a_word_gets_small_ones(make, tmp_path):
    fake, relay = make()
    data = os.urandom(2000003)
    files = offer(fake, tmp_path, data)

    def small(request):
        if request.length > 300000:
            raise Cut
    fake.misbehave = small
    relay.upload_all(INPUT, files)
    assert fake.uploads[0] == data and len(relay.pauses) < 20


def test_a_line_that_takes_nothing_at_all_is_an_error_not_a_loop(make, tmp_path):
    fake, relay = make(misbehave=lambda request: request.no(413))
    with pytest.raises(wf.RelayRefused):
        relay.upload_all(INPUT, offer(fake, tmp_path, b"x" * 500000))
    assert len(fake.calls) < 12


@pytest.mark.parametrize("offset", [7, 0, -1, "x", None, True, 10 ** 30])
def test_a_relay_that_stays_where_it_is_is_an_error_not_a_loop(make, tmp_path, offset):
    fake, relay = make(misbehave=lambda request: request.no(409, offset=offset))
    with pytest.raises((wf.RelayRefused, ValueError)):
        relay.upload_all(INPUT, offer(fake, tmp_path, b"x" * 500000))
    assert len(fake.calls) < 20


def test_a_file_that_is_not_what_was_declared_is_given_up_after_three_times(make, tmp_path):
    fake, relay = make()
    files = offer(fake, tmp_path, b"as it was")
    with open(files[0][0], "wb") as out:
        out.write(b"as it is!")
    with pytest.raises(ValueError) as caught:
        relay.upload_all(INPUT, files)
    assert "00000" in str(caught.value) and "declared" in str(caught.value)
    assert len([1 for call in fake.calls if call[0] == "POST"]) == 3


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("what", ["shorter", "gone"])
def test_a_file_that_changes_while_it_is_sent_is_named_at_once(make, tmp_path, what, many):
    fake, relay = make()
    files = offer(fake, tmp_path, *([b"x" * 600000] * (3 if many else 1)))
    at = files[-1][0]
    os.truncate(at, 5) if what == "shorter" else os.unlink(at)
    begun = wf.time.monotonic()
    with pytest.raises(ValueError) as caught:
        relay.upload_all(INPUT, files)
    assert os.path.basename(at).decode() in str(caught.value) and wf.time.monotonic() - begun < 5 and not relay.pauses
    assert relay.connection is None or not fake.calls                # half a request is not followed by another


def test_small_files_go_in_packs_in_order_large_ones_between_them(make, tmp_path):
    fake, relay = make()
    datas = [os.urandom(n % 7 * 100) for n in range(3000)] + [os.urandom(1 << 20), os.urandom((1 << 20) + 1), b"", b"last"]
    files, moved = offer(fake, tmp_path, *datas), []
    relay.upload_all(INPUT, files, moved=moved.append)
    assert [fake.uploads[n] for n in range(len(datas))] == datas and sum(moved) == sum(map(len, datas))
    assert len(fake.calls) <= 6


def test_only_the_files_that_are_asked_for_go(make, tmp_path):
    fake, relay = make()
    files = offer(fake, tmp_path, *[b"%d" % n for n in range(20)])
    relay.upload_all(INPUT, files, [3, 4, 5, 9, 19])
    assert sorted(fake.uploads) == [3, 4, 5, 9, 19]


def test_packs_shrink_where_bodies_are_cut_down(make, tmp_path):
    fake, relay = make()
    datas = [os.urandom(50000) for n in range(40)]
    fake.misbehave = lambda request: request.no(413) if request.length > 120000 else None
    relay.upload_all(INPUT, offer(fake, tmp_path, *datas))
    assert [fake.uploads[n] for n in range(40)] == datas and not relay.pauses


def test_a_pack_with_a_wrong_sum_names_the_file(make, tmp_path):
    fake, relay = make()
    files = offer(fake, tmp_path, b"a", b"b", b"c")
    fake.misbehave = lambda request: request.no(422, wrong=[1])
    with pytest.raises(ValueError) as caught:
        relay.upload_all(INPUT, files)
    assert "00001" in str(caught.value)


# ---- downloads

def entries(fake):
    return [(n, name, len(data), hashlib.sha256(data).hexdigest()) for n, (name, data) in enumerate(fake.results.items())]


def fetch(relay, fake, tmp_path, listed=None):
    """All of fake's results by download_all(), as {name: bytes}."""
    got = {}

    def part(number):
        return os.fsencode(str(tmp_path / ("part%d" % number)))

    def store(number, name, data):
        if data is None:
            with open(part(number), "rb") as source:
                data = source.read()
        got[name] = bytes(data)
    relay.download_all(RESULT, entries(fake) if listed is None else listed, store, part)
    return got


def test_results_small_and_large_and_empty_arrive_as_they_are(make, tmp_path):
    datas = {"%05d" % n: os.urandom(n % 5 * 211) for n in range(1500)}
    datas.update({"a": b"", "b": os.urandom((1 << 20) + 5), "c": b"x", "d": b"", "e": os.urandom(1 << 20)})
    fake, relay = make(results=datas)
    assert fetch(relay, fake, tmp_path) == datas and len(fake.calls) <= 5


def test_thousands_of_empty_files_cost_one_call(make, tmp_path):
    fake, relay = make(results={"%05d" % n: b"" for n in range(2000)})
    assert len(fetch(relay, fake, tmp_path)) == 2000 and len(fake.calls) == 1


def test_a_download_that_is_cut_goes_on_where_it_stopped(make, tmp_path):
    data = os.urandom(3 << 20)
    fake, relay = make(results={"a": data})
    count = []

    def cut(request):
        count.append(request.headers.get("Range"))
        if len(count) < 3:
            begin = int(re.sub(r"\D", "", count[-1] or "0"))
            request.send_response(206 if begin else 200)
            request.send_header("Content-Type", "application/octet-stream")
            request.send_header("Content-Length", str(len(data) - begin))
            request.end_headers()
            request.wfile.write(data[begin:begin + (1 << 20)])
            request.wfile.flush()
            raise Cut
    fake.misbehave = cut
    assert fetch(relay, fake, tmp_path) == {"a": data}
    assert count[0] is None and all(int(re.sub(r"\D", "", text)) > 700000 * n for n, text in enumerate(count[1:], 1))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_partial_file_of_an_earlier_run_is_gone_on_with(make, tmp_path, ranges):
    data = os.urandom(3 << 20)
    fake, relay = make(results={"a": data})
    (tmp_path / "part0").write_bytes(data[:2 << 20])
    if not ranges:
        fake.misbehave = lambda request: (200, data, {"Content-Type": "application/octet-stream"})
    moved = []
    relay.download(RESULT + "/0", os.fsencode(str(tmp_path / "part0")), len(data), hashlib.sha256(data).hexdigest(), moved=moved.append)
    assert (tmp_path / "part0").read_bytes() == data and sum(moved) == len(data) and len(fake.calls) == 1


@pytest.mark.parametrize("left", [b"x" * 100, b"x" * (3 << 20), b"x" * (4 << 20)])
def test_a_wrong_partial_file_is_fetched_anew(make, tmp_path, left):
    data = os.urandom(3 << 20)
    fake, relay = make(results={"a": data})
    (tmp_path / "part0").write_bytes(left)
    assert fetch(relay, fake, tmp_path) == {"a": data}


@pytest.mark.parametrize("size", [10, 3 << 20])
def test_a_result_that_arrives_wrong_three_times_is_given_up_and_not_stored(make, tmp_path, size):
    fake, relay = make(results={"a": b"x" * size})
    listed = [(0, "a", size, "0" * 64)]
    stored = []
    with pytest.raises(ValueError):
        relay.download_all(RESULT, listed, lambda *words: stored.append(words), lambda number: os.fsencode(str(tmp_path / "p")))
    assert not stored and len(fake.calls) == 3


def test_a_pack_that_does_not_match_the_list_is_an_error_not_a_loop(make, tmp_path):
    fake, relay = make(results={"a": b""})
    with pytest.raises(ValueError):
        fetch(relay, fake, tmp_path, [(0, "a", 5, "0" * 64)])


def test_a_part_file_that_is_a_symbolic_link_is_not_written_through(make, tmp_path):
    fake, relay = make(results={"a": b"x" * (2 << 20)})
    (tmp_path / "victim").write_bytes(b"keep")
    (tmp_path / "part0").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        fetch(relay, fake, tmp_path)
    assert (tmp_path / "victim").read_bytes() == b"keep"


def test_a_store_that_fails_leaves_no_connection_in_mid_answer(make, tmp_path):
    fake, relay = make(results={"a": b"x" * 500000, "b": b"y" * 500000})

    def store(number, name, data):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        relay.download_all(RESULT, entries(fake), store, None)
    assert relay.call("POST", "finish", {"v": 2})["code"] == 200


@pytest.mark.parametrize("page", [
    {"files": {"../x": entry(b"")}}, {"files": {"/x": entry(b"")}}, {"files": {"b": entry(b""), "a": entry(b"")}},
    {"files": {"a": entry(b""), "a/b": entry(b"")}}, {"files": {"a": {}}}, {"files": {"a": None}}, {"files": {"a": {"size": -1, "sha256": "0" * 64}}},
    {"files": {"a": {"size": 1, "sha256": "x"}}}, {"files": {"a\nb": entry(b"")}}, {"files": [1]}, {"files": "x"},
    {"files": {"a": entry(b"")}, "next": 2}, {"files": {}, "next": 0}, {"files": {"a": entry(b"")}, "next": "1"},
    {"files": {"é": entry(b""), "e\u0301": entry(b"")}}, {"files": {"a\u202eb": entry(b"")}}])
def test_a_list_of_files_that_is_not_in_order_is_refused(make, page):
    fake, relay = make()
    with pytest.raises(ValueError):
        list(relay.manifest_entries(RESULT, page))


# ---- the forms in which something in between passes answers on

def in_chunks(size, extension=b"", trailer=b""):
    """A body as HTTP's chunks of so many bytes."""
    def made(body):
        parts = [body[at:at + size] for at in range(0, len(body), size)]
        return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n%s\r\n" % trailer
    return made


CHUNKED = b"HTTP/1.1 %s\r\nTransfer-Encoding: chunked\r\n"
FORMS = {                      # name: what stands before the answer, its head, its body; does the connection live on?
    "as the relay sends it": (b"", b"HTTP/1.1 %s\r\nContent-Length: %d\r\n", None, True),
    "in chunks": (b"", CHUNKED, in_chunks(8192), True),
    "in small chunks with extensions and a trailer": (b"", CHUNKED, in_chunks(301, b";a=b", b"X-Sum: 1\r\n"), True),
    "in one chunk": (b"", CHUNKED, in_chunks(1 << 30), True),
    "HTTP/1.0 without a length": (b"", b"HTTP/1.0 %s\r\n", None, False),
    "HTTP/1.0 with a length": (b"", b"HTTP/1.0 %s\r\nContent-Length: %d\r\n", None, False),
    "HTTP/1.1 until the connection's end": (b"", b"HTTP/1.1 %s\r\nConnection: close\r\n", None, False),
    "behind early hints": (b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
                           b"HTTP/1.1 %s\r\nContent-Length: %d\r\n", None, True),
    "in chunks behind early hints": (b"HTTP/1.1 103 Early Hints\r\n\r\n", CHUNKED, in_chunks(8192), True)}


class Gateway(suite.Listener):
    """Passes requests on to a relay on a port of this host, and its answers back in one of FORMS. cut: {(method, name): bytes
    after which one body ends}; taken: connections; asked: told of each request before its answer goes."""

    def __init__(self, port, form):
        self.target, self.form, self.taken, self.cut, self.asked = port, FORMS[form], 0, {}, lambda method, target: None
        suite.Listener.__init__(self)

    def one(self, sock):
        self.taken += 1
        reading = sock.makefile("rb")
        with sock, reading:
            try:
                while self.request(sock, reading):
                    pass
            except (OSError, http.client.HTTPException, ValueError):
                pass

    def request(self, sock, reading):
        """One request and its answer. False: the connection ends."""
        method, target = reading.readline().decode().split()[:2]
        headers = http.client.parse_headers(reading)
        body = reading.read(int(headers.get("Content-Length", 0)))
        relay = http.client.HTTPConnection("127.0.0.1", self.target, timeout=30)
        relay.request(method, target, body, dict(headers.items()))
        answer = relay.getresponse()
        data, status = answer.read(), b"%d %s" % (answer.status, answer.reason.encode())
        before, head, framed, lives = self.form
        kept = [line for line in answer.msg.items() if line[0].lower() not in ("content-length", "connection")]
        head = head % ((status, len(data)) if b"%d" in head else (status,)) + "".join("%s: %s\r\n" % line for line in kept).encode() + b"\r\n"
        out = framed(data) if framed else data
        self.asked(method, target)
        cut = self.cut.pop((method, target.partition("?")[0].split("/")[-1]), None)
        sock.sendall(before + head + out[:cut])
        relay.close()
        return lives and cut is None and "close" not in headers.get("Connection", "")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    made = suite.World(tmp_path_factory.mktemp("plain"), tls=False, commands=["hello"]).start()
    yield made
    made.close()


@pytest.fixture
def between(plain, request):
    """A function that makes a Gateway before the relay and a client that talks through it."""
    def made(form):
        gateway = Gateway(plain.port, form)
        request.addfinalizer(gateway.close)
        relay = wf.RelayClient(gateway.url, lambda: plain.token)
        relay.pauses = []
        relay.pause = relay.pauses.append
        return gateway, relay
    return made


INPUTS = {"a": b"", "b": b"x" * 5000, "c": b"small", "d": os.urandom((1 << 20) + 17), "e": b"y" * 5000, "f": b""}


def carried(relay, tmp_path, inputs=INPUTS):
    """One calculation by the calls of both sides: its results are its inputs; {name: bytes} as they came back. Every kind of answer is in it."""
    assert relay.learn()[0] == 2
    tmp_path.mkdir()
    files = []
    for name, data in sorted(inputs.items()):
        (tmp_path / name).write_bytes(data)
        files.append((os.fsencode(str(tmp_path / name)), len(data), name, hashlib.sha256(data).hexdigest()))
    listed = {name: entry(data) for name, data in sorted(inputs.items())}
    accept_id = relay.ask("POST", "add-calcinfo", {"v": 2, "request_id": os.urandom(8).hex(), "calc-info": {
        "command": "hello", "remote-site": suite.SITE, "parameters": "", "parameter_files": listed, "result_files": {name: {} for name in inputs}}})["accept_id"]
    relay.upload_all("files/%s/input" % accept_id, files)
    relay.ask("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    found = relay.ask("POST", "calc-request", {"v": 2, "site_id": suite.SITE, "poller": "test", "take": os.urandom(8).hex(), "wait": 2}, 2)
    assert found["accept_id"] == accept_id
    got, claim = {}, found["claim"]

    def part(number):
        return os.fsencode(str(tmp_path / ("part%d" % number)))

    def store(number, name, data):
        got[name] = bytes(data) if data is not None else (tmp_path / ("part%d" % number)).read_bytes()

    relay.download_all("files/%s/input" % accept_id, relay.manifest_entries("files/%s/input" % accept_id, found["inputs"], claim), store, part, claim)
    assert got == inputs
    shutil.rmtree(str(tmp_path), ignore_errors=True)
    tmp_path.mkdir()
    for name, data in got.items():
        (tmp_path / name).write_bytes(data)
    for name, more in (("calc-params-complete", {}), ("calc-start", {}), ("calc-end", {"result": "calc end", "exit_code": 0}),
                       ("send-results", {"result_files": listed})):
        relay.ask("POST", name, dict({"v": 2, "accept_id": accept_id, "claim": claim}, **more))
    relay.upload_all("files/%s/result" % accept_id, files, claim=claim)
    relay.ask("POST", "end-send", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "end send"})
    assert relay.ask("GET", "calc-progress", {"v": 2, "accept_id": accept_id, "known": ""})["progress"] == "got return"
    page = {"files": relay.ask("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]["result_files"]}
    got.clear()
    large = max(inputs, key=lambda name: len(inputs[name]))           # an earlier run has brought a part of it
    (tmp_path / ("part%d" % sorted(inputs).index(large))).write_bytes(inputs[large][:1000])
    relay.download_all("files/%s/result" % accept_id, relay.manifest_entries("files/%s/result" % accept_id, page), store, part)
    return accept_id, got


@pytest.mark.parametrize("form", FORMS)
def test_every_answer_is_read_in_every_form_that_something_in_between_gives_it(between, tmp_path, form):
    gateway, relay = between(form)
    accept_id, got = carried(relay, tmp_path / "files")
    assert got == INPUTS and not relay.pauses
    with pytest.raises(wf.RelayRefused) as caught:
        relay.call("GET", "calc-progress", {"v": 2, "accept_id": ACCEPT_ID})
    assert caught.value.code == 404
    assert relay.call("POST", "finish", {"v": 2, "accept_id": accept_id})["code"] == 200
    if FORMS[form][3]:
        assert gateway.taken <= 2                      # kept from one call to the next
    old, data = form_v1(relay, tmp_path)
    assert {name: open(found.path, "rb").read() for name, found in old.items() if isinstance(found, wf.Blob)} == {"big": data}


def test_the_next_packs_are_asked_for_before_the_last_one_is_through(between, tmp_path, monkeypatch):
    gateway, relay = between("as the relay sends it")
    monkeypatch.setattr(wf, "PACK_COUNT", 40)
    asked, come, alone = [], threading.Condition(), []

    def hold(method, target):
        if "/pack?" not in target or relay.lanes == 1:
            return
        with come:
            asked.append((method, target.split("?")[0]))
            come.notify_all()
            if not come.wait_for(lambda: asked.count(asked[0]) >= 3 and asked.count((method, target.split("?")[0])) >= 3, 20):
                alone.append((method, target))

    gateway.asked = hold
    inputs = {"f%03d" % n: b"%d" % n for n in range(120)}
    inputs["z"] = os.urandom((1 << 20) + 17)
    assert carried(relay, tmp_path / "files", inputs)[1] == inputs
    assert len(asked) == 12 and not alone and not relay.pauses


def test_with_one_lane_nothing_is_asked_for_ahead(between, tmp_path, monkeypatch):
    gateway, relay = between("as the relay sends it")
    monkeypatch.setattr(wf, "PACK_COUNT", 40)
    relay.lanes = 1
    inputs = {"f%03d" % n: b"%d" % n for n in range(120)}
    inputs["z"] = os.urandom((1 << 20) + 17)
    assert carried(relay, tmp_path / "files", inputs)[1] == inputs and gateway.taken == 1


def test_what_goes_wrong_in_a_row_of_calls_is_told_and_the_next_call_is_answered(make):
    fake, relay = make()
    calls = [("finish", {"v": 2, "n": n}) for n in range(12)]
    relay.ask_in_row(lambda: calls)
    assert len(fake.calls) == 12 and not relay.notices
    fake.misbehave = lambda request: request.no(409) if len(fake.calls) == 20 else None
    with pytest.raises(wf.RelayRefused) as caught:
        relay.ask_in_row(lambda: calls)
    assert caught.value.code == 409 and relay.call("POST", "finish", {"v": 2})["code"] == 200
    for ends in ("unsaid", "said"):                    # the connection ends in the middle, with an answer or without
        del fake.calls[:]

        def end(request):
            if len(fake.calls) == 8:
                if ends == "unsaid":
                    raise Cut
                request.close_connection = True
                return 200, request.ok()[1], [("Connection", "close")]
        fake.misbehave = end
        relay.ask_in_row(lambda: calls)
        assert len(fake.calls) >= 12 and len(relay.notices) == 2, ends           # away, and back


def form_v1(relay, tmp_path):
    """A calculation in the fielded words: (result_files of get-calc-result, what its only one must be)."""
    data = os.urandom(300000)
    path = tmp_path / "fielded"
    path.mkdir()
    text = base64.b64encode(data).decode()
    info = {"command": "hello", "remote-site": suite.SITE, "parameters": "", "result_files": {"big": {"content": "", "mimetype1": "", "mimetype2": ""}},
            "parameter_files": {"big": [text, "application/octet-stream;", "charset=binary"]}}
    accept_id = relay.ask_v1("POST", "add-calcinfo", {"calc-info": info})["accept_id"]
    relay.ask_v1("POST", "allow-wait-calc", {"accept_id": accept_id})
    both = {"accept_id": accept_id, "site_id": suite.SITE}
    found = relay.call_v1("GET", "calc-params", both, folder=os.fsencode(str(path)))["calc-info"]["parameter_files"]["big"][0]
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    os.unlink(found.path)
    for name, more in (("calc-params-complete", {}), ("calc-start", {}), ("calc-end", {"result": "calc end"}), ("send-results", {"result_files": {
            "big": {"content": text, "mimetype1": "application/octet-stream;", "mimetype2": "charset=binary"}}}), ("end-send", {"result": "end send"})):
        relay.ask_v1("POST", name, dict(both, **more))
    found = relay.call_v1("GET", "get-calc-result", {"accept_id": accept_id}, folder=os.fsencode(str(path)))["result-info"]["result_files"]
    return {name: one["content"] for name, one in found.items()}, data


@pytest.mark.parametrize("form", [form for form in FORMS if "early" not in form])
def test_an_answer_that_is_cut_off_is_asked_for_again_in_every_form(between, tmp_path, form):
    """Of a body that only the connection's end ends, too: a file's sum, or JSON that is none, tells. No fielded relay is seen in it."""
    gateway, relay = between(form)
    gateway.cut = {("GET", "version"): 20, ("POST", "calc-request"): 40, ("GET", "pack"): 3000, ("GET", "3"): 70000, ("GET", "get-calc-result"): 60}
    assert carried(relay, tmp_path / "files")[1] == INPUTS
    assert len(relay.pauses) == 5 and not gateway.cut


def test_a_whole_calculation_goes_through_a_gateway_that_gives_no_lengths(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    gateway = Gateway(world.port, "HTTP/1.0 without a length")
    world.url = gateway.url
    world.poller({"hello": "match = hello\nargv =\n    /bin/sh\n    -c\n    cat a b >c; cp c d"})
    folder = os.path.join(world.folder, "wf")
    os.makedirs(folder)
    for name in "ab":
        with open(os.path.join(folder, name), "w") as out:
            out.write(name)
    done = world.workflow("run", suite.SITE, "hello", "--in", "a", "b", "--out", "c", "d")
    gateway.close()
    assert done.returncode == 0 and open(os.path.join(folder, "d")).read() == "ab", done.stdout + done.stderr


# ---- TLS and proxies

def test_certificates_are_checked_and_the_reason_is_told(world, tmp_path):
    other, key = suite.make_certificate(str(tmp_path))
    for ca in ("", other):
        relay = wf.RelayClient(world.url, lambda: world.token, ca_file=ca)
        with pytest.raises(wf.RelayAway) as caught:
            relay.call("GET", "version", {})
        assert caught.value.kind == "certificate" and relay.trust.has_system_cas
    relay = wf.RelayClient(world.url, lambda: world.token, ca_file=world.cert)
    assert relay.learn()[0] == 2 and not relay.trust.has_system_cas                 # the system's CAs were not read for it
    with pytest.raises(wf.Stop) as stopped:
        wf.RelayClient(world.url, lambda: world.token, ca_file=__file__).learn()
    assert stopped.value.code == 78


def test_a_certificate_for_other_names_is_told_with_its_names_and_not_as_a_matter_of_ca_file(make_world):
    world = make_world(commands=["hello"])
    suite.make_certificate(world.folder, names="DNS:relay.example.org,DNS:other.example.org")
    world.start()
    done = world.workflow("run", suite.SITE, "hello")
    assert done.returncode == 69 and "relay.example.org, other.example.org" in done.stderr and "ca-file" not in done.stderr, done.stderr
    done = world.workflow("check")
    assert [line for line in done.stdout.splitlines() if line.startswith("FAIL") and "relay.example.org" in line and "ca_file" not in line], done.stdout
    folder, ini = world.poller({"hello": "argv = /bin/true"}, start=False)
    done = suite.run("mi_system_remote.py", "poll", "--once", "--ini", ini)
    assert done.returncode == 69 and "other.example.org" in done.stderr, done.stderr


def test_certificate_files_are_looked_at_again_and_the_newest_reason_is_shown(make_world):
    """The relay is started again with a new certificate; the poller gets the new CA file later, and needs no restart."""
    world = make_world(commands=["hello"]).start()
    ca = shutil.copy(world.cert, os.path.join(world.folder, "ca.pem"))
    world.cert, own = ca, world.cert
    poller = world.poller({"hello": "argv = /bin/true"})
    suite.wait_until(lambda: os.path.exists(os.path.join(world.folder, "poller", "base", ".mi", "poller")))
    relay = wf.RelayClient(world.url, lambda: world.token, ca_file=ca)
    relay.notices, relay.max_pause = [], 1
    relay.on_outage = relay.notices.append
    assert relay.learn()[0] == 2
    world.relay.stop()
    world.cert = own
    suite.make_certificate(world.folder)
    relay.close()
    relay.pause = lambda wait: world.relay.alive() or world.start()   # the second attempt meets the new certificate, the third the new CA file
    told = []

    def notice(why):
        told.append(str(why))
        if "TLS failed" in str(why):
            suite.wait_until(lambda: "TLS failed" in poller.text(), what="the poller's newest reason")
            shutil.copy(own, ca)
    relay.on_outage = notice
    assert relay.learn()[0] == 2
    assert len(told) == 3 and "refused" in told[0] and "TLS failed" in told[1] and told[2] == "None"
    suite.wait_until(lambda: "relay answers again" in poller.text(), 120)        # it asks again after about as long as the relay was away
    with open(ca, "w") as out:
        out.write("half a certi")
    relay.close()
    assert relay.learn()[0] == 2                       # a file in the making: the one before is good meanwhile


def test_a_client_certificate_that_was_renewed_is_shown_at_the_next_connection(tmp_path):
    one, key = suite.make_certificate(str(tmp_path))
    trust = wf.Trust(one, True, one, key)
    first = trust.current_context()
    assert trust.current_context() is first
    suite.make_certificate(str(tmp_path))
    assert trust.current_context() is not first and trust.current_context() is trust.current_context()


class Mute(suite.Listener):
    """Takes connections, and says nothing for ever."""

    def one(self, sock):
        while sock.recv(4096):
            pass


@pytest.mark.parametrize("what", ["proxy", "relay"])
def test_patience_also_ends_a_wait_for_one_that_takes_the_connection_and_hangs(tmp_path, what):
    mute = Mute()
    env = suite.clean_env(https_proxy=mute.url) if what == "proxy" else suite.clean_env()
    url = "https://relay.example.org" if what == "proxy" else mute.url
    begun = wf.time.monotonic()
    (tmp_path / "token").write_text("x" * 64)
    os.chmod(str(tmp_path / "token"), 0o600)
    done = suite.run("mi_system_wf.py", "run", suite.SITE, "hello", "--url", url, "--token-file", str(tmp_path / "token"), "--patience", "2s", env=env)
    assert done.returncode == 69 and wf.time.monotonic() - begun < 20, done.stderr          # 30 s it was
    if what == "proxy":
        assert "through the proxy 127.0.0.1:%d (https_proxy)" % mute.port in done.stderr
    mute.close()


PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


def environment(monkeypatch, **env):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", PROXIES[:4] + ("proxy",))
def test_what_fails_at_a_proxy_names_where_the_proxy_came_from(monkeypatch, name):
    with socket.socket() as shut:                      # bound, and nobody listens
        shut.bind(("127.0.0.1", 0))
        url = "http://127.0.0.1:%d" % shut.getsockname()[1]
        environment(monkeypatch, **({} if name == "proxy" else {name: url}))
        relay = wf.RelayClient("https://relay.example.org", lambda: "t", proxy=url if name == "proxy" else "")
        with pytest.raises(wf.RelayAway) as caught:
            relay.call("GET", "version", {})
        assert caught.value.kind == "proxy" and "(%s)" % name in str(caught.value)
    environment(monkeypatch, **({} if name == "proxy" else {name: "socks5://x"}))
    with pytest.raises(wf.Stop) as stopped:
        wf.RelayClient("https://relay.example.org", lambda: "t", proxy="socks5://x" if name == "proxy" else "").proxy_for()
    assert stopped.value.code == 78 and str(stopped.value).startswith(name + ": ")


@pytest.mark.parametrize("env, name", [
    ({"https_proxy": "a", "HTTPS_PROXY": "b"}, "https_proxy"), ({"https_proxy": "", "HTTPS_PROXY": "b"}, ""), ({"HTTPS_PROXY": "b", "all_proxy": "c"}, "HTTPS_PROXY"),
    ({"https_proxy": "", "ALL_PROXY": "c"}, "ALL_PROXY"), ({"http_proxy": "a"}, ""), ({"all_proxy": "c", "NO_PROXY": "h"}, ""),
    ({"https_proxy": "a", "no_proxy": "x", "NO_PROXY": "*"}, "https_proxy"), ({}, "")])
def test_the_variable_that_counts(monkeypatch, env, name):
    environment(monkeypatch, **env)
    assert wf.proxy_of_environment("h", 1) == (env.get(name, ""), name)


@pytest.mark.parametrize("word, host, port, without", [
    ("*", "h", 1, True), ("relay.example.org", "relay.example.org", 50443, True), ("relay.example.org", "Relay.Example.Org", 1, True),
    ("relay.example.org:50443", "relay.example.org", 50443, True), ("relay.example.org:443", "relay.example.org", 50443, False),
    ("example.org", "relay.example.org", 1, True), (".example.org", "relay.example.org", 1, True), ("*.example.org", "relay.example.org", 1, True),
    (".example.org:50443", "relay.example.org", 50443, True), ("ample.org", "relay.example.org", 1, False), ("10.0.0.0/8", "10.1.2.3", 1, True),
    ("10.0.0.0/8", "11.1.2.3", 1, False), ("10.0.0.0/8", "ten", 1, False), ("10.1.2.3:50443", "10.1.2.3", 50443, True), ("10.1.2.3", "10.1.2.3", 1, True),
    ("::1", "::1", 5, True), ("[::1]:5", "::1", 5, True), ("[::1]:6", "::1", 5, False), ("fd00::/8", "fd00::5", 5, True), (".", "h", 1, False),
    ("x/y", "10.0.0.1", 1, False), ("*:443", "h", 443, True), ("*:443", "h", 1, False)])
def test_a_word_of_no_proxy_is_a_name_a_domain_an_address_or_a_network_with_or_without_a_port(word, host, port, without):
    assert wf.no_proxy_matches(host, port, word) is without


def tunnel(seen):
    """A small CONNECT proxy; seen: the head of each request. (port, close)"""
    listening = socket.create_server(("127.0.0.1", 0))

    def copy(one, two):
        for data in iter(lambda: one.recv(65536), b""):
            two.sendall(data)

    def serve():
        while True:
            try:
                near = listening.accept()[0]
            except OSError:
                return
            head = b""
            while b"\r\n\r\n" not in head:
                head += near.recv(4096)
            seen.append(head.decode())
            if "Proxy-Authorization" not in seen[-1]:
                near.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                near.close()
                continue
            host, port = head.split()[1].decode().split(":")
            far = socket.create_connection((host, int(port)))
            near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            threading.Thread(target=copy, args=(near, far), daemon=True).start()
            threading.Thread(target=copy, args=(far, near), daemon=True).start()
    threading.Thread(target=serve, daemon=True).start()
    return listening.getsockname()[1], listening.close


def test_a_proxy_with_a_password_is_gone_through_and_never_sees_the_token(world):
    seen = []
    port, close = tunnel(seen)
    try:
        relay = wf.RelayClient(world.url, lambda: world.token, ca_file=world.cert, proxy="http://me:p%%40ss@127.0.0.1:%d" % port)
        assert relay.learn()[0] == 2
        assert "CONNECT 127.0.0.1:%d" % world.port in seen[0] and "Basic bWU6cEBzcw==" in seen[0] and world.token not in seen[0]
        relay = wf.RelayClient(world.url, lambda: world.token, ca_file=world.cert, proxy="127.0.0.1:%d" % port)
        with pytest.raises(wf.RelayAway) as caught:
            relay.call("GET", "version", {})
        assert caught.value.kind == "proxy" and "407" in str(caught.value)
    finally:
        close()


@pytest.mark.parametrize("url", ["", "https://", "ftp://host", "https://a b", "https://h:x", "https://h:99999", "https://u:p@h", "https://h\n", "http:///x"])
def test_a_url_that_is_none_is_a_matter_of_usage(url):
    with pytest.raises(wf.Stop) as stopped:
        wf.parse_relay_url(url)
    assert stopped.value.code == 64


@pytest.mark.parametrize("url, found", [
    ("http://HOST", (True, "host", 50443, "")), ("https://host/", (True, "host", 50443, "")), ("host:99", (True, "host", 99, "")),
    ("https://host/a/b/", (True, "host", 50443, "/a/b")), ("http://127.0.0.1:8082", (False, "127.0.0.1", 8082, "")),
    ("http://localhost", (True, "localhost", 50443, "")), ("http://10.0.0.1:8082", (True, "10.0.0.1", 8082, ""))])
def test_a_url_means_https_on_50443_unless_it_is_loopback_with_a_port(url, found):
    assert wf.parse_relay_url(url) == found


MEMORY = """
import sys, os, hashlib
sys.path[:0] = [%(root)r, %(tests)r]
import mi_system_wf as wf
relay = wf.RelayClient(%(url)r, lambda: "t")
base = os.environ["BASE"].encode()
relay.learn()
relay.upload_all(%(input)r, [(base + b"/in", %(size)d)])
relay.download_all(%(result)r, [(0, "a", %(size)d, %(sum)r)], lambda *words: None, lambda n: base + b"/out")
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_the_size_of_a_file(make, tmp_path):
    data = os.urandom(1 << 20) * 96
    fake, relay = make(results={"a": data})
    (tmp_path / "in").write_bytes(data)
    fake.manifest = [("in", entry(data))]

    def swallow(request):                              # the fake itself would take quadratic time
        if request.method == "POST":
            while request.left:
                request.take(min(request.left, 1 << 20))
            end = int(request.query["offset"]) + request.length
            return request.ok(offset=end, complete=end == len(data))
    fake.misbehave = swallow
    text = MEMORY % {"root": suite.ROOT, "tests": suite.HERE, "url": fake.url, "input": INPUT, "result": RESULT, "size": len(data),
                     "sum": hashlib.sha256(data).hexdigest()}
    done = subprocess.run([suite.PYTHON, "-c", text], env=suite.clean_env(BASE=str(tmp_path)), stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 40 << 10 and (tmp_path / "out").read_bytes() == data


def test_marks_of_a_list_that_was_not_taken_to_its_end_are_not_those_of_the_next():
    """Else a file of another calculation could become executable by it."""
    relay = suite.module("mi_system_remote.py").RelayClient("http://127.0.0.1:1", lambda: "t")
    first = {"files": {name: dict(entry(b"x"), x=True) for name in ("a", "b")}}
    taken = relay.manifest_entries("files/ID/input", first)
    next(taken), next(taken)
    assert list(relay.manifest_entries("files/ID/input", {"files": {"a": entry(b"x")}})) and not relay.x_and_mtime
