"""What is said where it is read: the reason in the last line, in the README's words, with what to do; ids by their first eight characters."""
import json
import os
import re
import time

import pytest

import suite
from fake_relay import Fake
from suite import SITE, USER, wait_until

WF, POLLER, RUNNER = "mi_system_wf.py", "mi_system_remote.py", "execute_remote_command.py"
WIRE = ("not start", "sending params", "complete send", "calc end", "getting return", "got return")


@pytest.fixture(scope="module")
def fake():
    one = Fake()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A relay and a poller of ours; the command does what the file `do` says."""
    world = suite.World(tmp_path_factory.mktemp("world"), tls=False, commands=["do", "unlisted"]).start()
    path = os.path.join(world.folder, "do")
    with open(path, "w") as out:
        out.write("#!/bin/sh\n. ./do\n")
    os.chmod(path, 0o755)
    world.allowed = {"do": "argv = %s\nmatch = do\n" % path}
    world.server = world.poller(world.allowed)
    yield world
    world.close()


def do(world, what, *words):
    """(exit code, lines of stdout) of a run of the command."""
    folder = os.path.join(world.folder, "wf")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "do"), "w") as out:
        out.write(what + "\n")
    done = world.workflow("run", SITE, "do", "--in", "do", *words)
    return done.returncode, done.stdout.splitlines() or [done.stderr]


# ---- words that were typed

@pytest.mark.parametrize("name, words, says", [
    (WF, ["status", "abc"], "abc: not an ACCEPT_ID.*first eight characters"),
    (WF, ["run", "u-tokyo", "slow", "steel.json"], "what is steel.json\\?.*--in"),
    (WF, ["run", "u-tokyo"], "needs SITE and COMMAND"),
    (WF, ["run", "s", "c", "--param", "--fine"], "--param=--fine"),
    (WF, ["staus", "0a1b2c3d"], "did you mean status"), (WF, ["nims.example", "u", "t", "c", "in", "out"], "BASE_URL begins with http"),
    (POLLER, ["lst"], "did you mean list"), (POLLER, ["poll", "--onec"], "did you mean --once"), (POLLER, ["shw", "0a1b2c3d"], "did you mean show"),
    (RUNNER, ["client_cmd:x", "client_files:y"], "client_name:HOST is missing"),
    (RUNNER, ["run", "h", "c", "--batch-option", "--time=60"], "--batch-option=--fine"),
    (RUNNER, ["resume", "abc"], "abc: not a UUID.*first eight characters")])
def test_what_was_typed_wrongly_is_64_and_one_line_that_says_how(name, words, says, tmp_path):
    done = suite.run(name, *words, env=suite.clean_env(HOME=str(tmp_path)))
    assert done.returncode == 64 and suite.one_line(done.stderr) and re.search(says, done.stderr), done.stderr


def test_a_value_that_begins_with_a_dash_arrives(fake, tmp_path):
    done = suite.run(WF, "run", "s", "c", "--param=--fine", "--url", fake.url, env=suite.clean_env(MI_DISTCOMP_TOKEN="t"), cwd=str(tmp_path))
    assert done.returncode == 0 and [given["calc-info"]["parameters"] for given in fake.given if "calc-info" in given][-1] == "--fine"


def test_in_python_a_text_is_one_input_and_one_result(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steel.json").write_text("x")
    wf = suite.module(WF)
    for inputs in ("steel.json", tmp_path / "steel.json", ["steel.json"]):
        wf.run(fake.url, "s", "c", inputs, "life.json", token="t", to=tmp_path)
        info = [given["calc-info"] for given in fake.given if "calc-info" in given][-1]
        assert list(info["parameter_files"]) == ["steel.json"] and list(info["result_files"]) == ["life.json"]


@pytest.mark.parametrize("text, says", [
    ("[poller]\ndeny = x", "belongs|not a key"), ("[poller]\nargv = x", r"belongs into \[command NAME\]"), ("[outbound]\ndeny = x", "did you mean deny_"),
    ("[poller]\nbase = x", "did you mean calc_base"), ("[poller]\nmax_file = 1", r"belongs into \[outbound\]"), ("[poller]\ncert = x", "did you mean client_cert")])
def test_a_key_that_is_none_names_the_nearest_one_or_its_section(tmp_path, text, says):
    path = tmp_path / "ini"
    path.write_text(text + "\n")
    done = suite.run(POLLER, "list", "--ini", str(path))
    assert done.returncode == 78 and suite.one_line(done.stderr) and re.search(says, done.stderr), done.stderr


# ---- how it ends

ENDS = [({"exit_code": 143, "signal": 15, "status": "abnormal", "reason": "cancelled: wrong mesh"}, 143, "cancelled: wrong mesh; the command was stopped"),
        ({"exit_code": 143, "signal": 15, "status": "abnormal", "reason": "timeout"}, 143, "own exit code.: timeout"),
        ({"exit_code": 1, "status": "abnormal", "reason": "disk: No space left on device"}, 1, "own exit code.: disk: No space"),
        ({"exit_code": 3, "status": "abnormal", "reason": "exit code 3"}, 3, "ended with 3 .its own exit code.; 0 files"),
        ({"exit_code": None, "status": "abnormal", "reason": "refused: the command is not in this host's list: c"}, 77,
         r"refused: the command is not in this host's list: c\); 0 files"),
        ({"exit_code": None, "status": "abnormal", "reason": "disk: no room"}, 74, "disk: no room"),
        ({"exit_code": None, "status": "abnormal", "reason": "cancelled: by hand"}, 130, "cancelled: by hand"),
        ({"result_names": ["res"], "refused": {"res": "not a file"}}, 65, "res: is a directory.*declare res/"),
        ({"result_names": ["res"], "refused": {"res": "deny_names"}}, 65, "res: a rule of the external computer's owner keeps it there .deny_names"),
        ({"result_names": ["res"], "missing": {"res": "not there"}}, 65, "res: the command has not made it")]


@pytest.mark.parametrize("info, code, says", ENDS, ids=[row[2] for row in ENDS])
def test_the_last_line_holds_the_reason(info, code, says, tmp_path):
    one = Fake()
    try:
        one.info = info
        done = suite.run(WF, "run", "s", "c", "--out", *(info.get("result_names") or ["x"])[:1], "--url", one.url,
                         env=suite.clean_env(MI_DISTCOMP_TOKEN="t"), cwd=str(tmp_path))
        last = done.stdout.splitlines()[-1]
        assert done.returncode == (code if code else 65) and re.search(says, last), done.stdout
    finally:
        one.stop()


def test_why_a_poller_refused_is_in_the_last_line(busy):
    done = busy.workflow("run", SITE, "unlisted", "--out", "life.json")
    assert done.returncode == 77 and re.search("refused: .*unlisted: it is not in this host.s list", done.stdout.splitlines()[-1]), done.stdout
    assert "life.json" not in done.stdout              # a command that never ran has left nothing out
    code, lines = do(busy, "mkdir res; echo x >res/x", "--out", "res")
    assert code == 65 and "declare res/" in lines[-1], lines


def test_what_cannot_be_run_once_more_says_why_and_what_to_do(busy):
    for what, says in (("exit 3", "fetched already.*--request-id"), ("true", "ended well.*--request-id")):
        code, lines = do(busy, what)
        accept_id = re.search(r"[0-9a-f-]{36}", "\n".join(lines)).group()
        done = busy.workflow("rerun", accept_id)
        assert done.returncode == 77 and re.search(says, done.stderr), done.stderr


def test_the_output_of_a_short_command_is_shown(busy):
    code, lines = do(busy, "echo quick; exit 4")
    assert code == 4 and "quick" in lines, lines


def test_who_cancelled_is_in_the_last_line(busy):
    process = suite.Process(WF, ["run", SITE, "do", "--in", "do"] + busy.reach(), os.path.join(busy.folder, "wf"))
    with open(os.path.join(busy.folder, "wf", "do"), "w") as out:
        out.write("echo begun; sleep 60\n")
    process.kill()
    process = suite.Process(WF, ["run", SITE, "do", "--in", "do"] + busy.reach(), os.path.join(busy.folder, "wf"))
    wait_until(lambda: "begun" in process.text(), what=process.text)
    accept_id = re.findall(r"[0-9a-f-]{36}", process.text())[-1]
    assert busy.workflow("cancel", accept_id, "--reason", "wrong mesh").returncode == 0
    assert process.popen.wait(30) == 143 and "cancelled: wrong mesh" in process.text().splitlines()[-1], process.text()


def test_that_the_command_met_a_full_disk_is_in_the_last_line(busy):
    code, lines = do(busy, "head -c 1 /dev/zero >/dev/full || exit 5")
    assert code == 5 and "own exit code): disk: No space left on device" in lines[-1], lines


def test_that_the_disk_is_full_is_in_the_last_line(busy, disk_of):
    full = disk_of("20m")
    busy.server.stop()
    other = busy.poller(busy.allowed, name="small")
    path = os.path.join(busy.folder, "small", "poller.ini")
    other.stop()
    with open(path) as text:
        changed = re.sub("calc_base = .*", "calc_base = %s" % full, text.read())
    with open(path, "w") as out:
        out.write(changed)
    other = suite.Process(POLLER, ["poll", "--ini", path], os.path.join(busy.folder, "small"))
    try:
        for number in range(2):                        # what it has left goes once it is delivered: there is room for the next one
            code, lines = do(busy, "head -c 50m /dev/zero >large 2>/dev/null || exit 1")
            assert code == 1 and "own exit code): disk: " in lines[-1] and "no room is left there" in lines[-1], lines
    finally:
        other.stop()
        busy.server = busy.poller(busy.allowed)


# ---- on the way

def test_a_relay_that_says_later_is_no_relay_that_does_not_answer(tmp_path):
    said = []

    def misbehave(request):
        if request.name == "add-calcinfo" and not said:
            said.append(1)
            return request.no(503, message="maintenance: nothing new is taken")
    one = Fake(misbehave=misbehave)
    try:
        done = suite.run(WF, "run", "s", "c", "--url", one.url, env=suite.clean_env(MI_DISTCOMP_TOKEN="t"), cwd=str(tmp_path))
        assert done.returncode == 0 and 'answers "later", asking on: maintenance' in done.stdout and "does not answer" not in done.stdout
    finally:
        one.stop()


def test_a_warning_of_the_relay_is_read_once_from_both_its_calls(tmp_path):
    one = Fake()
    text = "its poller is a fielded one\x1b"
    one.answers = {"calc-progress": {"progress": "got return", "status": "completed", "stamp": "9", "warning": text},
                   "add-calcinfo": {"accept_id": "0a1b2c3d-0000-4000-8000-00000000abcd", "progress": "not start", "status": "none", "warning": text}}
    try:
        done = suite.run(WF, "run", "s", "c", "--url", one.url, env=suite.clean_env(MI_DISTCOMP_TOKEN="t"), cwd=str(tmp_path))
        assert done.returncode == 0 and done.stdout.count("warning: its poller is a fielded one\\x1b") == 1
        done = suite.run(WF, "status", "0a1b2c3d", "--url", one.url, env=suite.clean_env(MI_DISTCOMP_TOKEN="t"))
        assert done.returncode == 0 and "warning: its poller" in done.stderr
    finally:
        one.stop()


def test_a_refused_token_is_said_alike_on_both_sides(busy):
    busy.token_file("x" * 64, "wrong")
    done = suite.run(WF, "status", "0a1b2c3d", "--url", busy.url, "--token-file", os.path.join(busy.folder, "wrong"))
    other = suite.run(POLLER, SITE, busy.url, "x" * 64, "--once", "calc_base:" + os.path.join(busy.folder, "b"), "--ini",
                      os.path.join(busy.folder, "poller", "poller.ini"))
    for one in (done, other):
        assert one.returncode == 77 and re.search(r"the token is refused \(.+\): get a valid one, role (workflow|remote), for this", one.stderr), one.stderr


def test_why_the_relay_refuses_is_said_in_the_language_of_who_reads_it(make_world, monkeypatch, tmp_path):
    relay, wf, poller = (suite.module(name + ".py") for name in ("mi_dicomapi", "mi_system_wf", "mi_system_remote"))
    world = make_world(tls=False, commands=["do"], sites=(SITE, "u-full"), ini="[limits]\nmax_file = 1000\nmax_files = 2\n"
                       "calculations_per_user = 3\n[u-full]\nmax_waiting = 1\nusers = bob alice\n").start()
    client, bob = world.client(), world.client(world.issue("bob"))
    started, waits = client.register("do"), bob.register("do", site="u-full")
    client.walk(*client.claim(), upto="calc-start")

    def register(one, **info):
        info = dict({"command": "do", "remote-site": SITE, "parameters": "", "parameter_files": {}, "result_files": {}}, **info)
        return one.call("POST", "add-calcinfo", {"v": 2, "request_id": info.pop("request_id", os.urandom(8).hex()), "calc-info": info, "allow": True})

    named = client.register("do", "named")
    answers = {
        "command": register(client, command="<other>"), "users": register(world.client(world.issue("eve")), **{"remote-site": "u-full"}),
        "max_waiting": register(bob, **{"remote-site": "u-full"}), "differs": register(client, request_id="named", parameters="1"),
        "max_file": register(client, parameter_files={"a": suite.entry(b"x" * 2000)}),
        "max_files": register(client, parameter_files={name: suite.entry(b"") for name in "abc"}),
        "no-result": client.call("GET", "get-calc-result", {"v": 2, "accept_id": started}),
        "not-run": client.call("POST", "rerun", {"v": 2, "accept_id": named}), "not-ended": client.call("POST", "rerun", {"v": 2, "accept_id": started}),
        "claim": client.call("POST", "calc-end", {"v": 2, "accept_id": started, "claim": "no", "result": "calc end"}),
        "unknown-token": world.client("x" * 64).call("GET", "v2/list", {"v": 2}), "no-token": world.client("").call("GET", "v2/list", {"v": 2}),
        "expired-token": world.client(world.expired(USER, 3)).call("GET", "v2/list", {"v": 2}),
        "role": world.client(world.issue(USER, "--roles", "remote")).call("GET", "v2/list", {"v": 2}),
        "not-for-site": register(world.client(world.issue(USER, "--sites", "u-full")))}
    status, data, _headers = client.raw("POST", "finish", b"", {"Content-Length": "20000000"})
    answers["body"] = status, json.loads(data.decode("utf-8"))["errors"][0]
    client = world.client()
    client.register("do")
    answers["calculations_per_user"] = register(client)
    suite.run("mi_dicomapi.py", "maintenance", "on", "--reason", "disk %(x)s", "--ini", world.ini)
    wait_until(lambda: bob.ok("GET", "v2/explain", {"v": 2, "accept_id": waits})["cause"] == "maintenance")
    answers["maintenance"] = register(bob)
    for said, (status, first) in answers.items():
        assert status >= 400 and first["said"] == said, (said, status, first)
        for program in (wf, poller):
            for lang in ("en", "ja"):
                monkeypatch.setitem(program.SAY, "lang", lang)
                text = program.refusal_words(first)
                assert text == (program.JA if lang == "ja" else {}).get(relay.REFUSALS[said], relay.REFUSALS[said]) % first["told"], first
                assert str(program.RelayRefused(first["code"], first["message"], first)) == (text if first["code"] != "0005" else first["message"])
            for told in (None, 5, {}, {"count": {}, "site": [], "user": "\x1b[2J"}, {"x": 1}):
                assert "\x1b" not in program.refusal_words(dict(first, told=told))
            assert program.refusal_words({"said": []}) == program.refusal_words({"said": "new"}) == program.refusal_words({}) == ""
    ja, wrong = suite.clean_env(LANG="ja_JP.UTF-8"), world.token_file("y" * 64, "wrong")
    done = suite.run(WF, "submit", SITE, "unlisted", "--patience", "0s", *world.reach(), env=ja, cwd=str(tmp_path))
    assert done.returncode in (75, 77) and ("一覧にありません" in done.stderr or "保守中: disk %(x)s" in done.stderr), done
    done = suite.run(WF, "status", waits, "--url", world.url, "--token-file", wrong, env=ja)
    assert done.returncode == 77 and "知らないトークンです" in done.stderr, done
    folder, path = world.poller({"do": "match = do\nargv = /bin/true"}, token="z" * 64, start=False)
    done = suite.run(POLLER, "poll", "--once", "--ini", path, env=ja)
    assert done.returncode == 77 and "知らないトークンです" in done.stderr, done


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_states_are_told_in_the_words_of_the_readme_in_both_languages(lang, monkeypatch):
    wf = suite.module(WF)
    monkeypatch.setitem(wf.SAY, "lang", lang)
    told = [wf.state_words({"progress": word, "status": status}) for word in WIRE + ("running",) for status in ("none", "completed", "abnormal")]
    assert not set(told) & set(WIRE) and len(set(told)) == len(WIRE) + 2
    assert [wf.state_words({"progress": word}, fielded=True) for word in WIRE] == list(WIRE)
    begins = {"en": ["waiting", "taken", "taken", "ended", "sending", "abnormal"], "ja": ["実行待ち", "入力転送", "入力転送", "結果待ち", "結果転送", "異常終了"]}
    assert all(wf.state_words({"progress": word}).startswith(begin) for word, begin in zip(WIRE, begins[lang]))


# ---- ids

def test_an_unknown_id_is_64_in_all_scripts_and_the_first_eight_characters_do(busy, tmp_path):
    do(busy, "true")
    accept_id = busy.rows("SELECT accept_id FROM calculations ORDER BY seq DESC LIMIT 1")[0]["accept_id"]
    ini, unknown = os.path.join(busy.folder, "poller", "poller.ini"), "00000000-0000-4000-8000-000000000000"
    wait_until(lambda: "delivered" in suite.run(POLLER, "show", accept_id[:8], "--ini", ini).stdout)
    found = json.loads(suite.run(POLLER, "show", accept_id[:8], "--ini", ini, "--json").stdout)
    assert found["id"] == accept_id
    done = suite.run(POLLER, "resend", accept_id[:8], "--ini", ini)
    assert done.returncode == 64 and done.stderr.startswith("mi_system_remote: %s: nothing waits" % accept_id)
    for words in (["status"], ["result", "--to", str(tmp_path / "to")], ["output"], ["wait", "--to", str(tmp_path / "to")]):
        done = busy.workflow(*(words + [accept_id[:8]]))
        assert done.returncode == 0 and (words == ["output"] or accept_id in done.stdout), (words, done.stdout, done.stderr)
    assert accept_id in suite.run("mi_dicomapi.py", "show", accept_id[:8], "--ini", busy.ini).stdout
    home = suite.clean_env(HOME=str(tmp_path))
    for name, words, more in ((POLLER, ["show", unknown], ["--ini", ini]), (POLLER, ["show", accept_id[:7]], ["--ini", ini]),
                              (POLLER, ["resend", unknown], ["--ini", ini]), (RUNNER, ["resume", unknown], []), (RUNNER, ["cancel", unknown], []),
                              (RUNNER, ["clean", unknown], []), (WF, ["status", unknown], busy.reach()), (WF, ["wait", unknown], busy.reach()),
                              (WF, ["cancel", unknown], busy.reach()), (WF, ["result", unknown], busy.reach()), (WF, ["output", unknown], busy.reach()),
                              ("mi_dicomapi.py", ["show", unknown], ["--ini", busy.ini]), ("mi_dicomapi.py", ["cancel", unknown], ["--ini", busy.ini])):
        done = suite.run(name, *(words + more), env=home)
        assert done.returncode == 64 and suite.one_line(done.stderr or done.stdout), (name, words, done.returncode, done.stderr, done.stdout)


def test_runner_ids_by_their_first_eight_characters(tmp_path):
    env = suite.clean_env(HOME=str(tmp_path))
    top, settings = tmp_path / ".local" / "state" / "mi_distcomp_ssh", dict(suite.module(RUNNER).settings_of_options({})._asdict(), retry=[5, 60])
    for ident in ("11111111-0000-4000-8000-000000000001", "22222222-0000-4000-8000-000000000001", "22222222-0000-4000-8000-000000000002"):
        (top / ident).mkdir(parents=True)
        (top / ident / "order.json").write_text(json.dumps({"host": "h", "command": "c", "inputs": [], "into": str(tmp_path), "mode": "run", "keep": False,
                                                            "batch": None, "time": time.time(), "settings": settings}))
    for word, says in (("33333333", "no such calculation here"), ("3333", "not a UUID")):
        for command in ("clean", "resume", "cancel"):
            done = suite.run(RUNNER, command, word, env=env)
            text = done.stdout + done.stderr
            assert done.returncode == 64 and says in text and suite.one_line(text) and text.count(word) == 1, (command, text)
    done = suite.run(RUNNER, "clean", "22222222", env=env)
    assert done.returncode == 64 and "which one?" in done.stderr and suite.one_line(done.stderr)
    done = suite.run(RUNNER, "clean", "11111111", env=env)
    assert (done.returncode, done.stdout) == (0, "11111111-0000-4000-8000-000000000001: cleaned\n")


# ---- how the poller stands

def test_check_and_list_say_paused_out_of_hours_and_that_a_running_poller_has_other_values(busy):
    ini = os.path.join(busy.folder, "poller", "poller.ini")

    def both():
        return suite.run(POLLER, "list", "--ini", ini).stdout, suite.run(POLLER, "check", "--ini", ini).stdout

    do(busy, "true")                                   # it is up, and has had something
    assert all("a poller runs" in text and "other values" not in text and "paused" not in text for text in both())
    suite.run(POLLER, "pause", "--ini", ini)
    assert all("paused: nothing new is taken" in text for text in both())
    suite.run(POLLER, "resume", "--ini", ini)
    with open(ini) as text:
        before = text.read()
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[(time.localtime().tm_wday + 3) % 7]
    with open(ini, "w") as out:
        out.write(before.replace("[poller]\n", "[poller]\nproxy = http://127.0.0.1:9\nhours = %s 1-2\n" % day))
    for text in both():                                # the hours it reads by itself, a moment later
        assert "outside of [poller] hours" in text and re.search(r"other values.*\[poller\] proxy;", text.replace("[poller] hours, ", "")), text
    with open(ini, "w") as out:
        out.write(before)
    wait_until(lambda: not any("other values" in text for text in both()))
    assert json.loads(suite.run(POLLER, "list", "--json", "--ini", ini).stdout)


def test_no_character_that_steers_a_terminal_passes_for_a_plain_one():
    wf = suite.module(WF)
    passed = [one for one in map(chr, range(0x110000)) if not wf.has_control_chars(one)]
    assert not re.search(wf.CONTROL_CHARS, "".join(passed)) and len(passed) > 1000000
    assert wf.printable("a\x1bb\u202ec\ud800") == "a\\x1bb\\u202ec\\ud800"
