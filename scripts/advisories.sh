#!/usr/bin/env bash
# Looks up known advisories of the pinned dependencies, with pip-audit, in a temporary environment. Options go to pip-audit.
# It asks https://pypi.org/pypi/NAME/VERSION/json, or with `--vulnerability-service osv` https://api.osv.dev: a mirror of
# the package index alone has no advisories. A package that cannot be looked up is an error, and so is an advisory.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
work_venv
"$PYTHON" -m pip install --quiet pip-audit || fail "could not install pip-audit (see pip's message above)."
"$PYTHON" -m pip_audit --strict --disable-pip --no-deps --progress-spinner off \
    --requirement "$ROOT/constraints.txt" "$@" || fail "there are advisories, or they could not be looked up (see above)."
