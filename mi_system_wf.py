#!/usr/bin/env python3
"""The workflow side of a calculation on an external computer (the WebAPI way).

Run by a workflow module (or a person) on the workflow system: registers a calculation at the relay
(mi_dicomapi.py), sends its inputs, waits, and puts the declared results into the current directory. Needs
this one file, Python 3.6 or newer and a token.

usage: mi_system_wf.py run SITE COMMAND --in INPUT... --out RESULT... [--param TEXT] [--allow-refused]
       mi_system_wf.py submit SITE COMMAND ...      as run, but prints the ACCEPT_ID and does not wait
       mi_system_wf.py wait ACCEPT_ID...            waits and fetches (several: each into DIR/ACCEPT_ID/)
       mi_system_wf.py result ACCEPT_ID...          fetches what is there already (elsewhere than it was
                                                    ordered: with --out RESULT...)
       mi_system_wf.py status ACCEPT_ID...          one line for each
       mi_system_wf.py list [--all] [--watch]       all your calculations
       mi_system_wf.py explain ACCEPT_ID...         why each waits, who has to act, what to type
       mi_system_wf.py output ACCEPT_ID [--follow]  what the command has written so far (run and wait show it
                                                    as it comes, unless -q)
       mi_system_wf.py cancel ACCEPT_ID... [--reason TEXT]      ends it; what it has written so far comes back
       mi_system_wf.py rerun ACCEPT_ID... [--force --reason TEXT]      once more: what ended abnormally; with
                                                    --force what is out of contact
       mi_system_wf.py check [SITE [COMMAND]]       looks at this host and the way to the relay, line by line
                                                    OK, WARN or FAIL
       mi_system_wf.py keygen FILE [USER]           a key to sign orders with (--sign-key FILE)
       mi_system_wf.py login [USER]                 asks for the password (relays with auth = login), keeps
                                                    the token in token_file
       mi_system_wf.py BASE_URL SITE TOKEN COMMAND IN1:IN2:... OUT1:OUT2:... ["PARAMETERS"]
                                                    (TOKEN may be fd:N, an open descriptor)
INPUT is FILE, NAME=PATH, or DIR/ with all that is below it; RESULT a name or a pattern (* ? ** and DIR/).
Both logs of the command come back always. A module that was killed finds its calculation again if it starts
with the same --request-id.
In Python: run(url, site, command, inputs, outputs, token=...) returns a Result or raises Stop; submit() a
future, as_completed(), attach(): many at once.

exit codes: the command's own (128+N: ended by signal N), with BASE_URL ...: 1 if the calculation ended
abnormally, else 0. A fielded relay does not tell the command's own: then 0, or 1 if the calculation ended
abnormally. Otherwise
0 done, 64 usage (or an id that nobody knows, or whose inputs were others), 65 a result is missing that was
declared by name, or one of a pattern could not or must not come (refused, limit, name, unreadable, changing;
refused: not with --allow-refused), 66 an input is missing (here, or at the relay and nobody sends it), 69
relay unavailable, or the calculation was lost, 70 bug, 74 input/output or disk full (also the external
computer's), 75 try again later (also after SIGTERM: the calculation runs on), 76 protocol (or the inputs did
not reach the external computer), 77 refused by a list, a guard or for lack of permission (cancel: it has
ended already; rerun: it is not in a state for that), 78 configuration, 130 after Ctrl+C (the calculation runs
on), or the calculation was cancelled before its command began (a command that is stopped ends by a signal,
mostly 143). After --deadline the calculation is cancelled, its logs are fetched, and the code is 75, unless
the command came to its own end in that moment

contents (grep -n '^# ====' prints them with their lines):
  shared: alone                 no module is taken from where results arrive
  the nine steps                registering, waiting, fetching, the verdict
  what people see               lines while it runs, the last line, failures
  what this side remembers      what was declared: nothing else is stored
  inputs, results, token        what was asked for
  many at once                  futures, for Python programs and notebooks
  command line                  the words, one function for each
  fielded                       the nine steps in the words of a relay of before ("v1")
  shared: store                 how results get into a directory of this side
  shared: names                 names of files: checked by every receiver
  shared: wire                  the relay's client
  shared: lanes                 large files over several connections at once
  shared: pieces                files that come in pieces, in any order
  shared: stream                fielded bodies, which hold whole files, pass as streams
  shared: reach                 `check` of the way to the relay, and `login`
  shared: refusals              what is refused for, in the reader's language
  shared: sign                  signatures are made by ssh-keygen or openssl
  shared: cause                 why a calculation is where it is, for people
  shared: check
  shared: ini
  shared: usage                 words and options, --help, --version
  shared: table                 lists: columns, states in words, drawn anew
  shared: say
  tables                        words and options, keys of the ini, exit codes
  Japanese

threads: everything happens in the main thread, which alone gets signals (of a Pool of futures: in its three
threads, and in those that submit). Beside it: a thread that draws the
terminal's line, one for each wait for a name server, one that ends the program some seconds after SIGTERM.
One lock (SAY's): whoever writes to people holds it.
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
import errno
import io
import json
import os
import re
import socket
import ssl
import stat
import threading
import time

PROGRAM, VERSION = "mi_system_wf", "1.0"
PATIENCE = 60       # seconds that the relay may be away before anything is registered; from then on: for ever
INPUTS_IDLE = 60  # seconds without anything of a calculation's inputs after which to wait for them is in vain
WAIT = 50                   # seconds of one waiting call (companies' proxies cut silent connections after 60)
PAGE, NEXT_PAGE = 2000, 1000   # entries of a list in the first call (it is known again by them), in others
FEW = 100                     # up to so many results each is synced to the disk by itself, beyond all at once
# bytes of stderr without a terminal besides the last line (a reader of stdout alone dead-locks at 64 KiB)
STDERR_LIMIT = 12 << 10
LEAVE = 15              # seconds after SIGTERM until it ends in any case, even if nobody reads what it prints
TERM_PATIENCE = 5              # seconds for --on-term cancel: a batch system kills soon after its SIGTERM
CANCEL_PATIENCE = 120       # seconds after --deadline in which a cancelled calculation should come to its end
# bytes of output that, not shown while the command ran, are shown from its log at the end
OUTPUT_REST = 64 << 10
MOST_LINKS = 10000         # directory links that are followed in one input: more of them lead round and round
MONTHS = 4                   # for so many calendar months this side remembers what a calculation has declared
VERDICT_NAMES = 100                    # names that a verdict tells, at most
KEPT_WORDS = 20                # missing files that a line names, at most
NOTHING = b"/dev/null"         # path of an input that is not there
V1_MARK = "mi_distcomp_request"                        # key in a calc-info
# exit code where a fielded relay says that the calculation ended abnormally: it does not tell how
V1_ABNORMAL = 1
ONCE = ("nonce", "not_before", "expires", "user")      # what of an order is another one each time


# ==== the nine steps ====
Result = collections.namedtuple("Result",
                                "accept_id exit_code status reason files missing refused ended_by verdicts")
# verdicts: {code: {"count", "names"}} of what was asked for and is not here
Result.__new__.__defaults__ = ({},)
# an empty directory's name ends with /
Input = collections.namedtuple("Input", "path size name sum256 x mtime")
Order = collections.namedtuple("Order", "site command parameters names patterns request_id")
# agreed: may what is there be replaced?
Wanted = collections.namedtuple("Wanted", "names patterns agreed allow_refused signed")
Wanted.__new__.__defaults__ = ("",)                    # the order, as it was signed

# why a result is not here
VERDICTS = ("missing", "refused", "limit", "name", "unreadable", "changing", "outside", "special", "held")
# those that make it incomplete, also where a pattern asked for it
INCOMPLETE = {"refused", "limit", "name", "unreadable", "changing"}
ACCEPT_ID = re.compile(r"[0-9A-Za-z-]{8,64}\Z")         # an accept_id: it becomes part of URLs and file names


def run(url, site, command, inputs, outputs, parameters="", token=None, token_file="", ca_file="",
        request_id=None, to=".", client_cert="", client_key="", proxy="", patience=PATIENCE, tell=None,
        allow_refused=False, sign_key="", require_signed_by=""):
    """A calculation from registration to result, for Python programs: the Result.

    inputs, outputs: lists of texts as on the command line (a text alone: one). token: a text, or a function
    that returns one (it may be renewed meanwhile); otherwise token_file, MI_DISTCOMP_TOKEN or a systemd
    credential. to: the directory for the results. patience: seconds that the relay may be away before
    anything is registered. tell: called with a line at every change. allow_refused: no failure if the
    external computer's rules keep what a pattern asked for. sign_key, require_signed_by: files, as on the
    command line. Raises Stop (code: of the exit codes above; its
    text says what to do); the command's own failure is no Stop but in Result.exit_code.
    """
    try:
        relay = relay_for(url, token, token_file, ca_file, client_cert, client_key, proxy, sign_key,
                          require_signed_by)
        console = Console(tell)
        console.named, console.allow_refused = bool(request_id), allow_refused
        order, found = order_of(site, command, inputs, outputs, parameters, request_id)
        return calculate(relay, order, found, os.fspath(to), console, patience)
    except Stop as stop:
        raise typed(stop)


def relay_for(url, token=None, token_file="", ca_file="", client_cert="", client_key="", proxy="",
              sign_key="", require_signed_by=""):
    """The relay as a Python program names it."""
    source = token if callable(token) else lambda: token and checked_token(token, "token") or ""
    relay = RelayClient(url, source, ca_file=ca_file, proxy=proxy, client_cert=client_cert,
                        client_key=client_key)
    relay.sign_key, relay.signed_by = sign_key, require_signed_by
    if not token:
        if has_code(token_file):
            enroll_by_file(relay, token_file, "workflow")
        relay.token = find_token(token_file)
    return relay


def order_of(site, command, inputs, outputs, parameters, request_id):
    """(Order, the inputs that were found) of what a Python program asks for."""
    inputs, outputs = ([words] if isinstance(words, (str, os.PathLike)) else words
                       for words in (inputs, outputs))
    names, patterns = wanted_results([os.fspath(word) for word in outputs])
    order = Order(site, command, parameters, names, patterns, request_id or os.urandom(16).hex())
    return order, gather_inputs([os.fspath(word) for word in inputs])


def calculate(relay, order, found, to, console, patience):
    """The nine steps as the workflow side sees them; the Result. Stop for all that goes wrong."""
    relay.on_outage = console.tell_away
    make_target(to)
    try:
        start_calculation(relay, order, found, console, patience)
        for accept_id in wait_for(relay, [console.accept_id], console):
            console.resend_inputs, found[:] = None, [] # the inputs' list makes room for the results
            return fetch_after_wait(relay, accept_id, to,
                                    Wanted(order.names, order.patterns, True, console.allow_refused,
                                           console.signed), console)
    except (RelayAway, RelayRefused) as error:
        raise stop_for(error, relay, console.accept_id)
    finally:
        relay.close()


def make_target(to):
    """The directory for results: what cannot be should be known before the calculation, not after. 74."""
    try:
        os.makedirs(utf8(to), exist_ok=True)
    except OSError as error:
        raise Stop(EX_IOERR, "%s: %s" % (to, error.strerror))


def start_calculation(relay, order, found, console, patience=PATIENCE, limits=None):
    """1 and 2. Registers the calculation and sends its inputs. found: as gather_inputs() returns it."""
    console.order = order
    limits = first_contact(relay, patience, limits)
    if relay.v1 and console.deadline is not None:
        raise Stop(EX_USAGE, _("nothing was registered; --deadline: a fielded relay cannot stop a command"))
    if relay.v1 and (relay.sign_key or relay.signed_by):
        raise Stop(EX_PROTOCOL, _("nothing was registered; a fielded relay passes nothing that is signed"))
    if relay.v1:
        v1_start(relay, order, found, console, patience)
        console.allowed = True
        return
    check_limits(limits, found)
    files = [entry for entry in add_sums(found, console) if relay.takes_dirs or not entry.name.endswith("/")]
    console.signed = sign_order(relay, order, files) if relay.sign_key else ""
    first = register(relay, order, files, console, patience)
    check_own(relay, console)
    remember(relay, console.accept_id, order, signed=console.signed)
    console.resend_inputs = lambda: send_inputs(relay, console.accept_id, files, True, console)
    fault("registered")
    if not isinstance(first.get("wait_allow"), (int, float)) and first.get("progress") != "got return":
        send_inputs(relay, console.accept_id, files, first.get("known"), console)
    else:                                              # they came along, or were there
        log("info", console.accept_id, "2 allow-wait-calc", files=len(files))
        console.first_look = first
    console.allowed = True


def first_contact(relay, patience, limits=None):
    """First contact: the relay's limits (which one before may have told). 69 if it cannot be reached."""
    relay.fatal_kinds, relay.max_pause = ("certificate", "name", "dns"), PATIENCE
    if limits:
        return limits
    try:
        version, limits = relay.learn(patience)
    except RelayAway as error:
        raise stop_for(error, relay)
    relay.v1 = version < 2                # a fielded relay: its way of doing the nine steps branches off here
    return limits


def check_limits(limits, found):
    """77 if the inputs are more or larger than the relay takes, before anything is read or sent."""
    most, largest = limits.get("max_files"), limits.get("max_file")
    if isinstance(most, int) and 0 < most < len(found):
        raise Stop(EX_REFUSED,
                   _("nothing was registered; %d inputs are more than the relay takes (%d)")
                   % (len(found), most))
    for path, size, name in found:
        if isinstance(largest, int) and 0 < largest < size:
            raise Stop(EX_REFUSED,
                       _("nothing was registered; %s is larger (%d bytes) than the relay takes (%d)")
                       % (name, size, largest))


def register(relay, order, files, console, patience):
    """1. The relay's answer to the registration, its accept_id checked: it becomes part of URLs and file
    names."""
    try:
        fields = dict(registration(order, files), request_id=order.request_id, fielded=console.fielded)
        if console.signed:
            fields["calc-info"]["signed"] = console.signed
        found = relay.ask("POST", "add-calcinfo", fields, patience=patience)
    except (RelayAway, RelayRefused) as error:
        raise stop_for(error, relay, registering=True)
    if not ACCEPT_ID.match(str(found.get("accept_id"))):
        raise Stop(EX_PROTOCOL, _("%s: the relay's answer holds no accept_id") % relay.url)
    relay.fatal_kinds, relay.waits_for_token, console.accept_id = (), True, found["accept_id"]
    known, console.signed = bool(found.get("known")), order_in_force(found, console.signed)
    log("info", console.accept_id, "1 add-calcinfo", site=order.site, command=order.command,
        inputs=len(files), known=known)
    console.say(_("found again (request id %s)") % order.request_id if known
                else _("registered at the relay"))
    console.warn(found)
    return found


def sign_order(relay, order, files):
    """The order as a text, signed by --sign-key: the one thing that an external computer which wants that
    goes by. 78 if it cannot be signed."""
    return signed_order({
        "site": order.site, "request_id": order.request_id, "command": order.command,
        "parameters": order.parameters, "result_files": sorted(order.names),
        "result_patterns": order.patterns,
        "inputs": sum_of_manifest((entry.name, entry.size, entry.sum256, entry.x) for entry in files)},
        relay.sign_key)


def order_in_force(found, signed):
    """The order that the relay has, by its answer, if it is the one that was to be signed: what is registered
    again is not ordered again."""
    def lasting(text):
        return {key: value for key, value in json.loads(text.partition("\n")[0]).items() if key not in ONCE}
    try:
        return found["signed"] if signed and lasting(found["signed"]) == lasting(signed) else signed
    except (KeyError, ValueError, AttributeError, RecursionError):
        return signed


def registration(order, files):
    """What registers a calculation, but for its request id."""
    page = page_to_send(files, 0)
    sent = without_directories(files)
    for entry, data in zip(sent, inline_data(sent)):
        page[entry.name]["data"] = data
    info = {"command": order.command, "remote-site": order.site, "parameters": order.parameters,
            "parameter_files": page, "result_files": {name: {} for name in order.names},
            "result_patterns": order.patterns}
    if len(files) > PAGE:  # the relay compares the first page of a known request_id; this stands for the rest
        import hashlib
        digest = hashlib.sha256()
        for entry in sent:
            digest.update(utf8("%s/%s\n" % entry[2:4]))
        info["all_inputs"] = digest.hexdigest()
    return {"v": 2, "calc-info": info, "more": len(files) > PAGE, "total": len(sent), "allow": True}


def page_to_send(files, first, most=PAGE):
    """Entries first .. first + most of a manifest, as they go over the wire."""
    return {entry.name: dict({"size": entry.size, "sha256": entry.sum256, "mtime": entry.mtime},
                             **{"x": True} if entry.x else {}) for entry in files[first:first + most]}


def without_directories(files):
    """Of a manifest, what is no empty directory: the first ones."""
    return [entry for entry in files if not entry.name.endswith("/")]


def send_pages(relay, accept_id, files):
    """1. The file list's further pages; the relay says where it goes on."""
    first = PAGE
    while first < len(files):
        try:
            relay.ask_in_row(lambda: (
                ("files/%s/input" % accept_id, {"v": 2, "from": at, "more": at + NEXT_PAGE < len(files),
                                                "files": page_to_send(files, at, NEXT_PAGE)})
                for at in range(first, len(files), NEXT_PAGE)))
            return
        except RelayRefused as error:
            if not isinstance(error.more.get("from"), int) or error.more["from"] <= first:
                raise
            first = error.more["from"]


