#!/usr/bin/env python3
"""The SSH way: run one command on an external computer, with its input files there and its results back here.

Who runs it: a workflow module, on the workflow system's side (the near side). The same file is the far side: it is
brought there once, or its owner puts it there as the guard of the key. To audit what a key may do, read the rooms
shared: gate, shared: watch, the doors of the gate, and the keeper.

    execute_remote_command.py client_name:HOST client_cmd:CMD client_files:A,B,C
                                        as fielded; any order, values may hold ':'
    execute_remote_command.py run HOST CMD [--in FILE ...] [--to DIR] [--streams N] [--retry COUNT,INTERVAL] [--keep]
                                        [--allow-refused] [--batch SYSTEM]
    execute_remote_command.py resume UUID [--to DIR] | list [HOST] | cancel UUID | clean UUID ... | clean --older 30d
    execute_remote_command.py check [HOST] | check --upgrade      looks at things as they are; what another version left
    execute_remote_command.py guard [--key NAME] [--print-key-line KEYFILE]    external computer, in authorized_keys
    execute_remote_command.py guard outbox | guard show ID | guard release ID | guard refuse ID --reason TEXT
                                        at its terminal: what is held for a person
    execute_remote_command.py audit verify [--witness HEAD] | audit report [--since TIME] [--csv]    there: what left

HOST is a word of ~/.ssh/config, which decides port, user, key, jump host and proxy. CMD is a command line for the shell
there (with a guard: the word of a [command NAME], and arguments). Everything that CMD leaves in its directory comes back
into the current one, also when it failed; its output is remote_program_exec.log. A lost line is opened again, the
command runs on meanwhile.

Exit codes: the command's own (128+N: a signal) when it ran; otherwise 0 done, 64 usage, 65 results incomplete (what did
not leave there is named; refused: not with --allow-refused), 66 an input is missing, 69 host unavailable, 70 bug, 74
input/output or disk full, 75 try again later (also after SIGTERM: the command runs on), 76 protocol, 77 refused,
78 configuration, 130 Ctrl+C.

threads: each lane of a transfer but the first, and Progress; their lock is Transfer's. At the far side a session is a
process without any; the one keeper of a base watches all runs in one thread, what takes time has others (HANDS a key).

contents (grep -n '^# ====' prints them with their lines):
  shared: alone                 no module is taken from where results arrive
  shared: gate                  what may be run there, and what may leave
  shared: watch                 one run, from its order to what may leave of it
  shared: content               what is looked for in all that leaves
  shared: hold                  what waits for a person there, and his word
  shared: audit                 what was done and what left, chained
  the doors of the gate         guard and far: requests and answers over ssh
  the keeper                    what must go on there while nobody is connected
  how the door far comes there  brought once, by a text for any log-in shell
  connections                   ssh, sessions, what a door may answer
  one calculation               the nine steps as the near side sees them
  record                        what this side remembers, for resume
  moving files                  bundles and pieces, lanes that work them off
  the plain way                 rsync alone, where there is no python3
  command line                  the words, one function for each
  shared: usage                 words and options, --help, --version
  shared: say
  shared: ini
  shared: names                 names of files: checked by every receiver
  shared: seal                  who may order: signatures, each order once
  shared: sign                  signatures are made by ssh-keygen or openssl
  shared: run                   the wrapper of a command, and how it is looked at
  shared: batch                 batch systems
  shared: store                 how results get into a directory of this side
  tables                        words and options, keys of the ini, answers, Japanese
"""
import sys

# ==== shared: alone ====
def stand_alone():
    """The first act of a program (not of an import), by what is built into Python only. Closed descriptors 0
    to 2 lead to /dev/null: else the first file that is opened gets one of them, and what is printed. No
    module is taken from beside this file, or from where it is started: results arrive there, and a json.py
    would run."""
    import gc
    import posix
    gc.disable()                          # until run_as_program(): a start makes much and throws nothing away
    for number in range(3):
        try:
            posix.fstat(number)
        except OSError:
            # the lowest that is free: this one
            posix.set_inheritable(posix.open("/dev/null", posix.O_RDWR), True)
    near = []
    for place in (".", __file__.rpartition("/")[0] or ".", sys.path[0]):
        try:
            near.append(posix.stat(place)[1:3])        # inode and device
        except OSError:
            pass                                       # -I: python311.zip, which is not there
    library = tuple(top + lib for top in {sys.base_prefix, sys.base_exec_prefix}
                    for lib in ("/lib/python", "/lib64/python"))
    for place in list(sys.path):
        known = posix.access(place, 0) and posix.stat(place)[1:3]
        if place[:1] != "/" or known in near and not place.startswith(library):
            sys.path.remove(place)


if __name__ == "__main__":
    stand_alone()
# ==== end shared ====

import _thread
import binascii
import codecs
import collections
import contextlib
import errno
import functools
import io
import json
import os
import re
import select
import signal
import stat
import struct
import subprocess
import threading
import time

PROGRAM = "execute_remote_command"
VERSION = "1.0.0"
LOG = "remote_program_exec.log"   # the command's output, in its directory
SMALL = 1 << 20                # bytes; smaller files travel bundled
BUNDLE, BUNDLE_NAMES = 4 << 20, 60000  # bytes of small files, and of their names, in one bundle
# the same to a near host, which has so many bundles or pieces before it at once: what is not read there makes
# sshd's buffer grow, which costs more than the transfer
NEAR_BUNDLE, NEAR_AHEAD = 1 << 18, 3
# bytes of small files from which on a far host gets them in two sessions (each has ssh's window of 2 MiB)
SECOND_SESSION = 8 << 20
BULK = 64 << 20                # bytes from which on several connections pay for their log-ins
NEAR = 0.004                   # seconds of round trip below which a host counts as being on the same LAN
# bytes of a piece of a large file: where lines lose packets, what the slowest lane keeps back at the end is
# little
LEAST_PIECE, MOST_PIECE = 1 << 20, 8 << 20
# connections at once: far, near, ever (a default sshd refuses at random from 10 on)
STREAMS, NEAR_STREAMS, MOST_STREAMS = 6, 2, 8
# requests under way in the only lane, in each of several: no round trip idle, little left behind by a slow
# one
AHEAD_ALONE, AHEAD_EACH = 6, 2
BLOCK = 1 << 18                # bytes read or written at once
PIPED = 1 << 16                # bytes that wait for others before they go through a pipe
SAMPLE, SHRINKS = 1 << 16, 2.5 # bytes that must shrink by this factor to show that a file is worth packing
# bytes of a result from which on its middle is looked at for that; how many at most
SAMPLED, MOST_SAMPLES = 8 << 20, 50
LEAVE = 20                     # seconds after a signal until it ends in any case
LOOK_AGAIN = 0.3               # seconds until results that change are looked at again
TRIES = 3                      # for a piece whose sum is wrong
CONNECT_SPAN = 60              # seconds in which at most `connects` connections are opened to one host
# bytes of one line of a log-in's, and of all that it may print before our own first line
LOGIN_LINE, LOGIN_NOISE = 8192, 1 << 20
STDERR_MOST = 16 << 20         # bytes that ssh may write on stderr, into a file
MOST_FILES = 500000            # of a list of results

# ==== shared: gate ====
# What decides which command runs on this host and what leaves of it; poller and SSH guard are two doors to
# it. The rules are the owner's: the sections [command NAME] and [outbound] of the ini beside the door. What
# they do not allow is refused. In this order: the keys of these sections; what a section means; what a
# request may start; what the command sees; what may leave. What is judged comes from others: the words of a
# request from the wire, names and contents of results from the command.
# Beside results there leave: the log while it is written (rule_against_live()); where a run is and how it
# ended, in this program's words and the batch system's, lines of the job's own log only where logs may leave
# (BatchJob.log_words()); how the poller stands (its key `tell`). Programs are started by the blocks run and
# batch; what looks into contents, by the block content.
AFTER_STOP = {                 # what may leave of what was cancelled, ran too long or died of a signal
    "": {"logs", "names"},                             # names: results that were declared by name
    "logs": {"logs"},
    "all": {"logs", "names", "patterns"}}              # what was asked for by pattern or directory, too
PASSED_ENV = re.compile(r"(PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_[A-Z]+|TZ|TMPDIR)\Z")  # what the command sees
WORDS_MOST = 100000            # characters of all arguments together
VERDICT_NAMES = 100                    # names that a verdict tells at most; its count is of all
PIECE = 1 << 20                # bytes of a result that have a sum of their own
READ_TRIES = 3                      # times that a result is read anew because it changes meanwhile
LINKS_MOST = 40                     # links on one way, as the kernel has it
FOLDER_FLAGS = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# a directory that may be entered, perhaps not listed
ENTER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | FOLDER_FLAGS


class Forbidden(ValueError):
    """The owner's rules say no; the text says which."""


def gate_keys():
    """The rules' keys, as read_ini() takes them: {section: {key: (kind, default, meaning)}}."""
    return {
        "command *": {
            "argv": (lines, (),
                     "the program and its fixed words, one a line; {parameters} only where arguments are"
                     " allowed"),
            "match": (str, "", "the word on the wire; default: argv's first line"),
            "parameters": (flag, None, "may stay away"),
            "argument.*": (re.compile, None,
                           "each argument must match its expression as a whole; more are refused"),
            "require_signature": (flag, None, "yes, no: for this command, whatever holds for the others"),
            "env.*": (str, "", "a variable that the command sees"),
            "nice": (number_from(0, 19), 0, "0 to 19"),
            "timeout": (seconds, 0.0, "the command is ended after so long; 0: never"),
            "grace": (seconds, 10.0, "from TERM to KILL"),
            "jobs": (number_from(0, 1000), 0, "so many at once, for licences; 0: no limit of its own"),
            "pre": (lines, (),
                    "a program of this host before it, in its directory; one argument a line, as argv"),
            "post": (lines, (), "and one after it"),
            "input_names": (pattern_list, (),
                            "patterns as of results: inputs of other names are refused; default: any"),
            "patterns": (flag, True, "no: results are given by name only"),
            "logs": (flag, True, "no: stdout and stderr stay here, live output too"),
            "after_stop": (one_of(*sorted(AFTER_STOP)), "",
                           "what leaves of a command that was cancelled, ran too long or died of a"
                           " signal: all, logs; default: what was declared by name"),
            "hold": (flag, None,
                     "yes: what it leaves waits until a person on this host says `release`; default:"
                     " [outbound]'s"),
            "leftovers": (one_of("end", "leave"), "end",
                          "leave: what the command leaves running in its directory is not ended"),
            "batch": (one_of("none", *sorted(BATCH_SYSTEMS)), "none",
                      "slurm, pbs, htcondor: submitted there; calc_base, or [ssh guard] base, on the"
                      " shared file system"),
            "batch_options": (lines, (),
                              "of its submission, fixed: --partition=long; for htcondor lines of a"
                              " submit file"),
            "batch_changeable": (changeable_options, (),
                                 "NAME[=DEFAULT] OPTION EXPRESSION a line, as in: cores=1"
                                 " --cpus-per-task={} [1-8]; parameters say batch.cores=4"),
            "batch_poll": (seconds, 10.0, "one query for all"),
            "batch_grace": (seconds, 600.0, "how long the queue may not know a job that has not ended")},
        "outbound": dict({
            "max_file": (size, 0, "of one result; 0: no limit"),
            "max_total": (size, 0, "of all results of a calculation; 0: no limit"),
            "max_files": (number_from(1, 200000), 200000, "results of one calculation"),
            "allow_names": (name_rule_list, ["*"], "the whole name"),
            "deny_names": (name_rule_list, [],
                           "the whole name, a directory, or any part, in any case; blanks between them"),
            "hold": (flag, False, "yes: what any command leaves waits until a person on this host says so"),
            "hold_for": (seconds, 14 * 86400.0, "what waits for a person is refused after so long; 0: never"),
            "keep_refused": (seconds, 30 * 86400.0, "what was kept from leaving stays so long at least"),
            "audit_log": (str, "",
                          "what was done and what left, chained: see `audit`; default: .mi/audit.log in"
                          " calc_base, or in [ssh guard] base")},
            **content_keys())}


def number_from(low, high):
    """A kind: a whole number from low to high."""
    def kind(text):
        if not re.match(r"\d{1,6}\Z", text) or not low <= int(text) <= high:
            raise ValueError(_("is not a number from %d to %d") % (low, high))
        return int(text)
    return kind


def pattern_list(text):
    """Patterns as those of results (README), blank separated."""
    return [compile_pattern(word) for word in text.split()]


def name_rule_list(text):
    """Shell patterns, blank separated. A comma behind one is a mistake that would let out what it is to
    keep."""
    if any(word.endswith(",") for word in text.split()):
        raise ValueError(_("blanks stand between names, no commas"))
    return [word.rstrip("/") or word for word in text.split()]


def sum_list(text):
    """sha256 sums, separated by blanks or lines."""
    if any(not re.match(r"[0-9a-f]{64}\Z", word) for word in text.lower().split()):
        raise ValueError(_("is not a list of sha256 sums (64 hexadecimal digits each)"))
    return text.lower().split()


def expression_list(text):
    """Regular expressions, one a line; they are looked for in bytes."""
    for line in lines(text):
        re.compile(utf8(line))
    return lines(text)


# What a section means

def command_of(where, section, keys):
    """One [command NAME] section: its keys, and name, match, shapes {N: expression of argument N}, env
    {NAME: value}. 78 if it contradicts itself."""
    def wrong(key, text):
        return Stop(EX_CONFIG, "%s: [%s] %s: %s" % (where, section, key, text))
    try:
        shapes = {int(rest): value
                  for rest, value in dotted_keys(keys, "argument", r"[1-9]\d{0,3}\Z").items()}
        env = dotted_keys(keys, "env", r"[A-Za-z_][A-Za-z0-9_]*\Z")
    except ValueError as error:
        raise wrong(str(error), _("must be argument.1, argument.2, ... or env.NAME_OF_A_VARIABLE"))
    for key in ["argv"] + [key for key in ("pre", "post") if keys[key]]:
        if not "".join(keys[key][:1]).startswith("/"):
            raise wrong(key, _("the first line must be the absolute path of a program"))
    if keys["argv"].count("{parameters}") != bool(shapes) or keys["parameters"] not in (None, bool(shapes)):
        raise wrong("parameters", _("arguments need a line {parameters} in argv, argument.N for each, "
                                    "and no parameters = no"))
    return dict(keys, name=section[8:], match=keys["match"] or keys["argv"][0], shapes=shapes, env=env)


def dotted_keys(keys, head, form):
    """{REST: value} of the keys head.REST. ValueError with the key whose REST is not of this form."""
    found = {}
    for key, value in keys.items():
        first, dot, rest = key.partition(".")
        if dot and first == head:
            if not re.match(form, rest):
                raise ValueError(key)
            found[rest] = value
    return found


def commands_of(where, settings):
    """{word on the wire: its command} of all [command NAME] sections. 78 if one is wrong, or two have one
    word."""
    commands = {}
    for section in settings:
        if section.startswith("command "):
            command = command_of(where, section, settings[section])
            command["hold"] = settings["outbound"]["hold"] if command["hold"] is None else command["hold"]
            if command["match"] in commands:
                raise Stop(EX_CONFIG, _("%s: [%s] match: another command has it already") % (where, section))
            commands[command["match"]] = command
    return commands


def unfit(command):
    """(key, why) of a program of this command that cannot be run on this host as it is, or None."""
    for key in ("argv", "pre", "post"):
        for path in command[key][:1]:
            try:
                mode = os.stat(utf8(path)).st_mode
            except OSError as error:
                return key, "%s: %s" % (path, error.strerror)
            if not stat.S_ISREG(mode) or not os.access(utf8(path), os.X_OK) or mode & 0o002:
                return key, _("%s: must be an executable file that not everybody may change "
                              "(chmod +x, chmod o-w)") % path
            if has_crlf(path):
                return key, _("%s: its first line ends with CR LF, so that the system finds no such"
                              " interpreter (sed -i 's/\\r$//' %s)") % (path, path)
    return None


def has_crlf(path):
    """Is this a script whose first line ends with CR LF? Starting it fails as if it were not there."""
    try:
        with open(utf8(path), "rb") as text:
            first = text.readline(256)
    except OSError:                                    # one may run what one may not read
        return False
    return first.startswith(b"#!") and first.endswith(b"\r\n")


# What a request may start

def shell_words(text):
    """The words of a text from the wire, as a shell would split it; no shell sees it. Forbidden if it is
    none."""
    import shlex
    if has_control_chars(text) or len(text) > WORDS_MOST:
        raise Forbidden(_("arguments with control characters, or too long"))
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Forbidden(_("arguments that no shell would split: %s") % error)


def permit_command(commands, word, arguments):
    """(command, with the options for its batch system; argv) for a request: the word on the wire and its
    arguments. Forbidden if no section allows it. Each argument that is given must match the expression of its
    place as a whole; a place without an expression takes none. There may be fewer than there are
    expressions."""
    command = commands.get(word)
    if command is None:
        raise Forbidden(_("no [command NAME] for %s: it is not in this host's list") % printable(word)[:100])
    try:
        options, given = submit_options(command, arguments)
    except ValueError as error:
        raise Forbidden("[command %s] %s" % (command["name"], error))
    for place, argument in enumerate(given, 1):
        if place not in command["shapes"] or not command["shapes"][place].fullmatch(argument):
            raise Forbidden(_("[command %s] argument.%d does not allow %s")
                            % (command["name"], place, printable(argument)[:100]))
    argv = ["/usr/bin/nice", "-n", str(command["nice"])] if command["nice"] else []
    for line in command["argv"]:
        argv += given if line == "{parameters}" else [line]
    return dict(command, options=options), argv


def permit_input(command, name):
    """Forbidden if an input may not have this name. (An empty directory's has a slash at its end.)"""
    whole = "/".join(nfc_parts(name)).rstrip("/")
    if command["input_names"] and not any(shape.match(whole) for shape in command["input_names"]):
        raise Forbidden(_("[command %s] input_names does not allow %s")
                        % (command["name"], printable(name)[:100]))


def permit_results(command, asked):
    """Forbidden if results may not be asked for like this. asked: the patterns and directories that were
    asked for."""
    if asked and not command["patterns"]:
        raise Forbidden(_("[command %s] gives results by name only (patterns = no)") % command["name"])


# What the command sees

def command_env(command, work, run):
    """All that the command sees of this host's environment: never a token. work: its directory, bytes; run:
    the mark of its processes. LANG and LC_* may have been set by an ssh client: plain words only."""
    env = {key: value for key, value in os.environ.items() if PASSED_ENV.match(key)
           and (key[:3] not in ("LAN", "LC_") or re.match(r"[A-Za-z0-9_.@-]*\Z", value))}
    env.setdefault("PATH", "/usr/local/bin:/usr/bin:/bin")
    return dict(env, **dict(command["env"], CALC_DIR=work.decode("utf-8", "surrogateescape"), MI_RUN=run))


# What may leave

def leaving_kinds(command, stopped):
    """What may leave, by how it was asked for: a set of logs, names, patterns; and hold, if only after a
    person's word. stopped: it did not end by itself."""
    kinds = AFTER_STOP[command["after_stop"] if stopped else "all"]
    found = {kind for kind in kinds if command.get(kind, True)}        # its keys `logs` and `patterns`
    return found | {"hold"} if command["hold"] else found


@functools.lru_cache(maxsize=512)
def rule_matcher(rule):
    """A name rule of the owner's as something with match(): as fnmatch, but in a time that no name of a
    stranger's can make long."""
    import fnmatch
    pieces = re.findall(r"\*+|\[!?\]?[^]]*\]|.", rule, re.S)
    if sum(piece[0] == "*" for piece in pieces[:-1]) < 2:
        return re.compile(fnmatch.translate(rule))
    kinds = {"*": ("anys",), "?": ("any",)}
    return GlobMatcher([kinds.get(piece[0])
                        or ((re.compile(fnmatch.translate(piece)),) if piece[1:] else piece)
                        for piece in pieces])


def rule_against_name(rules, name):
    """'' or the [outbound] key that keeps a file of this name here. deny_names: the whole name, a directory
    that it lies in, or any part, in any case. allow_names: the whole name."""
    parts = nfc_parts(name)
    forms = parts + tuple("/".join(parts[:count]) for count in range(2, len(parts) + 1))
    for rule in rules["deny_names"]:
        denied = rule_matcher("/".join(nfc_parts(rule)).casefold())
        if any(denied.match(form.casefold()) for form in forms):
            return "deny_names"
    named = any(rule_matcher("/".join(nfc_parts(rule))).match("/".join(parts))
                for rule in rules["allow_names"])
    return "" if named else "allow_names"


def rule_against_size(rules, length, count, total):
    """'' or the [outbound] key that keeps a file of `length` bytes here beside `count` others with `total`
    bytes."""
    if rules["max_file"] and length > rules["max_file"]:
        return "max_file"
    if rules["max_total"] and total + length > rules["max_total"]:
        return "max_total"
    return "max_files" if count >= rules["max_files"] else ""


def rule_against_live(rules, kinds, name, length, others):
    """'' or the key that keeps a log (its name as a result's) here while the command writes it. kinds: see
    leaving_kinds(); length: bytes that it has now, as far it may leave; others: bytes of the other logs. What
    is over a limit now will not leave at the end; what has to be seen as a whole leaves then. (dry_run lets
    it out then, too.)"""
    if "logs" not in kinds:
        return "logs"
    if "hold" in kinds:
        return "hold"
    whole = [key for key in CONTENT_KEYS if rules[key]]
    return whole[0] if whole else (rule_against_name(rules, name)
                                   or rule_against_size(rules, length, 0, others))


# What leaves: the results of a command that has ended

class Stays(Exception):
    """A result that does not leave. code: missing, refused (by a rule), limit, name (cannot travel),
    unreadable, changing, outside (a link out of the directory), special (no file), held (for a person: see
    Collector.sums_or_hold()); why: for the owner's own log what exactly."""

    def __init__(self, code, why=""):
        Exception.__init__(self, why or code)
        self.code = code


def stays_for(error):
    """The Stays for an OSError at a result, or for itself."""
    if isinstance(error, Stays):
        return error
    gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return Stays("missing" if gone else "unreadable", error.strerror)


class Verdicts(dict):
    """{code: {"count": of all, "names": [the first of those that may be told]}} of what was asked for and
    stays here."""

    def add(self, code, name=None):
        """One more; name: a text, None if it may not be told."""
        entry = self.setdefault(code, {"count": 0, "names": []})
        entry["count"] += 1
        if name is not None and len(entry["names"]) < VERDICT_NAMES:
            entry["names"].append(printable(name))


class Result(collections.namedtuple("Result", "source size name digest executable mtime")):
    """A result that may leave. source: its JudgedBytes; its sum is kept as 32 bytes: there may be very
    many."""
    __slots__ = ()

    @property
    def sum256(self):
        return self.digest.hex()


class Results:
    """Many Results in little memory: some 150 bytes each, of which a Result is made whenever one is asked
    for."""
    ROW = struct.Struct("<BHI?QqIQQqI")

    def __init__(self):
        self.rows = []                                 # bytes each: see append()
        self.trees = []                                # the ResultTrees that they are of

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return map(self.result_of_row, self.rows)

    def __getitem__(self, place):
        return self.result_of_row(self.rows[place])

    def append(self, result, mark=(0, 0, 0, 0, 0)):
        """One more. mark: device, inode, size, mtime and ctime of what was judged."""
        source, name, sums = result.source, utf8(result.name), b""
        if source is None or isinstance(source, bytes):
            kind, place, real = (0, 0, b"") if source is None else (1, 0, source)
        else:
            if source.tree not in self.trees:
                self.trees.append(source.tree)
            kind, place, real = 2, self.trees.index(source.tree), source.real if source.real != name else b""
            sums = source.sums if source.sums != result.digest else b""
        row = self.ROW.pack(kind | (result.digest != b"") << 4, place, len(real), result.executable,
                            result.size, *divmod(result.mtime, 10 ** 9) + mark[:2] + divmod(mark[4], 10 ** 9))
        self.rows.append(b"".join((row, result.digest, sums, real, name)))

    def result_of_row(self, row, marked=False):
        """The Result of a row; marked: (mark, Result)."""
        kind, place, length, x, size, mtime, part, device, inode, ctime, rest = self.ROW.unpack_from(row)
        at = self.ROW.size + (32 if kind >> 4 else 0)
        digest, kind, mtime = row[self.ROW.size:at], kind & 15, mtime * 10 ** 9 + part
        sums = row[at:at + 32 * -(-size // PIECE)] if kind == 2 and size > PIECE else digest
        at += len(sums) if sums is not digest else 0
        name, real = row[at + length:], row[at:at + length]
        if kind == 2:
            source = JudgedBytes(self.trees[place], real or name, size, sums)
        else:
            source = real if kind else None
        result = Result(source, size, name.decode("utf-8"), digest, x, mtime)
        return ((device, inode, size, mtime, ctime * 10 ** 9 + rest), result) if marked else result

    def with_stamps(self):
        """(mark, Result) of each."""
        return (self.result_of_row(row, True) for row in self.rows)

    def names(self):
        """The name of each."""
        return map(self.name_of_row, self.rows)

    def name_of_row(self, row):
        """The name of a row, which is asked for more often than all of it."""
        kind, _place, length, _x, size = self.ROW.unpack_from(row)[:5]
        pieces = -(-size // PIECE) if kind & 15 == 2 and size > PIECE else 0
        return row[self.ROW.size + 32 * ((kind >> 4) + pieces) + length:].decode("utf-8")

    def sort(self, key):
        """By key(name)."""
        self.rows.sort(key=lambda row: key(self.name_of_row(row)))

    def leave_out(self, names):
        """All but those with these names."""
        self.rows = ([row for row in self.rows if self.name_of_row(row) not in names] if names
                     else self.rows)


class JudgedBytes:
    """The bytes of a result that were judged, and no others. tree: the ResultTree that it lies in, real: its
    name there, without links; size: bytes; sums: 32 bytes for each PIECE."""
    __slots__ = ("tree", "real", "size", "sums")

    def __init__(self, tree, real, size, sums):
        self.tree = tree
        self.real = real
        self.size = size
        self.sums = sums

    @property
    def changed(self):
        """Are these bytes not there any more?"""
        return self.real in self.tree.changed

    def changed_error(self):
        """The ValueError of bytes that are not there any more; from now on they count as changed."""
        self.tree.changed.add(self.real)
        return ValueError(_("changed after it was judged"))

    def decode(self, *how):
        """Its name as a text."""
        return self.real.decode(*how)

    def open(self):
        """A JudgedReader of it. ValueError if it cannot be opened any more."""
        try:
            return JudgedReader(self, self.tree.open(self.real))
        except (Stays, OSError):
            raise self.changed_error()


class JudgedReader:
    """Open JudgedBytes: gives each piece only if the bytes in memory have the sum that was judged. ValueError
    if they do not."""

    def __init__(self, source, fd):
        self.source = source                           # the JudgedBytes
        self.fd = fd
        self.at = 0                                    # of the next byte
        self.number = -1                               # of the piece in memory
        self.piece = b""

    def __enter__(self):
        return self

    def __exit__(self, *what):
        os.close(self.fd)

    def seek(self, at):
        """The place of the next byte to be read."""
        self.at = at

    def load(self, number):
        """Piece `number` into memory."""
        import hashlib
        piece = read_exactly(self.fd, min(PIECE, self.source.size - number * PIECE), number * PIECE)
        if hashlib.sha256(piece).digest() != self.source.sums[32 * number:32 * number + 32]:
            raise self.source.changed_error()
        self.piece, self.number = memoryview(piece), number

    def readinto(self, view):
        """Fills view as far as the piece goes; returns the number of bytes, 0 at the end."""
        if self.at >= self.source.size:
            return 0
        number, begin = divmod(self.at, PIECE)
        if number != self.number:
            self.load(number)
        part = self.piece[begin:begin + len(view)]
        view[:len(part)] = part
        self.at += len(part)
        return len(part)

    def read(self, count):
        """The next count bytes; fewer at the end."""
        data, got = memoryview(bytearray(max(0, min(count, self.source.size - self.at)))), 0
        while got < len(data):
            got += self.readinto(data[got:])
        return data.obj


class ResultTree:
    """A directory of results, looked at by descriptors: no link is followed but by resolve(), which
    follows it by hand and never out."""

    def __init__(self, path):
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | FOLDER_FLAGS)
        self.last = None, -1                           # the directory of the file opened last, its descriptor
        self.hard_links = None                         # {device and inode: names}, see hard_links_of()
        self.changed = set()                           # names of what is another one since it was judged

    def close(self):
        for fd in (self.fd, self.last[1]):
            if fd >= 0:
                os.close(fd)

    def open(self, real):
        """A descriptor of the regular file `real`, whose name has no link in it. Stays, OSError."""
        folder, _slash, leaf = real.rpartition(b"/")
        if self.last[0] != folder:
            fd = self.enter(folder, ENTER_FLAGS)
            if self.last[1] >= 0:
                os.close(self.last[1])
            self.last = folder, fd
        fd = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.last[1])
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Stays("special")
        return fd

    def enter(self, real, how=os.O_RDONLY):
        """A descriptor of the directory `real` below the top, which has no link in it. OSError."""
        here, parts = os.dup(self.fd), real.split(b"/") if real else []
        for place, part in enumerate(parts, 1):
            try:
                there = os.open(part, (ENTER_FLAGS if place < len(parts) else how) | FOLDER_FLAGS,
                                dir_fd=here)
            finally:
                os.close(here)
            here = there
        return here

    def resolve(self, name):
        """(its name below the top without links, its stat) of what `name` leads to. Stays, OSError."""
        real, todo, links = [], name.split(b"/"), 0
        here = os.dup(self.fd)
        try:
            while True:
                part = todo.pop(0)
                if part in (b"", b".", b".."):
                    real = self.resolve_dots(real, part, not todo)
                    here = self.replaced(here, self.enter(b"/".join(real), ENTER_FLAGS))
                    continue
                info = os.stat(part, dir_fd=here, follow_symlinks=False)
                if stat.S_ISLNK(info.st_mode):
                    links += 1
                    if links > LINKS_MOST:
                        raise Stays("missing", "links in a circle")
                    target = self.link_target(os.readlink(part, dir_fd=here))
                    if target.startswith(b"/"):
                        real, here = [], self.replaced(here, os.dup(self.fd))
                    todo[:0] = target.split(b"/")
                elif todo:
                    here = self.replaced(here, os.open(part, ENTER_FLAGS, dir_fd=here))
                    real.append(part)
                else:
                    return b"/".join(real + [part]), info
        finally:
            os.close(here)

    def link_target(self, target):
        """Where a link leads: as it is if that is relative, else from the top on, with a slash before it.
        Stays if the top is not on its way."""
        if target.startswith(b"/") and not target.startswith(self.path + b"/"):
            raise Stays("outside")
        return target[len(self.path):] if target.startswith(b"/") else target

    @staticmethod
    def resolve_dots(real, part, last):
        """Where an empty part of a name, a . or a .. leads. Stays: above the top, or last: to no file."""
        if part == b".." and not real:
            raise Stays("outside")
        if last:
            raise Stays("special")
        return real[:-1] if part == b".." else real

    @staticmethod
    def replaced(old, new):
        """new; old is closed."""
        os.close(old)
        return new

    def walk(self, below=lambda name: True):
        """(name, its name without links, its stat, None), or (name, None, None, Stays), of all that is no
        directory, and of empty ones (with a slash behind the name). below(name): is there anything to look
        for below this directory? Links to directories are gone through once on each way, and not
        upwards."""
        todo = [(b"", b"", False)]
        while todo:
            name, real, linked = todo.pop()
            try:
                fd = self.enter(real)
            except OSError as error:
                yield name + b"/", None, None, stays_for(error)
                continue
            try:
                leaves = sorted(os.listdir(fd))
                if not leaves and name:
                    yield name + b"/", real, os.fstat(fd), None
                for leaf in map(os.fsencode, leaves):
                    seen = name + b"/" + leaf if name else leaf
                    try:
                        found, info, link = self.entry(fd, leaf, real, linked)
                    except (OSError, Stays) as error:
                        yield seen, None, None, stays_for(error)
                        continue
                    if not stat.S_ISDIR(info.st_mode):
                        yield seen, found, info, None
                    elif below(seen):
                        todo.append((seen, found, linked or link))
            finally:
                os.close(fd)

    def entry(self, fd, leaf, real, linked):
        """(its name without links, its stat, is it a link?) of an entry of the open directory `real`, to
        which a link has led (linked). Stays, OSError."""
        found = real + b"/" + leaf if real else leaf
        info = os.stat(leaf, dir_fd=fd, follow_symlinks=False)
        if not stat.S_ISLNK(info.st_mode):
            return found, info, False
        found, info = self.resolve(found)
        if stat.S_ISDIR(info.st_mode) and (linked or (real + b"/").startswith(found + b"/")):
            raise Stays("special", "a link to a directory below another, or upwards")
        return found, info, True

    def hard_links_of(self, info):
        """All names below the top of the file with this stat, links not counted."""
        if self.hard_links is None:
            self.hard_links = {}
            for name, real, one, stays in self.walk():
                if one is not None and name == real and one.st_nlink > 1:
                    self.hard_links.setdefault((one.st_dev, one.st_ino), set()).add(name)
        return self.hard_links.get((info.st_dev, info.st_ino), set())


# What leaves: which bytes

def read_exactly(fd, count, at):
    """count bytes from place `at` on; fewer at the end of the file."""
    data = os.pread(fd, count, at) if count else b""
    while len(data) < count:
        more = os.pread(fd, count - len(data), at + len(data))
        if not more:
            break
        data += more
    return data


def sums_of_file(fd, length):
    """(sha256 of the first `length` bytes, the sums of their pieces back to back). Stays if there are fewer
    bytes."""
    import hashlib
    if length <= PIECE:
        one = hashlib.sha256(whole_piece(fd, length, 0)).digest()
        return one, one
    from concurrent.futures import ThreadPoolExecutor
    whole, sums = hashlib.sha256(), []
    with ThreadPoolExecutor(1) as beside:              # two sums at once: hashlib holds no lock
        for at in range(0, length, PIECE):
            data = whole_piece(fd, min(PIECE, length - at), at)
            one = beside.submit(lambda: hashlib.sha256(data).digest())
            whole.update(data)
            sums.append(one.result())
    return whole.digest(), b"".join(sums)


def whole_piece(fd, length, at):
    """As read_exactly(). Stays if there are fewer bytes."""
    data = read_exactly(fd, length, at)
    if len(data) < length:
        raise Stays("changing", "became shorter")
    return data


class Collector:
    """What was asked for, judged by the owner's rules: found (Results), folders (Results: empty
    directories), verdicts, and kept_by_name {name: (code, why)} of what was asked for by name. note(name,
    why, aloud): for the owner's log; aloud: as a warning. known: {name: (mark, Result)} of an earlier look,
    of which the sums are still good: what leaves is compared with them. changing: names that have changed
    again and again."""

    def __init__(self, rules, note, known=(), changing=()):
        self.rules = rules
        self.note = note
        self.known = dict(known)
        self.changing = changing
        self.found = Results()
        self.folders = Results()
        self.total = 0                                 # bytes of found
        self.verdicts = Verdicts()
        self.kept_by_name = {}
        self.held = {}                                 # {name: why} of those that wait for a person
        self.hold_all = False                          # do all?
        self.kept_by_rule = collections.Counter()      # {key of the rule: how many}
        self.named = ()                                # what was asked for by name
        self.scanner = Scanner(rules) if has_content_rules(rules) else None
        self.has_rules = bool(self.scanner or rules["deny_names"] or rules["allow_names"] != ["*"])

    def keep_here(self, name, stays, by_name):
        """This one does not leave. What a rule about names keeps is told by its name only to who has named
        it."""
        self.note(name, str(stays), by_name or str(stays).startswith(CONTENT_KEYS))
        if stays.code == "missing" and not by_name:    # it went meanwhile, or is a link to nothing
            return
        if stays.code in ("refused", "limit", "held"):
            rule = str(stays).partition(" ")[0].rstrip(":")
            self.kept_by_rule[rule if rule in self.rules else stays.code] += 1        # (no word of a file's)
        told = by_name or stays.code != "refused" and not self.rule_against_name(name)
        self.verdicts.add(stays.code, name if told else None)
        if by_name:
            self.kept_by_name[name] = stays.code, str(stays)

    def rule_against_name(self, name):
        """'' or why something may not leave because of this name."""
        return rule_against_name(self.rules, name) or self.scanner and self.scanner.text(name) or ""

    def apply_rule(self, name, why, code="refused"):
        """Stays, if why names a rule; with dry_run it is only noted."""
        if why and not self.rules["dry_run"]:
            raise Stays(code, why)
        if why:
            self.note(name, "dry_run: %s: %s" % (code, why), True)

    def take_named(self, tree, names, reserved=()):
        """Takes the files with these names."""
        self.named = set(names)
        for name in sorted(names):
            try:
                self.take(tree, name, *tree.resolve(utf8(name)), reserved=reserved)
            except (OSError, Stays) as error:
                self.keep_here(name, stays_for(error), True)

    def take_matching(self, tree, patterns, but=(), reserved=()):
        """Takes what the patterns ask for, but these names."""
        but, too_long, matchers = set(but), set(), compile_patterns(patterns)

        def asked(text):       # (declared_matcher() would take a file with a log's name, too)
            whole = "/".join(nfc_parts(text))
            return text in patterns or any(one.match(whole) for one in matchers)

        def may_hold(text):
            return any(may_match_below(one, text) for one in patterns)

        def below(name):
            text = name.decode("utf-8", "backslashreplace")
            if len(name) > 1000 and may_hold(text):
                too_long.add(text + "/")
            return len(name) <= 1000 and may_hold(text)

        for name, real, info, stays in tree.walk(below):
            text = name.decode("utf-8", "backslashreplace")
            if text not in but and (asked(text) or stays is not None and may_hold(text.rstrip("/"))):
                self.take_found(tree, name, real, info, stays, reserved)
        for text in sorted(too_long):
            self.keep_here(text, Stays("name"), False)

    def take_found(self, tree, name, real, info, stays, reserved):
        """Takes one of walk(): a file, or an empty directory."""
        text = name.decode("utf-8", "backslashreplace")
        try:
            if stays is not None:
                raise stays
            take = self.take_folder if name.endswith(b"/") else self.take
            take(tree, name.decode("utf-8"), real, info, reserved)
        except UnicodeDecodeError:
            self.keep_here(text, Stays("name"), False)
        except (OSError, Stays) as error:
            self.keep_here(text, stays_for(error), False)

    def admit_name(self, name, real, reserved):
        """Stays, if something of this name may not leave. real: its name without links; reserved: names of
        the logs."""
        try:
            check_name(name)
        except ValueError:
            raise Stays("name")
        if nfc_parts(name)[0] in reserved:
            raise Stays("name", "a log's name")
        for one in {name, real.decode("utf-8", "replace")}:
            self.apply_rule(name, rule_against_name(self.rules, one))

    def take_folder(self, tree, name, real, info, reserved=()):
        """Takes an empty directory (a slash is at the end of its name). Stays."""
        self.admit_name(name[:-1], real, reserved)
        self.apply_rule(name, self.rule_against_name(name[:-1]))
        self.check_limits(0)
        self.folders.append(Result(None, 0, name, sums_of_file(-1, 0)[0], False, info.st_mtime_ns))

    def take(self, tree, name, real, info, reserved=()):
        """Judges a file and takes it. Stays, OSError."""
        self.admit_name(name, real, reserved)
        if not stat.S_ISREG(info.st_mode):
            raise Stays("special")
        if name in self.changing:
            raise Stays("changing")
        self.judge(tree, name, real, True)

    def take_log(self, tree, name, real):
        """Takes what the command has written, as far as it is there: it may grow meanwhile. Stays,
        OSError."""
        self.apply_rule(name, rule_against_name(self.rules, name))
        self.judge(tree, name, real, False)

    def drop_changing(self, names):
        """These have changed again and again: they stay here."""
        self.changing = set(self.changing) | names
        self.found.leave_out(names)
        for name in sorted(names):
            self.keep_here(name, Stays("changing"), name in self.named)

    def check_limits(self, length):
        """Stays, if one more of this length is over a limit."""
        over = rule_against_size(self.rules, length, len(self.found) + len(self.folders), self.total)
        if over:
            raise Stays("limit", over)

    def judge_hard_links(self, tree, name, info):
        """A file with several names leaves only if all of them are in the tree, and may."""
        names = tree.hard_links_of(info)
        if len(names) != info.st_nlink:
            raise Stays("outside", "a hard link")
        for one in sorted(names):
            self.apply_rule(name, rule_against_name(self.rules, one.decode("utf-8", "replace")))

    def judge(self, tree, name, real, result):
        """Adds the Result of a file by its bytes. result: no log (which may grow, and have names elsewhere).
        Stays, OSError."""
        fd = tree.open(real)
        try:
            for look in range(READ_TRIES):
                info = os.fstat(fd)
                self.check_limits(info.st_size)
                if self.has_rules and result and info.st_nlink > 1:
                    self.judge_hard_links(tree, name, info)
                mark = info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
                if name in self.known and self.known[name][0] == mark:
                    return self.accept(mark, self.known[name][1])
                whole, parts = self.sums_or_hold(name, fd, info.st_size, not result)
                after = os.fstat(fd)
                if not result or (after.st_size, after.st_mtime_ns) == (info.st_size, info.st_mtime_ns):
                    break
            else:
                raise Stays("changing")
        finally:
            os.close(fd)
        source = JudgedBytes(tree, real, info.st_size, parts)
        self.accept(mark,
                    Result(source, info.st_size, name, whole, bool(info.st_mode & 0o100), info.st_mtime_ns))

    def sums_or_hold(self, name, fd, length, log):
        """judged_sums(); also of what waits for a person. log: is it one? Stays."""
        self.held.pop(name, None)
        try:
            return self.judged_sums(fd, length, name, log)
        except Stays as stays:
            if stays.code != "held":
                raise
            self.hold(name, str(stays))
            return sums_of_file(fd, length)

    def hold(self, name, why):
        """This one, which is about to be taken, leaves only after a person's word: see the block hold."""
        self.note(name, "held: " + why, True)
        self.held[name] = why

    def refuse_held(self):
        """The word was no: what was held stays here."""
        for group in (self.found, self.folders):
            group.leave_out(set(self.held))
        for name in sorted(self.held):
            self.keep_here(name, Stays("refused", "hold"), name in self.named)
        self.held, self.total = {}, sum(one.size for one in self.found)

    def judged_sums(self, fd, length, name, log):
        """As sums_of_file(), of what the rules about contents let pass. log: is it one? Stays."""
        if self.scanner is None:
            return sums_of_file(fd, length)
        try:
            return self.scanner.file(name, declared_type(self.rules, name, log), fd, length)
        except Stays as stays:
            if stays.code == "changing":
                raise
            self.apply_rule(name, str(stays), stays.code)
        return sums_of_file(fd, length)

    def accept(self, mark, result):
        """This one leaves."""
        result.source.tree.changed.discard(result.source.real)
        self.found.append(result, mark)
        self.total += result.size

    def in_order(self):
        """Puts all in a manifest's order, that of their parts; what another receiver could not tell apart
        stays here."""
        for group in (self.found, self.folders):
            group.sort(key=lambda name: "\0".join(nfc_parts(name)))
            last, twins = None, set()
            for name in group.names():
                parts = nfc_parts(name.rstrip("/"))
                if last is not None and parts[:len(last)] == last:
                    twins.add(name)
                else:
                    last = parts
            group.leave_out(twins)
            for name in sorted(twins):
                self.keep_here(name, Stays("name"), name in self.named)
        if self.scanner is not None:
            self.scanner.close()
        if self.rules["dry_run"]:
            self.note("", "dry_run: the rules tell, and keep nothing here", True)
        if self.hold_all or self.held:                 # (with dry_run, too: `hold` is no rule on trial)
            names = list(self.found.names()) + list(self.folders.names())
            self.held = {name: self.held.get(name, "hold") for name in names
                         if self.hold_all or name in self.held}
        return self


def may_match_below(text, name):
    """Could the result pattern `text` match something below the directory `name`?"""
    shape, parts = text.split("/"), name.split("/")
    for place, part in enumerate(parts):
        if "**" in shape[place] or not shape[place] and place == len(shape) - 1:
            return place or not part.startswith(".") or not text.startswith(("*", "?"))
        first = "" if place == 0 else "x/"             # only at the beginning no wildcard is a dot
        if place == len(shape) - 1 or not compile_pattern(first + shape[place]).match(first + part):
            return False
    return True
# ==== end shared ====


# ==== shared: watch ====
# One run, from its order to what may leave of it: permitted, started once ever, watched and ended, collected.
# RUN is ACCEPT_ID.N, or the SSH runner's UUID. A door gives the order and carries away what may leave;
# nothing here knows to whom. What a run remembers is in its control directory: `journal`, and the files of
# the wrapper (see run) or of its batch system's job.
# The owner's words that are noted at the start, should they vanish:
NOTED_KEYS = ("batch", "after_stop", "patterns", "logs", "hold", "leftovers", "grace", "timeout")
COLLECT_ROUNDS = 50  # times that results are looked at anew because some change while they are sent
FULL_BELOW = 1 << 20           # bytes: with less, a command that failed has probably failed of it
FULL_WORDS = {                       # as programs say it in English
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded"}


class Journal:
    """JSON lines in a file (bytes path), each on disk before note() returns. What a crash has torn is left
    out."""

    def __init__(self, path, needed=True):
        self.path = path
        self.entries = []
        line = b"\n"
        if not needed and not os.path.lexists(path):
            self.torn = False
            return
        with open(path, "rb") as text:
            for line in text:
                try:
                    self.entries.append(dict(json.loads(line.decode("utf-8"))))
                except (ValueError, TypeError, RecursionError):
                    pass                               # torn by a crash
        self.torn = not line.endswith(b"\n")

    def last(self, what):
        """The last entry of that kind, or None."""
        return next((entry for entry in reversed(self.entries) if entry.get("what") == what), None)

    def note(self, step, what, **more):
        """One line; its step is the suite's number. OSError if the disk is full: then it is not there."""
        entry = dict({"t": round(time.time(), 3), "boot": boot_id(), "step": step, "what": what}, **more)
        new = not os.path.lexists(self.path)
        fault(what + " unnoted")
        with open(self.path, "ab", buffering=0) as out:
            data, self.torn = (b"\n" if self.torn else b"") + json.dumps(entry).encode() + b"\n", True
            if out.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), out.name)
            os.fsync(out.fileno())
        if new:
            sync_path(os.path.dirname(self.path))
        self.torn = False
        self.entries.append(entry)
        fault(what + " noted")


class Gate:
    """What all runs below one base share in this process. folder: base/.mi, bytes."""

    def __init__(self, folder, commands):
        self.folder = folder
        self.commands = commands                       # {word on the wire: its section}
        self.orders = OrderRules(folder)               # which orders run
        self.queues = {}                               # of batch systems: {key: BatchQueue}
        self.running = set()                           # the runs that are
        self.licences = threading.Condition()          # of these, and of who waits for a licence (`jobs`)

    def begin_running(self, run, licence=False):
        """run counts as running. licence: but first it waits until fewer than `jobs` of its command do, or it
        is cancelled."""
        def others():
            return sum(other is not run and other.order["command"] == run.order["command"]
                       for other in self.running)
        with self.licences:
            while licence and not run.told_to_end() and 0 < run.command["jobs"] <= others():
                self.licences.wait(1)
            self.running.add(run)

    def end_running(self, run):
        """run does not count as running any more."""
        with self.licences:
            self.running.discard(run)
            self.licences.notify_all()

    def queue(self, system, env):
        """The one BatchQueue for a batch system and a configuration of its programs."""
        which = (system, tuple(sorted(env.items())))
        with self.licences:
            return self.queues.setdefault(which, BatchQueue(self.folder, system, env))


class GateRun:
    """One run. gate: its Gate, None where it is only looked at; name: RUN, the mark of its processes; ident:
    what log lines name; work, control: its directories, bytes; order: {"command": the word on the wire,
    "parameters": text, "result_files": {name: …}, "result_patterns": [text], perhaps "signed"}; logs: [(name,
    directory, file there)] of what the command writes, its errors last; log_fields: {key: value} for log
    lines."""

    def __init__(self, gate, name, ident, work, control, order, logs, log_fields):
        self.gate = gate
        self.name = name
        self.ident = ident
        self.work = work
        self.control = control
        self.order = order
        self.logs = logs
        self.log_fields = log_fields
        self.journal = Journal(os.path.join(control, b"journal"))
        self.mark = b"MI_RUN=" + name.encode()
        self.command = None                            # its section, once it is permitted or watched,
        self.argv = []                                 # and what it runs
        self.signed = {}                               # the order, as it was signed,
        self.permitted_by = None                       # and the OrderRules that said so
        self.cancelled = False
        self.unkillable = []                           # pids
        self.wrapper = None                            # its Popen, if this process has started it
        self.job = None                                # its BatchJob
        self.post_failed = ""                          # what was wrong with `post`
        self.trees = {}                                # {directory: its ResultTree}
        self.kept_count = 0                            # how much of what was asked for is kept here
        # of a batch system's job:
        self.said = ""                                 # where it is
        self.began = None                              # its start, in time.monotonic()
        self.pause = 0.05                              # seconds until it is looked at again

    def path(self, *parts):
        """A file of the control directory."""
        return os.path.join(self.control, *parts)

    def last(self, what):
        """The last entry of the journal of that kind, or None."""
        return self.journal.last(what)

    def told_to_end(self):
        """Was it cancelled, by its carrier or by a door of another process?"""
        return self.cancelled or os.path.exists(self.path(b"cancelled"))

    def never_started(self):
        """Can it still be said that nothing of it was ever started?"""
        return command_state(self.control, time.time())[0] == "ready" and not read_batch(self.control)

    def state(self):
        """For people: claimed, starting, queued, running, lost, ended."""
        if self.last("ended"):
            return "ended"
        if read_batch(self.control):
            found = batch_command_state(self.control)[0]
            return {"ready": "queued", "stopped": "lost"}.get(found, found)
        found = command_state(self.control, time.time())[0]
        waits = "starting" if self.last("starting") else "claimed"
        return {"ready": waits, "elsewhere": "running"}.get(found, found)

    def add_to_stderr(self, text):
        """A line of ours at the end of the command's stderr."""
        with open(self.path(b"stderr"), "ab") as out:
            out.write(("%s: %s\n" % (PROGRAM, printable(text))).encode("utf-8"))

    # The start

    def permit(self, inputs=()):
        """Section and argument vector by the owner's rules as they are now. inputs: names of those that are
        here. ValueError if it may not run."""
        order = self.order
        self.command, self.argv = permit_command(self.gate.commands, order["command"],
                                                 shell_words(order["parameters"]))
        permit_results(self.command, order["result_patterns"])
        for name in inputs:
            permit_input(self.command, name)
        for name in order["result_files"]:
            check_name(name)
        compile_patterns(order["result_patterns"])
        self.permit_order()

    def permit_order(self):
        """What was signed of it. Forbidden if that does not allow it (any more)."""
        wanted = {key: self.order[key] for key in ("command", "parameters", "result_patterns")}
        wanted["result_files"] = sorted(self.order["result_files"])
        now, self.permitted_by = None if self.last("starting") else time.time(), self.gate.orders
        self.signed = self.gate.orders.permit(self.order.get("signed", ""), wanted, self.command, now)

    def permit_inputs(self, rows):
        """Forbidden if these inputs (rows: see sum_of_manifest()) are not those that were signed."""
        if self.signed and sum_of_manifest(rows) != self.signed["inputs"]:
            raise Forbidden(_("this order does not run here: %s")
                            % _("its inputs are not those that were signed"))

    def permit_files(self, rows):
        """Forbidden if more lies in the working directory of a signed order than these inputs: a carrier that
        was killed may have left there what it had been told before."""
        tree, names = ResultTree(self.work), {utf8(row[0]) for row in rows}
        try:
            more = self.signed and next((row[0] for row in tree.walk() if row[0] not in names), None)
        finally:
            tree.close()
        if more:
            raise Forbidden(_("this order does not run here: %s")
                            % _("its inputs are not those that were signed"))

    def ended_by_restart(self):
        """Did this host go down when it was about to start, or was that on another host? Then nobody knows
        whether it did: it ends without its command."""
        starting, here = self.last("starting"), os.uname().nodename
        if not starting or starting["boot"] == boot_id() or starting.get("batch", "none") != "none":
            return False
        host, why = printable(starting.get("host", here)), "the host was restarted"    # (older notes: none)
        away = "was about to be started on %s, and nothing tells whether it was"
        self.end_early(*(away % host, _(away) % host) if host != here else (why, why), state="lost")
        return True

    def note_starting(self):
        """With a licence, it is noted that it starts: from here on it does so once ever, and only in this
        boot. False if it was cancelled."""
        self.gate.begin_running(self, licence=True)
        if self.told_to_end():
            self.end_early("cancelled", "cancelled")
            return False
        try:
            if self.signed and self.permitted_by is not self.gate.orders:          # the ini has changed
                self.permit_order()
            self.gate.orders.use(self.signed, self.command, self.control, time.time())
        except Forbidden as error:
            self.end_early("refused", error)
            return False
        self.journal.note(5, "starting", host=os.uname().nodename, argv=self.argv,
                          **{key: self.command[key] for key in NOTED_KEYS})
        return True

    def start(self):
        """`pre`, then the command, here or by its batch system; or a journal that says why it ended."""
        if not self.run_hook("pre"):
            return
        if self.command["batch"] != "none":
            return self.submit()
        self.audit_start(self.command["name"])
        self.wrapper = start_wrapper(self.control, self.work, self.argv, self.env())
        fault("wrapper started")
        log("info", self.ident, "5 calc-start", **dict(self.log_fields, command=self.command["name"]))

    def submit(self):
        """The command goes to its batch system."""
        self.job = self.batch_job(self.command["batch"])
        self.audit_start(self.command["name"])
        try:
            self.job.begin(self.work, self.argv, self.env(), self.name, self.command["options"])
        except ValueError as error:
            return self.end_early("refused", error)
        log("info", self.ident, "5 calc-start", **dict(
            self.log_fields, command=self.command["name"], batch=self.command["batch"],
            job=self.job.submission["job"] or "?", why=self.job.why))

    def audit_start(self, what):
        """Notes that it is started now: its command, or one of its hooks."""
        audit("start", self.name, command=what, argv=sum_of_bytes(canonical(self.argv)), words=len(self.argv))

    def env(self):
        """All that the command sees of this program's environment."""
        return command_env(self.command, self.work, self.name)

    def batch_job(self, system):
        """Its BatchJob."""
        queue = self.gate.queue(system, batch_env(self.command))
        return BatchJob(self.control, queue, self.command["batch_poll"], self.command["batch_grace"], fault)

    def run_hook(self, key):
        """`pre` or `post` of the command, on this host: at most once, by a wrapper of its own in the control
        directory. False if it failed: then the run has ended (pre), or its end says so (post)."""
        control = self.path(utf8(key))
        if not self.command[key]:
            return True
        self.make_hook(key, control)
        wrapper, state = None, command_state(control, time.time())

        def stop():
            return key == "pre" and self.told_to_end()

        if state[0] == "ready" and self.last(key)["boot"] == boot_id() and not stop():
            log("info", self.ident, "5 pre" if key == "pre" else "6 post", argv=" ".join(self.command[key]))
            self.audit_start("%s %s" % (self.command["name"], key))
            wrapper = start_wrapper(control, self.work, list(self.command[key]), self.env())
            state = wait_end(control, stop)
        while state[0] in ("running", "starting", "elsewhere"):
            if stop():
                self.kill(control)
            until = time.monotonic() + 2
            state = wait_end(control, lambda: time.monotonic() > until)
        if wrapper is not None:
            wrapper.wait()
        if state == ("ended", 0):
            return True
        self.note_hook_failure(key, control, state, stop())
        return False

    def note_hook_failure(self, key, control, state, stopped):
        """What was wrong with `pre` or `post`, in the stderr log; the run ends (pre), or its end says so."""
        why = "exit code %s" % state[1] if state[0] == "ended" else state[1] or "not started"
        why = "cancelled" if stopped else "%s: %s" % (key, why)
        for line in tail_of(os.path.join(control, b"stderr")):
            self.add_to_stderr("%s: %s" % (key, line))
        if key == "pre":
            return self.end_early(why, why)
        self.post_failed = why

    def make_hook(self, key, control):
        """The control directory of `pre` or `post`; it is there as a whole or not at all."""
        if not os.path.isdir(control):
            remove_tree(control + b".new")
            os.mkdir(control + b".new", 0o700)
            prepare_control(control + b".new")
            self.journal.note(5 if key == "pre" else 6, key)
            os.rename(control + b".new", control)
            sync_path(self.control)
            fault(key + " made")

    def end_early(self, reason, text, state="ended"):
        """It ends without its command: reason for who asked, text for people, in the stderr log and here.
        state: lost if nobody knows whether it ran."""
        self.add_to_stderr(text)
        more = ": %s" % text if reason in ("refused", "input", "disk") else ""
        self.audit_end(None, reason, state)
        self.journal.note(6, "ended", state=state, exit_code=None, reason=reason + more)
        self.gate.end_running(self)
        log("warn", self.ident, "6 calc-end", reason=reason, why=text)

    # The end

    def follow_to_end(self):
        """Waits for the command's end, then `post`, and writes the journal's "ended"."""
        self.gate.begin_running(self)
        self.command = (self.command or self.gate.commands.get(self.order["command"])
                        or self.section_as_noted())
        watch = self.wait_in_batch if read_batch(self.control) else self.wait_on_this_host
        state, detail, why = watch()
        if self.wrapper is not None:
            self.wrapper.wait()
        self.end_leftovers()
        if self.command["post"]:
            self.run_hook("post")
            self.end_leftovers()
        self.note_end(state, detail, why)
        self.gate.end_running(self)

    def note_end(self, state, detail, why):
        """The journal's "ended". state, detail: command_state()'s; why: we ended it for that."""
        child, end = read_note(self.path(b"child")), read_note(self.path(b"end"))
        code = detail if state == "ended" else None
        reason = why or self.why_failed(state, detail)
        if reason:
            self.add_to_stderr(reason)
        signalled = code - 128 if code and 128 < code < 193 else None
        self.audit_end(code, reason, state)
        self.journal.note(6, "ended", state="lost" if state == "lost" else "ended", exit_code=code,
                          signal=signalled, reason=reason, whole=state == "ended",
                          stopped=bool(why or signalled), started=child and round(child.time, 3),
                          ended=end and round(end.time, 3))
        log("info", self.ident, "6 calc-end", **dict(self.log_fields, exit_code=code, reason=reason))

    def audit_end(self, code, reason, state):
        """Notes how it ended. reason: without what follows its colon, which may be the command's own text."""
        why = str(reason).partition(":")[0][:60]
        audit("refused" if why == "refused" else "end", self.name, synced=False,
              command=self.order["command"][:100], code=code, why=why, state=state)

    def why_failed(self, state, detail):
        """What was wrong with a command that has ended by itself, or ""."""
        if state == "lost":
            return detail
        if state != "ended" or detail is None:
            return "could not be started"
        return self.post_failed or self.why_disk_full(detail)

    def section_as_noted(self):
        """The section of a command that the ini does not name any more, as far as the journal has it."""
        keys, starting = default_values(gate_keys()["command *"]), self.last("starting") or {}
        return dict(keys, env={}, **{key: starting[key] for key in NOTED_KEYS if key in starting})

    def wait_on_this_host(self):
        """Waits for the command's end, makes it end after timeout or cancel: command_state()'s state and
        detail, and why we ended it ('': no)."""
        why = (self.last("stopping") or {"why": ""})["why"]              # whoever watched it before was at it
        self.say_elsewhere("5 runs on another host, and only its files tell here")
        state, detail = wait_end(self.control, lambda: why or self.due_to_end())
        while state not in ("ended", "lost"):
            if not why:
                why = self.note_stopping(self.due_to_end())
                self.say_elsewhere("6 cannot be ended from here")
            if state == "ready":
                try:
                    os.unlink(self.path(b"ready"))     # from now on it cannot start any more
                    break
                except FileNotFoundError:
                    pass                               # it did, just now
            self.kill()
            until = time.monotonic() + 0.5
            state, detail = wait_end(self.control, lambda: time.monotonic() > until)
        return state, detail, why

    def say_elsewhere(self, step):
        """A line in the log, if the command runs on another host, which has this disk, too."""
        state, note = command_state(self.control, time.time()) if self.wrapper is None else ("", None)
        if state == "elsewhere":
            log("warn", self.ident, step, runs_on=note.host)

    def due_to_end(self):
        """Why a command of this host must end now, or ''."""
        limit = self.command["timeout"]
        child = read_note(self.path(b"child")) if limit else None
        gone = self.wrapper is not None and self.wrapper.poll() is not None
        if gone and command_state(self.control, time.time())[0] == "ready":
            return "could not be started"              # the wrapper was killed before it did anything
        if child and child.boot == boot_id() and seconds_since(child.start) > limit:
            return "timeout"
        return "cancelled" if self.told_to_end() else ""

    def note_stopping(self, why):
        """why it is ended, noted for whoever watches it next."""
        try:
            self.journal.note(6, "stopping", why=why)
        except OSError:
            pass                                       # a full disk keeps nobody from ending it
        return why

    def wait_in_batch(self):
        """The same where a batch system has the command."""
        job = self.job = self.job or self.batch_job(read_batch(self.control)["system"])
        why = (self.last("stopping") or {"why": ""})["why"]
        while True:
            job.tells_log = {"logs", "hold"} & self.leaving_kinds() == {"logs"}
            state, detail = job.current_state()
            if state in ("ended", "lost"):
                return state, detail, why or (job.why if state == "ended" else "")
            late = self.late_in_batch()
            if job.where != self.said:
                self.said, self.pause = job.where, 0.05
                log("info", self.ident, "5 " + state, batch=job.queue.system,
                    job=job.submission["job"] or "?", what=job.where)
            if not why and (late or self.told_to_end()):
                why = self.note_stopping("timeout" if late else "cancelled")
            if why:
                job.stop(self.command["grace"])
            self.pause = min(self.pause * 1.5, 1.0 if state == "running" else 2.0)
            self.rest(self.pause)

    def late_in_batch(self):
        """Has a batch system's command run for longer than its timeout? Once its start was seen, a clock that
        is set ends nothing."""
        limit = self.command["timeout"]
        child = read_note(self.path(b"child")) if limit and self.began is None else None
        if child:                                      # (at the first look it may have run for long)
            self.began = time.monotonic() - (0 if self.said else max(0, time.time() - child.time))
        return self.began is not None and time.monotonic() - self.began > limit

    def rest(self, seconds):
        """Nothing is to be done for it for so long."""
        time.sleep(seconds)

    def kill(self, control=None):
        """Ends the command with all that descends from it. control: the wrapper's directory, if it is not the
        command's."""
        left = stop_command(control or self.control, self.mark, self.command["grace"])
        if left and left != self.unkillable:
            log("error", self.ident, "6 processes that SIGKILL does not end", pids=" ".join(map(str, left)))
        self.unkillable = left

    def end_leftovers(self):
        """Ends what the command has left running in its directory (leftovers = end)."""
        child = read_note(self.path(b"child"))
        here = child is not None and child.boot == boot_id() and child.host == os.uname().nodename
        if self.command["leftovers"] == "leave" or not here or not child.start.isdigit():
            return
        count, left = end_left_overs(self.work, int(child.start), self.mark, self.command["grace"], child.pid)
        if count:
            log("warn", self.ident, "6 left-overs ended", processes=count,
                still_there=" ".join(map(str, left)) or "none")

    def why_disk_full(self, code):
        """Why a command that failed has probably failed: there is no room where it works, or it says so; or
        ""."""
        if not code:
            return ""
        said = "\n".join(tail_of(os.path.join(*self.logs[-1][1:])))
        for error in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(error) in said or FULL_WORDS[error] in said:
                return "disk: %s (the command's own words)" % FULL_WORDS[error]
        try:
            disk = os.statvfs(self.work)
        except OSError:
            return ""
        full = disk.f_bavail * disk.f_frsize < FULL_BELOW or not disk.f_favail
        return "disk: %s: no room is left there" % shown(self.work) if full else ""

    # What leaves

    def leaving_kinds(self):
        """leaving_kinds() of it, by its section as it is now; if there is none any more, as it was when the
        command was started. What never began leaves nothing that a person would have to look at."""
        starting, end = self.last("starting") or {}, self.last("ended") or {}
        section = self.gate.commands.get(self.order["command"]) or starting
        stopped = end.get("stopped", end.get("reason") or end.get("signal"))
        kinds = leaving_kinds(dict({"after_stop": "", "hold": True}, **section), stopped)
        return kinds if starting else kinds - {"hold"}

    def tree(self, path):
        """The ResultTree of one of its directories, open until close_trees(). OSError."""
        if path not in self.trees:
            self.trees[path] = ResultTree(path)
        return self.trees[path]

    def close_trees(self):
        while self.trees:
            self.trees.popitem()[1].close()

    def collect(self, rules, kinds, known=(), changing=()):
        """The Collector of what was asked for: the logs, then what was declared by name, then by pattern (not
        where the end is unknown). rules: [outbound]; kinds: see leaving_kinds(); known, changing: see
        Collector."""
        found = Collector(rules, self.note_stay, known, changing)
        found.hold_all = "hold" in kinds
        if "logs" in kinds:
            self.collect_logs(found)
        logs, end = tuple(name for name, folder, file in self.logs), self.last("ended")
        names = set(self.order["result_files"]) - set(logs)
        asked = {"names": names, "patterns": self.order["result_patterns"]}
        if not end.get("whole"):
            self.keep_all(found, {"names": names}, Stays("missing", end["reason"]))
            return found.in_order()
        self.keep_all(found, {kind: asked.pop(kind) for kind in list(asked) if kind not in kinds},
                      Stays("refused", "after_stop"))
        try:
            tree = self.tree(self.work)
        except OSError as error:                       # (not readable, a link, or not there any more)
            link = error.errno in (errno.ENOTDIR, errno.ELOOP)
            self.keep_all(found, asked, Stays("outside", error.strerror) if link else stays_for(error))
            return found.in_order()
        found.take_named(tree, asked.get("names", ()), logs)
        if asked.get("patterns"):
            found.take_matching(tree, asked["patterns"], names, logs)
        return found.in_order()

    def note_stay(self, name, why, aloud):
        """For the owner's log: what stays here, and by which rule. aloud: as a warning."""
        step = "7 leaves all the same" if why.startswith("dry_run: ") else "7 stays here"
        log("warn" if aloud else "debug", self.ident, step, name=name, why=why)

    def collect_logs(self, found):
        """What the command has written, into a Collector."""
        for name, folder, file in self.logs:
            if folder == self.control:
                open(os.path.join(folder, file), "ab").close()           # there, even if nothing ran
            try:
                found.take_log(self.tree(folder), name, file)
            except (OSError, Stays) as error:
                found.keep_here(name, stays_for(error), False)

    @staticmethod
    def keep_all(found, asked, stays):
        """None of these {"names" or "patterns": what was asked for} leaves."""
        for kind, group in asked.items():
            for name in sorted(group):
                found.keep_here(name, stays, kind == "names")

    def count_kept(self, found):
        """How much of what was asked for stays here."""
        self.kept_count = sum(entry["count"] for code, entry in found.verdicts.items() if code != "missing")

    def collect_until_steady(self, rules, kinds):
        """Collectors, one after the other, as long as results change while they are sent. From the second
        time on, what has changed is left out for good (`changing`); from the third on, also what is another
        one at each look. ValueError if there is no end to it."""
        known, before, changing = {}, {}, set()
        for turn in range(COLLECT_ROUNDS):
            found = self.collect(rules, kinds, known, changing)
            if turn > 1:
                found.drop_changing({result.name for result in found.found
                            if before.get(result.name, result.digest) != result.digest})
                changing.update(found.changing)
            self.count_kept(found)
            yield found
            now = {result.name for result in found.found if result.source.changed}
            changing |= now if turn else set()
            known = {entry[1].name: entry for entry in found.found.with_stamps()
                     if entry[1].name not in now and entry[1].name not in found.held}
            before = {result.name: result.digest for result in found.found}
            log("warn", self.ident, "7 changed while it was sent", names=" ".join(sorted(now))[:300])
        raise ValueError("results change again and again")


def batch_env(command):
    """What a batch system's own programs see of this program's environment, and of the command's where it
    concerns them."""
    env = {key: value for key, value in os.environ.items() if PASSED_ENV.match(key) or CLIENT_ENV.match(key)}
    env.update((key, value)
               for key, value in command["env"].items() if CLIENT_ENV.match(key) or key == "PATH")
    return env


def tail_of(path):
    """The last lines of a text file; none if it is not there."""
    try:
        with open(path, "rb") as text:
            text.seek(-min(4000, os.fstat(text.fileno()).st_size), 2)
            return text.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
# ==== end shared ====


# ==== shared: content ====
# What the owner's rules about content look for in all that leaves: results and logs, names, reasons, error
# texts. A process of its own looks: with limits of memory and time, without a token or a directory; it gets
# what it is to look at over a socket, as open files. Its program is the text LOOKING, compiled only where
# there are such rules (each line would cost every start). It looks at the bytes as they are, at what they are
# as text of other encodings, and into what is packed. What it finds is refused. What it cannot look into, has
# no time or room for, whatever makes it fail, is held: nothing leaves because looking has failed. Outward
# goes that code alone; which rule, and where, is for the owner.
CONTENT_KEYS = ("deny_content", "deny_sums", "deny_pieces", "types")
UNWRAP = ("gzip", "bz2", "xz", "zip", "tar", "base64", "hex", "percent")
SCANNER = """
import marshal, socket
line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=0)
exec(marshal.loads(line.recv(int(line.recv(8, socket.MSG_WAITALL)), socket.MSG_WAITALL)))
scan_for(line)
"""
LOOKING = r'''
import array, base64, binascii, functools, hashlib, io, itertools, json, mmap, os, re, resource, select
import socket, struct, tempfile, time, warnings
SCAN_MEMORY = 256 << 20        # bytes of address space
WINDOW = 2 << 20               # bytes looked at at once,
OVERLAP = 128 << 10            # the last of them again with the next ones: a longer match may be missed
RUN_MOST = 16 << 20            # bytes of one text in base64 or hex
UNWRAP_DEPTH = 4               # things packed in one another
UNWRAP_SIZE = 1 << 30          # bytes unpacked of one file,
UNWRAP_FREE, UNWRAP_RATIO = 16 << 20, 250  # and no more than this, and so many for each of its own
UNWRAP_MEMBERS = 10000         # files in one archive


class Hit(Exception):
    """Something was found; the text is for the owner: the rule, and where."""


class Held(Exception):
    """Something cannot be looked into; the text says why."""


# The line: a length, then JSON; with a request comes the open file

def send_words(line, words, fds=()):
    """Sends a message. OSError."""
    data, rights = json.dumps(words).encode(), []
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
    line.sendmsg([struct.pack("<Q", len(data))], rights)
    line.sendall(data)


def receive_words(line, until=None):
    """(the next message, [descriptors]); (None, ...) at the end of all, or at `until` (time.monotonic())."""
    ready, fds, data, want = select.poll(), [], b"", 8
    ready.register(line, select.POLLIN)
    while len(data) < want:
        if not ready.poll(None if until is None else max(0, until - time.monotonic()) * 1000):
            return None, fds
        more, rights = line.recvmsg(min(want - len(data), 1 << 20), 64)[:2]
        for level, kind, sent in rights:
            fds += array.array("i", sent)
        if not more:
            return None, fds
        data += more
        if len(data) == want == 8:
            want += struct.unpack("<Q", data)[0]
    return json.loads(data[8:].decode()), fds


def scan_for(line):
    """The process: answers over the socket `line` until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_AS, (SCAN_MEMORY, SCAN_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    scan, rules = None, receive_words(line)[0]
    while True:
        words, fds = receive_words(line)
        if words is None:
            return
        try:
            scan = scan or Scan(rules)
            answer = scan.answer(words, fds)
        except Hit as hit:
            answer = {"code": "refused", "why": str(hit)}
        except EOFError:
            answer = {"code": "changing", "why": "changed while it was looked at"}
        except Exception as error:                     # no memory, a broken archive: not all of it was seen
            answer = {"code": "held", "why": why_of(error)}
        for fd in fds:
            os.close(fd)
        send_words(line, answer)


def why_of(error):
    """A failure, for the owner."""
    return str(error) if isinstance(error, Held) else "%s: %s" % (type(error).__name__, error)


# A file, and what is in it

class SteadyFile(io.RawIOBase):
    """The first `size` bytes of an open file, in pieces. What is read again is what was read first, or
    EOFError."""

    def __init__(self, fd, size, piece):
        self.fd = fd
        self.size = size
        self.piece_size = piece
        self.at = 0
        self.whole = hashlib.sha256()
        self.sums = []                                 # of the pieces that were read so far
        self.number = -1                               # of the piece in memory
        self.piece = b""

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, at, whence=0):
        self.at = at + (0, self.at, self.size)[whence]
        return self.at

    def tell(self):
        return self.at

    def load(self, number):
        """Piece `number` into memory."""
        begin, data = number * self.piece_size, b""
        end = min(begin + self.piece_size, self.size)
        while begin + len(data) < end:
            more = os.pread(self.fd, end - begin - len(data), begin + len(data))
            if not more:
                raise EOFError
            data += more
        found = hashlib.sha256(data).digest()
        if number == len(self.sums):
            self.sums.append(found)
            self.whole.update(data)
        if self.sums[number] != found:
            raise EOFError
        self.number, self.piece = number, memoryview(data)

    def readinto(self, view):
        """Fills view as far as the piece goes; returns the number of bytes, 0 at the end."""
        if self.at >= self.size:
            return 0
        number, begin = divmod(self.at, self.piece_size)
        if number != self.number:
            self.load(number)
        part = self.piece[begin:begin + len(view)]
        view[:len(part)] = part
        self.at += len(part)
        return len(part)


class Scan:
    """What the rules look for; files and texts are looked at one after the other."""

    def __init__(self, rules):
        self.rules = rules
        self.shapes = [(number, re.compile(text.encode()), must_hold(text.encode()))
                       for number, text in enumerate(rules["deny_content"], 1)]
        self.indexes = [Index(path) for path in rules["deny_pieces"]]
        self.unpacked = 0                              # bytes unpacked of this file
        self.room = 0                                  # so many may be
        self.held = ""                                 # what of it could not be looked into

    def answer(self, words, fds):
        """The answer to a request. Hit, Held, EOFError."""
        self.unpacked, self.held, self.room = 0, "", UNWRAP_FREE
        until = int(time.process_time() + self.rules["scan_timeout"]) + 2      # if nobody is there to end it
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        for index in self.indexes:
            index.check()
        answer = {"code": "", "why": ""}
        self.look(io.BytesIO(words["text"].encode("utf-8", "replace")), words["what"], 0)
        if fds:
            answer.update(self.look_at_file(fds[0], words["length"], words["kind"]))
        if self.held:
            raise Held(self.held)
        return answer

    def look_at_file(self, fd, length, kind):
        """Looks at the first `length` bytes of an open file: their sums. Hit, EOFError."""
        raw = SteadyFile(fd, length, self.rules["piece"])
        if not length:
            raw.load(0)
        source = io.BufferedReader(raw, raw.piece_size)
        self.room = min(UNWRAP_SIZE, UNWRAP_FREE + UNWRAP_RATIO * length)
        self.look(source, "", 0)
        try:
            source.seek(0)
            check_kind(kind, source)
        except ValueError as error:
            self.held = self.held or "types: %s: %s" % (kind, error)
        return {"whole": raw.whole.hexdigest(), "sums": binascii.b2a_base64(b"".join(raw.sums)).decode()}

    def look(self, source, place, depth):
        """Looks at a file, and into what is packed there. place: how it is called for the owner; depth: in
        how many others it is packed. Hit, EOFError."""
        whole, keep, at, within, last = hashlib.sha256(), b"", 0, "", False
        while not last:
            data = source.read(WINDOW)
            whole.update(data)
            window, start, last = keep + data, at - len(keep), len(data) < WINDOW
            at += len(data)
            if window.count(0) == len(window):
                keep = window[-OVERLAP:]               # a hole
                continue
            keep = window[self.look_at(window, start, place, depth, last):]
            within = within or packed_within(window, start)
        if whole.hexdigest() in self.rules["deny_sums"]:
            raise Hit("deny_sums: %s" % (place or "the whole"))
        try:
            self.look_into(source, at, place, depth, within)
        except (Hit, EOFError):
            raise
        except Exception as error:
            self.held = self.held or "%s: %s" % (place or "the whole", why_of(error))

    def look_into(self, source, size, place, depth, within):
        """Looks at what is packed in a file of this size. within: see packed_within(). Held, and whatever
        else is wrong with it."""
        word = packed_as(source, size)
        if word is None and not within:
            return
        if word is None or word not in self.rules["unwrap"] or word not in UNPACKERS:
            raise Held("not looked into: %s" % (word or within))
        self.deeper(depth)
        source.seek(0)
        for count, (name, blocks) in enumerate(UNPACKERS[word](source, size)):
            if count >= UNWRAP_MEMBERS:
                raise Held("more than %d files" % UNWRAP_MEMBERS)
            inner = " in ".join(filter(None, (name, word, place)))
            with self.spooled(blocks) as one:
                self.look(one, inner, depth + 1)

    def deeper(self, depth):
        """Held if nothing more is unpacked at this depth."""
        if depth >= UNWRAP_DEPTH:
            raise Held("more than %d things packed in one another" % UNWRAP_DEPTH)

    def spooled(self, blocks):
        """A file of these blocks: in memory, or if it is large in a file without a name. Held over the
        limits."""
        found = io.BytesIO()
        for block in blocks:
            self.unpacked += len(block)
            if self.unpacked > self.room:
                raise Held("more than %d bytes unpacked" % self.room)
            if isinstance(found, io.BytesIO) and found.tell() > WINDOW:
                small, found = found, tempfile.TemporaryFile()
                found.write(small.getvalue())
            found.write(block)
        found.seek(0)
        return found

    def look_at(self, window, start, place, depth, last):
        """Looks at a window of a file, from byte `start` on; last: it ends there. Returns from where on it is
        looked at again with the next one. Hit."""
        for encoding, text in views_of(window, start) if self.shapes or self.indexes else ():
            here = " in ".join(filter(None, ("byte %d" % start, encoding, place)))
            self.look_for_shapes(text, here)
            for index in self.indexes:
                index.look(text, here)
        again = max(0, len(window) - OVERLAP)
        for word, shape, needs, decode in TEXT_PACKED:
            for found in shape.finditer(window) if word in self.rules["unwrap"] and needs(window) else ():
                if found.end() == len(window) and not last:
                    again = min(again, found.start())  # it may go on
                    continue
                self.look_into_text(word, found.group(), decode, " in ".join(
                    filter(None, ("%s at byte %d" % (word, start + found.start()), place))), depth)
        if len(window) - again > RUN_MOST:
            self.held = self.held or "%s: a text of more than %d bytes in base64 or hex" % (place, RUN_MOST)
            again = len(window) - OVERLAP
        return again

    def look_into_text(self, word, text, decode, place, depth):
        """Looks at what a text in base64, hex or percent is. Hit."""
        try:
            self.deeper(depth)
            found = [data for data in decode(text) if data not in text]
        except (ValueError, Held) as error:
            self.held = self.held or "%s: %s" % (place, why_of(error))
            return
        for data in found:
            self.look(io.BytesIO(data), place, depth + 1)

    def look_for_shapes(self, text, place):
        """Hit if one of deny_content is found."""
        lower = text.lower() if self.shapes else b""
        for number, shape, needed in self.shapes:
            found = shape.search(text) if needed in lower else None
            if found:
                raise Hit("deny_content line %d, %d behind %s" % (number, found.start(), place))


def must_hold(shape):
    """The longest run of characters, in lower case, that each match of this expression holds; b"" if none is
    known. (To look for it first is ten times as fast.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                # it has another name from Python 3.11 on
        try:
            parse = getattr(re, "_parser", None) or __import__("sre_parse")
            whole, runs = parse.parse(shape), [b""]
            for kind, value in whole:
                runs[-1:] = [runs[-1] + bytes([value])] if str(kind) == "LITERAL" else [runs[-1], b""]
            return max(runs, key=len).lower()
        except Exception:
            return b""


# Text in other encodings

PLAIN = bytes(range(32, 127)) + b"\t\n\r"
NO_TEXT = bytes(set(range(32)) - set(b"\0\t\n\r\x1b")) + b"\x7f"
WIDE = re.compile(rb"\0{1,3}(?:[\t\n\r -~]\0{1,3}){5,}")            # behind the first one
ENCODINGS = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "cp932", "euc_jp", "iso2022_jp")


def is_text(window):
    """Could this be text, in whatever encoding? (Of random bytes a tenth are control characters.)"""
    return len(window.translate(None, NO_TEXT)) * 12 >= len(window) * 11


def views_of(window, start):
    """(encoding, bytes) of a window of a file: as it is, and, where it could be text that is not UTF-8, in
    UTF-8 by each of ENCODINGS; of what is no text its plain characters of two or four bytes."""
    yield "", window
    if not window.translate(None, PLAIN):
        return
    if not is_text(window):
        yield "wide characters", b"\n".join(window[max(0, run.start() - 1):run.end()].replace(b"\0", b"")
                                            for run in WIDE.finditer(window))
        return
    try:
        window.decode()
        if b"\0" not in window and b"\x1b" not in window:
            return
    except UnicodeDecodeError:
        pass
    for encoding in ENCODINGS:
        yield encoding, window[-start % 4:].decode(encoding, "replace").encode("utf-8", "replace")


# What is packed

PACKED = [                     # word, the bytes that it begins with, and its beginning as an expression
    ("gzip", b"\x1f\x8b\x08", rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]"),
    ("bz2", b"BZh", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ("xz", b"\xfd7zXZ\0", rb"\xfd7zXZ\0\0"),
    ("zip", b"PK\3\4", rb"PK\x03\x04[\x0a-\x3f][\x00-\x03]..[\x00-c]\x00")]
CLOSED = {                     # what begins so: what Python brings nothing along for, and what is encrypted
    "zstd": b"\x28\xb5\x2f\xfd", "7z": b"7z\xbc\xaf\x27\x1c", "rar": b"Rar!\x1a\7", "lz4": b"\4\x22\x4d\x18",
    "lzip": b"LZIP\1", "compress": b"\x1f\x9d\x90", "lzop": b"\x89LZO\0\r\n", "cab": b"MSCF\0\0\0\0",
    "ms office": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "luks": b"LUKS\xba\xbe", "openssl": b"Salted__"}
ARMOURED = {"openssl": b"U2FsdGVkX1", "pgp": b"-----BEGIN PGP MESSAGE", "age": b"age-encryption.org/"}
for word, magic in itertools.chain(CLOSED.items(), ARMOURED.items()):
    PACKED.append((word, magic, re.escape(magic)))
PACKED = [(word, magic, re.compile(rb"(?s)" + shape)) for word, magic, shape in PACKED]
TAR = re.compile(rb"(?s).{100}[0-7 ]{6,7}[\0 ].{40}[0-7 ]{6}[\0 ]{2}")


def packed_as(source, size):
    """The word for what the whole of a file of this size is packed as, or None."""
    source.seek(0)
    head = source.read(512)
    source.seek(max(0, size - 65557))
    for word, magic, shape in PACKED:
        # (the beginning of all: programs that unpack care little for what follows gzip's and zip's marks)
        if head.startswith(magic) if word in ("gzip", "zip") else shape.match(head):
            return word
    if is_deflated(head):
        return "gzip"
    return "tar" if TAR.match(head) else "zip" if b"PK\5\6" in source.read() else None


def is_deflated(head):
    """Does zlib's own form, gzip's without its head, begin so?"""
    import zlib
    try:
        return head[:1] == b"x" and zlib.decompressobj().decompress(head) != b""
    except zlib.error:
        return False


def packed_within(window, start):
    """Where in a window of a file something packed begins, for the owner; or ""."""
    plain = not window.translate(None, PLAIN)
    for word, magic, shape in PACKED:
        look = word in ARMOURED or not plain
        found = look and magic in window and shape.search(window)
        # four bytes stand somewhere in much that is binary by chance; behind text they do not
        if found and (len(shape.pattern) > 12 or not window[:found.start()][-32:].translate(None, PLAIN)):
            return "%s at byte %d" % (word, start + found.start())
    return ""


def blocks_of(source):
    """The bytes of an open file, block by block."""
    return iter(lambda: source.read(1 << 18), b"")


def inflated(source, make):
    """What a stream of one or more packed parts unpacks to, block by block. make(): what unpacks one. What is
    behind the last one is one more, or makes it fail."""
    machine, data, more = make(), b"", True
    while data or more:
        if not data:
            data = more = source.read(1 << 14)
        if not data and getattr(machine, "needs_input", True):
            raise Held("cut off")
        yield machine.decompress(data, 1 << 20)
        data = getattr(machine, "unconsumed_tail", b"")
        while not machine.eof and not data and not getattr(machine, "needs_input", True):
            yield machine.decompress(b"", 1 << 20)
        if machine.eof:
            data = machine.unused_data or source.read(1 << 14)
            if not data:
                return
            machine = make()


def ungzip(source, size):
    import zlib
    yield "", inflated(source, lambda: zlib.decompressobj(47))


def unbz2(source, size):
    import bz2
    yield "", inflated(source, bz2.BZ2Decompressor)


def unxz(source, size):
    import lzma
    yield "", inflated(source, lambda: lzma.LZMADecompressor(memlimit=SCAN_MEMORY // 2))


class Part:
    """The next `left` bytes of an open file from byte `at` on, read once."""

    def __init__(self, source, at, left):
        source.seek(at)
        self.source = source
        self.left = left

    def read(self, size):
        data = self.source.read(min(size, self.left))
        self.left -= len(data)
        return data


def between(source, at, end):
    """Held if something is packed in what an archive has beside its files, from byte `at` to byte `end`."""
    if end - at > WINDOW:
        raise Held("more than %d bytes beside its files" % WINDOW)
    source.seek(at)
    if packed_within(source.read(end - at), at):
        raise Held("something packed beside its files")


def unzip(source, size):
    """Each file of a zip archive. Held if one is encrypted, or otherwise at its own place than in the list of
    all, or if there are bytes that belong to none."""
    import zipfile
    import zlib
    with zipfile.ZipFile(source) as archive:
        rows, at, parts = sorted(archive.infolist(), key=lambda row: row.header_offset), 0, []
        ends = [row.header_offset for row in rows[1:]] + [archive.start_dir]
        for row, end in zip(rows, ends):
            source.seek(at)
            mark, flags, how, name, more = struct.unpack("<4s2xHH16xHH", source.read(30))
            begin = at + 30 + name + more
            if (mark, how) != (b"PK\3\4", row.compress_type) or how not in (0, 8):
                raise Held("bytes that are none of its files, or one that is packed in another way")
            if (row.flag_bits | flags) & 0x2041:
                raise Held("encrypted")
            if end - begin - row.compress_size not in ((12, 16, 20, 24) if row.flag_bits & 8 else (0,)):
                raise Held("bytes that belong to none of its files")
            between(source, at + 30, begin)
            parts.append((row.filename, how, begin, row.compress_size))
            at = end
        end = size - 22 - len(archive.comment)
        source.seek(end)
        tail = source.read(22)
        if tail[:4] != b"PK\5\6" or at + struct.unpack("<I", tail[12:16])[0] != end:
            raise Held("bytes that belong to none of its files")
        between(source, at, size)
    for name, how, begin, length in parts:
        part = Part(source, begin, length)
        yield name, inflated(part, lambda: zlib.decompressobj(-15)) if how else blocks_of(part)


def untar(source, size):
    """Each file of a tar archive. Held if there is something behind its end, or packed beside its files."""
    import tarfile
    at = 0
    with tarfile.open(fileobj=source, mode="r:") as archive:
        for row in archive:
            if row.issparse():
                raise Held("a sparse file")
            between(source, at, row.offset_data)
            at = row.offset_data + (row.size if row.isreg() else 0)
            yield row.name, blocks_of(archive.extractfile(row)) if row.isreg() else ()
        between(source, at, archive.offset)
        source.seek(archive.offset)
        if any(block.strip(b"\0") for block in blocks_of(source)):
            raise Held("bytes behind its end")


UNPACKERS = {"gzip": ungzip, "bz2": unbz2, "xz": unxz, "zip": unzip, "tar": untar}


# What is packed as text

def runs_of(bytes_of):
    """A function: are there 40 of these bytes in a row in a window?"""
    table = bytes(1 if byte in bytes_of else 0 for byte in range(256))
    return lambda window: b"\1" * 40 in window.translate(table)


# (what stands directly before it may be of the same characters: it may begin at each of the first ones)

def from_base64(text):
    text = b"".join(text.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    for begin in range(4):
        part = text[begin:len(text) - ((len(text) - begin) % 4 == 1)]
        yield base64.b64decode(part + b"=" * (-len(part) % 4))


def from_hex(text):
    text = b"".join(text.split())
    for begin in range(2):
        yield binascii.unhexlify(text[begin:len(text) - (len(text) - begin) % 2])


def from_percent(text):
    from urllib.parse import unquote_to_bytes
    yield unquote_to_bytes(text)


BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/_-"
LINES = rb"[%s]{40,}(?:\s{1,80}[%s]{40,})*(?:\s{1,80}[%s]{2,39}(?![^\s=\"']))?"
TEXT_PACKED = [                # word, its form, whether a window can hold it, what it is
    ("base64", LINES.replace(rb"%s", rb"A-Za-z0-9+/_-") + rb"={0,2}", runs_of(BASE64), from_base64),
    ("hex", LINES.replace(rb"%s", rb"0-9A-Fa-f"), runs_of(b"0123456789abcdefABCDEF"), from_hex),
    ("percent", rb"[!-$&-~]{0,200}(?:%[0-9A-Fa-f]{2}[!-$&-~]*)+",
     lambda window: b"%" in window and is_text(window), from_percent)]
TEXT_PACKED = [(word, re.compile(shape), needs, decode) for word, shape, needs, decode in TEXT_PACKED]


# Declared types

KINDS = {                      # how a file of this type begins; text, csv and json are looked at as a whole
    "png": rb"\x89PNG\r\n\x1a\n", "jpeg": rb"\xff\xd8\xff", "gif": rb"GIF8[79]a", "pdf": rb"%PDF-",
    "hdf5": rb"\x89HDF\r\n\x1a\n", "netcdf": rb"CDF[\x01\x02\x05]", "sqlite": rb"SQLite format 3\0",
    "npy": rb"\x93NUMPY", "vtk": rb"# vtk DataFile", "xml": rb"\s*<(\?xml|VTKFile)", "tar": TAR.pattern,
    "gzip": rb"\x1f\x8b\x08", "bz2": rb"BZh[1-9]", "xz": rb"\xfd7zXZ\0", "zip": rb"PK[\x03\x05][\x04\x06]",
    "text": rb"", "csv": rb"", "json": rb"", "any": rb""}
CLAUSES = {                    # what may stand behind text: or csv:
    "columns": r"(\d+) columns?", "rows": r"<= ?(\d+) rows?", "header": r"header", "numbers": r"numbers",
    "digits": r"numbers of <= ?(\d+) digits?", "width": r"lines of <= ?(\d+) characters?",
    "trim": r"no trailing blanks",
    "by": r"separated by (comma|semicolon|tab|blank)"}
SEPARATORS = {"comma": b",", "semicolon": b";", "tab": b"\t", "blank": b" "}
UNSEEN = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
                    "\ufe00-\ufe0f\ufeff\ufff9-\ufffb\U000e0000-\U000e01ef]")
FIELD = re.compile(rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][-+]?\d{1,3})?")


def parse_kind(text):
    """(word, {clause: its value}) of a declared type as the owner writes it. ValueError."""
    word, colon, rest = text.replace("\u2264", "<=").partition(":")
    word, limits = word.strip(), {}
    if word not in KINDS and word != "hold":
        raise ValueError("is not one of: hold %s" % " ".join(sorted(KINDS)))
    for clause in filter(None, map(str.strip, rest.split(","))):
        found = [(name, re.match(shape + r"\Z", clause)) for name, shape in CLAUSES.items()]
        name, match = next(((name, match) for name, match in found if match), (None, None))
        if name is None or word not in ("text", "csv"):
            raise ValueError("%s: %s is not one of: %s" % (word, clause, "; ".join(CLAUSES.values())))
        limits[name] = match.group(match.lastindex or 0)
    return word, limits


def check_kind(text, source):
    """ValueError if a file is not what it is declared to be. text: the declaration; "" is none."""
    word, limits = parse_kind(text or "any")
    head = source.read(512)
    source.seek(0)
    if word == "hold" or not re.match(rb"(?s)" + KINDS[word], head):
        raise ValueError("it begins otherwise" if word != "hold" else "a person decides, or no line names it")
    if word in ("text", "csv"):
        for number, line in enumerate(iter(lambda: source.readline(1 << 20), b""), 1):
            check_line(word, limits, number, line)
    if word == "json":
        json.loads(source.read(16 << 20).decode())
    if word == "png":
        check_png(source)


def check_line(word, limits, number, line):
    """ValueError if a line of a text is not as it was declared."""
    text = line.rstrip(b"\n")[:-1] if line.endswith(b"\r\n") else line.rstrip(b"\n")
    if UNSEEN.search(text.decode()) or len(line) > int(limits.get("width", 1 << 19)) + 2:
        raise ValueError("line %d has what is not seen, or is too long" % number)
    if number > int(limits.get("rows", number)) + ("header" in limits):
        raise ValueError("more lines than %s" % limits["rows"])
    if ("trim" in limits or word == "csv") and text != text.strip() or word == "csv" and not text:
        raise ValueError("line %d has blanks at its ends, or is empty" % number)
    if word == "csv":
        fields = text.split(SEPARATORS[limits.get("by", "comma")])
        if len(fields) != int(limits.get("columns", len(fields))):
            raise ValueError("line %d has %d columns" % (number, len(fields)))
        for field in fields if number > ("header" in limits) else ():
            check_field(limits, number, field)


def check_field(limits, number, field):
    """The same for a field."""
    digits = re.split(rb"[eEdD]", field)[0].replace(b".", b"").strip(b"+-").lstrip(b"0")
    if "digits" in limits and len(digits) > int(limits["digits"]):
        raise ValueError("line %d has a number of more than %s digits" % (number, limits["digits"]))
    if ("digits" in limits or "numbers" in limits) and not FIELD.fullmatch(field):
        raise ValueError("line %d has something else than a number" % number)


def check_png(source):
    """ValueError if a picture's parts do not make up the whole file."""
    source.seek(8)
    word = b""
    while word != b"IEND":
        head = source.read(8)
        length, word = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
        if len(source.read(length + 4)) < length + 4 or not word:
            raise ValueError("cut off")
    if source.read(1):
        raise ValueError("bytes behind its end")


# An index of the pieces of secret files

BLOCK = 32                     # bytes of a piece of whatever it is
PIECES_MOST = 2000000          # pieces in one index
NUMBER = re.compile(rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[ed][-+]?\d+)?")
SHORT, SHORT_ONES = b"short lines", 12 # so many different ones of them in one window are found
RUN = 6                        # numbers in a row, or in a column, of
FORM = "{:.3e}".format         # 4 digits each


class Pieces:
    """Makes sums of the pieces of a text, with this key (bytes)."""

    def __init__(self, key):
        self.seal = functools.partial(hashlib.blake2b, digest_size=8, key=key)
        self.tables = [bytes(sorted(range(256), key=lambda byte: self.seal(bytes([place, byte])).digest()))
                       for place in range(8)]

    def sums(self, text, rich=False):
        """(kind, sum) of each piece; the sum is a number of 64 bits that is not 0. rich: of those that tell
        enough to stand in an index."""
        for kind, piece in itertools.chain(self.blocks(text, rich), lines_of(text), numbers_of(text, rich)):
            yield kind, int.from_bytes(self.seal(kind + piece).digest(), "little") or 1

    def blocks(self, text, rich):
        """Blocks of bytes. Where they begin is chosen by 8 bytes there (about each eighth place), wherever in
        a file these stand: of what was copied the same ones are chosen."""
        mixed = 0
        for place, table in enumerate(self.tables):
            mixed ^= int.from_bytes(text.translate(table), "little") >> 8 * place
        for chosen in re.finditer(rb"[\0-\x1f]", mixed.to_bytes(len(text), "little")):
            block = text[chosen.start():chosen.start() + BLOCK]
            if not rich or len(set(block)) >= 8 and len(block) == BLOCK:
                yield b"bytes", block


def lines_of(text):
    """Lines of some length, however they are indented; and short ones with numbers, which count together."""
    for line in text.lower().splitlines():
        line = b" ".join(line.split())
        if len(line) >= 16 and len(set(line)) >= 8:
            yield b"line", line
        elif len(line) >= 10 and len(line.translate(None, b"0123456789")) <= len(line) - 6:
            yield SHORT, line


def numbers_of(text, rich):
    """Runs of numbers, however they are written: along the text, down each column, as rows; and, for other
    units, the ratios of neighbours."""
    rows = [[float(word.replace(b"d", b"e")) + 0.0 for word in NUMBER.findall(line)]
            for line in text.lower().splitlines()]
    yield from runs_of_numbers(list(itertools.chain(*rows)), rich)
    for count, group in itertools.groupby(rows, len):
        group = list(group) if count > 1 else []
        for column in zip(*group) if len(group) >= RUN else ():
            yield from runs_of_numbers(column, rich)
        for row in group if 3 <= count <= 20 else ():
            names = list(map(FORM, row))
            if not rich or digits_of(names) >= 10:
                yield b"row", " ".join(names).encode()


def runs_of_numbers(values, rich):
    """Runs of six, and their five ratios."""
    names = list(map(FORM, values))
    ratios = [FORM(second / first) if first else "" for first, second in zip(values, values[1:])]
    for at in range(len(values) - RUN + 1):
        run, between = names[at:at + RUN], ratios[at:at + RUN - 1]
        if rich and (digits_of(run) < 12 or is_even(values[at:at + RUN])):
            continue
        yield b"run", " ".join(run).encode()
        if not rich or digits_of(between) >= 14 and "" not in between:
            yield b"ratios", " ".join(between).encode()


def digits_of(names):
    """How many digits the different ones of these numbers have, trailing zeros not counted."""
    return sum(len(name.lstrip("-")[:5].replace(".", "").rstrip("0")) for name in set(names))


def is_even(values):
    """Are these numbers as far apart as their neighbours (nearly)? So are times and numberings of anybody."""
    apart = [second - first for first, second in zip(values, values[1:])]
    return max(apart) - min(apart) <= 2e-3 * max(map(abs, apart))


class Index:
    """The sums of the pieces of secret files, as make_index() wrote them."""

    def __init__(self, path):
        self.path = path
        self.stamp = None
        self.check()

    def check(self):
        """Held unless it is as it must be: nobody else's, and of the secrets as they are now."""
        try:
            info = os.stat(self.path)
            if info.st_uid != os.geteuid() or info.st_mode & 0o077:
                raise Held("deny_pieces: %s: must be its owner's alone (chmod 600)" % self.path)
            stamp = info.st_ino, info.st_mtime_ns, info.st_size
            if stamp != self.stamp:
                self.load()
                self.stamp = stamp
            for name, size, mtime in self.head["sources"]:
                if (os.stat(name).st_size, os.stat(name).st_mtime_ns) != (size, mtime):
                    raise Held("deny_pieces: %s: %s has changed: scan --index anew" % (self.path, name))
        except (OSError, ValueError, KeyError) as error:
            raise Held("deny_pieces: %s: %s" % (self.path, error))

    def load(self):
        with open(self.path, "rb") as text:
            self.head = json.loads(text.readline().decode())
            whole = memoryview(mmap.mmap(text.fileno(), 0, access=mmap.ACCESS_READ))
        table = whole[len(whole) - 8 * self.head["slots"]:]
        if self.head["v"] != 1 or hashlib.sha256(table).hexdigest() != self.head["sum"]:
            raise ValueError("broken: scan --index anew")
        self.table = table.cast("Q")
        self.pieces = Pieces(bytes.fromhex(self.head["key"]))

    def look(self, text, place):
        """Hit if a piece of a secret is in this text."""
        table, mask, short = self.table, self.head["slots"] - 1, set()
        for kind, number in self.pieces.sums(text):
            at = number & mask
            while table[at] and table[at] != number:
                at = at + 1 & mask
            if table[at] and kind == SHORT:
                short.add(number)
            if table[at] and (kind != SHORT or len(short) >= SHORT_ONES):
                raise Hit("deny_pieces %s: %s behind %s" % (self.path, kind.decode(), place))


class Gatherer(Scan):
    """Gathers the sums of the pieces of files, and of what is packed in them, instead of looking for them."""

    def __init__(self, key):
        Scan.__init__(self, {"deny_content": [], "deny_pieces": [], "deny_sums": [], "piece": 1 << 20,
                             "unwrap": list(UNPACKERS) + [row[0] for row in TEXT_PACKED]})
        self.pieces = Pieces(key)
        self.found = set()

    def look_at(self, window, start, place, depth, last):
        for encoding, text in views_of(window, start):
            self.found.update(number for kind, number in self.pieces.sums(text, rich=True))
        if len(self.found) > PIECES_MOST:
            raise Hit("more than %d pieces: an index is of smaller secrets" % PIECES_MOST)
        return Scan.look_at(self, window, start, place, depth, last)


def make_index(names, samples):
    """The bytes of an index of these files (absolute paths, texts) but for what is in the samples, too; how
    many pieces it has. Hit, Held, OSError."""
    key, found, sources = os.urandom(16), [], []
    for group in (names, samples):
        gather = Gatherer(key)
        for name in group:
            with open(name, "rb") as text:
                info = os.fstat(text.fileno())
                gather.look_at_file(text.fileno(), info.st_size, "")
            if gather.held:
                raise Held("%s: %s" % (name, gather.held))
            sources += [(name, info.st_size, info.st_mtime_ns)] if group is names else []
        found.append(gather.found)
    numbers = found[0] - found[1]
    slots = 1 << max(10, (2 * len(numbers)).bit_length())
    table, mask = array.array("Q", bytes(8 * slots)), slots - 1
    for number in numbers:
        at = number & mask
        while table[at]:
            at = at + 1 & mask
        table[at] = number
    head = json.dumps({"v": 1, "key": key.hex(), "slots": slots, "pieces": len(numbers), "sources": sources,
                       "sum": hashlib.sha256(table).hexdigest()}).encode()
    return head + b" " * (-len(head) % 8 + 7) + b"\n" + table.tobytes(), len(numbers)
'''


@functools.lru_cache(maxsize=1)
def looking():
    """(the program LOOKING as bytes that Python runs; its names in this process)."""
    import marshal
    code, names = compile(LOOKING, "content", "exec"), {"__name__": "content"}
    exec(code, names)
    return marshal.dumps(code), names


def content_keys():
    """Their keys in [outbound]: see gate_keys()."""
    return {
        "deny_sums": (sum_list, [], "sha256 sums, blanks or line breaks between them"),
        "deny_content": (expression_list, [], "regular expressions, one a line"),
        "deny_pieces": (path_list, [],
                        "indexes of secret files, one path a line: scan --index makes them"),
        "types": (type_list, [],
                  "PATTERN TYPE a line, the first that matches counts: *.csv csv: 3 columns, numbers"
                  " of <= 5 digits; what is of another type, or in no line, is held"),
        "unwrap": (word_list(*UNWRAP), list(UNWRAP),
                   "what is looked into for these rules; what else is packed is held"),
        "dry_run": (flag, False, "yes: what the rules would keep leaves, and is logged"),
        "scan_timeout": (seconds, 600.0, "for one file")}


def has_content_rules(rules):
    """Do these rules [outbound] say anything about content?"""
    return any(rules[key] for key in CONTENT_KEYS)


def index_marks(rules):
    """What tells that the indexes of these rules are still those that were looked through."""
    found = [os.stat(path) if os.path.exists(path) else None for path in map(utf8, rules["deny_pieces"])]
    return [info and (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) for info in found]


def type_list(text):
    """[(pattern of names, declared type)], one a line: PATTERN TYPE, or PATTERN text: CLAUSE, CLAUSE ..."""
    found = []
    for line in lines(text):
        pattern, _blank, kind = line.partition(" ")
        try:
            looking()[1]["parse_kind"](kind.strip())
        except ValueError as error:
            raise ValueError(_("%s: no declared type: %s") % (line, error))
        found.append([pattern, kind.strip()])
    return found


def word_list(*choices):
    """A kind: some of these words."""
    def kind(text):
        if set(text.split()) - set(choices):
            raise ValueError(_("has a word that is not one of: %s") % " ".join(choices))
        return text.split()
    return kind


def path_list(text):
    """Absolute paths, one a line."""
    if any(not path.startswith("/") for path in lines(text)):
        raise ValueError(_("one absolute path a line, please"))
    return lines(text)


def declared_type(rules, name, log):
    """What a file of this name is declared to be: by the first line of `types` whose pattern matches; ""
    where there is no such rule. One that no line names is held, a log is text."""
    named = (kind for pattern, kind in rules["types"]
             if rule_matcher("/".join(nfc_parts(pattern))).match("/".join(nfc_parts(name))))
    return next(named, "text" if log else "hold") if rules["types"] else ""


class Scanner:
    """The looking process for these rules [outbound]; it is started when it is first asked something."""

    def __init__(self, rules):
        self.rules = rules
        self.process = None
        self.line = None                               # the socket to it

    def start(self):
        """Starts it, and tells it its program and the rules. OSError."""
        import socket
        self.line, theirs = socket.socketpair()
        env = {key: os.environ[key] for key in ("PATH", "TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", SCANNER], stdin=theirs, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, cwd="/", env=env, start_new_session=True)
        code = looking()[0]
        self.line.sendall(b"%8d%s" % (len(code), code))
        keys = CONTENT_KEYS + ("unwrap", "scan_timeout")
        looking()[1]["send_words"](self.line, dict({key: self.rules[key] for key in keys}, piece=PIECE))

    def close(self):
        """Ends it."""
        if self.line is not None:
            self.line.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.line = None

    __del__ = close

    def ask(self, words, fds=()):
        """Its answer {"code", "why", ...}; "held" whatever happens to it. Stays if that is a code."""
        found, until = None, time.monotonic() + self.rules["scan_timeout"]
        why = "the scan failed"
        try:
            if self.process is None:
                self.start()
            looking()[1]["send_words"](self.line, words, fds)
            found = looking()[1]["receive_words"](self.line, until)[0]
            why = "scan_timeout" if time.monotonic() >= until else why
        except (OSError, ValueError) as error:
            why = "%s: %s" % (why, error)
        if found is None:
            self.close()
            raise Stays("held", why)
        if found["code"]:
            raise Stays(found["code"], found["why"])
        return found

    def file(self, name, kind, fd, length):
        """(sha256, sums of the pieces back to back) of the first `length` bytes of an open file: those that
        were looked at. kind: see declared_type(). Stays."""
        found = self.ask({"text": name, "what": "its name", "kind": kind, "length": length}, [fd])
        return bytes.fromhex(found["whole"]), binascii.a2b_base64(found["sums"])

    def text(self, text):
        """'' or why this text may not leave."""
        try:
            self.ask({"text": text, "what": "a text"})
            return ""
        except Stays as stays:
            return str(stays)


@functools.lru_cache(maxsize=256)
def why_withheld(rules, text):
    """Why this text may not leave, or ''. rules: [outbound], as JSON."""
    scanner = Scanner(json.loads(rules))
    try:
        return scanner.text(text)
    finally:
        scanner.close()


def outward(rules, text):
    """A reason or an error text (or None) as it may leave by these rules [outbound]: as it is, or
    "withheld"."""
    if not text or rules["dry_run"] or not has_content_rules(rules):
        return text
    return "withheld" if why_withheld(json.dumps(rules, sort_keys=True), str(text)) else text
# ==== end shared ====


# ==== shared: hold ====
# What waits for a person: results that the owner's key `hold`, or a rule about contents, keeps back until
# somebody at this host says so. There is one word for all of a run. Nothing of it leaves before; released,
# all of it does; refused (also by hold_for), what was held stays, as what a rule refuses, and the rest
# leaves.
# In the control directory: held/note (what a word is about), held/files (each file, with its sums),
# held/NNNNNN (copies of the bytes that were judged), held/shown, held/decided (the word). held/ gets its
# name when it is whole. A word counts for the manifest whose sum it names, and for no other.
KNOWN_BYTES = (                # how files begin, for people
    (b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"), (b"7z\xbc\xaf", "7z"), (b"\x89PNG", "PNG"), (b"\xff\xd8\xff", "JPEG"),
    (b"%PDF", "PDF"), (b"\x89HDF", "HDF5"), (b"CDF", "NetCDF"), (b"SQLite format 3\0", "SQLite"),
    (b"\x7fELF", "ELF"), (b"\xd0\xcf\x11\xe0", "Office"))
# what isprintable() lets pass, and nobody sees; and the sign that stands before what is made visible
UNSEEN = ("[\\\\\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0"
          "\U000e0100-\U000e01ef]")
HOLD_KEYS = {"run", "command", "since", "manifest", "files", "bytes"}          # of held/note
VIEW_BYTES = 4 << 20           # of one file that are shown, and compared
VIEW_LINES = 40, 20            # first and last lines of a text that are shown without --all
VIEW_WIDTH = 300               # characters of a line without --all
COMPARED_LINES = 5000          # of texts with more it is only said that they differ


class WaitsForPerson(Exception):
    """Nothing leaves of a run: it waits for a person. since: seconds since the epoch."""

    def __init__(self, since):
        Exception.__init__(self, "held for a person")
        self.since = since


class Hold:
    """What is held of the run with this control directory (bytes)."""

    def __init__(self, control):
        self.folder = os.path.join(control, b"held")
        # base/NAME, where the control directory is base/.mi/NAME
        self.work = os.path.join(os.path.dirname(os.path.dirname(control)), os.path.basename(control))

    def path(self, name):
        return os.path.join(self.folder, name)

    def read(self, name):
        """One of its notes; None if it is not there, or broken (no word, then, and held anew)."""
        try:
            with open(self.path(name), "rb") as text:
                return dict(json.loads(text.read().decode("utf-8")))
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return None

    def note(self):
        """{"v", "run", "command", "since", "manifest": its sum, "copy": were copies made?, "files" and
        "bytes" of all, "held": how many are}; None if nothing of the run was ever held."""
        note = self.read(b"note")
        return note if note and HOLD_KEYS <= set(note) else None

    def decision(self, limit):
        """The word that holds: {"v", "what": released or refused, "manifest", "run", "t", "by", "reason"};
        None as long as there is none. limit: seconds (hold_for) after which it is refused; 0: never."""
        note = self.note()
        word = self.read(b"decided") if note else None
        if note and word is None and limit and time.time() > note["since"] + limit:
            with contextlib.suppress(Stop):            # a person is at it, just now
                word = self.decide("refused", "hold_for", "", note["manifest"])
        return word if word and word.get("manifest") == note["manifest"] else None

    def pending(self, limit):
        """Since when it waits for a person (seconds since the epoch); None if it does not."""
        note = self.note()
        return note["since"] if note and self.decision(limit) is None else None

    # What is held

    def make(self, ident, name, command, found):
        """Holds what was found (a Collector); since when. name: RUN; ident: for the log. ValueError if it has
        changed since it was judged. OSError."""
        if os.path.lexists(self.folder):               # its note is broken
            self.drop(ident)
        fresh, rows = self.folder + b".new", rows_of(found)
        remove_tree(fresh)                             # of one that was killed here
        os.mkdir(fresh, 0o700)
        note = {"v": 1, "run": name, "command": command, "since": int(time.time()), "bytes": found.total,
                "files": len(found.found), "held": len(found.held), "manifest": manifest_sum(name, rows)}
        note["copy"] = copies_made(found.found, fresh)
        for leaf, data in ((b"files", rows), (b"note", note)):
            write_synced(os.path.join(fresh, leaf), json.dumps(data).encode())
        sync_path(fresh)
        fault("held made")
        audit("held", name, command=command[:100], files=note["files"], bytes=note["bytes"],
              manifest=note["manifest"], held=len(found.held), copy=note["copy"])
        os.rename(fresh, self.folder)
        sync_path(os.path.dirname(self.folder))
        log("warn", ident, "7 held for a person", manifest=note["manifest"], files=note["files"],
            bytes=note["bytes"], copy=note["copy"])
        fault("held placed")
        return note["since"]

    def drop(self, ident):
        """What was held is not there any more as it was: no word about it counts, and it is held anew."""
        log("error", ident, "7 what was held has changed: it is held anew", control=shown(self.folder))
        audit("changed", ident)
        gone = self.folder + b"." + utf8(os.urandom(4).hex())
        with contextlib.suppress(FileNotFoundError):   # somebody else was quicker
            os.rename(self.folder, gone)
        fault("held dropped")
        remove_tree(gone)

    def forget_copies(self):
        """It was delivered: what was said of it stays."""
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
            if name.isdigit():
                os.unlink(self.path(name))

    def rows(self):
        """As rows_of() found them; None if they are not those that held/note is about."""
        note, rows = self.note(), self.read(b"files")
        return rows if note and rows and manifest_sum(note["run"], rows) == note["manifest"] else None

    def has_copies(self):
        """Are the copies there (still)? A result that a restored relay wants once more has none any more."""
        return os.path.exists(self.path(b"000000"))

    def results(self, tree_of, copy=True):
        """[Result] of the files that are held: copies, or (also without `copy`) where the command left them.
        tree_of(folder): its ResultTree. ValueError if nobody knows any more what was held. OSError."""
        rows, copy = self.rows(), copy and self.has_copies()
        if rows is None:
            raise ValueError("held/files is not what held/note is about")
        if copy:
            return [result_of_note(row, tree_of(self.folder), b"%06d" % place)
                    for place, row in enumerate(rows["files"])]
        # (the poller's logs lie in the control directory)
        return [result_of_note(row, tree_of(os.path.dirname(self.folder) if row[7] else self.work),
                               utf8(row[1])) for row in rows["files"]]

    def is_whole(self):
        """Are all of these bytes there?"""
        try:
            with open_trees() as tree_of:
                for one in self.results(tree_of):
                    with one.source.open() as source:
                        for at in range(0, one.size, PIECE):
                            source.read(min(PIECE, one.size - at))
            return True
        except (OSError, ValueError):
            return False

    def collector(self, look, rules, tell, tree_of):
        """The Collector of what leaves now that a word was said; None if what was held has changed. look():
        looks at it anew, where there are no copies; rules, tell: as Collector's; tree_of(folder): its
        ResultTree."""
        note, rows, word = self.note(), self.rows(), self.decision(0)
        if rows is None or word is None:
            return None
        if note.get("copy"):
            found = Collector(rules, tell)
            for one in self.results(tree_of):
                found.found.append(one)
            for row in rows["folders"]:
                found.folders.append(result_of_note(row, None, b""))
            found.verdicts.update(rows["verdicts"])
            found.kept_by_name = {name: tuple(why) for name, why in rows["kept_by_name"].items()}
            found.held, found.named, found.total = rows["held"], set(rows["named"]), note["bytes"]
        else:
            found = look()
            if manifest_sum(note["run"], rows_of(found)) != note["manifest"]:
                return None
        if word["what"] == "refused":
            found.refuse_held()
        return found

    # A word

    def decide(self, what, by, reason, manifest):
        """The word of a person, or of hold_for: released or refused. Returns the word that holds: an earlier
        one, where there is one. 75 if somebody else is at it, or something else than `manifest` is held by
        now."""
        with open(self.path(b"note"), "rb") as lock:
            if try_lock(lock) == LOCK_HELD:
                raise Stop(EX_TEMPFAIL, _("somebody else is deciding about it: try again"))
            note, said = self.note(), self.read(b"decided")
            if not note or note["manifest"] != manifest:
                raise Stop(EX_TEMPFAIL, _("somebody else is deciding about it: try again"))
            if said and said.get("manifest") == note["manifest"]:
                return said
            word = {"v": 1, "what": what, "manifest": note["manifest"], "run": note["run"],
                    "t": round(time.time(), 3), "by": by, "reason": reason}
            write_synced(self.path(b"decided.new"), json.dumps(word).encode())
            fault(what + " unsaid")
            audit("expired" if by == "hold_for" else what, note["run"], command=note["command"][:100],
                  manifest=note["manifest"], files=note["files"], bytes=note["bytes"], by=by)
            os.rename(self.path(b"decided.new"), self.path(b"decided"))
            sync_path(self.folder)
            log("info", note["run"], "7 " + what, by=by, manifest=note["manifest"],
                **({"reason": reason} if reason else {}))
            fault(what + " said")
            return word

    def note_shown(self, manifest, by):
        """A person has looked at what is held."""
        told = {"t": round(time.time(), 3), "manifest": manifest, "by": by}
        audit("shown", self.note()["run"], manifest=manifest, by=by)
        write_synced(self.path(b"shown"), json.dumps(told).encode())

    def was_shown(self):
        """Has anybody looked at it as it is now?"""
        told = self.read(b"shown")
        return told is not None and told.get("manifest") == self.note()["manifest"]


@contextlib.contextmanager
def open_trees():
    """A function that gives the ResultTree of a folder; they are closed in the end."""
    trees = {}

    def tree_of(folder):
        if folder not in trees:
            trees[folder] = ResultTree(folder)
        return trees[folder]

    try:
        yield tree_of
    finally:
        for tree in trees.values():
            tree.close()


def rows_of(found):
    """What is kept of a Collector that is held, as JSON has it."""
    rows = {"files": list(map(row_of_result, found.found)),
            "folders": list(map(row_of_result, found.folders)), "held": found.held,
            "verdicts": found.verdicts, "named": sorted(found.named), "kept_by_name": found.kept_by_name}
    return json.loads(json.dumps(rows))


def row_of_result(one):
    """A Result as a row of held/files: the last word is whether it lies in the control directory."""
    source = one.source
    real, sums, top = ("", b"", b"") if source is None else (
        source.decode("utf-8", "surrogateescape"), source.sums, source.tree.path)
    sums = binascii.b2a_base64(sums, newline=False).decode()
    in_control = os.path.basename(os.path.dirname(top)) == b".mi"
    return [one.name, real, one.size, one.sum256, one.executable, one.mtime, sums, in_control]


def result_of_note(row, tree, real):
    """The Result of a row; its bytes are those of the file `real` in that tree (None: a directory)."""
    name, _real, size, sum256, executable, mtime, sums, _here = row
    source = tree and JudgedBytes(tree, real, size, binascii.a2b_base64(sums))
    return Result(source, size, name, bytes.fromhex(sum256), executable, mtime)


def manifest_sum(run, rows):
    """What a word is about: the sha256 of all that leaves, and of which of it was held."""
    import hashlib
    told = [[row[0]] + row[2:6] for row in rows["files"] + rows["folders"]]
    text = json.dumps([run, told, sorted(rows["held"])])
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def copies_made(results, folder):
    """Are copies of all results there now? Without room for them there are none. ValueError if a result is
    not any more what was judged. OSError."""
    disk = os.statvfs(folder)
    if sum(one.size for one in results) + FULL_BELOW > disk.f_bavail * disk.f_frsize:
        return False
    try:
        for place, one in enumerate(results):
            path = os.path.join(folder, b"%06d" % place)
            with one.source.open() as source, open(path, "xb") as out:
                for at in range(0, one.size, PIECE):
                    out.write(source.read(min(PIECE, one.size - at)))
                out.flush()
                os.fsync(out.fileno())
            fault("copy held")
        return True
    except OSError as error:
        if error.errno not in FULL_WORDS:
            raise
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        return False


def what_leaves(run, rules, kinds):
    """Collectors, one after the other, as long as what leaves of a GateRun changes while it is sent: as its
    rules and a person let it out. WaitsForPerson, if one has to say so first."""
    hold, command = Hold(run.control), run.order["command"][:100]
    note = hold.note()
    while note:
        word = hold.decision(rules["hold_for"])
        if word is None:
            raise WaitsForPerson(note["since"])
        found = hold.collector(lambda: run.collect(rules, kinds), rules, run.note_stay, run.tree)
        if found is not None:
            log("info", run.ident, "7 by a person's word", what=word["what"], by=word["by"])
            run.count_kept(found)
            audit_leaving(run.name, command, found, by=word["by"] if word["what"] == "released" else "")
            yield found
        run.close_trees()
        hold.drop(run.ident)
        note = hold.note()
    for found in run.collect_until_steady(rules, kinds):
        if not found.held:
            audit_leaving(run.name, command, found)
            yield found
            continue
        try:
            since = hold.make(run.ident, run.name, run.order["command"], found)
        except ValueError:                             # collect_until_steady() knows what has changed
            continue
        raise WaitsForPerson(since)


# A person's words

def held_row(name, control, limit):
    """What is held of a run, as a row of `outbox`; None if nothing waits. limit: hold_for."""
    hold = Hold(control)
    since = hold.pending(limit)
    if since is None:
        return None
    return dict(hold.note(), id=name, state="held", until=since + limit if limit else None)


def held_line(row):
    """That as a line."""
    until = _(", then refused: %s") % day_and_time(row["until"]) if row["until"] else ""
    return _("%s  held for a person since %s%s  %s: %d files, %d bytes") % (
        row["id"], day_and_time(row["since"]), until, printable(row["command"]), row["files"], row["bytes"])


def day_and_time(when):
    """Seconds since the epoch, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def who_says():
    """The person at the terminal, as far as this host knows."""
    import pwd
    try:
        me = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        me = str(os.geteuid())
    return " / ".join(filter(None, (me, printable(os.environ.get("SUDO_USER", "")))))


def must_wait(name, hold, limit):
    """64 if nothing of this run waits for a person."""
    if hold.pending(limit) is None:
        word, why = hold.decision(0), _("nothing of it waits for a person")
        if word:
            said = {"released": _("it was released"), "refused": _("it was refused")}[word["what"]]
            why = "%s (%s, %s)" % (said, printable(word["by"]), day_and_time(word["t"]))
        raise Stop(EX_USAGE, "%s: %s" % (name, why))


def release(name, control, limit, unseen):
    """A person's word: all of it leaves. unseen: also if nobody has looked at it. 64 if nothing waits, 65 if
    it has changed since it was held, 77 if nobody has looked at it as it is, or a calculation says so."""
    hold = Hold(control)
    must_be_person(name)
    must_wait(name, hold, limit)
    manifest = hold.note()["manifest"]                 # the word is about what was looked at
    if not unseen and not hold.was_shown():
        raise Stop(EX_REFUSED, _("%s: nobody has looked at it as it is now: show %s, or release it with"
                                 " --unseen") % (name, name))
    if not hold.is_whole():
        hold.drop(name)
        raise Stop(EX_DATA, _("%s: it has changed since it was held: nothing leaves; it is held anew, look at"
                              " it again") % name)
    say_word(name, hold, "released", "", manifest)


def refuse(name, control, limit, reason):
    """A person's word: what was held stays. The reason stays on this host. 64 if nothing waits, or without a
    reason."""
    must_be_person(name)
    must_wait(name, Hold(control), limit)
    if not reason:
        raise Stop(EX_USAGE, _("refuse needs --reason TEXT (which stays on this host)"))
    say_word(name, Hold(control), "refused", reason, Hold(control).note()["manifest"])


def must_be_person(name):
    """77 if a calculation says it."""
    if os.environ.get("MI_RUN"):
        raise Stop(EX_REFUSED, _("%s: a calculation does not decide about results") % name)


def say_word(name, hold, what, reason, manifest):
    """Writes the word, unless another one was quicker: 64."""
    by = who_says()
    word = hold.decide(what, by, reason, manifest)
    if (word["what"], word["by"], word["reason"]) != (what, by, reason):
        must_wait(name, hold, 0)


# What a person sees

def show_held(name, control, limit, whole, as_json):
    """Prints what is held of a run: each file with its size, kind and sum, why it is held, what of it was
    otherwise when a result of the same command was released last, and its text, in which nothing hides; noted
    as seen. whole: no line is left out. 65 if it has changed since it was held."""
    hold = Hold(control)
    row, rows = held_row(name, control, limit), hold.rows()
    try:
        with open_trees() as tree_of:
            earlier = Earlier(last_released(control), tree_of)
            views = (view_of(one, rows["held"].get(one.name, ""), earlier, whole)
                     for one in hold.results(tree_of))
            row.update(folders=[folder[0] for folder in rows["folders"]], verdicts=rows["verdicts"],
                       earlier=earlier.name)
            if as_json:
                print(json_of(dict(row, results=list(views))))
            else:
                print_view(row, views)
    except (FileNotFoundError, ValueError, TypeError):
        hold.drop(name)
        raise Stop(EX_DATA, _("%s: it has changed since it was held: nothing leaves; it is held anew, look at"
                              " it again") % name)
    hold.note_shown(row["manifest"], who_says())


def print_view(row, views):
    """That for people; views: of the files."""
    print(held_line(row))
    print(_("manifest: %s") % row["manifest"])
    print(_("released last of this command: %s") % row["earlier"] if row["earlier"] else
          _("nothing of this command was released before"))
    for one in views:
        print("\n%s  %s  sha256 %s" % (visible(one["name"]), _("%d bytes, %s") % (one["size"], one["kind"]),
                                       one["sha256"]))
        told = (one["executable"] and _("executable"), one["held"] and _("held: %s") % visible(one["held"]),
                one["earlier"])
        more = [_("%d lines more (--all)") % one["more"]] if one["more"] else []
        more += [_("%d bytes more: look at the file itself") % one["unseen"]] if one["unseen"] else []
        lines = list(filter(None, told)) + one["difference"] + ["| " + line for line in one["lines"]] + more
        print("".join("  %s\n" % line for line in lines), end="")
    for folder in row["folders"]:
        print(_("empty directory: %s") % visible(folder))
    for code, entry in sorted(row["verdicts"].items()):
        print(_("stays here in any case: %s %d") % (code, entry["count"]))


def visible(text):
    """text in which all is seen: what steers a terminal, hides, or stands at the end of a line as a blank, is
    written as \\x.. or \\u....; a backslash as two."""
    def named(char):
        code = ord(char)
        if char in "\\\t":
            return {"\\": "\\\\", "\t": "\\t"}[char]
        if 0xdc80 <= code <= 0xdcff:                   # a byte that is no UTF-8
            return "\\x%02x" % (code - 0xdc00)
        return ("\\x%02x" if code < 0x100 else "\\u%04x" if code < 0x10000 else "\\U%08x") % code

    bare = text.rstrip(" ")
    hides = re.compile(UNSEEN)
    if not bare.isprintable() or hides.search(bare):
        bare = "".join(named(char) if not char.isprintable() or hides.match(char) else char for char in bare)
    return bare + "\\x20" * (len(text) - len(text.rstrip(" ")))


def kind_of(data):
    """What bytes are, by how they begin, for people."""
    named = [name for begin, name in KNOWN_BYTES if data.startswith(begin)]
    if named or b"\0" in data:
        return named[0] if named else _("binary")
    return _("text") if max(data[:-4].decode("utf-8", "surrogateescape"), default="") < "\udc80" else (
        _("text, not UTF-8"))


def view_of(one, why, earlier, whole):
    """A file that is held (a Result), for show_held(). ValueError if it has changed."""
    with one.source.open() as reader:
        data = reader.read(min(one.size, VIEW_BYTES))
    kind, (told, difference) = kind_of(data), earlier.compared(one, data)
    if b"\0" in data:
        lines = [data[at:at + 32].hex() for at in range(0, len(data), 32)]
    else:
        lines = [visible(line) for line in text_lines(data)]
    all_lines, (first, last) = len(lines), VIEW_LINES
    if not whole and len(lines) > first + last:
        lines = lines[:first] + ["..."] + lines[-last:] if b"\0" not in data else lines[:8]
    if not whole:
        difference = difference[:first + last] + ["..."] * (len(difference) > first + last)
        lines = [line[:VIEW_WIDTH] + (line[VIEW_WIDTH:] and " ...") for line in lines]
    return {"name": one.name, "size": one.size, "sha256": one.sum256, "executable": one.executable,
            "kind": kind, "held": why or "", "earlier": told, "difference": difference, "lines": lines,
            "more": max(0, all_lines - len(lines) + lines.count("...")), "unseen": one.size - len(data)}


def text_lines(data):
    """The lines of a text; a byte that is no UTF-8 as a surrogate."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


class Earlier:
    """What was released last of a command, to compare with. control: of that run, None if there is none;
    tree_of(folder): its ResultTree."""

    def __init__(self, control, tree_of):
        self.name = shown(os.path.basename(control)) if control else ""
        self.files = {}                                # {name: its Result then}
        try:
            if control:
                self.files = {one.name: one for one in Hold(control).results(tree_of, copy=False)}
        except (OSError, ValueError):
            pass                                       # its directory is gone

    def compared(self, one, data):
        """(in a word how a Result differs from the file of that name which was released then, the lines that
        are otherwise)."""
        then = self.files.get(one.name)
        if then is None:
            return (_("there was no file of this name then") if self.files else ""), []
        if then.digest == one.digest:
            return _("the same as then"), []
        told = _("another one than then (it had %d bytes)") % then.size
        try:
            with then.source.open() as reader:
                before = reader.read(min(then.size, VIEW_BYTES))
        except (OSError, ValueError):                  # what was released then is not there any more
            return told, []
        old, new = text_lines(before), text_lines(data)
        if b"\0" in before + data or max(len(old), len(new)) > COMPARED_LINES:
            return told, []
        import difflib
        found = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]         # (behind two heads)
        return told, [line[:1] + " " + visible(line[1:]) for line in found]


def last_released(control):
    """The control directory of what was released last of the same command, beside this one; or None."""
    folder, command, found = os.path.dirname(control), Hold(control).note()["command"], (0, None)
    for name in os.listdir(folder):
        one = Hold(os.path.join(folder, name))
        word = one.decision(0) if os.path.exists(one.path(b"decided")) else None
        told = word and word["what"] == "released" and one.note()["command"] == command
        if told and word["t"] > found[0]:
            found = word["t"], os.path.join(folder, name)
    return found[1]
# ==== end shared ====


# ==== shared: audit ====
# What the gate did, so that it can be proved: .mi/audit.log, a line of JSON for each event, on disk before
# the effect that it tells of. A line has a number (seq), the sum of the line before (prev) and its own (sum:
# the sha256 of the line without it): nothing can be changed, taken out or put in between unseen. That nothing
# was cut off the end, who has its heads ("SEQ.SUM") can tell: relay and workflow side keep those that they
# are told. What cannot be noted must not happen: then audit() raises OSError. No text of what is secret:
# words, names that may be told, numbers, sums. Beside an event's own fields a line has t (when, by the
# clock), up (for how many seconds this host was up), boot (since which start), event, run, rules (the sum of
# the owner's).
AUDIT = {"path": b"",          # where it is; empty: there is none (door `far`, `try`)
         "rules": "",          # the sum of the rules that this process goes by; empty: it does not say
         "to": "",             # whither what leaves goes
         "head": "",           # SEQ.SUM of the last line that is surely on the disk
         "late": False,        # are there lines of this process that may not be?
         "seen": None,         # (place_of() the log, its last line) when this process wrote last
         "why": ""}            # why the head could not be had, which was logged
AUDIT_MOST = 16 << 20          # bytes after which a new file is begun
AUDIT_LINE = 1 << 17           # bytes of a line at most
NAMES_TOLD = 16 << 10          # bytes of names in a line; of more: how many, and the sum of all
LIVE_STEP = 4096               # bytes of live output that are noted ahead, at least
UP_CLOCK = 7                   # CLOCK_BOOTTIME, which nobody can set and no sleep of the host stops
CLOCK_SET = 1.0                # seconds by which the clock was set, if that is an event
NOTHING = {"seq": 0, "sum": "0" * 64, "rules": ""}         # what stands before the first line
LINE_KEYS = {"seq": (int,), "prev": (str,), "event": (str,), "run": (str,), "t": (int, float),
             "up": (int, float), "boot": (str,), "rules": (str,)}          # of every line, and their kinds
MORE_KEYS = {"names": (list,), "verdicts": (dict,), "manifest": (str,)}        # of some
HEAD = re.compile(r"(?<![0-9A-Za-z.])([0-9]{1,15})\.([0-9a-f]{64})(?![0-9A-Za-z])")
AUDIT_TEXTS = {                # {event: what the report says of it}; others it leaves out
    "opened": "the poller was started", "leaves": "results leave",
    "live": "output leaves while the command runs", "kept": "not wanted there", "refused": "refused",
    "held": "held for a person", "shown": "shown to a person", "released": "released by a person",
    "changed": "what was held has changed: held anew",
    "expired": "held for too long: refused", "key": "a key was changed", "clock": "the clock was set",
    "rules": "the owner's rules are others than before", "torn": "a crash has torn a line"}
AUDIT_COLUMNS = ("time", "event", "run", "command", "files", "bytes", "to", "rules", "by", "manifest",
                 "verdicts", "names", "more")


def audit_into(path, ini=None, to=""):
    """From now on this process writes the log at path (bytes). ini: whose rules it goes by, None: it does not
    say; to: whither what leaves goes."""
    AUDIT.update(path=path, rules=audit_rules(ini) if ini else "", to=to)


def audit_path(settings, folder):
    """Where the log is (bytes), as [outbound] audit_log says, or in folder, the base's .mi."""
    given = os.path.expanduser(utf8(settings["outbound"]["audit_log"]))
    return os.path.join(folder, given or b"audit.log")


def audit_rules(ini):
    """The sum of the owner's rules: of what the ini says in [outbound], each [command NAME] and [signer
    NAME], and of signatures elsewhere. Stop 78 if it cannot be read."""
    import hashlib
    rows = [(section, key, text) for section, keys in parse_ini(ini).items() for key, text in keys
            if section.startswith(("outbound", "command ", "signer "))
            or key in ("require_signature", "accept_after", "result_key")]
    return hashlib.sha256(canonical(sorted(rows))).hexdigest()


def canonical(found):
    """The one text (bytes) that stands for what JSON can hold."""
    return json.dumps(found, sort_keys=True, separators=(",", ":")).encode("ascii")


def audit(event, run=None, synced=True, **fields):
    """One event of a run (its name, or None) into the log; synced: on disk before this returns, with all
    before it. OSError if it cannot be: then what it tells of must not happen."""
    if not AUDIT["path"]:
        return
    fault(event + " unaudited")
    fd = audit_opened()
    try:
        last, torn, before = audit_end(fd)
        stamps = {"boot": boot_id(), "t": round(time.time(), 3),
                  "up": round(time.clock_gettime(UP_CLOCK), 3), "rules": AUDIT["rules"] or last["rules"]}
        found = ([("torn", None, {"bytes": len(torn), "of": sum_of_bytes(torn)})] if torn else [])
        found += [("rotated", None, {"before": before})] if before else []
        found += unasked_events(last, stamps) + [(event, run, fields)]
        data = b"\n" if torn else b""
        for row in found:
            last = audit_entry(last, stamps, *row)
            data += canonical(last) + b"\n"
        append_whole(fd, data)
        fault(event + " written")
        AUDIT["seen"] = place_of(fd), last
        AUDIT["late"] = AUDIT["late"] or not synced
        if synced:
            sync_audit(fd, last)
    finally:
        close_audit(fd)
    fault(event + " audited")


def audit_head():
    """SEQ.SUM of the last line, which is on disk then; empty where there is no log, or none can be read."""
    if AUDIT["path"] and (AUDIT["late"] or not AUDIT["head"]):
        try:
            fd = audit_opened()
            try:
                sync_audit(fd, audit_end(fd)[0])
            finally:
                close_audit(fd)
            AUDIT["why"] = ""
        except OSError as error:                       # said once: it is asked for again each second
            if str(error) != AUDIT["why"]:
                AUDIT["why"] = str(error)
                log("error", None, "audit", error=error)
    return AUDIT["head"]


def finding_of_audit(path):
    """A row of `check`: may the log at path (bytes) be gone on with?"""
    try:
        with open(path, "rb") as text:
            last = audit_end_of(text.fileno())[0]
        return True, _("%s: ends with number %d") % (shown(path), last["seq"])
    except FileNotFoundError:
        return None, _("%s: there is no audit log") % shown(path)
    except OSError as error:
        return False, "%s: %s" % (shown(path), error.strerror)


def audit_live(run, told, stream, end):
    """Notes that a command's output may leave as far as its byte `end`, in few lines: it is noted ahead.
    told: {stream: as far as it was noted}. OSError: it may not."""
    if end > told.get(stream, 0):
        upto = max(LIVE_STEP, 2 * end)
        audit("live", run, stream=stream, upto=upto, to=AUDIT["to"])
        told[stream] = upto


def audit_leaving(run, command, found, noted=None, by=""):
    """Notes that what a Collector has found leaves: whither, how much, sum and names, and what stays by which
    rule. noted: {run: sum of what was noted last}: the same is not noted twice; by: who has released it."""
    if not AUDIT["path"]:
        return
    import hashlib
    digest, names, room = hashlib.sha256(), [], NAMES_TOLD
    for group in (found.found, found.folders):
        for result in group:
            row = [result.name, result.size, result.sum256]
            line = canonical(row) + b"\n"
            digest.update(line)
            room -= len(line)
            names += [row] if room > 0 else []
    if noted is not None and noted.get(run) == digest.hexdigest():
        return
    audit("leaves", run, command=command, to=AUDIT["to"], by=by, files=len(found.found), bytes=found.total,
          manifest=digest.hexdigest(), names=names, stays=dict(found.kept_by_rule),
          verdicts={code: entry["count"] for code, entry in found.verdicts.items()})
    if noted is not None:
        noted[run] = digest.hexdigest()


# How it is written

def audit_entry(last, stamps, event, run, fields):
    """The line (as an object) of an event behind the line `last`. stamps: what each line says of now."""
    entry = dict(fields, seq=last["seq"] + 1, prev=last["sum"], event=event, run=run or "", **stamps)
    whole = canonical(entry)
    if len(whole) > AUDIT_LINE // 2:                   # of lists that are too long only the sum of all
        entry.update({key: type(value)() for key, value in fields.items() if type(value) in (list, dict)},
                     of=sum_of_bytes(whole))
    return dict(entry, sum=sum_of_bytes(canonical(entry)))


def unasked_events(last, now):
    """What has changed from the line `last` to now (stamps): [(event, run, fields)]."""
    if not last["seq"]:
        return []
    found = []
    by = now["t"] - last["t"]
    if now["boot"] == last["boot"]:
        by -= now["up"] - last["up"]
    if by < -CLOCK_SET or by > CLOCK_SET and now["boot"] == last["boot"]:
        found.append(("clock", None, {"by": round(by, 3)}))
    if now["rules"] != last["rules"]:
        found.append(("rules", None, {"before": last["rules"]}))
    return found


def sum_of_bytes(data):
    """Their sha256, in hex."""
    import hashlib
    return hashlib.sha256(data).hexdigest()


def audit_opened():
    """A descriptor of the log, which no other process and thread writes meanwhile; what has grown too long is
    put aside before. OSError."""
    import fcntl
    while True:
        fd = os.open(AUDIT["path"],
                     os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            lock_audit(fd, fcntl.LOCK_EX)
            whole = os.fstat(fd).st_size <= AUDIT_MOST or audit_end_of(fd)[1] or not put_audit_aside(fd)
            if whole and is_at_path(fd, AUDIT["path"]):
                return fd
        except OSError:
            close_audit(fd)
            raise
        close_audit(fd)


def lock_audit(fd, how):
    """Waits for the lock. OSError if it is held; where there are no locks: a hope."""
    import fcntl
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise


def is_at_path(fd, path):
    """Is this still the log, and not one that was put aside just now?"""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def put_audit_aside(fd):
    """Gives the log (it is locked) the next number behind its name. False if that is not allowed here (chattr
    +a), True also if another process has done it."""
    path = AUDIT["path"]
    if not is_at_path(fd, path):
        return True
    older = audit_files(path)[:-1]
    number = int(older[-1].rpartition(b".")[2]) + 1 if older else 1
    try:
        os.rename(path, path + b".%d" % number)
        fault("log put aside")
        return True
    except PermissionError:
        return False


def close_audit(fd):
    """Lets others at it. (A fork of this process has the descriptor, too: closing it is not enough.)"""
    import fcntl
    lock_audit(fd, fcntl.LOCK_UN)
    os.close(fd)


def audit_end(fd):
    """(the last line, as an object; what is torn behind it, bytes; if nothing stands there yet, the name of
    the file that was put aside before). OSError if the last line is not one of a log's."""
    if AUDIT["seen"] and AUDIT["seen"][0] == place_of(fd):
        return AUDIT["seen"][1], b"", ""
    before = [] if os.fstat(fd).st_size else audit_files(AUDIT["path"])[:-1]
    if before:
        with open(before[-1], "rb") as older:
            return audit_end_of(older.fileno()) + (os.path.basename(before[-1]).decode("utf-8", "replace"),)
    return audit_end_of(fd) + ("",)


def place_of(fd):
    """Which file this is, and where its next line will stand."""
    info = os.fstat(fd)
    return info.st_dev, info.st_ino, info.st_size


def audit_end_of(fd):
    """The same of one file, but the name."""
    size = os.fstat(fd).st_size
    data = read_exactly(fd, min(size, AUDIT_LINE), max(0, size - AUDIT_LINE))
    whole, newline, torn = data.rpartition(b"\n")
    begun = newline or size > len(data)
    entry = parsed_line(whole.rpartition(b"\n")[2] + newline) if begun else NOTHING
    if entry is None:
        raise OSError(errno.EIO, _("its last line is none of an audit log's; see what `audit verify` says,"
                                   " and move it away"), shown(AUDIT["path"]))
    return entry, torn


def append_whole(fd, data):
    """All of it, or nothing. OSError."""
    size = os.fstat(fd).st_size
    if os.write(fd, data) != len(data):                # a full disk takes a part
        try:
            os.ftruncate(fd, size)
        except OSError:
            pass                                       # chattr +a: the next line says that it is torn
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), shown(AUDIT["path"]))


def sync_audit(fd, last):
    """All that was written is on disk; last: its last line."""
    os.fsync(fd)
    if last["seq"] < 3 or last["event"] == "rotated":
        sync_path(os.path.dirname(AUDIT["path"]))
    AUDIT.update(late=False, head="%d.%s" % (last["seq"], last["sum"]) if last["seq"] else "")


# How it is read

def audit_files(path):
    """The files of the log at path (bytes), the oldest first, which end with it."""
    folder, name = os.path.split(path)
    older = [one for one in os.listdir(folder or b".")
             if re.match(re.escape(name) + rb"\.[1-9][0-9]{0,8}\Z", one)]
    older.sort(key=lambda one: int(one.rpartition(b".")[2]))
    return [os.path.join(folder, one) for one in older] + [path]


def parsed_line(line):
    """A line (bytes) as an object; None if it is not, byte for byte, as audit() writes it."""
    try:
        entry = json.loads(line.decode("ascii"))
        rest = {key: value for key, value in entry.items() if key != "sum"}
        good = canonical(entry) + b"\n" == line and entry["sum"] == sum_of_bytes(canonical(rest))
        good = good and all(type(rest[key]) in kinds for key, kinds in LINE_KEYS.items())
        good = good and all(type(rest[key]) in kinds for key, kinds in MORE_KEYS.items() if key in rest)
        good = good and all(type(name) is list and name for name in rest.get("names", ()))
        return entry if good and abs(entry["t"]) < 1e11 else None      # (until the year 5138)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def audit_rows(path):
    """(file and line for people, is it the file's first?, the line, as an object or None, its bytes) of all
    files. OSError."""
    for file, size in audit_sizes(path):
        if not size and file != path:                  # emptied: none was put aside like this
            yield shown(file), True, None, b""
        with open(file, "rb") as text:
            for number, line in enumerate(text, 1):
                size -= len(line)
                if size < 0:                           # written since
                    break
                yield _("%s, line %d") % (shown(file), number), number == 1, parsed_line(line), line


def audit_sizes(path):
    """[(file, its bytes)] of the log as it is while nobody writes. OSError."""
    import fcntl
    while True:
        with open(path, "rb") as text:
            lock_audit(text.fileno(), fcntl.LOCK_SH)
            files = audit_files(path)
            found = [(file, os.stat(file).st_size) for file in files]
            same = is_at_path(text.fileno(), path)
            lock_audit(text.fileno(), fcntl.LOCK_UN)
            if same:
                return found


def verify_audit(path, heads):
    """(exit code, a sentence): is the log whole? heads: {seq: {sums}} that witnesses have. 0: it is; 76: it
    was changed; 65: something was cut off; 66: there is none; 74: it cannot be read."""
    last, torn, first = None, None, 0
    try:
        for where, begins, entry, line in audit_rows(path):
            if entry is None and torn is None:
                torn = where, line
                continue
            broken = torn[0] if torn else where
            if entry is None or not follows(last, entry, torn and torn[1], begins):
                return EX_PROTOCOL, _("broken at %s: from there on it was changed") % broken
            if entry["seq"] in heads and heads[entry["seq"]] != {entry["sum"]}:
                return EX_PROTOCOL, _("broken at %s: a witness has seen another line there") % where
            last, torn, first = entry, None, first or entry["seq"]
    except FileNotFoundError:
        return EX_NOINPUT, _("%s: there is no audit log") % shown(path)
    except OSError as error:
        return EX_IOERR, _("%s: cannot be read: %s") % (shown(path), error.strerror)
    if torn:
        return EX_PROTOCOL, _("broken at %s: from there on it was changed") % torn[0]
    if last is None:
        return EX_NOINPUT, _("%s: there is no audit log") % shown(path)
    here = last["seq"]
    if heads and (max(heads) > here or min(heads) < first):
        return EX_DATA, _("cut off: a witness has seen number %d, and here are %d to %d") % (
            max(heads) if max(heads) > here else min(heads), first, here)
    return 0, _("whole, from number %d to %d.%s") % (first, here, last["sum"])


def follows(last, entry, torn, begins):
    """May this line stand behind the line `last` (None: it is the first of all)? torn: bytes between, which a
    crash has left, as it must say itself; begins: it is the first of a file."""
    if torn is not None:
        told = entry["event"] == "torn" and (entry.get("bytes"), entry.get("of"))
        if told != (len(torn) - 1, sum_of_bytes(torn[:-1])):
            return False
    if last is None:
        return entry["event"] == "rotated" or (entry["seq"], entry["prev"]) == (1, NOTHING["sum"])
    rotated = not begins or entry["event"] == "rotated"
    return rotated and (entry["seq"], entry["prev"]) == (last["seq"] + 1, last["sum"])


def heads_told(given):
    """{seq: {sums}} of --witness: a head, or a file that holds some, whatever else stands there."""
    text = given or ""
    if os.path.exists(utf8(text)):
        with open(utf8(text), encoding="utf-8", errors="replace") as source:
            text = source.read()
    heads = {}
    for number, digest in HEAD.findall(text):
        heads.setdefault(int(number), set()).add(digest)
    if given and not heads:
        raise Stop(EX_USAGE, _("--witness %s: neither a head (NUMBER.SUM) nor a file with one")
                   % printable(given))
    return heads


def audit_verify(path, options):
    """`audit verify`: prints what it is; its exit code."""
    code, text = verify_audit(path, heads_told(options.witness))
    print(json_of({"code": code, "text": text}) if options.json else text)
    return code


def audit_report(path, options):
    """`audit report`, for who answers for what is secret: what left, when, whither, by which rules, released
    by whom, and what else happened to the log. The exit code of `audit verify`."""
    since = since_when(options.since)
    entries = (entry for where, begins, entry, line in audit_rows(path) if entry is not None)
    code, text = verify_audit(path, {})
    rows = ([] if code in (EX_NOINPUT, EX_IOERR) else
            [report_row(entry) for entry in entries
             if entry["event"] in AUDIT_TEXTS and iso_time(entry["t"]) >= since])
    if options.json:
        print(json_of({"code": code, "text": text, "events": rows}))
    elif options.csv:
        report_as_csv(rows)
    else:
        for row in rows:
            told = ["%s=%s" % (key, row[key]) for key in AUDIT_COLUMNS[3:] if row[key] not in ("", None)]
            print("  ".join([row["time"], _(AUDIT_TEXTS[row["event"]]), row["run"], " ".join(told)]).rstrip())
        print("-- " + text)
    return code


def since_when(text):
    """'7d' (ago), '2026-11-20', '2026-11-20T21:47' as an iso_time() begins. 64 for another."""
    if re.match(r"([0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9:]{0,8})?)?\Z", text):
        return text
    try:
        return iso_time(time.time() - seconds(text))
    except ValueError:
        raise Stop(EX_USAGE,
                   _("--since: a time ago (12h, 7d) or a date (2026-11-20, 2026-11-20T21:47), not %s")
                   % printable(text))


def report_row(entry):
    """A line of the log as a row of the report; texts are printable."""
    more = {key: value for key, value in entry.items() if key not in AUDIT_COLUMNS
            and key not in ("seq", "prev", "sum", "t", "up", "boot")}
    row = {key: entry.get(key, "") for key in AUDIT_COLUMNS}
    row.update(time=iso_time(entry["t"]), rules=entry["rules"][:12], manifest=row["manifest"][:12])
    row["verdicts"] = " ".join("%s:%s" % pair for pair in sorted(dict(row["verdicts"] or {}).items()))
    row["names"] = " ".join(json.dumps(name[0], ensure_ascii=False) for name in row["names"] or ())
    row["more"] = " ".join("%s=%s" % (key, canonical(value).decode()) for key, value in sorted(more.items())
                           if value not in ({}, ""))
    return {key: value if type(value) in (int, float) else printable(value) for key, value in row.items()}


def report_as_csv(rows):
    """Rows of the report as CSV; no cell that a spreadsheet would take for a formula."""
    import csv
    out = csv.writer(sys.stdout, lineterminator="\r\n")
    out.writerow(AUDIT_COLUMNS)
    for row in rows:
        cells = [str(row[key]) for key in AUDIT_COLUMNS]
        out.writerow([("'" if re.match("[=+@\uff1d\uff0b\uff0d\uff20-]", cell) else "") + cell
                      for cell in cells])
# ==== end shared ====


# ==== the doors of the gate ====
# Over ssh the gate has two doors, both this class Door. `guard` is the forced command of a key:
#     restrict,command="python3 -I -S .../execute_remote_command.py guard" KEY
# and has the ini's rules, [command NAME] and [outbound]. `far` is brought by the runner where a key may run
# anything anyway: a shell runs the command, and everything leaves. One session is one process; it answers
# requests, each a line of JSON, with a line of JSON. To be audited in one sitting, with the block gate:
#  - VERBS says what may be asked for: in which state, by which kind of session, with which words. What is
#    not in it is refused and, by a guard, logged. sshd hands a guard the command line of the other side: it
#    must have the one form FORM; the program text in it is dropped unread, and so are all words but the
#    protocol.
#  - No shell sees a word from the wire. The only texts given to sh are this file's constants WRAPPER and
#    INTO_LOG. (Door `far`: and the command, which is a shell's.)
#  - Inputs may be put into base/RUN until the command is started. A session that puts is noted in the run's
#    control directory base/.mi/RUN; `start` ends these sessions and sees them gone before the command
#    begins.
#  - Names are relative, without `..`; they are opened part by part with O_NOFOLLOW, so that no link leads
#    out.
#  - Where others than this user and root could have put what is run (base, or a directory that it stands
#    in), nothing is done.
#  - What leaves a guard has been judged by the Collector: a piece leaves only with the sum that was judged.
#    But for the log while it is written, which rule_against_live() judges, no answer holds bytes or sums of
#    anything else.
#  - What the owner keeps (keep_refused), and what has not arrived, is not removed.
INTO_LOG = 'umask "$1"; shift; exec >remote_program_exec.log 2>&1; exec "$@"'
FORM = re.compile(r"exec sh -c 'eval \"\$\(printf %b \"\$1\"\)\"' mi_distcomp '[^']*'((?: '[^']*'){4,8})\Z")
IDENT = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
# Of a session on another host, which puts, only its note tells. It writes nothing when it has not noted
# itself anew for LANE_NOTES seconds, and finds then whether its note still stood; so one whose note is
# LANE_SILENT seconds old by the file system's own clock writes nothing any more.
LANE_NOTES, LANE_SILENT = 15, 60
ENTRY_COST = 4096              # bytes of max_bytes that a file or a directory costs, however empty
REQUEST_MOST, PAGE = 1 << 16, 1 << 18  # bytes of a request's line, and about of a page of an answer
# bytes of a result that is not asked for in pieces; of a piece
BUNDLED_MOST, UNPACKED_MOST = 4 << 20, 64 << 20
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
LOGGED_VERDICTS = 1000         # results that stay and that guard.log names; of more it says how many
LOGGED_REFUSALS = 20           # refused requests of one session that guard.log tells
LOG_MOST, LOG_KEEP = 16 << 20, 8           # bytes of guard.log after which a new one is begun; older ones
PLAINLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
EVERYTHING = ("**", ".**")     # as patterns of results
NOT_THERE = ("unreadable", "changing", "name", "limit")            # verdicts of what should have arrived
# A run's way: none, taken (inputs come), queued, running, ended or lost, fetched, gone (known for a day).
NEW, UNDER_WAY, OVER = ("none", "taken"), ("queued", "running"), ("ended", "lost", "fetched")
STATES = NEW + UNDER_WAY + OVER + ("gone",)


# The two doors themselves

def cmd_audit(options):
    """audit verify, audit report: of the guard's base."""
    return (audit_verify if options.word == "audit verify" else audit_report)(
        guard_audit(guard_rules(options)), options)


def cmd_guard(options):
    """Serves a session of the key by the owner's rules (77 if it asks for anything else), or obeys the owner
    at his terminal: what he says never comes over the wire."""
    if options.print_key_line:
        return print_key_line(options)
    rules = guard_rules(options)
    if options.word_of_owner:
        audit_into(guard_audit(rules), rules["ini"])
        return obey_owner(options, rules)
    why = open_to_others(rules["base"])
    if why:
        raise Stop(EX_CONFIG, "[ssh guard] base: " + why)
    for folder in (rules["top"], rules["base"]):
        os.makedirs(os.path.join(folder, b".mi"), 0o700, exist_ok=True)
    audit_into(guard_audit(rules), rules["ini"],
               " ".join(["ssh", os.environ.get("SSH_CONNECTION", "-").split(" ")[0], rules["key"]]).strip())
    if rules["orders"].signers:
        rules["orders"].begun(time.time())             # what was signed before does not run
    text = os.environ.get("SSH_ORIGINAL_COMMAND", "")
    try:
        words = original_words(text)
        if words[:2] != ["2", "door"]:
            if words[:2] == ["1", "hold"]:             # what it says then, an older runner prints in one line
                os.write(1, b"mi_distcomp 1 hold\nthis guard speaks protocol 2: "
                            b"a newer execute_remote_command.py is needed\n")
            raise Refusal("refused", "an unknown verb")
        if take_session(rules) is None:
            why = b"all sessions of this key are taken (max_sessions)"
            os.write(1, b"\nmi_distcomp 2 no %d %s\n" % (EX_TEMPFAIL, why))
            return EX_TEMPFAIL
        os.write(1, b"\nmi_distcomp 2 door\n")
        Door(rules, Channel()).serve()
        return 0
    except Refusal as error:
        guard_log(rules, "warn", "-", "refused", why=error, asked=printable(text[-200:]))
        audit_refusal(None, "form")
        sys.stderr.write("refused by the guard: %s\n" % printable(error))
        return EX_REFUSED


def far(base, told):
    """The door `far`: called by what LOADER has brought. base: bytes, absolute; told: this file's sum."""
    env = dict(os.environ)

    def serve():
        rules = dict(far_rules(base), sum=told, env=env)
        os.write(1, b"\nmi_distcomp 2 door\n")
        Door(rules, Channel()).serve()
    run_as_program(serve)


def far_rules(base):
    """What holds for the door `far`, with this base (bytes): nothing is kept."""
    rules = {section: default_values(INI_KEYS[section]) for section in ("ssh guard", "outbound")}
    rules["outbound"]["max_files"] = MOST_FILES
    return dict(rules, base=os.path.realpath(base), umask=os.umask(0o077))


def guard_rules(options):
    """The owner's rules. 78 if there are rules that this guard cannot keep: it does not pretend to. A key
    with a name has a base of its own in the base: it sees, fetches and cleans what is there and nothing
    else."""
    ini = find_ini(options.ini, ini_folders(__file__)[:1], needed=True)   # beside this file, nowhere else
    read = mark_of(os.stat(utf8(ini)))
    rules = dict(read_ini(ini, INI_KEYS), read=read)
    rules["commands"] = commands_of(ini, rules)
    name = rules["key"] = getattr(options, "key", None) or ""
    if name and (not re.match(r"[A-Za-z0-9][-A-Za-z0-9._]{0,63}\Z", name) or re.match(IDENT + r"\Z", name)):
        raise Stop(EX_CONFIG, _("--key %s: a word of letters and digits, please") % printable(name))
    top = os.path.expanduser(utf8(rules["ssh guard"]["base"]))
    if top.startswith(b"~"):
        raise Stop(EX_CONFIG, _("%s: [ssh guard] base: no home directory is known here; "
                                "say it as an absolute path") % ini)
    rules["top"] = os.path.realpath(top)
    rules["base"] = os.path.join(rules["top"], utf8(name)) if name else rules["top"]
    rules["umask"], rules["ini"] = os.umask(0o077), ini
    # one memory for all keys: what one has used no other one uses
    rules["orders"] = order_rules(ini, rules, "ssh guard", os.path.join(rules["top"], b".mi"),
                                  rules["ssh guard"]["site"])
    return rules


def guard_audit(rules):
    """Where the audit log of the base is: of all keys one."""
    return audit_path(rules, os.path.join(rules["top"], b".mi"))


def audit_refusal(run, why):
    """Notes that something was refused; a full disk does not make it allowed. why: the code."""
    with contextlib.suppress(OSError):
        audit("refused", run, why=why, by=AUDIT["to"])


def original_words(text):
    """The words of a guard's SSH_ORIGINAL_COMMAND. Refusal if it has another form."""
    found = FORM.match(text)
    if not found:
        raise Refusal("refused", "not a request of this program")
    return re.findall(r" '([^']*)'", found.group(1))


def print_key_line(options):
    """The line for authorized_keys for the public key in KEYFILE."""
    with open(utf8(options.print_key_line), encoding="utf-8") as text:
        key = text.read().strip()
    if not re.match(r"(?:ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/=]+(?: [^\n]*)?\Z", key):
        raise Stop(EX_CONFIG, _("%s: not one public key") % printable(options.print_key_line))
    rules = guard_rules(options)
    if open_to_others(rules["base"]):
        raise Stop(EX_CONFIG, "[ssh guard] base: " + open_to_others(rules["base"]))
    key_name = " --key " + options.key if options.key else ""
    script = os.path.abspath(__file__)
    command = "%s -I -S %s guard --ini %s%s" % (sys.executable, script, rules["ini"], key_name)
    if re.search(r'["\\$`\s]', command.replace(" ", "")) or has_control_chars(command):
        raise Stop(EX_CONFIG, _("%s: put it where the path has no quotes, blanks or $") % printable(command))
    where = 'from="%s",' % rules["ssh guard"]["from"] if rules["ssh guard"]["from"] else ""
    sys.stdout.write('restrict,%scommand="%s" %s\n' % (where, command, key))
    return 0


def obey_owner(options, rules):
    """outbox, show, release, refuse: of the runs of all keys, or, with --key, of that one's. 64 for another
    word or run, 77 in a session of a key."""
    if "SSH_ORIGINAL_COMMAND" in os.environ:
        raise Stop(EX_REFUSED, _("these words are said at this host's terminal only"))
    word, limit, places = options.word_of_owner, rules["outbound"]["hold_for"], list(places_of_keys(rules))
    if word == "outbox":
        rows = [row for row in (held_row(place.ident, held_now(place), limit) for place in places) if row]
        print(json_of(rows) if options.json else "\n".join(map(held_line, rows)), end="\n" if rows else "")
        return 0
    found = [place for place in places if len(options.id) >= 8 and place.ident.startswith(options.id)]
    if word not in ("show", "release", "refuse") or len(found) != 1:
        raise Stop(EX_USAGE, _("say guard outbox, guard show ID, guard release ID, or guard refuse ID"
                               " --reason TEXT, with an ID of outbox"))
    ident, control = found[0].ident, held_now(found[0])
    with into_keeper_log(rules):
        if word == "show":
            must_wait(ident, Hold(control), limit)
            show_held(ident, control, limit, options.all, options.json)
            return 0
        if word == "release":
            release(ident, control, limit, options.unseen)
        else:
            refuse(ident, control, limit, options.reason)
    print(_("said; the runner's `resume` goes on with it"))
    return 0


def places_of_keys(rules):
    """The Place of every run of all keys; with --key, of that key's."""
    top, names = rules["base"], [b""]
    if not rules["key"] and os.path.isdir(top):
        names += [name for name in os.listdir(top) if os.path.isdir(os.path.join(top, name, b".mi"))]
    for name in names:
        base = os.path.join(top, name) if name else top
        for ident in run_names(base):
            yield Place(dict(rules, base=base, key=rules["key"] or os.fsdecode(name)), ident)


def held_now(place):
    """The control directory of a run. If that is over, and no runner has asked for its results yet, they are
    held now, where they are to be."""
    asked = place.has(b"held") or place.has(b"fetched") or place.state()["state"] not in OVER
    if not asked and ("hold" in place.let_out() or has_content_rules(place.rules["outbound"])):
        try:
            results = JudgedResults(place)
            results.collect(False)
            results.tree.close()
        except (OSError, Refusal):                     # nobody can look at it now
            pass
    return place.control


@contextlib.contextmanager
def into_keeper_log(rules):
    """What is logged meanwhile does not go to the other side."""
    SAY["log"] = keeper_log(rules)
    try:
        yield
    finally:
        SAY["log"] = None


def guard_log(rules, level, ident, step, **values):
    """One line into the guard's own log, not to who asks."""
    if "commands" not in rules:
        return
    if rules["key"]:
        values = dict(values, key=rules["key"])
    out = SAY["log"] = io.open(open_log(keeper_log(rules).path), "w", encoding="utf-8",
                              errors="backslashreplace")
    log(level, ident, step, client=os.environ.get("SSH_CONNECTION", "-").split(" ")[0], **values)
    SAY["log"] = None
    with contextlib.suppress(OSError):                 # a full disk does not stop the work
        out.close()


def open_log(path):
    """A descriptor to write to the log at path. One that has grown to LOG_MOST becomes path.1, that one
    path.2, up to LOG_KEEP."""
    import fcntl
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if os.fstat(fd).st_size < LOG_MOST:
        return fd
    fcntl.flock(fd, fcntl.LOCK_EX)                     # of two that see this, one does it
    try:
        older = [path] + [path + b".%d" % number for number in range(1, LOG_KEEP + 1)]
        for number in range(LOG_KEEP, 0, -1) if os.path.samestat(os.fstat(fd), os.stat(path)) else ():
            if os.path.exists(older[number - 1]):
                os.replace(older[number - 1], older[number])
        os.close(fd)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except PermissionError:                            # chattr +a
        return fd


# What may be asked for

def whole_number(low, high):
    """A kind: an integer from low to high."""
    return lambda value: type(value) is int and low <= value <= high


def text_like(shape):
    """A kind: a text that the expression matches as a whole."""
    return lambda value: type(value) is str and re.match(r"(?s)(?:%s)\Z" % shape, value) is not None


def is_name(value):
    """A kind: a name of a file."""
    try:
        return check_name(value) is value
    except ValueError:
        return False


def list_of(kind, most):
    """A kind: a list of at most so many of this kind."""
    return lambda value: type(value) is list and len(value) <= most and all(map(kind, value))


def is_bool(value):
    """A kind: yes or no."""
    return type(value) is bool


def is_input_row(row):
    """Is it [name, size, mode, mtime]? An empty directory has a slash at the end of its name."""
    good = type(row) is list and len(row) == 4 and type(row[0]) is str and LENGTH(row[1]) and MODE(row[2])
    return good and TIME(row[3]) and is_name(row[0][:-1] if row[0].endswith("/") and not row[1] else row[0])


LENGTH, TIME, MODE = whole_number(0, 1 << 50), whole_number(-1 << 62, 1 << 62), whole_number(0, 0o7777)
REQUEST_FIELDS = {             # each word of a request: its kind. OPTIONAL_FIELDS may be left out
    "v": whole_number(2, 2), "run": lambda value: value is None or text_like(IDENT)(value),
    "lane": text_like("|put|get"), "turn": text_like("[0-9a-z]{1,32}"), "check": is_bool, "size": LENGTH,
    "length": whole_number(0, UNPACKED_MOST), "name": is_name, "at": LENGTH,
    "files": lambda rows: type(rows) is list and all(map(is_input_row, rows)),
    "end": lambda row: type(row) is list and len(row) == 3 and is_input_row(["-"] + row),
    "command": text_like(r"[^\x00-\x08\x0a-\x1f\x7f]{1,16000}"), "offset": LENGTH,
    "grace": whole_number(0, 86400), "batch": lambda row: row is None or (
        list_of(text_like(".{1,4000}"), 100)(row) and "".join(row[:1]) in BATCH_SYSTEMS),
    "from": LENGTH, "inputs": is_bool, "names": list_of(is_name, 2000), "mtime": TIME,
    "pack": lambda value: is_bool(value) or value == "zstd", "zstd": is_bool,
    "but": list_of(text_like(".{0,2000}"), 20000), "more": is_bool, "discard": is_bool,
    "after": lambda value: value == "" or text_like(IDENT)(value), "signed": text_like(".{1,40000}")}
OPTIONAL_FIELDS = {"check", "length", "end", "batch", "inputs", "pack", "zstd", "more",
                   "discard", "signed"}
Verb = collections.namedtuple("Verb", "states lanes forms")
VERBS = {                      # (the words of a request decide which of a verb's forms it has)
    "hello": Verb(STATES, ("", "put", "get"), ("v run lane turn check",)),
    "put": Verb(NEW, ("", "put"), ("size files", "size name at length end", "size name end")),
    "start": Verb(("taken",) + UNDER_WAY + OVER, ("",), ("command batch signed",)),
    "state": Verb(STATES, ("", "put", "get"), ("zstd",)),
    "wait": Verb(UNDER_WAY + OVER, ("",), ("offset",)),
    "cancel": Verb(UNDER_WAY + OVER, ("",), ("grace",)),
    "results": Verb(OVER, ("", "get"), ("from inputs",)),
    "get": Verb(OVER, ("", "get"), ("names", "name at length size mtime pack")),
    "fetched": Verb(OVER, ("",), ("but more",)),
    "clean": Verb(NEW + OVER + ("gone",), ("",), ("discard",)),
    "list": Verb(STATES, ("",), ("after",)),
}


# A run, and where it is

class Place:
    """A run's directories on this side, base/RUN and base/.mi/RUN, and what they tell of it."""

    def __init__(self, rules, ident):
        self.rules = rules
        self.ident = ident
        self.ruled = "commands" in rules
        self.base = rules["base"]
        name = ident.encode()
        self.work = os.path.join(self.base, name)
        self.control = os.path.join(self.base, b".mi", name)
        # another key may have this RUN
        self.mark = b"CALC_DIR=" + self.work if self.ruled else b"MI_RUN=" + name + b".1"
        self.last = b"", -1                            # the directory of the last input, its descriptor

    def path(self, name):
        return os.path.join(self.control, name)

    def has(self, name):
        return os.path.exists(self.path(name))

    def note(self, name, found):
        """A note (JSON) of the control directory, on disk before this returns."""
        fresh = self.path(b"%s.%s.new" % (name, utf8(os.urandom(8).hex())))      # two sessions may be at it
        try:
            write_synced(fresh, json.dumps(found).encode())
            os.rename(fresh, self.path(name))
        except OSError:
            unlink_if_there(fresh)
            raise

    def noted(self, name):
        """That note; {} if there is none, or it cannot be read."""
        try:
            with open(self.path(name), "rb") as text:
                found = json.loads(text.read().decode())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError, RecursionError):
            return {}

    def state(self):
        """STATE of the protocol: {"state", "code", "why", "cancelled", "where"}."""
        there, code, why, where = "none", None, "", ""
        try:
            names = os.listdir(self.control)
            there = "taken" if set(names) - {b"gone"} and b"gone" not in names else "gone"
        except FileNotFoundError:
            names = []
        noted = b"journal" in names and os.path.getsize(self.path(b"journal")) > 0
        if there == "taken" and (noted or {b"ready", b"start", b"end", b"lost"} & set(names)):
            there, code, why, where = self.state_by_journal(names)
        found = {"state": there, "code": code, "why": why, "cancelled": b"cancelled" in names, "where": where}
        if b"fetched" in names and there in OVER:
            found.update(state="fetched", lost=there == "lost")
        for key in ("why", "where"):                   # words of a batch system, of the command's hooks
            found[key] = outward(self.rules["outbound"], found[key])
        return self.with_hold(found) if b"held" in names else found

    def with_hold(self, found):
        """STATE, and since when its results wait for a person; None: they do not."""
        if found["state"] not in OVER:
            return found
        with into_keeper_log(self.rules):
            return dict(found, held=Hold(self.control).pending(self.rules["outbound"]["hold_for"]))

    def state_by_journal(self, names):
        """(state, exit code, why, where) of a run that is more than `taken`. Only what the journal calls
        ended has ended; the rest is the keeper's, and where it is, is for people."""
        journal = Journal(self.path(b"journal"), needed=False)
        if b"journal" not in names or self.is_unwatched(journal):
            return self.state_without_journal(names)
        end = journal.last("ended")
        if end is not None:
            return end["state"], end["exit_code"], printable(end["reason"]), ""
        if read_batch(self.control):
            state, where = batch_state(os.path.dirname(self.control), self.control)
            return "queued" if state == "queued" else "running", None, "", where
        state, detail = command_state(self.control, time.time())
        if state == "elsewhere":
            return "running", None, "", "running on %s, of which only its files tell here" % detail.host
        waits = state == "ready" and self.noted(b"command").get("jobs") and not self.has(b"pre")
        return "queued" if waits else "running", None, "", ""

    def is_unwatched(self, journal):
        """Is nothing of the journal readable, and no keeper at it? Then the wrapper's files must tell."""
        told = any(isinstance(entry.get("what"), str) for entry in journal.entries)
        return not told and not os.path.lexists(entry_path(self))

    def state_without_journal(self, names):
        """The same of a run that an older version has started, and no keeper has looked at (see
        adopt_old_run), or whose journal is lost."""
        if b"lost" in names:
            with open(self.path(b"lost"), encoding="utf-8", errors="replace") as text:
                return "lost", None, text.read(1000), ""
        state, detail = command_state(self.control, time.time())
        if state in ("ended", "lost"):
            return (state, detail, "", "") if state == "ended" else (state, None, detail, "")
        return "running", None, "", ""

    def closed(self):
        """Why nobody can look into the working directory (the command closed or removed it), or ''."""
        try:
            os.close(os.open(self.work, os.O_RDONLY | FOLDER_FLAGS))
            return ""
        except OSError as error:
            more = "" if error.errno == errno.ENOENT else "; open it there, then resume"
            return "%s: %s%s" % (shown(self.work), error.strerror, more)

    def owners_key(self, key):
        """A key of the section [command NAME] that this run runs: as the ini says it now, or, if it is there
        no more, as it was said when the run was started. None if no section is known (it was started by an
        older guard)."""
        if not self.has(b"command"):
            return None
        noted = dict({"hold": True}, **self.noted(b"command"))
        now = [command for command in self.rules["commands"].values() if command["name"] == noted.get("name")]
        if not now and key not in noted:
            raise Refusal("refused", "what was noted of its command is broken: nothing of it leaves")
        return (now or [noted])[0][key]

    def let_out(self):
        """What may leave of this run, by how it was asked for (see AFTER_STOP)."""
        if not self.ruled:
            return AFTER_STOP["all"]
        found = self.state()
        lost = found["state"] == "lost" or found.get("lost")
        stopped = (lost or found["cancelled"] or (end_in_journal(self) or {}).get("stopped")
                   or (found["code"] or 0) > 128)
        keys = {key: self.owners_key(key) for key in ("after_stop", "patterns", "logs")}
        return leaving_kinds(
            {"after_stop": keys["after_stop"] or "", "patterns": keys["patterns"] is not False,
             "logs": keys["logs"] is not False, "hold": self.is_to_be_held()}, stopped)

    def is_to_be_held(self):
        """Do its results wait for a person whatever they are?"""
        hold = self.owners_key("hold")
        return self.rules["outbound"]["hold"] if hold is None else hold

    # Inputs, before the start

    def make_directories(self):
        """The run's directories, once."""
        if not os.path.isdir(self.control):
            with locked(os.path.join(self.base, b".mi", b"doors")):
                self.check_number()
                fresh = os.path.join(self.base, b".mi", b".new." + utf8(self.ident))
                remove_tree(fresh)                     # of one that was killed here
                os.mkdir(fresh, 0o700)
                write_synced(os.path.join(fresh, b"began"), b"")         # what is empty counts as gone
                if not os.path.isdir(self.control):
                    os.rename(fresh, self.control)
                    sync_path(os.path.dirname(self.control))
        try:
            os.mkdir(self.work, 0o700)
        except FileExistsError:
            pass

    def check_number(self):
        """Refusal if the key has as many runs here as it may; and as many again that are gone."""
        most = self.rules["ssh guard"]["max_runs"] if self.ruled else 0
        for _look in range(2 if most else 0):
            known, there = run_names(self.base), set(os.listdir(self.base))
            if len(known) < 2 * most and sum(utf8(name) in there for name in known) < most:
                return
            sweep_gone(self.base)
        if most:
            raise Refusal("refused", "%d calculations of this key are here (max_runs): clean some" % most)

    def putting_lanes(self):
        """[(path of the note, ProcessNote)] of the sessions that put inputs; a note's text is the turn of its
        line."""
        names = [name for name in os.listdir(self.control) if re.match(rb"lane\.\d+\Z", name)]
        found = [(self.path(name), read_note(self.path(name))) for name in names]
        return [(path, note) for path, note in found if note is not None]

    def keep_lane(self, turn):
        """This session, which puts, notes that it still does. Refusal if another one has taken its place."""
        if not self.has(b"lane.%d" % os.getpid()):
            raise Refusal("state", "a later session puts the inputs", state=self.state()["state"])
        self.begin_putting(turn)

    def begin_putting(self, turn):
        """This session puts inputs from now on: those of other turns are ended first. Refusal if the run was
        started meanwhile."""
        self.make_directories()
        with locked(self.path(b"lock")):
            state = self.state()["state"]
            if state not in NEW:
                raise Refusal("state", "inputs for a calculation that is " + state, state=state)
            self.end_lanes(turn)
            start = stat_of(os.getpid())[4].decode()
            row = "%d %s %s %s %s\n" % (os.getpid(), start, boot_id(), os.uname().nodename, turn)
            write_synced(self.path(b"lane.%d" % os.getpid()), utf8(row))

    def end_putting(self):
        """This session puts nothing more."""
        if self.last[1] >= 0:
            os.close(self.last[1])
        self.last = b"", -1
        unlink_if_there(self.path(b"lane.%d" % os.getpid()))

    def end_lanes(self, turn=None):
        """Ends the other sessions that put inputs, but those of this turn, and sees them gone; the lock is
        held."""
        until = time.monotonic() + KILL_TRIES
        while True:
            others = [(path, note) for path, note in self.putting_lanes()
                      if note.text != turn and note.pid != os.getpid()]
            for path, note in others:
                here = note.boot == boot_id() or note.host == os.uname().nodename
                if is_alive(note):
                    signal_to(note.pid, signal.SIGKILL)
                elif here or self.clock() - note.time > LANE_SILENT:
                    unlink_if_there(path)
            if not others:
                return
            if time.monotonic() > until:
                host = others[0][1].host
                raise Refusal("host", "a session on %s still puts inputs; it counts as gone when it has noted"
                         " nothing for %d seconds" % (host, LANE_SILENT), host=host)
            time.sleep(0.005)

    def clock(self):
        """The time of the file system, which other hosts have, too."""
        os.utime(self.path(b"lock"))
        return os.stat(self.path(b"lock")).st_mtime

    def open_folder(self, parts):
        """A descriptor of the directory at parts below the working directory, made if need be, reached
        without following a link; it stays open until another one is asked for."""
        name = b"/".join(parts)
        if self.last[1] >= 0 and self.last[0] == name:
            return self.last[1]
        here = os.open(self.work, os.O_RDONLY | FOLDER_FLAGS)
        for part in parts:
            try:
                try:
                    os.mkdir(part, 0o700, dir_fd=here)
                    self.count_bytes(ENTRY_COST)
                except FileExistsError:
                    pass
                except Refusal:
                    os.rmdir(part, dir_fd=here)
                    raise
                there = os.open(part, os.O_RDONLY | FOLDER_FLAGS, dir_fd=here)
            finally:
                os.close(here)
            here = there
        if self.last[1] >= 0:
            os.close(self.last[1])
        self.last = name, here
        return here

    def open_new_input(self):
        """A descriptor to write an input to that comes in one, for put_in_place(): a session that is ended
        meanwhile leaves what was there before."""
        self.count_bytes(ENTRY_COST)
        path = self.path(b"put.%d" % os.getpid())
        unlink_if_there(path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAINLY, 0o600)

    def put_in_place(self, fd, name):
        """The input `name` (text) is what was written to this descriptor; its mark."""
        parts = utf8(name).split(b"/")
        os.rename(self.path(b"put.%d" % os.getpid()), parts[-1], dst_dir_fd=self.open_folder(parts[:-1]))
        return mark_of(os.fstat(fd))

    def open_input(self, name):
        """A descriptor of the input `name` (text) to write pieces to."""
        self.count_bytes(ENTRY_COST)
        parts = utf8(name).split(b"/")
        folder, how = self.open_folder(parts[:-1]), os.O_WRONLY | os.O_CREAT | PLAINLY
        try:
            fd = os.open(parts[-1], how, 0o600, dir_fd=folder)
        except PermissionError:                        # read-only by now: once more, as the answer was lost
            self.allow_writing(parts[-1], folder)
            fd = os.open(parts[-1], how, 0o600, dir_fd=folder)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            os.close(fd)
            raise Refusal("refused", "not a regular file of its own: %s" % name)
        return fd

    @staticmethod
    def allow_writing(name, folder):
        """Makes a file that we own writable again."""
        fd = os.open(name, os.O_RDONLY | PLAINLY, dir_fd=folder)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)

    def count_bytes(self, size, end=0):
        """Counts bytes that come in, over all sessions. Refused beyond max_bytes, as is a file that ends
        there."""
        most = self.rules["ssh guard"]["max_bytes"]
        if not most:
            return
        with locked(self.path(b"bytes")) as book:
            told = os.pread(book, 64, 0).strip()
            used = (int(told) if re.match(rb"[0-9]{1,40}\Z", told) else 0) + size
            if max(used, end) > most:
                raise Refusal("refused", "more than max_bytes = %d" % most)
            os.pwrite(book, b"%040d" % used, 0)        # in place: this needs no room on a full disk

    def complete_input(self, fd, size, mode, mtime):
        """The size, mode and time (nanoseconds) of an input; its mark, by which is seen that nobody touched
        it."""
        if os.fstat(fd).st_size > size:                # of an older one
            os.ftruncate(fd, size)
        elif os.fstat(fd).st_size < size:
            raise Refusal("refused", "pieces of it are missing")
        mode &= 0o777 & ~self.rules["umask"]
        for act, how in ((os.fchmod, {"mode": mode}), (os.utime, {"ns": (mtime, mtime)})):
            try:
                act(fd, **how)
            except PermissionError:                    # vfat, CIFS, FUSE
                pass
        return mark_of(os.fstat(fd))

    def note_inputs(self, rows):
        """Notes [(name, mark)] of inputs that are whole."""
        text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        self.count_bytes(len(text))
        with open(self.path(b"inputs"), "ab") as out:
            out.write(text)

    def forget(self, left):
        """Removes what was known of the run, but that it was here: a start that the network held back finds
        that for a day."""
        last = (b"end", b"start", b"lost", b"lock", b"fetched", b"gone")
        for name in sorted(os.listdir(self.control), key=lambda name: name in last):
            if name == b"end" or name == b"start" or name == b"lost":
                open(self.path(b"gone"), "ab").close()
            if name not in (b"lock", b"gone"):
                left += remove_tree(self.path(name))
        open(self.path(b"gone"), "ab").close()
        unlink_if_there(self.path(b"lock"))

    def untouched_inputs(self):
        """The names of the inputs that nobody has touched since they were put."""
        marks, found = {}, set()
        try:
            with open(self.path(b"inputs"), "rb") as text:
                for row in text:
                    name, mark = json.loads(row.decode())
                    marks[name] = tuple(mark)
        except (OSError, ValueError, TypeError, RecursionError):
            return set()                               # an old run has none; what cannot be read is fetched
        for name, mark in marks.items():
            try:
                info = os.lstat(os.path.join(self.work, utf8(name.rstrip("/"))))
            except OSError:
                continue
            if name.endswith("/") or mark_of(info) == mark:
                found.add(name)
        return found


def mark_of(info):
    """What tells that a file is still the same one."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def unlink_if_there(name, folder=None):
    """Removes that entry of a directory (a descriptor)."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass


def host_id():
    """What this host is called for as long as it stands."""
    try:
        with open("/etc/machine-id") as text:
            return text.read(100).strip() or os.uname().nodename
    except OSError:
        return os.uname().nodename


@contextlib.contextmanager
def locked(path):
    """Nobody else holds this lock file (bytes) meanwhile; the descriptor of it. (Where there are no locks: a
    hope.)"""
    import fcntl
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise
        yield fd
    finally:
        os.close(fd)


# The command

def default_keys():
    """The keys of a [command NAME], as nobody has written them: those of the door `far`."""
    return default_values(INI_KEYS["command *"])


def permitted_command(rules, text):
    """(command, argv) of what a request wants to run, by the owner's sections [command NAME]. Refusal,
    Forbidden."""
    words = shell_words(text)
    command, argv = permit_command(rules["commands"], "".join(words[:1]), words[1:])
    if unfit(command):
        raise Refusal("refused", "[command %s] %s: %s" % ((command["name"],) + unfit(command)))
    return command, argv


def shell_command(text, batch):
    """The same where there are no rules: a shell's command line; batch: a batch system and options of its
    own."""
    keys = default_keys()
    if batch:
        keys.update(batch=batch[0], batch_options=batch[1:])
    try:
        options = submit_options(keys, ())[0]
    except ValueError as error:
        raise Refusal("refused", str(error))
    return dict(keys, name="far", env={}, options=options), [os.environ.get("SHELL") or "/bin/sh", "-c", text]


def permit_inputs(place, command):
    """Forbidden if an input that is here has a name that the command does not take."""
    if command["input_names"]:
        tree = ResultTree(place.work)
        try:
            for name, _real, info, stays in tree.walk():
                permit_input(command, shown(name))
        finally:
            tree.close()


def permit_order(place, command, text, signed):
    """Forbidden unless the order may run here (see seal), with the inputs that are here; from here on it is
    used."""
    rules, now = place.rules["orders"], time.time()
    wanted = {"command": text, "parameters": "", "result_files": [], "result_patterns": list(EVERYTHING)}
    order = rules.permit(signed, wanted, command, now)
    if order and sum_of_manifest(input_rows(place)) != order["inputs"]:
        raise Forbidden(_("this order does not run here: %s")
                        % _("its inputs are not those that were signed"))
    rules.use(order, command, place.control, now)
    write_synced(place.path(b"signed"), utf8(signed))


def small_text(path):
    """The text of a small file of ours, "" if it is not there."""
    try:
        with open(path, encoding="utf-8") as text:
            return text.read(1 << 20)
    except FileNotFoundError:
        return ""


def input_rows(place):
    """The rows of a manifest (see sum_of_manifest()) of what was put. Refusal if something cannot be read."""
    tree = ResultTree(place.work)
    try:
        for name, real, info, stays in tree.walk():
            if stays is not None:
                raise stays
            if name.endswith(b"/"):
                yield shown(name), 0, sums_of_file(-1, 0)[0].hex(), False
                continue
            fd = tree.open(real)
            try:
                yield shown(name), info.st_size, sums_of_file(fd, info.st_size)[0].hex(), False
            finally:
                os.close(fd)
    except Stays as stays:
        raise Refusal("error", "an input cannot be read: %s" % stays)
    finally:
        tree.close()


def read_log(place, offset):
    """(the log's next bytes, its size then); none while it is not a plain file of its own."""
    try:
        fd = os.open(os.path.join(place.work, utf8(LOG)), os.O_RDONLY | PLAINLY)
    except OSError:
        return b"", 0
    try:
        info = os.fstat(fd)
        own = stat.S_ISREG(info.st_mode) and info.st_nlink == 1
        return (os.pread(fd, BLOCK, offset), os.fstat(fd).st_size) if own else (b"", 0)
    finally:
        os.close(fd)


# The sessions

def check_request(words, lane, state):
    """The verb of a request, taken out of its words, if VERBS has it, for such a session, in this state.
    Refusal."""
    verb = words.pop("do", None)
    told = VERBS.get(verb) if isinstance(verb, str) else None
    if told is None or lane not in told.lanes:
        raise Refusal("refused", "an unknown verb, or not one of this session")
    if not any(set(form) - OPTIONAL_FIELDS <= set(words) <= set(form) for form in map(str.split, told.forms)):
        raise Refusal("refused", "words that do not belong to " + verb)
    for name in sorted(words):
        if not REQUEST_FIELDS[name](words[name]):
            raise Refusal("refused", "%s: %s is not as it must be" % (verb, name))
    if state not in told.states:
        raise wrong_state(verb, state)
    return verb


def wrong_state(verb, state):
    """The Refusal of a verb that is not for this state."""
    if state == "gone" or state == "none" and verb != "put":
        return Refusal("gone", "nothing of this calculation is here", state=state)
    return Refusal("state", "%s: not for a calculation that is %s" % (verb, state), state=state)


def parse_request(row):
    """{word: value} of a request's line. Refusal."""
    try:
        words = json.loads(row.decode("ascii"))
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, dict) or not row.endswith(b"\n"):
        raise Refusal("refused", "not a request of this protocol")
    return words


class Refusal(Exception):
    """An answer that says no: refused (by rule or form), state, gone, host (it is another one's), disk,
    error."""

    def __init__(self, code, why, **more):
        Exception.__init__(self, why)
        self.told = dict(more, no=code, why=printable(why))


class Door:
    """One session: requests in their order. rules: the owner's, or far_rules()."""

    def __init__(self, rules, wire):
        self.rules = rules
        self.wire = wire
        self.name = "guard" if "commands" in rules else "far"
        self.place = None
        self.lane = ""                                 # as it was said in hello
        self.turn = None
        self.putting = False                           # since when inputs come, time.monotonic()
        self.over_limit = False                        # is the live output, which was said?
        self.judged = None                             # the JudgedResults
        self.found = None                              # its Collector
        self.packer = Packer(self.name == "far")
        self.incomplete = False                        # has not all arrived that was asked for?
        self.refusals = 0
        self.refused = False                           # has the audit log a refusal of this session?
        self.live_noted = {}                           # {stream: as far as the audit log has it}
        self.greeted = set()                           # runs that guard.log has a hello of

    def serve(self):
        """Answers until nobody asks any more, or what is asked makes no sense."""
        try:
            while self.serve_request():
                self.wire.skip_owed()
        except EOFError:
            pass
        finally:
            if self.putting:
                self.place.end_putting()

    def serve_request(self):
        """One request and its answer. False if nobody can know where the next one begins."""
        words = None
        try:
            words = parse_request(self.wire.request_line())
            self.check_rules()
            if words.get("do") == "put" and LENGTH(words.get("size")):
                self.wire.owed = words["size"]
            getattr(self, "do_" + self.permitted_verb(words))(**words)
        except (Refusal, Forbidden) as error:
            self.refuse(getattr(error, "told", None) or {"no": "refused", "why": printable(error)})
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            self.wire.say({"no": "disk" if full else "error", "why": printable(error.strerror or error)})
        if words is None:
            self.wire.flush()
        return words is not None

    def permitted_verb(self, words):
        """The verb of a request that this session may ask for now, taken out of its words. Refusal."""
        if (self.turn is None) != (words.get("do") == "hello") and (self.turn is None or self.lane):
            raise Refusal("refused", "hello comes first, and once")
        verb = check_request(words, self.lane, self.state()["state"])
        if self.place is None and verb not in ("hello", "list"):
            raise Refusal("refused", "no calculation was named in hello")
        return verb

    def check_rules(self):
        """EOFError if the owner has changed the ini since this session began: the next one goes by that."""
        try:
            same = self.name == "far" or mark_of(os.stat(utf8(self.rules["ini"]))) == self.rules["read"]
        except OSError:
            same = False
        if not same:
            guard_log(self.rules, "info", self.place and self.place.ident, "end", why="the ini has changed")
            raise EOFError

    def refuse(self, told):
        self.wire.say(told)
        self.refusals += 1
        if told["no"] == "refused" and not self.refused:
            self.refused = True                        # once a session: asking again fills no disk
            audit_refusal(self.place and self.place.ident + ".1", "refused")
        if told["no"] == "refused" and self.refusals <= LOGGED_REFUSALS:
            guard_log(self.rules, "warn", self.place and self.place.ident, "refused", why=told["why"])

    def state(self):
        """STATE of the protocol."""
        return self.place.state() if self.place is not None else {"state": "none"}

    def do_hello(self, v, run, lane, turn, check=False):
        began = time.monotonic()
        if self.putting:
            self.place.end_putting()
        self.place = Place(self.rules, run) if run else None
        self.lane, self.turn, self.putting, self.found = lane, turn, False, None
        self.forget_results()
        base = self.rules["base"]
        if run:
            adopt_old_run(self.place)
        if not check:                                  # which leaves all as it is
            ensure_keeper(self.rules)
        free = os.statvfs(existing(base))
        more = {"v": 2, "program": VERSION, "sum": self.rules.get("sum", ""), "door": self.name,
                "host": host_id(), "boot": boot_id(), "aes": has_aes(), "free": free.f_bavail * free.f_frsize}
        if check:
            more.update(python=sys.version.split()[0], kill=kills_at_log_out(), runs=len(run_names(base)))
        told = self.state()
        if run not in self.greeted and (told["state"] != "none" or len(self.greeted) < LOGGED_REFUSALS):
            self.greeted.add(run)                      # once: nobody pushes older lines out of the log
            guard_log(self.rules, "info", run, "hello", lane=lane)
        self.wire.say(dict(told, took=int((time.monotonic() - began) * 1e6), **more))
        if run and not lane and told["state"] == "none":
            self.wire.flush()
            adopter()                                  # while the answer travels: start needs it

    def do_put(self, size, files=None, name=None, at=None, length=None, end=None):
        self.put_on()
        if files is None:
            return self.put_piece(size, name, at, length, end)
        if sum(row[1] for row in files) != size:
            raise Refusal("refused", "put: sizes that do not make up the whole")
        sums, marks = [], []
        for name, bytes_of, mode, mtime in files:
            if name.endswith("/"):
                self.place.open_folder(utf8(name[:-1]).split(b"/"))
                sums.append("")
                marks.append((name, ()))
                continue
            import hashlib                             # 3 ms, which a run without inputs does not wait for
            fd = self.place.open_new_input()
            try:
                sums.append(self.receive_into(fd, 0, bytes_of, hashlib.sha256()))
                self.place.complete_input(fd, bytes_of, mode, mtime)
                marks.append((name, self.place.put_in_place(fd, name)))
            finally:
                os.close(fd)
        self.place.note_inputs(marks)
        self.wire.say({"sums": sums})

    def put_on(self):
        """This session may put something now. Refusal."""
        if self.putting and time.monotonic() - self.putting < LANE_NOTES:
            return
        (self.place.keep_lane if self.putting else self.place.begin_putting)(self.turn)
        self.putting = time.monotonic()

    def put_piece(self, size, name, at, length, end):
        """A piece of a large input, and (or) its end."""
        import hashlib
        if end is None and at is None or at is None and size:
            raise Refusal("refused", "put: bytes without a place")
        sums, fd = [], self.place.open_input(name)
        try:
            if length is not None:
                packed = b"".join(map(bytes, self.wire.blocks(min(size, UNPACKED_MOST + 65536))))
                data = self.packer.unpack(packed, length)
                if data is None:
                    raise Refusal("refused", "a piece that unpacks to something else than it says")
                self.put_on()
                self.place.count_bytes(length, at + length)
                self.write_at(fd, data, at)
                sums = [hashlib.sha256(data).hexdigest()]
            elif at is not None:
                sums = [self.receive_into(fd, at, size, hashlib.sha256())]
            if end is not None:
                self.place.count_bytes(0, end[0])
                self.place.note_inputs([(name, self.place.complete_input(fd, *end))])
        finally:
            os.close(fd)
        self.wire.say({"sums": sums})

    def receive_into(self, fd, at, size, digest):
        """The next `size` bytes that come, into a file; their sum, by this digest."""
        for data in self.wire.blocks(size):
            self.put_on()                              # it may have waited long
            digest.update(data)
            self.place.count_bytes(len(data), at + len(data))
            self.write_at(fd, data, at)
            at += len(data)
        return digest.hexdigest()

    @staticmethod
    def write_at(fd, data, at):
        """Writes it there, zeros as a hole where they are one already."""
        write_sparse(fd, data, at)
        if os.fstat(fd).st_size < at + len(data):
            os.ftruncate(fd, at + len(data))

    def do_start(self, command, batch=None, signed=""):
        if batch and self.name == "guard":
            raise Refusal("refused", "the guard decides about the batch system")
        text, place = command, self.place
        command, argv = permitted_command(self.rules, text) if place.ruled else shell_command(text, batch)
        missing = command["batch"] != "none" and missing_batch_program(command["batch"], batch_env(command))
        if missing and place.state()["state"] == "taken":
            raise Refusal("config", missing)
        with locked(place.path(b"lock")):
            if place.state()["state"] == "taken":
                self.begin_command(command, argv, text, signed)
            if place.noted(b"command").get("text", text) != text:
                raise Refusal("refused", "another command than the one that was asked for first")
        ensure_keeper(self.rules)
        self.wire.say(self.state())
        self.wire.flush()
        import hashlib
        hashlib.sha256()                               # loaded while the command runs: its results need it

    def begin_command(self, command, argv, text, signed):
        """No input comes any more: the order. signed: as a text, "" where nobody has signed it."""
        place, run = self.place, self.place.ident + ".1"
        place.end_lanes()
        if self.putting:
            place.end_putting()
            self.putting = False
        place.make_directories()
        permit_inputs(place, command)
        if place.ruled:
            permit_order(place, command, text, signed)
        env = command_env(command, place.work, run) if place.ruled else dict(self.rules["env"], MI_RUN=run)
        audit("order", run, synced=False, command=command["name"], info=sum_of_bytes(utf8(text)),
              by=AUDIT["to"])
        guard_log(self.rules, "info", place.ident, "start", command=command["name"],
                  argv=json.dumps(argv, ensure_ascii=False))
        begin_run(place, command, ["sh", "-c", INTO_LOG, "sh", "%o" % self.rules["umask"]] + argv, env, text)

    def do_state(self, zstd=False):
        self.wire.say(dict(self.state(), zstd=self.packer.zstd() is not None) if zstd else self.state())

    def live_log(self, offset, kinds):
        """The log's next bytes that may leave while the command runs. kinds: let_out()."""
        data, size = read_log(self.place, offset)
        why = data and rule_against_live(self.rules["outbound"], kinds, LOG, size, 0)
        if why in ("max_file", "max_total") and not self.over_limit:
            self.over_limit = True                     # said once
            guard_log(self.rules, "warn", self.place.ident, "no more live output", rule=why, bytes=size)
        if data and not why:
            try:
                audit_live(self.place.ident + ".1", self.live_noted, "log", offset + len(data))
            except OSError:                            # it leaves with the results, when it can be noted
                return b""
        return b"" if why else data

    def do_wait(self, offset):
        __import__("hashlib")                          # for what comes then: here is time
        place, said, pause, looked = self.place, None, 0.002, time.monotonic()
        kinds = place.let_out()
        try:
            alive = os.open(place.path(b"alive"), os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            alive = -1
        try:
            while True:
                self.check_rules()
                state = self.state()
                data = self.live_log(offset, kinds)
                if data:
                    self.wire.say({"log": offset}, data)
                    offset, pause = offset + len(data), 0.02
                    continue
                if state["state"] not in UNDER_WAY:
                    return self.wire.say(dict(state, end=True))
                if state != said:
                    self.wire.say(state)
                    said = state
                if self.wire.wait(pause, alive):
                    os.close(alive)
                    alive, pause = -1, 0.002
                looked = self.keep_keeper(looked)
                pause = min(pause * 1.5, 0.05 if place.has(b"end") else 0.5)
        finally:
            if alive >= 0:
                os.close(alive)

    def keep_keeper(self, looked):
        """Once a second it is seen that a keeper lives. looked: when it was, time.monotonic(); now, if so."""
        if time.monotonic() - looked < 1:
            return looked
        ensure_keeper(self.rules)
        return time.monotonic()

    def do_cancel(self, grace):
        place, state = self.place, command_state(self.place.control, time.time())
        if not read_batch(place.control) and state[0] == "elsewhere":
            raise Refusal("host", "it runs on %s: cancel it from there" % state[1].host, host=state[1].host)
        if self.state()["state"] in UNDER_WAY:
            try:                                       # its end is not its own: see AFTER_STOP
                write_synced(place.path(b"cancelled"), b"%d" % grace)
            except OSError:                            # a full disk: that it is there is the word
                if not place.has(b"cancelled"):
                    raise
        ensure_keeper(self.rules)
        looked, until = time.monotonic(), time.monotonic() + grace + 2 * KILL_TRIES
        until += 2 * END_LATE if read_batch(place.control) else 0
        while self.state()["state"] in UNDER_WAY and time.monotonic() < until:
            time.sleep(0.01)
            looked = self.keep_keeper(looked)
        self.wire.say(self.state())

    def results(self):
        """The JudgedResults of this run."""
        self.judged = self.judged or (JudgedResults if self.place.ruled else UnjudgedResults)(self.place)
        return self.judged

    def forget_results(self):
        """They are looked at anew."""
        if self.judged is not None:
            self.judged.tree.close()
        self.judged = None

    def do_results(self, inputs=False, **page):
        at, room = page["from"], PAGE
        closed = "" if at or self.place.has(b"held") else self.place.closed()
        if closed:
            told = {"verdicts": {"unreadable": {"count": 1, "names": [closed]}}}
            self.place.note(b"out", told)
            return self.wire.say(dict(told, files=[], folders=[], next=None))
        if not at or self.found is None:
            self.forget_results()
            self.found = self.results().collect(inputs)
        files, folders, found = [], [], self.found
        count, total = len(found.found), len(found.found) + len(found.folders)
        while at < total:
            one = found.found[at] if at < count else found.folders[at - count]
            room -= 6 * len(one.name) + 120
            if room < 0:
                return self.wire.say({"files": files, "folders": folders, "next": at})
            if at < count:
                files.append([one.name, one.size, one.mtime, one.executable, one.sum256 or None])
            else:
                folders.append([one.name, one.mtime])
            at += 1
        told = {"files": files, "folders": folders, "next": None, "verdicts": found.verdicts}
        more = {"audit": AUDIT["head"], "signed": self.signed_results(found)}
        self.wire.say(dict(told, **{key: value for key, value in more.items() if value}))

    def signed_results(self, found):
        """What this computer says of the results, signed; "" without a result_key. Refusal if it cannot."""
        key, state = self.rules["ssh guard"].get("result_key"), self.state()
        if not key or not self.place.ruled:
            return ""
        rows = ((one.name, one.size, one.sum256, one.executable)
                for group in (found.found, found.folders) for one in group)
        told = {"site": "".join(self.rules["ssh guard"]["site"][:1]), "run": self.place.ident + ".1",
                "exit_code": state["code"], "signal": None, "reason": state["why"]}
        order = small_text(self.place.path(b"signed"))
        try:
            return signed_results(key, told, self.place.control, self.rules["outbound"], rows,
                                  found.verdicts, order)
        except Stop as stop:
            raise Refusal("config", str(stop))

    def do_get(self, names=None, name=None, at=0, length=0, size=0, mtime=0, pack=False):
        if names is None:
            return self.get_piece((name, at, length, size, mtime), pack)
        rows, parts, size = [], [], 0
        for name in names:
            try:
                row, data = self.results().read_small(name)
            except (OSError, Stays) as error:
                row, data = stays_for(error).code, b""
            rows.append(row)
            parts.append(data)
            size += len(data)
            if size >= BLOCK:
                self.wire.say({"bundle": rows}, *parts)
                rows, parts, size = [], [], 0
        if rows:
            self.wire.say({"bundle": rows}, *parts)

    def get_piece(self, piece, pack):
        """A piece of a large result: a header, its bytes, and behind them their sum, or why they count for
        nothing."""
        import hashlib
        length, read = piece[2], functools.partial(self.results().read_piece, *piece)
        try:
            parts, digest = self.packer.pack(read(), pack == "zstd") if pack else ([], None)
            if 0 < sum(map(len, parts)) < length * 0.9:
                self.wire.say({"length": length}, *parts)
                return self.wire.say({"sum": digest.hexdigest()})
            blocks = read()
            data = next(blocks, b"")
        except (OSError, Stays) as error:
            return self.wire.say({"verdict": stays_for(error).code})
        self.wire.say({"size": length})
        self.wire.say_bytes(data)
        self.wire.say(self.send_rest(blocks, length - len(data), hashlib.sha256(data)))

    def send_rest(self, blocks, left, digest):
        """Sends the other blocks of a piece; zeros in place of what cannot be had any more. What is told
        then."""
        try:
            for data in blocks:
                self.wire.say_bytes(data)
                digest.update(data)
                left -= len(data)
            return {"sum": digest.hexdigest()}
        except (OSError, Stays) as error:
            while left:
                self.wire.say_bytes(bytes(min(left, BLOCK)))
                left -= min(left, BLOCK)
            return {"verdict": stays_for(error).code}

    def do_fetched(self, but, more=False):
        self.incomplete = self.incomplete or bool(but) # whether, not which: they may be very many
        verdicts = self.place.noted(b"out").get("verdicts")
        if verdicts is None:
            raise Refusal("state", "results were not asked for yet", state=self.state()["state"])
        if not more:
            if not self.incomplete and not (set(NOT_THERE) | {"held"}) & set(verdicts):
                if not self.place.has(b"fetched"):
                    audit("left", self.place.ident + ".1", synced=False)
                self.place.note(b"fetched", {"refused": verdicts.get("refused", {}).get("count", 0)})
            self.incomplete = False
        self.wire.say(self.state())

    def why_kept(self):
        """Why the owner keeps what is here, or None."""
        keep = self.rules["outbound"]["keep_refused"]
        if self.name == "far" or self.state()["state"] not in OVER:
            return None
        if self.state().get("held"):
            return "its results are held for a person"
        verdicts = self.place.noted(b"out").get("verdicts")
        if verdicts is None:
            try:
                verdicts = self.results().collect(False).verdicts
            except (Refusal, OSError):                 # nobody can say what is kept of it
                return None
        since = self.place.path(b"fetched") if self.place.has(b"fetched") else self.place.control
        refused = sum(verdicts.get(code, {}).get("count", 0) for code in ("refused", "held"))
        age = time.time() - os.path.getmtime(since)
        if not refused or age > keep:
            return None
        return "%d results are kept here for %d days (keep_refused)" % (refused, keep // 86400)

    def do_clean(self, discard=False):
        place, left = self.place, []
        if not os.path.isdir(place.control) and not os.path.lexists(place.work):
            return self.wire.say(dict(self.state(), left=left))
        place.make_directories()
        with locked(place.path(b"lock")):
            state = self.state()["state"]
            if state in UNDER_WAY:
                raise Refusal("state", "clean: not for a calculation that is " + state, state=state)
            unfetched = state in OVER and state != "fetched" and not discard
            kept = "its results were not fetched" if unfetched else self.why_kept()
            if kept:
                return self.wire.say(dict(self.state(), left=[kept]))
            place.end_lanes()
            left = remove_tree(place.work)
            if not left:
                place.forget(left)
        sweep_gone(place.base)
        self.wire.say(dict(self.state(), left=[outward(self.rules["outbound"], name) for name in left[:20]]))

    def do_list(self, after):
        rows, names = [], [name for name in run_names(self.rules["base"]) if name > after]
        for name in names[:1000]:
            place = Place(self.rules, name)
            try:
                found, since = place.state(), int(os.path.getmtime(place.control))
            except OSError as error:
                found, since = {"state": "lost", "why": "unreadable: %s" % error.strerror}, 0
            if found["state"] not in ("none", "gone"):
                why = found["why"] or found.get("where", "")
                why = "held for a person since %s" % day_and_time(found["held"]) if found.get("held") else why
                rows.append([name, found["state"], since, printable(why)[:200], found.get("code")])
        self.wire.say({"runs": rows, "more": names[999] if len(names) > 1000 else None})


class Channel:
    """The two ends of a session."""

    def __init__(self, source=0, goal=1):
        self.source = source
        self.goal = goal
        for end in (source, goal):
            widen_pipe(end, BLOCK)                     # sshd wakes for 64 KiB at a time otherwise
        self.owed = 0                                  # bytes behind the request that is served, which come
        self.parts = []                                # what is to go, and about how many bytes
        self.waiting = 0
        self.place = bytearray(BLOCK)                  # what has come; from `at` to `end` not asked for
        self.at = 0
        self.end = 0

    def fill(self):
        """More bytes from the other side, behind what has come before and is moved only if there is no room.
        EOFError."""
        self.flush()
        if self.end == BLOCK or self.at == self.end:
            rest = self.place[self.at:self.end]
            self.place[:len(rest)] = rest
            self.at, self.end = 0, len(rest)
        count = os.readv(self.source, [memoryview(self.place)[self.end:]])
        if not count:
            raise EOFError
        self.end += count

    def request_line(self):
        """The next request's line. EOFError; Refusal if it is too long."""
        while True:
            end = self.place.find(b"\n", self.at, min(self.end, self.at + REQUEST_MOST)) + 1
            if end:
                row, self.at = bytes(self.place[self.at:end]), end
                return row
            if self.end - self.at >= REQUEST_MOST:
                raise Refusal("refused", "a request that is too long")
            self.fill()

    def block(self, count):
        """The next count bytes, at most BLOCK: a view that is good until the next ones are asked for.
        EOFError."""
        while self.end - self.at < count:
            self.fill()
        view = memoryview(self.place)[self.at:self.at + count]
        self.at += count
        self.owed -= count
        return view

    def blocks(self, count):
        """The next count bytes, block by block: each up to the buffer's end, so that nothing is moved in it.
        EOFError."""
        while count:
            data = self.block(min(count, BLOCK - self.at % BLOCK))
            count -= len(data)
            yield data

    def skip_owed(self):
        """Swallows what is owed."""
        for _data in self.blocks(max(0, self.owed)):
            pass

    def say(self, told, *data):
        """One line of an answer, and bytes behind it."""
        size = sum(map(len, data))
        row = json.dumps(dict(told, size=size) if size else told).encode("ascii") + b"\n"
        self.parts += (row,) + data
        self.waiting += len(row) + size
        if self.waiting > BLOCK:
            self.flush()

    def say_bytes(self, data):
        """Bytes that belong to the last answer."""
        self.flush()
        self.write(data)

    def flush(self):
        """All of it on its way, before anything is waited for."""
        if self.parts:
            data, self.parts, self.waiting = b"".join(self.parts), [], 0
            self.write(data)

    def write(self, data):
        view = memoryview(data)
        while len(view):
            view = view[os.write(self.goal, view):]

    def wait(self, seconds, alive=-1):
        """Waits, but not longer than until `alive` (a descriptor) hangs up: True. EOFError if nobody listens
        any more."""
        self.flush()
        poller = select.poll()
        more = self.at < self.end                      # sent ahead: only the end of all is looked for
        poller.register(self.source, 0x2000 if more else select.POLLIN | 0x2000)           # POLLRDHUP
        if alive >= 0:
            poller.register(alive, select.POLLIN)
        for fd, event in poller.poll(seconds * 1000):
            if fd == alive:
                return True
            if more or event & 0x2000:
                raise EOFError
            self.fill()
        return False


# What leaves

class UnreadCollector(Collector):
    """The results where there are no rules: looked for, not read; they are read when they are sent."""

    def admit_name(self, name, real, reserved):
        """As Collector's; there are no rules about names."""
        try:
            check_name(name)
        except ValueError:
            raise Stays("name")

    def take(self, tree, name, real, info, reserved=()):
        """Takes a file. Stays, OSError."""
        self.admit_name(name, real, reserved)
        if not stat.S_ISREG(info.st_mode):
            raise Stays("special")
        if not (info.st_uid == os.geteuid() and info.st_mode & 0o400 or info.st_mode & 0o004):
            os.close(tree.open(real))
        self.found.append(Result(real, info.st_size, name, b"", bool(info.st_mode & 0o100), info.st_mtime_ns))

    def take_log(self, tree, name, real):
        """The same for the log."""
        self.take(tree, name, *tree.resolve(real))


class JudgedResults:
    """The results of a run that is over. Judged once (see Collector) and noted in the control directory:
    every session serves what was judged then, and nothing else."""
    COLLECTOR = Collector

    def __init__(self, place):
        import hashlib
        self.place = place
        self.rules = place.rules["outbound"]
        self.hold = Hold(place.control)
        copies = self.hold.decision(self.rules["hold_for"]) and self.hold.has_copies()
        self.tree = ResultTree(self.hold.folder if copies else place.work)
        self.kinds = place.let_out()
        text = json.dumps([self.rules, sorted(self.kinds), index_marks(self.rules)], sort_keys=True)
        self.stamp = hashlib.sha256(text.encode()).hexdigest()
        self.said = {}                                 # {kind of look: sum of the lines that guard.log has}
        self.notes = []                                # (name, why) of what stays; how many more there are
        self.more = 0
        self.judged = None                             # what this session itself has looked at
        self.sources = None                            # those by name

    def last_look(self):
        """The note of the last look, {} if it was by other rules."""
        found = self.place.noted(b"out")
        said = found.get("said")
        self.said = said if isinstance(said, dict) else {}
        return found if found.get("stamp") == self.stamp else {}

    def known(self):
        """{name: (mark, Result)} of the last look."""
        found = {}
        for name, real, mark, size, sum256, x, mtime, parts in self.last_look().get("files", ()):
            source = JudgedBytes(self.tree, utf8(real), size, binascii.a2b_base64(parts))
            found[name] = tuple(mark), Result(source, size, name, bytes.fromhex(sum256), x, mtime)
        return found

    def collect(self, inputs):
        """The Collector of all that may leave now. inputs: also inputs that nobody has touched."""
        with into_keeper_log(self.place.rules):
            found = self.judged_or_held(inputs)
        if len(found.found) or len(found.folders):     # else nothing leaves, or it is held
            word = self.hold.note() and self.hold.decision(0) or {"what": ""}
            audit_leaving(self.place.ident + ".1", self.place.noted(b"command").get("name", ""), found,
                          self.place.rules.setdefault("audited", {}),              # of this session
                          word["by"] if word["what"] == "released" else "")
        self.save(found, str(inputs))
        return found

    def judged_or_held(self, inputs):
        """As collect(); what needs a person's word, and has none, is only counted."""
        for _look in range(COLLECT_ROUNDS):
            note = self.hold.note()
            if note and self.hold.decision(self.rules["hold_for"]) is None:
                found = self.COLLECTOR(self.rules, self.note_refused)
                found.verdicts["held"] = {"count": note["held"], "names": []}
                return found
            found = self.as_was_said(inputs) if note else self.look(inputs)
            if found is not None and (note or not found.held):
                return found
            with contextlib.suppress(ValueError):      # it has changed since: it is looked at once more
                if found is not None:
                    self.hold.make(self.place.ident, self.place.ident + ".1",
                                   self.place.noted(b"command").get("name", ""), found)
        raise Refusal("error", "results change again and again")

    def as_was_said(self, inputs):
        """The Collector of what a person's word lets out; None if that is void."""
        found = self.hold.collector(lambda: self.look(inputs), self.rules, self.note_refused,
                                    lambda folder: self.tree)
        if found is None:
            self.hold.drop(self.place.ident)
        return found

    def look(self, inputs):
        """The Collector of all that the rules let out, or hold for a person."""
        found = self.COLLECTOR(self.rules, self.note_refused, self.known())
        found.hold_all = "hold" in self.kinds
        but = set() if inputs else self.place.untouched_inputs()
        if "logs" in self.kinds and LOG not in but:
            try:
                found.take_log(self.tree, LOG, utf8(LOG))
            except (OSError, Stays) as error:
                found.keep_here(LOG, stays_for(error), False)
        if "patterns" in self.kinds:
            found.take_matching(self.tree, EVERYTHING, but | {LOG})
        else:
            self.refuse_all(found, but | {LOG} if "logs" in self.kinds else but)
        return found.in_order()

    def refuse_all(self, found, but):
        """Nothing leaves but the log: what there is counts as refused, without a name."""
        for name, _real, info, stays in self.tree.walk():
            text = name.decode("utf-8", "backslashreplace")
            if text not in but and not text.endswith("/"):
                self.note_refused(text, "after_stop", True)
                found.verdicts.add("refused")

    def note_refused(self, name, why, _by_name):
        """What the Collector says of a result that stays."""
        if len(self.notes) < LOGGED_VERDICTS:
            self.notes.append((name, why))
        else:
            self.more += 1

    def save(self, found, kind):
        """The note of this look; into guard.log what stays, unless the last look of this kind said the same:
        by looking again and again nobody pushes older lines out of the log."""
        import hashlib
        said = hashlib.sha256(repr((self.notes, self.more)).encode("utf-8", "backslashreplace")).hexdigest()
        book = {"stamp": self.stamp, "verdicts": found.verdicts, "files": [],
                "said": dict(self.said, **{kind: said})}
        if self.place.ruled:
            book["files"] = [
                (one.name, one.source.decode("utf-8", "surrogateescape"), mark, one.size,
                 one.sum256, one.executable, one.mtime, binascii.b2a_base64(one.source.sums).decode())
                for mark, one in found.found.with_stamps()]
            for name, why in self.notes if said != self.said.get(kind) else ():
                guard_log(self.place.rules, "warn", self.place.ident, "outbound", refused=name, why=why)
            if self.more and said != self.said.get(kind):
                guard_log(self.place.rules, "warn", self.place.ident, "outbound", more=self.more)
        self.notes, self.more, self.judged, self.sources = [], 0, found.found, None
        try:
            self.place.note(b"out", book)
        except OSError as error:                       # a full disk keeps nothing from leaving it
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def judged_result(self, name):
        """The Result of that name which was judged, here or by the session that looked last. Stays if there
        is none."""
        if self.sources is None:
            known = (result for mark, result in self.known().values()) if self.judged is None else self.judged
            self.sources = {result.name: result for result in known}
        if name not in self.sources:
            raise Stays("missing")
        return self.sources[name]

    def read_small(self, name):
        """([size, mtime, x, sum], bytes) of a small result. Stays, OSError."""
        one = self.judged_result(name)
        if one.size > BUNDLED_MOST:
            raise Stays("limit")
        try:
            with one.source.open() as source:
                return [one.size, one.mtime, one.executable, one.sum256], source.read(one.size)
        except ValueError:
            raise self.changed(one)

    def read_piece(self, name, at, length, size, mtime):
        """The bytes of a piece, block by block; they are those that were told of. Stays (also behind some of
        them), OSError."""
        one = self.judged_result(name)
        if (one.size, one.mtime) != (size, mtime) or at + length > size:
            raise Stays("changing")
        try:
            with one.source.open() as source:
                source.seek(at)
                while length:
                    data = source.read(min(length, BLOCK))
                    length -= len(data)
                    yield data
        except ValueError:
            raise self.changed(one)

    def changed(self, one):
        """The Stays of a Result that is not any more what was judged. (A copy of what was held: the word
        about it is void.)"""
        if one.source.tree.path == self.hold.folder and os.path.isdir(self.hold.folder):
            with into_keeper_log(self.place.rules):
                self.hold.drop(self.place.ident)
        return Stays("changing")


class UnjudgedResults(JudgedResults):
    """The same where there are no rules: whatever the name leads to, as it is now."""
    COLLECTOR = UnreadCollector

    def known(self):
        """Nothing was read before."""
        return {}

    def open(self, name):
        """A descriptor. Stays, OSError."""
        try:
            return self.tree.open(utf8(name))          # as if there were no link in it, as mostly
        except OSError:
            return self.tree.open(self.tree.resolve(utf8(name))[0])

    def read_small(self, name):
        """As JudgedResults's."""
        import hashlib
        fd = self.open(name)
        try:
            for _look in range(READ_TRIES):
                info = os.fstat(fd)
                if info.st_size > BUNDLED_MOST:
                    raise Stays("limit")
                data = read_exactly(fd, info.st_size, 0)
                if name == LOG or mark_of(os.fstat(fd)) == mark_of(info) and len(data) == info.st_size:
                    digest, x = hashlib.sha256(data).hexdigest(), bool(info.st_mode & 0o100)
                    return [len(data), info.st_mtime_ns, x, digest], data
            raise Stays("changing")
        finally:
            os.close(fd)

    def read_piece(self, name, at, length, size, mtime):
        """As JudgedResults's; each block lies where the one before lay."""
        place = memoryview(bytearray(min(length, BLOCK)))
        with open(self.open(name), "rb", 0) as source:
            source.seek(at)
            while True:
                info = os.fstat(source.fileno())
                same = (info.st_size, info.st_mtime_ns) == (size, mtime)
                if not same and (name != LOG or info.st_size < at + length):
                    raise Stays("changing")
                if not length:
                    return
                data = place[:source.readinto(place[:length])]
                if not data:
                    raise Stays("changing")
                at, length = at + len(data), length - len(data)
                yield data


@functools.lru_cache(maxsize=1)
def libzstd():
    """The system's libzstd, which makes two thirds of what zlib makes of text, in a third of the time; None
    where it is not."""
    try:
        from ctypes import CDLL, c_int, c_size_t, c_void_p
        found = CDLL("libzstd.so.1")
        data = [c_void_p, c_size_t]
        for name, answer, asked in (
                ("createCCtx", c_void_p, []), ("freeCCtx", c_size_t, [c_void_p]),
                ("createDCtx", c_void_p, []), ("freeDCtx", c_size_t, [c_void_p]),
                ("compressCCtx", c_size_t, [c_void_p] + data + data + [c_int]),
                ("decompressDCtx", c_size_t, [c_void_p] + data + data)):
            call = getattr(found, "ZSTD_" + name)
            call.restype, call.argtypes = answer, asked
        return found
    except (ImportError, OSError, AttributeError):
        return None


class Packer:
    """Packs and unpacks the pieces of one session, always in the same memory: new pages cost more than what
    is done in them. native: with libzstd, where it is (not in a guard: who has a key does not reach into
    memory that lies beside what is secret)."""

    def __init__(self, native=True):
        self.native = native
        self.place = bytearray()                       # what was unpacked last
        self.room = bytearray()                        # where a block is packed
        self.writer = self.reader = None               # of libzstd

    def __del__(self):
        if self.writer:
            libzstd().ZSTD_freeCCtx(self.writer)
        if self.reader:
            libzstd().ZSTD_freeDCtx(self.reader)

    def zstd(self):
        """The library, None where it is not, or not to be used."""
        return libzstd() if self.native else None

    def pack(self, blocks, zstd):
        """([bytes], digest of what they make unpacked) of blocks of at most BLOCK bytes: one stream of
        zlib's, or with libzstd, where it is, a frame for each block."""
        import hashlib
        digest = hashlib.sha256()
        if zstd and self.zstd() is not None:
            return [self.frame(block) for block in summed(blocks, digest)], digest
        import zlib
        stream = zlib.compressobj(1)
        return [stream.compress(block) for block in summed(blocks, digest)] + [stream.flush()], digest

    def frame(self, block):
        """A block as a frame of zstd's."""
        from ctypes import c_char
        if not self.writer:
            self.writer, self.room = libzstd().ZSTD_createCCtx(), bytearray(BLOCK + BLOCK // 128)
        room = (c_char * len(self.room)).from_buffer(self.room)
        block = block if isinstance(block, bytes) else (c_char * len(block)).from_buffer(block)
        count = self.writer and libzstd().ZSTD_compressCCtx(
            self.writer, room, len(room), block, len(block), 1)
        if not count or count > len(room):             # an error is a very large number
            raise MemoryError
        return bytes(memoryview(self.room)[:count])

    def unpack(self, data, length):
        """The bytes that were packed: a view that is good until the next ones are asked for; None if they
        are not so many."""
        if data[:4] == ZSTD_MAGIC and self.zstd() is not None:
            return self.unframed(data, length)
        import zlib
        try:
            found = zlib.decompressobj().decompress(data, length + 1)
        except zlib.error:
            return None
        return memoryview(found) if len(found) == length else None

    def unframed(self, data, length):
        """The same of zstd's frames."""
        from ctypes import c_char
        if not self.reader:
            self.reader = libzstd().ZSTD_createDCtx()
        if len(self.place) < length:
            self.place = bytearray(length)
        place = (c_char * length).from_buffer(self.place)
        count = self.reader and libzstd().ZSTD_decompressDCtx(self.reader, place, length, data, len(data))
        return memoryview(self.place)[:length] if count == length else None


def summed(blocks, digest):
    """The same blocks of bytes, each also put into the digest."""
    for block in blocks:
        digest.update(block)
        yield block


# All runs below a base

def existing(path):
    """The directory (bytes, absolute), or the one above that is there."""
    return path if os.path.isdir(path) else existing(os.path.dirname(path))


def run_names(base):
    """The names of the runs below base (bytes), in order."""
    folder = os.path.join(base, b".mi")
    names = [os.fsdecode(name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    return sorted(name for name in names if re.match(IDENT + r"\Z", name))


def sweep_gone(base):
    """Removes what is known of runs that were cleaned away more than a day ago."""
    for name in run_names(base):
        path = os.path.join(base, b".mi", utf8(name))
        try:
            old = time.time() - os.path.getmtime(path) > 86400
            if old and os.path.isdir(path) and not set(os.listdir(path)) - {b"gone"}:
                remove_tree(path)
        except OSError:
            pass                                       # another session was quicker


def kills_at_log_out():
    """Does systemd here end everything of a user that logs out?"""
    import glob
    rows = ""
    for path in ["/etc/systemd/logind.conf"] + sorted(glob.glob("/etc/systemd/logind.conf.d/*")):
        try:
            with open(path, errors="replace") as text:
                rows += text.read() + "\n"
        except OSError:
            pass
    lingers = os.path.exists("/var/lib/systemd/linger/%s" % user_name())
    return re.search(r"^KillUserProcesses=(yes|true|1|on)\s*$", rows, re.M) is not None and not lingers


def take_session(rules):
    """A descriptor that holds one of the key's max_sessions as long as this process lives; None if there is
    none left. (Where there are no locks: a hope.)"""
    import fcntl
    most = rules["ssh guard"]["max_sessions"]
    fd = os.open(os.path.join(rules["base"], b".mi", b"sessions"),
                 os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    for place in range(most):
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, (os.getpid() + place) % most)
            return fd
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return fd
    os.close(fd)
    return None


# ==== the keeper ====
# What must go on while nobody is connected: waiting for a licence (`jobs`), `pre`, the watch over a command,
# timeout and cancel, left-overs, `post`, expiry. A door notes what it is asked for (files of the control
# directory) and reads what became of it (the journal: only what it calls ended has ended). What lies between
# is the keeper's: one process per base and host, under a lock, that a door forks where it misses one; it ends
# when nothing is left to do. base/.mi/open/ names the runs that have not ended. Killed at any moment, by
# anybody: the next door forks another keeper, and journal and wrapper tell that one what was done. Nothing is
# done twice: each thing that is done once has a file that only one process can rename (see run).
KEEPER_KEYS = NOTED_KEYS + (
    "name", "env", "batch", "options", "batch_poll", "batch_grace", "jobs", "pre", "post")
KEEPER_LOOKS = 60              # seconds until a keeper looks again without being told; 1 without FIFOs
KEEPER_AGAIN = 30              # seconds until what failed (a full disk, a broken ini) is tried again
HANDS = 32                     # threads of one key that start, end or ask for runs at the same time
HEARD = 400                    # runs whose end a FIFO tells at once; of more it is seen a little later


class Later(Exception):
    """Nothing is to be done for a run for so many seconds."""


class KeeperRun(GateRun):
    """A run as its door has noted it (see begin_run). gate: its Gate; key: whose it is, bytes. OSError,
    ValueError, KeyError, TypeError if that cannot be read."""

    def __init__(self, gate, base, ident, key=b""):
        work = os.path.join(base, utf8(ident))
        control = os.path.join(base, b".mi", utf8(ident))
        with open(os.path.join(control, b"command"), "rb") as text:
            self.note = dict({"hold": True}, **json.loads(text.read().decode()))
        order = {"command": self.note["name"], "parameters": "", "result_files": {},
                 "result_patterns": list(EVERYTHING)}
        logs = [(LOG, work, utf8(LOG))]
        GateRun.__init__(self, gate, ident + ".1", ident, work, control, order, logs, {})
        self.command = {key: self.note[key] for key in KEEPER_KEYS}
        self.argv = self.note["argv"]
        self.mark = utf8(self.note["mark"])
        self.key = key
        self.next = 0.0                                # when it is looked at again, monotonic
        self.alive = None                              # its wrapper's FIFO; -1: none
        self.free = False                              # its door is through with it, or gone
        self.over = False                              # nothing is left to do for it
        self.again = None                              # but for that, when it is tried again, monotonic
        self.waits = False                             # for a licence

    def env(self):
        """What the command sees, as its door has put it together."""
        return self.note["sees"]

    def needs_keeper(self):
        """Must something be waited for, or done, before the command starts?"""
        return bool(self.command["jobs"] or self.command["pre"])

    def ended_by_restart(self):
        """As GateRun's; also what only waited for its start does not start in another boot: its inputs may
        not be on disk."""
        if not self.last("starting") and self.note["boot"] != boot_id():
            why = "the host was restarted before the command was started"
            self.end_early(why, why, "lost")
            return True
        return GateRun.ended_by_restart(self)

    def allowed(self):
        """Do the owner's rules, as they are now, let it start, and whoever has signed it? Where not, it has
        ended. Stop if they cannot be read."""
        ini = self.note["ini"]
        if not ini:
            return True
        try:
            words, settings = shell_words(self.note["text"]), read_ini(ini, INI_KEYS)
            command, _argv = permit_command(commands_of(ini, settings), words[0], words[1:])
            orders = order_rules(ini, settings, "ssh guard", self.gate.folder, settings["ssh guard"]["site"])
            orders.permit(small_text(self.path(b"signed")), {}, command, None)
            return True
        except Forbidden as error:
            self.end_early("refused", error)
            return False

    def told_to_end(self):
        """Was it cancelled? From then on with the grace that was said then, at most its owner's."""
        try:
            with open(self.path(b"cancelled"), "rb") as text:
                said = float(text.read(10) or self.command["grace"])
            self.command["grace"] = min(said, self.command["grace"]) if self.note["ini"] else said
        except FileNotFoundError:
            return False
        except ValueError:                             # an older version's has other words
            pass
        return True

    def wait_on_this_host(self):
        """As GateRun's; Later while nothing is to be done."""
        if self.goes_on():
            raise Later(0.0)
        return GateRun.wait_on_this_host(self)

    def goes_on(self):
        """Does it run on this host, and need not end? (Its wrapper, or just now its door's, may be about to
        begin.)"""
        state, starting = wait_end(self.control, lambda: True)[0], self.last("starting") or {"t": 0}
        begun = self.wrapper is not None or abs(time.time() - starting["t"]) < 1
        under_way = begun if state == "ready" else state in ("starting", "running", "elsewhere")
        return under_way and not self.last("stopping") and not self.due_to_end()

    def rest(self, seconds):
        """The keeper's threads wait for nothing."""
        raise Later(seconds)


# For the doors

def begin_run(place, command, argv, env, text):
    """The run of a Place that is `taken` gets its order, and starts at once unless something must be done
    before. The place's lock is held. command: its section; env: what it sees; text: as it was asked for."""
    note_order(place, dict({name: command[name] for name in KEEPER_KEYS}, text=text, argv=argv, sees=env))
    fault("order noted")
    write_synced(place.path(b"journal"), b"")
    prepare_control(place.control)
    fault("run prepared")
    run = KeeperRun(Gate(os.path.dirname(place.control), {}), place.base, place.ident)
    SAY["log"] = keeper_log(place.rules)               # not to the other side
    try:
        if not run.needs_keeper() and run.note_starting():
            run.start()
    finally:
        SAY["log"] = None


def entry_path(place):
    """Where it is noted that a keeper is needed for a run: open/UUID, or open/UUID@KEY."""
    top = keeper_base(place.rules)
    key = b"" if place.base == top else b"@" + os.path.basename(place.base)
    return os.path.join(top, b".mi", b"open", utf8(place.ident) + key)


def note_order(place, order):
    """The order of a run, for whichever keeper: its entry in open/, and its note `command`."""
    entry = entry_path(place)
    os.makedirs(os.path.dirname(entry), 0o700, exist_ok=True)
    write_synced(entry, b"")
    fault("run opened")
    place.note(b"command", dict(order, ini=place.rules.get("ini", ""), mark=os.fsdecode(place.mark),
                                host=host_id(), node=os.uname().nodename, boot=boot_id()))


def adopt_old_run(place):
    """A run that an older version has started, and that has no journal: from now on a keeper watches it, with
    no more than that version did."""
    if place.has(b"journal") or not any(map(place.has, (b"ready", b"start", b"end", b"lost"))):
        return
    with locked(place.path(b"lock")):
        if place.has(b"journal") or command_state(place.control, time.time())[0] == "elsewhere":
            return
        keys = dict(default_keys(), name="", env={}, options=[], leftovers="leave")
        order = dict({name: keys[name] for name in KEEPER_KEYS}, text="", argv=[], sees={})
        note_order(place, dict(order, **place.noted(b"command")))
        state = place.state_without_journal(os.listdir(place.control))
        write_synced(place.path(b"journal"), b"")
        if state[0] == "lost":
            journal = Journal(place.path(b"journal"))
            journal.note(6, "ended", state="lost", exit_code=None, reason=state[2])


def end_in_journal(place):
    """The journal's "ended" of a run that has; None if it has not, or was started by an older version."""
    return Journal(place.path(b"journal"), needed=False).last("ended")


def keeper_base(rules):
    """The base that has the keeper: of a key with a name, the one that its own stands in."""
    return rules.get("top") or rules["base"]


def ensure_keeper(rules):
    """Sees that a keeper does what is to be done: it is woken, or forked where a run is open and there is
    none."""
    folder = os.path.join(keeper_base(rules), b".mi")
    if not wake_keeper(keeper_fifo(folder)) and open_runs(folder):
        fork_keeper(rules)


def keeper_log(rules):
    """Where log lines of runs go: the guard's log, or keeper.log."""
    ruled = "commands" in rules
    return KeeperLog(os.path.join(keeper_base(rules), b".mi", b"guard.log" if ruled else b"keeper.log"))


def open_runs(folder):
    """The entries of open/: UUID, or UUID@KEY."""
    try:
        return os.listdir(os.path.join(folder, b"open"))
    except FileNotFoundError:
        return []


def keeper_fifo(folder):
    """Where a keeper on this host listens."""
    return os.path.join(folder, b"keeper." + utf8(os.uname().nodename))


def wake_keeper(fifo):
    """Tells the keeper to look. False if nobody listens."""
    try:
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, b"\n")
    except BlockingIOError:
        pass                                           # it is told often enough
    except BrokenPipeError:
        return False
    finally:
        os.close(fd)
    return True


def fork_keeper(rules):
    """A keeper, detached from this session: no descriptor, terminal or parent of it is left. (A fork, no new
    program: it is there in two milliseconds.)"""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        nothing = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(nothing, fd)
        os.closerange(3, 1 + max(map(int, os.listdir("/proc/self/fd"))))
        os.chdir("/")
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        fault("keeper forked")
        Keeper(rules).serve()
    finally:
        os._exit(0)


# The keeper itself

class KeeperLog:
    """A log file that is opened anew for each line: others write to it, and rename it."""

    def __init__(self, path):
        self.path = path

    def write(self, text):
        fd = open_log(self.path)
        try:
            os.write(fd, text.encode("utf-8", "backslashreplace"))
        finally:
            os.close(fd)

    def flush(self):
        """Nothing is held back."""


class Keeper:
    """rules: those of the door that forked it; of them count only where its log is, and keep_refused. One
    thread looks at all runs; what takes time (a start, an end, `pre`, `post`, a batch system's answer) is
    done by a thread of its own, of which each key has at most HANDS at a time, so that no key's runs wait for
    another's."""

    def __init__(self, rules):
        self.rules = rules
        self.folder = os.path.join(keeper_base(rules), b".mi")
        self.gate = Gate(self.folder, {})
        self.swept = 0.0
        self.sweeping = False
        self.runs = {}                                 # {entry of open/: its KeeperRun}
        self.busy = set()                              # those with a thread
        self.again = {}                                # {entry: when it is read once more}
        self.foreign = set()
        self.said = {}
        self.admitted = {}                             # {(command, key): when it had a licence last}
        self.heard = None
        self.ears = select.poll()
        self.spent = 0.0
        self.looked = 0.0
        SAY["log"] = keeper_log(rules)
        AUDIT.update(rules="", to="")                  # what holds now, the doors say

    def serve(self):
        """Does what is to be done until nothing is; at once if another keeper does."""
        fifo = keeper_fifo(self.folder)
        lock = self.take_lock(fifo)
        if lock is None:
            return
        fault("keeper locked")
        self.listen(fifo)
        while self.holds(lock, fifo):
            self.turn()
            self.begin_sweep()
            if not self.at_work():
                if self.heard is not None:             # whoever comes from here on waits for our lock; who
                    self.ears.unregister(self.heard)   # came before has noted its order before it woke us
                    os.close(self.heard)
                fault("keeper about to end")
                self.turn()
                if not self.at_work():
                    return
                self.listen(fifo)
            self.wait()

    def holds(self, lock, fifo):
        """Is it this base's lock? Who removed the base, and made it anew, has another keeper there."""
        try:
            return os.path.samestat(os.fstat(lock), os.stat(fifo + b".lock"))
        except OSError:
            return False

    def at_work(self):
        """Is anything left to do?"""
        return bool(self.runs or self.again or self.sweeping)

    def take_lock(self, fifo):
        """The descriptor of the keeper's lock, held; None if another keeper works."""
        fd = os.open(fifo + b".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + 10
        while True:
            if try_lock(fd) != LOCK_HELD:              # no locks here: what is done once is safe all the same
                return fd
            if wake_keeper(fifo) or time.monotonic() > until:
                return None
            time.sleep(0.005)                          # it is about to end

    def listen(self, fifo):
        """Opens the FIFO; None where there can be none."""
        try:
            if not os.path.exists(fifo):
                os.mkfifo(fifo, 0o600)
            self.heard = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            self.ears.register(self.heard, select.POLLIN)
        except OSError:
            self.heard = None

    def wait(self):
        """Until somebody wakes us, a command ends, or it is time to look by ourselves; at most a tenth of the
        time is spent with looking."""
        due = [run.next for name, run in self.runs.items() if name not in self.busy]
        due += self.again.values()
        most = KEEPER_LOOKS if self.heard is not None else 1
        pause = max(0.0, min(due + [self.looked + most]) - time.monotonic())
        for fd, _event in self.ears.poll(pause * 1000):
            if fd == self.heard:
                os.read(fd, 4096)
            else:
                self.deafen(next(run for run in self.runs.values() if run.alive == fd))
        time.sleep(max(0.0, self.looked + min(0.2, 10 * self.spent) - time.monotonic()))

    def deafen(self, run):
        """Closes a run's FIFO, which tells nothing more; it is looked at now."""
        if run.alive is not None and run.alive >= 0:
            self.ears.unregister(run.alive)
            os.close(run.alive)
        run.alive, run.next = -1, 0.0

    def turn(self):
        """Looks at what there is, and hands on what is to be done."""
        began = time.monotonic()
        for name, run in list(self.runs.items()):
            if run.over and name not in self.busy:
                self.deafen(self.runs.pop(name))
                self.again.update({name: run.again} if run.again else {})
        self.read_new(began)
        waiting = [name for name in self.runs if name not in self.busy and self.look_at(name, began)]
        self.admit(waiting)
        self.looked = time.monotonic()
        self.spent = self.looked - began

    def read_new(self, now):
        """Reads the entries that are not known yet, the oldest first."""
        names = open_runs(self.folder)
        self.again = {name: self.again[name] for name in names if name in self.again}
        fresh = [name for name in names if name not in self.runs and name not in self.foreign
                 and self.again.get(name, 0.0) <= now]
        for name in sorted(fresh, key=self.age) if fresh else ():
            self.again.pop(name, None)
            run = self.read_run(name)
            if run is not None:
                self.runs[name] = run
                if run.last("starting") and not run.last("ended"):
                    self.gate.begin_running(run)  # it has its licence, before others ask for theirs

    def age(self, name):
        """When an entry of open/ was made; what is gone is young."""
        try:
            return os.stat(os.path.join(self.folder, b"open", name)).st_mtime
        except OSError:
            return float("inf")

    def read_run(self, name):
        """The KeeperRun of an entry of open/. None if it is another host's, or not to be read (yet)."""
        ident, _at, key = os.fsdecode(name).partition("@")
        top = os.path.dirname(self.folder)
        base = os.path.join(top, utf8(key)) if key else top
        try:
            run = KeeperRun(self.gate, base, ident, utf8(key))
            here = run.note["host"], run.note["node"]
            if run.note["boot"] == boot_id() or here == (host_id(), os.uname().nodename):
                return run
            self.foreign.add(name)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.not_begun(name, base, ident, error)
        return None

    def not_begun(self, name, base, ident, error):
        """An entry whose run cannot be read: its door was killed before the order, or is at it. It goes after
        a while."""
        path = os.path.join(self.folder, b"open", name)
        try:
            begun = os.path.exists(os.path.join(base, b".mi", utf8(ident), b"ready"))
            if not begun and time.time() - os.path.getmtime(path) > KEEPER_AGAIN:
                os.unlink(path)
            elif begun:
                self.complain(ident, "its order cannot be read", error)
        except OSError:
            pass

    def complain(self, ident, what, error):
        """Into the log, once as long as it is the same: what fails again and again pushes no older lines out
        of it."""
        text = "%s: %s" % (type(error).__name__, error)
        if self.said.get(ident) != text:
            self.said[ident] = text
            log("error", ident, what, why=text, again_in=KEEPER_AGAIN)

    def look_at(self, name, now):
        """Starts a thread for a run if something is to be done for it. True if it waits for a licence."""
        try:
            return self.what_is_due(name, now)
        except Exception as error:                     # whatever it is, the others go on
            self.failed(self.runs[name], error)
            return False

    def failed(self, run, error):
        """It is read anew, and tried once more, after a while."""
        self.complain(run.ident, "it is tried again", error)
        run.again, run.over = time.monotonic() + KEEPER_AGAIN, True
        self.gate.end_running(run)

    def what_is_due(self, name, now):
        """As look_at(), which catches what is raised here."""
        run = self.runs[name]
        cancelled = run.free and not run.last("stopping") and run.told_to_end()
        if run.next > now and not run.waits and not cancelled:
            return False
        if not run.free:
            run = self.runs[name] = self.freed(name, run)
        if not run.free or run.last("ended"):
            return run.free and self.start_hand(name)
        if not run.last("starting"):
            run.waits = bool(run.command["jobs"] and run.note["boot"] == boot_id() and not run.told_to_end())
            return run.waits or self.start_hand(name)
        return not self.still_running_in_time(run, now) and self.start_hand(name)

    def still_running_in_time(self, run, now):
        """Is its command at work, so that it is looked at again later? (A batch system is asked.)"""
        if read_batch(run.control):
            return False
        self.watch_fifo(run)
        if not run.goes_on():
            return False
        pause = max(0.25, 0.002 * len(self.runs))
        run.next = now + (max(1.0, pause) if run.alive >= 0 else pause)
        return True

    def freed(self, name, run):
        """The run, read anew if no door has it in its hands (any more); else it is looked at soon."""
        fresh = None
        with contextlib.suppress(FileNotFoundError), open(run.path(b"lock"), "r+b") as lock:
            if try_lock(lock) == LOCK_HELD:
                run.next = time.monotonic() + 0.05
                return run
            fresh = self.read_run(name)
        self.gate.end_running(run)
        if fresh is None:                              # it was cleaned away just now
            run.over = True
            return run
        fresh.free = True
        if fresh.last("starting") and not fresh.last("ended"):
            self.gate.begin_running(fresh)
        return fresh

    def watch_fifo(self, run):
        """Opens the FIFO of its wrapper, once; not of very many: they are looked at now and then."""
        if run.alive is None:
            run.alive = -1
            if sum(one.alive is not None and one.alive >= 0 for one in self.runs.values()) < HEARD:
                try:
                    run.alive = os.open(run.path(b"alive"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    self.ears.register(run.alive, select.POLLIN)
                except OSError:
                    pass

    def hands(self, key):
        """How many threads are at work for a key."""
        return sum(name in self.busy and run.key == key for name, run in self.runs.items())

    def start_hand(self, name):
        """Gives a run to a thread, unless its key has enough of them: then at the next turn. False."""
        import threading
        run = self.runs[name]
        if self.hands(run.key) < HANDS:
            self.busy.add(name)
            try:
                threading.Thread(target=self.attend, args=(name, run), daemon=True).start()
            except RuntimeError:                       # no more threads on this host, now
                self.busy.discard(name)
                raise
        else:
            run.next = time.monotonic() + 0.05
        return False

    def admit(self, waiting):
        """Starts those that wait for a licence and can have one; of two keys that one's which holds fewer of
        the command, or has had one longer ago."""
        held = collections.Counter()
        for run in list(self.gate.running) if waiting else ():
            held.update([run.order["command"], (run.order["command"], run.key)])
        while waiting:
            which = {name: (self.runs[name].order["command"], self.runs[name].key) for name in waiting}
            name = min(waiting, key=lambda one: (held[which[one]], self.admitted.get(which[one], 0)))
            waiting.remove(name)
            run = self.runs[name]
            if held[which[name][0]] < run.command["jobs"] and self.hands(run.key) < HANDS:
                held.update([which[name][0], which[name]])
                self.admitted[which[name]] = time.monotonic()
                self.gate.begin_running(run)
                run.waits = False
                self.start_hand(name)
            else:
                run.next = time.monotonic() + 1

    def attend(self, name, run):
        """A thread: what is to be done for a run now."""
        try:
            self.carry_out(run)
            run.over = True
            self.gate.end_running(run)
            unlink_if_there(os.path.join(self.folder, b"open", name))
        except Later as later:
            run.next = time.monotonic() + max(later.args[0], 0.002 * len(self.runs))
        except Exception as error:                     # a full disk, an ini that cannot be read, a bug
            self.failed(run, error)
        self.busy.discard(name)
        wake_keeper(keeper_fifo(self.folder))          # nothing may be left to do, or a licence is free

    def carry_out(self, run):
        """What is left to do of a run; Later if that is nothing for now."""
        if not run.last("ended") and run.never_started() and not run.ended_by_restart():
            if not run.argv:                           # its older version was killed before it started it
                run.end_early("it was not started", "it was not started", "lost")
            elif not run.told_to_end() if run.last("starting") else run.allowed() and run.note_starting():
                run.start()
        if not run.last("ended"):
            run.follow_to_end()

    def begin_sweep(self):
        """Once an hour a thread of its own removes what was kept long enough."""
        import threading
        if "commands" in self.rules and time.monotonic() >= self.swept:
            self.swept = time.monotonic() + 3600
            self.sweeping = True
            threading.Thread(target=self.sweep_kept, daemon=True).start()

    def sweep_kept(self):
        """Removes what the owner's rules have kept from leaving, keep_refused after all else of it has
        arrived."""
        try:
            top = os.path.dirname(self.folder)
            keys = [name for name in os.listdir(top) if os.path.isdir(os.path.join(top, name, b".mi"))]
            for key in [b""] + keys:
                rules = dict(self.rules, base=os.path.join(top, key) if key else top, key=os.fsdecode(key))
                for ident in run_names(rules["base"]):
                    self.forget_kept(Place(rules, ident))
        except OSError as error:
            self.complain("-", "nothing more is swept", error)
        self.sweeping = False
        wake_keeper(keeper_fifo(self.folder))

    def forget_kept(self, place):
        """Removes what is left of a run whose time is over."""
        if not place.noted(b"fetched").get("refused"):
            return
        if time.time() - os.path.getmtime(place.path(b"fetched")) > self.rules["outbound"]["keep_refused"]:
            with locked(place.path(b"lock")):
                left = remove_tree(place.work)
                place.forget(left)
            log("warn" if left else "info", place.ident, "swept", left=" ".join(left[:5]) or "nothing")


# ==== how the door far comes there ====
# How the door `far` comes there. What this text takes for granted:
#  1. The log-in shell passes single-quoted words of plain ASCII on unchanged (sh, bash, dash, zsh, ksh,
#     csh, tcsh and fish do).
#  2. There is a POSIX sh in its PATH, with printf %b.
#  3. What the log-in shell prints before our first line ("mi_distcomp ...") is noise and skipped; after it,
#     it prints nothing.
#  4. A process started in a session of its own outlives the log-in. (systemd's KillUserProcesses=yes breaks
#     this: loginctl enable-linger USER; `check HOST` looks.)
#  5. Moving a directory to a name that is free is atomic, and a file's rename is: the base directory is on
#     a local disk or NFS.
#  6. Its clock need not be right: times of there are compared with times of there only. Its words: 2 door
#     BASE SUM, and one more for a mere look: then nothing is kept there. Else the program comes once and
#     lies as BASE/.mi/gate.SUM; beside it its bytecode, one for each Python.
DECODE_WORDS = r"""
PATH=$PATH:/usr/bin:/bin
shift; n=$#
while [ "$n" -gt 0 ]; do
    a=$1; shift; n=$((n - 1))
    case $a in *\\*) a=$(printf '%b.' "$a"); a=${a%.};; esac
    set -- "$@" "$a"
done
"""                            # the words of a request, as they were before quoted_word()


LOADER = DECODE_WORDS + r"""load='
import sys
try:
    if sys.version_info < (3, 6): raise ImportError
    import errno, gc, json, marshal, os, select
except ImportError:
    sys.exit(97)
gc.disable()                                           # until run_as_program()
base, told, looks, ctype = [os.fsencode(word) for word in sys.argv[1:5]]         # looks: keeps nothing
os.environ.pop("LC_CTYPE", 0)                          # Python may have set it
if ctype[:1] == b"=": os.environb[b"LC_CTYPE"] = ctype[1:]
def no(code, why):
    os.write(1, b"\nmi_distcomp 2 no %d %s\n" % (code, os.fsencode(why)))
    sys.exit(code)
def more(count):
    data = os.read(0, min(count, 1 << 20))
    return data or sys.exit(0)
def safe(info):
    return info.st_uid == os.geteuid() and not info.st_mode & 0o022
def keep(path, data):
    if looks: return
    new = b"%s.%d" % (path, os.getpid())
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as out:
            out.write(data)
        os.rename(new, path)
        for name in os.listdir(os.path.dirname(path)):                   # of versions of before
            old = os.path.join(os.path.dirname(path), name)
            if name[:5] == b"gate." and os.stat(old).st_mtime < os.stat(path).st_mtime - 30 * 86400:
                os.unlink(old)
    except OSError:                                    # a full disk, perhaps: it goes on from memory
        if os.path.lexists(new): os.unlink(new)
def read(path):
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as text:
            return text.read() if safe(os.fstat(text.fileno())) else b""
    except OSError:
        return b""
def is_it(data):
    import hashlib
    return hashlib.sha256(data).hexdigest()[:16].encode() == told
def bring(path):
    try:
        import zlib
        os.write(1, b"\nmi_distcomp 2 bring z\n")
    except ImportError:
        zlib = None
        os.write(1, b"\nmi_distcomp 2 bring -\n")
    row = b""
    while row[-1:] != b"\n": row += more(1)
    left, data = int(row), []
    while left:
        data.append(more(left))
        left -= len(data[-1])
    data = b"".join(data)
    data = zlib.decompress(data) if zlib else data
    if not is_it(data): no(76, "another program came than was told")
    keep(path, data)
    return data
def load():
    folder = os.path.join(base, b".mi")
    mask = os.umask(0o077)
    if not looks: os.makedirs(folder, 0o700, exist_ok=True)
    for path, mine in (base, False), (folder, True):
        info = os.path.isdir(path) and os.stat(path)
        if info and (not safe(info) if mine else info.st_mode & 0o1002 == 2):
            no(77, "%s there belongs to somebody else, or others may write to it" % os.fsdecode(path))
    path = os.path.join(folder, b"gate." + told)
    magic = sys.modules["_frozen_importlib_external"].MAGIC_NUMBER
    cached = b"%s.%s.%d" % (path, sys.implementation.cache_tag.encode(), magic[0] + 256 * magic[1])
    try:
        code = marshal.loads(read(cached))
    except (EOFError, ValueError, TypeError):
        data = read(path)
        code = compile(data if is_it(data) else bring(path), path, "exec")
        keep(cached, marshal.dumps(code))
    os.umask(mask)
    names = {"__name__": "far", "__file__": os.fsdecode(path)}
    exec(code, names)
    return names["far"]
base = os.path.expanduser(base if base[:1] in (b"/", b"~") else b"~/" + base)
if base[:1] != b"/": no(78, "no home directory is known there: give an absolute path as base")
try:
    far = load()
except OSError as error:
    no(74, "%s: %s" % (os.fsdecode(error.filename or b"?"), error.strerror))
far(base, told.decode())
'
for p in python3 /usr/bin/python3 /usr/libexec/platform-python; do
    command -v "$p" >/dev/null 2>&1 || continue
    "$p" -I -S -c "$load" "$3" "$4" "$5" "${LC_CTYPE+=$LC_CTYPE}"
    case $? in 1|97|126|127) ;; *) exit;; esac
done
printf '\nmi_distcomp 2 plain there is no python3 of 3.6 or newer\n'
exec cat >/dev/null
"""


# ==== connections ====
# A line is one control connection to a host, whose first session serves the whole calculation; lanes for
# large things are further sessions, over it or over connections of their own. Nothing of what comes is
# believed before it was looked at (ANSWER_FIELDS).
GREETING = b"mi_distcomp 2 "    # our first line there begins so, wherever in a line of the log-in's it stands
SSH_FAILED = 254  # ssh's exit codes from here on: the host is closed (/etc/nologin), the line broke
ANSWER_LINE = (1 << 20) + 2    # bytes of a line of an answer


class LineLost(Exception):
    """The connection is gone or never came; it may come back."""
    code = 69

    def stop(self):
        """The Stop for it, where nobody waits for it."""
        return Stop(self.code, str(self))


class LineHopeless(LineLost):
    """A connection that will not come by trying again. code: for the exit."""

    def __init__(self, code, text):
        LineLost.__init__(self, text)
        self.code = code


class Declined(Exception):
    """The door there says no to one request. code: refused, state, gone, host, disk, error."""

    def __init__(self, host, told):
        Exception.__init__(self, "%s: %s" % (host, printable(told.get("why", ""))))
        self.code = told["no"]
        self.state = told.get("state", "none")

    def stop(self):
        """The Stop for it."""
        if self.code == "disk":
            return Stop(EX_IOERR, _("%s (is the disk full there?)") % self)
        codes = {"refused": EX_REFUSED, "error": EX_IOERR, "gone": EX_DATA, "host": EX_UNAVAILABLE,
                 "config": EX_CONFIG}
        return Stop(codes.get(self.code, EX_PROTOCOL), str(self))


def quoted_word(text):
    """text (str or bytes) as one single-quoted word that any log-in shell passes on; LOADER and PLAIN turn
    its \\0ooo back."""
    data = text if isinstance(text, bytes) else utf8(text)
    return "'" + re.sub(rb"[^ -~]|['\\!]", lambda m: b"\\0%03o" % ord(m.group()), data).decode("ascii") + "'"


def host_command(text, *words):
    """The one form of everything that is asked of a host: a text for sh, and words. A guard drops the
    text."""
    return "exec sh -c 'eval \"$(printf %b \"$1\")\"' mi_distcomp " + " ".join(
        quoted_word(word) for word in (text,) + words)


@functools.lru_cache(maxsize=1)
def own_file():
    """(this file's bytes, the first 16 digits of their sum)"""
    import hashlib
    with open(__file__, "rb") as text:
        data = text.read()
    return data, hashlib.sha256(data).hexdigest()[:16]


def end_login(process):
    """Ends a log-in that does not come to what was asked for: a shell that took its place ends with its
    input, by itself; anything else is killed."""
    try:
        process.stdin.close()
        process.wait(1)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()


def limit_stderr(pid):
    """What the far side writes on stderr does not fill the disk: no file that this process writes grows
    beyond STDERR_MOST."""
    try:
        import resource
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (STDERR_MOST, STDERR_MOST))
    except (ImportError, AttributeError, OSError, ValueError):
        pass                                           # not on every system


def close_pipes(process):
    """Closes the pipes of a session."""
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except OSError:
            pass


def has_aes():
    """Has this processor AES instructions?"""
    try:
        with open("/proc/cpuinfo") as text:
            return " aes" in text.read(8192)
    except OSError:
        return False


def widen_pipe(pipe, size=1 << 20):
    """A larger buffer (bytes) of a pipe (a descriptor, or a file): F_SETPIPE_SZ, where it is a pipe and the
    system allows it."""
    import fcntl
    try:
        fcntl.fcntl(pipe, 1031, size)
    except OSError:
        pass


class Session:
    """One session of the door there: requests and their answers, in the same order; each a line of JSON, with
    bytes behind it where it says so."""

    def __init__(self, line, process):
        self.line = line
        self.process = process
        self.buffer = memoryview(bytearray(BLOCK))     # through which large things pass
        self.packer = Packer()

    def reach_door(self):
        """Skips what the log-in prints, brings this program where it is not there yet: '' at the door, else
        why there is only the plain way."""
        noise, brought = 0, False
        for row in iter(lambda: self.process.stdout.readline(LOGIN_LINE), b""):
            noise += len(row)
            if noise > LOGIN_NOISE or brought and GREETING + b"bring" in row:
                break
            kind, _blank, rest = row.partition(GREETING)[2].decode("utf-8", "replace").strip().partition(" ")
            if kind == "door":
                return ""
            if kind == "bring":
                self.send_program(rest == "z")
                brought = True
            if kind == "plain":
                return rest or "?"
            if kind == "no":
                code, _blank, why = rest.partition(" ")
                if code == str(EX_TEMPFAIL):
                    raise LineLost("%s: %s" % (self.line.host, printable(why)))
                raise LineHopeless(int(code) if re.match(r"(6[4-9]|7[0-8])\Z", code) else EX_PROTOCOL,
                            "%s: %s" % (self.line.host, printable(why)))
        else:
            self.line.raise_refusal(self.process)
        self.line.nonsense()

    def send_program(self, packed):
        """This very file, which the door there is."""
        import zlib
        data = zlib.compress(own_file()[0]) if packed else own_file()[0]
        log("info" if self.line.run else "debug", self.line.run, "2 bring", host=self.line.host,
            bytes=len(data))
        self.write(b"%d\n" % len(data), data)
        self.flush()

    def hello(self, lane, check=False):
        """What there is there."""
        more = {"check": True} if check else {}
        return self.ask("hello", v=2, run=self.line.run, lane=lane, turn=self.line.turn, **more).answer(
            "state", "door", "host", "boot", "free")

    def send(self, do, words=(), data=(), **more):
        """One request; data: the bytes behind it, in parts. LineLost."""
        self.write(json.dumps(dict(words, do=do, **more)).encode("ascii") + b"\n", *data)

    def write(self, *parts):
        try:
            for part in parts:
                self.process.stdin.write(part)
        except OSError:                                # no broken pipe of stdout
            self.line.raise_broken(self.process)

    def flush(self):
        try:
            self.process.stdin.flush()
        except OSError:
            self.line.raise_broken(self.process)

    def ask(self, do, words=(), **more):
        """One request, on its way; the session, for its answer."""
        self.send(do, words, **more)
        return self

    def answer(self, *needed):
        """The next answer: a dict with these words. Declined; LineLost; 76 if it is not as it should be."""
        self.flush()
        row = self.process.stdout.readline(ANSWER_LINE)
        if not row.endswith(b"\n"):
            self.line.nonsense() if len(row) >= ANSWER_LINE else self.line.raise_broken(self.process)
        try:
            told = json.loads(row.decode("ascii"))
        except (ValueError, RecursionError):
            told = None
        if (type(told) is not dict
                or not all(kind(told[name]) for name, kind in ANSWER_FIELDS.items() if name in told)):
            self.line.nonsense()
        if "no" in told:
            raise Declined(self.line.host, told)
        if not set(needed) <= set(told):
            self.line.nonsense()
        return told

    def read_parts(self, count):
        """The bytes behind an answer, some at a time: a view that is good until the next ones are asked
        for."""
        while count:
            data = self.buffer[:count]
            if self.process.stdout.readinto(data) != len(data):
                self.line.raise_broken(self.process)
            count -= len(data)
            yield data

    def read_exactly(self, count):
        """All of them."""
        data = self.process.stdout.read(count)
        if len(data) != count:
            self.line.raise_broken(self.process)
        return data

    def close(self):
        """Ends it."""
        self.process.kill()
        self.line.end_session(self.process)


def spend_connection(address, most):
    """Waits until one more connection to this place fits into the budget (`most` in CONNECT_SPAN seconds,
    over all runners of this user; 0: no budget). Sites ban hosts that connect too often."""
    import hashlib
    import fcntl
    if not most:
        return
    name = hashlib.sha256(utf8(address)).hexdigest()[:16]
    with open(os.path.join(state_folder(), b"connects." + name.encode()), "a+b") as book:
        fcntl.flock(book, fcntl.LOCK_EX)
        while True:
            book.seek(0)
            now = time.time()
            # others are broken
            rows = [float(row)
                    for row in book.read(1 << 20).split() if re.match(rb"[0-9]{1,12}\.[0-9]{3}\Z", row)]
            times = [row for row in rows if now - CONNECT_SPAN < row <= now]
            if len(times) < most:
                break
            log("info", None, "wait", place=address, why="connection budget",
                seconds="%.0f" % (times[0] + CONNECT_SPAN - now))
            time.sleep(max(0.1, times[0] + CONNECT_SPAN - now))
        book.seek(0)
        book.truncate()
        book.write(b"".join(b"%.3f\n" % one for one in times + [now]))


class Line:
    """One control connection to a host, and the sessions over it or beside it."""

    def __init__(self, host, settings):
        if not host or host.startswith("-") or has_control_chars(host) or " " in host:
            raise Stop(EX_USAGE, _("%s: not a host") % printable(host))
        self.host = host
        self.settings = settings
        self.turn = os.urandom(8).hex()
        self.folder = self.process = self.session = self.options = self.run = self.asked = None
        self.plain = ""                                # why there is no door there
        self.audit = ""                                # NUMBER.SUM of the audit log there
        self.door = "plain"
        self.told = {}                                 # what the door there said to hello
        self.round_trip = 0.0

    def ask_config(self):
        """Asks ssh what its configuration says about the host; ssh_config() takes the answer. Itself."""
        words = ["ssh"] + self.settings.ssh_options + ["-G", "--", self.host]
        self.asked = subprocess.Popen([utf8(word) for word in words], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return self

    def ssh_config(self):
        """What ~/.ssh/config says about the host ({key: value}); empty if this ssh cannot tell."""
        asked, self.asked = self.asked or self.ask_config().asked, None
        text = asked.communicate()[0].decode("utf-8", "replace")
        pairs = [row.split(" ", 1) for row in text.splitlines() if " " in row]
        return {key: value for key, value in pairs}

    def choose_options(self):
        """The options of every connection. ~/.ssh/config decides; here is only what must be so, and AES-GCM
        first where it is allowed."""
        told, alive = self.ssh_config(), max(1, int(self.settings.alive / 3))
        options = ["BatchMode=yes", "ConnectTimeout=%d" % max(1, self.settings.connect),
                   "ServerAliveInterval=%d" % alive, "ServerAliveCountMax=3", "Compression=no",
                   "ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes", "PermitLocalCommand=no",
                   "ControlPersist=no", "EscapeChar=none", "LogLevel=ERROR", "RequestTTY=no",
                   "RemoteCommand=none",
                   "StrictHostKeyChecking="
                   + ("accept-new" if told.get("stricthostkeychecking") == "accept-new" else "yes")]
        ciphers = told.get("ciphers", "").split(",")
        fast = sorted((name for name in ciphers if name.endswith("gcm@openssh.com")),
                      key=lambda name: "256" in name)
        if fast and has_aes():
            options.append("Ciphers=" + ",".join(fast + [name for name in ciphers if name not in fast]))
        self.options = ["ssh", "-x", "-a", "-T"] + self.settings.ssh_options
        for option in options:
            self.options += ["-o", option]
        self.address = "%s@%s:%s" % (told.get("user", ""), told.get("hostname", self.host),
                                   told.get("port", ""))

    def start_session(self, asked, own=False):
        """Starts a session (Popen) that is asked for this: the first one with the control connection, others
        over it, or (own) over a connection of their own. Its stderr goes into a file (process.said), which
        why() reads."""
        control = ["-S", self.control, "-o", "ControlMaster=no"]
        if own or self.process is None:
            spend_connection(self.address, self.settings.connects)
            control = (["-o", "ControlMaster=no", "-o", "ControlPath=none"] if own
                       else ["-M", "-S", self.control])
        elif self.process.poll() is not None:      # ssh would log in anew for each session, beyond the budget
            raise LineLost(_("%s: the connection broke off") % self.host)
        said = open(os.path.join(self.folder, b"said.%d" % (time.monotonic() * 1e9)), "w+b")
        process = subprocess.Popen([utf8(word) for word in self.options + control + ["--", self.host, asked]],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, bufsize=PIPED,
                                   start_new_session=True)
        process.said = said
        limit_stderr(process.pid)
        for pipe in (process.stdin, process.stdout):
            widen_pipe(pipe)
        return process

    def door_command(self, *more):
        """What asks for a session of the door there."""
        return host_command(LOADER, "2", "door", self.settings.base, own_file()[1], *more)

    def open(self, run=None, meanwhile=lambda: None, check=False):
        """Opens the control connection, and its session for this run (UUID). LineLost if it cannot be had
        now; Stop if it will never be had like this. meanwhile: called while the log-in takes its time. check:
        only to look; nothing is kept there."""
        import tempfile
        # sun_path is short
        self.folder = utf8(tempfile.mkdtemp(prefix="mi-", dir="/tmp" if os.path.isdir("/tmp") else None))
        self.control, self.run = self.folder.decode() + "/c", run
        wanted = self.door_command(*["look"] if check else [])
        if self.options is None:
            self.choose_options()
        began, self.process = time.monotonic(), self.start_session(wanted)
        # a log-in can hang at any point
        patience = threading.Timer(self.settings.connect * 3, end_login, [self.process])
        patience.daemon = True
        self.session = Session(self, self.process)
        try:
            meanwhile()
            patience.start()
            self.plain = self.session.reach_door()
            started = time.monotonic()
            if not self.plain:
                self.told = self.session.hello("", check)
                took = self.told.get("took", 0) / 1e6  # there; the rest is the line's
                self.door, self.round_trip = self.told["door"], max(0, time.monotonic() - started - took)
        except BaseException:
            self.close()
            raise
        patience.cancel()
        log("debug", run, "connect", host=self.host, seconds="%.3f" % (time.monotonic() - began),
            plain=self.plain, program=self.told.get("program", "-"), there=self.told.get("host", "-"),
            state=self.told.get("state", "-"))
        return self

    def time_again(self, total):
        """Before total bytes are moved: a round trip that leaves open whether the host is near, as a busy one
        answers late, is timed again."""
        for _turn in range(3):
            if total > SECOND_SESSION and NEAR <= self.round_trip < 5 * NEAR:
                began = time.monotonic()
                self.session.ask("state").answer("state")
                self.round_trip = min(self.round_trip, time.monotonic() - began)

    def both_have_zstd(self, large, shares):
        """Is it worth a round trip, and have both ends libzstd? (An older door refuses the question.)"""
        if sum(entry.size for entry in large if entry.far in shares) < BULK or libzstd() is None:
            return False
        try:
            return self.session.ask("state", zstd=True).answer("state").get("zstd", False)
        except Declined:
            return False

    def near(self):
        """Is the host on the same LAN?"""
        return self.round_trip < NEAR

    def boot_there(self):
        """This boot of the host there, as one word."""
        return re.sub(r"\s", "?", "%s.%s" % (self.told.get("host"), self.told.get("boot")))

    def open_lane(self, way, own):
        """A further session, "put" or "get"."""
        session = Session(self, self.start_session(self.door_command(), own))
        if session.reach_door():
            self.nonsense()
        session.hello(way)
        return session

    def list_results(self, inputs, signed=False):
        """What may leave of the run (Listing). inputs: also inputs that nobody has touched; signed: and what
        is signed."""
        found, at = Listing([], [], Verdicts(), [], []), 0
        while at is not None:
            told = self.session.ask("results", {"from": at, "inputs": inputs}).answer(
                "files", "folders", "next")
            found.files.extend(Entry(None, name, size, mtime, 0o777 if x else 0o666)
                               for name, size, mtime, x, sum256 in told["files"])
            found.folders.extend((name[:-1], mtime) for name, mtime in told["folders"])
            if signed:
                found.rows.extend((name, size, sum256, x) for name, size, mtime, x, sum256 in told["files"])
                found.rows.extend((name, 0, sum_of(io.BytesIO(), 0, 0), False)
                                  for name, mtime in told["folders"])
            step = len(told["files"]) + len(told["folders"])
            if (told["next"] is not None and (told["next"] != at + step or not step)
                    or len(found.files) + len(found.folders) > MOST_FILES):
                self.nonsense()
            at = told["next"]
        found.signed.extend([told.get("signed", ""), told.get("verdicts", {})])
        found.verdicts.update((code, {"count": one["count"], "names": list(map(printable, one["names"]))})
                              for code, one in told.get("verdicts", {}).items())
        self.audit = told.get("audit", "")
        return found

    def nonsense(self):
        """Stop 76: no program of ours answers like this."""
        raise Stop(EX_PROTOCOL, _("%s: an answer that makes no sense") % self.host)

    def raise_refusal(self, process):
        """Says why a session never came to our program."""
        text, ended = self.last_words(process), process.returncode
        if process is not self.process:
            raise LineLost("%s: %s" % (self.host, printable(text) or _("the connection broke off")))
        self.close()
        if "refused by the guard: an unknown verb" in text:
            raise LineHopeless(EX_PROTOCOL,
                        _("%s: its guard is of an older version (protocol 1); this file has to be put there")
                        % self.host)
        if 0 <= ended < SSH_FAILED and not any(sign in text for sign, code in FINAL):
            raise LineHopeless(EX_CONFIG,
                        _("%s: the log-in there ended with code %d before it came to what was asked for%s;"
                          " an exit or exec in a file that its shell reads first (.bashrc, .cshrc), or an"
                          " account without a shell?") % (self.host, ended, printable(text and ": " + text)))
        for sign, code in FINAL:
            if sign in text:
                raise LineHopeless(code, _("%s: %s (try by hand: %s)") % (
                    self.host, printable(text), " ".join(["ssh"] + self.settings.ssh_options + [self.host])))
        raise LineLost("%s: %s" % (self.host, printable(text) or _("no answer")))

    def last_words(self, process):
        """The last words on stderr of a session that has ended (or is ended here)."""
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.said.seek(0)
        rows = [row
                for row in process.said.read(65536).decode("utf-8", "replace").splitlines() if row.strip()]
        return " / ".join(row.strip() for row in rows[-3:])[:500]

    def raise_broken(self, process):
        """A session ended too early: a guard that stopped (broken ini, bug) is final, anything else is a lost
        line."""
        text = self.last_words(process)
        if PROGRAM + ": " in text:
            raise Stop(EX_PROTOCOL, _("the guard of %s: %s") % (self.host, printable(text)))
        raise LineLost("%s: %s" % (self.host, printable(text) or _("the connection broke off")))

    def end_session(self, process):
        """Closes a session's pipes and waits a moment for it."""
        close_pipes(process)
        self.last_words(process)
        process.said.close()

    def close(self):
        """Ends the control connection and removes its socket."""
        if self.process is not None:
            self.process.terminate()
            close_pipes(self.process)  # wakes an ssh that was told just before it began to wait
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.folder is not None:
            import shutil
            shutil.rmtree(self.folder, ignore_errors=True)
        self.process = self.folder = None


# ==== one calculation ====
# From the order to the results. Each step is noted in the record when it is done; what was lost, or killed,
# goes on behind the last note.
# code: exit code; ended_by: command or runner
Outcome = collections.namedtuple("Outcome", "ident code ended_by state fetched odd verdicts")
# odd: results that could not be put here; verdicts: those that did not leave there
Outcome.__new__.__defaults__ = ({},)
INCOMPLETE = set(NOT_THERE) | {"refused", "held"}     # verdicts that make "everything" incomplete


def run_calculation(host, command, inputs, into=".", settings=None, mode="run", keep=False, batch=None,
                    allow_refused=False, sign_key="", require_signed_by=""):
    """Runs command on host with the input files (paths; far names are their last parts) and fetches
    everything into `into`. batch: [a batch system there, option, ...], for a host without a guard.
    allow_refused: what the owner's rules keep there is no failure. sign_key: a private key (file) by which
    the order is signed; require_signed_by: a file of public keys, of which one must have signed the results.

    Returns an Outcome. Stop with an exit code of the table when it cannot go on; the calculation can then be
    resumed by its ident, which the message names.
    """
    pairs, seen, settings = [], {}, settings or settings_of_options({})
    for path in inputs:
        far = os.path.basename(os.path.normpath(path))
        if seen.setdefault(far, path) != path:
            raise Stop(EX_USAGE,
                       _("two inputs have the name %s: %s and %s")
                       % (printable(far), printable(seen[far]), printable(path)))
        pairs.append([os.path.abspath(path), far])
    if not command or has_control_chars(command.replace("\t", " ")):
        raise Stop(EX_USAGE, _("no command, or one with control characters"))
    gather_inputs(pairs)                               # 66 before anything is done
    line = Line(host, settings).ask_config()           # 64 if that is no host
    ident = new_ident()
    order = {"host": host, "command": command, "inputs": pairs, "into": os.path.abspath(into), "mode": mode,
             "keep": keep, "v": ON_DISK, "time": time.time(), "batch": batch, "allow_refused": allow_refused,
             "sign_key": sign_key and os.path.abspath(sign_key),
             "signed_by": require_signed_by and os.path.abspath(require_signed_by),
             "settings": settings._asdict()}
    run = Runner(Record(ident, order), settings, line)
    try:
        run.look_at_target()
    except BaseException:
        run.record.remove()                            # nothing was done yet
        raise
    return run.carry_out()


def new_ident():
    """A UUID of random (version 4). (The module uuid, with all of platform, takes 2 ms of every start.)"""
    drawn = int.from_bytes(os.urandom(16), "big") & ~(0xF << 76 | 3 << 62) | 4 << 76 | 2 << 62
    return re.sub("(.{8})(.{4})(.{4})(.{4})", r"\1-\2-\3-\4-", "%032x" % drawn)


class Runner:
    """One calculation: its record, its line, and the patience with that line."""

    def __init__(self, record, settings, line=None):
        self.record = record
        self.settings = settings
        self.order = record.order
        self.ident = record.ident
        self.first = line                              # the Line that is opened first
        self.line = None
        self.progress = 0                              # what has moved: while it grows, nobody loses patience
        self.was_connected = False
        self.looked_at = None                          # the inputs' entries
        # by the clock of where the results go; 0: not looked at yet
        self.began = self.order.get("began", record.steps.get("sending", {}).get("clock", 0))
        self.inputs_line = None                        # the Line over which they went
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def look_at_target(self):
        """What cannot be stored should be known before the calculation. (A record is there already: who is
        killed here is remembered, with what lies in the target.)"""
        if self.began == 0:
            self.began = target_clock(self.order["into"], self.ident)

    def carry_out(self):
        """Steps 2 to 9; from wherever the record says that it stopped. Returns the Outcome."""
        record = self.record
        log("info", self.ident, "1 order", host=self.order["host"], command=self.order["command"],
            files=len(self.order["inputs"]))
        fault("ordered")
        try:
            if "ended" not in record.steps:
                if "starting" not in record.steps:
                    self.look_at_target()
                    self.insist(self.send_inputs)      # 2. connect, 3. directory, 4. inputs
                self.solver_log("start")
                state = self.insist(self.start_and_watch)                  # 5. start, 6. watch
                fault("ended")
                record.note_step("ended", state=state)
                self.solver_log("end " + state)
            if "fetched" not in record.steps:
                self.insist(self.fetch_results)        # 7. results, 8. fetch
            else:
                drop_left_parts(utf8(self.order["into"]), self.ident)
            fault("fetched")
            outcome = self.outcome()
            if not outcome.odd and "cleaned" not in record.steps:
                self.finish_there(outcome)             # 9. clean up there
            record.note_step("finished", code=outcome.code)
            log("info", self.ident, "9 finish", state=outcome.state, code=outcome.code,
                ended_by=outcome.ended_by)
            return outcome
        except Stop as stop:
            if stop.code == EX_REFUSED and "started" not in record.steps:
                record.note_step("refused", code=stop.code) # what `list` says; `resume` may try again
            raise
        except KeyboardInterrupt as told:
            runs = "started" in record.steps and "ended" not in record.steps
            text = (_("%s: interrupted; the command runs on there, %s.py resume %s continues") if runs else
                    _("%s: interrupted; %s.py resume %s continues")) % (self.ident, PROGRAM, self.ident)
            raise Stop(told.args[0] if told.args else EX_INTERRUPT, text)
        finally:
            self.drop_line()

    def insist(self, step):
        """step(), again over a new line when that was lost: until it is through, or the line was away for
        COUNT x INTERVAL seconds."""
        count, interval = self.settings.retry
        down, tries, seen = None, 0, None
        while True:
            try:
                if self.line is None:
                    line, self.first = self.first or Line(self.order["host"], self.settings), None
                    self.line = line.open(self.ident, self.look_at_inputs)
                    self.was_connected = True
                return step()
            except LineLost as error:
                if (isinstance(error, LineHopeless) and not self.was_connected
                        and not self.record.steps.get("starting")):
                    raise error.stop()
                lost = error
            except Declined as error:
                if error.code != "host":         # else: it is another node's; the next log-in may be that one
                    raise error.stop()
                lost = error
            self.drop_line()
            now = time.monotonic()
            if down is None or seen != self.progress:
                # it had moved on since the last loss: patience starts anew
                down, tries, seen = now, 0, self.progress
            tries += 1
            pause = min(interval, 2.0 ** min(tries - 1, 12)) * (0.75 + 0.5 * (os.urandom(1)[0] / 255.0))
            if now + pause - down > count * interval:
                runs = "starting" in self.record.steps
                raise Stop(EX_UNAVAILABLE,
                           (_("%s; given up after %d tries. What was started there runs on: %s resume %s")
                            if runs
                            else _("%s; given up after %d tries; nothing was started there: %s resume %s"))
                           % (lost, tries, PROGRAM, self.ident))
            log("warn", self.ident, "line", host=self.order["host"], lost=lost, again_in="%.1fs" % pause)
            time.sleep(pause)

    def look_at_inputs(self):
        """Looks at the inputs, once, while the log-in takes its time."""
        if self.looked_at is None and "starting" not in self.record.steps:
            self.looked_at = gather_inputs(self.order["inputs"])

    def drop_line(self):
        if self.line is not None:
            self.line.close()
        self.line = None

    def solver_log(self, word):
        """The lines of the solver log, where the site asks for them (MISYSTEM_SITEID)."""
        site = os.environ.get("MISYSTEM_SITEID")
        if site:
            show("%s solver_log site=%s host=%s calculation=%s %s\n"
                 % (time.strftime("%Y/%m/%d %H:%M:%S"), printable(site), printable(self.order["host"]),
                    self.ident, printable(word)))

    def send_inputs(self):
        """2. connect 3. directory 4. inputs"""
        line = self.line
        log("info", self.ident, "2 connect", host=line.host, round_trip="%.1fms" % (line.round_trip * 1000),
            door=line.door)
        fault("connected")
        # as they were at first: a change since then is said
        record, entries, self.inputs_line = self.record, self.looked_at, line
        record.begin_phase("in", line.boot_there(), line.told.get("state") == "none")
        record.note_step("sending", clock=self.began)
        fault("sending")
        before = record.count_arrived()
        try:
            moved = plain_put(self, entries) if line.plain else put_inputs(line, record, entries)
        finally:
            self.progress += record.count_arrived() - before
        log("info", self.ident, "4 inputs", files=len(entries), bytes=moved)
        fault("sent")
        record.note_inputs(entries)
        record.note_step("starting", boot=line.told.get("boot", "?"), host=line.told.get("host", "?"),
                         offset=0)

    def start_and_watch(self):
        """5. start (once, however often it is asked) 6. watch: the log as it comes, then how it ended"""
        line, starting = self.line, self.record.steps["starting"]
        fault("starting")
        if line.plain and self.order.get("sign_key"):
            raise Stop(EX_PROTOCOL, _("%s: there is no guard that takes signed orders") % line.host)
        if line.plain:
            return plain_run(self)
        lost = line is not self.inputs_line and self.why_never_started(starting)
        if lost:
            return lost
        session, fresh = line.session, "started" not in self.record.steps
        if fresh:
            signed = {"signed": self.signed_order()} if self.order.get("sign_key") else {}
            session.send("start", command=self.order["command"], batch=self.order.get("batch"), **signed)
        session.send("wait", offset=starting["offset"])
        try:
            if fresh:
                told = session.answer("state")
                self.record.note_step("started")
                log("info", self.ident, "5 start", state=told.get("where") or told["state"])
                fault("started")
            return self.watch(session, starting)
        except Declined as error:
            if error.code != "gone":
                raise
            self.drop_line()                           # its session may have more to say
            return "lost it was cleaned away"

    def signed_order(self):
        """The order as a signed text; made once, so that whoever goes on says the same. 78 if it cannot be
        signed."""
        if "signed" not in self.record.steps:
            rows = ((one.far,) + sum_of_near(one) + (False,) for one in self.record.sent_inputs().values())
            text = signed_order({
                "site": self.order["host"].rpartition("@")[2], "request_id": self.ident, "parameters": "",
                "command": self.order["command"], "inputs": sum_of_manifest(rows), "result_files": [],
                "result_patterns": list(EVERYTHING)}, self.order["sign_key"])
            self.record.note_step("signed", text=text)
        return self.record.steps["signed"]["text"]

    def why_never_started(self, starting):
        """Why it cannot have been started, or cannot be any more, over this line, which is a later one than
        that of the inputs; ''. LineLost if this line leads to another host, where nothing of it is."""
        line, state, here = self.line, self.line.told["state"], self.line.told["host"]
        other = starting.get("host", here) != here
        if other and state in ("none", "gone"):
            raise LineLost(_("%s: the log-in came to another host (%s), where nothing of it is; it was sent"
                             " to %s") % (line.host, printable(here), printable(starting["host"])))
        if state == "taken" and not other and starting["boot"] != line.told["boot"]:
            return "lost the host was restarted before the command was started"
        return "lost it was cleaned away" if state in ("none", "gone") else ""

    def watch(self, session, starting):
        """6. Reads the stream of a `wait` to its end; returns the state."""
        said = None
        while True:
            told = session.answer()
            if "log" in told:
                if told["log"] != starting["offset"] or told.get("size", 0) > UNPACKED_MOST:
                    session.line.nonsense()
                for data in session.read_parts(told.get("size", 0)):
                    self.echo(data)
                    starting["offset"] += len(data)
                    self.progress += 1
            elif told.get("end"):
                state = end_words(told, session.line)
                log("info", self.ident, "6 end", state=state)
                return state
            elif told.get("where") and told["where"] != said:  # where a batch system, or another node, has it
                said = told["where"]
                log("info", self.ident, "6 now", state=said)

    def echo(self, data):
        """Live output of the command, harmless for a terminal."""
        show(re.sub(CONTROL_CHARS, lambda m: m.group() if m.group() in "\t\n\r" else printable(m.group()),
                    self.decoder.decode(data)))

    def fetch_results(self):
        """7. results 8. fetch: everything in the directory, but inputs that nobody has touched"""
        target = Target(utf8(self.order["into"]), self.ident, began=self.began, always=(LOG.encode(),))
        arrivals, done = Arrivals(target), False
        try:
            fault("listing")
            if self.line.plain and self.order.get("signed_by"):
                raise Stop(EX_PROTOCOL, _("%s: there is no guard that signs results") % self.line.host)
            count, verdicts = plain_get(self, arrivals) if self.line.plain else self.fetch_into(arrivals)
            target.sync_all()
            for name, why in arrivals.kept.items():
                log("error", self.ident, "8 fetch", not_fetched=name, why=why)
            if arrivals.kept:
                log("error", self.ident, "8 fetch", still_there=len(arrivals.kept),
                    get_them="%s resume %s --to DIR" % (PROGRAM, self.ident))
            self.record.note_step("fetched", files=count, odd=sorted(map(printable, arrivals.kept)),
                                  verdicts=verdicts)
            self.record.keep_head(self.order["host"], self.line.audit)
            done = True
        finally:
            target.close(done)

    def fetch_into(self, arrivals):
        """(how many files were fetched, verdicts of what did not leave there)."""
        got, sent = {}, self.record.sent_inputs() if self.order["mode"] == "fielded" else {}
        for look in range(READ_TRIES):                      # what changes while it is fetched is listed anew
            found = self.list_results()
            if self.order.get("signed_by"):
                arrivals.sums = self.believed_sums(found)
            wanted = [with_part(entry, arrivals.target) for entry in found.files
                      if got.get(entry.far) != version_of(entry) and self.wants(arrivals, entry, sent)]
            log("info", self.ident, "7 results", files=len(found.files), to_fetch=len(wanted),
                odd=len(arrivals.kept))
            for name, mtime in found.folders:
                arrivals.put(name, arrivals.target.make_directory, name, mtime)
            stays = self.fetch_listed(arrivals, wanted)
            got.update((entry.far, version_of(entry)) for entry in wanted if entry.far not in stays)
            stays = {name: "changing" if code == "missing" else code for name, code in stays.items()}
            if "changing" not in stays.values() and "changing" not in found.verdicts:
                break                                  # (missing: it was listed, and may be so once more)
            time.sleep(LOOK_AGAIN)
        return len(got), final_verdicts(found.verdicts, stays, got)

    def fetch_listed(self, arrivals, wanted):
        """Fetches these; {name: code} of those that did not leave after all."""
        record, arrivals.target.sync = self.record, len(wanted) <= 50
        record.begin_phase("out", boot_id() + " " + self.line.boot_there())
        record.keep_verified([entry for entry in wanted if entry.near and os.path.exists(entry.near)])
        fault("fetching")
        before = record.count_arrived()
        try:
            moved, stays = get_results(self.line, record, wanted, arrivals)
        finally:
            self.progress += record.count_arrived() - before
        log("info", self.ident, "8 fetch", files=len(wanted), bytes=moved)
        return stays

    def believed_sums(self, found):
        """{name: sum} of what was listed, if a key of --require-signed-by has signed it there, for this run
        and order and this end; that is also kept beside the results. 76 if not."""
        import hashlib
        state, order = self.record.steps["ended"]["state"].split(), self.record.steps.get("signed", {})
        text, verdicts = found.signed or ["", {}]
        line, _newline, armored = text.partition("\n")
        order = order.get("text", "").partition("\n")[0]
        stays = json.dumps(verdicts, sort_keys=True)
        wanted = {"v": 1, "run": self.ident + ".1", "manifest": sum_of_manifest(found.rows),
                  "order": order and hashlib.sha256(order.encode()).hexdigest(),
                  "stays": hashlib.sha256(stays.encode()).hexdigest(),
                  "exit_code": int(state[1]) if state[0] == "ended" else None}
        try:
            with open(utf8(self.order["signed_by"]), encoding="utf-8") as rows:
                keys = set(map(public_key, filter(str.strip, rows)))
            signed_by(line.encode(), armored, RESULT_SPACE, keys)
            told = json.loads(line)
            other = [key for key in sorted(wanted) if told.get(key) != wanted[key]]
            if other:
                raise ValueError(_("what was signed there is not what came (%s)") % " ".join(other))
        except OSError as error:
            raise Stop(EX_CONFIG, "%s: %s" % (self.order["signed_by"], error.strerror))
        except ValueError as error:
            raise Stop(EX_PROTOCOL, _("%s: its results are not believed: %s") % (self.ident, error))
        write_synced(os.path.join(utf8(self.order["into"]), utf8(self.ident + ".signed")),
                     utf8(text), 0o666)
        return {name: sum256 for name, size, sum256, x in found.rows}

    def list_results(self):
        """What may leave there; nothing, where nothing of a lost calculation is left. 75 if it waits for a
        person."""
        try:
            found = self.line.list_results(self.order["mode"] == "fielded", bool(self.order.get("signed_by")))
            told = self.line.session.ask("state").answer("state") if "held" in found.verdicts else {}
            if told.get("held") is not None:
                raise self.held(told)
            return found
        except Declined as error:
            if error.code in ("gone", "state") and self.record.steps["ended"]["state"].startswith("lost"):
                return Listing([], [], Verdicts(), [], [])
            raise

    def held(self, told):
        """The Stop where results wait for a person. told: STATE of the protocol."""
        since = told.get("held")
        words = _("held for a person at the external computer since %s") % (
            day_and_time(since) if type(since) is int and 0 <= since < 1 << 32 else "?")
        return Stop(EX_TEMPFAIL, _("%s: its results are %s; when they are released, %s.py resume %s fetches"
                                   " them") % (self.ident, words, PROGRAM, self.ident))

    def wants(self, arrivals, entry, inputs):
        """Is it to be fetched? Not what is here: an input as it was sent (fielded words: where it came from),
        or stored before."""
        sent = inputs.get(entry.far)
        mine = sent is not None and (sent.size, sent.mtime) == (entry.size, entry.mtime) and os.path.realpath(
            os.path.join(utf8(self.order["into"]), utf8(entry.far))) == os.path.realpath(sent.near)
        return (not mine and not arrivals.has_stored(entry)
                and arrivals.put(entry.far, arrivals.target.check_storable, utf8(entry.far)))

    def outcome(self):
        """The Outcome of how it ended."""
        done, state = self.record.steps["fetched"], self.record.steps["ended"]["state"]
        verdicts = done.get("verdicts", {})
        short = (done["odd"]
                 or INCOMPLETE.intersection(verdicts)
                 - ({"refused"} if self.order.get("allow_refused") else set()))
        if state.startswith("ended "):
            code = int(state.split()[1])
            told, who = (EX_DATA, "runner") if short and not code else (code, "command")
            return Outcome(self.ident, told, who, state + self.known_reason(code), done["files"], done["odd"],
                           verdicts)
        if state.split()[0] == "failed":
            why = state.partition("failed ")[2].replace("could not be started", "")
            words = "the command could not be started there" + (why and ": " + why)
            return Outcome(self.ident, 126, "runner", words, done["files"], done["odd"], verdicts)
        state += _(" (what it left was fetched; nothing is run a second time by itself)")
        return Outcome(self.ident, EX_TEMPFAIL, "runner", state, done["files"], done["odd"], verdicts)

    def known_reason(self, code):
        """Behind how it ended: what is known of the reason."""
        if code > 128 and os.path.exists(os.path.join(self.record.folder, b"cancelled")):
            return _(" (cancelled by hand)")
        said = "\n".join(tail_of(os.path.join(utf8(self.order["into"]), utf8(LOG))))
        full = [word for word in FULL_WORDS.values() if code and word in said]
        return " (%s: %s)" % (LOG, full[0]) if full else ""

    def finish_there(self, outcome):
        """9. All is here: it may go there, and goes if all went well and nobody wants to keep it."""
        clean = not self.order["keep"] and outcome.code == 0
        try:
            self.insist(lambda: self.clean_there(clean))
        except Stop as stop:                           # everything is here: not worth a failure
            log("warn", self.ident, "9 clean", host=self.order["host"], why=stop)

    def clean_there(self, clean):
        """9. says that all has arrived there, and (clean) removes the directory there"""
        if self.line.plain:
            return
        session = self.line.session
        session.send("fetched", but=[])
        if clean:
            session.send("clean", discard=False)
        try:
            session.answer("state")
            told = session.answer("state") if clean else {}
        except Declined as error:
            if error.code == "host":
                raise
            told = {"left": [str(error)]}
        if told.get("state") == "gone":
            self.record.note_step("cleaned")
        elif told.get("left"):
            log("warn", self.ident, "9 clean", host=self.line.host, left=" / ".join(told["left"]))


def gather_inputs(inputs, check=True):
    """Entries of the inputs: [[near path, far name]]; directories with all that is in them, links followed.
    Stop 66 if one is missing."""
    entries = []
    for near, far in inputs:
        try:
            add_input(entries, utf8(near), far, ())
        except OSError as error:
            if check:
                raise Stop(EX_NOINPUT, "%s: %s" % (printable(near), error.strerror))
    return entries


def add_input(entries, near, far, above):
    """One input into entries; above: the real directories that it stands in (a link back to one of them is
    left out)."""
    info = os.stat(near)
    try:
        check_name(far)
    except ValueError as error:
        raise Stop(EX_NOINPUT, str(error))
    if stat.S_ISREG(info.st_mode):
        if not os.access(near, os.R_OK):
            raise Stop(EX_NOINPUT, _("%s: may not be read") % shown(near))
        entries.append(Entry(near, far, info.st_size, info.st_mtime_ns, info.st_mode & 0o777))
    elif stat.S_ISDIR(info.st_mode):
        real, names = os.path.realpath(near), sorted(os.listdir(near))
        if real in above:
            return
        if not names:
            entries.append(Entry(near, far + "/", 0, info.st_mtime_ns, info.st_mode & 0o777))
        for name in names:
            leaf = name.decode("utf-8", "surrogateescape")
            add_input(entries, os.path.join(near, name), far + "/" + leaf, above + (real,))
    else:
        raise Stop(EX_NOINPUT, _("%s: neither file nor directory") % shown(near))


def sum_of_near(entry):
    """(size, sha256) of an input as it is here. 66 if it cannot be read any more."""
    if entry.far.endswith("/"):
        return 0, sum_of(io.BytesIO(), 0, 0)
    try:
        with open(entry.near, "rb", 0) as source:
            return entry.size, sum_of(source, 0, entry.size)
    except OSError as error:
        raise Stop(EX_NOINPUT, "%s: %s" % (shown(entry.near), error.strerror))


def drop_left_parts(into, ident):
    """Removes what a runner that was killed has left there of its parts."""
    try:
        if os.path.isdir(os.path.join(into, b".mi-" + utf8(ident))):
            Target(into, ident).close(True)
    except OSError as error:                           # all is here: not worth a failure
        log("warn", ident, "8 fetch", why=error)


def target_clock(into, ident):
    """The time now by the clock of the file system there, in nanoseconds."""
    target = Target(into, ident)
    try:
        fault("target looked at")
        return target.now()
    finally:
        target.close(True)


def final_verdicts(verdicts, stays, got):
    """The verdicts, with those of the getting ({name: code}). Of what changes and has come, bytes of one
    moment are here (got); nobody asked by name for what is missing."""
    for name, code in stays.items():
        verdicts.add(code, name)
    changing = verdicts.pop("changing", {"count": 0, "names": []})
    here = set(map(printable, got)).intersection(changing["names"])
    if changing["count"] > len(here):
        verdicts["changing"] = {"count": changing["count"] - len(here),
                                "names": sorted(set(changing["names"]) - here)}
    verdicts.pop("missing", None)
    return verdicts


def end_words(told, line):
    """How it ended, in words: ended CODE WHY, failed WHY (it could not be started), lost WHY. told: STATE of
    the protocol."""
    lost = told.get("state") == "lost" or told.get("lost")
    if not lost and told.get("state") not in ("ended", "fetched"):
        line.nonsense()
    why = told.get("why", "")
    how = "failed" if told.get("code") is None else "ended %d" % told["code"]
    how = "lost" if lost else how
    return printable(how + " " + why).strip()


class Arrivals:
    """Results that come here. target: where they go; kept: {name: why} of what must not be put there."""

    def __init__(self, target):
        self.target = target
        self.kept = {}
        self.sums = {}                                 # {name: sum} where they were signed

    def put(self, name, act, *words):
        """act(*words), which puts a result there, or asks whether it may: True; if it must not, that is noted
        in kept."""
        try:
            act(*words)
            return True
        except NotStored as error:
            self.kept[name] = str(error)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
                raise
            self.kept[name] = error.strerror
        return False

    def has_stored(self, entry):
        """Did this calculation store this very version of it before?"""
        noted = self.target.noted.get(utf8(entry.far))
        try:
            info = os.stat(os.path.join(self.target.path, utf8(entry.far)), follow_symlinks=False)
        except OSError:
            return False
        return (noted == (info.st_ino, info.st_size, info.st_mtime_ns)
                and noted[1:] == (entry.size, entry.mtime))


# ==== record ====
# What this side knows of a calculation, on disk: what resume needs.

# form of a record, and of a run on the far side: 1 is of ssh protocol 1; a newer one is left alone
ON_DISK = 2
Settings = collections.namedtuple("Settings",
                                  "base streams retry connect alive rsync_options ssh_options connects")
# what an order.json tells, and these steps besides:
ORDER_KEYS = ("host", "command", "inputs", "into", "mode", "keep", "time", "settings")
STEP_KEYS = {"starting": ("boot", "offset"), "ended": ("state",), "fetched": ("files", "odd"),
              "finished": ("code",)}


def state_folder():
    """Where this side's records are (bytes), made if need be: the user's state directory."""
    top = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    if not os.path.isabs(top):                         # it would be another place wherever this is started
        raise Stop(EX_CONFIG,
                   _("no home directory is known here: set HOME, or XDG_STATE_HOME, to an absolute path"))
    folder = os.path.join(utf8(top), b"mi_distcomp_ssh")
    os.makedirs(folder, 0o700, exist_ok=True)
    return folder


class Record:
    """state_folder()/UUID: order.json, journal (JSON lines, fsynced), pieces (what has arrived). One runner
    at a time holds its lock."""

    def __init__(self, ident, order=None, lock=True):
        if not re.match(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", ident):
            begun = re.match("[0-9a-f-]{8,36}\\Z", ident)  # of none that there is (see whole_id)
            raise Stop(EX_USAGE,
                       (_("%s: no such calculation here (see: list)") if begun
                        else _("%s: not a UUID (see: list; its first eight characters do)"))
                       % printable(ident))
        self.ident = ident
        self.folder = os.path.join(state_folder(), ident.encode())
        if order is not None:
            os.mkdir(self.folder + b".new", 0o700)
            write_synced(os.path.join(self.folder + b".new", b"order.json"), json.dumps(order).encode())
            os.rename(self.folder + b".new", self.folder)
            sync_path(state_folder())
        self.order = self.read_order()
        if lock:
            self.lock = open(os.path.join(self.folder, b"order.json"), "r+")
            why = try_lock(self.lock)
            if why == LOCK_HELD:
                raise Stop(EX_TEMPFAIL, _("%s: another runner is at work on it") % ident)
            if why:            # a file system without locks. What else protects: the far side starts once
                log("warn", ident, "record", folder=shown(self.folder),
                    why="this file system knows no locks: start no second runner for it")
        self.journal = None
        self.pieces = None
        self.have = {}
        self.sums = {}                               # {(far, offset, size): sum} of the pieces that have come
        self.steps = self.read_steps()

    def read_order(self):
        """What was ordered. 64 if there is no such calculation, 74 if it cannot be read."""
        path = os.path.join(self.folder, b"order.json")
        try:
            with open(path, "rb") as text:
                order = json.loads(text.read().decode("utf-8"))
            if order.get("v", 1) > ON_DISK:
                raise Stop(EX_CONFIG,
                           _("%s: was written by a newer version of this program") % shown(self.folder))
            if (set(ORDER_KEYS) <= set(order) and set(Settings._fields) <= set(order["settings"])
                    and len(order["settings"]["retry"]) == 2):
                return order
            why = _("it is broken")
        except FileNotFoundError:
            raise Stop(EX_USAGE, _("%s: no such calculation here (see: list)") % self.ident)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            why = _("it is broken")
        except OSError as error:
            why = error.strerror
        raise Stop(EX_IOERR,
                   _("%s: its record cannot be read (%s: %s); remove the directory when it is not needed any"
                     " more") % (self.ident, shown(path), why))

    def read_steps(self):
        """{step: its last journal entry}; a torn line is ignored."""
        steps, rows = {}, []
        try:
            with open(os.path.join(self.folder, b"journal"), "rb") as text:
                rows = [row for row in text if row.strip()]
        except FileNotFoundError:
            pass
        for number, row in enumerate(rows, 1):
            try:
                entry = json.loads(row.decode("utf-8"))
                whole = (isinstance(entry["t"], (int, float))
                         and set(STEP_KEYS.get(entry["step"], ())) <= set(entry))
            except (ValueError, TypeError, KeyError, RecursionError):
                whole = False
            if whole:
                steps[entry["step"]] = entry
            elif row.endswith(b"\n") and row[-2:-1] in b"]}" or b"\0" in row:        # not just torn
                sys.stderr.write(_("%s: %s: line %d of its journal is broken, and left out")
                                 % (PROGRAM, self.ident, number) + "\n")
        return steps

    def last_step(self):
        """The last step's journal entry."""
        return (max(self.steps.values(), key=lambda one: one["t"]) if self.steps
                else {"step": "ordered", "t": self.order["time"]})

    def note_step(self, name, **values):
        """Writes a step into the journal, on disk before this returns."""
        if self.journal is None:
            self.journal = open(os.path.join(self.folder, b"journal"), "ab", 0)
            self.journal.write(b"\n")                  # a line that was torn stays alone
        entry = dict(values, t=time.time(), step=name)
        self.journal.write(json.dumps(entry).encode() + b"\n")
        os.fsync(self.journal.fileno())
        self.steps[name] = entry

    def count_arrived(self):
        """How many pieces have arrived."""
        return sum(len(spans) for spans in self.have.values())

    def begin_phase(self, phase, boots, fresh=False):
        """What has arrived is from now on noted for this phase ('in', 'out'); older notes count if they are
        of the same boots, and not fresh."""
        if self.pieces is not None:
            self.pieces.close()
        self.have, boots = {}, utf8(boots)
        path = os.path.join(self.folder, b"pieces." + phase.encode())
        try:
            with open(path, "rb") as text:
                if text.readline().rstrip(b"\n") == boots and not fresh:
                    for row in text:
                        if row.endswith(b"/\n"):
                            sum256, offset, size, whole, mtime, name = row[:-2].split(b" ", 5)
                            self.have.setdefault((name.decode(), int(whole), int(mtime)), set()).add(
                                (int(offset), int(size)))
                            self.sums[name.decode(), int(offset), int(size)] = sum256.decode()
        except (FileNotFoundError, ValueError):        # (also the notes of an older program)
            self.have = {}
        self.pieces = open(path, "ab" if self.have else "wb")
        if not self.have:
            self.pieces.write(boots + b"\n")
            self.pieces.flush()

    def keep_verified(self, entries):
        """Results that came in part before: what of them still has the sum that it had then; all else comes
        anew."""
        kept = {}
        for entry in entries:
            spans = self.have.get(version_of(entry), ())
            try:
                with open(os.open(entry.near, os.O_RDONLY | os.O_NOFOLLOW), "rb", 0) as source:
                    kept[version_of(entry)] = {(offset, size)
                                            for offset, size in spans
                                            if size < SMALL
                                            or sum_of(source, offset, size)
                                            == self.sums.get((entry.far, offset, size))}
            except OSError:
                continue
        self.have = {which: spans for which, spans in kept.items() if spans}

    def note_inputs(self, entries):
        """What was sent, for the time when it is to be told from what the command left: as it is now, not as
        it is then."""
        rows = [b"%d %d %o %s/\n" % (entry.size, entry.mtime, entry.mode, utf8(entry.far))
                for entry in entries]
        write_synced(os.path.join(self.folder, b"inputs"), b"".join(rows))

    def sent_inputs(self):
        """{far: Entry} of what was sent. (A record of an older program does not tell so; then as it is
        now.)"""
        tops = {far: utf8(near) for near, far in self.order["inputs"]}
        try:
            found = {}
            with open(os.path.join(self.folder, b"inputs"), "rb") as text:
                for row in text:
                    size, mtime, mode, far = row[:-2].decode().split(" ", 3)
                    top, slash, rest = far.partition("/")
                    found[far] = Entry(tops[top] + utf8(slash + rest), far, int(size), int(mtime),
                                       int(mode, 8))
            return found
        except (OSError, ValueError, KeyError):
            return {entry.far: entry for entry in gather_inputs(self.order["inputs"], check=False)}

    def note_arrived(self, entry, offset, size, sum256=""):
        """A piece is there, and its sum is right."""
        if self.pieces is not None:
            row = (utf8(sum256 or "-"), offset, size, entry.size, entry.mtime, utf8(entry.far))
            self.pieces.write(b"%s %d %d %d %d %s/\n" % row)
            if size >= SMALL:
                self.pieces.flush()
        self.have.setdefault(version_of(entry), set()).add((offset, size))

    def keep_head(self, host, head):
        """Keeps where the audit log there stood, longer than the record: this side is its witness. Its
        owner's `audit verify --witness` reads the file."""
        if head:
            try:
                with open(os.path.join(state_folder(), b"heads"), "a", encoding="utf-8") as out:
                    out.write("%s %s %s %s\n" % (iso_time(time.time()), printable(host), self.ident, head))
            except OSError as error:
                log("info", self.ident, "8 audit head not kept", why=error)

    def remove(self):
        """Removes the record."""
        import shutil
        shutil.rmtree(self.folder, ignore_errors=True)


def sum_of(source, offset, size):
    """The sha256 of a part of an open file, in hex."""
    import hashlib
    digest = hashlib.sha256()
    source.seek(offset)
    while size:
        data = source.read(min(BLOCK, size))
        if not data:
            return ""
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


# ==== moving files ====
# A queue of bundles of small files and pieces of large ones, and lanes that work it off: each a session,
# which is asked ahead so that no round trip is idle. What a dying lane had not finished, the others take.
# Every sum is compared.
# near: a path, bytes; far: a name, "d/": an empty directory; mtime: ns
Entry = collections.namedtuple("Entry", "near far size mtime mode")
Piece = collections.namedtuple("Piece", "entry offset size")
# results: [Entry], [(name, mtime)] of empty directories, Verdicts
# signed: what is said of it there; rows: see sum_of_manifest(), where that is wanted
Listing = collections.namedtuple("Listing", "files folders verdicts signed rows")


def put_inputs(line, record, entries):
    """Moves entries (inputs) into the far directory, the sum of each compared. Returns the bytes moved."""
    total = sum(entry.size for entry in entries)
    line.time_again(total)
    large = [entry for entry in entries if entry.size >= SMALL]
    shares = {} if line.near() else shares_near(large)
    count, step = choose_lanes(line, large, shares)
    transfer = InputTransfer(line, record, cut_work(entries, step, record.have, line.near()))
    transfer.zstd = line.both_have_zstd(large, shares)
    for entry in entries:                              # complete but for their end
        if entry.size >= SMALL and entry.far not in transfer.pieces_left:
            transfer.items.append(entry)
    transfer.items = transfer.items or collections.deque([[]])  # the run is made there all the same
    with Progress(transfer, _("sent"), total):
        run_lanes(transfer, count)
    return transfer.moved


def get_results(line, record, entries, arrivals):
    """Moves entries (results) to where they go, the sum of each compared; near is the part in which a large
    one grows. Returns (the bytes moved, {name: code} of what did not leave after all)."""
    large, total = [entry for entry in entries if entry.size >= SMALL], sum(entry.size for entry in entries)
    line.time_again(total)
    shares = {} if line.near() else shares_there(line, large)
    count, step = choose_lanes(line, large, shares)
    transfer = ResultTransfer(line, record, cut_work(entries, step, record.have, line.near()), arrivals)
    transfer.pack = dict.fromkeys(shares, "zstd" if line.both_have_zstd(large, shares) else True)
    for entry in large:
        if entry.far not in transfer.pieces_left:
            transfer.complete(entry, 0)                # it was whole already when the runner died
    with Progress(transfer, _("fetched"), total):
        run_lanes(transfer, count)
    lost = {entry.far for entry in entries} - set(arrivals.kept) - set(transfer.stays) - transfer.stored
    if lost:
        raise Stop(EX_BUG, _("%s: is not here, although all was fetched") % printable(min(lost)))
    return transfer.moved, transfer.stays


def version_of(entry):
    """What tells this content of a file from an older one."""
    return entry.far, entry.size, entry.mtime


def cut_work(entries, step, have, near):
    """Work for entries: bundles of small files (lists of Entry), and pieces of `step` bytes; have: {version:
    set of (offset, size)}, there already; near: is the host?"""
    items, bundle, filled, named, room = [], [], 0, 0, NEAR_BUNDLE if near else BUNDLE
    for entry in entries:
        if entry.size < SMALL:
            if (0, entry.size) in have.get(version_of(entry), ()):
                continue
            bundle.append(entry)
            filled, named = filled + entry.size, named + len(json.dumps(entry.far)) + 60
            if filled >= room or named >= BUNDLE_NAMES or len(bundle) == 1000:
                items.append(bundle)
                bundle, filled, named = [], 0, 0
            continue
        for first, last in gaps(have.get(version_of(entry), ()), entry.size):
            items += [Piece(entry, offset, min(step, last - offset)) for offset in range(first, last, step)]
    return ([bundle] if bundle else []) + items


def gaps(spans, size):
    """What the spans (offset, length) leave of size bytes: (first, last), one after the other."""
    at = 0
    for first, length in sorted(spans):
        if first > at:
            yield at, first
        at = max(at, first + length)
    if at < size:
        yield at, size


def shares_near(large):
    """{far name: what the line gets of it, as a share} of the large inputs that are worth packing: a look
    into the middle of each."""
    found = {}
    for entry in large[:MOST_SAMPLES]:
        try:
            with open(entry.near, "rb", 0) as source:
                source.seek(entry.size // 2)
                found[entry.far] = share_packed(source.read(SAMPLE))
        except OSError:                                # it is told when it is to be sent
            pass
    return {name: share for name, share in found.items() if share < 1}


def shares_there(line, large):
    """The same of results, all in one round trip."""
    found, entries = {}, [entry for entry in large if entry.size >= SAMPLED][:MOST_SAMPLES]
    for entry in entries:
        ask_piece(line.session, entry, entry.size // 2, SAMPLE, False)
    for entry in entries:
        told = line.session.answer()
        if "verdict" not in told:
            sample = line.session.read_exactly(min(told.get("size", 0), SAMPLE))
            found[entry.far] = share_packed(sample)
            line.session.answer()
    return {name: share for name, share in found.items() if share < 1}


def ask_piece(session, entry, at, length, pack):
    """Asks for a piece of a result."""
    session.send("get", name=entry.far, at=at, length=length, size=entry.size, mtime=entry.mtime, pack=pack)


def choose_lanes(line, large, shares):
    """(lanes, piece size in bytes): the first lane goes over the line's own session, each further one over a
    connection of its own, if the line gets enough of these large files to pay for its log-in."""
    near, total = line.near(), sum(entry.size for entry in large)
    most = NEAR_STREAMS if (os.cpu_count() or 1) > 2 else 1
    most = most if near else STREAMS
    # what is packed counts half: packing keeps a lane busy, too
    on_line = sum(entry.size * (shares.get(entry.far, 2) / 2) for entry in large)
    lanes = line.settings.streams or (most if on_line >= BULK else 1)
    piece = max(LEAST_PIECE, total // (lanes * (512 if near else 64)))
    return lanes, min(piece, MOST_PIECE) // PIECE * PIECE          # (what is judged has a sum for each PIECE)


def set_up_lanes(transfer, count):
    """How many lanes there are, and how far each asks ahead. Returns the number of the last one that goes
    over the line's own connection."""
    line, last = transfer.line, 0
    small = sum(one.size for item in transfer.items if isinstance(item, list) for one in item)
    if count == 1 and not line.settings.streams and small > SECOND_SESSION and not line.near():
        count, last = 2, 1                             # no further log-in
    transfer.lanes = count if transfer.items else 0
    if line.near():
        transfer.ahead = NEAR_AHEAD
    elif count > 1:
        transfer.ahead = AHEAD_EACH
    return last


def run_lanes(transfer, count):
    """Runs count lanes until the work is done. LineLost or Stop otherwise."""
    line, threads, last = transfer.line, [], set_up_lanes(transfer, count)

    def run(number):
        lost = None
        try:
            work_lane(transfer, number, number > last)
        except LineLost as error:
            lost = str(error)
        except Declined as error:
            if error.code in ("host", "state"):   # ended there: `start`, or a later line of ours, was quicker
                lost = str(error)
            else:
                transfer.fail(error.stop())
        except ValueError as error:
            transfer.fail(Stop(EX_IOERR, printable("%s: %s" % (line.host, error))))
        except BaseException as error:             # whatever it is: a lane that ends so has not done its work
            transfer.fail(error)
        finally:
            transfer.lane_ended(lost)
    for number in range(1, transfer.lanes):
        threads.append(threading.Thread(target=run, args=(number,), daemon=True))
        threads[-1].start()
    if transfer.lanes:
        run(0)
    for thread in threads:
        thread.join()
    if transfer.error:
        raise transfer.error
    if not transfer.is_done():
        raise LineLost(_("the connection broke off"))


def work_lane(transfer, number, own):
    """One lane: asks ahead, and hears the answers in their order."""
    line, ahead = transfer.line, collections.deque()
    session = line.open_lane(transfer.way, own) if number else line.session
    try:
        while not transfer.error:
            while len(ahead) < transfer.ahead:
                item = transfer.take(wait=not ahead)
                if item is None:
                    break
                ahead.append([item, None])
                ahead[-1][1] = transfer.ask(session, item)
            if not ahead:
                break
            item, sent = ahead[0]
            got = transfer.hear(session, item, sent)
            ahead.popleft()
            if got is None:
                log("warn", None, "sum", file=transfer.title(item), why="the sum is wrong; once more")
                transfer.give_back([item], wrong=True)
            else:
                transfer.done(item, got)
    finally:
        transfer.give_back([item for item, sent in ahead])
        if number:
            session.close()


class Transfer:
    """What is still to be moved; lanes take from it, and give back what a dying lane had not finished."""

    def __init__(self, line, record, items):
        self.items = collections.deque(items)          # bundles (lists), Pieces, Entries to be ended
        self.in_lanes = 0                              # of them, those that a lane has
        self.lanes = 0
        self.ahead = AHEAD_ALONE
        self.record = record
        self.error = None
        self.lost_why = None
        self.is_far = not line.near()
        self.line = line
        self.moved = 0
        self.pieces_left = {}                          # {far name: how many}
        self.tries = {}                                # {id of a piece: how often its sum was wrong}
        self.cond = threading.Condition()
        for item in items:
            if isinstance(item, Piece):
                self.pieces_left[item.entry.far] = self.pieces_left.get(item.entry.far, 0) + 1

    def take(self, wait=True):
        """The next item, or None: there is none (and with wait: none will come back)."""
        with self.cond:
            while not self.error:
                if self.items:
                    self.in_lanes += 1
                    return self.items.popleft()
                if not self.in_lanes or not wait:
                    return None
                self.cond.wait()
            return None

    def done(self, item, sum256):
        """item has arrived, with this sum ("": it does not leave, or has none)."""
        with self.cond:
            self.in_lanes -= 1
            whole = None
            if isinstance(item, Piece):
                self.moved += item.size
                self.pieces_left[item.entry.far] -= 1
                whole = item.entry if not self.pieces_left[item.entry.far] else None
                if sum256:
                    self.record.note_arrived(item.entry, item.offset, item.size, sum256)
            self.cond.notify_all()
        if whole is not None:
            self.complete(whole, item.size)

    def give_back(self, items, wrong=False):
        """items were not done after all."""
        with self.cond:
            self.in_lanes -= len(items)
            self.items.extendleft(reversed(items))
            for item in items if wrong else ():
                self.tries[id(item)] = self.tries.get(id(item), 0) + 1
                if self.tries[id(item)] >= TRIES:
                    self.error = (self.error
                                  or Stop(EX_IOERR,
                                          _("the sum of a piece was wrong %d times: %s")
                                          % (TRIES, self.title(item))))
            self.cond.notify_all()

    def is_done(self):
        """Is all done?"""
        with self.cond:
            return not self.items and not self.in_lanes

    @staticmethod
    def title(item):
        if isinstance(item, list):
            return printable(" ".join(one.far for one in item[:1]))
        return printable(getattr(item, "entry", item).far)

    def fail(self, error):
        if isinstance(error, OSError):
            where = (os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes))
                     else _("on this side"))
            error = Stop(EX_IOERR, printable("%s: %s" % (where, error.strerror or error)))
        with self.cond:
            self.error = self.error or error
            self.cond.notify_all()

    def lane_ended(self, lost=None):
        """A lane ends. With the last one, what is left is lost."""
        with self.cond:
            self.lanes -= 1
            self.lost_why = lost or self.lost_why
            if not self.lanes and (self.items or self.in_lanes):
                self.error = self.error or LineLost(self.lost_why or _("the connection broke off"))
            self.cond.notify_all()


class InputTransfer(Transfer):
    """Inputs on their way there. An Entry by itself among the items: the end (size, mode, time) of a file
    whose pieces have arrived."""
    way = "put"
    zstd = False                                       # have both ends it?

    def ask(self, session, item):
        """Sends the item; what the answer's sums must be."""
        if isinstance(item, list):
            return self.send_bundle(session, item)
        return self.send_piece(session, item) if isinstance(item, Piece) else self.send_end(session, item)

    def hear(self, session, item, sent):
        """The sum, if those that the answer tells are right; else None."""
        told = session.answer("sums")["sums"]
        if told != sent:
            return None
        for entry in item if isinstance(item, list) else ():
            self.record.note_arrived(entry, 0, entry.size)
            self.moved += entry.size
        return sent[0] if isinstance(item, Piece) else ""

    def complete(self, entry, last):
        """All pieces of it are there: its end is ordered, unless it came with the only one."""
        if last != entry.size:
            with self.cond:
                self.items.appendleft(entry)
                self.cond.notify_all()

    def send_bundle(self, session, entries):
        import hashlib
        data, sums = [], []
        for entry in entries:
            data.append(b"" if entry.far.endswith("/") else read_input(entry))
            sums.append("" if entry.far.endswith("/") else hashlib.sha256(data[-1]).hexdigest())
        rows = [[entry.far, entry.size, entry.mode, entry.mtime] for entry in entries]
        session.send("put", {"files": rows, "size": sum(map(len, data))}, data)
        return sums

    def send_piece(self, session, item):
        """One piece of a large file, packed if a sample of it shrinks; its sum is made on the way."""
        import hashlib
        entry, digest, left = item.entry, hashlib.sha256(), item.size
        words = {"name": entry.far, "at": item.offset}
        if left == entry.size:
            words["end"] = [entry.size, entry.mode, entry.mtime]
        with open(entry.near, "rb", 0) as source:
            source.seek(item.offset)
            pack = self.is_far and share_packed(source.read(min(SAMPLE, left))) < 1
            source.seek(item.offset)
            blocks = read_blocks(entry, source, left, session.buffer)
            if pack:
                parts, digest = session.packer.pack(blocks, self.zstd)
                session.send("put", dict(words, size=sum(map(len, parts)), length=left), parts)
                return [digest.hexdigest()]
            session.send("put", dict(words, size=left))
            for data in summed(blocks, digest):
                session.write(data)
        return [digest.hexdigest()]

    @staticmethod
    def send_end(session, entry):
        with open(entry.near, "rb", 0) as source:
            check_unchanged(entry, source)
        session.send("put", name=entry.far, size=0, end=[entry.size, entry.mode, entry.mtime])
        return []


def read_input(entry):
    """The bytes of a small input. Stop 66 if they are not those that were looked at."""
    fd = os.open(entry.near, os.O_RDONLY)              # open() takes five times as long
    try:
        data, info = os.read(fd, entry.size + 1), os.fstat(fd)
    finally:
        os.close(fd)
    if len(data) != entry.size or info.st_mtime_ns != entry.mtime:
        raise Stop(EX_NOINPUT, _("%s: changed while it was sent") % shown(entry.near))
    return data


def read_blocks(entry, source, left, buffer):
    """The next bytes of an open input, block by block: views that are good until the next ones are asked
    for. Stop 66 if they are not those that were looked at."""
    while left:
        data = buffer[:source.readinto(buffer[:left])]
        check_unchanged(entry, source, data)
        left -= len(data)
        yield data


def check_unchanged(entry, source, more=True):
    """Stop 66 if the open input is another one than was looked at."""
    if not more or os.fstat(source.fileno()).st_mtime_ns != entry.mtime:
        raise Stop(EX_NOINPUT, _("%s: changed while it was sent") % shown(entry.near))


class ResultTransfer(Transfer):
    """Results on their way here."""
    way = "get"

    def __init__(self, line, record, items, arrivals):
        Transfer.__init__(self, line, record, items)
        self.arrivals = arrivals
        self.stays = {}                                # {name: code} of those that do not leave any more
        self.stored = set()
        self.pack = {}                                 # {name: how it comes packed}

    def ask(self, session, item):
        """Asks for the item."""
        if isinstance(item, list):
            session.send("get", names=[entry.far for entry in item])
        else:
            ask_piece(session, item.entry, item.offset, item.size, self.pack.get(item.entry.far, False))
        session.flush()

    def hear(self, session, item, _sent):
        """The sum of what came ("" of a bundle, or of what does not leave); None if that is not right."""
        if isinstance(item, Piece):
            return self.receive_piece(session, item)
        left, right = collections.deque(item), True
        while left:
            right = self.receive_bundle(session, left) and right
        return "" if right else None

    def receive_bundle(self, session, left):
        """The next small files of those that are asked for (left: Entries), each under its name if its sum is
        right: are they all? What is told here counts, if it differs from the list."""
        import hashlib
        told, at, right = session.answer("bundle"), 0, True
        rows, size = told["bundle"], told.get("size", 0)
        sizes = sum(row[0] for row in rows if type(row) is list)
        if not 0 < len(rows) <= len(left) or sizes != size or size > BUNDLED_MOST + BLOCK:
            session.line.nonsense()
        data = memoryview(session.read_exactly(size))
        for row in rows:
            entry = left.popleft()
            if type(row) is not list:
                self.stays[entry.far] = row
                continue
            size, mtime, x, sum256 = row
            content, at = data[at:at + size], at + size
            if hashlib.sha256(content).hexdigest() == sum256:
                self.store(entry, content, x, mtime)
                self.moved += size
            else:
                right = False
        return right

    def receive_piece(self, session, item):
        """One piece into its place."""
        import hashlib
        told, digest, at = session.answer(), hashlib.sha256(), item.offset
        if "verdict" not in told:
            fd = os.open(item.entry.near, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                for data in piece_parts(session, told, item.size):
                    digest.update(data)
                    write_sparse(fd, data, at)
                    at += len(data)
            finally:
                os.close(fd)
            told = session.answer()
        if "verdict" in told:
            self.stays[item.entry.far] = told["verdict"]
            return ""
        return digest.hexdigest() if told.get("sum") == digest.hexdigest() else None

    def complete(self, entry, _last):
        """Gives a whole file its size, mode, time and name."""
        if entry.far in self.stays:
            return
        fd = os.open(entry.near, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            os.ftruncate(fd, entry.size)
        finally:
            os.close(fd)
        self.store(entry, None, bool(entry.mode & 0o100), entry.mtime)

    def store(self, entry, data, x, mtime):
        """Puts a whole result into the target, or notes why it cannot be there. data: None, if it has grown
        as a part. 76 if it is not what was signed."""
        if self.arrivals.sums:
            self.check_sum(entry, data)
        if self.arrivals.put(entry.far, self.arrivals.target.store, part_name(entry.far), entry.far, data, x,
                             mtime):
            self.stored.add(entry.far)
            if data is not None:
                self.record.note_arrived(entry, 0, entry.size)


    def check_sum(self, entry, data):
        """76 unless a result is what was signed."""
        with io.BytesIO(data) if data is not None else open(entry.near, "rb", 0) as source:
            found = sum_of(source, 0, entry.size if data is None else len(data))
        if found != self.arrivals.sums.get(entry.far):
            raise Stop(EX_PROTOCOL, _("%s: is not what was signed there") % printable(entry.far))


def piece_parts(session, told, length):
    """The bytes of a piece, unpacked if need be."""
    if told.get("size", 0) > UNPACKED_MOST or "length" not in told and told.get("size", 0) != length:
        session.line.nonsense()
    if "length" not in told:
        yield from session.read_parts(length)
        return
    data = session.packer.unpack(session.read_exactly(told.get("size", 0)), length)
    if data is None:
        session.line.nonsense()
    yield data


def with_part(entry, target):
    """The Entry of a result; near is the part in which a large one grows (a small one comes at once)."""
    if entry.size < SMALL:
        return entry
    return entry._replace(near=target.part_path(part_name(entry.far)))


def part_name(far):
    """Under which name a result grows among the parts: no other's, whatever it is called."""
    import hashlib
    return hashlib.sha256(utf8(far)).hexdigest()[:40].encode()


def share_packed(sample):
    """What the line gets of data like this, as a share: 1 if it is not worth packing."""
    import zlib
    share = len(zlib.compress(sample, 1)) / max(1, len(sample))
    return share if len(sample) > 4096 and share * SHRINKS < 1 else 1


class Progress:
    """Shows how far a transfer is: a line that is rewritten on a terminal, a log line every 10 s
    otherwise."""

    def __init__(self, transfer, word, total):
        self.transfer = transfer
        self.word = word
        self.total = total
        self.over = threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.run, daemon=True)
        if self.total:
            self.thread.start()

    def run(self):
        terminal = sys.stderr.isatty()
        began = time.monotonic()
        while not self.over.wait(0.5 if terminal else 10):
            spent = time.monotonic() - began
            if terminal:
                moved = self.transfer.moved / 1048576.0
                sys.stderr.write("\r%s %.0f / %.0f MiB  %.1f MiB/s "
                                 % (self.word, moved, self.total / 1048576.0, moved / spent))
            else:
                log("info", None, "progress", what=self.word, bytes=self.transfer.moved, of=self.total)
        if terminal and time.monotonic() - began > 0.5:
            sys.stderr.write("\r\x1b[K")

    def __exit__(self, *what):
        self.over.set()
        if self.total:
            self.thread.join()


# ==== the plain way ====
# Where there is no python3: a directory, rsync, the command, rsync, as fielded. Nothing is removed there,
# nothing can be resumed.
PLAIN = DECODE_WORDS + r"""case $3 in /*) b=$3;; "~/"*) b=$HOME/${3#"~/"};; *) b=$HOME/$3;; esac
w=$b/$4
case $2 in
run) cd "$w" || exit
    "${SHELL:-/bin/sh}" -c "$5" </dev/null >remote_program_exec.log 2>&1
    printf '\nmi_distcomp 2 ended %d\n' $?
    exit;;
put) (umask 077; mkdir -p "$w") || exit;;
esac
cd "$w" && shift 4 && exec rsync "$@"
echo mi_distcomp 2 closed >&2
exit 1
"""
CLOSED, CLOSED_WHY = "mi_distcomp 2 closed", "closed or removed by the command; fetch it there"


def run_rsync(runner, word, *words):
    """rsync over the control connection, in the run's directory there (word: put makes it, get): (could it
    bring a part only?, what it says). LineLost."""
    import shlex
    line = runner.line
    shell = " ".join(shlex.quote(word)
                     for word in line.options + ["-S", line.control, "-o", "ControlMaster=no"])
    there = host_command(PLAIN, "2", word, runner.settings.base, runner.ident)
    words = ["rsync", "-t", "--timeout=%d" % (runner.settings.alive * 4), "-e", shell, "--rsync-path=" + there
             ] + runner.settings.rsync_options + list(words)
    try:
        done = subprocess.run([word if isinstance(word, bytes) else utf8(word) for word in words],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              start_new_session=True)
    except FileNotFoundError:
        raise Stop(EX_CONFIG, _("%s: %s; the plain way needs rsync on both sides") % (line.host, line.plain))
    said = done.stdout.decode("utf-8", "backslashreplace")
    text = printable(" / ".join(said.splitlines()[:3])[:500])
    if done.returncode in (23, 24):
        log("error", runner.ident, "rsync", code=done.returncode, said=text)
    if done.returncode in (0, 23, 24) or CLOSED in said:
        return done.returncode != 0, said
    if done.returncode in (12, 127) and line.process.poll() is None:     # the line is there, rsync is not
        raise Stop(EX_CONFIG,
                   _("%s: %s; the plain way needs rsync on both sides") % (line.host, line.plain) + ": "
                   + text)
    raise LineLost("%s: rsync: %s" % (line.host, text))


def plain_put(runner, entries):
    """3. and 4. Inputs there. Returns their bytes. 65 if rsync could send a part only."""
    line = runner.line
    if runner.order.get("batch"):
        raise Stop(EX_CONFIG, _("%s: %s: a batch system there needs it") % (line.host, line.plain))
    log("warn", runner.ident, "2 connect", host=line.host, why=line.plain,
        way="plain: rsync; nothing is removed there or can be resumed")
    folder = os.path.join(line.folder, b"inputs", b"")
    for entry in entries:                            # a list of our own: rsync goes round in circles of links
        path = os.path.join(folder, utf8(entry.far))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(entry.near, path) if not entry.far.endswith("/") else None
    os.makedirs(folder, exist_ok=True)
    if run_rsync(runner, "put", "-rpLS", "--chmod=ug-s,o-t", "--", folder, line.host + ":./")[0]:
        raise Stop(EX_NOINPUT, _("%s: not all inputs could be sent (rsync says why)") % line.host)
    return sum(entry.size for entry in entries)


def plain_run(runner):
    """5. and 6. The command; the state in which it ended. 69 if the line is lost: nobody knows how it
    ends."""
    line = runner.line
    if line is not runner.inputs_line:
        raise Stop(EX_UNAVAILABLE,
                   _("%s: the line was lost, and by the plain way nobody can know how the command ended; its"
                     " directory there is %s/%s") % (line.host, runner.settings.base, runner.ident))
    process = line.start_session(host_command(PLAIN, "2", "run", runner.settings.base, runner.ident,
                                              runner.order["command"]))
    runner.record.note_step("started")
    log("info", runner.ident, "5 start", state="running")
    fault("started")
    found = None
    for row in iter(lambda: process.stdout.readline(LOGIN_LINE), b""):
        found = re.search(re.escape(GREETING) + rb"ended (1?[0-9]{1,2}|2[0-4][0-9]|25[0-5])\n", row) or found
    line.end_session(process)
    if not found:
        line.close()
        runner.inputs_line = None
        raise LineLost(_("%s: the connection broke off") % line.host)
    return "ended %d" % int(found.group(1))


def plain_get(runner, arrivals):
    """7. and 8. Everything that is there: (how many files, Verdicts). It is judged here, as the door there
    would; what rsync could not bring, its own words tell."""
    folder = arrivals.target.part_path(b"all")
    rules = default_values(INI_KEYS["outbound"])
    partly, said = run_rsync(runner, "get", "-rlIS", "--no-p", "--chmod=ugo=rwX", "--",
                             runner.line.host + ":./", folder + b"/")
    if CLOSED in said:
        found = Verdicts()
        found.add("unreadable", "%s/%s: %s" % (runner.settings.base, runner.ident, CLOSED_WHY))
        return 0, found
    stays = verdicts_of_rsync(said, runner.ident)
    sent, found = runner.record.sent_inputs(), UnreadCollector(dict(rules, max_files=MOST_FILES),
                                                               lambda *words: None)
    tree = ResultTree(folder)
    try:
        for name, _real, _info, why in tree.walk():
            if why is not None and why.code == "missing":                # a link to one of them?
                to = os.path.join(os.path.dirname(name), os.readlink(os.path.join(folder, name)))
                stays[shown(name)] = stays.get(shown(os.path.normpath(to)), "missing")
        untouched = [name for name in sent if is_as_sent(os.path.join(folder, utf8(name)), sent[name])]
        found.take_matching(tree, EVERYTHING, untouched + [name.rstrip("/") + "/" for name in stays])
    finally:
        tree.close()
    for name, code in stays.items():
        found.verdicts.add(code, name)
    found.verdicts.pop("missing", None)
    if partly and "unreadable" not in found.verdicts:
        found.verdicts.add("unreadable")
    for one in found.in_order().folders:
        arrivals.put(one.name, arrivals.target.make_directory, one.name[:-1], one.mtime)
    stored = 0
    # what links lead to moves last
    for one in sorted(found.found, key=lambda one: utf8(one.name) == one.source):
        stored += arrivals.put(one.name, plain_store, arrivals.target, folder, one)
    return stored, found.verdicts


def verdicts_of_rsync(said, ident):
    """{name: verdict} of what rsync says that it left there."""
    stays = {name: "special" for name in re.findall('skipping non-regular file "(.*)"\n', said)}
    denied = re.findall('"[^"\n]*/%s/([^"\n]*)"[^\n]*: Permission denied' % ident, said)
    return dict(stays, **dict.fromkeys(denied, "unreadable"))


def plain_store(target, folder, one):
    """A result that rsync has brought gets its name; a copy of it, where a link leads to it."""
    key = b"all/" + one.source
    if utf8(one.name) != one.source:
        import shutil
        key = part_name(one.name)
        shutil.copy(os.path.join(folder, one.source), target.part_path(key))
    target.store(key, one.name, None, one.executable, one.mtime)


def is_as_sent(path, entry):
    """Is what came back of an input what was sent? (Where it was changed here meanwhile, size and time
    tell.)"""
    try:
        info, here = os.lstat(path), os.stat(entry.near)
    except OSError:
        return False
    if ((info.st_size, info.st_mtime_ns // 10 ** 9) != (entry.size, entry.mtime // 10 ** 9)
            or not stat.S_ISREG(info.st_mode)):
        return False
    if bool(info.st_mode & 0o100) != bool(entry.mode & 0o100):
        return False
    if here.st_mtime_ns != entry.mtime:
        return True
    with open(path, "rb", 0) as came_back, open(entry.near, "rb", 0) as went:
        return sum_of(came_back, 0, entry.size) == sum_of(went, 0, entry.size)


# ==== command line ====
def settings_of_options(options):
    """Settings from the ini ([ssh]) and the command line's options."""
    values = read_ini(find_ini(options.get("ini"), ini_folders(__file__)), INI_KEYS)["ssh"]
    choose_language(values["lang"])
    for key in ("streams", "retry", "base", "ssh_options"):
        if options.get(key) is not None:
            try:
                values[key] = INI_KEYS["ssh"][key][0](options[key])
            except ValueError as error:
                raise Stop(EX_USAGE, "%s %s: %s" % (key, printable(options[key]), error))
    return Settings(*[values[key] for key in Settings._fields])


def cmd_fielded(options):
    """client_name:HOST client_cmd:CMD client_files:A,B,C [retry:COUNT,INTERVAL]; values may hold ':'. Returns
    the exit code."""
    given = {"ini": options.ini}
    for word in options.words:
        key, colon, value = word.partition(":")
        if key not in ("client_name", "client_cmd", "client_files", "retry", "streams", "base") or not colon:
            raise Stop(EX_USAGE,
                       _("%s: expected client_name:HOST client_cmd:COMMAND client_files:A,B,C")
                       % printable(word))
        given[key] = value
    if not given.get("client_name"):
        raise Stop(EX_USAGE, _("client_name:HOST is missing"))
    if not given.get("client_cmd"):
        raise Stop(EX_USAGE, _("client_cmd:COMMAND is missing"))
    files = [path for name in given.get("client_files", "").split(",") for path in fielded_files(name)]
    files = list(dict.fromkeys(files))
    outcome = run_calculation(given["client_name"], given["client_cmd"], files, ".",
                              settings_of_options(given), "fielded", keep=True)
    return say_outcome(outcome, options.json)


def fielded_files(name):
    """The paths that one name of client_files: stands for, as a shell and rsync took it: blanks around it, ~,
    wildcards, DIR/ (what is in it)."""
    import glob
    path = utf8(name) if os.path.lexists(utf8(name)) else os.path.expanduser(utf8(name.strip()))
    found = sorted(glob.glob(path)) if path and not os.path.lexists(path) else []
    paths = []
    for one in found or [path] if path else []:
        inside = one.endswith(b"/") and os.path.isdir(one)
        paths += [os.path.join(one, leaf) for leaf in sorted(os.listdir(one))] if inside else [one]
    return [one.decode("utf-8", "surrogateescape") for one in paths]


def say_outcome(outcome, as_json):
    """The last lines of a run, and its exit code."""
    if outcome.verdicts:
        words = "; ".join(verdict_words(*pair) for pair in sorted(outcome.verdicts.items()))
        log("warn", outcome.ident, "8 fetch", not_here=words) if as_json else show(
            _("asked for and not here: %s") % words + "\n")
    if as_json:
        show(json_of(outcome._asdict()) + "\n")
    else:
        show(_("%s: %s, exit code %d (the %s's)")
             % (outcome.ident, printable(outcome.state), outcome.code, outcome.ended_by) + "\n")
    return outcome.code


def verdict_words(code, entry):
    """One verdict for people: its code, how many, the first names."""
    names = entry["names"][:3] + ["..."] * (entry["count"] > 3 and len(entry["names"]) > 0)
    return "%s %d" % (code, entry["count"]) + (" (%s)" % ", ".join(name[:200] for name in names) if names
                                               else "")


def show(text):
    """text to stdout, now. Who does not read it any more (head -1), or has no room for it, stops no
    calculation: it goes nowhere then."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def parse(words):
    """The command line as options. 64."""
    options = read_line(words or ["--help"])
    options.fielded = any(re.match("client_(name|cmd|files):", word) for word in options.words)
    if options.help or options.version:
        return options
    if not options.fielded:
        take_word(options)
    elif set(options.given) - set(EVERY):
        raise Stop(EX_USAGE, _("%s: expected client_name:HOST client_cmd:COMMAND client_files:A,B,C")
                   % (set(options.given) - set(EVERY)).pop())
    return options


def settings_of_record(record):
    """The settings that a calculation was ordered with."""
    return Settings(**{key: record.order["settings"][key] for key in Settings._fields})


def whole_id(word):
    """The calculation of that beginning of a UUID (8 characters at least), or the word itself. 64 if there
    are several."""
    found = ([ident for ident in record_names() if ident.startswith(word)]
             if re.match("[0-9a-f-]{8,36}\\Z", word) else [])
    if len(found) > 1:
        raise Stop(EX_USAGE, _("%s: which one? %s") % (printable(word), " ".join(found[:10])))
    return found[0] if found else word


def cmd_resume(options):
    """Goes on where the journal says that the runner stopped."""
    record = Record(whole_id(options.uuid))
    settings = settings_of_record(record)
    if options.retry:
        settings = settings._replace(retry=settings_of_options(vars(options)).retry)
    if options.to:                                  # a directory that was said: what is there may be replaced
        if "cleaned" in record.steps:
            raise Stop(EX_REFUSED,
                       _("%s: its results were fetched, and its directory there is gone") % options.uuid)
        record.order.update(into=os.path.abspath(options.to), began=None)
        for step in ("fetched", "finished"):
            record.steps.pop(step, None)
    runner = Runner(record, settings)
    if "finished" in record.steps:
        return say_outcome(runner.outcome(), options.json)
    return say_outcome(runner.carry_out(), options.json)


def record_names():
    """All calculations of this side."""
    return sorted(name.decode()
                  for name in os.listdir(state_folder()) if re.match(rb"[0-9a-f]{8}-[0-9a-f-]{27}\Z", name))


def records():
    """Their Records. One that cannot be read is named and left out: it does not stand in the way of the
    others."""
    for ident in record_names():
        try:
            yield Record(ident, lock=False)
        except Stop as stop:
            sys.stderr.write("%s: %s\n" % (PROGRAM, printable(stop)))


def cmd_list(options):
    """This side's records, or what a host says."""
    rows = []
    if options.host:
        rows = [dict(zip(("uuid", "state"), row))
                for row in ask_host(Line(options.host, settings_of_options(vars(options))), None, runs_there)]
    else:
        for record in records():
            ident, order, last = record.ident, record.order, record.last_step()
            rows.append({"uuid": ident, "state": last["step"], "host": order["host"],
                         "command": order["command"],
                         "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(last["t"])),
                         "code": last.get("code", "")})
    for row in rows:
        text = json_of(row) if options.json else " ".join(printable(value) for value in row.values())
        sys.stdout.write(text + "\n")
    return 0


def runs_there(session):
    """[(UUID, state)] of the runs of a host."""
    rows, after, most = [], "", 0
    while after is not None:
        told, most = session.ask("list", after=after).answer("runs", "more"), most + 1000
        before, after = after, told["more"]
        backwards = after is not None and after <= before
        if type(told["runs"]) is not list or backwards or most > MOST_FILES + 1000:
            session.line.nonsense()
        for ident, state, since, why, code in told["runs"]:
            rows.append((printable(ident), state_words({"state": state, "code": code, "why": why})))
    return rows


def ask_host(line, ident, deed):
    """deed(session), over this line, for the run; what it returns."""
    try:
        line.open(ident)
        if line.plain:
            raise Stop(EX_CONFIG, "%s: %s" % (line.host, printable(line.plain)))
        return deed(line.session)
    except (LineLost, Declined) as error:
        raise error.stop()
    finally:
        line.close()


def ask_about(record, verb, **words):
    """What the door there answers to one request about a calculation."""
    def deed(session):
        try:
            return session.ask(verb, **words).answer("state")
        except Declined as error:
            if error.code not in ("gone", "state"):
                raise
            return {"state": error.state, "why": ""}
    return ask_host(Line(record.order["host"], settings_of_record(record)), record.ident, deed)


def cmd_cancel(options):
    """Ends the command; who waits for it (or resumes) gets its log and files."""
    record = Record(whole_id(options.uuid), lock=False)                    # beside a runner that waits
    ident = record.ident
    open(os.path.join(record.folder, b"cancelled"), "ab").close()        # the runner's last line says so
    told = ask_about(record, "cancel", grace=options.grace)
    if told["state"] in ("none", "taken"):
        raise Stop(EX_TEMPFAIL, _("%s: the command was not started yet; end its runner instead") % ident)
    sys.stdout.write("%s: %s\n" % (ident, state_words(told)))
    return 0 if told["state"] in ("ended", "lost", "fetched", "gone") else EX_TEMPFAIL


def state_words(told):
    """STATE of the protocol, for people."""
    code = told.get("code")
    words = [told["state"], "" if code is None else str(code), told.get("where", ""),
             told.get("why", "")] + told.get("left", [])
    return printable(" ".join(filter(None, words)))


def cmd_clean(options):
    """Removes ended calculations: there and here."""
    chosen = [whole_id(word) for word in options.uuid]
    if options.older is not None:
        limit = time.time() - options.older
        chosen += [record.ident for record in records() if record.last_step()["t"] < limit]
    code = 0
    for ident in chosen:
        try:
            record = Record(ident)
            there = "sending" in record.steps and "cleaned" not in record.steps
            told = ask_about(record, "clean", discard=True) if there else {"state": "gone"}
            state = "cleaned" if told["state"] in ("gone", "none") else state_words(told)
            if state == "cleaned":
                drop_left_parts(utf8(record.order["into"]), ident)
        except Stop as stop:                           # the others can be cleaned all the same
            state, code = str(stop).replace(printable(ident) + ": ", "", 1), stop.code
        else:
            if state == "cleaned":
                record.remove()
            else:
                code = EX_TEMPFAIL
        sys.stdout.write("%s: %s\n" % (printable(ident), printable(state)))
    return code


def cmd_check(options):
    """Looks at things as they are. With HOST: from this side; without: as the external computer's guard. 0,
    or 78 if there is a fault."""
    if options.host:
        findings = check_host(options)
    elif options.upgrade:
        findings = check_upgrade(options)
    else:
        findings = check_guard(options)
    words = {True: "OK", None: "WARN", False: "FAIL"}
    if options.json:
        sys.stdout.write(json.dumps([{"level": words[good], "text": printable(text)}
                                     for good, text in findings], ensure_ascii=False) + "\n")
    for good, text in findings if not options.json else ():
        sys.stdout.write("%-5s %s\n" % (words[good], printable(text)))
    return EX_CONFIG if any(good is False for good, text in findings) else 0


def check_host(options):
    """What a run to this host would meet."""
    import shutil
    line, rows = Line(options.host, settings_of_options(vars(options))), []
    told = line.ssh_config()
    rows.append((True,
                 _("ssh goes to %s@%s port %s%s")
                 % (told.get("user"), told.get("hostname"), told.get("port"),
                    "".join(" %s=%s" % (key, told[key])
                            for key in ("proxyjump", "proxycommand") if key in told))))
    if told.get("stricthostkeychecking") in ("false", "no", "off"):
        rows.append((None, _("~/.ssh/config switches the check of host keys off; it is made all the same")))
    try:
        began = time.monotonic()
        facts = line.open(check=True).told
        rows.append((True,
                     _("log-in in %.2f s, round trip %.1f ms")
                     % (time.monotonic() - began, line.round_trip * 1000)))
        if line.plain:
            rows.append((None, _("%s there: files go by rsync, nothing can be resumed (rsync here: %s)") % (
                line.plain, shutil.which("rsync") or _("no"))))
            return rows
        rows.append((True,
                     _("guard there") if line.door == "guard"
                     else _("no guard there: this key may run anything")))
        rows.append((True,
                     _("python %s there, AES: %s")
                     % (facts.get("python", "?"), _("yes") if facts.get("aes") else _("no"))))
        if facts.get("kill"):
            rows.append((False,
                         _("systemd there ends everything at log-out: ask for loginctl enable-linger")))
        rows.append((facts["free"] > 1 << 30, _("free there: %.1f GB") % (facts["free"] / 1e9)))
        rows.append((True, _("calculations there: %s") % facts.get("runs", "?")))
    except (LineLost, Stop, OSError) as error:
        rows.append((False, str(error)))
    finally:
        line.close()
    return rows


def check_guard(options):
    """The external computer's side: rules, directories, key lines."""
    keys = os.path.expanduser("~/.ssh/authorized_keys")
    lines_there = key_lines_in(keys)
    elsewhere = "" if lines_there else _("; on the workflow system's side say: check HOST")
    try:
        rules = guard_rules(options)
    except Stop as stop:
        return [(False, str(stop) + elsewhere)]
    rows, commands = [(True, _("the guard's rules: %s") % rules["ini"])], list(rules["commands"].values())
    untouched = rules["ssh guard"] == default_values(INI_KEYS["ssh guard"])
    if untouched and not commands and not lines_there:
        return [(False, _("no guard is here: %s has no [command NAME], %s no key line") % (rules["ini"], keys)
                 + elsewhere)]
    names = ", ".join("command " + command["name"] for command in commands)
    rows.append((bool(commands),
                 _("commands allowed: %s") % (names or _("none: add sections [command NAME] with argv ="))))
    for command in commands:
        key, text = unfit(command) or ("argv", command["argv"][0])
        rows.append((unfit(command) is None, "[command %s] %s: %s" % (command["name"], key, text)))
    script = utf8(os.path.abspath(__file__))
    own = os.stat(script).st_mode & 0o022 and _("%s: others may write to it") % shown(script)
    for path, why in (script, own), (rules["base"], open_to_others(rules["base"])):
        rows.append((not why, why or _("%s: nobody else may write to it") % shown(path)))
    rows.append(finding_of_audit(guard_audit(rules)))
    rows.append((True if lines_there else None,
                 _("%s: %d key lines with this guard") % (keys, len(lines_there))))
    for row in lines_there:
        rows.append((row.startswith("restrict,"), _("key line begins with restrict: %s...") % row[:40]))
    return rows


def key_lines_in(path):
    """The lines of an authorized_keys that lead to this program."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as text:
        return [row for row in text if PROGRAM in row and not row.startswith("#")]


def check_upgrade(options):
    """Rows about what another version of this program has left: this side's records, and the runs in the
    guard's base."""
    rows, older = [], 0
    for ident in record_names():
        try:
            record = Record(ident, lock=False)
            older += "finished" not in record.steps and record.order.get("v", 1) < ON_DISK
        except Stop as stop:
            rows.append((None, str(stop)))
    if older:
        rows.append((True,
                     _("%s: %d unfinished calculations of an older version go on (resume), where the far"
                       " side is of this version, too") % (shown(state_folder()), older)))
    if find_ini(options.ini, ini_folders(__file__)[:1]):
        rows += older_runs(guard_rules(options)["base"])
    return rows or [(True, _("%s: nothing unfinished of another version") % shown(state_folder()))]


def older_runs(base):
    """A row about the runs below a guard's base (bytes) that an older version has started."""
    folder, older = os.path.join(base, b".mi"), 0
    for name in run_names(base) if os.path.isdir(folder) else ():
        control = os.path.join(folder, utf8(name))
        there = os.listdir(control) if os.path.isdir(control) else ()
        older += bool(there) and b"journal" not in there
    if not older:
        return [(True, _("%s: nothing unfinished of another version") % shown(base))]
    return [(True,
             _("%s: %d calculations of an older version go on; only a runner of this version can fetch them")
             % (shown(base), older))]


def cmd_run(options):
    """One calculation from its first step to its last."""
    inputs = [name for group in options.inputs for name in group]
    settings = settings_of_options(vars(options))
    batch = [options.batch] + options.batch_option if options.batch else None
    return say_outcome(run_calculation(options.host, options.cmd, inputs, options.to or ".", settings, "run",
                                       options.keep, batch, options.allow_refused, options.sign_key,
                                       options.require_signed_by), options.json)


def on_sigterm(number, frame):
    """SIGTERM and SIGHUP end the runner as Ctrl+C does, with 75; what runs there runs on. A second one must
    not disturb what follows the first."""
    signal.signal(number, lambda number, frame: None)
    exit_after(EX_TEMPFAIL, LEAVE)
    raise KeyboardInterrupt(EX_TEMPFAIL)


def main(argv=None):
    """The program. Returns the exit code."""
    words = arguments(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_sigterm)
    if not sys.stderr.isatty():
        SAY["log"] = sys.stdout       # who reads stdout to its end first must not be blocked by a full stderr
    options = parse(words)
    if about_itself(options):
        return 0
    find_ini(options.ini, ())          # also for words that do not read it: a wrong name is never passed over
    SAY["level"] = (2 if options.quiet else 1) * (not options.verbose)
    SAY["debug"] = bool(options.verbose)
    try:
        return cmd_fielded(options) if options.fielded else SUBCOMMANDS[options.word][0](options)
    except KeyboardInterrupt as told:
        raise Stop(told.args[0] if told.args else EX_INTERRUPT, _("interrupted"))


# ==== shared: usage ====
# A command line: a word, what stands behind it, and options, which may stand before and behind all words. Two
# tables of the script say what it takes; --help is made of the same two.
# SUBCOMMANDS {word: (function, what stands behind it, what it does, an example, its options)}
# OPTIONS {option: what argparse is told of it}; those that every word has:
EVERY = {
    "--ini": dict(metavar="FILE", help="the configuration file, instead of the one that is found"),
    "--json": dict(action="store_true", help="what is found, as JSON"),
    "-q": dict(action="store_true", dest="quiet", help="failures only"),
    "-v": dict(action="count", dest="verbose", default=0, help="a log line for each step"),
    "--version": dict(action="store_true", help="version, protocol, sha256 of this file and of its blocks"),
    "--help -h": dict(action="store_true", help="what a word does, and an example")}


# what argparse itself says of an option
ARGPARSE = ("argument %(argument_name)s: %(message)s", "expected one argument",
            "expected at least one argument", "invalid choice: %(value)r (choose from %(choices)s)",
            "ignored explicit argument %r")


def read_line(argv):
    """The command line as a Namespace: `words`, the value of each option, and `given`, the options that stand
    there. 64 for an option that is not known, or whose value is missing or wrong."""
    known = dict(EVERY, **OPTIONS)
    # in Python 3.6 who takes no abbreviations takes no -vv either
    argv = [part for word in argv
            for part in (["-v"] * (len(word) - 1) if re.match("-vv+\\Z", word) else [word])]
    found, more = parser_of(known).parse_known_args(argv)
    for word in more[:more.index("--") if "--" in more else None]:
        if word.startswith("-"):
            raise Stop(EX_USAGE, _("unknown option %s%s; --help says more") % (
                printable(word), did_you_mean(word.partition("=")[0], " ".join(known).split())))
    found.words += [word for word in more if word != "--"]
    found.given = [names for names, how in known.items() if hasattr(found, attribute_of(names, how))]
    for names, how in known.items():
        if names not in found.given:
            setattr(found, attribute_of(names, how), how.get("default", False if "action" in how else None))
    return found


def attribute_of(names, how):
    """The attribute that holds an option's value."""
    return how.get("dest") or names.split()[0].strip("-").replace("-", "_")


def parser_of(known):
    """argparse's parser for these options, whatever the word."""
    import argparse
    argparse._ = lambda text: _(text) if text in ARGPARSE else text      # where it looks for its translations

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            if _("expected one argument") in message:
                message += _(" (a value that begins with - is written with =, as in"
                             " %s=--fine)") % message.split()[1][:-1]
            raise Stop(EX_USAGE, _("%s; --help says more") % message)

    def told(kind):
        """kind, with what is wrong told as argparse passes it on."""
        def read(text):
            try:
                return kind(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error))
        return read

    # a width that is given need not be looked for: that would load much
    parser = Parser(prog=PROGRAM + ".py", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100))
    parser.add_argument("words", nargs="*", default=[])
    for names, how in known.items():
        how = dict(how, default=argparse.SUPPRESS)
        if "type" in how:
            how["type"] = told(how["type"])
        parser.add_argument(*names.split(), **how)
    return parser


def take_word(line):
    """Sets line.word, and of what stands behind it attributes named as in SUBCOMMANDS (ACCEPT_ID: accept_id;
    a list where several may stand there). 64 for a word that is none, too much or too little behind it,
    options of other words."""
    named = [word for word in (" ".join(line.words[:2]), " ".join(line.words[:1])) if word in SUBCOMMANDS]
    if not named:
        hint = did_you_mean(" ".join(line.words[:1]), SUBCOMMANDS) if line.words else ""
        raise Stop(EX_USAGE, _("one of these words must come first: %s%s; --help says more")
                   % (", ".join(SUBCOMMANDS), hint))
    line.word = named[0]
    options = SUBCOMMANDS[line.word][4].split()
    rest = take_behind(line, SUBCOMMANDS[line.word][1].split(), line.words[len(line.word.split()):])
    if rest:
        raise Stop(EX_USAGE, _("what is %s? It must be: %s; --help says more")
                   % (printable(" ".join(rest))[:200], usage_of(line.word)))
    for names in line.given:
        if names not in EVERY and names.split()[0] not in options:
            raise Stop(EX_USAGE, _("%s is no option of %s; it must be: %s; --help says more")
                       % (names, line.word, usage_of(line.word)))


def take_behind(line, behind, rest):
    """Sets the attributes of what stands behind a word; what is left of rest. 64 if that is too little."""
    if len(rest) < len([part for part in behind if "[" not in part]):
        raise Stop(EX_USAGE, _("%s needs %s; --help says more") % (line.word, _(" and ").join(behind)))
    for part in behind:
        several = "..." in part
        value = rest if several else "".join(rest[:1])
        setattr(line, part.strip("[].").lower(), value)
        rest = [] if several else rest[1:]
    return rest


def usage_of(word):
    """WORD WHAT STANDS BEHIND IT [OPTION]..."""
    options = ["[%s]" % shape_of(name, OPTIONS[name]) for name in SUBCOMMANDS[word][4].split()]
    return " ".join([PROGRAM + ".py", word] + SUBCOMMANDS[word][1].split() + options)


def shape_of(names, how):
    """An option as it is typed."""
    takes = "" if "action" in how and "metavar" not in how else how.get("metavar") or "|".join(how["choices"])
    return names.split()[0] + (takes and " " + takes) + ("..." if how.get("nargs") == "+" else "")


def about_itself(line):
    """--help and --version, printed. Is it that what was asked for?"""
    if line.help:
        print(help_text(line.words))
    elif line.version:
        print_version()
    return line.help or line.version


def help_text(words):
    """The page of the word that stands first; of all words in Japanese, where none does; else the docstring
    as far as it is for users."""
    asked = [word for word in SUBCOMMANDS if words and words[0] in (word, word.split()[0])]
    asked = [word for word in asked if word == " ".join(words[:2])] or asked
    if not asked and SAY["lang"] != "ja":
        return __doc__.partition("\ncontents")[0].strip()
    pages = [page_of_word(word) for word in asked or SUBCOMMANDS]
    return "\n\n".join(pages + [_("for every word:") + "\n" + lines_of(EVERY)])


def page_of_word(word):
    """What --help says of a word."""
    text, example, names = SUBCOMMANDS[word][2:]
    parts = ["usage: " + usage_of(word), _(text)]
    parts += [lines_of({name: OPTIONS[name] for name in names.split()})] if names else []
    return "\n\n".join(parts + ["%s %s.py %s" % (_("example:"), PROGRAM, example)])


def lines_of(options):
    """A line for each of the options: as it is typed, what it is."""
    return "\n".join("  %-22s %s" % (shape_of(names, how), _(how["help"])) for names, how in options.items())


def print_version():
    """Program, version, protocols and the sum of this file; then of each shared block its lines and its sum,
    as `sed -n FIRST,LASTp FILE | sha256sum` has it: who has read a block once need not read it again."""
    import hashlib
    with open(os.path.abspath(__file__), "rb") as text:
        whole = text.read()
    print("%s %s protocol 2 (1) sha256 %s" % (PROGRAM, VERSION, hashlib.sha256(whole).hexdigest()))
    for found in re.finditer(b"^# ==== shared: (.*) ====\n(?:.*\n)*?# ==== end .*\n", whole, re.M):
        first = whole.count(b"\n", 0, found.start()) + 1
        print("  %-6s lines %4d to %4d sha256 %s" % (
            found.group(1).decode(), first, first + found.group().count(b"\n") - 1,
            hashlib.sha256(found.group()).hexdigest()))
# ==== end shared ====


# ==== shared: say ====
# How every script of the suite speaks: one line per failure, one line per step, nothing from the wire
# unescaped.
EX_USAGE, EX_DATA, EX_NOINPUT, EX_UNAVAILABLE, EX_BUG, EX_IOERR = 64, 65, 66, 69, 70, 74
EX_TEMPFAIL, EX_PROTOCOL, EX_REFUSED, EX_CONFIG, EX_INTERRUPT = 75, 76, 77, 78, 130
LEVELS = ("debug", "info", "warn", "error")
SAY = {"lang": "en", "level": 1, "log": None, "debug": False, "lock": threading.Lock()}
CONTROL_CHARS = "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"


class Stop(Exception):
    """Ends the program: an exit code of the table and one line (who, where, what, what to do)."""

    def __init__(self, code, text):
        Exception.__init__(self, text)
        self.code = code


def _(text):
    """text in the reader's language, from this file's table JA."""
    return JA.get(text, text) if SAY["lang"] == "ja" else text


def choose_language(lang="auto"):
    """lang: en, ja, or auto (the locale's)."""
    if lang == "auto":
        lang = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    SAY["lang"] = "ja" if lang[:2] == "ja" else "en"


def printable(text):
    """text with control, direction and surrogate characters made visible: it can neither steer a terminal nor
    start a log line."""
    text = str(text)
    if not has_control_chars(text):
        return text
    return re.sub(CONTROL_CHARS, lambda m: ("\\x%02x" if m.group() < "\xff" else "\\u%04x") % ord(m.group()),
                  text)


def shown(path):
    """A name or path in bytes, for people."""
    return printable(path.decode("utf-8", "replace"))


def has_control_chars(text):
    """Has text control, direction or surrogate characters? Of most texts Python knows at once that they have
    none: to compile the expression takes milliseconds of every start."""
    return not text.isprintable() and re.search(CONTROL_CHARS, text) is not None


def json_of(found, **how):
    """found as JSON for whoever reads stdout: a program, or a person at a terminal, which control and
    direction characters would steer."""
    return re.sub(CONTROL_CHARS, lambda m: m.group() if m.group() < " " else "\\u%04x" % ord(m.group()),
                  json.dumps(found, ensure_ascii=False, **how))


def iso_time(now):
    """A time (seconds since the epoch) as ISO 8601: local, with its zone."""
    zone = time.strftime("%z", time.localtime(now))
    return "%s.%03d%s:%s" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)), now % 1 * 1000,
                             zone[:3], zone[3:])


def log(level, accept_id, step, **values):
    """One line: time LEVEL ACCEPT_ID step key=value ...; values are escaped, and quoted as JSON when they
    hold blanks."""
    if LEVELS.index(level) < SAY["level"]:
        return
    words = []
    for key, value in values.items():
        value = printable(value)
        words.append("%s=%s"
                     % (key,
                        json.dumps(value, ensure_ascii=False) if re.search(r'[\s"]|^$', value) else value))
    if "JOURNAL_STREAM" in os.environ and SAY["log"] is None:
        stamp = "<%d>" % {"debug": 7, "info": 6, "warn": 4, "error": 3}[level]
    else:
        stamp = iso_time(time.time())
    line = " ".join([stamp, level.upper(), accept_id or "-", step] + words) + "\n"
    with SAY["lock"]:
        try:
            out = SAY["log"] or sys.stderr
            out.write(line)
            out.flush()
        except (OSError, ValueError):
            pass                                       # a log that cannot be written must not stop the work


def log_into(path):
    """Log lines go to the end of that file from now on, which is opened anew (logrotate renames it). OSError:
    all stays as it was. '': nothing."""
    new = open(utf8(path), "a", encoding="utf-8", errors="backslashreplace") if path else None
    with SAY["lock"]:
        old, SAY["log"] = SAY["log"], new or SAY["log"]
    if new and old:
        old.close()


def fault(name):
    """A named point of the way. Nothing happens here: the crash tests start the program with a death in this
    function's place."""


def utf8(text):
    """text (a name, a path) as bytes for the file system: Python 3.6 under LANG=C knows ASCII only."""
    return text.encode("utf-8", "surrogateescape")


def arguments(argv=None):
    """The command line as text, also under LANG=C on Python 3.6. 64 if a word is not UTF-8."""
    try:
        return [os.fsencode(word).decode("utf-8") for word in (sys.argv[1:] if argv is None else argv)]
    except UnicodeDecodeError:
        raise Stop(EX_USAGE, _("an argument is not UTF-8"))


def utf8_stdio():
    """stdout and stderr in UTF-8 whatever the locale says; a character that cannot be shown never raises.
    What was closed reads, or swallows, nothing: stand_alone() has opened its descriptor."""
    sys.stdin = sys.stdin or open(0, encoding="utf-8")
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(number, "w")
        if hasattr(stream, "detach"):
            setattr(sys, name,
                    io.TextIOWrapper(stream.detach(), "utf-8", "backslashreplace", line_buffering=True))


def exit_after(code, seconds):
    """Ends the program with that code after so many seconds, should the way out of it hang: nobody reads what
    it writes, a disk does not answer. For signal handlers: no lock is taken."""
    def end():
        time.sleep(seconds)
        os._exit(code)
    _thread.start_new_thread(end, ())


def failure_of(error):
    """(exit code, line) of what has ended the program."""
    if isinstance(error, Stop):
        return error.code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EX_INTERRUPT, _("interrupted")
    if isinstance(error, BrokenPipeError):
        return EX_IOERR, ""
    if isinstance(error, OSError):
        name = ": %s" % os.fsdecode(error.filename) if error.filename else ""
        return EX_IOERR, "%s%s" % (error.strerror or error, name)
    place = error.__traceback__                        # a bug of ours; say where, so that it can be reported
    while place.tb_next:
        place = place.tb_next
    return EX_BUG, _("a bug (%s in line %d: %s); please report this line, -v shows more") % (
        type(error).__name__, place.tb_lineno, error)


def run_as_program(main):
    """Runs main() and exits with its code; a failure is one line on stderr and a code, never a traceback
    (unless asked: -v)."""
    import gc
    try:
        # what was made so far stays: it need not be looked at again
        gc.freeze() if hasattr(gc, "freeze") else None
        gc.enable()
        utf8_stdio()
        # no program from where it is started: results arrive there
        places = [place for place in os.environ.get("PATH", "").split(":") if place[:1] == "/"]
        os.environ["PATH"] = ":".join(places) or "/usr/local/bin:/usr/bin:/bin"
        choose_language()
        code, text = main() or 0, ""
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code, text = failure_of(error)
        if SAY["debug"] and code == EX_BUG and not isinstance(error, Stop):
            raise
    try:
        if text:
            sys.stderr.write("%s: %s\n" % (PROGRAM, printable(text)))
        sys.stderr.flush()
        sys.stdout.flush()
    except (OSError, ValueError):
        pass
    os._exit(code)                                     # no thread of ours has anything left to say
# ==== end shared ====


# ==== shared: ini ====
# One strict ini for the suite. A table says which keys a section has: {section: {key: (kind, default, ...)}}.
INI_NAME = "mi_distributed_computing_assist.ini"
SECTIONS = ("Server", "limits", "times", "notify", "RemoteSites", "workflow", "poller", "outbound", "ssh",
            "ssh guard")


def seconds(text):
    """'90', '90s', '1.5m', '2h', '30d' -> seconds (float)."""
    found = re.match(r"(\d+(?:\.\d+)?)\s*([smhd]?)\Z", text)
    if not found:
        raise ValueError(_("is not a time (like 90s, 5m, 2h, 30d)"))
    return float(found.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found.group(2)]


def size(text):
    """'1024', '16M', '2G' -> bytes (int; K = 1024)."""
    found = re.match(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\Z", text, re.I)
    if not found:
        raise ValueError(_("is not a size (like 64K, 16M, 2G)"))
    return int(float(found.group(1)) * 1024 ** " KMGT".index(found.group(2).upper() or " "))


def share(text):
    """'5%' -> 0.05 (float, a share of the disk); '2G' -> bytes (int)."""
    found = re.match(r"(\d+(?:\.\d+)?)\s*%\Z", text)
    return float(found.group(1)) / 100 if found else size(text)


def flag(text):
    """yes/no, true/false, on/off, 1/0 -> bool."""
    if text.lower() in ("yes", "true", "on", "1"):
        return True
    if text.lower() in ("no", "false", "off", "0"):
        return False
    raise ValueError(_("is not yes or no"))


def lines(text):
    """One value a line; blank lines dropped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def one_of(*choices):
    """A kind of which only these words are values."""
    def kind(text):
        if text not in choices:
            raise ValueError(_("is not one of: %s") % " ".join(choices))
        return text
    return kind


def ini_folders(script):
    """Where the ini is looked for: beside the script, in ~/.config/, in /etc/. Never where it is started:
    results arrive there."""
    return [os.path.dirname(os.path.abspath(script)), os.path.expanduser("~/.config"), "/etc"]


def find_ini(given, folders, needed=False):
    """The ini's absolute path: given (--ini), or the first of these folders that has one, or None. 78 if the
    given or needed one is not there."""
    if given is not None and not os.path.exists(utf8(given)):
        raise Stop(EX_CONFIG, _("%s: no such file (--ini)") % (printable(given) or '""'))
    # ~ may be nobody's
    places = ([os.path.join(folder, INI_NAME) for folder in folders if os.path.isabs(folder)] if given is None
              else [given])
    found = next((os.path.abspath(place) for place in places if os.path.exists(utf8(place))), None)
    if needed and not found:
        raise Stop(EX_CONFIG,
                   _("no %s in %s; say --ini FILE")
                   % (INI_NAME, printable(", ".join(dict.fromkeys(folders)))))
    return found


def check_only_ours(path):
    """78 if somebody else than this user and root may change that file or directory, or what it lies in; of a
    link, also where it leads to."""
    path = os.path.abspath(utf8(path))
    real = os.path.realpath(path)
    for place in (path, os.path.dirname(path), real, os.path.dirname(real)):
        info = os.stat(place)
        if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
            raise Stop(EX_CONFIG,
                       _("%s: must belong to you or root, and nobody else may write to it (chown, chmod"
                         " go-w; or run this as its owner)") % printable(place.decode("utf-8", "replace")))


def did_you_mean(word, known):
    """' (did you mean X?)' or ''. X is spelled nearly so, or begins or ends so."""
    import difflib
    close = (difflib.get_close_matches(word, known, 1, 0.6)
             or [one
                 for one in sorted(known)
                 if len(word) > 2 and (one.startswith(word) or one.endswith(word) or word.endswith(one))])
    return _(" (did you mean %s?)") % close[0] if close else ""


def belongs_into(key, table):
    """' (it belongs into [SECTION])' or ''."""
    names = [{"command *": "command NAME", "signer *": "signer NAME", "*": "SITE"}.get(name, name)
             for name in table if key in table[name]]
    return _(" (it belongs into %s)") % ", ".join("[%s]" % name for name in names) if names else ""


def parse_ini(path):
    """The ini at path as it is: {section: [(key, text)]}. Stop 78 if it cannot be read, or others may write
    to it."""
    import configparser
    parser = configparser.RawConfigParser(default_section="\0", strict=True, inline_comment_prefixes=("#",))
    parser.optionxform = lambda key: key if key.lower().startswith("env.") else key.lower()
    try:
        check_only_ours(path)
        with open(utf8(path), encoding="utf-8-sig") as text:
            parser.read_file(text, path)
    except OSError as error:
        raise Stop(EX_CONFIG, "%s: %s" % (path, error.strerror))
    except (configparser.Error, UnicodeDecodeError) as error:
        why = re.sub(r"^While reading from .*? \[line +(\d+)\]", r"line \1", " ".join(str(error).split()))
        raise Stop(EX_CONFIG, "%s: %s" % (path, why))
    return collections.OrderedDict((section, parser.items(section)) for section in parser.sections())


def read_ini(path, table):
    """The ini as {section: {key: typed value}}: every section of table with its defaults, and of 'command *',
    'signer *' and '*' (any other) those that are there. In any value {here}/ is the ini's directory, {python}
    the Python that runs this.

    What the file says is obeyed, so nobody else may write to it: see check_only_ours(). 78 with file,
    section, key and what to do, for anything that is not as it should be.
    """
    result = {name: default_values(keys) for name, keys in table.items() if "*" not in name}
    for section, rows in (parse_ini(path) if path else {}).items():
        keys = keys_of_section(path, section, table)
        if keys is not None:
            result[section] = default_values(keys)
            for key, text in rows:
                text = text.strip().replace("{here}/", os.path.dirname(path) + "/")
                text = text.replace("{python}", sys.executable or "python3")
                result[section][key] = ini_value((path, section, key), text, keys, table)
    return result


def default_values(keys):
    """{key: default} of a section."""
    return {key: row[1] for key, row in keys.items() if "*" not in key}


def keys_of_section(path, section, table):
    """The keys that this section of the ini may have; None for another script's, and for a site's where no
    sites are. 78 for what is misspelled."""
    if section in table:
        return table[section]
    if section.startswith(("command ", "signer ")):
        return table.get(section.split(" ")[0] + " *")
    if section in SECTIONS:
        return None
    hint = did_you_mean(section, SECTIONS + ("command", "signer")) if "*" not in table else ""
    if hint:
        raise Stop(EX_CONFIG, _("%s: [%s] is not a section%s") % (path, section, hint))
    return table.get("*")


def ini_value(where, text, keys, table):
    """The typed value of a key's text. where: (path, section, key), which a Stop 78 names."""
    key = where[2]
    name = key if key in keys else re.sub(r"\.[^.]+\Z", ".*", key)
    if name not in keys:
        hint = belongs_into(key, table) or did_you_mean(key, list(keys))
        raise Stop(EX_CONFIG, _("%s: [%s] %s is not a key%s") % (where + (hint,)))
    kind = keys[name][0]
    try:
        return kind(text)
    except (ValueError, re.error) as error:
        why = _("is not a whole number") if kind is int else error
        raise Stop(EX_CONFIG, "%s: [%s] %s = %s: %s" % (where + (text, why)))
# ==== end shared ====


# ==== shared: names ====
# File names of a calculation. Checked by every receiver: whoever sends them may be hostile.
LOG_NAMES = ("計算標準出力.txt", "計算標準エラー出力.txt")       # stdout and stderr of the command, always among the results
MAX_PATTERNS = 100                 # of one calculation


def nfc_parts(name):
    """name's parts in NFC: the order of a manifest, and what makes two names equal."""
    plain = name.isascii() if hasattr(name, "isascii") else all(c < "\x80" for c in name)
    if not plain and name not in LOG_NAMES:            # (they are in it: to load its tables takes 1 ms)
        import unicodedata
        name = unicodedata.normalize("NFC", name)
    return tuple(name.split("/"))


def check_name(name):
    """name, if it is a relative path of plain parts; otherwise ValueError with the reason."""
    if not isinstance(name, str) or not name:
        raise ValueError(_("an empty name"))
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError(_("a name that is not UTF-8"))
    if length > 1000 or length > 255 and any(len(part.encode("utf-8")) > 255 for part in name.split("/")):
        raise ValueError(_("a name that is too long: %s...") % printable(name[:60]))
    if has_control_chars(name) or "\\" in name:
        raise ValueError(_("a name with a control character or a backslash: %s") % printable(name))
    if {"", ".", ".."}.intersection(name.split("/")):
        raise ValueError(_("a name that is absolute or has an empty, . or .. part: %s") % name)
    return name


def check_manifest_names(names, before=None, reserved=(), folders=False):
    """Checks a manifest's names: each one plain, ascending by nfc_parts (so that equal names, and a name that
    is another's directory, stand side by side), none equal to or below a reserved one. folders: empty
    directories may follow, as names with a trailing /, behind all files and ascending among themselves.
    before: the last name of the page before. ValueError; returns the last name."""
    last = (before.endswith("/"), nfc_parts(before.rstrip("/"))) if before is not None else None
    for name in names:
        plain = name[:-1] if folders and isinstance(name, str) and name.endswith("/") else name
        now = plain is not name, nfc_parts(check_name(plain))
        if last is not None and (now <= last or now[0] == last[0] and now[1][:len(last[1])] == last[1]):
            raise ValueError(_("two names that are equal, one in the other, or out of order: %s") % name)
        if any(now[1][:1] == nfc_parts(word) for word in reserved):
            raise ValueError(_("a name that is kept for the log: %s") % name)
        last, before = now, name
    return before


def compile_pattern(text):
    """A result pattern as something with match(): * and ? within a part, ** across parts, a trailing / the
    whole directory. ValueError."""
    check_name(text.rstrip("/") if text.endswith("/") and text != "/" else text)
    pieces = re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", text + ("**" if text.endswith("/") else ""))
    # as an expression it could take for ever
    if sum("*" in piece for piece in pieces[pieces[0] == "**/":-1]) > 1:
        return GlobMatcher(pieces, text[0] in "*?")
    out = ""
    for piece in pieces:
        out += {"**/": "(?:[^/]+/)*", "**": ".+", "*": "[^/]*", "?": "[^/]"}.get(piece) or re.escape(piece)
    hidden = r"(?!\.)" if text[0] in "*?" else ""     # as in a shell: * does not reach .bashrc
    return re.compile(hidden + out + r"\Z", re.S)


class GlobMatcher:
    """A pattern with many stars as a row of steps, one bit each: match() makes a few operations on whole rows
    for each character of the name, whoever made the pattern and the name. (Steps without a character: star
    and anys lead to the next one, dirs behind its partner in.)"""

    def __init__(self, pieces, hidden=False):
        kinds = {"**/": ("dirs", "in"), "**": ("any", "anys"), "*": ("star",), "?": ("one",)}
        rows = dict.fromkeys(("dirs", "in", "any", "anys", "star", "one"), 0)
        steps, last = [], ""
        for piece in pieces:
            if not piece == last == "**/":             # twice is once
                steps += kinds.get(piece) or tuple(piece)
            last = piece
        self.hidden = hidden
        self.end = 1 << len(steps)
        self.chars = {}
        for place, step in enumerate(steps):
            known = rows if step in rows else self.chars
            known[step] = known.get(step, 0) | 1 << place
        # [a-z], as expressions
        self.sets = [(step, self.chars.pop(step)) for step in list(self.chars) if not isinstance(step, str)]
        self.free = rows["star"] | rows["anys"]
        self.dirs = rows["dirs"]
        self.within = rows["in"]
        # by: is it not a slash?
        self.stay = {False: rows["anys"], True: rows["anys"] | rows["star"] | rows["in"]}
        self.go = {False: rows["any"], True: rows["any"] | rows["one"] | rows["dirs"]}

    def reach(self, at):
        """The steps in `at`, and where one gets from there without a character: anys, dirs, star is the
        longest run of such."""
        for _turn in range(3):
            at |= (at & self.free) << 1 | (at & self.dirs) << 2
        return at

    def match(self, name):
        """Is it a name of this pattern?"""
        at = self.reach(1) if not (self.hidden and name.startswith(".")) else 0
        for char in name if at else "":
            part, go = char != "/", self.chars.get(char, 0)
            for one, bit in self.sets:
                go |= bit if one.match(char) else 0
            back = 0 if part else (at & self.within) >> 1
            at = self.reach(at & self.stay[part] | (at & (self.go[part] | go)) << 1 | back)
        return bool(at & self.end)


def compile_patterns(texts):
    """A calculation's patterns, ready to match. ValueError if one is none, or there are too many: each is
    compared with each name."""
    if len(texts) > MAX_PATTERNS:
        raise ValueError(_("more than %d patterns; a directory (DIR/) or ** stands for many") % MAX_PATTERNS)
    return [compile_pattern(text) for text in texts]


def declared_matcher(names, patterns):
    """A function name -> bool: is this result one that was asked for (or a log)?"""
    wanted = {nfc_parts(name) for name in tuple(names) + LOG_NAMES}
    found = compile_patterns(patterns)
    asked = set(patterns)                              # an empty directory is there as its own pattern, too
    return lambda name: nfc_parts(name) in wanted or name in asked or any(one.match("/".join(nfc_parts(name)))
                                                                          for one in found)
# ==== end shared ====


# ==== shared: seal ====
# Who may order: only orders that a key of the owner's list, [signer NAME], has signed run, each once (key
# require_signature). An order is a text of two parts (`signed`): one line of JSON in the very bytes that were
# signed; behind it the signature in OpenSSH's form (openssh-portable, PROTOCOL.sshsig). It is verified here,
# in whole numbers: Ed25519 (RFC 8032), RSA (RFC 8017, PKCS #1 v1.5) with SHA-2. Nothing secret takes part in
# that, so the time that it takes tells nothing. In this order: its form; is its key on the list; the curve,
# or the power; and only then what the order says is read, and compared with what is about to be done.
SIGNED_MOST = 1 << 20          # characters of an order
RSA_BITS = range(2048, 8193)
PRIME = 2 ** 255 - 19          # of the field, the number of points, and the curve's d: RFC 8032, 5.1
POINTS = 2 ** 252 + 27742317777372353535851937790883648493
CURVE_D = -121665 * pow(121666, PRIME - 2, PRIME) % PRIME
CLOCK_SKEW = 300               # seconds that two hosts' clocks may differ
USES_KEPT = 86400              # seconds beyond its end that a used order is remembered: clocks are set back
USES_MANY = 1 << 20            # bytes of their list from which on those that are over are taken out
USES_LOCK = threading.Lock()
ORDER_FIELDS = {               # all that an order says, each exactly once
    "v": int, "site": str, "user": str, "request_id": str, "command": str, "parameters": str, "inputs": str,
    "result_files": list, "result_patterns": list, "nonce": str, "not_before": int, "expires": int}
Signer = collections.namedtuple("Signer", "name user key sites commands since until revoked")


def signer_keys():
    """The keys of the owner's list, as read_ini() takes them."""
    return {"signer *": {
        "key": (public_key, b"", "a public key as ssh-keygen writes it: ssh-ed25519 ..., or ssh-rsa ... (from"
                                 " 2048 bits on)"),
        "user": (str, "", "who signs with it, as its orders say; default: NAME"),
        "sites": (str.split, [], "only for these of this computer's names; default: any"),
        "commands": (str.split, [], "only these [command NAME]; default: any"),
        "since": (moment, 0, "2026-11-30, or 2026-11-30 14:00: orders run from then on"),
        "until": (moment, 0, "... and before that; default: for ever"),
        "revoked": (flag, False, "yes: what is signed by it is refused by this name")}}


def order_keys():
    """The keys of a door's section that are about signed orders and results."""
    return {
        "require_signature": (flag, None, "no: unsigned orders run, too; default: yes, once there is a"
                                          " [signer NAME]"),
        "accept_after": (moment, 0, "orders that were signed before are refused: set it to now after a backup"
                                    " was put back here"),
        "result_key": (str, "", "a private key, made at first need, by which results are signed; its public"
                                " half, FILE.pub, is for who asks for them")}


def moment(text):
    """'2026-11-30', '2026-11-30 14:00' (local time) -> seconds since the epoch."""
    found = re.match(r"(\d{4})-(\d\d)-(\d\d)(?:[ T](\d\d):(\d\d))?\Z", text)
    try:
        parts = [int(part or 0) for part in found.groups()]
        return int(time.mktime(time.strptime("%04d %02d %02d %02d %02d" % tuple(parts), "%Y %m %d %H %M")))
    except (AttributeError, ValueError, OverflowError):
        raise ValueError(_("is not a time like 2026-11-30, or 2026-11-30 14:00"))


def signers_of(where, settings):
    """{public key: its Signer} of all [signer NAME] sections. 78 if one has no key, or two have the same."""
    found = {}
    for section in settings:
        if section.startswith("signer "):
            keys = settings[section]
            if not keys["key"] or keys["key"] in found:
                raise Stop(EX_CONFIG, _("%s: [%s] key: is missing, or another signer's, too")
                           % (where, section))
            found[keys["key"]] = Signer(section[7:], **dict(keys, user=keys["user"] or section[7:]))
    return found


def order_rules(where, settings, door, folder, sites):
    """The OrderRules of a door, by its section. 78 if orders must be signed, but nobody is on the list, or
    this computer has no name for them. Whoever takes the last [signer NAME] away has not said that unsigned
    orders run."""
    rules = OrderRules(folder, settings[door], signers_of(where, settings), sites)
    if folder and settings[door]["require_signature"] is None:
        rules.required = rules.required or os.path.exists(rules.path)
    needed = [door] if rules.required else [
        name for name, keys in settings.items() if name.startswith("command ") and keys["require_signature"]]
    if needed and not rules.signers:
        raise Stop(EX_CONFIG, _("%s: [%s] require_signature: who may order? Add: [signer NAME]  key ="
                                " ssh-ed25519 ..., or say: require_signature = no") % (where, needed[0]))
    if needed and not sites:
        raise Stop(EX_CONFIG, _("%s: [%s] require_signature: what do orders call this computer? Add to [%s]: "
                                "site = NAME") % (where, needed[0], door))
    return rules


# The signature

def public_key(text):
    """A public key as one line of text, 'ssh-ed25519 BASE64 ...' -> its bytes on the wire (RFC 4253, 6.6;
    RFC 8709). ValueError if it is none that is taken here."""
    words, wrong = text.split(), _("is not a line like: ssh-ed25519 AAAA... (or ssh-rsa, from 2048 bits on)")
    try:
        blob = strict_base64("".join(words[1:2]))
        kind, *numbers = ssh_strings(blob)
        if "".join(words[:1]).encode() != kind or not words[1:]:
            raise ValueError(wrong)
        check_key(kind, numbers)
    except ValueError:
        raise ValueError(wrong)
    return blob


def check_key(kind, numbers):
    """ValueError unless these are the numbers of a key."""
    if kind == b"ssh-ed25519":
        if len(numbers) != 1 or point_of(numbers[0]) is None:
            raise ValueError("not a point")
    elif kind == b"ssh-rsa" and len(numbers) == 2:
        e, n = (int.from_bytes(number, "big") for number in numbers)
        if n.bit_length() not in RSA_BITS or not n & e & 1 or not 2 < e < 1 << 64:
            raise ValueError("too small")
    else:
        raise ValueError("another kind")


def signed_by(text, armored, space, trusted):
    """The public key, one of `trusted`, by which this text (bytes) is signed. ValueError if it is by none of
    them: nothing is calculated for a key that nobody trusts."""
    key, kind, signature, summed = taken_apart(armored, space)
    if key not in trusted:
        raise ValueError(_("by a key that is not on this host's list"))
    signed, (sort, *numbers) = sshsig_data(text, space, summed), ssh_strings(key)
    if sort == b"ssh-ed25519" == kind:
        good = is_ed25519(numbers[0], signed, signature)
    else:
        good = sort == b"ssh-rsa" and kind in RSA_SUMS and is_rsa(numbers, signed, signature, *RSA_SUMS[kind])
    if not good:
        raise ValueError(_("the signature does not fit"))
    return key


def is_ed25519(public, signed, signature):
    """RFC 8032, 5.1.7: is it the signature of these bytes? What is not canonical is none: S from the number
    of points on, a coordinate from the prime on. Compared are the bytes of R, so that no other R fits."""
    import hashlib
    r, s = signature[:32], int.from_bytes(signature[32:], "little")
    if len(signature) != 64 or s >= POINTS or not all(map(is_coordinate, (r, public))):
        return False
    point = point_of(public)
    if point is None:
        return False
    k = int.from_bytes(hashlib.sha512(r + public + signed).digest(), "little") % POINTS
    x, y, z, _t = sum_of_multiples(s, base_point(), k, (PRIME - point[0], point[1], 1, PRIME - point[3]))
    z = pow(z, PRIME - 2, PRIME)
    return (y * z % PRIME | (x * z % PRIME & 1) << 255).to_bytes(32, "little") == r


def is_coordinate(data):
    """Are these 32 bytes a y below the prime, and the sign of an x?"""
    return len(data) == 32 and int.from_bytes(data, "little") % 2 ** 255 < PRIME


def point_of(data):
    """RFC 8032, 5.1.3: the point (X, Y, Z, T) that these bytes say, None if there is none."""
    if not is_coordinate(data):
        return None
    sign, y = divmod(int.from_bytes(data, "little"), 2 ** 255)
    square = (y * y - 1) * pow(CURVE_D * y * y + 1, PRIME - 2, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if (x * x - square) % PRIME:
        x = x * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    if (x * x - square) % PRIME or not x and sign:
        return None
    x = x if x & 1 == sign else PRIME - x
    return x, y, 1, x * y % PRIME


@functools.lru_cache(maxsize=1)
def base_point():
    """B of RFC 8032, 5.1: y = 4/5, x even."""
    return point_of((4 * pow(5, PRIME - 2, PRIME) % PRIME).to_bytes(32, "little"))


def sum_of_points(one, other):
    """RFC 8032, 5.1.4; good for any two points, also the same one."""
    a = (one[1] - one[0]) * (other[1] - other[0]) % PRIME
    b = (one[1] + one[0]) * (other[1] + other[0]) % PRIME
    c, d = 2 * one[3] * other[3] * CURVE_D % PRIME, 2 * one[2] * other[2] % PRIME
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % PRIME, g * h % PRIME, f * g % PRIME, e * h % PRIME


def sum_of_multiples(s, one, k, other):
    """s times one point and k times another: doubled bit by bit, both at once."""
    found, both = (0, 1, 1, 0), sum_of_points(one, other)
    for bit in range(max(s.bit_length(), k.bit_length()) - 1, -1, -1):
        found = sum_of_points(found, found)
        which = s >> bit & 1, k >> bit & 1
        if which != (0, 0):
            found = sum_of_points(found, {(1, 0): one, (0, 1): other, (1, 1): both}[which])
    return found


# The order

def parse_order(line):
    """The order of a line of JSON: the fields of ORDER_FIELDS, each once and of its kind, and nothing else.
    ValueError."""
    def refuse(word):
        raise ValueError(_("it holds %s") % printable(word)[:100])

    def object_of(pairs):
        names = [name for name, value in pairs]
        return dict(pairs) if len(set(names)) == len(names) else refuse(" ".join(names))

    def number(word):
        return int(word) if len(word) < 20 else refuse(word)

    try:
        order = json.loads(line, object_pairs_hook=object_of, parse_int=number, parse_float=refuse,
                           parse_constant=refuse)
    except RecursionError:
        refuse("[[[")
    if not (isinstance(order, dict) and set(order) == set(ORDER_FIELDS) and order["v"] == 1
            and all(type(order[name]) is kind for name, kind in ORDER_FIELDS.items())
            and all(type(text) is str for text in order["result_files"] + order["result_patterns"])
            and re.match(r"[0-9a-f]{32}\Z", order["nonce"])):
        raise ValueError(_("it does not say what an order says"))
    return order


class OrderRules:
    """Which orders run. folder: where those that were used are remembered (bytes; one for all doors with the
    same signers); keys: see order_keys(); signers: see signers_of(); sites: what orders call this
    computer."""

    def __init__(self, folder, keys=None, signers=(), sites=()):
        keys = keys or {"require_signature": None, "accept_after": 0}
        self.path = os.path.join(folder, b"orders")
        self.signers = dict(signers)
        self.sites = sites
        self.accept_after = keys["accept_after"]
        self.required = keys["require_signature"]
        if self.required is None:
            self.required = bool(self.signers)

    def needed(self, command):
        """Must what runs this command be signed?"""
        own = command["require_signature"]
        return self.required if own is None else own

    def permit(self, signed, wanted, command, now):
        """The order of the text `signed`, {} if there is none and need be none. wanted: {field of an order:
        what is about to be done}; now: seconds since the epoch, None: it was used in time. Forbidden."""
        needed = self.needed(command)
        if not signed and not needed:
            return {}
        try:
            line, _newline, armored = signed.partition("\n")
            text = line[:SIGNED_MOST].encode("ascii")  # (more than that is not what was signed)
            signer = self.signers[signed_by(text, armored, ORDER_SPACE, self.signers)] if needed else None
            order = parse_order(line)
            self.check_same(order, wanted)
            if needed:
                self.check_signer(order, signer, command)
                self.check_time(order, signer, now)
            return order
        except Forbidden:
            raise
        except ValueError as error:
            raise Forbidden(_("this order does not run here: %s") % error)

    @staticmethod
    def check_same(order, wanted):
        """ValueError unless the order says what is about to be done."""
        other = [name for name in sorted(wanted) if order[name] != wanted[name]]
        if other:
            raise ValueError(_("what is asked for is not what was signed (%s)") % " ".join(other))

    def check_signer(self, order, signer, command):
        """ValueError unless this signer may order that here."""
        if signer.revoked:
            raise ValueError(_("[signer %s] is revoked") % signer.name)
        if order["user"] != signer.user:
            raise ValueError(_("[signer %s] signs for user %s, and the order says %s")
                             % (signer.name, signer.user, printable(order["user"])[:100]))
        here = order["site"] in self.sites and (not signer.sites or order["site"] in signer.sites)
        if not here:
            raise ValueError(_("it is for site %s") % printable(order["site"])[:100])
        if signer.commands and command["name"] not in signer.commands:
            raise ValueError(_("[signer %s] may not order [command %s]") % (signer.name, command["name"]))

    def check_time(self, order, signer, now):
        """ValueError unless it may run now."""
        if now is None:
            return
        if signer.since and now < signer.since or signer.until and now >= signer.until:
            raise ValueError(_("[signer %s] is not in its time (since, until)") % signer.name)
        if now + CLOCK_SKEW < order["not_before"]:
            raise ValueError(_("its time has not come yet; are the clocks of both hosts right?"))
        self.check_end(order, now)
        if order["not_before"] < self.accept_after or order["not_before"] + CLOCK_SKEW < self.begun(now):
            raise ValueError(_("it was signed before this host began to remember orders; order it anew"))

    @staticmethod
    def check_end(order, now):
        """Forbidden if its time is over."""
        if now >= order["expires"]:
            raise Forbidden(_("this order does not run here: %s") % _("it has expired; order it anew"))

    # Each runs once. The list of those that were used: a line `begun TIME`, then `NONCE UNTIL MARK` each.

    def begun(self, now):
        """Since when this host remembers; if its list is not there, since now."""
        with self.book(now) as book:
            return int(book.readline().split()[1])

    @contextlib.contextmanager
    def book(self, now):
        """The list, open to be read and added to, and nobody else's meanwhile. OSError where no lock is to be
        had: then nothing runs."""
        import fcntl
        with USES_LOCK, open(self.path + b".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(self.path):
                replace_synced(self.path, b"begun %d\n" % now)
            with open(self.path, "rb+") as book:
                yield book

    def use(self, order, command, control, now):
        """From here on this order is used, on disk, by the run with this control directory (bytes). Forbidden
        if another one has used it, or its time is over by now."""
        if not order or not self.needed(command):
            return
        self.check_end(order, now)
        mark = os.path.join(control, b"order.mark")
        if not os.path.exists(mark):
            replace_synced(mark, os.urandom(16).hex().encode())
        fault("order marked")
        with open(mark, "rb") as text:
            mark = text.read()
        nonce = order["nonce"].encode()
        with self.book(now) as book:
            rows = book.read()
            found = re.search(rb"^%s \d+ (\w+)$" % nonce, rows, re.M)
            if not found:
                self.add_row(book, rows, b"%s %d %s\n" % (nonce, order["expires"] + USES_KEPT, mark), now)
        if found and found.group(1) != mark:
            raise Forbidden(_("this order does not run here: %s")
                            % _("it was used already; order it anew (rerun, by who signed it)"))
        fault("order used")

    @staticmethod
    def add_row(book, rows, row, now):
        """row onto the list, on disk. What is over goes, where that makes it much shorter."""
        kept = [one.group() for one in re.finditer(rb"^\w{32} (\d+) \w{32}\n", rows, re.M)
                if int(one.group(1)) > now] if len(rows) > USES_MANY else [rows]
        if 2 * sum(map(len, kept)) < len(rows):
            return replace_synced(book.name, rows[:rows.index(b"\n") + 1] + b"".join(kept) + row)
        book.write(row if rows.endswith(b"\n") else b"\n" + row)         # (one before may have been torn)
        book.flush()
        os.fsync(book.fileno())


# What is said of results

def signed_results(path, told, control, rules, rows, said, order):
    """What this computer says of results, signed by the private key in the file `path`, which is made if it
    is not there; "" where there is no such key. told: {"site", "run", "exit_code", "signal", "reason"};
    control: of the run (a person's word is there, if it waited for one); rules: [outbound]; rows: of the
    manifest, see sum_of_manifest(); said: what is said of what stays here; order: the text `signed` of the
    order. 78 if it cannot be."""
    import hashlib
    if not path:
        return ""
    if not os.path.exists(utf8(path)):
        make_key(path, told["site"])

    def sum_of(found):
        text = json.dumps(found, sort_keys=True, default=lambda one: getattr(one, "pattern", str(type(one))))
        return hashlib.sha256(text.encode()).hexdigest()

    line, hold = order.partition("\n")[0], Hold(control)
    word = hold.note() and hold.decision(0)
    with open(utf8(path), "rb") as key:                # nobody who knows most of the rules tries out the rest
        rules = dict(rules, key=hashlib.sha256(key.read()).hexdigest())
    return signed_text(dict(
        told, v=1, release="%s %s" % (word["what"], word["manifest"]) if word else "",
        order=hashlib.sha256(line.encode("utf-8", "replace")).hexdigest() if line else "",
        manifest=sum_of_manifest(rows), stays=sum_of(said), rules=sum_of(rules)), path, RESULT_SPACE)


def replace_synced(path, data):
    """A file that has these bytes or its old ones, and keeps them if the power fails."""
    write_synced(path + b".new", data)
    os.rename(path + b".new", path)
    sync_path(os.path.dirname(path))
# ==== end shared ====


# ==== shared: sign ====
# What is signed, orders and results, is one line of JSON; behind it stands its signature in OpenSSH's form
# (openssh-portable, PROTOCOL.sshsig), made by ssh-keygen (OpenSSH 8.1 or newer), or by openssl with an RSA
# key in PEM. Both get the text on their standard input: from a file, ssh-keygen keeps an older signature
# that lies beside it, and ends with 0.
ORDER_SPACE, RESULT_SPACE = "order@mi-distcomp", "result@mi-distcomp"      # namespaces: one is no other
ORDER_FOR = 30 * 86400                 # seconds that a signed order may be carried out
RSA_SUMS = {                   # how RSA signs: (hash, what stands before its sum; RFC 8017, 9.2, note 1)
    b"rsa-sha2-256": ("sha256", bytes.fromhex("3031300d060960864801650304020105000420")),
    b"rsa-sha2-512": ("sha512", bytes.fromhex("3051300d060960864801650304020305000440"))}


def signed_text(fields, path, space):
    """{field: value} as a line of JSON with its signature by the private key in `path`. 78 if that cannot
    be."""
    line = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    try:
        with open(utf8(path), "rb") as text:
            is_pem = re.match(rb"-----BEGIN (RSA )?PRIVATE", text.read(100))
        armored = (openssl_signature(line.encode(), path, space) if is_pem
                   else run_tool(["ssh-keygen", "-q", "-Y", "sign", "-f", path, "-n", space], line.encode()))
        if armored.startswith(b"-----BEGIN SSH SIGNATURE-----\n"):
            return line + "\n" + armored.decode("ascii")
        why = _("no signature came; is ssh-keygen older than 8.1? then a key of `keygen`, or one in PEM,"
                " does")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
    raise Stop(EX_CONFIG, _("%s: cannot be signed with: %s") % (path, why))


def signed_order(fields, key):
    """The order with these fields, and a user, a time and a nonce of its own, as a signed text. 78."""
    import getpass
    now = int(time.time())
    try:
        user = public_half(key)[1] or getpass.getuser()
    except (OSError, ValueError) as error:
        raise Stop(EX_CONFIG, _("%s: cannot be signed with: %s") % (key, getattr(error, "strerror", None)
                                                                   or error))
    return signed_text(dict(fields, v=1, user=user, nonce=os.urandom(16).hex(), not_before=now,
                            expires=now + ORDER_FOR), key, ORDER_SPACE)


def openssl_signature(text, path, space):
    """The signature of text by the RSA key in `path`, whose public half is beside it. ValueError, OSError."""
    signed = run_tool(["openssl", "dgst", "-sha512", "-sign", path], sshsig_data(text, space))
    blob = b"SSHSIG\0\0\0\1" + b"".join(map(ssh_string, (
        public_half(path)[0], space.encode(), b"", b"sha512",
        ssh_string(b"rsa-sha2-512") + ssh_string(signed))))
    armored = binascii.b2a_base64(blob, newline=False)
    return b"".join([b"-----BEGIN SSH SIGNATURE-----\n"]
                    + [armored[at:at + 70] + b"\n" for at in range(0, len(armored), 70)]
                    + [b"-----END SSH SIGNATURE-----\n"])


def sshsig_data(text, space, summed="sha512"):
    """What is signed in place of a text."""
    import hashlib
    parts = space.encode(), b"", summed.encode(), hashlib.new(summed, text).digest()
    return b"SSHSIG" + b"".join(map(ssh_string, parts))


def ssh_string(data):
    """data behind its length (RFC 4251, 5)."""
    return len(data).to_bytes(4, "big") + data


def ssh_strings(data):
    """The strings that data is made of, each behind its length (RFC 4251, 5). ValueError if it is not."""
    found, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at:at + 4], "big")
        if at + 4 > len(data) or end > len(data):
            raise ValueError("cut off")
        found.append(data[at + 4:end])
        at = end
    return found


def public_half(path):
    """(public key as bytes on the wire, the rest of its line: whose it is) of the private key in `path`: of
    the file PATH.pub. ValueError, OSError."""
    with open(utf8(path if path.endswith(".pub") else path + ".pub"), encoding="utf-8") as text:
        words = text.read(100000).split(None, 2)
    return binascii.a2b_base64("".join(words[1:2])), "".join(words[2:]).strip()


def make_key(path, comment):
    """A new private key in `path` (0600), and its public half, PATH.pub: Ed25519, or, where ssh-keygen cannot
    sign, RSA for openssl. 78 if it cannot be made."""
    kind = ["ed25519"] if has_keygen() else ["rsa", "-b", "3072", "-m", "PEM"]
    try:
        if os.path.lexists(utf8(path)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.makedirs(os.path.dirname(utf8(path)) or b".", 0o700, exist_ok=True)
        run_tool(["ssh-keygen", "-q", "-N", "", "-C", comment, "-f", path, "-t"] + kind, b"")
    except (OSError, ValueError) as error:
        raise Stop(EX_CONFIG, "%s: %s" % (path, getattr(error, "strerror", None) or error))


def has_keygen():
    """Is there an ssh-keygen that signs?"""
    try:
        run_tool(["ssh-keygen", "-Y"], b"")
    except (OSError, ValueError) as error:
        return "requires an argument" in str(error)


def run_tool(words, data):
    """What a program of PATH's absolute directories answers to data on its standard input. OSError if it is
    not there, ValueError with its words if it fails."""
    import subprocess
    path = ":".join(folder for folder in os.get_exec_path() if folder[:1] == "/")
    env = {key: value for key, value in os.environ.items() if key[:3] != "MI_"}
    done = subprocess.run(list(map(utf8, words)), input=data, env=dict(env, PATH=path),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        said = (done.stderr + done.stdout).decode("utf-8", "replace").strip()
        raise ValueError("%s: %s" % (words[0], printable(said)[:200]))
    return done.stdout


def taken_apart(armored, space):
    """(public key, kind, signature, hash) of a signature in its armour. ValueError if it is not one of this
    namespace, in every byte."""
    try:
        lines = armored.rstrip("\n").split("\n")
        ends = ["-----%s SSH SIGNATURE-----" % word for word in ("BEGIN", "END")]
        blob = strict_base64("".join(lines[1:-1]))
        key, named, reserved, summed, signature = ssh_strings(blob[10:])
        kind, signature = ssh_strings(signature)
        if ([lines[0], lines[-1]] == ends and blob[:10] == b"SSHSIG\0\0\0\1" and named == space.encode()
                and not reserved and summed in (b"sha256", b"sha512")):
            return key, kind, signature, summed.decode()
    except ValueError:
        pass
    raise ValueError(_("it is not signed, or not in this form"))


def strict_base64(text):
    """The bytes of base64 without anything else in it. ValueError."""
    import base64
    return base64.b64decode(text.encode("ascii"), validate=True)


def is_rsa(numbers, signed, signature, summed, head):
    """RFC 8017, 8.2.2: is it the signature of these bytes? numbers: e and n, as bytes."""
    import hashlib
    e, n = (int.from_bytes(number, "big") for number in numbers)
    length, value = -(-n.bit_length() // 8), int.from_bytes(signature, "big")
    if len(signature) != length or value >= n:
        return False
    ending = b"\0" + head + hashlib.new(summed, signed).digest()
    return pow(value, e, n).to_bytes(length, "big") == b"\0\1" + b"\xff" * (length - 2 - len(ending)) + ending


def sum_of_manifest(rows):
    """The sha256 of a manifest: of its rows (name, size, sha256, may it be executed?), in whatever order they
    come."""
    import hashlib
    digest = hashlib.sha256()
    for row in sorted(json.dumps(list(row)) for row in rows):
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()
# ==== end shared ====


# ==== shared: run ====
# The runner of one command: a wrapper in POSIX sh that starts it at most once, outlives its starter, and
# notes the end; what it has left running; and the removal of what it has left lying.
MOMENT, MOST_PIDS = 2, 300  # seconds after a start, and pids, in which left-overs are looked for one by one
EXEC_LOOKS = 20                # at the environment of a process that is in exec, a millisecond apart
PROCESS_STARTS = [{}]  # {(pid, inode in /proc): start} of the processes that left_overs() saw last
WRAPPER = r"""#!/bin/sh
# run CONTROL WORK COMMAND [ARG]...
# Runs COMMAND at most once, ever, and leaves CONTROL/end when it is over (and CONTROL/told, if somebody told
# it to end). Made beforehand and fsynced: ready, child, end.tmp (256 blanks each); alive (a FIFO, where it
# can help)
set -uf
c=$1 w=$2 b='' h=''; shift 2
# note FILE TEXT: into the file, in place (also on a full disk): PID STARTTIME BOOT_ID HOST TEXT; its mtime is
# the time
note() {
    f=$1 t=$2 s=''
    {
        read -r s </proc/self/stat
        [ "$b" ] || { read -r b </proc/sys/kernel/random/boot_id; read -r h </proc/sys/kernel/hostname; }
    } 2>/dev/null
    p=${s%% *}; set -- ${s##*) }
    printf '%-255s\n' "${p:-$$} ${20:-?} ${b:-?} ${h:-?} $t" 1<>"$f"
}
child() {   # in a process of its own, which becomes the command
    note "$c/child" running || exit 126
    [ "${MI_PATH+given}" ] && PATH=$MI_PATH
    unset MI_PATH
    exec "$@"
}
mv "$c/ready" "$c/start" 2>/dev/null || exit 75    # rename: one wins; a doubled or requeued start ends here
# outlive terminal and cancel: the end must be written, and whether it was told to end
trap '' HUP; trap 'true >"$c/told"' TERM INT
note "$c/start" started || exit 73
[ -p "$c/alive" ] && exec 9<>"$c/alive"    # a reader of the FIFO sees a hang-up the moment that we are gone
cd "$w" && (child "$@") </dev/null >"$c/stdout" 2>"$c/stderr" 9>&-
note "$c/end.tmp" "exit $?" || exit 73
for try in 1 2 3 4 5; do mv "$c/end.tmp" "$c/end" 2>/dev/null && break; done  # what cancels may hit mv, too
"""
# what the wrapper's note() wrote; time: its mtime, seconds
ProcessNote = collections.namedtuple("ProcessNote", "pid start boot host text time")
WRAPPER_PATH = "/usr/local/bin:/usr/bin:/bin"          # of the wrapper itself
# one host at a time has these
LOCAL_DISKS = set(b"ext2 ext3 ext4 xfs btrfs zfs f2fs jfs reiserfs bcachefs overlay aufs tmpfs".split())
ORPHAN_GRACE = 10  # seconds after which wrapper and command, both gone without `end`, count as lost
# children of a wrapper, dead ones counted, with which a command that is to end gets no more grace
FORK_STORM = 4000
GONE_SINCE = {}  # {control directory: since when both are, for wait_end() from one call to the next}
# seconds that SIGKILL is sent again and again; what is there then is another user's, or hangs in the kernel
KILL_TRIES = 5
ADOPTER = []                     # what adopter() has found


# The start

def prepare_control(control, fifo=True):
    """Makes what the wrapper needs in the control directory (bytes path, exists), on disk before this
    returns. `ready` comes last; once it is there, or was, nothing is made again: that would be a second
    start."""
    if any(os.path.exists(os.path.join(control, name)) for name in (b"ready", b"start", b"end")):
        return
    if fifo and not os.path.exists(os.path.join(control, b"alive")):
        os.mkfifo(os.path.join(control, b"alive"), 0o600)
    for name, text in ((b"child", b" " * 256), (b"end.tmp", b" " * 256), (b"run", WRAPPER.encode()),
                       (b"ready", b" " * 256)):
        write_synced(os.path.join(control, name), text, 0o700 if name == b"run" else 0o600)
    sync_path(control)


def start_wrapper(control, work, argv, env):
    """Starts the wrapper, detached, on argv (list of str) in the directory work with the environment env.
    Returns the Popen. The wrapper needs sh, mv and printf: a PATH of the command's own must not hide them."""
    if env.get("PATH", WRAPPER_PATH) != WRAPPER_PATH:
        env = dict(env, PATH=WRAPPER_PATH, MI_PATH=env["PATH"])
    words = [b"/bin/sh", os.path.join(control, b"run"), control, work] + [utf8(word) for word in argv]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL,
                            env={utf8(key): utf8(value) for key, value in env.items()},
                            start_new_session=True, cwd=b"/", preexec_fn=adopter())


def adopter():
    """A function for Popen's preexec_fn: it makes the wrapper the parent of every orphan below it, so that
    stop_command() finds also what has left its parent, its session and its environment behind. None where
    there is no such thing (Linux has it)."""
    if not ADOPTER:
        try:
            import ctypes
            prctl = ctypes.CDLL(None).prctl
            prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
            ADOPTER.append(lambda: prctl(36, 1, 0, 0, 0))                  # PR_SET_CHILD_SUBREAPER
        except (ImportError, AttributeError, OSError, MemoryError):
            # a Python without it, or a host that forbids what it needs
            ADOPTER.append(None)
    return ADOPTER[0]


# Where it is

def command_state(control, now):
    """(state, detail) of the command of a control directory (bytes path); now: time.time() (the clock may
    have been set back since). ready: never started · starting · running: detail its ProcessNote · ended:
    detail its exit code (128+N for a signal), None if it could not be started · elsewhere: on another host,
    and only its `end` will tell more: detail its ProcessNote · lost: both processes gone without an end, or
    the host was restarted; detail says which."""
    end = read_note(os.path.join(control, b"end"))
    child = read_note(os.path.join(control, b"child"))
    if end is not None:
        return "ended", exit_code(child, end)
    started = read_note(os.path.join(control, b"start"))
    if started is None:
        return state_before_start(control, now)
    for note in (child, started):                      # (the same boot is the same host, whatever its name)
        if note is not None and note.boot != boot_id():
            away = note.host != os.uname().nodename and on_shared_disk(control)
            return ("elsewhere", note) if away else ("lost", "the host was restarted")
    if child is not None and is_alive(child):
        return "running", child
    if is_alive(started):
        return "starting", None
    if read_note(os.path.join(control, b"end")) is not None:
        return command_state(control, now)             # it ended between two looks
    return lost_after(now - (child or started).time)


def exit_code(child, end):
    """The exit code in the note `end`; None if the command could not be started."""
    code = re.match(r"exit ([0-9]{1,3})\Z", end.text)
    return int(code.group(1)) if child is not None and code else None


def state_before_start(control, now):
    """command_state(), where no wrapper has noted its start."""
    try:                                               # a blank `start`: the wrapper is about to fill it in,
        began = os.stat(os.path.join(control, b"start")).st_ctime        # or was killed just there
    except OSError:
        return ("ready" if os.path.exists(os.path.join(control, b"ready")) else "starting"), None
    return lost_after(now - began)


def lost_after(seconds):
    """command_state(), where nothing lives and nothing has been noted for so long."""
    return ("lost", "end unknown") if abs(seconds) > ORPHAN_GRACE else ("starting", None)


def is_alive(note):
    """Does the process of the note live? Same PID, same start time, not a zombie, in this boot of this
    host."""
    try:
        state, _parent, _session, _terminal, start, _signal = stat_of(note.pid)
    except OSError:
        return False
    return start.decode() == note.start and state not in b"ZX" and note.boot == boot_id()


def on_shared_disk(path):
    """May another host have this directory (bytes), too? Not on a disk of this one, whatever it is called
    since it was started."""
    real, best, kind = os.path.realpath(path) + b"/", b"", b""
    with open("/proc/self/mountinfo", "rb") as rows:
        for row in rows:
            words = row.split()
            point = words[4].replace(b"\\040", b" ").rstrip(b"/") + b"/"
            if real.startswith(point) and len(point) >= len(best):
                best, kind = point, words[words.index(b"-") + 1]
    return kind not in LOCAL_DISKS


def read_note(path):
    """The ProcessNote in a file of the wrapper, or None while it is blank or not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        words = os.read(fd, 256).decode("utf-8", "replace").split(None, 4)
        when = os.fstat(fd).st_mtime
    except OSError:
        return None
    finally:
        os.close(fd)
    good = len(words) == 5 and re.match(r"[0-9]{1,9}\Z", words[0])
    return ProcessNote(int(words[0]), words[1], words[2], words[3], words[4].strip(), when) if good else None


# Its end

def wait_end(control, stop, most=0.25):
    """Waits until the command has ended or stop() is true; looks at the FIFO, so that the end is seen at
    once. Returns command_state()'s answer. most: seconds between two looks."""
    try:
        alive = os.open(os.path.join(control, b"alive"), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        alive = -1
    pause = 0.002
    try:
        while True:
            # a clock that is set does not count here
            state, now = command_state(control, float("inf")), time.monotonic()
            if state != ("lost", "end unknown"):
                GONE_SINCE.pop(control, None)
            elif now - GONE_SINCE.setdefault(control, now) < ORPHAN_GRACE:
                state = "starting", None
            if state[0] in ("ended", "lost") or stop():
                return state
            poller = select.poll()
            if alive >= 0:
                poller.register(alive, select.POLLIN)
            # hung up: the end is there, or the wrapper was killed: look now and then
            if poller.poll(pause * 1000):
                os.close(alive)
                alive, pause = -1, 0.002
            pause = min(pause * 1.5, most)
    finally:
        if alive >= 0:
            os.close(alive)


def stop_command(control, mark, grace):
    """Ends the command of a control directory and all that descends from it: SIGTERM, after `grace` seconds
    SIGKILL. Its wrapper stands still meanwhile: it stays there as the parent of all orphans, and notes the
    end afterwards. mark: MI_RUN=..., bytes. Returns the pids of what does not end."""
    leader, since = wrapper_of(control)
    told, until = set(), time.monotonic() + grace
    try:
        if leader:
            os.kill(leader, signal.SIGSTOP)
        while True:
            alive, now = command_processes(leader, mark, told, since), time.monotonic()
            late = now > until or leader and len(children_of(leader)) > FORK_STORM
            gone = not alive and (not leader or all_children_dead(leader))
            if gone or now > until + KILL_TRIES:
                return sorted(pid for pid, start in alive)
            tell_to_end(alive if late else alive - told, late)
            told |= alive                              # whose parent ends now is not lost sight of
            kill_youngest(leader if late else 0, now + 0.05)
    finally:
        continue_wrapper(control)


def command_processes(leader, mark, known, since=0):
    """{(pid, start time)} of a command's process tree: in its wrapper's session, with `mark` in the
    environment, known as part of it from an earlier look, or below one of these. leader: the wrapper's pid, 0
    if it is gone; it is not among them. since: its start; what has the mark and is older has forged it, or
    got it from elsewhere."""
    parents, starts, found = {}, {}, {leader} - {0}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            state, parent, session, _terminal, start, _signal = stat_of(pid)
            if state in b"ZX":
                continue
            parents[pid], starts[pid] = int(parent), start
            ours = leader and int(session) == leader or (pid, start) in known
            if ours or int(start) >= since and has_mark(b"/proc/%d/" % pid, mark):
                found.add(pid)
        except OSError:
            pass                                       # gone, or another user's
    found = with_descendants(found, parents) - {leader, os.getpid()}
    return {(pid, starts[pid]) for pid in found if pid in starts}


def with_descendants(pids, parents):
    """pids, and all that is below one of them. parents: {pid: its parent}."""
    more = pids
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - pids
        pids = pids | more
    return pids


def has_mark(top, mark):
    """Is mark in the environment of the process with the directory `top` below /proc? OSError."""
    for _turn in range(EXEC_LOOKS):
        with open(top + b"environ", "rb") as text:
            found = text.read()
        if found or not in_exec(top):
            break
        time.sleep(0.001)
    return mark in found.split(b"\0")


def in_exec(top):
    """Is it just becoming another program? For a moment it shows no environment then, also where it has one.
    (Fields of /proc/PID/stat: a thread of the kernel has no memory, vsize; env_start, env_end.) OSError."""
    words = stat_words(top)
    return words[20] != b"0" and not words[47] == words[48] != b"0"


def signal_to(pid, number):
    """Sends a signal; a process that is gone, or another user's, does not matter."""
    try:
        os.kill(pid, number)
    except OSError:
        pass


def children_of(pid):
    """The pids of its children, dead ones too, the youngest last, at once ([] where the kernel does not list
    them)."""
    try:
        with open("/proc/%d/task/%d/children" % (pid, pid), "rb") as text:
            return [int(word) for word in text.read().split()]
    except OSError:
        return []


def all_children_dead(pid):
    """Are all its children dead? A look at all processes misses what forks and ends meanwhile; pid stands
    still, so here it cannot hide."""
    found = children_of(pid)
    for child in found:
        try:
            if stat_of(child)[0] not in b"ZX":
                return False
        except OSError:
            pass
    return children_of(pid) == found


def wrapper_of(control):
    """(the wrapper's pid, 0 if it is gone; its start, 0 if that was in another boot)."""
    wrapper = read_note(os.path.join(control, b"start"))
    if wrapper is None or wrapper.boot != boot_id() or not wrapper.start.isdigit():
        return 0, 0
    return (wrapper.pid if is_alive(wrapper) else 0), int(wrapper.start)


def tell_to_end(processes, late):
    """SIGTERM, or (late) SIGKILL, to {(pid, start time)}."""
    # parents first: a shell whose child ends before it is told goes on to its next line
    for pid, _start in sorted(processes, key=lambda one: (int(one[1]), one[0])):
        signal_to(pid, signal.SIGKILL if late else signal.SIGTERM)
        signal_to(pid, signal.SIGCONT)                 # else a stopped one would not hear of it


def kill_youngest(leader, until):
    """Until then (time.monotonic()) SIGKILL to the youngest children of this process, again and again: what
    leaves a child behind and ends is quicker than a look at all processes. leader = 0: only waits."""
    while time.monotonic() < until:
        for pid in children_of(leader)[-20:] if leader else ():
            signal_to(pid, signal.SIGKILL)
        time.sleep(0.001 if leader else 0.05)


def continue_wrapper(control):
    """The wrapper of a control directory goes on, if stop_command() made it stand still and was killed
    there."""
    leader = wrapper_of(control)[0]
    if leader:
        signal_to(leader, signal.SIGCONT)


# Left-overs: what a command that has ended has left running in its directory

def end_left_overs(work, since, mark, grace, first=0):
    """Ends left_overs(): SIGTERM, after `grace` seconds SIGKILL. Returns (how many there were, the pids of
    what does not end)."""
    told, until = set(), time.monotonic() + grace
    while True:
        there, now = left_overs(work, since, mark, first), time.monotonic()
        if not there or now > until + KILL_TRIES:
            return len(told), sorted(pid for pid, start in there)
        tell_to_end(there if now > until else there - told, now > until)
        told |= there
        time.sleep(0.05)


def left_overs(work, since, mark, first=0):
    """{(pid, start)} of the processes that have their current directory, or something open to write, in the
    directory `work` (bytes). Not of those that were there before the command (start: ticks since boot,
    `since`: its own, first: its pid), nor of a terminal where somebody looks around: what has a terminal must
    have the command's mark (bytes) in its environment."""
    found, before, starts, pids = set(), PROCESS_STARTS[0], {}, pids_since(first, since)
    for pid in pids:
        if before.get(pid, since) < since:             # it was there before the command
            starts[pid] = before[pid]
            continue
        try:
            state, _parent, _session, terminal, start, signal_at_end = stat_of(int(pid[0]))
            starts[pid] = int(start)
            # -1: a thread, which /proc does not list but has
            if (int(start) >= since and state not in b"ZX" and signal_at_end != b"-1"
                    and works_in(work, pid[0], terminal, mark)):
                found.add((int(pid[0]), start))
        except OSError:
            pass                                       # gone, or another user's
    if pids and pids[0][1]:
        PROCESS_STARTS[0] = starts
    return found


def pids_since(first, since):
    """[(pid as bytes, inode of its directory below /proc)] of all processes. If the one with the pid `first`
    began a moment ago (since: its start, ticks since boot): of those that have begun since, inode 0. The
    kernel gives one number after the other, also to threads, so a new thread's is the last of them; and a
    host may have thousands of processes."""
    made = []
    if first and seconds_since(since) < MOMENT and hasattr(threading, "get_native_id"):   # Python 3.8
        thread = threading.Thread(target=lambda: made.append(threading.get_native_id()), daemon=True)
        thread.start()
        thread.join()
    if made and first <= made[0] < first + MOST_PIDS:
        return [(b"%d" % pid, 0) for pid in range(first, made[0])]
    with os.scandir(b"/proc") as there:                # a pid that is used again has another inode
        return [(one.name, one.inode()) for one in there if one.name.isdigit()]


def works_in(work, pid, terminal, mark):
    """Is this process (its number and terminal as bytes) a left-over of the command in work? OSError."""
    top = b"/proc/" + pid + b"/"
    return (int(pid) != os.getpid()
            and any((place + b"/").startswith(work + b"/") for place in places_held_by(top))
            and (terminal == b"0" or has_mark(top, mark)))


def places_held_by(top):
    """The current directory, and what is open to write, of the process with the directory `top` below
    /proc. OSError."""
    yield os.readlink(top + b"cwd")
    for fd in os.listdir(top + b"fd"):
        try:
            if os.lstat(top + b"fd/" + fd).st_mode & 0o200:
                yield os.readlink(top + b"fd/" + fd)
        except OSError:
            pass                                       # closed meanwhile: no other one is missed for it


# Cleaning

def remove_tree(path):
    """Removes a directory (bytes path) with all that is in it, however deep: what is read-only is made
    writable first, no link is followed. Returns the names of what could not be removed, with the
    reasons."""
    left, todo, number, mark = [], [path], 0, os.urandom(8).hex().encode()

    def attempt(what, *words):
        try:
            return what(*words)
        except FileNotFoundError:                      # gone meanwhile
            return None
        except OSError as error:
            return left.append("%s: %s" % (shown(words[0]), error.strerror))

    if not os.path.isdir(path) or os.path.islink(path):
        attempt(os.unlink, path)
        return left
    while todo:                                        # what lies deeper is brought up: no path gets long
        folder = todo.pop()
        make_writable(folder)
        for number, leaf in enumerate(attempt(os.listdir, folder) or (), number + 1):
            one = os.path.join(folder, leaf)
            info, higher = attempt(os.lstat, one), os.path.join(path, b".removed.%s.%d" % (mark, number))
            if info and not stat.S_ISDIR(info.st_mode):
                attempt(os.unlink, one)
            elif info and (folder == path or renamed_to(one, higher)):
                todo.append(one if folder == path else higher)
            elif info:                                 # another user's
                left += remove_tree(one)
        if folder != path:
            attempt(os.rmdir, folder)
    attempt(os.rmdir, path)
    return left


def make_writable(folder):
    """Lets this user change what is in it, if it is this user's."""
    try:
        os.chmod(folder, 0o700)
    except OSError:
        pass                                           # what cannot be removed tells


def renamed_to(folder, higher):
    """Could the directory be given that name?"""
    make_writable(folder)
    try:
        os.rename(folder, higher)
        return True
    except OSError:
        return False


# Who else may write there

def open_to_others(base, known=False):
    """Why nothing may be run in the directory base (bytes, a real path), or None: who may write there, or to
    one that it stands in, could prepare what is run. known: who owns a directory above, and its group,
    may."""
    above = [base[:at] or b"/" for at, letter in enumerate(base.decode("latin-1")) if letter == "/"]
    for path in [os.path.join(base, b".mi"), base] + above[::-1]:
        if os.path.exists(path):                       # else it will be ours
            why = writable_by_others(os.stat(path), path in above, known)
            if why:
                return why % shown(path)
    return None


def writable_by_others(info, above, known):
    """open_to_others() of one directory with this stat; a text with a place for its name, or None. above:
    base stands in it. (In /tmp and its like others may not exchange what is there.)"""
    trusted = known and above
    sticky = above and info.st_mode & stat.S_ISVTX and info.st_uid == 0
    if info.st_uid not in (0, os.geteuid()) and not trusted:
        return _("%s: belongs to somebody else")
    if info.st_mode & (0o002 if trusted else 0o022) and not sticky:
        return _("%s: others may write to it")
    return None


# The disk, and what /proc tells

def write_synced(path, data, mode=0o600):
    """data (bytes) into a new file at path (bytes), on disk before this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        view = memoryview(data)
        while len(view):
            view = view[os.write(fd, view):]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_path(path):
    """The folder's entries, on disk before this returns (where the file system can: FUSE and CIFS may know no
    fsync of directories)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def read_small(path):
    """A file of /proc of at most 4096 bytes, with as few system calls as can be: there are many. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


@functools.lru_cache(maxsize=None)
def boot_id():
    """This boot of this host ('?' where /proc does not tell)."""
    try:
        return read_small("/proc/sys/kernel/random/boot_id").decode().strip()
    except OSError:
        return "?"


def stat_of(pid):
    """What /proc tells of a process: state, parent, session, terminal, start (ticks since boot), the signal
    that its end sends, all as bytes. OSError."""
    words = stat_words(b"/proc/%d/" % pid)
    return words[0], words[1], words[3], words[4], words[19], words[35]


def stat_words(top):
    """The fields of /proc/PID/stat behind the name, for the directory `top` below /proc. OSError."""
    return read_small(top + b"stat").rpartition(b") ")[2].split()


def seconds_since(start):
    """Seconds since a process began; start: as stat_of() has it."""
    return time.clock_gettime(7) - int(start) / os.sysconf("SC_CLK_TCK")         # 7: seconds since boot
# ==== end shared ====


# ==== shared: batch ====
# Batch systems. A job is the wrapper, submitted; its `end` is the truth, a queue only says "not yet". One
# query tells of all jobs.
JOB_HEAD = r"""#!/bin/sh
# What a batch system is given. Each line of the file `words` is one word of what it runs: no shell reads
# anything into them.
control={control}
set --
while IFS= read -r word; do set -- "$@" "$word"; done <"$control/words"
"""
JOB_EXEC = 'exec "$@"\n'       # Slurm and PBS signal every process of a job
JOB_WAIT = r"""note="$control/child"
trap 'kill -TERM $!; IFS= read -r pid <"$note"; case $pid in [1-9]*) kill -TERM "${pid%% *}";; esac' TERM
# (HTCondor signals this one only, then kills all. A note that is written while it is read begins with blanks:
# no number to send a signal to.)
"$@" &
while kill -0 $! 2>/dev/null; do wait $!; done
"""
# the shell has our lock as its stdin; what it starts (also qsub's background process) has the job
SUBMIT_SHELL = '"$@" <"$0"; exit $?'
QUERY_TIME = 30  # seconds that a program of a batch system may take (Slurm's give a controller up after ten)
# bytes of an answer that are kept: some 50,000 jobs in Slurm's, 2,000 in PBS's; more is no answer
ANSWER_MOST = 8 << 20
# seconds that `end` may come after the queue's word that the job is over (NFS), and that word after `end`
END_LATE = 30
PAST_ASKED = 600                 # seconds for which PBS is asked of a job that has ended oddly
# seconds for which a queue must not know a job, of which it is unsure whether it was sent, before it is sent
# again
SENT_LATE = 60
# in the words of a submission that failed (as a text: to compile it is for who needs it, not for every start)
PERHAPS_SENT = r"(?i)timed? ?out|zero bytes|connect|commit|End of File|no answer"
LOCK_HELD = "held"                  # try_lock()'s word
# exit codes after which the queue is asked whether it was the batch system's doing (KILL, USR2, TERM, XCPU)
KILLED_CODES = (137, 140, 143, 152)
# what its own programs see of the environment
CLIENT_ENV = re.compile(
    r"(SLURM_(CONF|CLUSTERS)|PBS_(CONF_FILE|EXEC|DEFAULT|SERVER)|CONDOR_CONFIG|_CONDOR_[A-Z_]+)\Z")
# MI_RUN = ACCEPT_ID.N, by which a job is found again
RUN_MARK = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\.\d+"
# state: queued, held, running, suspended, done, over (badly)
JobSeen = collections.namedtuple("JobSeen", "job mark state node text")
BatchSystem = collections.namedtuple("BatchSystem", (
    "programs",                # what must be there
    "submit",                  # submit(control, run, options): the argument vector that submits
    "number",                  # expression: the job's number in what that answers
    "ask",                     # ask(job numbers, or none): the argument vector of one query for all
    "past",                    # past(job numbers, or marks): the same for jobs that the queue has forgotten
    "ours",                    # ours(): the argument vector that asks for this user's numbers, where queries
                               # are by number: in the variables of another user's job, rows that look like
                               # ours can stand; None where one query is for all
    "one_line",                # words by which one connection does for all numbers, where they are known
    "marks",                   # how a job is found whose number is not known: "past" is asked for its mark,
                               # "ours" for its name, None: not at all
    "trim",                    # what takes out of an answer what nobody reads, or None
    "partial",                 # expression: stderr lines beside which a failed query is an answer
    "read",                    # read(answer): every JobSeen in it
    "cancel", "force",         # (job number): the argument vectors that end it; force is None: it needs none
    "sure", "away", "wrong",   # refusals of a submission: for good · that pass · for good if not the others
    "line_options",            # is an option of the submission a whole line?
    "cluster",                 # expression: options that name a cluster
    "never",                   # expression: options that cannot be
    "run",                     # the end of a job's script, behind JOB_HEAD
    "said"))                   # expression: lines of the job's own log about an end of the system's doing


# A job

class BatchJob:
    """The job of one control directory (bytes). Its file `batch` (fsynced): run, submit = the argument
    vector, sent = times, job = number. grace: seconds that a job may be unknown to the queue; poll: see
    BatchQueue; fault: a fault point."""

    def __init__(self, control, queue, poll, grace, fault=lambda name: None):
        self.control = control
        self.queue = queue
        self.poll = poll
        self.grace = grace
        self.fault = fault
        self.submission = read_batch(control)          # what stands in the file `batch`
        self.failing = None                            # since when no submission could be made
        self.failed = ""                               # why none can ever be
        self.unsure = True                             # may the last attempt have been one?
        self.no_program = False                        # is the program that submits not there?
        self.submitted_at = 0                          # when it was started last
        # the first and the last answer of after the submission that do not name it: [(its time, when we saw
        # it)]; that, and all that follows, is time.monotonic()
        self.unknown_since = []
        self.over_since = None                         # the queue says that it is over, or we do
        self.off_since = None                          # it was started, and waits again
        self.stops_noted = []                          # see stop_times()
        self.stop_tried = None
        self.where = ""                                # for people
        self.node = ""
        self.why = ""                                  # the batch system's words
        self.tells_log = True                          # may words of the job's own log leave?

    def path(self, name):
        return os.path.join(self.control, name)

    def save(self, **more):
        """The file `batch`, on disk before this returns."""
        self.submission = dict(self.submission, t=time.time(), **more)
        write_synced(self.path(b"batch.new"), json.dumps(self.submission).encode())
        os.rename(self.path(b"batch.new"), self.path(b"batch"))
        sync_path(self.control)

    def begin(self, work, argv, env, run, options, **more):
        """Writes what is submitted, and submits it: argv in the directory work (bytes) with env. ValueError
        if the system cannot be told."""
        pairs = ["%s=%s" % item for item in sorted(env.items()) if item[0] not in ("PATH", "TMPDIR")]
        words = ["/usr/bin/env", "PATH=" + WRAPPER_PATH] + pairs
        words += ["/bin/sh", self.control + b"/run", self.control, work, "/usr/bin/env",
                  "PATH=" + env.get("PATH", WRAPPER_PATH)] + argv
        words = [word if isinstance(word, bytes) else utf8(word) for word in words]
        if any(b"\n" in word for word in words):
            raise ValueError(_("a line break in an argument or a variable"))
        import shlex
        control = self.control.decode("utf-8", "surrogateescape")
        submit = self.queue.table.submit(control, run, options)
        if os.path.exists(self.path(b"alive")):
            os.unlink(self.path(b"alive"))             # a FIFO tells nothing between two hosts
        write_synced(self.path(b"words"), b"\n".join(words) + b"\n")
        text = JOB_HEAD + self.queue.table.run
        write_synced(self.path(b"job"), utf8(text.replace("{control}", shlex.quote(control))), 0o700)
        self.save(system=self.queue.system, run=run, submit=submit, sent=0, job="", why="", **more)
        self.submit()

    def submit(self):
        """Submits, unless that is under way or done, or others of the queue take long over it. Whoever does
        it holds the lock of `job`, and so does the shell that waits for the program: while that lives, also
        without us, nobody takes the job for lost."""
        if not self.queue.submitting.acquire(timeout=1):
            return
        lock = os.open(self.path(b"job"), os.O_RDONLY)
        try:
            why = try_lock(lock)
            if why:
                return self.not_now(why)
            self.submission = read_batch(self.control)
            if self.submission["job"] or not os.path.exists(self.path(b"ready")):
                return
            self.save(sent=self.submission["sent"] + 1)
            self.submitted_at = time.monotonic()
            self.fault("submitting")
            words = ["/bin/sh", "-c", SUBMIT_SHELL,
                     self.path(b"job").decode("utf-8", "surrogateescape")] + self.submission["submit"]
            code, out, err = call_batch_program(words, self.queue.env, lock)
            self.fault("submitted")
            found = re.findall(self.queue.table.number, out, re.M)
            if code == 0 and found:
                self.save(job=found[-1], why="")
                self.failing, self.why = None, ""
                self.fault("number noted")
            else:
                self.submission_failed(code, " ".join((err or out).split())[:300] or "exit code %s" % code)
        finally:
            os.close(lock)
            self.queue.submitting.release()

    def not_now(self, why):
        """Nothing is submitted: another process does it just now (LOCK_HELD), or no lock can be had, which is
        said; current_state() tries again."""
        if why == LOCK_HELD:
            return
        text = _("no lock can be had beside its notes (%s); it is not submitted until there is one") % why
        if text != self.why:
            log("error", self.submission["run"].rpartition(".")[0], "batch", why=text)
        self.why = text

    def submission_failed(self, code, text):
        """A submission failed: for good, or (perhaps it did not) the queue is looked at and it is sent
        again."""
        table, self.no_program = self.queue.table, code in (126, 127)
        self.why = "%s: %s" % (self.submission["submit"][0], printable(text))
        self.unsure = bool(re.search(PERHAPS_SENT, text))
        try:
            if self.submission.get("why") != self.why:
                self.save(why=self.why)                # for `list` and `show`
        except OSError:
            pass                                       # a full disk: it is said, and not kept
        final = re.search(table.sure, text)
        away = not final and (code is None or re.search(table.away, text)) and not self.no_program
        self.failing = None if away else self.failing or time.monotonic()
        wrong = re.search(table.wrong, text) and not self.no_program
        if final or not away and (wrong or time.monotonic() - self.failing > self.grace):
            self.failed = self.why

    def under_way(self):
        """Does a program that submits this job still run?"""
        with open(self.path(b"job"), "rb") as lock:
            return try_lock(lock) == LOCK_HELD

    def current_state(self):
        """(state, detail): queued, running; ended: detail the exit code, as command_state() has it; lost:
        detail why. self.where: for people; self.why: the batch system's own words about an end that was its
        doing."""
        state, detail = batch_command_state(self.control)
        if not self.submission["job"]:                 # another process may have submitted it
            self.submission = read_batch(self.control) or self.submission
        now, when, row = time.monotonic(), 0, None     # a clock that is set moves no time limit
        asks = state != "ended" or ended_oddly(self.control, detail)
        if asks:
            when, row = self.queue.seen(self.submission["run"], self.submission["job"], self.poll)
        waits = row is not None and row.state in ("queued", "held")
        if state == "ended" and (not asks or not waits and self.end_explained(now)):
            self.why = self.log_words() if detail else ""
            return state, detail
        if row is not None:
            return self.as_seen(row, when, state, detail, now)
        return self.as_unseen(when, state, detail, now)

    def as_unseen(self, when, state, detail, now):
        """current_state(), where the queue does not name the job."""
        if self.failed and (state == "stopped" or state == "ready" and self.take_ready()):
            return "lost", self.failed
        missing = self.unknown_for(when, now)
        if state == "stopped":
            if self.surely_not_there(now):
                return "lost", "cancelled"
        elif state == "ready" and not self.submission["job"] and self.may_send(now, missing):
            if not self.under_way():
                self.unknown_since = []
                self.submit()
        elif missing >= self.grace and state != "ended":
            self.stop()                                # should it run all the same
            return "lost", "%s does not know job %s any more%s" % (
                self.queue.system, self.submission["job"], self.log_words(", "))
        self.tell_where(state, detail)
        return ("queued" if state in ("ready", "stopped") else "running"), detail

    def unknown_for(self, when, now):
        """Seconds for which the queue has answered without naming the job; -1 until two answers have. when:
        the time of its last one. An outage counts for nothing."""
        known = self.unknown_since
        if is_later(when, self.submission["t"]) and when not in [told for told, _at in known]:
            steady = known and now - known[-1][1] < 3 * self.poll + 2 * QUERY_TIME
            self.unknown_since = known = (known[:1] if steady else []) + [(when, now)]
        if known and self.submission["sent"]:
            self.queue.missed.add(self.submission["job"] or self.submission["run"])
        return known[-1][1] - known[0][1] if len(known) > 1 else -1

    def surely_not_there(self, now):
        """Is there no job, where none can start any more? One that was sent and has no number may come to be
        known yet."""
        self.over_since = self.over_since or now
        return (self.submission["job"] or not self.submission["sent"] or len(self.unknown_since) > 1
                or now - self.over_since > max(END_LATE, 3 * self.poll))

    def tell_where(self, state, detail):
        """self.where and self.node of a job that the queue does not name."""
        why = self.why or self.queue.known.get("why")
        if state == "running":
            self.node, self.where = detail.host, running_on(detail.host, None)
        elif state != "ended":
            self.node = ""
            self.where = "queued" if self.submission["job"] else "submitting"
            self.where = "queued (%s)" % why if why else self.where

    def may_send(self, now, missing):
        """May it be submitted (again)? Once the queue does not know it for `missing` seconds, longer if that
        attempt may have been one; at once if it certainly was none: its program is not there."""
        if self.no_program and now - self.submitted_at > max(1, self.poll):
            return True
        return not self.submission["sent"] or missing >= (self.unsure and min(self.grace, SENT_LATE))

    def as_seen(self, row, when, state, detail, now):
        """current_state(), where the queue names the job."""
        self.unknown_since = []
        if not self.submission["job"]:
            self.save(job=row.job, why="")             # the submission of before had happened
            self.failing, self.failed, self.why = None, "", ""
        if row.state in ("done", "over"):
            return self.as_over(row, state, detail, now)
        self.over_since = self.over_since if state == "ended" else None
        if row.state in ("queued", "held") and state in ("running", "ended"):
            return self.taken_off(row, when, state, detail, now)
        self.off_since = None
        if state == "running" or row.state in ("running", "suspended"):
            self.node = detail.host if state == "running" else row.node
            self.where = running_on(self.node, row)
        else:
            self.node, self.where = "", "queued (%s)" % row.text
        return ("running" if state in ("running", "ended") else "queued"), detail

    def as_over(self, row, state, detail, now):
        """current_state(), where the queue says that the job is over."""
        self.over_since = self.over_since or now
        if state == "ended":
            self.why = self.words_of(row) if row.state == "over" else self.log_words()
            return state, detail
        if state == "stopped":
            return "lost", "cancelled"
        if self.take_ready() or now - self.over_since > min(self.grace, END_LATE):
            return "lost", self.words_of(row) + (", its end unknown" if row.state == "done" else "")
        return "running", detail

    def words_of(self, row):
        """What the queue and the job's own log say of it."""
        node = " on " + row.node if row.node else ""
        return "%s: %s%s%s" % (self.queue.system, row.text, node, self.log_words(", "))

    def taken_off(self, row, when, state, detail, now):
        """current_state(), where the queue has a job waiting that was started: it was held, preempted or
        requeued, and will not be run again."""
        self.off_since = self.off_since or (time.time(), now)
        if state == "running":
            self.node, self.where = detail.host, "running on %s (%s)" % (detail.host, row.text)
        waits, limit = now - self.off_since[1], self.grace
        if state == "ended":
            limit = 0
        elif row.state == "held":
            limit = min(self.grace, END_LATE)
        # (the answer before may be of before the start)
        if waits > self.grace or is_later(when, self.off_since[0]) and waits > limit:
            if self.stop() or waits > 2 * self.grace:  # what has ended here leaves no job there
                self.why = self.words_of(row)
                return (state, detail) if state == "ended" else ("lost", self.why)
        return "running", detail

    def end_explained(self, now):
        """Is all known of an end by a signal? It is, once the log tells, or the queue had its time
        (current_state() asks it), or we cancelled it."""
        self.over_since = self.over_since or now
        return self.stop_times() or self.log_words() or now - self.over_since > max(END_LATE, self.poll)

    def log_words(self, before=""):
        """What the batch system wrote about an end of its doing into the job's own log, after `before`; '' if
        nothing, or if none of it may leave."""
        said, log = self.queue.table.said, tail_of(self.path(b"batch.log")) if self.tells_log else ()
        rows = [row.strip() for row in log if re.match(said, row)]
        return before + printable("; ".join(rows[-2:]))[:300] if rows else ""

    def take_ready(self):
        """From now on it cannot start any more: True. False if it did."""
        try:
            os.unlink(self.path(b"ready"))
            return True
        except FileNotFoundError:
            return False

    def stop_times(self):
        """When (time.time()) the queue took our word that the job is to end, and then, if it must, by force:
        a list of none, one or two."""
        try:
            with open(self.path(b"batch.stop")) as text:
                self.stops_noted = max([float(word) for word in text.read(100).split()], self.stops_noted,
                                       key=len)
        except (OSError, ValueError):
            pass
        return list(self.stops_noted)

    def stop(self, grace=10):
        """Has the queue end the job: once, for each time may start its grace anew; again, at most once per
        poll, if that failed; and by force when current_state() does not say `grace` seconds later that it is
        over. True once the queue has taken it."""
        self.take_ready()
        job, table, told, now = self.submission["job"], self.queue.table, self.stop_times(), time.monotonic()
        due = not told or len(told) == 1 and table.force and not 0 <= time.time() - told[0] < grace
        if job and due and (self.stop_tried is None or now - self.stop_tried >= self.poll):
            self.stop_tried = now
            words = table.force(job) if told else table.cancel(job)
            if call_batch_program(words, self.queue.env)[0] == 0:
                told, self.stop_tried = told + [time.time()], None
                self.stops_noted = told
                try:
                    write_synced(self.path(b"batch.stop"), utf8(" ".join(map(repr, told))))
                except OSError:
                    pass                               # a full disk: this process remembers it
        return bool(told) or not job


def read_batch(control):
    """What is known of a control directory's job (see BatchJob): {} if nothing was submitted, or nothing of
    it can be read."""
    try:
        with open(os.path.join(control, b"batch"), "rb") as text:
            found = json.loads(text.read().decode("utf-8"))
        whole = ({"system", "run", "submit", "sent", "job", "t"} <= set(found)
                 and found["system"] in BATCH_SYSTEMS)
        return found if isinstance(found, dict) and whole else {}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def batch_command_state(control):
    """As command_state(), for a command that may run on another host: by its files alone. ready: not started
    · running: detail its ProcessNote · ended: detail its exit code, None if it could not be started ·
    stopped: it can never start."""
    names = os.listdir(control)                        # over NFS this also asks for the newest
    child = read_note(os.path.join(control, b"child"))
    end = read_note(os.path.join(control, b"end")) if b"end" in names else None
    if end is not None:
        return "ended", exit_code(child, end)
    if b"start" in names:
        unknown = ProcessNote(0, "?", "?", "?", "", time.time())
        return "running", child or read_note(os.path.join(control, b"start")) or unknown
    return ("ready" if b"ready" in names else "stopped"), None


def batch_state(folder, control):
    """(queued, running, stopped or ended, text for people) of a control directory's job below folder, as far
    as is known without asking."""
    state, detail = batch_command_state(control)
    if state not in ("ready", "running"):
        return state, ""
    submission = read_batch(control)
    row = seen_before(folder, submission)
    if state == "running":
        return state, running_on(detail.host, row)
    why = row.text if row else submission.get("why", "")
    return "queued", "queued" + (" (%s)" % why if why else "")


def running_on(node, row):
    """Where a job runs, for people; row: its JobSeen, or None."""
    return "running on " + node + (" (%s)" % row.text if row and row.state == "suspended" else "")


def seen_before(folder, submission):
    """The JobSeen of a job in the last answers below folder, or None."""
    found = None
    for name in os.listdir(folder):
        if name.startswith(utf8("queue." + submission["system"])) and not name.endswith((b".lock", b".new")):
            try:
                rows = read_answer(os.path.join(folder, name))[1]
                found = [row for row in rows if row.mark == submission["run"]
                         or row[:2] == (submission["job"], None)][0]
            except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
                pass                                   # it has not been asked yet
    return found


def is_later(when, then):
    """Is an answer of `when` later than `then` (both time.time())? If `then` is to come, the clock was set
    back: it may be."""
    return when > then or then > time.time()


def ended_oddly(control, code):
    """May an end with this exit code be the batch system's doing: by a signal, or after the wrapper was told
    to end?"""
    return code in KILLED_CODES or os.path.exists(os.path.join(control, b"told"))


# The queue: one query for all jobs

class BatchQueue:
    """What a batch system says of this user's jobs. However many threads and processes wait below a folder
    (bytes), it is asked once in `poll` seconds, beside their waiting, and not at all when nobody waits: the
    answer lies in a file of the folder."""

    def __init__(self, folder, system, env):
        self.system = system
        self.table = BATCH_SYSTEMS[system]
        self.folder = folder
        self.env = dict(env, SQUEUE_FEDERATION="1")   # a federation's other clusters too; nothing to the rest
        client = sorted(item for item in env.items() if CLIENT_ENV.match(item[0]))
        name = "queue." + system + (".%08x" % binascii.crc32(utf8(repr(client))) if client else "")
        self.path = os.path.join(folder, utf8(name))   # the last answer
        self.stamp = None                              # inode and mtime of it, when it was read
        self.known = {"tried": 0, "t": 0, "rows": []}  # what stands in it
        self.rows = {}                                 # {job or mark: its JobSeen} of it
        self.past = {}                                 # the same of jobs that the queue has forgotten
        self.missed = set()                            # jobs (or marks) that the last answers do not name
        self.turn = False                              # is the next query for these?
        self.asking = False                            # does a thread of this process ask just now?
        self.together = None        # does qstat know -E (one connection for all numbers)? None: not asked yet
        self.lock = threading.Lock()
        self.submitting = threading.Lock()             # one submission at a time

    def load(self):
        """Reads the answer's file if it is another one than before."""
        try:
            info = os.stat(self.path)
            if (info.st_ino, info.st_mtime) == self.stamp:
                return
            known, found = read_answer(self.path)
            self.known = dict(known, tried=float(known["tried"]), t=float(known["t"]))
            self.stamp = info.st_ino, info.st_mtime
            self.rows = {row.job: row for row in found}
            found.sort(key=lambda row: row.state not in ("done", "over"))
            self.rows.update((row.mark, row) for row in found if row.mark)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass                                       # not there yet, or broken: it is written anew

    def seen(self, mark, job, poll):
        """(time of the last answer, that job's JobSeen or None). Has the queue asked anew, beside, if it is
        older than poll seconds."""
        with self.lock:
            self.load()
            if not self.asking and self.due(poll):
                self.asking = True
                threading.Thread(target=self.ask, args=(poll,), daemon=True).start()
            row = self.rows.get(mark) or self.rows.get(job)
            if row is not None and row.mark not in (mark, None):
                row = None                             # a number that was given again
            return self.known["t"], row or self.past.get(job) or self.past.get(mark)

    def due(self, poll):
        """Is the last query older than that, or from the future (the clock was set back)?"""
        return not 0 <= time.time() - self.known["tried"] < poll

    def ask(self, poll):
        """One query, or none if another process makes it just now. (Where there are no locks, each process
        asks for itself.)"""
        try:
            with open(self.path + b".lock", "ab") as lock:
                if try_lock(lock) == LOCK_HELD:
                    return
                with self.lock:
                    self.load()
                    missed, began = sorted(self.missed), time.time()
                    # a query for those that vanished comes in place of one for all
                    self.turn = bool(missed) and not self.turn
                if self.due(poll):
                    self.query(began, missed)
        except OSError:
            pass
        finally:
            self.asking = False

    def query(self, began, missed):
        """Asks for what is in the queue, or what became of those that are not."""
        known = dict(self.known, tried=began, why="")
        self.missed.clear()                            # whoever still misses one says so again
        try:
            found = self.jobs_seen(self.vanished(missed) if self.turn else self.numbers())
            if self.turn:
                self.past = {name: row for row in found if row.state in ("done", "over")
                             for name in (row.mark, row.job) if name}
            else:
                known.update(t=began, rows=[list(row) for row in found])
        except ValueError as error:
            self.together = self.together and "invalid option" not in str(error)
            known["why"] = printable(error)[:200]
            log("debug", None, "queue", why=known["why"])
        new = self.path + b".new"
        with open(new, "wb") as out:
            out.write(json.dumps(known).encode())
        os.rename(new, self.path)

    def jobs_seen(self, jobs):
        """Every JobSeen of what the batch system answers about these (None: all); where it is asked by number
        no others count. ValueError."""
        answer = self.query_answer(self.query_words(jobs)) if jobs != [] else ""
        ours = {job.split(".")[0] for job in jobs} if self.table.ours else ()
        return [row._replace(job=row.job[:100], node=printable(row.node)[:100],
                             text=printable(row.text)[:300])
                for row in self.table.read(answer) if not ours or row.job.split(".")[0] in ours]

    def query_answer(self, words):
        """What a program of the batch system answered. ValueError with who said what, if it is no answer."""
        code, out, err = call_batch_program(words, self.env, keep=self.table.trim)
        said = (err.strip() or "?").splitlines()
        if code is None or code and not all(re.match(self.table.partial, line) for line in said):
            raise ValueError("%s: %s" % (words[0], " ".join(err.split())[:200] or "exit code %s" % code))
        return out

    def ask_ours(self):
        """The argument vector that asks for this user's jobs, or, where one query is for all, for all."""
        return self.table.ours() if self.table.ours else self.table.ask([])

    def query_words(self, jobs):
        """The argument vector of a query. A connection and a privileged port for each number, as qstat has it
        without -E, lock others out."""
        words = self.table.past(jobs) if self.turn else self.table.ask(jobs)
        if not self.table.one_line or len(jobs) < 2:
            return words
        if self.together is None:                      # Torque's has no -E
            code, out, err = call_batch_program(["qsub", "--version"], self.env)
            self.together = None if code is None else "pbs_version" in out + err
        return words[:1] + self.table.one_line * bool(self.together) + words[1:]

    def vanished(self, missed):
        """Of the names in missed (a job's number, or, if that is not known, its mark) those that may be asked
        for."""
        marks = [name for name in missed if re.match(RUN_MARK, name)]
        jobs = [name for name in missed if name not in marks]
        if self.table.marks == "past":
            return jobs or marks
        for mark in marks[:20] if self.table.marks == "ours" else ():
            code, out, _err = call_batch_program(self.table.ours() + ["-x", "-N", pbs_name(mark)], self.env)
            if code is None:
                raise ValueError("qselect: no answer")
            jobs += re.findall(r"^\d\S*$", out, re.M)
        return jobs

    def settled(self, control):
        """Has its command ended, and not just now in a way that the queue may know more of?"""
        try:
            ended = time.time() - os.stat(os.path.join(control, b"end")).st_mtime
        except OSError:
            return False
        return abs(ended) > PAST_ASKED or not ended_oddly(control, batch_command_state(control)[1])

    def numbers(self):
        """The jobs below the folder that have not ended, where the system is asked by number; all of this
        user's if one's is not known. None where it is asked for all."""
        found = []
        if not self.table.ours:
            return None
        for name in os.listdir(self.folder):
            control = os.path.join(self.folder, name)
            if os.path.exists(os.path.join(control, b"batch")) and not self.settled(control):
                job = read_batch(control)
                if not job.get("job") or job.get("sent", 0) > 1:
                    return re.findall(r"^\d\S*$", self.query_answer(self.ask_ours()), re.M)
                found.append(job["job"])
        return found


def read_answer(path):
    """(what a BatchQueue has noted, every JobSeen in it). OSError, ValueError, KeyError, TypeError,
    RecursionError."""
    with open(path, "rb") as text:
        known = json.loads(text.read().decode("utf-8"))
    return known, [JobSeen(*row) for row in known["rows"]]


def try_lock(lock):
    """"" if this process has the lock of that open file now; LOCK_HELD if another one has it; else why there
    are no locks."""
    import fcntl
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except OSError as error:
        return LOCK_HELD if error.errno in (errno.EAGAIN, errno.EACCES) else error.strerror


def call_batch_program(words, env, stdin=subprocess.DEVNULL, keep=None):
    """(exit code, stdout, stderr) of a batch system's own program; 127 if it is not there, None if it did not
    answer in time, or without end. keep: see hear_batch_program()."""
    try:
        child = subprocess.Popen(
            [utf8(word) for word in words], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={utf8(key): utf8(value) for key, value in env.items()}, cwd=b"/", start_new_session=True)
    except OSError as error:
        return 127, "", "%s: %s" % (words[0], error.strerror)
    until = time.monotonic() + QUERY_TIME
    with child.stdout, child.stderr:
        out, err, code = hear_batch_program(child, until, keep)
    try:
        if code is not None:
            code = child.wait(max(0.1, until - time.monotonic()))
        else:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(5)                              # on a file system that is away not even that ends it
    except (subprocess.TimeoutExpired, PermissionError):
        code = None
    return code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


def hear_batch_program(child, until, keep):
    """(stdout, stderr, 0) of a child when both are closed; (b"", why, None) if that is not so at `until`
    (time.monotonic()), or it is too much. keep(stdout so far): what is wanted of that, for answers that are
    long."""
    poller, out, err, done = select.poll(), bytearray(), bytearray(), 0
    into = {child.stdout.fileno(): out, child.stderr.fileno(): err}
    for pipe in into:
        poller.register(pipe, select.POLLIN)
    while into:
        ready = poller.poll(max(0, until - time.monotonic()) * 1000)
        if not ready or time.monotonic() > until:
            return b"", b"no answer", None
        for pipe, _event in ready:
            data = os.read(pipe, 65536)
            into[pipe] += data
            if not data:
                poller.unregister(pipe)
                del into[pipe]
        del err[65536:]
        if keep and len(out) - done > 1 << 20:
            out[:] = keep(bytes(out))
            done = len(out)
        if len(out) > ANSWER_MOST:
            return b"", b"an answer without end", None
    return out, err, 0


def missing_batch_program(system, env):
    """The first of a batch system's programs that is not in the PATH of env, and what to do, for people; None
    if all are there."""
    import shutil
    for program in BATCH_SYSTEMS[system].programs.split():
        if not shutil.which(program, path=env.get("PATH", WRAPPER_PATH)):
            return _("%s: not found in PATH: the batch system's own programs are needed on this host"
                     " (env.PATH of its section in the ini; for ssh without a guard: `module load`, or PATH,"
                     " at the top of ~/.bashrc there)") % program
    return None


# What a job is submitted with

def check_options(system, options):
    """ValueError if with these options it were not one job that runs one command, found again by its
    number."""
    if any(re.match(BATCH_SYSTEMS[system].cluster, option) for option in options):
        raise ValueError(_("which cluster it is, every program must know: env.SLURM_CLUSTERS = NAME, no"
                           " --clusters"))
    never = re.search(r"^(?:%s).*(\n(?!-).*)?" % BATCH_SYSTEMS[system].never, "\n".join(options), re.M)
    if never:
        raise ValueError(_("%s: one job that runs one command, and a submission that returns at once:"
                           " nothing else can be used") % " ".join(never.group().split()))


def submit_options(keys, words):
    """(options of the submission, the words that are left): words `batch.NAME=VALUE` set what
    batch_changeable lets them. ValueError."""
    import shlex
    given, rest, options = {}, [], []
    for word in words:
        found = re.match(r"batch\.([a-z_]+)=(.*)\Z", word) if keys["batch"] != "none" else None
        if found is None:
            rest.append(word)
        else:
            given[found.group(1)] = found.group(2)
    whole_lines = keys["batch"] != "none" and BATCH_SYSTEMS[keys["batch"]].line_options
    for line in keys["batch_options"]:
        options += [line] if whole_lines else shlex.split(line)
    options += changed_options(keys["batch_changeable"], given)
    if keys["batch"] != "none":
        check_options(keys["batch"], options)
    return options, rest


def changeable_options(text):
    """batch_changeable: a line `NAME[=DEFAULT] OPTION-WITH-{} EXPRESSION` each, as [(name, default or None,
    option, expression)]."""
    found = []
    for line in lines(text):
        words = line.split(None, 2)
        name, equals, default = words[0].partition("=")
        good = len(words) == 3 and words[1].count("{}") == 1 and re.match(r"(-|\+?[A-Za-z_]+=)", words[1])
        if not good or not re.match(r"[a-z_]+\Z", name):
            raise ValueError(_("is not NAME OPTION-WITH-{} EXPRESSION: %s") % line)
        if equals and not re.fullmatch(words[2], default):
            raise ValueError(_("the default does not match the expression: %s") % line)
        found.append((name, default if equals else None, words[1], re.compile(words[2])))
    return found


def changed_options(changeable, given):
    """The options that the owner lets a request change (see changeable_options), with the values that are
    given {name: text}, or their defaults. ValueError if one may not be set, or not to that."""
    found = []
    for name, default, option, expression in changeable:
        value = given.pop(name, default)
        if value is not None:
            if not expression.fullmatch(value) or has_control_chars(value) or "$" in value:
                raise ValueError(_("batch.%s may not be %s here") % (name, value))
            found.append(option.replace("{}", value))
    if given:
        raise ValueError(_("batch.%s may not be set here") % sorted(given)[0])
    return found


def user_name():
    """This user's name; None if it has none."""
    import pwd
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None


def is_ours(name):
    """Is that owner of a job (USER@HOST, DOMAIN\\USER) we? True if nobody is named. A mark in another user's
    job is no mark."""
    me = user_name()
    return (not name or me is None
            or len({str(text).split("\\")[-1].split("@")[0].lower() for text in (name, me)}) == 1)


# Slurm

def slurm_submit(control, run, options):
    """The argument vector that submits."""
    return ["sbatch", "--parsable", "--comment=" + run] + options + [
        "--no-requeue", "--job-name=mi-" + run, "--input=/dev/null",
        "--output=%s/batch.log" % control.replace("%", "%%"), control + "/job"]


SLURM_STATES = {               # all others: running, but what is requeued
    "PENDING": "queued", "CONFIGURING": "queued", "SUSPENDED": "suspended", "STOPPED": "suspended",
    "COMPLETED": "done", "BOOT_FAIL": "over", "CANCELLED": "over", "DEADLINE": "over", "FAILED": "over",
    "LAUNCH_FAILED": "over", "NODE_FAIL": "over", "OUT_OF_MEMORY": "over", "PREEMPTED": "over",
    "RECONFIG_FAIL": "over", "TIMEOUT": "over"}


def slurm_read(text):
    """Every JobSeen in what squeue or sacct answered. ValueError if it is neither's."""
    found = []
    for line in text.split("\n"):
        row = re.match(r"(\d[^|\s]*)\|([A-Z_]+(?: [^|]*)?)\|([^|]*)\|([^|]*)\|(.*)", line)
        if row is None:
            if not found and not re.match(r"(CLUSTER: \S+)?\Z", line):
                raise ValueError(line)                 # later on it is the rest of a name with line breaks
            continue
        job, state, node, reason, names = row.groups()
        word, mark = state.split(" ")[0], re.search(RUN_MARK, names)
        kind = SLURM_STATES.get(word, "queued" if "REQUEUE" in word else "running")
        if kind == "queued" and re.search("[Hh]eld", reason):
            kind = "held"
        told = state if reason in ("", "None") else state + ", " + reason
        found.append(JobSeen(job, mark and mark.group(), kind, node, told))
    return found


# PBS

def pbs_submit(control, run, options):
    """The argument vector that submits. Of several -v qsub takes the last. It wants ASCII paths (-o: "illegal
    value"): where there is none, it reads the job from stdin, and what PBS writes into the job's log is told
    by qstat alone."""
    variables, rest = ["MI_RUN=" + run], []
    for word in options:
        if rest[-1:] == ["-v"]:
            rest.pop()
            variables.append(word)
        elif word.startswith("-v") and len(word) > 2:
            variables.append(word[2:])
        else:
            rest.append(word)
    paths = [control + "/batch.log", control + "/job"] if re.match(r"[!-~ ]+\Z", control) else ["/dev/null"]
    return ["qsub"] + rest + ["-N", pbs_name(run), "-v", ",".join(variables), "-r", "n", "-j", "oe", "-S",
                              "/bin/sh", "-o"] + paths


def pbs_name(run):
    """The name of its job: short, for older ones allow 15 letters."""
    return "mi_" + run[:8] + run[9:13]


# rows of qstat -f that nobody reads, and the one variable that is read
PBS_ROWS = rb"\n +(?! |job_state|Job_Owner|Variable_List|comment|Hold_Types|exec_host|[Ee]xit_status)[^\n]*"
PBS_MARK = rb"(\n +Variable_List = )(?:[^\n]*,)?(MI_RUN=[^,\n]*)[^\n]*"


def pbs_trim(text):
    """Of what qstat -f has said so far (bytes) what is read of the jobs that may be ours: a site's others are
    many, and rows long."""
    if b"\nJob Id:" not in text:
        return text
    first, *more = text.split(b"\nJob Id:")
    parts = [first] + [part.replace(b"\r", b"").replace(b"\n\t", b"") for part in more[:-1]]
    ours = [re.sub(PBS_MARK, rb"\1\2", re.sub(PBS_ROWS, b"", part))
            for part in parts[1:] if b"MI_RUN=" in part]
    return b"\nJob Id:".join([first] + ours + more[-1:])


PBS_STATES = {"R": "running", "E": "running", "S": "suspended", "U": "suspended", "H": "held"}
PBS_OVER = "CFX"               # (what is over is done with exit status 0); all others: queued


def pbs_read(text):
    """Every JobSeen in what qstat -f answered. ValueError if it is not that."""
    if text.strip() and not text.lstrip().startswith("Job Id"):
        raise ValueError(text)
    parts = re.split(r"^Job Id:\s*", text.replace("\r", "").replace("\n\t", ""), flags=re.M)
    return [pbs_job(part) for part in parts[1:]]


def pbs_job(part):
    """The JobSeen of one job's part of the answer. ValueError."""
    number, *rows = part.split("\n")
    told = dict(row.groups() for row in (re.match(r"\s+([A-Za-z_.]+) = (.*)", row) for row in rows) if row)
    state, code = told.get("job_state", ""), told.get("Exit_status") or told.get("exit_status")
    if not re.match(r"\d", number) or not re.match(r"[A-Z]\Z", state):
        raise ValueError(part)
    kind, words = PBS_STATES.get(state, "queued"), [state]
    if state in PBS_OVER:
        kind = "done" if code == "0" else "over"
        words += ["exit status " + code] if code else []
    words += [told["comment"]] if "comment" in told else []
    if kind == "held" and "Hold_Types" in told:
        words.append("held (%s)" % told["Hold_Types"])
    mark = re.search(RUN_MARK, told.get("Variable_List", "")) if is_ours(told.get("Job_Owner")) else None
    node = told.get("exec_host", "").split("/")[0]
    return JobSeen(number.strip(), mark and mark.group(), kind, node, ", ".join(words))


# HTCondor

def condor_submit(control, run, options):
    """The argument vector that submits, and the file that it reads."""
    rows = ["universe = vanilla"] + options + [
        "executable = %s/job" % control, "initialdir = " + control, "log = batch.events",
        "output = batch.log", "error = batch.log", "should_transfer_files = NO", "notification = never",
        "job_max_vacate_time = 30", '+MIRun = "%s"' % run, "batch_name = mi-" + run, "queue 1"]
    if "$" in control:
        raise ValueError("%s: HTCondor takes no $ in a path" % control)
    write_synced(utf8(control) + b"/job.sub", utf8("\n".join(rows) + "\n"))
    return ["condor_submit", "-terse", control + "/job.sub"]


CONDOR_STATES = {              # JobStatus: (state, for people, where the reason stands); all others: running
    1: ("queued", "idle", "LastRejMatchReason"), 2: ("running", "running", ""),
    3: ("over", "removed", "RemoveReason"), 4: ("done", "completed", ""), 5: ("held", "held", "HoldReason"),
    6: ("running", "transferring output", ""), 7: ("suspended", "suspended", "")}
CONDOR_TELL = ["-json", "-attributes", "ClusterId,ProcId,JobStatus,Owner,MIRun,HoldReason,RemoveReason,"
               "LastRejMatchReason,RemoteHost,LastRemoteHost"]


def condor_read(text):
    """Every JobSeen in what condor_q or condor_history answered. ValueError if it is neither's."""
    try:
        entries = json.loads(text) if text.strip() else []
        if isinstance(entries, list):
            return [condor_job(entry) for entry in entries]
    except (RecursionError, TypeError, KeyError, OverflowError):
        pass
    raise ValueError(text)


def condor_job(entry):
    """The JobSeen of one job's entry. ValueError, TypeError, KeyError, OverflowError."""
    status, job = int(entry["JobStatus"]), "%d.%d" % (int(entry["ClusterId"]), int(entry["ProcId"]))
    kind, word, why = CONDOR_STATES.get(status, ("running", "", ""))
    if status == 3 and entry.get("RemoteHost"):        # it is being ended
        kind = "running"
    reason = str(entry.get(why, "")).strip()
    node = str(entry.get("RemoteHost") or entry.get("LastRemoteHost") or "").partition("@")[2]
    mark = re.fullmatch(RUN_MARK, str(entry.get("MIRun"))) if is_ours(entry.get("Owner")) else None
    return JobSeen(job, mark and mark.group(), kind, node, word + (": " + reason if reason else ""))


def condor_constraint(job):
    """What picks a job by its mark, or its number."""
    if re.match(RUN_MARK, job):
        return 'MIRun == "%s"' % job
    return "ClusterId == %s && ProcId == %s" % tuple(job.split("."))


# The systems

BATCH_SYSTEMS = {
    "slurm": BatchSystem(
        programs="sbatch squeue scancel",
        submit=slurm_submit,
        number=r"^(\d+)(?:;\S*)?$",
        ask=lambda jobs: ["squeue", "--noheader", "--states=all", "--user=%d" % os.geteuid(),
                          "--format=%i|%T|%N|%r|%j|%k"],
        past=lambda jobs: ["sacct", "-n", "-P", "-X", "-o", "JobID,State,NodeList,Reason,JobName", "-j",
                           ",".join(jobs)],
        ours=None,
        one_line=[],
        marks=None,
        trim=None,
        partial=r"(?!)",
        read=slurm_read,
        cancel=lambda job: ["scancel", job],
        force=None,            # (its daemon kills after KillWait, whatever it is told meanwhile)
        sure=r"PerJob|QOSMin|time limit is invalid|Partition(Time|Node)Limit",
        away=r"contact slurm|timed out|refused|[Zz]ero [Bb]ytes|temporarily|[Ll]imit|too many|queue is full"
             r"|not respond|Unable to connect|standby|inactive or drain|[Mm]unge|uthentication",
        wrong=r"[Ii]nvalid|unrecognized|not available|not found|denied|[Uu]nable to open|exceeds",
        line_options=False,
        cluster=r"-M|--clusters?\b",
        never=r"-W|--wait(?![\w-])|--test-only|-a|--array",
        run=JOB_EXEC,
        said=r"slurmstepd\S*: (?:error: )?(.*\*\*\*.*|.*memory.*|.*oom.*)"),
    "pbs": BatchSystem(
        programs="qsub qstat qselect qdel",
        submit=pbs_submit,
        number=r"^(\d+(?:\[\])?(?:\.\S+)?)$",
        ask=lambda jobs: ["qstat", "-f"] + jobs,
        past=lambda jobs: ["qstat", "-x", "-f"] + jobs,
        ours=lambda: ["qselect"] + (["-u", user_name()] if user_name() else []),
        one_line=["-E"],
        marks="ours",
        trim=pbs_trim,
        partial=r"qstat: (Unknown Job Id|.* has finished)",
        read=pbs_read,
        cancel=lambda job: ["qdel", job],
        force=lambda job: ["qdel", "-W", "force", job],
        sure=r"violates|exceeds .*resource limits",
        away=r"onnect|timed out|busy|temporar|would exceed|[Mm]aximum number|End of File|[Ss]erver shutting"
             r"|not enabled",
        wrong=r"[Ii]llegal|[Uu]nknown|[Ii]nvalid|Unauthorized|not found|denied|too long|usage:",
        line_options=False,
        cluster=r"(?!)",
        never=r"-[IJtz]|-W\n?(.*,)?block=",
        run=JOB_EXEC,
        said=r"=>> PBS: (.*)|.*(?:[Oo]om|memory|Killed by).*"),
    "htcondor": BatchSystem(
        programs="condor_submit condor_q condor_rm",
        submit=condor_submit,
        number=r"^(\d+\.\d+) - ",
        ask=lambda jobs: ["condor_q"] + CONDOR_TELL + ["-constraint", "MIRun =!= undefined"],
        past=lambda jobs: ["condor_history"] + CONDOR_TELL + [
            "-limit", str(len(jobs)), "-constraint", " || ".join(map(condor_constraint, jobs))],
        ours=None,
        one_line=[],
        marks="past",
        trim=None,
        partial=r"(?!)",
        read=condor_read,
        cancel=lambda job: ["condor_rm", job],
        force=None,
        sure=r"[Ss]ubmit requirement|SUBMIT_REQUIREMENT",
        away=r"onnect|timed out|locate|find address|MAX_JOBS|Failed to commit",
        wrong=r"[Pp]arse|not found|[Ii]nvalid|denied|No such",
        line_options=True,
        cluster=r"(?!)",
        never=r"(?i:queue)\b",
        run=JOB_WAIT,
        said=r"(?!)"),
}
# ==== end shared ====


# ==== shared: store ====
# The one way in which results get into a directory of this side. What arrives grows in .mi-ID/ inside that
# directory, which one process at a time holds; it gets its name, by a rename, when it is whole and its sum is
# right. Nothing is written through a link below the target. What is there already is replaced only if it is
# this calculation's, or was there before it and its replacement was agreed.
# the names that such directories begin with
STAGE_NAME = rb"(?i)\.mi-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ZEROS, HOLE = bytes(1 << 16), 1 << 16                # runs of so many zero bytes are not written but left out
OWN_NAMES = {b"mi_dicomapi.py", b"mi_system_wf.py", b"mi_system_remote.py", b"execute_remote_command.py",
             b"sitecustomize.py", b"usercustomize.py", b"execute_remote_side_program_ssh.sample.sh",
             b"mi_distributed_computing_assist.ini", b"__pycache__"}


class NotStored(Exception):
    """A result that is not put there: its name (bytes) and why. What is there is as it was."""

    def __init__(self, name, why):
        Exception.__init__(self, why)
        self.name = name


class Target:
    """The directory `to`, for the results of the calculation `ident`. Safe for threads. Stop 75 if another
    process is at it.

    agreed: may what is there and is not of this calculation be replaced at all? began: nanoseconds of this
    file system's clock; what was changed there since is not replaced (None: there is no telling), but for the
    names `always`. sync: each file goes to the disk by itself."""

    def __init__(self, to, ident, agreed=True, began=None, always=(), sync=True):
        self.path = os.path.abspath(to if isinstance(to, bytes) else utf8(to))
        self.ident = ident
        self.agreed = agreed
        self.began = began
        self.always = always
        self.sync = sync
        self.open_folders = []     # (name, descriptor) of the directories down to where the last result went
        self.stored_here = {}      # {(device, inode): name} of what this process has stored
        self.not_kept = set()      # what this file system does not keep: "x" (executable), "times"
        self.repositories = {}     # {directory of a repository: was it here before this calculation?}
        self.mutex = threading.RLock()
        os.makedirs(self.path, exist_ok=True)
        self.top_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self.holds_own = self.holds_own_files()
        self.program_places = self.find_program_places()
        self.stage_name = b".mi-" + utf8(ident)
        if not any(self.lock_stage() for _turn in range(100)):
            raise FileNotFoundError(errno.ENOENT, _("the directory was removed"), self.path)
        # else who may write to the target could put a link in place of .mi-ID/
        self.parts_path = b"/proc/%d/fd/%d" % (os.getpid(), self.stage_fd)
        if not os.path.isdir(self.parts_path):
            self.parts_path = os.path.join(self.path, self.stage_name)
        self.noted = self.read_notes()     # {name: (inode, size, mtime)} of what was stored for it before

    def lock_stage(self):
        """Makes and locks .mi-ID/. False: another process was just done with it; once more."""
        import fcntl
        opened = []
        try:
            opened += [self.open_stage(self.stage_name)]
            fault("stage made")
            opened += [os.open(b"lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=opened[0])]
            fault("lock made")
            try:
                fcntl.flock(opened[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise Stop(EX_TEMPFAIL,
                               _("%s: another program is putting results of %s there; try again when it has"
                                 " ended") % (shown(self.path), self.ident))
                log("warn", self.ident, "store", to=shown(self.path),
                    why="this file system knows no locks: what is half here is fetched anew")
                os.unlink(b"lock", dir_fd=opened[0])
                self.remove_stage_if_empty()
                self.stage_name += b"." + os.urandom(8).hex().encode()         # nobody else's, then
                opened += [self.open_stage(self.stage_name)]
            else:
                if os.stat(b"lock", dir_fd=opened[0]).st_ino != os.fstat(opened[1]).st_ino:
                    raise FileNotFoundError
            self.stage_fd = opened.pop(2 if opened[2:] else 0)
            self.lock_fd = opened.pop()                   # open as long as this is
            fault("target held")
            return True
        except FileNotFoundError:
            return False
        finally:
            for fd in opened:
                os.close(fd)

    def open_stage(self, name):
        """A descriptor of the directory of parts, made where it is not there; of this user's, or of the
        target's owner (who may do all there)."""
        try:
            os.mkdir(name, 0o700, dir_fd=self.top_fd)
        except FileExistsError:
            pass
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.top_fd)
        if os.fstat(fd).st_uid in (os.geteuid(), os.fstat(self.top_fd).st_uid):
            return fd
        os.close(fd)
        raise PermissionError(errno.EPERM, _("belongs to another user"), os.path.join(self.path, name))

    def now(self):
        """This file system's clock, in nanoseconds."""
        return os.fstat(self.stage_fd).st_ctime_ns

    def read_notes(self):
        """What the file `stored` says, which is opened for more of it."""
        flags, found = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, {}
        self.notes_fd = os.open(b"stored", flags, 0o600, dir_fd=self.stage_fd)
        with open(self.notes_fd, "rb", closefd=False) as rows:
            for row in rows:
                words = row[:-1].split(b" ", 3)
                numbers = [word for word in words[:3] if word.lstrip(b"-").isdigit()]
                if row.endswith(b"\n") and len(words) == 4 and len(numbers) == 3:
                    found[words[3]] = tuple(map(int, numbers))
        return found

    def holds_own_files(self):
        """Do this program, or the user's ini, lie in the target or below it?"""
        above = os.path.realpath(self.path).rstrip(b"/") + b"/"
        places = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.realpath(__file__)),
                  os.path.expanduser("~/.config"))
        return any((os.path.realpath(utf8(place)) + b"/").startswith(above) for place in places)

    def find_program_places(self):
        """How names begin (bytes) of what this user's programs are started from or set up by: what has a dot
        in front in the home directory (.bashrc, .ssh/ ...), and the directories of PATH."""
        top = os.path.realpath(self.path).rstrip(b"/") + b"/"
        places = [os.path.realpath(utf8(place)) + b"/"
                  for place in os.environ.get("PATH", "").split(":") if place[:1] == "/"]
        places = [place for place in places if place != top] + [os.path.realpath(os.path.expanduser(b"~"))
                                                                + b"/."]
        return tuple(place[len(top):].lower() for place in places if place.startswith(top))

    def check_allowed(self, name):
        """NotStored for a name (bytes) that results may not have here."""
        lower = name.lower()
        if lower.startswith(self.program_places) or self.in_repository(lower):
            raise NotStored(
                name, _("programs of this host are started from there, or set up by it; take another --to"))
        parts, mine = lower.split(b"/"), b".mi-" + utf8(self.ident).lower()
        if re.match(STAGE_NAME, name) or any(part.startswith(mine) for part in parts):
            raise NotStored(name, _("a name that is kept for what arrives"))
        own = (parts[-1] in OWN_NAMES or b"__pycache__" in parts
               or parts[-1].endswith((b".pth", b".pyc", b".pyo")))
        if self.holds_own and (own or self.is_program(name)):
            raise NotStored(name,
                            _("a name of this program's own files or of Python's start, and this program"
                              " lies there; take another --to"))

    def in_repository(self, name):
        """Does a name (in small letters) lie in the .git or .hg of a repository that was here before? Its
        hooks and settings are programs that the next commit starts."""
        parts = name.split(b"/")
        if not {b".git", b".hg"} & set(parts[:-1]):
            return False
        where = b"/".join(parts[:min(parts.index(word) for word in (b".git", b".hg") if word in parts) + 1])
        if where not in self.repositories:
            mine = any(stored.lower().startswith(where + b"/") for stored in self.noted)
            self.repositories[where] = not mine and os.path.lexists(os.path.join(self.path, where))
        return self.repositories[where]

    def check_storable(self, name):
        """NotStored (or OSError) if a result with this name (bytes) must not be put there: to be asked before
        it is fetched."""
        self.check_allowed(name)
        *above, leaf = name.split(b"/")
        try:
            with self.mutex:
                self.check_replaceable(self.open_folder(above), leaf, name)
        except OSError as error:
            raise in_the_way(error, name)

    def is_program(self, name):
        """Is it this very program's place?"""
        return os.path.realpath(os.path.join(self.path, name)) == os.path.realpath(
            utf8(os.path.abspath(__file__)))

    def part_path(self, key):
        """The path at which the result with this key (a number, or bytes) grows."""
        return os.path.join(self.parts_path, key if isinstance(key, bytes) else b"%d" % key)

    def open_folder(self, parts):
        """A descriptor of the directory `parts` below the top, made where it is not there. (Results come in
        order: the last stay open.)"""
        same = 0
        while same < min(len(parts), len(self.open_folders)) and parts[same] == self.open_folders[same][0]:
            same += 1
        self.close_folders(same)
        for part in parts[same:]:
            above = self.open_folders[-1][1] if self.open_folders else self.top_fd
            try:
                os.mkdir(part, dir_fd=above)
            except FileExistsError:
                pass
            self.open_folders.append((
                part, os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)))
        return self.open_folders[-1][1] if self.open_folders else self.top_fd

    def close_folders(self, keep):
        """Closes the open directories below the first `keep`."""
        while len(self.open_folders) > keep:
            fd = self.open_folders.pop()[1]
            if self.sync:
                self.attempt("", os.fsync, fd)
            os.close(fd)

    def attempt(self, what, act, *words, **more):
        """act(), which a file system may refuse; what it then does not keep is noted."""
        try:
            act(*words, **more)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            self.not_kept.add(what)

    def store(self, key, name, data=None, x=False, mtime=None):
        """Gives a verified result its name (bytes, or text). data: its bytes, or None if they are in
        part(key). x: its owner may execute it. mtime: nanoseconds, or None. NotStored if it must not be put
        there."""
        self.give_name(key, name if isinstance(name, bytes) else utf8(name),
                       self.finish_part(key, data, x, mtime))

    def finish_part(self, key, data, x, mtime):
        """A whole part: with data in it (None: it is there), executable or not, with its time. Its
        os.stat_result."""
        fd = self.open_part(key if isinstance(key, bytes) else b"%d" % key, data, x)
        try:
            if mtime is not None:
                mtime = max(-2 ** 63, min(mtime, 2 ** 63 - 1))         # as near as it can be told
                self.attempt("times", os.utime, fd, ns=(mtime, mtime))
            info = os.fstat(fd)
            if x != bool(info.st_mode & 0o100):        # who may read it may execute it, or nobody
                self.attempt("x" if x else "", os.fchmod, fd,
                             info.st_mode & 0o666 | ((info.st_mode & 0o444) >> 2 if x else 0))
            if self.sync:
                os.fsync(fd)
            return info
        finally:
            os.close(fd)

    def open_part(self, key, data, x):
        """A descriptor of the part with this key, with data in it (None: as it is)."""
        if data is None:
            return os.open(key, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.stage_fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            fd = os.open(key, flags, 0o777 if x else 0o666, dir_fd=self.stage_fd)    # the umask does the rest
        except FileExistsError:                        # of a process that was killed
            os.unlink(key, dir_fd=self.stage_fd)
            fd = os.open(key, flags, 0o777 if x else 0o666, dir_fd=self.stage_fd)
        fault("part made")
        try:
            if len(data) >= HOLE:
                write_sparse(fd, memoryview(data), 0)
                os.ftruncate(fd, len(data))
            elif data and os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), key)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def give_name(self, key, name, info):
        """Gives the whole part its name (bytes). info: what write() returned. NotStored if it must not be put
        there."""
        self.check_allowed(name)
        fault("part written")
        *above, leaf = name.split(b"/")
        try:
            with self.mutex:
                folder = self.open_folder(above)
                self.check_replaceable(folder, leaf, name)
                key = key if isinstance(key, bytes) else b"%d" % key
                try:
                    self.move_into_place(self.stage_fd, key, folder, leaf, name, info)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    self.move_into_place(folder, self.stage_name, folder, leaf, name,
                                         self.copy_part(key, folder))
        except OSError as error:                       # its own message would name the part
            raise in_the_way(error, name)
        fault("stored")

    def move_into_place(self, source, part, folder, leaf, name, info):
        """Gives a part in the directory `source` its name `leaf` in `folder`. info: its os.stat_result."""
        if not self.agreed or self.began is not None:  # before: killed now, it is ours
            os.write(self.notes_fd, b"%d %d %d %s\n" % (info.st_ino, info.st_size, info.st_mtime_ns, name))
        fault("part noted")
        os.rename(part, leaf, src_dir_fd=source, dst_dir_fd=folder)
        self.stored_here[info.st_dev, info.st_ino] = name

    def copy_part(self, key, folder):
        """The part with this key as a file .mi-ID in `folder`, where another file system is mounted. Its
        os.stat_result."""
        with open(os.open(key, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.stage_fd), "rb", 0) as source:
            info = os.fstat(source.fileno())
            try:
                os.unlink(self.stage_name, dir_fd=folder)              # of a process that was killed
            except FileNotFoundError:
                pass
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(self.stage_name, flags, info.st_mode & 0o777, dir_fd=folder), "wb", 0) as out:
                at = 0
                for data in iter(lambda: source.read(1 << 20), b""):
                    write_sparse(out.fileno(), memoryview(data), at)
                    at += len(data)
                out.truncate(at)
                self.attempt("times", os.utime, out.fileno(), ns=(info.st_atime_ns, info.st_mtime_ns))
                if self.sync:
                    os.fsync(out.fileno())
                info = os.fstat(out.fileno())
        os.unlink(key, dir_fd=self.stage_fd)
        return info

    def check_replaceable(self, folder, leaf, name):
        """NotStored, or OSError, if what is at that name must stay."""
        try:
            info = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        twin = self.stored_here.get((info.st_dev, info.st_ino), name)
        if twin != name and folded_name(twin) == folded_name(name):
            raise NotStored(name,
                            _("this file system takes its name and that of another result for one (%s)")
                            % shown(twin))
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if ((info.st_dev, info.st_ino) in self.stored_here
                or self.noted.get(name) == (info.st_ino, info.st_size, info.st_mtime_ns)):
            return
        if not self.agreed:
            raise NotStored(name,
                            _("is there already, and not of this calculation; --to DIR or --out NAME agrees"
                              " to its being replaced"))
        if self.began is not None and info.st_ctime_ns > self.began:
            if name not in self.always:
                raise NotStored(name, _("was changed here while the calculation ran, and is left as it is"))
            log("warn", self.ident, "store", replaced=shown(name),
                why="another program wrote it here while the calculation ran")

    def make_directory(self, name, mtime=None):
        """An empty directory (name without /), unless it is there."""
        name = name if isinstance(name, bytes) else utf8(name)
        self.check_allowed(name)
        with self.mutex:
            try:
                fd = self.open_folder(name.split(b"/"))
            except OSError as error:
                raise in_the_way(error, name)
            if mtime is not None:
                self.attempt("times", os.utime, fd, ns=(mtime, mtime))

    def open_file(self, name):
        """A descriptor of what is at that name (bytes), if it is a file and reached through no link; OSError
        otherwise."""
        *above, leaf = name.split(b"/")
        with self.mutex:
            fd = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.open_folder(above))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
        return fd

    def has_file(self, name, size, sum256):
        """Is this very result there already, by its sum? (A module that was killed while it fetched asks
        again.)"""
        import hashlib
        digest = hashlib.sha256()
        try:
            with open(self.open_file(utf8(name)), "rb", 0) as source:
                if os.fstat(source.fileno()).st_size != size:
                    return False
                for data in iter(lambda: source.read(1 << 18), b""):
                    digest.update(data)
        except OSError:
            return False
        return digest.hexdigest() == sum256

    def drop_part(self, key):
        """Removes the part with this key, if there is one."""
        try:
            os.unlink(self.part_path(key))
        except FileNotFoundError:
            pass

    def sync_all(self):
        """All that was stored is on the disk when this returns."""
        with self.mutex:
            self.close_folders(0)
            if self.sync:
                self.attempt("", os.fsync, self.top_fd)
            else:
                os.sync()

    def close(self, done):
        """The end, on the disk. done: the parts and the notes are needed no more."""
        self.sync_all()
        fault("settled")
        lost = " ".join(sorted(self.not_kept - {""}))
        if lost:
            log("warn", self.ident, "store", to=shown(self.path),
                why="this file system does not keep: " + lost)
        if (done
                or not os.fstat(self.notes_fd).st_size
                and set(os.listdir(self.stage_fd)) <= {"lock", "stored"}):
            self.remove_stage()
        for fd in (self.notes_fd, self.lock_fd, self.stage_fd):
            os.close(fd)
        self.remove_stage_if_empty()      # NFS keeps open files there, by another name, until they are closed
        os.close(self.top_fd)

    def remove_stage(self):
        """Removes .mi-ID/ (the lock last: whoever opens it from now on finds that it is no longer there)."""
        import shutil
        for name in set(os.listdir(self.stage_fd)) - {"lock"}:
            path = self.part_path(os.fsencode(name))
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else self.attempt(
                "", os.unlink, path)
        fault("parts gone")
        self.drop_part(b"lock")
        fault("lock gone")
        self.remove_stage_if_empty()

    def remove_stage_if_empty(self):
        """Removes the empty directory .mi-ID, unless another process is in it already."""
        try:
            os.rmdir(self.stage_name, dir_fd=self.top_fd)
        except OSError:
            pass


def in_the_way(error, name):
    """The OSError that names the result instead of what the system was at."""
    found = error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
    return OSError(error.errno,
                   _("a directory or a symbolic link is in its way") if found else error.strerror, name)


def folded_name(name):
    """name (bytes) as file systems see it that know no case and one way of writing an accent."""
    import unicodedata
    return unicodedata.normalize("NFC", name.decode("utf-8", "replace").casefold())


def write_sparse(fd, view, at):
    """Writes view at that offset; runs of zeros where the file is a hole are left out (its owner gives it its
    length at the end)."""
    begin = 0
    for first in range(0, len(view), HOLE):
        piece = view[first:first + HOLE]
        if (not piece[0] and not piece[-1] and bytes(piece) == ZEROS[:len(piece)]
                and is_hole(fd, at + first, len(piece))):
            write_all_at(fd, view[begin:first], at + begin)
            begin = first + len(piece)
    write_all_at(fd, view[begin:], at + begin)


def write_all_at(fd, view, at):
    """Writes all of view at that offset."""
    while len(view):
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def is_hole(fd, at, size):
    """Are these bytes of the file a hole (or behind its end)?"""
    try:
        return os.lseek(fd, at, os.SEEK_DATA) >= at + size
    except OSError as error:
        return error.errno == errno.ENXIO
# ==== end shared ====


# ==== tables ====
# What stands here needs what is above at import.
OPTIONS = {
    "--in": dict(dest="inputs", nargs="+", action="append", default=[], metavar="FILE",
                 help="input files and directories"),
    "--to": dict(metavar="DIR", help="where the results go (default: here)"),
    "--keep": dict(action="store_true", help="leave the directory there, also when all went well"),
    "--allow-refused": dict(action="store_true", help="results that their owner's rules keep there are no"
                                                      " failure"),
    "--sign-key": dict(default="", metavar="FILE", help="signs the order with this private key (of keygen)"),
    "--require-signed-by": dict(default="", metavar="FILE",
                                help="takes only results that a key of this file has signed"),
    "--batch": dict(choices=sorted(BATCH_SYSTEMS),
                    help="through this batch system there (with a guard: its ini says so)"),
    "--batch-option": dict(action="append", default=[], metavar="OPTION",
                           help="of its submission, as in: --batch-option=--time=60"),
    "--streams": dict(metavar="N", help="auto, or how many connections at once for large files"),
    "--retry": dict(metavar="COUNT,INTERVAL", help="how long a lost line is tried again"),
    "--base": dict(metavar="DIR", help="directory on the external computer"),
    "--ssh-options": dict(metavar="TEXT", help="options for ssh, as in: '-F /etc/mi/ssh_config'"),
    "--grace": dict(type=number_from(0, 86400), default=10, metavar="N",
                    help="seconds between TERM and KILL"),
    "--older": dict(type=seconds, metavar="TIME", help="all that ended before this time, as in 30d"),
    "--upgrade": dict(action="store_true", help="only at what another version has left"),
    "--print-key-line": dict(metavar="KEYFILE", help="the line for authorized_keys for this public key"),
    "--all": dict(action="store_true", help="no line is left out"),
    "--unseen": dict(action="store_true", help="also if nobody has looked at it with `show`"),
    "--reason": dict(metavar="TEXT", help="why; it stays on this host"),
    "--witness": dict(default="", metavar="HEAD", help="NUMBER.SUM, or a file that holds such"),
    "--since": dict(default="", metavar="TIME", help="12h, 7d, or a date like 2026-11-20"),
    "--csv": dict(action="store_true", help="for a spreadsheet"),
    "--key": dict(metavar="NAME",
                  help="in the key line: this key's calculations are its own, no other key sees them")}
SUBCOMMANDS = {
    "run": (cmd_run, "HOST CMD",
            "Runs CMD at HOST (a word of ~/.ssh/config) with these files, and fetches everything that it "
            "leaves; the exit code is the command's own. A lost line is opened again, the command runs on "
            "meanwhile.",
            "run hpc 'solve.sh 4' --in model.inp table/ --to results",
            "--in --to --keep --allow-refused --sign-key --require-signed-by --batch --batch-option --streams"
            " --retry --base --ssh-options"),
    "resume": (cmd_resume, "UUID",
               "Goes on with a calculation whose runner died or gave up, days later too. --to: also if its "
               "results were fetched before.",
               "resume 7c1d2a90", "--to --retry"),
    "list": (cmd_list, "[HOST]",
             "The calculations of this side; with HOST: those on that host.",
             "list hpc", ""),
    "cancel": (cmd_cancel, "UUID",
               "Ends a command that runs: TERM, then KILL.",
               "cancel 7c1d2a90", "--grace"),
    "clean": (cmd_clean, "[UUID...]",
              "Removes directories there and records here.",
              "clean --older 30d", "--older"),
    "check": (cmd_check, "[HOST]",
              "Looks at things as they are, here and at HOST, and changes nothing: OK, WARN or FAIL, and "
              "what to do.",
              "check hpc", "--upgrade"),
    "audit verify": (cmd_audit, "",
                     "Is the guard's audit log whole? With what a witness has seen of it (a head, or a file "
                     "with some, as a runner keeps it) also its end. 0: whole, 76: changed, 65: cut off, 66: "
                     "there is none, 74: unreadable.",
                     "audit verify --witness heads.txt", "--witness"),
    "audit report": (cmd_audit, "",
                     "What left this host: when, whither, by which rules, released by whom; what was refused"
                     " or held; changes of rules, keys and clock.",
                     "audit report --since 30d", "--since --csv"),
    "guard": (cmd_guard, "[WORD_OF_OWNER] [ID]",
              "On the external computer: what a key in authorized_keys may do, by the rules of the ini. "
              "At its terminal, its owner's words about results that are held for a person: outbox, show ID, "
              "release ID, refuse ID --reason TEXT.",
              "guard --print-key-line mint_hpc.pub", "--key --print-key-line --all --unseen --reason")}


def streams_kind(text):
    """'auto' -> 0, else a number of connections (1 to MOST_STREAMS)."""
    if text == "auto":
        return 0
    if not text.isdigit() or not 1 <= int(text) <= MOST_STREAMS:
        raise ValueError(_("is not auto or a number from 1 to %d") % MOST_STREAMS)
    return int(text)


def retry_kind(text):
    """'COUNT,INTERVAL' -> (int, seconds)."""
    count, comma, interval = text.partition(",")
    if not count.strip().isdigit():
        raise ValueError(_("is not COUNT,INTERVAL (like 5,60)"))
    return int(count), seconds(interval.strip() or "60")


def base_kind(text):
    """A directory: absolute, or below the home directory."""
    if not text or has_control_chars(text):
        raise ValueError(_("is not a directory"))
    return text


def split_words(text):
    """Words as a shell would split them (no shell is run)."""
    import shlex
    return shlex.split(text)


INI_KEYS = {                   # {section: {key: (kind, default, meaning)}}: what the shipped ini says of it
    "ssh": {
        "base": (base_kind, "~/.mi_distcomp", "on the external computer"),
        "streams": (streams_kind, 0, "connections for large transfers; 1: never more"),
        "retry": (retry_kind, (5, 60.0), "COUNT,INTERVAL"),
        "connect": (seconds, 20.0, "until a connection stands"),
        "alive": (seconds, 15.0, "a silent line is noticed"),
        "rsync_options": (split_words, [], "words for rsync, where there is no python3"),
        "ssh_options": (split_words, [], "words for ssh, like -F /etc/mi/ssh_config"),
        "connects": (int, 30, "connections a minute and host"),
        "lang": (one_of("auto", "en", "ja"), "auto", "en, ja")},
    "ssh guard": {
        "base": (base_kind, "~/.mi_distcomp", "where the calculations lie"),
        "from": (str, "", "addresses that the key may come from"),
        "max_bytes": (size, 0,
                      "inputs of one calculation; each file, directory and order counts 4 KiB besides"),
        "max_runs": (number_from(0, 10 ** 6), 10000,
                     "calculations of a key that lie here at a time; 0: any number"),
        "max_sessions": (number_from(1, 10000), 500,
                         "sessions of a key at a time; a runner that finds none left tries again")}}
INI_KEYS["ssh guard"].update(dict(order_keys(), site=(
    str.split, [], "what runners call this computer (their HOST), where orders are signed; blanks between")))
INI_KEYS.update(dict(gate_keys(), **signer_keys()))


# What a door there may answer

SHA256 = text_like("[0-9a-f]{64}")
VERDICT = text_like("[a-z]{1,20}")
ROWS = 200000                  # of one answer


def is_text(value):
    """A kind: a text for people, or a name."""
    return type(value) is str and len(value) <= 10000


def is_result_row(row):
    """Is it [name, size, mtime, executable, sum]?"""
    good = (type(row) is list and len(row) == 5 and is_name(row[0]) and LENGTH(row[1]) and TIME(row[2])
            and is_bool(row[3]))
    return good and (row[4] is None or SHA256(row[4]))


def is_bundle_row(row):
    """Is it [size, mtime, executable, sum], or the verdict of what does not leave?"""
    good = type(row) is list and len(row) == 4 and LENGTH(row[0]) and TIME(row[1]) and is_bool(row[2])
    return SHA256(row[3]) if good else VERDICT(row)


def is_folder_row(row):
    """Is it [name/, mtime]?"""
    return type(row) is list and len(row) == 2 and is_text(row[0]) and is_name(row[0][:-1]) and TIME(row[1])


def is_run_row(row):
    """Is it [UUID, state, seconds, why, code]?"""
    good = (type(row) is list and len(row) == 5 and text_like(IDENT)(row[0]) and is_text(row[1])
            and LENGTH(row[2]) and is_text(row[3]))
    return good and (row[4] is None or whole_number(0, 255)(row[4]))


def is_verdicts(value):
    """Is it {code: {"count": number, "names": [text]}}?"""
    return (type(value) is dict and len(value) < 100
            and all(VERDICT(code) and type(one) is dict and LENGTH(one.get("count"))
                    and list_of(is_text, VERDICT_NAMES)(one.get("names")) for code, one in value.items()))


ANSWER_FIELDS = {              # each word of an answer: its kind. Others are passed over
    "signed": lambda value: type(value) is str and len(value) <= 10000,
    "no": is_text, "why": is_text, "state": text_like("|".join(STATES)),
        "code": lambda value: value is None or whole_number(0, 255)(value),
    "where": is_text, "cancelled": is_bool, "lost": is_bool, "host": is_text, "boot": is_text,
        "door": is_text, "program": is_text,
    "free": LENGTH, "took": LENGTH, "aes": is_bool, "python": is_text, "kill": is_bool, "size": LENGTH,
        "zstd": is_bool, "length": whole_number(0, UNPACKED_MOST), "log": LENGTH,
    "end": is_bool, "sum": lambda value: SHA256(value) or text_like("[0-9a-f]{0,16}")(value), "mtime": TIME,
        "x": is_bool,
    "sums": list_of(lambda value: value == "" or SHA256(value), ROWS), "files": list_of(is_result_row, ROWS),
    "folders": list_of(is_folder_row, ROWS),
    "next": lambda value: value is None or LENGTH(value), "verdicts": is_verdicts, "verdict": VERDICT,
        "audit": text_like(r"[0-9]{1,15}\.[0-9a-f]{64}"),
        "bundle": list_of(is_bundle_row, 2000), "name": is_text,
    "left": list_of(is_text, 1000), "more": lambda value: value is None or text_like(IDENT)(value),
    "runs": lambda value: LENGTH(value) or list_of(is_run_row, 1000)(value)}
# what ssh (or a guard) says when it is no use
FINAL = (("Permission denied", EX_REFUSED), ("Host key verification failed", EX_REFUSED),
         ("HOST IDENTIFICATION", EX_REFUSED), ("refused by the guard", EX_REFUSED),
         ("Bad configuration", EX_CONFIG), ("Bad owner", EX_CONFIG), (PROGRAM + ": ", EX_CONFIG),
         ("Could not resolve", EX_UNAVAILABLE), ("No user exists for uid", EX_CONFIG))


JA = {
    "%s: ends with number %d":
        "%s: 最後は %d 番です",
    "%s: there is no guard that signs results": "%s: 結果に署名するガードがありません",
    "%s: is not what was signed there": "%s: 外部計算機で署名されたものと違います",
    "%s: its results are not believed: %s": "%s: 結果を受け取りません: %s",
    "what was signed there is not what came (%s)": "外部計算機が署名した内容が、届いたものと違います (%s)",
    "takes only results that a key of this file has signed":
        "このファイルの鍵で署名された結果だけを受け取ります",
    "what was held has changed: held anew":
        "保留中のものが変わったため、保留し直しました",
    "%s: there is no guard that takes signed orders": "%s: 署名のある指示書を受け取るガードがありません",
    "signs the order with this private key (of keygen)": "この秘密鍵 (keygen で作ったもの) で指示書に署名します",
    "On the external computer: what a key in authorized_keys may do, by the rules of the ini. At its"
    " terminal, its owner's words about results that are held for a person: outbox, show ID, release ID,"
    " refuse ID --reason TEXT.":
        "外部計算機側: authorized_keys の鍵にできることを、ini の規則で限ります。その端末では、公開承認待ちの"
        "結果についての担当者の語: outbox、show ID、release ID、refuse ID --reason 理由。",
    "these words are said at this host's terminal only": "これらの語はこの計算機の端末でだけ使えます",
    "say guard outbox, guard show ID, guard release ID, or guard refuse ID --reason TEXT, with an ID of"
    " outbox":
        "guard outbox、guard show ID、guard release ID、guard refuse ID --reason 理由 のいずれかです"
        " (ID は outbox にあるもの)",
    "said; the runner's `resume` goes on with it": "記録しました。実行側の resume で続きます",
    "held for a person at the external computer since %s": "%s から外部計算機で担当者の公開承認待ち",
    "%s: its results are %s; when they are released, %s.py resume %s fetches them":
        "%s: 結果は %s です。承認されたら %s.py resume %s で受け取れます",
    "somebody else is deciding about it: try again": "ほかの人が判断しているところです。もう一度試してください",
    ", then refused: %s": "、%s を過ぎると不承認",
    "%s  held for a person since %s%s  %s: %d files, %d bytes":
        "%s  公開承認待ち %s から%s  %s: %d 個のファイル、%d バイト",
    "it was released": "承認済みです",
    "it was refused": "不承認とされています",
    "nothing of it waits for a person": "公開承認を待つものはありません",
    "%s: nobody has looked at it as it is now: show %s, or release it with --unseen":
        "%s: 今の内容をまだ誰も見ていません。show %s を実行するか、--unseen を付けてください",
    "%s: it has changed since it was held: nothing leaves; it is held anew, look at it again":
        "%s: 保留した後に内容が変わっています。何も送りません。改めて保留しますので、もう一度確かめてください",
    "refuse needs --reason TEXT (which stays on this host)":
        "refuse には --reason 理由 が必要です (理由はこの計算機の外へ出ません)",
    "%s: a calculation does not decide about results": "%s: 計算の中から結果の公開は決められません",
    "manifest: %s": "マニフェスト: %s",
    "released last of this command: %s": "このコマンドで最後に承認した結果: %s",
    "nothing of this command was released before": "このコマンドの結果を承認したことはまだありません",
    "%d bytes, %s": "%d バイト、%s",
    "executable": "実行可能",
    "held: %s": "保留の理由: %s",
    "%d bytes more: look at the file itself": "ほか %d バイト: ファイルそのものを確認してください",
    "%d lines more (--all)": "ほか %d 行 (--all で表示)",
    "empty directory: %s": "空のディレクトリ: %s",
    "stays here in any case: %s %d": "承認しても残るもの: %s %d",
    "binary": "バイナリ",
    "text": "テキスト",
    "text, not UTF-8": "テキスト (UTF-8 ではない)",
    "there was no file of this name then": "そのときこの名前のファイルはありませんでした",
    "the same as then": "そのときと同じです",
    "another one than then (it had %d bytes)": "そのときと異なります (そのときは %d バイト)",
    "no line is left out": "行を省略しません",
    "also if nobody has looked at it with `show`": "show で誰も見ていなくても",
    "why; it stays on this host": "理由 (この計算機の外へ出ません)",
    "was about to be started on %s, and nothing tells whether it was":
        "%s で開始する直前でしたが、実際に開始したかどうかはわかりません",
    "%s: cannot be signed with: %s": "%s: 署名に使えません: %s",
    "no signature came; is ssh-keygen older than 8.1? then a key of `keygen`, or one in PEM, does":
        "署名が得られません。ssh-keygen が 8.1 より古ければ、keygen で作った鍵か PEM 形式の鍵を使ってください",
    "it is not signed, or not in this form": "署名がないか、この形式ではありません",
    "the signature does not fit": "署名が合いません",
    "%s: [%s] key: is missing, or another signer's, too": "%s: [%s] key: 値がないか、ほかの [signer] と同じです",
    "%s: [%s] require_signature: what do orders call this computer? Add to [%s]: site = NAME":
        "%s: [%s] require_signature: 指示書でのこの計算機の名前が必要です。[%s] に加えてください: site = NAME",
    "%s: [%s] require_signature: who may order? Add: [signer NAME]  key = ssh-ed25519 ..., or say:"
    " require_signature = no":
        "%s: [%s] require_signature: 誰の指示書を受け付けるかを加えてください: [signer NAME]  key = ssh-ed25519 ...。"
        "署名を求めないなら require_signature = no と書いてください",
    "[signer %s] is not in its time (since, until)": "[signer %s] は有効期間 (since, until) の外です",
    "[signer %s] is revoked": "[signer %s] は失効しています",
    "[signer %s] may not order [command %s]": "[signer %s] は [command %s] を指示できません",
    "[signer %s] signs for user %s, and the order says %s": "[signer %s] は利用者 %s の署名ですが、指示書には %s とあります",
    "by a key that is not on this host's list": "この計算機の一覧にない鍵による署名です",
    "is not a line like: ssh-ed25519 AAAA... (or ssh-rsa, from 2048 bits on)":
        "ssh-ed25519 AAAA... の形の行ではありません (ssh-rsa は 2048 ビット以上)",
    "is not a time like 2026-11-30, or 2026-11-30 14:00": "2026-11-30 や 2026-11-30 14:00 の形の日時ではありません",
    "it does not say what an order says": "指示書の項目がそろっていません",
    "it has expired; order it anew": "期限が切れています。あらためて指示してください",
    "it holds %s": "使えない値があります: %s",
    "it is for site %s": "サイト %s あての指示書です",
    "it was signed before this host began to remember orders; order it anew":
        "この計算機が記録を始める前の署名です。あらためて指示してください",
    "it was used already; order it anew (rerun, by who signed it)":
        "使用済みの指示書です。あらためて指示してください (署名した側の rerun)",
    "its inputs are not those that were signed": "入力が、署名されたものと違います",
    "its time has not come yet; are the clocks of both hosts right?": "まだ有効になっていません。両方の計算機の時計を確かめてください",
    "this order does not run here: %s": "この指示書はここでは実行しません: %s",
    "what is asked for is not what was signed (%s)": "依頼の内容が、署名されたものと違います (%s)",
    "its last line is none of an audit log's; see what `audit verify` says, and move it away":
        "最後の行が監査ログの行ではありません。`audit verify` で確かめ、ファイルを別の場所へ移してくだ"
        "さい",
    "%s, line %d":
        "%s の %d 行目",
    "broken at %s: from there on it was changed":
        "%s で壊れています。そこから先は書き換えられています",
    "broken at %s: a witness has seen another line there":
        "%s で壊れています。証人が見た行と異なります",
    "%s: there is no audit log":
        "%s: 監査ログがありません",
    "%s: cannot be read: %s":
        "%s: 読み取れません: %s",
    "cut off: a witness has seen number %d, and here are %d to %d":
        "切り取られています。証人は %d 番を見ていますが、ここにあるのは %d 番から %d 番です",
    "whole, from number %d to %d.%s":
        "欠けも書き換えもありません。%d 番から %d.%s まで",
    "--witness %s: neither a head (NUMBER.SUM) nor a file with one":
        "--witness %s: 末尾の値 (番号.チェックサム) でも、それを含むファイルでもありません",
    "NUMBER.SUM, or a file that holds such":
        "番号.チェックサム、またはそれを含むファイル",
    "the poller was started":
        "ポーラーが起動しました",
    "results leave":
        "結果が出ます",
    "output leaves while the command runs":
        "実行中の出力が出ます",
    "not wanted there":
        "中継側が受け取りません",
    "refused":
        "拒否しました",
    "held for a person":
        "人の承認を待っています",
    "shown to a person":
        "人に表示しました",
    "released by a person":
        "人が公開を承認しました",
    "held for too long: refused":
        "承認の期限が過ぎたため拒否しました",
    "a key was changed":
        "鍵が変わりました",
    "the clock was set":
        "時計が変更されました",
    "the owner's rules are others than before":
        "所有者の規則が変わりました",
    "a crash has torn a line":
        "障害で行が途切れました",
    "What left this host: when, whither, by which rules, released by whom; what was refused or "
    "held; changes of rules, keys and clock.":
        "この計算機から出たもの (いつ、どこへ、どの規則で、だれの承認で)、拒否・保留したもの、規則・鍵"
        "・時計の変更を示します。",
    "Is the guard's audit log whole? With what a witness has seen of it (a head, or a file with "
    "some, as a runner keeps it) also its end. 0: whole, 76: changed, 65: cut off, 66: there is "
    "none, 74: unreadable.":
        "guard の監査ログに欠けや書き換えがないか調べます。証人の記録 (末尾の値、または実行側の記録な"
        "どのファイル) があれば、末尾が切り取られていないかも調べます。0: 完全、76: 書き換え、65: "
        "切り取り、66: ログなし、74: 読み取れない。",
    "--since: a time ago (12h, 7d) or a date (2026-11-20, 2026-11-20T21:47), not %s":
        "--since: 何時間前・何日前か (12h、7d)、または日付 (2026-11-20、2026-11-20T21:47) "
        "を書いてください。%s は使えません",
    "12h, 7d, or a date like 2026-11-20":
        "12h、7d、または 2026-11-20 のような日付から",
    "for a spreadsheet":
        "表計算ソフト用 (CSV)",
    "the configuration file, instead of the one that is found": "設定ファイル (ini)。指定しなければ、見つかったものを使います",
    "what is found, as JSON": "結果を JSON で表示します",
    "failures only": "失敗だけを表示します",
    "a log line for each step": "段階ごとにログを一行表示します",
    "version, protocol, sha256 of this file and of its blocks": "版、通信規約、このファイルとブロックの sha256",
    "what a word does, and an example": "語の説明と例",
    "for every word:": "すべての語に:",
    " (a value that begins with - is written with =, as in %s=--fine)":
        " (- で始まる値は %s=--fine のように = でつないでください)",
    "unknown option %s%s; --help says more": "オプション %s はありません%s。--help を見てください",
    "one of these words must come first: %s%s; --help says more": "最初の語は次のいずれかです: %s%s。--help を見てください",
    "%s needs %s; --help says more": "%s には %s が必要です。--help を見てください",
    " and ": " と ",
    "what is %s? It must be: %s; --help says more": "%s は何ですか。正しい形: %s (--help を参照)",
    "%s is no option of %s; it must be: %s; --help says more":
        "%s は %s のオプションではありません。正しい形: %s (--help を参照)",
    "input files and directories": "入力のファイルとディレクトリ",
    "where the results go (default: here)": "結果を置く場所 (既定: ここ)",
    "leave the directory there, also when all went well": "うまく終わった場合も、外部計算機のディレクトリを残します",
    "results that their owner's rules keep there are no failure": "所有者の規則で出されない結果があっても失敗としません",
    "through this batch system there (with a guard: its ini says so)":
        "外部計算機のこのバッチシステムを通します (guard があれば、その ini で決まります)",
    "of its submission, as in: --batch-option=--time=60": "投入のオプション (例: --batch-option=--time=60)",
    "auto, or how many connections at once for large files": "auto、または大きなファイルに同時に使う接続の数",
    "how long a lost line is tried again": "切れた回線をどれだけ試し直すか",
    "directory on the external computer": "外部計算機のディレクトリ",
    "options for ssh, as in: '-F /etc/mi/ssh_config'": "ssh のオプション (例: '-F /etc/mi/ssh_config')",
    "seconds between TERM and KILL": "TERM から KILL までの秒数",
    "all that ended before this time, as in 30d": "この時間より前に終わったものすべて (例: 30d)",
    "only at what another version has left": "ほかの版が残したものだけを調べます",
    "the line for authorized_keys for this public key": "この公開鍵の authorized_keys の行を表示します",
    "in the key line: this key's calculations are its own, no other key sees them":
        "鍵の行で: この鍵の計算はこの鍵だけのもので、ほかの鍵からは見えません",
    "Runs CMD at HOST (a word of ~/.ssh/config) with these files, and fetches everything that it leaves;"
    " the exit code is the command's own. A lost line is opened again, the command runs on meanwhile.":
        "HOST (~/.ssh/config の語) でこれらのファイルを使って CMD"
        " を実行し、残されたものをすべて取得します。終了コードはコマンド自身のものです。切れた回線はつなぎ直し、その間もコマンドは動き続けます。",
    "Goes on with a calculation whose runner died or gave up, days later too. --to: also if its results"
    " were fetched before.":
        "実行側が止まった、またはあきらめた計算を続けます。何日後でも構いません。--to: すでに取得した結果も、もう一度取得します。",
    "Ends a command that runs: TERM, then KILL.": "実行中のコマンドを TERM、続いて KILL で終わらせます。",
    "Removes directories there and records here.": "外部計算機のディレクトリと、こちらの記録を削除します。",
    "Looks at things as they are, here and at HOST, and changes nothing: OK, WARN or FAIL, and what to do.":
        "こちらと HOST の状態を調べ、OK・WARN・FAIL と、するべきことを示します。何も変更しません。",
    "The calculations of this side; with HOST: those on that host.": "この側の計算の一覧。HOST を付けると、そのホストにある計算。",
    "example:": "例:",
    "%s: was written by a newer version of this program": "%s: より新しい版のプログラムが書いたものです",
    "%s: %d unfinished calculations of an older version go on (resume), where the far side is of this "
    "version, too":
        "%s: 旧版の未完了の計算 %d 件は、相手側もこの版なら resume で続行できます",
    "%s: %d calculations of an older version go on; only a runner of this version can fetch them":
        "%s: 旧版の計算 %d 件は、そのまま続行できます。結果の取得にはこの版の本プログラムが必要です",
    "%s: nothing unfinished of another version": "%s: 別の版の未完了の計算はありません",
    "programs of this host are started from there, or set up by it; take another --to":
        "この計算機のプログラムの起動や設定に使われる場所です。別の --to を指定してください",
    "no lock can be had beside its notes (%s); it is not submitted until there is one":
        "記録の場所でロックを取得できません (%s)。取得できるまで投入しません",
    "no home directory is known here: set HOME, or XDG_STATE_HOME, to an absolute path":
        "ホームディレクトリがわかりません。HOME または XDG_STATE_HOME に絶対パスを設定してください",
    "%s: [ssh guard] base: no home directory is known here; say it as an absolute path":
        "%s: [ssh guard] base: ホームディレクトリがわかりません。絶対パスで指定してください",
                        # what a person reads, in Japanese
    "an argument is not UTF-8": "引数が UTF-8 ではありません",
    "interrupted": "中断されました",
    "%s: interrupted; the command runs on there, %s.py resume %s continues":
        "%s: 中断されました。コマンドは外部計算機で続いています。%s.py resume %s で再開できます",
    "%s: interrupted; %s.py resume %s continues": "%s: 中断されました。%s.py resume %s で再開できます",
    "a bug (%s in line %d: %s); please report this line, -v shows more":
        "プログラムの不具合です (%s、%d 行目: %s)。この行をお知らせください。-v で詳細を表示します",
    "is not a time (like 90s, 5m, 2h, 30d)": "時間ではありません (例: 90s, 5m, 2h, 30d)",
    "is not a size (like 64K, 16M, 2G)": "サイズではありません (例: 64K, 16M, 2G)",
    "is not yes or no": "yes か no ではありません",
    "is not a whole number": "整数ではありません",
    "is not one of: %s": "次のいずれかではありません: %s",
    " (did you mean %s?)": " (%s のことですか?)",
    " (it belongs into %s)": " (%s に書くものです)",
    "%s: no such file (--ini)": "%s: ファイルがありません (--ini)",
    "%s: must belong to you or root, and nobody else may write to it (chown, chmod go-w; or"
    " run this as its owner)":
        "%s: 所有者は実行ユーザーか root とし、ほかの人が書き込めないようにしてください (chown, chmod go-w。または所有者として実行)",
    "the guard's rules: %s": "ガードの規則: %s",
    "more than %d patterns; a directory (DIR/) or ** stands for many":
        "パターンが %d 個を超えています。ディレクトリ (DIR/) や ** で多くの名前を一度に指定できます",
    "no %s in %s; say --ini FILE": "%s が %s にありません。--ini FILE で指定してください",
    "%s: [%s] is not a section%s": "%s: [%s] というセクションはありません%s",
    "%s: [%s] %s is not a key%s": "%s: [%s] %s というキーはありません%s",
    "is not COUNT,INTERVAL (like 5,60)": "「回数,間隔」ではありません (例: 5,60)",
    "is not auto or a number from 1 to %d": "auto または 1 から %d の数ではありません",
    "is not a directory": "ディレクトリではありません",
    "belongs to another user": "他のユーザーの所有です",
    "the directory was removed": "ディレクトリが削除されました",
    "%s: another program is putting results of %s there; try again when it has ended":
        "%s: 別のプログラムが %s の結果を書き込んでいます。終わってからもう一度実行してください",
    "a name that is kept for what arrives": "受信中のファイル用の名前です",
    "a name of this program's own files or of Python's start, and this program lies there; take another --to":
        "本プログラムか Python の起動時のファイル名で、本プログラムがそこにあります。別の --to を指定してください",
    "this file system takes its name and that of another result for one (%s)":
        "このファイルシステムでは別の結果 (%s) と名前を区別できません",
    "is there already, and not of this calculation; --to DIR or --out NAME agrees to its being replaced":
        "この計算のものではないファイルが既にあります。置き換えてよければ --to DIR か --out 名前 を指定してください",
    "was changed here while the calculation ran, and is left as it is": "計算中にこちらで変更されたため、そのまま残しました",
    "a directory or a symbolic link is in its way": "ディレクトリかシンボリックリンクが妨げています",
    "%s: is not here, although all was fetched": "%s: すべて取得したはずですが、こちらにありません",
    "%s: its results were fetched, and its directory there is gone": "%s: 結果は取得済みで、先方のディレクトリはもうありません",
    "sent": "送信",
    "fetched": "受取済み",
    "on this side": "こちら側",
    "no command, or one with control characters": "コマンドがないか、制御文字を含みます",
    "client_name:HOST is missing": "client_name:ホスト がありません",
    "client_cmd:COMMAND is missing": "client_cmd:コマンド がありません",
    "argument %(argument_name)s: %(message)s": "引数 %(argument_name)s: %(message)s",
    "expected one argument": "値が必要です",
    "expected at least one argument": "値が一つ以上必要です",
    "invalid choice: %(value)r (choose from %(choices)s)": "%(value)r は選べません (選べるもの: %(choices)s)",
    "ignored explicit argument %r": "値 %r は取りません",
    "%s; --help says more": "%s (--help を参照)",
    " (what it left was fetched; nothing is run a second time by itself)": " (残された分は取得しました。自動で再実行はしません)",
    "%s: not one public key": "%s: 公開鍵 1 個ではありません",
    "%s: put it where the path has no quotes, blanks or $": "%s: 引用符、空白、$ を含まないパスに置いてください",
    "%s: the command was not started yet; end its runner instead":
        "%s: コマンドはまだ始まっていません。実行中の本プログラムの方を止めてください",
    "%s: not a UUID (see: list; its first eight characters do)":
        "%s: UUID ではありません (list で一覧が見られます。先頭 8 文字でも構いません)",
    "%s: which one? %s": "%s: どれですか。%s",
    " (cancelled by hand)": " (手動で中止)",
    "%s: %s (try by hand: %s)": "%s: %s (手で試すには: %s)",
    "%s: not a host": "%s: ホスト名ではありません",
    "%s: the connection broke off": "%s: 接続が切れました",
    "the connection broke off": "接続が切れました",
    "no answer": "応答がありません",
    "the guard of %s: %s": "%s の guard: %s",
    "%s: changed while it was sent": "%s: 送信中に変更されました",
    "%s: an answer that makes no sense": "%s: 応答が不正です",
    "%s: may not be read": "%s: 読み取れません",
    "%s: neither file nor directory": "%s: ファイルでもディレクトリでもありません",
    "two inputs have the name %s: %s and %s": "入力の名前 %s が重複しています: %s と %s",
    "the sum of a piece was wrong %d times: %s": "チェックサムが %d 回一致しませんでした: %s",
    "%s: another runner is at work on it": "%s: 別のプロセスが処理中です",
    "%s: no such calculation here (see: list)": "%s: この計算はここにはありません (list を参照)",
    "%s; given up after %d tries. What was started there runs on: %s resume %s":
        "%s。%d 回試みて中止しました。先方で始まった計算は続いています: %s resume %s",
    "%s; given up after %d tries; nothing was started there: %s resume %s":
        "%s。%d 回試みて中止しました。先方ではまだ何も始まっていません: %s resume %s",
    "%s: the log-in there ended with code %d before it came to what was asked for%s; an exit or exec in "
    "a file that its shell reads first (.bashrc, .cshrc), or an account without a shell?":
        "%s: ログインは、依頼の実行に至る前に終了コード %d で終わりました%s。ログインシェルが最初に読むファイル (.bashrc, .cshrc) に exit か exec がある、"
        "またはシェルのないアカウントではありませんか?",
    "%s: expected client_name:HOST client_cmd:COMMAND client_files:A,B,C":
        "%s: client_name:ホスト client_cmd:コマンド client_files:A,B,C の形で指定してください",
    "%s: %s, exit code %d (the %s's)": "%s: %s、終了コード %d (%s のもの)",
    "ssh goes to %s@%s port %s%s": "ssh の接続先: %s@%s ポート %s%s",
    "~/.ssh/config switches the check of host keys off; it is made all the same":
        "~/.ssh/config はホスト鍵の確認を無効にしていますが、確認は行います",
    "log-in in %.2f s, round trip %.1f ms": "ログイン %.2f 秒、往復 %.1f ミリ秒",
    "guard there": "先方に guard があります",
    "no guard there: this key may run anything": "先方に guard がありません: この鍵は何でも実行できます",
    "systemd there ends everything at log-out: ask for loginctl enable-linger":
        "先方の systemd はログアウト時に全プロセスを終了させます: loginctl enable-linger を依頼してください",
    "free there: %.1f GB": "先方の空き: %.1f GB",
    "yes": "あり",
    "no": "なし",
    "commands allowed: %s": "許可されたコマンド: %s",
    "none: add sections [command NAME] with argv =": "なし: argv = を持つ [command 名前] を追加してください",
    "%s: others may write to it": "%s: 他人が書き込めます",
    "%s: nobody else may write to it": "%s: 他人は書き込めません",
    "is not NAME OPTION-WITH-{} EXPRESSION: %s": "「名前 {}を含むオプション 正規表現」ではありません: %s",
    "the default does not match the expression: %s": "既定値が正規表現に合いません: %s",
    "%s: not found in PATH: the batch system's own programs are needed on this host (env.PATH of its "
    "section in the ini; for ssh without a "
    "guard: `module load`, or PATH, at the top of ~/.bashrc there)":
        "%s: PATH に見つかりません。バッチシステムのコマンドがこの計算機に必要です (ini のそのセクションの env.PATH、guard なしの SSH では先方の ~/.bashrc "
        "の先頭で "
        "module load または PATH を指定してください)",
    "%s: one job that runs one command, and a submission that returns at once: nothing else can be used":
        "%s: 使えません。一つのコマンドを一度実行する一つのジョブで、投入がすぐに戻るものに限ります",
    "batch.%s may not be %s here": "batch.%s をここで %s にはできません",
    "batch.%s may not be set here": "batch.%s はここでは指定できません",
    "which cluster it is, every program must know: env.SLURM_CLUSTERS = NAME, no --clusters":
        "どのクラスタかは全プログラムが知る必要があります。--clusters ではなく env.SLURM_CLUSTERS = NAME とします",
    "a line break in an argument or a variable": "引数か変数に改行があります",
    "%s: %d key lines with this guard": "%s: この guard の鍵の行: %d",
    "--key %s: a word of letters and digits, please": "--key %s: 英数字の語にしてください",
    "%s: belongs to somebody else": "%s: 所有者が他の利用者です",
    "it is broken": "壊れています",
    "%s: %s: line %d of its journal is broken, and left out": "%s: %s: ジャーナルの %d 行目は壊れているため読み飛ばします",
    "%s: its first line ends with CR LF, so that the system finds no such interpreter (sed -i 's/\\r$//' %s)":
        "%s: 1 行目が CR LF で終わっているため、インタプリタが見つかりません (sed -i 's/\\r$//' %s)",
    "%s: its record cannot be read (%s: %s); remove the directory when it is not needed any more":
        "%s: 記録を読めません (%s: %s)。不要になったらディレクトリごと削除してください",
    "key line begins with restrict: %s...": "鍵の行は restrict で始まる必要があります: %s...",
    "blanks stand between names, no commas": "名前の区切りは空白です。コンマは使えません",
    "has a word that is not one of: %s": "次のどれでもない語があります: %s",
    "one absolute path a line, please": "絶対パスを一行に一つ書いてください",
    "%s: no declared type: %s": "%s: 宣言できる型ではありません: %s",
    "is not a list of sha256 sums (64 hexadecimal digits each)": "sha256 (それぞれ 16 進 64 桁) の一覧ではありません",
    "arguments need a line {parameters} in argv, argument.N for each, and no parameters = no":
        "引数には argv の行 {parameters} と引数ごとの argument.N が必要です (parameters = no とは両立しません)",
    "arguments with control characters, or too long": "引数に制御文字があるか、長すぎます",
    "an empty name": "名前が空です",
    "must be argument.1, argument.2, ... or env.NAME_OF_A_VARIABLE":
        "argument.1, argument.2, ... または env.変数名 としてください",
    "the first line must be the absolute path of a program": "1 行目はプログラムの絶対パスとしてください",
    "no [command NAME] for %s: it is not in this host's list":
        "%s に対する [command 名前] がありません (この計算機の許可一覧にありません)",
    "[command %s] input_names does not allow %s": "[command %s] の input_names は %s を許していません",
    "[command %s] gives results by name only (patterns = no)":
        "[command %s] の結果は名前での指定だけに応じます (patterns = no)",
    "a name that is not UTF-8": "名前が UTF-8 ではありません",
    "a name that is too long: %s...": "名前が長すぎます: %s...",
    "a name with a control character or a backslash: %s": "名前に制御文字かバックスラッシュがあります: %s",
    "a name that is absolute or has an empty, . or .. part: %s": "名前が絶対パスか、空・.・.. を含みます: %s",
    "is not a number from %d to %d": "%d から %d までの数ではありません",
    "arguments that no shell would split: %s": "シェルの規則で分けられない引数です: %s",
    "[command %s] argument.%d does not allow %s": "[command %s] の argument.%d は %s を許していません",
    "two names that are equal, one in the other, or out of order: %s": "名前が重複するか、包含するか、順序が違います: %s",
    "a name that is kept for the log: %s": "ログのための名前は使えません: %s",
    "%s: [%s] match: another command has it already": "%s: [%s] match: 別のコマンドが同じ語を使っています",
    "%s: must be an executable file that not everybody may change (chmod +x, chmod o-w)":
        "%s: 実行可能で、誰でも書き換えられる状態にないファイルが必要です (chmod +x, chmod o-w)",
    "changed after it was judged": "判定した後に変わりました",
    "%s (is the disk full there?)": "%s (先方のディスクが一杯ではありませんか?)",
    "%s there: files go by rsync, nothing can be resumed (rsync here: %s)":
        "先方: %s。ファイルは rsync で送受信し、再開はできません (こちらの rsync: %s)",
    "%s: %s: a batch system there needs it": "%s: %s (先方のバッチシステムの利用に必要です)",
    "%s: %s; the plain way needs rsync on both sides": "%s: %s。簡易方式には両側に rsync が必要です",
    "%s: its guard is of an older version (protocol 1); this file has to be put there":
        "%s: 先方の guard は旧版 (プロトコル 1) です。このファイルを先方に置いてください",
    "%s: not all inputs could be sent (rsync says why)": "%s: 送信できなかった入力があります (理由は rsync の出力のとおりです)",
    "%s: the line was lost, and by the plain way nobody can know how the command ended; its directory "
    "there is "
    "%s/%s":
        "%s: 接続が切れました。簡易方式ではコマンドの結末がわかりません。先方のディレクトリ: %s/%s",
    "%s: the log-in came to another host (%s), where nothing of it is; it was sent to %s":
        "%s: ログイン先が別の計算機 (%s) で、この計算はそこにありません。送信先は %s でした",
    "asked for and not here: %s": "要求した結果のうち届かないもの: %s",
    "calculations there: %s": "先方の計算: %s",
    "python %s there, AES: %s": "先方の Python: %s、AES: %s",
    "; on the workflow system's side say: check HOST": "。ワークフローシステム側では check ホスト を使ってください",
    "no guard is here: %s has no [command NAME], %s no key line":
        "この計算機に guard はありません: %s に [command 名前] がなく、%s に鍵の行がありません"
}


if __name__ == "__main__":
    run_as_program(main)
