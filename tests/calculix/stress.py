#!/usr/bin/env python3
"""Stress analysis of a tension bar with CalculiX, as the admin of an external computer would write it.

Reads material.json of the working directory (it came over the wire: yield_strength, tensile_strength in MPa, reduction_of_area 0..1,
load in N) and secret_curve.json beside this script (the in-house master curve: it never leaves), makes an Abaqus-style input, runs ccx and
leaves result.json, stress.csv and displacement.csv. Whatever else has come into being is deleted, however it ends; what ccx says goes
through report(), because its messages quote the lines of its input.

exit codes: 0 done, 64 material.json is not usable, ccx's own code if it failed, 127 there is no ccx
"""
import json
import math
import os
import re
import signal
import subprocess
import sys

WIDTH, LENGTH, DIVISIONS, SLICES, INCREMENTS = 10.0, 40.0, 2, 4, 10      # mm, elements across and along, load steps
RESULTS = ("result.json", "stress.csv", "displacement.csv")


def fail(code, text):
    sys.stderr.write(text + "\n")
    sys.exit(code)


def read_material(path):
    """The values that came over the wire, checked: a program's input is never to be trusted."""
    try:
        with open(path, encoding="utf-8") as text:
            found = json.load(text)
        values = [float(found[key]) for key in ("yield_strength", "tensile_strength", "reduction_of_area", "load")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(64, "material.json: %s %s" % (type(error).__name__, error))
    if not all(math.isfinite(value) for value in values) or not 0 < values[0] < values[1] < 1e5 or not 0 < values[2] < 1 or not 0 < values[3] < 1e9:
        fail(64, "material.json: needs 0 < yield_strength < tensile_strength, 0 < reduction_of_area < 1 and load > 0")
    return values


def plastic_curve(secret, strength, tensile, area):
    """(true stress, plastic strain): the master curve, stretched between yield and tensile strength, and to the strain at fracture."""
    return [(strength + (tensile - strength) * height, -math.log(1 - area) * strain) for strain, height in secret["curve"]]


def write_input(path, secret, curve, load):
    """The bar: symmetric at x = 0, y = 0 and z = 0, pulled at z = LENGTH."""
    across, along = DIVISIONS + 1, SLICES + 1
    number = {(x, y, z): 1 + x + across * (y + across * z) for z in range(along) for y in range(across) for x in range(across)}
    lines = ["*NODE, NSET=ALL"]
    lines += ["%d, %.9g, %.9g, %.9g" % (n, x * WIDTH / DIVISIONS, y * WIDTH / DIVISIONS, z * LENGTH / SLICES) for (x, y, z), n in number.items()]
    lines += ["*ELEMENT, TYPE=C3D8, ELSET=BAR"]
    corners, count = ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)), 0
    for x, y, z in number:
        if x < DIVISIONS and y < DIVISIONS and z < SLICES:
            count += 1
            lines.append(", ".join(str(word) for word in [count] + [number[x + a, y + b, z + c] for a, b, c in corners]))
    end = [place for place in number if place[2] == SLICES]
    lines += ["*NSET, NSET=END"] + ["%d," % number[place] for place in end]
    lines += ["*MATERIAL, NAME=STEEL", "*ELASTIC", "%.9g, %.9g" % (secret["young"], secret["poisson"]), "*PLASTIC"]
    lines += ["%.9g, %.9g" % pair for pair in curve]
    lines += ["*SOLID SECTION, ELSET=BAR, MATERIAL=STEEL", "*BOUNDARY"]
    lines += ["%d, %d" % (n, axis + 1) for place, n in number.items() for axis in range(3) if place[axis] == 0]
    lines += ["*STEP, INC=1000", "*STATIC, DIRECT", "%g, 1." % (1 / INCREMENTS), "*CLOAD"]
    for place in end:                                  # an even pull: edges carry a half, corners a quarter
        share = 0.5 ** sum(place[axis] in (0, DIVISIONS) for axis in (0, 1))
        lines.append("%d, 3, %.9g" % (number[place], load * share / DIVISIONS ** 2))
    lines += ["*NODE PRINT, NSET=END", "U", "*EL PRINT, ELSET=BAR", "S", "*END STEP"]
    with open(path, "w") as out:
        out.write("\n".join(lines) + "\n")


def read_tables(path):
    """{("stresses" or "displacements", time): [row of numbers]} of ccx's .dat file."""
    tables, rows = {}, None
    with open(path) as text:
        for line in text:
            found = re.match(r" (stresses|displacements) .* time +(\S+)", line)
            if found:
                rows = tables[found.group(1), float(found.group(2))] = []
            elif rows is not None and line.strip():
                rows.append([float(word) for word in line.split()])
    return tables


def write_results(tables):
    """The three results, made of ccx's answers only."""
    times = sorted(time for kind, time in tables if kind == "stresses")
    with open("stress.csv", "w") as out:
        out.write("load_factor,element,point,sxx,syy,szz,sxy,sxz,syz\n")
        for time in times:
            for row in tables["stresses", time]:
                out.write("%.6g,%d,%d,%s\n" % (time, row[0], row[1], ",".join("%.6e" % value for value in row[2:8])))
    with open("displacement.csv", "w") as out:
        out.write("load_factor,node,ux,uy,uz\n")
        for time in times:
            for row in tables["displacements", time]:
                out.write("%.6g,%d,%s\n" % (time, row[0], ",".join("%.6e" % value for value in row[1:4])))
    last = tables["stresses", times[-1]]
    with open("result.json", "w") as out:
        json.dump({"axial_stress": sum(row[4] for row in last) / len(last), "elongation": max(row[3] for row in tables["displacements", times[-1]]),
                   "length": LENGTH, "area": WIDTH ** 2, "increments": len(times)}, out, indent=1)


def report(said, code):
    """What may be told of a failed run: ccx's error words, without any number (they could be the curve's)."""
    words = sorted({re.sub(r"[^A-Za-z *]+", " ", line).strip()[:100] for line in said.splitlines() if "*ERROR" in line})
    fail(code, "ccx failed with exit code %d: %s" % (code, "; ".join(words) or "no convergence"))


def clean(before):
    """Deletes everything that was not here before and is no result."""
    for name in set(os.listdir(".")) - before - set(RESULTS):
        os.unlink(name)


def main():
    os.umask(0o077)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))       # cancelled: clean up all the same
    os.chdir(os.environ.get("CALC_DIR", "."))
    before = set(os.listdir("."))
    strength, tensile, area, load = read_material("material.json")
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "secret_curve.json"), encoding="utf-8") as text:
        secret = json.load(text)
    try:
        write_input("bar.inp", secret, plastic_curve(secret, strength, tensile, area), load)
        print("running ccx: %d elements, %d load steps" % (DIVISIONS ** 2 * SLICES, INCREMENTS), flush=True)
        done = subprocess.run(["ccx", "-i", "bar"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            report(done.stdout.decode("utf-8", "replace"), done.returncode if done.returncode > 0 else 128 - done.returncode)
        write_results(read_tables("bar.dat"))
    except FileNotFoundError as error:
        fail(127, "not there: %s" % error.filename)
    finally:
        clean(before)
    print("done")


if __name__ == "__main__":
    main()
