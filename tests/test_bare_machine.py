"""The README's two commands on a fresh machine: a bare Debian tree that has python3 and nothing else, as root and as an ordinary user.

Installing is tried always; all tests in such a tree with --long (half an hour)."""
import os
import re
import shutil
import subprocess

import pytest
import suite

ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C", "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
OUTSIDE = ("/etc/resolv.conf", "/etc/hosts")             # how this machine reaches its registries
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
CHEAP = "tests/test_readme.py::test_the_first_success_is_within_the_first_twenty_lines_and_so_is_the_way_to_the_japanese_part"


class Tree:
    """A bare Debian below DIR, with a checkout of ours in /src (root's) and in /home/user/src (an ordinary user's, without sudo)."""

    def __init__(self, folder):
        self.dir = folder
        with open("/etc/os-release") as text:
            suite_name = re.search(r"^VERSION_CODENAME=(\w+)", text.read(), re.M).group(1)
        subprocess.run(["debootstrap", "--variant=minbase", "--include=python3", suite_name, folder], check=True, stdout=subprocess.DEVNULL, timeout=600)
        os.chmod(folder, 0o755)
        for path in filter(os.path.exists, OUTSIDE):
            os.makedirs(os.path.dirname(folder + path), exist_ok=True)
            shutil.copy(path, folder + path)
        if os.path.exists(BUNDLE):
            shutil.copy(BUNDLE, folder + "/etc/outside.crt")     # not in BUNDLE's place: the package ca-certificates writes there
        self.env = dict(ENV, **{name: value for name, value in os.environ.items() if name.startswith("PIP_") and name != "PIP_FIND_LINKS"})
        self.env["PIP_CERT"] = "/etc/outside.crt"
        self.mounts = []
        for kind, where in (("proc", "/proc"), ("devtmpfs", "/dev"), ("devpts", "/dev/pts"), ("tmpfs", "/dev/shm")):
            os.makedirs(folder + where, exist_ok=True)
            subprocess.run(["mount", "-t", kind, kind, folder + where], check=True)
            self.mounts.append(folder + where)
        for place in ("/src", "/home/user/src"):
            os.makedirs(folder + place)
            names = subprocess.run(["git", "ls-files", "-z"], cwd=suite.ROOT, stdout=subprocess.PIPE, check=True).stdout.decode().strip("\0")
            subprocess.run(["tar", "-cf", folder + "/src.tar", "--null", "-T", "-"], cwd=suite.ROOT, input=names.encode(), check=True)
            subprocess.run(["tar", "-xf", folder + "/src.tar", "-C", folder + place], check=True)
        self.run("useradd --no-create-home --home-dir /home/user user && chown -R user /home/user")

    def run(self, command, user="root", place="/", timeout=300):
        """A shell command in there: its CompletedProcess, stdout and stderr together as text."""
        words = ["chroot", self.dir] + ([] if user == "root" else ["setpriv", "--reuid=" + user, "--regid=" + user, "--clear-groups"])
        done = subprocess.run(words + ["sh", "-c", "cd %s && %s" % (place, command)], env=dict(self.env, HOME="/root" if user == "root" else "/home/user"),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
        done.stdout = done.stdout.decode("utf-8", "replace")
        return done

    def close(self):
        for where in reversed(self.mounts):
            subprocess.run(["umount", "-l", where])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    suite.needs("root", "debootstrap", "git")
    if os.geteuid() != 0:
        pytest.skip("needs root itself: chroot")
    made = Tree(str(tmp_path_factory.mktemp("bare")))
    try:
        yield made
    finally:
        made.close()


def test_on_a_bare_machine_the_demo_works_and_the_test_command_installs_what_is_missing_and_says_what(tree):
    # in this order: what root installs, the ordinary user finds
    done = tree.run("sh tests/run.sh " + CHEAP, user="user", place="/home/user/src")
    assert done.returncode == 69 and "apt-get install" in done.stdout and "python3-venv" in done.stdout, done.stdout
    done = tree.run("python3 mi_dicomapi.py demo", user="user", place="/home/user/src")
    assert done.returncode == 0 and "no openssl here" in done.stdout and "life_in_spectra" in done.stdout, done.stdout
    done = tree.run("sh tests/run.sh " + CHEAP, place="/src", timeout=540)
    assert done.returncode == 0 and "1 passed" in done.stdout and "apt-get installs" in done.stdout and "pip installs" in done.stdout, done.stdout
    assert "slurm" not in done.stdout and not os.path.exists(tree.dir + "/usr/sbin/slurmd"), "installed for a test that does not need it"
    for user, place in (("root", "/src"), ("user", "/home/user/src")):
        done = tree.run("python3 mi_dicomapi.py demo", user=user, place=place)
        assert done.returncode == 0 and "no openssl here" not in done.stdout and "life_in_spectra" in done.stdout, done.stdout
    done = tree.run("sh tests/run.sh " + CHEAP, user="user", place="/home/user/src", timeout=540)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_on_a_bare_machine_all_tests_pass_and_what_needs_root_says_so(tree, request):
    if not request.config.getoption("--long"):
        pytest.skip("--long")
    done = tree.run("MI_TEST_BENCH=no sh tests/run.sh", place="/src", timeout=3600)
    assert done.returncode == 0, done.stdout[-6000:]
    assert set(re.findall(r"^SKIPPED \[\d+\] [^:]*:\d+: (.*)", done.stdout, re.M)) <= {"--long", "with --long"}, done.stdout[-6000:]
    done = tree.run("MI_TEST_BENCH=no sh tests/run.sh", user="user", place="/home/user/src", timeout=3600)
    assert done.returncode == 0, done.stdout[-6000:]
    reasons = set(re.findall(r"^SKIPPED \[\d+\] [^:]*:\d+: (.*)", done.stdout, re.M)) - {"--long", "with --long"}
    assert reasons and all("root" in reason for reason in reasons), reasons
