"""Why does it wait, and who has to act? `explain` of relay, workflow side and poller says it: each state is made, and the answer is the right one."""
import json
import os
import re
import sqlite3
import subprocess
import threading
import time

import pytest

import batch_stand_in
import suite
from fake_relay import ACCEPT_ID, Fake
from suite import SITE, USER, entry, wait_until
from test_presence import rewrite

relay, wf, remote = (suite.module(name + ".py") for name in ("mi_dicomapi", "mi_system_wf", "mi_system_remote"))
OTHER = "u-other"
DO = {"do": "argv =\n    /bin/sh\n    -c\n    . ./do\nmatch = do\n", "fails": "argv = /bin/false\nmatch = fails\n"}


class Asker:
    """Asks one world for causes."""

    def __init__(self, world):
        self.world, self.client, self.number, self.slowest = world, world.client(), 0, 0.0

    def register(self, command="do", site=SITE, allow=True, **info):
        self.number += 1
        info = dict({"command": command, "remote-site": site, "parameters": "", "parameter_files": {}, "result_files": {}}, **info)
        return self.client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "r%d; ls" % self.number, "calc-info": info, "allow": allow})["accept_id"]

    def becomes(self, accept_id, code, who, command=None, after=None):
        """Waits until that is the cause; who acts, and what he types, are right. The answer. after: the time.monotonic() of what has changed it:
        that was not two seconds ago, but for what this machine takes for everything (the slowest answer yet)."""
        seen = set()

        def look():
            begun = time.monotonic()
            found = self.client.ok("GET", "v2/explain", {"v": 2, "accept_id": accept_id})
            self.slowest = max(self.slowest, time.monotonic() - begun)
            seen.add(found["cause"])
            return found if found["cause"] == code else None
        found = wait_until(look, 15, (code, seen))
        assert after is None or time.monotonic() - after < 2 + 30 * self.slowest, (code, time.monotonic() - after, self.slowest)
        assert found["who"] == who and (command is None or found["command"] == command), found
        assert found["sentence"]["en"] and found["sentence"]["ja"] != found["sentence"]["en"] and "%(" not in str(found), found
        assert bool(found["command"]) == (who != "nobody"), found
        assert found["now"] - 200 < found["seen"] <= found["now"] and (found["since"] or 0) <= found["now"], found
        return found

    def here(self, accept_id, code, who):
        """The same of the poller's own host."""
        seen = set()

        def look():
            done = suite.run("mi_system_remote.py", "explain", accept_id, "--json", "--ini", os.path.join(self.world.folder, "poller", "poller.ini"))
            assert done.returncode == 0, done
            found = json.loads(done.stdout)
            seen.add(found["code"])
            return found if found["code"] == code else None
        found = wait_until(look, 15, (code, seen))
        assert found["who"] == who and found["sentence"] and bool(found["command"]) == (who != "nobody"), found


@pytest.fixture
def ask(make_world):
    return Asker(make_world(tls=False, commands=["do", "fails", "unlisted"], sites=(SITE, OTHER)).start())


