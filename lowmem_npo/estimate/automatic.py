"""What a run leaves open with `auto`, decided before its weights are loaded: by its rows, the disk and the memory.

A decision is recorded in the run's configuration; a run that is resumed keeps it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PretrainedConfig

from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say
from lowmem_npo.data import PreparedData
from lowmem_npo.data.chat import today
from lowmem_npo.environment import available_memory
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.background import Simulation, workload_of
from lowmem_npo.estimate.generation import generation, own_writing
from lowmem_npo.estimate.gpus import Device, own_device
from lowmem_npo.estimate.report import Report
from lowmem_npo.estimate.rows import StepRows
from lowmem_npo.estimate.simulator.gpu import CAPABILITY
from lowmem_npo.memory.streaming import check_device
from lowmem_npo.model.loading import DTYPES, resolve_device
from lowmem_npo.model.saved_adapter import settings_of_run
from lowmem_npo.run_directory import DECIDED, RunDirectory
from lowmem_npo.sizes import gib
from lowmem_npo.training.reference import check_cache_space
from lowmem_npo.training.step_rows import num_steps
from lowmem_npo.training.training_rows import planned_rows

SIMULATING = "A step is simulated, to see what fits into memory; of a large model that takes a minute or more."
FEW_BYTES = 256 * 2**20  # of activations, which are kept without a simulation


def as_begun(config: RunConfig) -> RunConfig:
    """`config` with the date of its chat template, and, of a run that is to be resumed, all that was decided when it
    began; what goes against an option of now, as a live reference against --reference-dir, is left to be decided
    anew."""
    began = settings_of_run(config.output.output_dir) if config.output.resume else {"chat_date": today()}
    for name in DECIDED:
        section = next(of for of in ("model", "data", "memory") if hasattr(getattr(config, of), name))
        options: Any = getattr(config, section)
        if getattr(options, name) == "auto" and began.get(name, "auto") != "auto":
            with suppress(UserError):
                config = replace(config, **{section: replace(options, **{name: began[name]})})
    return config


def decide(
    config: RunConfig, data: PreparedData, architecture: PretrainedConfig, say: Say
) -> tuple[RunConfig, Report | None]:
    """`config` with nothing left open and, on a GPU or for a budget, its estimate. Several processes decide as one.

    Raises:
        UserError: the budget cannot be met (the message gives the smallest that can), or the disk has no room for the
            cached reference that was asked for.
    """
    state = PartialState()
    if state.num_processes == 1:
        return _decide(config, data, architecture, say)
    result: list[Any] = [None]
    if state.is_main_process:
        try:
            result = [_decide(config, data, architecture, say)]
        except UserError as error:
            result = [error]
    broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def _decide(
    config: RunConfig, data: PreparedData, architecture: PretrainedConfig, say: Say
) -> tuple[RunConfig, Report | None]:
    config = _with_reference(config, data, architecture, say)
    on_gpu = resolve_device(config.model.device).type == "cuda"
    budget = config.memory.memory_budget
    if not on_gpu and budget is None:
        return _on_cpu(config, data, architecture, say), None
    say(SIMULATING)
    report = Simulation(config, workload_of(config, data), own_device() if on_gpu else None).report()
    if report.config.memory.stream_weights:
        report = _with_host(report, on_gpu, say)
        report = replace(report, config=with_answers(report, data, architecture, say))
    flags = f"with {' '.join(report.flags)}" if report.flags else "as configured"
    needed, context = gib(report.estimate.needed_bytes), gib(report.estimate.context_bytes)
    limit = f"Memory budget {budget}" if budget is not None else "Memory"
    free = f" (free: {gib(report.device.available)})" if report.device and report.device.available else ""
    say(f"{limit}: a step needs {needed} and CUDA about {context}{free}, {flags}.")
    if report.device is not None:
        for line in report.time_lines():
            say(line)
    memory = replace(report.config.memory, memory_budget=None, stream_from=_stream_from(report.config))
    return replace(report.config, memory=memory), report


def _stream_from(config: RunConfig) -> Any:
    """--stream-from of a run whose switches are decided: what was said for a budget that needs no streaming goes."""
    return config.memory.stream_from if config.memory.stream_weights else "auto"


def with_answers(report: Report, data: PreparedData, architecture: PretrainedConfig, say: Say) -> RunConfig:
    """The configuration with --generate-answers decided, after saying what writing them takes."""
    output = report.config.output
    answers = generation(report.config, data, architecture, report)
    if output.generate_answers == "auto":
        output = replace(output, generate_answers="off" if answers.is_too_long else "on")
    if answers.passes:
        say(answers.line(output.lets_write))
    for line in own_writing(report.config, data, architecture, report):
        say(line)
    return replace(report.config, output=output)


def _with_host(report: Report, on_gpu: bool, say: Say) -> Report:
    """The report with what --stream-from leaves open decided, after saying how much host memory streamed
    weights take. Raises UserError if it is not there, or without a GPU."""
    if not on_gpu:
        check_device(torch.device("cpu"))
    host = report.streaming_host
    for line in host.lines():
        say(line)
    host.check()
    memory = replace(report.config.memory, stream_from="cache" if host.in_file else "memory")
    return replace(report, config=replace(report.config, memory=memory), host=host)


def _with_reference(config: RunConfig, data: PreparedData, architecture: PretrainedConfig, say: Say) -> RunConfig:
    """Cached, if there is more than one epoch (or a place that several runs share), and room for it."""
    memory, training, rows = config.memory, config.training, planned_rows(config, data)
    if memory.reference == "live":
        return config
    cached = replace(config, memory=replace(memory, reference="cached"))
    live = replace(config, memory=replace(memory, reference="live", reference_dir=None))
    if memory.reference == "auto":
        of_epochs = partial(num_steps, rows.num_forget, training.batch_size)
        one_epoch = of_epochs(training.epochs, training.max_steps) <= of_epochs(1)
        unneeded = config.objective.needs_reference is None and config.objective.delta == 0
        if unneeded or (one_epoch and memory.reference_dir is None):
            return live
    directory, dtype = RunDirectory(cached).reference_dir, DTYPES[config.model.dtype]
    assert directory is not None
    try:
        where = (architecture, dtype, directory, rows.cache_names)
        say(check_cache_space(config.objective, rows.forget, rows.retain, *where))
    except UserError as error:
        if memory.reference == "cached":
            raise
        say(f"The reference runs in every step. {error}")
        return live
    return cached


def _on_cpu(config: RunConfig, data: PreparedData, architecture: PretrainedConfig, say: Say) -> RunConfig:
    """Without a GPU the scales of 4-bit weights are quantised, each part has its own passes, since there are no kernels
    to launch, and layers are recomputed only if they must be."""
    if config.memory.joint_pass_tokens == "auto":
        config = replace(config, memory=replace(config.memory, joint_pass_tokens=0))
    if config.model.double_quant == "auto":
        config = replace(config, model=replace(config.model, double_quant="on"))
    if config.memory.gradient_checkpointing != "auto":
        return config
    if config.memory.offload_checkpoints:
        return replace(config, memory=replace(config.memory, gradient_checkpointing="on"))
    workload, available = workload_of(config, data), available_memory()
    if (kept := activations_at_most(architecture, workload.largest.micro_batch(config))) <= min(FEW_BYTES, available):
        say(f"Layers are not recomputed: what they keep is at most {gib(kept)}.")
        return replace(config, memory=replace(config.memory, gradient_checkpointing="off"))
    say(SIMULATING)
    report = Simulation(config, workload, Device(CAPABILITY, "the CPU", None, available)).report()
    again = "recomputed" if report.config.memory.recomputes_layers else "not recomputed"
    needed = gib(report.estimate.needed_bytes)
    say(f"Layers are {again}: a step needs about {needed} of the {gib(available)} of memory that are available.")
    return report.config


def activations_at_most(architecture: PretrainedConfig, rows: StepRows) -> int:
    """More bytes than the larger part of a micro-batch can keep for its backward pass. Korthikanti et al. (2022) count
    34 bytes for a hidden element in 16 bits, MLP and dropout included; attention that is not fused keeps its scores."""
    text = architecture.get_text_config()
    hidden = getattr(text, "hidden_size", 4096)
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    wide = max(wide) if isinstance(wide, (list, tuple)) else wide
    heads, experts = getattr(text, "num_attention_heads", None) or 1, getattr(text, "num_experts_per_tok", None) or 1

    def of(part: tuple[tuple[int, int], ...]) -> int:
        width = max((length for length, _ in part), default=0)
        of_token = 256 * (hidden + wide * experts) + 16 * heads * width
        return len(part) * width * text.num_hidden_layers * of_token

    return max(of(rows.forget), of(rows.retain), of(rows.taught_again[: len(rows.forget)]))
