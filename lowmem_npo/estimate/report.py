"""An estimate and the settings it is for, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lowmem_npo.config import ModelConfig, RunConfig, may_prefer
from lowmem_npo.data.self_written import self_rows
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.budget import Fit, cautious, fit_budget, fit_free, undecided
from lowmem_npo.estimate.gpus import Device
from lowmem_npo.estimate.host import StreamingHost, streaming_host
from lowmem_npo.estimate.rows import StepRows
from lowmem_npo.estimate.simulator.gpu import CAPABILITY
from lowmem_npo.estimate.step import Estimate, estimate
from lowmem_npo.estimate.time import RunTime, duration, step_seconds
from lowmem_npo.model import resolve_name
from lowmem_npo.model.known_configs import known_config, known_names
from lowmem_npo.model.loading import load_config, quantization_of
from lowmem_npo.model.notes import model_notes
from lowmem_npo.sizes import gib
from lowmem_npo.training.step_rows import num_steps
from lowmem_npo.training.training_rows import Parts

TOKENS = 64  # of the answers that the estimate speaks of


class Workload(NamedTuple):
    """What a run's steps have to do."""

    largest: StepRows  # which decide how much memory is needed
    typical: StepRows  # which decide how long a step takes
    steps: int | None = None  # of the run, if known
    epoch_steps: int | None = None  # of its first epoch

    @classmethod
    def of_length(cls, config: RunConfig) -> Workload:
        """Rows of --max-length tokens, and as many steps as --max-steps says."""
        rows, steps = StepRows.of_length(config), config.training.max_steps
        return cls(rows, rows, steps, steps)

    @classmethod
    def of_data(cls, config: RunConfig, rows: Parts) -> Workload:
        training, of_epochs = config.training, partial(num_steps, len(rows.forget), config.training.batch_size)
        steps = of_epochs(training.epochs, training.max_steps)
        largest, typical = (StepRows.of_data(config, rows, typical=typical) for typical in (False, True))
        return cls(largest, typical, steps, min(of_epochs(1), steps))


@dataclass(frozen=True)
class Report:
    """An estimate and the settings it is for."""

    model: str
    weights: str
    config: RunConfig
    rows: StepRows  # at once
    device: Device | None
    estimate: Estimate
    time: RunTime | None  # None: no GPU is named or here, or nothing is known of it
    budget: int | None
    flags: list[str]
    notes: list[str]
    host: StreamingHost | None = None  # of streamed weights; None: this host's, looked at when it is needed

    @property
    def capability(self) -> tuple[int, int]:
        return self.device.capability if self.device else CAPABILITY

    @property
    def copied_bytes(self) -> int:
        """From host memory to the GPU, in a step."""
        return self.estimate.copied_in_step(self.config.training.micro_batches())

    @cached_property
    def streaming_host(self) -> StreamingHost:
        """Where streamed weights are kept; looked at once, since a disk is tried for it."""
        config = self.config
        return self.host or streaming_host(config.model, config.memory.stream_from, self.estimate, self.copied_bytes)

    @property
    def pass_seconds(self) -> float:
        """How long one pass through all layers copies or reads their weights."""
        gpu = self.device.model if self.device else None
        return self.streaming_host.pass_seconds(self.estimate.streamed_bytes, gpu)

    def as_json(self) -> dict[str, Any]:
        result = self.estimate
        return {
            "model": self.model,
            "simulated": True,
            "gpu": None if self.device is None else self.device.name,
            "compute_capability": list(self.capability),
            "peak_bytes": result.peak_bytes,
            "needed_bytes": result.needed_bytes,
            "context_bytes": result.context_bytes,
            "host_bytes": result.host_bytes,
            "copied_bytes_per_step": self.copied_bytes,
            "by_kind": {kind.replace(" ", "_"): size for kind, size in result.by_kind.items()},
            "budget_bytes": self.budget,
            "fits": None if self.budget is None else result.fits(self.budget),
            "flags": self.flags,
            "notes": self.notes,
            "rows": {"forget": list(self.rows.forget), "retain": list(self.rows.retain)},
            "time": None if self.time is None else self.time.as_json(),
        }

    def text(self) -> str:
        result = self.estimate
        rows = f"{_rows(self.rows.forget, 'forget')}, {_rows(self.rows.retain, 'retain')}"
        joint = 0 if self.config.objective.parts_go_apart else self.config.memory.joint_pass_tokens
        rows += f"; in one pass if they have at most {joint} tokens together" if joint else ""
        lines = [*self.notes, f"{self.model}, {self.weights}; at once {rows}"]
        lines += [_line("allocated at the peak of a step (simulated)", result.peak_bytes)]
        lines += [_line(f"  {kind}", size) for kind, size in result.by_kind.items() if size]
        lines += [_line("needed by PyTorch's allocator for it", result.needed_bytes)]
        lines += [_line("CUDA context (assumed, outside PyTorch)", result.context_bytes)]
        lines += [_line("GPU memory needed", result.total_bytes)]
        if result.host_bytes >= 2**20:
            lines += [_line("host memory for tensors", result.host_bytes)]
        if self.config.memory.stream_weights:
            lines += [_line("copied from it to the GPU in a step", self.copied_bytes)]
            host = self.streaming_host
            if not host.in_file and host.needed > host.available:
                lines += [f"more than the {gib(host.available)} that this host has available (--quantized-cache helps)"]
            elif host.refused is not None:
                lines += [f"a run on this host would end here: {host.refused}"]
            elif host.in_file:
                lines += [f"this host has {gib(host.available)} available and reads {host.reads}"]
            lines += [
                f"written answers: a pass for each token of all rows of a set, {self.pass_seconds:.2g} s of copying, "
                f"{duration(TOKENS * self.pass_seconds / 3600)} for {TOKENS} tokens"
            ]
            answers = self.config.data.alternatives is not None and may_prefer(self.config.objective.forget_term)
            if self_rows(self.config.data.retain) is not None or answers:
                lines += ["texts that the original model writes before training take as many, unless a file has them"]
        flags = f"with {' '.join(self.flags)}" if self.flags else "with these options"
        if self.budget is not None:
            lines += [f"fits {gib(self.budget)}: yes, {flags}"]
        elif self.device is not None and self.device.available is not None:
            fits = "yes" if result.fits(self.device.available) else "no"
            lines += [f"fits the {gib(self.device.available)} of {self.device.name}: {fits}, {flags}"]
        return "\n".join([*lines, *self.time_lines()])

    def time_lines(self) -> list[str]:
        """How long a step and the run take, or why that is not known."""
        if self.time is not None and self.device is not None:
            return self.time.lines(self.device.name)
        if self.device is None:
            return ["time: no GPU here; --gpu NAME predicts that of one, such as rtx-4090"]
        return [f"time: nothing is known of '{self.device.name}', so none is predicted"]


