"""The far side of the SSH way as the other side sees it: sessions of its doors `guard` and `far`, by the protocol's own words."""
import itertools
import json
import os
import subprocess

import suite
from ssh_lab import SCRIPT
from suite import PYTHON

runner = suite.module("execute_remote_command.py")
IDENT = "0123abcd-0000-4000-8000-%012x"
INI = """[command work]
argv = /bin/sh
  %(dir)s/work.sh
  {parameters}
match = work.sh
argument.1 = [a-z]+
env.GIVEN = yes
[command plain]
match = true
argv = /bin/true
"""
WORK = """#!/bin/sh
echo "args $* given ${GIVEN:-} evil ${EVIL:-}"
case ${1:-} in
hard) ln %(dir)s/secret hardlink;;
soft) ln -s %(dir)s/secret softlink; ln -s %(dir)s out;;
slow) sleep 2;;
hold) sleep 300;;
deep) python3 -c 'import os
for n in range(1500): os.mkdir("d%%04d" %% n); os.chdir("d%%04d" %% n)';;
many) i=0; while [ $i -lt 1100 ]; do i=$((i + 1)); : >secret$i; done;;
leave) echo $$ >../pids; env -i setsid sh -c 'trap "" TERM; sleep 300 & echo $! $$ >>../pids'; sleep 300;;
esac
cp a b 2>/dev/null
echo SECRET-42 >secret.txt
echo result >r.txt
"""
START = ("2", "door", "~/elsewhere", "0" * 16)         # what a guard is asked for; of it only the first two words count


