# Sourced by demo.sh, check.sh and test.sh: makes .venv in the project's root and installs the project into it, once.
# Installs again only when pyproject.toml or constraints.txt has changed. Sets ROOT and PYTHON.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# A Python of at least 3.10: PYTHON_FOR_VENV, then python3, then the versions the pinned packages are known to work with.
find_python() {
    local candidate
    for candidate in "${PYTHON_FOR_VENV:-}" python3 python3.12 python3.11 python3.10 python3.13 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Without an NVIDIA GPU the CPU build of PyTorch is enough: the CUDA build takes gigabytes.
# It is looked for in pip's configured index, then in PyTorch's own index of CPU builds.
install_torch() {
    local pinned
    "$PYTHON" -c 'import torch' >/dev/null 2>&1 && return
    pinned="$(grep '^torch==' "$ROOT/constraints.txt")"
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        "$PYTHON" -m pip install --quiet "$pinned+cpu" 2>/dev/null && return
        "$PYTHON" -m pip install --quiet --retries 1 "$pinned+cpu" \
            --extra-index-url "https://download.pytorch.org/whl/cpu" 2>/dev/null && return
    fi
    "$PYTHON" -m pip install --quiet "$pinned"
}

# Makes a virtual environment that is not .venv, in WORK, which is left, or where that is not given in a temporary
# directory, which is not. Sets WORK and PYTHON.
work_venv() {
    if [ -z "${WORK:-}" ]; then
        WORK="$(mktemp -d)"
        trap 'rm -rf "$WORK"' EXIT
    fi
    mkdir -p "$WORK" && WORK="$(cd "$WORK" && pwd)"
    PYTHON="$WORK/venv/bin/python"
    [ -x "$PYTHON" ] || "$(find_python)" -m venv "$WORK/venv" || fail "needs Python 3.10 or newer with the venv module."
}

setup_venv() { # extras
    local stamp="$ROOT/.venv/.installed-${1:-base}" python
    if [ -x "$PYTHON" ] && [ -f "$stamp" ] && [ "$stamp" -nt "$ROOT/pyproject.toml" ] && [ "$stamp" -nt "$ROOT/constraints.txt" ]; then
        return
    fi
    if [ ! -x "$PYTHON" ]; then
        python="$(find_python)" || fail "needs Python 3.10 or newer with the venv module (Debian: apt install python3-venv)."
        echo "Making $ROOT/.venv with $("$python" --version) ..."
        "$python" -m venv "$ROOT/.venv" || fail "could not make $ROOT/.venv (Debian: apt install python3-venv)."
    fi
    echo "Installing into .venv (a few minutes the first time) ..."
    install_torch || fail "could not install PyTorch (see pip's message above)."
    "$PYTHON" -m pip install --quiet --constraint "$ROOT/constraints.txt" --editable "$ROOT${1:+[$1]}" ||
        fail "could not install lowmem-npo (see pip's message above)."
    touch "$stamp"
}
