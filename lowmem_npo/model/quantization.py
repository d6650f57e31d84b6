"""The 4-bit recipe of QLoRA (Dettmers et al. 2023)."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 weights whose scales are quantised in turn, dequantised to `dtype` to compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
