"""The picture of a sweep: no label on another, and a small difference that looks small."""

from __future__ import annotations

import itertools

import pytest

from lowmem_npo.commands.sweep.figures import COLUMNS, Column, Configuration, Spread, SweepResult
from lowmem_npo.commands.sweep.picture import figure_of

MORE = [
    Column("tofu.model_utility", "model utility", group="TOFU", main=True),
    Column("tofu.forget_quality", "forget quality", group="TOFU", main=True),
    Column("leaks.membership.loss_auc", "loss AUC", group="leak test membership", main=True),
    Column("leaks.relearning.extraction_strength", "extraction strength", group="leak test relearning", main=True),
    Column("leaks.sampling.best_rouge_l_recall", "best ROUGE-L recall", group="leak test sampling", main=True),
]


def result(count: int, *, nll: float = 3.0, step: float = 0.01, more=MORE, seeds: int = 3) -> SweepResult:
    """Configurations, each almost the same as the one before."""
    configurations = []
    for i in range(count):
        settings = {"forget-term": "npo", "lora-targets": f"q_proj v_proj o_proj, number {i}"}
        figures = {"forget_nll": Spread.of([nll + step * (i + 0.1 * s) for s in range(seeds)])}
        figures["retain_nll"] = Spread.of([0.5 + step * (i + 0.1 * s) for s in range(seeds)])
        figures |= {column.key: Spread.of([0.5 + 0.001 * i] * seeds) for column in more}
        configurations.append(Configuration(f"n{i}", settings, list(range(seeds)), figures))
    baselines = {"before": {"forget_nll": 0.5, "retain_nll": 0.5}, "gold": {"forget_nll": 0.51, "retain_nll": 0.49}}
    return SweepResult(configurations, baselines, columns=[*COLUMNS, *more])


def labels(figure):
    figure.draw_without_rendering()
    texts = [figure._suptitle]
    for ax in figure.axes:
        if ax.get_visible():
            low, high = ax.get_xlim()
            ticks = zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
            texts += [ax.title, *ax.get_yticklabels(), *(text for at, text in ticks if low <= at <= high)]
    shown = [text for text in texts if text.get_visible() and text.get_text()]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


@pytest.mark.parametrize("count, more, seeds", [(1, [], 1), (2, MORE[:1], 2), (16, MORE, 5)])
def test_no_label_overlaps_another_or_leaves_the_picture(count, more, seeds):
    figure = figure_of(result(count, more=more, seeds=seeds))
    boxes = labels(figure)
    assert len(boxes) > 3 * count / 2
    for (one, box), (other, another) in itertools.combinations(boxes, 2):
        assert not box.overlaps(another), (one, other)
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text


def distance(figure, panel: int) -> float:
    """Between the first and the last mean, as a share of the panel's width."""
    ax = figure.axes[panel]
    means = [container.lines[0].get_xdata()[0] for container in ax.containers]
    low, high = ax.get_xlim()
    assert all(low < mean < high for mean in means)
    return abs(means[-1] - means[0]) / (high - low)


@pytest.mark.parametrize("nll", [0.02, 3.0])
def test_a_hundredth_of_a_nat_does_not_look_large_and_a_nat_does(nll):
    alike = result(2, nll=nll)
    alike.baselines.clear()
    assert distance(figure_of(alike), 0) < 0.02
    assert distance(figure_of(result(2, nll=nll, step=2.0)), 0) > 0.3


def test_shares_have_the_whole_range():
    low, high = figure_of(result(2)).axes[2].get_xlim()
    assert low <= 0 and 1 <= high < 1.1


def test_a_configuration_without_a_figure_does_not_hide_the_others():
    some = result(3)
    del some.configurations[1].figures["tofu.model_utility"]
    titles = [ax.get_title() for ax in figure_of(some).axes]
    assert "TOFU: model utility" in titles
