"""Each defence against hostile clients, relays and pollers, with what it keeps out; a copy of the scripts that lacks it lets that in.
Some of the copies are tried in each run, all of them with --long."""
import fnmatch
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import time

import pytest
import suite
from suite import LOGS, SITE, entry
from test_hostile_framing import BASE, Raw, answers, request
from test_mutations import copy

RELAY, POLLER, WF = "mi_dicomapi.py", "mi_system_remote.py", "mi_system_wf.py"
POST = b"POST " + BASE + b"%s HTTP/1.1"
INI = "[Server]\nauth = login\n[limits]\nheaders = 2s\nhandshake = 2s\nunauthenticated_per_address = 6\ncalculations_per_user = 3\nbytes_per_user = 1M\nmin_rate = 1K\n"


class Scene:
    """A relay of the scripts in suite.ROOT, with two users; or a poller's and workflow side's module alone."""

    def __init__(self, folder):
        self.folder, self.world = folder, None

    def relay(self):
        """The relay, started."""
        if self.world is None:
            self.world = suite.World(os.path.join(self.folder, "world"), commands=["hello"], sites=(SITE, "u-other"), ini=INI).start()
            self.mallory = self.world.client(self.world.issue("mallory"))
        return self.world

    def someone(self):
        """A client of a user of its own: quotas are per user."""
        return self.relay().client(self.world.issue("u" + os.urandom(4).hex()))

    def raw(self, head, headers, body=b"", source="127.0.0.1"):
        """Statuses of what comes back for one request, with a second one behind it."""
        second = b"GET " + BASE + b"version HTTP/1.1\r\nHost: smuggled\r\nConnection: close\r\n\r\n"
        return [status for status, first in answers(Raw(self.relay(), source).send(request(self.world, head, headers, body) + second).rest())]

    def add(self, user=None, **info):
        """HTTP status of a registration."""
        fields = {"v": 2, "request_id": os.urandom(6).hex(), "calc-info": dict({"command": "hello", "remote-site": SITE, "parameters": ""}, **info)}
        return (user or self.someone()).call("POST", "add-calcinfo", fields)[0]

    def module(self, name):
        """One of the scripts, as a module of its own."""
        import importlib.util
        spec = importlib.util.spec_from_file_location("copy_of_" + name[:-3], suite.script(name))
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found


def two_lengths(scene):
    return scene.raw(POST % b"allow-wait-calc", [b"Content-Length: 2", b"Content-Length: 40"], b"{}") == [400]


def chunked(scene):
    return scene.raw(POST % b"allow-wait-calc", [b"Transfer-Encoding: chunked"], b"0\r\n\r\n") == [411]


def bare_line_end(scene):
    return scene.raw(b"GET " + BASE + b"version HTTP/1.1", [b"X: a\rContent-Length: 5"]) == [400]


def endless_head(scene):
    found = answers(Raw(scene.relay()).send(b"GET / HTTP/1.1\r\nX: " + b"a" * 200000).rest())
    return [status for status, first in found] == [431]


def silence(scene):
    try:
        return Raw(scene.relay(), tls=False).closed_within(8) < 8
    except AssertionError:
        return False


def strangers(scene):
    """The seventh of an address waits for nobody, unless the oldest had its second; the honest one comes in all the same."""
    there = [Raw(scene.relay(), "127.0.5.1", tls=False) for number in range(6)]
    try:
        Raw(scene.world, "127.0.5.1", tls=False).closed_within(1)
    except AssertionError:
        return False
    time.sleep(1.1)
    honest = Raw(scene.world, "127.0.5.1").send(request(scene.world))
    return honest.answer()[0] == 404 and all(raw.sock.close() is None for raw in there)


