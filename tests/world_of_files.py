"""The kinds of things that lie in results directories and among inputs: how each is made, and what must become of it. Data, for every door.

As a program it is the command of such a calculation: world_of_files.py SPEC makes the kinds that SPEC (JSON) names, below w/ in the current
directory, says so, and ends when it is told to. Standard library, Python 3.6.

A kind's `files` say what comes of it when its directory (or a pattern) was asked for: {name below w/KIND: outcome}. An outcome is one of
    =            arrives byte for byte, executable or not, with its time
    CODE         does not arrive; this verdict says so, with the name
    CODE#        does not arrive; the verdict counts it and does not tell the name
    A|B          one of these (where the design leaves it open); `-`: nothing is said
by_name, rules, rules_by_name say what is different when each was asked for by its name, and where the external computer has rules."""
import collections
import json
import os
import socket
import stat
import subprocess
import sys
import time

RULES = {"deny_names": "secret* *.key", "max_file": "6M"}                # of the column with rules
MAX_FILE = 6 << 20
COUNTS = ("refused", "limit", "name", "unreadable", "changing")        # these take the place of 0 also when a pattern or directory was asked for
CODES = COUNTS + ("missing", "outside", "special", "held")
NOBODY = 65534
KINDS = collections.OrderedDict()

UNTOUCHED = {"an-input-untouched": "-", "an-input-touched": "=|-"}
PLAIN = {                      # what rsync alone cannot see, or tells otherwise
    "an-absolute-link-inside": {"l": "outside"}, "an-input-with-a-second-name": {"in": "=|-"},
    "a-directory-that-can-be-listed-only": {"d/": "unreadable", "d/x": "-"}}

Kind = collections.namedtuple("Kind", "name make files by_name rules rules_by_name inputs root checks alone left more")


def kind(files, by_name=None, rules=None, rules_by_name=None, inputs=None, root=None, checks=None, alone=False, left=True, more=None):
    """Enters a kind: the decorated function makes it in the current directory. inputs: {name: bytes} that were sent into it before.
    root: what a privileged process does to it afterwards (function of its directory). checks: {name: function(bytes) -> good?}
    instead of equality. alone: it disturbs others. left: it is there, as it was made, also afterwards. more: a regular expression of names that may
    come as well, with the bytes that they have there, or be told of."""
    def enter(make):
        name = make.__name__.replace("_", "-")
        named = {key: value for key, value in files.items() if not key.endswith("/") and not set(key) & set("*?")}
        mine = named if by_name is None else by_name
        with_rules = dict(files, **(rules or {}))
        names = dict(mine, **(rules_by_name if rules_by_name is not None
                              else {key: value.rstrip("#") for key, value in (rules or {}).items() if key in mine}))
        KINDS[name] = Kind(name, make, files, mine, with_rules, names, inputs or {}, root, checks or {}, alone, left, more)
        return make
    return enter


def all_of(outcome, *names):
    """{name: outcome} of each."""
    return {name: outcome for name in names}


def expected(one, asked, rules, door="webapi"):
    """{name below w/KIND: outcome} of a kind. asked: name, pattern, directory. rules: none, rules, cancel. door: webapi; or one of
    the SSH way, where everything is asked for and inputs that nobody touched are here already."""
    if door != "webapi" and one.name in UNTOUCHED:
        return {"in": UNTOUCHED[one.name]}
    if door == "plain":
        return dict(one.files, **PLAIN.get(one.name, {}))
    if asked == "name":
        return one.rules_by_name if rules == "rules" else one.by_name
    if rules == "cancel":
        return {}                                      # whatever was not declared by name stays at home
    found = one.rules if rules == "rules" else one.files
    # an empty directory is no match of a pattern for files, but may come
    return {name: "=|-" if asked == "pattern" and name.endswith("/") and outcome == "=" else outcome for name, outcome in found.items()}


