"""`scripts/gpu_evidence.sh PIECE OUTDIR`: runs a piece's commands and records how they ended.

OUTDIR gets PIECE.status.json, PIECE.log and what the benchmarks write; copy it into benchmarks/results. A piece that
fails or takes too long is recorded as "failed", the next one still runs, and the exit code is 1. A piece whose
benchmark this version lacks is "missing". Without a GPU, or a package that it needs, a piece is "skipped" in one line,
and the exit code is 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    import checkout  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 530  # seconds per piece


class Piece(NamedTuple):
    """Commands, as arguments to python (OUTDIR is replaced), and the modules that they need beside the checkout."""

    about: str
    needs: tuple[str, ...]
    commands: tuple[str, ...]


KERNELS = ("torch", "triton")
RUN = (*KERNELS, "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "tyro", "yaml")
PICTURE = ("numpy", "matplotlib")
PIECES = {
    "tests": Piece(
        "the kernels against float64 at real sizes",
        (*KERNELS, "pytest", "hypothesis"),
        ("-m pytest -m gpu -q -p no:cacheprovider tests/kernels/test_gpu.py",),
    ),
    "tests-model": Piece(
        "packed rows in one call of attention, and streamed weights against resident ones",
        (*RUN, "pytest", "hypothesis"),
        ("-m pytest -m gpu -q -p no:cacheprovider tests/model tests/memory",),
    ),
    "kernels": Piece(
        "time and memory of the kernels and, where they can be imported, of their peers",
        (*KERNELS, *PICTURE),
        (
            "benchmarks/kernels.py --check --out OUTDIR/kernels-check.json",
            "benchmarks/kernels.py --layers --out OUTDIR/kernels-layers.json",
            "benchmarks/kernels.py --minutes 6 --out OUTDIR/kernels.json",
        ),
    ),
    "memory-512": Piece(
        "peak and time of a 7B step of 512 tokens, switch by switch",
        (*RUN, *PICTURE),
        ("benchmarks/memory.py --tokens 512 --out OUTDIR/memory-512.json",),
    ),
    "memory-2048": Piece(
        "the same with 2048 tokens",
        (*RUN, *PICTURE),
        ("benchmarks/memory.py --tokens 2048 --out OUTDIR/memory-2048.json",),
    ),
    "cap": Piece(
        "what runs in 24 GiB",
        RUN,
        ("benchmarks/memory.py --tokens 2048 --cap 24GiB --only qlora offload 32B LoRA --out OUTDIR/cap.json",),
    ),
    "speed": Piece(
        "a 7B step on rows as long as real ones, beside the predicted time; and where the time goes",
        RUN,
        (
            "benchmarks/speed.py --rows --minutes 2 --out OUTDIR/speed-rows.json",
            "benchmarks/speed.py --minutes 4 --out OUTDIR/speed.json",
        ),
    ),
    "streaming": Piece(
        "peak, time and loss of a 7B and a 32B step, weights resident and streamed",
        RUN,
        (
            "benchmarks/streaming.py --out OUTDIR/streaming-7b.json",
            "benchmarks/streaming.py --model allenai/OLMo-2-0325-32B --tokens 2048 --steps 1"
            " --only resident streamed, --out OUTDIR/streaming-32b.json",
        ),
    ),
    "quality": Piece(
        "the paper's rows on a small model, in brief",
        (*RUN, "datasets", "rouge_score", "sklearn", *PICTURE),
        ("benchmarks/quality.py --quick --minutes 5 --out OUTDIR/quality.json",),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    lines = [f"  {name:<12} {piece.about} (needs {', '.join(piece.needs)})" for name, piece in PIECES.items()]
    parser = argparse.ArgumentParser(
        prog="gpu_evidence.sh",
        description="Measures on a GPU what this project claims, a piece at a time, each in less than 9 minutes.",
        epilog="\n".join(["pieces:", *lines, f"  {'all':<12} one after the other"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("piece", choices=[*PIECES, "all"], metavar="PIECE", help="one of those below")
    parser.add_argument("folder", type=Path, metavar="OUTDIR", help="gets PIECE.status.json, PIECE.log and results")
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    import torch  # late: --help need not load it

    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pieces = PIECES if options.piece == "all" else [options.piece]
    statuses = [run_piece(name, PIECES[name], folder, torch.cuda.is_available()) for name in pieces]
    return 1 if "failed" in statuses else 0


def run_piece(name: str, piece: Piece, folder: Path, gpu: bool, limit: float = LIMIT) -> str:
    """Runs all commands, whether or not one fails; writes PIECE.status.json and PIECE.log. Returns the status."""
    from benchmarks.shared import record

    begin, log = time.monotonic(), folder / f"{name}.log"
    ran: list[dict] = []
    log.write_text("")
    missing = [module for module in piece.needs if importlib.util.find_spec(module) is None]
    if not gpu:
        status = "skipped"
        _log(log, f"{name}: skipped, there is no GPU here that PyTorch can use")
    elif missing:
        status = "skipped"
        _log(
            log, f"{name}: skipped, it needs {', '.join(missing)}: carry {'it' if len(missing) == 1 else 'them'} along"
        )
    else:
        for command in piece.commands:
            script = command.split()[0]
            if script.endswith(".py") and not (ROOT / script).is_file():
                _log(log, f"{name}: missing, this version has no {script}")
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
    record.write(folder / f"{name}.status.json", f"gpu_evidence {name}", results)
    if status in ("ok", "failed"):
        print(f"{name}: {status}")
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
    too_long = threading.Event()  # set before the kill: the timer's own state may lag behind the death it causes

    def kill() -> None:
        too_long.set()
        os.killpg(process.pid, signal.SIGKILL)

    late = threading.Timer(max(seconds, 0.01), kill)
    late.start()
    assert process.stdout is not None
    with process.stdout as output, log.open("a") as file:
        for line in output:
            file.write(line)
            print(line, end="", flush=True)
    code = process.wait()
    late.cancel()
    if too_long.is_set() and code == -signal.SIGKILL:
        _log(log, "killed: the time limit was reached")
    return code


def _log(log: Path, line: str) -> None:
    print(line, flush=True)
    with log.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
