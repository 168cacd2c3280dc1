"""The form of the suite: each script stands alone, on the oldest and the newest Python; what two scripts share is the same to the byte."""
import ast
import collections
import glob
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import blocks as shared_blocks
import pytest
import suite

SCRIPTS = sorted(os.path.basename(path) for path in glob.glob(os.path.join(suite.ROOT, "*.py")))
TOP = {"mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py", "execute_remote_command.py", "execute_remote_side_program_ssh.sample.sh",
       "mi_distributed_computing_assist.ini", "tests", "README.md", ".ci", ".gitignore"}
HOUSES = ("mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py", "execute_remote_command.py")       # own rooms stand first, and are narrow
DECIDERS = ("command_of", "commands_of", "unfit", "shell_words", "permit_command", "permit_input", "permit_results", "command_env", "leaving_kinds",
            "rule_matcher", "rule_against_name", "rule_against_size", "rule_against_live", "resolve", "link_target", "resolve_dots", "apply_rule", "keep_here",
            "admit_name", "take", "take_folder", "check_limits", "judge", "judge_hard_links",
            "judged_sums", "sums_or_hold", "sums_of_file", "declared_type", "may_match_below", "take_named", "take_matching", "take_found", "entry",
            "permit", "note_starting", "collect", "collect_logs", "keep_all", "left_overs", "works_in", "open_to_others", "writable_by_others",
            "changeable_options", "submit_options", "changed_options", "check_options")
DOORKEEPERS = ("check_request", "permitted_verb", "check_rules", "original_words", "guard_rules", "permitted_command", "permit_inputs", "begin_putting",
               "open_folder", "open_input", "count_bytes", "owners_key", "let_out", "live_log", "judged_result", "read_piece", "why_kept")
FIRST = ("shared: gate", "shared: watch", "shared: content", "shared: hold", "shared: audit")               # what an owner reads a script for stands before its own rooms
BLOCK = shared_blocks.BLOCK


def text_of(name):
    """A script's text."""
    with open(suite.script(name), encoding="utf-8") as text:
        return text.read()


def tree_of(name):
    """A script's syntax tree."""
    return ast.parse(text_of(name))


