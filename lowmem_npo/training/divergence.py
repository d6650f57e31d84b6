"""A run that loses what it should keep: said once while it trains, since nothing else would stop it.

The rule: the retain rows of the last ten logged steps, of at least three, have a mean NLL more than 1 nat per token
above what it was before training. Without a measurement of that, the first logged step stands for it, whose weights are
the original's.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_npo.console import Say

RISE = 1.0  # nats per token
FEWEST, MOST = 3, 10  # logged steps


class Divergence(TrainerCallback):
    """before: mean NLL of the retain rows before training, in nats per answer token, if it was measured."""

    def __init__(self, before: float | None, say: Say = print) -> None:
        self.before, self.say = before, say
        self._warned = False
        self._last: tuple[int, float, float] | None = None  # step, mean NLL, the same before

    @property
    def sentence(self) -> str | None:
        """What the end of the run shows; None if nothing is lost beyond the rule."""
        if self._last is None or not self._last[1] > self._last[2] + RISE:
            return None
        step, now, before = self._last
        return (
            f"The model loses what it should keep: at step {step} the retain NLL is {now:.2f} nats per token, and was "
            f"{before:.2f} before: try a lower --lr, or --stop-when retain-loss+10%."
        )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        history = [line["retain_nll"] for line in state.log_history if "retain_nll" in line]
        logged = [value for value in history if math.isfinite(value)]
        if not logged:
            return
        before = self.before if self.before is not None and math.isfinite(self.before) else logged[0]
        if len(recent := logged[1:][-MOST:]) < FEWEST:
            return
        self._last = state.global_step, fmean(recent), before
        if not self._warned and (sentence := self.sentence) is not None:
            self._warned = True
            if state.is_world_process_zero:
                self.say(sentence)
