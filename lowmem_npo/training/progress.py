"""What the user sees while a run trains: a bar with the quantities that matter, or plain lines in a log file."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_npo.progress import Progress

# (name in the logs, title, format)
QUANTITIES = (
    ("forget_loss", "forget loss", "{:.3f}"),
    ("forget_nll", "forget NLL", "{:.2f}"),
    ("retain_nll", "retain NLL", "{:.3f}"),
    ("retain_kl", "KL", "{:.1e}"),
)


class ConsoleProgress(TrainerCallback):
    """Replaces the Trainer's own progress bar and its dictionaries of numbers. Writes to standard error."""

    def __init__(self, refuses: bool = False) -> None:
        """refuses: whether a refusal is taught, whose NLL is then logged in place of the forget answers'."""
        self._titles = {"forget_nll": "refusal NLL"} if refuses else {}
        self._bar: Progress | None = None
        self._is_new = True  # nothing was logged yet

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = Progress(state.max_steps, "unlearning", "step", initial=state.global_step, leave=True)
            self._is_new = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is None or not logs or "loss" not in logs:
            return
        logged = [quantity for quantity in QUANTITIES if quantity[0] in logs]
        line = ", ".join(f"{self._titles.get(name, title)} {form.format(logs[name])}" for name, title, form in logged)
        self._bar.set_postfix_str(line)
        self._bar.update(state.global_step - self._bar.n)
        if self._is_new or state.global_step == state.max_steps:
            self._bar.print_line()
        self._is_new = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None and not control.should_log:  # else `on_log` follows, with the step's figures
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
