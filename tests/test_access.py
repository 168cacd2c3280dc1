"""Who gets in: passwords and the tokens they give, where a token can be seen, what `check` finds, what `unit` prints."""
import json
import os
import pty
import re
import select
import stat
import subprocess
import time

import pytest
import suite
from suite import SITE, USER, one_line, run, wait_until
from test_hostile_framing import BASE, Raw
from test_mutations import copy

relay = suite.module("mi_dicomapi.py")
PASSWORD = "correct horse battery staple"


def typed(words, answers, env=None):
    """Runs a script at a terminal and types an answer at each prompt that ends like the answer's key: (exit code, all that the terminal showed)."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(suite.PYTHON, [suite.PYTHON, "-I", "-S", suite.script(words[0])] + words[1:], env or suite.clean_env())
    shown, todo, until = b"", list(answers), time.monotonic() + 60
    while time.monotonic() < until:
        if select.select([fd], [], [], 0.2)[0]:
            try:
                data = os.read(fd, 4096)
            except OSError:                            # its end
                break
            shown += data
            if todo and todo[0][0] in shown[-200:].decode("utf-8", "replace") and shown.rstrip(b" ").endswith(b":"):
                os.write(fd, todo.pop(0)[1].encode() + b"\n")
                shown += b"|"
    os.close(fd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, shown.decode("utf-8", "replace")


def piped(words, line):
    """Runs a script with a line on its standard input."""
    done = subprocess.run([suite.PYTHON, "-I", "-S", suite.script(words[0])] + words[1:], input=line.encode() + b"\n", timeout=60, env=suite.clean_env(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """A relay with users; quick sums, for the tests only."""
    made = suite.World(tmp_path_factory.mktemp("door"), commands=["hello"], ini="[Server]\nauth = login\nloglevel = debug\n").start()
    for name in (USER, "bob", "carol", "dave"):
        assert piped(["mi_dicomapi.py", "user", "add", name, "--ini", made.ini], PASSWORD).returncode == 0
    yield made
    made.close()


def wf(world, *words):
    """The workflow side's words with relay and CA."""
    return ["mi_system_wf.py"] + list(words) + ["--url", world.url, "--ca-file", world.cert]


# ---- passwords

def test_a_password_typed_at_a_terminal_is_not_shown_and_gives_a_token_file_that_only_its_owner_reads(door):
    path = os.path.join(door.folder, "alice.token")
    code, shown = typed(wf(door, "login", USER, "--token-file", path), [("password of", PASSWORD)])
    assert code == 0 and PASSWORD not in shown and "good until" in shown
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    done = run("mi_system_wf.py", "check", SITE, "hello", "--url", door.url, "--ca-file", door.cert, "--token-file", path)
    assert done.returncode == 0 and "OK    the relay takes this token" in done.stdout, done.stdout
    code, shown = typed(["mi_dicomapi.py", "user", "passwd", "dave", "--ini", door.ini], [("new password", "a new one, 10"), ("once more", "another, 10")])
    assert code == 64 and "not the same" in shown and "a new one" not in shown


def test_the_poller_works_with_a_log_ins_token_and_goes_on_when_it_is_renewed(make_world):
    world = make_world(commands=["hello"], ini="[Server]\nauth = login\n[times]\nwait = 2s\n").start()
    assert piped(["mi_dicomapi.py", "user", "add", USER, "--ini", world.ini], PASSWORD).returncode == 0
    folder, ini = world.poller({"hello": "match = hello\nargv = /bin/echo"}, start=False)
    login = ["mi_system_remote.py", "login", USER, "--ini", ini]
    assert piped(login, PASSWORD).returncode == 0
    process = suite.Process("mi_system_remote.py", ["poll", "--ini", ini], folder)
    world.pollers.append(process)
    client = world.client()
    first = client.register("hello")
    wait_until(lambda: world.state_of(first) == "got", 30)
    import sqlite3                                     # the token ends while the poller runs
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    db.execute("UPDATE tokens SET expires = ? WHERE login", (time.time() - 5,))
    db.commit()
    db.close()
    wait_until(lambda: "実行権" in process.text(), 30)
    second = world.client().register("hello")
    assert world.state_of(second) == "allowed" and piped(login, PASSWORD).returncode == 0
    wait_until(lambda: world.state_of(second) == "got", 60)
    assert process.alive()
    listed = json.loads(run("mi_dicomapi.py", "token", "list", "--json", "--ini", world.ini).stdout)
    logins = [row for row in listed if row["login"]]
    assert [row["user"] for row in logins] == [USER, USER] and logins[1]["expires"] - time.time() < 12 * 3600 + 5
    world.relay.stop()
    listed = json.loads(run("mi_dicomapi.py", "token", "list", "--json", "--ini", world.ini).stdout)
    assert all(row["used"] and abs(row["used"] - time.time()) < 600 for row in listed)


