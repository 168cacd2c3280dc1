"""The keeper of the SSH way: what must go on while nobody is connected goes on, once, whoever is killed wherever."""
import json
import os
import re
import signal
import subprocess
import time
import uuid

import pytest

import suite
from ssh_door import runner
from suite import wait_until

DOOR = '''
import argparse, importlib.util, os, sys
script, word, ini, ident, text, point, killed = sys.argv[1:8]
sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("door", script)
m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
m.fault = lambda name: name == point and (open(killed, "w").close(), os.kill(os.getpid(), 9))
rules = m.guard_rules(argparse.Namespace(ini=ini, key=os.environ.get("KEY"))) if ini != "-" else dict(m.far_rules(os.fsencode(text)), env=dict(os.environ))
for folder in (m.keeper_base(rules), rules["base"]):
    os.makedirs(os.path.join(folder, b".mi"), 0o700, exist_ok=True)
place = m.Place(rules, ident)
for ident in ident.split() if word == "start" else ():
    place = m.Place(rules, ident)
    place.make_directories()
    with m.locked(place.path(b"lock")):
        if place.state()["state"] == "taken":
            command, argv = m.permit_command(rules["commands"], m.shell_words(text)[0], m.shell_words(text)[1:])
            env = m.command_env(command, place.work, ident + ".1")
            m.begin_run(place, command, ["sh", "-c", m.INTO_LOG, "sh", "77"] + argv, env, text)
if word == "cancel":
    m.write_synced(place.path(b"cancelled"), m.utf8(text))
m.ensure_keeper(rules)
'''


OTHER = "bbbbbbbb-0000-4000-8000-000000000000"


