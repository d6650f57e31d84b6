"""What a report says, gathered from the files that a run (and `lowmem-npo evaluate`) left in its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation import AnswerEvaluation, AnswerRecord, AnswerSummary
from lowmem_npo.files import file_sha256
from lowmem_npo.model.saved_adapter import WEIGHTS
from lowmem_npo.report.audit import Audit, read_audit
from lowmem_npo.report.figures import Figure, answer_figures, evaluation_figures, finite
from lowmem_npo.report.verdict import RULES, Verdict, judge_run
from lowmem_npo.run_directory import read_evaluations
from lowmem_npo.training.early_stopping import OUTCOME
from lowmem_npo.training.metrics import Metrics, read_metrics

EVIDENCE = (
    "This report is evidence: what was measured, on which rows, with which tests. It is not a certificate that the "
    "data is gone."
)
STAGES = ("before", "after", "gold")
EVALUATED = "evaluate"  # group of what `lowmem-npo evaluate` measured with the run's own measures
Leaks = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ExampleRow:
    """One measured row at every stage. `said` and `figures` are by stage."""

    set: str
    prompt: str
    truth: str
    said: dict[str, str]
    figures: dict[str, AnswerRecord]


@dataclass(frozen=True)
class Content:
    """The whole report of the run in `directory`. `settings` is its run.yaml."""

    directory: Path
    settings: dict[str, Any]
    verdict: Verdict
    stages: dict[str, dict[str, AnswerSummary]]
    figures: list[Figure]
    leaks: dict[str, Leaks]
    metrics: list[Metrics]
    evaluations: dict[str, dict[str, AnswerEvaluation]]
    notes: list[str]
    audit: Audit | None

    def to_json(self) -> dict[str, Any]:
        """report.json: every figure with its meaning and the audit record; no text of any row."""
        return {
            "what_this_is": EVIDENCE,
            "verdict": {**asdict(self.verdict), "rules": RULES},
            "rows": {
                stage: {part: {"rows": s.rows, "rows_in_set": s.rows_in_set, "answer_tokens": s.tokens}
                        for part, s in sets.items()}
                for stage, sets in self.stages.items()
            },
            "figures": [asdict(figure) for figure in self.figures],
            "leaks": self.leaks,
            "training": {"logged_steps": len(self.metrics), "first": (self.metrics or [None])[0],
                         "last": (self.metrics or [None])[-1]},
            "notes": self.notes,
            "audit": self.audit,
        }  # fmt: skip

    def examples(self, count: int) -> list[ExampleRow]:
        """`count` rows of each set, those that speak most against success: forget answers that survive best, retain
        answers that changed most."""
        stages = [stage for stage in STAGES if stage in self.evaluations]
        if "after" not in stages or "before" not in stages:
            return []
        found = []
        for part in self.evaluations["after"]:
            by_row = {s: {r.row: r for r in self.evaluations[s][part].records} for s in stages}
            rows = [{stage: by_row[stage].get(row) for stage in stages} for row in by_row["after"]]
            worst_first = _survival if part == "forget" else _damage
            for row in sorted((row for row in rows if row["before"]), key=worst_first)[:count]:
                told = {stage: record for stage, record in row.items() if record is not None}
                first = told["before"]
                said = {stage: record.answer for stage, record in told.items()}
                found.append(ExampleRow(part, first.prompt, first.reference, said, told))
        return found


def read_content(directory: Path) -> Content:
    """Raises UserError where `directory` holds no run, or a file of it is damaged."""
    if not (directory / "run.yaml").is_file():
        raise UserError(f"There is no run in '{directory}' (no run.yaml): give the --output-dir of `lowmem-npo train`.")
    try:
        settings = yaml.safe_load((directory / "run.yaml").read_text(encoding="utf-8"))
        evaluations = {stage: found for stage in STAGES if (found := read_evaluations(directory, stage))}
        evaluated, leaks = _read_evaluation(directory), _read_leaks(directory)
        metrics = read_metrics(directory / "metrics.jsonl")
        stopped = _read_stopping(directory)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"A file in '{directory}' is damaged and cannot be reported on: {error}.") from error
    audit = read_audit(directory)
    stages = {stage: {part: e.summary for part, e in sets.items()} for stage, sets in evaluations.items()}
    figures = [*answer_figures(stages), *_evaluated_answers(evaluated), *evaluation_figures(evaluated)]
    vocabulary = audit["model"]["vocabulary"] if audit else None
    verdict = judge_run(stages, vocabulary, leaks)
    notes = [*stopped, *_notes(metrics, audit), *(evaluated.get("after", {}).get("notes", []))]
    return Content(directory, settings, verdict, stages, figures, leaks, metrics, evaluations, notes, audit)


def _read_evaluation(directory: Path) -> dict[str, dict[str, Any]]:
    """Stage -> evaluation.json: of this very adapter, and of what it was compared with if that is still there."""
    path = directory / "evaluation" / "evaluation.json"
    if not path.is_file():
        return {}
    settings = path.with_name("settings.json")
    told = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    weights = directory / WEIGHTS
    if weights.is_file() and told.get("digests", {}).get("the adapter", "") != file_sha256(weights):
        return {}  # the run went on since: those figures are of another adapter
    before = told.get("before")
    earlier = Path(before).expanduser() if before else None
    found = {"before": json.loads(earlier.read_text(encoding="utf-8"))} if earlier and earlier.is_file() else {}
    return {**found, "after": json.loads(path.read_text(encoding="utf-8"))}


def _read_leaks(directory: Path) -> dict[str, Leaks]:
    """Stage -> test -> figures. What `evaluate` measured later takes the place of the same test of the run, unless it
    could not tell (no holdout) and the run could."""
    path, found = directory / "leaks.json", {}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
    for stage, content in _read_evaluation(directory).items():
        known = found.setdefault(stage, {})
        for test, told in (content.get("leaks") or {}).items():
            if told.get("leaks") is not None or known.get(test, {}).get("leaks") is None:
                known[test] = told
    kept = {stage: {test: _figures_only(told) for test, told in tests.items()} for stage, tests in found.items()}
    return {stage: tests for stage, tests in kept.items() if tests}


def _figures_only(found: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, truth values and meanings: whatever else a test may have written down could be text of a row."""
    kept: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, Mapping):
            kept[key] = _figures_only(value)
        elif key == "meaning" or value is None or isinstance(value, bool):
            kept[key] = value
        elif isinstance(value, int | float):
            kept[key] = finite(value)
        elif isinstance(value, list) and all(isinstance(item, int | float) for item in value):
            kept[key] = [finite(item) for item in value]
    return kept


