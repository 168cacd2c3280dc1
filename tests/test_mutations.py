"""Each promise of "nothing lost, nothing run twice" has a guard in the scripts. Here a copy of the scripts lacks one of them, and a scenario
made for it shows that the loss or the second run is noticed; with the guard in place the same scenario is clean."""
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest
import suite
from suite import wait_until

RELAY, POLLER = "mi_dicomapi.py", "mi_system_remote.py"
TIMES = "[times]\naccept_lease = 1s\nlease = 2s\n"


def copy(folder, edits):
    """A copy of the scripts with edits [(script, old, new)], each of which must fit exactly once."""
    os.makedirs(folder)
    for name in (RELAY, POLLER, "mi_system_wf.py"):
        with open(os.path.join(suite.HERE, "..", name), encoding="utf-8") as text:
            found = text.read()
        for script, old, new in edits:
            if script == name:
                assert found.count(old) == 1, (name, old, found.count(old))
                found = found.replace(old, new)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as out:
            out.write(found)
    return str(folder)


class Site:
    """A relay, and pollers whose command leaves a line in a ledger."""

    def __init__(self, folder, command="sleep 0.3"):
        self.world = suite.World(os.path.join(folder, "world"), tls=False, commands=["work"], ini=TIMES)
        self.ledger, script = os.path.join(folder, "ledger"), os.path.join(folder, "work.sh")
        open(self.ledger, "w").close()
        with open(script, "w") as out:
            out.write("#!/bin/sh\necho $MI_RUN >>%s\n%s\necho done >out.txt\n" % (self.ledger, command))
        os.chmod(script, 0o755)
        self.patience = 40                             # seconds; where a guard was taken away, nothing may come any more
        self.section, self.script = {"work": "match = work\nargv = %s\n" % script}, script

    def poller(self, name="poller", fault=""):
        """A poller that dies at that point."""
        return self.world.poller(self.section, name=name, env=suite.clean_env(MI_FAULT=fault))

    def runs(self):
        """Which attempts have begun."""
        with open(self.ledger) as text:
            return text.read().split()

    def twice(self):
        """What the checker says of the ledger."""
        return ["%s ran twice" % accept_id for accept_id in {run.split(".")[0] for run in self.runs()}
                if [run.split(".")[0] for run in self.runs()].count(accept_id) > 1]

    def over(self, accept_id):
        """Violations, if the calculation does not come to its end in time."""
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            if self.world.state_of(accept_id) in ("got", "finished"):
                return []
            time.sleep(0.05)
        return ["%s is lost: %s; %s" % (accept_id, self.world.state_of(accept_id), self.world.pollers[-1].text()[-2000:])]


def died(process):
    assert process.popen.wait(15) == -signal.SIGKILL, process.text()


def stale_claim(site):
    """A poller dies just before calc-start; its claim lapses, another one runs the calculation; the first comes back."""
    site.world.start()
    accept_id = site.world.client().register("work", results=["out.txt"])
    died(site.poller("first", "starting noted"))
    wait_until(lambda: site.world.state_of(accept_id) == "allowed", 10)
    site.poller("second")
    wait_until(site.runs)
    site.poller("first")
    time.sleep(1.5)
    return site.twice() + site.over(accept_id)


def claim_lapses_within_the_call(site):
    """calc-start is checked against its claim, then the claim lapses and another one is given, then the step is made."""
    site.world.start()
    client, other = site.world.client(), site.world.client()
    accept_id = client.register("work", results=["out.txt"])
    claim, answers = client.claim()[1], []
    client.walk(accept_id, claim, "calc-params-complete")
    slow = threading.Thread(target=lambda: answers.append(client.call("POST", "calc-start", {"v": 2, "accept_id": accept_id, "claim": claim})[0]))
    slow.start()
    second = wait_until(lambda: other.claim(wait=1), 10)
    other.ok("POST", "calc-params-complete", {"v": 2, "accept_id": accept_id, "claim": second[1]})
    slow.join()
    answers.append(other.call("POST", "calc-start", {"v": 2, "accept_id": accept_id, "claim": second[1]})[0])
    return ["two were told to start %s" % accept_id] if answers.count(200) > 1 else []


def dies_before_the_commit(site):
    """The relay dies between a call's work and its commit."""
    site.world.start(suite.clean_env(MI_FAULT="add-calcinfo uncommitted"))
    try:
        accept_id = site.world.client().register("work")
    except (OSError, suite.http.client.HTTPException):
        accept_id = None
    died(site.world.relay)
    site.world.start()
    return ["%s was answered and is lost" % accept_id] if accept_id and site.world.state_of(accept_id) is None else []


def doubled_start(site):
    """A batch system, or whoever, starts the wrapper once more."""
    site.world.start()
    accept_id = site.world.client().register("work", results=["out.txt"])
    site.poller()
    wait_until(site.runs)
    base = os.path.join(site.world.folder, "poller", "base")
    control = os.path.join(base, ".mi", accept_id)
    subprocess.run(["sh", os.path.join(control, "run"), control, os.path.join(base, accept_id), site.script],
                   env=suite.clean_env(MI_RUN=accept_id + ".1"), timeout=20)
    return site.twice() + site.over(accept_id)


