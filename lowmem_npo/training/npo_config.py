"""The arguments of `NPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_type_hints

import numpy as np
from annotated_types import Interval
from transformers import TrainingArguments

from lowmem_npo.config import KEPT_CHECKPOINTS, DataConfig, ObjectiveConfig, TrainingConfig
from lowmem_npo.ranges import MOST, Count, CountOrNone, check_values
from lowmem_npo.training.honoured import FROM_PYTHON, IN_SCRIPTS, RANGES, SCRIPT_RANGES, as_is, check_effect
from lowmem_npo.training.script_words import in_script_words


@dataclass
class NPOConfig(ObjectiveConfig, TrainingArguments):
    """`transformers.TrainingArguments` with the objective's fields (see `ObjectiveConfig`), and the paper's defaults.

    As in TRL, `per_device_train_batch_size` is how many forget rows one process puts through the model at once, and an
    optimiser step takes `gradient_accumulation_steps` times as many on each process. `step_batch_size` sets the step's
    forget rows directly, for numbers that do not divide evenly.

    Raises:
        UserError: an argument of `TrainingArguments` would have no effect here, or one has a value that it cannot have.
    """

    learning_rate: float = TrainingConfig.lr
    num_train_epochs: float = TrainingConfig.epochs
    per_device_train_batch_size: int = TrainingConfig.batch_size
    lr_scheduler_type: str = "constant"
    max_grad_norm: float = 0.0  # the paper does not clip
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False  # it waits for the GPU twice a step, and hides that a run diverges
    save_strategy: str = "epoch"
    save_total_limit: int | None = KEPT_CHECKPOINTS
    step_batch_size: Count | None = None
    """Forget rows per optimiser step over all micro-batches and processes. Default: the product of the fields above."""
    retain_batch_size: Count | None = None
    """Retain rows per optimiser step over all micro-batches and processes. Default: as many as forget rows."""
    layered: Annotated[int, Interval(ge=2, le=MOST)] | None = None
    """Folds of layered unlearning, forgotten one stage after another (`lowmem_npo.training.layered`)."""
    layered_weight: Annotated[float, Interval(ge=0, le=1)] = TrainingConfig.layered_weight
    """How often the rows of earlier folds are shown, until the last stage; 1: as often as those of the newest."""
    group_column: str | None = None
    """Column of forget rows that are not tokenised which says what each is about; a group stays in one fold."""
    max_length: Annotated[int, Interval(ge=2, le=MOST)] = DataConfig.max_length
    """Tokens per row, prompt and answer together, of rows that are not tokenised."""
    allow_overlap: bool = False
    """Go on although rows to forget that are not tokenised also appear among the rows to keep."""
    refusal: str = DataConfig.refusal
    """The answer that `idk` and `jensun` teach in place of those of rows that are not tokenised."""
    padding_free: bool = True
    """Put rows of unequal length through the model one after the other, without padding, where its architecture keeps
    them apart (`lowmem_npo.model.packs_rows`). Padded, the results are the same up to rounding."""
    joint_pass_tokens: CountOrNone = 0
    """Forget and retain rows of a micro-batch share one pass if together they have no more tokens than that: half of
    the passes, but both parts' graphs are alive at once. The gradients are the same. 0: never, nor under what
    `objective.parts_go_apart` names."""
    reference_dir: str | Path | None = None
    """Directory in which the reference's results are cached (`CachedReference`). Default: the reference pass is run at
    every step."""

    def __post_init__(self) -> None:
        for f in fields(self):  # a length that NumPy has counted is a number as any other
            if isinstance(value := getattr(self, f.name), np.generic):
                setattr(self, f.name, value.item())
        for name in ("padding_free", "allow_overlap"):
            if (value := getattr(self, name)) in (0, 1):
                setattr(self, name, bool(value))
        with in_script_words(self):
            ObjectiveConfig.__post_init__(self)
        defaults, own = as_is(), {name: getattr(self, name) for name in NPOConfig.__annotations__}
        kinds = get_type_hints(NPOConfig, include_extras=True)
        check_values(own, {name: kinds[name] for name in own.keys() - defaults.keys()}, str)
        ranges = {name: kind for name, kind in (SCRIPT_RANGES | RANGES).items() if name not in self._not_looked_at()}
        check_values({name: getattr(self, name) for name in ranges}, ranges, str)
        args = {name: getattr(self, name) for name in defaults if name not in FROM_PYTHON}
        check_effect(args, defaults, lambda name, value: f"{name}={value!r}", IN_SCRIPTS)
        self.max_grad_norm = self.max_grad_norm or 0.0  # transformers compares it with 0
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            self.lr_scheduler_type = "constant_with_warmup"  # `constant` ignores a warm-up
        TrainingArguments.__post_init__(self)

    def _not_looked_at(self) -> list[str]:
        by_steps = isinstance(self.max_steps, int) and self.max_steps > 0
        strategies = {"save_steps": self.save_strategy, "logging_steps": self.logging_strategy}
        unused = [steps for steps, strategy in strategies.items() if strategy != "steps"]
        return ["num_train_epochs", *unused] if by_steps else unused

    @property
    def objective(self) -> ObjectiveConfig:
        return ObjectiveConfig(**{f.name: getattr(self, f.name) for f in fields(ObjectiveConfig)})
