"""Files between the sides: pieces, packs, pages, ranges, names, limits, a full disk; whole or not at all, and never held in memory."""
import base64
import hashlib
import http.client
import json
import os
import random
import re
import subprocess
import threading
import time
import unicodedata

import pytest
import suite
from suite import LOGS, SITE, entry, wait_until

relay = suite.module("mi_dicomapi.py")


def info(command="hello", inputs=None, results=(), patterns=(), **more):
    """A calc-info."""
    return dict({"command": command, "remote-site": SITE, "parameters": "", "parameter_files": {name: entry(data) for name, data in (inputs or {}).items()},
                 "result_files": {name: {} for name in results}, "result_patterns": list(patterns)}, **more)


def add(client, calc_info, **more):
    """add-calcinfo that must succeed; the accept_id."""
    return client.ok("POST", "add-calcinfo", dict({"v": 2, "request_id": os.urandom(8).hex(), "calc-info": calc_info}, **more))["accept_id"]


def offset_of(client, target):
    """What the relay has of a file: (offset, complete)."""
    status, data, headers = client.raw("GET", target + "offset=")
    first = json.loads(data.decode())["errors"][0]
    assert status == 200, first
    return first["offset"], first["complete"]


@pytest.fixture
def order(world):
    """A registered calculation with one input of 700,000 bytes: (client, data, accept_id, its upload target up to `offset=`)."""
    client, data = world.client(), os.urandom(700000)
    accept_id = add(client, info(inputs={"in.bin": data}))
    return client, data, accept_id, "files/%s/input/0?v=2&" % accept_id


def claimed(world, results=(), patterns=(), inputs=None, step="calc-end"):
    """(client, accept_id, claim) of a calculation that has been walked to a step."""
    client = world.client()
    accept_id = add(client, info(results=results, patterns=patterns, inputs=inputs), allow=not inputs)
    for number, data in enumerate((inputs or {}).values()):
        client.ok("POST", "files/%s/input/%d?v=2&offset=0" % (accept_id, number), body=data)
    if inputs:
        client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    found, claim = client.claim()
    assert found == accept_id
    if step:
        client.walk(accept_id, claim, step)
    return client, accept_id, claim


# ---- pieces

def test_a_file_arrives_in_pieces_and_comes_out_as_it_was(order):
    client, data, accept_id, target = order
    for start, end in ((0, 1), (1, 70000), (70000, 400001), (400001, 700000)):
        assert offset_of(client, target) == (start, False)
        found = client.ok("POST", target + "offset=%d" % start, body=data[start:end])
        assert (found["offset"], found["complete"]) == (end, end == len(data))
    assert offset_of(client, target) == (700000, True)
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    accept_id, claim = client.claim()
    status, got, headers = client.raw("GET", "files/%s/input/0?v=2&claim=%s" % (accept_id, claim))
    assert (status, got) == (200, data) and headers["Content-Type"] == "application/octet-stream" and headers["ETag"] == '"%s"' % entry(data)["sha256"]
    assert headers["Cache-Control"] == "no-store, no-transform"


def test_a_wrong_offset_is_told_the_right_one(order):
    client, data, accept_id, target = order
    client.ok("POST", target + "offset=0", body=data[:1000])
    for offset, body in ((0, data[:1000]), (999, b"x"), (1001, b"x"), (1000, data[1000:] + b"more"), (700001, b"")):
        status, first = client.call("POST", target + "offset=%d" % offset, body=body)
        assert (status, first["why"], first["offset"]) == (409, "offset", 1000), offset
    for offset in ("-1", "x", "", "1e3", "9" * 30):
        assert client.call("POST", target + "offset=" + offset, body=b"x")[0] == 400, offset
    client.ok("POST", target + "offset=1000", body=data[1000:])


