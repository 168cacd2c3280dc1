"""Several that fetch into one directory at once, killed at each named point: right bytes or a clear no, never a mixture."""
import hashlib
import os
import re
import signal
import subprocess

import pytest

import ssh_lab
import suite
import torture
from suite import LOGS, PYTHON, SITE

POINTS = [name for name in torture.named(open(suite.script("mi_system_wf.py"), encoding="utf-8").read())
          if name not in ("registered", "inputs sent", "allowed", "results at relay", "stage made", "lock made")]
CLEAR = (-9, 74, 75)            # killed; or it says that another one is at work there, and that nothing is lost
KILLED = """import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("runner", %r)
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
times = iter(range(10 ** 6))
runner.point = runner.fault = lambda name: name == %r and next(times) == %d and os.kill(os.getpid(), 9)
runner.run_as_program(runner.main)
"""


def contents(mark, large=6 << 20):
    """Results of one calculation, told apart from another's by mark in each byte."""
    found = {"res": mark * large, "x16": mark * 1500, ".x16.mi-part": mark * 1600, "d/e/f": mark * 70000}
    found.update(("s%02d" % n, mark * (n * 37)) for n in range(40))
    return found


def stored(folder):
    """{name: bytes} of all files below a directory, but the logs, and what a killed one has left (see ours())."""
    found = {}
    for top, folders, names in os.walk(str(folder)):
        for name in names:
            with open(os.path.join(top, name), "rb") as source:
                found[os.path.relpath(os.path.join(top, name), str(folder))] = source.read()
    return {name: data for name, data in found.items() if name not in LOGS + ("remote_program_exec.log",) and not name.startswith(".mi-")}


def ours(folder):
    """What is left of storing beside the results."""
    return [name for name in os.listdir(str(folder)) if name.startswith(".mi")]


def digest(files):
    """Short, for a failing test's text."""
    return {name: (len(data), hashlib.sha256(data).hexdigest()[:8]) for name, data in files.items()}


# ---- the workflow side

@pytest.fixture(scope="module")
def fetchable(world):
    """A function that makes a calculation whose results are at the relay: its accept_id."""
    client = world.client()

    def made(mark):
        results = dict(sorted(dict(contents(mark), **{name: b"log" for name in LOGS}).items()))
        accept_id = client.register("hello", results=[name for name in results if name not in LOGS])
        claimed, claim = client.claim()
        assert claimed == accept_id
        client.walk(accept_id, claim, "end-send", results)
        return accept_id

    return made


def fetch(world, accept_id, to, point=""):
    """`result` of the workflow side, started."""
    env = suite.clean_env(MI_FAULT=point) if point else suite.clean_env()
    words = [PYTHON, "-I", "-S", suite.script("mi_system_wf.py"), "result", accept_id, "--to", str(to), "--out", "res", "s*", "x16", ".x16.*", "d/"] + world.reach()
    return subprocess.Popen(suite.started_as(words, env), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ends(processes):
    """[(exit code, text)]"""
    texts = [process.communicate(timeout=90)[0].decode("utf-8") for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts)]


@pytest.mark.parametrize("count, point", [(2, ""), (8, "")] + [(3, point) for point in POINTS])
def test_fetchers_of_one_result_end_with_its_bytes_or_a_clear_no(world, fetchable, tmp_path, count, point):
    accept_id, to = fetchable(b"A"), tmp_path / "to"
    ended = ends([fetch(world, accept_id, to, point if number == 0 else "") for number in range(count)])
    assert all(code in (0,) + CLEAR and "Traceback" not in text for code, text in ended), ended
    assert all("at work" in text or "another" in text for code, text in ended if code in (74, 75)), ended
    if any(code == 0 for code, text in ended):
        assert stored(to) == contents(b"A") or digest(stored(to)) == {}
    (code, text), = ends([fetch(world, accept_id, to)])
    assert code == 0 and digest(stored(to)) == digest(contents(b"A")) and ours(to) == [], text


