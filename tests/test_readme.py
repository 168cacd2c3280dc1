"""The README's commands and ini texts, as they stand; its words, keys, links and tests are there; no line is wide."""
import ast
import configparser
import os
import re
import shlex
import shutil
import subprocess
import unicodedata

import blocks as shared_blocks
import pytest
import ssh_lab
import suite

with open(os.path.join(suite.ROOT, "README.md"), encoding="utf-8") as text:
    README = text.read()
ENGLISH, JAPANESE = README.split("\n## 日本語\n")
SCRIPTS = ("mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py", "execute_remote_command.py")
URL = "https://relay.example.org:50443"
NO_KEYS = ("accept_id", "accept_ids", "exit_code", "ended_by", "calc_progress", "https_proxy", "request_cpus")
# what only root may do, on a machine of one's own: what it is told, or what is left of it
SHIMS = {"useradd": "exit 0", "systemctl": "exit 0", "chown": "exit 0", "sudo": 'exec "$@"', "runuser": 'shift 3; exec "$@"',
         "install": 'for word; do shift; case $word in -o) drop=yes;; *) [ -z "$drop" ] && set -- "$@" "$word"; drop=;; esac; done; exec /usr/bin/install "$@"'}


def blocks(part):
    """[(section's title, kind, text)] of the fenced texts."""
    found, section = [], ""
    for title, kind, body in re.findall(r"^##+ ([^\n]*)$|^```(\w+)\n(.*?)^```$", part, re.M | re.S):
        section = title or section
        if kind:
            found.append((section, kind, body))
    return found


def width(line):
    """Columns on a terminal."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


# ---- what stands there is there

def test_the_first_success_is_within_the_first_twenty_lines_and_so_is_the_way_to_the_japanese_part():
    first = README.splitlines()[:20]
    assert "python3 mi_dicomapi.py demo" in first and "[日本語](#日本語)" in first[2]


def test_no_line_is_wide():
    wide = [(number, width(line)) for number, line in enumerate(README.split("\n"), 1) if width(line) > 120]
    assert not wide, wide


def test_every_link_leads_to_a_heading():
    heads = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^##+ (.*)$", README, re.M)}
    links = set(re.findall(r"\]\(#(.*?)\)", README))
    assert len(links) > 8 and not links - heads, links - heads


def test_every_test_that_the_readme_names_is_there():
    named, texts = set(re.findall(r"`(?:tests/)?((?:bench/)?\w*(?:test|fuzz|bench)\w*(?:\.py)?)`", README)) - {"tests"}, ""
    for folder, folders, files in os.walk(os.path.join(suite.ROOT, "tests")):
        texts += " ".join(files)
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8") as text:
                    texts += text.read()
    missing = [name for name in named if ("def " + name + "(" if not name.endswith(".py") else os.path.basename(name)) not in texts]
    assert len(named) > 10 and not missing, missing


def dotted(node):
    """The name of what is called, as a.b.c."""
    return "%s.%s" % (dotted(node.value), node.attr) if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def test_what_decides_what_runs_and_what_leaves_stands_where_the_readme_says():
    rows = shared_blocks.audited()
    assert shared_blocks.told(README) == README, "python3 tests/blocks.py mi_system_remote.py brings the table up to date"
    assert all(README.count(row + "\n") == 1 for row in rows.values()) and len(rows) == len(shared_blocks.AUDITED)
    with open(suite.script("mi_system_remote.py"), encoding="utf-8") as text:
        program = text.read()
    spans = [tuple(map(int, re.search(r"\| (\d+) to (\d+) \|", row).groups())) for row in rows.values()]
    assert spans[0][0] < 150
    starts = re.compile(r"(subprocess\.(Popen|run|call|check_\w+)|os\.(fork|exec\w+|spawn\w+|posix_spawn\w*|system|popen|kill|killpg)|popen|pty\..*)\Z")
    found = {}
    for top in ast.parse(program).body:
        for node in ast.walk(top):
            if isinstance(node, ast.Call) and starts.match(dotted(node.func)):
                found[node.lineno] = getattr(top, "name", "")
    elsewhere = {name for line, name in found.items() if not any(first <= line <= last for first, last in spans)}
    assert len(found) > 5 and elsewhere == {"hide_token", "start_lean"}, elsewhere         # which start this program anew


def tables():
    """{section: its keys} of all scripts' ini tables; all sections of commands and sites as one each."""
    found = {}
    for name in SCRIPTS:
        script = suite.module(name)
        for section, keys in script.INI_KEYS.items():
            found.setdefault(section, set()).update(keys)
    return found


