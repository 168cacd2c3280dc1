"""The fielded protocol on the relay: the table of PROTOCOL.md 1.4 with the deviations of 1.5, over real sockets; then a test for every line of 1.5."""
import base64
import json
import os
import re
import time

import pytest
import suite
from fielded_peer import RESULTS, Peer, b64, calc_info, results, unknown
from suite import LOGS, SITE, USER, wait_until

relay = suite.module("mi_dicomapi.py")
ELSEWHERE = "127.0.0.2"        # another address of this host
STATES = "U R A SP CS RUN CE GR GOT CEx GRx GOTx".split()
with open(os.path.join(suite.HERE, "PROTOCOL.md"), encoding="utf-8") as text:                       # 1.4, as it was measured. A quoted code is
    TABLE = re.search(r"^### 1\.4 .*?\n((?:\|[^\n]*\n)+)", text.read(), re.M | re.S).group(1)          # a string; "same": as the column before
WRONG = (200, 409)             # 1.5, first line: a fielded relay says 200/200 here
AGAIN = {("calc-params", "SP"), ("calc-params-complete", "CS"), ("calc-start", "RUN"), ("calc-end", "CE"), ("calc-end", "CEx"),
         ("send-results", "GR"), ("end-send", "GOT")}                 # 1.5: repeated by the same peer, answered as the first time
REMOTE = ("calc-params", "calc-params-complete", "calc-start", "calc-end", "send-results", "end-send")
MOVES = {"allow-wait-calc": {"R": "A"}, "calc-params": {"A": "SP"}, "calc-params-complete": {"SP": "CS"}, "calc-start": {"CS": "RUN"},
         "calc-end": {"RUN": "CE"}, "send-results": {"CE": "GR", "CEx": "GRx"},
         "end-send": {"CE": "GOTx", "GR": "GOT", "CEx": "GOTx", "GRx": "GOTx"}}       # CE: 1.5, no empty success
LAST = {"SP": "calc-params", "CS": "calc-params-complete", "RUN": "calc-start", "CE": "calc-end", "GR": "send-results", "GOT": "end-send"}
SHOWN = {"registered": "R", "allowed": "A", "sending": "SP", "sent": "CS", "running": "RUN", "ended": "CE", "getting": "GR", "got": "GOT"}


def read_table():
    """{(request, state): the cell's text}."""
    cells = {}
    for line in TABLE.strip().split("\n")[2:]:
        name, *row = [word.strip() for word in line.strip("|").split("|")]
        assert len(row) == len(STATES), name
        for state, cell in zip(STATES, row):
            cells[name, state] = cells[name, STATES[STATES.index(state) - 1]] if cell == "same" else cell
    return cells


CELLS = read_table()
CASES = [(name, state, "another address" if other else "the same peer") for name, state in CELLS for other in ((0, 1) if name in REMOTE else (0,))]


def expected(name, state, who):
    """(HTTP status, code) of this request in this state."""
    cell = CELLS[name, state]
    if who == "the same peer" and (name, state) in AGAIN or cell == "->":
        return 200, 200
    if cell == "wrong":
        return WRONG
    status, code = cell.split("/")
    return int(status), json.loads(code)


def after(name, state):
    """The state that follows an answer of 200/200."""
    if name.startswith("cancel") or name == "get-calc-result":
        return "U"
    return MOVES.get(name, {}).get(state, state)


class Sites:
    """A relay with many sites, so that each calculation has one of its own."""

    def __init__(self, folder, ini="[times]\nv1_announce = 2s\n"):
        names = ["s%d" % number for number in range(500)]
        self.world = suite.World(folder, tls=False, commands=["hello"], sites=names, ini=ini).start()
        self.names, self.peer, self.kept = iter(names), Peer(self.world), {}
        self.other_user, self.other_token = self.world.issue("mallory"), self.world.issue(USER)

    def bring(self, state):
        """(site, accept_id) of a calculation in a state."""
        site = next(self.names)
        if state == "U":
            return site, unknown()
        accept_id = self.peer.register(site, allow=state != "R")
        if state not in ("R", "A"):
            self.peer.walk(accept_id, LAST[state.rstrip("x")], site, good="x" not in state)
        assert self.state(accept_id) == state
        return site, accept_id

    def shared(self, state):
        """bring(), once for each state: for requests that change nothing."""
        if state not in self.kept:
            self.kept[state] = self.bring(state)
        return self.kept[state]

    def state(self, accept_id):
        """A calculation's state as the table names it; U if the fielded protocol does not show it any more."""
        found = self.world.rows("SELECT state, status, hidden FROM calculations WHERE accept_id = ?", accept_id)
        if not found or found[0]["hidden"] or found[0]["state"] == "finished":
            return "U"
        return SHOWN[found[0]["state"]] + ("x" if found[0]["status"] == "abnormal" else "")


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    made = Sites(tmp_path_factory.mktemp("fielded"))
    yield made
    made.world.close()


def request(peer, name, site, accept_id, **more):
    """(HTTP status, errors[0]) of a request of the table."""
    fields = {"accept_id": accept_id}
    if name in REMOTE:
        fields["site_id"] = site
    if name == "calc-request":
        fields = {"site_id": site}
    fields.update({"calc-end": {"result": "calc end"}, "end-send": {"result": "end send"}, "send-results": {"result_files": results(RESULTS)},
                   "cancel force": {"delete": "force"}}.get(name, {}), **more)
    return peer.call("cancel-wait-calc" if name == "cancel force" else name, **fields)


