"""What any evaluation asks of a model, text and likelihood, each kept in a journal as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.answers import AnswerRecord, evaluate_answers
from lowmem_npo.evaluation.generation import Prompt, greedy_answers
from lowmem_npo.evaluation.journal import Journal
from lowmem_npo.evaluation.likelihood import answer_likelihoods
from lowmem_npo.evaluation.token_scores import TokenScores, token_scores


@dataclass(frozen=True)
class Measuring:
    """A model under evaluation. `part` names what is measured, in the journal and on the progress bar."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    journal: Journal
    batch_size: int

    def continuations(self, part: str, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """The greedy text after each prompt (ids), special tokens skipped, nothing else trimmed."""

        def measure(rows: list[int]) -> list[str]:
            batch = [Prompt(prompts[row], max_new_tokens) for row in rows]
            answers = greedy_answers(self.model, self.tokenizer, batch, batch_size=self.batch_size, progress=False)
            return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

        lengths = [(len(prompt), max_new_tokens) for prompt in prompts]
        return self.journal.measured(part, lengths, measure, batch_size=self.batch_size)

    def nll(self, part: str, rows: Sequence[TokenizedRow]) -> list[float]:
        """The mean negative log-likelihood per token of each row's answer, in nats."""

        def measure(chosen: list[int]) -> list[float]:
            batch = [rows[row] for row in chosen]
            return [
                score.nll for score in answer_likelihoods(self.model, batch, batch_size=self.batch_size, progress=False)
            ]

        lengths = [(len(row["input_ids"]), 0) for row in rows]
        return self.journal.measured(part, lengths, measure, batch_size=self.batch_size)

    def token_scores(self, part: str, rows: Sequence[TokenizedRow]) -> list[TokenScores]:
        """What the model thinks of every token of each row's answer."""

        def measure(chosen: list[int]) -> list[dict]:
            batch = [rows[row] for row in chosen]
            return [
                asdict(scores) for scores in token_scores(self.model, batch, batch_size=self.batch_size, progress=False)
            ]

        lengths = [(len(row["input_ids"]), 0) for row in rows]
        found = self.journal.measured(part, lengths, measure, batch_size=self.batch_size)
        return [TokenScores(**entry) for entry in found]

    def answers(self, part: str, rows: Sequence[TokenizedRow], places: Sequence[int]) -> list[AnswerRecord]:
        """What `evaluate_answers` records of each row; `places` are the rows' places in their data set."""

        def measure(chosen: list[int]) -> list[dict]:
            found = evaluate_answers(
                self.model,
                self.tokenizer,
                [rows[row] for row in chosen],
                limit=None,
                batch_size=self.batch_size,
                progress=False,
            )
            return [asdict(record) for record in found.records]

        lengths = [(row["prompt_length"], len(row["input_ids"]) - row["prompt_length"]) for row in rows]
        found = self.journal.measured(part, lengths, measure, batch_size=self.batch_size)
        return [replace(AnswerRecord(**entry), row=place) for entry, place in zip(found, places, strict=True)]
