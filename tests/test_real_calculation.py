"""A real calculation the whole way: stress analysis with CalculiX on the external computer, whose material curve stays there.

tests/calculix/stress.py is the external computer's script, secret_curve.json its secret. The stresses are checked against the analytical
values of a bar under tension; the secret is looked for, byte by byte, in all that relay and workflow side hold."""
import base64
import csv
import json
import math
import os
import re
import shutil
import sqlite3

import pytest
import suite
from suite import LOGS, SITE

CALCULIX = os.path.join(suite.HERE, "calculix")
RESULTS = ("result.json", "stress.csv", "displacement.csv")
STEEL = {"yield_strength": 300.0, "tensile_strength": 480.0, "reduction_of_area": 0.55}
WORDS = ["--in", "material.json"] + [word for name in RESULTS for word in ("--out", name)]


@pytest.fixture(scope="module")
def secret():
    """The in-house material curve."""
    with open(os.path.join(CALCULIX, "secret_curve.json")) as text:
        return json.load(text)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A relay, and an external computer with CalculiX. `leak` is what must not be: a command that lets the secret out."""
    suite.needs("ccx")
    world = suite.World(tmp_path_factory.mktemp("calculix"), commands=["stress", "no-solver", "leak"]).start()
    external = tmp_path_factory.mktemp("external")
    for name in ("stress.py", "secret_curve.json"):
        shutil.copy(os.path.join(CALCULIX, name), str(external))
    run = "argv = %s\n    %s/stress.py\n" % (suite.PYTHON, external)
    world.poller({"stress": "match = stress\n" + run, "no-solver": "match = no-solver\nenv.PATH = /nonexistent\n" + run,
                  "leak": "match = leak\nargv = /bin/cp\n    %s/secret_curve.json\n    result.json" % external})
    yield world
    world.close()


@pytest.fixture
def module(tmp_path):
    """A module's directory; call it with the load in N."""
    def prepare(load, **other):
        (tmp_path / "material.json").write_text(json.dumps(dict(STEEL, load=load, **other)))
        return str(tmp_path)
    return prepare


def stretched(secret, steel):
    """(true stress, plastic strain) as the external computer makes it of both sides' numbers."""
    return [(steel["yield_strength"] + (steel["tensile_strength"] - steel["yield_strength"]) * height,
             -math.log(1 - steel["reduction_of_area"]) * strain) for strain, height in secret["curve"]]


def strain_at(stress, secret, steel):
    """The analytical total strain of a bar under uniaxial stress in MPa: elastic, and plastic from the piecewise linear curve."""
    curve, plastic = stretched(secret, steel), 0.0
    for (low, start), (high, end) in zip(curve, curve[1:]):
        if stress > low:
            plastic = start + (min(stress, high) - low) / (high - low) * (end - start)
    return stress / secret["young"] + plastic


def needles(secret):
    """Everything that would betray the secret: its file, as it is and in base64; every number in it, and of the curve made of it, as text."""
    with open(os.path.join(CALCULIX, "secret_curve.json"), "rb") as source:
        data = source.read()
    numbers = re.findall(r"\d+\.\d+", data.decode()) + ["%.*g" % (digits, value) for pair in stretched(secret, STEEL) for value in pair for digits in (7, 9)]
    numbers += ["%.9g" % secret["young"], "%.9g" % secret["poisson"]]
    texts = {number for number in numbers if len(number.replace(".", "").lstrip("0")) >= 6}
    assert len(texts) >= 24
    return [data, base64.b64encode(data)[:200]] + [line for line in data.splitlines() if len(line) > 12] + [text.encode() for text in sorted(texts)]


def held(world, *folders):
    """{place: bytes} of everything that relay and workflow side hold: files whatever their name, and each value of the database."""
    found = {}
    for top in (world.state, world.relay.log_path) + folders:
        names = [top] if os.path.isfile(top) else [os.path.join(folder, name) for folder, below, names in os.walk(top) for name in names]
        for name in names:
            with open(name, "rb") as source:
                found[name] = source.read()
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    for table, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        found["table " + table] = "\n".join(str(value) for row in db.execute("SELECT * FROM %s" % table) for value in row).encode("utf-8", "replace")
    db.close()
    assert any(name.endswith("state.sqlite3-wal") for name in found) and any("/spool/" in name for name in found)
    return found


def betrayals(found, secret):
    """[(place, what)] of the secret in it."""
    return [(place, needle[:40]) for place, data in found.items() for needle in needles(secret) if needle in data]


def rows_of(folder, name):
    with open(os.path.join(folder, name)) as text:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(text)]


