#!/bin/sh
# Program (C)/(D) of the SSH way: runs on the external computer, in a directory of its own, started by execute_remote_command.py.
# Copy it to execute_remote-side_program_ssh.sh, adapt the five settings, and tell MInt its path.
#
#     execute_remote-side_program_ssh.sh YIELD TENSILE REDUCTION          (MPa, MPa, percent; or the input file tensile.txt with the three)
#
# What it does: 1. reads yield strength, tensile strength and reduction of area; 2. makes the material's stress-strain curve with the
# SECRET table; 3. writes the solver's input; 4. runs the solver; 5. leaves result.csv and summary.txt.
# EVERYTHING THAT IS IN THE CURRENT DIRECTORY AT THE END GOES TO MInt. Therefore the table, the curve and the solver's input are made in
# a scratch directory elsewhere, which is removed at the end: also when the solver fails, also when the calculation is cancelled.
set -u
umask 077

TABLE=${TABLE:-$HOME/mi_secret/hardening_table.txt}    # lines: YIELD/TENSILE  HARDENING_EXPONENT, ascending; nobody else may read it
SCRATCH=${SCRATCH:-/tmp}                               # where the secret files live while the solver runs
YOUNG=206000 POISSON=0.3                               # MPa, -
solve() { ccx job; }                                   # CalculiX
# solve() { abaqus job=job input=job.inp interactive; }  # Abaqus: this line instead (the element and output words below suit both)
RESULTS="summary.txt result.csv"                       # what may leave; nothing else is copied

stop() { echo "$0: $2" >&2; exit "$1"; }

secret=$(mktemp -d "$SCRATCH/mi-secret.XXXXXX") || stop 74 "no scratch directory in $SCRATCH"
forget() { rm -rf "$secret"; }
trap forget EXIT
trap 'exit 143' TERM
trap 'exit 130' INT HUP

# 1. the three numbers
[ $# -eq 0 ] && [ -r tensile.txt ] && { read -r y t r _ <tensile.txt; set -- "${y:-}" "${t:-}" "${r:-}"; }
[ $# -eq 3 ] || stop 64 "expected YIELD TENSILE REDUCTION"
for number in "$@"; do
    case $number in *[!0-9.]* | *.*.* | "" | .) stop 64 "not a number: $number";; esac
done
[ -r "$TABLE" ] || stop 66 "cannot read the table"

# 2. the curve (Hollomon: stress = K strain^n; n from the table, K so that the maximum load is TENSILE; up to the strain at fracture)
awk -v y="$1" -v t="$2" -v r="$3" -v young="$YOUNG" '
    !/^#/ && NF >= 2 { x[++m] = $1; e[m] = $2 }
    END {
        if (m < 2 || t <= 0 || y <= 0 || y >= t || r <= 0 || r >= 100) exit 65
        q = y / t; n = e[1]
        for (i = 2; i <= m; i++) if (q >= x[i - 1]) { f = (q - x[i - 1]) / (x[i] - x[i - 1]); if (f > 1) f = 1; n = e[i - 1] + f * (e[i] - e[i - 1]) }
        k = t * exp(n) / n ^ n; last = log(100 / (100 - r))
        printf "%.4f, 0.\n", y
        for (i = 1; i <= 40; i++) { p = last * (i / 40) ^ 2; s = k * (p + y / young) ^ n; if (s > old && s > y) { printf "%.4f, %.6f\n", s, p; old = s } }
    }' "$TABLE" >"$secret/curve.inc" || stop 65 "no curve from these numbers (YIELD < TENSILE, 0 < REDUCTION < 100)"

# 3. the solver's input: a cube of 10 mm, pulled by 10 %
{
    cat <<'MODEL'
*NODE, NSET=ALL
1, 0., 0., 0.
2, 10., 0., 0.
3, 10., 10., 0.
4, 0., 10., 0.
5, 0., 0., 10.
6, 10., 0., 10.
7, 10., 10., 10.
8, 0., 10., 10.
*NSET, NSET=TOP
5, 6, 7, 8
*ELEMENT, TYPE=C3D8, ELSET=BODY
1, 1, 2, 3, 4, 5, 6, 7, 8
MODEL
    printf '*MATERIAL, NAME=SECRET\n*ELASTIC\n%s, %s\n*PLASTIC\n' "$YOUNG" "$POISSON"
    cat "$secret/curve.inc"
    cat <<'MODEL'
*SOLID SECTION, ELSET=BODY, MATERIAL=SECRET
*BOUNDARY
1, 1, 3
2, 2, 3
3, 3, 3
4, 1, 1
4, 3, 3
5, 1, 2
6, 2, 2
8, 1, 1
*STEP, NLGEOM, INC=200
*STATIC
0.1, 1.0, 1e-5, 0.1
*BOUNDARY
TOP, 3, 3, 1.0
*NODE PRINT, NSET=TOP, TOTALS=ONLY
RF
*END STEP
MODEL
} >"$secret/job.inp"

# 4. the solver; its log may tell of the input, so only the end of the story goes out
(cd "$secret" && solve) >"$secret/solver.log" 2>&1
code=$?
grep -q 'Job finished\|COMPLETED' "$secret/solver.log" || [ "$code" -ne 0 ] || code=1
echo "solver: exit code $code"

# 5. what may leave
mkdir "$secret/out"
echo "yield $1 MPa, tensile $2 MPa, reduction of area $3 %: solver exit code $code" >"$secret/out/summary.txt"
[ -f "$secret/job.dat" ] && awk '
    BEGIN { print "time,force_N" }
    /total force/ { time = $NF + 0; next }
    time != "" && NF == 3 { printf "%g,%g\n", time, $3; time = "" }' "$secret/job.dat" >"$secret/out/result.csv"
for name in $RESULTS; do
    [ -f "$secret/out/$name" ] && cp "$secret/out/$name" .
done
exit "$code"
