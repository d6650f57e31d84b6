#!/usr/bin/env bash
# Installs into .venv and checks the code: lint, format, types. `ruff check --fix` and `ruff format` fix most of it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv test
cd "$ROOT"
status=0
"$PYTHON" -m ruff check || status=1
"$PYTHON" -m ruff format --check || status=1
"$PYTHON" -m mypy || status=1
exit $status
