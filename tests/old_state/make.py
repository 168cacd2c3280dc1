"""Makes the state that the scripts of an older commit leave behind: make.py DIRECTORY-WITH-THE-OLD-SCRIPTS

Beside this file: relay.json (its database as SQL and its spool: one calculation waits, one is being delivered, one may be fetched),
poller.json (a base with a calculation that has ended and is not delivered) and runner.json (a record, and what is on the far side, of a
calculation that has ended and was not fetched). Files as texts, {path: text}; @LAB@, @HERE@ and @URL@ stand for what a test makes.
"""
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import ssh_lab
import suite


def texts(folder, skip=(), **places):
    """{path below the folder: its text} of all regular files; places: {MARK: a path that it stands for}."""
    found = {}
    for above, folders, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(above, name)
            if name not in skip and os.path.isfile(path) and not os.path.islink(path):
                with open(path, encoding="utf-8") as source:
                    text = source.read()
                for mark, place in places.items():
                    text = text.replace(place, "@%s@" % mark)
                found[os.path.relpath(path, folder)] = text
    return found


def save(name, found):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as out:
        json.dump(found, out, indent=0, sort_keys=True, ensure_ascii=False)


def relay_and_poller(folder):
    """The relay's state_dir and a poller's calc_base."""
    world = suite.World(folder, tls=False, commands=["hello"]).start()
    client = world.client()
    ready = client.register("hello", "to fetch", {"in.txt": b"input\n"}, ["out.txt"])
    client.walk(*client.claim(), upto="end-send", results={"out.txt": b"result\n"})
    world.poller({"hello": "argv =\n    /bin/sh\n    -c\n    cat in.txt >out.txt\nmatch = hello"}, env=suite.clean_env(MI_FAULT="manifest sent"))
    half = client.register("hello", "half", {"in.txt": b"input\n"}, ["out.txt"])
    world.pollers[0].popen.wait(60)
    waits = client.register("hello", "waits", {"in.txt": b"input\n"}, ["out.txt"])
    world.relay.stop()
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    version = db.execute("PRAGMA user_version").fetchone()[0]
    sql = "\n".join(db.iterdump()) + "\nPRAGMA user_version = %d;\n" % version
    db.close()
    save("relay.json", {"ids": {"to fetch": ready, "half": half, "waits": waits}, "token": world.token, "sql": sql,
                        "files": texts(world.state, ("state.sqlite3", "state.sqlite3-wal", "state.sqlite3-shm", "lock", "audit.log", "ballast"))})
    save("poller.json", {"id": half, "files": texts(os.path.join(folder, "poller", "base"), ("lock",), URL=world.url)})


def runner(old, folder):
    """The SSH runner's record, and the far side's directory."""
    lab = ssh_lab.Lab().start()
    try:
        os.makedirs(folder)
        shutil.copy(lab.path("ini"), os.path.join(folder, "mi_distributed_computing_assist.ini"))
        hook = ("import importlib.util, os, sys; spec = importlib.util.spec_from_file_location('runner', %r); runner = importlib.util.module_from_spec(spec); "
                "spec.loader.exec_module(runner); runner.point = lambda name: name == 'ended' and os.kill(os.getpid(), 9); runner.run_as_program(runner.main)"
                % os.path.join(old, "execute_remote_command.py"))
        done = subprocess.run([sys.executable, "-c", hook, "run", "hpc", "echo old >res"], cwd=folder, env=lab.env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == -signal.SIGKILL, done.stdout.decode()
        places = {"HERE": folder, "LAB": lab.dir}
        state = lab.env()["XDG_STATE_HOME"]
        save("runner.json", {"record": texts(state, **places), "far": texts(lab.path("far"), **places)})
    finally:
        lab.close()


if __name__ == "__main__":
    suite.ROOT = os.path.abspath(sys.argv[1])
    with tempfile.TemporaryDirectory() as made:
        relay_and_poller(os.path.join(made, "world"))
        runner(suite.ROOT, os.path.join(made, "here"))
