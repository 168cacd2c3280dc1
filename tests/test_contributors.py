"""README.md of this directory is a map that can be trusted: every file is on it, and nothing that is not there."""
import os
import re
import subprocess

import suite

with open(os.path.join(suite.HERE, "README.md"), encoding="utf-8") as text:
    MAP = text.read()
DATA = {"PROTOCOL.md", "README.md", "openapi.json", "calculix", "old_state"}          # named in the lines of what uses them


def here():
    """What git knows, or would take, of this directory's files; directories once."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "."], cwd=suite.HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    names = done.stdout.decode().splitlines() if done.returncode == 0 else [name for name in os.listdir(suite.HERE) if name != "__pycache__"]
    return {name.split("/")[0] for name in names if os.path.exists(os.path.join(suite.HERE, name))}


def test_every_file_is_on_the_map_once_and_nothing_that_is_not_there():
    rows = re.findall(r"^\| `([\w./]+)` \|", MAP, re.M)
    assert len(rows) == len(set(rows)), [row for row in rows if rows.count(row) > 1]
    told = {row.rstrip("/") for row in rows}
    assert told == here() - DATA, (told ^ (here() - DATA))
    for name in DATA - {"README.md"}:
        assert name in MAP, name


def test_what_the_recipes_name_is_there():
    texts = ""
    for name in os.listdir(suite.ROOT) + [os.path.join("tests", name) for name in os.listdir(suite.HERE)]:
        if name.endswith((".py", ".sh", ".ini")) and os.path.isfile(os.path.join(suite.ROOT, name)):
            with open(os.path.join(suite.ROOT, name), encoding="utf-8") as text:
                texts += text.read()
    part = MAP[MAP.index("## How the labs work"):]
    words = {word for word in re.findall(r"`([A-Za-z_][\w.]*)`", part) if not word.endswith((".py", ".md", ".json"))}
    missing = {word for word in words if not re.search(r"\b%s\b" % re.escape(word.split(".")[-1]), texts)}
    assert len(words) > 20 and not missing, missing
    files = set(re.findall(r"`([\w/]+\.(?:py|md|json|ini))`", part))
    lost = {name for name in files if not any(os.path.exists(os.path.join(top, name)) for top in (suite.ROOT, suite.HERE))}
    assert not lost, lost


def test_run_sh_with_a_file_runs_that_file_and_no_benches():
    done = subprocess.run(["sh", "tests/run.sh", "tests/test_contributors.py", "-k", "recipes"], cwd=suite.ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0 and b"1 passed" in done.stdout and b"==" not in done.stdout, done.stdout.decode()
