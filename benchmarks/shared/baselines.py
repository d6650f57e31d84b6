"""NPO as it is usually written: Hugging Face models, full logits, `log_softmax`, `kl_div`, a second model as reference.

What lowmem-npo is measured against. Plain, but not careless: bf16, checkpointed layers, no KV cache, the reference
without gradient, padding not counted. Three forms: the reference is a second model or the adapter switched off; all
weights are trained, or a LoRA adapter. Each takes the order that needs less memory: with LoRA the forget loss is
differentiated before the retain pass begins, so that their logits are never alive together; with full fine-tuning both
are differentiated together, so that gradients as large as the model are not held beside the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lowmem_kernels import IGNORE_INDEX
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from typing_extensions import Self

Batch = dict[str, Tensor]  # input_ids, attention_mask, labels: (B, S)


@dataclass
class Baseline:
    """One way to do a training step."""

    policy: PreTrainedModel | PeftModel
    reference: PreTrainedModel | None  # None: the policy with its adapter switched off
    optimizer: torch.optim.Optimizer
    together: bool  # whether the forget and retain losses are differentiated together
    beta: float = 0.5
    gamma: float = 1.0
    delta: float = 0.5

    @classmethod
    def build(
        cls,
        load: Callable[[], PreTrainedModel],
        *,
        two_models: bool,
        lora: bool,
        r: int = 5,
        checkpointing: bool = True,
    ) -> Self:
        """Loads one or two models and makes the policy trainable."""
        base = load()
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        if checkpointing:
            enable({"use_reentrant": False})
        if lora:
            config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=r, target_modules=["q_proj", "v_proj"])
            policy: PreTrainedModel | PeftModel = get_peft_model(base, config)
        else:
            policy = base.requires_grad_(True)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        return cls(policy.train(), load().eval() if two_models else None, optimizer, together=not lora)

    def step(self, forget: Batch, retain: Batch) -> Tensor:
        """One optimiser step; the loss, detached."""
        loss = self.differentiate(forget, retain)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def differentiate(self, forget: Batch, retain: Batch) -> Tensor:
        """The step's loss, detached; its gradients are added to those of the trained weights."""
        forget_loss = self.forget_loss(forget)
        if self.together:
            loss = forget_loss + self.retain_loss(retain)
            loss.backward()
            return loss.detach()
        forget_loss.backward()
        retain_loss = self.retain_loss(retain)
        retain_loss.backward()
        return (forget_loss + retain_loss).detach()

    def forget_loss(self, forget: Batch) -> Tensor:
        """NPO: the mean over sequences."""
        reference = sequence_logprobs(self._original(forget), forget)
        ratio = sequence_logprobs(self._logits(forget), forget) - reference
        return -2 / self.beta * functional.logsigmoid(-self.beta * ratio).mean()

    def retain_loss(self, retain: Batch) -> Tensor:
        """Cross-entropy and KL(policy || reference): means over answer tokens."""
        reference = answer_logits(self._original(retain), retain).log_softmax(-1)
        logprobs = answer_logits(self._logits(retain), retain).log_softmax(-1)
        targets = retain["labels"][:, 1:]
        nll = functional.nll_loss(logprobs, targets[targets != IGNORE_INDEX])
        kl = functional.kl_div(reference, logprobs, log_target=True, reduction="none").sum(-1).mean()
        return self.gamma * nll + self.delta * kl

    def _logits(self, batch: Batch) -> Tensor:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            return self.policy(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

    @torch.no_grad()
    def _original(self, batch: Batch) -> Tensor:
        if self.reference is not None:
            return self.reference(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        assert isinstance(self.policy, PeftModel)
        with self.policy.disable_adapter():
            return self._logits(batch)


def sequence_logprobs(logits: Tensor, batch: Batch) -> Tensor:
    """(B, S, V) -> (B,): the sum of the answer's log-probabilities."""
    targets = batch["labels"][:, 1:]
    logprobs = logits[:, :-1].float().log_softmax(-1)
    picked = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * (targets != IGNORE_INDEX)).sum(-1)


def answer_logits(logits: Tensor, batch: Batch) -> Tensor:
    """(B, S, V) -> (answer tokens, V) float32."""
    return logits[:, :-1][batch["labels"][:, 1:] != IGNORE_INDEX].float()
