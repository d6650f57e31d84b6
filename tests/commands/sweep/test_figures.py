"""The figures of a sweep: which seeds a configuration's are over, in tables and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.sweep import figures
from lowmem_npo.commands.sweep.figures import Column, collect, tables, text_tables, write_results
from lowmem_npo.commands.sweep.grid import SweepRun, parse_grid, plan_sweep
from lowmem_npo.evaluation.answer_table import NOT_GENERATED
from lowmem_npo.evaluation.answers import AnswerEvaluation, AnswerRecord, AnswerSummary, save_answers
from lowmem_npo.run_directory import EvaluationFiles, RunFiles

TRACES = Column("leaks.sampling.leaks", "traces found", None, "leak test sampling")
ROUGE = Column("leaks.sampling.rouge", "ROUGE-L", group="leak test sampling")


def done_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, seeds: int) -> list[SweepRun]:
    """The runs of a sweep of one configuration, all of them done."""
    entry = {"status": "done", "before": {}, "generated": True, "hardly_said": False}
    monkeypatch.setattr(figures, "_entry", lambda run, _: {"seed": run.seed, **entry})
    given = ["--model", "m", "--output-dir", str(folder)]
    return plan_sweep(parse_grid([]), range(seeds), lambda flags: parse_run([*given, *flags], "sweep"))


def test_a_verdict_counts_over_the_seeds_that_have_one(tmp_path, monkeypatch):
    """A mean over some of the seeds is shown of none."""
    verdicts = [1.0, 1.0, None, 1.0, 1.0]
    runs = done_runs(tmp_path, monkeypatch, seeds=5)

    def evaluated(files: EvaluationFiles) -> dict[Column, float]:
        place: Path = files.path.parent
        verdict = verdicts[int(place.name[-1])] if place.name.startswith("seed-") else 0.0
        return {} if verdict is None else {TRACES: verdict, ROUGE: 0.5}

    result = collect(runs, {}, tmp_path, evaluated)
    assert tables(result)["leak test sampling"] == [
        ["configuration", "seeds", "traces found", "ROUGE-L"],
        ["before", "–", "0 of 1", "0.500"],
        ["as-given", "5", "4 of 4, 1 unknown", "–"],
    ]
    write_results(result, tmp_path)
    (configuration,) = json.loads((tmp_path / "sweep.json").read_text())["configurations"]
    assert configuration["figures"] == {TRACES.key: {"mean": 1.0, "sd": 0.0, "values": verdicts}}
    before, means = csv.DictReader((tmp_path / "sweep_means.csv").open())
    assert before[TRACES.key] == "0.0" and before[f"{TRACES.key}_unknown"] == ""
    assert means[TRACES.key] == "1.0" and means[f"{TRACES.key}_unknown"] == "1" and means[ROUGE.key] == ""
    lines = csv.DictReader((tmp_path / "sweep.csv").open())
    assert [line[TRACES.key] for line in lines] == ["1.0", "1.0", "", "1.0", "1.0"]


def test_names_are_counted_over_the_seeds_and_other_measures_have_no_mean(tmp_path, monkeypatch):
    """The worst attack may be another in each seed: of one measure there is a mean, of several none."""
    name, strength, recall = (
        Column(f"worst_attack.{key}", key, group="worst attack") for key in ("name", "strength", "recall")
    )
    worst = [("relearning", strength, 0.25), ("relearning", strength, 0.5), ("retuning", strength, 0.75)]
    runs = done_runs(tmp_path, monkeypatch, seeds=3)

    def evaluated(files: EvaluationFiles) -> dict[Column, float | str]:
        seed = int(files.path.parent.name[-1]) if files.path.parent.name.startswith("seed-") else 0
        attack, measure, value = worst[seed]
        return {name: attack, measure: value}

    result = collect(runs, {}, tmp_path, evaluated)
    assert tables(result)["worst attack"] == [
        ["configuration", "seeds", "name", "strength"],
        ["before", "–", "relearning", "0.250"],
        ["as-given", "3", "relearning (2); retuning (1)", "0.500 ± 0.250"],
    ]
    write_results(result, tmp_path)
    _, means = csv.DictReader((tmp_path / "sweep_means.csv").open())
    assert means["worst_attack.name"] == "relearning (2); retuning (1)" and means["worst_attack.strength"] == "0.5"
    (configuration,) = json.loads((tmp_path / "sweep.json").read_text())["configurations"]
    assert configuration["names"] == {name.key: ["relearning", "relearning", "retuning"]}
    worst[2] = ("sampling", recall, 0.9)
    _, before, mixed = tables(collect(runs, {}, tmp_path, evaluated))["worst attack"]
    assert mixed[2:] == ["relearning (2); sampling (1)", "–"] and before[2:] == ["relearning", "0.250"]


def test_the_model_before_has_what_any_point_measured_of_it(tmp_path, monkeypatch):
    """The first one keeps nothing, and has no retain rows."""
    given = ["--model", "m", "--delta", "0", "--output-dir", str(tmp_path)]
    runs = plan_sweep(parse_grid(["gamma=0,1"]), [1], lambda flags: parse_run([*given, *flags], "sweep"))

    def entry(run: SweepRun, _: object) -> dict[str, Any]:
        before = {"forget_nll": 1.0} | ({"retain_nll": 2.0} if run.config.objective.needs_retain else {})
        return {"seed": run.seed, "status": "done", "before": before, "generated": True, "hardly_said": False}

    monkeypatch.setattr(figures, "_entry", entry)
    assert collect(runs, {}, tmp_path).baselines == {"before": {"forget_nll": 1.0, "retain_nll": 2.0}}


@pytest.mark.parametrize("says", [0.0, 1.0])
def test_a_model_that_hardly_says_what_it_is_to_forget_is_told_of_beside_its_runs(says, tmp_path):
    given = ["--model", "m", "--output-dir", str(tmp_path)]
    runs = plan_sweep(parse_grid([]), range(2), lambda flags: parse_run([*given, *flags], "sweep"))
    record = AnswerRecord(0, "Who?", "Ann.", "Bob.", 2, 4.0, 0.1, says, False, bool(says))
    summary = AnswerSummary(1, 1, 2, 4.0, 0.1, says, 0.0, says, 8)
    for run in runs:
        RunFiles(run.directory).path.mkdir(parents=True)
        RunFiles(run.directory).weights.touch()
        for stage in ("before", "after"):
            save_answers(RunFiles(run.directory).answers(stage), {"forget": AnswerEvaluation(summary, [record])})
    write_results(result := collect(runs, {}, tmp_path), tmp_path)
    for text in (text_tables(result, 120), (tmp_path / "sweep.md").read_text()):
        told = "In the line 'before' hardly an answer to forget is said" in " ".join(text.split())
        assert told is (says == 0.0)


def test_answers_that_were_read_off_are_not_described_as_written_ones(tmp_path):
    for generate in ("on", "off"):
        root, written = tmp_path / generate, generate == "on"
        given = ["--model", "m", "--output-dir", str(root), "--generate-answers", generate]
        runs = plan_sweep(parse_grid([]), range(2), lambda flags, given=given: parse_run([*given, *flags], "sweep"))
        record = AnswerRecord(0, "Who?", "Ann.", "Ann.", 2, 0.1, 0.9, 1.0, True, True)
        summary = AnswerSummary(1, 1, 2, 0.1, 0.9, 1.0, 1.0, 1.0, 8, generated=written)
        for run in runs:
            files = RunFiles(run.directory)
            files.path.mkdir(parents=True)
            files.weights.touch()
            for stage in ("before", "after"):
                save_answers(files.answers(stage), {"forget": AnswerEvaluation(summary, [record])})
        result = collect(runs, {}, root)
        write_results(result, root)
        for text in (text_tables(result, 120), (root / "sweep.md").read_text()):
            words = " ".join(text.split())
            assert ("appear in greedy ones" in words) is written and (NOT_GENERATED in words) is not written