def test_a_poller_and_whatever_keeps_it_from_taking_a_calculation(ask):
    world, waits = ask.world, ask.register()
    ask.becomes(waits, "no-poller", "admin")
    world.client().call("POST", "calc-request", {"v": 2, "site_id": OTHER, "poller": "p", "take": "take-it-0", "wait": 0})
    ask.becomes(waits, "other-site", "admin")
    world.client(world.issue("bob")).call("POST", "calc-request", {"v": 2, "site_id": SITE, "poller": "p", "take": "take-it-0", "wait": 0})
    found = ask.becomes(waits, "other-user", "operator", "mi_dicomapi.py token issue %s --roles remote --sites %s" % (USER, SITE))
    assert "bob" not in json.dumps(found)
    assert json.loads(suite.run("mi_dicomapi.py", "explain", waits[:8], "--json", "--ini", world.ini).stdout)["users"] == ["bob"]
    suite.run("mi_dicomapi.py", "maintenance", "on", "--reason", "new disk", "--ini", world.ini)
    found = ask.becomes(waits, "maintenance", "operator", "mi_dicomapi.py maintenance off", after=time.monotonic())
    assert "new disk" in found["sentence"]["ja"]
    suite.run("mi_dicomapi.py", "maintenance", "off", "--ini", world.ini)

    token = world.issue(USER)
    hour = time.localtime().tm_hour
    poller = world.poller(DO, token=token, ini="paused = yes\n")
    ask.becomes(waits, "paused", "admin", "mi_system_remote.py resume")
    ask.here(waits, "paused", "admin")
    rewrite(world, paused="no", hours="%d-%d" % ((hour + 2) % 24, (hour + 3) % 24))
    assert ask.becomes(waits, "hours", "nobody")["until"] > time.time()
    ask.here(waits, "hours", "nobody")
    rewrite(world, hours="0-24", keep_free="100%")
    ask.becomes(waits, "disk", "admin")
    ask.here(waits, "disk", "admin")
    rewrite(world, keep_free="1", jobs="2")
    assert re.search(" 1|command", ask.becomes(waits, "failed", "starter")["sentence"]["en"])                 # its input `do` is missing
    data = b"until [ -e %s/go ]; do sleep 0.1; done\n" % world.folder.encode()
    runs = [ask.client.register("do", "run-%d" % number, {"do": data}, {}, site=SITE) for number in (1, 2)]
    for one in runs:
        ask.becomes(one, "running", "nobody")
        ask.here(one, "running", "nobody")
    waits = ask.register("fails")
    assert "2 of 2" in ask.becomes(waits, "busy", "nobody")["sentence"]["en"]
    ask.here(waits, "busy", "nobody")
    poller.kill()
    ask.becomes(waits, "silent", "admin", after=time.monotonic())
    ask.becomes(runs[0], "out-of-contact", "admin")
    ask.here(runs[0], "not-running", "admin")
    drains = world.poller(DO, token=token, words=("poll", "--drain"))
    ask.becomes(waits, "drain", "admin")
    ask.becomes(runs[0], "running", "nobody")
    suite.run("mi_dicomapi.py", "cancel", runs[0], "--reason", "wrong mesh", "--ini", world.ini)
    assert "wrong mesh" in ask.becomes(runs[0], "cancelled", "starter")["sentence"]["en"]
    ask.here(runs[0], "delivered", "nobody")
    suite.run("mi_dicomapi.py", "token", "revoke", str(world.rows("SELECT MAX(number) AS n FROM tokens")[0]["n"]), "--ini", world.ini)
    ask.becomes(runs[1], "token-revoked", "operator", "mi_dicomapi.py token issue %s --roles remote --sites %s" % (USER, SITE))
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"), timeout=10)
    db.execute("UPDATE tokens SET revoked = NULL, expires = 1 WHERE number = (SELECT MAX(number) FROM tokens)")
    db.commit()
    ask.becomes(runs[1], "token-expired", "operator")
    beat = {"v": 2, "site_id": SITE, "poller": "x", "wait": 0, "calcs": {}}
    wait_until(lambda: world.client(token).call("POST", "heartbeat", beat)[0] == 403, 10, "the relay has read the tokens again")
    with open(os.path.join(world.folder, "go"), "w"):
        pass
    ask.here(runs[1], "undelivered", "admin")
    world.token_file(world.token, "poller.token")
    ask.becomes(runs[1], "unfetched", "starter", "mi_system_wf.py result %s" % runs[1])
    assert drains.popen.wait(20) == 0
    world.poller(DO)
    ask.becomes(waits, "failed", "starter")
    ask.becomes(ask.register("unlisted"), "refused", "admin")
    ask.client.ok("POST", "finish", {"v": 2, "accept_id": runs[1]})
    ask.becomes(runs[1], "fetched", "nobody")