@pytest.mark.parametrize("name, state, who", CASES, ids=["%s in %s by %s" % case for case in CASES])
def test_the_table(sites, name, state, who):
    wanted = expected(name, state, who)
    moves = wanted == (200, 200) and after(name, state) != state
    site, accept_id = (sites.bring if moves or name == "calc-request" else sites.shared)(state)
    peer = sites.peer if who == "the same peer" else Peer(sites.world, address=ELSEWHERE)
    status, found = request(peer, name, site, accept_id)
    assert (status, found["code"]) == wanted and type(found["code"]) is type(wanted[1]), found
    if name == "calc-params" and wanted == (200, 200):
        assert found["calc-info"]["parameter_files"]["in.txt"] == [b64(b"an input\n"), "application/octet-stream;", "charset=binary"]
    if state != "U":                                   # get-calc-result: forgotten when the answer is written
        wait_until(lambda: sites.state(accept_id) == (after(name, state) if moves else state), 2 if name == "get-calc-result" else 0)
    if name == "calc-request" and state == "A":
        assert found["accept_id"] == accept_id


@pytest.mark.parametrize("name", REMOTE)
def test_a_repeat_after_the_next_step_is_a_wrong_state(sites, name):
    site, accept_id = sites.bring("GOT")
    if name == "end-send":
        sites.peer.ok("get-calc-result", accept_id=accept_id)
        wait_until(lambda: request(sites.peer, name, site, accept_id)[1]["code"] == "0300", 2)      # forgotten, as in U
        return
    status, found = request(sites.peer, name, site, accept_id)
    assert (status, found["code"]) == (200, {"calc-start": 400, "send-results": 401}.get(name, 409))


@pytest.mark.parametrize("name", REMOTE)
def test_a_repeat_with_another_token_of_the_same_user_is_a_wrong_state(sites, name):
    site, accept_id = sites.shared({name: state for state, name in LAST.items()}[name])
    status, found = request(Peer(sites.world, sites.other_token), name, site, accept_id)
    assert (status, found["code"]) == (200, {"calc-start": 400, "send-results": 401, "end-send": 401}.get(name, 409))


# ---- 1.1 and 1.2: answers and texts

def test_the_texts_of_an_unknown_id_send_a_fielded_workflow_side_away_in_order(sites):
    for name, start in (("calc-status", "status:abnormal:"), ("calc-progress", "status:got return:")):
        status, found = sites.peer.call(name, accept_id=unknown())
        assert (status, found["code"]) == (200, 400) and found["message"].startswith(start) and len(found["message"]) > len(start)
    assert sites.peer.code("get-calc-result", accept_id=unknown()) == (200, 400)


def test_what_the_manual_promises_people_is_said_word_for_word(sites):
    site = next(sites.names)
    assert sites.peer.call("calc-request", site_id=site) == (
        200, {"code": "0300", "message": "There is no information for accept_id(None), about the your site id(%s)" % site})
    assert sites.peer.call("calc-request", site_id="typo") == (
        200, {"code": "400", "message": "Your site-id(typo) does not match in the list that acceptable to."})


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_without_a_good_token_the_answer_is_403_with_code_0005_as_the_gateways(sites, token):
    status, found = Peer(sites.world, token).call("calc-request", site_id="s1")
    assert status == 403 and found["code"] == "0005" and found["message"] == "/mi-distcomp-api/calc-request への実行権がありません。"
    status, found = Peer(sites.world, token).call("add-calcinfo", **{"calc-info": calc_info("s1")})
    assert status == 403 and found["code"] == "0005" and found["message"] == "/mi-distcomp-api/add-calcinfo への実行権がありません。"


def test_status_and_progress_words_are_spelled_as_on_the_wire(sites):
    words = {"R": ("none", "not start"), "A": ("none", "not start"), "SP": ("none", "sending params"), "CS": ("none", "complete send"),
             "RUN": ("none", "running"), "CE": ("completed", "calc end"), "GR": ("completed", "getting return"), "GOT": ("completed", "got return"),
             "CEx": ("abnormal", "calc end"), "GRx": ("abnormal", "getting return"), "GOTx": ("abnormal", "got return")}
    for state, (status, progress) in words.items():
        site, accept_id = sites.bring(state)
        assert sites.peer.ok("calc-status", accept_id=accept_id)["message"] == "status:" + status, state
        assert sites.peer.ok("calc-progress", accept_id=accept_id)["message"] == "status:" + progress, state


def test_calc_params_is_not_in_the_envelope_and_tells_all_of_calc_info_with_bytes_for_every_input(sites):
    site, files = next(sites.names), {"a.txt": b"ascii", "b.txt": "日本".encode(), "日本 語.dat": bytes(range(256)), "empty": b""}
    accept_id = sites.peer.register(site, files=files, names=("out.txt", "結果.txt"), **{"unknown-key": {"kept": ["x", 1.5, None]}, "parameters": "-a b"})
    status, found = sites.peer.parsed("calc-params", {"accept_id": accept_id, "site_id": site})
    assert status == 200 and set(found) == {"calc-info"}
    info = found["calc-info"]
    assert info["parameter_files"] == {name: [b64(data), "application/octet-stream;", "charset=binary"] for name, data in files.items()}
    assert set(info["result_files"]) == {"out.txt", "結果.txt"} | set(LOGS)
    assert (info["command"], info["remote-site"], info["parameters"], info["unknown-key"]) == ("hello", site, "-a b", {"kept": ["x", 1.5, None]})


def test_a_missing_input_travels_as_three_empty_texts_and_arrives_as_an_empty_file(sites):
    site = next(sites.names)
    info = dict(calc_info(site), parameter_files={"absent": ["", "", ""]})
    accept_id = sites.peer.ok("add-calcinfo", **{"calc-info": info})["accept_id"]
    sites.peer.ok("allow-wait-calc", accept_id=accept_id)
    status, found = sites.peer.call("calc-params", accept_id=accept_id, site_id=site)
    assert found["calc-info"]["parameter_files"] == {"absent": ["", "application/octet-stream;", "charset=binary"]}


