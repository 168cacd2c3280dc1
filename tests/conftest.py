"""Fixtures: a running relay per test module (`world`), or one of the test's own (`make_world`)."""
import os
import signal
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import suite

signal.signal(signal.SIGINT, signal.default_int_handler)                     # a shell's background job hands down an ignored Ctrl+C
signal.signal(signal.SIGHUP, signal.SIG_DFL)         # so does nohup a SIGHUP
SLOW = ("test_torture.py", "test_batch.py", "test_ssh_runner.py", "test_ssh_guard.py", "test_poller.py", "test_fielded_clients.py")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the long runs (10 GiB, 10,000 sites, an hour of torture)")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that two at a time end together."""
    items.sort(key=lambda item: SLOW.index(item.fspath.basename) if item.fspath.basename in SLOW else len(SLOW))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A relay with TLS, sites u-test and u-other, commands hello, other words. What one test has claimed does not come back to another."""
    made = suite.World(tmp_path_factory.mktemp("world"), commands=["hello", "two words"], sites=("u-test", "u-other"),
                       ini="[times]\naccept_lease = 1h\nlease = 1h\n").start()
    yield made
    made.close()


@pytest.fixture
def make_world(tmp_path_factory):
    """A function that makes a World (keywords as its own), not started."""
    made = []

    def make(**keywords):
        made.append(suite.World(tmp_path_factory.mktemp("world"), **keywords))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function after which copies of scripts are started instead, {name: {what stands there once: what stands there in the copy}}."""
    def edit(scripts):
        for name, pairs in scripts.items():
            with open(suite.script(name), encoding="utf-8") as text:
                whole = text.read()
            for before, after in pairs.items():
                assert whole.count(before) == 1, before
                whole = whole.replace(before, after)
            (tmp_path / name).write_text(whole, encoding="utf-8")
        usual = suite.script
        monkeypatch.setattr(suite, "script", lambda name: str(tmp_path / name) if name in scripts else usual(name))

    return edit


@pytest.fixture
def disk_of(tmp_path):
    """A function that mounts a small file system of its own (as root, or with sudo)."""
    suite.needs("root")
    where, as_root = tmp_path / "disk", [] if os.geteuid() == 0 else ["sudo", "-n"]
    where.mkdir()

    def mount(size):
        subprocess.run(as_root + ["mount", "-t", "tmpfs", "-o", "mode=700,uid=%d,size=%s" % (os.geteuid(), size), "tmpfs", str(where)], check=True)
        return where

    yield mount
    subprocess.run(as_root + ["umount", "-l", str(where)], check=True)
