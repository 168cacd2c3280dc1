"""The page: what a browser shows of the relay, to whom, in which words; and that nothing that it shows can do anything."""
import base64
import gzip
import hashlib
import json
import os
import re
import sqlite3
import time

import pytest
from axe_playwright_python.sync_playwright import Axe

import page_lab
import suite
from page_lab import Looker, link, relay
from suite import SITE, USER, wait_until

BAD = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;\u202eevil\u2066\x1b[2J\x07\u200b" + "x" * 10000
STEERS = re.compile(relay.CONTROL_CHARS.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
VIEWS = (("#/sites", "#sites tbody tr"), ("#/calculations?show=all", "#calcs tbody tr"))


@pytest.fixture(scope="module")
def browser():
    with page_lab.browser() as made:
        yield made


class Full:
    """A relay with TLS and 200 calculations in all states at three sites, a fourth without any."""

    def __init__(self, folder):
        self.sites = ["u-tokyo", "u-kyoto", SITE, "u-empty"]
        self.world = suite.World(folder, commands=["hello", "hold"], sites=self.sites)
        self.ids = page_lab.fill(self.world, 200, self.sites[:3], texts=("hello", "hold"))
        self.world.start()
        page_lab.pollers(self.world, self.sites[:3])

    def of(self, state, bad=False):
        """The newest calculation in this state."""
        return [accept_id for seq, accept_id in enumerate(self.ids, 1) if page_lab.STATES[seq % len(page_lab.STATES)] == state and (seq % 5 == 0) == bad][-1]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    made = Full(tmp_path_factory.mktemp("page"))
    yield made
    made.world.close()


@pytest.fixture
def look(browser):
    """A function that opens a world's page with a new link (words: those of page-link) and says what is seen."""
    opened = []

    def open_page(world, *words, lang="en", waits="#sites tbody tr", **more):
        looker = Looker(browser, lang, **more)
        opened.append(looker)
        looker.open(link(world, *words), waits)
        return looker

    yield open_page
    for looker in opened:
        looker.close()


def becomes(page, true):
    """Waits until an expression holds on the page (by the debugger's way: the page itself may run nothing but its script)."""
    wait_until(lambda: page.evaluate(true), 30, true)


def seen(page, selector="body"):
    """All text of an element, titles and labels, too."""
    return page.evaluate("s => [...document.querySelectorAll(s)].map(e => e.innerText + ' ' + [...e.querySelectorAll('[title],[aria-label]')].map("
                         "n => n.getAttribute('title') + ' ' + n.getAttribute('aria-label')).join(' ')).join(' ')", selector)


def test_the_page_is_one_text_of_at_most_60_KiB_whose_only_script_and_style_are_pinned_by_their_sums(full):
    client = full.world.client("")
    status, data, headers = client.raw("GET", "page")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and len(data) <= 60 << 10 and headers["Content-Type"] == "text/html; charset=utf-8", len(data)
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        part, = re.findall(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), data, re.S)
        assert "%s 'sha256-%s'" % (name, base64.b64encode(hashlib.sha256(part).digest()).decode()) in policy
    for words in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'",
                  "require-trusted-types-for 'script'"):
        assert words in policy
    assert "unsafe" not in policy and not headers.get_all("Set-Cookie")
    assert [headers[name] for name in ("Cache-Control", "X-Content-Type-Options", "Referrer-Policy", "X-Frame-Options", "Cross-Origin-Opener-Policy",
                                       "Cross-Origin-Resource-Policy")] == [
        "no-store, no-transform", "nosniff", "no-referrer", "DENY", "same-origin", "same-origin"]
    assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)|\son\w+=\"|\sstyle=|innerHTML|insertAdjacent|document\.write|eval\(|localStorage|"
                         rb"sessionStorage|\.cookie|\?\?|\?\.[a-z]", data)
    zipped = client.raw("GET", "page", headers={"Accept-Encoding": "gzip, deflate"})
    assert zipped[2]["Content-Encoding"] == "gzip" and gzip.decompress(zipped[1]) == data and len(zipped[1]) < 20000
    assert client.call("GET", "v2/board", {"v": 2})[0] == 403 == full.world.client("0" * 64).call("GET", "v2/board", {"v": 2})[0]


