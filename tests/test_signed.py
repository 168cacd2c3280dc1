"""Signed orders and results: an external computer runs only what a person on its list has signed, each order once; results are taken only if it has
signed them. The relay in between can drop work, and do nothing else."""
import json
import os
import subprocess

import pytest
import suite
from suite import wait_until


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
