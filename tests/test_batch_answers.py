"""What batch systems and their users may say, and how programs of theirs may behave: read as what it is, or taken for no answer."""
import json
import os
import signal
import threading
import time

import pytest

from suite import wait_until as until
from test_poller import remote

ID = "0123456a-0000-4000-8000-0000000000%02d"


@pytest.fixture
def tools(tmp_path):
    """A function that makes a Queue below tmp_path whose programs are these shell scripts."""
    def make(system, **programs):
        for name, body in programs.items():
            (tmp_path / name).write_text("#!/bin/sh\n" + body + "\n")
            (tmp_path / name).chmod(0o755)
        return remote.BatchQueue(os.fsencode(str(tmp_path)), system, {"PATH": "%s:%s" % (tmp_path, os.environ["PATH"])})
    return make


def job_below(folder, queue, number=1, grace=600, poll=0.1):
    """A BatchJob that was begun (see submit()) in folder."""
    control = folder / (ID % number)
    control.mkdir()
    remote.prepare_control(os.fsencode(str(control)))
    job = remote.BatchJob(os.fsencode(str(control)), queue, poll, grace)
    job.begin(os.fsencode(str(folder)), ["/bin/true"], {}, ID % number + ".1", [])
    return job


def answered(queue):
    """The rows after one query; None if that was no answer."""
    before = queue.known["t"]
    queue.query(time.time(), [])
    queue.load()
    return None if queue.known["t"] == before else queue.rows


@pytest.mark.parametrize("system, said, number", [
    ("slurm", "123\n", "123"), ("slurm", "sbatch: Your project ends soon\nTotal: 5 hours\n123\n", "123"), ("slurm", "123;other\n", "123"),
    ("pbs", "123.server\n", "123.server"), ("pbs", "123[].server\n", "123[].server"), ("pbs", "quota: 90 % used\n123.server.site.org\n", "123.server.site.org"),
    ("pbs", "123\n", "123"), ("htcondor", "WARNING: the line 'foo' was unused\n7.0 - 7.0\n", "7.0")])
def test_the_number_of_a_job_is_found_among_warnings_clusters_and_brackets(tmp_path, tools, system, said, number):
    text = "printf '%%s' '%s'" % said.replace("'", "'\\''")
    queue = tools(system, **{remote.BATCH_SYSTEMS[system].submit("/c", "r.1", [])[0] if system != "htcondor" else "condor_submit": text})
    assert job_below(tmp_path, queue).submission["job"] == number


def test_clusters_federations_arrays_and_names_with_line_breaks_are_read():
    mark = ID % 1 + ".1"
    rows = remote.slurm_read("CLUSTER: a\n1_[2-9]|PENDING||Priority|mi-%s|%s\n1_1|RUNNING|n1|None|x\ny|PENDING|\n|z\n\nCLUSTER: b\n7|REVOKED||None|a|b\n" % (mark, mark))
    assert [(row.job, row.state, row.mark) for row in rows] == [("1_[2-9]", "queued", mark), ("1_1", "running", None), ("7", "running", None)]
    for garbage in ("<html>Bad gateway\n", "\0\7", "slurm_load_jobs error\n1|RUNNING|n1|None|x|y\n", "JOBID|STATE\n"):
        with pytest.raises(ValueError):
            remote.slurm_read(garbage)
    assert remote.slurm_read("") == []
    rows = remote.pbs_read("Job Id: 5[].server\n    job_state = B\n    Job_Owner = %s@host\n    Variable_List = A=1,MI_RUN=%s\n" % (me(), mark))
    assert [(row.job, row.state, row.mark) for row in rows] == [("5[].server", "queued", mark)]


def me():
    import pwd
    return pwd.getpwuid(os.geteuid()).pw_name


@pytest.mark.parametrize("owner, ours", [(me(), True), ("DOM\\" + me(), True), ("mallory", False)])
def test_a_mark_in_another_users_job_is_none(owner, ours):
    mark = ID % 1 + ".1"
    row, = remote.pbs_read("Job Id: 5.server\n    job_state = F\n    Job_Owner = %s@host\n    Variable_List = MI_RUN=%s\n" % (owner, mark))
    assert (row.mark == mark) == ours
    row, = remote.condor_read(json.dumps([{"ClusterId": 5, "ProcId": 0, "JobStatus": 3, "MIRun": mark, "Owner": owner}]))
    assert (row.mark == mark) == ours


def test_a_job_whose_owner_is_spelt_otherwise_is_known_by_its_number(tmp_path, tools):
    """A mark in it counts for nothing, its number does."""
    queue = tools("pbs", qsub="echo 5.server", qstat="printf 'Job Id: 5.server\\n    job_state = H\\n    Job_Owner = x.y@host\\n"
                  "    Variable_List = MI_RUN=%s.1\\n'" % (ID % 1))
    job = job_below(tmp_path, queue)
    until(lambda: job.current_state() and job.where == "queued (H)", 20)
    assert remote.batch_state(queue.folder, job.control) == ("queued", "queued (H)")


