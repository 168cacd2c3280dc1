"""Ways in which a command could carry a secret out, planted: what each does, under which rules, and what must become of it.

A row: (number, way, what the command does: a function of the secret's bytes that leaves files in the current directory and what it writes in
`stdout` and `stderr`, the lines of [outbound], the expected word). Numbers are those of the list of ways; a letter behind one is a variant.
Words: stopped (refused: it does not leave), held (a person looks first), bounded (only so much of it can leave), not stopped (nothing
automatic finds it: it stands here so that nobody believes otherwise). In the lines %(secret)s is the secret's path, %(index)s an index of it
(scan --index), %(sum)s its sha256. Started as a program, `plants.py NUMBER SECRET`, it does what the command of that row does.
"""
import base64
import bz2
import collections
import gzip
import io
import lzma
import os
import random
import sqlite3
import struct
import sys
import tarfile
import zipfile
import zlib

Plant = collections.namedtuple("Plant", "number way does rules word")
STOPPED, HELD, BOUNDED, NOT_STOPPED = "stopped", "held", "bounded", "not stopped"
CANARY = "CANARY-4711"


def secret_table(rows=400, seed=7):
    """An in-house material table: strain, stress in MPa, hardness; with a canary and a line of words."""
    dice, lines, stress = random.Random(seed), ["# steel 9Cr, heat %s, for internal use" % CANARY, "strain,stress,hardness"], 181.3
    for number in range(rows):
        stress += dice.uniform(0.05, 1.9)
        lines.append("%.6f,%.3f,%.2f" % (number * 5e-4 + dice.uniform(1e-5, 9e-5), stress, 140 + stress ** 0.5 + dice.uniform(0, 9)))
    return ("\n".join(lines) + "\n").encode()


def columns(secret):
    """The columns of the table, as texts."""
    return list(zip(*(line.split(",") for line in secret.decode().splitlines()[2:])))


def put(name, data):
    """A result."""
    with open(name, "wb") as out:
        out.write(data)


def result(make, name="r.bin"):
    """A command that leaves make(secret) as a result."""
    return lambda secret: put(name, make(secret))


def zipped(data, name="t.csv", how=zipfile.ZIP_DEFLATED):
    """A zip archive with it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        archive.writestr(name, data)
    return out.getvalue()


def tarred(data, name="t.zip"):
    """A tar archive with it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_that_lies(secret):
    """The list of a zip's files says that one is its first line alone; who unpacks it gets all of it."""
    first = secret[:40]
    data, half = zipped(secret), struct.pack("<L", zlib.crc32(first))
    at = data.index(b"PK\1\2")
    return data[:at + 16] + half + data[at + 20:at + 24] + struct.pack("<L", len(first)) + data[at + 28:]


def zip_with_room(secret):
    """A zip with bytes between its file and its list."""
    data = zipped(b"1")
    at = data.index(b"PK\1\2")
    return data[:at] + crossed(secret) + data[at:]


def zip_with_more(secret):
    """A zip with a gzip of it as its comment."""
    out = io.BytesIO(zipped(b"1"))
    with zipfile.ZipFile(out, "a") as archive:
        archive.comment = gzip.compress(secret)
    return out.getvalue()


