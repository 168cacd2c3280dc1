"""A private HTCondor for tests: Debian trixie's own in a tree of its own, in a mount namespace that ends with it (root). The real thing.

The tree is made once (debootstrap, about two minutes, 600 MB): in MI_TEST_TRIXIE, else in /var/tmp/mi-test-trixie."""
import glob
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

import suite

USER = "user1"                 # the ordinary user of the tree who runs pollers
SCRIPTS = "/opt/mi"            # where the tree has the suite's scripts
CONF = """RELEASE_DIR = /usr
LOCAL_CONFIG_DIR = /usr/share/condor/config.d,/etc/condor/config.d,{dir}/config.d
LOCAL_DIR = {dir}/local
LOG = $(LOCAL_DIR)/log
RUN = $(LOCAL_DIR)/run
LOCK = $(LOCAL_DIR)/lock
SPOOL = $(LOCAL_DIR)/spool
EXECUTE = $(LOCAL_DIR)/execute
CRED_STORE_DIR = $(LOCAL_DIR)/cred
BIN = /usr/bin
SBIN = /usr/sbin
LIB = /usr/lib/condor
LIBEXEC = /usr/libexec/condor
SHARE = /usr/share/condor
ETC = /etc/condor
"""
# no namespaces within ours; one machine with room for many; and nothing waits longer than it must
LAB = """NETWORK_INTERFACE = 127.0.0.1
CONDOR_HOST = 127.0.0.1
COLLECTOR_HOST = 127.0.0.1:{port}
SHARED_PORT_PORT = {port}
ENABLE_IPV6 = False
NUM_CPUS = 8
MEMORY = 4000
NEGOTIATOR_INTERVAL = 2
NEGOTIATOR_CYCLE_DELAY = 1
NEGOTIATOR_MIN_INTERVAL = 1
SCHEDD_INTERVAL = 2
SCHEDD_MIN_INTERVAL = 1
PERIODIC_EXPR_INTERVAL = 2
UPDATE_INTERVAL = 5
STARTER_UPDATE_INTERVAL = 2
MASTER_UPDATE_INTERVAL = 5
MASTER_BACKOFF_CEILING = 5
DISCARD_SESSION_KEYRING_ON_STARTUP = False
MOUNT_PRIVATE_DEV_SHM = False
USE_PID_NAMESPACES = False
PER_JOB_NAMESPACES = False
MOUNT_UNDER_SCRATCH =
"""
INSIDE = """set -e
for one in proc dev sys; do mount --rbind /$one "$1/$one"; done
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
mkdir -p "$1/$2" "$1{scripts}"
mount --bind "$2" "$1/$2"
mount --bind "$3" "$1{scripts}"
exec chroot "$1" condor_master -f
""".format(scripts=SCRIPTS)


def tree():
    """The directory of the Debian tree, made if it is not there."""
    found = os.environ.get("MI_TEST_TRIXIE", "/var/tmp/mi-test-trixie")
    if not os.path.exists(found + "/usr/sbin/condor_master"):
        new = found + ".new"
        shutil.rmtree(new, ignore_errors=True)
        call(["debootstrap", "--variant=minbase", "trixie", new, mirror()], 900)
        for path in glob.glob("/etc/apt/apt.conf.d/*"):
            with open(path) as text:
                if "Acquire" in text.read():           # how to reach the mirror from here
                    shutil.copy(path, new + "/etc/apt/apt.conf.d/")
        install = "mount -t proc proc /proc; mount -t devpts devpts /dev/pts; " \
                  "printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; apt-get update -qq; " \
                  "apt-get install -y -qq --no-install-recommends minicondor python3-minimal libpython3-stdlib; useradd -m %s" % USER
        call(["unshare", "--mount", "--propagation", "private", "chroot", new, "sh", "-ec", install], 900,
             dict(os.environ, DEBIAN_FRONTEND="noninteractive"))
        os.rename(new, found)
    return found