def test_the_result_comes_back_with_its_bytes_and_a_missing_one_with_error_and_the_reason(sites):
    site, data = next(sites.names), bytes(range(256)) * 3
    accept_id = sites.peer.register(site, names=("out.dat", "absent.txt"))
    files = dict(results({"out.dat": data, LOGS[0]: b"said", LOGS[1]: b""}), **{"absent.txt": {"content": "", "mimetype1": "Error",
            "mimetype2": "No such file"}})
    sites.peer.walk(accept_id, "calc-end", site)
    sites.peer.ok("send-results", accept_id=accept_id, site_id=site, result_files=files)
    sites.peer.ok("end-send", accept_id=accept_id, site_id=site, result="end send")
    assert sites.peer.word("calc-status", accept_id) == "completed"                 # some missing is still completed
    found = sites.peer.ok("get-calc-result", accept_id=accept_id)["result-info"]["result_files"]
    assert {name: entry["content"] for name, entry in found.items()} == {"out.dat": b64(data), LOGS[0]: b64(b"said"), LOGS[1]: "", "absent.txt": ""}
    assert found["absent.txt"] == {"content": "", "mimetype1": "Error", "mimetype2": "No such file"}
    assert all(set(entry) == {"content", "mimetype1", "mimetype2"} for entry in found.values())
    assert found["out.dat"]["mimetype2"].startswith("charset=") and found["out.dat"]["mimetype1"].endswith(";")
    wait_until(lambda: sites.peer.code("get-calc-result", accept_id=accept_id) == (200, 400), 2)      # forgotten after that


def test_every_declared_name_and_both_logs_are_in_the_result_also_when_nothing_of_them_came(sites):
    site, accept_id = sites.bring("CE")
    sites.peer.ok("end-send", accept_id=accept_id, site_id=site, result="end send")
    sites.peer.call("calc-status", accept_id=accept_id)
    found = sites.peer.ok("get-calc-result", accept_id=accept_id)["result-info"]["result_files"]
    assert set(found) == {"out.txt"} | set(LOGS)
    assert found["out.txt"]["mimetype1"] == found[LOGS[0]]["mimetype1"] == "Error" and found["out.txt"]["mimetype2"]
    assert found[LOGS[1]]["mimetype1"] != "Error" and found[LOGS[1]]["content"]


def test_get_calcinfo_is_the_whole_table_without_the_envelope_and_for_operators_only(sites):
    accept_id, registered = sites.shared("SP")[1], sites.shared("R")[1]
    status, found = Peer(sites.world, sites.world.issue("op", "--roles", "operator")).parsed("get-calcinfo", {})
    assert status == 200 and "errors" not in found
    assert set(found[accept_id]) == {"accept_time", "calc-info", "calc_progress", "calc_status", "wait_allow"}
    assert (found[accept_id]["calc_progress"], found[accept_id]["calc_status"]) == ("sending params", "none")
    assert found[accept_id]["wait_allow"] != "none" and found[accept_id]["calc-info"]["command"] == "hello"
    assert found[registered]["wait_allow"] == "none"
    assert sites.peer.parsed("get-calcinfo", {})[0] == 403


def test_reload_ini_answers_in_the_envelope(sites):
    operator = Peer(sites.world, sites.world.issue("op", "--roles", "operator"))
    status, data, headers = operator.raw("POST", "reload-ini", b"{}")
    assert (status, json.loads(data)["errors"][0]["code"]) == (200, 200)


# ---- 1.4, last paragraph: refusals

@pytest.mark.parametrize("change, code", [
    ({"remote-site": "typo"}, "400"), ({"remote-site": ""}, "400"), ({"remote-site": None}, "400"), ({"command": "rm -rf /"}, 401)],
    ids=["wrong site", "empty site", "null site", "a command that is not listed"])
def test_add_calcinfo_refuses_with_http_202(sites, change, code):
    status, found = sites.peer.call("add-calcinfo", **{"calc-info": dict(calc_info("s1"), **change)})
    assert (status, found["code"]) == (202, code) and type(found["code"]) is type(code)
    if code == "400":
        assert re.match(r"Your site-id\(.*\) does not match in the list that acceptable to\.\Z", found["message"])


@pytest.mark.parametrize("body", [{}, {"calc-info": None}, {"calc-info": []}, {"calc-info": {"command": "hello"}}, {"calc-info": {"remote-site": "s1"}}],
                         ids=["no calc-info", "null", "a list", "no site key", "no command"])
def test_add_calcinfo_without_what_it_needs_is_202_and_400(sites, body):
    assert sites.peer.code("add-calcinfo", **body) == (202, 400)


def test_missing_keys_are_400_with_http_400_but_http_200_for_params_complete_and_send_results(sites):
    for name in ("allow-wait-calc", "cancel-wait-calc", "calc-status", "calc-progress", "get-calc-result", "calc-request"):
        assert sites.peer.code(name) == (400, 400), name
    more = {"calc-end": {"result": "calc end"}, "end-send": {"result": "end send"}, "send-results": {"result_files": {}}}
    for name in REMOTE:
        wanted = (200 if name in ("calc-params-complete", "send-results") else 400, 400)
        for fields in ({"accept_id": unknown()}, {"site_id": "s1"}, {}):
            assert sites.peer.code(name, **dict(fields, **more.get(name, {}))) == wanted, (name, fields)


@pytest.mark.parametrize("name, state, fields, wanted", [
    ("calc-end", "RUN", {}, (400, 401)), ("calc-end", "RUN", {"result": "done"}, (400, 402)), ("send-results", "CE", {}, (200, 401)),
    ("end-send", "GR", {}, (400, 401)), ("end-send", "GR", {"result": "sent"}, (400, 402))],
    ids=["calc-end without result", "calc-end with another word", "send-results without result_files", "end-send without result", "end-send with another word"])
