"""Every figure of a report under one form: its value at each stage, what is wished for, and what it means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_npo.evaluation.benchmarks.lume import KNOWLEDGE, MMLU_SHARE, REGURGITATION
from lowmem_npo.evaluation.benchmarks.tofu import FORGET, REAL_AUTHORS, RETAIN, WORLD_FACTS
from lowmem_npo.report.table import MEASURES, Stages


@dataclass(frozen=True)
class Figure:
    """One line of a report.

    group: which measurement it belongs to. set: of which rows, or None. key: its name in the file it comes from.
    values: stage -> value; None where it was not measured or is no finite number.
    """

    group: str
    set: str | None
    key: str
    title: str
    values: dict[str, float | None]
    wished: str
    meaning: str


ANSWERS, LUME, MEMBERSHIP, TOFU, LM_EVAL = "answers", "LUME", "membership", "TOFU", "lm-eval"

# (set, field of AnswerSummary) -> what it means
ANSWER_MEANINGS = {
    ("forget", "nll"): "How unlikely each token of the true answers is to the model, in nats; 0 is certainty. Higher "
    "is forgotten. Far higher than for a model that never saw the rows is not better: it marks what was removed.",
    ("forget", "probability"): "The geometric mean of an answer's token probabilities, averaged over answers. Near "
    "0 is forgotten; near the value before, the answers are still there even if they are not said.",
    ("forget", "rouge_l_recall"): "How much of the true answer the model's own answer contains, in order. Lower is "
    "forgotten, but hardly 0: answers to the same question share words by chance.",
    ("forget", "exact_match"): "Share of answers the model gives word for word. 0 is forgotten.",
    ("retain", "nll"): "The same for rows that must be kept. It should stay where it was; a rise is damage.",
    ("retain", "probability"): "Should stay where it was; a fall means that answers to be kept have become less sure.",
    ("retain", "rouge_l_recall"): "Should stay where it was; a fall means that answers to be kept have changed.",
    ("retain", "exact_match"): "Should stay where it was; a fall means that answers to be kept were lost.",
}
OTHER_SET = "The same measure on further rows."

LUME_MEANINGS = {
    ("forget", REGURGITATION): "How much of the text to be forgotten the model still writes (ROUGE-L recall). Lower is "
    "better.",
    ("forget", KNOWLEDGE): "Share of questions about it that the model still answers exactly. Lower is better.",
    ("retain", REGURGITATION): "How much of the text to be kept it writes. As before is good, a fall is damage.",
    ("retain", KNOWLEDGE): "Share of questions about it that it answers exactly. As before is good, a fall is damage.",
}
LUME_TOTALS = {
    "harmonic-mean-task-aggregate": ("task aggregate", "higher", "Harmonic mean of forgetting and keeping over tasks "
    "and kinds; 1 is best, and 0 if a single one of the twelve is 0."),
    "mia_loss_acc": ("membership AUC", "0.5", "How well the loss tells taught documents from others: 0.5 is a coin, "
    "above it they are remembered, far below it they are conspicuous."),
    "mia_final_score": ("membership score", "higher", "1 - 2 |AUC - 0.5|: 1 where the loss betrays no member."),
    "mmlu_average": ("MMLU", "as before", "Accuracy on MMLU, for damage beyond the data; the challenge ranks no model "
    f"below {MMLU_SHARE:.0%} of what it was before."),
    "aggregate-score": ("final score", "higher", "Mean of task aggregate, membership score and MMLU."),
}  # fmt: skip

TOFU_MEANINGS = {
    "probability": ("probability", "of the true answers (on real authors and world facts: among wrong ones)"),
    "rouge_l_recall": ("ROUGE-L recall", "of the true answers in what the model says"),
    "truth_ratio": ("truth ratio", "1 on forget: the truth is no likelier than wrong answers; near 1 elsewhere: it is"),
}


def answer_figures(stages: Stages, group: str = ANSWERS) -> list[Figure]:
    """The before/after table, a figure per set and measure."""
    first = next(iter(stages.values()), {})
    return [
        Figure(
            group,
            part,
            measure.field,
            measure.title,
            {stage: finite(getattr(sets[part], measure.field)) for stage, sets in stages.items() if part in sets},
            measure.wish(part, stages),
            ANSWER_MEANINGS.get((part, measure.field), OTHER_SET),
        )
        for part in first
        for measure in MEASURES
    ]


def evaluation_figures(contents: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """LUME, membership, TOFU and lm-eval. contents: stage -> the content of that stage's evaluation.json."""
    return [*_lume(contents), *_membership(contents), *_tofu(contents), *_lm_eval(contents)]


