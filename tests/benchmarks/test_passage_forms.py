"""benchmarks/passage_forms.py, small: every form is trained with and measured; and what its committed figures say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.passage_forms import FORMS, TOKENS, main

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu" / "passage_forms.json"


@pytest.mark.slow
def test_a_small_run(tmp_path):
    assert main(["--quick", "--out", str(tmp_path / "out.json")]) == 0
    before, *results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [one["passages"] for one in results] == list(FORMS)
    assert before["forget_extraction"] > 0.9, "the model recites the document"
    assert all(one.keys() > before.keys() for one in results)


def test_the_documentation_says_what_was_measured():
    """Texts alone forget least, completions most; the table shows these figures."""
    results = json.loads(COMMITTED.read_text())["results"][1:]
    left = {(one["passages"], one["passage_tokens"]): one["forget_extraction"] for one in results}
    assert set(left) == {(form, tokens) for form in FORMS for tokens in TOKENS}
    for tokens in TOKENS:
        assert left["completion", tokens] <= left["both", tokens] < left["text", tokens]
    assert all(one["retain_extraction"] > 0.9 for one in results)
    page = (COMMITTED.parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    for tokens in TOKENS:
        cells = [f"{left[form, tokens] + 1e-9:.2f}" for form in ("completion", "both", "text")]
        assert f"| {tokens} | {' | '.join(cells)} |" in page
