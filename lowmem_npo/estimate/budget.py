"""The fastest settings that keep a run within a memory budget, chosen by simulating its step.

Only settings that leave the loss and its gradients unchanged are tried. Their cost is assumed, not measured:

| setting | lengthens the step by |
|---|---|
| input embedding on the CPU | 0.5% |
| tiled MLP | 2% |
| checkpoints offloaded | 5% |
| each further micro-batch | 4% (the weights are dequantised again, for fewer rows) |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from lowmem_npo.config import TILE_ROWS, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.simulator.gpu import CAPABILITY
from lowmem_npo.estimate.step import Estimate, StepRows, estimate
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model.adapters import check_lora
from lowmem_npo.model.trial import of_depth
from lowmem_npo.sizes import gib

SWITCHES = {"embedding_on_cpu": (True, 0.005), "tile_mlp": (TILE_ROWS, 0.02), "offload_checkpoints": (True, 0.05)}
MICRO_BATCH_COST = 0.04
FEW, MORE = 4, 6  # layers of the shallow models that bound a deep one from below: more than are in flight at once


@dataclass(frozen=True)
class Fit:
    """Settings that fit, what they take, and the flags that lead to them."""

    config: RunConfig
    estimate: Estimate
    flags: list[str]


def fit_budget(
    config: RunConfig,
    architecture: PretrainedConfig,
    budget: int,
    rows: StepRows | None = None,
    capability: tuple[int, int] = CAPABILITY,
) -> Fit:
    """The fastest settings with which `config`'s step and the CUDA context take at most `budget` bytes.

    Args:
        rows: the step's. Default: of --max-length tokens.
        capability: the GPU's compute capability.

    Raises:
        UserError: nothing fits; the message gives the smallest possible budget and what takes the memory.
    """
    simulate = partial(estimate, rows=rows, capability=capability)
    candidates = sorted(_candidates(config, architecture), key=_slowdown)
    unchanged = simulate(config, architecture)
    if unchanged.fits(budget):
        return Fit(config, unchanged, [])
    smallest = simulate(candidates[-1], architecture)
    if not smallest.fits(budget):
        raise UserError(_impossible(config, candidates[-1], smallest, budget))
    for candidate in candidates[1:-1]:
        if _may_fit(candidate, architecture, budget, simulate):
            result = simulate(candidate, architecture)
            if result.fits(budget):
                return Fit(candidate, result, _flags(config, candidate))
    return Fit(candidates[-1], smallest, _flags(config, candidates[-1]))


def _candidates(config: RunConfig, architecture: PretrainedConfig) -> Iterator[RunConfig]:
    """All settings that need no more memory than those of `config`, which are included."""
    usable = [name for name in SWITCHES if not getattr(config.memory, name) and _suits(name, config, architecture)]
    training, rows = config.training, config.training.micro_batch_size or config.training.batch_size
    sizes = [rows, *itertools.takewhile(lambda size: size, (rows // 2**halvings for halvings in range(1, 32)))]
    for size in sizes:
        micro = training if size == rows else replace(training, micro_batch_size=size)
        for count in range(len(usable) + 1):
            for names in itertools.combinations(usable, count):
                switches: dict[str, Any] = {name: SWITCHES[name][0] for name in names}
                yield replace(config, memory=replace(config.memory, **switches), training=micro)


def _suits(switch: str, config: RunConfig, architecture: PretrainedConfig) -> bool:
    switched: dict[str, Any] = {switch: SWITCHES[switch][0]}
    try:
        apply_switches(check_lora(architecture, config.adapter), replace(config.memory, **switched))
    except UserError:
        return False
    return True


def _slowdown(config: RunConfig) -> float:
    switched = sum(cost for name, (_, cost) in SWITCHES.items() if getattr(config.memory, name))
    return (1 + switched) * (1 + MICRO_BATCH_COST * (config.training.micro_batches() - 1))


def _may_fit(
    config: RunConfig,
    architecture: PretrainedConfig,
    budget: int,
    simulate: Callable[[RunConfig, PretrainedConfig], Estimate] = estimate,
) -> bool:
    """False only if the step cannot fit. The memory in use at any moment grows linearly with the number of layers; the
    peak is the maximum over all moments, a convex function: two shallow models bound every deeper one from below."""
    layers = architecture.get_text_config().num_hidden_layers
    if config.adapter.may_name_layers or layers <= MORE:
        return True
    few, more = (simulate(config, of_depth(architecture, depth)) for depth in (FEW, MORE))
    slope = (more.peak_bytes - few.peak_bytes) / (MORE - FEW)
    return replace(few, needed_bytes=int(few.peak_bytes + slope * (layers - FEW))).fits(budget)


def _flags(before: RunConfig, after: RunConfig) -> list[str]:
    flags = []
    if after.training.micro_batch_size != before.training.micro_batch_size:
        flags += ["--micro-batch-size", str(after.training.micro_batch_size)]
    for name in SWITCHES:
        value = getattr(after.memory, name)
        if value != getattr(before.memory, name):
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return flags


def _impossible(config: RunConfig, smallest: RunConfig, needed: Estimate, budget: int) -> str:
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in sorted(needed.by_kind.items(), key=lambda k: -k[1])[:3])
    flags = " ".join(_flags(config, smallest)) or "these options"
    advice = "" if config.model.qlora else "--qlora makes the frozen weights about a quarter as large; "
    return (
        f"A budget of {gib(budget)} cannot be met: the smallest that works is {gib(needed.total_bytes)} (with "
        f"{flags}), of which {kinds}, CUDA context {gib(needed.context_bytes)}; {advice}a smaller --max-length or "
        "model takes less."
    )
