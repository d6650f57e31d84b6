"""Shared by the tests of sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.rows import write_rows
from helpers.taught_model import LIMIT, TEACHING

from lowmem_npo.commands.demo.teaching import fresh_model, make_tokenizer
from lowmem_npo.data import Template, bundled_rows, to_examples


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """base: an untaught model; forget, retain and holdout rows with TOFU's columns."""
    folder = tmp_path_factory.mktemp("desk")
    texts = []
    for part in ("forget", "retain", "holdout"):
        rows = bundled_rows(part, limit=LIMIT).rows[:4]
        texts += ["".join(Template().render(e)) for e in to_examples(bundled_rows(part, limit=LIMIT))]
        answers = [row["answer"] for row in rows]
        lines = [
            {"question": row["question"], "answer": row["answer"], "perturbed_answer": answers[:i] + answers[i + 1 :]}
            for i, row in enumerate(rows)
        ]
        write_rows(folder / f"{part}.jsonl", lines)
    tokenizer = make_tokenizer(texts, TEACHING.vocabulary)
    tokenizer.save_pretrained(folder / "base")
    fresh_model(tokenizer, TEACHING, 0).save_pretrained(folder / "base")
    return folder
