"""The words that people have in their scripts, as a table: what came of them in the fielded programs, and what comes of them here.

Where it is another thing on purpose, README's "Moving over" says so."""
import os
import re
import signal
import subprocess
import sys

import fielded_stand_ins
import pytest
import suite
from suite import LOGS, SITE, wait_until
from test_fielded_clients import TOKEN, Lab, contents

LOOK = 'env -0 | tr "\\0" "\\n" | sort >env.txt; pwd >pwd.txt; ls -A >ls.txt; echo said'


class Old(Lab):
    """A fielded relay with a poller of ours; `look` tells what a command sees."""

    def __init__(self, folder):
        Lab.__init__(self, folder)
        path = os.path.join(self.here, "look")
        with open(path, "w") as out:
            out.write("#!/bin/sh\n%s\n" % LOOK)
        os.chmod(path, 0o755)
        self.relay.commands.append("look")
        with open(self.ini, "a") as out:
            out.write("[command look]\nargv = %s\nmatch = look\n" % path)

    def words(self, command, ins="in.dat", outs="out.dat", *more):
        return [self.url, SITE, TOKEN, command, ins, outs] + list(more)

    def whole(self, *words, env=None, folder=None):
        """(CompletedProcess, {name: bytes}) of a calculation in the fielded words."""
        folder = folder or self.folder()
        done = suite.run("mi_system_wf.py", *self.words(*words), cwd=folder, env=env)
        assert "Traceback" not in done.stderr, done.stderr
        return done, contents(folder)

    def registered(self):
        """The calc-info that was registered last."""
        return [fields for method, name, fields in self.relay.calls if name == "add-calcinfo"][-1]["calc-info"]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    made = Old(tmp_path_factory.mktemp("old"))
    made.server = made.poller()
    yield made
    made.close()


def no_input(old):
    done, found = old.whole("copy", "in.dat:absent:not/there:folder", "out.dat:absent")
    assert done.returncode == 64 and "not/there" in done.stderr        # a name with a directory kills a fielded poller
    done, found = old.whole("copy", "in.dat:absent", "out.dat:absent")
    assert (done.returncode, found["out.dat"]) == (0, b"an input\n"), done.stderr
    assert found["absent"] == b"" and re.search("absent: No such file.*empty file is sent", done.stdout)
    assert old.registered()["parameter_files"]["absent"] == ["", "", ""]


def parameters(old):
    old.whole("look", "in.dat", "out.dat", "-n 3")
    assert old.registered()["parameters"] == "-n 3"


def ends(old):
    for command, outs, code, says in (("copy", "out.dat", 0, "ended with 0"), ("fail", "out.dat", 1, "exit code 1 is this program's"),
                                      ("copy", "out.dat:never", 0, "never is missing"), ("unlisted", "out.dat", 1, "exit code 1 is")):
        done, found = old.whole(command, "in.dat", outs)
        assert done.returncode == code and says in done.stdout, done.stdout
        wrong = set(re.findall(r"exit code (\d+) is this", done.stdout)) - {str(code)}
        assert not wrong, done.stdout


def other_ends(old):
    assert suite.run("mi_system_wf.py", old.url, SITE, TOKEN, "copy", "in.dat").returncode == 64
    assert suite.run("mi_system_wf.py", old.url, SITE, TOKEN, "no such command", "", "").returncode == 77


def ctrl_c(old):
    old.server.stop()
    try:
        for sign, left in ((signal.SIGINT, 0), (signal.SIGTERM, 1)):
            process = suite.Process("mi_system_wf.py", old.words("copy"), old.folder())
            wait_until(lambda: "waiting" in process.text() or "not start" in process.text())
            before = len(old.relay.table)
            assert process.stop(sign) in (130, 75) and len(old.relay.table) == before - 1 + left, process.text()
    finally:
        old.relay.table.clear()
        old.server = old.poller()


def ca_bundle(old):
    cert, key = suite.make_certificate(old.folder())
    relay = fielded_stand_ins.Relay([SITE], ["copy"], [TOKEN])
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    relay.socket = context.wrap_socket(relay.socket, server_side=True)
    relay.start()
    url = "https://127.0.0.1:%d" % relay.server_port
    words, poller = [url, SITE, TOKEN, "none", "", ""], [SITE, url, TOKEN, "--once", "--ini", old.ini, "calc_base:" + old.folder()]
    try:
        for name, code in ((cert, 77), ("", 69), (old.here + "/none", 78)):
            env = suite.clean_env(**({"REQUESTS_CA_BUNDLE": name} if name else {}))
            done = suite.run("mi_system_wf.py", *words, env=env)
            assert done.returncode == code, done.stderr
            assert ("REQUESTS_CA_BUNDLE" in done.stderr) == (code == 78)
            done = suite.run("mi_system_remote.py", *poller, env=env)
            assert done.returncode == (0 if code == 77 else code), done.stderr
    finally:
        relay.stop()


