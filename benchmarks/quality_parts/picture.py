"""The figure of `quality.py`: every row of (gamma, delta), each training length, and the target of each measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#56B4E9", "#D55E00", "#009E73")  # Okabe and Ito's palette
GREY = "#555555"
PANELS: tuple[tuple[str, str, str | float], ...] = (  # a target is a number, or the model whose figure it is
    ("forget_nll", "forget answers: NLL per token", "gold"),
    ("membership_auc", "membership AUC, forget against holdout", 0.5),
    ("retain_nll", "retain answers: NLL per token", "before"),
    ("retain_exact_match", "retain answers given word for word", "before"),
)


def draw_quality(path: Path, results: dict[str, Any]) -> None:
    """Writes a PNG. Dots are seeds, diamonds with bars are mean ± standard deviation, dashed lines are the targets."""
    lengths = list(dict.fromkeys(row["when"] for row in results["rows"]))
    pairs = list(dict.fromkeys((row["gamma"], row["delta"]) for row in results["rows"]))
    figure = Figure(figsize=(12.5, 7.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    for ax, (key, title, target) in zip(axes, PANELS, strict=True):
        for place, when in enumerate(lengths):
            _draw(ax, [row for row in results["rows"] if row["when"] == when], key, when, place, len(lengths))
        ax.axhline(results[target][key] if isinstance(target, str) else target, color=GREY, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(pairs)), [f"γ {gamma:g}, δ {delta:g}" for gamma, delta in pairs])
        ax.set_title(title, fontsize=11)
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if key == "retain_nll":
            ax.set_yscale("log")
    seeds = len(results["rows"][0]["seeds"])
    targets = "dashed: the gold standard (forget), no membership (0.5), the model before (retain)"
    figure.suptitle(f"Dots: {seeds} seeds; diamonds: mean ± standard deviation; {targets}", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(ax: Axes, rows: list[dict[str, Any]], key: str, when: str, place: int, count: int) -> None:
    colour = COLOURS[place]
    for at, row in enumerate(rows):
        spread = row["figures"][key]
        x, values, sd = at + (place - (count - 1) / 2) * 0.26, spread["values"], spread["sd"]
        ax.plot([x - 0.06] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.5)
        down = sd if key != "retain_nll" or sd is None else min(sd, 0.9 * spread["mean"])  # a log scale ends above 0
        bars = None if sd is None else [[down], [sd]]
        label = when if at == 0 else None
        ax.errorbar(x + 0.03, spread["mean"], yerr=bars, fmt="D", color=colour, markersize=6, capsize=4, label=label)
