"""What the tests share: the scripts as real processes, with TLS, in directories of their own.

The scripts run under the Python of MI_TEST_PYTHON (default: the one that runs pytest)."""
import atexit
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
PYTHON = os.environ.get("MI_TEST_PYTHON", sys.executable)
SITE, USER = "u-test", "alice"
HOME = tempfile.mkdtemp(prefix="mi-home-")             # an empty home directory for what is started
atexit.register(shutil.rmtree, HOME, True)
LOGS = ("計算標準出力.txt", "計算標準エラー出力.txt")


def script(name):
    """Path of one of the suite's scripts; a whole path is left as it is."""
    return os.path.join(ROOT, name)


def lacks(name):
    """What is to be done so that the program `name` is here ("root": to be root, or sudo without a password); '' if nothing."""
    if name == "root":
        if os.geteuid() == 0 or shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], stderr=subprocess.DEVNULL).returncode == 0:
            return ""
        return "root: run it as root"
    if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
        return ""
    return "%s is not here: sh tests/run.sh installs it, as root" % name


def needs(*programs):
    """The test that calls this needs these programs. One is not here: it fails; as a user who may install nothing (MI_TEST_SKIP): it is skipped.

    tests/run.sh reads the calls of this in a file, to install what the file needs."""
    for reason in filter(None, map(lacks, programs)):
        (pytest.skip if os.environ.get("MI_TEST_SKIP") else pytest.fail)("needs " + reason)


def python_for_others():
    """A Python that every user may start: one in /root or in a virtual environment below it is closed to others."""
    for python in (PYTHON, os.path.realpath(PYTHON), "/usr/bin/python3"):
        if os.geteuid() != 0 or subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", python, "-c", ""], cwd="/",
                                               stderr=subprocess.DEVNULL).returncode == 0:
            return python
    pytest.fail("no Python here that another user may start: apt-get install python3")


def let_through(folder):
    """Every user gets to a folder by its path from now on."""
    while folder != "/":
        os.chmod(folder, os.stat(folder).st_mode & 0o7777 | 0o011)
        folder = os.path.dirname(folder)


def module(name):
    """One of the scripts as a module, read from its path; nothing is written beside it."""
    import importlib.util
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec = importlib.util.spec_from_file_location(name.replace(".py", ""), script(name))
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    finally:
        sys.dont_write_bytecode = before
    return found


DYING = """import importlib.util, os, sys, time
point, path = sys.argv[1:3]
sys.argv, sys.dont_write_bytecode = sys.argv[2:], True
spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
program.fault = lambda name: name == point and os.kill(os.getpid(), 9)
if point.startswith("hold "):
    name, go, *many = point.split(" ")[1:]
    holder = getattr(program, name.split(".")[0]) if "." in name else program
    name = name.split(".")[-1]
    real, turns = getattr(holder, name), [1] * int(many[0] if many else 1)

    def held(*words):
        if turns and os.path.exists(go + ".armed") and turns.pop():
            open(go + ".here", "w").close()
            while not os.path.exists(go):
                time.sleep(0.01)
        return real(*words)

    setattr(holder, name, held)
program.run_as_program(program.main)
"""


def started_as(words, env):
    """The words (python, its options, SCRIPT, ...) that start a script. Where env has MI_FAULT=POINT: so that it kills itself at fault(POINT);
    with MI_FAULT="hold NAME PATH": so that the first call of its function NAME (or CLASS.NAME) after PATH.armed was made makes
    PATH.here and waits until PATH is there; with a number behind it: the first so many calls.
    The scripts themselves know nothing of this: in production nothing can switch it on."""
    if not (env or {}).get("MI_FAULT"):
        return words
    at = next(place for place, word in enumerate(words) if word.endswith(".py"))
    return words[:at] + ["-c", DYING, env["MI_FAULT"]] + words[at:]


