"""`bundle`: what support needs to see, and none of the secrets that a host knows, in whatever form they stand there."""
import base64
import os
import random
import tarfile
from urllib.parse import quote

import pytest

import suite
from suite import SITE

RELAY, POLLER = "mi_dicomapi.py", "mi_system_remote.py"
FORMS = {"as it is": lambda secret: secret, "large letters": lambda secret: secret.upper(), "hex": lambda secret: secret.hex().encode(),
         "base64": base64.b64encode, "base64 behind one": lambda secret: base64.b64encode(b"u:" + secret),
         "base64 behind two": lambda secret: base64.b64encode(b"user:" + secret + b" more"), "URL's base64": lambda secret: base64.urlsafe_b64encode(b"x" + secret),
         "URL": lambda secret: quote(secret, "").encode(), "URL, all of it": lambda secret: b"".join(b"%%%02X" % byte for byte in secret),
         "in lines": lambda secret: secret[:20] + b"\n    " + secret[20:], "base64 in lines": lambda secret: base64.encodebytes(b"Authorization: " + secret)}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A relay with a log file, and the ini of a poller with one and a proxy with a password."""
    folder = tmp_path_factory.mktemp("world")
    world = suite.World(folder, commands=["hello"], ini="[Server]\nlogfile = %s\n" % (folder / "mi_dicomapi.py.out")).start()
    world.client().register("hello", "a-request")
    world.poller_log = os.path.join(world.folder, "poller.log")
    open(world.poller_log, "w").close()
    world.poller_ini = world.poller({"hello": "argv = /bin/true\nmatch = hello\nenv.LICENCE = very-private-server\n"}, start=False, ini=(
        "logfile = %s\nproxy = http://user:pass%%20word-of-proxy@127.0.0.1:1\n[outbound]\ndeny_content = project-blue\n" % world.poller_log))[1]
    yield world
    world.close()


def bundle(name, ini, folder):
    """(CompletedProcess, {name: text} of what was written)."""
    path = os.path.join(str(folder), "b.tar.gz")
    if os.path.exists(path):
        os.unlink(path)
    done = suite.run(name, "bundle", path, "--ini", ini)
    if not os.path.exists(path):
        return done, None
    assert os.stat(path).st_mode & 0o777 == 0o600
    with tarfile.open(path) as tar:
        return done, {entry.name: tar.extractfile(entry).read().decode() for entry in tar}


def test_it_holds_versions_check_ini_log_and_calculations_and_says_so_and_nothing_of_a_secret(one, tmp_path):
    done, found = bundle(RELAY, one.ini, tmp_path)
    assert done.returncode == 0, done
    assert set(found) == {"bundle/" + name for name in ("versions.txt", "check.json", "ini.txt", "log.txt", "sites.json", "calculations.json", "MANIFEST")}
    assert all(name.split("/")[1] in done.stdout for name in found if "MANIFEST" not in name) and "look at it" in done.stdout
    assert "sha256" in found["bundle/versions.txt"] and "1 add-calcinfo" in found["bundle/log.txt"] and SITE in found["bundle/calculations.json"]
    assert "remote_site_ids" in found["bundle/ini.txt"] and "[" in found["bundle/check.json"]
    done, found = bundle(POLLER, one.poller_ini, tmp_path)
    whole = "\n".join(found.values())
    assert done.returncode == 0 and "calc_base" in found["bundle/ini.txt"] and "proxy = (left out)" in found["bundle/ini.txt"], done
    assert not [secret for secret in (one.token, "word-of-proxy", "very-private-server", "project-blue") if secret in whole]
    assert suite.run(POLLER, "bundle", str(tmp_path / "b.tar.gz"), "--ini", one.poller_ini).returncode == 64


@pytest.mark.parametrize("form", ["as it is", "base64 behind two", "hex"])
def test_a_secret_in_the_log_keeps_it_from_being_written(one, form, tmp_path):
    with open(one.key) as text:
        line = text.read().splitlines()[1]
    for name, ini, log, what, secret in (
            (RELAY, one.ini, one.relay.log_path, "token", one.token), (POLLER, one.poller_ini, one.poller_log, "token", one.token),
            (RELAY, one.ini, one.relay.log_path, "keyfile", line), (POLLER, one.poller_ini, one.poller_log, "proxy", "pass word-of-proxy"))[:2 + 2 * (form == "hex")]:
        size = os.path.getsize(log)
        with open(log, "ab") as out:
            out.write(b"\nsomebody has said: " + FORMS[form](secret.encode()) + b" there\n")
        done, found = bundle(name, ini, tmp_path)
        os.truncate(log, size)
        assert done.returncode == 77 and found is None and "log.txt" in done.stderr and what in done.stderr and suite.one_line(done.stderr), (name, done)
        assert secret not in done.stderr + done.stdout


def test_a_token_of_which_the_relay_knows_the_sum_alone_is_found_in_every_form_but_large_letters():
    relay, token = suite.module(RELAY), os.urandom(32).hex().encode()
    for form in set(FORMS) - {"large letters"}:
        for before in (b"", b"0", b"ab", b"token="):
            assert token in set(relay.token_like(before + b" " + FORMS[form](token) + b" x")), form


def test_every_form_of_every_secret_is_found_wherever_it_begins():
    poller, chance = suite.module(POLLER), random.Random(3)
    for turn in range(300):
        secret = bytes(chance.randrange(33, 127) for length in range(chance.randrange(8, 70)))
        around = [bytes(chance.randrange(256) for length in range(chance.randrange(9))) for side in (0, 1)]
        form = chance.choice(sorted(FORMS))
        data = around[0] + (base64.b64encode(around[0] + secret + around[1]) if form.startswith("base64 b") else FORMS[form](secret)) + around[1]
        assert poller.secrets_in(data, {"it": [secret]}) == ["it"], (form, secret, data)
        assert poller.secrets_in(around[0] + around[1], {"it": [secret]}) == []
