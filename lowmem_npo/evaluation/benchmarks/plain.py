"""Any rows with answers: how likely the answers are, and how much of them comes in greedy answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lowmem_npo.data import Rows, to_examples, tokenize
from lowmem_npo.evaluation.answer_table import FORGET, RETAIN, answer_figures, text_table
from lowmem_npo.evaluation.answers import AnswerRecord, AnswerSummary
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Measured, Selection
from lowmem_npo.evaluation.figures import Figure
from lowmem_npo.evaluation.scoring.scorer import Scorer


@dataclass(frozen=True)
class PlainAnswer:
    """A measured row, and how many rows its set has."""

    record: AnswerRecord
    rows_in_set: int


class Plain(Benchmark[PlainAnswer, dict[str, AnswerSummary]]):
    name = "answers"
    group = "evaluate"
    uses_template = True
    title = "Measured by lowmem-npo evaluate"
    summary = "all other rows get the likelihood of their answers and greedy answers"
    sets = (FORGET, RETAIN)
    empty: ClassVar[dict[str, Any]] = {}

    def select(self, name: str, rows: Rows, context: Context) -> Selection:
        if {"input", "output"} <= set(rows.columns):
            context.notes.append(
                f"{name}: no row has a LUME id (…sc1 for completions, …qa0 for questions), so it is scored without "
                "LUME's aggregate, by likelihood and greedy answers."
            )
        examples = to_examples(rows, **context.config.columns)
        places = context.choose(len(rows))
        tokenized = tokenize(
            [examples[i] for i in places],
            context.tokenizer,
            max_length=context.config.tokens_per_row,
            template=context.template,
        )
        for example, row in zip(tokenized.examples, tokenized, strict=True):
            context.check(example.where, row["input_ids"])
        return Selection(tokenized, len(rows), places)

    def measure(self, name: str, selection: Selection, scorer: Scorer, context: Context) -> list[PlainAnswer]:
        records = scorer.answers(f"{name}: answers", selection.rows, selection.places)
        return [PlainAnswer(record, selection.rows_in_set) for record in records]

    def score(self, measured: Measured, context: Context) -> dict[str, AnswerSummary] | None:
        return {
            name: AnswerSummary.of([answer.record for answer in answers], answers[0].rows_in_set)
            for name, answers in self.own(measured).items()
        } or None

    def to_json(self, scores: dict[str, AnswerSummary]) -> dict[str, Any]:
        return {name: asdict(summary) for name, summary in scores.items()}

    def rows_to_json(self, name: str, measured: Sequence[PlainAnswer]) -> list[dict[str, Any]]:
        return [asdict(answer.record) for answer in measured]

    def figures(self, content: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
        return answer_figures(_summaries(content))

    def text(self, content: Any, before: Any) -> str:
        now, earlier = _summaries(content), _summaries(before or {})
        if set(now) <= set(earlier):
            return text_table({"before": {name: earlier[name] for name in now}, "after": now})
        return text_table({"now": now})


PLAIN = Plain()


def _summaries(content: Mapping[str, Mapping[str, Any]]) -> dict[str, AnswerSummary]:
    return {name: AnswerSummary(**summary) for name, summary in content.items()}