def test_every_key_of_an_ini_that_the_readme_names_is_one():
    known, wrong = tables(), []
    every = set().union(*known.values())

    def is_key(key, among):
        return key in among or re.sub(r"\..*", ".*", key) in among

    for section, key in re.findall(r"`\[([\w ]+)\] (\w+)", README):
        if not is_key(key, known.get(re.sub("command .*", "command *", section), ())):
            wrong.append("[%s] %s" % (section, key))
    wrong += [key for key in re.findall(r"`([a-z_]+(?:\.[\w.]+)?) = ", README) if not is_key(key, every) and key not in NO_KEYS]
    wrong += [key for key in re.findall(r"`([a-z]+_[a-z_]+)`", README) if not is_key(key, every) and not key.startswith("test_") and key not in NO_KEYS]
    for section, kind, body in blocks(README):
        if kind == "ini":
            parser = configparser.RawConfigParser()
            parser.read_string(body)
            for name in parser.sections():
                group = name.split(" ")[0] + " *" if name.startswith(("command ", "signer ")) else name if name in known else "*"
                wrong += [key for key in parser.options(name) if not is_key(key, known[group])]
    assert not wrong, wrong


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_word_of_a_script_that_the_readme_names_is_one(name):
    import test_form
    words = {word.split()[0] for word in test_form.subcommands(name)}
    named = re.findall(r"(?:python3 |`|/)%s (?:-q )?([a-z][\w-]*)" % re.escape(name), README)
    for table in re.findall(r"^\| [^|]* \| (?:words of )?`%s`(?: の語)? \|\n((?:\|.*\n)+)" % re.escape(name), README, re.M):
        named += re.findall(r"[|、,;] `([a-z][\w-]*)", table)
    unknown = {word for word in named if word not in words | {"client_name"}}
    assert len(set(named)) >= 3 and not unknown, unknown


def test_the_paths_that_a_gateway_lets_through_are_the_relays_calls():
    relay = suite.module("mi_dicomapi.py")
    told, also = (re.search(r"`/mi-distcomp-api/`[^`]*`(add-calcinfo[^`]*)`", part).group(1).split() for part in (ENGLISH, JAPANESE))
    calls = {name for method, name in relay.ROUTES} | set(relay.OPEN_CALLS)
    assert sorted(told) == sorted(also) == sorted({re.sub("^(v2|files)/.*", r"\1/", name) for name in calls})


def test_the_states_of_the_relay_in_the_readme_are_its_own():
    relay = suite.module("mi_dicomapi.py")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.search(
        r"^### States\n.*?((?:^\|[^\n]*\n)+)", README, re.M | re.S).group(1).splitlines()[2:]]
    told = {word for row in rows for word in row[3].split(", ")}
    assert told - {"with *out of contact*"} == set(relay.WORDS)
    assert {word for row in rows for word in row[2].split(", ")} - {"completed", "abnormal", "running and on"} == set(relay.WORDS.values())
    remote, runner = suite.module("mi_system_remote.py"), suite.module("execute_remote_command.py")
    assert {word for row in rows for word in row[4].split(", ")} - {"", "(knows nothing of it)"} == set(remote.LISTED_STATES)
    assert {word for row in rows for word in row[5].split(", ")} - {""} == set(runner.STATES) - {"none"}


def test_what_is_read_again_in_mid_run_is_what_the_scripts_take_so():
    relay, remote = suite.module("mi_dicomapi.py"), suite.module("mi_system_remote.py")
    only_then = re.search(r"Only at a start: (.*?)\.\n", ENGLISH, re.S).group(1)
    at_once = re.search(r"the ini when it changes, and on SIGHUP: (.*?);", ENGLISH, re.S).group(1)
    assert set(re.findall(r"`(\w+)`", only_then)) == {key for section, key in relay.AT_START}
    assert set(re.findall(r"`(\w+)`", at_once)) == set(remote.AT_RELOAD)


# ---- what is typed there works

def test_every_command_line_is_run_by_one_of_these_tests():
    assert {section for section, kind, body in blocks(README) if kind in ("sh", "crontab")} <= set(SCENE) | {"", "The SSH way"}
    assert [kind for section, kind, body in blocks(README)].count("sh") >= 12