def send_inputs(relay, accept_id, files, known, console):
    """2. Sends the inputs that the relay has not yet, and lets the external computer have them."""
    target, todo = "files/%s/input" % accept_id, [] if known else None
    console.stage(_("sending the inputs"), sum(entry[1] for entry in files), relay)
    for attempt in range(len(files) // 5000 + 5):
        try:
            if todo is None:
                send_pages(relay, accept_id, files)
            relay.upload_all(target, without_directories(files), todo, moved=console.moved)
            fault("inputs sent")
            relay.ask("POST", "allow-wait-calc", {"v": 2, "accept_id": accept_id})
            log("info", accept_id, "2 allow-wait-calc", files=len(files), **console.rate.fields())
            fault("allowed")
            return
        except RelayRefused as error:
            todo = error.more.get("incomplete")
            if not isinstance(todo, list):
                raise
            todo = (None if error.more.get("more")
                    else [n for n in todo if isinstance(n, int) and 0 <= n < len(files)])
        except ValueError as error:
            raise Stop(EX_IOERR,
                       _("%s: an input cannot be sent as it was registered: %s") % (accept_id, error))
    raise Stop(EX_PROTOCOL, _("%s: the relay does not get the inputs together") % accept_id)


def wait_for(relay, ids, console):
    """follow(), also at a fielded relay."""
    if not relay.v1:
        return follow(relay, ids, console)
    return (accept_id for accept_id in ids if v1_follow(relay, accept_id, console) or True)


def follow(relay, ids, console):
    """3 to 8 happen elsewhere: yields each of ids when its results are at the relay."""
    seen, left = {}, list(ids)
    console.live_output = LiveOutput(ids[0], console) if console.output and len(ids) == 1 else None
    while left:
        for accept_id in list(left):
            console.accept_id = accept_id
            try:
                if look_once(relay, accept_id, console, seen, max(1, WAIT // len(left))):
                    left.remove(accept_id)
                    fault("results at relay")
                    yield accept_id
            except RelayAway:                               # only with a deadline, when it is over
                if console.deadline is None or time.monotonic() < console.deadline:
                    raise
        if left and console.deadline is not None and time.monotonic() >= console.deadline:
            cancel_overdue(relay, left, console)


def look_once(relay, accept_id, console, seen, wait):
    """One calc-progress, and what it tells to people; waits up to `wait` seconds for a change. seen:
    {accept_id: (stamp, what was told)}. True: the results are at the relay."""
    begun, (stamp, last) = time.monotonic(), seen.get(accept_id, ("", None))
    left = None if console.deadline is None else max(0.0, console.deadline - begun)
    most = WAIT if left is None else left + 1
    most = 1 if console.overdue else most
    wait = int(min(wait, most, until_told(accept_id, console))) if stamp else 0
    found, console.first_look = console.first_look, None
    found = found or relay.ask("GET", "calc-progress",
                               {"v": 2, "accept_id": accept_id, "wait": wait, "known": stamp},
                               wait, patience=left)
    relay.fatal_kinds, relay.waits_for_token = (), True
    look_at_inputs(found, accept_id, console)
    console.warn(found)
    now = found.get("progress"), found.get("out_of_contact") is None, found.get("what")
    words = state_words(found, console.fielded)
    console.stage(words)
    if now != last:
        log("info", accept_id, "3-8 progress", progress=now[0], status=found.get("status"))
        console.say(words)
    give_up_held(found, accept_id, console)
    wrote = (console.live_output and isinstance(found.get("output"), list)
             and console.live_output.take(relay, found["output"]))
    if (now[0] != "got return" and not wrote and stamp == found.get("stamp") and wait
            and time.monotonic() - begun < min(1, wait)):
        relay.pause(1)                                 # a cache in between, perhaps
    tell_cause(relay, accept_id, console, now)
    seen[accept_id] = str(found.get("stamp") or ""), now
    return now[0] == "got return"


def cause_of(relay, accept_id, patience=None):
    """told_cause() of what the relay says of a calculation; of one that cannot say it, or that something in
    front of it keeps from being asked, that."""
    answer = {} if relay.v1 else ask_cause(relay, {"v": 2, "accept_id": accept_id}, patience)
    return told_cause(answer or {
        "cause": "old-relay", "who": "operator", "command": "mi_dicomapi.py check",
        "sentence": _("the relay is of an older version: it does not tell why something waits"),
        "changes": _("a newer version of the relay")})


def ask_cause(relay, fields, patience):
    """The relay's answer to v2/explain, {} of one that knows no such call; of a gateway that lets
    calc-progress pass, but twice not this, that."""
    for last in (False, True):
        try:
            return relay.ask("GET", "v2/explain", fields, patience=0)
        except (RelayAway, RelayRefused) as error:
            text = str(error)
            if "no such call" in text:
                return {}
            passes = isinstance(error, RelayAway) or error.code in LATER_CODES
            if not is_kept_back(error) and (last or not passes):
                raise
        # that it is there, or why it is not
        relay.ask("GET", "calc-progress", dict(fields, wait=0, known=""), patience=patience)
    return {"cause": "gateway", "who": "operator",
            "sentence": _("something in front of the relay (its gateway?) does not let v2/explain pass, so it"
                          " cannot tell why something waits: %s") % text,
            "changes": _("a gateway that lets /mi-distcomp-api/v2/ pass")}


def is_kept_back(error):
    """May a gateway have said that, and not the relay?"""
    if isinstance(error, RelayAway):
        return error.kind == "between"
    return (error.code in (403, 404, "0005") and not error.more.get("why")
            and "no information" not in str(error))


def tell_cause(relay, accept_id, console, now):
    """Says why, when nothing has moved for EXPLAIN_AFTER, and again when it is another reason. now: what must
    be another one where something moved. (Fielded words say what they always did.)"""
    if console.mute or console.fielded:
        return
    what, since, told = console.still.get(accept_id, (None, 0.0, ""))
    if now != what:
        since, told = time.monotonic(), ""
    elif until_told(accept_id, console) <= 1 or told:
        try:
            found = cause_of(relay, accept_id, 0)
        except (RelayAway, RelayRefused):
            return                                     # the next calc-progress says what is wrong
        if found["code"] not in (told, "running"):
            console.say("%s (%s)" % (cause_lines(found)[0], who_acts(found)))
        told = found["code"]
    console.still[accept_id] = now, since, told


def until_told(accept_id, console):
    """Seconds until tell_cause() has something to do, 1 at least; WAIT where it has done so already."""
    what, since, told = console.still.get(accept_id, (None, time.monotonic(), ""))
    return (WAIT if told or console.fielded or console.mute
            else max(1, since + EXPLAIN_AFTER + 1 - time.monotonic()))


def look_at_inputs(found, accept_id, console):
    """Sends the inputs once more if the relay lacks them again. 66 if it lacks them, and nobody sends
    them."""
    if console.resend_inputs and lacks_inputs(found):
        console.say(_("the relay was restored from a backup: it gets the inputs again"))
        console.resend_inputs()
    elif isinstance(found.get("idle"), int) and found["idle"] > INPUTS_IDLE and not console.resend_inputs:
        raise Stop(EX_NOINPUT,
                   _("%s: the relay lacks inputs and nobody sends them (submit was interrupted, or the relay"
                     " restored from a backup); the same submit with its --request-id sends them")
                   % accept_id)


def lacks_inputs(found):
    """Is it a calculation that is registered, but whose inputs the relay has not?"""
    return found.get("progress") == "not start" and found.get("wait_allow", 1) is None


def is_held(found):
    """Does its result wait for a person at the external computer?"""
    return str(found.get("what")).startswith("held for a person")


def give_up_held(found, accept_id, console):
    """75, if --deadline is over and its result waits for a person there: no cancel helps."""
    if console.overdue and is_held(found):
        raise Stop(EX_TEMPFAIL, _("%s: the deadline is over; its result is held for a person at the external"
                                  " computer, and comes when it is released (%s.py wait %s)")
                   % (accept_id, PROGRAM, accept_id))


def cancel_overdue(relay, ids, console):
    """--deadline is over: cancels what is left. 75 if that cannot be done, or does not help."""
    if console.overdue:
        raise Stop(EX_TEMPFAIL,
                   _("%s: the deadline is over and the calculation is cancelled, but has not come to its end"
                     " (%s.py wait %s)") % (ids[0], PROGRAM, " ".join(ids)))
    console.overdue, console.deadline = True, time.monotonic() + CANCEL_PATIENCE
    for accept_id in ids:
        console.accept_id = accept_id
        console.say(_("the deadline is over: cancelling"))
        try:
            cancel(relay, accept_id, "deadline", PATIENCE)
        except RelayAway:
            raise Stop(EX_TEMPFAIL,
                       _("%s: the deadline is over, but the relay does not answer; the calculation may run"
                         " on (%s.py cancel %s)") % (accept_id, PROGRAM, " ".join(ids)))
        except RelayRefused as error:
            if error.more.get("why") != "ended":
                raise


def cancel(relay, accept_id, reason, patience):
    """Cancels a calculation; what that does, for people. RelayRefused (409), if it has ended already."""
    if relay.v1:
        return v1_cancel(relay, accept_id, patience)
    found = relay.ask("POST", "cancel-wait-calc",
                      {"v": 2, "accept_id": accept_id, "stop": True, "reason": reason}, patience=patience)
    return _("cancelled") if found.get("ended") else _("the external computer stops it")


def fetch_after_wait(relay, accept_id, to, wanted, console):
    """9. fetch(), after a wait: the rest of the output is shown, and a deadline that was over has its exit
    code."""
    result = fetch(relay, accept_id, to, wanted, console)
    if console.live_output:
        console.live_output.complete(to, result.files)
    if console.overdue and result.reason.startswith("cancelled"):
        return result._replace(exit_code=EX_TEMPFAIL, ended_by="deadline")
    return result


def fetch(relay, accept_id, to, wanted, console, patience=None):
    """9. The results into the directory `to`, verified; a Result. 74 if they cannot be written, 76 if they
    are not what they should be."""
    console.stage(_("fetching the results"), 0, relay)
    if relay.v1 and relay.signed_by:
        raise Stop(EX_PROTOCOL, _("%s: a fielded relay passes nothing that is signed") % accept_id)
    if relay.v1:
        return v1_fetch(relay, accept_id, to, wanted, console, patience)
    found = relay.ask("GET", "get-calc-result", {"v": 2, "accept_id": accept_id, "dirs": 1, "data": 1},
                      patience=patience)
    info = found.get("result-info")
    again = _("; nothing is lost, fetch it with: %s.py result %s") % (PROGRAM, accept_id)
    try:
        if not isinstance(info, dict):
            raise ValueError(_("the relay's answer holds no proper result"))
        taking = ResultFetch(relay, accept_id, found, to, wanted, console)
        taking.store_all()
        info = found["result-info"]
        missing, verdicts = taking.missing()
    except ValueError as error:
        raise Stop(EX_PROTOCOL, "%s: %s%s" % (accept_id, error, again))
    except OSError as error:
        where = ": " + error.filename.decode("utf-8", "replace") if isinstance(error.filename, bytes) else ""
        raise Stop(EX_IOERR, "%s: %s%s%s" % (accept_id, error.strerror or error, where, again))
    log("info", accept_id, "9 get-calc-result", files=len(taking.files), missing=len(missing),
        status=info.get("status"), **console.rate.fields())
    keep_head(accept_id, info)
    for text in taking.open_patterns:
        console.say(_("no result matches %s") % text)
    if taking.kept:
        console.say(_("the relay keeps the result, for what is not stored: %s.py result %s --to DIR")
                    % (PROGRAM, accept_id))
    else:
        tell_finish(relay, accept_id, console)
    code, ended_by = verdict(info, missing, verdicts, wanted)
    refused = {name: why[:1000] for name, why in (info.get("refused") or {}).items()}
    return Result(accept_id, code, str(info.get("status"))[:100], str(info.get("reason") or "")[:1000],
                  taking.files, missing, refused, ended_by, verdicts)


class ResultFetch:
    """9. The results of one calculation on their way into the directory `to`: what was declared, and nothing
    else."""

    def __init__(self, relay, accept_id, found, to, wanted, console):
        self.relay = relay
        self.accept_id = accept_id
        self.found = found
        self.wanted = wanted
        first = found["result-info"].get("result_files")
        few = isinstance(first, dict) and len(first) <= FEW and found.get("next") is None
        self.folder = Target(to, accept_id, wanted.agreed, sync=few)
        self.files = []
        self.kept = {}               # names stored; {name: why} of what must not be put there
        self.open_names = {nfc_parts(name): name for name in wanted.names}
        self.open_patterns = {text: compile_pattern(text) for text in wanted.patterns}
        self.moved = console.moved

    def store_all(self):
        """Fetches them. ValueError for what must not be taken; OSError is this disk's."""
        done = False
        try:
            target = "files/%s/result" % self.accept_id
            page = {"files": self.found["result-info"].get("result_files"), "next": self.found.get("next")}
            rows = self.relay.manifest_entries(target, page)
            if self.relay.signed_by:
                rows = self.signed_rows(list(rows))
            self.relay.download_all(target, self.entries(rows), self.store, self.folder.part_path,
                                    moved=self.moved)
            done = True
        finally:
            self.folder.close(done)
        fault("results stored")

    def signed_rows(self, rows):
        """The rows of the manifest, if they are signed; what was signed is also kept beside the results.
        ValueError."""
        beside = self.relay.x_and_mtime
        manifest = [row[1:] + (beside.get(row[0], (False,))[0],) for row in rows]
        self.found["result-info"] = believed(self.relay, self.accept_id, self.found["result-info"], manifest,
                                             self.wanted.signed)
        path = os.path.join(self.folder.path, utf8(self.accept_id + ".signed"))
        with open(os.open(path + b".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "w",
                  encoding="utf-8") as out:
            out.write(self.found["result-info"]["signed"])
        os.rename(path + b".new", path)
        return rows

    def entries(self, rows):
        """What is to be fetched; what is here already is not, small files aside: they come in packs, without
        gaps."""
        is_wanted = declared_matcher(self.wanted.names, self.wanted.patterns)
        for number, name, size, sum256 in rows:
            if not is_wanted(name):
                raise ValueError(_("%s was not declared as a result") % name)
            self.open_names.pop(nfc_parts(name), None)
            for text in [text
                         for text, one in self.open_patterns.items()
                         if text == name or one.match("/".join(nfc_parts(name)))]:
                del self.open_patterns[text]
            if name.endswith("/"):
                self.attempt(name, self.folder.make_directory, utf8(name.rstrip("/")),
                             self.relay.x_and_mtime.pop(number, (False, None))[1])
            elif (self.found.get("gone") or size > PACK_FILE) and self.folder.has_file(name, size, sum256):
                self.folder.drop_part(number)
                self.files.append(name)
            elif self.found.get("gone"):
                raise Stop(EX_REFUSED, _("%s: %s is not here, and no longer at the relay (%s)") % (
                    self.accept_id, name, printable(str(self.found["gone"]))[:200]))
            elif size <= PACK_FILE or self.attempt(None, self.folder.check_storable, utf8(name)):
                yield number, name, size, sum256

    def attempt(self, name, act, *words):
        """act(); what must not be put there is noted. name: what is stored then. True if it could be done."""
        try:
            act(*words)
        except NotStored as error:
            self.kept[error.name.decode("utf-8")] = str(error)
            return False
        self.files += [name] if name else []
        return True

    def store(self, number, name, data):
        """One verified result: its bytes, or None where they are in the part."""
        x, mtime = self.relay.x_and_mtime.pop(number, (False, None))
        if data is not None and not self.folder.agreed:
            import hashlib
            if self.folder.has_file(name, len(data), hashlib.sha256(data).hexdigest()):
                return self.files.append(name)
        self.attempt(name, self.folder.store, number, name, data, x, mtime)
        if name in self.kept:
            self.folder.drop_part(number)

    def missing(self):
        """({name that was declared: why it is not here}, {code: {"count", "names"}} of all that is not)."""
        info = self.found["result-info"]
        told = dict(checked_texts(info.get("missing") or {}, dict),
                    **checked_texts(info.get("refused") or {}, dict))
        missing = {name: told.get(name, _("is not there"))[:1000] for name in self.open_names.values()}
        named = {nfc_parts(name): name for name in self.wanted.names}
        missing.update((named[nfc_parts(name)], why)
                       for name, why in self.kept.items() if nfc_parts(name) in named)
        verdicts = proper_verdicts(info)
        if self.kept:
            before = verdicts.get("name", {"count": 0, "names": []})
            verdicts["name"] = {"count": before["count"] + len(self.kept),
                                "names": before["names"] + sorted(self.kept)[:VERDICT_NAMES]}
        return missing, verdicts


def believed(relay, accept_id, info, manifest, signed):
    """What is told of the results, as far as the external computer has signed it: for this order, at this
    site, of this manifest, and this end. signed: the order. ValueError if it has not; 64 if the order is not
    known."""
    import hashlib
    try:
        before = remembered(relay, accept_id)[3]       # rerun orders anew; another order is not this one
        signed = order_in_force({"signed": before}, signed or before)
    except Stop:
        pass
    if not signed:
        raise Stop(EX_USAGE, _("%s: its order was not signed on this side (--sign-key), so its results cannot"
                               " be known as its own") % accept_id)
    line, _newline, armored = checked_texts([info.get("signed") or ""], list)[0].partition("\n")
    check_signature(line.encode(), armored, relay.signed_by)
    told, order = json.loads(line), signed.partition("\n")[0]
    stays = json.dumps({key: info.get(key) for key in ("missing", "refused", "verdicts")}, sort_keys=True)
    wanted = {"v": 1, "order": hashlib.sha256(order.encode()).hexdigest(), "site": json.loads(order)["site"],
              "manifest": sum_of_manifest(manifest), "stays": hashlib.sha256(stays.encode()).hexdigest()}
    other = [key for key in sorted(wanted) if told.get(key) != wanted[key]]
    if other:
        raise ValueError(_("what was signed there is not what the relay has (%s)") % " ".join(other))
    reason = str(told["reason"] or "")
    if not reason or not str(info.get("reason")).startswith(reason):
        info = dict(info, reason=reason)
    return dict(info, exit_code=told["exit_code"], signal=told["signal"],
                status="abnormal" if told["exit_code"] != 0 or reason else info.get("status"))


def check_signature(text, armored, path):
    """ValueError unless this is the signature of text (bytes), as one of results, by a public key of the file
    `path`: by ssh-keygen; RSA is verified here where that cannot."""
    import tempfile
    try:
        with open(utf8(path), encoding="utf-8") as keys:
            trusted = re.findall(r"(?m)^[ \t]*(ssh-\w+) ([\w+/=]+)", keys.read())
    except (OSError, ValueError) as error:
        raise Stop(EX_CONFIG, "%s: %s" % (path, getattr(error, "strerror", None) or error))
    key, kind, signature, summed = taken_apart(armored, RESULT_SPACE)
    sort, *numbers = ssh_strings(key)
    if not any(binascii.a2b_base64(one) == key for _sort, one in trusted):
        raise ValueError(_("they are signed by another key"))
    if sort == b"ssh-rsa" and kind in RSA_SUMS:
        if not is_rsa(numbers, sshsig_data(text, RESULT_SPACE, summed), signature, *RSA_SUMS[kind]):
            raise ValueError(_("the signature does not fit"))
        return
    with tempfile.TemporaryDirectory() as folder:
        names = [os.path.join(folder, name) for name in ("keys", "signature")]
        for name, said in zip(names, ("".join("gate %s %s\n" % one for one in trusted), armored)):
            with open(name, "w") as out:
                out.write(said)
        run_tool(["ssh-keygen", "-Y", "verify", "-I", "gate", "-n", RESULT_SPACE, "-f", names[0],
                  "-s", names[1]], text)


def proper_verdicts(info):
    """The verdicts {code: {"count", "names"}} of a result, of what is as it should be; an older peer tells of
    patterns only how many."""
    kept, found, others = {}, info.get("verdicts"), (info.get("refused") or {}).get("*")
    if not isinstance(found, dict) and others:
        return {"refused": {"count": sum(map(int, re.findall(r": (\d{1,9})\b", others))) or 1, "names": []}}
    for code, entry in found.items() if isinstance(found, dict) else ():
        count, names = (entry.get("count"), entry.get("names")) if isinstance(entry, dict) else (None, None)
        if code in VERDICTS and type(count) is int and count > 0:
            kept[code] = {"count": count,
                          "names": [printable(name)[:1000] for name in names[:VERDICT_NAMES]]
                          if isinstance(names, list) else []}
    return kept


def verdict(info, missing, verdicts, wanted):
    """(exit code, who ended it) from the relay's account of the end, and what did not come."""
    code, number, reason = info.get("exit_code"), info.get("signal"), str(info.get("reason") or "")
    if isinstance(number, int) and 0 < number < 128:
        return 128 + number, "command"
    if isinstance(code, int) and 0 < code < 256:
        return code, "command"
    stopped = STOP_REASONS.get(re.match("[a-z]*", reason).group())
    short = missing or INCOMPLETE.intersection(verdicts) - ({"refused"} if wanted.allow_refused else set())
    if code == 0:
        return (stopped or (EX_DATA, "workflow") if short or info.get("status") != "completed"
                else (0, "command"))
    return stopped or LOST


def tell_finish(relay, accept_id, console):
    """9. All results are here."""
    try:
        relay.ask("POST", "finish", {"v": 2, "accept_id": accept_id}, patience=PATIENCE)
        log("info", accept_id, "9 finish")
        fault("finish told")
    except (RelayAway, RelayRefused) as error:                  # the relay keeps its copy longer, that is all
        console.say(_("the relay could not be told that the results are here: %s") % error)


# ==== what people see ====
# verdicts of pollers and relays of before
OLD_VERDICTS = {"not there": "missing", "changes": "changing", "link": "outside", "max_file": "limit",
                "max_total": "limit", "max_files": "limit", "allow_names": "refused", "deny_names": "refused",
                "deny_sums": "refused"}
OWN_FAULTS = ("dns", "name", "certificate", "proxy")   # kinds of RelayAway that who asks can mend
EXPLAIN_AFTER = 60                     # seconds without a change until people are told why
VISIBLE = re.compile("[^\n\t]+")       # what printable() makes of the command's output


class Console:
    """Tells people what happens: tell(line) at every change; with a terminal also one line of it that is
    rewritten while things move."""

    def __init__(self, tell=None, terminal=None):
        self.tell = tell or (lambda line: None)
        self.mute = not (tell or terminal)             # does nobody read what is said?
        self.output = None                             # function(stream, text) for the command's output
        self.live_output = None                        # its LiveOutput
        self.still = {}                                # of tell_cause(): {accept_id: (what, since, cause)}
        self.open_line = ""                            # the stream whose output has ended within a line
        self.warned = set()
        # the terminal's line
        self.terminal = terminal
        self.thread = None
        self.drawn = False
        self.ended = threading.Event()
        self.begun = time.monotonic()
        self.what = ""                                 # what goes on
        self.done = 0                                  # bytes
        self.total = 0
        self.rate = None                               # its Rate, where it is a transfer
        # the calculation that is spoken of
        self.accept_id = ""
        self.order = None
        self.allowed = False                           # may the external computer have it already?
        self.signed = ""                               # its order, as it was signed
        self.first_look = None                         # what the registration's answer has told of it
        self.resend_inputs = None                      # function, for a relay that lacks them again
        self.deadline = None                           # --deadline, in time.monotonic()
        self.overdue = False                           # is it over?
        self.allow_refused = False                     # is what their owner's rules keep there a failure?
        self.fielded = False                           # fielded words?
        self.named = False                             # was a request id given?

    def show(self, stream, text):
        """Output of the command, or nothing if nobody is to see it."""
        with SAY["lock"]:
            self.wipe()
            try:
                self.output(stream, ("\n" if self.open_line not in ("", stream) else "")
                            + VISIBLE.sub(lambda found: printable(found.group()), text))
                self.open_line = "" if text.endswith("\n") else stream
            except (OSError, ValueError):
                self.output = None                     # whoever read it is gone

    def say(self, text):
        """One line."""
        with SAY["lock"]:
            self.wipe()
            try:
                if self.open_line and self.output:
                    self.output(self.open_line, "\n")
                self.open_line = ""
                self.tell("%s: %s%s" % (PROGRAM, self.accept_id and self.accept_id + ": ", printable(text)))
            except (OSError, ValueError):
                pass                                   # whoever listened is gone; the calculation is not

    def warn(self, found):
        """The `warning` of an answer of the relay, once."""
        text = printable(found.get("warning") or "")[:500]
        if text and text not in self.warned:
            self.warned.add(text)
            self.say(_("warning: %s") % text)

    def stage(self, what, total=0, relay=None):
        """What goes on now; total: bytes, if it is a transfer; relay: by which RelayClient."""
        self.what, self.done, self.total = what, 0, total
        self.rate = Rate(relay) if relay else None
        if self.terminal and self.thread is None:
            self.thread = threading.Thread(target=self.keep_drawing, daemon=True)
            self.thread.start()

    def moved(self, count):
        """count more bytes went (fewer, if negative)."""
        self.done += count
        if self.rate:
            self.rate.moved(count)

    def tell_away(self, why):
        """The relay is away, or answers: later; or (None) it is as ever again."""
        if why is None:
            return self.say(_("the relay answers again"))
        if isinstance(why, RelayAway):
            return self.say(_("the relay does not answer, asking on: %s") % why)
        if why.code in NO_TOKEN_CODES:
            return self.say(_("the relay refuses the token, asking on (a renewed token_file is read): %s")
                            % (refusal_words(why.more) or printable(why.more.get("why") or why)))
        self.say(_("the relay answers \"later\", asking on: %s") % why)

    def keep_drawing(self):
        """The terminal's line, five times a second."""
        while not self.ended.wait(0.2):
            with SAY["lock"]:
                self.draw()

    def draw(self):
        """Rewrites the line."""
        spent = int(time.monotonic() - self.begun)
        text = "%s %s %d:%02d:%02d" % (self.accept_id, self.what, spent // 3600, spent // 60 % 60, spent % 60)
        if self.total:
            part = min(1.0, self.done / self.total)
            text += " [%-20s] %3d %%" % ("#" * int(20 * part), 100 * part)
        if self.done:
            text += " %.1f MiB" % (self.done / 1048576)
        if self.rate and self.rate.words():
            text += ", " + self.rate.words()
        try:
            width = os.get_terminal_size(self.terminal.fileno()).columns or 80
        except OSError:
            width = 80
        try:
            self.terminal.write("\r\x1b[K" + fitted(printable(text), width - 1))
            self.terminal.flush()
            self.drawn = True
        except (OSError, ValueError):
            self.ended.set()

    def wipe(self):
        """Takes the terminal's line away."""
        if self.drawn:
            self.terminal.write("\r\x1b[K")
            self.terminal.flush()
            self.drawn = False

    def close(self):
        """No more drawing."""
        self.ended.set()
        with SAY["lock"]:
            self.wipe()

    def write(self, text):
        """A line of the log, on a terminal."""
        self.wipe()
        self.terminal.write(text)

    def flush(self):
        """As of a file."""
        self.terminal.flush()


class CappedStream:
    """stderr, of which no more than STDERR_LIMIT bytes are written."""

    def __init__(self, stream):
        self.stream = stream
        self.left = STDERR_LIMIT

    def write(self, text):
        """text, or nothing if that would be too much."""
        self.left -= len(text.encode("utf-8", "replace"))
        if self.left >= 0:
            self.stream.write(text)

    def flush(self):
        """As of a file."""
        self.stream.flush()


class LiveOutput:
    """A command's output as it comes: what of it was shown."""

    def __init__(self, accept_id, console):
        import codecs
        self.accept_id = accept_id
        self.console = console
        self.shown = {"out": 0, "err": 0}
        self.decode = {stream: codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
                       for stream in self.shown}

    def take(self, relay, sizes):
        """Shows what the relay has: sizes[0] bytes of stdout, sizes[1] of stderr. True if there was
        anything."""
        import base64
        before = dict(self.shown)
        for stream, size in zip(("out", "err"), sizes):
            if not isinstance(size, int) or size < self.shown[stream]:
                self.shown[stream] = 0                 # a rerun begins anew
            while self.console.output and isinstance(size, int) and self.shown[stream] < size:
                found = relay.ask("GET", "output",
                                  {"v": 2, "accept_id": self.accept_id, "stream": stream,
                                   "offset": self.shown[stream], "wait": 0})
                try:
                    data = base64.b64decode(str(found.get("data")).encode("ascii", "replace"))
                except ValueError:                     # the log, which comes with the results, has it
                    data = b""
                if not data:
                    break
                self.shown[stream] += len(data)
                self.console.show(stream, self.decode[stream](data))
        return self.shown != before

    def complete(self, to, names):
        """Shows from the logs, which have come, what was not shown yet: a few lines; of more only the log's
        name."""
        for stream, name in zip(("out", "err"), LOG_NAMES):
            if not self.console.output or name not in names:
                continue
            with open(os.path.join(utf8(to), utf8(name)), "rb") as log_file:
                log_file.seek(self.shown[stream])
                rest = log_file.read(OUTPUT_REST + 1)
            if len(rest) > OUTPUT_REST:
                self.console.say(_("all of the output is in %s") % name)
            elif rest:
                self.console.show(stream, self.decode[stream](rest, True))


def state_words(found, fielded=False):
    """An answer to calc-progress in the words of the README; fielded: in those of the wire, which fielded
    words have always printed."""
    progress, status = printable(found.get("progress"))[:100], found.get("status")
    if lacks_inputs(found):
        text = _("registered; its inputs are not complete")
    elif progress == "not start" and not fielded:
        ahead = found.get("queue")
        text = _("waiting for the external computer") + (_(", %d before it") % ahead
                                                         if type(ahead) is int and ahead else "")
    elif fielded:
        text = progress
    elif progress == "got return":
        text = _("done") if status == "completed" else _("abnormal")
    else:
        text = {"sending params": _("taken: its inputs are on their way"),
                "complete send": _("taken: its inputs are there"), "running": _("running"),
                "calc end": _("ended: its results are awaited"),
                "getting return": _("sending: its results are on their way")}.get(progress, progress)
    if is_held(found) and not fielded:
        text = _("ended; held for a person at the external computer since %s") % printable(
            found["what"])[-20:]
    elif found.get("what"):
        text += ", " + printable(found["what"])[:200]
    if type(found.get("out_of_contact")) is int:
        text += _(", out of contact for %d s") % found["out_of_contact"]
    return text


def report_end(result, to, options, console):
    """Tells how it ended; the program's exit code."""
    console.close()
    if result.exit_code:
        console.tell = options.tell                      # -q is silent about success only
    begun = result.ended_by not in ("poller", "relay")   # else nothing could come: the last line says why
    for name in sorted(result.missing)[:KEPT_WORDS] if begun else ():
        console.say(_("the declared result %s is missing: %s")
                    % (name, why_missing(name, result.missing[name])))
    if len(result.missing) > KEPT_WORDS and begun:
        console.say(_("and %d more") % (len(result.missing) - KEPT_WORDS))
    code = result.exit_code
    if options.fielded:
        code = 0 if result.status == "completed" else V1_ABNORMAL
    if result.verdicts and begun:
        console.say(_("asked for and not here: %s")
                    % "; ".join(verdict_words(*pair) for pair in sorted(result.verdicts.items())))
    console.say(last_line(result, to, code))
    if options.json:
        print(json_of(result._asdict()))
    return code


def last_line(result, to, code):
    """Whose code the exit code is, and why. code: what this program ends with."""
    reason = "" if result.reason.startswith("exit code") else result.reason
    if result.ended_by == "command":
        text = _("the command ended with %d (its own exit code)") % result.exit_code
        text += ": " + reason if reason else ""
        if reason.startswith("cancelled"):
            text = _("%s; the command was stopped and ended with %d") % (reason, result.exit_code)
        text += _("; exit code %d is this program's") % code if code != result.exit_code else ""
    elif result.ended_by == "deadline":
        text = _("the deadline was over and the calculation was cancelled; exit code %d is this"
                 " program's") % code
    elif result.ended_by == "workflow":
        why = "; ".join("%s: %s" % (name, why_missing(name, result.missing[name]))
                        for name in sorted(result.missing)[:3])
        text = _("the command ended with 0, but the calculation is not complete (%s); exit code %d is this"
                 " program's") % (why or reason or result.status, code)
    else:
        more = _("; %s may say more") % LOG_NAMES[1] if LOG_NAMES[1] in result.files else ""
        text = _("exit code %d is this program's, not the command's (%s: %s%s)") % (
            code, result.ended_by, reason or result.status, more)
    return text + _("; %d files in %s") % (len(result.files), to)


def why_missing(name, why):
    """Why a declared result is not here, and what to do: a word of the external computer (a verdict, or what
    is beside them) as a sentence, the word behind it."""
    if why in ("not a file", "special"):
        return _("is a directory or no file there; for all that is in a directory declare %s/") % name
    text = {"missing": _("the command has not made it"),
            "refused": _("a rule of the external computer's owner keeps it there"),
            "limit": _("it is over a limit of the external computer's owner, or of the relay"),
            "name": _("its name cannot travel"), "unreadable": _("it cannot be read there"),
            "changing": _("it changed again and again while it was sent"),
            "outside": _("it is a link out of the command's directory"),
            "held": _("its owner has not released it yet")}.get(OLD_VERDICTS.get(why, why))
    return "%s (%s)" % (text, why) if text else why


def verdict_words(code, entry):
    """One verdict for people: its code, how many, the first names."""
    names = entry["names"][:3] + ["..."] * (entry["count"] > 3 and len(entry["names"]) > 0)
    return "%s %d" % (code, entry["count"]) + (" (%s)" % ", ".join(name[:200] for name in names) if names
                                               else "")


def stop_for(error, relay, accept_id="", registering=False):
    """The Stop for what the relay, or its absence, said; with the cause, as `explain` tells it."""
    stop = stop_said(error, relay, accept_id, registering)
    code, who = "relay-refuses" if stop.code == EX_REFUSED else "relay-later", "operator"
    if isinstance(error, RelayAway):
        code, who = "relay-" + error.kind, "starter" if error.kind in OWN_FAULTS else "operator"
    program = PROGRAM if who == "starter" else "mi_dicomapi"
    stop.cause = {"cause": code, "who": who, "sentence": str(stop), "command": program + ".py check"}
    return stop


def stop_said(error, relay, accept_id, registering):
    """The Stop of stop_for()."""
    text = "%s%s" % (accept_id and accept_id + ": ", error)
    if isinstance(error, RelayAway):
        hint = {"certificate": _("; if its certificate is not of a public CA, give the CA's file with"
                                 " --ca-file (or ca_file in the ini)"),
                "name": _("; is the URL right? use a name of the certificate, or have it made for this one"),
                "proxy": _("; is this proxy the right one for the relay? (proxy in the ini, https_proxy and"
                           " no_proxy of the environment)"),
                "connect": _("; does the relay run, and is the URL right? (mi_system_wf.py check looks at"
                             " the whole way)"),
                "dns": _("; is the URL right? (--url, or url in the ini)")}.get(error.kind, "")
        return Stop(EX_UNAVAILABLE, text + hint)
    if error.code == 404 and accept_id:
        return Stop(EX_USAGE,
                    _("%s: the relay %s knows no such calculation of yours") % (accept_id, relay.url))
    if error.code == "0005":
        return Stop(EX_REFUSED, token_refused(relay, error))
    text = _("%s: the relay says: %s") % (relay.url, text)
    if error.code in LATER_CODES:
        return Stop(EX_TEMPFAIL, text)
    if error.more.get("why") == "html":
        return Stop(EX_PROTOCOL,
                    _("%s: no relay of this protocol answers there (is the URL right?)") % relay.url)
    if error.more.get("why") in ("differs", "prefix"):
        return Stop(EX_USAGE, text)
    if error.code == 409 and error.more.get("why") == "state":      # asked for a result that is not there yet
        return Stop(EX_TEMPFAIL, "%s (%s)" % (text, state_words({"progress": error.more.get("state", "")})))
    refused = error.code in (401, 403, 404, 413) or registering and error.code in (400, "400")
    return Stop(EX_REFUSED if refused else EX_PROTOCOL, text)


def token_refused(relay, error):
    """What to do about a refused token: as the poller says it."""
    why = refusal_words(error.more) or printable(error.more.get("why") or error)[:200]
    return _("%s: the token is refused (%s): get a valid one, role workflow, for this user and site") % (
        relay.url, why)


# ==== what this side remembers ====

def remember(relay, accept_id, order, to="", signed=""):
    """Notes what was declared and signed, and where it goes (to: default the current directory): `wait`,
    `result` and attach() store these results only, whatever a relay calls its own. Kept for about three
    months; that it cannot be noted is no failure (--out says it again)."""
    folder = memory_folder()
    if folder is None:
        return
    try:
        if not os.path.isdir(folder):
            os.makedirs(folder, 0o700, exist_ok=True)
            forget(os.path.dirname(folder))
        entry = {"url": relay.url, "names": order.names, "patterns": order.patterns,
                 "to": os.path.abspath(to), "signed": signed}
        with open(os.path.join(folder, utf8(accept_id) + b".new"), "w", encoding="utf-8",
                  errors="surrogateescape") as out:
            json.dump(entry, out)
        os.rename(out.name, os.path.join(folder, utf8(accept_id)))
    except OSError as error:
        log("info", accept_id, "1 not remembered", why=error)


def recall(relay, accept_id, to, options):
    """What was declared of it, as Wanted. What is there may be replaced where it was ordered from, or in a
    directory that was said. 64 if it is not known here."""
    names, patterns, ordered, signed = remembered(relay, accept_id)
    agreed = options.agreed or len(options.words) > 2 or os.path.realpath(to) == os.path.realpath(ordered)
    return Wanted(names, patterns, agreed, options.allow_refused, signed)


def remembered(relay, accept_id):
    """(names, patterns, directory, the signed order or "") of it, as remember() has noted them. 64 if it is
    not known here."""
    top = memory_folder()
    for month in sorted(os.listdir(os.path.dirname(top)), reverse=True) if top and os.path.isdir(
            os.path.dirname(top)) else ():
        try:
            with open(os.path.join(os.path.dirname(top), month, utf8(accept_id)), encoding="utf-8",
                      errors="surrogateescape") as text:
                found = json.load(text)
            if checked_texts(found["url"], str) == relay.url:
                words = checked_texts(found["names"], list) + checked_texts(found["patterns"], list)
                return wanted_results(words) + (checked_texts(found["to"], str), found.get("signed", ""))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # broken: as if nothing were known
            continue
    raise Stop(EX_USAGE,
               _("%s: what was declared as its results is not known on this side; say it once more: --out"
                 " NAME... (--out '**': all)") % accept_id)


def check_own(relay, console):
    """76 if the relay calls this signed calculation by the name of another one of this side: it could give
    the results of the one for those of the other."""
    try:
        before = console.signed and remembered(relay, console.accept_id)[3]
    except Stop:
        return
    if before and order_in_force({"signed": before}, console.signed) != before:
        raise Stop(EX_PROTOCOL, _("%s: the relay has another calculation of this side by that name already")
                   % console.accept_id)


def keep_head(accept_id, info):
    """Keeps where the external computer's audit log stood: this side is its witness. Its owner's `audit
    verify --witness` reads the file."""
    head, folder = info.get("audit"), memory_folder()
    if folder and isinstance(head, str) and re.match(r"[0-9]{1,15}\.[0-9a-f]{64}\Z", head):
        try:
            with open(os.path.join(folder, b"heads"), "a", encoding="utf-8") as out:
                out.write("%s %s %s %s\n" % (
                    iso_time(time.time()), printable(info.get("site"))[:200], accept_id, head))
        except OSError as error:
            log("info", accept_id, "9 audit head not kept", why=error)


def memory_folder(when=None):
    """The directory in which this side remembers what calculations of a month have declared (bytes); None
    where there is no home directory."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if (not os.path.isabs(home)
            or not os.path.isdir(utf8(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~")))):
        return None
    return utf8(os.path.join(home, "mi_distcomp_wf", time.strftime("%Y-%m", time.gmtime(when))))


def forget(folder):
    """Removes the months that are over for long."""
    import shutil
    for name in sorted(os.listdir(folder))[:-MONTHS]:
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def checked_texts(found, kind):
    """found if it is a `kind` (list or dict) of texts, as the relay's answers should hold them; ValueError
    otherwise."""
    if (isinstance(found, kind)
            and all(isinstance(text, str) for text in (found.values() if kind is dict else found))):
        return found
    raise ValueError(_("the relay's answer holds no proper result"))


# ==== inputs, results, token ====

def gather_inputs(words, say=None):
    """The inputs [(path, size, name)] in the order of a manifest. 66 naming all that are missing; 64 for
    names that cannot be. say (fielded words): is told what is missing, which goes empty then: module
    libraries leave ports unconnected."""
    found, bad = [], []
    for word in dict.fromkeys(words):
        (name, path), before = split_input(word), len(bad)
        (add_input_directory if path.endswith("/") else add_input_file)(name, utf8(path), found, bad)
        if say and len(bad) > before and not path.endswith("/"):
            say(_("input %s: an empty file is sent in its place") % bad[-1])
            found.append((NOTHING, 0, name))
            bad.pop()
    if bad:
        raise missing_inputs(bad)
    found.sort(key=lambda entry: "%d%s"
               % (entry[2].endswith("/"), "\0".join(nfc_parts(entry[2].rstrip("/")))))
    try:
        check_manifest_names([entry[2] for entry in found], reserved=LOG_NAMES, folders=True)
    except ValueError as error:
        raise Stop(EX_USAGE, _("inputs: %s") % error)
    return found


def split_input(word):
    """An input as typed -> (name on the wire, path): FILE, DIR/ or NAME=PATH."""
    name, equals, path = word.partition("=")
    if name and path and not os.path.lexists(utf8(word)):
        return name.rstrip("/"), path
    plain = os.path.normpath(word)
    if plain == "..":
        plain = utf8(os.path.abspath(plain)).decode("utf-8", "replace")
    if plain.startswith(("/", "../")):
        plain = os.path.basename(plain)
    return plain if plain != "." else "", word


def add_input_file(name, path, found, bad):
    """Adds (path, size, name) to found, or to bad what is wrong with it."""
    shown = path.decode("utf-8", "replace")
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            bad.append(_("%s is a directory (%s/ would send all that is in it)") % (shown, shown))
        elif not stat.S_ISREG(info.st_mode):
            bad.append(_("%s is not a file") % shown)
        elif not os.access(path, os.R_OK):
            bad.append("%s: %s" % (shown, os.strerror(errno.EACCES)))
        else:
            found.append((path, info.st_size, name))
    except OSError as error:
        bad.append("%s: %s" % (shown, error.strerror))


def add_input_directory(name, top, found, bad):
    """As add_input_file(), for all files below the directory top, and for directories without any (their
    names end with /). Symbolic links are followed, but into no directory that the way there has passed
    already."""
    todo = [(top, utf8(name), tuple(map(device_and_inode, directories_above(os.path.realpath(top)))))]
    links = 0
    while todo:
        folder, at, above = todo.pop()
        try:
            info = os.stat(folder)
            leaves = sorted(os.listdir(folder))
        except OSError as error:
            bad.append("%s: %s" % (folder.decode("utf-8", "replace"), error.strerror))
            continue
        above += ((info.st_dev, info.st_ino),)
        paths = ((leaf, os.path.join(folder, leaf)) for leaf in leaves)
        folders = {leaf: os.path.islink(path) for leaf, path in paths if os.path.isdir(path)}
        links += sum(folders.values())
        if links > MOST_LINKS:
            return bad.append(_("%s: links to directories lead round and round")
                              % top.decode("utf-8", "replace"))
        if not leaves and at:
            found.append((folder, 0, at.decode("utf-8", "surrogateescape") + "/"))
        for leaf in leaves:
            path, inner = os.path.join(folder, leaf), b"/".join(filter(None, (at, leaf)))
            try:
                shown = inner.decode("utf-8")
            except UnicodeDecodeError:
                bad.append(_("%s: its name is not UTF-8") % path.decode("utf-8", "replace"))
                continue
            if leaf not in folders:
                add_input_file(shown, path, found, bad)
            elif not folders[leaf] or device_and_inode(path) not in above:
                todo.append((path, inner, above))


def directories_above(path):
    """The directories above an absolute path."""
    while path not in (b"/", b"//"):
        path = os.path.dirname(path)
        yield path


def device_and_inode(path):
    """(device, inode) of what is there."""
    info = os.stat(path)
    return info.st_dev, info.st_ino


def missing_inputs(bad):
    """The Stop that names them, as far as a line can hold."""
    more = [_("and %d more") % (len(bad) - KEPT_WORDS)] if len(bad) > KEPT_WORDS else []
    return Stop(EX_NOINPUT,
                _("nothing was registered; inputs that are missing or cannot be read: %s")
                % "; ".join([text[:200] for text in bad[:KEPT_WORDS]] + more))


def add_sums(found, console):
    """Makes the inputs that were found [Input], each read once. 66 if one cannot be read after all."""
    import hashlib
    view = memoryview(bytearray(CHUNK))
    console.stage(_("reading the inputs"), sum(entry[1] for entry in found))
    for place, (path, size, name) in enumerate(found):
        digest, size = hashlib.sha256(), 0
        try:
            if name.endswith("/"):
                found[place] = Input(path, 0, name, digest.hexdigest(), False, os.stat(path).st_mtime)
                continue
            with open(path, "rb", buffering=0) as source:
                info = os.fstat(source.fileno())
                for got in iter(lambda: source.readinto(view), 0):
                    digest.update(view[:got])
                    size += got
        except OSError as error:
            raise missing_inputs(["%s: %s" % (name, error.strerror)])
        console.moved(size)
        found[place] = Input(path, size, name, digest.hexdigest(), bool(info.st_mode & 0o100), info.st_mtime)
    return found


def wanted_results(words):
    """Declared results as (names, patterns). 64 for what cannot be one."""
    names, patterns = [], []
    try:
        for word in words:
            if "*" in word or "?" in word or word.endswith("/"):
                patterns.append(word)
            elif word not in LOG_NAMES:                # those come back always
                names.append(check_name(word))
        names = sorted(set(names), key=nfc_parts)
        check_manifest_names(names, reserved=LOG_NAMES)
        compile_patterns(patterns)
    except ValueError as error:
        raise Stop(EX_USAGE, _("results: %s") % error)
    return names, patterns


def find_token(token_file):
    """The token's function: from token_file, MI_DISTCOMP_TOKEN, or a systemd credential. 78 if there is
    none."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    credential = os.path.join(folder, "mi_distcomp_token") if folder else ""
    if not token_file and os.environ.get("MI_DISTCOMP_TOKEN"):
        token = checked_token(os.environ["MI_DISTCOMP_TOKEN"], "MI_DISTCOMP_TOKEN")
        return lambda: token
    if token_file or credential and os.path.exists(credential):
        return token_from(token_file or credential)
    raise Stop(EX_CONFIG,
               _("no token: --token-file FILE, token_file in [workflow] of the ini, or MI_DISTCOMP_TOKEN"))


def token_from(path):
    """A function that returns the token in the file, read again when the file changes: a calculation outlives
    its token."""
    seen = [None, read_token(path)]

    def token():
        try:
            info = os.stat(utf8(path))
            if seen[0] not in (None, (info.st_mtime, info.st_ino)):
                seen[1] = read_token(path)
            seen[0] = info.st_mtime, info.st_ino
        except (OSError, Stop):
            pass                                       # the old one may still do
        return seen[1]
    return token


def read_token(path):
    """The token in a file that nobody else may read. 78 otherwise."""
    try:
        with open(utf8(path), encoding="utf-8", errors="replace") as text:
            if os.fstat(text.fileno()).st_mode & 0o077:
                raise Stop(EX_CONFIG, _("%s: others may read this token; type: chmod 600 %s") % (path, path))
            return checked_token(text.read(10000), path)
    except OSError as error:
        raise Stop(EX_CONFIG,
                   _("%s: %s (the file with the token: --token-file, or token_file in the ini)")
                   % (path, error.strerror))


def checked_token(text, where):
    """The token in text. 78 if there is none."""
    text = text.strip()
    if not re.match(r"[!-~]+\Z", text):
        raise Stop(EX_CONFIG, _("%s: holds no token (one line of printable ASCII)") % where)
    return text


def take_token(word):
    """The token of fielded words: itself, or fd:N. 78 if there is none."""
    if not re.match(r"fd:\d+\Z", word):
        return checked_token(word, "TOKEN")
    try:
        with open(int(word[3:]), encoding="ascii", errors="replace") as text:
            return checked_token(text.read(10000), word)
    except OSError as error:
        raise Stop(EX_CONFIG, "%s: %s" % (word, error.strerror))


def hide_token(words):
    """Starts this program again with the token (words[2]) in a pipe, where ps does not show it."""
    warning = _("warning: a token on the command line can be seen by others; a token file hides it (see"
                " --help)")
    sys.stderr.write("%s: %s\n" % (PROGRAM, warning))
    sys.stderr.flush()
    reader, writer = os.pipe()
    os.write(writer, words[2].encode())
    os.close(writer)
    os.set_inheritable(reader, True)
    flags = [flag for flag, on in (("-I", sys.flags.isolated), ("-S", sys.flags.no_site)) if on]
    os.execv(sys.executable,
             [os.fsencode(word) for word in [sys.executable] + flags + [os.path.abspath(__file__)]]
             + [utf8(word) for word in words[:2] + ["fd:%d" % reader] + words[3:]])


# ==== many at once ====
# For Python programs and notebooks: futures. However many there are, one parked call waits for all of them in
# one thread, and two others fetch what has ended.
POOLS = {}                     # {the relay, and what else relay_for() takes: its Pool}


def submit(url, site, command, inputs, outputs, parameters="", request_id=None, to=".", patience=PATIENCE,
           allow_refused=False, tell=None, **way):
    """As run(), but returns as soon as the calculation is registered and its inputs are at the relay: a
    future of concurrent.futures, also to be awaited. Its result() gives and raises what run() does;
    accept_id, request_id and state (a text) say more. Ctrl+C in result() or as_completed() ends the waiting
    only; the exception's accept_ids name what goes on. way: token, token_file, ca_file ... of run()."""
    try:
        order, found = order_of(site, command, inputs, outputs, parameters, request_id)
        return pool_of(url, way, tell).submit(order, found, os.fspath(to), allow_refused, patience)
    except Stop as stop:
        raise typed(stop)


def attach(url, request_id_prefix, to=None, outputs=None, patience=PATIENCE, allow_refused=False, tell=None,
           **way):
    """The futures of all calculations whose request_id begins so, the oldest first: for a program that was
    started again. Results go where submit() said, or each into to/ACCEPT_ID. outputs: for those that this
    user has not submitted on this host."""
    try:
        named = outputs and wanted_results([outputs] if isinstance(outputs, str) else outputs) + (".", "")
        pool, found = pool_of(url, way, tell), []
        for row in pool.rows_of(request_id_prefix, patience):
            names, patterns, folder, signed = named or remembered(pool.sender, row["accept_id"])
            folder = folder if to is None else os.path.join(os.fspath(to), row["accept_id"])
            found.append(pool.add(row, folder, Wanted(names, patterns, True, allow_refused, signed)))
        return found
    except Stop as stop:
        raise typed(stop)


def as_completed(futures, timeout=None):
    """As that of concurrent.futures; after Ctrl+C the exception's accept_ids name what goes on."""
    import concurrent.futures
    futures = list(futures)
    try:
        for future in concurrent.futures.as_completed(futures, timeout):
            yield future
    except KeyboardInterrupt as leaving:
        raise interrupted(leaving, [future.accept_id for future in futures if not future.done()])


def interrupted(leaving, accept_ids):
    """The KeyboardInterrupt of a wait, with what goes on."""
    leaving.accept_ids = accept_ids
    leaving.args = (_("interrupted; what was submitted goes on, and attach() finds it: %s")
                    % " ".join(accept_ids[:3] + ["..."] * (len(accept_ids) > 3)),)
    return leaving


def typed(error, relay=None, accept_id=""):
    """The exception for a Python program: a Stop is of the kind of its code."""
    if isinstance(error, (RelayAway, RelayRefused)):
        error = stop_for(error, relay, accept_id)
    if isinstance(error, Stop):
        error.__class__ = KINDS.get(error.code, Stop)
    return error


def pool_of(url, way, tell):
    """The Pool of a relay and a token."""
    key = (url,) + tuple(sorted(way.items()))
    return POOLS.get(key) or POOLS.setdefault(
        key, Pool([relay_for(url, **way) for number in range(4)], Console(tell)))


def future_kind():
    """The class of the futures: what it stands on takes long to import."""
    from concurrent.futures import Future

    class CalculationFuture(Future):
        """A calculation on an external computer; its Result."""

        @property
        def state(self):
            """Where it is, for people."""
            return state_words(self.row)

        def result(self, timeout=None):
            try:
                return Future.result(self, timeout)
            except KeyboardInterrupt as leaving:
                raise interrupted(leaving, [self.accept_id])

        def __await__(self):
            import asyncio
            return asyncio.wrap_future(self).__await__()

        def __repr__(self):
            return "<%s %s: %s>" % (self.request_id, self.accept_id, self.state)

    return CalculationFuture


class Pool:
    """The open futures of one relay and token. relays: its clients: of who submits, under `sending`; of the
    thread that waits; of the threads that fetch, so that a large result does not keep the others waiting."""

    def __init__(self, relays, console):
        import queue
        self.sender = relays[0]
        self.waiter = relays[1]
        self.fetchers = relays[2:]
        self.sending = threading.Lock()
        self.changed = threading.Condition()           # of `open` and `over`
        self.open = {}                                 # {accept_id: future}
        self.over = collections.deque(maxlen=10000)    # what has ended before it was in `open`, and others'
        self.limits = {}                               # the relay's
        self.known = ""                                # the relay's stamp: what was before it is known here
        self.todo = queue.Queue()                      # (function, its future) for who fetches
        self.kind = future_kind()
        for relay in relays:
            relay.on_outage = console.tell_away
            relay.v1 = False
            relay.waits_for_token = relay is not self.sender

    def submit(self, order, found, to, allow_refused, patience):
        """1. and 2. of a calculation; its future."""
        console = Console()
        make_target(to)
        with self.sending:
            try:
                self.begin(patience)
                start_calculation(self.sender, order, found, console, patience, self.limits)
            except (RelayAway, RelayRefused) as error:
                raise stop_for(error, self.sender, console.accept_id)
            except KeyboardInterrupt as leaving:
                raise interrupted(leaving, [console.accept_id] if console.accept_id else [])
            remember(self.sender, console.accept_id, order, to, console.signed)
        row = dict(console.first_look or {"progress": "not start"}, accept_id=console.accept_id,
                   request_id=order.request_id)
        return self.add(row, to, Wanted(order.names, order.patterns, True, allow_refused, console.signed),
                        console.resend_inputs)

    def begin(self, patience):
        """First contact, before anything is registered: from here on no end is missed. 64 at a relay that
        knows no such call."""
        if self.known:
            return
        self.limits = first_contact(self.sender, patience)
        self.known = ask_list(self.sender, {"request_id": os.urandom(16).hex()}, patience)["known"]
        for relay in self.fetchers:
            threading.Thread(target=self.fetch_forever, args=(relay,), daemon=True).start()
        threading.Thread(target=self.wait_forever, daemon=True).start()

    def rows_of(self, prefix, patience):
        """The rows of all calculations whose request_id begins so, the oldest first."""
        with self.sending:
            try:
                self.begin(patience)
                fields = {"request_id": prefix}
                first = ask_list(self.sender, fields, patience)
                return list(pages_of_list(self.sender, fields, first, patience))[::-1]
            except (RelayAway, RelayRefused) as error:
                raise stop_for(error, self.sender)

    def add(self, row, to, wanted, resend=None):
        """The future of a calculation; resend: a function that sends its inputs once more."""
        accept_id = row["accept_id"]
        with self.changed:
            if accept_id in self.open:
                return self.open[accept_id]
            future = self.open[accept_id] = self.kind()
            future.set_running_or_notify_cancel()      # it goes on, whoever gives up waiting
            future.accept_id, future.request_id, future.row = accept_id, row.get("request_id"), row
            future.to, future.wanted, future.resend = to, wanted, resend
            over = accept_id in self.over
            self.changed.notify()
        self.take(dict(row, progress="got return") if over else row)
        return future

    def take(self, row):
        """What the relay says of a calculation."""
        accept_id, ended = row["accept_id"], row.get("progress") == "got return"
        with self.changed:
            future = self.open.pop(accept_id, None) if ended else self.open.get(accept_id)
            if ended and future is None:
                self.over.append(accept_id)
        if future is None:
            return
        future.row = row
        if ended:
            self.todo.put((self.fetch, future))
        elif future.resend and lacks_inputs(row):
            self.todo.put((self.send_again, future))   # the relay was restored from a backup

    def wait_forever(self):
        """A thread: the one call that waits."""
        while True:
            with self.changed:
                while not self.open:
                    self.changed.wait()
            try:
                self.look()
            except Exception as error:
                with self.changed:
                    failed, self.open = self.open, {}
                for future in failed.values():
                    future.set_exception(typed(error, self.waiter, future.accept_id))

    def look(self):
        """Waits for what changes, and takes it. What the relay does not know any more has its fetch say
        so."""
        there = set(self.open)                         # sooner than it is asked: all of it is registered
        found = ask_list(self.waiter, {"known": self.known, "wait": WAIT})
        for row in pages_of_list(self.waiter, {}, found):
            self.take(row)
            there.discard(row["accept_id"])
            if found.get("whole") and not there:
                break
        for accept_id in there if found.get("whole") else ():
            self.take({"accept_id": accept_id, "progress": "got return"})
        self.known = found["known"]

    def fetch_forever(self, relay):
        """A thread: fetches what has ended."""
        while True:
            work, future = self.todo.get()
            try:
                work(future, relay)
            except Exception as error:
                future.set_exception(typed(error, relay, future.accept_id))

    def fetch(self, future, relay):
        """9. of a calculation."""
        future.set_result(fetch(relay, future.accept_id, future.to, future.wanted, Console()))

    def send_again(self, future, _relay):
        """2. once more."""
        with self.sending:
            future.resend()


def ask_list(relay, fields, patience=None):
    """An answer to v2/list, as it must be. 64 at a relay that knows no such call, 76 if it is none."""
    try:
        if relay.v1:
            raise RelayRefused(404, "")
        found = relay.ask("GET", "v2/list", dict({"v": 2, "all": 1}, **fields), fields.get("wait", 0),
                          patience)
    except RelayRefused as error:
        if error.code not in (403, 404):
            raise
        raise Stop(EX_USAGE, _("%s: the relay is of an older version, which does not tell all that a user has"
                               " there") % relay.url)
    rows = found.get("calculations")
    if not (isinstance(found.get("known"), str) and isinstance(rows, list)
            and all(isinstance(row, dict) and ACCEPT_ID.match(str(row.get("accept_id"))) for row in rows)):
        raise Stop(EX_PROTOCOL, _("%s: the relay's answer holds no proper list") % relay.url)
    return found


def pages_of_list(relay, fields, found, patience=None):
    """Every row of a list whose first page is found, the newest first."""
    while True:
        for row in found["calculations"]:
            yield row
        if not found["calculations"] or found.get("next") is None:
            return
        found = ask_list(relay, dict(fields, before=found["next"]), patience)


# ==== command line ====
SCHEMES = ("http://", "https://")      # a first word that begins so makes fielded words of all


def main(argv=None):
    """The program; returns its exit code."""
    words, program = arguments(argv), argv is None
    if (program and len(words) > 5 and words[0].startswith(SCHEMES) and not words[2].startswith("fd:")
            and sys.executable):
        hide_token(words)
    options = parse(words)
    if about_itself(options):
        return 0
    if program:
        no_core_dump()
        import _signal                                 # what is built in of signal: no enums at every start
        _signal.signal(_signal.SIGTERM, on_sigterm)
    return run_word(options)


def run_word(options):
    """Does what the words say; the exit code."""
    function = SUBCOMMANDS[options.word][0]
    if function in (cmd_check, cmd_login, cmd_keygen):
        return function(options)
    relay, console = relay_of_options(options)[0], make_console(options)
    relay.on_outage = console.tell_away
    try:
        return function(options, relay, console)
    except (Stop, RelayAway, RelayRefused, KeyboardInterrupt) as error:
        stop = (stop_after_signal(error, console, relay, options) if isinstance(error, KeyboardInterrupt)
                else error)
        stop = stop if isinstance(stop, Stop) else stop_for(stop, relay, console.accept_id)
        if options.json:
            failure = Result(console.accept_id, stop.code, "none", str(stop), [], {}, {}, "workflow")
            print(json_of(failure._asdict()))
        raise stop
    finally:
        console.close()


def parse(words):
    """The command line as options, the results checked. 64 for words that are too few, too many or none that
    could be meant."""
    fielded, words = (words[:7], words[7:]) if words and words[0].startswith(SCHEMES) else ([], words)
    options = read_line(words)
    options.fielded = fielded
    if options.help or options.version:
        return options
    options.inputs, options.outputs = sum(options.inputs, []), sum(options.outputs, [])
    if fielded:
        take_fielded_words(options)
    elif len(options.words) > 5 and options.words[0] not in SUBCOMMANDS:
        raise Stop(EX_USAGE,
                   _("what is %s? (BASE_URL SITE TOKEN COMMAND IN OUT: BASE_URL begins with http:// or"
                     " https://)") % printable(options.words[0])[:100])
    take_word(options)
    names, patterns = wanted_results(options.outputs)
    options.wanted = Wanted(names, patterns, True, options.allow_refused) if options.outputs else None
    options.agreed, options.to = options.to is not None, options.to or "."
    if options.word in ("run", "submit"):
        options.order = Order(options.site, options.command, options.param, names, patterns,
                              options.request_id or os.urandom(16).hex())
    options.accept_ids = options.words[1:] if "ACCEPT_ID" in SUBCOMMANDS[options.word][1] else []
    check_ids(options.accept_ids)
    return options


def take_fielded_words(options):
    """BASE_URL SITE TOKEN COMMAND ... as the options of `run`. 64 if there are too few or too many."""
    if len(options.fielded) < 6 or options.words:
        raise Stop(EX_USAGE, _("it must be: BASE_URL SITE TOKEN COMMAND IN1:IN2:... OUT1:OUT2:..."
                               " [\"PARAMETERS\"]; --help says more"))
    options.url, site, token, command, inputs, outputs = options.fielded[:6]
    options.inputs = [word for word in inputs.split(":") if word]
    options.outputs = [word for word in outputs.split(":") if word]
    options.words, options.param = ["run", site, command], (options.fielded[6:] or [""])[0]


def check_ids(ids):
    """64 unless these are ACCEPT_IDs."""
    for one in ids:
        if not ACCEPT_ID.match(one):
            raise Stop(EX_USAGE,
                       _("%s: not an ACCEPT_ID (run and submit print it; its first eight characters do)")
                       % printable(one)[:100])


def make_console(options):
    """Who is told what: a terminal all; otherwise stdout, unless it must hold one thing only; then stderr,
    but not much."""
    terminal = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None
    alone = options.json or options.word not in ("run", "wait", "result")
    out = terminal or sys.stdout
    if alone and not terminal:
        out = CappedStream(sys.stderr)

    def tell(line):
        out.write(line + "\n")
        out.flush()
    options.tell, console = tell, Console() if options.quiet else Console(tell, terminal)
    console.fielded = bool(options.fielded)
    console.named = bool(options.request_id)
    console.allow_refused = options.allow_refused
    SAY.update(level=max(0, 2 - options.verbose), debug=bool(options.verbose),
               log=console if console.terminal else out)

    def output(stream, text):
        to = sys.stderr if stream == "err" and terminal else sys.stdout
        to.write(text)
        to.flush()
    if options.word == "output" or not options.quiet and not alone:
        console.output = output
    if options.deadline is not None and options.word in ("run", "wait"):
        console.deadline = time.monotonic() + options.deadline
    return console


def relay_of_options(options):
    """The relay of the options and the ini, and the ini's section. 78 if something is not set."""
    ini = read_ini(find_ini(options.ini, ini_folders(__file__)), INI_KEYS)["workflow"]
    if ini["lang"] != "auto":
        choose_language(ini["lang"])
    url = options.url or ini["url"]
    if not url:
        raise Stop(EX_CONFIG, _("no relay: --url URL, or url in [workflow] of the ini"))
    token, path = "", options.token_file or ini["token_file"]
    ini["ca_file"] = options.ca_file or ini["ca_file"]
    relay = RelayClient(url, lambda: token,
                        **{key: ini[key] for key in ("ca_file", "proxy", "client_cert", "client_key")})
    relay.sign_key = options.sign_key or ini["sign_key"]
    relay.signed_by = options.require_signed_by or ini["require_signed_by"]
    relay.lanes = options.lanes
    if options.fielded:
        token = take_token(options.fielded[2])
    elif options.word != "login" and not (options.word == "check" and waits_for_enrolling(path)):
        if has_code(path) and options.word != "check":
            sys.stderr.write(enroll_by_file(relay, path, "workflow"))
        relay.token = find_token(path)
    return relay, ini


def on_sigterm(number, frame):
    """SIGTERM: as Ctrl+C, with another exit code. A second one, as of `timeout`, must not disturb what
    follows the first."""
    import _signal
    _signal.signal(number, lambda number, frame: None)
    exit_after(EX_TEMPFAIL, LEAVE)
    raise KeyboardInterrupt("SIGTERM")


def stop_after_signal(leaving, console, relay, options):
    """The Stop after Ctrl+C or SIGTERM: how to go on."""
    code = EX_TEMPFAIL if leaving.args else EX_INTERRUPT
    if not console.accept_id:
        return Stop(code,
                    _("interrupted; nothing was registered") if options.word in ("run", "submit")
                    else _("interrupted"))
    if leaving.args and options.on_term == "cancel":
        try:
            relay.close()
            cancel(relay, console.accept_id, "SIGTERM", TERM_PATIENCE)
            return Stop(code, _("%s: stopped by SIGTERM; the calculation is cancelled") % console.accept_id)
        except (RelayAway, RelayRefused) as error:
            console.say(error)
    if options.fielded and not leaving.args and delete_waiting(relay, console):
        return Stop(code, _("%s: interrupted; it was waiting and is deleted") % console.accept_id)
    if not console.allowed:
        return Stop(code,
                    _("%s: interrupted before all inputs were sent; the same words with --request-id %s go"
                      " on") % (console.accept_id, console.order.request_id))
    return Stop(code,
                _("%s: interrupted; the calculation goes on, %s.py wait %s continues")
                % (console.accept_id, PROGRAM, console.accept_id))


def delete_waiting(relay, console):
    """What Ctrl+C under the fielded words does to a calculation that nobody has taken yet. False if one has,
    or the relay does not answer."""
    try:
        relay.close()
        fields = dict({"accept_id": console.accept_id}, **({} if console.allowed else {"delete": "force"}))
        relay.call_v1("POST", "cancel-wait-calc", fields, timeout=TERM_PATIENCE)
        return True
    except (RelayAway, RelayRefused):
        return False


def cmd_run(options, relay, console):
    """run, and the fielded words."""
    found = gather_inputs(options.inputs, console.say if options.fielded else None)
    if options.dry_run:
        return dry_run(options, relay, found)
    result = calculate(relay, options.order, found, options.to, console, options.patience)
    return report_end(result, options.to, options, console)


def dry_run(options, relay, found):
    """run --dry-run: what would be sent, and what the relay says to it: without a request id it registers
    nothing."""
    limits, order = first_contact(relay, options.patience), options.order
    if relay.v1:
        raise Stop(EX_USAGE, _("%s: a fielded relay cannot do that") % "--dry-run")
    check_limits(limits, found)
    files = add_sums(found, Console())
    try:
        relay.ask("POST", "add-calcinfo", registration(order, files), patience=options.patience)
    except RelayRefused as error:
        if "request_id" not in str(error):
            raise stop_for(error, relay, registering=True)
    total = sum(entry.size for entry in files)
    if options.json:
        print(json_of({"site": order.site, "command": order.command, "parameters": order.parameters,
                       "inputs": {entry.name: entry.size for entry in files}, "bytes": total,
                       "results": order.names + order.patterns}))
        return
    for entry in files:
        print(_("would send: %s (%d bytes)") % (printable(entry.name), entry.size))
    for text in order.names + order.patterns:
        print(_("would ask for: %s") % printable(text))
    print(_("%d inputs, %d bytes; the relay would take it (nothing was registered)") % (len(files), total))


def cmd_list(options, relay, console):
    """list: this user's calculations."""
    first_contact(relay, options.patience)
    columns = ("accept_id", "state", "site", "registered", "exit_code", "request_id", "command", "reason")

    def pictures():
        fields, rows = {}, {}
        while True:
            found = ask_list(relay, fields, None if rows else options.patience)
            rows = {} if found.get("whole") else rows
            rows.update((row["accept_id"], row) for row in pages_of_list(relay, {}, found))
            yield [row for row in sorted(rows.values(), key=lambda row: row.get("registered") or 0)
                   if options.all or not row.get("fetched")]
            relay.waits_for_token, fields = True, {"known": found["known"], "wait": WAIT}

    def lines_of(rows, width):
        return table_lines([dict(dict.fromkeys(columns), **dict(row, **cells_of(row))) for row in rows],
                           columns, width)
    show_list(options, pictures(), lines_of)


def cells_of(row):
    """What of a row of a list is told otherwise to people."""
    state = "registered" if lacks_inputs(row) else str(row.get("progress"))
    state = "held" if is_held(row) else state
    cell = state_cell("fetched" if row.get("fetched") else state, row.get("status"))
    if row.get("out_of_contact") is not None:
        cell = "?" + cell[1:] + _(", out of contact")
    at = row.get("registered")
    return {"state": cell, "reason": row.get("reason") or row.get("what"),
            "registered": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
            if type(at) in (int, float) and 0 <= at < 1 << 32 else ""}


def cmd_submit(options, relay, console):
    """submit: the accept_id, alone on stdout."""
    start_calculation(relay, options.order, gather_inputs(options.inputs), console, options.patience)
    print(json.dumps({"accept_id": console.accept_id, "request_id": options.order.request_id}) if options.json
          else console.accept_id)


def whole_ids(options, relay, console):
    """First contact; the ACCEPT_IDs as typed, beginnings of them made whole by the relay."""
    ids, console.allowed = [], True
    first_contact(relay, options.patience)
    for console.accept_id in options.accept_ids:
        found = {}
        if len(console.accept_id) < 36 and not relay.v1:
            fields = {"v": 2, "accept_id": console.accept_id, "wait": 0, "known": ""}
            found = relay.ask("GET", "calc-progress", fields, patience=options.patience)
        whole = str(found.get("accept_id"))
        ids.append(whole if ACCEPT_ID.match(whole) and whole.startswith(console.accept_id)
                   else console.accept_id)
    console.accept_id = ids[0]
    return ids


def cmd_fetch(options, relay, console):
    """wait and result: the last exit code that is not 0."""
    console.accept_id = options.accept_ids[0]            # that a wait is interrupted changes nothing
    code, ids = 0, whole_ids(options, relay, console)
    for accept_id in wait_for(relay, ids, console) if options.word == "wait" else ids:
        console.accept_id = accept_id
        to = options.to if len(ids) == 1 else os.path.join(options.to, accept_id)
        wanted = options.wanted or recall(relay, accept_id, to, options)
        if options.word == "wait":
            result = fetch_after_wait(relay, accept_id, to, wanted, console)
        else:
            result = fetch(relay, accept_id, to, wanted, console, options.patience)
        code = report_end(result, to, options, console) or code
    return code


def cmd_output(options, relay, console):
    """output: what the command has written so far; --follow: until it ends."""
    accept_id, = whole_ids(options, relay, console)
    live = LiveOutput(accept_id, console)
    if relay.v1:
        raise Stop(EX_USAGE, _("%s: a fielded relay cannot do that") % "output")
    console.terminal, stamp = None, ""                   # nothing but the output
    while True:
        fields = {"v": 2, "accept_id": accept_id, "wait": WAIT if stamp else 0, "known": stamp}
        found = relay.ask("GET", "calc-progress", fields, WAIT, patience=None if stamp else options.patience)
        live.take(relay, found["output"] if isinstance(found.get("output"), list) else [])
        if (not options.follow or found.get("progress") in ("calc end", "getting return", "got return")
                or not console.output):
            return 0
        relay.fatal_kinds, relay.waits_for_token, stamp = (), True, str(found.get("stamp") or "")


def cmd_change(options, relay, console):
    """cancel (what is running is stopped by its external computer, where the relay can tell it) and rerun:
    one line of stdout for each."""
    ids = whole_ids(options, relay, console)
    word = options.word
    fields = {"v": 2, "force": options.force, "reason": options.reason}
    for console.accept_id in ids:
        try:
            if word == "cancel":
                text = cancel(relay, console.accept_id, options.reason, options.patience)
            elif relay.v1:
                raise Stop(EX_USAGE, _("%s: a fielded relay cannot do that") % word)
            else:
                rerun(relay, console.accept_id, fields, options.patience)
                text = _("allowed once more")
        except RelayRefused as error:
            if error.code != 409:
                raise
            raise Stop(EX_REFUSED, _("%s: the relay says: %s") % (console.accept_id, error))
        print("%s %s" % (console.accept_id, text))


def rerun(relay, accept_id, fields, patience):
    """Has a calculation run once more. One that was signed is ordered anew: an order runs once."""
    fields = dict(fields, accept_id=accept_id)
    if not relay.sign_key:
        return relay.ask("POST", "rerun", fields, patience=patience)
    names, patterns, to, signed = remembered(relay, accept_id)
    if not signed:
        raise Stop(EX_USAGE, _("%s: its order was not signed on this side; rerun it without --sign-key")
                   % accept_id)
    fields["signed"] = signed_order(json.loads(signed.partition("\n")[0]), relay.sign_key)
    found = relay.ask("POST", "rerun", fields, patience=patience)
    remember(relay, accept_id, Order("", "", "", names, patterns, ""), to,
             order_in_force(found, fields["signed"]))


def cmd_keygen(options):
    """keygen: a key for --sign-key, and the lines for who is to trust it."""
    import getpass
    make_key(options.file, options.user or getpass.getuser())
    with open(utf8(options.file + ".pub"), encoding="utf-8") as text:
        print("[signer %s]\nkey = %s" % (options.user or getpass.getuser(), text.read().strip()))


def cmd_status(options, relay, console):
    """status: one line of stdout for each."""
    for console.accept_id in whole_ids(options, relay, console):
        if relay.v1:
            found = v1_known(relay, console.accept_id, options.patience)
        else:
            found = relay.ask("GET", "calc-progress",
                              {"v": 2, "accept_id": console.accept_id, "wait": 0, "known": ""},
                              patience=options.patience)
        reason = printable(found.get("reason") or "")[:300]
        if options.json:
            keys = ("progress", "status", "reason", "queue", "what", "out_of_contact", "exit_code", "signal")
            print(json_of(dict({key: found.get(key) for key in keys}, accept_id=console.accept_id)))
        else:
            print("%s %s%s" % (console.accept_id, state_words(found), " (%s)" % reason if reason else ""))
            console.warn(found)


def cmd_explain(options, relay, console):
    """explain: why each is where it is. What keeps the relay from saying so is a cause, too, with its exit
    code."""
    ids, code = options.accept_ids, 0
    try:
        ids = whole_ids(options, relay, console)
        found = [cause_of(relay, accept_id, options.patience) for accept_id in ids]
    except (Stop, RelayAway, RelayRefused) as error:
        stop = error if isinstance(error, Stop) else stop_for(error, relay, console.accept_id)
        if stop.code == EX_USAGE or not hasattr(stop, "cause"):
            raise stop
        code, found = stop.code, [told_cause(stop.cause)] * len(ids)
    for accept_id, one in zip(ids, found):
        show_cause(accept_id, one, options.json)
    return code


def cmd_login(options):
    """A token for a user's password, kept in token_file."""
    relay, ini = relay_of_options(options)
    return log_in(relay, options.user, options.token_file or ini["token_file"])


def cmd_check(options):
    """Looks at this host and the way to the relay; changes nothing. With SITE (and COMMAND): would the relay
    take such a calculation?"""
    site, command = options.site, options.command
    rows = [(None, _("running as root; better as a user of its own"))] if os.geteuid() == 0 else []
    try:
        path = find_ini(options.ini, ini_folders(__file__))
        rows += [finding_of_file(path, 0o755)] if path else []
        ini = read_ini(path, INI_KEYS)["workflow"]
        path = options.token_file or ini["token_file"]
        rows += [finding_of_token(path)] if path else []
        rows += [finding_of_file(ini["client_key"], 0o600)] if ini["client_key"] else []
        for name in (options.ca_file or ini["ca_file"], ini["client_cert"]):
            rows += [finding_of_file(name, 0o755)] if name else []
        rows += findings_of_disk(os.getcwd(), 0) + [finding_of_open_files(256)]
        relay, ini = relay_of_options(options)
        rows += findings_of_relay(relay, [] if waits_for_enrolling(path) else probes(site, command))
    except Stop as stop:
        rows.append((False, str(stop)))
    return print_findings(rows, options.json)


def probes(site, command):
    """Every call of this side, made so that it does nothing, and what the relay says to it then."""
    one = {"accept_id": "00000000-0000-4000-8000-000000000000"}
    info = {"remote-site": site, "command": command or "-", "parameters": "", "parameter_files": {},
            "result_files": {}}
    said = "not in the list of site" if site else ""             # COMMAND is missing; or SITE, too
    if command:
        said = "request_id"                            # it would go on
    return [("GET", "calc-progress", one, "no information"),
            ("POST", "add-calcinfo", {"calc-info": info}, said), ("GET", "calc-status", one, ""),
            ("POST", "allow-wait-calc", one, ""), ("GET", "get-calc-result", one, ""),
            ("POST", "finish", one, ""), ("POST", "cancel-wait-calc", dict(one, stop=True), ""),
            ("POST", "rerun", one, ""), ("GET", "output", dict(one, stream="out", offset=0), ""),
            ("GET", "v2/explain", one, ""), ("GET", "files/%s/result/0" % one["accept_id"], {}, ""),
            ("POST", "files/%s/input/0?v=2&offset=0" % one["accept_id"], {}, "")]


# ==== fielded ====
# A fielded relay ("v1"): the same steps in its words. It knows no request id and no exit code, it forgets
# everything when it stops, and a result once it was asked for.

def v1_start(relay, order, found, console, patience):
    """1 and 2. Registers the calculation, its inputs inside, and lets the external computer have it."""
    found = [entry for entry in found if not entry[2].endswith("/")]
    v1_check(relay, order, found, console)
    files = add_sums(found, console)
    mine = v1_mark(order, files)
    none = {"content": "", "mimetype1": "", "mimetype2": ""}
    body = json_with_files(lambda mark: {"calc-info": {
        "command": order.command, "remote-site": order.site, "parameters": order.parameters,
        "parameter_files": {entry[2]: ["", "", ""] if entry[0] == NOTHING
                            else [mark, "application/octet-stream;", "charset=binary"] for entry in files},
        V1_MARK: mine, "result_files": {name: none for name in tuple(order.names) + LOG_NAMES}}}, [
            (entry.path, 0, entry.size, entry.sum256) for entry in files if entry.path != NOTHING])
    console.stage(_("sending the inputs"))
    known = (relay.retried(lambda: v1_own(relay, mine, console), patience, NO_TOKEN_CODES[1:])
             if console.named else None)
    accept_id = known or v1_register(relay, mine, body, console, patience)
    if not ACCEPT_ID.match(str(accept_id)):
        raise Stop(EX_PROTOCOL, _("%s: the relay's answer holds no accept_id") % relay.url)
    try:
        v1_allow(relay, accept_id)
    except BaseException:
        if not known:
            v1_take_back(relay, accept_id)
        raise
    relay.fatal_kinds, relay.waits_for_token, console.accept_id = (), True, accept_id
    remember(relay, accept_id, order)
    log("info", accept_id, "1 add-calcinfo", site=order.site, command=order.command, inputs=len(files), v=1)
    log("info", accept_id, "2 allow-wait-calc", files=len(files))
    console.say(_("found again (request id %s)") % order.request_id if known
                else _("registered at the relay"))


def v1_check(relay, order, found, console):
    """What a fielded relay cannot do is refused before anything is registered: 64, or 77 for a file that is
    too large."""
    for path, size, name in found:
        if "/" in name:
            raise Stop(EX_USAGE,
                       _("nothing was registered; %s: a fielded poller takes no input with a directory"
                         " (without it: NAME=PATH)") % name)
    if order.patterns:
        raise Stop(EX_USAGE,
                   _("nothing was registered; %s: a fielded relay takes no patterns, name each result")
                   % order.patterns[0])
    if order.parameters and not console.fielded:
        raise Stop(EX_USAGE,
                   _("nothing was registered; --param: a fielded poller would run the command without it"
                     " (BASE_URL SITE TOKEN COMMAND ... sends it all the same)"))
    check_limits({"max_file": V1_FILE_MAX}, found)
    if console.named:
        console.say(_("warning: a fielded relay forgets a calculation whose result was fetched: with the"
                      " same --request-id another one is made then"))


def v1_mark(order, files):
    """The text of ours in a calc-info: which request, and what for. A fielded relay keeps it and shows it by
    get-calcinfo."""
    import hashlib
    what = json.dumps([order.site, order.command, order.parameters, order.names,
                       [entry[2:4] for entry in files]])
    return "%s %s" % (order.request_id, hashlib.sha256(what.encode()).hexdigest())


def v1_register(relay, mine, body, console, patience):
    """1. add-calcinfo; the accept_id. When an answer was lost it looks first whether the relay has it: a
    second registration would leave the first one behind, and that blocks the site."""
    doubt = False                                      # did one go out of which there is no answer?

    def once():
        nonlocal doubt
        found = v1_own(relay, mine, console) if doubt else None
        if found:
            return found
        doubt = True
        try:
            return relay.call_v1("POST", "add-calcinfo", {}, body=body).get("accept_id")
        except RelayAway as error:
            doubt = error.kind in ("network", "between")
            raise

    try:
        return relay.retried(once, patience, NO_TOKEN_CODES[1:])
    except (RelayAway, RelayRefused) as error:
        raise stop_for(error, relay, registering=True)
    except ValueError as error:
        raise Stop(EX_IOERR, _("nothing was registered; an input cannot be sent: %s") % error)
    except KeyboardInterrupt:
        try:
            left = v1_own(relay, mine, console, 5) if doubt else None
        except RelayAway:
            left = None
        if left:
            v1_take_back(relay, left)
        raise


def v1_own(relay, mine, console, timeout=None):
    """The accept_id of a calculation with our mark, or None; of several the first, the others are taken back.
    RelayAway. The whole table comes, with all its files: it passes through a directory that is removed
    again."""
    import shutil
    import tempfile
    folder = tempfile.mkdtemp(prefix="mi-")
    try:
        found = relay.call_v1("GET", "get-calcinfo", {}, folder=utf8(folder), timeout=timeout or V1_TIMEOUT)
        table = {accept_id: entry["calc-info"]
                 for accept_id, entry in found.items() if ACCEPT_ID.match(accept_id)}
        ids = [accept_id
               for accept_id, info in table.items() if isinstance(info, dict) and info.get(V1_MARK) == mine]
    except (RelayRefused, ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        console.say(_("warning: the relay does not show what it has (%s): if a registration arrived whose"
                      " answer was lost, it stands in the site's way until the relay forgets it (half an"
                      " hour)") % error)
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for accept_id in ids[1:]:
        v1_take_back(relay, accept_id)
    return ids[0] if ids else None


def v1_take_back(relay, accept_id):
    """A registration that nobody allows would block the site of a fielded relay for 30 minutes."""
    try:
        relay.call_v1("POST", "cancel-wait-calc", {"accept_id": accept_id, "delete": "force"}, timeout=5)
    except (RelayAway, RelayRefused):
        pass


def v1_allow(relay, accept_id):
    """2. allow-wait-calc; 401 is what its repeat is answered."""
    try:
        relay.ask_v1("POST", "allow-wait-calc", {"accept_id": accept_id})
    except RelayRefused as error:
        if error.code != 401:
            raise


def v1_state(relay, accept_id, patience=None):
    """(progress, status) in the words of the wire; (None, why) if the relay does not know it, or no
    longer."""
    def word(name):
        return (str(relay.ask_v1("GET", name, {"accept_id": accept_id}, patience).get("message")).split(":")
                + [""])[1]
    try:
        status = word("calc-status")
        progress = word("calc-progress")
        # both may have changed in between
        return progress, word("calc-status") if progress == "got return" else status
    except RelayRefused as error:
        if error.more.get("why") == "html" or error.code not in (400, "400", "0300"):
            raise
        return None, str(error).split(":", 2)[-1]


def v1_known(relay, accept_id, patience):
    """v1_state() as fields of calc-progress. 64 if the relay does not know it."""
    progress, status = v1_state(relay, accept_id, patience)
    if progress is None:
        raise Stop(EX_USAGE, _("%s: the relay does not know it (any longer): %s") % (accept_id, status))
    return {"progress": progress, "status": status}


def v1_cancel(relay, accept_id, patience):
    """A fielded relay forgets it; it cannot stop what runs."""
    v1_known(relay, accept_id, patience)
    relay.ask_v1("POST", "cancel-wait-calc", {"accept_id": accept_id, "delete": "force"}, patience)
    return _("a fielded relay has forgotten it; what runs on the external computer runs on")


def v1_follow(relay, accept_id, console):
    """3 to 8 happen elsewhere: asks until the results are at the relay, or the relay has forgotten."""
    wait, last = 1, None
    while True:
        now = v1_state(relay, accept_id)
        if now[0] is None:
            return                                     # v1_fetch() says so
        relay.fatal_kinds, relay.waits_for_token = (), True
        text = state_words({"progress": now[0], "status": now[1]}, console.fielded)
        console.stage(text)
        if now != last:
            log("info", accept_id, "3-8 progress", progress=now[0], status=now[1])
            console.say(text)
        if now[0] == "got return":
            return
        relay.pause(wait)
        wait, last = min(10, wait * 2), now            # the fielded pace is 10 s


def v1_fetch(relay, accept_id, to, wanted, console, patience):
    """9. The results into the directory `to`; a Result. 75 if they are not there yet, 74 if they cannot be
    written."""
    progress, status = v1_state(relay, accept_id, patience)
    if progress is None:
        return v1_lost(accept_id, status)
    if progress != "got return":
        raise Stop(EX_TEMPFAIL,
                   _("%s: there is no result yet (%s)")
                   % (accept_id, state_words({"progress": progress, "status": status})))
    folder, stage = v1_place(to, accept_id, wanted)
    try:
        files = v1_get(relay, accept_id, stage, console)
    except (RelayRefused, Stop) as error:
        folder.close(True)
        if isinstance(error, Stop):
            raise
        return v1_lost(accept_id, error)
    try:
        names = v1_names(files, wanted)
        stored, missing = v1_store(files, names, stage, folder)
        folder.close(done=not any(os.path.lexists(folder.part_path(number)) for number in range(len(names))))
    except OSError as error:
        raise Stop(EX_IOERR,
                   _("%s: %s: %s; the relay has forgotten the result, what came is in %s")
                   % (accept_id, (error.filename or b"").decode("utf-8", "replace"), error.strerror,
                      stage.decode("utf-8", "replace")))
    log("info", accept_id, "9 get-calc-result", files=len(stored), missing=len(missing), status=status)
    if status == "completed":
        return Result(accept_id, EX_DATA if missing else 0, status, "", stored, missing, {},
                      "workflow" if missing else "command")
    # why it did not even start, perhaps
    known = "".join("; %s: %s" % pair for pair in sorted(missing.items())[:1])
    return Result(accept_id, V1_ABNORMAL, "abnormal",
                  _("a fielded relay does not tell the command's own exit code") + known, stored, missing, {},
                  "relay")


def v1_lost(accept_id, text):
    """The Result of a calculation that the relay knows no longer."""
    reason = _("a fielded relay forgets all when it stops, and a result once it was asked for: %s") % text
    return Result(accept_id, LOST[0], "abnormal", reason, [], {}, {}, LOST[1])


def v1_place(to, accept_id, wanted):
    """(Target, an empty directory in it for what arrives). 74 if a result could not be put in its place: it
    can be fetched only once."""
    folder = None
    try:
        folder = Target(to, accept_id, wanted.agreed)
        for name in tuple(wanted.names) + LOG_NAMES:
            folder.check_storable(utf8(name))
        stage = folder.part_path(b"v1")
        os.makedirs(stage, 0o700, exist_ok=True)
        v1_empty(stage)
    except (OSError, NotStored) as error:
        if folder is not None:
            folder.close(True)
        name = getattr(error, "name", getattr(error, "filename", None)) or utf8(to)
        raise Stop(EX_IOERR,
                   "%s: %s: %s"
                   % (accept_id, name.decode("utf-8", "replace"), getattr(error, "strerror", None) or error))
    return folder, stage


def v1_empty(stage):
    """Removes what is in it."""
    for name in os.listdir(stage):
        os.unlink(os.path.join(stage, name))


def v1_get(relay, accept_id, stage, console):
    """9. get-calc-result into stage: {NAME: entry}. A fielded relay answers it once; RelayRefused is what it
    says afterwards."""
    def once():
        v1_empty(stage)
        return relay.call_v1("GET", "get-calc-result", {"accept_id": accept_id}, folder=stage,
                             moved=console.moved)

    gone = _("; a fielded relay gives a result once: it cannot be asked for again")
    try:
        found = relay.retried(once, None, NO_TOKEN_CODES[1:])
        files = found["result-info"]["result_files"]
        if not isinstance(files, dict):
            raise ValueError(_("the relay's answer holds no proper result"))
        return files
    except (KeyError, TypeError):
        code, why = EX_PROTOCOL, _("the relay's answer holds no proper result")
    except ValueError as error:
        code, why = EX_PROTOCOL, error
    except OSError as error:
        code, why = EX_IOERR, error.strerror
    except KeyboardInterrupt as leaving:
        code, why = EX_TEMPFAIL if leaving.args else EX_INTERRUPT, _("interrupted")
    raise Stop(code, "%s: %s%s" % (accept_id, why, gone))


def v1_store(files, names, stage, folder):
    """9. Gives the declared results their names: (names stored, {missing: why}). What was not declared is
    left."""
    stored, missing = [], {}
    for number, name in enumerate(names):
        entry = files.get(name)
        try:
            if not isinstance(entry, dict):
                raise ValueError(_("is not there"))
            if entry.get("mimetype1") == "Error":
                raise ValueError(printable(entry.get("mimetype2"))[:1000])
            os.rename(as_blob(entry.get("content"), os.path.join(stage, b"x%d" % number)).path,
                      folder.part_path(number))
            folder.store(number, name, None)
            stored.append(name)
        except ValueError as error:
            missing[name] = str(error)
        except NotStored as error:                     # the relay has forgotten it: it stays
            missing[name] = "%s (%s)" % (error, shown(os.path.realpath(folder.part_path(number))))
    return stored, {name: why for name, why in missing.items() if name not in LOG_NAMES}


def v1_names(files, wanted):
    """What was declared by name, the logs, and those of the relay's names that were declared by pattern, if
    they may be."""
    names, is_wanted = list(wanted.names) + list(LOG_NAMES), declared_matcher(wanted.names, wanted.patterns)
    for name in files:
        try:
            if is_wanted(check_name(name)) and name not in names:
                names.append(name)
        except ValueError:
            pass
    return names


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
    "--in": dict(nargs="+", action="append", default=[], dest="inputs", metavar="INPUT",
                 help="what the command gets"),
    "--out": dict(nargs="+", action="append", default=[], dest="outputs", metavar="RESULT",
                  help="what it is to make"),
    "--param": dict(default="", metavar="TEXT",
                    help="parameters of the command, where the external computer allows them"),
    "--request-id": dict(metavar="R", help="the same R again: the same calculation (default: random)"),
    "--to": dict(metavar="DIR", help="where the results go (default: here)"),
    "--allow-refused": dict(action="store_true", help="0, not 65, where the external computer's rules keep"
                                                      " what a pattern asked for"),
    "--deadline": dict(type=seconds, metavar="TIME",
                       help="cancel the calculation if it has not ended so long from now"),
    "--on-term": dict(choices=("leave", "cancel"), default="leave",
                      help="after SIGTERM: the calculation runs on (default), or ends"),
    "--lanes": dict(type=lanes_of, default=0, metavar="N",
                    help="connections at once for large files: a number, or auto (default: several over a"
                         " distance, else one)"),
    "--dry-run": dict(action="store_true", help="what would be sent, and whether the relay would take it;"
                                                " nothing is registered"),
    "--all": dict(action="store_true", help="all that are kept, finished ones too"),
    "--watch": dict(action="store_true", help="again and again, in place on a terminal, until Ctrl+C"),
    "--reason": dict(default="", metavar="TEXT", help="why, for who looks later"),
    "--sign-key": dict(default="", metavar="FILE", help="signs the order with this private key (of keygen)"),
    "--require-signed-by": dict(default="", metavar="FILE",
                                help="takes only results that a key of this file has signed"),
    "--force": dict(action="store_true", help="also what is out of contact; its late result is refused"),
    "--follow": dict(action="store_true", help="as it comes, until the command ends"),
    "--url": dict(default="", metavar="URL", help="the relay"),
    "--token-file": dict(default="", metavar="FILE", help="0600 file with the token"),
    "--ca-file": dict(default="", metavar="FILE", help="CA of the relay's certificate"),
    "--patience": dict(default=PATIENCE, type=seconds, metavar="TIME",
                       help="how long the relay may be away before anything is registered (default: 60s)")}
TO_RELAY = "--url --token-file --ca-file"
WAITS = "--to --allow-refused --deadline --on-term --lanes --patience --require-signed-by " + TO_RELAY
SUBCOMMANDS = {
    "run": (cmd_run, "SITE COMMAND",
            "Has COMMAND run at SITE with these inputs, waits, and puts the results into the current "
            "directory; the exit code is the command's own.\n"
            "INPUT is FILE, NAME=PATH, or DIR/; RESULT a name or a pattern in quotes (* ? ** and DIR/).",
            "run u-tokyo fatigue_life --in steel.json loads.csv --out life.json",
            "--in --out --param --request-id --dry-run --sign-key " + WAITS),
    "submit": (cmd_submit, "SITE COMMAND",
               "As run, but prints the ACCEPT_ID and does not wait.",
               "submit u-tokyo fatigue_life --in steel.json --out life.json",
               "--in --out --param --request-id --lanes --patience --sign-key " + TO_RELAY),
    "wait": (cmd_fetch, "ACCEPT_ID...",
             "Waits and fetches; several: each into DIR/ACCEPT_ID/. Of an id the first eight characters do.",
             "wait d6d9c05a", "--out " + WAITS),
    "result": (cmd_fetch, "ACCEPT_ID...",
               "Fetches what is there already. On another host, or for somebody else, --out says once more "
               "what is meant.",
               "result d6d9c05a --to results",
               "--to --out --allow-refused --lanes --patience --require-signed-by " + TO_RELAY),
    "status": (cmd_status, "ACCEPT_ID...",
               "One line for each: where it is, how many are before it (explain: why).",
               "status d6d9c05a", "--patience " + TO_RELAY),
    "list": (cmd_list, "",
             "Your calculations at the relay, the newest last: where each is, or how it ended.",
             "list --watch", "--all --watch --patience " + TO_RELAY),
    "explain": (cmd_explain, "ACCEPT_ID...",
                "Why each is where it is: a sentence, who has to act, what to type, since when, what would "
                "change it.",
                "explain d6d9c05a", "--patience " + TO_RELAY),
    "output": (cmd_output, "ACCEPT_ID",
               "What the command has written so far.",
               "output d6d9c05a --follow", "--follow --patience " + TO_RELAY),
    "cancel": (cmd_change, "ACCEPT_ID...",
               "Ends calculations; what their commands have written so far comes back.",
               "cancel d6d9c05a --reason 'wrong input'", "--reason --patience " + TO_RELAY),
    "rerun": (cmd_change, "ACCEPT_ID...",
              "Once more: what ended abnormally, before its result was fetched.",
              "rerun d6d9c05a", "--force --reason --patience --sign-key " + TO_RELAY),
    "keygen": (cmd_keygen, "FILE [USER]",
               "Makes a key for --sign-key: FILE (0600; keep it where only its user reads) and FILE.pub;"
               " prints the lines for the external computer's ini.",
               "keygen ~/.ssh/mi_orders suzuki", ""),
    "check": (cmd_check, "[SITE] [COMMAND]",
              "Looks at this host and the way to the relay, and changes nothing: OK, WARN or FAIL, and "
              "what to do.\n"
              "With SITE and COMMAND: would the relay take such a calculation?",
              "check u-tokyo fatigue_life", TO_RELAY),
    "login": (cmd_login, "[USER]",
              "Asks for the password (relays with auth = login), and keeps the token in token_file.",
              "login suzuki", TO_RELAY)}

INI_KEYS = {                   # {section: {key: (kind, default, meaning)}}: what the shipped ini says of it
    "workflow": {
        "url": (str, "", "of the relay, like https://HOST:50443"),
        "token_file": (str, "", "mode 0600, one line"),
        "ca_file": (str, "", "CA of the relay's certificate, unless it is a public one"),
        "client_cert": (str, "", "where relay or gateway want one"),
        "client_key": (str, "", "its key"),
        "proxy": (str, "",
                  "default: https_proxy or all_proxy of the environment, unless no_proxy names the relay"),
        "sign_key": (str, "", "a private key, as `keygen` makes it: orders are signed with it"),
        "require_signed_by": (str, "", "public keys, one a line: results that none of them has signed are not"
                                       " taken"),
        "lang": (one_of("auto", "en", "ja"), "auto", "en, ja")}}

STOP_REASONS = {"refused": (EX_REFUSED, "poller"), "input": (EX_PROTOCOL, "poller"),
                "disk": (EX_IOERR, "poller"), "cancelled": (EX_INTERRUPT, "relay")}
LOST = (EX_UNAVAILABLE, "relay")       # any other reason why a command has no exit code of its own

SAY["level"] = 2                       # warnings only, unless -v

if __name__ != "__main__":             # for those who import this file: a kind of Stop for each exit code
    KINDS = {code: type(name, (Stop,), {"__module__": __name__}) for code, name in (
        (EX_USAGE, "UsageError"), (EX_NOINPUT, "InputMissing"), (EX_UNAVAILABLE, "Unavailable"),
        (EX_IOERR, "DiskError"), (EX_TEMPFAIL, "TryLater"), (EX_PROTOCOL, "ProtocolError"),
        (EX_REFUSED, "Refused"), (EX_CONFIG, "ConfigError"))}
    globals().update({kind.__name__: kind for kind in KINDS.values()})


# ==== Japanese ====
JA = {
    "%s: cannot be signed with: %s": "%s: 署名に使えません: %s",
    "no signature came; is ssh-keygen older than 8.1? then a key of `keygen`, or one in PEM, does":
        "署名が得られません。ssh-keygen が 8.1 より古ければ、keygen で作った鍵か PEM 形式の鍵を使ってください",
    "it is not signed, or not in this form": "署名がないか、この形式ではありません",
    "the signature does not fit": "署名が合いません",
    "%s: a fielded relay passes nothing that is signed": "%s: 従来の中継サーバーは、署名のあるものを渡しません",
    "%s: its order was not signed on this side (--sign-key), so its results cannot be known as its own":
        "%s: 指示書にこちらで署名していない (--sign-key) ため、結果がそのものであることを確かめられません",
    "%s: its order was not signed on this side; rerun it without --sign-key":
        "%s: 指示書にこちらで署名していません。--sign-key なしで rerun してください",
    "Makes a key for --sign-key: FILE (0600; keep it where only its user reads) and FILE.pub; prints"
    " the lines for the external computer's ini.":
        "--sign-key の鍵を作ります: FILE (0600。本人だけが読める場所に置いてください)"
        " と FILE.pub。外部計算機の ini に書く行を表示します。",
    "nothing was registered; a fielded relay passes nothing that is signed":
        "何も登録していません。従来の中継サーバーは、署名のあるものを渡しません",
    "signs the order with this private key (of keygen)": "この秘密鍵 (keygen で作ったもの) で指示書に署名します",
    "takes only results that a key of this file has signed": "このファイルの鍵で署名された結果だけを受け取ります",
    "they are signed by another key": "別の鍵による署名です",
    "what was signed there is not what the relay has (%s)": "外部計算機が署名した内容が、中継サーバーにあるものと違います (%s)",
    ", out of contact": "、連絡途絶",
    "waiting": "実行待ち",
    "taken": "入力転送中",
    "queued": "順番待ち",
    "ended": "結果待ち",
    "sending": "結果転送中",
    "fetched": "受取済み",
    "held": "公開承認待ち",
    "undelivered": "未送付",
    "delivered": "送付済み",
    "kept": "受取拒否",
    "lost": "打ち切り",
    "out of contact": "連絡途絶",
    "interrupted; what was submitted goes on, and attach() finds it: %s":
        "中断しました。登録した計算は続いており、attach() で続きを受け取れます: %s",
    "%s: the relay is of an older version, which does not tell all that a user has there":
        "%s: 中継サーバーが古い版のため、利用者の計算をまとめて知らせることができません",
    "again and again, in place on a terminal, until Ctrl+C": "Ctrl+C まで繰り返し表示します (端末では同じ場所に)",
    "all that are kept, finished ones too": "残っているすべての計算 (終わったものも)",
    "Your calculations at the relay, the newest last: where each is, or how it ended.":
        "中継サーバーにある自分の計算を、新しいものを最後に一覧表示します (今の状態、または終わり方)。",
    "what would be sent, and whether the relay would take it; nothing is registered":
        "送られるものと、中継サーバーが受け付けるかどうかを示します。登録はしません",
    "would send: %s (%d bytes)": "送るもの: %s (%d バイト)",
    "would ask for: %s": "求める結果: %s",
    "%d inputs, %d bytes; the relay would take it (nothing was registered)":
        "入力 %d 件、%d バイト。中継サーバーは受け付けます (登録はしていません)",
    "%s: the relay's answer holds no proper list": "%s: 中継サーバーの返答に正しい一覧がありません",
    "Why each is where it is: a sentence, who has to act, what to type, since when, what would change it.":
        "それぞれの計算がなぜ今の所にあるのかを示します。理由、対応する人、打つべき語、いつからか、何があれば変わるか。",
    "the relay is of an older version: it does not tell why something waits":
        "中継サーバーが古い版のため、待っている理由を知らせることができません",
    "something in front of the relay (its gateway?) does not let v2/explain pass, so it cannot tell why"
    " something waits: %s":
        "中継サーバーの手前の何か (ゲートウェイ) が v2/explain を通さないため、待っている理由が分かりません: %s",
    "a gateway that lets /mi-distcomp-api/v2/ pass": "ゲートウェイが /mi-distcomp-api/v2/ を通せば分かります",
    "a newer version of the relay": "中継サーバーを新しい版にすれば分かります",
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
    " (a value that begins with - is written with =, as in %s=--fine)":
        " (- で始まる値は %s=--fine のように = でつないでください)",
    "unknown option %s%s; --help says more": "オプション %s はありません%s。--help を見てください",
    "%s needs %s; --help says more": "%s には %s が必要です。--help を見てください",
    " and ": " と ",
    "what is %s? It must be: %s; --help says more": "%s は何ですか。正しい形: %s (--help を参照)",
    "%s is no option of %s; it must be: %s; --help says more":
        "%s は %s のオプションではありません。正しい形: %s (--help を参照)",
    "what the command gets": "コマンドに渡す入力",
    "what it is to make": "コマンドが作る結果",
    "parameters of the command, where the external computer allows them": "コマンドの引数 (外部計算機が許す場合)",
    "the same R again: the same calculation (default: random)": "同じ R なら同じ計算になります (既定: 乱数)",
    "where the results go (default: here)": "結果を置く場所 (既定: ここ)",
    "0, not 65, where the external computer's rules keep what a pattern asked for":
        "パターンに合う結果が外部計算機の規則で出されなくても、65 ではなく 0 で終わります",
    "cancel the calculation if it has not ended so long from now": "今からこの時間で終わらなければ計算を取り消します",
    "after SIGTERM: the calculation runs on (default), or ends": "SIGTERM の後: 計算は続く (既定)、または終わる",
    "why, for who looks later": "理由 (後で見る人のため)",
    "also what is out of contact; its late result is refused": "連絡途絶の計算も。遅れて届いた結果は拒否されます",
    "as it comes, until the command ends": "コマンドが終わるまで、出力されるたびに表示します",
    "the relay": "中継サーバー",
    "0600 file with the token": "トークンのファイル (モード 0600)",
    "CA of the relay's certificate": "中継サーバーの証明書の CA",
    "connections at once for large files: a number, or auto (default: several over a distance, else one)":
        "大きなファイルに同時に使う接続の数。数値か auto (既定: 遠いときは複数、そうでなければ 1)",
    "is not auto or a number from 1 to %d": "auto または 1 から %d の数ではありません",
    "1 lane (%s)": "接続 1 本 (%s)",
    "%d lanes": "接続 %d 本",
    "%d lanes, packed": "接続 %d 本、圧縮",
    "little": "小さい",
    "near": "近い",
    "old relay": "旧版の中継サーバー",
    "small bodies": "途中で大きな本文が通らない",
    "too much": "大きすぎる",
    "how long the relay may be away before anything is registered (default: 60s)":
        "登録前に中継サーバーの応答を待つ時間 (既定: 60s)",
    "what is %s? (BASE_URL SITE TOKEN COMMAND IN OUT: BASE_URL begins with http:// or https://)":
        "%s は何ですか (BASE_URL SITE TOKEN COMMAND IN OUT の形なら、BASE_URL は http:// か https:// で始めてください)",
    "What the command has written so far.": "コマンドのこれまでの出力。",
    "Once more: what ended abnormally, before its result was fetched.": "もう一度実行します: 異常終了した計算 (結果を受け取る前)。",
    "Has COMMAND run at SITE with these inputs, waits, and puts the results into the current directory; the"
    " exit code is the command's own.\nINPUT is FILE, NAME=PATH, or DIR/; RESULT a name or a pattern in"
    " quotes (* ? ** and DIR/).":
        "識別子 SITE の外部計算機で、この入力を使って COMMAND を実行し、終わりを待ち、結果を現在のディレクトリに置きます。"
        "終了コードはコマンド自身のものです。\n"
        "INPUT は ファイル、名前=パス、または DIR/。RESULT は名前、または引用符で囲んだパターン (* ? ** と DIR/) です。",
    "As run, but prints the ACCEPT_ID and does not wait.": "run と同じですが、ACCEPT_ID を表示して待たずに戻ります。",
    "Waits and fetches; several: each into DIR/ACCEPT_ID/. Of an id the first eight characters do.":
        "終わりを待って結果を受け取ります。複数なら、それぞれ DIR/ACCEPT_ID/ に置きます。ID は最初の 8 文字で足ります。",
    "Fetches what is there already. On another host, or for somebody else, --out says once more what is"
    " meant.":
        "すでにある結果を受け取ります。ほかの計算機や、ほかの人の計算では、--out で結果をもう一度指定します。",
    "One line for each: where it is, how many are before it (explain: why).":
        "一つにつき一行: どこにあるか、前に何件あるか (理由は explain)。",
    "Ends calculations; what their commands have written so far comes back.":
        "計算を終わらせます。それまでの出力は戻ります。",
    "Looks at this host and the way to the relay, and changes nothing: OK, WARN or FAIL, and what to do.\n"
    "With SITE and COMMAND: would the relay take such a calculation?":
        "この計算機と中継サーバーまでの経路を調べ、OK・WARN・FAIL と、するべきことを示します。何も変更しません。\n"
        "SITE と COMMAND を付けると、中継サーバーがその計算を受け付けるかも調べます。",
    "Asks for the password (relays with auth = login), and keeps the token in token_file.":
        "パスワードを尋ね (中継サーバーが auth = login の場合)、トークンを token_file に保存します。",
    "example:": "例:",
    "programs of this host are started from there, or set up by it; take another --to":
        "この計算機のプログラムの起動や設定に使われる場所です。別の --to を指定してください",
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
    # store
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
    "asked for and not here: %s": "要求した結果のうち届かないもの: %s",
    "no result matches %s": "%s に合う結果はありません",
    "the relay keeps the result, for what is not stored: %s.py result %s --to DIR":
        "格納しなかったものは中継サーバーに残っています: %s.py result %s --to DIR",
    "%s: what was declared as its results is not known on this side; say it once more: --out NAME... (--out"
    " '**': all)":
        "%s: 何を結果として申告したか、こちら側には記録がありません。もう一度指定してください: --out 名前... (すべてなら --out '**')",
    "%s: links to directories lead round and round": "%s: ディレクトリへのリンクが堂々巡りしています",
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
    "an answer that is none": "応答の形が正しくありません",
    "%s: HTTP 413: too large": "%s: HTTP 413: 大きすぎます",
    "%s: HTTP %d without the relay's JSON: a proxy or gateway in between answered":
        "%s: HTTP %d、中継サーバーの JSON ではありません (途中のプロキシかゲートウェイの応答です)",
    "is not what was declared (its sum differs)": "申告した内容と違います (チェックサムの不一致)",
    "%s: the relay has another calculation of this side by that name already":
        "%s: 中継サーバーは、こちらの別の計算にすでにこの ID を付けています",
    "%s: the relay is at byte %s of a file of %d": "%s: 中継サーバーは %s バイト目と答えました (ファイルは %d バイト)",
    "%s: the relay stays at byte %d of %d": "%s: 中継サーバーが %d バイト目 (全 %d バイト) から進みません",
    "%s changed while it was sent": "%s が送信中に変わりました",
    "became shorter while it was sent": "送信中に短くなりました",
    "the file list is none": "ファイル一覧の形が正しくありません",
    "%s: %s is not here, and no longer at the relay (%s)": "%s: %s がここになく、中継側にももうありません (%s)",
    "%s: no size or sha256": "%s: サイズまたは sha256 がありません",
    "the pages of the file list do not follow one another": "ファイル一覧のページがつながりません",
    "cut off": "途中で切断されました",
    "%s: HTTP %d where a file was due": "%s: HTTP %d (ファイルが返るはずでした)",
    "%s: %d bytes where %d were due": "%s: %d バイト届きました (正しくは %d バイト)",
    "does not arrive as it was sent (its sum differs, three times)": "送られたとおりに届きません (チェックサムが 3 回とも不一致)",
    "%s does not arrive as it was sent (its sum differs, three times)":
        "%s が送られたとおりに届きません (チェックサムが 3 回とも不一致)",
    "%s: arrived other than it was sent": "%s: 送られたものと違う内容が届きました",
    "%s: the relay's pack does not match its file list": "%s: 中継サーバーの送信内容がファイル一覧と合いません",
    # inputs, results, token
    "%s is a directory (%s/ would send all that is in it)": "%s はディレクトリです (%s/ と書けば中のすべてを送ります)",
    "%s is not a file": "%s はファイルではありません",
    "%s: its name is not UTF-8": "%s: 名前が UTF-8 ではありません",
    "nothing was registered; inputs that are missing or cannot be read: %s": "登録していません。存在しないか読めない入力: %s",
    "and %d more": "ほか %d 件",
    "warning: %s": "警告: %s",
    "inputs: %s": "入力: %s",
    "results: %s": "結果: %s",
    "nothing was registered; %d inputs are more than the relay takes (%d)":
        "登録していません。入力 %d 件は中継サーバーの上限 (%d) を超えています",
    "nothing was registered; %s is larger (%d bytes) than the relay takes (%d)":
        "登録していません。%s (%d バイト) は中継サーバーの上限 (%d) を超えています",
    "%s: holds no token (one line of printable ASCII)": "%s: トークンがありません (印字可能な ASCII 1 行)",
    "%s: others may read this token; type: chmod 600 %s": "%s: このトークンは他人にも読めます。次を実行してください: chmod 600 %s",
    "no token: --token-file FILE, token_file in [workflow] of the ini, or MI_DISTCOMP_TOKEN":
        "トークンがありません: --token-file FILE、ini の [workflow] の token_file、または MI_DISTCOMP_TOKEN で指定してください",
    "no relay: --url URL, or url in [workflow] of the ini":
        "中継サーバーの指定がありません: --url URL、または ini の [workflow] の url",
    "warning: a token on the command line can be seen by others; a token file hides it (see --help)":
        "警告: コマンドラインのトークンは他人に見えます。トークンファイルを使ってください (--help 参照)",
    # how it goes
    "reading the inputs": "入力を読んでいます",
    "sending the inputs": "入力を送っています",
    "fetching the results": "結果を取得しています",
    "registered": "入力待ち",
    "registered at the relay": "登録しました",
    "found again (request id %s)": "登録済みの計算を続けます (request id %s)",
    "waiting for the external computer": "実行待ち (外部計算機を待っています)",
    ", %d before it": "、前に %d 件",
    ", out of contact for %d s": "、連絡途絶 (%d 秒、計算は続いている可能性があります)",
    "the relay answers again": "中継サーバーの応答が戻りました",
    "the relay refuses the token, asking on (a renewed token_file is read): %s":
        "中継サーバーがトークンを拒否しました。問い合わせを続けます (token_file を更新すれば読み直します): %s",
    "the relay answers \"later\", asking on: %s": "中継サーバーは「後で」と答えました。問い合わせを続けます: %s",
    "done": "正常終了",
    "abnormal": "異常終了",
    "taken: its inputs are on their way": "入力転送中",
    "taken: its inputs are there": "入力転送中 (届き終わり、開始待ち)",
    "running": "実行中",
    "ended: its results are awaited": "結果待ち (計算は終わりました)",
    "sending: its results are on their way": "結果転送中",
    "%s: the token is refused (%s): get a valid one, role workflow, for this user and site":
        "%s: トークンが拒否されました (%s): この利用者と識別子に有効な、role が workflow のトークンを入手してください",
    "%s: the relay %s knows no such calculation of yours": "%s: 中継サーバー %s に、あなたのその計算はありません",
    "the relay does not answer, asking on: %s": "中継サーバーの応答がありません。問い合わせを続けます: %s",
    "the relay could not be told that the results are here: %s": "結果を受け取ったことを中継サーバーに伝えられませんでした: %s",
    # a fielded relay
    "%s: no relay of this protocol answers there (is the URL right?)":
        "%s: このプロトコルの中継サーバーが応答しません (URL は正しいですか)",
    "%s: the relay does not know it (any longer): %s": "%s: 中継サーバーはこの計算を知りません (忘れたか、渡し終えています): %s",
    "cancelled": "中止しました",
    "the external computer stops it": "外部計算機が停止させます",
    "a fielded relay has forgotten it; what runs on the external computer runs on":
        "従来の中継サーバーは計算を忘れました。外部計算機で実行中のものは続きます",
    "nothing was registered; %s: a fielded poller takes no input with a directory (without it: NAME=PATH)":
        "登録していません。%s: 従来のポーリングプログラムはディレクトリ付きの入力を扱えません (NAME=PATH で平らな名前にできます)",
    "nothing was registered; %s: a fielded relay takes no patterns, name each result":
        "登録していません。%s: 従来の中継サーバーではパターンを使えません。結果の名前をそれぞれ指定してください",
    "nothing was registered; --param: a fielded poller would run the command without it (BASE_URL SITE"
    " TOKEN COMMAND ... sends it all the same)":
        "登録していません。--param: 従来のポーリングプログラムは引数なしでコマンドを実行します (BASE_URL SITE TOKEN COMMAND ... の形なら送ります)",
    "warning: a fielded relay forgets a calculation whose result was fetched: with the same --request-id"
    " another one is made then":
        "警告: 従来の中継サーバーは結果を渡した計算を忘れます。その後は同じ --request-id でも別の計算になります",
    "warning: the relay does not show what it has (%s): if a registration arrived whose answer was lost, it"
    " stands in the site's way until the relay forgets it (half an hour)":
        "警告: 中継サーバーの登録一覧を見られません (%s)。応答が失われた登録が届いていれば、中継サーバーが忘れるまで (約 30 分) この識別子の計算を妨げます",
    "input %s: an empty file is sent in its place": "入力 %s: 代わりに空のファイルを送ります",
    "nothing was registered; an input cannot be sent: %s": "登録していません。入力を送れません: %s",
    "a fielded relay forgets all when it stops, and a result once it was asked for: %s":
        "従来の中継サーバーは停止するとすべてを、結果は一度渡すと忘れます: %s",
    "; a fielded relay gives a result once: it cannot be asked for again":
        "。従来の中継サーバーは結果を一度しか渡さないため、再取得できません",
    "%s: there is no result yet (%s)": "%s: 結果はまだありません (%s)",
    "%s: %s: %s; the relay has forgotten the result, what came is in %s":
        "%s: %s: %s。中継サーバーは結果をもう持っていません。届いたものは %s にあります",
    "a fielded relay does not tell the command's own exit code": "従来の中継サーバーはコマンドの終了コードを伝えません",
    "%s: the relay lacks inputs and nobody sends them (submit was interrupted, or the relay restored from a"
    " backup); the same submit with its --request-id sends them":
        "%s: 中継サーバーに入力がそろっておらず、送る者もいません (submit が中断されたか、中継サーバーがバックアップから復元されました)。同じ submit に元の --request-id"
        " を付けて実行すると送られます",
    "registered; its inputs are not complete": "入力待ち (登録済みですが、入力がまだ揃っていません)",
    "the relay was restored from a backup: it gets the inputs again": "中継サーバーがバックアップから復元されました。入力をもう一度送ります",
    "allowed once more": "もう一度実行できるようにしました",
    "%s: the deadline is over; its result is held for a person at the external computer, and comes when it is"
    " released (%s.py wait %s)":
        "%s: 期限を過ぎました。結果は外部計算機で担当者の公開承認を待っており、承認されれば届きます (%s.py wait %s)",
    "ended; held for a person at the external computer since %s":
        "終了。%s から、外部計算機で担当者の公開承認を待っています",
    "the deadline is over: cancelling": "期限を過ぎました。取り消します",
    "all of the output is in %s": "出力の全体は %s にあります",
    "%s: a fielded relay cannot do that": "%s: 従来の中継サーバーではできません",
    "nothing was registered; --deadline: a fielded relay cannot stop a command":
        "登録していません。--deadline: 従来の中継サーバーはコマンドを停止できません",
    # how it ends
    "the deadline was over and the calculation was cancelled; exit code %d is this program's":
        "期限を過ぎたため計算を取り消しました。終了コード %d はこのプログラムのものです",
    "%s: the deadline is over, but the relay does not answer; the calculation may run on (%s.py cancel %s)":
        "%s: 期限を過ぎましたが中継サーバーが応答しません。計算は続いているかもしれません (%s.py cancel %s)",
    "%s: the deadline is over and the calculation is cancelled, but has not come to its end (%s.py wait %s)":
        "%s: 期限を過ぎて取り消しましたが、計算の終了が確認できません (%s.py wait %s)",
    "%s: stopped by SIGTERM; the calculation is cancelled": "%s: SIGTERM により終了します。計算は取り消しました",
    "%s: the relay says: %s": "%s: 中継サーバーの応答: %s",
    "; is the URL right? use a name of the certificate, or have it made for this one":
        "。URL は正しいですか。証明書にある名前を使うか、この名前の証明書を作ってください",
    "; is this proxy the right one for the relay? (proxy in the ini, https_proxy and no_proxy of the"
    " environment)":
        "。このプロキシで正しいですか (ini の proxy、環境変数の https_proxy と no_proxy)",
    "; if its certificate is not of a public CA, give the CA's file with --ca-file (or ca_file in the ini)":
        "。公的 CA の証明書でない場合は --ca-file (または ini の ca_file) で CA のファイルを指定してください",
    "; does the relay run, and is the URL right? (mi_system_wf.py check looks at the whole way)":
        "。中継サーバーは動いていますか。URL は正しいですか (mi_system_wf.py check で経路全体を調べられます)",
    "%s: %s (the file with the token: --token-file, or token_file in the ini)":
        "%s: %s (トークンのファイル: --token-file、または ini の token_file)",
    "; is the URL right? (--url, or url in the ini)": "。URL は正しいですか (--url、または ini の url)",
    "%s: the relay's answer holds no accept_id": "%s: 中継サーバーの応答に accept_id がありません",
    "%s: an input cannot be sent as it was registered: %s": "%s: 入力を登録時の内容のまま送れません: %s",
    "%s: the relay does not get the inputs together": "%s: 中継サーバーに入力がそろいません",
    "a directory or a symbolic link is in its way": "ディレクトリかシンボリックリンクが妨げています",
    "the relay's answer holds no proper result": "中継サーバーの応答に正しい結果がありません",
    "%s was not declared as a result": "%s は宣言された結果ではありません",
    "is not there": "ありません",
    "; nothing is lost, fetch it with: %s.py result %s": "。結果は失われていません。次で取得できます: %s.py result %s",
    "the command ended with %d (its own exit code)": "コマンドの終了コードは %d です (コマンド自身のもの)",
    "%s; the command was stopped and ended with %d": "%s。コマンドを停止しました (終了コード %d)",
    "the command has not made it": "コマンドが作りませんでした",
    "a rule of the external computer's owner keeps it there": "外部計算機の所有者の規則により送られません",
    "it is over a limit of the external computer's owner, or of the relay": "外部計算機の所有者か中継サーバーの上限を超えています",
    "its name cannot travel": "送れない名前です",
    "it cannot be read there": "外部計算機で読み取れません",
    "it changed again and again while it was sent": "送信中に変わり続けました",
    "it is a link out of the command's directory": "コマンドのディレクトリの外を指すリンクです",
    "its owner has not released it yet": "所有者の公開承認を待っています",
    "; exit code %d is this program's": "。このプログラムの終了コードは %d です",
    "is a directory or no file there; for all that is in a directory declare %s/":
        "外部計算機ではディレクトリか、ファイルではないものです。ディレクトリの中身すべてなら %s/ と指定してください",
    "the command ended with 0, but the calculation is not complete (%s); exit code %d is this program's":
        "コマンドは 0 で終わりましたが計算は完全ではありません (%s)。終了コード %d はこのプログラムのものです",
    "exit code %d is this program's, not the command's (%s: %s%s)":
        "終了コード %d はこのプログラムのもので、コマンドのものではありません (%s: %s%s)",
    "; %s may say more": "。%s も見てください",
    "; %d files in %s": "。ファイル %d 件を %s に置きました",
    "the declared result %s is missing: %s": "宣言された結果 %s がありません: %s",
    "interrupted; nothing was registered": "中断されました。登録していません",
    "%s: interrupted before all inputs were sent; the same words with --request-id %s go on":
        "%s: 入力を送り終える前に中断されました。同じ引数に --request-id %s を付ければ続けられます",
    "%s: interrupted; the calculation goes on, %s.py wait %s continues":
        "%s: 中断されましたが計算は続いています。%s.py wait %s で待てます",
    # the words typed
    "argument %(argument_name)s: %(message)s": "引数 %(argument_name)s: %(message)s",
    "expected one argument": "値が必要です",
    "expected at least one argument": "値が一つ以上必要です",
    "invalid choice: %(value)r (choose from %(choices)s)": "%(value)r は選べません (選べるもの: %(choices)s)",
    "ignored explicit argument %r": "値 %r は取りません",
    "%s; --help says more": "%s (--help を参照)",
    "it must be: BASE_URL SITE TOKEN COMMAND IN1:IN2:... OUT1:OUT2:... [\"PARAMETERS\"]; --help says more":
        "書き方: BASE_URL SITE TOKEN COMMAND IN1:IN2:... OUT1:OUT2:... [\"PARAMETERS\"]。--help を見てください",
    "one of these words must come first: %s%s; --help says more": "最初の語は次のいずれかです: %s%s。--help を見てください",
    "%s: not an ACCEPT_ID (run and submit print it; its first eight characters do)":
        "%s: ACCEPT_ID ではありません (run や submit が表示するもの。先頭 8 文字でも構いません)",
    "%s: interrupted; it was waiting and is deleted": "%s: 中断されました。待っていた計算は削除しました",
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
