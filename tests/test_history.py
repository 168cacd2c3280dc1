"""When each step of each attempt was made is known for keep_history: with every move, whatever dies, also of what is removed by now."""
import csv
import io
import json
import re
import time

import pytest

import suite
import test_steps_table
from suite import SITE, USER, wait_until
from test_steps_table import Calculation, send, table     # noqa: F401 (a fixture)

relay = suite.module("mi_dicomapi.py")


def history(world, *words):
    """Rows of `history`."""
    done = suite.run("mi_dicomapi.py", "history", "--json", "--ini", world.ini, *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def steps(world, accept_id):
    """[(attempt, step)] as the database has them."""
    return [(row["attempt"], row["step"]) for row in world.rows(
        "SELECT attempt, step FROM events JOIN past ON seq = calc WHERE accept_id = ? ORDER BY at, events.rowid", accept_id)]


WAY = [(0, "add-calcinfo"), (0, "allow-wait-calc"), (1, "calc-request"), (1, "calc-params-complete"), (1, "calc-start"), (1, "calc-end"),
       (1, "send-results"), (1, "end-send"), (1, "finish")]


def test_every_state_was_reached_by_steps_of_which_each_has_its_time(table):
    begun = time.time()
    for number, state in enumerate(test_steps_table.STATES):
        calc = Calculation(table, state)
        assert steps(table.world, calc.accept_id) == WAY[:number + 1], state
        times = [row["at"] for row in table.world.rows("SELECT at FROM events JOIN past ON seq = calc WHERE accept_id = ? ORDER BY at", calc.accept_id)]
        assert times == sorted(times) and begun - 1 < times[0] <= times[-1] < time.time() + 1
        before = table.world.rows("SELECT * FROM events")
        for label in test_steps_table.LABELS:          # what is refused, or asked again, makes no step
            if test_steps_table.expected(label, state) == (409, state):
                send(table.client, calc, label)
        assert table.world.rows("SELECT * FROM events") == before, state


def test_a_further_attempt_leaves_the_first_as_it_was(table):
    calc = Calculation(table, relay.SENDING)
    table.client.ok("POST", "calc-end", {"v": 2, "accept_id": calc.accept_id, "claim": calc.claim, "result": "abnormal", "reason": "refused: no"})
    table.client.ok("POST", "send-results", {"v": 2, "accept_id": calc.accept_id, "claim": calc.claim, "result_files": {}})
    table.client.ok("POST", "end-send", {"v": 2, "accept_id": calc.accept_id, "claim": calc.claim, "result": "end send"})
    first = [row for row in history(table.world) if row["accept_id"] == calc.accept_id]
    assert [(row["attempt"], row["step"], row["reason"]) for row in first][3:5] == [(1, "calc-end abnormal", "refused: no"), (1, "send-results", None)]
    table.client.ok("POST", "rerun", {"v": 2, "accept_id": calc.accept_id})
    table.client.ok("POST", "calc-request", {"v": 2, "site_id": calc.site, "poller": "p", "take": "take-no-2", "wait": 0})
    table.client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": calc.accept_id, "reason": "wrong mesh"})
    now = [row for row in history(table.world) if row["accept_id"] == calc.accept_id]
    assert now[:len(first)] == first
    assert [(row["attempt"], row["step"], row["reason"]) for row in now[len(first):]][:3] == [
        (1, "rerun", "by the workflow side"), (2, "calc-request", None), (2, "cancel-wait-calc", "cancelled: wrong mesh")]
    done = suite.run("mi_dicomapi.py", "show", calc.accept_id, "--ini", table.world.ini)
    assert re.search(r"2\.2 cancel-wait-calc  cancelled: wrong mesh", done.stdout), done.stdout


def test_what_is_removed_stays_in_the_history_until_its_time_and_its_number_goes_to_no_other(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[times]\nregister_for = 1s\nkeep_history = 10m\n").start()
    client = world.client()
    info = {"command": "hello", "remote-site": SITE, "parameters": "=HYPERLINK(1)", "parameter_files": {}, "result_files": {}}
    first = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "=1+1", "calc-info": info})["accept_id"]
    wait_until(lambda: world.state_of(first) is None, 20, "removed")
    assert steps(world, first) == [(0, "add-calcinfo")]
    second = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "2", "calc-info": info, "allow": True})["accept_id"]
    assert [row["calc"] for row in world.rows("SELECT DISTINCT calc FROM events ORDER BY calc")] == [1, 2]
    assert steps(world, second) == WAY[:2]
    world.extra = world.extra.replace("10m", "1s")      # now, and not while the lines above are read
    world.write_ini(world.port)
    wait_until(lambda: not steps(world, first), 30, "forgotten")
    time.sleep(3)
    assert steps(world, second) == WAY[:2], "it is there still"