def test_every_word_of_the_page_is_there_in_both_languages_and_is_said():
    table, script = re.search(r"const WORDS = \{\n(.*?)\n\};\n(.*)", relay.PAGE_JS, re.S).groups()
    text = r"'((?:[^'\\]|\\.)*)'"
    words = {key.strip("'"): both for key, *both in re.findall(r"('[\w-]+'|\w+): \[%s,\s+%s\]" % (text, text), table)}
    assert len(words) == len(re.findall(r": \[", table)) > 150
    for key, (english, japanese) in words.items():
        assert len(re.findall("%[snt]", english)) == len(re.findall("%[snt]", japanese)), key
        assert re.search("[\u3040-\u30ff\u4e00-\u9fff]", japanese) or key in ("c_id", "f_id", "ofn", "other"), key
        stem = next((stem for stem in ("who_", "cancel", "rerun", "maint", "p_", "y_", "w_", "t_", "c_", "s", "k_", "f_") if key.startswith(stem)), None)
        assert "'%s'" % key in script or re.search("'%s|%s:|: '%s" % ((stem, key.strip("_"), key.rstrip("_"))), script), key
    actions = re.findall(r"confirm_\(\w[^;]*?, '(\w+)', '", script)
    assert len(actions) == 3 and {action + end for action in actions for end in ("h", "says")} <= set(words), actions
    codes = {cause.code for cause in relay.CAUSES} - {"fetched", "unfetched", "cancelled", "lost", "refused", "timeout", "failed", "abnormal"}
    plain = {"taken", "running", "results-come", "fielded-has-it"}             # the state says it
    assert codes - plain <= {key[2:] for key in words if key.startswith("y_")}, codes - plain - {key[2:] for key in words if key.startswith("y_")}
    assert set(relay.NEARER) | {"never"} == {key[2:] for key in words if key.startswith("p_")}
    assert {"s%d" % step.number for step in relay.STEPS} <= set(words)


def test_a_link_opens_the_page_once_and_leaves_no_trace_in_the_address(full, look, browser):
    url = link(full.world)
    assert re.match(r"https://localhost:\d+/mi-distcomp-api/page#link=[\w=-]{32}\Z", url), url
    first = Looker(browser)
    page = first.open(url)
    assert "#link" not in page.url and "#link" not in page.evaluate("history.length + location.href")
    assert page.evaluate("document.cookie + localStorage.length + sessionStorage.length") == "00"
    origin = re.match("https://[^/]+/", url).group()
    assert len(first.asked) >= 3 and all(asked.startswith(origin) and "link=" not in asked for asked in first.asked), first.asked
    assert not first.wrong
    first.close()
    second = Looker(browser)
    page = second.open(url, "#token")
    assert "used" in seen(page, "#wrong") and not page.query_selector("#sites")
    page.fill("#token", full.world.issue("eve", "--roles", "viewer"))
    page.keyboard.press("Enter")
    page.wait_for_selector("#sites tbody tr")
    page.click("#leave")
    page.wait_for_selector("#token")
    second.close()


def test_a_code_is_good_once_for_a_minute_and_its_token_ends_after_login_hours(make_world, monkeypatch):
    world = make_world(tls=False).start()
    client, code = world.client(""), link(world, "alice", "--roles", "viewer").partition("#link=")[2]
    assert client.call("POST", "v2/link", {"v": 2, "code": code[:-1]})[0] == 403
    found = client.ok("POST", "v2/link", {"v": 2, "code": code})
    assert found["roles"] == "viewer" and abs(found["expires"] - time.time() - 12 * 3600) < 60
    status, told = client.call("POST", "v2/link", {"v": 2, "code": code})
    assert (status, told["code"], told["why"]) == (403, "0005", "code")
    assert world.client(found["token"]).ok("GET", "v2/board", {"v": 2})["me"] == "alice"
    codes = {hashlib.sha256(b"old").hexdigest(): ("a", "viewer", "", time.monotonic() - 0.1)}
    call = type("Call", (dict,), {"relay": type("R", (), {"access": type("A", (), {"codes": codes})}), "conn": type("C", (), {"address": "x"})})
    with pytest.raises(relay.ApiError):
        relay.redeem_link(call(code="old"))
    assert not codes


