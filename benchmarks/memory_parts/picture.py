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
    """Draws the JSON that `memory.py` wrote. Bars are the peak; colours are its parts according to the simulation.

    Above, what others do and lowmem-npo without 4 bits; below, larger, lowmem-npo's steps from the last of those on.
    """
    lengths = sorted({entry["tokens"] for entry in result["results"]})
    names = list(dict.fromkeys(entry["name"] for entry in sorted(result["results"], key=lambda e: -e["tokens"])))
    first = next((place for place, name in enumerate(names) if "--qlora" in name), len(names))
    bands = [band for band in (names[:first], names[max(first - 1, 0) :]) if band]
    heights = [len(band) for band in bands]
    figure, panes = pyplot.subplots(
        len(bands),
        len(lengths),
        figsize=(6.4 * len(lengths), 0.4 * sum(heights) + 2.4),
        squeeze=False,
        sharex="row",
        sharey="row",
        height_ratios=heights,
    )
    for row, band in zip(panes, bands, strict=True):
        sizes = [sum(e["by_kind"].values()) for e in result["results"] if e["name"] in band and "by_kind" in e]
        widest = max(sizes, default=2**30) / 2**30
        for pane, tokens in zip(row, lengths, strict=True):
            entries = [e for e in result["results"] if e["tokens"] == tokens and e["name"] in band and "by_kind" in e]
            _bars(pane, entries, band[::-1], widest)
    for pane, tokens in zip(panes[0], lengths, strict=True):
        pane.set_title(f"{tokens} tokens per row", fontsize=10)
    for pane in panes[-1]:
        pane.set_xlabel("GiB on the GPU, without CUDA context")
    handles, labels = panes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=4, frameon=False, fontsize=8)
    how = "simulated" if result["simulated"] else f"measured on {result['machine']['gpu']}"
    figure.suptitle(f"One NPO step of {result['model']}, {result['rows']} rows: peak memory, {how}", fontsize=11)
    note = "All recompute their layers in the backward pass, but for the one that says otherwise. * on by default."
    figure.text(0.5, 0.065, note, ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(pane: Any, entries: list[dict[str, Any]], names: list[str], widest: float) -> None:
    """The bars of one length; names: from the bottom up. widest: of all lengths, in GiB."""
    for entry in entries:
        place, left = names.index(entry["name"]), 0.0
        for kind, colour in zip(NAMES, COLOURS, strict=True):
            size = entry["by_kind"].get(kind, 0) + (entry["by_kind"].get("batch", 0) if kind == "cuBLAS" else 0)
            pane.barh(place, size / 2**30, left=left, color=colour, height=0.72, label=NAMES[kind])
            left += size / 2**30
        text = entry.get("failed") or f"{entry['peak_bytes'] / 2**30:.1f}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        pane.text(left + widest / 80, place, text, va="center", fontsize=9, bbox=box)
    pane.set_xlim(0, widest * 1.12)
    if widest > 24:
        pane.axvline(24, color="black", linewidth=0.8, linestyle=":")
        pane.text(24.3, len(names) - 0.45, "24 GiB", fontsize=8)
    pane.set_yticks(range(len(names)), names)
    pane.spines[["top", "right"]].set_visible(False)
    pane.yaxis.set_minor_formatter(NullFormatter())