@pytest.mark.parametrize("load", [12000.0, 34567.0, 44000.0])
def test_the_stresses_are_the_analytical_ones_and_the_secret_stays(host, module, secret, load):
    folder = module(load)
    done = host.workflow("run", SITE, "stress", *WORDS, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(folder)) == sorted(("material.json",) + RESULTS + LOGS)
    with open(os.path.join(folder, "result.json")) as text:
        result = json.load(text)
    area, length = result["area"], result["length"]
    assert result["axial_stress"] == pytest.approx(load / area, rel=1e-5)
    assert result["elongation"] == pytest.approx(length * strain_at(load / area, secret, STEEL), rel=1e-3)
    stresses, moves = rows_of(folder, "stress.csv"), rows_of(folder, "displacement.csv")
    assert len({row["load_factor"] for row in stresses}) == 10 and len(stresses) == 10 * 16 * 8
    for row in stresses:                               # uniaxial, everywhere, at every load
        expected = row["load_factor"] * load / area
        assert row["szz"] == pytest.approx(expected, rel=1e-4)
        assert all(abs(row[key]) < 1e-3 * expected for key in ("sxx", "syy", "sxy", "sxz", "syz"))
    for row in moves:                                  # the whole curve, not its end only
        expected = length * strain_at(row["load_factor"] * load / area, secret, STEEL)
        assert row["uz"] == pytest.approx(expected, rel=1e-3)
    assert betrayals(dict(held(host, folder), said=(done.stdout + done.stderr).encode()), secret) == []


def test_nothing_but_the_results_is_left_even_if_everything_is_asked_for(host, module, secret):
    folder = module(40000.0)
    done = host.workflow("run", SITE, "stress", "--in", "material.json", "--out", "**", "--to", "results", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(os.listdir(os.path.join(folder, "results"))) - {"material.json"} == set(RESULTS + LOGS)
    assert betrayals(dict(held(host, folder), said=(done.stdout + done.stderr).encode()), secret) == []


def test_a_failing_solvers_exit_code_message_and_logs_come_back_and_the_secret_does_not(host, module, secret):
    folder = module(52000.0)                           # 520 MPa: beyond the tensile strength there is no equilibrium
    done = host.workflow("run", SITE, "stress", *WORDS, cwd=folder)
    said = done.stdout + done.stderr
    assert done.returncode == 201, said
    assert sorted(os.listdir(folder)) == sorted(("material.json",) + LOGS)
    with open(os.path.join(folder, LOGS[1]), encoding="utf-8") as text:
        assert re.match(r"ccx failed with exit code 201: \*ERROR .*diverge", text.read())
    with open(os.path.join(folder, LOGS[0]), encoding="utf-8") as text:
        assert text.read().startswith("running ccx: 16 elements")
    assert "201" in said.strip().splitlines()[-1] and "Traceback" not in said
    assert betrayals(dict(held(host, folder), said=said.encode()), secret) == []
    left = [name for base, below, names in os.walk(os.path.join(host.folder, "poller", "base")) for name in names if name.startswith("bar.")]
    assert left == []


def test_inputs_that_make_no_sense_end_with_the_scripts_own_code_and_line(host, module, secret):
    folder = module(1000.0, tensile_strength=100.0)
    done = host.workflow("run", SITE, "stress", *WORDS, cwd=folder)
    assert done.returncode == 64, done.stdout + done.stderr
    with open(os.path.join(folder, LOGS[1]), encoding="utf-8") as text:
        assert "yield_strength < tensile_strength" in text.read()


def test_a_missing_solver_ends_with_127_and_says_so(host, module, secret):
    folder = module(1000.0)
    done = host.workflow("run", SITE, "no-solver", *WORDS, cwd=folder)
    assert done.returncode == 127, done.stdout + done.stderr
    with open(os.path.join(folder, LOGS[1]), encoding="utf-8") as text:
        assert text.read() == "not there: ccx\n"
    assert betrayals(dict(held(host, folder), said=(done.stdout + done.stderr).encode()), secret) == []


def test_the_search_would_have_found_it(host, module, secret):
    folder = module(1000.0)
    done = host.workflow("run", SITE, "leak", "--in", "material.json", "--out", "result.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = betrayals(held(host, folder), secret)
    assert any("/spool/" in place for place, what in found) and any(place.startswith(folder) for place, what in found)
    assert {what for place, what in found} >= {needle[:40] for needle in needles(secret) if needle in open(os.path.join(CALCULIX, "secret_curve.json"), "rb").read()}
