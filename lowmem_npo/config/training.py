"""The optimiser steps: how many, of how many rows, and in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from lowmem_npo.ranges import MOST, Checked, Count, Positive, PositiveOrZero, Seed

Recipe = Literal["paper", "lasting"]
KEPT_CHECKPOINTS = 2  # unless --save-total-limit says otherwise


@dataclass
class TrainingConfig(Checked):
    """Training: one optimiser step takes --batch-size forget rows and --retain-batch-size retain rows."""

    recipe: Recipe = "paper"
    """Options that belong together; one that is given itself wins. paper: the defaults. lasting: --layered 2,
    --adversary 1, --adversary-steps 20, and LoRA of rank 16 and alpha 64 on all linear layers: what was forgotten comes
    back less when a part is taught again, for about twice the time."""
    batch_size: Count = 4
    """Forget rows per optimiser step, over all micro-batches and processes."""
    retain_batch_size: Count | None = None
    """Retain rows per optimiser step. Default: as many as forget rows."""
    micro_batch_size: Count | None = None
    """Forget rows that go through the model at once. A smaller value needs less memory and gives the same gradient.
    Default: the whole batch."""
    epochs: Positive = 20.0
    """Passes over the forget set."""
    max_steps: Count | None = None
    """Stop after N optimiser steps, regardless of --epochs."""
    layered: Annotated[int, Interval(ge=2, le=MOST)] | None = None
    """Layered unlearning (Qian et al. 2025): the forget rows are divided into N folds and forgotten in N stages of
    equal length, the first one fold, then two, while the folds to come are still retained. What is forgotten so comes
    back far less when some of it is taught again."""
    layered_weight: Annotated[float, Interval(ge=0, le=1)] = 0.2
    """How often --layered shows the rows of earlier folds, for one showing of the newest fold's, until the last stage
    shows all alike; 0 to 1."""
    lr: PositiveOrZero = 1e-4
    """Learning rate of AdamW, constant unless --lr-scheduler-type says otherwise."""
    seed: Seed = 42
    """Seed of the adapter, of the order of the rows, and of everything else that is random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None:
            self.micro_batch_size = min(self.micro_batch_size, self.batch_size)

    @property
    def retain_rows(self) -> int:
        """Retain rows per optimiser step."""
        return self.batch_size if self.retain_batch_size is None else self.retain_batch_size

    def micro_batches(self, world_size: int = 1) -> int:
        """Micro-batches per optimiser step on each of `world_size` processes."""
        return max(1, math.ceil(self.batch_size / ((self.micro_batch_size or self.batch_size) * world_size)))
