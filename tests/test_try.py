"""`try`: a command of an external computer's list on its own files, by the way that a calculation goes, without a relay."""
import json
import os
import signal

import pytest

import suite
from suite import wait_until

POLLER = "mi_system_remote.py"
COMMAND = """#!/bin/sh
echo "$@" >said; cat steel.json sub/loads.csv said >life.json; echo secret >table.secret; mkdir -p frames; echo 1 >frames/1.png
echo printed; . ./end
"""


@pytest.fixture
def host(tmp_path):
    """A host with a poller's ini; in(): its words there."""
    class Host:
        base, folder = tmp_path / "base", tmp_path / "files"

        def say(self, *words, **more):
            return suite.run(POLLER, *(list(words) + ["--ini", str(tmp_path / "ini")]), cwd=str(self.folder), **more)

        def tries(self):
            return sorted((self.base / "try").iterdir()) if (self.base / "try").exists() else []

    path = tmp_path / "command"
    path.write_text(COMMAND)
    path.chmod(0o755)
    (tmp_path / "ini").write_text("[poller]\ncalc_base = %s\n[command fatigue]\nmatch = fatigue_life\nargv = %s\n  {parameters}\nargument.1 = [0-9]+\n"
                                  "argument.2 = fine\ninput_names = *.json *.csv end sub/\n[outbound]\ndeny_names = *.secret\n" % (Host.base, path))
    (tmp_path / "ini").chmod(0o600)
    (Host.folder / "sub").mkdir(parents=True)
    for name, text in (("steel.json", "steel\n"), ("sub/loads.csv", "loads\n"), ("end", "exit 0\n"), ("bad.exe", "x")):
        (Host.folder / name).write_text(text)
    return Host()


def test_it_shows_argument_vector_directory_and_end_and_what_would_leave_and_which_rule_keeps_the_rest(host, tmp_path):
    done = host.say("try", "fatigue_life", "steel.json", "sub/", "end", "--param", "12 fine")
    assert (done.returncode, done.stderr) == (65, ""), done
    folder, = host.tries()
    assert 'argument vector: ["%s", "12", "fine"]\n' % (tmp_path / "command") in done.stdout
    assert "directory: %s\n" % (folder / "work") in done.stdout and (folder / "work" / "life.json").read_text() == "steel\nloads\n12 fine\n"
    assert "ended with 0 (its own exit code)" in done.stdout and "65" in done.stdout.splitlines()[-1]
    leaves = [line.split(": ")[1].split(" (")[0] for line in done.stdout.splitlines() if line.startswith("would leave: ")]
    assert set(leaves) >= {"life.json", "frames/1.png", suite.LOGS[0], suite.LOGS[1]} and "stays here: table.secret (deny_names)\n" in done.stdout
    assert (folder / "control" / "stdout").read_text() == "printed\n"


def test_what_is_asked_for_by_name_and_how_it_ends_are_as_a_workflow_would_see_them(host):
    words = ["try", "fatigue_life", "steel.json", "L=sub/loads.csv", "end", "--param", "7", "--json", "--out", "life.json"]
    refused = host.say(*words)
    assert refused.returncode == 77 and "input_names does not allow L" in refused.stderr and not host.tries()
    words[3] = "sub/loads.csv"
    done = host.say(*words)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and set(found["leaves"]) == {"life.json"} | set(suite.LOGS) and found["argv"][1:] == ["7"] and not found["stays"], done
    (host.folder / "end").write_text("exit 3\n")
    done = host.say(*(words + ["none.dat"]))
    found = json.loads(done.stdout)
    assert done.returncode == 3 and found["command_exit_code"] == 3 and found["verdicts"]["missing"] == {"count": 1, "names": ["none.dat"]}, done


@pytest.mark.parametrize("words, code, says", [
    (["other", "steel.json"], 77, "not in this host's list"), (["fatigue_life", "steel.json", "--param", "12 coarse"], 77, "argument.2 does not allow coarse"),
    (["fatigue_life", "bad.exe"], 77, "input_names does not allow bad.exe"), (["fatigue_life", "gone.json"], 66, "gone.json is not a file"),
    (["fatigue_life", "steel.json", "STEEL.json=steel.json", "steel.json"], 64, "inputs: ")])
def test_what_the_gate_refuses_is_refused_in_one_line_and_leaves_nothing(host, words, code, says):
    done = host.say("try", *words)
    assert done.returncode == code and says in done.stderr and suite.one_line(done.stderr) and not host.tries(), done


def test_ctrl_c_ends_the_command_as_a_cancel_does(host):
    (host.folder / "end").write_text("echo begun; sleep 60\n")
    process = suite.Process(POLLER, ["try", "fatigue_life", "steel.json", "sub/", "end", "--ini", str(host.base.parent / "ini")], str(host.folder))
    wait_until(lambda: host.tries() and "begun" in ((host.tries()[0] / "control" / "stdout").read_text()
                                                    if (host.tries()[0] / "control" / "stdout").exists() else ""), what=process.text)
    os.kill(process.popen.pid, signal.SIGINT)
    assert process.popen.wait(30) == 143 and "ended with 143" in process.text(), process.text()
    assert not suite.processes_with("MI_RUN=try.")


def test_the_directories_of_tries_go_after_keep_workdirs_and_no_calculation_is_one(host):
    assert host.say("try", "fatigue_life", "steel.json", "sub/", "end", "--out", "said").returncode == 0
    first, = host.tries()
    os.utime(str(first / "control" / "end"), (1, 1))
    assert host.say("try", "fatigue_life", "steel.json", "sub/", "end", "--out", "said").returncode == 0
    assert len(host.tries()) == 1 and host.tries() != [first] and "try" not in host.say("list").stdout
