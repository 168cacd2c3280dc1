"""Any order of calls, repeated, with old claims, with the relay killed in between: a model of the promises against the real relay.
Each calculation is in the state that the model says, is handed out once for each attempt, comes to one end, and its bytes are those sent."""
import itertools
import os

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import suite
from suite import entry

relay = suite.module("mi_dicomapi.py")
REG, ALL, SENDING, SENT, RUN, ENDED, GETTING, GOT, FIN = (relay.REGISTERED, relay.ALLOWED, relay.SENDING, relay.SENT, relay.RUNNING, relay.ENDED,
                                                          relay.GETTING, relay.GOT, relay.FINISHED)
SITES = 3000
HOLDING = (SENDING, SENT, RUN, ENDED, GETTING, GOT)    # states in which a claim is in force, or its last call may be repeated


class Calc:
    """What the model knows of a calculation."""

    def __init__(self, accept_id, request_id, data):
        self.accept_id, self.request_id, self.data, self.have = accept_id, request_id, data, 0
        self.state, self.attempt, self.claim, self.take, self.old, self.cancel = REG, 0, None, None, [], False
        self.status, self.reason, self.result, self.arrived, self.started, self.cut_short = "none", "", b"", False, [], False


class Machine(RuleBasedStateMachine):
    world, numbers = None, itertools.count()

    def __init__(self):
        RuleBasedStateMachine.__init__(self)
        self.number = next(self.numbers)
        self.site, self.client, self.calcs, self.kills, self.many = "s%d" % (self.number % SITES), self.world.client(), [], 0, 0

    def call(self, good, method, name, **fields):
        """One call that is answered with 200 if good, and with 409 otherwise; errors[0]."""
        status, first = self.client.call(method, name, dict(fields, v=2))
        assert (first["code"] == 200) == bool(good), (name, fields, first, [vars(calc) for calc in self.calcs])
        assert good or first["code"] == 409, first
        return first

    def one(self, which, states=None):
        """One of the calculations (in one of these states), or None."""
        found = [calc for calc in self.calcs if states is None or calc.state in states]
        return found[which % len(found)] if found else None

    # -- the workflow side

    @precondition(lambda self: len(self.calcs) < 5)
    @rule(size=st.sampled_from([0, 1, 3000]))
    def register(self, size):
        self.many += 1
        request_id, data = "m%d-%d" % (self.number, self.many), os.urandom(size)
        info = {"command": "hello", "remote-site": self.site, "parameters": "", "parameter_files": {"in": entry(data)}, "result_files": {"out": {}}}
        ids = {self.call(True, "POST", "add-calcinfo", **{"request_id": request_id, "calc-info": info})["accept_id"] for turn in range(2)}
        assert len(ids) == 1
        self.calcs.append(Calc(ids.pop(), request_id, data))

    @rule(which=st.integers(0, 9), half=st.booleans())
    def upload(self, which, half):
        calc = self.one(which, (REG,))
        if calc and (calc.have < len(calc.data) or not calc.data):
            piece = calc.data[calc.have:len(calc.data) // 2 if half and calc.have == 0 else None]
            status, first = self.client.call("POST", "files/%s/input/0?v=2&offset=%d" % (calc.accept_id, calc.have), body=piece)
            assert first["code"] == 200, first
            calc.have += len(piece)

    @rule(which=st.integers(0, 9))
    def allow(self, which):
        calc = self.one(which, (REG, ALL, SENDING))
        if calc:
            whole = calc.have == len(calc.data) and self.complete(calc)
            self.call(calc.state != REG or whole, "POST", "allow-wait-calc", accept_id=calc.accept_id)
            calc.state = ALL if calc.state == REG and whole else calc.state

    def complete(self, calc):
        """Has the relay all inputs? An empty file, too, is there only when it was sent."""
        return bool(calc.data) or self.world.rows("SELECT inputs_open FROM calculations WHERE accept_id = ?", calc.accept_id)[0]["inputs_open"] == 0

    @rule(which=st.integers(0, 9))
    def cancel(self, which):
        calc = self.one(which)
        if calc:
            self.call(calc.state in (REG, ALL, SENDING, SENT, RUN) or calc.reason.startswith("cancelled"), "POST", "cancel-wait-calc",
                      accept_id=calc.accept_id, stop=True, reason="enough")
            if calc.state in (REG, ALL):
                calc.cut_short = calc.cut_short or calc.state == REG
                calc.state, calc.status, calc.reason = GOT, "abnormal", "cancelled: enough"
            calc.cancel = calc.cancel or calc.state in (SENDING, SENT, RUN)

    @rule(which=st.integers(0, 9))
    def rerun(self, which):
        calc = self.one(which)
        if calc and not calc.cut_short:
            again = calc.state == GOT and calc.status == "abnormal"
            self.call(again or calc.state == ALL and calc.attempt, "POST", "rerun", accept_id=calc.accept_id, reason="once more")
            if again:
                calc.old += [calc.claim] if calc.claim else []
                calc.state, calc.status, calc.reason, calc.claim, calc.take, calc.cancel, calc.arrived = ALL, "none", "", None, None, False, False

    @rule(which=st.integers(0, 9))
    def fetch(self, which):
        calc = self.one(which, (ENDED, GETTING, GOT, FIN))
        if calc:
            done = calc.state in (GOT, FIN)
            info = self.call(done, "GET", "get-calc-result", accept_id=calc.accept_id).get("result-info")
            if done and "out" in info["result_files"]:
                assert self.client.raw("GET", "files/%s/result/0?v=2" % calc.accept_id)[1] == calc.result
            self.call(done, "POST", "finish", accept_id=calc.accept_id)
            calc.state = FIN if done else calc.state

    # -- the pollers

    @rule(poller=st.sampled_from(["one", "two"]), twice=st.booleans())
    def claim(self, poller, twice):
        due, take = next((calc for calc in self.calcs if calc.state == ALL), None), os.urandom(8).hex()
        for turn in range(1 + twice):                  # the answer was lost
            status, first = self.client.call("POST", "calc-request", {"v": 2, "site_id": self.site, "poller": poller, "take": take, "wait": 0})
            assert first["code"] == (200 if due else "0300"), first
            if due and turn == 0:
                assert first["accept_id"] == due.accept_id and first["claim"] not in due.old + [calc.claim for calc in self.calcs]
                due.state, due.claim, due.take, due.attempt = SENDING, first["claim"], take, due.attempt + 1
                assert self.client.raw("GET", "files/%s/input/0?v=2&claim=%s" % (due.accept_id, due.claim))[1] == due.data
            elif due:
                assert (first["accept_id"], first["claim"]) == (due.accept_id, due.claim)

    @rule(which=st.integers(0, 9), name=st.sampled_from(["calc-params-complete", "calc-start", "calc-end", "abnormal", "send-results", "send-file", "end-send"]),
          old=st.integers(0, 7), turns=st.integers(1, 2))
    def step(self, which, name, old, turns):
        calc = self.one(which, HOLDING)
        if calc is None or not calc.claim:
            return
        fields = {"accept_id": calc.accept_id, "claim": calc.claim}
        if old == 0:                                   # somebody else, or the attempt of before: nothing may change
            fields["claim"] = calc.old[-1] if calc.old else "1.%032x" % 7
            if name in ("calc-params-complete", "calc-start"):
                self.call(False, "POST", name, **fields)
            return
        for turn in range(turns):
            getattr(self, name.replace("-", "_"))(calc, fields)

    def plain(self, calc, fields, name, frm, to):
        good = calc.state in (frm, to)
        self.call(good, "POST", name, **fields)
        if calc.state == frm:
            calc.state = to
            return True

    def calc_params_complete(self, calc, fields):
        self.plain(calc, fields, "calc-params-complete", SENDING, SENT)

    def calc_start(self, calc, fields):
        if self.plain(calc, fields, "calc-start", SENT, RUN):
            assert calc.claim not in calc.started      # once for each attempt
            calc.started.append(calc.claim)

    def calc_end(self, calc, fields, word="calc end", frm=(RUN,)):
        reason = "cancelled" if calc.cancel else ""
        good = word == "calc end" and not calc.cancel
        self.call(calc.state in frm + (ENDED,), "POST", "calc-end", result="calc end" if good else "abnormal" if word == "abnormal" or calc.state == RUN else word,
                  exit_code=0 if good else 3, reason=reason, **fields)
        if calc.state in frm:
            calc.state, calc.status = ENDED, "completed" if good else "abnormal"
            calc.reason = "cancelled: enough" if calc.cancel else "" if good else "exit code 3"

    def abnormal(self, calc, fields):
        self.calc_end(calc, fields, "abnormal", (SENDING, SENT, RUN))

    def send_results(self, calc, fields):
        good, data = calc.state in (ENDED, GETTING), os.urandom(2000) if calc.state == ENDED else calc.result
        self.call(good, "POST", "send-results", result_files={"out": entry(data)}, **fields)
        if calc.state == ENDED:
            calc.state, calc.result, calc.arrived = GETTING, data, False

    def send_file(self, calc, fields):
        status, first = self.client.call("POST", "files/%s/result/0?v=2&offset=0&claim=%s" % (calc.accept_id, calc.claim), body=calc.result)
        if calc.state == GETTING and not calc.arrived:
            assert first["code"] == 200, first
            calc.arrived = True

    def end_send(self, calc, fields):
        self.call(calc.state == GOT or calc.state == GETTING and calc.arrived, "POST", "end-send", result="end send", **fields)
        calc.state = GOT if calc.state == GETTING and calc.arrived else calc.state

    # -- and what befalls the relay

    @precondition(lambda self: self.kills < 2 and self.calcs)
    @rule()
    def kill_the_relay(self):
        self.kills += 1
        self.world.relay.kill()
        self.world.start()
        self.client = self.world.client()

    @invariant()
    def it_is_as_the_model_says(self):
        for calc in self.calcs:
            row, = self.world.rows("SELECT state, status, attempt, reason, claim FROM calculations WHERE accept_id = ?", calc.accept_id)
            assert (row["state"], row["status"], row["attempt"], row["reason"]) == (calc.state, calc.status, calc.attempt, calc.reason), (row, vars(calc))

    def teardown(self):
        """Everything can be brought to its end, whatever came before."""
        for calc in self.calcs:
            fields = {"accept_id": calc.accept_id, "claim": calc.claim}
            if calc.state in (REG, ALL):
                self.call(True, "POST", "cancel-wait-calc", accept_id=calc.accept_id, stop=True, reason="enough")
                calc.state = GOT
            if calc.state in (SENDING, SENT, RUN):
                self.abnormal(calc, fields)
            if calc.state == ENDED:
                self.send_results(calc, fields)
            if calc.state == GETTING:
                self.send_file(calc, fields)
                self.end_send(calc, fields)
            self.call(True, "POST", "finish", accept_id=calc.accept_id)


def test_any_order_of_calls_keeps_the_promises(request, make_world):
    long = request.config.getoption("--long")
    names = ["s%d" % number for number in range(SITES)]
    Machine.world = make_world(tls=False, commands=["hello"], sites=names, ini="[times]\naccept_lease = 1h\nlease = 1h\n[limits]\ncalculations_per_user = 1000000\n").start()
    run_state_machine_as_test(Machine, settings=hypothesis.settings(
        max_examples=400 if long else 30, stateful_step_count=50 if long else 40, deadline=None, derandomize=not long, database=None,
        suppress_health_check=list(hypothesis.HealthCheck)))
