"""The relay dies at every named point, is silent, comes back: what was answered is there, what was not can be asked again."""
import json
import os
import signal
import socket
import threading
import time

import pytest
import suite
from suite import SITE, entry, wait_until

relay = suite.module("mi_dicomapi.py")
RESULTS = {"r.txt": b"the result"}
INPUT = {"in.bin": os.urandom(300000)}
# label -> (state before, state after); "" is before there is any
CALLS = {"add-calcinfo": ("", relay.ALLOWED), "allow-wait-calc": (relay.REGISTERED, relay.ALLOWED), "calc-request": (relay.ALLOWED, relay.SENDING),
         "calc-params-complete": (relay.SENDING, relay.SENT), "calc-start": (relay.SENT, relay.RUNNING), "calc-end": (relay.RUNNING, relay.ENDED),
         "send-results": (relay.ENDED, relay.GETTING), "end-send": (relay.GETTING, relay.GOT), "finish": (relay.GOT, relay.FINISHED),
         "cancel-wait-calc": (relay.REGISTERED, relay.GOT), "calc-end abnormal": (relay.SENDING, relay.ENDED)}
MORE = {"calc-end": {"result": "calc end", "exit_code": 0}, "calc-end abnormal": {"result": "abnormal", "reason": "refused"},
        "send-results": {"result_files": {name: entry(data) for name, data in RESULTS.items()}}, "end-send": {"result": "end send"}}
WALK = {relay.SENT: "calc-params-complete", relay.RUNNING: "calc-start", relay.ENDED: "calc-end", relay.GETTING: "send-results", relay.GOT: "end-send"}
KILLED = (OSError, suite.http.client.HTTPException)


class Case:
    """A calculation just before the call with this label, on a site of its own."""

    def __init__(self, world, label, number):
        self.world, self.label, self.site, self.accept_id, self.claim = world, label, "s%d" % number, None, None
        self.before, self.after = CALLS[label]
        client = world.client()
        if not self.before:
            return
        self.accept_id = client.register("hello", results=RESULTS, allow=self.before != relay.REGISTERED, site=self.site)
        if self.before not in (relay.REGISTERED, relay.ALLOWED):
            self.accept_id, self.claim = client.claim(site=self.site, take="take-of-" + self.site)
        if self.before in WALK:
            client.walk(self.accept_id, self.claim, WALK[self.before], RESULTS)
        if self.before == relay.GETTING:
            client.ok("POST", "files/%s/result/0?v=2&offset=0&claim=%s" % (self.accept_id, self.claim), body=RESULTS["r.txt"])
        self.picture = world.picture(self.accept_id)

    def call(self):
        """Makes the call; (HTTP status, errors[0])."""
        client = self.world.client()
        if self.label == "add-calcinfo":
            return client.call("POST", "add-calcinfo", {"v": 2, "request_id": "request-" + self.site, "allow": True, "calc-info": {
                "command": "hello", "remote-site": self.site, "parameters": "", "result_files": {}, "parameter_files": {}}})
        if self.label == "calc-request":
            return client.call("POST", "calc-request", {"v": 2, "site_id": self.site, "poller": "p", "take": "take-of-" + self.site, "wait": 0})
        return client.call("POST", self.label.split(" ")[0], dict({"v": 2, "accept_id": self.accept_id, "claim": self.claim}, **MORE.get(self.label, {})))

    def check(self, point, answer):
        """After the relay is back: answered is there, unanswered is as before or done, and asking again ends well."""
        rows = self.world.rows("SELECT accept_id, state FROM calculations WHERE site = ?", self.site)
        happened = point in ("committed", "answered")
        if happened or self.before:
            assert [row["state"] for row in rows] == [self.after if happened else self.before], (self.label, point)
        else:
            assert rows == []
        if not happened and self.before:
            assert self.world.picture(self.accept_id) == self.picture, (self.label, point)
        status, first = self.call()
        assert (status, first["code"]) == (200, 200), (self.label, point, first)
        if answer is not None:
            assert answer[0] == 200 and dict(answer[1], known=None) == dict(first, known=None), (self.label, point)
        rows = self.world.rows("SELECT accept_id, state FROM calculations WHERE site = ?", self.site)
        assert [row["state"] for row in rows] == [self.after], (self.label, point, "asked again")


