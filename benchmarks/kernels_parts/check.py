"""`python benchmarks/kernels.py --check`: the errors of every contender, from where training starts to where it ends.

Without a GPU the Triton kernels run in Triton's interpreter, on a few tokens. What each engine would allocate at
a real size is then simulated: the engine runs on fake tensors, and what it allocates is counted.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.kernels_parts.cases import Case, Shape, make_cases, truth
from benchmarks.kernels_parts.peers import ENGINES, ON_CPU, Dense, Ours, contenders, installed
from benchmarks.kernels_parts.tasks import TASKS, errors, offers
from benchmarks.shared import record
from benchmarks.shared.record import reason

FULL, QUICK = Shape(tokens=16, vocabulary=16000, hidden=1024), Shape(tokens=24, vocabulary=2000, hidden=256)
SIMULATED = Shape(tokens=8192, vocabulary=128256, hidden=4096)
COLUMNS = {"b.logprob": "log-prob", "b.grad": "its gradient", "c.kl": "KL", "c.kl_token": "KL per token",
           "c.grad": "its gradient", "d.grad": "gradient of both"}  # fmt: skip
# The accuracy contract of our engines: docs/kernels.md.
CONTRACT = {"b.logprob": 1e-4, "c.kl": 5e-3, "c.kl_token": 5e-3, "c.grad": 1e-2, "d.grad": 1e-2}


def main(shape: Shape, levels: Sequence[float], without: Sequence[str], path: Path) -> int:
    """Prints the table and writes it to `path`. The exit code is 1 if one of our engines breaks the contract."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for noisy in ("liger_kernel", "torch._inductor"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    print(f"Errors against float64, {shape}, bfloat16 inputs")
    print(f"{'KL':<7}{'':<16}" + "".join(f"{title:>18}" for title in COLUMNS.values()))
    results = []
    with warnings.catch_warnings(), np.errstate(all="ignore"), few_large_blocks(device):
        warnings.simplefilter("ignore")  # Triton's interpreter computes with NumPy
        for row in check(shape, levels, device, without):
            results.append(row)
            if "missing" not in row:
                cells = "".join(f"{_percent(row.get(key)):>18}" for key in COLUMNS)
                print(f"{row['level']:<7.0e}{row['contender']:<16}{cells}", flush=True)
    _show_missing(results)
    simulated = simulate(SIMULATED) if device == "cpu" else []
    if simulated:
        print(f"\nWorkspace at {SIMULATED}, simulated (MiB beyond inputs and outputs)")
        print(f"{'':<16}" + "".join(f"{task.title:>44}" for task in TASKS))
        for row in simulated:
            print(f"{row['contender']:<16}" + "".join(f"{_mib(row.get(task.key)):>44}" for task in TASKS))

    broken = violations(results)
    print()
    for line in broken:
        print(f"OUTSIDE THE CONTRACT: {line}")
    ran = [name for name in ENGINES if any(row["contender"] == name and "missing" not in row for row in results)]
    if ran and not broken:
        limits = ", ".join(f"{key} {limit:.2%}" for key, limit in CONTRACT.items())
        print(f"Within the contract ({limits}): {', '.join(ran)}")
    record.write(path, "kernels --check", results, shape=vars(shape), contract=CONTRACT, simulated_workspace=simulated)
    print(f"Written to {path}")
    return 1 if broken else 0


@contextlib.contextmanager
def few_large_blocks(device: str) -> Iterator[None]:
    """Block sizes of `tiles` for Triton's interpreter, whose time is per operation: a GPU's would take an hour."""
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            from lowmem_kernels import tiles_engine  # not before the interpreter has been chosen
            from lowmem_kernels.tile_config import TileConfig

            for name, blocks in (("logits_config", (16, 2048, 256)), ("product_config", (16, 1024, 512))):
                config = TileConfig(*blocks, num_warps=4, num_stages=1)
                stack.enter_context(mock.patch.object(tiles_engine, name, lambda *_, config=config: config))
        yield


def check(shape: Shape, levels: Sequence[float], device: str, without: Sequence[str] = ()) -> Iterator[dict]:
    """One dictionary per level and contender: errors under "b.logprob", "c.kl", ..., or under "missing" why not."""
    runnable, unavailable = contenders(device, yardstick=True)
    for level in levels:
        (case,) = make_cases(shape, level, 1, device)
        exact = truth(case)
        for contender in runnable:
            if contender.name in without:
                continue
            row = {"level": level, "kl": float(exact.kl.mean()), "contender": contender.name}
            begin = time.monotonic()
            try:
                for task in TASKS[1:]:
                    if offers(contender, task):
                        value, grad = task.run(contender, case)
                        error_of = errors(task, value, grad, exact, case)
                        row |= {f"{task.key}.{name}": error for name, error in error_of.items()}
            except Exception as error:
                row["missing"] = reason(error)
            yield row | {"check_seconds": time.monotonic() - begin}
    for name, why in unavailable.items():
        yield {"contender": name, "missing": why}


def simulate(shape: Shape) -> list[dict]:
    """Bytes of workspace of our Triton engines and of the dense form, per task, without a GPU; see `fake_gpu`."""
    try:
        from lowmem_npo.estimate.simulator.gpu import fake_gpu
    except ImportError:  # lowmem_kernels alone
        return []
    n, v, d = shape.tokens, shape.vocabulary, shape.hidden
    rows = []
    engines: list[Ours | Dense] = [Ours(engine) for engine in ENGINES if engine != "torch"]
    for contender in (*engines, Dense()):
        row: dict = {"contender": contender.name}
        try:
            for task in TASKS:
                with fake_gpu() as gpu:
                    hidden, ref_hidden, weight = (
                        torch.empty(rows, d, dtype=torch.bfloat16, device="cuda") for rows in (n, n, v)
                    )
                    targets = torch.empty(n, dtype=torch.int64, device="cuda")
                    upstream = torch.empty(n, dtype=torch.float32, device="cuda")
                    case = Case(hidden.requires_grad_(), ref_hidden, weight, targets, upstream)
                    gpu.restart_peak()
                    before = gpu.live
                    outputs = task.run(contender, case)
                    kept = sum(out.untyped_storage().nbytes() for out in outputs if out is not None)
                    row[task.key] = max(0, gpu.peak - before - kept)
        except Exception as error:
            row["missing"] = reason(error)
        rows.append(row)
    return rows


def violations(results: list[dict]) -> list[str]:
    """Where one of our engines is further from the truth than the contract allows."""
    lines = []
    for row in results:
        if row["contender"] in ENGINES and "missing" not in row:
            for key, limit in CONTRACT.items():
                if not row[key] <= limit:  # also if it is NaN
                    lines.append(f"{row['contender']} at KL {row['level']:.0e}: {key} off by {_percent(row[key])}")
    return lines


def _show_missing(results: list[dict]) -> None:
    print()
    for name, why in {row["contender"]: row["missing"] for row in results if "missing" in row}.items():
        print(f"{name}: not available here: {why}")
    if not torch.cuda.is_available():
        for make, note in ON_CPU.items():
            if any(row["contender"] == make.name and "missing" not in row for row in results):
                print(f"{make.name}: {note}")
    versions = {name: installed(name) for name in ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy")}
    print(", ".join(f"{name} {version}" for name, version in versions.items() if version))


def _percent(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{100 * error:.0f}%" if error >= 0.1 else f"{100 * error:.2g}%"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"
