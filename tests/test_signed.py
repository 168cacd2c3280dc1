"""Signed orders and results: an external computer runs only what a person on its list has signed, each order once; results are taken only if it has
signed them. The relay in between can drop work, and do nothing else."""
import base64
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import time
import types

import blocks as shared_blocks
import fake_relay
import pytest
import ssh_door
import ssh_lab
import suite
from suite import wait_until

SEAL, WF = suite.module("mi_system_remote.py"), suite.module("mi_system_wf.py")


class Signing(suite.World):
    """A relay, keys of alice's and of a stranger's, a poller that wants signatures and signs results."""

    def __init__(self, folder, ini=""):
        suite.needs("ssh-keygen")
        suite.World.__init__(self, os.path.join(folder, "world"), tls=False, commands=["work"])
        self.start()
        self.keys = {name: os.path.join(folder, name) for name in ("alice", "mallory")}
        for name, path in self.keys.items():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
        self.ledger, script = os.path.join(folder, "ledger"), os.path.join(folder, "work.sh")
        with open(script, "w") as out:
            out.write("#!/bin/sh\necho $MI_RUN >>%s\ncat in.txt >out.txt\nexit $(cat code.txt 2>/dev/null || echo 0)\n" % self.ledger)
        os.chmod(script, 0o755)
        self.section = {"work": "match = work\nargv = %s\n" % script}
        self.gate_key, self.more = os.path.join(folder, "gate"), ini
        os.makedirs(os.path.join(self.folder, "wf"))
        self.write("in.txt", "hello\n")

    def write(self, name, text):
        with open(os.path.join(self.folder, "wf", name), "w") as out:
            out.write(text)

    def own_ini(self, more=""):
        """The lines of the poller's ini behind [poller]."""
        with open(self.keys["alice"] + ".pub") as text:
            return "%sresult_key = %s\n[signer alice]\nkey = %s\n%s" % (self.more, self.gate_key, text.read(), more)

    def began(self, **more):
        """The poller."""
        return self.poller(self.section, ini=self.own_ini(), **more)

    def ran(self):
        """The runs whose command has begun."""
        if not os.path.exists(self.ledger):
            return []
        with open(self.ledger) as text:
            return text.read().split()

    def order(self, *more, word="run", key="alice", **how):
        """The workflow side, with what is usual."""
        return self.workflow(word, suite.SITE, "work", "--in", "in.txt", "--out", "out.txt", *(("--sign-key", self.keys.get(key)) * bool(key) + more), **how)

    def result(self, name):
        with open(os.path.join(self.folder, "wf", name)) as text:
            return text.read()


@pytest.fixture
def world(tmp_path):
    made = Signing(str(tmp_path))
    yield made
    made.close()


def test_what_a_person_on_the_list_has_signed_runs_and_its_results_are_taken_only_if_they_are_signed_there(world):
    world.began()
    done = world.order()
    assert done.returncode == 0 and len(world.ran()) == 1, done
    for key in ("", "mallory"):
        done = world.order(key=key)
        assert done.returncode == 77 and len(world.ran()) == 1, done
        assert ("not signed" if not key else "not on this host's list") in done.stdout, done
    done = world.order("--require-signed-by", world.gate_key + ".pub")
    assert done.returncode == 0 and world.result("out.txt") == "hello\n", done
    signed, = [name for name in os.listdir(os.path.join(world.folder, "wf")) if name.endswith(".signed")]
    line, newline, armored = world.result(signed).partition("\n")
    world.write("signature", armored)
    with open(world.gate_key + ".pub") as text:
        world.write("keys", "gate " + text.read())
    told = json.loads(line)
    assert (told["exit_code"], told["site"]) == (0, suite.SITE)
    done = subprocess.run(["ssh-keygen", "-Y", "verify", "-f", "keys", "-I", "gate", "-n", "result@mi-distcomp", "-s", "signature"], input=line.encode(),
                          cwd=os.path.join(world.folder, "wf"), stdout=subprocess.PIPE)
    assert done.returncode == 0, done
    os.unlink(os.path.join(world.folder, "wf", "out.txt"))
    done = world.order("--require-signed-by", world.keys["mallory"] + ".pub")
    assert done.returncode == 76 and "another key" in done.stderr and not os.path.exists(os.path.join(world.folder, "wf", "out.txt")), done


def test_what_is_signed_of_an_end_says_no_more_of_it_than_what_is_told_of_it(world):
    world.poller(world.section, ini=world.own_ini("[outbound]\ndeny_content = own words\n"))
    with open(world.section["work"].split()[-1], "w") as out:
        out.write("#!/bin/sh\necho No space left on device >&2\nexit 3\n")
    done = world.order("--require-signed-by", world.gate_key + ".pub")
    assert done.returncode == 3, done
    row, = world.rows("SELECT accept_id, reason FROM calculations")
    told = json.loads(world.result(row["accept_id"] + ".signed").partition("\n")[0])
    assert "own words" not in row["reason"] + told["reason"] and told["reason"] == row["reason"] != "", (told, row)