def test_odd_values_in_htcondors_answer_are_no_rows_of_ours():
    for mark in ('[1]', '"%s.1"' % (ID % 1)):
        row, = remote.condor_read('[{"ClusterId": 5, "ProcId": 0, "JobStatus": 99, "MIRun": %s, "RemoteHost": {}, "Owner": 7}]' % mark)
        assert (row.mark, row.state) == (None, "running")
    for garbage in ("[1]", "{", '{"a": 1}', '[{"ClusterId": "x", "ProcId": 0, "JobStatus": 1}]', "[null]", "[" * 100000, "7",
                    '[{"ClusterId": Infinity, "ProcId": 0, "JobStatus": 1}]'):
        with pytest.raises(ValueError):
            remote.condor_read(garbage)


def test_what_a_scheduler_says_steers_no_terminal_and_is_short(tools):
    mark = ID % 1 + ".1"
    queue = tools("slurm", squeue=r"""printf '1|RUNNING|n\033[31m1|\033]0;x\007%%s|mi-%s|\n' "$(head -c 3000000 /dev/zero | tr '\0' y)" """ % mark)
    row = answered(queue)[mark]
    assert row.node == "n\\x1b[31m1" and len(row.text) < 400 and "\x1b" not in row.text and "\7" not in row.text


@pytest.mark.parametrize("system, program", [("slurm", "squeue"), ("pbs", "qstat"), ("htcondor", "condor_q")])
def test_an_answer_without_end_is_none_and_costs_little(tools, system, program):
    queue, begun = tools(system, qselect="echo 8.server", **{program: "exec tr '\\0' x </dev/zero"}), time.monotonic()
    unknown_below(queue)
    assert answered(queue) is None and "without end" in queue.known["why"]
    assert time.monotonic() - begun < remote.QUERY_TIME / 2


def test_a_program_that_leaves_a_child_with_its_pipes_is_not_waited_for(tools, monkeypatch):
    monkeypatch.setattr(remote, "QUERY_TIME", 1)
    queue, begun = tools("slurm", squeue="setsid sleep 20 & echo $! >\"$(dirname \"$0\")/pid\""), time.monotonic()
    try:
        assert answered(queue) is None and time.monotonic() - begun < 15
    finally:
        with open(queue.folder + b"/pid") as text:
            os.kill(int(text.read()), signal.SIGKILL)


def unknown_below(queue):
    """A job whose number was never heard: its submitter died."""
    os.mkdir(queue.folder + b"/unknown")
    with open(queue.folder + b"/unknown/batch", "w") as out:
        out.write("{}")


@pytest.mark.parametrize("number", ["7.server", "8.server"])
def test_another_users_job_cannot_speak_for_ours(tmp_path, tools, number):
    """In PBS a variable may hold line breaks: what stands in it looks like rows of its own, with our mark and our name. So PBS is asked for ours only."""
    mark, me = ID % 1 + ".1", remote.user_name()
    row = "Job Id: %s\n    Job_Owner = %s@h\n    job_state = %s\n    Variable_List = MI_RUN=%s\n\n"
    forged = "Job Id: 3.server\n    Job_Owner = stranger@h\n    job_state = Q\n    Variable_List = X=y\n" + row % (number, me, "F", mark)
    (tmp_path / "forged").write_text(forged)
    (tmp_path / "ours").write_text(row % ("8.server", me, "Q", mark))
    said = """[ "$*" = "-f 8.server" ] || cat %s/forged\ncat %s/ours""" % (tmp_path, tmp_path)
    queue = tools("pbs", qselect='[ "$*" = "-u %s" ] && echo 8.server' % me, qstat=said)
    unknown_below(queue)
    rows = answered(queue)
    assert rows[mark].job == "8.server" and rows[mark].state == "queued" and set(rows) == {"8.server", mark}


def test_a_job_of_ours_is_found_among_a_hundred_thousand_of_others(tools):
    """Of the same user."""
    mark = ID % 1 + ".1"
    other = "Job Id: 7.server\n    job_state = Q\n    Variable_List = PBS_O_HOME=/home/user,%s\n\n" % ",".join("V%d=x" % n for n in range(60))
    ours = "Job Id: 8.server\n    job_state = R\n    exec_host = n1/0\n    Variable_List = PBS_O_HOME=/home/user,MI_R\n\tUN=%s\n\n" % mark
    queue = tools("pbs", qselect="echo 8.server", qstat="many() { yes '%s' | head -n 200000; }; many; printf '%s'; many" % (other.strip(), ours.replace("\n", "\\n").replace("\t", "\\t")))
    unknown_below(queue)
    assert answered(queue)[mark].job == "8.server"


