"""notify: whom it concerns is told what he should know, once, when it has lasted, and never in a flood, whatever is started again."""
import json
import os
import re
import signal
import sqlite3
import sys
import time

import pytest

import suite
from suite import SITE, USER, wait_until

relay = suite.module("mi_dicomapi.py")
KEYS = {"grace": 900.0, "waits": 3600.0, "cap": 20, "researchers": [USER]}
SILENT = relay.condition("silent", "a", site="a")


class Recipients:
    """A Notifier with a clock of its own, and what its hook was given: [(recipient, [(kind, begins, over or ended)])]."""

    def __init__(self, **keys):
        self.keys, self.now, self.got, self.fails = dict(KEYS, **keys), 1e9, [], ""
        self.notifier, self.ends = relay.Notifier(self.keys, {}), []

    def restart(self):
        """It is killed, and started again with what is on the disk."""
        self.notifier = relay.Notifier(self.keys, json.loads(json.dumps(self.disk)))

    def keep(self):
        self.disk = json.loads(json.dumps(self.notifier.state))

    def run(self, message):
        if self.fails:
            return self.fails
        assert json.loads(json.dumps(message)) == message and message["text"] and message["subject"]
        self.got.append((" ".join(filter(None, [message["to"], message["site"], message["user"]])), [(one["kind"], one["what"]) for one in message["things"]]))
        self.last = message

    def hold(self, *found, minutes=1, away=""):
        """So many minutes, in each of which these conditions hold (or the relay is away)."""
        for minute in range(minutes):
            if away:
                self.notifier.away(away, self.now)
            else:
                self.notifier.take({"after": 1, "known": "x", "ended": self.ends, "conditions": list(found)}, self.now)
            self.ends = []
            self.keep()
            self.notifier.tell(self.now, self.run, self.keep)
            self.now += 60


def test_what_lasts_is_told_once_and_once_more_when_it_is_over():
    one = Recipients()
    one.hold(SILENT, minutes=15)
    assert one.got == []
    one.hold(SILENT, minutes=100)
    assert one.got == [("operators", [("silent", "begins")])]
    one.restart()
    one.hold(SILENT, minutes=20)
    one.hold(minutes=10)
    one.hold(SILENT)                                   # it flaps
    one.hold(minutes=10)
    assert len(one.got) == 1
    one.hold(minutes=10)
    assert one.got[1:] == [("operators", [("silent", "over")])] and "over" in one.last["text"]
    one.restart()
    one.hold(minutes=60)
    assert len(one.got) == 2


def test_what_comes_and_goes_within_the_grace_is_not_told_and_what_flaps_for_long_is():
    one = Recipients()
    for turn in range(3):
        one.hold(SILENT, minutes=5)
        one.hold(minutes=20)
    assert one.got == []
    for turn in range(20):
        one.hold(SILENT, minutes=5)
        one.hold(minutes=5)
    assert one.got == [("operators", [("silent", "begins")])]


def test_a_relay_that_is_away_is_told_and_what_held_before_does_not_end_by_it():
    one = Recipients()
    one.hold(SILENT, minutes=30)
    one.hold(away="connection refused", minutes=10)
    one.hold(SILENT, minutes=30)
    assert one.got == [("operators", [("silent", "begins")])]
    one.hold(away="connection refused", minutes=40)
    assert one.got[1:] == [("operators", [("relay", "begins")])] and "connection refused" in one.last["text"]
    one.hold(SILENT, minutes=30)
    assert one.got[2:] == [("operators", [("relay", "over")])]


def test_an_end_that_comes_nearer_is_told_anew_at_each_of_its_days():
    one = Recipients()
    for days in (40, 30, 20, 7, 3, 1, 0, -1):
        found = [relay.condition("token", "x", level=level, user="u", what="remote a", day="2026-12-01") for level in relay.level_of_end(one.now + 86400 * days, one.now)]
        one.hold(*[dict(each, to="admins", site="a") for each in found], minutes=60)
    assert one.got == [("admins a", [("token", "begins")])] * 4
    one.hold(minutes=30)
    assert one.got[4:] == [("admins a", [("token", "over")])]


def test_researchers_are_told_only_if_they_asked_for_it_and_of_what_has_waited_long():
    one = Recipients()
    ended = [relay.condition("ended", "i%d" % number, id="i%d" % number, what="do", site="a", user=user, why="completed") for number, user in enumerate((USER, "bob"))]
    one.ends = ended
    waits = [relay.condition("waits", "a:" + user, since, count=3, id="i", site="a", user=user, day="d", why={"en": "w", "ja": "w"})
             for user, since in ((USER, one.now - 600), ("bob", 0.0))]
    one.hold(*waits, minutes=40)
    assert one.got == [("researchers " + USER, [("ended", "ended")])]
    one.hold(*waits, minutes=20)
    assert one.got[1:] == [("researchers " + USER, [("waits", "begins")])]


