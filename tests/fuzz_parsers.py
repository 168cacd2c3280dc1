#!/usr/bin/env python3
"""Mutated input for everything that reads what others wrote: request heads, JSON bodies, answers, fielded bodies (the stream reader), file names and
patterns, ini files, journals, the wrapper's notes. Nothing may raise but what the reader's docstring says, take longer than a second, or be
accepted against the rule that is checked again here in another way.

usage: fuzz_parsers.py [EXECUTIONS=20000] [SEED]               exit code 1 if something was wrong
       fuzz_parsers.py --atheris TARGET [EXECUTIONS]          one target, led by coverage (pip install atheris)"""
import collections
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import suite

relay, poller = suite.module("mi_dicomapi.py"), suite.module("mi_system_remote.py")
WORDS = [b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"\t", b"Content-Length: 5\r\n", b"content-length:5", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1", b"GET", b"POST",
         b"/mi-distcomp-api/", b"?v=2&accept_id=x", b"%00", b"%ff", b"%2e%2e/", b"../", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b[2J", b'"', b"\\", b"\\u0000",
         b"\\ud800", b"{", b"}", b"[", b"]", b"null", b"NaN", b"1e999", b"-", b"9" * 25, b"content", b"AAAA", b"=", b"==", b"*", b"**/", b"?", b"#", b"[Server]", b"[", b"%(x)s",
         b"exit 0", b"exit x", b"exit 999999", "\u00b2".encode(), "\u0663".encode(), "e\u0301".encode(), "\u00e9".encode(), b"true", b"1.5", b"," , b"=" * 40, b"\xef\xbb\xbf", b";", b" = "]
HEADS = [b"GET /mi-distcomp-api/calc-progress?v=2&accept_id=0a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + b"a" * 64 + b"\r\n\r\n",
         b"POST /mi-distcomp-api/add-calcinfo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 20\r\nConnection: close\r\n\r\n",
         b"GET /mi-distcomp-api/files/00000000-0000-0000-0000-000000000000/input/1?v=2 HTTP/1.0\r\nRange: bytes=1-\r\nIf-Range: \"x\"\r\nExpect: 100-continue\r\n\r\n"]
BODIES = [b'{"v": 2, "accept_id": "x", "claim": "1.aa", "list": [1, 2.5, -3, true, null, "\\u00e9"], "more": {"a": {"b": []}}}',
          b'{"v":2,"request_id":"r","calc-info":{"command":"c","remote-site":"s","parameters":"","parameter_files":{"a":{"size":1,"sha256":"00"}}}}']
STREAMS = [b'{"calc-info": {"command": "c", "remote-site": "s", "parameter_files": {"a.txt": ["' + b"QUJD" * 100 + b'", "text/plain", "x"]}, "result_files": {}}}',
           b'{"accept_id": "x", "site_id": "s", "result_files": {"r": {"content": "' + b"QUJD" * 17000 + b'", "mimetype1": "a", "mimetype2": "b"}}}']
ANSWERS = [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{\"errors\": 1",
           b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX: a\r\n b\r\n\r\n5;a=b\r\nhello\r\n10\r\n0123456789abcdef\r\n0\r\nX-Sum: 1\r\n\r\n",
           b"HTTP/1.0 502 Bad Gateway\r\nConnection: close\r\n\r\n<html>until the end"]
NAMES = ["a/b/c.txt".encode(), "計算標準出力.txt".encode(), b"**/x?[1]*.dat", b"results/", "é/e\u0301".encode(), b"." * 10]
INIS = [b"[Server]\nportnumber = 50443\nauth = tokens\n[limits]\nmax_body = 16M\nspool_free = 5%\n[times]\nlease = 300s\n[RemoteSites]\nremote_site_ids = a b\n[a]\ncommands = x\n"]
JOURNALS = [b'{"t": 1.5, "boot": "b", "step": 4, "what": "taken"}\n{"t": 2, "boot": "b", "step": 5, "what": "starting"}\n{"t": 3, "boot": "b", "step": 6, "what": "ended", "exit_code": 0}\n']
NOTES = [b"123 4567 0a1b2c3d-boot host exit 0".ljust(255) + b"\n", b"99 1 b h running".ljust(255) + b"\n", b" " * 256]


class Wrong(Exception):
    """Something was accepted or raised that must not be."""


def mutate(rng, data):
    """data with one to six changes."""
    data = bytearray(data)
    for turn in range(rng.choice((1, 1, 2, 3, 6))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = rng.choice(WORDS)
        elif kind == 2:
            del data[at:at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            end = rng.randrange(at, min(len(data), at + 80) + 1)
            data[at:at] = data[at:end] * rng.choice((1, 2, 30))
        elif kind == 4 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        else:
            data[at:at + rng.choice((1, 4))] = rng.choice(WORDS)
    return bytes(data)


class Parsers:
    """The readers, each with its seeds, its share of the executions, and what it may raise."""

    def __init__(self, folder):
        self.folder = folder
        self.file = os.path.join(folder, "file")
        self.base, self.ident = os.path.join(os.fsencode(folder), b"base"), "0a1b2c3d-0000-4000-8000-00000000abcd"
        self.control = os.path.join(self.base, b".mi", self.ident.encode())
        os.makedirs(self.control)
        self.targets = [("head", HEADS, 57), ("answer", ANSWERS, 5), ("body", BODIES, 20), ("name", NAMES, 10), ("stream", STREAMS, 2), ("journal", JOURNALS, 3), ("note", NOTES, 2), ("ini", INIS, 1)]

    def put(self, path, data):
        with open(path, "wb") as out:
            out.write(data)

    def head(self, rng, data):
        data = data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"            # as the selector cuts it
        try:
            call = relay.parse_head(data)
        except relay.ApiError as no:
            return "refused %s" % no.code
        lengths = re.findall(rb"(?im)^content-length[ \t]*:", data)
        if (b"\0" in data or re.search(rb"(?<!\r)\n|\r(?!\n)", data) or re.search(rb"(?im)^transfer-encoding[ \t]*:", data) or len(lengths) > 1
                or call.method not in ("GET", "POST") or not 0 <= call.length < 10 ** 15 or "authorization" in call.headers):
            raise Wrong("accepted")
        call.name, call.body = "calc-progress", b""
        call.length = call.unread = 0
        call.parse_fields()
        return "taken"

    def answer(self, rng, data):
        try:
            answer = poller.HttpAnswer(io.BufferedReader(io.BytesIO(data)))
            told, view, got = answer.length, memoryview(bytearray(7)), b""
            for size in iter(lambda: answer.readinto(view, once=rng.random() < 0.5), 0):
                got += bytes(view[:size])
        except OSError:
            return "refused"
        if got not in data and not answer.chunked or told is not None and len(got) + answer.length != told or not 200 <= answer.status < 1000 and answer.status != 101:
            raise Wrong("read as %r" % got)
        return "taken"

    def body(self, rng, data):
        try:
            found = relay.parse_json(data)
        except relay.ApiError as no:
            return "refused %s" % no.code
        if not isinstance(found, dict) or json.loads(json.dumps(found)) != json.loads(data.decode("utf-8")):
            raise Wrong("read as %r" % found)
        for key in found:                              # the typed getters either give that type or refuse
            fields = relay.Fields()
            fields.fields = found
            for kind in (int, str, dict, list):
                try:
                    if not isinstance(fields.get(key, kind, kind()), kind):
                        raise Wrong("not of its kind")
                except relay.ApiError:
                    pass
        return "taken"

    def name(self, rng, data):
        text = data.decode("utf-8", "surrogateescape")
        try:
            poller.check_name(text)
        except ValueError:
            return "refused"
        path = os.path.normpath(os.path.join("/calc/base", text))
        if not path.startswith("/calc/base/") or path != "/calc/base/" + text or re.search("[\x00-\x1f\x7f-\x9f\\\\]", text):
            raise Wrong("a name that leads out: %r" % text)
        poller.declared_matcher([text], ["**"])(text)
        try:
            poller.compile_pattern(text).match("x" * 60 + "/" + "y" * 60)
        except ValueError:
            pass
        return "taken"

    def stream(self, rng, data):
        cut = sorted(rng.randrange(len(data) + 1) for turn in range(rng.randrange(5)))
        views = [data[a:b] for a, b in zip([0] + cut, cut + [len(data)])]
        folder = os.fsencode(os.path.join(self.folder, "blobs"))
        os.makedirs(folder)
        try:
            relay.BodyReader(iter(views), folder, lambda rest: dict(json.loads(rest.decode("utf-8"))), 1 << 20).parse()
            return "taken"
        except (ValueError, TypeError, RecursionError):
            return "refused"
        finally:
            shutil.rmtree(folder)

    def journal(self, rng, data):
        self.put(os.path.join(self.control, b"journal"), data)
        calc = poller.Calculation(self.base, self.ident, {"accept_id": self.ident, "claim": "c", "attempt": 1, "protocol": 2, "t": 0, "calc-info": {}})
        for what in ("delivered", "starting", "ended"):
            found = (calc if what == "delivered" else calc.run).last(what)
            if found is not None and not isinstance(found, dict):
                raise Wrong("an entry that is none")
        if calc.state() not in ("claimed", "starting", "running", "lost", "undelivered", "delivered", "kept"):
            raise Wrong("a state that is none")
        return "taken"

    def note(self, rng, data):
        for name in (b"end", b"child", b"start", b"ready"):
            path = os.path.join(self.control, name)
            if rng.random() < 0.5:
                self.put(path, data if rng.random() < 0.5 else mutate(rng, rng.choice(NOTES)))
            elif os.path.exists(path):
                os.unlink(path)
        state, detail = poller.command_state(self.control, time.time())
        if state not in ("ready", "starting", "running", "ended", "lost") or state == "ended" and not (detail is None or 0 <= detail <= 999):
            raise Wrong("%s %r" % (state, detail))
        return state

    def ini(self, rng, data):
        self.put(self.file, data)
        try:
            relay.check_conf(relay.read_ini(self.file, relay.INI_KEYS), self.file)
            return "taken"
        except relay.Stop as stop:
            if "\n" in relay.printable(str(stop)):        # as it is shown
                raise Wrong("more than a line")
            return "refused"


def run(executions, seed):
    """(what was wrong, {target: executions}, {target: outcomes})."""
    rng, wrong, counts, outcomes = random.Random(seed), [], collections.Counter(), collections.defaultdict(collections.Counter)
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    parsers = Parsers(folder)
    try:
        for target, seeds, share in parsers.targets:
            work = getattr(parsers, target)
            for turn in range(executions * share // 100):
                data = mutate(rng, rng.choice(seeds))
                begun = time.monotonic()
                try:
                    outcomes[target][work(rng, data)] += 1
                except Exception as error:
                    wrong.append("%s: %s: %s: %r" % (target, type(error).__name__, error, data[:500]))
                    if len(wrong) > 20:
                        return wrong, counts, outcomes
                if time.monotonic() - begun > (5 if target == "ini" else 2):
                    wrong.append("%s: slow: %r" % (target, data[:500]))
                counts[target] += 1
                if counts[target] % 50000 == 0:
                    print("%s: %d" % (target, counts[target]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    return wrong, counts, outcomes


def guided(target, executions):
    """One target with atheris, which looks for inputs that reach new lines. It ends the process."""
    import atheris
    for name in ("parse_head", "parse_json", "shallow", "once", "whole", "check_name", "compile_pattern", "unescape_base64", "check_conf"):
        for module in (relay, poller):
            if hasattr(module, name):
                setattr(module, name, atheris.instrument_func(getattr(module, name)))
    parsers, rng = Parsers(tempfile.mkdtemp()), random.Random(0)
    work = getattr(parsers, target)
    seeds = os.path.join(parsers.folder, "seeds")
    os.mkdir(seeds)
    for number, seed in enumerate(next(seeds for name, seeds, share in parsers.targets if name == target)):
        parsers.put(os.path.join(seeds, str(number)), seed)
    atheris.Setup([sys.argv[0], "-runs=%d" % executions, "-max_len=4096", "-timeout=5", seeds], lambda data: work(rng, data))
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--atheris"]:
        guided(sys.argv[2], int((sys.argv[3:] or [100000])[0]))
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    seed = sys.argv[2] if len(sys.argv) > 2 else os.urandom(4).hex()
    began = time.monotonic()
    wrong, counts, outcomes = run(number, seed)
    print("seed %s, %d executions in %.0f s: %s" % (seed, sum(counts.values()), time.monotonic() - began, dict(counts)))
    for target, found in outcomes.items():
        print("  %-8s %s" % (target, dict(found.most_common(8))))
    print("\n".join(wrong[:20]) or "nothing was wrong")
    sys.exit(1 if wrong else 0)
