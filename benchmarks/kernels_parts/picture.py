"""The picture of benchmarks/kernels.py: time and workspace of every contender at the largest shape measured."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.kernels_parts.peers import ENGINES
from benchmarks.kernels_parts.tasks import TASKS

OURS, PEER, FLOOR = "#1f6f8b", "#b8bcc2", "#c8553d"


def draw(runs: list[dict], path: Path, gpu: str) -> None:
    """Writes a PNG: a column per task, times above, workspaces below. Our torch engine, meant for CPUs, is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [run for run in runs if "seconds" in run and run["contender"] != "torch"]
    n, v, d = max(map(_shape, timed), key=math.prod)
    timed = [run for run in timed if _shape(run) == (n, v, d)]
    names = list(dict.fromkeys(r["contender"] for r in timed if r["contender"] != "floor"))
    figure, axes = plt.subplots(2, len(TASKS), figsize=(14, 0.62 * len(names) + 2.2), sharey=True, layout="constrained")
    for column, task in enumerate(TASKS):
        of_task = {r["contender"]: r for r in timed if r["task"] == task.key}
        floor = of_task.pop("floor", None)
        for axis, value in (
            (axes[0, column], lambda r: 1e3 * r["seconds"]["median"]),
            (axes[1, column], lambda r: max(r["workspace_bytes"] / 2**20, 0.01)),
        ):
            for row, name in enumerate(names):
                if name in of_task:
                    size = value(of_task[name])
                    axis.barh(row, size, color=OURS if name in ENGINES else PEER, height=0.7)
                    text = f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
                    right = 1e3 * of_task[name]["seconds"]["high"] if axis is axes[0, column] else size
                    axis.annotate(text, (right, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
            axis.set_yticks(range(len(names)), ["cce (+ trl's KL)" if name == "cce" else name for name in names])
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.18)
        for row, name in enumerate(names):
            if name in of_task:
                s = of_task[name]["seconds"]
                axes[0, column].plot([1e3 * s["low"], 1e3 * s["high"]], [row, row], color="black", linewidth=1)
        if floor:
            axes[0, column].axvline(1e3 * floor["seconds"]["median"], color=FLOOR, linestyle="--", linewidth=1)
        axes[0, column].set_title(f"{task.key}  {task.title}", fontsize=9)
        axes[0, column].set_xlabel("ms")
        axes[1, column].set_xlabel("workspace, MiB")
        axes[1, column].set_xscale("log")
    axes[0, 0].invert_yaxis()
    title = f"{gpu}: {n} tokens, vocabulary {v}, hidden size {d}, bfloat16. Dashed: the matrix products alone"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _shape(run: dict) -> tuple[int, int, int]:
    return run["tokens"], run["vocabulary"], run["hidden"]
