"""OpenPBS: each answer of a real one is read as what it is, and a stand-in that gives the same answers runs a real poller's jobs. What was
found there is looked for in Slurm and HTCondor, too."""
import json
import os
import re
import shlex
import signal

import pytest

import batch_stand_in
import openpbs
import ssh_lab
import suite
from suite import wait_until as until
from test_batch import job_of, other, over_ssh      # noqa: F401
from test_batch_answers import ID, answered, job_below, tools      # noqa: F401
from test_poller import Host, OurWorld, clean_up, outcome, remote, submit

SAID = openpbs.dialogues()
KILLED_QSUB = "(from the poller's log, rc not recorded) server killed -9 while a qsub waits for its answer"
KILLED_QSTAT = "(from the poller's log, rc not recorded) server killed -9 while a qstat waits for its answer"


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    made = OurWorld(tmp_path_factory.mktemp("relay"))
    yield made
    made.close()


@pytest.fixture
def host(relay, tmp_path):
    """An external computer whose command `solve` goes through a stand-in of OpenPBS."""
    made = Host(tmp_path, relay.url, next(relay.free), relay.token)
    made.batch = lambda system, **keys: made.sections["command solve"].update(dict({"batch": system, "batch_poll": "0.3s"}, **keys))
    yield made
    clean_up(made)


@pytest.fixture
def pbs(host):
    folder = str(host.folder / "system")
    host.batch("pbs", **{"env.PATH": batch_stand_in.install(folder, "openpbs") + ":" + os.environ["PATH"], "batch_grace": "60s"})
    host.system = batch_stand_in.System(folder, "openpbs")
    host.calls = lambda: open(host.system.path("calls")).read().split("\n")
    yield host
    tidy(host.system)


def tidy(system):
    """Ends what a stand-in has running."""
    for job in system.jobs():
        if job["pid"]:
            try:
                os.killpg(job["pid"], signal.SIGKILL)
            except OSError:
                pass
        open(system.path("%d.deleted" % job["n"]), "w").close()
    if os.path.exists(system.path("background")):
        try:
            os.kill(int(open(system.path("background")).read()), signal.SIGKILL)
        except OSError:
            pass


def played(folder, name):
    """A program's body that says what was recorded under that title."""
    said = SAID[name]
    for what in ("out", "err"):
        (folder / (name_of(name) + "." + what)).write_text(getattr(said, what), encoding="utf-8")
    where = shlex.quote(str(folder / name_of(name)))
    return "cat %s.out; cat %s.err >&2; exit %d" % (where, where, 1 if said.code is None else said.code)


def name_of(title):
    return re.sub(r"\W+", "_", title)[:40]


# ---- what it says ----

STATES = [("running", "running", "R, "), ("held before start", "held", "held (u)"), ("queued, cannot run", "queued", "Can Never Run: Insufficient"),
          ("queued then held", "held", "Job held by calc"), ("running, qhold was asked", "running", "Job held by calc"),
          ("deleted while running, -f", "running", "R"), ("deleted while running, -x -f", "over", "exit status 271"),
          ("deleted while queued, -x -f", "over", "and terminated"), ("deleted while held, -x -f", "over", "F"),
          ("finished, -x -f", "over", "exit status 7"), ("suspended", "suspended", "S, "), ("after qdel -W force", "running", "E, "),
          ("held while running, then qrerun", "held", "Job held by root"), ("beyond its walltime", "over", "exceeded resource walltime"),
          ("beyond its memory", "over", "exceeded resource mem"), ("the wrapper's refusal of a second start", "done", "exit status 0"),
          ("array that runs, -f", "queued", "B, "), ("mom started again without -p: the job it had", "over", "exit status -4"),
          ("node away for longer than node_fail_requeue: -r n", "over", "exit status -20"),
          ("node away for longer than node_fail_requeue: -r y", "queued", "Not enough free nodes"),
          ("one running, one finished, one unknown", "running", "R, "),
          ("-E: one connection for all numbers; what is finished or unknown is left out, rc 0", "running", "R, ")]
NOTHING = ["deleted while running, later", "unknown, -f", "nothing known about all three", "-E, nothing of it is there", "history off: finished, -x -f"]
NO_ANSWER = ["garbage number", "server down: qstat", "with NoNewPrivileges=yes: qstat", "PBS_CONF_FILE that is not there: qstat",
             "with CapabilityBoundingSet=: qstat", KILLED_QSTAT]