def test_the_sum_of_the_rules_that_a_result_tells_is_no_sum_that_another_can_try_out(tmp_path):
    control, told = os.fsencode(str(tmp_path)), {"site": "s", "run": "r", "exit_code": 0, "signal": None, "reason": ""}

    def sum_of(key, word):
        rules = SEAL.default_values(SEAL.gate_keys()["outbound"])
        text = SEAL.signed_results(str(tmp_path / key), told, control, dict(rules, deny_content=[word]), [], {}, "")
        return json.loads(text.partition("\n")[0])["rules"]

    assert sum_of("one", "project") == sum_of("one", "project") != sum_of("one", "other") and sum_of("two", "project") != sum_of("one", "project")


def test_an_order_runs_once_and_rerun_signs_a_new_one(world):
    world.began()
    world.write("code.txt", "3")
    done = world.order("--in", "code.txt", "--request-id", "r1", word="submit")
    accept_id = done.stdout.strip()
    wait_until(lambda: world.state_of(accept_id) == "got")
    operator = world.workflow("rerun", accept_id)         # as an operator, without an order
    assert operator.returncode == 0, operator
    wait_until(lambda: world.state_of(accept_id) == "got")
    row, = world.rows("SELECT status, reason FROM calculations")
    assert row["status"] == "abnormal" and "used already" in row["reason"] and len(world.ran()) == 1, row
    again = world.workflow("rerun", accept_id, "--sign-key", world.keys["alice"])
    assert again.returncode == 0, again
    wait_until(lambda: world.state_of(accept_id) == "got")
    assert len(world.ran()) == 2
    done = world.workflow("wait", accept_id, "--require-signed-by", world.gate_key + ".pub")
    assert done.returncode == 3, done


def test_a_module_that_starts_again_finds_its_order_and_takes_the_results_of_the_first(world):
    first = world.order("--request-id", "r1", word="submit")
    world.began()
    again = world.order("--request-id", "r1", "--require-signed-by", world.gate_key + ".pub")
    assert again.returncode == 0 and "found again" in again.stdout and first.stdout.strip() in again.stdout and len(world.ran()) == 1, again


# ---- a relay that was taken over: it has all that a real one has, and does what it likes

def signed(fields, key, space=None):
    """A signed text."""
    return SEAL.signed_text(fields, key, space or SEAL.ORDER_SPACE)


def given(data, **more):
    """An entry of a manifest that brings its bytes along."""
    return dict(fake_relay.entry(data), data=base64.b64encode(data).decode(), **more)


class TakenOver:
    """A fake relay with a poller that wants signatures; orders are handed out one after the other."""

    def __init__(self, folder):
        suite.needs("ssh-keygen")
        self.folder, self.fake, self.words, self.place = folder, fake_relay.Fake(), {}, 0
        self.keys = {name: os.path.join(folder, name) for name in ("alice", "mallory", "old", "narrow", "late", "bob")}
        lines, more = "", {"old": "revoked = yes", "narrow": "commands = other", "late": "since = 2001-01-01\nuntil = 2002-01-01", "bob": "sites = elsewhere"}
        for name, path in self.keys.items():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
            with open(path + ".pub") as text:
                lines += "[signer %s]\nkey = %s\n%s\n" % (name, text.read().strip(), more.get(name, "")) if name != "mallory" else ""
        self.ledger, script = os.path.join(folder, "ledger"), os.path.join(folder, "work.sh")
        with open(script, "w") as out:
            out.write("#!/bin/sh\necho \"$MI_RUN $1\" >>%s\ncat in.txt >out.txt\n" % self.ledger)
        os.chmod(script, 0o755)
        with open(os.path.join(folder, "token"), "w") as out:
            out.write("t" * 64 + "\n")
        os.chmod(out.name, 0o600)
        self.ini = os.path.join(folder, "poller.ini")
        with open(self.ini, "w") as out:
            out.write("[poller]\nsite = s\nurl = %s\ntoken_file = %s/token\ncalc_base = %s/base\naccept_after = 2020-01-01\npoll = 1s\n%s" % (
                self.fake.url, folder, folder, lines))
            for name in ("work", "other"):
                out.write("[command %s]\nargv =\n    %s\n    {parameters}\nmatch = %s\nargument.1 = [a-z]*\n" % (name, script, name))
        self.inputs = {"in.txt": given(b"hello\n")}
        self.fake.misbehave = lambda request: (request.ok(files=self.inputs, next=None)
                                               if request.method == "GET" and request.name.endswith("/input") else None)

    def order(self, **changes):
        """The fields of an order as the workflow side makes it."""
        now = int(time.time())
        rows = [(name, entry["size"], entry["sha256"], entry.get("x", False)) for name, entry in self.inputs.items()]
        return dict({"v": 1, "site": "s", "user": "alice", "request_id": "r", "command": "work", "parameters": "a", "inputs": SEAL.sum_of_manifest(rows),
                     "result_files": ["out.txt"], "result_patterns": [], "nonce": os.urandom(16).hex(), "not_before": now, "expires": now + 600}, **changes)

    def info(self, signed_text, **changes):
        """The calc-info of an order."""
        found = dict({"command": "work", "remote-site": "s", "parameters": "a", "result_files": {"out.txt": {}}, "result_patterns": []}, **changes)
        return dict(found, signed=signed_text) if signed_text is not None else found

    def hand_out(self, word, info, inputs=None, attempt=1, accept_id=None, claim=None):
        """This one is handed out; word: what its refusal says, None if it runs."""
        self.place += 1
        accept_id = accept_id or "01234567-0123-0123-0123-%012d" % self.place
        self.words.setdefault(accept_id, []).append(word)
        self.fake.orders.append({"accept_id": accept_id, "claim": claim or "1.%d" % self.place, "attempt": attempt, "lease": 300, "complete": True,
                                 "inputs": {"files": self.inputs if inputs is None else inputs, "next": None}, "calc-info": info})
        return accept_id

    def runs(self):
        if not os.path.exists(self.ledger):
            return []
        with open(self.ledger) as text:
            return text.read().splitlines()

    def ends(self):
        """{accept_id: [the reasons of its ends]} as the relay was told."""
        found = {}
        for fields in list(self.fake.given):
            if fields.get("result") in ("calc end", "abnormal"):
                found.setdefault(fields["accept_id"], []).append(fields["reason"])
        return found