class Host:
    """An external computer's base, and doors onto it: processes that end as soon as they have asked."""

    def __init__(self, folder, **keys):
        self.folder, self.base = str(folder), os.path.join(str(folder), "base")
        os.mkdir(self.base, 0o700)
        self.tell = os.path.join(self.folder, "told")
        self.program("solve", "echo solve $MI_RUN >>../../told; sleep ${SLEEP:-0.1}; echo done >>../../told; exit 3")
        for name in ("pre", "post"):
            self.program(name, "echo %s $MI_RUN >>../../told" % name)
        self.write(**keys)

    def program(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w") as out:
            out.write("#!/bin/sh\n" + text + "\n")
        os.chmod(path, 0o755)

    def write(self, outbound="", **keys):
        self.ini = os.path.join(self.folder, "ini")
        keys = dict({"argv": os.path.join(self.folder, "solve"), "match": "solve", "grace": "0.3"}, **keys)
        with open(self.ini, "w") as out:
            out.write("[ssh guard]\nbase = %s\n[outbound]\n%s\n[command it]\n" % (self.base, outbound)
                      + "".join("%s = %s\n" % pair for pair in keys.items()))
        os.chmod(self.ini, 0o600)

    def door(self, word, ident, text="solve", point="", **env):
        return subprocess.Popen([suite.PYTHON, "-I", "-S", "-c", DOOR, suite.script("execute_remote_command.py"), word, self.ini, ident, text, point,
                                 self.tell + ".killed"],
                                env=dict(suite.clean_env(), **env), cwd="/", stdin=subprocess.DEVNULL)

    def start(self, ident=None, point=""):
        """The name of a run that a door has started."""
        ident = ident or str(uuid.uuid4())
        code = self.door("start", ident, point=point).wait(30)
        assert code == 0 or point and code == -signal.SIGKILL
        return ident

    def control(self, ident):
        return os.path.join(self.base, ".mi", ident)

    def ended(self, ident):
        """The journal's "ended", or None."""
        try:
            with open(os.path.join(self.control(ident), "journal")) as text:
                rows = [json.loads(row) for row in text if row.strip()]
        except FileNotFoundError:
            return None
        assert sum(row["what"] == "ended" for row in rows) <= 1, rows
        return rows[-1] if rows and rows[-1]["what"] == "ended" else None

    def end_of(self, ident, seconds=30):
        return wait_until(lambda: self.ended(ident), seconds)

    def told(self):
        try:
            with open(self.tell) as text:
                return text.read().splitlines()
        except FileNotFoundError:
            return []

    def keepers(self):
        """The ids of the keepers of this base: who has its FIFO open."""
        found = []
        for pid in (name for name in os.listdir("/proc") if name.isdigit()):
            try:
                links = [os.readlink("/proc/%s/fd/%s" % (pid, fd)) for fd in os.listdir("/proc/%s/fd" % pid)]
            except OSError:
                continue
            found += [int(pid)] if any(re.match(re.escape(self.base) + r"/\.mi/keeper\.[^/]*\.lock\Z", link) for link in links) else []
        return found

    def idle(self):
        """Waits until no keeper is left and no run is open."""
        wait_until(lambda: not self.keepers() and not os.listdir(os.path.join(self.base, ".mi", "open")))


POINTS = ["run opened", "order noted", "run prepared", "starting unnoted", "starting noted", "wrapper started", "keeper forked", "keeper locked",
          "pre unnoted", "pre noted", "pre made", "post unnoted", "post noted", "post made", "ended unnoted", "ended noted", "keeper about to end"]


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_run_happens_once_and_comes_to_its_end_wherever_door_or_keeper_is_killed(jobs, tmp_path):
    """Two doors: the first is killed there, or the keeper that it has forked."""
    points, ident = [point for point in POINTS if jobs or not point.startswith("pre ")], str(uuid.uuid4())
    hosts, doors = {}, []
    for number, point in enumerate(points):
        folder = tmp_path / str(number)
        folder.mkdir()
        post, pre = os.path.join(str(folder), "post"), {"pre": os.path.join(str(folder), "pre")} if jobs else {}
        hosts[point] = Host(folder, post=post, jobs=jobs, **pre)
        doors.append(hosts[point].door("start", ident, point=point))
    assert {door.wait(60) for door in doors} <= {0, -signal.SIGKILL}
    for point, host in hosts.items():
        wait_until(lambda: os.path.exists(host.tell + ".killed"), what="nobody came to: " + point)
        doors.append(host.door("start", ident))
    marks = ["pre %s.1" % ident] * jobs + ["solve %s.1" % ident, "done", "post %s.1" % ident]
    for point, host in hosts.items():
        end = host.end_of(ident)
        assert (end["state"], end["exit_code"], end["reason"]) == ("ended", 3, "") and host.told() == marks, point
        doors.append(host.door("start", ident))        # whatever is asked again
    assert {door.wait(60) for door in doors} <= {0, -signal.SIGKILL}
    for point, host in hosts.items():
        host.idle()
        assert host.told() == marks and host.ended(ident), point


def test_a_wrapper_that_a_door_has_just_started_is_waited_for_and_not_started_a_second_time(tmp_path, monkeypatch):
    host = Host(tmp_path)
    run = runner.KeeperRun(runner.Gate(os.path.join(os.fsencode(host.base), b".mi"), {}), os.fsencode(host.base), host.start(point="starting noted"))
    noted = run.last("starting")["t"]
    for passed, waits in ((0.5, True), (2, False), (-500, False)):             # seconds; (a clock that was set)
        monkeypatch.setattr(runner.time, "time", lambda: noted + passed)
        assert run.goes_on() == waits, passed
    monkeypatch.setattr(runner.time, "time", lambda: noted)
    with open(os.path.join(host.control(run.ident), "cancelled"), "w"):
        pass
    assert not run.goes_on()


def test_what_nobody_waits_for_ends_at_its_time_with_what_it_left_running(tmp_path):
    host = Host(tmp_path, timeout="1s", post=os.path.join(str(tmp_path), "post"))
    host.program("solve", "(sleep 600; echo never) >left & setsid sleep 601 >left2 & exec sleep 602")
    ident = host.start()
    end = host.end_of(ident)
    assert (end["state"], end["reason"], end["stopped"]) == ("ended", "timeout", True) and host.told() == ["post %s.1" % ident]
    host.idle()
    assert not suite.processes_with("MI_RUN=" + ident)


def test_a_keeper_that_was_killed_is_missed_by_the_next_door_and_the_command_is_not(tmp_path):
    host = Host(tmp_path, timeout="3s")
    host.program("solve", "echo solve >>../../told; exec sleep 600")
    ident = host.start()
    keeper, = wait_until(host.keepers)
    wait_until(host.told)
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not host.keepers())
    other = host.start()                               # another run's door
    assert host.end_of(ident)["reason"] == host.end_of(other)["reason"] == "timeout" and host.told() == ["solve"] * 2
    host.idle()


