"""How the relay is set up: every wrong ini is one clear line and 78, a running relay follows its ini, tokens come and go."""
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import time

import pytest
import documents
import suite
from suite import SITE, USER, make_certificate, one_line, run, wait_until

relay = suite.module("mi_dicomapi.py")


def serve(ini, *words, **more):
    """`serve` that must not come up: its CompletedProcess."""
    return run("mi_dicomapi.py", "serve", "--ini", str(ini), *words, timeout=20, **more)


@pytest.fixture
def ini(tmp_path):
    """A function that writes an ini with these lines; state_dir and port are set unless they are among them."""
    def write(text, name="relay.ini", encoding="utf-8"):
        if "state_dir" not in text:
            text = "[Server]\nstate_dir = %s\nportnumber = 0\n" % (tmp_path / "state") + text
        path = tmp_path / name
        path.write_bytes(text.encode(encoding, "surrogateescape"))
        return path
    return write


WRONG = [                      # lines after a good [Server] head, and what the one line must name
    ("loglevel = loud\n", "[Server] loglevel"), ("portnumbr = 1\n", "portnumber"), ("[limits]\nmax_body = many\n", "[limits] max_body"),
    ("[limits]\nmax_body = 1K\n", "[limits]"), ("[limits]\nworkers = 1\n", "workers"), ("[limits]\nspool_free = 5 percent\n", "[limits] spool_free"),
    ("[limits]\nmax_files = 1e6\n", "[limits] max_files"), ("[times]\nlease = soon\n", "[times] lease"), ("[times]\nlease = -5s\n", "[times] lease"),
    ("[limits]\nspool_free = nan%\n", "[limits] spool_free"), ("[times]\nleese = 5s\n", "lease"), ("[limit]\nworkers = 8\n", "[limit] workers"), ("[RemoteSites]\nremote_site_ids = a limits\n", "limits"),
    ("[RemoteSites]\nremote_site_ids = abc\n[abd]\ncommands = x\n", "abc"), ("[RemoteSites]\nremote_site_ids = abc\n[abc]\ncommand = x\n", "commands"),
    ("[RemoteSites]\nremote_site_ids = abc\n[abc]\nmax_waiting = x\n", "[abc] max_waiting"), ("auth = openid\n", "[Server] auth"),
    ("auth = gateway\n", "trusted_proxies"), ("certfile = /x\n", "keyfile"), ("lang = fr\n", "[Server] lang"), ("client_ca = /x\n", "client_ca"),
    ("loglevel = info\nloglevel = info\n", "loglevel"), ("[times]\nlease = 5s\n[times]\nlease = 6s\n", "times"), ("no equals sign here\n", "equals"),
    ("[Server]\nstate_dir = state\n", "[Server] state_dir"), ("[unclosed\n", "unclosed"), ("loglevel = \udcff\n", "utf-8"), ("certfile = /nonexistent/c\nkeyfile = /nonexistent/k\n", "[Server] certfile"),
]


@pytest.mark.parametrize("text, named", WRONG, ids=[text.strip().replace("\n", " ").encode("ascii", "replace").decode() for text, named in WRONG])
def test_a_wrong_ini_is_one_line_that_names_file_section_and_key(ini, text, named):
    path = ini(text)
    done = serve(path)
    assert done.returncode == 78 and one_line(done.stderr) and done.stdout == "", done.stderr
    assert done.stderr.startswith("mi_dicomapi: ")
    if "certfile = /non" not in text:
        assert str(path) in done.stderr, done.stderr
    assert named in done.stderr, done.stderr


@pytest.mark.parametrize("text, named", [("portnumber = 70000", "portnumber"), ("portnumber = x", "[Server] portnumber"), ("ipaddress = 300.1.2.3", "[Server] ipaddress"),
                                         ("portnumber = -1", "portnumber")])
def test_a_wrong_address_or_port_is_one_line(tmp_path, ini, text, named):
    done = serve(ini("[Server]\nstate_dir = %s\n%s\n" % (tmp_path / "s", text if "port" in text else text + "\nportnumber = 0\n")))
    assert done.returncode == 78 and one_line(done.stderr) and named in done.stderr, done.stderr


