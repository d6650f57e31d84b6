"""The t-test beside scipy's and beside what chance does; what few rows, and rows that are all equal, say."""

from __future__ import annotations

from itertools import combinations
from random import Random
from statistics import fmean

import pytest
from scipy.stats import fisher_exact, ttest_ind

from lowmem_npo.evaluation.chance import EXPLAINS, group_means, least_p, of_several, p_above, p_more, p_more_of_groups


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


def test_groups_by_all_ways_to_choose_them():
    own, beside = [0.1, 0.25, 0.0, 0.3], [0.0, 0.1, 0.05]
    sums = [sum(chosen) for chosen in combinations([*own, *beside], 4)]
    exact = sum(each >= sum(own) - 1e-9 for each in sums) / len(sums)
    assert p_more_of_groups(own, beside) == pytest.approx(exact)
    assert p_more_of_groups([1.0, 0.0, 1.0], [0.0] * 9) == p_more([1.0, 0.0, 1.0], [0.0] * 9), "Fisher's"
    assert p_more_of_groups([0.5], [0.0] * 99) == 1
    many = [0.1] * 30, [0.0] * 30  # of which not all can be tried
    assert p_more_of_groups(*many) == p_more_of_groups(*many) == pytest.approx(1e-4)
    draw = Random(2)
    alike = [p_more_of_groups(*([draw.random() ** 4 for _ in range(12)] for _ in range(2))) for _ in range(40)]
    assert 0.3 < fmean(alike) < 0.7


def test_a_group_is_the_mean_of_its_rows():
    assert group_means([1.0, 3.0, 0.1, 4.0], ["a", "b", None, "b"]) == [1.0, 3.5, 0.1]
    assert group_means([0.3, 0.1], [None, None]) == [0.3, 0.1]


def test_rows_that_are_alike_seldom_stand_out():
    def alike(rows: int, tries: int) -> bool:
        ps = [p_above(*([draw(1.5, 3) for _ in range(rows)] for _ in range(2))) for _ in range(tries)]
        return of_several(min(ps), tries) < EXPLAINS

    draw = Random(0).betavariate
    for rows, tries in ((5, 1), (5, 8), (40, 8)):
        assert sum(alike(rows, tries) for _ in range(300)) <= 24  # 15 are to be expected, 24 is beyond 98% of draws
    assert of_several(0.3, 8) == 1