def test_a_clock_that_is_set_back_stops_no_query_and_one_that_is_set_on_ends_no_job(tmp_path, tools, monkeypatch):
    queue = tools("slurm", sbatch="echo 5", squeue="echo asked >>$(dirname $0)/asked", sacct="exit 1")
    job, real = job_below(tmp_path, queue), time.time
    asked = tmp_path / "asked"
    until(lambda: job.current_state() and asked.exists(), 20)
    until(lambda: job.current_state() and len(job.unknown_since) > 1, 20)                  # the queue does not know it, since a moment
    monkeypatch.setattr(time, "time", lambda: real() + 86400)
    count = len(asked.read_text())
    until(lambda: job.current_state() and len(asked.read_text()) > count + 20, 20)
    assert job.current_state()[0] == "queued"
    monkeypatch.setattr(time, "time", lambda: real() - 86400)
    count = len(asked.read_text())
    until(lambda: job.current_state() and len(asked.read_text()) > count + 20, 20)
    assert job.current_state()[0] == "queued"


def test_the_grace_of_a_job_that_the_queue_does_not_know_goes_on_only_while_it_answers(tmp_path, tools, monkeypatch):
    monkeypatch.setattr(remote, "QUERY_TIME", 1)
    queue = tools("slurm", sbatch="echo 5", sacct="exit 1", squeue='test ! -e "$(dirname $0)/away"', scancel="exit 0")
    job = job_below(tmp_path, queue, grace=3)
    until(lambda: job.current_state() and len(job.unknown_since) > 1, 20)
    (tmp_path / "away").touch()
    since = time.monotonic()
    while time.monotonic() - since < 5:
        assert job.current_state()[0] == "queued"
        time.sleep(0.1)
    (tmp_path / "away").unlink()
    until(lambda: job.current_state() and job.unknown_since[0][1] > since + 5, 20)         # it begins anew
    assert job.current_state()[0] == "queued"
    assert "does not know job 5" in until(lambda: [detail for state, detail in [job.current_state()] if state == "lost"], 20)[0]


def test_a_submission_that_hangs_keeps_no_other_from_being_cancelled(tmp_path, tools, monkeypatch):
    monkeypatch.setattr(remote, "QUERY_TIME", 6)
    queue = tools("slurm", sbatch="touch $(dirname $0)/begun; exec sleep 600", squeue="exit 0")
    first = threading.Thread(target=job_below, args=(tmp_path, queue, 1))
    first.start()
    until((tmp_path / "begun").exists, 20)
    second = job_below(tmp_path, queue, 2)
    assert second.current_state()[0] == "queued" and second.submission["sent"] == 0 and second.where == "submitting"
    second.stop()
    assert second.current_state() == ("lost", "cancelled") and first.is_alive()
    first.join()


def test_a_job_that_was_started_and_waits_again_has_ended(tmp_path, tools):
    """Held, preempted, requeued: the wrapper would refuse a second start."""
    said = '[{"ClusterId": 5, "ProcId": 0, "JobStatus": 1, "MIRun": "%s"}]' % (ID % 1 + ".1")
    queue = tools("htcondor", condor_submit="echo 5.0 - 5.0", condor_q="echo '%s'" % said, condor_rm='echo "$@" >>$(dirname $0)/removed')
    job = job_below(tmp_path, queue, grace=1)
    until(lambda: job.current_state() == ("queued", None) and job.where == "queued (idle)", 20)
    os.rename(job.path(b"ready"), job.path(b"start"))
    assert job.current_state()[0] == "running"
    assert until(lambda: [detail for state, detail in [job.current_state()] if state == "lost"], 20) == ["htcondor: idle"]
    assert (tmp_path / "removed").read_text() == "5.0\n"


def test_a_program_that_is_away_for_a_moment_loses_no_submission(tmp_path, tools):
    queue = tools("slurm", squeue="exit 0")
    queue.env["PATH"] = str(tmp_path)
    job = job_below(tmp_path, queue)
    assert job.current_state()[0] == "queued" and "sbatch" in job.where
    tools("slurm", sbatch="echo 5")
    until(lambda: job.current_state() and job.submission["job"] == "5", 20)


@pytest.mark.parametrize("option", ["-M other", "--clusters=other"])
def test_a_cluster_is_named_to_all_programs_or_to_none(option):
    with pytest.raises(ValueError, match="SLURM_CLUSTERS"):
        remote.submit_options({"batch": "slurm", "batch_options": [option], "batch_changeable": []}, ())
    assert remote.CLIENT_ENV.match("SLURM_CLUSTERS") and not remote.CLIENT_ENV.match("SLURM_JOB_ID")