def clean_env(**more):
    """The environment of a cron job: nothing but PATH and LANG=C (the worst case), and more."""
    found = {"PATH": os.environ["PATH"], "LANG": "C", "HOME": more.pop("HOME", HOME)}
    if "LD_LIBRARY_PATH" in os.environ:
        found["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    found.update(more)
    return found


def run(name, *words, cwd=None, timeout=60, env=None, python=None, stdin=subprocess.DEVNULL):
    """Runs a script to its end: CompletedProcess with stdout and stderr as text (UTF-8)."""
    done = subprocess.run(started_as([python or PYTHON, "-I", "-S", script(name)], env)
                          + [os.fsencode(str(word)) if isinstance(word, str) else word for word in words],
                          cwd=cwd, timeout=timeout, env=clean_env() if env is None else env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stdout, done.stderr = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    return done


def one_line(text):
    """True if text is one clear line, and no traceback."""
    return text.count("\n") == 1 and "Traceback" not in text and len(text.strip()) > 10


def processes_with(mark):
    """Ids of the living processes whose environment holds `mark` (VARIABLE=beginning of its value)."""
    found = []
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open("/proc/%s/environ" % pid, "rb") as text:
                if any(entry.startswith(os.fsencode(mark)) for entry in text.read().split(b"\0")):
                    found.append(int(pid))
        except OSError:                                # it has ended, or is another user's
            pass
    return found


def wait_until(true, seconds=20.0, what=""):
    """Waits until true() is; its value. AssertionError after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        found = true()
        if found:
            return found
        assert time.monotonic() < until, "still not after %s s: %s" % (seconds, what or true)
        time.sleep(0.02)


def a_port():
    """A free port below those that the system gives to outgoing connections: nobody takes it while a relay is restarted."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def make_certificate(folder, days=30, names="DNS:localhost,IP:127.0.0.1"):
    """A self-signed certificate; returns (certificate, key) paths."""
    needs("openssl", "ps")
    cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", cert,
                    "-days", str(days), "-subj", "/CN=localhost", "-addext", "subjectAltName=" + names], check=True, stderr=subprocess.DEVNULL)
    return cert, key


