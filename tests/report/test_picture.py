"""The picture: a PNG of the promised size that shows its figures."""

from __future__ import annotations

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from lowmem_npo.evaluation.answer_table import MEASURES
from lowmem_npo.evaluation.answers import AnswerSummary
from lowmem_npo.report.panels import draw_bars, draw_likelihood
from lowmem_npo.report.picture import draw_picture

METRICS = [
    {"step": at, "forget_loss": 7 / at, "forget_nll": 0.1 * at, "retain_nll": 0.2, "retain_kl": 0.001 * (at - 1)}
    for at in range(1, 61)
]
ASCENT = [{"step": 1, "forget_loss": -2.5, "forget_nll": 3.0}, {"step": 2, "forget_loss": None}]


def stages(*names, retain=True):
    sets = ["forget", "retain"] if retain else ["forget"]
    return {
        name: {part: AnswerSummary(8, 8, 80, 1.0 + place, 0.3, 0.5, 0.25, 0.25, 64) for part in sets}
        for place, name in enumerate(names)
    }


def pixels(path):
    return image.imread(path)[..., :3]


@pytest.mark.parametrize(
    ("metrics", "drawn"),
    [
        (METRICS, stages("before", "after", "gold")),
        (METRICS[:1], stages("before", "after")),
        ([line | {"held_nll": 4.0} for line in METRICS[:30]] + METRICS[30:], stages("before", "after")),
        ([], stages("before")),  # nothing trained
        (ASCENT, stages("a", "b", retain=False)),
        (METRICS, stages("before", "after", "gold", "merged", "4-bit")),
    ],
    ids=["gold", "one step", "held rows", "no steps", "gradient ascent, a gap, no retain", "more stages"],
)
def test_it_has_the_promised_size_and_is_not_blank(metrics, drawn, tmp_path):
    path = tmp_path / "deep" / "picture.png"
    draw_picture(path, metrics, drawn, "a title")
    picture = pixels(path)
    assert picture.shape == (1000, 1500, 3)
    assert 0.02 < (picture.min(axis=2) < 0.95).mean() < 0.6  # ink, but mostly paper


def test_other_numbers_give_another_picture(tmp_path):
    """Each panel is drawn from its own numbers: changing them changes pixels there, and nowhere else."""
    base = stages("before", "after", "gold")
    draw_picture(tmp_path / "base.png", METRICS, base, "a title")
    bars = stages("before", "after", "gold")
    bars["after"]["retain"] = AnswerSummary(8, 8, 80, 2.0, 0.3, 0.5, 0.99, 0.99, 64)
    draw_picture(tmp_path / "bars.png", METRICS, bars, "a title")
    curves = [line | {"retain_kl": 0.002 * line["step"]} for line in METRICS]
    draw_picture(tmp_path / "curves.png", curves, base, "a title")

    plain = pixels(tmp_path / "base.png")
    rows, columns = (pixels(tmp_path / "bars.png") != plain).any(axis=2).nonzero()
    assert rows.min() > 500 and columns.min() > 1100  # the last panel at the bottom: exact match
    rows, columns = (pixels(tmp_path / "curves.png") != plain).any(axis=2).nonzero()
    assert rows.max() < 550 and columns.min() > 700  # the right panel at the top: the objective


def test_the_bars_of_a_panel_have_as_many_decimals():
    """As many as tell the figures of a set apart."""
    chances = {"before": {"forget": 0.046, "retain": 0.013}, "after": {"forget": 0.02, "retain": 0.011}}
    drawn = {
        stage: {part: AnswerSummary(8, 8, 80, 1.0, chance, 0.5, 0.25, 0.25, 64) for part, chance in of.items()}
        for stage, of in chances.items()
    }
    ax = Figure().add_subplot()
    draw_bars(ax, drawn, next(at for at, measure in enumerate(MEASURES) if measure.field == "probability"))
    assert [text.get_text() for text in ax.texts] == ["0.046", "0.013", "0.020", "0.011"]


def test_beside_a_refusal_there_is_no_line_of_what_gold_says_of_the_forget_answers():
    for refuses, labels in (
        (False, ["forget answers", "retain answers", "forget answers, to a model that never saw them"]),
        (True, ["the refusal, in place of forget answers", "retain answers"]),
    ):
        ax = Figure().add_subplot()
        draw_likelihood(ax, METRICS, stages("before", "after", "gold"), refuses)
        assert ax.get_legend_handles_labels()[1] == labels
