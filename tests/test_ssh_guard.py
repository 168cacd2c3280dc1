"""The guard of the SSH way: the runner's own steps pass, everything else is refused; and each refusal is lost when its check is taken out."""
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import zlib

import pytest

import ssh_lab
import suite
from ssh_lab import SCRIPT
from suite import PYTHON

runner = suite.module("execute_remote_command.py")
IDENT = "0123abcd-0000-4000-8000-%012x"
INI = """[command work]
argv = /bin/sh
  %(dir)s/work.sh
  {parameters}
match = work.sh
argument.1 = [a-z]+
env.GIVEN = yes
[command plain]
match = true
argv = /bin/true
"""
WORK = """#!/bin/sh
echo "args $* given ${GIVEN:-} evil ${EVIL:-}"
case ${1:-} in
hard) ln %(dir)s/secret hardlink;;
soft) ln -s %(dir)s/secret softlink; ln -s %(dir)s out;;
slow) sleep 2;;
leave) echo $$ >../pids; env -i setsid sh -c 'trap "" TERM; sleep 300 & echo $! $$ >>../pids'; sleep 300;;
esac
cp a b 2>/dev/null
echo SECRET-42 >secret.txt
echo result >r.txt
"""


class Far:
    """An external computer with a guard; ask() is what its sshd would do with the key."""

    def __init__(self, folder, ini="", mutation=()):
        self.dir, self.number = str(folder), 0
        self.base = os.path.join(self.dir, "base")
        os.makedirs(self.base, exist_ok=True)
        text = open(SCRIPT, encoding="utf-8").read()
        for old, new in mutation:
            assert text.count(old) == 1, "%r stands %d times in the script" % (old, text.count(old))
            text = text.replace(old, new)
        self.script = os.path.join(self.dir, "guard.py")
        self.write("guard.py", text)
        self.write("work.sh", WORK % {"dir": self.dir})
        self.write("secret", "TOP-SECRET")
        self.write("ini", "[ssh guard]\nbase = %s\n" % self.base + (ini if "[ssh guard]" not in ini else ini.replace("[ssh guard]\n", "")) + INI % {"dir": self.dir})
        os.chmod(self.path("ini"), 0o600)

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as out:
            out.write(text)

    def fresh(self):
        """A new calculation's ID."""
        self.number += 1
        return IDENT % self.number

    def raw(self, command, data=b"", **env):
        """(exit code, stdout, stderr) of the forced command."""
        process = subprocess.Popen([PYTHON, "-I", "-S", self.script, "guard", "--ini", self.path("ini")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=dict({"PATH": os.environ["PATH"], "HOME": self.dir, "LANG": "C",
                                                                     "SSH_ORIGINAL_COMMAND": command}, **env), cwd=self.dir)
        if data is not None:
            out, err = process.communicate(data, timeout=30)
        else:                                          # whoever watches keeps its end open
            out = process.stdout.read()
            process.stdin.close()
            err = process.stderr.read()
        return process.wait(30), out, err

    def ask(self, verb, ident, *words, **how):
        tail, data = how.pop("tail", ""), how.pop("data", b"")
        return self.raw(runner.request(verb, "~/elsewhere", ident, *words) + tail, data, **how)

    def put(self, ident, name, data, offset=0):
        return self.ask("lane", ident, "put", data=b"C 1 %d %d %s/\n" % (offset, len(data), name) + data)

    def run(self, ident, command="work.sh", **env):
        return self.ask("run", ident, runner.boot_id(), command, "text", data=None, **env)

    def get(self, ident, name, size=6, listed=True):
        """The content of a result, or None."""
        if listed:
            self.ask("lane", ident, "get", data=b"L 1 0 0 -/\n")
        code, out, err = self.ask("lane", ident, "get", data=b"G 1 0 %d %s/\n" % (size, name))
        return out[len(b"mi_distcomp 1 lane\n"):][:size] if code == 0 else None

    def ended(self, command="work.sh", data=b"input"):
        """A calculation that has ended."""
        ident = self.fresh()
        assert self.put(ident, b"a", data)[0] == 0
        assert b"\nE ended " in self.run(ident, command)[1]
        return ident


@pytest.fixture
def far(tmp_path):
    return Far(tmp_path)


# Each attack returns True if it got what it wanted.

def outside_write(far):
    far.put(far.fresh(), b"x/../../../evil", b"evil")
    far.put(far.fresh(), b"../evil", b"evil")
    return os.path.exists(far.path("evil")) or os.path.exists(far.path("base", "evil"))


def absolute_write(far):
    far.put(far.fresh(), far.path("evil").encode(), b"evil")
    return os.path.exists(far.path("evil"))


def write_through_a_link(far):
    ident = far.fresh()
    far.put(ident, b"a", b"1")
    os.symlink(far.dir, far.path("base", ident, "link"))
    far.put(ident, b"link/evil", b"evil")
    return os.path.exists(far.path("evil"))


def write_onto_a_link(far):
    ident = far.fresh()
    far.put(ident, b"a", b"1")
    os.symlink(far.path("secret"), far.path("base", ident, "link"))
    far.put(ident, b"link", b"evil")
    return open(far.path("secret")).read() != "TOP-SECRET"


def tar_outside(far):
    data = runner.tar_header(b"./../../evil", 4, 0o644, 0) + runner.padded(b"evil") + b"\0" * 1024
    far.ask("lane", far.fresh(), "put", data=b"T 0 0 %d -/\n" % len(data) + data)
    return os.path.exists(far.path("evil"))


def tar_link(far):
    ident = far.fresh()
    data = runner.tar_header(b"./l", 0, 0o644, 0, b"2") + b"\0" * 1024
    far.ask("lane", ident, "put", data=b"T 0 0 %d -/\n" % len(data) + data)
    return os.path.lexists(far.path("base", ident, "l"))


def put_after_the_start(far):
    ident = far.ended()
    far.put(ident, b"r.txt", b"forged\n")
    return open(far.path("base", ident, "r.txt")).read() == "forged\n"


def get_before_the_end(far):
    ident = far.fresh()
    far.put(ident, b"a", b"1")
    os.makedirs(far.path("base", ".mi", ident))
    runner.prepare(os.fsencode(far.path("base", ".mi", ident)))
    return far.get(ident, b"a", 1) is not None


def hard_link_out(far):
    return far.get(far.ended("work.sh hard"), b"hardlink", 10) == b"TOP-SECRET"


def soft_link_out(far):
    ident = far.ended("work.sh soft")
    return far.get(ident, b"softlink", 10) == b"TOP-SECRET" or far.get(ident, b"out/secret", 10) == b"TOP-SECRET"


def swapped_after_the_look(far):
    ident = far.ended()
    far.ask("lane", ident, "get", data=b"L 1 0 0 -/\n")
    os.unlink(far.path("base", ident, "r.txt"))
    with open(far.path("base", ident, "r.txt"), "w") as out:
        out.write("SECRET-42\n")
    return far.get(ident, b"r.txt", 6, listed=False) == b"SECRET"


def other_command(far):
    far.run(far.fresh(), "touch %s" % far.path("evil"))
    return os.path.exists(far.path("evil"))


def more_arguments(far):
    return b"args abc" in far.run(far.fresh(), "work.sh abc def")[1]


def arguments_of_another_form(far):
    return b"args ../x" in far.run(far.fresh(), "work.sh ../x")[1]


def arguments_where_none_are_allowed(far):
    return b"E ended" in far.run(far.fresh(), "true x")[1]


def quoting_tricks(far):
    for word in ("work.sh $(touch evil)", "work.sh `touch evil`", "work.sh a;touch evil", "work.sh 'a b'", "work.sh \"a\nb\"", "work.sh a|touch evil",
                 "work.sh $(touch${IFS}evil)"):
        far.run(far.fresh(), word)
    return any("evil" in names for top, folders, names in os.walk(far.dir))


def a_second_run(far):
    ident = far.ended()
    before = os.stat(far.path("base", ".mi", ident, "end")).st_mtime_ns
    far.run(ident, "work.sh again")
    return os.stat(far.path("base", ".mi", ident, "end")).st_mtime_ns != before


def an_id_that_is_a_path(far):
    os.makedirs(far.path("keep"), exist_ok=True)
    far.ask("clean", "../keep")
    return not os.path.exists(far.path("keep"))


def an_unknown_verb(far):
    return far.ask("touch evil", "-")[0] != 77 or os.path.exists(far.path("evil"))


def another_form(far):
    for text in ("touch evil", "sh -c 'touch evil'", "scp -t .", "rsync --server --daemon .", "internal-sftp", "", "exec sh -c 'touch evil'",
                 runner.request("hold", "b", "-") + "; touch evil", "touch evil;" + runner.request("hold", "b", "-"),
                 runner.request("hold", "b", "-") + "\ntouch evil"):
        if far.raw(text)[0] != 77:
            return True
    return any("evil" in names for top, folders, names in os.walk(far.dir))


def a_text_of_its_own(far):
    far.raw(runner.request("hold", "b", "-").replace(runner.encoded(runner.FAR), "'touch evil'"))
    return os.path.exists(far.path("evil"))


def rsync_reads_elsewhere(far):
    ident = far.ended()
    far.ask("lane", ident, "get", data=b"L 1 0 0 -/\n")
    code, out, err = far.ask("rsync", ident, tail=" --server --sender -te.iLsfxCIvu . " + far.path("secret"))
    return b"refused by the guard" not in err


def rsync_follows_links(far):
    ident = far.ended("work.sh soft")
    far.ask("lane", ident, "get", data=b"L 1 0 0 -/\n")
    code, out, err = far.ask("rsync", ident, tail=" --server --sender -tLre.iLsfxCIvu . ./r.txt")
    return b"refused by the guard" not in err


def rsync_takes_names_from_the_wire(far):
    ident = far.ended()
    for option in ("--files-from=-", "-s", "--daemon", "--log-file=x", "--copy-links", "--remove-source-files", "--write-devices", "--temp-dir=x"):
        code, out, err = far.ask("rsync", ident, tail=" --server --sender -te.iLsfxCIvu %s . ./r.txt" % option)
        if b"refused by the guard" not in err:
            return True
    return False


def rsync_writes_after_the_start(far):
    code, out, err = far.ask("rsync", far.ended(), tail=" --server -te.iLsfxCIvu . .")
    return b"refused by the guard" not in err


def rsync_beside_content_rules(far):
    ident = far.ended()
    far.ask("lane", ident, "get", data=b"L 1 0 0 -/\n")
    code, out, err = far.ask("rsync", ident, tail=" --server --sender -te.iLsfxCIvu . ./r.txt")
    return b"refused by the guard" not in err


def denied_name(far):
    return far.get(far.ended(), b"secret.txt") is not None


def denied_content(far):
    return far.get(far.ended(), b"secret.txt") is not None


def content_by_another_order(far):
    ident = far.ended()
    far.ask("lane", ident, "get", data=b"L 1 0 0 -/\n")
    names = b"./secret.txt\n"
    if far.get(ident, b"secret.txt", 9, listed=False) == b"SECRET-42":
        return True
    bundle = far.ask("lane", ident, "get", data=b"A 1 0 %d -/\n" % len(names) + names)
    sums = far.ask("lane", ident, "get", data=b"S 1 0 %d -/\n" % len(names) + names)
    return b"SECRET-42" in bundle[1] or hashlib.sha256(b"SECRET-42\n").hexdigest().encode() in sums[1]


def live_log_beside_content_rules(far):
    return b"args" in far.run(far.fresh(), "work.sh abc")[1]


def too_large_result(far):
    return far.get(far.ended(data=b"x" * 2000), b"b", 2000) is not None


def too_much_in_all(far):
    ident = far.ended(data=b"x" * 900)
    far.ask("lane", ident, "get", data=b"L 1 0 0 -/\n")
    return all(far.get(ident, name, 5) for name in (b"a", b"b"))


def too_much_input(far):
    ident = far.fresh()
    codes = [far.put(ident, b"f%d" % n, b"x" * 600)[0] for n in range(3)]
    return codes == [0, 0, 0]


def a_huge_sparse_file(far):
    ident = far.fresh()
    far.ask("lane", ident, "put", data=b"M 1 99999999999 1:644 f/\n")
    return os.path.exists(far.path("base", ident, "f")) and os.path.getsize(far.path("base", ident, "f")) > 10 ** 9


def a_piece_that_unpacks_to_more(far):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = packer.compress(b"\0" * 100000) + packer.flush()
    ident = far.fresh()
    code, out, err = far.ask("lane", ident, "put", data=b"Z 1 0 %d,10 f/\n" % len(packed) + packed)
    return b"ok 1" in out


def environment(far):
    return b"evil 1" in far.run(far.fresh(), "work.sh", EVIL="1")[1]


def control_characters_in_the_log(far):
    far.raw("evil\nFORGED \x1b[2J")
    return b"\x1b" in open(far.path("base", ".mi", "guard.log"), "rb").read() or b"\nFORGED" in open(far.path("base", ".mi", "guard.log"), "rb").read()


NAMES = "[outbound]\ndeny_names = secret*\n"
CONTENT = "[outbound]\ndeny_content = SECRET-[0-9]+\n"
SHAPES = "if place not in command[\"shapes\"] or not command[\"shapes\"][place].fullmatch(argument):"
ATTACKS = [                    # (attack, ini, the check to take out, what to put there, and again where more than one check stands in the way)
    (outside_write, "", "parts = plain(name).split", "parts = name.split"),
    (absolute_write, "", "parts = plain(name).split(b\"/\")", "parts = [name]"),
    (write_through_a_link, "", "there = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)",
     "there = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)"),
    (write_onto_a_link, "", "flags | os.O_NOFOLLOW | os.O_NONBLOCK", "flags | os.O_NONBLOCK"),
    (tar_outside, "", "any(part in (b\"\", b\".\", b\"..\") for part", "any(part in (b\"\",) for part"),
    (tar_link, "", "if kind != b\"0\" or size > SMALL:", "if size > SMALL:"),
    (put_after_the_start, "", "        if os.path.isdir(self.place.control):\n            raise Refused(", "        if False:\n            raise Refused("),
    (get_before_the_end, "", "        if not place.over():\n", "        if False:\n"),
    (hard_link_out, "", "or info.st_nlink != 1:", "or False:"),
    (soft_link_out, "", "else \"file\" if stat.S_ISREG(mode) else \"other\"", "else \"file\"", "flags | os.O_NOFOLLOW | os.O_NONBLOCK", "flags | os.O_NONBLOCK"),
    (swapped_after_the_look, CONTENT, "if mark_of(os.fstat(fd)) != self.files[name]:", "if False:"),
    (other_command, "", "        raise Forbidden(_(\"no [command NAME] for",
     "        return dict(list(commands.values())[0], options=[]), [word] + arguments\n        raise Forbidden(_(\"no [command NAME] for"),
    (more_arguments, "", SHAPES, "if place in command[\"shapes\"] and not command[\"shapes\"][place].fullmatch(argument):"),
    (arguments_of_another_form, "", SHAPES, "if place not in command[\"shapes\"]:"),
    (arguments_where_none_are_allowed, "", SHAPES, "if False:"),
    (quoting_tricks, "", "log 2>&1; exec \"$@\"'\n", "log 2>&1; eval \"$*\"'\n", SHAPES, "if False:"),
    (a_second_run, "", "    if not os.path.isdir(place.control):\n        if boot", "    if True:\n        if boot",
     "            os.rename(fresh, place.control) ", "            os.path.isdir(place.control) and os.rename(place.control, fresh + b'.old')\n            os.rename(fresh, place.control) "),
    (an_id_that_is_a_path, "", "if not re.fullmatch(shape, ident) or", "if"),
    (an_unknown_verb, "", "        raise Refused(\"an unknown verb\")", "        return os._exit(os.system(verb) and 0)"),
    (another_form, "", "        raise Refused(\"not a request of this program\")", "        return os._exit(os.system(text) and 0)"),
    (a_text_of_its_own, "", "    found = FORM.match(text)\n", "    os.system(text)\n    found = FORM.match(text)\n"),
    (rsync_reads_elsewhere, "", "            os.close(results.open(utf8(path[2:] if path.startswith(\"./\") else path)))", "            pass"),
    (rsync_follows_links, "", "RSYNC_FLAGS = re.compile(r\"-[vtrpzWI]*", "RSYNC_FLAGS = re.compile(r\"-[vtrpzWIL]*"),
    (rsync_takes_names_from_the_wire, "", "        raise Refused(\"rsync options:", "        os._exit(0)\n        raise Refused(\"rsync options:"),
    (rsync_writes_after_the_start, "", "elif place.state() != \"none\" or paths != [\".\"]:", "elif False:"),
    (rsync_beside_content_rules, CONTENT, "            raise Refused(\"rsync beside content rules\")", "            pass"),
    (denied_name, NAMES, "total) or name_rule(rules, name.decode(\"utf-8\", \"replace\"))", "total)"),
    (denied_content, CONTENT, "return {0: None, 256: \"deny_content\"", "return {0: None, 256: None"),
    (denied_content, "[outbound]\ndeny_sums = %s\n" % hashlib.sha256(b"SECRET-42\n").hexdigest(), "return 2 if digest", "return 0 if digest"),
    (content_by_another_order, CONTENT, "        if name not in self.files:\n            raise Refused(", "        if name not in self.files:\n            return self.place.open(name, os.O_RDONLY)\n            raise Refused("),
    (live_log_beside_content_rules, CONTENT, "    live = not name_rule(rules, LOG)", "    live = True or not name_rule(rules, LOG)"),
    (too_large_result, "[outbound]\nmax_file = 1K\n", "if rules[\"max_file\"] and length > rules[\"max_file\"]:", "if False:"),
    (too_much_in_all, "[outbound]\nmax_total = 1K\n", "if rules[\"max_total\"] and total + length > rules[\"max_total\"]:", "if False:"),
    (too_much_input, "[ssh guard]\nmax_bytes = 1K\n", "            if used > most:", "            if False:"),
    (a_huge_sparse_file, "[ssh guard]\nmax_bytes = 1M\n", "        if most and size > most:", "        if False:"),
    (a_piece_that_unpacks_to_more, "", "        if len(data) != whole:", "        if False:"),
    (environment, "", "    env = {key: value for key, value in os.environ.items() if PASS_ON.match(key)\n", "    env = {key: value for key, value in os.environ.items() if True\n"),
    (control_characters_in_the_log, "", "        value = printable(value)\n", "        value = str(value)\n",
     "json.dumps(value, ensure_ascii=False) if re.search(r'[\\s\"]|^$', value) else value", "value",
     "asked=printable(os.environ.get(\"SSH_ORIGINAL_COMMAND\", \"\")[-200:])", "asked=os.environ.get(\"SSH_ORIGINAL_COMMAND\", \"\")[-200:]"),
]


@pytest.mark.parametrize("case", ATTACKS, ids=lambda case: case[0].__name__)
def test_an_attack_gets_nothing_and_would_without_its_check(case, tmp_path):
    attack, ini, texts = case[0], case[1], case[2:]
    os.mkdir(str(tmp_path / "real"))
    assert not attack(Far(tmp_path / "real", ini))
    os.mkdir(str(tmp_path / "mutant"))
    mutant = Far(tmp_path / "mutant", ini, list(zip(texts[::2], texts[1::2])))
    assert attack(mutant), "the check is not needed, or not the one"


def test_what_is_refused_is_logged_with_the_reason(far):
    far.raw("cat /etc/passwd")
    far.run(far.fresh(), "rm -rf /")
    text = open(far.path("base", ".mi", "guard.log"), encoding="utf-8").read()
    assert "refused" in text and "cat /etc/passwd" in text and "no [command NAME] for rm" in text


def test_rules_that_the_guard_cannot_keep_stop_it(tmp_path):
    for ini in ("[outbound]\nhold = yes\n", "[outbound]\ndeny_pieces = x\n"):
        os.mkdir(str(tmp_path / ini[11:13]))
        code, out, err = Far(tmp_path / ini[11:13], ini).ask("hold", "-")
        assert code == 78 and b"not in this version" in err
    far = Far(tmp_path)
    os.chmod(far.path("ini"), 0o666)
    assert far.ask("hold", "-")[0] == 78


def test_no_command_section_means_no_command(tmp_path):
    far = Far(tmp_path)
    far.write("ini", "[ssh guard]\nbase = %s\n" % far.base)
    code, out, err = far.run(far.fresh(), "true")
    assert code == 77 and b"no [command NAME] for true" in err


def test_a_slow_pattern_ends_the_look_and_the_file_stays(tmp_path):
    far = Far(tmp_path, "[outbound]\ndeny_content = (x+x+)+y\nscan_timeout = 1s\n")
    ident = far.ended(data=b"x" * 5000)
    began = time.monotonic()
    assert far.get(ident, b"a", 10) is None and time.monotonic() - began < 15


def test_dry_run_only_logs(tmp_path):
    far = Far(tmp_path, "[outbound]\ndeny_names = secret*\ndry_run = yes\n")
    assert far.get(far.ended(), b"secret.txt") == b"SECRET"
    assert "deny_names" in open(far.path("base", ".mi", "guard.log")).read()


def test_no_word_from_the_wire_reaches_a_shell():
    text = open(SCRIPT, encoding="utf-8").read()
    guard = text[text.index("# ==== the guard ===="):text.index("# ---- the command line ----")]
    assert "os.system" not in guard and "shell=True" not in guard and "popen" not in guard.lower() and "eval(" not in guard and "exec(" not in guard
    assert re.findall(r'"sh", "-c", (\w+)', guard) == ["INTO_LOG"]


# with a real sshd: the key line, and the runner's own steps

@pytest.fixture(scope="module")
def lab():
    one = ssh_lab.Lab(more="AcceptEnv EVIL\nPermitUserEnvironment no\nX11Forwarding yes\nXAuthLocation /bin/true")
    one.line = one.guard("\n[command work]\nargv = /bin/sh\n  %s\n  {parameters}\nmatch = work.sh\nargument.1 = [a-z]+\n[command big]\nargv = /bin/cp\n  -r\n  in\n  out\nmatch = big\n"
                         % one.path("work.sh"), python=PYTHON)
    one.write("work.sh", WORK % {"dir": one.dir} + "exit 3\n")
    one.write("secret", "TOP-SECRET")
    one.start()
    yield one
    one.close()


def run(lab, here, *words, **how):
    process = subprocess.Popen([PYTHON, SCRIPT, "--ini", lab.path("ini")] + list(words), cwd=str(here), env=lab.env(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = b""
    for row in iter(process.stdout.readline, b""):
        out += row
        if how.get("cut") and how["cut"] in row:
            lab.cut()
            how["cut"] = None
    return process.wait(), out.decode()


def test_the_runners_own_steps_pass(lab, tmp_path):
    (tmp_path / "a").write_text("1")
    code, out = run(lab, tmp_path, "run", "guarded", "work.sh abc", "--in", "a")
    assert code == 3 and (tmp_path / "b").read_text() == "1" and "args abc" in (tmp_path / "remote_program_exec.log").read_text(), out
    assert "refused" not in open(lab.path("far", ".mi", "guard.log")).read().replace("not_refused", "")
    ident = re.search(r"[0-9a-f-]{36}", out).group()
    assert ident in run(lab, tmp_path, "list", "guarded")[1]
    assert run(lab, tmp_path, "clean", ident)[0] == 0 and not os.path.exists(lab.path("far", ident))
    code, out = run(lab, tmp_path, "run", "guarded", "rm -rf x")
    assert code == 77 and "no [command NAME]" in out


def test_large_and_many_files_streams_rsync_and_lost_lines_pass_the_guard(lab, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "big").write_bytes(os.urandom(70 << 20))
    for n in range(300):
        (folder / ("計 %d" % n)).write_bytes(os.urandom(n * 11))
    for cut in (b"4 inputs", b"5 start", b"7 results"):
        code, out = run(lab, tmp_path, "run", "guarded", "big", "--in", "in", "--streams", "3", cut=cut)
        assert code == 0, out
        subprocess.check_call(["diff", "-r", str(folder), str(tmp_path / "out")])
        shutil.rmtree(str(tmp_path / "out"))


def test_a_cancel_passes_the_guard(lab, tmp_path):
    process = subprocess.Popen([PYTHON, SCRIPT, "run", "--ini", lab.path("ini"), "guarded", "work.sh slow"], cwd=str(tmp_path), env=lab.env(), stdout=subprocess.PIPE)
    row = b""
    while b"5 start" not in row:
        row = process.stdout.readline()
    ident = re.search(r"[0-9a-f-]{36}", row.decode()).group()
    assert run(lab, tmp_path, "cancel", ident)[0] == 0
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_a_cancel_through_the_guard_ends_also_what_left_session_and_environment(tmp_path):
    far, done = Far(tmp_path), []
    ident = far.fresh()
    thread = threading.Thread(target=lambda: done.append(far.run(ident, "work.sh leave")))
    thread.start()
    written = tmp_path / "base" / "pids"
    suite.wait_until(lambda: written.exists() and len(written.read_text().split()) == 3)
    pids = [int(word) for word in written.read_text().split()]
    code, out, err = far.ask("cancel", ident, "1")
    thread.join(20)
    assert out.endswith(b"E ended 143\n") and b"\nE ended 143\n" in done[0][1]
    for pid in pids:
        assert not os.path.exists("/proc/%d" % pid), pids


def test_rsync_with_the_guard_brings_differences(lab, tmp_path):
    lab.write("guard/mi_distributed_computing_assist.ini", open(lab.path("guard", "mi_distributed_computing_assist.ini")).read()
              + "[command same]\nargv = /bin/cp\n  state\n  state.bin\nmatch = same\n")
    data = os.urandom(12 << 20)
    (tmp_path / "state").write_bytes(data)
    (tmp_path / "state.bin").write_bytes(data[:-50] + b"y" * 50)
    code, out = run(lab, tmp_path, "run", "guarded", "same", "--in", "state")
    assert code == 0 and (tmp_path / "state.bin").read_bytes() == data and re.search("8 fetch files=[23] bytes=0", out), out


def test_check_looks_at_the_host_as_it_is_with_and_without_the_guard(lab, tmp_path):
    for host, guard in (("guarded", "guard there"), ("hpc", "no guard there: this key may run anything")):
        code, out = run(lab, tmp_path, "check", host)
        levels = {row[6:].rstrip(): row[:5].strip() for row in out.splitlines()}
        assert code == 0 and set(levels.values()) == {"OK"}, out
        assert guard in levels and re.search(r"OK    log-in in [0-9.]+ s, round trip [0-9.]+ ms\n", out)
        assert re.search(r"GNU tools there: yes, rsync: yes, zstd: (yes|no), sums by \w+, AES: (yes|no)\n", out)
        assert float(re.search(r"free there: ([0-9.]+) GB", out).group(1)) == pytest.approx(shutil.disk_usage(lab.dir).free / 1e9, rel=0.2)
    code, out = run(lab, tmp_path, "check", "nowhere.invalid", "--json")
    assert code == 78 and json.loads(out)[-1]["level"] == "FAIL" and "nowhere.invalid: ssh: Could not resolve hostname" in json.loads(out)[-1]["text"]


def test_check_without_a_host_looks_at_the_guards_own_side(lab, tmp_path):
    os.makedirs(str(tmp_path / ".ssh"))
    (tmp_path / ".ssh" / "authorized_keys").write_text("# execute_remote_command.py is below\n" + lab.line.strip() + "\n")

    def check(script=lab.path("guard", "execute_remote_command.py")):
        done = subprocess.run([PYTHON, script, "check"], cwd=str(tmp_path), env=dict(lab.env(), HOME=str(tmp_path)), stdout=subprocess.PIPE)
        return done.returncode, done.stdout.decode()

    code, out = check()
    assert code == 0 and "OK    commands allowed: command work, command big" in out and "authorized_keys: 1 key lines with this guard" in out, out
    assert "OK    key line begins with restrict:" in out
    (tmp_path / ".ssh" / "authorized_keys").write_text(lab.line.replace("restrict,", ""))
    code, out = check(SCRIPT)
    assert code == 78 and "FAIL  commands allowed: none" in out and os.listdir(str(tmp_path)) == [".ssh"], "it changes nothing"
    code, out = check()
    assert code == 78 and re.search("^FAIL  key line begins with restrict:", out, re.M), out


def ssh(lab, *words, **how):
    return subprocess.run(["ssh", "-F", lab.path("config"), "-o", "BatchMode=yes"] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=20, **how)


@pytest.fixture
def agent():
    """An ssh-agent's socket."""
    process = subprocess.Popen(["ssh-agent", "-D"], stdout=subprocess.PIPE)
    yield re.search(rb"SSH_AUTH_SOCK=([^;]+);", process.stdout.readline()).group(1).decode()
    process.kill()
    process.communicate()


def answering():
    """A port that says hello to whoever connects."""
    goal = socket.socket()
    goal.bind(("127.0.0.1", 0))
    goal.listen(5)

    def serve():
        while True:
            try:
                one, _peer = goal.accept()
            except OSError:
                return
            one.sendall(b"hello")
            one.close()
    threading.Thread(target=serve, daemon=True).start()
    return goal


def with_key(lab, line):
    lab.keys = [lab.keys[0], line]
    lab.authorize()


@pytest.mark.parametrize("restricted", [True, False])
def test_the_key_line_allows_no_forwarding_no_agent_no_x11_and_no_terminal(lab, agent, restricted):
    lab.write("probe", "#!/bin/sh\ntty\nenv\n")
    os.chmod(lab.path("probe"), 0o755)
    line, goal = re.sub('command="[^"]*"', 'command="%s"' % lab.path("probe"), lab.line), answering()
    with_key(lab, line if restricted else line.replace("restrict,", ""))       # the mutation: without the one word
    try:
        there = ssh(lab, "-A", "-o", "IdentityAgent=SSH_AUTH_SOCK", "-Y", "guarded", env=dict(os.environ, SSH_AUTH_SOCK=agent, DISPLAY=":99")).stdout
        assert b"SSH_CONNECTION=" in there
        got = {
            "port": b"hello" in ssh(lab, "-W", "127.0.0.1:%d" % goal.getsockname()[1], "guarded").stdout,
            "remote port": ssh(lab, "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1", "guarded").returncode == 0,
            "agent": b"SSH_AUTH_SOCK=" in there,
            "x11": b"DISPLAY=" in there,
            "terminal": b"/dev/" in ssh(lab, "-tt", "guarded").stdout,
        }
        if os.geteuid():
            del got["terminal"]                        # an sshd that is not root's gives none to anybody
        assert set(got.values()) == {not restricted}, got
    finally:
        goal.close()
        with_key(lab, lab.line)


@pytest.mark.parametrize("guarded", [True, False])
def test_the_key_line_allows_no_shell_no_subsystem_and_no_environment(lab, guarded):
    with_key(lab, lab.line if guarded else open(lab.path("gid.pub")).read())   # the mutation: a key line without the guard
    try:
        got = {
            "sftp": subprocess.run(["sftp", "-F", lab.path("config"), "-b", "-", "guarded"], input=b"ls\n", stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE).returncode == 0,
            "scp": subprocess.run(["scp", "-O", "-F", lab.path("config"), "guarded:" + lab.path("secret"), lab.path("stolen")],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE).returncode == 0,
            "environment": ssh(lab, "-o", "SendEnv=EVIL", "guarded", "echo $EVIL", env=dict(os.environ, EVIL="evil")).stdout == b"evil\n",
            "shell": ssh(lab, "guarded", "cat", lab.path("secret")).stdout == b"TOP-SECRET",
        }
        assert set(got.values()) == {not guarded}, got
    finally:
        with_key(lab, lab.line)


def test_the_key_line_is_one_line_that_sshd_understands(lab):
    assert lab.line.startswith("restrict,command=\"") and lab.line.count("\n") == 1 and " -I -S " in lab.line
