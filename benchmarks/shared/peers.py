"""A step of NPO as two widely used tools do it, written plainly: the same loss, model, adapter and rows as ours.

What is theirs is the way: which rows are padded together, how many passes run, and that every token's logits exist.

TRL 1.16, as its DPO trainer: both parts are one batch, padded to the longest row of either, one pass for the policy and
one for the reference (the adapter switched off). open-unlearning (`src/trainer/unlearn/npo.py`, October 2025): part by
part; the reference is a second model; both losses are differentiated together; the logits of padding are computed, and
its KL counts it, which is left out here so that the loss is the same. Both checkpoint each layer by default.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shared.baselines import Baseline, Batch


class LikeTRL(Baseline):
    def differentiate(self, forget: Batch, retain: Batch) -> Tensor:
        both, rows = _concatenated(forget, retain), len(forget["labels"])
        reference = self._original(both)
        logits = self._logits(both)
        ratio = _sequence_logprobs(logits[:rows], both["labels"][:rows])
        ratio = ratio - _sequence_logprobs(reference[:rows], both["labels"][:rows])
        loss = -2 / self.beta * functional.logsigmoid(-self.beta * ratio).mean()
        loss = loss + self._retain_loss(logits[rows:], reference[rows:], both["labels"][rows:])
        loss.backward()
        return loss.detach()

    def _retain_loss(self, logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy and KL(policy || reference) of every position, of which the answers' are then taken."""
        counts = labels[:, 1:] != -100
        logprobs = logits[:, :-1].float().log_softmax(-1)
        of_reference = reference[:, :-1].float().log_softmax(-1)
        nll = -logprobs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][counts].mean()
        kl = (logprobs.exp() * (logprobs - of_reference)).sum(-1)[counts].mean()
        return self.gamma * nll + self.delta * kl


class LikeOpenUnlearning(LikeTRL):
    def differentiate(self, forget: Batch, retain: Batch) -> Tensor:
        policy = -_batch_nll(self._logits(forget), forget["labels"])
        reference = -_batch_nll(self._original(forget), forget["labels"])
        loss = -2 / self.beta * functional.logsigmoid(-self.beta * (policy - reference)).mean()
        of_reference = self._original(retain)
        loss = loss + self._retain_loss(self._logits(retain), of_reference, retain["labels"])
        loss.backward()
        return loss.detach()


def _concatenated(forget: Batch, retain: Batch) -> Batch:
    """Both parts, padded to one width."""
    width = max(forget["labels"].shape[1], retain["labels"].shape[1])
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat([functional.pad(b[name], (0, width - b[name].shape[1]), value=fill) for b in (forget, retain)])
        for name, fill in fills.items()
    }


def _sequence_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, S, V) -> (B,); row by row, as `selective_log_softmax` of TRL for bf16."""
    targets = labels[:, 1:].clamp(min=0)
    rows = zip(logits[:, :-1], targets, strict=True)
    logprobs = torch.stack([r.log_softmax(-1).gather(-1, t[:, None])[:, 0] for r, t in rows])
    return (logprobs.float() * (labels[:, 1:] != -100)).sum(-1)


def _batch_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, S, V) -> (B,): the sum of each row's cross-entropies."""
    logits, targets = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
    return functional.cross_entropy(logits.transpose(-1, -2), targets, ignore_index=-100, reduction="none").sum(-1)