def test_page_no_switches_it_off_for_everybody(make_world):
    world = make_world(tls=False, ini="[Server]\npage = no\n").start()
    assert world.client("").raw("GET", "page")[0] == 404 == world.client().call("GET", "v2/board", {"v": 2})[0]
    done = suite.run("mi_dicomapi.py", "page-link", "--ini", world.ini)
    assert done.returncode == 78 and suite.one_line(done.stderr), done


def test_who_sees_what_and_may_do_what(make_world):
    world = make_world(tls=False, commands=["hello"], sites=(SITE, "u-other")).start()
    alice, bob = world.client(), world.client(world.issue("bob"))
    mine, other, his = alice.register("hello"), alice.register("hello", site="u-other"), bob.register("hello")

    def shown(token):
        client = world.client(token)
        status, found = client.call("GET", "v2/board", {"v": 2, "view": "calcs", "show": "all"})
        places = client.call("GET", "v2/board", {"v": 2})[1].get("sites", ())
        return status, {row[0] for row in found.get("calcs", ())}, found.get("may"), {(row[0], row[1]) for row in places}
    both = {(SITE, USER), ("u-other", USER)}
    assert shown(world.token) == (200, {mine, other}, "own", both)
    assert shown(world.issue(USER, "--roles", "remote", "--sites", SITE)) == (200, {mine}, "", {(SITE, USER)})
    assert shown(world.issue("eve", "--roles", "viewer")) == (200, {mine, other, his}, "", both | {(SITE, "bob")})
    assert shown(world.issue("eve", "--roles", "viewer", "--sites", "u-other")) == (200, {other}, "", {("u-other", USER)})
    assert shown(world.issue("boss", "--roles", "operator")) == (200, {mine, other, his}, "all", both | {(SITE, "bob")})
    assert shown(world.issue("mon", "--roles", "metrics"))[0] == 403
    viewer, mixed, operator = (world.client(world.issue("eve", "--roles", roles)) for roles in ("viewer", "viewer,workflow", "operator"))
    for client, status in ((viewer, 403), (mixed, 404)):
        assert client.call("POST", "cancel-wait-calc", {"v": 2, "accept_id": his, "reason": "no"})[0] == status
        assert client.call("POST", "rerun", {"v": 2, "accept_id": his, "reason": "no"})[0] == status
        assert client.call("POST", "v2/maintenance", {"v": 2, "on": True})[0] == 403
        assert client.ok("GET", "v2/board", {"v": 2, "view": "one", "accept_id": his})["calc"]["user"] == "bob"
        assert client.ok("GET", "v2/explain", {"v": 2, "accept_id": his})["cause"]
        assert client.ok("GET", "output", {"v": 2, "accept_id": his, "stream": "out", "offset": 0})
    assert viewer.call("POST", "add-calcinfo", {"v": 2, "request_id": "x", "calc-info": {}})[0] == 403
    assert alice.call("GET", "v2/board", {"v": 2, "view": "one", "accept_id": his})[0] == 404
    operator.ok("POST", "cancel-wait-calc", {"v": 2, "accept_id": his, "reason": "wrong input"})
    assert re.search(r"%s 2 cancel-wait-calc by=eve reason=\"cancelled: wrong input\b" % his, world.relay.text())
    operator.ok("POST", "v2/maintenance", {"v": 2, "on": True, "reason": "disk"})
    wait_until(lambda: operator.ok("GET", "v2/board", {"v": 2})["head"]["wrong"][0] == ["maintenance", True, "disk"])
    operator.ok("POST", "v2/maintenance", {"v": 2, "on": False})