def test_what_is_too_large_in_a_batch_queue_or_just_taken_is_so_for_real(make_world, disk_of, tmp_path):
    disk, go = disk_of("12m"), str(tmp_path / "go")
    ask = Asker(make_world(tls=False, commands=["do", "batched"], ini="[times]\nwait = 1s\n").start())
    path = batch_stand_in.install(str(tmp_path / "pbs"), "openpbs")
    system = batch_stand_in.System(str(tmp_path / "pbs"), "openpbs")
    open(system.path("held"), "w").close()
    batched = "argv = /bin/true\nmatch = batched\nbatch = pbs\nbatch_poll = 0.3s\nenv.PATH = %s:%s\n" % (path, os.environ["PATH"])
    folder, ini = ask.world.poller(dict(DO, batched=batched), start=False, ini="jobs = 3\n")
    with open(ini, encoding="utf-8") as text:
        changed = text.read().replace(os.path.join(folder, "base"), str(disk / "base"))
    with open(ini, "w", encoding="utf-8") as out:
        out.write(changed)
    ask.world.pollers.append(suite.Process("mi_system_remote.py", ["poll", "--ini", ini], folder, env=suite.clean_env(
        MI_FAULT="hold Carrier.carry_out " + go)))
    large = ask.client.register("do", inputs={"do": bytes(15000000)})
    found = ask.becomes(large, "too-large", "admin", "mi_system_remote.py check")
    assert "15 MB" in found["sentence"]["en"], found
    ask.here(large, "too-large", "admin")
    queued = ask.client.register("batched")
    wait_until(lambda: "resource" in ask.becomes(queued, "queued", "admin", "mi_system_remote.py show " + queued)["sentence"]["en"], 15)
    ask.here(queued, "queued", "admin")
    os.unlink(system.path("held"))
    ask.becomes(queued, "unfetched", "starter")
    open(go + ".armed", "w").close()
    taken = ask.client.register("do", inputs={"do": b"true"})
    ask.becomes(taken, "taken", "nobody")
    ask.here(taken, "taken", "nobody")
    open(go, "w").close()
    ask.becomes(taken, "unfetched", "starter")
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)] if os.geteuid() == 0 else ["sudo", "-n", "mount", "-o", "remount,size=100m", str(disk)],
                   check=True)
    ask.becomes(large, "unfetched", "starter")


def test_within_two_seconds_of_a_change_the_answer_is_another_one(ask):
    world, waits = ask.world, ask.register()
    poller = world.poller(DO, ini="paused = no\n")
    ask.becomes(waits, "failed", "starter")            # its input `do` is missing
    run = ask.client.register("do", "run", {"do": b"until [ -e %s/go ]; do sleep 0.1; done\n" % world.folder.encode()}, {}, site=SITE)
    ask.becomes(run, "running", "nobody")
    waits = ask.register("fails")
    ask.becomes(waits, "busy", "nobody")
    ini = os.path.join(world.folder, "poller", "poller.ini")
    for word, code, who in (("pause", "paused", "admin"), ("resume", "busy", "nobody")):
        suite.run("mi_system_remote.py", word, "--ini", ini)
        ask.becomes(waits, code, who, after=time.monotonic())
    open(os.path.join(world.folder, "go"), "w").close()
    ask.becomes(run, "unfetched", "starter", after=time.monotonic())
    ask.becomes(waits, "failed", "starter", after=time.monotonic())
    poller.kill()
    gone = time.monotonic()
    ask.becomes(ask.register("fails"), "silent", "admin", after=gone)
    world.workflow("rerun", waits, "--reason", "again")
    ask.becomes(waits, "silent", "admin", after=time.monotonic())
    world.workflow("cancel", waits, "--reason", "typo")
    ask.becomes(waits, "cancelled", "starter", after=time.monotonic())


