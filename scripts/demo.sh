#!/usr/bin/env bash
# Installs into .venv and runs the whole job on a small model trained here: recite, forget, compare with the gold standard.
# Options are passed on: see `bash scripts/demo.sh --help`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv
"$ROOT/.venv/bin/lowmem-npo" demo "$@" || fail "the demo failed (exit code $?); its message is above."
