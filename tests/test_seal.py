"""Signatures in OpenSSH's form are verified in the script itself: Ed25519 and RSA, and nothing that is not in that form to the byte."""
import base64
import os
import random
import shutil
import subprocess

import pytest
import suite

SEAL = suite.module("mi_system_remote.py")
VECTORS = [  # RFC 8032, 7.1: public key, message, signature
    ("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
     "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"),
    ("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
     "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"),
    ("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
     "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"),
    ("ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
     "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
     "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704")]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """{kind: path of a private key} of what ssh-keygen and openssl make."""
    suite.needs("ssh-keygen", "openssl")
    folder = str(tmp_path_factory.mktemp("keys"))
    found = {kind: os.path.join(folder, kind) for kind in ("ed25519", "rsa", "pem", "other")}
    for kind, how in (("ed25519", ["ed25519"]), ("other", ["ed25519"]), ("pem", ["rsa", "-b", "2048", "-m", "PEM"])):
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-C", "suzuki", "-f", found[kind], "-t"] + how, check=True)
    for end in ("", ".pub"):
        shutil.copy(found["pem"] + end, found["rsa"] + end)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "", "-f", found["rsa"]], check=True)         # now in OpenSSH's form
    with open(found["rsa"]) as text:
        assert "OPENSSH" in text.readline()
    return found


def public(path):
    """The public key of a private one, as its bytes."""
    with open(path + ".pub") as text:
        return SEAL.public_key(text.read())


def test_the_vectors_of_rfc_8032_are_signatures_and_no_bit_of_them_may_be_another():
    chance = random.Random(1)
    for key, text, signature in VECTORS:
        parts = [bytes.fromhex(one) for one in (key, text, signature)]
        assert SEAL.is_ed25519(*parts)
        for place in (1, 2) * 4 if parts[1] else (2,) * 6:
            changed = [bytearray(one) for one in parts]
            changed[place][chance.randrange(len(changed[place]))] ^= 1 << chance.randrange(8)
            assert not SEAL.is_ed25519(*map(bytes, changed))


