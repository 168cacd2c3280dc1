"""What a poller waits for, and what waits on it: pause, hours, --drain, --idle-exit, outbox, resend, room on the disk."""
import json
import os
import re
import subprocess
import threading
import signal
import time

import pytest

import fake_relay
import suite
from suite import wait_until as until
from test_poller import ID, Fake, Host, OurWorld, clean_up, host, order, outcome, relay, remote, submit     # noqa: F401 (fixtures)


def progress(relay, accept_id):
    return relay.client().ask("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["progress"]


def box(host):
    """outbox, as {id: row}."""
    done = host.run("outbox", "--json")
    assert done.returncode == 0, done.stderr
    return {row["id"]: row for row in json.loads(done.stdout)}


# ---- when nothing new is taken

def test_pause_and_resume_are_obeyed_without_a_restart_and_what_runs_is_delivered(relay, host):
    host.script("solve", "until [ -e %s/go ]; do sleep 0.1; done; echo x > out.txt" % host.folder)
    host.poller["jobs"] = 3
    process = host.start()
    runs = submit(relay, host.site)
    until(host.runs)
    done = host.run("pause")
    assert done.returncode == 0 and "paused" in done.stdout and str(host.base) in done.stdout     # somebody else's or another one's is seen
    until(lambda: "no new calculation why=paused" in host.text())
    waits = submit(relay, host.site)
    (host.folder / "go").write_text("")
    assert outcome(relay, runs)["status"] == "completed" and progress(relay, waits) == "not start"
    process.terminate()
    assert process.wait(10) == 0
    assert host.run("poll", "--once").returncode == 0 and progress(relay, waits) == "not start", "it lasts beyond a restart"
    process = host.start()
    until(lambda: host.text().count("no new calculation why=paused") == 2)
    assert host.run("resume").returncode == 0
    assert outcome(relay, waits)["status"] == "completed" and process.poll() is None and len(host.runs()) == 2


def test_a_poller_that_is_paused_while_it_asks_leaves_what_it_would_have_got_to_others(relay, host, tmp_path):
    host.start()
    accept_id = submit(relay, host.site)
    assert outcome(relay, accept_id)["status"] == "completed"
    host.run("pause")
    until(lambda: "no new calculation why=paused" in host.text())
    other = Host(tmp_path, relay.url, host.site, relay.token)
    other.base = tmp_path / "other"
    other.poller["calc_base"] = str(other.base)
    try:
        ids = [submit(relay, host.site) for turn in range(3)]
        other.start()
        assert all(outcome(relay, one, 60)["status"] == "completed" for one in ids)
        assert sorted(os.listdir(str(other.base))) == sorted([".mi"] + ids)
        assert "3 not taken" not in host.text() and "relay away" not in host.text()
    finally:
        clean_up(other)


def test_paused_in_the_ini_holds_whatever_resume_says(relay, host):
    host.poller["paused"] = "yes"
    waits = submit(relay, host.site)
    assert host.run("poll", "--once").returncode == 0 and progress(relay, waits) == "not start"
    done = host.run("resume")
    assert done.returncode == 78 and "paused = yes" in done.stderr


def test_outside_its_hours_nothing_is_taken(relay, host):
    hour = time.localtime().tm_hour
    host.poller["hours"] = "%d-%d" % ((hour + 2) % 24, (hour + 3) % 24)
    waits = submit(relay, host.site)
    assert host.run("poll", "--once").returncode == 0 and progress(relay, waits) == "not start"
    host.poller["hours"] = "%d-%d, %d:30-%d" % ((hour + 2) % 24, (hour + 3) % 24, (hour - 1) % 24, (hour + 2) % 24)
    assert host.run("poll", "--once").returncode == 0 and outcome(relay, waits)["status"] == "completed"


@pytest.mark.parametrize("text, yes, no", [
    ("22-6", ["Mon 22:00", "Sun 23:59", "Mon 05:59"], ["Mon 06:00", "Mon 21:59"]), ("8:30-17", ["Wed 08:30"], ["Wed 08:29", "Wed 17:00"]),
    ("Mon-Fri 20-6", ["Fri 20:00", "Sat 05:59"], ["Sat 20:00", "Mon 05:59"]), ("Sat-Sun 0-24, Wed 12-13", ["Sat 00:00", "Sun 23:59", "Wed 12:30"], ["Mon 00:00"]),
    ("fri-mon 0-24", ["Fri 1:00", "Mon 23:00"], ["Thu 23:59", "Tue 00:00"]), ("", ["Tue 03:00"], [])])
def test_hours(text, yes, no):
    spans = remote.hours_of(text)
    for moment in yes + no:
        day, clock = moment.split()
        when = time.struct_time((2026, 11, 1, int(clock.split(":")[0]), int(clock.split(":")[1]), 0, remote.DAYS.index(day.lower()), 1, 0))
        assert remote.within_hours(spans, when) == (moment in yes), moment


@pytest.mark.parametrize("text", ["22-25", "x 1-2", "5-5", "1-2-3", "22", "Mon", "24:30-25", "1:75-3", "22-6,"])
def test_hours_that_are_none(relay, host, text):
    host.poller["hours"] = text
    done = host.run("poll", "--once")
    assert done.returncode == 78 and "hours" in done.stderr and "Mon-Fri 20:30-6:00" in done.stderr


# ---- runs that end

def test_drain_finishes_what_is_here_takes_nothing_new_and_ends_with_0(relay, host):
    host.script("solve", "until [ -e %s/go ]; do sleep 0.1; done; echo x > out.txt" % host.folder)
    process = host.start()
    runs = submit(relay, host.site)
    until(host.runs)
    process.kill()
    process.wait()
    waits = submit(relay, host.site)
    process = host.start("poll", "--drain")
    until(lambda: host.text().count(" polling ") == 2)
    (host.folder / "go").write_text("")
    assert process.wait(30) == 0
    assert outcome(relay, runs)["status"] == "completed" and progress(relay, waits) == "not start" and len(host.runs()) == 1
    assert host.run("poll", "--drain").returncode == 0, "nothing there"


def test_idle_exit_ends_with_0_after_the_last_delivery(relay, host):
    host.script("solve", "sleep 2; echo x > out.txt")
    process = host.start("poll", "--idle-exit", "1.5s")
    accept_id = submit(relay, host.site)
    assert process.wait(60) == 0
    if host.runs():                                    # otherwise this machine slept longer than it waited
        assert outcome(relay, accept_id)["status"] == "completed" and "idle_exit" in host.text()
    host.poller["idle_exit"] = "1s"
    process = host.start()
    assert process.wait(60) == 0
    assert host.run("poll", "--idle-exit", "soon").returncode == 64


# ---- results that wait

def test_outbox_says_what_waits_since_when_and_why_and_resend_sends_it_now(relay, host, tmp_path_factory):
    own = OurWorld(tmp_path_factory.mktemp("relay"))
    try:
        host.poller.update(url=own.url, site="s1")
        host.token.write_text(own.token)
        host.script("solve", "until [ -e %s/go ]; do sleep 0.1; done; echo x > out.txt" % host.folder)
        process = host.start()
        accept_id = submit(own, "s1")
        until(host.runs)
        assert box(host) == {} and host.run("resend", accept_id).returncode == 64
        own.relay.kill()
        (host.folder / "go").write_text("")
        row = until(lambda: [row for row in box(host).values() if row["next"] and row["next"] > time.time() + 7], 60)[0]
        assert (row["id"], row["state"]) == (accept_id, "undelivered") and "Connection refused" in row["why"]
        assert abs(row["since"] - time.time()) < 60
        shown = host.run("outbox").stdout
        assert accept_id in shown and "next try: 20" in shown and "Connection refused" in shown
        process.send_signal(signal.SIGSTOP)            # a relay may need longer to start than until the next try
        own.start()
        done = host.run("resend", accept_id)
        process.send_signal(signal.SIGCONT)
        assert done.returncode == 0 and "now" in done.stdout
        assert outcome(own, accept_id)["status"] == "completed" and len(host.runs()) == 1
        until(lambda: box(host) == {})
        process.terminate()
        process.wait()
    finally:
        own.close()


def test_resend_without_a_poller_delivers_by_itself(relay, host):
    host.script("solve", "sleep 1; echo x > out.txt")
    process = host.start()
    accept_id = submit(relay, host.site)
    until(host.runs)
    process.kill()
    process.wait()
    until(lambda: (host.control(accept_id) / "end").exists())
    assert box(host)[accept_id]["why"] == "no poller runs" and "when a poller runs" in host.run("outbox").stdout
    other = submit(relay, host.site)
    assert host.run("resend", accept_id).returncode == 0
    assert outcome(relay, accept_id)["status"] == "completed" and progress(relay, other) == "not start" and box(host) == {}
    assert host.run("resend", accept_id).returncode == 64 and host.run("resend", "x").returncode == 64 and host.run("resend").returncode == 64


def test_a_result_that_is_refused_takes_no_slot_waits_with_its_reason_and_is_sent_again(tmp_path):
    fake = Fake(order())
    host = Host(tmp_path, fake.url, "s", "t" * 64)
    try:
        fake.no["send-results"] = 400
        done = host.run("poll", "--once")
        assert done.returncode == 75 and ID in done.stderr.splitlines()[-1] and "as told" in done.stderr, done.stderr
        assert box(host)[ID]["why"] == "as told"
        process = host.start()                         # jobs = 1: the next calculation runs all the same
        until(lambda: "it stays here and is tried again" in host.text())
        other = ID.replace("0123", "9999")
        fake.order = order(accept_id=other)
        until(lambda: other in "".join(host.runs()))
        assert box(host)[ID]["next"] > time.time()
        fake.no.clear()
        for name in (ID, other):
            if name in box(host):
                host.run("resend", name)
        until(lambda: box(host) == {})
        assert process.poll() is None and len(host.runs()) == 2
    finally:
        clean_up(host)
        fake.close()


def test_a_result_that_is_over_a_limit_which_the_relay_got_meanwhile_arrives_without_what_is_over_it(make_world, tmp_path):
    world = make_world(tls=False, commands=["solve"]).start()
    host = Host(tmp_path, world.url, suite.SITE, world.token)
    world.client_of_wire, world.client = world.client, lambda token=None: remote.RelayClient(world.url, lambda: world.token)
    try:
        host.script("solve", "until [ -e %s/go ]; do sleep 0.1; done; echo x > out.txt; head -c 5000 /dev/zero > big" % host.folder)
        process = host.start()
        accept_id = submit(world, suite.SITE, outs=["out.txt", "big"])
        until(host.runs)
        world.extra = "[limits]\nmax_file = 1000\n"
        world.write_ini(world.port)
        until(lambda: world.client().learn()[1].get("max_file") == 1000, 60)
        (host.folder / "go").write_text("")
        until(lambda: "max_file" in str(box(host).get(accept_id, {}).get("why")))
        assert host.run("resend", accept_id).returncode == 0
        info = outcome(world, accept_id)
        assert info["files"]["out.txt"] == b"x\n" and info["refused"] == {"big": "limit"} and info["exit_code"] == 0
        process.terminate()
        process.wait()
    finally:
        clean_up(host)


def test_a_result_that_the_relay_does_not_want_any_more_stays_in_the_outbox(make_world, tmp_path):
    world = make_world(tls=False, commands=["solve"], ini="[times]\nlease = 1s\n").start()
    host = Host(tmp_path, world.url, suite.SITE, world.token)
    host.script("solve", "until [ -e %s/go ]; do sleep 0.1; done; echo x > out.txt" % host.folder)
    process, client = host.start(), world.client()
    accept_id = client.register("solve", results=["out.txt"])
    until(host.runs)
    process.kill()
    process.wait()
    until(lambda: "out-of-contact" in world.relay.text())
    client.ok("POST", "rerun", {"v": 2, "accept_id": accept_id, "force": True, "reason": "it is lost"})
    (host.folder / "go").write_text("")
    until(lambda: (host.control(accept_id) / "end").exists())
    assert host.run("poll", "--drain").returncode == 0
    row = box(host)[accept_id]
    assert (row["state"], row["next"]) == ("kept", None) and "resend tries once more" in host.run("outbox").stdout
    done = host.run("resend", accept_id)
    assert done.returncode == 77 and accept_id in done.stderr.splitlines()[-1] and box(host)[accept_id]["state"] == "kept"


# ---- room on the disk

def fill(disk, left=4 << 20):
    """Takes all but `left` bytes of a disk."""
    found = os.statvfs(str(disk))
    with open(str(disk / "filler"), "ab") as out:
        out.write(bytes(max(0, found.f_bavail * found.f_frsize - left)))


def test_with_too_little_room_delivered_directories_go_oldest_first_and_nothing_that_is_needed(relay, tmp_path, disk_of):
    disk = disk_of("100m")
    host = Host(tmp_path, relay.url, next(relay.free), relay.token)
    try:
        host.base = disk / "base"
        host.poller.update(calc_base=str(host.base), keep_free="30M", jobs=2)
        host.script("solve", "head -c 20000000 /dev/zero > large; echo x > out.txt; cat in.txt | grep -q hold && sleep 300; true")
        ids = [submit(relay, host.site, {"in.txt": b"x"}) for turn in range(2)]
        assert host.run("poll", "--once").returncode == 0
        host.start()
        held = submit(relay, host.site, {"in.txt": b"hold"})
        until(lambda: (host.base / held / "large").exists())
        for turn in range(3):                          # each needs the room of an older one
            ids.append(submit(relay, host.site, {"in.txt": b"x"}))
            assert outcome(relay, ids[-1], 60)["status"] == "completed"
        assert (host.base / held / "large").exists() and (host.base / ids[-1]).exists()
        assert not (host.base / ids[0]).exists() and not (host.base / ids[1]).exists()
        assert json.loads(host.run("show", ids[0], "--json").stdout)["state"] == "delivered", "it is still known: it cannot run again"
        fill(disk)                                     # with what is not ours: all that can go goes, and it is not enough
        until(lambda: not any((host.base / one).exists() for one in ids))
        fill(disk)
        until(lambda: "less than keep_free is free" in host.text())
        waits = submit(relay, host.site, {"in.txt": b"x"})
        assert (host.base / held / "large").exists() and progress(relay, waits) == "not start"
        os.unlink(str(disk / "filler"))
        assert outcome(relay, waits, 90)["status"] == "completed"
    finally:
        clean_up(host)


def test_inputs_for_which_the_room_went_while_they_came_are_given_back_and_come_again(tmp_path, disk_of):
    relay, disk = OurWorld(tmp_path / "relay", ini="[times]\nwait = 2s\n"), disk_of("40m")
    host = Host(tmp_path, relay.url, next(relay.free), relay.token)
    try:
        host.base = disk / "base"
        host.poller.update(calc_base=str(host.base), keep_free="1", jobs=2)
        host.script("solve", "cp in.txt out.txt; rm -f big?")
        large = {name: os.urandom(12 << 20) for name in ("big1", "big2")}              # zeros would take no room
        for turn in range(1, 9):                       # until two of them came at the same time: each fits, both do not
            ids = [submit(relay, host.site, dict(large, **{"in.txt": b"%d" % n})) for n in range(2)]
            process = host.start()
            assert [outcome(relay, one, 120)["status"] for one in ids] == ["completed", "completed"]
            assert len(host.runs()) == 2 * turn
            process.terminate()
            process.wait(20)
            if "the claim is gone code=409 why=\"given back: No space left on device" in host.text():
                break
        else:
            pytest.fail("no two of them ever came at the same time: " + host.text())
    finally:
        clean_up(host)
        relay.close()


def least_room(disk, until_then):
    """The fewest bytes that were free on a disk until until_then() was true."""
    least, over = [1 << 60], []

    def look():
        while not over:
            found = os.statvfs(str(disk))
            least[0] = min(least[0], found.f_bavail * found.f_frsize)
            time.sleep(0.001)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    until(until_then, 30)
    over.append(True)
    thread.join()
    return least[0]


@pytest.mark.parametrize("files", [{"f%03d" % n: 100000 for n in range(150)}, {"large": 15000000}], ids=["many small ones", "a large one"])
def test_keep_free_holds_for_what_others_take_while_inputs_come(tmp_path, disk_of, files):
    disk, data = disk_of("40m"), {name: os.urandom(size) for name, size in files.items()}

    def happens(request):
        """The inputs; somebody else fills the disk the moment that they are asked for."""
        if "/input/" not in request.name:
            return None
        if not (disk / "filler").exists():
            fill(disk, (20 << 20) + (5 << 20))
        return 200, b"".join(data.values()), {"Content-Type": "application/octet-stream"}

    fake = fake_relay.Fake(misbehave=happens)
    fake.orders = [{"accept_id": fake_relay.ACCEPT_ID, "claim": "1.abc", "attempt": 1, "lease": 300,
                    "inputs": {"files": {name: fake_relay.entry(one) for name, one in data.items()}, "next": None},
                    "calc-info": {"command": "make", "remote-site": "s", "parameters": "", "result_files": {}, "result_patterns": []}}]
    ini = tmp_path / "poller.ini"
    (tmp_path / "token").write_text("t" * 64)
    (tmp_path / "token").chmod(0o600)
    ini.write_text("[poller]\nsite = s\nurl = %s\ntoken_file = %s/token\ncalc_base = %s/base\nkeep_free = 20M\n[command make]\nmatch = make\nargv = /bin/true\n"
                   % (fake.url, tmp_path, disk))
    poller = suite.Process("mi_system_remote.py", ["poll", "--ini", str(ini)], str(tmp_path))
    try:
        least = least_room(disk, lambda: "given back" in poller.text() or fake.ended or not poller.alive())
        assert not fake.ended and least >= (20 << 20) - (2 << 20), (least, poller.text())
        until(lambda: not [name for name in os.listdir(str(disk / "base")) if name != ".mi"], 20)       # what had come takes no room
        assert not [name for top, folders, names in os.walk(str(disk / "base")) for name in names if name.startswith("part")]
    finally:
        poller.stop()
        fake.stop()


def test_inputs_that_fit_the_disk_but_not_beside_keep_free_wait_and_it_is_told(make_world, disk_of, tmp_path):
    disk = disk_of("60m")
    world = make_world(tls=False, commands=["solve"], ini="[times]\nwait = 1s\n").start()
    folder, ini = world.poller({"solve": "match = solve\nargv = /bin/true\n"}, start=False, ini="keep_free = 30M\n")
    with open(ini) as text:
        changed = text.read().replace(os.path.join(folder, "base"), str(disk / "base"))
    with open(ini, "w") as out:
        out.write(changed)
    poller = suite.Process("mi_system_remote.py", ["poll", "--ini", ini], folder)
    world.pollers.append(poller)
    (tmp_path / "big").write_bytes(os.urandom(40 << 20))
    accept_id = world.workflow("submit", suite.SITE, "solve", "--in", str(tmp_path / "big")).stdout.strip()
    until(lambda: re.search(r"its inputs need 4\d MB, the external computer's disk has room for [23]\d", world.workflow("status", accept_id).stdout), 30)
    assert "calc-request site" not in poller.text()
    bigger(disk, "100m")
    assert world.workflow("wait", accept_id).returncode == 0, poller.text()


def told_everywhere(world, accept_id, said):
    """Do status, the operator's show, and what a poller's words print say why it waits?"""
    until(lambda: said in world.workflow("status", accept_id).stdout, 30, "status")
    assert said in json.loads(world.workflow("status", accept_id, "--json").stdout)["what"]
    assert any(line.startswith("waits ") and said in line for line in suite.run("mi_dicomapi.py", "show", accept_id, "--ini", world.ini).stdout.splitlines())
    assert said in suite.run("mi_dicomapi.py", "list", "--ini", world.ini).stdout


def bigger(disk, size):
    """The file system of disk_of() gets more room."""
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    subprocess.run(as_root + ["mount", "-o", "remount,size=" + size, str(disk)], check=True)


def test_a_result_that_is_larger_than_the_relays_disk_waits_and_everybody_is_told_why(make_world, disk_of):
    disk = disk_of("24m")
    world = make_world(tls=False, commands=["solve"], ini="[Server]\nstate_dir = %s\n" % (disk / "state"))
    world.state = str(disk / "state")
    world.start()
    poller = world.poller({"solve": "match = solve\nargv =\n    /bin/sh\n    -c\n    head -c 40000000 /dev/zero >big"})
    accept_id = world.workflow("submit", suite.SITE, "solve", "--out", "big").stdout.strip()
    told_everywhere(world, accept_id, "the relay's disk has no room for 40000000 bytes")
    ini = os.path.join(world.folder, "poller", "poller.ini")
    assert "the relay's disk has no room" in suite.run("mi_system_remote.py", "outbox", "--ini", ini).stdout
    bigger(disk, "200m")
    poller.stop()                                      # its pauses may have grown long
    world.poller({"solve": "match = solve\nargv =\n    /bin/true"})
    done = world.workflow("wait", accept_id)
    assert done.returncode == 0 and os.path.getsize(os.path.join(world.folder, "wf", "big")) == 40000000, done.stdout
    assert not world.rows("SELECT 1 FROM calculations WHERE waits != ''")


def test_an_input_that_is_larger_than_the_external_computers_disk_waits_and_everybody_is_told_why(make_world, disk_of, tmp_path):
    disk = disk_of("16m")
    world = make_world(tls=False, commands=["solve"], ini="[times]\nwait = 1s\n").start()
    allowed = {"solve": "match = solve\nargv =\n    /bin/sh\n    -c\n    wc -c <big >out"}
    folder, ini = world.poller(allowed, start=False)
    with open(ini) as text:
        changed = text.read().replace(os.path.join(folder, "base"), str(disk / "base"))
    with open(ini, "w") as out:
        out.write(changed)
    world.pollers.append(suite.Process("mi_system_remote.py", ["poll", "--ini", ini], folder))
    (tmp_path / "big").write_bytes(bytes(30000000))
    accept_id = world.workflow("submit", suite.SITE, "solve", "--in", str(tmp_path / "big"), "--out", "out").stdout.strip()
    told_everywhere(world, accept_id, "its inputs need 30 MB, the external computer's disk has room for 1")
    suite.wait_until(lambda: any(accept_id in line and "more room" in line for line in suite.run("mi_system_remote.py", "list", "--ini", ini).stdout.splitlines()))
    bigger(disk, "100m")
    done = world.workflow("wait", accept_id)
    assert done.returncode == 0 and "30000000" in open(os.path.join(world.folder, "wf", "out")).read(), done.stdout


# ---- and what it does not wait for

def test_a_clock_that_is_set_makes_no_command_lost(tmp_path, monkeypatch):
    control, real = os.fsencode(str(tmp_path)), time.time
    remote.prepare_control(control)
    os.rename(control + b"/ready", control + b"/start")                  # the wrapper is about to fill it in
    monkeypatch.setattr(remote.time, "time", lambda: real() + 3600)
    until_then = time.monotonic() + 0.5
    assert remote.wait_end(control, lambda: time.monotonic() > until_then) == ("starting", None)
    monkeypatch.setattr(remote, "ORPHAN_GRACE", 0.5)
    assert remote.wait_end(control, lambda: False) == ("lost", "end unknown")


def test_a_command_that_died_without_an_end_is_lost_also_for_who_looks_again_and_again_for_a_moment(tmp_path, monkeypatch):
    control, work = os.fsencode(str(tmp_path / "c")), os.fsencode(str(tmp_path))
    os.mkdir(control)
    remote.prepare_control(control)
    wrapper = remote.start_wrapper(control, work, ["/bin/sleep", "60"], {"MI_RUN": "a.1"})
    suite.wait_until(lambda: remote.command_state(control, time.time())[0] == "running")
    for pid in (wrapper.pid, remote.read_note(control + b"/child").pid):       # the wrapper first: it notes no end
        os.kill(pid, 9)
    wrapper.wait()
    suite.wait_until(lambda: remote.command_state(control, time.time())[0] != "running")
    monkeypatch.setattr(remote, "ORPHAN_GRACE", 1)
    assert remote.wait_end(control, lambda: True) == ("starting", None)
    states = []                                        # as after a cancel, and for `pre` and `post` after a restart
    while len(states) < 100 and ("lost", "end unknown") not in states:
        until_then = time.monotonic() + 0.05
        states.append(remote.wait_end(control, lambda: time.monotonic() > until_then))
    assert states[0] == ("starting", None) and states[-1] == ("lost", "end unknown")
