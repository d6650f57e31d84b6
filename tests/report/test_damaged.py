"""Files of a run that were edited by hand, or are another tool's: the report is written, or says which and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import Any

import pytest

from lowmem_npo.cli import main
from lowmem_npo.errors import UserError
from lowmem_npo.report import page
from lowmem_npo.report.content import read_content
from lowmem_npo.report.model_card import model_card

OTHERS = ("text", None, [1, 2], {"a": 1}, float("inf"))


def places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in what a JSON file holds, of lists the first."""
    yield above
    keys = content if isinstance(content, dict) else range(min(1, len(content))) if isinstance(content, list) else ()
    for key in keys:
        yield from places(content[key], (*above, key))


@pytest.fixture
def evaluated(own_run):
    """A run with an evaluation that compared with an earlier one, and with a gold model: all three the same."""
    options = ["--dtype", "float32", "--device", "cpu", "--limit", "2", "--leaks", "extraction", "sampling"]
    options += ["--leak-samples", "2", "--max-new-tokens", "4"]
    assert main(["evaluate", "--adapter", str(own_run), *options]) == 0
    settings = own_run / "evaluation" / "settings.json"
    same = str(own_run / "evaluation" / "evaluation.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"before": same, "retained_log": same}))
    return own_run


@pytest.mark.parametrize(
    "name", ["before.json", "audit.json", "leaks.json", "evaluation/evaluation.json", "evaluation/settings.json"]
)
def test_values_of_other_types(evaluated, name, monkeypatch):
    monkeypatch.setattr(page, "curve_pictures", lambda *_: [])  # takes most of the time
    monkeypatch.setattr(page, "bar_pictures", lambda *_: [])
    file = evaluated / name
    whole, refused = file.read_text(), 0
    for i, place in enumerate(places(json.loads(whole))):
        content, value = {"": json.loads(whole)}, OTHERS[i % len(OTHERS)]
        reduce(getitem, ("", *place)[:-1], content)[("", *place)[-1]] = value
        file.write_text(json.dumps(content[""]))
        try:
            read = read_content(evaluated)
            page.render_page(read, 1), model_card(read), json.dumps(read.to_json(), allow_nan=False)
        except UserError as error:
            refused += 1
            assert file.name in str(error), (place, value)
    assert refused
