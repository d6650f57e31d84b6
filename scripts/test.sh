#!/usr/bin/env bash
# Installs into .venv and runs the tests, one file at a time on each core; at least 90% of the lines must be covered.
# Arguments go to pytest, and coverage is then not measured: bash scripts/test.sh tests/kernels -k chunks
# --slow runs also what takes 7 s and more and is like a shorter test; --full the long forms too, for hours: many kills,
# disks that fail at every write, 20,000 generated files.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv test
cd "$ROOT"

run_tests=(-m pytest -n auto --dist loadfile "$@")
failed() { fail "tests failed (pytest's exit code $1)."; }

if [ $# -gt 0 ]; then
    "$PYTHON" "${run_tests[@]}" || failed $?
    exit
fi
lines="$(mktemp)"
trap 'rm -f "$lines"' EXIT
"$PYTHON" -m slipcover --out "$lines" "${run_tests[@]}" || failed $?
echo "Line coverage, in total and of files below 90% (lines, lines missed, percent):"
awk '$1 == "(summary)" { total = $4 }
     $1 == "(summary)" || ($2 ~ /^[0-9]+$/ && $4 < 90) { print $1, $2, $3, $4 }
     END { exit total < 90 }' "$lines" || fail "less than 90% of the lines are covered."