class Listener:
    """A server on a free port of this host: each connection is handled by one(sock), of a subclass, in a thread of its own."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.url = "http://127.0.0.1:%d" % self.port
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                sock = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.one, args=(sock,), daemon=True).start()

    def close(self):
        self.listener.close()


class Process:
    """A script as a process whose output goes to a file; stopped by stop() or kill()."""

    def __init__(self, name, words, folder, env=None, python=None, cwd=None):
        self.name, self.log_path = name, os.path.join(folder, name + ".out")
        with open(self.log_path, "ab") as out:
            self.popen = subprocess.Popen(started_as([python or PYTHON, "-I", "-S", script(name)] + list(words), env),
                                          stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                          cwd=cwd or folder, env=clean_env() if env is None else env, start_new_session=True)
        self.pid = self.popen.pid

    def text(self):
        """All it has written."""
        with open(self.log_path, encoding="utf-8", errors="replace") as text:
            return text.read()

    def stop(self, number=signal.SIGTERM, seconds=15):
        """Signals it and waits; its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(seconds)

    def kill(self):
        """kill -9."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(15)

    def alive(self):
        """Is it running?"""
        return self.popen.poll() is None

    def peak(self):
        """VmHWM in bytes."""
        with open("/proc/%d/status" % self.pid) as text:
            return int(re.search(r"VmHWM:\s+(\d+)", text.read()).group(1)) * 1024


class World:
    """One relay, with certificate and tokens, in a directory of its own; pollers and workflow sides on demand."""

    def __init__(self, folder, tls=True, commands=(), sites=(SITE,), ini="", python=None):
        self.folder, self.python, self.commands = str(folder), python, list(commands)
        os.makedirs(self.folder, exist_ok=True)
        self.tls, self.extra, self.sites, self.port, self.relay = tls, ini, sites, 0, None
        self.cert, self.key = make_certificate(self.folder) if tls else ("", "")
        self.state = os.path.join(self.folder, "state")
        self.ini = os.path.join(self.folder, "relay.ini")
        self.write_ini()
        self.token = self.issue(USER)
        self.pollers = []

    def write_ini(self, port=0):
        """Writes the relay's ini; extra lines of the form "[section]\\nkey = value" are merged."""
        import configparser
        parser = configparser.RawConfigParser()
        parser.read_dict({"Server": {"portnumber": str(port), "state_dir": self.state, "certfile": self.cert, "keyfile": self.key},
                          "RemoteSites": {"remote_site_ids": " ".join(self.sites)}})
        for site in self.sites:
            parser.read_dict({site: {"command_lines": "\n" + "\n".join(self.commands)}})
        parser.read_string(self.extra)
        with open(self.ini, "w", encoding="utf-8") as out:
            parser.write(out)

    def issue(self, user, *words):
        """A new token of a user, and its 0600 file beside it: returns the token."""
        done = run("mi_dicomapi.py", "token", "issue", user, "--ini", self.ini, *words, python=self.python)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def expired(self, user, days):
        """A token of a user that ended so many days ago."""
        import sqlite3
        token, then = os.urandom(32).hex(), time.time() - 86400 * days
        db = sqlite3.connect(os.path.join(self.state, "state.sqlite3"), timeout=10)
        db.execute("INSERT INTO tokens (hash, user, roles, sites, issued, expires) VALUES (?, ?, 'workflow remote', '', ?, ?)",
                   (hashlib.sha256(token.encode()).hexdigest(), user, then, then))
        db.commit()
        db.close()
        return token

    def token_file(self, token=None, name="token"):
        """A 0600 file with a token."""
        path = os.path.join(self.folder, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write((token or self.token) + "\n")
        return path

    def start(self, env=None):
        """Starts the relay (again: on the same port) and waits until it listens."""
        self.port = self.port or a_port()
        self.write_ini(self.port)
        before = len(self.relay.text()) if self.relay else 0
        self.relay = Process("mi_dicomapi.py", ["serve", "--ini", self.ini], self.folder, python=self.python, env=env)
        found = wait_until(lambda: re.search(r" listening url=(https?)://127.0.0.1:(\d+)", self.relay.text()[before:]) or not self.relay.alive(), what="relay")
        assert found is not True, self.relay.text()[before:]
        self.port = int(found.group(2))
        self.url = "%s://127.0.0.1:%d" % (found.group(1), self.port)
        return self

    def poller(self, commands, name="poller", token=None, ini="", words=("poll",), env=None, start=True):
        """A poller with an allow-list {NAME: lines of its section}; its calc_base is folder/NAME/base."""
        folder = os.path.join(self.folder, name)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "poller.ini")
        with open(path, "w", encoding="utf-8") as out:
            out.write("[poller]\nsite = %s\nurl = %s\ntoken_file = %s\ncalc_base = %s\n" % (
                self.sites[0], self.url, self.token_file(token, name + ".token"), os.path.join(folder, "base")))
            if self.tls:
                out.write("ca_file = %s\n" % self.cert)
            out.write(ini)
            for command, text in commands.items():
                out.write("[command %s]\n%s\n" % (command, text))
        if not start:
            return folder, path
        made = Process("mi_system_remote.py", list(words) + ["--ini", path], folder, env=env, python=self.python)
        self.pollers.append(made)
        return made

    def workflow(self, *words, cwd=None, timeout=60, env=None):
        """The workflow side, to its end. cwd: where results go (default folder/wf)."""
        cwd = cwd or os.path.join(self.folder, "wf")
        os.makedirs(cwd, exist_ok=True)
        return run("mi_system_wf.py", *(list(words) + self.reach()), cwd=cwd, timeout=timeout, env=env, python=self.python)

    def reach(self):
        """The options that tell a workflow side where the relay is and who asks."""
        return ["--url", self.url, "--token-file", self.token_file()] + (["--ca-file", self.cert] if self.tls else [])

    def rows(self, sql, *values):
        """Rows of the relay's database (dicts), read beside the running relay."""
        import sqlite3
        db = sqlite3.connect(os.path.join(self.state, "state.sqlite3"), timeout=10)
        try:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(sql, values)]
        finally:
            db.close()

    def state_of(self, accept_id):
        """The state column of a calculation; None if it is not there."""
        found = self.rows("SELECT state FROM calculations WHERE accept_id = ?", accept_id)
        return found[0]["state"] if found else None

    def picture(self, accept_id, without=()):
        """All that the relay holds of a calculation: its row, its files' rows, its spool with sizes."""
        row, = self.rows("SELECT * FROM calculations WHERE accept_id = ?", accept_id)
        files = self.rows("SELECT * FROM files WHERE calc = ? ORDER BY kind, n", row["seq"])
        top, spool = os.path.join(self.state, "spool", accept_id[:2], accept_id), []
        for folder, names, found in os.walk(top):
            spool += [(os.path.relpath(os.path.join(folder, name), top), os.path.getsize(os.path.join(folder, name))) for name in found]
        return {key: value for key, value in row.items() if key not in without}, files, sorted(spool)

    def client(self, token=None):
        """A bare client of the wire."""
        return Client(self, self.token if token is None else token)

    def close(self):
        """Ends everything; no traceback may be in any log."""
        texts = []
        for process in self.pollers + ([self.relay] if self.relay else []):
            if process.alive():
                process.stop()
            texts.append(process.text())
        for pid in processes_with("CALC_DIR=%s/" % self.folder):             # a poller that stops leaves its commands running
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        assert not any("Traceback" in text or "bug=" in text for text in texts), "\n".join(texts)
        shutil.rmtree(self.folder, ignore_errors=True)


