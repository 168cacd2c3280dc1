"""A relay that does what a test wants: one calculation, v2 only, plain http on loopback; and a handler that may misbehave."""
import base64
import hashlib
import http.server
import json
import re
import socket
import socketserver
import threading
from urllib.parse import parse_qsl, urlsplit

ACCEPT_ID = "0a1b2c3d-0000-4000-8000-00000000abcd"
PACK_FILE = 1 << 20


class Cut(Exception):
    """The connection ends here."""


def entry(data):
    """A manifest's entry for these bytes."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class Fake(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """results: {NAME: bytes}. misbehave(request): None to go on in order, or an answer of its own (status, bytes, headers); may raise Cut.

    calls: [(method, name, query)]; uploads: {number: bytes}; given: the request bodies as dicts; info: more fields of result-info;
    answers: {name: fields} instead of the usual answer; max_body: of `version`. For pollers: orders, handed out one after the other;
    pieces: [(entry in the manifest, offset, bytes)] of results as they came; unjudged: names that came whole with another sum; ended: end-sends."""

    daemon_threads, request_queue_size = True, 50

    def __init__(self, results=None, misbehave=None):
        self.results, self.misbehave = dict(sorted((results or {}).items())), misbehave or (lambda request: None)
        self.calls, self.uploads, self.done, self.given, self.info, self.answers, self.max_body = [], {}, set(), [], {}, {}, 16 << 20
        self.manifest, self.asked = [], set()
        self.orders, self.pieces, self.unjudged, self.ended = [], [], [], 0
        http.server.HTTPServer.__init__(self, ("127.0.0.1", 0), Request)
        self.url = "http://127.0.0.1:%d" % self.server_port
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass

    def stop(self):
        self.shutdown()
        self.server_close()

    def names(self):
        """The names of the calls, in order."""
        return [name for method, name, query in self.calls]


class Request(http.server.BaseHTTPRequestHandler):
    """One connection of a Fake."""

    protocol_version, wbufsize = "HTTP/1.1", -1
    disable_nagle_algorithm = True

    def log_message(self, *words):
        pass

    def do_GET(self):
        self.work("GET")

    def do_POST(self):
        self.work("POST")

    def work(self, method):
        found = urlsplit(self.path)
        self.method, self.name = method, found.path.replace("/mi-distcomp-api/", "", 1)
        self.query, self.left = dict(parse_qsl(found.query, keep_blank_values=True)), int(self.headers.get("Content-Length", 0))
        self.length = self.left
        self.server.calls.append((method, self.name, self.query))
        try:
            answer = self.server.misbehave(self) or self.proper()
            while self.left:
                self.take(min(self.left, 1 << 20))
            self.answer(*answer)
        except Cut:
            self.close_connection = True

    def take(self, count):
        """count bytes of the body."""
        data = self.rfile.read(count)
        self.left -= len(data)
        if len(data) < count:
            raise Cut
        return data

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for key, value in dict({"Content-Type": "application/json", "Content-Length": str(len(data))}, **dict(headers)).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        if dict(headers).get("Connection") == "close":
            self.linger()

    def linger(self):
        """The end of a connection as the relay makes it: what the client has sent ahead is read, or a reset would destroy the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(10)
        try:
            while self.rfile.read1(1 << 16):
                pass
        except OSError:                                # it is silent, or has reset the line
            pass

    def ok(self, **fields):
        return self.no(200, **fields)

    def no(self, code, **fields):
        return code, json.dumps({"errors": [dict({"code": code, "message": "fake"}, **fields)]}).encode(), ()

    def proper(self):
        """What a relay in order answers."""
        server = self.server
        if self.name == "version":
            return 200, json.dumps({"version": 2, "max_body": server.max_body, "page": 2000}).encode(), ()
        if self.name.startswith("files/"):
            return self.files(*re.match(r"files/[^/]+/(input|result)(?:/(.+))?", self.name).groups())
        fields = json.loads(self.take(self.left).decode()) if self.method == "POST" else self.query
        server.given.append(fields)
        if self.name in server.answers:
            return self.ok(**server.answers[self.name])
        if self.name == "add-calcinfo":
            files = fields["calc-info"]["parameter_files"]
            known = fields["request_id"] in server.asked
            if not known:
                server.asked.add(fields["request_id"])
                server.manifest, server.uploads, server.done = list(files.items()), {}, set()
            return self.ok(accept_id=ACCEPT_ID, known=known, progress="not start", status="none", wait_allow="none")
        if self.name == "allow-wait-calc":
            left = [n for n in range(len(server.manifest)) if n not in server.done]
            return self.no(409, incomplete=left[:10000]) if left else self.ok()
        if self.name == "calc-request":
            return self.ok(**server.orders.pop(0)) if server.orders else self.no("0300")
        if self.name == "send-results":
            server.manifest, server.uploads, server.done = list(fields["result_files"].items()), {}, set()
            for place, (name, told) in enumerate(server.manifest):           # what comes along is looked at, and fetched all the same
                data = base64.b64decode(told.pop("data")) if "data" in told else None
                if data is not None:
                    server.pieces.append((server.manifest[place], 0, data))
                    server.unjudged += [name] if entry(data)["sha256"] != told["sha256"] else []
            return self.ok()
        if self.name == "end-send":
            left = [n for n, (name, told) in enumerate(server.manifest) if n not in server.done and not name.endswith("/")]
            server.ended += not left
            return self.no(409, incomplete=left) if left else self.ok()
        if self.name == "calc-progress":
            return self.ok(progress="got return", status="completed", stamp="9", out_of_contact=None, queue=None)
        if self.name == "get-calc-result":
            files = {name: entry(data) for name, data in list(server.results.items())[:2000]}
            declared = [name for name in server.results]
            more = {"next": 2000} if len(server.results) > 2000 else {}
            return self.ok(**{"result-info": dict({"result_files": files, "missing": {}, "refused": {}, "status": "completed", "reason": "", "exit_code": 0,
                                                   "signal": None, "result_names": declared, "result_patterns": []}, **server.info), **more})
        return self.ok()

    def files(self, kind, which):
        server = self.server
        if kind == "input" or "claim" in self.query and which:
            if which == "pack":
                first = int(self.query["from"])
                for n in range(first, first + int(self.query["count"])):
                    server.uploads[n] = self.take(server.manifest[n][1]["size"])
                    server.pieces.append((server.manifest[n], 0, server.uploads[n]))
                    server.done.add(n)
                    if entry(server.uploads[n])["sha256"] != server.manifest[n][1]["sha256"]:
                        server.unjudged.append(server.manifest[n][0])
                return self.ok(complete=True)
            number = int(which)
            size, have = server.manifest[number][1]["size"], server.uploads.setdefault(number, b"")
            if self.method == "GET":
                return self.ok(offset=len(have), complete=number in server.done)
            if int(self.query["offset"]) != len(have):
                return self.no(409, offset=len(have))
            while self.left:
                server.uploads[number] += self.take(min(self.left, 65536))
            server.pieces.append((server.manifest[number], len(have), server.uploads[number][len(have):]))
            have = server.uploads[number]
            if len(have) == size and entry(have)["sha256"] != server.manifest[number][1]["sha256"]:
                server.unjudged.append(server.manifest[number][0])
                server.uploads[number] = b""
                return self.no(422)
            if len(have) == size:
                server.done.add(number)
            return self.ok(offset=len(have), complete=len(have) == size)
        datas = list(server.results.values())
        raw = {"Content-Type": "application/octet-stream"}
        if which is None:
            first = int(self.query["from"])
            page = {name: entry(data) for name, data in list(server.results.items())[first:first + 2000]}
            return self.ok(files=page, next=first + 2000 if first + 2000 < len(datas) else None)
        if which == "pack":
            body = b""
            for data in datas[int(self.query["from"]):][:10000]:
                if len(data) > PACK_FILE or len(body) + len(data) > server.max_body:
                    break
                body += data
            return 200, body, raw
        data, span = datas[int(which)], re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span:
            return 206, data[int(span.group(1)):], raw
        return 200, data, raw