def handed_out(made):
    """Every way of a relay to have something done that was not signed, or not once."""
    alice = made.keys["alice"]
    good = signed(made.order(), alice)
    line, newline, armored = good.partition("\n")
    made.good = good
    made.hand_out(None, made.info(good))
    for word, text in (("not signed", None), ("not signed", ""), ("not signed", line), ("not signed", line + "\n"),
                       ("not signed", good[:-30]), ("not signed", line + "\n" + armored.replace("SSH SIGNATURE", "PGP SIGNATURE")),
                       ("not on this host's list", signed(made.order(), made.keys["mallory"])),
                       ("not signed", signed(made.order(), alice, SEAL.RESULT_SPACE)), ("does not fit", signed(made.order(), alice).partition("\n")[0] + "\n" + armored)):
        made.hand_out(word, made.info(text))
    for changes in ({"command": "other"}, {"parameters": "b"}, {"parameters": ""}, {"result_files": {}}, {"result_files": {"out.txt": {}, "in.txt": {}}},
                    {"result_patterns": ["**"]}):
        made.hand_out("not what was signed", made.info(signed(made.order(), alice), **changes))
    hello = made.inputs["in.txt"]
    for inputs in ({"in.txt": given(b"HELLO\n")}, {"ni.txt": hello}, {}, {"in.txt": hello, "more.txt": given(b"")}, {"in.txt": dict(hello, x=True)}, {"in.txt": hello, "d/": fake_relay.entry(b"")}):
        made.hand_out("not those that were signed", made.info(signed(made.order(), alice)), inputs)
    order = made.order()
    text = signed(order, alice)
    for key, value in order.items():                   # each field another one, under the same signature
        other = dict(order, **{key: value + 1 if isinstance(value, int) else value + ["x"] if isinstance(value, list) else value + "0"})
        made.hand_out("does not fit", made.info(json.dumps(other, sort_keys=True, separators=(",", ":")) + "\n" + text.partition("\n")[2]))
    now = int(time.time())
    for word, key, changes in (("for site", "alice", {"site": "elsewhere"}), ("signs for user", "alice", {"user": "bob"}), ("expired", "alice", {"expires": now - 1}),
                               ("expired", "alice", {"expires": now}), ("not come yet", "alice", {"not_before": now + 3600}),
                               ("began to remember", "alice", {"not_before": now - 3600}), ("began to remember", "alice", {"not_before": 1500000000}),
                               ("revoked", "old", {"user": "old"}), ("may not order", "narrow", {"user": "narrow"}), ("not in its time", "late", {"user": "late"}),
                               ("for site", "bob", {"user": "bob"}), ("what an order says", "alice", {"more": 1}), ("what an order says", "alice", {"v": 2}),
                               ("what an order says", "alice", {"nonce": "0"})):
        made.hand_out(word, made.info(signed(made.order(**changes), made.keys[key])))
    again = made.hand_out("used already", made.info(good))               # replayed: as another one, as its next attempt, under its old claim
    made.hand_out("used already", made.info(good), accept_id=again, attempt=2)
    made.hand_out("used already", made.info(good, rerun=1), accept_id=min(made.words), attempt=2)
    made.hand_out("used already", made.info(good, rerun=2), accept_id=min(made.words), attempt=3, claim="1.1")


def test_a_relay_that_was_taken_over_has_nothing_run_but_what_was_signed_and_that_once(tmp_path):
    made = TakenOver(str(tmp_path))
    handed_out(made)
    wanted = sum(map(len, made.words.values()))
    assert wanted > 45
    poller = suite.Process("mi_system_remote.py", ["poll", "--ini", made.ini], str(tmp_path))
    try:
        wait_until(lambda: sum(map(len, made.ends().values())) >= wanted and made.fake.ended >= wanted or not poller.alive(), 120)
        found = {accept_id: [(word, reason) for word, reason in zip(words, made.ends()[accept_id])] for accept_id, words in made.words.items()}
        wrong = [pair for pairs in found.values() for pair in pairs if not (pair[1] == "" if pair[0] is None else pair[0] in pair[1])]
        assert not wrong, wrong
        assert made.runs() == [min(made.words) + ".1 a"], made.runs()
        poller.stop()                                  # a poller that was started anew knows it from its disk
        again = made.hand_out("used already", made.info(made.good))
        poller = suite.Process("mi_system_remote.py", ["poll", "--ini", made.ini], str(tmp_path))
        assert "used already" in wait_until(lambda: made.ends().get(again))[0] and len(made.runs()) == 1
    finally:
        poller.kill()
        made.fake.stop()
    assert "Traceback" not in poller.text() and "bug=" not in poller.text()


