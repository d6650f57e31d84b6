"""How figures are written: few digits, but never two different ones alike."""

from __future__ import annotations

import math

import pytest

from lowmem_npo.evaluation.figures import Figure, finite, formatted, shares, side_by_side, table


@pytest.mark.parametrize(
    ("values", "decimals", "texts"),
    [
        ([0.008, 0.013], 2, ["0.008", "0.013"]),
        ([0.125, 4.5], 2, ["0.12", "4.50"]),
        ([0.996, 0.0], 3, ["0.996", "0.000"]),
        ([5.12341, 5.12342], 3, ["5.12341", "5.12342"]),
        ([1e-8, 3e-9, 0.99], 3, ["1.0e-08", "3.0e-09", "0.990"]),
        ([1.0, 1.0, None], 3, ["1.000", "1.000", "–"]),
        ([0.5, 0.5 + 1e-12], 3, ["0.500", "0.500"]),  # the same, but for rounding
        ([math.nan, 0.5, math.inf], 3, ["nan", "0.500", "inf"]),
        ([0.996, 0.5], 2, ["0.996", "0.500"]),  # 1.00 would be all of them
        ([1.0, 1.004], 2, ["1.000", "1.004"]),
        ([0.9996, 3.2], 3, ["1.000", "3.200"]),  # nats, of which 1 is not all
        ([0.9999999, 0.5003, 0.5001], 3, ["1.0000", "0.5003", "0.5001"]),  # no digits would tell it from all
        ([0.0015, 12.0], 3, ["0.0015", "12.0000"]),  # 0.002 would be a third too much
    ],
)
def test_side_by_side(values, decimals, texts):
    assert side_by_side(values, decimals=decimals) == texts


def test_alone_and_in_per_cent():
    assert [formatted(v) for v in (None, 0.0, 0.5, 0.0004)] == ["–", "0.000", "0.500", "4.0e-04"]
    assert shares(0.0, 1.0) == ["0%", "100%"]
    assert [shares(v)[0] for v in (1 / 400, 399 / 400, 0.9999)] == ["0.25%", "99.8%", "99.99%"]  # not none, not all
    assert shares(0.5, 0.123) == ["50%", "12%"] and shares(0.123, 0.124) == ["12.3%", "12.4%"]


def test_a_figure_is_a_number_that_a_float_holds():
    assert [finite(v) for v in (0, -1e308, 10**308)] == [0, -1e308, 10**308]
    assert {finite(v) for v in (None, "1", math.nan, math.inf, -math.inf, 10**400)} == {None}


def test_a_table_keeps_them_apart():
    before, now = ([Figure(None, "x", "loss", value, "lower", "")] for value in (0.00011, 0.00012))
    assert "1.1e-04  1.2e-04" in table(now, before)
