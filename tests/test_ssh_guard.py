"""The guard of the SSH way: the runner's own steps pass, everything else is refused; and each refusal is lost when its check is taken out."""
import concurrent.futures
import hashlib
import itertools
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
from test_ssh_runner import Stepwise

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
hold) sleep 300;;
deep) python3 -c 'import os
for n in range(1500): os.mkdir("d%%04d" %% n); os.chdir("d%%04d" %% n)';;
many) i=0; while [ $i -lt 1100 ]; do i=$((i + 1)); : >secret$i; done;;
leave) echo $$ >../pids; env -i setsid sh -c 'trap "" TERM; sleep 300 & echo $! $$ >>../pids'; sleep 300;;
esac
cp a b 2>/dev/null
echo SECRET-42 >secret.txt
echo result >r.txt
"""


class Far:
    """An external computer with a guard; ask() is what its sshd would do with the key."""

    def __init__(self, folder, ini="", mutation=()):
        self.dir, self.numbers = str(folder), itertools.count(1)
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
        return IDENT % next(self.numbers)

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
        data = how.pop("data", b"")
        return self.raw(runner.request(verb, "~/elsewhere", ident, *words), data, **how)

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
    codes = [far.put(ident, b"f%d" % n, b"x" * 6000)[0] for n in range(3)]
    return codes == [0, 0, 0]


def a_huge_sparse_file(far):
    ident = far.fresh()
    far.ask("lane", ident, "put", data=b"C 1 0 1 f/\nxM 2 99999999999 1:644 f/\n")
    return os.path.exists(far.path("base", ident, "f")) and os.path.getsize(far.path("base", ident, "f")) > 10 ** 9


def a_byte_far_away(far):
    ident = far.fresh()
    far.put(ident, b"f", b"x", 99999999999)
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


def listed(far, ident, times=1):
    return far.ask("lane", ident, "get", data=b"L 1 0 0 -/\n" * times)[1]


def names_of_directories_after_a_cancel(far):
    far.write("work.sh", "mkdir -p SECRET-42\n")
    ident = far.ended()
    far.write("base/.mi/%s/cancelled" % ident, "")
    return b"SECRET-42" in listed(far, ident)


def what_a_command_left_that_did_not_end_by_itself(far):
    ident = far.ended()
    for name in ("end", "start", "child"):             # a batch system's limit, an OOM killer: wrapper and command are gone, without an end
        os.utime(far.path("base", ".mi", ident, name), (0, 0))
    os.unlink(far.path("base", ".mi", ident, "end"))
    assert b"E lost" in far.ask("watch", ident, "0")[1]
    return far.get(ident, b"r.txt") == b"result"


def older_lines_of_the_log_by_looking_again_and_again(far):
    ident = far.ended()
    listed(far, ident, 5)
    listed(far, ident)
    return open(far.path("base", ".mi", "guard.log")).read().count("refused=secret.txt") != 1


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
    (put_after_the_start, "", "            if self.begun():\n                raise Refused(", "            if False:\n                raise Refused("),
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
    (a_second_run, "", "    if not place.begun():\n        if boot", "    if True:\n        if boot",
     "    if place.begun():\n        return\n", "", "    os.rename(fresh, place.control)", "    os.path.isdir(place.control) and os.rename(place.control, fresh + b'.old')\n    os.rename(fresh, place.control)"),
    (an_id_that_is_a_path, "", "if not re.fullmatch(shape, ident) or", "if"),
    (an_unknown_verb, "", "        raise Refused(\"an unknown verb\")", "        return os._exit(os.system(verb) and 0)"),
    (another_form, "", "        raise Refused(\"not a request of this program\")", "        return os._exit(os.system(text) and 0)"),
    (a_text_of_its_own, "", "    found = FORM.match(text)\n", "    os.system(text)\n    found = FORM.match(text)\n"),
    (denied_name, NAMES, "total) or name_rule(rules, name.decode(\"utf-8\", \"replace\"))", "total)"),
    (denied_content, CONTENT, "return {0: None, 256: \"deny_content\"", "return {0: None, 256: None"),
    (denied_content, "[outbound]\ndeny_sums = %s\n" % hashlib.sha256(b"SECRET-42\n").hexdigest(), "return 2 if digest", "return 0 if digest"),
    (content_by_another_order, CONTENT, "        if name not in self.files:\n            raise Refused(", "        if name not in self.files:\n            return self.place.open(name, os.O_RDONLY)\n            raise Refused("),
    (live_log_beside_content_rules, CONTENT, "    live = not name_rule(rules, LOG)", "    live = True or not name_rule(rules, LOG)"),
    (too_large_result, "[outbound]\nmax_file = 1K\n", "if rules[\"max_file\"] and length > rules[\"max_file\"]:", "if False:"),
    (too_much_in_all, "[outbound]\nmax_total = 1K\n", "if rules[\"max_total\"] and total + length > rules[\"max_total\"]:", "if False:"),
    (too_much_input, "[ssh guard]\nmax_bytes = 10K\n", "        if max(used, end) > most:", "        if False:"),
    (a_byte_far_away, "[ssh guard]\nmax_bytes = 1M\n", "max(used, end)", "used"),
    (a_huge_sparse_file, "", "            if os.fstat(fd).st_size < size:\n                raise Refused", "            if os.ftruncate(fd, size):\n                raise Refused"),
    (a_piece_that_unpacks_to_more, "", "        if len(data) != whole:", "        if False:"),
    (environment, "", "    env = {key: value for key, value in os.environ.items() if PASS_ON.match(key)\n", "    env = {key: value for key, value in os.environ.items() if True\n"),
    (control_characters_in_the_log, "", "        value = printable(value)\n", "        value = str(value)\n",
     "json.dumps(value, ensure_ascii=False) if re.search(r'[\\s\"]|^$', value) else value", "value",
     "asked=printable(os.environ.get(\"SSH_ORIGINAL_COMMAND\", \"\")[-200:])", "asked=os.environ.get(\"SSH_ORIGINAL_COMMAND\", \"\")[-200:]"),
    (names_of_directories_after_a_cancel, "", "        if \"patterns\" not in self.kinds:\n", "        if False:\n"),
    (what_a_command_left_that_did_not_end_by_itself, "", "or words[0] == \"lost\" or", "or"),
    (older_lines_of_the_log_by_looking_again_and_again, NAMES, "for name, why in rows if said != self.said else ():", "for name, why in rows:"),
]


@pytest.mark.parametrize("case", ATTACKS, ids=lambda case: case[0].__name__)
def test_an_attack_gets_nothing_and_would_without_its_check(case, tmp_path):
    attack, ini, texts = case[0], case[1], case[2:]
    os.mkdir(str(tmp_path / "real"))
    assert not attack(Far(tmp_path / "real", ini))
    os.mkdir(str(tmp_path / "mutant"))
    mutant = Far(tmp_path / "mutant", ini, list(zip(texts[::2], texts[1::2])))
    assert attack(mutant), "the check is not needed, or not the one"


# Over a real sshd: what got through once.

class Real(Far):
    """The same through a real sshd, over one connection per key; attacks may hold lanes open."""

    def __init__(self, lab, folder, ini="", mutation=(), key=""):
        Far.__init__(self, folder, ini, mutation)
        self.lab, self.controls = lab, []
        self.use(key)

    def use(self, key):
        """From here on with a key of this name."""
        words = [PYTHON, self.script, "guard", "--ini", self.path("ini"), "--print-key-line", self.lab.path("gid.pub")]
        with_key(self.lab, subprocess.check_output(words + (["--key", key] if key else [])).decode())
        self.controls.append(subprocess.Popen(["ssh", "-F", self.lab.path("config"), "-M", "-S", self.path("c%d" % len(self.controls)), "-N", "guarded"]))
        suite.wait_until(lambda: os.path.exists(self.path("c%d" % (len(self.controls) - 1))))
        return self

    def close(self):
        for one in self.controls:
            one.kill()                                 # (it misses a SIGTERM that comes just before it begins to wait)
            one.wait(20)
        with_key(self.lab, self.lab.line)

    def session(self, *words):
        """A session that is held open."""
        return self.popen(runner.request(words[0], "b", *words[1:]))

    def popen(self, command):
        return subprocess.Popen(["ssh", "-T", "-F", self.lab.path("config"), "-S", self.path("c%d" % (len(self.controls) - 1)), "guarded", command],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def raw(self, command, data=b"", **env):
        process = self.popen(command)
        if data is not None:
            out, err = process.communicate(data, timeout=30)
        else:
            out = process.stdout.read()
            err = process.communicate(timeout=30)[1]
        return process.returncode, out, err

    def started(self, command="work.sh slow"):
        """(ID, a session that watches it) of one that runs; its inputs: a."""
        ident = self.fresh()
        assert self.put(ident, b"a", b"0123456789")[0] == 0
        return ident, self.start(ident, command)

    def start(self, ident, command="work.sh slow"):
        process = self.session("run", ident, runner.boot_id(), command, "text")
        row = b""
        while b"\nS running" not in row and b"\nL " not in row:
            row += os.read(process.stdout.fileno(), 4096) or pytest.fail("it does not run: %r %r" % (row, process.stderr.read()))
        return process

    def over(self, process):
        process.communicate(timeout=60)


def told(process, data, answer=rb"\nok [^\n]*\n"):
    """Sends data into a held lane; True if the answer came, False if the lane ended."""
    out = b""
    try:
        process.stdin.write(data)
        process.stdin.flush()
    except OSError:
        return False
    while not re.search(answer, b"\n" + out):
        more = os.read(process.stdout.fileno(), 4096)
        if not more:
            return False
        out += more
    return True


def rsync_without_a_path(far):
    ident = far.ended()
    far.write("shell", "#!/bin/sh\nssh -F %s -S %s guarded \"$(cat %s) --server --sender -vtrpe.LsfxCIvu .\" | { read -r x; exec cat; }\n" % (
        far.lab.path("config"), far.path("c0"), far.path("request")))
    far.write("request", runner.request("rsync", "b", ident))
    os.chmod(far.path("shell"), 0o755)
    subprocess.run(["rsync", "-vtrp", "-e", far.path("shell"), "host:", far.path("stolen") + "/"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return os.path.exists(far.path("stolen", "secret.txt"))


def sum_of_a_file_that_was_not_put(far):
    ident = far.fresh()
    far.put(ident, b"a", b"1")
    shutil.copy(far.path("secret"), far.path("base", ident))
    return hashlib.sha256(b"TOP-SECRET").hexdigest().encode() in far.ask("lane", ident, "put", data=b"S 1 0 9 -/\n./secret\n")[1]


def sum_by_a_lane_that_was_held_over_the_start(far):
    ident = far.fresh()
    far.put(ident, b"a", b"0123456789")
    lane = far.session("lane", ident, "put")
    head = runner.tar_header(b"./inner", 1, 0o644, 0) + runner.padded(b"x") + b"\0" * 1024
    assert told(lane, b"T 0 0 %d -/\n" % len(head) + head + b"S 1 0 8 -/\n./inner\n")
    watch = far.start(ident)
    with open(far.path("base", ident, "inner"), "w") as out:
        out.write("SECRET-7")
    lane.stdin.write(b"S 2 0 8 -/\n./inner\n")
    out = lane.communicate(timeout=30)[0]
    far.over(watch)
    return hashlib.sha256(b"SECRET-7").hexdigest().encode() in out


def order_held_over_the_start(far):
    ident = far.fresh()
    far.put(ident, b"a", b"0123456789")
    lane = far.session("lane", ident, "put")
    assert told(lane, b"C 1 0 10 a/\n0123456789")
    lane.stdin.write(b"C 2 0 %d a/\n" % (2 * runner.BLOCK) + b"9" * runner.BLOCK)     # one block of two is written
    lane.stdin.flush()
    path = far.path("base", ident, "a")
    suite.wait_until(lambda: os.path.getsize(path) == runner.BLOCK)
    watch = far.start(ident)
    before = open(path, "rb").read()
    try:
        lane.communicate(b"8" * runner.BLOCK, timeout=30)
    except BrokenPipeError:
        pass
    far.over(watch)
    return open(path, "rb").read() != before


def lane_that_stays_after_the_start(far):
    ident = far.fresh()
    far.put(ident, b"a", b"0123456789")
    lane = far.session("lane", ident, "put")
    assert told(lane, b"C 1 0 10 a/\n0123456789")
    far.over(far.start(ident))
    try:
        return lane.wait(5) != 77
    except subprocess.TimeoutExpired:
        lane.kill()
        return True


def base_that_others_prepared(far):
    ident = far.fresh()
    os.chmod(far.base, 0o777)
    control = far.path("base", ".mi", ident)
    os.makedirs(control)
    runner.prepare(os.fsencode(control))
    with open(os.path.join(control, "run"), "w") as out:
        out.write("echo >%s\n" % far.path("evil"))
    with open(os.path.join(control, "command"), "w") as out:
        json.dump({"name": "work", "after_stop": "", "patterns": True, "logs": True}, out)
    process = far.session("run", ident, runner.boot_id(), "work.sh", "text")
    suite.wait_until(lambda: os.path.exists(far.path("evil")) or process.poll() is not None)
    process.kill()
    process.communicate()
    return os.path.exists(far.path("evil"))


def base_below_a_directory_of_others(far):
    os.makedirs(far.path("common", "base"))
    os.chmod(far.path("common"), 0o777)
    text = open(far.path("ini")).read()
    far.write("ini", text.replace("base = %s\n" % far.base, "base = %s\n" % far.path("common", "base")))
    return b"E ended" in far.run(far.fresh())[1]


def bundle(*members):
    """A bundle order of (name, size as it stands in the header, what comes, kind)."""
    data = b""
    for name, size, content, kind in members:
        block = bytearray(runner.tar_header(name, len(content), 0o644, 0, kind))
        block[124:136] = size if isinstance(size, bytes) else block[124:136]
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
        data += bytes(block) + runner.padded(content)
    data += b"\0" * 1024
    return b"T 0 0 %d -/\n" % len(data) + data


def sizes_below_zero(far):
    ident = far.fresh()
    return far.ask("lane", ident, "put", data=bundle(*[(b"./n%d" % n, b"-00000000777", b"", b"0") for n in range(100)]))[0] == 0


def entries_that_cost_nothing(far):
    ident = far.fresh()
    for n in range(6):
        far.ask("lane", ident, "put", data=bundle(*[(b"./%d/%d/%d" % (n, k, k), None, b"", b"05"[k % 2:][:1]) for k in range(40)]))
    return sum(len(folders) + len(files) for top, folders, files in os.walk(far.path("base", ident))) > 300


def names_of_what_is_refused(far):
    ident = far.fresh()
    far.ask("lane", ident, "put", data=bundle((b"./secret_dir/secret_file", None, b"1", b"0"), (b"./secret_empty/", None, b"", b"5"),
                                              (b"./open/empty", None, b"", b"5"), (b"./open/file", None, b"1", b"0")))
    far.run(ident)
    out = far.ask("lane", ident, "get", data=b"L 1 0 0 -/\n")[1]
    assert b" open\0" in out and b" open/file\0" in out and b" open/empty\0" in out and re.search(rb"\0x 0 0 0 0 ([0-9] of the results there|secret)", out)
    return b"secret" in out


def calculations_of_another_key(far):
    far.use("one")
    ident = far.ended()
    far.use("two")
    return bool(ident.encode() in far.ask("list", "-")[1] or far.get(ident, b"r.txt") or b"E ended" in far.ask("cancel", ident, "1")[1]
                or far.put(ident, b"new", b"1")[0] or far.ask("clean", ident)[1] and not os.path.exists(far.path("base", "one", ident, "r.txt")))


def a_cancel_by_another_key_that_knows_the_id(far):
    far.use("two")
    ident, other = far.started("work.sh hold")
    far.use("one")                                     # his is the younger one: what ran before a calculation is never ended with it
    assert far.put(ident, b"a", b"1")[0] == 0
    watch = far.start(ident, "work.sh hold")
    out = far.use("two").ask("cancel", ident, "1")[1]
    assert b"E ended" in out, out
    other.communicate(timeout=30)
    try:
        watch.wait(1)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        far.use("one").ask("cancel", ident, "1")
        watch.communicate(timeout=30)


def a_log_without_end(far):
    far.write("guard.py", open(far.script).read().replace("LOG_MOST, LOG_KEEP = 16 << 20, 8 ", "LOG_MOST, LOG_KEEP = 300, 1"))
    for n in range(8):
        far.raw("x" * 1000)
    return sum(os.path.getsize(far.path("base", ".mi", name)) for name in os.listdir(far.path("base", ".mi")) if name.startswith("guard.log")) > 2 * 900


UNSTARTED = ("            if self.begun():\n                raise Refused(", "            if False:\n                raise Refused(")
LOOK_UP = ("        if self.place.begun():\n            os.write(2,", "        if False:\n            os.write(2,")
FIT = ("    why = open_to_others(rules[\"base\"])\n", "    why = None\n", "    if open_to_others(rules[\"base\"]):\n", "    if False:\n")
REREAD = ("        self.came = {}\n        for", "        self.came = {name: file_sum(os.path.join(self.place.work, name)) for name in os.listdir(self.place.work)}\n        for")
HOLES = [                      # as ATTACKS
    (rsync_without_a_path, "[outbound]\ndeny_names = secret*\n", "'[^']*'((?: '[^']*'){4,8})\\Z", "'[^']*'((?: '[^']*'){4,8})",
     "    \"clean\": (guard_clean, IDENT, ()),\n", "    \"clean\": (guard_clean, IDENT, ()),\n    \"rsync\": (lambda place, words: (os.chdir(place.work), "
     "os.execvp(\"rsync\", \"rsync --server --sender -vtrpe.LsfxCIvu .\".split())), IDENT, ()),\n"),
    (sum_of_a_file_that_was_not_put, "", "            if name not in self.came:\n                raise Refused(", "            if False:\n                raise Refused(",
     "% self.came[name].encode())", "% file_sum(os.path.join(self.place.work, name)).encode())"),
    (sum_by_a_lane_that_was_held_over_the_start, "", "            if name not in self.came:\n                raise Refused(", "            if False:\n                raise Refused(",
     "% self.came[name].encode())", "% file_sum(os.path.join(self.place.work, name)).encode())") + LOOK_UP,
    (order_held_over_the_start, "") + UNSTARTED + LOOK_UP,
    (lane_that_stays_after_the_start, "") + LOOK_UP,
    (base_that_others_prepared, "") + FIT,
    (base_below_a_directory_of_others, "") + FIT,
    (sizes_below_zero, "[ssh guard]\nmax_bytes = 500K\n", "    if not re.match(rb\" *[0-7]*[ \\0]*\\Z\", field):", "    if False:"),
    (entries_that_cost_nothing, "[ssh guard]\nmax_bytes = 1M\n", "ENTRY = 4096 ", "ENTRY = 0"),
    (names_of_what_is_refused, "[outbound]\ndeny_names = secret*\n", "                self.refused[name] = why\n",
     "                self.refused[name] = why\n                self.files[name] = mark\n"),
    (names_of_what_is_refused, "[outbound]\ndeny_names = secret*\n", "set(filter(self.may_be_named, self.folders))", "set(self.folders)"),
    (calculations_of_another_key, "", "os.path.join(rules[\"top\"], utf8(name)) if name else", "rules[\"top\"] if name else"),
    (a_cancel_by_another_key_that_knows_the_id, "", "b\"CALC_DIR=\" + place.work, int", "utf8(\"MI_RUN=%s.1\" % place.ident), int"),
    (a_log_without_end, "", "    if os.fstat(fd).st_size < LOG_MOST:\n", "    if True:\n"),
]


@pytest.mark.parametrize("case", HOLES, ids=lambda case: case[0].__name__)
def test_what_got_through_an_sshd_once_does_not_and_would_without_its_check(case, lab, tmp_path):
    attack, ini, texts = case[0], case[1], case[2:]
    for who, mutation, wanted in (("real", (), False), ("mutant", list(zip(texts[::2], texts[1::2])), True)):
        os.mkdir(str(tmp_path / who))
        far = Real(lab, tmp_path / who, ini, mutation)
        try:
            assert attack(far) == wanted, who
        finally:
            far.close()


STATES = ("before", "running", "ended", "cleaned")
STARTED, NOT_ENDED, STRANGE = b"inputs for a calculation that was started", b"has not ended", b"does not belong to this lane"
ALL_STARTED, ALL_NOT_ENDED = (b"", STARTED, STARTED, STARTED), (NOT_ENDED, NOT_ENDED, b"", NOT_ENDED)
PACKED = zlib.compressobj(9, zlib.DEFLATED, 31)
PACKED = PACKED.compress(b"xy") + PACKED.flush()
WHAT_IS_ALLOWED = [            # (verb, words, orders, in each state: what it is refused with, or what its answer ends with)
    ("hold", None, b"ping\n", (b"ping\n",) * 4),
    ("list", None, b"", (b"E end\n",) * 4),
    ("rsync", (), b"", (b"an unknown verb",) * 4),
    ("lane", ("put",), b"C 1 0 1 a/\nx", ALL_STARTED),
    ("lane", ("put",), b"Z 1 0 %d,2 a/\n" % len(PACKED) + PACKED, ALL_STARTED),
    ("lane", ("put",), bundle((b"./new", None, b"1", b"0")) + b"S 1 0 6 -/\n./new\n", ALL_STARTED),
    ("lane", ("put",), b"M 1 1 5:644 a/\n", ALL_STARTED),
    ("lane", ("put",), b"S 1 0 4 -/\n./a\n", (b"a sum of something else", STARTED, STARTED, STARTED)),
    ("lane", ("put",), b"L 1 0 0 -/\n", ALL_STARTED),
    ("lane", ("put",), b"", ALL_STARTED),
    ("lane", ("put",), b"G 1 0 1 a/\n", (STRANGE, STARTED, STARTED, STARTED)),
    ("lane", ("put",), b"A 1 0 4 -/\n./a\n", (STRANGE, STARTED, STARTED, STARTED)),
    ("lane", ("get",), b"L 1 0 0 -/\n", ALL_NOT_ENDED),
    ("lane", ("get",), b"G 1 0 1 a/\n", ALL_NOT_ENDED),
    ("lane", ("get",), b"A 1 0 4 -/\n./a\n", ALL_NOT_ENDED),
    ("lane", ("get",), b"S 1 0 4 -/\n./a\n", ALL_NOT_ENDED),
    ("lane", ("get",), b"C 1 0 1 a/\nx", (STRANGE,) * 4),
    ("lane", ("get",), b"T 0 0 1024 -/\n", (STRANGE,) * 4),
    ("lane", ("get",), b"M 1 1 5:644 a/\n", (STRANGE,) * 4),
    ("watch", ("0",), b"", (b"watch\n", b"S running\n", b"E ended 0\n", b"watch\n")),
    ("run", (runner.boot_id(), "true", ""), b"", (b"", b"S running\n", b"E ended 0\n", b"E lost it was cleaned away\n")),
    ("cancel", ("1",), b"", (b"E none\n", b"E ended 143\n", b"E ended 0\n", b"E none\n")),
    ("clean", (), b"", (b"E cleaned\n", b"E running\n", b"E cleaned\n", b"E cleaned\n")),
]
CHANGE = ("run", "cancel", "clean")                    # what the state is another one after


def contents(far, ident):
    """Everything of a calculation."""
    found = {}
    for top in (far.path("base", ident), far.path("base", ".mi", ident)):
        for folder, _folders, names in os.walk(top):
            found.update((os.path.join(folder, name), open(os.path.join(folder, name), "rb").read()) for name in names if name != "alive")
    return found


def test_what_the_guard_allows_in_each_state_of_a_calculation(lab, tmp_path):
    far, wrong, runs = Real(lab, tmp_path), [], []

    def one(state):
        ident = far.fresh()
        far.put(ident, b"a", b"1")
        if state == "running":
            runs.append((ident, far.start(ident, "work.sh hold")))
        if state in ("ended", "cleaned"):
            assert b"E ended 0" in far.run(ident)[1]
        if state == "cleaned":
            assert b"E cleaned" in far.ask("clean", ident)[1]
        return ident

    def row_by_row(state):
        ident = one(state)
        for verb, words, orders, answers in WHAT_IS_ALLOWED:
            ident = one(state) if verb in CHANGE else ident
            wanted, before = answers[STATES.index(state)], contents(far, ident)
            code, out, err = far.ask(verb, "-" if words is None else ident, *(words or ()), data=orders)
            refused = not wanted.endswith(b"\n") and wanted
            good = code == 77 and wanted in err and err.count(b"\n") == 1 if refused else code == 0 and out.endswith(wanted)
            if not good or refused and contents(far, ident) != before:
                wrong.append((state, verb, words, orders[:20], wanted, code, out[-60:], err[-200:]))
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(row_by_row, STATES))
        assert not wrong, "\n".join(map(repr, wrong))
    finally:
        for ident, process in runs:
            far.ask("cancel", ident, "1")
            far.over(process)
        far.close()


def member(**fields):
    """A bundle of one file whose header has other bytes at some fields: {offset: bytes}; sum right."""
    data = bytearray(runner.tar_header(fields.get("name", b"./f"), 1, 0o644, 5, fields.get("kind", b"0")) + runner.padded(b"x") + b"\0" * 1024)
    for at, text in fields.get("at", {}).items():
        data[at:at + len(text)] = text
    data[148:156] = fields.get("sum") or b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    return b"T 0 0 %d -/\n" % fields.get("told", len(data)) + bytes(data)


def lane_orders(*orders):
    return [("lane", ("put",), order) for order in orders]


HOSTILE = [("raw", text, b"") for text in (
    "", "ls", "-", "x" * 100000, "\udcff\udcfe", runner.request("hold", "b", "-") + " more", runner.request("hold", "b", "-") * 2,
    runner.request("rsync", "b", IDENT % 1) + " --server --sender -vtrpe.LsfxCIvu .", runner.request("rsync", "b", IDENT % 1) + " --server - . .")]
HOSTILE += [(verb, words, b"") for verb, words in (
    ("guard", ()), ("far", ()), ("lane\0", ("put",)), ("lane", ()), ("lane", ("put", "get")), ("lane", ("both",)), ("lane", ("put\n",)), ("watch", ("-1",)),
    ("watch", ("1e5",)), ("watch", ("9" * 19,)), ("watch", ("\u0661",)), ("watch", ("",)), ("cancel", ("-1",)), ("cancel", ("99999",)), ("clean", ("x",)),
    ("run", ("?", "", "")), ("run", ("?", "true\0", "")), ("run", ("?", "x" * 4001, "")), ("run", ("?", "\udced\udca0\udc80", "")), ("run", ("?", "true\ntrue", "")),
    ("run", ("?", "work.sh 'x", "")), ("run", ("../..", "true", "")), ("run", ("?", "true"))) ]
HOSTILE += lane_orders(
    b"C -1 0 1 a/\nx", b"C 1 -5 1 a/\nx", b"C 1 0 -1 a/\nx", b"C 1 0 1 /\nx", b"C 1 0 1 ../a/\nx", b"C 1 0 1 b/../a/\nx", b"C 1 0 1 .//\nx", b"C 1 0 1 a\0b/\nx",
    b"C 1 0 1 a\nx", b"C 1 0 9999999999 a/\nx", b"C 1 1e3 1 a/\nx", b"C 1 0 1,1 a/\nx", b"C 1 0 " + b"1" * 60 + b" a/\n", b"C 1 0 1 " + b"n" * 1500 + b"/\n", b"x" * 300000, b"\n", b"\0\n",
    b"M 1 5 nan:644 a/\n", b"M 1 5 1:99999 a/\n", b"M 1 5 1.2.3:644 a/\n", b"M 1 5 1:8 a/\n", b"M 1 9 1:644 a/\n", b"M 1 5 5 a/\n",
    b"Z 1 0 5 a/\nabcde", b"Z 1 0 5,-5 a/\nabcde", b"Z 1 0 5,5 a/\nabcde", b"Z 1 0 99999999,5 a/\nabcde", b"Z 1 0 %d,1 a/\n" % len(PACKED) + PACKED,
    b"S 1 0 99999999 -/\n", b"S 1 0 4 -/\n./a\n", b"S 1 0 6 -/\n../a/\n", b"S 1 0 4 -/\n\0\0\0\n", b"K 1 0 4 -/\n./a\n", b"E 1 0 0 -/\n", b"X 0 0 0 -/\n", b"L 1 0 5 -/\n", b"A 1 0 4 -/\n./a\n",
    member(told=600), member(told=10 ** 8) + b"\0" * 20000, member(kind=b"1"), member(kind=b"2"), member(kind=b"3"), member(kind=b"6"), member(sum=b"000000\0 "), member(sum=b"-00001\0 "),
    member(name=b"./../f"), member(name=b"/"), member(name=b"./f\x1b[2J"), member(at={124: b"-0000000001\0"}), member(at={124: b"+0000000001\0"}), member(at={124: b"0000000_001\0"}),
    member(at={124: b"0o000000001\0"}), member(at={124: b"\xff" * 12}), member(at={124: b"\x80" + b"\xff" * 11}), member(at={124: b"00000000009\0"}), member(at={136: b"-0000000005\0"}),
    member(at={136: b"\x80" + b"\x7f" * 11}), member(at={100: b"-000644\0"}), member(at={100: b"0000888\0"}),
    member(name=b"./" + b"n" * 2000), member(name=b"./" + b"n" * 5000))
HOSTILE += [("lane", ("get",), order) for order in (
    b"G 1 0 -1 r.txt/\n", b"G 1 999999999999999 1 r.txt/\n", b"G 1 0 8 r.txt/\n", b"G 1 0 1 secret.txt/\n", b"G 1 0 1 ../ini/\n", b"G 1 0 1 nothing/\n", b"A 1 0 9999999 -/\n",
    b"A 1 0 13 -/\n./secret.txt\n", b"A 1 0 5 -/\n./\0\n\n", b"S 1 0 13 -/\n./secret.txt\n", b"S 1 0 1 -/\n\n", b"K 1 0 8 -/\n./r.txt\n", b"E 1 0 0 -/\n", b"C 1 0 1 r.txt/\nx",
    b"Z 1 0 1,1 r.txt/\nx", b"T 0 0 1024 -/\n", b"M 1 1 1:644 r.txt/\n", b"L 1 0 1 -/\n")]


def test_hostile_requests_are_refused_each_with_one_line_and_change_nothing(lab, tmp_path):
    far, wrong = Real(lab, tmp_path, "[outbound]\ndeny_names = secret*\n"), []
    try:
        put, got = far.fresh(), far.ended()
        far.put(put, b"a", b"1")
        listed = far.ask("lane", got, "get", data=b"L 1 0 0 -/\n")[1]
        before = contents(far, put), contents(far, got), sorted(os.listdir(far.dir)), sorted(os.listdir(far.base))
        ask = lambda one: far.raw(*one[1:]) if one[0] == "raw" else far.ask(one[0], got if one[1] == ("get",) else put, *one[1], data=one[2])
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, HOSTILE))
        for (verb, words, data), (code, out, err) in zip(HOSTILE, answers):
            if code != 77 or not re.match(rb"refused by the guard: [^\n]{5,300}\n\Z", err) or re.search(b"SECRET|ok 1", out):
                wrong.append((verb, str(words)[:60], data[:60], code, out[:80], err[-300:]))
        assert b"secret" not in listed and len(HOSTILE) > 100
        assert not wrong, "\n".join(map(repr, wrong))
        f = {path: text for path, text in contents(far, put).items() if not path.endswith("/f")}
        assert (f, contents(far, got), sorted(os.listdir(far.dir)), sorted(os.listdir(far.base))) == before
    finally:
        far.close()


def test_directories_without_end_and_very_many_refused_results_hinder_nothing(tmp_path):
    far = Far(tmp_path, "[outbound]\ndeny_names = secret*\n")
    ident = far.ended("work.sh deep")
    assert far.get(ident, b"r.txt") == b"result" and far.ask("clean", ident)[1].endswith(b"E cleaned\n")
    assert not os.path.exists(far.path("base", ident))               # (else pytest, too, cannot remove it)
    assert far.get(far.ended("work.sh many"), b"r.txt") == b"result"
    text = open(far.path("base", ".mi", "guard.log"), encoding="utf-8").read()
    assert text.count("refused=secret") <= 1001 and "more=101" in text.splitlines()[-2] + text.splitlines()[-3] + text.splitlines()[-4]


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
    assert " refused guarded rm -rf x" in run(lab, tmp_path, "list")[1]


def test_large_and_many_files_streams_and_lost_lines_pass_the_guard(lab, tmp_path):
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


def test_inputs_go_on_through_the_guard_when_the_line_was_lost(lab, tmp_path):
    shutil.copy(lab.path("ini"), str(tmp_path / "mi_distributed_computing_assist.ini"))
    (tmp_path / "a").write_bytes(os.urandom(64 << 20))             # four pieces
    one = Stepwise(lab, tmp_path, ["piece 2"], "run", "guarded", "work.sh abc", "--in", "a", "--streams", "2")
    one.reached("piece 2")
    lab.cut()
    one.go("piece 2")
    code, out = one.finish()
    assert code == 3 and int(re.search(r"4 inputs files=1 bytes=(\d+)", out).group(1)) <= 32 << 20, out
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("round", range(3))
def test_of_two_at_once_one_starts_it_nothing_comes_in_beside_it_and_a_clean_takes_all_or_nothing(tmp_path, round):
    far = Far(tmp_path)
    ident = far.fresh()
    far.put(ident, b"a", b"1" * 10000)
    orders = b"".join(b"C %d 0 10000 a/\n" % (n + 1) + b"%d" % (n % 10) * 10000 for n in range(200))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        puts = [pool.submit(far.ask, "lane", ident, "put", data=orders) for _n in range(2)]
        runs = [pool.submit(far.run, ident) for _n in range(2)]
        cleans = [pool.submit(far.ask, "clean", ident) for _n in range(2 * round)]
    ends = [one.result()[1].splitlines()[-1] for one in runs + cleans]
    if b"E cleaned" in ends:
        assert not os.path.exists(far.path("base", ident)) and os.listdir(far.path("base", ".mi", ident)) == [], ends
    else:
        a, b = (open(far.path("base", ident, name), "rb").read() for name in "ab")
        assert a == b and len(set(a)) == 1 and ends[:2] == [b"E ended 0"] * 2, (ends, len(set(a)))
    assert all(one.result()[0] in (0, 77) for one in puts + runs + cleans), [one.result() for one in puts + cleans]
    assert not [name for name in os.listdir(far.path("base", ".mi")) if name.startswith(".new")]


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


def test_a_guard_has_no_rsync_and_what_is_here_in_an_older_form_comes_whole(lab, tmp_path):
    lab.write("guard/mi_distributed_computing_assist.ini", open(lab.path("guard", "mi_distributed_computing_assist.ini")).read()
              + "[command same]\nargv = /bin/cp\n  state\n  state.bin\nmatch = same\n")
    data = os.urandom(12 << 20)
    (tmp_path / "state").write_bytes(data)
    (tmp_path / "state.bin").write_bytes(data[:-50] + b"y" * 50)
    code, out = run(lab, tmp_path, "run", "guarded", "same", "--in", "state", "-v")
    assert code == 0 and (tmp_path / "state.bin").read_bytes() == data and " rsync=0 zstd=0 " in out, out
    assert re.search("8 fetch files=[23] bytes=%d" % len(data), out), out


def test_check_looks_at_the_host_as_it_is_with_and_without_the_guard(lab, tmp_path):
    for host, guard in (("guarded", "guard there"), ("hpc", "no guard there: this key may run anything")):
        code, out = run(lab, tmp_path, "check", host)
        levels = {row[6:].rstrip(): row[:5].strip() for row in out.splitlines()}
        assert code == 0 and set(levels.values()) == {"OK"}, out
        assert guard in levels and re.search(r"OK    log-in in [0-9.]+ s, round trip [0-9.]+ ms\n", out)
        assert re.search(r"GNU tools there: yes, rsync: %s, zstd: (yes|no), sums by \w+, AES: (yes|no)\n" % ("no" if host == "guarded" else "yes"), out)
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