def test_a_relay_that_says_it_is_a_fielded_one_has_nothing_run_and_gets_no_order(tmp_path):
    made, named = TakenOver(str(tmp_path)), []

    def fielded(request):
        def answer(first):
            return 200, json.dumps({"errors": [first]}).encode(), ()
        if request.name == "version":
            return 404, b"{}", ()
        if request.name == "calc-request" and not named:
            named.append(1)
            return answer({"code": 200, "message": "", "accept_id": fake_relay.ACCEPT_ID})
        if request.name == "calc-params":
            info = made.info(signed(made.order(), made.keys["alice"]), parameter_files={"in.txt": [base64.b64encode(b"hello\n").decode(), "x", "charset=binary"]})
            return 200, json.dumps({"calc-info": info}).encode(), ()
        return answer({"code": "0300" if request.name == "calc-request" else 200, "message": "status:x"})

    made.fake.misbehave = fielded
    poller = suite.Process("mi_system_remote.py", ["poll", "--ini", made.ini], str(tmp_path))
    try:
        wait_until(lambda: "end-send" in made.fake.names() or not poller.alive())
        assert made.runs() == [] and "not signed" in poller.text()
        (tmp_path / "in.txt").write_text("hello\n")
        done = suite.run("mi_system_wf.py", "run", "s", "work", "--in", "in.txt", "--out", "out.txt", "--sign-key", made.keys["alice"], "--url", made.fake.url,
                         "--token-file", os.path.join(made.folder, "token"), cwd=str(tmp_path))
        assert done.returncode == 76 and "add-calcinfo" not in made.fake.names(), done
    finally:
        poller.kill()
        made.fake.stop()


@pytest.mark.parametrize("point", ["order marked", "order used", "starting unnoted", "starting noted"])
def test_killed_at_any_point_of_its_use_an_order_runs_once(point, tmp_path):
    made = TakenOver(str(tmp_path))
    good = signed(made.order(), made.keys["alice"])
    first = made.hand_out(None, made.info(good))
    words = ["poll", "--ini", made.ini]
    poller = suite.Process("mi_system_remote.py", words, str(tmp_path), env=suite.clean_env(MI_FAULT=point))
    try:
        assert poller.popen.wait(20) == -9, poller.text()
        again = made.hand_out("used already", made.info(good))
        poller = suite.Process("mi_system_remote.py", words, str(tmp_path))
        wait_until(lambda: {first, again} <= set(made.ends()))
        assert made.ends()[first] == [""] and "used already" in made.ends()[again][0] and made.runs() == [first + ".1 a"]
    finally:
        poller.kill()
        made.fake.stop()


def test_what_a_relay_has_given_beside_the_signed_inputs_before_the_poller_was_killed_runs_with_no_order(tmp_path):
    made, large = TakenOver(str(tmp_path)), {"z.bin": fake_relay.entry(bytes(2 << 20))}
    order = signed(made.order(), made.keys["alice"])
    inputs, made.inputs = made.inputs, dict({"a.sh": given(b"planted")}, **dict(made.inputs, **large))
    answer, made.fake.misbehave = made.fake.misbehave, lambda request: (503, b"{}", ()) if "/input/" in request.path else answer(request)
    accept_id, words = made.hand_out(None, made.info(order)), ["poll", "--ini", made.ini]
    planted = os.path.join(made.folder, "base", accept_id, "a.sh")
    poller = suite.Process("mi_system_remote.py", words, str(tmp_path))
    try:
        wait_until(lambda: os.path.exists(planted))
        poller.kill()
        made.inputs = inputs
        poller = suite.Process("mi_system_remote.py", words, str(tmp_path))
        assert "not those that were signed" in wait_until(lambda: made.ends().get(accept_id))[0] and made.runs() == [] and not os.path.exists(planted)
    finally:
        poller.kill()
        made.fake.stop()


def test_where_the_last_signer_is_taken_away_no_unsigned_order_runs_until_the_owner_says_so(tmp_path):
    made, words = TakenOver(str(tmp_path)), ["poll", "--ini", str(tmp_path / "poller.ini")]
    poller = suite.Process("mi_system_remote.py", words, str(tmp_path))
    try:
        wait_until(lambda: os.path.exists(os.path.join(made.folder, "base", ".mi", "orders")))
        with open(made.ini) as text:
            lines = re.sub(r"\[signer (.*\n)*?(?=\[command)", "", text.read())
        with open(made.ini, "w") as out:
            out.write(lines)
        wait_until(lambda: "the old ini stays in force" in poller.text())
        unsigned = made.hand_out("not signed", made.info(None))
        assert "not signed" in wait_until(lambda: made.ends().get(unsigned))[0]
        poller.stop()
        poller = suite.Process("mi_system_remote.py", words, str(tmp_path))
        assert poller.popen.wait(20) == 78 and "who may order" in poller.text()
        with open(made.ini, "w") as out:
            out.write(lines.replace("site = s\n", "site = s\nrequire_signature = no\n"))
        unsigned = made.hand_out(None, made.info(None))
        poller = suite.Process("mi_system_remote.py", words, str(tmp_path))
        assert wait_until(lambda: made.ends().get(unsigned)) == [""] and made.runs() == [unsigned + ".1 a"]
    finally:
        poller.kill()
        made.fake.stop()


