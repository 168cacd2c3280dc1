"""A private Slurm for tests: munged, slurmctld and slurmd on this machine, own keys, ports and directories, no cgroups. The real thing."""
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time

import suite

CONF = """ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={dir}/m/munge.sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,max_rpc_cnt=0
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=10
ReturnToService=2
MinJobAge={age}
MaxJobCount=20000
KillWait=2
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=40 RealMemory=400000 State=UNKNOWN
PartitionName=batch Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """DIR with a configuration; start() it, close() it. env: what its programs need. age: seconds that it remembers what ended."""

    def __init__(self, age=300):
        suite.needs("munged", "slurmctld", "slurmd", "sbatch")
        self.dir = tempfile.mkdtemp(prefix="mi-slurm-")
        os.chmod(self.dir, 0o755)
        self.age = age
        self.host, self.daemons = os.uname().nodename.split(".")[0], {}
        for name in ("m", "state", "spool", "bin"):
            os.mkdir(self.path(name), 0o755)
        with open(self.path("slurm.conf"), "w") as out:
            out.write(CONF.format(host=self.host, dir=self.dir, user=pwd.getpwuid(os.geteuid()).pw_name, age=age,
                                  port=suite.a_port(), node_port=suite.a_port()))
        with open(self.path("cgroup.conf"), "w") as out:
            out.write("CgroupPlugin=cgroup/v1\n")
        self.conf = self.path("slurm.conf")
        self.env = {"SLURM_CONF": self.conf, "PATH": os.environ["PATH"]}

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    @staticmethod
    def find(program):
        return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")

    def daemon(self, name, *words):
        """Starts one, in the foreground as our child."""
        with open(self.path(name + ".out"), "ab") as out:
            self.daemons[name] = subprocess.Popen(list(words), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.env)

    def start(self):
        """Returns when the node takes jobs."""
        self.munge()
        self.controller()
        self.daemon("slurmd", self.find("slurmd"), "-D", "-f", self.conf, "-N", self.host)
        suite.wait_until(lambda: self.call("sinfo", "-h", "-o", "%t").strip() == "idle", 60, "slurm: a node that is idle")
        return self

    def munge(self):
        key, user = self.path("m", "key"), []
        with open(key, "wb") as out:
            out.write(os.urandom(128))
        os.chmod(key, 0o400)
        if os.geteuid() == 0:                          # it does not like to be root
            entry = pwd.getpwnam("munge")
            user = ["setpriv", "--reuid=munge", "--regid=%d" % entry.pw_gid, "--clear-groups"]
            for path in (key, self.path("m")):
                os.chown(path, entry.pw_uid, entry.pw_gid)
        files = ["--%s=%s" % (what, self.path("m", name)) for what, name in (
            ("key-file", "key"), ("socket", "munge.sock"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
        self.daemon("munged", *(user + [self.find("munged"), "--foreground"] + files))
        suite.wait_until(lambda: os.path.exists(self.path("m", "munge.sock")), 30, "munged")

    def controller(self):
        """Starts slurmctld (again, with its state)."""
        self.daemon("slurmctld", self.find("slurmctld"), "-D", "-f", self.conf)

    def end(self, name):
        """Ends a daemon."""
        child = self.daemons.pop(name, None)
        if child is not None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def call(self, *words):
        """stdout of one of its programs, '' while it does not answer."""
        done = subprocess.run(list(words), env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        return done.stdout.decode() if done.returncode == 0 else ""

    def jobs(self):
        """{job name: state} of all that it knows."""
        rows = [row.split("|") for row in self.call("squeue", "-h", "-t", "all", "-o", "%j|%T|%i").splitlines()]
        return {row[0]: row[1] for row in rows}

    def number(self, name):
        """The job's number, as text."""
        return next(row.split("|")[0] for row in self.call("squeue", "-h", "-t", "all", "-o", "%i|%j").splitlines() if row.split("|")[1] == name)

    def count(self, program):
        """Puts a program of that name before the real one in PATH; each call of it is a line in the file that is returned: time, arguments."""
        path, ledger = self.path("bin", program), self.path(program + ".calls")
        with open(path, "w") as out:
            out.write('#!/bin/sh\necho "$(date +%%s.%%N) $*" >>%s\nexec %s "$@"\n' % (ledger, self.find(program)))
        os.chmod(path, 0o755)
        return ledger

    def close(self):
        """Ends everything, jobs included."""
        if "slurmctld" in self.daemons:
            self.call("scancel", "--user=%d" % os.geteuid())
            time.sleep(0.5)
        for name in ("slurmd", "slurmctld", "munged"):
            self.end(name)
        shutil.rmtree(self.dir, ignore_errors=True)
