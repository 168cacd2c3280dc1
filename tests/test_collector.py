"""What leaves of a calculation's directory: only the bytes that were judged, and nothing is written to any more when they are."""
import argparse
import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest

import suite
from suite import SITE, wait_until

gate = suite.module("mi_system_remote.py")
RULES = {"max_file": 0, "max_total": 0, "max_files": 200000, "allow_names": ["*"], "deny_names": [], "deny_sums": [], "deny_content": [], "deny_pieces": [],
         "types": [], "unwrap": list(gate.UNWRAP), "dry_run": False, "scan_timeout": 10.0}


def collected(folder, patterns=("**",), names=(), **rules):
    """(the Collector of a directory, its Tree)."""
    tree = gate.ResultTree(os.fsencode(str(folder)))
    found = gate.Collector(dict(RULES, **rules), lambda *words: None)
    found.take_named(tree, names, gate.LOG_NAMES)
    if patterns:
        found.take_matching(tree, patterns, names, gate.LOG_NAMES)
    return found.in_order(), tree


def content(result):
    with result.source.open() as source:
        return bytes(source.read(result.size + 1))


@pytest.mark.parametrize("rule", [{"deny_sums": [hashlib.sha256(b"S" * 4096).hexdigest()]}, {"deny_content": ["S"]}])
def test_a_writer_that_swaps_bytes_gets_none_out_that_were_not_judged(tmp_path, rule):
    path, over, left = tmp_path / "r", threading.Event(), 100
    path.write_bytes(b"P" * 4096)
    stamp = os.stat(str(path)).st_mtime_ns

    def swap():
        with open(str(path), "r+b", 0) as out:
            while not over.is_set():
                for letter in (b"S", b"P"):
                    out.seek(0)
                    out.write(letter * 4096)
                    os.utime(str(path), ns=(stamp, stamp))

    threading.Thread(target=swap, daemon=True).start()
    outcomes = {"left": 0, "stayed": 0, "changed": 0}
    for turn in range(left):
        found, tree = collected(tmp_path, **rule)
        try:
            data = content(found.found[0]) if found.found else None
            outcomes["stayed" if data is None else "left"] += 1
            assert data is None or data == b"P" * 4096 or hashlib.sha256(data).digest() == found.found[0].digest and b"S" * 4096 != data
        except ValueError:
            outcomes["changed"] += 1
        tree.close()
    over.set()
    assert outcomes["stayed"] + outcomes["changed"] and outcomes["left"], outcomes


def test_each_piece_of_a_large_result_is_compared_when_it_leaves(tmp_path):
    path = tmp_path / "r"
    data = os.urandom(3 * gate.PIECE + 5)
    path.write_bytes(data)
    found, tree = collected(tmp_path)
    assert found.found[0].sum256 == hashlib.sha256(data).hexdigest() and content(found.found[0]) == data
    with open(str(path), "r+b") as out:
        out.seek(2 * gate.PIECE + 7)
        out.write(b"x" if data[2 * gate.PIECE + 7:][:1] != b"x" else b"y")
    with found.found[0].source.open() as source:
        assert bytes(source.read(2 * gate.PIECE)) == data[:2 * gate.PIECE]
        with pytest.raises(ValueError):
            source.read(1)
    assert found.found[0].source.changed
    path.unlink()
    with pytest.raises(ValueError):
        found.found[0].source.open()
    tree.close()


def test_a_link_that_comes_between_looking_and_sending_leads_nowhere(tmp_path):
    inside = tmp_path / "top" / "d"
    inside.mkdir(parents=True)
    (inside / "r").write_text("right")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "r").write_text("right")
    found, tree = collected(tmp_path / "top")
    tree.last = None, -1
    (tmp_path / "top" / "moved").mkdir()
    inside.rename(tmp_path / "top" / "moved" / "d")
    inside.symlink_to(tmp_path / "else")
    with pytest.raises(ValueError):
        found.found[0].source.open()
    tree.close()


