"""Everything an evaluation asks of a model, text and likelihoods, each kept in a journal as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.answers import AnswerRecord, NotGenerated, evaluate_answers, question
from lowmem_npo.evaluation.scoring.batching import cache_tokens
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers, sampled_answers, text_of
from lowmem_npo.evaluation.scoring.gradient_norms import gradient_norms
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.evaluation.scoring.token_scores import NotFinite, TokenScores, token_scores


class Continuation(NamedTuple):
    """What a model wrote after a prompt, as ids and as text: special tokens skipped, nothing else trimmed."""

    ids: list[int]
    text: str


class Reference(NamedTuple):
    """A true answer as text. cut: whether it is longer than its row or an answer could be, so that the text is its
    beginning."""

    text: str
    cut: bool = False


class NotAsked(LookupError):
    """The journal does not know an answer, and there is no model that could be asked."""


@dataclass(frozen=True)
class Scorer:
    """Asks a model under evaluation. `part` names what is measured, in the journal and on the progress bar.

    model: None where the journal knows every answer. generates: whether the model may write answers.
    """

    model: PreTrainedModel | PeftModel | None
    tokenizer: PreTrainedTokenizerBase
    journal: Journal
    batch_size: int
    generates: bool = True

    @property
    def loaded_model(self) -> PreTrainedModel | PeftModel:
        """The model. Raises NotAsked where there is none."""
        if self.model is None:
            raise NotAsked("the journal was to know every answer")
        return self.model

    def without_model(self) -> Scorer:
        """The same without a model: it answers only what the journal knows."""
        return replace(self, model=None)

    def references(self, rows: Sequence[TokenizedRow], max_new_tokens: int) -> list[Reference]:
        """Each row's true answer, cut as a generated one is."""
        answers = [question(row)[1] for row in rows]
        whole, begun = (
            [text_of(self.tokenizer, answer[:length]).strip() for answer in answers]
            for length in (None, max_new_tokens)
        )
        texts = zip(rows, begun, whole, strict=True)
        return [Reference(text, "cut" in row or text != of_all) for row, text, of_all in texts]

    def continuations(self, part: str, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Continuation]:
        """What the model writes after each prompt (ids), greedily."""

        def measure(rows: list[int]) -> list[list[int]]:
            batch = [Prompt(prompts[row], max_new_tokens) for row in rows]
            model, size = self.loaded_model, self.batch_size
            return greedy_answers(model, self.tokenizer, batch, batch_size=size, progress=False)

        lengths = [(len(prompt), max_new_tokens) for prompt in prompts]
        written = self._generated(part, lengths, measure)
        return [Continuation(ids, text_of(self.tokenizer, ids)) for ids in written]

    def samples(
        self, part: str, rows: Sequence[TokenizedRow], samples: int, temperature: float, seed: int, max_new_tokens: int
    ) -> list[list[str]]:
        """Sampled answers to each row's prompt, none longer than `max_new_tokens`."""
        prompts = [question(row)[0] for row in rows]

        def measure(chosen: list[int]) -> list[list[str]]:
            sampled = sampled_answers(
                self.loaded_model,
                self.tokenizer,
                [Prompt(prompts[row], max_new_tokens) for row in chosen],
                samples=samples,
                temperature=temperature,
                seed=seed,
                places=chosen,
                batch_size=self.batch_size,
                progress=False,
            )
            return [[text_of(self.tokenizer, ids).strip() for ids in row] for row in sampled]

        lengths = [(len(prompt), max_new_tokens) for prompt in prompts]
        return self._generated(_with_length(part, max_new_tokens), lengths, measure)

    def nll(self, part: str, rows: Sequence[TokenizedRow]) -> list[float]:
        """The mean negative log-likelihood per token of each row's answer, in nats.

        Raises NotFinite where the model gives NaN or infinity, as all do here that read likelihoods.
        """

        def measure(chosen: list[int]) -> list[float]:
            batch = [rows[row] for row in chosen]
            return [
                score.nll
                for score in answer_likelihoods(self.loaded_model, batch, batch_size=self.batch_size, progress=False)
            ]

        lengths = [(len(row["input_ids"]), 0) for row in rows]
        values = self.journal.measured(part, lengths, measure, batch_size=self.batch_size)
        _check_finite(part, values)
        return values

    def token_scores(self, part: str, rows: Sequence[TokenizedRow]) -> list[TokenScores]:
        """What the model thinks of every token of each row's answer."""

        def measure(chosen: list[int]) -> list[dict]:
            batch = [rows[row] for row in chosen]
            try:
                measured = token_scores(self.loaded_model, batch, batch_size=self.batch_size, progress=False)
            except NotFinite as error:
                raise NotFinite(chosen[error.row], part) from None
            return [asdict(scores) for scores in measured]

        lengths = [(len(row["input_ids"]), 0) for row in rows]
        entries = self.journal.measured(part, lengths, measure, batch_size=self.batch_size)
        return [TokenScores(**entry) for entry in entries]

    def gradient_norms(self, part: str, rows: Sequence[TokenizedRow]) -> list[float | None]:
        """How far each row's answer would still move the weights; None for one of EOS alone."""

        def measure(chosen: list[int]) -> list[float | None]:
            return gradient_norms(self.loaded_model, [rows[row] for row in chosen])

        return self.journal.measured(part, [(len(row["input_ids"]), 0) for row in rows], measure, batch_size=1)

    def answers(
        self, part: str, rows: Sequence[TokenizedRow], places: Sequence[int], max_new_tokens: int
    ) -> list[AnswerRecord]:
        """What `evaluate_answers` records of each row; `places` are the rows' places in their data set. Where the model
        is not to write, its answers are read off the likelihoods."""

        def measure(chosen: list[int]) -> list[dict]:
            evaluated = evaluate_answers(
                self.loaded_model,
                self.tokenizer,
                [rows[row] for row in chosen],
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
                progress=False,
                generate=self.generates,
            )
            return [asdict(record) for record in evaluated.records]

        part = _with_length(part, max_new_tokens)
        if self.generates:
            entries = self._generated(part, [(len(question(row)[0]), max_new_tokens) for row in rows], measure)
        else:
            part, lengths = f"{part}, off the likelihoods", [(len(row["input_ids"]), 0) for row in rows]
            entries = self.journal.measured(part, lengths, measure, batch_size=self.batch_size)
        _check_finite(part, [entry["nll"] for entry in entries])
        return [replace(AnswerRecord(**entry), row=place) for entry, place in zip(entries, places, strict=True)]

    def _generated(self, part: str, lengths: Sequence[tuple[int, int]], measure: Callable) -> list[Any]:
        """Raises NotGenerated where the model is not to write."""
        if not self.generates:
            raise NotGenerated("the model would have to write answers (--generate-answers on lets it).")
        known = self.journal.known(part)
        if self.model is None and all(row in known for row in range(len(lengths))):
            return [known[row] for row in range(len(lengths))]  # how much a model has room for at once is not known
        room = cache_tokens(self.loaded_model)
        return self.journal.measured(part, lengths, measure, batch_size=self.batch_size, max_batch_tokens=room)


def _with_length(part: str, max_new_tokens: int) -> str:
    """What a journal calls generated answers: those of another length are others."""
    return f"{part} of up to {max_new_tokens} tokens"


def _check_finite(part: str, nll: Sequence[float]) -> None:
    """Raises NotFinite for a row without a likelihood."""
    for row, value in enumerate(nll):
        if not math.isfinite(value):
            raise NotFinite(row, part)
