"""Many calculations from one Python program: futures, one parked call for all of them, and what they survive."""
import asyncio
import json
import os
import re
import subprocess
import threading

import pytest

import suite
from suite import SITE, wait_until

MANY = r"""
import json, os, sys, threading
sys.path.insert(0, %r)
import mi_system_wf as wf
count, way = int(sys.argv[1]), json.loads(sys.argv[2])
url, site, futures = way.pop("url"), way.pop("site"), {}
for number in range(count):
    with open("in", "w") as out:
        out.write("%%d\n" %% number)
    futures[wf.submit(url, site, "square", "in", "out", to="r%%d" %% number, **way)] = number
    print("submitted", number, flush=True)
wrong, codes = [], []
for future in wf.as_completed(futures):
    codes.append(future.result().exit_code)
    with open("r%%d/out" %% futures[future]) as text:
        wrong += [futures[future]] if text.read() != "%%d\n" %% futures[future] ** 2 else []
    print("done", len(codes), flush=True)
with open("/proc/self/status") as text:
    print(json.dumps({"wrong": wrong, "codes": codes, "status": text.read(), "modules": sorted(sys.modules)}))
"""
WAITING = r"""
import _thread, json, os, signal, sys, threading, time
sys.path.insert(0, %r)
import mi_system_wf as wf
way, main = json.loads(sys.argv[1]), threading.get_ident()
def stop():
    while True:                                        # (a signal in the last moment before it waits would be seen only after it)
        time.sleep(0.5)
        if sys._current_frames()[main].f_code.co_filename == threading.__file__:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
url, site = way.pop("url"), way.pop("site")
futures = [wf.submit(url, site, "wait", "in", "out", request_id="%%s-%%d" %% (sys.argv[2], number), to="r%%d" %% number, **way) for number in range(3)]
_thread.start_new_thread(stop, ())
try:
    futures[0].result() if sys.argv[2] == "result" else list(wf.as_completed(futures))
except KeyboardInterrupt as leaving:
    print(json.dumps({"ids": leaving.accept_ids, "all": [one.accept_id for one in futures], "said": str(leaving)}))
"""


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A relay and a poller of ours. square: the square of what is in `in`; wait: 3, when the file `go` is there."""
    world = suite.World(tmp_path_factory.mktemp("world"), commands=["square", "wait", "unlisted"]).start()
    for name, text in (("square", "read -r n <in; echo $((n * n)) >out\n"), ("wait", "until [ -e %s/go ]; do sleep 0.05; done; exit 3\n" % world.folder)):
        path = os.path.join(world.folder, name)
        with open(path, "w") as out:
            out.write("#!/bin/sh\n" + text)
        os.chmod(path, 0o755)
    world.poller({name: "argv = %s/%s\nmatch = %s\n" % (world.folder, name, name) for name in ("square", "wait")}, ini="jobs = 8\n")
    world.way = {"token_file": world.token_file(), "ca_file": world.cert}
    yield world
    world.close()


@pytest.fixture
def wf(tmp_path, monkeypatch):
    """The workflow side as a module, in a directory with an input, with a memory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "in").write_text("7\n")
    return suite.module("mi_system_wf.py")


def program(text, world, folder, *words):
    """A Python program of its own, its output in the file `said`."""
    (folder / "program.py").write_text(text % suite.ROOT)
    (folder / "in").write_text("7\n")
    way = json.dumps(dict(world.way, url=world.url, site=SITE))
    with open(str(folder / "said"), "wb") as out:
        return subprocess.Popen([suite.PYTHON, "-B", "program.py"] + [way if word == "WAY" else word for word in words], cwd=str(folder), stdout=out,
                                stderr=out, env=suite.clean_env(HOME=str(folder)))


