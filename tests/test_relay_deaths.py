"""The relay is killed in the middle of what it does by itself: counting silence, giving up, removing, obeying an operator, taking stock."""
import os
import shutil
import subprocess
import sys

import pytest

import suite
from suite import wait_until

ENDS = ("uncommitted", "committed")


def dies(world, point):
    """Starts the relay so that it kills itself there; returns a function that waits for that and starts it again."""
    world.start(env=suite.clean_env(MI_FAULT=point))

    def again():
        wait_until(lambda: not world.relay.alive(), 60, point)
        assert world.relay.popen.returncode == -9
        world.start()
        return world.client()

    return again


@pytest.mark.parametrize("point", ["silent committed", "lost uncommitted", "lost committed"])
def test_while_it_counts_silence_and_gives_up(make_world, point):
    world = make_world(tls=False, commands=["hello"], ini="[times]\nlease = 1s\nlost_after = 2s\n")
    again = dies(world, point)
    client = world.client()
    accept_id = client.register("hello")
    claimed, claim = client.claim()
    client.walk(accept_id, claim, "calc-start")
    client = again()
    wait_until(lambda: world.state_of(accept_id) == "got", 60)
    info = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]
    assert info["status"] == "abnormal" and info["reason"].startswith("lost") and suite.LOGS[1] in info["result_files"]
    number = list(info["result_files"]).index(suite.LOGS[1])
    status, data, headers = client.raw("GET", "files/%s/result/%d?v=2" % (accept_id, number))
    assert status == 200 and b"lost" in data
    assert client.claim() is None and client.call("POST", "calc-end", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "calc end"})[1]["code"] == 409


@pytest.mark.parametrize("end", ENDS)
def test_while_it_removes_what_was_fetched(make_world, end):
    world = make_world(tls=False, commands=["hello"], ini="[times]\nkeep_fetched = 1s\n")
    again = dies(world, "retention " + end)
    client = world.client()
    accept_id, kept = client.register("hello", results=["r"]), client.register("hello", results=["r"])
    for turn in range(2):
        name, claim = client.claim()
        client.walk(name, claim, "end-send", {"r": b"the result"})
    client.ok("POST", "finish", {"v": 2, "accept_id": accept_id})
    client = again()
    wait_until(lambda: world.state_of(accept_id) is None, 60)
    wait_until(lambda: not os.path.exists(os.path.join(world.state, "spool", accept_id[:2], accept_id)), 20, "nothing of it is left in the spool")
    assert client.raw("GET", "files/%s/result/0?v=2" % kept)[1] == b"the result"


@pytest.mark.parametrize("end", ENDS)
def test_while_it_obeys_an_operator(make_world, end):
    world = make_world(tls=False, commands=["hello"])
    again = dies(world, "order " + end)
    accept_id = world.client().register("hello")
    order = subprocess.Popen([sys.executable, suite.script("mi_dicomapi.py"), "cancel", accept_id, "--ini", world.ini], env=suite.clean_env(),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    client = again()
    text = order.communicate(timeout=60)[0].decode()
    assert order.returncode == 0, text
    info = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]
    assert info["reason"].startswith("cancelled") and client.claim() is None


@pytest.mark.parametrize("end", ENDS)
def test_while_it_takes_stock_after_a_restore(make_world, tmp_path, end):
    world = make_world(tls=False, commands=["solve"], ini="[times]\nlease = 5s\nrestore_grace = 5s\n").start()
    script = tmp_path / "solve"
    script.write_text('#!/bin/sh\necho "$MI_RUN" >>%s/ledger\nuntil [ -e %s/go ]; do sleep 0.1; done\necho x >r\n' % (tmp_path, tmp_path))
    script.chmod(0o755)
    accept_id = world.client().register("solve", results=["r"])
    backup = str(tmp_path / "backup")
    assert suite.run("mi_dicomapi.py", "backup", backup, "--ini", world.ini).returncode == 0
    world.poller({"solve": "match = solve\nargv = %s" % script})
    wait_until(lambda: world.state_of(accept_id) == "running")
    world.relay.kill()
    shutil.rmtree(world.state)
    assert suite.run("mi_dicomapi.py", "restore", backup, "--ini", world.ini).returncode == 0
    assert world.state_of(accept_id) == "allowed"
    again = dies(world, "adopt " + end)
    client = again()
    wait_until(lambda: world.state_of(accept_id) == "running", 60)
    (tmp_path / "go").write_text("")
    wait_until(lambda: world.state_of(accept_id) == "got", 60)
    assert client.raw("GET", "files/%s/result/0?v=2" % accept_id)[1] == b"x\n"
    assert (tmp_path / "ledger").read_text().split() == [accept_id + ".1"]
