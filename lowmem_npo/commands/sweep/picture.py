"""The picture of a sweep: how much each configuration forgets and what it costs, with the spread over the seeds."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowmem_npo.commands.sweep.figures import SweepResult
from lowmem_npo.report.panels import FORGET, GREY, RETAIN

PANELS = (
    ("forget_nll", "forget answers: NLL per token", FORGET),
    ("retain_nll", "retain answers: NLL per token", RETAIN),
)


def draw_sweep(path: Path, result: SweepResult) -> None:
    """Writes a PNG: a row per configuration, a dot per seed, mean and standard deviation; the original model dashed."""
    count = len(result.configurations)
    names = [", ".join(f"{k} {v or 'default'}" for k, v in c.settings.items()) or c.name for c in result.configurations]
    longest = max(map(len, names))
    figure = Figure(figsize=(9 + 0.08 * longest, 1.8 + 0.42 * count), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [panel for panel in PANELS if all(panel[0] in c.figures for c in result.configurations)]
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (key, title, colour) in zip(axes, panels, strict=True):
        _draw(ax, result, key, title, colour)
    axes[0].set_yticks(range(count), names)
    axes[0].set_ylim(count - 0.5, -0.5)
    seeds = max(len(configuration.seeds) for configuration in result.configurations)
    spread = f"; dots: {seeds} seeds, bars: mean ± standard deviation" if seeds > 1 else ""
    figure.suptitle(f"dashed: before{spread}", fontsize=9, color=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(ax: Axes, result: SweepResult, key: str, title: str, colour: str) -> None:
    values = []
    for row, configuration in enumerate(result.configurations):
        spread = configuration.figures[key]
        values += spread.values
        ax.plot(spread.values, [row + 0.14] * len(spread.values), "o", color=colour, markersize=4, alpha=0.5)
        ax.errorbar(spread.mean, row - 0.1, xerr=spread.sd, fmt="D", color=colour, markersize=6, capsize=4)
    if min(values) > 0 and max(values) > 30 * min(values):
        ax.set_xscale("log")
    if key in result.before:
        ax.axvline(result.before[key], color=GREY, linestyle="--", linewidth=1)
    ax.set_title(title, fontsize=10)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
