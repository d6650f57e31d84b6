"""What a model answers: five numbers per row and per set, the same before and after unlearning.

    nll             mean negative log-likelihood per answer token, in nats, the end-of-sequence token included
    probability     exp(-nll) of the row: TOFU's length-normalised probability of the answer
    rouge_l_recall  how much of the true answer is anywhere in the greedy answer, in order
    appears         whether the greedy answer has the true answer in one piece, but for case and punctuation
    exact_match     whether the greedy answer is the true answer, but for surrounding white space

The greedy answer continues the very prompt ids of the training row, for as long as the model likes: until it ends the
answer by itself, or to `answer_length`, since what it knows may come after a sentence of introduction. A row of plain
text has no prompt: its likelihood is that of the whole text, and its greedy answer is what the model makes of the first
half of its tokens, compared with the second half.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lowmem_npo.config import OutputConfig
from lowmem_npo.data import TokenizedRow
from lowmem_npo.data.words import appears
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE
from lowmem_npo.evaluation.wording import begins, rouge_l_recall
from lowmem_npo.files import load_json, write_json
from lowmem_npo.ranges import Count, Share
from lowmem_npo.records import record_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class NotGenerated(UserError):
    """What only an answer that the model writes would show, where it is not to write any."""


MIN_NEW_TOKENS, MAX_NEW_TOKENS = 64, 256
MARGIN = 16  # tokens beyond the longest true answer


@dataclass(frozen=True)
class AnswerRecord:
    """One row: its prompt, its true answer (reference), the greedy answer. `row` is its place in its data set, `cut`
    whether the true one is longer than its row or an answer could be, so that the reference is only its beginning,
    `ids` what the model wrote, special tokens and the white space around the answer among it; none of a record that was
    saved."""

    row: int
    prompt: str
    reference: str
    answer: str
    tokens: Count
    nll: float
    probability: float
    rouge_l_recall: float
    exact_match: bool
    appears: bool
    cut: bool = False
    ids: Sequence[int] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """As files hold it, which people read."""
        return {name: value for name, value in asdict(self).items() if name != "ids"}


def compared(reference: str, answer: str) -> dict[str, Any]:
    """The figures of an `AnswerRecord` that come from its texts, both without white space around them."""
    return {
        "rouge_l_recall": rouge_l_recall(reference, answer),
        "exact_match": bool(reference) and answer == reference,
        "appears": appears(reference, answer),
    }


@dataclass(frozen=True)
class AnswerSummary:
    """A set in one line. `nll` is a mean over answer tokens, the other figures are means over rows.

    max_new_tokens: how many an answer could have. passages: how many of the rows are texts that the model goes on with;
    the others ask for something. generated: whether the model wrote the answers; else they were read off the
    likelihoods (`lowmem_npo.evaluation.scoring.forced`). cut: rows of whose true answers only the beginning was
    compared.
    """

    rows: Count
    rows_in_set: Count
    tokens: Count
    nll: float
    probability: float
    rouge_l_recall: Share
    exact_match: Share
    appears: Share
    max_new_tokens: Count
    passages: int = 0
    generated: bool = True
    cut: int = 0

    @classmethod
    def of(
        cls,
        records: Sequence[AnswerRecord],
        rows_in_set: int,
        max_new_tokens: int,
        passages: int = 0,
        generated: bool = True,
    ) -> AnswerSummary:
        tokens = sum(record.tokens for record in records)
        return cls(
            rows=len(records),
            rows_in_set=rows_in_set,
            tokens=tokens,
            nll=sum(record.nll * record.tokens for record in records) / tokens,
            probability=fmean(record.probability for record in records),
            rouge_l_recall=fmean(record.rouge_l_recall for record in records),
            exact_match=fmean(record.exact_match for record in records),
            appears=fmean(record.appears for record in records),
            max_new_tokens=max_new_tokens,
            passages=passages,
            generated=generated,
            cut=sum(record.cut for record in records),
        )


@dataclass(frozen=True)
class AnswerEvaluation:
    """A set, measured: in one line, and row by row."""

    summary: AnswerSummary
    records: list[AnswerRecord]

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> AnswerEvaluation:
        """The inverse of `asdict`."""
        records = [record_of(AnswerRecord, record) for record in content["records"]]
        return cls(record_of(AnswerSummary, content["summary"]), records)

    def errors_of_change(self, before: AnswerEvaluation) -> dict[str, float]:
        """Measure -> the standard error of its mean change since `before`, over the rows of both; none of fewer than
        two rows."""
        earlier = {record.row: record for record in before.records}
        pairs = [(earlier[record.row], record) for record in self.records if record.row in earlier]
        if len(pairs) < 2:
            return {}

        # By hand: `statistics` takes no NaN, which a diverged model gives, and `**` no figure near the largest float.
        def error(measure: str) -> float:
            changes = [getattr(now, measure) - getattr(was, measure) for was, now in pairs]
            weights = [now.tokens if measure == "nll" else 1 for _, now in pairs]  # as in the summary
            weighted, total = list(zip(weights, changes, strict=True)), sum(weights)
            mean = sum(weight * change for weight, change in weighted) / total
            # By how much the mean moves without each of the rows (the jackknife): without a long answer, by much.
            moves = [weight / (total - weight) * (change - mean) for weight, change in weighted]
            return (sum(move * move for move in moves) * (len(pairs) - 1) / len(pairs)) ** 0.5

        return {measure: error(measure) for measure in ("rouge_l_recall", "probability", "appears", "nll")}

    def placed(self, places: Sequence[int], rows_in_set: int) -> AnswerEvaluation:
        """The same of rows that are at `places` of a larger set."""
        records = [replace(record, row=place) for record, place in zip(self.records, places, strict=True)]
        return AnswerEvaluation(replace(self.summary, rows_in_set=rows_in_set), records)


Evaluations = dict[str, AnswerEvaluation]
"""Set ("forget", "retain", or "forget, plain": in another form) -> what its answers are."""


def summaries(evaluations: Mapping[str, AnswerEvaluation]) -> dict[str, AnswerSummary]:
    """Each set in one line."""
    return {name: evaluation.summary for name, evaluation in evaluations.items()}


def in_sentences_of_its_own(evaluations: Mapping[str, AnswerEvaluation]) -> str | None:
    """A remark if the model says most of the forget answers that it knows after words of its own, as an instruct model
    asked for a capital says "The capital of France is Paris": making "Paris" unlikely as the whole answer leaves that,
    unless another row has the sentence.

    evaluations: of the model before it forgets.
    """
    records = evaluations["forget"].records if "forget" in evaluations else []
    known, references = [record for record in records if record.appears], dict[str, list[str]]()
    for record in records:
        references.setdefault(record.prompt, []).append(record.reference)
    own = sum(not any(begins(one, record.answer) for one in references[record.prompt]) for record in known)
    if 2 * own <= len(known):
        return None
    return (
        f"The model says {own} of {len(records)} forget answers in sentences of its own, which forgetting these rows "
        "may leave as they are: add rows with those sentences, which `lowmem-npo ask MODEL --file FILE --json` writes."
    )


def save_answers(path: Path, evaluations: Mapping[str, AnswerEvaluation]) -> None:
    """before.json and its like: every set with its summary and its rows."""
    content = {
        name: {"summary": asdict(of_set.summary), "records": [record.to_json() for record in of_set.records]}
        for name, of_set in evaluations.items()
    }
    write_json(path, content, ensure_ascii=False, private=True)


def read_answers(path: Path, output: OutputConfig | None = None) -> Evaluations:
    """The inverse of `save_answers`; empty where there is no such file, or where it was not measured as `output` says:
    on as many rows, with answers as long; or, then, where it is damaged."""
    if not path.exists():
        return {}
    try:
        content = load_json(path)
        evaluations = {name: AnswerEvaluation.read(evaluation) for name, evaluation in content.items()}
    except (ValueError, TypeError, AttributeError, KeyError):
        if output is None:
            raise
        return {}
    if output is None or all(_measured_as(output, name, e.summary) for name, e in evaluations.items()):
        return evaluations
    return {}


def _measured_as(output: OutputConfig, name: str, summary: AnswerSummary) -> bool:
    whole = part_of(name) != name or summary.rows == min(output.eval_rows, summary.rows_in_set)
    whole = whole and summary.generated == output.lets_write
    return whole and output.max_new_tokens in (None, summary.max_new_tokens)


def part_of(name: str) -> str:
    """The set whose rows are asked: "forget" of "forget, plain", which asks them in another form."""
    return name.partition(", ")[0]


def evaluate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    *,
    name: str = "answers",
    max_new_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    passages: int = 0,
    generate: bool = True,
) -> AnswerEvaluation:
    """Score the answers of `rows`.

    Greedy answers end where the model ends them, or at `max_new_tokens` (None: `answer_length`), where the references
    that they are compared with are cut, too. Without `generate`, answers are read off the likelihoods. `name` labels
    the progress bar; `batch_size` rows go through the model together, and `passages` of those scored are passages
    (`AnswerSummary`). The model, with or without adapters, is returned in the mode it came in. Raises ValueError where
    there is no row to score.
    """
    from lowmem_npo.evaluation.scoring.forced import forced_answers
    from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers, text_of
    from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods

    if not rows:
        raise ValueError("there is no row to score")
    questions = [question(row) for row in rows]
    likelihoods = answer_likelihoods(
        model, rows, batch_size=batch_size, description=f"{name}: likelihood", progress=progress
    )
    length = answer_length(rows, max_new_tokens)
    if generate:
        prompts = [Prompt(prompt, length) for prompt, _ in questions]
        answers = greedy_answers(
            model, tokenizer, prompts, batch_size=batch_size, description=f"{name}: greedy answers", progress=progress
        )
    else:
        forced = forced_answers(
            model,
            tokenizer,
            rows,
            [len(reference) for _, reference in questions],
            batch_size=batch_size,
            description=f"{name}: most likely tokens",
            progress=progress,
        )
        answers = [ids[:length] for ids in forced]

    records = []
    of_rows = zip(questions, likelihoods, answers, strict=True)
    for row, ((prompt, reference_ids), likelihood, answer_ids) in enumerate(of_rows):
        reference = text_of(tokenizer, reference_ids[:length]).strip()
        answer = text_of(tokenizer, answer_ids).strip()
        figures = compared(reference, answer)
        # With a token beyond the true answer, white space too, a written answer would go on.
        figures["exact_match"] &= generate or len(answer_ids) <= len(reference_ids)
        records.append(
            AnswerRecord(
                row=row,
                prompt=text_of(tokenizer, prompt),
                reference=reference,
                answer=answer,
                tokens=likelihood.tokens,
                nll=likelihood.nll,
                probability=likelihood.probability,
                cut="cut" in rows[row] or reference != text_of(tokenizer, reference_ids).strip(),
                ids=answer_ids,
                **figures,
            )
        )
    return AnswerEvaluation(AnswerSummary.of(records, len(rows), length, passages, generate), records)


def answer_length(rows: Sequence[TokenizedRow], wanted: int | None) -> int:
    """How many tokens a generated answer to any of `rows` may have, its end included: as many as `wanted`, by default
    enough for the longest true answer after some introduction."""
    if wanted is not None:
        return wanted
    longest = max(len(question(row)[1]) for row in rows)
    return min(MAX_NEW_TOKENS, max(MIN_NEW_TOKENS, longest + MARGIN))


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
