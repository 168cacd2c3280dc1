"""The README's first command: a whole calculation on one machine, for anybody, anywhere, leaving nothing."""
import math
import os
import re
import shutil
import subprocess

import suite

SCRIPTS = ("mi_dicomapi.py", "mi_system_wf.py", "mi_system_remote.py")


def ordinary_user(folder):
    """Words before a command that make it an ordinary user's, who owns the folder; none where we are one already."""
    if os.geteuid() != 0:
        return []
    suite.needs("setpriv")
    os.chmod(folder, 0o755)
    suite.let_through(folder)
    for name in [folder] + [os.path.join(folder, name) for name in os.listdir(folder)]:
        os.chown(name, 65534, 65534)
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def run_demo(folder, *words, lang="C"):
    """The demo in an empty directory with copies of the scripts, for a user who has a proxy, a token and an ini for other relays:
    CompletedProcess, and the directory it worked in. Nothing is written elsewhere."""
    for name in SCRIPTS:
        shutil.copy(suite.script(name), folder)
    temporary = os.path.join(folder, "tmp")
    os.mkdir(temporary)
    with open(os.path.join(folder, "mi_distributed_computing_assist.ini"), "w") as out:
        out.write("[workflow]\nurl = https://192.0.2.1\nproxy = http://127.0.0.1:9\n")
    here, user = sorted(os.listdir(folder)), ordinary_user(folder)
    done = subprocess.run(user + ["env", "-i", "LANG=" + lang, "PATH=/usr/bin:/bin", "HOME=" + folder, "TMPDIR=" + temporary,
                                  "https_proxy=http://127.0.0.1:9", "ALL_PROXY=http://127.0.0.1:9", "MI_DISTCOMP_TOKEN=other", suite.python_for_others(), "mi_dicomapi.py", "demo"] + list(words),
                          cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    assert sorted(os.listdir(folder)) == here
    return done, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"), temporary


def test_an_ordinary_user_sees_the_nine_steps_in_an_empty_directory_and_nothing_is_left(tmp_path):
    done, out, err, temporary = run_demo(str(tmp_path))
    assert (done.returncode, err) == (0, ""), out + err
    for who in ("relay", "poller", "workflow"):
        for number in {"relay": range(1, 10), "poller": range(3, 9), "workflow": (1, 2, 9)}[who]:
            assert re.search(r"^%-9s\| %d " % (who, number), out, re.M), "%s does not show step %d:\n%s" % (who, number, out)
    assert os.listdir(temporary) == []
    assert "Traceback" not in out
    found = subprocess.run(["ps", "-eo", "args"], stdout=subprocess.PIPE).stdout.decode()
    assert temporary not in found


def test_the_demos_result_is_a_real_calculation_with_the_secret_table(tmp_path):
    done, out, err, temporary = run_demo(str(tmp_path), "--keep")
    assert done.returncode == 0, out + err
    life = float(re.search(r'"life_in_spectra": ([\d.]+)', out).group(1))
    curve, damage = [(1e4, 612.5), (1e5, 487.3), (1e6, 391.8), (1e7, 341.6)], 0
    for amplitude, mean, cycles in ((280, 150, 20000), (340, 120, 1500), (420, 80, 90)):
        level = amplitude / (1 - mean / 930)
        for (n1, s1), (n2, s2) in zip(curve, curve[1:]):
            if s2 <= level <= s1:
                damage += cycles / 10 ** (math.log10(n1) + math.log(level / s1) * math.log10(n2 / n1) / math.log(s2 / s1))
    assert math.isclose(life, 1 / damage, rel_tol=1e-3)
    kept = os.path.join(temporary, os.listdir(temporary)[0])
    with open(os.path.join(kept, "external", "secret_sn_curve.json"), "rb") as secret:
        number = re.search(rb"\d+\.\d+", secret.read()).group()
    for part in ("relay", "workflow"):
        for above, names, files in os.walk(os.path.join(kept, part)):
            for name in files:
                with open(os.path.join(above, name), "rb") as text:
                    assert number not in text.read(), "the secret is in %s of the %s" % (name, part)


def test_the_demo_speaks_japanese_where_the_locale_does(tmp_path):
    done, out, err, temporary = run_demo(str(tmp_path), lang="ja_JP.UTF-8")
    assert done.returncode == 0, out + err
    assert "何も残っていません" in out


def test_without_the_other_scripts_beside_it_the_demo_says_what_is_missing(tmp_path):
    shutil.copy(suite.script("mi_dicomapi.py"), str(tmp_path))
    done = subprocess.run([suite.PYTHON, "mi_dicomapi.py", "demo"], cwd=str(tmp_path), env=suite.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 66 and suite.one_line(done.stderr.decode()) and "mi_system_remote.py" in done.stderr.decode()
