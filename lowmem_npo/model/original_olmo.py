"""OLMo's original format, in which AllenAI published the first OLMo releases, all their intermediate checkpoints, and
the DataDecide suite: its configuration and its tensors in the terms of a native transformers model.

The authorities are AllenAI's own code (allenai/OLMo: olmo/config.py, olmo/model.py) and the converter that transformers
had for it (convert_olmo_weights_to_hf.py). Two forms have a native counterpart: layer norm without weights is
transformers' Olmo, RMSNorm with weights is its Llama; both blocks are otherwise the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from transformers import LlamaConfig, OlmoConfig, PretrainedConfig

from lowmem_npo.errors import UserError

# Of a block, and beside the blocks: module -> what its rows are, from the first to the last.
BLOCK = {
    "att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "ff_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "ff_out": ("mlp.down_proj",),
    "attn_norm": ("input_layernorm",),
    "ff_norm": ("post_attention_layernorm",),
}
BESIDE_BLOCKS = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
NORMS = ("attn_norm", "ff_norm", "ln_f")
TENSOR = re.compile(r"(model\.)?transformer\.(blocks\.(?P<layer>\d+)\.)?(?P<module>\w+)\.weight")
# Setting -> the only value with a native form. One that is absent is judged by the tensors.
NATIVE = {
    "activation_type": "swiglu",
    "block_type": "sequential",
    "block_group_size": 1,
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "embedding_layer_norm": False,
    "norm_after": False,
    "scale_logits": False,
    "moe_interleave": False,
}
EPS = 1e-5  # of the native layer norm


class Rows(NamedTuple):
    """A tensor of the native model: rows of a stored one."""

    stored: str
    start: int
    stop: int


def is_original(configuration: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is in the original format, which was called `olmo`, too, before there was a
    native one."""
    kind = configuration.get("model_type")
    return kind == "hf_olmo" or (kind == "olmo" and "d_model" in configuration and "hidden_size" not in configuration)


def is_original_tensor(name: str) -> bool:
    return bool(_native_names(name)[1])


def native_config(configuration: Mapping[str, Any], where: str) -> PretrainedConfig:
    """The content of an original config.json as a native configuration.

    Raises:
        UserError: a model without native form, or without its sizes; `where` is its name.
    """
    given = {name: value for name, value in configuration.items() if value is not None}  # null is the default
    for name, native in NATIVE.items():
        if given.get(name, native) != native:
            raise _without_native_form(where, name, given[name])
    if lacking := [name for name in ("d_model", "n_heads", "n_layers", "vocab_size") if name not in given]:
        raise UserError(f"'{where}' is in OLMo's original format, but its config.json lacks {lacking[0]}.")
    heads, inner = given["n_heads"], given.get("mlp_hidden_size") or given.get("mlp_ratio", 4) * given["d_model"]
    kind, own = _kind(given, where)
    return kind(
        architectures=[f"{kind.__name__.removesuffix('Config')}ForCausalLM"],
        vocab_size=given.get("embedding_size", given["vocab_size"]),
        hidden_size=given["d_model"],
        intermediate_size=inner // 2,
        num_hidden_layers=given["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=given.get("n_kv_heads", 1 if given.get("multi_query_attention") else heads),
        max_position_embeddings=given.get("max_sequence_length", 1024),
        rope_parameters={"rope_type": "default", "rope_theta": float(given.get("rope_theta", 10000))},
        initializer_range=given.get("init_std", 0.02),
        tie_word_embeddings=given.get("weight_tying", True),
        pad_token_id=given.get("pad_token_id"),
        bos_token_id=None,
        eos_token_id=_eos(given),
        name_or_path=where,
        **({"quantization_config": given["quantization_config"]} if "quantization_config" in given else {}),
        **own,
    )


def native_tensors(stored: Mapping[str, tuple[int, ...]], config: PretrainedConfig, where: str) -> dict[str, Rows]:
    """Tensor of the native model -> where it is.

    Args:
        stored: the shape of each stored tensor.
        config: as `native_config` makes it.

    Raises:
        UserError: a tensor that the native model has no place for, or whose rows are not those of its configuration.
    """
    places: dict[str, Rows] = {}
    head = config.hidden_size // config.num_attention_heads
    keys, inner = config.num_key_value_heads * head, config.intermediate_size
    split = {"att_proj": (config.hidden_size, keys, keys), "ff_proj": (inner, inner)}
    for name, shape in stored.items():
        if name.endswith("rotary_emb.inv_freq"):  # computed from the configuration
            continue
        module, natives = _native_names(name)
        if not natives or (module in NORMS and config.model_type == "olmo"):
            raise UserError(f"'{where}' holds {name}: OLMo's original format with it has no native form.")
        if natives == ["lm_head"] and config.tie_word_embeddings:
            raise UserError(f"'{where}' holds a head, {name}, but its config.json shares the embedding with the head.")
        counts = split.get(module, shape[:1])
        if shape[0] != sum(counts):
            misfit = f"{name} {shape} instead of {(sum(counts), *shape[1:])}"
            raise UserError(f"The weights of '{where}' do not have the shapes of its configuration: {misfit}.")
        ends = list(accumulate(counts))
        for native, count, end in zip(natives, counts, ends, strict=True):
            places[f"{native}.weight"] = Rows(name, end - count, end)
    return places


def _native_names(name: str) -> tuple[str, list[str]]:
    """The module that a stored tensor is the weight of, and the native modules that its rows belong to."""
    match = TENSOR.fullmatch(name)
    if match is None:
        return "", []
    module, layer = match["module"], match["layer"]
    if layer is not None:
        return module, [f"model.layers.{layer}.{native}" for native in BLOCK.get(module, ())]
    return module, [BESIDE_BLOCKS[module]] if module in BESIDE_BLOCKS else []


def _kind(given: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """The native configuration's class, and the settings that it alone has."""
    norm, weights = given.get("layer_norm_type", "default"), given.get("layer_norm_with_affine")
    eps = given.get("layer_norm_eps", EPS)
    if norm == "rms":
        if weights is False:
            raise _without_native_form(where, "layer_norm_with_affine", weights)
        if "clip_qkv" in given:
            raise _without_native_form(where, "clip_qkv", given["clip_qkv"])
        return LlamaConfig, {"rms_norm_eps": eps}
    if norm not in ("default", "low_precision", "amd_compatible"):  # the same function
        raise _without_native_form(where, "layer_norm_type", norm)
    if weights:
        raise _without_native_form(where, "layer_norm_with_affine", weights)
    if eps != EPS:
        raise _without_native_form(where, "layer_norm_eps", eps)
    return OlmoConfig, {"clip_qkv": given.get("clip_qkv")}


def _eos(given: Mapping[str, Any]) -> int | None:
    """Early configurations say 0, but the <|endoftext|> of their tokenizer is 50279; the converter mends that, too."""
    eos = given.get("eos_token_id")
    return 50279 if eos == 0 and given["vocab_size"] == 50280 else eos


def _without_native_form(where: str, name: str, value: Any) -> UserError:
    return UserError(f"'{where}' is in OLMo's original format with {name}: {value}, which has no native form.")
