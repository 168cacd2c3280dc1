#!/bin/sh
# sh tests/run.sh [FILE-OR-OPTION-OF-PYTEST...]: installs what the tests need (Debian- or RHEL-like, as root or with sudo), runs them, then the benches.
# MI_TEST_BENCH=no leaves the benches out.
set -eu
cd "$(dirname "$0")/.."
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
need() {   # need PROGRAM DEBIAN-PACKAGE RHEL-PACKAGE
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2:$3"
}
missing=
need openssl openssl openssl
need rsync rsync rsync
need sshd openssh-server openssh-server
need ssh openssh-client openssh-clients
need ccx calculix-ccx CalculiX-ccx
need strace strace strace
need ps procps procps-ng
need ip iproute2 iproute
need setpriv util-linux util-linux
need systemd-analyze systemd systemd
need sslscan sslscan sslscan
need gcc gcc gcc
need busybox busybox busybox
need slurmctld slurm-wlm slurm-slurmctld
need slurmd slurm-wlm slurm-slurmd
need sbatch slurm-wlm slurm
need munged munge munge
for shell in tcsh fish zsh dash; do need $shell $shell $shell; done      # log-in shells of far sides
if [ -n "$missing" ]; then
    if command -v apt-get >/dev/null 2>&1; then
        as_root apt-get update -qq
        # shellcheck disable=SC2046
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(printf '%s\n' $missing | cut -d: -f1) >/dev/null
    elif command -v dnf >/dev/null 2>&1; then
        # shellcheck disable=SC2046
        as_root dnf install -y -q $(printf '%s\n' $missing | cut -d: -f2)
    else
        echo "tests/run.sh: install these first:$missing" >&2
        exit 69
    fi
fi
python=${PYTHON:-python3}
"$python" -c 'import pytest, hypothesis, xdist, schemathesis' 2>/dev/null || "$python" -m pip install -q pytest hypothesis pytest-xdist schemathesis || {
    "$python" -m venv .venv-tests && python=$PWD/.venv-tests/bin/python3 && "$python" -m pip install -q pytest hypothesis pytest-xdist schemathesis; }
[ $# -gt 0 ] || set -- -n 2 --dist loadfile tests          # most tests wait more than they work
"$python" -m pytest -q -rfEs -p no:cacheprovider "$@"
if [ "${MI_TEST_BENCH:-yes}" = yes ]; then
    for bench in latency throughput files polls fielded hostile ssh_run ssh_transfer; do
        bench=tests/bench/$bench.py
        echo "== $bench"
        "$python" "$bench" --check
    done
fi
