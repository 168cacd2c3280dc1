"""The SSH runner against a real private sshd: the whole way, lost lines, killed runners, far sides of all kinds, the sample script."""
import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib

import pytest

import ssh_lab
import suite
from ssh_lab import SCRIPT
from suite import PYTHON

sys.path.insert(0, os.path.dirname(SCRIPT))
runner = suite.module("execute_remote_command.py")
LOG = "remote_program_exec.log"
ORDER = ["connected", "sending", "piece 2", "sent", "starting", "started", "ended", "listing", "fetching", "piece 6", "fetched"]
POINTS = ["ordered", "connected", "sending", "sent", "starting", "started", "ended", "listing", "fetching", "fetched"]
HOOKED = """import importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("runner", %r)
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
arrived, pieces, seen = runner.Record.note_arrived, [], set()
def note(self, entry, offset, size, *sum256):
    arrived(self, entry, offset, size, *sum256)
    if size >= runner.SMALL:
        pieces.append(entry)
        runner.fault("piece " + str(len(pieces)))
runner.Record.note_arrived = note
runner.NEAR = 60.0                 # this machine is near, however busy it is
%s
runner.run_as_program(runner.main)
"""
KILLED = HOOKED % (SCRIPT, "runner.fault = lambda name: name == %r and os.kill(os.getpid(), signal.SIGKILL)")
PAUSED = HOOKED % (SCRIPT, """def pause(name):
    if name in %r and name not in seen:
        seen.add(name)
        open(%r + name, "w").close()
        while not os.path.exists(%r + "go " + name):
            time.sleep(0.005)
runner.fault = pause""")


class Stepwise:
    """A runner that stops at each of the points until it is told to go on."""

    def __init__(self, lab, here, points, *words):
        self.mark = str(here / "at ")
        self.process = start(lab, here, *words, code=PAUSED % (list(points), self.mark, self.mark))
        self.out = ""

    def reached(self, point):
        """Waits until it stands there."""
        deadline = time.monotonic() + 120
        while not os.path.exists(self.mark + point):
            assert time.monotonic() < deadline and self.process.poll() is None, (point, self.finish())
            time.sleep(0.005)

    def go(self, point):
        open(self.mark + "go " + point, "w").close()

    def until(self, word, times=1):
        """Reads its output until the word stood there so often."""
        while self.out.count(word) < times:
            row = self.process.stdout.readline().decode()
            assert row, self.out
            self.out += row

    def finish(self):
        """(exit code, whole output)"""
        self.out += self.process.communicate(timeout=180)[0].decode()
        return self.process.returncode, self.out


@pytest.fixture(scope="module")
def lab():
    one = ssh_lab.Lab().start()
    yield one
    one.close()


@pytest.fixture
def here(lab, tmp_path):
    """The module's directory: some inputs."""
    os.mkdir(str(tmp_path / "in"))
    return tmp_path


@pytest.fixture
def own(here):
    """A lab for this test alone, not yet started."""
    one = ssh_lab.Lab()
    yield one
    one.close()


