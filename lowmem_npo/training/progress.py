"""What the user sees while a run trains: a bar with the quantities that matter, or plain lines in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LINES = 20  # about, in a log file

# (name in the logs, title, format)
QUANTITIES = (
    ("forget_loss", "forget loss", "{:.3f}"),
    ("forget_nll", "forget NLL", "{:.2f}"),
    ("retain_nll", "retain NLL", "{:.3f}"),
    ("retain_kl", "KL", "{:.1e}"),
)


class ConsoleProgress(TrainerCallback):
    """Replaces the Trainer's own progress bar and its dictionaries of numbers. Writes to standard error."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._next_line = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="unlearning", unit="step", leave=True
            )
        self._next_line = state.global_step + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line = ", ".join(f"{title} {form.format(logs[name])}" for name, title, form in QUANTITIES if name in logs)
        if self._bar is not None:
            self._bar.set_postfix_str(line)
        elif state.global_step >= self._next_line or state.global_step == state.max_steps:
            print(f"step {state.global_step} of {state.max_steps}: {line}", file=sys.stderr)
            self._next_line = state.global_step + max(1, state.max_steps // LINES)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
