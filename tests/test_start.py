"""How a program starts: where it looks for its ini and its modules, and who may write there; options before and after the word; closed descriptors."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import suite
from suite import SITE, one_line
from test_form import SCRIPTS, pythons

INI = "mi_distributed_computing_assist.ini"
RELAY, WF, POLLER, SSH = "mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py", "execute_remote_command.py"
ID = "00000000-0000-4000-8000-000000000000"
# program: the words that read the ini and do nothing else; the places that are searched, in this order; what it says where none has one
PROGRAMS = {"relay": (RELAY, ["list"], ["here", "beside", "home"], "no mi_distributed"), "workflow side": (WF, ["status", ID], ["beside", "home"], "no relay"),
            "poller": (POLLER, ["poll"], ["beside", "home"], "say --ini FILE"), "runner": (SSH, ["check", "nobody@127.0.0.1"], ["beside", "home"], "ssh goes to"),
            "guard": (SSH, ["guard"], ["beside"], "no mi_distributed"), "guard's check": (SSH, ["check"], ["beside"], "no mi_distributed")}


class Places:
    """A program's copy in a directory of its own, a directory where it is started, a home."""

    def __init__(self, folder, program):
        self.script, self.words = PROGRAMS[program][:2]
        self.folders = {"here": folder / "here", "beside": folder / "beside", "home": folder / "home" / ".config"}
        for place in self.folders.values():
            place.mkdir(parents=True)
        shutil.copy(suite.script(self.script), str(self.folders["beside"]))
        self.home = str(folder / "home")

    def ini(self, place, text="wrong\n"):
        """An ini there, which nobody can read without saying so."""
        path = self.folders[place] / INI
        path.write_text(text)
        return path

    def run(self, *more, python=suite.PYTHON, options=("-I", "-S"), **env):
        """The program: (exit code, stdout and stderr)."""
        done = subprocess.run([python] + list(options) + [str(self.folders["beside"] / self.script)] + self.words + list(more), cwd=str(self.folders["here"]),
                              env=suite.clean_env(HOME=self.home, **env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        return done.returncode, done.stdout.decode("utf-8")


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_looks_for_its_ini_where_it_may_and_nowhere_else(tmp_path, program):
    places = Places(tmp_path, program)
    inis = {place: places.ini(place) for place in places.folders}
    given = tmp_path / "given.ini"
    given.write_text("wrong\n")
    code, text = places.run("--ini", str(given))
    assert code == 78 and str(given) in text, text
    for place in PROGRAMS[program][2]:
        code, text = places.run()
        assert code == 78 and str(inis[place]) in text and text.count("\n") == 1, (place, text)
        inis.pop(place).unlink()
    code, text = places.run()
    assert not any(str(path) in text for path in inis.values()) and PROGRAMS[program][3] in text and code in (64, 69, 78), text


def test_a_relay_that_is_started_beside_itself_names_each_searched_directory_once(tmp_path):
    places = Places(tmp_path, "relay")
    places.folders["here"] = places.folders["beside"]
    assert places.run()[1].count(str(places.folders["beside"])) == 1


DAMAGES = {"a file that its group may write": lambda file: file.chmod(0o664), "a file that all may write": lambda file: file.chmod(0o646),
           "a directory that its group may write": lambda file: file.parent.chmod(0o770), "a directory that all may write": lambda file: file.parent.chmod(0o1777),
           "another's file": lambda file: os.chown(str(file), 65534, -1), "another's directory": lambda file: os.chown(str(file.parent), 65534, -1)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_ini_that_somebody_else_may_change_is_refused_in_one_line(tmp_path, damage):
    if "another" in damage and os.geteuid() != 0:
        pytest.skip("needs root: chown")
    module = suite.module(RELAY)
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    path, link = tmp_path / "far" / INI, tmp_path / "near" / INI
    path.write_text("")
    link.symlink_to(path)
    for name in (path, link):
        module.read_ini(str(name), module.INI_KEYS)
    DAMAGES[damage](path)
    for name in (path, link):
        with pytest.raises(module.Stop) as stop:
            module.read_ini(str(name), module.INI_KEYS)
        assert stop.value.code == 78 and any(str(stop.value).startswith("%s: must" % named) for named in (name, path.parent))


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_looks_who_may_write_to_its_ini_and_to_the_directory(tmp_path, program):
    places = Places(tmp_path, program)
    place = PROGRAMS[program][2][0]
    ini = places.ini(place)
    for path, mode, sound in ((ini, 0o620, 0o600), (places.folders[place], 0o770, 0o700)):
        path.chmod(mode)
        code, text = places.run()
        assert code == 78 and "%s: must belong to you or root" % path in text and text.count("\n") == 1, text
        path.chmod(sound)


def imported(name):
    """Every module that a script imports anywhere, and some that those import."""
    with open(suite.script(name), encoding="utf-8") as text:
        tree = ast.parse(text.read())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {module.split(".")[0] for module in found} - {"sys", "posix", "openam_operator"} | {"warnings", "weakref", "token", "enum", "stat"}


WAYS = {"as most do": ([], {}), "without site": (["-S"], {}), "-I": (["-I"], {}), "the current directory in PYTHONPATH": ([], {"PYTHONPATH": "/nowhere:"}),
        "its own directory in PYTHONPATH": ([], {"PYTHONPATH": "BESIDE"})}


@pytest.mark.parametrize("program", ["relay", "workflow side", "poller", "runner"])
def test_no_module_is_taken_from_beside_the_script_or_from_where_it_is_started(tmp_path, program):
    """json.py and all others; by its path, by a link, as a module of the current directory; under the oldest, the newest and this Python."""
    places, ran = Places(tmp_path, program), tmp_path / "ran"
    for name in imported(places.script):
        for folder in ("here", "beside"):
            (places.folders[folder] / (name + ".py")).write_text("open(%r, 'a').write(%r)\nraise SystemExit(99)\n" % (str(ran), name))
    early = subprocess.run([suite.PYTHON, "-c", "import sys; print(*sys.modules)"], stdout=subprocess.PIPE).stdout.decode().split()
    link = tmp_path / "home" / "link"
    link.symlink_to(places.folders["beside"] / places.script)
    ways = [(way, options, dict(env, **({"PYTHONPATH": str(places.folders["beside"])} if "BESIDE" in env.values() else {}))) for way, (options, env) in WAYS.items()]
    for way, options, env in ways:
        for path in [path for place in ("here", "beside") for path in places.folders[place].glob("*.py") if env and path.stem in early]:
            path.unlink()                              # what Python takes from PYTHONPATH itself before any program begins is not ours
        for python in sorted(pythons()) if way == "as most do" else [suite.PYTHON]:
            code, text = places.run(python=python, options=options, **env)
            assert not ran.exists() and code in (64, 69, 78), (way, python, text, ran.exists() and ran.read_text())
    runs = subprocess.run([suite.PYTHON, "-c", "import runpy, sys; print(*sys.modules)"], stdout=subprocess.PIPE).stdout.decode().split()
    for path in [path for path in places.folders["here"].glob("*.py") if path.stem in runs]:
        path.unlink()                                  # what Python's own -m loads, from the current directory too, is not ours either
    shutil.copy(suite.script(places.script), str(places.folders["here"]))
    for words in ([str(link)], ["-m", places.script[:-3]]):
        done = subprocess.run([suite.PYTHON] + words + ["--version"], cwd=str(places.folders["here"]), env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert not ran.exists() and (done.returncode, done.stderr) == (0, b""), (words, done)


def test_who_imports_a_script_keeps_its_search_path(tmp_path):
    code = "import sys; sys.path[:0] = [%r, '', '.']; before = list(sys.path); import mi_system_wf; assert sys.path == before" % suite.ROOT
    subprocess.run([suite.PYTHON, "-B", "-c", code], cwd=str(tmp_path), check=True)


def test_no_program_is_taken_from_where_it_is_started(tmp_path):
    """PATH with a blank or relative entry, or none at all (Python 3.6 then looks in the current directory first)."""
    places, ran = Places(tmp_path, "runner"), tmp_path / "ran"
    for name in ("ssh", "rsync", "sh", "mv"):
        (places.folders["here"] / name).write_text("#!/bin/sh\necho %s >>%s\n" % (name, ran))
        (places.folders["here"] / name).chmod(0o755)
    places.words = ["check", "nobody@127.0.0.1"]
    for path in ("", ":/usr/bin:/bin", ".:/usr/bin:/bin", "../here:/usr/bin"):
        for python in sorted(pythons()) if path == "" else [suite.PYTHON]:
            code, text = places.run(python=python, PATH=path)
            assert not ran.exists() and code == 78 and "Traceback" not in text, (path, text)


def test_the_sites_login_program_is_taken_from_its_variable_only_and_if_nobody_else_may_write_there(tmp_path):
    places = Places(tmp_path, "poller")
    ini = places.ini("beside", "[poller]\nsite = s\nurl = http://127.0.0.1:9\n[command x]\nargv = /bin/true\n")
    places.words, good, ran = [SITE, "http://127.0.0.1:9", "login", "--once", "--ini", str(ini)], tmp_path / "operator", tmp_path / "ran"
    good.mkdir()
    for folder in (places.folders["here"], good, places.folders["beside"]):
        (folder / "openam_operator.py").write_text("open(%r, 'w')\nclass openam_operator:\n    def miLogin(host): return None, None\n" % str(ran))
    for value, code in ((None, 78), ("", 78), (".", 78), ("../operator", 78), (str(good), 77)):
        found, text = places.run(**({} if value is None else {"AUTHENTICATION_OPERATOR": value}))
        assert found == code and ran.exists() == (code == 77), (value, text)
    ran.unlink()
    for path, mode in ((good / "openam_operator.py", 0o664), (good, 0o775)):
        before = path.stat().st_mode
        path.chmod(mode)
        found, text = places.run(AUTHENTICATION_OPERATOR=str(good))
        assert found == 78 and str(path) in text and text.count("\n") == 1 and not ran.exists(), text
        path.chmod(before & 0o777)


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_stand_before_or_after_the_word_and_an_ini_that_is_not_there_is_never_passed_over(tmp_path, name):
    words = {RELAY: ["list"], WF: ["check"], POLLER: ["list"], SSH: ["check"]}[name]
    ini = tmp_path / "ini"
    ini.write_text("[Server]\nstate_dir = %s\n[RemoteSites]\nremote_site_ids = s\n[s]\ncommands = x\n[poller]\ncalc_base = %s\n" % (tmp_path / "s", tmp_path / "b"))
    env = suite.clean_env(HOME=str(tmp_path))
    suite.run(RELAY, "token", "issue", "u", "--ini", ini)

    def same(*options):
        before = suite.run(name, *(list(options) + words), env=env)
        after = suite.run(name, *(words + list(options)), env=env)
        assert [re.sub(r"[\d.]+ GB", "", part) for part in (str(before.returncode), before.stdout, before.stderr)] == [
            re.sub(r"[\d.]+ GB", "", part) for part in (str(after.returncode), after.stdout, after.stderr)], options
        return before

    for given in (["--ini", str(tmp_path / "none.ini")], ["--ini="]):
        done = same(*given)
        assert done.returncode == 78 and "no such file (--ini)" in done.stdout + done.stderr, done
    assert json.loads(same("--json", "-v", "--ini", ini).stdout) is not None and " sha256 " in same("--version").stdout


def test_an_ini_that_is_named_before_serve_is_the_one_that_it_serves(tmp_path, make_world):
    world = make_world(tls=False)
    world.write_ini(suite.a_port())
    made = suite.Process(RELAY, ["--ini", world.ini, "serve"], str(tmp_path))
    try:
        suite.wait_until(lambda: " listening " in made.text() or not made.alive())
        assert "state=%s" % world.state in made.text()
    finally:
        made.kill()


def test_the_fielded_words_of_the_ssh_runner_take_options_too(tmp_path):
    done = suite.run(SSH, "client_name:h", "--ini", tmp_path / "none", "client_cmd:true")
    assert done.returncode == 78 and one_line(done.stderr) and "none: no such file (--ini)" in done.stderr


def test_check_without_an_ini_says_what_to_do(tmp_path):
    for program in ("relay", "poller", "guard's check"):
        (tmp_path / program).mkdir()
        places = Places(tmp_path / program, program)
        places.words = ["check"]
        code, text = places.run()
        assert code == 78 and "None" not in text and "no %s in %s" % (INI, "" if program == "relay" else places.folders["beside"]) in text and "say --ini FILE" in text, text


def test_the_key_line_always_names_the_ini_and_check_reads_that_one(tmp_path):
    places = Places(tmp_path, "guard")
    (tmp_path / "id.pub").write_text("ssh-ed25519 AAAA comment\n")
    beside, other = places.ini("beside", "[ssh guard]\nbase = %s\n" % tmp_path), places.folders["here"] / "other.ini"
    other.write_text("[ssh guard]\nbase = %s\n" % tmp_path)
    for words, ini in (([], beside), (["--ini", "other.ini"], other)):
        code, text = places.run("--print-key-line", str(tmp_path / "id.pub"), *words)
        assert code == 0 and ' guard --ini %s" ssh-ed25519' % ini in text, text
        checked = places.words, places.run
        places.words = ["check"]
        assert "rules: %s\n" % ini in places.run(*words)[1]
        places.words = checked[0]


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


def closed(descriptors, name, words, **how):
    """A program whose descriptors are closed, as old init scripts and daemonizers do."""
    line = ["sh", "-c", 'exec "$@" ' + descriptors, "sh", suite.PYTHON, "-I", "-S", suite.script(name)] + [str(word) for word in words]
    return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=suite.clean_env(), **how)


@pytest.mark.parametrize("descriptors", CLOSED)
def test_relay_poller_and_workflow_side_do_their_work_with_closed_descriptors(make_world, tmp_path, descriptors):
    """And nothing that they say gets into a file of theirs that was opened in that place."""
    world = make_world(tls=False, commands=["solve"])
    world.token = world.issue(suite.USER)
    world.port = suite.a_port()
    world.url = "http://127.0.0.1:%d" % world.port
    world.write_ini(world.port)
    (tmp_path / "solve").write_text("#!/bin/sh\ncat in.txt; echo said >&2; cp in.txt out.txt\n")
    (tmp_path / "solve").chmod(0o755)
    (tmp_path / "in.txt").write_text("input\n")
    folder, ini = world.poller({"solve": "match = solve\nargv = %s" % (tmp_path / "solve")}, start=False)
    relay, poller = closed(descriptors, RELAY, ["serve", "--ini", world.ini]), None
    try:
        suite.wait_until(lambda: suite.run(WF, "check", *world.reach()[:2], "--token-file", world.token_file()).returncode == 0 or relay.poll() is not None)
        poller = closed(descriptors, POLLER, ["poll", "--ini", ini])
        done = closed(descriptors, WF, ["run", SITE, "solve", "--in", "in.txt", "--out", "out.txt"] + world.reach(), cwd=str(tmp_path))
        text = done.communicate(timeout=60)[0].decode()
        assert done.returncode == 0 and "Traceback" not in text, text
        assert (tmp_path / "out.txt").read_text() == (tmp_path / suite.LOGS[0]).read_text() == "input\n" and (tmp_path / suite.LOGS[1]).read_text() == "said\n"
        assert len(json.loads(suite.run(RELAY, "list", "--all", "--json", "--ini", world.ini).stdout)) == 1
    finally:
        texts = []
        for process in (poller, relay):
            if process:
                process.terminate()
                texts.append((process.communicate(timeout=20)[0].decode(), process.returncode))
    assert not any("Traceback" in text or "bug" in text for text, code in texts) and [code for text, code in texts] == [0, 0], texts


NOBODY = """import os, pwd, runpy, sys
def unknown(uid): raise KeyError(uid)
pwd.getpwuid, sys.argv = unknown, sys.argv[1:]
runpy.run_path(sys.argv[0], {"STARTED_LEAN": True}, "__main__")"""


@pytest.mark.parametrize("home", [None, "here"], ids=["no passwd entry", "a HOME that is no path"])
def test_without_a_home_directory_no_record_lands_where_a_program_is_started(tmp_path, home):
    ini, place = tmp_path / "ini", tmp_path / "cwd"
    place.mkdir()
    ini.write_text("[poller]\nsite = u\nurl = https://127.0.0.1:1\ntoken_file = %s\n[command x]\nargv = /bin/true\n[ssh guard]\nbase = ~/b\n" % (tmp_path / "token"))
    (tmp_path / "token").write_text("t\n")
    (tmp_path / "token").chmod(0o600)
    env = suite.clean_env(HOME=home or "")
    if home is None:
        del env["HOME"]
    cases = [(POLLER, ["list"]), (POLLER, ["poll"]), (POLLER, ["check"]), (SSH, ["list"]), (SSH, ["run", "nohost", "true"])]
    for name, words in cases + [(SSH, ["guard"])] * (home is None):
        done = subprocess.run([sys.executable, "-c", NOBODY, suite.script(name)] + words + ["--ini", str(ini)], cwd=str(place), env=env,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        text = done.stdout.decode()
        assert done.returncode == 78 and "no home directory is known" in text and "Traceback" not in text, (name, words, done.returncode, text)
        assert words != ["list"] or text.count("\n") == 1, text
    assert os.listdir(str(place)) == []


@pytest.mark.parametrize("mode,code", [(0o777, 78), (0o775, 0), (0o1777, None)])
def test_the_poller_runs_nothing_where_others_could_exchange_its_directory(tmp_path, mode, code):
    ini, above = tmp_path / "ini", tmp_path / "above"
    above.mkdir()
    above.chmod(mode)
    if code is None and os.geteuid():                  # sticky, but not root's: its owner is this user
        code = 78
    ini.write_text("[poller]\nsite = u\nurl = https://127.0.0.1:1\ncalc_base = %s\n" % (above / "base"))
    done, check = (suite.run(POLLER, word, "--ini", ini) for word in ("list", "check"))
    assert done.returncode == (code or 0), done
    told = [row for row in check.stdout.splitlines() if "calc_base: %s: others may write to it" % above in row]
    assert [row.split()[0] for row in told] == {0o777: ["FAIL"], 0o775: ["WARN"]}.get(mode, ["FAIL"] * bool(code)), check.stdout


def test_every_program_behaves_with_closed_descriptors(tmp_path):
    ini = tmp_path / "ini"
    ini.write_text("[Server]\nstate_dir = %s\n[poller]\ncalc_base = %s\n[ssh guard]\nbase = %s\n" % (tmp_path / "s", tmp_path / "b", tmp_path / "g"))
    suite.run(RELAY, "token", "issue", "u", "--ini", ini)
    for name, words in ((RELAY, ["token", "list"]), (RELAY, ["nonsense"]), (WF, ["check"]), (WF, ["status", "x"]), (POLLER, ["list"]),
                        (POLLER, ["--help"]), (SSH, ["guard"]), (SSH, ["list"])):
        words = words + ["--ini", ini]
        expected = suite.run(name, *words).returncode
        for descriptors, done in [(one, closed(one, name, words, cwd=str(tmp_path))) for one in CLOSED[1:]]:
            text = done.communicate(timeout=60)[0].decode()
            assert done.returncode == expected and "Traceback" not in text and "Bad file" not in text, (name, words, descriptors, expected, done.returncode, text)
