"""metrics.jsonl: one line of numbers per logged step, to plot."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_npo.claim import gone, make_directory
from lowmem_npo.console import Say
from lowmem_npo.evaluation.figures import finite
from lowmem_npo.files import write_atomically

Metrics = dict[str, Any]  # name -> number; None: not finite


class MetricsWriter(TrainerCallback):
    """Writes every scalar that the trainer logs as a line {"step": ..., "epoch": ..., ...}, each step once.

    A resumed run repeats the steps after its checkpoint: their old lines are dropped when it starts, as is a last line
    that a killed run left half-written. Two logs at one step (the last one, and the run's summary) share a line. A
    number that is not finite becomes null, since JSON cannot write it. What cannot be written, or is damaged, is
    reported once; training goes on.
    """

    def __init__(self, path: Path, say: Say = print):
        self.path, self.say = Path(path), say
        self._writes = True
        self._last: Metrics = {}
        self._last_at = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._last, self._last_at = {}, 0
        try:
            whole, damaged = _read(self.path)
            make_directory(self.path.parent)
            write_atomically(self.path, "")
        except OSError as error:
            return self._give_up(error)
        if damaged:
            self.say(f"{self.path.name} is damaged: of {len(whole) + len(damaged)} lines {len(damaged)} are lost.")
        for line in whole:
            if line["step"] <= state.global_step:
                self._write(line)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line: Metrics = {"step": state.global_step, "epoch": state.epoch}
        line |= {key: finite(value) for key, value in logs.items() if isinstance(value, int | float)}
        self._write(self._last | line if self._last.get("step") == line["step"] else line)

    def _write(self, line: Metrics) -> None:
        """Appends the line, or replaces the last one if both are of the same step."""
        if not self._writes:
            return
        try:
            with self.path.open("r+", encoding="utf-8") as file:
                if self._last.get("step") == line["step"]:
                    file.truncate(self._last_at)
                self._last_at = file.seek(0, 2)
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._give_up(error)
        self._last = line

    def _give_up(self, error: OSError) -> None:
        self._writes = False
        why = gone() or error.strerror or error
        self.say(f"{self.path.name} cannot be written ({why}), so no more of its lines are; training goes on.")


def read_metrics(path: Path) -> list[Metrics]:
    """The complete lines of a metrics file, in order; none if it does not exist yet.

    Raises ValueError for a damaged line.
    """
    whole, damaged = _read(path)
    if damaged:
        raise ValueError(f"{path.name}, line {damaged[0]} is not one of metrics")
    return whole


def _read(path: Path) -> tuple[list[Metrics], list[int]]:
    """The lines of metrics, and the numbers of those that are damaged."""
    if not path.exists():
        return [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    whole, damaged = [], []
    # A line counts once its newline is written: what follows the last newline is nothing, or a torn line.
    for number, line in enumerate(lines[:-1], 1):
        try:
            metrics = json.loads(line)
            if not isinstance(metrics["step"], int):
                raise TypeError
            whole.append(metrics)
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged.append(number)
    return whole, damaged