def test_an_order_that_waits_for_its_start_does_not_run_once_its_key_is_revoked(tmp_path):
    made, go = TakenOver(str(tmp_path)), tmp_path / "go"
    with open(os.path.join(made.folder, "work.sh"), "a") as out:
        out.write("while [ ! -e %s ]; do sleep 0.1; done\n" % go)
    with open(made.ini) as text:
        ini = text.read().replace("site = s\n", "site = s\njobs = 2\n").replace("match = work\n", "match = work\njobs = 1\n")
    with open(made.ini, "w") as out:
        out.write(ini)
    first, second = (made.hand_out(word, made.info(signed(made.order(), made.keys["alice"]))) for word in (None, "revoked"))
    poller = suite.Process("mi_system_remote.py", ["poll", "--ini", made.ini], str(tmp_path))
    try:
        wait_until(lambda: made.runs() and poller.text().count("calc-params-complete") == 2)
        with open(made.ini, "w") as out:
            out.write(ini.replace("[signer alice]\n", "[signer alice]\nrevoked = yes\n"))
        wait_until(lambda: " reload ini=" in poller.text())
        go.write_text("")
        wait_until(lambda: {first, second} <= set(made.ends()))
        assert len(made.runs()) == 1 and sum("revoked" in made.ends()[one][0] for one in (first, second)) == 1, made.ends()
    finally:
        go.write_text("")
        poller.kill()
        made.fake.stop()


DEFENCES = {  # what of a defence is taken away: (its text, what stands there then)
    "unsigned orders": ("        needed = self.needed(command)\n", "        needed = False\n"),
    "the list": ("    if key not in trusted:\n", "    if False:\n"),
    "the signature": ("    if not good:\n", "    if False:\n"),
    "the namespace": (" and named == space.encode()\n", "\n"),
    "S below the number of points": ("or s >= POINTS or", "or"),
    "what is asked for": ("        if other:\n            raise ValueError(_(\"what is asked", "        if False:\n            raise ValueError(_(\"what is asked"),
    "the inputs": ("if self.signed and sum_of_manifest(rows) != self.signed", "if False and sum_of_manifest(rows) != self.signed"),
    "revoked keys": ("        if signer.revoked:\n", "        if False:\n"),
    "whose key it is": ("        if order[\"user\"] != signer.user:\n", "        if False:\n"),
    "the site": ("        if not here:\n", "        if False:\n"),
    "the sites of a key": ("and (not signer.sites or order[\"site\"] in signer.sites)", ""),
    "the commands of a key": ("        if signer.commands and command", "        if False and command"),
    "a key's time": ("        if signer.since and now < signer.since or", "        if False and now < signer.since or False and"),
    "not before": ("        if now + CLOCK_SKEW < order", "        if False and now + CLOCK_SKEW < order"),
    "expired": ("        if now >= order[\"expires\"]:\n", "        if False:\n"),
    "expired in that moment": ("        if now >= order[\"expires\"]:\n", "        if now > order[\"expires\"]:\n"),
    "before the memory": ("< self.accept_after or order[\"not_before\"] + CLOCK_SKEW < self.begun(now):", "< self.accept_after or self.begun(now) < 0:"),
    "accept_after": ("if order[\"not_before\"] < self.accept_after or order[\"not_before\"] + CLOCK_SKEW < self.begun(now):", "if self.begun(now) < 0:"),
    "unknown fields": ("isinstance(order, dict) and set(order) == set(ORDER_FIELDS) and", "isinstance(order, dict) and"),
    "single use": ("        if found and found.group(1) != mark:\n", "        if False:\n"),
    "which run has used it": ("        if found and found.group(1) != mark:\n", "        if found:\n")}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """handed_out() as a list: [(word, calc-info, inputs, accept_id)], when it was made, and the poller's ini."""
    made = TakenOver(str(tmp_path_factory.mktemp("table")))
    handed_out(made)
    good = made.good.partition("\n")
    armor = good[2].split("\n")
    blob = bytearray(base64.b64decode("".join(armor[1:-2])))
    blob[-32:] = (int.from_bytes(blob[-32:], "little") + SEAL.POINTS).to_bytes(32, "little")
    made.hand_out("used already", made.info(made.good), accept_id="the same run")
    lines = base64.b64encode(bytes(blob)).decode()
    made.hand_out("does not fit", made.info("%s\n%s\n%s\n%s\n" % (good[0], armor[0], lines, armor[-2])))
    words = [(accept_id, word) for accept_id, found in made.words.items() for word in found]
    rows = []
    for order in made.fake.orders:
        place = next(n for n, (accept_id, word) in enumerate(words) if accept_id == order["accept_id"])
        rows.append((words.pop(place)[1], order["calc-info"], order["inputs"]["files"], order["accept_id"]))
    made.fake.stop()
    return rows, int(time.time()), made.ini


