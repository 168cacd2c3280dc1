"""What comes back, and what is said of the rest: the table of world_of_files.py, through the doors, cell by cell.

Many kinds share one calculation: those that must end with 0 in one, the others in a second one. With --long each has its own, too."""
import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import stat
import subprocess
import threading
import time

import pytest

import fake_relay
import ssh_lab
import suite
import world_of_files as world_of
from suite import PYTHON, wait_until
from world_of_files import KINDS

ROOT = os.geteuid() == 0
PLAIN = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if ROOT else []      # what mode 000 keeps from an ordinary user it keeps from this one
UMASK = 0o027
OUTBOUND = {"none": {}, "rules": world_of.RULES, "few": {"max_files": 10}, "little": {"max_total": "2M"}}       # of the sites
Seen = collections.namedtuple("Seen", "code text told files top before after")
Entry = collections.namedtuple("Entry", "mode size mtime blocks data")

# What is still expected to fail, by door: {(asked, rules): kinds}. Strict with --long: a cell that holds must be taken off.
EXPECTED_TO_FAIL = {"webapi": {}, "far": {}, "guard": {}, "plain": {}}
INPUTS_EXPECTED_TO_FAIL = {"webapi": {}, "far": {}, "guard": {}, "plain": {}}


def columns(door):
    """(asked, rules) of a door's table. Over ssh everything is asked for, always."""
    over_ssh = {"far": ["none"], "guard": ["none", "rules"], "plain": ["none"]}
    return [("directory", rules) for rules in over_ssh[door]] if door in over_ssh else [
        (asked, rules) for asked in ("name", "pattern", "directory") for rules in ("none", "rules", "cancel")]