def test_a_wrong_result_field_is_refused_and_changes_nothing(sites, name, state, fields, wanted):
    site, accept_id = sites.bring(state)
    assert sites.peer.code(name, accept_id=accept_id, site_id=site, **fields) == wanted
    assert sites.state(accept_id) == state


MORE = {"calc-end": {"result": "calc end"}, "end-send": {"result": "end send"}, "send-results": {"result_files": {}}}
WITH_200 = ("calc-params-complete", "send-results")    # HTTP status of a missing field and of what is unknown; 400 elsewhere


@pytest.mark.parametrize("name", REMOTE)
@pytest.mark.parametrize("state", ["U", "R", "A", "RUN", "GOT"])
@pytest.mark.parametrize("site", ["typo", None])
def test_an_unknown_site_is_code_400_as_a_text_on_each_remote_call(sites, name, state, site):
    accept_id = sites.shared(state)[1]
    status, found = sites.peer.call(name, accept_id=accept_id, site_id=site, **MORE.get(name, {}))
    assert (status, found["code"]) == (200 if name in WITH_200 else 400, "400"), found
    assert re.match(r"Your site-id\((typo|None)\) does not match in the list that acceptable to\.\Z", found["message"])
    assert sites.state(accept_id) == state


def test_an_empty_id_counts_as_missing_and_null_as_unknown(sites):
    for name in ("calc-status", "calc-progress", "get-calc-result", "allow-wait-calc", "cancel-wait-calc"):
        assert sites.peer.code(name, accept_id="") == (400, 400), name
    assert sites.peer.code("calc-request", site_id="") == (400, 400)
    for name in REMOTE:
        missing, unknown_id = (200 if name in WITH_200 else 400, 400), (200 if name in WITH_200 else 400, "0300")
        for fields in ({"accept_id": "", "site_id": "s1"}, {"accept_id": unknown(), "site_id": ""}):
            assert sites.peer.code(name, **dict(fields, **MORE.get(name, {}))) == missing, (name, fields)
        if name != "calc-params":                      # a query has no null
            assert sites.peer.code(name, accept_id=None, site_id="s1", **MORE.get(name, {})) == unknown_id, name
    for name in ("allow-wait-calc", "cancel-wait-calc"):
        assert sites.peer.code(name, accept_id=None) == (400, 400)


def test_a_list_as_the_body_holds_no_field(sites):
    for body in (b"[]", b' [1, {"accept_id": "x"}]', b"[" + b'"x", ' * 20000 + b"1]"):
        for name, status in (("add-calcinfo", 202), ("allow-wait-calc", 400), ("calc-params-complete", 200), ("calc-start", 400), ("send-results", 200)):
            told, data, headers = sites.peer.raw("POST", name, body)
            assert (told, json.loads(data)["errors"][0]["code"]) == (status, 400), (name, body[:20])
    assert sites.peer.raw("POST", "add-calcinfo", b"[")[0] == sites.peer.raw("POST", "add-calcinfo?v=2", b"[]")[0] == 400


@pytest.mark.parametrize("kind, good", [
    ("application/json", True), ("application/json; charset=utf-8", True), ("Application/JSON;charset=UTF-8", True), ("application/vnd.x+json", True),
    ("text/plain", False), ("application/x-www-form-urlencoded", False), ("multipart/form-data; boundary=x", False), ("text/json", False)])
def test_json_that_is_not_called_so_is_400(sites, kind, good):
    long = dict(calc_info(next(sites.names)), padding=["x" * 100] * 1000)                # beyond what is read without a thread
    for body in (json.dumps({"calc-info": calc_info(next(sites.names))}), json.dumps({"calc-info": long})):
        status, data, headers = sites.peer.raw("POST", "add-calcinfo", body.encode(), {"Content-Type": kind})
        assert (status, json.loads(data)["errors"][0]["code"]) == ((200, 200) if good else (400, 400))
    assert sites.peer.raw("GET", "calc-status?accept_id=" + unknown(), headers={"Content-Type": kind})[0] == 200       # no body, no JSON


# ---- 1.5, line by line

def test_calc_request_reserves_nothing(sites):
    site, accept_id = sites.bring("A")
    for turn in range(3):
        assert sites.peer.ok("calc-request", site_id=site)["accept_id"] == accept_id
    assert sites.state(accept_id) == "A"


def test_an_announced_calculation_is_named_to_nobody_else_for_v1_announce(sites):
    site, accept_id = sites.bring("A")
    other = Peer(sites.world, address=ELSEWHERE)
    assert sites.peer.ok("calc-request", site_id=site)["accept_id"] == accept_id
    began = time.monotonic()
    assert other.code("calc-request", site_id=site) == (200, "0300")
    assert sites.world.client().claim(site=site) is None              # nor to a poller of our own
    second = sites.peer.register(site)
    assert other.ok("calc-request", site_id=site)["accept_id"] == second
    assert other.code("calc-params", accept_id=accept_id, site_id=site) == (200, 409)
    assert sites.peer.ok("calc-request", site_id=site)["accept_id"] == accept_id
    wait_until(lambda: Peer(sites.world, address="127.0.0.3").code("calc-request", site_id=site) == (200, 200), 8)
    assert time.monotonic() - began > 1.5