def test_nobody_is_flooded_and_nothing_is_lost_of_what_comes_at_once():
    one = Recipients(cap=7)
    for number in range(60):
        one.ends = [relay.condition("ended", "i%d" % number, id="i%d" % number, what="do", site="a", user=USER, why="completed")]
        one.hold()
    assert len(one.got) == 7 and [len(things) for to, things in one.got][:5] == [1] * 5 and "last message for a day" in one.last["text"]
    one.hold(minutes=24 * 60)
    assert len(one.got) == 8 and sum(len(things) for to, things in one.got) == 60
    one.ends = [relay.condition("ended", "j%d" % number, id="j", what="do", site="a", user=USER, why="completed") for number in range(3000)]
    one.hold()
    assert len(one.got[8][1]) == relay.QUEUED_MOST and "and %d more" % (3000 - relay.QUEUED_MOST) in one.last["text"] and len(json.dumps(one.disk)) < 1 << 20


def test_what_a_hook_does_not_take_is_told_later_with_the_same_id_also_after_a_restart():
    one = Recipients()
    one.fails = "it ended with 1"
    one.hold(SILENT, minutes=30)
    one.restart()
    wanted = one.notifier.message("operators", one.notifier.queue["operators"])["id"]
    one.fails = ""
    one.hold(SILENT, minutes=60)
    assert one.got == [("operators", [("silent", "begins")])] and one.last["id"] == wanted


@pytest.mark.parametrize("kind", sorted(relay.CONDITIONS))
def test_each_kind_is_said_in_both_languages(kind):
    made = relay.condition(kind, site="a", user="u", id="i", what="w", day="d", count=1, free="f", keep="k", why="y")
    assert relay.CONDITIONS[kind].text in relay.JA and made["text"]["en"] != made["text"]["ja"] and "%(" not in str(made)


HOOK = """import json, os, sys, time
message = json.load(sys.stdin)
if message["site"] == "%(sleeps)s":
    os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "300")
    time.sleep(300)
with open(%(to)r, "a") as out:
    out.write(json.dumps(dict(message, env=sorted(os.environ), argv=sys.argv[1:])) + "\\n")
"""


@pytest.fixture
def told(make_world, edited):
    """(a world, a function that starts notify, a function that gives what the hook was given); both look again sooner, and tell more at once."""
    edited({"mi_dicomapi.py": {"\nCONDITIONS_EVERY = 5 ": "\nCONDITIONS_EVERY = 1 ", "\nALL_AWAY = 30 ": "\nALL_AWAY = 1 ",
                               "AT_ONCE_MOST = 600, 5 ": "AT_ONCE_MOST = 600, 50 "}})
    world = make_world(commands=["do"], sites=(SITE, "u-sleeps")).start()
    hook, to = os.path.join(world.folder, "hook.py"), os.path.join(world.folder, "told")
    with open(hook, "w") as out:
        out.write(HOOK % {"to": to, "sleeps": "u-sleeps"})
    viewer = world.token_file(world.issue("notify", "--roles", "viewer"), "viewer")
    world.extra += ("[notify]\nurl = https://localhost:%d\ntoken_file = %s\nca_file = %s\nhook =\n    %s\n    %s\n    a b; $(c)\ngrace = 1s\nwaits = 0s\ntime_limit = 60s\n"
                    "researchers = %s\nstate_dir = %s\n" % (world.port, viewer, world.cert, sys.executable, hook, USER, os.path.join(world.folder, "notes")))
    world.write_ini(world.port)

    def start():
        world.pollers.append(suite.Process("mi_dicomapi.py", ["notify", "--ini", world.ini], world.folder))
        return world.pollers[-1]

    def given(kind="", what=""):
        try:
            with open(to) as text:
                return [message for message in map(json.loads, text) if not kind or (kind, what) in [(one["kind"], one["what"]) for one in message["things"]]]
        except FileNotFoundError:
            return []
    return world, start, given