@pytest.mark.parametrize("count", [40, 1000])
def test_many_calculations_of_one_process_come_back_right_also_when_the_relay_is_killed_twice(busy, count, tmp_path, pytestconfig):
    if count == 1000 and not pytestconfig.getoption("--long"):
        pytest.skip("--long")
    process = program(MANY, busy, tmp_path, str(count), "WAY")
    try:
        for mark in ("submitted %d\n" % (count // 2), "done %d\n" % (count // 3)):
            wait_until(lambda: mark in (tmp_path / "said").read_text() or process.poll() is not None, 300, mark)
            busy.relay.kill()
            busy.start()
        assert process.wait(500) == 0, (tmp_path / "said").read_text()[-2000:]
    finally:
        process.kill()
        process.wait()
    found = json.loads((tmp_path / "said").read_text().splitlines()[-1])
    assert found["wrong"] == [] and found["codes"] == [0] * count
    status = {key: int(value) for key, value in re.findall(r"(\w+):\s+(\d+)", found["status"])}
    assert status["VmHWM"] <= 100 << 10 and status["Threads"] <= 10, found["status"]
    assert busy.rows("SELECT COUNT(*) AS n FROM calculations WHERE command = 'square' AND attempt > 1") == [{"n": 0}]


def test_a_future_calls_back_and_can_be_awaited_and_a_commands_failure_is_no_exception(wf, busy):
    called = threading.Event()
    one = wf.submit(busy.url, SITE, "square", "in", ["out"], to="one", **busy.way)
    one.add_done_callback(lambda future: called.set())
    result = one.result(60)
    assert (result.exit_code, result.accept_id, one.state, one.cancel()) == (0, one.accept_id, "done", False) and called.wait(10)
    with open("one/out") as text:
        assert text.read() == "49\n"
    (open(os.path.join(busy.folder, "go"), "w")).close()

    async def both():
        return await asyncio.gather(*(waited(wf.submit(busy.url, SITE, command, "in", "out", to=command, **busy.way)) for command in ("square", "wait")))

    async def waited(future):
        return await future
    loop = asyncio.new_event_loop()
    try:
        assert [found.exit_code for found in loop.run_until_complete(both())] == [0, 3]
    finally:
        loop.close()
        os.unlink(os.path.join(busy.folder, "go"))


def test_a_result_that_takes_long_to_fetch_keeps_no_other_waiting(wf, busy, monkeypatch):
    begun, go, fetch = threading.Event(), threading.Event(), wf.fetch

    def slow(relay, accept_id, to, *words):
        if to == "large":
            begun.set()
            go.wait(60)
        return fetch(relay, accept_id, to, *words)
    monkeypatch.setattr(wf, "fetch", slow)
    try:
        large = wf.submit(busy.url, SITE, "square", "in", ["out"], to="large", **busy.way)
        assert begun.wait(60)
        small = [wf.submit(busy.url, SITE, "square", "in", ["out"], to="small%d" % number, **busy.way) for number in range(3)]
        assert [one.result(60).exit_code for one in small] == [0, 0, 0] and not large.done()
    finally:
        go.set()
    assert large.result(60).exit_code == 0


@pytest.mark.parametrize("how", ["result", "as_completed"])
def test_ctrl_c_stops_waiting_only_and_names_what_goes_on_and_attach_finds_it(wf, busy, tmp_path, monkeypatch, how):
    process = program(WAITING, busy, tmp_path, "WAY", how)
    try:
        assert process.wait(30) == 0, (tmp_path / "said").read_text()
    finally:
        process.kill()
        process.wait()
    found = json.loads((tmp_path / "said").read_text().splitlines()[-1])
    assert found["ids"] == (found["all"][:1] if how == "result" else found["all"]) and found["ids"][0] in found["said"]
    assert {busy.state_of(one) for one in found["all"]} <= {"allowed", "sending", "sent", "running"}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ".local" / "state"))
    again = wf.attach(busy.url, how + "-", **busy.way)
    assert [one.accept_id for one in again] == found["all"] and wf.attach(busy.url, how + "-1", **busy.way)[0] is again[1]
    (open(os.path.join(busy.folder, "go"), "w")).close()
    try:
        assert {one.result(60).exit_code for one in wf.as_completed(again, 60)} == {3}
        assert [one.result(60).exit_code for one in wf.attach(busy.url, how + "-", to="again", **busy.way)] == [3] * 3        # fetched already: once more
    finally:
        os.unlink(os.path.join(busy.folder, "go"))
    assert sorted(os.listdir("again")) == sorted(found["all"]) and os.path.exists(os.path.join("r0", suite.LOGS[0]))