def test_doors_at_once_have_one_keeper_and_no_more_than_jobs_run_at_once(tmp_path):
    host = Host(tmp_path, jobs=2)
    host.program("solve", "mkdir ../../one 2>/dev/null || mkdir ../../two || echo too many >>../../told\nsleep 0.3; rmdir ../../one 2>/dev/null || rmdir ../../two\n"
                 "echo ran >>../../told")
    runs = [str(uuid.uuid4()) for _n in range(6)]
    doors = [host.door("start", ident) for ident in runs]
    for ident in runs:
        host.end_of(ident)
    assert [door.wait(10) for door in doors] == [0] * 6 and host.told() == ["ran"] * 6 and {host.ended(ident)["exit_code"] for ident in runs} == {0}
    host.idle()


def test_a_keeper_watches_many_runs_in_few_threads_and_no_key_waits_for_anothers_mass(tmp_path):
    host = Host(tmp_path, post=os.path.join(str(tmp_path), "post"))
    host.program("solve", "while [ $MI_RUN != %s.1 -a ! -e ../../../go ]; do sleep 0.3; done" % OTHER)
    host.program("post", "while [ $MI_RUN != %s.1 -a ! -e %s/gone ]; do sleep 0.3; done" % (OTHER, tmp_path))
    mass = [str(uuid.uuid4()) for _n in range(50)]

    def journal(key, ident):
        with open(os.path.join(host.base, key, ".mi", ident, "journal")) as text:
            return text.read()

    assert host.door("start", " ".join(mass), KEY="a").wait(60) == 0
    keeper, = wait_until(host.keepers)
    threads = lambda: len(os.listdir("/proc/%d/task" % keeper))
    wait_until(lambda: threads() <= 2)
    open(os.path.join(host.folder, "go"), "w").close()               # they end, all, and their `post` hangs
    wait_until(lambda: threads() > 30)
    assert host.door("start", OTHER, KEY="b").wait(60) == 0
    wait_until(lambda: '"ended"' in journal("b", OTHER))
    assert threads() <= 34 and not [end for end in (journal("a", ident) for ident in mass) if '"ended"' in end]
    open(os.path.join(host.folder, "gone"), "w").close()
    host.idle()
    assert all('"exit_code": 0' in journal("a", ident) for ident in mass)


def test_the_keeper_of_a_base_that_was_removed_ends_and_touches_nothing_in_a_new_one(tmp_path):
    host = Host(tmp_path)
    host.program("solve", "while [ ! -e %s/go ]; do sleep 0.1; done" % tmp_path)
    host.start()
    keeper, = wait_until(host.keepers)
    os.rename(host.base, host.base + ".old")
    os.mkdir(host.base, 0o700)
    ident = host.start()
    wait_until(lambda: not os.path.exists("/proc/%d" % keeper) or "Z" in open("/proc/%d/stat" % keeper).read().split()[2], 30)
    other, = wait_until(host.keepers)
    (tmp_path / "go").write_text("")
    assert other != keeper and host.end_of(ident)["exit_code"] == 0
    host.idle()


