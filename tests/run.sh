#!/bin/sh
# sh tests/run.sh                              installs what the tests need (Debian- or RHEL-like, as root or with sudo), runs them, then the benches
# sh tests/run.sh FILE-OR-OPTION-OF-PYTEST...  only these tests, only what they need, no benches
# MI_TEST_BENCH=no leaves the benches out. Without root and sudo: says what is not here; what needs it is skipped, with a line.
set -eu
cd "$(dirname "$0")/.."
packages() {   # program, Debian's package, RHEL's package (EPEL's, some of them)
    cat <<'END'
openssl openssl openssl
ps procps procps-ng
git git git
rsync rsync rsync
sshd openssh-server openssh-server
ssh openssh-client openssh-clients
ccx calculix-ccx CalculiX-ccx
strace strace strace
ip iproute2 iproute
setpriv util-linux util-linux
systemd-analyze systemd systemd
sslscan sslscan sslscan
promtool prometheus golang-github-prometheus
gcc gcc,libc6-dev gcc,glibc-devel
busybox busybox busybox
slurmctld slurm-wlm slurm-slurmctld
slurmd slurm-wlm slurm-slurmd
sbatch slurm-wlm slurm
munged munge munge
tcsh tcsh tcsh
fish fish fish
zsh zsh zsh
dash dash dash
debootstrap debootstrap debootstrap
chromium chromium,fonts-dejavu-core chromium
END
}
here() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; }
named() {      # the programs that FILE... and the modules of tests/ that they import ask for: suite.needs("PROGRAM", ...)
    for file in tests/suite.py "$@"; do
        for used in "$file" $(sed -n 's/^import \([a-z_]*\)$/tests\/\1.py/p; s/^from \([a-z_]*\) import .*/tests\/\1.py/p' "$file"); do
            [ ! -f "$used" ] || sed -n 's/.*\bneeds(\("[^)]*\)).*/\1/p' "$used" | tr -d '",'
        done
    done
}
libraries() {  # what pytest needs for FILE...: its modules
    echo pytest
    for one in hypothesis schemathesis playwright axe_playwright_python; do grep -q "\b$one\b" "$@" && echo $one; done
    return 0
}
may=yes as_root=
if [ "$(id -u)" != 0 ]; then sudo -n true 2>/dev/null && as_root="sudo -n" || may=no; fi

files=
for word in "$@"; do case ${word%%::*} in *.py) files="$files ${word%%::*}";; esac; done
if [ -z "$files" ]; then
    wanted=$(packages | cut -d' ' -f1) modules="pytest hypothesis schemathesis playwright axe_playwright_python xdist"
else
    # shellcheck disable=SC2086
    wanted=$(named $files | tr ' ' '\n' | sort -u) modules=$(libraries $files)
fi
python=${PYTHON:-python3}
case " $* " in *" -n "*) modules="$modules xdist";; esac
imports=$(echo $modules | sed 's/ /, /g')
if ! "$python" -c "import $imports" 2>/dev/null; then      # a virtual environment of the tests' own: the system's Python stays as it is
    [ ! -x .venv-tests/bin/python3 ] || python=$PWD/.venv-tests/bin/python3
    "$python" -c 'import ensurepip, venv' 2>/dev/null || wanted="$wanted venv"
fi

missing=
for program in $wanted; do
    case $program in
        root) ;;
        venv) missing="$missing python3-venv:python3-pip";;
        *) here "$program" || missing="$missing $(packages | sed -n "s/^$program \(.*\) \(.*\)/\1:\2/p")";;
    esac
done
missing=$(printf '%s\n' $missing | sort -u)
if [ -n "$missing" ] && [ $may = yes ]; then
    if command -v apt-get >/dev/null 2>&1; then
        missing=$(printf '%s ' $missing | sed 's/:[^ ]*//g; s/,/ /g')
        echo "tests/run.sh: apt-get installs $missing"
        $as_root apt-get update -qq
        # shellcheck disable=SC2086
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    elif command -v dnf >/dev/null 2>&1; then
        missing=$(printf '%s ' $missing | sed 's/[^ ]*://g; s/,/ /g')
        echo "tests/run.sh: dnf installs $missing"
        # shellcheck disable=SC2086
        $as_root dnf install -y -q --setopt=strict=0 $missing
    else
        echo "tests/run.sh: install these first (Debian's name:RHEL's name):" $missing >&2
        exit 69
    fi
elif [ -n "$missing" ]; then
    missing=$(printf '%s ' $missing | sed 's/:[^ ]*//g; s/,/ /g')
    echo "tests/run.sh: neither root nor sudo without a password: what needs these is skipped. As root, once: apt-get install $missing" >&2
    MI_TEST_SKIP=yes
fi
[ $may = yes ] || MI_TEST_SKIP=yes
export MI_TEST_SKIP="${MI_TEST_SKIP:-}"                # tests/suite.py, needs(): what is not here is skipped instead of a failure

if ! "$python" -c "import $imports" 2>/dev/null; then
    if [ ! -x .venv-tests/bin/python3 ]; then
        echo "tests/run.sh: makes .venv-tests"
        "$python" -m venv .venv-tests || { rm -rf .venv-tests; echo "tests/run.sh: no virtual environment can be made with $python:" \
            "as root: apt-get install python3-venv (Debian), dnf install python3-pip (RHEL)" >&2; exit 69; }
    fi
    python=$PWD/.venv-tests/bin/python3
    echo "tests/run.sh: pip installs" $modules "into .venv-tests"
    "$python" -m pip install -q $(echo $modules | sed 's/xdist/pytest-xdist/') || { echo "tests/run.sh: pip cannot install" $modules "(network? PIP_INDEX_URL?)" >&2; exit 69; }
fi
chosen=$#
[ $chosen -gt 0 ] || set -- -n 3 --dist loadfile --no-loadscope-reorder tests          # most tests wait more than they work
"$python" -m pytest -q -rfEs -p no:cacheprovider "$@"
if [ $chosen = 0 ] && [ "${MI_TEST_BENCH:-yes}" = yes ]; then
    for bench in latency throughput files polls page fielded hostile ssh_run ssh_transfer long_line; do
        bench=tests/bench/$bench.py
        echo "== $bench"
        "$python" "$bench" --check
    done
fi
