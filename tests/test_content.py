"""What the rules about content find of what is planted, through both doors of the gate: refused, held, or told as not stopped."""
import hashlib
import json
import os
import random
import subprocess

import pytest

import plants
import suite
from ssh_door import Far
from suite import PYTHON, SITE
from test_rules import DOORS, settled

gate = DOORS["poller"]
DEFAULTS = {key: row[1] for key, row in gate.gate_keys()["outbound"].items()}


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """The secret of this host: {"secret": its path, "index", "sum", "bytes"}."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "steel.csv").write_bytes(plants.secret_table())
    made = suite.run("mi_system_remote.py", "scan", "--index", str(folder / "steel.pieces"), str(folder / "steel.csv"), "--ini", ini_of(folder, ""))
    assert made.returncode == 0 and os.stat(str(folder / "steel.pieces")).st_mode & 0o777 == 0o600, made.stderr
    data = plants.secret_table()
    return {"secret": str(folder / "steel.csv"), "index": str(folder / "steel.pieces"), "sum": hashlib.sha256(data).hexdigest(), "bytes": data}


def ini_of(folder, lines):
    """A poller's ini with these lines of [outbound]."""
    path = os.path.join(str(folder), "rules.ini")
    with open(path, "w", encoding="utf-8") as out:
        out.write("[poller]\nsite = u\nurl = https://localhost:1\ncalc_base = %s/base\n[command a]\nargv = /bin/true\n[outbound]\n%s\n" % (folder, lines))
    os.chmod(path, 0o600)
    return path


@pytest.fixture(scope="module")
def long(request):
    """Was --long given?"""
    return request.config.getoption("--long")


def word_of(door, folder, lines, hidden, does):
    """What becomes of what a command leaves: the plants' word, and why (for the owner)."""
    os.makedirs(str(folder))
    ini = ini_of(folder, lines % hidden)
    module, rules, ident, control = settled(door, folder, ini, [])
    work, before = os.path.join(str(folder), ident), os.getcwd()
    os.chdir(work)
    try:
        does(hidden["bytes"])
    finally:
        os.chdir(before)
    said, notes = {}, lambda name, why, aloud: said.update({name: why})
    found = module.Collector(rules["outbound"], notes)
    for name in ("stdout", "stderr"):
        if os.path.exists(os.path.join(work, name)):
            os.rename(os.path.join(work, name), os.path.join(control, name))
    logs, tree = module.ResultTree(os.fsencode(control)), module.ResultTree(os.fsencode(work))
    for name in ("stdout", "stderr"):
        try:
            found.take_log(logs, "log-of-" + name, os.fsencode(name))
        except module.Stays as stays:
            found.keep_here("log-of-" + name, stays, False)
    found.take_matching(tree, ["**", "*/"])
    found.in_order()
    logs.close()
    tree.close()
    names = set(found.found.names()) | set(found.folders.names())
    assert plants.CANARY not in str(found.verdicts), "a name that is refused is told"
    word = plants.HELD if found.held else plants.STOPPED if found.verdicts else plants.NOT_STOPPED
    assert word != plants.STOPPED or set(found.verdicts) == {"refused"} and not {"r.bin", "r.csv"} & names, (found.verdicts, names)
    return word, said


@pytest.mark.parametrize("door", sorted(DOORS))
def test_what_is_planted_is_stopped_held_or_not_as_the_table_says(door, tmp_path, hidden):
    wrong = []
    for plant in plants.PLANTS:
        word, said = word_of(door, tmp_path / plant.number, plant.rules, hidden, plant.does)
        if word != plant.word:
            wrong.append((plant.number, plant.way, "wanted", plant.word, "got", word, said))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("door", sorted(DOORS))
def test_what_is_clean_leaves_under_the_same_rules(door, tmp_path, hidden):
    wrong = []
    for number, (does, lines) in enumerate(plants.CLEAN):
        word, said = word_of(door, tmp_path / str(number), lines, hidden, does)
        if word != plants.NOT_STOPPED:
            wrong.append((number, lines, word, said))
    assert not wrong, wrong


# ---- false alarms, and leaks that nobody has written down beforehand

def scanned(scanner, folder, data):
    """What the scanning process says of these bytes: "passes", or code and why."""
    path = os.path.join(str(folder), "scanned")
    with open(path, "wb") as out:
        out.write(data)
    with open(path, "rb") as text:
        try:
            scanner.file("scanned", "", text.fileno(), len(data))
            return "passes"
        except gate.Stays as stays:
            return "%s: %s" % (stays.code, stays)


