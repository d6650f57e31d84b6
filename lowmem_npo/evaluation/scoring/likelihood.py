"""How likely a model finds the answers it was (or was not) taught: the loss of every row, without full logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, nan

import torch
from lowmem_kernels import IGNORE_INDEX, token_logprobs
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lowmem_npo.data import TokenizedRow
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE, batches
from lowmem_npo.evaluation.scoring.eval_mode import evaluating, progress_bar
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
    scores: list[Likelihood] = [Likelihood(0.0, 0)] * len(rows)
    head = frozen_head(model)
    with evaluating(model), progress_bar(len(rows), description, progress) as bar:
        for batch in batches([(len(row["input_ids"]), 0) for row in rows], batch_size):
            tensors = (tensor.to(model.device) for tensor in right_padded([rows[i] for i in batch]))
            answers = answer_hidden(model, *tensors)
            logprobs = token_logprobs(answers.hidden, head, answers.targets).double().cpu()
            sequence = answers.sequence.cpu()
            sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, sequence, logprobs)
            counts = torch.bincount(sequence, minlength=len(batch))
            for i, total, count in zip(batch, sums.tolist(), counts.tolist(), strict=True):
                scores[i] = Likelihood(-total, count)
            bar.update(len(batch))
    return scores


def right_padded(rows: Sequence[TokenizedRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels, each (rows, longest row) int64; what pads the ids is masked.

    Labelled is what follows the prompt, also where training (`--tokens all`) labels the prompt too.
    """
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [row_ids.clone() for row_ids in ids]
    for row, row_labels in zip(rows, labels, strict=True):
        row_labels[: row["prompt_length"]] = IGNORE_INDEX
    return (
        pad_sequence(ids, batch_first=True),
        pad_sequence([torch.ones_like(row_ids) for row_ids in ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    )
