"""Every call in every state, by everybody: the table of the relay (STEPS, ROUTES, CLAIMED) is all that there is."""
import json

import pytest
import suite
from suite import LOGS, entry, wait_until

relay = suite.module("mi_dicomapi.py")
STATES = tuple(relay.WORDS)
INPUTS = {"a.txt": b"input a", "b/c.txt": b""}
RESULTS = {"r.txt": b"the result"}
EVERY, HELD, DONE = STATES, STATES[2:], relay.OVER

# Fields of each step's call, besides v, accept_id and (remote side) claim.
MORE = {"rerun": {"reason": "once more"}, "rerun --force": {"reason": "once more", "force": True}, "calc-end": {"result": "calc end", "exit_code": 0}, "calc-end abnormal": {"result": "abnormal", "reason": "refused"},
        "send-results": {"result_files": {name: entry(data) for name, data in RESULTS.items()}}, "end-send": {"result": "end send"}}

# What is not a step: (label, method, target, fields, body) -> the states in which it is answered; anywhere else 409.
OTHERS = [
    ("calc-params", "GET", "calc-params", {}, None, HELD),
    ("get-calc-result", "GET", "get-calc-result", {}, None, DONE),
    ("calc-status", "GET", "calc-status", {}, None, EVERY),
    ("calc-progress", "GET", "calc-progress", {}, None, EVERY),
    ("output", "GET", "output", {"stream": "out", "offset": 0}, None, EVERY),
    ("GET files input", "GET", "files/%s/input", {"from": 0}, None, HELD),
    ("GET files input N", "GET", "files/%s/input/0", {}, None, HELD),
    ("GET files input pack", "GET", "files/%s/input/pack", {"from": 0}, None, HELD),
    ("GET files input offset", "GET", "files/%s/input/0", {"offset": ""}, None, (relay.REGISTERED,)),
    ("POST files input", "POST", "files/%s/input", {"from": 1, "files": {"b/c.txt": entry(b"")}}, None, (relay.REGISTERED,)),
    ("POST files input N", "POST", "files/%s/input/0", {"offset": 0}, INPUTS["a.txt"], (relay.REGISTERED,)),
    ("POST files input pack", "POST", "files/%s/input/pack", {"from": 0, "count": 2}, INPUTS["a.txt"], (relay.REGISTERED,)),
    ("GET files result", "GET", "files/%s/result", {"from": 0}, None, DONE),
    ("GET files result N", "GET", "files/%s/result/0", {}, None, DONE),
    ("GET files result pack", "GET", "files/%s/result/pack", {"from": 0}, None, DONE),
    ("GET files result offset", "GET", "files/%s/result/0", {"offset": ""}, None, (relay.GETTING,)),
    ("POST files result", "POST", "files/%s/result", {"from": 0, "files": {"r.txt": entry(RESULTS["r.txt"])}}, None, (relay.GETTING,)),
    ("POST files result N", "POST", "files/%s/result/0", {"offset": 0}, RESULTS["r.txt"], (relay.GETTING,)),
    ("POST files result pack", "POST", "files/%s/result/pack", {"from": 0, "count": 1}, RESULTS["r.txt"], (relay.GETTING,)),
]
STEPS = [step for step in relay.STEPS if step.role != relay.RELAY and step.name not in ("add-calcinfo", "calc-request", "end-send unsent")]
LABELS = [step.name for step in STEPS] + [other[0] for other in OTHERS]


def way_to(state):
    """The steps from a claimed calculation to this state."""
    if state == relay.SENDING:
        return []
    step = next(step for step in STEPS if step.to == state)
    return way_to(step.frm[0]) + [step]


