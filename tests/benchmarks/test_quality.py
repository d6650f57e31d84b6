"""benchmarks/quality.py: its arithmetic by hand, its picture, its committed table, and a whole run in small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
from matplotlib import image

from benchmarks import quality
from benchmarks.quality_parts import paper_rows
from benchmarks.quality_parts.picture import draw_quality
from benchmarks.quality_parts.table import summarise, table
from lowmem_npo.commands.demo.recipe import Teaching
from lowmem_npo.config import DataConfig

ROOT = Path(__file__).resolve().parents[2]


def measured_by_hand() -> list[dict]:
    def entry(when, forget, retain, exact, **more):
        figures = {"forget_nll": forget, "forget_exact_match": 0.0, "retain_nll": retain, "retain_exact_match": exact}
        return {"when": when, **more, **figures, "holdout_nll": 5.0, "membership_auc": 0.4}

    rows = [entry("before", 0.1, 0.2, 1.0), entry("gold", 5.0, 0.3, 1.0)]
    for gamma, delta in ((1.0, 0.0), (0.0, 1.0)):
        for seed, forget in enumerate((4.0, 7.0, 9.0)):
            rows.append(entry("10 epochs", forget, 0.5, 0.9, gamma=gamma, delta=delta, seed=seed, epochs=10))
            exact = 0.2 if delta == 0 and seed else 0.8
            rows.append(entry("20 epochs", 5.5, 0.4, exact, gamma=gamma, delta=delta, seed=seed, epochs=20))
    return rows


def test_the_table_by_hand():
    results = summarise(measured_by_hand())
    assert [(r["when"], r["gamma"], r["collapsed"]) for r in results["rows"]] == [
        ("10 epochs", 1.0, 0),
        ("10 epochs", 0.0, 0),
        ("20 epochs", 1.0, 2),
        ("20 epochs", 0.0, 0),
    ]
    figures = results["rows"][0]["figures"]
    assert figures["forget_nll"]["mean"] == pytest.approx(20 / 3)
    assert figures["gold_distance"]["values"] == [1.0, 2.0, 4.0]
    assert figures["gold_distance"]["sd"] == pytest.approx((((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2) ** 0.5)
    lines = table(results).splitlines()
    assert "| 1 | 0 | 20 epochs |" in lines[6] and lines[6].endswith("| 2 of 3 |")
    assert "6.67 ± 2.52" in lines[4] and "2.33 ± 1.53" in lines[4]


def test_the_picture(tmp_path):
    draw_quality(tmp_path / "q.png", summarise(measured_by_hand()))
    height, width = image.imread(tmp_path / "q.png").shape[:2]
    assert width >= 1400 and height >= 800


@pytest.mark.slow
def test_a_whole_run_in_small(tmp_path, monkeypatch):
    """Two seeds of one row, on a model taught for seconds: the measurements agree with the files of the runs."""
    small = paper_rows.Setting(
        Teaching(vocabulary=300, layers=2, width=32, heads=2, epochs=30, batch_size=6, lr=5e-3),
        DataConfig(limit=6),
        epochs=(1, 2),
        batch_size=3,
        lora_r=4,
    )
    monkeypatch.setattr(paper_rows, "QUICK", small)
    monkeypatch.setattr(paper_rows, "ROWS", ((1.0, 0.5),))
    out, work = tmp_path / "quality.json", tmp_path / "work"
    assert quality.main(["--quick", "--seeds", "2", "--out", str(out), "--work", str(work)]) == 0
    record = json.loads(out.read_text())
    rows = {row["when"]: row for row in record["results"]["rows"]}
    assert set(rows) == {"1 epochs", "2 epochs", "stopped"} and rows["stopped"]["seeds"] == [0, 1]
    assert out.with_suffix(".md").read_text() == table(record["results"]) + "\n" and out.with_suffix(".png").exists()
    stopped = work / "runs" / "gamma=1_delta=0.5_stopped"
    nlls = [json.loads((stopped / f"seed-{s}" / "after.json").read_text())["forget"]["summary"]["nll"] for s in (0, 1)]
    figure = rows["stopped"]["figures"]["forget_nll"]
    assert figure["mean"] == pytest.approx(fmean(nlls), rel=1e-5)
    assert figure["sd"] == pytest.approx(stdev(nlls), rel=1e-3)
    short, long = (rows[f"{n} epochs"]["figures"]["forget_nll"]["values"] for n in (1, 2))
    assert short != long, "the checkpoint and the end are two adapters"


@pytest.mark.slow
def test_lume_runs_and_its_absence_is_reported(shared_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper_rows, "ROWS", ((1.0, 0.5),))
    out = tmp_path / "q.json"
    assert quality.main(["--quick", "--lume", str(shared_data), "--seeds", "1", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["results"]["rows"]) == 3
    assert quality.main(["--lume", str(tmp_path)]) == 0
    assert "skipped" in capsys.readouterr().out


def test_the_committed_table_is_that_of_the_committed_numbers():
    folder = ROOT / "benchmarks" / "results" / "cpu"
    record = json.loads((folder / "quality.json").read_text())
    assert (folder / "quality.md").read_text() == table(record["results"]) + "\n"
    assert summarise(record["measured"]) == record["results"]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    marked = re.search(r"<!-- table:quality -->\n(.*?)\n<!-- /table -->", page, re.DOTALL)
    assert marked and marked[1] == table(record["results"])