def old_tls(scene):
    done = subprocess.run(["openssl", "s_client", "-connect", "127.0.0.1:%d" % scene.relay().port, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20)
    return b"Cipher is (NONE)" in done.stdout


def json_body(body):
    """A scenario: this body is refused."""
    def scenario(scene):
        return scene.raw(POST % b"finish", [b"Content-Length: %d" % len(body)], body)[:1] == [400]
    return scenario


def names(found):
    """A scenario: these names are refused as inputs and as results."""
    def scenario(scene):
        scene.relay()
        files = {name: entry(b"") for name in found}
        return scene.add(parameter_files=files) == 400 and scene.add(parameter_files={}) == 200
    return scenario


def expired(scene):
    world = scene.relay()
    return world.client(world.expired("alice", 1)).call("GET", "calc-progress", {"v": 2, "accept_id": "x"})[0] == 403


def role(scene):
    world = scene.relay()
    return world.client(world.issue("alice", "--roles", "remote")).call("GET", "get-calcinfo", {"v": 2})[0] == 403


def other_user(scene):
    accept_id = scene.someone().register("hello", allow=False)
    return scene.mallory.call("GET", "calc-progress", {"v": 2, "accept_id": accept_id})[0] == 404


def only_looks(scene):
    """A viewer who is a workflow side, too, cancels nothing of others."""
    accept_id = scene.someone().register("hello", allow=False)
    client = scene.world.client(scene.world.issue("eve", "--roles", "viewer,workflow"))
    return client.call("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id})[0] == 404 and client.ok("GET", "v2/explain", {"v": 2, "accept_id": accept_id})


def another_page(scene):
    """What a browser sends for another page than the relay's own: behind a gateway with a cookie it would come in its user's name."""
    client = scene.relay().client()
    return client.raw("POST", "v2/maintenance", b"{}", {"Origin": "https://evil.example"})[1].find(b'"origin"') > 0


def other_site(scene):
    world = scene.relay()
    token = world.issue("alice", "--sites", "u-other")
    return world.client(token).call("POST", "calc-request", {"v": 2, "site_id": SITE, "take": "12345678", "wait": 0})[0] == 403


def fielded_other_site(scene):
    """A fielded call, with a token of another site of the same user."""
    accept_id = scene.relay().client().register("hello")
    token = scene.world.issue("alice", "--sites", "u-other")
    return scene.world.client(token).call("GET", "calc-status", {"accept_id": accept_id})[1]["code"] == 400


def fielded_body(scene):
    """More than its user may hold: answered before it has come."""
    token = scene.relay().issue("u" + os.urandom(4).hex())
    raw = Raw(scene.world).send(b"POST " + BASE + b"add-calcinfo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\n"
                                b"Content-Length: 90000000\r\n\r\n{" % token.encode())
    raw.sock.settimeout(3)
    try:
        return raw.sock.recv(12) == b"HTTP/1.1 202"
    except OSError:
        return False


def kept_keys(scene):
    """A registration that says what only the relay says."""
    client = scene.someone()
    client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "r", "allow": True, "calc-info": {"command": "hello", "remote-site": SITE, "rerun": 7}})
    found = client.ok("POST", "calc-request", {"v": 2, "site_id": SITE, "poller": "p", "take": "take-it-now", "wait": 0})
    return "rerun" not in found["calc-info"]


def many_parts(scene):
    """A body that grows to a hundred times its length in memory."""
    return scene.someone().call("POST", "finish", {"v": 2, "accept_id": "x", "x": [{}] * 300000})[0] == 413


def too_many(scene):
    world, user = scene.relay(), None
    user = world.client(world.issue("greedy"))
    return [scene.add(user) for turn in range(4)] == [200, 200, 200, 429]


def too_much(scene):
    world = scene.relay()
    user = world.client(world.issue("fat"))
    return scene.add(user, parameter_files={"a": {"size": 2 << 20, "sha256": "0" * 64}}) == 429


def whole_disk(scene):
    scene.relay()
    return scene.add(parameter_files={"a": {"size": 1 << 58, "sha256": "0" * 64}}) == 507