class Calculation:
    """One calculation of a site of its own, walked to a state."""

    def __init__(self, table, state):
        self.table, self.site, self.claim, self.old = table, next(table.sites), None, None
        self.request_id, self.take = self.site + "-request", self.site + "-take-it"
        client = table.client
        self.accept_id = client.register("hello", self.request_id, INPUTS, RESULTS, allow=state != relay.REGISTERED, site=self.site)
        if state not in relay.UNCLAIMED:
            self.walk(state)

    def walk(self, state):
        """3. and on, to the state."""
        client = self.table.client
        self.accept_id, self.claim = client.claim(take=self.take, site=self.site)
        client.call("GET", "calc-params", self.fields({}))               # heard of: the lease is the long one now
        for step in way_to(state):
            client.ok("POST", step.name, self.fields(MORE.get(step.name, {})))
            if step.to == relay.GETTING:
                for number, data in enumerate(RESULTS.values()):
                    client.ok("POST", "files/%s/result/%d?v=2&offset=0&claim=%s" % (self.accept_id, number, self.claim), body=data)
        assert self.table.world.state_of(self.accept_id) == state

    def fields(self, more, claim=None):
        """The fields that every call of the remote side has."""
        return dict({"v": 2, "accept_id": self.accept_id, "claim": claim or self.claim or "1.%s" % ("0" * 32)}, **more)


class Table:
    """The world of this file: 400 sites, tokens of everybody."""

    def __init__(self, folder):
        names = ["s%d" % number for number in range(400)]
        self.world = suite.World(folder, tls=False, commands=["hello"], sites=names + ["u-other"], ini="[times]\naccept_lease = 1s\n").start()
        self.sites, self.client, self.shared = iter(names), self.world.client(), {}
        issue = self.world.issue
        self.strangers = {"another user's token": issue("mallory"), "another site's token": issue(suite.USER, "--sites", "u-other"), "no token": "",
                          "a made-up token": "0" * 64, "an expired token": self.world.expired(suite.USER, 1)}
        self.roles = {relay.WORKFLOW: issue(suite.USER, "--roles", "remote"), relay.REMOTE: issue(suite.USER, "--roles", "workflow")}

    def of(self, state):
        """A calculation in this state that refused calls share; with an old claim, where it has been claimed."""
        if not self.shared:
            self.shared = {name: Calculation(self, relay.ALLOWED if name in HELD else name) for name in STATES}
            again = [self.shared[name] for name in HELD]
            for calc in again:
                calc.old = self.client.claim(site=calc.site)[1]
            wait_until(lambda: all(self.world.state_of(calc.accept_id) == relay.ALLOWED for calc in again), 8, "the claims lapse")
            for name in HELD:
                self.shared[name].walk(name)
        return self.shared[state]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    made = Table(tmp_path_factory.mktemp("table"))
    yield made
    made.world.close()


def send(client, calc, label, claim=None, accept_id=None):
    """Makes the call with this label; (HTTP status, errors[0], or the bytes of a file)."""
    accept_id = accept_id or calc.accept_id
    for step in STEPS:
        if step.name == label:
            fields = dict(calc.fields(MORE.get(label, {}), claim), accept_id=accept_id)
            if step.role == relay.WORKFLOW:
                del fields["claim"]
            return client.call("POST", label.split(" ")[0], fields)
    name, method, target, fields, body, good = next(other for other in OTHERS if other[0] == label)
    fields = dict({"v": 2}, **fields)
    remote = role_of(label) == relay.REMOTE
    if remote:
        fields["claim"] = calc.fields({}, claim)["claim"]
    if "%s" in target:
        target %= accept_id
    else:
        fields["accept_id"] = accept_id
    if body is not None or method == "GET":
        from urllib.parse import urlencode
        target, fields = target + "?" + urlencode(fields), None
    status, data, headers = client.raw(method, target, body if fields is None else json.dumps(fields).encode())
    if headers["Content-Type"] == "application/octet-stream":
        return status, {"code": status, "bytes": data}
    return status, json.loads(data.decode())["errors"][0]


