"""Large files over several connections at once: pieces in any order, each with its sum, one transfer's nonce; whole, or not at all."""
import hashlib
import json
import os
import random
import re
import socket
import threading
import time
import tracemalloc
import zlib

import pytest
import suite
from test_files_on_the_wire import add, claimed, info, offset_of
from torture import Proxy

relay, wf = suite.module("mi_dicomapi.py"), suite.module("mi_system_wf.py")
PIECE = relay.PIECE_SIZE
SIZE = 5 * PIECE + 1000


def frames(data, first=0, last=None):
    """The frames of data[first:last] as a body."""
    return b"".join(part for at in range(first, len(data) if last is None else last, PIECE)
                    for part in relay.frame(data[at:min(at + PIECE, len(data) if last is None else last)]))


class Writer:
    """Who sends the one input of a calculation in pieces."""

    def __init__(self, world, data=None, transfer="a transfer"):
        self.world, self.client = world, world.client()
        self.data = os.urandom(SIZE) if data is None else data
        self.transfer = transfer
        self.accept_id = add(self.client, info(inputs={"in.bin": self.data}))

    def words(self, **more):
        return "&".join("%s=%s" % pair for pair in dict({"v": 2, "transfer": self.transfer}, **more).items()).replace(" ", "%20")

    def post(self, first, last, body=None, client=None, number=0, **more):
        """(status, the answer) to the pieces first .. last (numbers)."""
        first, last = first * PIECE, min(last * PIECE, len(self.data))
        words = self.words(**dict({"offset": first, "size": last - first}, **more))
        return (client or self.client).call("POST", "v2/pieces/%s/input/%d?%s" % (self.accept_id, number, words),
                                            body=frames(self.data, first, last) if body is None else body)

    def missing(self):
        found = self.client.ok("GET", "v2/missing/%s/input/0?%s" % (self.accept_id, self.words()))
        return [[first // PIECE, -(-last // PIECE)] for first, last in found["missing"]], found["complete"]

    def arrived(self):
        """What is handed out of it."""
        self.client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": self.accept_id})
        accept_id, claim = self.client.claim()
        assert accept_id == self.accept_id
        status, got, headers = self.client.raw("GET", "files/%s/input/0?v=2&claim=%s" % (accept_id, claim))
        assert status == 200
        return got, claim


def part_of(writer, name="000000.part"):
    return os.path.join(writer.world.state, "spool", writer.accept_id[:2], writer.accept_id, "in", name)


# ---- the relay takes pieces in any order

def test_pieces_may_come_in_any_order_and_the_file_is_whole_with_the_last_of_them(world):
    writer = Writer(world)
    assert writer.missing() == ([[0, 6]], False)
    for first, last, left in ((5, 6, [[0, 5]]), (1, 3, [[0, 1], [3, 5]]), (0, 1, [[3, 5]]), (2, 4, [[4, 5]])):
        status, found = writer.post(first, last)
        assert (status, found["complete"], found["message"]) == (200, False, "received") and 1 <= found["lanes"] <= 16
        assert writer.missing() == (left, False)
    status, found = writer.post(4, 5)
    assert (status, found["complete"]) == (200, True)
    assert writer.missing() == ([], True) and writer.post(0, 6)[1]["complete"], "asked twice, answered alike"
    assert not os.path.exists(part_of(writer)) and not os.path.exists(part_of(writer, "000000.part.sums"))
    assert writer.arrived()[0] == writer.data


def packed(data, of=None):
    """The packed frame of some bytes, with the sum of others."""
    data = data if isinstance(data, bytes) else bytes(data)
    return b"\1" + len(data).to_bytes(4, "big") + data + relay.frame(of)[2]


HOSTILE = {
    "a place within a piece": (400, lambda one: one.post(1, 2, offset=PIECE + 1)),
    "an end within a piece": (400, lambda one: one.post(1, 2, size=PIECE - 1)),
    "behind the end": (400, lambda one: one.post(5, 6, size=1001)),
    "far behind the end": (400, lambda one: one.post(5, 6, offset=(1 << 50) // PIECE * PIECE)),
    "a negative place": (400, lambda one: one.post(1, 2, offset=-PIECE)),
    "a negative size": (400, lambda one: one.post(1, 2, size=-PIECE)),
    "no size": (400, lambda one: one.post(1, 2, size="")),
    "no transfer": (400, lambda one: one.post(1, 2, transfer="")),
    "a transfer that is too short": (400, lambda one: one.post(1, 2, transfer="x")),
    "another sum": (422, lambda one: one.post(1, 2, frames(one.data, PIECE, 2 * PIECE)[:-1] + b"x")),
    "other bytes": (422, lambda one: one.post(1, 2, relay.frame(one.data[PIECE:2 * PIECE])[0] + bytes(PIECE) + frames(one.data, PIECE, 2 * PIECE)[-32:])),
    "a shorter frame": (422, lambda one: one.post(1, 2, b"".join(relay.frame(one.data[PIECE:2 * PIECE - 1])))),
    "a longer frame": (422, lambda one: one.post(1, 2, b"".join(relay.frame(one.data[PIECE:2 * PIECE + 1])))),
    "a frame of 4 GiB": (422, lambda one: one.post(1, 2, b"\0\xff\xff\xff\xff" + bytes(1000))),
    "another form": (422, lambda one: one.post(1, 2, b"\x7f" + frames(one.data, PIECE, 2 * PIECE)[1:])),
    "a bomb": (422, lambda one: one.post(1, 2, packed(zlib.compress(bytes(64 << 20)), bytes(64 << 20)))),
    "packed to one byte less": (422, lambda one: one.post(1, 2, packed(zlib.compress(bytes(PIECE - 1)), bytes(PIECE - 1)))),
    "packed to one byte more": (422, lambda one: one.post(1, 2, packed(zlib.compress(bytes(PIECE + 1)), bytes(PIECE + 1)))),
    "packed, with another sum": (422, lambda one: one.post(1, 2, packed(zlib.compress(bytes(PIECE)), bytes(PIECE - 1) + b"x"))),
    "packed, with more behind it": (422, lambda one: one.post(1, 2, packed(zlib.compress(bytes(PIECE)) + b"x", bytes(PIECE)))),
    "packed, and cut off": (422, lambda one: one.post(1, 2, packed(zlib.compress(bytes(PIECE))[:-1], bytes(PIECE)))),
    "packed, and as long as the piece": (422, lambda one: one.post(1, 2, packed(zlib.compress(one.data[PIECE:2 * PIECE]), one.data[PIECE:2 * PIECE]))),
    "packed to nothing": (422, lambda one: one.post(1, 2, packed(b"", b""))),
    "rubbish as packed": (422, lambda one: one.post(1, 2, packed(one.data[:1000], one.data[PIECE:2 * PIECE]))),
    "half a frame": (422, lambda one: one.post(1, 2, frames(one.data, PIECE, 2 * PIECE)[:1000])),
    "nothing": (422, lambda one: one.post(1, 2, b"")),
    "another file": (404, lambda one: one.post(1, 2, number=7)),
    "a result": (409, lambda one: one.client.call("POST", "v2/pieces/%s/result/0?%s&claim=x" % (one.accept_id, one.words(offset=0, size=0)), body=b"")),
    "another's token": (404, lambda one: one.post(1, 2, client=one.world.client(one.world.issue("other")))),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_piece_that_is_not_as_it_must_be_changes_nothing(world, what):
    writer, (status, act) = Writer(world), HOSTILE[what]
    assert writer.post(0, 1)[0] == 200
    assert act(writer)[0] == status
    assert writer.missing() == ([[1, 6]], False)
    assert os.path.getsize(part_of(writer)) == PIECE
    assert writer.post(1, 6)[1]["complete"] and writer.arrived()[0] == writer.data


def test_an_empty_file_that_comes_in_no_pieces_is_whole(world):
    writer = Writer(world, b"")
    status, found = writer.post(0, 0, b"")
    assert (status, found["complete"]) == (200, True) and writer.arrived()[0] == b""


def test_what_follows_a_bad_piece_in_one_request_is_not_taken_and_what_precedes_it_is(world):
    writer = Writer(world)
    body = bytearray(frames(writer.data))
    body[2 * (PIECE + relay.FRAME_MORE) + 100] ^= 1
    status, found = writer.post(0, 6, bytes(body))
    assert (status, found["why"], found["offset"]) == (422, "piece", 2 * PIECE)
    assert writer.missing() == ([[2, 6]], False)


def test_the_newest_transfer_of_a_file_wins_and_all_its_lanes_write(world):
    writer = Writer(world)
    assert writer.post(0, 1)[0] == 200
    writer.transfer = "a newer one"
    assert writer.post(1, 2)[0] == writer.post(3, 4, client=world.client())[0] == 200
    status, found = writer.post(4, 5, transfer="a transfer")
    assert (status, found["why"]) == (409, "transfer")
    assert writer.missing() == ([[2, 3], [4, 6]], False)
    assert writer.post(2, 6)[1]["complete"] and writer.arrived()[0] == writer.data


def test_a_file_whose_pieces_are_right_and_whose_own_sum_is_not_is_dropped_as_a_whole(world):
    writer = Writer(world)
    good, writer.data = writer.data, os.urandom(SIZE)
    assert writer.post(1, 6)[0] == 200
    status, found = writer.post(0, 1)
    assert (status, found["why"], found["wrong"]) == (422, "sum", [0])
    assert writer.missing() == ([[0, 6]], False)
    writer.data = good
    assert writer.post(0, 6)[1]["complete"] and writer.arrived()[0] == good


@pytest.mark.parametrize("turn", range(2))
def test_many_lanes_at_once_leave_a_whole_file(world, turn):
    writer, roll = Writer(world, os.urandom(20 * PIECE + 5)), random.Random(turn)
    todo = list(range(21)) * 2
    roll.shuffle(todo)
    found, lock = [], threading.Lock()

    def lane():
        client = world.client()
        while True:
            with lock:
                if not todo:
                    return
                number = todo.pop()
            status, answer = writer.post(number, number + 1, client=client)
            while status == 503:                       # it is being put in its place
                status, answer = writer.post(number, number + 1, client=client)
            found.append((status, answer["complete"]))

    threads = [threading.Thread(target=lane) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 42 and {status for status, complete in found} == {200} and any(complete for status, complete in found)
    assert writer.arrived()[0] == writer.data


@pytest.mark.parametrize("hurt", ["nothing", "a piece", "its sum", "the end of the sums", "all sums", "the part is shorter"])
def test_after_kill_9_each_piece_that_is_right_counts_and_no_other_does(make_world, hurt):
    world = make_world(tls=False, commands=["hello"]).start()
    writer = Writer(world)
    assert writer.post(0, 2)[0] == writer.post(3, 4)[0] == writer.post(5, 6)[0] == 200
    world.relay.kill()
    part, sums = part_of(writer), part_of(writer, "000000.part.sums")
    left = {"nothing": [[2, 3], [4, 5]], "a piece": [[0, 1], [2, 3], [4, 5]], "its sum": [[0, 1], [2, 3], [4, 5]], "the end of the sums": [[2, 3], [4, 6]],
            "all sums": [[0, 6]], "the part is shorter": [[2, 3], [4, 6]]}[hurt]
    if hurt in ("a piece", "its sum"):
        with open(part if hurt == "a piece" else sums, "r+b") as out:
            out.seek(10)
            out.write(b"torn")
    elif hurt == "the end of the sums":
        os.truncate(sums, 5 * 32 + 7)
    elif hurt == "all sums":
        os.truncate(sums, 0)
    elif hurt == "the part is shorter":
        os.truncate(part, 5 * PIECE + 10)
    writer.client = world.start().client()
    assert writer.missing() == (left, False)
    for first, last in left:
        status, found = writer.post(first, last)
        assert status == 200
    assert found["complete"] and writer.arrived()[0] == writer.data


def test_a_death_between_a_piece_and_the_note_of_its_sum_makes_no_hole_count(tmp_path, monkeypatch):
    path, data, opened, real = os.fsencode(str(tmp_path / "part")), os.urandom(SIZE), [], os.open

    def dies_at_the_second(name, *how):
        opened.append(name)
        if len(opened) == 2:
            raise KeyboardInterrupt
        return real(name, *how)

    monkeypatch.setattr(relay.os, "open", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):             # the first that comes is in the middle of the file
        relay.Pieces(path, SIZE).put(3, data[3 * PIECE:4 * PIECE], hashlib.sha256(data[3 * PIECE:4 * PIECE]).digest())
    monkeypatch.undo()
    again = relay.Pieces(path, SIZE)
    assert list(again.gaps()) == [(0, SIZE)] and again.front == 0
    for number in range(6):
        part = data[number * PIECE:(number + 1) * PIECE]
        again.put(number, part, hashlib.sha256(part).digest())
    again.move_on()
    assert again.is_whole() and again.digest.hexdigest() == hashlib.sha256(data).hexdigest()


# ---- one way and the other

def test_pieces_go_on_where_a_transfer_of_before_stopped_and_it_goes_on_up_to_their_first_gap(world):
    writer = Writer(world)
    target = "files/%s/input/0?v=2&" % writer.accept_id
    writer.client.ok("POST", target + "offset=0", body=writer.data[:2 * PIECE + 777])
    assert writer.missing() == ([[2, 6]], False)
    assert writer.post(4, 6)[0] == writer.post(2, 3)[0] == 200
    assert offset_of(writer.client, target) == (3 * PIECE, False)
    assert writer.missing() == ([[3, 6]], False)
    assert offset_of(writer.client, target) == (3 * PIECE, False)
    assert writer.client.ok("POST", target + "offset=%d" % (3 * PIECE), body=writer.data[3 * PIECE:])["complete"]
    assert writer.arrived()[0] == writer.data


# ---- the relay gives pieces

def test_pieces_are_given_as_frames_from_wherever_they_are_asked_for(world):
    client, accept_id, claim = claimed(world, inputs={"in.bin": os.urandom(SIZE)}, step="")
    whole = client.raw("GET", "files/%s/input/0?v=2&claim=%s" % (accept_id, claim))[1]
    target = "v2/pieces/%s/input/0?v=2&claim=%s&transfer=12345678&" % (accept_id, claim)
    for first, last in ((0, 6), (3, 4), (5, 6), (1, 5)):
        first, last = first * PIECE, min(last * PIECE, SIZE)
        status, got, headers = client.raw("GET", target + "offset=%d&size=%d" % (first, last - first))
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream") and got == frames(whole, first, last)
        assert 1 <= int(headers["X-MI-Lanes"]) <= 16
    for words in ("offset=1&size=%d" % PIECE, "offset=0&size=1", "offset=0&size=%d" % (SIZE + 1), "offset=%d&size=%d" % (5 * PIECE, PIECE), "offset=0"):
        assert client.raw("GET", target + words)[0] == 400, words
    for words, code in (("claim=1.x", 409), ("v=2", 400)):
        status, first = client.call("GET", "v2/pieces/%s/input/0?%s&transfer=12345678&offset=0&size=%d" % (accept_id, words, PIECE))
        assert status == code, first


def test_the_relay_shares_its_lanes_between_those_who_move_something(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nlanes_per_token = 10\n").start()
    first = Writer(world)
    alone = first.post(0, 1)[1]["lanes"]
    assert alone == 10
    second = Writer(world, transfer="another one")
    assert second.post(0, 1)[1]["lanes"] == first.post(1, 2)[1]["lanes"] == alone // 2
    assert json.loads(world.client().raw("GET", "version")[1].decode())["lanes"] == 10


# ---- the clients' lanes, through what hurts them

class Line(Proxy):
    """A line to a relay that counts, and hurts, what goes over it. hurt: {number of a call about pieces: what happens to it}."""

    def __init__(self, port, hurt=()):
        self.hurt, self.calls, self.bytes, self.largest, self.connections, self.mutex = dict(hurt), 0, 0, 0, 0, threading.Lock()
        Proxy.__init__(self, port, 0, 0)

    def one(self, client):
        with self.mutex:
            self.connections += 1
        Proxy.one(self, client)

    def fate(self, line, length):
        if b"/v2/pieces/" not in line:
            return "pass"
        with self.mutex:
            self.calls += 1
            self.bytes += length if line.startswith(b"POST") else 0
            self.largest = max(self.largest, length)
            return self.hurt.get(self.calls, self.hurt.get("all", "pass"))

    def head(self, source):
        found = Proxy.head(source)
        if found and found[0].startswith(b"HTTP/") and found[2] > 100000:
            with self.mutex:
                self.bytes += found[2]
                self.largest = max(self.largest, found[2])
        return found


class Counter(suite.Listener):
    """A line that counts all bytes that go over it, and holds few."""

    def __init__(self, port):
        self.target, self.bytes = port, 0
        suite.Listener.__init__(self)

    def one(self, client):
        upstream = socket.socket()
        for sock in (client, upstream):
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, 1 << 15)
        try:
            upstream.connect(("127.0.0.1", self.target))
            back = threading.Thread(target=self.pump, args=(upstream, client), daemon=True)
            back.start()
            self.pump(client, upstream)
            back.join()
        except OSError:                                # the relay is away
            pass
        client.close()
        upstream.close()

    def pump(self, source, to):
        try:
            for data in iter(lambda: source.recv(1 << 15), b""):
                to.sendall(data)
                self.bytes += len(data)
                time.sleep(len(data) / 8e6)            # 8 MB/s: both ends keep up, and have nothing in hand
        except OSError:
            pass
        for sock in (source, to):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Ways:
    """A file of `size` bytes on its way to the relay and back, by clients of the workflow side's own block."""

    def __init__(self, world, line, folder, size, lanes=4, data=None):
        self.world, self.line, self.folder, self.lanes = world, line, str(folder), lanes
        self.data = os.urandom(size) if data is None else data
        self.path, self.part = os.path.join(self.folder, "in").encode(), os.path.join(self.folder, "part").encode()
        with open(self.path, "wb") as out:
            out.write(self.data)
        self.accept_id = add(world.client(), info(inputs={"in.bin": self.data}))
        self.notices = []

    def client(self):
        made = wf.RelayClient(self.line.url, lambda: self.world.token)
        made.lanes, made.max_pause = self.lanes, 0.1
        made.on_outage = self.notices.append
        return made

    def up(self, moved=lambda count: None):
        client = self.client()
        client.upload_all("files/%s/input" % self.accept_id, [(self.path, len(self.data))], moved=moved)
        client.close()
        return client.how

    def claim(self):
        self.world.client().ok("POST", "allow-wait-calc", {"v": 2, "accept_id": self.accept_id})
        self.claimed = self.world.client().claim()[1]

    def down(self, moved=lambda count: None):
        client, stored = self.client(), []
        rows = [(0, "in.bin", len(self.data), suite.entry(self.data)["sha256"])]
        client.download_all("files/%s/input" % self.accept_id, rows, lambda *words: stored.append(words), lambda number: self.part, self.claimed, moved)
        client.close()
        assert stored == [(0, "in.bin", None)]
        return client.how

    def came(self):
        with open(self.part, "rb") as part:
            return part.read() == self.data and sorted(os.listdir(self.folder)) == ["in", "part"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    world = suite.World(str(tmp_path_factory.mktemp("plain")), tls=False, commands=["hello"]).start()
    yield world
    world.close()


def test_a_large_file_goes_both_ways_over_several_connections(plain, tmp_path):
    line = Line(plain.port)
    ways, moved = Ways(plain, line, tmp_path, 40 * wf.PIECE_SIZE + 77), []
    assert ways.up(moved.append) == "4 lanes" and sum(moved) == len(ways.data) and line.connections >= 4
    ways.claim()
    del moved[:]
    assert ways.down(moved.append) == "4 lanes" and sum(moved) == len(ways.data) and ways.came() and not ways.notices


TEXT = b"".join(b" -1%10d%12.5E%12.5E%12.5E\n" % (n, n * 1.7e-3, n * n * 1e-7, 1.0 / (n + 1)) for n in range(20000)) * 14


@pytest.mark.parametrize("data, there, shrinks", [(TEXT, True, True), (TEXT, False, False), (None, True, False)], ids=["text", "a relay of before", "random"])
def test_text_travels_packed_over_a_distance_to_whom_understands_it_and_what_does_not_shrink_as_it_is(plain, tmp_path, monkeypatch, data, there, shrinks):
    ways, look, moved = Ways(plain, Line(plain.port), tmp_path, 40 << 18, data=data), wf.RelayClient.look_at_line, []

    def far(client):
        look(client)
        client.packs_there = there
        return 1.0
    monkeypatch.setattr(wf.RelayClient, "look_at_line", far)
    monkeypatch.setattr(wf, "PACK_BELOW", 1 << 50)
    for way in ("up", "down"):
        ways.line.bytes = 0
        del moved[:]
        how = getattr(ways, way)(moved.append)
        assert re.match(r"\d lanes", how) and how.endswith(", packed") == shrinks and sum(moved) == len(ways.data)
        assert (ways.line.bytes < len(ways.data) / 2) == shrinks
        if way == "up":
            ways.claim()
    assert ways.came() and not ways.notices


def test_a_packed_piece_that_lies_about_its_size_makes_no_more_than_the_piece():
    bomb = zlib.compress(bytes(256 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError):
        wf.unpacked(bomb, PIECE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * PIECE, peak


KINDS, LONG = ("cut within", "drop answer", "cut answer", "413"), ("cut before", "stall", "502", "repeat")


@pytest.mark.parametrize("kind", KINDS + LONG)
def test_what_a_lane_loses_the_others_take_and_no_more_goes_twice_than_was_lost(plain, tmp_path, request, kind):
    if kind in LONG and not request.config.getoption("--long"):
        pytest.skip("--long")
    line = Line(plain.port, {number: kind for number in (2, 3, 5)})
    ways = Ways(plain, line, tmp_path, 40 * wf.PIECE_SIZE + 77)
    ways.up()
    assert line.calls >= 5 and line.bytes < len(ways.data) * 1.01 + 3 * line.largest
    ways.claim()
    line.calls = line.bytes = line.largest = 0
    ways.down()
    assert line.calls >= 5 and line.bytes < len(ways.data) * 1.01 + 3 * line.largest and ways.came()


@pytest.mark.parametrize("kind", ["413", "cut within", "502"])
def test_where_no_pieces_get_through_a_file_goes_over_one_connection_and_says_why(plain, tmp_path, request, kind):
    if kind != "413" and not request.config.getoption("--long"):
        pytest.skip("--long")
    ways = Ways(plain, Line(plain.port, {"all": kind}), tmp_path, 40 * wf.PIECE_SIZE + 77)
    assert ways.up().startswith("1 lane (")
    ways.claim()
    assert ways.down().startswith("1 lane (") and ways.came()


def test_the_relay_and_the_client_are_killed_in_the_middle_and_little_goes_twice(make_world, tmp_path, request):
    if not request.config.getoption("--long"):         # what goes twice depends on what else runs meanwhile
        pytest.skip("--long")
    world = make_world(tls=False, commands=["hello"]).start()
    line = Counter(world.port)
    ways = Ways(world, line, tmp_path, 24 << 20, 3)
    most = 1.1 * len(ways.data)

    class Killed(Exception):
        pass

    def once(share, act):
        """A `moved` that does something when so much of the file has moved."""
        sum_of = [0]

        def moved(count):
            sum_of[0] += count
            if sum_of[0] > share * len(ways.data) and act:
                act.pop()()
        return moved

    def restart():
        world.relay.kill()
        world.start()

    def die():
        raise Killed

    for way in (ways.up, ways.down):
        line.bytes = 0
        with pytest.raises(Killed):
            way(once(0.3, [die]))
        way(once(0.6, [restart]))
        assert len(ways.data) <= line.bytes <= most, line.bytes / len(ways.data)
        ways.claim() if way == ways.up else None
    assert ways.came()


def test_a_calculation_with_large_files_goes_the_whole_way_over_lanes_and_tells_how(make_world):
    world = make_world(commands=["move"]).start()
    world.poller({"move": "argv = /bin/mv\n    in\n    out\nmatch = move"}, ini="lanes = 3\n")
    here = os.path.join(world.folder, "wf")
    os.makedirs(here)
    data = os.urandom(12 << 20)
    with open(os.path.join(here, "in"), "wb") as out:
        out.write(data)
    done = world.workflow("run", suite.SITE, "move", "--in", "in", "--out", "out", "--lanes", "2", "-v")
    assert done.returncode == 0, done.stdout + done.stderr
    with open(os.path.join(here, "out"), "rb") as text:
        assert text.read() == data
    for line in ("2 allow-wait-calc", "9 get-calc-result"):
        assert re.search(line + r'.* rate="[\d.]+ MiB/s" over="[12] lanes"', done.stdout + done.stderr), done.stdout + done.stderr
    for line in ("4 calc-params-complete", "8 end-send"):
        assert re.search(line + r'.* rate="[\d.]+ MiB/s" over="[123] lanes"', world.pollers[0].text()), world.pollers[0].text()


@pytest.mark.parametrize("lanes, size, how", [(0, 40 << 18, "1 lane (near)"), (1, 40 << 18, "1 lane (lanes = 1)"), (4, 20 << 18, "1 lane (little)")])
def test_one_connection_does_where_it_is_as_good_and_that_is_said(plain, tmp_path, monkeypatch, lanes, size, how):
    ways, look = Ways(plain, Line(plain.port), tmp_path, size, lanes), wf.RelayClient.look_at_line
    monkeypatch.setattr(wf.RelayClient, "look_at_line", lambda client: min(look(client), wf.NEAR_TRIP / 2))          # however busy this host is
    assert ways.up() == how
    ways.claim()
    assert ways.down() == how and ways.came()


def test_a_size_that_a_hostile_relay_tells_takes_no_memory():
    client = wf.RelayClient("http://127.0.0.1:1", "token")
    client.lanes, client.lanes_there, client.piece_max = 4, 6, 64 << 20
    client.retried = lambda look: 0.05                 # far away
    assert wf.choose_lanes(client, 1 << 30) == 4
    assert wf.choose_lanes(client, 10 ** 15) == 1 and client.how == "1 lane (too much)"


def test_a_relay_of_before_gets_and_gives_files_as_ever(plain, tmp_path, monkeypatch):
    ways, look = Ways(plain, Line(plain.port), tmp_path, 40 << 18), wf.RelayClient.look_at_line

    def of_before(client):
        trip = look(client)
        client.lanes_there = 0
        return trip
    monkeypatch.setattr(wf.RelayClient, "look_at_line", of_before)
    assert ways.up() == "1 lane (old relay)"
    ways.claim()
    assert ways.down() == "1 lane (old relay)" and ways.came() and not ways.line.calls