def more_than_declared(scene):
    client = scene.someone()
    accept_id = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "r", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameters": "", "parameter_files": {"a": entry(b"x" * 100)}}})["accept_id"]
    raw, top = Raw(scene.world), os.path.join(scene.world.state, "spool")
    raw.send(b"POST " + BASE + b"files/%s/input/0?v=2&offset=0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 3000000\r\n\r\n%s" % (
        accept_id.encode(), client.token.encode(), b"y" * 500000))
    raw.sock.settimeout(0.05)
    got, until = b"", time.monotonic() + 20
    while time.monotonic() < until:
        try:
            got += raw.sock.recv(4096)
            if b"\r\n\r\n" in got:
                return got[9:12] == b"409"
        except (socket.timeout, ssl.SSLWantReadError):
            pass
        if any(os.path.getsize(os.path.join(folder, name)) > 100 for folder, dirs, files in os.walk(top) for name in files if os.path.exists(os.path.join(folder, name))):
            return False
    return False


def wrong_sum(scene):
    client = scene.someone()
    accept_id = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "r", "calc-info": {
        "command": "hello", "remote-site": SITE, "parameters": "", "parameter_files": {"a": entry(b"x" * 100)}}})["accept_id"]
    return client.call("POST", "files/%s/input/0?v=2&offset=0" % accept_id, body=b"y" * 100)[0] == 422


def undeclared(scene):
    """A malicious poller sends what nobody asked for."""
    client = scene.someone()
    accept_id = client.register("hello", results=["r"])
    found, claim = client.claim()
    client.walk(accept_id, claim, "calc-end")
    status, first = client.call("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": {".bashrc": entry(b"x")}})
    return status == 400 and first["why"] == "undeclared"


def log_lines(scene):
    client = scene.someone()
    accept_id = client.register("hello", results=["r"])
    found, claim = client.claim()
    client.call("POST", "calc-end", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "abnormal",
                                     "reason": "x\n2026-01-01T00:00:00 INFO %s 8 end-send\x1b[2J\u202e" % accept_id})
    shown = suite.run(RELAY, "show", accept_id, "--ini", scene.world.ini).stdout
    lines = [line for line in scene.world.relay.text().split("\n") + shown.split("\n") if line.startswith("2026-01-01T00")]
    return not lines and not re.search("[\x1b\u202e]", scene.world.relay.text() + shown)


def guesses(scene):
    world = scene.relay()
    done = [world.client("").call("POST", "login", {"v": 2, "user": "nobody", "password": "x%d" % turn})[0] for turn in range(6)]
    return done == [403] * 5 + [429]


def names_from_the_relay(scene):
    """A malicious relay names a result that leads elsewhere."""
    wf = scene.module(WF)
    relay = wf.RelayClient("http://127.0.0.1:1", lambda: "x")
    try:
        list(relay.manifest_entries("x", {"files": {"../../evil": {"size": 1, "sha256": "0" * 64}}, "next": None}))
        return False
    except ValueError:
        return True


def command_off_the_list(scene):
    """A malicious relay asks for another command, or for words that the list does not allow."""
    poller = scene.module(POLLER)
    ini = os.path.join(scene.folder, "ini")
    with open(ini, "w") as out:
        out.write("[command solve]\nmatch = solve\nargv = /bin/echo\n  {parameters}\nargument.1 = [a-z]+\n")
    commands = poller.commands_of(ini, poller.read_ini(ini, poller.INI_KEYS))
    for command, parameters in (("/bin/sh", ""), ("solve", "a b"), ("solve", "a;b"), ("solve", "-x"), ("solve", "abc\nd")):
        try:
            poller.permit_command(commands, command, poller.shell_words(parameters))
            return False
        except poller.Forbidden:
            pass
    return poller.permit_command(commands, "solve", ["abc"])[1] == ["/bin/echo", "abc"]


def token_to_the_command(scene):
    poller = scene.module(POLLER)
    os.environ["MI_DISTCOMP_TOKEN"] = "secret"
    try:
        return "secret" not in poller.command_env({"env": {}}, b"/w", "x.1").values()
    finally:
        del os.environ["MI_DISTCOMP_TOKEN"]


