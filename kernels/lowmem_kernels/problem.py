"""An engine's input and output. The public functions are the same problem with different weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lowmem_kernels.head import FrozenHead

Direction = Literal["policy-reference", "reference-policy"]
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Problem:
    """Compute logp_t, kl_t and, if need_grad, the rows d/dh_t of  ce_weight_t * (-logp_t) + kl_weight_t * kl_t.

    hidden      (N, d) the policy's final hidden states, in the dtype of head.weight
    ref_hidden  (N, d) the reference's, or None: no KL
    targets     (N,) int64, each in [0, V), or None: no log-probabilities
    ce_weight   (N,) float32, or None: the cross-entropy has no part in the gradient
    kl_weight   (N,) float32, or None: the KL has no part in the gradient
    direction   policy-reference: KL(policy || reference); reference-policy: KL(reference || policy)
    """

    hidden: Tensor
    ref_hidden: Tensor | None
    head: FrozenHead
    targets: Tensor | None
    ce_weight: Tensor | None
    kl_weight: Tensor | None
    direction: Direction
    need_grad: bool

    ROWS: ClassVar = ("hidden", "ref_hidden", "targets", "ce_weight", "kl_weight")  # the fields with a row per token

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        """The problem of other rows: those that `function` makes of each tensor with a row per token."""
        rows: dict[str, Any] = {name: _if_given(function, getattr(self, name)) for name in self.ROWS}
        return replace(self, **rows)

    def empty_answer(self) -> "Answer":
        """The answer's tensors, not yet filled in."""
        rows = self.hidden.shape[:1]
        return Answer(
            logprobs=None if self.targets is None else self.hidden.new_empty(rows, dtype=torch.float32),
            kl=None if self.ref_hidden is None else self.hidden.new_empty(rows, dtype=torch.float32),
            grad=self.hidden.new_empty(self.hidden.shape, dtype=self.grad_dtype) if self.need_grad else None,
        )

    @property
    def grad_dtype(self) -> torch.dtype:
        # Backward may bring a loss scale, or a weight like 1e-4: float16 could not hold the rows until then.
        return torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype


class Answer(NamedTuple):
    """logprobs (N,) float32, kl (N,) float32, grad (N, d); None for what was not requested."""

    logprobs: Tensor | None
    kl: Tensor | None
    grad: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Answer":
        return Answer(*(_if_given(function, x) for x in self))


def _if_given(function: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
    return None if x is None else function(x)