def test_a_browsers_call_is_taken_from_the_page_only_also_where_a_gateway_knows_who_comes(make_world, browser):
    world = make_world(tls=False, commands=["hello"], ini=
                       "[Server]\nauth = gateway\ntrusted_proxies = 127.0.0.1\ngateway_user_header = X-User\noperators = boss\n")
    world.start()
    as_gateway, other = {"X-User": "alice", "Authorization": "Bearer abc"}, {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    looker = Looker(browser, extra_http_headers=as_gateway)
    page = looker.open(world.url + "/mi-distcomp-api/page")
    assert page.evaluate("document.querySelector('#token')") is None and "alice" not in page.url
    looker.close()
    client = world.client("abc")
    for headers in (other, {"Origin": world.url}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
        status, data, more = client.raw("POST", "cancel-wait-calc?v=2", b"{}", dict(headers, **{"X-User": "alice"}))
        assert status == 403 and b'"origin"' in data, (headers, data)
    assert client.raw("GET", "v2/board?v=2", headers={"X-User": "alice", "Origin": world.url, "X-MI-Page": "1"})[0] == 200
    assert client.raw("OPTIONS", "v2/board", headers={"Origin": "https://evil.example", "Access-Control-Request-Headers": "x-mi-page"})[0] == 405
    done = suite.run("mi_dicomapi.py", "page-link", "--ini", world.ini)
    assert done.returncode == 78 and suite.one_line(done.stderr), done


def test_every_text_of_every_field_is_shown_harmless(browser, make_world, look):
    site, user = "<b>u&amp;\"'" + "s" * 60, "<i>\"'" + "u" * 180
    world = make_world(sites=(site, SITE), commands=["hello"])
    ids = page_lab.fill(world, 14, [site], user=user, texts=(BAD,))
    db = sqlite3.connect(os.path.join(world.state, "state.sqlite3"))
    for field in ("reason", "request_id", "poller", "waits"):
        db.execute("UPDATE calculations SET %s = ? || seq" % field, (BAD,))
    db.execute("UPDATE calculations SET verdicts = ?, info = ?", (json.dumps({BAD: {"count": 3, "names": [BAD] * 30}}), json.dumps(
        {"parameters": BAD, "result_names": [BAD], "result_patterns": [BAD] * 40, "extra": {BAD: BAD}})))
    db.execute("UPDATE events SET note = ?", (json.dumps({"reason": BAD, "poller": BAD, BAD: BAD}),))
    db.execute("INSERT INTO events SELECT calc, attempt, ?, at, note FROM events WHERE step = 'calc-end'", (BAD,))
    for kind in ("input", "result"):
        db.executemany("INSERT INTO files (calc, kind, n, name, size, sha256) VALUES (?, ?, ?, ?, 1, '')",
                       [(seq, kind, n, BAD) for seq in range(1, 15) for n in range(120)])
    db.execute("UPDATE calculations SET inputs = 120, results = 120")
    db.commit()
    db.close()
    running = [accept_id for seq, accept_id in enumerate(ids, 1) if page_lab.STATES[seq % 14] == "running"][-1]
    for stream in ("out", "err"):
        path = os.path.join(world.state, "spool", running[:2], running)
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, "live." + stream), "wb") as out:
            out.write(b"\xff\xfe" + BAD.encode() + b"\r\n" + os.urandom(3000) + (BAD + "\n").encode() * 30)
    world.start()
    page_lab.pollers(world, [site], states=(BAD,), user=user, version=BAD)
    client = world.client(world.issue(user))
    client.ok("POST", "heartbeat", {"v": 2, "site_id": site, "poller": BAD, "wait": 0, "presence": {"state": "open", "version": BAD}, "calcs": {
        running: {"claim": "1.%032x" % (ids.index(running) + 1), "phase": "running", "what": BAD}}})
    suite.run("mi_dicomapi.py", "maintenance", "on", "--reason", BAD.replace("\x1b", ""), "--ini", world.ini)
    for lang in ("en", "ja"):
        looker = look(world, lang=lang)
        for view, waits in VIEWS + tuple(("#/calculation/" + one, "#steps tbody tr") for one in (running, ids[8])):
            page = looker.go(view, waits)
            page.wait_for_timeout(200)
            text = seen(page)
            assert "<img src=x" in text and not STEERS.search(text), (view, sorted(set(STEERS.findall(text))))
            assert page.evaluate("document.querySelectorAll('script, img, b, i, iframe, object').length") == 1, view
            assert page.evaluate("Math.max(...[...document.querySelectorAll('td, dd, li, bdi')].map(n => n.textContent.length))") < 8000, view
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view
        assert "\\x1b[2J" in seen(page, "pre") or "\\x1b[2J" in text
        assert not looker.wrong, looker.wrong


