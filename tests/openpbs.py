"""What a real OpenPBS was recorded to answer (openpbs.txt), for the stand-in and for the tests."""
import collections
import os
import re

Said = collections.namedtuple("Said", "words code out err")           # code: None where it was not recorded


def dialogues():
    """{title: Said} of all that was recorded."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "openpbs.txt"), encoding="utf-8") as text:
        parts = re.findall(r"^=== ([^\n]*)\n\$ \(\w+\) ([^\n]*)\n--- rc (\S+)\n--- stdout\n(.*?)--- stderr\n(.*?)--- end$", text.read(), re.M | re.S)
    return {title: Said(words, int(code) if code.isdigit() else None, out, err) for title, words, code, out, err in parts}