@pytest.mark.parametrize("point", ["received", "uncommitted", "committed", "answered"])
def test_killed_at_each_point_of_each_call_nothing_answered_is_lost(make_world, point):
    world = make_world(tls=False, commands=["hello"], sites=["s%d" % number for number in range(len(CALLS))])
    waiting = None
    for number, label in enumerate(CALLS):
        fault = label.split(" ")[0] if point in ("received", "answered") else label
        world.start(suite.clean_env(MI_FAULT="%s %s" % (fault, point)))
        if waiting:                                    # the one before, in the relay after its death
            waiting[0].check(point, waiting[1])
        case, answer = Case(world, label, number), None
        try:
            answer = case.call()
        except KILLED:
            pass
        assert answer is None or answer[0] == 200, (label, point, answer)
        assert world.relay.popen.wait(10) == -signal.SIGKILL, (label, point)
        assert (answer is not None) == (point == "answered"), (label, point, answer)
        waiting = case, answer
    world.start()
    waiting[0].check(point, waiting[1])


@pytest.mark.parametrize("kind", ["input", "result"])
@pytest.mark.parametrize("how", ["pieces", "pack"])
def test_killed_at_each_point_of_an_upload_it_goes_on_and_ends_whole(make_world, kind, how):
    world = make_world(tls=False, commands=["hello"])
    data = {"a.bin": os.urandom(200000), "b.bin": b"", "c.bin": b"small"}
    manifest = {name: entry(text) for name, text in data.items()}
    for point in ("files received", "files piece", "files synced", "files uncommitted", "files committed", "files answered"):
        if (how, point) == ("pack", "files piece"):
            continue
        world.start(suite.clean_env(MI_FAULT=point))
        client, claim = world.client(), ""
        if kind == "input":
            accept_id = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "%s %s" % (how, point), "calc-info": {
                "command": "hello", "remote-site": SITE, "parameters": "", "result_files": {}, "parameter_files": manifest}})["accept_id"]
        else:
            client.register("hello", results=data)
            accept_id, claim = client.claim()
            client.walk(accept_id, claim, "send-results", data)
        try:
            upload(client, "files/%s/%s" % (accept_id, kind), claim, data, how)
            assert point == "files answered", (kind, how, point)
        except KILLED:
            pass
        assert world.relay.popen.wait(10) == -signal.SIGKILL, point
        world.start()
        client = world.client()
        upload(client, "files/%s/%s" % (accept_id, kind), claim, data, how)
        if kind == "input":
            client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
            claim = client.claim()[1]
        else:
            client.ok("POST", "end-send", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "end send"})
        for number, text in enumerate(data.values()):
            status, body, headers = client.raw("GET", "files/%s/%s/%d?v=2&claim=%s" % (accept_id, kind, number, claim))
            assert (status, body) == (200, text), (kind, how, point, number)
        world.relay.kill()


def upload(client, target, claim, data, how):
    """Uploads all files as one pack, or in pieces of up to 150,000 bytes from where the relay says."""
    if how == "pack":
        return client.ok("POST", "%s/pack?v=2&from=0&count=%d&claim=%s" % (target, len(data), claim), body=b"".join(data.values()))
    for number, text in enumerate(data.values()):
        place = "%s/%d?v=2&claim=%s&offset=" % (target, number, claim)
        found = json.loads(client.raw("GET", place)[1].decode())["errors"][0]
        while not found["complete"]:
            found = client.ok("POST", place + str(found["offset"]), body=text[found["offset"]:found["offset"] + 150000])