def test_guessing_is_answered_alike_for_users_that_are_and_are_not_and_ends_in_a_lock(door):
    client = door.client("")

    def guess(user, password):
        return client.call("POST", "login", {"v": 2, "user": user, "password": password})

    told = {user: [guess(user, "wrong %d" % turn) for turn in range(5)] for user in ("bob", "nobody")}
    assert told["bob"] == told["nobody"] == [(403, {"code": "0005", "message": "user or password is wrong", "why": "login",
                                                         "said": "login", "told": {}})] * 5
    for user in told:
        status, first = guess(user, PASSWORD)
        assert status == first["code"] == 429 and 0 < first["wait"] <= 61 and "try again in" in first["message"], first
    assert guess("carol", PASSWORD)[0] == 200          # another user from the same address
    path = os.path.join(door.folder, "bob.token")
    done = piped(wf(door, "login", "bob", "--token-file", path), PASSWORD)
    assert done.returncode == 75 and one_line(done.stderr) and not os.path.exists(path)
    for number in range(4):                            # one address, many users: the address is locked for all but those who are known there
        for turn in range(4):
            guess("user %d" % number, "wrong")
    assert guess("dave", PASSWORD)[0] == 429 and guess("carol", PASSWORD)[0] == 200
    for turn in range(5):
        assert guess("carol", "wrong")[0] == 403
    assert guess("carol", PASSWORD)[0] == 429          # guessed at from his own address
    assert door.client().register("hello", allow=False)                  # who has a token is not concerned


