"""Estimates for a run in progress, made in the background by a separate process that sees no GPU."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say
from lowmem_npo.data import PreparedData
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.measured import compare, measure, restart_peak
from lowmem_npo.estimate.report import Report, own_capability
from lowmem_npo.estimate.step import StepRows
from lowmem_npo.sizes import gib
from lowmem_npo.training.training_rows import planned_rows


class Simulation:
    """An estimate that starts at once; `report` waits for it."""

    def __init__(self, config: RunConfig, rows: StepRows) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lowmem_npo.estimate.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(pickle.dumps((config, rows, own_capability())))
        self._process.stdin = None  # `communicate` would flush it

    def report(self) -> Report:
        """The estimate, or the fastest settings that fit the run's memory budget if it has one.

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


def keep_budget(config: RunConfig, data: PreparedData, say: Say) -> RunConfig:
    """`config` with the fastest switches that fit its memory budget; unchanged without a budget.

    Raises:
        UserError: the budget cannot be met; the message gives the smallest that can.
    """
    if config.memory.memory_budget is None:
        return config
    report = Simulation(config, _rows(config, data)).report()
    flags = f"with {' '.join(report.flags)}" if report.flags else "as configured"
    say(
        f"Memory budget {config.memory.memory_budget}: a step needs {gib(report.estimate.needed_bytes)} and CUDA about "
        f"{gib(report.estimate.context_bytes)}, {flags}."
    )
    return replace(report.config, memory=replace(report.config.memory, memory_budget=None))


@contextlib.contextmanager
def watch_memory(config: RunConfig, data: PreparedData, device: torch.device, say: Say) -> Iterator[None]:
    """On a GPU, compares the measured with the predicted peak afterwards; when memory runs out, says what would fit.

    Raises:
        UserError: in place of PyTorch's error, when the GPU runs out of memory.
    """
    if device.type != "cuda":
        yield
        return
    prediction = Simulation(config, _rows(config, data))
    restart_peak(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_what_would_fit(config, data, device, prediction)) from error
    with contextlib.suppress(UserError):
        for line in compare(prediction.report().estimate, measure(device)):
            say(line)


def _what_would_fit(config: RunConfig, data: PreparedData, device: torch.device, prediction: Simulation) -> str:
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)  # what other processes on this GPU leave
    message = f"The GPU ran out of memory: {gib(room)} of its {gib(total)} were available to this run"
    with contextlib.suppress(UserError):
        message += f", the estimate was {gib(prediction.report().estimate.needed_bytes)}"
    smaller = replace(config, memory=replace(config.memory, memory_budget=f"{int(room * 0.95) / 2**20:.0f}MiB"))
    try:
        flags = Simulation(smaller, _rows(config, data)).report().flags
    except UserError as error:
        return f"{message}. {error}"
    if not flags:
        return f"{message}, which should fit; is another process using this GPU?"
    return f"{message}. This would fit: {' '.join(flags)}."


def _rows(config: RunConfig, data: PreparedData) -> StepRows:
    return StepRows.of_data(config, *planned_rows(config, data).parts)
