"""A stand-in for the programs of OpenPBS, Torque and HTCondor: answers as the real ones were seen to, runs jobs on this machine. (And Slurm's own,
which can be made to lie.)

batch_stand_in.py DIR KIND PROGRAM [ARG]...: DIR holds N.json of each job, `held` (if it is there, nothing starts), `lie` (how queries lie), `calls`."""
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time

PROGRAMS = {"slurm": ("sbatch", "squeue", "sacct"), "openpbs": ("qsub", "qstat", "qselect", "qdel"), "torque": ("qsub", "qstat", "qselect", "qdel"),
            "htcondor": ("condor_submit", "condor_q", "condor_history", "condor_rm")}
LIES = {"exit 1": ("", "connection failed\n", 1), "empty": ("", "", 0), "invalid": ("", "qstat: Invalid job id specified\n", 1),
        "garbage": ("\x00\x07<html>Bad gateway\n", "", 0), "flood": ("123456789\n" * 10000000, "", 0), "hang": None}


def install(folder, kind):
    """Makes folder/bin with the programs of a kind."""
    os.makedirs(os.path.join(folder, "bin"))
    for name in PROGRAMS[kind]:
        path = os.path.join(folder, "bin", name)
        with open(path, "w") as out:
            out.write('#!/bin/sh\nexec %s -I -S %s %s %s %s "$@"\n' % (sys.executable, os.path.abspath(__file__), folder, kind, name))
        os.chmod(path, 0o755)
    return os.path.join(folder, "bin")


class System:
    """The jobs of a folder."""

    def __init__(self, folder, kind):
        self.folder, self.kind = folder, kind

    def path(self, name):
        return os.path.join(self.folder, str(name))

    def save(self, job):
        with open(self.path("%d.new" % job["n"]), "w") as out:
            json.dump(job, out)
        os.rename(self.path("%d.new" % job["n"]), self.path("%d.json" % job["n"]))

    def jobs(self):
        found = []
        for name in os.listdir(self.folder):
            if name.endswith(".json"):
                with open(self.path(name)) as text:
                    found.append(json.load(text))
        return sorted(found, key=lambda job: job["n"])

    def add(self, script, mark, log):
        """A new job and the process that runs it; its number."""
        number = 1
        while True:
            try:
                os.close(os.open(self.path("number.%d" % number), os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                number += 1
        job = {"n": number, "mark": mark, "state": "Q", "code": None, "pid": 0}
        self.save(job)
        if os.fork() == 0:
            os.setsid()
            for fd in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), fd)
            os.closerange(3, 50)
            self.run(job, script, log)
            os._exit(0)
        return number

    def run(self, job, script, log):
        while os.path.exists(self.path("held")):
            if os.path.exists(self.path("%d.deleted" % job["n"])):
                return self.save(dict(job, state="F"))
            time.sleep(0.05)
        with open(log, "wb") as out:
            child = subprocess.Popen(["/bin/sh", script], stdout=out, stderr=out, start_new_session=True)
        self.save(dict(job, state="R", pid=child.pid))
        code = child.wait()
        self.save(dict(job, state="F", code=code if code >= 0 else 256 - code))

    def delete(self, job):
        with open(self.path("%d.deleted" % job["n"]), "w"):
            pass
        for number in (signal.SIGTERM, signal.SIGKILL):
            if job["pid"]:
                try:
                    os.killpg(job["pid"], number)
                except OSError:
                    return
                time.sleep(1)


def pbs(system, program, words):
    if program == "qsub":
        options = dict(zip(words, words[1:]))
        number = system.add(words[-1], re.search("MI_RUN=(.*)", options["-v"]).group(1), options["-o"])
        return print("%d.pbshost" % number)
    wanted = [word for word in words if re.match(r"\d", word)]
    found = {"%d.pbshost" % job["n"]: job for job in system.jobs()}
    if program == "qdel":
        return system.delete(found[wanted[0]])
    if "-x" in words and system.kind == "torque":
        return print("<Data><Job><Job_Id>1.pbshost</Job_Id></Job></Data>")
    if program == "qselect":                           # -u USER: this user's, and no other's
        return print("".join("%s\n" % name for name in sorted(found) if found[name]["state"] != "F"), end="")
    code = 0
    for name in wanted or sorted(found):
        job = found.get(name)
        if job is None:
            sys.stderr.write("qstat: Unknown Job Id %s%s\n" % ("Error " if system.kind == "torque" else "", name))
            code = 153
        elif job["state"] == "F" and system.kind == "openpbs" and "-x" not in words:
            if wanted:
                sys.stderr.write("qstat: %s Job has finished, use -x or -H to obtain historical job information\n" % name)
                code = 35
        else:
            show(system.kind, name, job)
    if not wanted and os.path.exists(system.path("strangers")):
        with open(system.path("strangers")) as text:   # other users' jobs, as qstat -f shows them
            print(text.read())
    return code


