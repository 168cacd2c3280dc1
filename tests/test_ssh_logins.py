"""The SSH runner and what a log-in may be: rc files that print, exit or start another shell, closed hosts, several nodes with one home;
and who reads, or ends, the runner itself."""
import json
import os
import pathlib
import signal
import shutil
import subprocess
import time

import pytest

import ssh_lab
import suite
from test_ssh_runner import HOOKED, Stepwise, ident_of, own, run, runner, start         # noqa: F401 (own: a fixture)

NODE = """#!/bin/sh
# node NAME BOOT COMMAND: the same home, another host: a name and a boot of its own
exec unshare -m -u sh -c 'hostname "$1"; mount --bind "$2" /proc/sys/kernel/random/boot_id; mount --bind "$2" /etc/machine-id; shift 2; exec "$@"' sh "$@"
"""


@pytest.fixture
def here(tmp_path):
    """The module's directory."""
    return tmp_path


def log_in(own, rc):
    """Starts sshd; the log-in shell there, bash, reads this text as its .bashrc first."""
    own.write("rc", rc)
    return own.forced('. %s; exec sh -c "$SSH_ORIGINAL_COMMAND"' % own.path("rc"))


@pytest.mark.parametrize("rc", ["printf '\\033]0;host\\007'", "echo Welcome; printf 'mi_distcomp '", "yes | head -n 20000; printf '100%% '"],
                         ids=["title", "half our line", "much"])
def test_a_log_in_that_prints_text_without_a_line_end_is_no_harm(own, here, rc):
    log_in(own, rc)
    (here / "a").write_text("1")
    code, out = run(own, here, "run", "hpc", "cat a >b; echo 2 >c", "--in", "a")
    assert code == 0 and (here / "b").read_text() == "1" and (here / "c").read_text() == "2\n", out
    assert run(own, here, "list", "hpc")[0] == 0


@pytest.mark.parametrize("rc", ["exit 0", "echo you have mail; exit 3", "exec tcsh", "exec cat"])
def test_an_rc_file_that_exits_or_starts_another_shell_is_said_at_once(own, here, rc):
    own.write("ini", open(own.path("ini")).read().replace("connect = 6s", "connect = 1s"))
    log_in(own, rc)
    began = time.monotonic()
    code, out = run(own, here, "run", "hpc", "true")
    last = out.splitlines()[-1]
    assert code == 78 and ".bashrc" in last and "hpc" in last and "again_in" not in out and "runs on" not in out, out
    assert time.monotonic() - began < 60