def test_nothing_is_seriously_wrong_for_who_cannot_see_or_has_no_mouse(full, look):
    for scheme in ("light", "dark"):
        looker = look(full.world, "--roles", "operator", color_scheme=scheme)
        for view, waits in VIEWS + (("#/calculation/" + full.of("running"), "#steps tbody tr"), ("", "#token")):
            page = looker.go(view, waits) if view else looker.page
            if not view:
                page.click("#leave")
            elif "calculation/" in view:
                page.click(".acts button")
                page.click("#maint")
            page.wait_for_selector(waits)
            found = [(one["id"], one["impact"], [node["html"][:150] for node in one["nodes"]][:3]) for one in Axe().run(page).response["violations"]]
            assert not [one for one in found if one[1] in ("serious", "critical")], (scheme, view, found)
            assert page.evaluate("document.querySelectorAll('main, header').length == 2 && document.documentElement.lang == 'en'")
        assert not looker.wrong, looker.wrong


def test_all_is_reached_by_keyboard_and_a_cancel_takes_two_steps_and_a_reason(full, look):
    page = look(full.world, "boss", "--roles", "operator").page
    accept_id = full.of("running")
    client = full.world.client()

    def at():
        return page.evaluate("(document.activeElement.id || '') + '|' + document.activeElement.innerText")
    page.keyboard.press("Tab")
    assert at().startswith("skip|")
    walk = []
    for key in range(14):
        page.keyboard.press("Tab")
        walk.append(at())
    for word in ("|Sites", "|Calculations", "lang|", "leave|", "maint|", "find|"):
        assert any(word in place for place in walk), (word, walk)
    page.evaluate("id => { location.hash = '#/calculation/' + id; }", accept_id)
    page.wait_for_selector(".acts button")
    page.focus(".acts button")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "last4"
    page.keyboard.press("Escape")
    assert "Cancel" in at() and not page.query_selector("#last4")
    page.keyboard.press("Enter")
    page.keyboard.type("zzzz")
    page.keyboard.press("Enter")
    assert "not the last 4" in seen(page, ".confirm .wrong") and page.evaluate("document.activeElement.id") == "last4"
    page.fill("#last4", accept_id[-4:])
    page.keyboard.press("Enter")
    assert "reason" in seen(page, ".confirm .wrong") and client.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["cancelling"] is False
    page.keyboard.type("<wrong> mesh")
    page.keyboard.press("Enter")
    becomes(page, "document.querySelector('.why').innerText.includes('<wrong> mesh')")
    assert not page.query_selector(".acts button") and client.ok("GET", "calc-progress", {"v": 2, "accept_id": accept_id})["cancelling"]
    assert re.search(r"%s 2 cancel-wait-calc by=boss reason=" % accept_id, full.world.relay.text())


