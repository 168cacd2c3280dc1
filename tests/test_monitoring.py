"""What monitors read: figures of relay and poller as Prometheus takes them, whether the relay is well, and the alerts of the README."""
import os
import re
import resource
import subprocess
import time
from urllib.parse import quote

import pytest

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


def scraped(world, token):
    """The figures of the relay, as Prometheus gets them."""
    client = world.client(token)
    client.connect()
    client.connection.request("GET", "/metrics", headers={"Authorization": "Bearer " + token})
    answer = client.connection.getresponse()
    text = answer.read().decode("utf-8")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8"), text
    return text


def sums(found, name, *keys):
    """{values of these labels: number} of one family."""
    return {tuple(dict(re.findall('([a-z]+)="([^"]*)"', labels))[key] for key in keys): number for (one, labels), number in found.items() if one == name}


def test_the_figures_of_a_relay_are_those_of_its_calculations_whatever_they_went_through(make_world):
    suite.needs("promtool")
    world = make_world(commands=["do"], sites=(SITE, "u-other"), ini="[times]\nkeep_fetched = 1s\n").start()
    token, client = world.issue("prometheus", "--roles", "metrics"), world.client()

    def counted():
        return {(row["site"], row["state"]): row["n"] for row in world.rows("SELECT site, state, COUNT(*) AS n FROM calculations GROUP BY site, state")}

    def told():
        return {key: number for key, number in sums(figures(scraped(world, token)), "mi_relay_calculations", "site", "state").items() if number}

    for number in range(8):
        client.register("do", inputs={"in": b"x"} if number % 2 else None, allow=number != 7)
    assert told() == counted() and sum(told().values()) == 8
    for exit_code in (0, 3):
        accept_id, claim = client.claim()
        client.walk(accept_id, claim, "end-send", exit_code=exit_code)
        client.ok("POST", "finish", {"v": 2, "accept_id": accept_id})
    accept_id, claim = client.claim()
    client.walk(accept_id, claim, "end-send", exit_code=1)
    client.ok("POST", "rerun", {"v": 2, "accept_id": accept_id})
    client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id})
    running, claim = client.claim()
    client.walk(running, claim, "calc-start")
    given_back, claim = client.claim()
    client.ok("POST", "heartbeat", {"v": 2, "site_id": SITE, "poller": "test", "wait": 0, "calcs": {given_back: {"claim": claim, "phase": "given back"}}})
    suite.run("mi_dicomapi.py", "end", running, "--reason", "burnt down", "--ini", world.ini)
    wait_until(lambda: told() == counted(), 10, (told(), counted()))
    wait_until(lambda: not [key for key in counted() if key[1] == "finished"], 15)      # removed after keep_fetched
    assert told() == counted()
    text = scraped(world, token)
    found = figures(text)
    assert sums(found, "mi_relay_ended_total", "outcome") == {("completed",): 1, ("abnormal",): 2, ("cancelled",): 1, ("lost",): 1}
    assert sums(found, "mi_relay_queue_seconds_count", "site") == {(SITE,): 4} and sums(found, "mi_relay_run_seconds_count", "site") == {(SITE,): 3}
    assert sums(found, "mi_relay_queue_seconds_bucket", "le")["+Inf",] == 4 and sums(found, "mi_relay_queue_seconds_bucket", "le")["604800",] == 4
    assert sums(found, "mi_relay_waiting_reason", "site", "code") == {(SITE, "untold"): sum(number for key, number in counted().items() if key[1] == "allowed")}
    assert sums(found, "mi_relay_site_state", "site") == {(SITE,): 1, ("u-other",): 1} and found["mi_relay_site_state", 'site="u-other",state="never"'] == 1
    assert abs(found["mi_relay_site_last_contact_timestamp_seconds", 'site="%s"' % SITE] - time.time()) < 60
    assert found["mi_relay_certificate_expiry_timestamp_seconds", 'kind="server"'] - time.time() > 29 * 86400
    assert sums(found, "mi_relay_token_next_expiry_timestamp_seconds", "site", "role").keys() == {("", "workflow"), ("", "remote"), ("", "metrics")}
    assert found["mi_relay_backup_last_success_timestamp_seconds", ""] == 0 == found["mi_relay_maintenance", ""]
    assert_promtool_is_silent(text)
    world.relay.stop()
    world.start()
    assert told() == counted()


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
    assert world.client("").raw("GET", "metrics")[0] == 403
    assert world.client().raw("GET", "metrics")[0] == 403                    # roles workflow and remote
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


