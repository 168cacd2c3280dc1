"""What each script opens, writes, connects to and executes, as strace saw it in a whole calculation: the table in the README is kept."""
import os
import re
import shlex

import suite
from suite import SITE

CALL = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)\((.*)$")


def traced(folder, name):
    """An interpreter that runs under strace; the log's path."""
    suite.needs("strace")
    log, path = os.path.join(folder, name + ".strace"), os.path.join(folder, name + "-python")
    with open(path, "w") as out:
        out.write("#!/bin/sh\nexec strace -D -f -qq -y -s 400 -o %s -e trace=open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,"
                  "symlink,symlinkat,chmod,fchmodat,truncate,connect,bind,execve %s \"$@\"\n" % (shlex.quote(log), shlex.quote(suite.PYTHON)))
    os.chmod(path, 0o755)
    return path, log


def deeds(log, cwd):
    """[(pid, what, detail)] of a log: write PATH, connect ADDRESS:PORT, bind PORT, exec PATH. cwd: where the script was started."""
    found, descriptors = [], {}
    with open(log, errors="replace") as text:
        for line in text:
            call = CALL.match(line)
            if not call:
                continue
            pid, name, rest = call.groups()
            opened = re.search(r" = (\d+)<([^>]*)>$", rest)
            if opened:
                descriptors[opened.group(1)] = opened.group(2)
            if name in ("connect", "bind"):
                inet = re.search(r"sin6?_port=htons\((\d+)\).*?(?:inet_addr\(\"|inet_pton\(AF_INET6, \")([^\"]+)", rest)
                if inet:
                    found.append((pid, name, "%s:%s" % (inet.group(2), inet.group(1))))
            elif name == "execve":
                if " = 0" in rest:
                    found.append((pid, "exec", re.match(r'"([^"]*)"', rest).group(1)))
            elif name not in ("open", "openat") or re.search(r"O_(WRONLY|RDWR|CREAT)", rest):
                at = re.search(r"(?:AT_FDCWD|\d+)<([^>]*)>", rest)
                for path in re.findall(r'"([^"]*)"', rest)[:2]:
                    path = re.sub(r"^/proc/\d+/fd/(\d+)", lambda by: descriptors.get(by.group(1), by.group()), path)
                    found.append((pid, "write", os.path.normpath(os.path.join(at.group(1) if at else cwd, path))))
    return found


def outside(found, *places):
    """What was written elsewhere."""
    return sorted({path for pid, what, path in found if what == "write" and not path.startswith("/dev/") and
                   not any((path + "/").startswith(place.rstrip("/") + "/") for place in places)})


def test_each_script_touches_what_the_readme_says_and_nothing_else(make_world):
    world = make_world(commands=["solve"])
    command = os.path.join(world.folder, "solve.sh")
    with open(command, "w") as out:
        out.write("#!/bin/sh\n/bin/cat in.txt >out.txt\n")
    os.chmod(command, 0o755)
    (relay, relay_log), (poller, poller_log), (workflow, workflow_log) = (traced(world.folder, name) for name in ("relay", "poller", "workflow"))
    world.python = relay
    world.start()
    world.python = None
    folder, ini = world.poller({"solve": "match = solve\nargv = " + command}, start=False)
    wf = os.path.join(world.folder, "wf")
    os.makedirs(wf)
    with open(os.path.join(wf, "in.txt"), "w") as out:
        out.write("x" * 1000)
    module = suite.subprocess.Popen([workflow, "-I", "-S", suite.script("mi_system_wf.py"), "run", SITE, "solve", "--in", "in.txt", "--out", "out.txt"] + world.reach(),
                                    cwd=wf, env=suite.clean_env(), stdin=suite.subprocess.DEVNULL, stdout=suite.subprocess.DEVNULL)
    suite.wait_until(lambda: world.rows("SELECT 1 FROM calculations WHERE state = 'allowed'"), 60)
    done = suite.run("mi_system_remote.py", "poll", "--once", "--ini", ini, cwd=folder, python=poller, timeout=120)
    assert done.returncode == 0 and module.wait(60) == 0, done.stderr
    assert world.relay.stop(seconds=60) == 0
    logs = {name: deeds(log, cwd) for name, log, cwd in (("relay", relay_log, world.folder), ("poller", poller_log, folder), ("workflow", workflow_log, wf))}
    for name, found in logs.items():
        assert {what for pid, what, path in found} >= {"write", "exec"}, (name, found[:20])
    here = "127.0.0.1:%d" % world.port

    found = logs["relay"]                              # its state, its port; it calls nobody and starts nothing
    assert outside(found, world.state) == []
    assert [path for pid, what, path in found if what == "bind"] == [here] and not [path for pid, what, path in found if what == "connect"]
    assert {os.path.realpath(path) for pid, what, path in found if what == "exec"} <= {os.path.realpath(suite.PYTHON)}

    found, home = logs["workflow"], os.path.join(suite.HOME, ".local")   # the directory of the results, what it has declared; the relay
    assert outside(found, wf, os.path.join(home, "state", "mi_distcomp_wf")) in ([], [home, os.path.join(home, "state")])      # made on the way
    assert {path for pid, what, path in found if what == "connect"} == {here} and not [path for pid, what, path in found if what == "bind"]
    assert {os.path.realpath(path) for pid, what, path in found if what == "exec"} <= {os.path.realpath(suite.PYTHON)}

    found, base = logs["poller"], os.path.join(folder, "base")           # calc_base, the relay; sh with its wrapper, mv, env, and the command
    assert outside(found, base) == []
    assert {path for pid, what, path in found if what == "connect"} == {here} and not [path for pid, what, path in found if what == "bind"]
    ran = {os.path.realpath(path) for pid, what, path in found if what == "exec"}
    assert ran <= {os.path.realpath(path) for path in (suite.PYTHON, "/bin/sh", "/usr/bin/mv", "/bin/mv", "/usr/bin/env", "/bin/cat", command)}, ran
