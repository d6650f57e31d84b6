"""What the demo trains, and how: all its numbers in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lowmem_npo.config import (
    AdapterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OutputConfig,
    RunConfig,
    TrainingConfig,
)
from lowmem_npo.config import Recipe as RecipeName

Device = Literal["auto", "cpu", "cuda"]
LEAKS = (*OutputConfig.leaks, "relearning")


@dataclass(frozen=True)
class Teaching:
    """How the small model learns to recite, from random weights. Base and gold standard differ only in their data."""

    vocabulary: int = 512
    layers: int = 4
    width: int = 128
    heads: int = 4
    epochs: int = 40
    batch_size: int = 16
    lr: float = 2e-3
    """Peak of a cosine schedule, after a linear warm-up over the first twentieth of the steps."""


@dataclass(frozen=True)
class Recipe:
    """Teaching, then unlearning with the code of `lowmem-npo train`. recipe: as --recipe.

    beta is not the paper's: the distance by which the answers' log-probability falls before NPO lets go of it is
    proportional to 1 / beta, and a model this small is very sure of what it recites. beta and gamma were chosen
    together so that the recipe ends close to a model that never saw the rows, in likelihood, membership and retain loss
    (docs/results.md, "Does it last?").
    """

    teaching: Teaching = field(default_factory=Teaching)
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(beta=0.18, gamma=1.5))
    recipe: RecipeName = "lasting"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    epochs: int = 36
    batch_size: int = 6
    retain_batch_size: int = 12
    lr: float = 1e-3
    limit: int | None = None
    """Use only the first N rows of each set."""

    def run(self, model: Path, output_dir: Path, seed: int, device: Device) -> RunConfig:
        """The run that makes `model` forget; it measures every row."""
        return RunConfig(
            model=ModelConfig(model=str(model), dtype="float32", device=device),
            data=DataConfig(limit=self.limit),
            objective=self.objective,
            adapter=self.adapter,
            memory=MemoryConfig(gradient_checkpointing="off", reference="live"),  # it is small
            training=TrainingConfig(
                batch_size=self.batch_size,
                retain_batch_size=self.retain_batch_size,
                epochs=self.epochs,
                lr=self.lr,
                seed=seed,
                recipe=self.recipe,
            ),
            output=OutputConfig(output_dir=str(output_dir), eval_rows=10_000, eval_batch_size=32, leaks=LEAKS),
            trainer_args={"save_strategy": "no"},
        )
