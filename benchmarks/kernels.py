"""Time, workspace and error of the vocabulary kernels: ours, every installed peer, plain PyTorch, the bare products.

    python benchmarks/kernels.py             on a GPU: everything; writes results/<gpu>/kernels.json and kernels.png
    python benchmarks/kernels.py --check     anywhere: errors against float64 at four sizes of the KL
    python benchmarks/kernels.py --layers    the kernels of the layers instead: norms, rotary embeddings, gated
                                             activations; timed on a GPU, simulated elsewhere

Four tasks, those of an unlearning step, with a frozen LM head and bfloat16 inputs:

    a  token log-probabilities, no gradient                              floor: 1 product of N x V x d
    b  the same, and backward to the hidden states                              2
    c  KL(policy || reference) of every token, and backward                     3
    d  cross-entropy and KL of one batch, and backward                          3

The floor is that many bare bfloat16 matrix products by cuBLAS, nothing else. Workspace is what the allocator handed out
at the peak, beyond inputs and outputs. Contenders take turns on the same inputs; times are by CUDA events.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch
from torch import Tensor

from benchmarks.kernels_parts import check, layers, picture
from benchmarks.kernels_parts.cases import Case, Shape, make_cases, truth
from benchmarks.kernels_parts.peers import contenders
from benchmarks.kernels_parts.tasks import TASKS, Floor, Task, errors, offers
from benchmarks.kernels_parts.timing import take_turns, workspace
from benchmarks.shared import record
from benchmarks.shared.arguments import count, minutes
from benchmarks.shared.record import reason

ROWS = 512  # tokens whose errors are computed beside the times
INPUT_SETS = 4  # contenders cycle through them, so that no input is still in the cache
KL = 1e-4


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    gpu = torch.cuda.is_available()
    if options.layers:
        folder = record.device_folder() if gpu else record.RESULTS / "simulated"
        path = options.out or folder / "kernels-layers.json"
        return layers.main(path, layers.QUICK if options.quick else layers.FULL, options.seconds)
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        print("No GPU here: only errors and memory are checked. Times, and contenders that need a GPU, are left out.")
    if options.check or not gpu:
        shape = check.QUICK if options.quick else check.FULL
        path = options.out or record.device_folder() / "kernels-check.json"
        return check.main(shape, options.kl, options.without, path)

    path = options.out or record.device_folder() / "kernels.json"
    shapes = [Shape(n, v, d) for n in options.tokens for v in options.vocabulary for d in options.hidden]
    deadline = time.monotonic() + 60 * options.minutes
    runs: list[dict] = []
    for shape in shapes:
        runs += measure(shape, "cuda", options.seconds, deadline, options.without)
        record.write(path, "kernels", runs, kl=KL, goals=goals(runs))  # after each shape: a crash loses one
    print()
    for goal in goals(runs):
        print(f"{'met   ' if goal['met'] else 'MISSED'}  {goal['goal']}: {goal['found']}")
    if any("seconds" in run for run in runs):
        picture.draw(runs, path.with_suffix(".png"), record.gpu_name())
    print(f"Written to {path}")
    return 0


def measure(shape: Shape, device: str, seconds: float, deadline: float, without: Sequence[str] = ()) -> list[dict]:
    """All tasks at one shape. One dictionary per task and contender: what was measured, or under "missing" why not."""
    print(f"\n{shape}")
    common = {"tokens": shape.tokens, "vocabulary": shape.vocabulary, "hidden": shape.hidden}
    late = "not measured: the time limit was reached"
    if time.monotonic() > deadline:
        print(f"  {late}")
        return [{**common, "task": task.key, "missing": late} for task in TASKS]
    if device == "cuda":
        torch.cuda.empty_cache()
    cases = make_cases(shape, KL, INPUT_SETS, device)
    exact = truth(cases[0], ROWS)
    runnable, unavailable = contenders(device)
    floor = Floor(cases[0])
    runs: list[dict] = []
    value: Tensor | None
    for task in TASKS:
        runs += [{**common, "task": task.key, "contender": name, "missing": why} for name, why in unavailable.items()]
        ready: dict[str, Callable[[Case], Any]] = {}
        for contender in (floor, *runnable):
            if contender.name in without or not offers(contender, task):
                continue
            run = {**common, "task": task.key, "contender": contender.name}
            runs.append(run)
            if time.monotonic() > deadline:
                run["missing"] = late
                continue
            try:
                begin = time.monotonic()
                task.run(contender, cases[0])
                if device == "cuda":
                    torch.cuda.synchronize()
                run["first_call_seconds"] = time.monotonic() - begin  # compiling and tuning included
                (value, grad), run["workspace_bytes"] = workspace(partial(task.run, contender, cases[0]), device)
                if contender is not floor:
                    run["errors"] = errors(task, value, grad, exact, cases[0])
                ready[contender.name] = partial(task.run, contender)
            except Exception as error:
                run["missing"] = reason(error)
            value = grad = None  # frees them before the next contender
        for name, times in take_turns(ready, cases, seconds, device).items():
            run = next(r for r in runs if r["task"] == task.key and r.get("contender") == name)
            run["missing" if isinstance(times, str) else "seconds"] = times
        _show(task, [run for run in runs if run["task"] == task.key])
    return runs


def goals(runs: list[dict]) -> list[dict]:
    """What a Hopper GPU should reach at 8192 tokens, judged by the worst shape."""
    timed = {(r["task"], r["contender"], r["tokens"], r["vocabulary"], r["hidden"]): r for r in runs if "seconds" in r}
    shapes = sorted({key[2:] for key in timed})
    ours, verdicts = ("chunks", "tiles"), []

    def median(task: str, contender: str, shape: tuple) -> float | None:
        run = timed.get((task, contender, *shape))
        return run["seconds"]["median"] if run else None

    def add(goal: str, values: list[tuple[float, tuple]], limit: float, unit: str = "x") -> None:
        if values:
            value, (n, v, d) = max(values)
            verdicts.append({"goal": goal, "limit": limit, "met": value <= limit, "value": value,
                             "found": f"{value:.2f}{unit} at worst ({n} tokens, V {v}, d {d})"})  # fmt: skip

    def ratios(task: str, ours_is: str, to: Sequence[str], at_least_tokens: int = 8192) -> list[tuple[float, tuple]]:
        pairs = []
        for shape in shapes:
            mine, others = median(task, ours_is, shape), [median(task, name, shape) for name in to]
            if mine and shape[0] >= at_least_tokens and any(others):
                pairs.append((mine / min(other for other in others if other), shape))
        return pairs

    mib = 2**20
    peers = sorted({key[1] for key in timed} - {"floor", "chunks", "tiles", "torch"})
    for key, gemms in (("b", 2), ("c", 3), ("d", 3)):
        add(f"{key}: chunks at most 1.15 x the time of its {gemms} products", ratios(key, "chunks", ["floor"]), 1.15)
        sizes = [(r["workspace_bytes"] / mib, k[2:]) for k, r in timed.items() if k[:2] == (key, "chunks")]
        add(f"{key}: chunks at most 256 MiB of workspace", sizes, 256, " MiB")
    for task in TASKS:
        best: dict[tuple, float] = {}
        for name in ours:
            for ratio, shape in ratios(task.key, name, peers, 0):
                best[shape] = min(ratio, best.get(shape, ratio))
        add(f"{task.key}: faster than every peer", [(ratio, shape) for shape, ratio in best.items()], 1.0)
    add("d: at most half the time of the best peer", ratios("d", "chunks", peers), 0.5)
    add("a: tiles at most 1 / 0.6 of the time of its product", ratios("a", "tiles", ["floor"]), 1 / 0.6)
    sizes = [(r["workspace_bytes"] / mib, k[2:]) for k, r in timed.items() if k[:2] == ("a", "tiles")]
    add("a: tiles at most 4 MiB of workspace", sizes, 4, " MiB")
    return verdicts


def _show(task: Task, runs: list[dict]) -> None:
    print(f"  {task.key}  {task.title}")
    floor = next((r["seconds"]["median"] for r in runs if r.get("contender") == "floor" and "seconds" in r), None)
    for run in runs:
        if "seconds" not in run:
            print(f"     {run['contender']:<14} {run.get('missing')}")
            continue
        s = run["seconds"]
        line = f"     {run['contender']:<14} {1e3 * s['median']:8.2f} ms"
        line += f" ({1e3 * s['low']:.2f} to {1e3 * s['high']:.2f})"
        line += f" {s['median'] / floor:6.2f}x floor" if floor else ""
        line += f" {run['workspace_bytes'] / 2**20:9.1f} MiB  "
        print(line + "  ".join(f"{name} {value:.1e}" for name, value in run.get("errors", {}).items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only the errors, at KL 1e-6, 1e-4, 1e-2 and 1")
    parser.add_argument("--layers", action="store_true", help="only norms, rotary embeddings and gated activations")
    parser.add_argument("--quick", action="store_true", help="with --check: d 256, V 2000 instead of d 1024, V 16000;"
                        " with --layers: 512 tokens instead of 8192")  # fmt: skip
    parser.add_argument("--kl", type=float, nargs="+", default=[1e-6, 1e-4, 1e-2, 1.0], help="with --check: the levels")
    parser.add_argument("--tokens", type=count, nargs="+", default=[8192, 1024])
    parser.add_argument("--vocabulary", type=count, nargs="+", default=[128256, 50304, 151936])
    parser.add_argument("--hidden", type=count, nargs="+", default=[4096, 2048])
    parser.add_argument("--seconds", type=float, default=0.4, help="time spent on one contender at one task (0.4)")
    parser.add_argument("--minutes", type=minutes, default=7.5, help="skip whatever is not measured by then (7.5)")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="contenders to leave out")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/<gpu>/...)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
