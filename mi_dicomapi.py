#!/usr/bin/env python3
"""The relay between a workflow system and external computers (the WebAPI way).

The workflow side (mi_system_wf.py) registers a calculation here, the external computer's poller
(mi_system_remote.py) asks for it over outbound https, runs its own agreed command, and brings the agreed
results back. Run by the operator of the workflow system, as an ordinary user of its own; needs this one file,
Python 3.6 or newer and a directory for its state.

usage: mi_dicomapi.py init --name HOST[:PORT]... --site SITE --user USER [--command NAME...] [--dir DIR]
                                                 makes all that a relay needs, and a kit for each other host;
                                                 later: kits for another site or user; --renew: a new
                                                 certificate
       mi_dicomapi.py [serve]                    serve as the ini says (systemd, or a terminal)
       mi_dicomapi.py demo [--keep]              a whole calculation here: relay, poller, workflow side
       mi_dicomapi.py token issue USER [--roles R,R] [--sites S,S] [--days N] | list | revoke NUMBER
       mi_dicomapi.py user add USER [--roles R,R] [--sites S,S] | passwd USER | remove USER | list
                                                 (auth = login)
       mi_dicomapi.py bundle FILE                packs what support needs to see, without secrets
       mi_dicomapi.py check [--upgrade]          looks at ini, files, certificate, disk, limits, tokens, and
                                                 at the running relay; --upgrade: only at what an older
                                                 version has left
       mi_dicomapi.py unit                       prints a systemd unit for `serve`
       mi_dicomapi.py list [--all] [--watch] | show | explain ACCEPT_ID | sites | metrics
       mi_dicomapi.py history [--since TIME] [--site SITE] [--user USER] [--csv] | witness SITE
       mi_dicomapi.py cancel | end | rerun [--force] ACCEPT_ID [--reason TEXT]
       mi_dicomapi.py maintenance on [--reason TEXT] | off        no new calculations or claims; what runs
                                                 is brought to its end
       mi_dicomapi.py page-link [USER] [--roles R,R] [--sites S,S]       opens the page, once
       mi_dicomapi.py backup DIR | restore DIR
       mi_dicomapi.py notify [--test]            tells people by a hook of yours what they should know
options: --ini FILE  --json  -q  -v  --version  --help      (of an ACCEPT_ID, the first eight characters do)

exit codes: 0 done, 64 usage, 66 an input is missing, 69 unavailable (port in use), 70 bug, 74 input/output or
disk full, 75 try again later (another instance runs), 77 no permission, 78 configuration, 130 after Ctrl+C

contents (grep -n '^# ====' prints them with their lines):
  shared: alone                 no module is taken from where results arrive
  the nine steps                the states, who may move a calculation from which to which, the calls
  the calls                     one function for each, by the nine steps; what they share
  files                         numbers in URLs, pieces and packs, never a whole file in memory
  who may                       tokens, log-ins, and who guesses passwords
  leases and restore            who holds what, silence, pauses, what a backup does not know
  the pollers                   which there are, when they were heard, what they say of themselves
  what has changed              one call that waits for any of a user's calculations
  what users hold               calculations, bytes, work: what the limits look at
  why it waits                  the causes, in the order in which they are looked for
  what monitors see             healthz and metrics
  the page                      what people see in a browser: made once, told when it changes
  the sweeper                   what is due, once a second
  the relay                     what the calls share; the ini in mid-run
  the store                     one SQLite writer, and a spool of files beside it
  connections                   nobody without a token ever holds a thread
  configuration                 the ini as a whole, certificates
  start and command line
  operator                      the words for people: token, user, check, unit, list, show, cancel, backup
  notify                        who has to be told what, by the owner's hook
  init                          from nothing to two hosts: a relay, its certificate, kits
  fielded                       the protocol of before ("v1"), for programs that still speak it
  demo
  shared: names                 names of files: checked by every receiver
  shared: pieces                files that come in pieces, in any order
  shared: stream                fielded bodies, which hold whole files, pass as streams
  shared: cause                 why a calculation is where it is, for people
  shared: refusals              what is refused for, in the reader's language
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
  text of the page              HTML, style, script: no data
  Japanese

threads: the selector (Front.serve, the main thread) owns every connection but those at work; `workers`
workers (Front.work_forever) run the calls; the doorkeeper (Front.log_in_forever) the log-ins; the writer
(Store.write_forever) makes all changes of the database, many in one commit; the sweeper
(Sweeper.sweep_forever) does once a second what is due. Reading goes from every thread.
locks are held for moments, and none is taken under another, but that `placing` (files of a result are put in
their place) is held over a change of the database, after which the writer takes the front's. Front.wait_lock:
who waits for what. Front.queue_lock: what is to be done. Quotas.counting: bytes on their way, work owed.
FieldedPollers.announcing: fielded pollers. Pollers.hearing: who is new. Arriving.lock: one file that arrives.
Pieces.moving: how far its sum is. Transfers.lock: who moves pieces. Relay.beginning, held while it is read
from disk what came of a file before: not while another lock is.
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
import base64
import binascii
import bisect
import collections
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import queue
import re
import select
import signal
import socket
import sqlite3
import ssl
import threading
import time
import uuid
from http import HTTPStatus
from urllib.parse import parse_qsl, quote, urlsplit

PROGRAM, VERSION = "mi_dicomapi", "1.0"
API_PATH = "/mi-distcomp-api/"
SMALL_BODY = 64 << 10          # bytes: bodies up to this are collected without a thread
MAX_JSON = 4 << 20             # bytes of a JSON body
MAX_QUICK = 4 << 10            # bytes of one that the thread of all connections reads itself
PAGE, ANSWER_PAGE = 2000, 1000                 # entries of a manifest in one call, in one answer
# bytes of files that fit into a fielded body of 2 GiB as base64, with what is around them
V1_BYTES = (2 << 30) // 4 * 3 - (128 << 10)
PACK_FILES = 4096              # files in a pack that the relay sends
PACK_FILE = 1 << 20            # bytes: the largest file that travels in a pack
# files, and their bytes in all, that travel in an answer beside their names
INLINE_FILES, INLINE = 100, 32 << 10
CHUNK = 256 << 10              # bytes of one read or write
BLOCK = 4 << 10                # bytes, about, that a file takes on the disk beside its own
ENTRY = 150                    # bytes that an entry of a manifest takes in the database beside its name
MAX_HEAD = 16 << 10            # bytes of request line and headers
TICK = 0.25          # seconds: so late may a call's wait end
AT_ONCE = 0.001     # seconds that a worker waits for the next request of the client that it has just answered
SHARES = 60              # a token may have so many-th a part of all connections even where they are all taken
LINGER = 2.0                 # seconds for a refused client to read the answer before its connection is closed
LEAVE = 25                     # seconds after a signal until it ends in any case; running requests get 10
STALL = 60                     # seconds that a transfer may stand still
RATE_OVER = 15                 # seconds over each of which a transfer must keep [limits] min_rate
# bytes of bodies that the waiting calls of a user may hold; beyond it a call is answered without waiting
PARKED = 2 << 20
BALLAST = 4 << 20        # bytes held on the disk, let go of when it is full so that SQLite can still clean up
# bytes of a running command's output that are passed on; all of it comes with the results
LIVE_OUTPUT = 64 << 20
LISTED = 10000                 # incomplete files named in one answer, calculations in one call
PARTS = 200000                 # objects, lists and commas of a JSON body: what it grows to in memory
MOST_WORK = 32000000                # the work of one call, in units of about 0.25 us: 8 s
WORK_AHEAD = 4000000           # so much work may a user owe, and still be served
WORK_RATE = 1000000            # work a second that is forgiven: a quarter of one processor
# of a character with a pattern of many stars, of a name, of a row in the database
STAR_WORK, NAME_WORK, ROW_WORK = 16, 20, 40
NOTE_WORK = 10000              # of a note that is written, logged and told
NOTE_EVERY = 5                 # seconds between two notes of why a calculation waits
VERDICT_NAMES = 100                    # names of each verdict that are kept
ATTEMPTS_NOTED = 1000          # of one calculation, in the history
HISTORY = 1000000              # calculations in the history: about 0.7 GB
POLLERS = 20                   # pollers of one site and user that are known at once
NOTHING = hashlib.sha256(b"").hexdigest()              # the sum of an empty file, and of a directory
ROUNDS = 600000                # of PBKDF2 for a password
# log-ins that wait for their turn, and a quarter of it from one address; more are told to come again
LOGINS_WAITING = 20
LOGINS_KEPT = 50                 # log-ins of a user that are good at once; a further one ends the oldest
KNOWN_ADDRESSES = 8     # addresses from which a user has logged in last: there only his own failures lock him
# failed log-ins of a user from one address, of an address, of a user, until it is locked
LOGIN_LIMITS = {"both": 5, "address": 20, "user": 50}


# ==== the nine steps ====
WORKFLOW, REMOTE, OPERATOR, RELAY = "workflow", "remote", "operator", "relay"
REGISTERED, ALLOWED, SENDING, SENT, RUNNING, ENDED, GETTING, GOT, FINISHED = (
    "registered", "allowed", "sending", "sent", "running", "ended", "getting", "got", "finished")
# calc_progress on the wire
WORDS = {REGISTERED: "not start", ALLOWED: "not start", SENDING: "sending params", SENT: "complete send",
         RUNNING: "running", ENDED: "calc end", GETTING: "getting return", GOT: "got return",
         FINISHED: "got return"}
UNCLAIMED = (REGISTERED, ALLOWED)
BEFORE_START = (SENDING, SENT)         # claimed; a claim that lapses now puts it back
STOPPABLE = BEFORE_START + (RUNNING,)          # claimed, and its command has not ended
RETURNING = (ENDED, GETTING)           # the command has ended, its results are on their way
CLAIMED = STOPPABLE + RETURNING
OVER = (GOT, FINISHED)                 # the results are here

# The nine steps: who may make them, from which state, to which. frm () registers. The table is all there is:
# move() obeys it.
Step = collections.namedtuple("Step", "number name role frm to")
STEPS = [
    Step(1, "add-calcinfo", WORKFLOW, (), REGISTERED),
    Step(2, "allow-wait-calc", WORKFLOW, (REGISTERED,), ALLOWED),
    Step(3, "calc-request", REMOTE, (ALLOWED,), SENDING),
    Step(4, "calc-params-complete", REMOTE, (SENDING,), SENT),
    Step(5, "calc-start", REMOTE, (SENT,), RUNNING),
    Step(6, "calc-end", REMOTE, (RUNNING,), ENDED),
    Step(6, "calc-end abnormal", REMOTE, STOPPABLE, ENDED),
    Step(7, "send-results", REMOTE, RETURNING, GETTING),
    Step(8, "end-send", REMOTE, (GETTING,), GOT),
    Step(9, "finish", WORKFLOW, (GOT,), FINISHED),
    Step(3, "lapse", RELAY, BEFORE_START, ALLOWED),                   # a claim that lapsed before calc-start
    # out of contact for lost_after (or v1_lost_after)
    Step(8, "lost", RELAY, CLAIMED, GOT),
    Step(8, "end-send unsent", REMOTE, (ENDED,), GOT),                # a fielded poller whose upload failed
    Step(2, "cancel-wait-calc", WORKFLOW, UNCLAIMED, GOT),
    Step(3, "cancelled", RELAY, BEFORE_START, GOT),        # cancelled, and its claim lapsed before calc-start
    Step(2, "rerun", WORKFLOW, (GOT,), ALLOWED),                      # a person's word
    Step(2, "rerun --force", WORKFLOW, (RUNNING,) + RETURNING, ALLOWED),
    # after a restore: its poller knows more than the backup
    Step(3, "adopt inputs", RELAY, (ALLOWED,), SENDING),
    Step(5, "adopt", RELAY, UNCLAIMED + STOPPABLE, RUNNING),
]
STEP = {step.name: step for step in STEPS}


def state_in(states):
    """These states, as SQL's condition."""
    return "state IN (%s)" % ", ".join("'%s'" % state for state in states)


# What a call may say: its type (None: any), what is taken where it is not said, what it is, and what is let
# through (of a text: words, or its length). Besides: v, in every call.
Field = collections.namedtuple("Field", "kind default what limit")
Field.__new__.__defaults__ = (None,)
COUNT = range(1 << 62)
FIELDS = {
    "accept_id": Field(str, "", "which calculation"),
    "allow": Field(None, None, "true: step 2 at once, where no input is left to be sent"),
    "after": Field(int, -1, "the number of the last step that is known; -1: from now on"),
    "all": Field(None, None, "true: finished ones, too"),
    "audit": Field(str, "", "NUMBER.SUM of the last line of the poller's audit log"),
    "before": Field(int, 1 << 62, "`next` of the page before", COUNT),
    "calc-info": Field(dict, None, "what is to be done: 2.6"),
    "calcs": Field(dict, None, "what is said of each calculation: 2.7"),
    "claim": Field(str, "", "the remote side's proof"),
    "code": Field(str, None, "of a kit or a link, good once", range(1, 201)),
    "count": Field(int, PACK_FILES, "how many files", COUNT),
    "cpu": Field(None, None, "seconds of processor that the command took"),
    "complete": Field(None, None, "true: all inputs are there (calc-params-complete, unless it was told)"),
    "data": Field(None, None, "true: few small files are wanted along with their names"),
    "delete": Field(None, None, "of fielded workflow sides"),
    "digest": Field(str, "", "stands for all pages of a manifest"),
    "dirs": Field(None, None, "true: empty directories are wanted, too"),
    "end": Field(None, None, "true: step 8 at once, where no result is left to be sent"),
    "ended": Field(None, None, "when the command ended (seconds)"),
    "exit_code": Field(int, None, "the command's"),
    "fielded": Field(bool, False, "true: the words of the command line were the fielded ones"),
    "files": Field(dict, None, "a page of a manifest"),
    "find": Field(str, "", "what site, user or command hold, or an accept_id begins with", range(201)),
    "first": Field(int, 0, "the number of the first row", COUNT),
    "force": Field(None, None, "true: also from out of contact"),
    "free": Field(int, 1 << 62, "how many bytes the poller has room for"),
    "from": Field(int, None, "the number of the first file", COUNT),
    "hash": Field(str, None, "sha256 of the token that the client has made"),
    "have": Field(dict, {}, "{accept_id: claim} of what the poller holds"),
    "held": Field(int, None, "since when (seconds) the result is held for a person there"),
    "known": Field(str, None, "a stamp: the answer waits until it is another one"),
    "maxrss": Field(None, None, "KiB of memory that the command had at most"),
    "missing": Field(dict, {}, "{NAME: why}: results that are not there"),
    "more": Field(None, None, "true: further pages follow"),
    "offset": Field(int, None, "where the bytes begin", COUNT),
    "on": Field(bool, None, "true: maintenance begins"),
    "packed": Field(None, None, "1: packed pieces are understood, and wanted"),
    "password": Field(str, None, "of the user"),
    "poller": Field(str, "", "what the poller calls itself"),
    "presence": Field(dict, None, "how the poller stands: 2.7"),
    "reason": Field(str, "", "why, for people"),
    "refused": Field(dict, {}, "{NAME: why}: results that the owner keeps"),
    "request_id": Field(str, None, "a text of at most 200 characters", range(1, 201)),
    "result": Field(str, None, "how it ended"),
    "result_files": Field(dict, None, "the manifest of the results"),
    "role": Field(str, None, "what the code is for: workflow or remote"),
    "roles": Field(str, None, "of the token, blank separated"),
    "show": Field(str, "open", "which calculations",
                  ("open", "needs", "waiting", "running", "results", "all")),
    "signal": Field(int, None, "by which the command ended"),
    "size": Field(int, None, "how many bytes of the file", COUNT),
    "signed": Field(str, "", "an order, or what is said of results, with its signature: opaque here, 2.6",
                    range(1 << 22)),
    "site": Field(str, "", "which site", range(201)),
    "site_id": Field(str, "", "the external computer's site"),
    "sites": Field(str, "", "of the token, blank separated"),
    "started": Field(None, None, "when the command began (seconds)"),
    "stop": Field(None, None, "of older relays: changes nothing"),
    "stream": Field(str, None, "out or err", ("out", "err")),
    "take": Field(str, None, "a random text of 8 to 100 characters", range(8, 101)),
    "total": Field(None, None, "the number of all files, where further pages follow"),
    "transfer": Field(str, None, "a random text of 8 to 100 characters, the same in all calls of a transfer",
                      range(8, 101)),
    "user": Field(str, None, "who logs in"),
    "verdicts": Field(dict, {}, "{CODE: {`count`, `names`}}: what stays away, and why: 2.9"),
    "view": Field(str, "sites", "what is shown: sites, calculations, or one", ("sites", "calcs", "one")),
    "wait": Field(int, 0, "seconds that the answer may wait for news")}

# Of a call: who may make it (None: see its function), what it does, the fields that it reads, those of them
# that must be there, may its body be as large as max_body, the operator's word that does the same, and which
# roles may make it, too.
Route = collections.namedtuple("Route", "role function fields needed bulk word also")


def route(role, function, fields="", bulk=False, word="", also=()):
    """A Route. fields: their names; in brackets those that may stay away."""
    names = fields.split()
    return Route(role, function, tuple(name.strip("[]") for name in names),
                 frozenset(name for name in names if name[0] != "["), bulk, word, frozenset(also))


STRANGERS_CALLS = ("login", "v2/redeem", "v2/link")           # of whoever has no token yet
# the calls whose path names a file
FILE_LIST, FILE, FILE_PACK = "files/ID/KIND", "files/ID/KIND/N", "files/ID/KIND/pack"
PIECES, MISSING = "v2/pieces/ID/KIND/N", "v2/missing/ID/KIND/N"


def routes():
    """{(method, name): Route}. New calls stand below v2/. Without a method: no call, an operator's word only,
    which his command leaves in the database for the running relay."""
    ask = "site_id take poller [wait] [have] [free] [dirs] [data] [presence] [audit]"
    return {
        ("POST", "add-calcinfo"): route(WORKFLOW, add_calcinfo,
                                        "request_id calc-info [allow] [more] [total] [fielded]"),
        ("POST", "allow-wait-calc"): route(WORKFLOW, allow_wait_calc, "accept_id"),
        ("POST", "calc-request"): route(REMOTE, calc_request, ask),
        ("GET", "calc-request"): route(REMOTE, calc_request, ask),                   # as fielded pollers ask
        ("GET", "calc-params"): route(REMOTE, calc_params, "accept_id claim [dirs] [data]"),
        ("POST", "calc-params-complete"): route(REMOTE, calc_params_complete, "accept_id claim"),
        ("POST", "calc-start"): route(REMOTE, calc_start, "accept_id claim [complete]"),
        ("POST", "calc-end"): route(REMOTE, calc_end, "accept_id claim result [exit_code] [signal] [reason]"
                                                      " [started] [ended] [cpu] [maxrss] [held]"),
        ("POST", "send-results"): route(REMOTE, send_results, "accept_id claim result_files [missing] [end]"
                                                              " [refused] [verdicts] [more] [digest]"
                                                              " [signed] [audit]"),
        ("POST", "end-send"): route(REMOTE, end_send, "accept_id claim result"),
        ("GET", "calc-status"): route(WORKFLOW, calc_progress, "accept_id [wait] [known]"),
        ("GET", "calc-progress"): route(WORKFLOW, calc_progress, "accept_id [wait] [known]"),
        ("GET", "get-calc-result"): route(WORKFLOW, get_calc_result, "accept_id [dirs] [data]"),
        ("POST", "finish"): route(WORKFLOW, finish, "accept_id"),
        ("POST", "cancel-wait-calc"): route(WORKFLOW, cancel_wait_calc,
                                            "accept_id [reason] [stop] [delete]", word="cancel",
                                            also=(OPERATOR,)),
        ("POST", "rerun"): route(WORKFLOW, rerun, "accept_id [force] [reason] [signed]", word="rerun",
                                 also=(OPERATOR,)),
        ("GET", "output"): route(WORKFLOW, read_output, "accept_id stream offset [wait]",
                                 also=(VIEWER, OPERATOR)),
        ("GET", "v2/explain"): route(WORKFLOW, explain, "accept_id", word="explain", also=(VIEWER, OPERATOR)),
        ("GET", "v2/list"): route(WORKFLOW, list_own, "[request_id] [known] [wait] [before] [all]"),
        ("POST", "heartbeat"): route(REMOTE, heartbeat, "calcs [site_id] [poller] [wait] [presence]"
                                                        " [audit]"),
        ("GET", "metrics"): route(METRICS, metrics),
        ("GET", "v2/conditions"): route(VIEWER, conditions, "[after] [known] [wait]"),
        ("GET", "get-calcinfo"): route(OPERATOR, get_calcinfo),
        ("POST", "reload-ini"): route(OPERATOR, reload_ini),
        ("GET", "v2/board"): route(WORKFLOW, board, "[view] [accept_id] [show] [site] [find] [before] [first]"
                                                    " [known] [wait]", also=(REMOTE, VIEWER, OPERATOR)),
        ("POST", "v2/maintenance"): route(OPERATOR, set_maintenance, "on [reason]"),
        ("POST", "login"): route(None, login, "user password"),      # by whoever has no token yet
        ("POST", "v2/redeem"): route(None, redeem, "code hash role [site]"),
        ("POST", "v2/link"): route(None, redeem_link, "code"),
        ("GET", FILE_LIST): route(None, files_call(FileCall.give_page), "from [claim] [dirs] [data]"),
        ("POST", FILE_LIST): route(None, files_call(FileCall.add_page), "from files [more] [claim]",
                                   bulk=True),
        ("GET", FILE): route(None, files_call(FileCall.give_file), "[offset] [claim]"),
        ("POST", FILE): route(None, files_call(FileCall.take_piece), "offset [claim]", bulk=True),
        ("GET", FILE_PACK): route(None, files_call(FileCall.give_pack), "from [count] [claim]"),
        ("POST", FILE_PACK): route(None, files_call(FileCall.take_pack), "from count [claim]", bulk=True),
        ("GET", PIECES): route(None, files_call(FileCall.give_pieces),
                               "transfer offset size [claim] [packed]"),
        ("POST", PIECES): route(None, files_call(FileCall.take_pieces), "transfer offset size [claim]",
                                bulk=True),
        ("GET", MISSING): route(None, files_call(FileCall.tell_missing), "transfer [claim]"),
        ("", "end"): route(OPERATOR, end_calculation, "accept_id [reason]", word="end"),
        ("", "sites"): route(OPERATOR, list_sites, word="sites"),
        ("", "metrics"): route(OPERATOR, figures_for_operator, word="metrics"),
        ("", "page-link"): route(OPERATOR, page_link, "hash user roles [sites]", word="page-link")}


def move(relay, tx, step, row, under=None, **changes):
    """The only place where a state changes. False: the calculation was not in one of step.frm (or, for the
    holder of a claim, no longer under it). Logged, and whoever waits for it is told, once it is on disk."""
    sets = ", ".join("%s = ?" % name for name in changes)
    now = time.time()
    before = step.frm[0]
    if len(step.frm) > 1:
        before = (tx.read("SELECT state FROM calculations WHERE seq = ?", row["seq"]) or [[""]])[0][0]
    done = tx.db.execute("UPDATE calculations SET state = ?, version = version + 1, touched = ?, silent = 0,"
                         " waits = ''%s WHERE seq = ? AND %s AND (? OR claim = ?)"
                         % (sets and ", " + sets, state_in(step.frm)),
                         [step.to, now] + list(changes.values())
                         + [row["seq"], under is None, under]).rowcount
    if done:
        accept_id, site, user = row["accept_id"], row["site"], row["user"]
        shown = {key: changes[key]
                 for key in ("attempt", "poller", "status", "exit_code", "reason")
                 if changes.get(key) not in (None, "")}
        note_step(tx, row["seq"], changes.get("attempt", row["attempt"]), step, shown, now)
        tx.after(lambda: log("info", accept_id, "%d %s" % (step.number, step.name), site=site, user=user,
                             **shown))
        tx.after(lambda: relay.news.tell(accept_id, user))
        tx.after(lambda: relay.meter.moved(step, before, row, changes, now))
        if step.to == GOT:
            tx.after(lambda: relay.tidy_spool(row, "result", "input"))
        if step.to == ALLOWED:
            need = tx.db.execute("SELECT bytes FROM calculations WHERE seq = ?", (row["seq"],)).fetchone()[0]
            tx.after(lambda: relay.front.fire(("site", site, user), one=True, need=need))
    return bool(done)


def note_step(tx, seq, attempt, step, shown=(), now=None):
    """For `history`: when a step was made, in the transaction that makes it. Of one that is made again in the
    same attempt, the first time."""
    note = {key: value[:200] if isinstance(value, str) else value
            for key, value in dict(shown).items() if key != "attempt"}
    if attempt <= ATTEMPTS_NOTED:
        tx.db.execute("INSERT OR IGNORE INTO events (calc, attempt, step, at, note) VALUES (?, ?, ?, ?, ?)",
                      (seq, attempt, step.name, now or time.time(),
                       json.dumps(note, ensure_ascii=False) if note else ""))


def enter(tx, accept_id, user, site, command, now):
    """Makes room in the history for a calculation that is being registered; its number, which no other one
    gets as long as the history knows it."""
    seq = tx.db.execute("INSERT INTO past (accept_id, user, site, command, registered) VALUES (?, ?, ?, ?,"
                        " ?)", (accept_id, user, site, command, now)).lastrowid
    note_step(tx, seq, 0, STEP["add-calcinfo"], now=now)
    return seq


# ==== the calls ====
# a call's answer when it waits for an event of this key. seen: how many there had been before it looked;
# None: it is to look again. nothing: its answer, a short one, if none comes; None: it is to look again then
Park = collections.namedtuple("Park", "key seen nothing")
Park.__new__.__defaults__ = None, None
# a call's answer from the spool, see send_spool()
FileAnswer = collections.namedtuple("FileAnswer", "segments length headers status then moved kind")
FileAnswer.__new__.__defaults__ = (None, None, "application/octet-stream")
PlainAnswer = collections.namedtuple("PlainAnswer", "parsed")     # a call's answer without the envelope
TextAnswer = collections.namedtuple("TextAnswer", "kind data")       # a call's answer that is no JSON


class ApiError(Exception):
    """A refusal: code and text of the envelope, the HTTP status (the code's, unless given), more fields."""

    def __init__(self, code, text, http=None, **more):
        Exception.__init__(self, text)
        self.code = code
        self.more = more
        self.http = http or (code if isinstance(code, int) else 400)


def refused(code, said, told=(), **more):
    """The ApiError in these words of REFUSALS, with the values `told`: who reads it has them in his
    language."""
    return ApiError(code, REFUSALS[said] % dict(told), said=said, told=dict(told), **more)


def not_allowed(path, said, told=(), **more):
    """The same for who may not make a call: the manual's words; `why` are those of REFUSALS."""
    return ApiError("0005", "%s への実行権がありません。" % path, http=403, why=REFUSALS[said] % dict(told), **more,
                    said=said, told=dict(told))


# of a calc-info
OUR_KEYS = ("command", "remote-site", "parameters", "parameter_files", "result_files", "result_patterns",
            "rerun")
# why a result stayed where it is
VERDICTS = ("missing", "refused", "limit", "name", "unreadable", "changing", "outside", "special", "held")
FILES_GONE = "it was fetched, and its files had to make room for others"


def calculation_of_caller(call, reading=False):
    """The calculation that the call names (also by the beginning of its id), if it exists for this caller
    (reading: a viewer sees all, as an operator does); otherwise the same 404 as for an unknown id. 409 if
    there are several."""
    all_users = {OPERATOR, VIEWER} if reading else {OPERATOR}
    given = call["accept_id"]
    # an id is of letters, digits and -, which sort before ~
    begins = given + "~" if 8 <= len(given) < 36 else given
    rows = call.relay.store.read("SELECT %s FROM calculations WHERE accept_id >= ? AND accept_id <= ? LIMIT"
                                 " 1000" % BRIEF, given, begins)
    found = [row
             for row in rows
             if (row["user"] == call.caller.user or all_users & call.caller.roles)
             and token_covers(call.caller, row["site"])]
    if not found:
        raise ApiError(404, "There is no information for accept_id(%s)" % given)
    if len(found) > 1:
        raise ApiError(409,
                       "accept_id(%s) is the beginning of %s"
                       % (given, " ".join(row["accept_id"] for row in found[:10])), why="prefix")
    return found[0]


def claimed_by_caller(call):
    """calculation_of_caller(), if the call's claim is the one in force; its lease is renewed. 409 with
    why=claim for any other."""
    row = calculation_of_caller(call)
    if not row["claim"] or call.need("claim") != row["claim"] or row["protocol"] == 1:
        if call.relay.claims.in_grace():
            raise refused(503, "stock")
        raise refused(409, "claim", why="claim", state=WORDS[row["state"]])
    call.relay.claims.renew(row)
    return row


def make_step(call, name, row, before=None, **changes):
    """Makes a step durable. Asked again after it was made: fine. From any other state: 409. before: the step
    that is made with it, unless it was made already."""
    step, claim = STEP[name], row["claim"]

    def work(tx):
        if before:
            move(call.relay, tx, STEP[before], row, claim)
        if move(call.relay, tx, step, row, claim if step.role == REMOTE else None, **changes):
            return True
        now = tx.db.execute("SELECT state, claim FROM calculations WHERE seq = ?", (row["seq"],)).fetchone()
        if now is not None and now["state"] == step.to and (step.role != REMOTE or now["claim"] == claim):
            return False                               # the answer was lost; the same again
        if step.role == REMOTE and call.relay.claims.in_grace():
            raise refused(503, "stock")
        raise ApiError(409, "%s is not possible now" % name, why="state",
                       state=WORDS[now["state"]] if now else "")

    return call.relay.store.write(work, name)


def add_calcinfo(call):
    """1. Registers a calculation; the same user's same request_id gets the same one again."""
    info, relay = call["calc-info"], call.relay
    relay.claims.check_maintenance()
    site, command, parameters, rules = asked_for(call, info)
    names, patterns = check_declared(call, info)
    entries = check_page(info.get("parameter_files", {}), reserved=LOG_NAMES)
    more = bool(call["more"])
    total = check_sizes(relay, entries)
    kept = info_to_keep(info, parameters, names, patterns)
    need = total + len(kept) + room_of_names(entries)
    same = info_to_keep(dict(info, signed=None), parameters, names, patterns)
    print256 = hashlib.sha256(json.dumps([site, command, same, names_and_sums(entries),
                                          call["total"]]).encode()).hexdigest()
    request_id, accept_id, now = call["request_id"], str(uuid.uuid4()), time.time()
    needs_v2 = bool(patterns or parameters and not call["fielded"] or more
                    or total > V1_BYTES or any("/" in entry[0] for entry in entries))

    blob = None

    def work(tx):
        row = tx.db.execute("SELECT %s, fingerprint FROM calculations WHERE user = ? AND request_id = ?"
                            % BRIEF, (call.caller.user, request_id)).fetchone()
        if row is not None:
            if row["fingerprint"] != print256:
                raise refused(409, "differs", {"name": printable(request_id)}, why="differs",
                              accept_id=row["accept_id"])
            return row, True
        check_free(relay, total)
        check_quota(relay, tx, call.caller.user, site, rules, need)
        seq = enter(tx, accept_id, call.caller.user, site, command, now)
        tx.db.execute("INSERT INTO calculations (seq, accept_id, user, request_id, fingerprint, site,"
                      " command, info, texts, needs_v2, state, registered, touched) VALUES (?, ?, ?, ?, ?,"
                      " ?, ?, ?, ?, ?, ?, ?, ?)",
                      (seq, accept_id, call.caller.user, request_id, print256, site, command, kept,
                       len(kept), needs_v2, REGISTERED, now, now))
        insert_page(tx, seq, "input", 0, entries, more, blob)
        row = tx.db.execute("SELECT %s FROM calculations WHERE seq = ?" % BRIEF, (seq,)).fetchone()
        tx.after(lambda: relay.quotas.count_registration(call.caller.user, total))
        tx.after(lambda: relay.meter.moved(STEP["add-calcinfo"], "", row, {}, now))
        tx.after(lambda: log("info", accept_id, "1 add-calcinfo", site=site, user=call.caller.user,
                             command=command, inputs=len(entries)))
        if call["allow"] and not row["inputs_open"] and not more:
            move(relay, tx, STEP["allow-wait-calc"], row, allowed=now)
        return tx.db.execute("SELECT %s FROM calculations WHERE seq = ?" % BRIEF, (seq,)).fetchone(), False

    known = True
    try:
        if not relay.store.read("SELECT 1 FROM calculations WHERE user = ? AND request_id = ?",
                                call.caller.user, request_id):
            check_free(relay, total)                   # nothing is written for who will be refused
            check_quota(relay, relay.store, call.caller.user, site, rules, need)
            blob = take_inline(call, accept_id, "input", info.get("parameter_files", {}), entries)
        row, known = relay.store.write(work, "add-calcinfo")
    finally:
        if known:                                      # what came along is nobody's
            remove_tree(relay.store.spool(accept_id, ""))
    return dict(progress_of(call, row), message="registered", accept_id=row["accept_id"], known=known,
                signed=order_in_force(call, row) if known else info.get("signed") or "",
                warning=v1_warning(relay, site, call.caller.user, needs_v2, parameters))


def asked_for(call, info):
    """(site, command, parameters, the site's rules) of a calc-info, if this user may have that done there."""
    site, command, parameters = info.get("remote-site"), info.get("command"), info.get("parameters", "")
    if not all(isinstance(text, str) for text in (site, command, parameters)) or not command:
        raise ApiError(400, "calc-info needs command, remote-site and parameters as texts")
    check_site(call, site)
    rules = call.relay.rules(site)
    if command not in rules["commands"] + rules["command_lines"]:
        raise refused(401, "command", {"name": printable(command), "site": site}, why="command")
    if rules["users"] and call.caller.user not in rules["users"]:
        raise refused(403, "users", {"user": call.caller.user, "site": site}, why="users")
    return site, command, parameters, rules


def check_declared(call, info):
    """The declared results of a calc-info as (names in order, patterns); the logs are always implied. 400 if
    unusable."""
    names, patterns = info.get("result_files", {}), info.get("result_patterns", [])
    if not isinstance(names, (dict, list)) or not isinstance(patterns, list):
        raise ApiError(400, "result_files is an object of names, result_patterns a list")
    call.relay.quotas.charge(call, 2 * NAME_WORK * len(names))
    try:
        names = sorted({check_name(name) for name in names} - set(LOG_NAMES), key=nfc_parts)
        check_manifest_names(names, reserved=LOG_NAMES)
        compile_patterns(patterns)
    except (ValueError, TypeError, AttributeError) as error:
        raise ApiError(400, "result_files, result_patterns: %s" % error, why="name")
    return names, patterns


def info_to_keep(info, parameters, names, patterns):
    """What is kept of a calc-info, as JSON: with every key that this relay does not know, without those that
    are its own to say."""
    extra = {key: value for key, value in info.items()
             if key not in OUR_KEYS and (key != "signed" or value)}
    return json.dumps({"parameters": parameters, "result_names": names, "result_patterns": patterns,
                       "extra": extra}, ensure_ascii=False)


def check_quota(relay, source, user, site, rules, total):
    """429 when the user or the site has as many calculations as the ini lets them have. source: the
    store, or tx."""
    check_unfinished(relay, user)
    check_bytes(relay, source, user, total)
    if rules["max_waiting"]:
        waiting = source.read("SELECT COUNT(*) FROM (SELECT 1 FROM calculations WHERE site = ? AND state = ?"
                              " LIMIT ?)", site, ALLOWED, rules["max_waiting"])[0][0]
        if waiting >= rules["max_waiting"]:
            raise refused(429, "max_waiting", {"count": waiting, "site": site}, why="max_waiting")


def check_unfinished(relay, user):
    """429 when the user has as many unfinished calculations as the ini lets one have."""
    most = relay.conf["limits"]["calculations_per_user"]
    if most and relay.quotas.open_of[user] >= most:
        raise refused(429, "calculations_per_user", {"user": user, "count": relay.quotas.open_of[user]},
                      why="calculations_per_user")


def check_bytes(relay, source, user, total):
    """429 when the user would hold more bytes than the ini lets one hold: of files, names, texts and live
    output. source: the store, or tx."""
    most = relay.conf["limits"]["bytes_per_user"]
    used = (most
            and (source.read("SELECT SUM(bytes + texts) FROM calculations WHERE user = ?", user)[0][0] or 0)
            + relay.quotas.live[user])
    if most and used + total > most:
        raise refused(429, "bytes_per_user", {"user": user, "count": used}, why="bytes_per_user")


def allow_wait_calc(call):
    """2. All inputs are complete: the external computer may have it. 409 with the incomplete ones
    otherwise."""
    row = calculation_of_caller(call)
    if row["state"] == REGISTERED and (row["inputs_open"] or row["inputs_more"]):
        raise FileCall(call, row, "input").incomplete_error()
    if row["state"] != REGISTERED and row["allowed"]:
        return {"message": "allowed"}                  # asked again
    make_step(call, "allow-wait-calc", row, allowed=time.time())
    call.relay.tidy_spool(row, "input")
    return {"message": "allowed"}


def calc_request(call):
    """3. The oldest allowed calculation of this site and user, claimed in one guarded statement; waits up to
    `wait` seconds for one."""
    site, relay = call["site_id"], call.relay
    check_site(call, site)
    have = call["have"]
    for accept_id, found in rows_of(call, have).items():
        if found["claim"] and found["claim"] == have[accept_id] and found["state"] in CLAIMED:
            relay.claims.renew(found)
    take, free = call["take"], call["free"]
    relay.fielded.v1_sites.discard((site, call.caller.user))         # its last poller is one of our own
    relay.pollers.hear(call, site, call["poller"])
    query = "SELECT %s FROM calculations WHERE site = ? AND state = ? AND user = ?" % BRIEF
    waiting = (query + " AND bytes <= ? ORDER BY seq LIMIT 100", (site, ALLOWED, call.caller.user, free))
    again = (query + " AND take = ?", (site, SENDING, call.caller.user, take))

    def work(tx):
        row = tx.db.execute(*again).fetchone()
        if row is None:
            row = next((found
                        for found in tx.db.execute(*waiting)
                        if not relay.fielded.announced_to_other(found["accept_id"], "", time.monotonic())),
                       None)
            if row is None:
                return None
            claim = "%d.%s" % (row["attempt"] + 1, os.urandom(16).hex())
            move(relay, tx, STEP["calc-request"], row, claim=claim, attempt=row["attempt"] + 1, take=take,
                 protocol=2, poller=call["poller"][:200], claimed=time.time())
            row = tx.db.execute(query + " AND take = ?", again[1]).fetchone()
        return row

    row, key, large = None, ("site", site, call.caller.user), {}
    relay.claims.check_maintenance()
    seen = relay.front.event_count(key)
    # whatever comes for this site and user is an event
    if not relay.claims.in_grace() and relay.nothing.get(key) != seen:
        if relay.store.read("SELECT 1 FROM calculations WHERE site = ? AND user = ? AND state IN (?, ?)"
                            " AND (take = ? OR state = ? AND bytes <= ?) LIMIT 1",
                            site, call.caller.user, ALLOWED, SENDING, take, ALLOWED, free):
            row = relay.store.write(work, "calc-request")
        elif not relay.store.read("SELECT 1 FROM calculations WHERE site = ? AND user = ? AND state IN (?,"
                                  " ?) LIMIT 1", site, call.caller.user, ALLOWED, SENDING):
            relay.nothing[key] = seen
        else:
            large = too_large(call, site, free)
    missed, fresh = missed_results(call, site)
    if row is None:
        nothing = ApiError("0300",
                           "There is no information for accept_id(None), about the your site id(%s)" % site,
                           http=200, wanted=missed, large=large)
        if time.monotonic() < call.until and not fresh:
            return Park(key, seen, None if missed or large else nothing)
        raise nothing
    relay.claims.renew(row, relay.conf["times"]["accept_lease"])
    return dict(calc_info(call, row), message="claimed", accept_id=row["accept_id"], claim=row["claim"],
                attempt=row["attempt"], lease=relay.conf["times"]["lease"], wanted=missed, complete=True)


def knows_nothing(call):
    """Is it known without the database that nothing waits for the poller that calls? calc_request() then
    asks it nothing."""
    relay, key = call.relay, ("site", call["site_id"], call.caller.user)
    return (not call["have"] and not relay.claims.silent and not relay.claims.in_grace()
            and relay.nothing.get(key) == relay.front.event_count(key))


def too_large(call, site, free):
    """{accept_id: bytes} of what waits for this poller, but needs more room than the `free` bytes that it
    has. Whoever waits for it is told."""
    rows = call.relay.store.read("SELECT accept_id, bytes FROM calculations WHERE site = ? AND state = ? AND"
                                 " user = ? AND bytes > ? LIMIT 100", site, ALLOWED, call.caller.user, free)
    due = [row for row in rows if call.relay.claims.may_note(row["accept_id"], call.caller.user)]
    call.relay.quotas.charge(call, NOTE_WORK * len(due))
    for row in due:
        call.relay.claims.note_waits(row["accept_id"], call.caller.user,
                                     "its inputs need %s, the external computer's disk has room for %s"
                                     % (bytes_for_people(row["bytes"]), bytes_for_people(free)))
    return {row["accept_id"]: row["bytes"] for row in rows}


def bytes_for_people(count):
    """Bytes for people: 12.3 GB, 7 MB."""
    return "%.1f GB" % (count / 1e9) if count >= 1e9 else "%d MB" % (max(0, count) // 1000000)


def missed_results(call, site):
    """({accept_id: claim} of what this very poller claimed, is out of contact, and is not in its `have`; is
    one of them so since a moment ago?): it may have delivered it to a relay that was restored from an older
    backup since."""
    relay, have = call.relay, call["have"]
    if not relay.claims.silent:
        return {}, False
    rows = [row
            for row in relay.store.read("SELECT accept_id, claim, silent FROM calculations WHERE site = ?"
                                        " AND %s AND user = ? AND poller = ? AND claim IS NOT NULL LIMIT 1000"
                                        % state_in((RUNNING,) + RETURNING), site, call.caller.user,
                                        call["poller"])
            if row["accept_id"] in relay.claims.silent and row["accept_id"] not in have]
    return {row["accept_id"]: row["claim"] for row in rows}, any((relay.claims.silent_seconds(row) or 0) < 2
                                                                 for row in rows)


def calc_info(call, row):
    """What a poller is told of a calculation: calc-info and the first page of its inputs."""
    kept = declared_of(call.relay.store, row)
    info = dict(kept["extra"],
                **{"command": row["command"], "remote-site": row["site"], "parameters": kept["parameters"],
                   "result_files": {name: {} for name in kept["result_names"]},
                   "result_patterns": kept["result_patterns"]})
    return {"calc-info": info, "inputs": FileCall(call, row, "input").page(0)}


def calc_params(call):
    """4. The same again for who holds the claim."""
    return dict(calc_info(call, claimed_by_caller(call)), message="calc-info")


def calc_params_complete(call):
    """4. The external computer has all inputs."""
    make_step(call, "calc-params-complete", claimed_by_caller(call))
    return {"message": "complete"}


def calc_start(call):
    """5. The command is about to start: from here on the calculation is never handed out again. complete:
    4., too: the external computer has all inputs."""
    make_step(call, "calc-start", claimed_by_caller(call),
              "calc-params-complete" if call["complete"] else None, started=time.time())
    return {"message": "started"}


def calc_end(call):
    """6. The command is over, or could not be started."""
    row, word, code = claimed_by_caller(call), call["result"], call["exit_code"]
    if word not in ("calc end", "abnormal"):
        raise ApiError(400, "result is \"calc end\" or \"abnormal\"")
    good = word == "calc end" and code == 0
    reason = printable(call["reason"])[:1000] or ("" if good else "exit code %s" % code)
    # the poller knows no more than that; here it is known by whom
    if reason == "cancelled" and row["cancel"]:
        reason = row["cancel"]
    report = {key: call[key]
              for key in ("started", "ended", "cpu", "maxrss")
              if isinstance(call[key], (int, float))}
    name = "calc-end" if word == "calc end" or row["state"] not in BEFORE_START else "calc-end abnormal"
    make_step(call, name, row, status="completed" if good else "abnormal", reason=reason, ended=time.time(),
              exit_code=code, signal=call["signal"], report=json.dumps(report))
    if call["held"] is not None:                       # told once more
        call.relay.claims.note_held(row, call["held"])
    return {"message": "ended"}


def send_results(call):
    """7. The results' manifest (digest: of all pages). Uploads go only against it; another replaces it."""
    row, more = claimed_by_caller(call), bool(call["more"])
    entries, told, print256 = checked_results(call, row)
    again = {GETTING: {"message": "getting"}}
    if call["end"]:
        again[GOT] = again[FINISHED] = {"message": "got", "end": True}

    def asked_again(now):
        same = now and (now["manifest"], now["claim"]) == (print256, row["claim"])
        return again.get(now["state"]) if same else None

    if asked_again(row):
        return asked_again(row)

    def work(tx):
        now = tx.db.execute("SELECT %s FROM calculations WHERE seq = ?" % BRIEF, (row["seq"],)).fetchone()
        if asked_again(now):
            return asked_again(now)
        count_reasons(tx, row["seq"], told)
        if AUDIT_HEAD.match(call["audit"]):            # kept as long as the history
            note_step(tx, row["seq"], row["attempt"], STEP["send-results"], {"audit": call["audit"]})
        if not move(call.relay, tx, STEP["send-results"], row, row["claim"], manifest=print256, results=0,
                    results_open=0, **told):
            raise ApiError(409, "send-results is not possible now", why="state", state=WORDS[row["state"]])
        drop_results(tx, row["seq"])
        # else what was put there for it may have been set aside with what is there for another one
        if (now["state"], now["manifest"]) == (row["state"], row["manifest"]):
            placed.append(blob)
        insert_page(tx, row["seq"], "result", 0, entries, more, blob if placed else None)
        if not placed or not blob:
            tx.after(set_aside)
        now = tx.db.execute("SELECT %s FROM calculations WHERE seq = ?" % BRIEF, (row["seq"],)).fetchone()
        if not call["end"] or now["results_open"] or more:
            return again[GETTING]
        move(call.relay, tx, STEP["end-send"], now, row["claim"], got=time.time(), **none_came(tx, now))
        return again[GOT]

    folder = call.relay.store.spool(row["accept_id"], "result").rstrip(b"/")
    old, blob, placed = folder + b"." + utf8(os.urandom(4).hex()), None, []
    if not os.path.exists(folder):                     # nothing is put beside what came for another manifest
        blob = take_inline(call, row["accept_id"], "result", call["result_files"], entries)

    def set_aside():                   # what came for the manifest before; not sooner, it may be all there is
        call.relay.forget_uploads(row["seq"])
        try:
            os.rename(folder, old)
        except OSError:                         # there was none; or new files replace the old ones one by one
            pass

    try:
        answer = call.relay.store.write(work, "send-results")
    finally:
        if blob and not placed:                        # what came along is nobody's
            remove_blob(folder, utf8(blob))
    remove_tree(old)
    if "end" in answer:
        call.relay.claims.leases.pop(row["accept_id"], None)
    return answer


def checked_results(call, row):
    """What send-results says, if all of it is as it should be: (entries, {column: why what was asked for did
    not come, as JSON}, what tells this manifest from another)."""
    entries = check_page(call["result_files"])
    check_results(call, row, entries)
    told = {key: check_reasons(call, key) for key in ("missing", "refused")}
    told["verdicts"] = check_verdicts(call)
    check_room(call.relay, entries)
    print256 = hashlib.sha256(json.dumps([names_and_sums(entries), bool(call["more"]), told,
                                          call["digest"]]).encode()).hexdigest()
    told = {key: json.dumps(value, ensure_ascii=False) for key, value in told.items()}
    return entries, dict(told, signed=call["signed"]), print256


def declared_of(source, row):
    """What was declared of a calculation, as info_to_keep() made it. source: the store, or tx."""
    return json.loads(source.read("SELECT info FROM calculations WHERE seq = ?", row["seq"])[0]["info"])


def lacks_all_results(source, row):
    """Has none of the results come of which one at least was asked for by name? (Logs are none.) source: the
    store, or tx."""
    logs = source.read("SELECT 1 FROM files WHERE calc = ? AND kind = 'result' AND name IN (?, ?)",
                       row["seq"], *LOG_NAMES)
    return bool(declared_of(source, row)["result_names"]) and row["results"] <= len(logs)


def none_came(source, row):
    """What end-send changes of a success without any of the results that were asked for."""
    if row["status"] == "completed" and lacks_all_results(source, row):
        return {"status": "abnormal", "reason": "none of the results is there"}
    return {}


def check_results(call, row, entries):
    """400 unless every entry was declared by the workflow side (or is a log)."""
    kept = declared_of(call.relay.store, row)
    patterns, exact = kept["result_patterns"], set(kept["result_names"])
    each = sum(STAR_WORK if isinstance(compile_pattern(text), GlobMatcher) else 1 for text in patterns)
    call.relay.quotas.charge(call,
                             NAME_WORK * len(exact)
                             + sum(NAME_WORK + len(entry[0]) * each
                                   for entry in entries if entry[0] not in exact))
    # more than one: of an older version
    parts = [patterns[at:at + MAX_PATTERNS] for at in range(0, len(patterns), MAX_PATTERNS)] or [[]]
    wanted = [declared_matcher(exact, part) for part in parts]
    for name in (entry[0] for entry in entries):
        if not any(one(name) for one in wanted):
            raise ApiError(400, "%s is not a declared result" % name, why="undeclared")


def check_reasons(call, key):
    """missing or refused: {NAME: why}, as printable text. 400 if malformed."""
    found = call[key]
    if len(found) > LISTED or not all(isinstance(why, str) for why in found.values()):
        raise ApiError(400, "%s is an object of names and reasons" % key)
    return {printable(name)[:1000]: printable(why)[:1000] for name, why in found.items()}


def check_verdicts(call):
    """verdicts: {code: {"count", "names"}} of what was asked for and did not come: how many, and the names
    that their owner lets leave (the first VERDICT_NAMES of each). 400 if malformed."""
    found, kept = call["verdicts"], {}
    for code, entry in found.items():
        count, names = ((entry.get("count"), entry.get("names", [])) if isinstance(entry, dict)
                        else (None, None))
        if (code not in VERDICTS or type(count) is not int or not 0 < count < 1 << 40
                or not isinstance(names, list)
                or not all(isinstance(name, str) for name in names[:VERDICT_NAMES])):
            raise ApiError(400, "verdicts is an object of {count, names} for: %s" % " ".join(VERDICTS))
        kept[code] = {"count": count, "names": [printable(name)[:1000] for name in names[:VERDICT_NAMES]]}
    return kept


def count_reasons(tx, seq, told):
    """Counts the texts {column: JSON} that take the place of a calculation's present ones."""
    tx.db.execute("UPDATE calculations SET texts = texts + ?%s WHERE seq = ?"
                  % "".join(" - LENGTH(%s)" % key for key in told), (sum(map(len, told.values())), seq))


def drop_results(tx, seq):
    """Takes a manifest of results out of a calculation, and out of what its user holds."""
    bytes_, texts = tx.db.execute("SELECT COALESCE(SUM(size), 0), COALESCE(SUM(LENGTH(name) + ?), 0) FROM"
                                  " files WHERE calc = ? AND kind = 'result'", (ENTRY, seq)).fetchone()
    tx.db.execute("UPDATE calculations SET bytes = bytes - ?, texts = texts - ? WHERE seq = ?",
                  (bytes_, texts, seq))
    tx.db.execute("DELETE FROM files WHERE calc = ? AND kind = 'result'", (seq,))


def end_send(call):
    """8. Everything in the manifest has arrived; a success needs at least one of the results that were asked
    for."""
    row = claimed_by_caller(call)
    if call["result"] != "end send":
        raise ApiError(400, "result is \"end send\"")
    if row["state"] == GETTING and (row["results_open"] or row["results_more"]):
        raise FileCall(call, row, "result").incomplete_error()
    changes = none_came(call.relay.store, row) if row["state"] == GETTING else {}
    make_step(call, "end-send", row, got=time.time(), **changes)
    call.relay.claims.leases.pop(row["accept_id"], None)
    return {"message": "got"}


def get_calc_result(call):
    """9. The manifest of the results and how it ended. Kept until finish, and keep_fetched after it."""
    row = calculation_of_caller(call)
    if row["state"] not in OVER:
        raise refused(409, "no-result", why="state", state=WORDS[row["state"]])
    more = call.relay.store.read("SELECT info, missing, refused, verdicts, report, signed FROM calculations"
                                 " WHERE seq = ?", row["seq"])[0]
    kept = json.loads(more["info"])
    report = json.loads(more["report"])
    page = FileCall(call, row, "result").page(0)
    result = {"result_files": page["files"], "missing": json.loads(more["missing"]),
              "refused": json.loads(more["refused"]), "verdicts": json.loads(more["verdicts"]),
              "status": row["status"], "reason": row["reason"], "exit_code": row["exit_code"],
              "signal": row["signal"], "result_names": kept["result_names"],
              "result_patterns": kept["result_patterns"], "command": row["command"], "site": row["site"],
              "signed": more["signed"],
              "started": report.get("started", row["started"]), "ended": report.get("ended", row["ended"]),
              "audit": audit_head_of(call.relay.store, row)}
    gone = FILES_GONE if row["results"] and not call.relay.store.has_files(row) else ""
    return {"message": "result", "result-info": result, "next": page["next"], "gone": gone}


def audit_head_of(source, row):
    """What the poller's audit log ended with when it sent these results; empty where it did not say."""
    notes = source.read("SELECT note FROM events WHERE calc = ? AND attempt = ? AND step = 'send-results'",
                        row["seq"], row["attempt"])
    return json.loads(notes[0][0] or "{}").get("audit", "") if notes else ""


def finish(call):
    """9. The workflow side has everything on its disk."""
    row = calculation_of_caller(call)
    if row["state"] == GOT:
        make_step(call, "finish", row, finished=time.time())
    elif row["state"] != FINISHED:
        raise refused(409, "no-result", why="state", state=WORDS[row["state"]])
    return {"message": "finished"}


def calc_progress(call):
    """How far it is; with `known` (a stamp) it waits up to `wait` seconds for a change."""
    row = cached_calculation(call)
    found = progress_of(call, row)
    if call["known"] == found["stamp"] and time.monotonic() < call.until:
        return Park(("calc", row["accept_id"]))
    return dict(found, accept_id=row["accept_id"],
                message="status:%s" % (row["status"] if call.name == "calc-status" else WORDS[row["state"]]))


def cached_calculation(call):
    """calculation_of_caller(), not asked of the database again while nothing happened to it since the same
    connection asked before."""
    accept_id, relay = call["accept_id"], call.relay
    now = accept_id, call.caller, relay.front.event_count(("calc", accept_id))
    if (len(accept_id) < 36 or call.conn.row is None or call.conn.row[0] != now
            or accept_id in relay.claims.silent):
        call.conn.row = now, calculation_of_caller(call)
    return call.conn.row[1]


def progress_of(call, row):
    """What a waiting workflow side is told. stamp changes whenever any of it does (queue and idle aside)."""
    away = call.relay.claims.silent_seconds(row)
    ahead, written = None, call.relay.quotas.output_sizes(row)
    what = what_of(call.relay, row)
    if row["state"] == ALLOWED:
        ahead = call.relay.store.read("SELECT COUNT(*) FROM (SELECT 1 FROM calculations WHERE site = ? AND"
                                      " state = ? AND user = ? AND seq < ? LIMIT 1000)", row["site"], ALLOWED,
                                      row["user"], row["seq"])[0][0]
    return {"progress": WORDS[row["state"]], "status": row["status"], "wait_allow": row["allowed"],
            "reason": row["reason"], "exit_code": row["exit_code"], "signal": row["signal"],
            "out_of_contact": away, "queue": ahead, "output": written, "what": what,
            "warning": v1_warning(call.relay, row["site"], row["user"], row["needs_v2"])
            if row["state"] == ALLOWED else "",
            "idle": int(call.relay.claims.idle_seconds(row)) if row["state"] == REGISTERED else None,
            "cancelling": bool(row["cancel"]) and row["state"] in STOPPABLE,
            "accept_id": row["accept_id"],
            "stamp": "%d.%d%s%s"
            % (row["version"], sum(written), "" if away is None else "-",
               "%x" % binascii.crc32(utf8(what)) if what else "")}


def what_of(relay, row):
    """Why it waits, or where it is, in the words of who knows it."""
    told = relay.claims.what.get(row["accept_id"], "") if row["state"] in STOPPABLE else ""
    return row["waits"] or told


def read_output(call):
    """What a running command has written so far, from `offset` on; waits up to `wait` seconds for more."""
    row, offset = calculation_of_caller(call, reading=True), call["offset"]
    data, path = b"", call.relay.store.spool(row["accept_id"], "", "live." + call["stream"])
    if os.path.exists(path):
        with open(path, "rb") as text:
            text.seek(offset)
            data = text.read(CHUNK)
    over = row["state"] in RETURNING + OVER
    if not data and not over and time.monotonic() < call.until:
        return Park(("calc", row["accept_id"]))
    return {"message": "output", "offset": offset + len(data), "data": base64.b64encode(data).decode("ascii"),
            "end": over and not data}


def heartbeat(call):
    """Renews the leases of what a poller holds, takes the commands' output, and tells what to cancel and what
    it need not hold any more."""
    answer = {"message": "alive", "cancel": [], "gone": [], "unknown": [], "output": {}}
    call.relay.pollers.hear(call, call["site_id"], call["poller"])
    to_cancel = cancelled_here(call)
    known = rows_of(call, call["calcs"])
    for accept_id, entry in call["calcs"].items():
        if not isinstance(entry, dict):
            raise ApiError(400, "calcs is an object of objects")
        hear_of(call, known.get(accept_id), accept_id, entry, answer)
    # also what it claimed since it began to wait
    answer["cancel"] += [accept_id for accept_id in to_cancel if accept_id not in answer["cancel"]]
    news = answer["cancel"] or answer["gone"] or answer["unknown"] or answer["output"]
    if not news and time.monotonic() < call.until:
        return Park(("poller", call.caller.user, call.need("poller")))
    return answer


def cancelled_here(call):
    """The accept_ids of all that this poller holds and that is to be cancelled."""
    site = call["site_id"]
    if not token_covers(call.caller, site):
        return []
    return [row["accept_id"] for row in call.relay.store.read(
        "SELECT accept_id FROM calculations WHERE site = ? AND %s AND user = ? AND poller = ? AND cancel IS"
        " NOT NULL AND claim IS NOT NULL" % state_in(STOPPABLE),
        site, call.caller.user, call["poller"])]


def hear_of(call, row, accept_id, entry, answer):
    """What a heartbeat says of one calculation (row: None if there is none), and what is to be answered."""
    claims, claim, phase = call.relay.claims, entry.get("claim"), entry.get("phase")
    if row is not None and claims.in_grace() and claims.adopt(row, claim, phase, call.need("poller")):
        row = call.relay.store.read("SELECT %s FROM calculations WHERE accept_id = ?" % BRIEF, accept_id)[0]
    if row is None:
        answer["unknown"].append(accept_id)
    elif not row["claim"] or row["claim"] != claim or row["state"] in OVER:
        answer["gone"].append(accept_id)
    elif phase == "given back" and row["state"] in BEFORE_START:
        claims.lapse(row)
        answer["gone"].append(accept_id)
    else:
        claims.renew(row)
        claims.note_what(row, entry.get("what"))
        claims.note_held(row, entry.get("held"))
        if row["cancel"] and row["state"] in STOPPABLE:
            answer["cancel"].append(accept_id)
        if "out" in entry or "err" in entry:
            answer["output"][accept_id] = [take_output(call, row, stream, entry) for stream in ("out", "err")]


def take_output(call, row, stream, entry):
    """Appends [offset, base64] to what is known of a command's output; how much is known now."""
    path = call.relay.store.spool(row["accept_id"], "", "live." + stream)
    size = os.path.getsize(path) if os.path.exists(path) else 0
    part = entry.get(stream)
    if (isinstance(part, list) and len(part) == 2 and part[0] == size and isinstance(part[1], str)
            and size < LIVE_OUTPUT):
        try:
            data = base64.b64decode(part[1].encode("ascii"), validate=True)
        except ValueError:
            raise ApiError(400, "output is not base64")
        if data:
            try:
                check_bytes(call.relay, call.relay.store, row["user"], len(data))
                check_free(call.relay, len(data))
                make_folder(os.path.dirname(path), utf8(call.relay.store.folder))
                with open(path, "ab", buffering=0) as out:
                    size += out.write(data)
                call.relay.quotas.live[row["user"]] += len(data)
            except (ApiError, OSError) as error:  # want of room must not keep heartbeats from getting through
                log("warn", row["accept_id"], "output", error=error)
            call.relay.front.fire(("calc", row["accept_id"]))
    return size


def cancel_wait_calc(call):
    """Cancels: at once what nobody has claimed; what is claimed when its holder, told by the heartbeat, has
    stopped it. Whoever comes first decides: 409 with why=ended after calc-end."""
    row = calculation_of_caller(call)
    reason = "cancelled: " + reason_given(call, row)
    if row["state"] in RETURNING + OVER:
        if row["reason"].startswith("cancelled"):
            return {"message": "cancelled", "ended": True}
        raise refused(409, "ended", why="ended", state=WORDS[row["state"]])

    def work(tx):
        if move(call.relay, tx, STEP["cancel-wait-calc"], row, status="abnormal", reason=reason,
                got=time.time()):
            return True
        now = tx.db.execute("SELECT %s FROM calculations WHERE seq = ?" % BRIEF, (row["seq"],)).fetchone()
        if now is None or now["state"] not in STOPPABLE:
            raise refused(409, "ended", why="ended", state=WORDS[now["state"]] if now else "")
        if now["protocol"] == 1:
            raise refused(409, "fielded", why="fielded")
        note_cancel(call, tx, row, now, reason)
        tx.after(lambda: log("info", row["accept_id"], "6 cancel", user=row["user"], reason=reason))
        return False

    ended = call.relay.store.write(work, "cancel-wait-calc")
    log("info", row["accept_id"], "2 cancel-wait-calc", by=call.caller.user, reason=reason)
    return {"message": "cancelled", "ended": ended}


def reason_given(call, row):
    """The reason that a person gives for what becomes of a calculation; who it was, where it is not whose it
    is, or where there is no reason."""
    by = "by the workflow side" if call.caller.user == row["user"] else "by an operator"
    why = printable(call["reason"])[:200]
    return "%s (%s)" % (why, by) if why and by == "by an operator" else why or by


def note_cancel(call, tx, row, now, reason):
    """What is claimed is to be cancelled: its poller (now: user, poller) is told by the heartbeat, and who
    waits for news of it at once."""
    tx.db.execute("UPDATE calculations SET cancel = ?, version = version + 1 WHERE seq = ? AND cancel IS NOT"
                  " ?", (reason, row["seq"], reason))
    note_step(tx, row["seq"], now["attempt"], STEP["cancel-wait-calc"], {"reason": reason})
    tx.after(lambda: call.relay.front.fire(("calc", row["accept_id"])))
    tx.after(lambda: call.relay.front.fire(("poller", now["user"], now["poller"])))


def rerun(call):
    """A person's word: the same calculation once more, with a new claim and a new working directory. From
    abnormal before `finish`; with force and a reason also from out of contact: the late result of the old
    claim is then refused."""
    row = calculation_of_caller(call)
    force = bool(call["force"])
    reason = printable(call["reason"])[:200]
    if row["state"] == ALLOWED and row["attempt"]:     # the answer was lost, or it is about to be run again
        return {"message": "allowed again", "signed": order_in_force(call, row)}
    if row["state"] == GOT and row["status"] == "abnormal":
        step = STEP["rerun"]
    elif (row["state"] in STEP["rerun --force"].frm and row["protocol"] != 1 and force and reason
            and row["accept_id"] in call.relay.claims.silent):
        step = STEP["rerun --force"]
    else:
        raise refused(409, why_no_rerun(row), why="state", state=WORDS[row["state"]])

    def work(tx):
        told = {"missing": "{}", "refused": "{}", "verdicts": "{}", "signed": ""}
        count_reasons(tx, row["seq"], told)
        note_step(tx, row["seq"], row["attempt"], step, {"reason": reason_given(call, row)})
        done = move(call.relay, tx, step, row, allowed=time.time(), status="none", reason="", claim=None,
                    take=None, cancel=None,
                    protocol=0, exit_code=None, signal=None, started=None, ended=None, got=None, results=0,
                    results_open=0, results_more=0, manifest=None, report="{}", **told)
        if not done:
            raise ApiError(409, "rerun is not possible now", why="state")
        kept = declared_of(tx, row)
        # a poller runs an attempt beyond one that it has run only if this covers that
        kept["extra"]["rerun"] = row["attempt"]
        if call["signed"]:                             # an order runs once: this one is a new one
            kept["extra"]["signed"] = call["signed"]
        kept = json.dumps(kept, ensure_ascii=False)
        tx.db.execute("UPDATE calculations SET texts = texts + ? - LENGTH(info), info = ? WHERE seq = ?",
                      (len(kept), kept, row["seq"]))
        drop_results(tx, row["seq"])
        for stream in ("out", "err"):       # sooner than anybody can claim it: the next attempt writes from 0
            path = call.relay.store.spool(row["accept_id"], "", "live." + stream)
            if os.path.exists(path):
                os.unlink(path)

    call.relay.store.write(work, "rerun")
    call.relay.claims.leases.pop(row["accept_id"], None)
    call.relay.claims.silent.pop(row["accept_id"], None)
    log("info", row["accept_id"], "2 rerun", by=call.caller.user, reason=reason)
    return {"message": "allowed again", "signed": order_in_force(call, row)}


def order_in_force(call, row):
    """The signed order of a calculation; an older one does not run any more."""
    return declared_of(call.relay.store, row)["extra"].get("signed", "")


def why_no_rerun(row):
    """Why a calculation cannot be run once more as it is, and what to do: a key of REFUSALS."""
    if row["state"] in OVER and row["status"] != "abnormal":
        return "went-well"
    if row["state"] == FINISHED:
        return "was-fetched"
    return "not-run" if row["state"] in UNCLAIMED else "not-ended"


def end_calculation(call):
    """An operator's word: what is out of contact will not come back."""
    row = calculation_of_caller(call)
    if row["state"] not in CLAIMED:
        raise ApiError(409, "end is possible for what is claimed and has not come to its end", why="state",
                       state=WORDS[row["state"]])
    call.relay.claims.lose(
        row, "ended by an operator: " + (printable(call["reason"])[:200] or "no reason given"))
    return {"message": "ended"}


def get_calcinfo(call):
    """The table of calculations that are not finished, for an operator."""
    rows = call.relay.store.read("SELECT %s, registered FROM calculations WHERE state != ? ORDER BY seq"
                                 " LIMIT 100000" % BRIEF, FINISHED)
    return {"message": "calcinfo",
            "calculations": {row["accept_id"]: {
        "user": row["user"], "site": row["site"], "command": row["command"], "accept_time": row["registered"],
        "calc_progress": WORDS[row["state"]], "calc_status": row["status"],
        "wait_allow": row["allowed"] or "none"} for row in rows if token_covers(call.caller, row["site"])}}


def check_origin(call):
    """403 for what a browser sends for another page than ours: behind a gateway that knows its users by a
    cookie it would come in their names. No other page can add this header without asking first, and we never
    agree to it."""
    site = call.headers.get("sec-fetch-site", "none")
    if ("origin" in call.headers or site != "none") and call.headers.get("x-mi-page") != "1":
        raise ApiError(403, "a browser's call is taken from the relay's own page only", why="origin")


def reload_ini(call):
    """Reads the ini again; a broken one is refused and the old one stays."""
    try:
        call.relay.reload()
    except Stop as stop:
        raise ApiError(400, str(stop), why="ini")
    return {"message": "reloaded"}


def version_answer(relay, authenticated):
    """What a client learns from one request without a token; free space only with one."""
    limits = relay.conf["limits"]
    found = {"version": 2, "instance": relay.instance, "max_body": limits["max_body"],
             "wait": relay.conf["times"]["wait"], "max_file": limits["max_file"],
             "max_files": limits["max_files"], "page": PAGE, "pack_file": PACK_FILE, "dirs": True,
             "lanes": limits["lanes_per_token"], "packed": True, "time": round(time.time(), 3)}
    if authenticated:
        found["free"] = relay.store.free()
    return found


def rows_of(call, ids):
    """{accept_id: row} of those calculations that exist for this caller; of at most LISTED. 413 for more."""
    found, ids, store = {}, list(ids), call.relay.store
    if len(ids) > LISTED:
        raise ApiError(413, "more than %d calculations in one call" % LISTED, why="work")
    call.relay.quotas.charge(call, ROW_WORK * len(ids))
    for at in range(0, len(ids), 500):
        part = ids[at:at + 500]
        rows = store.read("SELECT %s FROM calculations WHERE user = ? AND accept_id IN (%s)"
                          % (BRIEF, ", ".join("?" * len(part))), call.caller.user, *part)
        found.update((row["accept_id"], row) for row in rows if token_covers(call.caller, row["site"]))
    return found


def check_page(page, before=None, reserved=()):
    """A page of a manifest {NAME: {size, sha256, x?, mtime?}} as a list of (name, size, sha256, x, mtime),
    where x (1 or None) says that its owner may execute it and mtime (seconds, or None) when it was changed. A
    name with a trailing / is an empty directory; they come last. 400 if anything in it is not as it should
    be."""
    if not isinstance(page, dict) or len(page) > PAGE:
        raise ApiError(400, "a manifest page is an object of at most %d names" % PAGE)
    try:
        check_manifest_names(page, before, reserved, folders=True)
    except ValueError as error:
        raise ApiError(400, str(error), why="name")
    return [checked_entry(name, entry) for name, entry in page.items()]


def checked_entry(name, entry):
    """One entry of check_page()."""
    size, sum256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if (type(size) is not int or not 0 <= size < 1 << 60 or not isinstance(sum256, str)
            or not re.match(r"[0-9a-f]{64}\Z", sum256)):
        raise ApiError(400, "size or sha256 of %s" % name)
    if name.endswith("/") and (size, sum256) != (0, NOTHING):
        raise ApiError(400, "%s is a directory: size 0 and the sum of nothing" % name)
    mtime = entry.get("mtime")
    if mtime is not None and not (type(mtime) in (int, float) and abs(mtime) < 1 << 40):
        raise ApiError(400, "mtime of %s" % name)
    return name, size, sum256, 1 if entry.get("x") is True else None, mtime


def names_and_sums(entries):
    """What tells one manifest from another: name, size, sum of each file. (Marks and empty directories may
    change without another result.)"""
    return [entry[:3] for entry in entries if not entry[0].endswith("/")]


def insert_page(tx, seq, kind, first, entries, more, blob=None):
    """Adds a checked page to a calculation's manifest. blob: all of its files are in it, back to back."""
    rows, at = [], 0
    for n, entry in enumerate(entries):
        is_folder = entry[0].endswith("/")
        place = (True, None, 0) if is_folder else (bool(blob), blob, at)
        rows.append((seq, kind, first + n) + entry + place)
        at += entry[1]
    tx.db.executemany("INSERT INTO files (calc, kind, n, name, size, sha256, x, mtime, done, blob, at)"
                      " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    field = COUNTED[kind]
    tx.db.execute("UPDATE calculations SET %s = ?, %s_open = %s_open + ?, %s_more = ?, bytes = bytes + ?,"
                  " texts = texts + ?, touched = ? WHERE seq = ?" % (field, field, field, field),
                  (first + len(entries), sum(not row[8] for row in rows), more,
                   sum(entry[1] for entry in entries), room_of_names(entries), time.time(), seq))


def room_of_names(entries):
    """Bytes, about, that these entries of a manifest take in the database."""
    return sum(len(entry[0]) + ENTRY for entry in entries)


def take_inline(call, accept_id, kind, page, entries):
    """The files of a checked page of a manifest that brings all of them along (`data`, base64), in one blob
    of the spool, on disk before this returns: the blob's name; None if it does not. 422 names those whose sum
    is another."""
    brought = [entry for entry in entries if not entry[0].endswith("/")]
    if not brought or not all("data" in page[entry[0]] for entry in brought):
        return None
    try:
        parts = [binascii.a2b_base64(page[entry[0]]["data"].encode("ascii")) for entry in brought]
    except (AttributeError, ValueError):
        raise ApiError(400, "data is base64")
    wrong = [n for n, (entry, data) in enumerate(zip(brought, parts))
             if len(data) != entry[1] or hashlib.sha256(data).hexdigest() != entry[2]]
    if wrong:
        raise ApiError(422, "%d files lack their sha256" % len(wrong), why="sum", wrong=wrong[:LISTED])
    folder, blob = call.relay.store.spool(accept_id, kind), "%06dp%s" % (0, os.urandom(4).hex())
    make_folder(folder, utf8(call.relay.store.folder))
    with open(os.path.join(folder, utf8(blob)), "xb", buffering=0) as out:
        write_gathered(out, [(n, 0, data) for n, data in enumerate(parts)])
        os.fsync(out.fileno())
    sync_path(folder)
    fault("files synced")
    return blob


def check_room(relay, entries, files_before=0):
    """Limits and free disk for these entries, before a byte moves: 413 over a limit, 507 when the disk would
    become too full. Their bytes."""
    total = check_sizes(relay, entries, files_before)
    check_free(relay, total)
    return total


def check_sizes(relay, entries, files_before=0):
    """413 if these entries are over a limit; otherwise their bytes."""
    limits = relay.conf["limits"]
    for name, length in (entry[:2] for entry in entries):
        if limits["max_file"] and length > limits["max_file"]:
            raise refused(413, "max_file", {"name": name, "count": length, "most": limits["max_file"]})
    if limits["max_files"] and files_before + len(entries) > limits["max_files"]:
        raise refused(413, "max_files", {"most": limits["max_files"]})
    return sum(entry[1] for entry in entries)


def check_free(relay, total):
    """507 if so many bytes would make the disk too full."""
    store = relay.store
    if (store.free() - relay.quotas.reserved - sum(relay.quotas.arriving.values()) - total
            < store.bytes_to_keep_free(relay.conf["limits"]["spool_free"])):
        raise store.no_room(total)


def check_margin(relay, size):
    """507 if half of what is to stay free is used up: small files cost more, in blocks and inodes, than the
    bytes that were looked at when they were declared, and whoever declares very many of them would fill the
    disk."""
    if relay.store.free() < relay.store.bytes_to_keep_free(relay.conf["limits"]["spool_free"]) // 2:
        raise relay.store.no_room(size)


# ==== files ====
FILES = re.compile(r"files/([0-9a-f-]{36})/(input|result)(?:/(\d{1,7}|pack))?\Z")
PIECES_PATH = re.compile(r"v2/(pieces|missing)/([0-9a-f-]{36})/(input|result)/(\d{1,7})\Z")
MOST_GAPS = 1000               # that one answer names
TRANSFER_IDLE = 2              # seconds after which a transfer that is not heard of has no connections


def files_call(act):
    """The call that does act (a method of FileCall) with the files of its path, files/ACCEPT_ID/KIND..."""
    def run(call):
        call.fields["accept_id"], kind, which = call.parts
        return act(FileCall(call, row_for_files(call, kind), kind, which))
    return run


def row_for_files(call, kind):
    """The calculation whose files a call reads, or writes. 403 if that is not this role's, 404 for files that
    are gone, 409 in another state."""
    reading = reads_files(call)
    remote = reading if kind == "input" else not reading         # whose side of the file this is
    call.check_role(REMOTE if remote else WORKFLOW)
    row = claimed_by_caller(call) if remote else calculation_of_caller(call)
    if not reading and row["state"] != (REGISTERED if kind == "input" else GETTING):
        raise ApiError(409, "files are not taken now", why="state", state=WORDS[row["state"]])
    if reading and kind == "result" and row["state"] not in OVER:
        raise refused(409, "no-result", why="state", state=WORDS[row["state"]])
    if call.place != FILE_LIST and row["state"] == FINISHED and not call.relay.store.has_files(row):
        raise ApiError(404, FILES_GONE, why="room")
    return row


def reads_files(call):
    """Does a call read files? (Who asks how much of one is there writes it.)"""
    asks = call.place == MISSING or call.place == FILE and "offset" in call.fields
    return call.method == "GET" and not asks


class FileCall:
    """A call that reads or writes the inputs or the results of one calculation."""

    def __init__(self, call, row, kind, which=None):
        self.call = call
        self.relay = call.relay
        self.row = row                                 # of the calculation
        self.kind = kind                               # `input` or `result`
        self.files = row["seq"], kind                  # by which the database knows them
        self.folder = call.relay.store.spool(row["accept_id"], kind)
        # the row of the one that the path names
        self.found = self.find(int(which)) if which not in (None, "pack") else None

    def find(self, n):
        """The row of a file. 404 if there is none of this number."""
        found = self.relay.store.read("SELECT n, size, sha256, done, blob, at FROM files WHERE calc = ? AND"
                                      " kind = ? AND n = ?", *self.files + (n,))
        if not found:
            raise ApiError(404, "no file %s" % self.call.parts[2])
        return found[0]

    def page(self, first):
        """One page of a manifest as it goes over the wire: {"files": {...}, "next": number or None}. Empty
        directories are told to those who say that they know them (`dirs`); they are the last, so that nobody
        counts otherwise. Few small files come along with it, as `data`, to those who ask for that."""
        rows = self.relay.store.read("SELECT n, name, size, sha256, x, mtime, done, blob, at FROM files WHERE"
                                     " calc = ? AND kind = ? AND n >= ?%s ORDER BY n LIMIT ?"
                                     % ("" if self.call["dirs"] else " AND name NOT LIKE '%/'"),
                                     *self.files + (first, ANSWER_PAGE + 1))
        files = collections.OrderedDict((found["name"], {"size": found["size"], "sha256": found["sha256"]})
                                        for found in rows[:ANSWER_PAGE])
        for found in rows[:ANSWER_PAGE]:
            marks = {"x": bool(found["x"]), "mtime": found["mtime"]}
            files[found["name"]].update((key, value) for key, value in marks.items()
                                        if value is not None and value is not False)
        few = self.call["data"] and len(rows) <= INLINE_FILES
        if few and sum(found["size"] for found in rows) <= INLINE:
            self.add_data(rows, files)
        return {"files": files, "next": rows[ANSWER_PAGE]["n"] if len(rows) > ANSWER_PAGE else None}

    def add_data(self, rows, files):
        """Their bytes beside the names of a manifest's files: base64, as they are in the spool. What is not
        there (any more) goes without."""
        for found in rows:
            if not found["done"] or found["blob"] is None:
                continue
            try:
                with open(self.spool(found["blob"]), "rb") as source:
                    source.seek(found["at"])
                    data = source.read(found["size"])
            except OSError:
                continue
            files[found["name"]]["data"] = base64.b64encode(data).decode("ascii")

    def spool(self, blob):
        """The path of a blob of these files."""
        return self.relay.store.spool(self.row["accept_id"], self.kind, blob)

    def place_in_spool(self):
        """(the path, the first byte there) of a file that is read. 409 for what is not complete, and for
        directories."""
        if not self.found["done"] or self.found["blob"] is None:
            raise ApiError(409, "the file is not complete, or a directory", why="incomplete")
        return self.spool(self.found["blob"]), self.found["at"]

    def incomplete_error(self):
        """409 that lists the files that are not complete."""
        rows = self.relay.store.read("SELECT n FROM files WHERE calc = ? AND kind = ? AND done = 0 ORDER BY n"
                                     " LIMIT ?", *self.files + (LISTED,))
        more = bool(self.row[COUNTED[self.kind] + "_more"])
        return ApiError(409, "not all files are complete", why="incomplete",
                        incomplete=[found["n"] for found in rows], more=more)

    def give_page(self):
        """A page of the manifest."""
        return dict(self.page(self.call["from"]), message="files")

    def add_page(self):
        """A further page of a manifest; one that is there already is answered again."""
        first, page, row, kind = self.call["from"], self.call["files"], self.row, self.kind
        before = self.relay.store.read("SELECT name FROM files WHERE calc = ? AND kind = ? AND n = ?",
                                       *self.files + (first - 1,))
        entries = check_page(page, before[0]["name"] if before else None,
                             LOG_NAMES if kind == "input" else ())
        if kind == "result":
            check_results(self.call, row, entries)
        total = check_room(self.relay, entries, first)

        def work(tx):
            now = tx.db.execute("SELECT %s FROM calculations WHERE seq = ?" % BRIEF,
                                (row["seq"],)).fetchone()
            if now is None or now["state"] != row["state"] or now["claim"] != row["claim"]:
                raise ApiError(409, "files are not taken now", why="state")
            have, more = now[COUNTED[kind]], now[COUNTED[kind] + "_more"]
            if first + len(entries) <= have and entries:
                rows = tx.db.execute("SELECT name, size, sha256 FROM files WHERE calc = ? AND kind = ? AND n"
                                     " >= ? ORDER BY n LIMIT ?", self.files + (first, len(entries)))
                if [tuple(found) for found in rows] == [entry[:3] for entry in entries]:
                    return
            if have != first or not more:
                raise ApiError(409, "the next page starts at %d" % have, why="page", **{"from": have})
            if kind == "input":
                check_bytes(self.relay, tx, row["user"], total + room_of_names(entries))
            insert_page(tx, row["seq"], kind, first, entries, bool(self.call["more"]))

        self.relay.store.write(work, "files page")
        return {"message": "listed", "from": max(row[COUNTED[kind]], first + len(entries))}

    def take_pieces(self):
        """Pieces of a file, in any order: each that has its sum is there from then on. The answer to those
        that make it whole comes when it is on disk and its own sum is right."""
        first, last = self.span()
        if self.found["done"]:
            return self.received(True)
        upload = self.upload_to_write(LaneUpload)
        upload.let_in(self.call["transfer"])
        try:
            self.put_pieces(upload, first, last)
            with upload.lock:
                upload.check_writer(self.call["transfer"])
                ends = upload.pieces.is_whole() and not upload.ending
                upload.ending = upload.ending or ends
            return self.end_pieces(upload) if ends else self.received(False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self.relay.store.no_room(self.found["size"])
            raise

    def span(self):
        """(first byte, first byte behind) of the pieces that a call is about, whole ones. 400 otherwise."""
        first, size = self.call["offset"], self.found["size"]
        last = first + self.call["size"]
        if first % PIECE_SIZE or last > size or last % PIECE_SIZE and last != size:
            raise ApiError(400, "pieces begin and end at multiples of %d, or at the file's end" % PIECE_SIZE)
        return first, last

    def put_pieces(self, upload, first, last):
        """The call's body, frames of pieces, into their places."""
        if not first:
            check_margin(self.relay, self.found["size"])
        read, writer = self.call.exact_reader(), self.call["transfer"]
        for at in range(first, last, PIECE_SIZE):
            self.call.authenticate_again()
            try:
                data, sum256 = read_frame(lambda count: read(self.left_for(count)),
                                          min(PIECE_SIZE, last - at))
            except ValueError as error:
                raise ApiError(422, "piece at byte %d: %s" % (at, error), why="piece", offset=at)
            with upload.lock:
                upload.check_writer(writer)
                upload.pieces.put(at // PIECE_SIZE, data, sum256)
            upload.pieces.move_on(2)
            upload.touched = time.monotonic()
            self.relay.claims.touch(self.row)
            self.relay.transfers.note(self.call)
            fault("files piece")
        if self.call.unread:
            raise ApiError(400, "more than these pieces")

    def left_for(self, count):
        """count, if so much is left of the body. ValueError otherwise."""
        if count > self.call.unread:
            raise ValueError("the body ends within it")
        return count

    def end_pieces(self, upload):
        """All pieces are there: the file goes to its place."""
        key = self.files + (self.found["n"],)
        try:
            upload.pieces.move_on()
            with open(upload.path, "ab", buffering=0) as out:          # an empty file has had no piece
                self.end_upload(upload, out, self.call["transfer"])
            return self.received(True)
        finally:
            with self.relay.beginning_of(key):
                if self.relay.uploads.get(key) is upload:
                    del self.relay.uploads[key]
                    drop_sums(upload.path)

    def received(self, complete):
        """The answer about pieces that have come."""
        return {"message": "complete" if complete else "received", "complete": complete,
                "lanes": self.relay.transfers.grant(self.call)}

    def tell_missing(self):
        """Which parts of a file are missing: [[first byte, first behind]], the first MOST_GAPS of them."""
        if self.found["done"]:
            return dict(self.received(True), missing=[])
        upload = self.upload(LaneUpload)
        return dict(self.received(False), missing=list(itertools.islice(upload.pieces.gaps(), MOST_GAPS)))

    def give_pieces(self):
        """Pieces of a file, as frames."""
        first, last = self.span()
        path, begin = self.place_in_spool()

        def pieces():
            with open(path, "rb", buffering=0) as source:
                for at in range(first, last, PIECE_SIZE):
                    yield pread_exactly(source.fileno(), min(PIECE_SIZE, last - at), begin + at)

        def frames():
            return packed or (part for data in pieces() for part in frame(data))

        packed = None
        if self.call["packed"] and last - first <= PACKED_RUN and self.relay.packing.acquire(timeout=0.5):
            try:                                       # else the processor is the limit
                packed = packed_frames(pieces())
            finally:
                self.relay.packing.release()
        length = (sum(map(len, packed)) if packed
                  else last - first + -(-(last - first) // PIECE_SIZE) * FRAME_MORE)
        lanes = self.relay.transfers.grant(self.call)
        return FileAnswer(frames, length, [("X-MI-Lanes", lanes)], 200, None,
                          lambda: (self.relay.claims.touch(self.row), self.relay.transfers.note(self.call)))

    def take_piece(self):
        """Appends a piece. The answer to the last one comes when the file is on disk and its sum is right."""
        size = self.found["size"]
        if self.found["done"]:
            return {"message": "complete", "offset": size, "complete": True}
        upload = self.upload_to_write(Upload)
        with upload.lock:
            upload.check_open()
            upload.owner = self.call                   # whoever wrote before stops at its next chunk
            offset = upload.offset
        if self.call["offset"] != offset or self.call.length > size - offset:
            raise ApiError(409, "the file goes on at %d of %d" % (offset, size), why="offset", offset=offset)
        if not offset:
            check_margin(self.relay, size)
        try:
            with upload.lock:                          # nobody makes a part that nobody waits for
                upload.check_writer(self.call)
                out = open(upload.path, "ab", buffering=0)
            with out:
                self.append_body(upload, out)
                with upload.lock:
                    if upload.offset < size:
                        return {"message": "received", "offset": upload.offset, "complete": False}
                    upload.check_writer(self.call)
                    upload.ending = True
                return self.end_upload(upload, out, self.call)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.relay.uploads.pop(self.files + (self.found["n"],), None)
                raise self.relay.store.no_room(size - upload.offset)
            raise
        finally:
            if upload.ending and upload.owner is self.call:
                self.relay.uploads.pop(self.files + (self.found["n"],), None)

    def append_body(self, upload, out):
        """The body of the call behind what is there of the file, as it comes."""
        for view in self.call.body_views():
            with upload.lock:
                upload.check_writer(self.call)
                if out.write(view) != len(view):
                    os.ftruncate(out.fileno(), upload.offset)        # another request may go on from here
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                upload.digest.update(view)
                upload.offset += len(view)
            if time.monotonic() > upload.touched + 1:
                upload.touched = time.monotonic()
                self.relay.claims.touch(self.row)
        self.relay.claims.touch(self.row)
        fault("files piece")

    def upload_offset(self):
        """How much of a file is there."""
        offset = self.found["size"] if self.found["done"] else self.upload(Upload).offset
        return {"message": "offset", "offset": offset, "complete": bool(self.found["done"])}

    def upload(self, kind):
        """The Upload, or LaneUpload, of a file, made from what is on disk if this process does not know it
        yet. One of the other kind ends: what it has counts as far as this one knows it."""
        key, uploads = self.files + (self.found["n"],), self.relay.uploads
        with self.relay.beginning_of(key):
            upload = uploads.get(key)
            if upload is not None and type(upload) is not kind:
                upload.check_open()
                upload.end()
                upload = None
            if upload is None:
                make_folder(self.folder, utf8(self.relay.store.folder))
                upload = uploads[key] = kind(os.path.join(self.folder, b"%06d.part" % key[2]),
                                              self.found["size"])
        upload.touched = time.monotonic()
        return upload

    def upload_to_write(self, kind):
        """The same. 503 if the file is not lacking any more, for the manifest and the claim by which the call
        asked: what ends that sees the call's Upload, or is seen here: see Relay.forget_uploads()."""
        upload, row = self.upload(kind), self.row
        if not self.relay.store.read(
                "SELECT 1 FROM calculations c JOIN files f ON f.calc = c.seq WHERE c.seq = ? AND c.state = ?"
                " AND c.claim IS ? AND c.manifest IS ? AND f.kind = ? AND f.n = ? AND f.done = 0", row["seq"],
                row["state"], row["claim"], row["manifest"], self.kind, self.found["n"]):
            raise ApiError(503, "the file is not taken any more; ask again")
        return upload

    def end_upload(self, upload, out, writer):
        """All of a file is there: puts it in its place, durably, or drops it if its sum is another (422)."""
        n, size = self.found["n"], self.found["size"]
        good = upload.digest.hexdigest() == self.found["sha256"] and os.fstat(out.fileno()).st_size == size
        if good:
            os.fsync(out.fileno())
        blob = "%06d" % n
        with upload.lock:
            upload.check_writer(writer)
            if not good:
                os.unlink(upload.path)
                raise ApiError(422, "the file lacks its sha256; dropped, from 0 again", why="sum", wrong=[n],
                               offset=0)
            os.rename(upload.path, self.spool(blob))
        self.note_complete(blob, [(n, 0)])
        return {"message": "complete", "offset": size, "complete": True}

    def note_complete(self, blob, placed):
        """Files [(number, place in the blob)] are on disk: notes it, durably."""
        sync_path(self.folder)
        fault("files synced")
        field, row = COUNTED[self.kind] + "_open", self.row

        def work(tx):
            now = tx.db.execute("SELECT state, claim, manifest FROM calculations WHERE seq = ?",
                                (row["seq"],)).fetchone()
            if (now is None
                    or (now["state"], now["claim"], now["manifest"])
                    != (row["state"], row["claim"], row["manifest"])):
                raise ApiError(409, "files are not taken now", why="state")
            count = 0
            for n, at in placed:
                count += tx.db.execute("UPDATE files SET done = 1, blob = ?, at = ? WHERE calc = ? AND kind ="
                                       " ? AND n = ? AND done = 0", (blob, at) + self.files + (n,)).rowcount
            tx.db.execute("UPDATE calculations SET %s = %s - ?, touched = ?, waits = '' WHERE seq = ?"
                          % (field, field), (count, time.time(), row["seq"]))

        self.relay.store.write(work, "files")

    def take_pack(self):
        """Files N, N+1, ... back to back in one body: one blob, one fsync, one transaction. 422 names the
        wrong ones; then none is kept."""
        first, count = self.call["from"], self.call["count"]
        rows = self.relay.store.read("SELECT n, size, sha256, done FROM files WHERE calc = ? AND kind = ? AND"
                                     " n >= ? AND n < ? ORDER BY n",
                                     *self.files + (first, first + min(count, 20000)))
        if (not rows or len(rows) != count or any(found["size"] > PACK_FILE for found in rows)
                or sum(found["size"] for found in rows) != self.call.length):
            raise ApiError(400, "a pack is files from..from+count-1 of the manifest, each of at most %d"
                                " bytes, in full" % PACK_FILE)
        if all(found["done"] for found in rows):
            return {"message": "complete", "complete": True}
        make_folder(self.folder, utf8(self.relay.store.folder))
        # a new one each time: nothing that is noted is ever written over
        blob = "%06dp%s" % (first, os.urandom(4).hex())
        wrong = self.write_pack(rows, self.spool(blob))
        if wrong:
            os.unlink(self.spool(blob))
            raise ApiError(422, "%d files lack their sha256" % len(wrong), why="sum", wrong=wrong[:LISTED])
        at, placed = 0, []
        for found in rows:
            placed.append((found["n"], at))
            at += found["size"]
        try:
            self.note_complete(blob, placed)
        except ApiError:                               # it is not noted
            remove_blob(self.folder, utf8(blob))
            raise
        return {"message": "complete", "complete": True}

    def write_pack(self, rows, path):
        """A pack's body into the file at path, durably; the numbers of the files whose sum is another. 507
        where there is no room; the file is gone then."""
        wrong, placed, at = [], [], 0
        try:
            with open(path, "xb", buffering=0) as out:
                source = self.call.exact_reader()
                for found in rows:
                    data = source(found["size"])
                    if hashlib.sha256(data).hexdigest() != found["sha256"]:
                        wrong.append(found["n"])
                    placed.append((found["n"], at, data))
                    at += len(data)
                    if len(placed) % 512 == 0 or at - placed[0][1] > CHUNK:
                        write_gathered(out, placed)
                write_gathered(out, placed)
                if not wrong:
                    os.fsync(out.fileno())
        except BaseException as error:
            os.unlink(path)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self.relay.store.no_room(self.call.length)
            raise
        return wrong

    def give_file(self):
        """A file as bytes, from where Range says; ETag is its sha256. To who writes it (`offset`): how much
        of it is there."""
        if "offset" in self.call.fields:
            return self.upload_offset()
        path, begin = self.place_in_spool()
        start, size, tag = 0, self.found["size"], '"%s"' % self.found["sha256"]
        asked = re.match(r"bytes=(\d{1,15})-\Z", self.call.headers.get("range", ""))
        if asked and self.call.headers.get("if-range", tag) == tag:
            start = int(asked.group(1))
            if start >= size:
                raise ApiError(416, "the file has %d bytes" % size)
        headers = [("ETag", tag), ("Accept-Ranges", "bytes")]
        if start:
            headers.append(("Content-Range", "bytes %d-%d/%d" % (start, size - 1, size)))
        return FileAnswer([(path, begin + start, size - start)], size - start, headers, 206 if start else 200,
                          moved=lambda: self.relay.claims.touch(self.row))

    def give_pack(self):
        """Files N, N+1, ... back to back, whole ones, up to max_body or the first large one."""
        first, segments, total = self.call["from"], [], 0
        rows = self.relay.store.read("SELECT n, size, done, blob, at FROM files WHERE calc = ? AND kind = ?"
                                     " AND n >= ? ORDER BY n LIMIT ?",
                                     *self.files + (first, min(PACK_FILES, self.call["count"])))
        for found in rows:
            if (found["size"] > PACK_FILE or not found["done"] or found["blob"] is None
                    or total + found["size"] > self.relay.conf["limits"]["max_body"]):
                break
            path = self.spool(found["blob"])
            if segments and segments[-1][0] == path and segments[-1][1] + segments[-1][2] == found["at"]:
                segments[-1] = (path, segments[-1][1], segments[-1][2] + found["size"])
            else:
                segments.append((path, found["at"], found["size"]))
            total += found["size"]
        if not segments:
            raise ApiError(400, "no pack starts at file %d" % first)
        return FileAnswer(segments, total, [], 200, moved=lambda: self.relay.claims.touch(self.row))


class Arriving:
    """A file that is arriving, and who writes it (the newest wins)."""

    def __init__(self, path):
        self.path = path
        self.owner = None                              # who writes: a Call, or the name of a transfer
        self.touched = time.monotonic()
        self.lock = threading.Lock()                   # of whatever says who writes, and of the file
        self.ending = False                            # somebody has all of it and puts it in its place

    def check_open(self):
        """503 while it is put in its place."""
        if self.ending:
            raise ApiError(503, "the file is being completed; ask again")

    def end(self):
        """Nobody writes it any more."""
        with self.lock:
            self.owner, self.ending = None, True


class Upload(Arriving):
    """One that comes byte by byte: how far it is, and its running sum. Its owner is the newest request."""

    def __init__(self, path, size):
        Arriving.__init__(self, path)
        self.offset = 0                                # bytes that are there; under the lock, too
        self.digest = hashlib.sha256()                 # of them
        cut_to_front(path, size)
        try:         # after a restart a partial file counts as far as it is there; the sum decides in the end
            with open(path, "rb") as have:
                for data in iter(lambda: have.read(CHUNK), b""):
                    self.digest.update(data)
                    self.offset += len(data)
        except FileNotFoundError:
            pass

    def check_writer(self, call):
        """409 if a newer request writes this file, or it is not taken any more."""
        if self.owner is not call:
            raise ApiError(409, "a newer request writes this file", why="offset", offset=self.offset)


class LaneUpload(Arriving):
    """One that comes in pieces, in any order, over several connections. Its owner is the newest transfer."""

    def __init__(self, path, size):
        Arriving.__init__(self, path)
        self.pieces = Pieces(path, size)
        self.former = collections.deque((), 16)        # the transfers before its owner

    @property
    def digest(self):
        """The running sum."""
        return self.pieces.digest

    def let_in(self, transfer):
        """A transfer begins, or goes on. 503 while the file is put in its place, 409 if a newer one
        writes."""
        with self.lock:
            self.check_open()
            if transfer in self.former:
                raise ApiError(409, "a newer transfer writes this file", why="transfer")
            if transfer != self.owner:
                self.former.append(self.owner)
                self.owner = transfer

    def check_writer(self, transfer):
        """409 if a newer transfer writes this file, or it is not taken any more."""
        if self.owner != transfer:
            raise ApiError(409, "a newer transfer writes this file", why="transfer")


class Transfers:
    """Over how many connections those may go on who move pieces now."""

    def __init__(self, relay):
        self.relay = relay
        self.lock = threading.Lock()
        self.heard = {}                                # {key of a token: {transfer: when it was heard of}}

    def note(self, call):
        """It goes on."""
        now = time.monotonic()
        with self.lock:
            mine = self.heard.setdefault(call.caller.key, collections.OrderedDict())
            mine.pop(call["transfer"], None)
            mine[call["transfer"]] = now
            if len(mine) > 1000:                       # who gives each call another name has no more of it
                mine.popitem(last=False)

    def grant(self, call):
        """How many connections this call's transfer may use: its part of lanes_per_token, and of the workers
        that move data (of those, half is for what goes over one connection)."""
        self.note(call)
        limits, now = self.relay.conf["limits"], time.monotonic()
        with self.lock:
            for key, mine in list(self.heard.items()):
                while mine and now - next(iter(mine.values())) > TRANSFER_IDLE:
                    mine.popitem(last=False)
                if not mine:
                    del self.heard[key]
            mine = len(self.heard[call.caller.key])
            share = limits["workers"] * 3 // 8 // len(self.heard)
            return max(1, min(limits["lanes_per_token"], share) // mine)


def write_gathered(out, placed):
    """Writes what is gathered of a pack, and forgets the data."""
    data = b"".join(part[2] for part in placed)
    if out.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    placed[:] = []


# ==== who may ====
VIEWER, METRICS = "viewer", "metrics"                  # of who only looks: at all there is; at figures
ROLES = (WORKFLOW, REMOTE, OPERATOR, VIEWER, METRICS)
LOGIN, CODE = 1, 2             # tokens.login: of a password; a code, which is no token (0: a token as issued)
# who a token stands for; sites (): any; key: for counting
Caller = collections.namedtuple("Caller", "user roles sites expires key")


def token_covers(who, site):
    """Is the token good for this site?"""
    return not who.sites or site in who.sites


def check_site(call, site, code=400, http=400):
    """Refuses a site that is not one of the token's (in words of its own; the fielded calls have none), or
    that the ini does not name."""
    if code == 400 and not token_covers(call.caller, site):        # whether there is such a site is not told
        why = "not for site %s, only for %s" % (printable(site)[:100], " ".join(call.caller.sites))
        raise refused(403, "not-for-site", why=why,
                      told={"name": printable(site)[:100], "sites": " ".join(call.caller.sites)})
    if (not isinstance(site, str) or site not in call.relay.conf["RemoteSites"]["remote_site_ids"]
            or not token_covers(call.caller, site)):
        raise unknown_site(site, code, http)


def unknown_site(site, code=400, http=400):
    """The refusal of a site that the ini does not name, in the manual's words."""
    return ApiError(
        code, "Your site-id(%s) does not match in the list that acceptable to." % printable(site)[:200], http)


def login(call):
    """A user's password for a token that ends after login_hours. Whether the user or the password is wrong is
    not told."""
    relay, user, address = call.relay, call["user"][:200], call.conn.address
    found = relay.store.read("SELECT password, roles, sites, known FROM users WHERE name = ?", user)
    known = found[0]["known"].split() if found else []
    relay.access.check_failures(user, address, address in known)
    kept = found[0]["password"] if found else "%d$00$" % ROUNDS      # takes as long
    if not password_matches(call["password"], kept) or not found:
        relay.access.count_failure(user, address)
        log("warn", None, "login", refused="user or password is wrong", user=user, address=address)
        raise refused("0005", "login", http=403, why="login")
    relay.access.forgive(user, address, address in known)
    secret, now = os.urandom(32).hex(), time.time()
    expires = now + 3600 * relay.conf["times"]["login_hours"]

    def work(tx):
        tx.db.execute("INSERT INTO tokens (hash, user, roles, sites, issued, expires, login) SELECT ?, name,"
                      " roles, sites, ?, ?, 1 FROM users WHERE name = ?",
                      (hashlib.sha256(secret.encode()).hexdigest(), now, expires, user))
        tx.db.execute("DELETE FROM tokens WHERE login = 1 AND user = ? AND number NOT IN (SELECT number FROM"
                      " tokens WHERE login = 1 AND user = ? ORDER BY number DESC LIMIT ?)",
                      (user, user, LOGINS_KEPT))
        tx.db.execute("UPDATE users SET known = ? WHERE name = ?",
                      (" ".join([address]
                                + [other for other in known if other != address][:KNOWN_ADDRESSES - 1]),
                       user))

    relay.store.write(work, "login")
    log("info", None, "login", user=user, address=address)
    return {"message": "logged in", "token": secret, "expires": expires, "roles": found[0]["roles"],
            "sites": found[0]["sites"]}


def redeem(call):
    """The one-use code of a kit for a token that its host has made: of that only the sum is told. Whoever
    asks again with the same sum, because the answer was lost, is answered again."""
    relay, hashed, now = call.relay, call["hash"], time.time()
    code = hashlib.sha256(utf8(call["code"])).hexdigest()
    if not re.match("[0-9a-f]{64}\\Z", hashed):
        raise ApiError(400, "hash is the sha256 of a token")
    if not relay.store.read("SELECT 1 FROM tokens WHERE hash = ? AND login = ?", code, CODE):
        log("warn", None, "enroll", refused="unknown code", address=call.conn.address)
        raise ApiError("0005", "this code is not known here", http=403, why="code")
    until = now + 86400 * relay.conf["times"]["token_days"]

    def work(tx):
        row = tx.db.execute("SELECT * FROM tokens WHERE hash = ? AND login = ?", (code, CODE)).fetchone()
        known = tx.db.execute("SELECT * FROM tokens WHERE hash = ?", (hashed,)).fetchone()
        check_code(row, known, call["role"], call["site"], now)
        if row["used"] is None:
            tx.db.execute("UPDATE tokens SET used = ?, revoked = ? WHERE number = ?",
                          (now, now, row["number"]))
            tx.db.execute("INSERT INTO tokens (hash, user, roles, sites, issued, expires) VALUES (?, ?, ?,"
                          " ?, ?, ?)", (hashed, row["user"], row["roles"], row["sites"], now, until))
        return row, until if row["used"] is None else known["expires"]

    try:
        row, expires = relay.store.write(work, "redeem")
    except ApiError as error:
        log("warn", None, "enroll", refused=error, address=call.conn.address)
        raise
    log("info", None, "enroll", user=row["user"], roles=row["roles"], sites=row["sites"] or "*",
        address=call.conn.address)
    return {"message": "enrolled", "user": row["user"], "sites": row["sites"], "expires": expires}


def check_code(row, known, role, site, now):
    """ApiError unless the code (a row of tokens) can be exchanged for a token. known: the row of that token,
    if there is one already."""
    why, text = "", ""
    if role != row["roles"] or site != row["sites"]:
        why, text = "other", "this code is for %s, not for %s" % (
            " ".join((row["roles"] + " " + row["sites"]).split()), printable("%s %s" % (role, site))[:200])
    elif row["used"] is not None and not (known and not known["revoked"] and known["issued"] == row["used"]):
        why, text = ("used",
                     "this code was used already, on %s; if that was nobody of yours, have that token revoked"
                     % (local_time(row["used"])))
    elif row["used"] is None and row["revoked"] is not None:
        why, text = "void", "this code is void: a newer one was made on %s" % local_time(row["revoked"])
    elif row["used"] is None and row["expires"] <= now:
        why, text = "expired", "this code was good until %s" % local_time(row["expires"])
    elif row["used"] is None and known:
        why, text = "token", "this token is known already"
    if why:
        raise ApiError("0005", text, http=403, why=why)


def password_matches(password, kept):
    """Is it the password of which this is kept?"""
    import hmac
    rounds, salt, found = kept.split("$")
    return hmac.compare_digest(password_record(password[:1000], bytes.fromhex(salt), int(rounds)).split(
        "$")[2], found)


def password_record(password, salt=None, rounds=None):
    """What is kept of a password: rounds$salt$sum of PBKDF2 with SHA-256."""
    salt, rounds = salt or os.urandom(16), rounds or ROUNDS
    return "%d$%s$%s" % (rounds, salt.hex(),
                         hashlib.pbkdf2_hmac("sha256", password.encode("utf-8"), salt, rounds).hex())


class Access:
    """Who may: tokens as the database has them, in memory; who guesses passwords."""

    def __init__(self, relay):
        self.relay = relay
        self.tokens = {}                               # {sum: Caller}
        self.tokens_seen = None                        # what told that they have not changed since
        self.token_used = {}                           # {number: when}
        self.token_use_noted = {}                      # the same, as it is on disk
        self.codes = {}                                # {sum of a link's code: (user, roles, sites, until)}
        self.failures = collections.OrderedDict()      # {(user, address): [failed log-ins, locked until]}

    def load_tokens(self):
        """Takes the tokens from the database, if one was issued, revoked or prolonged meanwhile."""
        seen = tuple(self.relay.store.read("SELECT COUNT(*), MAX(number), COUNT(revoked), TOTAL(expires)"
                                           " FROM tokens")[0])
        if seen != self.tokens_seen:
            self.tokens, self.tokens_seen = dict(self.read_tokens("revoked IS NULL")), seen

    def read_tokens(self, where, *values):
        """[(hash, Caller)] of the tokens for which `where` is true."""
        found = self.relay.store.read("SELECT number, hash, user, roles, sites, expires FROM tokens WHERE"
                                      " login < 2 AND " + where, *values)
        return [(row["hash"],
                 Caller(row["user"], frozenset(row["roles"].split()), tuple(row["sites"].split()),
                        row["expires"], row["number"])) for row in found]

    def authenticate(self, headers, address, path=""):
        """Who a request comes from. ApiError("0005", HTTP 403) without a good token."""
        hashed, said, told = headers.get(":token"), "no-token", {}
        if hashed:
            if self.relay.behind_gateway():
                user = self.gateway_user(headers) or "token-" + hashed[:16]
                more = (OPERATOR, VIEWER, METRICS) if user in self.relay.conf["Server"]["operators"] else ()
                return Caller(user, frozenset((WORKFLOW, REMOTE) + more), (), 0, hashed)
            if hashed not in self.tokens:              # a new one is good at once
                self.tokens.update(self.read_tokens("hash = ? AND revoked IS NULL", hashed))
            found = self.tokens.get(hashed)
            now = time.time()
            if found is not None and found.expires > now:
                self.token_used[found.key] = now
                return found
            said, told = ("unknown-token", {}) if found is None else ("expired-token",
                                                                      {"day": day_of(found.expires)})
        raise not_allowed(printable(path)[:200], said, told)

    def gateway_user(self, headers):
        """The user that the gateway names, or None where it names none. ApiError for what the gateway itself
        does not send: without its secret, or without a user, or with two."""
        import hmac
        name = self.relay.conf["Server"]["gateway_user_header"].lower()
        secret = self.relay.conf["Server"].get("secret")
        for header in (name, secret[0] if secret else ""):
            if header in headers[":twice"]:
                raise ApiError(400, "header %s is given twice" % header)
        if (secret
                and not hmac.compare_digest(headers.get(secret[0], "").encode("iso-8859-1"),
                                            secret[1].encode("iso-8859-1"))):
            raise ApiError("0005", "not from the gateway", http=403, why="gateway secret")
        user = headers.get(name, "") if name else None
        if (user is not None
                and (not user or len(user) > 200 or has_control_chars(user) or re.search(r"[\s,]", user))):
            raise ApiError("0005", "the gateway names no user", http=403, why="gateway user")
        return user

    def note_use(self, most=600):
        """Puts on disk when tokens were last used: of each at most once in so many seconds."""
        due = [(when, number)
               for number, when in list(self.token_used.items())
               if when - self.token_use_noted.get(number, 0.0) > most]
        if due:
            self.token_use_noted.update((number, when) for when, number in due)
            self.relay.store.write(lambda tx: tx.db.executemany("UPDATE tokens SET used = ? WHERE number = ?",
                                                                due), "use", wait=False)

    def check_failures(self, user, address, known):
        """429, with the seconds to wait, while a user, an address or both are locked. A right password does
        not help then; but whoever comes from an address known to be his is locked by failures of his name
        from there only, not by what others do elsewhere or there."""
        keys = self.failure_keys(user, address)
        counted = [keys["both"]] if known else keys.values()
        left = max([0.0]
                   + [self.failures[key][1] - time.monotonic() for key in counted if key in self.failures])
        if left > 0:
            log("info", None, "login", refused="locked", user=user, address=address)
            raise refused(429, "log-ins", {"count": int(left + 1)}, why="login", wait=int(left + 1))

    def failure_keys(self, user, address):
        """The three counters of a log-in."""
        return {"both": (user, address), "address": ("", address), "user": (user, "")}

    def count_failure(self, user, address):
        """A log-in failed: from the limit on, each locks for twice as long as the one before (1 minute to 1
        hour)."""
        for kind, key in self.failure_keys(user, address).items():
            count = self.failures.pop(key, [0, 0.0])[0] + 1
            over = count - LOGIN_LIMITS[kind]
            self.failures[key] = [count,
                                  time.monotonic() + (min(3600, 60 << min(over, 10)) if over >= 0 else 0)]
        while len(self.failures) > 10000:
            self.failures.popitem(last=False)

    def forgive(self, user, address, known):
        """A log-in was right. From an address known to be his, that says nothing about who guesses
        elsewhere."""
        self.failures.pop((user, address), None)
        if not known:
            self.failures.pop((user, ""), None)

    def forget_logins(self, now):
        """Tokens of log-ins go a week after their end; failures that lock nobody any more, after an hour."""
        if self.relay.store.read("SELECT 1 FROM tokens WHERE login AND expires < ? LIMIT 1", now - 7 * 86400):
            self.relay.store.write(lambda tx: tx.db.execute("DELETE FROM tokens WHERE login AND expires < ?",
                                                            (now - 7 * 86400,)), "forget logins")
        for key in [key
                    for key, (count, until) in list(self.failures.items())
                    if until < time.monotonic() - 3600]:
            self.failures.pop(key, None)


# ==== leases and restore ====

HELD = "held for a person since "      # how `waits` begins of what waits for a person there


def held_since(row):
    """Since when the result of a calculation (a row of BRIEF) is held for a person, or None."""
    import calendar
    if row["state"] not in RETURNING or not row["waits"].startswith(HELD):
        return None
    return calendar.timegm(time.strptime(row["waits"][len(HELD):], "%Y-%m-%dT%H:%M:%SZ"))


class Claims:
    """Who holds what: leases on a monotonic clock, full again after a start; silence, pauses, life after a
    restore."""

    def __init__(self, relay):
        self.relay = relay
        self.leases = {}                               # {accept_id: until when its holder need not be heard}
        self.silent = {}                               # {accept_id: since when it is out of contact}
        self.noted = {}                             # {(accept_id, user): when it was noted last why it waits}
        self.what = {}                                 # {accept_id: where its poller says that it is}
        self.stamps = {}                               # {seq: when something of its inputs came}
        self.born = time.monotonic()
        self.maintenance = None                        # its reason
        self.grace = 0.0                               # after a restore: until when nothing is handed out
        if os.path.exists(os.path.join(utf8(relay.store.folder), b"restored")):
            self.grace = time.monotonic() + relay.conf["times"]["restore_grace"]

    def begin(self):
        """The leases of all that is claimed, full: the relay's own downtime does not count."""
        for row in self.relay.store.read("SELECT accept_id, state, protocol FROM calculations WHERE "
                                         + state_in(CLAIMED)):
            key = "v1_lost_after" if row["state"] in BEFORE_START else "lost_after"
            key = key if row["protocol"] != 2 else "lease"
            self.leases[row["accept_id"]] = time.monotonic() + self.relay.conf["times"][key]

    def renew(self, row, seconds=None):
        """The holder of a claim was heard."""
        self.leases[row["accept_id"]] = time.monotonic() + (seconds or self.relay.conf["times"]["lease"])
        if self.silent.pop(row["accept_id"], None) is not None or row["silent"]:
            log("info", row["accept_id"], "back-in-contact", poller=row["poller"])
            self.relay.store.write(lambda tx: tx.db.execute("UPDATE calculations SET silent = 0 WHERE seq ="
                                                            " ?", (row["seq"],)), "contact", wait=False)
            self.relay.news.tell(row["accept_id"], row["user"])

    def touch(self, row):
        """Bytes have moved for a calculation."""
        if row["claim"] and row["state"] in CLAIMED:
            self.renew(row)
        else:
            self.stamps[row["seq"]] = time.monotonic()

    def idle_seconds(self, row):
        """Seconds since nothing came of a calculation's inputs, as far as this relay knows."""
        return min(time.monotonic() - self.stamps.get(row["seq"], self.born),
                   max(0, time.time() - row["touched"]))

    def silent_seconds(self, row):
        """Seconds since the holder of a started calculation went out of contact, or None."""
        since = self.silent.get(row["accept_id"])
        return None if since is None else int(row["silent"] + time.monotonic() - since)

    def check_maintenance(self):
        """503 while maintenance is on."""
        if self.maintenance is not None:
            raise refused(503, "maintenance", {"reason": self.maintenance}, why="maintenance")

    def in_grace(self):
        """True for restore_grace after the first start from a backup: nothing is handed out, pollers are
        asked what they hold."""
        return time.monotonic() < self.grace

    def adopt(self, row, claim, phase, poller):
        """After a restore: a poller holds a claim that the backup does not know, or is further along with it.
        True: taken over."""
        found = re.match(r"([1-9][0-9]{0,5})\.[0-9a-f]{32}\Z", claim) if isinstance(claim, str) else None
        order = UNCLAIMED + STOPPABLE
        goal = SENDING if phase == "inputs" else RUNNING
        if (not found or int(found.group(1)) < row["attempt"] or row["state"] not in order
            or row["state"] == REGISTERED and goal == SENDING
            or order.index(row["state"]) >= order.index(goal) and claim == row["claim"]):
            return False
        step = STEP["adopt inputs" if goal == SENDING else "adopt"]
        return self.relay.store.write(lambda tx: move(
            self.relay, tx, step, row, claim=claim, attempt=int(found.group(1)), protocol=2,
            poller=poller[:200], allowed=row["allowed"] or time.time(), claimed=time.time()), "adopt")

    def note_what(self, row, what):
        """A poller says where a calculation is, in its batch system's words. Kept in memory: the next
        heartbeat says it again."""
        accept_id, what = row["accept_id"], printable(what)[:200] if isinstance(what, str) else ""
        if what != self.what.get(accept_id, ""):
            if len(self.what) > 20000:
                self.what.clear()
            self.what[accept_id] = what
            self.relay.news.tell(accept_id, row["user"])

    def note_waits(self, accept_id, user, why):
        """Why a calculation of this user does not go on, for who waits for it and for `show`; until it
        does."""
        def work(tx):
            if tx.db.execute("UPDATE calculations SET waits = ?, version = version + 1 WHERE accept_id = ?"
                             " AND user = ? AND waits != ? AND NOT " + state_in(OVER),
                             (why, accept_id, user, why)).rowcount:
                tx.after(lambda: log("warn", accept_id, "it waits", why=why, user=user))
                tx.after(lambda: self.relay.news.tell(accept_id, user))

        if isinstance(accept_id, str) and self.may_note(accept_id, user):
            if len(self.noted) > LISTED:
                self.noted.clear()
            self.noted[accept_id, user] = time.monotonic()
            self.relay.store.write(work, "waits", wait=False)

    def note_held(self, row, since):
        """Its poller says since when the result is held for a person there (seconds since the epoch; None:
        it is not, any more). Kept with it: whoever asks later, or after a restart, knows it, too."""
        held = type(since) is int and 0 <= since < 1 << 32 and row["state"] in RETURNING
        why = HELD + time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(since)) if held else ""
        if why != row["waits"] and (held or row["waits"].startswith(HELD)):
            self.note_waits(row["accept_id"], row["user"], why)

    def may_note(self, accept_id, user):
        """Is it some seconds ago that anything was noted of why it waits? Nobody waits for these notes to be
        on disk: who could have very many made would keep the writer from all others."""
        return time.monotonic() - self.noted.get((accept_id, user), -NOTE_EVERY) >= NOTE_EVERY

    def read_pauses(self):
        """Is maintenance on? Is the grace after a restore over?"""
        found = None
        try:
            with open(os.path.join(utf8(self.relay.store.folder), b"maintenance"), encoding="utf-8",
                      errors="replace") as text:
                found = printable(text.read().strip()) or "-"
        except OSError:
            pass
        changed, self.maintenance = found != self.maintenance, found
        if changed:
            log("info", None, "maintenance", reason=found or "off")
            self.relay.board.touch()
        if self.grace and not self.in_grace():
            self.grace = 0.0
            os.unlink(os.path.join(utf8(self.relay.store.folder), b"restored"))
            log("info", None, "restored", now="calculations are handed out again")
            for row in self.relay.store.read("SELECT DISTINCT site, user FROM calculations WHERE state = ?",
                                             ALLOWED):
                self.relay.front.fire(("site", row["site"], row["user"]))

    def leave_log(self, row, text):
        """A log as the only result of a calculation whose own results never came; returns what notes it in a
        transaction. What is in the folder already goes only after that, see tidy_spool(): the results may
        just have come after all."""
        data = (text + "\n").encode("utf-8")
        folder = self.relay.store.spool(row["accept_id"], "result").rstrip(b"/")
        blob = "log" + os.urandom(4).hex()
        make_folder(folder, utf8(self.relay.store.folder))
        with open(os.path.join(folder, utf8(blob)), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        sync_path(folder)

        def note(tx):
            drop_results(tx, row["seq"])
            insert_complete(tx, row["seq"], "result",
                            [(LOG_NAMES[1], Blob(b"", len(data), hashlib.sha256(data).hexdigest()))])
            tx.db.execute("UPDATE files SET blob = ? WHERE calc = ? AND kind = 'result'", (blob, row["seq"]))

        return note

    def lapse(self, row):
        """The claim of what has not begun is void: back into the queue, or to its end if it was to be
        cancelled."""
        if row["cancel"]:
            step = STEP["cancelled"]
            word = {"status": "abnormal", "reason": row["cancel"], "got": time.time()}
        else:
            step, word = STEP["lapse"], {"take": None}
        self.relay.store.write(lambda tx: move(self.relay, tx, step, row, row["claim"], claim=None,
                                               **word), step.name)

    def lose(self, row, reason="lost: out of contact for too long"):
        """Nothing was heard of it for too long: it ends abnormal, with a log that says so, and its claim is
        void."""
        def work(tx):
            if move(self.relay, tx, STEP["lost"], row, status="abnormal", reason=reason, claim=None,
                    got=time.time()):
                note(tx)

        with self.relay.placing:
            note = self.leave_log(row, reason)
            self.relay.store.write(work, "lost")

    def sweep_leases(self, now):
        """Lapsed claims: before calc-start back into the queue, after it out of contact, and after lost_after
        the end."""
        for accept_id, until in list(self.leases.items()):
            if until > now:
                continue
            self.leases.pop(accept_id, None)
            found = self.relay.store.read("SELECT %s FROM calculations WHERE accept_id = ?" % BRIEF,
                                          accept_id)
            if not found or found[0]["state"] not in CLAIMED:
                continue
            row = found[0]
            # it cannot be fenced: not into the queue again
            if row["protocol"] == 1 and not (row["cancel"] and row["state"] in BEFORE_START):
                self.lose(row)
            elif row["state"] in BEFORE_START:
                self.lapse(row)
            else:
                log("warn", accept_id, "out-of-contact", poller=row["poller"])
                self.silent[accept_id] = now
                # for `list`
                self.relay.store.write(lambda tx: tx.db.execute("UPDATE calculations SET silent ="
                                                                " MAX(silent, 0.001) WHERE seq = ?",
                                                                (row["seq"],)), "silent")
                self.relay.news.tell(accept_id, row["user"])
                # its poller may have delivered it before a restore
                self.relay.front.fire(("site", row["site"], row["user"]))

    def sweep_lost(self, now):
        """Counts the silence of those out of contact (the relay's own downtime does not count); ends them
        after lost_after."""
        for accept_id, since in list(self.silent.items()):
            found = self.relay.store.read("SELECT %s FROM calculations WHERE accept_id = ?" % BRIEF,
                                          accept_id)
            self.silent.pop(accept_id, None)
            if not found or found[0]["state"] not in CLAIMED:
                continue
            row, quiet = found[0], found[0]["silent"] + now - since
            if quiet > self.relay.conf["times"]["lost_after"]:
                self.lose(row)
            else:
                self.silent[accept_id] = now
                self.relay.store.write(lambda tx: tx.db.execute("UPDATE calculations SET silent = ? WHERE"
                                                                " seq = ?", (quiet, row["seq"])), "silent")


# ==== the pollers ====
# what a poller says of itself: {key: type}; state: one of STATES_TOLD, until: when that is over, outbox: how
# many results the relay does not want yet, oldest: since when the oldest of them; times are of the epoch
PRESENCE = {"state": str, "until": int, "jobs": int, "busy": int, "outbox": int, "oldest": int, "free": int,
            "version": str}
HANG_UP, SILENT_AFTER = 1.5, 150                # seconds until a broken line, until no word, means silent
MOST_TOLD = {"free": 1 << 60}
AUDIT_HEAD = re.compile(r"[0-9]{1,15}\.[0-9a-f]{64}\Z")      # NUMBER.SUM
STATES_TOLD = ("open", "busy", "paused", "hours", "disk", "drain", "once")


class Heard:
    """What is known of one poller."""
    __slots__ = ("at", "gone", "key", "protocol", "told", "kept", "head")

    def __init__(self, protocol=2, at=0.0, told=None):
        self.at = self.kept = at                       # when it was heard, and when that went on the disk
        self.gone = 0.0                                # when its line broke while it waited here
        self.key = None                                # of the token that it showed
        self.protocol = protocol
        self.told = told or {}                         # of PRESENCE; and `since` when in this state
        self.head = self.told.pop("audit", "")         # of its audit log, the furthest that it has told

    def take(self, told):
        """What it tells from now on; {}: nothing more (tell = no)."""
        if any(self.told.get(key) != told.get(key) for key in ("state", "until", "version")):
            self.kept = 0.0                            # to be put on the disk soon
        same = self.told and self.told.get("state") == told.get("state")
        since = self.told["since"] if same else int(self.at)
        self.told = dict(told, since=since) if told else {}

    def take_head(self, head):
        """Where its audit log stands. What it told before of a longer one is not forgotten."""
        if AUDIT_HEAD.match(head) and number_of(head) >= number_of(self.head):
            self.head = head


def number_of(head):
    """The number of an audit log's last line, of its head; 0 of an empty one."""
    return int(head.partition(".")[0] or 0)


def poller_key(name):
    """The name by which a poller is known, of what it calls itself."""
    return printable(name[:100])[:100]


class Pollers:
    """Which pollers there are, when each was heard last, and what it says of itself (fielded ones and those
    of before say nothing). In memory; on the disk now and then, so that a relay that was started again does
    not take them for never seen."""

    def __init__(self, relay):
        self.relay = relay
        self.known = {}                                # {(site, user): {name: Heard}}
        self.hearing = threading.Lock()                # of who is not known yet

    def hear(self, call, site, name, protocol=2):
        """A poller of the call's user was heard. Names and texts come from the wire."""
        told = call["presence"] if protocol == 2 else None
        group, name = self.known.get((site, call.caller.user), {}), poller_key(name)
        known_site = site in self.relay.conf["RemoteSites"]["remote_site_ids"]
        if (call.waited is not None or not known_site or not token_covers(call.caller, site)
                or name not in group and told is None and call.name == "heartbeat"):
            return                                     # it was heard before it waited; or this is `check`
        with self.hearing:
            group = self.known.setdefault((site, call.caller.user), group)
            while name not in group and len(group) >= POLLERS:
                del group[min(group, key=lambda one: group[one].at)]
            found = group.setdefault(name, Heard(protocol))
        found.take_head(call["audit"])
        before = self.standing(found, time.time()), found.told
        found.at, found.gone, found.key = time.time(), 0.0, call.caller.key
        found.protocol = protocol
        if told is not None or protocol == 2 and call.name == "calc-request":
            found.take(checked_presence(told) if told is not None else {})
        if before != (self.standing(found, time.time()), found.told):
            self.relay.board.touch()

    def miss(self, call):
        """The line of a call that waited is broken: its poller may have ended."""
        if call.name in ("calc-request", "heartbeat"):
            site, name = call["site_id"], poller_key(call["poller"])
            found = self.known.get((site, call.caller.user), {}).get(name)
            if found is not None:
                found.gone = time.time()
                self.relay.board.touch()

    def standing(self, found, now):
        """How a poller (Heard) stands, in a word: of STATES_TOLD, silent (nothing came for longer than it
        tells that it is there, or its line broke), untold (it says nothing of itself), fielded."""
        if found.protocol == 1:
            return "fielded"
        if found.gone and now - found.gone > HANG_UP or found.told and now - found.at > SILENT_AFTER:
            return "silent" if found.told.get("state") != "once" else "once"
        return found.told.get("state", "untold")

    def load(self):
        """At the start: those that were known."""
        for row in self.relay.store.read("SELECT * FROM pollers ORDER BY heard"):
            self.known.setdefault((row["site"], row["user"]), {})[row["name"]] = Heard(
                row["protocol"], row["heard"], json.loads(row["told"]))

    def keep(self, most=600):
        """Puts on the disk what is new, and of each at most once in so many seconds when it was heard;
        forgets those of before keep_history."""
        due, over, oldest = [], [], time.time() - self.relay.conf["times"]["keep_history"]
        for (site, user), group in list(self.known.items()):
            for name, found in list(group.items()):
                if found.at - found.kept > most:
                    due.append((site, user, name, found.protocol, found.at,
                                json.dumps(dict(found.told, audit=found.head))))
                    found.kept = found.at
                if found.at < oldest:
                    over.append(((site, user), name))
        with self.hearing:
            for key, name in over:
                group = self.known.get(key, {})
                group.pop(name, None)
                if not group:
                    self.known.pop(key, None)

        def work(tx):
            tx.db.executemany("INSERT OR REPLACE INTO pollers (site, user, name, protocol, heard, told)"
                              " VALUES (?, ?, ?, ?, ?, ?)", due)
            tx.db.execute("DELETE FROM pollers WHERE heard < ?", (oldest,))

        if due or over:
            self.relay.store.write(work, "pollers", wait=False)


def list_sites(call):
    """An operator's word: every site with its pollers, and what waits for them."""
    relay, rows, now = call.relay, [], time.time()
    waiting = {(row["site"], row["user"]): row
               for row in relay.store.read("SELECT site, user, COUNT(*) AS waiting, MIN(allowed) AS"
                                           " waiting_since FROM calculations WHERE state = ? GROUP BY site,"
                                           " user", ALLOWED)}
    there = set(relay.pollers.known) | set(waiting)
    used = {site for site, user in there}
    there |= {(site, "") for site in relay.conf["RemoteSites"]["remote_site_ids"] if site not in used}
    for site, user in sorted(there):
        group = relay.pollers.known.get((site, user), {})
        row = dict(dict.fromkeys(PRESENCE), site=site, user=user, state="never", heard=None, poller="",
                   audit="", waiting=0, waiting_since=None)
        row.update(dict(waiting.get((site, user), ())))
        rows += [dict(row, poller=name, heard=found.at, audit=found.head,
                      **dict(found.told, state=relay.pollers.standing(found, now)))
                 for name, found in sorted(group.items())]
        rows += [] if group else [row]
    return {"message": "sites", "sites": rows}


def checked_presence(told):
    """Of what a poller says of itself that which this relay knows, as it must be; texts are printable."""
    found = {key: told[key] for key, kind in PRESENCE.items()
             if type(told.get(key)) is kind and (kind is str or 0 <= told[key] < MOST_TOLD.get(key, 1 << 32))}
    found["version"] = printable(found.get("version", "")[:20])[:20]
    if found.get("state") not in STATES_TOLD:
        found.pop("state", None)                       # of a newer version: not known here
    return found


# ==== what has changed ====
CHANGES = 50000                # changes of calculations that are known: beyond, who asks is told all anew


class News:
    """Which calculations have changed lately: one call waits for any of a user's, however many there are. In
    memory: after a start of the relay, who asks is told all anew."""

    def __init__(self, relay):
        self.relay = relay
        self.boot = os.urandom(6).hex()
        self.lock = threading.Lock()
        self.number = 0                                # how many there were
        self.last = collections.deque(maxlen=CHANGES)  # (user, accept_id) of the last of them

    def tell(self, accept_id, user):
        """It has changed: who waits for it, or for any of its user's, is looked at again."""
        with self.lock:
            self.number += 1
            self.last.append((user, accept_id))
        self.relay.front.fire(("calc", accept_id))
        self.relay.front.fire(("user", user))

    def since(self, stamp, user):
        """(the stamp of now, the accept_ids of a user's that have changed since `stamp`; None if nobody knows
        that any more)."""
        boot, _dot, number = (stamp or "").rpartition(".")
        with self.lock:
            missed = self.number - int(number) if re.match(r"[0-9]{1,18}\Z", number) else -1
            found = None
            if boot == self.boot and 0 <= missed <= len(self.last):
                found = {accept_id for one, accept_id in itertools.islice(reversed(self.last), missed)
                         if one == user}
            return "%s.%d" % (self.boot, self.number), found


def list_own(call):
    """The caller's calculations whose request_id begins so, the newest first, in pages (`next` is `before` of
    the next one; fetched ones with `all`). With `known`, the stamp of an earlier answer: those alone that
    have changed since, for which it waits up to `wait` seconds; whole: that stamp is not known here (any
    more), and this is the first page anew."""
    relay, user, begins = call.relay, call.caller.user, call["request_id"]
    stamp, changed = relay.news.since(call["known"], user)
    whole = changed is None or len(changed) > ANSWER_PAGE // 2           # old SQLite takes 999 values at most
    relay.quotas.charge(call, ROW_WORK * (ANSWER_PAGE if whole else len(changed)))
    if whole:
        rows = relay.store.read("SELECT %s FROM calculations WHERE user = ? AND seq < ? AND (? OR state != ?)"
                                " AND (? OR request_id >= ? AND request_id < ?) ORDER BY seq DESC LIMIT ?"
                                % LISTING, user, call["before"], bool(call["all"]), FINISHED, begins is None,
                                begins, "%s\U0010ffff" % begins, ANSWER_PAGE)
    else:
        rows = relay.store.read("SELECT %s FROM calculations WHERE user = ? AND accept_id IN (%s) ORDER BY"
                                " seq DESC" % (LISTING, ", ".join("?" * len(changed))), user, *changed)
        rows = [row for row in rows if (row["request_id"] or "").startswith(begins or "")]
    if not rows and not whole and time.monotonic() < call.until:
        call.fields["known"] = stamp                   # what has changed up to here was none of these
        return Park(("user", user))
    return {"message": "list", "known": stamp, "whole": whole,
            "calculations": [listed(relay, row) for row in rows if token_covers(call.caller, row["site"])],
            "next": rows[-1]["seq"] if whole and len(rows) == ANSWER_PAGE else None}


def listed(relay, row):
    """A calculation in a list; its words are those of calc-progress."""
    found = {key: row[key] for key in ("accept_id", "request_id", "site", "command", "status", "reason",
                                       "exit_code", "signal", "registered", "touched")}
    return dict(found, progress=WORDS[row["state"]], wait_allow=row["allowed"], what=what_of(relay, row),
                out_of_contact=relay.claims.silent_seconds(row), fetched=row["state"] == FINISHED)


# ==== what users hold ====

class Quotas:
    """What users hold and ask for, counted in memory."""

    def __init__(self, relay):
        self.relay = relay
        self.open_of = collections.Counter()           # unfinished calculations, by user
        self.reserved = 0                              # bytes that are declared and have not come
        self.live = collections.Counter()           # bytes of running commands' output that are kept, by user
        self.arriving = collections.Counter()          # bytes of fielded bodies on their way, by user
        self.debts = {}                                # {user: (work owed, since)}
        self.counting = threading.Lock()               # of the two above

    def charge(self, call, work):
        """Counts work before a call does it. 413 for more than any call may ask for; 503, for the moment, if
        its user still owes too much: whoever asks for much gets a part of one processor, whatever the number
        of his calls."""
        if work < WORK_RATE // 100:
            return
        log("debug", None, call.name, work=work, user=call.caller.user)
        if work > MOST_WORK:
            raise ApiError(413,
                           "this asks for too much work at once: fewer names, or fewer patterns of many"
                           " stars", why="work")
        with self.counting:
            now = time.monotonic()
            owed, since = self.debts.get(call.caller.user, (0, now))
            owed = max(0, owed - (now - since) * WORK_RATE)
            if owed > WORK_AHEAD:
                raise refused(503, "work", {"user": call.caller.user}, why="work")
            if len(self.debts) > LISTED:
                self.debts.clear()
            self.debts[call.caller.user] = owed + work, now

    def count_registration(self, user, total):
        """A registration is on disk."""
        self.open_of[user] += 1
        self.reserved += total

    def recount(self):
        """Counts what the quotas look at."""
        found = self.relay.store.read("SELECT user, COUNT(*) FROM calculations WHERE state != ? GROUP BY"
                                      " user", FINISHED)
        self.open_of = collections.Counter({row[0]: row[1] for row in found})
        self.reserved = self.relay.store.read("SELECT COALESCE(SUM(size), 0) FROM files WHERE done = 0")[0][0]
        self.count_output()

    def output_sizes(self, row):
        """Bytes of stdout and stderr that have come while the command runs."""
        sizes = []
        for stream in ("out", "err"):
            try:
                sizes.append(os.path.getsize(self.relay.store.spool(row["accept_id"], "", "live." + stream))
                             if row["claim"] else 0)
            except OSError:
                sizes.append(0)
        return sizes

    def count_output(self):
        """The bytes of running commands' output that are kept, by user."""
        found = collections.Counter()
        for row in self.relay.store.read("SELECT accept_id, user, 1 AS claim FROM calculations WHERE"
                                         " attempt"):
            found[row["user"]] += sum(self.output_sizes(row))
        self.live = found


# ==== why it waits ====
# One function answers for everybody who asks: explain(). CAUSES are looked for in their order, and the first
# that holds is told: what stands behind it may be its effect. What is not known is never taken for a no.
NOBODY, STARTER, ADMIN = "nobody", "starter", "admin"  # who has to act, or OPERATOR
# code: stable, for programs. command: what `who` types at his place. changes: what would change it.
# holds: a function of Facts. since: the name by which Facts.times knows when it began.
Cause = collections.namedtuple("Cause", "code who text command changes holds since")
# seconds without output, without a byte of the inputs, after which that is told
QUIET_AFTER, INPUTS_AFTER = 600, 60
# what is told of how long a run takes: from so many of the last ones, of so many at least, looked for in so
# many calculations; known for so many seconds
LAST_RUNS, LEAST_RUNS, RUNS_AMONG, RUNS_KNOWN = 100, 10, 100000, 60
# how pollers stand, from the farthest to the nearest to taking something
NEARER = ("silent", "fielded", "untold", "paused", "drain", "hours", "disk", "once", "busy", "open")


class Facts:
    """What is known of one calculation (a row of BRIEF): what the causes look at, and what their texts
    name."""

    def __init__(self, relay, row):
        self.relay = relay
        self.row = row
        self.now = time.time()
        self.id = row["accept_id"]
        self.state = row["state"]
        self.user = row["user"]
        self.site = row["site"]
        self.command = row["command"]
        self.reason = row["reason"] or row["cancel"] or relay.claims.maintenance or ""
        self.code = row["exit_code"]
        self.what = relay.claims.what.get(self.id, "")
        self.poller, self.standing = self.nearest_poller()
        self.told = self.poller.told if self.poller else {}
        self.busy = self.told.get("busy")
        self.jobs = self.told.get("jobs")

    def __getitem__(self, name):
        """For texts: what they name."""
        return getattr(self, name)

    def nearest_poller(self):
        """(Heard, how it stands) of the poller that holds it, or of the one that is nearest to taking it."""
        pollers, holder = self.relay.pollers, poller_key(self.row["poller"] or "")
        found = [(one, pollers.standing(one, self.now))
                 for name, one in list(pollers.known.get((self.site, self.user), {}).items())
                 if self.state not in CLAIMED or name == holder]
        return max(found, key=lambda pair: (NEARER.index(pair[1]), pair[0].at), default=(None, ""))

    def times(self):
        """When that began by which a cause goes, in seconds since the epoch, or None."""
        row, heard = self.row, self.poller.at if self.poller else None
        silent, broke = self.relay.claims.silent_seconds(row), self.poller.gone if self.poller else 0
        return {"allowed": row["allowed"], "touched": row["touched"], "started": row["started"],
                "ended": row["ended"] or row["touched"], "told": self.told.get("since") or heard,
                "heard": heard, "gone": broke or heard or self.now - (silent or 0),
                "held": held_since(row), "output": self.last_output(), "": None}

    def last_output(self):
        """When its command wrote last, as far as it has come here, or when it was started."""
        found = [self.row["started"] or self.row["touched"]]
        for stream in ("live.out", "live.err"):
            try:
                found.append(os.path.getmtime(self.relay.store.spool(self.id, "", stream)))
            except OSError:
                pass
        return max(found)

    def waits_for(self, *standings):
        """Does it wait for a poller, of which the nearest stands so?"""
        return self.state == ALLOWED and self.standing in standings

    def is_got(self, *beginnings):
        """Has it come to its end abnormally, for a reason that begins so?"""
        return (self.state == GOT and self.row["status"] == "abnormal"
                and self.row["reason"].startswith(beginnings))

    def token_is(self, word):
        """Has the token by which its poller asked last ended so (expired, revoked)?"""
        one = self.poller
        if (self.state not in (ALLOWED,) + CLAIMED or one is None or one.key in (None, "order")
                or self.relay.behind_gateway()):
            return False
        found = self.relay.store.read("SELECT expires, revoked FROM tokens WHERE number = ?", one.key)
        revoked = not found or found[0]["revoked"] is not None
        return revoked if word == "revoked" else not revoked and found[0]["expires"] < self.now

    def is_out_of_contact(self):
        """Is who holds it away?"""
        return self.state in CLAIMED and (self.relay.claims.silent_seconds(self.row) is not None
                                          or self.standing == "silent")

    def lacks_room_here(self):
        """Has the relay no room for what is to come?"""
        store, keep = self.relay.store, self.relay.conf["limits"]["spool_free"]
        return (self.state in (REGISTERED,) + RETURNING
                and store.free() < store.bytes_to_keep_free(keep))

    def lacks_inputs(self):
        """Do inputs stay away?"""
        return self.state == REGISTERED and self.relay.claims.idle_seconds(self.row) > INPUTS_AFTER

    def is_unheard_of(self):
        """Has no poller of its user ever asked for its site?"""
        return self.state == ALLOWED and self.poller is None

    def others(self):
        """The users whose pollers have asked for its site."""
        return sorted(user for site, user in list(self.relay.pollers.known)
                      if site == self.site and user != self.user)

    @property
    def strangers(self):
        """How many those are."""
        return len(self.others())

    @property
    def elsewhere(self):
        """The sites for which pollers of its user have asked."""
        return " ".join(sorted(site for site, user in list(self.relay.pollers.known)
                               if user == self.user and site != self.site))

    @property
    def ahead(self):
        """How many are before it."""
        return self.relay.store.read("SELECT COUNT(*) FROM calculations WHERE site = ? AND state = ? AND user"
                                     " = ? AND seq < ?", self.site, ALLOWED, self.user, self.row["seq"])[0][0]

    def runs(self):
        """How long runs of this command by this user there took, in seconds: (how many were looked at, a
        tenth were shorter than this, a tenth longer than that); None: too few have ended well. Asked of the
        disk now and then."""
        key, lengths = (self.site, self.user, self.command), self.relay.lengths
        until, found = lengths.get(key, (0.0, None))
        if time.monotonic() < until:
            return found
        took = sorted(row[0] for row in self.relay.store.read(
            "SELECT ended.at - begun.at FROM past CROSS JOIN events AS ended CROSS JOIN events AS begun WHERE"
            " past.seq > (SELECT MAX(seq) FROM past) - ? AND site = ? AND user = ? AND command = ? AND"
            " ended.calc = past.seq AND ended.step = 'calc-end' AND instr(ended.note, ?) AND begun.calc ="
            " past.seq AND begun.attempt = ended.attempt AND begun.step = 'calc-start' ORDER BY past.seq DESC"
            " LIMIT ?", RUNS_AMONG, self.site, self.user, self.command, '"status": "completed"', LAST_RUNS))
        few, tenth = len(took) < LEAST_RUNS, len(took) // 10
        found = None if few else (len(took), max(0.0, took[tenth]), max(0.0, took[-1 - tenth]))
        if len(lengths) > LISTED:
            lengths.clear()
        lengths[key] = time.monotonic() + RUNS_KNOWN, found
        return found

    @property
    def request(self):
        """Its request id."""
        return self.relay.store.read("SELECT request_id FROM calculations WHERE seq = ?",
                                     self.row["seq"])[0][0]

    @property
    def bytes(self):
        """Bytes of its inputs."""
        return self.relay.store.read("SELECT bytes FROM calculations WHERE seq = ?", self.row["seq"])[0][0]

    @property
    def need(self):
        """The same for people."""
        return bytes_for_people(self.bytes)

    @property
    def room(self):
        """Bytes that its poller has room for, for people."""
        return bytes_for_people(self.told.get("free", 0))


def quoted(facts):
    """What a command names, so that a shell takes it as one word whatever it holds."""
    import shlex
    return {name: shlex.quote(printable(facts[name]))
            for name in ("id", "user", "site", "command", "request")}


BEFORE_IT = "%(ahead)s before it"
TOOK = "of the last %(of)s runs of %(command)s there, eight in ten took %(low)s to %(high)s each"
TOOK_UNKNOWN = "how long it takes is unknown: fewer than %(least)s runs of %(command)s have ended well there"


def how_long(facts):
    """How long yet, of what has not run to its end: in words, how many are before it, and how long such runs
    took (see Facts.runs); {} of all else."""
    if facts.state not in (ALLOWED,) + STOPPABLE:
        return {}
    of, low, high = facts.runs() or (0, None, None)
    named = dict(of=of, least=LEAST_RUNS, command=cut(facts.command, 100), low=clock_for_people(low or 0),
                 high=clock_for_people(high or 0), ahead=facts.ahead if facts.state == ALLOWED else None)
    parts = [BEFORE_IT] * (facts.state == ALLOWED) + [TOOK if of else TOOK_UNKNOWN]
    texts = [in_both(part, named) for part in parts]
    return {"long": {lang: "; ".join(text[lang] for text in texts) for lang in ("en", "ja")},
            "ahead": named["ahead"], "runs": of, "run_from": low, "run_to": high}


RUN_AGAIN = "it was run again (attempt %(attempt)s): %(reason)s"


def run_again(facts):
    """{"again": in words, why it is run once more}, of what is; else {}."""
    last = facts.row["attempt"] - (facts.state != ALLOWED)             # after which it was
    found = last > 0 and facts.relay.store.read(
        "SELECT note FROM events WHERE calc = ? AND attempt = ? AND step IN ('rerun', 'rerun --force')",
        facts.row["seq"], last)
    if not found:
        return {}
    reason = json.loads(found[0]["note"] or "{}").get("reason") or ""
    return {"again": in_both(RUN_AGAIN, {"attempt": last + 1, "reason": reason})}


def clock_for_people(seconds):
    """A duration, alike in every language: 1.5 s, 12 s, 0:12:05, 49:00:00."""
    if seconds < 59.5:
        return "%.*f s" % (seconds < 9.95, seconds)
    whole = round(seconds)
    return "%d:%02d:%02d" % (whole // 3600, whole // 60 % 60, whole % 60)


BY_ITSELF = "it goes on by itself"
RERUN = "rerun lets it run once more"
RESULT, AGAIN = "mi_system_wf.py result %(id)s", "mi_system_wf.py rerun %(id)s"
TOKEN = "mi_dicomapi.py token issue %(user)s --roles remote --sites %(site)s"
LIST, CHECK, POLL = ("mi_system_remote.py " + word for word in ("list", "check", "poll"))
CAUSES = [
    Cause("fetched", NOBODY, "its result was fetched: nothing more is to come", "", "",
          lambda f: f.state == FINISHED, "touched"),
    Cause("unfetched", STARTER, "it ended well, and its result waits at the relay to be fetched", RESULT,
          "it is over when its result is fetched",
          lambda f: f.state == GOT and f.row["status"] == "completed", "touched"),
    Cause("cancelled", STARTER, "somebody ended it: %(reason)s", AGAIN, RERUN,
          lambda f: f.is_got("cancelled"), "touched"),
    Cause("lost", STARTER, "it was given up: %(reason)s", AGAIN, RERUN,
          lambda f: f.is_got("lost", "ended by an operator"), "touched"),
    Cause("refused", ADMIN, "the external computer has not run it: %(reason)s", CHECK, RERUN,
          lambda f: f.is_got("refused", "input:", "disk:", "could not be started"), "touched"),
    Cause("timeout", STARTER, "it ran for longer than the external computer lets it ([command] timeout), and"
          " was ended there", RESULT, RERUN, lambda f: f.is_got("timeout"), "touched"),
    Cause("failed", STARTER, "its command ended with %(code)s; that is the command's own end: its two logs"
          " say why", RESULT, RERUN, lambda f: f.is_got("exit code") and f.code is not None, "touched"),
    Cause("abnormal", STARTER, "it ended abnormally: %(reason)s", RESULT, RERUN, lambda f: f.is_got(""),
          "touched"),
    Cause("relay-disk", OPERATOR, "the relay's disk has no room for what is to come",
          "mi_dicomapi.py check", "room on the disk of state_dir ([limits] spool_free)",
          Facts.lacks_room_here, ""),
    Cause("inputs-missing", STARTER, "its inputs have not all come, and nobody sends them",
          "mi_system_wf.py submit %(site)s %(command)s --request-id %(request)s --in ...",
          "the same words once more send what is missing", Facts.lacks_inputs, "touched"),
    Cause("inputs-come", NOBODY, "its inputs are on their way to the relay", "", BY_ITSELF,
          lambda f: f.state == REGISTERED, "touched"),
    Cause("maintenance", OPERATOR, "the relay is in maintenance, and hands nothing out: %(reason)s",
          "mi_dicomapi.py maintenance off", "the end of the maintenance",
          lambda f: f.state == ALLOWED and f.relay.claims.maintenance is not None, "allowed"),
    Cause("takes-stock", NOBODY, "the relay was restored from a backup, and asks what the pollers hold before"
          " it hands anything out", "", BY_ITSELF,
          lambda f: f.state == ALLOWED and f.relay.claims.in_grace(), "allowed"),
    Cause("other-user", OPERATOR, "no poller of user %(user)s has ever asked for site %(site)s, but pollers"
          " of %(strangers)s other users have: a poller gets only what the user of its own token has"
          " registered",
          TOKEN, "such a token in the token_file of that poller",
          lambda f: f.is_unheard_of() and f.strangers, "allowed"),
    Cause("other-site", ADMIN, "no poller of user %(user)s has ever asked for site %(site)s, but one of this"
          " user asks for: %(elsewhere)s", CHECK, "the right [poller] site there",
          lambda f: f.is_unheard_of() and f.elsewhere, "allowed"),
    Cause("no-poller", ADMIN, "no poller of user %(user)s has ever asked for site %(site)s", POLL,
          "a poller that is started there with a token of this user", Facts.is_unheard_of, "allowed"),
    Cause("token-expired", OPERATOR, "the token of the poller of site %(site)s has expired", TOKEN,
          "a new token in its token_file: it takes that by itself", lambda f: f.token_is("expired"), "heard"),
    Cause("token-revoked", OPERATOR, "the token of the poller of site %(site)s was revoked", TOKEN,
          "a new token in its token_file: it takes that by itself", lambda f: f.token_is("revoked"), "heard"),
    Cause("held", ADMIN, "its command has ended, and its result is held for a person at the external computer"
          " %(site)s", "mi_system_remote.py show %(id)s", "release or refuse, by that person",
          lambda f: held_since(f.row) is not None, "held"),
    Cause("out-of-contact", ADMIN, "the external computer has it, but its poller, its host or the line is"
          " down; nothing is lost", LIST, "it goes on when they are back", Facts.is_out_of_contact, "gone"),
    Cause("silent", ADMIN, "the poller of site %(site)s does not ask any more: it was stopped, or its host or"
          " the line is down", POLL, "it is taken when the poller asks again",
          lambda f: f.waits_for("silent"), "gone"),
    Cause("paused", ADMIN, "the poller of site %(site)s is paused", "mi_system_remote.py resume",
          "resume, or paused = no in its ini", lambda f: f.waits_for("paused"), "told"),
    Cause("hours", NOBODY, "the poller of site %(site)s is outside of its hours", "",
          "it is taken when its hours begin", lambda f: f.waits_for("hours"), "told"),
    Cause("disk", ADMIN, "the disk of the external computer %(site)s has no room", CHECK,
          "room in its calc_base (keep_free)", lambda f: f.waits_for("disk"), "told"),
    Cause("drain", ADMIN, "the poller of site %(site)s takes nothing new: it brings to its end what is there"
          " (--drain)", POLL, "a start without --drain", lambda f: f.waits_for("drain"), "told"),
    Cause("too-large", ADMIN, "its inputs need %(need)s, and the external computer %(site)s has room for"
          " %(room)s", CHECK, "room in its calc_base (keep_free)",
          lambda f: f.waits_for("open", "once") and f.bytes > f.told.get("free", 1 << 60), "allowed"),
    Cause("once", ADMIN, "the poller of site %(site)s asks only when it is started (--once)",
          POLL + " --once", "its next start (cron)",
          lambda f: f.waits_for("once"), "heard"),
    Cause("busy", NOBODY, "site %(site)s is busy with %(busy)s of %(jobs)s; %(ahead)s before it", "",
          "the end of one of them", lambda f: f.waits_for("busy"), "told"),
    Cause("needs-v2", ADMIN, "the poller of site %(site)s is a fielded one and is not shown this: it takes no"
          " parameters, patterns, directories in inputs' names, or more than 2 GiB", POLL,
          "the new poller there", lambda f: f.waits_for("fielded") and f.row["needs_v2"], "allowed"),
    Cause("fielded", ADMIN, "the poller of site %(site)s is a fielded one, which does not tell whether it is"
          " busy, or there at all", "", "it is taken when the poller asks", lambda f: f.waits_for("fielded"),
          "heard"),
    Cause("untold", ADMIN, "the poller of site %(site)s does not tell why it takes nothing (an older version,"
          " or tell = no)", LIST, "it is taken when the poller asks", lambda f: f.waits_for("untold"),
          "heard"),
    Cause("next", NOBODY, "the poller of site %(site)s takes work; %(ahead)s before it", "", BY_ITSELF,
          lambda f: f.state == ALLOWED, "allowed"),
    Cause("cancelling", NOBODY, "the external computer is to stop it: %(reason)s", "", BY_ITSELF,
          lambda f: f.row["cancel"] and f.state in STOPPABLE, "touched"),
    Cause("fielded-has-it", NOBODY, "a fielded poller has it, which tells nothing before its end", "",
          "its end", lambda f: f.row["protocol"] == 1 and f.state in STOPPABLE, "touched"),
    Cause("queued", ADMIN, "the batch system of site %(site)s has not begun it: %(what)s",
          "mi_system_remote.py show %(id)s", "what its batch system waits for",
          lambda f: f.state in (SENT, RUNNING) and f.what and not f.what.startswith("running"), "started"),
    Cause("taken", NOBODY, "the external computer has taken it, and fetches its inputs", "", BY_ITSELF,
          lambda f: f.state in BEFORE_START, "touched"),
    Cause("quiet", STARTER, "its command runs, but has written nothing for a while", RESULT.replace(
        "result", "output"), "its end, or cancel",
          lambda f: f.state == RUNNING and f.now - f.last_output() > QUIET_AFTER, "output"),
    Cause("running", NOBODY, "its command runs", "", "its end", lambda f: f.state == RUNNING, "started"),
    Cause("undelivered", ADMIN, "its command has ended, and its result waits there: the relay has not taken"
          " it", "mi_system_remote.py outbox", "resend tries it at once",
          lambda f: f.state in RETURNING and f.told.get("outbox"), "ended"),
    Cause("results-come", NOBODY, "its command has ended, and its results are on their way", "", BY_ITSELF,
          lambda f: True, "ended")]


def explain(call):
    """Why a calculation is where it is: the first of CAUSES that holds, who has to act, what to type, since
    when, how old the evidence is, what would change it."""
    row = calculation_of_caller(call, reading=True)
    return explained(call.relay, row, OPERATOR in call.caller.roles)


def explained(relay, row, operator):
    """The same for a row of BRIEF; operator: whether other users are named."""
    facts = Facts(relay, row)
    cause = cause_of(facts)
    text, changes = in_both(cause.text, facts), in_both(cause.changes, facts)
    found = {"message": text["en"], "accept_id": row["accept_id"], "cause": cause.code, "who": cause.who,
             "site": row["site"], "sentence": text, "changes": changes,
             "command": cause.command % quoted(facts),
             "since": facts.times()[cause.since], "now": facts.now, "until": None,
             "seen": facts.poller.at if facts.poller and cause.since in ("told", "heard", "gone")
             else facts.now}
    if cause.code == "hours":
        found["until"] = facts.told.get("until")
    if cause.code == "other-user" and operator:
        found["users"] = facts.others()
    return dict(found, **dict(how_long(facts), **run_again(facts)))


def cause_of(facts):
    """The first of CAUSES that holds."""
    return next(one for one in CAUSES if one.holds(facts))


def in_both(text, facts):
    """{language: text}, with what it names."""
    return {"en": printable(text % facts), "ja": printable(JA.get(text, text) % facts)}


# ==== what monitors see ====
# `healthz` (is the relay itself well? it needs no token) and `metrics` (figures, role metrics): all is
# counted as it happens, so that being asked costs next to nothing. Sites are those of the ini; no user, no
# id is named.
BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 14400, 43200, 86400, 259200, 604800)      # seconds
# reasons of "0005" that are told apart
AUTH_KINDS = ("no token", "unknown token", "expired", "role", "gateway", "login")
STUCK = 30                     # seconds after which a thread that should have gone on stands still
PROBE = 5                      # seconds after a change of the database, until a question makes another
TOKEN_FORGOTTEN = 7 * 86400                            # seconds after its end that a token is of no interest
BACKUP_OLD = 2 * 86400                                 # seconds after which a backup is worth a word


class Meter:
    """What happened since the start, and how many calculations are where."""

    def __init__(self, relay):
        self.relay = relay
        self.counting = threading.Lock()               # of the next three
        self.requests = collections.Counter()          # by (call, class of status)
        self.failures = collections.Counter()          # by kind: "0005" was answered
        self.bytes = collections.Counter()             # of whole bodies, by direction
        # of the writer alone, as it commits:
        self.states = collections.Counter()            # calculations by (site, user, state)
        self.ended = collections.Counter()             # by (site, outcome)
        self.queued = {}                          # {site: [seconds, how many in each of BUCKETS, beyond]}
        self.ran = {}
        self.asked = -600.0                            # when, in time.monotonic()
        self.stored = None                        # bytes of files in the spool, counted while that is asked
        self.probe = False                          # is it to be tried whether the database can be changed?

    def begin(self):
        """At the start: how many are where."""
        for row in self.relay.store.read("SELECT site, user, state, COUNT(*) AS number FROM calculations"
                                         " GROUP BY site, user, state"):
            self.states[row["site"], row["user"], row["state"]] = row["number"]

    def answered(self, call, status, length, why=None):
        """A request was answered with so many bytes; why: of a "0005"."""
        name = call.name if call is not None and (call.route or call.name in OPEN_CALLS) else "other"
        with self.counting:
            self.requests[name, "%dxx" % (status // 100)] += 1
            self.bytes["in"] += call.length if call is not None else 0
            self.bytes["out"] += length
            if why is not None:
                kinds = [kind for kind in AUTH_KINDS if why.startswith(kind)]
                self.failures[(kinds or ["other"])[0].replace(" ", "_")] += 1

    def moved(self, step, before, row, changes, now):
        """A calculation (as it was known before) has gone from one state to another; before "": it is new;
        step None: it was removed. In the writer's thread, once that is on disk."""
        site, user = row["site"], row["user"]
        if before:
            self.states[site, user, before] -= 1
        if step is None:
            return
        self.states[site, user, step.to] += 1
        if step.name == "calc-start" and row["allowed"]:
            observe(self.queued, site, now - row["allowed"])
        if before == RUNNING and step.to == ENDED and row["started"]:
            observe(self.ran, site, now - row["started"])
        if step.to == GOT:
            self.ended[site, outcome_of(step, changes.get("status", row["status"]),
                                        changes.get("reason", row["reason"]))] += 1

    def health(self):
        """ "ok", or what is not, in a word. Asked by the selector: nothing here waits. A question after a
        while without changes has the sweeper make one."""
        relay, now = self.relay, time.monotonic()
        self.probe = self.probe or now - relay.store.committed > PROBE
        for word, stuck in (("writer", now - (relay.store.at_work or now) > STUCK),
                            (relay.store.failed, relay.store.failed),
                            ("workers", relay.front.small_calls and now - relay.front.taken > STUCK),
                            ("sweeper", now - relay.sweeper.lap > 2 * STUCK)):
            if stuck:
                return word
        return "ok"

    def sweep(self):
        """Once a second, by the sweeper: the change that health() has asked for."""
        if self.probe:
            self.probe = False
            self.relay.store.write(lambda tx: tx.db.execute("PRAGMA user_version = %d" % SCHEMA_VERSION),
                                   "probe", wait=False)

    def count_stored(self):
        """Once a minute, while somebody asks for figures: what is in the spool."""
        if time.monotonic() - self.asked < 600:
            self.stored = self.relay.store.read("SELECT COALESCE(SUM(size), 0) FROM files WHERE done")[0][0]


def observe(table, site, seconds):
    """Counts a duration in the histogram of its site."""
    found = table.setdefault(site, [0.0] + [0] * (len(BUCKETS) + 1))
    found[0] += max(0.0, seconds)
    found[1 + bisect.bisect_left(BUCKETS, seconds)] += 1


def outcome_of(step, status, reason):
    """How a calculation has ended, in a word."""
    if step.name == "lost":
        return "lost"
    if reason.startswith("cancelled"):
        return "cancelled"
    return "completed" if status == "completed" else "abnormal"


def metrics(call):
    """The figures, for Prometheus. They are of all sites."""
    if call.caller.sites:
        raise ApiError(403, "the figures are of all sites, and this token is for some only")
    return TextAnswer("text/plain; version=0.0.4; charset=utf-8", figures(call.relay).encode("utf-8"))


def figures_for_operator(call):
    """An operator's word: the same, for node_exporter's textfile collector."""
    return {"message": figures(call.relay)}


def figures(relay):
    """All figures as text."""
    relay.meter.asked = time.monotonic()
    families = [("mi_relay_" + name, kind, text, samples)
                for found in (figures_of_sites(relay), figures_of_durations(relay.meter),
                              figures_of_relay(relay))
                for name, kind, text, samples in found]
    return exposition(families)


def summed(found, sites):
    """[("", {"site": ..., ...}, number)] of {(site, more...): number}, where more are (label, value) pairs;
    what is of no site of the ini stands under the empty one."""
    sums = collections.Counter()
    for (site, *more), number in list(found.items()):
        sums[(site if site in sites else "",) + tuple(more)] += number
    return [("", dict([("site", key[0])] + list(key[1:])), number) for key, number in sorted(sums.items())]


def figures_of_sites(relay):
    """Families of what is known of each site."""
    meter, now, sites = relay.meter, time.time(), frozenset(relay.conf["RemoteSites"]["remote_site_ids"])
    places = collections.Counter()
    for (site, user, state), number in list(meter.states.items()):
        places[site, ("state", state)] += number
    oldest, reasons = waiting_figures(relay, now)
    stand = SiteFigures(relay, sites, now)
    rows = [("calculations", "gauge", "calculations that are kept, by state", places),
            ("waiting_oldest_seconds", "gauge", "how long the first in the queue of a site has waited; 0"
             " without one", {(site,): oldest.get(site, 0) for site in {key[0] for key in places}}),
            ("waiting_reason", "gauge", "calculations that wait, by why the first of their queue does (the"
             " codes of explain)", reasons),
            ("site_last_contact_timestamp_seconds", "gauge", "when a poller of the site was heard last",
             stand.heard),
            ("site_state", "gauge", "1 with the state of that poller of the site which is nearest to taking"
             " work", stand.state),
            ("site_slots", "gauge", "calculations that the pollers of the site may have at once",
             stand.slots),
            ("site_slots_busy", "gauge", "calculations that they have", stand.busy),
            ("undelivered", "gauge", "results that pollers of the site could not deliver", stand.late),
            ("undelivered_oldest_seconds", "gauge", "how long the oldest of them waits there; 0 without one",
             stand.late_for),
            ("out_of_contact", "gauge", "calculations whose poller is out of contact", silent_figures(relay)),
            ("ended_total", "counter", "calculations that have come to their end", {
                (site, ("outcome", outcome)): number
                for (site, outcome), number in list(meter.ended.items())})]
    return [(name, kind, text, summed(found, sites)) for name, kind, text, found in rows]


def queues(relay):
    """[(the first calculation that waits, a row of BRIEF; how many wait)] of each site and user. Nothing else
    is asked of the database."""
    found = []
    for (site, user, state), number in list(relay.meter.states.items()):
        if state == ALLOWED and number:
            rows = relay.store.read("SELECT %s FROM calculations WHERE site = ? AND state = ? AND user = ?"
                                    " ORDER BY seq LIMIT 1" % BRIEF, site, state, user)
            found += [(row, number) for row in rows]
    return found


def waiting_figures(relay, now):
    """({site: seconds that the first of its queues has waited}, {(site, ("code", why)): how many wait})."""
    oldest, reasons = {}, collections.Counter()
    for row, number in queues(relay):
        site = row["site"]
        oldest[site] = max(oldest.get(site, 0), round(now - (row["allowed"] or now)))
        reasons[site, ("code", cause_of(Facts(relay, row)).code)] += number
    return oldest, reasons


class SiteFigures:
    """What the pollers of each site of the ini tell, and how they stand: {(site, ...): number} each."""

    def __init__(self, relay, sites, now):
        self.heard = {}
        self.slots = {}
        self.busy = {}
        self.late = {}
        self.late_for = {}
        nearest = {}
        for (site, user), group in list(relay.pollers.known.items()):
            for one in list(group.values()) if site in sites else ():
                word = relay.pollers.standing(one, now)
                nearest[site] = max(nearest.get(site, -1), NEARER.index(word))
                self.heard[site,] = max(self.heard.get((site,), 0), round(one.at, 3))
                self.take(site, one.told, word, now)
        self.state = {(site, ("state", NEARER[nearest[site]] if site in nearest else "never")): 1
                      for site in sites}

    def take(self, site, told, word, now):
        """Adds what one poller tells."""
        for table, key in ((self.slots, "jobs"), (self.busy, "busy"), (self.late, "outbox")):
            counts = key == "outbox" or word != "silent"
            table[site,] = table.get((site,), 0) + (told.get(key) or 0) * counts
        since = told.get("oldest") if told.get("outbox") else None
        self.late_for[site,] = max(self.late_for.get((site,), 0), round(now - since) if since else 0)


def silent_figures(relay):
    """{(site,): calculations out of contact}."""
    found, ids = collections.Counter(), list(relay.claims.silent)
    for first in range(0, len(ids), 500):
        part = ids[first:first + 500]
        for row in relay.store.read("SELECT site FROM calculations WHERE accept_id IN (%s)"
                                    % ", ".join("?" * len(part)), *part):
            found[row["site"],] += 1
    return found


def figures_of_durations(meter):
    """Families of the histograms."""
    rows = (("queue_seconds", "from being allowed to the command's start", meter.queued),
            ("run_seconds", "from the command's start to its end", meter.ran))
    return [(name, "histogram", text,
             [sample for site, found in sorted(list(table.items())) for sample in histogram_of(site, found)])
            for name, text, table in rows]


def histogram_of(site, found):
    """The samples of one site's histogram."""
    sums = list(itertools.accumulate(found[1:]))
    bounds = [str(bound) for bound in BUCKETS] + ["+Inf"]
    return ([("_bucket", {"site": site, "le": bound}, number) for bound, number in zip(bounds, sums)]
            + [("_sum", {"site": site}, round(found[0], 3)), ("_count", {"site": site}, sums[-1])])


def figures_of_relay(relay):
    """Families of the relay itself."""
    meter, front, store, now = relay.meter, relay.front, relay.store, time.time()
    with meter.counting:
        requests, failures, moved = dict(meter.requests), dict(meter.failures), dict(meter.bytes)
    waits = store.read("SELECT MIN(touched) FROM calculations WHERE state = ?", GOT)[0][0]
    ends = {kind: certificate_end(relay.conf["Server"][key])
            for kind, key in (("server", "certfile"), ("client_ca", "client_ca"))}
    rows = [("build_info", "gauge", "which version this is", {(("version", VERSION),): 1}),
            ("unfetched_oldest_seconds", "gauge", "how long the oldest result waits to be fetched; 0 without"
             " one",
             {(): round(now - waits) if waits else 0}),
            ("requests_total", "counter", "requests that were answered", {
                (("call", call), ("class", kind)): number for (call, kind), number in requests.items()}),
            ("auth_failures_total", "counter", "requests that were refused for want of a good token, role or"
             " password", {(("kind", kind),): number for kind, number in failures.items()}),
            ("bytes_total", "counter", "bytes of bodies", {
                (("direction", way),): number for way, number in moved.items()}),
            ("connections", "gauge", "open connections", {(): len(front.conns)}),
            ("parked", "gauge", "calls that wait for news", {(): sum(list(front.parked.values()))}),
            ("spool_free_bytes", "gauge", "free bytes for the spool", {(): store.free()}),
            ("spool_keep_free_bytes", "gauge", "bytes of them that stay free ([limits] spool_free)",
             {(): store.bytes_to_keep_free(relay.conf["limits"]["spool_free"])}),
            ("spool_bytes", "gauge", "bytes of files in the spool, looked at each minute",
             {} if meter.stored is None else {(): meter.stored}),
            ("certificate_expiry_timestamp_seconds", "gauge", "when a certificate ends", {
                (("kind", kind),): end for kind, end in ends.items() if end}),
            ("token_next_expiry_timestamp_seconds", "gauge", "when the next token ends of those that have"
             " none newer for the same user, roles and sites; site empty: good for all",
             token_figures(relay, now)),
            ("backup_last_success_timestamp_seconds", "gauge", "when `backup` was made last; 0: never",
             {(): backed_up(store)}),
            ("maintenance", "gauge", "1 in maintenance", {(): int(relay.claims.maintenance is not None)})]
    return [(name, kind, text, [("", dict(labels), number) for labels, number in sorted(found.items())])
            for name, kind, text, found in rows]


def newest_tokens(relay, now):
    """The tokens (user, roles, sites, expires) that have no newer one of the same, and did not end long ago;
    those of log-ins are not among them."""
    return relay.store.read("SELECT user, roles, sites, MAX(expires) AS expires FROM tokens WHERE revoked IS"
                            " NULL AND NOT login GROUP BY user, roles, sites HAVING MAX(expires) > ?",
                            now - TOKEN_FORGOTTEN)


def token_figures(relay, now):
    """{(("site", site), ("role", role)): when the next one ends}."""
    found, sites = {}, relay.conf["RemoteSites"]["remote_site_ids"]
    for row in newest_tokens(relay, now):
        for key in [(("site", site), ("role", role)) for role in row["roles"].split()
                    for site in row["sites"].split() or [""] if site in sites or not site]:
            found[key] = min(found.get(key, row["expires"]), round(row["expires"]))
    return found


def backed_up(store):
    """When `backup` has noted that it was made, in seconds since the epoch; 0: never."""
    try:
        return round(os.stat(os.path.join(utf8(store.folder), b"backed-up")).st_mtime, 3)
    except OSError:
        return 0


# What `notify` tells people, by kind: whom (operators; admins, of a site; researchers, of what is theirs), in
# which words, and what they type.
OPERATORS, ADMINS, RESEARCHERS = "operators", "admins", "researchers"
Condition = collections.namedtuple("Condition", "to text command")
CONDITIONS = {
    "relay": Condition(OPERATORS, "the relay does not answer: %(why)s", "systemctl status mi_dicomapi"),
    "disk": Condition(OPERATORS, "the relay's disk has %(free)s left; with less than %(keep)s it takes"
                      " nothing new", "mi_dicomapi.py check"),
    "certificate": Condition(OPERATORS, "the relay's certificate (%(what)s) ends on %(day)s",
                             "mi_dicomapi.py check"),
    "backup": Condition(OPERATORS, "the last backup of the relay was made on %(day)s",
                        "mi_dicomapi.py backup DIR"),
    "no-backup": Condition(OPERATORS, "no backup of the relay was made yet", "mi_dicomapi.py backup DIR"),
    "silent": Condition(OPERATORS, "the pollers of site %(site)s do not ask any more",
                        "mi_dicomapi.py sites"),
    "outbox": Condition(ADMINS, "%(count)d results of site %(site)s could not be delivered, the oldest since"
                        " %(day)s", "mi_system_remote.py outbox"),
    "token": Condition(ADMINS, "the token of user %(user)s for %(what)s ends on %(day)s",
                       "mi_dicomapi.py token issue"),
    "waits": Condition(RESEARCHERS, "%(count)d calculations of user %(user)s wait for site %(site)s since"
                       " %(day)s: %(why)s", "mi_system_wf.py explain %(id)s"),
    "ended": Condition(RESEARCHERS, "%(id)s (%(what)s on %(site)s) has ended: %(why)s",
                       "mi_system_wf.py explain %(id)s")}
DAYS_BEFORE = (30, 7, 1, 0)    # days before an end on which it is told, each once
CONDITIONS_EVERY = 5           # seconds between two looks for whoever waits for conditions
ENDS = tuple(step.name for step in STEPS if step.to == GOT)


def condition(kind, name="", since=None, level=1, why="", **facts):
    """A condition that holds: its key, whom it concerns, since when, in words. A higher level is told anew.
    why: a text, or that of a cause in both languages."""
    facts = dict({"site": "", "user": "", "id": ""}, **facts)
    why = why if isinstance(why, dict) else {"en": why, "ja": why}
    text = {lang: in_both(CONDITIONS[kind].text, dict(facts, why=why[lang]))[lang] for lang in why}
    return {"key": kind + (name and ":" + name), "kind": kind, "to": CONDITIONS[kind].to,
            "site": facts["site"], "user": facts["user"], "since": since, "level": level, "text": text,
            "command": CONDITIONS[kind].command % facts}


def conditions(call):
    """For `notify`: what holds now that somebody should know, and what has ended since `after` (the number of
    a step; -1: from now on). Waits for either to be another."""
    ended, after = ends_since(call.relay, call["after"])
    ended, found = ([one for one in part if token_covers(call.caller, one["site"])]      # of its sites only
                    for part in (ended, conditions_of(call.relay)))
    stamp = "%x" % binascii.crc32(json.dumps([(one["key"], one["level"]) for one in found]).encode("utf-8"))
    if not ended and stamp == call["known"] and time.monotonic() < call.until:
        return Park(("conditions",))
    return {"message": "conditions", "conditions": found, "ended": ended, "after": after, "known": stamp}


def ends_since(relay, after):
    """(what calculations have come to their end in steps behind `after`, at most 500; the number of the last
    step that was looked at)."""
    last = relay.store.read("SELECT MAX(rowid) FROM events")[0][0] or 0
    if not 0 <= after <= last:                         # a new one, or of a state_dir that was before this
        return [], last
    rows = relay.store.read("SELECT events.rowid, past.accept_id, past.user, past.site, past.command, status,"
                            " exit_code, at FROM events JOIN past ON past.seq = calc LEFT JOIN calculations"
                            " ON calculations.seq = calc WHERE events.rowid > ? AND step IN (%s) ORDER BY"
                            " events.rowid LIMIT 500" % ", ".join("?" * len(ENDS)), after, *ENDS)
    found = []
    for row in rows:
        code = "" if row["exit_code"] is None else " (%d)" % row["exit_code"]
        found.append(condition("ended", row["accept_id"], row["at"], id=row["accept_id"], site=row["site"],
                               user=row["user"], what=row["command"], why=(row["status"] or "?") + code))
    return found, rows[-1][0] if len(rows) == 500 else last


def conditions_of(relay):
    """All that hold now."""
    now, store = time.time(), relay.store
    free, keep = store.free(), store.bytes_to_keep_free(relay.conf["limits"]["spool_free"])
    found = [condition("disk", level=1 + (free < keep), free=bytes_for_people(free),
                       keep=bytes_for_people(keep))] if free < 2 * keep else []
    for what in ("certfile", "client_ca"):
        end = certificate_end(relay.conf["Server"][what])
        found += [condition("certificate", what, level=level, what=what, day=day_of(end))
                  for level in level_of_end(end, now)]
    made = backed_up(store)
    if not made:
        found.append(condition("no-backup"))
    elif now - made > BACKUP_OLD:
        found.append(condition("backup", since=made, day=day_of(made)))
    return found + conditions_of_sites(relay, now) + conditions_of_tokens(relay, now) + waits_of(relay, now)


def conditions_of_sites(relay, now):
    """Pollers that are silent, results that are not delivered."""
    found, figures = [], SiteFigures(relay, relay.conf["RemoteSites"]["remote_site_ids"], now)
    for site, (_key, state) in sorted(figures.state):
        late = figures.late_for.get((site,), 0)
        found += [condition("silent", site, figures.heard[site,], site=site)] if state == "silent" else []
        found += [condition("outbox", site, now - late, site=site, count=figures.late[site,],
                            day=local_time(now - late))] if late else []
    return found


def conditions_of_tokens(relay, now):
    """Tokens that end soon: the admins hear of those of their sites, the operators of all others."""
    found = []
    for row in newest_tokens(relay, now):
        name = "%s:%s:%s" % (row["user"], row["roles"], row["sites"])
        for level in level_of_end(row["expires"], now):
            one = condition("token", name, level=level, user=row["user"], day=day_of(row["expires"]),
                            what="%s %s" % (row["roles"], row["sites"]))
            here = row["sites"].split()[:1] if REMOTE in row["roles"] else []
            found.append(dict(one, user="", site="".join(here), to=ADMINS if here else OPERATORS))
    return found


def waits_of(relay, now):
    """For each queue: since when its first one waits, and why."""
    found = []
    for row, number in queues(relay):
        facts, since = Facts(relay, row), row["allowed"] or now
        found.append(condition("waits", "%s:%s" % (facts.site, facts.user), since, count=number, id=facts.id,
                               site=facts.site, user=facts.user, day=local_time(since),
                               why=in_both(cause_of(facts).text, facts)))
    return found


def level_of_end(end, now):
    """[how near an end is: 1 of the first of DAYS_BEFORE, and so on], or []."""
    level = sum(end - now <= days * 86400 for days in DAYS_BEFORE) if end else 0
    return [level] if level else []


# ==== the page ====
# What people see in a browser. The page is a text without data, the same for everybody (room "text of the
# page"); it asks v2/board, one waiting call for each tab that is looked at. What that answers is made once
# for all who may see the same, and holds until something has changed; who waits is told then, not oftener
# than once a second.
BOARD_ROUND, BOARD_LOOK = 1.0, 20.0    # seconds between two rounds, at least; at most, while somebody looks
BOARD_SHARE = 50                       # so many-th of a processor, at most, is spent on making answers
BOARD_SITES, BOARD_CALCS, BOARD_FILES = 200, 100, 100          # rows in one answer
BOARD_KEPT = 200                       # answers that are kept at once
BOARD_TEXT = 300                       # characters of a text in a row
SPARK, SPARK_STEP = 48, 1800           # columns of a site's last day, seconds of each
EXPIRES_SOON = 30 * 86400
LINK_SECONDS = 60                      # that a code of page-link is good for
# a site whose nearest poller stands so takes nothing before a person acts
STARVED = ("never", "silent", "paused", "disk", "drain")
# which calculations are shown: {word: condition}; `needs` also has those that wait for a starved site
ABNORMAL, AWAY = "state = 'got' AND status = 'abnormal'", state_in(CLAIMED) + " AND silent > 0"
SHOWN = {"open": "state != 'finished'", "waiting": state_in(UNCLAIMED), "running": state_in(STOPPABLE),
         "results": state_in(RETURNING + (GOT,)), "needs": "(%s OR %s%%s)" % (ABNORMAL, AWAY), "all": "1"}
# who asks: the user whose calculations are shown (None: everybody's), at which sites (): at any
Right = collections.namedtuple("Right", "user sites")


def board(call):
    """What the page shows: view `sites`, `calcs` (chosen by show, site, find; older than before) or `one`
    (accept_id). With `known` (a stamp) it waits up to `wait` seconds for another one."""
    relay, view, roles = call.relay, call["view"], call.caller.roles
    if not relay.conf["Server"]["page"]:
        raise ApiError(404, "the page is switched off ([Server] page)")
    right = Right(None if roles & {OPERATOR, VIEWER} else call.caller.user, call.caller.sites)
    if view == "one":
        question = view, calculation_of_caller(call, reading=True)["accept_id"], OPERATOR in roles
    elif view == "calcs":
        question = view, call["show"], call["site"], call["find"], call["before"]
    else:
        question = view, call["find"], call["first"]
    stamp, text = relay.board.answer(right, question)
    may = "own" if WORKFLOW in roles else ""
    may = "all" if OPERATOR in roles else may
    told = {"message": "board", "now": time.time(), "stamp": stamp, "me": call.caller.user, "may": may}
    if call["known"] != stamp:
        body = '{"errors": [{"code": 200, %s, %s]}' % (ENCODE(told)[1:-1], text[1:])
        return TextAnswer(JSON_TYPE, utf8(body))
    return dict(told, same=True) if time.monotonic() >= call.until else Park(("board",))


def set_maintenance(call):
    """An operator's word: maintenance on (with its reason), or off."""
    note_maintenance(call.relay.store.folder, call["on"], call["reason"][:200])
    log("info", None, "maintenance", by=call.caller.user, on=call["on"])
    call.relay.claims.read_pauses()
    return {"message": "maintenance"}


def page_link(call):
    """An operator's word: a code (of which only the sum is told here) is good once, and not for long."""
    codes, now = call.relay.access.codes, time.monotonic()
    for old in [key for key, found in list(codes.items()) if found[-1] < now]:
        codes.pop(old, None)
    codes[call["hash"]] = call["user"], call["roles"], call["sites"], now + LINK_SECONDS
    return {"message": "link"}


def redeem_link(call):
    """The code of a link to the page for a token that ends after login_hours."""
    hashed = hashlib.sha256(utf8(call["code"])).hexdigest()
    user, roles, sites, until = call.relay.access.codes.pop(hashed, ("", "", "", 0.0))
    if until < time.monotonic():
        log("warn", None, "link", refused="not a code, or used, or too old", address=call.conn.address)
        raise ApiError("0005", "this link was used, or is too old", http=403, why="code")
    secret, now = os.urandom(32).hex(), time.time()
    expires = now + 3600 * call.relay.conf["times"]["login_hours"]
    call.relay.store.write(lambda tx: tx.db.execute(
        "INSERT INTO tokens (hash, user, roles, sites, issued, expires, login) VALUES (?, ?, ?, ?, ?, ?, 1)",
        (hashlib.sha256(secret.encode()).hexdigest(), user, roles, sites, now, expires)), "link")
    log("info", None, "link", user=user, roles=roles, address=call.conn.address)
    return {"message": "logged in", "token": secret, "expires": expires, "roles": roles, "sites": sites}


class Board:
    """What the page shows, as JSON: made once for all who may see the same, void when something changes."""

    def __init__(self, relay):
        self.relay = relay
        self.making = threading.Lock()                 # each answer is made once
        self.kept = {}                                 # {(right, question): (stamp, JSON)} of `kept_round`
        self.kept_round = 0
        self.places = None                             # see places_of(), of the same round
        self.round = 1
        self.changed = False                           # something, since this round began
        self.next_round = 0.0                          # in time.monotonic(): not before
        self.looked = -1e9                             # when somebody looked last
        self.slow = None                               # see slow_facts()
        self.slow_until = 0.0

    def touch(self):
        """Something has changed that somebody may see. Who waits is told at the next tick(), and not here:
        what has changed is on its way to who waits for it alone, and comes first."""
        self.changed = True

    def turn(self):
        """A new round, if something has changed and it is time for one: who waits looks again."""
        now = time.monotonic()
        if self.changed and now >= self.next_round:
            self.changed = False
            self.next_round = now + BOARD_ROUND
            self.round += 1
            self.relay.front.fire(("board",))

    def tick(self):
        """Once a second: what had to wait for its round; and while somebody looks, what changes by itself
        (silence, the disk)."""
        now = time.monotonic()
        if now - self.looked < 60 and (now > self.next_round + BOARD_LOOK or self.is_due()):
            self.changed = True
        self.turn()

    def is_due(self):
        """Does a poller stand otherwise by now than this round says?"""
        due = self.places and self.places[1]
        return bool(due) and time.time() > due

    def answer(self, right, question):
        """(stamp, JSON) of what is shown to who has this right and asks this."""
        self.turn()
        self.looked = time.monotonic()
        with self.making:
            if self.kept_round != self.round or len(self.kept) > BOARD_KEPT:
                self.kept_round, self.kept, self.places = self.round, {}, None
            found = self.kept.get((right, question))
            if found is None:
                begun = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
                found = self.kept[right, question] = self.make(right, question)
                took = min(0.1, time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID) - begun)
                self.next_round = max(self.next_round, time.monotonic()) + BOARD_SHARE * took
        return found

    def make(self, right, question):
        """The same, made. What moves with the clock alone is not in the stamp."""
        if self.places is None:
            self.places = places_of(self.relay, time.time())
        if time.monotonic() > self.slow_until:
            self.slow, self.slow_until = slow_facts(self.relay), time.monotonic() + 60
        shown = {key: place for key, place in self.places[0].items()
                 if right.user in (None, key[1]) and (not right.sites or key[0] in right.sites)}
        found, aside = {"sites": self.sites, "calcs": self.calculations, "one": self.one}[question[0]](
            right, shown, *question[1:])
        found["head"] = self.head(right, shown)
        stamp = "%x" % binascii.crc32(utf8(ENCODE(found)))
        return stamp, ENCODE(dict(found, **aside))

    def head(self, right, shown):
        """What stands above every view: what is wrong, worst first, as (code, number, text); how many there
        are; room on the disk; what expires."""
        claims, store, counts = self.relay.claims, self.relay.store, collections.Counter()
        for place in shown.values():
            counts.update(place["counts"])
        free, keep = store.free(), store.bytes_to_keep_free(self.relay.conf["limits"]["spool_free"])
        soon, total = [one for one in self.slow["expires"] if right.user in (None, one[1])], self.slow["disk"]
        wrong = [("disk", free < keep, ""),
                 ("maintenance", claims.maintenance is not None, cut(claims.maintenance or "")),
                 ("takes-stock", claims.in_grace(), ""),
                 ("starved", sum(place["starved"] for place in shown.values()), ""),
                 ("away", counts["away"], ""), ("abnormal", counts["abnormal"], ""),
                 ("expires", len(soon), "")]
        sums = {word: sum(counts[state] for state in states) for word, states in (
            ("open", CLAIMED + UNCLAIMED + (GOT,)), ("waiting", UNCLAIMED), ("running", STOPPABLE),
            ("results", RETURNING + (GOT,)), ("needs", ("abnormal", "away", "starved")), ("all", WORDS))}
        return {"wrong": [one for one in wrong if one[1]], "expires": soon, "counts": sums,
                "maintenance": claims.maintenance is not None,
                # in steps, so that it does not change all the time
                "disk": [int(round(free / total, 2) * total), total] if right.user is None else None}

    def sites(self, right, shown, find, first):
        """The view of the sites: a row for each with a user's pollers, those that need a person first."""
        rows, used = [], {site for site, user in shown}
        empty = [site for site in self.relay.conf["RemoteSites"]["remote_site_ids"]
                 if site not in used and self.is_for(right, site)]
        for (site, user), place in list(shown.items()) + [((site, ""), new_place()) for site in empty]:
            if find in site or find in user:
                rows.append((rank(place), site, user, place))
        rows.sort(key=lambda row: row[:3])
        chosen, nothing = rows[first:first + BOARD_SITES], "0" * SPARK
        columns = ("standing", "until", "busy", "jobs", "waiting_since", "outbox", "oldest", "version")
        found = [[cut(site), cut(user)] + [place[name] for name in columns]
                 + [place["counts"][ALLOWED], sum(place["counts"][state] for state in CLAIMED),
                    place["counts"]["away"]]
                 + list(self.slow["sparks"].get((site, user), (nothing, nothing)))
                 for order, site, user, place in chosen]
        return ({"view": "sites", "sites": found, "total": len(rows), "from": first},
                {"heard": [place["heard"] for order, site, user, place in chosen]})

    def is_for(self, right, site):
        """May this user use that site?"""
        users = self.relay.rules(site)["users"]
        return ((not right.sites or site in right.sites)
                and (right.user is None or not users or right.user in users))

    def calculations(self, right, shown, show, site, find, before):
        """The view of the calculations: a page of those that are chosen, the newest first."""
        condition, values = SHOWN[show], []
        if show == "needs":
            starved = [key for key, place in shown.items() if place["starved"]][:200]
            condition %= "".join(" OR state = 'allowed' AND site = ? AND user = ?" for key in starved)
            values += [part for key in starved for part in key]
        for more, parts in (("user = ?", [right.user] if right.user is not None else []),
                            ("site IN (%s)" % ", ".join("?" * len(right.sites)), list(right.sites)),
                            ("site = ?", [site] if site else []), ("seq < ?", [before] if before else []),
                            ("(instr(accept_id, ?) = 1 OR instr(site, ?) OR instr(user, ?) OR"
                             " instr(command, ?))", [find] * 4 if find else [])):
            if parts:
                condition += " AND " + more
                values += parts
        rows = self.relay.store.read("SELECT %s FROM calculations WHERE %s ORDER BY seq DESC LIMIT ?"
                                     % (BRIEF, condition), *(values + [BOARD_CALCS + 1]))
        more, rows = len(rows) > BOARD_CALCS, rows[:BOARD_CALCS]
        return {"view": "calcs", "calcs": [self.calculation_row(row) for row in rows],
                "next": rows[-1]["seq"] if more else 0}, {}

    def calculation_row(self, row):
        """A calculation in a row of the view."""
        code = "" if row["state"] in OVER else cause_of(Facts(self.relay, row)).code
        claims = self.relay.claims
        what = claims.what.get(row["accept_id"], "") if row["state"] in CLAIMED else ""
        return [row["accept_id"], cut(row["user"]), cut(row["site"]), cut(row["command"]),
                word_for_people(row, claims.silent_seconds(row), what), reached(row), row["touched"],
                row["exit_code"], code, cut(row["reason"] or row["cancel"] or row["waits"] or what)]

    def one(self, right, shown, accept_id, operator):
        """The view of one calculation: all of it."""
        store, claims = self.relay.store, self.relay.claims
        rows = store.read("SELECT %s, registered, request_id, bytes, verdicts, CASE WHEN LENGTH(info) <"
                          " 100000 THEN info END AS info FROM calculations WHERE accept_id = ?" % BRIEF,
                          accept_id)
        if not rows:
            raise ApiError(404, "There is no information for accept_id(%s)" % accept_id)
        row, why = rows[0], explained(self.relay, rows[0], operator)
        aside = {"seen": why.pop("seen"), "why_now": why.pop("now")}
        info = json.loads(row["info"] or "{}")
        texts = {name: cut(row[name] or "", 2000)
                 for name in ("user", "site", "command", "reason", "request_id", "poller", "waits", "cancel")}
        found = dict(texts, accept_id=accept_id, parameters=cut(info.get("parameters", ""), 4000),
                     patterns=[cut(text) for text in info.get("result_patterns", ())[:20]],
                     state=row["state"], step=reached(row), protocol=row["protocol"],
                     word=word_for_people(row, claims.silent_seconds(row), claims.what.get(accept_id, "")),
                     output=self.relay.quotas.output_sizes(row),
                     verdicts=[[cut(code), told["count"], [cut(name) for name in told["names"][:20]]]
                               for code, told in json.loads(row["verdicts"]).items()],
                     steps=[[step["attempt"], step["number"], cut(step["step"]), step["at"],
                             cut(step["reason"] or step["poller"] or "")]
                            for step in steps_of(store, "seq = ?", row["seq"])[-200:]],
                     inputs=self.files_of(row, "input"), results=self.files_of(row, "result"))
        found.update((name, row[name]) for name in ("status", "exit_code", "signal", "attempt", "registered",
                                                    "touched", "bytes"))
        return {"view": "one", "calc": found, "why": why}, aside

    def files_of(self, row, kind):
        """[how many there are, the first of them as (name, size, has it come)]."""
        names = self.relay.store.read("SELECT name, size, done FROM files WHERE calc = ? AND kind = ? ORDER"
                                      " BY n LIMIT ?", row["seq"], kind, BOARD_FILES)
        return [row[COUNTED[kind]], [[cut(found["name"]), found["size"], found["done"]] for found in names]]


def cut(text, most=BOARD_TEXT):
    """A text for the page: nothing in it that steers, and not too long."""
    text = printable(str(text)[:most + 1])
    return text if len(text) <= most else text[:most] + "\u2026"


def new_place():
    """What there is of a user at a site, while it is nothing."""
    return dict(dict.fromkeys(("until", "heard", "busy", "jobs", "outbox", "oldest", "version",
                               "waiting_since")),
                counts=collections.Counter(), standing="never", starved=False)


def places_of(relay, now):
    """({(site, user): what there is of that user there}, when a poller will stand otherwise by itself)."""
    places, due = calculations_of_places(relay), []
    for key, group in list(relay.pollers.known.items()):
        found = [(one, relay.pollers.standing(one, now)) for one in list(group.values())]
        if found:
            stand(places[key], found)
        due += [one.gone + HANG_UP if one.gone else one.at + SILENT_AFTER for one, how in found]
    due = [moment for moment in due if moment > now]
    for place in places.values():
        place["starved"] = place["standing"] in STARVED and place["counts"][ALLOWED] > 0
        place["counts"]["starved"] = place["counts"][ALLOWED] if place["starved"] else 0
    return dict(places), min(due, default=0.0)


def calculations_of_places(relay):
    """{(site, user): new_place() with the calculations that are there, by state, and those that need a
    person}."""
    places = collections.defaultdict(new_place)
    counts = [(key, number) for key, number in list(relay.meter.states.items()) if number]
    for (site, user, state), number in counts:
        places[site, user]["counts"][state] = number
    for row in relay.store.read("SELECT g.site, g.user, allowed FROM (SELECT site, user, MIN(seq) AS first"
                                " FROM calculations WHERE state = ? GROUP BY site, user) AS g JOIN"
                                " calculations ON seq = first", ALLOWED):
        places[row["site"], row["user"]]["waiting_since"] = row["allowed"]
    for name, where in (("abnormal", ABNORMAL), ("away", AWAY)):
        for row in relay.store.read("SELECT site, user, COUNT(*) AS n FROM calculations WHERE %s GROUP BY"
                                    " site, user" % where):
            places[row["site"], row["user"]]["counts"][name] = row["n"]
    return places


def stand(place, found):
    """Notes in place how its pollers [(Heard, standing)] stand: the nearest to taking work, and the sums of
    those that are there."""
    nearest, standing = max(found, key=lambda pair: (NEARER.index(pair[1]), pair[0].at))
    there = [one for one, how in found if how not in ("silent", "fielded", "untold")]
    place.update(standing=standing, until=nearest.told.get("until"), version=nearest.told.get("version"))
    for name in ("busy", "jobs", "outbox"):
        numbers = [one.told[name] for one in there if name in one.told]
        place[name] = sum(numbers) if numbers else None
    place["oldest"] = min((one.told["oldest"] for one, how in found if one.told.get("oldest")), default=None)
    # who tells that it is there is there now
    place["heard"] = nearest.at if standing in ("silent", "once", "untold", "fielded") else None


def rank(place):
    """By which the sites are put in order: those that need a person first."""
    counts = place["counts"]
    return (not place["starved"], not counts["away"], not place["outbox"],
            place["standing"] not in STARVED[1:], place["standing"] == "never" and not any(counts.values()))


def slow_facts(relay):
    """What is looked at once a minute: how the last day went at each site, what expires, the disk."""
    now, sparks = time.time(), collections.defaultdict(lambda: ([0] * SPARK, [0] * SPARK))
    begin = (now // SPARK_STEP - SPARK + 1) * SPARK_STEP
    for row in relay.store.read(
            "SELECT site, user, status = 'abnormal' AS bad, CAST((COALESCE(ended, touched) - ?) / ? AS INT)"
            " AS n, COUNT(*) AS many FROM calculations WHERE %s AND touched >= ?"
            " GROUP BY 1, 2, 3, 4" % state_in(OVER), begin, SPARK_STEP, begin):
        if 0 <= row["n"] < SPARK:
            sparks[row["site"], row["user"]][row["bad"]][row["n"]] += row["many"]
    expires = sorted((("token", row["user"], row["expires"]) for row in newest_tokens(relay, now)
                      if row["expires"] < now + EXPIRES_SOON), key=lambda one: one[2])[:20]
    end = certificate_end(relay.conf["Server"]["certfile"])
    expires[:0] = [("certificate", None, end)] if end and end < now + EXPIRES_SOON else []
    disk = os.statvfs(utf8(relay.store.folder))
    return {"expires": [(kind, user if user is None else cut(user), end) for kind, user, end in expires],
            "disk": disk.f_blocks * disk.f_frsize,
            "sparks": {key: tuple("".join(spark_digit(n) for n in numbers) for numbers in pair)
                       for key, pair in sparks.items()}}


def spark_digit(number):
    """How high a column is, 0 to 9: each step is twice as many."""
    return str(min(9, number.bit_length()))


def word_for_people(row, silent, what):
    """Where a calculation is, in README's words for people."""
    got = {"completed": "done"}.get(row["status"], "abnormal")
    for beginning, word in (("cancelled", "cancelled"), ("lost", "lost"), ("ended by an operator", "lost")):
        got = word if got == "abnormal" and row["reason"].startswith(beginning) else got
    waits = row["state"] in (SENT, RUNNING) and what and not what.startswith("running")
    if held_since(row) is not None:
        return "held"
    if silent is not None and row["state"] in CLAIMED:
        return "away"
    return "queued" if waits else {REGISTERED: "registered", ALLOWED: "waiting", SENDING: "taken",
                                   SENT: "taken", RUNNING: "running", ENDED: "ended", GETTING: "sending",
                                   GOT: got, FINISHED: "fetched"}[row["state"]]


def reached(row):
    """The number of the last of the nine steps that was made."""
    return list(WORDS).index(row["state"]) + 1


def page_answer(zipped):
    """(headers, body) of the page: its text is the same for everybody; the headers say by their sums which
    script and which style are its own. zipped: for who takes gzip."""
    import gzip
    found = PAGE_KEPT.get(zipped)
    if found is None:
        body = utf8(PAGE_HTML % {"css": PAGE_CSS, "js": PAGE_JS})
        sums = [base64.b64encode(hashlib.sha256(utf8(part)).digest()).decode()
                for part in (PAGE_JS, PAGE_CSS)]
        more = [("Content-Security-Policy", PAGE_POLICY % tuple(sums)), ("X-Content-Type-Options", "nosniff"),
                ("Referrer-Policy", "no-referrer"), ("X-Frame-Options", "DENY"),
                ("Cross-Origin-Opener-Policy", "same-origin"),
                ("Cross-Origin-Resource-Policy", "same-origin")]
        more += [("Content-Encoding", "gzip")] if zipped else []
        found = PAGE_KEPT[zipped] = more, gzip.compress(body, 9) if zipped else body
    return found


PAGE_KEPT = {}                         # {zipped: its answer}
PAGE_POLICY = ("default-src 'none'; script-src 'sha256-%s'; style-src 'sha256-%s'; connect-src 'self';"
               " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
               " require-trusted-types-for 'script'")


# ==== the sweeper ====

class Sweeper:
    """The thread that does once a second what is due."""

    def __init__(self, relay):
        self.relay = relay
        self.history_due = 0.0                         # monotonic
        self.lap = time.monotonic()                    # when it was at work last
        self.looked = self.lap                         # when who waits for conditions was looked at again

    def sweep_forever(self):
        """The sweeper thread."""
        slow = time.monotonic()
        ini_seen = self.relay.ini_stamp()
        certificate_seen = self.relay.certificate_stamp()
        while True:
            time.sleep(1)
            now = self.lap = time.monotonic()
            try:
                self.relay.access.load_tokens()
                self.relay.meter.sweep()
                self.relay.claims.read_pauses()
                self.relay.board.tick()
                self.run_operator_calls()
                self.relay.claims.sweep_leases(now)
                self.relay.fielded.sweep_announced(now)
                self.make_room()
                if now - self.looked >= CONDITIONS_EVERY:
                    self.looked = now
                    self.relay.front.fire(("conditions",))
                if self.relay.ini_stamp() != ini_seen:
                    ini_seen = self.relay.ini_stamp()
                    self.relay.try_reload()
                if self.relay.certificate_stamp() != certificate_seen:
                    certificate_seen = self.relay.certificate_stamp()
                    self.relay.renew_certificate()
                if (now - slow >= 60
                        or now - slow
                        >= min(self.relay.conf["times"][key]
                               for key in ("register_for", "keep_fetched", "lost_after"))):
                    slow = now
                    self.relay.access.note_use()
                    self.relay.pollers.keep()
                    self.relay.access.forget_logins(time.time())
                    self.relay.claims.sweep_lost(now)
                    self.sweep_old(time.time())
            except (ApiError, OSError, sqlite3.Error) as error:
                log("error", None, "sweeper", error=error)

    def sweep_old(self, now):
        """Removes what its time has come for: never allowed, fetched, never fetched. now: seconds since the
        epoch."""
        times, monotonic = self.relay.conf["times"], time.monotonic()
        arriving = {key[0]
                    for key, upload in list(self.relay.uploads.items())
                    if monotonic - upload.touched < times["register_for"]}
        for key, upload in list(self.relay.uploads.items()):
            if monotonic - upload.touched > 600:       # its bytes stay; the sum is made again when it goes on
                self.relay.uploads.pop(key, None)
        for seq, heard in list(self.relay.claims.stamps.items()):
            if monotonic - heard > times["register_for"]:                # says no more than self.born now
                self.relay.claims.stamps.pop(seq, None)
        old = []
        for state, field, limit in ((REGISTERED, "touched", "register_for"),
                                    (FINISHED, "finished", "keep_fetched"), (GOT, "got", "keep_results")):
            old += self.relay.store.read("SELECT seq, accept_id, user, site, state, touched FROM calculations"
                                         " WHERE state = ? AND touched < ? AND %s < ? LIMIT 10000" % field,
                                         state, now - times[limit], now - times[limit])
        for row in old:
            if (row["state"] == REGISTERED
                and (row["seq"] in arriving or self.relay.claims.idle_seconds(row) < times["register_for"])):
                continue

            def work(tx):
                gone = tx.db.execute("DELETE FROM calculations WHERE seq = ? AND state = ?",
                                     (row["seq"], row["state"])).rowcount
                if gone:
                    tx.db.execute("DELETE FROM files WHERE calc = ?", (row["seq"],))
                    tx.after(lambda: self.relay.meter.moved(None, row["state"], row, {}, now))
                return gone

            if self.relay.store.write(work, "retention"):
                log("info", row["accept_id"], "removed", state=row["state"], user=row["user"])
                remove_tree(self.relay.store.spool(row["accept_id"], ""))
                self.relay.news.tell(row["accept_id"], row["user"])
        if monotonic >= self.history_due:
            self.sweep_history(now - times["keep_history"],
                               monotonic + min(3600, times["keep_history"] / 100))
        self.relay.quotas.recount()
        self.relay.meter.count_stored()
        self.relay.store.make_ballast()

    def sweep_history(self, oldest, then):
        """Forgets the steps of calculations that are removed and had their last step before `oldest`, and
        what is more than HISTORY calculations ago. That looks at all of the history: `then` is soon enough
        (time.monotonic()) for the next look, unless there is more to forget."""
        gone = self.relay.store.read(
            "SELECT seq FROM past WHERE (registered < ? AND NOT EXISTS (SELECT 1 FROM events WHERE calc = seq"
            " AND at >= ?) OR seq < (SELECT MAX(seq) FROM past) - ?) AND seq NOT IN (SELECT seq FROM"
            " calculations) LIMIT 1000", oldest, oldest, HISTORY)
        self.history_due = then if len(gone) < 1000 else 0.0
        if gone:
            numbers = [(row["seq"],) for row in gone]
            self.relay.store.write(lambda tx: [
                tx.db.executemany("DELETE FROM %s WHERE %s = ?" % pair, numbers)
                for pair in (("events", "calc"), ("past", "seq"))], "history")

    def make_room(self):
        """Somebody was refused for want of room: the files of what is fetched go before keep_fetched, the
        oldest first, if that can be enough. The calculations stay, so that a request_id that comes again
        finds what it ran; on a full disk nothing could be noted anyhow."""
        need = self.relay.store.bytes_refused
        self.relay.store.bytes_refused = 0
        free = self.relay.store.free()
        if not need:
            return
        old = [row
               for row in self.relay.store.read(
                   "SELECT c.accept_id, c.user, SUM(f.size + ?) AS bytes FROM calculations c JOIN files f ON"
                   " f.calc = c.seq WHERE c.state = ? GROUP BY c.seq ORDER BY c.finished", BLOCK, FINISHED)
               if self.relay.store.has_files(row)]
        if need > free + sum(row["bytes"] for row in old):
            return
        need += self.relay.store.bytes_to_keep_free(self.relay.conf["limits"][
            "spool_free"]) + self.relay.quotas.reserved - free
        for row in old:
            if need <= 0:
                break
            log("info", row["accept_id"], "files-removed", why="no room", user=row["user"])
            path = self.relay.store.spool(row["accept_id"], "").rstrip(b"/")
            os.rename(path, path + b".gone")           # a start removes it, if this ends here
            remove_tree(path + b".gone")
            need -= row["bytes"]

    def run_operator_calls(self):
        """Does what operators' commands have left in the database."""
        for row in self.relay.store.read("SELECT number, call, fields FROM orders WHERE answer IS NULL"):
            try:
                call = OperatorCall(self.relay, row["call"], json.loads(row["fields"]))
                found = call.route.function(call)
                answer = [200, found["message"], found]
            except ApiError as refusal:
                answer = [refusal.code, str(refusal), {}]
            except Exception as error:                 # a bug of ours costs one answer, not this thread
                log("error", None, row["call"], bug="%s: %s" % (type(error).__name__, error))
                answer = [500, "the relay failed on this call; its log says where", {}]
            self.relay.store.write(lambda tx: tx.db.execute("UPDATE orders SET answer = ? WHERE number = ?",
                                                            (json.dumps(answer), row["number"])), "order")


# ==== the relay ====

class Relay:
    """What the calls share: conf, store, front, and the parts that hold what is known in memory."""

    def __init__(self, conf, ini, store):
        self.conf = conf                            # the ini as it is in force; another object after a reload
        self.ini = ini                                 # its path
        self.store = store
        self.front = None                              # set when it listens
        self.access = Access(self)
        self.claims = Claims(self)
        self.quotas = Quotas(self)
        self.pollers = Pollers(self)
        self.meter = Meter(self)
        self.news = News(self)
        self.fielded = FieldedPollers(self)
        self.board = Board(self)
        self.lengths = {}                              # see Facts.runs()
        self.sweeper = Sweeper(self)
        self.uploads = {}                              # {(seq, kind, n): Upload or LaneUpload}
        self.beginning = [threading.Lock() for _number in range(16)]      # see beginning_of()
        self.transfers = Transfers(self)
        self.placing = threading.Lock()                # files of a result are put in their place
        # of packing at once: whatever else a processor has to do goes on
        self.packing = threading.BoundedSemaphore(max(1, (os.cpu_count() or 2) // 2))
        self.nothing = {}                         # {key of a site and user: events when nothing waited there}
        self.instance = self.read_instance()

    def read_instance(self):
        """The name of this state_dir, by which clients see that a relay was exchanged; made at the first
        start."""
        path = os.path.join(self.store.folder, "instance")
        try:
            with open(utf8(path), encoding="ascii", errors="replace") as text:
                found = text.read(100).strip()
        except FileNotFoundError:
            found = ""
        if not re.match("[!-~]{1,100}\\Z", found):     # not there, or broken
            found = os.urandom(8).hex()
            with open(utf8(path), "w") as out:
                out.write(found + "\n")
        return found

    def rules(self, site):
        """A site's section of the ini."""
        return self.conf.get(site) or {key: row[1] for key, row in INI_KEYS["*"].items()}

    def behind_gateway(self):
        """True where a gateway in front has checked the tokens."""
        return self.conf["Server"]["auth"] == "gateway"

    def beginning_of(self, key):
        """The lock under which a file's upload is made, and removed."""
        return self.beginning[hash(key) % len(self.beginning)]

    def forget_uploads(self, seq):
        """Ends a calculation's running uploads, after it is on disk that nothing more is taken for them."""
        for key in [key for key in list(self.uploads) if key[0] == seq]:
            upload = self.uploads.pop(key, None)
            if upload is not None:
                upload.end()

    def tidy_spool(self, row, *kinds):
        """Nothing more is taken for this calculation's present files: what none of them is in goes, such
        as parts of what then came otherwise. Of results in the writer's thread: nobody notes others
        meanwhile."""
        self.forget_uploads(row["seq"])
        try:
            for kind in kinds:
                folder = self.store.spool(row["accept_id"], kind).rstrip(b"/")
                there = os.listdir(folder) if os.path.isdir(folder) else ()
                noted = there and {found["blob"] for found in self.store.read(
                    "SELECT DISTINCT blob FROM files WHERE calc = ? AND kind = ?", row["seq"], kind)}
                for name in there:
                    if name.decode() not in noted:
                        unlink_if_there(os.path.join(folder, name))
            above = self.store.spool(row["accept_id"], "")
            for name in os.listdir(above) if os.path.isdir(above) else ():
                if name.startswith(b"out."):           # set aside, and not yet removed
                    remove_tree(os.path.join(above, name))
        except (OSError, sqlite3.Error) as error:      # retention takes it
            log("warn", row["accept_id"], "spool", error=error)

    def tidy_latest(self):
        """At the start: what a relay that was killed would have tidied after its last commit. Its steps are
        the last that were noted, whatever the clock said."""
        for row in self.store.read("SELECT seq, accept_id, state FROM calculations WHERE state != ? AND seq"
                                   " IN (SELECT calc FROM events ORDER BY rowid DESC LIMIT 1024)",
                                   REGISTERED):
            self.tidy_spool(row, *(("input", "result") if row["state"] in OVER else ("input",)))

    def ini_stamp(self):
        """Changes when the ini does."""
        try:
            found = os.stat(utf8(self.ini))
            return found.st_mtime, found.st_size, found.st_ino
        except OSError:
            return None

    def certificate_stamp(self):
        """Changes when the certificate or its key is renewed."""
        try:
            return [os.stat(utf8(self.conf["Server"][key])).st_mtime
                    for key in ("certfile", "keyfile", "client_ca") if self.conf["Server"][key]]
        except OSError:
            return None

    def reload(self):
        """Takes a changed ini into force. Stop, with the line that is wrong, if it is broken: then the old
        one stays."""
        conf = check_conf(read_ini(self.ini, INI_KEYS), self.ini)
        for section, key in AT_START:
            if conf[section][key] != self.conf[section][key]:
                log("warn", None, "reload", key=key, why="takes effect at the next start")
                conf[section][key] = self.conf[section][key]
        self.conf = conf
        self.note_settings()
        SAY["level"] = LEVELS.index(conf["Server"]["loglevel"])
        log("info", None, "reload", ini=self.ini, sites=len(conf["RemoteSites"]["remote_site_ids"]))

    def note_settings(self):
        """state_dir/settings: with which values this relay runs, for `check` and `list`."""
        path = os.path.join(utf8(self.store.folder), b"settings")
        try:
            with open(path + b".part", "w", encoding="utf-8") as out:
                json.dump({"process": process_mark(os.getpid()), "conf": self.conf}, out)
            os.rename(path + b".part", path)
        except OSError as error:
            log("warn", None, "settings", error=error)

    def try_reload(self):
        """reload(), for a file that changed by itself: a broken one is one line in the log."""
        try:
            self.reload()
        except Stop as stop:
            log("error", None, "reload", refused=stop, why="the old ini stays in force")

    def on_hangup(self):
        """SIGHUP: the log file anew, and the ini."""
        try:
            log_into(self.conf["Server"]["logfile"])
        except OSError as error:
            log("error", None, "logfile", refused=error, why="the old one is written on")
        self.try_reload()

    def renew_certificate(self):
        """A renewed certificate is used for new connections; a broken one is not."""
        try:
            self.front.context = tls_context(self.conf["Server"])
            log("info", None, "certificate", renewed=self.conf["Server"]["certfile"])
        except Stop as stop:
            log("error", None, "certificate", refused=stop, why="the old one stays in force")


# ==== the store ====
SCHEMA_VERSION = 5
SCHEMA = """
CREATE TABLE calculations (
  seq INTEGER PRIMARY KEY, accept_id TEXT NOT NULL UNIQUE,
  user TEXT NOT NULL, request_id TEXT, fingerprint TEXT,
  site TEXT NOT NULL, command TEXT NOT NULL, info TEXT NOT NULL, needs_v2 INTEGER NOT NULL,
  v1 INTEGER NOT NULL DEFAULT 0, hidden INTEGER NOT NULL DEFAULT 0, version INTEGER NOT NULL DEFAULT 0,
  state TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'none', reason TEXT NOT NULL DEFAULT '',
  inputs INTEGER NOT NULL DEFAULT 0, inputs_open INTEGER NOT NULL DEFAULT 0,
  inputs_more INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
  results INTEGER NOT NULL DEFAULT 0, results_open INTEGER NOT NULL DEFAULT 0,
  results_more INTEGER NOT NULL DEFAULT 0, manifest TEXT,
  protocol INTEGER NOT NULL DEFAULT 0, claim TEXT, attempt INTEGER NOT NULL DEFAULT 0, take TEXT,
  poller TEXT, cancel TEXT,
  silent REAL NOT NULL DEFAULT 0,
  registered REAL NOT NULL, touched REAL NOT NULL, allowed REAL, claimed REAL, started REAL, ended REAL,
  got REAL, finished REAL,
  exit_code INTEGER, signal INTEGER, report TEXT NOT NULL DEFAULT '{}',
  missing TEXT NOT NULL DEFAULT '{}', refused TEXT NOT NULL DEFAULT '{}',
  verdicts TEXT NOT NULL DEFAULT '{}', texts INTEGER NOT NULL DEFAULT 0, waits TEXT NOT NULL DEFAULT '',
  signed TEXT NOT NULL DEFAULT '');
CREATE INDEX by_queue ON calculations (site, state, user, seq);
CREATE INDEX by_state ON calculations (state, touched);
CREATE UNIQUE INDEX by_request ON calculations (user, request_id);
CREATE TABLE files (
  calc INTEGER NOT NULL, kind TEXT NOT NULL, n INTEGER NOT NULL,
  name TEXT NOT NULL, size INTEGER NOT NULL, sha256 TEXT NOT NULL,
  done INTEGER NOT NULL DEFAULT 0, blob TEXT, at INTEGER NOT NULL DEFAULT 0, x INTEGER, mtime REAL,
  PRIMARY KEY (calc, kind, n));
CREATE INDEX by_done ON files (done);
CREATE TABLE tokens (
  number INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE,
  user TEXT NOT NULL, roles TEXT NOT NULL, sites TEXT NOT NULL,
  issued REAL NOT NULL, expires REAL NOT NULL, revoked REAL, used REAL, login INTEGER NOT NULL DEFAULT 0);
CREATE TABLE users (
  name TEXT PRIMARY KEY, password TEXT NOT NULL, roles TEXT NOT NULL, sites TEXT NOT NULL,
  changed REAL NOT NULL, known TEXT NOT NULL DEFAULT '');
CREATE TABLE orders (number INTEGER PRIMARY KEY, call TEXT NOT NULL, fields TEXT NOT NULL, answer TEXT);
"""
SEEN = """
CREATE TABLE past (
  seq INTEGER PRIMARY KEY, accept_id TEXT NOT NULL, user TEXT NOT NULL, site TEXT NOT NULL,
  command TEXT NOT NULL, registered REAL NOT NULL);
CREATE TABLE events (
  calc INTEGER NOT NULL, attempt INTEGER NOT NULL, step TEXT NOT NULL, at REAL NOT NULL, note TEXT NOT NULL,
  PRIMARY KEY (calc, attempt, step));
CREATE TABLE pollers (
  site TEXT NOT NULL, user TEXT NOT NULL, name TEXT NOT NULL, protocol INTEGER NOT NULL,
  heard REAL NOT NULL, told TEXT NOT NULL, PRIMARY KEY (site, user, name));
"""
SCHEMA += SEEN
# from version 1 to 2, and so on
UPGRADES = {
    1: "ALTER TABLE tokens ADD COLUMN used REAL;"
       " ALTER TABLE tokens ADD COLUMN login INTEGER NOT NULL DEFAULT 0;"
       "CREATE TABLE users (name TEXT PRIMARY KEY, password TEXT NOT NULL, roles TEXT NOT NULL,"
       " sites TEXT NOT NULL, changed REAL NOT NULL);",
    2: "ALTER TABLE files ADD COLUMN x INTEGER; ALTER TABLE files ADD COLUMN mtime REAL;"
       "ALTER TABLE calculations ADD COLUMN verdicts TEXT NOT NULL DEFAULT '{}';"
       "ALTER TABLE calculations ADD COLUMN texts INTEGER NOT NULL DEFAULT 0;"
       " UPDATE calculations SET texts = LENGTH(info);"
       "ALTER TABLE calculations ADD COLUMN waits TEXT NOT NULL DEFAULT '';"
       "ALTER TABLE users ADD COLUMN known TEXT NOT NULL DEFAULT '';",
    3: SEEN + "INSERT INTO past SELECT seq, accept_id, user, site, command, registered FROM calculations;"
       + "".join("INSERT INTO events SELECT seq, %s, '%s', %s, '' FROM calculations WHERE %s IS NOT NULL AND"
                 " %s IS NOT NULL;" % (attempt, step, time, time, needs)
                 for attempt, step, time, needs in (
                     ("0", "add-calcinfo", "registered", "seq"), ("0", "allow-wait-calc", "allowed", "seq"),
                     ("attempt", "calc-request", "claimed", "seq"),
                     ("attempt", "calc-start", "started", "seq"), ("attempt", "calc-end", "ended", "seq"),
                     ("attempt", "end-send", "got", "ended"), ("attempt", "finish", "finished", "seq"))),
    4: "ALTER TABLE calculations ADD COLUMN signed TEXT NOT NULL DEFAULT '';"}
# kind of a file -> the columns that count such: NAME, NAME_open (not yet complete), NAME_more (not yet
# declared)
COUNTED = {"input": "inputs", "result": "results"}
BRIEF = ("seq, accept_id, user, site, command, state, status, reason, version, inputs, inputs_open,"
         " inputs_more, results, results_open, results_more, manifest, needs_v2, hidden, protocol, claim,"
         " attempt, poller, cancel, silent, touched, allowed, started, ended, exit_code, signal, waits")
LISTING = BRIEF + ", request_id, registered"


class Store:
    """The state of the relay under one directory. Reads from any thread; every change goes through
    write()."""

    def __init__(self, folder, lock=True):
        self.folder = folder
        self.readers = []                              # connections that are free to read
        self.requests = collections.deque()            # WriteRequests for the writer
        self.requested = threading.Semaphore(0)        # one for each
        self.closing = False
        self.at_work = None                            # since when the writer changes what it changes now
        self.committed = 0.0                           # when it last did
        self.failed = ""                               # why it could not, if it could not the last time
        try:
            os.makedirs(utf8(folder), 0o700, exist_ok=True)
            if os.stat(utf8(folder)).st_uid != os.geteuid():
                raise Stop(EX_CONFIG,
                           _("%s: belongs to another user; run as that user, or set [Server] state_dir")
                           % folder)
            os.chmod(utf8(folder), 0o700)
            if lock:
                self.lock = open(os.path.join(utf8(folder), b"lock"), "a")
                if not take_lock(self.lock):
                    raise Stop(EX_TEMPFAIL, _("%s: another relay is running on this directory") % folder)
        except PermissionError as error:
            raise Stop(EX_CONFIG,
                       _("%s: %s; set [Server] state_dir to a directory of yours") % (folder, error.strerror))
        except OSError as error:
            raise Stop(EX_IOERR, "%s: %s" % (folder, error.strerror))
        self.path = os.path.join(folder, "state.sqlite3")
        try:
            db = self.connect()
            self.open_schema(db)
        except sqlite3.DatabaseError as error:
            raise Stop(EX_IOERR, _("%s: %s") % (self.path, error))
        self.writer = db
        self.bytes_refused = 0                                # bytes for which there was no room lately

    def connect(self):
        """A connection to the database; isolation is ours."""
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA cache_size=-1024")
        db.execute("PRAGMA synchronous=FULL")
        return db

    def open_schema(self, db):
        """Makes the tables in a new database; refuses one of a newer version or on a file system without
        WAL."""
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found > SCHEMA_VERSION:
            raise Stop(EX_CONFIG,
                       _("%s: was written by a newer version of this program (schema %d)")
                       % (self.path, found))
        if db.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise Stop(EX_CONFIG,
                       _("%s: this file system cannot hold it (NFS?); set [Server] state_dir to a local disk")
                       % self.path)
        if not found:
            db.executescript("BEGIN IMMEDIATE;" + SCHEMA + "PRAGMA user_version=%d; COMMIT;" % SCHEMA_VERSION)
            os.chmod(utf8(self.path), 0o600)
        if 0 < found < SCHEMA_VERSION:
            self.back_up_old(db, found)
        for older in range(found or SCHEMA_VERSION, SCHEMA_VERSION):
            db.executescript("BEGIN IMMEDIATE;" + UPGRADES[older]
                             + "PRAGMA user_version=%d; COMMIT;" % (older + 1))

    def back_up_old(self, db, found):
        """A copy of the database as an older program left it, beside it, before it is changed: whoever goes
        back to that program moves it into the place of the new one (with the program stopped), and loses what
        happened since."""
        import shutil
        with open(os.path.join(utf8(self.folder), b"lock"), "a") as lock:
            if not hasattr(self, "lock") and not take_lock(lock):
                raise Stop(EX_TEMPFAIL,
                           _("%s: a relay of an older version runs on it: restart it as this version first")
                           % self.folder)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("BEGIN IMMEDIATE")                  # from here on nobody writes
        try:
            copy = self.path + ".schema%d" % found
            if os.path.lexists(copy):  # of an upgrade that was cut off, or of going back: none is overwritten
                copy += time.strftime("-%Y%m%dT%H%M%S")
            shutil.copyfile(utf8(self.path), utf8(copy + ".part"))
            os.chmod(utf8(copy + ".part"), 0o600)
            sync_path(utf8(copy + ".part"))
            os.rename(utf8(copy + ".part"), utf8(copy))
            sync_path(utf8(self.folder))
        finally:
            db.execute("ROLLBACK")
        log("info", None, "upgrade", schema=found, to=SCHEMA_VERSION, backup=copy)
        fault("old state kept")

    def read(self, sql, *values):
        """All rows of a SELECT, from any thread: on a connection that is free, or a new one."""
        try:
            db = self.readers.pop()
        except IndexError:
            db = self.connect()
            db.execute("PRAGMA cache_size=-256")       # KiB each: the system has the file in its cache
        try:
            return db.execute(sql, values).fetchall()
        finally:
            self.readers.append(db)

    def write(self, work, name="", wait=True):
        """work(tx) inside the next group commit; its result once that is on disk. What it raises rolls back
        its own changes only."""
        request = WriteRequest(work, name)
        self.requests.append(request)
        self.requested.release()
        if not wait:
            return None
        request.done.acquire()
        if request.error is not None:
            raise request.error
        return request.result

    def write_forever(self):
        """The writer thread: every job that has come meanwhile, one transaction, one fsync."""
        while not self.closing or self.requests:
            self.requested.acquire()
            if not self.requests:
                continue
            requests = [self.requests.popleft()]
            while self.requests and len(requests) < 256 and self.requested.acquire(blocking=False):
                requests.append(self.requests.popleft())
            self.at_work = time.monotonic()
            try:
                self.transact(requests)
                self.committed, self.failed = time.monotonic(), ""
            except sqlite3.Error as error:
                full = "full" in str(error) or "disk I/O" in str(error)
                self.failed = "disk" if full else "database"
                if full:
                    self.drop_ballast()
                for request in requests:
                    request.error = self.no_room(BALLAST) if full else error
            for request in requests:
                request.tell()
            self.at_work = None

    def transact(self, requests):
        """One group commit. sqlite3.Error: nothing of it happened."""
        db = self.writer
        try:
            db.execute("BEGIN IMMEDIATE")
            for request in requests:
                db.execute("SAVEPOINT job")
                request.db = db
                try:
                    request.result = request.work(request)
                except sqlite3.OperationalError:
                    raise
                except Exception as error:             # the caller's, raised there
                    request.error = error
                    db.execute("ROLLBACK TO job")
                db.execute("RELEASE job")
                fault(request.name + " uncommitted")
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def make_ballast(self):
        """Makes the ballast again where there is room for it."""
        path = os.path.join(utf8(self.folder), b"ballast")
        try:
            if not os.path.exists(path) and self.free() > 8 * BALLAST:
                with open(path, "wb") as out:
                    os.posix_fallocate(out.fileno(), 0, BALLAST)
        except OSError:
            pass

    def drop_ballast(self):
        """The disk is full: frees the ballast, so that deletes and checkpoints work."""
        log("error", None, "disk-full", state_dir=self.folder)
        try:
            os.unlink(os.path.join(utf8(self.folder), b"ballast"))
        except OSError:
            pass

    def has_files(self, row):
        """Are the files of a calculation that was fetched still there?"""
        return os.path.isdir(self.spool(row["accept_id"], ""))

    def no_room(self, need):
        """The refusal of what needs so many bytes; the sweeper is told."""
        self.bytes_refused = max(self.bytes_refused, need, 1)
        return refused(507, "disk", {"count": need}, why="disk")

    def free(self):
        """Free bytes for the spool; where inodes are scarcer than bytes, what their share of the disk has."""
        found = os.statvfs(utf8(self.folder))
        left = found.f_bavail * found.f_frsize
        return (min(left, found.f_favail * found.f_blocks * found.f_frsize // found.f_files) if found.f_files
                else left)

    def bytes_to_keep_free(self, limit):
        """Bytes that stay free: limit is bytes, or a share of the disk."""
        found = os.statvfs(utf8(self.folder))
        return limit if isinstance(limit, int) else int(limit * found.f_blocks * found.f_frsize)

    def spool(self, accept_id, kind, blob=""):
        """Path (bytes) of a calculation's spool directory or of one blob in it. All parts are ours: an id, a
        kind, a number."""
        return utf8(os.path.join(self.folder, "spool", accept_id[:2], accept_id,
                                 {"input": "in", "result": "out", "": ""}[kind], blob))

    def drop_orphans(self):
        """At the start: files of calculations that are removed, if the relay was killed just there."""
        top = os.path.join(self.folder, "spool")
        for part in os.listdir(top) if os.path.isdir(top) else ():
            if len(part) == 2:
                known = {row[0]
                         for row in self.read("SELECT accept_id FROM calculations WHERE accept_id >= ? AND"
                                              " accept_id < ?", part, part + "~")}
                for name in set(os.listdir(os.path.join(top, part))) - known:
                    remove_tree(self.spool(name, ""))

    def close(self):
        """Ends the writer after what is queued, and folds the log into the database."""
        self.closing = True
        self.requested.release()


class WriteRequest:
    """One piece of work for the writer. work sees it as tx: tx.db to execute on, tx.read() as the store's,
    tx.after(hook) to run once it is on disk."""

    def __init__(self, work, name):
        self.work = work
        self.name = name
        self.hooks = []
        self.result = None
        self.error = None
        self.db = None
        self.done = threading.Lock()
        self.done.acquire()
        self.after = self.hooks.append

    def tell(self):
        """It is on disk, or has failed: the hooks of what is run, and who waits for it goes on."""
        if self.error is None:
            fault(self.name + " committed")
            for hook in self.hooks:
                hook()
        self.done.release()

    def read(self, sql, *values):
        """All rows of a SELECT, with what this transaction has changed."""
        return self.db.execute(sql, values).fetchall()


def take_lock(lock):
    """Takes the lock of an open file. False if another process holds it; without locks nobody does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)


def make_folder(path, until):
    """Makes the folder (bytes) and what is missing above it, each entry on disk; until: where to stop
    looking."""
    if path != until and not os.path.isdir(path):
        above = os.path.dirname(path)
        make_folder(above, until)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return
        sync_path(above)


def sync_path(path):
    """fsync of a folder (FUSE and CIFS may know none of directories) or a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(fd)


def remove_blob(folder, blob):
    """Removes a blob (bytes) of which nothing is noted, and its folder if nothing else is in it."""
    for remove, path in ((os.unlink, os.path.join(folder, blob)), (os.rmdir, folder)):
        try:
            remove(path)
        except OSError:                                # it was set aside, or more is there
            pass


def unlink_if_there(path):
    """Removes a file, unless somebody else just did."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_tree(path):
    """Removes a folder of the spool with what is in it; a link is never followed. Two may do so at once."""
    try:
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            else:
                unlink_if_there(entry.path)
        os.rmdir(path)
    except FileNotFoundError:
        pass


# ==== connections ====
OPEN_CALLS = ("version", "healthz", "page")            # need no token
AT_ROOT = ("reload-ini", "healthz", "metrics")         # stand also outside of API_PATH
JSON_TYPE = "application/json; charset=utf-8"
WOULD_BLOCK = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError)
HEADER_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\Z")
SINGLE_HEADERS = ("content-length", "transfer-encoding", "host", "authorization", "content-type", "range",
                  "if-range", "connection", "expect")


class Front:
    """The connections of a relay. The thread in serve() accepts, does the handshakes, collects heads and
    small bodies, checks tokens, and holds whoever waits; only a complete request with a good token goes to a
    worker."""

    def __init__(self, relay):
        self.relay = relay
        self.poll = select.epoll()
        self.listeners = {}                            # {descriptor: socket}
        self.context = None                            # for TLS; another one when the certificate is renewed
        self.conns = {}                                # {descriptor: Connection}
        self.strangers = {}                          # {address: those without a good token, the oldest first}
        self.known = {}                                # {key of a token: its connections, the oldest first}
        # who waits; under wait_lock
        self.wait_lock = threading.Lock()
        self.waiting = {}                              # {key: connections, the oldest first}
        self.ending = {}                               # {tick: {connections whose wait ends before it}}
        self.events = [0] * 4096                       # how many there have been, by the key's hash
        self.parked = collections.Counter()            # calls that wait, by token
        self.parked_bytes = collections.Counter()      # their bodies, by user
        # what is to be done; under queue_lock
        self.queue_lock = threading.Lock()
        self.small_calls = collections.deque()
        self.bulk_calls = collections.OrderedDict()    # what moves much: queues by user
        self.bulk_at_work = collections.Counter()      # how many of them are at work, by user
        self.taken = time.monotonic()                  # when a worker took its last request
        self.sleeping = []                            # workers without work: a lock each, released to wake it
        self.logins = queue.Queue()                    # connections that ask for a log-in
        # to the selector
        self.inbox = collections.deque()               # connections that workers give back
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        self.poll.register(self.wake_read, select.EPOLLIN)
        self.signals = collections.deque()             # numbers, noted by the handlers
        self.stopping = None                           # until when running requests may be answered
        self.stopped_by = None                         # number of the signal

    def listen(self, address, port):
        """Opens the listening sockets. 69 if the port is in use, 78 if the address is not this host's."""
        try:
            found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise Stop(EX_CONFIG, _("[Server] ipaddress = %s: %s") % (address, error.strerror or error))
        for family, kind, proto, name, where in found:
            sock = socket.socket(family, kind, proto)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(where)
                sock.listen(4096)
            except OSError as error:
                code = EX_UNAVAILABLE if error.errno == errno.EADDRINUSE else EX_CONFIG
                raise Stop(code, _("cannot listen on %s port %d: %s") % (address, port, error.strerror))
            sock.setblocking(False)
            self.listeners[sock.fileno()] = sock
            self.poll.register(sock, select.EPOLLIN)
            port = sock.getsockname()[1]
        return port

    # -- the selector thread

    def serve(self):
        """Runs until stop() was called and the running requests are answered (at most 10 s)."""
        swept = ticked = time.monotonic()
        while True:
            for number, events in self.poll.poll(max(0.0, ticked + TICK - time.monotonic())):
                if number == self.wake_read:
                    try:
                        os.read(self.wake_read, 65536)
                    except BlockingIOError:
                        pass
                elif number in self.listeners:
                    self.accept(self.listeners[number])
                elif number in self.conns:
                    self.guarded(self.readable, self.conns[number])
            while self.inbox:
                self.guarded(self.take_back, self.inbox.popleft())
            while self.signals:
                self.handle_signal(self.signals.popleft())
            if time.monotonic() - ticked >= TICK:
                ticked = time.monotonic()
                self.end_waits(ticked)
            if ticked - swept >= 1:
                swept = ticked
                self.sweep(swept)
            if (self.stopping
                    and (time.monotonic() > self.stopping
                         or all(conn.phase != "busy" for conn in list(self.conns.values())))):
                return

    def note_signal(self, number, frame):
        """A signal handler."""
        self.signals.append(number)
        if number != signal.SIGHUP:
            exit_after(EX_INTERRUPT if number == signal.SIGINT else 0, LEAVE)

    def handle_signal(self, number):
        """SIGHUP opens the log file and reads the ini again; SIGTERM and Ctrl+C end in order."""
        if number == signal.SIGHUP:
            threading.Thread(target=self.relay.on_hangup, daemon=True).start()
        else:
            self.stopped_by = number
            self.stop()

    def guarded(self, step, conn):
        """A bug of ours costs one connection, never this thread."""
        try:
            step(conn)
        except Exception as error:
            log("error", None, "connection", address=conn.address,
                bug="%s: %s" % (type(error).__name__, error))
            if conn.phase != "busy":
                self.drop(conn)

    def stop(self):
        """No new connection or request; for a signal handler's flag to call."""
        if self.stopping is None:
            self.stopping = time.monotonic() + 10
            for number, sock in self.listeners.items():
                self.poll.unregister(sock)
                sock.close()
            self.listeners = {}
            for conn in list(self.conns.values()):
                if conn.phase != "busy" and (conn.phase != "parked" or self.unpark(conn)):
                    self.drop(conn)

    def accept(self, listener):
        """Takes what has arrived, within the caps."""
        limits, now = self.relay.conf["limits"], time.monotonic()
        for turn in range(64):
            try:
                sock, where = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    log("warn", None, "connections", why="too many open files: raise LimitNOFILE")
                    time.sleep(0.05)
                return
            address = where[0]
            stranger = address not in self.relay.conf["Server"]["trusted_proxies"]
            if (stranger and self.relay.behind_gateway()
                or stranger and not self.room_for(address, limits["unauthenticated_per_address"], now)
                or len(self.conns) >= limits["connections"]
                and not self.room_at_all(limits["connections"] // SHARES, now)):
                sock.close()
                continue
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.context is not None:
                    sock = self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except (OSError, ValueError):
                sock.close()
                continue
            conn = Connection(sock, address, "shake" if self.context is not None else "head",
                              now + limits["handshake" if self.context is not None else "headers"])
            self.strangers.setdefault(address, collections.OrderedDict())[conn] = None
            self.conns[sock.fileno()] = conn
            self.poll.register(sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT)

    def room_for(self, address, most, now):
        """May another stranger of this address come in? If there are as many as may be, in place of the
        oldest that had a second to show its token: whoever hangs on does not keep others behind the same
        address out."""
        there = self.strangers.get(address, ())
        return len(there) < most or self.drop_oldest(there, now)

    def room_at_all(self, most, now):
        """There are as many connections as may be: may another one come in? In place of a stranger's who
        hangs on, or of the token's that has the most, if those are more than `most`: nobody who has a token
        keeps all others out. (Waiting calls have a limit of their own.)"""
        strangers, known = (max(groups.values(), key=len, default=())
                            for groups in (self.strangers, self.known))
        return self.drop_oldest(strangers, now) or len(known) > most and self.drop_oldest(known, now)

    def drop_oldest(self, there, now):
        """Drops the oldest of these connections that is neither at work nor waits for news, if it had its
        second. False if there is none."""
        oldest = next((conn for conn in there if conn.phase not in ("busy", "parked")), None)
        if oldest is None or now - oldest.born < 1:
            return False
        self.drop(oldest)
        return True

    def readable(self, conn):
        """Something has come (or gone) on a connection that the selector owns."""
        if conn.phase == "parked":
            if not self.unpark(conn):
                return                                 # a worker has it already
            self.parked_readable(conn)
        elif conn.phase == "shake":
            try:
                conn.sock.do_handshake()
            except ssl.SSLWantReadError:
                return self.rearm(conn)
            except ssl.SSLWantWriteError:
                return self.rearm(conn, select.EPOLLOUT)
            except (OSError, ValueError):
                return self.drop(conn)
            conn.phase, conn.deadline = "head", time.monotonic() + self.relay.conf["limits"]["headers"]
            self.collect(conn)
        elif conn.phase != "busy":
            self.collect(conn)

    def parked_readable(self, conn):
        """A client that waits sent something (kept for later) or is gone."""
        try:
            data = conn.sock.recv(65536)
        except WOULD_BLOCK:                                  # on TLS 1.3, readable is not yet data
            data = None
        except (OSError, ValueError):
            data = b""
        if data == b"" or data and len(conn.buffer) + len(data) > MAX_HEAD:
            self.relay.pollers.miss(conn.call)
            return self.drop(conn)
        conn.buffer += data or b""
        conn.phase = "busy"
        self.enqueue(conn)                                 # looks again, and parks again

    def collect(self, conn):
        """Takes what has come, without waiting, and goes on with it."""
        for turn in range(16):                         # then the others have their turn
            try:
                data = conn.sock.recv(65536)
            except WOULD_BLOCK:
                break
            except (OSError, ValueError):
                return self.drop(conn)
            if not data:
                return self.drop(conn)
            if conn.phase == "linger":
                continue
            if conn.phase == "head" and not conn.buffer:
                conn.deadline = time.monotonic() + self.relay.conf["limits"]["headers"]
            conn.buffer += data
            if len(conn.buffer) > SMALL_BODY + MAX_HEAD or len(data) < 4096 and not conn.pending():
                break                                  # what else there may be wakes this thread again
        self.advance(conn)

    def advance(self, conn):
        """Head complete: check it. Small body complete: to a worker. Otherwise wait for more."""
        if conn.phase == "head":
            end = conn.buffer.find(b"\r\n\r\n", 0, MAX_HEAD)
            if end < 0:
                if len(conn.buffer) >= MAX_HEAD or re.search(rb"(?<!\r)\n", conn.buffer):
                    return self.refuse(
                        conn, ApiError(431 if len(conn.buffer) >= MAX_HEAD else 400, "not an HTTP head"))
                return self.rearm(conn)
            head = bytes(conn.buffer[:end + 4])
            del conn.buffer[:end + 4]
            try:
                conn.call = call = self.read_call(conn, head)
                if self.answer_open(conn, call):
                    return
                self.admit(conn, call)
            except ApiError as refusal:
                return self.refuse(conn, refusal)
            conn.phase, conn.deadline = "body", time.monotonic() + 30
        if conn.phase == "body":
            call = conn.call
            if call.length <= SMALL_BODY:
                if len(conn.buffer) < call.length:
                    return self.rearm(conn)
                call.body, call.unread = bytes(conn.buffer[:call.length]), 0
                del conn.buffer[:call.length]
            conn.phase = "busy"
            if not self.waits_at_once(conn, call):
                self.enqueue(conn, call.moves_much())
        elif conn.phase == "linger":
            self.rearm(conn)

    def waits_at_once(self, conn, call):
        """Does a poller begin to wait, for whom this relay knows without its database that there is nothing?
        Thousands of them need no worker."""
        if call.name != "calc-request" or call.length > MAX_QUICK:
            return False
        try:
            self.begin_call(call)
            return (call.get("v", int, 1) >= 2 and knows_nothing(call) and call.until > time.monotonic()
                    and self.result_or_parked(conn, call) is None)
        except (ApiError, OSError, ValueError):        # a worker finds the same, and tells the client
            return False

    def read_call(self, conn, head):
        """The Call of a head. A client that says the same again is not parsed again: what it said is known by
        its sum (it holds the token)."""
        sum256 = hashlib.sha256(head).digest()
        if conn.seen is None or conn.seen[0] != sum256:
            conn.seen = sum256, vars(parse_head(head))
        call = Call.__new__(Call)
        vars(call).update(conn.seen[1], conn=conn, relay=self.relay)
        return call

    def answer_open(self, conn, call):
        """Answers `version`, `healthz` and the page, which need no token. True: answered."""
        if call.method != "GET" or call.name not in OPEN_CALLS or call.length:
            return False
        known = False
        if ":token" in call.headers:
            try:
                self.authenticated(conn, self.relay.access.authenticate(call.headers, conn.address))
                known = True
            except ApiError:
                pass
        status, kind, data, more = 200, JSON_TYPE, None, ()
        if call.name == "version":
            data = ENCODE(version_answer(self.relay, known)).encode("utf-8")
        elif call.name == "healthz":
            word = self.relay.meter.health()
            status, kind, data = 200 if word == "ok" else 503, "text/plain", (word + "\n").encode()
        elif self.relay.conf["Server"]["page"]:
            kind = "text/html; charset=utf-8"
            more, data = page_answer("gzip" in call.headers.get("accept-encoding", ""))
        else:
            raise ApiError(404, "the page is switched off ([Server] page)")
        self.relay.meter.answered(call, status, len(data))
        try:
            # the system takes all of it at once: nobody waits here for a client. (A buffer that is set does
            # not grow with the line any more: files over this connection would crawl.)
            if len(data) > SMALL_BODY // 8:
                conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * max(len(data), SMALL_BODY))
            conn.send_body(status, kind, data, call.keep, more=more)
        except (OSError, ValueError):
            self.drop(conn)
            return True
        conn.phase = "busy" if call.keep else "linger"
        self.inbox.append(conn)                        # not at once: a row of such requests must not nest
        return True

    def admit(self, conn, call):
        """Route, token, role and length of a request, before a thread sees it. ApiError otherwise."""
        name = call.name
        call.route = ROUTES.get((call.method, call.place or name))
        check_origin(call)
        if name in STRANGERS_CALLS and call.route:     # whoever asks stays a stranger until the token is used
            return self.admit_stranger(call)
        call.caller = self.relay.access.authenticate(call.headers, conn.address, call.path)
        self.authenticated(conn, call.caller)
        if call.route is None:
            known = [method for method, other in ROUTES if other == name]
            raise ApiError(405 if known else 404, "%s: no such call" % printable(call.path)[:200])
        if call.route.role:
            call.check_role(call.route.role)
        limits = self.relay.conf["limits"]
        most = limits["max_body"] if call.route.bulk else MAX_JSON
        if name in V1_BODIES and call.query.get("v") is None:
            most = limits["v1_max_body"]
        if call.length > most:
            raise refused(413, "body", {"count": call.length, "most": most}, max_body=most)
        if call.headers.get("expect", "").lower() == "100-continue" and call.length:
            conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def admit_stranger(self, call):
        """A log-in, or the use of a code, needs no token, but it must be short, and there is one thread for
        all of them."""
        auth = self.relay.conf["Server"]["auth"]
        if auth == "gateway" or call.name == "login" and auth != "login":
            raise ApiError(404,
                           "this relay has no log-in ([Server] auth = login); ask its operator for a token")
        if call.length > 4096:
            raise ApiError(413, "a log-in of %d bytes" % call.length)
        same = sum(other.address == call.conn.address for other in list(self.logins.queue))
        if (self.logins.qsize() >= LOGINS_WAITING
                or same >= LOGINS_WAITING // 4
                and call.conn.address not in self.relay.conf["Server"]["trusted_proxies"]):
            raise ApiError(429, "too many log-ins at once; try again in 10 s", why="login")

    def authenticated(self, conn, who=None):
        """The connection has shown a good token, or (who None) it ends: it no longer counts as a
        stranger's."""
        if conn.counted:
            conn.counted = False
            del self.strangers[conn.address][conn]
            if not self.strangers[conn.address]:
                del self.strangers[conn.address]
            if who is not None:
                conn.group = self.known.setdefault(who.key, collections.OrderedDict())
                conn.group[conn] = who.key

    def refuse(self, conn, refusal):
        """Answers a request that goes no further; what follows it on this connection is not to be trusted."""
        log("debug", None, "refused", address=conn.address, code=refusal.code, why=refusal)
        try:
            self.relay.meter.answered(conn.call, refusal.http, 0, why_refused(refusal))
            conn.send_json(refusal.http, envelope(refusal.code, str(refusal), **refusal.more), False)
        except (OSError, ValueError):
            return self.drop(conn)
        self.linger(conn)

    def linger(self, conn):
        """The answer is out; the client may still be sending, and a reset would destroy the answer on its
        way."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):
            return self.drop(conn)
        conn.phase, conn.deadline = "linger", time.monotonic() + LINGER
        del conn.buffer[:]
        self.rearm(conn)

    def await_request(self, conn):
        """The connection is ready for its next request."""
        conn.phase = "head"
        conn.call = None
        conn.deadline = time.monotonic() + self.relay.conf["limits"]["idle"]
        if conn.buffer or conn.pending():
            self.collect(conn)
        else:
            self.rearm(conn)

    def rearm(self, conn, events=select.EPOLLIN | select.EPOLLRDHUP):
        """Look at the connection once more when something comes."""
        try:
            self.poll.modify(conn.sock, events | select.EPOLLONESHOT)
        except (OSError, ValueError):
            self.drop(conn)

    def drop(self, conn):
        """Closes a connection that the selector owns."""
        self.authenticated(conn)
        key = conn.group.pop(conn, None)
        if key is not None and not conn.group:
            del self.known[key]
        number = conn.sock.fileno()
        if number >= 0:
            self.conns.pop(number, None)
            try:
                self.poll.unregister(number)
            except OSError:
                pass
            conn.sock.close()
        conn.phase = "closed"

    def take_back(self, conn):
        """A worker gives a connection back: to read on, to linger, or to close."""
        if self.stopping or conn.phase == "close":
            self.drop(conn)
        elif conn.phase == "linger":
            self.linger(conn)
        else:
            self.await_request(conn)

    def sweep(self, now):
        """Once a second: deadlines."""
        for conn in list(self.conns.values()):
            if conn.deadline <= now and conn.phase not in ("busy", "parked"):
                self.drop(conn)

    def end_waits(self, now):
        """Every TICK, so that they spread: the waits whose time is over."""
        with self.wait_lock:
            over = [conn for tick in list(self.ending) if tick * TICK <= now for conn in self.ending[tick]]
            for conn in over:
                self.take_out(conn)
                conn.phase = "busy"
        for conn in over:
            self.guarded(self.end_wait, conn)

    def end_wait(self, conn):
        """Nothing has happened for this call: what it is then to be told needs no worker, unless its token
        has ended or it must look again."""
        call = conn.call
        try:
            call.authenticate_again()
        except ApiError:
            call.nothing = None
        if call.nothing is None:
            return self.enqueue(conn)
        try:
            self.send_result(conn, call.nothing, call.keep, 0)        # nobody waits here for a client
        except (OSError, ValueError):
            return self.drop(conn)
        if call.keep:
            self.await_request(conn)
        else:
            self.linger(conn)

    # -- from any thread

    def wake(self):
        """Makes the selector look at its inbox."""
        try:
            os.write(self.wake_write, b"x")
        except BlockingIOError:
            pass

    def fire(self, key, one=False, need=0):
        """Something happened for key: who waits for it (or the first of them with room for `need` bytes) is
        looked at again."""
        with self.wait_lock:
            self.events[hash(key) % 4096] += 1
            conns = [conn
                     for conn in self.waiting.get(key, ())
                     if not one or conn.call.get("free", int, need) >= need][:1 if one else None]
            for conn in conns:
                self.take_out(conn)
                conn.phase = "busy"
        for conn in conns:
            self.enqueue(conn)
        if key[0] == "calc":
            self.relay.board.touch()

    def event_count(self, key):
        """How many events there have been for key (or for one of the few others that share its place)."""
        return self.events[hash(key) % 4096]

    def take_out(self, conn):
        """Takes a parked connection out of the waiting lists; the lock is held."""
        for groups, key in (self.waiting, conn.park_key), (self.ending, tick_of(conn.deadline)):
            del groups[key][conn]
            if not groups[key]:
                del groups[key]
        for counter, key, count in ((self.parked, conn.call.caller.key, 1),
                                    (self.parked_bytes, conn.call.caller.user, conn.call.length)):
            counter[key] -= count
            if not counter[key]:
                del counter[key]
        conn.park_key = None

    def unpark(self, conn):
        """True: the caller owns the connection now. False: somebody else was faster."""
        with self.wait_lock:
            if conn.park_key is None:
                return False
            self.take_out(conn)
            return True

    def park(self, conn, key, seen, nothing):
        """Lets a request wait for key. False: something happened since `seen` was read, look again."""
        conn.sock.settimeout(0)
        with self.wait_lock:
            if self.event_count(key) != seen:
                return False
            if self.parked[conn.call.caller.key] >= self.relay.conf["limits"]["parked_per_token"]:
                raise ApiError(429,
                               "this token has %d waiting calls ([limits] parked_per_token)"
                               % self.parked[conn.call.caller.key])
            self.parked[conn.call.caller.key] += 1
            self.parked_bytes[conn.call.caller.user] += conn.call.length
            self.waiting.setdefault(key, collections.OrderedDict())[conn] = None
            self.ending.setdefault(tick_of(conn.call.until), {})[conn] = None
            conn.park_key, conn.deadline, conn.phase = key, conn.call.until, "parked"
            conn.call.waited, conn.call.nothing = key, nothing
        self.rearm_from_worker(conn)
        return True

    def rearm_from_worker(self, conn):
        """rearm(), where dropping is the selector's business: an event will come."""
        try:
            self.poll.modify(conn.sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT)
        except (OSError, ValueError):
            pass

    # -- the workers

    def enqueue(self, conn, moves=False):
        """A request for the workers; one that moves much data waits for its user's turn."""
        if conn.call.name in STRANGERS_CALLS:
            return self.logins.put(conn)
        with self.queue_lock:
            (self.bulk_calls.setdefault(conn.call.caller.user, collections.deque()) if moves
             else self.small_calls).append(conn)
            self.wake_worker()

    def wake_worker(self):
        """Wakes the worker that fell asleep last, so that few of them grow; the lock is held."""
        if self.sleeping:
            self.sleeping.pop().release()

    def log_in_forever(self):
        """The life of the thread for log-ins: a password's sum takes long, and who asks for it has shown
        nothing yet."""
        while True:
            conn = self.logins.get()
            try:
                if self.serve_request(conn):
                    self.enqueue(conn)
            except Exception as error:                 # the client is gone, or a bug of ours: one connection
                log("debug" if isinstance(error, (OSError, ValueError)) else "error", None, "dropped",
                    address=conn.address, why=error)
                self.give_back(conn, "close")

    def next_task(self, bed):
        """(connection, the user for whom it moves much data, or None) for a worker; sleeps in bed, a held
        lock, until there is one."""
        while True:
            with self.queue_lock:
                self.taken = time.monotonic()
                if self.small_calls:
                    return self.small_calls.popleft(), None
                user = self.next_bulk_user()
                if user is not None:
                    conn = self.bulk_calls[user].popleft()
                    self.bulk_at_work[user] += 1
                    if self.bulk_calls[user]:
                        self.bulk_calls.move_to_end(user)
                    else:
                        del self.bulk_calls[user]
                    return conn, user
                self.sleeping.append(bed)
            bed.acquire()

    def next_bulk_user(self):
        """The next user who may have a worker for moving data: three quarters of the workers may do that, and
        of them no user has more than are left to others. The lock is held."""
        left = self.relay.conf["limits"]["workers"] * 3 // 4 - sum(self.bulk_at_work.values())
        return next((user for user in self.bulk_calls if self.bulk_at_work.get(user, 0) < left), None)

    def work_forever(self):
        """A worker's life."""
        bed = threading.Lock()
        bed.acquire()
        while True:
            conn, user = self.next_task(bed)
            try:
                while self.serve_request(conn):
                    pass
            except (OSError, ValueError) as error:     # the client is gone, or too slow
                log("debug", None, "dropped", address=conn.address, why=error)
                self.give_back(conn, "close")
            except Exception as error:                 # a bug of ours costs one connection, never a worker
                log("error", None, "connection", address=conn.address,
                    bug="%s: %s" % (type(error).__name__, error))
                self.give_back(conn, "close")
            if user is not None:
                with self.queue_lock:
                    self.bulk_at_work[user] -= 1
                    self.bulk_at_work += collections.Counter()                 # without those that are 0
                    self.wake_worker()

    def serve_request(self, conn):
        """Runs a request and answers it, or lets it wait. True: the client's next request is there
        already."""
        call = conn.call
        if call.unread:                                # a body is still to be read
            conn.sock.settimeout(STALL)
            conn.pace = Pace(self.relay.conf["limits"]["min_rate"])
        try:
            result = self.result_or_parked(conn, call)
        except ApiError as refusal:
            # else the frames, and the body in them, stay until the next sweep for cycles
            result = refusal.with_traceback(None)
            self.note_refusal(call, result)
        if result is None:
            return False
        keep = call.keep and not self.stopping and (not call.unread or self.drain(conn, call))
        self.send_result(conn, result, keep)
        fault(call.name + " answered")
        if keep and self.next_at_once(conn):
            return True
        self.give_back(conn, "head" if keep else "linger")
        return False

    def next_at_once(self, conn):
        """Takes the client's next small request, if it comes within AT_ONCE and no other work waits: that
        saves two changes of thread for each request of a busy client. False: it, or whatever else came, is
        the selector's business."""
        if self.small_calls or len(self.sleeping) < 4 or conn.counted:
            return False
        if not conn.buffer:
            conn.sock.settimeout(AT_ONCE)
            try:
                data = conn.sock.recv(65536)
            except WOULD_BLOCK + (socket.timeout,):
                return False
            finally:
                conn.sock.settimeout(0)
            if not data:
                raise ConnectionError("the client is gone")
            conn.buffer += data
        end = conn.buffer.find(b"\r\n\r\n", 0, MAX_HEAD) + 4
        head = bytes(conn.buffer[:end])
        if end < 4:
            return False
        try:
            call = self.read_call(conn, head)
            if (call.name in OPEN_CALLS or "expect" in call.headers
                    or len(conn.buffer) < end + call.length or call.length > SMALL_BODY):
                return False
            self.admit(conn, call)
        except ApiError:
            return False
        if call.name in STRANGERS_CALLS or call.moves_much():
            return False
        call.body, call.unread, conn.call = bytes(conn.buffer[end:end + call.length]), 0, call
        del conn.buffer[:end + call.length]
        return True

    def result_or_parked(self, conn, call):
        """What the call's function answers; None: it waits, and is somebody else's business by now."""
        while True:
            result = self.run_call(call)
            if not isinstance(result, Park):
                return result
            if self.parked_bytes[call.caller.user] + call.length > PARKED:
                call.until = 0.0                       # answered as if its time were over
                continue
            seen = result.seen
            if seen is None:
                seen = self.event_count(result.key)
                result = self.run_call(call)       # look again: an event before `seen` was read would be lost
                if not isinstance(result, Park):
                    return result
            if self.park(conn, result.key, seen, result.nothing):
                return None

    def note_refusal(self, call, refusal):
        """What others must know of a refusal: for want of room a calculation waits; and what woke a call
        whose token has ended meanwhile is for the next."""
        if refusal.more.get("why") == "disk" and call.caller:
            accept_id = (call.fields or {}).get("accept_id")
            self.relay.claims.note_waits(accept_id, call.caller.user, str(refusal))
        if refusal.code == "0005" and call.waited:
            self.fire(call.waited)

    def send_result(self, conn, result, keep, wait=STALL):
        """The answer, as the kind of the result says; waits up to `wait` seconds for a client that does not
        take it."""
        status, why = 200, None
        if isinstance(result, FileAnswer):
            status, length = result.status, result.length
            conn.send_spool(result, keep, self.relay.conf["limits"]["min_rate"])
            if result.then is not None:
                result.then()
        elif isinstance(result, TextAnswer):
            length = conn.send_body(200, result.kind, result.data, keep, wait)
        elif isinstance(result, PlainAnswer):
            length = conn.send_json(200, result.parsed, keep, wait)
        elif isinstance(result, ApiError):
            status, why = result.http, why_refused(result)
            length = conn.send_json(status, envelope(result.code, str(result), **result.more), keep, wait)
        else:
            length = conn.send_json(200, envelope(200, result.pop("message"), **result), keep, wait)
        self.relay.meter.answered(conn.call, status, length, why)

    def run_call(self, call):
        """The call's function; whatever goes wrong in it becomes an answer."""
        try:
            if call.until is not None:
                call.authenticate_again()
            elif call.unread and call.name in V1_BODIES and call.length > MAX_JSON:
                fault(call.name + " received")
                return V1[call.name](call)             # only a fielded body is as large as that
            else:
                self.begin_call(call)
            if not call.is_of_part_2() and call.get("v", int, 1) < 2:
                check_json_type(call)
                return V1[call.name](call)
            return call.route.function(call)
        except (ApiError, ConnectionError, socket.timeout):
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self.relay.store.no_room(call.length)
            log("error", None, call.name, error=error)
            raise ApiError(503, "the relay could not read or write its files; try again later")
        except sqlite3.Error as error:
            log("error", None, call.name, error=error)
            raise ApiError(503, "the relay's database is not available; try again later")
        except Exception as error:                     # a bug of ours costs one answer, and leaves one line
            place = sys.exc_info()[2]
            while place.tb_next:
                place = place.tb_next
            log("error", None, call.name,
                bug="%s in line %d: %s" % (type(error).__name__, place.tb_lineno, error))
            raise ApiError(500, "the relay failed on this call; its log says where")

    def begin_call(self, call):
        """Reads what a call says, and until when it may wait. ApiError."""
        call.collect_fields()
        wait = min(float(call["wait"]), self.relay.conf["times"]["wait"])
        call.until = time.monotonic() + wait
        fault(call.name + " received")
        call.body = b""                                # what waits holds no more than its fields

    def drain(self, conn, call):
        """Reads what is left of a body that was not needed, if it is little; otherwise the connection must
        close."""
        if call.unread > PACK_FILE:
            return False
        call.exact_reader()(call.unread)
        return True

    def give_back(self, conn, phase):
        """From a worker to the selector; the usual case, nothing in the buffers, without waking it."""
        try:
            conn.sock.settimeout(0)
            if phase == "head" and not self.stopping and not conn.buffer and not conn.pending():
                conn.call = None
                conn.deadline = time.monotonic() + self.relay.conf["limits"]["idle"]
                conn.phase = "head"
                return self.rearm_from_worker(conn)
        except (OSError, ValueError):
            phase = "close"
        conn.phase = phase if phase != "head" else "busy"
        self.inbox.append(conn)
        self.wake()


class Connection:
    """One client's connection. Only its owner touches it:

    phase    owner      waits for                             then
    shake    selector   the TLS handshake (`handshake`)       head
    head     selector   a request's head (`headers`, `idle`)  body, or linger where it is refused
    body     selector   a small body (30 s)                   busy
    busy     worker     nothing: its call runs                head, parked, linger, close (by take_back())
    parked   nobody     an event of park_key, or call.until   busy: for whoever takes it out under wait_lock
    linger   selector   the client to read the answer         closed
    close    selector   nothing: a worker has done with it    closed
    """

    __slots__ = ("sock", "address", "phase", "buffer", "deadline", "call", "counted", "group", "park_key",
                 "pace", "seen", "row", "born")

    def __init__(self, sock, address, phase, deadline):
        self.born = time.monotonic()
        self.sock = sock
        self.address = address
        self.phase = phase
        self.deadline = deadline                       # of its phase, in time.monotonic()
        self.buffer = bytearray()                      # what has come and is not yet read
        self.call = None                               # its request, from the head on
        self.counted = True                            # as a stranger's: it has shown no good token
        self.park_key = None                           # what it waits for
        self.pace = None                               # of a body that is being read
        self.seen = None                               # (sum of the head before, what it said)
        self.row = None                    # (what it was asked of, the calculation), see cached_calculation()
        self.group = {}                                # those of its token, once it has shown one

    def pending(self):
        """Bytes that TLS has taken from the socket already (the ini may have changed between plain and TLS
        since)."""
        return self.sock.pending() if isinstance(self.sock, ssl.SSLSocket) else 0

    def receive(self, view):
        """Fills view from what has come; waits at most STALL seconds. ConnectionError at the end, or if it
        comes too slowly."""
        if self.buffer:
            count = min(len(view), len(self.buffer))
            view[:count] = self.buffer[:count]
            del self.buffer[:count]
            return count
        count = self.sock.recv_into(view)
        if not count:
            raise ConnectionError("the client is gone")
        self.pace.count(count)
        return count

    def send_json(self, status, parsed, keep, wait=0):
        """A JSON answer; its length."""
        return self.send_body(status, JSON_TYPE, ENCODE(parsed).encode("utf-8", "replace"), keep, wait)

    def send_body(self, status, kind, body, keep, wait=0, more=()):
        """The answer in one write; a worker waits up to `wait` seconds for a client that does not take it.
        The length of body."""
        data = answer_head(status, kind, len(body), keep, more) + body
        try:
            sent = self.sock.send(data)
        except WOULD_BLOCK:
            sent = 0
        if sent < len(data):
            self.sock.settimeout(wait)
            self.sock.sendall(memoryview(data)[sent:])
        return len(body)

    def send_spool(self, spool, keep, min_rate):
        """The answer from files; the connection is dropped if the client takes it too slowly.
        Segments are [(path, place, length)], or a function that gives the chunks."""
        self.sock.settimeout(STALL)
        self.sock.sendall(answer_head(spool.status, spool.kind, spool.length, keep, spool.headers))
        told, pace = time.monotonic(), Pace(min_rate)
        try:
            made = callable(spool.segments)
            for chunk in spool.segments() if made else self.spool_chunks(spool):
                left = memoryview(chunk)
                while left:
                    # no more: a slow client takes this much within STALL
                    count = self.sock.send(left[:SMALL_BODY])
                    pace.count(count)
                    left = left[count:]
                if spool.moved is not None and time.monotonic() > told + 1:
                    told = time.monotonic()
                    spool.moved()
        except ValueError as error:
            raise ConnectionError(str(error))

    def spool_chunks(self, spool):
        """The bytes of an answer's segments, CHUNK by CHUNK."""
        buffer = memoryview(bytearray(min(CHUNK, spool.length) or 1))
        for path, at, left in spool.segments:
            with open(path, "rb", buffering=0) as source:
                source.seek(at)
                while left:
                    count = source.readinto(buffer[:left])
                    if not count:
                        raise ConnectionError("the spool file is short")
                    left -= count
                    yield buffer[:count]


class Fields:
    """What a call says: self.fields, checked as FIELDS and its Route have it."""

    def __getitem__(self, key):
        """A field, or what is taken where it is not said. 400 if it must be there, or is not as it must
        be."""
        field = FIELDS[key]
        value = self.fields.get(key) if field.kind is None else self.get(key, field.kind, None)
        if value is None:
            if key in self.route.needed:
                raise ApiError(400, "%s is missing" % key)
            return field.default
        looked_at = len(value) if field.kind is str and isinstance(field.limit, range) else value
        if field.limit is not None and looked_at not in field.limit:
            raise ApiError(400, "%s is %s" % (key, "negative" if field.kind is int else field.what))
        return value

    def get(self, key, kind, default):
        """A field of a type (int also from a query's digits), or default where there is none. 400 for another
        type."""
        value = self.fields.get(key)
        if value is None:
            return default
        if kind is int and isinstance(value, str) and re.match(r"-?[0-9]{1,18}\Z", value):
            value = int(value)
        if not isinstance(value, kind) or kind is int and isinstance(value, bool):
            raise ApiError(400, "%s is not of the right type" % key)
        return value

    def need(self, key):
        """A field that its Route lets stay away, but that must be there now."""
        if self.fields.get(key) is None:
            raise ApiError(400, "%s is missing" % key)
        return self[key]


class Call(Fields):
    """One request as parse_head() found it, and what its function needs of its connection."""

    def __init__(self, method, target, headers, keep):
        self.method = method
        self.headers = headers
        self.keep = keep
        self.conn = None
        self.relay = None
        self.caller = None                             # the Caller that its token stands for
        self.route = None
        self.until = None                              # in time.monotonic(): so long may it wait
        self.waited = None                             # the key for which it did
        self.nothing = None                            # what it is answered if nothing comes: see Park
        self.place = None                              # of a file's call: FILE_LIST, FILE or FILE_PACK
        self.parts = ()                                # and what its path says
        self.body = b""
        self.fields = None
        self.unread = 0
        length = headers.get("content-length", "0")
        if not re.match(r"[0-9]{1,15}\Z", length):
            raise ApiError(400, "Content-Length is not a number")
        self.length = self.unread = int(length)
        if "transfer-encoding" in headers:
            raise ApiError(400 if "content-length" in headers else 411,
                           "a body needs Content-Length, and no Transfer-Encoding")
        try:
            found = urlsplit(target)
            pairs = parse_qsl(found.query, keep_blank_values=True, errors="strict")
        except ValueError:
            raise ApiError(400, "the query is not UTF-8")
        self.path = found.path
        self.query = dict(pairs)
        if len(self.query) != len(pairs):
            raise ApiError(400, "a query field is given twice")
        self.name = self.name_of_path()

    def name_of_path(self):
        """The name of the call that its path asks for, empty if there is none such; of a file also its parts
        and its place among the routes."""
        if not self.path.startswith(API_PATH):
            return self.path[1:] if self.path[1:] in AT_ROOT else ""
        name = self.path[len(API_PATH):]
        found = FILES.match(name)
        if found:
            self.parts = found.groups()
            self.place = {None: FILE_LIST, "pack": FILE_PACK}.get(self.parts[2], FILE)
            return "files"
        found = PIECES_PATH.match(name)
        if found:
            self.parts = found.groups()[1:]
            self.place = PIECES if found.group(1) == "pieces" else MISSING
            return "files"
        return name if name.split("/")[0] != "files" else ""

    def is_of_part_2(self):
        """Is it a call that no fielded program makes?"""
        return self.name not in V1

    def parse_fields(self):
        """The fields of the call: its query, and the JSON object in its body. 400 for anything else."""
        fields = dict(self.query)
        if self.body or self.name != "files" and self.length:
            found = (parse_json if self.is_of_part_2() or "v" in self.query else parse_v1_json)(self.body)
            twice = [key for key in found if self.query.get(key, found[key]) != found[key]]
            if twice:
                raise ApiError(400, "%s is given in the query and in the body" % printable(twice[0]))
            fields.update(found)
        self.fields = fields

    def collect_fields(self):
        """Its fields, from query and body; the bytes of a file stay where they are."""
        posts_file = self.name == "files" and self.method == "POST"
        if posts_file and self.parts[2] is not None:
            self.conn.buffer[:0], self.body, self.unread = self.body, b"", self.length
        elif self.unread and self.name != "files" or posts_file:
            self.body = self.body or bytes(self.exact_reader()(self.unread))
        self.parse_fields()

    def authenticate_again(self):
        """Who is asking, now: a token may have ended while its call waited or its body came. ApiError
        otherwise."""
        self.caller = self.relay.access.authenticate(self.headers, self.conn.address, self.path)

    def moves_much(self):
        """Does it, or its answer, move much data?"""
        return (self.route.bulk or self.length > SMALL_BODY or self.name == "files"
                or self.name in V1_ANSWERS and "v" not in self.query)

    def check_role(self, role):
        """403 unless the token has the role."""
        if role not in self.caller.roles and not self.route.also & self.caller.roles:
            raise not_allowed(self.path, "role", {"role": role}, user=self.caller.user)

    def body_views(self):
        """The body in views of up to CHUNK bytes, as it arrives; no more of it when the token has ended."""
        buffer = memoryview(bytearray(min(CHUNK, self.unread) or 1))
        while self.unread:
            want, filled = min(CHUNK, self.unread), 0
            self.authenticate_again()
            while filled < want:
                filled += self.conn.receive(buffer[filled:want])
            self.unread -= want
            yield buffer[:want]

    def exact_reader(self):
        """A function size -> that many bytes of the body."""
        def take(length):
            data = bytearray(length)
            view, at = memoryview(data), 0
            while at < length:
                at += self.conn.receive(view[at:])
            self.unread -= length
            return data
        return take


class OperatorCall(Fields):
    """A call that an operator's command has left in the database for the running relay."""

    def __init__(self, relay, name, fields):
        self.relay = relay
        self.name = name
        self.route = OPERATOR_CALLS[name]
        self.fields = fields
        self.until = 0.0
        self.caller = Caller("operator", frozenset((WORKFLOW, REMOTE, OPERATOR)), (), 0, "order")


def tick_of(moment):
    """The first tick after a moment (time.monotonic())."""
    return int(moment / TICK) + 1


def why_refused(refusal):
    """Why a "0005" was said; None of other refusals."""
    return str(refusal.more.get("why", "")) if refusal.code == "0005" else None


def parse_head(head):
    """A request's head (bytes, up to and with the empty line) as a Call. Stricter than http.server's, which
    lets doubled lengths and bare line feeds pass: what two programs can read in two ways is refused. 400,
    405, 411, 431."""
    if not head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n") or b"\0" in head:
        raise ApiError(400, "a bare line end in the head")
    lines = head[:-4].decode("iso-8859-1").split("\r\n")
    method, target, version = request_line(lines[0])
    if len(lines) > 100:
        raise ApiError(431, "too many headers")
    headers, twice = {}, []
    for line in lines[1:]:
        found = HEADER_LINE.match(line)
        if not found:
            raise ApiError(400, "a malformed header")
        name = found.group(1).lower()
        if name in headers and name in SINGLE_HEADERS:
            raise ApiError(400, "header %s is given twice" % name)
        twice += [name] if name in headers else []
        headers[name] = found.group(2).strip(" \t")
    scheme, blank, token = headers.pop("authorization", "").partition(" ")
    # from here on only its sum is known; no header can have this name
    if scheme.lower() == "bearer" and token:
        headers[":token"] = hashlib.sha256(token.strip().encode("iso-8859-1")).hexdigest()
    headers[":twice"] = twice
    wish = headers.get("connection", "").lower()
    return Call(method, target, headers, wish == "keep-alive" if version == "HTTP/1.0" else wish != "close")


def request_line(line):
    """(method, target, version) of a request's first line. 400, 405."""
    words = line.split(" ")
    if (len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0") or not re.match(r"/[!-~]*\Z", words[1])
            or "#" in words[1]):
        raise ApiError(400, "not a request line")
    if words[0] not in ("GET", "POST"):
        raise ApiError(405, "GET and POST only")
    return words


class Pace:
    """Does a transfer keep min_rate (bytes/s)? Looked at over each RATE_OVER seconds, whatever came
    before."""

    def __init__(self, rate):
        self.rate = rate
        self.since = time.monotonic()
        self.moved = 0

    def count(self, moved):
        """So many bytes have moved. ConnectionError if it is too slow."""
        self.moved += moved
        passed = time.monotonic() - self.since
        if passed > RATE_OVER:
            if self.moved < self.rate * passed:
                raise ConnectionError("slower than min_rate")
            self.since, self.moved = time.monotonic(), 0


def answer_head(status, kind, length, keep, more=()):
    """Status line and headers of an answer, as bytes."""
    head = ("HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nCache-Control: no-store,"
            " no-transform\r\n%s%s\r\n"
            % (status, HTTPStatus(status).phrase, kind, length, "".join("%s: %s\r\n" % pair for pair in more),
               "" if keep else "Connection: close\r\n"))
    return head.encode("ascii")


def envelope(code, text, **fields):
    """PROTOCOL's answer: {"errors": [{"code", "message", ...}]}, for success too."""
    return {"errors": [dict(fields, code=code, message=text)]}


def parse_json(data, kinds=dict):
    """A JSON object (or what kinds says), strictly: UTF-8, no key twice, no NaN. 400 otherwise."""
    parts = data.count(b"{") + data.count(b"[")
    if parts + data.count(b",") > PARTS:
        raise ApiError(413, "a body of more than %d parts" % PARTS, why="work")
    try:
        found = DECODE(data.decode("utf-8"))
        if not isinstance(found, kinds):
            raise ValueError("not an object")
        if parts > 64 and not nests_less(found):
            raise ValueError("nested too deep")
        if b"\\u" in data:
            ENCODE(found).encode("utf-8")              # a lone surrogate ends here, not in the database
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON: %s" % printable(error)[:200])
    return found


def unique_keys(pairs):
    """A JSON object, in its order; ValueError if a key is given twice."""
    found = dict(pairs)                                # in order from 3.6 on, and small
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def no_constant(word):
    """NaN and Infinity are not JSON."""
    raise ValueError("%s is not JSON" % word)


def short_integer(digits):
    """A whole number that SQLite can hold (and that is read in no time)."""
    if len(digits) > 18:
        raise ValueError("a number of %d digits" % len(digits))
    return int(digits)


def finite_number(digits):
    """A finite number."""
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number without end")
    return number


def nests_less(found, left=64):
    """Does it nest less deep than that?"""
    parts = found.values() if isinstance(found, dict) else found
    return left > 0 and all(nests_less(part, left - 1) for part in parts if isinstance(part, (dict, list)))


DECODE = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=no_constant, parse_int=short_integer,
                          parse_float=finite_number).decode
ENCODE = json.JSONEncoder(ensure_ascii=False).encode


# ==== configuration ====
# all else is taken from a changed ini while it runs
AT_START = (("Server", "ipaddress"), ("Server", "portnumber"), ("Server", "state_dir"), ("Server", "auth"),
            ("Server", "logfile"), ("Server", "lang"), ("limits", "workers"))


def site_ids(text):
    """The words of remote_site_ids, in their order: among thousands of them each call finds its own."""
    return dict.fromkeys(text.split())


def load_conf(options):
    """The checked ini and its path. 78 if there is none."""
    # first where it is started, as the fielded one
    path = find_ini(options.ini, [os.getcwd()] + ini_folders(__file__), needed=True)
    conf = check_conf(read_ini(path, INI_KEYS), path)
    choose_language(conf["Server"]["lang"])
    SAY["level"] = LEVELS.index(conf["Server"]["loglevel"])
    if options.quiet or options.verbose:
        SAY["level"] = 0 if options.verbose else 2
    SAY["debug"] = bool(options.verbose)
    return conf, path


def check_conf(conf, path):
    """conf, if it makes sense as a whole. 78 with section, key and what to do otherwise."""
    wrong = (wrong_gateway(conf["Server"]) or wrong_listener(conf["Server"]) or wrong_limits(conf["limits"])
             or wrong_sites(conf))
    if wrong:
        raise Stop(EX_CONFIG, "%s: %s" % (path, wrong))
    return conf


def wrong_gateway(server):
    """What is wrong with the gateway in [Server], or an empty text. Its secret is read."""
    gateway = server["auth"] == "gateway"
    if not 0 <= server["portnumber"] <= 65535:
        return _("[Server] portnumber = %d: is not a port") % server["portnumber"]
    if bool(server["certfile"]) != bool(server["keyfile"]):
        return _("[Server] certfile and keyfile: both or neither")
    if gateway and not server["trusted_proxies"]:
        return _("[Server] auth = gateway needs trusted_proxies (the gateway's addresses)")
    if server["gateway_secret_file"] and not gateway:
        return _("[Server] gateway_secret_file is for auth = gateway")
    if server["gateway_secret_file"]:
        server["secret"] = gateway_secret(server["gateway_secret_file"])
    if server["operators"] and not gateway:
        return _("[Server] operators is for auth = gateway; here: token issue USER --roles operator")
    return ""


def wrong_listener(server):
    """What is wrong with who can read along, or an empty text."""
    if not (server["certfile"] or is_loopback(server["ipaddress"]) or server["auth"] == "gateway"
            or server["plain_http"]):
        return _("[Server] ipaddress = %s: plain http beyond this host would show tokens to the network; set"
                 " certfile and keyfile, or, behind a gateway that does the TLS, auth = gateway with"
                 " trusted_proxies (or plain_http = yes, in a closed laboratory)") % server["ipaddress"]
    if server["client_ca"] and not server["certfile"]:
        return _("[Server] client_ca needs certfile and keyfile")
    return ""


def wrong_limits(limits):
    """What is wrong with [limits], or an empty text."""
    least = {"workers": 4, "max_body": 64 << 10, "connections": 16, "min_rate": 1, "lanes_per_token": 1}
    if any(limits[key] < number for key, number in least.items()):
        return _("[limits] workers must be at least 4, max_body 64K, connections 16, min_rate 1,"
                 " lanes_per_token 1")
    return ""


def wrong_sites(conf):
    """What is wrong with the sites, or with a section's name; or an empty text."""
    sites = conf["RemoteSites"]["remote_site_ids"]
    for site in sites:
        if site in SECTIONS or site.startswith("command ") or has_control_chars(site) or len(site) > 100:
            return _("[RemoteSites] remote_site_ids: %s cannot be a site id") % printable(site)
    for section in conf:
        if section not in INI_KEYS and section not in sites and section not in SECTIONS:
            return _("[%s] is neither a section nor in remote_site_ids%s") % (
                section, did_you_mean(section, list(INI_KEYS) + list(sites)))
    return ""


def gateway_secret(path):
    """(header in small letters, secret) of the file's one line, `Header: secret`. 78 if it is not so, or not
    for this user alone."""
    try:
        with open(utf8(path), encoding="ascii") as text:
            if os.fstat(text.fileno()).st_mode & 0o077:
                raise Stop(EX_CONFIG,
                           _("[Server] gateway_secret_file = %s: others may read it; chmod 600") % path)
            found = HEADER_LINE.match(text.read().strip())
    except (OSError, ValueError):
        raise Stop(EX_CONFIG,
                   _("[Server] %s = %s: is not there or not readable") % ("gateway_secret_file", path))
    if not found or len(found.group(2).strip()) < 16:
        raise Stop(EX_CONFIG,
                   _("[Server] gateway_secret_file = %s: one line, `Header-Name: secret`, the secret of 16"
                     " characters or more") % path)
    return found.group(1).lower(), found.group(2).strip()


def is_loopback(address):
    """Is it an address that only this host can reach?"""
    return address in ("localhost", "::1") or address.startswith("127.")


def tls_context(server):
    """TLS 1.2 or newer with the ini's certificate, or None. 78 for a certificate that is missing, broken,
    expired or not its key's."""
    if not server["certfile"]:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if hasattr(ssl, "TLSVersion"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:                                              # Python 3.6
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    for key in ("certfile", "keyfile"):
        if not os.access(utf8(server[key]), os.R_OK):
            raise Stop(EX_CONFIG, _("[Server] %s = %s: is not there or not readable") % (key, server[key]))
    try:
        context.load_cert_chain(utf8(server["certfile"]), utf8(server["keyfile"]), "")
        if server["client_ca"]:
            context.load_verify_locations(utf8(server["client_ca"]))
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise Stop(EX_CONFIG,
                   _("[Server] certfile, keyfile, client_ca: %s")
                   % (getattr(error, "reason", None) or error.strerror or error))
    end = certificate_end(server["certfile"])          # where this Python knows no way: clients will say
    if end is not None and end < time.time():
        raise Stop(EX_CONFIG, _("[Server] certfile = %s: expired on %s; renew it")
                   % (server["certfile"], day_of(end)))
    return context


def certificate_end(path):
    """When the certificate in a PEM file ends, in seconds since the epoch; None if that cannot be known."""
    try:
        return ssl.cert_time_to_seconds(certificate_of(path)["notAfter"]) if path else None
    except (AttributeError, KeyError, ValueError, OSError):
        return None


def certificate_of(path):
    """The certificate in a PEM file, as the ssl module tells it. OSError if there is none, AttributeError
    where this Python knows no way to look."""
    try:
        return ssl._ssl._test_decode_cert(path)
    except OSError:
        forget_tls_errors()
        raise


def forget_tls_errors():
    """What went wrong with a file OpenSSL remembers, and tells at this thread's next look at a connection; a
    list of ciphers that is none makes Python forget it."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers("-")
    except ssl.SSLError:
        pass


def dns_names(certificate):
    """The names of hosts, no patterns, that a certificate is for."""
    return [name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS" and "*" not in name]


def level(text):
    """loglevel: a word of LEVELS, or its number in a fielded ini (0 critical, 1 error, 2 warning, 3 info, 4
    debug)."""
    return one_of(*LEVELS)({"0": "error", "1": "error", "2": "warn", "3": "info", "4": "debug"}.get(
        text, text))


def one_place(text):
    """A directory that is the same one wherever the relay, its `token issue` or its unit is started: an
    absolute path, or ~/..."""
    path = os.path.expanduser(text)
    if not os.path.isabs(path):
        raise ValueError(_("must be an absolute path (from here: %s)") % os.path.abspath(path))
    return path


# ==== start and command line ====

def main(argv=None):
    """The program; returns its exit code."""
    options = read_line(arguments(argv))
    if about_itself(options):
        return 0
    options.words = options.words or ["serve"]
    take_word(options)
    return SUBCOMMANDS[options.word][0](options)


def cmd_serve(options):
    """Serves until SIGTERM (exit 0) or Ctrl+C (130)."""
    start_lean()
    os.umask(0o077)
    no_core_dump()
    conf, path = load_conf(options)
    server = conf["Server"]
    if server["logfile"]:
        log_into(server["logfile"])
    context = tls_context(server)
    store = Store(server["state_dir"])
    relay = Relay(conf, path, store)
    relay.front = front = Front(relay)
    front.context = context
    raise_file_limit(conf["limits"]["connections"])
    port = front.listen(server["ipaddress"], server["portnumber"])
    relay.access.load_tokens()
    relay.quotas.recount()
    relay.meter.begin()
    relay.note_settings()
    store.make_ballast()
    remove_tree(os.path.join(utf8(store.folder), b"spool", b"arriving"))
    store.drop_orphans()
    relay.tidy_latest()
    relay.claims.begin()
    relay.pollers.load()
    signal.set_wakeup_fd(front.wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, front.note_signal)
    writer = threading.Thread(target=store.write_forever, daemon=True)
    writer.start()
    threads = [relay.sweeper.sweep_forever, front.log_in_forever]
    threads += [front.work_forever] * conf["limits"]["workers"]
    for target in threads:
        threading.Thread(target=target, daemon=True).start()
    if server["auth"] == "gateway" and not (server["gateway_secret_file"] or server["client_ca"]):
        log("warn", None, "gateway",
            why="any process on its host can be any user: set gateway_secret_file, or client_ca")
    if not context and not is_loopback(server["ipaddress"]) and server["auth"] != "gateway":
        log("warn", None, "plain_http = yes: whoever is on the network reads tokens and files",
            ipaddress=server["ipaddress"])
    log("info", None, "listening",
        url="%s://%s:%d" % ("https" if context else "http", server["ipaddress"], port),
        tls=">=1.2" if context else "none", auth=server["auth"],
        sites=len(conf["RemoteSites"]["remote_site_ids"]), tokens="%d hashed" % len(relay.access.tokens),
        state=server["state_dir"], free="%dGB" % (store.free() >> 30), instance=relay.instance)
    front.serve()
    relay.access.note_use(0)
    relay.pollers.keep(0)
    store.close()
    writer.join(10)
    store.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    log("info", None, "stopped", by=signal.Signals(front.stopped_by).name)
    return EX_INTERRUPT if front.stopped_by == signal.SIGINT else 0


def raise_file_limit(wanted):
    """Lets this process hold as many connections as the ini says, as far as the hard limit goes."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + 200:
        goal = wanted + 200 if hard == resource.RLIM_INFINITY else min(hard, wanted + 200)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, goal), hard))
        if goal < wanted + 200:
            log("warn", None, "connections", limit=goal, wanted=wanted, why="raise LimitNOFILE")


# ==== operator ====

def open_store(options):
    """The store of the ini, for a command beside the running relay, and the ini's conf."""
    conf, path = load_conf(options)
    os.umask(0o077)
    return Store(conf["Server"]["state_dir"], lock=False), conf


def cmd_token_issue(options):
    """A new token. It is shown once; only its SHA-256 is kept."""
    store, conf = open_store(options)
    db, now = store.writer, time.time()
    roles, sites = roles_and_sites(options, conf)
    secret = os.urandom(32).hex()
    days = conf["times"]["token_days"] if options.days is None else options.days
    if not 0 < days <= 36500:
        raise Stop(EX_USAGE,
                   _("token issue: a token that is good for %s days is none; say --days N, more than 0"
                     " (or [times] token_days)") % ("%g" % days))
    expires = now + 86400 * days
    db.execute("INSERT INTO tokens (hash, user, roles, sites, issued, expires) VALUES (?, ?, ?, ?, ?, ?)",
               (hashlib.sha256(secret.encode()).hexdigest(), options.user, roles, sites, now, expires))
    try:
        if os.path.samestat(os.fstat(1), os.stat(os.devnull)):       # closed, or thrown away
            raise OSError(errno.EPIPE, _("standard output leads nowhere"))
        sys.stderr.write(_("token for user %s, roles %s, sites %s, until %s; shown only now, keep it in"
                           " a file of mode 0600:")
                         % (options.user, roles.replace(" ", ","), sites.replace(" ", ",") or "*",
                            local_time(expires)) + "\n")
        print(secret, flush=True)
    except OSError as error:
        db.execute("UPDATE tokens SET revoked = ? WHERE hash = ?",
                   (now, hashlib.sha256(secret.encode()).hexdigest()))
        raise Stop(EX_IOERR,
                   _("token issue: nobody has seen the token (%s); it is revoked") % error.strerror)


def cmd_token_revoke(options):
    """Makes a token void."""
    store, conf = open_store(options)
    db, now = store.writer, time.time()
    if not db.execute("UPDATE tokens SET revoked = ? WHERE number = ? AND revoked IS NULL",
                      (now, options.number)).rowcount:
        raise Stop(EX_USAGE,
                   _("token revoke: there is no valid token %s (see token list)") % options.number)
    print(_("token %s is revoked; the relay knows within a second") % options.number)


def cmd_token_list(options):
    """The tokens, without what makes them work."""
    store, conf = open_store(options)
    db = store.writer
    columns = ("number", "user", "roles", "sites", "issued", "expires", "used", "revoked", "login")
    found = [dict(row)
             for row in db.execute("SELECT %s FROM tokens ORDER BY number" % ", ".join(columns))]
    for row in found if not options.json else ():
        row.update(issued=local_time(row["issued"]), expires=local_time(row["expires"]),
                   used=local_time(row["used"]), revoked=local_time(row["revoked"]),
                   login=("", "login", "code")[row["login"]])
    show_rows(options, found, columns)


def roles_and_sites(options, conf):
    """The checked --roles and --sites of a new token or user, blank separated. 64 for what cannot be."""
    if (not options.user or re.search(r"\s", options.user) or has_control_chars(options.user)
            or len(options.user) > 200):
        raise Stop(EX_USAGE, _("%s USER: a user without blanks") % options.word)
    roles = options.roles.replace(",", " ").split()
    if not roles or set(roles) - set(ROLES):
        raise Stop(EX_USAGE, _("--roles: some of %s") % ",".join(ROLES))
    sites = options.sites.replace(",", " ").split()
    unknown = [site for site in sites if site not in conf["RemoteSites"]["remote_site_ids"]]
    if unknown:
        raise Stop(EX_USAGE, _("--sites: %s is not in [RemoteSites] remote_site_ids") % unknown[0])
    return " ".join(roles), " ".join(sites)


def new_password(user):
    """A new password, asked for twice without echo; without a terminal the first line of standard input."""
    if sys.stdin is not None and sys.stdin.isatty():
        import getpass
        found = getpass.getpass(_("new password for %s: ") % user)
        if getpass.getpass(_("once more: ")) != found:
            raise Stop(EX_USAGE, _("that was not the same"))
    else:
        found = sys.stdin.readline(2000).rstrip("\r\n") if sys.stdin is not None else ""
    if not 10 <= len(found) <= 1000:
        raise Stop(EX_USAGE, _("a password has at least 10 characters"))
    return found


def cmd_user_list(options):
    """The users of auth = login."""
    store, conf = open_store(options)
    rows = [dict(row)
            for row in store.writer.execute("SELECT name, roles, sites, changed FROM users ORDER BY name")]
    for row in rows if not options.json else ():
        row["changed"] = local_time(row["changed"])
    show_rows(options, rows, ("name", "roles", "sites", "changed"))


def cmd_user(options):
    """The users of auth = login: add, passwd (both ask for the password), remove. What was logged in with an
    old password ends."""
    store, conf = open_store(options)
    db, now, name = store.writer, time.time(), options.user
    there = db.execute("SELECT 1 FROM users WHERE name = ?", (name,)).fetchone()
    if options.word == "user add":
        roles, sites = roles_and_sites(options, conf)
        if there:
            raise Stop(EX_USAGE, _("user %s is there already (user passwd %s)") % (name, name))
        db.execute("INSERT INTO users (name, password, roles, sites, changed) VALUES (?, ?, ?, ?, ?)",
                   (name, password_record(new_password(name)), roles, sites, now))
    elif not there:
        raise Stop(EX_USAGE, _("there is no user %s (see user list)") % printable(name))
    elif options.word == "user passwd":
        db.execute("UPDATE users SET password = ?, changed = ?, known = '' WHERE name = ?",
                   (password_record(new_password(name)), now, name))
        db.execute("UPDATE tokens SET revoked = ? WHERE user = ? AND login = 1 AND revoked IS NULL",
                   (now, name))
    else:
        db.execute("DELETE FROM users WHERE name = ?", (name,))
        db.execute("UPDATE tokens SET revoked = ? WHERE user = ? AND revoked IS NULL", (now, name))
    if conf["Server"]["auth"] != "login":
        log("warn", None, "user", why="nobody can log in before [Server] auth = login")
    print(_("user %s: done; the relay knows within a second") % name)


def cmd_check(options):
    """Looks at ini, files, certificate, disk, limits, tokens and at the relay that runs; changes nothing. 78
    if something is a FAIL."""
    try:
        conf, path = load_conf(options)
    except Stop as stop:
        return print_findings([(False, str(stop))], options.json)
    server, limits = conf["Server"], conf["limits"]
    if options.upgrade:
        return print_findings(check_upgrade(server), options.json)
    rows = [(None, _("running as root; better as a user of its own"))] if os.geteuid() == 0 else []
    rows.append(finding_of_file(path, 0o755))
    rows += check_commands(conf)
    modes = {server[key]: mode for key, mode in (("certfile", 0o755), ("keyfile", 0o640),
                                                 ("client_ca", 0o755), ("logfile", 0o640)) if server[key]}
    rows += [finding_of_file(path, mode) for path, mode in modes.items()]
    rows += check_certificate(server)
    if server["auth"] == "gateway":
        closed = bool(server["gateway_secret_file"] or server["client_ca"])
        rows.append((closed or None,
                     _("only the gateway itself is let in") if closed
                     else _("any process on %s can be any user: set gateway_secret_file, or client_ca, so"
                            " that only the gateway itself is let in") % " ".join(server["trusted_proxies"])))
    rows.append(finding_of_open_files(limits["connections"] + 200))
    rows += findings_of_disk(server["state_dir"], limits["spool_free"], local=True)
    if os.path.exists(utf8(os.path.join(server["state_dir"], "state.sqlite3"))):
        rows.append(finding_of_file(server["state_dir"], 0o700))
        rows += check_upgrade(server) + check_tokens(server) + [check_backup(server["state_dir"])]
    else:
        rows.append(check_state_dir(server["state_dir"]))
    return print_findings(rows + look_at_running_relay(conf) + check_listener(server), options.json)


def check_commands(conf):
    """Rows about the sites and what can be asked of them."""
    sites = conf["RemoteSites"]["remote_site_ids"]
    if not sites:
        return [(None,
                 _("no sites: name them in [RemoteSites] remote_site_ids, each with a section of its own"))]
    commands = {site: conf.get(site, {}).get("commands", []) + conf.get(site, {}).get("command_lines", [])
                for site in sites}
    rows = [(True, _("sites: %s; commands: %d") % (" ".join(sites), sum(map(len, commands.values()))))]
    return rows + [(None, _("site %s: no commands; nothing can be asked of it") % site)
                   for site in sites if not commands[site]]


def check_state_dir(folder):
    """A row about a state_dir that holds no state yet: may the first start make one?"""
    if os.path.exists(utf8(folder)) and os.geteuid() and os.stat(utf8(folder)).st_uid != os.geteuid():
        return False, _("%s: belongs to another user; run as that user, or set [Server] state_dir") % folder
    above = os.path.abspath(folder)
    while not os.path.lexists(utf8(above)):
        above = os.path.dirname(above)
    if os.path.isdir(utf8(above)) and os.access(utf8(above), os.W_OK | os.X_OK):
        return None, _("%s is not there yet; the first start makes it") % folder
    good = None if above == "/var/lib" else False      # where the systemd unit makes it
    return good, _("%s is not there yet, and this user may not make it in %s: mkdir and chown it (below"
                   " /var/lib the systemd unit does)") % (folder, above)


def check_certificate(server):
    """Rows about the certificate that the ini names."""
    if not server["certfile"]:
        text = (_("no TLS here: it is the gateway's") if server["auth"] == "gateway"
                else _("no TLS: for this host only"))
        return [(True if server["auth"] == "gateway" else None, text)]
    try:
        tls_context(server)
        found = certificate_of(server["certfile"])
    except (Stop, OSError, AttributeError) as error:
        return [(False, str(error))]
    rows = [finding_of_certificate(found, server["certfile"])]
    for name in dns_names(found):
        try:
            socket.getaddrinfo(name, server["portnumber"])
        except (OSError, UnicodeError):
            rows.append((None, _("certificate: %s is not known here (DNS); clients need it") % name))
    return rows


def check_upgrade(server):
    """Rows about the database as an older, or a newer, version of this program has left it."""
    path = os.path.join(server["state_dir"], "state.sqlite3")
    db = sqlite3.connect("file:%s?mode=ro" % quote(path), uri=True)
    try:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        open_ones = db.execute("SELECT COUNT(*) FROM calculations WHERE NOT "
                               + state_in(OVER)).fetchone()[0]
    except sqlite3.Error as error:
        return [(None, "%s: %s" % (path, error))]
    finally:
        db.close()
    if found > SCHEMA_VERSION:
        return [(False, _("%s: was written by a newer version of this program (schema %d)") % (path, found))]
    if found == SCHEMA_VERSION:
        return [(True, _("%s: written by this version (schema %d)") % (path, found))]
    return [(None,
             _("%s: schema %d; the next start copies it to %s.schema%d and upgrades it to %d; %d unfinished"
               " calculations go on")
             % (path, found, os.path.basename(path), found, SCHEMA_VERSION, open_ones))]


def check_tokens(server):
    """Rows about tokens and users."""
    db = sqlite3.connect("file:%s?mode=ro" % quote(os.path.join(server["state_dir"], "state.sqlite3")),
                         uri=True)
    try:
        now = time.time()
        good, soon = db.execute("SELECT COUNT(*), TOTAL(expires < ?) FROM tokens WHERE revoked IS NULL AND"
                                " NOT login AND expires > ?", (now + 14 * 86400, now)).fetchone()
        rows = [(None if soon else True, _("tokens: %d good, %d of them end within 14 days") % (good, soon))]
        if server["auth"] == "login":
            rows.append((True,
                         _("users with a password: %d")
                         % db.execute("SELECT COUNT(*) FROM users").fetchone()[0]))
        elif not good and server["auth"] == "tokens":
            codes = db.execute("SELECT COUNT(*) FROM tokens WHERE login = ? AND revoked IS NULL AND expires"
                               " > ?", (CODE, now)).fetchone()[0]
            rows = [(True, _("no token yet; %d codes of kits wait for their first start") % codes) if codes
                    else (None, _("no good token: token issue USER"))]
        return rows
    except sqlite3.Error as error:
        return [(None, "%s: %s" % (server["state_dir"], error))]
    finally:
        db.close()


def check_backup(folder):
    """A row about the last backup: how old is it, and its database whole?"""
    try:
        with open(os.path.join(utf8(folder), b"backed-up"), encoding="utf-8", errors="replace") as text:
            place = text.read(4096).strip()
        when = os.stat(os.path.join(utf8(folder), b"backed-up")).st_mtime
    except OSError:
        return None, _("no backup was made yet (from cron, for example: backup DIR)")
    if not os.path.exists(utf8(os.path.join(place, "state.sqlite3"))):
        return None, _("the last backup, %s of %s, is not there any more (moved elsewhere?)") % (
            place, local_time(when))
    db = sqlite3.connect("file:%s?mode=ro" % quote(os.path.join(place, "state.sqlite3")), uri=True)
    try:
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        found = str(error)
    finally:
        db.close()
    good = time.time() - when <= BACKUP_OLD or None    # an old one is worth a word
    return found == "ok" and good, _("the last backup: %s of %s; its database: %s") % (
        place, local_time(when), found)


def check_listener(server):
    """Rows about the relay that runs with this ini, if one does."""
    address, port = server["ipaddress"], server["portnumber"]
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    try:
        sock = socket.create_connection((address, port), 5)
        try:
            if server["certfile"] and not server["client_ca"]:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                sock = context.wrap_socket(sock)
                with open(utf8(server["certfile"]), encoding="ascii", errors="replace") as text:
                    own = re.search("-----BEGIN CERT.*?-----END CERT[^\\n]*", text.read(), re.S)
                if own and ssl.PEM_cert_to_DER_cert(own.group()) != sock.getpeercert(True):
                    return [(False,
                             _("the relay that runs shows another certificate than %s: restart it")
                             % server["certfile"])]
            if not server["client_ca"] and server["auth"] != "gateway":
                sock.sendall(("GET %sversion HTTP/1.0\r\nHost: localhost\r\n\r\n" % API_PATH).encode())
                if not sock.recv(100).startswith(b"HTTP/1.1 200"):
                    raise OSError("?")
        finally:
            sock.close()
        return [(True, _("a relay answers on port %d") % port)]
    except OSError as error:
        return [(None, _("nothing answers on port %d: %s") % (port, error.strerror or error))]


def cmd_bundle(options):
    """bundle: what support needs to see of this relay."""
    conf, path = load_conf(options)
    store, secrets = Store(conf["Server"]["state_dir"], lock=False), {}
    options.json = options.all = True
    rows = store.read("SELECT accept_id, site, state, status, reason, exit_code, protocol, attempt, waits,"
                      " registered, allowed, claimed, started, ended, got, finished FROM calculations ORDER"
                      " BY seq DESC LIMIT ?", BUNDLE_CALCULATIONS)
    parts = {"versions.txt": said_by(print_version) + system_words(),
             "check.json": said_by(cmd_check, options), "ini.txt": ini_without_secrets(path),
             "log.txt": end_of_log(conf["Server"]["logfile"]), "sites.json": said_by(cmd_sites, options),
             "calculations.json": "".join(json_of(dict(row)) + "\n" for row in rows)}
    if conf["Server"].get("secret"):
        secrets["gateway_secret_file"] = [utf8(conf["Server"]["secret"][1])]
    secrets["keyfile"] = secret_lines(conf["Server"]["keyfile"]) if conf["Server"]["keyfile"] else []
    hashes = {row["hash"] for row in store.read("SELECT hash FROM tokens")}

    def look(data):
        known = any(hashlib.sha256(word).hexdigest() in hashes for word in token_like(data))
        return secrets_in(data, secrets) + ["token"] * known
    write_bundle(options.file, parts, look)


def token_like(data):
    """Every text in data that may be a token of ours (64 hexadecimal digits), of which only the sum is known:
    as it is, in base64, in hex, as in a URL."""
    squeezed = re.sub(rb"\s+", b"", data)
    texts = [data, squeezed,
             re.sub(rb"%([0-9A-Fa-f]{2})", lambda one: bytes([int(one.group(1), 16)]), squeezed)]
    for run in re.findall(rb"[0-9A-Fa-f]{128,}", squeezed):
        texts += [bytes.fromhex(run[at:len(run) - (len(run) - at) % 2].decode()) for at in (0, 1)]
    for run in re.findall(rb"[A-Za-z0-9+/_-]{80,}", squeezed):
        run = run.replace(b"-", b"+").replace(b"_", b"/")
        texts += [base64.b64decode(run[at:] + b"A" * (-(len(run) - at) % 4)) for at in range(4)]
    for text in texts:
        for run in re.findall(rb"[0-9a-f]{64,}", text):
            for at in range(len(run) - 63):
                yield run[at:at + 64]


def cmd_unit(options):
    """Prints a systemd unit for `serve` with this ini."""
    conf, path = load_conf(options)
    server, script = conf["Server"], os.path.abspath(__file__)
    state = os.path.abspath(server["state_dir"])
    low = 0 < server["portnumber"] < 1024
    writes = ("StateDirectory=%s\nStateDirectoryMode=0700" % state[9:] if state.startswith("/var/lib/")
              else "ReadWritePaths=%s" % state)
    if server["logfile"]:
        writes += "\nReadWritePaths=%s" % os.path.dirname(os.path.abspath(server["logfile"]))
    at_home = any(os.path.abspath(place).startswith(("/home/", "/root/"))
                  for place in (state, script, path, server["certfile"]) if place)
    print(UNIT
          % {"where": "/etc/systemd/system/mi_dicomapi.service", "name": "mi_dicomapi", "script": script,
             "ini": os.path.abspath(path), "writes": writes, "user": own_user("mi_distcomp"),
             "python": sys.executable, "files": conf["limits"]["connections"] + 200,
             "home": "read-only" if at_home else "yes", "caps": "CAP_NET_BIND_SERVICE" if low else "",
             "users": "no" if low else "yes"}, end="")


def own_user(default):
    """This user's name; for root the default: neither relay nor poller should run as root."""
    import pwd
    try:
        return default if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


LIST_COLUMNS = ("accept_id", "state", "user", "site", "registered", "exit_code", "command", "reason")


def cmd_list(options):
    """The calculations that are not finished (--all: all that are kept)."""
    store, conf = open_store(options)

    def look():
        rows = [dict(row)
                for row in store.read("SELECT accept_id, user, site, command, state, status, registered,"
                                      " poller, exit_code, reason, waits, silent AS out_of_contact FROM"
                                      " calculations WHERE ? OR state != ? ORDER BY seq", options.all,
                                      FINISHED)]
        for row in rows:
            row["out_of_contact"] = (int(row["out_of_contact"])
                                     if row["out_of_contact"] and row["state"] in CLAIMED else None)
        return rows

    for good, text in look_at_running_relay(conf):
        if not good:
            sys.stderr.write("%s: %s\n" % (PROGRAM, printable(text)))
    show_list(options, looks(look),
              lambda rows, width: table_lines(list(map(row_for_people, rows)), LIST_COLUMNS, width))


def row_for_people(row):
    """A row of list, for people."""
    state = state_cell("held" if held_since(row) is not None else row["state"], row["status"])
    if row["out_of_contact"] is not None:
        state = "?" + state[1:] + _(", out of contact")
    return dict(row, registered=local_time(row["registered"]), reason=row["reason"] or row["waits"],
                state=state)


def look_at_running_relay(conf):
    """Rows about the relay of this ini: is it in maintenance, and does the one that runs have other values
    than the ini by now?"""
    folder, rows = utf8(conf["Server"]["state_dir"]), []
    try:
        with open(os.path.join(folder, b"maintenance"), encoding="utf-8", errors="replace") as text:
            rows.append((None,
                         _("maintenance is on (%s): no new calculations and claims until `maintenance off`")
                         % text.read().strip()))
    except OSError:
        pass
    try:
        with open(os.path.join(folder, b"settings"), encoding="utf-8") as text:
            found = json.load(text)
        if found["process"] == process_mark(int(found["process"].split()[0])):
            for section, key, now in [(section, key, now) for section in conf
                                      for key, now in conf[section].items()]:
                then = found["conf"].get(section, {}).get(key)
                if then != json.loads(json.dumps(now)):
                    rows.append((None,
                                 _("the relay that runs has [%s] %s = %s still (ini: %s): restart it")
                                 % (section, key, then, now)))
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        pass
    return rows


def process_mark(pid):
    """What tells this process from others, also from a later one of its number; empty if there is none."""
    try:
        with open("/proc/%d/stat" % pid) as text:
            return "%d %s" % (pid, text.read().rpartition(")")[2].split()[19])
    except OSError:
        return ""


def cmd_show(options):
    """Everything about one calculation."""
    store, conf = open_store(options)
    rows = store.read("SELECT * FROM calculations WHERE accept_id = ?", whole_id(store, options.accept_id))
    row = {key: value
           for key, value in dict(rows[0]).items()
           if key not in ("claim", "take", "fingerprint", "manifest", "seq")}
    row["steps"] = steps_of(store, "seq = ?", rows[0]["seq"])
    row["files"] = [dict(found)
                    for found in store.read("SELECT kind, n, name, size, sha256, done FROM files WHERE calc"
                                            " = ? ORDER BY kind, n LIMIT ?", rows[0]["seq"], LISTED)]
    if options.json:
        print(json_of(row))
        return 0
    for key, value in row.items():
        if key == "files":
            for found in value:
                print("  %-6s %6d  %12d bytes  %s  %s"
                      % (found["kind"], found["n"], found["size"], "complete" if found["done"] else "-",
                         printable(found["name"])))
        elif key == "steps":
            for found in value:
                print("  %s  %d.%d %s  %s" % (local_time(found["at"]), found["attempt"], found["number"],
                                              found["step"], printable(found["reason"] or "")))
        elif value not in (None, "", "{}"):
            times = ("registered", "touched", "allowed", "claimed", "started", "ended", "got", "finished")
            print("%-14s %s" % (key, local_time(value) if key in times else printable(value)))
    return 0


def steps_of(store, where, *values):
    """The steps [{at, accept_id, attempt, number, step, user, site, command, ...}] for which `where` holds,
    in their order."""
    rows = store.read("SELECT at, accept_id, attempt, step, user, site, command, note FROM events JOIN past"
                      " ON seq = calc WHERE %s ORDER BY at, events.rowid" % where, *values)
    found = []
    for row in map(dict, rows):
        note = dict.fromkeys(("poller", "status", "exit_code", "reason"))
        note.update(json.loads(row.pop("note") or "{}"))
        found.append(dict(row, number=STEP[row["step"]].number if row["step"] in STEP else 0, **note))
    return found


HISTORY_COLUMNS = ("at", "accept_id", "attempt", "number", "step", "user", "site", "command", "status",
                   "exit_code", "reason", "poller")


def cmd_history(options):
    """When each step of each attempt was made, as long as that is kept."""
    store, conf = open_store(options)
    rows = steps_of(store, "at >= ? AND (? = '' OR site = ?) AND (? = '' OR user = ?)",
                    moment_of(options.since), options.site, options.site, options.user, options.user)
    if options.csv:
        return print_csv(rows)
    for row in rows if not options.json else ():
        row["at"] = local_time(row["at"])
    show_rows(options, rows, HISTORY_COLUMNS)
    if not options.json:
        first = store.read("SELECT MIN(registered) FROM past")[0][0]
        print("-- " + _("kept since %s ([times] keep_history)") % (local_time(first) or "-"))
    return 0


def moment_of(text):
    """'2d' (ago), '2026-11-20', '2026-11-20T21:47' as seconds since the epoch; '' as 0. 64 for another."""
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"):
        try:
            return time.mktime(time.strptime(text, form))
        except (ValueError, OverflowError):
            pass
    try:
        return time.time() - seconds(text) if text else 0.0
    except ValueError:
        raise Stop(EX_USAGE,
                   _("--since: a time ago (12h, 7d) or a date (2026-11-20, 2026-11-20T21:47), not %s")
                   % printable(text))


def print_csv(rows):
    """Rows of steps as CSV: times as ISO 8601; no cell that a spreadsheet would take for a formula."""
    import csv
    out = csv.writer(sys.stdout, lineterminator="\r\n")
    out.writerow(HISTORY_COLUMNS)
    for row in rows:
        row["at"] = iso_time(row["at"])
        cells = ["" if row[name] is None else printable(row[name]) for name in HISTORY_COLUMNS]
        out.writerow([("'" if re.match("[=+@\uff1d\uff0b\uff0d\uff20-]", cell) else "") + cell
                      for cell in cells])
    return 0


def whole_id(store, given):
    """The id of the calculation that is meant: all of it, or its first eight characters and more. 64 if there
    is none, or more than one."""
    begins = given + "~" if len(given) >= 8 else given
    found = [row[0]
             for row in store.read("SELECT accept_id FROM calculations WHERE accept_id >= ? AND accept_id <="
                                   " ? LIMIT 10", given, begins)]
    if not found:
        raise Stop(EX_USAGE, _("%s: no such calculation (see list --all)") % printable(given))
    if len(found) > 1:
        raise Stop(EX_USAGE, _("%s: which one? %s") % (printable(given), " ".join(found)))
    return found[0]


def cmd_change(options):
    """Asks the running relay to cancel, rerun or end a calculation. 69 if none runs on this state_dir, 77 if
    it refuses."""
    store, conf = open_store(options)
    accept_id = whole_id(store, options.accept_id)
    text = ask_running_relay(store, options.word, accept_id=accept_id, reason=options.reason, stop=True,
                             force=options.force)["message"]
    print("%s: %s" % (accept_id, text))
    return 0


def ask_running_relay(store, call, **fields):
    """What the relay that runs on this state_dir answers to an operator's call. 69 if none runs, 77 if it
    refuses, 64 if it knows no such calculation."""
    with open(os.path.join(utf8(store.folder), b"lock"), "a") as lock:
        runs = not take_lock(lock)
    number = store.writer.execute("INSERT INTO orders (call, fields) VALUES (?, ?)",
                                  (call, json.dumps(dict(fields, v=2)))).lastrowid if runs else 0
    until, answer = time.monotonic() + 15, None
    while runs and answer is None and time.monotonic() < until:
        time.sleep(0.1)
        answer = store.read("SELECT answer FROM orders WHERE number = ?", number)[0][0]
    store.writer.execute("DELETE FROM orders WHERE number = ?", (number,))
    if answer is None:
        raise Stop(EX_UNAVAILABLE, _("no relay answers on %s; start it, then say it again") % store.folder)
    code, text, found = json.loads(answer)
    if code != 200:
        raise Stop(EX_USAGE if code == 404 else EX_REFUSED,
                   ": ".join(filter(None, [fields.get("accept_id"), text])))
    return found


def cmd_explain(options):
    """Why one calculation is where it is."""
    store, conf = open_store(options)
    accept_id = whole_id(store, options.accept_id)
    try:
        found = ask_running_relay(store, "explain", accept_id=accept_id)
    except Stop as stop:
        if stop.code != EX_UNAVAILABLE:
            raise
        found = {"cause": "no-relay", "who": OPERATOR, "sentence": str(stop),
                 "command": "systemctl start mi_dicomapi"}
    told = told_cause(found)
    show_cause(accept_id, dict(told, users=found["users"]) if "users" in found else told, options.json)
    for user in found.get("users", ()) if not options.json else ():
        print("  " + _("a user whose poller asks there: %s") % printable(user))
    return 0


SITE_COLUMNS = ("site", "user", "state", "until", "heard", "busy", "jobs", "waiting", "waiting_since",
                "outbox", "oldest", "version", "poller")


def cmd_sites(options):
    """The sites with their pollers: how each stands, when it was heard, what it has."""
    store, conf = open_store(options)
    times = ("until", "heard", "oldest", "waiting_since")
    show_list(options, looks(lambda: ask_running_relay(store, "sites")["sites"]),
              lambda rows, width: table_lines(
                  [dict(row, **{key: local_time(row[key]) for key in times}) for row in rows],
                  SITE_COLUMNS, width))


def cmd_witness(options):
    """What this relay has seen of the audit logs of a site's pollers: the furthest of each, and the one that
    came with each result."""
    store, conf = open_store(options)
    rows = [{"at": row["heard"], "of": row["poller"], "audit": row["audit"]}
            for row in ask_running_relay(store, "sites")["sites"]
            if row["site"] == options.site and row["audit"]]
    rows += [{"at": row["at"], "of": row["accept_id"], "audit": row["audit"]}
             for row in steps_of(store, "site = ? AND step = 'send-results' AND note LIKE '%audit%'",
                                 options.site)]
    for row in rows if not options.json else ():
        row["at"] = local_time(row["at"])
    show_rows(options, rows, ("at", "of", "audit"))
    return 0


def cmd_metrics(options):
    """The running relay's figures."""
    store, conf = open_store(options)
    print(ask_running_relay(store, "metrics")["message"], end="")
    return 0


def cmd_maintenance(options):
    """Switches maintenance on or off; the running relay knows within a second."""
    store, conf = open_store(options)
    note_maintenance(store.folder, options.word == "maintenance on", options.reason)
    print(_("maintenance is %s") % options.word.split()[1])
    return 0


def note_maintenance(folder, on, reason):
    """Leaves in the state_dir, for the running relay, that maintenance is on, and why; or that it is off."""
    path = os.path.join(utf8(folder), b"maintenance")
    if on:
        with open(path, "w", encoding="utf-8") as out:
            out.write((printable(reason) or "-") + "\n")
    elif os.path.exists(path):
        os.unlink(path)


def cmd_page_link(options):
    """Prints a link to the page that is good once, for a minute, for what the roles and sites say. 78 where
    there is no page, or where a gateway says who comes."""
    store, conf = open_store(options)
    server = conf["Server"]
    if not server["page"]:
        raise Stop(EX_CONFIG, _("the page is switched off ([Server] page)"))
    if server["auth"] == "gateway":
        raise Stop(EX_CONFIG, _("auth = gateway: who comes is the gateway's to say; open %spage there")
                   % API_PATH)
    options.user = options.user or own_user("root")
    options.roles = options.roles if "--roles" in options.given else OPERATOR
    roles, sites = roles_and_sites(options, conf)
    code = base64.urlsafe_b64encode(os.urandom(24)).decode("ascii")
    ask_running_relay(store, "page-link", hash=hashlib.sha256(code.encode()).hexdigest(), user=options.user,
                      roles=roles, sites=sites)
    sys.stderr.write(_("for user %s, roles %s; good once, within %d s:")
                     % (options.user, roles.replace(" ", ","), LINK_SECONDS) + "\n")
    print("%s://%s:%d%spage#link=%s" % ("https" if server["certfile"] else "http", page_host(server),
                                        server["portnumber"], API_PATH, code), flush=True)
    return 0


def page_host(server):
    """The name by which a browser reaches the relay: the certificate's first one, or the address."""
    try:
        names = dns_names(certificate_of(server["certfile"]))
    except (AttributeError, ValueError, OSError):
        names = []
    address = socket.getfqdn() if server["ipaddress"] in ("0.0.0.0", "::") else server["ipaddress"]
    return (names or ["[%s]" % address if ":" in address else address])[0]


def cmd_backup(options):
    """A consistent copy of the whole state into a new directory, while the relay runs."""
    import shutil
    store, conf = open_store(options)
    target = utf8(options.dir)
    if os.path.lexists(target):
        raise Stop(EX_USAGE, _("%s: exists already; a backup goes into a new directory") % options.dir)
    part, db = target + b".part", store.writer
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part, 0o700)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.execute("BEGIN IMMEDIATE")                      # from here on nobody writes
    for name in (b"state.sqlite3", b"state.sqlite3-wal"):
        if os.path.exists(os.path.join(utf8(store.folder), name)):
            shutil.copyfile(os.path.join(utf8(store.folder), name), os.path.join(part, name))
    db.execute("ROLLBACK")
    copy = sqlite3.connect(os.path.join(part, b"state.sqlite3").decode("utf-8", "surrogateescape"))
    copy.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    count = lost = 0
    for accept_id, kind, blob in copy.execute("SELECT DISTINCT accept_id, kind, blob FROM files JOIN"
                                              " calculations ON seq = calc WHERE done AND blob NOT NULL"):
        source = store.spool(accept_id, kind, blob)
        goal = os.path.join(part, os.path.relpath(source, utf8(store.folder)))
        os.makedirs(os.path.dirname(goal), 0o700, exist_ok=True)
        try:
            shutil.copyfile(source, goal)
            count += 1
        except FileNotFoundError:                      # fetched and removed meanwhile
            lost += 1
    copy.close()
    os.sync()
    os.rename(part, target)
    with open(os.path.join(utf8(store.folder), b"backed-up"), "w", encoding="utf-8") as out:
        out.write(os.path.abspath(options.dir) + "\n")     # for `check` and `metrics`
    print(_("%s: %d files of the spool and the database (%d files went meanwhile)")
          % (options.dir, count, lost))
    return 0


def cmd_restore(options):
    """Puts a backup into the ini's state_dir, which must be new. The next start hands nothing out for
    restore_grace."""
    import shutil
    conf, path = load_conf(options)
    source, target = utf8(options.dir), utf8(conf["Server"]["state_dir"])
    if not os.path.exists(os.path.join(source, b"state.sqlite3")):
        raise Stop(EX_NOINPUT, _("%s: is not a backup of this program") % options.dir)
    if os.path.lexists(os.path.join(target, b"state.sqlite3")):
        raise Stop(EX_CONFIG,
                   _("%s: holds a state already; move it away first") % conf["Server"]["state_dir"])
    os.makedirs(target, 0o700, exist_ok=True)
    for above, names, files in os.walk(source):
        goal = os.path.normpath(os.path.join(target, os.path.relpath(above, source)))
        os.makedirs(goal, 0o700, exist_ok=True)
        for name in files:
            if name != b"state.sqlite3":
                shutil.copyfile(os.path.join(above, name), os.path.join(goal, name))
    with open(os.path.join(target, b"restored"), "w") as out:
        out.write(local_time(time.time()) + "\n")
    shutil.copyfile(os.path.join(source, b"state.sqlite3"), os.path.join(target, b"state.sqlite3.part"))
    os.sync()
    os.rename(os.path.join(target, b"state.sqlite3.part"), os.path.join(target, b"state.sqlite3"))
    print(_("restored into %s; start the relay: for the first %d s it only listens to what the pollers hold")
          % (conf["Server"]["state_dir"], conf["times"]["restore_grace"]))
    return 0


def show_rows(options, rows, columns):
    """Rows (dicts) as a table, or as JSON."""
    print(json_of(rows) if options.json else "\n".join(table_lines(rows, columns)))


def day_and_hour(seconds):
    """A time for people elsewhere: with its zone."""
    return time.strftime("%Y-%m-%d %H:%M (%z)", time.localtime(seconds))


def day_of(seconds):
    """A day for people."""
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def local_time(seconds):
    """A time for people, or an empty text."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


# ==== notify ====
# A process and a user of its own, for the relay itself connects to nothing and runs nothing: it waits at the
# relay for what somebody should know, and starts the owner's hook with it, as JSON on its standard input.
DIGEST, AT_ONCE_MOST = 600, 5                          # in so many seconds at most so many messages to one
QUEUED_MOST = 200              # things that wait to be told to one; of more, how many they are
ALL_AWAY = 30                  # seconds between two tries while the relay is away
HOOK_ENV = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ")


class Notifier:
    """Who has to be told what: each thing once, when it has lasted for `grace`, and once more when it is over
    for as long; each recipient AT_ONCE_MOST messages in DIGEST seconds and `cap` a day at most: what comes
    beyond waits, and goes together. state: what of that is on the disk."""

    def __init__(self, keys, state):
        self.keys = keys
        self.state = state
        self.known = ""                                # the relay's mark of what held, while it answers
        self.telling = False
        self.open = state.setdefault("open", {})       # {key: {first, seen, told (level), one (condition)}}
        self.queue = state.setdefault("queue", {})     # {recipient: [things]}
        self.sent = state.setdefault("sent", {})       # {recipient: [when]}
        self.retry = state.setdefault("retry", {})     # {recipient: [when the hook is tried again, pause]}
        state.setdefault("after", -1)

    def take(self, answer, now):
        """What the relay has answered."""
        self.state["after"] = answer["after"]
        self.known = answer["known"]
        for one in answer["ended"]:
            if one["user"] in self.keys["researchers"]:
                self.put(one, "ended", now)
        self.hold([one for one in answer["conditions"] if self.concerns(one, now)], now)

    def away(self, why, now):
        """The relay does not answer: that holds, and whatever held before, as far as is known."""
        self.known = ""
        held = [found["one"] for key, found in self.open.items() if found["seen"] == self.state.get("seen")]
        one = condition("relay", why=printable(why)[:300])
        self.hold([other for other in held if other["kind"] != "relay"] + [one], now)

    def concerns(self, one, now):
        """Does anybody want to know it? Researchers only who are named, of what has waited long."""
        return one["to"] != RESEARCHERS or (one["user"] in self.keys["researchers"]
                                            and now - one["since"] >= self.keys["waits"])

    def hold(self, found, now):
        """These hold now, and no others: tells what has held, or not held, for long enough."""
        grace = self.keys["grace"]
        for one in found:
            known = self.open.setdefault(one["key"], {"first": now, "told": 0})
            known.update(seen=now, one=one)
            lasts = now - known["first"] >= (0 if one["kind"] in ("certificate", "token", "waits") else grace)
            if one["level"] > known["told"] and lasts:
                known["told"] = one["level"]
                self.put(one, "begins", now)
        self.state["seen"] = now
        for key, known in list(self.open.items()):
            if now - known["seen"] >= max(grace, 1):
                del self.open[key]
                if known["told"]:
                    self.put(known["one"], "over", now)

    def patience(self, now):
        """Whole seconds that it may wait for the relay, before something of its own is due."""
        grace, seen, times = self.keys["grace"], self.state.get("seen", now), [now + 50]
        for known in self.open.values():
            times += [known["first"] + grace] if known["one"]["level"] > known["told"] else []
            times += [known["seen"] + max(grace, 1)] if known["seen"] < seen else []
        times += [now + CONDITIONS_EVERY] if any(self.queue.values()) else []
        return max(0, int(min(times) - now))

    def put(self, one, what, now):
        """A thing for its recipient."""
        recipient = " ".join([one["to"], {ADMINS: one["site"], RESEARCHERS: one["user"]}.get(one["to"], "")])
        things = self.queue.setdefault(recipient.strip(), [])
        if len(things) < QUEUED_MOST:
            things.append(dict(one, what=what, at=round(now)))
        else:
            things[-1]["more"] = things[-1].get("more", 0) + 1

    def due(self, now):
        """The recipients that may be told something now."""
        for recipient in list(self.sent):
            self.sent[recipient] = [when for when in self.sent[recipient] if 0 <= now - when < 86400]
        return [recipient for recipient, things in self.queue.items()
                if things and self.retry.get(recipient, [0])[0] <= now
                and len(self.sent.get(recipient, ())) < self.keys["cap"]
                and sum(now - when < DIGEST for when in self.sent.get(recipient, ())) < AT_ONCE_MOST]

    def message(self, recipient, things):
        """All that waits for a recipient, for the hook. id: the same, if it has to be told again."""
        lines = [line_of(one) for one in things]
        more = sum(one.get("more", 0) for one in things)
        lines += [_("and %d more") % more] if more else []
        if len(self.sent.get(recipient, ())) + 1 >= self.keys["cap"]:
            lines.append(_("this is the last message for a day: what comes is told together then"))
        text = "\n".join(lines) + "\n"
        subject = lines[0].split("\n")[0]
        subject = subject if len(things) == 1 else _("%d things to know") % (len(things) + more)
        return message_for(recipient, hashlib.sha256((recipient + text).encode("utf-8")).hexdigest()[:32],
                           subject, text, things)

    def tell(self, now, run, keep):
        """Tells who may be told: run(message) starts the hook (None: done, or why not), keep() puts the state
        on the disk."""
        for recipient in self.due(now):
            things = self.queue[recipient]
            why = run(self.message(recipient, things))
            if why is None:
                del self.queue[recipient]
                self.retry.pop(recipient, None)
                self.sent.setdefault(recipient, []).append(round(now))
                log("info", None, "told", to=recipient, things=len(things))
            else:
                pause = min(3600, 2 * self.retry.get(recipient, [0, 30])[1])
                self.retry[recipient] = [now + pause, pause]
                log("error", None, "hook", to=recipient, refused=why, again="%d s" % pause)
            keep()


def message_for(recipient, number, subject, text, things, test=False):
    """A message as the hook gets it. recipient: `operators`, `admins SITE`, `researchers USER`."""
    to, _blank, name = recipient.partition(" ")
    return {"v": 1, "id": number, "to": to, "site": name if to == ADMINS else "",
            "user": name if to == RESEARCHERS else "", "subject": "[mi_distcomp] " + subject[:150],
            "text": text, "things": things, "test": test}


def line_of(one):
    """A thing for people."""
    text = one["text"].get(SAY["lang"], one["text"]["en"])
    text = _("over: %s") % text if one["what"] == "over" else text
    return text + ("\n    " + one["command"] if one["command"] and one["what"] != "over" else "")


def run_hook(argv, message, limit):
    """Starts the hook: None when it has ended with 0, or why not. After `limit` seconds TERM, then KILL, also
    for what it has started."""
    import subprocess
    import tempfile
    env = {name: os.environ[name] for name in HOOK_ENV if name in os.environ}
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as said:
        told.write(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace"))
        told.seek(0)
        try:
            process = subprocess.Popen(argv, stdin=told, stdout=said, stderr=said, env=env,
                                       start_new_session=True)
        except OSError as error:
            return "%s: %s" % (argv[0], error.strerror)
        code, why = 0, ""
        for patience, number in ((limit, signal.SIGTERM), (3, signal.SIGKILL), (3, signal.SIGKILL)):
            try:
                code = process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                why = "it took longer than %g s" % limit
                os.killpg(process.pid, number)
        why = why or (code and "it ended with %d" % code)
        said.seek(max(0, said.seek(0, os.SEEK_END) - 300))
        rest = " ".join(said.read().decode("utf-8", "replace").split())
    return ": ".join(filter(None, [why, printable(rest)])) if why else None


class RelayLine:
    """The way to the relay: one call at a time, over https."""

    def __init__(self, keys):
        parts = urlsplit(keys["url"])
        if parts.scheme not in ("https", "http") or not parts.hostname or (
                parts.scheme == "http" and not is_loopback(parts.hostname)):
            raise Stop(EX_CONFIG, _("[notify] url = %s: https://HOST:PORT, as others call the relay")
                       % keys["url"])
        self.parts = parts
        self.keys = keys

    def ask(self, **fields):
        """The answer to v2/conditions. OSError or ValueError with what is wrong."""
        import http.client
        from urllib.parse import urlencode
        kind, more = http.client.HTTPConnection, {}
        if self.parts.scheme == "https":
            kind = http.client.HTTPSConnection
            more["context"] = ssl.create_default_context(cafile=self.keys["ca_file"] or None)
        line = kind(self.parts.hostname, self.parts.port or 50443, timeout=fields.get("wait", 0) + 30, **more)
        try:
            line.request("GET", API_PATH + "v2/conditions?" + urlencode(dict(fields, v=2)), headers={
                "Authorization": "Bearer " + token_of_file(self.keys["token_file"])})
            answer = line.getresponse()
            first = json.loads(answer.read(16 << 20).decode("utf-8"))["errors"][0]
        except (http.client.HTTPException, KeyError, IndexError, TypeError) as error:
            raise ValueError("no answer of a relay (%s)" % type(error).__name__)
        finally:
            line.close()
        if first.get("code") != 200:
            raise ValueError("HTTP %d: %s" % (answer.status, first.get("why") or first.get("message")))
        return first


def token_of_file(path):
    """The token in a file of mode 0600. ValueError otherwise."""
    with open(utf8(path), encoding="ascii", errors="replace") as text:
        if os.fstat(text.fileno()).st_mode & 0o077:
            raise ValueError(_("%s: others may read it; chmod 600") % path)
        found = text.read(1000).strip()
    if not re.match("[!-~]+\\Z", found):
        raise ValueError(_("%s: holds no token") % path)
    return found


def notify_keys(options):
    """[notify] of the ini, checked. 78."""
    path = find_ini(options.ini, [os.getcwd()] + ini_folders(__file__), needed=True)
    conf = read_ini(path, INI_KEYS)
    choose_language(conf["Server"]["lang"])
    keys = conf["notify"]
    for key in ("url", "token_file", "hook"):
        if not keys[key]:
            raise Stop(EX_CONFIG, _("%s: [notify] %s is not set") % (path, key))
    return keys, path


def cmd_notify(options):
    """Waits at the relay for what somebody should know, and tells it by the hook, until SIGTERM (0)."""
    os.umask(0o077)
    no_core_dump()
    keys, path = notify_keys(options)
    line = RelayLine(keys)
    if options.test:
        return test_notify(keys, line, options)
    folder = os.path.expanduser(keys["state_dir"] or os.environ.get("STATE_DIRECTORY")
                                or "~/.local/state/mi_distcomp_notify")
    os.makedirs(utf8(folder), 0o700, exist_ok=True)
    with open(os.path.join(utf8(folder), b"lock"), "a") as lock:
        if not take_lock(lock):
            raise Stop(EX_TEMPFAIL, _("%s: another notify is running on this directory") % folder)
        notifier = Notifier(keys, read_notes(folder))
        log("info", None, "notifying", relay=keys["url"], hook=keys["hook"][0], state=folder)
        notify_forever(notifier, line, lambda: write_notes(folder, notifier.state))


def notify_forever(notifier, line, keep):
    """Its life. A signal ends it between two hooks: what was told is on the disk then."""
    keys, stopping = notifier.keys, []

    def stop(number, frame):
        stopping.append(Stop(EX_INTERRUPT if number == signal.SIGINT else 0, ""))
        if not notifier.telling:
            raise stopping[0]

    def run(message):
        return run_hook(keys["hook"], message, keys["time_limit"])

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while True:
        wait = notifier.patience(time.time()) if notifier.known else 0
        why = ""
        try:
            answer = line.ask(after=notifier.state["after"], known=notifier.known, wait=wait)
        except (OSError, ValueError) as error:
            why = str(getattr(error, "strerror", None) or error)
            log("warn", None, "relay", away=why)
        notifier.telling = True
        if why:
            notifier.away(why, time.time())
        else:
            notifier.take(answer, time.time())
        keep()
        notifier.tell(time.time(), run, keep)
        notifier.telling = False
        if stopping:
            raise stopping[0]
        time.sleep(ALL_AWAY if why else CONDITIONS_EVERY)


def read_notes(folder):
    """What notify has on the disk; {} where there is nothing that it can read."""
    try:
        with open(os.path.join(utf8(folder), b"notes"), encoding="utf-8") as text:
            found = json.load(text)
        if isinstance(found, dict) and found.pop("v", None) == 1:
            return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        log("warn", None, "notes", unreadable=error, why="begins anew")
    return {}


def write_notes(folder, state):
    """Puts them there, whole or not at all."""
    path = os.path.join(utf8(folder), b"notes")
    with open(path + b".new", "w", encoding="utf-8") as out:
        json.dump(dict(state, v=1), out)
        out.flush()
        os.fsync(out.fileno())
    os.rename(path + b".new", path)


def test_notify(keys, line, options):
    """notify --test: is the relay reached, and does the hook take a message for each kind of recipient? 78 if
    not."""
    rows = []
    try:
        line.ask(after=-1, wait=0)
        rows.append((True, _("the relay answers, and takes the token")))
    except (OSError, ValueError) as error:
        rows.append((False, "%s: %s" % (keys["url"], getattr(error, "strerror", None) or error)))
    for recipient in (OPERATORS, ADMINS + " SITE", RESEARCHERS + " USER"):
        text = _("a test: nothing has happened")
        message = message_for(recipient, os.urandom(16).hex(), text, text + "\n", [], test=True)
        why = run_hook(keys["hook"], message, keys["time_limit"])
        rows.append((why is None, _("hook, for %s: %s") % (message["to"], why or "ok")))
    return print_findings(rows, options.json)


# ==== init ====
# From nothing to two hosts: a directory with all that the relay needs, and in it a kit for each other host.
# What is made is made aside, and gets its name when it is whole.
CA_DAYS, CERTIFICATE_DAYS = 3650, 397
AGO = 86400                    # seconds: a certificate is good since then, because clocks differ
CODE_HOURS = 72                # so long may the one-use code of a kit be exchanged for a token
WORD = re.compile(r"[^\s\[\]#;=:{}%/\\,*?\"']{1,100}\Z")             # of a site, a user, a command
Kit = collections.namedtuple("Kit", "name script role sites ini text")


def cmd_init(options):
    """Makes the relay's directory and kits, or adds kits to what is there. --renew: a new certificate."""
    os.umask(0o077)
    ini = os.path.abspath(os.path.expanduser(options.ini or os.path.join(options.dir, INI_NAME)))
    root = os.path.dirname(ini)
    there = os.path.exists(utf8(ini))
    if there != os.path.exists(utf8(os.path.join(root, "ca", "ca.pem"))) or options.renew and not there:
        raise Stop(EX_USAGE, _("%s: was not made by init; say --dir DIR, a new directory") % root)
    if options.renew:
        return renew_certificate(root, ini, options.name)
    check_init_words(options, there)
    made = add_to_relay(root, ini, options) if there else make_relay(root, options)
    tell_made(options, root, ini, made, not there)


def check_init_words(options, there):
    """64 for words that are missing, or that can be no site, user or command."""
    missing = [option
               for option in ("--site", "--user") + (() if there else ("--name",))
               if not getattr(options, option[2:])]
    if missing:
        raise Stop(EX_USAGE, _("init needs %s; --help says more") % missing[0])
    for option, word in ([("--site", options.site), ("--user", options.user)]
                         + [("--command", word) for word in options.commands]):
        if not WORD.match(word) or has_control_chars(word):
            raise Stop(EX_USAGE, _("%s %s: a word without blanks and without any of []#;=:{}%%/\\,*?")
                       % (option, printable(word)))


def make_relay(root, options):
    """A relay that was not there: everything in a directory aside, which gets its name at the end. The kits
    made."""
    if os.path.lexists(utf8(root)) and (not os.path.isdir(utf8(root)) or os.listdir(utf8(root))):
        raise Stop(EX_USAGE, _("%s: holds something else already; say --dir DIR, a new directory") % root)
    hosts, port = names_of(options.name)
    scripts = scripts_of_kits()
    with Aside(root) as stage:
        os.mkdir(utf8(os.path.join(stage, "ca")))
        certify(os.path.join(stage, "ca"), "ca", "", hosts[:1], CA_DAYS)
        make_certificate(stage, stage, hosts)
        address = "::" if ":" in hosts[0] else "0.0.0.0"
        text = RELAY_INI % {"root": root, "port": port,
                            "address": hosts[0] if is_loopback(hosts[0]) else address}
        text = with_site(text, {}, options.site, ["hello"] + options.commands)
        check_text(stage, text)
        put_file(stage, INI_NAME, text)
        store = Store(os.path.join(stage, "state"), lock=False)
        os.mkdir(utf8(os.path.join(stage, "kits")))
        made = make_kits(os.path.join(stage, "kits"), kits_for(options, hosts[0], port), store, scripts,
                         os.path.join(stage, "ca", "ca.pem"))
        store.writer.close()
        os.sync()
        fault("relay made")
        os.rename(utf8(stage), utf8(root))
        sync_path(utf8(os.path.dirname(root)))
    return made


def add_to_relay(root, ini, options):
    """Kits for another site, user or host of a relay that is there; the site and its commands get into its
    ini. The kits made."""
    conf = check_conf(read_ini(ini, INI_KEYS), ini)
    server, kits = conf["Server"], os.path.join(root, "kits")
    hosts = names_in(server["certfile"])
    at = names_of(options.name)[0][0] if options.name else hosts[0]
    if at not in hosts:
        raise Stop(EX_USAGE,
                   _("--name: the relay's certificate is for %s; init --renew --name NAME... makes one for"
                     " other names") % " ".join(hosts))
    wanted = kits_for(options, at, server["portnumber"])
    new = [kit for kit in wanted if not os.path.lexists(utf8(os.path.join(kits, kit.name)))]
    have = conf.get(options.site, {}).get("commands", []) + conf.get(options.site, {}).get(
        "command_lines", [])
    if not new and not set(options.commands) - set(have):
        raise Stop(EX_USAGE,
                   _("%s: is there already; move it away, then init makes a new one, with a new code")
                   % os.path.join(kits, wanted[0].name))
    scripts = scripts_of_kits() if new else {}
    with Aside(kits) as stage:
        with open(utf8(ini), encoding="utf-8-sig") as text:
            old = text.read()
        text = with_site(old, conf, options.site, ["hello"] + options.commands)
        check_text(stage, text)
        if text != old:
            os.rename(utf8(put_file(stage, "ini", text, os.stat(utf8(ini)).st_mode & 0o777)), utf8(ini))
        fault("site named")
        store = Store(server["state_dir"], lock=False)
        made = make_kits(stage, new, store, scripts, os.path.join(root, "ca", "ca.pem"))
        store.writer.close()
        os.sync()
        for kit in new:
            fault("kit made")
            os.rename(utf8(os.path.join(stage, kit.name)), utf8(os.path.join(kits, kit.name)))
    return made


class Aside:
    """A directory of this process alone, beside `path`, in which what is to get into its place is made: it
    has no name that anybody uses, and is for this user only. What a killed one has left there goes."""

    def __init__(self, path):
        self.path = os.path.join(os.path.dirname(path), ".%s.new" % os.path.basename(path))
        self.lock = -1

    def __enter__(self):
        """Its path. 75 while another init works there, 78 if it is another user's."""
        path = utf8(self.path)
        try:
            os.makedirs(path, 0o700, exist_ok=True)
            self.lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if os.fstat(self.lock).st_uid != os.geteuid():
                raise Stop(EX_CONFIG,
                           _("%s: belongs to another user; remove it, or say --dir DIR") % self.path)
            if not take_lock(self.lock) or not os.path.samestat(os.fstat(self.lock), os.stat(path)):
                raise Stop(EX_TEMPFAIL, _("%s: another init is at work there") % self.path)
            os.fchmod(self.lock, 0o700)
        except OSError as error:
            raise Stop(EX_IOERR,
                       _("%s: %s; say --dir DIR, in a directory of yours") % (self.path, error.strerror))
        self.clear()
        return self.path

    def clear(self):
        """Removes what is in it."""
        for entry in os.scandir(utf8(self.path)):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            else:
                os.unlink(entry.path)

    def __exit__(self, *error):
        """Nothing of it stays, unless it has its place by now."""
        if os.path.isdir(utf8(self.path)) and os.path.samestat(os.fstat(self.lock), os.stat(utf8(self.path))):
            self.clear()
            os.rmdir(utf8(self.path))
        os.close(self.lock)


def put_file(folder, name, content, mode=0o600):
    """A new file (text or bytes), on the disk; nobody else could ever read it, unless mode says so. Its
    path."""
    path = os.path.join(folder, name)
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    with open(os.open(utf8(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as out:
        out.write(data)
        out.flush()
        os.fchmod(out.fileno(), mode)
        os.fsync(out.fileno())
    return path


def names_of(words):
    """([host, ...], port) of --name: names and addresses, each with :PORT or without. 64 for what is none."""
    hosts, port = [], 50443
    for word in words:
        try:
            host, given = host_of(word)
        except ValueError:
            raise Stop(EX_USAGE,
                       _("--name %s: a host's name or address, with :PORT or without") % printable(word))
        hosts.append(host)
        port = given or port
    return hosts, port


def host_of(word):
    """(host as a certificate has it, port or None) of a name or an address. ValueError if it is neither."""
    import ipaddress
    if re.search(r"[\s%/?#@\\]", word):
        raise ValueError(word)
    found = urlsplit("//[%s]" % word if word.count(":") > 1 and word[0] != "[" else "//" + word)
    host, port = found.hostname or "", found.port
    try:
        return str(ipaddress.ip_address(host)), port
    except ValueError:
        host = host.encode("idna").decode()
    if not re.match(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?\Z", host):
        raise ValueError(word)
    return host, port


def names_in(path):
    """The hosts that a certificate is for, as names_of() has them. 78 if it is for none."""
    import ipaddress
    try:
        found = certificate_of(path).get("subjectAltName", ())
    except (OSError, AttributeError) as error:
        raise Stop(EX_CONFIG, "%s: %s" % (path, error))
    hosts = [str(ipaddress.ip_address(name.strip())) if kind == "IP Address" else name
             for kind, name in found if kind in ("DNS", "IP Address")]
    if not hosts:
        raise Stop(EX_CONFIG, _("%s: is a certificate for no host (subjectAltName)") % path)
    return hosts


def certify(work, name, ca, hosts, days):
    """Makes NAME.key and NAME.pem in the directory `work` by openssl (1.0.2 or newer): a certificate for
    these hosts by the CA at `ca` (a path without .key and .pem), or, with '', a CA named after them. 69 if
    openssl is not here or fails."""
    import subprocess
    now = time.time()
    begin, end = [time.strftime("%Y%m%d%H%M%SZ", time.gmtime(at)) for at in (now - AGO, now + days * 86400)]
    put_file(work, "openssl.cnf",
             OPENSSL_CONF
             % {"name": (hosts[0] if ca else "CA of " + hosts[0])[:64],
                "hosts": ", ".join("%s:%s"
                                   % ("IP" if ":" in host or host.rpartition(".")[2].isdigit() else "DNS",
                                      host) for host in hosts)})
    put_file(work, "index.txt", "")
    put_file(work, "serial", "%032x\n" % (int.from_bytes(os.urandom(16), "big") >> 1 or 1))
    key, pem = name + ".key", name + ".pem"
    by = ["-cert", ca + ".pem", "-keyfile", ca + ".key"] if ca else ["-selfsign", "-keyfile", key]
    for words in (["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key],
                  ["req", "-new", "-key", key, "-config", "openssl.cnf", "-out", "request"],
                  ["ca", "-batch", "-notext", "-config", "openssl.cnf", "-in", "request", "-out", pem,
                   "-extensions", "of_relay" if ca else "of_ca", "-startdate", begin, "-enddate", end] + by):
        try:
            done = subprocess.run(["openssl"] + words, cwd=utf8(work), stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            raise Stop(EX_UNAVAILABLE,
                       _("openssl: %s; it makes the certificate: install it") % error.strerror)
        if done.returncode:
            said = done.stdout.decode("utf-8", "replace").split("\n")
            raise Stop(EX_UNAVAILABLE, _("openssl %s: failed: %s") % (words[0], " ".join(said)[:500]))
    for left in set(os.listdir(utf8(work))) - {utf8(key), utf8(pem)}:
        if not os.path.isdir(os.path.join(utf8(work), left)):
            os.unlink(os.path.join(utf8(work), left))


def make_certificate(root, into, hosts):
    """relay.pem, the certificate and its key in one file, in the directory `into`, by the CA of root."""
    work = os.path.join(into, "work")
    os.mkdir(utf8(work))
    ca = os.path.join(root, "ca", "ca")
    certify(work, "relay", ca, hosts, min(CERTIFICATE_DAYS, days_left(ca + ".pem")))
    parts = []
    for name in ("relay.pem", "relay.key"):
        with open(utf8(os.path.join(work, name)), "rb") as text:
            parts.append(text.read())
    remove_tree(utf8(work))
    return put_file(into, "relay.pem", b"".join(parts))


def days_left(path):
    """For so many days (float) the certificate is good yet."""
    return (ssl.cert_time_to_seconds(certificate_of(path)["notAfter"]) - time.time()) / 86400


def renew_certificate(root, ini, names):
    """A new certificate with a new key in the place of the old one, by the same CA: the kits stay as they
    are. For other names, where --name says some."""
    server = check_conf(read_ini(ini, INI_KEYS), ini)["Server"]
    if server["certfile"] != server["keyfile"]:
        raise Stop(EX_USAGE, _("%s: its certfile was not made by init; renew it as it was made") % ini)
    hosts, ca = (names_of(names)[0] if names else names_in(server["certfile"]),
                 os.path.join(root, "ca", "ca.pem"))
    if days_left(ca) < 30:
        raise Stop(EX_CONFIG,
                   _("%s: the CA itself ends in %d days: make a new relay in a new directory, and new kits")
                   % (ca, days_left(ca)))
    with Aside(os.path.join(root, "kits")) as stage:
        made = make_certificate(root, stage, hosts)
        fault("certificate made")
        os.rename(utf8(made), utf8(server["certfile"]))
        sync_path(utf8(os.path.dirname(server["certfile"])))
    print(_("%s: a certificate for %s; a relay that runs takes it up by itself")
          % (server["certfile"], " ".join(hosts)))


def scripts_of_kits():
    """{name: bytes} of the scripts that go into kits. 66 if one is not beside this one."""
    found = {}
    for name in ("mi_system_remote.py", "mi_system_wf.py"):
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
        try:
            with open(utf8(path), "rb") as text:
                found[name] = text.read()
        except OSError as error:
            raise Stop(EX_NOINPUT,
                       _("%s: %s; put the scripts of the suite into one directory") % (path, error.strerror))
    return found


def with_site(text, conf, site, commands):
    """The text of an ini, with this site and these commands of it. conf: what the text says already."""
    for section, key, words in (("RemoteSites", "remote_site_ids", [site]), (site, "commands", commands)):
        found = conf.get(section, {})
        new = [word for word in words if word not in [*found.get(key, ()), *found.get("command_lines", ())]]
        if new:
            text = with_words(text, section, key, " ".join(dict.fromkeys(new)))
    return text


def with_words(text, section, key, words):
    """The text of an ini with more words in a blank separated key; section and key are made where they are
    missing."""
    head = re.search(r"^\[%s\].*(\n|\Z)" % re.escape(section), text, re.M)
    if not head:
        return "%s[%s]\n%s = %s\n" % (text if text.endswith("\n") else text + "\n", section, key, words)
    end = re.compile(r"^\[", re.M).search(text, head.end())
    found = re.compile(r"^%s[ \t]*[=:]" % re.escape(key), re.M | re.I).search(
        text, head.end(), end.start() if end else len(text))
    if found:
        return text[:found.end()] + " " + words + text[found.end():]
    return "%s%s%s = %s\n%s" % (text[:head.end()], "" if head.group(1) else "\n", key, words,
                                text[head.end():])


def check_text(stage, text):
    """78 for an ini of this text that makes no sense."""
    path = put_file(stage, "tried.ini", text)
    try:
        check_conf(read_ini(path, INI_KEYS), path)
    finally:
        os.unlink(utf8(path))


def kits_for(options, host, port):
    """The kits that init is asked for: of the site's poller, of the user's modules."""
    url = "https://%s:%d" % ("[%s]" % host if ":" in host else host, port)
    values = {"site": options.site, "user": options.user, "url": url,
              "commands": "".join(KIT_COMMAND % {"command": word} for word in options.commands or ["NAME"]
                                  if word != "hello")}
    return [Kit("%s.%s" % (options.site, options.user), "mi_system_remote.py", REMOTE, options.site,
                POLLER_KIT_INI % values, dict(values, texts=POLLER_KIT)),
            Kit("modules.%s" % options.user, "mi_system_wf.py", WORKFLOW, "", MODULE_KIT_INI % values,
                dict(values, texts=MODULE_KIT))]


def make_kits(folder, kits, store, scripts, ca):
    """The directories of these kits in folder: [(kit, until when its code is good, the sum that is to be
    told)]."""
    made, until = [], time.time() + CODE_HOURS * 3600
    with open(utf8(ca), "rb") as text:
        ca = text.read()
    for kit in kits:
        code, at = new_code(store.writer, kit, until), os.path.join(folder, kit.name)
        os.mkdir(utf8(at), 0o700)
        page = "\n".join(kit.text["texts"]) % dict(kit.text, kit=kit.name, until=day_and_hour(until))
        files = [(kit.script, scripts[kit.script], 0o755), (INI_NAME, kit.ini.encode("utf-8"), 0o600),
                 ("ca.pem", ca, 0o644), ("README.txt", page.encode("utf-8"), 0o644)]
        sums = ""
        for name, content, mode in files:
            put_file(at, name, content, mode)
            sums += "%s  %s\n" % (hashlib.sha256(content).hexdigest(), name)
        put_file(at, "SHA256SUMS", sums, 0o644)
        put_file(at, "token.code", code + "\n")
        made.append((kit, until, hashlib.sha256(sums.encode()).hexdigest()))
    return made


def new_code(db, kit, until):
    """A one-use code that redeem() exchanges for a token; only its sum is kept. Older ones of the same kit
    that nobody has used are void."""
    now, code = time.time(), base64.b32encode(os.urandom(15)).decode()
    whose = (kit.text["user"], kit.role, kit.sites)
    db.execute("UPDATE tokens SET revoked = ? WHERE user = ? AND roles = ? AND sites = ? AND login = ? AND"
               " revoked IS NULL", (now,) + whose + (CODE,))
    db.execute("INSERT INTO tokens (user, roles, sites, hash, issued, expires, login) VALUES (?, ?, ?, ?, ?,"
               " ?, ?)", whose + (hashlib.sha256(code.encode()).hexdigest(), now, until, CODE))
    return "-".join(re.findall("....", code))


def tell_made(options, root, ini, made, fresh):
    """What was made, and what to type next."""
    rows = [{"kit": os.path.join(root, "kits", kit.name), "role": kit.role, "sum": found, "until": until}
            for kit, until, found in made]
    if options.json:
        return print(json_of({"ini": ini, "kits": rows}))
    if fresh:
        print(_("the relay is in %s; start it:") % root)
        print("    python3 %s serve --ini %s\n" % (os.path.abspath(__file__), ini))
    for row in rows:
        if row["role"] == REMOTE:
            lines = [_("for the admin of %s: copy the kit there, and start it:") % options.site,
                     "scp -r %s HOST:" % row["kit"],
                     "python3 %s/mi_system_remote.py poll" % os.path.basename(row["kit"])]
        else:
            lines = [_("for the modules of %s, on this host or another one of the workflow system:")
                     % options.user, row["kit"],
                     "python3 %s/mi_system_wf.py run %s hello" % (row["kit"], options.site)]
        lines += [_("sum of its SHA256SUMS, for whoever receives it to compare: %s") % row["sum"],
                  _("its code is good once, until %s") % day_and_hour(row["until"])]
        print("\n    ".join(lines))


# ==== fielded ====
# The fielded protocol ("v1"): the same table, store and files, told in its own words; bodies pass as streams.
V1_CANNOT = ("the poller of site %s is a fielded one and is not shown this calculation: it cannot take"
             " directories in inputs' names, parameters, patterns or more than 2 GiB")
# calc_progress: the words that fielded programs know
V1_WORDS = ("not start", "sending params", "complete send", "running", "calc end", "getting return",
            "got return")
V1_IGNORES = "the poller of site %s is a fielded one: the command does not get the parameters"
# HTTP status of: no such id, (code) wrong state, a missing field
V1Call = collections.namedtuple("V1Call", "unknown wrong missing")
V1_REMOTE = {"calc-params": V1Call(400, 409, 400), "calc-params-complete": V1Call(200, 409, 200),
             "calc-start": V1Call(400, 400, 400), "calc-end": V1Call(400, 409, 400),
             "send-results": V1Call(200, 401, 200), "end-send": V1Call(400, 401, 400)}
V1_BODIES = ("add-calcinfo", "send-results")           # these carry files inside,
V1_ANSWERS = ("calc-params", "get-calc-result")        # and the answers to these


class FieldedPollers:
    """What is known of fielded pollers, which have no claims."""

    def __init__(self, relay):
        self.relay = relay
        self.announced = {}                            # {accept_id: (to whom it was named, until)}
        self.announcing = threading.Lock()
        self.twins = set()                  # held by one that asked for more: started again, or there are two
        self.told_abnormal = set()                     # whose workflow side has read that it ended abnormally
        self.v1_sites = set()                          # {(site, user)} whose last poller is a fielded one

    def announce(self, accept_id, peer, now):
        """Names a calculation to a fielded poller. False: it was named to another one a moment ago."""
        with self.announcing:
            if self.announced_to_other(accept_id, peer, now):
                return False
            self.announced[accept_id] = (peer, now + self.relay.conf["times"]["v1_announce"])
            return True

    def announced_to_other(self, accept_id, peer, now):
        """Was it named to another fielded poller within v1_announce?"""
        to, until = self.announced.get(accept_id, (peer, now))
        return to != peer and until > now

    def sweep_announced(self, now):
        """What was named to a fielded poller that did not come for it is there for the next; those of our own
        who wait are told."""
        for accept_id in [key for key, (peer, until) in list(self.announced.items()) if until <= now]:
            self.announced.pop(accept_id, None)
            for row in self.relay.store.read("SELECT site, user, bytes FROM calculations WHERE accept_id = ?"
                                             " AND state = ?", accept_id, ALLOWED):
                self.relay.front.fire(("site", row["site"], row["user"]), one=True, need=row["bytes"])


def v1_routes():
    """The calls that fielded programs make: {name: function}."""
    return {"add-calcinfo": v1_add_calcinfo, "allow-wait-calc": v1_allow, "cancel-wait-calc": v1_cancel,
            "calc-status": v1_status, "calc-progress": v1_status, "get-calc-result": v1_result,
            "calc-request": v1_calc_request, "calc-params": v1_calc_params,
            "calc-params-complete": v1_calc_params_complete, "calc-start": v1_calc_start,
            "calc-end": v1_calc_end, "send-results": v1_send_results, "end-send": v1_end_send,
            "get-calcinfo": v1_get_calcinfo, "reload-ini": reload_ini}


def v1_add_calcinfo(call):
    """1. A fielded registration, inputs inside. Refusals are HTTP 202: the gateway there swallows a 400."""
    with Arrival(call, v1_may_register, 202) as arrival:
        arrival.read(call)
        try:
            return v1_register(call, arrival)
        except ApiError as refusal:
            refusal.http = 202
            raise


def v1_register(call, arrival):
    """v1_add_calcinfo(), when the body has come."""
    relay, info = call.relay, v1_checked_info(call)
    site, command, parameters = info["remote-site"], info["command"], info.get("parameters") or ""
    try:
        names, patterns = check_declared(call, {"result_files": info.get("result_files") or {}})
        stage = v1_entries(info.get("parameter_files") or {},
                           lambda entry: entry[0] if isinstance(entry, list) and entry else None,
                           arrival.path)
        check_manifest_names([name for name, blob in stage], reserved=LOG_NAMES)
    except ValueError as error:
        raise ApiError(400, "a file's name: %s" % error)
    total = check_sizes(relay, [(name, blob.size, blob.sha256) for name, blob in stage])
    needs_v2 = any("/" in name for name, blob in stage) or total > V1_BYTES
    kept = info_to_keep(info, parameters, names, [])
    accept_id, now = str(uuid.uuid4()), time.time()
    arrival.place(relay.store.spool(accept_id, "input"), stage)

    def work(tx):
        check_quota(relay, tx, call.caller.user, site, relay.rules(site),
                    total + len(kept) + room_of_names(stage))
        seq = enter(tx, accept_id, call.caller.user, site, command, now)
        tx.db.execute("INSERT INTO calculations (seq, accept_id, user, request_id, site, command, info,"
                      " texts, needs_v2, v1, state, registered, touched) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?,"
                      " 1, ?, ?, ?)",
                      (seq, accept_id, call.caller.user, accept_id, site, command, kept, len(kept), needs_v2,
                       REGISTERED, now, now))
        insert_complete(tx, seq, "input", stage)
        tx.after(lambda: relay.quotas.count_registration(call.caller.user, 0))
        tx.after(lambda: relay.meter.moved(STEP["add-calcinfo"], "",
                                           {"site": site, "user": call.caller.user}, {}, now))
        tx.after(lambda: log("info", accept_id, "1 add-calcinfo", site=site, user=call.caller.user,
                             command=command, inputs=len(stage), v=1))

    try:
        relay.store.write(work, "add-calcinfo")
    except ApiError:
        remove_tree(relay.store.spool(accept_id, ""))
        raise
    warning = v1_warning(relay, site, call.caller.user, needs_v2, parameters)
    return dict({"message": "registered", "accept_id": accept_id},
                **({"warning": warning} if warning else {}))


def v1_checked_info(call):
    """The calc-info of a fielded registration, if this user may have it run. ApiError otherwise."""
    info = call.fields.get("calc-info")
    if not isinstance(info, dict) or "remote-site" not in info or not info.get("command"):
        raise ApiError(400, "calc-info, remote-site or command is missing")
    if has_blob([value for key, value in info.items() if key not in ("parameter_files", "result_files")]):
        raise ApiError(400, "calc-info: a text of more than %d bytes that is no file's content" % LONG_STRING)
    site, command = info["remote-site"], info["command"]
    check_site(call, site, "400", 202)
    rules = call.relay.rules(site)
    if command not in rules["commands"] + rules["command_lines"]:
        raise ApiError(401, "command %s is not in the list of site %s" % (printable(command)[:200], site))
    if rules["users"] and call.caller.user not in rules["users"]:
        raise ApiError(403, "user %s may not use site %s" % (call.caller.user, site))
    kinds = {"parameter_files": dict, "result_files": (dict, list), "parameters": str}
    if any(info.get(key) and not isinstance(info[key], kind) for key, kind in kinds.items()):
        raise ApiError(400, "parameter_files or result_files is not as it should be")
    return info


def v1_may_register(call, total):
    """ApiError, if this user can register nothing at all here now, or not so many bytes."""
    rules = [call.relay.rules(site)
             for site in call.relay.conf["RemoteSites"]["remote_site_ids"] if token_covers(call.caller, site)]
    call.relay.claims.check_maintenance()
    if not any(not rule["users"] or call.caller.user in rule["users"] for rule in rules):
        raise ApiError(403, "user %s may use no site of this relay" % call.caller.user)
    check_unfinished(call.relay, call.caller.user)
    check_bytes(call.relay, call.relay.store, call.caller.user, total)


class Arrival:
    """A directory of the spool for the files of one fielded body; moved to its place when the call is good,
    removed otherwise. Who may send it, and whether there is room for it, is looked at before a byte is taken;
    from then on its length counts."""

    def __init__(self, call, check, http):
        """check(c, bytes): raises the ApiError of who may not send it; http: the status of a refusal."""
        self.relay = call.relay
        self.user = call.caller.user
        self.length = call.length // 4 * 3
        folder = utf8(call.relay.store.folder)
        self.path = os.path.join(folder, b"spool", b"arriving", os.urandom(8).hex().encode())
        try:
            with call.relay.quotas.counting:
                check(call, self.length + call.relay.quotas.arriving[self.user])
                check_free(call.relay, self.length)
                call.relay.quotas.arriving[self.user] += self.length
        except ApiError as refusal:
            refusal.http = http
            raise
        try:
            make_folder(self.path, folder)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self.relay.quotas.counting:
            self.relay.quotas.arriving[self.user] -= self.length
            self.relay.quotas.arriving += collections.Counter()  # without who has nothing on its way any more
        remove_tree(self.path)

    def read(self, call):
        """Reads the call's body into its fields."""
        if call.unread:
            check_json_type(call)
            try:
                call.fields = dict(
                    call.query, **BodyReader(call.body_views(), self.path, parse_v1_json, MAX_JSON).parse())
            except ValueError as error:
                raise ApiError(400, str(error))

    def place(self, target, stage):
        """Moves the files of stage [(name, Blob)] to where they belong, on disk before this returns."""
        for name in set(os.listdir(self.path)) - {os.path.basename(blob.path) for name, blob in stage}:
            os.unlink(os.path.join(self.path, name))
        sync_path(self.path)
        remove_tree(target)
        above = os.path.dirname(target)
        make_folder(above, os.path.dirname(os.path.dirname(os.path.dirname(above))))
        os.rename(self.path, target)
        sync_path(above)


def v1_entries(files, content_of, folder):
    """Files {NAME: entry} of a fielded body as [(name, Blob)] in the order of a manifest, written as
    folder/NNNNNN. ApiError(400)."""
    try:
        names = sorted(files, key=nfc_parts)
        check_manifest_names(names)
        stage = [(name, as_blob(content_of(files[name]), os.path.join(folder, b"x%06d" % number)))
                 for number, name in enumerate(names)]
    except (ValueError, AttributeError) as error:
        raise ApiError(400, "a file: %s" % error)
    for number, (name, blob) in enumerate(stage):
        path = os.path.join(folder, b"%06d" % number)
        os.rename(blob.path, path)
        stage[number] = (name, blob._replace(path=path))
    return stage


def has_blob(found):
    """Is there a file in this, where only texts belong?"""
    if isinstance(found, dict):
        found = list(found.values())
    return isinstance(found, Blob) or type(found) is list and any(has_blob(part) for part in found)


def insert_complete(tx, seq, kind, stage, texts=0):
    """Adds files [(name, Blob)] that are in their place to a calculation, complete; texts: characters that
    are kept beside them."""
    tx.db.executemany(
        "INSERT INTO files (calc, kind, n, name, size, sha256, done, blob) VALUES (?, ?, ?, ?, ?, ?, 1, ?)",
        [(seq, kind, n, name, blob.size, blob.sha256, "%06d" % n) for n, (name, blob) in enumerate(stage)])
    field = COUNTED[kind]
    tx.db.execute("UPDATE calculations SET %s = ?, %s_open = 0, %s_more = 0, bytes = bytes + ?, texts ="
                  " texts + ? WHERE seq = ?" % (field, field, field),
                  (len(stage), sum(blob.size for name, blob in stage), texts + room_of_names(stage), seq))


def v1_warning(relay, site, user, needs_v2, parameters=""):
    """What it means for a calculation that waits that its site's last poller is a fielded one, or an empty
    text."""
    if (site, user) not in relay.fielded.v1_sites or not (needs_v2 or parameters):
        return ""
    return (V1_CANNOT if needs_v2 else V1_IGNORES) % site


def v1_allow(call):
    """2. Allowed to wait, once."""
    row = v1_own(call)
    if row is None:
        raise ApiError(
            400, "There is no information for accept_id(%s)" % printable(call.fields["accept_id"])[:100])
    if row["state"] != REGISTERED:
        raise ApiError(401, "accept_id(%s) is allowed already" % row["accept_id"], http=400)
    allow_wait_calc(call)
    return {"message": "allowed"}


def v1_status(call):
    """What a fielded workflow side asks every 10 s. Its client takes what is between the first two colons. It
    leaves at `got return`, and takes an abnormal end for success if it has not read `abnormal` before: so
    that is told first."""
    row, relay = v1_own(call), call.relay
    if row is None:
        word = "abnormal" if call.name == "calc-status" else "got return"
        raise ApiError(400,
                       "status:%s:There is no information for accept_id(%s)"
                       % (word, printable(call.fields["accept_id"])[:100]), http=200)
    if call.name == "calc-status":
        if row["status"] == "abnormal":
            relay.fielded.told_abnormal.add(row["accept_id"])
        return {"message": "status:%s" % row["status"]}
    word = v1_word(row["state"])
    if (row["state"] == GOT and row["status"] == "abnormal"
            and row["accept_id"] not in relay.fielded.told_abnormal):
        word = WORDS[GETTING]
    return {"message": "status:%s" % word}


def v1_word(state):
    """calc_progress for a fielded program: of a state that has no word of its, that of the one before."""
    states = list(WORDS)
    words = [WORDS[one] for one in states[:states.index(state) + 1]]
    return [word for word in words if word in V1_WORDS][-1]


def v1_result(call):
    """9. The result, files inside; hidden from the fielded protocol once the answer is written in full."""
    row = v1_own(call)
    if row is None or row["state"] != GOT:
        raise ApiError(400,
                       "There is no result for accept_id(%s) yet" % printable(call.fields["accept_id"])[:100],
                       http=200)
    more = call.relay.store.read("SELECT info, missing, refused FROM calculations WHERE seq = ?", row["seq"])[
        0]
    why = dict(json.loads(more["missing"]), **json.loads(more["refused"]))
    # a declared name that is not there at all kills it
    files = {name: {"content": "", "mimetype1": "Error",
                    "mimetype2": why.get(name) or row["reason"] or "it has not come"}
             for name in json.loads(more["info"])["result_names"] + list(LOG_NAMES)}

    def then():
        make_step(call, "finish", row, finished=time.time())

    return v1_stream(call, row, "result",
                     lambda mark: {"content": mark, "mimetype1": "application/octet-stream;",
                                   "mimetype2": "charset=binary"},
                     lambda found: envelope(200, "result",
                                            **{"result-info": {"result_files": dict(
        found, **{name: entry for name, entry in files.items() if name not in found})}}), then)


def v1_stream(call, row, kind, entry, wrap, then=None):
    """An answer with files inside, as a Spool: JSON around base64 that is made while it is sent, its length
    known beforehand."""
    store = call.relay.store
    rows = store.read("SELECT n, name, size, blob, at FROM files WHERE calc = ? AND kind = ? AND blob NOT"
                      " NULL ORDER BY n", row["seq"], kind)
    length, chunks = json_with_files(lambda mark: wrap({found["name"]: entry(mark) for found in rows}), [
        (store.spool(row["accept_id"], kind, found["blob"]), found["at"], found["size"]) for found in rows])
    return FileAnswer(chunks, length, [], 200, then, None, JSON_TYPE)


def v1_cancel(call):
    """A fielded workflow side leaves: with "delete": "force" from any state."""
    row, force = v1_own(call), call.fields.get("delete") == "force"
    if row is None:
        raise ApiError(
            400, "There is no information for accept_id(%s)" % printable(call.fields["accept_id"])[:100])
    over = row["state"] == GOT or row["status"] == "abnormal" and row["state"] in RETURNING
    if not force and row["state"] != ALLOWED and not over:
        raise ApiError(401, "accept_id(%s) cannot be cancelled now" % row["accept_id"], http=400)

    def work(tx):
        if (move(call.relay, tx, STEP["cancel-wait-calc"], row, status="abnormal", reason="cancelled",
                 got=time.time()) or row["state"] == GOT):
            move(call.relay, tx, STEP["finish"], row, finished=time.time())
        tx.db.execute("UPDATE calculations SET hidden = 1 WHERE seq = ?", (row["seq"],))
        now = tx.db.execute("SELECT state, protocol, user, poller, attempt FROM calculations WHERE seq = ?",
                            (row["seq"],)).fetchone()
        # its poller is told by the heartbeat
        if now["protocol"] == 2 and now["state"] in STOPPABLE:
            note_cancel(call, tx, row, now, "cancelled: by the workflow side")

    call.relay.store.write(work, "cancel-wait-calc")
    return {"message": "cancelled"}


def v1_calc_request(call):
    """3. Names the oldest allowed calculation; reserves nothing, but for v1_announce no other fielded poller
    is told the same."""
    relay, site, peer, now = call.relay, v1_id(call, "site_id"), v1_peer(call), time.monotonic()
    check_site(call, site, "400", 200)
    relay.fielded.v1_sites.add((site, call.caller.user))
    relay.pollers.hear(call, site, "fielded, from %s" % call.conn.address, 1)
    for row in relay.store.read("SELECT accept_id FROM calculations WHERE site = ? AND %s AND user = ? AND"
                                " claim = ?" % state_in(CLAIMED), site, call.caller.user, peer):
        # it asks for more while it holds one: it was started again, or there are two
        relay.fielded.twins.add(row["accept_id"])
    paused = relay.claims.maintenance is not None or relay.claims.in_grace()
    for row in relay.store.read("SELECT accept_id FROM calculations WHERE site = ? AND state = ? AND user ="
                                " ? AND NOT needs_v2 AND NOT hidden ORDER BY seq LIMIT 100", site, ALLOWED,
                                call.caller.user):
        if not paused and relay.fielded.announce(row["accept_id"], peer, now):
            return {"message": "found", "accept_id": row["accept_id"]}
    early = relay.store.read("SELECT 1 FROM calculations WHERE site = ? AND state = ? AND user = ? AND NOT"
                             " needs_v2 LIMIT 1", site, REGISTERED, call.caller.user)
    waits = relay.store.read("SELECT 1 FROM calculations WHERE site = ? AND state = ? AND user = ? LIMIT 1",
                             site, ALLOWED, call.caller.user)
    if early and not waits:
        raise ApiError("400", "accept_id is not allowed to wait yet, about the your site id(%s)" % site,
                       http=200)
    raise ApiError("0300", "There is no information for accept_id(None), about the your site id(%s)" % site,
                   http=200)


def v1_calc_params(call):
    """4. The calculation is this poller's from here on; its inputs come inside the answer."""
    row = v1_row(call)
    paused = (row["state"] == ALLOWED
              and (call.relay.claims.maintenance is not None or call.relay.claims.in_grace()))
    if paused or call.relay.fielded.announced_to_other(row["accept_id"], v1_peer(call), time.monotonic()):
        raise v1_wrong(call, row)
    v1_step(call, row, "calc-request", claim=v1_peer(call), attempt=row["attempt"] + 1, protocol=1,
            poller="v1 " + call.conn.address, claimed=time.time())
    kept = declared_of(call.relay.store, row)
    results = {name: {"content": "", "mimetype1": "", "mimetype2": ""}
               for name in kept["result_names"] + list(LOG_NAMES)}
    return v1_stream(call, row, "input", lambda mark: [mark, "application/octet-stream;", "charset=binary"],
                     lambda found: {"calc-info": dict(
        kept["extra"],
        **{"command": row["command"], "remote-site": row["site"], "parameters": kept["parameters"],
           "parameter_files": found, "result_files": results})})


def v1_calc_params_complete(call):
    """4. It has all inputs."""
    v1_step(call, v1_row(call), "calc-params-complete")
    return {"message": "complete"}


def v1_calc_start(call):
    """5. The command starts."""
    v1_step(call, v1_row(call), "calc-start", started=time.time())
    return {"message": "started"}


def v1_calc_end(call):
    """6. The command is over; a fielded poller tells no exit code but for 0: "calc end" is that."""
    row, word = v1_row(call), call.fields.get("result")
    if word not in ("calc end", "abnormal"):
        raise ApiError(401 if word is None else 402, "result is \"calc end\" or \"abnormal\"", http=400)
    good = word == "calc end"
    v1_step(call, row, "calc-end", status="completed" if good else "abnormal",
            reason="" if good else "the command failed", ended=time.time(), exit_code=0 if good else None)
    return {"message": "ended"}


def v1_send_results(call):
    """7. The results, files inside. Only declared names are kept."""
    with Arrival(call, v1_may_deliver, 200) as arrival:
        arrival.read(call)
        row, files = v1_row(call), call.fields.get("result_files")
        if not isinstance(files, dict):
            raise ApiError(401, "result_files is missing", http=200)
        if row["protocol"] == 2 or row["state"] not in RETURNING + (GOT,):
            raise v1_wrong(call, row)
        if row["state"] != ENDED:
            return v1_sent_again(call, row)
        kept = declared_of(call.relay.store, row)
        wanted, there, missing = declared_matcher(kept["result_names"], []), {}, {}
        for name, entry in files.items():
            if not isinstance(entry, dict):
                raise ApiError(401, "an entry of result_files is not an object", http=200)
            if not wanted(name):
                log("warn", row["accept_id"], "7 send-results", undeclared=name)
            elif entry.get("mimetype1") == "Error":
                missing[name] = printable(entry["mimetype2"] if isinstance(entry.get("mimetype2"), str)
                                          else "")[:1000]
            else:
                there[name] = entry
        missing = json.dumps(missing, ensure_ascii=False)
        try:
            stage = v1_entries(there, lambda entry: entry.get("content"), arrival.path)
            check_sizes(call.relay, [(name, blob.size, blob.sha256) for name, blob in stage])
        except ApiError as refusal:
            refusal.http = 200
            raise
        with call.relay.placing:                          # two requests at once must not mix their files
            row = v1_row(call)
            if row["state"] != ENDED:
                return v1_sent_again(call, row)
            arrival.place(call.relay.store.spool(row["accept_id"], "result"), stage)
            v1_step(call, row, "send-results",
                    lambda tx: insert_complete(tx, row["seq"], "result", stage, len(missing)),
                    missing=missing)
    return {"message": "getting"}


def v1_may_deliver(call, total):
    """ApiError, if this user has no calculation whose results a fielded poller may bring now."""
    if (call.unread
        and not any(token_covers(call.caller, row["site"])
                    for row in call.relay.store.read("SELECT DISTINCT site FROM calculations WHERE user = ?"
                                                     " AND protocol = 1 AND "
                                                     + state_in(RETURNING + (GOT,)), call.caller.user))):
        raise ApiError("0300", "There is no information for accept_id(None), about the your site id(None)")


def v1_sent_again(call, row):
    """The answer to send-results when there are results already."""
    if (row["status"] == "abnormal"
            or row["state"] == GETTING and row["claim"] == v1_peer(call)
            and row["accept_id"] not in call.relay.fielded.twins):
        return {"message": "getting"}
    raise v1_wrong(call, row)


def v1_end_send(call):
    """8. All is sent, says the poller, also when its upload failed: a success without results becomes
    abnormal."""
    with call.relay.placing:
        return v1_end(call, v1_row(call), call.fields.get("result"))


def v1_end(call, row, word):
    """v1_end_send(), while no results are being put in their place."""
    if word != "end send":
        raise ApiError(401 if word is None else 402, "result is \"end send\"", http=400)
    if row["state"] == GOT and row["status"] == "abnormal":
        return {"message": "got"}
    changes = {"got": time.time()}
    extra = None
    name = "end-send" if row["state"] != ENDED else "end-send unsent"
    if row["state"] in RETURNING:
        if (row["status"] == "completed"
                and (row["state"] == ENDED or lacks_all_results(call.relay.store, row))):
            changes.update(status="abnormal", reason="none of the results has arrived")
        if row["state"] == ENDED:
            extra = call.relay.claims.leave_log(row, changes.get("reason") or "the results have not arrived")
    v1_step(call, row, name, extra, **changes)
    return {"message": "got"}


def v1_get_calcinfo(call):
    """The whole table, as a fielded relay shows it, for an operator: files by their sizes."""
    rows = call.relay.store.read("SELECT %s, registered, info FROM calculations WHERE state != ? AND NOT"
                                 " hidden ORDER BY seq LIMIT 10000" % BRIEF, FINISHED)
    found = {}
    for row in rows:
        if not token_covers(call.caller, row["site"]):
            continue
        kept = json.loads(row["info"])
        found[row["accept_id"]] = {
            "accept_time": local_time(row["registered"]), "calc_progress": v1_word(row["state"]),
            "calc_status": row["status"], "wait_allow": local_time(row["allowed"]) or "none",
            "calc-info": dict(kept["extra"],
                              **{"command": row["command"], "remote-site": row["site"],
                                 "parameters": kept["parameters"], "result_files": kept["result_names"]})}
    return PlainAnswer(found)


def v1_own(call):
    """The calculation of a fielded workflow side's call, or None: unknown, another user's, fetched already,
    or cancelled."""
    accept_id = v1_id(call, "accept_id")
    found = call.relay.store.read("SELECT %s FROM calculations WHERE accept_id = ? AND user = ? AND state !="
                                  " ? AND NOT hidden" % BRIEF, accept_id, call.caller.user, FINISHED)
    return found[0] if found and token_covers(call.caller, found[0]["site"]) else None


def v1_id(call, key, missing=400):
    """An id of a fielded call: a text that is not empty, or None for JSON's null, which no calculation and no
    site has. 400 where it is missing."""
    found = call.fields.get(key, "")
    if found is not None and not (found and isinstance(found, str)):
        raise ApiError(400, "%s is missing" % key, http=missing)
    return found


def v1_peer(call):
    """What makes a fielded poller the same one: token, site and address. It stands in the place of a
    claim."""
    return "v1:%s:%s" % (call.caller.key, call.conn.address)


def v1_row(call):
    """The calculation of a fielded poller's call. "0300": no such one for this user and site; "400": not
    allowed yet."""
    rules = V1_REMOTE[call.name]
    accept_id, site = v1_id(call, "accept_id", rules.missing), v1_id(call, "site_id", rules.missing)
    if site not in call.relay.conf["RemoteSites"]["remote_site_ids"]:
        raise unknown_site(site, "400", rules.unknown)
    found = call.relay.store.read("SELECT %s FROM calculations WHERE accept_id = ? AND user = ? AND site = ?"
                                  " AND state != ? AND NOT hidden" % BRIEF, accept_id, call.caller.user, site,
                                  FINISHED)
    if not found or not token_covers(call.caller, site) or found[0]["needs_v2"] and found[0]["protocol"] != 1:
        raise ApiError("0300", "There is no information for accept_id(%s), about the your site id(%s)" % (
            printable(accept_id)[:100], printable(site)[:100]), http=rules.unknown)
    if found[0]["state"] == REGISTERED:
        raise ApiError("400", "accept_id(%s) is not allowed to wait yet" % accept_id, http=rules.unknown)
    return found[0]


def v1_wrong(call, row):
    """The answer in a wrong state: HTTP 200, and a code that makes a fielded poller give the calculation up
    in order."""
    return ApiError(V1_REMOTE[call.name].wrong,
                    "%s is not possible in state %s" % (call.name, v1_word(row["state"])), http=200)


def v1_step(call, row, name, extra=None, **changes):
    """Makes a fielded poller's step. The same peer's repeat, before its next step, is answered as the first
    time. extra(tx): what belongs to the step."""
    peer, step = v1_peer(call), STEP[name]

    def work(tx):
        if row["protocol"] != 2 and move(call.relay, tx, step, row, **changes):
            if extra is not None:
                extra(tx)
            return
        now = tx.db.execute("SELECT state, claim FROM calculations WHERE seq = ?", (row["seq"],)).fetchone()
        if (now is None or now["state"] != step.to or now["claim"] != peer
                or row["accept_id"] in call.relay.fielded.twins):
            raise v1_wrong(call, row)

    call.relay.store.write(work, name)
    call.relay.claims.renew(
        row, call.relay.conf["times"]["lost_after" if step.to not in BEFORE_START else "v1_lost_after"])


def parse_v1_json(data):
    """A fielded body. A list holds none of the fields that are looked for, and is answered so."""
    found = parse_json(data, (dict, list))
    return found if isinstance(found, dict) else {}


def check_json_type(call):
    """400 for a fielded body whose Content-Type says that it is something else than JSON."""
    kind = call.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if call.length and kind != "application/json" and not re.match(r"application/[^/]*\+json\Z", kind):
        raise ApiError(400, "Content-Type is not application/json")


# ==== demo ====
# The demonstration: everything real, in one directory, on loopback.
DEMO_SECRET = """{"comment": "in-house S-N curve, not to leave this computer",
 "cycles_and_amplitude_MPa": [[1e4, 612.5], [1e5, 487.3], [1e6, 391.8], [1e7, 341.6]]}
"""
DEMO_COMMAND = '''#!/usr/bin/env python3
"""Fatigue life (linear damage sum, Goodman's mean stress correction): inputs, and a table of this host."""
import csv
import json
import math
import os

here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "secret_sn_curve.json")) as table:
    curve = json.load(table)["cycles_and_amplitude_MPa"]
with open("steel.json") as text:
    strength = json.load(text)["tensile_strength_MPa"]


def cycles(amplitude):
    """Cycles to failure at an amplitude in MPa: log-log between the table's points; below them, for ever."""
    if amplitude <= curve[-1][1]:
        return math.inf
    for (n1, s1), (n2, s2) in zip(curve, curve[1:]):
        if amplitude >= s2:
            break
    return 10 ** (math.log10(n1) + math.log10(amplitude / s1) * math.log10(n2 / n1) / math.log10(s2 / s1))


damage = 0.0
with open("loads.csv", newline="") as text:
    for row in csv.DictReader(text):
        amplitude = float(row["amplitude_MPa"]) / (1 - float(row["mean_MPa"]) / strength)
        share = float(row["cycles"]) / cycles(amplitude)
        print("amplitude %s MPa, mean %s MPa: damage %.3g" % (row["amplitude_MPa"], row["mean_MPa"], share))
        damage += share
with open("life.json", "w") as out:
    json.dump({"damage_per_spectrum": round(damage, 6), "life_in_spectra": round(1 / damage, 1)}, out)
'''
DEMO_INPUTS = {
    "steel.json": '{"yield_strength_MPa": 785, '
                  '"tensile_strength_MPa": 930, "reduction_of_area_percent": 58}\n',
    "loads.csv": "amplitude_MPa,mean_MPa,cycles\n280,150,20000\n340,120,1500\n420,80,90\n"}


def cmd_demo(options):
    """A whole calculation on this machine. 66 if the other two scripts are not beside this one."""
    import shutil
    import tempfile
    here = os.path.dirname(os.path.abspath(__file__))
    scripts = [os.path.join(here, name)
               for name in ("mi_dicomapi.py", "mi_system_remote.py", "mi_system_wf.py")]
    for path in scripts[1:]:
        if not os.path.exists(utf8(path)):
            raise Stop(EX_NOINPUT,
                       _("demo: %s is not there; put the scripts of the suite into one directory") % path)
    os.umask(0o077)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder, parts = tempfile.mkdtemp(prefix="mi_demo."), []
    try:
        code = run_demo(folder, scripts, parts)
    finally:
        for part in reversed(parts):
            part.end()
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print()
    print(_("kept: %s") % folder if options.keep
          else _("all processes are ended, and %s is removed: nothing is left behind") % folder)
    return code


def run_demo(folder, scripts, parts):
    """The demonstration in its directory; the exit code."""
    import subprocess
    relay, external, workflow = [os.path.join(folder, name) for name in ("relay", "external", "workflow")]
    for path in (relay, external, workflow):
        os.mkdir(path)
    print(_("relay, external computer and workflow side on this machine, in %s") % folder)
    cert, pair = demo_certificate(relay)
    print(_("TLS with a throw-away certificate") if cert
          else _("no openssl here: plain http on loopback, for this demonstration only"))
    ini = put_file(relay, "relay.ini",
                          "[Server]\nportnumber = 0\nstate_dir = %s\ncertfile = %s\nkeyfile ="
                          " %s\n[RemoteSites]\nremote_site_ids = u-demo\n[u-demo]\ncommands = fatigue_life\n"
                          % (os.path.join(relay, "state"), pair, pair))
    parts.append(DemoPart("relay", [scripts[0], "serve", "--ini", ini], relay))
    url = parts[0].heard(r"listening url=(\S+)").group(1)
    tokens = {}
    for who, roles in (("workflow", WORKFLOW), ("external", REMOTE)):
        done = subprocess.run([sys.executable, "-I", scripts[0], "token", "issue", "researcher", "--roles",
                               roles, "--ini", ini], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        tokens[who] = put_file(os.path.join(folder, who), "token", done.stdout.decode())
    poller_ini, base = demo_external(external, url, tokens["external"], cert)
    parts.append(DemoPart("poller", [scripts[1], "poll", "--ini", poller_ini], external))
    asking = put_file(workflow, "workflow.ini",
                             "[workflow]\nurl = %s\ntoken_file = %s\nca_file = %s\n"
                             % (url, tokens["workflow"], cert))
    words = ["run", "u-demo", "fatigue_life", "-v", "--ini", asking, "--out", "life.json"]
    for name, text in DEMO_INPUTS.items():
        words += ["--in", os.path.basename(put_file(workflow, name, text))]
    print(_("the workflow side sends %s and asks for life.json; the nine steps, as each side tells them:")
          % " ".join(DEMO_INPUTS), flush=True)
    parts.append(DemoPart("workflow", [scripts[2]] + words, workflow))
    code, accept_id, result = demo_result(parts, workflow)
    print()
    print(_("result:           %s") % json.dumps(result))
    print(_("workflow side:    %s (the result, and both logs)") % workflow)
    print(_("external computer: %s (working directory; the secret beside it)")
          % os.path.join(base, accept_id))
    print(_("relay:            %s (state.sqlite3, and the spool)") % os.path.join(relay, "state"))
    words = [word.encode() for word in re.findall(r"\d+\.\d+", DEMO_SECRET)] + [b"secret_sn_curve"]
    count, total, found = demo_search([relay, workflow], words)
    if found:
        raise Stop(EX_BUG,
                   _("demo: the secret left the external computer: %s") % found[0].decode("utf-8", "replace"))
    print(_("the secret table was looked for in all %d files (%d bytes) of relay and workflow side: not"
            " there") % (count, total))
    return code


def demo_external(external, url, token_file, cert):
    """The external computer of the demonstration: its secret, its command, its poller's ini; (ini,
    calc_base)."""
    secret = put_file(external, "secret_sn_curve.json", DEMO_SECRET)
    command = put_file(external, "fatigue_life.py", DEMO_COMMAND)
    allowed = ("[poller]\nsite = u-demo\nurl = %s\ntoken_file = %s\nca_file = %s\ncalc_base = %s\n"
               "[command fatigue_life]\nmatch = fatigue_life\nargv = %s\n    %s\nenv.LD_LIBRARY_PATH = %s\n")
    base = os.path.join(external, "calculations")
    # a Python may need it
    poller_ini = put_file(external, "poller.ini",
                                 allowed
                                 % (url, token_file, cert, base, sys.executable, command,
                                    os.environ.get("LD_LIBRARY_PATH", "")))
    print(_("the external computer allows one command (%s) and holds one secret table (%s)")
          % (command, secret))
    return poller_ini, base


def demo_result(parts, workflow):
    """(exit code, accept_id, result) once the workflow side has ended. 65 if there is none."""
    import subprocess
    code = 0
    try:
        code = parts[-1].process.wait(120)
        parts[-1].thread.join(5)
        accept_id = parts[0].heard(r"INFO (\S+) 1 add-calcinfo", 5).group(1)
        parts[0].heard(r"INFO \S+ 9 finish", 5)
        with open(os.path.join(workflow, "life.json")) as text:
            result = json.load(text)
    except (Stop, OSError, ValueError, subprocess.TimeoutExpired):
        said = []
        if os.path.exists(utf8(os.path.join(workflow, LOG_NAMES[1]))):
            with open(utf8(os.path.join(workflow, LOG_NAMES[1])), encoding="utf-8", errors="replace") as text:
                said = text.read().splitlines()
        raise Stop(code or EX_DATA,
                   _("demo: no result came back: %s; the command's last line: %s (demo --keep keeps the"
                     " files)") % ((parts[-1].lines or ["-"])[-1], (said or ["-"])[-1]))
    return code, accept_id, result


class DemoPart:
    """One of the three programs of the demonstration: its steps are shown, with who says them, as they come;
    every line is kept. The user's proxy, token and state directory are no matter of theirs."""

    def __init__(self, name, words, folder):
        import subprocess
        self.name = name
        self.lines = []
        env = {key: text
               for key, text in os.environ.items()
               if not key.lower().endswith("_proxy") and key != "MI_DISTCOMP_TOKEN"}
        self.process = subprocess.Popen([sys.executable, "-I"] + words, cwd=folder,
                                        env=dict(env, XDG_STATE_HOME=folder), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.thread = threading.Thread(target=self.show, daemon=True)
        self.thread.start()

    def show(self):
        """Passes the steps on, without time, level and accept_id."""
        for line in self.process.stdout:
            line = line.decode("utf-8", "replace").rstrip()
            self.lines.append(line)
            found = re.match(r"(?:\S*T\S+|<\d>) (DEBUG|INFO|WARN|ERROR) (\S+) (.*)\Z", line)
            text = found.group(3) if found else line
            if re.match(r"\d \S", text) or found and found.group(1) == "ERROR":
                print("%-9s| %s" % (self.name, printable(text)[:150]), flush=True)

    def heard(self, pattern, seconds=20):
        """Waits for a line; what it matched. 69 if it does not come."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in list(self.lines):
                found = re.search(pattern, line)
                if found:
                    return found
            if self.process.poll() is not None and not self.thread.is_alive():
                break
            time.sleep(0.02)
        raise Stop(EX_UNAVAILABLE,
                   _("demo: the %s did not get there; its last line: %s")
                   % (self.name, (self.lines or ["-"])[-1]))

    def end(self):
        """SIGTERM, and waits."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(15)
        self.thread.join(5)


def demo_certificate(folder):
    """A throw-away CA, and a certificate for 127.0.0.1: (the CA's file, the file with certificate and key),
    or two empty texts without openssl."""
    os.mkdir(os.path.join(folder, "ca"))
    try:
        certify(os.path.join(folder, "ca"), "ca", "", ["127.0.0.1"], 2)
        return os.path.join(folder, "ca", "ca.pem"), make_certificate(folder, folder, ["127.0.0.1"])
    except Stop:
        return "", ""


def demo_search(folders, words):
    """Looks for each of words (bytes) in every file below the folders: (files, bytes read, files with one of
    them)."""
    count, total, found = 0, 0, []
    for folder in folders:
        for above, names, files in os.walk(utf8(folder)):
            for name in files:
                path = os.path.join(above, name)
                if os.path.isfile(path):
                    with open(path, "rb") as text:
                        data = text.read()
                    count, total = count + 1, total + len(data)
                    found += [path for word in words if word in data]
    return count, total, found


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
    "--name": dict(nargs="+", default=[], metavar="HOST[:PORT]",
                   help="what others call the relay's host: names, addresses; the first stands in the kits"),
    "--command": dict(nargs="+", default=[], dest="commands", metavar="NAME",
                      help="words that workflows may ask of the site, beside hello"),
    "--dir": dict(default="mi_relay", metavar="DIR", help="where it is made (default: mi_relay, here)"),
    "--renew": dict(action="store_true", help="only a new certificate, by the CA that is there"),
    "--keep": dict(action="store_true", help="leave what it has made"),
    "--roles": dict(default="workflow,remote", metavar="R,R",
                    help="some of workflow, remote, operator, viewer, metrics"),
    "--sites": dict(default="", metavar="S,S", help="for these external computers only"),
    "--days": dict(type=float, metavar="N", help="good for so long (default: token_days of the ini)"),
    "--upgrade": dict(action="store_true", help="only at what an older version has left"),
    "--watch": dict(action="store_true", help="again and again, in place on a terminal, until Ctrl+C"),
    "--all": dict(action="store_true", help="all that are kept, finished ones too"),
    "--since": dict(default="", metavar="TIME", help="12h, 7d, or a date like 2026-11-20"),
    "--site": dict(default="", metavar="SITE", help="the external computer"),
    "--user": dict(default="", metavar="USER", help="the user whose calculations they are"),
    "--csv": dict(action="store_true", help="for a spreadsheet"),
    "--test": dict(action="store_true", help="tries the way to the relay, and the hook, once"),
    "--reason": dict(default="", metavar="TEXT", help="why, for who looks later"),
    "--force": dict(action="store_true", help="also what is out of contact; its late result is refused")}
SUBCOMMANDS = {
    "init": (cmd_init, "",
             "Makes all that a relay needs in a new directory: ini, CA, certificate, state; and kits: for "
             "the external computer, for the modules. Later: kits for another site or user. Nothing is "
             "overwritten.",
             "init --name relay.example.org --site u-tokyo --user suzuki --command fatigue_life",
             "--name --site --user --command --dir --renew"),
    "serve": (cmd_serve, "",
              "Serves as the ini says, until SIGTERM or Ctrl+C. SIGHUP: opens the log anew, reads the ini "
              "again.",
              "serve --ini /etc/mi_distributed_computing_assist.ini", ""),
    "demo": (cmd_demo, "",
             "A whole calculation on this machine, over TLS: relay, poller, workflow side, a secret that "
             "stays.",
             "demo", "--keep"),
    "token issue": (cmd_token_issue, "USER",
                    "Issues a token for this user. It is shown once.",
                    "token issue suzuki --roles remote --sites u-tokyo", "--roles --sites --days"),
    "token list": (cmd_token_list, "",
                   "The tokens: whose, for what, until when, when last used.",
                   "token list --json", ""),
    "token revoke": (cmd_token_revoke, "NUMBER",
                     "Makes a token void at once; NUMBER is that of `token list`.",
                     "token revoke 3", ""),
    "user add": (cmd_user, "USER",
                 "Lets a user log in with a password (auth = login), which is asked for without echo.",
                 "user add suzuki --roles workflow", "--roles --sites"),
    "user passwd": (cmd_user, "USER",
                    "Gives a user a new password; what was logged in with the old one ends.",
                    "user passwd suzuki", ""),
    "user remove": (cmd_user, "USER",
                    "Takes a user away, with all tokens.",
                    "user remove suzuki", ""),
    "user list": (cmd_user_list, "",
                  "Who may log in with a password.",
                  "user list", ""),
    "check": (cmd_check, "",
              "Looks at ini, files, certificate, disk, limits, tokens, and at the running relay: OK, WARN "
              "or FAIL, and what to do.",
              "check", "--upgrade"),
    "bundle": (cmd_bundle, "FILE",
               "Packs what support needs into FILE (tar.gz): versions, check, the ini without secrets, the"
               " end of the log, the calculations. A secret that this host knows keeps it from being"
               " written.",
               "bundle support.tar.gz", ""),
    "unit": (cmd_unit, "",
             "Prints a systemd unit for `serve` with this ini.",
             "unit >mi_dicomapi.service", ""),
    "list": (cmd_list, "",
             "The calculations that are not finished (explain: why one waits).",
             "list --all", "--all --watch"),
    "sites": (cmd_sites, "",
              "The sites with their pollers: whether each takes work or why not, when it was heard, what "
              "waits for it.",
              "sites --watch", "--watch"),
    "notify": (cmd_notify, "",
               "Waits at the relay for what somebody should know, and tells it by the hook of [notify]; "
               "--test: is all well, and does the hook take a message?",
               "notify --test", "--test"),
    "metrics": (cmd_metrics, "",
                "The running relay's figures, for node_exporter's textfile collector (Prometheus asks GET "
                "/metrics).",
                "metrics >mi_relay.prom", ""),
    "explain": (cmd_explain, "ACCEPT_ID",
                "Why one calculation is where it is: a sentence, who has to act, what to type, since when, "
                "what would change it.",
                "explain d6d9c05a", ""),
    "history": (cmd_history, "",
                "When each step of each attempt was made, also of calculations that are removed by now.",
                "history --since 7d --site u-tokyo --csv", "--since --site --user --csv"),
    "witness": (cmd_witness, "SITE",
                "What this relay has seen of the audit logs at a site: the site's security officer compares"
                " it there (mi_system_remote.py audit verify --witness FILE).",
                "witness u-tokyo >heads.txt", ""),
    "show": (cmd_show, "ACCEPT_ID",
             "Everything about one calculation. Of the id the first eight characters do.",
             "show d6d9c05a", ""),
    "cancel": (cmd_change, "ACCEPT_ID",
               "Ends a calculation; what its command has written so far comes back.",
               "cancel d6d9c05a --reason 'wrong input'", "--reason"),
    "end": (cmd_change, "ACCEPT_ID",
            "Ends what is claimed and whose external computer will not come back.",
            "end d6d9c05a --reason 'its host is gone'", "--reason"),
    "rerun": (cmd_change, "ACCEPT_ID",
              "Lets what ended abnormally run once more, before its result was fetched.",
              "rerun d6d9c05a", "--force --reason"),
    "maintenance on": (cmd_maintenance, "",
                       "No new calculations and claims; what runs is brought to its end.",
                       "maintenance on --reason upgrade", "--reason"),
    "maintenance off": (cmd_maintenance, "",
                        "New calculations and claims again.",
                        "maintenance off", ""),
    "page-link": (cmd_page_link, "[USER]",
                  "Prints a link that opens the page in a browser, once, within a minute: as this user, for "
                  "12 hours (login_hours).",
                  "page-link --roles operator", "--roles --sites"),
    "backup": (cmd_backup, "DIR",
               "Copies the whole state into a new directory, while the relay runs.",
               "backup /var/backups/mi_distcomp/today", ""),
    "restore": (cmd_restore, "DIR",
                "Makes a new state_dir of a backup. At its next start the relay asks the pollers what they "
                "hold.",
                "restore /var/backups/mi_distcomp/today", "")}
INI_KEYS = {                   # {section: {key: (kind, default, meaning)}}: what the shipped ini says of it
    "Server": {
        "ipaddress": (str, "127.0.0.1",
                      "beyond this host: certfile and keyfile, or auth = gateway with trusted_proxies"),
        "portnumber": (int, 50443, "https, or http behind a gateway"),
        "loglevel": (level, "info",
                     "debug, info, warn, error; or a number, 0 critical to 4 debug, as in fielded inis"),
        "state_dir": (one_place, "/var/lib/mi_distcomp", "an absolute path, or ~/..."),
        "certfile": (str, "", "PEM file with the certificate and its chain: TLS"),
        "keyfile": (str, "", "PEM file of its key, mode 0600"),
        "client_ca": (str, "", "clients must show a certificate of this CA"),
        "auth": (one_of("tokens", "gateway", "login"), "tokens",
                 "tokens: of `token issue`; login: also for passwords, of `user add`; gateway: one in"
                 " front has checked them"),
        "trusted_proxies": (str.split, [],
                            "the gateway's addresses; with auth = gateway nobody else is let in"),
        "gateway_user_header": (str, "",
                                "the header in which the gateway names the user; without it tokens are"
                                " compared with one another"),
        "gateway_secret_file": (str, "",
                                "mode 0600, one line, `Header-Name: secret`: what the gateway adds to each"
                                " request; without it, and without client_ca for the gateway's"
                                " certificate, any process on its host can be any user"),
        "operators": (str.split, [],
                      "with auth = gateway: the users who may also ask for get-calcinfo and reload-ini"),
        "plain_http": (flag, False, "yes: beyond this host without TLS, for a closed laboratory"),
        "logfile": (str, "", "default: standard error"),
        "page": (flag, True, "no: there is no page for browsers"),
        "lang": (one_of("auto", "en", "ja"), "auto", "en, ja")},
    "limits": {
        "max_body": (size, 16 << 20, "of one request with files"),
        "v1_max_body": (size, 2 << 30, "of a fielded one, which holds whole files"),
        "max_file": (size, 0, "0: no limit but disk and quota"),
        "max_files": (int, 200000, "of one calculation, inputs or results"),
        "calculations_per_user": (int, 10000, "unfinished ones"),
        "bytes_per_user": (size, 0,
                           "of files, their names, calc-infos, reasons, live output; fielded bodies from"
                           " when they begin to come"),
        "spool_free": (share, 0.05, "of bytes, and of inodes"),
        "connections": (int, 12000, "open at once"),
        "unauthenticated_per_address": (int, 64, "connections that have shown no token yet"),
        "parked_per_token": (int, 200, "calls that wait for news"),
        "lanes_per_token": (int, 16, "connections at once for the large files of its transfers; 1: one each"),
        "workers": (int, 32, "threads that run the calls"),
        "handshake": (seconds, 10.0, "for TLS"),
        "headers": (seconds, 10.0, "for a request's head"),
        "idle": (seconds, 75.0, "for the next request on a connection"),
        "min_rate": (size, 1024,
                     "bytes/s that a body, or an answer with files, keeps over each 15 s; or the"
                     " connection is dropped")},
    "times": {
        "wait": (seconds, 50.0, "of one call, at most"),
        "lease": (seconds, 300.0, "so long need the holder of a calculation not be heard"),
        "accept_lease": (seconds, 20.0, "from claiming to its first sign"),
        "v1_announce": (seconds, 12.0, "so long a calculation is named to one fielded poller only"),
        "v1_lost_after": (seconds, 3600.0, "a fielded poller that took the inputs has to start by then"),
        "lost_after": (seconds, 30 * 86400.0, "out of contact for so long: abnormal"),
        "register_for": (seconds, 1800.0, "nothing of its inputs came for so long: removed"),
        "keep_results": (seconds, 30 * 86400.0, "that nobody fetches"),
        "keep_history": (seconds, 180 * 86400.0, "when each step was made, and which pollers there were"),
        "keep_fetched": (seconds, 86400.0, "its files less long where the disk has no room for what is new"),
        "restore_grace": (seconds, 600.0, "after a restore nothing is handed out for so long"),
        "token_days": (int, 365, "a new token is good for so many days"),
        "login_hours": (int, 12, "a token from `login` is good so long")},
    "notify": {
        "url": (str, "", "of the relay, like https://HOST:50443"),
        "token_file": (str, "", "mode 0600, one line, of a token --roles viewer"),
        "ca_file": (str, "", "CA of the relay's certificate, unless it is a public one"),
        "hook": (lines, [], "program and words, one a line; gets each message as JSON on its standard input"),
        "time_limit": (seconds, 30.0, "of the hook; then TERM, then KILL"),
        "grace": (seconds, 900.0, "what comes and goes within it is not told"),
        "waits": (seconds, 3600.0, "researchers are told of what has waited for so long"),
        "cap": (int, 20, "messages a day to one recipient; what is beyond comes together later"),
        "researchers": (str.split, [], "users who want to be told of what has ended, or waits"),
        "state_dir": (str, "", "default: ~/.local/state/mi_distcomp_notify, or systemd's")},
    "RemoteSites": {
        "remote_site_ids": (site_ids, (), "")},
    "*": {
        "commands": (str.split, [], "the words that a workflow may ask for, blank separated"),
        "command_lines": (lines, [], "the same, one a line: may hold blanks"),
        "users": (str.split, [], "empty: any"),
        "max_waiting": (int, 1000, "calculations at once; more are told to come again")}}

ROUTES = {key: found for key, found in routes().items() if key[0]}
OPERATOR_CALLS = {found.word: found for found in routes().values() if found.word}
V1 = v1_routes()


# ==== texts of units ====
UNIT = """# %(where)s   (systemd; read it, change what is not so at your site, then: systemctl enable --now %(name)s)
[Unit]
Description=Relay of distributed calculations (%(script)s)
After=network-online.target
Wants=network-online.target

[Service]
# A system user of its own: useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin %(user)s
User=%(user)s
ExecStart=%(python)s -I -S %(script)s serve --ini %(ini)s
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=2
RestartPreventExitStatus=64 78
TimeoutStopSec=30
LimitNOFILE=%(files)d
LimitCORE=0
UMask=0077
%(writes)s
# It reads its ini, certificate and key, writes its state, listens. Everything else is shut.
ProtectSystem=strict
ProtectHome=%(home)s
PrivateDevices=yes
PrivateUsers=%(users)s
PrivateMounts=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
NoNewPrivileges=yes
CapabilityBoundingSet=%(caps)s
AmbientCapabilities=%(caps)s
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
KeyringMode=private
RemoveIPC=yes
DevicePolicy=closed
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
OPENSSL_CONF = """[ca]
default_ca = ours
[ours]
database = index.txt
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
[req]
distinguished_name = subject
prompt = no
[subject]
CN = %(name)s
[of_ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[of_relay]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
subjectAltName = %(hosts)s
"""
RELAY_INI = """# The relay's ini, made by `mi_dicomapi.py init`; {here}/ is this file's directory. All keys: the ini of the distribution.
# A site's `commands` are the words that may be asked of it; hello is for trying.
[Server]
ipaddress = %(address)s
portnumber = %(port)d
certfile = {here}/relay.pem
keyfile = {here}/relay.pem
state_dir = {here}/state
"""
POLLER_KIT_INI = """# What may run here, and what may leave: yours to decide. Made by `mi_dicomapi.py init`; {here}/ is this file's directory,
# {python} the Python that the poller runs with. All keys: the ini of the distribution.
[poller]
site = %(site)s
url = %(url)s
token_file = {here}/token
ca_file = {here}/ca.pem
calc_base = {here}/calculations

# For trying: says names, sizes and sums of the inputs, and the time. Remove it when it has done its duty.
[command hello]
match = hello
argv =
    {python}
    {here}/mi_system_remote.py
    hello
    %(site)s

# Yours: match is the word that the relay lists, argv the program of this computer and its fixed words, one a line.
%(commands)s
# [outbound]
# deny_names = secret*
"""
KIT_COMMAND = """# [command %(command)s]
# match = %(command)s
# argv = /PATH/OF/PROGRAM
"""
MODULE_KIT_INI = """# Where the relay is, and who asks. Made by `mi_dicomapi.py init`; {here}/ is this file's directory.
[workflow]
url = %(url)s
token_file = {here}/token
ca_file = {here}/ca.pem
"""
POLLER_KIT = ("""\
Calculations of user %(user)s on this computer (site %(site)s), for the workflow system at
%(url)s. Its operator has made this kit for you.

1. Compare.  sha256sum -c SHA256SUMS       everything OK?
             sha256sum SHA256SUMS          the sum that the operator tells you, by telephone for example?
   mi_system_remote.py can be read: its first rooms say what may run and what may leave.
2. Start it, as an ordinary user; Python 3.6 or newer is all it needs:
             python3 mi_system_remote.py poll        (Ctrl+C ends it)
   The first start exchanges the code in token.code, which is good once and until %(until)s, for a token.
   That stays here, in `token`, for your eyes only.
3. Your own commands: [command NAME] in mi_distributed_computing_assist.ini says how. `check` says whether all is well.

It asks the relay for work over outgoing https; nothing listens. It runs what [command NAME] lists: now `hello`, which
says names, sizes and sums of the inputs that came. It sends declared results that [outbound] lets out, what the
command prints, its exit code, times, and how the poller stands (tell = no: not).
It can never run what is not listed, hand words of the network to a shell, send a file that was not asked for as a
result or that your rules keep, or change your rules. It needs no root.

Pause: python3 mi_system_remote.py pause. Stop: Ctrl+C; what runs goes on, the next start delivers it.
Remove: stop it; when `python3 mi_system_remote.py outbox` says nothing, remove this directory: nothing is elsewhere.
Tell the operator, who makes the token void.
""", """\
利用者 %(user)s の計算を、この計算機 (識別子 %(site)s) で、%(url)s の
ワークフローシステムのために行うための一式です。中継サーバーの運用者が作りました。

1. 照合。    sha256sum -c SHA256SUMS       すべて OK ですか
             sha256sum SHA256SUMS          運用者から (電話などで) 聞いた値と同じですか
   mi_system_remote.py は読めます。何が実行され、何が外へ出るかは、最初の部分に書かれています。
2. 起動。普通の利用者で。必要なのは Python 3.6 以降だけです。
             python3 mi_system_remote.py poll        (Ctrl+C で終了)
   最初の起動で、token.code の登録コード (一度だけ、%(until)s まで有効) がトークンに替わります。
   トークンはここの token に置かれ、本人だけが読めます。
3. 自分のコマンドは mi_distributed_computing_assist.ini の [command 名前] に書きます。check が点検します。

外向きの https で中継サーバーに仕事を尋ねるだけで、待ち受けはしません。実行するのは [command 名前] にあるものだけで、今は
hello (届いた入力の名前・大きさ・sha256 を答える) です。外へ出るのは、宣言された結果のうち [outbound] が許すもの、コマンド
の出力、終了コード、時刻、ポーリングプログラムの状態 (tell = no なら送りません) です。
一覧にないものを実行すること、ネットワークから来た語をシェルに渡すこと、結果として頼まれていないファイルや規則で止めた
ファイルを送ること、規則を変えることはできません。root は要りません。

一時停止: python3 mi_system_remote.py pause。停止: Ctrl+C (計算は続き、次の起動で結果が届きます)。
削除: 停止し、python3 mi_system_remote.py outbox が何も表示しなければ、このディレクトリを消してください。ほかには何も
ありません。運用者に知らせれば、トークンが無効になります。
""")
MODULE_KIT = ("""\
For modules of user %(user)s: calculations on external computers, by way of the relay at
%(url)s.

1. Compare.  sha256sum -c SHA256SUMS       everything OK?
2. Try it.   python3 mi_system_wf.py run %(site)s hello
   The first call exchanges the code in token.code, which is good once and until %(until)s, for a token.
   That stays here, in `token`, for %(user)s's eyes only.
3. In a module: python3 /PATH/mi_system_wf.py run %(site)s COMMAND --in INPUT --out RESULT
   The results appear in the current directory, the exit code is the command's own; --help says more.

It sends the inputs that are named, and stores the results that were asked for; nothing listens, nothing is started.
Remove: remove this directory and ~/.local/state/mi_distcomp_wf. Tell the operator, who makes the token void.
""", """\
利用者 %(user)s のモジュールのための一式です。%(url)s の中継サーバーを通して、外部計算機に計算を頼みます。

1. 照合。    sha256sum -c SHA256SUMS       すべて OK ですか
2. 試す。    python3 mi_system_wf.py run %(site)s hello
   最初の呼び出しで、token.code の登録コード (一度だけ、%(until)s まで有効) がトークンに替わります。
   トークンはここの token に置かれ、%(user)s だけが読めます。
3. モジュールでは: python3 /パス/mi_system_wf.py run %(site)s コマンド --in 入力 --out 結果
   結果は現在のディレクトリに置かれ、終了コードはコマンド自身のものです。詳しくは --help。

指定された入力を送り、頼んだ結果を置くだけで、待ち受けも、ほかのプログラムの起動もしません。
削除: このディレクトリと ~/.local/state/mi_distcomp_wf を消してください。運用者に知らせれば、トークンが無効になります。
""")


# ==== text of the page ====
PAGE_HTML = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<link rel="icon" href="data:,">
<title>Distributed calculations</title>
<style>%(css)s</style>
</head>
<body>
<a class="skip" href="#main" id="skip"></a>
<header>
<div class="bar"><h1 id="title">Distributed calculations</h1><nav id="nav"></nav>
<span class="end asof" id="asof"></span><button class="plain" id="maint" type="button" hidden></button>
<button class="plain" id="lang" type="button"></button>
<button class="plain" id="leave" type="button" hidden></button></div>
<div class="bar" id="head" hidden></div>
</header>
<main id="main" tabindex="-1"></main>
<div class="sr" role="status" id="live"></div>
<noscript><p>This page needs JavaScript. On the relay's host: <code>mi_dicomapi.py list</code>,
<code>sites</code>, <code>explain ACCEPT_ID</code>, <code>show ACCEPT_ID</code>.</p>
<p lang="ja">このページには JavaScript が必要です。中継サーバーでは <code>mi_dicomapi.py list</code>、
<code>sites</code>、<code>explain ACCEPT_ID</code>、<code>show ACCEPT_ID</code> が同じことを示します。</p></noscript>
<script>%(js)s</script>
</body>
</html>
"""
PAGE_CSS = r""":root{--ground:#fff;--panel:#f5f6f8;--line:#d5d9df;--ink:#1b1f24;--soft:#57606a;--link:#0b57b0;
--good:#1a6b33;--warn:#8a4b00;--bad:#b3151d;--work:#0b57b0;--waitbar:#6b7683;--movebar:#3f7fc4;
--runbar:#1a6b33;--focus:#0b57b0}
@media (prefers-color-scheme:dark){:root{--ground:#14171b;--panel:#1d2127;--line:#363c45;--ink:#e4e7eb;
--soft:#a2abb6;--link:#7db7ff;--good:#6fce8a;--warn:#f0b05e;--bad:#ff8f8f;--work:#7db7ff;--waitbar:#98a3b0;
--movebar:#6aa5e8;--runbar:#5cb978;--focus:#9ecbff}}
*{box-sizing:border-box}
[hidden]{display:none!important}
html{color-scheme:light dark}
body{margin:0;background:var(--ground);color:var(--ink);overflow-y:scroll;
font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",Arial,sans-serif}
body:lang(ja){font-family:system-ui,-apple-system,"Hiragino Sans","Yu Gothic UI",Meiryo,"Noto Sans CJK JP",
"Noto Sans JP",sans-serif}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code,.mono{font-size:.94em}
a{color:var(--link)}
a:focus,button:focus,input:focus,select:focus,pre:focus,summary:focus,.scroll:focus,main:focus,h2:focus{
outline:2px solid var(--focus);outline-offset:2px}
main:focus,h2:focus{outline:none}
.skip,.sr{position:absolute;left:-9999px}
.skip:focus{left:8px;top:8px;background:var(--ground);padding:6px 10px;z-index:9}
header{background:var(--panel);border-bottom:1px solid var(--line)}
.bar{display:flex;flex-wrap:wrap;align-items:center;max-width:1500px;margin:0 auto;padding:6px 20px}
.bar>*{margin:2px 18px 2px 0}
.bar>.end{margin-left:auto}
.bar>:last-child{margin-right:0}
h1{font-size:15px;font-weight:650;margin:0}
header nav a{display:inline-block;padding:3px 10px;border-radius:4px;text-decoration:none;color:var(--ink)}
header nav a:hover{text-decoration:underline}
header nav a[aria-current]{background:var(--ink);color:var(--ground)}
.verdict{font-weight:650;min-width:0;overflow-wrap:anywhere;word-break:break-word}
.asof,.soft{color:var(--soft)}
.stale{color:var(--bad);font-weight:650}
.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}.work{color:var(--work)}
main{max-width:1500px;margin:0 auto;padding:14px 20px 60px;outline:none}
h2{font-size:18px;font-weight:650;margin:4px 0 10px;overflow-wrap:anywhere;word-break:break-word}
h3{font-size:14px;font-weight:650;margin:26px 0 8px}
button,input,select{font:inherit;color:inherit;background:var(--ground);border:1px solid var(--soft);
border-radius:4px;padding:3px 10px;min-height:28px}
button{cursor:pointer}
button:hover{background:var(--panel)}
button.plain{border-color:transparent;background:none;color:var(--link);padding:3px 6px}
button.strong{background:var(--ink);color:var(--ground);border-color:var(--ink)}
button.danger{background:var(--bad);color:var(--ground);border-color:var(--bad)}
.tools{display:flex;flex-wrap:wrap;align-items:center;margin:0 0 10px}
.tools>*{margin:0 10px 6px 0}
.tabs a{display:inline-block;padding:3px 9px;margin-right:2px;border-radius:4px;text-decoration:none;
color:var(--ink);border:1px solid transparent}
.tabs a:hover{text-decoration:underline}
.tabs a[aria-current]{border-color:var(--ink);background:var(--panel);font-weight:650}
.tabs .n{color:var(--soft);font-weight:400;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
caption{text-align:left;color:var(--soft);padding:0 0 6px}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top;
white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:12.5px;vertical-align:bottom}
tbody th{font-weight:400}
td.num,th.num{text-align:right;font-variant-numeric:tabular-nums}
td.cut{max-width:26em;overflow:hidden;text-overflow:ellipsis}
td.wrap{white-space:normal;overflow-wrap:anywhere;word-break:break-word;min-width:12em}
tbody tr:hover{background:var(--panel)}
bdi{unicode-bidi:isolate}
svg{display:block}
.inline{display:inline-flex;align-items:center}
.inline>*{margin-right:8px}
.strip{margin-top:5px}
.sign{display:inline-block;width:1.3em;text-align:center}
.why{border-left:4px solid var(--soft);background:var(--panel);padding:10px 16px;
margin:0 0 14px;max-width:76em}
.why p{margin:2px 0;overflow-wrap:anywhere;word-break:break-word}
.why .first::first-letter{text-transform:uppercase}
.why .first{font-size:16px;font-weight:600}
.why.person{border-color:var(--warn)}
code.type{display:inline-block;background:var(--ground);border:1px solid var(--line);border-radius:4px;
padding:1px 8px;user-select:all;-webkit-user-select:all;overflow-wrap:anywhere;white-space:pre-wrap}
.confirm,.login{border:1px solid var(--soft);border-radius:6px;padding:12px 16px;
margin:8px 0 14px;max-width:44em}
.login{margin:8vh auto 0;max-width:30em;padding:18px 26px}
.confirm label,.login label{display:block;margin:8px 0 2px}
.confirm input,.login input{width:100%}
.confirm .go,.login .go{margin-top:14px}
.confirm .go button{margin-right:10px}
summary{cursor:pointer;margin-top:18px;color:var(--link)}
.small{font-size:13px;font-weight:400}
.wrong{color:var(--bad);font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;grid-gap:3px 18px;margin:0;max-width:76em}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere;word-break:break-word}
pre{background:var(--panel);border:1px solid var(--line);border-radius:4px;margin:0;padding:8px 12px;
max-height:26em;min-height:3.2em;overflow:auto;font-size:12.5px;line-height:1.4;white-space:pre-wrap;
overflow-wrap:anywhere;word-break:break-all}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26em),1fr));grid-gap:0 34px}
.lane{fill:var(--ink);font-size:12px}
.took{fill:var(--soft);font-size:11.5px}
.grid{stroke:var(--line);stroke-width:1}
.b-run{fill:var(--runbar)}.b-move{fill:var(--movebar)}.b-wait{fill:url(#hatch);stroke:var(--waitbar)}
.hatch{stroke:var(--waitbar);stroke-width:2}
.dots{fill:var(--ground)}
.mark{stroke:var(--bad);stroke-width:2}
.legend{margin:6px 0 10px;color:var(--soft);font-size:12.5px}
.legend span{margin-right:18px}
.legend svg{display:inline-block;vertical-align:-2px;margin-right:6px}
.on{fill:var(--work)}.off{fill:none;stroke:var(--soft);stroke-width:1}
.up{fill:var(--good)}.down{fill:var(--bad)}.base{stroke:var(--line)}
.use{fill:var(--work)}.room{fill:none;stroke:var(--soft)}
noscript{display:block;max-width:44em;margin:8vh auto;padding:0 20px}
@media (max-width:720px){.bar,main{padding-left:12px;padding-right:12px}.bar>*{margin-right:10px}}
@media (prefers-reduced-motion:no-preference){tr.new>*{animation:new 1.6s}
@keyframes new{from{background:var(--line)}}}
@media (forced-colors:active){.b-run,.b-move,.on,.up,.use{fill:CanvasText}.down{fill:CanvasText}}
@media print{.tools,.acts,.skip{display:none}body{overflow:visible}}
"""
PAGE_JS = r"""'use strict';
(function () {
// All values are shown as text (textContent), never as HTML. Nothing is kept but in memory.
const WORDS = {
title: ['Distributed calculations', '分散計算'],
skip: ['Skip to the contents', '本文へ移動'],
views: ['Views', '表示の切り替え'],
sites: ['Sites', 'サイト'],
calcs: ['Calculations', '計算'],
asof: ['as of %s', '%s 現在'],
stale: ['No answer from the relay since %s; trying again', '%s から中継サーバーの応答がありません。再試行中'],
other: ['日本語', 'English'],
leave: ['Log out', 'ログアウト'],
left: ['Logged out.', 'ログアウトしました。'],
login: ['Log in', 'ログイン'],
hello: ['Paste a token from the relay’s operator, or open a link that “mi_dicomapi.py page-link” prints.',
'中継サーバーの運用者から受け取ったトークンを貼り付けるか、mi_dicomapi.py page-link が表示するリンクを開いてください。'],
token: ['Token', 'トークン'],
open: ['Open', '開く'],
withpw: ['With user name and password', '利用者名とパスワードで入る'],
user: ['User', '利用者'],
password: ['Password', 'パスワード'],
memory: ['It is kept in the memory of this tab only, and gone when you reload it.',
'このタブのメモリーにだけ置かれ、再読み込みで消えます。'],
ended: ['This token is not accepted (any more).', 'このトークンは受け付けられません（期限切れなど）。'],
badlink: ['This link was used, or is older than a minute. Make a new one.',
'このリンクは使用済みか、1分を過ぎています。新しく作ってください。'],
noreach: ['The relay does not answer.', '中継サーバーが応答しません。'],
loading: ['Loading …', '読み込み中 …'],
well: ['All is well', '異常ありません'],
w_disk: ['The relay’s disk is full', '中継サーバーのディスクに空きがありません'],
w_maintenance: ['Maintenance: %t', '保守中: %t'],
'w_takes-stock': ['Restored from a backup: taking stock', '控えから復元: 各ポーラーに確認中'],
w_starved: ['Work waits, and nobody takes it (sites: %n)', '待っている計算を受け取るポーラーがありません（%n か所）'],
w_away: ['%n out of contact', '%n 件が連絡途絶'],
w_abnormal: ['%n ended abnormally', '%n 件が異常終了'],
w_expires: ['Expires: %t', '期限切れが近い: %t'],
disk: ['Disk', 'ディスク'],
free: ['%s free of %s', '空き %s / %s'],
certificate: ['certificate', '証明書'],
ofuser: ['token of %s', '%s のトークン'],
until: ['until %s', '%s まで'],
maint: ['Maintenance …', '保守 …'],
mainth: ['Switch maintenance on', '保守を始める'],
maintoff: ['End maintenance', '保守を終える'],
maintsays: ['No new calculations and claims; what runs is brought to its end.',
'新しい計算の登録と受け渡しを止めます。実行中の計算は最後まで進みます。'],
find: ['Find', '検索'],
findsite: ['site or user', 'サイト名、利用者'],
findcalc: ['beginning of the id, site, user, command', 'ID の先頭、サイト、利用者、コマンド'],
nosites: ['No site fits.', '該当するサイトはありません。'],
nocalcs: ['No calculation fits.', '該当する計算はありません。'],
sitecap: ['Sites, those that need a person first', 'サイト（対応が必要なものから）'],
calccap: ['Calculations, the newest first', '計算（新しい順）'],
c_site: ['Site', 'サイト'], c_user: ['User', '利用者'], c_state: ['State', '状態'],
c_busy: ['Busy', '実行枠'], c_wait: ['Waiting', '実行待ち'], c_there: ['At the site', '外部で処理中'],
c_out: ['Undelivered', '未送信'], c_day: ['Last 24 h', '直近24時間'], c_heard: ['Heard', '最終連絡'],
c_ver: ['Version', '版'], c_id: ['ID', 'ID'], c_cmd: ['Command', 'コマンド'],
c_since: ['For', '経過'], c_steps: ['Steps', '段階'], c_exit: ['Exit', '終了コード'], c_why: ['Why', '理由'],
now: ['now', '接続中'],
ofn: ['%s of %s', '%s/%s'],
oldest: ['oldest %s', '最長 %s'],
away1: ['%s out of contact', '連絡途絶 %s'],
day: ['%s ended well, %s abnormally (most in half an hour: about %s)', '正常終了 約%s、異常終了 約%s（30分あたり最大 約%s）'],
day0: ['nothing ended', '終了なし'],
t_open: ['Open', '未完了'], t_needs: ['Need a person', '要対応'], t_waiting: ['Waiting', '実行待ち'],
t_running: ['At the site', '外部で処理中'], t_results: ['Ended', '終了'], t_all: ['All kept', 'すべて'],
choose: ['Which calculations', '表示する計算'],
onlysite: ['Site: %s', 'サイト: %s'],
drop: ['show all sites', 'すべてのサイトを表示'],
older: ['Older', '次（古いもの）'],
newest: ['Newest', '最新に戻る'],
more: ['More sites', '次のサイト'],
first: ['First sites', '最初に戻る'],
back: ['All calculations', '計算の一覧へ'],
gone: ['There is no such calculation (any more), or it is not for you.',
'この計算はありません（削除されたか、権限がありません）。'],
whyh: ['Why it is where it is', '今の状況と理由'],
who: ['Who has to act: %s', '対応する人: %s'],
who_nobody: ['nobody', 'だれも何もしなくてよい'], who_starter: ['who has started it', 'この計算を始めた人'],
who_admin: ['the admin of the external computer %s', '外部計算機 %s の管理者'],
who_operator: ['the relay’s operator', '中継サーバーの運用者'],
types: ['Type there:', '打つ語:'],
changes: ['What changes it: %s', '変わる条件: %s'],
long: ['How long yet: %s', 'あとどのくらいか: %s'],
since: ['Since %s (%s)', '%s から（%s）'],
seen: ['known %s ago', '%s前の情報'],
others: ['Users whose pollers ask there: %s', 'そこで問い合わせているポーラーの利用者: %s'],
cancel: ['Cancel …', '取り消し …'],
rerun: ['Run again …', '再実行 …'],
cancelh: ['Cancel this calculation', 'この計算を取り消す'],
rerunh: ['Run this calculation again', 'この計算をもう一度実行する'],
cancelsays: ['Its command is stopped; what it has written so far comes back.',
'コマンドを止めます。それまでに書かれたものは戻ります。'],
rerunsays: ['The same command runs once more, in a new working directory.',
'同じコマンドを、新しい作業ディレクトリでもう一度実行します。'],
last4: ['Last 4 characters of the id (…%s)', 'ID の末尾4文字（…%s）'],
reason: ['Reason (others will read it)', '理由（ほかの人も読みます）'],
no: ['Back', '戻る'],
not4: ['These are not the last 4 characters of the id.', 'ID の末尾4文字と一致しません。'],
noreason: ['Give a reason.', '理由を書いてください。'],
done: ['Done.', '実行しました。'],
refused: ['The relay refuses: %s', '中継サーバーが拒否しました: %s'],
timeh: ['Nine steps, to scale', '九つの段階（時間の長さに比例）'],
timesum: ['%s so far, from registration. The table below says the same.',
'登録から %s。下の表に同じ内容があります。'],
k_wait: ['waits', '待ち'], k_move: ['files move', '転送・準備'], k_run: ['command runs', '実行'],
k_mark: ['asked to stop', '停止の指示'],
s1: ['Inputs come to the relay', '入力待ち'], s2: ['Waits for a poller', '実行待ち'],
s3: ['Inputs go to the site', '入力転送中'], s4: ['Is about to start', '開始準備中'],
s5: ['Command runs', '実行中'], s6: ['Ended, results are judged', '結果待ち'],
s7: ['Results come', '結果転送中'], s8: ['Waits to be fetched', '受取待ち'], s9: ['Fetched', '受取済み'],
h_step: ['Step', '段階'], h_at: ['Made at', '時刻'], h_took: ['Then took', 'その後'], h_what: ['What', '内容'],
h_note: ['Note', '備考'], attempt: ['attempt %s', '%s 回目'],
going: ['%s so far', '%s 経過'],
out: ['Standard output', '標準出力'], err: ['Standard error', '標準エラー出力'],
empty: ['(nothing yet)', '（まだありません）'],
silent_: ['(nothing came while it ran; all of it is among the results)', '（実行中には届きませんでした。全文は結果にあります）'],
cutoff: ['… the last 64 KiB of %s …', '… %s のうち最後の 64 KiB …'],
facts: ['Facts', '項目'],
f_id: ['ID', 'ID'], f_request_id: ['Request', '要求 ID'], f_parameters: ['Parameters', 'パラメータ'],
f_exit: ['Exit code', '終了コード'], f_signal: ['Signal', 'シグナル'], f_reason: ['Reason', '理由'],
f_waits: ['It waits', '待っている理由'], f_poller: ['Poller', 'ポーラー'], f_attempt: ['Attempt', '実行回数'],
f_registered: ['Registered', '登録'], f_bytes: ['Files at the relay', '中継サーバー上のファイル'],
f_patterns: ['Results asked for', '求める結果'], f_verdicts: ['Not delivered', '届かないもの'],
inputs: ['Inputs (%s)', '入力（%s）'], results: ['Results (%s)', '結果（%s）'],
andmore: ['and %s more', 'ほか %s 件'], none: ['none', 'なし'], notyet: ['not complete', '未完了'],
commands: ['To type', '打つ語'],
p_open: ['open', '受付中'], p_busy: ['busy', '実行中'], p_paused: ['paused', '受付停止中'],
p_hours: ['out of hours', '時間外'], p_disk: ['disk full', '空き不足'], p_drain: ['draining', '受付終了'],
p_once: ['asks by cron', '定時に問い合わせ'], p_silent: ['silent', '応答なし'], p_untold: ['does not tell', '知らせない設定'],
p_fielded: ['fielded, unknown', '従来版（不明）'], p_never: ['never asked', '問い合わせなし'],
registered: ['registered', '入力待ち'], waiting: ['waiting', '実行待ち'], taken: ['taken', '入力転送中'],
queued: ['queued', '順番待ち'], running: ['running', '実行中'], ended_: ['ended', '結果待ち'],
sending: ['sending', '結果転送中'], done_: ['done', '正常終了'], abnormal: ['abnormal', '異常終了'],
fetched: ['fetched', '受取済み'], cancelled: ['cancelled', '取消'], lost: ['lost', '打ち切り'],
held: ['held for a person', '公開承認待ち'], away: ['out of contact', '連絡途絶'],
y_maintenance: ['maintenance', '保守中'], 'y_takes-stock': ['relay takes stock', '復元後の確認中'],
'y_other-user': ['pollers of other users only', 'ほかの利用者のポーラーだけ'],
'y_other-site': ['its poller asks for another site', 'ポーラーが別のサイトを求めている'],
'y_no-poller': ['no poller ever asked', 'ポーラーなし'], 'y_token-expired': ['token expired', 'トークン期限切れ'],
'y_token-revoked': ['token revoked', 'トークン取り消し'], y_silent: ['poller silent', 'ポーラー応答なし'],
y_paused: ['site paused', '受付停止中'], y_hours: ['out of hours', '時間外'], y_disk: ['no room there', '外部の空き不足'],
y_drain: ['site draining', '受付終了'], y_once: ['next cron', '次の定時'], y_busy: ['site busy', '実行中のため'],
'y_too-large': ['too large for its disk', '空きより大きい'], 'y_needs-v2': ['poller too old', '従来版では不可'],
y_fielded: ['fielded poller', '従来版ポーラー'], y_untold: ['poller does not tell', '理由は不明'], y_next: ['next',
'次に渡る'],
'y_inputs-missing': ['inputs missing', '入力不足'], 'y_inputs-come': ['inputs come', '入力転送中'],
'y_relay-disk': ['relay’s disk full', '中継サーバーの空き不足'], 'y_out-of-contact': ['out of contact', '連絡途絶'],
y_cancelling: ['being stopped', '停止中'], y_queued: ['batch queue', 'バッチの順番待ち'],
y_quiet: ['prints nothing', '出力なし'], y_undelivered: ['undelivered', '未送信'],
y_held: ['held for a person', '公開承認待ち'],
};
const SIGNS = {open: '\u25cf good', busy: '\u25d0 work', paused: '\u2016 warn', hours: '\u25d4 soft',
disk: '\u25b2 bad',
drain: '\u25bd warn', once: '\u25cb soft', silent: '\u2715 bad', untold: '? soft', fielded: '? soft',
never: '\u2013 soft',
registered: '\u25cb soft', waiting: '\u25d4 warn', taken: '\u2192 work', queued: '\u2261 work',
running: '\u25ba work',
held: '\u2016 warn',
ended: '\u25a0 work', sending: '\u2190 work', done: '\u2713 good', abnormal: '\u2715 bad',
fetched: '\u2713 soft',
cancelled: '\u2298 soft', lost: '\u2715 bad', away: '! bad'};
const SVG = 'http://www.w3.org/2000/svg';
const ENDS = ['cancel-wait-calc', 'cancelled', 'lost', 'end-send', 'end-send unsent'];
const KINDS = ['', 'move', 'wait', 'move', 'move', 'run', 'move', 'move', 'wait', 'wait'];
const TAIL = 65536;
const $ = (id) => document.getElementById(id);
const S = {token: '', me: '', may: '', lang: /^ja/i.test(navigator.language || '') ? 1 : 0, known: '',
data: null,
turn: 0, stop: null, skew: 0, at: 0, stale: false, view: null, fill: null, verdict: null, live: null};

// ---- words and numbers
function _(key, ...values) {
  const found = (WORDS[key] || WORDS[key + '_'] || [key, key])[S.lang];
  return values.length ? found.replace(/%[snt]/g, () => String(values.shift())) : found;
}
function safe(text) {        // what steers a terminal, or turns the direction of writing, is made visible
  return String(text).replace(
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (c) => c < '\u0100' ? '\\x' + ('0' + c.charCodeAt(0).toString(16)).slice(-2)
      : '\\u' + ('000' + c.charCodeAt(0).toString(16)).slice(-4));
}
function now() { return Date.now() / 1000 + S.skew; }
function span(seconds) {
  const s = Math.max(0, seconds), units = S.lang ? ['日', '時間', '分', '秒'] : [' d', ' h', ' min', ' s'];
  const two = (a, i, b) => a + units[i] + (b ? (S.lang ? '' : ' ') + b + units[i + 1] : '');
  if (s >= 86400) return two(Math.floor(s / 86400), 0, Math.floor(s % 86400 / 3600));
  if (s >= 3600) return two(Math.floor(s / 3600), 1, Math.floor(s % 3600 / 60));
  if (s >= 60) return two(Math.floor(s / 60), 2, s < 600 ? Math.floor(s % 60) : 0);
  if (s > 0 && s < 0.05) return '<0.1' + units[3];
  return (s < 9.95 && s % 1 > 0.05 ? s.toFixed(1) : Math.round(s)) + units[3];
}
const pad = (n) => ('0' + n).slice(-2);
function clock(at) {
  const d = new Date(at * 1000);
  return pad(d.getHours()) + ':' + pad(d.getMinutes()) + ':' + pad(d.getSeconds());
}
function moment(at) {
  const d = new Date(at * 1000), z = -d.getTimezoneOffset();
  return d.getFullYear() + '-' + pad(d.getMonth() + 1) + '-' + pad(d.getDate()) + ' ' + clock(at) + ' ' +
    (z < 0 ? '-' : '+') + pad(Math.floor(Math.abs(z) / 60)) + ':' + pad(Math.abs(z) % 60);
}
function utc(at) { return new Date(at * 1000).toISOString(); }
function bytes(n) {
  return n >= 1e9 ? (n / 1e9).toFixed(1) + ' GB' : n >= 1e6 ? (n / 1e6).toFixed(1) + ' MB'
    : n >= 1e4 ? Math.round(n / 1e3) + ' kB' : n + ' B';
}

// ---- elements
function h(tag, more, ...inside) {
  const svg = /^(svg|path|rect|line|g|text|defs|pattern|circle|tspan)$/.test(tag);
  const made = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const key of Object.keys(more || {})) {
    const value = more[key];
    if (value === null || value === undefined || value === false) continue;
    if (key.slice(0, 2) === 'on') made.addEventListener(key.slice(2), value);
    else if (key === 'value') made.value = value;
    else made.setAttribute(key, value === true ? '' : value);
  }
  for (const part of inside) if (part !== null && part !== undefined && part !== '') made.append(part);
  return made;
}
function set(node, text) {
  const now_ = String(text);
  if (node.shown !== now_) { node.shown = now_; node.textContent = now_; }
}
function put(node, key, ...inside) {             // new contents, if what they are made of (key) is new
  if (node.key === key) return false;
  node.key = key;
  node.textContent = '';
  node.append(...inside.map((part) => typeof part === 'function' ? part() : part));
  return true;
}
function title(node, text) { if (node.title !== text) node.title = text; }
function age(node, at) {
  set(node, at === null ? '' : span(now() - at));
  if (at !== null) title(node, moment(at) + '  ' + utc(at));
}
function state(node, word) {
  put(node, word + S.lang, () => {
    const sign = (SIGNS[word] || '? soft').split(' ');
    return h('span', {class: sign[1]}, h('span', {class: 'sign', 'aria-hidden': 'true'}, sign[0]),
      _(WORDS['p_' + word] && node.site ? 'p_' + word : WORDS[word + '_'] ? word + '_' : word));
  });
}
function strip(step) {
  const box = (i) => 'M' + (i * 7 + 0.5) + ' .5h5v8h-5z';
  let on = '', off = '';
  for (let i = 0; i < 9; i++) if (i < step) on += box(i); else off += box(i);
  return h('svg', {class: 'strip', width: 63, height: 10, role: 'img', 'aria-label': step + '/9'},
    h('path', {class: 'on', d: on || 'M0 0'}), h('path', {class: 'off', d: off || 'M0 0'}));
}
function spark(well, bad) {
  let up = '', down = '', sums = [0, 0], most = 0;
  for (let i = 0; i < well.length; i++) {
    const a = +well[i], b = +bad[i], many = (n) => n ? Math.round(Math.pow(2, n) * 0.7) : 0;
    if (a) up += 'M' + (i * 2) + ' 11v-' + Math.min(10, a + 2) + 'h1.5V11z';
    if (b) down += 'M' + (i * 2) + ' 13v' + Math.min(8, b + 2) + 'h1.5V13z';
    sums = [sums[0] + many(a), sums[1] + many(b)];
    most = Math.max(most, many(a) + many(b));
  }
  const text = up || down ? _('day', sums[0], sums[1], most) : _('day0');
  return h('svg', {width: 96, height: 22, role: 'img', 'aria-label': text},
    h('title', {}, text), h('line', {class: 'base', x1: 0, x2: 96, y1: 12, y2: 12}),
    h('path', {class: 'up', d: up || 'M0 0'}), h('path', {class: 'down', d: down || 'M0 0'}));
}
function meter(part, whole, wide) {
  const w = whole ? Math.min(1, part / whole) * (wide - 1) : 0;
  return h('svg', {width: wide, height: 10, 'aria-hidden': 'true'},
    h('rect', {class: 'use', x: 0, y: 1, width: w, height: 8}),
    h('rect', {class: 'room', x: 0.5, y: 0.5, width: wide - 1, height: 9}));
}
function table(id, caption, heads, unseen) {
  const body = h('tbody', {});
  return h('div', {class: 'scroll', role: 'region', 'aria-label': caption, tabindex: 0},
    h('table', {id}, h('caption', {}, h('span', {class: unseen ? 'sr' : null}, caption)), h('thead', {},
      h('tr', {}, ...heads.map(
      ([key, kind]) => h('th', {scope: 'col', class: kind}, _(key))))), body));
}
// Rows by key: what stays is changed where it differs only, so that focus and reading place are kept.
function rows(body, list, keyOf, make, fill) {
  const old = body.byKey || new Map(), next = new Map(), held = document.activeElement;
  const fresh = old.size > 0 && !S.chosen;  // chosen ones are no news
  let place = body.firstChild;
  for (const one of list) {
    const key = keyOf(one);
    let row = old.get(key);
    if (!row) { row = make(one); if (fresh) row.className = 'new'; }
    old.delete(key);
    next.set(key, row);
    fill(row, one);
    if (row === place) place = place.nextSibling; else body.insertBefore(row, place);
  }
  let lost = false;
  for (const row of old.values()) { lost = lost || row.contains(held); row.remove(); }
  body.byKey = next;
  if (lost) body.closest('.scroll').focus();
  else if (held !== document.activeElement && document.contains(held)) held.focus();
}
function cells(row, kinds) {
  row.c = kinds.map((kind) => row.appendChild(h(kind === 'head' ? 'th' : 'td',
    kind === 'head' ? {scope: 'row'} : {class: kind || null})));
  return row;
}
function say(text) { $('live').textContent = text; }

// ---- calls
async function call(method, name, fields, signal) {
  const headers = {'X-MI-Page': '1'}, how = {method, headers, signal, cache: 'no-store', redirect: 'error',
    credentials: 'same-origin'};
  if (S.token) headers.Authorization = 'Bearer ' + S.token;
  let url = name;
  if (method === 'GET') url += '?' + new URLSearchParams(Object.assign({v: 2}, fields));
  else {
    headers['Content-Type'] = 'application/json';
    how.body = JSON.stringify(Object.assign({v: 2}, fields));
  }
  const answer = await fetch(url, how);
  let found = null;
  try { found = (await answer.json()).errors[0]; } catch (error) { found = null; }
  if (answer.ok && found && found.code === 200) return found;
  throw Object.assign(new Error(safe(found && found.message || 'HTTP ' + answer.status)),
    {status: answer.status});
}
function failed(error) { return error.status ? _('refused', error.message) : _('noreach'); }
function question() {
  const v = S.view;
  if (v.name === 'calculation') return {view: 'one', accept_id: v.id};
  if (v.name === 'calculations') {
    return {view: 'calcs', show: v.show || 'open', site: v.site || '', find: v.find || '', before: v.before
      || 0};
  }
  return {view: 'sites', find: v.find || '', first: v.from || 0};
}
// One call waits for news while the tab is looked at; a newer one ends it.
async function watch() {
  const mine = ++S.turn;
  let pause = 1;
  if (S.stop) S.stop.abort();
  while (mine === S.turn && !document.hidden) {
    const stop = S.stop = new AbortController(), late = setTimeout(() => stop.abort(), 45000);
    try {
      const found = await call('GET', 'v2/board', Object.assign(question(), S.known
        ? {known: S.known, wait: 25} : {}), stop.signal);
      if (mine !== S.turn) return;
      pause = 1;
      arrive(found);
    } catch (error) {
      if (mine !== S.turn) return;
      if (error.status === 403) return login(S.token ? _('ended') : '');
      if (error.status === 404 && S.view.name === 'calculation') return missing();
      S.stale = true;
      S.known = '';                        // the next answer comes at once
      if (!S.at && !S.token) login(_('noreach'));
      header();
      await new Promise((go) => setTimeout(go, pause * (700 + 600 * Math.random())));
      pause = Math.min(30, pause * 2);
    } finally { clearTimeout(late); }
  }
}
function arrive(found) {
  S.stale = false;
  S.at = Date.now() / 1000;
  S.skew = found.now - S.at;
  S.known = found.stamp;
  if (!found.same) {
    S.data = found;
    S.me = found.me;
    S.may = found.may;
    draw();
  }
  header();
}

// ---- what stands above
function header() {
  document.documentElement.lang = S.lang ? 'ja' : 'en';
  const inside = S.data !== null;
  set($('title'), _('title'));
  set($('skip'), _('skip'));
  set($('lang'), _('other'));
  $('lang').lang = S.lang ? 'en' : 'ja';
  set($('leave'), _('leave'));
  $('leave').hidden = !S.token;
  set($('maint'), _('maint'));
  $('maint').hidden = !inside || S.may !== 'all';
  $('nav').hidden = $('head').hidden = !inside;
  $('nav').setAttribute('aria-label', _('views'));
  const as = $('asof'), at = inside ? clock(S.at + S.skew) : '';
  set(as, inside ? _(S.stale ? 'stale' : 'asof', at) : '');
  as.className = 'end ' + (S.stale ? 'stale' : 'asof');
  if (!inside) return;
  const here = S.view.name;
  put($('nav'), here + S.lang, ...[['sites', '#/sites'], ['calcs', '#/calculations']].map(([key,
    to]) => () =>
    h('a', {href: to, 'aria-current': here === to.slice(2) ? 'page' : null}, _(key))));
  const head = S.data.head;
  put($('head'), JSON.stringify(head) + S.lang, () => verdict(head), () => disk(head));
}
function verdict(head) {
  const links = {starved: '#/sites', away: '#/calculations?show=needs',
    abnormal: '#/calculations?show=needs'};
  const told = head.wrong.map(([code, n, text]) => [_('w_' + code).replace('%n', n).replace('%t', () => text
    || soon(head)),
    links[code], code === 'expires' || code === 'maintenance' ? 'warn' : 'bad']);
  const first = told.length ? told[0][0] : _('well');
  if (S.verdict !== null && S.verdict !== first + S.lang && S.verdict.slice(-1) === String(S.lang))
    say(first);
  S.verdict = first + S.lang;
  document.title = (told.length ? '(!) ' + first : _('well')) + ' \u2013 ' + _('title');
  const all = h('span', {class: 'verdict'});
  if (!told.length) all.append(h('span', {class: 'good'}, h('span', {class: 'sign', 'aria-hidden': 'true'},
    '\u2713'), first));
  told.forEach(([text, to, kind], i) => all.append(i ? h('span', {class: 'soft'}, ' \u00b7 ') : '', h('span',
    {class: kind}, h('span', {class: 'sign', 'aria-hidden': 'true'}, '!'), to ? h('a', {href: to,
      class: kind},
      text) : text)));
  return all;
}
function disk(head) {
  if (!head.disk) return '';
  const [free, all] = head.disk;
  return h('span', {class: 'inline'}, h('span', {class: 'soft'}, _('disk')), meter(all - free, all, 72),
    h('span', {class: 'soft'}, _('free', bytes(free), bytes(all))));
}
function soon(head) {
  const all = head.expires;
  return all.slice(0, 2).map(([kind, user, at]) => (kind === 'token' ? _('ofuser', user)
    : _('certificate')) +
    ' ' +
    moment(at).slice(0, 10)).join(', ') + (all.length > 2 ? ', ' + _('andmore', all.length - 2) : '');
}

// ---- log in
function login(text, good) {
  ++S.turn;
  if (S.stop) S.stop.abort();
  S.token = '';
  S.data = S.fill = null;
  S.known = '';
  header();
  const wrong = h('p', {class: good ? 'soft' : 'wrong', role: 'alert', id: 'wrong'}, text || '');
  const field = (id, key, kind) => [h('label', {for: id}, _(key)), h('input', {id, type: kind,
    autocomplete: 'off',
    autocapitalize: 'off', spellcheck: 'false', 'aria-describedby': 'wrong'})];
  const go = h('div', {class: 'go'}, h('button', {class: 'strong'}, _('open')));
  const one = h('form', {onsubmit: (event) => {
    event.preventDefault();
    S.token = $('token').value.replace(/\s+/g, '');
    $('token').value = '';
    start();
  }}, ...field('token', 'token', 'password'), go);
  const two = h('form', {onsubmit: async (event) => {
    event.preventDefault();
    try {
      S.token = (await call('POST', 'login', {user: $('user').value, password: $('password').value})).token;
      start();
    } catch (error) { set(wrong, failed(error)); }
  }}, ...field('user', 'user', 'text'), ...field('password', 'password', 'password'),
  h('div', {class: 'go'}, h('button', {}, _('open'))));
  put($('main'), {}, h('div', {class: 'login'}, h('h2', {}, _('login')), h('p', {}, _('hello')), wrong, one,
    h('p', {class: 'soft'}, _('memory')), h('details', {}, h('summary', {}, _('withpw')), two)));
  $('token').focus();
}
function start() {
  S.known = '';
  route();
}
async function redeem(code) {
  try {
    S.token = (await call('POST', 'v2/link', {code})).token;
    start();
  } catch (error) { login(error.status ? _('badlink') : _('noreach')); }
}

// ---- where we are
function parse() {
  const [path, query] = location.hash.replace(/^#\/?/, '').split('?'), parts = path.split('/');
  const found = {name: parts[0] === 'calculation' && parts[1] ? 'calculation'
    : parts[0] === 'calculations' ? 'calculations' : 'sites', id: parts[1] || ''};
  for (const [key, value] of new URLSearchParams(query || '')) if (!(key in found)) found[key] = value;
  return found;
}
function hash(more) {
  const v = Object.assign({}, S.view, more), query = new URLSearchParams();
  for (const key of ['show', 'site', 'find', 'before', 'from']) if (v[key]) query.set(key, v[key]);
  const text = String(query);
  return '#/' + v.name + (text ? '?' + text : '');
}
function route() {
  const old = S.view;
  S.view = parse();
  S.chosen = true;
  const same = old && old.name === S.view.name && old.id === S.view.id && S.fill;
  S.known = '';
  if (!same) {
    S.fill = S.live = null;
    put($('main'), {}, h('p', {class: 'soft'}, _('loading')));
    if (old && S.data) $('main').focus();
  }
  watch();
}
function draw() {
  const v = S.view.name;
  if (!S.fill) S.fill = {sites: buildSites, calculations: buildCalcs, calculation: buildOne}[v]();
  S.fill(S.data);
  S.chosen = false;
}
function missing() {
  S.fill = null;
  put($('main'), {}, h('p', {}, _('gone')), h('p', {}, h('a', {href: '#/calculations'}, _('back'))));
}
function finder(key) {
  let later = 0;
  const input = h('input', {id: 'find', type: 'search', size: 34, placeholder: _(key), value: S.view.find
    || '',
    'aria-label': _('find') + ': ' + _(key), oninput: () => {
      clearTimeout(later);
      later = setTimeout(() => location.replace(hash({find: input.value.trim(), before: 0, from: 0})), 200);
    }});
  return input;
}

// ---- sites
function buildSites() {
  const mine = S.data.may === 'own';
  const box = table('sites', _('sitecap'), [['c_site'], ['c_state'], ['c_busy'], ['c_wait', 'num'],
    ['c_there', 'num'],
    ['c_out', 'num'], ['c_day'], ['c_heard'], ['c_user'], ['c_ver']]);
  const none = h('p', {class: 'soft'}), pages = h('p', {});
  put($('main'), {}, h('h2', {}, _('sites')), h('div', {class: 'tools'}, finder('findsite')), box, none,
    pages);
  return (data) => {
    const heard = data.heard || [];
    data.sites.forEach((one, i) => { one.heard = heard[i]; });
    rows(box.querySelector('tbody'), data.sites, (one) => one[0] + '\n' + one[1], () => cells(h('tr', {}),
      ['head', '', '', 'num', 'num', 'num', '', '', '', '']), siteRow);
    set(none, data.sites.length ? '' : _('nosites'));
    put(pages, data.total + ' ' + data.from, () => data.from ? h('a', {href: hash({from: 0})}, _('first'))
      : '', ' ',
      () => data.from + data.sites.length < data.total ? h('a', {href: hash({from: data.from +
        data.sites.length})},
        _('more')) : '');
  };
}
function howMany(node, n, since) {
  const oldest = n && since ? ' (' + _('oldest', span(now() - since)) + ')' : '';
  put(node, n + oldest, () => n ? String(n) : '', () => oldest ? h('span', {class: 'soft'}, oldest) : '');
}
function siteRow(row, one) {
  const [site, user, standing, until, busy, jobs, since, outbox, oldest, version, waiting, there, away, well,
    bad] = one, c = row.c;
  put(c[0], site, () => h('a', {href: '#/calculations?show=all&site=' + encodeURIComponent(site)},
    h('bdi', {}, site)));
  c[1].site = true;
  put(c[1], standing + until, () => h('span', {}), () => until && until > now() ? h('span', {class: 'soft'},
    ' ' +
    _('until', clock(until).slice(0, 5))) : '');
  c[1].firstChild.site = true;
  state(c[1].firstChild, standing);
  put(c[2], busy + '/' + jobs, () => jobs === null ? '' : h('span', {class: 'inline'}, meter(busy, jobs, 42),
    h('span', {}, _('ofn', busy, jobs))));
  howMany(c[3], waiting, since);
  put(c[4], there + ' ' + away, () => there ? String(there) : '', () => away ? h('span', {class: 'bad'},
    ' (' +
    _('away1', away) + ')') : '');
  howMany(c[5], outbox, oldest);
  put(c[6], well + bad, () => spark(well, bad));
  if (one.heard) { put(c[7], 'at', () => h('span', {})); age(c[7].firstChild, one.heard); }
  else put(c[7], standing === 'never', standing === 'never' ? '' : h('span', {class: 'soft'}, _('now')));
  put(c[8], user, () => h('bdi', {}, user));
  set(c[9], version || '');
}

// ---- calculations
function buildCalcs() {
  const box = table('calcs', _('calccap'), [['c_state'], ['c_id'], ['c_site'], ['c_user'], ['c_cmd'],
    ['c_since'],
    ['c_steps'], ['c_exit', 'num'], ['c_why']]);
  const tabs = h('nav', {class: 'tabs', 'aria-label': _('choose')}), only = h('span', {});
  const none = h('p', {class: 'soft'}), pages = h('p', {});
  put($('main'), {}, h('h2', {}, _('calcs')), h('div', {class: 'tools'}, tabs, finder('findcalc'), only),
    box, none,
    pages);
  return (data) => {
    const show = S.view.show || 'open', counts = data.head.counts;
    put(tabs, JSON.stringify(counts) + show + S.view.site + S.view.find, ...['open', 'needs', 'waiting',
      'running',
      'results', 'all'].map((key) => () => h('a', {href: hash({show: key, before: 0}), 'aria-current':
        key === show ? 'true' : null}, _('t_' + key), ' ', h('span', {class: 'n'}, String(counts[key])))));
    put(only, S.view.site || '', () => S.view.site ? h('span', {}, h('bdi', {}, _('onlysite', S.view.site)),
      ' ',
      h('a', {href: hash({site: '', before: 0})}, _('drop'))) : '');
    rows(box.querySelector('tbody'), data.calcs, (one) => one[0], () => cells(h('tr', {}), ['', 'head', '',
      '', 'cut',
      '', '', 'num', 'cut']), calcRow);
    set(none, data.calcs.length ? '' : _('nocalcs'));
    put(pages, S.view.before + ' ' + data.next, () => S.view.before > 0 ? h('a', {href: hash({before: 0})},
      _('newest'))
      : '', ' ', () => data.next ? h('a', {href: hash({before: data.next})}, _('older')) : '');
  };
}
function calcRow(row, one) {
  const [id, user, site, command, word, step, touched, code, cause, reason] = one, c = row.c;
  state(c[0], word);
  put(c[1], id, () => h('a', {href: '#/calculation/' + encodeURIComponent(id), class: 'mono'}, id.slice(0,
    8)));
  put(c[2], site, () => h('bdi', {}, site));
  put(c[3], user, () => h('bdi', {}, user));
  put(c[4], command, () => h('bdi', {class: 'mono'}, command));
  title(c[4], command);
  put(c[5], 'age', () => h('span', {}));
  age(c[5].firstChild, touched);
  put(c[6], step, () => strip(step));
  set(c[7], code === null ? '' : code);
  const short = WORDS['y_' + cause] ? _('y_' + cause) : '', why = short + (short && reason ? ': ' : '') +
    reason;
  put(c[8], why, () => h('bdi', {}, why));
  title(c[8], why);
}

// ---- one calculation
function buildOne() {
  const made = {};
  const part = (name, tag, more) => { made[name] = h(tag, more || {}); return made[name]; };
  const section = (key, ...inside) => h('section', {'aria-label': _(key)}, h('h3', {}, _(key)), ...inside);
  const pre = (stream) => {
    made[stream] = h('pre', {tabindex: 0, role: 'region', 'aria-label': _(stream)}, _('empty'));
    return h('div', {}, h('h3', {}, _(stream)), made[stream]);
  };
  put($('main'), {}, h('p', {}, h('a', {href: '#/calculations'}, '\u2190 ' + _('back'))), part('name', 'h2'),
    h('section', {'aria-label': _('whyh'), id: 'why'}, part('why', 'div', {class: 'why'})),
    part('acts', 'div', {class: 'acts tools'}), part('form', 'div'),
    section('timeh', part('chart', 'div'), part('legend', 'div', {class: 'legend', 'aria-hidden': 'true'}),
      part('steps', 'div')),
    h('div', {class: 'two'}, pre('out'), pre('err')),
    h('div', {class: 'two'}, section('facts', part('facts', 'dl')), h('div', {}, part('inputs', 'section'),
      part('results', 'section'))));
  made.legend.append(...['wait', 'move', 'run', 'mark'].map((key) => h('span', {},
    h('svg', {width: 26, height: 12}, key !== 'mark' ? bar(1, 1, 24, 10, key)
      : h('line', {class: 'mark', x1: 13, x2: 13, y1: 0, y2: 12})), _('k_' + key))));
  S.live = {id: S.view.id, out: {at: -1, text: ''}, err: {at: -1, text: ''}, busy: false};
  return (data) => {
    const calc = data.calc;
    put(made.name, calc.word + calc.command + calc.site, () => h('span', {}), ' ', () => h('bdi',
      {class: 'mono'},
      calc.command), ' \u2192 ', () => h('bdi', {}, calc.site), ' ', () => h('span', {class:
      'mono soft small'}, calc.accept_id));
    state(made.name.firstChild, calc.word);
    reasons(made.why, data);
    actions(made, calc);
    timeline(made.chart, calc);
    stepTable(made.steps, calc);
    facts(made.facts, calc);
    files(made.inputs, 'inputs', calc.inputs);
    files(made.results, 'results', calc.results);
    follow(calc, made);
  };
}
function reasons(box, data) {
  const why = data.why, words = (text) => typeof text === 'string' ? text : text[S.lang ? 'ja' : 'en'];
  box.className = 'why' + (why.who === 'nobody' ? '' : ' person');
  put(box, JSON.stringify(why), () => h('p', {class: 'first'}, words(why.sentence)),
    () => h('p', {}, _('who', _('who_' + why.who, why.site))),
    () => why.command ? h('p', {}, _('types') + ' ', h('code', {class: 'type'}, why.command)) : '',
    () => words(why.changes) ? h('p', {}, _('changes', words(why.changes))) : '',
    () => why.long ? h('p', {}, _('long', words(why.long))) : '',
    () => why.again ? h('p', {}, words(why.again)) : '',
    () => why.users ? h('p', {}, _('others', why.users.slice(0, 20).join(', '))) : '',
    () => why.until ? h('p', {}, _('until', moment(why.until))) : '', () => h('p', {class: 'soft'}));
  const seen = (data.why_now || 0) - (data.seen || 0);
  set(box.lastChild, [why.since ? _('since', moment(why.since), span(now() - why.since)) : '',
    seen > 5 ? _('seen', span(seen)) : ''].filter(Boolean).join(' \u00b7 '));
}
function actions(made, calc) {
  const mine = S.may === 'all' || S.may === 'own' && calc.user === S.me;
  const stop = mine && ['registered', 'allowed', 'sending', 'sent', 'running'].indexOf(calc.state) >= 0
    && !calc.cancel;
  const again = mine && calc.state === 'got' && calc.status === 'abnormal';
  put(made.acts, stop + ' ' + again, () => stop ? h('button', {type: 'button',
    onclick: (event) => confirm_(made.form,
    event.target, 'cancel', 'cancel-wait-calc', calc.accept_id)}, _('cancel')) : '', () => again
      ? h('button',
    {type: 'button', onclick: (event) => confirm_(made.form, event.target, 'rerun', 'rerun',
      calc.accept_id)},
    _('rerun')) : '');
}
// The second step of an action: the last four characters of the id, and a reason.
function confirm_(place, from, key, name, id) {
  const wrong = h('p', {class: 'wrong', role: 'alert', id: 'why-not'}), last = id.slice(-4);
  const field = (name_, text) => [h('label', {for: name_}, text), h('input', {id: name_, autocomplete: 'off',
    spellcheck:
    'false', maxlength: 200, 'aria-describedby': 'why-not'})];
  const end = () => { place.textContent = ''; place.key = null; if (document.contains(from)) from.focus();
    else $('main').focus(); };
  const form = h('form', {class: 'confirm', 'aria-label': _(key + 'h'), onsubmit: async (event) => {
    event.preventDefault();
    if (id && $('last4').value.trim() !== last) { set(wrong, _('not4')); return $('last4').focus(); }
    if (!$('reason').value.trim()) { set(wrong, _('noreason')); return $('reason').focus(); }
    try {
      await call('POST', name, Object.assign({reason: $('reason').value.trim()}, id ? {accept_id: id}
        : {on: true}));
      end();
      say(_('done'));
    } catch (error) { set(wrong, failed(error)); }
  }, onkeydown: (event) => { if (event.key === 'Escape') end(); }}, h('strong', {}, _(key + 'h')), h('p', {},
    _(key +
    'says')), ...(id ? field('last4', _('last4', last)) : []), ...field('reason', _('reason')), wrong,
  h('div', {class: 'go'}, h('button', {class: 'danger'}, _(key + 'h')), h('button',
    {type: 'button',
    onclick: end}, _('no'))));
  place.textContent = '';
  place.append(form);
  form.querySelector('input').focus();
}
function maintain(event) {
  const old = $('maint-form');
  if (old) old.remove();
  if (old && old.firstChild) return event.target.focus();
  const place = h('div', {id: 'maint-form'});
  $('main').insertBefore(place, $('main').firstChild);
  if (!S.data.head.maintenance) return confirm_(place, event.target, 'maint', 'v2/maintenance', '');
  place.append(h('form', {class: 'confirm', 'aria-label': _('maintoff'), onsubmit: async (submit) => {
    submit.preventDefault();
    try { await call('POST', 'v2/maintenance',
      {on: false}); place.remove(); say(_('done')); $('main').focus(); }
    catch (error) { place.append(h('p', {class: 'wrong', role: 'alert'}, failed(error))); }
  }}, h('button', {class: 'danger'}, _('maintoff')), ' ', h('button', {type: 'button', onclick: () => {
    place.remove();
    $('maint').focus();
  }}, _('no'))));
  place.querySelector('button').focus();
}

// ---- the nine steps
// What was made when, as bars: [{lane, from, to, open, kind, attempt}].
function parts(calc) {
  const steps = calc.steps.slice().sort((a, b) => a[3] - b[3]), found = [], marks = [];
  const over = ['got', 'finished'].indexOf(calc.state) >= 0;
  steps.forEach(([attempt, number, name, at, note], i) => {
    const last = i === steps.length - 1;
    if (name === 'cancel-wait-calc' && (!last || !over)) { marks.push({at, i}); return; }
    const lane = ENDS.indexOf(name) >= 0 ? 8 : name === 'lapse' || name === 'rerun --force' ? 2 : number
      || 1;
    if (found.length) found[found.length - 1].to = at;
    found.push({lane, from: at, to: null, kind: KINDS[lane], attempt, i, open: false});
  });
  const end = found[found.length - 1];
  if (end && end.lane < 9) { end.to = Math.max(now(), end.from); end.open = true; }
  if (end && end.lane === 9) end.to = end.from;
  return {bars: found, marks, steps};
}
function bar(x, y, w, high, kind) {
  const all = h('g', {}, h('rect', {class: 'b-' + kind, x, y, width: w, height: high}));
  if (kind === 'move') for (let at = x + 3; at < x + w - 2; at += 7) all.append(h('circle', {class: 'dots',
    cx: at, cy: y +
    high / 2, r: 1.3}));
  return all;
}
const TICKS = [0.01, 0.1, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800,
604800, 2592000,
  7776000];
function timeline(box, calc) {
  const {bars, marks} = parts(calc), wide = Math.max(560, Math.min(1460, $('main').clientWidth - 44));
  if (!bars.length) return;
  const begin = bars[0].from, end = Math.max(bars[bars.length - 1].to, begin + 0.001), left = 188,
    right = 96, high = 20;
  const x = (at) => left + (at - begin) / (end - begin) * (wide - left - right), deep = high * 9 + 6;
  const tick = TICKS.find((t) => (end - begin) / t <= 7) || TICKS[TICKS.length - 1];
  const svg = h('svg', {width: wide, height: deep + 20, role: 'img', 'aria-label': _('timeh') + ': ' +
    _('timesum', span(
    end - begin))}, h('defs', {}, h('pattern', {id: 'hatch', width: 6, height: 6,
      patternUnits: 'userSpaceOnUse',
    patternTransform: 'rotate(45)'}, h('line', {class: 'hatch', x1: 0, x2: 0, y1: 0, y2: 6}))));
  for (let at = begin; at <= end; at += tick) {
    svg.append(h('line', {class: 'grid', x1: x(at), x2: x(at), y1: 0, y2: deep}), h('text', {class: 'took',
      x: x(at) + 3, y:
      deep + 14}, span(at - begin)));
  }
  for (let lane = 1; lane <= 9; lane++) svg.append(h('text', {class: 'lane', x: 0, y: lane * high - 4},
    lane +
    '  ' + _('s' +
    lane)));
  for (const one of bars) {
    const y = (one.lane - 1) * high + 4, from = x(one.from), w = Math.max(2, x(one.to) - from);
    const text = (one.lane === 9 ? '' : span(one.to - one.from) + (one.open ? ' \u2026' : '')) +
      (one.attempt > 1 && one.lane === 3 ? ' (' + _('attempt', one.attempt) + ')' : '');
    const next = bars.find((other) => other.lane === one.lane && other.from > one.from);
    svg.append(bar(from, y, w, high - 7, one.kind));
    // where there is no room for it, the table says it
    if (!next || from + w + 9 + text.length * 7 < x(next.from)) {
      svg.append(h('text', {class: 'took', x: from + w + 5, y: y + 10}, text));
    }
  }
  for (const one of marks) svg.append(h('line', {class: 'mark', x1: x(one.at), x2: x(one.at), y1: 0,
    y2: deep}));
  if (!box.firstChild) box.append(h('div', {class: 'scroll', tabindex: 0, role: 'region',
    'aria-label': _('timeh')}));
  const held = box.firstChild.scrollLeft;
  box.firstChild.textContent = '';
  box.firstChild.append(svg);
  box.firstChild.scrollLeft = held;
}
function stepTable(box, calc) {
  const {bars, steps} = parts(calc), byStep = new Map(bars.map((one) => [one.i, one]));
  if (!box.firstChild) box.append(table('steps', _('timeh'), [['h_step'], ['h_at'], ['h_what'], ['h_took',
    'num'],
    ['h_note']], true));
  rows(box.querySelector('tbody'), steps.map((step, i) => [step, byStep.get(i), i]), (one) => String(one[2]),
    () =>
    cells(h('tr', {}), ['head', '', '', 'num', 'wrap']), (row, [[attempt, number, name, at, note], one]) => {
    const c = row.c;
    set(c[0], number + ' ' + name + (attempt > 1 ? ' (' + _('attempt', attempt) + ')' : ''));
    set(c[1], moment(at).slice(0, -7));
    title(c[1], moment(at) + '  ' + utc(at));
    set(c[2], one ? _('s' + one.lane) : _('k_mark'));
    set(c[3], !one || one.lane === 9 ? '' : one.open ? _('going', span(one.to - one.from))
      : span(one.to - one.from));
    put(c[4], note, () => h('bdi', {}, note));
  });
}
function facts(list, calc) {
  const told = [['id', calc.accept_id], ['request_id', calc.request_id], ['c_user', calc.user],
    ['parameters',
    calc.parameters], ['exit', calc.exit_code], ['signal', calc.signal], ['reason', calc.reason
      || calc.cancel],
  ['waits', calc.waits], ['poller', calc.poller], ['attempt', calc.attempt || ''], ['registered',
    moment(calc.registered)],
  ['bytes', bytes(calc.bytes)], ['patterns', calc.patterns.join('  ')], ['verdicts',
    calc.verdicts.map(([code, count,
    names]) => code + ' ' + count + (names.length ? ': ' + names.join(', ') : '')).join('; ')]];
  const rows_ = told.filter((one) => one[1] !== null && one[1] !== '' && one[1] !== undefined);
  put(list, JSON.stringify(rows_), ...rows_.map(([key, value]) => () => {
    const both = document.createDocumentFragment();
    both.append(h('dt', {}, _(WORDS['f_' + key] ? 'f_' + key : key)), h('dd',
      {class: /id|parameters|patterns|poller/.test(key)
      ? 'mono' : null}, h('bdi', {}, String(value))));
    return both;
  }), () => { const both = document.createDocumentFragment();
    both.append(h('dt', {}, _('commands')), h('dd', {}, h('code', {class: 'type'},
      'mi_system_wf.py status ' +
      calc.accept_id.slice(0, 8)), ' ', h('code', {class: 'type'}, 'mi_dicomapi.py show ' +
        calc.accept_id.slice(0, 8))));
    return both; });
}
function files(box, key, [count, names]) {
  put(box, JSON.stringify(names) + count, () => h('h3', {}, _(key, count)), () => names.length ? h('dl', {},
    ...[].concat(
    ...names.map(([name, size, come]) => [h('dt', {class: 'num'}, bytes(size)), h('dd', {}, h('bdi',
      {class: 'mono'}, name),
      come ? '' : h('span', {class: 'soft'}, ' (' + _('notyet') + ')'))]))) : h('p', {class: 'soft'},
        _('none')),
  () => count > names.length && names.length ? h('p', {class: 'soft'}, _('andmore', count - names.length))
    : '');
}
// What the command prints: asked for when the relay says that there is more.
async function follow(calc, made) {
  const live = S.live, token = S.token;
  if (!live || live.busy) return;
  live.busy = true;
  try {
    for (const [i, stream] of [[0, 'out'], [1, 'err']]) {
      const one = live[stream];
      if (one.attempt !== calc.attempt) Object.assign(one, {attempt: calc.attempt, at: -1, from: 0,
        text: ''});
      if (one.at < 0) one.at = one.from = Math.max(0, calc.output[i] - TAIL);
      while (one.at < calc.output[i] && S.live === live && S.token === token) {
        const found = await call('GET', 'output', {accept_id: calc.accept_id, stream, offset: one.at});
        if (found.offset === one.at) break;
        one.at = found.offset;
        one.text = (one.text + new TextDecoder().decode(Uint8Array.from(atob(found.data),
          (c) => c.charCodeAt(0))))
          .slice(-TAIL);
      }
      if (S.live !== live) return;
      show(made[stream], one, calc.output[i], calc.step > 5);
    }
  } catch (error) { /* the next answer tries again */ } finally { live.busy = false; }
}
function show(pre, one, size, over) {
  const low = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 30;
  set(pre, one.text ? (one.from || size > TAIL ? _('cutoff', bytes(size)) + '\n' : '') + safe(one.text)
    : _(over ? 'silent_' : 'empty'));
  if (low) pre.scrollTop = pre.scrollHeight;
}

// ---- events
$('lang').addEventListener('click', () => {
  S.lang = 1 - S.lang;
  S.fill = S.live = null;
  if (S.data) draw();
  else if (!S.token) login('');
  header();
  $('lang').focus();
});
$('maint').addEventListener('click', maintain);
$('leave').addEventListener('click', () => login(_('left'), true));
$('skip').addEventListener('click', (event) => { event.preventDefault(); $('main').focus(); });
document.addEventListener('visibilitychange', () => {
  if (document.hidden) { ++S.turn; if (S.stop) S.stop.abort(); } else if (S.view && (S.data
    || S.token)) watch();
});
window.addEventListener('online', () => { if (S.data) watch(); });
window.addEventListener('hashchange', () => { if (S.data || S.token) route(); });
window.addEventListener('resize', () => { if (S.data && S.data.calc && S.fill) draw(); });
setInterval(() => {
  if (!document.hidden && S.data && S.fill) S.fill(S.data);
}, 10000);
const code = /^#link=([0-9A-Za-z_-]+)$/.exec(location.hash);
if (code) history.replaceState(null, '', location.pathname);
S.view = parse();
header();
if (code) redeem(code[1]); else start();
}());
"""


# ==== Japanese ====
JA = {
    "What this relay has seen of the audit logs at a site: the site's security officer compares "
    "it there (mi_system_remote.py audit verify --witness FILE).":
        "この中継が見た、サイトの監査ログの末尾の値を示します。サイトのセキュリティ担当者が先方で照合"
        "します (mi_system_remote.py audit verify --witness FILE)。",
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
    "the page is switched off ([Server] page)": "ページは無効になっています ([Server] page)",
    "auth = gateway: who comes is the gateway's to say; open %spage there":
        "auth = gateway: だれであるかはゲートウェイが決めます。そこで %spage を開いてください",
    "for user %s, roles %s; good once, within %d s:": "利用者 %s、役割 %s。一度だけ、%d 秒以内に有効:",
    "Prints a link that opens the page in a browser, once, within a minute: as this user, for 12 hours"
    " (login_hours).":
        "ブラウザーでページを開くためのリンクを表示します。1分以内に一度だけ使え、その利用者として12時間 (login_hours) 有効です。",
    "no: there is no page for browsers": "no: ブラウザー用のページを出しません",
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
    "undelivered": "未送付",
    "held": "公開承認待ち",
    "delivered": "送付済み",
    "kept": "受取拒否",
    "lost": "打ち切り",
    "out of contact": "連絡途絶",
    "Why one calculation is where it is: a sentence, who has to act, what to type, since when, what would"
    " change it.":
        "一つの計算がなぜ今の所にあるのかを示します。理由、対応する人、打つべき語、いつからか、何があれば変わるか。",
    "a user whose poller asks there: %s": "そこで問い合わせているポーラーの利用者: %s",
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
    "%(ahead)s before it": "前に %(ahead)s 件",
    "it was run again (attempt %(attempt)s): %(reason)s": "再実行されました (%(attempt)s 回目): %(reason)s",
    "of the last %(of)s runs of %(command)s there, eight in ten took %(low)s to %(high)s each":
        "そこでの直近 %(of)s 回の %(command)s は、十回に八回が %(low)s から %(high)s でした",
    "how long it takes is unknown: fewer than %(least)s runs of %(command)s have ended well there":
        "所要時間は不明です (そこでの正常終了が %(least)s 回に達していません: %(command)s)",
    "what changes it: %s": "変わる条件: %s", "seen %d s ago": "%d 秒前の情報です",
    "its result was fetched: nothing more is to come": "結果は受け取られています。この先はもう何もありません",
    "it ended well, and its result waits at the relay to be fetched": "正常に終わり、結果が中継サーバーで受け取りを待っています",
    "it is over when its result is fetched": "結果を受け取れば終わります",
    "somebody ended it: %(reason)s": "人の操作で終わりました: %(reason)s",
    "it was given up: %(reason)s": "打ち切られました: %(reason)s",
    "the external computer has not run it: %(reason)s": "外部計算機はこれを実行しませんでした: %(reason)s",
    "it ran for longer than the external computer lets it ([command] timeout), and was ended there":
        "外部計算機の制限時間 ([command] timeout) を超えたため、そこで終了させられました",
    "its command ended with %(code)s; that is the command's own end: its two logs say why":
        "コマンドが終了コード %(code)s で終わりました。コマンド自身の終わり方です。理由は二つのログにあります",
    "it ended abnormally: %(reason)s": "異常終了しました: %(reason)s",
    "rerun lets it run once more": "rerun でもう一度実行できます",
    "it goes on by itself": "自動で先へ進みます",
    "the relay's disk has no room for what is to come": "中継サーバーのディスクに、これから届くものを置く空きがありません",
    "room on the disk of state_dir ([limits] spool_free)":
        "state_dir のディスクに空きができれば進みます ([limits] spool_free)",
    "its inputs have not all come, and nobody sends them": "入力がそろっておらず、送られてもいません",
    "the same words once more send what is missing": "同じ語をもう一度実行すれば、足りない入力が送られます",
    "its inputs are on their way to the relay": "入力を中継サーバーへ転送しています",
    "the relay is in maintenance, and hands nothing out: %(reason)s":
        "中継サーバーは保守中で、計算を渡していません: %(reason)s",
    "the end of the maintenance": "保守が終われば進みます",
    "the relay was restored from a backup, and asks what the pollers hold before it hands anything out":
        "中継サーバーは控えから復元されたところで、計算を渡す前に、各ポーラーが持っている計算を尋ねています",
    "no poller of user %(user)s has ever asked for site %(site)s, but pollers of %(strangers)s other"
    " users have: a poller gets only what the user of its own token has registered":
        "利用者 %(user)s のポーラーがサイト %(site)s の計算を求めたことはありませんが、ほかの利用者 %(strangers)s 名のポーラーはあります。"
        "ポーラーが受け取れるのは、そのトークンの利用者が登録した計算だけです",
    "such a token in the token_file of that poller": "そのようなトークンをポーラーの token_file に置けば進みます",
    "no poller of user %(user)s has ever asked for site %(site)s, but one of this user asks for:"
    " %(elsewhere)s":
        "利用者 %(user)s のポーラーがサイト %(site)s の計算を求めたことはありませんが、この利用者のポーラーは次のサイトの計算を求めています: %(elsewhere)s",
    "the right [poller] site there": "外部計算機の [poller] site を正しくすれば進みます",
    "no poller of user %(user)s has ever asked for site %(site)s":
        "利用者 %(user)s のポーラーがサイト %(site)s の計算を求めたことは一度もありません",
    "a poller that is started there with a token of this user": "この利用者のトークンでポーラーを起動すれば進みます",
    "the token of the poller of site %(site)s has expired": "サイト %(site)s のポーラーのトークンは期限切れです",
    "the token of the poller of site %(site)s was revoked": "サイト %(site)s のポーラーのトークンは取り消されています",
    "a new token in its token_file: it takes that by itself": "新しいトークンを token_file に置けば、自動で使われます",
    "the external computer has it, but its poller, its host or the line is down; nothing is lost":
        "外部計算機がこの計算を持っていますが、ポーラー、計算機、回線のどれかが止まっています。何も失われていません",
    "it goes on when they are back": "元に戻れば先へ進みます",
    "the poller of site %(site)s does not ask any more: it was stopped, or its host or the line is down":
        "サイト %(site)s のポーラーから問い合わせが来なくなりました。停止されたか、計算機か回線が止まっています",
    "it is taken when the poller asks again": "ポーラーが再び問い合わせれば、計算が渡されます",
    "the poller of site %(site)s is paused": "サイト %(site)s のポーラーは受け付けを停止しています",
    "resume, or paused = no in its ini": "resume、または ini の paused = no で進みます",
    "the poller of site %(site)s is outside of its hours": "サイト %(site)s のポーラーは受け付け時間外です",
    "it is taken when its hours begin": "受け付け時間になれば、計算が渡されます",
    "the disk of the external computer %(site)s has no room": "外部計算機 %(site)s のディスクに空きがありません",
    "room in its calc_base (keep_free)": "calc_base のディスクに空きができれば進みます (keep_free)",
    "the poller of site %(site)s takes nothing new: it brings to its end what is there (--drain)":
        "サイト %(site)s のポーラーは新しい計算を受け付けず、手元の計算だけを終わらせています (--drain)",
    "a start without --drain": "--drain を付けずに起動すれば進みます",
    "the poller of site %(site)s asks only when it is started (--once)":
        "サイト %(site)s のポーラーは、起動されたときにだけ問い合わせます (--once)",
    "its next start (cron)": "次の起動 (cron) で進みます",
    "site %(site)s is busy with %(busy)s of %(jobs)s; %(ahead)s before it":
        "サイト %(site)s は実行中です (%(busy)s/%(jobs)s)。先に待っている計算は %(ahead)s 件です",
    "the end of one of them": "そのどれかが終われば進みます",
    "its inputs need %(need)s, and the external computer %(site)s has room for %(room)s":
        "入力には %(need)s が必要ですが、外部計算機 %(site)s の空きは %(room)s です",
    "the poller of site %(site)s is a fielded one and is not shown this: it takes no parameters,"
    " patterns, directories in inputs' names, or more than 2 GiB":
        "サイト %(site)s のポーラーは従来版のため、この計算は渡せません。パラメータ、パターン、ディレクトリを含む入力名、2 GiB を超える入力は扱えません",
    "the new poller there": "新しいポーラーに替えれば進みます",
    "the poller of site %(site)s is a fielded one, which does not tell whether it is busy, or there at"
    " all":
        "サイト %(site)s のポーラーは従来版のため、実行中なのか、そもそも動いているのかを知らせません",
    "it is taken when the poller asks": "ポーラーが問い合わせれば、計算が渡されます",
    "the poller of site %(site)s does not tell why it takes nothing (an older version, or tell = no)":
        "サイト %(site)s のポーラーは、受け付けない理由を知らせません (古い版、または tell = no)",
    "the poller of site %(site)s takes work; %(ahead)s before it":
        "サイト %(site)s のポーラーは受け付けています。先に待っている計算は %(ahead)s 件です",
    "the external computer is to stop it: %(reason)s": "外部計算機に停止を指示しています: %(reason)s",
    "a fielded poller has it, which tells nothing before its end": "従来版のポーラーが持っており、終わるまで何も知らせません",
    "its end": "終わりを待っています",
    "the batch system of site %(site)s has not begun it: %(what)s":
        "サイト %(site)s のバッチシステムはまだ開始していません: %(what)s",
    "what its batch system waits for": "バッチシステムが待っているものが満たされれば進みます",
    "the external computer has taken it, and fetches its inputs": "外部計算機が受け取り、入力を転送しています",
    "its command runs, but has written nothing for a while": "コマンドは実行中ですが、しばらく何も出力していません",
    "its end, or cancel": "終わりを待つか、cancel で止めてください",
    "its command runs": "コマンドを実行中です",
    "its command has ended, and its result is held for a person at the external computer %(site)s":
        "コマンドは終わり、結果は外部計算機 %(site)s で担当者の公開承認を待っています",
    "release or refuse, by that person": "担当者の release または refuse",
    "its command has ended, and its result waits there: the relay has not taken it":
        "コマンドは終わり、結果が外部計算機で待っています。中継サーバーがまだ受け取っていません",
    "resend tries it at once": "resend ですぐに送り直します",
    "its command has ended, and its results are on their way": "コマンドは終わり、結果を転送しています",
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
    "leave what it has made": "作ったものを残します",
    "The running relay's figures, for node_exporter's textfile collector (Prometheus asks GET /metrics).":
        "動作中の中継サーバーの数値を表示します (node_exporter の textfile コレクター用。Prometheus は GET /metrics で読みます)。",
    "the relay does not answer: %(why)s": "中継サーバーが応答しません: %(why)s",
    "the relay's disk has %(free)s left; with less than %(keep)s it takes nothing new":
        "中継サーバーのディスクの空きは %(free)s です。%(keep)s を下回ると新しいものを受け付けません",
    "the relay's certificate (%(what)s) ends on %(day)s": "中継サーバーの証明書 (%(what)s) の期限は %(day)s です",
    "the last backup of the relay was made on %(day)s": "中継サーバーの最後の控えは %(day)s のものです",
    "no backup of the relay was made yet": "中継サーバーの控えがまだ作られていません",
    "the pollers of site %(site)s do not ask any more": "サイト %(site)s のポーラーから問い合わせが来なくなりました",
    "%(count)d results of site %(site)s could not be delivered, the oldest since %(day)s":
        "届けられない結果が %(count)d 件あります (サイト %(site)s、最も古いものは %(day)s から)",
    "the token of user %(user)s for %(what)s ends on %(day)s":
        "利用者 %(user)s のトークン (%(what)s) の期限は %(day)s です",
    "%(count)d calculations of user %(user)s wait for site %(site)s since %(day)s: %(why)s":
        "実行待ちの計算が %(count)d 件あります (利用者 %(user)s、サイト %(site)s、%(day)s から): %(why)s",
    "%(id)s (%(what)s on %(site)s) has ended: %(why)s": "%(id)s (%(what)s、サイト %(site)s) が終わりました: %(why)s",
    "and %d more": "ほか %d 件",
    "this is the last message for a day: what comes is told together then":
        "一日の上限に達しました。この後のことは、後でまとめてお知らせします",
    "%d things to know": "お知らせ %d 件",
    "over: %s": "解消: %s",
    "[notify] url = %s: https://HOST:PORT, as others call the relay":
        "[notify] url = %s: 中継サーバーの https://ホスト:ポート を書いてください",
    "%s: others may read it; chmod 600": "%s: ほかの人が読めます。chmod 600 してください",
    "%s: holds no token": "%s: トークンが入っていません",
    "%s: [notify] %s is not set": "%s: [notify] %s が書かれていません",
    "%s: another notify is running on this directory": "%s: 別の notify がこのディレクトリで動いています",
    "the relay answers, and takes the token": "中継サーバーが応答し、トークンも有効です",
    "a test: nothing has happened": "テストです。何も起きていません",
    "hook, for %s: %s": "フック (%s 宛て): %s",
    "tries the way to the relay, and the hook, once": "中継サーバーへの通信とフックを一度試します",
    "Waits at the relay for what somebody should know, and tells it by the hook of [notify]; --test: is all"
    " well, and does the hook take a message?":
        "知らせるべきことを中継サーバーで待ち、[notify] のフックで知らせます。--test: 設定の確認と、フックへのテスト送信。",
    "no backup was made yet (from cron, for example: backup DIR)":
        "控えがまだ作られていません (例えば cron で: backup ディレクトリ)",
    "the last backup, %s of %s, is not there any more (moved elsewhere?)":
        "最後の控え %s (%s) はもうそこにありません (移動されましたか)",
    "the last backup: %s of %s; its database: %s": "最後の控え: %s (%s)。データベース: %s",
    "some of workflow, remote, operator, viewer, metrics":
        "workflow、remote、operator、viewer、metrics のうちのいくつか",
    "for these external computers only": "この外部計算機だけ",
    "good for so long (default: token_days of the ini)": "有効な日数 (既定: ini の token_days)",
    "only at what an older version has left": "古い版が残したものだけを調べます",
    "all that are kept, finished ones too": "残っているすべての計算 (終わったものも)",
    "why, for who looks later": "理由 (後で見る人のため)",
    "also what is out of contact; its late result is refused": "連絡途絶の計算も。遅れて届いた結果は拒否されます",
    "A whole calculation on this machine, over TLS: relay, poller, workflow side, a secret that stays.":
        "この計算機だけで一つの計算をすべて行います (TLS、中継、ポーリング、ワークフロー側、外へ出ない秘密)。",
    "Issues a token for this user. It is shown once.": "この利用者のトークンを発行します。表示は一度だけです。",
    "The tokens: whose, for what, until when, when last used.": "トークンの一覧: 利用者、役割、期限、最後に使われた時。",
    "Makes a token void at once; NUMBER is that of `token list`.":
        "トークンを即座に無効にします。NUMBER は `token list` の番号です。",
    "Lets a user log in with a password (auth = login), which is asked for without echo.":
        "利用者がパスワードでログインできるようにします (auth = login)。パスワードは画面に出さずに尋ねます。",
    "Gives a user a new password; what was logged in with the old one ends.":
        "利用者の新しいパスワードを決めます。前のパスワードでのログインは無効になります。",
    "Takes a user away, with all tokens.": "利用者を、すべてのトークンとともに削除します。",
    "Who may log in with a password.": "パスワードでログインできる利用者の一覧です。",
    "Looks at ini, files, certificate, disk, limits, tokens, and at the running relay: OK, WARN or FAIL,"
    " and what to do.":
        "ini、ファイル、証明書、ディスク、上限、トークン、動作中の中継サーバーを調べ、OK・WARN・FAIL と、するべきことを示します。",
    "The calculations that are not finished (explain: why one waits).":
        "終わっていない計算の一覧 (待つ理由は explain)。",
    "Lets what ended abnormally run once more, before its result was fetched.":
        "異常終了した計算を、結果が受け取られる前に、もう一度実行させます。",
    "When each step of each attempt was made, also of calculations that are removed by now.":
        "各段階がいつ行われたか (試行ごと、削除済みの計算も)。",
    "12h, 7d, or a date like 2026-11-20": "12h、7d、または 2026-11-20 のような日付から",
    "the external computer": "外部計算機の識別子",
    "the user whose calculations they are": "計算の利用者",
    "for a spreadsheet": "表計算ソフト用 (CSV)",
    "New calculations and claims again.": "新しい計算の受け付けと受け渡しを再開します。",
    "%s USER: a user without blanks": "%s USER: 利用者名に空白は使えません",
    "kept since %s ([times] keep_history)": "%s 以降の記録です ([times] keep_history)",
    "--since: a time ago (12h, 7d) or a date (2026-11-20, 2026-11-20T21:47), not %s":
        "--since: 何時間前・何日前か (12h、7d)、または日付 (2026-11-20、2026-11-20T21:47) を書いてください。%s は使えません",
    "The sites with their pollers: whether each takes work or why not, when it was heard, what waits for it.":
        "サイトとそのポーラーの一覧です。それぞれが仕事を受け付けているか、受け付けていなければその理由、最後に連絡があった時刻、待っている計算を示します。",
    "Serves as the ini says, until SIGTERM or Ctrl+C. SIGHUP: opens the log anew, reads the ini again.":
        "ini のとおりに動作します (SIGTERM か Ctrl+C まで)。SIGHUP: ログを開き直し、ini を読み直します。",
    "Prints a systemd unit for `serve` with this ini.": "この ini での `serve` の systemd ユニットを出力します。",
    "Everything about one calculation. Of the id the first eight characters do.":
        "一つの計算のすべて。ID は最初の 8 文字で足ります。",
    "Ends a calculation; what its command has written so far comes back.":
        "計算を終わらせます。それまでの出力は戻ります。",
    "Ends what is claimed and whose external computer will not come back.":
        "外部計算機がもう戻らない計算を終わらせます。",
    "No new calculations and claims; what runs is brought to its end.":
        "新しい計算を受け付けず、渡しません。実行中の計算は最後まで進みます。",
    "Copies the whole state into a new directory, while the relay runs.":
        "動作中に、すべての状態を新しいディレクトリに写します。",
    "Makes a new state_dir of a backup. At its next start the relay asks the pollers what they hold.":
        "控えから新しい state_dir を作ります。次の起動で、外部計算機が持っている計算を尋ねます。",
    "example:": "例:",
    # shared
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
    # start and configuration
    "[Server] certfile and keyfile: both or neither": "[Server] certfile と keyfile は両方指定するか、両方省いてください",
    "[Server] auth = gateway needs trusted_proxies (the gateway's addresses)":
        "[Server] auth = gateway には trusted_proxies (ゲートウェイのアドレス) が必要です",
    "[Server] gateway_secret_file is for auth = gateway":
        "[Server] gateway_secret_file は auth = gateway のときだけのものです",
    "[Server] gateway_secret_file = %s: others may read it; chmod 600":
        "[Server] gateway_secret_file = %s: 他人が読める状態です。chmod 600 としてください",
    "[Server] gateway_secret_file = %s: one line, `Header-Name: secret`, the secret of 16 characters or more":
        "[Server] gateway_secret_file = %s: 「ヘッダー名: 秘密の文字列」の一行とし、秘密は 16 文字以上にしてください",
    "only the gateway itself is let in": "ゲートウェイ自身だけを受け入れます",
    "any process on %s can be any user: set gateway_secret_file, or client_ca, so that only the gateway"
    " itself is let in":
        "%s 上のどのプロセスも、どの利用者にもなりすませます。gateway_secret_file か client_ca を設定し、ゲートウェイ自身だけを受け入れてください",
    "[Server] operators is for auth = gateway; here: token issue USER --roles operator":
        "[Server] operators は auth = gateway のときだけのものです。ここでは token issue USER --roles operator としてください",
    "[Server] client_ca needs certfile and keyfile": "[Server] client_ca には certfile と keyfile が必要です",
    "[limits] workers must be at least 4, max_body 64K, connections 16, min_rate 1, lanes_per_token 1":
        "[limits] workers は 4、max_body は 64K、connections は 16、min_rate と lanes_per_token は 1 以上にしてください",
    "[Server] portnumber = %d: is not a port": "[Server] portnumber = %d: ポート番号ではありません",
    "[Server] ipaddress = %s: plain http beyond this host would show tokens to the network; set certfile"
    " and keyfile, or, behind a gateway that does the TLS, auth = gateway with trusted_proxies (or"
    " plain_http = yes, in a closed laboratory)":
        "[Server] ipaddress = %s: 平文の http ではトークンがネットワークから見えます。certfile と keyfile を設定するか、TLS を行うゲートウェイの後ろなら"
        " auth = gateway と trusted_proxies を設定してください (閉じた実験室なら plain_http = yes)",
    "[RemoteSites] remote_site_ids: %s cannot be a site id": "[RemoteSites] remote_site_ids: %s は識別子に使えません",
    "[%s] is neither a section nor in remote_site_ids%s": "[%s] はセクションの名前でも remote_site_ids にある識別子でもありません%s",
    "[Server] %s = %s: is not there or not readable": "[Server] %s = %s: ファイルがないか、読めません",
    "[Server] certfile, keyfile, client_ca: %s": "[Server] certfile, keyfile, client_ca: %s",
    "[Server] certfile = %s: expired on %s; renew it": "[Server] certfile = %s: %s に期限が切れています。更新してください",
    "[Server] ipaddress = %s: %s": "[Server] ipaddress = %s: %s",
    "cannot listen on %s port %d: %s": "%s のポート %d で待ち受けできません: %s",
    "%s: belongs to another user; run as that user, or set [Server] state_dir":
        "%s: 別のユーザーの所有です。そのユーザーで実行するか、[Server] state_dir を設定してください",
    "%s: %s; set [Server] state_dir to a directory of yours": "%s: %s。[Server] state_dir に自分のディレクトリを設定してください",
    "%s: a relay of an older version runs on it: restart it as this version first":
        "%s: 古い版の中継サーバーが動いています。先にこの版で起動し直してください",
    "%s: written by this version (schema %d)": "%s: この版のものです (スキーマ %d)",
    "%s: schema %d; the next start copies it to %s.schema%d and upgrades it to %d; %d unfinished"
    " calculations go on":
        "%s: スキーマ %d。次の起動時に %s.schema%d へ複製してから %d に更新します。未完了の計算 %d 件は続きます",
    "%s: another relay is running on this directory": "%s: このディレクトリでは別の中継サーバーが動作中です",
    "%s: was written by a newer version of this program (schema %d)": "%s: このプログラムの新しい版が書いたものです (schema %d)",
    "%s: this file system cannot hold it (NFS?); set [Server] state_dir to a local disk":
        "%s: このファイルシステムには置けません (NFS?)。[Server] state_dir をローカルディスクにしてください",
    "%s: %s": "%s: %s",
    # the operator's commands
    "new password for %s: ": "%s の新しいパスワード: ",
    "once more: ": "もう一度: ",
    "that was not the same": "二つの入力が一致しません",
    "a password has at least 10 characters": "パスワードは 10 文字以上にしてください",
    "user %s is there already (user passwd %s)": "ユーザー %s はすでにいます (user passwd %s)",
    "there is no user %s (see user list)": "ユーザー %s はいません (user list を参照)",
    "user %s: done; the relay knows within a second": "ユーザー %s: 完了しました。中継サーバーには 1 秒以内に伝わります",
    "--roles: some of %s": "--roles: %s から選んでください",
    "--sites: %s is not in [RemoteSites] remote_site_ids":
        "--sites: %s は [RemoteSites] remote_site_ids にありません",
    "token for user %s, roles %s, sites %s, until %s; shown only now, keep it in a file of mode 0600:":
        "トークン: ユーザー %s、役割 %s、識別子 %s、期限 %s。表示は今回だけです。モード 0600 のファイルに保存してください:",
    "token %s is revoked; the relay knows within a second": "トークン %s を無効にしました。中継サーバーには 1 秒以内に伝わります",
    "standard output leads nowhere": "標準出力の先がありません",
    "token issue: nobody has seen the token (%s); it is revoked":
        "token issue: トークンを表示できませんでした (%s)。このトークンは失効させました",
    "token revoke: there is no valid token %s (see token list)":
        "token revoke: 有効なトークン %s はありません (token list を参照)",
    "%s: which one? %s": "%s: どれですか。%s",
    ", out of contact": "、連絡途絶",
    "maintenance is on (%s): no new calculations and claims until `maintenance off`":
        "メンテナンス中です (%s)。`maintenance off` まで新しい計算と取得は受け付けません",
    "the relay that runs has [%s] %s = %s still (ini: %s): restart it":
        "動作中の中継サーバーは [%s] %s = %s のままです (ini では %s)。再起動してください",
    "token issue: a token that is good for %s days is none; say --days N, more than 0 (or [times]"
    " token_days)":
        "token issue: 有効期間 %s 日のトークンは使えません。--days に 0 より大きい日数を指定してください (または [times] token_days)",
    "%s is not there yet, and this user may not make it in %s: mkdir and chown it (below /var/lib the"
    " systemd unit does)":
        "%s はまだなく、このユーザーは %s に作れません。mkdir と chown で用意してください (/var/lib の下なら systemd のユニットが作ります)",
    "%s: no such calculation (see list --all)": "%s: その計算はありません (list --all を参照)",
    "no relay answers on %s; start it, then say it again": "%s では中継サーバーが応答しません。起動してからもう一度実行してください",
    "maintenance is %s": "メンテナンス: %s",
    "%s: exists already; a backup goes into a new directory": "%s: すでにあります。バックアップ先は新しいディレクトリにしてください",
    "%s: %d files of the spool and the database (%d files went meanwhile)":
        "%s: スプールの %d ファイルとデータベース (途中で消えたもの %d)",
    "%s: is not a backup of this program": "%s: このプログラムのバックアップではありません",
    "%s: holds a state already; move it away first": "%s: すでに状態があります。先に移動してください",
    "restored into %s; start the relay: for the first %d s it only listens to what the pollers hold":
        "%s に復元しました。中継サーバーを起動してください。最初の %d 秒は各ポーラーの保持状況を聞くだけです",
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
    "site %s: no commands; nothing can be asked of it": "識別子 %s: コマンドがなく、何も依頼できません",
    "sites: %s; commands: %d": "識別子: %s、コマンド: %d",
    "no sites: name them in [RemoteSites] remote_site_ids, each with a section of its own":
        "識別子がありません: [RemoteSites] remote_site_ids に書き、それぞれのセクションを作ってください",
    "%s is not there yet; the first start makes it": "%s はまだありません。最初の起動で作られます",
    "no TLS here: it is the gateway's": "ここでは TLS を使いません (ゲートウェイが行います)",
    "no TLS: for this host only": "TLS なし: この計算機の中だけです",
    "certificate: %s is not known here (DNS); clients need it": "証明書: %s を解決できません (DNS)。クライアントには必要です",
    "a relay answers on port %d": "ポート %d で中継サーバーが応答しました",
    "nothing answers on port %d: %s": "ポート %d で応答がありません: %s",
    "the relay that runs shows another certificate than %s: restart it":
        "動作中の中継サーバーの証明書が %s と違います。再起動してください",
    "tokens: %d good, %d of them end within 14 days": "トークン: 有効 %d、うち 14 日以内に期限切れ %d",
    "no good token: token issue USER": "有効なトークンがありません: token issue USER",
    "users with a password: %d": "パスワードのあるユーザー: %d",
    # the demonstration
    "relay, external computer and workflow side on this machine, in %s": "中継・外部計算機・ワークフロー側をこの計算機で動かします (%s)",
    "TLS with a throw-away certificate": "使い捨ての証明書による TLS",
    "no openssl here: plain http on loopback, for this demonstration only":
        "openssl がないため、この実演に限りループバックの平文 http を使います",
    "the external computer allows one command (%s) and holds one secret table (%s)":
        "外部計算機は一つのコマンド (%s) だけを許可し、一つの秘密の表 (%s) を持っています",
    "the workflow side sends %s and asks for life.json; the nine steps, as each side tells them:":
        "ワークフロー側は %s を送り life.json を求めます。九つの手順を各側の言葉で示します:",
    "result:           %s": "結果:             %s",
    "workflow side:    %s (the result, and both logs)": "ワークフロー側:   %s (結果と二つのログ)",
    "external computer: %s (working directory; the secret beside it)": "外部計算機:       %s (作業ディレクトリ。秘密の表はその外)",
    "relay:            %s (state.sqlite3, and the spool)": "中継:             %s (state.sqlite3 とスプール)",
    "the secret table was looked for in all %d files (%d bytes) of relay and workflow side: not there":
        "中継とワークフロー側の全 %d ファイル (%d バイト) で秘密の表を探しました: ありません",
    "demo: the %s did not get there; its last line: %s": "demo: %s が進みませんでした。最後の行: %s",
    "demo: no result came back: %s; the command's last line: %s (demo --keep keeps the files)":
        "demo: 結果が戻りませんでした: %s。コマンドの最後の行: %s (demo --keep でファイルを残せます)",
    "demo: the secret left the external computer: %s": "demo: 秘密が外部計算機から漏れました: %s",
    "demo: %s is not there; put the scripts of the suite into one directory":
        "demo: %s がありません。一式のスクリプトを同じディレクトリに置いてください",
    "must be an absolute path (from here: %s)": "絶対パスで書いてください (ここからは %s)",
    "kept: %s": "残してあります: %s",
    "all processes are ended, and %s is removed: nothing is left behind": "すべてのプロセスを終了し、%s を削除しました。何も残っていません",
    "%s: a certificate for %s; a relay that runs takes it up by itself":
        "%s: %s の証明書を作りました。動いている中継サーバーは自動で使い始めます",
    "the relay is in %s; start it:":
        "中継サーバーは %s にあります。起動:",
    "%s: was not made by init; say --dir DIR, a new directory":
        "%s: init が作ったものではありません。--dir で新しいディレクトリを指定してください",
    "init needs %s; --help says more":
        "init には %s が必要です。--help に説明があります",
    "%s: holds something else already; say --dir DIR, a new directory":
        "%s: すでに別のものが入っています。--dir で新しいディレクトリを指定してください",
    "--name: the relay's certificate is for %s; init --renew --name NAME... makes one for other names":
        "--name: 中継サーバーの証明書は %s のものです。ほかの名前の証明書は init --renew --name 名前... で作れます",
    "%s: is there already; move it away, then init makes a new one, with a new code":
        "%s: すでにあります。ほかへ移せば、init が新しい登録コードの入った新しいものを作ります",
    "%s: is a certificate for no host (subjectAltName)":
        "%s: どのホストの証明書でもありません (subjectAltName)",
    "%s: its certfile was not made by init; renew it as it was made":
        "%s: certfile は init が作ったものではありません。作ったときの方法で更新してください",
    "%s: the CA itself ends in %d days: make a new relay in a new directory, and new kits":
        "%s: 認証局そのものの期限が %d 日後です。新しいディレクトリに中継サーバーと一式を作り直してください",
    "%s %s: a word without blanks and without any of []#;=:{}%%/\\,*?":
        "%s %s: 空白と []#;=:{}%%/\\,*? を含まない語を指定してください",
    "--name %s: a host's name or address, with :PORT or without":
        "--name %s: ホスト名かアドレス (必要なら :ポート番号 を付けて) を指定してください",
    "openssl %s: failed: %s":
        "openssl %s: 失敗しました: %s",
    "for the admin of %s: copy the kit there, and start it:":
        "%s の管理者のための一式。外部計算機へ写し、起動します:",
    "for the modules of %s, on this host or another one of the workflow system:":
        "%s のモジュールのための一式。この計算機か、ワークフローシステムのほかの計算機で:",
    "sum of its SHA256SUMS, for whoever receives it to compare: %s":
        "SHA256SUMS の sha256 (受け取る人が照合します): %s",
    "its code is good once, until %s":
        "登録コードは一度だけ、%s まで有効です",
    "%s: belongs to another user; remove it, or say --dir DIR":
        "%s: ほかの利用者のものです。消すか、--dir で別のディレクトリを指定してください",
    "%s: another init is at work there":
        "%s: 別の init が作業中です",
    "%s: %s; say --dir DIR, in a directory of yours":
        "%s: %s。--dir で、書き込めるディレクトリの中を指定してください",
    "openssl: %s; it makes the certificate: install it":
        "openssl: %s。証明書を作るために必要です。インストールしてください",
    "%s: %s; put the scripts of the suite into one directory":
        "%s: %s。各スクリプトを一つのディレクトリに置いてください",
    "no token yet; %d codes of kits wait for their first start":
        "トークンはまだありません。一式の登録コード %d 個が最初の起動を待っています",
    "what others call the relay's host: names, addresses; the first stands in the kits":
        "相手から見た中継サーバーの名前やアドレス。最初のものが一式に書かれます",
    "words that workflows may ask of the site, beside hello":
        "hello のほかに、その外部計算機に頼めるコマンドの語",
    "where it is made (default: mi_relay, here)":
        "作る場所 (既定: ここの mi_relay)",
    "only a new certificate, by the CA that is there":
        "今の認証局で証明書だけを作り直す",
    "Makes all that a relay needs in a new directory: ini, CA, certificate, state; and kits: for the"
    " external computer, for the modules. Later: kits for another site or user. Nothing is overwritten.":
        "中継サーバーに必要なもの (ini、認証局、証明書、状態) を新しいディレクトリに作り、外部計算機とモジュールのための一式も作ります。あとからほかの外部計算機や利用者の一式を加えられます。"
        "上書きはしません。"
}


if __name__ == "__main__":
    run_as_program(main)
