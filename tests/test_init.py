"""`init`: from nothing to two hosts, with nothing but what it made; one-use codes, the certificate, and what is left when it is killed."""
import concurrent.futures
import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import tempfile
import time

import pytest
import suite

SCRIPTS = ("mi_dicomapi.py", "mi_system_remote.py", "mi_system_wf.py")
INI = "mi_distributed_computing_assist.ini"
SITE, USER = "u-tokyo", "suzuki"
LATER = """import sys, time
shift, path = float(sys.argv[1]), sys.argv[2]
sys.argv, now = sys.argv[2:], time.time
time.time = lambda: now() + shift
exec(compile(open(path, "rb").read(), path, "exec"), {"__name__": "__main__", "__file__": path})
"""                                                    # a program whose clock differs


def init(folder, *words, env=None, python=None):
    """`init` in that directory."""
    return suite.run("mi_dicomapi.py", "init", *words, cwd=str(folder), env=env, python=python)


class Relay:
    """What `init` has made for 127.0.0.1, running."""

    def __init__(self, folder, host="127.0.0.1", words=()):
        self.folder, self.port = str(folder), suite.a_port()
        self.made = init(folder, "--name", "%s:%d" % (host, self.port), "--site", SITE, "--user", USER, *words)
        assert self.made.returncode == 0, self.made.stderr
        self.dir = os.path.join(self.folder, "mi_relay")
        self.ini, self.pem = os.path.join(self.dir, INI), os.path.join(self.dir, "relay.pem")
        self.ca = os.path.join(self.dir, "ca", "ca.pem")
        self.relay, self.user, self.number = None, USER, 0

    def start(self):
        """The relay, as `init` says."""
        before = self.relay.text().count(" listening ") if self.relay else 0
        self.relay = suite.Process("mi_dicomapi.py", ["serve", "--ini", self.ini], self.folder)
        suite.wait_until(lambda: self.relay.text().count(" listening ") > before or not self.relay.alive(), what="relay")
        assert self.relay.alive(), self.relay.text()
        return self

    def made_kit(self, of=SITE):
        """Where init has put a kit of the user."""
        return os.path.join(self.dir, "kits", "%s.%s" % (of, self.user))

    def kit(self, of=SITE):
        """The kit, copied to another host."""
        goal = os.path.join(self.folder, "copy-%d" % len(os.listdir(self.folder)))
        shutil.copytree(self.made_kit(of), goal)
        return goal

    def code(self, of=SITE):
        """The code of a kit."""
        with open(os.path.join(self.made_kit(of), "token.code")) as text:
            return text.read()

    def tokens(self, columns="1"):
        """The rows of the user's tokens, codes not."""
        return self.db("SELECT %s FROM tokens WHERE login = 0 AND user = ?" % columns, self.user)

    def redeem(self, code, role="remote", site=SITE, hashed=None):
        """(HTTP status, errors[0]) of the call by which a kit's host uses its code."""
        fields = {"v": 2, "code": re.sub(r"[\s-]", "", code), "hash": hashed or os.urandom(32).hex(), "role": role, "site": site}
        return self.client("").call("POST", "v2/redeem", fields)

    def client(self, token):
        """A bare client."""
        place = type("Place", (), {"tls": True, "cert": self.ca, "port": self.port})
        return suite.Client(place, token)

    def db(self, sql, *values):
        """Rows of the relay's database, or a change of it."""
        with contextlib.closing(sqlite3.connect(os.path.join(self.dir, "state", "state.sqlite3"), timeout=10)) as db, db:
            return db.execute(sql, values).fetchall()

    def poll(self, kit, *words, env=None):
        """The kit's own poller, to its end."""
        return kit_run(os.path.join(kit, "mi_system_remote.py"), *(words or ("poll", "--once")), env=env)

    def serves(self):
        """The certificate that it shows now, as PEM."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as sock, strict(self.ca).wrap_socket(sock, server_hostname="127.0.0.1") as tls:
            return ssl.DER_cert_to_PEM_cert(tls.getpeercert(True))

    def close(self):
        self.relay.stop()
        assert "Traceback" not in self.relay.text() and "bug=" not in self.relay.text(), self.relay.text()


def kit_run(script, *words, env=None, stdin=subprocess.DEVNULL):
    """A script of a kit, which finds its ini beside it."""
    return suite.run(script, *words, cwd=os.path.dirname(script), timeout=90, env=env, stdin=stdin)


def strict(ca):
    """A TLS context as strict as that of Python 3.13."""
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT | getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0)
    return context


def picture(folder):
    """{name: bytes, or None of a directory, and its mode} of all below it."""
    found = {}
    for above, names, files in os.walk(folder):
        for name in names + files:
            path = os.path.join(above, name)
            data = None
            if os.path.isfile(path):
                with open(path, "rb") as text:
                    data = text.read()
            found[os.path.relpath(path, folder)] = data, stat.S_IMODE(os.lstat(path).st_mode)
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """One relay for the tests of this file."""
    made = Relay(tmp_path_factory.mktemp("relay")).start()
    yield made
    made.close()


@pytest.fixture
def relay(started):
    """The relay, with kits of a user of the test's own."""
    started.number += 1
    started.user = "user%d" % started.number
    done = init(started.folder, "--site", SITE, "--user", started.user)
    assert done.returncode == 0, done.stderr
    return started