def test_a_file_with_a_wrong_sum_is_dropped_and_can_come_again(order):
    client, data, accept_id, target = order
    client.ok("POST", target + "offset=0", body=data[:500000])
    status, first = client.call("POST", target + "offset=500000", body=bytes(200000))
    assert (status, first["code"], first["offset"], first["wrong"]) == (422, 422, 0, [0])
    assert offset_of(client, target) == (0, False)
    status, first = client.call("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    assert (status, first["incomplete"], first["more"]) == (409, [0], False)
    assert client.ok("POST", target + "offset=0", body=data)["complete"]
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    assert client.claim()


def test_the_last_piece_again_is_answered_again(order):
    client, data, accept_id, target = order
    client.ok("POST", target + "offset=0", body=data[:500000])
    first = client.ok("POST", target + "offset=500000", body=data[500000:])
    assert first == client.ok("POST", target + "offset=500000", body=data[500000:])
    assert client.ok("POST", target + "offset=0", body=data)["complete"]


def half_sent(world, target, data, part):
    """A connection that has sent a head and the first `part` bytes of data as the piece at offset 0."""
    client = world.client()
    client.connect()
    client.connection.putrequest("POST", "/mi-distcomp-api/" + target + "offset=0")
    client.connection.putheader("Content-Length", str(len(data)))
    client.connection.putheader("Authorization", "Bearer " + client.token)
    client.connection.endheaders(data[:part])
    return client


def test_the_newest_writer_of_a_file_wins(world, order):
    client, data, accept_id, target = order
    slow = half_sent(world, target, data, 300000)
    offset = wait_until(lambda: offset_of(client, target)[0], 5)
    assert client.ok("POST", target + "offset=%d" % offset, body=data[offset:])["complete"]
    slow.connection.send(data[300000:])
    answer = slow.connection.getresponse()
    assert answer.status in (409, 200)                 # too late; the file is whole already
    answer.read()
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    accept_id, claim = client.claim()
    assert client.raw("GET", "files/%s/input/0?v=2&claim=%s" % (accept_id, claim))[1] == data


@pytest.mark.parametrize("turn", range(5))
def test_many_writers_at_once_leave_a_whole_file(world, order, turn):
    client, data, accept_id, target = order
    rolls = [random.Random(number) for number in range(6)]

    def write(roll):
        one = world.client()
        for attempt in range(200):
            offset, complete = offset_of(one, target)
            if complete:
                return
            try:
                one.call("POST", target + "offset=%d" % offset, body=data[offset:offset + roll.choice((1, 5000, 300000))])
            except (OSError, suite.http.client.HTTPException):
                pass

    threads = [threading.Thread(target=write, args=(roll,)) for roll in rolls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    accept_id, claim = client.claim()
    assert client.raw("GET", "files/%s/input/0?v=2&claim=%s" % (accept_id, claim))[1] == data


def test_what_came_before_a_connection_broke_need_not_come_again(world, order):
    client, data, accept_id, target = order
    slow = half_sent(world, target, data, 600000)
    wait_until(lambda: offset_of(client, target)[0] >= 500000, 5)
    slow.connection.sock.close()
    slow.connection.close()
    time.sleep(0.1)
    offset = offset_of(client, target)[0]
    assert 500000 <= offset <= 600000
    assert client.ok("POST", target + "offset=%d" % offset, body=data[offset:])["complete"]


def test_a_partial_file_goes_on_after_kill_9(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    data = os.urandom(3 << 20)
    accept_id = add(world.client(), info(inputs={"in.bin": data}))
    target = "files/%s/input/0?v=2&" % accept_id
    world.client().ok("POST", target + "offset=0", body=data[:1 << 20])
    half_sent(world, "files/%s/input/0?v=2&" % accept_id, data[1 << 20:], 10)          # a wrong offset changes nothing
    world.relay.kill()
    world.start()
    offset = offset_of(world.client(), target)[0]
    assert 0 <= offset <= 1 << 20
    assert world.client().ok("POST", target + "offset=%d" % offset, body=data[offset:])["complete"]
    with open(os.path.join(world.state, "spool", accept_id[:2], accept_id, "in", "000000"), "rb") as blob:
        assert blob.read() == data


def test_a_torn_partial_file_is_found_out_by_its_sum(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    data = os.urandom(1 << 20)
    accept_id = add(world.client(), info(inputs={"in.bin": data}))
    target = "files/%s/input/0?v=2&" % accept_id
    world.client().ok("POST", target + "offset=0", body=data[:600000])
    world.relay.kill()
    path = os.path.join(world.state, "spool", accept_id[:2], accept_id, "in", "000000.part")
    with open(path, "r+b") as part:                    # as a file system may leave it after a power cut
        part.seek(300000)
        part.write(bytes(4096))
    world.start()
    client = world.client()
    offset = offset_of(client, target)[0]
    assert client.call("POST", target + "offset=%d" % offset, body=data[offset:])[0] == 422
    assert client.ok("POST", target + "offset=0", body=data)["complete"]


def test_a_file_of_no_bytes_is_a_file(world):
    client = world.client()
    accept_id = add(client, info(inputs={"empty": b""}))
    assert client.call("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})[1]["incomplete"] == [0]
    assert client.ok("POST", "files/%s/input/0?v=2&offset=0" % accept_id, body=b"")["complete"]
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    accept_id, claim = client.claim()
    status, got, headers = client.raw("GET", "files/%s/input/0?v=2&claim=%s" % (accept_id, claim))
    assert (status, got, headers["Content-Length"]) == (200, b"", "0")


# ---- packs and pages

def many(count, seed=1):
    """count small files {NAME: bytes} in the order of a manifest; some of them empty."""
    roll = random.Random(seed)
    names = sorted(("d%02d/f%04d" % (n % 7, n) for n in range(count)), key=relay.nfc_parts)
    return {name: bytes(roll.getrandbits(8) for byte in range(roll.choice((0, 1, 30)))) for name in names}


def packs(client, target, claim, contents, start=0):
    """Downloads packs from file `start` on to the end; how many files a pack holds is worked out from its length."""
    whole = b""
    while start < len(contents):
        status, got, headers = client.raw("GET", "%s/pack?v=2&from=%d&claim=%s" % (target, start, claim))
        assert status == 200 and len(got) == int(headers["Content-Length"])
        length, first = 0, start
        while start < len(contents) and length + len(contents[start]) <= len(got):
            length += len(contents[start])
            start += 1
        assert length == len(got) and start > first
        whole += got
    return whole


def test_five_thousand_inputs_go_in_pages_and_packs_both_ways(world):
    client, files = world.client(), many(5000)
    names = list(files)
    pages = [{name: entry(files[name]) for name in names[start:start + 2000]} for start in (0, 2000, 4000)]
    accept_id = add(client, dict(info(), parameter_files=pages[0]), more=True, total=5000)
    first = client.call("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})[1]
    assert first["more"] is True and len(first["incomplete"]) == 2000
    target = "files/%s/input" % accept_id
    status, first = client.call("POST", target, {"v": 2, "from": 4000, "files": pages[2], "more": False})
    assert (status, first["why"], first["from"]) == (409, "page", 2000)
    found = client.ok("POST", target, {"v": 2, "from": 2000, "files": pages[1], "more": True})
    assert found["from"] == 4000 and client.ok("POST", target, {"v": 2, "from": 2000, "files": pages[1], "more": True}) == found
    assert client.call("POST", target, {"v": 2, "from": 2000, "files": pages[2], "more": True})[0] == 409          # another page in its place
    assert client.call("POST", target, {"v": 2, "from": 4000, "files": pages[0], "more": True})[0] == 400          # out of order over pages
    client.ok("POST", target, {"v": 2, "from": 4000, "files": pages[2], "more": False})
    assert client.call("POST", target, {"v": 2, "from": 5000, "files": {"z": entry(b"")}, "more": False})[0] == 409      # after the last one
    for start in range(0, 5000, 1250):
        body = b"".join(files[name] for name in names[start:start + 1250])
        assert client.ok("POST", target + "/pack?v=2&from=%d&count=1250" % start, body=body)["complete"]
        assert client.ok("POST", target + "/pack?v=2&from=%d&count=1250" % start, body=body)["complete"]           # its answer was lost
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    found = client.ok("POST", "calc-request", {"v": 2, "site_id": SITE, "poller": "p", "take": "many-many", "wait": 0})
    listed, claim = dict(found["inputs"]["files"]), found["claim"]
    follow = found["inputs"]["next"]
    while follow is not None:
        page = client.ok("GET", target, {"v": 2, "from": follow, "claim": claim})
        listed.update(page["files"])
        follow = page["next"]
    assert list(listed) == names and listed == {name: entry(files[name]) for name in names}
    for start in (0, 1, 4999, 2500):
        assert packs(client, target, claim, [files[name] for name in names], start) == b"".join(files[name] for name in names[start:])


def test_a_page_holds_two_thousand_entries_and_no_more(world):
    client = world.client()
    page = {"%05d" % n: entry(b"") for n in range(2001)}
    status, first = client.call("POST", "add-calcinfo", {"v": 2, "request_id": "large page", "calc-info": dict(info(), parameter_files=page)})
    assert (status, first["code"]) == (400, 400) and "2000" in first["message"]


def test_none_of_a_pack_is_kept_if_one_of_its_files_is_wrong(world):
    client, files = world.client(), {"a": b"one", "b": b"", "c": b"three", "d": b"four"}
    accept_id = add(client, info(inputs=files))
    target = "files/%s/input/pack?v=2&" % accept_id
    status, first = client.call("POST", target + "from=0&count=4", body=b"oneTHREEFOUR")
    assert (status, first["wrong"]) == (422, [2, 3])
    assert client.call("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})[1]["incomplete"] == [0, 1, 2, 3]
    assert client.ok("POST", target + "from=0&count=2", body=b"one")["complete"]
    assert client.call("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})[1]["incomplete"] == [2, 3]
    assert client.call("POST", target + "from=1&count=3", body=b"threefou?")[1]["wrong"] == [3]
    assert client.ok("POST", target + "from=1&count=3", body=b"threefour")["complete"]         # overlaps what is there
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    accept_id, claim = client.claim()
    assert [client.raw("GET", "files/%s/input/%d?v=2&claim=%s" % (accept_id, n, claim))[1] for n in range(4)] == list(files.values())
    assert client.raw("GET", "files/%s/input/pack?v=2&from=0&claim=%s" % (accept_id, claim))[1] == b"onethreefour"


def test_a_pack_that_does_not_fit_its_files_is_refused(world):
    client, files = world.client(), {"a": b"one", "b": bytes((1 << 20) + 1), "c": b"three"}
    accept_id = add(client, info(inputs=files))
    target = "files/%s/input/pack?v=2&" % accept_id
    for words, body in (("from=0&count=1", b"on"), ("from=0&count=1", b"onet"), ("from=0&count=0", b""), ("from=3&count=1", b""), ("from=2&count=2", b"three"),
                        ("from=0&count=2", files["a"] + files["b"]), ("from=0&count=999999999", b"one"), ("from=-1&count=1", b"one"), ("from=0", b"one"),
                        ("count=1", b"one"), ("from=x&count=1", b"one")):
        status, first = client.call("POST", target + words, body=body)
        assert (status, first["code"]) == (400, 400), (words, first)
    assert client.call("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})[1]["incomplete"] == [0, 1, 2]


def test_a_pack_stops_before_a_large_file_and_at_max_body(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nmax_body = 64K\n").start()
    files = {"a": b"a" * 40000, "b": b"b" * 20000, "c": b"c" * 5536, "d": b"d" * 1, "e": b"e" * 60000}
    client, accept_id, claim = claimed(world, inputs=files, step=None)
    target = "files/%s/input/pack?v=2&claim=%s&from=" % (accept_id, claim)
    assert client.raw("GET", target + "0")[1] == files["a"] + files["b"] + files["c"]       # 65,536 bytes to the byte
    assert client.raw("GET", target + "1")[1] == files["b"] + files["c"] + files["d"]
    assert client.raw("GET", target + "4")[1] == files["e"]
    assert client.raw("GET", target + "5")[0] == 400
    status, first = client.call("POST", "files/%s/input/0?v=2&offset=0" % accept_id, body=b"x" * 65537)
    assert (status, first["max_body"]) == (413, 65536)


# ---- few small files travel along with their names

def along(files):
    """Entries of a manifest that bring their files along."""
    return {name: dict(entry(data), data=base64.b64encode(data).decode()) for name, data in sorted(files.items())}


def bytes_of(page):
    """{NAME: bytes} of what came along in a page of a manifest; "nothing" where nothing did."""
    return {name: base64.b64decode(found["data"]) if "data" in found else "nothing" for name, found in page.items()}


SMALL = {"a": b"", "b": b"the input\n", "d/c": bytes(range(256))}


def spool_of(world, accept_id, kind):
    """What is in a calculation's spool directory."""
    path = os.path.join(world.state, "spool", accept_id[:2], accept_id, kind)
    return os.listdir(path) if os.path.isdir(path) else []


def test_what_comes_along_is_complete_allowed_and_handed_out_at_once(world):
    client = world.client()
    fields = {"v": 2, "request_id": "along-1", "allow": True, "calc-info": dict(info(results=["r"]), parameter_files=along(SMALL))}
    first = client.ok("POST", "add-calcinfo", fields)
    assert first["wait_allow"] and not first["known"] and world.state_of(first["accept_id"]) == "allowed"
    again = client.ok("POST", "add-calcinfo", fields)
    assert (again["accept_id"], again["known"]) == (first["accept_id"], True)
    accept_id = first["accept_id"]
    assert len(spool_of(world, accept_id, "in")) == 1, "one file in the spool, synced once"
    take = os.urandom(8).hex()
    ask = {"v": 2, "site_id": SITE, "poller": "test", "take": take, "wait": 0}
    found = client.ok("POST", "calc-request", dict(ask, data=True))
    assert found["accept_id"] == accept_id and bytes_of(found["inputs"]["files"]) == SMALL
    assert bytes_of(client.ok("POST", "calc-request", ask)["inputs"]["files"]) == dict.fromkeys(SMALL, "nothing"), "only to who asks for it"
    claim = found["claim"]
    for number, data in enumerate(SMALL.values()):
        assert client.raw("GET", "files/%s/input/%d?v=2&claim=%s" % (accept_id, number, claim))[1] == data
    client.walk(accept_id, claim, "calc-end")
    results = {"r": b"the result", LOGS[0]: b"", LOGS[1]: b"a line\n"}
    sent = {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": along(results), "end": True}
    for turn in range(2):                              # an answer may be lost
        assert client.ok("POST", "send-results", sent)["end"] is True and world.state_of(accept_id) == "got"
    page = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id, "data": 1})["result-info"]["result_files"]
    assert bytes_of(page) == results
    client.ok("POST", "finish", {"v": 2, "accept_id": accept_id})
    assert client.ok("POST", "send-results", sent)["end"] is True, "its answer was lost, and the workflow side was quicker"


@pytest.mark.parametrize("wrong, code", [(dict(data="AAAA"), 422), (dict(data="A"), 400), (dict(data=5), 400), (dict(size=4), 422)])
def test_what_comes_along_with_another_sum_is_not_taken(world, wrong, code):
    client, files = world.client(), along(SMALL)
    files["b"].update(wrong)
    status, first = client.call("POST", "add-calcinfo", {"v": 2, "request_id": os.urandom(8).hex(), "allow": True, "calc-info": dict(info(), parameter_files=files)})
    assert (status, first["code"]) == (code, code) and first.get("wrong", [1]) == [1]
    client, accept_id, claim = claimed(world, results=["b"])
    files = {"b": files["b"]}
    status, first = client.call("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": files, "end": True})
    assert status == code and world.state_of(accept_id) == "ended"
    assert spool_of(world, accept_id, "out") == []


@pytest.mark.parametrize("limit", ["[limits]\ncalculations_per_user = 1", "[limits]\nbytes_per_user = 1K", "[u-test]\nmax_waiting = 1"])
def test_what_is_refused_for_a_quota_is_not_written_to_the_disk_before(make_world, limit):
    world = make_world(tls=False, commands=["hello"], ini=limit + "\n").start(suite.clean_env(MI_FAULT="files synced"))
    client = world.client()
    add(client, info(results=["r" * 50 + str(n) for n in range(12)]), allow=True)
    status, first = client.call("POST", "add-calcinfo", {"v": 2, "request_id": "one more", "calc-info": dict(info(), parameter_files=along(SMALL))})
    assert (status, first["why"]) == (429, limit.split()[1])


def test_a_page_of_which_some_comes_along_waits_for_all_of_its_files(world):
    client, files = world.client(), along(SMALL)
    del files["b"]["data"]
    accept_id = add(client, dict(info(), parameter_files=files), allow=True)
    assert world.state_of(accept_id) == "registered" and spool_of(world, accept_id, "in") == []
    assert client.call("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})[1]["incomplete"] == [0, 1, 2]


def test_results_that_come_along_are_left_where_parts_of_others_are_there(world):
    client, accept_id, claim = claimed(world, results=["r"])
    fields = {"v": 2, "accept_id": accept_id, "claim": claim}
    client.ok("POST", "send-results", dict(fields, result_files={"r": entry(b"x" * 100)}))
    client.raw("POST", "files/%s/result/0?v=2&offset=0&claim=%s" % (accept_id, claim), b"x" * 50)
    assert "end" not in client.ok("POST", "send-results", dict(fields, result_files=along({"r": b"new"}), end=True))
    assert client.call("POST", "end-send", dict(fields, result="end send"))[1]["incomplete"] == [0]
    client.ok("POST", "files/%s/result/0?v=2&offset=0&claim=%s" % (accept_id, claim), body=b"new")
    client.ok("POST", "end-send", dict(fields, result="end send"))
    assert client.raw("GET", "files/%s/result/0?v=2" % accept_id)[1] == b"new"


def test_a_success_whose_only_results_are_logs_is_none_when_they_come_along_either(world):
    client, accept_id, claim = claimed(world, results=["r"])
    fields = {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": along({LOGS[0]: b"", LOGS[1]: b""}), "end": True}
    client.ok("POST", "send-results", fields)
    found = client.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})
    assert (found["progress"], found["status"], found["reason"]) == ("got return", "abnormal", "none of the results is there")


POINTS = ["files synced"] + ["%s %s" % (call, when) for call in ("add-calcinfo", "send-results") for when in ("uncommitted", "committed", "answered")]


@pytest.mark.parametrize("point", POINTS)
def test_a_relay_that_is_killed_while_files_come_along_has_all_of_them_or_none(make_world, point):
    world = make_world(tls=False, commands=["hello"])
    world.start(env=suite.clean_env(MI_FAULT=point))

    def asked(client, name, fields):
        """The answer; where the relay is killed meanwhile, that of the next one."""
        try:
            answer = client.ok("POST", name, fields)
        except (OSError, http.client.HTTPException):
            answer = None
        if answer is None or point == name + " answered":
            wait_until(lambda: not world.relay.alive(), 20, point)
            world.start()
            client = world.client()
        return client, answer or client.ok("POST", name, fields)

    client, first = asked(world.client(), "add-calcinfo", {"v": 2, "request_id": "one", "allow": True, "calc-info": dict(info(results=["r"]), parameter_files=along(SMALL))})
    accept_id = first["accept_id"]
    assert world.state_of(accept_id) == "allowed" and len(world.rows("SELECT seq FROM calculations")) == 1
    found = client.ok("POST", "calc-request", {"v": 2, "site_id": SITE, "poller": "test", "take": os.urandom(8).hex(), "wait": 0, "data": True})
    assert bytes_of(found["inputs"]["files"]) == SMALL
    client.walk(accept_id, found["claim"], "calc-end")
    fields = {"v": 2, "accept_id": accept_id, "claim": found["claim"], "result_files": along({"r": b"the result"}), "end": True}
    client, answer = asked(client, "send-results", fields)
    if "end" not in answer:                            # what came before the relay was killed is in the way: the usual way
        client.ok("POST", "files/%s/result/0?v=2&offset=0&claim=%s" % (accept_id, found["claim"]), body=b"the result")
        client.ok("POST", "end-send", {"v": 2, "accept_id": accept_id, "claim": found["claim"], "result": "end send"})
    page = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id, "data": 1})["result-info"]["result_files"]
    assert bytes_of(page) == {"r": b"the result"}
    spool = os.path.join(world.state, "spool")
    assert [name for part in os.listdir(spool) if len(part) == 2 for name in os.listdir(os.path.join(spool, part))] == [accept_id]


def test_a_small_calculation_takes_them_along_all_the_way(make_world, tmp_path):
    world = make_world(commands=["hello"]).start()
    (tmp_path / "in.txt").write_text("hello\n")
    world.poller({"hello": "match = hello\nargv = /bin/cp\n    in.txt\n    out.txt"})
    done = world.workflow("run", SITE, "hello", "--in", "in.txt", "--out", "out.txt", cwd=str(tmp_path))
    assert done.returncode == 0 and (tmp_path / "out.txt").read_text() == "hello\n", done.stderr
    accept_id, = [row["accept_id"] for row in world.rows("SELECT accept_id FROM calculations")]
    # a file that is sent by itself is 000000
    assert all(re.match("000000p", name) for kind in ("in", "out") for name in spool_of(world, accept_id, kind) or ["nothing"])


# ---- what an overtaken transfer has left

def noted_and_there(world, accept_id):
    """(blobs that the database knows, files in the spool) of a calculation, with their directory's name."""
    rows = world.rows("SELECT DISTINCT f.kind, f.blob FROM files f JOIN calculations c ON f.calc = c.seq WHERE c.accept_id = ? AND f.blob IS NOT NULL", accept_id)
    top = os.path.join(world.state, "spool", accept_id[:2], accept_id)
    there = [os.path.relpath(os.path.join(above, name), top) for above, folders, names in os.walk(top) for name in names]
    return sorted("%s/%s" % ({"input": "in", "result": "out"}[row["kind"]], row["blob"]) for row in rows), sorted(there)


def delivered(client, accept_id, claim, files):
    """The results in one pack, and end-send."""
    client.ok("POST", "files/%s/result/pack?v=2&from=0&count=%d&claim=%s" % (accept_id, len(files), claim), body=b"".join(files.values()))
    client.ok("POST", "end-send", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "end send"})


def in_thread(call):
    """Starts call() in a thread; a function that gives its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()

    def result():
        thread.join(20)
        return found[0]
    return result


TWO = {"a": b"x" * 1000, "b": b"y" * 1000}


@pytest.mark.parametrize("point", ["", "send-results committed", "end-send committed"])
def test_a_piece_of_a_file_that_then_came_otherwise_does_not_stay(make_world, point):
    world = make_world(tls=False, commands=["hello"])
    world.start(suite.clean_env(MI_FAULT=point) if point.startswith("end-send") else None)
    client, accept_id, claim = claimed(world, results=list(TWO), inputs=TWO)
    base = {"v": 2, "accept_id": accept_id, "claim": claim}
    sent = dict(base, result_files={name: entry(data) for name, data in TWO.items()})
    client.ok("POST", "send-results", sent)
    for number in range(2):
        client.ok("POST", "files/%s/result/%d?v=2&offset=0&claim=%s" % (accept_id, number, claim), body=b"x" * 500)
    if point.startswith("send-results"):               # another manifest, and what came for the first is not set aside
        world.relay.kill()
        world.start(suite.clean_env(MI_FAULT=point))
        client = world.client()
        with pytest.raises((OSError, http.client.HTTPException)):
            client.call("POST", "send-results", dict(base, result_files={"a": entry(b"new")}))
        world.start()
        delivered(world.client(), accept_id, claim, {"a": b"new"})
    elif point:
        with pytest.raises((OSError, http.client.HTTPException)):
            delivered(client, accept_id, claim, TWO)
        world.relay.popen.wait(20)
        world.start()
    else:
        delivered(client, accept_id, claim, TWO)
    assert world.state_of(accept_id) == "got"
    noted, there = noted_and_there(world, accept_id)
    assert noted == there and [name[:3] for name in there] == ["in/", "in/", "out"]


def test_a_piece_of_an_input_does_not_outlive_its_registration(world):
    client = world.client()
    for allowed in (True, False):
        accept_id = add(client, info(inputs=TWO))
        client.ok("POST", "files/%s/input/0?v=2&offset=0" % accept_id, body=b"x" * 500)
        if allowed:
            client.ok("POST", "files/%s/input/pack?v=2&from=0&count=2" % accept_id, body=b"".join(TWO.values()))
        client.ok("POST", "allow-wait-calc" if allowed else "cancel-wait-calc", {"v": 2, "accept_id": accept_id})
        noted, there = noted_and_there(world, accept_id)
        assert noted == there and len(there) == allowed
        client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id})


@pytest.mark.parametrize("function", ["FileCall.upload", "check_margin", "FileCall.write_pack", "take_inline"])
@pytest.mark.parametrize("end", ["end-send", "another manifest", "lost"])
def test_a_call_that_comes_late_leaves_nothing_in_the_spool(make_world, function, end):
    world = make_world(tls=False, commands=["hello"])
    go = os.path.join(world.folder, "go")
    world.start(suite.clean_env(MI_FAULT="hold %s %s" % (function, go)))
    client, accept_id, claim = claimed(world, results=list(TWO))
    base, target = {"v": 2, "accept_id": accept_id, "claim": claim}, "files/%s/result/" % accept_id
    manifest = dict(base, result_files=along(TWO) if function == "take_inline" else {name: entry(data) for name, data in TWO.items()}, end=True)
    late = {"FileCall.write_pack": ("pack?v=2&from=0&count=2", b"".join(TWO.values()))}.get(function, ("0?v=2&offset=0", TWO["a"][:500]))
    if function == "take_inline":
        open(go + ".armed", "w").close()
        answer = in_thread(lambda: world.client().call("POST", "send-results", manifest))
    else:
        client.ok("POST", "send-results", manifest)
        open(go + ".armed", "w").close()
        answer = in_thread(lambda: world.client().call("POST", target + late[0] + "&claim=" + claim, body=late[1]))
    wait_until(lambda: os.path.exists(go + ".here"))
    if end == "lost":
        done = suite.run("mi_dicomapi.py", "end", accept_id, "--reason", "gone", "--ini", world.ini)
        assert done.returncode == 0, done.stderr
    elif end == "end-send" and function == "take_inline":                # its answer was lost, and it was asked again
        assert client.ok("POST", "send-results", manifest)["end"]
    else:
        files = {"a": b"new" * 400} if end == "another manifest" else TWO
        client.ok("POST", "send-results", dict(base, result_files={name: entry(data) for name, data in files.items()}))
        delivered(client, accept_id, claim, files)
    open(go, "w").close()
    status, first = answer()
    assert status in (200, 409, 503) and (status != 200 or world.state_of(accept_id) == "got"), first
    noted, there = noted_and_there(world, accept_id)
    assert noted == there and len(there) == 1


# ---- ranges, as any HTTP client asks for them

def test_a_download_goes_on_where_it_stopped_with_curl(world, tmp_path):
    data = os.urandom(500000)
    client, accept_id, claim = claimed(world, inputs={"in.bin": data}, step=None)
    url, out = "%s/mi-distcomp-api/files/%s/input/0?v=2&claim=%s" % (world.url, accept_id, claim), tmp_path / "out"
    out.write_bytes(data[:123456])
    subprocess.run(["curl", "-sS", "--fail", "--cacert", world.cert, "-H", "Authorization: Bearer " + client.token, "-C", "-", "-o", str(out), url], check=True)
    assert out.read_bytes() == data


def test_ranges_are_answered_or_ignored_but_never_wrong(world):
    data = os.urandom(1000)
    client, accept_id, claim = claimed(world, inputs={"in.bin": data}, step=None)
    target, tag = "files/%s/input/0?v=2&claim=%s" % (accept_id, claim), '"%s"' % entry(data)["sha256"]
    for asked, status, part in ((("bytes=0-", None), 200, data), (("bytes=1-", None), 206, data[1:]), (("bytes=999-", tag), 206, data[999:]),
                                (("bytes=500-", '"another"'), 200, data), (("bytes=-5", None), 200, data), (("bytes=5-7", None), 200, data),
                                (("bytes=5-7,9-", None), 200, data), (("lines=5-", None), 200, data), (("bytes=x", None), 200, data)):
        headers = [("Range", asked[0])] + ([("If-Range", asked[1])] if asked[1] else [])
        http, got, head = client.raw("GET", target, headers=headers)
        assert (http, got) == (status, part), asked
        assert head["ETag"] == tag and head["Accept-Ranges"] == "bytes"
        if status == 206:
            assert head["Content-Range"] == "bytes %d-999/1000" % (1000 - len(part))
    assert client.raw("GET", target, headers=[("Range", "bytes=1000-")])[0] == 416
    assert client.raw("GET", "files/%s/input/1?v=2&claim=%s" % (accept_id, claim))[0] == 404


# ---- names

NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("what, names", [
    ("traversal", ["../x"]), ("traversal within", ["a/../../x"]), ("absolute", ["/etc/passwd"]), ("dot", ["a/./b"]), ("empty part", ["a//b"]),
    ("empty", [""]), ("a file behind an empty directory", ["a/", "b"]), ("backslash", ["a\\b"]), ("line feed", ["a\nb"]), ("escape", ["a\x1b[2Jb"]), ("NUL", ["a\0b"]),
    ("delete", ["a\x7f"]), ("C1 control", ["a\x85b"]), ("right-to-left override", ["a\u202etxt.exe"]), ("zero width", ["a\u200bb"]),
    ("a byte order mark", ["\ufeffa"]), ("a part of 256 bytes", ["\u00e9" * 128]), ("1,001 bytes", ["/".join(["x" * 200] * 4 + ["y" * 197])]),
    ("equal after NFC", [NFD, NFC]), ("a file and its directory", ["a", "a/b"]), ("out of order", ["b", "a"]), ("a deep file under a file", ["a/b", "a/b/c/d"]),
    ("twins in a directory", [NFC + "/x", NFD + "/x"]), ("the log of stdout", [LOGS[0]]), ("the log of stderr", [LOGS[1]]),
    ("a file below a log", [LOGS[0] + "/x"]), ("a log's name decomposed", [unicodedata.normalize("NFD", LOGS[1])]),
])
def test_names_that_are_not_plain_are_refused_as_inputs_and_leave_nothing(world, what, names):
    before = world.rows("SELECT COUNT(*) AS n FROM calculations")
    client = world.client()
    page = {name: entry(b"") for name in names}
    status, first = client.call("POST", "add-calcinfo", {"v": 2, "request_id": os.urandom(8).hex(), "calc-info": dict(info(), parameter_files=page)})
    assert (status, first["code"], first["why"]) == (400, 400, "name"), first
    assert not relay.has_control_chars(first["message"]) and len(first["message"]) < 1500
    assert world.rows("SELECT COUNT(*) AS n FROM calculations") == before


def test_the_names_of_the_logs_are_in_the_form_in_which_names_are_compared_so_that_nothing_is_loaded_for_them():
    code = "import sys, mi_system_wf as m; print([m.nfc_parts(name) for name in m.LOG_NAMES] == %r, 'unicodedata' in sys.modules)" % (
        [(unicodedata.normalize("NFC", name),) for name in relay.LOG_NAMES],)
    done = subprocess.run([suite.PYTHON, "-S", "-c", code], cwd=suite.ROOT, stdout=subprocess.PIPE, env=dict(suite.clean_env(), PYTHONIOENCODING="utf-8"))
    assert done.stdout.split() == [b"True", b"False"]


def test_odd_but_plain_names_pass_both_ways(world):
    names = sorted(["計算 データ.txt", "a b", "a'b\"c", "-rf", "$(x)", "*", "%2e%2e", "x" * 255, "~", "CON", NFC, "/".join(["y" * 199] * 5), "0", "é/ü/ñ"],
                   key=relay.nfc_parts)
    files = {name: name.encode() for name in names}
    client, accept_id, claim = claimed(world, results=names, inputs=files)
    found = client.ok("GET", "files/%s/input" % accept_id, {"v": 2, "from": 0, "claim": claim})
    assert list(found["files"]) == names
    client.ok("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": {name: entry(data) for name, data in files.items()}})
    client.ok("POST", "files/%s/result/pack?v=2&from=0&count=%d&claim=%s" % (accept_id, len(files), claim), body=b"".join(files.values()))
    client.ok("POST", "end-send", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "end send"})
    assert list(client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]["result_files"]) == names
    assert client.raw("GET", "files/%s/result/pack?v=2&from=0" % accept_id)[1] == b"".join(files.values())
    spool = os.path.join(world.state, "spool", accept_id[:2], accept_id)
    for above, folders, found in os.walk(spool):       # numbers on disk, never names
        assert all(name.strip("0123456789abcdefp.rt") == "" for name in found) and set(folders) <= {"in", "out"}


# ---- results

def test_only_declared_results_are_taken(world):
    client, accept_id, claim = claimed(world, results=["r.txt", "d/e.txt"], patterns=["*.dat", "out/", "deep/**/x?.csv"])

    def manifest(*names):
        page = {name: entry(b"") for name in sorted(names, key=relay.nfc_parts)}
        return client.call("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": page})

    for name in ("other.txt", "r.txt.bak", "R.txt", "e.txt", "d", "sub/a.dat", "out", "outer/x", "deep/x11.csv", "deep/y1.csv", "../a.dat", "out/../x", ".dat/x", ".dat"):
        status, first = manifest(name)
        assert (status, first["code"]) == (400, 400) and first["why"] in ("undeclared", "name"), (name, first)
        assert world.state_of(accept_id) == relay.ENDED
        assert manifest("r.txt", name)[0] == 400, name
    assert manifest("r.txt", "d/e.txt", "a.dat", "out/.x", "out/x", "out/y/z", "deep/x1.csv", "deep/a/b/x2.csv", *LOGS)[0] == 200
    page = {"r.txt": entry(b""), "zz": entry(b"")}
    status, first = client.call("POST", "files/%s/result" % accept_id, {"v": 2, "from": 2, "files": page, "more": False, "claim": claim})
    assert (status, first["why"]) == (400, "undeclared")


def test_results_come_in_pages_too_and_another_manifest_replaces_the_first(world):
    names = ["r/%04d" % n for n in range(2500)]
    client, accept_id, claim = claimed(world, patterns=["r/"])
    base = {"v": 2, "accept_id": accept_id, "claim": claim}
    client.ok("POST", "send-results", dict(base, result_files={name: entry(b"old") for name in names[:1]}))
    client.ok("POST", "files/%s/result/0?v=2&offset=0&claim=%s" % (accept_id, claim), body=b"old")
    client.ok("POST", "send-results", dict(base, result_files={name: entry(b"new") for name in names[:2000]}, more=True))
    status, first = client.call("POST", "end-send", dict(base, result="end send"))
    assert status == 409 and first["more"] is True and len(first["incomplete"]) == 2000
    page = {"v": 2, "from": 2000, "files": {name: entry(b"new") for name in names[2000:]}, "more": False}
    client.ok("POST", "files/%s/result?claim=%s" % (accept_id, claim), page)
    assert client.ok("POST", "files/%s/result" % accept_id, dict(page, claim=claim))["from"] == 2500
    client.ok("POST", "files/%s/result/pack?v=2&from=0&count=2500&claim=%s" % (accept_id, claim), body=b"new" * 2500)
    client.ok("POST", "end-send", dict(base, result="end send"))
    found = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})
    assert found["next"] == 1000 and found["result-info"]["status"] == "completed"
    assert list(client.ok("GET", "files/%s/result" % accept_id, {"v": 2, "from": 2000})["files"]) == names[2000:]
    assert client.raw("GET", "files/%s/result/pack?v=2&from=0" % accept_id)[1] == b"new" * 2500
    assert world.rows("SELECT bytes FROM calculations WHERE accept_id = ?", accept_id) == [{"bytes": 7500}]


def test_a_result_that_was_replaced_while_it_was_sent_is_not_mixed(world):
    client, accept_id, claim = claimed(world, results=["r.txt"])
    base, target = {"v": 2, "accept_id": accept_id, "claim": claim}, "files/%s/result/0?v=2&claim=%s&" % (accept_id, claim)
    old, new = os.urandom(400000), os.urandom(400000)
    client.ok("POST", "send-results", dict(base, result_files={"r.txt": entry(old)}))
    slow = half_sent(world, target, old, 300000)
    wait_until(lambda: offset_of(client, target)[0] > 0, 5)
    client.ok("POST", "send-results", dict(base, result_files={"r.txt": entry(new)}))
    assert offset_of(client, target) == (0, False)
    slow.connection.send(old[300000:])
    assert slow.connection.getresponse().status >= 400
    assert client.ok("POST", target + "offset=0", body=new)["complete"]
    client.ok("POST", "end-send", dict(base, result="end send"))
    assert client.raw("GET", "files/%s/result/0?v=2" % accept_id)[1] == new


def test_a_success_without_any_of_its_results_is_none(world):
    for results, sent, exit_code, status in ((["r"], {}, 0, "abnormal"), (["r"], {LOGS[0]: b"log"}, 0, "abnormal"), (["r", "s"], {"r": b"1"}, 0, "completed"),
                                             ([], {}, 0, "completed"), (["r"], {"r": b"1"}, 3, "abnormal")):
        client = world.client()
        accept_id = add(client, info(results=results), allow=True)
        claim = client.claim()[1]
        client.walk(accept_id, claim, "end-send", sent, exit_code)
        found = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]
        assert (found["status"], found["exit_code"]) == (status, exit_code), (results, sent, found["reason"])
        assert bool(found["reason"]) == (status == "abnormal")
        client.ok("POST", "finish", {"v": 2, "accept_id": accept_id})


# ---- limits

def test_limits_are_told_before_a_byte_moves(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nmax_file = 1000\nmax_files = 5\nbytes_per_user = 4500\ncalculations_per_user = 4\n"
                       "[%s]\nmax_waiting = 2\n" % SITE).start()
    client = world.client()

    def ask(sizes, **more):
        page = {"f%d" % n: {"size": size, "sha256": "0" * 64} for n, size in enumerate(sizes)}
        return client.call("POST", "add-calcinfo", dict({"v": 2, "request_id": os.urandom(8).hex(), "calc-info": dict(info(), parameter_files=page)}, **more))

    status, first = ask([1001])
    assert (status, first["code"]) == (413, 413) and "f0" in first["message"] and "1000" in first["message"] and "max_file" in first["message"]
    assert ask([1 << 59])[0] == 413 and ask([1 << 60])[0] == 400
    assert ask([0] * 6)[0] == 413
    status, first = ask([0] * 5, more=True)
    assert status == 200
    paged = first["accept_id"]
    assert client.call("POST", "files/%s/input" % paged, {"v": 2, "from": 5, "files": {"g": entry(b"")}, "more": False})[0] == 413
    assert ask([1000, 1000, 1000, 1])[1]["why"] == "bytes_per_user" and ask([1000, 1000, 1000, 1])[0] == 429
    status, first = ask([1000, 1000], more=True)
    assert status == 200                               # a page more would be over the quota, in pages as in one
    status, refused = client.call("POST", "files/%s/input" % first["accept_id"], {
        "v": 2, "from": 2, "files": {"g": {"size": 1000, "sha256": "0" * 64}, "h": {"size": 1, "sha256": "0" * 64}}, "more": False})
    assert (status, refused["why"]) == (429, "bytes_per_user")
    for number in range(2):
        assert ask([], allow=True)[0] == 200
    status, first = ask([], allow=True)
    assert (status, first["why"]) == (429, "calculations_per_user")
    other = world.client(world.issue("bob"))
    status, first = other.call("POST", "add-calcinfo", {"v": 2, "request_id": "r", "allow": True, "calc-info": info()})
    assert (status, first["why"]) == (429, "max_waiting") and SITE in first["message"]
    assert client.claim()                              # room again for the site
    assert other.ok("POST", "add-calcinfo", {"v": 2, "request_id": "r", "allow": True, "calc-info": info()})


def test_a_result_over_the_limit_is_refused_by_name(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nmax_file = 1000\n").start()
    client, accept_id, claim = claimed(world, results=["r"])
    status, first = client.call("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": {"r": {"size": 1001, "sha256": "0" * 64}}})
    assert (status, first["code"]) == (413, 413) and "r: 1001" in first["message"]
    client.ok("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": {}, "refused": {"r": "over the limit"}})
    client.ok("POST", "end-send", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "end send"})
    found = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]
    assert found["refused"] == {"r": "over the limit"} and found["status"] == "abnormal"


def test_what_would_not_fit_on_the_disk_is_refused_at_once(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    status, first = world.client().call("POST", "add-calcinfo", {"v": 2, "request_id": "r", "calc-info": dict(
        info(), parameter_files={"huge": {"size": 1 << 50, "sha256": "0" * 64}})})
    assert (status, first["code"], first["why"]) == (507, 507, "disk")


def fill(folder):
    """Takes all that is left of a file system; returns the path of what takes it."""
    path = os.path.join(str(folder), "filler")
    with open(path, "ab", buffering=0) as out:
        for size in (1 << 20, 4096, 1):
            try:
                while out.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
    return path


def on_disk(make_world, disk):
    """A running relay whose state is on that file system."""
    world = make_world(tls=False, commands=["hello"], ini="[limits]\nspool_free = 0\n[Server]\nstate_dir = %s\n" % (disk / "state"))
    world.state = str(disk / "state")
    return world.start()


@pytest.mark.parametrize("how", ["pieces", "pack"])
def test_a_full_disk_is_told_as_507_and_everything_goes_on_when_there_is_room(make_world, disk_of, how):
    small_disk = disk_of("24m")
    world = on_disk(make_world, small_disk)
    client, data = world.client(), {"a": os.urandom(900000), "b": os.urandom(700000)}
    before = client.register("hello")
    accept_id = add(client, info(inputs=data))
    target = "files/%s/input/" % accept_id
    client.ok("POST", target + "0?v=2&offset=0", body=data["a"][:100000])
    filler = fill(small_disk)
    with open(filler, "r+b") as some:                  # a little room: it ends in the middle of a write
        some.truncate(os.path.getsize(filler) - 300000)
    if how == "pieces":
        status, first = client.call("POST", target + "0?v=2&offset=100000", body=data["a"][100000:])
    else:
        status, first = client.call("POST", target + "pack?v=2&from=0&count=2", body=data["a"] + data["b"])
    assert (status, first["code"], first["why"]) == (507, 507, "disk")
    fill(small_disk)
    refused = 0
    for number in range(40):                           # the database is full too, at some point; it says so, or does it
        status, first = client.call("POST", "add-calcinfo", {"v": 2, "request_id": "full %d" % number, "calc-info": info(note="x" * 60000)})
        assert status in (200, 507, 503), first
        refused += status != 200
    assert world.relay.alive() and client.ok("GET", "calc-progress", {"v": 2, "accept_id": before})["progress"] == "not start"
    os.unlink(filler)
    client = world.client()
    offset = offset_of(client, target + "0?v=2&")[0]
    assert client.ok("POST", target + "0?v=2&offset=%d" % offset, body=data["a"][offset:])["complete"]
    assert client.ok("POST", target + "pack?v=2&from=1&count=1", body=data["b"])["complete"]
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    assert client.claim()[0] == before
    found, claim = client.claim()
    assert found == accept_id
    for number, name in enumerate(data):
        assert client.raw("GET", target + "%d?v=2&claim=%s" % (number, claim))[1] == data[name]
    assert refused > 0 and sorted(os.listdir(os.path.join(world.state, "spool", accept_id[:2], accept_id, "in")))[0] == "000000"
    world.relay.stop()


def test_what_is_fetched_makes_room_for_what_is_new_and_nothing_else_does(make_world, disk_of):
    disk = disk_of("48m")
    world = on_disk(make_world, disk)
    client, data, ids = world.client(), os.urandom(6 << 20), []
    for number in range(5):
        ids.append(client.register("hello", results=["r"]))
        accept_id, claim = client.claim()
        client.walk(accept_id, claim, "end-send", {"r": data[number:]})
        if number:                                     # the oldest one is still to be fetched
            client.ok("POST", "finish", {"v": 2, "accept_id": accept_id})
    spool = [os.path.join(world.state, "spool", one[:2], one) for one in ids]
    waits = info(parameter_files={"large": {"size": 16 << 20, "sha256": "0" * 64}})
    huge = info(parameter_files={"large": {"size": 80 << 20, "sha256": "0" * 64}})
    fields = {"v": 2, "request_id": "huge", "calc-info": huge}
    assert client.call("POST", "add-calcinfo", fields)[0] == 507
    time.sleep(2.2)                                    # two sweeps
    assert all(map(os.path.exists, spool)), "it would not be enough: nothing goes for it"
    fields = {"v": 2, "request_id": "waits", "calc-info": waits}
    assert client.call("POST", "add-calcinfo", fields)[0] == 507
    wait_until(lambda: client.call("POST", "add-calcinfo", fields)[0] == 200, 15)
    assert [os.path.exists(path) for path in spool] == [True, False, True, True, True]
    assert client.raw("GET", "files/%s/result/0?v=2" % ids[0])[1] == data and client.raw("GET", "files/%s/result/0?v=2" % ids[2])[1] == data[2:]
    found = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": ids[1]})
    assert "was fetched" in found["gone"] and found["result-info"]["result_files"] == {"r": entry(data[1:])}
    assert client.ok("GET", "calc-progress", {"v": 2, "accept_id": ids[1]})["status"] == "completed", "it is still known: it is not run again"
    assert client.call("GET", "files/%s/result/0" % ids[1], {"v": 2})[1]["why"] == "room"
    fill(disk)                                         # not even the database can be written to
    for number in range(300):
        if client.call("POST", "add-calcinfo", {"v": 2, "request_id": "full %d" % number, "calc-info": info(note="x" * 60000)})[0] != 200:
            break
    fill(disk)
    wait_until(lambda: client.call("POST", "add-calcinfo", {"v": 2, "request_id": "last", "calc-info": info(note="x" * 60000)})[0] == 200, 30)
    assert os.path.exists(spool[0]) and not os.path.exists(spool[2])


def test_the_ballast_lets_a_full_disk_become_less_full(make_world, disk_of):
    disk = disk_of("48m")
    world = on_disk(make_world, disk)
    ballast = os.path.join(world.state, "ballast")
    assert os.path.getsize(ballast) == relay.BALLAST and os.stat(ballast).st_blocks * 512 >= relay.BALLAST
    client = world.client()
    accept_id = client.register("hello", results=["r"])
    claim = client.claim()[1]
    fill(disk)
    number = 0
    while os.path.exists(ballast):
        number += 1
        assert number < 300 and client.call("POST", "add-calcinfo", {"v": 2, "request_id": "full %d" % number, "calc-info": info(note="x" * 60000)})[0] in (200, 507)
    client.walk(accept_id, claim, "end-send", {"r": b"1"})               # what is under way comes to its end
    client.ok("POST", "finish", {"v": 2, "accept_id": accept_id})
    world.relay.stop()


# ---- memory

def test_memory_does_not_grow_with_number_or_size(make_world):
    world = make_world(commands=["hello"]).start()
    client, files = world.client(), many(5000, seed=2)
    names = list(files)
    accept_id = add(client, dict(info(), parameter_files={name: entry(files[name]) for name in names[:2000]}), more=True)
    for start in (2000, 4000):
        client.ok("POST", "files/%s/input" % accept_id, {"v": 2, "from": start, "files": {name: entry(files[name]) for name in names[start:start + 2000]},
                                                           "more": start == 2000})
    client.ok("POST", "files/%s/input/pack?v=2&from=0&count=5000" % accept_id, body=b"".join(files.values()))
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    part, digest = os.urandom(16 << 20), hashlib.sha256()
    length = (200 << 20) // len(part) * len(part)
    for number in range(length // len(part)):
        digest.update(part)
    large = add(client, dict(info(), parameter_files={"large": {"size": length, "sha256": digest.hexdigest()}}))
    for number in range(length // len(part)):
        client.ok("POST", "files/%s/input/0?v=2&offset=%d" % (large, number * len(part)), body=part)
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": large})
    for accept_id in (accept_id, large):
        found, claim = client.claim()
        assert found == accept_id
        if accept_id != large:
            assert packs(client, "files/%s/input" % accept_id, claim, list(files.values())) == b"".join(files.values())
            continue
        client.connection.request("GET", "/mi-distcomp-api/files/%s/input/0?v=2&claim=%s" % (accept_id, claim), headers={"Authorization": "Bearer " + client.token})
        answer, got = client.connection.getresponse(), 0
        for data in iter(lambda: answer.read(1 << 20), b""):
            got += len(data)
        assert got == length
    assert world.relay.peak() <= 48 << 20, "VmHWM %.1f MiB" % (world.relay.peak() / (1 << 20))