def rewrite_end(control, **words):
    """What the journal of a run says of its end, in other words; with none it has not ended. (No keeper looks at it: it has no entry in open/.)"""
    path = os.path.join(control, "journal")
    with open(path) as text:
        rows = [json.loads(row) for row in text]
    rows = [dict(row, **words) if row["what"] == "ended" else row for row in rows if words or row["what"] == "starting"]
    with open(path, "w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def request(*words):
    """The command line that is sent for a session with these words."""
    return "exec sh -c 'eval \"$(printf %b \"$1\")\"' mi_distcomp 'text' " + " ".join(runner.quoted_word(word) for word in words)


def files_of(told, data):
    """(what is told, bytes) of each file of an answer to `get` with names."""
    for row in told.get("bundle", ()):
        size = row[0] if isinstance(row, list) else 0
        yield dict(zip(("size", "mtime", "x", "sum"), row)) if isinstance(row, list) else {"verdict": row}, data[:size]
        data = data[size:]


class Session:
    """One session: ask() sends a request and returns its answers, [(what is told, bytes)]. first: the line with which it began."""

    def __init__(self, process, run=None, lane="", turn="t1"):
        self.process, self.first = process, b""
        for row in iter(process.stdout.readline, b""):
            if b"mi_distcomp " in row:
                self.first = row[row.index(b"mi_distcomp "):]
                break
        self.hello = self.ask("hello", v=2, run=run, lane=lane, turn=turn)[0][0] if self.first == b"mi_distcomp 2 door\n" else {}

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.close()

    def send(self, do, data=b"", **words):
        """A request without waiting for its answer. from_ is `from`."""
        words = {key.rstrip("_"): value for key, value in words.items()}
        try:
            self.process.stdin.write(json.dumps(dict(words, do=do)).encode() + b"\n" + data)
            self.process.stdin.flush()
        except OSError:
            pass                                       # it has ended: the answer that is not there tells

    def read(self):
        """(what is told, bytes) of the next answer; ({}, b"") if the session ended."""
        row = self.process.stdout.readline()
        told = json.loads(row.decode("ascii")) if row.endswith(b"\n") else {}
        return told, self.process.stdout.read(told["size"]) if told.get("size") else b""

    def ask(self, do, data=b"", **words):
        self.send(do, data, **words)
        answers = [self.read()]
        told = answers[0][0]
        if do == "wait":
            while answers[-1][0] and not {"no", "end"} & set(answers[-1][0]):
                answers.append(self.read())
        elif do == "get" and "no" not in told:
            if "names" not in words:
                return answers + [self.read() for _n in range(int("verdict" not in told))]
            files = list(files_of(*answers[0]))
            while 0 < len(files) < len(words["names"]):
                files += files_of(*self.read())
            return files or answers
        return answers

    def put(self, name, data, mode=0o644, mtime=10 ** 18):
        """One small input; what is told."""
        return self.ask("put", data, size=len(data), files=[[name, len(data), mode, mtime]])[0][0]

    def run(self, command="work.sh"):
        """Starts it and waits: (the last that is told, the log's bytes)."""
        told = self.ask("start", command=command)[0][0]
        if "no" in told:
            return told, b""
        rows = self.ask("wait", offset=0)
        return rows[-1][0], b"".join(data for _told, data in rows)

    def results(self, **how):
        """{name: [size, mtime, x, sum]} of files, [names] of empty directories, verdicts."""
        files, folders, told = {}, [], {"next": 0}
        while told.get("next") is not None:
            told = self.ask("results", from_=told["next"], **how)[0][0]
            files.update((row[0], row[1:]) for row in told.get("files", ()))
            folders += [row[0] for row in told.get("folders", ())]
        return files, folders, told.get("verdicts", told)

    def close(self):
        """Ends the session: (exit code, what it still said, stderr)."""
        try:
            out, err = self.process.communicate(timeout=30)
        except ValueError:
            out, err = b"", b""
        return self.process.returncode, out, err


class Far:
    """An external computer with a guard; open() is what its sshd would do with the key. mutation: [(text of the script, what stands there
    instead)]."""

    def __init__(self, folder, ini="", mutation=()):
        self.dir, self.numbers = str(folder), itertools.count(1)
        self.base = os.path.join(self.dir, "base")
        os.makedirs(self.base, exist_ok=True)
        text = open(SCRIPT, encoding="utf-8").read()
        for old, new in mutation:
            assert text.count(old) == 1, "%r stands %d times in the script" % (old, text.count(old))
            text = text.replace(old, new)
        self.script = os.path.join(self.dir, "guard.py")
        self.write("guard.py", text)
        self.write("work.sh", WORK % {"dir": self.dir})
        self.write("secret", "TOP-SECRET")
        self.write("ini", "[ssh guard]\nbase = %s\n" % self.base + ini.replace("[ssh guard]\n", "") + INI % {"dir": self.dir})
        os.chmod(self.path("ini"), 0o600)

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as out:
            out.write(text)

    def fresh(self):
        """A new calculation's ID."""
        return IDENT % next(self.numbers)

    def popen(self, command, before=(), more=(), **env):
        """The forced command, started for this SSH_ORIGINAL_COMMAND. before, more: words in front of its own, and behind them."""
        return subprocess.Popen(list(before) + [PYTHON, "-I", "-S", self.script, "guard", "--ini", self.path("ini")] + list(more), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, cwd=self.dir, env=dict({"PATH": os.environ["PATH"], "HOME": self.dir, "LANG": "C",
                                                                                "SSH_ORIGINAL_COMMAND": command}, **env))

    def raw(self, command, data=b"", **env):
        """(exit code, stdout, stderr) of the forced command."""
        process = self.popen(command, **env)
        out, err = process.communicate(data, timeout=30)
        return process.returncode, out, err

    def open(self, run=None, lane="", turn="t1", **env):
        """A Session."""
        return Session(self.popen(request(*START), **env), run, lane, turn)

    def ended(self, command="work.sh", data=b"input"):
        """The ID of a calculation that has ended."""
        ident = self.fresh()
        with self.open(ident) as one:
            assert "sums" in one.put("a", data)
            assert one.run(command)[0].get("end"), one.close()
        return ident

    def get(self, ident, name, listed=True):
        """The bytes of a small result, or None."""
        with self.open(ident) as one:
            if listed:
                one.results()
            told, data = one.ask("get", names=[name])[0]
            return data if "sum" in told else None