class Client:
    """A client that says exactly what it is told to."""

    def __init__(self, world, token):
        self.world, self.token, self.connection = world, token, None

    def connect(self):
        if self.world.tls:
            context = ssl.create_default_context(cafile=self.world.cert)
            self.connection = http.client.HTTPSConnection("127.0.0.1", self.world.port, timeout=60, context=context)
        else:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.world.port, timeout=60)

    def raw(self, method, target, body=None, headers=()):
        """(HTTP status, body bytes, headers)."""
        if self.connection is None:
            self.connect()
        head = dict({"Content-Type": "application/json"}, **dict(headers))
        if self.token:
            head["Authorization"] = "Bearer " + self.token
        try:
            self.connection.request(method, "/mi-distcomp-api/" + target, body, head)
            answer = self.connection.getresponse()
            return answer.status, answer.read(), answer.headers
        except (OSError, http.client.HTTPException):
            self.connection.close()
            self.connection = None
            raise

    def call(self, method, name, fields=None, body=None):
        """(HTTP status, errors[0])."""
        from urllib.parse import urlencode
        if method == "GET":
            status, data, headers = self.raw("GET", name + "?" + urlencode(fields or {}))
        else:
            status, data, headers = self.raw("POST", name, json.dumps(fields).encode() if body is None else body)
        return status, json.loads(data.decode("utf-8"))["errors"][0]

    def ok(self, method, name, fields=None, body=None):
        """errors[0] of a call that must succeed."""
        status, first = self.call(method, name, fields, body)
        assert (status, first["code"]) == (200, 200), (name, status, first)
        return first

    # the nine steps, for a calculation without much in it

    def register(self, command, request_id=None, inputs=None, results=(), allow=True, site=SITE):
        """1, 2. inputs {NAME: bytes}; the accept_id."""
        inputs = dict(sorted((inputs or {}).items()))
        found = self.ok("POST", "add-calcinfo", {"v": 2, "request_id": request_id or os.urandom(8).hex(), "allow": allow and not inputs, "calc-info": {
            "command": command, "remote-site": site, "parameters": "", "result_files": {name: {} for name in results},
            "parameter_files": {name: entry(data) for name, data in inputs.items()}}})
        accept_id = found["accept_id"]
        for number, data in enumerate(inputs.values()):
            self.ok("POST", "files/%s/input/%d?v=2&offset=0" % (accept_id, number), body=data)
        if allow and inputs:
            self.ok("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
        return accept_id

    def claim(self, wait=0, take=None, site=SITE):
        """3. (accept_id, claim), or None."""
        status, first = self.call("POST", "calc-request", {"v": 2, "site_id": site, "poller": "test", "take": take or os.urandom(8).hex(), "wait": wait})
        return (first["accept_id"], first["claim"]) if first["code"] == 200 else None

    def walk(self, accept_id, claim, upto, results=None, exit_code=0):
        """4..8 up to and with the named step."""
        results = dict(sorted((results or {}).items()))
        for name, more in (("calc-params-complete", {}), ("calc-start", {}), ("calc-end", {"result": "calc end", "exit_code": exit_code}),
                           ("send-results", {"result_files": {key: entry(data) for key, data in results.items()}}), ("end-send", {"result": "end send"})):
            if name == "end-send":
                for number, data in enumerate(results.values()):
                    self.ok("POST", "files/%s/result/%d?v=2&offset=0&claim=%s" % (accept_id, number, claim), body=data)
            self.ok("POST", name, dict({"v": 2, "accept_id": accept_id, "claim": claim}, **more))
            if name == upto:
                return


def entry(data):
    """A manifest's entry for these bytes."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
