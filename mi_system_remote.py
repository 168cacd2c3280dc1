#!/usr/bin/env python3
"""The poller ("C"): runs on the external computer, beside what must stay there. Its admin starts it, as an
ordinary user of its own. It asks the workflow system's relay for work (outbound https only), runs the one
command that was agreed, sends back the agreed results.

usage: mi_system_remote.py poll [--once] [--drain] [--jobs N] [--idle-exit SECONDS]
                systemd (KillMode=process), a terminal; --once: cron, works off what is there and ends;
                --drain: takes nothing new, ends when all here is delivered; --idle-exit: after so long idle
       mi_system_remote.py SITE BASE_URL TOKEN|login [debug] [no_auth[:CAFILE]] [port:N]
                           [retry:COUNT,INTERVAL] [calc_base:DIR]
       mi_system_remote.py list | show ID | explain ID | metrics | pause | resume    what is here; all of one;
                                                why it is there; figures; takes nothing new until resume
       mi_system_remote.py outbox | resend ID | release ID | refuse ID --reason TEXT    results that wait
       mi_system_remote.py try COMMAND [FILE...]     runs one of the list on files of this host, without relay
       mi_system_remote.py scan FILE... | what-leaves ID|DIR      what the rules say of these, before they leave
       mi_system_remote.py audit verify [--witness HEAD] | audit report [--since TIME] [--csv]
       mi_system_remote.py check [--upgrade] | bundle FILE      is all well here; packs what support needs
       mi_system_remote.py unit [--once | --timer | --cloud-init]     prints a systemd unit, or what it needs
       mi_system_remote.py login [USER] | enroll | hello SITE     a token: by password, by a kit's code; a trial
options: --ini FILE  --json  -q  -v  --version  --help

What it does, by the suite's step numbers: 3 asks for a calculation, 4 fetches the inputs, 5 starts the
  command, 6 tells its end, 7 sends the results, 8 says that all were sent.
What it runs: only what a [command NAME] of the ini names, as an argument vector, never through a shell. Words
  from the relay become arguments only where argument.N allows them. Without such a section it does not start.
  batch = slurm, pbs or htcondor: it is submitted there, as a job of the poller's user.
What it sends: declared results that [outbound] lets out, the command's stdout and stderr under the same rules
  (as they are written, unless output = no, or [outbound] has rules about content), exit code and times; of
  this host: free bytes of calc_base, a random name, its audit log's last sum; unless tell = no also version,
  whether it takes work or why not (until when), calculations of how many, since when results are refused.
What the command sees: the working directory CALC_DIR, MI_RUN=ACCEPT_ID.N, env.VAR of its section, and of the
  poller's environment PATH HOME USER LOGNAME LANG LC_* TZ TMPDIR; no token. It runs as the poller's user.
What is never lost: everything is on disk before it is told. Stop, kill or update the poller at any time: the
  command outlives it, the next start delivers what ended. No command is ever started twice.
Token: token_file (0600; a kit's first start exchanges token_file.code for it), $MI_DISTCOMP_TOKEN, a prompt, or
  $CREDENTIALS_DIRECTORY/mi_distcomp_token. On the command line others see it for a moment: it is warned of.

exit codes: 0 done, or stopped by SIGTERM, 64 usage, 65 what was held has changed, 69 relay unavailable, 70
bug, 74 input/output, 75 another poller holds calc_base, or (--once, --drain) disk full or a result still
here, 77 token or site refused, 78 configuration, 130 after Ctrl+C

contents (grep -n '^# ====' prints them with their lines):
  shared: alone                 no module is taken from where results arrive
  shared: gate                  what may run, what may leave
  shared: watch                 one run, from its first note to what it leaves behind
  shared: content               what is looked for in all that leaves
  shared: hold                  what waits for a person, and his word
  shared: audit                 what was done and what left, chained
  one calculation               steps 3 to 8, from wherever the journal stands
  what the carrier remembers    order and journal on this disk
  the poller                    what its threads share, slots, room on the disk
  the line to the relay         asking for work, heartbeats
  a person's words              list, show, explain, outbox, release, metrics, pause, check, unit
  trying a command              `try`, `scan`, `what-leaves`: the gate's own way, without a relay
  start and command line
  what the ini may say
  fielded                       a relay of before ("v1"), the manual's words
  shared: seal                  who may order: signatures, each order once
  shared: sign                  signatures are made by ssh-keygen or openssl
  shared: run                   a command: started, followed, ended
  shared: batch                 the same through a batch system
  shared: names                 names of files: checked by every receiver
  shared: wire                  the relay's client
  shared: lanes                 large files over several connections at once
  shared: pieces                files that come in pieces, in any order
  shared: stream                fielded bodies, which hold whole files, pass as streams
  shared: reach                 `check` of the way to the relay, and `login`
  shared: refusals              what is refused for, in the reader's language
  shared: cause                 why a calculation is where it is, for people
  shared: meter                 figures for Prometheus
  shared: check
  shared: lean                  what runs for long gives back what its start took
  shared: ini
  shared: usage                 words and options, --help, --version
  shared: bundle                what support needs to see, without secrets
  shared: table                 lists: columns, states in words, drawn anew
  shared: say
  tables                        words and options, keys of the ini
  texts of units
  Japanese

threads: main (Poller.run) waits for signals; ClaimLoop asks for work; Heartbeats renews claims; Presence
tells how it stands (run), and lets the relay see when it is gone (hold); tick_forever does what is due each
second; each calculation has one (Carrier.work), each batch system's BatchQueue one while it is asked.
locks: Poller.slots (slots, claims) is the outermost; Gate.licences may be taken under it. BatchQueue.lock,
BatchQueue.submitting (one submission at a time) and SAY's are held for a moment, or by one thread.
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
import collections
import contextlib
import errno
import functools
import io
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import threading
import time

PROGRAM, VERSION = "mi_system_remote", "1.0"

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


# ==== one calculation ====
POLL_WAIT = 50            # seconds that a calc-request or heartbeat may wait at the relay (proxies cut at 60)
PAGE = 1000                    # entries of a manifest in one call
MAX_INPUTS = 200000            # input files of a calculation; a relay that sends more is refused
DISK_PAUSE = 30                # seconds until a full disk is looked at again
REFUSED_PAUSE = 60        # seconds until a result that the relay refuses is sent again: doubled each time ...
REFUSED_MOST = 3600            # ... up to this
LEAVE = 3                     # seconds after a signal until it ends in any case, even if nobody reads its log
RESERVE = 256 << 10            # bytes of calc_base that are kept for the journals of what fills the disk


class Carrier:
    """Steps 4 to 8 of one calculation (calc), in a thread of its own, over a connection of its own
    (relay)."""

    def __init__(self, poller, calc, relay):
        self.poller = poller
        self.calc = calc
        self.relay = relay

    def work(self, page=None):
        """A thread: one calculation, until it is delivered, taken away by the relay, or left for the next
        start."""
        def pause(wait):
            self.poller.pause(wait, self.calc)

        def notice(why):
            self.calc.why = why or ""
            self.poller.notice(why)

        self.relay.pause, self.relay.on_outage, backoff = pause, notice, Backoff(REFUSED_MOST)
        backoff.now = REFUSED_PAUSE
        while True:
            try:
                self.carry_out(page)
            except WaitsForPerson:
                return self.poller.park(self.calc, self.relay)
            except OSError as error:                  # a full or broken disk: the journal says where to go on
                wait, self.calc.why = (0 if error.errno in FULL_WORDS and give_reserve(self.poller.base)
                                       else DISK_PAUSE, error)
            except RelayRefused as error:
                wait, self.calc.why = backoff.next(), error
            except Exception as error:                     # a bug, or results that change again and again
                wait, self.calc.why = backoff.next(), "%s: %s" % (type(error).__name__, error)
            else:
                if self.poller.free_slot(self.calc, self.relay):
                    return
                page = None
                continue
            if self.poller.ending() and not isinstance(self.calc.why, OSError):
                self.poller.stuck.append("%s: %s" % (self.calc.name, self.calc.why))
                log("error", self.calc.accept_id, "stays here until the next start", why=self.calc.why)
                self.calc.note_next_try(0, self.calc.why)
                return self.poller.free_slot(self.calc, self.relay, True)
            log("error", self.calc.accept_id, "it stays here and is tried again", why=self.calc.why,
                again_in=round(wait))
            self.relay.close()
            page = None
            self.poller.put_off(self.calc, self.relay, wait)

    def moved(self, count):
        """Bytes of its files went over the line."""
        self.calc.rate.moved(count)
        self.poller.bytes_moved(count)

    def carry_out(self, page):
        """Steps 4 to 8 of one calculation, from wherever its journal stands; after any crash or failure it is
        called again."""
        claim, self.calc.rate = self.calc.claim, Rate(self.relay)
        try:
            if not self.calc.run.last("ended") and self.calc.run.never_started():
                if not self.calc.run.last("starting"):
                    self.poller.wait_for_twin(self.calc)
                earlier = None if self.calc.run.last("starting") else self.ran_before()
                if earlier:
                    return self.go_on_with(earlier)
                self.begin_run(page)
            if not self.calc.run.last("ended"):
                self.calc.phase = "running"
                self.calc.run.follow_to_end()
            claim = self.calc.claim
            self.deliver()
        except RelayRefused as error:
            with self.poller.slots:
                if self.calc.claim == claim:
                    return self.lose_claim(error)
            self.carry_out(None)           # it got another claim meanwhile

    def lose_claim(self, error):
        """The relay says no. The claim is gone (404, 409): what never started here goes, a result stays on
        this disk. Any other no is raised again: its reason may go away."""
        # the relay's own word, not a failure on the way
        gone = error.code in (404, "0300") or error.code == 409 and error.more
        if self.calc.run.never_started() and (gone or not self.calc.run.last("ended")):
            log("warn", self.calc.accept_id, "the claim is gone", code=error.code, why=error)
            return self.calc.remove()
        if not gone:
            raise error
        log("error", self.calc.accept_id, "the result is refused and stays here", code=error.code, why=error,
            work=shown(self.calc.work))
        audit("kept", self.calc.run.name, synced=False, code=str(error.code))
        self.calc.note(8, "kept", why=str(error))

    def begin_run(self, page):
        """4. and 5. From the order to the started command, or to a journal that says why it ended without
        one."""
        run = self.calc.run
        if run.ended_by_restart() or not self.has_order():
            return
        try:
            run.permit(self.inputs_here())
        except ValueError as error:
            return run.end_early("refused", error)
        if not run.last("starting"):
            if not self.take_inputs(page):
                return
            fault("inputs here")
            self.tell_step("calc-params-complete")
            log("info", self.calc.accept_id, "4 calc-params-complete", site=self.poller.site,
                **self.calc.rate.fields())
            if not run.note_starting():
                return
            self.calc.phase = "running"
        self.tell_step("calc-start")
        fault("start told")
        run.start()

    def take_inputs(self, page):
        """4. The inputs, all of them. False if there are none to be had: then it has ended."""
        try:
            page = (page
                    or self.relay.ask("GET", "files/%s/input" % self.calc.accept_id,
                                      {"v": 2, "from": 0, "claim": self.calc.claim}))
            self.fetch_inputs(page)
            return True
        except (ValueError, OSError) as error:
            self.relay.close()
            self.calc.remove_matching(rb"part\d+(\.sums)?\Z")
            shutil.rmtree(self.calc.work, ignore_errors=True)   # room for the journal
            if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT):          # others took it meanwhile
                self.poller.make_room()
                self.poller.give_back(self.relay.ask, self.calc.accept_id, self.calc.claim)
                raise RelayRefused(409, _("given back: %s") % error.strerror, {"why": "disk"})
            kinds = ((OSError, "disk"), (Forbidden, "refused"), (ValueError, "input"))
            reason = next(word for kind, word in kinds if isinstance(error, kind))
            self.calc.run.end_early(reason, getattr(error, "strerror", None) or error)
            return False

    def fetch_inputs(self, page):
        """4. Every input into the working directory, verified. ValueError if one is not as it should be.
        After a restart the same again: large files that came whole are verified again, those that came in
        part go on where they stopped."""
        folders, target, unseen, rows = {self.calc.work}, "files/%s/input" % self.calc.accept_id, 0, []

        def part(place):
            return self.calc.path(b"part%d" % place)

        def came(count):
            nonlocal unseen
            self.moved(count)
            unseen += count
            if unseen >= 1 << 20:                          # keep_free is kept while they come, too
                unseen = look_for_room(0)

        def look_for_room(more):
            if self.poller.room_left(more)[1]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return 0

        def wanted():
            for place, name, length, sum256 in self.relay.manifest_entries(target, page, self.calc.claim):
                x = self.relay.x_and_mtime.get(place, (False, None))[0]
                rows.extend([(name, length, sum256, x)] if self.calc.run.signed else [])
                if place >= MAX_INPUTS or nfc_parts(name)[0] in LOG_NAMES:
                    raise ValueError(_("too many inputs, or one with a log's name"))
                permit_input(self.calc.run.command, name)
                look_for_room(length)
                path = os.path.join(self.calc.work, utf8(name))
                if os.path.dirname(path) not in folders:
                    folders.add(os.path.dirname(path))
                    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                if name.endswith("/"):
                    os.makedirs(path, 0o700, exist_ok=True)
                    continue
                if length > PACK_FILE and os.path.exists(path):
                    os.rename(path, part(place))
                yield place, name, length, sum256

        def store(place, name, data):
            path, (x, mtime) = os.path.join(self.calc.work, utf8(name)), self.relay.x_and_mtime.pop(
                place, (False, None))
            if data is None:
                os.rename(part(place), path)
            else:
                with open(path, "wb") as out:
                    out.write(data)
            put_marks(self.calc.accept_id, path, x, mtime)

        os.makedirs(self.calc.work, 0o700, exist_ok=True)
        self.relay.download_all(target, wanted(), store, part, self.calc.claim, came)
        self.calc.run.permit_inputs(rows)
        self.calc.run.permit_files(rows)

    def has_order(self):
        """Is it known what is to be done? False if it ends here. (The claim brought it.)"""
        return True

    def inputs_here(self):
        """The names of the inputs that are here already, before it is looked whether they may be."""
        return ()

    def tell_step(self, name):
        """4. and 5. A step of which there is no more to say. calc-start tells both where the relay
        knows `complete`."""
        more = {"complete": True} if self.calc.order.get("complete") else {}
        if name == "calc-start" or not more:
            self.relay.ask("POST", name,
                           dict(more, v=2, accept_id=self.calc.accept_id, claim=self.calc.claim))

    def ran_before(self):
        """The latest earlier attempt that was started on this host and for which no person has said rerun
        since, or None. (A relay that was restored from a backup may hand out again what has run, or still
        runs.)"""
        rerun = self.calc.info.get("rerun")
        # in any order of numbers: a restored relay counts anew
        here = list(on_disk(self.poller.base, self.poller.names.get(self.calc.accept_id, ()),
                            self.poller.gate))
        for other in reversed(here):
            if other.name == self.calc.name:
                continue
            # with `ready` still there it did not, and its claim, which has lapsed, keeps it so
            started = other.run.last("starting")
            never = (not started or started["boot"] == boot_id()
                     and command_state(other.control, time.time())[0] == "ready")
            if not never and not (type(rerun) is int and other.order["attempt"] <= rerun):
                return self.poller.under_way.get(other.name) or other
        return None

    def go_on_with(self, other):
        """The relay has handed out as calc what ran, or runs, here as other: that goes on under the new
        claim, and its result is sent (again)."""
        for step in ("calc-params-complete", "calc-start"):
            try:
                self.tell_step(step)
            except RelayRefused as error:
                if error.more.get("why") != "state":       # else it is further: a start of ours told it
                    raise
        fault("hand over")
        with self.poller.slots:
            other.order.update(claim=self.calc.claim, attempt=self.calc.order["attempt"], run=other.run.name)
            write_synced(other.path(b"order.new"), json.dumps(other.order).encode())
            os.rename(other.path(b"order.new"), other.path(b"order.json"))
            sync_path(other.control)
            fault("handed over")
            other.claim = self.calc.claim
            other.note(3, "resend")
        log("info", self.calc.accept_id, "3 it ran here before: that result is sent",
            work=shown(other.work))
        self.calc.remove()
        other.try_now.set()
        if other.name not in self.poller.under_way:
            self.poller.begin_thread(other, self.poller.free_relay())

    def deliver(self):
        """6. to 8.: tells the end, sends what may leave; then what only the wrapper needed goes."""
        with self.poller.slots:
            self.calc.phase = "results"
        self.calc.run.kept_count, self.calc.rate = 0, Rate(self.relay)
        try:
            self.send_all()
        finally:
            self.calc.run.close_trees()
        stays = self.calc.run.kept_count
        audit("left", self.calc.run.name, synced=False)
        self.calc.note(8, "delivered", **({"stays": stays} if stays else {}))
        log("info", self.calc.accept_id, "8 end-send", site=self.poller.site, **self.calc.rate.fields())
        self.calc.remove_matching(SCAFFOLD)
        Hold(self.calc.control).forget_copies()

    def send_all(self):
        """6. to 8., unless it was all told before a restart of ours."""
        if self.tell_end() != "got return":
            fault("end told")
            try:
                self.send_results()
            except WaitsForPerson as held:
                self.tell_end(int(held.since))
                raise

    def tell_end(self, held=None):
        """6. calc-end. Returns the relay's word for where it stands: further, if it was told before a restart
        of ours. held: since when the results wait for a person; the end is told once more with that."""
        end = self.calc.run.last("ended")
        fields = {key: end.get(key) for key in ("exit_code", "signal", "reason", "started", "ended")}
        fields["reason"] = outward(self.poller.rules, fields["reason"])
        fields.update({"held": held} if held else {})
        try:
            self.relay.ask("POST", "calc-end",
                           dict(fields, v=2, accept_id=self.calc.accept_id, claim=self.calc.claim,
                                result="calc end" if end["exit_code"] == 0 and not end["reason"]
                                else "abnormal"))
        except RelayRefused as error:
            if (error.more.get("why") != "state"
                    or error.more.get("state") not in ("getting return", "got return")):
                raise
            return error.more["state"]
        return "calc end"

    def send_results(self):
        """7. and 8. What may leave, all of it on the relay's disk before this returns. ValueError if it
        changes again and again."""
        for found in what_leaves(self.calc.run, self.poller.rules, self.calc.run.leaving_kinds()):
            results, said = [found.found] + [found.folders] * self.poller.folders, said_of(found)
            log("info", self.calc.accept_id, "7 send-results", site=self.poller.site, files=len(found.found),
                bytes=found.total, **{code: entry["count"] for code, entry in found.verdicts.items()})
            self.write_manifest(found)
            said["signed"] = self.signed_results(results, said)
            try:
                whole = self.send_manifest(results, said, inline_data(found.found))
                fault("manifest sent")
                if whole:
                    return fault("results told")
            except RelayRefused as error:
                if error.more.get("why") != "page":
                    raise
                # the relay has other pages of before a restart: an empty list clears them
                self.send_manifest([], {"missing": {}, "refused": {}})
                self.send_manifest(results, said)
            try:
                return self.send_files(found.found)
            except ValueError:                         # collect_until_steady() knows what, if it does
                if not any(result.source.changed for result in found.found):
                    raise

    def signed_results(self, results, said):
        """What the owner's side says of them, signed; "" without a result_key."""
        end, name = self.calc.run.last("ended"), self.calc.run.name
        told = {key: end.get(key) for key in ("exit_code", "signal")}
        told["reason"] = outward(self.poller.rules, end["reason"])           # as tell_end() says it
        rows = ((one.name, one.size, one.sum256, one.executable) for one in itertools.chain(*results))
        return signed_results(self.poller.keys["result_key"],
                              dict(told, site=self.poller.site, run=name), self.calc.control,
                              self.poller.own_rules, rows, said, self.calc.info.get("signed", ""))

    def write_manifest(self, found):
        """out/manifest.json: what leaves this host and what does not, for whoever wants to know. A full disk
        does not keep results here."""
        try:
            os.makedirs(self.calc.run.path(b"out"), 0o700, exist_ok=True)
            with open(self.calc.run.path(b"out", b"manifest.json"), "w", encoding="utf-8") as out:
                out.write('{"v": 1, "run": %s,\n"verdicts": %s,\n"files": ['
                          % (json.dumps(self.calc.run.name), json.dumps(found.verdicts)))
                for place, result in enumerate(itertools.chain(found.found, found.folders)):
                    sums = result.source.sums.hex() if result.source else ""
                    row = [result.name, result.size, result.sum256, result.executable, result.mtime / 1e9,
                           sums]
                    out.write(",\n%s" % json.dumps(row) if place else "\n" + json.dumps(row))
                out.write("]}\n")
        except OSError as error:
            log("warn", self.calc.accept_id, "7 no manifest", error=error)

    def send_manifest(self, results, said, inline=()):
        """7. send-results, in pages; digest tells one manifest from another whose first page is the same.
        results: lists of Results; said: see said_of(); inline: the base64 of the first list's, all of them or
        none. True if that was all, and step 8, too."""
        import hashlib
        digest, count = hashlib.sha256(), sum(map(len, results))
        for result in itertools.chain(*results):
            digest.update(utf8("%s/%s\n" % (result.name, json.dumps(entry_of(result), sort_keys=True))))

        def pages():                                   # no more than one is in memory
            entries = ((result.name, entry_of(result)) for result in itertools.chain(*results))
            for start in range(0, count or 1, PAGE):
                yield start, dict(itertools.islice(entries, PAGE)), {
                    "v": 2, "claim": self.calc.claim, "more": start + PAGE < count}

        _start, page, fields = next(pages())
        for result, data in zip(results[0] if inline else (), inline):
            page[result.name]["data"] = data
        answer = self.relay.ask("POST", "send-results",
                                dict(fields, accept_id=self.calc.accept_id, result_files=page,
                                     digest=digest.hexdigest(), end=bool(inline), audit=AUDIT["head"],
                                     **said))
        if fields["more"]:
            self.relay.ask_in_row(lambda: (
                ("files/%s/result" % self.calc.accept_id, dict(fields, **{"from": start, "files": page}))
                for start, page, fields in pages() if start))
        return bool(answer.get("end"))

    def send_files(self, found):
        """7. and 8. Uploads what the relay says is missing, until nothing is. ValueError if a file is no
        longer what the manifest says."""
        before = None
        while True:
            try:
                self.relay.ask("POST", "end-send",
                               {"v": 2, "accept_id": self.calc.accept_id, "claim": self.calc.claim,
                                "result": "end send"})
                return fault("results told")
            except RelayRefused as error:
                numbers = error.more.get("incomplete")
                if error.code != 409 or not isinstance(numbers, list) or numbers == before:
                    raise
            before = numbers
            try:
                todo = [place for place in numbers if type(place) is int and 0 <= place < len(found)]
                self.relay.upload_all("files/%s/result" % self.calc.accept_id, found, todo, self.calc.claim,
                                      self.moved)
                fault("results sent")
            except OSError as error:
                raise ValueError(error.strerror)


def put_marks(ident, path, x, mtime):
    """What an input's owner said of it: may it be executed, when was it changed (nanoseconds, or None)?"""
    try:
        if x:                                          # whoever may read it may execute it
            os.chmod(path, os.stat(path).st_mode | (os.stat(path).st_mode & 0o444) >> 2)
        if mtime is not None:
            os.utime(path, ns=(mtime, mtime))
    except OSError as error:                           # a file system that keeps neither: the command sees
        log("info", ident, "4 a file's marks", name=shown(path), error=error)


def entry_of(result):
    """A manifest's entry for a Result."""
    return dict({"size": result.size, "sha256": result.sum256, "mtime": round(result.mtime / 1e9, 6)},
                **({"x": True} if result.executable else {}))


def said_of(found):
    """What send-results says of what stays here: verdicts, and, for relays that know none, missing and
    refused {name: why}."""
    missing = {name: "not there" if code == "missing" else code
               for name, (code, why) in found.kept_by_name.items() if code == "missing"}
    refused = {name: code for name, (code, why) in found.kept_by_name.items() if code != "missing"}
    others = {code: entry["count"] - sum(one == code for one, why in found.kept_by_name.values())
              for code, entry in found.verdicts.items()}
    if any(others.values()):
        refused["*"] = ", ".join("%s: %d" % pair for pair in sorted(others.items()) if pair[1])
    def as_told(words):
        return {printable(name)[:1000]: printable(why)[:1000] for name, why in words}
    return {"missing": as_told(list(missing.items())[:PAGE]),
            "refused": as_told(list(refused.items())[-PAGE:]), "verdicts": found.verdicts}


# ==== what the carrier remembers ====
ACCEPT_ID = re.compile(r"[0-9a-f-]{36}\Z")
# what is kept of a calc-info
INFO_KEYS = ("command", "remote-site", "parameters", "result_files", "result_patterns", "rerun", "signed")
ON_DISK = 2                    # form of a calculation's files: 1 has one journal; a newer one is left alone
# Calculation.state(), for people; those that take a slot
LISTED_STATES = ("claimed", "starting", "queued", "running", "lost", "undelivered", "delivered", "kept",
                 "held")
TAKE_A_SLOT = LISTED_STATES[:4]
# what the carrier notes
CARRIED = ("asked", "receiving", "sent", "delivered", "kept", "resend", "cannot be removed")
# needed by nobody after delivery
SCAFFOLD = (rb"(take|run|ready|alive|order\.new|end\.tmp|part\d+(\.sums)?|waits|job(\.sub)?|words|told"
            rb"|batch\.stop)\Z")


class Calculation:
    """What the carrier remembers of one calculation, and its run at the gate. order (order.json): what the
    relay said, and which RUN its claim is of; `carrier`: a journal of what was told and delivered. name:
    ACCEPT_ID, or ACCEPT_ID.N, of the two directories."""

    def __init__(self, base, name, order, gate=None):
        self.name = name
        self.order = order
        self.accept_id = order["accept_id"]
        self.claim = order["claim"]
        self.work = os.path.join(base, utf8(name))
        self.control = os.path.join(base, b".mi", utf8(name))
        self.run = GateRun(gate, order.get("run") or "%s.%d" % (order["accept_id"], order["attempt"]),
                           self.accept_id, self.work, self.control, order["calc-info"],
                           [(LOG_NAMES[0], self.control, b"stdout"), (LOG_NAMES[1], self.control, b"stderr")],
                           {})
        self.phase = "inputs"      # as the heartbeat says it
        self.since = time.monotonic()
        self.try_now = threading.Event()               # somebody said resend
        self.why = ""              # what keeps it from being delivered
        self.over_limit = False    # is its live output, which was said?
        self.rate = None           # of its files, while they are on their way
        self.live_noted = {}       # {stream: as far as the audit log has it that it may leave}
        self.carrier_journal = Journal(self.path(b"carrier"), needed=False)
        older = [entry for entry in self.run.journal.entries if entry.get("what") in CARRIED]
        self.journal = older + self.carrier_journal.entries      # there was one journal for both

    @property
    def info(self):
        """The calc-info: the run's order."""
        return self.run.order

    def path(self, *parts):
        """A file of the control directory."""
        return os.path.join(self.control, *parts)

    def last(self, what):
        """The last entry of the carrier's journal of that kind, or None."""
        return next((entry for entry in reversed(self.journal) if entry.get("what") == what), None)

    def note(self, step, what, **more):
        """One line into the carrier's journal, on disk before this returns."""
        self.carrier_journal.note(step, what, **more)
        self.journal.append(self.carrier_journal.entries[-1])

    def whole_journal(self):
        """Both journals as one, for people."""
        return sorted(self.run.journal.entries + self.carrier_journal.entries,
                      key=lambda entry: entry["t"] if isinstance(entry.get("t"), (int, float)) else 0)

    def delivery(self):
        """"delivered", "kept" (the relay does not want it), or "" while there is something to do."""
        words = [entry["what"]
                 for entry in self.journal if entry.get("what") in ("delivered", "kept", "resend")]
        return words[-1].replace("resend", "") if words else ""

    def wanted_again(self):
        """Is its result to be sent again, after it was delivered or kept?"""
        return not self.delivery() and self.last("resend") is not None and os.path.isdir(self.control)

    def note_next_try(self, wait, why):
        """Its result is tried again in `wait` seconds; beside the journal, for `outbox`."""
        if self.run.last("ended"):
            try:
                with open(self.path(b"waits"), "w") as out:
                    json.dump({"next": round(time.time() + wait), "why": str(why)}, out)
            except OSError:
                pass

    def state(self):
        """For people: one of LISTED_STATES."""
        found = self.delivery() or self.run.state()
        if found == "ended" and Hold(self.control).pending(0) is not None:
            return "held"
        return "undelivered" if found == "ended" else found

    def remove_matching(self, names):
        """Removes files of the control directory whose names match."""
        for name in os.listdir(self.control):
            if re.match(names, name):
                try:
                    os.unlink(self.path(name))
                except FileNotFoundError:
                    pass

    def may_be_removed(self, keep, keep_refused):
        """Is it delivered for `keep` seconds, and, where something was kept from leaving, for keep_refused?
        What could not be removed a day ago is not tried yet."""
        if self.delivery() != "delivered":
            return False
        done, stuck = self.last("delivered"), self.last("cannot be removed")
        return (time.time() - done["t"] > max(keep, keep_refused if done.get("stays") else 0)
                and (not stuck or time.time() - stuck["t"] > 86400))

    def clear(self):
        """Removes the working directory. False if something of it cannot be: a line says what, and the
        journal knows it."""
        left = remove_tree(self.work)
        if left:
            self.note(8, "cannot be removed", names=left[:20])
            log("error", self.accept_id, "cannot be removed", names=" ".join(left[:5]),
                work=shown(self.work))
        return not left

    def remove_files(self):
        """All that takes room; order and journal stay, so that it is known here and does not run again."""
        if self.clear():
            Hold(self.control).forget_copies()
            shutil.rmtree(self.path(b"out"), ignore_errors=True)
            self.remove_matching(rb"stdout|stderr|" + SCAFFOLD)

    def remove(self):
        """Both directories; the control directory loses its name first, so that there is never half of
        one."""
        gone = os.path.join(os.path.dirname(self.control), b"gone." + utf8(self.name))
        if not self.clear():
            return
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(self.control, gone)
        fault("control gone")
        shutil.rmtree(gone, ignore_errors=True)


def on_disk(base, names=None, gate=None):
    """Every Calculation under base (those of the names that are still there), oldest claim first; what has no
    readable order is left alone. One at a time: each may have declared as many results as fit into an
    order."""
    def read(name, use):
        try:
            return use(read_order(base, name))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if names is None or not isinstance(error, FileNotFoundError):
                log("warn", name, "unreadable", error=error)

    names_now = ([name for group in names_on_disk(base).values() for name in group] if names is None
                 else list(names))
    since = {name: read(name, lambda order: float(order["t"])) for name in names_now}
    for name in sorted((name for name in since if since[name] is not None), key=since.get):
        calc = read(name, lambda order: Calculation(base, name, order, gate))
        if calc is not None:
            yield calc


def names_on_disk(base):
    """{ACCEPT_ID: [its control directories]}."""
    found = {}
    for name in os.listdir(os.path.join(base, b".mi")):
        if re.match(rb"[0-9a-f-]{36}(\.\d+)?\Z", name):
            found.setdefault(name[:36].decode(), []).append(name.decode())
    return found


def read_order(base, name):
    """The order.json of a calculation. OSError, ValueError, KeyError, TypeError, RecursionError if none can
    be read."""
    with open(os.path.join(base, b".mi", utf8(name), b"order.json"), "rb") as text:
        order = json.loads(text.read().decode("utf-8"))
    if not isinstance(order, dict):
        raise ValueError("something is missing in order.json")
    if order.get("v", 1) > ON_DISK:
        raise ValueError(_("was written by a newer version of this program"))
    if (not isinstance(order["calc-info"]["command"], str)
            or not {"accept_id", "claim", "protocol", "t"} <= set(order)):
        raise ValueError("something is missing in order.json")
    return order


def put_on_disk(base, gate, found, **more):
    """3. The claimed calculation, on disk: the spare control directory gets its order and its name.
    ValueError if it cannot be right."""
    order = dict(check_calc_order(found), **more)
    number, name, control = order["attempt"], "", b""
    # a restored relay counts anew
    while not name or os.path.lexists(control) or os.path.lexists(os.path.join(base, utf8(name))):
        name = order["accept_id"] + (".%d" % number if number > 1 else "")
        control, number = os.path.join(base, b".mi", utf8(name)), number + 1
    write_synced(os.path.join(base, b".mi", b"spare", b"order.json"), json.dumps(order).encode())
    fault("order written")
    audit("order", "%s.%d" % (order["accept_id"], order["attempt"]), synced=False,
          command=order["calc-info"]["command"][:100], info=sum_of_bytes(canonical(order["calc-info"])))
    os.rename(os.path.join(base, b".mi", b"spare"), control)
    sync_path(os.path.join(base, b".mi"))
    fault("order placed")
    return Calculation(base, name, order, gate)


def check_calc_order(found):
    """What calc-request answered, as an order for order.json. ValueError if any of it is not what it must
    be."""
    order, given = {key: found.get(key) for key in ("accept_id", "claim", "attempt")}, found.get("calc-info")
    info = order["calc-info"] = ({key: given[key] for key in INFO_KEYS if key in given}
                                 if isinstance(given, dict) else {})
    for key, kind in (("parameters", str), ("result_files", dict), ("result_patterns", list)):
        info.setdefault(key, kind())
    good = (("accept_id", isinstance(order["accept_id"], str) and ACCEPT_ID.match(order["accept_id"])),
            ("claim",
             isinstance(order["claim"], str) and re.match(r"[0-9A-Za-z._-]{1,200}\Z", order["claim"])),
            ("attempt", type(order["attempt"]) is int and 1 <= order["attempt"] < 10 ** 6),
            ("command", isinstance(info.get("command"), str)),
            ("parameters", isinstance(info["parameters"], str)),
            ("signed", isinstance(info.get("signed", ""), str)),
            ("result_files", isinstance(info["result_files"], dict)),
            ("result_patterns",
             isinstance(info["result_patterns"], list)
             and all(isinstance(text, str) for text in info["result_patterns"])))
    if not all(right for key, right in good):
        raise ValueError("malformed: " + " ".join(key for key, right in good if not right))
    return dict(order, t=round(time.time(), 3), protocol=2, v=ON_DISK,
                complete=found.get("complete") is True)


def make_spare(base):
    """A control directory made beforehand, so that a claimed calculation need not wait for its fsyncs.
    Returns its `take`, the word by which the relay hands out the same calculation again when its answer was
    lost, also to the next start of the poller."""
    spare = os.path.join(base, b".mi", b"spare")
    if (not os.path.exists(os.path.join(spare, b"ready"))
            or not re.match("[0-9a-f]{32}\\Z", small_text(os.path.join(spare, b"take")))):
        shutil.rmtree(spare, ignore_errors=True)
        os.mkdir(spare, 0o700)
        for name in (b"journal", b"carrier"):          # empty: what makes their names last is prepare()'s
            open(os.path.join(spare, name), "xb").close()
        write_synced(os.path.join(spare, b"take"), os.urandom(16).hex().encode())
        prepare_control(spare)
        fault("spare made")
    return small_text(os.path.join(spare, b"take"))


def small_text(path):
    """The text of a small file of ours; "" if it is not there."""
    try:
        with open(path, encoding="ascii", errors="replace") as text:
            return text.read(100).strip()
    except FileNotFoundError:
        return ""


def keep_reserve(base):
    """.mi/reserve: room for what has to be noted of a calculation that ends on a full disk, and that it has
    filled itself."""
    path = os.path.join(base, b".mi", b"reserve")
    try:
        disk = None if os.path.exists(path) else os.statvfs(base)
        if disk and disk.f_bavail * disk.f_frsize > 4 * RESERVE:
            write_synced(path, os.urandom(RESERVE))    # nothing that a file system could keep in less
    except OSError:
        give_reserve(base)


def give_reserve(base):
    """Gives the reserve up. False if there is none."""
    try:
        os.unlink(os.path.join(base, b".mi", b"reserve"))
        return True
    except FileNotFoundError:
        return False


# ==== the poller ====
# What its threads share, when it takes work, and what becomes of the room on the disk.