# ---- two hosts

class Hosts:
    """Two hosts of ordinary users without anything: two network namespaces with a line between them (as root), or this one."""

    def __init__(self, spaces):
        self.top, self.spaces, self.typed, self.running, self.python = tempfile.mkdtemp(prefix="mi-two-"), [], [], [], suite.PYTHON
        os.chmod(self.top, 0o755)
        self.homes = [os.path.join(self.top, name) for name in ("dmz", "external")]
        self.address, self.uids = "127.0.0.1", [os.geteuid()] * 2
        if spaces:
            suite.needs("root", "ip", "setpriv")
            if os.geteuid() != 0:
                pytest.skip("needs root itself: network namespaces")
            self.uids, self.python, self.address = [65533, 65532], suite.python_for_others(), "10.97.1.1"
            self.spaces = ["mi%s%d" % (letter, os.getpid()) for letter in "de"]
            for name in self.spaces:
                self.root("ip", "netns", "add", name)
            self.root("ip", "link", "add", "e", "netns", self.spaces[0], "type", "veth", "peer", "name", "e", "netns", self.spaces[1])
            for number, name in enumerate(self.spaces, 1):
                self.root("ip", "-n", name, "addr", "add", "10.97.1.%d/24" % number, "dev", "e")
                for link in ("e", "lo"):
                    self.root("ip", "-n", name, "link", "set", link, "up")
        for home, uid in zip(self.homes, self.uids):
            os.mkdir(home, 0o700)
            os.chown(home, uid, -1)
        for name in SCRIPTS:
            shutil.copy(suite.script(name), self.homes[0])
            os.chown(os.path.join(self.homes[0], name), self.uids[0], -1)

    def root(self, *words):
        subprocess.run(list(words), check=True)

    def type(self, host, line, background=False):
        """What a user types on a host: its output; in the background: a process."""
        self.typed.append(line)
        before = []
        if self.spaces:
            before = ["ip", "netns", "exec", self.spaces[host], "setpriv", "--reuid=%d" % self.uids[host], "--regid=%d" % self.uids[host], "--clear-groups"]
        words = before + ["env", "-i"] + ["%s=%s" % pair for pair in suite.clean_env(HOME=self.homes[host]).items()]
        words += ["sh", "-c", "exec " + re.sub(r"\bpython3 ", lambda found: shlex.quote(self.python) + " ", line)]
        if background:
            log = open(os.path.join(self.top, "%d.log" % len(self.typed)), "wb")
            self.running.append(subprocess.Popen(words, cwd=self.homes[host], stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            return log.name
        done = subprocess.run(words, cwd=self.homes[host], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        assert done.returncode == 0, "%s\n%s" % (line, done.stdout.decode("utf-8", "replace"))
        return done.stdout.decode("utf-8")

    def copy(self, line):
        """scp -r WHAT HOST: from the first host to the second (no sshd here)."""
        self.typed.append(line)
        what = re.match(r"scp -r (\S+) HOST:\Z", line).group(1)
        goal = os.path.join(self.homes[1], os.path.basename(what))
        shutil.copytree(what, goal)
        for above, names, files in os.walk(goal):
            for path in [above] + [os.path.join(above, name) for name in files]:
                os.chown(path, self.uids[1], -1)

    def close(self):
        for process in self.running:
            process.terminate()
            process.wait(20)
        for name in self.spaces:
            subprocess.run(["ip", "netns", "del", name])
        shutil.rmtree(self.top)


@pytest.mark.parametrize("spaces", [True, False], ids=["two network namespaces", "loopback"])
def test_two_hosts_get_from_nothing_to_the_first_result_within_six_commands_and_a_minute_by_what_init_prints(spaces):
    hosts = Hosts(spaces)
    try:
        begun = time.monotonic()
        said = hosts.type(0, "python3 mi_dicomapi.py init --name %s:%d --site u-tokyo --user suzuki --command fatigue_life" % (hosts.address, suite.a_port()))
        lines = [line.strip() for line in said.splitlines() if re.match("    (python3|scp) ", line)]
        serve, copy, poll, run = lines
        log = hosts.type(0, serve, background=True)
        suite.wait_until(lambda: "listening" in open(log).read() or hosts.running[0].poll() is not None, what="relay")
        hosts.copy(copy)
        hosts.type(1, poll, background=True)
        said = hosts.type(0, run)
        assert "hello from u-tokyo" in said and "ended with 0" in said
        assert len(hosts.typed) <= 6 and time.monotonic() - begun < 60, hosts.typed
        said = hosts.type(0, run + " --in mi_relay/ca/ca.pem --out hello.txt")
        with open(os.path.join(hosts.homes[0], "hello.txt")) as text, open(os.path.join(hosts.homes[0], "mi_relay/ca/ca.pem"), "rb") as sent:
            assert hashlib.sha256(sent.read()).hexdigest() + "  " in text.read()
        kit = os.path.join(hosts.homes[1], "u-tokyo.suzuki")
        assert stat.S_IMODE(os.stat(os.path.join(kit, "token")).st_mode) == 0o600 and not os.path.exists(os.path.join(kit, "token.code"))
    finally:
        hosts.close()


def test_a_kit_says_in_english_and_japanese_what_it_does_and_its_sums_are_those_of_its_files(tmp_path):
    made = Relay(tmp_path, words=("--command", "fatigue_life", "other"))
    for name, row in (("u-tokyo.suzuki", 0), ("modules.suzuki", 1)):
        kit = os.path.join(made.dir, "kits", name)
        assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=kit, stdout=subprocess.DEVNULL).returncode == 0
        with open(os.path.join(kit, "SHA256SUMS"), "rb") as text:
            sums = text.read()
        assert hashlib.sha256(sums).hexdigest() == re.findall(r"sum .*: ([0-9a-f]{64})$", made.made.stdout, re.M)[row]
        assert {line.split()[1] for line in sums.decode().splitlines()} == set(os.listdir(kit)) - {"token.code", "SHA256SUMS"}
        with open(os.path.join(kit, "README.txt"), encoding="utf-8") as text:
            page = text.read()
        assert "%" not in page and "suzuki" in page and re.search("[\u3040-\u30ff]", page) and max(map(len, page.splitlines())) <= 120
        assert stat.S_IMODE(os.stat(kit).st_mode) == 0o700 and stat.S_IMODE(os.stat(os.path.join(kit, "token.code")).st_mode) == 0o600
    with open(os.path.join(made.dir, "kits", "u-tokyo.suzuki", INI), encoding="utf-8") as text:
        assert {"[command hello]", "# [command fatigue_life]", "# [command other]"} <= set(text.read().splitlines())
    assert "\ncommands = hello fatigue_life other\n" in open(made.ini).read()


# ---- the code

def test_a_code_is_good_once_for_its_site_and_role_until_its_end_and_a_refusal_says_what_to_do(relay):
    token = os.urandom(32).hex()
    assert [relay.redeem(relay.code(), *other)[1]["why"] for other in (("workflow", ""), ("remote", "u-other"), ("remote", ""))] == ["other"] * 3
    first, second = relay.kit(), relay.kit()
    assert relay.poll(first).returncode == 0
    refused = relay.poll(second)
    assert refused.returncode == 77 and suite.one_line(refused.stderr) and "was used already" in refused.stderr and "token.code" in refused.stderr
    assert os.path.exists(os.path.join(second, "token.code")) and not os.path.exists(os.path.join(second, "token"))
    assert relay.redeem("A" * 24)[1]["why"] == "code" and relay.redeem(relay.code("modules"), "workflow", "", "x")[0] == 400
    relay.db("UPDATE tokens SET expires = ? WHERE login = 2 AND used IS NULL AND user = ?", time.time() - 1, relay.user)
    done = kit_run(os.path.join(relay.kit("modules"), "mi_system_wf.py"), "status", "0123abcd")
    assert done.returncode == 77 and suite.one_line(done.stderr) and "was good until" in done.stderr and "init" in done.stderr
    with open(os.path.join(first, "token")) as text:
        token = text.read().strip()
    assert relay.db("SELECT user, roles, sites FROM tokens WHERE hash = ?", hashlib.sha256(token.encode()).hexdigest()) == [(relay.user, "remote", SITE)]
    assert token not in relay.relay.text() and not any(word in relay.relay.text() for word in (relay.code().strip(), relay.code().strip().replace("-", "")))
    listed = suite.run("mi_dicomapi.py", "token", "list", "--ini", relay.ini).stdout
    rows = re.findall(r"^\d+ +%s .*" % relay.user, listed, re.M)
    assert len(rows) == 3 and sum(row.endswith(" code") for row in rows) == 2


def test_a_code_itself_is_no_token_and_one_that_is_revoked_becomes_none(relay):
    code = relay.code().replace("-", "").strip()
    status, first = relay.client(code).call("POST", "calc-request", {"v": 2, "site_id": SITE, "take": "12345678", "poller": "p", "wait": 0})
    assert (status, first["why"]) == (403, "unknown token")
    number, = relay.db("SELECT number FROM tokens WHERE user = ? AND roles = 'remote'", relay.user)
    assert suite.run("mi_dicomapi.py", "token", "revoke", str(number[0]), "--ini", relay.ini).returncode == 0
    assert relay.redeem(code)[1]["why"] == "void"


def test_of_many_who_use_one_code_at_once_one_gets_a_token_also_across_a_restart(relay):
    code = relay.code()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: relay.redeem(code, hashed="%064x" % number), range(5)))
    assert sorted(status for status, first in found) == [200] + [403] * 4, found
    winner = "%064x" % [status for status, first in found].index(200)
    relay.relay.stop(signal.SIGKILL)
    relay.start()
    assert relay.redeem(code)[1]["why"] == "used"
    again = relay.redeem(code, hashed=winner)                          # the answer was lost
    assert again[0] == 200 and again[1]["expires"] == next(first["expires"] for status, first in found if status == 200)
    assert len(relay.tokens()) == 1


