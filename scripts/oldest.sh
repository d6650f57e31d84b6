#!/usr/bin/env bash
# Runs the tests with the oldest releases of its dependencies that pyproject.toml allows, in a temporary environment: with
# PyTorch's CUDA build where the index has no other, so it takes gigabytes. Arguments go to pytest. WORK: where to do so,
# and leave it for the next time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
work_venv
"$PYTHON" -m pip install --quiet uv || fail "could not install uv (see pip's message above)."
"$PYTHON" -m uv pip install --quiet --python "$PYTHON" --resolution lowest-direct --editable "$ROOT[test,eval]" ||
    fail "the oldest releases could not be installed (see uv's message above)."
cd "$ROOT"
"$PYTHON" -m pytest -n auto --dist loadfile --slow "$@" || fail "tests failed (pytest's exit code $?)."