def test_a_poller_of_our_own_gets_what_the_fielded_one_threw_away(sites):
    """As soon as the announcement has lapsed: who waits is told."""
    site, accept_id = sites.bring("A")
    sites.peer.ok("calc-request", site_id=site)
    began = time.monotonic()
    assert sites.world.client().claim(wait=20, site=site)[0] == accept_id
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", REMOTE[:5])
def test_a_calc_request_from_a_peer_that_holds_a_calculation_ends_its_repeats(sites, name):
    site, accept_id = sites.bring({name: state for state, name in LAST.items()}[name])
    assert request(sites.peer, name, site, accept_id)[1]["code"] == 200
    assert sites.peer.code("calc-request", site_id=site) == (200, "0300")
    status, found = request(sites.peer, name, site, accept_id)
    assert (status, found["code"]) == (200, {"calc-start": 400, "send-results": 401}.get(name, 409))


def test_a_registered_calculation_that_is_not_allowed_hides_nothing_behind_it(sites):
    site = sites.bring("R")[0]
    assert sites.peer.code("calc-request", site_id=site) == (200, "400")
    accept_id = sites.peer.register(site)
    assert sites.peer.ok("calc-request", site_id=site)["accept_id"] == accept_id
    assert Peer(sites.world, address=ELSEWHERE).code("calc-request", site_id=site)[1] == "0300"       # an allowed one exists


def test_the_oldest_allowed_one_is_named_first(sites):
    site = next(sites.names)
    ids = [sites.peer.register(site) for turn in range(3)]
    for accept_id in ids:
        assert sites.peer.ok("calc-request", site_id=site)["accept_id"] == accept_id
        sites.peer.walk(accept_id, "end-send", site)


def test_completed_with_none_of_the_requested_results_is_abnormal_and_without_any_requested_it_is_fine(sites):
    for names, wanted in ((("out.txt", "more.txt"), "abnormal"), ((), "completed")):
        site = next(sites.names)
        accept_id = sites.peer.register(site, names=names)
        sites.peer.walk(accept_id, "end-send", site, files={LOGS[0]: b"x", LOGS[1]: b"y"})
        assert sites.peer.word("calc-status", accept_id) == wanted


def test_a_fielded_registration_that_needs_v2_is_kept_from_fielded_pollers(sites):
    site = next(sites.names)
    accept_id = sites.peer.register(site, files={"d/in.txt": b"x"})
    assert sites.peer.code("calc-request", site_id=site) == (200, "0300")
    assert sites.peer.code("calc-params", accept_id=accept_id, site_id=site) == (400, "0300")
    after_it = sites.peer.register(site)
    assert sites.peer.ok("calc-request", site_id=site)["accept_id"] == after_it
    assert sites.world.client().claim(site=site)[0] == accept_id      # a poller of our own takes it


def test_a_result_name_with_a_directory_is_a_fielded_pollers_too_and_comes_back(sites):
    site, files = next(sites.names), {"sub/dir/out.txt": b"in a directory", "out.txt": b"at the top"}
    sites.peer.code("calc-request", site_id=site)
    accept_id = sites.peer.register(site, names=tuple(files))
    sites.peer.walk(accept_id, "end-send", site, files=files)
    assert sites.peer.word("calc-status", accept_id) == "completed"
    found = sites.peer.ok("get-calc-result", accept_id=accept_id)["result-info"]["result_files"]
    assert {name: base64.b64decode(found[name]["content"]) for name in files} == files


def of_our_own(sites, site, **more):
    """errors[0] of a registration by a workflow side of our own."""
    info = dict({"command": "hello", "remote-site": site, "parameters": "", "parameter_files": {}, "result_files": {"out.txt": {}}}, **more)
    return sites.world.client().ok("POST", "add-calcinfo", {
        "v": 2, "request_id": unknown(), "calc-info": info, "allow": True, "fielded": info.pop("fielded", False)})


@pytest.mark.parametrize("more", [{"result_files": {"d/e.txt": {}}}, {"parameters": "-x", "fielded": True}],
                         ids=["a result's directory", "parameters of the fielded words"])
def test_what_hides_nothing_is_named_to_a_fielded_poller(sites, more):
    site = next(sites.names)
    assert not of_our_own(sites, site, **more)["warning"]
    assert sites.peer.code("calc-request", site_id=site) == (200, 200)
    found = of_our_own(sites, site, **more)
    assert ("does not get the parameters" in found["warning"]) == ("parameters" in more) == bool(found["warning"])


def test_the_warning_is_of_the_users_own_poller_and_also_comes_while_it_waits(sites):
    site = next(sites.names)
    accept_id = of_our_own(sites, site, parameters="-x")["accept_id"]

    def warned():
        return sites.world.client().ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["warning"]

    assert Peer(sites.world, sites.other_user).code("calc-request", site_id=site) == (200, "0300")     # another user's poller is none of its own
    assert not warned() and not of_our_own(sites, site, parameters="-x")["warning"]
    sites.peer.code("calc-request", site_id=site)
    assert "fielded" in warned() and "not shown" in of_our_own(sites, site, parameters="-x")["warning"]


@pytest.mark.parametrize("more", [{"parameters": "-x"}, {"result_patterns": ["*.dat"]}, {"parameter_files": {"d/e.txt": {"size": 0, "sha256": "0" * 64}}},
                                  {"parameter_files": {"big": {"size": 3 << 30, "sha256": "0" * 64}}}],
                         ids=["parameters", "patterns", "a directory", "more than 2 GiB"])
def test_a_calculation_that_needs_v2_is_not_shown_to_fielded_pollers_and_its_registration_warns(sites, more):
    site = next(sites.names)

    found = of_our_own(sites, site, **more)
    assert not found["warning"]
    if "parameter_files" in more:
        assert sites.world.rows("SELECT needs_v2 FROM calculations WHERE accept_id = ?", found["accept_id"])[0]["needs_v2"]
    assert sites.peer.code("calc-request", site_id=site) == (200, "0300")
    assert sites.peer.code("calc-params", accept_id=found["accept_id"], site_id=site) == (400, "0300")
    assert "fielded" in of_our_own(sites, site, **more)["warning"]    # the last poller was a fielded one
    sites.world.client().claim(site=site)
    assert not of_our_own(sites, site, **more)["warning"]             # now it is one of our own


