"""The guard of the SSH way over a real sshd: the key line, and the runner's own steps. (What its door refuses: test_ssh_door.py.)"""
import json
import os
import re
import shutil
import socket
import subprocess
import threading

import pytest

import ssh_lab
import suite
from ssh_door import WORK
from ssh_lab import SCRIPT
from suite import PYTHON
from test_ssh_runner import Stepwise



@pytest.fixture(scope="module")
def lab():
    one = ssh_lab.Lab(more="AcceptEnv EVIL\nPermitUserEnvironment no\nX11Forwarding yes\nXAuthLocation /bin/true")
    one.line = one.guard("\n[command work]\nargv = /bin/sh\n  %s\n  {parameters}\nmatch = work.sh\nargument.1 = [a-z]+\n[command big]\nargv = /bin/cp\n  -r\n  in\n  out\nmatch = big\n"
                         % one.path("work.sh"), python=PYTHON)
    one.write("work.sh", WORK % {"dir": one.dir} + "exit 3\n")
    one.write("secret", "TOP-SECRET")
    one.start()
    yield one
    one.close()


def run(lab, here, *words, **how):
    process = subprocess.Popen([PYTHON, SCRIPT, "--ini", lab.path("ini")] + list(words), cwd=str(here), env=lab.env(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = b""
    for row in iter(process.stdout.readline, b""):
        out += row
        if how.get("cut") and how["cut"] in row:
            lab.cut()
            how["cut"] = None
    return process.wait(), out.decode()


def test_the_runners_own_steps_pass(lab, tmp_path):
    (tmp_path / "a").write_text("1")
    code, out = run(lab, tmp_path, "run", "guarded", "work.sh abc", "--in", "a")
    assert code == 3 and (tmp_path / "b").read_text() == "1" and "args abc" in (tmp_path / "remote_program_exec.log").read_text(), out
    assert "refused" not in open(lab.path("far", ".mi", "guard.log")).read().replace("not_refused", "")
    ident = re.search(r"[0-9a-f-]{36}", out).group()
    assert ident in run(lab, tmp_path, "list", "guarded")[1]
    assert run(lab, tmp_path, "clean", ident)[0] == 0 and not os.path.exists(lab.path("far", ident))
    code, out = run(lab, tmp_path, "run", "guarded", "rm -rf x")
    assert code == 77 and "no [command NAME]" in out
    assert " refused guarded rm -rf x" in run(lab, tmp_path, "list")[1]


def test_large_and_many_files_streams_and_lost_lines_pass_the_guard(lab, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "big").write_bytes(os.urandom(70 << 20))
    for n in range(300):
        (folder / ("計 %d" % n)).write_bytes(os.urandom(n * 11))
    for cut in (b"4 inputs", b"5 start", b"7 results"):
        code, out = run(lab, tmp_path, "run", "guarded", "big", "--in", "in", "--streams", "3", cut=cut)
        assert code == 0, out
        subprocess.check_call(["diff", "-r", str(folder), str(tmp_path / "out")])
        shutil.rmtree(str(tmp_path / "out"))


def test_inputs_go_on_through_the_guard_when_the_line_was_lost(lab, tmp_path):
    shutil.copy(lab.path("ini"), str(tmp_path / "mi_distributed_computing_assist.ini"))
    (tmp_path / "a").write_bytes(os.urandom(64 << 20))             # 64 pieces
    one = Stepwise(lab, tmp_path, ["piece 40"], "run", "guarded", "work.sh abc", "--in", "a", "--streams", "2")
    one.reached("piece 40")
    lab.cut()
    one.go("piece 40")
    code, out = one.finish()
    assert code == 3 and int(re.search(r"4 inputs files=1 bytes=(\d+)", out).group(1)) <= 32 << 20, out
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_cancel_passes_the_guard(lab, tmp_path):
    process = subprocess.Popen([PYTHON, SCRIPT, "run", "--ini", lab.path("ini"), "guarded", "work.sh hold"], cwd=str(tmp_path), env=lab.env(), stdout=subprocess.PIPE)
    row = b""
    while b"5 start" not in row:
        row = process.stdout.readline()
    ident = re.search(r"[0-9a-f-]{36}", row.decode()).group()
    assert run(lab, tmp_path, "cancel", ident)[0] == 0
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_what_is_here_in_an_older_form_comes_whole(lab, tmp_path):
    lab.write("guard/mi_distributed_computing_assist.ini", open(lab.path("guard", "mi_distributed_computing_assist.ini")).read()
              + "[command same]\nargv = /bin/cp\n  state\n  state.bin\nmatch = same\n")
    data = os.urandom(12 << 20)
    (tmp_path / "state").write_bytes(data)
    (tmp_path / "state.bin").write_bytes(data[:-50] + b"y" * 50)
    code, out = run(lab, tmp_path, "run", "guarded", "same", "--in", "state", "-v")
    assert code == 0 and (tmp_path / "state.bin").read_bytes() == data, out
    assert re.search("8 fetch files=[23] bytes=%d" % len(data), out), out


# What the owner says of a command: (keys, what it does, exit code, in the runner's last line, results)
KEYS = {
    "timeout": ("timeout = 1s\n  grace = 1s", "echo 1 >r; exec sleep 600", 143, "timeout", set()),
    "pre": ("pre = %(dir)s/pre", "cat first >r", 0, "ended 0", {"first", "r"}),
    "prefails": ("pre = /bin/false", "echo 1 >r", 126, "pre: exit code 1", set()),
    "post": ("post = %(dir)s/post", "echo 1 >r; exit 3", 3, "ended 3", {"after", "r"}),
    "leaves": ("grace = 1s", "setsid sleep 600 <&- >&- 2>&- & echo 1 >r", 0, "ended 0", {"r"}),
    "alone": ("jobs = 1", "mkdir ../at_work || echo two >r; sleep 0.5; rmdir ../at_work", 0, "ended 0", set()),
}


@pytest.fixture(scope="module")
def keys():
    one = ssh_lab.Lab()
    text = ""
    for name, (lines, does, *_rest) in KEYS.items():
        one.write(name + ".sh", does + "\n")
        text += "[command %s]\nargv = /bin/sh\n  %s\nmatch = %s\n%s\n" % (name, one.path(name + ".sh"), name, lines.replace("\n  ", "\n") % {"dir": one.dir})
    for name, does in (("pre", "echo pre >first"), ("post", "cat r >after")):
        one.write(name, "#!/bin/sh\n%s\n" % does)
        os.chmod(one.path(name), 0o755)
    one.guard("[outbound]\ndeny_names = secret*\nkeep_refused = 1d\n" + text + "[command keeps]\nargv = /usr/bin/touch\n  r\n  secret\nmatch = keeps\n", python=PYTHON)
    yield one.start()
    one.close()


@pytest.mark.parametrize("name", sorted(KEYS))
def test_what_the_owner_says_of_a_command_holds_over_ssh_though_nobody_is_connected(keys, tmp_path, name):
    _lines, _does, code, said, results = KEYS[name]
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
    words = [PYTHON, SCRIPT, "--ini", keys.path("ini"), "run", "guarded", name]
    both = [subprocess.Popen(words, cwd=str(tmp_path / str(number)), env=keys.env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for number in ((1, 2) if name == "alone" else (1,))]
    if name in ("timeout", "post"):                    # also when the line is gone
        while b"5 start" not in both[0].stdout.readline():
            pass
        keys.cut()
    for number, process in enumerate(both, 1):
        out = process.communicate(timeout=60)[0].decode()
        assert process.returncode == code and said in out.splitlines()[-1], out
        came = set(os.listdir(str(tmp_path / str(number)))) - {"remote_program_exec.log"}
        assert came == results, (came, out)
        assert not suite.processes_with("MI_RUN=" + re.search("[0-9a-f-]{36}", out).group())


def test_what_the_rules_keep_goes_after_its_time_over_ssh(keys, tmp_path):
    code, out = run(keys, tmp_path, "run", "guarded", "keeps", "--allow-refused")
    ident = re.search("[0-9a-f-]{36}", out).group()
    assert code == 0 and "refused 1" in out and os.path.exists(keys.path("far", ident, "secret")), out
    fetched = keys.path("far", ".mi", ident, "fetched")
    os.utime(fetched, (os.path.getmtime(fetched) - 86500,) * 2)
    suite.wait_until(lambda: not os.listdir(keys.path("far", ".mi", "open")))
    os.mkdir(str(tmp_path / "next"))

    def swept():                                       # by the keeper of any later run
        assert run(keys, tmp_path / "next", "run", "guarded", "pre")[0] == 0
        return not os.path.exists(keys.path("far", ident))
    suite.wait_until(swept, 60)


def test_check_looks_at_the_host_as_it_is_with_and_without_the_guard(lab, tmp_path):
    for host, guard in (("guarded", "guard there"), ("hpc", "no guard there: this key may run anything")):
        code, out = run(lab, tmp_path, "check", host)
        levels = {row[6:].rstrip(): row[:5].strip() for row in out.splitlines() if " 2 bring " not in row}
        assert code == 0 and set(levels.values()) == {"OK"}, out
        assert guard in levels and re.search(r"OK    log-in in [0-9.]+ s, round trip [0-9.]+ ms\n", out)
        assert re.search(r"OK    python 3\.[0-9.]+ there, AES: (yes|no)\n", out)
        assert float(re.search(r"free there: ([0-9.]+) GB", out).group(1)) == pytest.approx(shutil.disk_usage(lab.dir).free / 1e9, rel=0.2)
    code, out = run(lab, tmp_path, "check", "nowhere.invalid", "--json")
    assert code == 78 and json.loads(out)[-1]["level"] == "FAIL" and "nowhere.invalid: ssh: Could not resolve hostname" in json.loads(out)[-1]["text"]


def test_check_leaves_nothing_on_a_host_where_nothing_was(lab, tmp_path):
    lab.write("new", open(lab.path("ini")).read().replace("base = ", "base = %s/" % tmp_path))
    before = sorted(os.listdir(lab.path("near")))
    code, out = run(lab, tmp_path, "check", "hpc", "--ini", lab.path("new"))
    assert code == 0 and "calculations there: 0" in out, out
    assert os.listdir(str(tmp_path)) == [] and sorted(os.listdir(lab.path("near"))) == before


# What guards and runners of ssh protocol 1 (21 to 28 Nov 2026) said, as they were heard; and what the other side makes of it.

def test_a_guard_of_the_protocol_before_is_told_in_one_line(lab, tmp_path):
    one = ssh_lab.Lab()
    try:
        one.forced("echo 'refused by the guard: an unknown verb' >&2; exit 77")        # what it said to our `2 door`
        for words in (["run", "hpc", "true"], ["list", "hpc"], ["check", "hpc"]):
            code, out = run(one, tmp_path, *words)
            last = out.splitlines()[-1]
            assert code == (78 if words[0] == "check" else 76) and out.count("older version (protocol 1)") == 1 and "hpc: its guard" in last, out
            assert "again_in" not in out and "runs on" not in out, out
    finally:
        one.close()


@pytest.mark.parametrize("verb, first", [("hold", b"mi_distcomp 1 hold\nthis guard speaks protocol 2: a newer execute_remote_command.py is needed\n"),
                                         ("lane", b""), ("rsync", b""), ("run", b"")])
def test_a_runner_of_the_protocol_before_prints_one_line(lab, tmp_path, verb, first):
    # it asked so, first always for `hold`; it skipped all before the line `mi_distcomp 1 hold`, and ended with 76 and the line behind that one
    asked = "exec sh -c 'eval \"$(printf %%b \"$1\")\"' mi_distcomp 'case $2 in\\0012esac' '1' '%s' '%s' '-'" % (verb, lab.path("far"))
    words = [PYTHON, lab.path("guard", "execute_remote_command.py"), "guard"]
    done = subprocess.run(words, input=b"ping\n", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(lab.env(), SSH_ORIGINAL_COMMAND=asked))
    assert (done.returncode, done.stdout, done.stderr) == (77, first, b"refused by the guard: an unknown verb\n"), done


def test_check_without_a_host_looks_at_the_guards_own_side(lab, tmp_path):
    os.makedirs(str(tmp_path / ".ssh"))
    (tmp_path / ".ssh" / "authorized_keys").write_text("# execute_remote_command.py is below\n" + lab.line.strip() + "\n")

    def check(script=lab.path("guard", "execute_remote_command.py")):
        done = subprocess.run([PYTHON, script, "check"], cwd=str(tmp_path), env=dict(lab.env(), HOME=str(tmp_path)), stdout=subprocess.PIPE)
        return done.returncode, done.stdout.decode()

    code, out = check()
    assert code == 0 and "OK    commands allowed: command work, command big" in out and "authorized_keys: 1 key lines with this guard" in out, out
    assert "OK    key line begins with restrict:" in out
    (tmp_path / ".ssh" / "authorized_keys").write_text(lab.line.replace("restrict,", ""))
    code, out = check(SCRIPT)
    assert code == 78 and "FAIL  commands allowed: none" in out and os.listdir(str(tmp_path)) == [".ssh"], "it changes nothing"
    code, out = check()
    assert code == 78 and re.search("^FAIL  key line begins with restrict:", out, re.M), out
    (tmp_path / ".ssh" / "authorized_keys").unlink()
    code, out = check(SCRIPT)                          # the workflow system's side: no guard, nothing of one is asked for
    assert code == 78 and out.count("\n") == 1 and "no guard is here" in out and "check HOST" in out, out


def ssh(lab, *words, **how):
    return subprocess.run(["ssh", "-F", lab.path("config"), "-o", "BatchMode=yes"] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=20, **how)


@pytest.fixture
def agent():
    """An ssh-agent's socket."""
    process = subprocess.Popen(["ssh-agent", "-D"], stdout=subprocess.PIPE)
    yield re.search(rb"SSH_AUTH_SOCK=([^;]+);", process.stdout.readline()).group(1).decode()
    process.kill()
    process.communicate()


def answering():
    """A port that says hello to whoever connects."""
    goal = socket.socket()
    goal.bind(("127.0.0.1", 0))
    goal.listen(5)

    def serve():
        while True:
            try:
                one, _peer = goal.accept()
            except OSError:
                return
            one.sendall(b"hello")
            one.close()
    threading.Thread(target=serve, daemon=True).start()
    return goal


def with_key(lab, line):
    lab.keys = [lab.keys[0], line]
    lab.authorize()


@pytest.mark.parametrize("restricted", [True, False])
def test_the_key_line_allows_no_forwarding_no_agent_no_x11_and_no_terminal(lab, agent, restricted):
    lab.write("probe", "#!/bin/sh\ntty\nenv\n")
    os.chmod(lab.path("probe"), 0o755)
    line, goal = re.sub('command="[^"]*"', 'command="%s"' % lab.path("probe"), lab.line), answering()
    with_key(lab, line if restricted else line.replace("restrict,", ""))       # the mutation: without the one word
    try:
        there = ssh(lab, "-A", "-o", "IdentityAgent=SSH_AUTH_SOCK", "-Y", "guarded", env=dict(os.environ, SSH_AUTH_SOCK=agent, DISPLAY=":99")).stdout
        assert b"SSH_CONNECTION=" in there
        got = {
            "port": b"hello" in ssh(lab, "-W", "127.0.0.1:%d" % goal.getsockname()[1], "guarded").stdout,
            "remote port": ssh(lab, "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1", "guarded").returncode == 0,
            "agent": b"SSH_AUTH_SOCK=" in there,
            "x11": b"DISPLAY=" in there,
            "terminal": b"/dev/" in ssh(lab, "-tt", "guarded").stdout,
        }
        if os.geteuid():
            del got["terminal"]                        # an sshd that is not root's gives none to anybody
        assert set(got.values()) == {not restricted}, got
    finally:
        goal.close()
        with_key(lab, lab.line)


@pytest.mark.parametrize("guarded", [True, False])
def test_the_key_line_allows_no_shell_no_subsystem_and_no_environment(lab, guarded):
    with_key(lab, lab.line if guarded else open(lab.path("gid.pub")).read())   # the mutation: a key line without the guard
    try:
        got = {
            "sftp": subprocess.run(["sftp", "-F", lab.path("config"), "-b", "-", "guarded"], input=b"ls\n", stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE).returncode == 0,
            "scp": subprocess.run(["scp", "-O", "-F", lab.path("config"), "guarded:" + lab.path("secret"), lab.path("stolen")],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE).returncode == 0,
            "environment": ssh(lab, "-o", "SendEnv=EVIL", "guarded", "echo $EVIL", env=dict(os.environ, EVIL="evil")).stdout == b"evil\n",
            "shell": ssh(lab, "guarded", "cat", lab.path("secret")).stdout == b"TOP-SECRET",
        }
        assert set(got.values()) == {not guarded}, got
    finally:
        with_key(lab, lab.line)


def test_the_key_line_is_one_line_that_sshd_understands(lab):
    assert lab.line.startswith("restrict,command=\"") and lab.line.count("\n") == 1 and " -I -S " in lab.line