def test_of_two_keys_that_wait_for_a_licence_that_one_is_next_which_has_fewer(tmp_path):
    host = Host(tmp_path, jobs=1)
    host.program("solve", "echo $MI_RUN >>../../../told; while [ ! -e ../../../go ]; do sleep 0.05; done")
    mass = [str(uuid.uuid4()) for _n in range(4)]
    assert host.door("start", " ".join(mass), KEY="a").wait(60) == 0
    wait_until(host.told)
    assert host.door("start", OTHER, KEY="b").wait(60) == 0
    time.sleep(2)                                      # the keeper has heard of it, also on a busy machine
    open(os.path.join(host.folder, "go"), "w").close()
    host.idle()
    assert host.told()[1] == OTHER + ".1" and len(host.told()) == 5


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_cancel_reaches_what_runs_and_what_waits(jobs, tmp_path):
    host = Host(tmp_path, jobs=jobs)
    host.program("solve", "echo solve >>../../told; trap '' TERM; sleep 600; sleep 600")
    runs = [host.start() for _n in range(2)]
    wait_until(lambda: len(host.told()) == (1 if jobs else 2))
    for ident in reversed(runs):
        assert host.door("cancel", ident, "0").wait(30) == 0
        end = host.end_of(ident)
        assert (end["state"], end["reason"]) == ("ended", "cancelled")
    assert len(host.told()) == (1 if jobs else 2)
    host.idle()


def test_what_only_waited_does_not_start_after_a_reboot_and_what_was_taken_off_the_list_does_not_start_at_all(tmp_path):
    host = Host(tmp_path, jobs=1)
    host.program("solve", "echo solve >>../../told; while [ ! -e ../../go ]; do sleep 0.05; done")
    first, second, third = (host.start() for _n in range(3))
    wait_until(host.told)
    keeper, = host.keepers()
    os.kill(keeper, signal.SIGKILL)
    waiting = [ident for ident in (first, second, third) if not os.path.exists(os.path.join(host.control(ident), "start"))]
    with open(os.path.join(host.control(waiting[0]), "command")) as text:
        note = json.load(text)
    with open(os.path.join(host.control(waiting[0]), "command"), "w") as out:
        json.dump(dict(note, boot="another"), out)
    host.write(jobs=1, match="other")
    host.door("look", waiting[0]).wait(30)
    end = host.end_of(waiting[0])
    assert (end["state"], end["exit_code"]) == ("lost", None) and "restarted" in end["reason"]
    open(os.path.join(host.folder, "go"), "w").close()
    end = host.end_of(waiting[1])
    assert (end["state"], end["exit_code"]) == ("ended", None) and end["reason"].startswith("refused: no [command NAME]")
    host.idle()
    assert host.told() == ["solve"]


def test_what_rules_kept_goes_after_its_time_though_nobody_comes_for_it(tmp_path):
    host = Host(tmp_path, outbound="deny_names = secret*\nkeep_refused = 2d")
    old, young = host.start(), host.start()
    for ident, age in ((old, 3), (young, 1)):
        host.end_of(ident)
        path = os.path.join(host.control(ident), "fetched")
        with open(path, "w") as out:
            json.dump({"refused": 1}, out)
        os.utime(path, (time.time() - age * 86400,) * 2)
    host.idle()
    host.end_of(host.start())
    host.idle()
    assert not os.path.exists(os.path.join(host.base, old)) and os.path.exists(os.path.join(host.base, young))
    with open(os.path.join(host.base, ".mi", "guard.log")) as text:
        assert " %s swept " % old in text.read()


def test_who_cancels_gives_a_command_no_longer_grace_than_its_owner(tmp_path):
    host = Host(tmp_path)
    host.program("solve", "trap '' TERM; echo up >>../../told; while :; do sleep 0.1; done")
    ident = host.start()
    wait_until(lambda: "up" in host.told())
    assert host.door("cancel", ident, "86400").wait(30) == 0
    assert host.end_of(ident)["reason"] == "cancelled"