def judged_otherwise(module, table, folder):
    """The rows of the table that this module judges otherwise than it should."""
    rows, now, ini = table
    settings = module.read_ini(ini, module.INI_KEYS)
    folder.mkdir()
    rules = module.order_rules(ini, settings, "poller", os.fsencode(str(folder)), ["s"])
    commands = module.commands_of(ini, settings)
    rules.begun(now)

    def judge(info, inputs, control, now):
        run = types.SimpleNamespace(order=dict(info, result_files=info["result_files"]), gate=types.SimpleNamespace(orders=rules),
                                    command=commands[info["command"]], last=lambda what: None, signed={})
        wanted = dict({key: info[key] for key in ("command", "parameters", "result_patterns")}, result_files=sorted(info["result_files"]))
        run.signed = rules.permit(info.get("signed", ""), wanted, run.command, now)
        module.GateRun.permit_inputs(run, [(name, one["size"], one["sha256"], one.get("x", False)) for name, one in inputs.items()])
        rules.use(run.signed, run.command, control, now)

    for number, (word, info, inputs, accept_id) in enumerate(rows):
        control = os.path.join(os.fsencode(str(folder)), b"%d" % number)
        os.makedirs(control)
        try:
            judge(info, inputs, control, now)
            if number == 0:                            # the same run once more, as after a crash
                rules.use(rules.permit(info["signed"], {}, commands["work"], now), commands["work"], control, now)
            said = None
        except module.Forbidden as error:
            said = str(error)
        except KeyError as error:
            said = repr(error)
        if (said is None) != (word is None) or word and word not in said:
            yield word, said
    try:
        judge(rows[0][1], rows[0][2], control, json.loads(rows[0][1]["signed"].partition("\n")[0])["expires"])
        yield "the moment of its end"
    except module.Forbidden as error:
        if "expired" not in str(error):
            yield str(error)


def test_each_defence_is_what_stops_its_way(table, tmp_path):
    with open(suite.script("mi_system_remote.py"), encoding="utf-8") as text:
        blocks = "".join(found.group(0) + "\n" for found in shared_blocks.BLOCK.finditer(text.read()) if found.group(1) in ("watch", "seal", "sign"))
    assert list(judged_otherwise(SEAL, table, tmp_path / "whole")) == []
    for number, (name, (old, new)) in enumerate(sorted(DEFENCES.items())):
        assert blocks.count(old) == 1, (name, blocks.count(old))
        without = dict(vars(SEAL))
        exec(compile(blocks.replace(old, new), name, "exec"), without)
        assert next(judged_otherwise(types.SimpleNamespace(**without), table, tmp_path / str(number)), None), "nothing misses: " + name


class Results:
    """A relay with the results of a calculation, which it may change. order: the text that was signed; alter(info, server, statement): what it does."""

    def __init__(self, folder):
        suite.needs("ssh-keygen")
        self.folder, self.alter = folder, None
        self.keys = {name: os.path.join(folder, name) for name in ("alice", "gate", "mallory")}
        for name, path in self.keys.items():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
        self.fake = fake_relay.Fake(misbehave=self.hand_over)
        self.hold = {}                                 # what an earlier calculation had
        self.orders, self.remembers = [], False

    def statement(self, results, order, key="gate", space=None, said=None, **more):
        """What the gate signs."""
        told = dict({"v": 1, "site": "s", "run": fake_relay.ACCEPT_ID + ".1", "exit_code": 0, "signal": None, "reason": "", "release": "", "rules": "0" * 64,
                     "order": hashlib.sha256(order.partition("\n")[0].encode()).hexdigest(),
                     "manifest": SEAL.sum_of_manifest((name, len(data), hashlib.sha256(data).hexdigest(), False) for name, data in results.items()),
                     "stays": hashlib.sha256(json.dumps(said or {"missing": {}, "refused": {}, "verdicts": {}}, sort_keys=True).encode()).hexdigest()}, **more)
        return SEAL.signed_text(told, self.keys[key], space or SEAL.RESULT_SPACE)

    def hand_over(self, request):
        server = self.fake
        if request.name == "add-calcinfo":
            data = request.rfile.peek(request.left)[:request.left]
            self.orders.append(json.loads(data.decode())["calc-info"].get("signed", ""))
        if request.name == "get-calc-result":
            server.results, server.info = {"out.txt": b"result\n"}, {"verdicts": {}}
            server.info.update(self.alter(server, self.orders[-1]) or {})
        return None

    def fetched(self, alter):
        """What becomes of a calculation whose results the relay alters: exit code or that of a Stop; and is there a result?"""
        self.alter, to = alter, os.path.join(self.folder, "to%d" % len(self.orders))
        if not self.remembers:                         # (this relay has one accept_id)
            shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)
            os.mkdir(os.environ["XDG_STATE_HOME"])
        try:
            code = WF.run(self.fake.url, "s", "work", [], ["out.txt", "more*"], token="t" * 64, to=to, sign_key=self.keys["alice"],
                          require_signed_by=self.keys["gate"] + ".pub").exit_code
        except WF.Stop as stop:
            code = "%d %s" % (stop.code, stop)
        return code, os.path.exists(os.path.join(to, "out.txt"))


GOOD = {"out.txt": b"result\n"}
REASONS = {"missing": {"x": "not there"}, "refused": {"*": "refused: 1"}, "verdicts": {"refused": {"count": 1, "names": []}}}


def with_results(made, results, **more):
    """A relay that gives other results than were signed."""
    def alter(server, order):
        server.results = results
        return dict({"signed": made.statement(GOOD, order)}, **more)
    return alter