def test_of_200_leaks_of_a_table_at_least_95_in_100_are_found(tmp_path, hidden):
    scanner, dice = gate.Scanner(dict(DEFAULTS, deny_pieces=[hidden["index"]])), random.Random(19)
    found = [(how, scanned(scanner, tmp_path, data)) for how, data in (plants.random_leak(hidden["bytes"], dice) for _turn in range(200))]
    scanner.close()
    missed = [row for row in found if row[1] == "passes"]
    print("of 200 leaks %d were found" % (200 - len(missed)))
    assert len(missed) <= 10, (len(missed), missed)
    assert not [row for row in found if row[1].startswith("held")]


def solved(folder, secret, number):
    """What CalculiX leaves of a bar with the table's curve: [bytes] of each file and of its output."""
    import importlib.util
    spec = importlib.util.spec_from_file_location("stress", os.path.join(suite.HERE, "calculix", "stress.py"))
    stress = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stress)
    os.makedirs(folder)
    strains, stresses = [list(map(float, column)) for column in plants.columns(secret)[:2]]
    first = number % 300
    curve = [(high, strain - strains[first]) for high, strain in zip(stresses[first:first + 60:3], strains[first:first + 60:3])]
    before = os.getcwd()
    os.chdir(folder)
    try:
        stress.write_input("bar.inp", {"young": 205000.0 + 37 * number, "poisson": 0.29}, curve, 100 * (curve[0][0] + 1.5 + number % 13))
        with open("stdout", "wb") as out:
            subprocess.run(["ccx", "-i", "bar"], stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=60)
        stress.write_results(stress.read_tables("bar.dat"))
        os.unlink("bar.inp")                           # it has the curve
        return [open(name, "rb").read() for name in sorted(os.listdir("."))]
    finally:
        os.chdir(before)


def test_results_of_a_solver_that_uses_the_table_pass(tmp_path, hidden, long):
    suite.needs("ccx")
    scanner, alarms, count = gate.Scanner(dict(DEFAULTS, deny_pieces=[hidden["index"]])), [], 0
    for number in range(200 if long else 4):
        said = [scanned(scanner, tmp_path, data) for data in solved(str(tmp_path / str(number)), hidden["bytes"], number)]
        count += len(said)
        alarms += [(number, one) for one in said if one != "passes"]
    scanner.close()
    print("%d files of a solver, %d alarms" % (count, len(alarms)))
    assert count >= 6 * (200 if long else 4) and len(alarms) * 100 <= count, alarms


# ---- each defence is needed

def looked_at(text, plant, folder, hidden):
    """What a looking program with this text says of a plant: its code, or "passes"."""
    names = {"__name__": "content"}
    exec(compile(text, "content", "exec"), names)
    rules = gate.read_ini(ini_of(folder, plant.rules % hidden), gate.INI_KEYS)["outbound"]
    before, code = os.getcwd(), "passes"
    os.makedirs(os.path.join(str(folder), "work"))
    os.chdir(os.path.join(str(folder), "work"))
    try:
        plant.does(hidden["bytes"])
        for name in os.listdir("."):
            with open(name, "rb") as data:
                size = os.fstat(data.fileno()).st_size
                words = {"text": name, "what": "its name", "length": size, "kind": gate.declared_type(rules, name, False)}
                names["Scan"](dict(rules, piece=gate.PIECE)).answer(words, [data.fileno()])
    except names["Hit"]:
        code = plants.STOPPED
    except Exception:
        code = plants.HELD
    finally:
        os.chdir(before)
    return code


