"""File systems that refuse what others allow (vfat, CIFS, FUSE, NFS without a lock service): a library in front of libc says no as they do."""
import os
import subprocess
import time

import pytest

import batch_stand_in
import ssh_lab
import suite
from suite import PYTHON, wait_until

LIBRARY = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#define NO { errno = REFUSED; return -1; }
#ifdef MODES
int chmod(const char *p, mode_t m) NO
int fchmod(int f, mode_t m) NO
int fchmodat(int d, const char *p, mode_t m, int g) NO
int utimensat(int d, const char *p, const struct timespec t[2], int g) NO
int futimens(int f, const struct timespec t[2]) NO
int utimes(const char *p, const struct timeval t[2]) NO
int futimes(int f, const struct timeval t[2]) NO
int futimesat(int d, const char *p, const struct timeval t[2]) NO
#elif defined(SILLY)           /* an open file that is removed stays as .nfsN in its directory until it is closed */
static struct { ino_t inode; char path[4200]; } kept[64];
static int is_open(ino_t inode) {
    struct stat s;
    for (int f = 3; f < 256; f++) if (!fstat(f, &s) && s.st_ino == inode) return 1;
    return 0; }
int unlinkat(int d, const char *p, int flags) {
    struct stat s; char above[4100], folder[4100]; const char *leaf = strrchr(p, '/');
    if (flags || fstatat(d, p, &s, AT_SYMLINK_NOFOLLOW) || !is_open(s.st_ino)) return syscall(SYS_unlinkat, d, p, flags);
    if (leaf) snprintf(above, sizeof above, "%.*s", (int)(leaf - p), p);
    else if (d == AT_FDCWD) strcpy(above, "."); else snprintf(above, sizeof above, "/proc/self/fd/%d", d);
    if (!realpath(above, folder)) return -1;
    for (int k = 0; k < 64; k++) if (!kept[k].inode) {
        kept[k].inode = s.st_ino;
        snprintf(kept[k].path, sizeof kept[k].path, "%s/.nfs%lu", folder, (unsigned long)s.st_ino);
        return renameat(d, p, AT_FDCWD, kept[k].path); }
    return -1; }
int unlink(const char *p) { return unlinkat(AT_FDCWD, p, 0); }
int close(int f) {
    int result = syscall(SYS_close, f);
    for (int k = 0; k < 64; k++) if (kept[k].inode && !is_open(kept[k].inode)) {
        syscall(SYS_unlinkat, AT_FDCWD, kept[k].path, 0); kept[k].inode = 0; }
    return result; }
#else
static int refused(void) { return !getenv("REFUSED_WHILE") || !access(getenv("REFUSED_WHILE"), F_OK); }
int flock(int f, int o) { if (refused()) NO return syscall(SYS_flock, f, o); }
static int is_lock(int c) { return c == F_SETLK || c == F_SETLKW || c == F_OFD_SETLK || c == F_OFD_SETLKW; }
#define PASS(name) int name(int f, int c, ...) { \
    va_list list; void *arg; static int (*next)(int, int, ...); \
    if (is_lock(c) && refused()) NO \
    va_start(list, c); arg = va_arg(list, void *); va_end(list); \
    if (!next) next = dlsym(RTLD_NEXT, #name); \
    return next(f, c, arg); }