def test_failures_lock_for_longer_and_longer_and_take_no_memory():
    one = relay.Access.__new__(relay.Access)
    one.failures = relay.collections.OrderedDict()
    waits = []
    for turn in range(9):
        one.count_failure("bob", "10.0.0.1")
        waits.append(round(one.failures["bob", "10.0.0.1"][1] - time.monotonic()))
    assert waits[:7] == [0, 0, 0, 0, 60, 120, 240] or waits[4:7] == [60, 120, 240]
    for turn in range(20000):
        one.count_failure("user %d" % turn, "10.0.%d.%d" % (turn // 256 % 256, turn % 256))
    assert len(one.failures) <= 10000
    one.failures.clear()
    for number in range(50):
        one.count_failure("bob", "10.0.1.%d" % number)
    with pytest.raises(relay.ApiError):
        one.check_failures("bob", "10.9.9.9", False)   # fifty addresses at one user
    one.check_failures("bob", "10.9.9.9", True)


def log_in(world, user, password, source):
    """HTTP status of a log-in from an address of this host."""
    body = json.dumps({"v": 2, "user": user, "password": password}).encode()
    line = b"POST " + BASE + b"login HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
    return Raw(world, source=source).send(line % (len(body), body)).answer()[0]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A relay with users, of a copy of the scripts in which a password's sum takes no time."""
    before, suite.ROOT = suite.ROOT, copy(str(tmp_path_factory.mktemp("quick") / "scripts"), [("mi_dicomapi.py", "ROUNDS = 600000 ", "ROUNDS = 60 ")])
    made = suite.World(tmp_path_factory.mktemp("quick"), tls=False, commands=["hello"], ini="[Server]\nauth = login\n").start()
    for name in ("erin", "frank"):
        assert piped(["mi_dicomapi.py", "user", "add", name, "--ini", made.ini], PASSWORD).returncode == 0
    suite.ROOT = before
    yield made
    made.close()


def test_fifty_wrong_passwords_from_elsewhere_lock_nobody_out_at_an_address_that_is_known_to_be_his(quick):
    assert log_in(quick, "erin", PASSWORD, "127.0.7.1") == 200
    for number in range(60):                           # a few from each of many addresses
        log_in(quick, "erin", "wrong", "127.0.8.%d" % (number // 4 + 1))
    assert log_in(quick, "erin", "wrong", "127.0.8.99") == log_in(quick, "erin", PASSWORD, "127.0.8.99") == 429        # anywhere else, right or wrong
    assert log_in(quick, "erin", PASSWORD, "127.0.7.1") == 200
    assert piped(["mi_dicomapi.py", "user", "passwd", "erin", "--ini", quick.ini], PASSWORD).returncode == 0
    assert log_in(quick, "erin", PASSWORD, "127.0.7.1") == 429           # a new password: whoever knew the old one is known nowhere


def test_a_user_who_logs_in_again_and_again_holds_no_more_than_so_many_tokens(quick):
    import sqlite3
    db = sqlite3.connect(os.path.join(quick.state, "state.sqlite3"))
    db.executemany("INSERT INTO tokens (hash, user, roles, sites, issued, expires, login) VALUES (?, 'frank', 'remote', '', 1, ?, 1)",
                   [("old %d" % number, time.time() + 1000) for number in range(200)])
    db.commit()
    db.close()
    assert log_in(quick, "frank", PASSWORD, "127.0.7.2") == 200
    found = quick.rows("SELECT hash FROM tokens WHERE login AND user = 'frank' ORDER BY number")
    assert len(found) == relay.LOGINS_KEPT and found[-2]["hash"] == "old 199"


def test_log_ins_hold_no_worker_and_are_limited_in_length_and_number(door):
    from test_hostile_framing import answers
    line = b"POST " + BASE + b"login HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
    (status, first), = answers(Raw(door).send(line % (5000, b"x" * 5000)).rest())
    assert status == 413
    body = b'{"v":2,"user":"eve","password":"x"}'
    raws = [Raw(door, source="127.0.3.%d" % (number % 9 + 1)).send(line % (len(body), body)) for number in range(60)]
    assert door.client().register("hello", allow=False)                  # answered while their sums are made
    statuses = {raw.answer()[0] for raw in raws}
    assert statuses <= {403, 429} and 429 in statuses
    for body in (b"{}", b'{"v":2,"user":1,"password":"x"}', b'{"v":2,"user":"eve","password":["x"]}', b"[]", b'{"v":2,"user":"\\ud800","password":""}'):
        assert Raw(door, source="127.0.4.1").send(line % (len(body), body)).answer()[0] == 400


def test_a_changed_password_and_a_removed_user_end_what_was_logged_in(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[Server]\nauth = login\n").start()
    client = world.client("")

    def user(*words):
        return piped(["mi_dicomapi.py", "user"] + list(words) + ["--ini", world.ini], PASSWORD)

    assert user("add", "eve", "--sites", "nowhere").returncode == 64 and user("passwd", "eve").returncode == 64
    assert user("add", "eve", "--roles", "workflow").returncode == 0 and user("add", "eve").returncode == 64
    assert piped(["mi_dicomapi.py", "user", "add", "kim", "--ini", world.ini], "short").returncode == 64
    for end in (("passwd", "eve"), ("remove", "eve")):
        token = client.ok("POST", "login", {"v": 2, "user": "eve", "password": PASSWORD})["token"]
        accept_id = world.client(token).register("hello", allow=False)
        assert accept_id and user(*end).returncode == 0
        wait_until(lambda: world.client(token).call("GET", "calc-progress", {"v": 2, "accept_id": accept_id})[0] == 403, 20)
    assert client.call("POST", "login", {"v": 2, "user": "eve", "password": PASSWORD})[0] == 403
    assert user("list").returncode == 0
    with open(os.path.join(world.state, "state.sqlite3"), "rb") as text:
        assert PASSWORD.encode() not in text.read()


def test_a_relay_without_log_in_says_so(world):
    done = piped(wf(world, "login", USER, "--token-file", os.path.join(world.folder, "x")), PASSWORD)
    assert done.returncode == 77 and one_line(done.stderr) and "no log-in" in done.stderr
    assert world.client("").call("POST", "login", {"v": 2, "user": USER, "password": PASSWORD})[0] == 404


def test_a_database_of_the_version_before_is_brought_up_to_date(tmp_path):
    import sqlite3
    world = suite.World(tmp_path / "w", tls=False, commands=["hello"])
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    db.executescript("ALTER TABLE tokens DROP COLUMN used; ALTER TABLE tokens DROP COLUMN login; DROP TABLE users; PRAGMA user_version = 1;"
                     "ALTER TABLE files DROP COLUMN x; ALTER TABLE files DROP COLUMN mtime; ALTER TABLE calculations DROP COLUMN verdicts;"
                     "ALTER TABLE calculations DROP COLUMN texts; ALTER TABLE calculations DROP COLUMN waits; ALTER TABLE calculations DROP COLUMN signed;"
                     "DROP TABLE past; DROP TABLE events; DROP TABLE pollers")
    db.close()
    assert world.start().client().register("hello", allow=False)
    world.close()


# ---- where a token could be seen

def test_token_and_password_are_seen_nowhere_but_in_their_file(make_world):
    world = make_world(commands=["spy"], ini="[Server]\nauth = login\nloglevel = debug\n").start()
    assert piped(["mi_dicomapi.py", "user", "add", USER, "--ini", world.ini], PASSWORD).returncode == 0
    path = os.path.join(world.folder, "spy.sh")
    with open(path, "w") as out:                       # all that a command can find out about its parents
        out.write("#!/bin/sh\nps -eo args >ps.txt\nenv >env.txt\nulimit -c >core.txt\np=$PPID\nwhile [ $p -gt 1 ]; do cat /proc/$p/cmdline /proc/$p/environ"
                  " >>proc.txt 2>/dev/null; p=$(ps -o ppid= -p $p | tr -d ' '); [ -n \"$p\" ] || break; done\nsleep 1\n")
    os.chmod(path, 0o755)
    folder, ini = world.poller({"spy": "match = spy\nargv = " + path}, start=False)
    done = piped(["mi_system_remote.py", "login", USER, "--ini", ini], PASSWORD)
    with open(os.path.join(folder, "..", "poller.token")) as text:
        tokens = [text.read().strip(), world.token]
    poller = suite.Process("mi_system_remote.py", ["poll", "-v", "--ini", ini], folder)
    world.pollers.append(poller)
    ran = world.workflow("run", SITE, "spy", "--out", "*.txt", "-v")
    assert ran.returncode == 0, ran.stderr
    for word in (tokens[0] + "x", "0" * 64):           # refused ones, too
        world.client(word).call("GET", "calc-progress", {"v": 2, "accept_id": "x"})
    listed = [run("mi_dicomapi.py", *(words + ["--ini", world.ini])).stdout for words in (["token", "list"], ["user", "list"], ["list", "--all"], ["check"])]
    texts = [done.stdout, done.stderr, ran.stdout, ran.stderr, poller.text(), world.relay.text(), run("mi_system_remote.py", "list", "--ini", ini).stdout]
    for process in (poller, world.relay):
        for name in ("cmdline", "environ"):
            with open("/proc/%d/%s" % (process.pid, name), "rb") as text:
                texts.append(text.read().decode("latin-1"))
        with open("/proc/%d/limits" % process.pid) as text:
            assert re.search(r"Max core file size\s+0 ", text.read()), "no core dump may hold the token"
    for top, folders, files in list(os.walk(os.path.join(world.folder, "wf"))) + list(os.walk(os.path.join(folder, "base"))) + list(os.walk(world.state)):
        for name in files:
            if stat.S_ISREG(os.lstat(os.path.join(top, name)).st_mode):  # `alive` is a FIFO
                with open(os.path.join(top, name), "rb") as text:
                    texts.append(text.read().decode("latin-1"))
    assert sum("\n" in text for text in listed) == 4 and len(texts) > 12
    for secret in tokens + [PASSWORD]:
        assert not [text for text in texts + listed if secret in text]


# ---- check

def test_check_of_a_sound_relay_and_its_peers_finds_no_fault(door):
    folder, ini = door.poller({"hello": "match = hello\nargv = /bin/echo"}, name="sound", start=False)
    for done in (run("mi_dicomapi.py", "check", "--ini", door.ini), run("mi_system_remote.py", "check", "--ini", ini), door.workflow("check", SITE, "hello")):
        assert done.returncode == 0 and "FAIL" not in done.stdout and "days left" in done.stdout, done.stdout
        assert all(re.match("(OK   |WARN |FAIL ) ", line) for line in done.stdout.splitlines())
    for words in (["mi_dicomapi.py", "check", "--json", "--ini", door.ini], ["mi_system_remote.py", "check", "--json", "--ini", ini]):
        assert {"level", "text"} == set(json.loads(run(*words).stdout)[0])
    assert not os.path.exists(os.path.join(folder, "base"))              # it changed nothing
    assert door.rows("SELECT COUNT(*) AS n FROM calculations")[0]["n"] == len(door.rows("SELECT 1 FROM calculations WHERE state = 'registered'"))


def poller_ini(door, folder, **changes):
    """A poller's ini with other values."""
    os.makedirs(str(folder), exist_ok=True)
    token = os.path.join(str(folder), "token")
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(changes.pop("token", door.token))
    os.chmod(token, changes.pop("mode", 0o600))
    keys = dict({"site": SITE, "url": door.url, "token_file": token, "ca_file": door.cert, "calc_base": os.path.join(str(folder), "base")})
    argv, keep = changes.pop("argv", "/bin/echo"), changes.pop("keep_free", "1K")
    keys.update(changes, keep_free=keep)
    path = os.path.join(str(folder), "poller.ini")
    with open(path, "w") as out:
        out.write("[poller]\n" + "".join("%s = %s\n" % pair for pair in keys.items()) + "[command hello]\nmatch = hello\nargv = %s\n" % argv)
    return path


FAULTS = {                     # what is wrong: (changes of the poller's ini, what the line says)
    "a token that others read": ({"mode": 0o644}, r"FAIL .*token.*chmod 600"),
    "a token of nobody": ({"token": "0" * 64}, r"FAIL .*token is refused \(unknown token\)"),
    "another site": ({"site": "u-none"}, r"FAIL .*does not match"),
    "a host without a name": ({"url": "https://no-such-host.invalid:50443"}, r"FAIL .*no-such-host.invalid: the name is not known"),
    "nobody there": ({"url": "https://127.0.0.1:1"}, r"FAIL .*127.0.0.1:1.*(refused|111)"),
    "a certificate of another CA": ({"ca_file": ""}, r"FAIL .*TLS failed.*ca_file"),
    "a command that is not there": ({"argv": "/opt/no/solver"}, r"FAIL .*/opt/no/solver: No such file"),
    "a command that does not run": ({"argv": "/etc/passwd"}, r"FAIL .*chmod \+x"),
    "no room": ({"keep_free": "900T"}, r"FAIL .*make room"),
    "calc_base in memory": ({"calc_base": "/dev/shm/mi-check"}, r"WARN .*in memory \(tmpfs\)"),
    "a proxy that is none": ({"proxy": "http://127.0.0.1:1"}, r"FAIL .*proxy 127.0.0.1:1"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_check_says_what_is_wrong_and_what_to_do(what, door, tmp_path):
    changes, line = FAULTS[what]
    done = run("mi_system_remote.py", "check", "--ini", poller_ini(door, tmp_path, **changes))
    assert re.search(line, done.stdout) and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert done.returncode == (78 if line.startswith("FAIL") else 0)


def test_a_cleaner_of_old_files_is_found_unless_it_is_switched_off_or_excepts_the_folder(tmp_path, monkeypatch):
    etc, lib = tmp_path / "etc", tmp_path / "lib"
    monkeypatch.setattr(relay, "TMPFILES_DIRS", (str(etc), str(tmp_path / "none"), str(lib)))
    etc.mkdir()
    lib.mkdir()
    (lib / "tmp.conf").write_text("# old files\nq /tmp 1777 root root 10d\nq /var/tmp 1777 root root 30d\nd /srv/x 0755 root root -\n")
    assert "10d" in relay.cleaner_below("/tmp/mi/base") and "30d" in relay.cleaner_below("/var/tmp")
    assert relay.cleaner_below("/srv/x/base") is None and relay.cleaner_below("/tmpfoo") is None
    assert any(good is None and "old files" in text for good, text in relay.findings_of_disk("/var/tmp", 0))
    (etc / "mi.conf").write_text("x /tmp/mi\n")
    assert relay.cleaner_below("/tmp/mi/base") is None
    (etc / "tmp.conf").write_text("q /var/tmp 1777 root root -\n")
    assert relay.cleaner_below("/var/tmp") is None


def test_check_of_the_relay_says_what_is_wrong(tmp_path):
    world = suite.World(tmp_path / "w", commands=["hello"])
    os.chmod(world.key, 0o644)
    world.cert, world.key = suite.make_certificate(world.folder, days=3)
    world.write_ini(1)
    os.chmod(world.key, 0o644)
    os.chmod(world.state, 0o755)
    done = run("mi_dicomapi.py", "check", "--ini", world.ini)
    assert done.returncode == 78 and re.search(r"FAIL .*key.pem: mode 0644.*chmod", done.stdout) and re.search(r"WARN .*days left; renew it", done.stdout)
    assert re.search(r"FAIL .*state: mode 0755", done.stdout) and re.search("WARN  nothing answers on port 1", done.stdout), done.stdout
    with open(world.ini, "a") as out:
        out.write("[limits]\nmax_bodyy = 1\n")
    done = run("mi_dicomapi.py", "check", "--ini", world.ini)
    assert done.returncode == 78 and done.stdout.startswith("FAIL ") and "max_body" in done.stdout


def test_check_sees_a_gateway_that_lets_some_calls_not_through(door, tmp_path):
    import http.server
    import threading

    class Gateway(http.server.BaseHTTPRequestHandler):
        """Passes on all but two calls, as HTML, as gateways do."""

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            stopped = "heartbeat" in self.path or "files/" in self.path
            status, data, headers = (403, b"<html>no</html>", {}) if stopped else door.client().raw(
                self.command, self.path.replace("/mi-distcomp-api/", "", 1), body or None)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = run("mi_system_remote.py", "check", "--ini", poller_ini(door, tmp_path, url="http://127.0.0.1:%d" % server.server_port))
    finally:
        server.shutdown()
        server.server_close()
    line, = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert "heartbeat" in line and "files/" in line and "calc-start" not in line and done.returncode == 78


# ---- unit

def analyze(*words):
    """systemd-analyze, silent or not."""
    suite.needs("systemd-analyze")
    return subprocess.run(["systemd-analyze"] + list(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, env=dict(os.environ, LANG="C"))


@pytest.mark.parametrize("script, words, most", [("mi_dicomapi.py", [], 2.0), ("mi_system_remote.py", [], 5.5), ("mi_system_remote.py", ["--once"], 5.5)])
def test_the_unit_is_what_systemd_expects_and_shuts_what_can_be_shut(script, words, most, tmp_path):
    ini = tmp_path / "some.ini"
    ini.write_text("[Server]\n[poller]\nsite = u\nurl = https://relay.example.org\ntoken_file = /etc/mi.token\n[command x]\nargv = /bin/true\n")
    done = run(script, "unit", "--ini", str(ini), *words)
    assert done.returncode == 0 and not done.stderr
    unit = tmp_path / script.replace(".py", ".service")
    unit.write_text(done.stdout)
    files = [str(unit)]
    if words:
        files.append(str(tmp_path / "mi_system_remote.timer"))
        (tmp_path / "mi_system_remote.timer").write_text(run(script, "unit", "--timer", "--ini", str(ini)).stdout)
    for name in files:
        checked = analyze("verify", name)
        assert (checked.returncode, checked.stdout.decode()) == (0, "")
    found = analyze("security", "--offline=true", "--no-pager", str(unit))
    assert float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", found.stdout.decode()).group(1)) <= most
    assert "PrivateTmp=yes" not in done.stdout
    if script == "mi_system_remote.py":
        assert "KillMode=process" in done.stdout and "MemoryDenyWriteExecute=yes" not in done.stdout


def test_what_a_machine_made_on_demand_needs_is_yaml_with_the_unit_in_it(tmp_path):
    ini = tmp_path / "some.ini"
    ini.write_text("[poller]\nsite = u\nurl = https://relay.example.org\n")
    text = run("mi_system_remote.py", "unit", "--cloud-init", "--ini", str(ini)).stdout
    assert text.startswith("#cloud-config\n") and "--idle-exit 600" in text and "SuccessAction=poweroff" in text
    unit = tmp_path / "mi_system_remote.service"
    unit.write_text("\n".join(line[6:] for line in text.split("content: |\n")[1].split("runcmd:")[0].splitlines()) + "\n")
    checked = analyze("verify", str(unit))
    assert (checked.returncode, checked.stdout.decode()) == (0, "")
