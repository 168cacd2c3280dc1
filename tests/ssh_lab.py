"""A private sshd for tests and benches: own keys, own port, own configuration, the real thing. Nothing of the user's ~/.ssh is used."""
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import suite

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(os.path.dirname(HERE), "execute_remote_command.py")
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def in_memory():
    """Benches: temporary files in memory where there is room for them, so that lines are measured and not disks."""
    if "TMPDIR" not in os.environ and os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 12 << 30:
        os.environ["TMPDIR"] = tempfile.tempdir = "/dev/shm"


class Lab:
    """DIR with keys, sshd_config (SHLVL: bash leaves the tester's .bashrc alone; of several SetEnv the first counts), ssh config (hosts `hpc`, and `guarded` with the guard's key), near/ and far/ directories."""

    def __init__(self, address="127.0.0.1", prefix=(), client=(), more=""):
        suite.needs("sshd", "ssh", "rsync")
        self.dir = tempfile.mkdtemp(prefix="mi-lab-")
        self.address, self.prefix, self.client = address, list(prefix), list(client)
        self.port, self.daemon = free_port(), None
        self.path = lambda *parts: os.path.join(self.dir, *parts)
        for name in ("hostkey", "id", "gid"):
            subprocess.check_call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.path(name)])
        self.keys = [open(self.path("id.pub")).read()]
        self.write("sshd_config", """Port %d
ListenAddress %s
HostKey %s
PidFile %s
AuthorizedKeysFile %s
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
LogLevel VERBOSE
%s
SetEnv SHLVL=1
""" % (self.port, address, self.path("hostkey"), self.path("sshd.pid"), self.path("authorized_keys"), more))
        host = "Host %s\n  HostName " + address + "\n  Port %d\n  User %s\n  IdentityFile %s\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        host += "  UserKnownHostsFile " + self.path("known_hosts") + "\n  GlobalKnownHostsFile /dev/null\n"
        self.write("config", host % ("hpc", self.port, getpass.getuser(), self.path("id")) + host % ("guarded", self.port, getpass.getuser(), self.path("gid")))
        self.write("known_hosts", "[%s]:%d %s\n" % (address, self.port, " ".join(open(self.path("hostkey.pub")).read().split()[:2])))
        for name in ("near", "far", "state", "guard"):
            os.mkdir(self.path(name))
        self.write("ini", "[ssh]\nbase = %s\nssh_options = -F %s\nconnects = 0\nretry = 8,4\nalive = 6s\nconnect = 6s\n" % (self.path("far"), self.path("config")))
        self.authorize()

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as out:
            out.write(text)

    def authorize(self):
        self.write("authorized_keys", "".join(self.keys))
        os.chmod(self.path("authorized_keys"), 0o600)

    def forced(self, command):
        """Its key runs this, whatever is asked for (which is in $SSH_ORIGINAL_COMMAND); starts."""
        self.keys = ['command="%s" ' % command.replace('"', '\\"') + self.keys[0]]
        self.authorize()
        return self.start()

    def guard(self, ini, python=sys.executable, script=SCRIPT):
        """Puts the script and an ini onto the 'external computer', and its key line into authorized_keys."""
        shutil.copy(script, self.path("guard", "execute_remote_command.py"))
        self.write("guard/mi_distributed_computing_assist.ini", "[ssh guard]\nbase = %s\n%s" % (self.path("far"), ini))
        os.chmod(self.path("guard", "mi_distributed_computing_assist.ini"), 0o600)
        line = subprocess.check_output([python, self.path("guard", "execute_remote_command.py"), "guard", "--print-key-line", self.path("gid.pub")],
                                       cwd=self.dir).decode()
        self.keys = self.keys[:1] + [line]
        self.authorize()
        return line

    def start(self):
        """Starts sshd and waits until it listens."""
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        self.daemon = subprocess.Popen(self.prefix + [SSHD, "-D", "-f", self.path("sshd_config"), "-E", self.path("log")])
        for _n in range(500):
            try:
                if self.prefix:
                    time.sleep(0.3)
                else:
                    socket.create_connection((self.address, self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.01)
        raise RuntimeError("sshd does not listen")

    def sessions(self):
        """PIDs of the sshd processes that serve connections."""
        children, found = {}, []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    with open("/proc/%s/stat" % name) as text:
                        head, tail = text.read().rsplit(") ", 1)
                except OSError:
                    continue
                if head.endswith("(sshd") or "(sshd" in head:
                    children.setdefault(int(tail.split()[1]), []).append(int(name))
        todo = [self.daemon.pid]
        while todo:
            more = children.get(todo.pop(), [])
            found += more
            todo += more
        return found

    def cut(self):
        """Kills every connection, not the daemon."""
        for pid in self.sessions():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass

    def stop(self):
        """Ends the daemon and every connection."""
        if self.daemon is not None:
            self.cut()
            self.daemon.kill()
            self.daemon.wait()
            self.daemon = None

    def close(self):
        self.stop()
        shutil.rmtree(self.dir, ignore_errors=True)

    def env(self):
        """The runner's environment: as under cron."""
        return {"PATH": os.environ["PATH"], "LANG": "C", "HOME": self.path("near"), "XDG_STATE_HOME": self.path("state")}

    def words(self, *words, **how):
        """A command line of the runner."""
        return self.client + [how.get("python", sys.executable), SCRIPT, "--ini", self.path("ini")] + list(words)


class Routed:
    """A lab whose sshd stands behind a router: three network namespaces (root), in which packets can be dropped without a word."""

    def __init__(self):
        suite.needs("root", "ip")
        if os.geteuid() != 0:
            suite.pytest.skip("needs root itself: network namespaces")
        self.near, self.router, self.far = self.names = ["mi%s%d" % (letter, os.getpid()) for letter in "nrf"]
        for name in self.names:
            subprocess.check_call(["ip", "netns", "add", name])
        for side, number in ((self.near, 1), (self.far, 2)):
            self.ip("link", "add", "r%d" % number, "netns", self.router, "type", "veth", "peer", "name", "e", "netns", side)
            self.ip("-n", self.router, "addr", "add", "10.98.%d.1/24" % number, "dev", "r%d" % number)
            self.ip("-n", self.router, "link", "set", "r%d" % number, "up")
            self.ip("-n", side, "addr", "add", "10.98.%d.2/24" % number, "dev", "e")
            self.ip("-n", side, "link", "set", "e", "up")
            self.ip("-n", side, "route", "add", "default", "via", "10.98.%d.1" % number)
        self.drop(False)
        inside = [["ip", "netns", "exec", name] for name in (self.near, self.far)]
        self.lab = Lab("10.98.2.2", prefix=inside[1], client=inside[0]).start()

    def ip(self, *words):
        subprocess.check_call(["ip"] + list(words))

    def drop(self, silent):
        """Drops every packet, or forwards them again."""
        subprocess.check_call(["ip", "netns", "exec", self.router, "sh", "-c", "echo %d >/proc/sys/net/ipv4/ip_forward" % (not silent)])

    def close(self):
        self.lab.close()
        for name in self.names:
            subprocess.call(["ip", "netns", "del", name])