def mirror():
    """The Debian mirror that this machine uses."""
    for path in ["/etc/apt/sources.list"] + sorted(glob.glob("/etc/apt/sources.list.d/*")):
        if os.path.exists(path):
            with open(path) as text:
                found = re.search(r"^(?:deb |URIs:).*?(https?://\S*/debian\b\S*)", text.read(), re.M)
            if found:
                return found.group(1)
    return "http://deb.debian.org/debian"


def call(words, seconds, env=None):
    """A program to its end, which must be a good one."""
    done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)
    assert done.returncode == 0, (words, done.stdout.decode("utf-8", "replace")[-2000:])


class Condor:
    """DIR, at the same place within the tree and outside, and the daemons; start() it, close() it."""

    def __init__(self):
        self.tree, self.master = tree(), None
        self.dir = tempfile.mkdtemp(prefix="mi-condor-")
        os.chmod(self.dir, 0o755)
        self.ids = {}
        with open(self.tree + "/etc/passwd") as text:
            for row in text:
                name, _x, uid, gid = row.split(":")[:4]
                self.ids[name] = int(uid), int(gid)
        for name in ("config.d", "local", "local/log", "local/spool", "local/execute", "local/lock", "local/run", "local/cred", "user"):
            os.mkdir(self.path(name))
            os.chown(self.path(name), *self.ids[USER if name == "user" else "condor" if "/" in name else "root"])
        os.chmod(self.path("local", "lock"), 0o1777)
        self.conf = self.path("condor_config")
        with open(self.conf, "w") as out:
            out.write(CONF.format(dir=self.dir))
        with open(self.path("config.d", "lab"), "w") as out:
            out.write(LAB.format(port=suite.a_port()))
        self.env = {"CONDOR_CONFIG": self.conf, "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C"}

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def start(self):
        """Returns when it takes jobs."""
        with open(self.path("master.out"), "ab") as out:
            self.master = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", INSIDE, "sh", self.tree, self.dir, suite.ROOT],
                                           stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.env)
        suite.wait_until(lambda: "slot" in self.call("condor_status", "-af", "Name") and self.call("condor_q", "-totals"), 120, "htcondor: a slot, and a queue")
        return self

    def inside(self, user=USER):
        """The words before a command line that runs in the tree as that user."""
        return ["nsenter", "--mount=/proc/%d/ns/mnt" % self.master.pid, "--root=" + "/proc/%d/root" % self.master.pid, "--wd=/proc/%d/root" % self.master.pid,
                "setpriv", "--reuid=%d" % self.ids[user][0], "--regid=%d" % self.ids[user][1], "--clear-groups"]

    def call(self, *words, user="root"):
        """stdout of one of its programs, '' while it does not answer."""
        done = subprocess.run(self.inside(user) + list(words), env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        return done.stdout.decode() if done.returncode == 0 else ""

    def number(self, mark):
        """The number of a job in the queue, '' if there is none of that MIRun."""
        return self.call("condor_q", "-allusers", "-constraint", 'MIRun == "%s"' % mark, "-af:j", "JobStatus").split(" ")[0]

    def pids(self, name=None):
        """The processes in our mount namespace; name: those of that program only."""
        space, found = os.stat("/proc/%d/ns/mnt" % self.master.pid).st_ino if self.master.poll() is None else self.space, []
        self.space = space
        for pid in (int(word) for word in os.listdir("/proc") if word.isdigit()):
            try:
                with open("/proc/%d/comm" % pid) as text:
                    if os.stat("/proc/%d/ns/mnt" % pid).st_ino == space and name in (None, text.read().strip()):
                        found.append(pid)
            except OSError:
                pass
        return found

    def signal(self, name, number):
        """To the daemon of that name."""
        pid, = self.pids(name)
        os.kill(pid, number)

    def close(self):
        """Ends everything, jobs included."""
        if self.master is not None:
            self.call("condor_rm", "-all")
            time.sleep(0.5)
            others = self.pids()
            for number in (signal.SIGQUIT, signal.SIGKILL):                # fast, then what is left
                if self.master.poll() is None:
                    self.master.send_signal(number)
                try:
                    self.master.wait(20)
                    break
                except subprocess.TimeoutExpired:
                    pass
            for pid in set(others) & set(self.pids()):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.dir, ignore_errors=True)
