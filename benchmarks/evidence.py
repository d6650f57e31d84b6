"""`scripts/gpu_evidence.sh PIECE OUTDIR`: runs a piece's commands and records how they ended.

OUTDIR gets PIECE.status.json, PIECE.log and what the benchmarks write; copy it into benchmarks/results. A piece that
fails or takes too long is recorded as "failed", the next one still runs, and the exit code is 1. A piece whose
benchmark this version lacks is "missing". Without a GPU each piece is "skipped" in one line, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch

from benchmarks.shared import record
from benchmarks.shared.record import ROOT

LIMIT = 530  # seconds per piece
PIECES: dict[str, list[str]] = {  # arguments to python; OUTDIR is replaced
    "tests": ["-m pytest -m gpu -q -p no:cacheprovider tests"],
    "kernels": [
        "benchmarks/kernels.py --check --out OUTDIR/kernels-check.json",
        "benchmarks/kernels.py --minutes 6.5 --out OUTDIR/kernels.json",
    ],
    "memory-512": ["benchmarks/memory.py --tokens 512 --out OUTDIR/memory-512.json"],
    "memory-2048": ["benchmarks/memory.py --tokens 2048 --out OUTDIR/memory-2048.json"],
    "cap": ["benchmarks/memory.py --tokens 2048 --cap 24GiB --only qlora offload 32B LoRA --out OUTDIR/cap.json"],
    "speed": ["benchmarks/speed.py --out OUTDIR/speed.json"],
    "quality": ["benchmarks/quality.py --quick --minutes 5 --out OUTDIR/quality.json"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_evidence.sh", description="Measures on a GPU what this project claims.")
    parser.add_argument("piece", choices=[*PIECES, "all"], metavar="PIECE", help=", ".join([*PIECES, "all"]))
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pieces = PIECES if options.piece == "all" else [options.piece]
    statuses = [run_piece(piece, PIECES[piece], folder, torch.cuda.is_available()) for piece in pieces]
    return 1 if "failed" in statuses else 0


def run_piece(piece: str, commands: Sequence[str], folder: Path, gpu: bool, limit: float = LIMIT) -> str:
    """Runs all commands, whether or not one fails; writes PIECE.status.json and PIECE.log. Returns the status."""
    begin, log = time.monotonic(), folder / f"{piece}.log"
    ran: list[dict] = []
    log.write_text("")
    if not gpu:
        status = "skipped"
        _log(log, f"{piece}: skipped, there is no GPU here that PyTorch can use")
    else:
        for command in commands:
            script = command.split()[0]
            if script.endswith(".py") and not (ROOT / script).is_file():
                _log(log, f"{piece}: missing, this version has no {script}")
                ran.append({"command": f"python {command}", "status": "missing"})
                continue
            _log(log, f"$ python {command}")
            code = _run(command, folder, log, limit - (time.monotonic() - begin))
            ran.append({"command": f"python {command}", "status": "failed" if code else "ok", "exit_code": code})
        statuses = [entry["status"] for entry in ran]
        status = next((bad for bad in ("failed", "missing") if bad in statuses), "ok")
    printed = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    results = {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "commands": ran,
        "last_line": printed[-1] if printed else "",
    }
    record.write(folder / f"{piece}.status.json", f"gpu_evidence {piece}", results)
    if status in ("ok", "failed"):
        print(f"{piece}: {status}")
    return status


def _run(command: str, folder: Path, log: Path, seconds: float) -> int:
    """The exit code. Output goes to the terminal and to the log; after `seconds` the command is killed."""
    words = [word.replace("OUTDIR", str(folder)) for word in command.split()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its children are killed with it
    )
    late = threading.Timer(max(seconds, 0.01), os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    assert process.stdout is not None
    with process.stdout as output, log.open("a") as file:
        for line in output:
            file.write(line)
            print(line, end="", flush=True)
    code = process.wait()
    if not late.is_alive() and code == -signal.SIGKILL:
        _log(log, "killed: the time limit was reached")
    late.cancel()
    return code


def _log(log: Path, line: str) -> None:
    print(line, flush=True)
    with log.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