def outside_by_a_link(scene):
    """A malicious command, or input, leaves a link in place of a result, or of its directory."""
    poller = scene.module(POLLER)
    top, out = os.path.join(scene.folder, "top"), os.path.join(scene.folder, "out")
    os.makedirs(top)
    os.makedirs(out)
    open(os.path.join(out, "secret"), "w").close()
    for name, target in (("far", out + "/secret"), ("near", "../out/secret"), ("folder", out), ("again", top + "/../out/secret")):
        os.symlink(target, os.path.join(top, name))
    tree = poller.ResultTree(os.fsencode(top))
    try:
        for name in (b"far", b"near", b"folder/secret", b"again"):
            try:
                os.close(tree.open(tree.resolve(name)[0]))
                return False
            except poller.Stays as stays:
                assert stays.code == "outside", (name, stays)
        return True
    finally:
        tree.close()


# what -> (scenario, [(script, old, new)]: the edits that take the defence away)
DEFENCES = {
    "two lengths": (two_lengths, [(RELAY, "        if name in headers and name in SINGLE_HEADERS:\n", "        if False:\n")]),
    "chunked bodies": (chunked, [(RELAY, '        if "transfer-encoding" in headers:\n', "        if False:\n")]),
    "bare line ends": (bare_line_end, [(RELAY, '    if not head.count(b"\\r") == head.count(b"\\n") == head.count(b"\\r\\n") or b"\\0" in head:\n', "    if False:\n"),
                                       (RELAY, "([\\t -~\\x80-\\xff]*)\\Z", "([^\\n]*)\\Z")]),
    "endless heads": (endless_head, [(RELAY, "MAX_HEAD = 16 << 10 ", "MAX_HEAD = 16 << 30 ")]),
    "silence": (silence, [(RELAY, '            if conn.deadline > now or conn.phase == "busy":\n', "            if True:\n")]),
    "strangers of one address": (strangers, [(RELAY, "        return len(there) < most or self.drop_oldest(there, now)\n", "        return True\n")]),
    "old TLS": (old_tls, [(RELAY, "        context.minimum_version = ssl.TLSVersion.TLSv1_2\n", "        context.minimum_version = ssl.TLSVersion.TLSv1\n"),
                          (RELAY, '"ECDHE+AESGCM:ECDHE+CHACHA20"', '"ALL:@SECLEVEL=0"')]),
    "a key twice": (json_body(b'{"v":2,"accept_id":"a","accept_id":"b"}'), [(RELAY, "    if len(found) != len(pairs):\n        raise ValueError", "    if False:\n        raise ValueError")]),
    "NaN": (json_body(b'{"v":2,"accept_id":"a","x":[NaN]}'), [(RELAY, "object_pairs_hook=unique_keys, parse_constant=no_constant, ", "object_pairs_hook=unique_keys, ")]),
    "depth": (json_body(b'{"v":2,"accept_id":"a","x":' + b"[" * 300 + b"]" * 300 + b"}"), [(RELAY, '        if parts > 64 and not nests_less(found):\n',
                                                                                          "        if False:\n")]),
    "a number without end": (json_body(b'{"v":2,"accept_id":"a","x":' + b"9" * 3000 + b"}"), [(RELAY, "    if len(digits) > 18:\n", "    if False:\n")]),
    "a lone surrogate": (json_body(b'{"v":2,"accept_id":"\\ud800"}'), [(RELAY, '        if b"\\\\u" in data:\n', "        if False:\n")]),
    "names that lead out": (names(["../x"]), [(RELAY, '    if any(part in ("", ".", "..") for part in name.split("/")):\n', "    if False:\n")]),
    "names with a terminal's escapes": (names(["a\x1b[2Jb"]), [(RELAY, '    if has_control_chars(name) or "\\\\" in name:\n', "    if False:\n")]),
    "NFC twins": (names(["e\u0301", "\u00e9"]), [(RELAY, '        name = unicodedata.normalize("NFC", name)\n', "        pass\n")]),
    "a file that is another's directory": (names(["a", "a/b"]), [(RELAY, "(now <= last or now[0] == last[0] and now[1][:len(last[1])] == last[1])", "now <= last")]),
    "names of the logs": (names([LOGS[0]]), [(RELAY, "        if any(now[1][:1] == nfc_parts(word) for word in reserved):\n", "        if False:\n")]),
    "expired tokens": (expired, [(RELAY, "found is not None and found.expires > now", "found is not None")]),
    "roles": (role, [(RELAY, "        if call.route.role:\n            call.check_role", "        if False:\n            call.check_role")]),
    "another user": (other_user, [(RELAY, 'if (row["user"] == call.caller.user or all_users & call.caller.roles)\n             and ', "if ")]),
    "who only looks": (only_looks, [(RELAY, "{OPERATOR, VIEWER} if reading else {OPERATOR}", "{OPERATOR, VIEWER}")]),
    "another page": (another_page, [(RELAY, "        check_origin(call)\n", "")]),
    "another site": (other_site, [(RELAY, "    check_site(call, site)\n    have = call", "    have = call")]),
    "another site, fielded": (fielded_other_site, [(RELAY, 'return found[0] if found and token_covers(call.caller, found[0]["site"]) else None', "return found[0] if found else None")]),
    "fielded bodies before they come": (fielded_body, [(RELAY, "                check(call, self.length + call.relay.quotas.arriving[self.user])\n", "")]),
    "keys that are the relay's": (kept_keys, [(RELAY, '"result_patterns",\n            "rerun")', '"result_patterns")')]),
    "bodies of many parts": (many_parts, [(RELAY, '    if parts + data.count(b",") > PARTS:\n', "    if False:\n")]),
    "calculations per user": (too_many, [(RELAY, "    if most and relay.quotas.open_of[user] >= most:\n", "    if False:\n")]),
    "bytes per user": (too_much, [(RELAY, "    if most and used + total > most:\n", "    if False:\n")]),
    "room on the disk": (whole_disk, [(RELAY, "    if (store.free() - relay.quotas.reserved - sum(relay.quotas.arriving.values()) - total\n", "    if (1 << 62\n")]),
    "more than declared": (more_than_declared, [(RELAY, 'if self.call["offset"] != offset or self.call.length > size - offset:', 'if self.call["offset"] != offset:')]),
    "sums": (wrong_sum, [(RELAY, 'good = upload.digest.hexdigest() == self.found["sha256"] and os.fstat', "good = os.fstat")]),
    "results that nobody declared": (undeclared, [(RELAY, "        if not any(one(name) for one in wanted):\n            raise ApiError(400, \"%s is not a declared result\" % name, why=\"undeclared\")",
                                                "        if False:\n            pass")]),
    "log lines and escapes": (log_lines, [(RELAY, "        value = printable(value)\n", "        value = str(value)\n"),
                                          (RELAY, 'reason = printable(call["reason"])[:1000] or (""', 'reason = call["reason"][:1000] or (""'),
                                          (RELAY, "local_time(value) if key in times else printable(value)", "local_time(value) if key in times else value"),
                                          (RELAY, '''json.dumps(value, ensure_ascii=False) if re.search(r'[\\s"]|^$', value) else value''', "value")]),
    "guessed passwords": (guesses, [(RELAY, "        if left > 0:\n", "        if False:\n")]),
    "names from a malicious relay": (names_from_the_relay, [(WF, "            before = check_manifest_names(entries, before, folders=True)\n", "            before = None\n")]),
    "commands off the list": (command_off_the_list, [(POLLER, "    command = commands.get(word)\n", '    command = commands.get(word, commands["solve"])\n')]),
    "arguments off their pattern": (command_off_the_list, [(POLLER, 'if place not in command["shapes"] or not command["shapes"][place].fullmatch(argument):', "if False:")]),
    "links that lead outside": (outside_by_a_link, [
        (POLLER, "info = os.stat(part, dir_fd=here, follow_symlinks=False)\n                if stat", "info = os.stat(part, dir_fd=here)\n                if stat"),
        (POLLER, "fd = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "fd = os.open(leaf, os.O_RDONLY | os.O_NONBLOCK")]),
    "the poller's environment": (token_to_the_command, [(POLLER, "for key, value in os.environ.items() if PASSED_ENV.match(key)\n", "for key, value in os.environ.items() if True\n")]),
}
OFTEN = ("two lengths", "strangers of one address", "NFC twins", "another user", "log lines and escapes", "guessed passwords", "arguments off their pattern")


def test_every_defence_holds(tmp_path):
    scene = Scene(str(tmp_path))
    try:
        found = {name: bool(DEFENCES[name][0](scene)) for name in DEFENCES}
    finally:
        if scene.world:
            scene.world.close()
    assert all(found.values()), [name for name in found if not found[name]]


@pytest.mark.parametrize("name", DEFENCES)
def test_without_its_lines_a_defence_is_missed(name, tmp_path, monkeypatch, request):
    if name not in OFTEN and not request.config.getoption("--long"):
        pytest.skip("with --long")
    monkeypatch.setattr(suite, "ROOT", copy(tmp_path / "scripts", DEFENCES[name][1]))
    scene = Scene(str(tmp_path))
    try:
        assert not DEFENCES[name][0](scene)
    finally:
        if scene.world:
            scene.world.relay.kill()


# ---- what strings can do: into logs, pages, terminals, shells, through every field

POISON = "$(touch {0}/shell)`touch {0}/shell`;touch {0}/shell|<script>alert(1)</script>&\"'%s%n{{}}\\"


def test_no_string_of_any_field_reaches_a_shell_a_page_or_a_terminal(make_world, tmp_path):
    """A malicious workflow side and a malicious poller put poison into each text that they may send."""
    world = make_world(commands=["hello"], ini="[Server]\nloglevel = debug\n").start()
    poison = POISON.format(tmp_path)
    steer = poison + "\n\x1b]0;owned\x07\x1b[2J\r\u202e2026-01-01T00:00:00 INFO x 9 finish"
    folder, ini = world.poller({"hello": "match = hello\nargv = /bin/sh\n -c\n echo ran >ran.txt\n"}, start=False)
    client = world.client()
    for field in ("command", "remote-site", "parameters", "note"):
        info = dict({"command": "hello", "remote-site": SITE, "parameters": "", "result_files": {"ran.txt": {}}}, **{field: steer})
        client.call("POST", "add-calcinfo", {"v": 2, "request_id": steer[:150] + field, "allow": True, "calc-info": info})
    client.call("POST", "add-calcinfo", {"v": 2, "request_id": poison[:180], "allow": True, "calc-info": {
        "command": "hello", "remote-site": SITE, "parameters": poison, "result_files": {poison: {}, "ran.txt": {}}, poison: {poison: [poison]}}})
    poller = suite.Process(POLLER, ["poll", "--once", "-v", "--ini", ini], folder)
    world.pollers.append(poller)
    poller.popen.wait(60)
    accept_id = client.register("hello", results=["r"])
    found, claim = client.claim()                      # from here on a malicious poller
    fields = {"v": 2, "accept_id": accept_id, "claim": claim}
    client.call("POST", "heartbeat", {"v": 2, "site_id": SITE, "poller": steer, "wait": 0, "calcs": {accept_id: {"claim": claim, "phase": steer, "node": steer,
                                                                                                                 "out": [0, "G1syShtdMDtvd25lZAcK"]}, steer: {"claim": steer}}})
    client.walk(accept_id, claim, "calc-start")
    client.ok("POST", "calc-end", dict(fields, result="abnormal", reason=steer, signal=None, exit_code=3))
    client.ok("POST", "send-results", dict(fields, result_files={}, missing={steer: steer}, refused={"r": steer}))
    client.ok("POST", "end-send", dict(fields, result="end send"))
    shown = [suite.run(RELAY, *(words + ["--ini", world.ini])).stdout for words in (["list", "--all"], ["show", accept_id])]
    for words in (["status", accept_id], ["output", accept_id], ["result", accept_id], ["wait", accept_id, "--json"]):
        done = world.workflow(*words)
        shown += [done.stdout, done.stderr]
    shown += [suite.run(POLLER, "list", "--ini", ini).stdout, poller.text(), world.relay.text()]
    for text in shown:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text), repr(re.search(".{0,80}[\x00-\x08\x0b-\x1f\x7f\u202e].{0,80}", text, re.S).group())
        assert not re.search("^2026-01-01T00", text, re.M)
    assert not os.path.exists(str(tmp_path / "shell"))
    status, data, headers = client.raw("GET", "nothing/%3Cscript%3E")
    assert headers["Content-Type"].startswith("application/json") and headers["Cache-Control"].startswith("no-store")


# ---- TLS, as a scanner sees it

def test_nothing_below_tls_1_2_and_no_weak_cipher(world):
    suite.needs("sslscan")
    done = subprocess.run(["sslscan", "--no-colour", "--no-heartbleed", "127.0.0.1:%d" % world.port], stdout=subprocess.PIPE, timeout=120)
    text = done.stdout.decode()
    enabled = dict(re.findall(r"^(SSLv2|SSLv3|TLSv1\.[0-3]) +(enabled|disabled)", text, re.M))
    assert enabled == {"SSLv2": "disabled", "SSLv3": "disabled", "TLSv1.0": "disabled", "TLSv1.1": "disabled", "TLSv1.2": "enabled", "TLSv1.3": "enabled"}, text
    ciphers = re.findall(r"^(?:Accepted|Preferred) +(TLSv\S+) +(\d+) bits +(\S+)", text, re.M)
    assert ciphers and all(int(bits) >= 128 and re.search("GCM|POLY1305", name) for version, bits, name in ciphers), ciphers
    assert not re.search("(?i)compression enabled|insecure session renegotiation", text), text


def test_a_pattern_of_many_stars_means_the_same():
    relay = suite.module(RELAY)
    rng = random.Random(20261121)
    for turn in range(4000):                           # the same as the expression that few stars become
        text = "".join(rng.choice(["*", "**/", "**", "?", "a", "b", ".", "/"]) for part in range(rng.randrange(1, 7)))
        try:
            relay.check_name(text)
            found = relay.compile_pattern(text)
        except ValueError:
            continue
        pieces = re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", text)
        exact = re.compile((r"(?!\.)" if text[0] in "*?" else "") + "".join(
            {"**/": "(?:[^/]+/)*", "**": ".+", "*": "[^/]*", "?": "[^/]"}.get(piece) or re.escape(piece) for piece in pieces) + r"\Z", re.S)
        stars = relay.GlobMatcher(pieces, text[0] in "*?")
        for name in ("".join(rng.choice("ab./") for part in range(rng.randrange(1, 7))) for again in range(6)):
            assert bool(exact.match(name)) == bool(found.match(name)) == stars.match(name), (text, name)


def lines_run(function, *words):
    """How many lines of Python a call runs: its cost, on any machine."""
    count = [0]

    def trace(frame, event, arg):
        count[0] += event == "line"
        return trace
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*words)
    finally:
        sys.settrace(before)
    return count[0]


COSTLY = ["*a" * 100 + "b", "**/" * 100 + "x", "a*" * 60 + "/**/" + "*?" * 60, "**a" * 80, "*" * 250, "?*" * 120 + "b", "**/*a" * 150,
          "**" + "a" * 100 + "**" + "a" * 100 + "b", "/".join(["*a*"] * 200)]


def test_no_pattern_of_a_strangers_costs_more_than_its_length_times_the_names():
    """In steps: so many lines for each character of the name, whatever the pattern; the rows in them are as long as the pattern. What becomes an
    expression has one star beside a leading **/ and a star at its end: that costs no more either."""
    poller = suite.module(POLLER)
    for text in COSTLY:
        found, deny = poller.compile_pattern(text), poller.rule_matcher(text.replace("?", "[ab]"))
        assert isinstance(found, poller.GlobMatcher), text
        for name in ("a" * 250, "a" * 250 + "/" + "a" * 250 + "c/.", "/".join(["a" * 7] * 100) + "c", "a/" * 499 + "x"):
            for one in (found, deny):
                assert lines_run(one.match, name) <= 30 * len(name) + 30, (text, name)
    for text, fast in [(text, True) for text in ("*", "a*", "*.dat", "**/*.vtk", "res/", "**", "**/a", "a/**/b", "*/*", "*a*", "**/*/x*")] + [
            (text, False) for text in ("*a*b", "*a*b*", "a/**/*b", "**/*a*b", "**a**b")]:
        assert isinstance(poller.compile_pattern(text), poller.GlobMatcher) != fast, text


def test_a_calculation_has_few_patterns(world):
    """Relay, poller and workflow side: a hundred."""
    client, many = world.client(), ["r%d*" % n for n in range(101)]
    info = {"command": "hello", "remote-site": SITE, "parameters": "", "parameter_files": {}, "result_files": {}, "result_patterns": many}
    status, first = client.call("POST", "add-calcinfo", {"v": 2, "request_id": os.urandom(8).hex(), "calc-info": info})
    assert status == 400 and "more than 100 patterns" in first["message"], first
    client.ok("POST", "add-calcinfo", {"v": 2, "request_id": os.urandom(8).hex(), "calc-info": dict(info, result_patterns=many[1:])})
    done = suite.run(WF, "run", SITE, "hello", "--out", *many, "--url", world.url)
    assert done.returncode == 64 and suite.one_line(done.stderr) and "more than 100 patterns" in done.stderr, done
    with pytest.raises(ValueError):
        suite.module(POLLER).compile_patterns(many)


def test_an_owners_name_rules_mean_what_fnmatch_means():
    poller, rng, seen = suite.module(POLLER), random.Random(20261128), set()
    for turn in range(4000):
        rule = "".join(rng.choice(["*", "?", "a", "b", ".", "/", "[ab]", "[!a]", "[a-c]", "[", "]", "[]a]"]) for part in range(rng.randrange(1, 7)))
        for name in ("".join(rng.choice("abc./[]") for part in range(rng.randrange(1, 7))) for again in range(6)):
            found = bool(poller.rule_matcher(rule).match(name))
            assert found == fnmatch.fnmatchcase(name, rule), (rule, name)
            seen.add((type(poller.rule_matcher(rule)) is poller.GlobMatcher, found))
    assert len(seen) == 4


READ = {"mi_dicomapi.py": {"LD_LIBRARY_PATH", "STATE_DIRECTORY"},            # the demo hands it to the Python of its command; systemd's, of notify
        "mi_system_wf.py": {"MI_DISTCOMP_TOKEN", "CREDENTIALS_DIRECTORY", "REQUESTS_CA_BUNDLE", "XDG_STATE_HOME", "no_proxy",
                                                           "NO_PROXY"},
        "mi_system_remote.py": {"MI_DISTCOMP_TOKEN", "CREDENTIALS_DIRECTORY", "XDG_STATE_HOME", "AUTHENTICATION_OPERATOR", "REQUESTS_CA_BUNDLE", "no_proxy",
                                "NO_PROXY", "MI_RUN", "SUDO_USER"},
        "execute_remote_command.py": {"XDG_STATE_HOME", "MISYSTEM_SITEID", "SSH_CONNECTION", "SSH_ORIGINAL_COMMAND", "SHELL", "MI_RUN", "SUDO_USER"}}
ALL = {"LC_ALL", "LC_MESSAGES", "LANG", "JOURNAL_STREAM", "PATH", "NO_COLOR", "TERM"}


@pytest.mark.parametrize("name", sorted(READ))
def test_nothing_of_the_environment_makes_a_program_die_or_show_its_inside(name):
    """The variables that a program reads are a closed list; a bug is one line, whatever the environment says."""
    with open(suite.script(name), encoding="utf-8") as text:
        found = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', text.read()))
    assert found - ALL == READ[name]
    code = suite.DYING.replace("program.fault = lambda name: name == point and os.kill(os.getpid(), 9)", "program.main = lambda: 1 / 0")
    assert "1 / 0" in code
    done = subprocess.run([suite.PYTHON, "-I", "-S", "-c", code, "", suite.script(name)], env=suite.clean_env(MI_DEBUG="1", MI_FAULT="registered"),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (70, b"") and suite.one_line(done.stderr.decode()) and b"ZeroDivisionError" in done.stderr, done


def test_a_fault_point_named_in_the_environment_kills_no_relay(make_world, monkeypatch):
    monkeypatch.setattr(suite, "started_as", lambda words, env: words)
    world = make_world(tls=False, commands=["hello"]).start(suite.clean_env(MI_FAULT="add-calcinfo received"))
    world.client().register("hello")
    assert world.relay.alive()
