"""The figures of an optimiser step: summed over its micro-batches on the device, and read from there once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowmem_npo.config import ObjectiveConfig


class StepMetrics:
    """A step's detached quantities, each of them this process's share of a mean over the step, and their sums over
    steps. They are on the device until the step ends."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        names = ["forget_loss", "forget_nll"]
        names += ["forget_log_ratio"] if objective.needs_reference else []
        names += ["adversary_nll", "adversary_gain"] if objective.adversary is not None else []
        names += ["retain_nll"] if objective.needs_retain else []
        names += ["retain_kl"] if objective.delta > 0 else []
        self.names, self.steps = names, 0
        self._step: dict[str, Tensor] = {}
        self._sums: dict[str, float] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._step[name] = self._step.get(name, 0.0) + value.detach()

    def drop_step(self) -> None:
        """Forgets the quantities of a step that is repeated."""
        self._step = {}

    def end_step(self, norm: Tensor) -> bool:
        """Adds the step to the sums. Returns whether its quantities and the `norm` of its gradient are finite. One
        transfer for all of them: each waits for the GPU."""
        own, *values = torch.stack([value.to(norm.device).float() for value in (norm, *self._step.values())]).tolist()
        for name, value in zip(self._step, values, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._step, self.steps = {}, self.steps + 1
        return all(map(math.isfinite, (own, *values)))

    def means_and_reset(self) -> Tensor:
        """(len(names),) float32 on the CPU, in the order of `names` on every process; 0 where this process had no
        rows."""
        means = torch.tensor([self._sums.get(name, 0.0) for name in self.names])
        means, self.steps, self._sums = means / self.steps, 0, {}
        return means