def role_of(label):
    """Who makes this call."""
    for step in STEPS:
        if step.name == label:
            return step.role
    words = label.split(" ")
    if words[1:2] != ["files"]:
        return relay.ROUTES[next(other[1] for other in OTHERS if other[0] == label), label].role
    reading = words[0] == "GET" and words[-1] != "offset"
    return relay.REMOTE if reading == (words[2] == "input") else relay.WORKFLOW


def expected(label, state):
    """(HTTP status, state afterwards) of a call with the right token and claim."""
    if label.startswith("rerun"):                      # only from abnormal, or from silence: see below
        return 409, state
    for step in STEPS:
        if step.name == label:
            if state in step.frm:
                return 200, step.to
            repeated = state == step.to
            if label == "allow-wait-calc":
                repeated = state != relay.REGISTERED                     # fine at any time after it
            elif label == "cancel-wait-calc":
                repeated = state in (relay.SENDING, relay.SENT, relay.RUNNING)           # passed on to who holds it; later: it ended by itself
            return 200 if repeated else 409, state
    return 200 if state in next(other[5] for other in OTHERS if other[0] == label) else 409, state


def test_the_table_holds_every_call_of_the_relay():
    named = {label.split(" ")[0] for label in LABELS if label.split(" ")[0] not in ("GET", "POST")}
    routes = {name for method, name in relay.ROUTES if "ID/KIND" not in name}          # of files: test_files_on_the_wire.py, test_lanes.py
    named.add("v2/redeem")                              # test_init.py
    assert routes - named == {"add-calcinfo", "calc-request", "heartbeat", "get-calcinfo", "reload-ini", "login", "metrics", "v2/explain", "v2/list",
                              "v2/board", "v2/conditions", "v2/link", "v2/maintenance"}          # these have tests of their own, below and in test_page.py
    assert relay.UNCLAIMED + relay.CLAIMED + relay.OVER == STATES


@pytest.mark.parametrize("label", LABELS)
def test_the_right_caller_moves_only_as_the_table_says_and_may_ask_twice(table, label):
    for state in STATES:
        calc = Calculation(table, state)
        before = table.world.picture(calc.accept_id)
        status, first = send(table.client, calc, label)
        http, after = expected(label, state)
        assert (status, first["code"]) == (http, http), (label, state, first)
        assert table.world.state_of(calc.accept_id) == after, (label, state)
        if http == 409:
            whys = ("claim",) if role_of(label) == relay.REMOTE and state in relay.UNCLAIMED else ("ended",) if label == "cancel-wait-calc" else ("state",)
            assert first["why"] in whys, (label, state, first)
        if state == after and (label != "cancel-wait-calc" or http == 409):
            assert table.world.picture(calc.accept_id) == before, (label, state)
        moved = table.world.picture(calc.accept_id)
        assert send(table.client, calc, label) == (status, first), (label, state, "asked again")
        assert table.world.picture(calc.accept_id) == moved, (label, state, "asked again")


@pytest.mark.parametrize("state", STATES)
def test_nobody_else_moves_anything(table, state):
    calc = table.of(state)
    before = table.world.picture(calc.accept_id)
    for who, token in table.strangers.items():
        client = table.world.client(token)
        for label in LABELS:
            status, first = send(client, calc, label)
            known = who in ("another user's token", "another site's token")
            assert (status, first["code"]) == ((404, 404) if known else (403, "0005")), (who, label, first)
            if known:                                  # exactly what an unknown id gets
                unknown = "00000000-0000-4000-8000-000000000000"
                other = send(table.client, calc, label, accept_id=unknown)
                assert json.dumps(other).replace(unknown, calc.accept_id) == json.dumps((status, first)), (who, label)
            else:
                assert first["message"].endswith(" への実行権がありません。") and first["why"], first
        assert table.world.picture(calc.accept_id) == before, who