def fails(outcomes, asked):
    """Does one of these outcomes take the place of exit code 0?"""
    codes = {word.rstrip("#") for outcome in outcomes for word in outcome.split("|")} - {"=", "-"}
    return bool(codes if asked == "name" else codes & set(COUNTS))


# ---- how they are made

def put(name, data=None, mode=None, mtime=None):
    """A file (directories on its way are made); its content is told by its name unless data says it."""
    path = name if isinstance(name, bytes) else os.fsencode(name)
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as out:
        out.write(b"content of " + path + b"\n" if data is None else data)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    if mode is not None:
        os.chmod(path, mode)


def beside(code, *words):
    """A process that the command leaves behind: this Python code, in /, with no descriptor of ours; gone within a minute."""
    text = "import os, sys, time\nuntil = time.time() + 60\n" + code
    subprocess.Popen([sys.executable, "-I", "-S", "-c", text] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL, start_new_session=True, cwd="/")


def wait_for(path):
    """Waits until it is there (60 s at most)."""
    until = time.time() + 60
    while not os.path.exists(path) and time.time() < until:
        time.sleep(0.005)


@kind(all_of("=", "a.txt", "b.bin", "sub/c"))
def plain():
    put("a.txt")
    put("b.bin", bytes(range(256)) * 41)
    put("sub/c")


@kind(all_of("=", "empty", "one", "sub/empty"))
def empty_files():
    put("empty", b"")
    put("one", b"x")
    put("sub/empty", b"")


@kind(all_of("=", "html", "json", "gz", "tar", "crlf", "no-end", "nul"))
def contents_that_look_like_something_else():
    put("html", b"<html><body>502 Bad Gateway</body></html>")
    put("json", b'{"errors": [{"code": 200}]}')
    put("gz", b"\x1f\x8b\x08\x00" + os.urandom(600))
    put("tar", b"x" * 257 + b"ustar\x0000" + bytes(2000))
    put("crlf", b"a\r\nb\r\n")
    put("no-end", b"last line has no end")
    put("nul", bytes(1025))


@kind(all_of("=", "less", "mib", "more", "three"))
def sizes_around_a_mib():
    for name, size in (("less", (1 << 20) - 1), ("mib", 1 << 20), ("more", (1 << 20) + 1), ("three", (3 << 20) + 7)):
        put(name, os.urandom(size))


@kind(all_of("=", "hole", "end", "start"))
def sparse():
    for name, at in (("hole", 2 << 20), ("end", 0), ("start", 4 << 20)):
        with open(name, "wb") as out:
            out.truncate((4 << 20) + 5)
            out.seek(at)
            out.write(b"island")


DEEP = "/".join("d%02d" % n for n in range(60)) + "/leaf"


@kind({DEEP: "="})
def deep():
    put(DEEP)


@kind(all_of("=", "x" * 255, "長" * 85, "d" * 255 + "/" + "y" * 255, "." + "h" * 254))
def parts_of_255_bytes():
    for name in ("x" * 255, "長" * 85, "d" * 255 + "/" + "y" * 255, "." + "h" * 254):
        put(name)


