"""The poller as a process: against the real relay, and against a hostile one."""
import hashlib
import http.server
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

import process_families
import suite
from suite import PYTHON, wait_until as until

MAIN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(MAIN, "mi_system_remote.py")
sys.path.insert(0, MAIN)
import mi_system_remote as remote          # noqa: E402

OUT, ERR = remote.LOG_NAMES
ENV = suite.clean_env()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class OurWorld(suite.World):
    """A relay on loopback http, with many sites: each test has one of its own."""

    def __init__(self, folder, **keywords):
        names = ["s%d" % number for number in range(200)]
        suite.World.__init__(self, folder, tls=False, commands=["solve", "other"], sites=names, **keywords)
        self.free, self.workflow_token = iter(names), self.token
        self.start()

    def client(self, token=None):
        return remote.RelayClient(self.url, lambda: self.workflow_token)


@pytest.fixture(scope="session")
def relay(tmp_path_factory):
    made = OurWorld(tmp_path_factory.mktemp("relay"))
    yield made
    made.close()


class Host:
    """An external computer: an ini, a token file, a command that writes a ledger, a poller."""

    def __init__(self, folder, url, site, token):
        self.folder, self.url, self.site, self.started = folder, url, site, []
        self.base, self.ledger, self.ini = folder / "base", folder / "ledger", folder / "host.ini"
        self.token, self.program = folder / "token", [PYTHON, SCRIPT]
        self.token.write_text(token + "\n")
        self.token.chmod(0o600)
        self.script("solve", "echo result > out.txt")
        self.poller = {"site": site, "url": url, "token_file": str(self.token), "calc_base": str(self.base)}
        self.sections = {"command solve": {"argv": str(folder / "solve"), "match": "solve"}}

    def script(self, name, body):
        path = self.folder / name
        path.write_text('#!/bin/sh\necho "$MI_RUN" >> %s\n%s\n' % (self.ledger, body))
        path.chmod(0o755)
        return str(path)

    def write_ini(self):
        text = ""
        for name, keys in [("poller", self.poller)] + list(self.sections.items()):
            text += "[%s]\n%s\n" % (name, "".join("%s = %s\n" % (key, str(value).replace("\n", "\n  ")) for key, value in keys.items()))
        new = self.folder / "host.ini.new"             # a poller that starts just now reads one or the other
        new.write_text(text, encoding="utf-8")
        new.chmod(self.ini.stat().st_mode & 0o777 if self.ini.exists() else 0o644)
        new.replace(self.ini)

    def start(self, *words, env=None, out=None):
        self.write_ini()
        self.log = self.folder / "log"
        program = suite.started_as(self.program, env)
        process = subprocess.Popen(program + list(words or ["poll"]) + ["--ini", str(self.ini)], env=dict(ENV, **(env or {})),
                                   stdin=subprocess.DEVNULL, stdout=out or subprocess.DEVNULL, stderr=open(str(self.log), "a"))
        self.started.append(process)
        return process

    def run(self, *words, env=None, timeout=20):
        self.write_ini()
        return subprocess.run(self.program + list(words) + ["--ini", str(self.ini)], env=dict(ENV, **(env or {})), timeout=timeout,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")

    def control(self, name):
        return self.base / ".mi" / name

    def runs(self):
        return self.ledger.read_text().split() if self.ledger.exists() else []

    def text(self):
        return self.log.read_text(encoding="utf-8")


@pytest.fixture
def host(relay, tmp_path):
    made = Host(tmp_path, relay.url, next(relay.free), relay.token)
    yield made
    clean_up(made)


def clean_up(made):
    for process in made.started:
        process.kill()
        process.wait()
    mark = str(made.folder).encode()
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open("/proc/%s/environ" % pid, "rb") as text:
                if b"CALC_DIR=" + mark in text.read() or os.readlink("/proc/%s/fd/9" % pid).startswith(str(made.folder)):
                    os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass


def submit(relay, site, inputs=None, outs=("out.txt",), patterns=(), parameters="", command="solve"):
    """Registers and allows a calculation; its accept_id."""
    client, inputs = relay.client(), inputs or {}
    names = sorted(inputs, key=remote.nfc_parts)
    files = {name: {"size": len(inputs[name]), "sha256": hashlib.sha256(inputs[name]).hexdigest()} for name in names}
    info = {"command": command, "remote-site": site, "parameters": parameters, "parameter_files": dict(list(files.items())[:2000]),
            "result_files": {name: {} for name in outs}, "result_patterns": list(patterns)}
    accept_id = client.ask("POST", "add-calcinfo", {"v": 2, "request_id": os.urandom(8).hex(), "calc-info": info, "more": len(names) > 2000,
                                                    "total": len(names), "allow": False})["accept_id"]
    for first in range(2000, len(names), 2000):
        client.ask("POST", "files/%s/input" % accept_id, {"v": 2, "from": first, "files": {n: files[n] for n in names[first:first + 2000]},
                                                          "more": first + 2000 < len(names)})
    first = 0
    while first < len(names):
        count = 1 if len(inputs[names[first]]) > remote.PACK_FILE else min(500, len(names) - first)
        target = "%d?v=2&offset=0" % first if count == 1 else "pack?v=2&from=%d&count=%d" % (first, count)
        client.read_answer(client.exchange("POST", "files/%s/input/%s" % (accept_id, target), b"".join(inputs[n] for n in names[first:first + count])), 30)
        first += count
    client.ask("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
    return accept_id


def outcome(relay, accept_id, seconds=20, contents=True):
    """result-info of a calculation when it is over, the files' bytes in "files"."""
    client, stamp, end = relay.client(), "", time.monotonic() + seconds
    while True:
        found = client.ask("GET", "calc-progress", {"v": 2, "accept_id": accept_id, "wait": 2, "known": stamp}, 2)
        if found["progress"] == "got return":
            break
        assert time.monotonic() < end, found
        stamp = found["stamp"]
    info = client.ask("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]
    info["files"] = {}
    for number, name in enumerate(info["result_files"] if contents else ()):
        answer = client.exchange("GET", "files/%s/result/%d?v=2" % (accept_id, number))
        info["files"][name] = bytes(client.read_file(answer, answer.length))
    return info


def check_odd_words(relay, host, shown, expected, seconds=20):
    """A calculation on a batch system whose directory, arguments and environment are odd. shown: what else the job prints, expected: as what."""
    host.base = host.folder / "b a'se %j"
    host.poller["calc_base"] = str(host.base)
    host.script("solve", 'printf "%%s|" "$@" "$EXTRA" "%s" "$PWD" "$CALC_DIR" > out.txt; cat in.txt >> out.txt; echo said' % shown)
    host.sections["command solve"].update({"argv": host.sections["command solve"]["argv"] + "\n{parameters}", "parameters": "yes",
                                           "argument.1": ".*", "argument.2": ".*", "env.EXTRA": "a 'b' $(c) \\"})
    host.start()
    accept_id = submit(relay, host.site, {"in.txt": b"input"}, parameters="""'$(touch x) `y` "' '\\n %s *'""")
    info, work = outcome(relay, accept_id, seconds), str(host.base / accept_id)
    assert (info["status"], info["exit_code"], info["reason"]) == ("completed", 0, ""), info
    assert info["files"]["out.txt"].decode() == "$(touch x) `y` \"|\\n %%s *|a 'b' $(c) \\|%s|%s|%s|input" % (expected, work, work)
    assert info["files"][OUT] == b"said\n" and host.runs() == [accept_id + ".1"]


def gone(pid):
    try:
        with open("/proc/%d/stat" % pid) as text:
            return text.read().rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


# ---- a calculation ----
def test_a_calculation_goes_through_and_its_result_comes_back(relay, host):
    host.script("solve", "cat in.txt sub/b.txt > out.txt; echo said; echo complained >&2")
    host.start()
    info = outcome(relay, submit(relay, host.site, {"in.txt": b"one\n", "sub/b.txt": b"two\n"}))
    assert (info["status"], info["exit_code"], info["missing"], info["refused"]) == ("completed", 0, {}, {})
    assert info["files"] == {"out.txt": b"one\ntwo\n", OUT: b"said\n", ERR: b"complained\n"}


def test_the_exit_code_is_the_commands_and_a_missing_result_is_named(relay, host):
    host.script("solve", "exit 3")
    host.start()
    info = outcome(relay, submit(relay, host.site))
    assert (info["status"], info["exit_code"], info["missing"]) == ("abnormal", 3, {"out.txt": "not there"})


def test_large_inputs_and_results_patterns_and_directories(relay, host):
    host.script("solve", "mkdir -p d/e; cp big d/e/big; cp big out.txt; echo 1 > d/1; echo 2 > d/2; echo 3 > elsewhere")
    host.start()
    big = os.urandom(3 << 20)
    info = outcome(relay, submit(relay, host.site, {"big": big, "x": b"x"}, patterns=["d/"]))
    assert info["files"].pop("d/e/big") == big and info["files"].pop("out.txt") == big
    assert info["files"] == {"d/1": b"1\n", "d/2": b"2\n", OUT: b"", ERR: b""}


def test_names_in_japanese_under_lang_c(relay, host):
    host.script("solve", "cp 入力.txt 出力.txt")
    host.start()
    assert outcome(relay, submit(relay, host.site, {"入力.txt": b"k"}, outs=["出力.txt"]))["files"]["出力.txt"] == b"k"


def test_thousands_of_results_in_pages(relay, host):
    host.script("solve", "for i in $(seq 4500); do echo $i > r$i; done")
    host.start()
    info = outcome(relay, submit(relay, host.site, outs=[], patterns=["r*"]), contents=False)
    assert (info["status"], len(info["result_files"])) == ("completed", 1000)


def test_two_at_a_time_and_one_licence(relay, host):
    host.script("solve", 'echo in >> %s/trace; sleep 0.5; echo out >> %s/trace' % (host.folder, host.folder))
    host.poller["jobs"] = 4
    ids = [submit(relay, host.site, outs=[]) for n in range(3)]
    host.start()
    assert all(outcome(relay, one)["status"] == "completed" for one in ids)
    assert (host.folder / "trace").read_text().split()[:3] == ["in"] * 3
    host.started[-1].terminate()
    host.started[-1].wait()
    (host.folder / "trace").unlink()
    host.sections["command solve"]["jobs"] = 1
    ids = [submit(relay, host.site, outs=[]) for n in range(3)]
    host.start()
    assert all(outcome(relay, one)["status"] == "completed" for one in ids)
    assert (host.folder / "trace").read_text().split() == ["in", "out"] * 3


def test_once_works_off_what_is_there_and_ends(relay, host):
    ids = [submit(relay, host.site) for n in range(3)]
    assert host.run("poll", "--once").returncode == 0
    assert all(outcome(relay, one)["status"] == "completed" for one in ids) and len(host.runs()) == 3
    again = host.run("poll", "--once", "-q")
    assert (again.returncode, again.stdout) == (0, "")


# ---- nothing lost, nothing twice ----
def test_killed_while_the_command_runs_the_result_arrives_and_it_ran_once(relay, host):
    host.script("solve", "sleep 1.5; echo late > out.txt")
    process = host.start()
    accept_id = submit(relay, host.site)
    until(host.runs, what="the command's start")
    process.kill()
    process.wait()
    host.start()
    info = outcome(relay, accept_id)
    assert (info["status"], info["files"]["out.txt"], host.runs()) == ("completed", b"late\n", [accept_id + ".1"])


def test_killed_and_the_command_ended_meanwhile(relay, host):
    host.script("solve", "sleep 0.5; echo late > out.txt; exit 0")
    process = host.start()
    accept_id = submit(relay, host.site)
    until(host.runs, what="the command's start")
    process.kill()
    process.wait()
    until(lambda: (host.control(accept_id) / "end").exists())
    host.start()
    assert outcome(relay, accept_id)["status"] == "completed" and len(host.runs()) == 1


def test_the_relay_dies_while_the_command_runs_and_comes_back(relay, host, tmp_path_factory):
    own = OurWorld(tmp_path_factory.mktemp("relay"))
    try:
        host.poller.update(url=own.url, site="s1")
        host.token.write_text(own.token)
        host.script("solve", "sleep 0.5; echo x > out.txt")
        host.start()
        accept_id = submit(own, "s1")
        until(host.runs)
        own.relay.kill()
        until(lambda: (host.control(accept_id) / "end").exists())
        time.sleep(0.5)
        own.start()
        assert outcome(own, accept_id, 30)["status"] == "completed" and len(host.runs()) == 1
    finally:
        own.close()


@pytest.mark.parametrize("hours", [-6, 6])
def test_processes_that_are_gone_count_as_lost_also_after_the_clock_was_set(tmp_path, hours):
    for name in ("start", "child"):
        (tmp_path / name).write_text("%-255s\n" % ("999999999 1 %s %s running" % (remote.boot_id(), os.uname().nodename)))
    assert remote.command_state(os.fsencode(str(tmp_path)), time.time())[0] == "starting"
    assert remote.command_state(os.fsencode(str(tmp_path)), time.time() + hours * 3600) == ("lost", "end unknown")


def test_a_killed_wrapper_is_not_a_lost_command(relay, host):
    host.script("solve", "sleep 1; echo x > out.txt")
    host.start()
    accept_id = submit(relay, host.site)
    until(host.runs)
    os.kill(remote.read_note(str(host.control(accept_id) / "start").encode()).pid, signal.SIGKILL)
    until(lambda: "end unknown" in host.text(), 20)
    info = outcome(relay, accept_id)
    assert (info["status"], info["reason"], info["exit_code"]) == ("abnormal", "end unknown", None) and b"end unknown" in info["files"][ERR]
    assert len(host.runs()) == 1


def test_ctrl_c_ends_within_a_second_and_the_command_goes_on(relay, host):
    host.script("solve", "sleep 2; echo x > out.txt")
    process = host.start(host.site, relay.url, relay.token, "calc_base:%s" % host.base, out=open(str(host.folder / "out"), "w"))
    accept_id = submit(relay, host.site)
    until(host.runs)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130 and time.monotonic() - began < 1
    shown = (host.folder / "out").read_text(encoding="utf-8")
    assert "Ctrl + C スクリプト停止要求受付" in shown and "token = ****" in shown and relay.token not in shown + host.text()
    child = remote.read_note(str(host.control(accept_id) / "child").encode())
    assert not gone(child.pid)
    host.start()
    assert outcome(relay, accept_id)["status"] == "completed" and len(host.runs()) == 1


def test_sigterm_while_it_waits_for_work_ends_with_0_within_a_second(relay, host):
    process = host.start()
    until(lambda: "polling" in host.text())
    time.sleep(0.5)
    began = time.monotonic()
    process.terminate()
    assert process.wait(5) == 0 and time.monotonic() - began < 1


def test_results_that_change_while_they_are_sent_are_refused_and_the_rest_arrives(relay, host):
    host.script("solve", "(while [ ! -e stop ]; do date +%s%N >> moving; done) & sleep 0.3; echo x > out.txt")
    host.start()
    info = outcome(relay, submit(relay, host.site, outs=["out.txt", "moving"]), 30)
    assert info["files"]["out.txt"] == b"x\n" and (info["refused"] == {"moving": "changes"} or info["files"]["moving"])


# ---- time and trees ----
def test_a_wrapper_whose_mv_is_killed_by_a_cancel_notes_the_end_all_the_same(tmp_path):
    control, bin_ = os.fsencode(str(tmp_path / "control")), tmp_path / "bin"
    os.mkdir(control)
    bin_.mkdir()
    (bin_ / "mv").write_text("#!/bin/sh\ncase $1 in *end.tmp) echo x >>%s/tries; [ $(wc -l <%s/tries) -gt 2 ] || kill -9 $$;; esac\nexec /bin/mv \"$@\"\n"
                             % (tmp_path, tmp_path))
    (bin_ / "mv").chmod(0o755)
    remote.prepare_control(control)
    wrapper = subprocess.run(["/bin/sh", os.fsdecode(control) + "/run", os.fsdecode(control), str(tmp_path), "/bin/sh", "-c", "exit 7"],
                             env={"PATH": "%s:/usr/bin:/bin" % bin_})
    assert wrapper.returncode == 0 and remote.command_state(control, time.time()) == ("ended", 7)


def test_timeout_stops_the_whole_tree_and_the_logs_come_back(relay, host):
    host.script("solve", "echo before; setsid sleep 300 & echo $! > %s/pid; trap '' TERM; while :; do sleep 0.1; done" % host.folder)
    host.sections["command solve"].update(timeout="1s", grace="1s")
    host.start()
    info = outcome(relay, submit(relay, host.site))
    assert (info["status"], info["reason"], info["signal"]) == ("abnormal", "timeout", 9) and info["files"][OUT] == b"before\n"
    assert gone(int((host.folder / "pid").read_text()))


def families(host, grace, **more):
    """A poller whose command starts a family of the kind that its parameter names."""
    made = process_families.Family(str(host.folder / "family"), **more)
    host.poller["jobs"] = 20
    host.sections["command solve"] = {"argv": made.command + "\n{parameters}", "match": "solve", "parameters": "yes", "argument.1": "[a-z]+", "grace": grace}
    return made, host.start()


def cancel(relay, accept_id):
    relay.client().ask("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True})


def test_a_cancel_ends_children_of_every_kind(relay, host, capsys):
    made, poller = families(host, "0.5s")
    ids = {kind: submit(relay, host.site, parameters=kind, outs=[]) for kind in list(process_families.KINDS) + ["all"]}
    alive = {kind: made.alive(accept_id + ".1") for kind, accept_id in ids.items()}
    began = time.monotonic()
    for accept_id in ids.values():
        cancel(relay, accept_id)
    found = process_families.gone(alive, 30)
    assert set(found) == set(ids)
    with capsys.disabled():
        print(" (grace 0.5 s: %s)" % " ".join("%s %.1f s" % (kind, found[kind] - began) for kind in ids), end="")
    for kind, accept_id in ids.items():
        info = outcome(relay, accept_id)
        assert info["status"] == "abnormal" and info["reason"].startswith("cancelled") and info["exit_code"] in (137, 143), (kind, info)


def test_a_stopped_script_does_not_come_to_its_next_line(tmp_path):
    """A shell whose child is told first takes the child's end for the line's and goes on."""
    control, work = os.fsencode(str(tmp_path / "control")), os.fsencode(str(tmp_path / "work"))
    os.mkdir(control)
    os.mkdir(work)
    remote.prepare_control(control)
    text = "sleep 300; touch on"
    for level in "12345678":                           # shells that wait for one another, and so many beside that telling all takes its time
        text = "n=0; while [ $n -lt 40 ]; do sleep 300 & n=$((n + 1)); done; sh -c %s; touch on%s" % (shlex.quote(text), level)
    wrapper = remote.start_wrapper(control, work, ["/bin/sh", "-c", text], {"MI_RUN": "a.1"})
    until(lambda: len(remote.command_processes(wrapper.pid, b"MI_RUN=a.1", set())) == 8 * 40 + 10)
    assert remote.stop_command(control, b"MI_RUN=a.1", 10) == []
    assert wrapper.wait(10) == 0 and os.listdir(work) == [] and remote.command_state(control, time.time()) == ("ended", 143)


def test_a_poller_killed_while_it_cancels_leaves_nothing_that_the_next_one_does_not_end(relay, host):
    made, poller = families(host, "300s")
    accept_id = submit(relay, host.site, parameters="all", outs=[])
    alive = {"all": made.alive(accept_id + ".1")}
    cancel(relay, accept_id)
    wrapper = remote.read_note(str(host.control(accept_id) / "start").encode())
    until(lambda: open("/proc/%d/stat" % wrapper.pid).read().rpartition(") ")[2][0] == "T")
    poller.kill()
    poller.wait()
    host.sections["command solve"]["grace"] = "0.5s"
    host.start()
    info = outcome(relay, accept_id, 30)
    assert info["status"] == "abnormal" and info["reason"].startswith("cancelled") and set(process_families.gone(alive, 1)) == {"all"}


def test_what_a_command_leaves_behind_neither_delays_its_end_nor_stays_as_zombies_while_it_runs(relay, host):
    made, poller = families(host, "0.5s", end="for i in 0 1 2 3 4 5 6 7 8 9; do (setsid sleep 0.1 & setsid sleep 0.2 &); done; sleep 1;"
                            " cat /proc/$PPID/task/$PPID/children | wc -w")
    accept_id = submit(relay, host.site, parameters="orphan", outs=[])
    alive = {"orphan": made.alive(accept_id + ".1")}
    info = outcome(relay, accept_id)
    assert (info["status"], info["exit_code"]) == ("completed", 0) and int(info["files"][OUT]) <= 6, info         # the command, the orphans' two
    assert not process_families.gone(alive, 0.5)                 # who did not ask for their end leaves them alone


# ---- the allow-list ----
@pytest.mark.parametrize("parameters, good", [("4 'a b'", True), ("4", True), ("", True), ("x", False), ("4 a b", False), ("4 '", False),
                                              ("4 $(id)", False), ("4\n", False), ("-4", False)])
def test_arguments_must_match_their_pattern(relay, host, parameters, good):
    host.script("solve", 'for word; do echo "[$word]"; done; : > out.txt')
    host.sections["command solve"].update({"argv": "%s\nfirst\n{parameters}\nlast" % (host.folder / "solve"), "parameters": "yes",
                                           "argument.1": r"\d+", "argument.2": "[a-z ]+"})
    accept_id = submit(relay, host.site, parameters=parameters)
    assert host.run("poll", "--once").returncode == 0
    info = outcome(relay, accept_id)
    if good:
        words = {"4 'a b'": "[4]\n[a b]\n", "4": "[4]\n", "": ""}[parameters]
        assert info["files"][OUT].decode() == "[first]\n" + words + "[last]\n"
    else:
        assert (info["status"], info["reason"].split(":")[0], info["exit_code"], host.runs()) == ("abnormal", "refused", None, [])
        assert b"mi_system_remote: " in info["files"][ERR]


def test_a_command_that_is_not_in_the_list_or_takes_no_parameters_is_refused(relay, host):
    ids = [submit(relay, host.site, command="other"), submit(relay, host.site, parameters="x")]
    assert host.run("poll", "--once").returncode == 0
    assert [outcome(relay, one)["reason"].split(":")[0] for one in ids] == ["refused", "refused"] and host.runs() == []


def test_the_commands_environment_holds_no_token(relay, host):
    host.script("solve", "cat /proc/self/environ | tr '\\0' '\\n' > out.txt")
    host.sections["command solve"]["env.LICENCE"] = "27000@host"
    del host.poller["token_file"]
    host.start(env={"MI_DISTCOMP_TOKEN": relay.token, "CREDENTIALS_DIRECTORY": "/nonexistent", "AWS_SECRET": "x", "TZ": "Asia/Tokyo"})
    accept_id = submit(relay, host.site)
    lines = outcome(relay, accept_id)["files"]["out.txt"].decode().splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"} == {"PATH", "HOME", "LANG", "TZ", "LICENCE", "CALC_DIR", "MI_RUN"}
    assert relay.token not in "".join(lines) and "MI_RUN=%s.1" % accept_id in lines


def test_ps_does_not_show_a_token_from_the_command_line(relay, host):
    process = host.start(host.site, relay.url, relay.token, "calc_base:%s" % host.base)
    until(lambda: " polling " in host.text())
    with open("/proc/%d/cmdline" % process.pid, "rb") as text:
        words = text.read().split(b"\0")
    assert relay.token.encode() not in words and host.site.encode() in words
    assert "process list" in host.text() and relay.token not in host.text()
    assert outcome(relay, submit(relay, host.site))["status"] == "completed"


# ---- what may leave ----
def test_links_stay_and_outbound_rules_hold(relay, host):
    (host.folder / "secret").write_text("the secret")
    host.script("solve", """ln -s %(f)s/secret link; ln -s %(f)s dir; ln -s out.txt inside; echo x > out.txt; mkfifo fifo; echo t > keep.MAT
        mkdir p; ln -s %(f)s/secret p/l; echo y > p/y; echo t > p/z.mat; head -c 2000 /dev/zero > big; printf known > sum""" % {"f": host.folder})
    host.sections["outbound"] = {"deny_names": "*.mat", "max_file": 1000, "deny_sums": hashlib.sha256(b"known").hexdigest()}
    host.start()
    info = outcome(relay, submit(relay, host.site, patterns=["p/"], outs=[
        "link", "dir/secret", "inside", "out.txt", "fifo", "keep.MAT", "big", "sum", "absent/x"]))
    assert info["files"] == {"inside": b"x\n", "out.txt": b"x\n", "p/y": b"y\n", OUT: b"", ERR: b""}
    assert info["missing"] == {"absent/x": "not there"}
    named = {"link": "outside", "dir/secret": "outside", "fifo": "special", "keep.MAT": "refused", "big": "limit", "sum": "refused"}
    assert {key: info["refused"].get(key) for key in named} == named
    assert "z.mat" not in json.dumps(info["refused"]) and "p/l" not in info["refused"]


def test_allow_names_and_totals(relay, host):
    host.script("solve", "for i in 1 2 3 4; do head -c 1000 /dev/zero > r$i.dat; done; echo x > other")
    host.sections["outbound"] = {"allow_names": "*.dat *.txt", "max_total": 2500}
    host.start()
    info = outcome(relay, submit(relay, host.site, outs=["r1.dat", "r2.dat", "r3.dat", "other"]))
    assert sorted(info["files"]) == sorted(["r1.dat", "r2.dat", OUT, ERR]) and info["refused"] == {"other": "refused", "r3.dat": "limit"}


# ---- a hostile relay ----
class Fake:
    """Answers calc-request once with what it is given, then with nothing; remembers what it is told."""

    def __init__(self, order):
        fake, self.order, self.told, self.no = self, order, [], {}

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply({"version": 2} if "version" in self.path else {"errors": [{"code": 200, "files": {}, "next": None}]})

            def do_POST(self):
                data = self.rfile.read(int(self.headers["Content-Length"]))
                fields = json.loads(data.decode("utf-8")) if data[:1] == b"{" else {}
                name = self.path.partition("/mi-distcomp-api/")[2]
                fake.told.append((name, fields, data))
                if name == "calc-request":
                    order, fake.order = fake.order, None
                    self.reply({"errors": [dict({"code": 200}, **order)]} if order else {"errors": [{"code": "0300", "message": "nothing"}]})
                else:
                    self.reply({"errors": [{"code": fake.no.get(name, 200), "message": "as told", "complete": True}]})

            def reply(self, fields):
                data = json.dumps(fields).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words):
                pass

        class Server(http.server.HTTPServer):
            pass

        import socketserver
        self.server = type("S", (socketserver.ThreadingMixIn, Server), {"daemon_threads": True})(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = "http://127.0.0.1:%d" % self.server.server_port

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def names(self):
        return [name for name, fields, data in self.told]


ID = "01234567-0123-0123-0123-0123456789ab"
SUM = hashlib.sha256(b"x").hexdigest()


def order(**changes):
    found = {"accept_id": ID, "claim": "1.abc", "attempt": 1, "lease": 300, "inputs": {"files": {}, "next": None},
             "calc-info": {"command": "solve", "remote-site": "s", "parameters": "", "result_files": {"out.txt": {}}, "result_patterns": []}}
    info = changes.pop("info", {})
    found.update(changes)
    found["calc-info"] = dict(found["calc-info"], **info)
    return found


def against(tmp_path, given):
    fake = Fake(given)
    host = Host(tmp_path, fake.url, "s", "t" * 64)
    try:
        ended = host.run("poll", "--once")
        return fake, host, ended
    finally:
        clean_up(host)
        fake.close()


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/../../escaped", "a\nb", "..", "", "a//b", "x\\y", OUT, OUT + "/x", "\ud800"])
def test_escaping_input_names_end_as_input_and_nothing_is_run(tmp_path, name):
    fake, host, ended = against(tmp_path, order(inputs={"files": {name: {"size": 1, "sha256": SUM}}, "next": None}))
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    end = next(fields for call, fields, data in fake.told if call == "calc-end")
    assert (end["result"], end["reason"].split(":")[0], host.runs()) == ("abnormal", "input", []) and "end-send" in fake.names()
    assert not list(tmp_path.glob("**/escaped"))


@pytest.mark.parametrize("entry", [{"size": -1, "sha256": SUM}, {"size": 1, "sha256": "../x"}, {"size": True}, [], None, {"size": "1", "sha256": SUM}])
def test_malformed_input_entries_end_as_input(tmp_path, entry):
    fake, host, ended = against(tmp_path, order(inputs={"files": {"a": entry}, "next": None}))
    assert next(fields for call, fields, data in fake.told if call == "calc-end")["reason"].startswith("input: ") and host.runs() == []


@pytest.mark.parametrize("changes", [
    {"accept_id": "../../../../tmp/0123456789abcdef0123"}, {"accept_id": "." * 36}, {"accept_id": ID + "\n"}, {"accept_id": None}, {"attempt": "1"},
    {"attempt": 0}, {"attempt": True}, {"claim": "a&b=c"}, {"claim": "a\r\nX: y"}, {"claim": 7}, {"info": {"command": None}},
    {"info": {"parameters": ["x"]}}, {"info": {"result_files": ["x"]}}, {"info": {"result_patterns": "x"}},
    {"info": {"result_patterns": [7]}}])
def test_an_answer_that_cannot_be_right_leaves_no_trace(tmp_path, changes):
    fake, host, ended = against(tmp_path, order(**changes))
    assert ended.returncode == 0 and "is not taken" in ended.stderr and set(fake.names()) == {"calc-request"}
    assert sorted(os.listdir(str(host.base))) == [".mi"] and sorted(os.listdir(str(host.base / ".mi"))) == ["audit.log", "lock", "poller", "reserve", "settings", "spare"]


def test_what_is_kept_of_a_calc_info_is_what_is_used_and_show_steers_no_terminal(tmp_path):
    """Of a thousand calculations it would fill disk and memory otherwise, and it stays for weeks."""
    fake, host, ended = against(tmp_path, order(info={"junk": ["x" * 100] * 10000, "parameters": "\x9b2J\u202e"}))
    name = next(name for name in os.listdir(str(host.base / ".mi")) if len(name) == 36)
    assert (host.base / ".mi" / name / "order.json").stat().st_size < 2000
    told = host.run("show", name)
    assert "202e" in told.stdout and not set("\x9b\u202e") & set(told.stdout)


def test_options_mean_the_same_before_and_behind_the_word(host):
    host.write_ini()
    host.base.mkdir(mode=0o700)
    for words, options in ((["list"], ["--json"]), (["outbox"], ["--json"]), (["unit"], ["--once"]), (["unit"], ["--timer"]), (["check"], ["--upgrade", "--json"]),
                           (["pause"], ["-q"]), (["resume"], ["-v"]), (["show", "01234567"], ["--json"]), (["list"], ["--version"]), (["list"], ["--help"])):
        options = options + ["--ini", str(host.ini)]
        found = {subprocess.run(host.program + line, env=ENV, timeout=20, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout
                 for line in (words + options, options + words, options[:-2] + words + options[-2:])}
        assert len(found) == 1 and (found != {b""} or words[0] == "show"), (words, options, found)
    remote = suite.module("mi_system_remote.py")
    for line in (["--jobs", "3", "--drain", "poll", "--idle-exit=5"], ["poll", "--idle-exit", "5", "--jobs=3", "--drain"]):
        assert remote.parse(line) == remote.parse(["poll", "--jobs", "3", "--drain", "--idle-exit", "5"])


def test_numbers_without_sense_are_no_bug(tmp_path):
    """What waits for want of room is kept for `list`, which could not show it; a fielded relay may name a calculation by a number."""
    fake, host, ended = against(tmp_path, {"code": "0300", "message": "nothing", "large": {ID: 10 ** 400}})
    assert ended.returncode == 0 and not (host.base / ".mi" / "large").exists()
    poller = suite.module("mi_system_remote.py")
    named = poller.v1_named(types.SimpleNamespace(under_way={}, base=os.fsencode(str(tmp_path))), {"accept_id": int("1" * 36)})
    assert poller.check_calc_order(named)["accept_id"] == "1" * 36


@pytest.mark.parametrize("info", [{"command": "sh"}, {"command": "solve "}, {"command": "solve\n"}, {"command": ""}, {"parameters": "x"},
                                  {"result_files": {"../x": {}}}, {"result_files": {"/etc/passwd": {}}}, {"result_patterns": ["../*"]},
                                  {"parameters": "\ud800"}, {"command": "\ud800"}])
def test_a_hostile_calc_info_is_refused_and_nothing_is_run(tmp_path, info):
    fake, host, ended = against(tmp_path, order(info=info))
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    end = next(fields for call, fields, data in fake.told if call == "calc-end")
    assert (end["result"], end["reason"].split(":")[0], end["exit_code"], host.runs()) == ("abnormal", "refused", None, [])
    assert "calc-start" not in fake.names() and "end-send" in fake.names()


def test_the_same_calculation_is_not_run_again(tmp_path):
    fake, host, ended = against(tmp_path, order())
    assert host.runs() == [ID + ".1"]
    fake = Fake(order())
    host.poller["url"] = fake.url
    ended = host.run("poll", "--once")
    fake.close()
    assert ended.returncode == 0 and "it ran here before" in ended.stderr and len(host.runs()) == 1


def test_a_reboot_ends_a_calculation_that_was_about_to_start_without_running_it(tmp_path):
    fake, host, ended = against(tmp_path, order())
    journal = host.control(ID) / "journal"
    journal.write_text(json.dumps(dict(json.loads(journal.read_text().splitlines()[0]), boot="another")) + "\n" + '{"t": 1, "wh')
    for name in ("end", "start", "child", "carrier"):
        (host.control(ID) / name).unlink()
    (host.control(ID) / "ready").write_bytes(b" " * 256)
    fake = Fake(None)
    host.poller["url"] = fake.url
    host.run("poll", "--once")
    fake.close()
    end = next(fields for call, fields, data in fake.told if call == "calc-end")
    assert (end["result"], end["reason"], len(host.runs())) == ("abnormal", "the host was restarted", 1) and "end-send" in fake.names()


def test_nothing_about_the_host_goes_out(tmp_path):
    fake, host, ended = against(tmp_path, order())
    told = b"".join(data for call, fields, data in fake.told)
    assert os.uname().nodename.encode() not in told and str(tmp_path).encode() not in told


# ---- the start ----
def refused(host, *words, code=78, **changes):
    host.poller.update(changes)
    ended = host.run(*(words or ("poll", "--once")))
    assert ended.returncode == code and "Traceback" not in ended.stderr, (ended.returncode, ended.stderr)
    return ended.stderr


def test_a_token_file_that_others_may_read(relay, host):
    host.token.chmod(0o640)
    assert "chmod 600 %s" % host.token in refused(host)


def test_a_token_file_that_is_not_there_or_empty(relay, host):
    assert "token_file" in refused(host, token_file="/nonexistent/token")
    host.token.write_text("\n")
    assert "holds no token" in refused(host, token_file=str(host.token))


def test_no_command_section_prints_the_lines_to_add(relay, host):
    host.sections = {}
    assert "[command NAME]  argv = " in refused(host)


@pytest.mark.parametrize("keys, word", [
    ({"argv": "/nonexistent/solver"}, "No such file"), ({"argv": "solver"}, "absolute"), ({"argv": ""}, "absolute"), ({"argv": "/etc/passwd"}, "chmod +x"),
    ({"argument.1": "["}, "argument.1"), ({"argument.x": "a"}, "argument.1, argument.2"), ({"parameters": "yes"}, "{parameters}"),
    ({"argument.1": "a"}, "{parameters}"), ({"env.A-B": "x"}, "env.A-B"), ({"nice": "20"}, "nice"), ({"timeout": "x"}, "timeout"),
    ({"batch": "sge"}, "is not one of"), ({"run_as": "x"}, "run_as is not a key"), ({"argvv": "x"}, "did you mean argv")])
def test_a_wrong_command_section(relay, host, keys, word):
    host.sections["command solve"].update(keys)
    text = refused(host)
    assert "[command solve]" in text and word in text


@pytest.mark.parametrize("section, keys, word", [
    ("outbound", {"deny_content": "["}, "deny_content"), ("outbound", {"deny_pieces": "x"}, "absolute path"), ("outbound", {"types": "*.csv cvs"}, "no declared type"), ("outbound", {"unwrap": "rar"}, "not one of"), ("outbound", {"holds": "no"}, "did you mean hold"), ("outbound", {"max_fil": 1}, "max_file"),
    ("outbound", {"deny_sums": "abc"}, "sha256"), ("poller", {"jobs": 0}, "jobs"), ("poller", {"hours": "22-25"}, "Mon-Fri 20:30-6:00"),
    ("poller", {"retry": "x"}, "COUNT,INTERVAL"), ("poller", {"sit": "x"}, "did you mean site"), ("poller", {"url": "ftp://x"}, "not a URL"),
    ("poller", {"site": ""}, "site is not set"), ("poller", {"ca_file": "/nonexistent"}, "/nonexistent")])
def test_a_wrong_ini(relay, host, section, keys, word):
    if "ca_file" in keys:
        keys = dict(keys, url="https://127.0.0.1:1")
    if section == "poller":
        host.poller.update(keys)
    else:
        host.sections[section] = keys
    assert word in refused(host, code=64 if "url" in keys and "ca_file" not in keys else 78)


def test_an_ini_that_everybody_may_write_is_refused(relay, host):
    host.write_ini()
    host.ini.chmod(0o666)
    assert "nobody else may write to it" in refused(host)


def test_a_second_poller_on_the_same_base(relay, host):
    process = host.start()
    until(lambda: " polling " in host.text())
    assert "pid %d" % process.pid in refused(host, "poll", code=75)
    quiet = host.run("poll", "--once")
    assert (quiet.returncode, quiet.stdout, quiet.stderr.replace("\n", "")[-1:]) == (0, "", quiet.stderr.replace("\n", "")[-1:])


def test_wrong_token_wrong_site_and_no_relay_in_the_manuals_words(relay, host):
    ended = host.run(host.site, relay.url, "0" * 64, "calc_base:%s" % host.base)
    assert ended.returncode == 77 and re.search(
        r'\d{4}/\d\d/\d\d \d\d:\d\d:\d\d:status code = 403 / reason = {"errors": ?\[{.*"0005".*への実行権がありません', ended.stdout), ended.stdout
    ended = host.run("nosite", relay.url, relay.token, "calc_base:%s" % host.base)
    assert ended.returncode == 77 and "code = 400 / message = Your site-id(nosite) does not match in the list that acceptable to." in ended.stdout
    ended = host.run(host.site, "http://127.0.0.1:%d" % free_port(), relay.token, "calc_base:%s" % host.base)
    assert ended.returncode == 69 and "Connection refused" in ended.stderr


def test_nothing_to_do_in_the_manuals_words(relay, host):
    process = host.start(host.site, relay.url, relay.token, "calc_base:%s" % host.base, "debug", "retry:3,0.1", out=open(str(host.folder / "out"), "w"))
    until(lambda: "calc-request?site_id=%s" % host.site in (host.folder / "out").read_text())
    shown = (host.folder / "out").read_text()
    assert "site id = %s\nbase url = %s\ntoken = ****\n" % (host.site, relay.url) in shown
    process.terminate()
    host.run("poll", "--once")
    process.wait()


def test_retry_ends_the_process_and_keeps_the_result(relay, host, tmp_path_factory):
    own = OurWorld(tmp_path_factory.mktemp("relay"))
    try:
        host.poller.update(url=own.url, site="s1", retry="3,0.2")
        host.token.write_text(own.token)
        host.script("solve", "sleep 0.5; echo x > out.txt")
        process = host.start()
        accept_id = submit(own, "s1")
        until(host.runs)
        own.relay.kill()
        assert process.wait(10) == 69 and "1 calculation(s) stay here" in host.text()
        own.start()
        host.start()
        assert outcome(own, accept_id)["status"] == "completed" and len(host.runs()) == 1
    finally:
        own.close()


def test_a_token_that_is_replaced_in_its_file_is_taken_up(relay, host):
    host.token.write_text("f" * 64)
    host.script("solve", "sleep 0.3; echo x > out.txt")
    host.token.write_text(relay.token)
    host.start()
    accept_id = submit(relay, host.site)
    until(host.runs)
    host.token.write_text("f" * 64)
    until(lambda: "the token is refused: put a valid one into token_file" in host.text())
    host.token.write_text(relay.token)
    assert outcome(relay, accept_id, 30)["status"] == "completed"


def test_list_and_show(relay, host):
    accept_id = submit(relay, host.site)
    host.run("poll", "--once")
    rows = json.loads(host.run("list", "--json").stdout)
    assert [(row["id"], row["state"], row["command"]) for row in rows] == [(accept_id, "delivered", "solve")]
    shown = host.run("show", accept_id).stdout
    assert "starting" in shown and "delivered" in shown and "claim" not in shown
    assert host.run("show", "x").returncode == 64


def test_help_and_version_copied_alone(tmp_path):
    alone = tmp_path / "x.py"
    alone.write_bytes(open(SCRIPT, "rb").read())
    ended = subprocess.run([PYTHON, "-I", "-S", str(alone), "--help"], stdout=subprocess.PIPE, env=ENV, cwd=str(tmp_path))
    assert ended.returncode == 0 and b"poll [--once]" in ended.stdout
    ended = subprocess.run([PYTHON, "-I", "-S", str(alone), "--version"], stdout=subprocess.PIPE, env=ENV, cwd=str(tmp_path))
    assert hashlib.sha256(alone.read_bytes()).hexdigest().encode() in ended.stdout


def test_no_auth_warns_loudly(relay, host):
    ended = host.run(host.site, "https://127.0.0.1:%d" % free_port(), relay.token, "calc_base:%s" % host.base, "no_auth")
    assert ended.returncode == 69 and "CERTIFICATE IS NOT CHECKED" in ended.stderr


@pytest.mark.parametrize("words", [["nonsense"], ["poll", "x"], ["show"], ["s", "http://h", "t", "port:x"], ["poll", "--odd"],
                                   ["poll", "--jobs", "x"], ["s", "http://h"]])
def test_wrong_words_end_with_64(host, words):
    ended = host.run(*words)
    assert ended.returncode == 64 and len(ended.stderr.splitlines()) <= 2, ended.stderr


def test_killed_between_end_send_and_its_own_note_it_finds_that_all_is_delivered(relay, host):
    accept_id = submit(relay, host.site)
    host.run("poll", "--once")
    journal = host.control(accept_id) / "carrier"
    journal.write_text("".join(line for line in journal.read_text().splitlines(True) if "delivered" not in line))
    ended = host.run("poll", "--once")
    assert ended.returncode == 0 and "delivered" in journal.read_text() and len(host.runs()) == 1, ended.stderr


def test_killed_in_the_middle_of_an_upload_it_goes_on_where_it_stopped(relay, host):
    host.script("solve", "for i in $(seq 4500); do echo $i > r$i; done; head -c 200000000 /dev/urandom > out.txt")
    process = host.start()
    accept_id, client = submit(relay, host.site, patterns=["r*"]), relay.client()
    until(lambda: client.ask("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["progress"] == "getting return")
    process.kill()
    process.wait()
    host.start()
    info = outcome(relay, accept_id, 40, contents=False)
    assert info["status"] == "completed" and info["result_files"]["out.txt"]["size"] == 200000000 and len(host.runs()) == 1


def test_a_cancelled_command_is_stopped_with_its_tree_and_its_logs_come_back(relay, host):
    host.script("solve", "echo before; setsid sleep 300 & echo $! > %s/pid; sleep 300" % host.folder)
    host.start()
    accept_id = submit(relay, host.site)
    until((host.folder / "pid").exists)
    time.sleep(1.5)
    began = time.monotonic()
    relay.client().ask("POST", "cancel-wait-calc", {"v": 2, "accept_id": accept_id, "stop": True, "reason": "no more"})
    info = outcome(relay, accept_id)
    assert time.monotonic() - began < 3 and (info["status"], info["exit_code"]) == ("abnormal", 143) and "cancelled" in info["reason"]
    assert info["files"][OUT] == b"before\n" and gone(int((host.folder / "pid").read_text()))


def test_a_working_directory_that_became_a_link_lets_nothing_out(relay, host):
    (host.folder / "secrets").mkdir()
    (host.folder / "secrets" / "out.txt").write_text("the secret")
    host.script("solve", 'cd ..; rm -r "$CALC_DIR"; ln -s %s/secrets "$CALC_DIR"' % host.folder)
    host.start()
    info = outcome(relay, submit(relay, host.site, patterns=["**"]))
    assert set(info["files"]) == {OUT, ERR} and info["refused"]["out.txt"] == "outside"


def test_directories_that_cannot_be_read_and_names_that_are_none_do_not_hold_the_rest_back(relay, host):
    host.script("solve", r"""mkdir -p closed/x; chmod 0 closed; printf x > "$(printf 'bad\377name')"; printf y > "$(printf 'bad\nname')"; echo x > out.txt
        printf 1 > "$(printf 'e\314\201')"; printf 2 > "$(printf '\303\251')" """)
    host.start()
    info = outcome(relay, submit(relay, host.site, patterns=["**"]))
    assert info["files"]["out.txt"] == b"x\n" and info["status"] == "completed" and len(info["files"]) == 4
    assert "bad" not in json.dumps(info["refused"])


def test_a_new_token_in_its_file_ends_the_pauses_of_what_waits_for_one(tmp_path):
    path = str(tmp_path / "token")
    poller, calc = remote.Poller.__new__(remote.Poller), type("Calc", (), {})()
    poller.keys, poller.retry, poller.new_token, poller.token_stamp = {"token_file": path}, None, threading.Event(), remote.stamp_of(path)
    calc.try_now, calc.why, calc.note_next_try, poller.under_way = threading.Event(), "refused", lambda wait, why: None, {"a": calc}
    waiting = [threading.Thread(target=poller.pause, args=(600, one), daemon=True) for one in (None, calc)]
    for thread in waiting:
        thread.start()
    poller.look_at_token()
    assert not poller.new_token.is_set() and not calc.try_now.is_set()
    (tmp_path / "token").write_text("new")
    poller.look_at_token()
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()
