"""An estimate with what it was made for, told to people and to machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from lowmem_npo.config import ModelConfig, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.budget import fit_budget
from lowmem_npo.estimate.step import Estimate, StepRows, estimate
from lowmem_npo.model import resolve_name
from lowmem_npo.model.known_configs import known_config, known_names
from lowmem_npo.model.loading import load_config
from lowmem_npo.sizes import gib


@dataclass(frozen=True)
class Report:
    """An estimate with what it was made for."""

    model: str
    config: RunConfig
    rows: StepRows
    estimate: Estimate
    budget: int | None
    flags: list[str]

    def as_json(self) -> dict[str, Any]:
        found = self.estimate
        return {
            "model": self.model,
            "simulated": True,
            "peak_bytes": found.peak_bytes,
            "context_bytes": found.context_bytes,
            "host_bytes": found.host_bytes,
            "by_kind": {kind.replace(" ", "_"): size for kind, size in found.by_kind.items()},
            "budget_bytes": self.budget,
            "fits": None if self.budget is None else found.fits(self.budget),
            "flags": self.flags,
            "rows": {"forget": list(self.rows.forget), "retain": list(self.rows.retain)},
        }

    def text(self) -> str:
        found, weights = self.estimate, "4-bit NF4" if self.config.model.qlora else self.config.model.dtype
        lines = [f"{self.model}, {weights}; at once {_told(self.rows.forget)} forget, {_told(self.rows.retain)} retain"]
        lines += [_line("peak of a training step (simulated)", found.peak_bytes)]
        lines += [_line(f"  {kind}", size) for kind, size in found.by_kind.items() if size]
        lines += [_line("CUDA context (assumed, outside PyTorch)", found.context_bytes)]
        lines += [_line("the GPU must have", found.total_bytes)]
        if found.host_bytes >= 2**20:
            lines += [_line("host memory for tensors", found.host_bytes)]
        if self.budget is not None:
            flags = f"with {' '.join(self.flags)}" if self.flags else "with these options"
            lines += [f"fits {gib(self.budget)}: yes, {flags}"]
        return "\n".join(lines)


def report(config: RunConfig, rows: StepRows) -> Report:
    """The estimate of `config`, or of the fastest settings that fit its memory budget.

    Raises:
        UserError: an unknown model, a budget that cannot be kept.
    """
    architecture = architecture_of(config.model)
    budget, name = config.memory.budget_bytes, resolve_name(config.model.model)[0]
    if budget is None:
        return Report(name, config, rows.micro_batch(config), estimate(config, architecture, rows), None, [])
    fit = fit_budget(config, architecture, budget, rows)
    return Report(name, fit.config, rows.micro_batch(fit.config), fit.estimate, budget, fit.flags)


def architecture_of(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration, bundled ones first: they need no network.

    Raises:
        UserError: no such model, or it is not bundled and the hub cannot be reached.
    """
    name = resolve_name(config.model)[0]
    bundled = known_config(name) if config.revision is None else None
    if bundled is not None:
        return bundled
    try:
        return load_config(config)
    except UserError as error:
        raise UserError(f"{error} Known without a network: {', '.join(known_names())}.") from error


def _line(what: str, size: int) -> str:
    return f"{what:<42}{gib(size):>12}"


def _told(rows: tuple[tuple[int, int], ...]) -> str:
    longest = f" of up to {max(length for length, _ in rows)} tokens" if rows else ""
    return f"{len(rows)} x{longest}" if rows else "no"