def directories(old):
    done, found = old.whole("copy", "in.dat", "out.dat")
    path = os.path.join(old.here, "deep")
    with open(path, "w") as out:
        out.write("#!/bin/sh\nmkdir sub; echo deep >sub/out.txt\n")
    os.chmod(path, 0o755)
    folder = old.folder()
    old.relay.commands.append(path)
    theirs = subprocess.Popen([sys.executable, os.path.join(suite.HERE, "fielded_stand_ins.py"), "poller", SITE, old.url, TOKEN, "--base", folder, "--ask", "0.2",
                               "--take", "0.1"], stdout=subprocess.DEVNULL)
    old.server.stop()
    try:
        folder = old.folder()
        done = suite.run("mi_system_wf.py", *old.words(path, "in.dat", "sub/out.txt"), cwd=folder)
        assert done.returncode == 0, done.stdout
        with open(os.path.join(folder, "sub", "out.txt")) as text:
            assert text.read() == "deep\n"
    finally:
        theirs.kill()
        theirs.wait()
        old.server = old.poller()


def unknown_words(old):
    base = "calc_base:" + old.folder()
    done = suite.run("mi_system_remote.py", SITE, old.url, TOKEN, "retry:2", "whatever", "no_atuh", base, "--once", "--ini", old.ini)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "ignored" in line]
    assert len(lines) == 3 and "retry:2" in lines[0] and "whatever" in lines[1] and "no_auth" in lines[2], done.stderr
    done = suite.run("mi_system_remote.py", SITE, old.url, TOKEN, "port:x", base, "--once", "--ini", old.ini)
    assert done.returncode == 64 and suite.one_line(done.stderr)       # another port than the one that was meant is no harmless thing


def no_list(old):
    ini = os.path.join(old.folder(), "none.ini")
    with open(ini, "w"):
        pass
    done = suite.run("mi_system_remote.py", SITE, old.url, TOKEN, "--once", "--ini", ini)
    assert done.returncode == 78 and "argv = " in done.stderr


def seen(old, name):
    done, found = old.whole("look", "in.dat", "env.txt:pwd.txt:ls.txt")
    assert done.returncode == 0, done.stdout
    return found[name].decode().splitlines(), found


def environment(old):
    names = {line.split("=")[0] for line in seen(old, "env.txt")[0]}
    assert {"CALC_DIR", "MI_RUN", "PATH"} <= names <= {"CALC_DIR", "MI_RUN", "PATH", "HOME", "LANG", "LC_CTYPE", "LD_LIBRARY_PATH", "PWD", "SHLVL", "OLDPWD", "_"}, names


def where_stdout_lies(old):
    lines, found = seen(old, "ls.txt")
    assert not set(LOGS) & set(lines) and found[LOGS[0]] == b"said\n"


def where_it_runs(old):
    lines, found = seen(old, "pwd.txt")
    assert os.path.dirname(lines[0]) == old.base and os.stat(lines[0]).st_mode & 0o777 == 0o700


def client_files(old):
    runner, folder = suite.module("execute_remote_command.py"), old.folder()
    os.makedirs(os.path.join(folder, "d", "e"))
    for name in ("d/e/f", "d/.g", "one.csv", " odd"):
        open(os.path.join(folder, name), "w").close()
    for word, found in (("d/", ["d/.g", "d/e"]), ("d", ["d"]), ("*.csv", ["one.csv"]), ("*.none", ["*.none"]), (" one.csv ", ["one.csv"]),
                        (" odd", [" odd"]), ("", []), (" ", []), ("in.dat", ["in.dat"]), ("absent", ["absent"])):
        before = os.getcwd()
        os.chdir(folder)
        try:
            assert runner.fielded_files(word) == found, word
        finally:
            os.chdir(before)


def runners_end(old):
    runner = suite.module("execute_remote_command.py")
    assert runner.say_outcome(runner.Outcome("x", 3, "command", "ended 3", 0, []), True) == 3


def loglevel(old):
    path = os.path.join(old.folder(), "relay.ini")
    for level, code in (("4", 0), ("0", 0), ("5", 78)):
        with open(path, "w") as out:
            out.write("[Server]\nloglevel = %s\nstate_dir = %s\n" % (level, os.path.join(old.here, "state")))
        assert suite.run("mi_dicomapi.py", "list", "--ini", path).returncode == code