def _read_stopping(directory: Path) -> list[str]:
    """What ended a run under --stop-when, and which step's adapter was kept: not the last one's, as a rule."""
    path = directory / OUTCOME
    return [json.loads(path.read_text(encoding="utf-8"))["sentence"]] if path.is_file() else []


def _evaluated_answers(evaluated: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    answers = {
        stage: {part: AnswerSummary(**values) for part, values in content.get("answers", {}).items()}
        for stage, content in evaluated.items()
    }
    return answer_figures({stage: sets for stage, sets in answers.items() if sets}, EVALUATED)


def _notes(metrics: list[Metrics], audit: Audit | None) -> list[str]:
    notes = []
    if broken := sum(any(value is None for value in line.values()) for line in metrics):
        notes.append(f"At {broken} of {len(metrics)} logged steps a loss was not a finite number.")
    if audit is None:
        notes.append("This run has no audit record: it was made by a version of lowmem-npo that wrote none.")
        return notes
    if audit["adapter"] is None:
        notes.append("The run has not reached its end: there is no finished adapter.")
    if (sessions := len(audit["sessions"])) > 1:
        notes.append(f"The run was resumed: it took {sessions} sessions.")
    return notes


def _survival(row: Mapping[str, AnswerRecord]) -> tuple[float, ...]:
    return (-row["after"].rouge_l_recall, -row["after"].probability)


def _damage(row: Mapping[str, AnswerRecord]) -> tuple[float, ...]:
    before, after = row["before"], row["after"]
    return (after.rouge_l_recall - before.rouge_l_recall, before.nll - after.nll)