def test_a_start_that_dies_when_the_code_is_used_has_the_same_token_at_the_next(relay):
    kit = relay.kit()
    assert relay.poll(kit, env=suite.clean_env(MI_FAULT="enrolled")).returncode == -9
    assert sorted(name for name in os.listdir(kit) if name.startswith("token")) == ["token.code", "token.new"]
    done = relay.poll(kit)
    assert done.returncode == 0, done.stderr
    assert sorted(name for name in os.listdir(kit) if name.startswith("token")) == ["token"] and len(relay.tokens()) == 1
    shutil.copy(os.path.join(relay.made_kit(), "token.code"), kit)          # as if it had died a moment later
    done = relay.poll(kit)
    assert done.returncode == 0 and "was used already" in done.stderr, done.stderr


def test_modules_that_start_at_once_share_the_token_of_their_kit(relay):
    kit = relay.kit("modules")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: kit_run(os.path.join(kit, "mi_system_wf.py"), "submit", SITE, "hello"), range(4)))
    assert [done.returncode for done in found] == [0] * 4, [done.stderr for done in found]
    assert len(relay.tokens()) == 1


def test_a_newer_kit_makes_the_code_of_the_older_one_void_and_renews_a_token_that_has_ended(relay):
    old, kit = relay.code(), relay.kit()
    again = init(relay.folder, "--site", SITE, "--user", relay.user)
    assert again.returncode == 64 and suite.one_line(again.stderr) and "move it away" in again.stderr
    shutil.rmtree(relay.made_kit())
    assert init(relay.folder, "--site", SITE, "--user", relay.user).returncode == 0
    assert relay.redeem(old)[1]["why"] == "void"
    shutil.copy(os.path.join(relay.made_kit(), "token.code"), kit)
    assert relay.poll(kit).returncode == 0
    relay.db("UPDATE tokens SET expires = ? WHERE login = 0 AND user = ?", time.time() - 1, relay.user)
    relay.relay.stop()
    relay.start()
    assert relay.poll(kit).returncode == 77
    shutil.rmtree(relay.made_kit())
    assert init(relay.folder, "--site", SITE, "--user", relay.user).returncode == 0
    shutil.copy(os.path.join(relay.made_kit(), "token.code"), kit)
    done = relay.poll(kit, "enroll")                   # as the next start would
    assert done.returncode == 0 and relay.user in done.stdout and not os.path.exists(os.path.join(kit, "token.code")), done.stderr
    assert relay.poll(kit).returncode == 0