def test_a_host_that_is_closed_for_users_is_said_in_its_own_words_and_nothing_was_started_there(here):
    suite.needs("root", "unshare")
    if os.geteuid() != 0:
        suite.pytest.skip("needs root itself: mount namespaces")
    etc = here / "etc"
    shutil.copytree("/etc", str(etc), symlinks=True, ignore_dangling_symlinks=True)
    (etc / "nologin").write_text("hpc is down until Monday\n")
    with open(str(etc / "passwd"), "a") as accounts:
        accounts.write("miuser:x:4321:4321::%s:/bin/sh\n" % here)
    with open(str(etc / "shadow"), "a") as accounts:
        accounts.write("miuser:*:19000:0:99999:7:::\n")
    os.chmod(str(here), 0o755)
    own = ssh_lab.Lab(prefix=["unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc; exec "$@"', str(etc)])
    try:
        own.write("config", open(own.path("config")).read().replace("User root", "User miuser"))
        for place in (own.dir, own.path("authorized_keys")):
            os.chmod(place, 0o755)
        own.start()
        code, out = run(own, here, "run", "hpc", "true", "--retry", "1,1")
        last = out.splitlines()[-1]
        assert code == 69 and "hpc is down until Monday" in last and "given up" in last and "nothing was started there" in last, out
        assert "runs on" not in out
    finally:
        own.close()


def test_a_user_without_an_account_here_is_told_so_at_once(own, here):
    suite.needs("root", "setpriv")
    if os.geteuid() != 0:
        suite.pytest.skip("needs root itself: other users")
    own.start()
    for place in (own.dir, own.path("config"), own.path("ini"), own.path("known_hosts"), own.path("state")):
        os.chmod(place, 0o755)
    os.chown(own.path("ini"), 54321, -1)
    os.chown(own.path("state"), 54321, -1)
    os.chown(own.dir, 54321, -1)
    words = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", suite.python_for_others(), ssh_lab.SCRIPT, "--ini", own.path("ini"), "run", "hpc", "true", "--to", own.path("state", "to")]
    done = subprocess.run(words, cwd="/", env=own.env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    out = done.stdout.decode()
    assert done.returncode == 78 and "No user exists for uid 54321" in out.splitlines()[-1] and "again_in" not in out, out


def test_given_up_before_anything_was_started_does_not_say_that_it_runs_on(own, here):
    code, out = run(own, here, "run", "hpc", "true", "--retry", "1,1")
    last = out.splitlines()[-1]
    assert code == 69 and "nothing was started there" in last and "resume " + ident_of(out) in last, out


def test_a_host_that_has_no_session_left_is_asked_again(own, here):
    own.forced("if mkdir %s 2>/dev/null; then echo; echo mi_distcomp 2 no 75 all are taken; exit 75; fi; exec sh -c \"$SSH_ORIGINAL_COMMAND\"" % own.path("once"))
    code, out = run(own, here, "run", "hpc", "echo 1 >r")
    assert code == 0 and (here / "r").exists() and 'lost="hpc: all are taken" again_in' in out, out


@pytest.mark.parametrize("redirect", ["| head -n 1", ">/dev/full", ">&-", "2>&- >&-"])
def test_results_come_whatever_becomes_of_who_reads_the_output(own, here, redirect):
    own.start()
    command = "i=0; while [ $i -lt 3000 ]; do echo a line of the log $i; i=$((i+1)); done; echo 1 >r; sleep 0.2; exit 3"
    line = '"$@" %s' % redirect
    env = dict(own.env(), SAY=command)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line, "sh"] + own.words("run", "hpc", command), cwd=str(here), env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert (here / "r").read_text() == "1\n" and done.returncode == 3 and b"Traceback" not in done.stderr, done
    rows = [json.loads(row) for row in run(own, here, "list", "--json")[1].splitlines()]
    assert [row["state"] for row in rows] == ["finished"], rows


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
@pytest.mark.parametrize("when", ["before the start", "while it runs"])
def test_a_signal_ends_the_runner_with_the_uuid_and_the_way_to_go_on(own, here, number, code, when):
    if when == "while it runs":
        own.start()
    process = start(own, here, "run", "hpc", "sleep 1; echo 1 >r")
    row = b""
    while (b"5 start" if when == "while it runs" else b"again_in") not in row:
        row = process.stdout.readline()
        assert row
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0].decode()
    assert process.returncode == code, rest
    assert "execute_remote_command.py resume " + ident_of(row.decode()) in rest.splitlines()[-1], rest
    assert ("runs on there" in rest) == (when == "while it runs"), rest
    if when != "while it runs":
        own.start()
    assert run(own, here, "resume", ident_of(row.decode()))[0] == 0 and (here / "r").exists()


def test_a_directory_for_the_results_that_is_not_there_is_made(own, here):
    own.start()
    code, out = run(own, here, "run", "hpc", "echo 1 >r", "--to", "new/deeper")
    assert code == 0 and (here / "new" / "deeper" / "r").exists(), out


def test_what_was_refused_has_ended_in_the_list(own, here):
    own.start()
    os.makedirs(own.path("far", ".mi"))
    os.chmod(own.path("far"), 0o777)
    code, out = run(own, here, "run", "hpc", "true")
    assert code == 77, out
    row, = [json.loads(row) for row in run(own, here, "list", "--json")[1].splitlines()]
    assert (row["state"], row["code"]) == ("refused", 77), row


def test_a_session_there_that_breaks_while_it_is_written_to_is_a_lost_line(own, here):
    own.start()
    (here / "a").write_text("1")
    code, out = run(own, here, "run", "hpc", "echo 1 >r", "--in", "a", code=HOOKED % (ssh_lab.SCRIPT, """
real = runner.Session.send
def send(self, do, words=(), data=(), **more):
    if do in ("put", "start", "results", "get") and do not in seen:
        seen.add(do)
        self.process.kill()
        self.process.wait()
    real(self, do, words, data, **more)
runner.Session.send = send"""))
    assert code == 0 and (here / "r").read_text() == "1\n" and out.count("again_in") == 4, out


class TwoNodes(ssh_lab.Lab):
    """Two log-in nodes with one home, of which only `base` (on a disk that both have) is looked at: the name hpc leads to one or the other."""

    def __init__(self, folder):
        ssh_lab.Lab.__init__(self)
        subprocess.check_call(["mount", "-t", "ramfs", "-o", "mode=700", "ramfs", self.path("far")])
        self.ports, self.daemons = [self.port, ssh_lab.free_port()], []
        (folder / "node").write_text(NODE)
        (folder / "boot").write_text("00000000-1111-4222-8333-444444444444\n")
        text = open(self.path("sshd_config")).read()
        for number, port in enumerate(self.ports):
            self.write("sshd%d" % number, text.replace("Port %d\n" % self.port, "Port %d\n" % port).replace("sshd.pid", "sshd%d.pid" % number))
            at = [["sh", str(folder / "node"), "node2", str(folder / "boot")], []][number == 0]
            self.daemons.append(subprocess.Popen(at + [ssh_lab.SSHD, "-D", "-f", self.path("sshd%d" % number), "-E", self.path("log%d" % number)]))
        with open(self.path("known_hosts")) as known:
            row = known.read()
        self.write("known_hosts", row + row.replace(str(self.port), str(self.ports[1])))
        self.text = open(self.path("config")).read()
        for number in (0, 1):
            self.lead_to(number)
            suite.wait_until(lambda: subprocess.call(["ssh", "-F", self.path("config"), "hpc", "true"], stderr=subprocess.DEVNULL) == 0)

    def lead_to(self, number):
        """From now on a log-in comes to that node."""
        self.write("config.new", self.text.replace("Port %d" % self.port, "Port %d" % self.ports[number]))
        os.rename(self.path("config.new"), self.path("config"))
        self.daemon = self.daemons[number]

    def close(self):
        for number in (0, 1):
            self.lead_to(number)
            self.stop()
        subprocess.check_call(["umount", "-l", self.path("far")])
        ssh_lab.Lab.close(self)


def test_of_another_log_in_node_the_result_comes_and_a_cancel_or_clean_says_where_it_runs(here):
    suite.needs("root", "unshare")
    if os.geteuid() != 0:
        suite.pytest.skip("needs root itself: mount namespaces")
    (here / "a").write_text("1")
    both = TwoNodes(here)
    try:
        both.lead_to(0)
        process = start(both, here, "run", "hpc", "cat a; while [ ! -e %s/go ]; do sleep 0.05; done; hostname >r; exit 3" % here, "--in", "a")
        rows = []
        while b"5 start" not in b"".join(rows):
            rows.append(process.stdout.readline())
        ident = ident_of(rows[-1].decode())
        both.cut()                                     # the line drops, and the next log-in comes to the other node
        both.lead_to(1)
        while b"running on" not in rows[-1]:
            rows.append(process.stdout.readline())
            assert rows[-1], rows
        assert "of which only its files tell here" in rows[-1].decode()
        code, out = run(both, here, "cancel", ident)
        assert code == 69 and "it runs on %s: cancel it from there" % os.uname().nodename in out.splitlines()[-1], out
        code, out = run(both, here, "clean", ident)
        assert code == 75 and "another runner is at work" in out, out
        assert [row.split()[:2] for row in run(both, here, "list", "hpc")[1].splitlines()] == [[ident, "running"]]
        (here / "go").write_text("")
        out = b"".join(rows).decode() + process.communicate(timeout=60)[0].decode()
        assert process.returncode == 3 and (here / "r").read_text().strip() == os.uname().nodename, out
        assert (here / "remote_program_exec.log").read_text() == "1" and "again_in" in out
        assert run(both, here, "clean", ident)[0] == 0 and not os.path.exists(both.path("far", ident))
        # inputs came to the first node, and all else to the second
        both.lead_to(1)
        one = Stepwise(both, here, ["sent"], "run", "hpc", "cat a; hostname >r2", "--in", "a")
        one.reached("sent")
        both.cut()
        both.lead_to(0)
        one.go("sent")
        code, out = one.finish()
        assert code == 0 and (here / "r2").read_text().strip() == os.uname().nodename, out
    finally:
        both.close()


@pytest.mark.parametrize("kind, told", [("ramfs", "elsewhere"), ("tmpfs", "lost")])
def test_a_command_of_another_node_is_lost_only_where_no_other_node_can_have_the_disk(here, kind, told):
    suite.needs("root", "unshare")
    if os.geteuid() != 0:
        suite.pytest.skip("needs root itself: mount namespaces")
    (here / "disk").mkdir()
    (here / "boot").write_text("00000000-1111-4222-8333-444444444444\n")
    (here / "node").write_text(NODE)
    control = here / "disk" / "c"
    subprocess.check_call(["mount", "-t", kind, kind, str(here / "disk")])
    try:
        control.mkdir()
        runner.prepare_control(os.fsencode(str(control)))
        process = runner.start_wrapper(os.fsencode(str(control)), os.fsencode(str(here)), ["sh", "-c", "while [ ! -e go ]; do sleep 0.02; done; exit 3"],
                                       {"PATH": runner.WRAPPER_PATH})
        suite.wait_until(lambda: runner.command_state(os.fsencode(str(control)), 0)[0] == "running")
        look = "import runpy, sys; found = runpy.run_path(sys.argv[1])['command_state'](sys.argv[2].encode(), 0); print(found[0], getattr(found[1], 'host', found[1]))"
        on_node = lambda: subprocess.check_output(["sh", str(here / "node"), "node2", str(here / "boot"), suite.PYTHON, "-c", look, ssh_lab.SCRIPT, str(control)]).decode().split()[0]
        assert on_node() == told
        assert runner.command_state(os.fsencode(str(control)), 0)[0] == "running"
        (here / "go").write_text("")
        assert process.wait(20) == 0 and on_node() == "ended"
    finally:
        subprocess.check_call(["umount", "-l", str(here / "disk")])


def test_a_poller_that_is_started_on_another_node_of_the_same_home_says_where_the_command_runs_and_delivers_it(here, make_world):
    suite.needs("root", "unshare")
    if os.geteuid() != 0:
        suite.pytest.skip("needs root itself: mount namespaces")
    world = make_world(tls=False, commands=["hold"]).start()
    base = os.path.join(world.folder, "poller", "base")
    os.makedirs(base)
    subprocess.check_call(["mount", "-t", "ramfs", "-o", "mode=700", "ramfs", base])         # other hosts may have it, too
    try:
        (here / "boot").write_text("00000000-1111-4222-8333-444444444444\n")
        (here / "node").write_text(NODE)
        (here / "python2").write_text('#!/bin/sh\nexec sh %s/node node2 %s/boot %s "$@"\n' % (here, here, suite.PYTHON))
        (here / "python2").chmod(0o755)
        commands = {"hold": "match = hold\nargv = /bin/sh\n    -c\n    until [ -e %s/go ]; do sleep 0.1; done; hostname >r\n    hold" % here}
        accept_id = world.client().register("hold", results=["r"])
        stopped = world.client().register("hold", results=["r"])
        one = world.poller(commands, ini="jobs = 2\n")
        suite.wait_until(lambda: {world.state_of(accept_id), world.state_of(stopped)} == {"running"})
        suite.wait_until(lambda: len([1 for path in pathlib.Path(base).glob("**/child") if path.read_bytes().strip()]) == 2)   # (told before it starts)
        one.kill()
        world.python = str(here / "python2")
        two = world.poller(commands, ini="jobs = 2\n")
        suite.wait_until(lambda: "runs_on=%s" % os.uname().nodename in two.text(), 20, two.text)
        world.client().ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": stopped})
        suite.wait_until(lambda: "cannot be ended from here" in two.text(), 20, two.text)
        assert {world.state_of(accept_id), world.state_of(stopped)} == {"running"}
        (here / "go").write_text("")
        suite.wait_until(lambda: [world.state_of(one) for one in (accept_id, stopped)] == ["got", "got"], 30, two.text)
        assert world.client().raw("GET", "files/%s/result/0?v=2" % accept_id)[1].decode().strip() == os.uname().nodename
        info = world.client().ok("GET", "get-calc-result", {"v": 2, "accept_id": stopped})["result-info"]
        assert info["reason"].startswith("cancelled"), info
        assert two.stop() == 0, two.text()
    finally:
        for process in world.pollers:
            process.kill()
        subprocess.check_call(["umount", "-l", base])


def test_what_was_about_to_start_on_another_node_when_its_poller_died_ends_with_words_that_are_true_there(here, make_world):
    suite.needs("root", "unshare")
    if os.geteuid() != 0:
        suite.pytest.skip("needs root itself: mount namespaces")
    world = make_world(tls=False, commands=["touch"]).start()
    (here / "boot").write_text("00000000-1111-4222-8333-444444444444\n")
    (here / "node").write_text(NODE)
    (here / "python2").write_text('#!/bin/sh\nexec sh %s/node node2 %s/boot %s "$@"\n' % (here, here, suite.PYTHON))
    (here / "python2").chmod(0o755)
    commands = {"touch": "match = touch\nargv = /bin/touch\n    %s/ran" % here}
    accept_id = world.client().register("touch")
    world.poller(commands, env={"MI_FAULT": "start told"}).popen.wait(30)
    world.python = str(here / "python2")
    two = world.poller(commands, env={"LANG": "ja_JP.UTF-8"})
    suite.wait_until(lambda: world.state_of(accept_id) == "got", 30, two.text)
    info = world.client().ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]
    says = "was about to be started on %s, and nothing tells whether it was" % os.uname().nodename
    assert (info["reason"], info.get("exit_code")) == (says, None) and not (here / "ran").exists(), info
    assert "開始したかどうかはわかりません" in two.text(), two.text()
