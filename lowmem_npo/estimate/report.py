"""An estimate and the settings it is for, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from lowmem_npo.config import ModelConfig, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.budget import Fit, fit_budget
from lowmem_npo.estimate.simulator.gpu import CAPABILITY
from lowmem_npo.estimate.step import Estimate, StepRows, estimate
from lowmem_npo.model import resolve_name
from lowmem_npo.model.known_configs import known_config, known_names
from lowmem_npo.model.loading import DTYPES, load_config
from lowmem_npo.model.notes import model_notes
from lowmem_npo.model.quantization import quantization_of
from lowmem_npo.sizes import gib


@dataclass(frozen=True)
class Report:
    """An estimate and the settings it is for."""

    model: str
    weights: str
    config: RunConfig
    rows: StepRows
    capability: tuple[int, int]
    estimate: Estimate
    budget: int | None
    flags: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        result = self.estimate
        return {
            "model": self.model,
            "simulated": True,
            "compute_capability": list(self.capability),
            "peak_bytes": result.peak_bytes,
            "needed_bytes": result.needed_bytes,
            "context_bytes": result.context_bytes,
            "host_bytes": result.host_bytes,
            "by_kind": {kind.replace(" ", "_"): size for kind, size in result.by_kind.items()},
            "budget_bytes": self.budget,
            "fits": None if self.budget is None else result.fits(self.budget),
            "flags": self.flags,
            "notes": self.notes,
            "rows": {"forget": list(self.rows.forget), "retain": list(self.rows.retain)},
        }

    def text(self) -> str:
        result = self.estimate
        rows = f"{_rows(self.rows.forget, 'forget')}, {_rows(self.rows.retain, 'retain')}"
        lines = [*self.notes, f"{self.model}, {self.weights}; at once {rows}"]
        lines += [_line("allocated at the peak of a step (simulated)", result.peak_bytes)]
        lines += [_line(f"  {kind}", size) for kind, size in result.by_kind.items() if size]
        lines += [_line("needed by PyTorch's allocator for it", result.needed_bytes)]
        lines += [_line("CUDA context (assumed, outside PyTorch)", result.context_bytes)]
        lines += [_line("GPU memory needed", result.total_bytes)]
        if result.host_bytes >= 2**20:
            lines += [_line("host memory for tensors", result.host_bytes)]
        if self.budget is not None:
            flags = f"with {' '.join(self.flags)}" if self.flags else "with these options"
            lines += [f"fits {gib(self.budget)}: yes, {flags}"]
        return "\n".join(lines)


def report(config: RunConfig, rows: StepRows, capability: tuple[int, int] | None = None) -> Report:
    """The estimate of `config`, or of the fastest settings that fit its memory budget.

    Args:
        capability: the compute capability of the GPU. Default: that of this machine's, or of a card of 24 GB.

    Raises:
        UserError: an unknown model, or a budget that cannot be met.
    """
    architecture, capability = architecture_of(config.model), capability or own_capability() or CAPABILITY
    budget, name = config.memory.budget_bytes, resolve_name(config.model.model, config.model.revision)[0]
    notes = model_notes(architecture, config.model)
    quantization = quantization_of(architecture, config.model.qlora, DTYPES[config.model.dtype])
    weights = f"4-bit {quantization.bnb_4bit_quant_type.upper()}" if quantization else config.model.dtype
    if budget is None:
        fit = Fit(config, estimate(config, architecture, rows, capability), [])
    else:
        fit = fit_budget(config, architecture, budget, rows, capability)
    at_once = rows.micro_batch(fit.config)
    return Report(name, weights, fit.config, at_once, capability, fit.estimate, budget, fit.flags, notes)


def own_capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU; None if it sees none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def architecture_of(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration; a bundled one, which needs no network, if there is one.

    Raises:
        UserError: there is no such model, or it is not bundled and the hub cannot be reached.
    """
    name = resolve_name(config.model, config.revision)[0]
    bundled = known_config(name) if config.revision is None else None
    if bundled is not None:
        return bundled
    try:
        return load_config(config)
    except UserError as error:
        raise UserError(f"{error} Models known without a network: {', '.join(known_names())}.") from error


def _line(what: str, size: int) -> str:
    return f"{what:<44}{gib(size):>12}"


def _rows(rows: tuple[tuple[int, int], ...], part: str) -> str:
    longest = f" of up to {max(length for length, _ in rows)} tokens" if rows else ""
    return f"{len(rows)} {part} rows{longest}" if rows else f"no {part} rows"
