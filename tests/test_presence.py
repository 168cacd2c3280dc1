"""A relay knows of each poller that it is there, and why it takes nothing: within two seconds of the change, by words that it can trust."""
import json
import os
import re
import time

import pytest

import suite
from suite import SITE, USER, wait_until

HOLD = "argv =\n    /bin/sh\n    -c\n    until [ -e %s/go ]; do sleep 0.1; done\nmatch = hold\n"
relay = suite.module("mi_dicomapi.py")


@pytest.fixture
def world(make_world):
    return make_world(tls=False, commands=["hold"]).start()


def sites(world):
    """Rows of `sites`."""
    done = suite.run("mi_dicomapi.py", "sites", "--json", "--ini", world.ini)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stands(world, state, **more):
    """Waits until the only poller of the site stands so; its row."""
    def look():
        row, = sites(world)
        return row if row["state"] == state and all(row[key] == value for key, value in more.items()) else None
    return wait_until(look, 15, (state, more))


def rewrite(world, **keys):
    """The poller's ini with other values; it reads it again by itself."""
    path = os.path.join(world.folder, "poller", "poller.ini")
    with open(path, encoding="utf-8") as text:
        lines = [line for line in text.read().splitlines() if line.split(" = ")[0] not in keys]
    lines.insert(1, "\n".join("%s = %s" % pair for pair in keys.items()))
    with open(path, "w", encoding="utf-8") as out:
        out.write("\n".join(lines) + "\n")


def words(world, word):
    assert suite.run("mi_system_remote.py", word, "--ini", os.path.join(world.folder, "poller", "poller.ini")).returncode == 0


def wait_until_parked(world, least):
    """Until so many calls wait at the relay."""
    def look():
        found = suite.run("mi_dicomapi.py", "metrics", "--ini", world.ini).stdout
        return int(re.search(r"^mi_relay_parked (\d+)", found, re.M).group(1)) >= least
    wait_until(look, 20)


def test_the_relay_is_told_why_a_poller_takes_nothing_and_when_it_does_again_and_at_once_when_it_is_gone(world):
    assert [(row["state"], row["heard"]) for row in sites(world)] == [("never", None)]
    one = world.poller({"hold": HOLD % world.folder}, ini="output = no\n")
    row = stands(world, "open", busy=0, jobs=1)
    assert (row["site"], row["user"], row["version"]) == (SITE, USER, relay.VERSION) and abs(row["heard"] - time.time()) < 60
    words(world, "pause")
    stands(world, "paused")
    wait_until_parked(world, 1)
    killed = time.time()
    one.kill()                                         # which has asked for nothing
    assert killed - 60 < stands(world, "silent")["heard"] < killed + 1
    one = world.poller({"hold": HOLD % world.folder}, ini="output = no\n")
    stands(world, "paused")
    words(world, "resume")
    stands(world, "open")
    hour = time.localtime().tm_hour
    rewrite(world, hours="%d-%d" % ((hour + 2) % 24, (hour + 3) % 24))
    assert 3600 < stands(world, "hours")["until"] - time.time() <= 7200
    rewrite(world, hours="0-24", keep_free="100%")
    stands(world, "disk", until=None)
    rewrite(world, keep_free="1")
    stands(world, "open")
    world.workflow("submit", SITE, "hold")
    stands(world, "busy", busy=1, waiting=0)
    world.workflow("submit", SITE, "hold")
    stands(world, "busy", waiting=1)
    wait_until_parked(world, 2)                        # a heartbeat, and what waits between two of them
    one.kill()
    stands(world, "silent")


def test_a_poller_whose_owner_says_tell_no_tells_nothing_and_is_not_taken_for_dead(world):
    world.poller({"hold": HOLD % world.folder}, ini="tell = no\n")
    row = stands(world, "untold")
    assert [row[key] for key in relay.PRESENCE if key != "state"] == [None] * 7
    words(world, "pause")
    time.sleep(2.5)
    assert "presence" not in json.dumps(sites(world)) and sites(world)[0]["state"] in ("untold", "silent")


def test_what_a_poller_has_told_holds_no_more_once_its_owner_says_tell_no(world):
    world.poller({"hold": HOLD % world.folder})
    stands(world, "open")
    world.pollers[0].kill()
    world.poller({"hold": HOLD % world.folder}, ini="tell = no\n")
    assert stands(world, "untold")["version"] is None


def test_a_relay_that_was_started_again_knows_its_pollers_still(world):
    world.poller({"hold": HOLD % world.folder})
    stands(world, "open")
    words(world, "pause")
    stands(world, "paused")
    world.relay.stop()
    world.pollers[0].kill()
    world.start()
    assert sites(world)[0]["state"] == "paused" and sites(world)[0]["heard"]


def test_what_comes_from_the_wire_is_bounded_and_printable(world):
    client, bad = world.client(), "\x1b[2J\u202e" + "x" * 9000
    for number in range(3 * relay.POLLERS):
        told = {"state": bad, "version": bad, "jobs": "many", "busy": -1, "until": 10 ** 17, "oldest": True, "unknown": [bad] * 100, "outbox": 2}
        client.ok("POST", "heartbeat", {"v": 2, "site_id": SITE, "poller": "%d%s" % (number, bad), "wait": 0, "calcs": {}, "presence": told})
    rows = sites(world)
    assert len(rows) == relay.POLLERS and max(len(json.dumps(row)) for row in rows) < 600
    assert {(row["state"], row["jobs"], row["busy"], row["until"], row["oldest"], row["outbox"]) for row in rows} == {("untold", None, None, None, None, 2)}
    assert "\x1b" not in suite.run("mi_dicomapi.py", "sites", "--ini", world.ini).stdout
    assert client.call("POST", "heartbeat", {"v": 2, "site_id": SITE, "poller": "p", "calcs": {}, "presence": bad})[0] == 400
    for site in ("nowhere", ""):
        client.ok("POST", "heartbeat", {"v": 2, "site_id": site, "poller": "p", "wait": 0, "calcs": {}, "presence": {}})
    other = world.client(world.issue("bob", "--sites", SITE))
    other.ok("POST", "heartbeat", {"v": 2, "site_id": SITE, "poller": "p", "wait": 0, "calcs": {}, "presence": {"state": "open"}})
    assert len(sites(world)) == relay.POLLERS + 1 and sites(world)[-1]["user"] == "bob"


def test_who_was_not_heard_for_keep_history_is_forgotten_here_and_on_the_disk():
    written = []
    store = type("Store", (), {"write": staticmethod(lambda work, name, wait: written.append(name))})
    pollers = relay.Pollers(type("Relay", (), {"store": store, "conf": {"times": {"keep_history": 10.0}}}))
    now = time.time()
    pollers.known = {("a", "x"): {"old": relay.Heard(2, now - 20)}, ("b", "x"): {"old": relay.Heard(2, now - 20), "new": relay.Heard(2, now)}}
    pollers.keep()
    assert {key: sorted(group) for key, group in pollers.known.items()} == {("b", "x"): ["new"]} and written == ["pollers"]
    pollers.keep()
    assert len(written) == 1
