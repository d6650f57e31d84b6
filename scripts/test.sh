#!/usr/bin/env bash
# Installs into .venv and runs the tests, a file at a time on each core. Arguments go to pytest:
# bash scripts/test.sh tests/kernels -k chunks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv test
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tiny models gain nothing from threads, and the cores are taken
"$PYTHON" -m pytest -n auto --dist loadfile "$@" || fail "tests failed (pytest's exit code $?)."