def test_the_code_can_be_typed_instead_and_is_in_no_command_line(relay, tmp_path):
    kit, spoken = relay.kit(), tmp_path / "spoken"
    spoken.write_text(relay.code().lower().replace("-", " "))
    os.unlink(os.path.join(kit, "token.code"))
    with open(str(spoken)) as said:
        done = kit_run(os.path.join(kit, "mi_system_remote.py"), "enroll", stdin=said)
    assert done.returncode == 0 and relay.user in done.stdout, done.stderr
    assert relay.poll(kit).returncode == 0
    done = kit_run(os.path.join(kit, "mi_system_remote.py"), "enroll", "ABCD-EFGH")
    assert done.returncode == 64 and suite.one_line(done.stderr)
    done = kit_run(os.path.join(kit, "mi_system_remote.py"), "enroll")                   # nothing is typed
    assert done.returncode == 64 and "no code of a kit" in done.stderr and suite.one_line(done.stderr)


def test_check_changes_nothing_before_the_first_start_and_says_what_that_will_do(relay):
    for name, script in ((SITE, "mi_system_remote.py"), ("modules", "mi_system_wf.py")):
        kit = relay.kit(name)
        before = picture(kit)
        done = kit_run(os.path.join(kit, script), "check")
        assert done.returncode == 0 and re.search(r"^WARN .*the first start exchanges the code", done.stdout, re.M) and "FAIL" not in done.stdout, done.stdout
        assert picture(kit) == before
    assert not relay.tokens()


