"""Decoder architectures of transformers, each as small as it can be with all of its parts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 16}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 12,  # with the rotated ones more than a value has, as in the models themselves
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **EXPERTS,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {**HEADS, **EXPERTS, **MIXED},
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "arcee": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"use_qk_norm": True},
    "cohere2": MIXED,
    "dbrx": {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "diffllama": {},
    "doge": {},
    "dots1": {**HEADS, **LATENT, "n_shared_experts": 1},
    "ernie4_5": HEADS,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "exaone4": MIXED,
    "exaone_moe": {**HEADS, **EXPERTS, **MIXED, "first_k_dense_replace": 1},
    "falcon": {"alibi": False},
    "falcon_h1": {**HEADS, **MAMBA, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": EXPERTS,
    "gemma": HEADS,
    "gemma2": {**HEADS, **MIXED, "query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5},
    "gemma3_text": {**HEADS, **MIXED, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        **HEADS,
        **MIXED,
        "intermediate_size": [48, 48],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 258,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": {**HEADS, **MIXED, "vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 8},
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**HEADS, **LATENT},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {},
    "gpt_oss": {**HEADS, **EXPERTS, **MIXED, "rope_parameters": YARN},
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 0.25},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24},
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 24},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**HEADS, **EXPERTS, "moe_topk": 2},
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**EXPERTS, "kv_channels": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {**HEADS, **EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "minimax": {**HEADS, **EXPERTS, "block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "ministral": {**HEADS, **MIXED},
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        **HEADS,
        **EXPERTS,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "moe", "attention"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmo_hybrid": {**LINEAR, "linear_num_key_heads": 4},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},  # as OPT-350m
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS,
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": HEADS,
    "qwen3_5_text": {**HEADS, **LINEAR},
    "qwen3_moe": {**HEADS, **EXPERTS},
    "qwen3_next": {**HEADS, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "rwkv": {},
    "seed_oss": HEADS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": {**HEADS, **MIXED, "query_pre_attn_scalar": 8},
    "zamba": {
        "num_hidden_layers": 4,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
        "chunk_size": 16,
    },
}


def tiny_config(architecture: str, vocabulary: int) -> PretrainedConfig:
    """The configuration of a model of `architecture`, a `model_type` in ARCHITECTURES."""
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    declared = AutoConfig.for_model(architecture)  # Mamba's has no attention heads, and is to have none
    sizes = {name: size for name, size in SIZES.items() if hasattr(declared, name)}
    return AutoConfig.for_model(architecture, vocab_size=vocabulary, **ids, **{**sizes, **ARCHITECTURES[architecture]})


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random float32 weights, large enough for logits far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("weight" in name or "experts" in name):
                parameter.mul_(5)
    return model.eval()
