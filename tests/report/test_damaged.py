"""Files of a run that were edited by hand, or are another tool's: the report is written, or says which and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache, partial, reduce
from operator import getitem
from typing import Any

import pytest
from jinja2 import Environment, FileSystemBytecodeCache

from lowmem_npo import run_directory
from lowmem_npo.cli import main
from lowmem_npo.errors import UserError
from lowmem_npo.report import content, page
from lowmem_npo.report import model_card as card

OTHERS = ("text", "", None, True, [1, 2], {"a": 1}, -1, 1e308, 10**400, math.inf, math.nan)


def places(held: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in what a JSON file holds, of lists the first."""
    yield above
    keys = held if isinstance(held, dict) else range(min(1, len(held))) if isinstance(held, list) else ()
    for key in keys:
        yield from places(held[key], (*above, key))


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


def damaged(whole: str, name: str, every: bool) -> Iterator[tuple[tuple[Any, ...], Any, str]]:
    """A place in the file, a value, and the file with that value there: in turn one of `OTHERS`, or each with `every`;
    of the configuration, of which a report tells next to nothing, always one."""
    for i, place in enumerate(places(json.loads(whole))):
        for value in OTHERS if every and (len(place) < 2 or place[0] != "configuration") else [OTHERS[i % len(OTHERS)]]:
            changed = {"": json.loads(whole)}
            reduce(getitem, ("", *place)[:-1], changed)[("", *place)[-1]] = value
            yield place, value, json.dumps(changed[""])


@pytest.mark.parametrize(
    "name", ["before.json", "audit.json", "leaks.json", "evaluation/evaluation.json", "evaluation/settings.json"]
)
def test_values_of_other_types(evaluated, name, monkeypatch, tmp_path, full):
    monkeypatch.setattr(page, "curve_pictures", lambda *_: [])  # takes most of the time
    monkeypatch.setattr(page, "bar_pictures", lambda *_: [])
    monkeypatch.setattr(run_directory, "read_settings", cache(run_directory.read_settings))
    for module in (page, card):  # each compiles its template anew
        compiled_once = partial(Environment, bytecode_cache=FileSystemBytecodeCache(str(tmp_path)))
        monkeypatch.setattr(module, "Environment", compiled_once)
    file, every = evaluated / name, full or name == "audit.json"
    refused = set()
    for place, value, text in damaged(file.read_text(), name, every):
        file.write_text(text)
        try:
            read = content.read_content(evaluated)
            html = page.render_page(read, 1)
            card.model_card(read), json.dumps(read.to_json(), allow_nan=False)
        except UserError as error:
            refused.add(repr(value))
            assert file.name in str(error), (place, value)
        else:
            assert html.startswith("<!DOCTYPE html>") and html.endswith("</html>"), (place, value)
    assert refused == {repr(value) for value in OTHERS} or not every and refused


@pytest.mark.parametrize(
    ("place", "change", "why"),
    [
        (["sessions", 0], {"started": ""}, "Invalid isoformat string"),
        (["sessions", 0], {"ended": ""}, "Invalid isoformat string"),
        (["sessions", 0], {"started": "", "ended": None}, "Invalid isoformat string"),
        (["sessions", 0], {"started": "2026-01-01T00:00:00"}, "offset-naive"),
        (["model"], {"vocabulary": -1}, "vocabulary must be at least 1, not -1"),
        (["data", "forget"], {"rows": 0}, "rows must be at least 1, not 0"),
    ],
)
def test_what_an_audit_record_cannot_hold(own_run, place, change, why, capsys):
    file = own_run / "audit.json"
    audit = json.loads(file.read_text())
    reduce(getitem, place, audit).update(change)
    file.write_text(json.dumps(audit))
    assert main(["report", str(own_run)]) == 2
    printed = capsys.readouterr().err
    assert f"'{file}' is damaged and cannot be reported on" in printed and why in printed


def test_without_a_record_the_settings_must_name_the_model(own_run, capsys):
    (own_run / "audit.json").unlink()
    settings = (own_run / "run.yaml").read_text().splitlines(keepends=True)
    (own_run / "run.yaml").write_text("".join(line for line in settings if not line.startswith("model:")))
    assert main(["report", str(own_run)]) == 2
    assert "run.yaml' is damaged: it names no model" in capsys.readouterr().err