def long_name(length):
    """A name below w/KIND that is `length` bytes long from w/ on, where KIND has 20 letters."""
    rest = length - len("w/") - 20 - 1
    return "/".join(["p" * 199] * (rest // 200) + ["q" * (rest % 200)]) if rest % 200 else "/".join(["p" * 199] * (rest // 200 - 1) + ["p" * 199])


@kind({long_name(1000): "="})
def a_path_of_1000_bytes():
    put(long_name(1000))


@kind(all_of("=", ".bashrc", ".config/x", "...", "..x", ".d/.e"))
def dot_files():
    for name in (".bashrc", ".config/x", "...", "..x", ".d/.e"):
        put(name)


@kind(all_of("=", "run.sh", "only-me", "not"))
def executables():
    put("run.sh", mode=0o755)
    put("only-me", mode=0o700)
    put("not", mode=0o644)


@kind(all_of("=", "setuid", "setgid", "sticky"))
def special_bits():
    put("setuid", mode=0o4755)
    put("setgid", mode=0o2755)
    put("sticky", mode=0o1644)


@kind(all_of("=", "r", "me"))
def read_only_files():
    put("r", mode=0o444)
    put("me", mode=0o400)


@kind(all_of("=", "cache/mod/a", "cache/mod/b"))
def read_only_directories():
    put("cache/mod/a", mode=0o444)
    put("cache/mod/b", mode=0o555)
    os.chmod("cache/mod", 0o555)
    os.chmod("cache", 0o555)


@kind(all_of("=", "zero", "old", "odd", "future"))
def times():
    put("zero", mtime=0)
    put("old", mtime=981173106)
    put("odd", mtime=1000000000.987654321)
    put("future", mtime=4102444800)


@kind(all_of("=", "x"))
def a_time_before_1970():
    put("x", mtime=-86400)


@kind(all_of("=", "a", "b"))
def hard_links():
    put("a")
    os.link("a", "b")


@kind(all_of("=", "restart.1", "s/restart", "s/t/again"), by_name=all_of("=", "restart.1"))
def hard_links_in_other_directories():
    put("restart.1")
    os.makedirs("s/t")
    os.link("restart.1", "s/restart")
    os.link("restart.1", "s/t/again")


@kind(all_of("=", "x", "l", "s/l"))
def links_inside():
    put("x")
    os.symlink("x", "l")
    os.mkdir("s")
    os.symlink("../x", "s/l")


@kind(all_of("=", "x", "l"))
def an_absolute_link_inside():
    put("x")
    os.symlink(os.path.abspath("x"), "l")


@kind(all_of("=", "x", "a", "b", "c"))
def a_chain_of_links():
    put("x")
    os.symlink("x", "a")
    os.symlink("a", "b")
    os.symlink("./b", "c")


@kind(all_of("=", "x", "l"))
def a_link_that_goes_up_and_comes_back():
    put("x")
    os.symlink("../../w/" + os.path.basename(os.getcwd()) + "/x", "l")


@kind(all_of("=", "d/x", "d/e/y", "l/x", "l/e/y"))
def a_link_to_a_directory_inside():
    put("d/x")
    put("d/e/y")
    os.symlink("d", "l")


@kind(all_of("=", "A", "a", "Dir/x", "dir/x"))
def case_twins():
    for name in ("A", "a", "Dir/x", "dir/x"):
        put(name)


SHELL = ("a b", " lead", "trail ", "-rf", "--help", "$(touch pwned)", "`id`", ";ls", "'q\"", "a*b", "a?b", "[a]", "~", "#x", "%s%n", "&", "|", "a=b", "a:b",
         "a,b", "{x}", "!1", "<>", "^", "-", "@", "+x", "d d/-x")


@kind(all_of("=", *SHELL))
def names_that_steer_shells():
    for name in SHELL:
        put(name)


UNICODE = ("計算結果.csv", "\U0001f9ee.txt", "\u0301alone", "ﬁ", "\u00a0", "ｗｉｄｅ", "e\u0301", "\uff0e\uff0e", "\u0628\u064e", "\ue000", "\U0010ffff")


@kind(all_of("=", *UNICODE))
def unicode_names():
    for name in UNICODE:
        put(name)


@kind(all_of("=", "con", "nul.txt", "a.", "a:b:$DATA", "x" * 8 + "~1", "CLOCK$"))
def names_that_other_systems_keep():
    for name in ("con", "nul.txt", "a.", "a:b:$DATA", "x" * 8 + "~1", "CLOCK$"):
        put(name)


@kind(all_of("=", "a/b", "a-b", "a.b", "a0", "a b", "aa/b", "a!"))
def names_that_sort_around_a_slash():
    for name in ("a/b", "a-b", "a.b", "a0", "a b", "aa/b", "a!"):
        put(name)


PARTS = ("x16", ".x16.mi-part", "x16.part", "x16.tmp", ".mi-0.part", ".mi-01234567-0123-0123-0123-0123456789ab.0.part", ".mi.d/0", ".x16.mi-part.mi-part",
         ".x.AbCdEf", "x16~", "part0")


@kind(all_of("=", *PARTS))
def names_like_part_files():
    for name in PARTS:
        put(name)


OWN = ("mi_system_wf.py", "mi_dicomapi.py", "execute_remote_command.py", "mi_distributed_computing_assist.ini", "json.py", "sitecustomize.py", "x.pth",
       "__pycache__/json.cpython-311.pyc", "order.json", "journal", "end", "stdout", "stderr")


@kind(all_of("=", *OWN))
def names_like_our_own_files():
    for name in OWN:
        put(name)


@kind(all_of("=", "計算標準出力.txt", "計算標準エラー出力.txt", "remote_program_exec.log"))
def names_of_the_logs_below():
    for name in ("計算標準出力.txt", "計算標準エラー出力.txt", "remote_program_exec.log"):
        put(name)


MANY = ["f%03d" % number for number in range(300)]


@kind(all_of("=", *MANY), by_name=all_of("=", *MANY[:3]))
def many_small_ones():
    for name in MANY:
        put(name)


@kind(all_of("=", "a", "b", "c/d"))
def equal_contents():
    for name in ("a", "b", "c/d"):
        put(name, b"the same")


@kind({"e/": "=", "f/g/": "=", "h/x": "=", "h/i/": "="})
def empty_directories():
    os.makedirs("e")
    os.makedirs("f/g")
    put("h/x")
    os.makedirs("h/i")


@kind(all_of("=", "x"))
def extended_attributes():
    put("x")
    try:
        os.setxattr("x", "user.note", b"y")
    except OSError:
        pass                                           # not on every file system


def give_away(*names, **how):
    """A function that makes these another user's."""
    def give(folder):
        for name in names:
            os.chown(os.path.join(folder, name), NOBODY, NOBODY)
            os.chmod(os.path.join(folder, name), how["mode"])
    return give


@kind(all_of("=", "x"), root=give_away("x", mode=0o644))
def another_users_that_all_may_read():
    put("x")


@kind(all_of("=", "x"))
def read_by_a_process_that_stays():
    put("x")
    beside("held = open(sys.argv[1], 'rb')\nimport fcntl\nfcntl.flock(held, fcntl.LOCK_SH)\nwhile time.time() < until: time.sleep(0.05)",
           os.path.abspath("x"))


@kind(all_of("=", "x", "y"), left=False, checks={"x": lambda data: data == b"line\n" * (len(data) // 5) and data})
def appended_to_by_a_process_that_stays():
    put("y")
    put("x", b"line\n")
    beside("out = open(sys.argv[1], 'ab', 0)\nopen(sys.argv[2], 'w').close()\nwhile time.time() < until: out.write(b'line\\n'); time.sleep(0.002)",
           os.path.abspath("x"), os.path.abspath("../.writes"))
    wait_for("../.writes")


@kind({"x": "=", "new": "=|-"}, by_name={"x": "="}, left=False,             # new: it was ended between writing and renaming
      checks={"x": lambda data: data in (b"1" * 9000, b"2" * 9000), "new": lambda data: len(data) <= 9000})
def rewritten_by_a_process_that_works_there():
    put("x", b"1" * 9000)
    beside("os.chdir(os.path.dirname(sys.argv[1]))\nopen(sys.argv[2], 'w').close()\n"
           "n = 0\nwhile time.time() < until:\n  n += 1\n  open('new', 'wb').write(b'12'[n % 2:][:1] * 9000); os.rename('new', 'x')\n  time.sleep(0.002)",
           os.path.abspath("x"), os.path.abspath("../.works"))
    wait_for("../.works")
    subprocess.call(["sleep", "0.02"])


# ---- inputs, after the command

@kind(all_of("=", "in"), inputs={"in": b"as it was sent\n"})
def an_input_untouched():
    pass


@kind(all_of("=", "in"), inputs={"in": b"as it was sent\n"})
def an_input_touched():
    os.utime("in", (1e9, 1e9))


@kind(all_of("=", "in"), inputs={"in": b"as it was sent\n"})
def an_input_changed():
    put("in", b"by the command\n")


@kind(all_of("=", "in"), inputs={"in": b"as it was sent\n"})
def an_input_changed_in_its_bytes_only():
    before = os.stat("in")
    put("in", b"as it was SENT\n")
    os.utime("in", ns=(before.st_atime_ns, before.st_mtime_ns))


@kind(all_of("=", "in"), inputs={"in": b"as it was sent\n"})
def an_input_changed_with_the_clock_set_back():
    put("in", b"longer than it was when it was sent\n", mtime=946684800)


@kind(all_of("=", "in"), inputs={"in": b"as it was sent\n"})
def an_input_made_executable():
    os.chmod("in", 0o755)


@kind(all_of("=", "in"), inputs={"in": b"as it was sent\n"})
def an_input_replaced():
    put("new", b"by the command\n")
    os.rename("new", "in")


@kind(all_of("=", "in", "other"), inputs={"in": b"as it was sent\n"})
def an_input_with_a_second_name():
    os.link("in", "other")


@kind({}, by_name={"in": "missing"}, inputs={"in": b"as it was sent\n"})
def an_input_removed():
    os.unlink("in")


@kind({"in/x": "="}, by_name={"in": "special|missing"}, inputs={"in": b"as it was sent\n"})
def an_input_replaced_by_a_directory():
    os.unlink("in")
    put("in/x")


@kind(all_of("=", "in", "x"), inputs={"in": b"as it was sent\n"})
def an_input_replaced_by_a_link_inside():
    os.unlink("in")
    put("x")
    os.symlink("x", "in")


@kind({"in": "outside"}, inputs={"in": b"as it was sent\n"})
def an_input_replaced_by_a_link_outside():
    os.unlink("in")
    os.symlink("/etc/passwd", "in")


# ---- links out, and links to nothing

def outside(name):
    """The path of a file outside of the working directory, on the same file system; made here."""
    path = os.path.join(os.environ["MI_OUTSIDE"], os.path.basename(os.getcwd()) + "." + name)
    put(path, b"not of this calculation\n")
    return path


@kind({"x": "="}, rules={"x": "outside"})
def a_hard_link_to_outside():
    os.link(outside("x"), "x")


@kind({"x": "=", "y": "="}, rules={"x": "outside", "y": "outside"})
def two_hard_links_to_one_outside():
    os.link(outside("x"), "x")
    os.link("x", "y")


@kind(all_of("outside", "f", "passwd", "proc"))
def links_to_files_outside():
    os.symlink(outside("f"), "f")
    os.symlink("/etc/passwd", "passwd")
    os.symlink("/proc/self/environ", "proc")


@kind(all_of("outside", "d", "up", "root"), by_name=all_of("outside", "d/hosts", "up/order", "root/etc/passwd"))
def links_to_directories_outside():
    os.symlink("/etc", "d")
    os.symlink("../../..", "up")
    os.symlink("/", "root")


@kind(all_of("outside", "order"))
def a_link_to_what_the_program_knows_of_it():
    base, run = os.path.split(os.path.abspath("../.."))
    os.symlink(os.path.join(base, ".mi", run, "order.json"), "order")


@kind({"a": "outside", "b": "outside"})
def a_chain_of_links_to_outside():
    os.symlink("/etc/passwd", "a")
    os.symlink("a", "b")


@kind({"null": "outside|special"})
def a_link_to_a_device():
    os.symlink("/dev/null", "null")


NOWHERE = "missing|special|outside|-"


@kind({"l": NOWHERE, ".#lock": NOWHERE}, by_name=all_of("missing|special|outside", "l", ".#lock"))
def dangling_links():
    os.symlink("nowhere", "l")
    os.symlink("user@host.1234:1700000000", ".#lock")


@kind({"l": NOWHERE}, by_name={"l": "missing|special|outside"})
def a_dangling_link_to_outside():
    os.symlink("/nowhere/at/all", "l")


@kind(all_of(NOWHERE, "self", "a", "b"), by_name=all_of("missing|special|outside", "self", "a", "b"))
def links_in_a_circle():
    os.symlink("self", "self")
    os.symlink("b", "a")
    os.symlink("a", "b")


@kind({"x": "=", "here": NOWHERE, "d/up": NOWHERE}, by_name={"x": "="})
def links_to_directories_above_them():
    put("x")
    os.symlink(".", "here")
    os.mkdir("d")
    os.symlink("..", "d/up")


def mesh(count):
    """Directories that link to one another, each to all others, as package managers leave them."""
    for one in range(count):
        put("d%d/x" % one)
        for other in range(count):
            if other != one:
                os.symlink("../d%d" % other, "d%d/l%d" % (one, other))


@kind(all_of("=", "d0/x", "d1/x", "d2/x"), more=r"d\d+(/l\d+)+(/x)?")
def three_directories_that_link_to_one_another():
    mesh(3)


@kind(all_of("=", *["d%d/x" % one for one in range(12)]), more=r"d\d+(/l\d+)+(/x)?", alone=True)
def twelve_directories_that_link_to_one_another():
    mesh(12)


# ---- neither file nor directory

@kind({"p": "special"})
def a_fifo():
    os.mkfifo("p")


@kind({"s": "special"})
def a_socket():
    folder = os.open(".", os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("/proc/self/fd/%d/s" % folder)        # its path may be longer than a socket's may be
    os.close(folder)


@kind({"p": "special", "l": "special"})
def a_link_to_a_fifo():
    os.mkfifo("p")
    os.symlink("p", "l")


@kind({"null": "special"}, root=lambda folder: os.mknod(os.path.join(folder, "null"), 0o666 | stat.S_IFCHR, os.makedev(1, 3)))
def a_device():
    pass


@kind({"d/x": "="}, by_name={"d": "special|missing"})
def a_directory_asked_for_by_name():
    put("d/x")


@kind({"x": "="}, by_name={"x/y": "missing", "no": "missing", "not/there": "missing"})
def names_that_are_not_there():
    put("x")


# ---- unreadable

@kind(all_of("unreadable", "x", "w"))
def unreadable_files():
    put("x", mode=0)
    put("w", mode=0o222)


@kind({"d/": "unreadable", "y": "="}, by_name={"d/x": "unreadable", "y": "="})
def an_unreadable_directory():
    put("d/x")
    put("y")
    os.chmod("d", 0)


@kind({"d/": "unreadable"}, by_name={"d/x": "="})
def a_directory_that_cannot_be_listed():
    put("d/x")
    os.chmod("d", 0o111)


@kind({"d/x": "unreadable"})
def a_directory_that_can_be_listed_only():
    put("d/x")
    os.chmod("d", 0o444)


@kind(all_of("unreadable", "x", "l"))
def a_link_to_an_unreadable_file():
    put("x", mode=0)
    os.symlink("x", "l")


@kind(all_of("unreadable", "x", "y"))
def hard_links_to_an_unreadable_file():
    put("x", mode=0)
    os.link("x", "y")


@kind({"x": "unreadable"}, root=give_away("x", mode=0o600))
def another_users_file():
    put("x")


@kind({"d/": "unreadable"}, by_name={"d/x": "unreadable"}, root=give_away("d", "d/x", mode=0o700))
def another_users_directory():
    put("d/x")


# ---- names that cannot travel

ODD = (b"back\\slash", b"new\nline", b"tab\t", b"esc\x1b[2J", b"del\x7f", "c1\u009b".encode(), "next\u0085".encode(), b"\xff\xfe", b"over\xc0\xaflong",
       b"half\xed\xa0\x80", "zero\u200bwidth".encode(), "abc\u202egpj.exe".encode(), "\u2028line".encode(), "\ufeffbom".encode())


@kind({name.decode("utf-8", "surrogateescape"): "name" for name in ODD}, by_name={})
def names_that_cannot_travel():
    for name in ODD:
        put(name)


@kind({(name + b"/x").decode("utf-8", "surrogateescape"): "name" for name in (b"a\\b", b"\xff")}, by_name={})
def directories_whose_names_cannot_travel():
    for name in (b"a\\b", b"\xff"):
        put(name + b"/x")


@kind({long_name(1001) + "z": "name"}, by_name={})
def path_over_1000_bytes():
    os.makedirs(os.path.dirname(long_name(1001)))
    put(long_name(1001) + "z")


@kind({"\u00e9": "=|name", "e\u0301": "=|name", "z": "="}, by_name={"z": "="})
def nfc_and_nfd_twins():
    for name in ("\u00e9", "e\u0301", "z"):
        put(name)


@kind({}, by_name={}, alone=True)
def logs_of_its_own_at_the_top():
    put("../../計算標準出力.txt", b"not the log")


# ---- rules

@kind({"big": "=", "small": "="}, rules={"big": "limit"})
def larger_than_max_file():
    with open("big", "wb") as out:
        out.truncate(MAX_FILE + 1)
    put("small")


@kind({"just": "="})
def as_large_as_max_file():
    with open("just", "wb") as out:
        out.truncate(MAX_FILE)


DENIED = ("secret.dat", "SECRET.csv", "sub/secrets/a.csv", "Secret/b/c", "x.KEY", "y.key")


@kind(dict(all_of("=", *DENIED), notsecret="="), rules=all_of("refused#", *DENIED))
def denied_names():
    for name in DENIED + ("notsecret",):
        put(name)


@kind({"secret": "=", "innocent": "="}, rules={"secret": "refused#", "innocent": "refused#"})
def a_link_to_a_denied_file():
    put("secret")
    os.symlink("secret", "innocent")


@kind({"open": "=", "secret-link": "="}, rules={"secret-link": "refused#"})
def a_denied_link_to_an_open_file():
    put("open")
    os.symlink("open", "secret-link")


# ---- changing: bytes of one moment and 0, or `changing` and 65

def changes(how):
    """The command leaves a process behind that opens x anew each time: nobody takes it for one of the calculation's."""
    put("still")
    put("x", b"0" * 50000)
    beside("n = 0\nwhile time.time() < until:\n  n = (n + 1) %% 10; new = b'0123456789'[n:n + 1] * 50000\n"
           "  try:\n%s\n  except OSError: pass\n  time.sleep(0.0005)" % "\n".join("    " + line for line in how.split("\n")), os.path.abspath("x"))


def uniform(data):
    """Bytes of one version."""
    return data in [letter * 50000 for letter in (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8", b"9")]


def prefix(data):
    """Bytes of one version, or the first of them."""
    return data == data[:1] * len(data) and len(data) <= 50000


CHANGES = {"x": "=|changing", "still": "="}


@kind(CHANGES, left=False, alone=True, checks={"x": lambda data: len(data) == 50000})          # every look finds another mixture; the one judged
def overwritten_in_place():
    changes("with open(sys.argv[1], 'r+b', 0) as out: out.write(new)")


@kind(dict(CHANGES, **{"x.new": "=|changing|-"}), by_name=CHANGES, left=False, alone=True, checks={"x": uniform, "x.new": prefix})
def replaced_again_and_again():
    changes("with open(sys.argv[1] + '.new', 'wb') as out: out.write(new)\nos.rename(sys.argv[1] + '.new', sys.argv[1])")


@kind(CHANGES, left=False, alone=True, checks={"x": prefix})
def truncated_and_written_again():
    changes("with open(sys.argv[1], 'wb') as out: out.write(new)")


@kind(CHANGES, left=False, alone=True, checks={"x": lambda data: data == b"0" * len(data) and len(data) >= 50000})
def grown_again_and_again():
    changes("with open(sys.argv[1], 'ab') as out: out.write(b'0' * 10)")


@kind({"x": "=|changing|-", "still": "="}, by_name={"x": "=|changing|missing", "still": "="}, left=False, alone=True, checks={"x": prefix})
def removed_and_made_again():
    changes("os.unlink(sys.argv[1])\nwith open(sys.argv[1], 'wb') as out: out.write(new)")


# ---- the same kinds as inputs

# What is different when a kind is sent: {kind: exit code of the workflow side, which then has registered nothing and named it}; kinds that
# are made of inputs, or differ by rules only, are no inputs of their own. Links are followed, wherever they lead: they are the sender's.
AS_INPUT = {
    "dangling-links": (66,), "a-dangling-link-to-outside": (66,), "links-in-a-circle": (66,), "a-fifo": (66,), "a-socket": (66,), "a-link-to-a-fifo": (66,),
    "a-device": (66,), "a-link-to-a-device": (66,), "unreadable-files": (66,), "an-unreadable-directory": (66,), "a-directory-that-cannot-be-listed": (66,),
    "a-directory-that-can-be-listed-only": (66,), "a-link-to-an-unreadable-file": (66,), "hard-links-to-an-unreadable-file": (66,), "another-users-file": (66,),
    "another-users-directory": (66,), "names-that-cannot-travel": (64, 66), "directories-whose-names-cannot-travel": (64, 66), "path-over-1000-bytes": (64, 66),
    "nfc-and-nfd-twins": (64,), "links-to-directories-outside": None, "links-to-files-outside": None, "a-link-to-what-the-program-knows-of-it": None}
AS_INPUT_BY_NAME = {"names-that-are-not-there": (66,), "a-directory-asked-for-by-name": (66,), "a-directory-that-cannot-be-listed": (), "nfc-and-nfd-twins": None,
                    "names-that-cannot-travel": None, "directories-whose-names-cannot-travel": None, "path-over-1000-bytes": None}


def as_input(one, asked):
    """(exit codes that refuse it; () if it goes through; None if it is no input, {name below w/KIND: outcome}) of a kind. asked: name, directory."""
    codes = dict(AS_INPUT, **(AS_INPUT_BY_NAME if asked == "name" else {})).get(one.name, ())
    names = one.by_name if asked == "name" else one.files
    if one.inputs or not one.left or codes is None or one.more:
        return None, {}
    outside_too = {name: "=" if outcome == "outside" else outcome for name, outcome in names.items()}
    return codes, {name: outcome for name, outcome in outside_too.items() if outcome != NOWHERE}


# ---- the command

def main(spec):
    """Makes what the spec names, says so, waits until it is looked at, and ends as it is told."""
    with open(spec) as text:
        spec = json.load(text)
    os.environ["MI_OUTSIDE"] = spec["outside"]
    os.umask(0o022)
    os.makedirs("w", exist_ok=True)
    top = os.getcwd()
    for name in spec["kinds"]:
        os.makedirs(os.path.join("w", name), exist_ok=True)
        os.chdir(os.path.join("w", name))
        KINDS[name].make()
        os.chdir(top)
    with open(spec["made"] + ".new", "w") as out:
        out.write(top)
    os.rename(spec["made"] + ".new", spec["made"])
    wait_for(spec["go"])
    if spec.get("sleep"):
        time.sleep(spec["sleep"])


if __name__ == "__main__":
    main(sys.argv[1])
