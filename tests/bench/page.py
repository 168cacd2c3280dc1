#!/usr/bin/env python3
"""The page with 10,000 calculations and 200 sites: first useful paint, a change drawn, what viewers cost, and what they cost those who wait.

usage: page.py [--check] [--full] [--only paint|viewers]
"""
import json
import os
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from parts import common
import page_lab
import suite
from parts.common import Figures, Folder, cpu, median, rank

SITES = ["site-%03d" % number for number in range(200)]
# what the page itself cannot say: when its rows were there, and when a change of them came to be shown
CLOCK = """window.drawn = [];
new MutationObserver((found) => {
  const inside = (node) => (node.closest ? node : node.parentNode || document.body).closest('tbody');
  if (!found.some((one) => inside(one.target))) return;
  const at = performance.now();
  requestAnimationFrame(() => window.drawn.push([at, performance.now()]));
}).observe(document, {childList: true, subtree: true, characterData: true});"""
ANSWERS = "performance.getEntriesByType('resource').filter(e => e.name.includes('v2/board')).map(e => e.responseEnd)"


def paint(figures, world, browser, turns):
    """From the link to the rows; from the relay's answer to the change on the screen."""
    first, changed = [], []
    for turn in range(turns):
        looker = page_lab.Looker(browser)
        looker.page.add_init_script(CLOCK)
        page = looker.open(page_lab.link(world))
        suite.wait_until(lambda: page.evaluate("drawn.length"))
        first.append(page.evaluate("drawn[0][1]") / 1000)
        page = looker.go("#/calculations", "#calcs tbody tr")
        page.wait_for_timeout(1200)
        seen = page.evaluate("performance.now()")
        accept_id = world.client().register("hello", site=SITES[-1 - turn])
        page.wait_for_selector("a[href='#/calculation/%s']" % accept_id)
        suite.wait_until(lambda: page.evaluate("drawn.some(one => one[0] > %f)" % seen))
        answers = [at for at in page.evaluate(ANSWERS) if at > seen]
        drawn = page.evaluate("drawn.find(one => one[0] > %f)" % seen)[1]
        changed.append((drawn - max([at for at in answers if at < drawn] or [drawn])) / 1000)
        looker.close()
    figures.most("first useful paint, 200 sites", median(first), "s", 0.3, what="n = %d, most %.0f ms" % (turns, 1000 * max(first)))
    figures.most("a change drawn, after the relay's answer", median(changed), "s", 0.15, what="most %.0f ms" % (1000 * max(changed)))


class Viewers:
    """Tabs that look at the calculations, without a browser: one waiting call each."""

    def __init__(self, world, count):
        self.over, self.answers, self.bytes = False, 0, 0
        self.clients = [world.client(world.issue("viewer%d" % number, "--roles", "viewer")) for number in range(count)]
        self.threads = [threading.Thread(target=self.look, args=(client,)) for client in self.clients]
        for thread in self.threads:
            thread.start()

    def look(self, client):
        known = ""
        while not self.over:
            status, data, headers = client.raw("GET", "v2/board?v=2&view=calcs&wait=3&known=" + known)
            known = json.loads(data.decode())["errors"][0]["stamp"]
            self.answers += 1
            self.bytes += len(data)

    def close(self):
        self.over = True
        for thread in self.threads:
            thread.join()


def waking(world, seconds):
    """[seconds from a registration to its poller's answer] of one after the other, ten a second; and the relay's share of a core meanwhile."""
    pollers, clients, found = world.client(), world.client(), []
    used, begun = cpu(world.relay.pid), time.monotonic()
    while time.monotonic() < begun + seconds:
        got = []
        thread = threading.Thread(target=lambda: got.append((pollers.claim(wait=5, site=SITES[0]), time.monotonic())))
        thread.start()
        time.sleep(0.1)
        at = time.monotonic()
        clients.register("hello", site=SITES[0])
        thread.join()
        found.append(got[0][1] - at)
    return found, (cpu(world.relay.pid) - used) / (time.monotonic() - begun)


def viewers(figures, world, seconds):
    """What ten of them cost while nothing changes, and while ten calculations a second do."""
    before = waking(world, 2)[0]
    alone, share = waking(world, seconds)
    watched = Viewers(world, 10)
    time.sleep(2)
    used, begun = cpu(world.relay.pid), time.monotonic()
    time.sleep(seconds)
    idle = (cpu(world.relay.pid) - used) / (time.monotonic() - begun)
    busy, with_them = waking(world, seconds)
    watched.close()
    figures.most("10 viewers, nothing changes, of a core", idle, "", 0.02, what="%d answers in all" % watched.answers)
    figures.most("10 viewers, 10 calculations/s, of a core", max(0.0, with_them - share), "", 0.02, what="%.3f with, %.3f without" % (with_them, share))
    figures.most("a poller's wake-up with viewers / without", median(busy), "s", 1.5, median(alone))
    figures.note("the same, p99", rank(busy, 0.99), "s", rank(alone, 0.99), "n = %d" % len(busy))
    figures.must("no waking was lost", len(before) > 5 and len(busy) > 5)


def main():
    options = common.options(__doc__, only="one part: paint or viewers")
    figures = Figures(options.check)
    with Folder() as folder:
        world = suite.World(os.path.join(folder, "page"), commands=["hello"], sites=SITES, ini=\
                            "[limits]\ncalculations_per_user = 0\n[times]\naccept_lease = 1h\n[%s]\nmax_waiting = 0\n" % SITES[0])
        page_lab.fill(world, 10000, SITES[1:])
        world.start()
        page_lab.pollers(world, SITES[1:])
        try:
            size = len(world.client("").raw("GET", "page")[1])
            figures.most("the page", size / 1024, "KiB", 60)
            if options.only in (None, "paint"):
                with page_lab.browser() as browser:
                    paint(figures, world, browser, 9 if options.full else 5)
            if options.only in (None, "viewers"):
                viewers(figures, world, 20 if options.full else 6)
        finally:
            world.close()
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
