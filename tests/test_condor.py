"""Real HTCondor, with --long: the poller runs in a Debian tree as an ordinary user, the SSH runner reaches it through a real sshd."""
import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

import condor_lab
import ssh_lab
import suite
from suite import wait_until as until
from test_poller import OUT, Host, OurWorld, check_odd_words, clean_up, outcome, submit


@pytest.fixture(scope="module")
def condor(request):
    if not request.config.getoption("--long"):
        pytest.skip("--long")
    suite.needs("debootstrap")
    if os.geteuid() != 0:
        pytest.skip("needs root itself: chroot, and a mount namespace")
    made = condor_lab.Condor()
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture(scope="module")
def relay(condor, tmp_path_factory):
    made = OurWorld(tmp_path_factory.mktemp("relay"))
    yield made
    made.close()


@pytest.fixture
def host(relay, condor):
    """An external computer: the tree, where the ordinary user runs the poller of the tree's own Python."""
    site = next(relay.free)
    folder = pathlib.Path(condor.path("user", site))
    folder.mkdir()
    made = Host(folder, relay.url, site, relay.token)
    for path in (folder, made.token):
        os.chown(str(path), *condor.ids[condor_lab.USER])
    made.program = condor.inside() + ["/usr/bin/python3", condor_lab.SCRIPTS + "/mi_system_remote.py"]
    made.sections["command solve"].update({"batch": "htcondor", "batch_poll": "1s", "batch_options": "request_memory = 20"})
    made.environment = dict(condor.env, HOME="/home/" + condor_lab.USER)
    start, run = made.start, made.run
    made.start = lambda *words, env=None: start(*words, env=dict(made.environment, **(env or {})))
    made.run = lambda *words: run(*words, env=made.environment)
    yield made
    clean_up(made)
    assert "Traceback" not in made.text() and "bug=" not in made.text()


def live(host, accept_id):
    """What the poller shows of a calculation."""
    return json.loads(host.run("show", accept_id, "--json").stdout or "{}").get("what", "")


def words_of(info):
    return info["status"], info["exit_code"], info["reason"]


def test_a_calculation_goes_through_htcondor_with_odd_arguments_and_its_environment(relay, host):
    check_odd_words(relay, host, "$(id -un)", condor_lab.USER, 60)


@pytest.mark.parametrize("code", [3, 143])
def test_the_exit_code_of_a_job_is_the_commands(relay, host, code):
    host.script("solve", "exit %d" % code)
    host.start()
    assert words_of(outcome(relay, submit(relay, host.site), 90)) == ("abnormal", code, "exit code %d" % code)


