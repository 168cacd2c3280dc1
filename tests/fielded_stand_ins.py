#!/usr/bin/env python3
"""Stand-ins of the fielded ("v1") programs, written from PROTOCOL.md part 1: their calls, headers, parsing and weaknesses; pauses by option.

usage: fielded_stand_ins.py poller SITE URL TOKEN [--base DIR] [--ask S] [--take S] [--retry COUNT,INTERVAL] [--calculations N] [--ca FILE]
       fielded_stand_ins.py workflow URL SITE TOKEN COMMAND IN1:IN2:... OUT1:OUT2:... ["PARAMETERS"] [--ask S] [--leave S [--gently]] [--ca FILE]
       fielded_stand_ins.py relay SITE,SITE COMMAND,COMMAND [TOKEN,TOKEN]       prints its port; with tokens as behind a gateway that checks them

What is weak in them is weak on purpose: see the comments with "weakness". exit codes: workflow 0, or 1 when abnormal; a crash is 1."""
import argparse
import base64
import http.client
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import uuid
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

BASE = "/mi-distcomp-api/"
STDOUT, STDERR = "計算標準出力.txt", "計算標準エラー出力.txt"
TEXTS = ("charset=us-ascii", "charset=utf-8")


def say(text):
    """A line for people, UTF-8 whatever the locale is."""
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")
    sys.stdout.buffer.flush()