def test_whoever_calls_for_whatever_site_adds_no_series(make_world):
    bad = 'x"} 1\nmi_relay_bad{site="y\\ \x1b[2J\u202e'
    world = make_world(tls=False, commands=["do"]).start()
    token, client = world.issue("prometheus", "--roles", "metrics"), world.client()

    def series():
        return {(name, labels) for name, labels in figures(scraped(world, token))}

    def hostile(number):
        for site in (SITE, "%s%d" % (bad, number)):
            fields = {"v": 2, "site_id": site, "poller": bad, "take": "take-it-%d" % number, "wait": 0, "calcs": {}, "presence": {"state": bad, "version": bad}}
            client.call("POST", "calc-request", fields)
            client.call("POST", "heartbeat", fields)
        client.call("POST", "add-calcinfo", {"v": 2, "request_id": bad, "calc-info": {"command": bad, "remote-site": bad, "parameters": ""}})
        client.raw("GET", quote("no/such/%s%d" % (bad, number)))
        world.client(bad.encode("utf-8").hex()).raw("GET", "calc-status")
        client.raw("GET", quote(bad) + "/../metrics?site=%d" % number)

    series()
    hostile(0)
    before = series()
    assert not [labels for name, labels in before if "bad" in name + labels or "x" in re.findall('="(.)', labels) or "\x1b" in labels]
    for number in range(1, 30):
        hostile(number)
    assert series() == before
    assert_promtool_is_silent(scraped(world, token))


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


ALARMS = """rule_files: [rules.yml]
tests:
- interval: 1m
  input_series:
  - {series: 'mi_relay_waiting_oldest_seconds{site="gone"}', values: '7000x60'}
  - {series: 'mi_relay_site_last_contact_timestamp_seconds{site="gone"}', values: '1200x60'}
  - {series: 'mi_relay_waiting_oldest_seconds{site="never"}', values: '7000x60'}
  - {series: 'mi_relay_waiting_oldest_seconds{site="busy"}', values: '7000x60'}
  - {series: 'mi_relay_site_last_contact_timestamp_seconds{site="busy"}', values: '0+60x60'}
  - {series: 'mi_relay_undelivered_oldest_seconds{site="gone"}', values: '3601x60'}
  - {series: 'mi_relay_undelivered_oldest_seconds{site="busy"}', values: '0x60'}
  - {series: 'mi_relay_spool_free_bytes', values: '9x60'}
  - {series: 'mi_relay_spool_keep_free_bytes', values: '5x60'}
  - {series: 'mi_relay_certificate_expiry_timestamp_seconds{kind="server"}', values: '1200000x60'}
  - {series: 'mi_relay_token_next_expiry_timestamp_seconds{role="remote", site="busy"}', values: '1200000x60'}
  - {series: 'mi_relay_token_next_expiry_timestamp_seconds{role="workflow", site=""}', values: '9900000x60'}
  - {series: 'mi_relay_backup_last_success_timestamp_seconds', values: '-180000x60'}
  alert_rule_test:
"""


def test_the_alarms_of_the_readme_go_off_when_they_should_and_name_figures_that_there_are(tmp_path):
    suite.needs("promtool")
    with open(suite.script("README.md"), encoding="utf-8") as text:
        readme = text.read()
    rules, = re.findall(r"^```yaml\n(groups:\n.*?)^```", readme, re.M | re.S)
    with open(suite.script("mi_dicomapi.py"), encoding="utf-8") as text:
        families = set(re.findall(r'\("([a-z_]+)", "(?:gauge|counter)"', text.read()))
    named = set(re.findall(r"\bmi_relay_([a-z_]+)", rules))
    assert len(named) > 6 and not named - families - {"relay"}, named - families
    (tmp_path / "rules.yml").write_text(rules)
    wanted = {"NobodyTakesWork": ['{site: gone}', '{site: never}'], "ResultsAreNotTaken": ['{site: gone}'], "DiskIsFilling": ["{}"],
              "SomethingExpires": ['{kind: server}', '{role: remote, site: busy}'], "NoBackup": ["{}"]}
    assert set(re.findall("alert: (.*)", rules)) == set(wanted)
    text = ALARMS
    for name, labels in wanted.items():
        notes, = re.findall(r'alert: %s\n(?:.*\n)*?    annotations: \{summary: "(.*)"\}' % name, rules)
        text += "  - {eval_time: 59m, alertname: %s, exp_alerts: [%s]}\n" % (name, ", ".join(
            '{exp_labels: %s, exp_annotations: {summary: "%s"}}' % (one, re.sub(
                r"\{\{ \$labels\.(\w+) \}\}", lambda found: (re.findall(r"\b%s: (\w+)" % found.group(1), one) or [""])[0], notes)) for one in labels))
    (tmp_path / "test.yml").write_text(text)
    done = subprocess.run(["promtool", "test", "rules", str(tmp_path / "test.yml")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 0 and b"SUCCESS" in done.stdout, done.stdout.decode()


@pytest.mark.parametrize("spoilt", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_asked_after_the_figures_on_the_same_connection_is_answered(make_world, spoilt):
    world = make_world(commands=["do"]).start()
    client = world.client(world.issue("prometheus", "--roles", "metrics,workflow"))
    client.connect()                                   # it knows the certificate as it was
    if spoilt is not None:
        with open(world.cert, "wb") as out:
            out.write(spoilt)
    for name in ("metrics", "version", "metrics", "v2/list?v=2", "metrics"):
        assert client.raw("GET", name)[0] == 200, name
