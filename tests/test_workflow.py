"""The workflow side as people and modules use it: real processes, against a real relay and poller, and against a relay that means harm."""
import ast
import hashlib
import json
import os
import pty
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import suite
from fake_relay import ACCEPT_ID, Cut, Fake, entry

NAME = "mi_system_wf.py"
LOG, ERRLOG = suite.LOGS


@pytest.fixture
def fake(request):
    """A function that makes a Fake."""
    def made(**keywords):
        one = Fake(**keywords)
        request.addfinalizer(one.stop)
        return one
    return made


@pytest.fixture
def token(tmp_path):
    """A 0600 token file."""
    path = tmp_path / "token"
    path.write_text("secret-token\n")
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def here(tmp_path):
    """An empty current directory for the workflow side."""
    path = tmp_path / "here"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def busy(world):
    """The world with a poller whose command does what the file `do` says."""
    folder = os.path.join(world.folder, "bin")
    os.makedirs(folder)
    with open(os.path.join(folder, "command"), "w") as out:
        out.write("#!/bin/sh\necho started\n. ./do\n")
    os.chmod(out.name, 0o755)
    world.poller({"hello": "argv = %s" % out.name + "\nmatch = hello"}, ini="jobs = 4\n")
    return world


def against(one, here, *words, env=None, timeout=30):
    """The workflow side against a Fake."""
    return suite.run(NAME, *words, "--url", one.url, cwd=str(here), env=env, timeout=timeout)


def ask(one, here, token, *words, **more):
    """`run` against a Fake."""
    return against(one, here, "run", "site", "command", *words, "--token-file", token, **more)