NEEDED = [                     # (number of a plant, a line of the looking program, and what stands there instead)
    ("1", "        if whole.hexdigest() in self.rules[\"deny_sums\"]:\n", "        if False:\n"),
    ("3", "            found = shape.search(text) if needed in lower else None\n", "            found = None\n"),
    ("4", "        self.deeper(depth)\n        source.seek(0)\n", "        return\n"),
    ("4e", "            machine = make()\n", "            return\n"),
    ("4f", "        if head.startswith(magic) if word in (\"gzip\", \"zip\") else shape.match(head):\n", "        if shape.match(head):\n"),
    ("4g", "    if is_deflated(head):\n", "    if False:\n"),
    ("5c", "    for begin in range(4):\n", "    for begin in range(1):\n"),
    ("6c", "    for begin in range(2):\n", "    for begin in range(1):\n"),
    ("34h", "        between(source, at, size)\n", ""),
    ("34k", "            between(source, at, row.offset_data)\n", ""),
    ("5", "            self.look(io.BytesIO(data), place, depth + 1)\n", "            pass\n"),
    ("7c", "    for encoding in ENCODINGS:\n", "    for encoding in ENCODINGS[:4]:\n"),
    ("7b", "    for encoding in ENCODINGS:\n", "    for encoding in ENCODINGS[:2]:\n"),
    ("7e", "        yield \"wide characters\", ", "        \"\", "),
    ("9b", "            if self.unpacked > self.room:\n", "            if False:\n"),
    ("34e", "            within = within or packed_within(window, start)\n", ""),
    ("10e", "        if word is None or word not in self.rules[\"unwrap\"] or word not in UNPACKERS:\n            raise Held(", "        if word is None or word not in UNPACKERS:\n            return\n            raise Held("),
    ("12b", "    for at in range(len(values) - RUN + 1):\n", "    for at in ():\n"),
    ("13", "            yield b\"ratios\", \" \".join(between).encode()\n", "            pass\n"),
    ("22", "        self.look(io.BytesIO(words[\"text\"].encode(\"utf-8\", \"replace\")), words[\"what\"], 0)\n", ""),
    ("34", "        if tail[:4] != b\"PK\\5\\6\" or at + struct", "        if at < 0 and at + struct"),
    ("34b", "    if source.read(1):\n", "    if False:\n"),
    ("34l", "            if end - begin - row.compress_size not in ((12, 16, 20, 24) if row.flag_bits & 8 else (0,)):\n", "            if False:\n"),
    ("34f", "        if any(block.strip(b\"\\0\") for block in blocks_of(source)):\n", "        if False:\n"),
    ("36", "    if (\"trim\" in limits or word == \"csv\") and text != text.strip() or", "    if"),
    ("36b", "    if UNSEEN.search(text.decode()) or", "    if"),
    ("36c", "    if \"digits\" in limits and len(digits) > int(limits[\"digits\"]):\n", "    if False:\n"),
    ("36d", "        if len(fields) != int(limits.get(\"columns\", len(fields))):\n            raise", "        if len(fields) == 1:\n            return\n            raise"),
]


def test_each_defence_of_the_looking_program_is_needed(tmp_path, hidden):
    wrong = []
    for row, (number, line, instead) in enumerate(NEEDED):
        plant = next(plant for plant in plants.PLANTS if plant.number == number)
        assert gate.LOOKING.count(line) == 1, (number, line, gate.LOOKING.count(line))
        for turn, (text, wanted) in enumerate(((gate.LOOKING, plant.word), (gate.LOOKING.replace(line, instead), "passes"))):
            os.makedirs(str(tmp_path / ("%d.%d" % (row, turn))))
            found = looked_at(text, plant, tmp_path / ("%d.%d" % (row, turn)), hidden)
            if found != wanted:
                wrong.append((number, plant.way, "wanted", wanted, "got", found, instead))
    assert not wrong, "\n".join(map(str, wrong))


# ---- whatever keeps it from looking, nothing leaves

def test_a_process_that_ends_while_it_looks_holds_what_it_looked_at_and_the_next_one_goes_on(tmp_path):
    scanner = gate.Scanner(dict(DEFAULTS, deny_content=["x"], scan_timeout=20.0))
    assert scanned(scanner, tmp_path, b"abc") == "passes"
    scanner.process.kill()
    assert scanned(scanner, tmp_path, b"abc").startswith("held: the scan failed")
    assert scanned(scanner, tmp_path, b"abc") == "passes" and scanned(scanner, tmp_path, b"axc").startswith("refused")
    scanner.close()


def test_memory_that_a_look_would_need_beyond_its_limit_is_held(tmp_path):
    import lzma
    scanner = gate.Scanner(dict(DEFAULTS, deny_content=["secret"], scan_timeout=60.0))
    packed = lzma.compress(b"harmless", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30, "preset": 0}])
    assert scanned(scanner, tmp_path, packed).startswith("held")
    assert scanned(scanner, tmp_path, b"fine") == "passes"
    scanner.close()