def test_a_fielded_registration_that_a_fielded_poller_cannot_take_is_told_so(sites):
    site = next(sites.names)
    sites.peer.code("calc-request", site_id=site)
    found = sites.peer.ok("add-calcinfo", **{"calc-info": calc_info(site, files={"d/in.txt": b"x"})})
    assert "fielded" in found["warning"]
    assert "warning" not in sites.peer.ok("add-calcinfo", **{"calc-info": calc_info(site)})


def test_got_return_of_an_abnormal_calculation_is_shown_only_after_abnormal_was_fetched(sites):
    site, accept_id = sites.bring("RUN")
    sites.peer.call("calc-status", accept_id=accept_id)               # "none": then everything happens before the second request
    for name, more in (("calc-end", {"result": "abnormal"}), ("send-results", {"result_files": results(RESULTS)}), ("end-send", {"result": "end send"})):
        sites.peer.ok(name, accept_id=accept_id, site_id=site, **more)
    assert [sites.peer.word("calc-progress", accept_id) for turn in range(2)] == ["getting return"] * 2
    assert sites.peer.word("calc-status", accept_id) == "abnormal"
    assert sites.peer.word("calc-progress", accept_id) == "got return"


def test_end_send_without_the_results_makes_no_empty_success(sites):
    site, accept_id = sites.bring("CE")
    assert sites.peer.ok("end-send", accept_id=accept_id, site_id=site, result="end send")
    assert sites.peer.word("calc-status", accept_id) == "abnormal" and sites.peer.word("calc-progress", accept_id) == "got return"
    reason = sites.world.rows("SELECT reason FROM calculations WHERE accept_id = ?", accept_id)[0]["reason"]
    assert reason and "results" in reason
    found = sites.peer.ok("get-calc-result", accept_id=accept_id)["result-info"]["result_files"]
    assert reason in base64.b64decode(found[LOGS[1]]["content"]).decode()


def test_only_declared_names_are_stored_and_handed_out(sites):
    site, accept_id = sites.bring("CE")
    big = b"secret " * 20000                           # as a long string it goes through the spool
    sites.peer.ok("send-results", accept_id=accept_id, site_id=site, result_files=results({"out.txt": b"r", "secret.txt": b"no", "../../x": b"no", "big": big}))
    sites.peer.ok("end-send", accept_id=accept_id, site_id=site, result="end send")
    row, files, spool = sites.world.picture(accept_id)
    assert [entry["name"] for entry in files if entry["kind"] == "result"] == ["out.txt"]
    assert sum(size for name, size in spool if name.startswith("out")) == 1
    assert set(sites.peer.ok("get-calc-result", accept_id=accept_id)["result-info"]["result_files"]) == {"out.txt"} | set(LOGS)


@pytest.mark.parametrize("name", [name for name, state in CELLS if state == "A"])
@pytest.mark.parametrize("state", ["A", "CE", "GOT"])
def test_another_users_calls_are_answered_as_for_an_unknown_id(sites, name, state):
    site, accept_id = sites.shared(state)
    status, found = request(Peer(sites.world, sites.other_user), name, site, accept_id)
    assert (status, found["code"]) == expected(name, "U", "the same peer") and sites.state(accept_id) == state


@pytest.mark.parametrize("name", REMOTE)
def test_another_sites_calls_are_answered_as_for_an_unknown_id(sites, name):
    site, accept_id = sites.bring({name: state for state, name in LAST.items()}[name])
    status, found = request(sites.peer, name, next(sites.names), accept_id)
    assert (status, found["code"]) == expected(name, "U", "the same peer")


def test_a_token_for_other_sites_only_finds_nothing_here(sites):
    site, accept_id = sites.bring("A")
    peer = Peer(sites.world, sites.world.issue(USER, "--sites", "s499"))
    assert peer.code("calc-request", site_id=site) == (200, "400")
    for name in REMOTE:
        status, found = request(peer, name, site, accept_id)
        assert (status, found["code"]) == expected(name, "U", "the same peer")
    assert sites.state(accept_id) == "A"


def test_the_role_of_a_token_is_checked(sites):
    remote = Peer(sites.world, sites.world.issue(USER, "--roles", "remote"))
    assert remote.code("add-calcinfo", **{"calc-info": calc_info("s1")}) == (403, "0005")
    workflow = Peer(sites.world, sites.world.issue(USER, "--roles", "workflow"))
    assert workflow.code("calc-request", site_id="s1") == (403, "0005")


def test_a_site_that_is_closed_to_the_user_refuses_with_http_202(make_world):
    world = make_world(tls=False, commands=["hello"], ini="[u-test]\nusers = bob\n").start()
    status, found = Peer(world).call("add-calcinfo", **{"calc-info": calc_info(SITE)})
    assert (status, found["code"]) == (202, 403)


@pytest.mark.parametrize("body", [b"", b"{", b"null", b'"text"', b"{'accept_id': 1}", b'{"accept_id": NaN}', b"\xff\xfe",
        b'{"a": 1, "a": 1}', b"<html/>"])
def test_bad_json_is_400_in_the_envelope(sites, body):
    for name in ("add-calcinfo", "allow-wait-calc", "calc-start", "send-results", "end-send", "cancel-wait-calc"):
        status, data, headers = sites.peer.raw("POST", name, body)
        assert status in (400, 202, 200) and "json" in headers["Content-Type"], (name, status, data)
        assert json.loads(data)["errors"][0]["code"] == 400 and (status == 400 or not body), name