def test_a_job_that_fits_nowhere_shows_why_and_one_that_runs_its_node_until_the_workflow_side_cancels(relay, host, condor):
    host.poller["jobs"] = 2
    host.sections["command solve"]["batch_changeable"] = "\n  memory=20 request_memory={} [0-9]+"
    host.script("solve", "echo begun; exec sleep 600")
    host.start()
    accept_ids = [submit(relay, host.site, parameters=words) for words in ("", "batch.memory=9000000")]
    until(lambda: live(host, accept_ids[0]) == "running on " + os.uname().nodename, 60)
    until(lambda: live(host, accept_ids[1]) == "queued (idle: no match found)", 60)
    until(lambda: relay.client().ask("GET", "calc-progress", {"v": 2, "accept_id": accept_ids[1]})["what"] == "queued (idle: no match found)", 30)
    for accept_id in accept_ids:
        relay.client().ask("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})
    infos = [outcome(relay, accept_id, 90) for accept_id in accept_ids]
    assert all(info["status"] == "abnormal" and info["reason"].startswith("cancelled") for info in infos), infos
    assert infos[0]["files"][OUT] == b"begun\n" and host.runs() == [accept_ids[0] + ".1"]
    until(lambda: not any(condor.number(accept_id + ".1") for accept_id in accept_ids), 30)


@pytest.mark.parametrize("idle", [False, True], ids=["running", "idle"])
def test_the_admin_removes_a_job(relay, host, condor, idle):
    host.sections["command solve"]["batch_options"] = "requirements = False" if idle else "request_memory = 20"
    host.script("solve", "echo begun; exec sleep 600")
    host.start()
    accept_id = submit(relay, host.site)
    until(lambda: condor.number(accept_id + ".1") if idle else host.runs(), 60)
    condor.call("condor_rm", "-reason", "the disk is full", condor.number(accept_id + ".1"))
    info = outcome(relay, accept_id, 90)
    assert info["status"] == "abnormal" and "removed: the disk is full" in info["reason"], info
    assert info["files"][OUT] == (b"" if idle else b"begun\n")


def test_a_job_held_before_it_runs_waits_for_its_release_and_shows_why(relay, host, condor):
    host.sections["command solve"]["batch_options"] = "hold = True"
    host.start()
    accept_id = submit(relay, host.site)
    until(lambda: live(host, accept_id).startswith("queued (held: submitted on hold"), 60)
    condor.call("condor_release", condor.number(accept_id + ".1"))
    assert outcome(relay, accept_id, 60)["status"] == "completed" and len(host.runs()) == 1


@pytest.mark.parametrize("deaf", [False, True], ids=["ends", "is deaf"])
def test_a_job_put_on_hold_while_it_runs_ends_in_htcondors_words_and_leaves_the_queue(relay, host, condor, deaf):
    """As many sites do with what takes more memory or time than it asked for."""
    host.sections["command solve"]["batch_options"] = "periodic_hold = JobStatus == 2 && time() - EnteredCurrentStatus > 3\n" \
        'periodic_hold_reason = "used too much memory"'
    host.script("solve", "%secho begun; sleep 600" % ("trap '' TERM; " if deaf else ""))
    host.start()
    accept_id = submit(relay, host.site)
    info = outcome(relay, accept_id, 120)
    assert info["status"] == "abnormal" and "held: used too much memory" in info["reason"], info
    assert info["files"][OUT] == b"begun\n" and len(host.runs()) == 1
    until(lambda: not condor.number(accept_id + ".1"), 30)


def test_a_job_that_is_evicted_is_not_run_again(relay, host, condor):
    host.sections["command solve"]["batch_grace"] = "5s"
    host.script("solve", "trap '' TERM; echo begun; sleep 600")
    host.start()
    accept_id = submit(relay, host.site)
    until(host.runs, 60)
    condor.call("condor_vacate_job", "-fast", condor.number(accept_id + ".1"))
    info = outcome(relay, accept_id, 120)
    assert info["status"] == "abnormal" and ("htcondor:" in info["reason"] or info["exit_code"] == 137), info
    assert host.runs() == [accept_id + ".1"]


@pytest.mark.parametrize("name", ["starting noted", "submitting", "submitted", "number noted"])
def test_a_poller_killed_around_the_submission_submits_once(relay, host, condor, name):
    host.script("solve", "echo x > out.txt")
    host.sections["command solve"]["batch_grace"] = "5s"                   # one that may have been sent is not sent again before that
    accept_id = submit(relay, host.site)
    host.start(env={"MI_FAULT": name}).wait(60)
    host.start()
    assert outcome(relay, accept_id, 60)["status"] == "completed" and host.runs() == [accept_id + ".1"]
    jobs = condor.call("condor_history", "-constraint", 'MIRun == "%s.1"' % accept_id, "-af", "ClusterId").split()
    assert len(jobs) == 1, jobs


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_schedd_away_for_two_minutes_changes_no_outcome(relay, host, condor, how):
    """stopped: its programs hang. killed, again and again: they say that there is no schedd."""
    host.poller["jobs"] = 3
    host.script("solve", "while [ ! -e go ]; do sleep 0.05; done; echo x > out.txt")
    host.start()
    early, late = [submit(relay, host.site) for _n in range(2)]
    until(lambda: len(host.runs()) == 2, 60)
    begun = time.monotonic()
    if how == "stopped":
        condor.signal("condor_schedd", signal.SIGSTOP)
    waiting = submit(relay, host.site)
    while time.monotonic() - begun < 120:
        if how == "killed" and condor.pids("condor_schedd"):
            condor.signal("condor_schedd", signal.SIGKILL)
        if time.monotonic() - begun > 40:
            (host.base / early / "go").touch()
        time.sleep(0.2)
    assert outcome(relay, early, 60)["status"] == "completed"              # the queue is not needed for that
    if how == "stopped":
        condor.signal("condor_schedd", signal.SIGCONT)
    for accept_id in (late, waiting):
        until((host.base / accept_id).exists, 60)
        (host.base / accept_id / "go").touch()
        info = outcome(relay, accept_id, 180)
        assert info["status"] == "completed", info
    assert len(host.runs()) == 3


def test_fifty_short_calculations_run_once_each(relay, host):
    host.poller["jobs"] = 20
    accept_ids = [submit(relay, host.site) for _n in range(50)]
    host.start()
    until(lambda: not relay.rows("SELECT 1 FROM calculations WHERE site = ? AND got IS NULL", host.site), 280)
    assert [row["status"] for row in relay.rows("SELECT status FROM calculations WHERE site = ?", host.site)] == ["completed"] * 50
    assert sorted(host.runs()) == sorted(name + ".1" for name in accept_ids)


# ---- the SSH way ----

@pytest.fixture
def lab(condor):
    """An sshd whose far side is the tree: every session of its key enters it."""
    inside = " ".join(condor.inside() + ["env", "HOME=/home/" + condor_lab.USER, "PATH=" + condor.env["PATH"], "CONDOR_CONFIG=" + condor.conf])
    made = ssh_lab.Lab(more='ForceCommand exec %s /bin/sh -c "$SSH_ORIGINAL_COMMAND"' % inside)
    far = pathlib.Path(condor.path("user", "far-" + os.path.basename(made.dir)))
    far.mkdir()
    os.chown(str(far), *condor.ids[condor_lab.USER])
    with open(made.path("ini")) as text:
        rows = text.read().replace("base = " + made.path("far"), "base = %s" % far)
    made.write("ini", rows)
    made.far_base = far
    yield made.start()
    made.close()


def runner(lab, *words):
    """The SSH runner's words."""
    return [suite.PYTHON, suite.script("execute_remote_command.py")] + list(words) + ["--ini", lab.path("ini")]


def over_ssh(lab, *words, timeout=150):
    done = subprocess.run(runner(lab, *words), cwd=lab.path("near"), env=lab.env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=timeout)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def test_the_ssh_runner_goes_through_htcondor_and_after_its_death_is_resumed(lab):
    lab.write("near/in.txt", "input\n")
    ledger = lab.far_base / "ledger"
    words = runner(lab, "run", "hpc", "echo begun >> %s; while [ ! -e go ]; do sleep 0.05; done; cat in.txt > 'o u t'; exit 4" % ledger,
                   "--in", "in.txt", "--batch", "htcondor", "--batch-option=request_memory = 20")
    first = subprocess.Popen(words, cwd=lab.path("near"), env=lab.env(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(ledger.exists, 90)
    first.kill()
    first.wait()
    lab.cut()
    ident, = [path.name for path in lab.far_base.iterdir() if path.is_dir() and path.name != ".mi"]
    assert "running" in over_ssh(lab, "list", "hpc")[1]
    (lab.far_base / ident / "go").touch()
    code, text = over_ssh(lab, "resume", ident)
    assert code == 4, text
    with open(lab.path("near", "o u t")) as result:
        assert (result.read(), ledger.read_text()) == ("input\n", "begun\n")


def test_cancel_over_ssh_ends_the_job_in_the_queue(lab, condor):
    words = runner(lab, "run", "hpc", "exec sleep 600", "--batch", "htcondor", "--batch-option=request_memory = 20")
    first = subprocess.Popen(words, cwd=lab.path("near"), env=lab.env(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ident, = until(lambda: [path.name for path in lab.far_base.iterdir() if (lab.far_base / ".mi" / path.name / "start").exists()], 90)
    code, text = over_ssh(lab, "cancel", ident)
    assert code == 0 and "ended 143" in text, text
    assert first.wait(60) == 143
    until(lambda: not condor.number(ident + ".1"), 30)
