"""What monitors read: figures of relay and poller as Prometheus takes them, whether the relay is well, and the alerts of the README."""
import os
import re
import resource
import subprocess
import time

import suite
from suite import SITE, wait_until

relay = suite.module("mi_dicomapi.py")

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (-?[0-9.e+-]+|\+Inf)\Z')


def figures(text):
    """{(name, labels as they stand there): number} of an exposition; what is none, or stands there twice, fails."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, number = SAMPLE.match(line).groups()
            assert (name, labels or "") not in found, line
            found[name, labels or ""] = float(number)
    return found


def assert_promtool_is_silent(text):
    done = subprocess.run(["promtool", "check", "metrics"], input=text.encode("utf-8"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert (done.returncode, done.stdout.decode()) == (0, ""), text


def of_poller(world):
    done = suite.run("mi_system_remote.py", "metrics", "--ini", os.path.join(world.folder, "poller", "poller.ini"))
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_a_poller_prints_how_it_stands_for_a_textfile_and_what_it_could_not_deliver(make_world):
    suite.needs("promtool")
    world = make_world(tls=False, commands=["do"]).start()
    wait = "argv =\n    /bin/sh\n    -c\n    until [ -e %s/go ]; do sleep 0.1; done\nmatch = do\n" % world.folder
    poller = world.poller({"do": wait}, ini="jobs = 2\n")
    of_site = 'site="%s"' % SITE

    def stands(state, **more):
        found = figures(of_poller(world))
        return (found.get(("mi_poller_state", '%s,state="%s"' % (of_site, state))) == 1
                and all(found["mi_poller_" + name, of_site] == number for name, number in more.items()) and found)

    wait_until(lambda: stands("open", running=1, slots=2, slots_busy=0), 15)
    world.workflow("submit", SITE, "do")
    wait_until(lambda: stands("open", slots_busy=1), 15)
    world.workflow("submit", SITE, "do")
    found = wait_until(lambda: stands("busy", slots_busy=2, undelivered=0, undelivered_oldest_seconds=0), 15)
    assert found["mi_poller_room_bytes", of_site] > 0 and found["mi_poller_build_info", of_site + ',version="%s"' % suite.module("mi_system_remote.py").VERSION] == 1
    wait_until(lambda: figures(of_poller(world))["mi_poller_calculations", of_site + ',state="running"'] == 2, 15)
    world.relay.stop()
    with open(os.path.join(world.folder, "go"), "w"):
        pass
    wait_until(lambda: stands("open", undelivered=2), 15)
    assert suite.run("mi_system_remote.py", "pause", "--ini", os.path.join(world.folder, "poller", "poller.ini")).returncode == 0
    assert stands("paused")
    poller.stop()
    time.sleep(1)
    found = stands("stopped", running=0, slots_busy=0)
    assert found["mi_poller_undelivered_oldest_seconds", of_site] >= 1
    assert_promtool_is_silent(of_poller(world))


def sums(found, name, *keys):
    """{values of these labels: number} of one family."""
    return {tuple(dict(re.findall('([a-z]+)="([^"]*)"', labels))[key] for key in keys): number for (one, labels), number in found.items() if one == name}


def test_whether_the_relay_is_well_is_told_without_a_token_and_only_of_itself(make_world):
    world = make_world(tls=False, commands=["do"]).start()

    def health():
        status, data, headers = world.client("").raw("GET", "healthz")
        assert headers["Content-Type"] == "text/plain"
        return status, data

    assert health() == (200, b"ok\n")
    client = world.client("")
    client.connect()
    for number in range(3):                            # also outside of the calls' path, and on one connection
        client.connection.request("GET", "/healthz")
        answer = client.connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"ok\n")
    for method, path in (("POST", "healthz"), ("GET", "healthz/"), ("GET", "v2/healthz")):
        assert world.client("").raw(method, path, b"" if method == "POST" else None)[0] == 403, path
    most = resource.prlimit(world.relay.pid, resource.RLIMIT_FSIZE)          # the disk takes nothing more
    resource.prlimit(world.relay.pid, resource.RLIMIT_FSIZE, (0, most[1]))
    wait_until(lambda: health() == (503, b"disk\n"), 20, "what cannot be written is told")
    resource.prlimit(world.relay.pid, resource.RLIMIT_FSIZE, most)
    wait_until(lambda: health() == (200, b"ok\n"), 20, "it can be written again")


def test_what_is_not_well_is_named_in_a_word():
    now = time.monotonic()
    made = relay.Meter(None)

    def health(**other):
        at_work, failed, small_calls, taken, lap = (other.get(key, good) for key, good in (
            ("at_work", None), ("failed", ""), ("small_calls", []), ("taken", now), ("lap", now)))
        made.relay = type("Relay", (), {
            "store": type("Store", (), {"at_work": at_work, "failed": failed, "committed": now}), "sweeper": type("Sweeper", (), {"lap": lap}),
            "front": type("Front", (), {"small_calls": small_calls, "taken": taken})})
        return made.health()

    long = now - 3 * relay.STUCK
    assert [health(), health(at_work=now), health(taken=long), health(small_calls=[1])] == ["ok"] * 4
    assert [health(at_work=long), health(failed="database"), health(small_calls=[1], taken=long), health(lap=long)] == ["writer", "database", "workers", "sweeper"]


def test_a_scrape_scans_no_table_that_grows_with_the_calculations(tmp_path):
    (tmp_path / "relay.ini").write_text("[Server]\nstate_dir = %s\n[RemoteSites]\nremote_site_ids = a b\n[a]\n[b]\n" % (tmp_path / "state"))
    conf = relay.check_conf(relay.read_ini(str(tmp_path / "relay.ini"), relay.INI_KEYS), str(tmp_path / "relay.ini"))
    made = relay.Relay(conf, str(tmp_path / "relay.ini"), relay.Store(str(tmp_path / "state")))
    made.front = relay.Front(made)
    rows = [(number, "id%d" % number, "user%d" % (number % 3), "ab"[number % 2], "allowed" if number % 4 else "got") for number in range(400)]
    made.store.writer.executemany("INSERT INTO calculations (seq, accept_id, user, site, state, command, info, needs_v2, registered, touched, allowed)"
                                  " VALUES (?, ?, ?, ?, ?, 'do', '{}', 0, 1, 1, 1)", rows)
    made.meter.begin()
    made.claims.silent = {"id%d" % number: 1.0 for number in range(0, 400, 40)}
    plans, read = [], made.store.read
    made.store.read = lambda sql, *values: plans.extend((sql, row[3]) for row in read("EXPLAIN QUERY PLAN " + sql, *values)) or read(sql, *values)
    found = figures(relay.figures(made))
    assert sums(found, "mi_relay_calculations", "site", "state") == {("a", "allowed"): 100, ("a", "got"): 100, ("b", "allowed"): 200}
    assert sums(found, "mi_relay_out_of_contact", "site") == {("a",): 10} and sums(found, "mi_relay_waiting_reason", "site", "code") == {
        ("a", "no-poller"): 100, ("b", "no-poller"): 200}
    assert len(plans) > 8 and not [plan for plan in plans if "SCAN" in plan[1] and "tokens" not in plan[1]], plans
