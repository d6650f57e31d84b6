"""Checkpoints in OLMo's original format, written and computed without the code under test.

The forward pass follows AllenAI's own model (allenai/OLMo, olmo/model.py), in float64.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Those of allenai/OLMo-7B that shape the model, made small.
SETTINGS: dict[str, Any] = {
    "activation_type": "swiglu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["OLMoForCausalLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": False,
    "auto_map": {"AutoConfig": "configuration_olmo.OLMoConfig", "AutoModelForCausalLM": "modeling_olmo.OLMo"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "sequential", "clip_qkv": None, "d_model": 64,
    "embedding_dropout": 0.0, "embedding_size": 128, "eos_token_id": 1, "flash_attention": True, "include_bias": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "layer_norm_type": "default", "layer_norm_with_affine": False, "max_sequence_length": 256, "mlp_hidden_size": 256,
    "mlp_ratio": 4, "model_type": "hf_olmo", "multi_query_attention": False, "n_heads": 4, "n_layers": 2,
    "pad_token_id": 0, "precision": "amp_bf16", "residual_dropout": 0.0, "rope": True, "rope_full_precision": True,
    "scale_logits": False, "use_cache": True, "vocab_size": 120, "weight_tying": False,
}  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    return {**SETTINGS, **changes}


def random_weights(config: dict[str, Any], prefix: str = "model.", seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of such a model, in float32, large enough for logits far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    d, heads = config["d_model"], config["n_heads"]
    kv = config.get("n_kv_heads") or (1 if config["multi_query_attention"] else heads)
    inner = config["mlp_hidden_size"] or config["mlp_ratio"] * d
    shapes = {"wte": (config["embedding_size"] or config["vocab_size"], d)}
    for i in range(config["n_layers"]):
        shapes |= {
            f"blocks.{i}.att_proj": (d + 2 * kv * d // heads, d),
            f"blocks.{i}.attn_out": (d, d),
            f"blocks.{i}.ff_proj": (inner, d),
            f"blocks.{i}.ff_out": (d, inner // 2),
        }
    if not config["weight_tying"]:
        shapes["ff_out"] = shapes["wte"]
    weights = {
        name: 2 * torch.randn(shape, generator=generator) / math.sqrt(shape[1]) for name, shape in shapes.items()
    }
    if config["layer_norm_with_affine"]:
        norms = [
            "ln_f",
            *(f"blocks.{i}.{norm}" for i in range(config["n_layers"]) for norm in ("attn_norm", "ff_norm")),
        ]
        weights |= {norm: 1 + torch.randn(d, generator=generator) / 4 for norm in norms}
    return {f"{prefix}transformer.{name}.weight": tensor for name, tensor in weights.items()}


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], form: str = "bin", shards: int = 1) -> Path:
    """A directory with config.json and the weights, if any; form: "bin" or "safetensors"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not weights:
        return folder
    stem, suffix = ("pytorch_model", ".bin") if form == "bin" else ("model", ".safetensors")
    names, files = sorted(weights), {}
    for number in range(shards):
        file = f"{stem}{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}{suffix}"
        part = {name: weights[name].contiguous() for name in names[number::shards]}
        torch.save(part, folder / file) if form == "bin" else save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": files}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """(rows, tokens, embedding_size) in float64, of `ids` (rows, tokens), by the original's formulas."""
    w = {name.partition("transformer.")[2].removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
    d, heads = config["d_model"], config["n_heads"]
    kv = config.get("n_kv_heads") or (1 if config["multi_query_attention"] else heads)
    size, tokens = d // heads, ids.shape[1]
    angles = torch.outer(
        torch.arange(tokens, dtype=torch.float64),
        1 / config.get("rope_theta", 10000) ** (torch.arange(0, size, 2, dtype=torch.float64) / size),
    ).repeat(1, 2)

    def norm(x: Tensor, name: str) -> Tensor:
        if config["layer_norm_type"] == "rms":
            return w[name] * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + config["layer_norm_eps"])
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    x = w["wte"][ids]
    for i in range(config["n_layers"]):
        qkv = norm(x, f"blocks.{i}.attn_norm") @ w[f"blocks.{i}.att_proj"].T
        if config["clip_qkv"] is not None:
            qkv = qkv.clamp(-config["clip_qkv"], config["clip_qkv"])
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in qkv.split([d, kv * size, kv * size], -1))
        k, v = (part.repeat_interleave(heads // kv, 1) for part in (turned(k), v))
        scores = turned(q) @ k.transpose(-1, -2) / math.sqrt(size)
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).flatten(-2) @ w[f"blocks.{i}.attn_out"].T
        up, gate = (norm(x, f"blocks.{i}.ff_norm") @ w[f"blocks.{i}.ff_proj"].T).chunk(2, -1)
        x = x + (up * gate * gate.sigmoid()) @ w[f"blocks.{i}.ff_out"].T
    head = w["wte"] if config["weight_tying"] else w["ff_out"]
    return norm(x, "ln_f") @ head.T


def native_weights(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the native conversion, cut by hand."""
    w = {name.partition("transformer.")[2].removesuffix(".weight"): tensor for name, tensor in weights.items()}
    d, inner = config["d_model"], (config["mlp_hidden_size"] or config["mlp_ratio"] * config["d_model"]) // 2
    native = {"model.embed_tokens": w["wte"]}
    if not config["weight_tying"]:
        native["lm_head"] = w["ff_out"]
    for i in range(config["n_layers"]):
        layer, fused = f"model.layers.{i}.", w[f"blocks.{i}.att_proj"]
        keys = (fused.shape[0] - d) // 2
        native |= {
            f"{layer}self_attn.q_proj": fused[:d],
            f"{layer}self_attn.k_proj": fused[d : d + keys],
            f"{layer}self_attn.v_proj": fused[d + keys :],
            f"{layer}self_attn.o_proj": w[f"blocks.{i}.attn_out"],
            f"{layer}mlp.up_proj": w[f"blocks.{i}.ff_proj"][:inner],
            f"{layer}mlp.gate_proj": w[f"blocks.{i}.ff_proj"][inner:],
            f"{layer}mlp.down_proj": w[f"blocks.{i}.ff_out"],
        }
        if f"blocks.{i}.attn_norm" in w:
            native[f"{layer}input_layernorm"] = w[f"blocks.{i}.attn_norm"]
            native[f"{layer}post_attention_layernorm"] = w[f"blocks.{i}.ff_norm"]
    if "ln_f" in w:
        native["model.norm"] = w["ln_f"]
    return {f"{name}.weight": tensor for name, tensor in native.items()}
