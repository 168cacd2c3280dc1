"""Output while a command runs, cancel, rerun, --deadline, --on-term: workflow side, relay and poller as processes."""
import os
import re
import subprocess
import time

import pytest
import suite
from suite import LOGS, SITE, wait_until

COMMANDS = {
    "talk": "for i in 1 2 3; do echo \"行 $i\"; printf 'bad \\033[31m %s\\n' $i >&2; sleep 1.2; done; echo done >out.txt; printf 'no line end'",
    "hang": "echo before; (setsid sleep 4711 &); sleep 4711",
    "twice": "case $MI_RUN in *.1) echo one; exit 3;; esac; echo two >out.txt",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = suite.World(tmp_path_factory.mktemp("live"), commands=list(COMMANDS)).start()
    sections = {}
    for name, text in COMMANDS.items():
        path = os.path.join(made.folder, name + ".sh")
        with open(path, "w", encoding="utf-8") as out:
            out.write("#!/bin/sh\n%s\n" % text)
        os.chmod(path, 0o755)
        sections[name] = "match = %s\nargv = %s\ngrace = 1s\n" % (name, path)
    made.sections = sections
    made.poller(sections, ini="jobs = 4\n")
    yield made
    made.close()


def start(site, folder, *words):
    """A workflow side that goes on by itself; stdout and stderr in one."""
    return subprocess.Popen([suite.PYTHON, "-I", "-S", suite.script("mi_system_wf.py")] + list(words) + site.reach(), cwd=str(folder),
                            env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def submit(site, folder, command):
    done = site.workflow("submit", SITE, command, "--out", "out.txt", cwd=str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def running(site, accept_id):
    wait_until(lambda: site.state_of(accept_id) == "running")


def test_output_comes_while_the_command_runs_whole_and_with_nothing_that_steers_a_terminal(site, tmp_path):
    made, seen = start(site, tmp_path, "run", SITE, "talk", "--out", "out.txt"), []
    for line in made.stdout:
        seen.append((time.monotonic(), line.decode("utf-8")))
    assert made.wait() == 0
    text, at = "".join(line for moment, line in seen), {line: moment for moment, line in seen}
    assert [line for moment, line in seen if line.startswith("行")] == ["行 1\n", "行 2\n", "行 3\n"]
    assert text.count("bad \\x1b[31m") == 3 and "\x1b" not in text and "no line end\n" in text
    assert at["行 1\n"] < seen[-1][0] - 0.5, "it came only at the end"


def test_quiet_shows_none_and_output_shows_it_on_demand(site, tmp_path):
    accept_id = submit(site, tmp_path, "talk")
    running(site, accept_id)
    done = site.workflow("output", accept_id, "--follow", cwd=str(tmp_path))
    assert done.returncode == 0 and "行 1\n" in done.stdout and done.stderr == ""
    done = site.workflow("wait", accept_id, "-q", cwd=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_output_no_keeps_it_until_the_end(site, tmp_path):
    world = suite.World(tmp_path / "silent", tls=False, commands=["talk"]).start()
    try:
        world.poller({"talk": site.sections["talk"]}, ini="output = no\n")
        done = world.workflow("run", SITE, "talk", "--out", "out.txt", cwd=str(tmp_path))
        assert done.returncode == 0 and done.stdout.index("行") > done.stdout.index("done")        # of the log that has come
        assert not [name for name in os.walk(world.state) if "live.out" in name[2]]
    finally:
        world.close()


def test_cancel_stops_the_tree_within_two_seconds_and_what_it_wrote_comes_back(site, tmp_path):
    accept_id = submit(site, tmp_path, "hang")
    running(site, accept_id)
    mark = "MI_RUN=%s." % accept_id
    wait_until(lambda: len(suite.processes_with(mark)) >= 4, what="wrapper, script, and both that sleep")
    time.sleep(1.5)
    done = site.workflow("cancel", accept_id, "--reason", "wrong input", cwd=str(tmp_path))
    told = time.monotonic()
    assert done.returncode == 0 and accept_id in done.stdout
    wait_until(lambda: not suite.processes_with(mark), 10)
    assert time.monotonic() - told < 2 + 1 + 1
    done = site.workflow("wait", accept_id, cwd=str(tmp_path))
    assert done.returncode in (143, 137)
    with open(os.path.join(os.fsencode(str(tmp_path)), LOGS[0].encode())) as text:
        assert text.read() == "before\n"
    assert site.rows("SELECT reason FROM calculations WHERE accept_id = ?", accept_id)[0]["reason"] == "cancelled: wrong input"
    assert site.workflow("cancel", accept_id, cwd=str(tmp_path)).returncode == 0, "asked twice"


def test_what_has_ended_cannot_be_cancelled_and_what_was_fetched_not_be_rerun(site, tmp_path):
    accept_id = submit(site, tmp_path, "twice")
    assert site.workflow("wait", accept_id, cwd=str(tmp_path)).returncode == 3
    for words in (("cancel", accept_id), ("rerun", accept_id)):
        done = site.workflow(*words, cwd=str(tmp_path))
        assert done.returncode == 77 and suite.one_line(done.stderr), (words, done)
    assert site.workflow("rerun", "0" * 36, cwd=str(tmp_path)).returncode == 64


def test_rerun_runs_it_once_more_and_forgets_the_output_of_before(site, tmp_path):
    accept_id = submit(site, tmp_path, "twice")
    wait_until(lambda: site.state_of(accept_id) == "got")
    assert site.workflow("rerun", accept_id, cwd=str(tmp_path)).returncode == 0
    done = site.workflow("wait", accept_id, cwd=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out.txt").read_text() == "two\n"
    assert site.rows("SELECT attempt FROM calculations WHERE accept_id = ?", accept_id)[0]["attempt"] == 2


def test_a_deadline_cancels_and_the_code_is_75(site, tmp_path):
    done = site.workflow("run", SITE, "hang", "--out", "out.txt", "--deadline", "2s", cwd=str(tmp_path))
    assert done.returncode == 75 and "deadline" in done.stdout.splitlines()[-1], done.stdout
    assert os.path.exists(os.path.join(os.fsencode(str(tmp_path)), LOGS[0].encode()))
    assert site.workflow("run", SITE, "talk", "--out", "out.txt", "--deadline", "60s", cwd=str(tmp_path)).returncode == 0


@pytest.mark.parametrize("word, times", [("leave", 1), ("cancel", 1), ("cancel", 3)])
def test_sigterm_leaves_the_calculation_or_cancels_it(site, tmp_path, word, times):
    """Also when it comes more than once, as `timeout` sends it: to the process and to its group."""
    made = start(site, tmp_path, "run", SITE, "hang", "--out", "out.txt", "--on-term", word)
    text = ""
    while "running" not in text:
        text += made.stdout.readline().decode()
    accept_id = re.search(r"[0-9a-f-]{36}", text).group()
    for _turn in range(times):
        made.terminate()
        time.sleep(0.004)
    text = made.communicate(timeout=20)[0].decode()
    assert made.returncode == 75 and (("wait " + accept_id) in text) == (word == "leave"), text
    assert accept_id in text.splitlines()[-1]
    if word == "cancel":
        wait_until(lambda: site.state_of(accept_id) == "got", 10)
    else:
        assert site.state_of(accept_id) == "running"
        assert site.workflow("cancel", accept_id, cwd=str(tmp_path)).returncode == 0


def test_several_are_waited_for_at_once(site, tmp_path):
    ids = [submit(site, tmp_path, command) for command in ("talk", "twice", "talk")]
    done = site.workflow("wait", *ids, cwd=str(tmp_path))
    assert done.returncode == 3, done.stdout
    assert sorted(os.listdir(str(tmp_path))) == sorted(ids) and "行" not in done.stdout
    assert (tmp_path / ids[2] / "out.txt").read_text() == "done\n"