def snapshot(top):
    """{path below top (str): Entry} of all that is there; a link's data are those of what it leads to (None: of nothing that can be read)."""
    found = {}
    for folder, folders, names in os.walk(os.fsencode(top)):
        for name in folders + names:
            path = os.path.join(folder, name)
            try:
                info = os.lstat(path)
            except FileNotFoundError:                  # of one that is replaced again and again
                continue
            try:
                data = read(path) if stat.S_ISREG(os.stat(path).st_mode) else None
            except OSError:
                data = None
            if stat.S_ISLNK(info.st_mode) and data is not None:
                info = os.stat(path)
            found[os.fsdecode(path[len(os.fsencode(top)) + 1:])] = Entry(info.st_mode, info.st_size, int(info.st_mtime // 1), info.st_blocks, data)
    return found


def read(path):
    with open(path, "rb") as source:
        return source.read()


class Door:
    """A way to the external computer. run(near, spec, asked, kinds, rules): (process, cancel function); told(text): what its JSON says."""

    def __init__(self, folder):
        self.folder, self.number, self.through = str(folder), 0, {}      # through: {(top, path): Entry} of what links of directories lead to
        self.outside = os.path.join(self.folder, "outside")
        os.mkdir(self.outside)
        self.plain = os.path.join(self.folder, "plain-python")
        with open(self.plain, "w") as out:
            out.write('#!/bin/sh\nexec %s "$@"\n' % " ".join(shlex.quote(word) for word in PLAIN + [PYTHON]))
        os.chmod(self.plain, 0o755)

    def near(self, kinds, make, seconds=0):
        """A new directory of this side, with the inputs of these kinds, and the spec of a command that makes `make`: (its path, the spec)."""
        self.number += 1
        near = os.path.join(self.folder, "near-%d" % self.number)
        os.makedirs(os.path.join(near, "w"))
        spec = {"kinds": list(make), "outside": self.outside, "made": near + ".made", "go": near + ".go", "sleep": seconds}
        with open(os.path.join(near, "spec.json"), "w") as out:
            json.dump(spec, out)
        for name in kinds:
            for word, data in KINDS[name].inputs.items():
                os.makedirs(os.path.join(near, "w", name), exist_ok=True)
                with open(os.path.join(near, "w", name, word), "wb") as out:
                    out.write(data)
        return near, spec

    def privileged(self, kinds, top):
        """What only root can do to these kinds below top/w."""
        for name in kinds:
            if KINDS[name].root and ROOT:
                KINDS[name].root(os.path.join(top, "w", name))

    def send(self, kinds, asked, rules):
        """One calculation with these kinds as inputs, which its command does not touch: Seen, where before is what was sent and after what
        came. code: None while it is not over, top: None if nothing was registered."""
        near, spec = self.near((), ())
        make = dict(spec, kinds=kinds, made=near + ".sent")
        with open(near + ".spec", "w") as out:
            json.dump(make, out)
        open(spec["go"], "w").close()
        subprocess.check_call([self.plain, os.path.join(suite.HERE, "world_of_files.py"), near + ".spec"], cwd=near)
        self.privileged(kinds, near)
        os.unlink(spec["go"])
        process = self.start(near, ("spec.json",), kinds, rules, ["w/"] if asked == "directory" else [
            "w/%s/%s" % (name, word) for name in kinds for word in world_of.as_input(KINDS[name], "name")[1]])[0]
        wait_until(lambda: os.path.exists(spec["made"]) or process.poll() is not None, 60)
        top = read(spec["made"]).decode() if os.path.exists(spec["made"]) else None
        after = snapshot(top) if top else None
        open(spec["go"], "w").close()
        text = process.communicate(timeout=60)[0].decode("utf-8", "backslashreplace")
        return Seen(process.returncode, text, {}, {}, near, snapshot(near), after)

    def calculate(self, kinds, asked, rules, more=()):
        """One calculation with these kinds: Seen. asked: or the words of --out themselves; more: other options."""
        near, spec = self.near(kinds if any(KINDS[name].inputs for name in kinds) else (), kinds, 60 if rules == "cancel" else 0)
        process, cancel = self.start(near, asked, kinds, rules, more=more)
        wait_until(lambda: os.path.exists(spec["made"]) or process.poll() is not None, 60)
        assert os.path.exists(spec["made"]), process.communicate()
        top = read(spec["made"]).decode()
        self.privileged(kinds, top)
        before = snapshot(top)
        for path in ["w/%s/%s" % (name, path) for name in kinds for path in world_of.expected(KINDS[name], asked if isinstance(asked, str) else "name", rules, self.name)]:
            self.through[top, path] = through_links(top, path) if path not in before else None
        for folder, folders, names in itertools.chain.from_iterable(os.walk(os.path.join(top, "w", name), followlinks=True) for name in kinds if KINDS[name].more):
            inside = os.path.relpath(folder, top)
            folders[:] = folders if inside.count("/") < 3 else []
            self.through.update(((top, inside + "/" + name), through_links(top, inside + "/" + name)) for name in names)
        open(spec["go"], "w").close()
        if rules == "cancel":
            cancel()
        out = process.communicate(timeout=60)[0].decode("utf-8", "backslashreplace")
        self.settle(process, top)
        rows = [json.loads(row) for row in out.splitlines() if row.startswith("{")]
        text = "\n".join(row for row in out.splitlines() if not row.startswith("{"))
        return Seen(process.returncode, text, self.told(rows[-1] if rows else {}), snapshot(os.path.join(near, "out")), top, before,
                    snapshot(top) if os.path.isdir(top) else None)

    def settle(self, process, top):
        """Waits for what goes on there after the end."""

    def told(self, found):
        """{code: (count, [names])} of the result as JSON."""
        told = {code: (entry["count"], list(entry["names"])) for code, entry in (found.get("verdicts") or {}).items()}
        named = {name for count, names in told.values() for name in names}
        absent = [name for name in found.get("missing") or {} if name not in named]
        if absent:
            count, names = told.get("missing", (0, []))
            told["missing"] = count + len(absent), names + absent
        return told

    def popen(self, words, near, env):
        return subprocess.Popen(words, cwd=near, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                preexec_fn=lambda: os.umask(UMASK))

    def close(self):
        for pid in (name for name in os.listdir("/proc") if name.isdigit()):       # what the commands left behind
            try:
                with open("/proc/%s/environ" % pid, "rb") as text:
                    if b"MI_OUTSIDE=" + os.fsencode(self.outside) in text.read():
                        os.kill(int(pid), signal.SIGKILL)
            except OSError:
                pass


class WebApi(Door):
    """Workflow side, relay, and a poller for each column of rules."""

    name, exact = "webapi", True

    def __init__(self, folder):
        Door.__init__(self, folder)
        self.world = suite.World(os.path.join(self.folder, "world"), tls=False, commands=["make"], sites=sorted(OUTBOUND)).start()
        self.reach = self.world.reach()
        for site in self.world.sites:
            place = os.path.join(self.folder, site)
            os.mkdir(place)
            ini = os.path.join(place, "poller.ini")
            with open(ini, "w") as out:
                out.write("[poller]\nsite = %s\nurl = %s\ntoken_file = %s\ncalc_base = %s/base\njobs = 4\n[command make]\nmatch = make\ngrace = 1s\nargv = %s\n" % (
                    site, self.world.url, self.world.token_file(name=site + ".token"), place,
                    "\n  ".join([PYTHON, os.path.join(suite.HERE, "world_of_files.py"), "spec.json"])) + "[outbound]\n" + "".join("%s = %s\n" % pair for pair in OUTBOUND[site].items()))
            self.world.pollers.append(suite.Process("mi_system_remote.py", ["poll", "--ini", ini], place, python=self.plain))

    def start(self, near, asked, kinds, rules, inputs=("w/",), more=()):
        wanted = {"pattern": ["w/**"], "directory": ["w/"], "name": [
            "w/%s/%s" % (name, word) for name in kinds for word in world_of.expected(KINDS[name], "name", rules)]}.get(asked, asked)
        words = [self.plain, "-I", "-S", suite.script("mi_system_wf.py"), "run", rules if rules in OUTBOUND else "none", "make", "--to", "out", "--in", "spec.json"]
        words += ["--in=" + word for word in inputs] + ["--out=" + word for word in wanted] + ["--request-id", os.path.basename(near), "--json"] + list(more) + self.reach

        def cancel():
            row, = self.world.rows("SELECT accept_id FROM calculations WHERE request_id = ?", os.path.basename(near))
            self.world.client().ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": row["accept_id"], "stop": True, "reason": "test"})

        return self.popen([os.fsencode(word) for word in words], near, suite.clean_env()), cancel

    def left(self, seen, outcomes):
        """What is wrong with what is left there."""
        return "the working directory is gone" if seen.after is None else ""

    def close(self):
        Door.close(self)
        self.world.close()


class Far(Door):
    """The SSH runner over a private sshd, to an account where mode 000 counts, and where its key may do anything."""

    name, exact, host = "far", False, "hpc"            # inputs keep their modes, as far as the umask there lets them

    def __init__(self, folder):
        Door.__init__(self, folder)
        self.labs = {rules: self.lab(rules) for asked, rules in columns(self.name)}

    def lab(self, rules):
        """A lab of its own for each column of rules."""
        lab = ssh_lab.Lab()
        lab.forced(" ".join(PLAIN + ["sh", "-c", '"$SSH_ORIGINAL_COMMAND"']))
        return lab

    def start(self, near, asked, kinds, rules, inputs=("w/",), more=()):
        lab = self.labs[rules]
        words = [self.plain, ssh_lab.SCRIPT, "run", self.host, self.command(), "--ini", lab.path("ini"), "--to", "out", "--json", "--in", "spec.json"]
        return self.popen(words + ["--in=" + word for word in inputs] + ["--streams", "1"] + list(more), near, lab.env()), None

    def command(self):
        return " ".join([PYTHON, os.path.join(suite.HERE, "world_of_files.py"), "spec.json"])

    def settle(self, process, top):
        count = lambda: sum(len(folders) + len(names) for above, folders, names in os.walk(top))
        began, before = time.monotonic(), count()
        while process.returncode == 0 and os.path.isdir(top) and time.monotonic() < began + (20 if count() < before else 1):
            time.sleep(0.02)                           # it is removed, file by file

    def left(self, seen, outcomes):
        if any("changing" in outcome for outcome in outcomes):
            return ""
        codes = {word.rstrip("#") for outcome in outcomes for word in outcome.split("|")} - {"=", "-"}
        if codes & set(world_of.COUNTS) and seen.after is None:
            return "it is removed there"
        return "it is still there, though all has arrived" if not codes and seen.after is not None else ""

    def close(self):
        Door.close(self)
        for lab in self.labs.values():
            lab.close()


class Guard(Far):
    """The same through the guard of the key, with the rules of each column."""

    name, host = "guard", "guarded"

    def lab(self, rules):
        lab = ssh_lab.Lab()
        lab.guard("[command make]\nmatch = make\nargv = %s\n[outbound]\n" % "\n  ".join([PYTHON, os.path.join(suite.HERE, "world_of_files.py"), "spec.json"])
                  + "".join("%s = %s\n" % pair for pair in OUTBOUND[rules].items()))
        lab.keys[1] = lab.keys[1].replace('command="', 'command="%s ' % " ".join(PLAIN))
        lab.authorize()
        return lab.start()

    def command(self):
        return "make"


class PlainWay(Far):
    """The same where no python3 is found: rsync alone."""

    name = "plain"

    def lab(self, rules):
        lab = ssh_lab.Lab()
        lab.write("none", "#!/bin/sh\nexit 127\n")
        os.chmod(lab.path("none"), 0o755)
        inside = 'mount --bind %s /usr/bin/python3; export PATH=/usr/bin:/bin; exec %s sh -c "$SSH_ORIGINAL_COMMAND"' % (lab.path("none"), " ".join(PLAIN))
        lab.write("bare", "#!/bin/sh\nexec unshare %s sh -c '%s'\n" % ("-m" if ROOT else "-rm", inside))
        os.chmod(lab.path("bare"), 0o755)
        return lab.forced(lab.path("bare"))

    def left(self, seen, outcomes):
        return "" if seen.after is not None else "it is removed there"


DOORS = {"webapi": WebApi, "far": Far, "guard": Guard, "plain": PlainWay}


def groups(name, asked, rules):
    """The kinds of a column as calculations: [kinds that must end with 0], [others], [those that disturb others]; without those
    that are expected to fail."""
    usable = [one for one in KINDS.values() if ROOT or not one.root]
    listed = EXPECTED_TO_FAIL[name].get((asked, rules), ())
    bad = {one.name for one in usable if world_of.fails(world_of.expected(one, asked, rules, name).values(), asked)}
    shared = [one.name for one in usable if not one.alone and one.name not in listed]
    return [group for group in ([one for one in shared if one not in bad], [one for one in shared if one in bad],
                                [one.name for one in usable if one.alone and one.name not in listed]) if group]


def plain(name):
    """Is it a name that is printed as it is?"""
    try:
        return name.isprintable() and "\\" not in name and len(name.encode("utf-8")) < 960       # a verdict's names are bounded
    except UnicodeEncodeError:
        return False


def fits(kind, name, outcome, arrived, told, truth):
    """'' or what is wrong with one name of a kind. Takes what explains it out of arrived and told."""
    choices = outcome.split("|")
    if name in arrived:
        entry = arrived.pop(name)
        if "=" not in choices:
            return "arrived"
        return "" if name.endswith("/") else same(kind, name, entry, truth)
    for code in choices:
        code = code.rstrip("#")
        names = told.get(code, [])
        hit = name.rstrip("/") if name.rstrip("/") in names else names[0] if names and not plain(name) else None
        if hit is not None:
            names.remove(hit)
            return ""
    if "-" in choices or outcome.endswith("#"):
        return ""                                      # the count is looked at for all together
    return "neither arrived nor told"


def same(kind, name, entry, truth, umask=UMASK, exact=True):
    """'' or in what an arrived file differs from the one there. exact: its mode is what the umask leaves of 0777 or 0666, no less."""
    if name in kind.checks:
        return "" if kind.checks[name](entry.data) else "other bytes: %r..." % entry.data[:60]
    if truth is None or entry.data != truth.data:
        return "other bytes: %r..." % (entry.data or b"")[:60]
    mode, found = (0o777 if truth.mode & 0o100 else 0o666) & ~umask, stat.S_IMODE(entry.mode)
    if found & ~mode or (found ^ mode) & 0o100 or exact and found != mode or not stat.S_ISREG(entry.mode):
        return "mode %o, not %o" % (entry.mode, mode)
    if 0 <= truth.mtime < 1 << 33 and entry.mtime != truth.mtime:
        return "time %d, not %d" % (entry.mtime, truth.mtime)
    if truth.blocks * 512 * 4 < truth.size and entry.blocks * 512 * 2 > entry.size:
        return "not sparse"
    return ""


def of_kind(found, name):
    """{path below w/KIND: Entry} of files, links and empty directories."""
    top = "w/%s/" % name
    mine = {path[len(top):]: entry for path, entry in found.items() if path.startswith(top)}
    inner = {os.path.dirname(path) for path in mine}
    return {path + ("/" if stat.S_ISDIR(entry.mode) else ""): entry for path, entry in mine.items() if not stat.S_ISDIR(entry.mode) or path not in inner}


def judge(door, seen, kinds, asked, rules):
    """{kind: what is wrong} of one calculation; `all`: of what is said as a whole."""
    wrong, told, outcomes = {}, collections.defaultdict(dict), []
    for code, (count, names) in seen.told.items():
        for name in names:
            told[name.split("/")[1] if name.count("/") > 1 or name.startswith("w/") else name].setdefault(code, []).append(name.split("/", 2)[-1].rstrip("/"))
    for name in kinds:
        kind, problems = KINDS[name], []
        want, arrived = world_of.expected(kind, asked, rules, door.name), of_kind(seen.files, name)
        truth = of_kind(seen.before, name)
        if asked == "name":
            arrived = {path: entry for path, entry in arrived.items() if not path.endswith("/")}
        for path, outcome in want.items():
            real = seen.before.get("w/%s/%s" % (name, path)) or door.through.get((seen.top, "w/%s/%s" % (name, path)))
            problem = fits(kind, path, outcome, arrived, told[name], real)
            problems += [(path[-60:], problem)] if problem else []
        outcomes += want.values()
        for path in [path for path in arrived if kind.more and re.match(kind.more + r"\Z", path)]:
            problem = same(kind, path, arrived.pop(path), door.through.get((seen.top, "w/%s/%s" % (name, path))))
            problems += [(path, problem)] if problem else []
        for names in told[name].values():
            names[:] = [path for path in names if not kind.more or not re.match(kind.more + r"\Z", path)]
        problems += [(path[-60:], "arrived, not asked for") for path in arrived if not path.endswith("/")]
        problems += [(names, "told as " + code) for code, names in told[name].items() if names]
        if kind.left and seen.after is not None:
            after = of_kind(seen.after, name)
            problems += [(path[-60:], "not left there as it was") for path in truth if truth[path] != after.get(path)]
        if problems:
            wrong[name] = problems[:5]
    problems = whole(door, seen, outcomes, asked, rules)
    if problems:
        wrong["all"] = problems
    return wrong


def through_links(top, path):
    """The Entry of a path that leads through linked directories; None if there is none."""
    full = os.path.join(top, path)
    try:
        info = os.stat(full)
        return Entry(info.st_mode, info.st_size, int(info.st_mtime // 1), info.st_blocks, read(full) if stat.S_ISREG(info.st_mode) else None)
    except OSError:
        return None


def says(text, word):
    """Does a verdict's code stand in the text, not as a part of a name?"""
    return re.search(r"(?<![-\w/])%s(?![-\w/])" % word, text)


def whole(door, seen, outcomes, asked, rules):
    """What is wrong with the exit code, the words and the counts of a calculation with these outcomes."""
    problems = []
    code = 143 if rules == "cancel" else 65 if world_of.fails(outcomes, asked) else 0
    open_ended = any("changing" in outcome for outcome in outcomes)
    if seen.code != code and not (open_ended and seen.code in (0, 65)):
        problems.append("exit code %d, not %d: %s" % (seen.code, code, seen.text[-600:]))
    if seen.code == 0 and set(seen.told) & set(world_of.COUNTS):
        problems.append("0 in spite of %s" % sorted(seen.told))
    problems += ["%s is not said: %s" % (word, seen.text[-600:]) for word in seen.told if not says(seen.text, word) and word != "missing"]
    unnamed = sum(outcome.endswith("#") for outcome in outcomes)
    counts = sum(count - len(names) for count, names in seen.told.values() if count <= 100)          # no more are named
    if counts != unnamed and rules != "cancel":
        problems.append("%d are counted without a name, not %d" % (counts, unnamed))
    problems += [text for text in [door.left(seen, outcomes)] if text]
    return problems


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    """A function that makes a door, once."""
    made = {}

    def door(name):
        if name not in made:
            made[name] = DOORS[name](tmp_path_factory.mktemp(name))
        return made[name]

    yield door
    for one in made.values():
        one.close()


def judged(door, calculations, asked, rules):
    """{kind: what is wrong} of these calculations, some at a time."""
    wrong = {}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for kinds, seen in [(kinds, pool.submit(door.calculate, kinds, asked, rules)) for kinds in calculations]:
            found = judge(door, seen.result(), kinds, asked, rules)
            for kind, problems in found.items():
                wrong.setdefault(kinds[0] if kind == "all" and len(kinds) == 1 else kind, []).extend(problems)
    return wrong


def as_expected(wrong, listed):
    """True if this is wrong and nothing else; AssertionError with all that is wrong."""
    assert set(wrong) == set(listed), "\n".join("%s: %s" % pair for pair in sorted(wrong.items()))
    return True


@pytest.mark.parametrize("name, asked, rules", [(name,) + column for name in DOORS for column in columns(name)])
def test_what_was_asked_for_comes_back_or_is_said_to_be_missing(doors, request, name, asked, rules):
    listed = EXPECTED_TO_FAIL[name].get((asked, rules), ())
    if request.config.getoption("--long"):
        calculations = [[one.name] for one in KINDS.values() if ROOT or not one.root]
        assert as_expected(judged(doors(name), calculations, asked, rules), [kind for kind in listed if ROOT or not KINDS[kind].root])
    else:
        assert as_expected(judged(doors(name), groups(name, asked, rules), asked, rules), ())


@pytest.mark.parametrize("asked", ["name", "directory"])
def test_each_kind_that_is_not_complete_makes_a_success_65_by_itself(doors, asked):
    fails = lambda one, asked: world_of.fails(world_of.expected(one, asked, "rules").values(), asked)
    calculations = [[one.name] for one in KINDS.values() if not one.alone and (ROOT or not one.root) and fails(one, asked)
                    and not (asked == "name" and fails(one, "directory"))]
    assert len(calculations) >= 10 and as_expected(judged(doors("webapi"), calculations, asked, "rules"), ())


def arrived(seen, kinds):
    """{path: Entry} of what came of these kinds, all of it with the bytes that are there."""
    found = {path: entry for path, entry in seen.files.items() if path.startswith("w/") and not stat.S_ISDIR(entry.mode)}
    assert all(entry.data == seen.before[path].data for path, entry in found.items()) and set(os.path.dirname(path).split("/")[1] for path in found) <= set(kinds)
    return found


@pytest.mark.parametrize("site, most_files, most_bytes", [("few", 10, 1 << 30), ("little", 1000, 2 << 20)])
def test_more_than_may_leave_is_said_and_what_fits_arrives(doors, site, most_files, most_bytes):
    kinds = ["sizes-around-a-mib", "many-small-ones"]
    seen = doors("webapi").calculate(kinds, "directory", site)
    found = arrived(seen, kinds)
    assert seen.code == 65 and says(seen.text, "limit"), seen.text
    assert len(found) + seen.told["limit"][0] == 304 and set(seen.told) == {"limit"}, (len(found), seen.told)
    assert most_files >= len(found) >= 2 and sum(entry.size for entry in found.values()) <= most_bytes


def test_a_log_of_the_commands_own_is_not_taken_for_the_log(doors):
    seen = doors("webapi").calculate(["logs-of-its-own-at-the-top"], ("*.txt",), "none")
    assert seen.code == 65 and seen.told["name"][0] == 1 and seen.files[suite.LOGS[0]].data == b"", (seen.text, seen.told)


def test_what_the_owner_refuses_can_be_agreed_to_and_is_told_all_the_same(doors):
    seen = doors("webapi").calculate(["denied-names", "a-link-to-a-denied-file", "plain"], "directory", "rules", ["--allow-refused"])
    assert seen.code == 0 and seen.told["refused"][0] == 8 and says(seen.text, "refused"), (seen.text, seen.told)
    assert set(path.split("/", 2)[2] for path in arrived(seen, ["denied-names", "plain"])) == {"notsecret", "a.txt", "b.bin", "sub/c"}
    assert not any(word in seen.text + str(seen.told) for word in world_of.DENIED)


def test_the_fielded_words_say_what_is_missing_and_keep_their_exit_code(doors):
    door = doors("webapi")
    near, spec = door.near((), ["plain", "unreadable-files"])
    open(spec["go"], "w").close()
    words = [door.plain, suite.script("mi_system_wf.py"), door.world.url, "none", door.world.token, "make", "spec.json",
             "w/plain/a.txt:w/unreadable-files/x"]
    process = door.popen(words, near, suite.clean_env())
    text = process.communicate(timeout=60)[0].decode("utf-8", "backslashreplace")
    assert process.returncode == 0 and says(text, "unreadable") and "w/unreadable-files/x" in text, text
    assert read(os.path.join(near, "w", "plain", "a.txt")) == b"content of a.txt\n"


def sent(door, seen, kinds, asked):
    """{kind: what is wrong} with what came of these kinds as inputs."""
    wrong = {}
    if seen.code or seen.after is None:
        return {"all": "%s: %s" % (seen.code, seen.text[-800:])}
    for name in kinds:
        arrived, problems = of_kind(seen.after, name), []
        for path, outcome in world_of.as_input(KINDS[name], asked)[1].items():
            real = seen.before.get("w/%s/%s" % (name, path)) or through_links(seen.top, "w/%s/%s" % (name, path))
            entry = arrived.pop(path, None)
            if entry is None and "-" not in outcome:
                problems.append((path[-60:], "did not arrive"))
            elif entry is not None and not path.endswith("/"):
                problem = same(KINDS[name], path, entry, real, 0o022, door.exact)
                problems += [(path[-60:], problem)] if problem else []
        problems += [(path[-60:], "arrived, not sent") for path in arrived if asked == "name" or not path.endswith("/")]
        if problems:
            wrong[name] = problems[:5]
    return wrong


@pytest.mark.parametrize("name, asked, rules", [("webapi", "name", "none"), ("webapi", "directory", "none"), ("webapi", "directory", "rules"),
                                                ("far", "directory", "none"), ("guard", "directory", "rules"), ("plain", "directory", "none")])
def test_what_is_sent_arrives_as_it_is(doors, name, asked, rules):
    kinds = [one.name for one in KINDS.values() if world_of.as_input(one, asked)[0] == () and (ROOT or not one.root)]
    listed = INPUTS_EXPECTED_TO_FAIL[name].get((asked, rules), ())
    assert len(kinds) >= 30
    wrong = sent(doors(name), doors(name).send(kinds, asked, rules), kinds, asked)
    assert as_expected(wrong, listed)


@pytest.mark.parametrize("asked", ["name", "directory"])
def test_what_cannot_be_sent_is_named_before_anything_is_registered(doors, asked):
    door, wrong = doors("webapi"), {}
    kinds = [one.name for one in KINDS.values() if world_of.as_input(one, asked)[0] and (ROOT or not one.root)]
    before = door.world.rows("SELECT count(*) AS n FROM calculations")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for kind, seen in [(kind, pool.submit(door.send, [kind], asked, "none")) for kind in kinds]:
            seen = seen.result()
            if seen.code not in world_of.as_input(KINDS[kind], asked)[0] or "w/" + kind not in seen.text or "Traceback" in seen.text:
                wrong[kind] = seen.code, seen.text[-500:]
    assert len(kinds) >= 2 and as_expected(wrong, ())
    assert door.world.rows("SELECT count(*) AS n FROM calculations") == before


# ---- bytes that were not judged

class Swapping:
    """A fake relay before a poller, and a writer that gives the results other bytes at every moment that it can choose, and at random ones.

    way: how the writer does it. letter: what a version consists of; upper case ones are versions whose sums the owner denies."""

    NAMES = {"f%02d" % n: (10, 700, 65536, 70001, 1200000)[n % 5] for n in range(20)}

    def __init__(self, folder, way, count):
        self.folder, self.way, self.random, self.top, self.stop = str(folder), way, random.Random(way), "", False
        self.fake = fake_relay.Fake(misbehave=self.happens)
        self.fake.max_body = 65536
        self.fake.orders = [{"accept_id": "01234567-0123-0123-0123-%012d" % n, "claim": "1.abc", "attempt": 1, "lease": 300, "inputs": {"files": {}, "next": None},
                             "calc-info": {"command": "make", "remote-site": "s", "parameters": "", "result_files": {}, "result_patterns": ["*"]}} for n in range(count)]
        self.sums = {hashlib.sha256(letter * size).hexdigest(): letter for letter in (b"a", b"b", b"S") for size in self.NAMES.values()}
        ini = os.path.join(self.folder, "poller.ini")
        with open(os.path.join(self.folder, "token"), "w") as out:
            out.write("t" * 64 + "\n")
        os.chmod(out.name, 0o600)
        with open(ini, "w") as out:
            out.write("[poller]\nsite = s\nurl = %s\ntoken_file = %s/token\ncalc_base = %s/base\n[command make]\nmatch = make\nargv = /bin/true\n[outbound]\ndeny_sums =\n" % (
                self.fake.url, self.folder, self.folder) + "".join("  %s\n" % sum256 for sum256, letter in self.sums.items() if letter == b"S"))
        self.thread = threading.Thread(target=self.write_on, daemon=True)
        self.poller = suite.Process("mi_system_remote.py", ["poll", "--ini", ini], self.folder)
        self.thread.start()

    def happens(self, request):
        """The relay is asked: what was looked at a moment ago becomes something else before the answer."""
        if request.name == "calc-start":
            self.top = os.path.join(self.folder, "base", self.now())
            for name in self.NAMES:
                self.swap(name, b"a")
        elif self.top and (request.name == "send-results" or "/result" in request.name):
            for name in self.NAMES:
                if self.random.random() < 0.2:
                    self.swap(name)

    def now(self):
        """The calculation that was handed out last."""
        return "01234567-0123-0123-0123-%012d" % (len([name for name in self.fake.names() if name == "calc-start"]) - 1)

    def swap(self, name, letter=None):
        path, data = os.path.join(self.top, name), (letter or self.random.choice((b"a", b"b", b"S"))) * self.NAMES[name]
        try:
            with open(path + ".new" if self.way == "rename" else path, "r+b" if self.way == "in place" and not letter else "wb", 0) as out:
                out.write(data)
            if self.way == "rename":
                os.rename(path + ".new", path)
        except OSError:
            pass                                       # that calculation is over

    def write_on(self):
        while not self.stop:
            if self.top:
                self.swap(self.random.choice(list(self.NAMES)))
            time.sleep(0.002)

    def close(self):
        self.stop = True
        self.thread.join()
        self.poller.stop()
        self.fake.stop()


@pytest.mark.parametrize("way", ["rename", "in place", "truncate"])
def test_no_byte_that_was_not_judged_leaves_while_results_are_swapped(tmp_path, request, way):
    count = 200 if request.config.getoption("--long") else 4
    one = Swapping(tmp_path, way, count)
    try:
        wait_until(lambda: one.fake.ended == count or not one.poller.alive(), 20 * count, "the swapped results do not come to an end")
        assert "Traceback" not in one.poller.text(), one.poller.text()
        assert one.fake.unjudged == [] and len(one.fake.pieces) > 5 * count
        for (name, told), offset, data in one.fake.pieces if way == "rename" else ():
            letter = one.sums.get(told["sha256"], b"?") if name in one.NAMES else data[:1]
            assert data == letter * len(data) and letter != b"S", (name, offset, data[:40], letter)
    finally:
        one.close()
