"""How the SSH runner puts results into a directory: whose it is what is there already, what may not be there, and what comes back as it was."""
import os
import re
import shutil
import stat
import subprocess
import sys

import pytest

import ssh_lab
import suite
from test_ssh_runner import Stepwise, here, ident_of, lab, run, runner       # noqa: F401 (fixtures)
from test_storing import OWN


def test_the_second_of_two_runs_in_one_directory_brings_its_own_result(lab, here):
    for text in ("AAA", "BBB"):
        code, out = run(lab, here, "run", "hpc", "echo %s >res; touch -d @1700000000 res" % text)
        assert code == 0 and (here / "res").read_text() == text + "\n", out


def test_two_runs_at_once_into_one_directory_mix_nothing_and_the_later_one_says_no(lab, here):
    (here / "was").write_text("from before")
    first = Stepwise(lab, here, ["ended"], "run", "hpc", "head -c 9000000 /dev/zero | tr '\\0' A >res; echo A >was")
    first.reached("ended")
    code, out = run(lab, here, "run", "hpc", "head -c 9000000 /dev/zero | tr '\\0' B >res")
    assert code == 0, out
    first.go("ended")
    code, out = first.finish()
    assert code == 65 and "was changed here" in out and "replaced=remote_program_exec.log" in out and (here / "res").read_bytes() == b"B" * 9000000 and (here / "was").read_text() == "A\n", out
    assert ident_of(out) in os.listdir(lab.path("far")) and re.search(ident_of(out) + " finished .* 65$", run(lab, here, "list")[1], re.M)
    code, out = run(lab, here, "resume", ident_of(out), "--to", "again")
    assert code == 0 and (here / "again" / "res").read_bytes() == b"A" * 9000000, out
    assert not [name for name in os.listdir(str(here)) + os.listdir(str(here / "again")) if name.startswith(".mi")]


def test_no_result_gets_the_contents_of_another_ones_part(lab, here):
    names = ["x16", ".x16.mi-part", "x16.part", ".mi-x16"]
    code, out = run(lab, here, "run", "hpc", "; ".join("echo %s >%s" % (name, name) for name in names) + "; head -c 3000000 /dev/zero >.big.mi-part; echo big >big")
    assert code == 0 and all((here / name).read_text() == name + "\n" for name in names) and (here / "big").read_text() == "big\n", out
    code, out = run(lab, here, "run", "hpc", "mkdir .mi-$(basename $PWD) && echo evil >.mi-$(basename $PWD)/lock; echo ok >ok")
    assert code == 65 and (here / "ok").read_text() == "ok\n" and "a name that is kept" in out, out


def test_what_the_user_does_while_it_runs_stays(lab, here):
    (here / "tab").mkdir()
    for name in "xyz":
        (here / "tab" / name).write_text("old")
    one = Stepwise(lab, here, ["ended"], "run", "hpc", "echo theirs >tab/x; echo theirs >tab/y; echo made >new", "--in", "tab")
    one.reached("ended")
    (here / "tab" / "z").write_text("edited")
    (here / "tab" / "y").write_text("edited")
    (here / "tab" / ".#z").symlink_to("user@host.1234")       # an editor's lock
    one.go("ended")
    code, out = one.finish()
    assert code == 65 and "tab/y" in out and "was changed here" in out, out
    assert {name: (here / "tab" / name).read_text() for name in "xyz"} == {"x": "theirs\n", "y": "edited", "z": "edited"} and (here / "new").exists()


def test_an_input_is_told_from_a_result_by_size_and_time_and_by_who_touched_it(lab, here):
    for name in "abc":
        (here / name).write_text("input")
    command = "echo other >a; touch -r c b; echo again >c; touch -d @1700000000 c; echo inpuT >d"
    (here / "to").mkdir()
    code, out = run(lab, here, "run", "hpc", command, "--in", "a", "b", "c", "--to", "to")
    assert code == 0 and {name: (here / "to" / name).read_text() for name in os.listdir(str(here / "to")) if len(name) == 1} == {
        "a": "other\n", "b": "input", "c": "again\n", "d": "inpuT\n"}, out


