"""What the scripts of an older commit left behind (old_state/, made by old_state/make.py) is gone on with, or refused with a line."""
import fcntl
import json
import os
import re
import shutil
import sqlite3
import subprocess
import time

import pytest

import ssh_lab
import suite

OLD = os.path.join(suite.HERE, "old_state")


def read(name):
    with open(os.path.join(OLD, name), encoding="utf-8") as text:
        return json.load(text)


def put(files, folder, **places):
    """The texts {path: text} below the folder, with MARKs replaced by their places."""
    for name, text in sorted(files.items()):
        path = os.path.join(str(folder), name)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        for mark, place in places.items():
            text = text.replace("@%s@" % mark, str(place))
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as out:
            out.write(text)
    for above, folders, names in os.walk(str(folder)):
        os.chmod(above, 0o700)


def dump(path):
    """All of a database, as SQL."""
    db = sqlite3.connect(path)
    try:
        return list(db.iterdump())
    finally:
        db.close()


@pytest.fixture
def old(make_world):
    """A world, not started, whose relay finds the old state; its `old` holds ids and token."""
    world = make_world(tls=False, commands=["hello"])
    shutil.rmtree(world.state)
    world.old = read("relay.json")
    put(world.old["files"], world.state)
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    db.executescript(world.old["sql"])
    times = "registered touched allowed claimed started ended got finished".split()           # as if it were left just now
    db.execute("UPDATE calculations SET %s" % ", ".join("%s = CASE WHEN %s THEN ? END" % (name, name) for name in times), [time.time()] * len(times))
    db.execute("UPDATE tokens SET expires = ?", (time.time() + 1e6,))
    db.commit()
    db.close()
    world.token = world.old["token"]
    return world


def copies(world):
    return sorted(name for name in os.listdir(world.state) if name.startswith("state.sqlite3.schema"))


def test_an_old_database_is_kept_beside_the_upgraded_one_and_what_it_holds_goes_on(old, tmp_path):
    before = dump(os.path.join(old.state, "state.sqlite3"))
    old.start()
    assert copies(old) == ["state.sqlite3.schema2"] and dump(os.path.join(old.state, "state.sqlite3.schema2")) == before
    assert os.stat(os.path.join(old.state, "state.sqlite3.schema2")).st_mode & 0o077 == 0
    ids = old.old["ids"]
    done = old.workflow("result", ids["to fetch"], "--out", "out.txt", cwd=str(tmp_path))
    assert done.returncode == 0 and (tmp_path / "out.txt").read_text() == "result\n", done.stderr
    again = old.client().ok("POST", "add-calcinfo", {"v": 2, "request_id": "waits", "allow": False, "calc-info": {
        "command": "hello", "remote-site": suite.SITE, "parameters": "", "result_files": {"out.txt": {}}, "parameter_files": {"in.txt": suite.entry(b"input\n")}}})
    assert again["accept_id"] == ids["waits"] and again["known"]       # the same words as before the upgrade are the same calculation
    base = os.path.join(old.folder, "poller", "base")
    put(read("poller.json")["files"], base, URL=old.url)
    old.poller({"hello": "argv =\n    /bin/sh\n    -c\n    cat in.txt >out.txt\nmatch = hello"})
    for name in ("half", "waits"):                     # that base's own calculation is delivered, and what waited is run
        done = old.workflow("wait", ids[name], "--out", "out.txt", "--to", name, cwd=str(tmp_path))
        assert done.returncode == 0 and (tmp_path / name / "out.txt").read_text() == "input\n", (name, done.stderr)


def test_a_relay_killed_in_the_midst_of_the_upgrade_upgrades_at_its_next_start(old):
    before = dump(os.path.join(old.state, "state.sqlite3"))
    old.write_ini(suite.a_port())
    dying = suite.Process("mi_dicomapi.py", ["serve", "--ini", old.ini], old.folder, env=suite.clean_env(MI_FAULT="old state kept"))
    assert dying.popen.wait(30) == -9
    old.start()
    kept = copies(old)
    assert len(kept) == 2 and all(dump(os.path.join(old.state, name)) == before for name in kept)
    assert old.rows("PRAGMA user_version")[0]["user_version"] == suite.module("mi_dicomapi.py").SCHEMA_VERSION


