#!/usr/bin/env bash
# Installs into .venv and runs the tests, one file at a time on each core; at least 90% of the lines must be covered.
# Arguments go to pytest, and coverage is then not measured: bash scripts/test.sh tests/kernels -k chunks
# --full runs the long forms of tests as well: many kills, disks that fill at every write, 20,000 generated files.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv test
cd "$ROOT"

run_tests() {
    "$PYTHON" -m pytest -n auto --dist loadfile "$@" || fail "tests failed (pytest's exit code $?)."
}

if [ $# -gt 0 ]; then
    run_tests "$@"
    exit
fi
run_tests --cov --cov-report=
echo "Line coverage, in total and of files below 90%:"
"$PYTHON" -m coverage report --fail-under=90 | awk 'NR == 1 || $1 == "TOTAL" || ($2 ~ /^[0-9]+$/ && $NF + 0 < 90)' ||
    fail "less than 90% of the lines are covered."