def report(config: RunConfig, workload: Workload, device: Device | None = None) -> Report:
    """The estimate of `config`, or of the fastest settings that fit its memory budget. What it leaves to be decided is
    decided by the device's memory.

    Args:
        device: the GPU. Default: a card of 24 GB, whose time is not predicted.

    Raises:
        UserError: an unknown model, or a budget that cannot be met.
    """
    architecture, name = architecture_of(config.model), resolve_name(config.model.model, config.model.revision)
    notes = model_notes(architecture, config.model)
    budget, rows = config.memory.budget_bytes, workload.largest
    if budget is not None:
        fit = fit_budget(config, architecture, budget, rows, device, workload.typical)
    elif device is not None and device.available is not None and undecided(config):
        fit = fit_free(config, architecture, device.available, rows, device, workload.typical)
    else:
        capability = device.capability if device else CAPABILITY
        fit = Fit(cautious(config), estimate(cautious(config), architecture, rows, capability), [])
    model = fit.config.model
    quantization = quantization_of(architecture, model)
    weights = f"4-bit {quantization.bnb_4bit_quant_type.upper()}" if quantization else model.dtype
    at_once = rows.micro_batch(fit.config)
    time = run_time(fit.config, architecture, workload, device)
    return Report(name, weights, fit.config, at_once, device, _small(fit.estimate), time, budget, fit.flags, notes)


def run_time(
    config: RunConfig, architecture: PretrainedConfig, workload: Workload, device: Device | None
) -> RunTime | None:
    """The predicted time of a run with `config`; None where nothing is known of the GPU."""
    if device is None or device.model is None:
        return None
    cached = config.memory.reference != "live"
    timed = estimate(config, architecture, workload.typical, device.capability, later=cached)
    micro_batches = config.training.micro_batches()
    first = step_seconds(timed.work, micro_batches, device.model)
    later = step_seconds(timed.later_work, micro_batches, device.model) if cached else first
    steps, epoch_steps = workload.steps, workload.epoch_steps
    counts = None if steps is None or epoch_steps is None else (epoch_steps, steps - epoch_steps)
    return RunTime(first, later, counts)


def _small(result: Estimate) -> Estimate:
    """Without the list of operations, which a report does not need."""
    return replace(result, work=[], later_work=[])


def architecture_of(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration; a bundled one, which needs no network, if there is one.

    Raises:
        UserError: there is no such model, or it is not bundled and the hub cannot be reached.
    """
    name = resolve_name(config.model, config.revision)
    bundled = known_config(name) if config.revision is None else None
    if bundled is not None:
        return bundled
    try:
        return load_config(config)
    except UserError as error:
        if Path(name).is_dir():
            raise
        raise UserError(f"{error} Models known without a network: {', '.join(known_names())}.") from error


def _line(what: str, size: int) -> str:
    return f"{what:<44}{gib(size):>12}"


def _rows(rows: tuple[tuple[int, int], ...], part: str) -> str:
    longest = f" of up to {max(length for length, _ in rows)} tokens" if rows else ""
    return f"{len(rows)} {part} rows{longest}" if rows else f"no {part} rows"