def test_what_ended_abnormally_is_run_again_and_maintenance_begins_and_ends(full, look):
    page, accept_id = look(full.world, "boss", "--roles", "operator").page, full.of("got", bad=True)
    page.evaluate("id => { location.hash = '#/calculation/' + id; }", accept_id)
    page.wait_for_selector(".acts button")
    page.click(".acts button")
    page.fill("#last4", accept_id[-4:])
    page.fill("#reason", "once more")
    page.keyboard.press("Enter")
    becomes(page, "document.querySelectorAll('#steps tbody tr').length == 9")
    assert full.world.state_of(accept_id) == relay.ALLOWED
    becomes(page, "document.querySelector('#why').innerText.includes('(attempt 2): once more (by an operator)')")
    page.click("#maint")
    page.fill("#reason", "new disk")
    page.keyboard.press("Enter")
    becomes(page, "document.querySelector('.verdict').innerText.includes('Maintenance: new disk')")
    becomes(page, "document.title.startsWith('(!)')")
    page.click("#maint")
    page.click("#maint-form .danger")
    becomes(page, "!document.querySelector('.verdict').innerText.includes('Maintenance')")


def test_who_only_looks_has_no_button_to_act(full, look):
    page = look(full.world, "--roles", "viewer").page
    assert page.query_selector("#maint").is_hidden()
    page.evaluate("id => { location.hash = '#/calculation/' + id; }", full.of("sent"))
    page.wait_for_selector("#steps tbody tr")
    assert not page.query_selector(".acts button")