def test_the_whole_history_is_looked_through_once_an_hour_and_not_every_minute(tmp_path):
    looks = []
    store = type("Store", (), {"read": lambda self, sql, *values: looks.append("FROM past" in sql) or (), "make_ballast": lambda self: None})()
    times = {key: 86400.0 * 180 for key in ("keep_history", "register_for", "keep_fetched", "keep_results")}
    nothing = type("Nothing", (), {"stamps": {}, "recount": lambda self: None, "count_stored": lambda self: None})()
    sweeper = relay.Sweeper(type("Relay", (), {"conf": {"times": times}, "uploads": {}, "claims": nothing, "quotas": nothing, "meter": nothing, "store": store})())
    for keep, most in ((86400.0 * 180, 1), (0.0, 3)):
        times["keep_history"], sweeper.history_due = keep, 0.0
        del looks[:]
        for _turn in range(3):
            sweeper.sweep_old(time.time())
        assert sum(looks) == most


def test_history_chooses_by_time_site_and_user_and_no_cell_is_a_formula(make_world):
    world = make_world(tls=False, commands=["=1+1", "hello"], sites=(SITE, "u-other")).start()
    other = world.client(world.issue("bob"))
    for client, site, command in ((world.client(), SITE, "=1+1"), (other, "u-other", "hello")):
        info = {"command": command, "remote-site": site, "parameters": "", "parameter_files": {}, "result_files": {}}
        accept_id = client.ok("POST", "add-calcinfo", {"v": 2, "request_id": "r", "calc-info": info, "allow": True})["accept_id"]
    suite.run("mi_dicomapi.py", "cancel", accept_id, "--ini", world.ini)
    assert [row["user"] for row in history(world, "--user", "bob")] == ["bob"] * 3 == [row["user"] for row in history(world, "--site", "u-other")]
    assert history(world)[-1]["reason"] == "cancelled: by an operator"
    assert history(world, "--since", time.strftime("%Y-%m-%dT%H:%M", time.localtime(time.time() + 90))) == []
    assert len(history(world, "--since", "1d")) == 5 == len(history(world, "--since", "2020-01-31"))
    done = suite.run("mi_dicomapi.py", "history", "--csv", "--ini", world.ini)
    head, *rows = csv.reader(io.StringIO(done.stdout))
    assert head == list(relay.HISTORY_COLUMNS) and len(rows) == 5 and rows[0][7] == "'=1+1" and rows[0][5] == USER
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d\Z", rows[0][0])
    assert re.search(r"-- kept since \d{4}-", suite.run("mi_dicomapi.py", "history", "--ini", world.ini).stdout)
    done = suite.run("mi_dicomapi.py", "history", "--since", "soon", "--ini", world.ini)
    assert done.returncode == 64 and suite.one_line(done.stderr)


@pytest.mark.parametrize("cell", ["=1", "+1", "-1", "@x", "\uff1d1", "\uff20x"])
def test_a_cell_that_a_spreadsheet_would_compute_is_marked(cell, capsys):
    relay.print_csv([dict(dict.fromkeys(relay.HISTORY_COLUMNS), at=1.0, command=cell)])
    assert "'" + cell in capsys.readouterr().out
