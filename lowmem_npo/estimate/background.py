"""Estimates for a run in progress, made in the background by a separate process that sees no GPU."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say
from lowmem_npo.data import PreparedData
from lowmem_npo.endings import is_out_of_memory
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.gpus import Device, own_device
from lowmem_npo.estimate.measured import Measurement, compare, measure, restart_peak
from lowmem_npo.estimate.report import Report, Workload
from lowmem_npo.estimate.time import duration
from lowmem_npo.sizes import gib
from lowmem_npo.training.training_rows import planned_rows


class Simulation:
    """An estimate that starts at once; `report` waits for it. The process cannot ask for the GPU, which is `device`."""

    def __init__(self, config: RunConfig, workload: Workload, device: Device | None) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lowmem_npo.estimate.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(pickle.dumps((config, workload, device)))
        self._process.stdin = None  # `communicate` would flush it

    def report(self) -> Report:
        """The estimate, or the fastest settings that fit the run's memory.

        Raises:
            UserError: the budget cannot be met, or the estimate failed.
        """
        output, errors = self._process.communicate()
        if self._process.returncode:
            *_, last = ["no reason was given", *errors.decode(errors="replace").split("\n")[:-1]]
            raise UserError(f"The memory estimate failed: {last}")
        result = pickle.loads(output)
        if isinstance(result, UserError):
            raise result
        return result


@dataclass
class Watched:
    """What training took since the command began: so many `steps` after the one that it went on from."""

    seconds: float = 0.0
    steps: int = 0
    begin: int = 0
    micro_batch_parts: int = 1  # more once memory has run out
    memory: Measurement | None = None  # None: on the CPU

    @property
    def step_seconds(self) -> float | None:
        return self.seconds / self.steps if self.steps else None

    def predicted_seconds(self, predicted: Report | None) -> float | None:
        """Of one of these steps."""
        time_ = predicted.time if predicted else None
        return time_.mean(self.begin, self.begin + self.steps) if time_ else None

    def line(self, predicted: Report | None) -> str:
        """The measured time beside the predicted one."""
        text = f"Training took {duration(self.seconds / 3600)}, {self.seconds / max(self.steps, 1):.3g} s a step"
        seconds = self.predicted_seconds(predicted)
        return f"{text}; predicted: {seconds:.3g} s." if seconds else f"{text}."


def record(watched: Watched, predicted: Report | None) -> dict[str, Any]:
    """What training took and what was predicted of it, for the record of a run; None where that is not known."""
    memory = watched.memory
    return {
        "steps": watched.steps,
        "seconds_per_step": watched.step_seconds,
        "predicted_seconds_per_step": watched.predicted_seconds(predicted),
        "peak_bytes": memory.allocated if memory else None,
        "predicted_peak_bytes": predicted.estimate.peak_bytes if predicted and memory else None,
        "micro_batch_parts": watched.micro_batch_parts,
        "gpu": predicted.device.name if predicted and predicted.device and memory else None,
    }


@contextlib.contextmanager
def watch(
    config: RunConfig, data: PreparedData, device: torch.device, predicted: Report | None, say: Say
) -> Iterator[Watched]:
    """Measures the time and, on a GPU, the memory, which is compared with the predicted one; when memory runs out, says
    what would fit.

    Raises:
        UserError: in place of PyTorch's error, when the GPU runs out of memory.
    """
    watched, begin = Watched(), time.monotonic()
    if device.type == "cuda":
        restart_peak(device)
    try:
        yield watched
    except RuntimeError as error:
        if device.type != "cuda" or not is_out_of_memory(error):
            raise
        raise UserError(_what_would_fit(config, data, device, predicted)) from error
    watched.seconds = time.monotonic() - begin
    if device.type == "cuda":
        watched.memory = measure(device)
        for line in compare(predicted.estimate, watched.memory) if predicted else ():
            say(line)


def _what_would_fit(config: RunConfig, data: PreparedData, device: torch.device, predicted: Report | None) -> str:
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)  # what other processes on this GPU leave
    message = f"The GPU ran out of memory: {gib(room)} of its {gib(total)} were available to this run"
    if predicted is not None:
        message += f", the estimate was {gib(predicted.estimate.needed_bytes)}"
    budget, undecided = f"{int(room * 0.95) / 2**20:.0f}MiB", config.memory.gradient_checkpointing
    memory = replace(config.memory, memory_budget=budget, gradient_checkpointing="auto")
    if config.memory.offload_checkpoints:
        memory = replace(memory, gradient_checkpointing=undecided)
    try:
        report = Simulation(replace(config, memory=memory), workload_of(config, data), own_device()).report()
    except UserError as error:
        return f"{message}. {error}"
    again = report.config.memory.recomputes_layers and not config.memory.recomputes_layers
    flags = [*(["--gradient-checkpointing", "on"] if again else []), *report.flags]
    if not flags:
        return f"{message}, which should fit; is another process using this GPU?"
    return f"{message}. This would fit: {' '.join(flags)}."


def workload_of(config: RunConfig, data: PreparedData) -> Workload:
    """Of a run with these rows."""
    return Workload.of_data(config, planned_rows(config, data).parts)