def _lume(contents: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    now = _last(contents, "lume")
    if not now:
        return []
    found = []
    for part, wished in (("forget", "lower"), ("retain", "as before")):
        tasks = [name for name in now[f"{part}-set"] if not name.startswith("overall-")]
        for kind, title in ((REGURGITATION, "regurgitation"), (KNOWLEDGE, "knowledge")):
            paths = {"all tasks": (f"overall-{kind}",), **{task: (task, kind) for task in tasks}}
            for task, path in paths.items():
                values = _values(contents, ("lume", f"{part}-set", *path))
                meaning = LUME_MEANINGS[part, kind] if task == "all tasks" else "The same, for one task."
                found.append(Figure(LUME, part, ".".join(path), f"{title}, {task}", values, wished, meaning))
    for key, (title, wished, meaning) in LUME_TOTALS.items():
        found.append(Figure(LUME, None, key, title, _values(contents, ("lume", key)), wished, meaning))
    return found


def _membership(contents: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    if not _last(contents, "membership"):
        return []
    title, wished, meaning = LUME_TOTALS["mia_loss_acc"]
    return [Figure(MEMBERSHIP, None, "auc", title, _values(contents, ("membership", "auc")), wished, meaning)]


def _tofu(contents: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    now = _last(contents, "tofu")
    if not now:
        return []
    found = []
    for part in (FORGET, RETAIN, REAL_AUTHORS, WORLD_FACTS):
        for key, (title, meaning) in TOFU_MEANINGS.items() if part in now["sets"] else ():
            wished = "higher" if part != FORGET else "as never taught" if key == "truth_ratio" else "lower"
            outcome = {"lower": " Lower is forgotten.", "higher": " A fall is damage."}.get(wished, "")
            sentence = f"{title[0].upper()}{title[1:]}: {meaning}.{outcome}"
            values = _values(contents, ("tofu", "sets", part, key))
            found.append(Figure(TOFU, part, key, title, values, wished, sentence))
    totals = {
        "model_utility": ("model utility", "higher", "Harmonic mean of the nine scores on what is to be kept; a fall "
        "is damage."),
        "forget_quality": ("forget quality", "above 0.05", "p-value of a test that tells this model from one never "
        "taught the rows; above 0.05 it cannot."),
    }  # fmt: skip
    for key, (title, wished, meaning) in totals.items():
        found.append(Figure(TOFU, None, key, title, _values(contents, ("tofu", key)), wished, meaning))
    return found


def _lm_eval(contents: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    meaning = "lm-eval's own measure of the task; a fall is damage beyond the data."
    return [
        Figure(LM_EVAL, task, metric, f"{task}, {metric}", _values(contents, ("lm_eval", task, metric)), "as before",
               meaning)
        for task, metrics in (_last(contents, "lm_eval") or {}).items()
        for metric in metrics
    ]  # fmt: skip


def finite(value: Any) -> float | None:
    """`value` if it is a number that JSON can hold, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def shown(value: float | None) -> str:
    """A figure for people: three decimals, or two digits and a power of ten where those would show nothing."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def _last(contents: Mapping[str, Mapping[str, Any]], key: str) -> Any:
    return list(contents.values())[-1].get(key) if contents else None


def _values(contents: Mapping[str, Mapping[str, Any]], path: Sequence[str]) -> dict[str, float | None]:
    found = {}
    for stage, content in contents.items():
        value: Any = content
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found[stage] = finite(value)
    return found
