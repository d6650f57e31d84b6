"""The content of a report, read from the files that a run (and `lowmem-npo evaluate`) has written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from lowmem_npo.data.reading import general_words
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answers import (
    AnswerEvaluation,
    AnswerRecord,
    AnswerSummary,
    part_of,
    read_answers,
    summaries,
)
from lowmem_npo.evaluation.directory import COMPARED, OTHER_ROWS, base_of, compared_with, is_of_adapter
from lowmem_npo.evaluation.earlier import Earlier
from lowmem_npo.evaluation.figures import finite
from lowmem_npo.evaluation.gold import Gold
from lowmem_npo.evaluation.leaks.contract import LeakResults, leak_results
from lowmem_npo.evaluation.leaks.measure import read_leaks
from lowmem_npo.evaluation.leaks.worst import WORST_ATTACK, WorstAttack, not_beside_gold, worst_attacks
from lowmem_npo.files import expanded, load_json
from lowmem_npo.ranges import shortened
from lowmem_npo.records import check_record
from lowmem_npo.report.as_audited import base_of_run, of_another_adapter
from lowmem_npo.report.audit import Audit, check_reported, read_audit
from lowmem_npo.report.figures import StagedFigure, evaluation_figures, run_figures
from lowmem_npo.report.leak_tests import leak_sections
from lowmem_npo.report.run_leaks import AFTER, Tested, merged_leaks
from lowmem_npo.report.verdict import Verdict, judge_run
from lowmem_npo.report.verdict_rules import RULES
from lowmem_npo.run_directory import EvaluationFiles, RunFiles, check_is_run, finishing
from lowmem_npo.training.metrics import Metrics, read_metrics

EVIDENCE = (
    "This is evidence: what was measured, on which rows, with which tests. It is not a certificate that the data is "
    "gone."
)
STAGES = ("before", "after", "gold")
# Why an evaluation is none of the run's.
OF_ANOTHER_ADAPTER = "'{}' is not known to be of the adapter as it is now: this report leaves it out."
OF_ANOTHER_BASE = (
    "'{}' is of the adapter on another base model than the run's, or on one that is not known to be the same: this "
    "report leaves it out."
)
OF_OTHER_ROWS = "The leak tests in '{}' are of other forget rows than the run's: this report leaves them out."
LEAK_TESTS_ALONE = "Of {} this report has the leak tests alone: all other figures are in the evaluation.json there."


@dataclass(frozen=True)
class ExampleRow:
    """One measured row at every stage. answers, figures: by stage."""

    set: str
    prompt: str
    truth: str
    answers: dict[str, str]
    figures: dict[str, AnswerRecord]


@dataclass(frozen=True)
class Content:
    """The content of the report of the run in `directory`. settings: those of its run.yaml."""

    directory: Path
    settings: dict[str, Any]
    verdict: Verdict
    stages: dict[str, dict[str, AnswerSummary]]
    figures: list[StagedFigure]
    leaks: dict[str, LeakResults]
    metrics: list[Metrics]
    evaluations: dict[str, dict[str, AnswerEvaluation]]
    notes: list[str]
    audit: Audit | None

    @property
    def worst_attacks(self) -> dict[str, WorstAttack]:
        """Stage -> the attack that brings back most, where there was any."""
        return worst_attacks(self.leaks)

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
            "leaks": {stage: {n: r.to_json() for n, r in tests.items()} for stage, tests in self.leaks.items()},
            WORST_ATTACK: {stage: attack.to_json() for stage, attack in self.worst_attacks.items()},
            "training": {"logged_steps": len(self.metrics), "first": self.metrics[0] if self.metrics else None,
                         "last": self.metrics[-1] if self.metrics else None},
            "notes": self.notes,
            "audit": self.audit,
        }  # fmt: skip

    def examples(self, count: int) -> list[ExampleRow]:
        """The `count` rows of each set that speak most against success: the forget answers that survive best, and the
        retain answers that changed most."""
        stages = [stage for stage in STAGES if stage in self.evaluations]
        if "after" not in stages or "before" not in stages:
            return []
        examples = []
        for part in self.evaluations["after"]:
            measured = {stage: self.evaluations[stage].get(part) for stage in stages}
            # a row may be asked in several paraphrases
            by_row = {s: {(r.row, r.prompt): r for r in e.records} if e else {} for s, e in measured.items()}
            rows = [{stage: by_row[stage][row] for stage in stages if row in by_row[stage]} for row in by_row["after"]]
            worst_first = _survival if part_of(part) == "forget" else _damage
            for records in sorted((row for row in rows if "before" in row), key=worst_first)[:count]:
                first = records["before"]
                answers = {stage: record.answer for stage, record in records.items()}
                examples.append(ExampleRow(part, first.prompt, first.reference, answers, records))
        return examples


def read_content(directory: Path) -> Content:
    """Raises UserError if `directory` holds no run, or if a file is damaged."""
    files = RunFiles(directory)
    check_is_run(directory)
    settings = files.settings()
    with _named(files.audit):
        audit = read_audit(directory)
        if audit is not None:
            check_reported(audit)
    if audit is None and settings.get("model") is None:
        raise UserError(
            f"'{files.run_yaml}' is damaged: it names no model, which {files.audit.name} would; restore one."
        )
    evaluations = {}
    for stage in STAGES:
        with _named(files.answers(stage)):
            if sets := read_answers(files.answers(stage)):
                evaluations[stage] = sets
    with _named(files.leaks):
        of_run = read_leaks(files.leaks)
        leak_sections(of_run)
    measured, left_out = _read_evaluations(files)
    with _named(measured[-1].files.settings if measured else files.run_yaml):
        tested = [Tested(settings, of_run), *(one.tested for one in measured if one.is_of_run_rows)]
        leaks, replaced = merged_leaks(tested)
    for results in leaks.values():
        for result in results.values():
            result.figures = _finite(result.figures)
    included = next((one.stages for one in measured if one.is_first), {})
    figures = evaluation_figures(included)
    with _named(files.metrics):
        metrics = read_metrics(files.metrics)
    with _named(files.stopping):
        stopped = _read_stopping(files)
    stages = {stage: summaries(sets) for stage, sets in evaluations.items()}
    figures = [*run_figures(stages), *figures]
    errors = _errors_of_change(evaluations)
    measured_nothing = files.weights.is_file() and settings.get("eval_rows") == 0
    unfinished = None if measured_nothing else finishing(files)
    verdict = judge_run(stages, audit["model"]["vocabulary"] if audit else None, leaks, errors, unfinished)
    notes = [*stopped, *_notes(metrics, audit), *filter(None, [of_another_adapter(directory)])]
    for one in measured:
        said = [*one.notes, *_no_longer_there(one.known)]
        notes += said if one.is_first else [f"{one.tested.name}: {note}" for note in said if note not in notes]
    notes += [*left_out, *replaced]
    notes = list(dict.fromkeys([*notes, *not_beside_gold(leaks.get("after", {}), leaks.get("gold", {}))]))
    return Content(directory, settings, verdict, stages, figures, leaks, metrics, evaluations, notes, audit)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Names the file that turns out to be damaged."""
    try:
        yield
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = shortened(str(error))
        raise UserError(f"'{file}' is damaged and cannot be reported on ({why}): restore or remove it.") from error


