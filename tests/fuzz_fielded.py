#!/usr/bin/env python3
"""Random valid and near-valid fielded ("v1") calls against our relay: never a 500, never HTML, never a stuck state.

usage: fuzz_fielded.py [SECONDS=60] [SEED]      prints the seed, the counts, and what was wrong; exit code 1 if something was"""
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from urllib.parse import quote

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import suite
from fielded_peer import GETS, Peer, b64, calc_info, results

SITES = ["s%d" % number for number in range(6)]
STEPS = ("calc-params", "calc-params-complete", "calc-start", "calc-end", "send-results", "end-send")
NAMES = ("add-calcinfo", "allow-wait-calc", "cancel-wait-calc", "calc-status", "calc-progress", "get-calc-result", "calc-request") + STEPS
ORDER = ("allow-wait-calc",) + STEPS + ("calc-status", "get-calc-result")
NEXT = {"not start": "calc-params", "sending params": "calc-params-complete", "complete send": "calc-start", "running": "calc-end",
        "calc end": "send-results", "getting return": "end-send"}
ODD = [None, 0, -1, 1e308, True, [], {}, [[]], "", " ", "x" * 300, "\x00", "\ud800", "日本", "../../etc/passwd",
        "00000000-0000-0000-0000-000000000000", "A" * 70000]
ODD_NAMES = ["a", "b.dat", "日本.txt", "d/e.txt", "../x", "/abs", "", ".", "a\\b", "x" * 300, "計算標準出力.txt", "a\n", "é", "e\u0301"]
ODD_CONTENTS = [b64(b"good"), "", "!", "AAA", "A=AA", None, 5, [], b64(b"y" * 60000), b64(b"z" * 100000), "A" * 99999, "AAAA\n", "\u00e9"]