def altered(made):
    """{name: (what a relay does with the results, the exit code, is there a result?)}; code 76: they are not believed."""
    old = made.statement(GOOD, "an older order")
    say = lambda **how: lambda server, order: {"signed": made.statement(GOOD, order, **how)}     # noqa: E731
    change = lambda turn: lambda server, order: {"signed": turn(made.statement(GOOD, order))}     # noqa: E731
    found = {
        "in order": (say(), 0), "exit code": (lambda server, order: {"signed": made.statement(GOOD, order, exit_code=3, reason="exit code 3"), "exit_code": 0}, 3),
        "signal": (lambda server, order: {"signed": made.statement(GOOD, order, exit_code=137, signal=9), "exit_code": 0, "signal": None}, 137),
        "it was refused": (lambda server, order: {"signed": made.statement(GOOD, order, exit_code=None, reason="refused: no"), "exit_code": 0}, 77),
        "success made of nothing": (lambda server, order: {"signed": made.statement(GOOD, order, exit_code=None, reason="disk"), "exit_code": 0}, 74),
        "not signed": (lambda server, order: {}, 76), "empty": (lambda server, order: {"signed": ""}, 76), "no text": (lambda server, order: {"signed": [1]}, 76),
        "null": (lambda server, order: {"signed": None}, 76), "forged": (say(key="mallory"), 76), "the orderer's own key": (say(key="alice"), 76),
        "an order's signature": (say(space=SEAL.ORDER_SPACE), 76), "of another calculation": (lambda server, order: {"signed": old}, 76),
        "of another site": (say(site="elsewhere"), 76), "another form": (say(v=2), 76),
        "cut off": (change(lambda text: text[:-40]), 76), "only its line": (change(lambda text: text.partition("\n")[0]), 76),
        "its line cut": (change(lambda text: text[3:]), 76), "exit code in it": (change(lambda text: text.replace('"exit_code":0', '"exit_code":1')), 76),
        "other bytes": (with_results(made, {"out.txt": b"RESULT\n"}), 76), "fewer": (with_results(made, {}), 76),
        "more": (with_results(made, dict(GOOD, more=b"x")), 76), "swapped names": (with_results(made, {"more": GOOD["out.txt"]}), 76),
        "an empty one": (with_results(made, {"out.txt": b""}), 76),
        "what stays is not told": (say(said=REASONS), 76), "what stays is made up": (with_results(made, GOOD, **REASONS), 76),
        "what stays": (lambda server, order: dict(REASONS, signed=made.statement(GOOD, order, said=REASONS)), 65)}
    return found


def test_results_are_believed_only_as_they_were_signed_for_this_order_and_nothing_else_is_put_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = Results(str(tmp_path))
    try:
        wrong = {}
        for name, (alter, code) in altered(made).items():
            found, there = made.fetched(alter)
            if not (found == code and there or code == 76 and str(found).startswith("76 ") and not there):
                wrong[name] = found, there
        assert not wrong, wrong
        last = made.orders[-1]
        code, there = made.fetched(lambda server, order: {"signed": made.statement(GOOD, last)})         # repeated: of the same request before
        assert str(code).startswith("76 ") and not there
        with open(made.keys["gate"] + ".pub", "w") as out:
            out.write("nothing\n")
        assert str(made.fetched(lambda server, order: {"signed": made.statement(GOOD, order)})[0]).startswith("76 ")
    finally:
        made.fake.stop()


def test_a_relay_that_gives_two_calculations_one_name_cannot_give_the_results_of_one_for_those_of_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made, second = Results(str(tmp_path)), []

    def swapped(server, order):                        # while the first one waits, another process orders, too
        if not second:
            second.append(WF.signed_order(dict(json.loads(order.partition("\n")[0]), request_id="another"), made.keys["alice"]))
            WF.remember(types.SimpleNamespace(url=made.fake.url), fake_relay.ACCEPT_ID, WF.Order("s", "work", "", ["out.txt"], ["more*"], "another"), signed=second[0])
        return {"signed": made.statement(GOOD, second[0])}

    try:
        code, there = made.fetched(swapped)
        assert str(code).startswith("76 ") and "order" in code and not there, code
        made.remembers = True
        code, there = made.fetched(lambda server, order: {"signed": made.statement(GOOD, order)})
        assert str(code).startswith("76 ") and "another calculation" in code and not there, code
    finally:
        made.fake.stop()


WITHOUT = {  # what of a defence is taken away: (its text, what stands there then, the way that is open then)
    "the signature": ("    check_signature(line", "    (lambda *words: None)(line", "forged"),
    "whose exit code": ("exit_code=told[", "exit_code=info[", "exit code")}
WITHOUT.update((key, ("if told.get(key) !=", "if key != %r and told.get(key) !=" % key, way)) for key, way in (
    ("v", "another form"), ("order", "of another calculation"), ("site", "of another site"), ("manifest", "other bytes"), ("stays", "what stays is not told")))


def test_each_defence_is_what_keeps_a_result_from_being_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made, source = Results(str(tmp_path)), inspect.getsource(WF.believed)
    try:
        for name, (old, new, way) in WITHOUT.items():
            assert source.count(old) == 1, name
            space = dict(vars(WF))
            exec(compile(source.replace(old, new), name, "exec"), space)
            monkeypatch.setattr(WF, "believed", space["believed"])
            alter, code = altered(made)[way]
            assert made.fetched(alter)[0] in (0, 65), "nothing misses: " + name
    finally:
        made.fake.stop()


# ---- the same through the guard of the SSH way

GUARD_INI = "site = hpc\n[signer alice]\nkey = %s\n"


