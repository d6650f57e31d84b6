"""How long a step takes on a GPU, from what it does.

The host calls one operator after the other; the GPU runs their kernels in that order, each no earlier than it is called
and no earlier than the one before it is done. For each kernel

    seconds = max(FLOPs / (0.9 * reached * peak), bytes / (0.8 * bandwidth), 2e-6)

with `peak`, `reached` and `bandwidth` of the table of GPUs. The parts of the formula and where they come from:

- 0.9: most products of a step have not the shape at which `reached` was measured. Attention runs at 0.4 of the peak:
  FlashAttention-2 at 0.5-0.7 on an A100, 0.35 on an H100 (Dao 2023).
- 0.8 of the bandwidth: between BabelStream's (0.85-0.9 on these cards) and what kernels with several operands reach.
- An operator takes 55 microseconds of the host, a view 11: so long takes a step of QLoRA on the host of an H200, a
  virtual machine (benchmarks/results/nvidia-h200/speed-rows.json). For an eager Llama-7B without adapters on the host
  of an A100, 20 and 4 give the 25.5 tokens a second that its authors measured (PyTorch blog, Accelerating Generative
  AI II, 2023; about 52 kernels and 35 views in each of 32 layers).
- Copies between host and GPU run beside the kernels, each direction at 0.8 of the bus. Where the host waits, it goes on
  when the GPU is done; where kernels need what is on its way, such as streamed weights, they begin when it is there.

Measured on an H100, a step of OLMo-7B in 4 bits on 4 + 4 rows of 2048 tokens took 1.59 s, predicted 1.52 s: there the
GPU computes all the time. On rows of 55 to 75 tokens, where it waits for the host, it took from as long as predicted to
half as long again. Loading, measuring before and after, and checkpoints come on top of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowmem_npo.estimate.gpus import GPUModel
from lowmem_npo.estimate.simulator.work import Operation
from lowmem_npo.estimate.step import ONCE, Work

PRODUCTS, ATTENTION, MEMORY, BUS = 0.9, 0.4, 0.8, 0.8  # of what the table says
SHORTEST = 2e-6  # seconds of a kernel
CALL, VIEW = 55e-6, 11e-6  # seconds of the host
ERROR = "checked on two GPUs; elsewhere the truth may be half of it or twice"


class Seconds(NamedTuple):
    """Of one step, or a part of it."""

    total: float
    gpu: float  # in which kernels run
    host: float  # that the host needs to call them
    copies: float = 0.0  # in which the bus brings something to the GPU


@dataclass(frozen=True)
class RunTime:
    """A step of a run's first epoch, one of the epochs that follow, and how many there are of each, if known."""

    first: Seconds
    later: Seconds
    steps: tuple[int, int] | None

    @property
    def hours(self) -> float | None:
        """Of all steps."""
        if self.steps is None:
            return None
        return (self.first.total * self.steps[0] + self.later.total * self.steps[1]) / 3600

    def mean(self, begin: int, end: int) -> float:
        """Seconds of a step, over those after `begin` up to `end`, as a resumed or stopped run takes them."""
        if self.steps is None or begin == end:
            return self.first.total
        first = max(0, min(end, self.steps[0]) - begin)
        return (self.first.total * first + self.later.total * (end - begin - first)) / (end - begin)

    def lines(self, gpu: str) -> list[str]:
        """For people."""
        first, later = self.first, self.later
        bound = "the GPU computes all the time" if first.gpu > first.host else "the GPU waits for the host"
        if first.copies > max(first.gpu, first.host):
            bound = "the GPU waits for the bus"
        lines = [f"time of a step on {gpu} (predicted): {first.total:.2f} s; {bound}"]
        if later != first:
            lines[0] = f"time of a step on {gpu} (predicted): {first.total:.2f} s, {later.total:.2f} s once the "
            lines[0] += f"reference is cached; {bound}"
        if first.copies >= 0.01:
            lines += [f"  of computing {first.gpu:.2f} s, of copies to the GPU, beside it, {first.copies:.2f} s"]
        if self.hours is not None and self.steps is not None:
            lines += [f"time of all {sum(self.steps)} steps: {duration(self.hours)}"]
        return [*lines, f"  ({ERROR})"]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "predicted": True,
            "seconds_per_step": self.first.total,
            "seconds_per_step_cached": self.later.total,
            "gpu_seconds": self.first.gpu,
            "host_seconds": self.first.host,
            "copy_seconds": self.first.copies,
            "steps": None if self.steps is None else sum(self.steps),
            "hours": self.hours,
            "error": ERROR,
        }


def duration(hours: float) -> str:
    """For people: seconds, minutes or hours."""
    for unit, size in (("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= size:
            return f"{hours / size:.1f} {unit}"
    return f"{hours * 3600:.0f} seconds"


def kernel_seconds(operation: Operation, gpu: GPUModel) -> float:
    """Of one kernel on `gpu`."""
    peak = 1e12 * (gpu.half * gpu.reached if operation.half else gpu.single)
    share = ATTENTION / gpu.reached if operation.part == "attention" else PRODUCTS
    work = operation.flops / (share * peak) if operation.flops else 0.0
    return max(work, operation.bytes / (MEMORY * 1e9 * gpu.bandwidth), SHORTEST)


def seconds(operations: Iterable[Operation], gpu: GPUModel) -> Seconds:
    """Of `operations`, one after the other."""
    known: dict[Operation, float] = {}
    host = waited = busy = gpu_free = 0.0
    bus_free = {"to GPU": 0.0, "to host": 0.0}
    copied = 0.0
    for operation in operations:
        host += VIEW if operation.kind in ("view", "arrival") else CALL
        if operation.kind == "kernel":
            duration = known.get(operation)
            if duration is None:
                duration = known[operation] = kernel_seconds(operation, gpu)
            gpu_free = max(gpu_free, host + waited) + duration
            busy += duration
        elif operation.kind == "copy":
            way = operation.part or "to GPU"
            taken = operation.bytes / (BUS * 1e9 * gpu.bus)
            bus_free[way] = max(bus_free[way], gpu_free) + taken
            copied += taken if way == "to GPU" else 0.0
            if operation.waits:
                gpu_free = max(gpu_free, bus_free[way])
        elif operation.kind == "arrival":
            gpu_free = max(gpu_free, bus_free["to GPU"])
        if operation.waits:
            waited = max(waited, gpu_free - host)
    return Seconds(max(host + waited, gpu_free, *bus_free.values()), busy, host, copied)


def step_seconds(work: Work, micro_batches: int, gpu: GPUModel) -> Seconds:
    """Of an optimiser step: `work` is that of one of its micro-batches, and what there is once in a step, the
    adversary's and the optimiser's."""
    by_micro_batch = [operation for part, some in work if part not in ONCE for operation in some]
    once = [[operation for part, some in work if part == name for operation in some] for name in ONCE]
    one, *others = (seconds(operations, gpu) for operations in (by_micro_batch, *once))
    return Seconds(*(micro_batches * a + sum(more) for a, *more in zip(one, *others, strict=True)))