def test_what_cannot_be_is_an_exception_of_its_own_kind(wf, busy, tmp_path):
    for kind, code, words in ((wf.InputMissing, 66, (SITE, "square", "gone", "out")), (wf.Refused, 77, (SITE, "none", "in", "out")),
                              (wf.UsageError, 64, (SITE, "square", "in", "../out"))):
        with pytest.raises(kind) as caught:
            wf.submit(busy.url, *words, **busy.way)
        assert caught.value.code == code and isinstance(caught.value, wf.Stop)
        with pytest.raises(kind):
            wf.run(busy.url, *words, **busy.way)
    with pytest.raises(wf.Unavailable):
        wf.submit("https://127.0.0.1:%d" % suite.a_port(), SITE, "square", "in", "out", patience=0, **busy.way)
    with pytest.raises(wf.ConfigError):
        wf.submit(busy.url, SITE, "square", "in", "out", token_file=str(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    with pytest.raises(wf.DiskError):
        wf.submit(busy.url, SITE, "square", "in", "out", to="file/x", **busy.way)
    refused = wf.submit(busy.url, SITE, "unlisted", "in", "out", **busy.way).result(60)
    assert refused.exit_code == 77 and refused.ended_by == "poller"


def test_a_list_holds_ones_own_calculations_in_pages_and_with_a_stamp_only_what_has_changed_since(busy):
    mine, other = busy.client(), busy.client(busy.issue("bob"))
    here = [mine.register("unlisted", "list-%d" % number, allow=False) for number in range(3)]
    there = other.register("unlisted", "list-of-bob", allow=False)
    found = mine.ok("GET", "v2/list", {"request_id": "list-"})
    assert [row["accept_id"] for row in found["calculations"]] == here[::-1] and found["whole"] and found["next"] is None
    assert found["calculations"][0]["progress"] == "not start" and found["calculations"][0]["wait_allow"] is None
    assert [row["accept_id"] for row in other.ok("GET", "v2/list")["calculations"]] == [there]
    assert [row["accept_id"] for row in mine.ok("GET", "v2/list", {"request_id": "list-", "before": busy.rows(
        "SELECT seq FROM calculations WHERE accept_id = ?", here[1])[0]["seq"]})["calculations"]] == here[:1]
    stamp, said = found["known"], []
    assert mine.ok("GET", "v2/list", {"request_id": "list-", "known": stamp})["calculations"] == []
    waiting = threading.Thread(target=lambda: said.append(busy.client().ok("GET", "v2/list", {"request_id": "list-", "known": stamp, "wait": 30})))
    waiting.start()
    for one in (other, there), (mine, mine.register("unlisted", "elsewhere", allow=False)), (mine, here[1]):
        assert not said
        one[0].ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": one[1], "stop": True})
    waiting.join(20)
    assert [(row["accept_id"], row["progress"], row["status"]) for row in said[0]["calculations"]] == [(here[1], "got return", "abnormal")] and not said[0]["whole"]
    boot, number = said[0]["known"].split(".")
    for stamp in ("x", "x.0", boot + ".-1", boot + ".%d" % (int(number) + 9), ".", boot + ".1e3"):
        assert mine.ok("GET", "v2/list", {"known": stamp})["whole"], stamp
    assert other.call("GET", "v2/list", {"request_id": ""})[0] == 400


def test_at_a_relay_that_knows_no_such_list_nothing_is_registered(wf, tmp_path):
    from fake_relay import Fake
    one = Fake(misbehave=lambda request: request.no(404, message="no such call") if request.name == "v2/list" else None)
    try:
        with pytest.raises(wf.UsageError, match="older version"):
            wf.submit(one.url, "s", "c", "in", "out", token="t")
        assert not [given for given in one.given if "calc-info" in given]
    finally:
        one.stop()


def test_of_many_submits_the_first_alone_asks_what_relay_it_is(wf):
    from fake_relay import Fake
    one = Fake()
    one.answers["v2/list"] = {"calculations": [], "known": "boot.1", "whole": True, "next": None}
    try:
        futures = [wf.submit(one.url, "s", "c", "in", "out", token="t") for turn in range(3)]
        assert futures[0].accept_id and one.names().count("add-calcinfo") == 3 and one.names().count("version") == 1
    finally:
        one.stop()
