"""From the module's line to the result in its directory: workflow side, relay and poller as processes, over TLS."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import suite
from suite import LOGS, SITE, wait_until

COMMANDS = {                   # what the external computer allows: sh scripts made by the fixture
    "copy": "cp in.txt out.txt; echo said; echo complained >&2",
    "fail": "cp in.txt out.txt; echo bad news >&2; exit 3",
    "killed": "kill -9 $$",
    "nothing": "true",
    "words": 'for word in "$@"; do echo "[$word]"; done >out.txt',
    "tree": "mkdir -p d/e; for n in 1 2 3; do echo $n >d/e/$n.dat; done; echo top >d/top.txt; echo no >other.txt; ln -s /etc/passwd d/link",
    "many": "mkdir r; i=0; while [ $i -lt 3000 ]; do echo $i >r/$i; i=$((i+1)); done",
    "names": "cat '入力 データ.txt' >'結果 1.txt'",
    "slow": "echo $$ >>../ran; sleep 2; echo done >out.txt",
    "where": 'echo "$CALC_DIR" >out.txt; pwd >>out.txt; env >>out.txt',
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A relay and one poller whose allow-list is COMMANDS."""
    made = suite.World(tmp_path_factory.mktemp("site"), commands=list(COMMANDS) + ["unlisted-there"]).start()
    sections = {}
    for name, text in COMMANDS.items():
        path = os.path.join(made.folder, name + ".sh")
        with open(path, "w", encoding="utf-8") as out:
            out.write("#!/bin/sh\n%s\n" % text)
        os.chmod(path, 0o755)
        sections[name] = "match = %s\nargv = %s\n" % (name, path)
    sections["words"] = sections["words"].rstrip() + "\n    {parameters}\nparameters = yes\nargument.1 = [a-z ;$()]+\nargument.2 = .*\n"
    made.poller(sections, ini="jobs = 4\n")
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path):
    """The module's directory, with an input."""
    (tmp_path / "in.txt").write_text("hello\n")
    return str(tmp_path)


def read(folder, name):
    with open(os.path.join(suite.os.fsencode(folder), name.encode()), encoding="utf-8") as text:
        return text.read()


