"""What a model's configuration alone says about a run, known before any weight is loaded."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lowmem_npo.config import ModelConfig
from lowmem_npo.model.loading import DTYPES, attention_of
from lowmem_npo.model.packable import packable, padding_note
from lowmem_npo.model.quantization import stored_quantization
from lowmem_npo.model.trial import check_architecture
from lowmem_npo.sizes import gib


def model_notes(architecture: PretrainedConfig, config: ModelConfig) -> list[str]:
    """A line for each thing that is not as the options say.

    Raises:
        UserError: the architecture, or what the options ask of it, is not supported.
    """
    check_architecture(architecture)
    lines, kind = [], architecture.model_type
    if attention_of(architecture, config.attn) != config.attn:
        lines.append(f"transformers has no SDPA attention for {kind}: --attn eager is used, which takes more memory.")
    if not packable(architecture, config.attn):
        lines.append(padding_note(kind))
    if stored := stored_quantization(architecture):
        lines.append(f"The weights are stored in 4 bits ({stored.bnb_4bit_quant_type}) and stay so.")
    if config.qlora:
        left = _unquantised(architecture, DTYPES[config.dtype])
        what = "the experts" if all("expert" in name for name in left) else "some weights"
        if size := sum(left.values()):
            lines.append(
                f"--qlora leaves {what} in {config.dtype} ({gib(size)}): bitsandbytes quantises linear layers, and "
                f"{kind} keeps several of them in one tensor."
            )
    return lines


def _unquantised(architecture: PretrainedConfig, dtype: torch.dtype) -> dict[str, int]:
    """The bytes of each weight that is neither a matrix nor that of a convolution."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager", dtype=dtype)
    convolutions = (nn.Conv1d, nn.Conv2d)
    return {
        f"{name}.{parameter}": p.nbytes
        for name, module in model.named_modules()
        for parameter, p in module.named_parameters(recurse=False)
        if p.ndim > 2 and not isinstance(module, convolutions)
    }