def test_each_recorded_answer_of_qstat_is_read_as_what_it_is(tmp_path, tools):      # noqa: F811
    for title, state, words in STATES + [(title, None, "") for title in NOTHING]:
        queue = tools("pbs", qstat=played(tmp_path, title))
        rows = remote.pbs_read(queue.query_answer(["qstat"]))
        assert [row.state for row in rows] == [state] * bool(state), title
        assert all(words in row.text for row in rows), (title, rows)
        assert all(row.node in ("pbshost", "") for row in rows), (title, rows)
    for title in NO_ANSWER:
        with pytest.raises(ValueError):
            tools("pbs", qstat=played(tmp_path, title)).query_answer(["qstat"])


SLURM = "Batch job submission failed: "
REFUSALS = [("pbs", title, "final") for title in (
    "qsub refused: unknown queue", "qsub refused: unknown resource", "qsub refused: bad walltime", "qsub refused: bad option",
    "qsub refused: long name", "qsub refused: bad select", "qsub array -r n", "queue with resources_max.walltime 10 min", "a queue for others",
    "-o with Japanese")] + [("pbs", title, "passes") for title in (
        "queue with max_queued 1: second", "qsub refused: disabled queue", "server down: qsub", "with NoNewPrivileges=yes: qsub",
        "PBS_CONF_FILE that is not there: qsub", "qsub refused: unknown server", KILLED_QSUB)] + [
    ("pbs", "a hook refuses", "for a while"),
    ("slurm", SLURM + "Requested time limit is invalid (missing or exceeds some limit)", "final"),
    ("slurm", "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: " + SLURM + "Job violates accounting/QOS policy (job submit limit, user's "
     "size and/or time limits)", "final"),
    ("slurm", "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: " + SLURM + "Job violates accounting/QOS policy (job submit limit, user's "
     "size and/or time limits)", "passes"),
    ("slurm", SLURM + "Required partition not available (inactive or drain)", "passes"),
    ("slurm", SLURM + "Unable to contact slurm controller (connect failure)", "passes"),
    ("slurm", "sbatch: error: Munge encode failed: Failed to access \"/run/munge/munge.socket.2\": No such file or directory", "passes"),
    ("slurm", SLURM + "Invalid partition name specified", "final"),
    ("htcondor", "ERROR: Failed to commit job submission into the queue.\nERROR: Submit requirement MaxTime not met.", "final"),
    ("htcondor", "ERROR: Failed to commit job submission into the queue.\nERROR: Number of submitted jobs would exceed MAX_JOBS_PER_OWNER", "passes"),
    ("htcondor", "ERROR: Can't find address of local schedd", "passes")]


def test_a_refused_submission_is_final_or_passes_as_the_batch_system_means_it(tmp_path, tools):      # noqa: F811
    program = {"pbs": "qsub", "slurm": "sbatch", "htcondor": "condor_submit"}
    for number, (system, text, verdict) in enumerate(REFUSALS):
        body = played(tmp_path, text) if text in SAID else "echo %s >&2; exit 1" % shlex.quote(text)
        job = job_below(tmp_path, tools(system, **{program[system]: body}), number + 1)
        assert (bool(job.failed), bool(job.failing)) == (verdict == "final", verdict != "passes"), text
        assert job.why and remote.batch_state(job.queue.folder, job.control) == ("queued", "queued (%s)" % job.why), text


@pytest.mark.parametrize("kind, connections", [("openpbs", 1), ("torque", 4)])
def test_a_query_for_many_jobs_is_one_connection_where_qstat_can(tmp_path, kind, connections):
    """Each takes one of a few hundred privileged ports from all users of the host."""
    folder = str(tmp_path / "system")
    path = batch_stand_in.install(folder, kind)
    system = batch_stand_in.System(folder, kind)
    open(system.path("held"), "w").close()
    queue = remote.BatchQueue(os.fsencode(str(tmp_path)), "pbs", {"PATH": path + ":" + os.environ["PATH"]})
    try:
        jobs = [job_below(tmp_path, queue, number + 1) for number in range(4)]
        for _turn in range(2):
            open(system.path("connections"), "w").close()
            rows = answered(queue)
            assert [rows[job.submission["run"]].state for job in jobs] == ["queued"] * 4
            assert len(open(system.path("connections")).readlines()) == connections
    finally:
        tidy(system)