def order_there(key, name="a", data=b"1", **changes):
    """A signed order for the guard, as the runner makes it."""
    now = int(time.time())
    rows = [(name, len(data), hashlib.sha256(data).hexdigest(), False)]
    return signed(dict({"v": 1, "site": "hpc", "user": "alice", "request_id": "r", "command": "work.sh abc", "parameters": "", "inputs": SEAL.sum_of_manifest(rows),
                        "result_files": [], "result_patterns": list(ssh_door.runner.EVERYTHING), "nonce": os.urandom(16).hex(), "not_before": now,
                        "expires": now + 600}, **changes), key)


def test_the_guard_runs_what_was_signed_and_that_once_for_all_keys(tmp_path):
    suite.needs("ssh-keygen")
    keys = {name: str(tmp_path / name) for name in ("alice", "mallory")}
    for name, path in keys.items():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
    with open(keys["alice"] + ".pub") as text:
        host = ssh_door.Far(tmp_path / "far", GUARD_INI % text.read())
    good, now, wrong = order_there(keys["alice"]), int(time.time()), []
    for word, more in [("not signed", {})] + [(word, {"signed": text}) for word, text in (
            ("not on this host's list", order_there(keys["mallory"])), ("not what was signed", order_there(keys["alice"], command="work.sh xyz")),
            ("not those that were signed", order_there(keys["alice"], data=b"2")), ("not those that were signed", order_there(keys["alice"], "b")),
            ("for site", order_there(keys["alice"], site="u")), ("expired", order_there(keys["alice"], expires=now)), ("not signed", good[:-50]),
            ("does not fit", good.replace("abc", "abd")), (None, good), ("used already", good))]:
        with host.open(host.fresh()) as one:
            one.put("a", b"1")
            told = one.ask("start", command="work.sh abc", **more)[0][0]
            if (word is None) != ("no" not in told) or word and word not in told["why"]:
                wrong.append((word, told))
            if word is None:
                again = one.ask("start", command="work.sh abc", signed=good)[0][0]         # as after a lost line
                assert "no" not in again, again
                assert one.ask("wait", offset=0)[-1][0]["code"] == 0
    assert not wrong, wrong
    other = host.popen(ssh_door.request(*ssh_door.START), more=["--key", "other"])
    with ssh_door.Session(other, host.fresh()) as one:
        one.put("a", b"1")
        assert "used already" in one.ask("start", command="work.sh abc", signed=good)[0][0]["why"]


def test_an_order_that_waits_for_a_licence_behind_a_guard_does_not_run_once_its_key_is_revoked(tmp_path):
    suite.needs("ssh-keygen")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "alice", "-f", str(tmp_path / "alice")], check=True)
    does = "while [ ! -e %s ]; do sleep 0.1; done; echo x >>%s" % (tmp_path / "go", tmp_path / "ledger")
    host = ssh_door.Far(tmp_path / "far", GUARD_INI % (tmp_path / "alice.pub").read_text() + "[command wait]\nargv = /bin/sh\n  -c\n  %s\nmatch = wait\njobs = 1\n" % does)
    names = host.fresh(), host.fresh()
    first, second = map(host.open, names)
    with first, second:
        for one in (first, second):
            one.put("a", b"1")
            assert "no" not in one.ask("start", command="wait", signed=order_there(str(tmp_path / "alice"), command="wait"))[0][0]
            wait_until(lambda: first.ask("state")[0][0]["state"] == "running")
        assert second.ask("state")[0][0]["state"] == "queued"
        with open(host.path("ini")) as text:
            ini = text.read()
        host.write("ini", ini.replace("[signer alice]\n", "[signer alice]\nrevoked = yes\n"))
        (tmp_path / "go").write_text("")
    with host.open(names[1]) as one:
        told = one.ask("wait", offset=0)[-1][0]
        assert told["code"] is None and "revoked" in told["why"] and (tmp_path / "ledger").read_text() == "x\n", told


def test_the_runner_signs_what_it_has_run_behind_a_guard(tmp_path):
    suite.needs("ssh-keygen", "sshd")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "alice", "-f", str(tmp_path / "alice")], check=True)
    (tmp_path / "a").write_text("1")
    (tmp_path / "empty").mkdir()
    lab = ssh_lab.Lab()
    try:
        lab.guard("site = guarded\nresult_key = %s\n[signer alice]\nkey = %s\n[command work]\nargv = /bin/cp\n  a\n  b\nmatch = copy\n" % (lab.path("gate"), (tmp_path / "alice.pub").read_text()),
                  python=suite.PYTHON)
        lab.start()
        for more, wanted in (([], 77), (["--sign-key", str(tmp_path / "alice"), "--require-signed-by", lab.path("gate.pub")], 0),
                             (["--sign-key", str(tmp_path / "alice"), "--require-signed-by", str(tmp_path / "alice.pub")], 76)):
            if (tmp_path / "b").exists():
                (tmp_path / "b").unlink()
            done = subprocess.run([suite.PYTHON, ssh_lab.SCRIPT, "--ini", lab.path("ini"), "run", "guarded", "copy", "--in", "a", "empty"] + more, cwd=str(tmp_path),
                                  env=lab.env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert done.returncode == wanted and ("not signed" in done.stdout.decode()) == (wanted == 77), done.stdout.decode()
            assert (tmp_path / "b").exists() == (wanted == 0)
        assert [name for name in os.listdir(str(tmp_path)) if name.endswith(".signed")]
    finally:
        lab.close()