def test_there_is_never_html_and_never_a_500_for_what_does_not_exist_either(sites):
    for method, target in (("GET", "no-such-call"), ("POST", "calc-status"), ("GET", "add-calcinfo"), ("GET", ""), ("POST", "../../etc/passwd"),
                           ("GET", "calc-status?accept_id=%FF"), ("GET", "calc-status?accept_id=a&accept_id=b"), ("GET", "calc-request?site_id=" + "x" * 9000)):
        status, data, headers = sites.peer.raw(method, target, b"{}" if method == "POST" else None)
        assert 400 <= status < 500 or status == 200, (target, status)
        assert "errors" in json.loads(data) and "json" in headers["Content-Type"]


def test_a_v2_call_cannot_go_on_with_what_a_fielded_poller_holds(sites):
    site, accept_id = sites.bring("RUN")
    claim = sites.world.rows("SELECT claim FROM calculations WHERE accept_id = ?", accept_id)[0]["claim"]
    status, found = sites.world.client().call("POST", "calc-end", {"v": 2, "accept_id": accept_id, "claim": claim, "result": "calc end", "exit_code": 0})
    assert status == 409 and sites.state(accept_id) == "RUN"


def test_a_fielded_call_cannot_go_on_with_what_a_poller_of_our_own_holds(sites):
    for name in REMOTE:
        site, accept_id = sites.bring("A")
        client = sites.world.client()
        claim = client.claim(site=site)[1]
        state = {name: state for state, name in LAST.items()}[name]
        before = STATES[STATES.index(state) - 1]
        if before in LAST and before != "SP":
            client.walk(accept_id, claim, LAST[before], RESULTS)
        was = sites.state(accept_id)
        status, found = request(sites.peer, name, site, accept_id)
        assert (status, found["code"]) == (200, {"calc-start": 400, "send-results": 401, "end-send": 401}.get(name, 409)) and sites.state(accept_id) == was


# ---- 1.5: what takes time

def test_a_fielded_claim_never_goes_back_and_silence_ends_it_lost_and_never_allowed_ones_go_but_allowed_ones_stay(make_world):
    """Before calc-start after v1_lost_after, after it after lost_after; across a restart of the relay too; 30 minutes as register_for."""
    sites = ("u-test", "s1", "s2", "s3", "s4", "s5")
    world = make_world(tls=False, commands=["hello"], sites=sites,
            ini="[times]\nv1_lost_after = 1.5s\nlost_after = 4s\nregister_for = 2s\naccept_lease = 1s\n").start()
    peer = Peer(world)
    allowed, registered = peer.register("s1"), peer.register("s2", allow=False)
    sending, sent, running, ended = [peer.register(site) for site in ("s3", "s4", "s5", "u-test")]
    began = time.monotonic()
    peer.walk(sending, "calc-params", "s3")
    peer.walk(sent, "calc-params-complete", "s4")
    peer.walk(running, "calc-start", "s5")
    peer.walk(ended, "calc-end")
    wait_until(lambda: world.state_of(sending) == world.state_of(sent) == "got", 8)
    assert 1 < time.monotonic() - began < 3.9 and world.state_of(running) == "running" and world.state_of(ended) == "ended"
    world.relay.stop()
    world.start()
    again = time.monotonic()
    wait_until(lambda: world.state_of(running) == world.state_of(ended) == "got", 12)
    assert time.monotonic() - again > 3                # the relay's own downtime does not count, and leases are full again after it
    for accept_id in (sending, sent, running, ended):
        row, = world.rows("SELECT * FROM calculations WHERE accept_id = ?", accept_id)
        assert row["status"] == "abnormal" and row["reason"].startswith("lost") and row["attempt"] == 1
        assert [peer.word("calc-status", accept_id), peer.word("calc-progress", accept_id)] == ["abnormal", "got return"]
        found = peer.ok("get-calc-result", accept_id=accept_id)["result-info"]["result_files"]
        assert "lost" in base64.b64decode(found[LOGS[1]]["content"]).decode()
    assert world.client().claim(site="s3") is None and peer.code("calc-request", site_id="s3") == (200, "0300")
    wait_until(lambda: world.state_of(registered) is None, 12)
    assert world.state_of(allowed) == "allowed" and peer.code("allow-wait-calc", accept_id=registered) == (400, 400)


def test_never_allowed_registrations_go_after_30_minutes_unless_the_ini_says_otherwise():
    relay = suite.module("mi_dicomapi.py")
    assert relay.INI_KEYS["times"]["register_for"][1] == 1800 and relay.INI_KEYS["times"]["v1_announce"][1] == 12
    assert relay.INI_KEYS["times"]["v1_lost_after"][1] == 3600 and relay.INI_KEYS["times"]["lost_after"][1] == 30 * 86400


def test_the_readme_says_that_one_fielded_poller_runs_per_token_and_site():
    with open(suite.script("README.md"), encoding="utf-8") as text:
        assert re.search(r"[Oo]ne (fielded|v1) poller (per|for each) token and site", text.read())


# ---- every fielded call, and every rule of who may what when: nothing that holds for our own calls is weaker here

GOOD = {"allow-wait-calc": "R", "cancel-wait-calc": "A", "cancel force": "RUN", "calc-status": "RUN", "calc-progress": "RUN", "get-calc-result": "GOT",
        "calc-request": "A", "calc-params": "A", "calc-params-complete": "SP", "calc-start": "CS", "calc-end": "RUN", "send-results": "CE", "end-send": "GR"}
