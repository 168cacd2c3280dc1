"""Copies the shared blocks of one script into the other scripts that hold them: python3 tests/blocks.py SCRIPT [BLOCK...]

The block is edited in SCRIPT; `test_form.py` fails as long as one byte differs. Without BLOCK: all that SCRIPT holds.
README.md's table of what an auditor reads (lines and sums) is brought up to date, too.
"""
import glob
import hashlib
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BLOCK = re.compile(r"^# ==== shared: (\w+) ====$.*?^# ==== end shared ====$", re.M | re.S)


def copied(source, only=()):
    """Writes the blocks of the script `source` (its file name) into the others; returns [(block, script)] of what changed."""
    with open(os.path.join(ROOT, source), encoding="utf-8") as text:
        blocks = {found.group(1): found.group(0) for found in BLOCK.finditer(text.read()) if not only or found.group(1) in only}
    changed = []
    for path in sorted(set(glob.glob(os.path.join(ROOT, "*.py"))) - {os.path.join(ROOT, source)}):
        with open(path, encoding="utf-8") as text:
            before = text.read()
        after = BLOCK.sub(lambda found: blocks.get(found.group(1), found.group(0)), before)
        if after != before:
            changed += [(found.group(1), os.path.basename(path)) for found in BLOCK.finditer(before) if blocks.get(found.group(1), found.group(0)) != found.group(0)]
            with open(path, "w", encoding="utf-8") as text:
                text.write(after)
    return changed


AUDITED = ("gate", "watch", "content", "hold", "audit", "seal", "sign", "run", "batch")            # all that decides what runs and what leaves
READER = "mi_system_remote.py"


def audited():
    """{block: its row of README.md's table} of what decides what runs and what leaves."""
    rows = {}
    with open(os.path.join(ROOT, READER), encoding="utf-8") as text:
        whole = text.read()
    for found in BLOCK.finditer(whole):
        first = whole.count("\n", 0, found.start()) + 1
        last = first + found.group(0).count("\n")
        rows[found.group(1)] = "| `%s` | %d to %d | `%s` |" % (
            found.group(1), first, last, hashlib.sha256((found.group(0) + "\n").encode("utf-8")).hexdigest())
    return {name: rows[name] for name in AUDITED}


def told(readme):
    """The text of a README with these rows as they are now."""
    for name, row in audited().items():
        readme = re.sub(r"^\| `%s` \| \d+ to \d+ \| `[0-9a-f]+` \|$" % name, row, readme, flags=re.M)
    return readme


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for block, script in copied(sys.argv[1], sys.argv[2:]):
        print("%s -> %s" % (block, script))
    path = os.path.join(ROOT, "README.md")
    with open(path, encoding="utf-8") as text:
        before = text.read()
    if told(before) != before:
        print("table -> README.md")
        with open(path, "w", encoding="utf-8") as text:
            text.write(told(before))
