"""What waits for a person leaves when he says so and not before; nothing leaves twice, nothing is released unasked, whoever dies wherever."""
import json
import os
import re
import subprocess
import time

import pytest

import suite
from ssh_door import Far
from suite import LOGS, PYTHON, SITE, run, wait_until

# what the command leaves: a text in which something hides, and bytes
WORK = ("import os\nopen('life.txt','w',encoding='utf-8').write('cycles 12\\nred \\x1b[31m\\u202e\\u200b end  \\n')\n"
        "open('b.bin','wb').write(bytes(range(256)))\nprint('log of SECRET-42')\n")


class Site:
    """A relay and its poller's ini, whose command's results are held."""

    def __init__(self, world, hold="hold = yes", outbound="", name="poller"):
        self.world = world
        (folder, self.ini) = world.poller({"solve": "match = solve\nargv = %s\n  -c\n  exec(open('%s/%s/work.py', encoding='utf-8').read())\n%s" % (
            PYTHON, world.folder, name, hold)},
                                          name=name, start=False)
        with open(self.ini, "a") as out:
            out.write("[outbound]\n" + outbound)
        self.work = os.path.join(folder, "work.py")
        with open(self.work, "w", encoding="utf-8") as out:
            out.write(WORK)
        self.folder, self.base, self.poller = folder, os.path.join(folder, "base"), None

    def wf(self, *words, **how):
        """The workflow side, whose results go into a directory of this site's own."""
        return self.world.workflow(*words, cwd=os.path.join(self.folder, "wf"), **how)

    def start(self, env=None, words=("poll",)):
        self.poller = suite.Process("mi_system_remote.py", list(words) + ["--ini", self.ini], self.folder, env=env)
        self.world.pollers.append(self.poller)
        return self

    def word(self, *words, code=0, env=None):
        """One of the owner's words; what it prints."""
        done = run("mi_system_remote.py", *words, "--ini", self.ini, env=env)
        assert done.returncode == code and "Traceback" not in done.stderr, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def submit(self, *words):
        done = self.wf("submit", SITE, "solve", "--out", "life.txt", "b.bin", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def held(self, accept_id):
        """Waits until it is held here, and the relay knows."""
        wait_until(lambda: os.path.exists(self.path(accept_id, "note")), what="held: " + self.poller.text())
        wait_until(lambda: self.world.rows("SELECT waits FROM calculations WHERE accept_id = ?", accept_id)[0]["waits"].startswith("held"), what="told")

    def path(self, accept_id, name):
        return os.path.join(self.base, ".mi", accept_id, "held", name)

    def journal(self, accept_id):
        with open(os.path.join(self.base, ".mi", accept_id, "journal")) as text:
            return [json.loads(line)["what"] for line in text]

    def left(self, accept_id):
        """Is anything of the result at the relay, or told to it?"""
        row, files, spool = self.world.picture(accept_id)
        return [one["name"] for one in files if one["kind"] == "result"] + [name for name, size in spool if name.startswith("result") or "live" in name]


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    """A relay for all: each test has a poller of its own."""
    made = suite.World(tmp_path_factory.mktemp("world"), commands=["solve"]).start()
    yield made
    made.close()


@pytest.fixture
def make_site(relay, request):
    """A function that makes a Site (keywords as its own), whose poller ends with the test: what waits, waits in a calc_base of its own."""
    made = []

    def make(**keywords):
        made.append(Site(relay, name="poller%d" % (10 * os.getpid() + len(relay.pollers) + len(made)), **keywords))
        return made[-1]

    yield make
    for site in made:
        if site.poller:
            site.poller.kill()


@pytest.fixture
def site(make_site):
    return make_site()


def test_a_result_waits_for_a_person_and_everybody_sees_why_until_he_has_looked_and_said_release(site):
    accept_id = site.start().submit()
    site.held(accept_id)
    for text, lang in (("its result is held for a person at the external computer", "C"), ("公開承認を待っています", "ja_JP.UTF-8")):
        done = site.wf("explain", accept_id, env=suite.clean_env(LANG=lang))
        assert text in done.stdout and "mi_system_remote.py show " + accept_id in done.stdout, done.stdout
    assert json.loads(site.wf("explain", accept_id, "--json").stdout)["code"] == "held"
    assert "- held" in site.wf("list").stdout and "held for a person at the external computer since 20" in site.wf("status", accept_id).stdout
    assert "- held" in run("mi_dicomapi.py", "list", "--ini", site.world.ini).stdout
    assert not site.left(accept_id) and "log of" not in site.wf("output", accept_id).stdout
    assert "is held for a person on this host" in site.word("explain", accept_id) and "held" in site.word("list")
    assert accept_id + "  held for a person since 20" in site.word("outbox") and "4 files" in site.word("outbox")
    assert "nobody has looked at it" in site.word("release", accept_id, code=77)
    seen = site.word("show", accept_id)
    assert "red \\x1b[31m\\u202e\\u200b end\\x20\\x20" in seen and "\x1b" not in seen and "\u202e" not in seen and "life.txt" in seen
    assert "held: hold" in seen and "256 bytes, binary" in seen and "nothing of this command was released before" in seen
    assert "a calculation does not decide" in site.word("release", accept_id, code=77, env=suite.clean_env(MI_RUN="x"))
    assert not site.left(accept_id)
    site.word("release", accept_id[:8])
    assert "was released" in site.word("release", accept_id, code=64) and "was released" in site.word("refuse", accept_id, "--reason", "x", code=64)
    done = site.wf("wait", accept_id)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = os.path.join(site.folder, "wf")
    assert open(os.path.join(folder, "b.bin"), "rb").read() == bytes(range(256)) and "SECRET-42" in open(os.path.join(folder, LOGS[0])).read()
    wait_until(lambda: "delivered" in site.word("list"), what="delivered")
    assert not [name for name in os.listdir(os.path.dirname(site.path(accept_id, ""))) if name.isdigit()], "copies"
    # the next one is compared with it
    with open(site.work, "a") as out:
        out.write("open('life.txt','a').write('cycles 13\\n')\n")
    other = site.submit()
    site.held(other)
    seen = site.word("show", other)
    assert "released last of this command: " + accept_id in seen and "+ cycles 13" in seen and "the same as then" in seen


def test_what_a_person_refuses_stays_and_neither_his_reason_nor_a_name_that_was_not_asked_for_leaves(site):
    accept_id = site.start().submit("--out", "*")
    site.held(accept_id)
    assert "--reason" in site.word("refuse", accept_id, code=64)
    site.word("refuse", accept_id, "--reason", "holds the curve")
    done = site.wf("wait", accept_id)
    assert done.returncode == 65 and "refused" in done.stdout + done.stderr, done.stdout + done.stderr
    row, files, spool = site.world.picture(accept_id)
    assert "curve" not in json.dumps(row) and not [one for one in files if one["kind"] == "result"], (row, files)
    assert "curve" in open(site.path(accept_id, "decided")).read() and os.path.exists(os.path.join(site.base, accept_id, "life.txt"))


def test_bytes_that_have_changed_since_they_were_held_leave_by_no_word_and_are_held_anew(site):
    accept_id = site.start().submit()
    site.held(accept_id)
    first = json.load(open(site.path(accept_id, "note")))
    site.word("show", accept_id)
    with open(site.path(accept_id, "000000"), "r+b") as out:
        out.write(b"X")
    assert "it has changed since it was held" in site.word("release", accept_id, code=65)
    wait_until(lambda: os.path.exists(site.path(accept_id, "note")), what="held anew")
    assert not site.left(accept_id)
    assert "nobody has looked" in site.word("release", accept_id, code=77)
    # a word about another manifest does not count
    with open(site.path(accept_id, "decided"), "w") as out:
        json.dump({"v": 1, "what": "released", "manifest": "0" * 64, "run": first["run"], "t": 1, "by": "x", "reason": ""}, out)
    time.sleep(1.5)
    assert not site.left(accept_id) and "held" in site.word("list")
    # bytes that change after the word, before they leave, do not leave either
    site.poller.kill()
    site.word("release", accept_id, "--unseen")
    with open(site.path(accept_id, "000001"), "r+b") as out:
        out.write(b"X")
    site.start()
    wait_until(lambda: os.path.exists(site.path(accept_id, "note")) and not os.path.exists(site.path(accept_id, "decided")), what="held anew")
    assert not [name for name in site.left(accept_id) if name.endswith((".txt", ".bin"))] or site.world.state_of(accept_id) != "got"
    site.word("show", accept_id)
    site.word("release", accept_id)
    assert site.wf("wait", accept_id).returncode == 0


def test_who_tries_rules_with_dry_run_does_not_let_out_what_is_to_be_held(make_site):
    site = make_site(outbound="deny_content = SECRET\ndry_run = yes\n")
    accept_id = site.start().submit()
    wait_until(lambda: site.left(accept_id) or os.path.exists(site.path(accept_id, "note")))
    assert not site.left(accept_id)
    site.held(accept_id)
    site.word("release", accept_id, "--unseen")
    assert site.wf("wait", accept_id).returncode == 0


def test_what_a_person_is_not_shown_is_said_and_no_line_hides_as_a_head_of_the_difference(tmp_path, capsys):
    gate, seen = suite.module("mi_system_remote.py"), {}
    rules = gate.default_values(gate.gate_keys()["outbound"])
    for name, data in (("then", b"-- gone\nsame\n"), ("now", b"++ SECRET\nsame\n"), ("long", b"x\n" * (gate.VIEW_BYTES // 2) + b"SECRET\n"),
                       ("many", b"".join(b"%d\n" % number for number in range(100)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(data)
        found = gate.Collector(rules, lambda name, why, aloud: None)
        found.take_named(gate.ResultTree(os.fsencode(str(tmp_path / name))), ["a.txt"])
        seen[name], = found.found
    earlier = gate.Earlier(None, None)
    earlier.files = {"a.txt": seen["then"]}
    assert [line for line in gate.view_of(seen["now"], "", earlier, True)["difference"] if line[0] != "@"] == ["- -- gone", "+ ++ SECRET"]
    assert gate.view_of(seen["many"], "", earlier, False)["difference"][-1] == "..." and gate.view_of(seen["many"], "", earlier, True)["difference"][-1] == "+ 99"
    row = dict(id="i", since=0, until=None, command="c", files=1, bytes=1, manifest="m", earlier="", folders=[], verdicts={})
    gate.print_view(row, [gate.view_of(seen["long"], "", earlier, True)])
    assert "7 bytes more: look at the file itself" in capsys.readouterr().out


def test_a_word_is_about_what_was_looked_at_when_it_was_begun(tmp_path, monkeypatch):
    gate, control = suite.module("mi_system_remote.py"), os.fsencode(str(tmp_path / ".mi" / "run"))
    os.makedirs(control)
    (tmp_path / "run").mkdir()

    def hold(data):
        (tmp_path / "run" / "a.txt").write_text(data)
        found = gate.Collector(gate.default_values(gate.gate_keys()["outbound"]), lambda name, why, aloud: None)
        found.take_named(gate.ResultTree(os.fsencode(str(tmp_path / "run"))), ["a.txt"])
        gate.Hold(control).make("i", "run", "c", found)
        return True

    hold("harmless")
    gate.Hold(control).note_shown(gate.Hold(control).note()["manifest"], "me")
    monkeypatch.setattr(gate.Hold, "is_whole", lambda self: hold("SECRET"))          # meanwhile somebody else's `show` finds it changed
    with pytest.raises(gate.Stop) as stop:
        gate.release("run", control, 0, False)
    assert stop.value.code == 75 and gate.Hold(control).decision(0) is None
    gate.refuse("run", control, 0, "why")
    assert gate.Hold(control).decision(0)["what"] == "refused"


def test_after_hold_for_it_is_refused(make_site):
    site = make_site(outbound="hold_for = 2s\n")
    accept_id = site.start().submit()
    done = site.wf("wait", accept_id)
    assert done.returncode == 65 and json.load(open(site.path(accept_id, "decided")))["by"] == "hold_for", done.stdout + done.stderr
    assert "was refused (hold_for" in site.word("release", accept_id, code=64)


def test_no_poller_no_relay_and_no_module_need_be_there_when_the_word_is_said(site):
    accept_id = site.start().submit()
    site.held(accept_id)
    site.world.relay.kill()
    site.world.start()
    wait_until(lambda: "held" in site.wf("explain", accept_id, "--json").stdout, what="known after a restart")
    assert site.poller.stop() == 0
    assert "as soon as a poller runs" in site.word("release", accept_id, "--unseen")
    time.sleep(0.5)
    assert not site.left(accept_id)
    done = run("mi_system_remote.py", "poll", "--once", "--ini", site.ini)
    assert done.returncode == 0, done.stderr
    assert site.wf("wait", accept_id).returncode == 0


def test_a_deadline_that_is_over_loses_nothing_that_is_held(site):
    site.start()
    done = site.wf("run", SITE, "solve", "--out", "life.txt", "--deadline", "4s")
    accept_id = re.search(r"[0-9a-f-]{36}", done.stdout + done.stderr).group()
    assert done.returncode == 75 and "held for a person at the external computer, and comes when it is released" in done.stdout + done.stderr
    site.word("release", accept_id, "--unseen")
    assert site.wf("wait", accept_id).returncode == 0


def left_once(site, accept_id, names):
    """What was held has left as the word said, once, of a command that ran once."""
    done = site.wf("wait", accept_id)
    left = {one["name"] for one in site.world.picture(accept_id)[1] if one["kind"] == "result"}
    assert left == names and done.returncode == (0 if names else 65), (left, done.stdout + done.stderr)
    assert site.journal(accept_id).count("starting") == 1
    steps = site.world.rows("SELECT step FROM events JOIN calculations ON calc = seq WHERE accept_id = ?", accept_id)
    assert [step["step"] for step in steps].count("end-send") == 1


def test_a_poller_that_dies_while_it_holds_or_sends_lets_nothing_out_unasked_and_all_of_it_once(site):
    for point in ("copy held", "held made", "held placed"):
        accept_id = site.start(env=suite.clean_env(MI_FAULT=point)).submit("--request-id", point)
        wait_until(lambda: not site.poller.alive(), what=point)
        assert not site.left(accept_id), point
        sent = {"held placed": "results told", "held made": "manifest sent"}.get(point, "")
        site.start(env=suite.clean_env(MI_FAULT=sent))
        site.held(accept_id)
        assert not site.left(accept_id), point
        site.word("release", accept_id, "--unseen")
        if sent:
            wait_until(lambda: not site.poller.alive(), what=sent)
            site.start()
        left_once(site, accept_id, {"life.txt", "b.bin"} | set(LOGS))
        site.poller.kill()


def test_a_word_that_dies_is_said_or_not_and_counts_once(site):
    points = "released unsaid", "released said", "refused said", "held dropped"
    ids = [site.submit("--request-id", point) for point in points]
    site.start()
    words = [["refuse", one, "--reason", "x"] if "refused" in point else ["release", one, "--unseen"] for one, point in zip(ids, points)]
    for one, word, point in zip(ids, words, points):
        site.held(one)
        if point == "held dropped":
            with open(site.path(one, "000000"), "r+b") as out:
                out.write(b"X")
        site.word(*word, code=-9, env=suite.clean_env(MI_FAULT=point))
    time.sleep(1.5)
    assert site.word("outbox").count("held for a person since") == 2
    for one, word, point in zip(ids, words, points):
        if not point.endswith(" said"):
            wait_until(lambda: os.path.exists(site.path(one, "note")), what=point)
            assert not site.left(one), point
            site.word(*word)
        left_once(site, one, set() if "refused" in point else {"life.txt", "b.bin"} | set(LOGS))


def test_a_note_that_is_broken_lets_nothing_out_and_ends_no_poller(site):
    accept_id = site.start().submit()
    site.held(accept_id)

    def breaks(name, text):
        with open(site.path(accept_id, name), "w") as out:
            out.write(text)

    def is_held():
        try:
            return json.load(open(site.path(accept_id, "note")))["manifest"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    for text in ("", "[1]", '{"since": 1}'):
        breaks("note", text)
        wait_until(is_held, what="held anew")
    for text in ("", "{}", '{"what": "released"}'):
        breaks("decided", text)
    assert site.poller.alive() and "held for a person since" in site.word("outbox")
    breaks("files", "{}")
    site.word("release", accept_id, "--unseen", code=65)
    wait_until(is_held, what="held anew")
    assert not site.left(accept_id)
    site.word("release", accept_id, "--unseen")
    assert site.wf("wait", accept_id).returncode == 0


def test_without_room_for_copies_it_is_held_without_and_judged_again_at_the_word(make_site, disk_of):
    disk, site = disk_of("8m"), make_site()
    with open(site.ini, encoding="utf-8") as text:
        whole = text.read().replace("calc_base = " + site.base, "calc_base = %s/base" % disk)
    with open(site.ini, "w", encoding="utf-8") as out:
        out.write(whole)
    site.base = "%s/base" % disk
    with open(site.work, "a") as out:
        out.write("open('b.bin','wb').write(os.urandom(5 << 20))\n")
    accept_id = site.start().submit()
    site.held(accept_id)
    assert json.load(open(site.path(accept_id, "note")))["copy"] is False and "000000" not in os.listdir(site.path(accept_id, ""))
    site.word("show", accept_id)
    with open(os.path.join(site.base, accept_id, "b.bin"), "r+b") as out:
        out.write(b"other")
    assert "changed" in site.word("release", accept_id, code=65)
    wait_until(lambda: os.path.exists(site.path(accept_id, "note")), what="held anew")
    site.word("release", accept_id, "--unseen")
    assert site.wf("wait", accept_id).returncode == 0


def guard(far, *words, code=0, point="", **env):
    """One of the owner's words on the external computer; what it prints."""
    env = dict({"PATH": os.environ["PATH"], "HOME": far.dir, "LANG": "C"}, **env)
    env.update({"MI_FAULT": point} if point else {})
    done = subprocess.run(suite.started_as([PYTHON, "-I", "-S", far.script, "guard", "--ini", far.path("ini")] + list(words), env), env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=60)
    text = done.stdout.decode("utf-8")
    assert done.returncode == code and "Traceback" not in text, (words, done.returncode, text)
    return text


HELD = "[outbound]\nhold = yes\n"


def test_the_guard_serves_nothing_that_is_held_by_whatever_verb_and_the_wire_has_no_word_for_it(tmp_path):
    far = Far(tmp_path, HELD)
    ident = far.fresh()
    with far.open(ident) as one:
        one.put("a", b"input")
        told, live = one.run()
        assert told["state"] == "ended" and not live
        files, folders, verdicts = one.results()
        assert (files, folders, set(verdicts)) == ({}, [], {"held"}) and not verdicts["held"]["names"]
        assert one.ask("get", names=["r.txt", "remote_program_exec.log"])[0][0] == {"verdict": "missing"}
        assert "sums" not in one.ask("fetched", but=[])[0][0] and one.ask("state")[0][0]["state"] == "ended"
        since = one.ask("state")[0][0]["held"]
        assert abs(since - time.time()) < 100
        told = one.ask("clean", discard=True)[0][0]
        assert told["left"] == ["its results are held for a person"] and told["state"] == "ended"
        for verb in ("release", "show", "outbox", "refuse"):
            assert one.ask(verb)[0][0]["no"] == "refused"
    assert "only" in guard(far, "release", ident, code=77, SSH_ORIGINAL_COMMAND="")
    assert ident in guard(far, "outbox") and "nobody has looked" in guard(far, "release", ident, code=77)
    seen = guard(far, "show", ident)
    assert "r.txt" in seen and "SECRET-42" in seen
    assert far.get(ident, "r.txt") is None
    guard(far, "release", ident)
    assert far.get(ident, "r.txt") == b"result\n" and "released" in open(far.path("base", ".mi", "guard.log")).read()
    with open(far.path("base", ".mi", ident, "held", "000000"), "r+b") as out:
        name = json.load(open(far.path("base", ".mi", ident, "held", "files")))["files"][0][0]
        out.write(b"X")
    assert far.get(ident, name) is None
    assert ident in guard(far, "outbox"), "held anew"


def test_the_guard_keeps_what_was_refused_and_what_nobody_has_decided_in_time(tmp_path):
    far = Far(tmp_path, HELD + "hold_for = 1h\n")
    ident, other = far.ended(), far.ended()
    assert guard(far, "outbox").count("held for a person") == 2, "before any runner has asked for results"
    guard(far, "refuse", ident[:-1], "--reason", "the curve", code=64)           # of two
    guard(far, "refuse", ident, "--reason", "the curve")
    with far.open(ident) as one:
        files, folders, verdicts = one.results()
        assert not files and set(verdicts) == {"refused"} and "curve" not in json.dumps(verdicts)
    path = far.path("base", ".mi", other, "held", "note")
    note = json.load(open(path))
    with open(path, "w") as out:
        json.dump(dict(note, since=note["since"] - 3601), out)
    with far.open(other) as one:
        assert set(one.results()[2]) == {"refused"}
    assert "was refused (hold_for" in guard(far, "release", other, code=64)


@pytest.mark.parametrize("point", ["released unsaid", "released said"])
def test_a_word_at_the_guard_that_dies_is_said_or_not(tmp_path, point):
    far = Far(tmp_path, HELD)
    ident = far.ended()
    guard(far, "outbox")
    guard(far, "release", ident, "--unseen", code=-9, point=point)
    assert far.get(ident, "r.txt") == (b"result\n" if point == "released said" else None)


def test_the_runner_says_that_its_results_are_held_and_resume_fetches_them_later(tmp_path):
    import ssh_lab
    lab = ssh_lab.Lab()
    try:
        lab.guard("[command work]\nargv = /bin/sh\n  -c\n  echo result >r.txt; echo log\nmatch = work\nhold = yes\n", python=PYTHON)
        lab.start()

        def runner(*words):
            done = subprocess.run([PYTHON, ssh_lab.SCRIPT, "--ini", lab.path("ini")] + list(words), cwd=str(tmp_path), env=lab.env(), stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
            return done.returncode, done.stdout.decode()
        code, out = runner("run", "guarded", "work")
        assert code == 75 and "held for a person at the external computer since 20" in out and os.listdir(str(tmp_path)) == [], out
        ident = re.search(r"[0-9a-f-]{36}", out).group()
        assert "held for a person since" in runner("list", "guarded")[1] and runner("resume", ident)[0] == 75
        subprocess.check_call([PYTHON, lab.path("guard", "execute_remote_command.py"), "guard", "release", ident, "--unseen"], env=lab.env())
        code, out = runner("resume", ident)
        assert code == 0 and (tmp_path / "r.txt").read_text() == "result\n" and "log" in (tmp_path / "remote_program_exec.log").read_text(), out
    finally:
        lab.close()



def test_a_fielded_relay_hears_nothing_of_a_result_before_the_word(tmp_path):
    import test_fielded_clients
    site = test_fielded_clients.Lab(tmp_path)
    try:
        site.write_ini("[outbound]\nhold = yes")
        site.poller()
        module = site.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
        words = ["--ini", site.ini]
        wait_until(lambda: "held for a person" in run("mi_system_remote.py", "outbox", *words).stdout, what="held")
        assert site.calc().progress == "running" and not site.calc().results
        accept_id = run("mi_system_remote.py", "outbox", *words).stdout[:36]
        assert run("mi_system_remote.py", "release", accept_id, "--unseen", *words).returncode == 0
        assert module.popen.wait(60) == 0, module.text()
    finally:
        site.close()


def test_what_a_rule_about_contents_holds_is_shown_with_its_rule_and_when_refused_the_rest_leaves(make_site):
    site = make_site(hold="", outbound="deny_content = TOP-SECRET\nunwrap = zip\n")
    with open(site.work, "a") as out:
        out.write("import gzip\nopen('b.bin','wb').write(gzip.compress(bytes(range(256))))\n")
    accept_id = site.start().submit()
    site.held(accept_id)
    seen = site.word("show", accept_id)
    assert seen.count("held: ") == 1 and re.search(r"b\.bin  \d+ bytes, gzip .*\n  held: .*gzip", seen), seen
    site.word("refuse", accept_id, "--reason", "x")
    done = site.wf("wait", accept_id)
    assert done.returncode == 65 and "b.bin" in done.stdout + done.stderr
    assert {one["name"] for one in site.world.picture(accept_id)[1] if one["kind"] == "result"} == {"life.txt"} | set(LOGS)


def a_word_about_something_else(far):
    """Does a result leave by a word about another manifest?"""
    ident = far.ended()
    guard(far, "outbox")
    with open(far.path("base", ".mi", ident, "held", "decided"), "w") as out:
        json.dump({"v": 1, "what": "released", "manifest": "0" * 64, "run": ident + ".1", "t": 1, "by": "x", "reason": ""}, out)
    return far.get(ident, "r.txt") is not None


def no_word(far):
    """Does it leave without one, or while the command runs?"""
    ident = far.fresh()
    with far.open(ident) as one:
        one.put("a", b"input")
        live = one.run()[1]
    return live or far.get(ident, "r.txt") is not None


@pytest.mark.parametrize("attack, old, new", [
    (a_word_about_something_else, 'word if word and word.get("manifest") == note["manifest"] else None', "word"),
    (no_word, 'found.hold_all = "hold" in self.kinds', "found.hold_all = False"), (no_word, 'return found | {"hold"} if command["hold"] else found', "return found"),
    (no_word, 'if "hold" in kinds:\n        return "hold"', "if 0:\n        pass")], ids=["manifest", "all", "kinds", "live"])
def test_without_its_line_what_is_held_gets_out(tmp_path, attack, old, new):
    if old.startswith("word"):
        assert not attack(Far(tmp_path / "real", HELD)) and not no_word(Far(tmp_path / "too", HELD))
    assert attack(Far(tmp_path / "mutant", HELD, [(old, new)]))