def test_killed_at_each_point_of_a_manifest_page_the_page_is_sent_again(make_world):
    world = make_world(tls=False, commands=["hello"])
    pages = [{"%d%03d" % (page, n): entry(b"") for n in range(100)} for page in range(2)]
    for point in ("files page uncommitted", "files page committed"):
        world.start(suite.clean_env(MI_FAULT=point))
        accept_id = world.client().ok("POST", "add-calcinfo", {"v": 2, "request_id": point, "more": True, "calc-info": {
            "command": "hello", "remote-site": SITE, "parameters": "", "result_files": {}, "parameter_files": pages[0]}})["accept_id"]
        words = {"v": 2, "from": 100, "files": pages[1], "more": False}
        with pytest.raises(KILLED):
            world.client().call("POST", "files/%s/input" % accept_id, words)
        assert world.relay.popen.wait(10) == -signal.SIGKILL
        world.start()
        client = world.client()
        assert client.call("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})[1]["more"] == (point == "files page uncommitted")
        first = client.ok("POST", "files/%s/input" % accept_id, words)
        assert first == client.ok("POST", "files/%s/input" % accept_id, words)
        client.ok("POST", "files/%s/input/pack?v=2&from=0&count=200" % accept_id, body=b"")
        client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
        world.relay.kill()


def test_whatever_was_answered_under_load_is_there_after_kill_9(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    answered, stop = {}, threading.Event()

    def register(worker):
        client, count = world.client(), 0
        while not stop.is_set():
            request_id = "%d-%d" % (worker, count)
            try:
                answered[request_id] = client.register("hello", request_id)
            except KILLED:
                return
            count += 1

    threads = [threading.Thread(target=register, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answered) > 300)
    world.relay.kill()
    stop.set()
    for thread in threads:
        thread.join(10)
    found = {row["request_id"]: row["accept_id"] for row in world.rows("SELECT request_id, accept_id FROM calculations WHERE state = ?", relay.ALLOWED)}
    assert {key: found.get(key) for key in answered} == answered
    world.start()
    some = sorted(answered)[0]
    assert world.client().register("hello", some) == answered[some]


def test_a_claim_survives_the_relays_death_and_its_take_gets_it_again(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[times]\nlease = 1h\naccept_lease = 1h\n").start()
    client = world.client()
    ids = [client.register("hello") for number in range(3)]
    claims = [client.claim(take="take-%d-of-mine" % number) for number in range(3)]
    assert [accept_id for accept_id, claim in claims] == ids
    client.walk(ids[1], claims[1][1], "calc-params-complete")
    client.walk(ids[2], claims[2][1], "calc-start")
    world.relay.kill()
    world.start()
    client = world.client()
    assert client.claim(take="take-0-of-mine") == claims[0] == client.claim(take="take-0-of-mine")
    assert client.claim(take="another-take") is None
    client.ok("POST", "calc-start", {"v": 2, "accept_id": ids[1], "claim": claims[1][1]})
    client.ok("POST", "calc-end", {"v": 2, "accept_id": ids[2], "claim": claims[2][1], "result": "calc end", "exit_code": 0})


def test_two_pollers_of_one_site_get_200_calculations_each_once(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    client, got, all_there = world.client(), ([], [], [], []), threading.Event()
    wanted = {client.register("hello") for number in range(100)}

    def take(mine):
        one, last = world.client(), False
        while not last:
            last = all_there.is_set()
            for found in iter(lambda: one.claim(wait=0 if last else 1), None):
                mine.append(found[0])
                one.walk(found[0], found[1], "calc-start")

    threads = [threading.Thread(target=take, args=(mine,)) for mine in got]
    for thread in threads:
        thread.start()
    wanted |= {client.register("hello") for number in range(100)}
    all_there.set()
    for thread in threads:
        thread.join(30)
    assert len(wanted) == 200 and sorted(wanted) == sorted(sum(got, []))
    assert world.rows("SELECT COUNT(*) AS n FROM calculations WHERE state = 'running' AND attempt = 1") == [{"n": 200}]


# ---- waiting

def in_thread(call):
    """Starts call() in a thread; a function that gives its (result, when it came)."""
    found = []

    def run():
        result = call()
        found.append((result, time.monotonic()))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(seconds=10):
        thread.join(seconds)
        assert found, "no answer after %s s" % seconds
        return found[0]
    return result


def test_a_parked_calc_request_is_woken_at_once_by_allow(world):
    waiting = in_thread(lambda: world.client().claim(wait=20))
    time.sleep(0.5)
    accept_id = world.client().register("hello", inputs={"a": b"1"}, allow=False)
    world.client().ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    allowed = time.monotonic()
    (found, claim), when = waiting()
    assert found == accept_id and when - allowed < 1


def test_each_of_several_waiting_pollers_is_woken_for_one_calculation(world):
    waiting = [in_thread(lambda: world.client().claim(wait=20)) for number in range(5)]
    time.sleep(0.5)
    begun = time.monotonic()
    ids = {world.client().register("hello") for number in range(5)}
    found = [result() for result in waiting]
    assert {accept_id for (accept_id, claim), when in found} == ids
    assert max(when for result, when in found) - begun < 2


def test_a_vanished_waiter_swallows_nothing(world):
    gone = world.client()
    gone.connect()
    gone.connection.request("POST", "/mi-distcomp-api/calc-request", json.dumps(
        {"v": 2, "site_id": SITE, "poller": "gone", "take": "gone-gone-gone", "wait": 20}), {"Authorization": "Bearer " + gone.token})
    time.sleep(0.3)
    waiting = in_thread(lambda: world.client().claim(wait=20))
    time.sleep(0.3)
    gone.connection.sock.close()
    gone.connection.close()
    time.sleep(0.2)
    accept_id, allowed = world.client().register("hello"), time.monotonic()
    (found, claim), when = waiting()
    assert found == accept_id and when - allowed < 1


def test_a_waiter_without_room_for_it_swallows_nothing(world):
    words = {"v": 2, "site_id": SITE, "poller": "small", "take": "small-small", "wait": 2, "free": 10}
    small = in_thread(lambda: world.client().call("POST", "calc-request", words))
    time.sleep(0.3)
    waiting = in_thread(lambda: world.client().claim(wait=20))
    time.sleep(0.3)
    accept_id, allowed = world.client().register("hello", inputs={"a": b"x" * 100}), time.monotonic()
    (found, claim), when = waiting()
    assert found == accept_id and when - allowed < 1
    assert small()[0][1]["code"] == "0300"


def test_a_parked_calc_progress_is_woken_by_every_step(world):
    client, watcher, asker = world.client(), world.client(), world.client()
    accept_id = client.register("hello", results=RESULTS, allow=False)
    stamp = watcher.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["stamp"]
    assert asker.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["stamp"] == stamp
    claim = [None]
    steps = [("allow-wait-calc", {}, "not start")] + [("calc-request", {}, "sending params")] + [
        (name, MORE.get(name, {}), word) for name, word in (("calc-params-complete", "complete send"), ("calc-start", "running"), ("calc-end", "calc end"),
                                                            ("send-results", "getting return"), ("end-send", "got return"))]
    for name, more, word in steps:
        waiting = in_thread(lambda: watcher.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id, "wait": 20, "known": stamp}))
        time.sleep(0.1)
        if name == "calc-request":
            claim[0] = client.claim()[1]
        else:
            if name == "end-send":
                client.ok("POST", "files/%s/result/0?v=2&offset=0&claim=%s" % (accept_id, claim[0]), body=RESULTS["r.txt"])
            client.ok("POST", name, dict({"v": 2, "accept_id": accept_id, "claim": claim[0]}, **more))
        done = time.monotonic()
        assert asker.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["progress"] == word, "whoever asks after the step sees it"
        found, when = waiting()
        assert found["progress"] == word and found["stamp"] != stamp and when - done < 0.5, name
        stamp = found["stamp"]
    found = watcher.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})
    assert (found["status"], found["exit_code"], found["message"]) == ("completed", 0, "status:got return")
    assert watcher.ok("GET", "calc-status", {"v": 2, "accept_id": accept_id})["message"] == "status:completed"


