"""The panels of a run's pictures, each drawn on given axes: curves of the training, bars of the answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lowmem_npo.evaluation.answer_table import MEASURES, Measure, Stages
from lowmem_npo.evaluation.answers import part_of
from lowmem_npo.evaluation.figures import formatted, side_by_side
from lowmem_npo.training.metrics import Metrics

# Okabe and Ito's palette, which colour-blind readers can distinguish. Forget and retain look the same in every panel.
FORGET, RETAIN, GREY = "#D55E00", "#0072B2", "#555555"
HELD = "#E69F00"
NLLS = ("forget_nll", "retain_nll", "held_nll")
STAGE_COLOURS = {"before": "#56B4E9", "after": "#E69F00", "gold": "#009E73"}
SPARE_COLOURS = ("#CC79A7", "#F0E442", "#000000")
STAGE_TITLES = {"gold": "never saw the forget rows"}


def stage_colours(stages: Iterable[str]) -> dict[str, str]:
    spare = iter(SPARE_COLOURS)
    return {stage: STAGE_COLOURS.get(stage) or next(spare, GREY) for stage in stages}


def draw_likelihood(ax: Axes, metrics: Sequence[Metrics], stages: Stages, refuses: bool = False) -> None:
    """refuses: whether a refusal is taught, whose NLL was then logged in place of the forget answers'."""
    attacked = ", under the adversary" if _values(metrics, "adversary_nll") else ""
    forget = "the refusal, in place of forget answers" if refuses else f"forget answers{attacked}"
    _draw_line(ax, metrics, "forget_nll", forget, FORGET)
    _draw_line(ax, metrics, "adversary_nll", "others of them, before its step", GREY)
    _draw_line(ax, metrics, "retain_nll", "retain answers", RETAIN)
    _draw_line(ax, metrics, "held_nll", "forget answers held until their turn", HELD)
    if "gold" in stages and not refuses:  # else nothing that is drawn goes there
        label = "forget answers, to a model that never saw them"
        ax.axhline(stages["gold"]["forget"].nll, color=FORGET, linestyle="--", linewidth=1.2, label=label)
    _finish(ax, "How unlikely the answers are", "NLL per answer token (nats)")
    ax.set_ylim(
        bottom=0, top=1.3 * max([value for key in NLLS for value in _values(metrics, key)] + [ax.get_ylim()[1]])
    )
    _mark_stages(ax, metrics)


def draw_objective(ax: Axes, metrics: Sequence[Metrics]) -> None:
    _draw_line(ax, metrics, "forget_loss", "forget loss", FORGET)
    _draw_line(ax, metrics, "retain_nll", "retain NLL", RETAIN)
    _draw_line(ax, metrics, "retain_kl", "retain KL to the original", GREY)
    # Three terms that span several powers of ten; forget losses other than npo can be negative.
    positive = all(value > 0 for key in ("forget_loss", "retain_nll") for value in _values(metrics, key))
    if positive and metrics:
        ax.set_yscale("log", nonpositive="mask")  # the KL of the first step is 0
    _finish(ax, "The terms of the objective", "nats, unweighted")
    _mark_stages(ax, metrics)


def stage_starts(metrics: Sequence[Metrics]) -> list[tuple[int, int]]:
    """(stage, the first step that was logged in it) of a layered run; empty for others."""
    first: dict[int, int] = {}
    for line in metrics:
        if line.get("stage") is not None:
            first.setdefault(int(line["stage"]), line["step"])
    return list(first.items())


def _mark_stages(ax: Axes, metrics: Sequence[Metrics]) -> None:
    starts = stage_starts(metrics)
    if starts:
        ax.set_title(ax.get_title(), fontsize=11, pad=18)  # above their names
    for stage, step in starts:
        ax.axvline(step, color=GREY, linestyle=":", linewidth=1)
        ax.annotate(
            f"stage {stage}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
        )


def _draw_line(ax: Axes, metrics: Sequence[Metrics], key: str, label: str, colour: str) -> None:
    """The logged values; if there are many, thinly, with their running mean."""
    points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    window = max(1, len(values) // 25)
    means = [sum(values[max(0, at + 1 - window) : at + 1]) / min(at + 1, window) for at in range(len(values))]
    if window > 1:
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    ax.plot(steps, means, color=colour, linewidth=2, label=label, marker="o" if len(values) == 1 else None)


def drawn_sets(stages: Stages) -> list[str]:
    """The sets that have bars: each once, in the form that was trained. The others are in the table."""
    return [name for name in next(iter(stages.values())) if part_of(name) == name]


def draw_bars(ax: Axes, stages: Stages, column: int) -> None:
    measure = MEASURES[column]
    sets = drawn_sets(stages)
    width = 0.8 / len(stages)
    colours = stage_colours(stages)
    labels = _labels(stages, sets, measure)
    size = min(
        8, 36 / max(len(text) for texts in labels.values() for text in [*texts, "0.00"])
    )  # none over its neighbour
    for place, (stage, summaries) in enumerate(stages.items()):
        values = [value if (value := measure.value(summaries.get(name))) is not None else math.nan for name in sets]
        centres = [at + (place - (len(stages) - 1) / 2) * width for at in range(len(sets))]
        bars = ax.bar(centres, values, width * 0.92, color=colours[stage], label=STAGE_TITLES.get(stage, stage))
        ax.bar_label(bars, labels[stage], fontsize=size, padding=2)
    ax.set_xticks(range(len(sets)), sets, fontsize=11)
    ax.set_title(measure.heading, fontsize=11)
    ax.set_ylim(0, 1.12 if measure.field != "nll" else 1.12 * max(ax.get_ylim()[1], 0.1))
    ax.spines[["top", "right"]].set_visible(False)


def _labels(stages: Stages, sets: Sequence[str], measure: Measure) -> dict[str, list[str]]:
    """Stage -> what is written on its bars, with as many decimals on all: figures of a set that differ are not written
    alike."""
    values = [[measure.value(of.get(name)) for of in stages.values()] for name in sets]
    texts = [text for of_set in values for text in side_by_side(of_set, "", decimals=2) if "e" not in text]
    decimals = max((len(text.partition(".")[2]) for text in texts), default=2)
    by_set = [[formatted(value, "", max(decimals, 2)) for value in of_set] for of_set in values]
    return {stage: [labels[place] for labels in by_set] for place, stage in enumerate(stages)}


def _finish(ax: Axes, title: str, ylabel: str) -> None:
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("optimiser step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=9, framealpha=0.85, edgecolor="none")


def _values(metrics: Sequence[Metrics], key: str) -> list[float]:
    return [line[key] for line in metrics if line.get(key) is not None]