def power_cut(site):
    """The command ran; then the host went down, and its file system has forgotten that."""
    site.world.start()
    accept_id = site.world.client().register("work", results=["out.txt"])
    died(site.poller("poller", "wrapper started"))
    control = os.path.join(site.world.folder, "poller", "base", ".mi", accept_id)
    wait_until(lambda: os.path.exists(os.path.join(control, "end")))
    for name in ("end", "start", "stdout", "stderr"):
        os.unlink(os.path.join(control, name))
    for name in ("ready", "child", "end.tmp"):
        with open(os.path.join(control, name), "w") as out:
            out.write(" " * 256)
    with open(os.path.join(control, "journal")) as text:
        journal = [json.loads(line) for line in text]
    with open(os.path.join(control, "journal"), "w") as out:
        out.writelines(json.dumps(dict(entry, boot="the boot before")) + "\n" for entry in journal)
    site.poller()
    return site.over(accept_id) + site.twice()


def finished_while_the_relay_was_not_told(site):
    """The poller dies when the command has ended, and comes back."""
    site.world.start()
    accept_id = site.world.client().register("work", results=["out.txt"])
    died(site.poller("poller", "ended noted"))
    site.poller()
    return site.over(accept_id) + site.twice()


def restored(site):
    """The relay loses what it knew of a calculation that was run and delivered, and hands it out again."""
    site.world.extra = TIMES + "restore_grace = 1s\n"
    site.world.start()
    accept_id = site.world.client().register("work", results=["out.txt"])
    backup = os.path.join(site.world.folder, "backup")
    assert suite.run(RELAY, "backup", backup, "--ini", site.world.ini).returncode == 0
    site.poller()
    assert site.over(accept_id) == []
    site.world.relay.kill()
    shutil.rmtree(site.world.state)
    assert suite.run(RELAY, "restore", backup, "--ini", site.world.ini).returncode == 0
    site.world.start()
    return site.over(accept_id) + site.twice()


SLOWLY = (RELAY, "    return call.relay.store.write(work, name)\n\n\ndef add_calcinfo",
          "    time.sleep(4 if name == 'calc-start' and claim[:2] == '1.' else 0)\n    return call.relay.store.write(work, name)\n\n\ndef add_calcinfo")
# name -> (scenario, edits that stay, edits that take the guard away)
MUTATIONS = {
    "lease check off in calc-start": (stale_claim, [], [
        (RELAY, '    if not row["claim"] or call.need("claim") != row["claim"] or row["protocol"] == 1:\n', "    if False:\n")]),
    "claim guard off in move()": (claim_lapses_within_the_call, [SLOWLY], [(RELAY, "AND (? OR claim = ?)", "AND (1 OR ? OR claim = ?)")]),
    "answer before the commit": (dies_before_the_commit, [], [
        (RELAY, '                fault(request.name + " uncommitted")\n', '                request.done.release()\n                time.sleep(0.3)\n'
                '                fault(request.name + " uncommitted")\n'),
        (RELAY, "                hook()\n        self.done.release()\n", "                hook()\n")]),
    "mv ready start guard off": (doubled_start, [], [(POLLER, 'mv "$c/ready" "$c/start" 2>/dev/null || exit 75', 'mv "$c/ready" "$c/start" 2>/dev/null || :')]),
    "starting of another boot not looked at": (power_cut, [], [(POLLER, 'if not starting or starting["boot"] == boot_id() or starting.get("batch", "none") != "none":', "if True:")]),
    "outbox forgotten": (finished_while_the_relay_was_not_told, [], [
        (POLLER, 'if self.options.resend else not calc.delivery():\n', "if False else not calc.run.last('starting'):\n")]),
    "earlier attempt not looked at": (restored, [], [(POLLER, "None if self.calc.run.last(\"starting\") else self.ran_before()\n", "None\n")]),
}


@pytest.mark.parametrize("guard", ["with it", "without it"])
@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_the_guard_is_what_keeps_the_promise(name, guard, tmp_path, monkeypatch):
    scenario, always, mutation = MUTATIONS[name]
    monkeypatch.setattr(suite, "ROOT", copy(tmp_path / "scripts", always + (mutation if guard == "without it" else [])))
    site = Site(str(tmp_path), "sleep 2" if scenario in (stale_claim, doubled_start) else "sleep 0.3")
    try:
        site.patience = 40 if guard == "with it" else 12
        found = scenario(site)
    finally:
        for process in site.world.pollers + [site.world.relay]:
            if process is not None:
                process.kill()
        for name in os.listdir("/proc"):               # what a second start has left
            try:
                with open("/proc/%s/cmdline" % name, "rb") as text:
                    if name.isdigit() and re.search(re.escape(site.script).encode(), text.read()):
                        os.kill(int(name), signal.SIGKILL)
            except OSError:
                pass
    assert bool(found) == (guard == "without it"), found