def test_a_remote_side_and_whatever_it_tells_or_does_not_tell(ask):
    world, client = ask.world, ask.client

    def request(number, site=OTHER, **more):
        return client.call("POST", "calc-request", dict({"v": 2, "site_id": site, "poller": "p%d" % number, "take": "take-no-%d" % number, "wait": 0}, **more))[1]

    small = ask.register(site=OTHER, allow=False, parameter_files={"in": entry(b"x" * 5000)})
    ask.becomes(small, "inputs-come", "nobody")
    client.call("GET", "calc-request", {"site_id": SITE})
    fielded = ask.register(result_patterns=["*"])
    ask.becomes(fielded, "needs-v2", "admin")
    plain = ask.register()
    found = client.ok("GET", "v2/explain", {"v": 2, "accept_id": plain})
    assert found["cause"] == "fielded" and "dead" not in found["sentence"]["en"], found
    client.ok("POST", "files/%s/input/0?v=2&offset=0" % small, body=b"x" * 5000)
    client.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": small})
    told = {"state": "open", "jobs": 1, "busy": 0, "outbox": 0, "version": "9", "free": 10}
    request(1, free=10, presence=told)
    ask.becomes(small, "too-large", "admin")
    client.ok("POST", "heartbeat", {"v": 2, "site_id": OTHER, "poller": "p1", "wait": 0, "calcs": {}, "presence": dict(told, state="once", free=1 << 40)})
    ask.becomes(small, "once", "admin")
    client.ok("POST", "heartbeat", {"v": 2, "site_id": OTHER, "poller": "p1", "wait": 0, "calcs": {}, "presence": dict(told, free=1 << 40)})
    ask.becomes(small, "next", "nobody")
    claim = request(2)["claim"]                        # another one, which tells nothing of itself
    held = {"v": 2, "accept_id": small, "claim": claim}
    ask.becomes(small, "taken", "nobody")
    ask.becomes(ask.register(site=OTHER), "next", "nobody")              # the other poller is nearer
    for step in ("calc-params-complete", "calc-start"):
        client.ok("POST", step, held)
    ask.becomes(small, "running", "nobody")

    def beat(what="", **more):
        calcs = {small: {"claim": claim, "phase": "running", "what": what}}
        return client.ok("POST", "heartbeat", dict({"v": 2, "site_id": OTHER, "poller": "p2", "wait": 0, "calcs": calcs}, **more))

    beat("queued (Queue \x1b[2J is closed)")
    found = ask.becomes(small, "queued", "admin", "mi_system_remote.py show %s" % small)
    assert "closed" in found["sentence"]["en"] and "\x1b" not in str(found)
    beat("running on node7")
    ask.becomes(small, "running", "nobody")
    client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": small, "reason": "typo"})
    ask.becomes(small, "cancelling", "nobody")
    client.ok("POST", "calc-end", dict(held, result="abnormal", exit_code=3))
    ask.becomes(small, "results-come", "nobody")
    beat(presence=dict(told, outbox=1, oldest=int(time.time()) - 60))
    ask.becomes(small, "undelivered", "admin", "mi_system_remote.py outbox")
    suite.run("mi_dicomapi.py", "end", small, "--reason", "burnt down", "--ini", world.ini)
    ask.becomes(small, "lost", "starter")
    world.relay.stop()
    done = suite.run("mi_dicomapi.py", "explain", small, "--json", "--ini", world.ini)
    assert json.loads(done.stdout)["code"] == "no-relay" and json.loads(done.stdout)["who"] == "operator"
    with open(os.path.join(world.state, "restored"), "w"):
        pass
    world.start()
    client.connection = None
    ask.becomes(plain, "takes-stock", "nobody")


def test_a_full_disk_of_the_relay_is_its_operators(ask):
    given = ask.register(allow=False, parameter_files={"in": entry(b"x")})
    ask.world.extra = "[limits]\nspool_free = 100%\n"
    ask.world.write_ini(ask.world.port)
    ask.becomes(given, "relay-disk", "operator", "mi_dicomapi.py check")


def test_nobody_is_told_of_anothers_calculation(ask):
    given = ask.register()
    unknown = ask.client.call("GET", "v2/explain", {"v": 2, "accept_id": "00000000-0000-4000-8000-000000000000"})
    for token, http in ((ask.world.issue("mallory"), 404), (ask.world.issue(USER, "--sites", OTHER), 404), (ask.world.issue(USER, "--roles", "remote"), 403),
                        ("", 403)):
        status, first = ask.world.client(token).call("GET", "v2/explain", {"v": 2, "accept_id": given})
        assert status == http and "cause" not in first, first
        assert http == 403 or first["message"].replace(given, "") == unknown[1]["message"].replace("00000000-0000-4000-8000-000000000000", "")


def test_what_a_command_names_is_one_word_of_a_shell_whatever_it_holds():
    class Odd(dict):
        def __missing__(self, name):
            return "x'; rm -rf / #\n"
    import shlex
    for cause in relay.CAUSES:
        line = cause.command % relay.quoted(Odd())
        assert "\n" not in line and not set(shlex.split(line)) & {"rm", "#"}, line


@pytest.mark.parametrize("program", [relay, remote], ids=["relay", "poller"])
def test_every_sentence_has_a_japanese_one_and_every_code_who_acts(program):
    for cause in program.CAUSES:
        assert {cause.text, cause.changes} - {""} <= set(program.JA), cause
        assert cause.who in ("nobody", "starter", "admin", "operator") and re.match(r"[a-z0-9-]+\Z", cause.code)
        assert bool(cause.command) == (cause.who != "nobody") or cause.code == "fielded", cause
        kind, own = (relay.Facts, set(relay.Facts.__init__.__code__.co_names)) if program is relay else (remote.Here, set(remote.Here.__init__.__code__.co_names))
        named = set(re.findall(r"%\((\w+)\)", cause.text + cause.changes + cause.command))
        assert all(hasattr(kind, name) or name in own for name in named), named
    assert len({cause.code for cause in relay.CAUSES}) == len(relay.CAUSES)


