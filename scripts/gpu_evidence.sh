#!/usr/bin/env bash
# Measures this project's claims on a GPU, one piece at a time, each in less than 9 minutes and without a network:
#
#     bash scripts/gpu_evidence.sh                   the pieces, and the packages that each of them needs
#     bash scripts/gpu_evidence.sh PIECE OUTDIR      one of them, or all
#
# For each piece OUTDIR gets PIECE.status.json (machine, commands, outcome), PIECE.log (its output) and the benchmark's own
# JSON and pictures. See benchmarks/evidence.py.
#
# Uses .venv if it exists, else python3; PYTHON=... overrides both. A piece whose packages cannot be imported is skipped,
# and says so; they and the kernels' peers can be carried in a folder:
#     pip install --target peers --no-deps "liger-kernel==0.8.*" "trl==1.16.*" cut-cross-entropy
#     PYTHONPATH=peers bash scripts/gpu_evidence.sh kernels OUTDIR
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if "$root/.venv/bin/python" -c 'import torch' 2>/dev/null; then PYTHON="$root/.venv/bin/python"; fi
fi
help=" ${*:---help} "
if [[ "$help" != *" --help "* && "$help" != *" -h "* ]] && ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "gpu_evidence.sh: $PYTHON cannot import torch; set PYTHON=... to one that can." >&2
    exit 2
fi
PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" "$root/benchmarks/evidence.py" "$@"