def test_an_index_that_is_stale_open_to_others_or_broken_holds_all_and_a_new_one_counts_at_once(tmp_path, hidden):
    secret, index = tmp_path / "s.csv", tmp_path / "s.pieces"
    secret.write_bytes(hidden["bytes"])

    def made():
        done = suite.run("mi_system_remote.py", "scan", "--index", str(index), str(secret), "--ini", ini_of(tmp_path, ""))
        assert done.returncode == 0, done.stderr

    made()
    scanner = gate.Scanner(dict(DEFAULTS, deny_pieces=[str(index)]))
    assert scanned(scanner, tmp_path, b"fine") == "passes"
    os.utime(str(secret))
    assert scanned(scanner, tmp_path, b"fine").startswith("held: deny_pieces") and scanner.text("a reason")
    made()
    assert scanned(scanner, tmp_path, b"fine") == "passes" and scanned(scanner, tmp_path, hidden["bytes"]).startswith("refused")
    index.chmod(0o640)
    assert "chmod 600" in scanned(scanner, tmp_path, b"fine")
    index.chmod(0o600)
    index.write_bytes(index.read_bytes()[:-3])
    assert scanned(scanner, tmp_path, b"fine").startswith("held: deny_pieces")
    os.unlink(str(index))
    assert scanned(scanner, tmp_path, b"fine").startswith("held: deny_pieces")
    scanner.close()


def test_what_tells_too_little_and_what_is_in_a_sample_is_in_no_index(tmp_path, hidden):
    (tmp_path / "s.txt").write_bytes(b"** a line that stands in every deck of this site\n" + b"0.000000E+00 0.000000E+00\n" * 99
                                     + b"".join(b"%d %d\n" % (n, 2 * n) for n in range(99)) + hidden["bytes"])
    (tmp_path / "open.txt").write_bytes(b"** a line that stands in every deck of this site\n")
    done = suite.run("mi_system_remote.py", "scan", "--index", str(tmp_path / "i"), str(tmp_path / "s.txt"), "--but", str(tmp_path / "open.txt"), "--ini", ini_of(tmp_path, ""))
    scanner = gate.Scanner(dict(DEFAULTS, deny_pieces=[str(tmp_path / "i")]))
    assert done.returncode == 0 and hidden["bytes"][100:140] not in (tmp_path / "i").read_bytes()
    for data in ((tmp_path / "open.txt").read_bytes() * 3, b"0.000000E+00 0.000000E+00\n" * 9, "\n".join(map(str, range(0, 500, 2))).encode()):
        assert scanned(scanner, tmp_path, data) == "passes"
    assert scanned(scanner, tmp_path, hidden["bytes"][200:400]).startswith("refused")
    scanner.close()


def test_a_reason_that_a_rule_keeps_is_withheld_and_no_process_is_started_where_there_are_no_rules(monkeypatch):
    rules = dict(DEFAULTS, deny_content=["CANARY-[0-9]+"])
    assert gate.outward(rules, "pre: CANARY-4711") == "withheld" and gate.outward(rules, "timeout") == "timeout"
    monkeypatch.setattr(gate.subprocess, "Popen", lambda *words, **more: pytest.fail("a process is started"))
    assert gate.outward(DEFAULTS, "CANARY-4711") == "CANARY-4711" and gate.Collector(DEFAULTS, None).scanner is None


# ---- the whole way

def test_over_the_relay_a_planted_secret_stays_and_neither_rule_nor_text_is_told(make_world, hidden):
    world = make_world(commands=["plant"]).start()
    poller = world.poller({"plant": "match = plant\nargv = %s\n  %s\n  {parameters}\nargument.1 = [0-9a-z]+\nargument.2 = %s" % (
        PYTHON, plants.__file__, hidden["secret"])})
    with open(os.path.join(world.folder, "poller", "poller.ini"), "a") as out:
        out.write("[outbound]\ndeny_pieces = %(index)s\ndeny_content = CANARY-[0-9]+\n" % hidden)
    poller.stop()
    poller = suite.Process("mi_system_remote.py", ["poll", "--ini", os.path.join(world.folder, "poller", "poller.ini")], world.folder)
    world.pollers.append(poller)
    for number in ("8", "19", "22"):
        done = world.workflow("run", SITE, "plant", "--param", "%s %s" % (number, hidden["secret"]), "--out", "r.bin", "*", cwd=os.path.join(world.folder, number))
        assert done.returncode == 65, done
        told = done.stdout + done.stderr + json.dumps(world.rows("SELECT refused, verdicts, reason FROM calculations"))
        assert "deny_" not in told and "CANARY" not in told and "pieces" not in told, told
        here = b"".join(open(os.path.join(top, name), "rb").read() for top, _folders, names in os.walk(os.path.join(world.folder, number)) for name in names)
        assert hidden["bytes"][300:360] not in here and b"CANARY" not in here
    assert poller.text().count("deny_content line 1") == 3, "the owner's log names the rule"


