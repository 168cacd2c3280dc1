"""Single calls of the fielded ("v1") protocol against our relay, for tests: a Peer says exactly what it is told to, from an address of its choice."""
import base64
import http.client
import json
import uuid
from urllib.parse import urlencode

import fielded_stand_ins
import suite

GETS = ("calc-request", "calc-params", "calc-status", "calc-progress", "get-calc-result", "get-calcinfo")
FILES = {"in.txt": b"an input\n"}
RESULTS = {"out.txt": b"a result\n"}


def b64(data):
    return base64.b64encode(data).decode()


def inputs(files):
    """parameter_files of a calc-info."""
    return {name: [b64(data)] + list(fielded_stand_ins.mime_of(data)) for name, data in files.items()}


def results(files):
    """result_files of send-results."""
    made = {name: dict(zip(("mimetype1", "mimetype2"), fielded_stand_ins.mime_of(data)), content=b64(data)) for name, data in files.items()}
    return made


def calc_info(site, command="hello", files=FILES, names=("out.txt",), **more):
    """A calc-info as the fielded workflow side sends it."""
    return dict({"command": command, "remote-site": site, "parameters": "", "parameter_files": inputs(files),
                 "result_files": {name: {"content": "", "mimetype1": "", "mimetype2": ""} for name in tuple(names) + suite.LOGS}}, **more)


class Peer:
    """A fielded client: a token, an address of this host, one connection for each call."""

    def __init__(self, world, token=None, address="127.0.0.1"):
        self.world, self.token, self.address = world, world.token if token is None else token, address

    def raw(self, method, target, body=None, headers=()):
        """(HTTP status, body bytes, headers)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.world.port, timeout=30, source_address=(self.address, 0))
        try:
            head = dict({"Content-Type": "application/json", "Connection": "close"}, **dict(headers))
            if self.token:
                head["Authorization"] = "Bearer " + self.token
            connection.request(method, "/mi-distcomp-api/" + target, body, head)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def parsed(self, name, fields):
        """(HTTP status, the parsed answer)."""
        if name in GETS:
            body = json.dumps(fields).encode() if name == "get-calc-result" else None      # the one GET with a body
            status, data, headers = self.raw("GET", name + "?" + urlencode(fields), body)
        else:
            status, data, headers = self.raw("POST", name, json.dumps(fields).encode())
        assert headers["Content-Type"].startswith("application/json") and int(headers["Content-Length"]) == len(data), (headers, data[:200])
        return status, json.loads(data.decode("utf-8"))

    def call(self, name, **fields):
        """(HTTP status, errors[0]); for calc-params on success (HTTP status, {"code": 200, "calc-info"})."""
        status, found = self.parsed(name, {key.replace("_id_", "_id"): value for key, value in fields.items()})
        if name == "calc-params" and "errors" not in found:
            return status, dict(found, code=200)
        assert set(found) == {"errors"} and len(found["errors"]) == 1, found
        return status, found["errors"][0]

    def code(self, name, **fields):
        """(HTTP status, code)."""
        status, found = self.call(name, **fields)
        return status, found["code"]

    def ok(self, name, **fields):
        """errors[0] of a call that must succeed."""
        status, found = self.call(name, **fields)
        assert (status, found["code"]) == (200, 200), (name, status, found)
        return found

    def word(self, name, accept_id):
        """What a fielded workflow side reads from calc-status or calc-progress."""
        return self.call(name, accept_id=accept_id)[1]["message"].split(":")[1]

    def register(self, site=suite.SITE, allow=True, **more):
        """1, 2. The accept_id."""
        accept_id = self.ok("add-calcinfo", **{"calc-info": calc_info(site, **more)})["accept_id"]
        if allow:
            self.ok("allow-wait-calc", accept_id=accept_id)
        return accept_id

    def walk(self, accept_id, upto, site=suite.SITE, good=True, files=RESULTS):
        """4..8 up to and with the named call."""
        for name, more in (("calc-params", {}), ("calc-params-complete", {}), ("calc-start", {}),
                           ("calc-end", {"result": "calc end" if good else "abnormal"}), ("send-results", {"result_files": results(files)}),
                           ("end-send", {"result": "end send"})):
            self.ok(name, accept_id=accept_id, site_id=site, **more)
            if name == upto:
                return


def unknown():
    """An accept_id that nobody has."""
    return str(uuid.uuid4())
