"""One picture of a run: its losses, and its answers before and after (and those of a gold standard)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowmem_npo.claim import make_directory
from lowmem_npo.evaluation.answer_table import MEASURES, Stages
from lowmem_npo.report.panels import draw_bars, draw_likelihood, draw_objective
from lowmem_npo.training.metrics import Metrics


def draw_picture(path: Path, metrics: Sequence[Metrics], stages: Stages, title: str) -> None:
    """Writes a PNG of 1500 x 1000 pixels.

    At the top the answers' NLL during training (with the gold standard's, if `stages` has one) and the terms of the
    objective; below them every measure of the before/after table, a bar per stage. Quantities that a run did not log
    (a forget term without reference, delta 0) are left out.
    """
    figure = Figure(figsize=(12.5, 8.34), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window, no global state
    figure.suptitle(title, fontsize=14)
    half = len(MEASURES)
    grid = figure.add_gridspec(2, 2 * half, height_ratios=(1.15, 1), hspace=0.06)
    draw_likelihood(figure.add_subplot(grid[0, :half]), metrics, stages)
    draw_objective(figure.add_subplot(grid[0, half:]), metrics)
    axes = [figure.add_subplot(grid[1, 2 * column : 2 * column + 2]) for column in range(len(MEASURES))]
    for column, ax in enumerate(axes):
        draw_bars(ax, stages, column)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    make_directory(path.parent)
    figure.savefig(path)
