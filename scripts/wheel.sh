#!/usr/bin/env bash
# Builds the sdist and from it the wheel, installs the wheel into a new environment, and runs the demo there, outside of
# this directory: what users get, not an editable install. Options go to the demo. WORK: where to do so, and leave it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
work_venv
"$PYTHON" -m pip install --quiet build || fail "could not install build (see pip's message above)."
"$PYTHON" -m build --outdir "$WORK/dist" "$ROOT" >"$WORK/build.log" || fail "could not be built: $(tail -n 1 "$WORK/build.log")"
ls "$WORK/dist"
install_torch || fail "could not install PyTorch (see pip's message above)."
"$PYTHON" -m pip install --quiet --constraint "$ROOT/constraints.txt" "$WORK"/dist/*.whl ||
    fail "the wheel could not be installed (see pip's message above)."
cd "$WORK"
"$WORK/venv/bin/lowmem-npo" --version
"$WORK/venv/bin/lowmem-npo" demo "$@" || fail "the demo failed (exit code $?); its message is above."
