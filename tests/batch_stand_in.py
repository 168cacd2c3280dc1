"""A stand-in for the programs of OpenPBS, Torque and HTCondor: answers as the real ones were seen to, runs jobs on this machine. (And Slurm's own,
which can be made to lie.) OpenPBS's texts are the recorded ones (openpbs.py).

stand_in.py DIR KIND PROGRAM [ARG]...: DIR holds N.json of each job, `held` (if it is there, nothing starts), `lie` (how queries lie), `refuse` (a
recorded title: how qsub answers), `kill_delay` (seconds between TERM and KILL that each qdel starts anew), `calls`, `connections` (to the server)."""
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import openpbs

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

    def add(self, script, mark, log, name=""):
        """A new job and the process that runs it; its number."""
        number = 1
        while True:
            try:
                os.close(os.open(self.path("number.%d" % number), os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                number += 1
        job = {"n": number, "mark": mark, "name": name, "state": "Q", "code": None, "pid": 0}
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
        while child.poll() is None:
            if self.due(job) and time.time() > self.due(job):
                os.killpg(child.pid, signal.SIGKILL)
            time.sleep(0.02)
        code = child.wait()
        if not os.path.exists(self.path("%d.requeued" % job["n"])):
            self.save(dict(job, state="F", code=code if code >= 0 else 256 - code))

    def due(self, job):
        """When (time.time()) the mom kills what qdel has told to end; 0 if there is no such thing."""
        try:
            with open(self.path("%d.killat" % job["n"])) as text:
                return float(text.read() or 0)
        except FileNotFoundError:
            return 0

    def qdel(self, job, force):
        """As the mom does it: TERM, after kill_delay KILL, and each qdel starts that anew; by force at once."""
        for name, text in (("%d.deleted" % job["n"], ""), ("%d.killat.new" % job["n"], repr(time.time() + (0 if force else self.delay())))):
            with open(self.path(name), "w") as out:
                out.write(text)
        os.rename(self.path("%d.killat.new" % job["n"]), self.path("%d.killat" % job["n"]))
        if job["pid"] and not force:
            os.killpg(job["pid"], signal.SIGTERM)
        if not job["pid"]:
            self.save(dict(job, state="F"))

    def delay(self):
        try:
            with open(self.path("kill_delay")) as text:
                return float(text.read())
        except FileNotFoundError:
            return 1

    def requeue(self, job):
        """The admin's qhold and qrerun."""
        with open(self.path("%d.requeued" % job["n"]), "w"):
            pass
        if job["pid"]:
            try:
                os.killpg(job["pid"], signal.SIGKILL)
            except ProcessLookupError:
                pass                                   # it ended just now
        self.save(dict(job, state="H", pid=0))

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


def say(title, old="", new=""):
    """The recorded answer of that title, with one word replaced; its exit code."""
    said = openpbs.dialogues()[title]
    sys.stdout.write(said.out.replace(old, new) if old else said.out)
    sys.stderr.write(said.err.replace(old, new) if old else said.err)
    return said.code


def qsub(system, words):
    options = dict(zip(words, words[1:]))              # of two -v the last one counts
    if system.kind == "openpbs":
        try:
            with open(system.path("refuse")) as text:
                return say(text.read())
        except FileNotFoundError:
            pass
        if any(ord(letter) > 126 for letter in options["-o"]):
            return say("-o with Japanese")
    script = words[-1]
    if script == options["-o"]:
        script = system.path("stdin.%d" % os.getpid())
        with open(script, "w") as out:
            out.write(sys.stdin.read())
    number = system.add(script, re.search("MI_RUN=([^,]*)", options["-v"]).group(1), options["-o"], options["-N"])
    with open(system.path("%d.v" % number), "w") as out:
        out.write(options["-v"])
    if system.kind == "openpbs" and not os.path.exists(system.path("background")) and os.fork() == 0:
        os.setsid()                                    # what the next qsub finds there; it keeps all that it has inherited
        with open(system.path("background"), "w") as out:
            out.write(str(os.getpid()))
        for fd in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        time.sleep(60)
        os._exit(0)
    return print("%d.pbshost" % number)


def qdel(system, words, job):
    if system.kind == "torque":
        return system.delete(job)
    if job is None:
        return say("qdel of unknown", "9999.pbshost", words[-1])
    if job["state"] == "F":
        return say("qdel finished", "1.pbshost", words[-1])
    return system.qdel(job, words[:2] == ["-W", "force"])


def pbs(system, program, words):
    if words == ["--version"]:
        return say("version") if system.kind == "openpbs" else print("Version: 6.1.3")
    if program == "qsub":
        return qsub(system, words)
    wanted = [word for word in words if re.match(r"\d", word)]
    found = {"%d.pbshost" % job["n"]: job for job in system.jobs()}
    with open(system.path("connections"), "a") as out:
        out.write("%s\n" % program * (1 if "-E" in words or not wanted else len(wanted)))
    if program == "qdel":
        return qdel(system, words, found.get(wanted[0]))
    if system.kind == "torque" and ("-E" in words or "-x" in words and program == "qselect"):
        sys.stderr.write("%s: invalid option\nusage: ...\n" % program)
        return 2
    if "-x" in words and system.kind == "torque":
        return print("<Data><Job><Job_Id>1.pbshost</Job_Id></Job></Data>")
    if program == "qselect":                           # -u USER: this user's, and no other's
        name = words[words.index("-N") + 1] if "-N" in words else None
        return print("".join("%s\n" % job for job in sorted(found) if ("-x" in words or found[job]["state"] != "F")
                             and name in (None, found[job]["name"])), end="")
    code = 0
    for name in wanted or sorted(found):
        job = found.get(name)
        if job is None:
            if "-E" not in words or not any(word in found for word in wanted):
                sys.stderr.write("qstat: Unknown Job Id %s%s\n" % ("Error " if system.kind == "torque" else "", name))
                code = 153
        elif job["state"] == "F" and system.kind == "openpbs" and "-x" not in words:
            if wanted and "-E" not in words:
                sys.stderr.write("qstat: %s Job has finished, use -x or -H to obtain historical job information\n" % name)
                code = 35
        else:
            (show_recorded if system.kind == "openpbs" else show)(system.kind, name, job)
    if not wanted and os.path.exists(system.path("strangers")):
        with open(system.path("strangers")) as text:   # other users' jobs, as qstat -f shows them
            print(text.read())
    return code


def show_recorded(kind, name, job):
    """One job as OpenPBS showed one like it."""
    killed = os.path.exists(os.path.join(sys.argv[1], "%d.deleted" % job["n"]))
    ended = "deleted while held, -x -f" if job["code"] is None else "deleted while running, -x -f" if killed else "finished, -x -f"
    said = openpbs.dialogues()[{"Q": "queued, cannot run", "R": "running", "S": "suspended", "F": ended,
                                "H": "held while running, then qrerun"}[job["state"]]].out.replace("\n\t", "")
    said = re.sub("^Job Id: .*", "Job Id: " + name, re.sub(r"MI_RUN=[0-9a-f-]+\.1", "MI_RUN=" + job["mark"], said), flags=re.M)
    said = re.sub("calc@", pwd.getpwuid(os.geteuid()).pw_name + "@", said).replace("exec_host = pbshost", "exec_host = node7")
    said = re.sub("Exit_status = 7", "Exit_status = %s" % job["code"], said) if not killed else said
    for row in said.splitlines():
        while len(row) > 79:
            print(row[:79])
            row = "\t" + row[79:]
        print(row)


def show(kind, name, job):
    """One job as qstat -f shows it, long lines broken as it breaks them."""
    killed = os.path.exists(os.path.join(sys.argv[1], "%d.deleted" % job["n"]))
    rows = ["Job_Name = " + job["name"], "Job_Owner = %s@host" % pwd.getpwuid(os.geteuid()).pw_name, "job_state = " + ("C" if kind == "torque" and job["state"] == "F" else job["state"])]
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


def named_by(constraint, job):
    """Does condor_history's constraint name the job?"""
    return 'MIRun == "%s"' % job["mark"] in constraint or "ClusterId == %d &&" % job["n"] in constraint


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
        if (job["state"] == "F") == (program == "condor_history") and (program == "condor_q" or named_by(words[-1], job)):
            entries.append(entry)
    if entries or program == "condor_history":
        print("[\n" + "\n,\n".join(json.dumps(entry, indent=2) for entry in entries) + "\n]")
    return 0


def main():
    folder, kind, program, words = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
    system = System(folder, kind)
    with open(system.path("calls"), "a") as out:
        out.write(" ".join([program] + words[:1] * (words[:1] == ["--version"])) + "\n")
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