def test_what_is_quiet_or_lacks_inputs_for_long_is_told():
    codes = [cause.code for cause in relay.CAUSES]
    facts = relay.Facts.__new__(relay.Facts)
    facts.state, facts.now, facts.row, facts.relay = relay.RUNNING, time.time(), dict(started=time.time() - relay.QUIET_AFTER - 5, touched=0), None
    facts.last_output = lambda: facts.row["started"]
    quiet = relay.CAUSES[codes.index("quiet")]
    assert quiet.holds(facts)
    facts.row["started"] += 10
    assert not quiet.holds(facts)
    facts.state = relay.REGISTERED
    facts.relay = type("Relay", (), {"claims": type("Claims", (), {"idle_seconds": staticmethod(lambda row: relay.INPUTS_AFTER + 1)})})
    assert relay.CAUSES[codes.index("inputs-missing")].holds(facts)


def test_how_long_yet_is_a_range_of_the_last_runs_and_unknown_with_fewer_than_ten(ask):
    world, client, command = ask.world, ask.client, "do"

    def runs(number, **end):
        for _number in range(number):
            client.register(command)
            accept_id, claim = client.claim()
            client.walk(accept_id, claim, "calc-start")
            client.ok("POST", "calc-end", dict({"v": 2, "accept_id": accept_id, "claim": claim, "result": "calc end", "exit_code": 0}, **end))
            client.ok("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": {}, "end": True})

    def asked(accept_id):
        world.relay.stop()                             # what it knows for a minute is forgotten
        world.start()
        client.connection = None
        return client.ok("GET", "v2/explain", {"v": 2, "accept_id": accept_id})

    runs(9)
    runs(2, exit_code=1)                               # what has failed says nothing of how long it takes
    world.client(world.issue("bob")).register(command)
    first, waits = client.register(command), client.register(command)
    found = asked(waits)
    assert (found["ahead"], found["runs"], found["run_from"]) == (1, 0, None) and "unknown: fewer than 10" in found["long"]["en"], found
    assert "不明" in found["long"]["ja"] and found["long"]["en"].startswith("1 before it; "), found
    accept_id, claim = client.claim()
    assert accept_id == first
    client.walk(accept_id, claim, "end-send")
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"), timeout=10)
    begun = [row[0] for row in db.execute("SELECT calc FROM events WHERE step = 'calc-end' AND note LIKE '%completed%' ORDER BY calc")]
    assert len(begun) == 10
    for number, calc in enumerate(begun):              # they took 100 s, 200 s ... 1000 s
        db.execute("UPDATE events SET at = (SELECT at FROM events WHERE calc = ?1 AND step = 'calc-start') + ?2 WHERE calc = ?1 AND step = 'calc-end'",
                   (calc, 100 * number + 100))
    db.commit()
    db.close()
    found = asked(waits)
    assert (found["ahead"], found["runs"], round(found["run_from"]), round(found["run_to"])) == (0, 10, 200, 900), found
    assert found["long"]["en"] == "0 before it; of the last 10 runs of do there, eight in ten took 0:03:20 to 0:15:00 each"
    done = world.workflow("explain", waits)
    assert "  how long yet: 0 before it; of the last 10 runs" in done.stdout, done
    told = json.loads(world.workflow("explain", waits, "--json").stdout)
    assert (told["ahead"], told["runs"], round(told["run_to"])) == (0, 10, 900) and "直近 10 回" in world.workflow(
        "explain", waits, env=suite.clean_env(LANG="ja_JP.UTF-8")).stdout
    accept_id, claim = client.claim()
    client.walk(accept_id, claim, "calc-start")
    assert client.ok("GET", "v2/explain", {"v": 2, "accept_id": waits})["long"]["en"].startswith("of the last 10 runs of do")
    client.ok("POST", "calc-end", {"v": 2, "accept_id": waits, "claim": claim, "result": "calc end", "exit_code": 0})
    assert "long" not in client.ok("GET", "v2/explain", {"v": 2, "accept_id": waits})
    other = asked(client.register("fails"))
    assert other["runs"] == 0 and "of fails have" in other["long"]["en"], other


def test_every_cause_is_made_here():
    with open(__file__, encoding="utf-8") as text:
        made = set(re.findall(r'"([a-z0-9-]+)"', text.read()))
    kinds = {"relay-" + kind for kind in ("dns", "connect", "certificate", "name", "proxy", "refuses", "later")}
    assert {cause.code for cause in relay.CAUSES + remote.CAUSES} | kinds | {"no-relay", "old-relay", "gateway"} <= made


