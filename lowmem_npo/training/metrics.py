"""metrics.jsonl: one line of numbers per logged step, to plot."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Metrics = dict[str, Any]  # name -> number; None: not finite


class MetricsWriter(TrainerCallback):
    """Writes every scalar that the trainer logs as a line {"step": ..., "epoch": ..., ...}, each step once.

    A resumed run repeats the steps after its checkpoint: their old lines are dropped when it starts, as is a last line
    that a killed run left half-written. Two logs at one step (the last one, and the run's summary) share a line. A
    number that is not finite becomes null, since JSON cannot write it.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._last: Metrics = {}
        self._last_at = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        self._last, self._last_at = {}, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        for line in kept:
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
        line |= {key: _finite(value) for key, value in logs.items() if isinstance(value, int | float)}
        self._write(self._last | line if self._last.get("step") == line["step"] else line)

    def _write(self, line: Metrics) -> None:
        """Appends the line, or replaces the last one if both are of the same step."""
        with self.path.open("r+", encoding="utf-8") as file:
            if self._last.get("step") == line["step"]:
                file.truncate(self._last_at)
            self._last_at = file.seek(0, 2)
            file.write(json.dumps(line) + "\n")
        self._last = line


def read_metrics(path: Path) -> list[Metrics]:
    """The complete lines of a metrics file, in order; none if it does not exist yet."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # A line counts once its newline is written: what follows the last newline is nothing, or a torn line.
    return [json.loads(line) for line in lines[:-1]]


def _finite(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None