@pytest.mark.parametrize("state", STATES)
def test_a_token_without_the_role_moves_nothing(table, state):
    calc = table.of(state)
    before = table.world.picture(calc.accept_id)
    clients = {role: table.world.client(token) for role, token in table.roles.items()}
    for label in LABELS:
        status, first = send(clients[role_of(label)], calc, label)
        assert (status, first["code"]) == (403, "0005") and role_of(label) in first["why"], (label, first)
    assert table.world.picture(calc.accept_id) == before


@pytest.mark.parametrize("state", STATES)
def test_an_old_claim_moves_nothing(table, state):
    calc = table.of(state)
    before = table.world.picture(calc.accept_id)
    for label in LABELS:
        if role_of(label) == relay.REMOTE:
            for claim in (calc.old or "1.%s" % ("0" * 32), "2.", "x" * 1000):
                status, first = send(table.client, calc, label, claim=claim)
                assert (status, first["code"], first["why"]) == (409, 409, "claim"), (label, first)
    assert table.world.picture(calc.accept_id) == before


def test_calc_request_hands_out_only_what_is_allowed_and_only_to_the_site_of_its_user(table):
    for state in STATES:
        calc = Calculation(table, state)
        words = {"v": 2, "site_id": calc.site, "poller": "p", "take": "another-take", "wait": 0}
        for who, code in (("another user's token", "0300"), ("another site's token", 403), ("no token", "0005")):
            assert table.world.client(table.strangers[who]).call("POST", "calc-request", words)[1]["code"] == code, (state, who)
        if state != relay.SENDING:
            again = table.client.call("POST", "calc-request", dict(words, take=calc.take))
            assert again[1]["code"] == (200 if state == relay.ALLOWED else "0300"), (state, again)
        else:
            again = table.client.ok("POST", "calc-request", dict(words, take=calc.take))
            assert (again["accept_id"], again["claim"], again["attempt"]) == (calc.accept_id, calc.claim, 1)
        status, first = table.client.call("POST", "calc-request", words)
        assert (status, first["code"]) == (200, "0300"), (state, first)
        assert first["message"] == "There is no information for accept_id(None), about the your site id(%s)" % calc.site


def test_what_calc_request_answers_is_the_whole_order(table):
    calc = Calculation(table, relay.ALLOWED)
    found = table.client.ok("POST", "calc-request", {"v": 2, "site_id": calc.site, "poller": "p", "take": calc.take, "wait": 0})
    assert found["accept_id"] == calc.accept_id and found["attempt"] == 1 and found["lease"] == 300
    assert found["claim"].startswith("1.") and len(found["claim"]) == 34
    assert found["calc-info"] == {"command": "hello", "remote-site": calc.site, "parameters": "", "result_files": {"r.txt": {}}, "result_patterns": []}
    assert found["inputs"] == {"files": {name: entry(data) for name, data in INPUTS.items()}, "next": None}


def test_a_wrong_site_is_told_so_in_the_words_of_the_manual(table):
    status, first = table.client.call("POST", "calc-request", {"v": 2, "site_id": "nowhere", "poller": "p", "take": "12345678", "wait": 0})
    assert (status, first["code"]) == (400, 400)
    assert first["message"] == "Your site-id(nowhere) does not match in the list that acceptable to."


def test_a_site_that_is_not_in_the_token_is_told_so_whether_it_exists_or_not(table):
    client = table.world.client(table.strangers["another site's token"])
    info = {"command": "hello", "parameters": "", "parameter_files": {}, "result_files": {}}
    for site in (next(table.sites), "nowhere"):
        for name, fields in (("calc-request", {"site_id": site, "poller": "p", "take": "12345678", "wait": 0}),
                             ("add-calcinfo", {"request_id": "r", "calc-info": dict(info, **{"remote-site": site})})):
            status, first = client.call("POST", name, dict(fields, v=2))
            assert (status, first["code"]) == (403, 403) and first["message"] == "this token is not for site %s, only for u-other" % site


