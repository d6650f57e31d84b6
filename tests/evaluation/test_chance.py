"""The t-test beside scipy's and beside what chance does; what few rows, and rows that are all equal, say."""

from __future__ import annotations

from itertools import combinations
from random import Random
from statistics import fmean

import pytest
from scipy.stats import fisher_exact, ttest_ind

from lowmem_npo.evaluation.chance import EXPLAINS, least_p, of_several, p_above, p_more


@pytest.mark.parametrize(("rows", "others", "shift"), [(5, 5, 0.0), (3, 40, 0.2), (40, 9, 0.3), (12, 30, 0.5)])
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
        ([1.0, 1.0], [0.0, 0.0], 1 / 6),  # no row is like any of the others: so one of six ways to choose two would be
        ([1.0] * 3, [0.0] * 4, 1 / 35),
        ([0.2, 0.2], [0.2, 0.2], 1),
        ([0.0, 0.0], [1.0, 1.0], 1),
    ],
)
def test_where_there_is_nothing_to_estimate(values, others, p):
    assert p_above(values, others) == p


@pytest.mark.parametrize(("rows", "others"), [(2, 2), (2, 5), (3, 3), (3, 4), (4, 5)])
def test_no_few_rows_are_surer_than_all_ways_to_choose_them(rows, others):
    """The p-value of the permutation test is at least that of the one permutation that is further than all others."""
    own, beside = [0.9 + i / 1000 for i in range(rows)], [0.01 * i for i in range(others)]
    means = [fmean(chosen) for chosen in combinations([*own, *beside], rows)]
    least = sum(mean >= fmean(own) for mean in means) / len(means)
    assert least_p(rows, others) == pytest.approx(least) and p_above(own, beside) >= least_p(rows, others)
    assert least_p(1, others) == least_p(rows, 1) == 1


@pytest.mark.parametrize(
    ("some", "rows", "beside", "others"), [(10, 100, 0, 100), (3, 4, 1, 9), (0, 5, 2, 5), (5, 5, 4, 4)]
)
def test_it_is_fishers(some, rows, beside, others):
    sides = [[1.0] * count + [0.0] * (of - count) for count, of in ((some, rows), (beside, others))]
    table = [[some, rows - some], [beside, others - beside]]
    assert p_more(*sides) == pytest.approx(fisher_exact(table, alternative="greater").pvalue, rel=1e-9)


def test_a_share_of_a_row_counts_against_a_difference():
    assert p_more([0.5, 0.4, 1.0], [0.0] * 9) == p_more([0.0, 0.0, 1.0], [0.0] * 9)
    assert p_more([0.1] * 30, [0.0] * 9) == p_more([1.0] * 3 + [0.0] * 27, [0.0] * 9), "three, but for rounding"
    assert p_more([1.0] * 3, [0.1] * 9) == p_more([1.0] * 3, [1.0] + [0.0] * 8)
    assert p_more([1.0], [0.0] * 99) == p_more([1.0] * 99, [0.0]) == 1  # what one row says may be chance


def test_rows_that_are_alike_seldom_stand_out():
    def alike(rows: int, tries: int) -> bool:
        ps = [p_above(*([draw(1.5, 3) for _ in range(rows)] for _ in range(2))) for _ in range(tries)]
        return of_several(min(ps), tries) < EXPLAINS

    draw = Random(0).betavariate
    for rows, tries in ((5, 1), (5, 8), (40, 8)):
        assert sum(alike(rows, tries) for _ in range(300)) <= 24  # 15 are to be expected, 24 is beyond 98% of draws
    assert of_several(0.3, 8) == 1