def test_results_are_not_put_through_links_of_the_target(lab, here, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    (away / "victim").write_text("keep")
    (here / "d").symlink_to(away)
    (here / "f").symlink_to(away / "victim")
    code, out = run(lab, here, "run", "hpc", "mkdir d; echo x >d/victim; echo y >f; head -c 2000000 /dev/zero >d/big; echo ok >ok")
    assert code == 65 and "d/victim" in out and "in its way" in out and (here / "ok").exists(), out
    assert os.listdir(str(away)) == ["victim"] and (away / "victim").read_text() == "keep" and (here / "f").read_text() == "y\n" and not (here / "f").is_symlink()
    code, out = run(lab, here, "resume", ident_of(out), "--to", "there")
    assert code == 0 and (here / "there" / "d" / "victim").read_text() == "x\n", out


def test_who_may_write_to_the_target_too_leads_nothing_out_of_it_while_results_come(lab, here, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    (away / "victim").write_text("keep")
    one = Stepwise(lab, here, ["fetching"], "run", "hpc", "head -c 3000000 /dev/zero | tr '\\0' x >big; echo small >small; ln -s small link")
    one.reached("fetching")
    stage = here / next(name for name in os.listdir(str(here)) if name.startswith(".mi-"))
    (stage / runner.part_name("link").decode()).symlink_to(away / "victim")
    stage.rename(here / "moved")
    stage.symlink_to(away)
    one.go("fetching")
    code, out = one.finish()
    assert code == 0 and (here / "big").stat().st_size == 3000000 and (here / "link").read_text() == "small\n", out
    assert os.listdir(str(away)) == ["victim"] and (away / "victim").read_text() == "keep"


def test_no_result_is_put_where_this_users_programs_are_started_from_or_set_up_by(lab, here):
    (here / ".bashrc").write_text("mine")
    (here / "bin").mkdir()
    command = "mkdir .ssh bin d; for f in .bashrc .ssh/authorized_keys bin/ls d/.rc ok; do echo evil >$f; done"
    env = dict(HOME=str(here), PATH="%s:%s" % (here / "bin", os.environ["PATH"]))
    code, out = run(lab, here, "run", "hpc", command, **env)
    assert code == 65 and out.count("set up by it") == 3 + out.count("not_fetched=.ssh "), out
    assert (here / ".bashrc").read_text() == "mine" and os.listdir(str(here / "bin")) == [] and not (here / ".ssh" / "authorized_keys").exists()
    assert (here / "ok").exists() and (here / "d" / ".rc").exists()
    code, out = run(lab, here, "resume", ident_of(out), "--to", "there", **env)
    assert code == 0 and (here / "there" / ".bashrc").read_text() == "evil\n" and (here / "there" / "bin" / "ls").exists(), out


def test_no_result_is_put_into_a_repository_that_was_here_before_but_a_repository_may_be_a_result(lab, here):
    (here / ".git").mkdir()
    command = "mkdir -p .git/hooks new/.git/hooks; for f in .git/hooks/pre-commit new/.git/hooks/pre-commit new/.git/config; do echo evil >$f; done"
    code, out = run(lab, here, "run", "hpc", command)
    assert code == 65 and out.count("set up by it") == 1, out
    assert not (here / ".git" / "hooks" / "pre-commit").exists() and (here / "new" / ".git" / "config").exists(), out
    code, out = run(lab, here, "resume", ident_of(out), "--to", "there")
    assert code == 0 and (here / "there" / ".git" / "hooks" / "pre-commit").exists(), out


def test_the_runner_is_not_replaced_by_a_result_and_names_steer_no_terminal(lab, here):
    shutil.copy(ssh_lab.SCRIPT, str(here))
    own = [name for name in OWN if "/" not in name] + ["execute_remote_command.py"]
    command = "; ".join("echo evil >'%s'" % name for name in own) + "; echo x >\"$(printf 'c\\302\\233m')\"; echo x >\"$(printf 'b\\342\\200\\256i')\"; echo ok >ok"
    process = subprocess.run([suite.PYTHON, "execute_remote_command.py", "run", "hpc", command, "--ini", lab.path("ini")], cwd=str(here), env=lab.env(), stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100)
    out = process.stdout.decode()
    assert process.returncode == 65 and "\x9b" not in out and "\u202e" not in out and "c\\x9bm" in out, out
    assert (here / "ok").exists() and (here / "execute_remote_command.py").read_bytes() == open(ssh_lab.SCRIPT, "rb").read()
    there = os.listdir(str(here))
    assert not [name for name in there if name in own[:2] + own[3:-1] or "\x9b" in name or "\u202e" in name], there


def test_results_obey_the_umask_keep_their_marks_and_holes(lab, here):
    command = "umask 0; echo r >run; chmod 777 run; echo t >text; mkdir -p e/mpty; head -c 70 /dev/zero >s; truncate -s 40M s; cp s small-begin; echo end >>s; ln -s run link"
    code = "import os, sys; os.umask(0o027); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code] + lab.words("run", "hpc", command), cwd=str(here), env=lab.env(), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100)
    assert done.returncode == 0, done.stdout.decode()
    modes = {name: stat.S_IMODE(os.stat(str(here / name)).st_mode) for name in ("run", "text", "link", "e/mpty")}
    assert modes == {"run": 0o750, "text": 0o640, "link": 0o750, "e/mpty": 0o750} and not (here / "link").is_symlink()
    info = os.stat(str(here / "s"))
    assert info.st_size == (40 << 20) + 4 and info.st_blocks * 512 < 4 << 20 and (here / "s").read_bytes() == bytes(40 << 20) + b"end\n"


@pytest.mark.parametrize("name", ["part written", "stored"])
def test_a_runner_killed_while_it_stores_brings_all_at_the_next_start(lab, here, name):
    command = "head -c 3000000 /dev/urandom >big; for n in 1 2 3; do echo $n >f$n; done"
    process = subprocess.run(suite.started_as([suite.PYTHON, ssh_lab.SCRIPT, "run", "hpc", command, "--ini", lab.path("ini")], {"MI_FAULT": name}), cwd=str(here), env=lab.env(),
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100)
    assert process.returncode == -9
    code, out = run(lab, here, "resume", ident_of(process.stdout.decode()))
    assert code == 0 and [(here / ("f%d" % n)).read_text() for n in (1, 2, 3)] == ["1\n", "2\n", "3\n"] and os.path.getsize(str(here / "big")) == 3000000, out
    assert not [entry for entry in os.listdir(str(here)) if entry.startswith(".mi")]


def test_a_lane_that_ends_in_any_way_but_done_is_no_success(monkeypatch):
    class Line:
        near, host = staticmethod(lambda: True), "h"

        class settings:
            streams = 1
    for error in (OSError(1, "Operation not permitted", 7), TypeError("x"), SystemExit(0), KeyboardInterrupt()):
        work = runner.InputTransfer(Line, None, [runner.Piece(runner.Entry(b"n", "f", 5, 0, 0), 0, 5)])

        def lane(work, number, own, error=error):
            work.take()
            raise error
        monkeypatch.setattr(runner, "work_lane", lane)
        with pytest.raises(BaseException) as found:
            runner.run_lanes(work, 1)
        assert found.value is not None