def show(kind, name, job):
    """One job as qstat -f shows it, long lines broken as it breaks them."""
    killed = os.path.exists(os.path.join(sys.argv[1], "%d.deleted" % job["n"]))
    rows = ["Job_Name = mi_x", "Job_Owner = %s@host" % pwd.getpwuid(os.geteuid()).pw_name, "job_state = " + ("C" if kind == "torque" and job["state"] == "F" else job["state"])]
    if job["state"] == "R":
        rows.append("exec_host = node7/0")
    if job["state"] == "F" and job["code"] is not None:
        rows.append("%s = %d" % ("exit_status" if kind == "torque" else "Exit_status", 271 if killed else job["code"]))
    if job["state"] == "Q":
        rows.append("comment = Not Running: Insufficient amount of resource: ncpus")
    rows.append("Variable_List = PBS_O_HOME=/home/user,PBS_O_LANG=C,PBS_O_PATH=/usr/local/bin:/usr/bin:/bin,PBS_O_HOST=pbshost,MI_RUN=" + job["mark"])
    print("Job Id: " + name)
    for row in rows:
        row = "    " + row
        while len(row) > 79:
            print(row[:79])
            row = "\t" + row[79:]
        print(row)
    print()


def condor(system, program, words):
    if program == "condor_submit":
        with open(words[-1]) as text:
            told = dict(line.strip().split(" = ", 1) if " = " in line else line.strip().split("=", 1) for line in text if "=" in line)
        number = system.add(told["executable"], told["+MIRun"].strip('"'), os.path.join(told["initialdir"], told["output"]))
        return print("%d.0 - %d.0" % (number, number))
    jobs = {"%d.0" % job["n"]: job for job in system.jobs()}
    if program == "condor_rm":
        if words[0] not in jobs:
            sys.stderr.write("\nJob %s not found\n" % words[0])
            return 1
        print("Job %s marked for removal" % words[0])
        return system.delete(jobs[words[0]])
    entries = []
    for name, job in sorted(jobs.items()):
        killed = os.path.exists(system.path("%d.deleted" % job["n"]))
        entry = {"ClusterId": job["n"], "MIRun": job["mark"], "ProcId": 0, "JobStatus": {"Q": 1, "R": 2, "F": 3 if killed else 4}[job["state"]]}
        entry.update({"Q": {"LastRejMatchReason": "no match found "}, "R": {"RemoteHost": "slot1_1@node7"}, "F": {"LastRemoteHost": "slot1_1@node7"}}[job["state"]])
        if killed and job["state"] == "F":
            entry["RemoveReason"] = "via condor_rm (by user user1)"
        if (job["state"] == "F") == (program == "condor_history") and (program == "condor_q" or name in words):
            entries.append(entry)
    if entries or program == "condor_history":
        print("[\n" + "\n,\n".join(json.dumps(entry, indent=2) for entry in entries) + "\n]")
    return 0


def main():
    folder, kind, program, words = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
    system = System(folder, kind)
    with open(system.path("calls"), "a") as out:
        out.write(program + "\n")
    if os.path.exists(system.path("lie")) and program in ("squeue", "sacct", "qstat", "qselect", "condor_q", "condor_history"):
        with open(system.path("lie")) as text:
            lie = LIES[text.read()]
        if lie is None:
            time.sleep(60)
            return 0
        sys.stdout.write(lie[0])
        sys.stderr.write(lie[1])
        return lie[2]
    if kind == "slurm":
        os.environ["PATH"] = os.environ["PATH"].partition(":")[2]
        os.execvp(program, [program] + words)
    return (condor if kind == "htcondor" else pbs)(system, program, words) or 0


if __name__ == "__main__":
    sys.exit(main())
