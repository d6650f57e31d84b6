"""Steps whose loss or gradient is no number: they are not taken, and after three in a row training ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_npo.console import Say
from lowmem_npo.errors import UserError
from lowmem_npo.run_directory import RunFiles, step_of
from lowmem_npo.training.checkpoints import set_aside

MOST_IN_A_ROW = 3


class NotFinite(UserError):
    """Training ended because its loss or gradient is no number."""


class FiniteSteps(TrainerCallback):
    """Drops the gradient of a step that is not finite: an optimizer passes over weights that have none, and leaves
    them, its moments and its count of steps as they are. No checkpoint is saved then, which would take the place of an
    older one. After MOST_IN_A_ROW such steps training ends.

    is_finite: whether the step's figures and its gradient, of all processes, are finite.
    rows: the rows at fault, in words, a part each; it is called in every process.
    """

    def __init__(self, is_finite: Callable[[], bool], rows: Callable[[], Sequence[str]], say: Say) -> None:
        self.is_finite, self.rows, self.say = is_finite, rows, say
        self._skipped: list[int] = []  # the last steps, if they were not taken

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._skipped = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_finite():
            self._skipped = []
            return
        kwargs["model"].zero_grad()
        self._skipped.append(state.global_step + 1)
        rows = " and ".join(self.rows())
        if state.is_world_process_zero:
            self.say(f"Step {self._skipped[-1]} is not taken: its loss or its gradient is no finite number ({rows}).")
        if len(self._skipped) == MOST_IN_A_ROW:
            if args.should_save:
                self._set_aside(RunFiles(Path(str(args.output_dir))))
            first, last = self._skipped[0], self._skipped[-1]
            raise NotFinite(
                f"The training diverged: the loss or the gradient of steps {first} to {last} is no finite number, the "
                f"last time of {rows}; try a lower --lr or --max-grad-norm 1"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save &= not self._skipped

    on_epoch_end = on_step_end

    def _set_aside(self, run: RunFiles) -> None:
        """The checkpoints of the weights at which no step was finite: the run would end there again."""
        for checkpoint in run.checkpoints():
            if step_of(checkpoint) >= self._skipped[0] - 1:
                aside = set_aside(checkpoint)
                self.say(f"{checkpoint.name} gives no finite numbers, and is {aside.name} now.")
