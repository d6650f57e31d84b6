"""Every figure of a report in one form: its value at each stage, what it should be, and what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_npo.evaluation.answer_table import Stages, answer_figures
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.figures import Figure

ANSWERS = "answers"  # the group of what the run itself measures


@dataclass(frozen=True)
class StagedFigure:
    """One line of a report.

    group: the measurement it belongs to. set: its rows, or None. key: its name in the file that it comes from.
    values: stage -> value, None if it was not measured or is not finite. wished: what it should be.
    """

    group: str
    set: str | None
    key: str
    title: str
    values: dict[str, float | None]
    wished: str
    meaning: str

    def row(self, stages: Sequence[str]) -> list[float | None]:
        """The values at these stages."""
        return [self.values.get(stage) for stage in stages]


def run_figures(stages: Stages) -> list[StagedFigure]:
    """The figures of the before/after table, one per set and measure."""
    return _staged(ANSWERS, {stage: answer_figures(sets, "gold" in stages) for stage, sets in stages.items()})


def evaluation_figures(contents: Mapping[str, Mapping[str, Any]]) -> list[StagedFigure]:
    """The figures of every benchmark. contents: stage -> the content of its evaluation.json."""
    staged = []
    for benchmark in BENCHMARKS:
        blocks = {stage: content.get(benchmark.name) for stage, content in contents.items()}
        figures = {stage: benchmark.figures(block) for stage, block in blocks.items() if block}
        if contents and list(contents)[-1] in figures:  # only what the last evaluation measured
            staged += _staged(benchmark.group, {stage: figures.get(stage, []) for stage in contents})
    return staged


def _staged(group: str, stages: Mapping[str, Sequence[Figure]]) -> list[StagedFigure]:
    """The figures of the last stage, with their values at every stage."""
    values = {stage: {(f.set, f.key): f.value for f in figures} for stage, figures in stages.items()}
    return [
        StagedFigure(
            group,
            figure.set,
            figure.key,
            figure.title,
            {stage: of_stage.get((figure.set, figure.key)) for stage, of_stage in values.items()},
            figure.wish,
            figure.meaning,
        )
        for figure in (list(stages.values())[-1] if stages else ())
    ]
