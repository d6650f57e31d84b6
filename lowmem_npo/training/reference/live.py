"""The reference pass itself: the network with its adapters off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_kernels import FrozenHead, token_logprobs
from peft import PeftModel
from torch import Tensor

from lowmem_npo.config import ObjectiveConfig
from lowmem_npo.data.batching import RowBatch
from lowmem_npo.model import answer_hidden, reference_mode
from lowmem_npo.training.objective import SequenceLogprobs


@dataclass
class LiveReference:
    """Runs the reference pass for every micro-batch: nothing is stored, nothing can be stale."""

    model: PeftModel
    head: FrozenHead
    objective: ObjectiveConfig

    def forget(self, batch: RowBatch) -> Tensor | None:
        """Log-probs of the forget answers: (B,) float64 sums or (N,) float32 per token; None if the term needs none."""
        needed = self.objective.needs_reference
        if needed is None:
            return None
        logprobs = self.answer_logprobs(batch)
        if needed == "token":
            return logprobs
        return SequenceLogprobs(logprobs, batch.sequence, len(batch)).sums()

    def retain(self, batch: RowBatch) -> Tensor | None:
        """(N, d) final hidden states that predict the retain answers; None if delta is 0."""
        return None if self.objective.delta == 0 else self.answer_hidden(batch)

    def runs(self, forget: Sequence[int] = (), retain: Sequence[int] = ()) -> bool:
        """Whether the model must run for what these rows need: `forget`, `retain` or `both`."""
        return bool((forget and self.objective.needs_reference is not None) or (retain and self.objective.delta > 0))

    def both(self, batch: RowBatch, forget_rows: int) -> tuple[Tensor | None, Tensor | None]:
        """`forget` and `retain` in one pass, of a batch whose first `forget_rows` rows are to be forgotten."""
        needed = self.objective.needs_reference
        if needed is None and self.objective.delta == 0:
            return None, None
        logprobs, hidden = self.answers_of_both(batch, forget_rows)
        if needed == "sequence":
            logprobs = SequenceLogprobs(logprobs, batch.sequence[: len(logprobs)], forget_rows).sums()
        return logprobs, hidden

    def answers_of_both(self, batch: RowBatch, forget_rows: int) -> tuple[Tensor, Tensor]:
        """As the two below: (N,) of the forget rows, (N', d) of the others."""
        with reference_mode(self.model):
            forget, retain = answer_hidden(self.model, batch).split(sum(batch.answers[:forget_rows]))
            logprobs = token_logprobs(forget.hidden, self.head, forget.targets, checked=True)
            return logprobs, retain.hidden

    def answer_logprobs(self, batch: RowBatch) -> Tensor:
        """(N,) float32, one for each answer token."""
        with reference_mode(self.model):
            answers = answer_hidden(self.model, batch)
            return token_logprobs(answers.hidden, self.head, answers.targets, checked=True)

    def answer_hidden(self, batch: RowBatch) -> Tensor:
        """(N, d), one row for each answer token."""
        with reference_mode(self.model):
            return answer_hidden(self.model, batch).hidden