def test_the_same_request_id_is_the_same_calculation_in_every_state(table):
    for state in STATES:
        calc = Calculation(table, state)
        words = {"v": 2, "request_id": calc.request_id, "allow": False, "calc-info": {
            "command": "hello", "remote-site": calc.site, "parameters": "", "result_files": {name: {} for name in RESULTS},
            "parameter_files": {name: entry(data) for name, data in INPUTS.items()}}}
        before = table.world.picture(calc.accept_id)
        found = table.client.ok("POST", "add-calcinfo", words)
        assert found["accept_id"] == calc.accept_id and found["known"] is True and found["progress"] == relay.WORDS[state]
        assert table.client.ok("POST", "add-calcinfo", words) == found
        words["calc-info"]["result_files"]["more.txt"] = {}
        status, first = table.client.call("POST", "add-calcinfo", words)
        assert (status, first["code"], first["why"]) == (409, 409, "differs")
        assert table.world.picture(calc.accept_id) == before, state
        mine = table.world.client(table.strangers["another user's token"]).ok("POST", "add-calcinfo", words)      # his own, not mine
        assert mine["accept_id"] != calc.accept_id and mine["known"] is False


@pytest.mark.parametrize("what, change, code", [
    ("an unknown site", {"remote-site": "nowhere"}, 400), ("no site", {"remote-site": None}, 400), ("an unlisted command", {"command": "hell"}, 401),
    ("a longer command", {"command": "hello there"}, 401), ("no command", {"command": ""}, 400), ("a number as command", {"command": 7}, 400),
    ("parameters that are no text", {"parameters": ["x"]}, 400), ("results that are a text", {"result_files": "r"}, 400),
    ("a result above", {"result_files": {"../r": {}}}, 400), ("an absolute pattern", {"result_patterns": ["/etc/**"]}, 400),
    ("a pattern that is no text", {"result_patterns": [7]}, 400), ("an input without a sum", {"parameter_files": {"a": {"size": 1}}}, 400),
    ("an input with a negative size", {"parameter_files": {"a": {"size": -1, "sha256": "0" * 64}}}, 400),
    ("an input with a size that is no number", {"parameter_files": {"a": {"size": True, "sha256": "0" * 64}}}, 400),
    ("an input with half a sum", {"parameter_files": {"a": {"size": 1, "sha256": "0" * 63}}}, 400),
])
def test_a_registration_that_is_not_as_it_should_be_is_refused_and_leaves_nothing(table, what, change, code):
    site = next(table.sites)
    info = dict({"command": "hello", "remote-site": site, "parameters": "", "result_files": {}, "parameter_files": {}}, **change)
    status, first = table.client.call("POST", "add-calcinfo", {"v": 2, "request_id": "r-" + site, "calc-info": info})
    assert (status, first["code"]) == (code, code) and first["message"], first
    assert table.world.rows("SELECT COUNT(*) AS n FROM calculations WHERE site = ?", site) == [{"n": 0}]


def test_the_heartbeat_tells_what_is_gone_and_what_is_unknown(table):
    nobody = "00000000-0000-4000-8000-000000000000"
    for state in STATES:
        calc = table.of(state)
        before = table.world.picture(calc.accept_id)

        def beat(token=None, claim=None):
            calcs = {calc.accept_id: {"claim": claim or calc.claim, "phase": "running"}, nobody: {"claim": "1.x", "phase": "running"}}
            found = table.world.client(token).ok("POST", "heartbeat", {"v": 2, "site_id": calc.site, "poller": "p", "wait": 0, "calcs": calcs})
            return sorted(found["unknown"]), found["gone"], found["cancel"]

        assert beat() == ([nobody], [] if state in relay.CLAIMED else [calc.accept_id], []), state
        assert beat(claim=calc.old or "1.y") == ([nobody], [calc.accept_id], [])
        for who in ("another user's token", "another site's token"):
            assert beat(table.strangers[who]) == (sorted([nobody, calc.accept_id]), [], []), (who, state)
        assert table.world.client("").call("POST", "heartbeat", {"v": 2, "poller": "p", "wait": 0, "calcs": {}})[0] == 403
        assert table.world.picture(calc.accept_id) == before


