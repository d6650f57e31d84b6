"""The scores of SemEval-2025 Task 4 (unlearning) on LUME rows, as its official `evaluate_generations.py` computes them.

A LUME row has an `id`, an `input`, an `output` and a `task`. Ids ending in `sc1` are completions, scored for
regurgitation: ROUGE-L recall of the output in the greedy continuation, words stemmed. Ids ending in `qa0` to `qa4` are
questions, scored for knowledge: whether the whole continuation is the output, but for case and surrounding space.

    task aggregate  harmonic mean of 12 means: 3 tasks x 2 kinds, 1 - mean on forget, mean on retain; 0 if any is 0
    MIA score       1 - 2 |AUC - 0.5|
    final score     mean of task aggregate, MIA score and MMLU accuracy; missing while one of them is

Ramakrishna et al. 2025, https://arxiv.org/abs/2504.02883 (task) and https://arxiv.org/abs/2502.15097 (data). Two
differences from the script: a score that cannot be computed is None (the script writes -1 or NaN), and an empty
generation counts as empty (the script reads it back from CSV as the text "nan").
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

from lowmem_npo.data import Encoder, Rows, to_examples
from lowmem_npo.data.cells import label, without_nan
from lowmem_npo.evaluation.answer_table import FORGET, RETAIN
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Measured, Selection
from lowmem_npo.evaluation.benchmarks.documents import AUC_MEANING, DOCUMENTS
from lowmem_npo.evaluation.benchmarks.lm_eval import LM_EVAL, MMLU_SHARE, mmlu_accuracy
from lowmem_npo.evaluation.figures import Figure, at
from lowmem_npo.evaluation.rouge import rouge_l
from lowmem_npo.evaluation.wording import other_scripts
from lowmem_npo.files import write_json
from lowmem_npo.run_directory import EvaluationFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_npo.evaluation.scoring.scorer import Scorer

TASKS = ("Task1", "Task2", "Task3")
REGURGITATION, KNOWLEDGE = "regurgitation-score", "knowledge-score"
KINDS = {"sc": REGURGITATION, "qa": KNOWLEDGE}
MAX_NEW_TOKENS = 256

WISHES = {FORGET: "lower", RETAIN: "as before"}
MEANINGS = {
    (FORGET, REGURGITATION): "How much of the text to be forgotten the model still writes (ROUGE-L recall). Lower is "
    "better.",
    (FORGET, KNOWLEDGE): "Share of questions about it that the model still answers exactly. Lower is better.",
    (RETAIN, REGURGITATION): "How much of the text to be kept it writes. As before is good, a fall is damage.",
    (RETAIN, KNOWLEDGE): "Share of questions about it that it answers exactly. As before is good, a fall is damage.",
}
# key in the official result file -> title, wish, meaning, what would measure it
TOTALS = {
    "harmonic-mean-task-aggregate": ("task aggregate", "higher", "Harmonic mean of forgetting and keeping over tasks "
    "and kinds; 1 is best, and 0 if a single one of the twelve is 0.", "needs rows of every task and kind"),
    "mia_loss_acc": ("document membership AUC", "0.5", AUC_MEANING, "needs --members"),
    "mia_final_score": ("membership score", "higher", "1 - 2 |AUC - 0.5|: 1 where the loss betrays no member.",
    "needs --members"),
    "mmlu_average": ("MMLU", "as before", "Accuracy on MMLU, for damage beyond the data; the challenge ranks no model "
    f"below {MMLU_SHARE:.0%} of what it was before.", "needs --lm-eval mmlu"),
    "aggregate-score": ("final score", "higher", "Mean of task aggregate, membership score and MMLU.",
    "needs all three"),
}  # fmt: skip


@dataclass(frozen=True)
class LumeRow:
    """A row that LUME scores. `row` is its place in its file, `kind` one of REGURGITATION and KNOWLEDGE."""

    row: int
    id: str
    task: str
    kind: str
    input: str
    output: str


@dataclass(frozen=True)
class LumeAnswer:
    """A row, what the model made of it, its score (ROUGE-L recall, or 0 and 1), and the ids that it wrote."""

    row: LumeRow
    generation: str
    score: float
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class LumeScores:
    """Everything the official result file holds. None: not measured, or not to be had from these rows."""

    forget: dict[str, Any]
    retain: dict[str, Any]
    terms: list[float] | None
    missing: list[str]  # why there are no terms, in words
    task_aggregate: float | None
    mia_auc: float | None
    mmlu: float | None

    @property
    def mia_score(self) -> float | None:
        return None if self.mia_auc is None else 1 - 2 * abs(self.mia_auc - 0.5)

    @property
    def final(self) -> float | None:
        parts = [part for part in (self.task_aggregate, self.mia_score, self.mmlu) if part is not None]
        return fmean(parts) if len(parts) == 3 else None

    def official(self) -> dict[str, Any]:
        """Under the keys of the official result file, whose order is kept; what was not measured is null."""
        return {
            "forget-set": self.forget,
            "retain-set": self.retain,
            "mia_loss_acc": self.mia_auc,
            "mmlu_average": self.mmlu,
            "aggregated-terms": self.terms,
            "harmonic-mean-task-aggregate": self.task_aggregate,
            "mia_final_score": self.mia_score,
            "aggregate-score": self.final,
        }


class Lume(Benchmark[LumeAnswer, LumeScores]):
    name = "lume"
    group = "LUME"
    title = "LUME, SemEval-2025 Task 4"
    summary = (
        "LUME rows (id, input, output, task) get the scores of SemEval-2025 Task 4 (ROUGE-L for Latin script only)"
    )
    note = (
        "Scored as the challenge's official script does, from greedy generations. Its ROUGE-L knows only a-z and 0-9, "
        "and cannot judge other scripts."
    )
    sets = (FORGET, RETAIN)
    takes_in = DOCUMENTS.sets

    def select(self, name: str, rows: Rows, context: Context) -> Selection | None:
        lume = lume_rows(rows)
        if not lume:
            return None
        if left_out := len(rows) - len(lume):
            context.notes.append(f"{name}: {left_out} rows without a LUME id (…sc1, …qa0) are left out.")
        chosen = choose_lume_rows(lume, context.config.limit, context.config.seed)
        for row, prompt in zip(chosen, _prompts(chosen, context.tokenizer), strict=True):
            context.check(rows.where(row.row), prompt, whole=True)
        passages = [row.output for row in chosen if row.kind == REGURGITATION]
        context.notes += other_scripts(name, passages, "LUME's regurgitation score")
        return Selection(chosen, len(lume))

    def written(self, name: str, selection: Selection, context: Context) -> list[tuple[int, int]]:
        return [(len(prompt), MAX_NEW_TOKENS) for prompt in _prompts(selection.rows, context.tokenizer)]

    def measure(self, name: str, selection: Selection, scorer: Scorer, context: Context) -> list[LumeAnswer]:
        prompts = _prompts(selection.rows, scorer.tokenizer)
        written = scorer.continuations(f"{name}: LUME generations", prompts, MAX_NEW_TOKENS)
        # transformers 4, with which the official scores were made, cleans spaces up when decoding; 5 leaves it to us.
        answers = score_generations(selection.rows, [scorer.tokenizer.clean_up_tokenization(w.text) for w in written])
        return [replace(answer, ids=ids) for answer, (ids, _) in zip(answers, written, strict=True)]

    def score(self, measured: Measured, context: Context) -> LumeScores | None:
        answers = self.own(measured)
        if not answers:
            return None
        membership = DOCUMENTS.membership(measured, context.groups)
        scores = lume_scores(
            answers.get(FORGET, []),
            answers.get(RETAIN, []),
            mia_auc=membership.auc if membership else None,
            mmlu=mmlu_accuracy(LM_EVAL.results(measured)),
        )
        if scores.missing:
            context.notes.append(f"No LUME task aggregate: {'; '.join(scores.missing)}.")
        return scores

    def to_json(self, scores: LumeScores) -> dict[str, Any]:
        return scores.official()

    def said(
        self, selection: Selection, measured: Sequence[LumeAnswer], context: Context
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        prompts = _prompts(selection.rows, context.tokenizer)
        return [(prompt, a.ids) for prompt, a in zip(prompts, measured, strict=True)]

    def rows_to_json(self, name: str, measured: Sequence[LumeAnswer]) -> list[dict[str, Any]]:
        return [{**asdict(a.row), "generation": a.generation, "score": a.score} for a in measured]

    def figures(self, content: Mapping[str, Any]) -> list[Figure]:
        self.refuse_unknown(content, [*TOTALS, *(f"{part}-set" for part in WISHES), "aggregated-terms"])
        lines = []
        for part, wish in WISHES.items():
            block = content[f"{part}-set"]
            for kind in KINDS.values():
                title, meaning = kind.removesuffix("-score"), MEANINGS[part, kind]
                overall = f"overall-{kind}"
                lines.append(Figure(part, overall, f"{title}, all tasks", at(block, overall), wish, meaning))
                for task in (name for name in block if not name.startswith("overall-")):
                    value = at(block, task, kind)
                    lines.append(
                        Figure(part, f"{task}.{kind}", f"{title}, {task}", value, wish, "The same, for one task.")
                    )
        totals = [Figure(None, key, title, at(content, key), *rest) for key, (title, *rest) in TOTALS.items()]
        return lines + totals

    def save(self, scores: LumeScores, files: EvaluationFiles) -> None:
        write_json(files.official, scores.official(), indent=None)


LUME = Lume()


def lume_rows(rows: Rows) -> list[LumeRow]:
    """The rows that LUME scores; empty where not every id is one of LUME's, or there are no tasks to tell. Raises
    UserError for a row that cannot be read."""
    if not {"id", "input", "output"} <= set(rows.columns):
        return []
    scored = []
    for index, example in enumerate(to_examples(rows, prompt_column="input", answer_column="output")):
        if example.id and (match := re.search(r"(sc|qa).$", example.id)):
            task = label(without_nan(rows.rows[index]).get("task")) or "(no task)"
            kind = KINDS[match[1]]
            scored.append(LumeRow(index, example.id, task, kind, example.prompt or "", example.answer))
    return scored if "task" in rows.columns or len(scored) == len(rows.rows) else []


def _prompts(rows: Sequence[LumeRow], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """LUME's prompts as ids: always as they are, without a template."""
    encoder = Encoder(tokenizer)
    return [encoder.text_ids(row.input, whole=False) for row in rows]