def test_clocks_that_differ_by_ten_minutes_do_not_matter(relay):
    for seconds in (-600, 600):
        done = subprocess.run(["openssl", "verify", "-x509_strict", "-CAfile", relay.ca, "-attime", "%d" % (time.time() + seconds), relay.pem], stdout=subprocess.PIPE)
        assert done.returncode == 0
    for seconds, name, script, words in ((-600, SITE, "mi_system_remote.py", ["poll", "--once"]), (600, "modules", "mi_system_wf.py", ["submit", SITE, "hello"])):
        done = subprocess.run([suite.PYTHON, "-I", "-S", "-c", LATER, str(seconds), os.path.join(relay.kit(name), script)] + words, env=suite.clean_env(),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 0, done.stderr.decode()


# ---- the certificate

@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_the_relay_is_called_by_name_or_address_and_strict_clients_believe_its_certificate(host, tmp_path):
    if host == "[::1]" and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 here")
    made = Relay(tmp_path, host).start()
    try:
        plain = host.strip("[]")
        with socket.create_connection((plain, made.port), 10) as sock, strict(made.ca).wrap_socket(sock, server_hostname=plain) as tls:
            assert tls.getpeercert()["subjectAltName"]
        done = kit_run(os.path.join(made.kit("modules"), "mi_system_wf.py"), "submit", SITE, "hello")
        assert done.returncode == 0, done.stderr
        done = suite.run("mi_dicomapi.py", "check", "--ini", made.ini)
        assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout
    finally:
        made.close()


@pytest.mark.parametrize("word, hosts", [
    ("relay.example.org", "relay.example.org"), ("Relay.Example.ORG:443", "relay.example.org"), ("192.0.2.1:8443", "192.0.2.1"), ("2001:DB8::1", "2001:db8::1"),
    ("[2001:db8::1]:443", "2001:db8::1"), ("計算.example.jp", "xn--t8ja9b.example.jp"), ("a_b", "a_b"),
    ("", None), ("a b", None), ("https://relay", None), ("relay/x", None), ("relay:0x", None), ("user@relay", None), ("a,DNS:b", None), ("a\nb", None), ("-a", None),
    ("relay:70000", None), ("$ENV", None), ("fe80::1%eth0", None), ("x" * 300, None)])
def test_a_name_is_a_hosts_or_an_address_with_a_port_or_none(word, hosts):
    relay = suite.module("mi_dicomapi.py")
    if hosts is None:
        with pytest.raises(relay.Stop) as stopped:
            relay.names_of([word])
        assert stopped.value.code == 64 and "\n" not in str(stopped.value)
    elif word.startswith("計算"):
        assert relay.names_of([word])[0][0].isascii() and relay.names_of([word])[0][0].encode().decode("idna") == word
    else:
        assert relay.names_of([word]) == ([hosts], int(re.search(r":(443|8443)\Z", word).group(1)) if re.search(r":(443|8443)\Z", word) else 50443)


def test_a_renewed_certificate_is_taken_up_by_the_running_relay_and_believed_by_the_kits_that_are_out(relay):
    kit, before = relay.kit(), relay.serves()
    assert relay.poll(kit).returncode == 0
    done = suite.run("mi_dicomapi.py", "init", "--renew", "--ini", relay.ini)
    assert done.returncode == 0 and "127.0.0.1" in done.stdout, done.stderr
    suite.wait_until(lambda: relay.serves() != before, what="the new certificate")
    assert relay.poll(kit).returncode == 0 and stat.S_IMODE(os.stat(relay.pem).st_mode) == 0o600
    done = init(relay.folder, "--renew", "--name", "127.0.0.1", "relay.example.org", "::1")
    assert done.returncode == 0 and "127.0.0.1 relay.example.org ::1" in done.stdout
    assert suite.run("mi_dicomapi.py", "init", "--name", "other.example.org", "--site", "s", "--user", "u", "--ini", relay.ini).returncode == 64
    before = picture(relay.dir)
    killed = init(relay.folder, "--renew", env=suite.clean_env(MI_FAULT="certificate made"))
    assert killed.returncode == -9 and {name: found for name, found in picture(relay.dir).items() if ".new" not in name} == before
    assert init(relay.folder, "--renew").returncode == 0 and not [name for name in picture(relay.dir) if ".new" in name]


# ---- nothing is overwritten, nothing is half made

def test_a_second_init_adds_a_kit_and_leaves_all_that_is_there_and_the_running_relay_takes_it(relay):
    with open(relay.ini) as text:
        mine = text.read() + "users =    # all of them\n# mine\n[limits]\n"
    with open(relay.ini, "w") as out:
        out.write(mine)
    before = picture(relay.dir)
    done = init(relay.folder, "--site", "u-kyoto", "--user", relay.user, "--command", "solve", "--json")
    kit = "u-kyoto." + relay.user
    assert done.returncode == 0 and [os.path.basename(row["kit"]) for row in json.loads(done.stdout)["kits"]] == [kit], done.stderr
    after = picture(relay.dir)
    changed = {name for name in after if after[name] != before.get(name) and not name.startswith("state")}
    assert not set(before) - set(after) - {name for name in before if name.startswith("state")}
    assert changed == {INI, os.path.join("kits", kit)} | {os.path.join("kits", kit, name) for name in (
        "README.txt", "SHA256SUMS", "ca.pem", INI, "mi_system_remote.py", "token.code")}
    with open(relay.ini) as text:
        assert text.read() == mine.replace("remote_site_ids =", "remote_site_ids = u-kyoto") + "[u-kyoto]\ncommands = hello solve\n"
    copy = relay.kit("u-kyoto")
    suite.wait_until(lambda: relay.poll(copy).returncode == 0, what="the relay knows the site")
    done = init(relay.folder, "--site", SITE, "--user", relay.user, "--command", "more")
    assert done.returncode == 0 and "\ncommands = more hello\n" in open(relay.ini).read(), done.stderr


@pytest.mark.parametrize("text, section, key, result", [
    ("[a]\nk = x\n", "a", "k", "[a]\nk = w x\n"), ("[a]\nK: x # c\n[b]\n", "a", "k", "[a]\nK: w x # c\n[b]\n"), ("[a]\n[b]\nk = x\n", "a", "k", "[a]\nk = w\n[b]\nk = x\n"),
    ("# [a]\n[b]", "a", "k", "# [a]\n[b]\n[a]\nk = w\n"), ("[a]", "a", "k", "[a]\nk = w\n"), ("[a]\nk =\n  x\n  y\n", "a", "k", "[a]\nk = w\n  x\n  y\n"),
    ("[a]\n# k = x\n", "a", "k", "[a]\nk = w\n# k = x\n"), ("[a.b]\nk=1\n", "aXb", "k", "[a.b]\nk=1\n[aXb]\nk = w\n")])
def test_a_word_gets_into_an_ini_and_everything_else_stays_as_it_is(text, section, key, result):
    assert suite.module("mi_dicomapi.py").with_words(text, section, key, "w") == result


def test_what_is_there_already_is_left_alone_and_each_refusal_is_one_line(tmp_path):
    words = ("--name", "relay.example.org", "--site", SITE, "--user", USER)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "hand").mkdir()
    (tmp_path / "hand" / INI).write_text("[Server]\n")
    before = picture(str(tmp_path))
    bare = tmp_path / "bin"
    bare.mkdir()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(suite.script("mi_dicomapi.py"), str(alone))
    refused = [(64, init(tmp_path, *words, "--dir", "full")), (64, init(tmp_path, *words, "--dir", "file")), (64, init(tmp_path, *words, "--dir", "hand")),
               (64, init(tmp_path)), (64, init(tmp_path, *words[:4])), (64, init(tmp_path, *words[2:])), (64, init(tmp_path, *words[:4], "--user", "a b")),
               (64, init(tmp_path, *words[:2], "--site", "../x", "--user", USER)), (64, init(tmp_path, *words, "--command", "{parameters}")),
               (64, init(tmp_path, "--renew")), (78, init(tmp_path, *words[:2], "--site", "poller", "--user", USER)),
               (69, init(tmp_path, *words, env=suite.clean_env(PATH=str(bare)))), (66, kit_run(str(alone / "mi_dicomapi.py"), "init", *words))]
    for code, done in refused:
        assert done.returncode == code and suite.one_line(done.stderr) and not done.stdout, done
    shutil.rmtree(str(bare)), shutil.rmtree(str(alone))
    assert picture(str(tmp_path)) == before
    assert init(tmp_path, *words, "--dir", "empty").returncode == 0 and sorted(os.listdir(str(tmp_path / "empty"))) == ["ca", "kits", INI, "relay.pem", "state"]