# (the words, what came of them in the fielded programs, what comes of them here, what "Moving over" says of a difference or "", the check)
TABLE = [
    ("an input that is not there", "said; sent empty; goes on", "the same", "", no_input),
    ("PARAMETERS", "delivered; a fielded poller ignores them", "the same", "", parameters),
    ("an end", "0, or 1 when abnormal; a missing result is a line", "the same", "", ends),
    ("wrong words, a refusal, a relay that is away", "1", "a code of the table", "everything that is not the calculation's own end", other_ends),
    ("Ctrl+C", "deletes a waiting calculation", "the same", "", ctrl_c),
    ("REQUESTS_CA_BUNDLE", "names the CA file", "the same, for all words; ca_file wins", "", ca_bundle),
    ("results with a directory", "work", "the same", "", directories),
    ("unknown words and retry:2 of the poller", "ignored", "ignored, with a line", "", unknown_words),
    ("a poller without a list", "runs whatever it is told", "78", "an allow-list", no_list),
    ("client_files: DIR/, *.dat, ~/x, a, b", "as a shell and rsync took them", "the same", "", client_files),
    ("an end of the SSH runner", "0 or 1", "the command's own code", "The SSH runner gives the command's own code", runners_end),
    ("[Server] loglevel", "0 to 4", "the same, and names", "", loglevel),
    ("the command's environment", "the poller's, with its token", "a few variables", "The command's environment", environment),
    ("where stdout lies", "in the command's directory", "beside it", "do not lie in the command's directory", where_stdout_lies),
    ("the directory", "/tmp/ACCEPT_ID", "calc_base/ACCEPT_ID, mode 700", "is prepared", where_it_runs)]


def moving_over():
    """README's "Moving over", its line breaks as blanks."""
    with open(suite.script("README.md"), encoding="utf-8") as text:
        return " ".join(re.search(r"\n## Moving over.*?\n## ", text.read(), re.S).group().split())


@pytest.mark.parametrize("words, fielded_outcome, ours, told, check", TABLE, ids=[row[0] for row in TABLE])
def test_each_fielded_word_does_what_it_did_or_moving_over_says_why_not(old, words, fielded_outcome, ours, told, check):
    check(old)
    assert told in moving_over() and bool(told) == ("the same" not in ours and "ignored" not in ours)


# ---- a registration whose answer was lost

def test_a_registration_whose_answer_was_lost_is_found_again_and_none_stays_behind(tmp_path):
    lab = Lab(tmp_path)
    try:
        lab.poller()
        lab.relay.lose += ["add-calcinfo"]
        done = lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
        assert done.returncode == 0 and lab.relay.names().count("add-calcinfo") == 1, done.stdout
        assert not lab.relay.table, "one stayed behind: it blocks the site"
        lab.relay.lose += ["add-calcinfo"]
        lab.gate.refuse["get-calcinfo"] = (403, b"<html>no</html>")
        done = lab.run("submit", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
        assert done.returncode == 0 and "does not show what it has" in done.stderr, done.stderr
    finally:
        lab.close()


def test_ctrl_c_with_a_registrations_answer_on_its_way_takes_it_back(tmp_path):
    lab = Lab(tmp_path)
    try:
        lab.relay.lose += ["add-calcinfo"]
        lab.relay.deaf += ["get-calcinfo"]             # then it pauses a second
        process = lab.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
        wait_until(lambda: lab.relay.table and not lab.relay.deaf)
        assert process.stop(signal.SIGINT, 30) == 130 and not lab.relay.table, process.text()
    finally:
        lab.close()


def test_on_a_fielded_relay_the_same_request_id_finds_its_calculation_until_its_result_was_fetched(tmp_path):
    lab = Lab(tmp_path)
    try:
        words = [SITE, "copy", "--in", "in.dat", "--out", "out.dat", "--request-id", "mine"]
        first, again = (lab.run("submit", *words).stdout for n in range(2))
        other = lab.run("submit", *(words[:1] + ["slow"] + words[2:])).stdout
        assert first == again and other not in (first, "") and len(lab.relay.table) == 2
        lab.relay.table.pop(other.strip())
        lab.poller()
        assert lab.run("run", *words).returncode == 0 and len(lab.runs()) == 1
    finally:
        lab.close()


# ---- on our relay

def test_on_our_relay_fielded_words_send_missing_inputs_empty_and_ctrl_c_deletes_what_waits_only(tmp_path_factory):
    world = suite.World(tmp_path_factory.mktemp("world"), tls=False, commands=["slow"]).start()
    folder, words = str(tmp_path_factory.mktemp("wf")), [world.url, SITE, world.token, "slow", "absent:absent", "out"]
    try:
        for number in range(2):
            process = suite.Process("mi_system_wf.py", words, folder)
            wait_until(lambda: len(process.text().split("not start")) > number + 1, what=process.text)
            accept_id = re.findall(r"[0-9a-f-]{36}", process.text())[-1]
            if number == 0:
                row, files, spool = world.picture(accept_id)
                assert [(one["name"], one["size"]) for one in files] == [("absent", 0)] and "empty file is sent" in process.text()
                assert process.stop(signal.SIGINT) == 130 and "deleted" in process.text()
                assert world.state_of(accept_id) in (None, "finished")
        path = os.path.join(world.folder, "slow")
        with open(path, "w") as out:
            out.write("#!/bin/sh\ncat absent; sleep 30\n")
        os.chmod(path, 0o755)
        world.poller({"slow": "argv = %s\nmatch = slow\n" % path})
        wait_until(lambda: world.state_of(accept_id) == "running")
        assert process.stop(signal.SIGINT) == 130 and "goes on" in process.text() and world.state_of(accept_id) == "running"
        assert world.workflow("cancel", accept_id).returncode == 0
    finally:
        world.close()