@pytest.mark.parametrize("system, state", [("slurm", "SUSPENDED"), ("pbs", "S"), ("htcondor", "7")])
def test_a_suspended_job_shows_as_suspended(tmp_path, tools, system, state):      # noqa: F811
    mark = ID % 1 + ".1"
    rows = {"slurm": "echo '5|SUSPENDED|n1|None|mi-%s|%s'" % (mark, mark), "pbs": played(tmp_path, "suspended"),
            "htcondor": "echo '[{\"ClusterId\": 5, \"ProcId\": 0, \"JobStatus\": 7, \"MIRun\": \"%s\", \"RemoteHost\": \"s@n1\"}]'" % mark}[system]
    words = {"slurm": ("sbatch", "echo 5", "squeue"), "pbs": ("qsub", "echo 5.pbshost", "qstat"), "htcondor": ("condor_submit", "echo 5.0 - 5.0", "condor_q")}
    queue = tools(system, **{words[system][0]: words[system][1], words[system][2]: rows})
    job = job_below(tmp_path, queue)
    os.rename(job.path(b"ready"), job.path(b"start"))
    until(lambda: job.current_state()[0] == "running" and re.search(r"running on \S+ \((SUSPENDED|S, .*|suspended)\)", job.where), 20)
    assert remote.batch_state(queue.folder, job.control)[1] == job.where


# ---- jobs ----

