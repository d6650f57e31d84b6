"""Where the time of a training step goes: each GPU kernel is attributed to the part of the model it works for.

What launched a kernel decides its part: the operators around the launch, their input shapes, and the ranges that
`marked` sets. On a CPU the operators' own times replace the kernels'.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PretrainedConfig

import lowmem_npo.training.passes as passes
import lowmem_npo.training.reference.live as live

HEAD, REFERENCE = "lowmem: head", "lowmem: reference"
PARTS = ("dequantisation", "attention", "attention's projections", "MLP", "head", "adapter", "optimizer",
         "copies to and from the host", "norms, rotary, residuals, the rest")  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The numbers by which shapes are recognised."""

    vocabulary: int
    hidden: int
    intermediate: int
    rank: int

    @classmethod
    def of(cls, config: PretrainedConfig, rank: int) -> Sizes:
        return cls(config.vocab_size, config.hidden_size, config.intermediate_size, rank)


@contextlib.contextmanager
def marked(npo: Any) -> Iterator[None]:
    """Inside, the head's work and the reference pass of an `NPOTrainer` are ranges in the profile."""

    def within(name: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for module, name in ((passes, "token_logprobs"), (passes, "retain_loss"), (live, "token_logprobs")):
            stack.enter_context(mock.patch.object(module, name, within(HEAD, getattr(module, name))))
        reference = npo.passes.reference
        for name in ("forget", "retain"):
            stack.enter_context(mock.patch.object(reference, name, within(REFERENCE, getattr(reference, name))))
        yield


@contextlib.contextmanager
def profiled() -> Iterator[dict]:
    """Profiles the body of the `with`; the dictionary then holds the trace, in Chrome's format."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    trace: dict = {}
    with profile(activities=activities, record_shapes=True) as profiler:
        yield trace
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace |= json.loads(path.read_text())


def breakdown(trace: dict, sizes: Sizes) -> dict[str, Any]:
    """Seconds of each part; of the reference pass, which the parts include; of the whole span; and of its idle time.

    Work on several streams counts on each, so parts and idle time may add up to more than the span. The profiler slows
    the host: compare the span with the time of a step that was not profiled.
    """
    work = list(_gpu_work(trace) or _cpu_work(trace))
    parts, reference = dict.fromkeys(PARTS, 0.0), 0.0
    for name, _, duration, around in work:
        parts[part_of(name, around, sizes)] += duration / 1e6
        if any(event["name"] == REFERENCE for event in around):
            reference += duration / 1e6
    busy = _covered([(begin, begin + duration) for _, begin, duration, _ in work]) / 1e6
    every = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event and _is_ours(event)]
    span = (max(e["ts"] + e["dur"] for e in every) - min(e["ts"] for e in every)) / 1e6
    return {"parts": parts, "reference": reference, "span": span, "idle": max(0.0, span - busy)}


def part_of(kernel: str, around: list[dict], sizes: Sizes) -> str:
    """Which of PARTS a kernel works for; `around` are the operators and ranges it was launched in, innermost first."""
    names = " ".join([kernel, *(event["name"] for event in around)]).lower()
    if "dequant" in kernel.lower() or any("dequantize" in event["name"] for event in around):
        return "dequantisation"
    if "optimizer.step" in names:
        return "optimizer"
    if HEAD in names:
        return "head"
    if kernel.lower().startswith("memcpy") and ("htod" in names or "dtoh" in names):
        return "copies to and from the host"
    if any(sign in names for sign in ("attention", "flash", "fmha", "sdpa")):
        return "attention"
    for event in around:
        shapes = [shape for shape in event.get("args", {}).get("Input Dims", []) if shape and _is_flat(shape)]
        numbers = {number for shape in shapes for number in shape}
        if sizes.vocabulary in numbers:
            return "head"
        if any(len(shape) == 2 and sizes.rank in shape for shape in shapes):
            return "adapter"
        if sizes.intermediate in numbers:
            return "MLP"
        if [sizes.hidden, sizes.hidden] in shapes:
            return "attention's projections"
    return PARTS[-1]


def _is_flat(shape: Any) -> bool:
    return isinstance(shape, list) and all(isinstance(number, int) for number in shape)


def _is_ours(event: dict) -> bool:
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset", "cpu_op")


Work = tuple[str, float, float, list[dict]]  # name, begin, duration (microseconds), what is around the launch


def _gpu_work(trace: dict) -> list[Work]:
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    on_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    around = _around(
        [launches[e["args"]["correlation"]] for e in on_gpu if e["args"].get("correlation") in launches], events
    )
    return [
        (event["name"], event["ts"], event["dur"], around.get(id(launches.get(event["args"].get("correlation"))), []))
        for event in on_gpu
    ]


def _cpu_work(trace: dict) -> Iterator[Work]:
    """Every operator with its own time, without that of the operators in it."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    around = _around(operators, events)
    own = {id(event): event["dur"] for event in operators}
    for event in operators:
        parent = next((outer for outer in around[id(event)] if outer.get("cat") == "cpu_op"), None)
        if parent is not None:
            own[id(parent)] -= event["dur"]
    for event in operators:
        yield event["name"], event["ts"], max(0.0, own[id(event)]), [event, *around[id(event)]]


def _around(inner: list[dict], events: list[dict]) -> dict[int, list[dict]]:
    """For the id of each event in `inner`: the operators and ranges of its thread that contain it, innermost first."""
    threads: dict[Any, list[dict]] = defaultdict(list)
    wanted = {id(event) for event in inner}
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation") or id(event) in wanted:
            threads[event["pid"], event["tid"]].append(event)
    around: dict[int, list[dict]] = {}
    for thread in threads.values():
        stack: list[dict] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
                stack.pop()
            if id(event) in wanted:
                around[id(event)] = stack[::-1]
            stack.append(event)
    return around


def _covered(intervals: list[tuple[float, float]]) -> float:
    """The length of their union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