class Fuzz:
    """One relay, some callers in threads, what they have found wrong."""

    def __init__(self, folder, seed, seconds):
        self.seed, self.until, self.wrong, self.counts, self.good, self.ids = seed, time.monotonic() + seconds, [], {}, {}, []
        self.world = suite.World(os.path.join(folder, "world"), tls=False, commands=["hello"], sites=SITES,
                                 ini="[times]\nv1_announce = 1s\n[limits]\nunauthenticated_per_address = 1000\ncalculations_per_user = 0\n").start()
        self.most = max(100, int(20 * seconds))        # calculations that are led out
        self.tokens = [self.world.token, self.world.issue(suite.USER), self.world.issue("mallory"), self.world.issue(suite.USER, "--sites", "s0"), "0" * 64, ""]

    def peer(self, rng):
        """A caller; mostly a good one."""
        return Peer(self.world, self.tokens[0] if rng.random() < 0.85 else rng.choice(self.tokens), rng.choice(["127.0.0.1", "127.0.0.1", "127.0.0.2"]))

    def bad(self, text):
        self.wrong.append(text[:2000])

    def look(self, what, status, data, headers):
        """Is this an answer in order?"""
        key = what.split(" ")[0]
        self.counts[key] = self.counts.get(key, 0) + 1
        if status >= 500 and status != 507:
            return self.bad("%s: HTTP %d %r" % (what, status, data[:300]))
        if "json" not in headers.get("Content-Type", "") or headers.get("Content-Length") != str(len(data)):
            return self.bad("%s: %s %r" % (what, dict(headers), data[:300]))
        try:
            found = json.loads(data.decode("utf-8"))
        except ValueError:
            return self.bad("%s: not JSON: %r" % (what, data[:300]))
        if key == "calc-params" and set(found) == {"calc-info"}:
            self.good[key] = self.good.get(key, 0) + 1
            return found
        if not isinstance(found, dict) or list(found) != ["errors"] or len(found["errors"]) != 1 or not {"code", "message"} <= set(found["errors"][0]):
            return self.bad("%s: not in the envelope: %r" % (what, data[:300]))
        first = found["errors"][0]
        if first["code"] not in (200, 400, 401, 402, 403, 404, 405, 409, 411, 413, 429, 431, 507, "0300", "400", "0005"):
            self.bad("%s: code %r" % (what, first["code"]))
        if first["code"] == 200:
            self.good[key] = self.good.get(key, 0) + 1
        if first["code"] == 200 and key == "add-calcinfo":
            self.ids.append(first["accept_id"])
        return first

    # -- one call

    def fields(self, rng, name, accept_id):
        """Mostly what the call needs."""
        found = {}
        if name == "add-calcinfo":
            files = {rng.choice(ODD_NAMES[:3]): os.urandom(rng.choice([0, 1, 100, 60000])) for turn in range(rng.randrange(3))}
            return {"calc-info": calc_info(rng.choice(SITES), files=files, names=("out.txt",) if rng.random() < 0.9 else (rng.choice(ODD_NAMES),),
                                           **({"extra": rng.choice(ODD)} if rng.random() < 0.2 else {}))}
        if name != "calc-request":
            found["accept_id"] = accept_id if accept_id and rng.random() < 0.97 else rng.choice(ODD[8:])
        if name == "calc-request" or name in STEPS:
            row = self.world_site(found.get("accept_id")) if rng.random() < 0.9 else None
            found["site_id"] = row or rng.choice(SITES)
        if name == "calc-end":
            found["result"] = rng.choice(["calc end", "calc end", "calc end", "abnormal", "done", None])
        if name == "end-send":
            found["result"] = "end send" if rng.random() < 0.9 else rng.choice(ODD)
        if name == "send-results":
            found["result_files"] = results({"out.txt": os.urandom(rng.choice([0, 10, 60000])), rng.choice(suite.LOGS): b"log"})
        if name == "cancel-wait-calc" and rng.random() < 0.3:
            found["delete"] = rng.choice(["force", "force", "no", 1])
        return found

    def world_site(self, accept_id):
        """The site of a calculation, remembered."""
        return self.sites.get(accept_id)

    def spoil(self, rng, fields):
        """Makes the fields near-valid."""
        found = json.loads(json.dumps(fields))
        for turn in range(rng.randrange(1, 3)):
            spot = found
            while isinstance(spot, dict) and spot and rng.random() < 0.6:
                key = rng.choice(sorted(spot))
                if not isinstance(spot[key], dict) or not spot[key]:
                    break
                spot = spot[key]
            if not isinstance(spot, dict) or not spot:
                continue
            key = rng.choice(sorted(spot))
            deed = rng.randrange(5)
            if deed == 0:
                del spot[key]
            elif deed == 1:
                spot[key] = rng.choice(ODD)
            elif deed == 2:
                spot[rng.choice(ODD_NAMES)] = spot[key]
            elif deed == 3:
                spot[key] = [rng.choice(ODD_CONTENTS), "text/plain;", "charset=us-ascii"]
            else:
                spot[key] = {"content": rng.choice(ODD_CONTENTS), "mimetype1": rng.choice(["a", "Error", None]), "mimetype2": rng.choice(["b",
                        None, "A" * 70000])}
        return found

    def one(self, rng):
        """One random call."""
        peer, kind, accept_id = self.peer(rng), rng.random(), rng.choice(self.ids[-12:]) if self.ids else ""
        name = rng.choice(NAMES) if kind < 0.3 else "add-calcinfo" if kind < 0.4 or not accept_id else ORDER[min(self.stage.get(accept_id, 0), len(ORDER) - 1)]
        fields, what = self.fields(rng, name, accept_id), name
        if rng.random() < 0.25:
            fields, what = self.spoil(rng, fields), name + " spoiled"
        if rng.random() < 0.03:
            return self.rough(rng, name, fields)
        method, target, body = "POST", name, json.dumps(fields).encode()
        if name in GETS:
            method, body = "GET", json.dumps(fields).encode() if name == "get-calc-result" and rng.random() < 0.8 else None
            if body is None or rng.random() < 0.5:
                target += "?" + "&".join("%s=%s" % (quote(key), quote(str(value).encode("utf-8", "replace"))[:5000]) for key, value in fields.items())
        if rng.random() < 0.05 and body:
            at = rng.randrange(len(body))
            body, what = body[:at] + rng.choice([b"", b'"', b"\\", b"\xff", b"{", b"NaN"]) + body[at + rng.randrange(3):], name + " damaged"
        if rng.random() < 0.02:
            method, what = "GET" if method == "POST" else "POST", name + " otherwise"
        first = self.look("%s %s" % (what, body and body[:200] or target), *peer.raw(method, target, body))
        if isinstance(first, dict) and (first.get("code") == 200 or "calc-info" in first) and name in ORDER:
            self.stage[fields.get("accept_id")] = ORDER.index(name) + 1
        if isinstance(first, dict) and name == "add-calcinfo" and first.get("code") == 200:
            try:
                self.sites[first["accept_id"]] = fields["calc-info"]["remote-site"]
            except (KeyError, TypeError):
                pass
            if rng.random() < 0.5:
                self.look("allow-wait-calc", *Peer(self.world).raw("POST", "allow-wait-calc", json.dumps({"accept_id": first["accept_id"]}).encode()))

    def rough(self, rng, name, fields):
        """A connection that breaks, or a long body."""
        body = json.dumps(fields).encode()
        if rng.random() < 0.3:
            body = body[:-1] + b', "more": "' + b"A" * (5 << 20) + b'"}'
        head = "POST /mi-distcomp-api/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n" % (name, self.world.token, len(body))
        with socket.create_connection(("127.0.0.1", self.world.port), 20) as sock:
            try:
                sock.sendall((head.encode() + body)[:rng.randrange(len(head) + len(body))])
                if rng.random() < 0.3:
                    sock.shutdown(socket.SHUT_WR)
                    sock.recv(100)
            except OSError:
                pass
        self.counts["broken"] = self.counts.get("broken", 0) + 1

    # -- whole runs

    def caller(self, number):
        """A thread."""
        rng = random.Random("%s %d" % (self.seed, number))
        while self.more() and len(self.wrong) < 20:
            try:
                self.one(rng)
            except Exception as error:                 # no answer at all is wrong too
                self.bad("caller %d: %s" % (number, repr(error)[:300]))

    def more(self):
        """Until its time is over; on a busy machine some longer, until each call has had a success."""
        return time.monotonic() < self.until + (0 if all(name in self.good for name in NAMES) else 30)

    def run(self, threads=4):
        """The calls, then the way out for every calculation that is left. The wrongs."""
        self.sites, self.stage = {}, {}
        callers = [threading.Thread(target=self.caller, args=(number,)) for number in range(threads)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        self.lead_out()
        text = self.world.relay.text()
        if "bug=" in text or "Traceback" in text or not self.world.relay.alive():
            self.bad("the relay's log: " + "\n".join(line for line in text.split("\n") if "bug=" in line or "Traceback" in line)[:1500])
        arriving = os.path.join(self.world.state, "spool", "arriving")
        if os.path.isdir(arriving) and os.listdir(arriving):
            self.bad("left in the spool: %r" % os.listdir(arriving))
        return self.wrong

    def lead_out(self):
        """No state is stuck: good callers bring every calculation to its end, from wherever it is."""
        rows = self.world.rows("SELECT accept_id, site, user, state, needs_v2, hidden FROM calculations WHERE state != 'finished' AND NOT hidden")
        self.counts["led out"] = len(rows)
        peers = {suite.USER: Peer(self.world), "mallory": Peer(self.world, self.tokens[2])}
        todo = random.Random(self.seed).sample(rows, min(len(rows), self.most))

        def helper():
            while todo:
                try:
                    row = todo.pop()
                except IndexError:
                    return
                try:
                    self.lead(row, peers[row["user"]])
                except Exception as error:
                    self.bad("leading out %s: %r" % (row, error))

        helpers = [threading.Thread(target=helper) for turn in range(8)]
        for one in helpers:
            one.start()
        for one in helpers:
            one.join()

    def lead(self, row, peer):
        """Brings one calculation to its end."""
        accept_id = row["accept_id"]
        if row["state"] == "registered":
            peer.ok("allow-wait-calc", accept_id=accept_id)
        if row["needs_v2"]:
            return peer.ok("cancel-wait-calc", accept_id=accept_id)
        for turn in range(10):
            peer.call("calc-status", accept_id=accept_id)
            word = peer.word("calc-progress", accept_id)
            if word == "got return":
                break
            more = {"calc-end": {"result": "calc end"}, "end-send": {"result": "end send"}, "send-results": {"result_files": results({"out.txt": b"x"})}}
            status, first = peer.call(NEXT[word], accept_id=accept_id, site_id=row["site"], **more.get(NEXT[word], {}))
            if first["code"] == 409 and word == "not start":
                time.sleep(1.1)                        # announced to another one
        else:
            return self.bad("stuck: %s in %s: %s" % (accept_id, word, first))
        status, first = peer.call("get-calc-result", accept_id=accept_id)
        if first["code"] != 200:
            self.bad("no result of %s: %s" % (accept_id, first))


def run(folder, seconds, seed):
    """(what was wrong, the calls, those that were answered with 200)."""
    fuzz = Fuzz(folder, seed, seconds)
    try:
        return fuzz.run(), fuzz.counts, fuzz.good
    finally:
        fuzz.world.relay.stop()


def main(words):
    seconds = float(words[0]) if words else 60.0
    seed = words[1] if len(words) > 1 else os.urandom(4).hex()
    folder = tempfile.mkdtemp(prefix="mi-fuzz-")
    print("seed %s" % seed, flush=True)
    try:
        wrong, counts, good = run(folder, seconds, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("%d calls: %s\nwith success: %s" % (sum(counts.values()), counts, good))
    print("\n".join(wrong) or "nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