@pytest.mark.parametrize("rules, patterns, names, leaves, codes", [
    ({}, ["**"], [], {"a", "b", "l", "s/c"}, {}),
    ({"deny_names": ["a"]}, ["**"], [], {"s/c"}, {"refused": (3, [])}),                   # the file, its hard link, a link to it
    ({"deny_names": ["b"]}, [], ["a", "l"], set(), {"refused": (2, ["a", "l"])}),         # its other name is denied
    ({"deny_names": ["s"]}, ["s/"], [], set(), {"refused": (1, [])}),
    ({"max_file": 1}, ["**"], [], set(), {"limit": (4, ["a", "b", "l", "s/c"])}),
    ({"deny_content": ["TENT$"]}, ["**"], [], {"a", "b", "l", "s/c"}, {}),
    ({"deny_content": ["(?i)CONTENT"]}, ["s/*"], [], set(), {"refused": (1, [])}),
    ({"deny_content": ["(?i)CONTENT"], "dry_run": True}, ["s/*"], [], {"s/c"}, {})])
def test_the_rules_hold_for_every_name_of_a_file(tmp_path, rules, patterns, names, leaves, codes):
    (tmp_path / "a").write_text("content")
    os.link(str(tmp_path / "a"), str(tmp_path / "b"))
    (tmp_path / "l").symlink_to("a")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "c").write_text("content")
    found, tree = collected(tmp_path, patterns, names, **rules)
    tree.close()
    assert {result.name for result in found.found} == leaves
    assert {code: (entry["count"], sorted(entry["names"])) for code, entry in found.verdicts.items()} == codes


def test_directories_that_link_to_one_another_have_an_end(tmp_path):
    for one in range(30):
        (tmp_path / ("d%d" % one)).mkdir()
        (tmp_path / ("d%d" % one) / "x").write_text(str(one))
        for other in range(30):
            if other != one:
                (tmp_path / ("d%d" % one) / ("l%d" % other)).symlink_to("../d%d" % other)
    found, tree = collected(tmp_path, ["d0/", "d1/"])
    tree.close()
    assert {"d0/x", "d1/x", "d0/l1/x", "d1/l29/x"} <= {result.name for result in found.found} and set(found.verdicts) == {"special"}


