"""The figure of `memory.py`: the memory of each contender by kind, as stacked bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter

NAMES = {
    "frozen weights": "frozen weights",
    "reference": "second model, reference",
    "adapter": "trained weights, gradients, optimizer",
    "checkpoints": "checkpoints",
    "layer work": "work of the layers, gradients under way",
    "head": "vocabulary head and losses",
    "cuBLAS": "cuBLAS, batch",
}
COLOURS = ("#4c6a92", "#9db4d3", "#d9863d", "#7fa86a", "#c9b25b", "#b0524f", "#a9a9a9")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the JSON that `memory.py` wrote. Bars are the peak; colours are its parts according to the simulation."""
    lengths = sorted({entry["tokens"] for entry in result["results"]})
    names = list(dict.fromkeys(entry["name"] for entry in sorted(result["results"], key=lambda e: -e["tokens"])))[::-1]
    height = 0.36 * len(names) + 1.6
    figure, panes = pyplot.subplots(1, len(lengths), figsize=(6.4 * len(lengths), height), squeeze=False, sharey=True)
    for pane, tokens in zip(panes[0], lengths, strict=True):
        entries = [entry for entry in result["results"] if entry["tokens"] == tokens and "by_kind" in entry]
        for entry in entries:
            place, left = names.index(entry["name"]), 0.0
            for kind, colour in zip(NAMES, COLOURS, strict=True):
                size = entry["by_kind"].get(kind, 0) + (entry["by_kind"].get("batch", 0) if kind == "cuBLAS" else 0)
                pane.barh(place, size / 2**30, left=left, color=colour, height=0.72, label=NAMES[kind])
                left += size / 2**30
            text = entry.get("failed") or f"{entry['peak_bytes'] / 2**30:.1f}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            pane.text(left + 0.8, place, text, va="center", fontsize=9, bbox=box)
        pane.axvline(24, color="black", linewidth=0.8, linestyle=":")
        pane.text(24.3, len(names) - 0.45, "24 GiB", fontsize=8)
        pane.set_yticks(range(len(names)), names)
        pane.set_xlim(0, max((sum(e["by_kind"].values()) for e in entries), default=2**30) / 2**30 * 1.12)
        pane.set_xlabel("GiB on the GPU, without CUDA context")
        pane.set_title(f"{tokens} tokens per row", fontsize=10)
        pane.spines[["top", "right"]].set_visible(False)
        pane.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = panes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=4, frameon=False, fontsize=8)
    how = "simulated" if result["simulated"] else f"measured on {result['machine']['gpu']}"
    figure.suptitle(f"One NPO step of {result['model']}, {result['rows']} rows: peak memory, {how}", fontsize=11)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