def test_the_result_and_both_logs_come_back_and_nothing_else_appears(site, folder):
    done = site.workflow("run", SITE, "copy", "--in", "in.txt", "--out", "out.txt", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(folder, "out.txt") == "hello\n"
    assert (read(folder, LOGS[0]), read(folder, LOGS[1])) == ("said\n", "complained\n")
    assert sorted(os.listdir(folder)) == sorted(["in.txt", "out.txt"] + list(LOGS))


def test_the_exit_code_is_the_commands_own_and_its_files_and_logs_come_back_all_the_same(site, folder):
    done = site.workflow("run", SITE, "fail", "--in", "in.txt", "--out", "out.txt", cwd=folder)
    assert done.returncode == 3
    assert read(folder, "out.txt") == "hello\n" and read(folder, LOGS[1]) == "bad news\n"
    assert "3" in (done.stdout + done.stderr).strip().splitlines()[-1]


def test_a_command_killed_by_a_signal_ends_with_128_and_its_number(site, folder):
    assert site.workflow("run", SITE, "killed", "--out", "out.txt", cwd=folder).returncode == 137


def test_a_declared_result_that_is_missing_is_named_and_the_code_is_65(site, folder):
    done = site.workflow("run", SITE, "copy", "--in", "in.txt", "--out", "out.txt", "--out", "absent.dat", cwd=folder)
    assert done.returncode == 65 and "absent.dat" in done.stdout + done.stderr
    assert read(folder, "out.txt") == "hello\n"


def test_none_of_the_results_is_abnormal_and_65(site, folder):
    done = site.workflow("run", SITE, "nothing", "--out", "absent.dat", "--json", cwd=folder)
    assert done.returncode == 65 and json.loads(done.stdout.splitlines()[-1])["status"] == "abnormal"


def test_missing_inputs_are_all_named_and_nothing_is_registered(site, folder):
    before = len(site.client().ok("GET", "calc-progress", {"v": 2, "accept_id": site.client().register("copy")}))
    known = json.loads(suite.run("mi_dicomapi.py", "list", "--all", "--json", "--ini", site.ini).stdout)
    done = site.workflow("run", SITE, "copy", "--in", "no1", "--in", "in.txt", "--in", "no2", "--out", "out.txt", cwd=folder)
    assert done.returncode == 66 and "no1" in done.stderr and "no2" in done.stderr and before
    assert len(json.loads(suite.run("mi_dicomapi.py", "list", "--all", "--json", "--ini", site.ini).stdout)) == len(known)


def test_a_command_that_the_relays_list_lacks_is_refused_with_77(site, folder):
    done = site.workflow("run", SITE, "rm -rf /", "--out", "out.txt", cwd=folder)
    assert done.returncode == 77 and suite.one_line(done.stderr) and "rm -rf /" in done.stderr


def test_a_command_that_the_external_computers_list_lacks_is_refused_with_77_and_the_reason_comes_back(site, folder):
    done = site.workflow("run", SITE, "unlisted-there", "--out", "out.txt", cwd=folder)
    assert done.returncode == 77 and "unlisted-there" in done.stdout + done.stderr + read(folder, LOGS[1])


def test_parameters_reach_the_command_as_words_and_never_a_shell(site, folder):
    done = site.workflow("run", SITE, "words", "--param", "'a b;$(id)' '*'", "--out", "out.txt", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(folder, "out.txt") == "[a b;$(id)]\n[*]\n"


def test_a_parameter_off_its_pattern_is_refused(site, folder):
    assert site.workflow("run", SITE, "words", "--param", "NOT-LOWER x", "--out", "out.txt", cwd=folder).returncode == 77


def test_directories_and_patterns_come_back_and_a_link_does_not(site, folder):
    done = site.workflow("run", SITE, "tree", "--out", "d/", cwd=folder)
    found = sorted(os.path.relpath(os.path.join(above, name), folder) for above, names, files in os.walk(folder) for name in files)
    assert found == sorted(["in.txt", "d/e/1.dat", "d/e/2.dat", "d/e/3.dat", "d/top.txt"] + list(LOGS)), done.stdout + done.stderr
    done = site.workflow("run", SITE, "tree", "--out", "**/[1-2].dat", "--out", "d/e/?.dat", "--to", "p", cwd=folder)
    assert sorted(os.listdir(os.path.join(folder, "p", "d", "e"))) == ["1.dat", "2.dat", "3.dat"]


def test_three_thousand_files_go_in_and_come_back(site, folder):
    os.mkdir(os.path.join(folder, "i"))
    for n in range(3000):
        with open(os.path.join(folder, "i", "%d" % n), "w") as out:
            out.write("%d" % n * (n % 7))
    done = site.workflow("run", SITE, "many", "--in", "i/", "--out", "r/", cwd=folder, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(os.listdir(os.path.join(folder, "r"))) == 3000 and read(os.path.join(folder, "r"), "2999") == "2999\n"


def test_names_in_japanese_with_blanks_work_under_a_c_locale(site, folder):
    with open(os.path.join(os.fsencode(folder), "入力 データ.txt".encode()), "w", encoding="utf-8") as out:
        out.write("値\n")
    done = site.workflow("run", SITE, "names", "--in", "入力 データ.txt", "--out", "結果 1.txt", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(folder, "結果 1.txt") == "値\n"


def test_the_command_knows_its_directory_and_no_token(site, folder):
    assert site.workflow("run", SITE, "where", "--out", "out.txt", cwd=folder).returncode == 0
    lines = read(folder, "out.txt").splitlines()
    assert lines[0] == lines[1] and os.path.basename(lines[0]).count("-") == 4
    assert site.token not in "\n".join(lines)


def test_submit_status_wait_and_result_go_together(site, folder):
    done = site.workflow("submit", SITE, "copy", "--in", "in.txt", "--out", "out.txt", cwd=folder)
    accept_id = done.stdout.strip()
    assert done.returncode == 0 and len(accept_id) == 36
    done = site.workflow("wait", accept_id, cwd=folder)
    assert done.returncode == 0 and read(folder, "out.txt") == "hello\n"
    os.unlink(os.path.join(folder, "out.txt"))
    assert site.workflow("result", accept_id, cwd=folder).returncode == 0 and read(folder, "out.txt") == "hello\n"
    done = site.workflow("status", accept_id, "--json", cwd=folder)
    assert done.returncode == 0 and accept_id in done.stdout and "completed" in done.stdout


def test_the_fielded_words_still_work(site, folder):
    done = suite.run("mi_system_wf.py", site.url, SITE, site.token, "copy", "in.txt", "out.txt", cwd=folder, env=suite.clean_env(SSL_CERT_FILE=site.cert))
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(folder, "out.txt") == "hello\n"
    done = suite.run("mi_system_wf.py", site.url, SITE, site.token, "fail", "in.txt", "out.txt", cwd=folder, env=suite.clean_env(SSL_CERT_FILE=site.cert))
    assert done.returncode == 1


def test_a_module_that_was_killed_and_starts_again_finds_its_calculation(site, folder):
    words = ["run", SITE, "slow", "--in", "in.txt", "--out", "out.txt", "--request-id", "run-4711"]
    first = subprocess.Popen([suite.PYTHON, suite.script("mi_system_wf.py")] + words + site.reach(), cwd=folder, env=suite.clean_env(), stdout=subprocess.DEVNULL)
    ran = os.path.join(site.folder, "poller", "base", "ran")
    wait_until(lambda: os.path.exists(ran))
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = site.workflow(*words, cwd=folder)
    assert done.returncode == 0 and read(folder, "out.txt") == "done\n"
    with open(ran) as ledger:
        assert len(ledger.read().split()) == 1, "the command ran twice"


def test_run_can_be_imported_and_called(site, folder):
    text = ("import sys; sys.path.insert(0, %r)\nimport mi_system_wf\n"
            "found = mi_system_wf.run(%r, %r, 'copy', ['in.txt'], ['out.txt'], token=%r, ca_file=%r)\nprint(found.exit_code, found.status)\n"
            % (suite.ROOT, site.url, SITE, site.token, site.cert))
    done = subprocess.run([suite.PYTHON, "-c", text], cwd=folder, env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout.decode() == "0 completed\n", done.stderr.decode()


def test_a_poller_killed_under_a_running_command_brings_the_result_after_its_restart(make_world, tmp_path):
    world = make_world(commands=["slow"]).start()
    path = os.path.join(world.folder, "slow.sh")
    with open(path, "w") as out:
        out.write("#!/bin/sh\necho run >>%s/ledger\nsleep 3\necho done >out.txt\n" % world.folder)
    os.chmod(path, 0o755)
    sections = {"slow": "match = slow\nargv = %s\n" % path}
    poller = world.poller(sections)
    module = subprocess.Popen([suite.PYTHON, suite.script("mi_system_wf.py"), "run", SITE, "slow", "--out", "out.txt"] + world.reach(),
                              cwd=str(tmp_path), env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: os.path.exists(os.path.join(world.folder, "ledger")))
    poller.kill()
    time.sleep(1)
    world.poller(sections)
    out = module.communicate(timeout=60)[0].decode()
    assert module.returncode == 0, out
    with open(os.path.join(world.folder, "ledger")) as ledger:
        assert ledger.read() == "run\n"


def test_everybody_stays_small(site):
    sys.stdout.write("relay %d MiB, poller %d MiB\n" % (site.relay.peak() >> 20, site.pollers[0].peak() >> 20))
    assert site.relay.peak() <= 48 << 20 and site.pollers[0].peak() <= 48 << 20


def test_results_that_had_to_make_room_are_recognised_where_they_are_and_missed_elsewhere(site, folder):
    import shutil
    words = ["run", SITE, "copy", "--in", "in.txt", "--out", "out.txt", "--request-id", "killed after finish"]
    assert site.workflow(*words, cwd=folder).returncode == 0
    accept_id = site.rows("SELECT accept_id FROM calculations WHERE request_id = 'killed after finish'")[0]["accept_id"]
    shutil.rmtree(os.path.join(site.state, "spool", accept_id[:2], accept_id))
    os.mkdir(os.path.join(folder, ".mi-" + accept_id))
    open(os.path.join(folder, ".mi-" + accept_id, "1"), "w").close()                     # of a module that was killed while it fetched once more
    done = site.workflow(*words, cwd=folder)
    assert done.returncode == 0 and read(folder, "out.txt") == "hello\n", done.stderr
    assert sorted(os.listdir(folder)) == sorted(["in.txt", "out.txt"] + list(LOGS))
    done = site.workflow("result", accept_id, "--to", "elsewhere", cwd=folder)
    assert done.returncode == 77 and "out.txt is not here, and no longer at the relay" in done.stderr.strip().splitlines()[-1], done.stderr