def test_what_a_guard_let_out_stays_once_a_new_index_knows_it(tmp_path, hidden):
    def index_of(data):
        (tmp_path / "s").write_bytes(data)
        done = suite.run("mi_system_remote.py", "scan", "--index", str(tmp_path / "i"), str(tmp_path / "s"), "--ini", ini_of(tmp_path, ""))
        assert done.returncode == 0, done.stderr

    index_of(os.urandom(3000))
    far = Far(tmp_path / "far", "[outbound]\ndeny_pieces = %s\n" % (tmp_path / "i"))
    ident = far.ended(data=hidden["bytes"])
    assert far.get(ident, "b") == hidden["bytes"]
    index_of(hidden["bytes"])
    assert far.get(ident, "b") is None and far.get(ident, "r.txt") == b"result\n"


def test_with_dry_run_a_plant_leaves_and_the_log_of_the_run_says_so_each_time(tmp_path, hidden):
    for door in sorted(DOORS):
        word, said = word_of(door, tmp_path / door, "deny_pieces = %(index)s\ndry_run = yes", hidden, plants.result(bytes))
        assert word == plants.NOT_STOPPED and said["r.bin"].startswith("dry_run: refused: deny_pieces") and said[""].startswith("dry_run: ")


def test_scan_and_what_leaves_say_what_would_happen_to_files_and_by_which_rule(tmp_path, hidden):
    ini, folder = ini_of(tmp_path, "deny_pieces = %(index)s\ntypes = *.txt text\n  *.csv any\ndry_run = yes" % hidden), tmp_path / "r"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"fine\n")
    (folder / "b.csv").write_bytes(hidden["bytes"][500:2500])
    (folder / "c.bin").write_bytes(b"x")
    for words in (["scan", str(folder / "a.txt"), str(folder / "b.csv"), str(folder / "c.bin")], ["what-leaves", str(folder)]):
        done = suite.run("mi_system_remote.py", *words, "--json", "--ini", ini)
        told = json.loads(done.stdout)
        assert done.returncode == 65 and list(told["leaves"]) == [str(folder / "a.txt")] and list(told["held"]) == [str(folder / "c.bin")], (done, told)
        assert told["stays"][str(folder / "b.csv")].startswith("deny_pieces " + hidden["index"])
    done = suite.run("mi_system_remote.py", "scan", str(folder / "a.txt"), "--ini", ini)
    assert done.returncode == 0 and "a.txt" in done.stdout
    assert suite.run("mi_system_remote.py", "scan", str(folder / "none"), "--ini", ini).returncode == 66


def test_a_gibibyte_of_text_is_looked_at_at_60_megabytes_a_second_in_little_memory(tmp_path, long):
    if not long:
        pytest.skip("--long")
    rows = b"".join(b"%10d %15.6E %15.6E %15.6E node stress output\n" % (n, n / 7, n * 0.37, 1e5 / (n + 1)) for n in range(150000))
    scanner = gate.Scanner(dict(DEFAULTS, deny_sums=["0" * 64], deny_content=[
        "CONFIDENTIAL", "SECRET-[0-9]+", "(?i)internal use only", "licen[cs]e server", "/home/[a-z]+/", "27000@[a-z.]+", "社外秘", "[A-Z]{3}-[0-9]{4}-X",
        "(?i)project[- ]blue", "steel_(?:alpha|beta)_v[0-9]"]))
    path = tmp_path / "big.txt"
    with open(str(path), "wb") as out:
        while out.tell() < 1 << 30:
            out.write(rows)
    with open(str(path), "rb") as text:
        scanner.file("big.txt", "", text.fileno(), os.fstat(text.fileno()).st_size)
    with open("/proc/%d/stat" % scanner.process.pid) as text:
        spent = sum(map(int, text.read().rpartition(") ")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    with open("/proc/%d/status" % scanner.process.pid) as text:
        peak = int(text.read().partition("VmHWM:")[2].split()[0])
    scanner.close()
    print("%.0f MB/s of processor time, %d KiB" % (os.stat(str(path)).st_size / spent / 1e6, peak))
    assert os.stat(str(path)).st_size / spent > 60e6 and peak < 64 << 10
