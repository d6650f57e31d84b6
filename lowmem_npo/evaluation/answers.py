"""What a model answers: four numbers per row and per set, the same before and after unlearning.

    nll             mean negative log-likelihood per answer token, in nats, the end-of-sequence token included
    probability     exp(-nll) of the row: TOFU's length-normalised probability of the answer
    rouge_l_recall  how much of the answer is in the greedy answer, in order (stemmed words)
    exact_match     whether the greedy answer is the answer, but for surrounding white space

The greedy answer continues the very prompt ids of the training row. A row of plain text has no prompt: its likelihood
is that of the whole text, and its greedy answer is what the model makes of the first half of its tokens, compared with
the second half.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.config import OutputConfig
from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers, text_of
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.files import write_atomically

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class AnswerRecord:
    """One row: its prompt, its true answer (reference), the greedy answer. `row` is its place in its data set."""

    row: int
    prompt: str
    reference: str
    answer: str
    tokens: int
    nll: float
    probability: float
    rouge_l_recall: float
    exact_match: bool


@dataclass(frozen=True)
class AnswerSummary:
    """A set in one line. `nll` is a mean over answer tokens, the other figures are means over rows."""

    rows: int
    rows_in_set: int
    tokens: int
    nll: float
    probability: float
    rouge_l_recall: float
    exact_match: float

    @classmethod
    def of(cls, records: Sequence[AnswerRecord], rows_in_set: int) -> AnswerSummary:
        tokens = sum(record.tokens for record in records)
        return cls(
            rows=len(records),
            rows_in_set=rows_in_set,
            tokens=tokens,
            nll=sum(record.nll * record.tokens for record in records) / tokens,
            probability=fmean(record.probability for record in records),
            rouge_l_recall=fmean(record.rouge_l_recall for record in records),
            exact_match=fmean(record.exact_match for record in records),
        )


@dataclass(frozen=True)
class AnswerEvaluation:
    """A set, measured: in one line, and row by row."""

    summary: AnswerSummary
    records: list[AnswerRecord]


Evaluations = dict[str, AnswerEvaluation]
"""Set ("forget", "retain") -> what its answers are."""


def summaries(evaluations: Mapping[str, AnswerEvaluation]) -> dict[str, AnswerSummary]:
    """Each set in one line."""
    return {name: evaluation.summary for name, evaluation in evaluations.items()}


def save_answers(path: Path, evaluations: Mapping[str, AnswerEvaluation]) -> None:
    """before.json and its like: every set with its summary and its rows."""
    content = {name: asdict(evaluation) for name, evaluation in evaluations.items()}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_answers(path: Path, eval_rows: int | None = None) -> Evaluations:
    """The inverse of `save_answers`; empty where there is no such file, or where not `eval_rows` rows were measured."""
    if not path.exists():
        return {}
    evaluations = {
        name: AnswerEvaluation(AnswerSummary(**e["summary"]), [AnswerRecord(**r) for r in e["records"]])
        for name, e in json.loads(path.read_text(encoding="utf-8")).items()
    }
    complete = eval_rows is None or all(
        s.rows == min(eval_rows, s.rows_in_set) for s in summaries(evaluations).values()
    )
    return evaluations if complete else {}


def evaluate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    *,
    name: str = "answers",
    limit: int | None = OutputConfig.eval_rows,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> AnswerEvaluation:
    """Score the answers of `rows`, or of `limit` rows drawn from them by `seed` (None: all).

    Greedy answers, and the references they are compared with, are cut at `max_new_tokens`. `name` labels the progress
    bar; `batch_size` rows go through the model together. The model, with or without adapters, is returned in the mode
    it came in. Raises ValueError where there is no row to score.
    """
    if not rows or limit == 0:
        raise ValueError("there is no row to score")
    chosen = choose_rows(len(rows), limit, seed)
    picked = [rows[i] for i in chosen]
    questions = [question(row) for row in picked]
    likelihoods = answer_likelihoods(
        model, picked, batch_size=batch_size, description=f"{name}: likelihood", progress=progress
    )
    # As many tokens as the answer with its EOS: enough to see whether the model stops where the answer does.
    prompts = [Prompt(prompt, min(len(answer), max_new_tokens)) for prompt, answer in questions]
    answers = greedy_answers(
        model, tokenizer, prompts, batch_size=batch_size, description=f"{name}: greedy answers", progress=progress
    )

    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    records = []
    for row, (prompt, reference_ids), likelihood, answer_ids in zip(
        chosen, questions, likelihoods, answers, strict=True
    ):
        reference = text_of(tokenizer, reference_ids[:max_new_tokens]).strip()
        answer = text_of(tokenizer, answer_ids).strip()
        records.append(
            AnswerRecord(
                row=row,
                prompt=text_of(tokenizer, prompt),
                reference=reference,
                answer=answer,
                tokens=likelihood.tokens,
                nll=likelihood.nll,
                probability=likelihood.probability,
                rouge_l_recall=rouge.score(reference, answer)["rougeL"].recall,
                exact_match=answer == reference,
            )
        )
    return AnswerEvaluation(AnswerSummary.of(records, rows_in_set=len(rows)), records)


def choose_rows(total: int, limit: int | None, seed: int) -> list[int]:
    """Which rows are scored: all, or `limit` of them, the same ones for the same seed, in the order of the set."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(random.Random(seed).sample(range(total), limit))


def question(row: TokenizedRow) -> tuple[list[int], list[int]]:
    """The prompt and the true answer of a row, as ids."""
    ids = row["input_ids"]
    start = row["prompt_length"] or max(1, len(ids) // 2)
    return ids[:start], ids[start:]