@dataclass(frozen=True)
class _Evaluated:
    """An evaluation of the run's adapter on its base. is_first: whether it is the one whose figures the report has, and
    not the leak tests alone. known: its settings. stages: stage -> the content of evaluation.json, and of --before as
    far as it can be compared. gold: what the leak tests gave of the model that it compared with, if it did."""

    files: EvaluationFiles
    is_first: bool
    known: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    gold: LeakResults

    @property
    def is_of_run_rows(self) -> bool:
        return not self.known.get(OTHER_ROWS)

    @property
    def tested(self) -> Tested:
        leaks = {stage: leak_results(content.get("leaks") or {}) for stage, content in self.stages.items()}
        return Tested(self.known, {**leaks, "gold": self.gold}, self.files.path.name)

    @property
    def notes(self) -> list[str]:
        """What it noted of its figures; of leak tests alone, where there are any in the report."""
        content = self.stages[AFTER]
        return content.get("notes") or [] if self.is_first or (self.is_of_run_rows and content.get("leaks")) else []


def _read_evaluations(files: RunFiles) -> tuple[list[_Evaluated], list[str]]:
    """The evaluations of the run's adapter on its base, and notes on what the report leaves out."""
    measured, left_out = [], []
    for evaluation in files.evaluations():
        name = evaluation.path.name
        with _named(evaluation.settings):
            if not evaluation.result.is_file():  # not yet
                continue
            if (why := _of_another(evaluation, files)) is not None:
                left_out.append(why.format(name))
                continue
            known, is_first = compared_with(evaluation), evaluation.path == files.evaluation.path
            gold = {} if known.get(OTHER_ROWS) else _gold_leaks(evaluation, known)
            stages = _read_evaluation(evaluation, known)
            measured.append(one := _Evaluated(evaluation, is_first, known, stages, gold))
        if not is_first and not one.is_of_run_rows:  # of the first one its own note says so
            left_out.append(OF_OTHER_ROWS.format(name))
    if alone := [one.tested.name for one in measured if not one.is_first and one.is_of_run_rows]:
        left_out.append(LEAK_TESTS_ALONE.format(" and ".join(alone)))
    return measured, left_out


