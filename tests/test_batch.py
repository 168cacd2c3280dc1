"""Batch systems: real Slurm, and stand-ins that answer as OpenPBS, Torque and HTCondor do, or lie. The job's `end` is the truth."""
import json
import os
import pathlib
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time

import pytest

import batch_stand_in
import slurm_lab
import ssh_lab
import suite
from suite import wait_until as until
from test_poller import ERR, OUT, Host, OurWorld, check_odd_words, clean_up, outcome, remote, submit


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    made = OurWorld(tmp_path_factory.mktemp("relay"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def slurm():
    made = slurm_lab.Slurm()
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture(scope="module", autouse=True)
def limited(relay, slurm, tmp_path_factory):
    """A calculation with Slurm's shortest time limit, a minute: begun with the first test, looked at in one of the last."""
    made = Host(tmp_path_factory.mktemp("limited"), relay.url, next(relay.free), relay.token)
    made.sections["command solve"].update({"batch": "slurm", "batch_poll": "2s", "env.SLURM_CONF": slurm.conf, "batch_options": "--mem=20",
                                           "batch_changeable": "\n  minutes=9 --time={} [1-9]"})
    made.script("solve", "echo begun; exec sleep 600")
    made.start()
    yield submit(relay, made.site, parameters="batch.minutes=1")
    clean_up(made)


@pytest.fixture
def host(relay, tmp_path):
    """An external computer whose command `solve` goes through a batch system; keys of the section by batch()."""
    made = Host(tmp_path, relay.url, next(relay.free), relay.token)
    made.batch = lambda system, **keys: made.sections["command solve"].update(dict({"batch": system, "batch_poll": "1s"}, **keys))
    yield made
    clean_up(made)


@pytest.fixture
def cluster(host, slurm):
    """A host with Slurm."""
    host.batch("slurm", **{"env.SLURM_CONF": slurm.conf, "batch_options": "--mem=20", "env.PATH": slurm.path("bin") + ":" + os.environ["PATH"]})
    return host


def job_of(host, name):
    """What the control directory says of a calculation's job."""
    return remote.read_batch(os.fsencode(str(host.control(name))))


def text_of(info):
    """The command's stderr, with what was added to it."""
    return info["files"][ERR].decode("utf-8")


# ---- real Slurm ----

def test_a_calculation_goes_through_slurm_with_odd_arguments_and_its_environment(relay, cluster):
    check_odd_words(relay, cluster, "$SLURM_JOB_PARTITION", "batch")


def test_the_exit_code_of_a_job_is_the_commands(relay, cluster):
    cluster.script("solve", "echo wrong >&2; exit 3")
    cluster.start()
    info = outcome(relay, submit(relay, cluster.site))
    assert (info["status"], info["exit_code"], info["reason"], text_of(info)) == ("abnormal", 3, "exit code 3", "wrong\n")


def test_a_job_shows_as_queued_with_the_reason_then_as_running_on_its_node(relay, cluster, slurm):
    cluster.sections["command solve"]["batch_options"] = "--mem=20\n--hold"
    cluster.script("solve", "while [ ! -e go ]; do sleep 0.05; done; echo x > out.txt")
    cluster.start()
    accept_id = submit(relay, cluster.site)
    until(lambda: "queued (PENDING, JobHeldUser)" in cluster.run("list").stdout, 30)
    assert json.loads(cluster.run("list", "--json").stdout)[0]["what"] == "queued (PENDING, JobHeldUser)"
    client = relay.client()
    until(lambda: client.ask("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["what"] == "queued (PENDING, JobHeldUser)", 30)
    slurm.call("scontrol", "release", job_of(cluster, accept_id)["job"])
    until(lambda: json.loads(cluster.run("show", accept_id, "--json").stdout).get("what") == "running on " + os.uname().nodename, 30)
    until(lambda: client.ask("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["what"] == "running on " + os.uname().nodename, 60)
    (cluster.base / accept_id / "go").touch()
    assert outcome(relay, accept_id)["status"] == "completed"
    assert cluster.run("list").stdout.split()[1] == "delivered"


def test_a_job_out_of_memory_ends_abnormal_in_slurms_words(relay, cluster):
    cluster.sections["command solve"]["batch_grace"] = "3s"
    cluster.script("solve", "echo begun; exec %s -c 'import time; x = bytearray(200 << 20); time.sleep(600)'" % suite.PYTHON)
    cluster.start()
    info = outcome(relay, submit(relay, cluster.site), 60)
    words = re.compile("exceeded (job )?memory limit", re.I)              # of the step, or of the job
    assert info["status"] == "abnormal" and words.search(info["reason"]), info
    assert info["files"][OUT] == b"begun\n" and words.search(text_of(info))


@pytest.mark.parametrize("held", [False, True], ids=["running", "queued"])
def test_the_workflow_side_cancels_a_job(relay, cluster, slurm, held):
    cluster.sections["command solve"]["batch_options"] = "--hold" if held else ""
    cluster.script("solve", "exec sleep 600")
    cluster.start()
    accept_id = submit(relay, cluster.site)
    until(lambda: slurm.jobs().get("mi-%s.1" % accept_id) == ("PENDING" if held else "RUNNING"), 30)
    relay.client().ask("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})
    info = outcome(relay, accept_id, 40)
    assert info["status"] == "abnormal" and info["reason"].startswith("cancelled"), info
    until(lambda: slurm.jobs().get("mi-%s.1" % accept_id) == "CANCELLED", 30)
    assert len(cluster.runs()) == (0 if held else 1)


def test_timeout_counts_from_the_commands_start_not_while_its_job_waits(relay, cluster, slurm):
    cluster.sections["command solve"].update(batch_options="--mem=20\n--hold", timeout="3s")
    cluster.script("solve", "echo begun; exec sleep 600")
    cluster.start()
    accept_id = submit(relay, cluster.site)
    until(lambda: "queued (PENDING, JobHeldUser)" in cluster.run("list").stdout, 30)
    time.sleep(4)
    slurm.call("scontrol", "release", job_of(cluster, accept_id)["job"])
    info = outcome(relay, accept_id, 60)
    assert (info["status"], info["reason"], info["exit_code"]) == ("abnormal", "timeout", 143), info
    assert info["files"][OUT] == b"begun\n" and "timeout" in text_of(info)
    until(lambda: slurm.jobs().get("mi-%s.1" % accept_id) == "CANCELLED", 30)


@pytest.fixture
def ordinary(relay, slurm):
    """A host whose poller is an ordinary user's."""
    if os.geteuid() != 0 or not os.path.exists("/usr/bin/python3"):
        pytest.skip("needs root, who becomes an ordinary user, and a Python that this one may run")
    user, folder = pwd.getpwnam("nobody"), pathlib.Path(tempfile.mkdtemp(prefix="mi-ordinary-"))
    made = Host(folder, relay.url, next(relay.free), relay.token)
    shutil.copy(suite.script("mi_system_remote.py"), str(folder))
    for path in (folder, made.token):
        os.chown(str(path), user.pw_uid, user.pw_gid)
    made.program = ["setpriv", "--reuid=%d" % user.pw_uid, "--regid=%d" % user.pw_gid, "--clear-groups", "/usr/bin/python3", str(folder / "mi_system_remote.py")]
    made.sections["command solve"].update({"batch": "slurm", "batch_poll": "1s", "env.SLURM_CONF": slurm.conf, "batch_options": "--mem=20"})
    yield made
    clean_up(made)
    shutil.rmtree(str(folder), ignore_errors=True)


def test_an_ordinary_users_poller_submits_sees_and_cancels_its_jobs(relay, ordinary, slurm):
    ordinary.poller["jobs"] = 2
    ordinary.script("solve", "id -un > out.txt; [ -e short ] || exec sleep 600")
    ordinary.start()
    info = outcome(relay, submit(relay, ordinary.site, {"short": b""}), 60)
    assert (info["status"], info["files"]["out.txt"]) == ("completed", b"nobody\n"), info
    accept_id = submit(relay, ordinary.site)
    until(lambda: "running on " + os.uname().nodename in ordinary.text(), 30)
    relay.client().ask("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})
    assert outcome(relay, accept_id, 60)["reason"].startswith("cancelled")
    until(lambda: slurm.jobs().get("mi-%s.1" % accept_id) == "CANCELLED", 30)


@pytest.mark.parametrize("held", [False, True], ids=["running", "queued"])
def test_the_admin_cancels_a_job(relay, cluster, slurm, held):
    cluster.sections["command solve"]["batch_options"] = "--hold" if held else ""
    cluster.script("solve", "echo begun; exec sleep 600")
    cluster.start()
    accept_id = submit(relay, cluster.site)
    until(lambda: cluster.runs() or held and job_of(cluster, accept_id).get("job"), 30)
    slurm.call("scancel", job_of(cluster, accept_id)["job"])
    info = outcome(relay, accept_id, 60)
    assert info["status"] == "abnormal" and "CANCELLED" in info["reason"], info
    assert info["files"][OUT] == (b"" if held else b"begun\n")


def test_the_admin_requeues_a_job_and_nothing_runs_twice(relay, cluster, slurm):
    cluster.sections["command solve"]["batch_grace"] = "3s"
    cluster.script("solve", "trap '' TERM; sleep 600")
    cluster.start()
    accept_id = submit(relay, cluster.site)
    until(cluster.runs, 30)
    number = job_of(cluster, accept_id)["job"]
    slurm.call("scontrol", "update", "JobId=" + number, "Requeue=1")
    slurm.call("scontrol", "requeue", number)
    until(lambda: slurm.jobs().get("mi-%s.1" % accept_id) == "PENDING", 30)
    slurm.call("scontrol", "update", "JobId=" + number, "StartTime=now")       # it would wait for two minutes
    info = outcome(relay, accept_id, 150)
    assert info["status"] == "abnormal" and any(
        word in info["reason"] for word in ("slurm: FAILED", "exit code 1", "JOB REQUEUE")), info         # in the words that were there first
    assert cluster.runs() == [accept_id + ".1"]


def test_a_command_that_ends_by_itself_when_its_job_is_requeued_and_held_leaves_no_job_there(relay, cluster, slurm):
    cluster.sections["command solve"].update(batch_grace="3s", batch_options="--mem=20")
    cluster.script("solve", "trap 'exit 3' TERM; echo begun; while :; do sleep 0.1; done")
    cluster.start()
    accept_id = submit(relay, cluster.site)
    until(cluster.runs, 30)
    number = until(lambda: job_of(cluster, accept_id).get("job"), 30)
    slurm.call("scontrol", "update", "JobId=" + number, "Requeue=1")
    slurm.call("scontrol", "requeuehold", number)
    info = outcome(relay, accept_id, 60)
    told = "held" in info["reason"] or "REQUEUE" in info["reason"]         # in the words of the queue, or of the job's log
    assert info["status"] == "abnormal" and told and info["files"][OUT] == b"begun\n", info
    until(lambda: slurm.jobs().get("mi-%s.1" % accept_id) == "CANCELLED", 30)
    assert len(cluster.runs()) == 1


def test_a_command_that_ignores_term_is_cancelled_once_and_ends(relay, cluster, slurm):
    ledger = slurm.count("scancel")
    cluster.script("solve", "trap '' TERM; while :; do sleep 0.1; done")
    cluster.sections["command solve"].update(batch_grace="1s", batch_poll="0.3s")
    cluster.start()
    accept_id = submit(relay, cluster.site)
    until(cluster.runs, 30)
    relay.client().ask("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})
    assert outcome(relay, accept_id, 60)["reason"].startswith("cancelled")
    with open(ledger) as text:
        assert len(text.readlines()) == 1


@pytest.mark.parametrize("name", ["starting noted", "submitting", "submitted", "number noted"])
def test_a_poller_killed_around_the_submission_submits_once(relay, cluster, slurm, name):
    ledger = slurm.count("sbatch")
    if os.path.exists(ledger):
        os.unlink(ledger)
    cluster.script("solve", "echo x > out.txt")
    cluster.sections["command solve"]["batch_grace"] = "2s"                # one that may have been sent is not sent again before that
    accept_id = submit(relay, cluster.site)
    cluster.start(env={"MI_FAULT": name}).wait(60)
    cluster.start()
    info = outcome(relay, accept_id, 60)
    assert (info["status"], info["files"]["out.txt"]) == ("completed", b"x\n"), info
    with open(ledger) as text:
        assert len(text.readlines()) == 1
    assert cluster.runs() == [accept_id + ".1"]


def test_slurms_controller_restarted_or_away_while_jobs_run_and_end_loses_nothing(relay, cluster, slurm, request):
    away = 120 if request.config.getoption("--long") else 4
    cluster.poller["jobs"] = 2
    cluster.sections["command solve"].update(batch_grace="2s")
    cluster.script("solve", "while [ ! -e go ]; do sleep 0.05; done; echo x > out.txt")
    cluster.start()
    through, ending, waiting = [submit(relay, cluster.site) for _n in range(3)]
    until(lambda: len(cluster.runs()) == 2, 30)
    slurm.end("slurmctld")
    slurm.controller()
    until(lambda: all(slurm.jobs().get("mi-%s.1" % name) == "RUNNING" for name in (through, ending)), 60)
    slurm.end("slurmctld")
    (cluster.base / ending / "go").touch()
    assert outcome(relay, ending, 60)["status"] == "completed"             # the queue is not needed for that
    until(lambda: job_of(cluster, waiting).get("sent"), 60)                # this one cannot be submitted now
    time.sleep(away)
    assert not job_of(cluster, waiting).get("job") and not (cluster.control(through) / "end").exists()
    slurm.controller()
    until(lambda: len(cluster.runs()) == 3, 90)
    for name in (through, waiting):
        (cluster.base / name / "go").touch()
        info = outcome(relay, name, 60)
        assert info["status"] == "completed", info


def many(relay, cluster, slurm, count, jobs, seconds):
    """count short calculations, `jobs` at once: all run once, and the queue was asked once a batch_poll at most."""
    ledger = slurm.count("squeue")
    if os.path.exists(ledger):
        os.unlink(ledger)
    cluster.poller["jobs"] = jobs
    cluster.sections["command solve"].update(batch_poll="2s", batch_options="--mem=10")
    cluster.script("solve", "echo x > out.txt")
    accept_ids = [submit(relay, cluster.site) for _n in range(count)]
    cluster.start()
    until(lambda: not relay.rows("SELECT 1 FROM calculations WHERE site = ? AND got IS NULL", cluster.site), seconds)
    rows = relay.rows("SELECT status FROM calculations WHERE site = ?", cluster.site)
    assert [row["status"] for row in rows] == ["completed"] * count
    assert sorted(cluster.runs()) == sorted(name + ".1" for name in accept_ids)
    cluster.started[0].terminate()
    cluster.started[0].wait(20)
    times = []
    if os.path.exists(ledger):
        with open(ledger) as text:
            times = [float(line.split()[0]) for line in text if "mi" not in line.split()[1:]]
    late = 1.0                                         # so much later than asked for may a process start here, and the next one not
    assert all(times[j] - times[i] > 2 * (j - i) - late for j in range(len(times)) for i in range(j)), times
    return times


def test_two_hundred_short_calculations_cost_one_query_a_poll(relay, cluster, slurm):
    many(relay, cluster, slurm, 200, 50, 240)


def test_nothing_is_asked_while_nothing_runs(relay, cluster, slurm):
    ledger = slurm.count("squeue")
    cluster.sections["command solve"]["batch_poll"] = "0.2s"
    cluster.script("solve", "sleep 2; echo x > out.txt")
    cluster.start()
    assert outcome(relay, submit(relay, cluster.site), 60)["status"] == "completed"
    asked = os.path.getsize(ledger)
    time.sleep(2)
    assert os.path.getsize(ledger) == asked > 0


def test_a_thousand_queued_through_one_poller(relay, cluster, slurm, request):
    if not request.config.getoption("--long"):
        pytest.skip("--long")
    many(relay, cluster, slurm, 1000, 1000, 1200)


# ---- stand-ins for what is not here: they answer as the real ones were seen to ----

OTHERS = ["openpbs", "torque", "htcondor"]


@pytest.fixture(params=OTHERS)
def other(request, host):
    """A host with a batch system of another kind."""
    host.kind, folder = request.param, str(host.folder / "system")
    path = batch_stand_in.install(folder, host.kind) + ":" + os.environ["PATH"]
    host.batch({"htcondor": "htcondor", "slurm": "slurm"}.get(host.kind, "pbs"), **{"env.PATH": path, "batch_poll": "0.3s", "batch_grace": "60s"})
    host.system = batch_stand_in.System(folder, host.kind)
    yield host
    for job in host.system.jobs():
        host.system.delete(job)


def test_a_calculation_goes_through_another_batch_system(relay, other):
    open(other.system.path("held"), "w").close()
    other.base = other.folder / "b a'se %j"
    other.poller["calc_base"] = str(other.base)
    other.script("solve", 'cat in.txt > out.txt; while [ ! -e go ]; do sleep 0.05; done; exit 4')
    other.start()
    accept_id = submit(relay, other.site, {"in.txt": b"input"})
    until(lambda: re.search(r"queued \(.*(nsufficient|no match)", other.run("list").stdout), 30)
    os.unlink(other.system.path("held"))
    until(lambda: "running on node7" in other.text() or "running on " + os.uname().nodename in other.text(), 30)
    (other.base / accept_id / "go").touch()
    info = outcome(relay, accept_id)
    assert (info["status"], info["exit_code"], info["files"]["out.txt"]) == ("abnormal", 4, b"input")
    assert other.runs() == [accept_id + ".1"]


@pytest.mark.parametrize("other", ["slurm"] + OTHERS, indirect=True)
def test_queues_that_lie_change_no_outcome(relay, other, slurm, request):
    """With --long each of the lies lasts two minutes."""
    seconds, calls = 120 if request.config.getoption("--long") else 0, other.system.path("calls")
    other.poller["jobs"] = 2
    other.sections["command solve"]["batch_grace"] = "10m"
    if other.kind == "slurm":
        other.sections["command solve"].update({"env.SLURM_CONF": slurm.conf, "batch_options": "--mem=20"})
    other.script("solve", "[ -e short ] || while [ ! -e go ]; do sleep 0.05; done; echo x > out.txt")
    other.start()
    through = submit(relay, other.site)
    until(other.runs, 30)
    before = peak(other.started[0])
    for lie in batch_stand_in.LIES:
        with open(other.system.path("lie"), "w") as out:
            out.write(lie)
        asked, begun = os.path.getsize(calls), time.monotonic()
        assert outcome(relay, submit(relay, other.site, {"short": b""}), 30)["status"] == "completed", lie
        until(lambda: os.path.getsize(calls) > asked + (0 if lie == "hang" else 20), 60, lie)
        while time.monotonic() - begun < seconds:
            time.sleep(5)
            assert outcome(relay, submit(relay, other.site, {"short": b""}), 60)["status"] == "completed", lie
    (other.base / through / "go").touch()
    assert outcome(relay, through)["status"] == "completed"
    with open(calls) as text:
        assert len(other.runs()) == len(re.findall("^(?:sbatch|qsub|condor_submit)$", text.read(), re.M)) > len(batch_stand_in.LIES)
    assert peak(other.started[0]) < before + (26 << 20)        # of the flood it holds a little


def peak(process):
    """VmHWM in bytes."""
    with open("/proc/%d/status" % process.pid) as text:
        return int(re.search(r"VmHWM:\s+(\d+)", text.read()).group(1)) * 1024


def test_another_batch_system_ends_a_job_and_says_so(relay, other):
    other.script("solve", "echo begun; exec sleep 600")
    other.start()
    accept_id = submit(relay, other.site)
    until(other.runs, 30)
    until(lambda: job_of(other, accept_id).get("job"), 30)
    other.system.delete(other.system.jobs()[0])
    info = outcome(relay, accept_id, 60)
    words = {"openpbs": "exit status 271", "torque": "exit status 271", "htcondor": "removed: via condor_rm"}[other.kind]
    assert info["status"] == "abnormal" and words in info["reason"] and info["files"][OUT] == b"begun\n", info


@pytest.mark.parametrize("other", ["openpbs"], indirect=True)
@pytest.mark.parametrize("logs, told", [("yes", True), ("no", False)])
def test_words_of_the_jobs_log_leave_as_the_reason_unless_logs_stay_at_home(relay, other, logs, told):
    other.sections["command solve"]["logs"] = logs
    other.script("solve", "exec sleep 600")
    other.start()
    accept_id = submit(relay, other.site)
    until(other.runs, 30)
    until(lambda: job_of(other, accept_id).get("job"), 30)
    with open(str(other.control(accept_id) / "batch.log"), "a") as out:
        out.write(" " * 200 + "\n=>> PBS: job killed: walltime 9 of Al-7075\n")           # (the job's shell writes at its beginning)
    other.system.delete(other.system.jobs()[0])
    info = outcome(relay, accept_id, 60)
    words = "job killed: walltime 9 of Al-7075" if told else "exit status 271"
    assert info["status"] == "abnormal" and words in info["reason"] and ("Al-7075" in json.dumps(info, default=repr)) == told, info


def test_a_poller_killed_after_submitting_elsewhere_finds_the_job_by_its_mark(relay, other):
    other.script("solve", "sleep 1; echo x > out.txt")
    accept_id = submit(relay, other.site)
    other.start(env={"MI_FAULT": "submitted"}).wait(60)
    other.start()
    assert outcome(relay, accept_id, 60)["status"] == "completed"
    assert len(other.system.jobs()) == 1 == len(other.runs())


@pytest.mark.parametrize("other", ["openpbs", "torque"], indirect=True)
def test_a_job_of_a_stranger_that_pretends_to_be_ours_changes_no_outcome(relay, other):
    other.script("solve", "while [ ! -e go ]; do sleep 0.05; done; echo x > out.txt")
    accept_id = submit(relay, other.site)
    other.start(env={"MI_FAULT": "submitted"}).wait(60)
    with open(other.system.path("strangers"), "w") as out:
        out.write("Job Id: 99.pbshost\n    Job_Owner = stranger@h\n    job_state = Q\n    Variable_List = X=y\nJob Id: 98.pbshost\n    Job_Owner = %s@h\n"
                  "    job_state = R\n    Variable_List = MI_RUN=%s.1\n" % (remote.user_name(), accept_id))
    other.start()
    until(lambda: job_of(other, accept_id).get("job"), 60)
    assert job_of(other, accept_id)["job"] == "1.pbshost"
    (other.base / accept_id / "go").write_text("")
    assert outcome(relay, accept_id, 60)["status"] == "completed"
    assert len(other.system.jobs()) == 1 == len(other.runs())


def test_a_submission_that_is_refused_for_good_ends_the_calculation_in_its_words(relay, other):
    with open(os.path.join(str(other.folder), "system", "bin", "condor_submit" if other.kind == "htcondor" else "qsub"), "w") as out:
        out.write("#!/bin/sh\necho 'qsub: Unknown queue' >&2\necho 'ERROR: Failed to parse command file (line 2).' >&2\nexit 1\n")
    other.start()
    info = outcome(relay, submit(relay, other.site), 60)
    assert info["status"] == "abnormal" and "Unknown queue" in info["reason"] and not other.runs(), info


# ---- pre and post; the go-between; the SSH way ----

def test_pre_and_post_run_once_on_this_host_around_the_job(relay, cluster, slurm):
    for key in ("pre", "post"):
        cluster.script(key, 'echo %s "$1" "$REMOTE_HOSTNAME" $(ls) >> %s/beside' % (key, cluster.folder))
        cluster.sections["command solve"][key] = str(cluster.folder / key) + "\nan argument"
    cluster.sections["command solve"]["env.REMOTE_HOSTNAME"] = "hpc"
    cluster.script("solve", "echo x > out.txt")
    accept_id = submit(relay, cluster.site, {"in.txt": b""})
    for name in ("pre made", "submitted", "post made", "ended unnoted"):
        cluster.start(env={"MI_FAULT": name}).wait(60)
    cluster.start()
    assert outcome(relay, accept_id, 60)["status"] == "completed"
    with open(str(cluster.folder / "beside")) as text:
        assert text.read() == "pre an argument hpc in.txt\npost an argument hpc in.txt out.txt\n"
    assert len(cluster.runs()) == 3


def test_a_pre_that_fails_submits_nothing_and_a_post_that_fails_is_told(relay, host):
    host.batch("none", pre=host.script("pre", "[ ! -e bad ] || { echo no scratch >&2; exit 5; }"), post=host.script("post", "exit 6"))
    host.start()
    info = outcome(relay, submit(relay, host.site, {"bad": b""}))
    assert info["status"] == "abnormal" and "pre: exit code 5" in info["reason"] and "no scratch" in text_of(info) and len(host.runs()) == 1
    info = outcome(relay, submit(relay, host.site))
    assert info["status"] == "abnormal" and "post: exit code 6" in info["reason"] and info["files"]["out.txt"] == b"result\n"


@pytest.fixture
def lab():
    made = ssh_lab.Lab().start()
    yield made
    made.close()


def guarded(lab, slurm, program, **keys):
    """The lab's guard lets a key run `solve` through Slurm."""
    keys = dict({"match": "solve", "argv": program, "batch": "slurm", "batch_poll": "1s", "env.SLURM_CONF": slurm.conf, "batch_options": "--mem=20",
                 "batch_changeable": "\n  cores=1 --cpus-per-task={} [1-4]"}, **keys)
    lab.guard("[command solve]\n" + "".join("%s = %s\n" % item for item in keys.items()))


def over_ssh(lab, *words, timeout=90):
    """One call of the SSH runner: (exit code, output)."""
    done = subprocess.run([suite.PYTHON, suite.script("execute_remote_command.py")] + list(words) + ["--ini", lab.path("ini")], cwd=lab.path("near"), env=lab.env(),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def program(lab, body):
    lab.write("solve", "#!/bin/sh\n" + body)
    os.chmod(lab.path("solve"), 0o755)
    return lab.path("solve")


def test_the_ssh_runner_runs_a_command_through_slurm_on_the_far_login_node(lab, slurm):
    guarded(lab, slurm, program(lab, 'echo "on $SLURM_CPUS_PER_TASK"; cat in.txt > out.txt; exit 3\n'))
    lab.write("near/in.txt", "input\n")
    code, text = over_ssh(lab, "run", "guarded", "solve batch.cores=2", "--in", "in.txt")
    assert code == 3 and "on 2\n" in text, text
    with open(lab.path("near", "out.txt")) as result:
        assert result.read() == "input\n"
    code, text = over_ssh(lab, "run", "guarded", "solve batch.cores=9", "--in", "in.txt")
    assert code == 77 and "batch.cores may not be 9 here" in text, text


def test_a_plain_key_runs_its_command_through_slurm_and_is_resumed(slurm):
    lab = ssh_lab.Lab(more="SetEnv SLURM_CONF=" + slurm.conf).start()
    try:
        body = 'echo "begun $SLURM_CPUS_PER_TASK" | tee -a %s; while [ ! -e go ]; do sleep 0.05; done; cat in.txt > "o u t"; exit 4'
        lab.write("near/in.txt", "input\n")
        words = [suite.PYTHON, suite.script("execute_remote_command.py"), "run", "hpc", body % lab.path("ledger"), "--in", "in.txt", "--batch", "slurm",
                 "--batch-option=--cpus-per-task=2 --mem=20", "--ini", lab.path("ini")]
        runner = subprocess.Popen(words, cwd=lab.path("near"), env=lab.env(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL)
        until(lambda: os.path.exists(lab.path("ledger")), 60)
        runner.kill()
        runner.wait()
        lab.cut()
        ident, = [name for name in os.listdir(lab.path("far")) if name != ".mi"]
        assert "running" in over_ssh(lab, "list", "hpc")[1]
        open(lab.path("far", ident, "go"), "w").close()
        code, text = over_ssh(lab, "resume", ident)
        assert code == 4 and "begun 2" in text, text
        with open(lab.path("near", "o u t")) as result, open(lab.path("ledger")) as ledger:
            assert (result.read(), ledger.read()) == ("input\n", "begun 2\n")
    finally:
        lab.close()


def test_a_killed_ssh_runner_is_resumed_while_slurm_runs_its_job_once(lab, slurm):
    guarded(lab, slurm, program(lab, "echo begun >> %s; while [ ! -e go ]; do sleep 0.05; done; echo x > out.txt\n" % lab.path("ledger")))
    words = [suite.PYTHON, suite.script("execute_remote_command.py"), "run", "guarded", "solve", "--ini", lab.path("ini")]
    runner = subprocess.Popen(words, cwd=lab.path("near"), env=lab.env(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: os.path.exists(lab.path("ledger")), 60)
    runner.kill()
    runner.wait()
    lab.cut()
    ident, = [name for name in os.listdir(lab.path("far")) if name != ".mi"]
    assert "running on" in until(lambda: over_ssh(lab, "list", "guarded")[1], 30)
    open(lab.path("far", ident, "go"), "w").close()
    code, text = over_ssh(lab, "resume", ident)
    assert code == 0 and os.path.exists(lab.path("near", "out.txt")), text
    with open(lab.path("ledger")) as ledger:
        assert ledger.read() == "begun\n"


def test_cancel_over_ssh_ends_the_job_in_the_queue(lab, slurm):
    guarded(lab, slurm, program(lab, "exec sleep 600\n"))
    words = [suite.PYTHON, suite.script("execute_remote_command.py"), "run", "guarded", "solve", "--ini", lab.path("ini")]
    runner = subprocess.Popen(words, cwd=lab.path("near"), env=lab.env(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ident, = until(lambda: [name[3:-2] for name, state in slurm.jobs().items() if state == "RUNNING" and os.path.isdir(lab.path("far", name[3:-2]))], 60)
    code, text = over_ssh(lab, "cancel", ident)
    assert code == 0 and "ended 143" in text, text
    assert runner.wait(60) == 143 and slurm.jobs()["mi-%s.1" % ident] == "CANCELLED"


def test_the_go_between_is_one_chain_from_the_workflow_to_the_far_queue(relay, host, lab, slurm):
    """Relay, poller on a middle host, SSH runner as its command, guard on the login node, Slurm; the poller is killed on the way."""
    guarded(lab, slurm, program(lab, "echo begun >> %s; sleep 2; cat in.txt > out.txt\n" % lab.path("ledger")))
    host.batch("none", argv="\n".join([suite.PYTHON, "-I", suite.script("execute_remote_command.py"), "run", "guarded", "solve", "--in", "in.txt",
                                       "--ini", lab.path("ini")]), match="solve", **{"env.XDG_STATE_HOME": lab.path("state")})
    poller = host.start()
    accept_id = submit(relay, host.site, {"in.txt": b"input"})
    until(lambda: os.path.exists(lab.path("ledger")), 60)
    poller.kill()
    poller.wait()
    host.start()
    info = outcome(relay, accept_id, 60)
    assert (info["status"], info["files"]["out.txt"]) == ("completed", b"input"), info
    with open(lab.path("ledger")) as ledger:
        assert ledger.read() == "begun\n"


def test_the_scripts_of_a_hand_written_go_between_run_as_they_are(relay, host, lab, slurm):
    """pre_process.sh, qsub_process.sh and post_process.sh find REMOTE_HOSTNAME, and their calculation's files in the current directory."""
    ssh, far = "ssh -F %s $REMOTE_HOSTNAME" % lab.path("config"), lab.path("far") + "/$MI_RUN"
    keys = {"pre": host.script("pre_process.sh", "tar cf - . | %s \"mkdir -p %s && cd %s && tar xf -\"" % (ssh, far, far)),
            "argv": host.script("qsub_process.sh", "%s \"cd %s && SLURM_CONF=%s sbatch --wait --mem=10 -o /dev/null ./job.sh\"" % (ssh, far, slurm.conf)),
            "post": host.script("post_process.sh", "%s \"cd %s && tar cf - out.txt\" | tar xf -" % (ssh, far))}
    host.batch("none", match="solve", **dict(keys, **{"env.REMOTE_HOSTNAME": "hpc"}))
    host.start()
    info = outcome(relay, submit(relay, host.site, {"job.sh": b"#!/bin/sh\nhostname > out.txt\n"}), 90)
    assert (info["status"], info["files"]["out.txt"]) == ("completed", os.uname().nodename.encode() + b"\n"), (info, text_of(info))


# ---- the last ones of real Slurm ----

def test_a_job_beyond_its_time_limit_ends_abnormal_in_slurms_words(relay, limited):
    info = outcome(relay, limited, 200)
    assert info["status"] == "abnormal" and "TIME LIMIT" in info["reason"] and info["files"][OUT] == b"begun\n", info


@pytest.mark.parametrize("how", ["by a cold start", "after MinJobAge"])
def test_what_slurm_has_forgotten_is_told_by_the_jobs_own_end(relay, cluster, slurm, request, how):
    """With --long also by its own forgetting, which takes it up to a minute."""
    cluster.poller["jobs"], cluster.sections["command solve"]["batch_grace"] = 2, "3s"
    aged = how == "after MinJobAge" and slurm_lab.Slurm(age=2) if request.config.getoption("--long") else None
    if how == "after MinJobAge" and not aged:
        pytest.skip("--long")
    try:
        forgotten(relay, cluster, aged.start() if aged else slurm)
    finally:
        if aged:
            aged.close()


def forgotten(relay, cluster, slurm):
    """One job that ends and one whose processes vanish while no poller is there; the next one starts when the queue knows neither."""
    cluster.sections["command solve"]["env.SLURM_CONF"] = slurm.conf
    cluster.script("solve", "echo $$ > pid; while [ ! -e go ]; do sleep 0.05; done; echo x > out.txt")
    poller = cluster.start()
    ended, vanished = [submit(relay, cluster.site) for _n in range(2)]
    until(lambda: len(cluster.runs()) == 2, 30)
    poller.kill()
    poller.wait()
    (cluster.base / ended / "go").touch()
    until(lambda: slurm.jobs().get("mi-%s.1" % ended, "COMPLETED") == "COMPLETED", 30)
    wrapper = remote.read_note(os.fsencode(str(cluster.control(vanished) / "start"))).pid
    os.kill(wrapper, signal.SIGKILL)                   # no `end` will ever come
    os.kill(int((cluster.base / vanished / "pid").read_text()), signal.SIGKILL)
    until(lambda: slurm.jobs().get("mi-%s.1" % vanished, "gone") != "RUNNING", 30)
    if slurm.age > 2:
        slurm.end("slurmctld")
        slurm.daemon("slurmctld", slurm.find("slurmctld"), "-D", "-c", "-f", slurm.conf)
        until(lambda: slurm.call("sinfo", "-h", "-o", "%t").strip() == "idle", 60)
    until(lambda: not slurm.jobs(), 200)
    cluster.start()
    assert outcome(relay, ended, 30)["status"] == "completed"
    info = outcome(relay, vanished, 60)
    assert info["status"] == "abnormal" and re.search(r"slurm does not know job \d+ any more", info["reason"]), info
    assert len(cluster.runs()) == 2