def test_calc_start_makes_step_4_too_if_the_inputs_are_said_to_be_complete(world):
    client = world.client()
    accept_id = client.register("hello")
    found = client.ok("POST", "calc-request", {"v": 2, "site_id": SITE, "poller": "test", "take": "complete-complete"})
    me = {"v": 2, "accept_id": accept_id, "claim": found["claim"]}
    assert found["complete"] is True, "what tells a poller that it may"
    assert client.call("POST", "calc-start", me)[1]["code"] == 409 and world.state_of(accept_id) == relay.SENDING, "not without the word"
    assert client.call("POST", "calc-start", dict(me, complete=True, claim="1.other"))[1]["code"] == 409 and world.state_of(accept_id) == relay.SENDING
    for turn in range(2):
        client.ok("POST", "calc-start", dict(me, complete=True))                     # asked again: the answer was lost
    assert world.state_of(accept_id) == relay.RUNNING
    made = [row["step"] for row in world.rows("SELECT step FROM events JOIN past ON past.seq = events.calc WHERE accept_id = ? ORDER BY at", accept_id)]
    assert made[-2:] == ["calc-params-complete", "calc-start"], made
    client.ok("POST", "calc-end", dict(me, result="calc end", exit_code=0))
    assert client.call("POST", "calc-start", dict(me, complete=True))[1]["code"] == 409 and world.state_of(accept_id) == relay.ENDED


