"""The picture of a sweep: how much each configuration forgets and what it costs, with the spread over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from lowmem_npo.claim import make_directory
from lowmem_npo.commands.sweep.figures import BEFORE, GOLD, Column, SweepResult
from lowmem_npo.report.panels import FORGET, GREY, RETAIN

OTHER = "#009E73"  # of Okabe and Ito's palette, as the others
LINES = {BEFORE: (GREY, "--"), GOLD: ("#B8860B", ":")}
PER_ROW = 3  # panels
LEAST_NATS = 1.0  # on an axis of likelihoods: less of a difference does not look like one


def draw_sweep(path: Path, result: SweepResult) -> None:
    """Writes a PNG."""
    make_directory(path.parent)
    figure_of(result).savefig(path)


def figure_of(result: SweepResult) -> Figure:
    """Each panel is a figure, each of its lines a configuration: a dot per seed, mean and standard
    deviation; vertical lines are the models that the runs are compared with."""
    names = [", ".join(f"{k} {v or 'default'}" for k, v in c.settings.items()) or c.name for c in result.configurations]
    panels = [c for c in result.columns if c.main and any(c.key in of.figures for of in result.configurations)]
    across, down = min(len(panels), PER_ROW), math.ceil(len(panels) / PER_ROW)
    size = (3.6 * across + 0.08 * max(map(len, names)) + 1, (1.2 + 0.42 * len(names)) * down + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    cast(ConstrainedLayoutEngine, figure.get_layout_engine()).set(w_pad=0.12, h_pad=0.06)  # inches around a panel
    axes = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for ax, column in zip(axes, panels, strict=False):
        _draw(ax, result, column)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    seeds = max(len(configuration.seeds) for configuration in result.configurations)
    spread = [f"dots: {seeds} seeds, diamonds: mean ± standard deviation"] if seeds > 1 else []
    words = {BEFORE: "dashed: before", GOLD: "dotted: gold, never taught the forget rows"}
    legend = [words[name] for name in LINES if name in result.baselines]
    figure.suptitle("; ".join([*legend, *spread]), fontsize=9, color=GREY)
    return figure


def _draw(ax: Axes, result: SweepResult, column: Column) -> None:
    spreads = [configuration.figures.get(column.key) for configuration in result.configurations]
    colour = FORGET if "forget" in column.key else RETAIN if "retain" in column.key else OTHER
    for row, spread in enumerate(spreads):
        if spread is not None:
            ax.plot(spread.known, [row + 0.14] * len(spread.known), "o", color=colour, markersize=4, alpha=0.5)
            ax.errorbar(spread.mean, row - 0.1, xerr=spread.sd, fmt="D", color=colour, markersize=6, capsize=4)
    lines = {name: result.baselines.get(name, {}).get(column.key) for name in LINES}
    for name, value in lines.items():
        if value is not None:
            ax.axvline(value, color=LINES[name][0], linestyle=LINES[name][1], linewidth=1.2)
    shown = [value for spread in spreads if spread for value in spread.known]
    shown += [value for value in lines.values() if value is not None]
    _scale(ax, column, shown)
    title = f"{column.group}: {column.title}" if column.group else column.title
    ax.set_title(title, fontsize=9, wrap=True)
    ax.tick_params(labelsize=8)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _scale(ax: Axes, column: Column, values: Sequence[float]) -> None:
    """A range on which a difference looks as large as it is: all of it for shares, at least a nat for likelihoods."""
    low, high = min(values), max(values)
    if "nll" not in column.key and low >= 0 and high <= 1:
        ax.set_xlim(-0.04, 1.04)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    elif low > 0 and high > 30 * max(low, LEAST_NATS):
        ax.set_xscale("log")
    else:
        middle, half = (low + high) / 2, max(high - low, LEAST_NATS) * 0.56
        left = max(middle - half, -0.04 * half) if low >= 0 else middle - half
        ax.set_xlim(left, max(middle + half, left + 2 * half))
        ax.xaxis.set_major_locator(MaxNLocator(5))
