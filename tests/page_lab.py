"""A browser, a relay full of calculations, and what is asked of the page: for test_page.py and bench/page.py."""
import contextlib
import json
import os
import shutil
import sqlite3
import time
import uuid

from playwright.sync_api import sync_playwright

import suite

relay = suite.module("mi_dicomapi.py")
STATES = [relay.REGISTERED, relay.ALLOWED, relay.ALLOWED, relay.SENDING, relay.SENT, relay.RUNNING, relay.RUNNING, relay.ENDED, relay.GETTING,
          relay.GOT, relay.GOT, relay.FINISHED, relay.FINISHED, relay.FINISHED]
STEPS = ["add-calcinfo", "allow-wait-calc", "calc-request", "calc-params-complete", "calc-start", "calc-end", "send-results", "end-send", "finish"]


@contextlib.contextmanager
def browser():
    """A Chromium without a window: the distribution's, which Playwright drives."""
    suite.needs("chromium")
    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield made
        finally:
            made.close()


def link(world, *words):
    """What page-link prints."""
    done = suite.run("mi_dicomapi.py", "page-link", "--ini", world.ini, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Looker:
    """A page of a browser, with what went wrong on it and what it asked for."""

    def __init__(self, made, lang="en", **more):
        self.context = made.new_context(locale={"en": "en-GB", "ja": "ja-JP"}[lang], ignore_https_errors=True, **more)
        self.page = self.context.new_page()
        self.wrong, self.asked = [], []
        self.page.on("console", lambda told: self.wrong.append(told.text) if told.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda asked: self.asked.append(asked.url))
        self.page.on("dialog", lambda dialog: (self.wrong.append("dialog " + dialog.message), dialog.dismiss()))
        self.page.add_init_script("window.violations = []; document.addEventListener('securitypolicyviolation', (e) => window.violations.push("
                                  "e.violatedDirective + ' ' + e.blockedURI));")

    def open(self, url, waits="#sites tbody tr"):
        self.page.goto(url)
        self.page.wait_for_selector(waits)
        return self.page

    def go(self, view, waits):
        self.page.evaluate("to => { location.hash = to; }", view)
        self.page.wait_for_selector(waits)
        return self.page

    def close(self):
        found = self.page.evaluate("window.violations")
        self.context.close()
        assert not found, found


def fill(world, calculations, sites, user=suite.USER, texts=("hello",), begun=None):
    """Puts calculations into the state of a relay that does not run: in every state, spread over the sites and the last day."""
    world.issue("filler")                              # makes the database
    db, now, made = sqlite3.connect(os.path.join(world.state, "state.sqlite3")), begun or time.time(), []
    for seq in range(1, calculations + 1):
        state, site = STATES[seq % len(STATES)], sites[seq * 7 % len(sites)]
        step = list(relay.WORDS).index(state)
        bad = state in (relay.GOT, relay.FINISHED) and seq % 5 == 0
        ends = now - (calculations - seq) * 86000.0 / calculations
        times = [ends - 5.0 * (step - n) ** 2 for n in range(step + 1)]
        accept_id = str(uuid.UUID(int=(seq * 0x9e3779b97f4a7c15f39cc0605cedc834) % (1 << 128)))
        made.append(accept_id)
        db.execute("INSERT INTO past VALUES (?, ?, ?, ?, ?, ?)", (seq, accept_id, user, site, texts[seq % len(texts)], times[0]))
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, '')", [(seq, n > 1, name, at) for n, (name, at) in enumerate(zip(STEPS, times))])
        db.execute("INSERT INTO calculations (seq, accept_id, user, request_id, site, command, info, needs_v2, state, status, reason, attempt,"
                   " protocol, claim, poller, registered, touched, allowed, started, ended, exit_code) VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?, ?, 2,"
                   " ?, ?, ?, ?, ?, ?, ?, ?)",
                   (seq, accept_id, user, "r%d" % seq, site, texts[seq % len(texts)],
                    json.dumps({"parameters": "12 fine", "result_names": [], "result_patterns": [], "extra": {}}), state,
                    "abnormal" if bad else "completed" if step >= 7 else "none", "exit code 3" if bad else "", int(step > 1),
                    "1.%032x" % seq if step > 1 else None, "p" if step > 1 else None, times[0], times[-1], times[min(1, step)] if step else None,
                    times[4] if step > 3 else None, times[5] if step > 4 else None, (3 if bad else 0) if step > 4 else None))
    db.commit()
    db.close()
    return made


def pollers(world, sites, states=("open", "busy", "paused", "hours", "disk"), user=suite.USER, version="1.0"):
    """Pollers that tell how they stand, one for each site, by one call each."""
    client = world.client(world.issue(user))
    for number, site in enumerate(sites):
        told = {"state": states[number % len(states)], "jobs": 4, "busy": number % 5, "outbox": int(number % 9 == 4), "free": 10 ** 11, "version": version}
        told.update({"oldest": int(time.time()) - 4000} if told["outbox"] else {}, **({"until": int(time.time()) + 7200} if told["state"] == "hours" else {}))
        client.ok("POST", "heartbeat", {"v": 2, "site_id": site, "poller": "p", "wait": 0, "calcs": {}, "presence": told})
