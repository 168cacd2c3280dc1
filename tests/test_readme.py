"""The README's commands, as they stand."""
import os
import re
import shutil
import subprocess

import suite

with open(os.path.join(suite.ROOT, "README.md"), encoding="utf-8") as text:
    README = text.read()


def test_the_first_success_is_within_the_first_twenty_lines():
    assert "python3 mi_dicomapi.py demo" in README.splitlines()[:20]


def test_the_demo_command_works_as_it_stands(tmp_path):
    for name in ("mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py"):
        shutil.copy(suite.script(name), str(tmp_path))
    done = subprocess.run(["sh", "-c", "python3 mi_dicomapi.py demo"], cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 0, done.stdout.decode()


def test_the_test_command_installs_and_starts_pytest():
    assert "sh tests/run.sh" in README.splitlines()
    done = subprocess.run(["sh", "tests/run.sh", "--collect-only", "tests/test_readme.py"], cwd=suite.ROOT, env=dict(os.environ, MI_TEST_BENCH="no"),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout.decode()


def test_the_three_parts_set_up_as_the_readme_says_work_together(tmp_path):
    relay_ini, poller_ini = re.findall(r"```ini\n(.*?)```", README, re.S)[:2]
    line = re.search(r"^python3 (mi_system_wf\.py run .*?)\n```", README, re.S | re.M).group(1).replace("\\\n", " ")
    folder = str(tmp_path)
    cert, key = suite.make_certificate(folder)
    relay_ini = (relay_ini.replace("/etc/mi_distcomp/cert.pem", cert).replace("/etc/mi_distcomp/key.pem", key).replace("0.0.0.0", "127.0.0.1\nportnumber = 0")
                 .replace("/var/lib/mi_distcomp", os.path.join(folder, "state")))
    command = os.path.join(folder, "fatigue_life.py")
    with open(command, "w") as out:
        out.write("#!/bin/sh\ncat steel.json loads.csv >life.json\n")
    os.chmod(command, 0o755)
    with open(os.path.join(folder, "relay.ini"), "w") as out:
        out.write(relay_ini)
    tokens = [suite.run("mi_dicomapi.py", *words.split(), "--ini", os.path.join(folder, "relay.ini")).stdout
              for words in re.findall(r"^python3 mi_dicomapi\.py (token issue [^>#\n]*)", README, re.M)]
    assert len(tokens) == 2
    for name, token in zip(("wf.token", "remote.token"), tokens):
        with open(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
            out.write(token)
    relay = suite.Process("mi_dicomapi.py", ["serve", "--ini", os.path.join(folder, "relay.ini")], folder)
    poller = None
    try:
        url = suite.wait_until(lambda: re.search(r"listening url=(\S+)", relay.text())).group(1)
        poller_ini = (poller_ini.replace("https://relay.example.org:50443", url).replace("/home/calc/.mi_token", os.path.join(folder, "remote.token"))
                      .replace("/opt/fatigue/fatigue_life.py", command))
        with open(os.path.join(folder, "poller.ini"), "w") as out:
            out.write(poller_ini)
        env = suite.clean_env(SSL_CERT_FILE=cert, HOME=folder)
        poller = suite.Process("mi_system_remote.py", ["poll", "--ini", os.path.join(folder, "poller.ini")], folder, env=env)
        for name in ("steel.json", "loads.csv"):
            with open(os.path.join(folder, name), "w") as out:
                out.write(name)
        done = suite.run(*line.replace("https://relay.example.org:50443", url).split(), cwd=folder, env=env)
        assert done.returncode == 0, done.stdout + done.stderr + poller.text()
        with open(os.path.join(folder, "life.json")) as text:
            assert text.read() == "steel.jsonloads.csv"
    finally:
        relay.stop()
        if poller is not None:
            poller.stop()


def test_every_test_that_the_readme_names_is_there():
    named, texts = set(re.findall(r"`(?:tests/)?((?:bench/)?\w*(?:test|fuzz|bench)\w*(?:\.py)?)`", README)) - {"tests"}, ""
    for folder, folders, files in os.walk(os.path.join(suite.ROOT, "tests")):
        texts += " ".join(files)
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8") as text:
                    texts += text.read()
    missing = [name for name in named if ("def " + name + "(" if not name.endswith(".py") else os.path.basename(name)) not in texts]
    assert len(named) > 10 and not missing, missing