def tar_of_a_kind(secret):
    """A gzip of it in a tar, as a file of a kind that tar does not know."""
    data = bytearray(tarred(gzip.compress(secret)))
    data[156:157] = b"Z"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def tar_with_notes(secret):
    """A tar whose one file has a gzip of it among its notes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a")
        info.pax_headers = {"SCHILY.xattr.user.a": gzip.compress(secret).decode("utf-8", "surrogateescape")}
        archive.addfile(info)
    return out.getvalue()


def png(*more):
    """A picture of one point, with more chunks (name, bytes)."""
    chunks = [(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0))] + list(more) + [(b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)


def nested(secret, times):
    """gzip around gzip, so many times."""
    for _turn in range(times):
        secret = gzip.compress(secret)
    return secret


def percented(secret):
    return "".join("%%%02x" % byte for byte in secret).encode()


def reformatted(secret):
    return "".join("%d | %.4E | %10.2f | %8.5g\n" % ((number,) + tuple(map(float, row))) for number, row in enumerate(zip(*columns(secret)))).encode()


def scaled(secret):
    return "\n".join("%.7g" % (float(value) * 6.894757e-3) for value in columns(secret)[1]).encode()


def noisy(secret):
    dice = random.Random(1)
    return "\n".join("%.7g" % (float(value) * dice.uniform(0.99, 1.01)) for value in columns(secret)[1]).encode()


def shuffled(secret):
    lines = secret.splitlines(True)[2:]
    random.Random(2).shuffle(lines)
    return b"".join(lines)


def database(secret):
    """The secret was in it, and was deleted: its pages are free ones."""
    db = sqlite3.connect("r.db")
    db.execute("PRAGMA secure_delete = 0")
    db.execute("CREATE TABLE t (line TEXT)")
    db.executemany("INSERT INTO t VALUES (?)", [(line,) for line in secret.decode().splitlines()])
    db.commit()
    db.execute("DELETE FROM t")
    db.commit()
    db.close()


def behind_a_hole(secret):
    with open("r.bin", "wb") as out:
        out.seek(3 << 20)
        out.write(secret[:500])


def crossed(secret):
    """Encrypted, as simply as may be."""
    key = random.Random(3)
    return bytes(byte ^ key.randrange(256) for byte in secret)


SUM, WORDS, PIECES = "deny_sums = %(sum)s", "deny_content = CANARY-[0-9]+", "deny_pieces = %(index)s"
PATHS = "deny_content = (?i)licen[cs]e[ -]server\n  /opt/in-house/"
TYPES = "types = *.csv csv: header, 3 columns, numbers of <= 5 digits\n  *.png png\n  *.txt text: no trailing blanks\n  *.zip zip"
CSV = b"a,b,c\n1,2,3.25\n"
PLANTS = [Plant(*row) for row in (
    ("1", "a copy", result(bytes), SUM, STOPPED),
    ("2", "a part of it", result(lambda secret: b"x" * 77 + secret[1000:1400] + b"y" * 50), PIECES, STOPPED),
    ("3", "less than 63 bytes, with the canary", result(lambda secret: secret[:40]), WORDS, STOPPED),
    ("3b", "less than 63 bytes, without", result(lambda secret: secret[1000:1020]), PIECES + "\n" + WORDS, NOT_STOPPED),
    ("4", "gzip", result(gzip.compress), PIECES, STOPPED),
    ("4b", "gzip of a copy", result(gzip.compress), SUM, STOPPED),
    ("4c", "bzip2", result(bz2.compress), WORDS, STOPPED),
    ("4d", "xz", result(lzma.compress), PIECES, STOPPED),
    ("4e", "two parts of gzip", result(lambda secret: gzip.compress(b"1\n") + gzip.compress(secret)), PIECES, STOPPED),
    ("4f", "gzip, whose head has what no program looks at", result(lambda secret: gzip.compress(secret).replace(b"\x02\xff", b"\x01\xff", 1)), PIECES, STOPPED),
    ("4g", "zlib", result(zlib.compress), PIECES, STOPPED),
    ("5", "base64", result(base64.encodebytes), PIECES, STOPPED),
    ("5b", "base64 in one line of a text", result(lambda secret: b"report: " + base64.urlsafe_b64encode(secret) + b" end\n"), WORDS, STOPPED),
    ("5c", "base64 directly behind other letters", result(lambda secret: b"abcde" + base64.b64encode(secret)), WORDS, STOPPED),
    ("6", "hex", result(lambda secret: secret.hex().encode()), PIECES, STOPPED),
    ("6c", "hex directly behind another digit", result(lambda secret: b"0x" + b"f" + secret.hex().encode()), WORDS, STOPPED),
    ("6b", "percent", result(percented), WORDS, STOPPED),
    ("7", "UTF-16", result(lambda secret: secret.decode().encode("utf-16")), PIECES, STOPPED),
    ("7b", "UTF-32", result(lambda secret: secret.decode().encode("utf-32-be")), WORDS, STOPPED),
    ("7e", "UTF-16 within what is no text", result(lambda secret: b"\1" + crossed(secret * 9) + secret.decode().encode("utf-16-be") + crossed(secret * 9)), WORDS, STOPPED),
    ("7c", "Shift_JIS", result(lambda secret: "\n図 社外秘 9クロム鋼\n".encode("cp932") * 9), "deny_content = 社外秘", STOPPED),
    ("7d", "EUC-JP", result(lambda secret: "\n図 社外秘 9クロム鋼\n".encode("euc_jp") * 9), "deny_content = 社外秘", STOPPED),
    ("8", "zip in tar", result(lambda secret: tarred(zipped(secret))), PIECES, STOPPED),
    ("8b", "a name in a zip", result(lambda secret: zipped(b"1", CANARY + ".txt")), WORDS, STOPPED),
    ("8c", "four layers", result(lambda secret: nested(secret, 4)), PIECES, STOPPED),
    ("9", "five layers", result(lambda secret: nested(secret, 5)), PIECES, HELD),
    ("9b", "a bomb", result(lambda secret: gzip.compress(bytes(48 << 20))), PIECES, HELD),
    ("10", "encrypted, where types say what may leave", result(crossed), TYPES, HELD),
    ("10b", "encrypted, in any binary", result(crossed), PIECES + "\n" + WORDS, NOT_STOPPED),
    ("10c", "encrypted, and it says so", result(lambda secret: b"Salted__" + crossed(secret)), WORDS, HELD),
    ("10d", "an encrypted zip", result(lambda secret: zipped(secret, how=zipfile.ZIP_STORED).replace(b"PK\3\4\x14\0\0\0", b"PK\3\4\x14\0\1\0")
                                       .replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0")), SUM, HELD),
    ("10e", "packed by what nobody unpacks here", result(lambda secret: b"\x28\xb5\x2f\xfd" + crossed(secret)), PIECES, HELD),
    ("11", "lines sorted", result(lambda secret: b"".join(sorted(secret.splitlines(True)))), PIECES, STOPPED),
    ("11b", "lines shuffled", result(shuffled), PIECES, STOPPED),
    ("12", "numbers written otherwise", result(reformatted), PIECES, STOPPED),
    ("12b", "a column of it", result(lambda secret: " ".join(columns(secret)[1]).encode()), PIECES, STOPPED),
    ("13", "other units", result(scaled), PIECES, STOPPED),
    ("14", "noise in the third digit", result(noisy), PIECES, NOT_STOPPED),
    ("14b", "fewer digits than they have", result(lambda secret: CSV + secret.splitlines(True)[9], "r.csv"), TYPES, HELD),
    ("19", "on stdout", result(bytes, "stdout"), PIECES, STOPPED),
    ("20", "in a traceback", result(lambda secret: b"Traceback:\n  float('" + secret[2000:2100] + b"')\n" + CANARY.encode(), "stderr"), WORDS, STOPPED),
    ("21", "licence host and paths in a header", result(lambda secret: b"LICENSE SERVER 27000@lic7\nfrom /opt/in-house/cards/x\n"), PATHS, STOPPED),
    ("22", "the name of a result", lambda secret: put(CANARY + ".txt", b"1"), WORDS, STOPPED),
    ("22b", "the name of an empty directory", lambda secret: os.mkdir(CANARY), WORDS, STOPPED),
    ("33", "behind a hole", behind_a_hole, PIECES, STOPPED),
    ("33b", "free pages of a database, where types say what may leave", database, TYPES, HELD),
    ("33c", "free pages of a database", database, WORDS, STOPPED),
    ("34", "behind the end of a zip", result(lambda secret: zipped(b"1") + crossed(secret), "r.zip"), TYPES, HELD),
    ("34b", "behind the end of a picture", result(lambda secret: png() + crossed(secret), "r.png"), TYPES, HELD),
    ("34c", "before a zip", result(lambda secret: crossed(secret) + zipped(b"1")), WORDS, HELD),
    ("34d", "behind the end of a gzip", result(lambda secret: gzip.compress(b"1") + crossed(secret)), WORDS, HELD),
    ("34e", "a gzip behind a text", result(lambda secret: b"report\n" + gzip.compress(crossed(secret))), WORDS, HELD),
    ("34f", "behind the end of a tar", result(lambda secret: tarred(b"1") + crossed(secret)), WORDS, HELD),
    ("34g", "in a picture's own text", result(lambda secret: png((b"tEXt", b"Comment\0" + secret)), "r.png"), PIECES, STOPPED),
    ("34h", "in a zip's comment", result(zip_with_more), WORDS, HELD),
    ("34l", "between a zip's file and its list", result(zip_with_room), WORDS, HELD),
    ("34i", "a zip that tells too short a size", result(zip_that_lies), PIECES, STOPPED),
    ("34j", "in a tar, as what tar does not know", result(tar_of_a_kind), WORDS, HELD),
    ("34k", "in the notes of a file in a tar", result(tar_with_notes), WORDS, HELD),
    ("36", "trailing blanks", result(lambda secret: b"ok \nok\nok \n", "r.txt"), TYPES, HELD),
    ("36b", "signs that nobody sees", result(lambda secret: "ok\u200b\u200cok\n".encode(), "r.txt"), TYPES, HELD),
    ("36c", "more digits than there may be", result(lambda secret: b"a,b,c\n1,2,3.141592\n", "r.csv"), TYPES, HELD),
    ("36d", "a line that is none", result(lambda secret: CSV + b"# x\n", "r.csv"), TYPES, HELD),
    ("36e", "a file that no line names", result(lambda secret: b"ok\n", "r.out"), TYPES, HELD),
)]
CLEAN = [                      # (what the command does, rules): this leaves
    (result(lambda secret: CSV, "r.csv"), TYPES), (result(lambda secret: b"ok\n", "r.txt"), TYPES), (result(lambda secret: png(), "r.png"), TYPES),
    (result(lambda secret: zipped(b"1\n" * 9), "r.zip"), TYPES), (result(lambda secret: nested(b"1\n" * 99, 4)), PIECES + "\n" + WORDS),
    (result(lambda secret: tarred(zipped(b"1"))), PIECES + "\n" + WORDS), (result(lambda secret: bytes(range(256)) * 999), PIECES + "\n" + WORDS),
    (result(lambda secret: b"x^2 + 3 x\n" * 99), WORDS), (result(lambda secret: tarred(gzip.compress(b"1\n" * 99))), PIECES + "\n" + WORDS),
    (result(lambda secret: b"\0" * (5 << 20)), PIECES + "\n" + SUM), (result(lambda secret: b"%d %s %05d 100%\n" * 99), WORDS),
    (result(lambda secret: base64.encodebytes(bytes(range(256)) * 99)), PIECES + "\n" + WORDS)]


def random_leak(secret, dice):
    """A part of the table as somebody could take it along: copied, cut, written otherwise, in other units or another order, packed. (How, bytes.)"""
    lines, columns_of = secret.splitlines(True)[2:], columns(secret)
    first = dice.randrange(len(lines) - 40)
    last = dice.randrange(first + 30, len(lines))
    how = dice.choice(["bytes", "lines", "shuffled", "written", "columns", "scaled"])
    if how == "bytes":
        begin = dice.randrange(len(secret) - 300)
        data = secret[begin:begin + dice.randrange(150, 2000)]
    elif how in ("lines", "shuffled"):
        part = lines[first:last]
        dice.shuffle(part) if how == "shuffled" else None
        data = b"".join(part)
    else:
        places = dice.sample(range(3), dice.randrange(1, 4))
        factor = dice.choice([1e-3, 1e6, 0.145038, 6.894757]) if how == "scaled" else 1
        table = [[float(value) * factor for value in columns_of[place][first:last]] for place in places]
        form, between = dice.choice(["%.4E", "%.5g", "%12.5E", "%.7g", "%.3f" if factor == 1 else "%.8g"]), dice.choice([" ", ",", "; ", "\t", " | "])
        rows = table if how == "columns" else list(zip(*table))
        data = "\n".join(between.join(form % value for value in row) for row in rows).encode()
    data = b"results of the run\n1 2 3\n" * dice.randrange(9) + data + b"\nend\n"
    word, pack = dice.choice([("plain", bytes), ("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress), ("zip", zipped), ("tar", tarred),
                              ("base64", base64.encodebytes), ("hex", lambda data: data.hex().encode()), ("utf-16", lambda data: data.decode("utf-8", "replace").encode("utf-16")),
                              ("gzip in base64", lambda data: base64.b64encode(gzip.compress(data)))])
    return "%s, %s" % (how, word), pack(data)


if __name__ == "__main__":
    with open(sys.argv[2], "rb") as text:
        next(plant for plant in PLANTS if plant.number == sys.argv[1]).does(text.read())