def test_runs_with_one_request_id_end_with_the_bytes_of_one_calculation_or_a_clear_no(make_world, tmp_path):
    world = make_world(tls=False, commands=["leaves"]).start()
    world.poller({"leaves": "match = leaves\nargv = %s\n  %s\n  A" % (PYTHON, leaving(tmp_path))})
    reach, to = world.reach(), tmp_path / "to"

    def run(point=""):
        env = suite.clean_env(MI_FAULT=point) if point else suite.clean_env()
        words = [PYTHON, "-I", "-S", suite.script("mi_system_wf.py"), "run", SITE, "leaves", "--request-id", "one", "--to", str(to), "--out", "res", "s*", "x16", ".x16.*", "d/"]
        return subprocess.Popen(suite.started_as(words + reach, env), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    ended = ends([run(point) for point in ("part noted", "stored", "parts gone", "", "", "")])
    assert all(code in (0,) + CLEAR and "Traceback" not in text for code, text in ended), ended
    assert world.rows("SELECT count(*) AS n FROM calculations")[0]["n"] == 1
    (code, text), = ends([run()])
    assert code == 0 and digest(stored(to)) == digest(contents(b"A")) and ours(to) == [], text


def test_fetchers_of_two_results_into_one_directory_leave_whole_files(world, fetchable, tmp_path):
    ids = {fetchable(mark): mark for mark in (b"A", b"B")}
    ended = ends([fetch(world, accept_id, tmp_path / "to") for accept_id in list(ids) * 2])
    assert all(code in (0,) + CLEAR and "Traceback" not in text for code, text in ended) and any(code == 0 for code, text in ended), ended
    found = stored(tmp_path / "to")
    assert all(data in (contents(b"A")[name], contents(b"B")[name]) for name, data in found.items()), digest(found)


# ---- the SSH runner

@pytest.fixture(scope="module")
def lab():
    one = ssh_lab.Lab().start()
    yield one
    one.close()


def start(lab, here, *words, **how):
    """The runner in a directory. point: where it is killed, when it comes there again after `times` times."""
    program = ["-c", KILLED % (ssh_lab.SCRIPT, how["point"], how.get("times", 0))] if how.get("point") else [ssh_lab.SCRIPT]
    return subprocess.Popen([PYTHON] + program + list(words) + (["--ini", lab.path("ini")] if words[0] == "run" else []), cwd=str(here), env=dict(lab.env(), XDG_STATE_HOME=str(here / "state")),
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def leaves(here, mark, large=6 << 20):
    """The words of a run whose command leaves contents(mark)."""
    return "run", "hpc", "%s %s %s" % (PYTHON, leaving(here, large), mark.decode()), "--to", "to"


def leaving(here, large=6 << 20):
    """The path of a command that leaves contents() of its argument."""
    code = "import os, sys\nm = sys.argv[1].encode()\nos.makedirs('d/e')\nfor n in range(40): open('s%02d' % n, 'wb').write(m * (n * 37))\n"
    code += "".join("open(%r, 'wb').write(m * %d)\n" % pair for pair in (("res", large), ("x16", 1500), (".x16.mi-part", 1600), ("d/e/f", 70000)))
    (here / "leaves.py").write_text(code)
    return str(here / "leaves.py")


@pytest.mark.parametrize("point", ["", "listing", "fetching", "part written", "fetched"])
def test_runs_into_one_directory_end_with_whole_files_or_a_clear_no(lab, tmp_path, point):
    (tmp_path / "to").mkdir()
    ended = ends([start(lab, tmp_path, *leaves(tmp_path, mark), point=point if mark == b"C" else "") for mark in (b"A", b"B", b"C")])
    assert all(code in (0, 65) + CLEAR and "Traceback" not in text for code, text in ended), ended
    assert all("left as it is" in text for code, text in ended if code == 65), ended
    found, choices = stored(tmp_path / "to"), [contents(mark) for mark in (b"A", b"B", b"C")]
    wrong = {name: data for name, data in found.items() if name in choices[0] and data not in [choice[name] for choice in choices]}
    assert not wrong, digest(wrong)
    assert set(found) >= set(choices[0]), sorted(set(choices[0]) - set(found))


def test_two_that_resume_one_run_end_with_its_bytes_or_a_clear_no(lab, tmp_path):
    (tmp_path / "to").mkdir()
    (code, text), = ends([start(lab, tmp_path, *leaves(tmp_path, b"A"), point="fetching")])
    assert code == -signal.SIGKILL, text
    (code, text), = ends([start(lab, tmp_path, "list")])
    ident = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text).group()
    ended = ends([start(lab, tmp_path, "resume", ident) for number in range(2)])
    assert any(code == 0 for code, text in ended) and all(code in (0, 75) for code, text in ended), ended
    assert {name: data for name, data in digest(stored(tmp_path / "to")).items() if name in contents(b"A")} == digest(contents(b"A"))


@pytest.mark.parametrize("point, times", [("part noted", 7), ("parts gone", 1), ("lock gone", 1)])         # once where its clock is asked for
def test_a_run_killed_while_it_stores_is_resumed_by_two_and_leaves_nothing_beside_the_results(lab, tmp_path, point, times):
    (tmp_path / "to").mkdir()
    (code, text), = ends([start(lab, tmp_path, *leaves(tmp_path, b"A", 1 << 20), point=point, times=times)])
    assert code == -signal.SIGKILL, text
    (code, text), = ends([start(lab, tmp_path, "list")])
    ident = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text).group()
    ended = ends([start(lab, tmp_path, "resume", ident) for number in range(2)])
    assert any(code == 0 for code, text in ended) and all(code in (0, 75) for code, text in ended), ended
    found = {name: data for name, data in digest(stored(tmp_path / "to")).items() if name in contents(b"A")}
    assert found == digest(contents(b"A", 1 << 20)) and ours(tmp_path / "to") == [], ended


