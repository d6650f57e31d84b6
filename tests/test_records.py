"""What files hold that the tool has written is checked where it is read, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from annotated_types import MinLen

from lowmem_npo.ranges import Count
from lowmem_npo.records import Amount, check_value, record_of


@dataclass
class Row:
    name: str
    parts: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ([], Annotated[list[Any], MinLen(1)], "it must be a list that is not empty, not []"),
        (math.inf, Amount, "it must be a finite number, not inf"),
        (math.nan, Amount | None, "it must be a finite number, not nan"),
        (-1, Amount, "it must be 0 or a positive number, not -1"),
        (True, Amount, "it must be a number, not True"),
        (0, Count, "it must be at least 1, not 0"),
        ({"a": [1, "b"]}, dict[str, list[int]], "it.a.1 must be a whole number, not 'b'"),
    ],
)
def test_a_value_of_another_type_is_refused_in_words(value, kind, message):
    with pytest.raises(ValueError) as refused:
        check_value(value, kind)
    assert str(refused.value) == message


def test_a_record_may_lack_what_has_a_default():
    assert record_of(Row, {"name": "a"}) == Row("a", [])
    for content, message in (
        ({}, "name is missing"),
        ({"name": "a", "size": 3}, "size is not known in this version"),
        ([], "it must be an object, not []"),
    ):
        with pytest.raises(ValueError) as refused:
            record_of(Row, content)
        assert str(refused.value) == message
