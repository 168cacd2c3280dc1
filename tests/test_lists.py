"""Lists for people: columns by their width on a terminal, states as words with a sign, colour, --watch; `run --dry-run`."""
import json
import os
import pty
import re
import subprocess
import unicodedata

import pytest

import suite
from suite import SITE, wait_until

RELAY, POLLER, WF = "mi_dicomapi.py", "mi_system_remote.py", "mi_system_wf.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A relay with a calculation that waits, one that was cancelled, and one with a wide command; a poller's ini."""
    world = suite.World(tmp_path_factory.mktemp("world"), commands=["hello", "解析 計算"], tls=False).start()
    client = world.client()
    world.ids = [client.register(command, request_id) for command, request_id in (("hello", "first"), ("解析 計算", "second"), ("hello", "third"))]
    client.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": world.ids[2], "stop": True})
    world.poller_ini = world.poller({"hello": "argv = /bin/true\nmatch = hello\n"}, start=False)[1]
    yield world
    world.close()


def columns(text):
    """Of a terminal."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def on_terminal(name, words, enough, **env):
    """What a script shows on a terminal of its own until enough(text) is true; then Ctrl+C, and its exit code."""
    master, slave = pty.openpty()
    process = subprocess.Popen([suite.PYTHON, "-I", "-S", suite.script(name)] + words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               env=suite.clean_env(TERM="xterm", **env))
    os.close(slave)
    os.set_blocking(master, False)
    found = [b""]

    def more():
        try:
            found[0] += os.read(master, 65536)
        except OSError:                                # nothing there yet, or it has ended
            pass
        return enough(found[0].decode("utf-8", "replace")) or process.poll() is not None
    try:
        wait_until(more, 30, lambda: found[0])
        process.send_signal(2) if process.poll() is None else None
        return found[0].decode("utf-8", "replace"), process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_states_are_told_in_the_same_words_signs_and_translations_by_all_lists(two, monkeypatch):
    scripts = [suite.module(name) for name in (RELAY, POLLER, WF)]
    relay, poller, wf = scripts
    assert set(relay.STATE_WORDS) | set(relay.STATES) >= set(relay.WORDS) | set(relay.WORDS.values())
    assert set(relay.STATE_WORDS) | set(relay.STATES) >= set(poller.LISTED_STATES)
    for lang in ("en", "ja"):
        for one in scripts:
            monkeypatch.setitem(one.SAY, "lang", lang)
        told = {one.state_cell(state, status) for one in scripts for state in relay.WORDS for status in ("none", "abnormal")}
        assert len(told) == 9 and (lang == "en" or all(re.match(r"[.<>=+!?-] [\u3040-\u9fff]+\Z", cell) for cell in told)), told
        for word in relay.WORDS.values():              # a sentence about a state begins with its word
            for status in ("none", "abnormal") if word == "got return" else ("none",):
                said = wf.state_words({"progress": word, "status": "completed" if (word, status) == ("got return", "none") else status})
                assert said.startswith(wf.state_cell(word, status)[2:]), said
    with open(os.path.join(suite.ROOT, "README.md"), encoding="utf-8") as text:
        rows = re.findall(r"^\| ([a-z ]+?)(?: \(why\))? \| (\S+) \|", text.read().split("### States\n")[1].split("\n## ")[0], re.M)
    assert len(rows) == 13 and all(word in relay.STATES and relay.JA[word] == japanese for word, japanese in rows[1:]), rows


def test_columns_stand_below_one_another_whatever_the_width_of_what_is_in_them(two):
    table = suite.run(RELAY, "list", "--all", "--ini", two.ini, env=suite.clean_env(LANG="ja_JP.UTF-8")).stdout.splitlines()
    assert [row.split()[0] for row in table] == ["accept_id"] + two.ids and "実行待ち" in table[1] and "異常終了" in table[3] and "解析 計算" in table[2]
    own = two.workflow("list").stdout.splitlines()
    assert [row.split()[0] for row in own[1:]] == two.ids and "- waiting" in own[1] and "! abnormal" in own[3] and "second" in own[2]
    for lines, name in ((table, "registered"), (own, "command")):
        at = columns(lines[0].partition(name)[0])
        cells = [line for line in lines[1:] if columns(line) > at]
        assert cells and all(any(columns(line[:cut]) == at and line[cut - 1] == " " != line[cut] for cut in range(len(line))) for line in cells), lines
    assert json.loads(two.workflow("list", "--json").stdout)[1]["command"] == "解析 計算"


@pytest.mark.parametrize("name", [RELAY, WF])
def test_watch_draws_in_place_on_a_terminal_prints_new_lines_elsewhere_and_ends_with_ctrl_c(two, name, tmp_path):
    words = ["list", "--watch"] + (["--ini", two.ini] if name == RELAY else two.reach())
    text, code = on_terminal(name, words, lambda text: two.ids[2] in text and text.endswith("\x1b[J"), COLUMNS="60", LINES="30")
    screen = re.sub("\x1b\\[[0-9;]*[A-Za-z]", "", text.split("\x1b[H")[-1])
    assert code == 0 and "\x1b[33m- waiting" in text and "\x1b[31m! abnormal" in text and all(columns(line.rstrip("\r")) <= 60 for line in screen.split("\n")), text
    plain, code = on_terminal(name, words, lambda text: two.ids[2] in text, COLUMNS="200", NO_COLOR="1")
    assert code == 0 and not re.search("\x1b\\[[0-9;]*m", plain) and "! abnormal" in plain
    said = suite.Process(name, words, str(tmp_path))
    try:
        wait_until(lambda: two.ids[2] in said.text(), what=said.text)
        new = two.client().register("hello")
        two.ids.append(new)
        wait_until(lambda: new in said.text(), what=said.text)
        assert said.stop(2) == 0 and said.text().count(two.ids[0]) == 1 and "\x1b" not in said.text()
    finally:
        said.kill()


def test_the_pollers_list_is_watched_too_and_sites(two, tmp_path):
    for name, words in ((POLLER, ["list", "--watch", "--ini", two.poller_ini]), (RELAY, ["sites", "--watch", "--ini", two.ini])):
        text, code = on_terminal(name, words, lambda text: text.count("\x1b[H") > 1)
        assert code == 0 and ("no poller runs" in text or SITE in text), text
    assert suite.run(POLLER, "list", "--ini", two.poller_ini).stdout.startswith("-- ")


def test_a_dry_run_says_what_would_be_sent_and_what_the_relay_says_and_registers_nothing(two, tmp_path):
    (tmp_path / "steel.json").write_text("steel\n")
    before = two.rows("SELECT COUNT(*) AS n FROM calculations")
    words = ["run", SITE, "hello", "--in", "steel.json", "--out", "life.json", "frames/*.png", "--dry-run"]
    done = two.workflow(*words, cwd=str(tmp_path))
    assert done.returncode == 0 and "would send: steel.json (6 bytes)" in done.stdout and "would ask for: frames/*.png" in done.stdout, done
    assert json.loads(two.workflow(*(words + ["--json"]), cwd=str(tmp_path)).stdout)["inputs"] == {"steel.json": 6}
    words[2] = "none"
    refused = two.workflow(*words, cwd=str(tmp_path))
    assert refused.returncode == 77 and "not in the list" in refused.stdout + refused.stderr, refused
    words[4] = "gone.json"
    assert two.workflow(*words, cwd=str(tmp_path)).returncode == 66
    assert two.rows("SELECT COUNT(*) AS n FROM calculations") == before and sorted(os.listdir(str(tmp_path))) == ["steel.json"]