class Poller:
    """What the threads of this process share. settings: the ini's; options: the command line's."""

    def __init__(self, settings, options, commands, token, base):
        self.options = options
        self.token = token
        self.base = base
        self.site = options.site
        self.gate = Gate(os.path.join(base, b".mi"), commands)
        self.relay_limits = {}     # what the relay says of its own
        self.take_settings(settings, commands)         # keys, jobs, retry, output, own_rules, rules, folders
        self.under_way = {}        # {name: Calculation} that have a thread
        self.slots = threading.Condition()             # whoever looks at, or changes, what takes one
        self.idle_relays = []      # connections that nobody uses now
        self.first_relay = None    # the one whose Trust all share
        self.failures_in_a_row = 0
        self.away = ""             # why the relay is
        self.large = None          # {accept_id: bytes}, once that is known: see note_large()
        self.v1 = False            # is it a fielded relay?
        self.learned = 0.0         # when it was asked that
        self.not_before = {}     # {claim: when it is asked about again} of those that the relay does not know
        self.names = names_on_disk(base)              # anew once an hour: of years of kept ones it takes long
        self.next_sweep = 0.0
        self.wake = os.pipe()
        self.outcome = None        # what it ends with: an exit code or an exception
        self.relay_asking = None   # the RelayClient of a calc-request that is out
        self.busy_at = time.monotonic()                # when there was work
        self.stuck = []            # why something stays here, of a run that ends
        self.told = (None, 0.0)    # what presence() told the relay last, and when
        self.new_token = threading.Event()             # somebody has put another one into its file
        self.token_stamp = stamp_of(self.keys["token_file"])

    def take_settings(self, settings, commands):
        """Takes the ini's values into force. 78 if nobody is left who may order."""
        orders = order_rules(self.options.ini, settings, "poller", self.gate.folder, [self.site])
        self.keys = settings["poller"]
        self.own_rules = settings["outbound"]
        self.gate.commands = commands
        self.gate.orders = orders
        self.jobs = self.options.jobs or self.keys["jobs"]
        self.retry = self.options.retry or self.keys["retry"]
        self.output = self.keys["output"] and not all(
            rule_against_live(self.own_rules, {"logs"}, name, 0, 0) for name in LOG_NAMES)
        self.obey_limits(self.relay_limits)

    def reload(self):
        """SIGHUP: the log file anew (logrotate has renamed it), and the ini. A broken one is a line in the
        log, and the old one stays in force."""
        try:
            log_into(self.keys["logfile"])
            settings = read_ini(self.ini, INI_KEYS)
            commands = allow_list(self.ini, settings)
            order_rules(self.ini, settings, "poller", self.gate.folder, [self.site])
        except (Stop, OSError) as error:
            return log("error", None, "reload", refused=error, why="the old ini stays in force")
        keys = settings["poller"]
        for key in sorted(key for key in keys if key not in AT_RELOAD and keys[key] != self.keys[key]):
            log("warn", None, "reload", key=key, why="takes effect at the next start")
            keys[key] = self.keys[key]
        self.take_settings(settings, commands)
        note_settings(self.base, settings)
        self.begin_audit("reload")
        log("info", None, "reload", ini=self.ini,
            commands=" ".join(sorted(command["name"] for command in commands.values())))

    def begin_audit(self, event):
        """From now on by the rules as they are; event: why. What cannot be noted now, later events will want
        to."""
        try:
            audit_into(audit_path({"outbound": self.own_rules}, self.gate.folder), self.ini, self.options.url)
            audit(event, poller=self.name, version=VERSION)
        except (Stop, OSError) as error:
            log("error", None, "audit", error=error)

    def free_relay(self):
        """A RelayClient that nobody uses now. All share one Trust."""
        keys, options = self.keys, self.options
        with self.slots:
            if self.idle_relays:
                made = self.idle_relays.pop()
                made.pause, made.on_outage, made.lanes = self.pause, self.notice, keys["lanes"]
                return made
        made = RelayClient(options.url, self.token, options.ca_file, options.verify, keys["proxy"],
                     keys["client_cert"], keys["client_key"], options.port)
        made.pause, made.on_outage, made.waits_for_token = self.pause, self.notice, True
        made.lanes = keys["lanes"]
        if self.first_relay is None:
            self.first_relay = made
            if made.tls:
                made.trust.current_context()            # a file that is unusable at the start is said at once
        made.trust, made.piece_size, made.piece_max = (self.first_relay.trust, self.first_relay.piece_max,
                                             self.first_relay.piece_max)
        return made

    def notice(self, why):
        """One log line when the relay goes away, says not now, or refuses the token, and for each new reason
        of that; one when it is back (None); however many threads see it."""
        if why is None:
            self.failures_in_a_row = 0
        if why is not None and str(why) != self.away:
            if isinstance(why, RelayRefused) and why.code in NO_TOKEN_CODES:
                log("error", None,
                    "the token is refused: put a valid one into token_file, or start again; asking on,"
                    " nothing is lost", why=why)
            elif isinstance(why, RelayRefused):
                log("warn", None, "relay answers \"later\", asking on", why=why)
            else:
                log("warn", None, "relay away, asking on", why=why)
        elif why is None and self.away:
            log("info", None, "relay answers again")
        self.away = "" if why is None else str(why)

    def bytes_moved(self, count):
        """Bytes went over the line."""
        self.failures_in_a_row = 0

    def pause(self, wait, calc=None):
        """Sleeps before the next try; retry = COUNT,INTERVAL: that many failures in a row end the process,
        not the results. calc: what is tried again."""
        if self.retry:
            self.failures_in_a_row, wait = self.failures_in_a_row + 1, self.retry[1]
            if self.failures_in_a_row >= self.retry[0]:
                self.end_with(Stop(EX_UNAVAILABLE,
                                   _("%s: no answer %d times in a row; %d calculation(s) stay here for the"
                                     " next start")
                                   % (self.options.url, self.failures_in_a_row, len(self.under_way))))
                wait = 3600
        if calc:
            calc.note_next_try(wait, calc.why)
            calc.try_now.wait(wait)
            calc.try_now.clear()
        else:
            self.new_token.wait(wait)
            self.new_token.clear()

    def put_off(self, calc, relay, wait):
        """Waits until calc is tried again. A result that the relay refuses takes no slot meanwhile."""
        if isinstance(calc.why, OSError):
            return time.sleep(wait)
        with self.slots:
            calc.phase = "outbox" if calc.run.last("ended") else calc.phase
            self.slots.notify_all()
        calc.note_next_try(wait, calc.why)
        calc.try_now.wait(wait)
        calc.try_now.clear()
        if isinstance(calc.why, RelayRefused) and calc.why.code == 413 and not self.v1:
            try:       # its limits have changed: what is over them has its reason beside it, the rest arrives
                self.obey_limits(relay.learn(0)[1])
            except RelayAway:
                pass

    def obey_limits(self, limits):
        """What is over the relay's limits stays here as what is over [outbound]'s does."""
        rules, self.relay_limits = dict(self.own_rules), limits
        for key in ("max_file", "max_files"):
            if isinstance(limits.get(key), int) and limits[key] > 0:
                rules[key] = min(rules[key] or limits[key], limits[key])
        self.rules = rules
        self.folders = limits.get("dirs") is True

    def end_with(self, outcome):
        """Ends the program, from any thread: outcome is an exit code or an exception."""
        if self.outcome is None:
            self.outcome = outcome
            os.write(self.wake[1], b"\0")

    def begin_thread(self, calc, relay, page=None):
        """From now on a thread of its own carries calc out."""
        with self.slots:
            self.under_way[calc.name] = calc
        calc.run.log_fields = {"site": self.site}
        carrier = (FieldedCarrier if calc.order["protocol"] == 1 else Carrier)(self, calc, relay)
        threading.Thread(target=carrier.work, args=(page,), daemon=True).start()

    def free_slot(self, calc, relay, surely=False):
        """calc is through: its slot and its connection are free. False if a restored relay has asked for it
        again just now (go_on_with())."""
        with self.slots:
            if calc.wanted_again() and not surely:
                return False
            del self.under_way[calc.name]
            self.gate.end_running(calc.run)
            self.idle_relays.append(relay)
            self.slots.notify_all()
        return True

    def wait_for_twin(self, calc):
        """Whoever is handed out twice at once runs once: the later one waits until the earlier has begun, or
        is gone."""
        def first():
            return [other
                    for other in self.under_way.values()
                    if other.accept_id == calc.accept_id and other is not calc
                    and (other.order["t"], other.name) < (calc.order["t"], calc.name)
                    and not other.run.last("starting") and not other.run.last("ended")]

        with self.slots:
            while first():
                self.slots.wait(1)

    def park(self, calc, relay):
        """calc waits for a person: no slot, no connection, no thread of its own until he has said a word."""
        with self.slots:
            calc.phase, calc.why = "held", ""
            self.gate.end_running(calc.run)
            self.idle_relays.append(relay)
            if self.options.drain:
                self.stuck.append(_("%s: held for a person") % calc.name)
            self.slots.notify_all()

    def take_words(self):
        """Goes on with what waited for a person, if that is over."""
        for calc in [calc for calc in list(self.under_way.values()) if calc.phase == "held"]:
            if Hold(calc.control).pending(self.own_rules["hold_for"]) is None:
                calc.phase = "results"
                self.begin_thread(calc, self.free_relay())

    def slots_taken(self):
        """How many calculations take a slot."""
        return sum(calc.phase not in ("in doubt", "outbox", "held") for calc in self.under_way.values())

    def ending(self):
        """Is this a run that ends when its work is done?"""
        return self.options.once or self.options.drain or self.options.resend

    def why_closed(self):
        """Why nothing new is claimed now, or ""."""
        if self.options.drain or self.options.resend:
            return "--drain"
        return why_shut(self.base, self.keys)

    def note_large(self, large):
        """{accept_id: bytes} of what waits at the relay and needs more room than there is here: a line for
        each, and .mi/large for `list`."""
        large = ({key: value
                  for key, value in list(large.items())[:100]
                  if ACCEPT_ID.match(key) and type(value) is int and 0 <= value < 1 << 60}
                 if isinstance(large, dict) else {})
        for accept_id in sorted(set(large) - set(self.large or ())):
            log("warn", accept_id, "3 not taken: its inputs need more room than there is",
                bytes=large[accept_id], base=shown(self.base))
        path = os.path.join(self.base, b".mi", b"large")
        if large != self.large:
            self.large = large
            try:
                if large or os.path.exists(path):
                    write_synced(path, json.dumps(large).encode())
            except OSError:
                pass                                   # the disk is full

    def room_left(self, more=0):
        """room_beside() of this poller's calc_base."""
        return room_beside(self.base, self.keys["keep_free"], more)

    def why_not(self):
        """why_closed(), or too little room."""
        return self.why_closed() or self.room_left()[1]

    def presence(self):
        """How this poller stands, for the relay: a field of a calc-request or heartbeat."""
        shut, (free, full) = self.why_closed(), self.room_left()
        with self.slots:
            busy = self.slots_taken()
            late = [calc.run.last("ended")["t"] for calc in self.under_way.values()
                    if calc.phase == "outbox"]
        words = (shut.strip("-"), full and "disk", busy >= self.jobs and "busy",
                 self.options.once and "once")
        found = {"state": next((word for word in words if word), "open"), "jobs": self.jobs, "busy": busy,
                 "outbox": len(late), "version": VERSION}
        if late:
            found["oldest"] = int(min(late))
        if found["state"] == "hours":
            found["until"] = next_opening(self.keys["hours"], time.time())
        return dict(found, free=free)

    def telling(self):
        """{"presence": presence()}, which is told now, not with tell = no; and the audit log's head."""
        found = self.presence() if self.keys["tell"] else {}
        # what is under way puts the log on the disk by itself, before it starts or sends anything
        head = AUDIT["head"] if self.under_way else audit_head()
        self.told = (without_free(found), time.monotonic())
        return dict({"presence": found} if found else {}, **{"audit": head} if head else {})

    def wait_for_room(self):
        """Waits for a free slot, for the hours in which work is taken, and until keep_free of the disk is
        free. Returns the bytes that there is room for; None if this run ends instead of waiting."""
        with self.slots:
            while self.slots_taken() >= self.jobs:
                self.slots.wait()
        told = ""
        while True:
            shut, free, full = self.look_for_room()
            if not shut and not full:
                if told:
                    log("info", None, "new calculations are taken again")
                return free
            if self.ending():
                if not shut:
                    self.stuck.append(_("%s: less than keep_free is free") % shown(self.base))
                return None
            if told != (shut or full):
                told = shut or full
                log("warn" if full else "info", None, "no new calculation", why=told,
                    base=shown(self.base))
            # what could go is gone: only others make room now
            until = time.monotonic() + (0 if shut else DISK_PAUSE)
            time.sleep(1)
            while time.monotonic() <= until and self.why_not():
                time.sleep(1)

    def look_for_room(self):
        """(why nothing new is claimed, the bytes that there is room for, why that is too little), after what
        may go has gone."""
        shut, (free, full) = self.why_closed(), self.room_left()
        if full and not shut:
            self.make_room()
            free, full = self.room_left()
        return shut, free, full

    def each_second(self):
        """Once a second: what was said on the command line meanwhile, the hours, and idle_exit."""
        asking = self.relay_asking
        # whoever has the answer will not take it: do not stay in the relay's way
        if asking and self.why_not():
            try:
                socket.socket.shutdown(asking.connection.sock, socket.SHUT_RDWR)
            except (AttributeError, TypeError, OSError):
                pass                                   # it is not connected at the moment
        self.take_resends()
        self.take_words()
        self.look_at_token()
        stamp = stamp_of(self.ini)
        if stamp == self.seen != self.stamp and stamp:                   # it stands still since the last look
            self.stamp = stamp
            self.reload()
        self.seen = stamp
        limit = self.options.idle_exit or self.keys["idle_exit"]
        if not limit or any(calc.phase != "held" for calc in list(self.under_way.values())):
            self.busy_at = time.monotonic()
        elif time.monotonic() - self.busy_at > limit:
            log("info", None, "nothing to do: it ends", idle_exit=limit)
            self.end_with(0)

    def look_at_token(self):
        """Another token in its file: what waits because the old one was refused is tried at once."""
        stamp = stamp_of(self.keys["token_file"])
        if stamp != self.token_stamp:
            self.token_stamp = stamp
            self.new_token.set()
            for calc in list(self.under_way.values()):
                calc.try_now.set()

    def take_resends(self):
        """Does at once what `resend` has asked for."""
        path = os.path.join(self.base, b".mi", b"resend")
        if not os.path.exists(path):
            return
        os.rename(path, path + b".taken")
        with open(path + b".taken", encoding="ascii", errors="replace") as text:
            names = set(text.read().split())
        os.unlink(path + b".taken")
        if names - set(self.under_way):
            self.send_again(lambda calc: calc.name in names and calc.delivery() == "kept")
        for name in names & set(self.under_way):
            self.under_way[name].try_now.set()

    def tell_manual(self, line):
        """A line of the manual, on a terminal or where it was started with the manual's words."""
        if self.options.fielded or sys.stdout.isatty():
            try:
                print(printable(line), flush=True)
            except (OSError, ValueError):
                pass

    def run(self):
        """Runs the threads; this one only waits for a signal or an outcome. Leaving is safe at any moment:
        everything is on disk."""
        codes = {signal.SIGINT: EX_INTERRUPT, signal.SIGTERM: 0}

        def thread(loop):
            try:
                loop()
            except Exception as error:
                self.end_with(error)

        os.set_blocking(self.wake[1], False)
        signal.set_wakeup_fd(self.wake[1])               # whichever thread the signal reaches
        for which in codes:
            signal.signal(which, lambda which, frame: exit_after(codes[which], LEAVE))
        signal.signal(signal.SIGHUP, lambda which, frame: None)
        relay = self.free_relay()                             # 78 here, if a certificate file is unusable
        for line in ("site id = %s" % self.site, "base url = %s" % relay.url, "token = ****"):
            self.tell_manual(line)
        log("info", None, "polling", site=self.site, url=relay.url, jobs=self.jobs,
            base=shown(self.base),
            commands=" ".join(sorted(command["name"] for command in self.gate.commands.values())))
        self.idle_relays.append(relay)
        for calc in on_disk(self.base, None, self.gate):
            if calc.name == self.options.resend if self.options.resend else not calc.delivery():
                log("info", calc.accept_id, "picked up", state=calc.state())
                for control in (calc.path(b"pre"), calc.path(b"post")):
                    continue_wrapper(control)          # as follow_to_end() does for the command
                self.begin_thread(calc, self.free_relay())
        presence = Presence(self)
        for loop in (ClaimLoop(self).run, Heartbeats(self).run, presence.run, presence.hold,
                     self.tick_forever):
            threading.Thread(target=thread, args=(loop,), daemon=True).start()
        which = -1
        while which and which not in codes:                # 0: end_with()
            which = os.read(self.wake[0], 1)[0]
            if which == signal.SIGHUP:
                self.reload()
        if not which:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome
        if which == signal.SIGINT:
            self.tell_manual("Ctrl + C スクリプト停止要求受付")
        log("info", None, "stopped; what runs here runs on and is picked up at the next start",
            calculations=len(self.under_way))
        return codes[which]

    def tick_forever(self):
        """A thread: what is looked at once a second."""
        while True:
            time.sleep(1)
            try:
                self.each_second()
            except OSError as error:
                log("error", None, "disk", error=error)

    def make_room(self):
        """Less than keep_free is free: the files of delivered calculations go, oldest first, until it is
        enough. Order and journal stay."""
        for calc in on_disk(self.base):
            if (calc.name not in self.under_way and os.path.lexists(calc.work)
                    and calc.may_be_removed(0, self.own_rules["keep_refused"])):
                log("info", calc.accept_id, "swept: its room is needed",
                    delivered=round(calc.last("delivered")["t"]))
                calc.remove_files()
                if not self.room_left()[1]:
                    return

    def sweep(self):
        """Once an hour: the directories of calculations that were delivered keep_workdirs ago go."""
        if time.monotonic() < self.next_sweep:
            return
        self.next_sweep = time.monotonic() + 3600
        for name in os.listdir(os.path.join(self.base, b".mi")):
            if name.startswith(b"gone."):                  # a start before this one was killed in remove()
                shutil.rmtree(os.path.join(self.base, b".mi", name), ignore_errors=True)
        for calc in on_disk(self.base):
            if calc.delivery() != "delivered" or calc.name in self.under_way:
                continue
            calc.remove_matching(SCAFFOLD)                            # it may have been killed just there
            if calc.may_be_removed(self.keys["keep_workdirs"], self.own_rules["keep_refused"]):
                log("info", calc.accept_id, "swept")
                calc.remove()
        self.names = names_on_disk(self.base)

    def send_again(self, wanted):
        """Results that this poller has delivered, or kept, are sent once more: those for which
        wanted(Calculation) is true."""
        for calc in on_disk(self.base, None, self.gate):
            if calc.name not in self.under_way and wanted(calc):
                calc.note(3, "resend")
                log("info", calc.accept_id, "3 its result is wanted again", work=shown(calc.work))
                self.begin_thread(calc, self.free_relay())

    def send_missed(self, wanted):
        """The relay misses results {accept_id: claim}: it was restored from a backup since."""
        if isinstance(wanted, dict) and wanted:
            self.send_again(lambda calc: wanted.get(calc.accept_id) == calc.claim and calc.delivery())

    def give_back(self, ask, accept_id, claim):
        """3. Nothing was begun: the relay may hand it out again at once. Unheard, the claim lapses."""
        ask("POST", "heartbeat", {"v": 2, "site_id": self.site, "poller": self.name, "wait": 0,
                                  "calcs": {accept_id: {"claim": claim, "phase": "given back"}}})


def why_shut(base, keys):
    """Why its owner has nothing new taken now: paused, hours, or ""."""
    if keys["paused"] or os.path.exists(os.path.join(base, b".mi", b"paused")):
        return "paused"
    return "" if within_hours(keys["hours"], time.localtime()) else "hours"


def room_beside(base, keep, more=0):
    """The bytes that base has room for beside keep (keep_free), and why that (with `more` bytes there) is too
    little, or ""."""
    disk, share = os.statvfs(base), keep if isinstance(keep, float) else 0
    room = disk.f_bavail * disk.f_frsize - int(share * disk.f_blocks * disk.f_frsize or keep)
    if room < more:
        return max(room, 0), "less than keep_free is free"
    return room, "less than keep_free of its inodes is free" if disk.f_favail < share * disk.f_files else ""


# ==== the line to the relay ====

class ClaimLoop:
    """3. Asks for work whenever there is room for it, for ever (--once: until nothing is left)."""

    def __init__(self, poller):
        self.poller = poller
        self.relay = poller.free_relay()
        self.backoff = Backoff()
        self.answered = False                          # has it ever?
        self.wait = None                               # seconds that it lets us wait, once that is known

    def run(self):
        """A thread."""
        adopter()                                      # loaded now, not when a command is to start
        if self.poller.under_way or not self.poller.why_closed():
            self.wait = self.first_contact()
        while True:
            asked = found = calc = None
            try:
                free = self.poller.wait_for_room()
                if free is None:
                    return self.end_once()
                take = self.prepare()
                asked = time.monotonic()
                found = self.ask(take, free)
                if found and self.poller.why_not():    # meanwhile
                    self.leave_there(found)
                    continue
                calc = found and self.put_on_disk(found)
            except (RelayAway, RelayRefused, OSError) as error:
                self.fail(error)
                continue
            except ValueError as error:
                log("error", None, "3 the relay's answer is not taken", why=error)
                # with its take
                shutil.rmtree(os.path.join(self.poller.base, b".mi", b"spare"), ignore_errors=True)
            if calc:
                self.poller.begin_thread(calc, self.relay, found.get("inputs"))
                self.relay = self.poller.free_relay()
            elif self.poller.options.once and found is None:
                return self.end_once()
            else:                                      # a relay that does not let us wait
                least = self.poller.keys["poll"] if self.poller.v1 and found is None else 1
                time.sleep(max(0.0, least - (time.monotonic() - asked)))
            self.poller.sweep()

    def prepare(self):
        """What is needed before it asks: whom, and a directory with its `take`, which is returned."""
        if self.wait is None or self.poller.v1 and time.monotonic() - self.poller.learned > V1_AGAIN:
            self.wait = self.first_contact()
        keep_reserve(self.poller.base)
        return make_spare(self.poller.base)

    def ask(self, take, free):
        """calc_request(), which each_second() may break off."""
        self.poller.relay_asking = self.relay
        found = self.calc_request(take, free)
        self.poller.relay_asking = None
        self.poller.notice(None)
        self.backoff, self.answered = Backoff(), True
        return found

    def leave_there(self, found):
        """What was claimed is not taken after all."""
        log("info", found.get("accept_id"), "3 not taken", why=self.poller.why_not())
        if not self.poller.v1:
            self.poller.give_back(self.relay.call, found.get("accept_id"), found.get("claim"))

    def put_on_disk(self, found):
        """The Calculation that was claimed. ValueError if it cannot be right."""
        more = {"protocol": 1, "site": self.poller.site} if self.poller.v1 else {}
        calc = put_on_disk(self.poller.base, self.poller.gate, found, **more)
        self.poller.names.setdefault(calc.accept_id, []).append(calc.name)
        log("info", calc.accept_id, "3 calc-request", site=self.poller.site, command=calc.info["command"],
            attempt=calc.order["attempt"])
        return calc

    def fail(self, error):
        """No answer, a no, or a disk that is full or broken: a pause. 77 if it was the very first request."""
        self.poller.relay_asking, self.poller.told = None, (None, 0.0)
        if isinstance(error, RelayAway) and self.poller.why_not():          # each_second() has broken it off
            return self.relay.close()
        if isinstance(error, RelayRefused) and not self.answered and error.code not in LATER_CODES:
            raise self.refused_at_first(error)
        if isinstance(error, OSError):
            log("error", None, "disk", error=error)
        else:
            self.poller.notice(error)
        self.relay.close()
        self.poller.pause(self.backoff.next())

    def first_contact(self):
        """The seconds that the relay lets us wait. 69 if it cannot be reached and somebody waits for the
        answer."""
        somebody = (self.poller.options.fielded or self.poller.options.once) and not self.poller.learned
        try:
            version, limits = self.relay.learn(0 if somebody and not self.poller.retry else None)
        except RelayAway as error:
            raise Stop(EX_UNAVAILABLE, _("%s (%s.py check looks at the whole way)") % (error, PROGRAM))
        self.poller.v1, self.poller.learned = version < 2, time.monotonic()
        if self.poller.v1:
            return 0
        self.poller.first_relay.piece_size = self.poller.first_relay.piece_max = self.relay.piece_max
        self.poller.obey_limits(limits)
        if self.poller.options.once:
            return 0
        return min(POLL_WAIT, limits["wait"]) if isinstance(limits.get("wait"), int) else POLL_WAIT

    def refused_at_first(self, error):
        """The very first calc-request was refused: what to do about it."""
        if error.code in NO_TOKEN_CODES:
            why = refusal_words(error.more) or printable(error.more.get("why") or error)
            return Stop(EX_REFUSED, _("%s: the token is refused (%s): get a valid one, role remote, for this"
                                      " site") % (self.relay.url, why))
        return Stop(EX_REFUSED, "%s: %s" % (self.relay.url, error))

    def calc_request(self, take, free):
        """3. One calc-request: the answer's fields, or None if there is nothing to do. RelayRefused,
        RelayAway."""
        fields = {"v": 2, "site_id": self.poller.site, "poller": self.poller.name, "take": take,
                  "wait": self.wait, "free": free, "dirs": True, "data": True,
                  "have": {calc.accept_id: calc.claim
                           for calc in list(self.poller.under_way.values()) if calc.order["protocol"] == 2}}
        fields.update(self.poller.telling())
        now = time.strftime("%Y/%m/%d %H:%M:%S")
        self.poller.tell_manual("%s:send %s%scalc-request?site_id=%s"
                                % (now, self.relay.url, API_PATH, self.poller.site))
        try:
            if self.poller.v1:
                return v1_named(self.poller,
                                self.relay.call_v1("GET", "calc-request", {"site_id": self.poller.site}))
            found = self.relay.call("POST", "calc-request", fields, self.wait)
            self.poller.send_missed(found.get("wanted"))
            return found
        except RelayRefused as error:
            self.poller.send_missed(error.more.get("wanted"))
            self.poller.note_large(error.more.get("large"))
            if error.code in NO_TOKEN_CODES:
                reason = {"errors": [{"code": error.code, "message": str(error)}]}
                self.poller.tell_manual("%s:status code = 403 / reason = %s"
                                        % (now,
                                           json.dumps(reason, ensure_ascii=False, separators=(",", ":"))))
            else:
                self.poller.tell_manual("code = %s / message = %s" % (error.code, error))
            # registered, but not allowed yet
            early = self.poller.v1 and error.code == "400" and "does not match" not in str(error)
            if error.code != "0300" and not early:
                raise
            return None

    def end_once(self):
        """--once and --drain: waits for what is under way, and ends; 75 if something stays here that could
        not be delivered."""
        with self.poller.slots:
            while self.poller.slots_taken():
                self.poller.slots.wait()
        self.poller.end_with(Stop(EX_TEMPFAIL, "; ".join(self.poller.stuck)) if self.poller.stuck else 0)


OUTPUT_PART = 64 << 10         # bytes of a running command's stdout, and of its stderr, in one heartbeat
RATE_TOLD = 60                 # seconds after which the workflow side is told another rate of a transfer
OUTPUT_QUIET = 8               # seconds until the output of a command that writes seldom is looked at again
OUTPUT_MOST = 64 << 20         # bytes of each that go ahead of the results, all in all


class Heartbeats:
    """Renews all claims, hears of cancelled calculations, sends the commands' output as it comes."""

    def __init__(self, poller):
        self.poller = poller
        self.relay = quiet_relay(poller)
        self.relay.max_pause = 30
        self.known = {}            # {accept_id: bytes of stdout, and of stderr, that the relay has}
        self.quiet = 1             # seconds that one may wait at the relay where nothing is written

    def run(self):
        """A thread."""
        while True:
            asked = time.monotonic()
            calcs = {calc.accept_id: calc
                     for calc in list(self.poller.under_way.values())
                     if calc.order["protocol"] == 2 and asked - calc.since > 0.5
                     and self.poller.not_before.get(calc.claim, 0) < asked}
            self.known = {name: self.known[name] for name in calcs if name in self.known}
            wait = 0.25 if self.poller.under_way else 1            # what has just begun can be cancelled, too
            try:
                wrote = False
                if calcs:
                    wrote, wait = self.beat(calcs)
                self.quiet = 1 if wrote or not calcs else min(self.quiet * 2, self.most_quiet())
            except (RelayRefused, OSError) as error:
                log("debug", None, "heartbeat", error=error)
                wait = 20
            time.sleep(max(0.0, wait - (time.monotonic() - asked)))

    def most_quiet(self):
        """Seconds that a heartbeat may wait for news at most."""
        return OUTPUT_QUIET if self.poller.output else POLL_WAIT

    def beat(self, calcs):
        """One heartbeat for calcs {accept_id: Calculation}, with what they have written since. Returns (did
        anybody write, seconds until the next)."""
        most = max(1024, min(OUTPUT_PART, (1 << 20) // len(calcs)))
        entries = {name: self.entry_of(name, calc, most) for name, calc in calcs.items()}
        found = self.relay.ask("POST", "heartbeat",
                               dict(self.poller.telling(), v=2, site_id=self.poller.site,
                                    poller=self.poller.name, wait=self.quiet, calcs=entries), self.quiet)
        cancel, gone, unknown = (found[key] if isinstance(found.get(key), list) else []
                                 for key in ("cancel", "gone", "unknown"))
        for calc in list(self.poller.under_way.values()):
            if calc.accept_id in cancel and not calc.run.cancelled:
                log("warn", calc.accept_id, "6 cancelled by the workflow side")
                calc.run.cancelled = True
        for name in calcs:
            if name in gone + unknown:      # asked about again in a minute: the others are not to wait for it
                self.poller.not_before[calcs[name].claim] = time.monotonic() + 60
        taken = found.get("output") if isinstance(found.get("output"), dict) else {}
        went = self.note_taken(taken, calcs)
        return went, 20 if taken and not went else 1

    def entry_of(self, name, calc, most):
        """What one heartbeat says of calc; `most` bytes of each log at most."""
        entry = {"claim": calc.claim, "phase": "results" if calc.phase in ("outbox", "held") else calc.phase}
        if calc.phase == "held":
            entry["held"] = Hold(calc.control).pending(0)
        going = calc.rate and calc.rate.words(RATE_TOLD)
        if going:
            entry["what"] = going
        elif calc.run.job is not None:
            entry.update(node=outward(self.poller.rules, calc.run.job.node),
                         what=outward(self.poller.rules, calc.run.job.where))
        if self.poller.output:
            entry.update(self.output_parts(calc, self.known.setdefault(name, [0, 0]), most))
        return entry

    def note_taken(self, taken, calcs):
        """How much of the logs the relay has now: taken {accept_id: [bytes, bytes]}. Is that more?"""
        went = False
        for name in set(taken) & set(calcs):
            counts = taken[name]
            if (isinstance(counts, list) and len(counts) == 2
                    and all(type(at) is int and at >= 0 for at in counts)):
                went, self.known[name] = went or counts != self.known[name], counts
        return went

    def output_parts(self, calc, known, most):
        """{"out": [offset, base64], "err": ...} of what a command has written beyond `known` (bytes of each):
        whole lines, at most `most` bytes. Nothing of a log that rule_against_live() keeps here."""
        import base64
        parts, kinds, paths = {}, calc.run.leaving_kinds(), (calc.path(b"stdout"), calc.path(b"stderr"))
        read = [part_of(path, begin, min(most, max(0, OUTPUT_MOST - begin)))
                for path, begin in zip(paths, known)]
        sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path in paths]
        for stream, name, begin, size, data in zip(("out", "err"), LOG_NAMES, known, sizes, read):
            data = data[:data.rfind(b"\n") + 1] or (data if len(data) == most else b"")
            why = data and rule_against_live(self.poller.rules, kinds, name, size, sum(sizes) - size)
            if data and not why:
                try:
                    audit_live(calc.run.name, calc.live_noted, stream, begin + len(data))
                    parts[stream] = [begin, base64.b64encode(data).decode("ascii")]
                except OSError as error:               # it stays here until it can be noted
                    log("error", calc.accept_id, "6 audit", error=error)
            elif why in ("max_file", "max_total") and not calc.over_limit:
                calc.over_limit = True
                log("warn", calc.accept_id, "6 no more live output", rule=why, bytes=sum(sizes))
        return parts


def part_of(path, begin, most):
    """At most `most` bytes of a file from byte `begin` on; none if it is not there."""
    try:
        with open(path, "rb") as text:
            text.seek(begin)
            return text.read(most)
    except FileNotFoundError:
        return b""


PRESENCE_EVERY = 60       # seconds after which the relay is told again how the poller stands


class Presence:
    """Tells the relay how this poller stands where neither a calc-request nor a heartbeat has: it asks for
    nothing, or it has changed while they wait there."""

    def __init__(self, poller):
        self.poller = poller
        self.relay = quiet_relay(poller)
        self.version = None                            # of the relay, where only this thread has asked it

    def run(self):
        """A thread."""
        before = None
        while True:
            time.sleep(1)
            try:
                before = self.look(before)
            except (RelayRefused, RelayAway, OSError) as error:
                log("debug", None, "presence", error=error)
                self.poller.told = (None, 0.0)         # it may not have arrived
                self.relay.close()
                time.sleep(5)

    def look(self, before):
        """Tells it if that is due; before: what look() returned a second ago, and returns again. What changes
        at each calculation the next calc-request will tell."""
        now, (told, when) = without_free(self.poller.presence()), self.poller.told
        lasts = now == before or now["state"] not in ("open", "busy")
        due = now != told and lasts or time.monotonic() - when > PRESENCE_EVERY
        if due and self.poller.keys["tell"] and not self.fielded():
            self.relay.call("POST", "heartbeat", dict(self.poller.telling(), v=2, site_id=self.poller.site,
                                                      poller=self.poller.name, wait=0, calcs={}))
        return now

    def hold(self):
        """A thread: while no calc-request waits at the relay, a call without anything does, so that the relay
        sees when this poller is gone. Not of a run that ends by itself: cron starts it again."""
        relay, poller = quiet_relay(self.poller), self.poller
        while not poller.options.once:
            time.sleep(1)
            if poller.relay_asking or not poller.told[0] or poller.v1 or self.version == 1:
                continue
            try:
                relay.call("POST", "heartbeat", {"v": 2, "site_id": poller.site, "poller": poller.name,
                                                 "wait": POLL_WAIT, "calcs": {}}, POLL_WAIT)
            except (RelayRefused, RelayAway, OSError) as error:
                log("debug", None, "presence", error=error)
                poller.told = (None, 0.0)              # the relay takes it for gone: it is told anew
                relay.close()
                time.sleep(20)

    def fielded(self):
        """Is it a fielded relay?"""
        if not self.poller.learned and self.version is None:             # nothing was asked yet
            self.version = self.relay.learn(0)[0]
        return self.poller.v1 or self.version == 1


def quiet_relay(poller):
    """A RelayClient for a thread whose failures another one tells."""
    relay = poller.free_relay()
    relay.pause, relay.on_outage = time.sleep, lambda line: None
    return relay


def without_free(presence):
    """presence() but for the bytes that are free, which change all the time."""
    return {key: value for key, value in presence.items() if key != "free"}


# ==== a person's words ====

def calc_in_full(base, name):
    """One calculation (without its claim, with its journal). 64 if it is not here."""
    calc = calc_named(base, name)
    order = {key: value for key, value in calc.order.items() if key != "claim"}
    return dict(row_of(base, calc), work=shown(calc.work), control=shown(calc.control), order=order,
                journal=calc.whole_journal())


def cmd_show(base, limit, options):
    """All of a calculation; of one that is held what is held. limit: hold_for."""
    calc = calc_named(base, options.id)
    if held_row(calc.name, calc.control, limit):
        return show_held(calc.name, calc.control, limit, options.all, options.json)
    print(json_of(calc_in_full(base, calc.name), indent=None if options.json else 1))


def cmd_release(base, limit, options):
    """release and refuse: a person's word about what is held. limit: hold_for."""
    calc = calc_named(base, options.id)
    if options.word == "release":
        release(calc.name, calc.control, limit, options.unseen)
    else:
        refuse(calc.name, calc.control, limit, options.reason)
    print(_("said; the running poller goes on with it now") if running_poller(base)
          else _("said; it goes on as soon as a poller runs"))


def row_of(base, calc):
    """A calculation in a list."""
    row = {"id": calc.name, "state": calc.state(), "command": calc.info["command"],
           "age": round(time.time() - calc.order["t"])}
    if row["state"] in ("queued", "running") and read_batch(calc.control):
        row["what"] = batch_state(os.path.dirname(calc.control), calc.control)[1]
    return row


def list_lines(rows, terminal):
    """A list of what is here, as lines."""
    lines = []
    for row in rows:
        state = state_cell(row["state"])[0 if terminal else 2:]
        line = "%-38s %s %8ds  %s" % (row["id"], state + " " * (12 - width_of(state)), row["age"],
                                      printable("  ".join([row["command"], row.get("what", "")]).rstrip()))
        lines.append(coloured(fitted(line, terminal), state) if terminal else line)
    return lines


def cmd_outbox(base, limit, as_json):
    """What waits for a person (until limit: hold_for), for its delivery, or is not wanted by the relay: since
    when, why, when it is tried again (seconds since the epoch)."""
    runs, rows = running_poller(base), []
    for calc in on_disk(base):
        state, held = calc.state(), None
        if state == "held":
            held = held_row(calc.name, calc.control, limit)
        if state in ("undelivered", "kept", "held"):
            rows.append(held or outbox_row(calc, runs))
    if as_json:
        return print(json_of(rows))
    for row in rows:
        if row["state"] == "held":
            print(held_line(row))
            continue
        late = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["next"]))
        if row["state"] == "kept":
            late = _("not wanted; resend tries once more")
        elif not runs:
            late = _("when a poller runs")
        elif (row["next"] or 0) <= time.time():
            late = _("now")
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["since"]))
        print(_("%s  since %s  next try: %s  why: %s") % (row["id"], since, late, printable(row["why"])))