def test_why_something_was_run_again_is_told_wherever_people_look(ask):
    world, client = ask.world, ask.client
    accept_id = client.register("do", "again")
    client.walk(*client.claim(), upto="end-send", exit_code=3)
    assert "again" not in client.ok("GET", "v2/explain", {"v": 2, "accept_id": accept_id})
    assert world.workflow("rerun", accept_id, "--reason", "the licence\x1b[2J is back").returncode == 0
    shown = "the licence\\x1b[2J is back"
    claim = ""
    while True:                                        # it waits, and it is claimed
        found = client.ok("GET", "v2/explain", {"v": 2, "accept_id": accept_id})
        assert found["again"]["en"] == "it was run again (attempt 2): " + shown and "再実行" in found["again"]["ja"], found
        assert "  it was run again (attempt 2): " + shown in world.workflow("explain", accept_id).stdout
        if claim:
            break
        accept_id, claim = client.claim()
    for words in (("show", accept_id), ("history", "--json"), ("history", "--csv"), ("explain", accept_id)):
        assert "licence" in suite.run("mi_dicomapi.py", *(words + ("--ini", world.ini))).stdout, words
    found = client.ok("GET", "v2/board", {"v": 2, "view": "one", "accept_id": accept_id})
    assert found["why"]["again"]["en"].endswith(shown) and [2, "rerun", shown] in [[step[1], step[2], step[4]] for step in found["calc"]["steps"]], found
    client.walk(accept_id, claim, upto="end-send", exit_code=3)
    suite.run("mi_dicomapi.py", "rerun", accept_id, "--ini", world.ini)
    assert client.ok("GET", "v2/explain", {"v": 2, "accept_id": accept_id})["again"]["en"] == "it was run again (attempt 3): by an operator"


def test_run_and_wait_say_why_when_nothing_moves_and_again_when_it_is_another_reason(ask, monkeypatch):
    monkeypatch.setattr(wf, "EXPLAIN_AFTER", 1)
    monkeypatch.setattr(wf, "WAIT", 1)
    lines, ended = [], []
    thread = threading.Thread(target=lambda: ended.append(wf.run(ask.world.url, SITE, "fails", [], [], token=ask.world.token, tell=lines.append, to=ask.world.folder + "/to")))
    thread.start()
    wait_until(lambda: any("no poller of user" in line for line in lines), 20, lines)
    time.sleep(3)
    assert sum("no poller of user" in line for line in lines) == 1, lines
    ask.world.poller(DO, ini="paused = yes\n")
    wait_until(lambda: any("is paused" in line and "mi_system_remote.py resume" in line for line in lines), 20, lines)
    rewrite(ask.world, paused="no")
    thread.join(30)
    assert ended[0].exit_code == 1, lines


def test_explain_in_words_for_people(ask):
    given = ask.register()
    done = ask.world.workflow("explain", given[:8])
    assert done.returncode == 0 and done.stdout.startswith("%s: no poller of user %s has ever asked for site %s, since 20" % (given, USER, SITE)), done
    assert "who has to act: the admin of the external computer: mi_system_remote.py poll" in done.stdout and "seen 0 s ago" in done.stdout
    done = ask.world.workflow("explain", given, env=suite.clean_env(LANG="ja_JP.UTF-8"))
    assert "対応する人: 外部計算機の管理者: mi_system_remote.py poll" in done.stdout and "一度もありません" in done.stdout
    done = suite.run("mi_dicomapi.py", "explain", given, "--ini", ask.world.ini)
    assert done.returncode == 0 and "who has to act: the admin" in done.stdout
    assert ask.world.workflow("explain", "0" * 36).returncode == 64
    ask.world.relay.stop()
    done = ask.world.workflow("explain", given, "--json", "--patience", "1s")
    found = json.loads(done.stdout)
    assert (done.returncode, found["code"], found["who"]) == (69, "relay-connect", "operator"), done


def test_a_relay_of_before_is_named_with_what_it_lacks(tmp_path):
    fake = Fake(misbehave=lambda request: (404, json.dumps({"errors": [{"code": 404, "message": "no such call"}]}).encode(), {})
                if "v2/" in request.path else None)
    try:
        done = suite.run("mi_system_wf.py", "explain", "0" * 36, "--json", "--url", fake.url, env=suite.clean_env(MI_DISTCOMP_TOKEN="t"), cwd=str(tmp_path))
        assert done.returncode == 0 and json.loads(done.stdout)["code"] == "old-relay" and "older version" in done.stdout, done
    finally:
        fake.stop()


