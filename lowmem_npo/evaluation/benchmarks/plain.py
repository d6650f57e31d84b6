"""Any rows with answers: how likely the answers are, and how much of them comes in greedy answers.

Rows to forget are asked in other forms as well (`asking`): each form is a set of figures of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lowmem_npo.data import Rows, TokenizedRows, to_examples
from lowmem_npo.evaluation.answer_table import FORGET, RETAIN, answer_figures, text_table
from lowmem_npo.evaluation.answers import AnswerRecord, AnswerSummary, answer_length, question
from lowmem_npo.evaluation.asking import Asked, in_form, other_forms
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Measured, Selection
from lowmem_npo.evaluation.figures import Figure
from lowmem_npo.records import check_value, record_of

if TYPE_CHECKING:
    from lowmem_npo.evaluation.scoring.scorer import Scorer


@dataclass(frozen=True)
class PlainAnswer:
    """A measured row, how many rows its set has, how long an answer could be, whether it is a passage, and the form
    that was asked in (None: the trained one)."""

    record: AnswerRecord
    rows_in_set: int
    max_new_tokens: int
    is_passage: bool = False
    form: str | None = None


class Plain(Benchmark[PlainAnswer, dict[str, AnswerSummary]]):
    name = "answers"
    group = "evaluate"
    uses_template = True
    title = "Measured by lowmem-npo evaluate"
    summary = "all other rows get the likelihood of their answers and greedy answers"
    sets = (FORGET, RETAIN)
    reads_likelihoods = True
    empty: ClassVar[dict[str, Any]] = {}

    def select(self, name: str, rows: Rows, context: Context) -> Selection:
        if {"input", "output"} <= set(rows.columns) and not rows.mixed:
            context.notes.append(
                f"{name}: no row has a LUME id (…sc1 for completions, …qa0 for questions), so it is scored without "
                "LUME's aggregate, by likelihood and greedy answers."
            )
        examples = to_examples(rows, **context.config.columns_of(name, rows))
        places = context.choose(len(rows))
        return Selection(context.tokenized(name, [examples[i] for i in places]), len(rows), places)

    def measure(self, name: str, selection: Selection, scorer: Scorer, context: Context) -> list[PlainAnswer]:
        rows, length = cast(TokenizedRows, selection.rows), _most_tokens(selection, context)
        records = scorer.answers(f"{name}: answers", rows, selection.places, length)
        passage = dict(zip(selection.places, (example.is_passage for example in rows.examples), strict=True))
        measured = [PlainAnswer(r, selection.rows_in_set, length, passage[r.row]) for r in records]
        for form, of_form in _in_other_forms(name, selection, context).items():
            records = scorer.answers(f"{in_form(name, form)}: answers", of_form.rows, of_form.places, length)
            measured += [PlainAnswer(r, selection.rows_in_set, length, passage[r.row], form) for r in records]
        return measured

    def written(self, name: str, selection: Selection, context: Context) -> list[tuple[int, int]]:
        forms = [of_form.rows for of_form in _in_other_forms(name, selection, context).values()]
        length = _most_tokens(selection, context)
        return [(len(question(row)[0]), length) for rows in (selection.rows, *forms) for row in rows]

    def score(self, measured: Measured, context: Context) -> dict[str, AnswerSummary] | None:
        by_set: dict[str, list[PlainAnswer]] = {}
        for name, answers in self.own(measured).items():
            for answer in answers:
                by_set.setdefault(in_form(name, answer.form) if answer.form else name, []).append(answer)
        scores = {
            name: AnswerSummary.of(
                [a.record for a in answers],
                answers[0].rows_in_set,
                answers[0].max_new_tokens,
                passages=sum(a.is_passage for a in answers),
                generated=context.config.lets_write,
            )
            for name, answers in by_set.items()
        }
        before = summaries_of(context.before.get(self.name) or {})
        if other := [name for name in scores if name in before and _length(scores[name]) != _length(before[name])]:
            now, earlier = (_length(of[other[0]]) for of in (scores, before))
            context.notes.append(
                f"{other[0]}: the earlier evaluation let answers have {earlier}, this one {now}: the figures of greedy "
                "answers are not comparable."
            )
        return scores or None

    def to_json(self, scores: dict[str, AnswerSummary]) -> dict[str, Any]:
        return {name: asdict(summary) for name, summary in scores.items()}

    def said(
        self, selection: Selection, measured: Sequence[PlainAnswer], context: Context
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        if not context.config.lets_write:
            return []
        trained = [a for a in measured if a.form is None]
        return [(question(row)[0], a.record.ids) for row, a in zip(selection.rows, trained, strict=True)]

    def rows_to_json(self, name: str, measured: Sequence[PlainAnswer]) -> list[dict[str, Any]]:
        return [{**a.record.to_json(), **({"form": a.form} if a.form else {})} for a in measured]

    def figures(self, content: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
        return answer_figures(summaries_of(content))

    def text(self, content: Any, before: Any) -> str:
        now, earlier = summaries_of(content), summaries_of(before or {})
        if set(now) & set(earlier):
            return text_table({"before": {name: earlier[name] for name in now if name in earlier}, "after": now})
        return text_table({"now": now})


PLAIN = Plain()


def _most_tokens(selection: Selection, context: Context) -> int:
    """Tokens that a generated answer may have."""
    return answer_length(selection.rows, context.config.max_new_tokens)


def _in_other_forms(name: str, selection: Selection, context: Context) -> dict[str, Asked]:
    """The rows to forget as they were not trained, form by form."""
    rows, config = cast(TokenizedRows, selection.rows), context.config
    if name != FORGET or config.forms != "all":
        return {}
    form_of = (context.tokenizer, context.template, config.tokens_per_row, context.fit)
    return other_forms(rows, rows.examples, selection.places, *form_of)


def _length(summary: AnswerSummary) -> str:
    length = f"up to {summary.max_new_tokens} tokens"
    return length if summary.generated else "no tokens, and read them off the likelihoods"


def summaries_of(content: Mapping[str, Mapping[str, Any]]) -> dict[str, AnswerSummary]:
    """The inverse of `to_json`. Raises ValueError where `content` is not of a summary for each set."""
    check_value(content, dict[str, Any])
    return {name: record_of(AnswerSummary, summary) for name, summary in content.items()}