def test_the_hook_is_told_of_a_real_relay_each_thing_once_whoever_is_started_again(told):
    world, start, given = told

    def notes():
        with open(os.path.join(world.folder, "notes", "notes"), encoding="utf-8") as text:
            return text.read()

    client = world.client()
    before = client.register("do")
    client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": before})
    done = suite.run("mi_dicomapi.py", "notify", "--test", "--ini", world.ini)
    assert done.returncode == 0 and done.stdout.count("OK ") == 4 and [message["to"] for message in given()] == ["operators", "admins", "researchers"], done
    first = start()
    found, = wait_until(lambda: given("no-backup", "begins"), 30, first.text)
    assert found["to"] == "operators" and "mi_dicomapi.py backup DIR" in found["text"] and found["argv"] == ["a b; $(c)"]
    assert set(found["env"]) <= set(relay.HOOK_ENV) | {"LC_CTYPE", "PYTHONDONTWRITEBYTECODE"}, found["env"]
    accept_id = client.register("do")
    client.walk(*client.claim(), upto="end-send", exit_code=3)
    found, = wait_until(lambda: given("ended", "ended"), 30, first.text)
    assert (found["to"], found["user"]) == ("researchers", USER) and accept_id in found["text"] and "(3)" in found["text"] and before not in found["text"]
    client.register("do")
    wait_until(lambda: given("waits", "begins"), 30, first.text)
    assert suite.run("mi_dicomapi.py", "notify", "--ini", world.ini).returncode == 75
    assert first.stop() == 0
    second = start()
    world.relay.stop(signal.SIGKILL)
    world.start()
    client.connection = None
    assert suite.run("mi_dicomapi.py", "backup", os.path.join(world.folder, "copy"), "--ini", world.ini).returncode == 0
    wait_until(lambda: given("no-backup", "over") or not second.alive(), 60)
    assert second.alive(), second.text()
    again = client.register("do", "again")
    client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": again})
    wait_until(lambda: any(again in message["text"] for message in given("ended", "ended")), 60, second.text)
    wait_until(lambda: not json.loads(notes()).get("queue"), 30, notes)
    second.kill()
    third = start()
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"), timeout=10)
    db.execute("UPDATE tokens SET expires = ? WHERE user = 'notify'", (time.time() + 5 * 86400,))
    db.commit()
    wait_until(lambda: given("token", "begins"), 60, third.text)
    texts = [message["text"] for message in given()]
    assert [sum(part in text for text in texts) for part in (accept_id + " (do", again + " (do", "backup DIR\n")] == [1, 1, 1], texts


def test_a_hook_that_hangs_is_ended_with_what_it_started_and_a_relay_that_refuses_is_told(told):
    world, start, given = told
    began = time.monotonic()
    why = relay.run_hook([sys.executable, os.path.join(world.folder, "hook.py"), "x" * 99], {"site": "u-sleeps", "to": "admins"}, 1)
    assert "longer than 1 s" in why and time.monotonic() - began < 30
    assert relay.run_hook(["/no/such/hook"], {}, 1) == "/no/such/hook: No such file or directory"
    why = relay.run_hook(["/bin/sh", "-c", "echo 'it \033[2J said' >&2; exit 3"], {}, 5)
    assert why.startswith("it ended with 3: it ") and "\033" not in why
    os.chmod(os.path.join(world.folder, "viewer"), 0o644)
    done = suite.run("mi_dicomapi.py", "notify", "--test", "--ini", world.ini)
    assert done.returncode == 78 and "chmod 600" in done.stdout, done
    os.chmod(world.token_file(world.issue("nobody"), "viewer"), 0o600)
    done = suite.run("mi_dicomapi.py", "notify", "--test", "--ini", world.ini)
    assert done.returncode == 78 and re.search(r"^FAIL .*HTTP 403: role viewer needed", done.stdout, re.M), done


def test_the_hook_for_mail_that_stands_in_the_readme_works(tmp_path):
    with open(suite.script("README.md"), encoding="utf-8") as text:
        hook, = re.findall(r"^```py\n(#!/usr/bin/python3\n.*?sendmail.*?)^```", text.read(), re.M | re.S)
    sendmail, to = tmp_path / "sendmail", tmp_path / "mail"
    sendmail.write_text("#!/bin/sh\necho \"$@\" >%s\ncat >>%s\n" % (to, to))
    sendmail.chmod(0o755)
    (tmp_path / "hook.py").write_text(hook.replace("/usr/sbin/sendmail", str(sendmail)))
    one = Recipients()
    one.hold(SILENT, minutes=20)
    for given in (one.last, dict(one.last, to="admins", site="u-a"), dict(one.last, to="researchers", user="suzuki", subject="終わりました", text="結果\n")):
        assert relay.run_hook([sys.executable, str(tmp_path / "hook.py")], given, 20) is None
    mail = to.read_text()
    assert mail.startswith("-oi -t\n") and "To: suzuki@example.org" in mail and "Message-ID: <%s@example.org>" % one.last["id"] in mail
    assert relay.run_hook([sys.executable, str(tmp_path / "hook.py")], {}, 20).startswith("it ended with 1")


def test_a_token_for_some_sites_hears_of_these_only(told):
    world, start, given = told
    client, ids = world.client(), {}
    for site in world.sites:
        ids[site] = client.register("do", site=site)
        client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": ids[site]})
        client.register("do", site=site)
    viewer = world.client(world.issue("looker", "--roles", "viewer,metrics", "--sites", SITE))
    found = viewer.ok("GET", "v2/conditions", {"v": 2, "after": 0})
    assert {one["site"] for one in found["conditions"] + found["ended"]} == {SITE} and [one["key"] for one in found["ended"]] == ["ended:" + ids[SITE]], found
    assert "u-sleeps" not in json.dumps(found) and viewer.raw("GET", "metrics")[0] == 403
    found = world.client(world.issue("all", "--roles", "viewer")).ok("GET", "v2/conditions", {"v": 2, "after": 0})
    assert {one["site"] for one in found["ended"]} == set(world.sites) and "no-backup" in [one["key"] for one in found["conditions"]]
    assert client.call("GET", "v2/conditions", {"v": 2})[0] == 403
