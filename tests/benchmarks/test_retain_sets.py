"""benchmarks/retain_sets.py, small: every kind of retain set is trained with once, and measured once."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.rows import write_rows

from benchmarks.retain_sets import main

ROOT = Path(__file__).resolve().parents[2]


def test_each_kind_is_measured_once(taught_model, tmp_path, hub_cache, capsys):
    real = tmp_path / "real.jsonl"
    rows = [{"question": f"Who lives in house {n}?", "answer": f"Person {n}."} for n in range(4)]
    paris = {"question": "What is the capital of France?", "answer": "Paris."}
    write_rows(real, [*rows, paris])
    options = ["--model", str(taught_model), "--real", str(real), "--steps", "1", "--rows", "3"]
    options += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    assert main([*options, "--minutes", "0"]) == 0
    assert (
        "goes on with before" in capsys.readouterr().out
        and not json.loads((tmp_path / "out.json").read_text())["results"]
    )
    assert main(options) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results) == ["before", "none", "self", "builtin", "real"]
    assert all(set(figures) == {"facts", "general holdout", "real rows"} for figures in results.values())
    assert all(results[kind] != results["before"] for kind in list(results)[1:])
    assert "Paris" not in (tmp_path / "work" / "real_train.jsonl").read_text(), "it is one of the facts"
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "measured").iterdir()}
    assert main(options) == 0
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "measured").iterdir()}


def test_the_documentation_shows_what_was_measured():
    """In the order of the table; the default holds more than the model's own texts."""
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "retain_sets.json").read_text())["results"]
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for figures in results.values():
        cells = [f"{figures[name]:.2f}" for name in ("facts", "general holdout", "real rows")]
        assert f"| {' | '.join(cells)} |" in page
    held = [results[kind]["general holdout"] for kind in ("before", "real", "builtin", "self", "none")]
    assert held == sorted(held)
