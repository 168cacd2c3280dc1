"""Our workflow side and our poller on a fielded relay: on the stand-in, and on our own relay's fielded part (behind a Gate that hides `version`)."""
import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import fielded_stand_ins
import pytest
import suite
from suite import LOGS, SITE, wait_until

TOKEN = "f" * 64
MIB = 1 << 20
PYTHONS = [path for path in (os.path.expanduser("~/.pyenv/versions/3.6.15/bin/python3"), suite.PYTHON) if os.access(path, os.X_OK)]
SCRIPTS = {"copy": "cp in.dat out.dat; echo said; echo complained >&2", "fail": "echo bad news >&2; exit 3",
           "slow": "while [ ! -e '%(here)s/go' ]; do sleep 0.05; done; cp in.dat out.dat", "drift": "cp in.dat out.dat; (sleep 0.2) & "}


class Gate(suite.Listener):
    """Passes requests on to a relay, one connection each; answers `version` as a fielded gateway does.

    cut: {name: bytes of the answer after which the line breaks}. refuse: {name: (status, body) instead of the relay's answer}; both once."""

    def __init__(self, port):
        self.target, self.cut, self.refuse, self.names = port, {}, {}, []
        suite.Listener.__init__(self)

    def one(self, sock):
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(65536)
            if not more:
                return sock.close()
            data += more
        name = re.match(rb"[A-Z]+ /mi-distcomp-api/([a-z-]+)", data).group(1).decode()
        self.names.append(name)
        status, body = (404, b"<html>no</html>") if name == "version" else self.refuse.pop(name, (0, b""))
        if status:
            length = re.search(rb"content-length: *(\d+)", data.lower())
            left = int(length.group(1)) - len(data.split(b"\r\n\r\n", 1)[1]) if length else 0
            while left > 0:
                left -= len(sock.recv(min(left, MIB)))
            sock.sendall(b"HTTP/1.1 %d x\r\nContent-Type: text/html\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body))
            return sock.close()
        far = socket.create_connection(("127.0.0.1", self.target))
        far.sendall(data)
        threading.Thread(target=self.pipe, args=(sock, far, None), daemon=True).start()
        self.pipe(far, sock, self.cut.pop(name, None))

    @staticmethod
    def pipe(source, target, most):
        try:
            while most is None or most > 0:
                data = source.recv(256 << 10 if most is None else min(most, 256 << 10))
                if not data:
                    break
                target.sendall(data)
                most = None if most is None else most - len(data)
        except OSError:
            pass
        for sock in (source, target):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Lab:
    """A fielded relay (url), and our programs on it."""

    def __init__(self, folder, url="", port=0, token=TOKEN, python=None):
        self.here, self.token, self.python, self.processes, self.count = str(folder), token, python, [], 0
        for name, text in SCRIPTS.items():
            path = os.path.join(self.here, name)
            with open(path, "w") as out:
                out.write("#!/bin/sh\necho \"$MI_RUN\" >> '%s/ledger'\n%s\n" % (self.here, text % {"here": self.here} if "%(" in text else text))
            os.chmod(path, 0o755)
        self.relay = None
        if not port:
            self.relay = fielded_stand_ins.Relay([SITE], list(SCRIPTS) + ["unlisted"], [token]).start()
            port = self.relay.server_port
        self.gate = Gate(port)
        self.url = url or self.gate.url
        with open(os.open(os.path.join(self.here, "token"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(token)
        self.ini = os.path.join(self.here, "poller.ini")
        self.base = os.path.join(self.here, "base")
        self.write_ini()

    def write_ini(self, more="", url=""):
        with open(self.ini, "w") as out:
            out.write("[poller]\nsite = %s\nurl = %s\ntoken_file = %s/token\ncalc_base = %s\npoll = 0.2\n%s\n" % (
                SITE, url or self.url, self.here, self.base, more))
            for name in SCRIPTS:
                out.write("[command %s]\nargv = %s/%s\nmatch = %s\n" % (name, self.here, name, name))

    def poller(self, *words, env=None):
        made = suite.Process("mi_system_remote.py", list(words or ["poll"]) + ["--ini", self.ini], self.here, python=self.python, env=env)
        self.processes.append(made)
        return made

    def folder(self, data=b"an input\n"):
        self.count += 1
        path = os.path.join(self.here, "wf%d" % self.count)
        os.mkdir(path)
        with open(os.path.join(path, "in.dat"), "wb") as out:
            out.write(data)
        return path

    def words(self, *words):
        return list(words) + ["--url", self.url, "--token-file", os.path.join(self.here, "token")]

    def run(self, *words, folder=None, timeout=60):
        return suite.run("mi_system_wf.py", *self.words(*words), cwd=folder or self.folder(), python=self.python, timeout=timeout)

    def start(self, *words, folder=None):
        made = suite.Process("mi_system_wf.py", self.words(*words), folder or self.folder(), python=self.python)
        self.processes.append(made)
        return made

    def calc(self):
        """The stand-in's only calculation."""
        return list(self.relay.table.values())[-1]

    def runs(self):
        try:
            with open(os.path.join(self.here, "ledger")) as text:
                return text.read().split()
        except FileNotFoundError:
            return []

    def journal(self):
        """[what] of the only calculation on disk."""
        name, = [name for name in os.listdir(os.path.join(self.base, ".mi")) if len(name) == 36]
        lines = []
        for part in ("journal", "carrier"):
            with open(os.path.join(self.base, ".mi", name, part)) as text:
                lines += [json.loads(line) for line in text if line.strip()]
        return [line["what"] for line in sorted(lines, key=lambda line: line["t"])]

    def close(self):
        open(os.path.join(self.here, "go"), "w").close()
        for process in self.processes:
            process.kill()
        self.gate.close()
        if self.relay:
            self.relay.stop()
        texts = [process.text() for process in self.processes]
        assert not any("Traceback" in text or "bug" in text for text in texts), "\n".join(texts)


@pytest.fixture
def lab(tmp_path):
    made = Lab(tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["on our relay's fielded part", "on a fielded relay"])
def either(request, tmp_path_factory):
    """A Lab on each of the two fielded relays."""
    world = None
    if "our" in request.param:
        world = suite.World(tmp_path_factory.mktemp("world"), tls=False, commands=list(SCRIPTS) + ["unlisted"]).start()
    made = Lab(tmp_path_factory.mktemp("lab"), port=world.port if world else 0, token=world.token if world else TOKEN)
    yield made
    made.close()
    if world:
        world.close()


def contents(folder):
    """{name: bytes} of a directory, without the input and our own output."""
    found = {}
    for name in os.listdir(folder.encode()):
        if name not in (b"in.dat", b"mi_system_wf.py.out"):
            with open(os.path.join(folder.encode(), name), "rb") as source:
                found[name.decode("utf-8")] = source.read()
    return found


# ---- both ends

def test_both_of_ours_on_a_fielded_relay_end_each_kind_of_calculation_as_they_should(either):
    data, poller = os.urandom(300000), either.poller()
    folder = either.folder(data)
    done = either.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat", "absent", "--json", folder=folder)
    found = json.loads(done.stdout)
    assert (done.returncode, found["ended_by"], list(found["missing"])) == (65, "workflow", ["absent"]), done.stderr
    assert contents(folder) == {"out.dat": data, LOGS[0]: b"said\n", LOGS[1]: b"complained\n"}
    done = either.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    folder = either.folder()
    done = either.run("run", SITE, "fail", "--out", "out.dat", folder=folder)
    assert done.returncode == 1 and "own exit code" in done.stdout and contents(folder)[LOGS[1]] == b"bad news\n", done.stdout
    folder = either.folder()
    done = either.run("run", SITE, "unlisted", "--out", "out.dat", folder=folder)
    assert done.returncode == 1 and b"no [command NAME] for unlisted" in contents(folder)[LOGS[1]]
    assert len(either.runs()) == 3 and poller.alive()
    assert not {"files", "heartbeat", "output", "finish"} & set(either.gate.names)


@pytest.mark.parametrize("python", PYTHONS)
def test_large_files_pass_both_clients_without_being_held(tmp_path_factory, python, request):
    size = (300 if request.config.getoption("--long") else 100) * MIB
    world = suite.World(tmp_path_factory.mktemp("world"), tls=False, commands=["copy"]).start()
    lab = Lab(tmp_path_factory.mktemp("lab"), port=world.port, token=world.token, python=python)
    try:
        folder, digest = lab.folder(), hashlib.sha256()
        with open(os.path.join(folder, "in.dat"), "wb") as out:
            for place in range(size // MIB):
                piece = hashlib.sha512(b"%d" % place).digest() * (MIB // 64)
                out.write(piece)
                digest.update(piece)
        poller = lab.poller()
        process, peak = lab.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat", folder=folder), 0
        while process.alive():
            try:
                peak = max(peak, process.peak())
            except (OSError, AttributeError):
                pass
            time.sleep(0.01)
        assert process.popen.wait() == 0, process.text() + poller.text()
        with open(os.path.join(folder, "out.dat"), "rb") as source:
            found = hashlib.sha256()
            for piece in iter(lambda: source.read(MIB), b""):
                found.update(piece)
        assert found.digest() == digest.digest()
        assert 8 * MIB < peak <= 48 * MIB and poller.peak() <= 48 * MIB, (peak / MIB, poller.peak() / MIB)
    finally:
        lab.close()
        world.close()


@pytest.mark.parametrize("side, poller", [("our", "our"), ("our", "fielded"), ("fielded", "our")])
def test_the_stress_analysis_with_its_secret_curve_goes_through_a_fielded_relay(lab, side, poller):
    suite.needs("ccx")
    for name in ("stress.py", "secret_curve.json"):
        shutil.copy(os.path.join(suite.HERE, "calculix", name), lab.here)
    command = "%s %s/stress.py" % (sys.executable, lab.here)
    lab.relay.commands.append(command)
    with open(lab.ini, "a") as out:
        out.write("[command stress]\nargv =\n    %s\n    %s/stress.py\nmatch = %s\n" % (sys.executable, lab.here, command))
    folder = lab.folder()
    with open(os.path.join(folder, "material.json"), "w") as out:
        json.dump({"yield_strength": 500, "tensile_strength": 700, "reduction_of_area": 0.5, "load": 30000}, out)
    names, theirs = ["result.json", "stress.csv", "displacement.csv"], [sys.executable, os.path.join(suite.HERE, "fielded_stand_ins.py")]
    other = None
    if poller == "our":
        lab.poller()
    else:
        other = subprocess.Popen(theirs + ["poller", SITE, lab.url, TOKEN, "--base", lab.here, "--ask", "0.2", "--take", "0.1"], stdout=subprocess.DEVNULL)
    try:
        if side == "our":
            done = lab.run("run", SITE, command, "--in", "material.json", "--out", *names, folder=folder)
        else:
            done = subprocess.run(theirs + ["workflow", lab.url, SITE, TOKEN, command, "material.json", ":".join(names), "--ask", "0.2"], cwd=folder,
                                  timeout=60, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        found = contents(folder)
        assert done.returncode == 0, (done.stdout, found)
        assert set(names) <= set(found) and json.loads(found["result.json"].decode())
        with open(os.path.join(lab.here, "secret_curve.json")) as text:
            secrets = re.findall(r"\d\.\d{5,}", text.read())
        assert len(secrets) > 5 and not [word for word in secrets if word.encode() in b"".join(found.values())]
    finally:
        if other:
            other.kill()
            other.wait()


# ---- the poller

@pytest.mark.parametrize("when", ["running", "ended meanwhile"])
def test_a_poller_that_is_killed_in_mid_run_delivers_after_its_restart_and_runs_nothing_twice(lab, when):
    poller = lab.poller()
    process = lab.start("run", SITE, "slow", "--in", "in.dat", "--out", "out.dat")
    wait_until(lambda: lab.runs() and lab.calc().progress == "running", what=poller.text())
    poller.kill()
    if when != "running":
        open(os.path.join(lab.here, "go"), "w").close()
        time.sleep(0.5)
    again = lab.poller()
    wait_until(lambda: "picked up" in again.text())
    open(os.path.join(lab.here, "go"), "w").close()
    assert process.popen.wait(30) == 0, process.text() + again.text()
    assert len(lab.runs()) == 1


@pytest.mark.parametrize("name", ["calc-params-complete", "calc-start", "calc-end", "send-results", "end-send"])
def test_a_poller_that_is_killed_with_an_answer_on_its_way_goes_on_from_there_on_either_relay(either, name):
    poller = either.poller()
    either.gate.cut[name] = 0
    process = either.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
    wait_until(lambda: name not in either.gate.cut)
    poller.kill()
    again = either.poller()
    assert process.popen.wait(30) == 0, process.text() + again.text()
    assert len(either.runs()) == 1


def test_inputs_that_are_cut_off_on_the_way_from_a_fielded_relay_end_the_calculation_with_the_reason(lab):
    poller = lab.poller()
    lab.gate.cut["calc-params"] = 200000
    folder = lab.folder(os.urandom(MIB))
    done = lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat", folder=folder)
    assert done.returncode == 1 and b"gives them once" in contents(folder)[LOGS[1]], done.stdout + poller.text()
    assert not lab.runs() and lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat").returncode == 0


def test_a_lost_answer_to_calc_params_blocks_nobody_and_after_an_hour_of_silence_the_calculation_ends_with_the_reason(lab):
    poller = lab.poller()
    lab.relay.lose.append("calc-params")
    folder = lab.folder()
    process = lab.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat", folder=folder)
    wait_until(lambda: "waiting to see" in poller.text())
    accept_id = list(lab.relay.table)[0]
    assert lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat").returncode == 0
    poller.kill()
    path = os.path.join(lab.base, ".mi", accept_id, "carrier")
    with open(path) as text:
        entry = json.loads(text.read())
    with open(path, "w") as out:
        out.write(json.dumps(dict(entry, t=entry["t"] - 3601)) + "\n")
    lab.poller()
    assert process.popen.wait(30) == 1 and b"lost on the way" in contents(folder)[LOGS[1]]
    assert len(lab.runs()) == 1


def test_whoever_did_not_receive_the_calc_info_leaves_the_calculation_to_its_owner(lab):
    lab.relay.deaf.append("calc-params")               # the poller asks twice; in between another one is given it
    poller = lab.poller()
    folder = lab.folder()
    process = lab.start("run", SITE, "copy", "--out", "out.dat", folder=folder)
    wait_until(lambda: not lab.relay.deaf)
    accept_id, = lab.relay.table
    api, me = fielded_stand_ins.Api(lab.relay.url, TOKEN), {"accept_id": accept_id, "site_id": SITE}
    assert "calc-info" in api.call("GET", "calc-params", me)
    wait_until(lambda: "waiting to see" in poller.text())
    for name, more in (("calc-params-complete", {}), ("calc-start", {}), ("calc-end", {"result": "calc end"}),
                       ("send-results", {"result_files": {"out.dat": {"content": base64.b64encode(b"theirs").decode(), "mimetype1": "", "mimetype2": ""}}}),
                       ("end-send", {"result": "end send"})):
        api.call("POST", name, body=dict(me, **more))
    assert process.popen.wait(30) == 0 and contents(folder)["out.dat"] == b"theirs" and not lab.runs()
    wait_until(lambda: "the claim is gone" in poller.text())


@pytest.mark.parametrize("change, says", [
    (lambda info: info["parameter_files"]["in.dat"].__setitem__(0, "QUJ*"), "not base64"),
    (lambda info: info["parameter_files"]["in.dat"].__setitem__(0, "QUJD" * 50000 + "!"), "not base64"),
    (lambda info: info["parameter_files"].__setitem__("../x", ["QUJD", "", ""]), ".."),
    (lambda info: info["parameter_files"].__setitem__(LOGS[0], ["QUJD", "", ""]), "log"),
    (lambda info: info["parameter_files"].__setitem__("in.dat", {"content": "QUJD"}), "not a text"),
    (lambda info: info.__setitem__("command", 7), "command"),
    (lambda info: info.__setitem__("result_files", [[1]]), "result_files"),
    (lambda info: info.__setitem__("parameters", "--delete"), "does not allow")])
def test_a_calc_info_that_is_not_as_it_should_be_runs_nothing_and_ends_abnormal_with_the_reason(lab, change, says):
    process = lab.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
    wait_until(lambda: lab.relay.table and lab.calc().allow != "none")
    change(lab.calc().info)
    calc = lab.calc()
    poller = lab.poller()
    assert process.popen.wait(30) == 1, process.text()
    assert calc.status == "abnormal" and says in base64.b64decode(calc.results[LOGS[1]]["content"]).decode(), poller.text()
    assert not lab.runs() and poller.alive() and not os.path.exists(os.path.join(lab.here, "x"))


def test_rules_of_the_outbound_guard_hold_on_a_fielded_relay(lab):
    lab.write_ini("[outbound]\ndeny_names = out.dat")
    lab.poller()
    folder = lab.folder()
    done = lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat", folder=folder)
    assert done.returncode == 1 and "refused" in done.stdout and "out.dat" not in contents(folder)


def test_results_that_a_gateway_refuses_stay_here_and_the_waiting_side_is_told(lab):
    poller = lab.poller()
    lab.gate.refuse["send-results"] = (413, b"<html>too large</html>")
    done = lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
    assert done.returncode == 65 and "HTTP 413" in done.stdout, done.stdout
    assert "refused and stay here" in poller.text()


def test_a_calculation_that_is_not_allowed_yet_is_nothing_to_do_and_no_refusal(lab):
    api = fielded_stand_ins.Api(lab.relay.url, TOKEN)
    api.call("POST", "add-calcinfo", body={"calc-info": {"command": "copy", "remote-site": SITE, "parameter_files": {}, "result_files": {}}})
    poller = lab.poller(SITE, lab.url, TOKEN)
    wait_until(lambda: poller.text().count("code = 400 / message = accept_id(") > 1)
    assert poller.alive()
    poller.stop()


def test_the_poller_asks_a_fielded_relay_as_often_as_the_ini_says_and_sleeps_between_no_steps(lab):
    lab.write_ini()
    with open(lab.ini) as text:
        changed = text.read().replace("poll = 0.2", "poll = 1.5s")
    with open(lab.ini, "w") as out:
        out.write(changed)
    lab.poller()
    wait_until(lambda: lab.relay.names().count("calc-request") == 1)
    begun = time.monotonic()
    wait_until(lambda: lab.relay.names().count("calc-request") == 2)
    assert 1.2 < time.monotonic() - begun < 4
    lab.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
    wait_until(lambda: "calc-params" in lab.relay.names())
    begun = time.monotonic()
    wait_until(lambda: "end-send" in lab.relay.names())
    assert time.monotonic() - begun < 1.2


def test_retry_ends_the_process_after_so_many_failures_and_keeps_the_result(lab):
    poller = lab.poller(SITE, lab.url, TOKEN, "retry:3,0.2")
    process = lab.start("run", SITE, "slow", "--in", "in.dat", "--out", "out.dat")
    wait_until(lambda: lab.runs())
    lab.relay.deaf += ["calc-end"] * 3
    open(os.path.join(lab.here, "go"), "w").close()
    assert poller.popen.wait(20) == 69 and "3 times in a row" in poller.text(), poller.text()
    lab.poller()
    assert process.popen.wait(30) == 0 and len(lab.runs()) == 1


def secured(lab, folder):
    """The stand-in behind TLS; the certificate's path."""
    cert, key = suite.make_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    lab.relay.socket = context.wrap_socket(lab.relay.socket, server_side=True)
    return cert


def test_port_and_no_auth_and_calc_base_and_debug_are_as_the_manual_says(lab):
    cert, port = secured(lab, lab.here), "port:%d" % lab.relay.server_port
    base = os.path.join(lab.here, "another")
    for words, code in ((["no_auth:" + cert], 0), (["no_auth"], 0), ([], 69)):
        done = suite.run("mi_system_remote.py", SITE, "https://127.0.0.1", TOKEN, port, "calc_base:" + base, "debug", *(words + ["--once", "--ini", lab.ini]))
        assert done.returncode == code, done.stderr
        assert ("base url = https://127.0.0.1:%d\n" % lab.relay.server_port) in done.stdout
        assert ("code = 0300" in done.stdout) == (code == 0) and TOKEN not in done.stdout + done.stderr
        assert ("NOT CHECKED" in done.stderr) == (words == ["no_auth"])
    assert os.path.isdir(os.path.join(base, ".mi")) and not os.path.exists(lab.base)


def test_login_takes_the_token_of_the_sites_login_program(lab):
    folder = os.path.join(lab.here, "operator")
    os.mkdir(folder)
    for token, code in (("(\"uid\", \"%s\")" % TOKEN, 0), ("(None, None)", 77)):
        with open(os.path.join(folder, "openam_operator.py"), "w") as out:
            out.write("class openam_operator:\n    def miLogin(host):\n        assert host == '127.0.0.1'\n        return %s\n" % token)
        done = suite.run("mi_system_remote.py", SITE, lab.url, "login", "--once", "--ini", lab.ini, env=suite.clean_env(AUTHENTICATION_OPERATOR=folder))
        assert done.returncode == code and ("code = 0300" in done.stdout) == (code == 0), done.stderr
    done = suite.run("mi_system_remote.py", SITE, lab.url, "login", "--once", "--ini", lab.ini)
    assert done.returncode == 78 and suite.one_line(done.stderr)


def test_a_poller_notices_that_a_fielded_relay_was_replaced_by_ours(tmp_path_factory):
    world = suite.World(tmp_path_factory.mktemp("world"), tls=False, commands=["copy"]).start()
    port, _ = world.port, world.relay.stop()
    relay = fielded_stand_ins.Relay([SITE], ["copy"], port=port).start()
    lab = Lab(tmp_path_factory.mktemp("lab"), url=world.url, port=port, token=world.token)
    code = "import sys; sys.path.insert(0, %r); import mi_system_remote as poller; poller.V1_AGAIN = 1; poller.run_as_program(poller.main)" % suite.ROOT
    with open(os.path.join(lab.here, "log"), "w") as out:
        process = subprocess.Popen([sys.executable, "-B", "-c", code, "poll", "--ini", lab.ini], stdout=out, stderr=out, env=suite.clean_env())
    try:
        wait_until(lambda: "calc-request" in relay.names())
        relay.stop()
        world.start()
        for attempt in range(5):                       # until V1_AGAIN is over it is served as by a fielded one
            done = lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
            assert done.returncode == 0, done.stdout
            if world.rows("SELECT protocol FROM calculations ORDER BY seq DESC")[0]["protocol"] == 2:
                break
            time.sleep(0.5)
        else:
            raise AssertionError("still v1")
    finally:
        process.kill()
        process.wait()
        lab.close()
        world.close()


# ---- the workflow side

@pytest.mark.parametrize("words, says", [(["--out", "*.dat"], "patterns"), (["--in", "d/x=in.dat"], "directory"),
                                         (["--param", "-n 3"], "--param")])
def test_what_a_fielded_relay_cannot_do_is_usage_and_nothing_is_registered(lab, words, says):
    done = lab.run("run", SITE, "copy", *words)
    assert done.returncode == 64 and says in done.stderr and suite.one_line(done.stderr) and not lab.relay.names()


def test_a_file_of_two_gib_as_base64_is_refused_before_it_is_read(lab):
    folder = lab.folder()
    with open(os.path.join(folder, "in.dat"), "wb") as out:
        out.truncate(((2 << 30) - 1) // 4 * 3 + 1)
    done = lab.run("run", SITE, "copy", "--in", "in.dat", folder=folder, timeout=5)
    assert done.returncode == 77 and "in.dat is larger" in done.stderr and not lab.relay.names()


def test_fielded_words_send_their_parameters_as_ever(lab):
    done = suite.run("mi_system_wf.py", lab.url, SITE, TOKEN, "copy", "in.dat", "out.dat", "-n 3", cwd=lab.folder(), timeout=60) if lab.poller() else None
    assert done.returncode == 1 and next(fields for method, name, fields in lab.relay.calls if name == "add-calcinfo")["calc-info"]["parameters"] == "-n 3"


def test_submit_status_wait_result_and_cancel_work_on_a_fielded_relay(lab):
    done = lab.run("submit", SITE, "slow", "--in", "in.dat", "--out", "out.dat", "--request-id", "mine")
    accept_id = done.stdout.strip()
    assert done.returncode == 0 and accept_id in lab.relay.table and "--request-id" in done.stderr
    assert lab.run("status", accept_id).stdout == accept_id + " waiting for the external computer\n" or "not start" in lab.run("status", accept_id).stdout
    done = lab.run("result", accept_id)
    assert done.returncode == 75 and suite.one_line(done.stderr)
    lab.poller()
    wait_until(lambda: lab.runs())
    open(os.path.join(lab.here, "go"), "w").close()
    folder = lab.folder()
    assert lab.run("wait", accept_id, "--out", "out.dat", folder=folder).returncode == 0
    assert set(contents(folder)) == {"out.dat"} | set(LOGS)
    accept_id = lab.run("submit", SITE, "copy", "--in", "in.dat", "--out", "out.dat").stdout.strip()
    folder = lab.folder()
    assert lab.run("wait", accept_id, folder=folder).returncode == 0 and set(contents(folder)) == {"out.dat"} | set(LOGS)
    for process in lab.processes:
        process.stop()
    accept_id = lab.run("submit", SITE, "copy", "--in", "in.dat", "--out", "out.dat").stdout.strip()
    assert lab.run("cancel", accept_id).returncode == 0 and not lab.relay.table
    for word in ("status", "cancel"):
        done = lab.run(word, accept_id)
        assert done.returncode == 64 and suite.one_line(done.stderr)
    assert lab.run("wait", accept_id).returncode == 69


def test_a_fielded_relay_that_forgot_the_calculation_is_left_with_the_reason(lab):
    process = lab.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
    wait_until(lambda: "calc-progress" in lab.relay.names())
    lab.relay.table.clear()
    assert process.popen.wait(30) == 69 and "forgets all when it stops" in process.text()


@pytest.mark.parametrize("cut", [0, 100000], ids=["before it began", "in the middle"])
def test_a_lost_result_is_said_clearly_and_leaves_nothing_behind(lab, cut):
    lab.poller()
    lab.gate.cut["get-calc-result"] = cut
    folder = lab.folder(os.urandom(MIB))
    done = lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat", folder=folder)
    assert done.returncode == 69 and "once it was asked for" in done.stdout, done.stdout
    assert contents(folder) == {}


@pytest.mark.parametrize("content, code", [("QUJ*", 1), ("QUJD" * 50000 + "!", 76), (None, 1)])
def test_a_result_that_is_not_base64_never_gets_its_name(lab, content, code):
    process = lab.start("run", SITE, "slow", "--in", "in.dat", "--out", "out.dat")
    wait_until(lambda: lab.relay.table and lab.calc().allow != "none")
    calc = lab.calc()
    calc.results = {"out.dat": {"content": content, "mimetype1": "", "mimetype2": ""}, "undeclared": {"content": "QUJD", "mimetype1": "", "mimetype2": ""},
                    "../up": {"content": "QUJD", "mimetype1": "", "mimetype2": ""}}
    calc.status, calc.progress = "abnormal", "got return"
    assert process.popen.wait(30) == code and "base64" in process.text() or content is None, process.text()
    assert contents(os.path.join(lab.here, "wf1")) == {} and not os.path.exists(os.path.join(lab.here, "up"))


def test_a_result_that_could_not_be_put_in_its_place_is_not_asked_for(lab):
    lab.poller()
    folder = lab.folder()
    os.mkdir(os.path.join(folder, "out.dat"))
    done = lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat", folder=folder)
    assert done.returncode == 74 and "get-calc-result" not in lab.relay.names()
    accept_id, = lab.relay.table
    os.rmdir(os.path.join(folder, "out.dat"))
    assert lab.run("result", accept_id, "--out", "out.dat", folder=folder).returncode == 0


def test_sigterm_leaves_the_calculation_running_and_it_can_be_waited_for(lab):
    lab.poller()
    process = lab.start("run", SITE, "slow", "--in", "in.dat", "--out", "out.dat")
    wait_until(lambda: lab.runs())
    assert process.stop(signal.SIGTERM) == 75 and "wait" in process.text()
    accept_id, = lab.relay.table
    open(os.path.join(lab.here, "go"), "w").close()
    assert lab.run("wait", accept_id, "--out", "out.dat").returncode == 0


def test_a_registration_that_could_not_be_allowed_is_taken_back_because_it_would_block_the_site(lab):
    lab.gate.refuse["allow-wait-calc"] = (404, b"<html>not let through</html>")
    done = lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
    assert done.returncode == 76 and not lab.relay.table, done.stdout
    process = lab.start("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat")
    lab.relay.deaf += ["allow-wait-calc"] * 50
    wait_until(lambda: len(lab.relay.deaf) < 50)
    assert process.stop(signal.SIGINT, 60) == 130 and not lab.relay.table, process.text()


def test_a_lost_answer_to_allow_wait_calc_is_asked_for_again(lab):
    lab.poller()
    lab.relay.lose.append("allow-wait-calc")
    assert lab.run("run", SITE, "copy", "--in", "in.dat", "--out", "out.dat").returncode == 0


def test_an_input_that_changes_while_it_is_sent_is_not_registered(lab, monkeypatch):
    wf = suite.module("mi_system_wf.py")
    folder = lab.folder(b"a" * MIB)
    path = os.path.join(folder, "in.dat")
    first = wf.add_sums

    def then_changed(found, voice):
        made = first(found, voice)
        with open(path, "wb") as out:
            out.write(b"b" * MIB)
        return made

    monkeypatch.setattr(wf, "add_sums", then_changed)
    with pytest.raises(wf.Stop) as stop:
        wf.run(lab.url, SITE, "copy", ["x=" + path], ["out.dat"], token=TOKEN)
    assert stop.value.code == 74 and "changed" in str(stop.value) and not lab.relay.table