def path_of(*parts):
    """A path from names, as bytes (Python 3.6 under LANG=C)."""
    return os.path.join(*[part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape") for part in parts])


def mime_of(data):
    """The two words of `file -b -i`."""
    for name in ("us-ascii", "utf-8"):
        try:
            data.decode(name)
            return "text/plain;", "charset=" + name
        except UnicodeDecodeError:
            pass
    return "application/octet-stream;", "charset=binary"


class Api:
    """As the fielded programs call: one connection for each call, a token, JSON."""

    def __init__(self, url, token, ca=""):
        self.url, self.token, self.ca = urlsplit(url), token, ca

    def call(self, method, name, query=None, body=None):
        """The parsed answer, whatever the HTTP status is, apart from 403. OSError, HTTPException: none came."""
        if self.url.scheme == "https":
            context = ssl.create_default_context(cafile=self.ca or None)
            connection = http.client.HTTPSConnection(self.url.hostname, self.url.port or 50443, timeout=300, context=context)
        else:
            connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=300)
        try:
            connection.request(method, BASE + name + ("?" + urlencode(query) if query else ""), None if body is None else json.dumps(body), {
                "Authorization": "Bearer " + self.token, "Content-Type": "application/json", "User-Agent": "python-requests/2.25.1",
                "Accept-Encoding": "gzip, deflate", "Accept": "*/*", "Connection": "keep-alive"})
            response = connection.getresponse()
            text = response.read().decode("utf-8")
        finally:
            connection.close()
        if response.status == 403:
            say("%s:status code = 403 / reason = %s" % (time.strftime("%Y/%m/%d %H:%M:%S"), text))
            raise SystemExit(1)
        return json.loads(text)                        # weakness: an HTML page is a crash


def first(answer):
    """errors[0]: nothing else is ever read. Weakness: an answer without it is a crash."""
    return answer["errors"][0]


# ---- the poller

class Poller:
    """One calculation at a time; `again` calls are tried again, all others kill it."""

    def __init__(self, options):
        self.options, self.site = options, options.site
        self.api = Api(options.url, options.token, options.ca)
        self.count, self.pause = (float(word) for word in options.retry.split(","))

    def again(self, method, name, query=None, body=None):
        """A call that is tried again when no answer comes."""
        left = self.count
        while True:
            try:
                return self.api.call(method, name, query, body)
            except (OSError, http.client.HTTPException) as error:
                left -= 1
                if left < 0:
                    raise
                say("no answer to %s: %s" % (name, error))
                time.sleep(self.pause)

    def serve(self):
        """Asks for ever."""
        say("site id = %s\nbase url = %s\ntoken = %s" % (self.site, self.options.url, self.options.token))
        done, fresh = 0, True
        while done != self.options.calculations:
            answer = first(self.again("GET", "calc-request", {"site_id": self.site}))
            if fresh:                                  # weakness: the first answer after a start or a calculation is thrown away
                fresh = False
            elif answer["code"] == 200:
                time.sleep(self.options.take)
                self.calculate(answer["accept_id"])
                done, fresh = done + 1, True
                continue
            else:
                say("code = %s / message = %s" % (answer["code"], answer["message"]))
            time.sleep(self.options.ask)

    def calculate(self, accept_id):
        """One calculation; returns where it is given up in order."""
        me = {"accept_id": accept_id, "site_id": self.site}
        answer = self.api.call("GET", "calc-params", me)              # weakness: a lost answer kills it
        if "errors" in answer:
            return self.give_up("calc-params", answer)
        info = answer["calc-info"]                     # weakness: not there (a wrong state of a fielded relay) is a crash
        folder = os.path.join(os.fsencode(self.options.base), accept_id.encode())
        os.makedirs(folder)
        self.write_inputs(info, folder)
        answer = self.again("POST", "calc-params-complete", body=me)
        if first(answer)["code"] != 200:
            return self.give_up("calc-params-complete", answer)
        answer = self.api.call("POST", "calc-start", body=me)         # weakness: a lost answer kills it
        if first(answer)["code"] != 200:
            return self.give_up("calc-start", answer)
        say("start %s" % accept_id)
        with open(path_of(folder, STDOUT), "wb") as out, open(path_of(folder, STDERR), "wb") as err:
            code = subprocess.call(info["command"], shell=True, cwd=folder, stdout=out, stderr=err)      # weakness: a shell, and no parameters
        results, there = {}, 0
        for name in info["result_files"]:
            results[name] = self.read_result(folder, name)
            there += results[name]["mimetype1"] != "Error" and name not in (STDOUT, STDERR)
        wanted = [name for name in info["result_files"] if name not in (STDOUT, STDERR)]
        word = "calc end" if code == 0 and (there or not wanted) else "abnormal"
        answer = self.again("POST", "calc-end", body=dict(me, result=word))
        if first(answer)["code"] != 200:
            return self.give_up("calc-end", answer)
        try:
            answer = first(self.api.call("POST", "send-results", body=dict(me, result_files=results)))
            if answer["code"] != 200:
                say("send-results: code = %s / message = %s" % (answer["code"], answer["message"]))
        except (OSError, http.client.HTTPException) as error:
            say("send-results failed: %s" % error)     # weakness: it goes on as if it had worked
        answer = first(self.again("POST", "end-send", body=dict(me, result="end send")))
        say("end %s %s" % (accept_id, answer["code"]))

    def write_inputs(self, info, folder):
        """The inputs; a name is looked up by its last path component."""
        files = info["parameter_files"]
        for name in files:
            short = name.split("/")[-1]
            content, mime, charset = files[short]      # weakness: a name with a directory is a crash
            data = base64.b64decode(content)
            if charset in TEXTS:
                data = data.decode("utf-8").encode("utf-8")           # weakness: strict UTF-8, dies of anything else
            with open(path_of(folder, short), "wb") as out:
                out.write(data)

    @staticmethod
    def read_result(folder, name):
        """One result as it travels."""
        try:
            with open(path_of(folder, name), "rb") as source:
                data = source.read()
        except OSError as error:
            return {"content": "", "mimetype1": "Error", "mimetype2": "%s: %s" % (name, error.strerror)}
        mime, charset = mime_of(data)
        return {"content": base64.b64encode(data).decode(), "mimetype1": mime, "mimetype2": charset}

    @staticmethod
    def give_up(name, answer):
        """In order: back to asking."""
        found = first(answer)
        say("given up at %s: code = %s / message = %s" % (name, found["code"], found["message"]))


# ---- the workflow side

def read_input(name):
    """One input as it travels; a missing one is three empty texts."""
    try:
        with open(path_of(name), "rb") as source:
            data = source.read()
    except OSError:
        return ["", "", ""]
    return [base64.b64encode(data).decode()] + list(mime_of(data))


def workflow(options):
    """A calculation from registration to result, in the current directory; the exit code."""
    api, began = Api(options.url, options.token, options.ca), time.time()
    outs = [name for name in options.outs.split(":") if name] + [STDOUT, STDERR]
    info = {"command": options.command, "remote-site": options.site, "parameters": options.parameters,
            "parameter_files": {name: read_input(name) for name in options.ins.split(":") if name},
            "result_files": {name: {"content": "", "mimetype1": "", "mimetype2": ""} for name in outs}}
    answer = first(api.call("POST", "add-calcinfo", body={"calc-info": info}))
    if answer["code"] != 200:
        say("add-calcinfo: code = %s / message = %s" % (answer["code"], answer["message"]))
        return 1
    me = {"accept_id": answer["accept_id"]}
    say("accept_id = %s" % me["accept_id"])
    answer = first(api.call("POST", "allow-wait-calc", body=me))
    if answer["code"] != 200:
        say("allow-wait-calc: code = %s / message = %s" % (answer["code"], answer["message"]))
        return 1
    status = progress = None
    while progress != "got return":
        time.sleep(options.ask)
        if options.leave and time.time() - began > options.leave:
            answer = first(api.call("POST", "cancel-wait-calc", body=dict(me, **({} if options.gently else {"delete": "force"}))))
            say("left: code = %s" % answer["code"])
            return 1
        status = first(api.call("GET", "calc-status", me))["message"].split(":")[1]       # weakness: no colon is a crash
        progress = first(api.call("GET", "calc-progress", me))["message"].split(":")[1]   # weakness: both changed in between: taken for success
    answer = first(api.call("GET", "get-calc-result", me, body=me))
    if answer["code"] != 200:
        say("get-calc-result: code = %s / message = %s" % (answer["code"], answer["message"]))
        return 1
    files = answer["result-info"]["result_files"]
    for name in outs:
        found = files[name]                            # weakness: a declared name that is not there is a crash
        if found["mimetype1"] == "Error":
            say("missing %s: %s" % (name, found["mimetype2"]))
            continue
        with open(path_of(name.split("/")[-1]), "wb") as out:
            out.write(base64.b64decode(found["content"]))
    say("status = %s" % status)
    return 1 if status == "abnormal" else 0


# ---- the relay

class Calc:
    """What a fielded relay remembers of a calculation; in memory only."""

    def __init__(self, info):
        self.info, self.time = info, time.strftime("%Y/%m/%d %H:%M:%S")
        self.allow, self.progress, self.status, self.results = "none", "not start", "none", {}

    def over(self):
        return self.progress == "got return" or self.status == "abnormal"


class Answer(Exception):
    """HTTP status and the parsed answer."""

    def __init__(self, http, parsed):
        Exception.__init__(self, parsed)
        self.http, self.parsed = http, parsed


def answer(http, code, text, **more):
    """An Answer in the envelope. code None: a message alone, as one of the fielded refusals is."""
    found = dict({"code": code, "message": text}, **more)
    if code is None:
        del found["code"]
    return Answer(http, {"errors": [found]})


# unknown: HTTP status of "0300" and "400"; missing: that of a missing field; wrong: the answer in another state (None: the fielded 200/200)
REMOTE = {"calc-params": (400, 400, None), "calc-params-complete": (200, 200, None), "calc-start": (400, 400, (200, 400)),
          "calc-end": (400, 400, None), "send-results": (200, 200, (200, 401)), "end-send": (400, 400, (200, 401))}


class Relay(http.server.HTTPServer):
    """A fielded relay: one request at a time, plain http (a gateway does the TLS), every connection closed after its answer.

    calls: [(method, name, fields)]. lose: names of calls whose next answer is lost on the way. deaf: names of calls that do not even arrive."""

    def __init__(self, sites, commands, tokens=(), port=0, version=(404, b"<html><body><h1>Not Found</h1></body></html>")):
        self.sites, self.commands, self.tokens, self.version = list(sites), list(commands), list(tokens), version
        self.table, self.calls, self.lose, self.deaf = {}, [], [], []
        http.server.HTTPServer.__init__(self, ("127.0.0.1", port), Request)
        self.url = "http://127.0.0.1:%d" % self.server_port

    def start(self):
        """Serves in a thread."""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass

    def names(self):
        """The calls so far, in order."""
        return [name for method, name, fields in self.calls]

    # -- the calls, as in 1.3 and 1.4

    def add_calcinfo(self, f):
        info = f.get("calc-info")
        if not isinstance(info, dict) or "remote-site" not in info or "command" not in info:
            raise answer(202, 400, "calc-info, remote-site or command is missing")
        if not info["remote-site"] or info["remote-site"] not in self.sites:
            raise answer(202, "400", "Your site-id(%s) does not match in the list that acceptable to." % info["remote-site"])
        if info["command"] not in self.commands:
            raise answer(202, 401, "command(%s) is not acceptable" % info["command"])
        accept_id = str(uuid.uuid4())
        self.table[accept_id] = Calc(info)
        raise answer(200, 200, "registered", accept_id=accept_id)

    def own(self, f, http, text="There is no information for accept_id(%s)"):
        """The calculation of a workflow side's call."""
        if "accept_id" not in f:
            raise answer(400, 400, "accept_id is missing")
        if f["accept_id"] not in self.table:
            raise answer(http, 400, text % f["accept_id"])
        return self.table[f["accept_id"]]

    def allow_wait_calc(self, f):
        calc = self.own(f, 400)
        if calc.allow != "none":
            raise answer(400, 401, "already allowed")
        calc.allow = time.strftime("%Y/%m/%d %H:%M:%S")
        raise answer(200, 200, "allowed")

    def cancel_wait_calc(self, f):
        if f.get("accept_id") not in self.table:
            raise Answer(400, "There is no information for accept_id(%s)" % f.get("accept_id"))      # a bare JSON string
        calc = self.own(f, 400)
        if f.get("delete") != "force" and not calc.over() and not (calc.allow != "none" and calc.progress == "not start"):
            raise answer(400, 401, "cannot be cancelled")
        del self.table[f["accept_id"]]
        raise answer(200, 200, "cancelled")

    def calc_status(self, f):
        raise answer(200, 200, "status:%s" % self.own(f, 200).status)

    def calc_progress(self, f):
        raise answer(200, 200, "status:%s" % self.own(f, 200).progress)

    def get_calc_result(self, f):
        calc = self.own(f, 200)
        if calc.progress != "got return":
            raise answer(200, 400, "not yet")
        del self.table[f["accept_id"]]                 # forgotten, whether the answer arrives or not
        raise answer(200, 200, "result", **{"result-info": {"result_files": calc.results}})

    def calc_request(self, f):
        if f.get("site_id") not in self.sites:
            raise answer(200, "400", "Your site-id(%s) does not match in the list that acceptable to." % f.get("site_id"))
        for accept_id, calc in self.table.items():
            if calc.info["remote-site"] == f["site_id"] and calc.progress == "not start" and calc.status == "none":
                if calc.allow == "none":
                    raise answer(200, "400", "accept_id(%s) is not allowed to wait yet" % accept_id)
                raise answer(200, 200, "found", accept_id=accept_id)
        raise answer(200, "0300", "There is no information for accept_id(None), about the your site id(%s)" % f["site_id"])

    def remote(self, name, f, frm, to, abnormal=False):
        """The calculation of a remote side's call, moved on; the Answer of 1.4 in any other state."""
        unknown, missing, wrong = REMOTE[name]
        if "accept_id" not in f or "site_id" not in f:
            raise answer(missing, 400, "accept_id or site_id is missing")
        calc = self.table.get(f["accept_id"])
        if calc is None or calc.info["remote-site"] != f["site_id"]:
            raise answer(unknown, "0300", "There is no information for accept_id(%s), about the your site id(%s)" % (f["accept_id"], f["site_id"]))
        if calc.allow == "none":
            raise answer(unknown, "400", "not allowed to wait yet")
        if calc.progress not in frm and not (abnormal and calc.status == "abnormal"):
            raise answer(*(wrong or (200, 200)), text="not in this state")
        calc.progress = to
        return calc

    def calc_params(self, f):
        raise Answer(200, {"calc-info": self.remote("calc-params", f, ("not start",), "sending params").info})

    def calc_params_complete(self, f):
        self.remote("calc-params-complete", f, ("sending params",), "complete send")
        raise answer(200, 200, "complete")

    def calc_start(self, f):
        self.remote("calc-start", f, ("complete send",), "running")
        raise answer(200, 200, "started")

    def calc_end(self, f):
        if "result" not in f or f["result"] not in ("calc end", "abnormal"):
            raise answer(400, 401 if "result" not in f else 402, "result is wrong")
        calc = self.remote("calc-end", f, ("running",), "calc end")
        calc.status = "completed" if f["result"] == "calc end" else "abnormal"
        raise answer(200, 200, "ended")

    def send_results(self, f):
        if "result_files" not in f:
            raise answer(200, 401, "result_files is missing")
        calc = self.remote("send-results", f, ("calc end",), "getting return", abnormal=True)
        calc.results = f["result_files"]
        raise answer(200, 200, "getting")

    def end_send(self, f):
        if f.get("result") != "end send":
            raise answer(*((400, 401) if "result" not in f else (200, None)), text="result is wrong")
        self.remote("end-send", f, ("calc end", "getting return"), "got return", abnormal=True)
        raise answer(200, 200, "got")

    def get_calcinfo(self, f):
        raise Answer(200, {accept_id: {"accept_time": calc.time, "calc-info": calc.info, "calc_progress": calc.progress, "calc_status": calc.status,
                                       "wait_allow": calc.allow} for accept_id, calc in self.table.items()})


ROUTES = {("POST", "add-calcinfo"): Relay.add_calcinfo, ("POST", "allow-wait-calc"): Relay.allow_wait_calc,
          ("POST", "cancel-wait-calc"): Relay.cancel_wait_calc, ("GET", "calc-status"): Relay.calc_status, ("GET", "calc-progress"): Relay.calc_progress,
          ("GET", "get-calc-result"): Relay.get_calc_result, ("GET", "calc-request"): Relay.calc_request, ("GET", "calc-params"): Relay.calc_params,
          ("POST", "calc-params-complete"): Relay.calc_params_complete, ("POST", "calc-start"): Relay.calc_start, ("POST", "calc-end"): Relay.calc_end,
          ("POST", "send-results"): Relay.send_results, ("POST", "end-send"): Relay.end_send, ("GET", "get-calcinfo"): Relay.get_calcinfo}


class Request(http.server.BaseHTTPRequestHandler):
    """One request; HTTP/1.0: the connection ends with its answer."""

    timeout = 20

    def log_message(self, *words):
        pass

    def do_GET(self):
        self.work("GET")

    def do_POST(self):
        self.work("POST")

    def work(self, method):
        relay, found = self.server, urlsplit(self.path)
        name, fields = found.path.replace(BASE, "", 1), dict(parse_qsl(found.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if name in relay.deaf:
            relay.deaf.remove(name)
            return
        token = self.headers.get("Authorization", "").replace("Bearer ", "", 1)
        if relay.tokens and token not in relay.tokens:
            text = "%s への実行権がありません。" % found.path
            return self.say(403, json.dumps({"errors": [{"code": "0005", "message": text}]}, ensure_ascii=False).encode("utf-8"))
        if (method, name) not in ROUTES:               # `version` too
            return self.say(relay.version[0], relay.version[1], "text/html")
        try:
            if body:
                fields.update(json.loads(body.decode("utf-8")))
            relay.calls.append((method, name, fields))
            ROUTES[method, name](relay, fields)
        except Answer as told:
            if name in relay.lose:
                relay.lose.remove(name)
                return
            return self.say(told.http, json.dumps(told.parsed).encode())
        except Exception as error:                     # as fielded: a page
            return self.say(500, ("<html><body>%s</body></html>" % quote(str(error))).encode(), "text/html")

    def say(self, status, data, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def parse(words):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind")
    made = kinds.add_parser("poller")
    for name in ("site", "url", "token"):
        made.add_argument(name)
    made.add_argument("--base", default=".")
    made.add_argument("--ask", type=float, default=30.0)
    made.add_argument("--take", type=float, default=10.0)
    made.add_argument("--retry", default="5,60")
    made.add_argument("--calculations", type=int, default=-1)
    made.add_argument("--ca", default="")
    made = kinds.add_parser("workflow")
    for name in ("url", "site", "token", "command", "ins", "outs"):
        made.add_argument(name)
    made.add_argument("parameters", nargs="?", default="")
    made.add_argument("--ask", type=float, default=10.0)
    made.add_argument("--leave", type=float, default=0.0)
    made.add_argument("--gently", action="store_true")
    made.add_argument("--ca", default="")
    made = kinds.add_parser("relay")
    for name in ("sites", "commands", "tokens"):
        made.add_argument(name, nargs="?" if name == "tokens" else None, default="")
    return parser.parse_args(words)


def main(words=None):
    options = parse(words)
    if options.kind == "poller":
        return Poller(options).serve()
    if options.kind == "workflow":
        return workflow(options)
    relay = Relay(options.sites.split(","), options.commands.split(","), options.tokens.split(",") if options.tokens else ())
    say(str(relay.server_port))
    relay.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