def outbox_row(calc, runs):
    """A row of cmd_outbox(); runs: does a poller?"""
    end, found = read_note(calc.path(b"end")), {}
    try:
        with open(calc.path(b"waits")) as text:
            told = json.load(text)
        found = {"next": int(told["next"]), "why": str(told["why"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    why, late = found.get("why"), runs and found.get("next", 0) or None
    if calc.delivery() == "kept":
        why, late = calc.last("kept")["why"], None
    elif not why:
        why = _("is being sent") if runs else _("no poller runs")
    since = end.time if end else (calc.run.last("ended") or calc.order)["t"]
    return {"id": calc.name, "state": calc.state(), "since": round(since), "why": why, "next": late}


class Here:
    """What this host knows of one calculation, or, if it is not here, of why nothing is taken: what the
    causes of explain look at, and what their texts name."""

    def __init__(self, base, keys, name):
        known = [key for group in names_on_disk(base).values() for key in group if key.startswith(name)]
        if not re.match(r"[0-9a-f][0-9a-f-]{7,35}(\.\d+)?\Z", name):
            raise Stop(EX_USAGE, _("%s: not on this host (see: list)") % printable(name))
        self.base = base
        self.keys = keys                               # of [poller]
        self.calc = calc_named(base, name) if known else None
        self.id = self.calc.name if known else name
        self.state = self.calc.state() if known else ""
        self.runs = running_poller(base)
        self.large = any(key.startswith(name) for key in large_inputs(base))
        found = outbox_row(self.calc, self.runs) if self.state in ("undelivered", "kept") else {}
        self.why = found.get("why", "")
        self.ended = found.get("since")
        self.held = Hold(self.calc.control).pending(0) if self.state == "held" else None
        self.what = batch_state(os.path.join(base, b".mi"), self.calc.control)[1] if self.is_queued() else ""

    def __getitem__(self, name):
        """For texts: what they name."""
        return printable(getattr(self, name))

    def is_queued(self):
        """Does it wait in a batch system?"""
        return self.state == "queued" and bool(read_batch(self.calc.control))

    def is_away(self):
        """Is there something to do, and no poller runs?"""
        return not self.runs and self.state not in ("delivered", "kept")

    def is_marked(self):
        """Was `pause` said?"""
        return os.path.exists(os.path.join(self.base, b".mi", b"paused"))

    def lacks_room(self):
        """Is less than keep_free free, of bytes or inodes?"""
        return room_beside(self.base, self.keys["keep_free"])[1]

    @property
    def busy(self):
        """How many calculations take a slot here."""
        return sum(calc.state() in TAKE_A_SLOT for calc in on_disk(self.base))

    @property
    def jobs(self):
        """How many may."""
        return self.keys["jobs"]

    def times(self):
        """When that began by which a cause goes, in seconds since the epoch, or None."""
        begun = self.calc and (self.calc.run.last("starting") or self.calc.order)["t"]
        return {"taken": self.calc and self.calc.order["t"], "started": begun, "ended": self.ended,
                "held": self.held, "output": self.last_output() if self.calc else None, "": None}

    def last_output(self):
        """When its command wrote last, or when it was started."""
        found = [(self.calc.run.last("starting") or self.calc.order)["t"]]
        for name in (b"stdout", b"stderr"):
            try:
                found.append(os.path.getmtime(self.calc.path(name)))
            except OSError:
                pass
        return max(found)


def cmd_explain(base, keys, name, as_json):
    """Why a calculation is where it is, as far as this host knows: the first of CAUSES that holds."""
    here = Here(base, keys, name)
    cause = next(one for one in CAUSES if one.holds(here))
    now = time.time()
    show_cause(here.id, told_cause({
        "cause": cause.code, "who": cause.who, "site": keys["site"], "sentence": _(cause.text) % here,
        "command": cause.command % here, "changes": _(cause.changes), "since": here.times()[cause.since],
        "until": next_opening(keys["hours"], now) if cause.code == "hours" else None}), as_json)


def cmd_metrics(base, keys):
    """What is here, in figures. (Whether the relay is reached is not known here, but what it does not
    take.)"""
    states, runs, late = collections.Counter(), running_poller(base), []
    for calc in on_disk(base):
        state = calc.state()
        states[state] += 1
        late += [outbox_row(calc, runs)["since"]] if state == "undelivered" else []
    busy, room = sum(states[state] for state in TAKE_A_SLOT), room_beside(base, keys["keep_free"])
    words = (not runs and "stopped", why_shut(base, keys), room[1] and "disk",
             busy >= keys["jobs"] and "busy")
    now = {"state": next((word for word in words if word), "open")}
    rows = [("build_info", "which version this is", {"version": VERSION}, 1),
            ("running", "1 if a poller runs on this calc_base", {}, int(bool(runs))),
            ("state", "1 with the state that it is in", now, 1),
            ("slots", "calculations that it may have at once, as the ini says", {}, keys["jobs"]),
            ("slots_busy", "calculations that take a slot", {}, busy),
            ("undelivered", "results that the relay has not taken", {}, len(late)),
            ("undelivered_oldest_seconds", "how long the oldest of them waits; 0 without one", {},
             max([0] + [round(time.time() - since) for since in late])),
            ("room_bytes", "what calc_base has room for beside keep_free", {}, room[0])]
    families = [("mi_poller_" + name, "gauge", text, [("", dict({"site": keys["site"]}, **labels), number)])
                for name, text, labels, number in rows]
    families.append(("mi_poller_calculations", "gauge", "calculations that are or were here, as in `list`", [
        ("", {"site": keys["site"], "state": state}, states[state]) for state in LISTED_STATES]))
    print(exposition(families), end="")


def cmd_pause(base, keys, word):
    """pause and resume: a mark beside the calculations that the running poller, or the next one, obeys. 78 if
    the ini says paused."""
    path = os.path.join(base, b".mi", b"paused")
    if word == "pause":
        write_synced(path, b"")
        return print(_("paused: nothing new is taken until resume; what runs goes on and is delivered (%s)")
                     % shown(base))
    if os.path.exists(path):
        os.unlink(path)
    if keys["paused"]:
        raise Stop(EX_CONFIG,
                   _("[poller] paused = yes is in the ini: change it there, and start the poller again"))
    print(_("new calculations are taken") if running_poller(base)
          else _("new calculations are taken as soon as a poller runs"))


def calc_to_resend(base, name):
    """The calculation of that name if its result waits here. 64 otherwise."""
    calc = calc_named(base, name)
    if calc.state() not in ("undelivered", "kept"):
        raise Stop(EX_USAGE, _("%s: nothing waits here to be delivered (%s)") % (calc.name, calc.state()))
    return calc


def calc_named(base, name):
    """The calculation of that name, or of that beginning of one (8 characters at least). 64 if there is none,
    or more than one."""
    known = [key for group in names_on_disk(base).values() for key in group]
    wanted = ([key for key in known if key == name]
              or [key for key in known if len(name) >= 8 and key.startswith(name)])
    found = list(on_disk(base, wanted))
    if not found:
        raise Stop(EX_USAGE, _("%s: not on this host (see: list)") % printable(name))
    if len(found) > 1:
        raise Stop(EX_USAGE,
                   _("%s: which one? %s") % (printable(name), " ".join(calc.name for calc in found[:10])))
    return found[0]


def ask_to_resend(base, name):
    """resend: the running poller is told."""
    with open(os.path.join(base, b".mi", b"resend"), "a") as out:
        out.write(name + "\n")
    print(_("the running poller sends it now"))


def resend_here(poller):
    """resend without a running poller: sends it here. 77 if the relay does not take it."""
    name = poller.options.resend
    calc = calc_to_resend(poller.base, name)
    if calc.delivery() == "kept":
        calc.note(8, "resend")
    poller.run()
    calc = next(calc for calc in on_disk(poller.base) if calc.name == name)
    if calc.delivery() == "kept":
        raise Stop(EX_REFUSED, "%s: %s" % (name, calc.last("kept")["why"]))
    return 0


def look_at_running_poller(base, settings):
    """Rows about the poller of calc_base: does one run, does it take new calculations, has it other values
    than the ini by now?"""
    keys, rows = settings["poller"], []
    runs = os.path.exists(os.path.join(base, b".mi", b"lock")) and running_poller(base)
    rows.append((True if runs else None,
                 _("a poller runs") if runs else _("no poller runs: nothing is taken or delivered")))
    if os.path.exists(os.path.join(base, b".mi", b"paused")):
        rows.append((None, _("paused: nothing new is taken until `resume`")))
    if keys["paused"]:
        rows.append((None, _("[poller] paused = yes: nothing new is taken")))
    if not within_hours(keys["hours"], time.localtime()):
        rows.append((None, _("outside of [poller] hours: nothing new is taken now")))
    try:
        with open(os.path.join(base, b".mi", b"settings")) as text:
            before, now = dict(json.load(text)), settings_sums(settings)
        changed = (sorted(key for key in set(before) | set(now) if before.get(key) != now.get(key)) if runs
                   else [])
    except (OSError, ValueError, TypeError, RecursionError):
        changed = []
    for accept_id, count in sorted(large_inputs(base).items()) if runs else ():
        rows.append((None,
                     _("%s waits at the relay: its inputs need more room than there is here (%.1f GB)")
                     % (accept_id, count / 1e9)))
    if changed:
        rows.append((None,
                     _("the running poller still has other values than the ini for: %s; start it again (what"
                       " runs goes on)") % ", ".join(changed[:10])))
    return rows


def large_inputs(base):
    """.mi/large, as Poller.note_large() has left it."""
    try:
        with open(os.path.join(base, b".mi", b"large")) as text:
            return json.load(text)
    except (OSError, ValueError):
        return {}


def running_poller(base):
    """The process id of the poller that holds calc_base now (-1: on another host); 0 if there is none."""
    import fcntl
    import struct
    with open(os.path.join(base, b".mi", b"lock"), "a+") as lock:
        found = fcntl.fcntl(lock, fcntl.F_GETLK, struct.pack("hhlli4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    kind, _whence, _start, _length, pid = struct.unpack("hhlli4x", found)
    return 0 if kind == fcntl.F_UNLCK else pid or -1


def note_settings(base, settings):
    """.mi/settings: with which values this poller runs, for `check` and `list`."""
    try:
        write_synced(os.path.join(base, b".mi", b"settings"), json.dumps(settings_sums(settings)).encode())
    except OSError as error:
        log("warn", None, "disk", error=error)


def settings_sums(settings):
    """{"[SECTION] KEY": what tells one value from another} of the ini's sections that the poller reads."""
    import hashlib
    def sum_of(value):
        return hashlib.sha256(repr(getattr(value, "pattern", value)).encode("utf-8", "replace")).hexdigest()[
            :16]
    return {"[%s] %s" % (section, key): sum_of(value) for section, keys in settings.items()
            for key, value in keys.items()}


def cmd_check(options):
    """Looks at this host and at the way to the relay; changes nothing. 78 if something is a FAIL."""
    rows = []
    try:
        ini = find_ini(options.ini, ini_folders(__file__), needed=True)
        settings = read_ini(ini, INI_KEYS)
        keys = settings["poller"]
        choose_language(keys["lang"])
        if options.upgrade:
            return print_findings(check_upgrade(base_path(keys["calc_base"])), options.json)
        rows = check_host(settings, ini)
        for key in ("site", "url"):
            if not keys[key]:
                rows.append((False, _("%s: [poller] %s is not set") % (ini, key)))
        if keys["site"] and keys["url"]:
            enrolls = waits_for_enrolling(keys["token_file"])
            relay = stranger(keys)
            if not enrolls:
                relay.token = find_token("", keys["url"], keys, False)
            rows += findings_of_relay(relay, [] if enrolls else probes(keys["site"]))
    except Stop as stop:
        rows.append((False, str(stop)))
    return print_findings(rows, options.json)


def check_host(settings, ini):
    """Rows about this host: files, commands, calc_base, limits."""
    keys, rows = settings["poller"], []
    if os.geteuid() == 0:
        rows.append((None, _("running as root; better as a user of its own")))
    rows += [finding_of_file(ini, 0o775)] if ini else []
    rows += [finding_of_token(keys["token_file"])] if keys["token_file"] else []
    for name, mode in ((keys["client_key"], 0o600), (keys["ca_file"], 0o755), (keys["client_cert"], 0o755)):
        rows += [finding_of_file(name, mode)] if name else []
    rows += check_commands(settings, ini)
    try:
        base = os.fsdecode(base_path(keys["calc_base"]))
    except Stop as stop:
        return rows + [(False, str(stop))]
    known = open_to_others(utf8(base), True)
    why = known or open_to_others(utf8(base), False)
    if why:
        rows.append((False if known else None,
                     _("[poller] calc_base: %s; who can put another directory in its place decides what is"
                       " run") % why))
    if os.path.exists(utf8(os.path.join(base, ".mi"))):
        rows += [finding_of_file(os.path.join(base, ".mi"), 0o700)] + check_upgrade(utf8(base))
        rows.append(finding_of_audit(audit_path(settings, utf8(os.path.join(base, ".mi")))))
    return rows + findings_of_disk(base, keys["keep_free"]) + [finding_of_open_files(
        256)] + look_at_running_poller(utf8(base), settings)


def check_commands(settings, ini):
    """Rows about the commands that may run here."""
    rows = []
    for section in sorted(section for section in settings if section.startswith("command ")):
        try:
            command = command_of(ini, section, settings[section])
            check_command(ini, command)
            rows.append((True,
                         _("[%s] %s may run (%s on the wire)")
                         % (section, command["argv"][0], command["match"])))
            if command["batch"] != "none":
                rows += findings_of_batch(section, command, settings["poller"]["calc_base"])
        except Stop as stop:
            rows.append((False, str(stop)))
    try:
        allow_list(ini, settings)
    except Stop as stop:
        rows += [(False, str(stop))] if (False, str(stop)) not in rows else []
    return rows


def check_upgrade(base):
    """Rows about the calculations below calc_base (bytes) as an older, or a newer, version of this program
    has left them."""
    rows, older = [], 0
    names = ([name for group in names_on_disk(base).values() for name in group]
             if os.path.isdir(os.path.join(base, b".mi")) else [])
    for name in sorted(names):
        try:
            calc = Calculation(base, name, read_order(base, name))
            older += not calc.delivery() and calc.order.get("v", 1) < ON_DISK
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            rows.append((None,
                         _("%s: left alone (%s); an older or newer version may read it; else remove it"
                           " there: %s")
                         % (name, getattr(error, "strerror", None) or error,
                            shown(os.path.join(base, b".mi", utf8(name))))))
    if older:
        rows.append((
            True, _("%s: %d unfinished calculations of an older version go on") % (shown(base), older)))
    return rows or [(True, _("%s: nothing unfinished of another version") % shown(base))]


def findings_of_batch(section, command, base):
    """Rows: does its batch system answer? And to a process that may start no setuid program (PBS proves by
    one who is asking), which is what the poller is that runs now, or will be where its unit says so?"""
    queue = BatchQueue(b"/", command["batch"], batch_env(command))
    try:
        queue.query_answer(queue.ask_ours())
    except ValueError as error:
        return [(False, _("[%s] %s does not answer: %s") % (section, command["batch"], printable(error)))]
    try:
        pid = (running_poller(base_path(base))
               if os.path.exists(os.path.join(base_path(base), b".mi", b"lock")) else 0)
        restricted = (command["batch"] not in NEEDS_SETUID
                      or b"NoNewPrivs:\t1" in read_small("/proc/%d/status" % pid))
    except (Stop, OSError):
        restricted = command["batch"] not in NEEDS_SETUID
    try:
        if restricted and shutil.which("setpriv"):
            queue.query_answer(["setpriv", "--no-new-privs"] + queue.ask_ours())
    except ValueError as error:
        return [(False,
                 _("[%s] %s answers here, but not to a poller with NoNewPrivileges in its unit: print that"
                   " anew with `unit`, or take this and what implies it out of it (%s)")
                 % (section, command["batch"], printable(error)))]
    return [(True, _("[%s] %s answers") % (section, command["batch"]))]


NEEDS_SETUID = ("pbs",)              # batch systems whose programs need a setuid one (pbs_iff)


def probes(site):
    """Every call of this side, made so that it does nothing, and what the relay says to it then."""
    one = {"accept_id": "00000000-0000-4000-8000-000000000000", "claim": "-"}
    return [("POST", "calc-request", {"site_id": site, "take": "-", "wait": 0}, "take is"),
            ("GET", "calc-params", one, ""), ("POST", "calc-params-complete", one, ""),
            ("POST", "calc-start", one, ""), ("POST", "calc-end", dict(one, result="abnormal"), ""),
            ("POST", "send-results", dict(one, result_files={}), ""),
            ("POST", "end-send", dict(one, result="end send"), ""),
            ("POST", "heartbeat", {"site_id": site, "poller": "check", "calcs": {}, "wait": 0}, ""),
            ("GET", "files/%s/input/0" % one["accept_id"], {"claim": "-"}, ""),
            ("POST", "files/%s/result/0?v=2&offset=0&claim=-" % one["accept_id"], {}, "")]


def cmd_login(options, settings, ini):
    """A token for a user's password, kept in token_file."""
    keys = settings["poller"]
    if not keys["url"]:
        raise Stop(EX_CONFIG,
                   _("%s: [poller] %s is not set")
                   % (options.ini or "mi_distributed_computing_assist.ini", "url"))
    return log_in(stranger(keys), options.user, keys["token_file"])


def cmd_hello(options, settings, ini):
    """What the command hello of a kit runs: for trying. It reads the files in the directory that it is
    started in, the inputs, and says their names, sizes and sums, and the time."""
    import hashlib
    rows = [_("hello from %s, %s") % (printable(options.site), iso_time(time.time()))]
    for name in sorted(os.path.join(above, leaf) for above, names, files in os.walk(b".") for leaf in files):
        with open(name, "rb") as text:
            found = hashlib.sha256()
            for chunk in iter(lambda: text.read(CHUNK), b""):
                found.update(chunk)
            rows.append("%s  %d bytes  %s" % (found.hexdigest(), text.tell(), shown(name[2:])))
    with open(b"hello.txt", "w", encoding="utf-8") as out:
        out.write("\n".join(rows) + "\n")
    print("\n".join(rows))


def cmd_enroll(options, settings, ini):
    """A token for the one-use code of a kit, in the place of an old one: of the file token_file.code, or
    asked for (without a terminal: a line of standard input)."""
    keys = settings["poller"]
    for key in ("url", "site", "token_file"):
        if not keys[key]:
            raise Stop(EX_CONFIG, _("%s: [poller] %s is not set") % (ini or INI_NAME, key))
    path, there = keys["token_file"] + ".code", has_code(keys["token_file"])
    if there:
        with open(utf8(path), encoding="ascii", errors="replace") as text:
            code = text.read(1000)
    elif sys.stdin.isatty():
        import getpass
        code = getpass.getpass(_("code: "))
    else:
        code = sys.stdin.readline(1000)
    print(enroll(stranger(keys), code, keys["token_file"], "remote", keys["site"]))
    if there:
        os.unlink(utf8(path))


def enroll_once(options, keys):
    """The first start with a kit: its code becomes a token."""
    if has_code(keys["token_file"]) and not options.fielded:
        sys.stderr.write(enroll_by_file(stranger(keys), keys["token_file"], "remote", keys["site"]))


def stranger(keys):
    """The relay of [poller] for whoever has no token yet."""
    return RelayClient(keys["url"], lambda: "",
                       **{key: keys[key] for key in ("ca_file", "proxy", "client_cert", "client_key")})


def cmd_bundle(options, settings, ini):
    """bundle: what support needs to see of this poller."""
    keys, base = settings["poller"], open_base(settings["poller"]["calc_base"])
    rows = [dict(row_of(base, calc), journal=calc.whole_journal())
            for calc in collections.deque(on_disk(base), BUNDLE_CALCULATIONS)]
    options.json = True
    parts = {"versions.txt": said_by(print_version) + system_words(),
             "check.json": said_by(cmd_check, options),
             "ini.txt": ini_without_secrets(ini) if ini else "", "log.txt": end_of_log(keys["logfile"]),
             "outbox.json": said_by(cmd_outbox, base, 0, True),
             "calculations.json": "".join(json_of(row) + "\n" for row in rows)}
    secrets = {"client_key": secret_lines(keys["client_key"]) if keys["client_key"] else []}
    if keys["token_file"] or {"CREDENTIALS_DIRECTORY", "MI_DISTCOMP_TOKEN"} & set(os.environ):
        secrets["token"] = [utf8(find_token("", keys["url"], keys, False)())]
    password = re.search(r"//[^/@]*:([^/@]+)@", keys["proxy"])
    if password:
        from urllib.parse import unquote_to_bytes
        secrets["proxy"] = [utf8(password.group(1)), unquote_to_bytes(password.group(1))]
    write_bundle(options.file, parts, lambda data: secrets_in(data, secrets))


def cmd_unit(options, settings, ini):
    """Prints a systemd unit: the service; --once: for a timer; --timer: the timer; --cloud-init: for a
    machine that is made on demand."""
    if options.timer:
        return print(UNIT_TIMER, end="")
    import pwd
    me = pwd.getpwuid(os.geteuid()).pw_name if os.geteuid() else "mi_distcomp"
    words = [sys.executable, "-I", "-S", os.path.abspath(__file__), "poll", "--ini",
             os.path.abspath(ini or "/etc/mi_distributed_computing_assist.ini")]
    start = UNIT_ONCE if options.once else UNIT_SERVICE
    if options.cloud_init:
        start = UNIT_ON_DEMAND
    text = UNIT % {"where": "/etc/systemd/system/mi_system_remote.service",
                   "name": "mi_system_remote." + ("timer" if options.once else "service"),
                   "script": words[3], "user": me, "after": UNIT_AFTER if options.cloud_init else "",
                   "start": start % {"program": " ".join(words)},
                   "install": "" if options.once else "\n[Install]\nWantedBy=multi-user.target\n"}
    if any(keys["batch"] in NEEDS_SETUID
           for section, keys in settings.items() if section.startswith("command ")):
        text = NO_SETUID_LINES.sub("", text).replace("KeyringMode", WHY_OPEN + "KeyringMode")
    if options.cloud_init:
        text = UNIT_CLOUD % {"idle": 600, "user": me,
                             "unit": "\n".join("      " + line if line else ""
                                               for line in text.rstrip().split("\n"))}
    print(text, end="")


# ==== trying a command ====
# `try`: what a command of the allow-list does with files of this host, by the code that a calculation goes
# through from its order to the list of what leaves. No relay is asked, and nothing leaves.

class TriedRun(GateRun):
    """A run of `try`. name: of its directory below calc_base/try."""

    def __init__(self, gate, base, name, order):
        self.folder = os.path.join(base, b"try", utf8(name))
        self.stays = {}                                # {name: why it stays here}, for its owner
        control = os.path.join(self.folder, b"control")
        os.makedirs(control, 0o700)
        open(os.path.join(control, b"journal"), "xb").close()
        prepare_control(control)
        logs = [(LOG_NAMES[0], control, b"stdout"), (LOG_NAMES[1], control, b"stderr")]
        GateRun.__init__(self, gate, "try." + name, "try." + name, os.path.join(self.folder, b"work"),
                         control, order, logs, {})

    def permit_order(self):
        """The owner's own word needs no signature."""

    def note_stay(self, name, why, aloud):
        """What stays here, and by which rule."""
        self.stays[name] = why

    def bring(self, inputs):
        """Copies the inputs [(name, path)] to where the command finds them."""
        os.makedirs(self.work, 0o700)
        for name, path in inputs:
            into = os.path.join(self.work, utf8(name))
            os.makedirs(os.path.dirname(into), 0o700, exist_ok=True)
            shutil.copyfile(path, into)
            info = os.stat(path)
            put_marks(self.ident, into, info.st_mode & 0o100, info.st_mtime_ns)

    def to_the_end(self):
        """Runs it; Ctrl+C, and SIGTERM, end its command as a cancel does."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            if self.note_starting():
                self.start()
            if not self.last("ended"):
                self.follow_to_end()
        except KeyboardInterrupt:
            self.cancelled = True
            self.follow_to_end()
        return self.last("ended")


def cmd_try(options, settings, ini):
    """try: its argument vector and directory, its end, what would leave and what would not. 77 if a rule
    says no; its own exit code otherwise, 65 for a 0 whose results would not be complete."""
    SAY["level"] = max(SAY["level"], 0 if options.verbose else 2)
    commands = allow_list(ini or INI_NAME, settings)
    inputs, base = files_to_try(options.file), open_base(settings["poller"]["calc_base"])
    forget_tries(base, settings["poller"]["keep_workdirs"])
    run = TriedRun(Gate(os.path.join(base, b".mi"), commands), base,
                   time.strftime("%Y%m%dT%H%M%S.") + str(os.getpid()), order_to_try(options, commands))
    try:
        run.permit([name for name, path in inputs])
        run.bring(inputs)
    except (ValueError, OSError) as error:
        remove_tree(run.folder)
        raise error if isinstance(error, OSError) else Stop(EX_REFUSED, str(error))
    told = {"argv": run.argv, "work": shown(run.work),
            "logs": [shown(run.path(name)) for name in (b"stdout", b"stderr")]}
    if not options.json:
        print(_("argument vector: %s") % json_of(told["argv"]))
        print(_("directory: %s") % told["work"])
        print(_("its output: %s") % "  ".join(told["logs"]), flush=True)
    end = run.to_the_end()
    found = next(run.collect_until_steady(settings["outbound"], run.leaving_kinds()))
    run.close_trees()
    code = code_of_try(end, found)
    told.update(report_of(found, run.stays), exit_code=code, command_exit_code=end["exit_code"],
                reason=end["reason"])
    print(json_of(told)) if options.json else show_try(told)
    return code


def report_of(found, stays):
    """What a Collector and its notes {name: why} say: {"leaves": {name: bytes}, "held", "stays": {name: why},
    "verdicts"}."""
    leaves = {one.name: one.size for one in itertools.chain(found.found, found.folders)
              if one.name not in found.held}
    return {"leaves": leaves, "held": found.held, "verdicts": found.verdicts,
            "stays": {name: why for name, why in stays.items() if name and name not in found.held}}


def cmd_scan(options, settings, ini):
    """scan: what the rules say of files of this host. 65 if one would not leave; --index: makes an index of
    them."""
    if options.index:
        return write_index(options.index, options.file, sum(options.but, []))
    told = {"leaves": {}, "held": {}, "stays": {}, "verdicts": Verdicts()}
    for word in options.file:
        add_scanned(told, dict(settings["outbound"], dry_run=False), word)
    return tell_what_leaves(told, options.json)


def add_scanned(told, rules, word):
    """Adds to report_of() what the rules say of the file, or of all below the directory, `word`. 66 if it is
    not there."""
    path, stays = os.path.realpath(utf8(word)), {}
    if not os.path.exists(path):
        raise Stop(EX_NOINPUT, _("%s is not a file that can be read") % shown(path))
    tree = ResultTree(path if os.path.isdir(path) else os.path.dirname(path))
    found = Collector(rules, lambda name, why, aloud: stays.update({name: why}))
    if tree.path == path:
        found.take_matching(tree, ["**", ".**"])
    else:
        found.take_named(tree, [os.path.basename(path).decode("utf-8", "surrogateescape")])
    for key, part in report_of(found.in_order(), stays).items():
        for name, what in part.items() if key != "verdicts" else ():
            told[key][os.path.join(word, name) if tree.path == path else word] = what
    tree.close()


def cmd_what_leaves(options, settings, ini):
    """what-leaves: the same of a whole calculation (of one that runs, as if it ended now), or of what lies in
    a directory. 65 if something would not leave."""
    if os.path.isdir(utf8(options.what)):
        told = {"leaves": {}, "held": {}, "stays": {}, "verdicts": Verdicts()}
        add_scanned(told, dict(settings["outbound"], dry_run=False), options.what)
        return tell_what_leaves(told, options.json)
    stays, base = {}, open_base(settings["poller"]["calc_base"])
    run = calc_named(base, options.what).run
    run.gate = Gate(os.path.join(base, b".mi"), commands_of(ini or INI_NAME, settings))
    run.note_stay = lambda name, why, aloud: stays.update({name: why})
    if not run.last("ended"):
        run.journal.entries.append({"what": "ended", "whole": True, "reason": ""})
    found = run.collect(dict(settings["outbound"], dry_run=False), run.leaving_kinds())
    run.close_trees()
    return tell_what_leaves(report_of(found, stays), options.json)


def tell_what_leaves(told, as_json):
    """Prints report_of(). 65 if something would not leave."""
    if as_json:
        print(json_of(told))
    else:
        show_what_leaves(told)
    return EX_DATA if told["held"] or told["stays"] or told["verdicts"] else 0


def show_what_leaves(told):
    """report_of() for people."""
    for name, length in sorted(told["leaves"].items()):
        print(_("would leave: %s (%d bytes)") % (printable(name), length))
    for name, why in sorted(told["held"].items()):
        print(_("would be held for a person: %s (%s)") % (printable(name), printable(why)))
    for name, why in sorted(told["stays"].items()):
        print(_("stays here: %s (%s)") % (printable(name), printable(why)))


def write_index(goal, names, samples):
    """Writes an index of the pieces of secret files, for deny_pieces. 65 if one cannot be looked into, or
    they are too large."""
    paths = [[os.path.realpath(utf8(name)).decode("utf-8", "surrogateescape") for name in group]
             for group in (names, samples)]
    content = looking()[1]
    try:
        data, count = content["make_index"](*paths)
    except (content["Hit"], content["Held"]) as error:
        raise Stop(EX_DATA, str(error))
    fresh = utf8(goal) + b".new"
    write_synced(fresh, data)
    os.rename(fresh, utf8(goal))
    print(_("%s: %d pieces, %d bytes; deny_pieces names it") % (printable(goal), count, len(data)))
    return 0


def order_to_try(options, commands):
    """What a workflow would ask for: --out, or all that the command's section lets be asked for."""
    asked = sum(options.out, []) or ["**"] * commands.get(options.command, {"patterns": False})["patterns"]
    patterns = [word for word in asked if "*" in word or "?" in word or word.endswith("/")]
    return {"command": options.command, "parameters": options.param, "result_patterns": patterns,
            "result_files": {word: {} for word in asked if word not in patterns}}


def files_to_try(words):
    """The inputs [(name, path as bytes)] of FILE, NAME=PATH or DIR/ as the workflow side names them. 66 for
    one that is not there, 64 for a name that cannot be."""
    found = []
    for word in words:
        name, equals, path = word.partition("=")
        if not path or os.path.lexists(utf8(word)):
            name, path = os.path.normpath(word), word
            name = os.path.basename(name) if name.startswith(("/", "..")) else name
        found += [(os.path.normpath(os.path.join(name, inner)), one)
                  for inner, one in files_below(utf8(path))]
    try:
        check_manifest_names(sorted((name for name, path in found), key=nfc_parts), reserved=LOG_NAMES)
    except ValueError as error:
        raise Stop(EX_USAGE, _("inputs: %s") % error)
    return found


def files_below(path):
    """(name below it, path) of every file of a directory; ("", path) of a file. 66 if it cannot be read."""
    for top, folders, leaves in os.walk(path) if os.path.isdir(path) else [(path, [], [b""])]:
        for leaf in leaves:
            one = os.path.join(top, leaf) if leaf else path
            if not os.path.isfile(one) or not os.access(one, os.R_OK):
                raise Stop(EX_NOINPUT, _("%s is not a file that can be read") % shown(one))
            yield os.path.relpath(one, path).decode("utf-8", "surrogateescape") if leaf else "", one


def forget_tries(base, keep):
    """Removes the directories of tries that ended `keep` seconds ago."""
    top = os.path.join(base, b"try")
    for name in os.listdir(top) if os.path.isdir(top) else ():
        end = read_note(os.path.join(top, name, b"control", b"end"))
        if end and time.time() - end.time > keep:
            remove_tree(os.path.join(top, name))


def code_of_try(end, found):
    """The exit code: what the workflow side would end with."""
    if end["exit_code"] is None:
        return TRIED_CODES.get(re.match("[a-z]*", end["reason"]).group(), EX_UNAVAILABLE)
    short = found.kept_by_name or {"refused", "limit", "name", "unreadable", "changing"}.intersection(
        found.verdicts)
    return EX_DATA if short and end["exit_code"] == 0 else end["exit_code"]


def show_try(told):
    """How it ended, for people."""
    if told["command_exit_code"] is None:
        print(_("the command has no exit code of its own: %s") % printable(told["reason"]))
    else:
        print(_("the command ended with %d (its own exit code)") % told["command_exit_code"])
    show_what_leaves(told)
    if told["exit_code"] == EX_DATA != told["command_exit_code"]:
        print(_("a workflow would end with 65: what was asked for is not complete"))


# ==== start and command line ====

def main(argv=None):
    """The program; returns its exit code."""
    options = parse(arguments(argv))
    if about_itself(options):
        return 0
    SAY["level"], SAY["debug"] = 1, SAY["debug"] or bool(options.verbose)
    if options.verbose or options.quiet:
        SAY["level"] = 0 if options.verbose else 2
    options.as_program = argv is None
    if options.word == "check":
        return cmd_check(options)
    ini = find_ini(options.ini, ini_folders(__file__))
    settings = read_ini(ini, INI_KEYS)
    choose_language(settings["poller"]["lang"])
    return SUBCOMMANDS[options.word][0](options, settings, ini)


def parse(words):
    """The command line as options; the manual's words as those of poll. 64."""
    options = read_line(words)
    vars(options).update(site="", url="", token="", ca_file="", calc_base="", port=None, retry=None,
                         fielded=False, verify=True, ignored=[], resend="")
    if options.help or options.version:
        return options
    manual = "://" in " ".join(options.words[1:2])
    if manual or (options.words or [""])[0] not in {word.split()[0] for word in SUBCOMMANDS}:
        manual_words(options)
    take_word(options)
    return options


def on_what_is_here(options, settings, ini):
    """list, show, explain, outbox, release, refuse, metrics, pause and resume: they look at calc_base,
    whether a poller runs or not."""
    base = open_base(settings["poller"]["calc_base"])
    if options.word in ("pause", "resume"):
        return cmd_pause(base, settings["poller"], options.word)
    limit = settings["outbound"]["hold_for"]
    audit_into(audit_path(settings, os.path.join(base, b".mi")), ini)      # what a person says is noted, too
    if options.word == "outbox":
        return cmd_outbox(base, limit, options.json)
    if options.word in ("release", "refuse"):
        return cmd_release(base, limit, options)
    if options.word == "metrics":
        return cmd_metrics(base, settings["poller"])
    if options.word == "explain":
        return cmd_explain(base, settings["poller"], options.id, options.json)
    if options.word == "show":
        return cmd_show(base, limit, options)

    def lines_of(rows, terminal):
        stands = ["-- " + text for good, text in look_at_running_poller(base, settings)]
        return list_lines(rows, terminal) + stands
    show_list(options, looks(lambda: [row_of(base, calc) for calc in on_disk(base)]), lines_of)


def cmd_audit(options, settings, ini):
    """audit verify, audit report."""
    path = audit_path(settings, os.path.join(base_path(settings["poller"]["calc_base"]), b".mi"))
    return (audit_verify if options.word == "audit verify" else audit_report)(path, options)


def cmd_resend(options, settings, ini):
    """resend: by the poller that runs, or here."""
    base = open_base(settings["poller"]["calc_base"])
    options.resend = calc_to_resend(base, options.id).name
    if running_poller(base):
        return ask_to_resend(base, options.resend)
    return cmd_poll(options, settings, ini)


def cmd_poll(options, settings, ini):
    """poll, the manual's words, and resend where no poller runs."""
    if not options.once and not options.resend:
        start_lean()
    if settings["poller"]["logfile"]:
        log_into(settings["poller"]["logfile"])
    no_core_dump()
    try:
        poller = set_up(options, settings, ini)
    except Stop as stop:
        if stop.code == EX_TEMPFAIL and options.once:
            return 0
        raise
    return resend_here(poller) if options.resend else poller.run()


def set_up(options, settings, ini):
    """Everything that is checked before the first contact: the Poller, its calc_base locked."""
    keys, ini = (settings["poller"],
                 ini or options.fielded and INI_NAME or find_ini(None, ini_folders(__file__), needed=True))
    for key in ("site", "url", "ca_file", "calc_base"):
        setattr(options, key, getattr(options, key) or keys[key])
        if not getattr(options, key) and key in ("site", "url"):
            raise Stop(EX_CONFIG, _("%s: [poller] %s is not set") % (ini, key))
    parse_relay_url(options.url, options.port)
    commands = allow_list(ini, settings)
    enroll_once(options, keys)
    token = find_token(options.token, options.url, keys, options.as_program)
    for word, why in options.ignored:
        log("warn", None, "ignored", word=word, why=why)
    base = open_base(options.calc_base)
    lock = lock_base(base)
    if any(command["batch"] != "none" for command in commands.values()):
        probe_locks(base)
    if open_to_others(base):
        log("warn", None, "calc_base: who can put another directory in its place decides what is run",
            why=open_to_others(base))
    if (base + b"/").startswith(b"/tmp/"):
        log("warn", None, "calc_base is below /tmp: a reboot or a cleaner may delete what was not delivered",
            base=shown(base))
    options.ini = ini
    poller = Poller(settings, options, commands, token, base)
    poller.lock, poller.name, poller.ini = lock, poller_name(base), ini
    poller.stamp = poller.seen = stamp_of(ini)
    if poller.gate.orders.signers:
        poller.gate.orders.begun(time.time())          # what was signed before does not run
    poller.begin_audit("opened")
    note_settings(base, settings)
    if not options.verify:
        log("warn", None,
            "no_auth: THE RELAY'S CERTIFICATE IS NOT CHECKED: whoever sits in between can read token, inputs"
            " and results and give orders within the allow-list; use no_auth:CAFILE or ca_file")
    return poller


def base_path(path):
    """calc_base as bytes: path, or the user's state directory."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    found = os.path.expanduser(path) if path else os.path.join(home, "mi_distcomp")
    # it would be another place wherever this is started
    if not os.path.isabs(found) and (not path or found.startswith("~")):
        raise Stop(EX_CONFIG,
                   _("no home directory is known here: set HOME, or [poller] calc_base, to an absolute path"))
    return os.path.realpath(utf8(found))


def open_base(path):
    """calc_base and its .mi, made or checked, as bytes. 78 if others could put something into it."""
    base = base_path(path)
    folder = os.path.join(base, b".mi")
    for path in (base, folder):
        try:
            if not os.path.isdir(path):
                os.makedirs(path, 0o700)
        except OSError as error:
            code = EX_IOERR if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else EX_CONFIG
            raise Stop(code,
                       _("%s: %s; set [poller] calc_base to a directory that this user may make or own")
                       % (shown(path), error.strerror))
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise Stop(EX_CONFIG,
                   _("%s/.mi: must be a directory of yours that nobody else may enter (chown, chmod 700)")
                   % shown(base))
    if open_to_others(base, known=True):
        raise Stop(EX_CONFIG,
                   _("[poller] calc_base: %s; who can put another directory in its place decides what is run")
                   % open_to_others(base, known=True))
    return base


def lock_base(base):
    """Takes calc_base for this process: the open lock file. 75 with who holds it."""
    import fcntl
    lock = open(os.path.join(base, b".mi", b"lock"), "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise no_lock(base, error)
        lock.seek(0)
        raise Stop(EX_TEMPFAIL,
                   _("%s: in use by another poller (%s); stop it, or give this one its own calc_base")
                   % (shown(base), lock.read(200).strip() or _("about to start or to end")))
    lock.truncate(0)
    lock.write("pid %d on %s\n" % (os.getpid(), os.uname().nodename))
    lock.flush()
    return lock


def probe_locks(base):
    """78 if the file system of calc_base refuses the locks that submissions to a batch system need."""
    import fcntl
    with open(os.path.join(base, b".mi", b"locks"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise no_lock(base, error)


def no_lock(base, error):
    """What is said where locks are refused; ENOSYS, ENOLCK ... do not mean that somebody else has it."""
    return Stop(EX_CONFIG,
                _("%s: no lock can be had on this file system (%s); set [poller] calc_base to a directory on"
                  " another one") % (shown(base), error.strerror))


def poller_name(base):
    """This calc_base's random name, by which the relay knows it again."""
    path = os.path.join(base, b".mi", b"poller")
    if not re.match("[!-~]{1,100}\\Z", small_text(path)):            # not there, or broken
        write_synced(path, ("poller-%s\n" % os.urandom(8).hex()).encode())
    return small_text(path)


def stamp_of(path):
    """What changes when somebody writes the file, or None if it is not there."""
    try:
        info = os.stat(utf8(path))
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def find_token(word, url, settings, as_program):
    """A function that returns the token: of the command line's word, or the first place that has one."""
    credential = os.path.join(os.environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", "mi_distcomp_token")
    if word == "login":
        token = token_from_login(url)
    elif word.startswith("fd:"):
        try:
            with open(int(word[3:]), encoding="latin-1") as pipe:
                token = plain_token(pipe.read(5000), word)
        except (OSError, ValueError):
            raise Stop(EX_USAGE, _("%s: no token to read there") % word)
    elif word:
        token = plain_token(word, "TOKEN")
        if as_program:
            hide_token(token)
    elif settings["token_file"]:
        return token_in_file(settings["token_file"])
    elif os.path.exists(credential):
        return token_in_file(credential, strict=False)
    elif os.environ.get("MI_DISTCOMP_TOKEN"):
        token = plain_token(os.environ["MI_DISTCOMP_TOKEN"], "MI_DISTCOMP_TOKEN")
    elif sys.stdin is not None and sys.stdin.isatty():
        import getpass
        token = plain_token(getpass.getpass(_("token: ")), _("what was typed"))
    else:
        raise Stop(EX_CONFIG, _("no token: set token_file in [poller] (mode 0600)"))
    return lambda: token


def plain_token(text, where):
    """text as a token. 78 if it cannot be one."""
    if not re.match(r"[\x21-\x7e]{1,4096}\Z", text.strip()):
        raise Stop(EX_CONFIG, _("%s: holds no token") % where)
    return text.strip()


def token_in_file(path, strict=True):
    """A function that returns the token in a file, read each time: it may be renewed. 78 if it is unreadable
    or (strict) too open."""
    def read():
        try:
            with open(utf8(path), encoding="latin-1") as text:
                if strict and os.fstat(text.fileno()).st_mode & 0o077:
                    raise Stop(EX_CONFIG, _("%s: others may read the token: chmod 600 %s") % (path, path))
                return plain_token(text.read(5000), path)
        except OSError as error:
            raise Stop(EX_CONFIG,
                       _("%s: %s (token_file; chmod 600, owner: the poller's user)") % (path, error.strerror))

    kept = [read()]

    def current():
        try:
            kept[0] = read()
        except Stop as stop:
            log("warn", None, "the old token stays in use", why=stop)
        return kept[0]
    return current


def token_from_login(url):
    """The token of the site's login program, which asks at the terminal. 78 if it is not installed, or others
    may write to it; 77 if it says no."""
    folder = os.environ.get("AUTHENTICATION_OPERATOR", "")
    if (not os.path.isabs(folder)
            or not any(os.path.exists(os.path.join(folder, "openam_operator" + end)) for end in ("", ".py"))):
        raise Stop(EX_CONFIG,
                   _("login: AUTHENTICATION_OPERATOR must name the directory of authentication_operator"))
    for top, _folders, names in os.walk(folder):
        for name in [""] + [name for name in names if name.endswith((".py", ".pyc", ".so"))]:
            check_only_ours(os.path.join(top, name))
    sys.path.insert(0, folder)
    try:
        from openam_operator import openam_operator
    except ImportError as error:
        raise Stop(EX_CONFIG, "AUTHENTICATION_OPERATOR: %s: %s" % (folder, error))
    token = openam_operator.miLogin(parse_relay_url(url)[1])[1]
    if not token:
        raise Stop(EX_REFUSED, _("login: not accepted"))
    return plain_token(token, "login")


def hide_token(token):
    """Starts this program anew with the token in a pipe instead of on the command line, where `ps` shows it
    to everybody."""
    log("warn", None,
        "the token was in the process list for a moment, and may be in the shell's history: better"
        " token_file, mode 0600")
    out, into = os.pipe()
    os.write(into, token.encode())
    os.close(into)
    os.set_inheritable(out, True)
    with open("/proc/self/cmdline", "rb") as text:
        words = text.read().split(b"\0")[1:-1]
    os.execv(sys.executable,
             [sys.executable] + [b"fd:%d" % out if word == token.encode() else word for word in words])


# ==== what the ini may say ====

def allow_list(where, settings):
    """{word on the wire: its command} of all [command NAME] sections. 78 if there is none, or one is
    wrong."""
    commands = commands_of(where, settings)
    order_rules(where, settings, "poller", b"", [settings["poller"]["site"] or "?"])
    for command in commands.values():
        check_command(where, command)
    if not commands:
        raise Stop(EX_CONFIG,
                   _("%s allows no command on this host; add for each:  [command NAME]  argv ="
                     " /PATH/OF/PROGRAM  match = WORD ON THE WIRE") % where)
    return commands


def check_command(where, command):
    """78 if this command could not run on this host as it is meant."""
    wrong = unfit(command) or wrong_batch(command)
    if wrong:
        raise Stop(EX_CONFIG, "%s: [command %s] %s: %s" % (where, command["name"], wrong[0], wrong[1]))


def wrong_batch(command):
    """(key, why) if the batch system of this command cannot be used as the section says, or None."""
    if command["batch"] == "none":
        return None
    try:
        submit_options(command, ())
    except ValueError as error:
        return "batch_options", error
    missing = missing_batch_program(command["batch"], batch_env(command))
    return ("batch", missing) if missing else None


DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def retry_of(text):
    """'COUNT,INTERVAL' -> (int, seconds); '' -> None."""
    found = re.match(r"([1-9]\d*),(\d+(?:\.\d+)?)\Z", text)
    if text and not found:
        raise ValueError(_("is not COUNT,INTERVAL (like 5,60)"))
    return (int(found.group(1)), float(found.group(2))) if text else None


def hours_of(text):
    """'22-6', 'Mon-Fri 20:30-6:00, Sat-Sun 0-24' -> [(days, first minute, end minute)], local time; '' -> [].
    A span over midnight belongs to the day that it begins on."""
    spans = []
    for part in text.lower().split(",") if text else ():
        found = re.match(
            r"\s*(?:([a-z]{3})(?:-([a-z]{3}))?\s+)?(\d\d?)(?::([0-5]\d))?-(\d\d?)(?::([0-5]\d))?\s*\Z", part)
        first, last, *clock = found.groups() if found else ("?",) + ("0",) * 5
        begin, end = (int(clock[at]) * 60 + int(clock[at + 1] or 0) for at in (0, 2))
        if not {first or DAYS[0], last or DAYS[0]} <= set(DAYS) or begin == end or max(begin, end) > 1440:
            raise ValueError(_("is not like 22-6, or Mon-Fri 20:30-6:00, Sat-Sun 0-24"))
        low = DAYS.index(first) if first else 0
        count = 1 if first else 7
        if last:
            count = (DAYS.index(last) - low) % 7 + 1
        spans.append(([(low + day) % 7 for day in range(count)], begin, end))
    return spans


def within_hours(spans, when):
    """Is the local time `when` (struct_time) in one of hours_of()'s spans? Always, if there is none."""
    minute, day = when.tm_hour * 60 + when.tm_min, when.tm_wday
    return (not spans
            or any(day in days and begin <= minute < end if begin < end
                   else day in days and minute >= begin or (day - 1) % 7 in days and minute < end
                   for days, begin, end in spans))


def next_opening(spans, now):
    """When (seconds since the epoch) the next of hours_of()'s spans begins after `now`."""
    today = time.localtime(now)
    starts = [time.mktime((today.tm_year, today.tm_mon, today.tm_mday + day, 0, begin, 0, 0, 0, -1))
              for day in range(9) for days, begin, end in spans if (today.tm_wday + day) % 7 in days]
    return int(min(start for start in starts if start > now))


# ==== fielded ====
# A fielded relay ("v1"): the same steps in its words. And the manual's words, SITE BASE_URL TOKEN ...
V1_AGAIN = 600                 # seconds after which a fielded relay is asked again whether it is one still
# seconds after which a calculation of a fielded relay is ours if its calc-info was lost and nobody goes on
V1_LOST_AFTER = 3600
V1_WORDS = ("not start", "sending params", "complete send", "running", "calc end", "getting return",
            "got return")
# the word that a step leads to
V1_TO = {"calc-params-complete": 2, "calc-start": 3, "calc-end": 4, "send-results": 5, "end-send": 6}
MANUAL_WORDS = {"debug": "debug", "no_auth": "no_auth[:CAFILE]", "port": "port:443", "retry": "retry:5,60",
                "calc_base": "calc_base:DIR"}


def v1_named(poller, found):
    """3. The calculation that a fielded calc-request named, as put_on_disk() wants it. It reserves nothing:
    {} if another thread of ours is about to take it, None if it is, or was, here in another way."""
    accept_id = str(found.get("accept_id"))
    if accept_id in [calc.accept_id for calc in list(poller.under_way.values())]:
        return {}
    if ACCEPT_ID.match(accept_id) and os.path.lexists(os.path.join(poller.base, b".mi", utf8(accept_id))):
        log("warn", accept_id, "3 is, or was, on this host: nothing runs twice")
        return None
    return {"accept_id": accept_id, "claim": "v1", "attempt": 1, "calc-info": {"command": ""}}


class FieldedCarrier(Carrier):
    """Steps 4 to 8 with a fielded relay. There is no claim: whoever received the calc-info owns the
    calculation. It cannot be cancelled from there."""

    def me(self):
        """The fields by which a fielded relay knows calculation and site."""
        return {"accept_id": self.calc.accept_id, "site_id": self.calc.order["site"]}

    def tell_step(self, name, body=None, **more):
        """One step told to a fielded relay. A no that means "that was already" counts as a yes: an answer was
        lost, or this is a new start."""
        try:
            self.relay.ask_v1("POST", name, dict(self.me(), **more), body=body)
        except RelayRefused as error:
            if error.code in ("0300", "0005") or self.progress() < V1_TO[name]:
                raise

    def progress(self):
        """The place of its progress in V1_WORDS; -1 if the relay does not tell."""
        try:
            word = self.relay.retried(lambda: self.relay.call_v1(
                "GET", "calc-progress", {"accept_id": self.calc.accept_id}), no_token=()).get("message")
            return V1_WORDS.index(str(word).split(":")[1])
        except (RelayRefused, ValueError, IndexError):
            return -1

    def has_order(self):
        """Was it received, or is it now? It comes with the inputs."""
        return bool(self.calc.order.get("received")) or self.ask_order()

    def inputs_here(self):
        """The names of the files in the working directory: they came with the order."""
        for folder, folders, names in os.walk(self.calc.work):
            for name in names:
                yield os.path.join(folder, name)[len(self.calc.work) + 1:].decode("utf-8", "replace")

    def take_inputs(self, page):
        """They are here."""
        return True

    def ask_order(self):
        """4. calc-params: order and inputs as a stream, onto this disk. True; False if it ends here.
        RelayRefused if it is not ours. A fielded relay answers once: if that answer is lost, the calculation
        cannot be run any more and ends without its command."""
        # asked: in vain, here or before a restart
        folder, asked = self.calc.path(b"in"), bool(self.calc.last("asked"))

        def once():
            nonlocal asked
            if self.calc.last("asked"):
                asked = True
            else:
                self.calc.note(4, "asked")
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder, 0o700)
            return self.relay.call_v1(
                "GET", "calc-params", self.me(), folder=folder, moved=self.poller.bytes_moved,
                began=lambda: self.calc.last("receiving") or self.calc.note(4, "receiving"))

        try:
            found = self.relay.retried(once, no_token=NO_TOKEN_CODES[1:])
            if "calc-info" not in found:                   # a fielded relay says yes in a wrong state, too
                raise RelayRefused(409, "calc-params: %s" % found.get("message"))
            self.take_order(found["calc-info"])
            shutil.rmtree(folder, ignore_errors=True)
            return True
        except RelayRefused:
            if not self.calc.last("receiving") and not (asked and self.is_abandoned()):
                time.sleep(self.poller.keys["poll"])            # it may be named again and again
                raise
            reason, text = "input", "the inputs were lost on the way, and a fielded relay gives them once"
        except (ValueError, OSError) as error:
            reason, text = ("disk" if isinstance(error, OSError) else "input",
                            getattr(error, "strerror", None) or error)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.calc.work, ignore_errors=True)       # room for the journal
        self.calc.run.end_early(reason, text)
        return False

    def is_abandoned(self):
        """No calc-info came, and now the relay refuses it: has another poller got it, or was our answer lost?
        Waits, without using a slot, until somebody goes on (False) or nobody has for V1_LOST_AFTER (True)."""
        log("warn", self.calc.accept_id, "4 calc-params was lost, or is another poller's: waiting to see",
            seconds=V1_LOST_AFTER)
        with self.poller.slots:
            self.calc.phase = "in doubt"
            self.poller.slots.notify_all()
        while self.progress() == V1_WORDS.index("sending params"):
            if time.time() - self.calc.last("asked")["t"] > V1_LOST_AFTER:
                return True
            time.sleep(self.poller.keys["poll"])
        return False

    def take_order(self, info):
        """4. Inputs into the working directory, then the order to its place. ValueError if something is not
        as it should be."""
        if not isinstance(info, dict):
            raise ValueError("calc-info is none")
        files, names = info.get("parameter_files") or {}, info.get("result_files") or {}
        if not isinstance(names, (dict, list)) or not all(isinstance(name, str) for name in names):
            raise ValueError("malformed: result_files")
        order = check_calc_order(dict(self.calc.order,
                                      **{"calc-info": {"command": info.get("command"),
                                                       "parameters": info.get("parameters") or "",
                                                       "result_files": {name: {} for name in names}}}))
        if not isinstance(files, dict) or len(files) > MAX_INPUTS:
            raise ValueError(_("too many inputs, or one with a log's name"))
        check_manifest_names(sorted(files, key=nfc_parts), reserved=LOG_NAMES)
        shutil.rmtree(self.calc.work, ignore_errors=True)
        for place, (name, entry) in enumerate(files.items()):
            path = os.path.join(self.calc.work, utf8(name))
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            blob = as_blob(entry[0] if isinstance(entry, list) and entry else None,
                           self.calc.path(b"in", b"x%d" % place))
            os.rename(blob.path, path)
        os.makedirs(self.calc.work, 0o700, exist_ok=True)
        self.calc.order = dict(self.calc.order, received=True, **{"calc-info": order["calc-info"]})
        self.calc.run.order = self.calc.order["calc-info"]
        write_synced(self.calc.path(b"order.new"), json.dumps(self.calc.order).encode())
        os.rename(self.calc.path(b"order.new"), self.calc.path(b"order.json"))
        sync_path(self.calc.control)
        log("info", self.calc.accept_id, "4 calc-params", site=self.calc.order["site"],
            command=self.calc.info["command"], files=len(files), v=1)

    def send_all(self):
        """6. to 8. The end, the results as one stream, and that it was all. What cannot come has its reason
        beside it. A calculation that was refused here walks the same steps: its stderr says why."""
        end, rules = self.calc.run.last("ended"), dict(self.poller.rules)
        rules["max_file"] = min(rules["max_file"] or V1_FILE_MAX, V1_FILE_MAX)
        try:
            if end["exit_code"] is None:
                self.tell_step("calc-params-complete")
                self.tell_step("calc-start")
            for found in what_leaves(self.calc.run, rules, self.calc.run.leaving_kinds()):
                good = end["exit_code"] == 0 and not end["reason"] and self.came_out(found)
                self.tell_step("calc-end", result="calc end" if good else "abnormal")
                log("info", self.calc.accept_id, "7 send-results", site=self.calc.order["site"],
                    files=len(found.found), bytes=found.total, v=1,
                    **{code: entry["count"] for code, entry in found.verdicts.items()})
                self.write_manifest(found)
                said = said_of(found)
                try:
                    self.send_body(found.found, dict(said["missing"], **said["refused"]))
                    break
                except ValueError:                         # see send_results()
                    if not any(result.source.changed for result in found.found):
                        raise
            self.calc.note(7, "sent")
            self.tell_step("end-send", result="end send")
        except RelayRefused as error:
            if error.code != "0300" or not self.calc.last("sent"):
                raise                              # otherwise it has been fetched meanwhile, and is forgotten

    def came_out(self, found):
        """Is at least one of the declared results there, if any was?"""
        wanted = set(self.calc.info["result_files"]) - set(LOG_NAMES)
        return not wanted or any(result.name in wanted for result in found.found)

    def send_body(self, found, absent):
        """7. send-results. If something in between refuses it (a body limit), reasons go in place of the
        files: somebody waits for it."""
        try:
            self.tell_step("send-results", self.body_of(found, absent))
        except RelayRefused as error:
            if error.code not in (400, 413):
                raise
            log("error", self.calc.accept_id, "7 the results are refused and stay here", code=error.code,
                why=error, work=shown(self.calc.work))
            self.tell_step("send-results", self.body_of([], dict(absent, **{
                result.name: "refused on the way: %s" % error for result in found})))

    def body_of(self, found, absent):
        """7. The body of send-results: (its length, a function that gives its chunks)."""
        def entry(content, first, second):
            return {"content": content, "mimetype1": first, "mimetype2": second}
        names = [name for name in absent if name in self.calc.info["result_files"]]
        return json_with_files(lambda mark: dict(
            self.me(),
            result_files=dict([(result.name, entry(mark, "application/octet-stream;", "charset=binary"))
                               for result in found]
                              + [(name, entry("", "Error", absent[name])) for name in names])), [
                                  (result.source, 0, result.size, result.sum256) for result in found])


def manual_words(options):
    """The manual's words, SITE BASE_URL TOKEN ..., into options. 64."""
    words = options.words
    if len(words) < 3 or "://" not in words[1]:
        raise Stop(EX_USAGE,
                   _("say poll, list, show ID, or SITE BASE_URL TOKEN|login ...%s; --help tells more")
                   % did_you_mean((words or [""])[0], list(SUBCOMMANDS)))
    options.words, options.fielded = ["poll"], True
    options.site, options.url, options.token = words[:3]
    for word in words[3:]:
        try:
            manual_word(word, options)
        except ValueError as error:                    # as the fielded program does
            options.ignored.append((word, error))


def manual_word(word, options):
    """One word behind the token. ValueError if it is none, 64 if it is one that cannot be as it stands."""
    key, colon, value = word.partition(":")
    if word == "debug":
        SAY["level"], SAY["debug"] = 0, True
    elif key == "no_auth" and bool(value) == bool(colon):
        options.verify, options.ca_file = bool(value), value
    elif key == "port" and re.match(r"\d{1,5}\Z", value):
        options.port = int(value)
    elif key == "retry" and value:
        options.retry = retry_of(value)
    elif key == "calc_base" and value:
        options.calc_base = value
    elif key in MANUAL_WORDS and key not in ("debug", "retry"):
        raise Stop(EX_USAGE, _("%s: not like %s") % (printable(word), MANUAL_WORDS[key]))
    else:
        raise ValueError(_("is not a word of this program%s") % did_you_mean(key, list(MANUAL_WORDS)))


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


# ==== shared: wire ====
# The relay's client: one keep-alive connection, JSON calls, files in pieces and packs. Redirects are never
# followed.
API_PATH = "/mi-distcomp-api/"
MAX_ANSWER = 16 << 20          # bytes of a JSON answer that are read; manifests come in pages far below
# bytes: smallest piece, largest file in a pack, one read or write
PIECE_MIN, PACK_FILE, CHUNK = 64 << 10, 1 << 20, 256 << 10
PACK_COUNT = 2000              # files in a pack
AHEAD = 2                      # things that are asked for ahead
AHEAD_LEAST, AHEAD_SIZE = 32, 2 << 20  # files at least, and bytes at most, of a pack that is asked for ahead
IN_ROW = 4                     # calls that are sent before the first of them is answered
LARGE_FILES = 100              # files that lanes fetch in one go
INLINE_FILES, INLINE = 100, 32 << 10   # files, and their bytes in all, that travel beside their names
MOST_HEAD = 64 << 10           # bytes of an answer's head
LATER_CODES = (408, 425, 429, 500, 502, 503, 504, 507)                # answers that mean: later
NO_TOKEN_CODES = (401, 403, "0005")  # answers that mean: not with this token
V1_TIMEOUT = 300    # seconds that a fielded relay may be silent: it does one thing at a time, and files whole
V1_FILE_MAX = ((2 << 30) - 1) // 4 * 3                 # bytes: the largest file that is below 2 GiB as base64


class RelayRefused(Exception):
    """The relay's considered no: code (int, or the fielded "0300", "400", "0005"), text, and the answer's
    other fields in more."""

    def __init__(self, code, text, more=None):
        self.code = code
        self.more = more or {}
        # of a refused token the manual's words are expected
        Exception.__init__(self, code != "0005" and refusal_words(self.more) or printable(text[:1000]))


class RelayAway(Exception):
    """No answer of the relay: kind is dns, connect, certificate, name (the certificate is for others), proxy,
    between (something in the way answered) or network."""

    def __init__(self, kind, text):
        Exception.__init__(self, printable(text))
        self.kind = kind


def parse_relay_url(url, port=None):
    """(https?, host, port, path before API_PATH) of a relay's URL. http://HOST means https on 50443, as the
    manual prints it; plain http is for http://LOOPBACK:PORT only. 64 for anything that is no URL."""
    from urllib.parse import urlsplit
    try:
        found = urlsplit(url if "//" in url else "https://" + url)
        host, given = found.hostname, port or found.port
    except ValueError:
        host = None
    if (not host or found.scheme not in ("http", "https") or found.username is not None
            or has_control_chars(url) or " " in url):
        raise Stop(EX_USAGE, _("%s: not a URL of a relay (like https://HOST:50443)") % printable(url))
    plain = found.scheme == "http" and given and (host in ("localhost", "::1") or host.startswith("127."))
    return not plain, host, given or 50443, found.path.rstrip("/")


class Backoff:
    """Seconds to wait before asking again: doubling from 1 to most, half of it at random, so that many
    clients spread."""

    def __init__(self, most=600):
        self.most = most
        self.now = 1.0

    def next(self):
        """The next pause in seconds."""
        wait, self.now = self.now, min(self.most, self.now * 2)
        return wait * (0.5 + int.from_bytes(os.urandom(2), "big") / 131072)


def in_thread(work, most=None):
    """Does work() in a thread of its own: no signal ends a wait for a name server, but one ends the wait for
    that thread; so do `most` seconds (socket.timeout)."""
    if threading.current_thread() is not threading.main_thread():        # it gets no signals
        return work()
    under_way, failed = _thread.allocate_lock(), []

    def carry():
        try:
            work()
        except Exception as error:
            failed.append(error)
        under_way.release()

    under_way.acquire()
    _thread.start_new_thread(carry, ())                # (a Thread and its Event: 0.3 ms more of every start)
    if not under_way.acquire(timeout=-1 if most is None else most):
        raise socket.timeout("timed out")
    if failed:
        raise failed[0]


def proxy_of_environment(host, port):
    """(URL of the proxy for an https host, the variable that names it), two empty texts without one:
    https_proxy, all_proxy; no_proxy."""
    for pair in (("https_proxy", "HTTPS_PROXY"), ("all_proxy", "ALL_PROXY")):
        # the small one counts, also when it is empty
        name = next((name for name in pair if name in os.environ), "")
        if os.environ.get(name):
            words = os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).replace(",", " ").split()
            return (("", "") if any(no_proxy_matches(host, port, word.lower()) for word in words)
                    else (os.environ[name], name))
    return "", ""


def no_proxy_matches(host, port, word):
    """Does a word of no_proxy stand for this host: *, a name and all names below it (.NAME, *.NAME), an
    address, a network, each with or without :PORT?"""
    found = re.match(r"(\[[^]]*\]|[^:]*)(?::(\d+))?\Z", word)
    # no match: an IPv6 address
    name, only = (found.group(1).strip("[]"), found.group(2)) if found else (word, None)
    if only and int(only) != port:
        return False
    if "/" in name:
        import ipaddress
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
        except ValueError:                             # the host has a name, or it is no network
            return False
    name = name[1:] if name.startswith("*.") else name
    return (name == "*" or name.strip(".") == host.lower()
            or bool(name.strip(".")) and host.lower().endswith("." + name.strip(".")))


class Trust:
    """Which certificates are believed and shown; their files are looked at again at each new connection.
    Relays of a process share one."""

    def __init__(self, ca_file="", verify=True, client_cert="", client_key=""):
        self.verify = verify
        self.client_cert = client_cert
        self.client_key = client_key
        # which the fielded programs obey
        self.ca_file = ca_file or (os.environ.get("REQUESTS_CA_BUNDLE", "") if verify else "")
        self.context = None
        self.stamps = None                             # of the files that it was made of
        self.has_system_cas = False                    # are the system's CAs in the context, too?

    def current_context(self):
        """The TLS context of these files as they are. 78 if one is unusable; once there was a usable one,
        that stays in force meanwhile."""
        seen = [file_stamp(path) for path in (self.ca_file, self.client_cert, self.client_key) if path]
        if self.context is None or seen != self.stamps:
            try:
                self.context, self.has_system_cas = self.make_context(), not self.verify
            except Stop as stop:
                if self.context is None:
                    raise
                log("warn", None, "certificate", refused=stop, why="the old one stays in force")
            self.stamps = seen
        if not self.ca_file:
            self.load_system_cas()
        return self.context

    def load_system_cas(self):
        """Takes the system's CAs, too (20 ms: with ca_file only where it does not do). False: it has them
        already."""
        if not self.has_system_cas:
            self.has_system_cas = True
            self.context.load_default_certs()
            return True
        return False

    def make_context(self):
        """TLS 1.2 or newer; ca_file's CAs; a client certificate where one is set. 78 if a file is
        unusable."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if hasattr(ssl, "TLSVersion"):
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        else:                                          # Python 3.6
            context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        try:
            at, bundle = self.ca_file, os.environ.get("REQUESTS_CA_BUNDLE")
            if at:
                folder = at == bundle and os.path.isdir(utf8(at))
                context.load_verify_locations(**{"capath" if folder else "cafile": utf8(at)})
            if not self.verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            at = self.client_cert
            if at:
                context.load_cert_chain(utf8(at), utf8(self.client_key or at), "")
        except OSError as error:                       # ssl.SSLError is one
            origin = " (REQUESTS_CA_BUNDLE)" if at == bundle else ""
            raise Stop(EX_CONFIG,
                       _("%s: unusable certificate file: %s") % (at + origin, error.strerror or error))
        return context


def file_stamp(path):
    """Changes when the file does."""
    try:
        found = os.stat(utf8(path))
        return found.st_mtime_ns, found.st_size, found.st_ino
    except OSError as error:
        return error.errno


class HttpConnection:
    """A connection to the relay, or through a proxy to it. (http.client, with all of `email`, takes 7 ms of
    every start.) via: as proxy_for() returns it. context: None for plain http."""

    def __init__(self, host, port, via, context, timeout):
        # as bytes: of a text Python loads all of idna, which takes 1 ms
        self.host = host.encode("idna" if any(char > "\x7f" for char in host) else "ascii")
        name = "[%s]" % host.partition("%")[0] if ":" in host else self.host.decode()
        self.place = "%s:%d" % (name, port)
        self.via = via
        self.context = context
        self.name = name if port == (443 if context else 80) else self.place         # the Host of requests
        self.first = via[:2] if via else (self.host, port)             # the other end of the first line
        self.timeout = timeout
        self.sock = self.source = None                 # source: what reads the answers

    def connect(self):
        """Opens it. OSError; sock is there if the other end of the first line was reached, and is no proxy
        that refused."""
        self.sock = socket.create_connection(self.first, self.timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.via:
            self.sock.sendall(request_head("CONNECT", self.place, self.place, self.via[2].items()))
            with self.sock.makefile("rb") as source:
                found = HttpAnswer(source)
            if found.status // 100 != 2:
                self.close()
                raise ConnectionError("Tunnel connection failed: %d %s" % (found.status, found.reason))
        if self.context:
            host = self.host if hasattr(ssl, "TLSVersion") else self.host.decode()             # Python 3.6
            self.sock = self.context.wrap_socket(self.sock, server_hostname=host)
        self.source = self.sock.makefile("rb")

    def close(self):
        """Closes it."""
        for one in (self.source, self.sock):
            if one is not None:
                one.close()
        self.sock = None


def request_head(method, target, host, headers):
    """The head of a request. ConnectionError if it holds what would end it sooner."""
    lines = (["%s %s HTTP/1.1" % (method, target), "Host: " + host]
             + ["%s: %s" % header for header in headers])
    if " " in target or not "".join(lines).isprintable():
        raise ConnectionError("not a request: %s" % target)
    return "\r\n".join(lines + ["", ""]).encode("latin-1")


class HttpAnswer:
    """The answer to a GET, POST or CONNECT: status, reason, headers {name in small letters: value}; its body
    is still to be read from source. length: bytes of it that are left, None if only its end will tell.
    chunked: does it tell that itself? will_close: does the other end close the line behind it?"""

    def __init__(self, source):
        self.source = source
        for _turn in range(100):
            version, self.status, self.reason, self.headers = read_head(source)
            if self.status // 100 != 1 or self.status == 101:    # 102, 103 Early Hints and their kind: go on
                break
        else:
            raise ConnectionError("an answer without end")
        self.chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        self.chunk = 0                                 # bytes of this one that are left
        told = set(self.headers.get("content-length", "").replace(" ", "").split(","))
        if self.chunked or told == {""}:
            self.length = None
        elif len(told) == 1 and min(told).isdecimal() and len(min(told)) < 19:
            self.length = int(min(told))
        else:
            raise ConnectionError("not an HTTP answer: Content-Length %r" % ", ".join(sorted(told))[:100])
        if self.status in (204, 304):
            self.length = 0
        words = self.headers.get("connection", "").lower()
        self.will_close = ("close" in words or version == "HTTP/1.0" and "keep-alive" not in words
                           or self.length is None and not self.chunked)

    def readinto(self, view, once=False):
        """Fills view as far as the body, or a chunk of it, goes (once: as one read of the line goes); how
        much that was, 0 at the end. OSError if it breaks off."""
        if self.chunked and self.length is None and not self.chunk:
            self.next_chunk()
        left = self.chunk if self.chunked else self.length
        view = view if left is None else view[:left]
        got = (self.source.readinto1 if once else self.source.readinto)(view) if view else 0
        if view and not got and left is not None:
            raise ConnectionError(_("cut off"))
        if self.chunked:
            self.chunk -= got
        elif self.length is not None:
            self.length -= got
        return got

    def next_chunk(self):
        """Reads the line in front of a chunk; of the last one, which is empty, also what stands behind it."""
        line = self.source.readline(MOST_HEAD).strip() or self.source.readline(MOST_HEAD)
        length = line.partition(b";")[0].strip()
        if not re.match(b"[0-9A-Fa-f]{1,15}\\Z", length):
            raise ConnectionError(_("cut off"))
        self.chunk = int(length, 16)
        behind = (self.source.readline(MOST_HEAD).strip() for _turn in range(101))
        if not self.chunk and all(behind):
            raise ConnectionError("an answer without end")
        self.length = None if self.chunk else 0


def read_head(source):
    """(HTTP/1.x, status, reason, headers) of the head that comes next. ConnectionError if none does."""
    head, line = b"", b"more"
    while line.strip():
        line = source.readline(MOST_HEAD)
        head += line
        if line[-1:] != b"\n" or len(head) > MOST_HEAD:
            raise ConnectionError("an answer without end" if len(head) >= MOST_HEAD else
                                  "cut off" if head else "Remote end closed connection without response")
    text = head.decode("latin-1").replace("\r\n", "\n")
    # a line that begins with a blank goes on with the one before
    first, *lines = text.replace("\n ", " ").replace("\n\t", " ").split("\n")
    version, status, reason = (first + "  ").split(" ", 2)
    if not version.startswith("HTTP/1.") or len(status) != 3 or not status.isdecimal() or status < "100":
        raise ConnectionError("not an HTTP answer: %r" % first[:100])
    headers = {}
    for name, colon, value in (line.partition(":") for line in lines):
        name, value = name.strip().lower(), value.strip()
        headers[name] = headers[name] + ", " + value if name in headers else value
    return version, int(status), reason.strip(), headers


class RelayClient:
    """A relay as one client sees it; not for two threads at once.

    token: function that returns the token (it may be renewed in mid-run). pause: called with seconds instead
    of time.sleep. on_outage: called with what was raised when the relay is away, and with None when it
    answers again. waits_for_token: a token that is refused is waited out as the network is (a calculation
    outlives its token). fatal_kinds: kinds of RelayAway that are not waited out. max_pause: longest pause
    between two attempts, in seconds.
    """

    def __init__(self, url, token, ca_file="", verify=True, proxy="", client_cert="", client_key="",
                 port=None):
        self.tls, self.host, self.port, self.prefix = parse_relay_url(url, port)
        shown = "[%s]" % self.host if ":" in self.host else self.host
        self.url = "%s://%s:%d%s" % ("https" if self.tls else "http", shown, self.port, self.prefix)
        self.token = token
        self.proxy = proxy
        self.trust = Trust(ca_file, verify, client_cert, client_key)
        self.pause = time.sleep
        self.on_outage = lambda why: None
        self.waits_for_token = False
        self.fatal_kinds = ()
        self.max_pause = 600
        self.patience_ends = None                      # in time.monotonic()
        self.connection = None
        self.wrong_sums = 0                            # of the pack that is being fetched
        self.body_sent = 0                             # bytes of a body that went
        self.piece_size = self.piece_max = 16 << 20
        self.takes_dirs = False                        # does the relay take empty directories?
        self.lanes = 0                                 # connections for large files; 0: as the line is
        self.lanes_there = 0                           # how many the relay lets a token have
        self.packs_there = False                       # pack pieces? (it knows how; no LAN)
        self.line_rate = 0.0                           # bytes/s over the line in the last run of pieces
        self.how = ""                                  # of the latest transfer: over how many, why one
        self.x_and_mtime = {}                          # see manifest_entries()
        self.inline = {}                               # {number: base64} of what came beside its name

    def twin(self):
        """Another one like it, for another thread."""
        made = object.__new__(type(self))
        vars(made).update(vars(self), connection=None, x_and_mtime={}, inline={})
        return made

    def look_at_line(self):
        """The seconds of a round trip to the relay, the best of three where it may be near; what it says of
        lanes is known then."""
        trips = []
        while not trips or len(trips) < 3 and NEAR_TRIP < min(trips) < 4 * NEAR_TRIP:
            began = time.monotonic()
            found = self.read_answer(self.exchange("GET", "version?v=2"), 30, whole=True)
            trips.append(time.monotonic() - began)
        lanes = found.get("lanes")
        self.lanes_there = lanes if isinstance(lanes, int) else 0
        self.packs_there = found.get("packed") is True and min(trips) >= NEAR_TRIP
        return min(trips)

    def proxy_for(self):
        """(host, port, headers, where that is said) of the proxy for this relay, or None: proxy, or the
        environment's."""
        url, said = (self.proxy, "proxy") if self.proxy else proxy_of_environment(self.host, self.port)
        if not url or not self.tls:
            return None
        import base64
        from urllib.parse import urlsplit, unquote
        try:
            part = urlsplit(url if "//" in url else "http://" + url)
            port = part.port or 8080
        except ValueError:                             # a port that is none
            part = urlsplit("")
        if part.scheme != "http" or not part.hostname:
            raise Stop(EX_CONFIG, _("%s: the proxy must be given as http://[USER:PASSWORD@]HOST:PORT") % said)
        word = "%s:%s" % (unquote(part.username or ""), unquote(part.password or ""))
        headers = ({"Proxy-Authorization": "Basic " + base64.b64encode(word.encode()).decode()}
                   if part.username else {})
        return part.hostname, port, headers, said

    def within_patience(self, seconds):
        """seconds, or what is left of somebody's patience, but a second at least."""
        return (seconds if self.patience_ends is None
                else min(seconds, max(1.0, self.patience_ends - time.monotonic())))

    def open_connection(self, timeout, context=None):
        """A connection to the relay, or to it through the proxy. What it raises is for connect()."""
        context = (context or self.trust.current_context()) if self.tls else None
        made = HttpConnection(self.host, self.port, self.proxy_for(), context, timeout)
        try:
            in_thread(made.connect, None if self.patience_ends is None else self.within_patience(timeout))
        except OSError as error:
            error.reached = made.sock is not None
            raise
        return made

    def connect(self, timeout):
        """Opens the connection. RelayAway, with the kind of what is wrong."""
        via = self.proxy_for()
        where = self.url + (_(" through the proxy %s:%d (%s)") % (via[0], via[1], via[3]) if via else "")
        try:
            self.connection = self.open_connection(timeout)
        except (ssl.SSLError, ssl.CertificateError) as error:
            away = self.tls_failure(error, where, timeout)
            if away.kind == "certificate" and self.trust.load_system_cas():
                return self.connect(timeout)
            raise away
        except (socket.gaierror, UnicodeError):
            raise RelayAway("dns", _("%s: the name %s is not known") % (where, via[0] if via else self.host))
        except OSError as error:
            raise RelayAway("proxy" if via and not error.reached else "connect",
                            "%s: %s" % (where, getattr(error, "strerror", None) or error))

    def tls_failure(self, error, where, timeout):
        """The RelayAway of a TLS connection that failed so."""
        reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error)
        # a name, or an address, that does not match; Python 3.6 says so in a class of its own
        if getattr(error, "verify_code", 0) in (62, 64) or not isinstance(error, ssl.SSLError):
            names = self.certificate_names(timeout) or reason
            return RelayAway("name", _("%s: the certificate is for other names: %s") % (where, names))
        kind = "certificate" if "CERTIFICATE_VERIFY" in str(error).upper() else "network"
        return RelayAway(kind, _("%s: TLS failed: %s") % (where, reason))

    def broken(self, error):
        """The RelayAway of a line that broke so (an exception, or a text)."""
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return RelayAway("network", "%s: %s" % (self.url, why))

    def certificate_names(self, timeout):
        """The names in the certificate of a relay that is believed but for its name: a connection of its own,
        on which nothing is said."""
        context = self.trust.make_context()
        context.check_hostname = False
        context.load_default_certs()
        try:
            made = self.open_connection(timeout, context)
            names = [name for kind, name in made.sock.getpeercert().get("subjectAltName", ())]
            made.close()
            return ", ".join(names[:20])
        except (OSError, ValueError):
            return ""

    def close(self):
        """Drops the connection; the next call opens a new one."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def exchange(self, method, target, body=b"", length=None, headers=(), timeout=30):
        """One request; the HttpAnswer. body: bytes, or (with length) a function that returns an iterator of
        chunks (of whose errors none may be an OSError: those are the network's). RelayAway if no answer came;
        a kept connection that the other end has dropped meanwhile is opened again once, unless much of a body
        went: its offset is an old one by now."""
        for kept in (self.connection is not None, False):
            self.body_sent = 0
            if self.connection is None:
                self.connect(self.within_patience(min(timeout, 30)))
            try:
                self.connection.sock.settimeout(timeout)
                return self.send_request(method, target, body, length, headers)
            except OSError as error:
                self.close()
                if not kept or self.body_sent > 4 * CHUNK or isinstance(error, socket.timeout):
                    raise self.broken(error)
            except BaseException:                      # half a request must not be followed by another
                self.close()
                raise

    def send_request(self, method, target, body, length, headers):
        """One request on the open connection (see exchange); its answer as far as its head."""
        made = self.connection
        size = len(body) if length is None else length
        head = self.head_of(method, target, size if size or length is not None or method == "POST" else None,
                            headers)
        # head and body in one: half the packets, and the relay looks once
        made.sock.sendall(head + body if length is None else head)
        sent = length is None or self.send_chunks(made.sock, body())
        response = HttpAnswer(made.source)
        response.will_close = response.will_close or not sent
        return response

    def head_of(self, method, target, length, headers=()):
        """A request's head, for the open connection; length of its body: None if it has none."""
        fixed = [("Authorization", "Bearer " + self.token()), ("Accept-Encoding", "identity"),
                 ("Content-Type", "application/json")]
        fixed += [] if length is None else [("Content-Length", length)]
        return request_head(method, self.prefix + API_PATH + target, self.connection.name,
                            fixed + list(headers))

    def send_chunks(self, sock, chunks):
        """Sends a body. False if the other end broke it off: its answer may be there already."""
        for chunk in chunks:
            try:
                sock.sendall(chunk)
                self.body_sent += len(chunk)
            except socket.timeout:
                raise
            except OSError:
                return False
        return True

    def end_exchange(self, response):
        """The answer has been read: keep the connection if both ends may."""
        # its last chunk, which is empty, comes with what was read
        if response.chunked and response.length is None:
            try:
                self.connection.sock.settimeout(1)
                response.readinto(memoryview(bytearray(1)))
            except OSError:
                pass
        if response.will_close or response.length != 0:
            self.close()

    def read_answer(self, response, timeout, whole=False):
        """The JSON of an answer: errors[0] if its code is 200, or all of it (whole). RelayRefused; RelayAway
        if it is not the relay's."""
        data, endless = b"", response.length is None and not response.chunked
        try:
            data = self.read_body(response, time.monotonic() + timeout)
            parsed = json.loads(data.decode("utf-8"))
            if whole and isinstance(parsed, dict) and "errors" not in parsed:
                return parsed
            first = accepted(parsed)
            return parsed if whole else first
        except OSError as error:
            self.close()
            raise self.broken(error)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            if endless and data[:1] == b"{" and isinstance(error, ValueError):
                raise self.broken(_("cut off"))        # where it ends, only the connection's end tells
            if response.status == 413:                 # also of a proxy: known to be for good
                raise RelayRefused(413, _("%s: HTTP 413: too large") % self.url)
            text = _("%s: HTTP %d without the relay's JSON: a proxy or gateway in between answered")
            raise RelayAway("between", text % (self.url, response.status))

    def read_body(self, response, until):
        """The bytes of an answer, whose connection is kept if it may be. RelayAway if there is no end of it
        (until: in time.monotonic()), or it is cut off: part of it says nothing, least of all that this is a
        fielded relay."""
        data, view = bytearray(), memoryview(bytearray(CHUNK if response.length is None
                                                       else min(CHUNK, response.length)))
        while True:
            got = response.readinto(view, once=True)
            data += view[:got]
            if len(data) > MAX_ANSWER or time.monotonic() > until:
                self.close()
                raise RelayAway("between", _("%s: an answer without end") % self.url)
            if not got or response.length == 0:
                break
        self.end_exchange(response)
        return data

    def send_fields(self, method, name, fields, timeout):
        """The open answer to a call whose fields go into the query (GET) or the body."""
        if method != "GET":
            return self.exchange(method, name, json.dumps(fields).encode(), timeout=timeout)
        from urllib.parse import urlencode
        return self.exchange(method, name + "?" + urlencode(fields), timeout=timeout)

    def call(self, method, name, fields, wait=0, whole=False):
        """One call, once. wait: seconds that the relay may take before it answers."""
        timeout = wait + self.within_patience(30)   # what the relay is asked to wait is no matter of patience
        return self.read_answer(self.send_fields(method, name, fields, timeout), timeout, whole)

    def retried(self, work, patience=None, no_token=NO_TOKEN_CODES):
        """work() until it is answered: pauses while the relay is away or busy. patience: seconds, None for
        ever; then what it raised last. no_token: codes that are waited out with waits_for_token."""
        backoff, until, noticed = (Backoff(self.max_pause),
                                   None if patience is None else time.monotonic() + patience, "")
        while True:
            self.patience_ends = until if patience else None   # 0: once, in its own time
            try:
                result = work()
                if noticed:
                    self.on_outage(None)
                return result
            except (RelayAway, RelayRefused) as error:
                if isinstance(error, RelayAway):
                    later = error.kind not in self.fatal_kinds
                else:
                    later = error.code in LATER_CODES or self.waits_for_token and error.code in no_token
                wait, left = backoff.next(), None if until is None else until - time.monotonic()
                if not later or left is not None and left <= 0:
                    raise
                if str(error) != noticed:              # the newest reason is the one that is shown
                    self.on_outage(error)
                noticed = str(error)
            finally:
                self.patience_ends = None
            self.close()
            self.pause(wait if left is None else min(wait, left))

    def ask_in_row(self, calls):
        """POSTs, of which calls() gives (name, fields), each sent before the ones before it are answered: no
        round trip is idle. What the first that fails raises; those behind it may have been taken."""
        done, most = 0, 1 if self.lanes == 1 else IN_ROW

        def answer():
            nonlocal done
            self.read_answer(HttpAnswer(self.connection.source), 30)
            done += 1

        def go_on():                                   # False: the connection ended before all were answered
            nonlocal most
            sent, row, most = done, most, 1            # after a failure: one after the other
            for place, (name, fields) in enumerate(calls()):
                if place < sent:                       # answered by an earlier try
                    continue
                self.send_call(name, fields)
                sent += 1
                if sent - done == row:
                    answer()
                    if self.connection is None and done < sent:
                        return False
            while done < sent and self.connection is not None:
                answer()
            return done == sent

        def once():
            try:
                return go_on()
            except OSError as error:
                self.close()
                raise self.broken(error)
            except BaseException:
                self.close()                           # answers to others may follow
                raise

        while not self.retried(once):
            pass

    def send_call(self, name, fields):
        """Sends a POST, whose answer is still to be read. OSError, RelayAway."""
        body = json.dumps(fields).encode()
        if self.connection is None:
            self.connect(self.within_patience(30))
        self.connection.sock.settimeout(30)
        self.connection.sock.sendall(self.head_of("POST", name, len(body)) + body)

    def ask(self, method, name, fields, wait=0, patience=None):
        """call(), until it is answered (see retried)."""
        return self.retried(lambda: self.call(method, name, fields, wait), patience)

    def call_v1(self, method, name, fields, body=None, folder=None, moved=lambda count: None,
                began=lambda: None, timeout=V1_TIMEOUT):
        """One call as the fielded programs make it, once, on a connection of its own: errors[0] if its code
        is 200, or what comes without an envelope. body: (length, function that gives its chunks) instead of
        fields. folder: where the files inside the answer go (see BodyReader); began: called when an answer
        without an envelope begins. RelayRefused, RelayAway; ValueError if the answer or a file to send is not
        as it should be, OSError of this disk."""
        self.close()                # a fielded relay closes it, too; a request must not go out twice
        if body:
            response = self.exchange("POST", name, lambda: local_chunks(body[1]()), body[0], timeout=timeout)
        else:
            response = self.send_fields(method, name, fields, timeout)
        try:
            if folder is None or response.status != 200:
                return self.read_answer(response, timeout)
            views = self.body_chunks(response, moved, began)
            parsed = BodyReader(views, folder, json_from_bytes, MAX_ANSWER).parse()
            return accepted(parsed) if isinstance(parsed, dict) and "errors" in parsed else parsed
        except RelayAway as error:
            if (error.kind == "between" and 400 <= response.status < 500
                    and response.status not in LATER_CODES):
                # a gateway has swallowed the relay's own words
                raise RelayRefused(response.status, str(error), {"why": "html"})
            raise
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(_("an answer that is none"))
        finally:
            self.close()

    def body_chunks(self, response, moved, began):
        """The body of an answer, a chunk at a time. RelayAway if it breaks off."""
        view, seen = memoryview(bytearray(CHUNK)), 0
        for got in iter(lambda: self.read_into(response, view, may_end=True), 0):
            if not seen and not re.match(rb'\s*\{\s*"errors"', view[:64]):
                began()
            seen += got
            moved(got)
            yield view[:got]

    def ask_v1(self, method, name, fields, patience=None, **more):
        """call_v1(), until it is answered (see retried). A fielded 401 is no matter of tokens."""
        return self.retried(lambda: self.call_v1(method, name, fields, **more), patience, NO_TOKEN_CODES[1:])

    def learn(self, patience=None):
        """The relay's version (int) and limits (dict), from `GET version`; version 1 if it is a fielded
        one."""
        def once():
            timeout = self.within_patience(30)
            response = self.exchange("GET", "version?v=2", timeout=timeout)
            if response.status in LATER_CODES:
                self.close()
                raise RelayAway("between", "%s: HTTP %d" % (self.url, response.status))
            try:
                return self.read_answer(response, timeout, whole=True)
            except RelayRefused:
                return {}
            except RelayAway as error:
                if error.kind == "between":
                    return {}
                raise
        found = self.retried(once, patience)
        limit, self.takes_dirs = found.get("max_body"), found.get("dirs") is True
        if isinstance(limit, int) and limit >= PIECE_MIN:
            self.piece_size = self.piece_max = min(limit, 16 << 20)
        return found["version"] if isinstance(found.get("version"), int) else 1, found

    def send_body(self, target, chunks, count):
        """A POST of count bytes of files, which chunks() gives: the relay's answer, or None if something in
        between takes no such body: the next one is smaller. Where bodies get through, they slowly grow."""
        smaller = max(PIECE_MIN, count // 2)
        try:
            found = self.read_answer(self.exchange("POST", target, chunks, count, timeout=120), 120)
        except RelayAway:
            self.piece_size = smaller
            raise
        except RelayRefused as error:
            if error.code != 413 or count <= PIECE_MIN:
                raise
            self.piece_size = self.piece_max = smaller
            return None
        if count >= self.piece_size:
            self.piece_size = min(self.piece_max, self.piece_size + self.piece_size // 8)
        return found

    def send_piece(self, target, source, offset, size):
        """One piece of the open file source from offset on: the relay's answer, or what its refusal says
        about the offset."""
        count = min(self.piece_size, size - offset)
        try:
            target = "%s&offset=%d" % (target, offset)
            found = self.send_body(target, lambda: file_chunks(source, offset, count), count)
            return {"offset": offset} if found is None else found
        except RelayRefused as error:
            if error.code == 409 and "offset" in error.more:
                return {"offset": error.more["offset"]}
            if error.code == 422:
                return {"offset": 0, "wrong": 1}
            raise

    def upload(self, target, path, size, claim="", moved=lambda count: None):
        """One file to the relay, resumed at the byte where it stopped; path in bytes, size as declared.
        ValueError if the file is no longer what was declared."""
        offset, asked, wrong, idle = 0, size <= self.piece_size, 0, 0       # asked: offset is the relay's own

        def step():
            nonlocal asked
            known, asked = asked, False                # until there is an answer
            if known:
                return self.send_piece(target + files_query(claim), source, offset, size)
            return self.call("GET", target, dict({"claim": claim} if claim else {}, v=2, offset=""))

        with open_source(path) as source:
            while True:
                found = self.retried(step)
                now = size if found.get("complete") else found.get("offset")
                if not isinstance(now, int) or not 0 <= now <= size:
                    text = _("%s: the relay is at byte %s of a file of %d")
                    raise RelayRefused(400, text % (target, now, size))
                moved(now - offset)
                if found.get("complete"):
                    return
                wrong, idle = wrong + ("wrong" in found), 0 if now > offset else idle + 1
                if wrong == 3:
                    raise ValueError(_("is not what was declared (its sum differs)"))
                if idle > 10:
                    raise RelayRefused(409, _("%s: the relay stays at byte %d of %d") % (target, now, size))
                # all there, but not complete: an empty piece has the relay look at it again
                asked, offset = True, now

    def upload_pack(self, target, first, files, claim="", moved=lambda count: None):
        """files [(path, size, ...)], numbers first, first+1, ..., back to back in one body. Returns how many
        went: fewer where bodies are cut down; one alone goes in pieces. ValueError if one is no longer what
        was declared."""
        sent = None
        while sent is None:
            count, total = 1, files[0][1]
            while count < len(files) and total + files[count][1] <= self.piece_size:
                total, count = total + files[count][1], count + 1
            if count == 1:
                self.upload_named("%s/%d" % (target, first), files[0], claim, moved)
                return 1
            query = files_query(claim, "&from=%d&count=%d" % (first, count))
            try:
                sent = self.send_body("%s/pack%s" % (target, query), lambda: pack_chunks(files[:count]),
                                      total)
            except RelayRefused as error:
                wrong = error.more.get("wrong")
                if (error.code == 422 and isinstance(wrong, list) and wrong
                        and wrong[0] in range(first, first + count)):
                    raise ValueError(_("%s changed while it was sent")
                                     % files[wrong[0] - first][0].decode("utf-8", "replace"))
                raise
        moved(total)
        return count

    def upload_named(self, target, entry, claim, moved):
        """upload() of a file (path, size, ...), whose name a ValueError says."""
        try:
            self.upload(target, entry[0], entry[1], claim, moved)
        except (ValueError, OSError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError("%s: %s" % (entry[0].decode("utf-8", "replace"), why))

    def upload_all(self, target, files, numbers=None, claim="", moved=lambda count: None):
        """files [(path, size, ...)] in the order of the manifest (numbers: only these) to target, small ones
        in packs, large ones in pieces. ValueError if one is no longer what was declared."""
        todo = sorted(range(len(files)) if numbers is None else set(numbers), reverse=True)
        ahead = Ahead(self)
        large = [LargeFile(number, "%s/%d" % (target[len("files/"):], number), *files[number][:2])
                 for number in reversed(todo) if files[number][1] > PACK_FILE]
        whole = {file.number for file in self.over_lanes(LanesUp, large, claim, moved)}
        todo = [number for number in todo if number not in whole]
        while todo:
            first, batch = pack_at(files, todo)
            packs = self.send_ahead(ahead, target, files, todo[:-len(batch)], claim)
            count = self.retried(lambda: self.upload_pack(target, first, batch, claim, moved))
            gone = set(range(first, first + count))
            for number, entries in packs:
                count = ahead.take(number) or 0
                gone.update(range(number, number + count))
                moved(sum(entry[1] for entry in entries[:count]))
            todo = [number for number in todo if number not in gone]

    def send_ahead(self, ahead, target, files, todo, claim):
        """Sends some packs of small files of those whose numbers are in todo, the last of it first; these
        [(number, entries)]."""
        packs = []
        while todo and len(packs) < AHEAD and self.lanes != 1 and self.piece_size >= 2 * PACK_FILE:
            first, batch = pack_at(files, todo)
            del todo[-len(batch):]
            if len(batch) >= AHEAD_LEAST:
                packs.append((first, batch))
                self.begin_sending(ahead, target, first, batch, claim)
        return packs

    def begin_sending(self, ahead, target, first, batch, claim):
        """Sends a pack ahead."""
        ahead.begin(first, lambda relay: relay.upload_pack(target, first, batch, claim))

    def over_lanes(self, way, files, claim, moved, store=lambda file: None):
        """Moves LargeFiles over several connections, where that is better; those that have gone. way: LanesUp
        or LanesDown; store(file): when one is whole."""
        count = choose_lanes(self, sum(file.size for file in files)) if files else 1
        if count > 1:
            try:
                way(self, min(count, self.lanes_there), claim, moved, files).move(store)
            except OneLane as why:
                self.how = _("1 lane (%s)") % why
        return [file for file in files if file.whole]

    def manifest_entries(self, target, page, claim=""):
        """Every (number, name, size, sha256) of a manifest whose first page is in page {"files", "next"};
        checked. An empty directory's name ends with /; they come last. x_and_mtime: {number: (may its owner
        execute it?, mtime in nanoseconds or None)}, where a file has any; who stores the file takes them out.
        ValueError if the manifest is malformed."""
        number, before, query = 0, None, dict({"claim": claim} if claim else {}, v=2, dirs=1)
        ahead, pages = Ahead(self), 0
        self.x_and_mtime.clear()                             # of a list that was not taken to its end
        self.inline.clear()
        while True:
            entries = page.get("files") or {}
            if not isinstance(entries, dict):
                raise ValueError(_("the file list is none"))
            before = check_manifest_names(entries, before, folders=True)
            follows = page.get("next")
            fields, pages = dict(query, **{"from": follows}), pages + 1
            if follows is not None and pages > 2:      # for fewer, a connection of its own does not pay
                ahead.begin(follows, lambda relay: relay.call("GET", target, fields))
            for name, entry in entries.items():
                size, sum256 = ((entry.get("size"), entry.get("sha256")) if isinstance(entry, dict)
                                else (None, None))
                if not (isinstance(size, int) and size >= 0 and re.match(r"[0-9a-f]{64}\Z", str(sum256))):
                    raise ValueError(_("%s: no size or sha256") % name)
                self.note_beside(number, entry)
                yield number, name, size, sum256
                number += 1
            if follows is None:
                return
            if follows != number or not entries:
                raise ValueError(_("the pages of the file list do not follow one another"))
            page = ahead.take(number) or self.ask("GET", target, fields)

    def note_beside(self, number, entry):
        """What a manifest's entry says beside size and sum, until its file is stored."""
        if "x" in entry or "mtime" in entry:
            self.x_and_mtime[number] = entry.get("x") is True, nanoseconds_of(entry.get("mtime"))
        if isinstance(entry.get("data"), str):
            self.inline[number] = entry["data"]

    def read_into(self, response, view, may_end=False):
        """Fills view from the answer's body as far as one read goes; 0 bytes are its end, where it may end.
        RelayAway if it ends elsewhere, or the line breaks."""
        try:
            got = response.readinto(view)
            if got or may_end:
                return got
            error = _("cut off")
        except OSError as broken:
            error = broken
        self.close()
        raise self.broken(error)

    def get_bytes(self, target, statuses, headers=()):
        """The answer to a GET of bytes, its body still to be read. RelayRefused, or RelayAway if what answers
        are no bytes."""
        response = self.exchange("GET", target, timeout=60, headers=headers)
        if (response.status in statuses
                and response.headers.get("content-type", "").startswith("application/octet-stream")):
            return response
        self.read_answer(response, 60)
        self.close()
        raise RelayAway("between", _("%s: HTTP %d where a file was due") % (self.url, response.status))

    def download(self, target, part, size, sum256, claim="", moved=lambda count: None):
        """One file into part (bytes path), resumed from what is there, verified. ValueError after three wrong
        sums."""
        import hashlib
        view = memoryview(bytearray(CHUNK))
        cut_to_front(part, size)

        def piece():
            nonlocal have, digest
            response = self.get_bytes(target + files_query(claim), (200, 206), [
                ("Range", "bytes=%d-" % have), ("If-Range", '"%s"' % sum256)] if have else [])
            if response.status == 200 and have:  # something in between knows no ranges, or it is another file
                out.seek(0)
                out.truncate()
                moved(-have)
                have, digest = 0, hashlib.sha256()
            if response.length not in (None, size - have):
                self.close()
                raise RelayAway(
                    "between", _("%s: %d bytes where %d were due") % (self.url, response.length, size - have))
            while have < size:
                got = self.read_into(response, view[:min(CHUNK, size - have)])
                if not view[0] and not view[got - 1] and not bytes(view[:got]).strip(b"\0"):
                    out.seek(got, 1)                   # zeros behind the end of the file: a hole
                elif out.write(view[:got]) != got:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), part)
                digest.update(view[:got])
                have += got
                moved(got)
            self.end_exchange(response)

        for attempt in range(3):
            with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+",
                      buffering=0) as out:
                have, digest = 0, hashlib.sha256()
                for got in iter(lambda: out.readinto(view), 0):
                    digest.update(view[:got])
                    have += got
                moved(have)
                try:
                    while have < size:
                        self.retried(piece)
                except OSError:                        # of the disk: the rest of the answer is not read
                    self.close()
                    raise
                if have == size and digest.hexdigest() == sum256:
                    out.truncate(size)
                    return
                out.truncate(0)
                moved(-have)
        os.unlink(part)
        raise ValueError(_("does not arrive as it was sent (its sum differs, three times)"))

    def download_pack(self, target, batch, store, claim, moved, ahead):
        """The first files of batch [(number, name, size, sha256)], as many as the relay packs; taken off
        batch as they are stored. What follows them comes meanwhile."""
        import hashlib
        count = min(PACK_COUNT, sum(1 for entry in batch if entry[2] <= PACK_FILE))
        query = files_query(claim, "&from=%d&count=%d" % (batch[0][0], count))
        response, some = ahead.take(batch[0][0]), False
        self.fetch_behind(response.count if response else count, target, batch, claim, ahead)
        response = response or self.get_bytes("%s/pack%s" % (target, query), (200,))
        try:
            # no length: something in between passes it on without; its end tells
            while batch and batch[0][2] <= (PACK_FILE if response.length is None
                                            else min(response.length, PACK_FILE)):
                number, name, size, sum256 = batch[0]
                data = self.read_file(response, size)
                if data is None:
                    break
                if hashlib.sha256(data).hexdigest() != sum256:
                    raise self.wrong_sum(name)
                store(number, name, data)
                moved(size)
                some = True
                batch.popleft()
            if not some:
                raise ValueError(_("%s: the relay's pack does not match its file list") % batch[0][1])
        except (RelayAway, ValueError, OSError):       # the rest of the answer is not read
            self.close()
            raise
        self.wrong_sums = 0
        if not isinstance(response, Fetched):
            self.end_exchange(response)

    def fetch_behind(self, count, target, batch, claim, ahead):
        """Asks for the packs of small files behind the first count files of batch, which come in one now:
        while those are stored, they come."""
        packs, total, entries = [[]], 0, list(batch)
        if sum(entry[2] for entry in entries[:count]) > self.piece_max:
            return                                     # not in one
        for number, _name, size, _sum in entries[count:]:
            if len(packs[-1]) == PACK_COUNT or total + size > AHEAD_SIZE:
                packs, total = packs + [[]], 0
            if len(packs) > AHEAD or size > PACK_FILE or packs[-1] and number != packs[-1][-1][0] + 1:
                break
            packs[-1].append((number, size))
            total += size
        for pack in packs[:AHEAD]:
            if len(pack) >= AHEAD_LEAST:
                self.begin_pack(ahead, target, claim, pack)

    def begin_pack(self, ahead, target, claim, pack):
        """Asks for a pack [(number, size)] ahead."""
        query = files_query(claim, "&from=%d&count=%d" % (pack[0][0], len(pack)))
        ahead.begin(pack[0][0], lambda relay: relay.whole_pack(
            "%s/pack%s" % (target, query), len(pack), sum(size for _number, size in pack)))

    def whole_pack(self, target, count, size):
        """A pack of so many files and bytes. RelayAway if it has others."""
        response = self.get_bytes(target, (200,))
        data = self.read_file(response, size) if response.length in (None, size) else None
        if data is None:
            raise self.broken(_("cut off"))
        self.end_exchange(response)
        return Fetched(data, count)

    def read_file(self, response, size):
        """size bytes of the answer's body; None if it ends in front of them."""
        data, at = bytearray(size), 0
        while at < size:
            got = self.read_into(response, memoryview(data)[at:], may_end=not at)
            if not got:
                return None
            at += got
        return data

    def wrong_sum(self, name):
        """What is raised for a file that arrived other than its sum says: the third time in a row that it is
        so for good."""
        self.wrong_sums += 1
        if self.wrong_sums >= 3:
            return ValueError(_("%s does not arrive as it was sent (its sum differs, three times)") % name)
        return RelayAway("between", _("%s: arrived other than it was sent") % name)

    def download_all(self, target, entries, store, part, claim="", moved=lambda count: None):
        """Every (number, name, size, sha256) of entries: small ones in packs, handed to store(number, name,
        data), large ones into the file part(number), handed to store(number, name, None). Verified before
        they are handed over. ValueError if they are not what the list says; an OSError is this disk's."""
        entries, batch, ahead = iter(entries), collections.deque(), Ahead(self)
        while True:
            while len(batch) < (1 + AHEAD) * PACK_COUNT and not (batch and batch[-1][2] > PACK_FILE):
                entry = next(entries, None)
                if entry is None:
                    break
                batch.append(entry)
            if not batch:
                return
            number, name, size, sum256 = batch[0]
            data = whole_data(self.inline.pop(number, None), size, sum256)
            if data is not None:
                store(number, name, data)
                moved(size)
                batch.popleft()
            elif size > PACK_FILE:
                self.download_large(target, entries, batch, store, part, claim, moved)
            else:
                self.retried(lambda: self.download_pack(target, batch, store, claim, moved, ahead))

    def download_large(self, target, entries, batch, store, part, claim, moved):
        """download_all() of the large files that come next; taken off batch, and entries, as they are
        stored."""
        names = {}
        while batch and batch[0][2] > PACK_FILE and len(names) < LARGE_FILES:
            number, name, size, sum256 = batch.popleft()
            names[number] = name, LargeFile(number, "%s/%d" % (target[len("files/"):], number), part(number),
                                            size, sum256)
            batch.extend(() if batch else filter(None, [next(entries, None)]))
        large = [file for name, file in names.values()]
        gone = self.over_lanes(LanesDown, large, claim, moved,
                               lambda file: store(file.number, names[file.number][0], None))
        for file in large:
            if file not in gone:
                self.download("%s/%d" % (target, file.number), file.path, file.size, file.sum256, claim,
                              moved)
                store(file.number, names[file.number][0], None)


class Ahead:
    """What is asked of a relay before its turn, in threads and over connections of their own, so that no
    round trip is idle. What fails here is asked again, and told, by who needs it. With `lanes = 1`:
    nothing."""

    def __init__(self, relay):
        self.relay = relay
        self.twins = []                                # of it, that have nothing to do
        self.jobs = collections.OrderedDict()          # {number: (thread, twin, what it gave)}, ascending

    def begin(self, number, work):
        """work(relay) begins, unless it has, or enough others have."""
        if self.relay.lanes == 1 or number in self.jobs or len(self.jobs) == AHEAD:
            return
        twin, found = self.twins.pop() if self.twins else self.relay.twin(), []

        def run():
            try:
                found.append(work(twin))
            except Exception:
                twin.close()

        self.jobs[number] = threading.Thread(target=run, daemon=True), twin, found
        self.jobs[number][0].start()

    def take(self, number):
        """What the work of this number gave; None if it failed, or there was none. Nobody wants those of
        smaller ones any more."""
        while self.jobs and next(iter(self.jobs)) <= number:
            found, (thread, twin, given) = self.jobs.popitem(last=False)
            thread.join()
            self.twins.append(twin)
            if found == number and given:
                return given[0]
        return None


class Fetched:
    """The body of an answer, count files, that is here already."""

    def __init__(self, data, count):
        self.count = count
        self.data = memoryview(data)
        self.length = len(data)                        # of what is left

    def readinto(self, view):
        """Fills view; how much that was."""
        got = min(len(view), self.length)
        at = len(self.data) - self.length
        view[:got] = self.data[at:at + got]
        self.length -= got
        return got


def pack_at(files, todo):
    """(number, entries) of the files that go next in a pack, or a large one, of those whose numbers are in
    todo, the last of it first."""
    first, batch = todo[-1], []
    while len(batch) < min(len(todo), PACK_COUNT) and todo[-1 - len(batch)] == first + len(batch):
        entry = files[first + len(batch)]
        if batch and max(entry[1], batch[0][1]) > PACK_FILE:
            break
        batch.append(entry)
    return first, batch


def whole_data(text, size, sum256):
    """The bytes of a file that came as base64 (text) beside its name; None if they did not, or are not as
    they should be."""
    import hashlib
    try:
        data = bytearray(binascii.a2b_base64(text.encode("ascii")))
    except (AttributeError, ValueError):
        return None
    return data if len(data) == size and hashlib.sha256(data).hexdigest() == sum256 else None


def inline_data(files):
    """[base64] of few small files [(path, size, ...)], as they are now; [] if they are more, or one cannot be
    read: they travel by themselves."""
    if len(files) > INLINE_FILES or sum(entry[1] for entry in files) > INLINE:
        return []
    try:
        found = [b"".join(pack_chunks([entry])) for entry in files]
    except ValueError:
        return []
    return [binascii.b2a_base64(data, newline=False).decode("ascii") for data in found]


def files_query(claim, more=""):
    """The query of a call about files: the claim, if there is one, and more."""
    return "?v=2%s%s" % ("&claim=" + claim if claim else "", more)


def nanoseconds_of(mtime):
    """An entry's mtime (seconds) as a file system wants it; None for what is none."""
    return int(mtime * 10 ** 9) if type(mtime) in (int, float) and abs(mtime) < 1 << 33 else None


def accepted(parsed):
    """errors[0] of an answer, whose code is 200. RelayRefused if it is another; KeyError, IndexError,
    TypeError or AttributeError if it is no such answer."""
    first = parsed["errors"][0]
    code, text = first["code"], str(first.get("message", ""))
    if code != 200:
        raise RelayRefused(code, text, first)
    return first


def json_from_bytes(data):
    """JSON text (bytes) as an object. ValueError, also for what is nested too deeply."""
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(_("an answer that is none"))


def local_chunks(chunks):
    """chunks; an OSError that they raise is a ValueError from here on, for it is not the network's."""
    try:
        for chunk in chunks:
            yield chunk
    except OSError as error:
        raise ValueError(
            "%s: %s" % (error.filename.decode("utf-8", "replace") if error.filename else "", error.strerror))


def file_chunks(source, at, left):
    """left bytes of the open file source from at on, a chunk at a time. ValueError if they cannot be read."""
    view = memoryview(bytearray(min(CHUNK, left) or 1))
    try:
        source.seek(at)
        while left:
            got = source.readinto(view[:min(CHUNK, left)])
            if not got:
                raise ValueError(_("became shorter while it was sent"))
            left -= got
            yield view[:got]
    except OSError as error:                           # not the network's
        raise ValueError(error.strerror)


def pack_chunks(files):
    """The bytes of small files [(path, size, ...)] back to back, in chunks. ValueError if one cannot be read
    or has another size."""
    chunk = bytearray()
    for entry in files:
        try:
            with open_source(entry[0]) as source:
                data = source.read(entry[1] + 1)
        except OSError as error:
            raise ValueError("%s: %s" % (entry[0].decode("utf-8", "replace"), error.strerror))
        if len(data) != entry[1]:
            raise ValueError(_("%s changed while it was sent") % entry[0].decode("utf-8", "replace"))
        chunk += data
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = bytearray()
    yield chunk

# ==== end shared ====


# ==== shared: lanes ====
# Large files over several connections at once: a lane is a connection and its thread, which takes the next
# run of pieces from one queue when it is done with its own. On a LAN, and for little, one connection does.
# Measured at 50 ms, 1 Gbit/s, against one lane: 4, 6 and 8 of them carry 1.7, 1.8 and 1.4 times as much over
# a clean line, 4 to 20 times at 0.1 % loss, 2.7, 3.3 and 3.4 times with windows of 1 MiB, and the same over a
# full line.
LANES = 6
MOST_LANES = 8                 # that a person may ask for
PACK_BELOW = 32 << 20          # bytes/s of a line below which what shrinks is packed
LANES_FROM = 8 << 20           # bytes from which on further connections pay,
LANES_MOST = 16 << 40          # and up to which there is memory for which pieces are there (a byte of each)
NEAR_TRIP = 0.005              # seconds of round trip below which the relay counts as being on the same LAN
RUN_FIRST, RUN_MOST = 1 << 20, 8 << 20         # bytes that a lane takes at once: first, and at most
MOST_LOSSES = 12               # of connected lanes, in a row: then pieces do not get through


class OneLane(Exception):
    """Pieces do not get through: what is left goes over one connection, as before there were lanes."""


def lanes_of(text):
    """A kind: `auto` (0), or a number of connections."""
    if text not in ["auto"] + list(map(str, range(1, MOST_LANES + 1))):
        raise ValueError(_("is not auto or a number from 1 to %d") % MOST_LANES)
    return 0 if text == "auto" else int(text)


def choose_lanes(relay, total):
    """Over how many connections so many bytes go; relay.how says it for people, and why over one only."""
    count, why = relay.lanes or LANES, ""
    if relay.lanes == 1:
        why = "lanes = 1"
    elif total < LANES_FROM:
        why = _("little")
    elif total > LANES_MOST:
        why = _("too much")
    elif relay.piece_max < PIECE_SIZE + FRAME_MORE:
        why = _("small bodies")
    else:
        trip = relay.retried(relay.look_at_line)
        near = trip < NEAR_TRIP and not relay.lanes
        why = _("near") if near else "" if relay.lanes_there else _("old relay")
    relay.how = _("1 lane (%s)") % why if why else _("%d lanes") % count
    return 1 if why else count


class Rate:
    """How fast bytes go, over the last seconds. relay: the RelayClient by which."""

    def __init__(self, relay):
        self.relay = relay
        self.done = 0                                  # bytes
        self.began = self.last = time.monotonic()
        self.marks = collections.deque([(self.began, 0)], 20)          # (when, bytes until then)
        self.told = self.began, ""                     # (when, words)

    def moved(self, count):
        """count more bytes went (fewer, if negative)."""
        self.done += count
        self.last = time.monotonic()

    def words(self, every=0.5):
        """The rate, over how many lanes, and why over one only, as it was at most `every` seconds ago; empty
        where little goes, or nothing more."""
        now = time.monotonic()
        if self.done < LANES_FROM or now > self.last + 10:
            return ""
        if now > self.told[0] + every or not self.told[1]:
            passed = max(0.1, now - self.marks[0][0])
            rate = max(0, self.done - self.marks[0][1]) / 1048576 / passed
            self.marks.append((now, self.done))
            self.told = now, "%.1f MiB/s, %s" % (rate, self.relay.how)
        return self.told[1]

    def fields(self):
        """The same of all of it, for a line of the log."""
        if self.done < LANES_FROM:
            return {}
        rate = self.done / 1048576 / max(self.last - self.began, 0.001)
        return {"rate": "%.1f MiB/s" % rate, "over": self.relay.how}


class LargeFile:
    """A file on its way: number in the manifest; place below v2/pieces/; path; size; sha256 of what is
    fetched."""

    def __init__(self, number, place, path, size, sum256=""):
        self.number = number
        self.place = place
        self.path = path
        self.size = size
        self.sum256 = sum256
        self.pieces = None                             # of what is fetched
        self.lock = threading.Lock()                   # of pieces
        # under Lanes.changed
        self.gaps = collections.deque()                # (first byte, first behind) of what no lane has
        self.doubtful = []                             # of lanes that broke off: who knows how much is there?
        self.at_work = 0                               # lanes that have a run of it
        self.whole = False
        self.wrong = 0                                 # how often its sum was another
        self.idle = 0                                  # how often all went, and it was not whole

    def begin_anew(self):
        """Its sum is another: from 0 again. ValueError the third time."""
        self.wrong += 1
        if self.wrong == 3:
            raise ValueError(_("does not arrive as it was sent (its sum differs, three times)"))
        self.gaps = collections.deque([(0, self.size)])


class Lanes:
    """One transfer of LargeFiles over up to `count` connections. relay: the RelayClient of who asks for it,
    in whose thread all is told; the lanes have twins of it. moved: is told of bytes that went."""

    def __init__(self, relay, count, claim, moved, files):
        self.relay = relay
        self.count = self.granted = count
        self.claim = claim
        self.query = ""
        self.moved = moved
        self.all = files
        fits = relay.piece_max // (PIECE_SIZE + FRAME_MORE) * PIECE_SIZE               # into one body
        self.run_most = max(PIECE_SIZE, min(RUN_MOST, fits))
        self.losses = 0                                # in a row
        self.changed = threading.Condition()           # of what is below, granted and losses
        self.files = []                                # that are under way
        self.done = collections.deque()                # that are whole, and not yet told
        self.alive = []                                # RelayClients of the lanes
        self.rates = {}                                # {one of these: bytes/s of its last run}
        self.threads = []
        self.bytes = 0                                 # that went, and are not yet told
        self.error = None                              # that ends it
        self.lost = None                               # why the latest lane broke off
        self.next_start = 0.0                          # of a lane, in time.monotonic()
        self.over = False
        self.spare = None                              # a connection that no lane needs any more
        self.packed = False                            # was the latest run?

    def move(self, store):
        """Moves the files; store(file) when one is whole. OneLane; ValueError if one is not what it must be;
        OSError of this disk; RelayRefused."""
        self.relay.retried(lambda: self.attempt(store))

    def attempt(self, store):
        """move(), once. RelayAway, or what the relay says, when no lane is left."""
        self.query = files_query(self.claim, "&transfer=" + os.urandom(8).hex())
        self.error, self.lost, self.over, self.files = None, None, False, []
        todo = collections.deque(file for file in self.all if not file.whole)
        try:
            while todo or self.files or self.done:
                while todo and self.backlog() < 2 * self.count * RUN_FIRST:
                    self.begin(todo[0])
                    with self.changed:
                        (self.done if todo[0].whole else self.files).append(todo.popleft())
                        self.changed.notify_all()
                self.start_lanes()
                whole = self.wait()
                if whole:
                    store(whole)
        finally:
            self.stop()

    def wait(self):
        """The next file that is whole, or None after half a second. What ends the transfer is raised."""
        with self.changed:
            if not (self.done or self.error or not self.alive):
                self.changed.wait(0.5)
            count, self.bytes = self.bytes, 0
            whole = self.done.popleft() if self.done else None
            error = self.error or (self.lost if self.files and not self.alive else None)
            self.error = error
        self.moved(count)
        if error and not whole:
            raise error
        return whole

    def backlog(self):
        """Bytes that no lane has."""
        with self.changed:
            return sum(last - first for file in self.files for first, last in file.gaps)

    def start_lanes(self):
        """As many lanes as there may be; one that broke off begins again a second later."""
        left = self.backlog()
        with self.changed:
            want = min(self.granted, len(self.alive) + max(-(-left // RUN_FIRST), not self.alive))
            while self.files and len(self.alive) < want and time.monotonic() >= self.next_start:
                relay = self.relay.twin()
                # the one that is open already is the first lane's
                relay.connection, self.relay.connection = self.relay.connection, None
                self.alive.append(relay)
                self.threads.append(threading.Thread(target=self.lane, args=(relay,), daemon=True))
                self.threads[-1].start()
            self.relay.how = (_("%d lanes, packed") if self.packed else _("%d lanes")) % len(self.alive)

    def stop(self):
        """Ends all lanes, also in the middle of something. One connection is handed back."""
        with self.changed:
            self.over = True
            self.changed.notify_all()
            for relay in self.alive if self.files else ():
                try:                                   # past TLS, which is the lane's own
                    socket.socket.shutdown(relay.connection.sock, socket.SHUT_RDWR)
                except (AttributeError, TypeError, OSError):           # it has none
                    pass
        for thread in self.threads:
            thread.join(5)
        self.threads = []
        if self.relay.connection is None:
            self.relay.connection, self.spare = self.spare, None

    def lane(self, relay):
        """A thread."""
        try:
            while self.work(relay):
                pass
            with self.changed:
                if self.spare is None:
                    self.spare, relay.connection = relay.connection, None
        except (RelayAway, RelayRefused) as error:
            self.note_loss(error)
        except Exception as error:                     # of a file, of this disk, or a bug
            self.error = self.error or error
        relay.close()
        with self.changed:
            self.rates.pop(relay, None)
            if relay in self.alive:
                self.alive.remove(relay)
            self.changed.notify_all()

    def note_loss(self, error):
        """A lane broke off, or was refused."""
        code, more = getattr(error, "code", 408), getattr(error, "more", {})
        with self.changed:
            self.losses += code == 413 or getattr(error, "kind", "") in ("between", "network")
            self.next_start = time.monotonic() + 1
            self.lost = error if code in LATER_CODES else RelayAway("between", str(error))
            if code in (404, 405) or code == 413 and self.run_most == PIECE_SIZE or self.losses > MOST_LOSSES:
                self.error = self.error or OneLane(str(error))         # that way will say what is wrong
            elif code not in LATER_CODES + (413,) and more.get("why") not in ("transfer", "piece"):
                self.error = self.error or error
            self.run_most = max(PIECE_SIZE, self.run_most // 2 // PIECE_SIZE * PIECE_SIZE)

    def work(self, relay):
        """A lane's next run. False: there is none for it any more."""
        found = self.take(relay)
        if found is None:
            return False
        began = time.monotonic()
        try:
            whole = self.carry(relay, *found)
        except BaseException:
            with self.changed:
                found[0].at_work -= 1
            raise
        with self.changed:
            if found[2]:
                self.rates[relay] = (found[2] - found[1]) / max(time.monotonic() - began, 1e-6)
            self.losses, self.lost = 0, None
            found[0].at_work -= 1
            if whole and not found[0].whole:
                found[0].whole = True
                self.files.remove(found[0])
                self.done.append(found[0])
            self.changed.notify_all()
        return True

    def take(self, relay):
        """(file, first byte, first behind) of a lane's next run; None behind: it is to be asked how much is
        there; 0 and 0: all went, but nobody has said that it is whole. None: the lane ends."""
        with self.changed:
            while not (self.over or self.error):
                if len(self.alive) > self.granted:
                    self.alive.remove(relay)
                    return None
                for file in self.files:
                    if not (file.gaps or file.doubtful or not file.at_work):
                        continue
                    run = (0, None if file.doubtful else 0)
                    if file.gaps:
                        most = self.run_size(relay)
                        first, last = file.gaps.popleft()
                        run = first, min(last, first + most)
                        if run[1] < last:
                            file.gaps.appendleft((run[1], last))
                    file.at_work += 1
                    return (file,) + run
                self.changed.wait()
            return None

    def run_size(self, relay):
        """How much a lane takes next: half of its part, by how fast its last run went, of what is left, so
        that all are done at about the same time; but a tenth of a second's worth."""
        rate = self.rates.get(relay)
        if not rate:
            return RUN_FIRST
        left = sum(last - first for file in self.files for first, last in file.gaps)
        most = max(left / 2 * rate / sum(self.rates.values()), rate / 10, PIECE_SIZE)
        most = min(most, self.run_most, PACKED_RUN if self.packs() else most)
        return int(most) // PIECE_SIZE * PIECE_SIZE

    def packs(self):
        """Are pieces to be packed? Where the line is quick, the processor would be the limit."""
        return self.relay.packs_there and sum(one.line_rate for one in list(self.alive)) < PACK_BELOW

    def count_bytes(self, count):
        """So many bytes went (fewer, if negative)."""
        with self.changed:
            self.bytes += count

    def take_grant(self, lanes):
        """What the relay says of how many lanes there may be."""
        if str(lanes).isdecimal() and len(str(lanes)) < 6:
            self.granted = max(1, min(self.count, int(lanes)))

    def note_rate(self, relay, count, began, packed):
        """A run of so many bytes over the line went since began, packed or not."""
        if count > PIECE_SIZE // 8:
            relay.line_rate = count / max(time.monotonic() - began, 1e-6)
            self.packed = bool(packed)

    def place(self, file, first, last):
        """The call for a run of pieces."""
        return "v2/pieces/%s%s&offset=%d&size=%d" % (file.place, self.query, first, last - first)


class LanesUp(Lanes):
    """To the relay."""

    def begin(self, file):
        """Asks how much of a file is there."""
        try:
            missing = self.missing(self.relay, file)
        except RelayRefused as error:
            if error.code in (404, 405):
                raise OneLane(str(error))
            raise
        file.gaps, file.doubtful = collections.deque(missing or ()), []
        file.whole = missing is None
        self.count_bytes(file.size - sum(last - first for first, last in file.gaps))

    def missing(self, relay, file):
        """[(first byte, first behind)] of what the relay lacks of it, None if it is whole there."""
        found = relay.call("GET", "v2/missing/%s%s" % (file.place, self.query), {})
        self.take_grant(found.get("lanes"))
        try:
            return None if found.get("complete") else [
                (int(first), int(last)) for first, last in found["missing"]
                if 0 <= first < last <= file.size]
        except (KeyError, TypeError, ValueError):
            raise RelayAway("between", _("an answer that is none"))

    def carry(self, relay, file, first, last):
        """Sends a run of pieces, or looks what is there. True: the file is whole."""
        if last is None:
            return self.look_again(relay, file)
        sent, length = 0, last - first + -(-(last - first) // PIECE_SIZE) * FRAME_MORE
        packed = packed_frames(file_pieces(file.path, first, last)) if self.packs() and first < last else None
        length, began = sum(map(len, packed)) if packed else length, time.monotonic()

        def frames():
            nonlocal sent
            for part in packed or piece_frames(file.path, first, last):
                yield part
                sent += len(part)
                self.count_bytes(len(part))

        try:
            found = relay.read_answer(relay.exchange("POST", self.place(file, first, last), frames, length,
                                                     timeout=120), 120)
            self.take_grant(found.get("lanes"))
            self.note_rate(relay, sent, began, packed)
            self.count_bytes(last - first - sent)      # frames are a little more, or much less
            if not last and not found.get("complete"):
                self.count_idle(file)
            return found.get("complete") is True
        except BaseException as error:
            with self.changed:
                self.bytes -= sent
                if getattr(error, "code", 0) == 422 and error.more.get("why") == "sum":
                    file.begin_anew()
                    return False
                file.doubtful += [(first, last)] if last else []
            if isinstance(error, ValueError):
                raise ValueError("%s: %s" % (file.path.decode("utf-8", "replace"), error))
            raise

    def count_idle(self, file):
        """All of a file went, and it is not whole there: what is missing is asked for, ten times at most."""
        with self.changed:
            file.idle += 1
            file.doubtful.append((0, file.size))
        if file.idle > 10:
            raise RelayRefused(409, _("%s: the relay stays at byte %d of %d")
                               % (file.place, file.size, file.size))

    def look_again(self, relay, file):
        """How much is there of the runs of lanes that broke off? True: the file is whole."""
        with self.changed:
            runs, file.doubtful = file.doubtful, []
        try:
            missing = self.missing(relay, file)
        except BaseException:
            with self.changed:
                file.doubtful += runs
            raise
        with self.changed:
            for begin, end in runs:
                left = [(max(begin, first), min(end, last)) for first, last in missing or ()]
                file.gaps.extend(gap for gap in left if gap[0] < gap[1])
                self.bytes += end - begin - sum(last - first for first, last in left if first < last)
        return missing is None


class LanesDown(Lanes):
    """From the relay."""

    def begin(self, file):
        """Looks how much of a file is here."""
        file.pieces = file.pieces or Pieces(file.path, file.size)
        file.gaps = collections.deque(file.pieces.gaps())
        self.count_bytes(file.size - sum(last - first for first, last in file.gaps))
        file.whole = not file.gaps and self.ends_well(file)

    def carry(self, relay, file, first, last):
        """Fetches a run of pieces. True: the file is whole."""
        at = first
        try:
            for data, sum256 in self.pieces(relay, file, first, last) if first < last else ():
                with file.lock:
                    file.pieces.put(at // PIECE_SIZE, data, sum256)
                at += len(data)
                self.count_bytes(len(data))
                file.pieces.move_on(2)
        except BaseException:
            with self.changed:
                if at < last:
                    file.gaps.appendleft((at, last))
            raise
        with self.changed:
            ends = file.pieces.is_whole() and file.at_work == 1
        return ends and self.ends_well(file)

    def pieces(self, relay, file, first, last):
        """(bytes, sum) of each piece of a run, as it comes."""
        target = self.place(file, first, last) + ("&packed=1" if self.packs() else "")
        response, began = relay.get_bytes(target, (200,)), time.monotonic()
        length = response.length or last - first
        self.take_grant(response.headers.get("x-mi-lanes"))

        def read(count):
            data = relay.read_file(response, count)
            if data is None:
                raise ValueError(_("cut off"))
            return data

        try:
            for at in range(first, last, PIECE_SIZE):
                yield read_frame(read, min(PIECE_SIZE, last - at))
        except ValueError as error:
            raise RelayAway("between", "%s: %s" % (relay.url, error))
        self.note_rate(relay, length, began, length < last - first)
        relay.end_exchange(response)

    def ends_well(self, file):
        """All pieces are here: is it the file? Else it begins anew."""
        file.pieces.move_on()
        drop_sums(file.path)
        if file.pieces.digest.hexdigest() == file.sum256:
            return True
        with self.changed:
            self.bytes -= file.size
            file.begin_anew()
        os.unlink(file.path)
        file.pieces = Pieces(file.path, file.size)
        return False


def piece_frames(path, first, last):
    """The chunks of the frames of a file's pieces, as they are."""
    return (part for data in file_pieces(path, first, last) for part in frame(data))


def file_pieces(path, first, last):
    """The bytes of a file's pieces. ValueError if they cannot be read."""
    try:
        with open_source(path) as source:
            source.seek(first)
            for at in range(first, last, PIECE_SIZE):
                data = source.read(min(PIECE_SIZE, last - at))
                if len(data) != min(PIECE_SIZE, last - at):
                    raise ValueError(_("became shorter while it was sent"))
                yield data
    except OSError as error:                           # not the network's
        raise ValueError(error.strerror)
# ==== end shared ====


# ==== shared: pieces ====
# A file that comes in pieces, in any order, over several connections. Over the line a piece is a frame: its
# form (one byte, 0: as it is, 1: zlib), the length of its data (four bytes, big-endian), the data, and the
# sha256 of what is in the file.
PIECE_SIZE = 256 << 10         # bytes; the last piece of a file may be shorter
FRAME_MORE = 5 + 32            # bytes of a frame beside its data
SHRINKS, SAMPLE = 2.5, 64 << 10        # by so much must so many bytes of a piece shrink to be packed
PACKED_RUN = 2 << 20           # bytes at most of a run of packed pieces: it is in memory as a whole
SUMS = b".sums"                # behind the path of a file: the sums of its pieces


def frame(data, pack=False):
    """The chunks of a piece's frame; pack: packed, if a sample shrinks by SHRINKS."""
    import hashlib
    form, sent = b"\0", data
    if pack:
        import zlib
        sample = zlib.compress(data[:SAMPLE], 1)
        packed = zlib.compress(data, 1) if len(sample) * SHRINKS <= len(data[:SAMPLE]) else data
        if len(packed) < len(data):
            form, sent = b"\1", packed
    return form + len(sent).to_bytes(4, "big"), sent, hashlib.sha256(data).digest()


def packed_frames(pieces):
    """The chunks of the frames of a run of pieces (their bytes), packed as far as one after the other
    shrinks; None if the first one does not."""
    kept, pack = [], True
    for data in pieces:
        parts = frame(data, pack)
        pack = pack and parts[0][:1] == b"\1"
        if not pack and not kept:
            return None
        kept += parts
    return kept


def read_frame(read, size):
    """(the bytes, their sha256) of the piece of size bytes that comes next; read(count): so many bytes.
    ValueError if it is none, or has another sum."""
    import hashlib
    head = bytes(read(5))
    length = int.from_bytes(head[1:], "big")
    if head[:1] not in (b"\0", b"\1") or not (0 < length < size if head[:1] == b"\1" else length == size):
        raise ValueError("no frame of a piece of %d bytes" % size)
    data = read(length) if head[:1] == b"\0" else unpacked(read(length), size)
    sum256 = bytes(read(32))
    if hashlib.sha256(data).digest() != sum256:
        raise ValueError("its sum is another")
    return data, sum256


def unpacked(data, size):
    """What is packed in data; no more of it is made than size bytes. ValueError if it is not just so many."""
    import zlib
    source = zlib.decompressobj()
    try:
        found = source.decompress(data, size)
        more = source.decompress(source.unconsumed_tail, 1)
    except zlib.error as error:
        raise ValueError(str(error))
    if more or len(found) != size or not source.eof or source.unused_data:
        raise ValueError("it unpacks to other than %d bytes" % size)
    return found


def pread_exactly(fd, length, at):
    """length bytes of a file from byte `at` on. OSError if it has fewer."""
    data = os.pread(fd, length, at)
    while len(data) < length:
        more = os.pread(fd, length - len(data), at + len(data))
        if not more:
            raise OSError(errno.EIO, "the file is short")
        data += more
    return data


def drop_sums(path):
    """Of a file at path all pieces are there, or none is: the notes of their sums are needed no more."""
    try:
        os.unlink(path + SUMS)
    except FileNotFoundError:
        pass


def cut_to_front(path, size):
    """A part in which pieces came in any order goes on byte by byte: it counts up to its first gap."""
    if os.path.exists(path + SUMS):
        front = min(size, Pieces(path, size).front * PIECE_SIZE)
        if os.path.exists(path):
            os.truncate(path, front)
        drop_sums(path)


class Pieces:
    """A file of `size` bytes at path (bytes) that comes in pieces. The sums of those that are there stand in
    path + SUMS, 32 bytes for each, and are compared when a process takes it up again. digest: of all pieces
    before number `front`."""

    def __init__(self, path, size):
        import hashlib
        self.path = path
        self.size = size
        self.have = bytearray(-(-size // PIECE_SIZE))  # of each piece: 1 if it is there
        self.front = 0
        self.digest = hashlib.sha256()
        self.moving = threading.Lock()                 # of front and digest
        if os.path.exists(path):
            self.look_again()

    def look_again(self):
        """What is there from before. (A file that has come otherwise has no sums: all that is there
        counts.)"""
        import hashlib
        came = not os.path.exists(self.path + SUMS)
        with open(self.path, "rb", 0) as part, open(self.path + SUMS, "ab+", 0) as sums:
            there = os.fstat(part.fileno()).st_size
            for number in range(len(self.have)):
                at = number * PIECE_SIZE
                noted = b"" if came else os.pread(sums.fileno(), 32, 32 * number)
                if min(at + PIECE_SIZE, self.size) > there or not (came or noted.strip(b"\0")):
                    continue
                data = pread_exactly(part.fileno(), min(PIECE_SIZE, self.size - at), at)
                found = hashlib.sha256(data).digest()
                if came:
                    sums.write(found)
                self.have[number] = came or found == noted
                if number == self.front and self.have[number]:
                    self.digest.update(data)
                    self.front += 1

    def put(self, number, data, sum256):
        """A piece that has its sum has come. One that is there already stays as it is. One at a time."""
        if not self.have[number]:
            # (the sum first: of a part without any all counts, also its holes)
            for path, at, part in ((self.path + SUMS, 32 * number, sum256),
                                   (self.path, number * PIECE_SIZE, data)):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                try:
                    if not any(part) and empty_from(fd, at) >= at + len(part):         # zeros: a hole
                        os.ftruncate(fd, max(os.fstat(fd).st_size, at + len(part)))
                    elif os.pwrite(fd, part, at) != len(part):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
                finally:
                    os.close(fd)
            self.have[number] = 1

    def move_on(self, most=None):
        """Takes up to `most` pieces (None: all) that follow the front into the digest."""
        with self.moving:
            end = self.front + (len(self.have) if most is None else most)
            while self.front < min(end, len(self.have)) and self.have[self.front]:
                at = self.front * PIECE_SIZE
                with open(self.path, "rb", 0) as part:
                    self.digest.update(pread_exactly(part.fileno(), min(PIECE_SIZE, self.size - at), at))
                self.front += 1

    def is_whole(self):
        """Are all pieces there?"""
        return 0 not in self.have

    def gaps(self):
        """(first byte, first behind) of what is missing, one after the other."""
        at = self.have.find(0)
        while at >= 0:
            end = self.have.find(1, at)
            yield at * PIECE_SIZE, self.size if end < 0 else end * PIECE_SIZE
            at = -1 if end < 0 else self.have.find(0, end)


def empty_from(fd, at):
    """As far as this offset a file has nothing but a hole from `at` on; behind its end: for ever."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        return 1 << 62 if error.errno == errno.ENXIO or os.fstat(fd).st_size <= at else at
# ==== end shared ====


# ==== shared: stream ====
# Fielded bodies hold whole files as base64 in JSON. They are read and written as streams: memory does not
# grow with the files.
# bytes: longer strings of a fielded body are base64 of a file and go straight into one
LONG_STRING = 64 << 10
# bytes: beyond so much that is kept, every string of more than FEW_BYTES where a file's content stands does
KEPT_MANY = 1 << 20
FEW_BYTES = 256
BEFORE_CONTENT = re.compile(rb'(?:\[|"content"\s*:)\s*"\Z')              # what stands before a file's content
BASE64_CHARS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
END_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.S)
Blob = collections.namedtuple("Blob", "path size sha256")             # a file that came inside a fielded body


class BodyReader:
    """A fielded JSON body as a stream: its long strings go through base64 into files in folder (bytes); the
    rest, at most `most` bytes, is for parse(bytes). views: an iterator of the body's bytes as they arrive.
    ValueError for anything that is not as it should be."""

    def __init__(self, views, folder, parse, most):
        self.views = views
        self.folder = folder
        self.parse_rest = parse
        self.most = most
        self.blobs = {}                                # {what stands in the rest in its place: Blob}
        self.nonce = os.urandom(8).hex()
        self.data = b""
        self.at = 0                                    # of data, what is before it has been read

    def refill(self):
        """Takes the next part of the body behind what is not yet read. False at the end."""
        view = next(self.views, None)
        if view is None:
            return False
        self.data, self.at = self.data[self.at:] + bytes(view), 0
        return True

    def parse(self):
        """The body as an object in which long strings are Blobs. ValueError for anything that is not as it
        should be."""
        kept = bytearray()
        while True:
            quote = self.data.find(b'"', self.at)
            kept += self.data[self.at:quote + 1 if quote >= 0 else len(self.data)]
            self.at = quote + 1 if quote >= 0 else len(self.data)
            if len(kept) > self.most:
                raise ValueError("more than %d bytes beside the files" % self.most)
            if quote >= 0:
                kept += self.string(LONG_STRING
                                    if len(kept) < KEPT_MANY
                                    or not BEFORE_CONTENT.search(kept, len(kept) - 40) else FEW_BYTES)
            elif not self.refill():
                break
        return self.with_blobs(self.parse_rest(bytes(kept)))

    def string(self, most):
        """The rest of a string, after its opening quote: as it is, or, if it is longer than most bytes, the
        mark of the Blob that it became."""
        while True:
            end = END_OF_STRING.match(self.data, self.at)
            if end and end.end() - self.at <= most:
                text, self.at = self.data[self.at:end.end()], end.end()
                if self.nonce.encode() in text:
                    raise ValueError("a string that cannot be")
                return text
            if end or len(self.data) - self.at > most:
                mark = "%s:%d" % (self.nonce, len(self.blobs))
                self.blobs[mark] = self.blob(os.path.join(self.folder, b"%06d" % len(self.blobs)))
                return mark.encode() + b'"'
            if not self.refill():
                raise ValueError("the body ends within a string")

    def blob(self, path):
        """The rest of a long string, decoded into the file at path."""
        import hashlib
        total, padded, digest = 0, False, hashlib.sha256()
        with open(path, "xb", buffering=0) as out:
            for piece in filter(None, self.base64_pieces()):
                rest = piece.translate(None, BASE64_CHARS)
                fits = len(piece) % 4 == 0 and len(rest) < 3 and not rest.strip(b"=") and piece.endswith(rest)
                if padded or not fits:
                    raise ValueError("a file's content is not base64")
                padded, data = bool(rest), binascii.a2b_base64(piece)
                if out.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                digest.update(data)
                total += len(data)
            os.fsync(out.fileno())
        return Blob(path, total, digest.hexdigest())

    def base64_pieces(self):
        """The rest of a long string as it arrives: pieces of four bytes each, but for the last one."""
        carry, last = b"", False
        while not last:
            end = self.data.find(b'"', self.at)
            last = end >= 0
            piece = self.data[self.at:end if last else len(self.data)]
            cut = -1 if last else piece.find(b"\\", max(0, len(piece) - 6))
            if cut >= 0:                               # an escape may be cut in two
                piece = piece[:cut]
            self.at += len(piece) + last
            piece = carry + (unescape_base64(piece) if b"\\" in piece else piece)
            whole = len(piece) if last else len(piece) & ~3
            yield piece[:whole]
            carry = piece[whole:]
            if not last and not self.refill():
                raise ValueError("the body ends within a string")

    def with_blobs(self, found):
        """found with the marks replaced by their Blobs."""
        if isinstance(found, str):
            return self.blobs.get(found, found)
        if isinstance(found, list):
            return [self.with_blobs(part) for part in found]
        if isinstance(found, dict):
            if any(key in self.blobs for key in found):
                raise ValueError("a name that is too long")
            return collections.OrderedDict((key, self.with_blobs(part)) for key, part in found.items())
        return found


def unescape_base64(piece):
    """JSON's escapes in a part of a base64 string; line ends are dropped."""
    try:
        return json.loads('"%s"' % piece.decode("ascii")).encode("ascii").replace(
            b"\r", b"").replace(b"\n", b"")
    except ValueError:
        raise ValueError("a file's content is not base64")


def as_blob(content, path):
    """A file's content as it stands in a fielded body (base64 text, or a Blob already) as a Blob at path."""
    if isinstance(content, Blob):
        os.rename(content.path, path)
        return content._replace(path=path)
    if not isinstance(content, str):
        raise ValueError("a file's content is not a text")
    import base64
    import hashlib
    try:
        data = base64.b64decode(content.replace("\n", "").replace("\r", "").encode("ascii"), validate=True)
    except ValueError:
        raise ValueError("a file's content is not base64")
    with open(path, "xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return Blob(path, len(data), hashlib.sha256(data).hexdigest())


def open_source(path):
    """A file to read, at path (bytes), or what an object in its place opens: whoever declared it may have
    more to say of its bytes."""
    return path.open() if hasattr(path, "open") else open(path, "rb", buffering=0)


def base64_chunks(path, at, left, sum256=""):
    """A part of a file (bytes path) as chunks of base64. ValueError if it became shorter, or is not what
    sum256 says."""
    import hashlib
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(192 << 10, left) or 1))                 # a multiple of 3
    with open_source(path) as source:
        source.seek(at)
        while left:
            filled, want = 0, min(left, len(buffer))
            while filled < want:
                count = source.readinto(buffer[filled:want])
                if not count:
                    raise ValueError("%s became shorter while it was sent" % path.decode("utf-8", "replace"))
                filled += count
            left -= want
            if sum256:
                digest.update(buffer[:want])
                # before the last chunk: it must not arrive in full
                if not left and digest.hexdigest() != sum256:
                    raise ValueError("%s changed while it was sent" % path.decode("utf-8", "replace"))
            yield binascii.b2a_base64(buffer[:want], newline=False)


def json_with_files(found, files):
    """JSON with files inside: found(mark) makes an object in which mark stands once for each of files [(path,
    place, size)], in their order; with a sha256 behind size, a file that is another one is not sent to its
    end (ValueError). Returns (the body's length, a function that gives its chunks)."""
    nonce = os.urandom(8).hex()
    texts = json.dumps(found(nonce), ensure_ascii=False).encode("utf-8", "replace").split(nonce.encode())
    length = sum(len(text) for text in texts) + sum((entry[2] + 2) // 3 * 4 for entry in files)

    def chunks():
        for number, text in enumerate(texts):
            yield text
            if number < len(files):
                for chunk in base64_chunks(*files[number]):
                    yield chunk

    return length, chunks
# ==== end shared ====


# ==== shared: reach ====
# `check` of the way to the relay, and `login`.
def certificate_chain(sock):
    """The certificates that the other side shows, its own first, as the ssl module tells them; on older
    Pythons its own alone."""
    try:
        return [one.get_info() for one in sock._sslobj.get_unverified_chain()]
    except AttributeError:
        import tempfile
        with tempfile.NamedTemporaryFile("w") as text:
            text.write(ssl.DER_cert_to_PEM_cert(sock.getpeercert(True)))
            text.flush()
            return [ssl._ssl._test_decode_cert(text.name)]


def findings_of_tls(relay):
    """Rows: the certificate chain as it is seen from here, and whether it is believed. No token is sent."""
    import copy
    rows, blind, trust = [], copy.copy(relay), relay.trust
    blind.trust, blind.connection = Trust(trust.ca_file, False, trust.client_cert, trust.client_key), None
    try:
        blind.connect(20)
        chain = certificate_chain(blind.connection.sock)
        rows.append((True,
                     "%s: %s, %s"
                     % (relay.url, blind.connection.sock.version(), blind.connection.sock.cipher()[0])))
        rows += [finding_of_certificate(one, "#%d" % number) for number, one in enumerate(chain)]
    except (RelayAway, OSError) as error:
        rows.append((False, str(error)))
        return rows
    finally:
        blind.close()
    try:
        relay.connect(20)
        cas = trust.ca_file if trust.ca_file and not trust.has_system_cas else _("the system's CAs")
        rows.append((True,
                     _("the certificate is believed (%s)") % cas if trust.verify
                     else _("no_auth: the certificate is not checked")))
    except RelayAway as error:
        hint = ("%s" if error.kind == "name"
                else _("%s; if it was issued by the right CA, give that CA's file with ca_file"))
        rows.append((False, hint % error))
    return rows


def findings_of_relay(relay, calls):
    """Rows: name, proxy, certificate, clock, token, and which of the calls [(method, target, fields, what a
    good answer says)] get through."""
    rows, via = [], relay.proxy_for()
    rows.append((True,
                 _("proxy: %s") % (_("none") if via is None else "%s:%d (%s)" % (via[0], via[1], via[3]))))
    host, port = via[:2] if via else (relay.host, relay.port)
    try:
        found = sorted({where[4][0] for where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        rows.append((True, "%s: %s" % (host, " ".join(found))))
    except (OSError, UnicodeError):
        return rows + [(False, _("%s: the name is not known here (DNS); is the URL right?") % host)]
    rows += (findings_of_tls(relay) if relay.tls
             else [(None, _("%s: plain http: whoever is in between reads the token") % relay.url)])
    if rows[-1][0] is False:
        return rows
    try:
        version, limits = relay.learn(0)
        rows.append((True if version > 1 else None, _("a relay of this protocol answers") if version > 1 else
                     _("a fielded relay answers, or something that is none; is the URL right?")))
        if isinstance(limits.get("time"), (int, float)):
            off = time.time() - limits["time"]
            rows.append((abs(off) < 60 or None,
                         _("the clocks differ by %.1f s") % off
                         + ("" if abs(off) < 60 else _("; set this host's (NTP)"))))
        if version > 1 and calls:
            rows += findings_of_calls(relay, calls)
    except (RelayAway, RelayRefused) as error:
        rows.append((False, str(error)))
    return rows


def findings_of_calls(relay, calls):
    """Rows: what the relay says to the first call, and which paths something in between does not let
    through."""
    rows, stopped = [], []
    for number, (method, target, fields, good) in enumerate(calls):
        try:
            relay.call(method, target, dict({"v": 2}, **fields))
            code = 200
        except RelayRefused as error:
            code, why = error.code, error.more.get("why")
            if code in NO_TOKEN_CODES[1:] and why and number == 0:
                return rows + [(False,
                                _("the token is refused (%s): get a valid one for this user, role and site")
                                % printable(why))]
            if code == "0005" and not why:
                stopped.append(target)
            elif good and not re.search(good, str(error)):
                rows.append((False, _("%s: the relay says: %s") % (target, error)))
                continue
        except RelayAway as error:
            stopped.append("%s (%s)" % (target, error.kind))
        if number == 0 and not stopped:
            rows.append((True, _("the relay takes this token")))
    if stopped:
        return rows + [(False,
                        _("something in between does not let through: %s; ask the gateway's operator")
                        % " ".join(stopped))]
    return rows + [(True, _("all %d calls of this side get through") % len(calls))]


def log_in(relay, user, path):
    """Asks for the password without echo (without a terminal: a line of standard input) and keeps the token
    in a 0600 file. 77 if refused."""
    asks = sys.stdin.isatty()
    if not user and asks:
        sys.stderr.write(_("user: "))
        sys.stderr.flush()
        user = sys.stdin.readline(1000).strip()
    if not user or not path:
        raise Stop(EX_USAGE, _("login needs USER, and token_file to keep the token in"))
    if asks:
        import getpass
        password = getpass.getpass(_("password of %s at %s: ") % (user, relay.url))
    else:
        password = sys.stdin.readline(2000).rstrip("\r\n")
    try:
        found = relay.call("POST", "login", {"v": 2, "user": user, "password": password})
    except RelayRefused as error:
        raise Stop(EX_TEMPFAIL if error.code in LATER_CODES else EX_REFUSED, "%s: %s" % (relay.url, error))
    except RelayAway as error:
        raise Stop(EX_UNAVAILABLE, str(error))
    token, until = found.get("token"), found.get("expires")
    if (not isinstance(token, str) or not re.match(r"[!-~]{1,4096}\Z", token)
            or not isinstance(until, (int, float))):
        raise Stop(EX_PROTOCOL, "%s: %s" % (relay.url, _("an answer that is none")))
    part = "%s.%s" % (path, os.urandom(4).hex())
    put_token(part, token)
    os.rename(utf8(part), utf8(path))
    print(token_line(path, user, until))
    return 0


def put_token(path, token):
    """A new file with the token, for this user alone, on the disk."""
    with open(os.open(utf8(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as out:
        out.write(token + "\n")
        out.flush()
        os.fsync(out.fileno())


def token_line(path, user, until):
    """What is said of a new token."""
    return _("%s: token of %s, good until %s") % (
        path, printable(user), time.strftime("%Y-%m-%d %H:%M", time.localtime(until)))


def finding_of_token(path):
    """A row about the file with the token."""
    if waits_for_enrolling(path):
        return None, _("%s: is not there yet: the first start exchanges the code in %s for it") % (
            path, path + ".code")
    return finding_of_file(path, 0o600)


def waits_for_enrolling(path):
    """Is there no token yet, but a code that the first start exchanges for one?"""
    return has_code(path) and not os.path.exists(utf8(path))


def has_code(path):
    """Does a code wait beside the file of the token ('': there is none) to be exchanged?"""
    return bool(path) and os.path.exists(utf8(path + ".code"))


def enroll_by_file(relay, path, role, site=""):
    """The first start with a kit: what enroll() needs stands in the file PATH.code, which goes then. A line
    about it. Of several processes one does it. A code that is no good any more is no matter where there is a
    token."""
    import fcntl
    said = ""
    try:
        with open(utf8(path + ".code"), encoding="ascii", errors="replace") as text:
            if os.fstat(text.fileno()).st_mode & 0o077:
                raise Stop(EX_CONFIG,
                           _("%s: others may read the code: chmod 600 %s") % ((path + ".code",) * 2))
            try:
                fcntl.flock(text, fcntl.LOCK_EX)
            except OSError:
                pass                                   # a file system without locks
            if has_code(path):
                said = "%s: %s\n" % (PROGRAM, enroll(relay, text.read(1000), path, role, site))
                os.unlink(utf8(path + ".code"))
    except FileNotFoundError:
        pass                                           # another one has done it
    except Stop as stop:
        if stop.code != EX_REFUSED or not os.path.exists(utf8(path)):
            raise
        log("warn", None, "enroll", why=stop)
    return said


def enroll(relay, code, path, role, site):
    """Exchanges a one-use code for a token in the file `path`; the line that says so. The token is made here
    and put on the disk first, and only its sum is told: a lost answer, or a death in between, costs nothing.
    77 if the code is refused."""
    import hashlib
    code, part = re.sub(r"[\s-]", "", code).upper(), path + ".new"
    if not re.match(r"[A-Z2-7]{24}\Z", code):
        raise Stop(EX_USAGE, _("that is no code of a kit: 24 letters and digits, like ABCD-EFGH-..."))
    try:
        put_token(part, os.urandom(32).hex())
    except FileExistsError:                            # of a start that did not come to its end
        pass
    with open(utf8(part), encoding="ascii", errors="replace") as text:
        token = text.read(100).strip()
    if not re.match(r"[0-9a-f]{64}\Z", token):         # its disk was full
        os.unlink(utf8(part))
        return enroll(relay, code, path, role, site)
    fields = {"v": 2, "code": code, "role": role, "site": site,
              "hash": hashlib.sha256(token.encode()).hexdigest()}
    relay.fatal_kinds = ("certificate", "name", "dns")
    relay.on_outage = lambda why: why and log("warn", None, "enroll", why=why)
    try:
        found = relay.ask("POST", "v2/redeem", fields, patience=60)
    except RelayRefused as error:
        if error.code in LATER_CODES:
            raise Stop(EX_TEMPFAIL, "%s: %s" % (relay.url, error))
        if error.more.get("why") in ("used", "void", "expired", "code"):
            os.unlink(utf8(part))
        raise Stop(EX_REFUSED,
                   _("%s: the relay says: %s; its operator makes a new kit (mi_dicomapi.py init), of which"
                     " the file %s is enough") % (relay.url, error, os.path.basename(path) + ".code"))
    except RelayAway as error:
        raise Stop(EX_UNAVAILABLE, str(error))
    fault("enrolled")
    os.rename(utf8(part), utf8(path))
    return token_line(path, found.get("user"), found.get("expires") or 0)
# ==== end shared ====


# ==== shared: refusals ====
# What the relay refuses for: the key travels (`said`, with the values, `told`), and whoever reads it has the
# words in his own language.
REFUSALS = {
    "max_waiting": "%(count)s calculations wait for site %(site)s; try again later",
    "calculations_per_user": "user %(user)s has %(count)s unfinished calculations; try again later",
    "bytes_per_user": "user %(user)s holds %(count)s bytes; try again later",
    "log-ins": "too many failed log-ins; try again in %(count)s s",
    "work": "user %(user)s asks for much work; try again later",
    "maintenance": "maintenance: %(reason)s; try again later",
    "stock": "the relay was restored from a backup and takes stock; try again later",
    "disk": "the relay's disk has no room for %(count)s bytes; try again later",
    "max_file": "%(name)s: %(count)s bytes are over the relay's limit of %(most)s ([limits] max_file)",
    "max_files": "more than %(most)s files ([limits] max_files)",
    "body": "a body of %(count)s bytes; at most %(most)s",
    "command": "command %(name)s is not in the list of site %(site)s",
    "users": "user %(user)s may not use site %(site)s",
    "not-for-site": "this token is not for site %(name)s, only for %(sites)s",
    "no-token": "no token", "unknown-token": "unknown token", "expired-token": "expired %(day)s",
    "role": "role %(role)s needed", "login": "user or password is wrong",
    "differs": "request_id %(name)s was used for another calculation",
    "claim": "another claim is in force (superseded)",
    "no-result": "the result is not there yet", "ended": "it has ended already",
    "fielded": "a fielded poller holds it and cannot be told to stop",
    "went-well": "it ended well; have another one run (run or submit, with a --request-id of its own)",
    "was-fetched": "its result was fetched already, and its inputs may be gone; have another one run (run or"
                   " submit, with a --request-id of its own)",
    "not-run": "it has not run yet",
    "not-ended": "it has not ended: cancel it first; one that is out of contact needs --force and a --reason"}


def refusal_words(answer):
    """What a refusal says, in the reader's language; "" of one that is not known here."""
    told = answer.get("told")
    try:
        return printable(_(REFUSALS[answer["said"]]) % (told if isinstance(told, dict) else {}))[:1000]
    except (KeyError, TypeError):
        return ""
# ==== end shared ====


# ==== shared: cause ====
# Why a calculation is where it is, as every script tells it to people: a sentence, who has to act, what he
# types at his place, since when, how old that knowledge is, what would change it.

def told_cause(answer):
    """An answer of `explain` in the reader's language: code, who (nobody, starter, admin, operator), site,
    sentence, command, changes, long (how long yet), again (why once more); since, until (seconds since the
    epoch, or None); ahead, runs, run_from, run_to (the figures of `long`, or None); age (seconds since it was
    seen). Nothing of it can steer a terminal."""
    def text(key):
        value = answer.get(key)
        value = value.get(SAY["lang"], value.get("en")) if isinstance(value, dict) else value
        return printable(value[:1000]) if isinstance(value, str) else ""

    def when(key):
        value = answer.get(key)
        return value if type(value) in (int, float) and 0 <= value < 1 << 32 else None

    found = {"code": text("cause")}
    found.update((key, text(key))
                 for key in ("who", "site", "sentence", "command", "changes", "long", "again"))
    found.update((key, when(key)) for key in ("since", "until", "ahead", "runs", "run_from", "run_to"))
    return dict(found, age=max(0, round((when("now") or 0) - (when("seen") or when("now") or 0))))


def who_acts(found):
    """Who, and what he types."""
    who = {"operator": _("the relay's operator"), "starter": _("who has started it"),
           "admin": _("the admin of the external computer")}.get(found["who"], _("nobody"))
    return who + (": " + found["command"] if found["command"] else "")


def cause_lines(found):
    """told_cause() as lines."""
    def clock(seconds):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

    since = _(", since %s") % clock(found["since"]) if found["since"] else ""
    lines = [found["sentence"] + since, "  " + _("who has to act: %s") % who_acts(found)]
    if found["until"]:
        lines.append("  " + _("until: %s") % clock(found["until"]))
    if found["changes"]:
        lines.append("  " + _("what changes it: %s") % found["changes"])
    if found["long"]:
        lines.append("  " + _("how long yet: %s") % found["long"])
    if found["again"]:
        lines.append("  " + found["again"])
    return lines + ["  " + _("seen %d s ago") % found["age"]]


def show_cause(name, found, as_json):
    """Prints it, for one calculation."""
    if as_json:
        print(json_of(dict(found, accept_id=name)))
    else:
        print("%s: %s" % (name, "\n".join(cause_lines(found))))
# ==== end shared ====


# ==== shared: meter ====
def exposition(families):
    """Figures as Prometheus reads them (text format 0.0.4), of [(name, type, what it is, samples)]; a sample
    is (what stands behind the name, {label: value}, number). A family without samples is left out."""
    lines = []
    for name, kind, text, samples in families:
        lines += ["# HELP %s %s" % (name, text), "# TYPE %s %s" % (name, kind)] if samples else []
        lines += ["%s%s%s %s" % (name, suffix, labels_of(labels), number)
                  for suffix, labels, number in samples]
    return "\n".join(lines) + "\n"


def labels_of(labels):
    """{name="value",...}, or nothing."""
    def escaped(value):
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    pairs = ['%s="%s"' % (name, escaped(printable(value))) for name, value in labels.items()]
    return "{%s}" % ",".join(pairs) if pairs else ""
# ==== end shared ====


# ==== shared: check ====
# What `check` says: rows of (True: OK, None: WARN, False: FAIL; a text that says what to do). It looks at
# things as they are, and changes none.
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
# of two files of one name, the first counts
TMPFILES_DIRS = ("/etc/tmpfiles.d", "/run/tmpfiles.d", "/usr/lib/tmpfiles.d")


def print_findings(rows, as_json):
    """Prints the rows; 0, or 78 if one of them is a FAIL."""
    words = {True: "OK", None: "WARN", False: "FAIL"}
    if as_json:
        print(json.dumps([{"level": words[good], "text": printable(text)} for good, text in rows],
                         ensure_ascii=False))
    for good, text in rows if not as_json else ():
        print("%-5s %s" % (words[good], printable(text)))
    return EX_CONFIG if any(good is False for good, text in rows) else 0


def finding_of_file(path, mode):
    """A row: is it there, whose is it, and has it no more than mode (0o600, 0o755 ...)?"""
    try:
        info = os.stat(utf8(path))
    except OSError as error:
        return False, "%s: %s" % (path, error.strerror)
    have = info.st_mode & 0o7777
    if info.st_uid not in (0, os.geteuid()):
        return False, _("%s: belongs to uid %d; give it to this user (chown)") % (path, info.st_uid)
    if have & 0o777 & ~mode:
        return False, _("%s: mode %04o lets others in; type: chmod %o %s") % (path, have, mode & have, path)
    return True, _("%s: mode %04o, owner uid %d") % (path, have, info.st_uid)


def mount_of(path):
    """(mount point, type, options) of the file system that holds path."""
    best = ("/", "?", "")
    with open("/proc/self/mounts", "rb") as text:
        for line in text:
            words = [word.decode("unicode_escape").encode("latin-1") for word in line.split()[:4]]
            if ((os.fsencode(path) + b"/").startswith(words[1].rstrip(b"/") + b"/")
                    and len(words[1]) >= len(os.fsencode(best[0]))):
                best = os.fsdecode(words[1]), os.fsdecode(words[2]), os.fsdecode(words[3])
    return best


def tmpfiles_lines():
    """(file, [word]) of every line of tmpfiles.d that counts."""
    seen = set()
    for folder in TMPFILES_DIRS:
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if name.endswith(".conf") and name not in seen:
                seen.add(name)
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8", errors="replace") as text:
                    for line in text:
                        yield path, line.split()


def cleaner_below(path):
    """What removes old files below path (a line of tmpfiles.d, a cron job), or None."""
    found, kept = None, False
    for source, words in tmpfiles_lines():
        if len(words) > 1 and (path + "/").startswith(words[1].rstrip("/*") + "/") and words[1] != "/":
            kept = kept or words[0][0] in "xX"
            if words[0][0] in "dDevqQ" and len(words) > 5 and words[5] != "-":
                found = "%s: %s" % (source, " ".join(words))
    for job in ("/etc/cron.daily/tmpwatch", "/etc/cron.daily/tmpreaper"):
        if os.path.exists(job) and re.match(r"/(var/)?tmp(/|\Z)", path):
            found = found or job
    return None if kept else found


def findings_of_disk(path, keep, local=False):
    """Rows about the file system of a folder that must last. keep: bytes, or a share, that shall stay free;
    local: no network file system."""
    path, rows = os.path.realpath(path), []
    while not os.path.exists(path):
        path = os.path.dirname(path)
    point, kind, options = mount_of(path)
    disk = os.statvfs(path)
    free, least = (disk.f_bavail * disk.f_frsize,
                   keep * disk.f_blocks * disk.f_frsize if isinstance(keep, float) else keep)
    text = _("%s: %.1f GB free on %s (%s)") % (path, free / 1e9, point, kind)
    rows.append((True, text) if free > least
                else (False,
                      text + _("; less than the %.1f GB that are to stay free: make room") % (least / 1e9)))
    if kind in MEMORY_FILE_SYSTEMS:
        text = _("%s: in memory (%s): a reboot empties it, and what was not delivered is lost; use a"
                 " directory on a disk")
        rows.append((None, text % (path, kind)))
    if local and re.match(r"nfs|cifs|smb|fuse\.sshfs|lustre|gpfs|beegfs|9p", kind):
        rows.append((False, _("%s: on a network file system (%s); use a local disk") % (path, kind)))
    cleaner = cleaner_below(path)
    if cleaner:
        rows.append((None,
                     _("%s: old files are removed there (%s); use another directory, or except this one")
                     % (path, cleaner)))
    if "noexec" in options.split(","):
        rows.append((None,
                     _("%s: mounted noexec: a command that is built or copied there does not run") % path))
    return rows


def finding_of_open_files(wanted):
    """A row: may this process open so many files?"""
    import resource
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = "-" if hard == resource.RLIM_INFINITY else str(hard)
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return True, _("open files: limit %s, wanted %d") % (most, wanted)
    return False, _("open files: limit %s, wanted %d; raise it (LimitNOFILE in the unit, or ulimit -n)") % (
        most, wanted)


def no_core_dump():
    """A core dump of this process would hold its token. What it starts may raise the limit again (ulimit -S
    -c)."""
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def readable_name(part):
    """The readable part of a certificate's subject or issuer."""
    words = {key: value for group in part for key, value in group}
    return ", ".join(words[key] for key in ("commonName", "organizationName") if key in words) or "-"


def finding_of_certificate(found, where):
    """A row about a certificate as the ssl module tells it: whose, by whom, how long."""
    left = (ssl.cert_time_to_seconds(found["notAfter"]) - time.time()) / 86400
    text = _("%s: certificate of %s, issued by %s, %d days left") % (where, readable_name(found["subject"]),
                                                                     readable_name(found["issuer"]), left)
    if ssl.cert_time_to_seconds(found["notBefore"]) > time.time():
        return False, text + _("; it is not valid yet: is a clock wrong?")
    if left < 21:
        return (None if left > 0 else False), text + _("; renew it")
    return True, text
# ==== end shared ====


# ==== shared: lean ====
def start_lean():
    """For what runs for long: Python keeps the syntax tree of the file that it was started with until it ends
    (16 MB of this one), of a text that a program compiles it does not. So this process becomes that, once,
    room by room (whose trees are small), and gives back what compiling took (glibc keeps it else)."""
    if "STARTED_LEAN" in globals():
        try:
            import ctypes
            ctypes.CDLL(None).malloc_trim(0)
        except (ImportError, OSError, AttributeError):
            pass                                       # another C library
    elif __name__ == "__main__" and sys.executable:
        names = {"I": "isolated", "S": "no_site", "E": "ignore_environment", "s": "no_user_site"}
        text = ("import sys; del sys.argv[0]; __file__ = sys.argv[0]; STARTED_LEAN = True\n"
                "def start_lean(lines=0):\n"
                "    whole = open(__file__, 'rb').read().replace(b'\\n# ==== ', b'\\n\\0# ==== ')\n"
                "    for room in whole.split(b'\\0'):\n"
                "        exec(compile(b'\\n' * lines + room, __file__, 'exec'), globals())\n"
                "        lines += room.count(b'\\n')\n"
                "start_lean()")
        os.execv(sys.executable, [sys.executable]
                 + ["-" + letter for letter, name in names.items() if getattr(sys.flags, name)]
                 + ["-c", text, os.path.abspath(__file__)] + sys.argv[1:])
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


# ==== shared: bundle ====
# For support: what somebody else needs to see, in one tar.gz. What goes in is listed by the script's word
# `bundle`, and nothing else does. Before it is written, all of it is searched for the secrets that this host
# knows, by their value: one that is found keeps all of it from being written.
BUNDLE_TAIL = 256 << 10                                # bytes of the end of a log
BUNDLE_CALCULATIONS = 500                              # the newest
# keys of the ini whose values stay away: they are secrets, or say what is one
LEFT_OUT = re.compile(r"(proxy|env\..*|deny_.*|allow_names|argument\..*|input_names|secrets)\Z")


def forms_of(secret):
    """A secret (bytes) as it may stand in a text: as it is, in base64 (wherever that begins), in hex, as in a
    URL."""
    import base64
    from urllib.parse import quote
    found = {secret, secret.hex().encode(), quote(secret, "").encode(),
             b"".join(b"%%%02x" % byte for byte in secret)}
    for shift in range(3):                             # only the characters that it alone makes
        text = base64.b64encode(b"\0" * shift + secret).rstrip(b"=")
        text = text[(shift * 8 + 5) // 6:len(text) - ((shift + len(secret)) % 3 > 0)]
        found |= {text, text.replace(b"+", b"-").replace(b"/", b"_")}
    return {form.lower() for form in found}


def secrets_in(data, secrets):
    """The names of those secrets {name: its values, bytes} of which one stands in data, in any form, also
    broken into lines. (Small and large letters are one: better one hit too many.)"""
    looked_at = data.lower() + b"\0" + re.sub(rb"\s+", b"", data.lower())
    return sorted({name for name, values in secrets.items() for value in values
                   if any(form in looked_at for form in forms_of(value))})


def secret_lines(path):
    """Lines of a file with a key, each as a secret; none if it cannot be read."""
    try:
        with open(utf8(path), "rb") as text:
            return [line.strip() for line in text if len(line.strip()) > 15 and not line.startswith(b"-----")]
    except OSError:
        return []


def ini_without_secrets(path):
    """The ini without comments, and without the values that stay away."""
    import configparser
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#", ";"),
                                          inline_comment_prefixes=("#",), strict=False)
    parser.optionxform = str
    with open(utf8(path), encoding="utf-8", errors="replace") as text:
        parser.read_file(text)
    lines = []
    for section in parser.sections():
        lines += ["[%s]" % section]
        lines += ["%s = %s" % (key, "(left out)" if LEFT_OUT.match(key) else value.replace("\n", "\n    "))
                  for key, value in parser.items(section)]
    return "\n".join(lines) + "\n"


def end_of_log(path):
    """The end of a log; where there is none, where else to look."""
    if not path:
        return "no logfile is set: the log is in the journal (journalctl), or on the terminal\n"
    try:
        with open(utf8(path), "rb") as text:
            text.seek(max(0, os.fstat(text.fileno()).st_size - BUNDLE_TAIL))
            return text.read().decode("utf-8", "replace")
    except OSError as error:
        return "%s: %s\n" % (path, error.strerror)


def said_by(work, *words):
    """What work() prints, or why it cannot."""
    import contextlib
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            work(*words)
        except (Stop, OSError) as error:
            print(error)
    return out.getvalue()


def system_words():
    """Python, kernel, locale, limits."""
    import resource
    return "%s\n%s\nuid %d, %s, locale %s, open files %s\n" % (
        sys.version, " ".join(os.uname()), os.geteuid(), time.strftime("%Y-%m-%d %H:%M:%S %z"),
        os.environ.get("LC_ALL") or os.environ.get("LANG"), resource.getrlimit(resource.RLIMIT_NOFILE))


def write_bundle(path, parts, look):
    """Writes parts {name: text} as tar.gz, with a list of them, and says what is in it. look(bytes): the
    names of secrets in it: 77 with them, and nothing is written. 64 if there is something already."""
    import tarfile
    parts = {name: text.encode("utf-8", "backslashreplace") for name, text in parts.items()}
    parts["MANIFEST"] = "".join("%9d  %s\n" % (len(data), name) for name, data in parts.items()).encode()
    for name, data in parts.items():
        hits = look(data)
        if hits:
            raise Stop(EX_REFUSED, _("%s was not written: in %s stands a secret of this host: %s")
                       % (path, name, ", ".join(hits)))
    try:
        out = os.open(utf8(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Stop(EX_USAGE, _("%s is there already") % path)
    with open(out, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, data in parts.items():
            entry = tarfile.TarInfo("bundle/" + name)
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            tar.addfile(entry, io.BytesIO(data))
    print(parts["MANIFEST"].decode() + _("%s is written; look at it before you give it away") % path)
# ==== end shared ====


# ==== shared: table ====
# Lists for people: columns as wide as a terminal shows them, states in the words of the README, and drawn
# anew while they change. {state for people: its sign, which no colour replaces}, {sign: its colour}
STATES = {"registered": ".", "waiting": "-", "taken": "<", "queued": "-", "running": ">", "ended": "=",
          "sending": "=", "done": "+", "abnormal": "!", "fetched": "+", "undelivered": "=", "delivered": "+",
          "kept": "!", "lost": "!", "out of contact": "?", "held": "-"}
COLOURS = {"-": "33", "<": "36", ">": "32", "=": "36", "+": "32", "!": "31", "?": "35"}
# the relay's, the wire's and the poller's own words for them
STATE_WORDS = {"allowed": "waiting", "sent": "taken", "getting": "sending", "got": "done",
               "finished": "fetched", "not start": "waiting", "sending params": "taken",
               "complete send": "taken", "calc end": "ended", "getting return": "sending",
               "got return": "done", "claimed": "taken", "starting": "taken"}
LOOK_AGAIN = 1                                         # seconds between two looks of --watch


def state_cell(word, status=""):
    """A state in a list: its sign and its word in the reader's language."""
    failed = status == "abnormal" and word in ("got", "got return")
    word = "abnormal" if failed else STATE_WORDS.get(word, word)
    return "%s %s" % (STATES.get(word, " "), _(word))


def width_of(text):
    """How many columns of a terminal a text takes."""
    if len(text) == len(utf8(text)):
        return len(text)
    from unicodedata import combining, east_asian_width
    return sum(0 if combining(char) else 1 + (east_asian_width(char) in "WF") for char in text)


def fitted(text, width):
    """As much of a text as fits into so many columns."""
    while width_of(text) > width:
        text = text[:max(0, len(text) - max(1, (width_of(text) - width) // 2))]
    return text


def coloured(line, state):
    """A line of a terminal with the colour of the state that stands in it as this cell."""
    colour = COLOURS.get(state[:1])
    if not colour or os.environ.get("NO_COLOR"):
        return line
    return line.replace(state, "\x1b[%sm%s\x1b[0m" % (colour, state), 1)


def table_lines(rows, columns, terminal=0):
    """Rows (dicts) as lines. terminal: its width; 0 where it is none."""
    table = [[printable("" if row[name] is None else row[name]) for name in columns] for row in rows]
    widths = [max(map(width_of, column)) for column in zip(columns, *table)]
    lines = []
    for row, cells in zip([{}] + rows, [columns] + table):
        padded = (cell + " " * (width - width_of(cell)) for cell, width in zip(cells, widths))
        line = "  ".join(padded).rstrip()
        lines.append(coloured(fitted(line, terminal), row.get("state", "")) if terminal else line)
    return lines


def show_list(options, pictures, lines_of):
    """Prints the first of pictures (an iterator of lists of rows), as JSON or as lines_of(rows, width of the
    terminal, 0 where it is none). --watch: each as it comes, on a terminal in place, elsewhere the lines that
    are new, until Ctrl+C."""
    terminal, before = sys.stdout.isatty() and os.environ.get("TERM") != "dumb", []
    try:
        for rows in pictures:
            import shutil
            size = shutil.get_terminal_size()          # COLUMNS and LINES count
            width = terminal and (size.columns if options.watch else 1 << 20)
            lines = [json_of(rows)] if options.json else lines_of(rows, width)
            if terminal and options.watch:
                shown_lines = "".join(line + "\x1b[K\n" for line in lines[:size.lines - 1])
                print("\x1b[H%s\x1b[J" % shown_lines, end="", flush=True)
            else:
                print("".join(line + "\n" for line in lines if line not in before), end="", flush=True)
            before = set(lines)
            if not options.watch:
                return
    except KeyboardInterrupt:
        if not options.watch:
            raise


def looks(look):
    """An iterator for show_list(): what look() finds, again and again."""
    while True:
        yield look()
        time.sleep(LOOK_AGAIN)
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


# ==== tables ====
# What stands here needs what is above at import.
OPTIONS = {
    "--once": dict(action="store_true", help="works off what is there, and ends (cron); unit: for a timer"),
    "--drain": dict(action="store_true", help="takes nothing new, ends when all that is here is delivered"),
    "--jobs": dict(type=number_from(1, 999), metavar="N", help="so many at once, instead of the ini's jobs"),
    "--idle-exit": dict(type=seconds, metavar="SECONDS", help="ends after so long without work"),
    "--upgrade": dict(action="store_true", help="only at what another version has left here"),
    "--param": dict(default="", metavar="TEXT",
                    help="parameters of the command, where the external computer allows them"),
    "--out": dict(nargs="+", action="append", default=[], metavar="RESULT", help="what it is to make"),
    "--index": dict(metavar="INDEX", help="the index that is made, of mode 0600"),
    "--but": dict(nargs="+", action="append", default=[], metavar="SAMPLE",
                  help="files that may leave: what is in them, too, is left out of the index"),
    "--watch": dict(action="store_true", help="again and again, in place on a terminal, until Ctrl+C"),
    "--all": dict(action="store_true", help="no line is left out"),
    "--unseen": dict(action="store_true", help="also if nobody has looked at it with `show`"),
    "--reason": dict(metavar="TEXT", help="why; it stays on this host"),
    "--witness": dict(default="", metavar="HEAD", help="NUMBER.SUM, or a file that holds such"),
    "--since": dict(default="", metavar="TIME", help="12h, 7d, or a date like 2026-11-20"),
    "--csv": dict(action="store_true", help="for a spreadsheet"),
    "--timer": dict(action="store_true", help="the timer for it: now and then instead of always"),
    "--cloud-init": dict(action="store_true", help="what a machine made on demand needs")}
SUBCOMMANDS = {
    "poll": (cmd_poll, "",
             "Takes calculations from the relay, runs them, delivers their results, until it is stopped; what"
             " runs then runs on.",
             "poll --once", "--once --drain --jobs --idle-exit"),
    "list": (on_what_is_here, "",
             "What is or was on this host: id, state, age, command; then how the poller stands.",
             "list --watch", "--watch"),
    "show": (on_what_is_here, "ID",
             "All about one calculation: order, journal, directories; of one that is held for a person what"
             " is held, and why, with nothing in it that hides. Of the ID the first eight characters do.",
             "show d6d9c05a", "--all"),
    "release": (on_what_is_here, "ID",
                "What is held for a person leaves, if it is what was held, and was shown.",
                "release d6d9c05a", "--unseen"),
    "refuse": (on_what_is_here, "ID",
               "What is held for a person stays here, as what a rule refuses; the reason, too.",
               "refuse d6d9c05a --reason 'holds the curve'", "--reason"),
    "explain": (on_what_is_here, "ID",
                "Why a calculation is where it is, as far as this host knows; of one that is not here, why it"
                " is not taken.",
                "explain d6d9c05a", ""),
    "pause": (on_what_is_here, "",
              "Takes nothing new until `resume`, also after a restart; what runs goes on and is delivered.",
              "pause", ""),
    "resume": (on_what_is_here, "",
               "Takes new calculations again after `pause`.",
               "resume", ""),
    "outbox": (on_what_is_here, "",
               "Results that wait for a person, or for their delivery: since when, why, when they are tried"
               " again.",
               "outbox", ""),
    "metrics": (on_what_is_here, "",
                "What is here in figures, for node_exporter's textfile collector.",
                "metrics >mi_poller.prom", ""),
    "resend": (cmd_resend, "ID",
               "Tries now to deliver a result that waits here, or one that the relay wants once more.",
               "resend d6d9c05a", ""),
    "check": (cmd_check, "",
              "Looks at this host and the way to the relay, and changes nothing: OK, WARN or FAIL, and what"
              " to do.",
              "check", "--upgrade"),
    "try": (cmd_try, "COMMAND [FILE...]",
            "Runs COMMAND (its word on the wire) of this host's list on files of this host, as for a"
            " calculation, without a relay: its argument vector and directory, how it ends, what would leave,"
            " what would stay and by which rule. FILE is FILE, NAME=PATH, or DIR/.",
            "try fatigue_life steel.json loads.csv --param '12 fine'", "--param --out"),
    "scan": (cmd_scan, "FILE...",
             "What [outbound] says of files (or of all below a directory): would they leave, be held, or"
             " stay, by which rule. --index INDEX: makes an index of these secret files for deny_pieces.",
             "scan --index /etc/mi_distcomp/steel.pieces steel.csv", "--index --but"),
    "what-leaves": (cmd_what_leaves, "WHAT",
                    "The same for all that a calculation (WHAT: its ID) was asked for, as if it ended now if"
                    " it runs, or for a directory (WHAT).",
                    "what-leaves d6d9c05a", ""),
    "hello": (cmd_hello, "SITE",
              "For trying, as a command of the ini: reads the inputs, says their names, sizes and sums, and"
              " makes hello.txt of it.",
              "hello u-tokyo", ""),
    "bundle": (cmd_bundle, "FILE",
               "Packs what support needs into FILE (tar.gz): versions, check, the ini without secrets, the"
               " end of the log, the calculations. A secret that this host knows keeps it from being"
               " written.",
               "bundle support.tar.gz", ""),
    "audit verify": (cmd_audit, "",
                     "Is the audit log whole? With what a witness has seen of it (a head, or a file with"
                     " some, as the relay's `witness` prints) also its end. 0: whole, 76: changed, 65: cut"
                     " off, 66: there is none, 74: unreadable.",
                     "audit verify --witness heads.txt", "--witness"),
    "audit report": (cmd_audit, "",
                     "What left this host: when, whither, by which rules, released by whom; what was refused"
                     " or held; changes of rules, keys and clock.",
                     "audit report --since 30d", "--since --csv"),
    "unit": (cmd_unit, "",
             "Prints a systemd unit for this user and this ini.",
             "unit >mi_system_remote.service", "--once --timer --cloud-init"),
    "enroll": (cmd_enroll, "",
               "Exchanges a kit's one-use code for a token in token_file: that of a file token_file.code, or"
               " one that it asks for. (The first `poll` does it by itself.)",
               "enroll", ""),
    "login": (cmd_login, "[USER]",
              "Asks for the password (relays with auth = login), and keeps the token in token_file.",
              "login suzuki", "")}
INI_KEYS = {                   # {section: {key: (kind, default, meaning)}}: what the shipped ini says of it
    "poller": {
        "site": (str, "", "this computer's id at the relay"),
        "url": (str, "", "of the relay, like https://HOST:50443"),
        "token_file": (str, "", "mode 0600, one line"),
        "ca_file": (str, "", "an extra CA beside the system's"),
        "client_cert": (str, "", "where relay or gateway want one"),
        "client_key": (str, "", "its key"),
        "proxy": (str, "",
                  "default: https_proxy or all_proxy of the environment, unless no_proxy names the relay"),
        "calc_base": (str, "", "default: ~/.local/state/mi_distcomp"),
        "jobs": (number_from(1, 1000), 1, "calculations at once"),
        "retry": (retry_of, None,
                  "COUNT,INTERVAL: the process ends after so many failures; default: for ever"),
        "keep_free": (share, 0.05, "with less, nothing new is taken"),
        "keep_workdirs": (seconds, 30 * 86400.0,
                          "working directories of delivered calculations; earlier, oldest first, when"
                          " less than keep_free is free"),
        "logfile": (str, "", "default: standard error"),
        "lang": (one_of("auto", "en", "ja"), "auto", "en, ja"),
        "hours": (hours_of, [],
                  "when new calculations are taken, local time: 22-6, or Mon-Fri 20:30-6:00, Sat-Sun"
                  " 0-24; default: always"),
        "paused": (flag, False, "yes: nothing new is taken; `pause` and `resume` do it without a restart"),
        "lanes": (lanes_of, 0,
                  "connections at once for large files; auto: several over a distance, else one"),
        "poll": (seconds, 30.0, "how often a fielded relay is asked; ours is waited at"),
        "idle_exit": (seconds, 0.0, "seconds without work after which it ends with 0; 0: never"),
        "output": (flag, True,
                   "what a running command writes goes ahead of the results; never with rules about"
                   " content in [outbound]"),
        "tell": (flag, True,
                 "the relay is told whether work is taken, or why not: see the head of"
                 " mi_system_remote.py")}}
INI_KEYS["poller"].update(order_keys())
INI_KEYS.update(dict(gate_keys(), **signer_keys()))
# at SIGHUP
AT_RELOAD = tuple(order_keys()) + (
             "paused", "hours", "jobs", "retry", "idle_exit", "poll", "keep_free", "keep_workdirs", "output",
             "tell", "logfile", "lang", "lanes")


# exit codes of a `try` that ended without its command's, by the first word of the reason
TRIED_CODES = {"refused": EX_REFUSED, "disk": EX_IOERR, "cancelled": EX_INTERRUPT}

# Why a calculation is where it is, as this host knows it: looked for in this order. As the relay's, of which
# those of one code mean the same.
Cause = collections.namedtuple("Cause", "code who text command changes holds since")
RESEND, POLL = PROGRAM + ".py resend %(id)s", PROGRAM + ".py poll"
WHEN_OVER = "it is taken when that is over"
QUIET_AFTER = 600              # seconds without output that are worth a word
CAUSES = [
    Cause("delivered", "nobody", "its result was delivered to the relay", "", "",
          lambda h: h.state == "delivered", "taken"),
    Cause("kept", "admin", "the relay does not want its result: %(why)s", RESEND, "resend tries it once more",
          lambda h: h.state == "kept", "ended"),
    Cause("held", "admin", "its result is held for a person on this host", PROGRAM + ".py show %(id)s",
          "release lets it out, refuse keeps it here", lambda h: h.state == "held", "held"),
    Cause("not-running", "admin", "no poller runs here: nothing is taken or delivered", POLL,
          "a poller that is started here", Here.is_away, ""),
    Cause("undelivered", "admin", "its result waits here to be delivered: %(why)s", RESEND,
          "resend tries it at once", lambda h: h.state == "undelivered", "ended"),
    Cause("queued", "admin", "the batch system has not begun it: %(what)s", PROGRAM + ".py show %(id)s",
          "what its batch system waits for", lambda h: h.state == "queued", "started"),
    Cause("quiet", "starter", "its command runs, but has written nothing for a while",
          "mi_system_wf.py output %(id)s", "its end, or cancel",
          lambda h: h.state == "running" and time.time() - h.last_output() > QUIET_AFTER, "output"),
    Cause("running", "nobody", "its command runs", "", "its end", lambda h: h.state == "running", "started"),
    Cause("taken", "nobody", "it was taken, and is about to run", "", "it goes on by itself",
          lambda h: bool(h.calc), "taken"),
    Cause("paused", "admin", "it is not here, and this poller is paused", PROGRAM + ".py resume", WHEN_OVER,
          Here.is_marked, ""),
    Cause("paused", "admin", "it is not here, and [poller] paused = yes", "paused = no", WHEN_OVER,
          lambda h: h.keys["paused"], ""),
    Cause("hours", "nobody", "it is not here, and this poller is outside of its hours", "", WHEN_OVER,
          lambda h: not within_hours(h.keys["hours"], time.localtime()), ""),
    Cause("disk", "admin", "it is not here, and less than keep_free is free", PROGRAM + ".py check",
          WHEN_OVER, Here.lacks_room, ""),
    Cause("too-large", "admin", "it is not here: its inputs need more room than there is", PROGRAM
          + ".py check", WHEN_OVER, lambda h: h.large, ""),
    Cause("busy", "nobody", "it is not here, and %(busy)s of %(jobs)s calculations take their turn", "",
          WHEN_OVER, lambda h: h.busy >= h.jobs, ""),
    Cause("not-here", "starter", "it is not here, and this poller takes work: the relay has not handed it out"
          " to it, or it was removed here", "mi_system_wf.py explain %(id)s", "", lambda h: True, "")]


# ==== texts of units ====
UNIT = """# %(where)s   (systemd; read it, change what is not so at your site, then: systemctl enable --now %(name)s)
[Unit]
Description=Poller of distributed calculations (%(script)s)
After=network-online.target
Wants=network-online.target
%(after)s
[Service]
User=%(user)s
%(start)s
# The command is detached: it outlives the poller, and the next start picks it up. systemd must not end it, nor take its /tmp away.
KillMode=process
PrivateTmp=no
OOMPolicy=continue
# What is below holds for the command too. Whatever a solver may need stays open: home and scratch directories, network, devices,
# memory that is written and executed (just-in-time compilers), binding of threads to cores. For containers (apptainer ...) remove
# RestrictNamespaces, NoNewPrivileges, RestrictSUIDSGID and SystemCallFilter.
ProtectSystem=full
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictSUIDSGID=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service @pkey
SystemCallErrorNumber=EPERM
%(install)s"""
NO_SETUID_LINES = re.compile(r"^(NoNewPrivileges|CapabilityBoundingSet|AmbientCapabilities|Restrict\w+|SystemCall\w+|ProtectClock|ProtectHostname"
                    r"|ProtectKernel\w+)=.*\n", re.M)  # what takes setuid away, or implies that where there is a User=
WHY_OPEN = """# (The batch system's programs need a setuid one, pbs_iff: NoNewPrivileges, CapabilityBoundingSet and all that implies the former are
# left out.)
"""
UNIT_SERVICE = """ExecStart=%(program)s
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=10
RestartPreventExitStatus=64 77 78
TimeoutStopSec=30"""
UNIT_ONCE = """Type=oneshot
ExecStart=%(program)s --once
TimeoutStartSec=infinity"""
UNIT_TIMER = """\
# /etc/systemd/system/mi_system_remote.timer   (beside the service of `unit --once`; then: systemctl enable --now mi_system_remote.timer)
[Unit]
Description=Asks for distributed calculations now and then

[Timer]
OnBootSec=1min
OnUnitInactiveSec=1min
RandomizedDelaySec=10s

[Install]
WantedBy=timers.target
"""
UNIT_CLOUD = """#cloud-config
# A machine that is made on demand: it works off what waits, and switches itself off when there was nothing to do for %(idle)s seconds.
# Put script, ini, token (mode 0600) and the commands into the image, or write them here with write_files.
users:
  - name: %(user)s
    system: true
    homedir: /var/lib/mi_distcomp
write_files:
  - path: /etc/systemd/system/mi_system_remote.service
    permissions: '0644'
    content: |
%(unit)s
runcmd:
  - [install, -d, -o, %(user)s, -m, '0700', /var/lib/mi_distcomp]
  - [systemctl, daemon-reload]
  - [systemctl, enable, --now, mi_system_remote.service]
"""
UNIT_ON_DEMAND = """ExecStart=%(program)s --idle-exit 600
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=64 77 78
TimeoutStopSec=30"""
UNIT_AFTER = """# Ended in order (nothing to do, or stopped by hand): the machine goes off. After a failure it stays, and what it holds is not lost.
SuccessAction=poweroff
"""


# ==== Japanese ====
JA = {                         # what a person reads, in Japanese
    "%s: ends with number %d":
        "%s: 最後は %d 番です",
    "what was held has changed: held anew":
        "保留中のものが変わったため、保留し直しました",
    "is not auto or a number from 1 to %d": "auto または 1 から %d の数ではありません",
    "1 lane (%s)": "接続 1 本 (%s)",
    "%d lanes": "接続 %d 本",
    "%d lanes, packed": "接続 %d 本、圧縮",
    "little": "小さい",
    "near": "近い",
    "old relay": "旧版の中継サーバー",
    "small bodies": "途中で大きな本文が通らない",
    "too much": "大きすぎる",
    "%s: held for a person": "%s: 担当者の公開承認を待っています",
    "said; the running poller goes on with it now": "記録しました。動作中のポーリングプログラムが今続けます",
    "said; it goes on as soon as a poller runs": "記録しました。ポーリングプログラムが動き次第続きます",
    "its result is held for a person on this host": "結果はこの計算機で担当者の公開承認を待っています",
    "release lets it out, refuse keeps it here": "release で送られ、refuse でここに残ります",
    "All about one calculation: order, journal, directories; of one that is held for a person what is held,"
    " and why, with nothing in it that hides. Of the ID the first eight characters do.":
        "一つの計算のすべて: 依頼、記録、ディレクトリ。公開承認待ちのものでは、保留した内容とその理由を、見えない文字も見える形で示します。"
        "ID は最初の 8 文字で足ります。",
    "What is held for a person leaves, if it is what was held, and was shown.":
        "公開承認待ちの結果を承認して送ります。保留したときのままで、show で見たものに限ります。",
    "What is held for a person stays here, as what a rule refuses; the reason, too.":
        "公開承認待ちの結果を不承認とし、規則で出せないものと同じくここに残します。理由も外へ出ません。",
    "Results that wait for a person, or for their delivery: since when, why, when they are tried again.":
        "担当者の公開承認、または送付を待っている結果: いつから、なぜ、次にいつ試すか。",
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
    "Is the audit log whole? With what a witness has seen of it (a head, or a file with some, as "
    "the relay's `witness` prints) also its end. 0: whole, 76: changed, 65: cut off, 66: there is "
    "none, 74: unreadable.":
        "監査ログに欠けや書き換えがないか調べます。証人の記録 (末尾の値、または中継の `witness` "
        "が示すものなどのファイル) があれば、末尾が切り取られていないかも調べます。0: 完全、76: "
        "書き換え、65: 切り取り、66: ログなし、74: 読み取れない。",
    "--since: a time ago (12h, 7d) or a date (2026-11-20, 2026-11-20T21:47), not %s":
        "--since: 何時間前・何日前か (12h、7d)、または日付 (2026-11-20、2026-11-20T21:47) "
        "を書いてください。%s は使えません",
    "12h, 7d, or a date like 2026-11-20":
        "12h、7d、または 2026-11-20 のような日付から",
    "for a spreadsheet":
        "表計算ソフト用 (CSV)",
    "%s was not written: in %s stands a secret of this host: %s":
        "%s は書き出していません。%s にこの計算機の秘密が含まれています: %s",
    "%s is there already":
        "%s はすでにあります",
    "%s is written; look at it before you give it away":
        "%s を書き出しました。渡す前に中を確かめてください",
    "Packs what support needs into FILE (tar.gz): versions, check, the ini without secrets,"
    " the end of the log, the calculations. A secret that this host knows keeps it from being written.":
        "サポートに必要なものを FILE (tar.gz) にまとめます: 版、check の結果、秘密を除いた ini、ログの"
        "末尾、計算の一覧。この計算機が知る秘密が含まれる場合は書き出しません。",
    "again and again, in place on a terminal, until Ctrl+C": "Ctrl+C まで繰り返し表示します (端末では同じ場所に)",
    "registered": "入力待ち",
    "waiting": "実行待ち",
    "taken": "入力転送中",
    "queued": "順番待ち",
    "running": "実行中",
    "ended": "結果待ち",
    "sending": "結果転送中",
    "done": "正常終了",
    "abnormal": "異常終了",
    "fetched": "受取済み",
    "held": "公開承認待ち",
    "undelivered": "未送付",
    "delivered": "送付済み",
    "kept": "受取拒否",
    "lost": "打ち切り",
    "out of contact": "連絡途絶",
    "Runs COMMAND (its word on the wire) of this host's list on files of this host, as for a calculation,"
    " without a relay: its argument vector and directory, how it ends, what would leave, what would stay and"
    " by which rule. FILE is FILE, NAME=PATH, or DIR/.":
        "この計算機の一覧にある COMMAND (通信上の語) を、この計算機のファイルで、計算と同じ手順で実行します。中継サーバーは使いません。"
        "引数の並び、ディレクトリ、終わり方、送られるはずのもの、残るものとその規則を示します。FILE は ファイル、名前=パス、ディレクトリ/ です。",
    "parameters of the command, where the external computer allows them":
        "コマンドの引数 (外部計算機が許す場合)",
    "what it is to make": "コマンドが作る結果",
    "inputs: %s": "入力: %s",
    "argument vector: %s": "引数の並び: %s",
    "directory: %s": "ディレクトリ: %s",
    "its output: %s": "コマンドの出力: %s",
    "%s is not a file that can be read": "%s は読めるファイルではありません",
    "the command has no exit code of its own: %s": "コマンド自身の終了コードはありません: %s",
    "the command ended with %d (its own exit code)": "コマンドの終了コードは %d です (コマンド自身のもの)",
    "would leave: %s (%d bytes)": "送られるもの: %s (%d バイト)",
    "would be held for a person: %s (%s)": "担当者の承認まで保留されるもの: %s (%s)",
    "%s: %d pieces, %d bytes; deny_pieces names it": "%s: 断片 %d 個、%d バイト。deny_pieces に書いてください",
    "the index that is made, of mode 0600": "作る索引 (モード 0600)",
    "files that may leave: what is in them, too, is left out of the index":
        "出してよいファイル: その中にもある断片は索引に入れません",
    "What [outbound] says of files (or of all below a directory): would they leave, be held, or stay,"
    " by which rule. --index INDEX: makes an index of these secret files for deny_pieces.":
        "ファイル (ディレクトリならその下すべて) について [outbound] の判定を示します: 出る、保留、残る、その規則。"
        "--index INDEX は、これらの秘密のファイルの索引を deny_pieces 用に作ります。",
    "The same for all that a calculation (WHAT: its ID) was asked for, as if it ended now if it"
    " runs, or for a directory (WHAT).":
        "計算 (WHAT はその ID) に求められたもの全部について同じことを示します。実行中なら今終わったものとします。"
        "WHAT はディレクトリでも構いません。",
    "stays here: %s (%s)": "ここに残るもの: %s (%s)",
    "a workflow would end with 65: what was asked for is not complete":
        "ワークフロー側なら 65 で終わります。求めたものがそろっていません",
    "Why a calculation is where it is, as far as this host knows; of one that is not here, why it is not"
    " taken.":
        "計算がなぜ今の所にあるのかを、この計算機で分かる限り示します。ここにない計算については、受け取らない理由を示します。",
    "its result was delivered to the relay": "結果は中継サーバーに届けました",
    "the relay does not want its result: %(why)s": "中継サーバーは結果を受け取りません: %(why)s",
    "resend tries it once more": "resend でもう一度試します",
    "no poller runs here: nothing is taken or delivered": "ここではポーラーが動いていません。計算の受け取りも結果の送付も行われません",
    "a poller that is started here": "ここでポーラーを起動すれば進みます",
    "its result waits here to be delivered: %(why)s": "結果がここで送付を待っています: %(why)s",
    "resend tries it at once": "resend ですぐに送り直します",
    "the batch system has not begun it: %(what)s": "バッチシステムはまだ開始していません: %(what)s",
    "what its batch system waits for": "バッチシステムが待っているものが満たされれば進みます",
    "its command runs, but has written nothing for a while": "コマンドは実行中ですが、しばらく何も出力していません",
    "its end, or cancel": "終わりを待つか、cancel で止めてください",
    "its command runs": "コマンドを実行中です", "its end": "終わりを待っています",
    "it was taken, and is about to run": "受け取り済みで、まもなく実行します",
    "it goes on by itself": "自動で先へ進みます",
    "it is taken when that is over": "それが終われば受け取ります",
    "it is not here, and this poller is paused": "ここにはありません。このポーラーは受け付けを停止しています",
    "it is not here, and [poller] paused = yes": "ここにはありません。[poller] paused = yes です",
    "it is not here, and this poller is outside of its hours": "ここにはありません。このポーラーは受け付け時間外です",
    "it is not here, and less than keep_free is free": "ここにはありません。空きが keep_free より少なくなっています",
    "it is not here: its inputs need more room than there is": "ここにはありません。入力を置く空きが足りません",
    "it is not here, and %(busy)s of %(jobs)s calculations take their turn":
        "ここにはありません。実行中の計算があります (%(busy)s/%(jobs)s)",
    "it is not here, and this poller takes work: the relay has not handed it out to it, or it was removed"
    " here":
        "ここにはありません。このポーラーは受け付けています。中継サーバーがまだ渡していないか、ここで削除されました",
    "the relay's operator": "中継サーバーの運用者", "who has started it": "この計算を始めた人",
    "the admin of the external computer": "外部計算機の管理者", "nobody": "だれも何もしなくてよい",
    ", since %s": "。%s から", "who has to act: %s": "対応する人: %s", "until: %s": "予定: %s まで",
    "%(count)s calculations wait for site %(site)s; try again later":
        "%(count)s 件の計算がサイト %(site)s を待っています。後でもう一度実行してください",
    "user %(user)s has %(count)s unfinished calculations; try again later":
        "利用者 %(user)s の終わっていない計算が %(count)s 件あります。後でもう一度実行してください",
    "user %(user)s holds %(count)s bytes; try again later":
        "利用者 %(user)s のファイルが %(count)s バイトに達しています。後でもう一度実行してください",
    "too many failed log-ins; try again in %(count)s s":
        "ログインの失敗が多すぎます。%(count)s 秒後にもう一度実行してください",
    "user %(user)s asks for much work; try again later":
        "利用者 %(user)s の要求が多すぎます。後でもう一度実行してください",
    "maintenance: %(reason)s; try again later": "保守中: %(reason)s。後でもう一度実行してください",
    "the relay was restored from a backup and takes stock; try again later":
        "中継サーバーは控えから復元され、各ポーラーに確認中です。後でもう一度実行してください",
    "the relay's disk has no room for %(count)s bytes; try again later":
        "中継サーバーのディスクに %(count)s バイトの空きがありません。後でもう一度実行してください",
    "%(name)s: %(count)s bytes are over the relay's limit of %(most)s ([limits] max_file)":
        "%(name)s: %(count)s バイトは中継サーバーの上限 %(most)s を超えています ([limits] max_file)",
    "more than %(most)s files ([limits] max_files)":
        "ファイルが %(most)s 個を超えています ([limits] max_files)",
    "a body of %(count)s bytes; at most %(most)s": "本文が %(count)s バイトあります。上限は %(most)s です",
    "command %(name)s is not in the list of site %(site)s":
        "コマンド %(name)s はサイト %(site)s の一覧にありません",
    "user %(user)s may not use site %(site)s": "利用者 %(user)s はサイト %(site)s を使えません",
    "this token is not for site %(name)s, only for %(sites)s":
        "このトークンはサイト %(name)s には使えません。使えるのは %(sites)s だけです",
    "no token": "トークンがありません", "unknown token": "知らないトークンです",
    "expired %(day)s": "%(day)s に期限が切れました", "role %(role)s needed": "役割 %(role)s が必要です",
    "user or password is wrong": "利用者名かパスワードが違います",
    "request_id %(name)s was used for another calculation":
        "request_id %(name)s は別の計算に使われています",
    "another claim is in force (superseded)": "別の割り当てが有効です (この割り当ては無効になりました)",
    "the result is not there yet": "結果はまだありません", "it has ended already": "すでに終わっています",
    "a fielded poller holds it and cannot be told to stop":
        "従来のポーリングプログラムが持っているため、中止を伝えられません",
    "it ended well; have another one run (run or submit, with a --request-id of its own)":
        "正常に終わっています。別の計算として実行してください (run か submit に別の --request-id を付けて)",
    "its result was fetched already, and its inputs may be gone; have another one run (run or submit, with a"
    " --request-id of its own)":
        "結果は受取済みで、入力は残っていないことがあります。別の計算として実行してください (run か submit に"
        "別の --request-id を付けて)",
    "it has not run yet": "まだ実行されていません",
    "it has not ended: cancel it first; one that is out of contact needs --force and a --reason":
        "まだ終わっていません。先に cancel してください。連絡途絶のものには --force と --reason が必要です",
    "how long yet: %s": "あとどのくらいか: %s",
    "what changes it: %s": "変わる条件: %s", "seen %d s ago": "%d 秒前の情報です",
    "the configuration file, instead of the one that is found": "設定ファイル (ini)。指定しなければ、見つかったものを使います",
    "what is found, as JSON": "結果を JSON で表示します",
    "failures only": "失敗だけを表示します",
    "a log line for each step": "段階ごとにログを一行表示します",
    "version, protocol, sha256 of this file and of its blocks": "版、通信規約、このファイルとブロックの sha256",
    "what a word does, and an example": "語の説明と例",
    "for every word:": "すべての語に:",
    "argument %(argument_name)s: %(message)s": "引数 %(argument_name)s: %(message)s",
    "expected one argument": "値が必要です",
    "expected at least one argument": "値が一つ以上必要です",
    "invalid choice: %(value)r (choose from %(choices)s)": "%(value)r は選べません (選べるもの: %(choices)s)",
    "ignored explicit argument %r": "値 %r は取りません",
    "%s; --help says more": "%s (--help を参照)",
    " (a value that begins with - is written with =, as in %s=--fine)":
        " (- で始まる値は %s=--fine のように = でつないでください)",
    "unknown option %s%s; --help says more": "オプション %s はありません%s。--help を見てください",
    "one of these words must come first: %s%s; --help says more": "最初の語は次のいずれかです: %s%s。--help を見てください",
    "%s needs %s; --help says more": "%s には %s が必要です。--help を見てください",
    " and ": " と ",
    "what is %s? It must be: %s; --help says more": "%s は何ですか。正しい形: %s (--help を参照)",
    "%s is no option of %s; it must be: %s; --help says more":
        "%s は %s のオプションではありません。正しい形: %s (--help を参照)",
    "works off what is there, and ends (cron); unit: for a timer": "今あるものを片付けて終わります (cron)。unit では: タイマー用",
    "takes nothing new, ends when all that is here is delivered": "新しい計算を受け取らず、ここにあるものをすべて届けたら終わります",
    "What is here in figures, for node_exporter's textfile collector.":
        "ここの状態を数値で表示します (node_exporter の textfile コレクター用)。",
    "so many at once, instead of the ini's jobs": "同時に実行する数 (ini の jobs の代わり)",
    "ends after so long without work": "仕事のないままこの時間がたつと終わります",
    "only at what another version has left here": "ほかの版がここに残したものだけを調べます",
    "the timer for it: now and then instead of always": "そのタイマー: 常にではなく、時々動かします",
    "what a machine made on demand needs": "必要な時だけ作る計算機に要るもの",
    "Takes calculations from the relay, runs them, delivers their results, until it is stopped; what"
    " runs then runs on.":
        "止められるまで、中継サーバーから計算を受け取って実行し、結果を届けます。そのとき実行中のものは動き続けます。",
    "Looks at this host and the way to the relay, and changes nothing: OK, WARN or FAIL, and what to do.":
        "この計算機と中継サーバーまでの経路を調べ、OK・WARN・FAIL と、するべきことを示します。何も変更しません。",
    "Prints a systemd unit for this user and this ini.": "このユーザーとこの ini の systemd ユニットを出力します。",
    "was written by a newer version of this program": "より新しい版のプログラムが書いたものです",
    "%s: left alone (%s); an older or newer version may read it; else remove it there: %s":
        "%s: 読めないため、そのまま残します (%s)。旧版か新版で読めることがあります。不要なら削除してください: %s",
    "%s: %d unfinished calculations of an older version go on": "%s: 旧版の未完了の計算 %d 件は、そのまま続行できます",
    "%s: nothing unfinished of another version": "%s: 別の版の未完了の計算はありません",
    # check
    "%s: belongs to uid %d; give it to this user (chown)": "%s: uid %d の所有です。このユーザーのものにしてください (chown)",
    "%s: mode %04o lets others in; type: chmod %o %s": "%s: モード %04o では他人が触れます。chmod %o %s としてください",
    "%s: mode %04o, owner uid %d": "%s: モード %04o、所有者 uid %d",
    "%s: %.1f GB free on %s (%s)": "%s: 空き %.1f GB、%s (%s)",
    "; less than the %.1f GB that are to stay free: make room": "。残すべき %.1f GB より少なくなっています。空きを作ってください",
    "%s: in memory (%s): a reboot empties it, and what was not delivered is lost; use a directory on a disk":
        "%s: メモリ上 (%s) です。再起動で消え、未送信のものが失われます。ディスク上のディレクトリにしてください",
    "%s: on a network file system (%s); use a local disk": "%s: ネットワークファイルシステム (%s) です。ローカルディスクにしてください",
    "%s: old files are removed there (%s); use another directory, or except this one":
        "%s: 古いファイルが自動で消されます (%s)。別の場所にするか、対象から外してください",
    "%s: mounted noexec: a command that is built or copied there does not run":
        "%s: noexec でマウントされています。そこに置いたコマンドは動きません",
    "open files: limit %s, wanted %d": "開けるファイル数: 上限 %s、必要 %d",
    "open files: limit %s, wanted %d; raise it (LimitNOFILE in the unit, or ulimit -n)":
        "開けるファイル数: 上限 %s、必要 %d。上げてください (unit の LimitNOFILE、または ulimit -n)",
    "%s: certificate of %s, issued by %s, %d days left": "%s: %s の証明書、発行者 %s、残り %d 日",
    "; it is not valid yet: is a clock wrong?": "。まだ有効期間の前です。時計が狂っていませんか",
    "; renew it": "。更新してください",
    "running as root; better as a user of its own": "root で動いています。専用のユーザーにしてください",
    "the certificate is believed (%s)": "証明書は信頼できます (%s)",
    "the system's CAs": "システムの CA",
    "no_auth: the certificate is not checked": "no_auth: 証明書を確認しません",
    "%s; if it was issued by the right CA, give that CA's file with ca_file":
        "%s。正しい CA の発行なら、その CA のファイルを ca_file に指定してください",
    "proxy: %s": "プロキシ: %s",
    "none": "なし",
    "%s: the name is not known here (DNS); is the URL right?": "%s: 名前を解決できません (DNS)。URL は正しいですか",
    "%s: plain http: whoever is in between reads the token": "%s: 平文の http です。途中でトークンが読めます",
    "a relay of this protocol answers": "この方式の中継サーバーが応答しました",
    "a fielded relay answers, or something that is none; is the URL right?":
        "旧版の中継サーバーか、別のものが応答しました。URL は正しいですか",
    "the clocks differ by %.1f s": "時計の差 %.1f 秒",
    "; set this host's (NTP)": "。この計算機の時計を合わせてください (NTP)",
    "the token is refused (%s): get a valid one for this user, role and site":
        "トークンが拒否されました (%s)。このユーザー・役割・識別子に有効なものを入手してください",
    "the relay takes this token": "トークンは有効です",
    "something in between does not let through: %s; ask the gateway's operator":
        "途中で通らないものがあります: %s。ゲートウェイの管理者に相談してください",
    "all %d calls of this side get through": "こちら側の呼び出し %d 種がすべて通ります",
    "user: ": "ユーザー名: ",
    "login needs USER, and token_file to keep the token in": "login には USER と、トークンを保存する token_file が必要です",
    "password of %s at %s: ": "%s のパスワード (%s): ",
    "%s: token of %s, good until %s": "%s: %s のトークン、期限 %s",
    "%s: the relay says: %s": "%s: 中継サーバーの応答: %s",
    "[%s] %s may run (%s on the wire)": "[%s] %s は実行できます (依頼時の名前 %s)",
    "an argument is not UTF-8": "引数が UTF-8 ではありません",
    "interrupted": "中断されました",
    "a bug (%s in line %d: %s); please report this line, -v shows more":
        "プログラムの不具合です (%s、%d 行目: %s)。この行をお知らせください。-v で詳細を表示します",
    "is not a time (like 90s, 5m, 2h, 30d)": "時間ではありません (例: 90s, 5m, 2h, 30d)",
    "is not a size (like 64K, 16M, 2G)": "サイズではありません (例: 64K, 16M, 2G)",
    "is not yes or no": "yes か no ではありません",
    "is not a whole number": "整数ではありません",
    "is not one of: %s": "次のいずれかではありません: %s",
    "%s: no such file (--ini)": "%s: ファイルがありません (--ini)",
    " (did you mean %s?)": " (%s のことですか?)",
    " (it belongs into %s)": " (%s に書くものです)",
    "%s: must belong to you or root, and nobody else may write to it (chown, chmod go-w; or"
    " run this as its owner)":
        "%s: 所有者は実行ユーザーか root とし、ほかの人が書き込めないようにしてください (chown, chmod go-w。または所有者として実行)",
    "more than %d patterns; a directory (DIR/) or ** stands for many":
        "パターンが %d 個を超えています。ディレクトリ (DIR/) や ** で多くの名前を一度に指定できます",
    "no %s in %s; say --ini FILE": "%s が %s にありません。--ini FILE で指定してください",
    "%s: [%s] is not a section%s": "%s: [%s] というセクションはありません%s",
    "%s: [%s] %s is not a key%s": "%s: [%s] %s というキーはありません%s",
    "an empty name": "名前が空です",
    "a name that is not UTF-8": "名前が UTF-8 ではありません",
    "a name that is too long: %s...": "名前が長すぎます: %s...",
    "a name with a control character or a backslash: %s": "名前に制御文字かバックスラッシュがあります: %s",
    "a name that is absolute or has an empty, . or .. part: %s": "名前が絶対パスか、空・.・.. を含みます: %s",
    "two names that are equal, one in the other, or out of order: %s": "名前が重複するか、包含するか、順序が違います: %s",
    "a name that is kept for the log: %s": "ログのための名前は使えません: %s",
    "%s: not a URL of a relay (like https://HOST:50443)": "%s: 中継サーバーの URL ではありません (例: https://HOST:50443)",
    "%s: unusable certificate file: %s": "%s: 証明書ファイルが使えません: %s",
    "%s: the proxy must be given as http://[USER:PASSWORD@]HOST:PORT":
        "%s: プロキシは http://[USER:PASSWORD@]HOST:PORT の形で指定してください",
    " through the proxy %s:%d (%s)": " (プロキシ %s:%d 経由、指定元 %s)",
    "%s: the certificate is for other names: %s": "%s: 証明書は別の名前のものです: %s",
    "%s: TLS failed: %s": "%s: TLS 接続に失敗しました: %s",
    "%s: the name %s is not known": "%s: ホスト名 %s が見つかりません",
    "%s: an answer without end": "%s: 応答が終わりません",
    "%s: HTTP 413: too large": "%s: HTTP 413: 大きすぎます",
    "%s: HTTP %d without the relay's JSON: a proxy or gateway in between answered":
        "%s: HTTP %d、中継サーバーの JSON ではありません (途中のプロキシかゲートウェイの応答です)",
    "an answer that is none": "応答の形が正しくありません",
    "cut off": "途中で切断されました",
    "%s: the relay is at byte %s of a file of %d": "%s: 中継サーバーは %s バイト目と答えました (ファイルは %d バイト)",
    "is not what was declared (its sum differs)": "申告した内容と違います (チェックサムの不一致)",
    "%s: the relay stays at byte %d of %d": "%s: 中継サーバーが %d バイト目 (全 %d バイト) から進みません",
    "%s changed while it was sent": "%s が送信中に変わりました",
    "the file list is none": "ファイル一覧の形が正しくありません",
    "%s: no size or sha256": "%s: サイズまたは sha256 がありません",
    "the pages of the file list do not follow one another": "ファイル一覧のページがつながりません",
    "%s: HTTP %d where a file was due": "%s: HTTP %d (ファイルが返るはずでした)",
    "%s: %d bytes where %d were due": "%s: %d バイト届きました (正しくは %d バイト)",
    "does not arrive as it was sent (its sum differs, three times)": "送られたとおりに届きません (チェックサムが 3 回とも不一致)",
    "%s does not arrive as it was sent (its sum differs, three times)":
        "%s が送られたとおりに届きません (チェックサムが 3 回とも不一致)",
    "%s: arrived other than it was sent": "%s: 送られたものと違う内容が届きました",
    "%s: the relay's pack does not match its file list": "%s: 中継サーバーの送信内容がファイル一覧と合いません",
    "became shorter while it was sent": "送信中に短くなりました",
    "is not a number from %d to %d": "%d から %d までの数ではありません",
    "is not COUNT,INTERVAL (like 5,60)": "「回数,間隔」ではありません (例: 5,60)",
    "is not a list of sha256 sums (64 hexadecimal digits each)": "sha256 (それぞれ 16 進 64 桁) の一覧ではありません",
    "is not NAME OPTION-WITH-{} EXPRESSION: %s": "「名前 {}を含むオプション 正規表現」ではありません: %s",
    "the default does not match the expression: %s": "既定値が正規表現に合いません: %s",
    "%s: not found in PATH: the batch system's own programs are needed on this host (env.PATH of its"
    " section in the ini; for ssh without a guard: `module load`, or PATH, at the top of ~/.bashrc there)":
        "%s: PATH に見つかりません。バッチシステムのコマンドがこの計算機に必要です (ini のそのセクションの env.PATH、guard なしの SSH では先方の ~/.bashrc"
        " の先頭で module load または PATH を指定してください)",
    "%s: one job that runs one command, and a submission that returns at once: nothing else can be used":
        "%s: 使えません。一つのコマンドを一度実行する一つのジョブで、投入がすぐに戻るものに限ります",
    "[%s] %s does not answer: %s": "[%s] %s が応答しません: %s",
    "[%s] %s answers": "[%s] %s は応答しています",
    "[%s] %s answers here, but not to a poller with NoNewPrivileges in its unit: print that anew with"
    " `unit`, or take this and what implies it out of it (%s)":
        "[%s] %s はここでは応答しますが、ユニットに NoNewPrivileges があるポーリングには応答しません。unit で出力し直すか、これとこれを伴う設定を外してください (%s)",
    "batch.%s may not be %s here": "batch.%s をここで %s にはできません",
    "batch.%s may not be set here": "batch.%s はここでは指定できません",
    "which cluster it is, every program must know: env.SLURM_CLUSTERS = NAME, no --clusters":
        "どのクラスタかは全プログラムが知る必要があります。--clusters ではなく env.SLURM_CLUSTERS = NAME とします",
    "a line break in an argument or a variable": "引数か変数に改行があります",
    "the first line must be the absolute path of a program": "1 行目はプログラムの絶対パスとしてください",
    "%s: its first line ends with CR LF, so that the system finds no such interpreter (sed -i 's/\\r$//' %s)":
        "%s: 1 行目が CR LF で終わっているため、インタプリタが見つかりません (sed -i 's/\\r$//' %s)",
    "%s: must be an executable file that not everybody may change (chmod +x, chmod o-w)":
        "%s: 実行可能で、誰でも書き換えられる状態にないファイルが必要です (chmod +x, chmod o-w)",
    "must be argument.1, argument.2, ... or env.NAME_OF_A_VARIABLE":
        "argument.1, argument.2, ... または env.変数名 としてください",
    "%s: [%s] match: another command has it already": "%s: [%s] match: 別のコマンドが同じ語を使っています",
    "%s allows no command on this host; add for each:  [command NAME]  argv = /PATH/OF/PROGRAM  match ="
    " WORD ON THE WIRE":
        "%s はこの計算機でのコマンドを許可していません。次を加えてください:  [command 名前]  argv = /プログラムの/絶対パス  match = ワークフロー側の語",
    "too many inputs, or one with a log's name": "入力が多すぎるか、ログと同じ名前の入力があります",
    "%s: no answer %d times in a row; %d calculation(s) stay here for the next start":
        "%s: %d 回続けて応答がありません。%d 件の計算はここに残り、次の起動時に続きます",
    "given back: %s": "返却しました: %s",
    "%s: less than keep_free is free": "%s: 空き容量が keep_free を下回っています",
    "%s: the token is refused (%s): get a valid one, role remote, for this site":
        "%s: トークンが拒否されました (%s): この識別子に有効な、role が remote のトークンを入手してください",
    "%s: belongs to somebody else": "%s: 所有者が他の利用者です",
    "%s: others may write to it": "%s: 他人が書き込めます",
    "no home directory is known here: set HOME, or [poller] calc_base, to an absolute path":
        "ホームディレクトリがわかりません。HOME または [poller] calc_base に絶対パスを設定してください",
    "[poller] calc_base: %s; who can put another directory in its place decides what is run":
        "[poller] calc_base: %s。ディレクトリを差し替えられる者は、実行されるものを決められます",
    "%s/.mi: must be a directory of yours that nobody else may enter (chown, chmod 700)":
        "%s/.mi: 実行ユーザーだけが入れるディレクトリにしてください (chown, chmod 700)",
    "about to start or to end": "起動中または終了中",
    "%s: in use by another poller (%s); stop it, or give this one its own calc_base":
        "%s: 別のポーリングプログラムが使用中です (%s)。停止するか、別の calc_base を指定してください",
    "%s: holds no token": "%s: トークンが入っていません",
    "%s: others may read the token: chmod 600 %s": "%s: 他人がトークンを読める状態です: chmod 600 %s",
    "%s: %s (token_file; chmod 600, owner: the poller's user)":
        "%s: %s (token_file。所有者はポーリングの実行ユーザー、chmod 600)",
    "login: AUTHENTICATION_OPERATOR must name the directory of authentication_operator":
        "login: AUTHENTICATION_OPERATOR に authentication_operator のディレクトリを設定してください",
    "login: not accepted": "login: 認証されませんでした",
    "%s (%s.py check looks at the whole way)": "%s (%s.py check で経路全体を調べられます)",
    "%s: %s; set [poller] calc_base to a directory that this user may make or own":
        "%s: %s。[poller] calc_base に、この利用者が作れるか所有するディレクトリを設定してください",
    "%s: no token to read there": "%s: トークンを読み取れません",
    "token: ": "トークン: ",
    "what was typed": "入力された内容",
    "no token: set token_file in [poller] (mode 0600)":
        "トークンがありません: [poller] に token_file (モード 0600) を設定してください",
    "%s: [poller] %s is not set": "%s: [poller] %s が設定されていません",
    "%s: not on this host (see: list)": "%s: この計算機にはありません (list で一覧が見られます)",
    "%s: which one? %s": "%s: どれですか。%s",
    "say poll, list, show ID, or SITE BASE_URL TOKEN|login ...%s; --help tells more":
        "poll、list、show ID、または 識別子 BASE_URL トークン|login ... を指定してください%s。--help をご覧ください",
    "is not like 22-6, or Mon-Fri 20:30-6:00, Sat-Sun 0-24":
        "22-6、または Mon-Fri 20:30-6:00, Sat-Sun 0-24 のような形ではありません",
    "paused: nothing new is taken until resume; what runs goes on and is delivered (%s)":
        "一時停止しました: resume まで新しい計算を受け取りません。実行中の計算は続き、結果は送られます (%s)",
    "[poller] paused = yes is in the ini: change it there, and start the poller again":
        "ini の [poller] に paused = yes があります。変更してポーリングプログラムを再起動してください",
    "new calculations are taken": "新しい計算を受け取ります",
    "new calculations are taken as soon as a poller runs": "ポーリングプログラムが動き次第、新しい計算を受け取ります",
    "a poller runs": "ポーリングプログラムが動いています",
    "no poller runs: nothing is taken or delivered": "ポーリングプログラムが動いていません。計算の受け取りも結果の送信も行われません",
    "paused: nothing new is taken until `resume`": "一時停止中です。resume まで新しい計算を受け取りません",
    "[poller] paused = yes: nothing new is taken": "[poller] paused = yes です。新しい計算を受け取りません",
    "outside of [poller] hours: nothing new is taken now": "[poller] hours の時間外です。今は新しい計算を受け取りません",
    "%s waits at the relay: its inputs need more room than there is here (%.1f GB)":
        "%s は中継サーバーで待っています。入力に必要な空き容量がここにありません (%.1f GB)",
    "the running poller still has other values than the ini for: %s; start it again (what runs goes on)":
        "動作中のポーリングプログラムの値が ini と異なります: %s。再起動してください (実行中の計算は続きます)",
    "is being sent": "送信中です",
    "no poller runs": "ポーリングプログラムが動いていません",
    "not wanted; resend tries once more": "受け取られません。resend でもう一度試せます",
    "when a poller runs": "ポーリングプログラムの起動時",
    "now": "今",
    "%s  since %s  next try: %s  why: %s": "%s  終了 %s  次の試行: %s  理由: %s",
    "%s: nothing waits here to be delivered (%s)": "%s: 送信待ちの結果はありません (%s)",
    "the running poller sends it now": "動作中のポーリングプログラムが今送ります",
    "is not a word of this program%s": "このプログラムの語ではありません%s",
    "%s: not like %s": "%s: 正しくは %s のような形です",
    "What is or was on this host: id, state, age, command; then how the poller stands.":
        "この計算機にある (あった) 計算: ID、状態、経過時間、コマンド。最後にポーリングプログラムの様子を示します。",
    "Takes nothing new until `resume`, also after a restart; what runs goes on and is delivered.":
        "`resume` まで新しい計算を受け取りません (再起動しても)。実行中の計算は続き、結果は届けられます。",
    "Takes new calculations again after `pause`.": "`pause` のあと、新しい計算を再び受け取ります。",
    "Tries now to deliver a result that waits here, or one that the relay wants once more.":
        "ここで待っている結果、または中継サーバーがもう一度求めている結果を、今すぐ届けます。",
    "Asks for the password (relays with auth = login), and keeps the token in token_file.":
        "パスワードを尋ね (中継サーバーが auth = login の場合)、トークンを token_file に保存します。",
    "example:": "例:",
    "blanks stand between names, no commas": "名前の区切りは空白です。コンマは使えません",
    "has a word that is not one of: %s": "次のどれでもない語があります: %s",
    "one absolute path a line, please": "絶対パスを一行に一つ書いてください",
    "%s: no declared type: %s": "%s: 宣言できる型ではありません: %s",
    "arguments need a line {parameters} in argv, argument.N for each, and no parameters = no":
        "引数には argv の行 {parameters} と引数ごとの argument.N が必要です (parameters = no とは両立しません)",
    "arguments with control characters, or too long": "引数に制御文字があるか、長すぎます",
    "arguments that no shell would split: %s": "シェルの規則で分けられない引数です: %s",
    "no [command NAME] for %s: it is not in this host's list":
        "%s に対する [command 名前] がありません (この計算機の許可一覧にありません)",
    "[command %s] argument.%d does not allow %s": "[command %s] の argument.%d は %s を許していません",
    "[command %s] input_names does not allow %s": "[command %s] の input_names は %s を許していません",
    "[command %s] gives results by name only (patterns = no)":
        "[command %s] の結果は名前での指定だけに応じます (patterns = no)",
    "changed after it was judged": "判定した後に変わりました",
    "no lock can be had beside its notes (%s); it is not submitted until there is one":
        "記録の場所でロックを取得できません (%s)。取得できるまで投入しません",
    "%s: no lock can be had on this file system (%s); set [poller] calc_base to a directory on another one":
        "%s: このファイルシステムではロックを取得できません (%s)。[poller] calc_base に別のファイルシステム上のディレクトリを設定してください",
    "hello from %s, %s":
        "%s からこんにちは、%s",
    "code: ":
        "登録コード: ",
    "For trying, as a command of the ini: reads the inputs, says their names, sizes and sums, and makes"
    " hello.txt of it.":
        "試すための、ini に書くコマンド。入力を読み、名前・大きさ・sha256 を表示し、hello.txt に書きます。",
    "Exchanges a kit's one-use code for a token in token_file: that of a file token_file.code, or one that it"
    " asks for. (The first `poll` does it by itself.)":
        "一式の登録コード (一度だけ有効) をトークンに替えて token_file に保存します。コードは token_file.code というファイルのもの、"
        "なければ尋ねます。(最初の poll は自動で行います。)",
    "that is no code of a kit: 24 letters and digits, like ABCD-EFGH-...":
        "一式の登録コードではありません。ABCD-EFGH-... のような 24 文字の英数字です",
    "%s: is not there yet: the first start exchanges the code in %s for it":
        "%s: まだありません。最初の起動で、%s の登録コードと引き換えられます",
    "%s: the relay says: %s; its operator makes a new kit (mi_dicomapi.py init), of which the file %s is"
    " enough":
        "%s: 中継サーバーの答え: %s。運用者が新しい一式を作り (mi_dicomapi.py init)、その中のファイル %s だけを受け取れば足ります",
    "%s: others may read the code: chmod 600 %s":
        "%s: ほかの人が登録コードを読めます: chmod 600 %s"
}


if __name__ == "__main__":
    run_as_program(main)
