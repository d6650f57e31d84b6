"""The panels as SVG inside an HTML page: readable on a phone, sharp in print, described to a screen reader."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lowmem_npo.evaluation.answer_table import MEASURES, Stages
from lowmem_npo.evaluation.figures import side_by_side
from lowmem_npo.report.panels import (
    STAGE_TITLES,
    draw_bars,
    draw_likelihood,
    draw_objective,
    drawn_sets,
    stage_colours,
    stage_starts,
)
from lowmem_npo.training.metrics import Metrics

CURVES, BARS = (4.6, 3.1), (2.7, 2.5)  # inches of 96 CSS pixels: on a phone, text is as large as that of the page
# Text stays text, in the page's own font; the same drawing gives the same bytes.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lowmem-npo", "font.size": 9}


@dataclass(frozen=True)
class Picture:
    """svg: an <svg> element without scripts, links or outside resources. alt: what it shows, in words."""

    title: str
    alt: str
    svg: str


def bar_pictures(stages: Stages) -> list[Picture]:
    """A picture per measure of the before/after table; none if nothing was measured."""
    if not stages:
        return []
    pictures = []
    for column, measure in enumerate(MEASURES):
        description = "; ".join(
            f"{part}: "
            + ", ".join(
                f"{stage} {value}"
                for stage, value in zip(
                    stages, side_by_side([measure.value(sets.get(part)) for sets in stages.values()]), strict=True
                )
            )
            for part in drawn_sets(stages)
        )
        title = measure.heading
        svg = _draw(f"bars{column}", BARS, partial(draw_bars, stages=stages, column=column))
        pictures.append(_picture(f"bars{column}", title, f"Bars. {description}.", svg))
    return pictures


def curve_pictures(metrics: Sequence[Metrics], stages: Stages, refuses: bool = False) -> list[Picture]:
    """The answers' NLL and the terms of the objective, step by step; none if no step was logged. refuses: whether a
    refusal is taught."""
    if not metrics:
        return []
    last = metrics[-1]["step"]
    likelihood = _draw("likelihood", CURVES, lambda ax: draw_likelihood(ax, metrics, stages, refuses))
    objective = _draw("objective", CURVES, lambda ax: draw_objective(ax, metrics))
    nll = {"forget_nll": "the refusal's NLL" if refuses else "forget answers' NLL",
           "adversary_nll": "that of others, before the adversary's step",
           "retain_nll": "retain answers' NLL",
           "held_nll": "that of forget answers held until their turn"}  # fmt: skip
    return [
        _picture("likelihood", "How unlikely the answers are", f"Curves over {last} optimiser steps. "
                 + _course(metrics, **nll), likelihood),
        _picture("objective", "The terms of the objective", f"Curves over {last} optimiser steps. "
                 + _course(metrics, forget_loss="forget loss", retain_kl="retain KL"), objective),
    ]  # fmt: skip


def bar_legend(stages: Stages) -> list[tuple[str, str]]:
    """(title, colour) of each stage's bars."""
    return [(STAGE_TITLES.get(stage, stage), colour) for stage, colour in stage_colours(stages).items()]


def _course(metrics: Sequence[Metrics], **titles: str) -> str:
    """The first and the last value of each quantity, in words."""
    courses = []
    for key, title in titles.items():
        values = [line[key] for line in metrics if line.get(key) is not None]
        if values:
            first, last = side_by_side([values[0], values[-1]])
            courses.append(f"{title} from {first} to {last}")
    courses += [f"stage {stage} from step {step}" for stage, step in stage_starts(metrics)]
    return "; ".join(courses) + "."


def _draw(name: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)  # not pyplot: no window, no global state
        draw(figure.add_subplot())
        ConstrainedLayoutEngine().execute(figure)  # as the figure's own engine it would draw everything twice
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Several drawings in one page: their ids must differ.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)


def _picture(name: str, title: str, alt: str, svg: str) -> Picture:
    labels = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(alt)}</desc>'
    opening = f'<svg role="img" aria-labelledby="{name}-title {name}-desc" '
    head, _, rest = svg.removeprefix("<svg ").partition(">")
    return Picture(title, alt, f"{opening}{head}>{labels}{rest}")
