"""The torture in short: see torture.py. With --long: an hour of it, and 5,000 calculations."""
import json
import os
import subprocess
import sys

import suite


def torture(*words, timeout):
    """One run: its summary."""
    done = subprocess.run([sys.executable, os.path.join(suite.HERE, "torture.py")] + list(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=timeout)
    assert done.stdout, done.stderr.decode("utf-8", "replace")[-3000:]
    found = json.loads(done.stdout.decode("utf-8"))
    sys.stdout.write(json.dumps({key: found[key] for key in ("seed", "calculations", "seconds", "kills", "network", "events", "points hit")}))
    assert found["violations"] == [], found
    return found


def test_death_at_every_named_point_and_a_bad_network_lose_nothing_and_run_nothing_twice(request):
    if request.config.getoption("--long"):
        found = torture("--calculations", "40000", "--minutes", "62", "--all-points", "--rounds", "6", "--rate", "0.05", timeout=6000)
        assert found["calculations"] >= 5000 and found["seconds"] >= 3600
    else:
        found = torture("--calculations", "220", "--minutes", "0.8", "--all-points", "--extra", "900", "--modules", "32", "--rate", "0.04",
                        "--only", "clock,full relay,clock,full poller,clock,shoot,reboot,clock", timeout=1300)
        assert found["calculations"] >= 100
    assert found["points missed"] == {"relay": [], "poller": [], "workflow": []}


def test_a_relay_restored_from_an_older_backup_runs_nothing_twice():
    found = torture("--calculations", "60", "--minutes", "0.4", "--modules", "24", "--rate", "0.03", "--only", "backup,restore", timeout=400)
    assert found["events"]["restore"] == 1
