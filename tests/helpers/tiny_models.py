"""Tiny causal models of real architectures with random weights, built in about a second."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from lowmem_npo.data import RowBatch
from lowmem_npo.model import answer_hidden

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}

CONFIGS = {
    "olmo": lambda v: OlmoConfig(vocab_size=v, tie_word_embeddings=False, **SIZES),
    "olmo2": lambda v: Olmo2Config(vocab_size=v, tie_word_embeddings=False, **SIZES),
    "llama": lambda v: LlamaConfig(vocab_size=v, tie_word_embeddings=False, **SIZES),
    # Caps small enough to bend random logits: a missing softcap must not go unnoticed.
    "gemma2": lambda v: Gemma2Config(
        vocab_size=v, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8, sliding_window=16, **SIZES
    ),
    "granite": lambda v: GraniteConfig(vocab_size=v, logits_scaling=0.25, **SIZES),
}


def tiny_model(
    architecture: str | PretrainedConfig = "olmo",
    vocabulary: int = 97,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A frozen random model, its weights large enough for logits far from uniform.

    Args:
        architecture: a name in CONFIGS, or a configuration.
    """
    torch.manual_seed(seed)
    config = CONFIGS[architecture](vocabulary) if isinstance(architecture, str) else architecture
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, 0
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.to(dtype).requires_grad_(False).eval()


def states(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """The hidden states of a row of tokens, always the same one."""
    return answer_hidden(model, RowBatch.whole(torch.arange(3, 15)[None])).hidden.detach()
