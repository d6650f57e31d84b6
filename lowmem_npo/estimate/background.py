"""Estimates for a run that is under way: made by a process of its own, which sees no GPU and disturbs nothing here."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from lowmem_npo.config import RunConfig
from lowmem_npo.data import PreparedData
from lowmem_npo.errors import UserError
from lowmem_npo.estimate import measured as meter
from lowmem_npo.estimate.report import Report
from lowmem_npo.estimate.step import StepRows
from lowmem_npo.sizes import gib


class Simulation:
    """Begins at once; `report` waits for it."""

    def __init__(self, config: RunConfig, rows: StepRows) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lowmem_npo.estimate.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        with self._process.stdin as question:
            question.write(pickle.dumps((config, rows)))
        self._process.stdin = None  # `communicate` would flush it

    def report(self) -> Report:
        """The estimate, or the fastest settings that fit the run's memory budget if it has one.

        Raises:
            UserError: the budget cannot be kept; or the estimate failed.
        """
        answer, complaint = self._process.communicate()
        if self._process.returncode:
            *_, last = ["no reason was given", *complaint.decode(errors="replace").split("\n")[:-1]]
            raise UserError(f"The memory estimate failed: {last}")
        result = pickle.loads(answer)
        if isinstance(result, UserError):
            raise result
        return result


def keep_budget(config: RunConfig, data: PreparedData, say: Callable[[str], None]) -> RunConfig:
    """`config` with the fastest switches that fit its memory budget; unchanged without a budget.

    Raises:
        UserError: the budget cannot be kept; it tells what the smallest is.
    """
    if config.memory.memory_budget is None:
        return config
    found = Simulation(config, _rows(config, data)).report()
    flags = f"with {' '.join(found.flags)}" if found.flags else "as it is"
    say(
        f"Memory budget {config.memory.memory_budget}: a step takes {gib(found.estimate.peak_bytes)} and CUDA about "
        f"{gib(found.estimate.context_bytes)}, {flags}."
    )
    return replace(found.config, memory=replace(found.config.memory, memory_budget=None))


@contextlib.contextmanager
def watched(config: RunConfig, data: PreparedData, device: torch.device, say: Callable[[str], None]) -> Iterator[None]:
    """On a GPU: says afterwards what was predicted and what was measured; when memory runs out, what would fit.

    Raises:
        UserError: in place of PyTorch's error, when the GPU's memory is not enough.
    """
    if device.type != "cuda":
        yield
        return
    prediction = Simulation(config, _rows(config, data))
    meter.restart_peak(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_what_would_fit(config, data, device, prediction)) from error
    with contextlib.suppress(UserError):
        for line in meter.told(prediction.report().estimate.peak_bytes, meter.measure(device)):
            say(line)


def _what_would_fit(config: RunConfig, data: PreparedData, device: torch.device, prediction: Simulation) -> str:
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)  # what others on this GPU leave
    told = f"The GPU's memory ran out: {gib(room)} of its {gib(total)} were there for this run"
    with contextlib.suppress(UserError):
        told += f", the estimate was {gib(prediction.report().estimate.peak_bytes)}"
    smaller = replace(config, memory=replace(config.memory, memory_budget=f"{int(room * 0.95) / 2**20:.0f}MiB"))
    try:
        flags = Simulation(smaller, _rows(config, data)).report().flags
    except UserError as error:
        return f"{told}. {error}"
    if not flags:
        return f"{told}, which should fit; is another process using this GPU?"
    return f"{told}. This would fit: {' '.join(flags)}."


def _rows(config: RunConfig, data: PreparedData) -> StepRows:
    return StepRows.of_data(config, data.forget_targets, data.retain)
