#!/usr/bin/env bash
# Looks up known advisories of all that an installation brings along, in the package index's own JSON: see advisories.py,
# which gets the arguments, such as --newest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
work_venv
"$PYTHON" -m pip install --quiet --upgrade pip packaging || fail "could not install pip (see its message above)."
"$PYTHON" "$ROOT/scripts/advisories.py" "$@"