def ssh_keygen_takes(path, line, armored, folder):
    """Does ssh-keygen take this signature?"""
    with open(path + ".pub") as text, open(os.path.join(folder, "keys"), "w") as keys_file, open(os.path.join(folder, "signature"), "w") as out:
        keys_file.write("suzuki " + text.read())
        out.write(armored)
    done = subprocess.run(["ssh-keygen", "-Y", "verify", "-f", keys_file.name, "-I", "suzuki", "-n", SEAL.ORDER_SPACE, "-s", out.name],
                          input=line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def test_signed_and_verified_here_and_by_ssh_keygen_are_the_same(keys, tmp_path, request):
    count, chance = 1000 if request.config.getoption("--long") else 30, random.Random(2)
    for number in range(count):
        kind = ("ed25519", "rsa", "pem")[number % 3]
        signed = SEAL.signed_text({"text": chance.choice(("", "計算", "x" * 3000)), "number": chance.randrange(10 ** 9)}, keys[kind], SEAL.ORDER_SPACE)
        line, newline, armored = signed.partition("\n")
        line = line.encode()
        trusted = {public(keys[kind]): kind}
        assert SEAL.signed_by(line, armored, SEAL.ORDER_SPACE, trusted) in trusted
        assert ssh_keygen_takes(keys[kind], line, armored, str(tmp_path)), kind
        changed = bytearray(line)
        changed[chance.randrange(len(line))] ^= 1 << chance.randrange(7)
        for text, space, whom in ((bytes(changed), SEAL.ORDER_SPACE, trusted), (line, SEAL.RESULT_SPACE, trusted), (line, SEAL.ORDER_SPACE, {public(keys["other"])})):
            with pytest.raises(ValueError):
                SEAL.signed_by(text, armored, space, whom)
        assert not ssh_keygen_takes(keys[kind], bytes(changed), armored, str(tmp_path))


def mangled(blob, chance):
    """A signature that is not in the form any more, or not of the namespace: blob with one of its strings longer, shorter, changed or gone."""
    strings = SEAL.ssh_strings(blob[10:])
    key, signature = SEAL.ssh_strings(strings[0]), SEAL.ssh_strings(strings[4])
    way = chance.randrange(9)
    if way == 0:
        return blob[:chance.randrange(len(blob))]
    if way == 1:
        return blob + os.urandom(1 + chance.randrange(8))
    if way == 2:
        strings[chance.randrange(1, 4)] += os.urandom(1)
    elif way == 3:
        key[chance.randrange(len(key))] += os.urandom(1)
    elif way == 4:
        signature[1] += b"\0" * (1 + chance.randrange(4))
    elif way == 5:
        signature[1] = signature[1][:chance.randrange(len(signature[1]))]
    elif way == 6:
        signature[0] = chance.choice((b"", b"ssh-rsa", b"rsa-sha2-1", b"ssh-ed25519\0", b"ecdsa-sha2-nistp256"))
    elif way == 7:                                     # S from the number of points on; RSA: from n on
        signature[1] = (signature[1][:32] + (int.from_bytes(signature[1][32:], "little") + SEAL.POINTS).to_bytes(33, "little")[:32]
                        if signature[0] == b"ssh-ed25519" else b"\xff" * len(signature[1]))
    else:
        return b"SSHSIG" + chance.choice((b"\0\0\0\0", b"\0\0\0\2", b"\1\0\0\1")) + blob[10:]
    strings[0], strings[4] = (b"".join(map(SEAL.ssh_string, parts)) for parts in (key, signature))
    return blob[:10] + b"".join(map(SEAL.ssh_string, strings))


def test_what_is_malformed_is_refused_before_anything_is_calculated(keys, request, monkeypatch):
    count, chance, good = 10 ** 5 if request.config.getoption("--long") else 1000, random.Random(3), []
    for kind in ("ed25519", "rsa"):
        line, newline, armored = SEAL.signed_text({"number": 1}, keys[kind], SEAL.ORDER_SPACE).partition("\n")
        good.append((line.encode(), base64.b64decode("".join(armored.split("\n")[1:-2])), {public(keys[kind])}))

    def calculated(*words):
        raise AssertionError("calculated")

    monkeypatch.setattr(SEAL, "sum_of_multiples", calculated)
    monkeypatch.setattr(SEAL, "point_of", calculated)
    monkeypatch.setattr(SEAL, "pow", calculated, raising=False)
    for number in range(count):
        line, blob, trusted = good[number % 2]
        lines = base64.b64encode(mangled(blob, chance)).decode()
        armored = "-----BEGIN SSH SIGNATURE-----\n%s\n-----END SSH SIGNATURE-----\n" % lines
        with pytest.raises(ValueError):
            SEAL.signed_by(line, armored, SEAL.ORDER_SPACE, trusted)
    line, blob, trusted = good[0]
    for armored in ("", "\n", "-----BEGIN SSH SIGNATURE-----", "x" + base64.b64encode(blob).decode(), "-----BEGIN SSH SIGNATURE-----\n@@@@\n-----END SSH SIGNATURE-----\n"):
        with pytest.raises(ValueError):
            SEAL.signed_by(line, armored, SEAL.ORDER_SPACE, trusted)


NO_POINT = "ssh-ed25519 " + base64.b64encode(SEAL.ssh_string(b"ssh-ed25519") + SEAL.ssh_string(b"\xff" * 32)).decode()


def test_keys_that_are_weak_or_none_are_not_taken(keys, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", str(tmp_path / "weak"), "-t", "rsa", "-b", "1024"], check=True)
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", str(tmp_path / "ecdsa"), "-t", "ecdsa"], check=True)
    with open(keys["ed25519"] + ".pub") as text:
        good = text.read().split()
    for line in ("", "ssh-ed25519", good[1], "ssh-rsa " + good[1], good[0] + " " + good[1][:-4], good[0] + " " + good[1] + "AAAA", NO_POINT,
                 (tmp_path / "weak.pub").read_text(), (tmp_path / "ecdsa.pub").read_text()):
        with pytest.raises(ValueError):
            SEAL.public_key(line)
    assert SEAL.public_key(" ".join(good[:2])) == public(keys["ed25519"])


ORDER = {"v": 1, "site": "u", "user": "a", "request_id": "r", "command": "c", "parameters": "", "inputs": "0" * 64, "result_files": [], "result_patterns": [],
         "nonce": "0" * 32, "not_before": 1, "expires": 2}


def test_an_order_says_each_thing_once_in_its_kind_and_nothing_else():
    import json
    line = json.dumps(ORDER)
    assert SEAL.parse_order(line) == ORDER
    wrong = [json.dumps(dict(ORDER, **{key: value})) for key, value in (
        ("v", 2), ("v", True), ("more", 1), ("site", None), ("command", ["c"]), ("expires", "2"), ("expires", 2.0), ("expires", True), ("nonce", "0" * 31),
        ("nonce", "0" * 31 + "\n"), ("nonce", "G" * 32), ("result_files", [1]), ("result_patterns", {}))]
    wrong += [json.dumps({key: value for key, value in ORDER.items() if key != left}) for left in ORDER]
    wrong += [line.replace('"v": 1', '"v": 1, "v": 1'), line.replace('"expires": 2', '"expires": NaN'), line.replace('"expires": 2', '"expires": 1e999'),
              line.replace('"expires": 2', '"expires": ' + "9" * 100), "", "null", "[]", "{}", "[" * 100000, line[:-1], line + "x"]
    for text in wrong:
        with pytest.raises(ValueError):
            SEAL.parse_order(text)
