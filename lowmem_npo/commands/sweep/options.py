"""The options of a sweep beside those of `train`: a field's docstring is its help text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import tyro

from lowmem_npo.errors import UserError
from lowmem_npo.ranges import Count, Positive, check_fields

Words = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]  # of each time that an option is given


@dataclass
class GridOptions:
    """Which runs there are."""

    grid: Words = ()
    """Options and values."""
    seeds: Words = ()
    """How many, or which."""

    def __post_init__(self) -> None:
        if without := next((f.name for f in dataclasses.fields(self) if () in getattr(self, f.name)), None):
            raise UserError(f"--{without} needs a value: see lowmem-npo sweep --help.")
        if len(self.seeds) > 1:  # how many, or which: together neither
            raise UserError("--seeds is given twice: name how many (5) or which (42,43,44) once.")


@dataclass
class TeachingOptions:
    """Fine-tuning before the runs: the base on forget and retain rows, and a gold model on the retain rows alone."""

    teach: Literal["full", "lora"] | None = None
    """Teach the base all rows first, with all weights or with a LoRA of rank 64 on all linear layers that is then
    merged, and a gold model the retain rows alone; the runs forget from the taught one."""
    teach_epochs: Count = 5
    """Passes over the rows that are taught."""
    teach_lr: Positive | None = None
    """Peak of the learning rate. Default: 1e-5 with full, 1e-4 with lora."""
    teach_batch_size: Count = 32
    """Rows of a step."""

    def __post_init__(self) -> None:
        check_fields(self)
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if self.teach is None and changed:
            raise UserError(f"--{changed[0].replace('_', '-')} says how --teach teaches: give both, or none.")

    @property
    def lr(self) -> float:
        return self.teach_lr or (1e-5 if self.teach == "full" else 1e-4)


@dataclass
class EvaluationSources:
    """What is evaluated after each run, and on which rows."""

    evaluate: tuple[str, ...] = ()
    """Benchmarks and leak tests to measure after each run, and once of the model before and of the gold model."""
    evaluate_forget: str | None = None
    """Rows of forget to evaluate, where they are not those trained on. Default: --forget."""
    evaluate_retain: str | None = None
    """Rows of retain to evaluate. Default: --retain."""
    evaluate_limit: Count | None = None
    """Evaluate N rows of each set, drawn once for the whole sweep."""

    def __post_init__(self) -> None:
        check_fields(self, EvaluationSources)
        self.evaluate = tuple(name for given in self.evaluate for name in given.split(",") if name)