def test_what_is_already_here_is_not_taken_for_the_new_result(lab, tmp_path):
    for mark in "AB":
        (code, text), = ends([start(lab, tmp_path, "run", "hpc", "printf %s >res; touch -d @1700000000 res" % (mark * 9), "--to", ".")])
        assert code == 0 and (tmp_path / "res").read_text() == mark * 9, text


def test_a_result_named_as_anothers_part_file_keeps_its_content(lab, tmp_path):
    (code, text), = ends([start(lab, tmp_path, "run", "hpc", "echo one >x16; echo two >.x16.mi-part; echo three >.x16.mi-part.mi-part", "--to", ".")])
    assert code == 0, text
    assert [(tmp_path / name).read_text() for name in ("x16", ".x16.mi-part", ".x16.mi-part.mi-part")] == ["one\n", "two\n", "three\n"]


def test_what_its_user_edits_while_it_runs_is_not_overwritten(lab, tmp_path):
    (tmp_path / "tab").mkdir()
    for name in "xyz":
        (tmp_path / "tab" / name).write_text("as it was sent\n")
    process = start(lab, tmp_path, "run", "hpc", "touch %s; while [ ! -e %s ]; do sleep 0.05; done; echo done >tab/y" % (tmp_path / "runs", tmp_path / "go"), "--in", "tab/")
    suite.wait_until((tmp_path / "runs").exists, 30)
    (tmp_path / "tab" / "z").write_text("edited meanwhile\n")
    (tmp_path / "tab" / ".#z").symlink_to("user@host.123:1700000000")
    (tmp_path / "go").touch()
    (code, text), = ends([process])
    assert code == 0 and [(tmp_path / "tab" / name).read_text() for name in "xyz"] == ["as it was sent\n", "done\n", "edited meanwhile\n"], text