def start(words, here, env=None, **more):
    """The workflow side, still running."""
    return subprocess.Popen([suite.PYTHON, "-I", "-S", suite.script(NAME)] + list(words), cwd=str(here), env=env or suite.clean_env(),
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def ended(process, seconds=30):
    """(exit code, stdout, stderr) of a process."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out.decode(), err.decode()


def failed(done, code, *words):
    """True if it ended with this code and one clear line on stderr that holds the words."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert suite.one_line(done.stderr) and done.stderr.startswith("mi_system_wf: "), done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)
    return True


def everything(folder):
    """Every path below a folder, but directories."""
    return sorted(os.path.relpath(os.path.join(top, name), str(folder)) for top, folders, names in os.walk(str(folder)) for name in names)


# ---- inputs

def test_missing_inputs_are_all_named_before_anything_is_registered(fake, here, token):
    one = fake()
    (here / "there").write_text("x")
    (here / "folder").mkdir()
    assert failed(ask(one, here, token, "--in", "there", "no1", "x=no2", "no3/", "folder", "/dev/null"), 66, "no1", "no2", "no3/", "folder/", "/dev/null")
    assert not one.calls


def test_ten_thousand_missing_inputs_are_still_one_short_line(fake, here, token):
    done = ask(fake(), here, token, "--in", *["missing-%05d" % n for n in range(10000)])
    assert failed(done, 66, "missing-00000", "and 9980 more") and len(done.stderr) < 4096


@pytest.mark.parametrize("count", [3, 12])
def test_directories_that_link_to_one_another_are_sent_or_refused_in_bounded_time_and_memory(fake, here, token, count):
    """As pnpm leaves them: each package has links to the others. Every real file is sent, or one line says why nothing is."""
    for one in range(count):
        (here / "in" / ("d%d" % one)).mkdir(parents=True)
        (here / "in" / ("d%d" % one) / "x").write_text("content %d" % one)
        for other in range(count):
            if other != one:
                (here / "in" / ("d%d" % one) / ("l%d" % other)).symlink_to("../d%d" % other)
    one = fake()
    words = [suite.PYTHON, "-I", "-S", suite.script(NAME), "run", "site", "command", "--in", "in/", "--token-file", token, "--url", one.url]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
    done = subprocess.run(words, cwd=str(here), env=suite.clean_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                          preexec_fn=limit)
    if done.returncode:
        assert done.returncode in (64, 66, 77) and suite.one_line(done.stderr.decode()) and "add-calcinfo" not in one.names(), done
    else:
        names = {name: one.uploads[number] for number, (name, told) in enumerate(one.manifest)}
        assert all(names["in/d%d/x" % number] == b"content %d" % number for number in range(count))
        assert all(data == b"content " + name.split("/")[-2].lstrip("dl").encode() for name, data in names.items())


def test_inputs_get_the_names_that_the_manual_says(fake, here, token):
    for name in ("a", "sub/deep/b", "sub/c", "計算.txt", "x=y", "../outside"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    (here / "sub" / "loop").symlink_to("..")
    (here / "sub" / "other").symlink_to("deep")
    (here / "link").symlink_to("a")
    one = fake()
    done = ask(one, here, token, "--in", "./a", "sub/", "計算.txt", "x=y", "../outside", "link", "new/name=a", "at/=sub/deep/", str(here / "sub" / "c"))
    assert done.returncode == 0, done.stderr
    assert [name for name, made in one.manifest] == ["a", "at/b", "c", "link", "new/name", "outside", "sub/c", "sub/deep/b", "sub/other/b", "x=y", "計算.txt"]
    assert one.uploads[5] == b"../outside" and one.uploads[10] == "計算.txt".encode() and one.uploads[8] == b"sub/deep/b"


@pytest.mark.parametrize("words", [["a", "x/../a"], ["a", "b=a", "b/c=a"], [LOG + "=a"], ["../q=a"], ["/q=a"], ["q\nr=a"], ["é=a", "e\u0301=a"]])
def test_input_names_that_cannot_be_are_refused_before_anything_is_registered(fake, here, token, words):
    (here / "a").write_text("x")
    (here / "x").mkdir()
    one = fake()
    assert failed(ask(one, here, token, "--in", *words), 64)
    assert not one.calls


def test_an_input_whose_name_is_not_utf8_is_named(fake, here, token):
    (here / "d").mkdir()
    with open(os.fsencode(str(here)) + b"/d/\xff", "w"):
        pass
    assert failed(ask(fake(), here, token, "--in", "d/"), 66, "not UTF-8")


@pytest.mark.parametrize("out", ["/x", "../x", "a/../b", "x//y", "", "a\\b", "../*", "/", "a\tb"])
def test_result_names_that_cannot_be_are_refused_before_anything_is_registered(fake, here, token, out):
    one = fake()
    assert failed(ask(one, here, token, "--out", out), 64)
    assert not one.calls


def test_more_or_larger_inputs_than_the_relay_takes_are_refused_before_they_are_read(fake, here, token):
    for limit, word in (({"max_file": 10}, "a"), ({"max_files": 1}, "2 inputs")):
        one = fake(misbehave=lambda request: (200, json.dumps(dict({"version": 2}, **limit)).encode()) if request.name == "version" else None)
        (here / "a").write_text("x" * 100)
        (here / "b").write_text("")
        assert failed(ask(one, here, token, "--in", "a", "b"), 77, "nothing was registered", word)
        assert one.names() == ["version"]


def test_thousands_of_inputs_go_in_pages(fake, here, token):
    (here / "d").mkdir()
    for n in range(4500):
        (here / "d" / ("%05d" % n)).write_text(str(n))
    one, pages = fake(), []

    def collect(request):
        if re.match("files/[^/]*/input$", request.name) and request.method == "POST":
            fields = json.loads(request.take(request.left).decode())
            pages.append((fields["from"], len(fields["files"]), fields["more"]))
            one.manifest.extend(fields["files"].items())
            return request.ok()
    one.misbehave = collect
    done = ask(one, here, token, "--in", "d/")
    assert done.returncode == 0, done.stderr
    assert pages == [(2000, 1000, True), (3000, 1000, True), (4000, 500, False)]
    assert [one.uploads[n] for n in range(4500)] == [str(n).encode() for n in range(4500)]
    assert one.given[0]["total"] == 4500 and one.given[0]["more"] is True


# ---- token, relay, configuration

@pytest.mark.parametrize("mode, text, word", [(0o644, "x", "chmod 600"), (0o660, "x", "chmod 600"), (0o604, "x", "chmod 600"), (0o600, "", "no token"),
                                              (0o600, "two words", "no token"), (0o600, "\x00\x01", "no token"), (0o600, "é", "no token")])
def test_a_token_file_that_will_not_do_is_refused_with_what_to_do(fake, here, tmp_path, mode, text, word):
    path = tmp_path / "t"
    path.write_text(text)
    path.chmod(mode)
    one = fake()
    assert failed(ask(one, here, str(path)), 78, word, str(path))
    assert not one.calls


def test_no_token_no_url_and_a_missing_token_file_are_each_told(fake, here):
    one = fake()
    assert failed(ask(one, here, "/nonexistent/token"), 78, "/nonexistent/token")
    assert failed(against(one, here, "run", "s", "c"), 78, "--token-file")
    assert failed(suite.run(NAME, "run", "s", "c", cwd=str(here)), 78, "--url")


def test_the_token_comes_from_file_ini_environment_or_credential(fake, here, tmp_path, token):
    seen = []
    one = fake(misbehave=lambda request: seen.append(request.headers["Authorization"]))
    (tmp_path / "mi_distcomp_token").write_text("of-systemd")
    (tmp_path / "mi_distcomp_token").chmod(0o400)
    ini = tmp_path / "ini"
    ini.write_text("[workflow]\ntoken_file = %s\nurl = %s\n" % (token, one.url))
    for words, env in ((["--token-file", token], {"MI_DISTCOMP_TOKEN": "no"}), ([], {"MI_DISTCOMP_TOKEN": "no"})):
        assert suite.run(NAME, "run", "s", "c", *words, "--ini", ini, cwd=str(here), env=suite.clean_env(**env)).returncode == 0
    for env in ({"MI_DISTCOMP_TOKEN": "of-environment", "CREDENTIALS_DIRECTORY": str(tmp_path)}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}):
        assert against(one, here, "run", "s", "c", env=suite.clean_env(**env)).returncode == 0
    assert list(dict.fromkeys(seen)) == ["Bearer secret-token", "Bearer of-environment", "Bearer of-systemd"]


@pytest.mark.parametrize("text, word", [("[workflow]\nurll = x\n", "did you mean url"), ("[workflow]\nlang = fr\n", "lang"), ("url = x\n", "ini"), ("\xff[", "ini"),
                                        ("[workflow]\nurl = x\nurl = y\n", "url"), ("[workflw]\nurl = x\n", "did you mean workflow")])
def test_an_ini_that_is_wrong_is_one_line_and_78(fake, here, token, text, word):
    path = here / "x.ini"
    path.write_bytes(text.encode("latin-1"))
    assert failed(suite.run(NAME, "run", "s", "c", "--ini", str(path), cwd=str(here)), 78, word)


def test_an_absent_relay_is_waited_for_a_while_and_then_69(here, token):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = "http://127.0.0.1:%d" % listening.getsockname()[1]
    begun = time.monotonic()
    done = suite.run(NAME, "run", "s", "c", "--url", url, "--token-file", token, "--patience", "1.5s", cwd=str(here))
    assert failed(done, 69, url) and 1 < time.monotonic() - begun < 8
    assert done.stdout.count("\n") == 1 and "does not answer" in done.stdout


def test_a_wrong_ca_a_wrong_name_and_a_wrong_token_are_told_at_once(world, here, tmp_path, token):
    other, key = suite.make_certificate(str(tmp_path))
    begun = time.monotonic()
    for words, code, hint in ((["--url", world.url, "--ca-file", other], 69, "--ca-file"), (["--url", world.url], 69, "--ca-file"),
                              (["--url", "https://no-such-host.invalid"], 69, "--url"), (["--url", "https://no such"], 64, "URL"),
                              (["--url", world.url, "--ca-file", str(tmp_path / "none")], 78, "none"),
                              (["--url", world.url, "--ca-file", world.cert], 77, "unknown token")):
        done = suite.run(NAME, "run", suite.SITE, "hello", "--token-file", token, *words, cwd=str(here))
        assert failed(done, code, hint) and not done.stdout
    assert time.monotonic() - begun < 15


def test_an_unlisted_command_or_site_is_77(world, here):
    for words in ((suite.SITE, "rm"), ("elsewhere", "hello")):
        assert failed(world.workflow("run", *words, cwd=str(here)), 77, words[1] if words[0] == suite.SITE else words[0])


def test_a_wrong_url_that_answers_html_is_76(fake, here, token):
    one = fake(misbehave=lambda request: (404, b"<html>", {"Content-Type": "text/html"}))
    assert failed(ask(one, here, token), 76, one.url)


def test_a_directory_for_results_that_cannot_be_is_told_before_anything_is_registered(fake, here, token):
    (here / "file").write_text("")
    one = fake()
    assert failed(ask(one, here, token, "--to", "file/x"), 74, "file/x")
    assert not one.calls


@pytest.mark.parametrize("words", [[], ["runn"], ["run"], ["run", "s"], ["run", "s", "c", "d"], ["wait"], ["wait", "../x"], ["status", "x" * 100], ["--nonsense"],
                                   ["run", "s", "c", "--nonsense"], ["run", "s", "c", "--in"], ["https://h", "s", "t", "c", "i"], ["run", "s", "c", "--patience", "x"]])
def test_words_that_cannot_be_are_64(here, words):
    assert failed(suite.run(NAME, *words, cwd=str(here)), 64)


# ---- a calculation, with the real relay and poller

def do(here, text):
    """The command's own program."""
    (here / "do").write_text(text)


def test_results_arrive_and_the_last_line_says_whose_exit_code_it_is(busy, here):
    do(here, "cat do >copy; mkdir -p d/e; echo 1 >d/e/f; echo 2 >d/g; echo x >other; echo oops >&2; exit 3")
    done = busy.workflow("run", suite.SITE, "hello", "--in", "do", "--out", "copy", "d/", "none", "?*.dat", cwd=str(here))
    assert done.returncode == 3 and not done.stderr
    assert done.stdout.splitlines()[-1].endswith("the command ended with 3 (its own exit code); 5 files in .")
    assert everything(here) == sorted(["copy", "d/e/f", "d/g", "do", LOG, ERRLOG])
    assert (here / "copy").read_text() == (here / "do").read_text() and (here / ERRLOG).read_text() == "oops\n"
    assert "the declared result none is missing" in done.stdout and "no result matches ?*.dat" in done.stdout


def test_a_missing_result_is_65_and_a_signal_128_and_json_says_all(busy, here):
    do(here, "echo x >a; exit 0")
    done = busy.workflow("run", suite.SITE, "hello", "--in", "do", "--out", "a", "b", "--json", cwd=str(here))
    found = json.loads(done.stdout)
    assert done.returncode == 65 and found["exit_code"] == 65 and found["ended_by"] == "workflow" and list(found["missing"]) == ["b"]
    assert set(found) == {"accept_id", "status", "exit_code", "ended_by", "reason", "files", "missing", "refused", "verdicts"} and found["status"] == "completed"
    do(here, "kill -TERM $$; sleep 5")
    done = busy.workflow("run", suite.SITE, "hello", "--in", "do", "--json", cwd=str(here))
    assert done.returncode == 143 and json.loads(done.stdout)["ended_by"] == "command"


def test_what_the_registration_has_told_is_not_asked_again():
    workflow, told, seen = suite.module("mi_system_wf.py"), [], {}

    class Asked(Exception):
        """The relay was asked."""

    class Relay:
        def ask(self, *words, **more):
            raise Asked()

    console = workflow.Console(told.append)
    console.first_look = {"progress": "running", "status": "none", "stamp": "7.0", "out_of_contact": None, "what": ""}
    assert not workflow.look_once(Relay(), "a", console, seen, 5) and seen["a"][0] == "7.0" and told == ["mi_system_wf: running"]
    with pytest.raises(Asked):
        workflow.look_once(Relay(), "a", console, seen, 5)


def test_submit_prints_the_id_alone_and_wait_status_and_result_find_it(busy, here):
    do(here, "sleep 3; echo x >a")
    made = [busy.workflow("submit", suite.SITE, "hello", "--in", "do", "--out", "a", cwd=str(here)) for n in range(2)]
    ids = [done.stdout.strip() for done in made]
    assert all(re.match("[0-9a-f-]{36}\n$", done.stdout) for done in made)
    early = busy.workflow("result", ids[1], cwd=str(here))
    assert failed(early, 75, ids[1])
    assert busy.workflow("wait", *ids, cwd=str(here)).returncode == 0
    assert all(everything(here / name) == sorted(["a", LOG, ERRLOG]) for name in ids)
    done = busy.workflow("status", *ids, cwd=str(here))
    assert done.returncode == 0 and [line.split(" ")[0] for line in done.stdout.splitlines()] == ids and done.stdout.count(" done\n") == 2
    assert busy.workflow("result", ids[0], "--to", "again", cwd=str(here)).returncode == 0 and "a" in everything(here / "again")
    assert failed(busy.workflow("wait", "00000000-0000-4000-8000-000000000000", cwd=str(here)), 64, "no such calculation")


def test_log_lines_carry_the_id_at_the_same_place_and_only_if_asked(busy, here):
    do(here, "echo x >a")
    done = busy.workflow("run", suite.SITE, "hello", "--in", "do", "--out", "a", "-v", cwd=str(here))
    found = [line.split(" ") for line in done.stdout.splitlines() if line[:2] == "20"]
    assert not done.stderr and len({words[2] for words in found}) == 1 and [words[3] for words in found][:2] == ["1", "2"] and found[-1][3:5] == ["9", "finish"]
    assert "INFO" not in busy.workflow("run", suite.SITE, "hello", "--in", "do", "--out", "a", cwd=str(here)).stdout
    assert busy.workflow("run", suite.SITE, "hello", "--in", "do", "--out", "a", "-q", cwd=str(here)).stdout == ""


def test_fielded_words_still_work_and_end_with_0_or_1(busy, here):
    env = suite.clean_env(SSL_CERT_FILE=busy.cert)
    for text, code in (("cat do >a", 0), ("echo x >a; exit 7", 1)):
        do(here, text)
        done = suite.run(NAME, busy.url, suite.SITE, busy.token, "hello", "do", "a:missing", cwd=str(here), env=env)
        assert done.returncode == code and (here / "a").exists() and "missing is missing" in done.stdout
        assert suite.one_line(done.stderr) and "warning" in done.stderr
    do(here, "exit 0")
    assert suite.run(NAME, busy.url, suite.SITE, busy.token, "hello", "do", "a", cwd=str(here), env=env).returncode == 1


def test_fielded_words_hide_the_token_from_ps(fake, here):
    one = fake()
    one.answers["calc-progress"] = {"progress": "running", "status": "none", "stamp": "1"}
    (here / "i").write_text("x")
    secret = "5ec2e7" * 10
    process = start([one.url, "site", secret, "command", "i", "o"], here)
    try:
        suite.wait_until(lambda: "calc-progress" in one.names())
        for name in ("cmdline", "environ"):
            with open("/proc/%d/%s" % (process.pid, name), "rb") as text:
                assert secret.encode() not in text.read()
        assert one.given[0]["calc-info"]["command"] == "command"
    finally:
        process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert code == 130 and err.count("warning") == 1 and secret not in out + err


def test_ctrl_c_and_sigterm_leave_the_calculation_running(busy, here):
    do(here, "sleep 4; echo x >a")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        process = start(["run", suite.SITE, "hello", "--in", "do", "--out", "a"] + busy.reach(), here)
        line = process.stdout.readline().decode()
        while "running" not in line:
            line = process.stdout.readline().decode()
        process.send_signal(number)
        found = ended(process)
        accept_id = line.split(" ")[1].rstrip(":")
        assert found[0] == code and "%s: interrupted" % accept_id in found[2] and "mi_system_wf.py wait %s" % accept_id in found[2] and found[2].count("\n") == 1
        assert busy.workflow("wait", accept_id, cwd=str(here)).returncode == 0


def test_a_relay_that_goes_away_while_we_wait_is_told_once_and_waited_for(make_world, here):
    world = make_world(commands=["hello"]).start()
    done = world.workflow("submit", suite.SITE, "hello", cwd=str(here))
    process = start(["wait", done.stdout.strip()] + world.reach(), here)
    assert b"waiting" in process.stdout.readline()
    world.relay.kill()
    said = [process.stdout.readline()]
    time.sleep(2)
    world.start()
    while b"does not answer" in said[-1]:              # once for each reason: cut off, then refused
        said.append(process.stdout.readline())
    assert len(set(said)) == len(said) and b"answers again" in said[-1], said
    accept_id, claim = world.client().claim()
    world.client().walk(accept_id, claim, "end-send", {name: b"x" for name in suite.LOGS})
    code, out, err = ended(process)
    assert code == 0 and not err and "does not answer" not in out


# ---- killed and started again

def test_a_module_that_was_killed_while_it_sent_goes_on_with_the_same_request_id(fake, here, token):
    data = os.urandom(20 << 20)
    (here / "big").write_bytes(data)
    (here / "small").write_bytes(b"s")
    one, stuck = fake(results={"r": b"result"}), threading.Event()

    def stall(request):
        if request.method == "POST" and request.query.get("offset") == str(16 << 20):
            one.uploads[0] += request.take(1 << 20)
            stuck.set()
            time.sleep(0.5)
            raise Cut
    one.misbehave = stall
    words = ["run", "s", "c", "--in", "big", "small", "--out", "r", "--request-id", "R1", "--url", one.url, "--token-file", token]
    process = start(words, here)
    assert stuck.wait(20)
    process.kill()
    ended(process)
    one.misbehave = lambda request: None
    one.calls.clear()
    code, out, err = ended(start(words, here))
    assert code == 0 and "found again" in out and one.uploads == {0: data, 1: b"s"} and (here / "r").read_bytes() == b"result"
    offsets = [int(query["offset"]) for method, name, query in one.calls if method == "POST" and "/input/0" in name]
    assert min(offsets) >= 17 << 20


def test_killed_at_many_moments_and_started_again_it_ends_with_one_calculation(busy, here):
    do(here, "echo x >a")
    (here / "big").write_bytes(os.urandom(5 << 20))
    ids = set()
    for n in range(7):
        process = start(["run", suite.SITE, "hello", "--in", "do", "big", "--out", "a", "big", "--request-id", "many"] + busy.reach(), here)
        time.sleep(0.06 + 0.02 * n)
        process.kill()
        ids.update(re.findall("[0-9a-f-]{36}", ended(process)[1]))
    done = busy.workflow("run", suite.SITE, "hello", "--in", "do", "big", "--out", "a", "big", "--request-id", "many", "--json", cwd=str(here))
    ids.add(json.loads(done.stdout)["accept_id"])
    assert done.returncode == 0 and len(ids) == 1 and not [name for name in everything(here) if name.endswith(".part")]
    (here / "big").write_bytes(b"another")
    done = busy.workflow("run", suite.SITE, "hello", "--in", "do", "big", "--request-id", "many", cwd=str(here))
    assert failed(done, 64, "many")


def test_a_changed_input_on_a_later_page_is_noticed_too(busy, here):
    (here / "d").mkdir()
    for n in range(2100):
        (here / "d" / ("%05d" % n)).write_text("x")
    words = ["submit", suite.SITE, "hello", "--in", "d/", "--request-id", "pages"]
    assert busy.workflow(*words, cwd=str(here)).returncode == 0
    assert busy.workflow(*words, cwd=str(here)).returncode == 0
    (here / "d" / "02050").write_text("y")
    assert failed(busy.workflow(*words, cwd=str(here)), 64, "pages")


def test_pages_of_inputs_that_did_not_arrive_before_the_kill_are_sent_after_it(world, here):
    (here / "d").mkdir()
    for n in range(6100):
        (here / "d" / ("%05d" % n)).write_text(str(n))
    for delay in (0.25, 0.3, 0.35, 0.4):
        process = start(["submit", suite.SITE, "hello", "--in", "d/", "--request-id", "cut"] + world.reach(), here)
        time.sleep(delay)
        process.kill()
        ended(process)
    assert world.workflow("submit", suite.SITE, "hello", "--in", "d/", "--request-id", "cut", cwd=str(here)).returncode == 0


def test_a_result_that_was_half_fetched_is_gone_on_with(fake, here, token):
    data = os.urandom(3 << 20)
    one = fake(results={"a": data, "b": data[::-1]})
    (here / (".mi-" + ACCEPT_ID)).mkdir()
    (here / (".mi-" + ACCEPT_ID) / "1").write_bytes(data[::-1][:2 << 20])
    (here / "a").write_bytes(data)
    seen = []
    one.misbehave = lambda request: seen.append((request.name[-8:], request.headers["Range"])) if "/result/" in request.name else None
    assert ask(one, here, token, "--out", "a", "b").returncode == 0
    assert seen == [("result/1", "bytes=%d-" % (2 << 20))] and (here / "b").read_bytes() == data[::-1] and everything(here) == ["a", "b"]


# ---- no room

LIMIT = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20,) * 2); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize("size", [1 << 20, 5 << 20])
def test_a_disk_that_is_full_while_results_come_is_74_and_nothing_is_lost(fake, here, token, size):
    data = os.urandom(size + 1)
    one = fake(results={"a": b"small", "b": data})
    words = ["result", ACCEPT_ID, "--url", one.url, "--token-file", token, "--out", "a", "b"]
    done = subprocess.run([sys.executable, "-c", LIMIT, suite.PYTHON, "-I", "-S", suite.script(NAME)] + words, cwd=str(here), env=suite.clean_env(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stderr = done.stderr.decode()
    assert failed(done, 74, ACCEPT_ID, "mi_system_wf.py result " + ACCEPT_ID) and "finish" not in one.names()
    assert not (here / "b").exists()
    assert against(one, here, *words[:2], *words[4:]).returncode == 0
    assert (here / "b").read_bytes() == data and "finish" in one.names() and everything(here) == ["a", "b"]


def test_a_relay_that_does_not_take_the_confirmation_is_told_of_and_no_failure(fake, here, token):
    one = fake(results={"a": b"x"})
    one.misbehave = lambda request: request.no(404) if request.name == "finish" else None
    done = ask(one, here, token, "--out", "a")
    assert done.returncode == 0 and "could not be told" in done.stdout


def test_json_tells_failures_too(fake, here, token):
    done = ask(fake(), here, token, "--in", "missing", "--json")
    found = json.loads(done.stdout)
    assert failed(done, 66, "missing") and found["exit_code"] == 66 and found["ended_by"] == "workflow" and "missing" in found["reason"]


# ---- a relay that means harm

def listed(names):
    """A page of empty files with these names."""
    return {name: entry(b"") for name in names}


@pytest.mark.parametrize("names", [["../out"], ["/tmp/mi-harm"], ["a/../../out"], ["."], ["x\n"], ["a\\b"], ["a//b"], ["\x1b[2J"], ["b", "a"], ["a", "a/b"],
                                   ["d/é", "d/e\u0301"], [".."], ["d/" + "x" * 300]])
def test_result_names_that_lead_elsewhere_are_refused_and_nothing_is_written(fake, here, token, names):
    one = fake()
    one.info = {"result_files": listed(names)}
    done = ask(one, here, token, "--out", "**", "d/")
    assert failed(done, 76, ACCEPT_ID) and "\x1b" not in done.stderr
    assert everything(here.parent) == ["token"] and "finish" not in one.names()


def test_a_result_that_was_not_declared_is_refused(fake, here, token):
    one = fake(results={"a": b"x", "b": b"x"})
    assert failed(ask(one, here, token, "--out", "a"), 76, "b was not declared")
    assert "b" not in everything(here) and "finish" not in one.names()


def test_results_with_wrong_sums_are_given_up_and_get_no_name(fake, here, token):
    for size in (5, 2 << 20):
        one = fake(results={"a": b"x" * size})
        one.info = {"result_files": {"a": {"size": size, "sha256": "0" * 64}}}
        done = ask(one, here, token, "--out", "a", timeout=60)
        assert failed(done, 76, "three times") and not (here / "a").exists()


@pytest.mark.parametrize("size", [3, 2 << 20])
@pytest.mark.parametrize("name", ["link/x", "d/link/x", "link"])
def test_nothing_is_written_through_a_symbolic_link(fake, here, token, name, size):
    (here.parent / "elsewhere").mkdir()
    (here.parent / "elsewhere" / "victim").write_text("keep")
    (here / "d").mkdir()
    for at in (here / "link", here / "d" / "link"):
        at.symlink_to(here.parent / "elsewhere" / ("victim" if name == "link" else ""))
    one = fake(results={name: b"x" * size})
    done = ask(one, here, token, "--out", name)
    if name == "link":                                 # the link itself is replaced: rename does not follow it
        assert done.returncode == 0 and (here / "link").is_symlink() is False
    else:
        assert failed(done, 74, name)
    assert os.listdir(str(here.parent / "elsewhere")) == ["victim"] and (here.parent / "elsewhere" / "victim").read_text() == "keep"


def test_results_are_plain_files_even_where_a_directory_is_in_the_way(fake, here, token):
    (here / "a").mkdir()
    assert failed(ask(fake(results={"a": b"x"}), here, token, "--out", "a"), 74, "a")
    one = fake(results={"b": b"x"})
    assert ask(one, here, token, "--out", "b").returncode == 0
    assert stat.S_IMODE(os.stat(str(here / "b")).st_mode) & 0o111 == 0


@pytest.mark.parametrize("field, value, code", [("exit_code", 256, 69), ("exit_code", -1, 69), ("exit_code", "x", 69), ("exit_code", [], 69), ("exit_code", None, 69),
                                                ("signal", 9, 137), ("signal", 1 << 40, 0), ("status", 5, 65), ("status", "abnormal", 65)])
def test_an_exit_code_that_cannot_be_is_never_a_success(fake, here, token, field, value, code):
    one = fake()
    one.info = {field: value}
    done = ask(one, here, token)
    assert done.returncode == code and not done.stderr


@pytest.mark.parametrize("reason, code, who", [("refused: not on the list", 77, "poller"), ("input", 76, "poller"), ("disk full", 74, "poller"),
                                               ("cancelled: by a person", 130, "relay"), ("lost", 69, "relay"), ("", 69, "relay"), (None, 69, "relay")])
def test_a_calculation_without_an_exit_code_has_one_of_the_table_and_says_whose(fake, here, token, reason, code, who):
    one = fake()
    one.info = {"exit_code": None, "status": "abnormal", "reason": reason}
    done = ask(one, here, token, "--json")
    assert done.returncode == code and json.loads(done.stdout)["ended_by"] == who


@pytest.mark.parametrize("fields", [{"accept_id": "../../x"}, {"accept_id": "x"}, {"accept_id": None}, {"accept_id": "a" * 100}, {}, {"accept_id": "a/../../bcdefgh"}])
def test_an_accept_id_that_is_none_is_refused(fake, here, token, fields):
    one = fake()
    one.answers["add-calcinfo"] = fields
    assert failed(ask(one, here, token), 76)


@pytest.mark.parametrize("name, fields", [
    ("get-calc-result", {}), ("get-calc-result", {"result-info": []}), ("get-calc-result", {"result-info": {"result_files": [1]}}),
    ("get-calc-result", {"result-info": {"result_files": {}, "missing": [1], "status": "x"}}),
    ("get-calc-result", {"result-info": {"result_files": {}, "refused": {"a": 1}}}), ("get-calc-result", {"result-info": {}, "next": 0}),
    ("get-calc-result", {"result-info": {"result_files": listed(["a"])}, "next": 1})])
def test_answers_without_sense_are_never_a_bug(fake, here, token, name, fields):
    one = fake(misbehave=lambda request: request.no(200, files={}, next=1) if request.name.endswith("/result") else None)
    one.answers[name] = fields
    done = ask(one, here, token, "--out", "a")
    assert done.returncode in (69, 76) and "bug" not in done.stderr and done.stderr.count("\n") <= 1


@pytest.mark.parametrize("words", ['"queue": [1]', '"queue": "x"', '"out_of_contact": Infinity', '"out_of_contact": NaN', '"output": [9, 9]'])
def test_progress_without_sense_is_never_a_bug(fake, here, token, words):
    text = '{"errors": [{"code": 200, "message": "x", "wait_allow": "x", "progress": "%s", "data": "A", %s}]}' % (
        "not start" if "queue" in words else "running", words)
    one = fake(misbehave=lambda request: (200, text.encode(), ()) if request.name in ("calc-progress", "output") else None)
    for word in ("status", "output"):
        done = suite.run(NAME, word, ACCEPT_ID, "--url", one.url, "--token-file", token, cwd=str(here))
        assert done.returncode == 0 and "bug" not in done.stderr, (word, done)


def test_json_is_for_terminals_too(fake, here, token):
    """It says the same to a program, but a relay's words steer no terminal."""
    said = "\x9b2J\u202e\x7f計算"
    one = fake(results={"a": b"x"})
    one.info = {"reason": said, "status": said}
    done = ask(one, here, token, "--json", "--out", "a")
    assert json.loads(done.stdout)["reason"] == said and "計算" in done.stdout and not set("\x9b\u202e\x7f") & set(done.stdout), done.stdout


def test_progress_that_never_ends_and_says_nonsense_is_shown_harmlessly_and_slowly(fake, here, token):
    one, count = fake(), []

    def flap(request):
        if request.name == "calc-progress":
            count.append(1)
            if len(count) == 1500:
                return request.ok(progress="got return")
            return request.ok(progress="\x1b]0;x\x07%d" % len(count), stamp=len(count), queue="x", out_of_contact=[], status={})
    one.misbehave = flap
    done = ask(one, here, token, "--json", "-v")
    assert done.returncode == 0 and "\x1b" not in done.stderr + done.stdout and "\x07" not in done.stderr
    assert 4096 < len(done.stderr.encode()) <= 16384                      # a reader of stdout alone would dead-lock
    assert len(done.stdout.splitlines()) == 1 and json.loads(done.stdout)["exit_code"] == 0


def test_an_answer_that_comes_at_once_and_says_nothing_new_is_not_asked_for_like_mad(fake, here, token):
    one = fake()
    one.answers["calc-progress"] = {"progress": "running", "stamp": "1"}
    process = start(["run", "s", "c", "--url", one.url, "--token-file", token], here)
    suite.wait_until(lambda: "calc-progress" in one.names())
    time.sleep(2.5)
    process.terminate()
    assert ended(process)[0] == 75 and one.names().count("calc-progress") < 8


# ---- a terminal, a program, a copy

def on_terminal(words, here):
    """Runs the workflow side with a terminal as stderr: (exit code, stdout, what the terminal got)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([suite.PYTHON, "-I", "-S", suite.script(NAME)] + words, cwd=str(here), env=suite.clean_env(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    out = process.communicate(timeout=30)[0]
    os.close(ours)
    return process.returncode, out.decode(), seen.decode("utf-8")


def test_a_terminal_sees_one_line_that_is_rewritten(busy, here):
    do(here, "sleep 1; echo x >a")
    code, out, seen = on_terminal(["run", suite.SITE, "hello", "--in", "do", "--out", "a", "-v"] + busy.reach(), here)
    assert code == 0 and out in ("", "started\n")      # what the command writes, if it came while it ran
    assert re.search(r"\r\x1b\[K[0-9a-f-]{36} running 0:00:0\d", seen) and "the command ended with 0" in seen.splitlines()[-1]
    assert "Traceback" not in seen


def test_it_can_be_imported_without_effect_and_run_from_a_thread_without_a_word(fake, here, token):
    one = fake(results={"a": b"x"})
    text = """if True:
        import sys, threading, json, io
        sys.path.insert(0, %r)
        before = (sys.stdout, threading.active_count())
        import mi_system_wf
        assert before == (sys.stdout, threading.active_count())
        found, lines = [], []
        def work():
            open("i", "w").close()
            found.append(mi_system_wf.run(%r, "s", "c", ["i"], ["a", "b"], token="t", to="there"))
            found.append(mi_system_wf.run(%r, "s", "c", [], [], token_file=%r, tell=lines.append))
            try:
                mi_system_wf.run(%r, "s", "c", ["missing"], [], token="t")
            except mi_system_wf.Stop as stop:
                found.append((stop.code, str(stop)))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        sys.stderr.write(json.dumps([found, lines]))
    """ % (suite.ROOT, one.url, one.url, token, one.url)
    misbehave = {"left": True}

    def second(request):
        if request.name == "get-calc-result" and misbehave["left"] is False:
            return request.ok(**{"result-info": {"result_files": {}, "status": "completed", "exit_code": 4}})
        if request.name == "finish":
            misbehave["left"] = False
    one.misbehave = second
    done = subprocess.run([suite.PYTHON, "-c", text], cwd=str(here), env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout == b"", done.stderr
    (first, other, stop), lines = json.loads(done.stderr.decode())
    assert first[:3] == [ACCEPT_ID, 65, "completed"] and first[4] == ["a"] and list(first[5]) == ["b"] and (here / "there" / "a").exists()
    assert other[1] == 4 and any("registered" in line for line in lines) and stop[0] == 66 and "missing" in stop[1]


def test_help_and_version_of_a_lone_copy(tmp_path):
    with open(suite.script(NAME), "rb") as source:
        text = source.read()
    (tmp_path / NAME).write_bytes(text)
    for word in ("--help", "--version"):
        done = subprocess.run([suite.PYTHON, "-I", "-S", str(tmp_path / NAME), word], cwd=str(tmp_path), env=suite.clean_env(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0 and not done.stderr
        assert word == "--help" and b"exit codes" in done.stdout or done.stdout.decode().splitlines()[0] == "mi_system_wf 1.0 protocol 2 (1) sha256 %s" % (
            hashlib.sha256(text).hexdigest())
    assert os.listdir(str(tmp_path)) == [NAME]


def test_everything_that_people_read_is_there_in_japanese():
    with open(suite.script(NAME), encoding="utf-8") as source:
        tree = ast.parse(source.read())
    texts = {node.args[0].value for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_"
             and isinstance(node.args[0], ast.Constant)}
    table = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "JA"][0]
    assert not texts - set(table), "missing in JA: %s" % sorted(texts - set(table))
    said = {part.value for node in tree.body if not (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "JA")
            for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    assert not set(table) - said, "in JA, but never said: %s" % sorted(set(table) - said)
    assert all(re.findall("%[a-z]", text) == re.findall("%[a-z]", table[text]) or "%(" in text for text in texts if text in table)


def test_an_ini_can_ask_for_japanese(fake, here, token):
    (here / "x.ini").write_text("[workflow]\nlang = ja\ntoken_file = %s\n" % token)
    done = against(fake(), here, "run", "s", "c", "--ini", "x.ini")
    assert done.returncode == 0 and "終了コード" in done.stdout.splitlines()[-1]
