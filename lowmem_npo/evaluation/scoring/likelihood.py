"""How likely a model finds the answers it was (or was not) taught: the loss of every row, without full logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, nan
from typing import TypeVar

import torch
from lowmem_kernels import IGNORE_INDEX, token_logprobs
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lowmem_npo.data import RowBatch, TokenizedRow
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE, batches
from lowmem_npo.evaluation.scoring.eval_mode import evaluating, progress_bar
from lowmem_npo.memory.exhausted import in_parts
from lowmem_npo.model import answer_hidden, frozen_head, packs_rows

T = TypeVar("T")
Score = TypeVar("Score")


@dataclass(frozen=True)
class Likelihood:
    """What the model gives the answer tokens of one row, the end-of-sequence token among them."""

    nll_sum: float
    tokens: int

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per answer token, in nats."""
        return self.nll_sum / self.tokens if self.tokens else nan

    @property
    def probability(self) -> float:
        """P(answer | prompt)^(1/tokens), TOFU's length-normalised probability (Maini et al. 2024, section 2.2.1)."""
        return exp(-self.nll)


def answer_likelihoods(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TokenizedRow],
    *,
    batch_size: int = BATCH_SIZE,
    description: str = "answer likelihood",
    progress: bool = True,
) -> list[Likelihood]:
    """The likelihood of each row's answer (of all its text, if it has no prompt), in the order of `rows`.

    Final hidden states meet the LM head inside `token_logprobs`, so nothing of size tokens x vocabulary is ever stored.
    """
    head = frozen_head(model)

    def summed(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of each row the sum of its answer's log-probs, and how many they are."""
        answers = answer_hidden(model, answer_batch(model, [rows[i] for i in chosen]))
        logprobs = token_logprobs(answers.hidden, head, answers.targets).double().cpu()
        sequence = answers.sequence.cpu()
        sums = torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, sequence, logprobs)
        return sums, torch.bincount(sequence, minlength=len(chosen))

    def of_row(i: int, place: int, result: tuple[Tensor, Tensor]) -> Likelihood:
        sums, counts = result
        return Likelihood(-sums[place].item(), int(counts[place]))

    return row_by_row(model, rows, summed, of_row, batch_size, description, progress)


def row_by_row(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TokenizedRow],
    run: Callable[[Sequence[int]], T],
    of_row: Callable[[int, int, T], Score],
    batch_size: int,
    description: str,
    progress: bool,
) -> list[Score]:
    """The score of each row, in the order of `rows`, of which many go through the model at once.

    run: what the model gives for some of them, by their places among `rows`. of_row: the score of one, by its place
    among `rows`, and by that among those of which `run` gave the result.
    """
    scores: dict[int, Score] = {}
    with evaluating(model), progress_bar(len(rows), description, progress) as bar:
        for batch in batches([(len(row["input_ids"]), 0) for row in rows], batch_size):
            for part, result in in_parts(model, batch, run):
                for place, i in enumerate(part):
                    scores[i] = of_row(i, place, result)
            bar.update(len(batch))
    return [scores[i] for i in range(len(rows))]


def answer_batch(model: PreTrainedModel | PeftModel, rows: Sequence[TokenizedRow]) -> RowBatch:
    """One pass over `rows`, on the model's device. What follows the prompt counts, also where training
    (`--tokens all`) labels the prompt too."""
    answers = [TokenizedRow(**{**row, "labels": after_prompt(row)}) for row in rows]
    return RowBatch.of(answers, pack=packs_rows(model)).to(model.device)


def after_prompt(row: TokenizedRow) -> list[int]:
    prompt = row["prompt_length"]
    return [IGNORE_INDEX] * prompt + row["input_ids"][prompt:]
