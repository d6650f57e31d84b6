"""The figures of an optimiser step: summed over its micro-batches on the device, and read from there once."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from lowmem_npo.config import ObjectiveConfig
from lowmem_npo.training.objective import StepTotals


class StepMetrics:
    """A step's detached quantities, each of them this process's share of a mean over the step, and their sums over
    steps. They are on the device until the step ends.

    holds: whether rows that are still to be forgotten are held among those to retain, whose NLL is then another figure.
    """

    def __init__(self, objective: ObjectiveConfig, holds: bool = False) -> None:
        names = ["forget_loss", "forget_nll"]
        names += ["forget_log_ratio"] if objective.needs_reference else []
        names += ["adversary_nll", "adversary_gain"] if objective.adversary is not None else []
        names += ["retain_nll"] if objective.needs_retain else []
        names += ["held_nll"] if holds else []
        names += ["retain_kl"] if objective.delta > 0 else []
        self.names, self.steps = names, 0
        self._counts: Counter[str] = Counter()  # the steps that have each of them
        self._missing: set[str] = set()
        self._step: dict[str, Tensor] = {}
        self._sums: dict[str, float] = {}

    def begin_step(self, totals: StepTotals) -> None:
        """totals: of the step, on every process the same. It has no figure of rows of which it has none."""
        tokens = {"retain_nll": totals.own_tokens, "held_nll": totals.held_tokens}
        self._missing = {name for name, number in tokens.items() if not number}

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
        self._counts.update(set(self.names) - self._missing)
        self._step, self.steps = {}, self.steps + 1
        return all(map(math.isfinite, (own, *values)))

    def means_and_reset(self) -> tuple[list[str], Tensor]:
        """Those of `names` that a step had, on every process the same, and their means over these steps: float32 on the
        CPU, 0 where this process had no rows."""
        names = [name for name in self.names if self._counts[name]]
        means = torch.tensor([self._sums.get(name, 0.0) / self._counts[name] for name in names])
        self.steps, self._sums, self._counts = 0, {}, Counter()
        return names, means