def test_a_parked_calc_progress_is_woken_by_a_cancel_and_who_asks_sees_it(world):
    client, watcher, asker = world.client(), world.client(), world.client()
    accept_id = client.register("hello")
    client.walk(accept_id, client.claim()[1], "calc-start")
    first = [one.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id}) for one in (watcher, asker)][0]
    waiting = in_thread(lambda: watcher.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id, "wait": 20, "known": first["stamp"]}))
    time.sleep(0.1)
    client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "reason": "enough"})
    done = time.monotonic()
    assert not first["cancelling"] and asker.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["cancelling"]
    found, when = waiting()
    assert found["cancelling"] and found["progress"] == "running" and when - done < 0.5


def test_a_wait_ends_when_its_time_is_over_and_not_before(world):
    accept_id = world.client().register("hello", allow=False)
    stamp = world.client().ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["stamp"]
    begun = time.monotonic()
    assert world.client().ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id, "wait": 1, "known": stamp})["stamp"] == stamp
    assert 1 <= time.monotonic() - begun < 3
    nobody = world.client(world.issue("nobody"))
    begun = time.monotonic()
    assert nobody.claim(wait=1) is None
    assert 1 <= time.monotonic() - begun < 3


# ---- silence

def test_a_silent_claim_goes_back_before_calc_start_and_never_after_it(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[times]\naccept_lease = 1s\nlease = 2s\n").start()
    client = world.client()
    ids = [client.register("hello", results=RESULTS) for number in range(5)]
    claimed, sent, running, ended, getting = ids
    held = {}
    for accept_id, step in ((claimed, None), (sent, "calc-params-complete"), (running, "calc-start"), (ended, "calc-end"), (getting, "send-results")):
        found, held[accept_id] = client.claim()
        assert found == accept_id
        if step:
            client.walk(accept_id, held[accept_id], step, RESULTS)
    stamp = client.ok("GET", "calc-progress", {"v": 2, "accept_id": running})["stamp"]
    waiting = in_thread(lambda: world.client().ok("GET", "calc-progress", {"v": 2, "accept_id": running, "wait": 20, "known": stamp}))
    again = {}
    for number in range(2):
        accept_id, again[accept_id] = client.claim(wait=10)
        client.walk(accept_id, again[accept_id], "calc-start")
        status, first = client.call("POST", "calc-end", dict({"v": 2, "accept_id": accept_id, "claim": held[accept_id]}, **MORE["calc-end"]))
        assert (status, first["why"]) == (409, "claim")
    assert set(again) == {claimed, sent} and all(claim.startswith("2.") for claim in again.values())
    away = waiting()[0]
    assert away["out_of_contact"] is not None and away["progress"] == "running" and away["stamp"] != stamp
    wait_until(lambda: all(client.ok("GET", "calc-progress", {"v": 2, "accept_id": key})["out_of_contact"] is not None for key in (running, ended, getting)), 6)
    assert client.claim(wait=1) is None
    # the holder comes back: by a heartbeat, by its next step, by a byte
    beat = {"v": 2, "site_id": SITE, "poller": "p", "wait": 0, "calcs": {running: {"claim": held[running], "phase": "running"}}}
    assert client.ok("POST", "heartbeat", beat)["gone"] == []
    client.ok("POST", "send-results", dict({"v": 2, "accept_id": ended, "claim": held[ended]}, **MORE["send-results"]))
    client.ok("POST", "files/%s/result/0?v=2&offset=0&claim=%s" % (getting, held[getting]), body=RESULTS["r.txt"])
    for accept_id in (running, ended, getting):
        assert client.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["out_of_contact"] is None
    client.ok("POST", "end-send", {"v": 2, "accept_id": getting, "claim": held[getting], "result": "end send"})
    assert client.ok("GET", "get-calc-result", {"v": 2, "accept_id": getting})["result-info"]["status"] == "completed"


def slowly_up(world, accept_id, data, seconds):
    """Sends data as one piece of input 0, over so many seconds; whether it was taken."""
    client = world.client()
    client.connect()
    client.connection.putrequest("POST", "/mi-distcomp-api/files/%s/input/0?v=2&offset=0" % accept_id)
    for pair in (("Content-Length", str(len(data))), ("Authorization", "Bearer " + client.token)):
        client.connection.putheader(*pair)
    client.connection.endheaders()
    for start in range(0, len(data), 1 << 20):
        client.connection.send(data[start:start + (1 << 20)])
        time.sleep(seconds / (len(data) >> 20))
    return client.connection.getresponse().status == 200


def slowly_down(world, accept_id, claim, length, seconds):
    """Reads input 0 in one request, over so many seconds; its bytes."""
    client, got = world.client(), b""
    client.connect()
    client.connection.connect()
    client.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)       # the relay is to notice how slow it goes
    client.connection.request("GET", "/mi-distcomp-api/files/%s/input/0?v=2&claim=%s" % (accept_id, claim), headers={"Authorization": "Bearer " + client.token})
    answer = client.connection.getresponse()
    while len(got) < length:
        got += answer.read(1 << 20)
        time.sleep(seconds / (length >> 20))
    return got


