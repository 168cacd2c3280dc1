"""A relay restored from an older backup: what had been delivered since is asked for again, sent again, and nothing is run twice."""
import os
import shutil
import subprocess

import pytest

import suite
from suite import wait_until
from test_mutations import TIMES, Site

RELAY = "mi_dicomapi.py"


@pytest.fixture
def site(tmp_path):
    made = Site(str(tmp_path), "sleep 1")
    yield made
    made.world.close()


def restore(site):
    """The relay dies, its state is lost, and its backup takes its place."""
    site.world.relay.kill()
    shutil.rmtree(site.world.state)
    assert suite.run(RELAY, "restore", os.path.join(site.world.folder, "backup"), "--ini", site.world.ini).returncode == 0
    site.world.start()


def delivered_then_lost(site, backup_when):
    """The accept_id of a calculation that came to its end after the relay's backup was taken."""
    site.world.extra = TIMES + "restore_grace = 1s\nwait = 2s\n"
    site.world.start()
    accept_id = site.world.client().register("work", results=["out.txt"])
    backup = os.path.join(site.world.folder, "backup")

    def save():
        assert suite.run(RELAY, "backup", backup, "--ini", site.world.ini).returncode == 0
    if backup_when == "waiting":
        save()
    site.poller()
    if backup_when == "running":
        wait_until(site.runs)
        save()
    assert site.over(accept_id) == []
    restore(site)
    return accept_id


@pytest.mark.parametrize("backup_when", ["waiting", "running"])
@pytest.mark.parametrize("attempts", [1, 2])
def test_what_was_delivered_since_the_backup_is_sent_again_and_not_run_again(site, backup_when, attempts):
    accept_id = delivered_then_lost(site, backup_when)
    for attempt in range(attempts):
        assert site.over(accept_id) == []
        client = site.world.client()
        found = client.ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]
        assert (found["status"], found["exit_code"], sorted(found["missing"])) == ("completed", 0, [])
        assert client.raw("GET", "files/%s/result/0?v=2" % accept_id)[1] == b"done\n"
        assert site.twice() == []
        if attempt + 1 < attempts:                     # and once more from the same backup
            restore(site)


def test_a_workflow_side_that_waits_sends_its_inputs_again_when_the_restored_relay_lacks_them(site):
    site.world.extra = TIMES + "restore_grace = 1s\nwait = 2s\n"
    site.world.start(suite.clean_env(MI_FAULT="files received"))
    with open(os.path.join(site.world.folder, "in"), "wb") as out:
        out.write(os.urandom(3 << 20))
    with open(os.path.join(site.world.folder, "said"), "wb") as said:
        module = subprocess.Popen([suite.PYTHON, suite.script("mi_system_wf.py"), "run", suite.SITE, "work", "--in", "in", "--out", "out.txt"]
                                  + site.world.reach(), cwd=site.world.folder, stdout=said, stderr=said, env=suite.clean_env())
    site.world.relay.popen.wait(30)
    assert suite.run(RELAY, "backup", os.path.join(site.world.folder, "backup"), "--ini", site.world.ini).returncode == 0
    site.world.start()
    wait_until(lambda: site.world.rows("SELECT 1 FROM calculations WHERE state = 'allowed'"), 40)
    restore(site)
    site.poller()
    assert module.wait(90) == 0, open(os.path.join(site.world.folder, "said")).read()
    assert len(site.runs()) == 1


def test_who_waits_for_inputs_that_nobody_sends_is_told_so(site):
    site.world.extra = TIMES + "wait = 2s\n"
    site.world.start(suite.clean_env(MI_FAULT="files received"))
    with open(os.path.join(site.world.folder, "in"), "wb") as out:
        out.write(os.urandom(3 << 20))
    hasty = "import mi_system_wf as wf; wf.INPUTS_IDLE = 3; wf.run_as_program(wf.main)"            # a minute otherwise

    def module(*words):
        return subprocess.Popen([suite.PYTHON, "-c", hasty] + list(words) + site.world.reach(), cwd=site.world.folder, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=suite.clean_env(PYTHONPATH=os.path.dirname(suite.script(RELAY))))

    words = "submit", suite.SITE, "work", "--in", "in", "--out", "out.txt", "--request-id", "r1"
    submit = module(*words)
    site.world.relay.popen.wait(30)
    submit.kill()
    submit.communicate()
    site.world.start()
    (row,) = site.world.rows("SELECT accept_id, state FROM calculations")
    assert row["state"] == "registered"
    waiting = module("wait", row["accept_id"])
    said = waiting.communicate(timeout=100)[0].decode()
    assert waiting.returncode == 66 and "nobody sends them" in said and "the same submit with its --request-id" in said, said
    for words in (words, ("wait", row["accept_id"])):
        again = module(*words)
        said = again.communicate(timeout=60)[0].decode()
        assert again.returncode == 0, said
        if words[0] == "submit":
            site.poller()
    assert len(site.runs()) == 1


@pytest.mark.parametrize("point", ["hand over", "handed over", "resend noted"])
def test_a_poller_that_dies_while_it_hands_the_result_over_sends_it_at_its_next_start(site, point):
    accept_id = delivered_then_lost(site, "waiting")
    site.world.pollers[-1].kill()
    dying = site.poller(fault=point)
    assert dying.popen.wait(60) == -9
    site.poller()
    assert site.over(accept_id) == [] and site.twice() == []
    assert site.world.client().ok("GET", "get-calc-result", {"v": 2, "accept_id": accept_id})["result-info"]["status"] == "completed"