KNOBS = {"mi_dicomapi.py": {"QUIET_AFTER, INPUTS_AFTER = 600, 60": "QUIET_AFTER, INPUTS_AFTER = 1, 1"},
         "mi_system_remote.py": {"QUIET_AFTER = 600 ": "QUIET_AFTER = 1 "}}


@pytest.fixture
def impatient(make_world, edited):
    """An Asker of programs that are as they are but for the seconds after which they find a thing long."""
    edited(KNOBS)
    return Asker(make_world(tls=False, commands=["do", "late", "after"], sites=(SITE, OTHER)).start())


def test_what_stands_still_for_long_and_what_a_poller_that_tells_nothing_does(impatient):
    ask, world = impatient, impatient.world
    half = ask.register(allow=False, site=OTHER, parameter_files={"in": entry(b"x")})
    found = ask.becomes(half, "inputs-missing", "starter")
    assert found["command"].startswith("mi_system_wf.py submit %s do --request-id 'r" % OTHER) and found["since"], found
    fielded = ask.register(site=OTHER)
    assert ask.client.call("GET", "calc-request", {"site_id": OTHER})[1]["accept_id"] == fielded
    taken = ask.client.raw("GET", "calc-params?site_id=%s&accept_id=%s" % (OTHER, fielded))
    assert taken[0] == 200 and b"calc-info" in taken[1], taken
    ask.becomes(fielded, "fielded-has-it", "nobody")

    late = "argv =\n    /bin/sh\n    -c\n    sleep 60\nmatch = late\ntimeout = 3s\n"
    world.poller(dict(DO, late=late, after="argv = /bin/true\nmatch = after\npost = /bin/false\n"), ini="tell = no\n")
    runs = ask.client.register("do", "run", {"do": b"until [ -e %s/go ]; do sleep 0.1; done; kill -9 $$\n" % world.folder.encode()}, {}, site=SITE)
    ask.becomes(runs, "quiet", "starter", "mi_system_wf.py output " + runs)
    ask.here(runs, "quiet", "starter")
    waits = ask.register("late")
    ask.becomes(waits, "untold", "admin")
    ask.here(waits, "busy", "nobody")
    with open(os.path.join(world.folder, "go"), "w"):
        pass
    assert "137" in ask.becomes(runs, "failed", "starter")["sentence"]["en"]
    ask.becomes(waits, "timeout", "starter", "mi_system_wf.py result " + waits)
    assert "post" in ask.becomes(ask.register("after"), "abnormal", "starter")["sentence"]["en"]
    suite.run("mi_system_remote.py", "pause", "--ini", os.path.join(world.folder, "poller", "poller.ini"))
    ask.here(half, "paused", "admin")
    suite.run("mi_system_remote.py", "resume", "--ini", os.path.join(world.folder, "poller", "poller.ini"))
    ask.here(half, "not-here", "starter")
    before = ask.client.ok("GET", "v2/explain", {"v": 2, "accept_id": waits})["now"]
    world.pollers[0].kill()
    ask.client.ok("POST", "rerun", {"v": 2, "accept_id": waits})
    assert ask.becomes(waits, "silent", "admin") and world.rows("SELECT allowed FROM calculations WHERE accept_id = ?", waits)[0]["allowed"] > before


def test_a_poller_of_cron_is_one_from_the_moment_that_it_has_asked(ask):
    done = ask.world.poller(DO, words=("poll", "--once"))
    assert done.popen.wait(20) == 0
    found = ask.client.ok("GET", "v2/explain", {"v": 2, "accept_id": ask.register()})
    assert (found["cause"], found["who"], found["command"]) == ("once", "admin", "mi_system_remote.py poll --once"), found


def test_a_result_that_the_relay_does_not_want_any_more_is_the_admins(ask):
    world, go = ask.world, os.path.join(ask.world.folder, "go")
    poller = world.poller(DO)
    runs = ask.client.register("do", "run", {"do": b"until [ -e %s ]; do sleep 0.1; done\n" % go.encode()}, {}, site=SITE)
    ask.becomes(runs, "running", "nobody")
    poller.kill()
    suite.run("mi_dicomapi.py", "end", runs, "--reason", "burnt down", "--ini", world.ini)
    ask.becomes(runs, "lost", "starter", "mi_system_wf.py rerun " + runs)
    with open(go, "w"):
        pass
    world.poller(DO)
    ask.here(runs, "kept", "admin")