def test_a_change_is_drawn_where_it_is_and_who_reads_keeps_his_place(full, look):
    looker = look(full.world)
    page = looker.go("#/calculations?show=needs", "#calcs tbody tr")
    looker.go("#/calculations?show=all", ".tabs a[aria-current][href*=all]")
    assert page.evaluate("document.querySelectorAll('tr.new').length") == 0, "what was asked for is no news"
    page.evaluate("window.kept = document.querySelectorAll('#calcs tbody a')[5]; kept.focus(); window.scrollTo(0, 80);")
    accept_id = full.world.client().register("hello")
    page.wait_for_selector("tr.new a[href='#/calculation/%s']" % accept_id)
    assert page.evaluate("document.activeElement === kept && kept.isConnected && window.scrollY >= 80")
    asked = len(looker.asked)
    page.wait_for_timeout(1500)
    assert len(looker.asked) - asked <= 2, "one call waits while nothing changes"
    assert [one for one in looker.asked if "known=" in one]
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true}); document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(100)
    asked = len(looker.asked)
    other = full.world.client().register("hello")
    page.wait_for_timeout(1500)
    assert len(looker.asked) == asked, "who does not look asks nothing"
    page.evaluate("Object.defineProperty(document, 'hidden', {value: false, configurable: true}); document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("a[href='#/calculation/%s']" % other)


def test_more_sites_than_one_answer_holds_are_shown_in_pages(make_world, look):
    world = make_world(commands=["hello"], sites=["s%03d" % n for n in range(relay.BOARD_SITES + 1)])
    world.start()
    page = look(world, "--roles", "operator").page
    rows = "[...document.querySelectorAll('#sites tbody th')].map((cell) => cell.innerText)"
    assert len(page.evaluate(rows)) == relay.BOARD_SITES
    page.click("text=More sites")
    becomes(page, rows + ".join() === 's%03d'" % relay.BOARD_SITES)
    page.click("text=First sites")
    becomes(page, rows + "[0] === 's000'")


def test_the_nine_steps_are_drawn_to_scale_and_said_in_a_table_in_both_languages(full, look):
    accept_id = full.of("finished")
    for lang, word in (("en", "Waits for a poller"), ("ja", "実行待ち")):
        looker = look(full.world, lang=lang)
        page = looker.go("#/calculation/" + accept_id, "#steps tbody tr")
        rows = page.evaluate("[...document.querySelectorAll('#steps tbody tr')].map(r => [...r.children].map(c => c.innerText))")
        assert [row[0].split()[0] for row in rows] == [str(number) for number in range(1, 10)] and rows[1][2] == word
        bars = page.evaluate("[...document.querySelectorAll('svg g rect')].filter(r => r.closest('.scroll')).map("
                             "r => [r.getAttribute('class'), +r.getAttribute('width')])")
        assert [kind for kind, wide in bars] == ["b-move", "b-wait", "b-move", "b-move", "b-run", "b-move", "b-move", "b-wait", "b-wait"]
        scale = [wide / seconds for (kind, wide), seconds in zip(bars, (75, 65, 55, 45, 35, 25, 15, 5))]
        assert max(scale) / min(scale) < 1.01, scale
        assert page.evaluate("document.documentElement.lang") == lang
        page.click("#lang")
        becomes(page, "document.documentElement.lang == '%s'" % ("ja" if lang == "en" else "en"))
        assert page.evaluate("document.activeElement.id") == "lang"


def test_what_the_command_prints_is_followed_and_a_relay_that_went_away_is_told_and_found_again(make_world, look):
    world = make_world(commands=["hold"]).start()
    world.poller({"hold": "argv =\n    /bin/sh\n    -c\n    echo begun; exec sleep 60\nmatch = hold\n"})
    accept_id = world.workflow("submit", SITE, "hold").stdout.strip()
    looker = look(world)
    page = looker.go("#/calculation/" + accept_id, "#why .first")
    becomes(page, "document.querySelector('pre').innerText.includes('begun')")
    world.relay.kill()
    becomes(page, "document.querySelector('#asof').className.includes('stale')")
    world.start()
    becomes(page, "!document.querySelector('#asof').className.includes('stale')")


def test_one_answer_is_made_for_all_who_may_see_the_same_and_none_while_nothing_changes(make_world, monkeypatch):
    world = make_world(tls=False, commands=["hello"]).start()
    lookers = [world.client(world.issue("v%d" % n, "--roles", "viewer")) for n in range(3)]
    found = [client.ok("GET", "v2/board", {"v": 2}) for client in lookers]
    assert len({one["stamp"] for one in found}) == 1
    begun = time.monotonic()
    again = lookers[0].ok("GET", "v2/board", {"v": 2, "known": found[0]["stamp"], "wait": 1})
    assert again["same"] is True and "sites" not in again and time.monotonic() - begun > 0.9
    made, told = [], []
    board = relay.Board(type("Relay", (), {"front": type("Front", (), {"fire": staticmethod(told.append)})}))
    monkeypatch.setattr(board, "make", lambda right, question: made.append((right, question)) or ("s%d" % len(made), "{}"))
    for turn in range(5):
        assert board.answer("everybody", "sites") == ("s1", "{}")
    assert board.answer("alice", "sites")[0] == "s2" and len(made) == 2
    board.touch()
    board.next_round = 0.0
    assert board.answer("everybody", "sites")[0] == "s3" and board.answer("everybody", "sites")[0] == "s3"
    for turn in range(100):
        board.touch()
    assert board.answer("everybody", "sites")[0] == "s3" and board.changed, "not oftener than once a second, and not forgotten"
    told.clear()
    board.next_round = 0.0
    board.touch()
    assert not told, "who waits for the change itself comes first"
    board.tick()
    assert told == [("board",)]
    assert board.answer("everybody", "sites")[0] == "s4" and not board.changed


def test_a_poller_that_falls_silent_is_shown_so_by_itself(make_world):
    world = make_world(tls=False, commands=["hello"]).start()
    one = world.poller({"hello": "argv = /bin/true\nmatch = hello\n"})
    viewer = world.client(world.issue("v", "--roles", "viewer"))

    def stands():
        return viewer.ok("GET", "v2/board", {"v": 2})["sites"][0][2]
    wait_until(lambda: stands() == "open")
    found = viewer.ok("GET", "v2/board", {"v": 2})
    one.kill()
    known, until = found["stamp"], time.monotonic() + 20
    while found["sites"][0][2] != "silent" and time.monotonic() < until:
        found = viewer.ok("GET", "v2/board", {"v": 2, "known": known, "wait": 10})
        found, known = (found, found["stamp"]) if "sites" in found else (dict(found, sites=[[0, 0, 0]]), known)
    assert found["sites"][0][2] == "silent"
