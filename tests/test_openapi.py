"""The relay's calls described in tests/openapi.json, and schemathesis let loose on them: never a 500, always the envelope."""
import os
import re
import subprocess
import sys

import documents
import suite


def test_the_description_is_that_of_the_relays_routes():
    assert documents.written("openapi.json") == documents.made()["openapi.json"], "python3 tests/documents.py"


def test_no_call_that_the_description_allows_makes_the_relay_fail(make_world, request):
    world = make_world(commands=["hello"], sites=(suite.SITE, "u-other"), ini="[Server]\nauth = login\n[limits]\nunauthenticated_per_address = 1000\n"
                       "calculations_per_user = 0\n").start()
    token = world.issue("alice", "--roles", "workflow,remote,operator")
    most = "300" if request.config.getoption("--long") else "10"
    done = subprocess.run([sys.executable, "-m", "schemathesis.cli", "run", os.path.join(suite.HERE, "openapi.json"), "--url", world.url, "--tls-verify", world.cert,
                           "-H", "Authorization: Bearer " + token, "--checks", "not_a_server_error,content_type_conformance,response_schema_conformance",
                           "--phases", "coverage,fuzzing", "--max-examples", most, "--no-shrink", "--suppress-health-check", "all", "--max-failures", "5", "--warnings", "off",
                           "--generation-database", "none"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=world.folder, timeout=1800)
    text = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, text[-5000:]
    assert re.search(r"[1-9]\d* (generated|passed)", text), text[-2000:]
    assert world.relay.alive() and "bug=" not in world.relay.text()