def test_what_keeps_the_workflow_side_from_the_relay_names_who_can_mend_it_and_what_he_can_type(world, make_world):
    here = "0" * 8 + "-0000-4000-8000-" + "0" * 12
    other = make_world()                               # a relay whose certificate is for another host
    os.makedirs(other.folder + "/other")
    os.rename(suite.make_certificate(other.folder + "/other", names="DNS:relay.example.org")[0], other.cert)
    os.rename(other.folder + "/other/key.pem", other.key)
    other.start()
    ini = os.path.join(other.folder, "workflow.ini")
    with open(ini, "w") as out:
        out.write("[workflow]\nca_file = %s\nproxy = http://127.0.0.1:%d\n" % (world.cert, suite.a_port()))
    for options, code, who, ends in (
            (["--url", "https://nowhere.invalid:1", "--token-file", world.token_file()], "relay-dns", "starter", 69),
            (["--url", "https://127.0.0.1:%d" % suite.a_port(), "--token-file", world.token_file()], "relay-connect", "operator", 69),
            (["--url", world.url, "--token-file", world.token_file()], "relay-certificate", "starter", 69),
            (["--url", "https://127.0.0.1:%d" % other.port, "--ca-file", other.cert, "--token-file", world.token_file()], "relay-name", "starter", 69),
            (["--url", world.url, "--ini", ini, "--token-file", world.token_file()], "relay-proxy", "starter", 69),
            (["--url", world.url, "--ca-file", world.cert, "--token-file", world.token_file(world.expired(USER, 3), "old")], "relay-refuses", "operator", 77)):
        done = suite.run("mi_system_wf.py", "explain", here, "--json", "--patience", "0s", *options)
        found = json.loads(done.stdout)
        assert (done.returncode, found["code"], found["who"]) == (ends, code, who), done
        assert found["command"] == ("mi_system_wf.py check" if who == "starter" else "mi_dicomapi.py check"), found


def test_a_relay_whose_database_is_broken_says_later_and_its_operator_has_to_act(ask):
    accept_id = ask.register()
    ask.world.relay.stop()
    ask.world.start()
    path = os.path.join(ask.world.state, "state.sqlite3")
    with open(path, "r+b") as database:
        database.write(bytes(os.path.getsize(path)))
    done = ask.world.workflow("explain", accept_id, "--json", "--patience", "0s")
    found = json.loads(done.stdout)
    assert (done.returncode, found["code"], found["who"], found["command"]) == (75, "relay-later", "operator", "mi_dicomapi.py check"), done


@pytest.mark.parametrize("status, answer", [(403, b"<html>Forbidden</html>"), (404, b"<html>Not Found</html>"), (404, b'{"message": "no Route matched"}'),
                                            (403, json.dumps({"errors": [{"code": "0005", "message": "x"}]}).encode())])
def test_a_gateway_that_keeps_the_question_back_is_named_and_not_taken_for_an_older_relay(status, answer, tmp_path):
    fake = Fake(misbehave=lambda request: (status, answer, {}) if "v2/" in request.path else None)
    try:
        done = suite.run("mi_system_wf.py", "explain", ACCEPT_ID, "--json", "--url", fake.url, env=suite.clean_env(MI_DISTCOMP_TOKEN="t"), cwd=str(tmp_path))
        found = json.loads(done.stdout)
        assert (done.returncode, found["code"], found["who"]) == (0, "gateway", "operator") and "/mi-distcomp-api/v2/" in found["changes"], done
    finally:
        fake.stop()


def test_a_run_whose_lines_nobody_reads_asks_for_no_cause(ask, monkeypatch):
    monkeypatch.setattr(wf, "EXPLAIN_AFTER", 1)
    monkeypatch.setattr(wf, "WAIT", 1)
    token, ended, lines = ask.world.issue("prometheus", "--roles", "metrics"), [], []
    for tell in (None, lines.append):
        thread = threading.Thread(target=lambda: ended.append(wf.run(
            ask.world.url, SITE, "fails", [], [], token=ask.world.token, tell=tell, to=ask.world.folder + "/to")))
        thread.start()
        waits = wait_until(lambda: ask.world.rows("SELECT accept_id FROM calculations WHERE state = 'allowed'"), 20)[0]["accept_id"]
        time.sleep(4)
        if tell:
            wait_until(lambda: any("no poller of user" in line for line in lines), 20)
        asked = b'call="v2/explain"' in ask.world.client(token).raw("GET", "metrics")[1]
        assert asked == bool(tell)
        ask.client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": waits})
        thread.join(60)
        assert ended.pop().ended_by == "relay"
