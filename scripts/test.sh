#!/usr/bin/env bash
# Installs into .venv and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/kernels -k chunks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv test
cd "$ROOT"
"$PYTHON" -m pytest "$@" || fail "tests failed (pytest's exit code $?)."