def _of_another(evaluation: EvaluationFiles, files: RunFiles) -> str | None:
    """Why an evaluation is none of the run's, if so: it is of another adapter, as after a run that was continued, or,
    as far as that is known, of the adapter on another model than the run trained."""
    if files.weights.is_file() and not (evaluation.settings.is_file() and is_of_adapter(evaluation, files.weights)):
        return OF_ANOTHER_ADAPTER
    if evaluation.settings.is_file() and base_of(evaluation).is_other_than(base_of_run(files.path)):
        return OF_ANOTHER_BASE
    return None


def _read_evaluation(evaluation: EvaluationFiles, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage -> the content of evaluation.json, and of --before as far as it can be compared. known: the settings."""
    contents = {}
    if (before := known.get("before")) and (file := expanded(before)).is_file():
        contents["before"] = dict(Earlier.of(known, _load_evaluation(file)).content)
    return {**contents, AFTER: _load_evaluation(evaluation.result)}


def _load_evaluation(file: Path) -> dict[str, Any]:
    with _named(file):
        content = load_json(file)
        check_record(content, {"notes": list[str]}, optional=["notes"])
        leak_sections({"after": leak_results(content.get("leaks") or {})})
        evaluation_figures({"after": content})
    return cast(dict[str, Any], content)


def _gold_leaks(evaluation: EvaluationFiles, known: Mapping[str, Any]) -> LeakResults:
    """What the leak tests gave of the model that the evaluation compared with, if it did."""
    gold = Gold.of(known)
    with _named(Path(gold.log or evaluation.settings)):
        leak_sections({"gold": gold.leaks})
    return gold.leaks


def _no_longer_there(known: Mapping[str, Any]) -> list[str]:
    """A sentence for each file that the evaluation was compared with and that the report does without."""
    return [
        f"The evaluation was compared with --{name.replace('_', '-')} '{path}', which is no longer there: its figures "
        "are left out."
        for name in COMPARED
        if (path := known.get(name)) and not expanded(path).is_file()
    ]


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with None for a number that JSON cannot hold."""
    return {key: _finite(value) if isinstance(value, Mapping) else finite(value) for key, value in figures.items()}


def _read_stopping(files: RunFiles) -> list[str]:
    """What ended a run under --stop-when, and the step whose adapter was kept, as a rule not the last."""
    if not files.stopping.is_file():
        return []
    stopping = load_json(files.stopping)
    check_record(stopping, {"sentence": str})
    return [stopping["sentence"]]


def _notes(metrics: list[Metrics], audit: Audit | None) -> list[str]:
    notes = []
    if broken := sum(any(value is None for value in line.values()) for line in metrics):
        notes.append(f"At {broken} of {len(metrics)} logged steps a loss was not a finite number.")
    if audit is None:
        notes.append("This run has no audit record: it was made by a version of lowmem-npo that wrote none.")
        return notes
    if audit["adapter"] is None:
        notes.append("The run has not reached its end: there is no finished adapter.")
    if general := general_words(audit["data"].get("retain", {}).get("source") or ""):
        notes.append(
            f"No retain set was given; what was protected is {general}. What the model knew beside the forget rows was "
            "held only as far as these hold it."
        )
    if (sessions := len(audit["sessions"])) > 1:
        notes.append(f"The run was resumed: it took {sessions} sessions.")
    return notes


def _errors_of_change(evaluations: Mapping[str, Mapping[str, AnswerEvaluation]]) -> dict[str, dict[str, float]]:
    """Set -> measure -> the standard error of its change."""
    before, after = (evaluations.get(stage, {}) for stage in ("before", "after"))
    return {name: of_set.errors_of_change(before[name]) for name, of_set in after.items() if name in before}


def _survival(row: Mapping[str, AnswerRecord]) -> tuple[float, ...]:
    return (-row["after"].rouge_l_recall, -row["after"].probability)


def _damage(row: Mapping[str, AnswerRecord]) -> tuple[float, ...]:
    before, after = row["before"], row["after"]
    return (after.rouge_l_recall - before.rouge_l_recall, before.nll - after.nll)
