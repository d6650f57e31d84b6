"""The number type in which the model computes."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lowmem_npo.model.layers import causal_lm


def compute_autocast(model: PreTrainedModel | PeftModel) -> AbstractContextManager:
    """The context in which every pass through the model runs: policy, reference and generation alike.

    A half-precision model computes in its own type while its adapter stays float32 (a bf16 adapter loses most AdamW
    updates at lr 1e-4: bf16 resolves 1 part in 256). A float32 model needs no context.
    """
    head = causal_lm(model).get_output_embeddings().weight  # never quantised; `model.dtype` may be that of the adapter
    dtype, device = head.dtype, head.device
    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
