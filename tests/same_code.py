"""Shows that a script's code is what it was before something moved or got another name: python3 tests/same_code.py REVISION SCRIPT [OLD=NEW...]

Compares the syntax trees of all functions, classes and top-level statements of SCRIPT at the git revision (the old ones under their new
names) with those of the file as it is. Only their order, comments, the docstring of the file and the line ends of the others may differ. Prints what differs; 1 if anything.
"""
import ast
import collections
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES = ("id", "attr", "arg", "name", "asname", "module", "dest")          # the fields of nodes that hold a name


class Renamed(ast.NodeTransformer):
    """A tree under its new names; texts stay, but for {name: ...} of a table's fields: those are named OLD=NEW with quotes around OLD."""

    def __init__(self, names):
        self.names = names

    def generic_visit(self, node):
        """Any node: its names, and those in it."""
        for field in NAMES:
            if isinstance(getattr(node, field, None), str):
                setattr(node, field, self.names.get(getattr(node, field), getattr(node, field)))
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            node.names = [self.names.get(name, name) for name in node.names]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body[0] = ast.Expr(ast.Constant(" ".join(ast.get_docstring(node).split())))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = self.names.get('"%s"' % node.value, node.value)
        return ast.NodeTransformer.generic_visit(self, node)


def parts(text, names):
    """The parts of a program as Counter of (what it is, its tree as text); the docstring of the file is none."""
    tree, found = Renamed(names).visit(ast.parse(text)), collections.Counter()
    for number, node in enumerate(tree.body):
        if number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.ClassDef):             # its methods one by one: their order may change, too
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            for part in methods:
                found["%s.%s" % (node.name, part.name), ast.dump(part)] += 1
            node.body = [part for part in node.body if not isinstance(part, ast.FunctionDef)]
        found[getattr(node, "name", None) or named(node), ast.dump(node)] += 1
    return found


def named(node):
    """What a statement of a program is called here: the first names in it."""
    return " ".join([type(node).__name__] + [part.id for part in ast.walk(node) if isinstance(part, ast.Name)][:3])


def differences(before, after, names=None):
    """[what differs] between two texts of a program; names: {old name: new name}."""
    old, new = parts(before, names or {}), parts(after, {})
    return sorted(["%s: gone, or other than before" % what for what, tree in old - new]
                  + ["%s: new, or other than before" % what for what, tree in new - old])


def main(revision, script, *renames):
    """The program."""
    before = subprocess.run(["git", "show", "%s:%s" % (revision, script)], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode("utf-8")
    with open(os.path.join(ROOT, script), encoding="utf-8") as text:
        found = differences(before, text.read(), dict(pair.split("=") for pair in renames))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
