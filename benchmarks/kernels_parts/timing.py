"""Measures time and memory: contenders take turns, timed by CUDA events; workspace is what the allocator handed out."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.record import reason

FEWEST, MOST, SLOW = 5, 40, 2  # turns of a contender; SLOW if the fewest would take too long


def take_turns(
    contenders: dict[str, Callable[[Any], Any]], inputs: Sequence[Any], seconds: float, device: str
) -> dict[str, dict | str]:
    """Median, 10th and 90th percentile of each contender's time. They take turns, going through the `inputs`.

    Each gets about `seconds` in all, and from 5 to 40 turns; 2 if 5 would take more than five times `seconds`. On CUDA
    nothing waits between turns, so a contender's launches overlap the work before them as they would in training; if it
    waits for the GPU itself, that counts. A contender that fails is replaced by the reason.
    """
    times: dict[str, list] = {name: [] for name in contenders}
    turns: dict[str, int] = {}
    failed: dict[str, dict | str] = {}
    for name, run in contenders.items():
        try:
            run(inputs[0])
            once = _seconds([_timed(run, inputs[-1], device)], device)[0]
            fits = int(seconds / max(once, 1e-9))
            turns[name] = max(FEWEST, min(MOST, fits)) if FEWEST * once <= 5 * seconds else SLOW
        except Exception as error:
            failed[name] = reason(error)
    gc.collect()
    gc.disable()
    try:
        for turn in range(max(turns.values(), default=0)):
            for name in [name for name, count in turns.items() if turn < count and name not in failed]:
                try:
                    times[name].append(_timed(contenders[name], inputs[turn % len(inputs)], device))
                except Exception as error:
                    failed[name] = reason(error)
    finally:
        gc.enable()
    return {name: failed[name] if name in failed else _summary(_seconds(times[name], device)) for name in contenders}


def workspace(run: Callable[[], tuple[Tensor, Tensor | None]], device: str) -> tuple[tuple[Tensor, Tensor | None], int]:
    """What `run` returned, and its peak in bytes beyond what was allocated before and what it returned."""
    if device != "cuda":
        return run(), 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    kept = sum(out.untyped_storage().nbytes() for out in outputs if out is not None)
    return outputs, max(0, torch.cuda.max_memory_allocated() - before - kept)


def _timed(run: Callable[[Any], Any], argument: Any, device: str) -> Any:
    if device != "cuda":
        before = time.perf_counter()
        run(argument)
        return time.perf_counter() - before
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run(argument)
    end.record()
    return begin, end


def _seconds(times: list, device: str) -> list[float]:
    if device != "cuda":
        return times
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in times]


def _summary(times: list[float]) -> dict[str, float | int]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "low": tenths[0], "high": tenths[-1], "count": len(times)}