def test_the_demo_command_works_as_it_stands(tmp_path):
    for name in ("mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py"):
        shutil.copy(suite.script(name), str(tmp_path))
    done = subprocess.run(["sh", "-c", "python3 mi_dicomapi.py demo"], cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 0, done.stdout.decode()


def test_the_test_command_installs_and_starts_pytest():
    assert "sh tests/run.sh" in README.splitlines()
    done = subprocess.run(["sh", "tests/run.sh", "--collect-only", "tests/test_readme.py"], cwd=suite.ROOT, env=dict(os.environ, MI_TEST_BENCH="no"),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout.decode()


OPERATOR, ADMIN, AUTHOR, RESEARCHER, SIGNER = "operator", "admin", "author", "researcher", "signer"
SCENE = {"For the operator of the relay": OPERATOR, "For the admin of an external computer": ADMIN, "For the author of a module": AUTHOR,
         "For the researcher": RESEARCHER, "Signed orders and results": SIGNER, "運用者: 中継サーバー": OPERATOR, "管理者: 外部計算機": ADMIN, "モジュールの作成者と研究者": AUTHOR}


class Scene:
    """Relay, external computer and module on this machine, set up by nothing but the README's texts: /etc, /opt, /var/lib and /home lie
    below the folder, the relay's name is an address, and what only root may do is left out."""

    def __init__(self, folder, part):
        self.folder, self.work, self.home, self.port = folder, os.path.join(folder, "work"), os.path.join(folder, "home"), suite.a_port()
        self.url, self.processes, self.said = "https://127.0.0.1:%d" % self.port, [], ""
        self.parts = {who: [(kind, body) for section, kind, body in blocks(part) if SCENE.get(section) == who] for who in SCENE.values()}
        for place in ("work", "home/bin", "bin", "etc/systemd/system", "opt", "var/lib"):
            os.makedirs(os.path.join(folder, place), 0o755)
        for name in SCRIPTS + ("mi_distributed_computing_assist.ini",):                # that one must not be taken for the one of /etc
            shutil.copy(suite.script(name), self.work)
        for name, body in SHIMS.items():
            self.write(os.path.join("bin", name), "#!/bin/sh\n%s\n" % body, 0o755)
        self.write("home/bin/fatigue_life.py", "#!/bin/sh\necho \"$@\" >said\ncat steel.json loads.csv said >life.json\n", 0o755)
        for name in ("steel.json", "loads.csv"):
            self.write(os.path.join("work", name), name + "\n")
        self.env = suite.clean_env(HOME=self.home, PATH=os.path.join(folder, "bin") + ":" + os.environ["PATH"], PYTHONDONTWRITEBYTECODE="1")

    def write(self, name, body, mode=0o644):
        """A file below the folder."""
        with open(os.open(os.path.join(self.folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as out:
            out.write(body)

    def here(self, body):
        """A text of the README, for this machine."""
        body = re.sub(r"(?<![\w~.])/(etc|opt|var/lib)/", r"%s/\1/" % self.folder, body)
        body = body.replace("/home/calc", self.home).replace(URL, self.url)
        return body.replace("--name relay.example.org", "--name 127.0.0.1:%d" % self.port)

    def type(self, body, background=False):
        """A text of commands, by a shell that ends at the first failure."""
        words = ["sh", "-euc", self.here(body)]
        if background:
            return subprocess.Popen(words, cwd=self.work, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        done = subprocess.run(words, cwd=self.work, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        self.said += done.stdout.decode("utf-8", "replace")
        assert done.returncode == 0, "%s\n%s" % (body, self.said)
        return done.stdout.decode("utf-8", "replace")

    def set_up(self):
        """Both hosts, as far as the README goes; the relay is started as its unit says."""
        self.type("".join(body for kind, body in self.parts[OPERATOR] if kind == "sh"))
        start = re.search(r"^ExecStart=(.*)$", open(os.path.join(self.folder, "etc/systemd/system/mi_dicomapi.service")).read(), re.M).group(1)
        with open(os.path.join(self.folder, "relay.log"), "wb") as log:
            self.processes.append(subprocess.Popen(shlex.split(start), cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        suite.wait_until(lambda: "listening" in open(os.path.join(self.folder, "relay.log")).read(), what="relay")
        for name in ("u-tokyo.suzuki", "modules.suzuki"):        # handed over
            shutil.copytree(os.path.join(self.folder, "var/lib/mi_distcomp/relay/kits", name), os.path.join(self.home, name))
        crontab = ""
        for kind, body in self.parts[ADMIN]:
            if kind == "ini":
                kit = os.path.join("home/u-tokyo.suzuki/mi_distributed_computing_assist.ini")
                with open(os.path.join(self.folder, kit), encoding="utf-8") as text:
                    self.write(kit, re.sub(r"^\[command hello\](.*\n)*", self.here(body).replace("\\", "\\\\"), text.read(), flags=re.M), 0o600)
            elif kind == "crontab":
                crontab = re.match(r"(?:\S+ ){5}(.*)\n", body).group(1)
            else:
                self.type(body)
        return crontab

    def close(self):
        """Ends what runs."""
        for process in self.processes:
            process.terminate()
            process.wait(20)


@pytest.mark.parametrize("part", [ENGLISH, JAPANESE], ids=["English", "Japanese"])
def test_the_parts_of_the_readme_set_up_two_hosts_and_a_module_that_work_together(part, tmp_path):
    suite.needs("openssl")
    scene = Scene(str(tmp_path), part)
    try:
        crontab = scene.set_up()
        module = scene.type(scene.parts[AUTHOR][0][1], background=True)
        suite.wait_until(lambda: "2 allow-wait-calc" in open(os.path.join(scene.folder, "relay.log")).read() or module.poll() is not None, what="registered")
        scene.type(crontab)
        said = module.communicate(timeout=60)[0].decode()
        assert module.returncode == 0, said + scene.said
        with open(os.path.join(scene.work, "life.json")) as text:
            assert text.read() == "steel.json\nloads.csv\n12 fine\n"
        accept_id = re.search(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", said).group(0)
        for kind, body in scene.parts[RESEARCHER]:
            assert accept_id in scene.type(body.replace("ACCEPT_ID", accept_id[:8]))
        assert "[Service]" in open(os.path.join(scene.work, "mi_system_remote.service")).read()
        for kind, body in scene.parts[SIGNER]:
            assert kind == "ini" or re.search(r"^\[signer suzuki\]\nkey = ssh-ed25519 \S+ suzuki$", scene.type(body), re.M), scene.said
    finally:
        scene.close()


def test_the_notebook_of_the_readme_runs_as_it_stands(tmp_path):
    suite.needs("openssl")
    scene = Scene(str(tmp_path), ENGLISH)
    try:
        scene.set_up()
        body, = [body for section, kind, body in blocks(ENGLISH) if kind == "python"]
        scene.write("work/notebook.py", scene.here(body))
        poller = scene.type("exec python3 ~/u-tokyo.suzuki/mi_system_remote.py poll", background=True)
        scene.processes.insert(0, poller)
        said = scene.type("python3 notebook.py")
        assert sorted(re.sub(" and left .*'life.json'.*", "", line) for line in said.splitlines()[:2]) == ["coarse ended with 0", "fine ended with 0"], said
        assert sorted(said.splitlines()[2:]) == ["sweep-%s done 0" % mesh for mesh in ("coarse", "fine")], said
        with open(os.path.join(scene.work, "sweep", "coarse", "life.json")) as text:
            assert text.read() == "steel.json\nloads.csv\n12 coarse\n"
    finally:
        scene.close()


def test_the_lines_of_the_ssh_way_work_as_they_stand(tmp_path):
    lab = ssh_lab.Lab()
    try:
        lab.start()
        work, home = tmp_path / "work", tmp_path / "home"
        (work / "table").mkdir(parents=True)
        (home / ".config").mkdir(parents=True)
        (work / "table" / "t.csv").write_text("1\n")
        (work / "model.inp").write_text("model\n")
        (home / ".config" / "mi_distributed_computing_assist.ini").write_text("[ssh]\nbase = %s\nssh_options = -F %s\n" % (
            lab.path("far", "base"), lab.path("config")))
        os.makedirs(lab.path("bin"), exist_ok=True)
        shutil.copy(suite.script("execute_remote_command.py"), str(work))
        lines, = [body for section, kind, body in blocks(ENGLISH) if section == "The SSH way" and kind == "sh"]
        lines = lines.replace("solve.sh 4", "sh -c \"cat model.inp table/t.csv t.csv 2>/dev/null >result; true\"")
        done = subprocess.run(["sh", "-euc", lines], cwd=str(work), env=suite.clean_env(HOME=str(home)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=120)
        assert done.returncode == 0, done.stdout.decode()
        assert (work / "results" / "result").read_text() == "model\n1\n" and (work / "result").read_text() == "model\n1\n"
    finally:
        lab.close()


def test_run_sh_with_a_file_runs_that_file_and_no_benches():
    done = subprocess.run(["sh", "tests/run.sh", "tests/test_readme.py", "-k", "link_leads"], cwd=suite.ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0 and b"1 passed" in done.stdout and b"==" not in done.stdout, done.stdout.decode()