def choose_lume_rows(rows: Sequence[LumeRow], limit: int | None, seed: int) -> list[LumeRow]:
    """`limit` rows (None: all), equally many of every task and kind, so that few rows still give all 12 means."""
    if limit is None or limit >= len(rows):
        return list(rows)
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    groups: dict[tuple[str, str], int] = {}
    turns = []
    for row in shuffled:
        turn = groups[row.task, row.kind] = groups.get((row.task, row.kind), -1) + 1
        turns.append((turn, row.task, row.kind, row))
    chosen = sorted(turns, key=lambda item: item[:3])[:limit]
    return sorted((item[3] for item in chosen), key=lambda row: row.row)


def score_generations(rows: Sequence[LumeRow], generations: Sequence[str]) -> list[LumeAnswer]:
    """Each row with its score. A generation is what follows the input, special tokens skipped."""
    answers = []
    for row, text in zip(rows, generations, strict=True):
        if row.kind == REGURGITATION:
            score = rouge_l(row.output, text).recall
        else:
            score = float(row.output.strip().lower() == text.strip().lower())
        answers.append(LumeAnswer(row, text, score))
    return answers


def lume_scores(
    forget: Sequence[LumeAnswer],
    retain: Sequence[LumeAnswer],
    *,
    mia_auc: float | None = None,
    mmlu: float | None = None,
) -> LumeScores:
    """The scores of both sets. Without rows of every task and kind, or with tasks other than LUME's, no aggregate."""
    of_forget, of_retain = _set_means(forget), _set_means(retain)
    missing = [*_missing("forget", of_forget), *_missing("retain", of_retain)]
    terms = None
    if not missing:
        cells = [(task, kind) for task in TASKS for kind in KINDS.values()]
        terms = [1 - of_forget[task][kind] for task, kind in cells] + [of_retain[task][kind] for task, kind in cells]
    aggregate = None if terms is None else float(harmonic_mean(terms))
    return LumeScores(of_forget, of_retain, terms, missing, aggregate, mia_auc, mmlu)


def _missing(name: str, means: dict[str, Any]) -> list[str]:
    """What keeps this set from an aggregate, in words."""
    unknown = [task for task in means if task not in TASKS and not task.startswith("overall-")]
    reasons = [f"{name} has rows of {', '.join(unknown)}, which LUME does not know"] if unknown else []
    for task in TASKS:
        kinds = [kind for kind in KINDS.values() if means.get(task, {}).get(kind) is None]
        if kinds:
            reasons.append(f"{name} has no {task} row for the {' or '.join(kinds)}")
    return reasons


def _set_means(answers: Sequence[LumeAnswer]) -> dict[str, Any]:
    """The official block of one set: overall means over rows, then per task, in the order of their names."""
    block: dict[str, Any] = {
        f"overall-{kind}": _mean([a.score for a in answers if a.row.kind == kind]) for kind in KINDS.values()
    }
    for task in sorted({answer.row.task for answer in answers}):
        block[task] = {
            kind: _mean([a.score for a in answers if (a.row.task, a.row.kind) == (task, kind)])
            for kind in KINDS.values()
        }
    return block


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