OPERATORS = ("get-calcinfo", "reload-ini")
NO_TOKEN = {name: (403, "0005") for name in list(GOOD) + ["add-calcinfo"] + list(OPERATORS)}
UNKNOWN = {name: expected(name, "U", "the same peer") for name in GOOD if name != "calc-request"}
RULES = {                      # who asks, or when: what each call is answered; the rest as if there were no rule
    "no token": NO_TOKEN, "a made-up token": NO_TOKEN, "an expired token": NO_TOKEN, "a revoked token": NO_TOKEN,
    "another user": dict(UNKNOWN, **{"calc-request": (200, "0300")}),
    "a token for other sites": dict(UNKNOWN, **{"calc-request": (200, "400"), "add-calcinfo": (202, "400")}),
    "a token for the other role": {name: (403, "0005") for name in list(GOOD) + ["add-calcinfo"]},
    "a site for other users": {"add-calcinfo": (202, 403)},
    "maintenance": {"add-calcinfo": (202, 503), "calc-request": (200, "0300"), "calc-params": WRONG},
    "restored a moment ago": {"calc-request": (200, "0300"), "calc-params": WRONG},
}


@pytest.fixture(scope="module")
def ruled(tmp_path_factory):
    """A relay whose site s0 is open to bob only."""
    made = Sites(tmp_path_factory.mktemp("ruled"), "[s0]\nusers = bob\n[times]\nrestore_grace = 600s\n")
    next(made.names)
    yield made
    made.world.close()


def askers(ruled, rule, name):
    """Who asks under a rule."""
    world, remote = ruled.world, name in REMOTE + ("calc-request",)
    if rule == "a revoked token":
        token = world.issue(USER)
        number = world.rows("SELECT MAX(number) AS number FROM tokens")[0]["number"]
        assert suite.run("mi_dicomapi.py", "token", "revoke", str(number), "--ini", world.ini).returncode == 0
        wait_until(lambda: Peer(world, token).code("calc-request", site_id="s1") == (403, "0005"), 5)
        return token
    return {"no token": lambda: "", "a made-up token": lambda: "0" * 64, "an expired token": lambda: world.expired(USER, 1),
            "another user": lambda: ruled.other_user, "a token for other sites": lambda: world.issue(USER, "--sites", "s499"),
            "a token for the other role": lambda: world.issue(USER, "--roles", "workflow" if remote else "remote")}.get(rule, lambda: world.token)()


def pause(world, rule, on):
    """Brings the relay into, or out of, what the rule is about."""
    if rule == "maintenance":
        assert suite.run("mi_dicomapi.py", "maintenance", "on" if on else "off", "--ini", world.ini).returncode == 0
        wait_until(lambda: re.findall("maintenance reason=(\\S+)", world.relay.text())[-1:] == ["-" if on else "off"], 5)
    if rule == "restored a moment ago":
        world.relay.stop()
        if on:
            open(world.state + "/restored", "w").close()
        else:
            os.unlink(world.state + "/restored")
        world.start()


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_holds_for_every_fielded_call(ruled, rule):
    assert {name.replace("cancel force", "cancel-wait-calc") for name in GOOD} | {"add-calcinfo"} | set(OPERATORS) == set(relay.V1)
    brought = {name: ruled.bring(state) for name, state in GOOD.items()}
    pause(ruled.world, rule, True)
    tokens = {remote: askers(ruled, rule, name) for remote, name in ((True, "calc-params"), (False, "add-calcinfo"))}
    for name, (site, accept_id) in brought.items():
        peer, before = Peer(ruled.world, tokens[name in REMOTE + ("calc-request",)]), ruled.world.picture(accept_id)
        status, found = request(peer, name, site, accept_id)
        wanted = RULES[rule].get(name, (200, 200))
        assert (status, found["code"]) == wanted, (rule, name, found)
        if wanted != (200, 200):
            assert ruled.world.picture(accept_id) == before, (rule, name)
    site = "s0" if rule == "a site for other users" else next(ruled.names)
    many = ruled.world.rows("SELECT COUNT(*) AS n FROM calculations")
    status, found = Peer(ruled.world, tokens[False]).call("add-calcinfo", **{"calc-info": calc_info(site)})
    assert (status, found["code"]) == RULES[rule].get("add-calcinfo", (200, 200)), (rule, found)
    assert (status, found["code"]) == (200, 200) or ruled.world.rows("SELECT COUNT(*) AS n FROM calculations") == many
    for name in OPERATORS:
        assert Peer(ruled.world, tokens[False]).code(name) == (403, "0005")
    pause(ruled.world, rule, False)


def test_an_operator_of_some_sites_sees_those_only(ruled):
    site, accept_id = ruled.bring("RUN")
    other = ruled.bring("RUN")[1]
    token = ruled.world.issue("boss", "--roles", "operator", "--sites", site)
    assert set(Peer(ruled.world, token).parsed("get-calcinfo", {})[1]) == {accept_id}
    assert set(ruled.world.client(token).ok("GET", "get-calcinfo", {"v": 2})["calculations"]) == {accept_id}
    assert other in Peer(ruled.world, ruled.world.issue("chief", "--roles", "operator")).parsed("get-calcinfo", {})[1]


def test_a_fielded_registration_says_nothing_that_is_the_relays_to_say(sites):
    """`rerun` is a person's word: with it, a poller would run again what it has run."""
    site = next(sites.names)
    accept_id = sites.peer.ok("add-calcinfo", **{"calc-info": dict(calc_info(site), rerun=7, result_patterns=["**"], note="kept")})["accept_id"]
    sites.peer.ok("allow-wait-calc", accept_id=accept_id)
    found = sites.world.client().ok("POST", "calc-request", {"v": 2, "site_id": site, "poller": "p", "take": "take-it-" + site, "wait": 0})
    assert found["accept_id"] == accept_id and found["calc-info"]["note"] == "kept"
    assert "rerun" not in found["calc-info"] and found["calc-info"]["result_patterns"] == []
