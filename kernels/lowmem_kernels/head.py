"""The frozen LM head: the matrix that turns hidden states into logits, and what some models do to those logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """z = softcap * tanh(logit_scale * (h W^T + b) / softcap);  without a softcap  z = logit_scale * (h W^T + b).

    weight       (V, d) bfloat16, float16 or float32; must not require grad
    bias         (V,) floating point, finite, on the same device; must not require grad
    softcap      final logit soft-capping (Gemma 2: 30.0), positive
    logit_scale  multiplies the logits (Cohere's logit_scale; 1 / logits_scaling for Granite), finite and not 0

    Raises ValueError, naming the argument, for anything else.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self):
        weight, bias = self.weight, self.bias
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"weight must have shape (vocabulary, hidden size), not {tuple(weight.shape)}")
        if weight.dtype not in FLOAT_DTYPES:
            raise ValueError(f"weight must be bfloat16, float16 or float32, not {weight.dtype}")
        if weight.requires_grad:
            raise ValueError("weight requires grad, but the head is frozen; pass weight.detach() or freeze it")
        if bias is not None:
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
            if bias.dtype not in FLOAT_DTYPES:
                raise ValueError(f"bias must be bfloat16, float16 or float32, not {bias.dtype}")
            if bias.device != weight.device:
                raise ValueError(f"bias is on {bias.device}, but weight is on {weight.device}")
            if bias.requires_grad:
                raise ValueError("bias requires grad, but the head is frozen; pass bias.detach() or freeze it")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be a positive number or None, not {self.softcap}")
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise ValueError(f"logit_scale must be finite and not 0, not {self.logit_scale}")

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens it scores."""
        return self.weight.shape[0]