def start(lab, here, *words, code=None, **env):
    """The runner as a process."""
    program = [PYTHON, "-c", code] if code else [PYTHON, SCRIPT]
    return subprocess.Popen(lab.client + program + ["--ini", lab.path("ini")] + list(words), cwd=str(here), env=dict(lab.env(), **env),
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(lab, here, *words, **how):
    """(exit code, output) of the runner."""
    process = start(lab, here, *words, **how)
    out = process.communicate(timeout=120)[0].decode("utf-8")
    return process.returncode, out


def ident_of(out):
    return re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", out).group()


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_fielded_words_bring_files_there_and_everything_back_and_the_exit_code(lab, here):
    (here / "in" / "計算 入力.txt").write_text("x:y", encoding="utf-8")
    (here / "in" / "-dash").write_text("d")
    (here / "in" / "dir").mkdir()
    (here / "in" / "dir" / "a b ").write_text("deep")
    os.symlink(str(here / "in" / "-dash"), str(here / "in" / "link"))
    command = "ls; cat link dir/'a b '; echo 'a:b' >結果.txt; mkdir -p sub/empty; echo err >&2; exit 7"
    code, out = run(lab, here, "client_files:in/計算 入力.txt,in/-dash,in/dir,in/link", "client_cmd:" + command, "client_name:hpc", MISYSTEM_SITEID="site1")
    assert code == 7, out
    assert (here / "結果.txt").read_text() == "a:b\n"
    assert (here / "sub" / "empty").is_dir()
    assert (here / LOG).read_text(encoding="utf-8").endswith("ddeeperr\n")
    assert (here / "計算 入力.txt").exists() and (here / "dir" / "a b ").read_text() == "deep"      # everything comes back, as today
    assert not (here / "link").is_symlink() and (here / "link").read_text() == "d"
    assert re.search(r"solver_log site=site1 host=hpc calculation=\S+ start", out) and re.search(r"solver_log .* end ended 7", out)
    assert os.path.isdir(lab.path("far", ident_of(out)))                # the fielded words leave the directory there


def test_client_files_takes_what_a_shell_and_rsync_took(lab, here):
    home = here / "home"
    for name in ("in/one.dat", "in/two.dat", "in/other.txt", "d/top/deep", "d/.hidden", "home/tilde", "a", "計算.dat", "home/計算.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    code, out = run(lab, here, "client_name:hpc", "client_cmd:find . -type f ! -name list | LC_ALL=C sort >list; head -c 1 /dev/zero >/dev/full; exit 3",
                    "client_files:d/, in/*.dat,in/one.dat, a , ~/tilde,~/計算*,*.dat", HOME=str(home))
    assert code == 3 and re.search("ended 3 .*No space left on device", out.splitlines()[-1]), out
    assert (here / "list").read_text(encoding="utf-8").split() == [
        "./.hidden", "./a", "./one.dat", "./remote_program_exec.log", "./tilde", "./top/deep", "./two.dat", "./計算.dat", "./計算.txt"]
    code, out = run(lab, here, "client_name:hpc", "client_cmd:true", "client_files:a,no*.dat")
    assert code == 66 and "no*.dat" in out, out


def test_a_run_cleans_up_there_and_leaves_no_control_connection(lab, here):
    before = set(name for name in os.listdir("/tmp") if name.startswith("mi-") and os.path.exists("/tmp/%s/c" % name))
    (here / "in" / "a").write_text("1")
    code, out = run(lab, here, "run", "hpc", "cat a; echo 2 >b", "--in", "in/a")
    assert code == 0 and (here / "b").read_text() == "2\n" and not (here / "a").exists()
    assert not os.path.exists(lab.path("far", ident_of(out)))
    left = set(name for name in os.listdir("/tmp") if name.startswith("mi-") and os.path.exists("/tmp/%s/c" % name)) - before
    deadline = time.monotonic() + 60                   # another test's runner may be at work, and ends
    while any(os.path.exists("/tmp/%s/c" % name) for name in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists("/tmp/%s/c" % name) for name in left)
    deadline = time.monotonic() + 5
    while lab.sessions() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lab.sessions()


def test_the_command_has_the_umask_and_directory_of_a_log_in_and_no_input(lab, here):
    code, out = run(lab, here, "run", "hpc", "umask; pwd; wc -c; env | grep MI_RUN", "-q")
    words = (here / LOG).read_text().split()
    assert words[0] == "%04o" % int(subprocess.check_output(["sh", "-c", "umask"]).decode(), 8)
    assert words[1].startswith(lab.path("far")) and words[2] == "0" and words[3].startswith("MI_RUN=")


def test_large_and_many_files_arrive_byte_for_byte_both_ways(lab, here):
    (here / "in" / "big").write_bytes(os.urandom(70 << 20) + b"tail")
    (here / "in" / "text").write_bytes(b"line of text\n" * 400000)
    many = here / "in" / "many"
    many.mkdir()
    for n in range(500):
        (many / ("f%03d" % n)).write_bytes(os.urandom(n * 7))
    (many / ("長" * 50)).write_text("long")
    for streams in ("1", "4"):
        code, out = run(lab, here, "run", "hpc", "mkdir back; cp -r big text many back", "--in", "in/big", "in/text", "in/many", "--streams", streams)
        assert code == 0, out
        subprocess.check_call(["diff", "-r", str(here / "in"), str(here / "back")])
        shutil.rmtree(str(here / "back"))


def test_small_files_among_large_ones_get_their_sums_each(lab, here):
    for n in range(6000):
        (here / "in" / ("f%04d" % n)).write_bytes(b"%d" % n * 100)
    for n in range(40):
        (here / "in" / ("g%04d" % n)).write_bytes(os.urandom(1100000))
    code, out = run(lab, here, "run", "hpc", "rm in/f*; ls in | wc -l", "--in", "in", "--streams", "2", "-v")
    assert code == 0 and "sum is wrong" not in out and "again_in" not in out, out
    assert (here / LOG).read_text() == "40\n"


def test_a_link_that_leads_out_is_not_fetched_and_one_that_stays_is(lab, here):
    code, out = run(lab, here, "run", "hpc", "ln -s /etc/passwd out; echo 1 >a; ln -s a inner; mkfifo pipe")
    assert code == 0 and (here / "inner").read_text() == "1\n" and not os.path.lexists(str(here / "out"))
    assert "outside 1 (out)" in out and "special 1 (pipe)" in out, out


@pytest.mark.parametrize("command, why", [("chmod 000 .", "Permission denied; open it there, then resume"), ("rm -rf $PWD", "No such file or directory")])
def test_a_directory_that_the_command_closed_or_removed_is_said_with_its_place_and_what_to_do(own, here, command, why):
    suite.needs("setpriv")
    # what root may, too, no command is denied
    own.forced('exec setpriv --bounding-set -all --inh-caps -all sh -c "$SSH_ORIGINAL_COMMAND"' if os.geteuid() == 0 else 'exec sh -c "$SSH_ORIGINAL_COMMAND"')
    code, out = run(own, here, "run", "hpc", "echo out; echo 1 >r; sleep 0.3; " + command)
    ident = ident_of(out)
    said = "unreadable 1 (%s: %s)" % (own.path("far", ident), why)
    assert code == 65 and out.splitlines()[-2] == "asked for and not here: " + said and "\nout\n" in out, out
    if "open it" in why:
        os.chmod(own.path("far", ident), 0o700)
        code, out = run(own, here, "resume", ident, "--to", "to")
        assert code == 0 and (here / "to" / "r").read_text() == "1\n" and (here / "to" / LOG).read_text() == "out\n", out
    assert run(own, here, "clean", ident)[0] == 0 and not os.path.exists(own.path("far", ident))


def test_a_name_with_control_characters_is_named_and_left_there(lab, here):
    code, out = run(lab, here, "run", "hpc", "echo 1 >$(printf 'a\\033[31mb'); echo 2 >c")
    assert code == 65 and (here / "c").exists() and "name 1 (a\\x1b[31mb)" in out, out
    assert os.path.isdir(lab.path("far", ident_of(out)))


def test_a_missing_input_and_an_unknown_host_are_said_before_anything_happens(lab, here):
    assert run(lab, here, "run", "hpc", "true", "--in", "nothing")[0] == 66
    code, out = run(lab, here, "run", "nowhere.invalid", "true")
    assert code == 69 and "resolve" in out
    assert run(lab, here, "client_name:-oProxyCommand=x", "client_cmd:true")[0] == 64


def test_an_unknown_host_key_is_refused_without_a_question(lab, here):
    known = open(lab.path("known_hosts")).read()
    try:
        lab.write("known_hosts", "")
        code, out = run(lab, here, "run", "hpc", "true")
        assert code == 77 and "Host key verification failed" in out and "try by hand: ssh -F %s hpc" % lab.path("config") in out
    finally:
        lab.write("known_hosts", known)


@pytest.mark.parametrize("name", POINTS)
def test_a_runner_killed_at_each_point_is_resumed_and_the_command_ran_once(lab, here, name):
    (here / "in" / "a").write_bytes(os.urandom(5 << 20))
    count = here / "count"
    words = ["run", "hpc", "echo x >>%s; cp a b; sleep %s; exit 3" % (count, 3 if name == "started" else 0.3), "--in", "in/a"]
    process = start(lab, here, *words, code=KILLED % name)
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == -signal.SIGKILL, out
    code, more = run(lab, here, "resume", ident_of(out))
    assert code == 3, more
    assert count.read_text() == "x\n" and sha(here / "b") == sha(here / "in" / "a")
    assert run(lab, here, "resume", ident_of(out))[0] == 3 and count.read_text() == "x\n"


@pytest.mark.parametrize("point, after", [("target looked at", "resume"), ("target looked at", "clean"), ("fetching", "clean")])
def test_what_a_killed_runner_left_in_the_target_is_remembered_and_goes(lab, here, point, after):
    process = start(lab, here, "run", "hpc", "echo 1 >r", "--to", "to", code=KILLED % point, XDG_STATE_HOME=str(here / "state"))
    assert process.wait(60) == -signal.SIGKILL and [name for name in os.listdir(str(here / "to")) if name.startswith(".mi-")]
    row, = run(lab, here, "list", XDG_STATE_HOME=str(here / "state"))[1].splitlines()
    code, out = run(lab, here, after, ident_of(row), XDG_STATE_HOME=str(here / "state"))
    assert code == 0, out
    assert sorted(os.listdir(str(here / "to"))) == (["r", LOG] if after == "resume" else []), out
    assert (run(lab, here, "list", XDG_STATE_HOME=str(here / "state"))[1] == "") == (after == "clean")


@pytest.mark.parametrize("name", POINTS[1:])
def test_connections_killed_at_each_point_are_opened_again_and_the_command_runs_once(lab, here, name):
    (here / "in" / "a").write_bytes(os.urandom(3 << 20))
    count = here / "count"
    one = Stepwise(lab, here, [name], "run", "hpc", "echo x >>%s; echo hello; cp a b; sleep 0.3; echo bye" % count, "--in", "in/a")
    one.reached(name)
    lab.cut()
    one.go(name)
    code, out = one.finish()
    assert code == 0, out
    assert count.read_text() == "x\n" and sha(here / "b") == sha(here / "in" / "a")
    assert (here / LOG).read_text() == "hello\nbye\n" and out.count("hello\n") == 1 and out.count("bye\n") == 1
    assert not os.path.exists(lab.path("far", ident_of(out)))


@pytest.mark.parametrize("name,row", [("piece 32", r"4 inputs files=\d bytes=(\d+)"), ("piece 96", r"8 fetch files=\d bytes=(\d+)")], ids=["in", "out"])
def test_pieces_that_arrived_are_not_moved_again(lab, here, name, row):
    (here / "in" / "a").write_bytes(os.urandom(64 << 20))          # 64 pieces each way
    one = Stepwise(lab, here, [name], "run", "hpc", "cp a b", "--in", "in/a", "--streams", "2")
    one.reached(name)
    lab.cut()
    one.go(name)
    code, out = one.finish()
    assert code == 0, out
    assert int(re.search(row, out).group(1)) <= 32 << 20 and sha(here / "b") == sha(here / "in" / "a"), out


def test_a_busy_hosts_late_answer_does_not_make_it_a_far_one():
    class Quick:
        asked = 0

        def ask(self, do):
            self.asked += 1
            return self

        def answer(self, *needed):
            return {"state": "none"}
    for late, size, near, asked in (0.006, 1 << 30, True, 1), (0.006, 1000, False, 0), (0.05, 1 << 30, False, 0), (0.001, 1 << 30, True, 0):
        line = runner.Line("h", None)
        line.session, line.round_trip = Quick(), late
        line.time_again(size)
        assert (line.near(), line.session.asked) == (near, asked), late


def test_pieces_of_another_size_leave_out_what_has_arrived():
    entry = runner.Entry(b"a", "a", 20 << 20, 10 ** 9, 0o644)
    step, small = 16 << 20, 2 << 20
    for arrived in ((), (0,), (9,), (3, 1, 2), (1, 9), range(10)):
        have = {runner.version_of(entry): {(n * small, small) for n in arrived}}
        pieces = runner.cut_work([entry], step, have, True)
        covered = sorted([(piece.offset, piece.size) for piece in pieces] + list(have[runner.version_of(entry)]))
        ends = [0] + [offset + size for offset, size in covered]
        assert ends == [offset for offset, size in covered] + [20 << 20] and all(0 < piece.size <= step for piece in pieces), arrived


def test_an_input_that_changed_before_the_resume_is_sent_anew(lab, here):
    (here / "in" / "a").write_bytes(os.urandom(33 << 20))
    out = start(lab, here, "run", "hpc", "cp a b", "--in", "in/a", code=KILLED % "piece 2").communicate(timeout=60)[0].decode()
    (here / "in" / "a").write_bytes(os.urandom(33 << 20))
    code, more = run(lab, here, "resume", ident_of(out))
    assert code == 0 and sha(here / "b") == sha(here / "in" / "a"), more


@pytest.mark.parametrize("lost", [False, True], ids=["", "line lost too"])
def test_an_input_that_changes_while_it_is_sent_is_said_and_not_calculated_with(lab, here, lost):
    (here / "in" / "a").write_bytes(os.urandom(33 << 20))
    one = Stepwise(lab, here, ["piece 1"], "run", "hpc", "echo x >>%s" % (here / "count"), "--in", "in/a")
    one.reached("piece 1")
    (here / "in" / "a").write_bytes(os.urandom(33 << 20))
    if lost:
        lab.cut()
    one.go("piece 1")
    code, out = one.finish()
    assert code == 66 and "changed while it was sent" in out and not (here / "count").exists(), out


def test_a_full_disk_on_this_side_ends_the_run_with_one_line(lab, here):
    (here / "in" / "a").write_bytes(os.urandom(3 << 20))
    full = "def note_arrived(*what):\n    raise OSError(28, 'No space left on device')\nrunner.Record.note_arrived = note_arrived"
    for words in (["run", "hpc", "true", "--in", "in/a"], ["run", "hpc", "head -c 3000000 /dev/zero >b"]):
        code, out = run(lab, here, *words, code=HOOKED % (SCRIPT, full))
        assert code == 74 and "No space left on device" in out.splitlines()[-1], out


def test_a_result_that_shrinks_while_it_is_fetched_is_listed_anew(lab, here):
    one = Stepwise(lab, here, ["fetching"], "run", "hpc", "head -c 5000000 /dev/zero >b", "--keep")
    one.reached("fetching")
    far = [path for path in (lab.path("far", name, "b") for name in os.listdir(lab.path("far"))) if os.path.exists(path)
           and os.path.getsize(path) == 5000000]
    assert len(far) == 1
    os.truncate(far[0], 1500000)
    one.go("fetching")
    code, out = one.finish()
    assert code == 0 and (here / "b").read_bytes() == b"\0" * 1500000, out


def test_names_that_differ_at_their_end_only_keep_their_contents(lab, here):
    name = "n" * 230
    code, out = run(lab, here, "run", "hpc", "echo 1 >%s1; echo 2 >%s2; ln -s %s1 %s3" % ((name,) * 4))
    assert code == 0, out
    assert [(here / (name + end)).read_text() for end in "123"] == ["1\n", "2\n", "1\n"]


def test_a_link_to_a_name_with_a_newline_does_not_shift_the_others(lab, here):
    (here / "in" / "odd.sh").write_text("echo 1 >a\nln -s 'x\ny' b\nln -s a c\n")
    code, out = run(lab, here, "run", "hpc", "sh odd.sh", "--in", "in/odd.sh")
    assert code == 0 and (here / "c").read_text() == "1\n" and not os.path.lexists(str(here / "b")), out


def test_a_log_in_that_hangs_is_given_up(own, here):
    own.write("ini", open(own.path("ini")).read().replace("connect = 6s", "connect = 1s"))
    own.forced("echo Welcome; exec sleep 60")
    code, out = run(own, here, "run", "hpc", "true", "--retry", "0,1")
    assert code == 69 and "given up" in out, out


def test_records_that_were_torn_stop_neither_list_nor_resume(lab, here):
    out = start(lab, here, "run", "hpc", "echo 1 >r", code=KILLED % "started").communicate(timeout=60)[0].decode()
    ident = ident_of(out)
    state = lab.path("state", "mi_distcomp_ssh")
    with open(os.path.join(state, ident, "journal"), "a") as journal:
        journal.write('{"t": 1, "st')                  # as a power cut leaves it
    os.mkdir(os.path.join(state, ident[:-1] + "x.new"))
    assert run(lab, here, "list")[0] == 0
    assert run(lab, here, "resume", ident, "--retry", "often")[0] == 64
    code, more = run(lab, here, "resume", ident)
    assert code == 0 and (here / "r").exists(), more
    assert run(lab, here, "resume", ident)[0] == 0
    assert run(lab, here, "clean", ident)[0] == 0 and not os.path.exists(os.path.join(state, ident))


def test_what_never_was_there_is_cleaned_without_its_host(lab, here):
    code, out = run(lab, here, "run", "nowhere.invalid", "true")
    assert code == 69 and run(lab, here, "clean", ident_of(out))[0] == 0 and ident_of(out) not in run(lab, here, "list")[1]
    assert run(lab, here, "clean", "0" * 36, ident_of(out))[0] == 64


@pytest.mark.parametrize("enough", [4, 64])            # MiB from which on it is asked who has libzstd
def test_far_away_text_is_compressed_and_many_small_files_take_two_sessions(lab, here, enough):
    text = b"".join(b"step %6d residual %d\n" % (n, n * n % 7919) for n in range(500000))
    for n in range(40):
        (here / "in" / ("d%d" % (n % 7))).mkdir(exist_ok=True)
        (here / "in" / ("d%d" % (n % 7)) / ("s %d" % n)).write_bytes(os.urandom(300000 + n))
    (here / "text").write_bytes(text)
    code, out = run(lab, here, "run", "hpc", "cp text out; cp -r in back", "--in", "in", "--in", "text",
                    code=HOOKED % (SCRIPT, """runner.NEAR, runner.SECOND_SESSION, real, lane = 0.0, 4 << 20, runner.Session.send, runner.Line.open_lane
runner.BULK = %d << 20
def send(self, do, words=(), data=(), **more):
    if "length" in words:
        print("packed", words["size"] * 4 < words["length"], data[0][:4] == runner.ZSTD_MAGIC)
    if more.get("pack"):
        print("asked for it packed", more["pack"])
    return real(self, do, words, data, **more)
runner.Session.send = send
runner.Line.open_lane = lambda *words: print("a second session") or lane(*words)""" % enough))
    assert code == 0 and (here / "out").read_bytes() == text, out
    pieces, zstd = -(-len(text) // runner.LEAST_PIECE), enough == 4 and runner.libzstd() is not None
    assert out.count("packed True %s" % zstd) == pieces and out.count("a second session") == 2, out
    assert out.count("asked for it packed %s" % ("zstd" if zstd else True)) == pieces, out
    subprocess.check_call(["diff", "-r", str(here / "in"), str(here / "back")])


def test_a_cancel_before_the_start_says_that_it_did_nothing(lab, here):
    one = Stepwise(lab, here, ["sent"], "run", "hpc", "true")
    one.until("1 order")
    one.reached("sent")
    code, out = run(lab, here, "cancel", ident_of(one.out))
    one.go("sent")
    assert code == 75 and "not started" in out and one.finish()[0] == 0


def test_sshd_down_for_a_while_is_waited_for(own, here, request):
    own.start()
    one = Stepwise(own, here, ["started"], "run", "hpc", "echo x >>%s; sleep 3; echo done >result" % (here / "count"))
    one.reached("started")
    own.stop()
    one.go("started")
    one.until("again_in", 2)
    if request.config.getoption("--long"):
        time.sleep(30)
    own.start()
    code, out = one.finish()
    assert code == 0 and (here / "count").read_text() == "x\n" and (here / "result").exists(), out


def test_given_up_after_count_and_interval_with_the_way_to_resume(own, here):
    own.start()
    process = start(own, here, "run", "hpc", "sleep 3; echo done >result", "--retry", "2,1")
    for row in iter(process.stdout.readline, b""):
        if b"5 start" in row:
            break
    own.stop()
    out = process.communicate(timeout=30)[0].decode()
    assert process.returncode == 69 and "resume" in out
    own.start()
    code, more = run(own, here, "resume", ident_of(out))
    assert code == 0 and (here / "result").exists(), more


def test_a_silent_line_is_noticed_and_the_command_runs_once(here, request):
    net = ssh_lab.Routed()
    (here / "in" / "a").write_bytes(os.urandom(64 << 20))
    points = ["piece 2", "started"] if not request.config.getoption("--long") else ["piece 2", "piece 6"] + POINTS[1:]
    try:
        one = Stepwise(net.lab, here, points, "run", "hpc", "echo x >>%s; cp a b" % (here / "count"), "--in", "in/a")
        for number, point in enumerate(sorted(points, key=lambda name: ORDER.index(name)), 1):
            one.reached(point)
            net.drop(True)                             # every packet, from now on
            one.go(point)
            one.until("again_in", number)
            net.drop(False)
        code, out = one.finish()
        assert code == 0 and (here / "count").read_text() == "x\n" and sha(here / "b") == sha(here / "in" / "a"), out
    finally:
        net.close()


def test_a_cancelled_command_ends_with_all_its_children_and_its_files_come_back(lab, here):
    process = start(lab, here, "run", "hpc", "sleep 1000 & setsid sleep 1000 & echo left >file; setsid sh -c 'kill -STOP $$' &"
                    " setsid sh -c 'trap \"\" TERM; echo begun; while :; do sleep 0.1; done' & wait")
    out = ""
    for row in iter(process.stdout.readline, b""):
        out += row.decode()
        if row == b"begun\n":
            break
    code = run(lab, here, "cancel", ident_of(out), "--grace", "2")
    assert code[0] == 0, code
    more = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 143 and (here / "file").exists(), more
    mark = ("MI_RUN=%s.1" % ident_of(out)).encode()
    for name in os.listdir("/proc"):
        try:
            assert not (name.isdigit() and mark in open("/proc/%s/environ" % name, "rb").read())
        except OSError:
            pass


def test_list_and_clean_know_both_sides(lab, here):
    code, out = run(lab, here, "client_name:hpc", "client_cmd:true")
    ident = ident_of(out)
    rows = [json.loads(row) for row in run(lab, here, "list", "--json")[1].splitlines()]
    assert [row["state"] for row in rows if row["uuid"] == ident] == ["finished"]
    assert ident + " fetched 0" in run(lab, here, "list", "hpc")[1]
    assert run(lab, here, "clean", ident)[0] == 0 and not os.path.exists(lab.path("far", ident))
    assert ident not in run(lab, here, "list")[1] and ident not in run(lab, here, "list", "hpc")[1]


ODD_FAR = r"""
import json, os, re, sys
PLACE, ANSWER = CASES[int(re.search("'door' 'case([0-9]+)'", os.environ["SSH_ORIGINAL_COMMAND"]).group(1))]
GOOD = {"hello": {"state": "none", "door": "far", "host": "h", "boot": "b", "free": 1}, "start": {"state": "running"}, "fetched": {"state": "fetched"},
        "wait": {"end": True, "state": "ended", "code": 0}, "clean": {"state": "gone", "left": []}, "list": {"runs": [], "more": None},
        "results": {"files": [["r", 3, 1, False, None]], "folders": [], "next": None, "verdicts": {}}}
def say(text):
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
def endless(text=b"x" * 65536, out=1):
    while True:
        os.write(out, text)
if PLACE in ("noise", "lines"):
    endless(*[b"noise\n" * 1000] * (PLACE == "lines"))
if PLACE == "bring":
    endless(b"mi_distcomp 2 bring -\n")
say(ANSWER if PLACE == "first" else b"mi_distcomp 2 door\n")
if PLACE == "stderr":
    endless(out=2)
for row in sys.stdin.buffer:
    words = json.loads(row.decode())
    verb, at = words["do"], words.get("from", 0)
    sys.stdin.buffer.read(words.get("size", 0)) if verb == "put" else None
    if verb == PLACE and ANSWER == b"endless":
        endless()
    elif PLACE == "pages" and verb == "results":
        say(json.dumps({"files": [["n%d" % n, 1, 1, False, None] for n in range(at, at + 1000)], "folders": [], "next": at + 1000}).encode() + b"\n")
    elif PLACE == "empty" and verb == "list":
        say(json.dumps({"runs": [], "more": "00000000-0000-4000-8000-%012d" % (int(words["after"][-12:] or 0) + 1)}).encode() + b"\n")
    elif PLACE == "rows" and verb == "list":
        after = int(words["after"][-12:] or 0)
        rows = [["00000000-0000-4000-8000-%012d" % n, "running", 1, "", None] for n in range(after + 1, after + 1001)]
        say(json.dumps({"runs": rows, "more": rows[-1][0]}).encode() + b"\n")
    elif verb == PLACE:
        say(ANSWER + b"\n")
    elif verb == "put":
        say(b'{"sums": ["6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"]}\n')
    else:
        say(json.dumps(GOOD[verb]).encode() + b"\n")
"""
WITHOUT_END = [(place, b"endless") for place in ("noise", "lines", "hello", "put", "start", "wait", "results", "get", "list", "pages", "rows", "empty", "stderr", "bring")]
SENSELESS = [                  # (the verb that is answered, the line)
    ("hello", b""), ("hello", b"ready guard=0"), ("hello", b"[]"), ("hello", b"[" * 60000), ("hello", b"\xff"),
    ("hello", b'{"state": "none", "door": "far", "host": "h", "boot": "b"}'), ("hello", b'{"state": "well", "door": "far", "host": "h", "boot": "b", "free": 1}'),
    ("hello", b'{"state": "none", "door": "far", "host": 1, "boot": "b", "free": 1}'), ("hello", b'{"state": "none", "door": "far", "host": "h", "boot": "b", "free": -1}'),
    ("put", b'{"sums": "x"}'), ("put", b'{"sums": ["x"]}'), ("put", b'{"sums": {}}'), ("put", b"{}"), ("start", b'{"state": "running", "code": 256}'),
    ("start", b'{"state": "\\u001b[2J"}'), ("wait", b'{"end": true, "state": "running"}'), ("wait", b'{"end": true, "state": "ended", "code": "0"}'),
    ("wait", b'{"end": true, "state": "ended", "code": true}'), ("wait", b'{"end": true, "state": "ended", "code": -1}'), ("wait", b'{"log": -5, "size": 1}'),
    ("wait", b'{"log": 7, "size": 1}'), ("wait", b'{"log": 0, "size": 99999999999}'), ("wait", b'{"log": 0, "size": 1e3}'),
    ("results", b'{"files": [["../x", 1, 1, false, null]], "folders": [], "next": null}'), ("results", b'{"files": [["a\\u001b", 1, 1, false, null]], "folders": [], "next": null}'),
    ("results", b'{"files": [["a", -1, 1, false, null]], "folders": [], "next": null}'), ("results", b'{"files": [["a", 1, NaN, false, null]], "folders": [], "next": null}'),
    ("results", b'{"files": [["a", 1, 1, 0, null]], "folders": [], "next": null}'), ("results", b'{"files": [["a", 1, 1, false, "x"]], "folders": [], "next": null}'),
    ("results", b'{"files": [["a", 9000000000000000000, 1, false, null]], "folders": [], "next": null}'), ("results", b'{"files": [], "folders": [], "next": 0}'),
    ("results", b'{"files": [["a", 1, 1, false, null]], "folders": [], "next": 7}'), ("results", b'{"files": [], "folders": [["/etc/", 1]], "next": null}'),
    ("results", b'{"files": [], "folders": [], "next": null, "verdicts": {"refused": {"count": "x", "names": []}}}'), ("results", b'{"files": [], "folders": []}'),
    ("get", b'{"size": 99999999999, "bundle": [[99999999999, 1, false, "%s"]]}' % (b"0" * 64)), ("get", b'{"size": 0}'), ("get", b'{"bundle": ["\\u001b"]}'),
    ("get", b'{"size": -1, "bundle": ["missing"]}'), ("get", b'{"bundle": []}'), ("get", b'{"bundle": ["missing", "missing"]}'),
    ("get", b'{"size": 1, "bundle": [[2, 1, false, "%s"]]}' % (b"0" * 64)), ("get", b'{"bundle": [[0, 1, false, "x"]]}'),
    ("start", b'{"state": "running", "why": "%s"}' % (b"x" * 20000)),
    ("list", b'{"runs": [["00000000-0000-4000-8000-000000000001", "lost", 1, "%s", null]], "more": null}' % (b"x" * 20000)),
    ("list", b'{"runs": [["x", "lost", 1, "", null]], "more": null}'), ("list", b'{"runs": [], "more": "x"}'),
    ("list", b'{"runs": [["x"]], "more": null}'), ("list", b'{"runs": 1, "more": null}'), ("list", b'{"runs": []}'), ("list", b'{"runs": [], "more": ""}')]


def test_answers_without_end_or_sense_are_said_and_not_collected(own, here):
    cases = WITHOUT_END + SENSELESS
    own.write("odd.py", "CASES = %r\n" % cases + ODD_FAR)
    own.forced("%s %s" % (sys.executable, own.path("odd.py")))
    least = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\nrunner.MOST_FILES = 5000"

    def one(number):
        place, folder = cases[number][0], here / str(number)
        folder.mkdir()
        (folder / "a").write_text("1")
        (folder / "case.ini").write_text("[ssh]\nbase = case%d\nretry = 1,1\nconnects = 0\nssh_options = -F %s\n" % (number, own.path("config")))
        words = ["list", "hpc"] if place in ("list", "rows", "empty") else ["run", "hpc", "true"] + ["--in", "a"]
        return run(own, folder, "--ini", "case.ini", *words, code=HOOKED % (SCRIPT, least))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(one, range(len(cases))))
    right = lambda place, code, last: code == 69 if place == "stderr" else code == 76 and last.endswith(": hpc: an answer that makes no sense")
    wrong = [(case, code, out[-300:]) for case, (code, out) in zip(cases, outcomes) if not right(case[0], code, out.splitlines()[-1])]
    assert not wrong, "\n".join(map(repr, wrong))


@pytest.mark.parametrize("folder,mode", [("far", 0o777), ("far/.mi", 0o777), ("far/.mi", 0o720)])
def test_nothing_is_run_where_others_may_write(own, here, folder, mode):
    own.start()
    os.makedirs(own.path("far", ".mi"))
    os.chmod(own.path(*folder.split("/")), mode)
    code, out = run(own, here, "run", "hpc", "echo x >>%s" % (here / "count"))
    last = out.splitlines()[-1]
    assert code == 77 and "others may write to" in last and own.path(*folder.split("/")) in last and not (here / "count").exists(), out


def test_a_running_calculation_is_not_cleaned_and_not_resumed_beside_its_runner(lab, here):
    one = Stepwise(lab, here, ["started"], "run", "hpc", "sleep 2")
    one.until("5 start")
    ident = ident_of(one.out)
    assert run(lab, here, "resume", ident)[0] == 75
    assert run(lab, here, "clean", ident)[0] == 75
    one.go("started")
    assert one.finish()[0] == 0


@pytest.mark.parametrize("python", [False, True], ids=["plain", "guard"])
def test_a_start_that_the_network_held_back_until_all_was_cleaned_does_not_run_again(lab, here, monkeypatch, python):
    count, host = here / "count", "guarded" if python else "hpc"
    script = here / "add.sh"
    script.write_text("echo x >>%s\n" % count)
    if python:
        lab.guard("[command add]\nargv = /bin/sh\n  %s\nmatch = add\n" % script)
    command = "add" if python else "sh %s" % script
    code, out = run(lab, here, "run", host, command)
    assert code == 0 and count.read_text() == "x\n", out
    ident, settings = ident_of(out), runner.settings_of_options({"ini": lab.path("ini")})
    monkeypatch.setenv("XDG_STATE_HOME", lab.path("state"))
    line = runner.Line(host, settings).open(ident)
    try:
        for _again in range(2):
            with pytest.raises(runner.Declined) as no:
                line.session.ask("start", command=command).answer("state")
            assert no.value.code == "gone"
        assert line.told["state"] == "gone" and line.door == ("guard" if python else "far")
    finally:
        line.close()
    assert count.read_text() == "x\n" and ident not in run(lab, here, "list", host)[1]


def test_ctrl_c_leaves_the_command_running_and_resume_brings_its_result(lab, here):
    process = start(lab, here, "run", "hpc", "sleep 2; echo 1 >r")
    row = b""
    while b"5 start" not in row:
        row = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, ident = process.communicate(timeout=60)[0].decode(), ident_of(row.decode())
    assert process.returncode == 130 and rest.endswith("the command runs on there, execute_remote_command.py resume %s continues\n" % ident), rest
    assert run(lab, here, "resume", ident)[0] == 0 and (here / "r").exists()


def test_several_runs_side_by_side_keep_to_themselves_and_to_the_connection_budget(lab, here):
    (here / "three.ini").write_text(open(lab.path("ini")).read().replace("connects = 0", "connects = 3"))
    runner.CONNECT_SPAN, places = 60, []
    for n in range(4):
        place = here / ("p%d" % n)
        place.mkdir()
        (place / "n").write_text(str(n))
        places.append(place)
    budget = HOOKED % (SCRIPT, "runner.CONNECT_SPAN = 8")
    began = time.monotonic()
    both = [start(lab, place, "--ini", "../three.ini", "run", "hpc", "sleep 0.5; cp n m", "--in", "n", code=budget) for place in places]
    outs = [one.communicate(timeout=60)[0].decode() for one in both]
    assert [one.returncode for one in both] == [0] * 4, outs
    assert [(place / "m").read_text() for place in places] == ["0", "1", "2", "3"]
    assert sum("connection budget" in out for out in outs) >= 1 and time.monotonic() - began > 7.5


def test_the_live_log_can_neither_steer_the_terminal_nor_get_lost(lab, here):
    code, out = run(lab, here, "run", "hpc", "printf 'a\\033[2Jb\\n'; for i in 1 2 3; do echo line$i; sleep 0.2; done")
    assert "a\\x1b[2Jb\nline1\nline2\nline3\n" in re.sub(r"(?m)^2\d{3}-.*\n", "", out)
    assert (here / LOG).read_bytes().startswith(b"a\x1b[2Jb")
    # right-to-left override, isolate, zero width space, line separator: what turns or hides text
    code, out = run(lab, here, "run", "hpc", "printf 'x\\342\\200\\256gpj.exe\\342\\201\\246\\342\\200\\213\\342\\200\\250y\\tz\\r\\n'")
    assert "x\\u202egpj.exe\\u2066\\u200b\\u2028y\tz" in out, out
    code, out = run(lab, here, "run", "hpc", "printf '\\350\\250'; sleep 0.6; printf '\\210\\n'")
    assert "計\n" in out                               # also when its bytes come one by one


def test_stderr_stays_small_without_a_terminal(lab, here):
    process = subprocess.Popen([PYTHON, SCRIPT, "--ini", lab.path("ini"), "run", "hpc", "yes | head -c 300000; exit 2", "-v"], cwd=str(here), env=lab.env(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err) < 16384 and len(out) > 300000


def test_resume_refuses_to_run_again_when_the_far_host_was_restarted(lab, here):
    process = start(lab, here, "run", "hpc", "echo x >>%s" % (here / "count"), code=KILLED % "starting")
    out = process.communicate(timeout=60)[0].decode()
    ident = ident_of(out)
    journal = [os.path.join(top, "journal") for top, _d, _n in os.walk(lab.path("state")) if top.endswith(ident)][0]
    text = open(journal).read()
    boot = json.loads([row for row in text.splitlines() if '"starting"' in row][-1])["boot"]
    open(journal, "w").write(text.replace(boot, "0" * 8 + boot[8:]))
    code, more = run(lab, here, "resume", ident)
    assert code == 75 and "restarted" in more and not (here / "count").exists()


BARE = """#!/bin/sh
# nothing but busybox (and rsync) in /usr/bin: the log-in's own mount namespace
exec unshare %s sh -c 'for here in /usr/bin /bin; do mount --bind %s $here; done; cd "$HOME"; PATH=/usr/bin SHELL=/bin/sh exec sh -c "$SSH_ORIGINAL_COMMAND"'
"""


def umask():
    """That of these tests."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("rsync", [True, False])
def test_a_far_side_without_python3_is_served_by_rsync_and_it_is_said(own, here, rsync):
    suite.needs("busybox")
    os.mkdir(own.path("bin"))
    shutil.copy(shutil.which("busybox"), own.path("bin"))
    for name in subprocess.check_output(["busybox", "--list"]).decode().split():
        if name != "busybox":
            os.link(own.path("bin", "busybox"), own.path("bin", name))
    if rsync:
        os.unlink(own.path("bin", "rsync")) if os.path.exists(own.path("bin", "rsync")) else None
        shutil.copy(shutil.which("rsync"), own.path("bin"))
    own.write("bare", BARE % ("-m" if os.geteuid() == 0 else "-rm", own.path("bin")))
    os.chmod(own.path("bare"), 0o755)
    own.forced(own.path("bare"))
    (here / "in" / "big").write_bytes(os.urandom(3 << 20))
    (here / "in" / "d").mkdir()
    (here / "in" / "d" / "計 算").write_text("1")
    command = "mkdir o; cp -r big d o; ln -s /etc/passwd evil; echo >s; chmod 6777 s; echo end; exit 5"
    code, out = run(own, here, "run", "hpc", command, "--in", "in/big", "in/d", "-v")
    assert "no python3" in out and "Traceback" not in out, out
    if not rsync:
        assert code == 78 and "needs rsync" in out.splitlines()[-1], out
        return
    assert code == 5 and "nothing is removed there" in out, out
    assert sha(here / "o" / "big") == sha(here / "in" / "big") and (here / "o" / "d" / "計 算").exists() and not os.path.lexists(str(here / "evil"))
    assert (here / LOG).read_text() == "end\n" and (here / "s").stat().st_mode & 0o7777 == 0o777 & ~umask()
    assert not (here / "big").exists() and os.path.isdir(own.path("far", ident_of(out)))
    code, out = run(own, here, "run", "hpc", "echo 1 >a; mkdir -p secret; echo 2 >secret/b; chmod 0 secret", "-q")
    assert code == 0 and os.geteuid() == 0 or code == 65 and (here / "a").exists(), out
    code, out = run(own, here, "run", "hpc", "rm -rf $PWD")
    assert code == 65 and "unreadable 1 (%s: closed or removed by the command" % own.path("far", ident_of(out)) in out.splitlines()[-2], out
    assert not os.path.exists(own.path("far", ident_of(out)))
    out = start(own, here, "run", "hpc", "echo x >>%s" % (here / "count"), code=KILLED % "started").communicate(timeout=60)[0].decode()
    code, more = run(own, here, "resume", ident_of(out))
    assert code == 69 and own.path("far", ident_of(out)) in more.splitlines()[-1] and (here / "count").read_text() == "x\n", more


WAYS = {"none": "exit 127", "of Python 2": "exit 97", "that may not be executed": "exit 126", "that dies": "exit 1"}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_another_python3_is_taken_where_the_first_one_is_no_good(own, here, way):
    os.mkdir(own.path("bin"))
    own.write("bin/python3", "#!/bin/sh\n%s\n" % WAYS[way])
    os.chmod(own.path("bin", "python3"), 0o755)
    own.forced('PATH=%s:$PATH; exec sh -c "$SSH_ORIGINAL_COMMAND"' % own.path("bin"))
    (here / "in" / "big one").write_bytes(os.urandom((9 << 20) + 1))
    code, out = run(own, here, "run", "hpc", "mkdir o; cp * o; exit 5", "--in", "in/big one", "--streams", "2")
    assert code == 5 and sha(here / "o" / "big one") == sha(here / "in" / "big one") and "door=far" in out, out


@pytest.mark.parametrize("door", ["far", "guard"])
def test_a_read_only_input_is_put_once_more_when_its_answer_was_lost(door):
    ident = "00000000-0000-4000-8000-000000000001"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []     # nothing is read-only to root
    asks = [{"do": "hello", "v": 2, "run": ident, "lane": "put", "turn": "a"}] + [
        {"do": "put", "name": "a", "at": 0, "size": 2, "end": [2, 0o444, 100000000001]}, {"do": "put", "name": "a", "size": 0, "end": [2, 0o444, 100000000001]}] * 2
    frames = b"".join(json.dumps(one).encode() + b"\n" + b"xy"[:one.get("size", 0)] for one in asks)
    top = tempfile.mkdtemp()
    try:
        base = os.path.join(top, "far")
        for folder in (top, base):
            os.makedirs(folder, exist_ok=True)
            os.chown(folder, *((65534, 65534) if os.geteuid() == 0 else (-1, -1)))
        asked, variables = runner.host_command(runner.LOADER, "2", "door", base, runner.own_file()[1]), {"PATH": "/usr/bin:/bin"}
        if door == "guard":
            shutil.copy(SCRIPT, top)
            with open(os.path.join(top, "mi_distributed_computing_assist.ini"), "w") as ini:
                ini.write("[ssh guard]\nbase = %s\n" % base)
            words, variables["SSH_ORIGINAL_COMMAND"] = ["python3", os.path.join(top, os.path.basename(SCRIPT)), "guard", "--ini", ini.name], asked
        else:
            program = zlib.compress(runner.own_file()[0])
            words, frames = ["sh", "-c", asked], b"%d\n" % len(program) + program + frames
        done = subprocess.run(as_nobody + words, input=frames, stdout=subprocess.PIPE, env=variables, cwd="/")
        told = [json.loads(row.decode()) for row in done.stdout.splitlines() if row.startswith(b"{")]
        assert [len(one.get("sums", "none")) for one in told[1:]] == [1, 0, 1, 0] and told[0]["door"] == door, told
        info = os.stat(os.path.join(base, ident, "a"))
        assert (info.st_mode & 0o7777, info.st_mtime_ns, info.st_size) == (0o444, 100000000001, 2)
    finally:
        shutil.rmtree(top)


def test_an_input_that_fits_nowhere_there_is_one_line(own, here, disk_of):
    own.start()
    with open(own.path("ini")) as text:
        changed = text.read().replace(own.path("far"), str(disk_of("3m")))
    own.write("ini", changed)
    (here / "in" / "big").write_bytes(os.urandom(9 << 20))
    code, out = run(own, here, "run", "hpc", "true", "--in", "in/big")
    assert code == 74 and out.count("No space left on device (is the disk full there?)") == 1 and "Traceback" not in out, out


@pytest.mark.parametrize("shell", ["tcsh", "fish", "zsh", "dash"])
def test_other_log_in_shells_pass_the_words_on(here, shell):
    suite.needs("tcsh", "fish", "zsh", "dash")
    base = here / "計 算'!$x"
    words = runner.host_command(runner.LOADER, "2", "door", str(base), "0" * 16)
    done = subprocess.run([shell, "-c", words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout == b"\nmi_distcomp 2 bring z\n" and (base / ".mi").is_dir(), done.stderr


def test_a_noisy_log_in_shell_is_no_harm(own, here):
    own.forced('echo Welcome; echo E end; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    code, out = run(own, here, "run", "hpc", "echo 1 >r")
    assert code == 0 and (here / "r").exists(), out


def test_an_ssh_that_does_not_hear_its_end_is_not_waited_for(lab, monkeypatch, tmp_path):
    """OpenSSH 9.2 misses a SIGTERM that comes just before it begins to wait."""
    with open(str(tmp_path / "ssh"), "w") as deaf:
        deaf.write("#!/bin/sh\ntrap '' TERM\nexec %s \"$@\"\n" % shutil.which("ssh"))
    os.chmod(deaf.name, 0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path, os.environ["PATH"]))
    monkeypatch.setenv("XDG_STATE_HOME", lab.path("state"))
    line = runner.Line("hpc", runner.settings_of_options({"base": lab.path("far"), "ssh_options": "-F " + lab.path("config")})).open()
    process = line.process
    line.close()
    assert process.returncode != -signal.SIGKILL


def test_it_is_importable_as_one_function(lab, here, monkeypatch):
    monkeypatch.chdir(str(here))
    monkeypatch.setenv("XDG_STATE_HOME", lab.path("state"))
    (here / "in" / "a").write_text("1")
    outcome = runner.run_calculation("hpc", "cat a a >b; exit 9", ["in/a"], settings=runner.settings_of_options({"ini": lab.path("ini")}))
    assert outcome.code == 9 and outcome.ended_by == "command" and (here / "b").read_text() == "11"


SECRET = "# SECRET-TABLE\n0.50 0.2512345\n0.70 0.1812345\n0.90 0.0812345\n"


@pytest.mark.parametrize("numbers,code", [("420 560 62", 0), ("600 560 62", 65)])
def test_the_sample_script_gives_the_curve_and_keeps_the_secret(lab, here, numbers, code):
    suite.needs("ccx")
    lab.write("table", SECRET)
    os.makedirs(lab.path("scratch"), exist_ok=True)
    (here / "in" / "tensile.txt").write_text(numbers + "\n")
    script = os.path.join(suite.ROOT, "execute_remote_side_program_ssh.sample.sh")
    got, out = run(lab, here, "run", "hpc", "TABLE=%s SCRATCH=%s %s" % (lab.path("table"), lab.path("scratch"), script), "--in", "in/tensile.txt", "--keep")
    assert got == code, out
    assert os.listdir(lab.path("scratch")) == []
    if code == 0:
        rows = (here / "result.csv").read_text().splitlines()
        force = [float(row.split(",")[1]) for row in rows[1:]]
        assert len(rows) > 5 and force == sorted(force) and 40000 < force[0] < force[-1] < 70000
    far = lab.path("far", ident_of(out))
    for top, _d, names in list(os.walk(far)) + list(os.walk(str(here))):
        for name in names:
            assert b"12345" not in open(os.path.join(top, name), "rb").read() or name == "table"


def test_the_sample_script_forgets_the_secret_when_the_solver_fails_or_is_cancelled(lab, here):
    suite.needs("ccx")
    lab.write("table", SECRET)
    os.makedirs(lab.path("scratch"), exist_ok=True)
    script = open(os.path.join(suite.ROOT, "execute_remote_side_program_ssh.sample.sh")).read()
    for solver, wanted in (("echo no licence; return 3", 3), ("sleep 1000", 143)):
        path = lab.path("solver.sh")
        lab.write("solver.sh", script.replace("solve() { ccx job; }", "solve() { %s; }" % solver))
        process = start(lab, here, "run", "hpc", "TABLE=%s SCRATCH=%s sh %s 420 560 62" % (lab.path("table"), lab.path("scratch"), path))
        out = ""
        for row in iter(process.stdout.readline, b""):
            out += row.decode()
            if wanted == 143 and b"5 start" in row:
                time.sleep(0.5)
                assert os.listdir(lab.path("scratch"))
                run(lab, here, "cancel", ident_of(out), "--grace", "5")
        assert process.wait() == wanted, out
        assert os.listdir(lab.path("scratch")) == []