def pythons():
    """The oldest and the newest Python here, and the one that the tests use."""
    found = {}
    for path in glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3")) + glob.glob("/usr/bin/python3.*") + [sys.executable, suite.PYTHON]:
        if re.search(r"python3(\.\d+)?$", path) and os.access(path, os.X_OK):
            done = subprocess.run([path, "-I", "-S", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            version = tuple(int(part) for part in done.stdout.decode().strip().split(".")) if done.returncode == 0 else (0, 0)
            if version >= (3, 6):
                found.setdefault(version, path)
    return {found[version] for version in (min(found), max(found))} | {suite.PYTHON}


def assert_version(name, said):
    """--version: the sum of the file, and lines and sum of each shared block, as `sed | sha256sum` has them."""
    with open(suite.script(name), "rb") as text:
        lines = text.read().splitlines(True)
    first, *rest = said.splitlines()
    assert re.match(r"%s \S+ protocol 2 \(1\) sha256 %s\Z" % (name.replace(".py", ""), hashlib.sha256(b"".join(lines)).hexdigest()), first)
    rows = [re.match(r"  (\w+) +lines +(\d+) to +(\d+) sha256 ([0-9a-f]{64})\Z", row).groups() for row in rest]
    assert [row[0] for row in rows] == [found.group(1) for found in BLOCK.finditer(text_of(name))]
    for block, begin, end, told in rows:
        part = lines[int(begin) - 1:int(end)]
        assert (part[0], part[-1]) == (b"# ==== shared: %s ====\n" % block.encode(), b"# ==== end shared ====\n")
        assert told == hashlib.sha256(b"".join(part)).hexdigest(), block


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_copied_alone_prints_its_help_and_version(name, tmp_path):
    shutil.copy(suite.script(name), str(tmp_path))
    for python in sorted(pythons()):
        for word in ("--help", "--version"):
            done = subprocess.run(["env", "-i", "LANG=C", "PATH=" + os.environ["PATH"], python, "-I", "-S", name, word], cwd=str(tmp_path), timeout=20,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert (done.returncode, done.stderr) == (0, b""), (python, done.stderr.decode()[-300:])
            if word == "--help":
                assert ast.get_docstring(tree_of(name)).splitlines()[0] in done.stdout.decode("utf-8"), python
            else:
                assert_version(name, done.stdout.decode())
    assert [entry for entry in os.listdir(str(tmp_path)) if entry != "__pycache__"] == [name]


def subcommands(name):
    """The words of a script."""
    return sorted(suite.module(name).SUBCOMMANDS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_word_has_a_help_that_names_the_program_and_what_it_does_not_know_is_one_line_and_64(name, tmp_path):
    words = subcommands(name)
    assert len(words) >= 7, words
    for word in words[:2]:                             # of the others: the next test, in one process
        for lang, example in (("C.UTF-8", "example"), ("ja_JP.UTF-8", "例")):
            done = suite.run(name, *(word.split() + ["--help"]), cwd=str(tmp_path), env=suite.clean_env(LANG=lang))
            assert (done.returncode, done.stderr) == (0, ""), (word, done)
            assert re.search(r"^usage: %s %s( |$)(.*\n)*^%s: %s %s\b" % (re.escape(name), word, example, re.escape(name), word), done.stdout, re.M), (word, done)
    for word in words[:2] + ["nonsense"]:
        done = suite.run(name, *(word.split() + ["--nonsense"] * (word in words)), cwd=str(tmp_path))
        assert done.returncode == 64 and suite.one_line(done.stderr), (word, done)


def typed_in_docstring(name):
    """(word of SUBCOMMANDS or what stands in its place, its options) of each command line in a script's docstring, `A | B` taken apart."""
    words, usage = suite.module(name).SUBCOMMANDS, ast.get_docstring(tree_of(name)).partition("\ncontents")[0]
    for entry in re.findall(r"^(?: {4,7}|usage: )%s (.+(?:\n {20,40}\S.*)*)" % re.escape(name), usage, re.M):
        before = []
        for part in re.split(r" \| (?![^\[]*\])", re.split(r"   |(?<=\S)\n +(?=[a-z])", re.sub(r"(?<=\])\n +(?=\[)", " ", entry))[0]):
            typed = [one.strip("[]") for one in part.split()]
            found = [" ".join(one) for one in (before[:1] + typed[:1], typed[:2], typed[:1]) if " ".join(one) in words]
            before = before if before and found and found[0].startswith(before[0]) else typed
            yield (found or typed)[0], re.findall(r"--[a-z-]+", part)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_usage_in_the_docstring_has_each_word_and_gives_none_an_option_that_it_does_not_take(name):
    module, said = suite.module(name), list(typed_in_docstring(name))
    assert not set(module.SUBCOMMANDS) - {word for word, _options in said}, "not in the docstring"
    strange = {word for word, _options in said} - set(module.SUBCOMMANDS)
    assert all(re.match(r"[A-Z]|client_", word) for word in strange), strange        # the fielded words
    for word, options in said:
        taken = module.SUBCOMMANDS[word][4].split() + " ".join(module.EVERY).split() if word in module.SUBCOMMANDS else []
        assert not set(options) - set(taken), (word, options)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_of_each_word_is_its_own_page_with_an_example_and_in_japanese_where_the_locale_is(name, monkeypatch):
    module, pages = suite.module(name), {}
    for word in subcommands(name):
        for lang, example in (("en", r"^example: %s %s\b"), ("ja", r"^例: %s %s\b")):
            monkeypatch.setitem(module.SAY, "lang", lang)
            pages[word, lang] = module.help_text(word.split())
            assert re.search(r"^usage: %s %s( |$)" % (re.escape(name), word), pages[word, lang], re.M), word
            assert re.search(example % (re.escape(name), word), pages[word, lang], re.M), (word, lang)
        assert len(re.findall("[\u3040-\u30ff]", pages[word, "ja"])) > 10, word
    assert len(set(pages.values())) == len(pages)


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_that_help_says_has_a_japanese_translation_and_its_example_is_a_line_of_the_program(name):
    module = suite.module(name)
    said = {how["help"] for table in (module.EVERY, module.OPTIONS) for how in table.values()} | {row[2] for row in module.SUBCOMMANDS.values()}
    assert not said - set(module.JA), sorted(said - set(module.JA))[:1]
    assert not set(module.OPTIONS) - {option for row in module.SUBCOMMANDS.values() for option in row[4].split()}, "an option of no word"
    for word, row in module.SUBCOMMANDS.items():
        line = module.read_line(shlex.split(row[3].partition(" >")[0]))
        module.take_word(line)
        assert line.word == word and row[0].__name__ != "parse", row


@pytest.mark.parametrize("line", [["run", "h", "c", "--batch", "x"], ["run", "h", "c", "--in"], ["run", "h", "c", "--retry"], ["--json=3"], ["--nonsense"]])
def test_what_is_wrong_with_an_option_is_said_in_japanese_where_the_locale_is(line, monkeypatch):
    module, said = suite.module("execute_remote_command.py"), {}
    for lang in ("en", "ja"):
        monkeypatch.setitem(module.SAY, "lang", lang)
        with pytest.raises(module.Stop) as stopped:
            module.read_line(line)
        said[lang] = str(stopped.value)
    assert re.search("[\u3040-\u30ff]", said["ja"])
    assert not re.search("[^ -~]", said["en"]) and not re.search("expected|choice|ignored|unknown", said["ja"])


def lines_with(module, word):
    """[(option's words, the line without them)] of a word: each of its options with a value that it may have."""
    behind = {"ACCEPT_ID": "0123abcd", "UUID": "0123abcd", "ID": "0123abcd"}
    names = [part.strip("[].") for part in module.SUBCOMMANDS[word][1].split()]
    line = word.split() + [behind.get(name, "a_" + name.lower()) for name in names]
    known = dict(module.EVERY, **module.OPTIONS)
    for option in list(module.EVERY) + module.SUBCOMMANDS[word][4].split():
        how = known[option]
        value = {"N": "7", "TIME": "5m", "SECONDS": "5"}.get(how.get("metavar"), "x")
        flag = "action" in how and "metavar" not in how
        yield ([option.split()[0]] + ([] if flag else [list(how.get("choices", [value]))[0]])), line


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_means_the_same_before_between_and_behind_the_words_and_other_words_refuse_it(name):
    module = suite.module(name)

    def read(*parts):
        line = module.read_line([word for part in parts for word in part])
        module.take_word(line)
        return vars(line)

    every = {option[0]: option for word in module.SUBCOMMANDS for option, line in lines_with(module, word)}
    for word in module.SUBCOMMANDS:
        for option, line in lines_with(module, word):
            wanted = read(line, option)
            assert wanted != read(line), (word, option)
            many = "nargs" in dict(module.EVERY, **module.OPTIONS).get(option[0], {})      # takes what follows, up to an option
            before = option + ["--"] if many else option
            assert read(before, line) == wanted, (word, option)
            if len(option) == 2 and option[0].startswith("--"):
                assert read([option[0] + "=" + option[1]], line) == wanted == read(line, [option[0] + "=" + option[1]]), (word, option)
            between = read(line[:1], option + ["-v"], line[1:])
            assert between == read(line, option, ["-v"]), (word, option)
        for option in every.values():
            if option[0] not in module.SUBCOMMANDS[word][4].split() and option[0] not in " ".join(module.EVERY).split():
                with pytest.raises(module.Stop) as stopped:
                    read(line, option)
                assert stopped.value.code == 64 and option[0] in str(stopped.value)


@pytest.mark.parametrize("name, word", [("mi_dicomapi.py", "list"), ("mi_system_wf.py", "login"), ("mi_system_remote.py", "list"), ("execute_remote_command.py", "list")])
def test_an_ini_that_is_named_before_the_word_is_no_other_than_behind_it(name, word, tmp_path):
    ini = tmp_path / "named.ini"
    ini.write_text("[Servr]\n[polle]\n[workflo]\n[ssh]\nbas = x\n[RemoteSite]\n")
    ini.chmod(0o600)
    lines = [[word], ["host"]] if name == "execute_remote_command.py" else [[word], []]
    found = [suite.run(name, *line, cwd=str(tmp_path)) for line in (["--ini", str(ini)] + sum(lines, []), sum(lines, []) + ["--ini", str(ini)], lines[0] + ["--ini=" + str(ini)] + lines[1])]
    assert {done.returncode for done in found} == {78} and len({done.stderr for done in found}) == 1 and "named.ini" in found[0].stderr, found


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_does_nothing(name, tmp_path):
    suite.needs("strace")
    code = ("import sys, threading; sys.path.insert(0, %r); before = set(sys.modules); import %s as found; "
            "assert threading.active_count() == 1; assert callable(found.main); print('quiet')" % (suite.ROOT, name.replace(".py", "")))
    log = tmp_path / "log"
    done = subprocess.run(["strace", "-f", "-qq", "-o", str(log), "-e", "trace=execve,socket,mkdir,unlink,rename,kill,openat", sys.executable, "-B", "-I", "-S", "-c", code],
                          cwd=str(tmp_path), env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"quiet\n", b"")
    traced = log.read_text(errors="replace")
    assert not re.search(r"\b(socket|mkdir|unlink|rename|kill)\(", traced) and traced.count("execve(") == 1
    assert not [line for line in traced.splitlines() if re.search(r"O_(WRONLY|RDWR|CREAT)", line) and "/dev/null" not in line]


def test_shared_blocks_are_equal_to_the_byte_and_shared_by_at_least_two():
    blocks = collections.defaultdict(dict)
    for name in SCRIPTS:
        text = text_of(name)
        found = list(BLOCK.finditer(text))
        assert len(found) == text.count("\n# ==== shared: ") == text.count("\n# ==== end shared ===="), name
        for block in found:
            assert name not in blocks[block.group(1)], "%s holds %s twice" % (name, block.group(1))
            blocks[block.group(1)][name] = block.group(0)
    assert blocks
    for block, holders in blocks.items():
        assert len(holders) >= 2, "%s stands in %s only" % (block, list(holders))
        assert len(set(holders.values())) == 1, "%s differs between %s" % (block, sorted(holders))


def messages(tree):
    """[(line, text or None)] of every _(...) in the tree; None for what is not a literal."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_":
            try:
                found.append((node.lineno, ast.literal_eval(node.args[0])))
            except ValueError:
                found.append((node.lineno, None))
    return found


def table_of(tree):
    """The JA table of a script."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "JA":
            keys = [ast.literal_eval(key) for key in node.value.keys]
            assert len(keys) == len(set(keys)), "twice in JA: %s" % [key for key in keys if keys.count(key) > 1][:1]
            return ast.literal_eval(node.value)
    raise AssertionError("no JA")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_message_has_a_japanese_translation(name):
    tree = tree_of(name)
    table, said = table_of(tree), messages(tree)
    missing = sorted({(line, text) for line, text in said if text is not None and text not in table})
    assert not missing, "%d messages of %s lack a translation, the first: line %d, %r" % (len(missing), name, missing[0][0], missing[0][1])
    fields = re.compile(r"%(?:\(\w+\))?[-0-9.]*[sdrxfg%]")
    for english, japanese in table.items():
        assert fields.findall(english) == fields.findall(japanese), "the fields of %r are in another order" % english
    unused = set(table) - literals_outside_the_table(tree)
    assert not unused, "translated, but said nowhere: %r" % sorted(unused)[:1]


def test_one_text_has_one_translation_in_all_scripts():
    found = collections.defaultdict(dict)
    for name in SCRIPTS:
        for english, japanese in table_of(tree_of(name)).items():
            found[english].setdefault(japanese, []).append(name)
    wrong = {english: ways for english, ways in found.items() if len(ways) > 1}
    assert not wrong, wrong


def literals_outside_the_table(tree):
    """Every text of the script but those in JA."""
    found = set()
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "JA"):
            found |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_are_short_and_lines_narrow(name):
    text, wrong, most = text_of(name), [], 150
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("# ==== ") and name in HOUSES:      # texts for others' files are as they must be
            most = 150 if re.match("# ==== (texts of units)", line) else 110
        if len(line) > most:
            wrong.append("line %d has %d columns" % (number, len(line)))
        if line != line.rstrip() or "\t" in line:
            wrong.append("line %d has blanks at its end, or a tab" % number)
    tops = [node.name for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    tops += [part.id for node in ast.parse(text).body if isinstance(node, ast.Assign) for target in node.targets
             for part in getattr(target, "elts", [target]) if isinstance(part, ast.Name)]
    wrong += ["%s is defined twice" % top for top in set(tops) if tops.count(top) > 1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - min([node.lineno] + [decorator.lineno for decorator in node.decorator_list]) + 1
            if length > 60:
                wrong.append("%s in line %d has %d lines" % (node.name, node.lineno, length))
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            wrong.append("line %d has a bare except" % node.lineno)
    assert not wrong, "%s: %s" % (name, "; ".join(wrong))


def complexity(function):
    """McCabe's number of a function: 1, and 1 for each branch, loop, handler, condition in a comprehension, `and` and `or`. What is defined in
    it counts by itself."""
    number, todo = 1, list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        number += isinstance(node, (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.Assert))
        number += 1 + len(node.ifs) if isinstance(node, ast.comprehension) else 0
        number += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        todo += ast.iter_child_nodes(node)
    return number


@pytest.mark.parametrize("name", HOUSES)
def test_no_function_is_more_complex_than_15_and_no_conditional_stands_in_another(name):
    text = text_of(name)
    shared = [(found.start(), found.end()) for found in BLOCK.finditer(text)]
    lines = [0]
    for line in text.split("\n"):
        lines.append(lines[-1] + len(line) + 1)
    own = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
           and not any(first <= lines[node.lineno - 1] < last for first, last in shared)]
    assert len(own) > 100
    wrong = ["%s in line %d: %d" % (node.name, node.lineno, complexity(node)) for node in own if complexity(node) > 15]
    wrong += ["%s in line %d: a conditional inside a conditional" % (node.name, found.lineno) for node in own for found in ast.walk(node)
              if isinstance(found, ast.IfExp) and any(isinstance(part, ast.IfExp) for part in ast.walk(found) if part is not found)]
    assert not wrong, wrong


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_sections_stand_in_the_order_of_the_suite(name):
    text = text_of(name)
    assert text.startswith("#!/usr/bin/env python3\n\"\"\"") and text.endswith('\nif __name__ == "__main__":\n    run_as_program(main)\n')
    order = ["\nimport ", "\nPROGRAM", "\ndef main(", "\n# ==== shared: say ====", "\nJA = "] if name in HOUSES else \
        ["\nimport ", "\nPROGRAM", "\n# ==== shared: say ====", "\nJA = ", "\ndef main("]
    places = [text.index(word) for word in order] + [text.rindex("\nif __name__")]
    assert places == sorted(places)
    assert "exit codes:" in ast.get_docstring(ast.parse(text)).lower()


@pytest.mark.parametrize("name", HOUSES)
def test_the_contents_of_a_script_are_its_rooms_in_their_order_and_its_own_come_first(name):
    text = text_of(name)
    contents = re.search(r"^contents \(grep -n .*\):\n((?:  .*\n)+)", ast.get_docstring(ast.parse(text)) + "\n", re.M).group(1)
    told = [re.split(r"  +", line.strip())[0] for line in contents.splitlines()]
    rooms = [title for title in re.findall(r"^# ==== (.*) ====$", text, re.M) if title != "end shared"]
    assert told == rooms and len(set(rooms)) == len(rooms)
    assert not re.search(r"^# ?-{2,}", text, re.M), "another form of mark"
    kinds = {title: "shared" for title in rooms if title.startswith("shared: ") and title not in FIRST}
    kinds.update(dict.fromkeys(("tables", "texts of units", "text of the page", "Japanese"), "last"))
    kinds = [kinds.get(title, "own") for title in rooms]
    assert rooms[0] == "shared: alone" and kinds[1:] == sorted(kinds[1:], key=["own", "shared", "last"].index)
    assert re.search(r"^threads", ast.get_docstring(ast.parse(text)), re.M)
    first = text[:text.index("# ==== %s ====" % rooms[1])].count("\n")
    assert first < (150 if rooms[1] in FIRST else 200), "%s begins at line %d only" % (rooms[1], first)


def test_who_decides_what_runs_and_what_leaves_has_at_most_ten_branches():
    blocks = "\n".join(found.group(0) for found in BLOCK.finditer(text_of("mi_system_remote.py")) if found.group(1) in shared_blocks.AUDITED)
    found = {node.name: complexity(node) for node in ast.walk(ast.parse(blocks)) if isinstance(node, ast.FunctionDef) and node.name in DECIDERS}
    assert set(found) == set(DECIDERS) and max(found.values()) <= 10, found


@pytest.mark.parametrize("name", HOUSES)
def test_a_constructor_has_one_attribute_a_line(name):
    found = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    packed = [node.lineno for one in found for node in ast.walk(one)
              if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
              and any(isinstance(target, ast.Attribute) for target in node.targets[0].elts)]
    assert found and not packed, packed


def test_who_decides_at_the_doors_of_the_gate_has_at_most_ten_branches():
    doors = re.split(r"(?m)^# ==== ", text_of("execute_remote_command.py").partition("\n# ==== the doors of the gate ====\n")[2])[0]
    found = {node.name: complexity(node) for node in ast.walk(ast.parse(doors)) if isinstance(node, ast.FunctionDef) and node.name in DOORKEEPERS}
    assert set(found) == set(DOORKEEPERS) and max(found.values()) <= 10, found


def test_the_top_of_the_repository_holds_only_what_belongs_there():
    suite.needs("git")
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=suite.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    names = {line.split("/")[0] for line in done.stdout.decode().splitlines()} if done.returncode == 0 else set(os.listdir(suite.ROOT))
    with open(os.path.join(suite.ROOT, ".gitignore")) as text:
        names -= {".git"} | {line.strip().rstrip("/") for line in text}
    assert names <= TOP, sorted(names - TOP)


# ---- README.md of this directory is a map that can be trusted

def map_of_tests():
    """The text of tests/README.md."""
    with open(os.path.join(suite.HERE, "README.md"), encoding="utf-8") as text:
        return text.read()


DATA = {"PROTOCOL.md", "README.md", "openapi.json", "calculix", "old_state"}          # named in the lines of what uses them


def here():
    """What git knows, or would take, of this directory's files; directories once."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "."], cwd=suite.HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    names = done.stdout.decode().splitlines() if done.returncode == 0 else [name for name in os.listdir(suite.HERE) if name != "__pycache__"]
    return {name.split("/")[0] for name in names if os.path.exists(os.path.join(suite.HERE, name))}


def test_every_file_is_on_the_map_once_and_nothing_that_is_not_there():
    rows = re.findall(r"^\| `([\w./]+)` \|", map_of_tests(), re.M)
    assert len(rows) == len(set(rows)), [row for row in rows if rows.count(row) > 1]
    told = {row.rstrip("/") for row in rows}
    assert told == here() - DATA, (told ^ (here() - DATA))
    for name in DATA - {"README.md"}:
        assert name in map_of_tests(), name


def test_what_the_recipes_name_is_there():
    texts = ""
    for name in os.listdir(suite.ROOT) + [os.path.join("tests", name) for name in os.listdir(suite.HERE)]:
        if name.endswith((".py", ".sh", ".ini")) and os.path.isfile(os.path.join(suite.ROOT, name)):
            with open(os.path.join(suite.ROOT, name), encoding="utf-8") as text:
                texts += text.read()
    part = map_of_tests().split("## How the labs work")[1]
    words = {word for word in re.findall(r"`([A-Za-z_][\w.]*)`", part) if not word.endswith((".py", ".md", ".json"))}
    missing = {word for word in words if not re.search(r"\b%s\b" % re.escape(word.split(".")[-1]), texts)}
    assert len(words) > 20 and not missing, missing
    files = set(re.findall(r"`([\w/]+\.(?:py|md|json|ini))`", part))
    lost = {name for name in files if not any(os.path.exists(os.path.join(top, name)) for top in (suite.ROOT, suite.HERE))}
    assert not lost, lost


def test_ruff_finds_no_slips():
    if not shutil.which("ruff"):                       # .ci/run fetches it where it can
        pytest.skip("ruff is not here")
    done = subprocess.run(["ruff", "check", "--config", ".ci/ruff.toml", "--no-cache", "--output-format", "concise", "."], cwd=suite.ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
