"""How likely a model finds the answers it was (or was not) taught: the loss of every row, without full logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, nan

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowmem_kernels import token_logprobs
from lowmem_npo.data import IGNORED, TokenizedRow
from lowmem_npo.evaluation.batching import BATCH_SIZE, batches
from lowmem_npo.evaluation.mode import evaluating
from lowmem_npo.model import answer_hidden, frozen_head


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
    model: PreTrainedModel,
    rows: Sequence[TokenizedRow],
    *,
    batch_size: int = BATCH_SIZE,
    description: str = "answer likelihood",
    progress: bool = True,
) -> list[Likelihood]:
    """The likelihood of each row's answer (of all its text, if it has no prompt), in the order of `rows`.

    Final hidden states meet the LM head inside `token_logprobs`, so nothing of size tokens x vocabulary is ever stored.
    """
    scores: list[Likelihood] = [Likelihood(0.0, 0)] * len(rows)
    head = frozen_head(model)
    with evaluating(model), tqdm(total=len(rows), desc=description, unit="row", disable=not progress) as bar:
        for batch in batches([(len(row["input_ids"]), 0) for row in rows], batch_size):
            tensors = (tensor.to(model.device) for tensor in _right_padded([rows[i] for i in batch]))
            answers = answer_hidden(model, *tensors)
            logprobs = token_logprobs(answers.hidden, head, answers.targets).double().cpu()
            sequence = answers.sequence.cpu()
            sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, sequence, logprobs)
            counts = torch.bincount(sequence, minlength=len(batch))
            for i, total, count in zip(batch, sums.tolist(), counts.tolist(), strict=True):
                scores[i] = Likelihood(-total, count)
            bar.update(len(batch))
    return scores


def _right_padded(rows: Sequence[TokenizedRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels, each (rows, longest row) int64; what pads the ids is masked.

    Labelled is what follows the prompt, also where training (`--tokens all`) labels the prompt too.
    """
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for at, row in enumerate(rows):
        length, prompt_length = len(row["input_ids"]), row["prompt_length"]
        input_ids[at, :length] = torch.tensor(row["input_ids"])
        attention_mask[at, :length] = 1
        labels[at, prompt_length:length] = input_ids[at, prompt_length:length]
    return input_ids, attention_mask, labels