def test_where_nothing_may_be_written_nothing_is_and_it_says_where_to(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    for name in SCRIPTS:
        shutil.copy(suite.script(name), str(tmp_path))
    user, python = [], suite.PYTHON
    if os.geteuid() == 0:
        suite.needs("setpriv")
        user, python = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], suite.python_for_others()
        suite.let_through(str(tmp_path))
    closed.chmod(0o555)
    done = subprocess.run(user + [python, str(tmp_path / "mi_dicomapi.py"), "init", "--name", "a", "--site", "s", "--user", "u"], cwd=str(closed),
                          env=suite.clean_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 74 and suite.one_line(done.stderr.decode()) and b"--dir" in done.stderr and not os.listdir(str(closed)), done


def half_usable(folder):
    """What is there that a killed init may not leave: a secret that others may read, a relay or a kit that is not whole."""
    wrong = []
    for name, (data, mode) in picture(folder).items():
        secret = data is not None and (b"PRIVATE KEY" in data or name.endswith(("token.code", ".key")))
        wrong += [name] if secret and mode & 0o077 else []
    where = os.path.join(folder, "mi_relay")
    whole = {"ca", "kits", INI, "relay.pem", "state"}
    wrong += ["mi_relay"] if os.path.exists(where) and not whole <= set(os.listdir(where)) else []
    kits = os.path.join(where, "kits")
    for kit in os.listdir(kits) if os.path.exists(kits) else ():
        wrong += [kit] if not {"README.txt", "SHA256SUMS", "ca.pem", INI, "token.code"} <= set(os.listdir(os.path.join(kits, kit))) else []
    return wrong


def test_killed_at_any_moment_init_leaves_nothing_half_usable_and_the_next_one_makes_it(tmp_path):
    words, deaths, chance = ("--name", "127.0.0.1", "--site", SITE, "--user", USER), 0, random.Random(7)
    for point in ("relay made", "", "site named", "kit made", ""):
        done = init(tmp_path, *words, "--site", "s-" + point.replace(" ", "-") if deaths > 1 else SITE, env=suite.clean_env(MI_FAULT=point))
        assert not half_usable(str(tmp_path)) and done.returncode == (-9 if point else 0), (point, done)
        deaths += 1
    for number in range(4):
        shutil.rmtree(str(tmp_path / "mi_relay"), True)
        started = suite.Process("mi_dicomapi.py", ["init"] + list(words), str(tmp_path))
        suite.wait_until(lambda: not started.alive() or os.path.exists(str(tmp_path / ".mi_relay.new")), what="it is at work")
        time.sleep(chance.random() * 0.5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.popen.wait(10)
        assert not half_usable(str(tmp_path))
    done = init(tmp_path, *words)
    assert done.returncode in (0, 64), done.stderr
    assert sorted(name for name in os.listdir(str(tmp_path)) if "mi_relay" in name) == ["mi_relay"]


def test_a_private_key_is_for_its_user_alone_from_its_first_byte_on(tmp_path):
    suite.needs("strace")
    log = str(tmp_path / "log")
    done = subprocess.run(["strace", "-f", "-qq", "-o", log, "-e", "trace=umask,openat,chmod,fchmod,fchmodat", suite.PYTHON, suite.script("mi_dicomapi.py"), "init",
                           "--name", "a", "--site", "s", "--user", "u"], cwd=str(tmp_path), env=suite.clean_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0
    with open(log, errors="replace") as text:
        lines = text.read().splitlines()
    masked = next(number for number, line in enumerate(lines) if "umask(077)" in line)
    made = [number for number, line in enumerate(lines) if "O_CREAT" in line and re.search(r'(\.key|relay\.pem|token\.code|state\.sqlite3)"', line)]
    assert len(made) >= 5 and min(made) > masked
    assert not [line for line in lines[masked:] if re.search(r"chmod.*(\.key|relay\.pem|token\.code|state\.sqlite3)\b.*, 0?[0-7]*[1-7][0-7]\b", line)
                and not re.search(r", 0?[67]00\b", line)]


def test_two_at_once_do_not_meet(tmp_path):
    words = ["init", "--name", "127.0.0.1", "--site", SITE, "--user", USER]
    pair = [suite.Process("mi_dicomapi.py", words, str(tmp_path)) for number in range(2)]
    codes = sorted(process.popen.wait(60) for process in pair)
    assert codes[0] == 0 and codes[1] in (64, 75) and not half_usable(str(tmp_path))
