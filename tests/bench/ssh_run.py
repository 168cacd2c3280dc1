#!/usr/bin/env python3
"""The whole way of small calculations, against the fielded procedure (ssh mkdir, one rsync per input file, ssh run, rsync back) in the same run.

ssh_run.py           20 inputs of 10 KiB, and a trivial calculation in log-ins' time
ssh_run.py --full    200 inputs of 10 KiB
ssh_run.py --check   exit 1 if a ratio is beyond three times what it should be
Prints one line per case: name, seconds of both, ratio (ours / reference), the ratio it should keep below."""
import argparse
import os
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import ssh_lab                                         # noqa: E402


def timed(words, **how):
    began = time.monotonic()
    subprocess.check_call(words, stdout=subprocess.DEVNULL, **how)
    return time.monotonic() - began


def fielded(lab, names, here):
    """The fielded procedure, as its script did it."""
    ssh, far = ["ssh", "-F", lab.path("config")], lab.path("far", "fielded")
    shell = " ".join(ssh)
    began = time.monotonic()
    subprocess.check_call(ssh + ["hpc", "mkdir", far])
    for name in names:
        subprocess.check_call(["rsync", "-av", "-L", "-e", shell, name, "hpc:%s/" % far], stdout=subprocess.DEVNULL, cwd=here)
    subprocess.check_call(ssh + ["hpc", "cd %s; cat f* >sum 2>remote_program_exec.log" % far])
    subprocess.check_call(["rsync", "-av", "-e", shell, "hpc:%s/" % far, "."], stdout=subprocess.DEVNULL, cwd=here)
    spent = time.monotonic() - began
    shutil.rmtree(far)
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    ssh_lab.in_memory()
    lab, results = ssh_lab.Lab().start(), []
    try:
        here = lab.path("near")
        count, turns = (200, 5) if options.full else (20, 2)
        names = ["f%03d" % n for n in range(count)]
        for name in names:
            with open(os.path.join(here, name), "wb") as out:
                out.write(os.urandom(10240))
        runner = [sys.executable, ssh_lab.SCRIPT, "--ini", lab.path("ini")]
        ours = min(timed(runner + ["client_name:hpc", "client_cmd:cat f* >sum", "client_files:" + ",".join(names)], cwd=here, env=lab.env())
                   for _n in range(turns))
        reference = fielded(lab, names, here)
        results.append(("%d inputs of 10 KiB, whole run" % count, ours, reference, 0.08 if options.full else 0.2))
        log_in = min(timed(["ssh", "-F", lab.path("config"), "hpc", "true"]) for _n in range(turns))
        ours = min(timed(runner + ["run", "hpc", "true"], cwd=here, env=lab.env()) for _n in range(turns))
        results.append(("a trivial run, in log-ins", ours, log_in, 4.0))
    finally:
        lab.close()
    for title, ours, reference, wanted in results:
        print("%-40s ours %6.2f s  reference %6.2f s  ratio %6.3f  wanted at most %5.2f  %s" % (
            title, ours, reference, ours / reference, wanted, "ok" if ours / reference <= wanted else "ABOVE"))
    return int(options.check and any(ours / reference > wanted * 3 for title, ours, reference, wanted in results))


if __name__ == "__main__":
    sys.exit(main())
