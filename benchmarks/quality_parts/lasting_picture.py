"""The figure of `quality.py --lasting`, `--baselines` and `--real`: what comes back under each attack, by method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.quality_parts.measure import ATTACKS

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito's
MARKERS = "Dsv^"  # one after all colours
GREY = "#555555"
WIDTH = 0.8  # of an attack's methods together, in units of the distance between attacks


def draw_attacks(path: Path, results: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], gold: str) -> None:
    """Writes a PNG: small dots are seeds, diamonds with bars mean ± standard deviation; `gold` is dashed."""
    figure = Figure(figsize=(12.5, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    measured = [m for m in titles if m != gold and any(attack.part in results.get(m, {}) for attack in ATTACKS)]
    for place, method in enumerate(measured):
        colour, label = COLOURS[place % len(COLOURS)], titles[method]
        marker = MARKERS[place // len(COLOURS) % len(MARKERS)]
        for at, attack in enumerate(ATTACKS):
            if (spread := results[method].get(attack.part)) is None:
                continue
            x = at + ((place + 0.5) / len(measured) - 0.5) * WIDTH
            ax.plot([x - 0.02] * len(spread["values"]), spread["values"], "o", color=colour, markersize=3, alpha=0.5)
            ax.errorbar(
                x + 0.02,
                spread["mean"],
                yerr=spread["sd"],
                fmt=marker,
                color=colour,
                markersize=6,
                capsize=3,
                label=label,
            )
            label = "_"  # once in the legend
    for at, attack in enumerate(ATTACKS):
        if (spread := results.get(gold, {}).get(attack.part)) is not None:
            ax.hlines(spread["mean"], at - 0.45, at + 0.45, color=GREY, linestyle="--", linewidth=1)
    ax.set_xticks(range(len(ATTACKS)), [attack.title for attack in ATTACKS])
    ax.set_ylim(0, 1)
    ax.set_ylabel("extraction strength of the rows not shown")
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("Taught a part again, how much of the rest comes back (dashed: never saw the rows)", fontsize=11)
    if ax.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
