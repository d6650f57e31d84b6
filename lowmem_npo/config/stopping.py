"""When a run stops before its last step."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_npo.errors import UserError
from lowmem_npo.ranges import Checked, Count
from lowmem_npo.stop_conditions import Condition, parse_conditions


@dataclass
class StoppingConfig(Checked):
    """Stopping: measure while training, stop in time, keep the best adapter."""

    stop_when: tuple[str, ...] = ()
    """Stop as soon as one of these holds. forget-at-holdout: the forget answers are as unlikely as the holdout's were
    before training. mia-crosses: the loss no longer distinguishes forget rows from the holdout's (AUC 0.5).
    retain-loss+10%: the retain answers' NLL is 10% above that before training (retain-loss+0.05: 0.05 nats per token
    above). Of the adapters within the limit on the retain loss, the one nearest to the first of the former two is kept;
    with that limit alone, the last one."""
    stop_patience: Count = 1
    """Consecutive measurements at which a condition must hold. With more than 1 a run gets past the rise of the retain
    loss that NPO may begin with, and that the retain terms undo."""
    eval_every: Count | None = None
    """Optimiser steps between the measurements for --stop-when. Default: one after every epoch."""

    def __post_init__(self) -> None:
        self.stop_when = (self.stop_when,) if isinstance(self.stop_when, str) else tuple(self.stop_when)
        super().__post_init__()
        _ = self.conditions  # malformed ones raise here
        if (self.eval_every is not None or self.stop_patience > 1) and not self.stop_when:
            given = "--stop-patience" if self.eval_every is None else "--eval-every"
            raise UserError(f"{given} says how --stop-when measures: give both, or none.")

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """`stop_when`, understood."""
        return parse_conditions(self.stop_when)