PASS(fcntl)
PASS(fcntl64)
#endif
"""
REFUSALS = {"modes": ["-DMODES", "-DREFUSED=EPERM"], "open files are kept": ["-DSILLY"],
            "locks ENOSYS": ["-DREFUSED=ENOSYS"], "locks ENOLCK": ["-DREFUSED=ENOLCK"]}
MAKE = "mkdir -p e/m; for n in 1 2 3 4 5 6 7 8 9; do for m in 1 2 3 4 5 6 7; do echo $n$m >s$n$m; done; done; cp in out; chmod 755 out; touch -d @981173106 out; head -c 3000000 /dev/zero >big"
NAMES = ["s%d%d" % (n, m) for n in range(1, 10) for m in range(1, 8)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A function: a library that refuses -> its path."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "refuse.c").write_text(LIBRARY)

    def built(what):
        path = str(folder / (what.replace(" ", "-") + ".so"))
        if not os.path.exists(path):
            subprocess.check_call(["gcc", "-w", "-shared", "-fPIC", "-o", path, str(folder / "refuse.c"), "-ldl"] + REFUSALS[what])
        return path

    return built


def test_the_library_refuses(library, tmp_path):
    code = "import fcntl, os, sys\ntry:\n  os.chmod('.', 0o755) if sys.argv[1] == 'modes' else fcntl.flock(os.open('.', 0), 2)\nexcept OSError as e: print(e.errno)"
    for what, number in (("modes", 1), ("locks ENOSYS", 38), ("locks ENOLCK", 37)):
        done = subprocess.run([PYTHON, "-c", code, what], env=dict(os.environ, LD_PRELOAD=library(what)), stdout=subprocess.PIPE, cwd=str(tmp_path))
        assert done.stdout.split() == [b"%d" % number]
    code = "import os\nopen('x', 'w').close(); f = open('x'); os.unlink('x'); print(os.listdir('.')); f.close(); print(os.listdir('.'))"
    done = subprocess.run([PYTHON, "-c", code], env=dict(os.environ, LD_PRELOAD=library("open files are kept")), stdout=subprocess.PIPE, cwd=str(tmp_path))
    assert done.stdout.startswith(b"['.nfs") and done.stdout.endswith(b"\n[]\n")
    code = "import fcntl\ntry: fcntl.lockf(open('x', 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept OSError as e: print(e.errno)"
    done = subprocess.run([PYTHON, "-c", code], env=dict(os.environ, LD_PRELOAD=library("locks ENOSYS")), stdout=subprocess.PIPE, cwd=str(tmp_path))
    assert done.stdout.split() == [b"38"]


def complete(to):
    """Are all results of MAKE there?"""
    assert (to / "out").read_text() == "input\n" and (to / "big").stat().st_size == 3000000
    assert not [name for name in os.listdir(str(to)) if name.startswith(".mi")]
    return all((to / name).read_text() == name[1:] + "\n" for name in NAMES)


def said(code, text):
    """True if a program that cannot work without locks has said so."""
    return code in (74, 78) and "lock" in text and "Traceback" not in text and "in use by" not in text and "another runner" not in text


@pytest.mark.parametrize("what", list(REFUSALS))
@pytest.mark.parametrize("who", ["poller", "workflow"])
def test_a_calculation_comes_back_complete_or_it_is_said(make_world, library, tmp_path, who, what):
    world = make_world(tls=False, commands=["make"]).start()
    script = tmp_path / "make"
    script.write_text("#!/bin/sh\n" + MAKE + "\n")
    script.chmod(0o755)
    (tmp_path / "in").write_text("input\n")
    env = suite.clean_env(LD_PRELOAD=library(what))
    poller = world.poller({"make": "match = make\nargv = %s" % script}, env=env if who == "poller" else None)
    words = [PYTHON, "-I", "-S", suite.script("mi_system_wf.py"), "run", "u-test", "make", "--in", "in", "--out", "s*", "big", "out", "e/", "--to", "to"]
    process = subprocess.Popen(words + world.reach(), cwd=str(tmp_path), env=env if who == "workflow" else suite.clean_env(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: process.poll() is not None or not poller.alive(), 30)
    if not poller.alive():
        process.kill()
        assert what.startswith("locks") and said(poller.popen.returncode, poller.text()), poller.text()
        return
    text = process.communicate()[0].decode("utf-8")
    assert process.returncode == 0 and complete(tmp_path / "to") or what.startswith("locks") and said(process.returncode, text), text


@pytest.fixture(scope="module")
def lab():
    one = ssh_lab.Lab().start()
    yield one
    one.close()


@pytest.mark.parametrize("what", list(REFUSALS))
def test_a_run_over_ssh_comes_back_complete_or_it_is_said(lab, library, tmp_path, what):
    (tmp_path / "in").write_text("input\n")
    done = subprocess.run([PYTHON, ssh_lab.SCRIPT, "run", "hpc", MAKE, "--in", "in", "--to", "to", "--ini", lab.path("ini")], cwd=str(tmp_path),
                          env=dict(lab.env(), LD_PRELOAD=library(what)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    text = done.stdout.decode("utf-8")
    assert done.returncode == 0 and complete(tmp_path / "to") or what.startswith("locks") and said(done.returncode, text), (done.returncode, text)


def test_once_does_its_work_or_says_why_it_cannot(make_world, library, tmp_path):
    world = make_world(tls=False, commands=["make"]).start()
    accept_id = world.client().register("make", results=["x"])
    folder, ini = world.poller({"make": "match = make\nargv = /bin/sh\n  -c\n  echo x >x"}, start=False)
    done = suite.run("mi_system_remote.py", "poll", "--once", "--ini", ini, env=suite.clean_env(LD_PRELOAD=library("locks ENOSYS")), cwd=folder)
    assert done.returncode == 0 and world.state_of(accept_id) == "got" or said(done.returncode, done.stderr), done


def test_a_job_that_no_lock_lets_submit_says_so_and_goes_on_when_there_are_locks_again(make_world, library, tmp_path):
    world = make_world(tls=False, commands=["make"]).start()
    programs, refused = batch_stand_in.install(str(tmp_path / "system"), "openpbs"), tmp_path / "refused"
    poller = world.poller({"make": "match = make\nargv = /bin/sh\n  -c\n  echo x >x\nbatch = pbs\nbatch_poll = 0.2s\nenv.PATH = %s:%s" % (programs, os.environ["PATH"])},
                          env=suite.clean_env(LD_PRELOAD=library("locks ENOLCK"), REFUSED_WHILE=str(refused)))
    wait_until(lambda: " polling " in poller.text())
    refused.touch()                                    # as where a server's lock service has gone
    accept_id = world.workflow("submit", suite.SITE, "make", "--out", "x").stdout.strip()
    wait_until(lambda: "no lock" in world.workflow("status", accept_id).stdout, 30)
    time.sleep(1)
    assert poller.text().count(" batch why=\"no lock can be had") == 1 and not [name for name in os.listdir(str(tmp_path / "system")) if name.endswith(".json")], poller.text()
    refused.unlink()
    done = world.workflow("wait", accept_id, "--to", str(tmp_path / "to"))
    assert done.returncode == 0 and (tmp_path / "to" / "x").read_text() == "x\n", done.stdout


def test_results_below_a_mounted_volume_are_stored_in_it(disk_of, make_world, tmp_path):
    disk = disk_of("40m")                              # tmp_path/disk: another file system than tmp_path
    world = make_world(tls=False, commands=["make"]).start()
    world.poller({"make": "match = make\nargv = /bin/sh\n  -c\n  mkdir -p disk/d; echo x >disk/d/x; chmod 755 disk/d/x; touch -d @981173106 disk/d/x; "
                  "truncate -s 5M disk/big; echo end >>disk/big; echo y >y"})
    words = ("run", suite.SITE, "make", "--out", "disk/", "y", "--to", str(tmp_path))
    for turn in range(2):                              # the second one replaces what is there
        done = world.workflow(*words)
        assert done.returncode == 0 and (disk / "d" / "x").read_text() == "x\n" and (tmp_path / "y").read_text() == "y\n", done.stdout + done.stderr
        info, big = os.stat(str(disk / "d" / "x")), os.stat(str(disk / "big"))
        assert info.st_mtime == 981173106 and info.st_mode & 0o100 and big.st_size == (5 << 20) + 4 and big.st_blocks < 2000
        assert (disk / "big").read_bytes() == bytes(5 << 20) + b"end\n"
        assert not [name for top, folders, names in os.walk(str(tmp_path)) for name in names + folders if name.startswith(".mi-")]
