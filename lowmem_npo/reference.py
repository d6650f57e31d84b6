"""Where reference quantities come from: the original model, which is the policy's own network with its adapters off."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_kernels import FrozenHead, token_logprobs
from peft import PeftModel
from torch import Tensor

from lowmem_npo.config import ObjectiveConfig
from lowmem_npo.model import answer_hidden, reference_mode
from lowmem_npo.objective import SequenceLogprobs, needs_reference


@dataclass
class LiveReference:
    """Runs the reference pass for every micro-batch: nothing is stored, nothing can be stale."""

    model: PeftModel
    head: FrozenHead
    objective: ObjectiveConfig

    def forget(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Log-probs of the forget answers: (B,) sums or (N,) per token, float32; None if the forget term needs none."""
        needed = needs_reference(self.objective)
        if needed is None:
            return None
        with reference_mode(self.model):
            answers = answer_hidden(self.model, batch["input_ids"], batch["attention_mask"], batch["labels"])
            logprobs = token_logprobs(answers.hidden, self.head, answers.targets)
        if needed == "token":
            return logprobs
        return SequenceLogprobs(logprobs, answers.sequence, len(batch["labels"])).sums()

    def retain(self, batch: dict[str, Tensor]) -> Tensor | None:
        """(N, d) final hidden states that predict the retain answers; None if delta is 0."""
        if self.objective.delta == 0:
            return None
        with reference_mode(self.model):
            return answer_hidden(self.model, batch["input_ids"], batch["attention_mask"], batch["labels"]).hidden