def test_a_command_that_ignores_term_ends_for_qdel_is_said_once(relay, pbs):
    """The mom's time between TERM and KILL begins anew with each qdel."""
    with open(pbs.system.path("kill_delay"), "w") as out:
        out.write("1.5")
    pbs.sections["command solve"]["batch_grace"] = "1s"
    pbs.script("solve", "trap '' TERM; while :; do sleep 0.1; done")
    pbs.start()
    accept_id = submit(relay, pbs.site)
    until(pbs.runs, 30)
    relay.client().ask("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})
    info = outcome(relay, accept_id, 30)
    assert info["reason"].startswith("cancelled") and pbs.calls().count("qdel") == 1, info


def test_what_outlives_its_grace_is_ended_by_force(relay, pbs):
    with open(pbs.system.path("kill_delay"), "w") as out:
        out.write("1000")
    pbs.sections["command solve"].update(grace="1s", batch_grace="1s")
    pbs.script("solve", "trap '' TERM; while :; do sleep 0.1; done")
    pbs.start()
    accept_id = submit(relay, pbs.site)
    until(pbs.runs, 30)
    relay.client().ask("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})
    assert outcome(relay, accept_id, 30)["reason"].startswith("cancelled") and pbs.calls().count("qdel") == 2


@pytest.mark.parametrize("system, cancel", [("slurm", "scancel"), ("pbs", "qdel"), ("htcondor", "condor_rm")])
def test_a_cancel_is_said_again_only_if_it_failed_also_by_the_next_process(tmp_path, tools, system, cancel):      # noqa: F811
    said = {"slurm": ("sbatch", "echo 5"), "pbs": ("qsub", "echo 5.pbshost"), "htcondor": ("condor_submit", "echo 5.0 - 5.0")}[system]
    queue = tools(system, **{said[0]: said[1], cancel: 'echo "$*" >>%s/said; [ -e %s/up ]' % (tmp_path, tmp_path)})
    job = job_below(tmp_path, queue, poll=0)
    assert not job.stop(600) and not job.stop(600)
    (tmp_path / "up").touch()
    assert job.stop(600) and job.stop(600)
    again = remote.BatchJob(job.control, queue, 0, 600)
    assert again.stop(600) and len((tmp_path / "said").read_text().split("\n")) == 4
    assert again.stop(0) and again.stop(0)
    words = (tmp_path / "said").read_text().split("\n")[3:-1]
    assert words == {"slurm": [], "pbs": ["-W force 5.pbshost"], "htcondor": []}[system]


def test_why_qsub_refuses_is_seen_everywhere_and_what_passes_is_waited_for(relay, pbs):
    with open(pbs.system.path("refuse"), "w") as out:
        out.write("queue with max_queued 1: second")
    pbs.start()
    accept_id, words = submit(relay, pbs.site), "queued (qsub: qsub: would exceed queue generic's per-user limit)"
    until(lambda: words in pbs.run("list").stdout, 30)
    assert json.loads(pbs.run("show", accept_id, "--json").stdout)["what"] == words
    client = relay.client()
    until(lambda: client.ask("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["what"] == words, 30)
    os.unlink(pbs.system.path("refuse"))
    assert outcome(relay, accept_id, 30)["status"] == "completed" and len(pbs.runs()) == 1


@pytest.mark.parametrize("wrapper", ["is killed, too", "notes the end"])
def test_a_job_that_the_admin_holds_and_reruns_ends_in_pbss_words_and_leaves_the_queue(relay, pbs, wrapper):
    pbs.sections["command solve"]["batch_grace"] = "1s"
    pbs.script("solve", "echo begun; echo $$ > pid; exec sleep 600")
    pbs.start()
    accept_id = submit(relay, pbs.site)
    until(lambda: pbs.runs() and (pbs.base / accept_id / "pid").exists() and (pbs.base / accept_id / "pid").read_text().strip(), 30)
    until(lambda: "running on" in pbs.text(), 30)
    job, = pbs.system.jobs()
    if wrapper == "notes the end":
        open(pbs.system.path("%d.requeued" % job["n"]), "w").close()
        os.kill(int((pbs.base / accept_id / "pid").read_text()), signal.SIGKILL)
        until((pbs.control(accept_id) / "end").exists, 20)
    pbs.system.requeue(job)
    info = outcome(relay, accept_id, 40)
    assert info["status"] == "abnormal" and "Job held by root" in info["reason"], info
    until(lambda: pbs.system.jobs()[0]["state"] == "F", 20)
    assert len(pbs.runs()) == 1


def test_a_calc_base_of_other_letters_than_ascii_and_variables_of_the_owner_go_through_pbs(relay, pbs):
    pbs.base = pbs.folder / "計算 base"
    pbs.poller["calc_base"] = str(pbs.base)
    pbs.sections["command solve"]["batch_options"] = "-v LICENCE=a,B=2 -l select=1 -vC=3"
    pbs.script("solve", "cat in.txt > out.txt")
    pbs.start()
    info = outcome(relay, submit(relay, pbs.site, {"in.txt": b"input"}), 30)
    assert (info["status"], info["files"].get("out.txt")) == ("completed", b"input"), info
    with open(pbs.system.path("1.v")) as text:
        assert re.fullmatch(r"MI_RUN=[0-9a-f-]{36}\.1,LICENCE=a,B=2,C=3", text.read())


def test_qsubs_background_process_keeps_no_lock_of_ours(tmp_path):
    folder = str(tmp_path / "system")
    path = batch_stand_in.install(folder, "openpbs")
    system = batch_stand_in.System(folder, "openpbs")
    open(system.path("held"), "w").close()
    try:
        job = job_below(tmp_path, remote.BatchQueue(os.fsencode(str(tmp_path)), "pbs", {"PATH": path + ":" + os.environ["PATH"]}))
        os.kill(int(until(lambda: open(system.path("background")).read(), 20)), 0)
        assert job.submission["job"] == "1.pbshost" and not job.under_way()
    finally:
        tidy(system)


@pytest.mark.parametrize("other", ["openpbs", "htcondor"], indirect=True)      # noqa: F811
def test_a_job_that_is_deleted_before_its_number_was_noted_is_not_submitted_again(relay, other):      # noqa: F811
    open(other.system.path("held"), "w").close()
    accept_id = submit(relay, other.site)
    other.start(env={"MI_FAULT": "submitted"}).wait(60)
    job, = other.system.jobs()
    open(other.system.path("%d.deleted" % job["n"]), "w").close()
    until(lambda: other.system.jobs()[0]["state"] == "F", 20)
    other.start()
    info = outcome(relay, accept_id, 40)
    assert info["status"] == "abnormal" and {"openpbs": "pbs: F", "htcondor": "removed"}[other.kind] in info["reason"], info
    assert len(other.system.jobs()) == 1 and not other.runs()


NEVER = [("pbs", "-J 1-3"), ("pbs", "-J1-3"), ("pbs", "-t 1-3"), ("pbs", "-I"), ("pbs", "-W block=true"), ("pbs", "-W umask=7,block=true"), ("pbs", "-z"),
         ("slurm", "--wait"), ("slurm", "-W"), ("slurm", "--test-only"), ("slurm", "--array=1-3"), ("slurm", "-a 1-3"), ("htcondor", "queue 3"), ("htcondor", "Queue")]
FINE = [("pbs", "-W umask=7 -l select=1 -A x-J"), ("slurm", "--wait-all-nodes=1 --account=a-W -A a"), ("htcondor", "queue_x = 3")]


def test_options_that_make_another_thing_of_a_job_are_refused_at_the_start(pbs):
    for system, option in NEVER + FINE:
        keys = {"batch": system, "batch_options": [option], "batch_changeable": []}
        if (system, option) in FINE:
            assert remote.submit_options(keys, ())[0]
            continue
        with pytest.raises(ValueError, match=re.escape(option.split(",")[0].split("=")[0])):
            remote.submit_options(keys, ())
    pbs.sections["command solve"]["batch_options"] = "-q long -J 1-3"
    done = pbs.run("poll", "--once")
    assert done.returncode == 78 and "batch_options: -J 1-3:" in done.stderr and suite.one_line(done.stderr), done.stderr


def test_a_full_disk_keeps_no_job_from_its_end_and_restarts_no_kill_timer(tmp_path, tools, monkeypatch):      # noqa: F811
    queue = tools("pbs", qsub="echo 5.pbshost", qdel="echo >>%s/said" % tmp_path)
    job = job_below(tmp_path, queue, poll=0)

    def full(*_words):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(remote, "write_synced", full)
    assert job.stop(600) and job.stop(600) and (tmp_path / "said").read_text() == "\n"
    job.submission_failed(1, "qsub: would exceed queue generic's per-user limit")
    assert "per-user limit" in job.why


def test_ten_thousand_jobs_are_one_query_that_is_quick_and_costs_little(tmp_path, tools):      # noqa: F811
    """Of a jobs' rows what nobody reads is dropped as it comes."""
    text = SAID["running"].out.replace("0123456a-0000-4000-8000-000000000001.1", "{mark}").replace("1.pbshost", "{job}").replace("calc@", remote.user_name() + "@")
    with open(str(tmp_path / "all"), "w") as out:
        for number in range(10000):
            out.write(text.replace("{mark}", "0123456a-0000-4000-8000-%012d.1" % number).replace("{job}", "%d.pbshost" % number))
    queue = tools("pbs", qselect="seq -f %.0f.pbshost 0 9999", qsub="echo pbs_version = 23", qstat="cat %s/all" % tmp_path)
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "batch").write_text("{}")
    rows = answered(queue)
    assert rows and len(rows) == 20000 and rows["0123456a-0000-4000-8000-000000009999.1"].job == "9999.pbshost"


# ---- a host that is not fit ----

def test_check_asks_the_batch_system_and_says_what_it_answered(pbs):
    done = pbs.run("check")
    assert "[command solve] pbs answers" in done.stdout, done.stdout
    with open(os.path.join(str(pbs.folder), "system", "bin", "qselect"), "w") as out:
        out.write("#!/bin/sh\n" + played(pbs.folder, "server down: qstat") + "\n")
    done = pbs.run("check")
    assert re.search(r"^FAIL.*\[command solve\] pbs does not answer: .*errno=15010", done.stdout, re.M) and done.returncode == 78, done.stdout


@pytest.mark.parametrize("system, program", [("pbs", "qselect"), ("slurm", "squeue")])
def test_what_needs_a_setuid_program_is_found_before_the_unit_takes_that_away(host, system, program):
    """As the programs of PBS behave under NoNewPrivileges. (Slurm's need none; a site's own in its place may.)"""
    suite.needs("setpriv")
    folder = host.folder / "bin"
    folder.mkdir()
    for name in remote.BATCH_SYSTEMS[system].programs.split():
        (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    (folder / program).write_text("#!/bin/sh\ngrep -q '^NoNewPrivs:.*0' /proc/self/status && exit 0\n%s\n" % played(host.folder, "with NoNewPrivileges=yes: qstat"))
    host.batch(system, **{"env.PATH": "%s:%s" % (folder, os.environ["PATH"])})
    unit, done = host.run("unit").stdout, host.run("check")
    assert ("NoNewPrivileges=yes" in unit) == (system != "pbs") and "ProtectSystem=full" in unit
    if system == "slurm":
        assert re.search("^FAIL.*slurm answers here, but not to a poller with NoNewPrivileges", done.stdout, re.M), done.stdout
        return
    assert not re.search("^(CapabilityBoundingSet|Restrict|SystemCall|ProtectKernel|ProtectClock|ProtectHostname)", unit, re.M)
    assert "[command solve] pbs answers" in done.stdout, done.stdout
    host.program = ["setpriv", "--no-new-privs"] + host.program            # a poller that an older unit has started
    host.start()
    until(lambda: "polling" in host.text(), 20)
    host.program = host.program[2:]
    done = host.run("check")
    assert re.search("^FAIL.*pbs answers here, but not to a poller with NoNewPrivileges", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "plain key"])
def test_over_ssh_a_batch_system_that_is_not_in_path_is_said_at_once(guard):
    lab = ssh_lab.Lab().start()
    try:
        lab.guard("[command solve]\nmatch = solve\nargv = /bin/true\nbatch = pbs\n")
        words = ["run", "guarded", "solve"] if guard else ["run", "hpc", "true", "--batch", "pbs"]
        code, text = over_ssh(lab, *words)
        assert code == 78 and "qsub: not found in PATH" in text and "env.PATH" in text, (code, text)
    finally:
        lab.close()