def test_only_an_operator_sees_the_whole_table_and_reloads(table):
    calc = table.of(relay.RUNNING)
    operator = table.world.client(table.world.issue("boss", "--roles", "operator"))
    found = operator.ok("GET", "get-calcinfo", {"v": 2})["calculations"]
    assert found[calc.accept_id]["calc_progress"] == "running" and found[calc.accept_id]["user"] == suite.USER
    assert table.of(relay.FINISHED).accept_id not in found
    assert table.client.call("GET", "get-calcinfo")[0] == 403
    assert table.client.raw("POST", "reload-ini")[0] == 403
    assert operator.raw("POST", "reload-ini")[0] == 200
    may = ("cancel-wait-calc", "rerun", "rerun --force", "output")       # an operator's words on the page: see test_page.py
    for label in [label for label in LABELS if label not in may]:        # to see is not to do
        assert send(operator, calc, label)[0] == 403, label


def test_a_cancelled_calculation_ends_abnormal_and_the_one_that_ended_by_itself_does_not(table):
    for state in STATES:
        calc = Calculation(table, state)
        status, first = table.client.call("POST", "cancel-wait-calc", {"v": 2, "accept_id": calc.accept_id, "stop": True, "reason": "no longer needed\n"})
        assert status == expected("cancel-wait-calc", state)[0], (state, first)
        if state in relay.UNCLAIMED:
            found = table.client.ok("GET", "get-calc-result", {"v": 2, "accept_id": calc.accept_id})["result-info"]
            assert found["status"] == "abnormal" and found["reason"] == "cancelled: no longer needed\\x0a" and found["result_files"] == {}
            assert table.client.claim(site=calc.site) is None
            assert table.client.call("POST", "cancel-wait-calc", {"v": 2, "accept_id": calc.accept_id, "stop": True})[0] == 200
            assert table.client.ok("POST", "finish", {"v": 2, "accept_id": calc.accept_id})
    assert LOGS == relay.LOG_NAMES


def test_an_abnormal_calculation_can_be_run_again_under_a_new_claim_and_the_old_one_is_void(table):
    calc = Calculation(table, relay.RUNNING)
    table.client.ok("POST", "calc-end", calc.fields(dict(MORE["calc-end"], exit_code=3)))
    table.client.ok("POST", "send-results", calc.fields({"result_files": {}}))
    table.client.ok("POST", "end-send", calc.fields(MORE["end-send"]))
    assert send(table.client, calc, "rerun")[0] == 200 and table.world.state_of(calc.accept_id) == relay.ALLOWED
    assert send(table.client, calc, "send-results")[1]["why"] == "claim"
    old = calc.claim
    calc.take += "-again"
    calc.walk(relay.GOT)
    assert calc.claim.startswith("2.") and calc.claim != old
    assert table.client.ok("GET", "get-calc-result", {"v": 2, "accept_id": calc.accept_id})["result-info"]["status"] == "completed"


def test_a_call_by_the_wrong_method_or_name_is_refused_in_the_envelope(table):
    calc = table.of(relay.RUNNING)
    for method, name, code in (("GET", "allow-wait-calc", 405), ("POST", "calc-progress", 405), ("GET", "nonsense", 404), ("POST", "files", 404),
                               ("GET", "files/%s/input/12345678" % calc.accept_id, 404), ("GET", "files/%s/other/0" % calc.accept_id, 404),
                               ("GET", "files/../../etc/passwd", 404), ("POST", "calc-start/", 404), ("GET", "", 404)):
        status, data, headers = table.client.raw(method, name, b"{}" if method == "POST" else None)
        assert status == json.loads(data.decode())["errors"][0]["code"] == code, name
