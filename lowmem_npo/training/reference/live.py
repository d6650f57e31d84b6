"""The reference pass itself: the network with its adapters off."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_kernels import FrozenHead, token_logprobs
from peft import PeftModel
from torch import Tensor

from lowmem_npo.config import ObjectiveConfig
from lowmem_npo.data.batching import RowBatch
from lowmem_npo.model import answer_hidden, reference_mode
from lowmem_npo.training.objective import SequenceLogprobs, needs_reference


@dataclass
class LiveReference:
    """Runs the reference pass for every micro-batch: nothing is stored, nothing can be stale."""

    model: PeftModel
    head: FrozenHead
    objective: ObjectiveConfig

    def forget(self, batch: RowBatch) -> Tensor | None:
        """Log-probs of the forget answers: (B,) sums or (N,) per token, float32; None if the forget term needs none."""
        needed = needs_reference(self.objective)
        if needed is None:
            return None
        logprobs = self.answer_logprobs(batch)
        if needed == "token":
            return logprobs
        return SequenceLogprobs(logprobs, batch.sequence, len(batch)).sums()

    def retain(self, batch: RowBatch) -> Tensor | None:
        """(N, d) final hidden states that predict the retain answers; None if delta is 0."""
        return None if self.objective.delta == 0 else self.answer_hidden(batch)

    def answer_logprobs(self, batch: RowBatch) -> Tensor:
        """(N,) float32, one for each answer token."""
        with reference_mode(self.model):
            answers = answer_hidden(self.model, batch)
            return token_logprobs(answers.hidden, self.head, answers.targets)

    def answer_hidden(self, batch: RowBatch) -> Tensor:
        """(N, d), one row for each answer token."""
        with reference_mode(self.model):
            return answer_hidden(self.model, batch).hidden