def test_check_tells_of_the_upgrade_and_nobody_upgrades_under_a_running_relay(old):
    old.write_ini(suite.a_port())
    done = suite.run("mi_dicomapi.py", "check", "--upgrade", "--ini", old.ini)
    assert done.returncode == 0 and re.match(r"WARN .*schema 2; the next start copies it to state.sqlite3.schema2 .* 2 unfinished", done.stdout), done
    with open(os.path.join(old.state, "lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = suite.run("mi_dicomapi.py", "list", "--ini", old.ini)
    assert done.returncode == 75 and suite.one_line(done.stderr) and "older version" in done.stderr and copies(old) == [], done
    assert suite.run("mi_dicomapi.py", "list", "--ini", old.ini).returncode == 0 and copies(old) == ["state.sqlite3.schema2"]
    done = suite.run("mi_dicomapi.py", "check", "--upgrade", "--ini", old.ini)
    assert done.returncode == 0 and done.stdout.startswith("OK ")


def test_a_record_of_an_old_runner_is_resumed(tmp_path):
    lab, found = ssh_lab.Lab().start(), read("runner.json")
    try:
        put(found["record"], lab.path("state"), LAB=lab.dir, HERE=tmp_path)
        put(found["far"], lab.path("far"), LAB=lab.dir, HERE=tmp_path)
        shutil.copy(lab.path("ini"), str(tmp_path / "mi_distributed_computing_assist.ini"))
        ident = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", " ".join(found["record"])).group()
        done = subprocess.run(lab.words("resume", ident), cwd=str(tmp_path), env=lab.env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        assert done.returncode == 0 and (tmp_path / "res").read_text() == "old\n", done.stdout.decode()
    finally:
        lab.close()


def test_check_tells_what_a_poller_goes_on_with_and_what_a_newer_one_has_left_is_left_alone(tmp_path):
    base, found = tmp_path / "base", read("poller.json")
    put(found["files"], base, URL="https://localhost:1")
    ini = tmp_path / "ini"
    ini.write_text("[poller]\nsite = s\nurl = https://localhost:1\ncalc_base = %s\n[command hello]\nargv = /bin/true\n" % base)
    ini.chmod(0o600)
    done = suite.run("mi_system_remote.py", "check", "--upgrade", "--ini", ini)
    assert done.returncode == 0 and re.match(r"OK +%s: 1 unfinished calculations of an older version go on\n\Z" % base, done.stdout), done
    assert "1 unfinished calculations of an older version" in suite.run("mi_system_remote.py", "check", "--ini", ini).stdout
    order = base / ".mi" / found["id"] / "order.json"
    order.write_text(json.dumps(dict(json.loads(order.read_text()), v=99)))
    done = suite.run("mi_system_remote.py", "check", "--upgrade", "--ini", ini)
    assert done.returncode == 0 and re.match(r"WARN +%s: left alone \(was written by a newer version of this program\)" % found["id"], done.stdout), done
    done = suite.run("mi_system_remote.py", "list", "--ini", ini)
    assert found["id"] not in done.stdout and "newer version" in done.stderr and order.exists(), done


def test_check_tells_what_a_runner_and_a_guard_go_on_with(tmp_path):
    found, state, far = read("runner.json"), tmp_path / "state", tmp_path / "far"
    put(found["record"], state, LAB="/lab", HERE=tmp_path)
    put(found["far"], far, LAB="/lab", HERE=tmp_path)
    env, script = suite.clean_env(XDG_STATE_HOME=str(state)), suite.script("execute_remote_command.py")
    assert re.match(r"OK +%s/mi_distcomp_ssh: 1 unfinished calculations of an older version go on \(resume\)" % state,
                    suite.run("execute_remote_command.py", "check", "--upgrade", env=env).stdout)
    record = next((state / "mi_distcomp_ssh").iterdir()) / "order.json"
    record.write_text(json.dumps(dict(json.loads(record.read_text()), v=99)))
    (tmp_path / "guard").mkdir()
    shutil.copy(script, str(tmp_path / "guard"))
    ini = tmp_path / "guard" / "mi_distributed_computing_assist.ini"
    ini.write_text("[ssh guard]\nbase = %s\n[command hello]\nargv = /bin/true\n" % far)
    ini.chmod(0o600)
    done = subprocess.run([suite.PYTHON, "-I", "-S", str(tmp_path / "guard" / "execute_remote_command.py"), "check", "--upgrade"], env=env, cwd=str(tmp_path),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    rows = done.stdout.decode().splitlines()
    assert re.match(r"WARN .*: was written by a newer version of this program\Z", rows[0]), done
    assert re.match(r"OK +%s: 1 calculations of an older version go on; only a runner of this version" % far, rows[1]), done
    done = suite.run("execute_remote_command.py", "resume", record.parent.name, env=env)
    assert done.returncode == 78 and suite.one_line(done.stderr) and "newer version" in done.stderr, done