def test_every_call_and_every_byte_renews_the_lease_and_keeps_a_registration(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[times]\naccept_lease = 5s\nlease = 5s\nregister_for = 5s\nkeep_fetched = 1s\n").start()
    client, data = world.client(), os.urandom(16 << 20)
    large = client.register("hello", inputs={"large": data})
    slow = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "slow", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameters": "", "result_files": {}, "parameter_files": {"large": entry(data)}}})["accept_id"]
    held = dict([client.claim()])
    down = in_thread(lambda: slowly_down(world, large, held[large], len(data), 8))
    up = in_thread(lambda: slowly_up(world, slow, data, 7))
    ids = [client.register("hello", inputs={"a": b"12"}) for number in range(3)]
    held.update(client.claim() for number in ids)
    until = time.monotonic() + 8
    while time.monotonic() < until:                    # much longer than a lease
        client.ok("GET", "calc-params", {"v": 2, "accept_id": ids[0], "claim": held[ids[0]]})
        assert client.raw("GET", "files/%s/input/0?v=2&claim=%s" % (ids[1], held[ids[1]]))[0] == 200
        client.ok("POST", "heartbeat", {"v": 2, "site_id": SITE, "poller": "p", "wait": 0, "calcs": {ids[2]: {"claim": held[ids[2]], "phase": "inputs"}}})
        time.sleep(0.25)
    assert down()[0] == data
    assert [world.state_of(accept_id) for accept_id in ids + [large]] == [relay.SENDING] * 4
    assert up()[0] is True
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": slow})


def test_retention_takes_what_its_time_has_come_for_and_nothing_else(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[times]\nlease = 1s\nlost_after = 1s\nregister_for = 2s\nkeep_fetched = 1s\nkeep_results = 4s\n").start()
    client = world.client()
    client.register("hello", results=RESULTS)
    finished, claim = client.claim()
    client.walk(finished, claim, "end-send", RESULTS)
    client.ok("POST", "finish", {"v": 2, "accept_id": finished})
    client.register("hello", results=RESULTS)
    lost, claim = client.claim()
    client.walk(lost, claim, "calc-start")
    queued = client.register("hello")                  # allowed: stays for ever
    forgotten = client.register("hello", inputs={"a": b"12345"}, allow=False)
    moving = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "moving", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameters": "", "result_files": {}, "parameter_files": {"a": entry(b"x" * 100)}}})["accept_id"]
    sent, begun = 0, time.monotonic()
    while time.monotonic() - begun < 4.5:              # twice as long as register_for
        sent = client.ok("POST", "files/%s/input/0?v=2&offset=%d" % (moving, sent), body=b"x")["offset"]
        time.sleep(0.15)
    assert world.state_of(finished) is None and world.state_of(forgotten) is None
    assert world.state_of(moving) == relay.REGISTERED and world.state_of(queued) == relay.ALLOWED
    assert client.call("GET", "get-calc-result", {"v": 2, "accept_id": finished})[0] == 404
    found = client.ok("GET", "calc-progress", {"v": 2, "accept_id": lost})
    assert (found["progress"], found["status"]) == ("got return", "abnormal") and found["reason"].startswith("lost")
    for name in ("calc-end", "send-results", "end-send"):                # the late holder is told, and keeps what it has
        status, first = client.call("POST", name, dict({"v": 2, "accept_id": lost, "claim": claim}, **MORE[name]))
        assert (status, first["why"]) == (409, "claim"), name
    wait_until(lambda: world.state_of(moving) is None and world.state_of(lost) is None, 10)
    wait_until(lambda: not [name for above, names, files in os.walk(os.path.join(world.state, "spool")) for name in names if len(name) == 36], 3)
    assert world.state_of(queued) == relay.ALLOWED
    assert world.rows("SELECT COUNT(*) AS n FROM files") == [{"n": 0}]


def test_the_relays_own_downtime_counts_against_nobody(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[times]\nkeep_fetched = 1s\nregister_for = 1h\nlease = 3s\naccept_lease = 3s\n").start()
    client = world.client()
    client.register("hello")
    accept_id, claim = client.claim()
    registered = client.register("hello", inputs={"a": b"12345"}, allow=False)
    world.relay.kill()
    import sqlite3
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    db.execute("UPDATE calculations SET registered = registered - 7200, touched = touched - 7200")       # it was down for two hours
    db.commit()
    db.close()
    world.start()
    time.sleep(2.2)                                    # two sweeps
    assert world.state_of(registered) == relay.REGISTERED and world.state_of(accept_id) == relay.SENDING
    world.client().ok("POST", "allow-wait-calc", {"v": 2, "accept_id": registered})
    world.client().walk(accept_id, claim, "end-send")


# ---- the end of a relay

def parked(world, count):
    """Connections with calc-requests that wait."""
    found = []
    for number in range(count):
        client = world.client()
        client.connect()
        client.connection.request("POST", "/mi-distcomp-api/calc-request", json.dumps(
            {"v": 2, "site_id": SITE, "poller": "p", "take": "take-%08d" % number, "wait": 40}), {"Authorization": "Bearer " + client.token})
        found.append(client)
    return found


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_within_two_seconds_with_clients_waiting(make_world, number, code):
    world = make_world(commands=["hello"]).start()
    accept_id = world.client().register("hello")
    world.client().claim()
    waiting = parked(world, 20)
    time.sleep(0.3)
    begun = time.monotonic()
    assert world.relay.stop(number) == code and time.monotonic() - begun < 2
    for client in waiting:
        with pytest.raises(KILLED):
            client.connection.getresponse()
    last = world.relay.text().splitlines()[-1]
    assert " stopped " in last and number.name in last
    assert not os.path.exists(os.path.join(world.state, "state.sqlite3-wal")) or not os.path.getsize(os.path.join(world.state, "state.sqlite3-wal"))
    world.start()
    assert world.client().ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["progress"] == "sending params"


def test_a_call_that_runs_is_answered_before_the_end(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    client = world.client()
    data = INPUT["in.bin"]
    accept_id = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "half", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameters": "", "result_files": {}, "parameter_files": {"in.bin": entry(data)}}})["accept_id"]
    client.connection.putrequest("POST", "/mi-distcomp-api/files/%s/input/0?v=2&offset=0" % accept_id)
    client.connection.putheader("Content-Length", str(len(data)))
    client.connection.putheader("Authorization", "Bearer " + client.token)
    client.connection.endheaders(data[:100000])
    time.sleep(0.3)
    world.relay.popen.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    client.connection.send(data[100000:])
    answer = client.connection.getresponse()
    assert answer.status == 200 and json.loads(answer.read().decode())["errors"][0]["complete"] is True
    assert world.relay.popen.wait(5) == 0
    world.start()
    world.client().ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})


def test_a_second_relay_on_the_same_directory_is_refused(world):
    done = suite.run("mi_dicomapi.py", "serve", "--ini", world.ini)
    assert done.returncode == 75 and suite.one_line(done.stderr) and world.state in done.stderr
    assert world.client().ok("GET", "calc-progress", {"v": 2, "accept_id": world.client().register("hello", allow=False)})
