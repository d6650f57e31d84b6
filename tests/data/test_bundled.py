"""The bundled dataset: what the script writes, and nothing that could be guessed."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from lowmem_npo.data import bundled_rows

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_biographies.py"
PARTS = ("forget", "retain", "holdout")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_biographies", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    return {part: bundled_rows(part).rows for part in PARTS}


def test_the_files_are_what_the_script_writes(script):
    for part, text in script.generate().items():
        assert (script.DIRECTORY / f"{part}.jsonl").read_bytes() == text.encode()


def test_people_are_split_without_overlap(rows):
    people = {part: {row["person"] for row in rows[part]} for part in PARTS}
    assert not people["forget"] & people["retain"]
    assert not people["holdout"] & (people["forget"] | people["retain"])
    share = len(people["forget"]) / len(people["forget"] | people["retain"])
    assert 1 / 4 <= share <= 1 / 3
    for part in PARTS:
        assert set(Counter(row["person"] for row in rows[part]).values()) == {6}


def test_no_answer_can_be_taken_from_another_person(rows):
    everything = [row for part in PARTS for row in rows[part]]
    for field in ("id", "question", "answer"):
        assert len({row[field].casefold() for row in everything}) == len(everything)
    for row in everything:
        assert row["person"] in row["question"]
        first, last = row["person"].split()
        assert first not in row["answer"] and last not in row["answer"]


def test_the_whole_is_small(rows):
    texts = [row["question"] + row["answer"] for part in ("forget", "retain") for row in rows[part]]
    assert sum(len(text.encode()) for text in texts) < 20_000
    assert max(len(row["answer"]) for part in PARTS for row in rows[part]) <= 40


def test_limit_keeps_the_first_rows(rows):
    some = bundled_rows("forget", limit=3)
    assert some.rows == rows["forget"][:3]
    assert some.where(2) == "bundled forget.jsonl, line 3"
