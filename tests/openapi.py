#!/usr/bin/env python3
"""The relay's calls as an OpenAPI description, made from its ROUTES: python3 tests/openapi.py >tests/openapi.json"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import suite

TEXT, NUMBER, YES, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {}
OBJECT = {"type": "object"}
ENTRY = {"type": "object", "properties": {"size": {"type": "integer", "minimum": 0}, "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
                                           "x": YES, "mtime": {"type": "number"}, "data": TEXT}}
FILES = {"type": "object", "additionalProperties": ENTRY}
INFO = {"type": "object", "required": ["command", "remote-site"], "properties": {
    "command": {"enum": ["hello", "other"]}, "remote-site": {"enum": [suite.SITE, "u-other", ""]}, "parameters": TEXT, "parameter_files": FILES,
    "result_files": OBJECT, "result_patterns": {"type": "array", "items": TEXT}}}
FIELDS = {"accept_id": TEXT, "claim": TEXT, "site_id": {"enum": [suite.SITE, "u-other", ""]}, "take": TEXT, "poller": TEXT, "wait": {"type": "integer", "maximum": 0},
          "have": {"type": "object", "additionalProperties": TEXT}, "free": NUMBER, "request_id": TEXT, "calc-info": INFO, "allow": YES, "more": YES, "total": NUMBER,
          "result": {"enum": ["calc end", "abnormal", "end send", ""]}, "exit_code": NUMBER, "signal": NUMBER, "reason": TEXT, "result_files": FILES,
          "missing": {"type": "object", "additionalProperties": TEXT}, "refused": {"type": "object", "additionalProperties": TEXT}, "stop": YES, "force": YES, "delete": TEXT,
          "calcs": {"type": "object", "additionalProperties": {"type": "object", "properties": {
              "claim": TEXT, "phase": TEXT, "what": TEXT, "out": {"type": "array"}, "err": {"type": "array"}}}},
          "known": TEXT, "stream": {"enum": ["out", "err", ""]}, "offset": NUMBER, "from": NUMBER, "count": NUMBER, "files": FILES, "user": TEXT, "password": TEXT,
          "presence": {"type": "object", "properties": {"state": TEXT, "until": NUMBER, "jobs": NUMBER, "busy": NUMBER, "outbox": NUMBER, "oldest": NUMBER,
                                                        "free": NUMBER, "version": TEXT}},
          "fielded": YES, "dirs": ANY, "data": ANY, "end": YES, "started": NUMBER, "ended": NUMBER, "cpu": NUMBER, "maxrss": NUMBER, "digest": TEXT,
          "verdicts": {"type": "object", "additionalProperties": {"type": "object", "properties": {
              "count": NUMBER, "names": {"type": "array", "items": TEXT}}}}}
HOLDER = ("accept_id", "claim")
CALLS = {"add-calcinfo": ("request_id", "calc-info", "allow", "more", "total", "fielded"),
         "calc-request": ("site_id", "take", "poller", "wait", "have", "free", "dirs", "data", "presence"),
         "calc-params": HOLDER + ("dirs", "data"), "calc-params-complete": HOLDER, "calc-start": HOLDER, "calc-end": HOLDER + (
             "result", "exit_code", "signal", "reason", "started", "ended", "cpu", "maxrss"),
         "send-results": HOLDER + ("result_files", "missing", "refused", "verdicts", "more", "digest", "end"), "end-send": HOLDER + ("result",),
         "calc-status": ("accept_id", "wait", "known"), "calc-progress": ("accept_id", "wait", "known"), "get-calc-result": ("accept_id", "dirs", "data"),
         "cancel-wait-calc": ("accept_id", "stop", "reason", "delete"), "rerun": ("accept_id", "force", "reason"),
         "heartbeat": ("site_id", "poller", "wait", "calcs", "presence"), "output": ("accept_id", "stream", "offset", "wait"), "login": ("user", "password"), "get-calcinfo": (),
         "reload-ini": ()}                             # all others: accept_id alone
PLACES = (("", ("from", "claim", "dirs", "data"), ("from", "claim", "files", "more")), ("/{n}", ("offset", "claim"), ("offset", "claim")),
          ("/pack", ("from", "count", "claim"), ("from", "count", "claim")))       # below files/: fields of GET, of POST
ANSWER = {"description": "the envelope", "content": {"application/json": {"schema": {"anyOf": [
    {"type": "object", "required": ["errors"], "properties": {"errors": {"type": "array", "minItems": 1, "items": {
        "type": "object", "required": ["code"], "properties": {"code": {"type": ["integer", "string"]}, "message": TEXT}}}}},
    {"type": "object", "properties": {"errors": False}}]}}}}


def operation(method, fields, path=(), binary=False):
    """One call; binary: what it posts are bytes of files, its fields stand in the query."""
    given = [{"name": name, "in": "path", "required": True, "schema": schema} for name, schema in path]
    if method == "POST" and not binary:
        body = {"type": "object", "properties": dict({"v": {"enum": [2, 1]}}, **{name: FIELDS[name] for name in fields})}
        made = {"requestBody": {"content": {"application/json": {"schema": body}}}, "responses": {"default": ANSWER}}
        return dict(made, parameters=given) if given else made
    given += [{"name": name, "in": "query", "schema": FIELDS.get(name, NUMBER)} for name in ("v",) + tuple(fields)]
    made = {"parameters": given, "responses": {"default": ANSWER}}
    if method == "POST":
        made["requestBody"] = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    return made


def description():
    """The whole of it."""
    relay, paths = suite.module("mi_dicomapi.py"), {}
    for (method, name), route in sorted(relay.ROUTES.items()):
        if name != "files":
            paths.setdefault(relay.API_PATH + name, {})[method.lower()] = operation(method, CALLS.get(name, ("accept_id",)))
        else:
            place = [("id", {"type": "string", "pattern": "^[0-9a-f-]{36}$"}), ("kind", {"enum": ["input", "result"]})]
            for more, reads, writes in PLACES:
                number = [("n", {"type": "integer", "minimum": 0, "maximum": 99})] if "{n}" in more else []
                paths.setdefault(relay.API_PATH + "files/{id}/{kind}" + more, {})[method.lower()] = operation(
                    method, reads if method == "GET" else writes, place + number, binary=bool(more))
    paths[relay.API_PATH + "version"] = {"get": operation("GET", ())}
    return {"openapi": "3.1.0", "info": {"title": "mi-distcomp-api", "version": "2"}, "paths": paths}


if __name__ == "__main__":
    print(json.dumps(description(), indent=1, ensure_ascii=False))
