"""The t-test beside scipy's and beside what chance does; what one row, and rows that are all equal, say."""

from __future__ import annotations

from random import Random

import pytest
from scipy.stats import ttest_ind

from lowmem_npo.evaluation.chance import EXPLAINS, of_several, p_above


@pytest.mark.parametrize(("rows", "others", "shift"), [(5, 5, 0.0), (3, 40, 0.2), (40, 2, -0.1), (12, 30, 0.5)])
def test_it_is_welchs(rows, others, shift):
    draw = Random(rows).betavariate
    values, beside = [draw(1.5, 3) + shift for _ in range(rows)], [draw(3, 1.5) for _ in range(others)]
    reference = ttest_ind(values, beside, equal_var=False, alternative="greater").pvalue
    assert p_above(values, beside) == pytest.approx(reference, rel=1e-9)
    assert p_above(beside, values) == pytest.approx(1 - reference, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "others", "p"),
    [
        ([1.0], [0.0, 0.0, 0.0], 1),  # what one row says may be chance
        ([1.0] * 3, [0.0], 1),
        ([1.0, 1.0], [0.0, 0.0], 0),  # no row is like any of the others
        ([0.2, 0.2], [0.2, 0.2], 1),
        ([0.0, 0.0], [1.0, 1.0], 1),
    ],
)
def test_where_there_is_nothing_to_estimate(values, others, p):
    assert p_above(values, others) == p


def test_rows_that_are_alike_seldom_stand_out():
    def alike(rows: int, tries: int) -> bool:
        ps = [p_above(*([draw(1.5, 3) for _ in range(rows)] for _ in range(2))) for _ in range(tries)]
        return of_several(min(ps), tries) < EXPLAINS

    draw = Random(0).betavariate
    for rows, tries in ((5, 1), (5, 8), (40, 8)):
        assert sum(alike(rows, tries) for _ in range(300)) <= 24  # 15 are to be expected, 24 is beyond 98% of draws
    assert of_several(0.3, 8) == 1