def running(text):
    """The pids of processes whose command line holds text."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-f", text], stdout=subprocess.PIPE).stdout.split()]


LEFT = """#!/bin/sh
echo first >log.txt
(while :; do echo more >>log.txt; sleep 0.01; done) &
cd /
(exec 3>>"$CALC_DIR/held.txt"; exec sleep 4712) &
env -i setsid sh -c 'trap "" TERM; exec 4>>"$1/deaf.txt"; sleep 4713 & while :; do sleep 1; done' sh "$CALC_DIR" &
setsid sleep 4714 &
echo $! >%s
sleep 0.3
"""


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_command_leaves_running_in_its_directory_is_ended_and_all_else_is_left_alone(tmp_path, keep):
    world = suite.World(tmp_path / "world", tls=False, commands=["left"]).start()
    script = tmp_path / "left.sh"
    script.write_text(LEFT % (tmp_path / "pid"))
    script.chmod(0o755)

    def there(number):
        return running("sleep %d" % number)

    try:
        poller = world.poller({"left": "match = left\nargv = %s\ngrace = 1s\n%s" % (script, "leftovers = leave\n" if keep else "")})
        done = world.workflow("run", SITE, "left", "--out", "held.txt", "--out", "deaf.txt", *(() if keep else ("--out", "log.txt")), cwd=str(tmp_path))
        assert done.returncode == 0, done.stdout + poller.text()
        assert bool(there(4712)) == keep and there(4714) and ("left-overs ended processes=" in poller.text()) != keep, poller.text()
        if not keep:
            assert not there(4713)
    finally:
        world.close()
        for pid in there(4712) + there(4713) + there(4714) + running(str(tmp_path)):
            os.kill(pid, 9)


def test_a_left_over_is_seen_also_while_it_opens_and_closes_files(tmp_path, monkeypatch):
    list_of = os.listdir
    # as if one had been closed a moment ago
    monkeypatch.setattr(os, "listdir", lambda path: [b"999999"] * path.endswith(b"/fd") + list_of(path))
    with open(str(tmp_path / "held"), "w") as held:
        processes = [subprocess.Popen(["sleep", "60"], start_new_session=True, **how) for how in ({"stdout": held}, {"cwd": str(tmp_path)})]
    try:
        assert {pid for pid, start in gate.left_overs(os.fsencode(str(tmp_path)), 0, b"")} == {process.pid for process in processes}
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.skipif(not hasattr(threading, "get_native_id"), reason="Python 3.8")
def test_left_overs_of_a_command_that_began_a_moment_ago_are_found_without_a_look_at_every_process(tmp_path, monkeypatch):
    over, work = threading.Event(), os.fsencode(str(tmp_path))
    monkeypatch.setattr(gate, "MOMENT", 60)
    monkeypatch.setattr(gate, "MOST_PIDS", 100000)
    with open(str(tmp_path / "held"), "w") as held:    # by this process, too, which is older; its next thread is not
        processes = [subprocess.Popen(["sleep", "60"], start_new_session=True, **how) for how in ({"cwd": str(tmp_path)}, {"stdout": held}, {})]
        thread = threading.Thread(target=over.wait)
        thread.start()
        try:
            first = processes[0].pid
            with open("/proc/%d/stat" % first) as text:
                since = int(text.read().rpartition(") ")[2].split()[19])
            with monkeypatch.context() as patch:
                patch.setattr(os, "scandir", lambda path: pytest.fail("all of /proc is listed"))
                found = gate.left_overs(work, since, b"", first)
            assert {pid for pid, start in found} == {process.pid for process in processes[:2]}
            monkeypatch.setattr(gate, "MOMENT", 0)
            assert gate.left_overs(work, since, b"", first) == found, "the long way finds the same"
        finally:
            over.set()
            thread.join()
            for process in processes:
                process.kill()
                process.wait()


def test_very_many_names_that_another_receiver_takes_for_one_cost_no_more_than_others():
    result = lambda name: gate.Result(None, 0, name, b"", False, 0)
    found, count, begun = gate.Collector(RULES, lambda *words: None), 60000, time.process_time()
    for group, forms in ((found.found, ("\u00e9%d", "e\u0301%d")), (found.folders, ("\u00e9%d/", "e\u0301%d/", "d%d/"))):
        for name in (form % n for n in range(count) for form in forms):
            group.append(result(name))
    found.in_order()
    assert len(found.found) == count and len(found.folders) == 2 * count and found.verdicts["name"]["count"] == 2 * count
    assert time.process_time() - begun < 20            # some 4 s; as a square it takes minutes


@pytest.mark.parametrize("number, code", [(errno.ENOLCK, 78), (errno.ENOSYS, 78), (errno.EAGAIN, 75), (errno.EACCES, 75)])
def test_locks_that_are_refused_are_not_somebody_elses(tmp_path, monkeypatch, number, code):
    (tmp_path / ".mi").mkdir()

    def refuse(*words):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(gate.Stop) as stop:
        gate.lock_base(os.fsencode(str(tmp_path)))
    assert stop.value.code == code and ("no lock" in str(stop.value)) == (code == 78)


def test_results_that_change_again_and_again_do_not_hold_the_rest_back(tmp_path):
    world = suite.World(tmp_path / "world", tls=False, commands=["restless"]).start()
    script = tmp_path / "restless.py"
    script.write_text("#!%s\nimport os, subprocess, sys\nopen('still', 'w').write('x')\n"
                      "for n in range(12): open('r%%d' %% n, 'w').write('0' * 50000)\n"
                      "code = 'import sys, time, itertools\\nuntil = time.time() + 40\\n'\\\n"
                      "       'for turn in itertools.count():\\n for n in range(12):\\n  open(\"%%s/r%%d\" %% (sys.argv[1], n), \"r+\").write(str(turn %% 10) * 50000)\\n'\\\n"
                      "       ' if time.time() > until: break\\n'\n"
                      "for n in range(3): subprocess.Popen([sys.executable, '-c', code, os.getcwd()], cwd='/', start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
                      "import time; time.sleep(0.3)\n" % suite.PYTHON)
    script.chmod(0o755)
    try:
        world.poller({"restless": "match = restless\nargv = %s\nleftovers = leave\n" % script})
        begun = time.monotonic()
        done = world.workflow("run", SITE, "restless", "--out", "**", "--json", cwd=str(tmp_path))
        assert done.returncode == 65 and (tmp_path / "still").read_text() == "x" and "changing" in done.stdout, done.stdout
        assert time.monotonic() - begun < 35
    finally:
        world.close()
        for pid in running(str(tmp_path)):
            os.kill(pid, 9)


ENDS = {"shut": ("chmod 0 .", 65, 65, "unreadable"), "away": ("mv \"$CALC_DIR\" \"$CALC_DIR.moved\"", 65, 0, "missing"),
        "link": ("mv \"$CALC_DIR\" \"$CALC_DIR.moved\"; ln -s \"$CALC_DIR.moved\" \"$CALC_DIR\"", 65, 0, "outside")}


def test_what_a_command_does_to_its_own_directory_is_told_also_to_who_asked_by_pattern(tmp_path):
    world, plain = suite.World(tmp_path / "world", tls=False, commands=sorted(ENDS)).start(), tmp_path / "plain-python"
    plain.write_text("#!/bin/sh\nexec %s %s \"$@\"\n" % ("setpriv --inh-caps=-all --bounding-set=-all" if os.geteuid() == 0 else "", suite.PYTHON))
    plain.chmod(0o755)
    try:
        folder, ini = world.poller({name: "match = %s\nargv = /bin/sh\n  -c\n  echo x >x; %s" % (name, words[0]) for name, words in ENDS.items()}, start=False)
        world.pollers.append(suite.Process("mi_system_remote.py", ["poll", "--ini", ini], folder, python=str(plain)))
        for name, (_words, by_name, by_pattern, code) in ENDS.items():
            for asked, wanted in (("x", by_name), ("*", by_pattern)):
                done = world.workflow("run", SITE, name, "--out", asked, "--json", "--to", str(tmp_path / "to"))
                told = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
                assert done.returncode == wanted and (code in told["verdicts"] or code == "missing"), (name, asked, done.stdout)
                assert sorted(os.listdir(str(tmp_path / "to"))) == sorted(suite.LOGS)
    finally:
        world.close()
        for one in (tmp_path / "world").glob("poller/base/*"):
            one.is_symlink() or one.chmod(0o700)


def test_a_directory_is_removed_however_deep_and_read_only_it_is(tmp_path):
    top = os.fsencode(str(tmp_path / "work"))
    os.mkdir(top)
    here = os.open(top, os.O_RDONLY)
    for turn in range(3000):
        os.mkdir(b"dddddddd", dir_fd=here)
        below = os.open(b"dddddddd", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    for name in (b"cache/mod/a", b"cache/b"):
        os.makedirs(os.path.dirname(os.path.join(top, name)), exist_ok=True)
        open(os.path.join(top, name), "w").close()
    (tmp_path / "else").mkdir()
    os.symlink(os.fsencode(str(tmp_path / "else")), os.path.join(top, b"cache", b"link"))
    subprocess.check_call(["chmod", "-R", "a-w", os.path.join(top, b"cache")])
    code = "import sys; sys.path.insert(0, %r); import mi_system_remote as m; print(m.remove_tree(%r))" % (suite.ROOT, top)
    words = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(words + [suite.PYTHON, "-B", "-c", code], stdout=subprocess.PIPE)
    assert done.stdout == b"[]\n" and not os.path.exists(top) and (tmp_path / "else").exists()


def test_what_a_killed_cleaning_has_left_is_removed_by_a_process_of_the_same_number(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)       # as in a container, at each start
    for place in ["a/b/c/d/x", "e/f/g/x"] + [".removed.7.%d/x/y" % n for n in range(60)]:
        os.makedirs(str(tmp_path / "work" / place))
    assert gate.remove_tree(os.fsencode(str(tmp_path / "work"))) == [] and not (tmp_path / "work").exists()


def test_what_goes_while_a_directory_is_removed_is_no_failure(tmp_path, monkeypatch):
    for name in ("a", "b/c", "b/d/e"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("x")
    list_of = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: list_of(path) + [b"was here"])
    assert gate.remove_tree(os.fsencode(str(tmp_path / "work"))) == [] and not (tmp_path / "work").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="as root only: another user's directory")
def test_another_users_empty_directories_are_removed_however_deep_and_what_is_in_the_others_is_named(tmp_path):
    for name in ("a/b/empty", "a/b/full/x", "empty"):
        (tmp_path / "work" / name).mkdir(parents=True)
        os.chown(str(tmp_path / "work" / name), 65534, 65534)
    os.chown(str(tmp_path / "work/a/b/full"), 65534, 65534)
    code = "import sys; sys.path.insert(0, %r); import mi_system_remote as m; print(m.remove_tree(%r))" % (suite.ROOT, os.fsencode(str(tmp_path / "work")))
    done = subprocess.run(["setpriv", "--inh-caps=-all", "--bounding-set=-all", suite.PYTHON, "-B", "-c", code], stdout=subprocess.PIPE)
    left = [top for top, folders, names in os.walk(str(tmp_path / "work")) if not folders]
    assert [os.path.basename(os.path.dirname(top)) + "/" + os.path.basename(top) for top in left] == ["full/x"], left
    assert left[0].encode() + b": " in done.stdout and b"/empty: " not in done.stdout, done.stdout


class Fake(gate.Calculation):
    """A calculation that is a journal only."""

    def __init__(self, name, *journal, t=1):
        self.name, self.accept_id, self.journal, self.order = name, name[:36], list(journal), {"t": t}
        self.run = argparse.Namespace(began=[], last=lambda what: what in self.run.began)


def test_what_was_kept_from_leaving_is_not_cleaned_before_its_time():
    now = time.time()
    for age, stays, stuck, goes in ((10, 0, None, True), (10, 2, None, False), (100, 2, None, True), (10, 0, now - 5, False), (10, 0, now - 90000, True)):
        journal = [{"what": "delivered", "t": now - age}]
        journal[0].update({"stays": stays} if stays else {})
        journal += [{"what": "cannot be removed", "t": stuck}] if stuck else []
        assert Fake("x" * 36, *journal).may_be_removed(5, 50) == goes, (age, stays, stuck)
    assert not Fake("x" * 36, {"what": "kept", "t": 0}).may_be_removed(0, 0) and not Fake("x" * 36).may_be_removed(0, 0)


def test_what_is_handed_out_twice_at_once_waits_for_the_first():
    ident = "0" * 36
    first, second = Fake(ident, t=1), Fake(ident + ".2", t=2)
    poller = type("P", (), {"under_way": {first.name: first, second.name: second}, "slots": threading.Condition(), "wait_for_twin": gate.Poller.wait_for_twin})()
    over = []
    for calc in (second, first):
        threading.Thread(target=lambda calc=calc: (poller.wait_for_twin(calc), over.append(calc.name)), daemon=True).start()
    wait_until(lambda: over == [first.name])
    time.sleep(0.3)
    assert over == [first.name]
    first.run.began.append("starting")
    wait_until(lambda: over == [first.name, second.name])


def test_a_mark_in_an_older_process_does_not_make_it_part_of_a_calculation():
    other = subprocess.Popen(["sleep", "60"], env={"MI_RUN": "forged.1", "PATH": os.environ["PATH"]})
    try:
        with open("/proc/%d/stat" % other.pid) as text:
            start = int(text.read().rpartition(") ")[2].split()[19])
        assert other.pid in {pid for pid, begun in gate.command_processes(0, b"MI_RUN=forged.1", set(), start)}
        assert other.pid not in {pid for pid, begun in gate.command_processes(0, b"MI_RUN=forged.1", set(), start + 1)}
    finally:
        other.kill()
        other.wait()


def test_a_process_is_found_by_its_mark_also_while_it_becomes_another_program(tmp_path):
    again = tmp_path / "again"
    again.write_text('#!/bin/sh\nexec "$0"\n')
    again.chmod(0o755)
    marked, bare = (subprocess.Popen(words, env=env) for words, env in (([str(again)], {"MI_RUN": "a.1"}), (["/bin/sleep", "60"], {})))
    try:
        top = b"/proc/%d/" % marked.pid
        looks = [gate.has_mark(top, b"MI_RUN=a.1") for _turn in range(2000)]
        assert all(looks), "%d of 2000 did not see it" % looks.count(False)
        assert not any(gate.has_mark(top, b"MI_RUN=a.2") for _turn in range(50))
        begun = time.monotonic()
        assert not any(gate.has_mark(b"/proc/%d/" % bare.pid, b"MI_RUN=a.1") for _turn in range(300))
        assert time.monotonic() - begun < 5, "what has no environment is not waited for"
    finally:
        for process in (marked, bare):
            process.kill()
            process.wait()


def test_a_command_that_is_taken_out_of_the_ini_is_not_run_any_more_and_a_broken_ini_changes_nothing(tmp_path):
    world = suite.World(tmp_path / "world", tls=False, commands=["one", "two"]).start()
    try:
        both = {name: "match = %s\nargv = /bin/true\n" % name for name in ("one", "two")}
        poller = world.poller(both)
        ini = os.path.join(world.folder, "poller", "poller.ini")
        wait_until(lambda: " polling " in poller.text())
        with open(ini) as text:
            before = text.read()
        with open(ini, "a") as out:
            out.write("[command three]\nargv = relative\n")
        wait_until(lambda: "the old ini stays in force" in poller.text())
        assert world.workflow("run", SITE, "two", cwd=str(tmp_path)).returncode == 0
        with open(ini, "w") as out:
            out.write(before.replace("[command two]\nmatch = two\nargv = /bin/true\n", ""))
        wait_until(lambda: "reload ini=" in poller.text())
        assert world.workflow("run", SITE, "two", cwd=str(tmp_path)).returncode == 77
        assert world.workflow("run", SITE, "one", cwd=str(tmp_path)).returncode == 0
    finally:
        world.close()


def test_room_is_there_only_if_keep_free_stays_with_what_is_about_to_come(tmp_path):
    disk = os.statvfs(str(tmp_path))
    poller = type("P", (), {"base": os.fsencode(str(tmp_path)), "room_left": gate.Poller.room_left})()
    poller.keys = {"keep_free": disk.f_bavail * disk.f_frsize - (256 << 20)}
    assert not poller.room_left()[1] and not poller.room_left(1 << 20)[1] and poller.room_left(1 << 30)[1]
    poller.keys = {"keep_free": 1.0}
    assert poller.room_left()[1]


@pytest.mark.parametrize("shape", ["*/" + "a" * 255 + "/x", "*/" + "é" * 127 + "?/x", "*//", "d/" + "*" * 255 + "/x"])
def test_no_pattern_that_may_be_asked_for_keeps_a_result_from_being_delivered(tmp_path, shape):
    folder = tmp_path / "d" / ("a" * 255)
    folder.mkdir(parents=True)
    (folder / "x").write_text("x")
    found = collected(tmp_path, patterns=(shape,))[0]
    assert [result.name for result in found.found] == ["d/%s/x" % ("a" * 255)] * (shape[2] in "a*") and not found.verdicts


def test_what_is_kept_in_little_memory_comes_out_as_it_went_in():
    tree, other, many = object(), object(), gate.Results()
    digest, sums = hashlib.sha256(b"x").digest(), bytes(range(96))
    pairs = [(gate.Result(gate.JudgedBytes(*place), size, name, digest, x, mtime), mark)
             for place, size, name, x, mtime, mark in (
                 ((tree, b"a", 5, digest), 5, "a", False, 1700000000123456789, (2 ** 64 - 1, 2 ** 64 - 1, 5, 1700000000123456789, 7)),
                 ((other, b"d/" * 40000 + "é".encode(), 0, digest), 0, "link é", True, -1, (0, 0, 0, -1, -2)),
                 ((tree, b"big", 2 * gate.PIECE + 1, sums), 2 * gate.PIECE + 1, "big", False, 2 ** 70, (1, 2, 2 * gate.PIECE + 1, 2 ** 70, 2 ** 70)))]
    pairs.append((gate.Result(None, 0, "empty/", digest, False, 3), (0, 0, 0, 3, 0)))
    pairs.append((gate.Result(b"real\xff", 9, "far", b"", True, 4), (0, 0, 9, 4, 0)))
    for result, mark in pairs:
        many.append(result, mark)

    def told(result):
        source = result.source
        return result[1:] + ((source.tree, source.real, source.size, source.sums) if isinstance(source, gate.JudgedBytes) else source,)

    assert [(told(result), mark) for mark, result in many.with_stamps()] == [(told(result), mark) for result, mark in pairs]
    assert list(map(told, many)) == [told(many[place]) for place in range(len(many))]
    assert list(many.names()) == [result.name for result, mark in pairs]
    many.leave_out({"big", "far"})
    many.sort(lambda name: name)
    assert [result.name for result in many] == ["a", "empty/", "link é"]
    assert max(map(sys.getsizeof, many.rows[:2])) < 150