def test_an_ini_that_is_not_there_is_one_line(tmp_path):
    done = serve(tmp_path / "none.ini")
    assert done.returncode == 78 and one_line(done.stderr) and "none.ini" in done.stderr
    shutil.copy(suite.script("mi_dicomapi.py"), str(tmp_path))           # none beside it either
    done = subprocess.run([suite.PYTHON, "-I", "-S", str(tmp_path / "mi_dicomapi.py"), "list"], cwd=str(tmp_path), env=suite.clean_env(HOME=str(tmp_path)),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 78 and one_line(done.stderr.decode()) and b"mi_distributed_computing_assist.ini" in done.stderr


def test_the_language_of_the_lines_is_the_readers(ini):
    done = serve(ini("[times]\nlease = soon\n"), env=suite.clean_env(LC_ALL="ja_JP.UTF-8"))
    assert done.returncode == 78 and "時間ではありません" in done.stderr


# ---- certificates

def expired(folder):
    """A certificate that was good last year: (certificate, key)."""
    cert, key = make_certificate(folder)
    conf = os.path.join(folder, "ca.cnf")
    with open(conf, "w") as out:
        out.write("[ca]\ndefault_ca = d\n[d]\ndatabase = %s/index\nnew_certs_dir = %s\nserial = %s/serial\ndefault_md = sha256\npolicy = p\n[p]\ncommonName = supplied\n"
                  % (folder, folder, folder))
    open(os.path.join(folder, "index"), "w").close()
    with open(os.path.join(folder, "serial"), "w") as out:
        out.write("01\n")
    subprocess.run(["openssl", "req", "-new", "-key", key, "-subj", "/CN=localhost", "-out", folder + "/csr"], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["openssl", "ca", "-batch", "-selfsign", "-config", conf, "-keyfile", key, "-in", folder + "/csr", "-out", cert, "-notext",
                    "-startdate", "20240101000000Z", "-enddate", "20240201000000Z"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return cert, key


def test_the_loglevel_of_a_fielded_ini_is_a_number_from_0_critical_to_4_debug(ini):
    relay = suite.module("mi_dicomapi.py")
    words = {"0": "error", "1": "error", "2": "warn", "3": "info", "4": "debug", "warn": "warn"}
    found = {word: relay.read_ini(str(ini("loglevel = %s\n" % word)), relay.INI_KEYS)["Server"]["loglevel"] for word in words}
    assert found == words
    with pytest.raises(relay.Stop) as stopped:
        relay.read_ini(str(ini("loglevel = 5\n")), relay.INI_KEYS)
    assert stopped.value.code == 78 and "loglevel = 5" in str(stopped.value)
    done = run("mi_dicomapi.py", "list", "--ini", str(ini("loglevel = 4\n")))
    assert done.returncode == 0, done.stderr


def test_a_certificate_that_cannot_be_used_is_one_line(ini, tmp_path):
    one, two, old = [str(tmp_path / name) for name in ("one", "two", "old")]
    for folder in (one, two, old):
        os.mkdir(folder)
    (cert, key), (_cert, key2), (late, late_key) = make_certificate(one), make_certificate(two), expired(old)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for pair, named in (((cert, key2), "certfile"), ((str(garbage), key), "certfile"), ((cert, str(garbage)), "keyfile"), ((cert, str(tmp_path / "no.pem")), "keyfile"),
                        ((str(tmp_path), key), "certfile"), ((late, late_key), "2024-02-01")):
        done = serve(ini("certfile = %s\nkeyfile = %s\n" % pair))
        assert done.returncode == 78 and one_line(done.stderr) and named in done.stderr, (pair, done.stderr)
    done = serve(ini("certfile = %s\nkeyfile = %s\nclient_ca = %s\n" % (cert, key, garbage)))
    assert done.returncode == 78 and one_line(done.stderr) and "client_ca" in done.stderr


def test_a_renewed_certificate_is_served_without_a_restart_and_a_broken_one_is_not(make_world):
    world = make_world(commands=["hello"]).start()

    def served():
        with socket.create_connection(("127.0.0.1", world.port), 5) as sock:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(sock) as tls:
                return ssl.DER_cert_to_PEM_cert(tls.getpeercert(True)).strip()

    with open(world.cert) as text:
        assert served() in text.read()
    make_certificate(world.folder)
    wait_until(lambda: served() in open(world.cert).read(), 5)
    good = served()
    with open(world.cert, "w") as out:
        out.write("broken")
    wait_until(lambda: "the old one stays in force" in world.relay.text(), 5)
    assert served() == good


def test_old_versions_of_tls_are_refused(world):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", world.port), 5) as sock, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(sock)
    assert world.client().raw("GET", "version")[0] == 200


# ---- the directory and the port

def test_a_port_in_use_is_69(ini, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        done = serve(ini("[Server]\nstate_dir = %s\nportnumber = %d\n" % (tmp_path / "s", port)))
    assert done.returncode == 69 and one_line(done.stderr) and str(port) in done.stderr


def test_a_directory_that_cannot_be_used_is_one_line(ini, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(words + [suite.PYTHON, "-I", "-S", suite.script("mi_dicomapi.py"), "serve", "--ini",
                                   str(ini("[Server]\nportnumber = 0\nstate_dir = %s\n" % (closed / "state")))],
                          env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert done.returncode == 78 and one_line(done.stderr.decode()) and b"state_dir" in done.stderr and str(closed).encode() in done.stderr
    plain = tmp_path / "plain"
    plain.write_text("")
    done = serve(ini("[Server]\nportnumber = 0\nstate_dir = %s\n" % (plain / "state")))
    assert done.returncode in (74, 78) and one_line(done.stderr) and str(plain) in done.stderr


def test_another_users_directory_is_refused(ini, tmp_path):
    if os.geteuid() == 0:
        other = tmp_path / "other"
        other.mkdir()
        os.chown(str(other), 65534, 65534)
    else:
        other = "/"
    done = serve(ini("[Server]\nportnumber = 0\nstate_dir = %s\n" % other))
    assert done.returncode == 78 and one_line(done.stderr) and str(other) in done.stderr


def test_a_newer_or_broken_database_is_left_alone(ini, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    db = sqlite3.connect(str(state / "state.sqlite3"))
    db.execute("PRAGMA user_version=99")
    db.execute("CREATE TABLE theirs (x)")
    db.commit()
    db.close()
    before = (state / "state.sqlite3").read_bytes()
    for word in ("serve", "list"):
        done = run("mi_dicomapi.py", word, "--ini", str(ini("")))
        assert done.returncode == 78 and one_line(done.stderr) and "99" in done.stderr, done.stderr
    assert (state / "state.sqlite3").read_bytes() == before
    (state / "state.sqlite3").write_bytes(b"not a database" * 1000)
    done = serve(ini(""))
    assert done.returncode == 74 and one_line(done.stderr) and "state.sqlite3" in done.stderr


def test_the_state_is_closed_to_others(world):
    assert os.stat(world.state).st_mode & 0o777 == 0o700
    client = world.client()
    accept_id = client.register("hello", inputs={"a": b"secret"})
    for above, folders, files in os.walk(world.state):
        for name in files:
            assert os.stat(os.path.join(above, name)).st_mode & 0o077 == 0, name
    assert client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})


def test_plain_http_beyond_this_host_is_refused_with_both_ways_out(ini):
    for address in ("0.0.0.0", "::", "192.0.2.1"):
        done = serve(ini("ipaddress = %s\n" % address))
        assert done.returncode == 78 and one_line(done.stderr), done.stderr
        assert all(word in done.stderr for word in (address, "certfile", "keyfile", "auth = gateway", "trusted_proxies"))


def test_plain_http_in_a_laboratory_is_said_aloud(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[Server]\nipaddress = 0.0.0.0\nplain_http = yes\n")
    world.write_ini()
    world.relay = suite.Process("mi_dicomapi.py", ["serve", "--ini", world.ini], world.folder)
    wait_until(lambda: " listening url=http://0.0.0.0:" in world.relay.text())
    assert "WARN - plain_http = yes: whoever is on the network reads tokens and files" in world.relay.text()


def test_behind_a_gateway_only_its_addresses_are_taken(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[Server]\nipaddress = 0.0.0.0\nauth = gateway\ntrusted_proxies = 127.0.0.2\ngateway_user_header = X-User\n")
    world.write_ini()
    world.relay = suite.Process("mi_dicomapi.py", ["serve", "--ini", world.ini], world.folder)
    port = int(wait_until(lambda: re.search(r" listening url=http://0.0.0.0:(\d+)", world.relay.text())).group(1))

    def ask(source, user):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10, source_address=(source, 0))
        body = json.dumps({"v": 2, "request_id": "r", "calc-info": {"command": "hello", "remote-site": SITE}})
        connection.request("POST", "/mi-distcomp-api/add-calcinfo", body, {"Authorization": "Bearer anything", "X-User": user})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read().decode())["errors"][0].get("accept_id")

    status, mine = ask("127.0.0.2", "alice")
    assert status == 200 and ask("127.0.0.2", "alice") == (200, mine)
    assert ask("127.0.0.2", "bob")[1] != mine
    with pytest.raises((OSError, http.client.HTTPException)):
        ask("127.0.0.1", "alice")
    assert world.rows("SELECT DISTINCT user FROM calculations ORDER BY user") == [{"user": "alice"}, {"user": "bob"}]


@pytest.mark.parametrize("header", ["X-User", ""])
def test_behind_a_gateway_the_inis_operators_get_through_with_what_operators_do(make_world, header):
    """Without a header for the user, a token's own name; whoever is refused is told that name."""
    world = make_world(tls=False, commands=["hello"])
    head = "[Server]\nauth = gateway\ntrusted_proxies = 127.0.0.1\ngateway_user_header = %s\n" % header
    world.extra = head
    world.start()
    client = world.client(token="an operator's")
    more = {"X-User": "olivia"} if header else {}

    def ask(method, name, **headers):
        status, data, ignored = client.raw(method, name, b"{}" if method == "POST" else None, dict(more, **headers))
        return status, json.loads(data.decode("utf-8"))

    calls = (("GET", "get-calcinfo"), ("GET", "get-calcinfo?v=2"), ("POST", "reload-ini"))
    refused = [ask(*call) for call in calls]
    assert [status for status, found in refused] == [403] * 3
    user = refused[0][1]["errors"][0]["user"]
    assert user == "olivia" if header else re.match(r"token-[0-9a-f]{16}\Z", user)
    accept_id = client_registers(world, more)
    world.extra = head + "operators = somebody %s\n" % user
    world.write_ini(world.port)
    wait_until(lambda: ask("POST", "reload-ini")[0] == 200, 10)
    assert accept_id in ask("GET", "get-calcinfo")[1] and accept_id in ask("GET", "get-calcinfo?v=2")[1]["errors"][0]["calculations"]
    client.token = "another" if not header else client.token
    assert ask("GET", "get-calcinfo", **({"X-User": "mallory"} if header else {}))[0] == 403


def client_registers(world, headers):
    """The accept_id of a calculation of a user whom the gateway names."""
    body = json.dumps({"v": 2, "request_id": "r", "calc-info": {"command": "hello", "remote-site": SITE}}).encode()
    status, data, ignored = world.client("another user's").raw("POST", "add-calcinfo", body, headers)
    return json.loads(data.decode())["errors"][0]["accept_id"]


def test_whoever_is_on_the_gateways_host_without_its_secret_is_nobody_and_one_user_is_named_once(make_world):
    secret, world = "s3cret-of-the-gateway", make_world(tls=False, commands=["hello"])
    path = os.path.join(world.folder, "gateway.secret")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
        out.write("X-Gateway: %s\n" % secret)
    world.extra = "[Server]\nauth = gateway\ntrusted_proxies = 127.0.0.1\ngateway_user_header = X-User\n"
    world.write_ini()
    assert re.search("WARN  any process on 127.0.0.1 can be any user", suite.run("mi_dicomapi.py", "check", "--ini", world.ini).stdout)
    world.extra += "gateway_secret_file = %s\n" % path
    world.start()
    assert "OK    only the gateway itself" in suite.run("mi_dicomapi.py", "check", "--ini", world.ini).stdout

    def ask(*lines):
        from test_hostile_framing import Raw
        head = ["GET /mi-distcomp-api/calc-progress?v=2&accept_id=x HTTP/1.1", "Host: x", "Authorization: Bearer t"] + list(lines)
        return Raw(world).send("\r\n".join(head + ["", ""]).encode()).answer()[0]

    good = ("X-Gateway: " + secret, "X-User: alice")
    table = [(good, 404), (good[::-1], 404), (good[1:], 403), (good[:1], 403), ((), 403), (("X-Gateway: " + secret[:-1], good[1]), 403),
             ((good[0], "X-User:"), 403), ((good[0], "X-User: alice, bob"), 403), ((good[0], "X-User: a b"), 403), (good + ("x-user: bob",), 400),
             (good + good[1:], 400), (good + good[:1], 400), (("X-Gateway: wrong",) + good, 400), ((good[0], "X-User: " + "u" * 201), 403)]
    assert [ask(*lines) for lines, wanted in table] == [wanted for lines, wanted in table]
    assert secret not in world.relay.text()


@pytest.mark.parametrize("text, mode", [("X-Gateway: short\n", 0o600), ("no header\n", 0o600), ("", 0o600), ("X-Gateway: %s\n" % ("s" * 20), 0o640)])
def test_a_secret_that_is_none_is_refused_at_the_start(ini, tmp_path, text, mode):
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    done = serve(ini("auth = gateway\ntrusted_proxies = 127.0.0.1\ngateway_secret_file = %s\n" % path))
    assert done.returncode == 78 and one_line(done.stderr) and "gateway_secret_file" in done.stderr


def test_operators_in_the_ini_are_for_a_gateway_only(ini):
    done = serve(ini("operators = olivia\n"))
    assert done.returncode == 78 and one_line(done.stderr) and "token issue" in done.stderr


# ---- in mid-run

def test_a_changed_ini_is_taken_while_it_runs_and_a_broken_one_is_not(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    client = world.client()

    def answer(command):
        return client.call("POST", "add-calcinfo", {"v": 2, "request_id": command, "calc-info": {"command": command, "remote-site": SITE}})[0]

    assert answer("more") == 401
    world.commands.append("more")
    world.write_ini(world.port)
    wait_until(lambda: answer("more") == 200, 5)
    with open(world.ini, "a") as out:
        out.write("[limits]\nmax_bodi = 1M\n")
    wait_until(lambda: "the old ini stays in force" in world.relay.text(), 5)
    line = [line for line in world.relay.text().splitlines() if "stays in force" in line][-1]
    assert " ERROR - reload " in line and "max_body" in line and world.ini in line
    assert answer("more") == 200 and world.relay.alive()
    os.unlink(world.ini)                               # gone for a moment, as some editors write
    time.sleep(1.2)
    assert answer("more") == 200 and world.relay.alive()
    world.commands.append("third")
    world.write_ini(world.port)
    wait_until(lambda: answer("third") == 200, 5)


def test_sighup_and_reload_ini_read_it_at_once_and_only_for_an_operator(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    operator, client = world.issue("boss", "--roles", "operator"), world.client()
    lines = world.relay.text().count(" reload ini=")
    world.relay.popen.send_signal(signal.SIGHUP)
    wait_until(lambda: world.relay.text().count(" reload ini=") == lines + 1, 5)

    def reload(token, path="/reload-ini"):
        connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=10)
        connection.request("POST", path, b"", {"Authorization": "Bearer " + token} if token else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read().decode())["errors"][0]

    assert reload(operator)[0] == 200
    assert reload(client.token)[1]["code"] == "0005" and reload("")[0] == 403
    with open(world.ini, "a") as out:
        out.write("[nonsense]\nx = y\n")
    status, first = reload(operator)
    assert (status, first["why"]) == (400, "ini") and "nonsense" in first["message"]
    assert client.register("hello")
    world.write_ini(world.port)
    assert reload(operator)[0] == 200


def test_what_only_a_start_can_change_is_said_so(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    world.write_ini(world.port + 1)
    wait_until(lambda: "takes effect at the next start" in world.relay.text(), 5)
    assert world.client().register("hello")


def test_a_relay_that_turns_from_plain_to_tls_keeps_its_connections(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    client = world.client()
    client.register("hello")
    world.cert, world.key = make_certificate(world.folder)
    world.write_ini(world.port)
    wait_until(lambda: " certificate renewed=" in world.relay.text(), 5)
    client.register("hello")                           # the old connection, still plain
    client.register("hello")
    world.tls = True
    assert world.client().register("hello")


# ---- tokens

def test_a_token_is_shown_once_and_only_its_hash_is_kept(make_world):
    world = make_world(tls=False, commands=["hello"])
    done = run("mi_dicomapi.py", "token", "issue", "carol", "--ini", world.ini, "--roles", "remote", "--sites", SITE, "--days", "7")
    secret = done.stdout.strip()
    assert done.returncode == 0 and re.match(r"[0-9a-f]{64}\Z", secret) and one_line(done.stderr) and secret not in done.stderr
    assert "carol" in done.stderr and SITE in done.stderr and "0600" in done.stderr
    for above, folders, files in os.walk(world.state):
        for name in files:
            with open(os.path.join(above, name), "rb") as data:
                assert secret.encode() not in data.read(), name
    listed = run("mi_dicomapi.py", "token", "list", "--ini", world.ini, "--json")
    found = json.loads(listed.stdout)
    assert found[-1]["user"] == "carol" and found[-1]["roles"] == "remote" and found[-1]["sites"] == SITE and "hash" not in found[-1]
    assert abs(found[-1]["expires"] - time.time() - 7 * 86400) < 60
    text = run("mi_dicomapi.py", "token", "list", "--ini", world.ini).stdout
    assert "carol" in text and text.splitlines()[0].split() == ["number", "user", "roles", "sites", "issued", "expires", "used", "revoked", "login"]
    assert secret not in listed.stdout + text


def test_a_new_token_is_good_at_once_and_a_revoked_one_is_not_within_a_second(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    for number in range(3):
        token = world.issue("user%d" % number)
        assert world.client(token).call("GET", "calc-progress", {"v": 2, "accept_id": "x"})[0] == 404, "a fresh token"
    client = world.client(token)
    found = json.loads(run("mi_dicomapi.py", "token", "list", "--ini", world.ini, "--json").stdout)
    done = run("mi_dicomapi.py", "token", "revoke", str(found[-1]["number"]), "--ini", world.ini)
    assert done.returncode == 0 and "revoked" in done.stdout
    wait_until(lambda: client.call("GET", "calc-progress", {"v": 2, "accept_id": "x"})[0] == 403, 2)
    for who in (str(found[-1]["number"]), "999", "x", None):
        done = run("mi_dicomapi.py", "token", "revoke", *([who] if who else []), "--ini", world.ini)
        assert done.returncode == 64 and one_line(done.stderr), who


def test_an_expired_token_is_told_its_day(world):
    status, first = world.client(world.expired(USER, 2)).call("GET", "calc-progress", {"v": 2, "accept_id": "x"})
    assert (status, first["code"]) == (403, "0005")
    assert first["why"] == "expired " + time.strftime("%Y-%m-%d", time.localtime(time.time() - 2 * 86400))


@pytest.mark.parametrize("words", [["issue"], ["issue", "a b"], ["issue", "a\nb"], ["issue", "u", "--roles", "king"], ["issue", "u", "--roles", ""],
                                   ["issue", "u", "--sites", "nowhere"], ["issue", "u", "--days", "many"], ["make", "u"], []])
def test_a_wrong_token_command_is_64_and_one_line(world, words):
    done = run("mi_dicomapi.py", "token", *(words + ["--ini", world.ini]))
    assert done.returncode == 64 and one_line(done.stderr) and done.stdout == "", done.stderr


# ---- list, show, --version, --help

def test_list_and_show_tell_what_there_is_beside_a_running_relay(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    client = world.client()
    accept_id = client.register("hello", inputs={"計算.txt": b"data"}, results=["r"])
    found, claim = client.claim()
    client.walk(accept_id, claim, "end-send", {"r": b"1"})
    client.ok("POST", "finish", {"v": 2, "accept_id": accept_id})
    other = client.register("hello")

    def tell(*words):
        done = run("mi_dicomapi.py", *(words + ("--ini", world.ini)))
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    assert [row["accept_id"] for row in json.loads(tell("list", "--json"))] == [other]
    assert [row["accept_id"] for row in json.loads(tell("list", "--all", "--json"))] == [accept_id, other]
    table = tell("list", "--all").splitlines()
    assert len(table) == 3 and table[0].startswith("accept_id") and accept_id in table[1] and "+ fetched" in table[1] and "- waiting" in table[2]
    row = json.loads(tell("show", accept_id, "--json"))
    assert row["state"] == "finished" and row["status"] == "completed" and row["exit_code"] == 0
    assert [(one["kind"], one["name"]) for one in row["files"]] == [("input", "計算.txt"), ("result", "r")]
    text = tell("show", accept_id)
    assert "計算.txt" in text and accept_id in text and claim not in text and claim not in json.dumps(row)
    done = run("mi_dicomapi.py", "show", "nothing\x1b[2J", "--ini", world.ini)
    assert done.returncode == 64 and one_line(done.stderr) and "\x1b" not in done.stderr


def test_nothing_from_the_wire_steers_the_operators_terminal(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    client = world.client()
    client.register("hello")
    accept_id, claim = world.client().call("POST", "calc-request", {"v": 2, "site_id": SITE, "poller": "p\x1b[2J\nfake line", "take": "12345678", "wait": 0})[1]["accept_id"], None
    claim = client.ok("POST", "calc-request", {"v": 2, "site_id": SITE, "poller": "p", "take": "12345678", "wait": 0})["claim"]
    client.ok("POST", "calc-end", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "abnormal", "reason": "bad\x1b]0;title\x07\u202e\nINFO fake"})
    client.ok("POST", "send-results", {"v": 2, "accept_id": accept_id, "claim": claim, "result_files": {}, "missing": {"a\x1b": "b\r"}, "refused": {}})
    texts = [world.relay.text()] + [run("mi_dicomapi.py", *(words + ["--ini", world.ini])).stdout for words in (["list"], ["show", accept_id], ["list", "--json"])]
    for text in texts:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text), text
        assert not re.search("^(fake|INFO)", text, re.M)


def test_version_prints_the_sum_of_the_very_file():
    done = run("mi_dicomapi.py", "--version")
    with open(suite.script("mi_dicomapi.py"), "rb") as text:
        assert done.stdout.splitlines()[0] == "mi_dicomapi %s protocol 2 (1) sha256 %s" % (relay.VERSION, hashlib.sha256(text.read()).hexdigest())
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_the_docstring_as_far_as_it_is_for_users():
    done = run("mi_dicomapi.py", "--help")
    assert done.returncode == 0 and relay.__doc__.partition("\ncontents")[0].strip() in done.stdout and done.stderr == ""
    for code in ("64", "66", "69", "70", "74", "75", "77", "78", "130"):
        assert re.search(r"\b%s\b" % code, relay.__doc__)


@pytest.mark.parametrize("words", [["--nonsense"], ["sing"], ["show"], ["list", "extra"], ["serve", "--json", "x"], ["--ini"]])
def test_wrong_words_are_64_and_one_line(words):
    done = run("mi_dicomapi.py", *words)
    assert done.returncode == 64 and one_line(done.stderr) and done.stdout == "" and "--help" in done.stderr, done.stderr


def test_without_a_word_it_serves_as_the_manual_starts_it(make_world):
    world = make_world(tls=False, commands=["hello"])
    shutil.copy(world.ini, os.path.join(world.folder, "mi_distributed_computing_assist.ini"))
    started = suite.Process("mi_dicomapi.py", [], world.folder)
    try:
        line = wait_until(lambda: re.search(r".* listening url=http://127\.0\.0\.1:\d+ .*", started.text()), 10).group()
        assert all(word in line for word in ("tls=none", "auth=tokens", "sites=1", "tokens=", "state=" + world.state, "free=", "instance="))
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d INFO - listening ", line)
    finally:
        assert started.stop() == 0


# ---- the operator's words

@pytest.mark.parametrize("days", ["0", "-1", "nan"])
def test_a_token_that_would_be_good_for_no_time_is_not_issued(ini, days):
    done = run("mi_dicomapi.py", "token", "issue", "suzuki", "--days=" + days, "--ini", str(ini("")))
    assert (done.returncode, done.stdout) == (64, "") and one_line(done.stderr) and "--days" in done.stderr


@pytest.mark.parametrize("way", [">&-", ">/dev/full", ">/dev/null", "| true"])
def test_a_token_that_nobody_has_seen_is_not_good_for_anything(ini, way):
    path = str(ini(""))
    line = "%s %s token issue suzuki --ini %s %s; exit ${PIPESTATUS[0]}" % (suite.PYTHON, suite.script("mi_dicomapi.py"), path, way)
    done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 74 and b"nobody has seen the token" in done.stderr.splitlines()[-1], done
    found = json.loads(run("mi_dicomapi.py", "token", "list", "--json", "--ini", path).stdout)
    assert [bool(row["revoked"]) for row in found] == [True]


ID_WORDS = ("show", "cancel", "rerun", "end")


def test_the_first_eight_characters_of_an_id_do_and_an_unknown_one_is_64_in_every_word(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    client, other = world.client(), world.client(world.issue("bob"))
    ids = [client.register("hello") for turn in range(4)]
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"), timeout=10)
    for number, accept_id in enumerate(ids[:2]):       # two that begin alike
        db.execute("UPDATE calculations SET accept_id = ? WHERE accept_id = ?", ("abcdef01-0000-4000-8000-00000000000%d" % number, accept_id))
    db.commit()
    db.close()
    wrong = (("00000000-0000-4000-8000-000000000000", "no such"), ("abcdef01", "which one? abcdef01-0000"), ("00000000", "no such"), (ids[2][:7], "no such"),
             ("%%%%%%%%", "no such"))
    for word in ID_WORDS:
        for given, said in wrong[:None if word == "show" else 2]:
            done = run("mi_dicomapi.py", word, given, "--ini", world.ini)
            assert (done.returncode, done.stdout) == (64, "") and one_line(done.stderr) and said in done.stderr, (word, given, done.stderr)
    assert ids[2] in run("mi_dicomapi.py", "show", ids[2][:8], "--ini", world.ini).stdout
    assert run("mi_dicomapi.py", "show", "abcdef01-0000-4000-8000-000000000001", "--ini", world.ini).returncode == 0
    done = run("mi_dicomapi.py", "cancel", ids[2][:8], "--ini", world.ini)
    assert done.returncode == 0 and done.stdout.startswith(ids[2] + ": "), done.stderr
    assert run("mi_dicomapi.py", "rerun", ids[2][:13], "--ini", world.ini).returncode == 0 and world.state_of(ids[2]) == "allowed"
    assert run("mi_dicomapi.py", "end", ids[3][:8], "--ini", world.ini).returncode == 77              # it is nobody's yet
    fields = {"v": 2, "accept_id": ids[3][:8]}         # the same over the wire, for one's own
    for turn in range(2):
        assert client.ok("GET", "calc-progress", fields)["accept_id"] == ids[3]
    assert client.call("GET", "calc-progress", dict(fields, accept_id="abcdef01"))[1]["why"] == "prefix"
    assert other.call("GET", "calc-progress", fields)[0] == other.call("GET", "calc-progress", dict(fields, accept_id="abcdef01"))[0] == 404
    assert client.call("GET", "calc-progress", dict(fields, accept_id=ids[3][:7]))[0] == 404
    client.ok("POST", "cancel-wait-calc", dict(fields, stop=True))
    assert client.ok("GET", "calc-progress", fields)["status"] == "abnormal" and world.state_of(ids[3]) == "got"
    client.ok("POST", "finish", fields)


def test_list_tells_who_is_out_of_contact(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[times]\nlease = 5s\naccept_lease = 1s\n").start()
    client = world.client()
    accept_id = client.register("hello")
    client.walk(accept_id, client.claim()[1], "calc-start")

    def listed(*words):
        return run("mi_dicomapi.py", "list", "--ini", world.ini, *words).stdout

    assert "running " in listed() and "out of contact" not in listed() and json.loads(listed("--json"))[0]["out_of_contact"] is None
    wait_until(lambda: "running, out of contact" in listed(), 20)
    found, = json.loads(listed("--json"))
    assert found["out_of_contact"] >= 0 and found["state"] == "running"
    claim = world.rows("SELECT claim FROM calculations")[0]["claim"]
    client.ok("POST", "heartbeat", {"v": 2, "site_id": SITE, "poller": "test", "wait": 0, "calcs": {accept_id: {"claim": claim, "phase": "running"}}})
    wait_until(lambda: "out of contact" not in listed(), 10)


def test_check_and_list_tell_of_maintenance_and_of_values_that_the_running_relay_has_still(make_world):
    world = make_world(tls=False, commands=["hello"]).start()

    def told():
        done = run("mi_dicomapi.py", "list", "--json", "--ini", world.ini)
        assert json.loads(done.stdout) == [] and done.returncode == 0
        return done.stderr.splitlines()

    def checked():
        check, lines = run("mi_dicomapi.py", "check", "--ini", world.ini).stdout, told()
        return lines and all(line.replace("mi_dicomapi: ", "WARN  ") in check for line in lines)

    assert told() == []
    run("mi_dicomapi.py", "maintenance", "on", "--reason", "new disk", "--ini", world.ini)
    assert len(told()) == 1 and "new disk" in told()[0] and checked()
    run("mi_dicomapi.py", "maintenance", "off", "--ini", world.ini)
    world.extra = "[Server]\nlogfile = %s\n[limits]\nworkers = 8\nmax_files = 7\n" % os.path.join(world.folder, "log")
    world.write_ini(world.port)
    wait_until(lambda: len(told()) == 2, 10)           # max_files is taken at once
    assert any("workers = 32 still (ini: 8)" in line for line in told()) and any("logfile" in line for line in told()) and checked()
    world.relay.stop()
    assert told() == []


def test_check_says_that_the_start_may_not_make_the_state_dir_where_it_may_not(ini, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    for folder, level in ((closed / "a" / "state", "FAIL"), (tmp_path / "open" / "state", "WARN")):
        done = subprocess.run(words + [suite.PYTHON, "-I", "-S", suite.script("mi_dicomapi.py"), "check", "--ini",
                                       str(ini("[Server]\nportnumber = 1\nstate_dir = %s\n" % folder))],
                              env=suite.clean_env(), stdout=subprocess.PIPE, timeout=20)
        line, = [line for line in done.stdout.decode().splitlines() if "is not there yet" in line]
        assert line.startswith(level) and ("may not make it" in line) == (level == "FAIL") and str(folder) in line


EXAMPLES = {("*", "commands"), ("command *", "argv"), ("command *", "match"), ("signer *", "key"), ("command *", "parameters")}      # told with a value that is none


def told_keys():
    """{(section, key): value} of the shipped ini, commented ones too; [u-tokyo] and [command solver] stand for all of their kind."""
    found, section = {}, ""
    with open(suite.script("mi_distributed_computing_assist.ini"), encoding="utf-8") as text:
        for line in text:
            head, key = re.match(r"(?:# )?\[(.*)\]\n", line), re.match(r"(?:# )?([a-z_][\w.]*) *= ?(.*?)(?:  +\(.*)?\n", line)
            if head:
                section = re.sub(r"(command|signer) .*", r"\1 *", head.group(1)).replace("u-tokyo", "*")
            elif key:
                found[section, re.sub(r"^(argument|env)\..*", r"\1.*", key.group(1))] = key.group(2).strip()
    return found


def told_meanings():
    """{(section, key): what stands in brackets behind it} of the shipped ini, over its lines."""
    found, section, last = {}, "", None
    with open(suite.script("mi_distributed_computing_assist.ini"), encoding="utf-8") as text:
        for line in text.read().split("\n"):
            head, key = re.match(r"(?:# )?\[(.*)\]$", line), re.match(r"(?:# )?([a-z_][\w.]*) *= ?.*?(?:  +\((.*))?$", line)
            if head:
                section, last = re.sub(r"(command|signer) .*", r"\1 *", head.group(1)).replace("u-tokyo", "*"), None
            elif key:
                last = section, re.sub(r"^(argument|env)\..*", r"\1.*", key.group(1))
                found[last] = key.group(2) or ""
            elif last and line.startswith("#    ") and not found[last].endswith(")"):
                found[last] += " " + line.strip("# ")
    return {key: text[:-1] if text.endswith(")") else text for key, text in found.items()}


@pytest.mark.parametrize("name", ["mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py", "execute_remote_command.py"])
def test_the_shipped_ini_says_of_each_key_what_the_script_s_table_says(name):
    told = told_meanings()
    wrong = [(section, key, told.get((section, key)), row[2]) for section, keys in suite.module(name).INI_KEYS.items()
             for key, row in keys.items() if told.get((section, key)) != row[2]]
    assert not wrong, wrong
    assert documents.written(documents.INI) == documents.made()[documents.INI], "python3 tests/documents.py"


def test_the_shipped_ini_holds_every_key_with_its_default_and_no_other():
    told, known, wrong = told_keys(), set(), []
    for name in ("mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py", "execute_remote_command.py"):
        script = suite.module(name)
        for section, keys in script.INI_KEYS.items():
            for key, (kind, default, *meaning) in keys.items():
                known.add((section, key))
                value = told.get((section, key))
                same = kind(value) == default if value else default in ("", (), [], None, 0)
                if value is None or not (same or (section, key) in EXAMPLES or key.endswith(".*")):
                    wrong.append((name, section, key, value, default))
    assert not wrong and set(told) == known, (wrong, set(told) ^ known)
