"""Batch systems: real Slurm, and stand-ins that answer as OpenPBS, Torque and HTCondor do, or lie. The job's `end` is the truth."""
import json
import os
import re
import signal
import subprocess
import time

import pytest

import slurm_lab
import suite
from suite import wait_until as until
from test_poller import ERR, OUT, Host, OurWorld, clean_up, outcome, remote, submit


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
    cluster.script("solve", 'printf "%s|" "$@" "$EXTRA" "$SLURM_JOB_PARTITION" "$PWD" "$CALC_DIR" > out.txt; cat in.txt >> out.txt; echo said')
    cluster.sections["command solve"].update({"argv": cluster.sections["command solve"]["argv"] + "\n{parameters}", "parameters": "yes",
                                              "argument.1": ".*", "argument.2": ".*", "env.EXTRA": "a 'b' $(c) \\"})
    cluster.start()
    accept_id = submit(relay, cluster.site, {"in.txt": b"input"}, parameters="""'$(touch x) `y` "' '\\n %s *'""")
    info, work = outcome(relay, accept_id), str(cluster.base / accept_id)
    assert (info["status"], info["exit_code"], info["reason"]) == ("completed", 0, ""), info
    assert info["files"]["out.txt"].decode() == "$(touch x) `y` \"|\\n %%s *|a 'b' $(c) \\|batch|%s|%s|input" % (work, work)
    assert info["files"][OUT] == b"said\n" and cluster.runs() == [accept_id + ".1"]


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
    slurm.call("scontrol", "release", job_of(cluster, accept_id)["job"])
    until(lambda: json.loads(cluster.run("show", accept_id, "--json").stdout).get("what") == "running on " + os.uname().nodename, 30)
    (cluster.base / accept_id / "go").touch()
    assert outcome(relay, accept_id)["status"] == "completed"
    assert cluster.run("list").stdout.split()[1] == "delivered"


def test_a_job_out_of_memory_ends_abnormal_in_slurms_words(relay, cluster):
    cluster.sections["command solve"]["batch_grace"] = "3s"
    cluster.script("solve", "echo begun; exec %s -c 'import time; x = bytearray(200 << 20); time.sleep(600)'" % suite.PYTHON)
    cluster.start()
    info = outcome(relay, submit(relay, cluster.site), 60)
    assert info["status"] == "abnormal" and "exceeded memory limit" in info["reason"], info
    assert info["files"][OUT] == b"begun\n" and "exceeded memory limit" in text_of(info)


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
    assert info["status"] == "abnormal" and ("slurm: FAILED" in info["reason"] or "exit code 1" in info["reason"]), info
    assert cluster.runs() == [accept_id + ".1"]


@pytest.mark.parametrize("name", ["starting noted", "submitting", "submitted", "number noted"])
def test_a_poller_killed_around_the_submission_submits_once(relay, cluster, slurm, name):
    ledger = slurm.count("sbatch")
    if os.path.exists(ledger):
        os.unlink(ledger)
    cluster.script("solve", "echo x > out.txt")
    accept_id = submit(relay, cluster.site)
    cluster.start(env={"MI_FAULT": name}).wait(60)
    cluster.start()
    info = outcome(relay, accept_id, 60)
    assert (info["status"], info["files"]["out.txt"]) == ("completed", b"x\n"), info
    with open(ledger) as text:
        assert len(text.readlines()) == 1
    assert cluster.runs() == [accept_id + ".1"]
