"""Writes what a benchmark measured, with the machine and the command it was measured with: one JSON file each.

{"benchmark": ..., "command": ..., "machine": {gpu, driver, versions, commit, ...}, "results": ...}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "trl",
            "cut-cross-entropy", "flash-attn")  # fmt: skip


def write(path: Path, benchmark: str, results: Any, **more: Any) -> None:
    """Writes `results` (anything JSON can hold) and the machine to `path`; `more` adds keys beside `results`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": benchmark, "command": command(), "machine": machine(), **more, "results": results}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)  # never half a file, whoever reads it or whenever time runs out


def device_folder() -> Path:
    """benchmarks/results/<gpu>, for example benchmarks/results/nvidia-h200; .../cpu without a GPU."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", gpu_name().lower()).strip("-")


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def reason(error: Exception) -> str:
    """Why a measurement is missing, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:200]


def machine() -> dict[str, Any]:
    """What the numbers depend on: GPU, driver, versions, commit, date (UTC)."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "gpu": gpu_name(),
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "cuda": torch.version.cuda,
        }
    return facts


def commit() -> str:
    """LOWMEM_NPO_COMMIT, if set, for a copy without its git; else the one checked out, "+changes" if files differ."""
    if named := os.environ.get("LOWMEM_NPO_COMMIT"):
        return named
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def command() -> str:
    """The command line as typed in the repository; of paths outside it only the last component."""
    return " ".join(shlex.quote(_short(argument)) for argument in ("python", *sys.argv))


def _short(argument: str) -> str:
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _output(*program: str) -> str:
    try:
        return subprocess.run(program, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
