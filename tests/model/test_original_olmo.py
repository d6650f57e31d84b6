"""Checkpoints in OLMo's original format: the logits of the original, the quantised weights of its native conversion."""

import json
import re

import bitsandbytes
import pytest
import torch
from helpers import original_olmo
from helpers.original_olmo import native_weights, random_weights, settings, write
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, OlmoConfig

from lowmem_npo.config import ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model import load_model, load_tokenizer
from lowmem_npo.model.loading import load_config

IDS = torch.tensor([[5, 17, 3, 99, 110, 8, 42, 64, 2, 119, 77, 31]])
RMS = {"layer_norm_type": "rms", "layer_norm_with_affine": True, "layer_norm_eps": 1e-6}
VARIANTS = {
    "as OLMo-7B": {},
    "tied, clipped": {"weight_tying": True, "clip_qkv": 1.5, "bias_for_layer_norm": True},  # of norms without weights
    "grouped queries": {"n_kv_heads": 2, "rope_theta": 500.0},
    "multi-query": {"multi_query_attention": True, "mlp_hidden_size": None, "mlp_ratio": 6},
    "no padding rows": {"embedding_size": None},
    "its first name": {"model_type": "olmo", "architectures": ["OLMoModelForCausalLM"]},
    "DataDecide": {**RMS, "eos_token_id": 50279, "vocab_size": 120},
}
FORMS = [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)]


def load(folder, **options):
    return load_model(ModelConfig(str(folder), device="cpu", **options))


def native(config, weights):
    """Its conversion, made by hand."""
    sizes = {
        "vocab_size": config["embedding_size"] or config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": (config["mlp_hidden_size"] or config["mlp_ratio"] * config["d_model"]) // 2,
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config.get("n_kv_heads") or (1 if config["multi_query_attention"] else None),
        "max_position_embeddings": 256,
        "rope_theta": config.get("rope_theta", 10000.0),
        "tie_word_embeddings": config["weight_tying"],
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if config["layer_norm_type"] == "rms":
        made = LlamaConfig(rms_norm_eps=config["layer_norm_eps"], **sizes)
    else:
        made = OlmoConfig(clip_qkv=config["clip_qkv"], **sizes)
    model = AutoModelForCausalLM.from_config(made)
    model.load_state_dict(native_weights(config, weights), strict=not config["weight_tying"])
    model.tie_weights()
    return model


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_are_those_of_the_original(variant, prefix, tmp_path):
    config = settings(**VARIANTS[variant])
    weights = random_weights(config, prefix)
    folder = write(tmp_path / "original", config, weights)
    model = load(folder, dtype="float32")
    exact = original_olmo.logits(config, weights, IDS)
    assert exact.std() > 1  # far from uniform: a wrong half would show
    assert torch.allclose(model(IDS).logits.double(), exact, rtol=1e-4, atol=1e-4)
    assert model.name_or_path == model.config.name_or_path == str(folder)
    native(config, weights).save_pretrained(tmp_path / "native")
    for dtype in ("float32", "bf16"):
        assert torch.equal(load(folder, dtype=dtype)(IDS).logits, load(tmp_path / "native", dtype=dtype)(IDS).logits)


@pytest.mark.parametrize("form, shards", FORMS)
def test_4_bit_weights_are_those_of_the_native_form(form, shards, tmp_path):
    config = settings()
    weights = random_weights(config)
    ours = load(write(tmp_path / "original", config, weights, form, shards), qlora=True)
    native(config, weights).save_pretrained(tmp_path / "native")
    theirs = load(tmp_path / "native", qlora=True)
    layers = [m for m in ours.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
        if one.dtype == torch.uint8:
            mine, their = one.quant_state.as_dict(packed=True), other.quant_state.as_dict(packed=True)
            assert mine.keys() == their.keys() and all(torch.equal(mine[key], their[key]) for key in mine), name
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_the_tokens_that_end_its_generation(tmp_path):
    folder = write(tmp_path, settings(), random_weights(settings()))
    assert load(folder).generation_config.eos_token_id == 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load(folder).generation_config.eos_token_id == [1, 7]


def test_a_native_configuration_beside_original_weights(tmp_path):
    """Relabelled: it was loaded as random weights once."""
    config = settings()
    weights = random_weights(config)
    native(config, weights).config.save_pretrained(tmp_path)
    native_config = json.loads((tmp_path / "config.json").read_text())
    model = load(write(tmp_path, native_config, weights), dtype="float32")
    assert torch.allclose(model(IDS).logits.double(), original_olmo.logits(config, weights, IDS), rtol=1e-4, atol=1e-4)


def test_the_configuration_as_the_converter_makes_it(tmp_path):
    write(tmp_path, settings(embedding_size=50304, vocab_size=50280, eos_token_id=0, pad_token_id=1), {})
    made = load_config(ModelConfig(str(tmp_path)))
    assert (made.vocab_size, made.eos_token_id, made.pad_token_id, made.bos_token_id) == (50304, 50279, 1, None)
    assert (made.hidden_size, made.intermediate_size, made.max_position_embeddings) == (64, 128, 256)
    assert made.model_type == "olmo" and made.architectures == ["OlmoForCausalLM"] and not made.attention_bias


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"layer_norm_with_affine": True}, "layer_norm_with_affine: True"),
        ({"layer_norm_type": "rms"}, "layer_norm_with_affine: False"),
        ({**RMS, "clip_qkv": 8.0}, "clip_qkv: 8.0"),
        ({"layer_norm_type": "other"}, "layer_norm_type: other"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps: 1e-06"),
        ({"alibi": True}, "alibi: True"),
        ({"rope": False}, "rope: False"),
        ({"include_bias": True}, "include_bias: True"),
        ({"attention_layer_norm": True}, "attention_layer_norm: True"),
        ({"activation_type": "gelu"}, "activation_type: gelu"),
        ({"block_type": "parallel"}, "block_type: parallel"),
        ({"scale_logits": True}, "scale_logits: True"),
        ({"norm_after": True}, "norm_after: True"),
        ({"d_model": None}, "lacks d_model"),
    ],
)  # fmt: skip
def test_what_has_no_native_form_is_refused_before_weights_are_read(changes, reason, tmp_path):
    write(tmp_path, settings(**changes), {})
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        load_config(ModelConfig(str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and "original format" in str(caught.value)


@pytest.mark.parametrize("method", [{"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}])
def test_stored_quantised_it_is_refused_as_others_are(method, tmp_path):
    config = settings(quantization_config=method)
    write(tmp_path, config, random_weights(config))
    with pytest.raises(UserError, match=f"The weights of '{tmp_path}' are stored quantised"):
        load_config(ModelConfig(str(tmp_path)))


def changed(weights, name, tensor):
    return {
        **{key: value for key, value in weights.items() if key != name},
        **({} if tensor is None else {name: tensor}),
    }


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.transformer.blocks.1.att_proj.weight", None, "lack model.layers.1.self_attn.k_proj.weight"),
        ("model.transformer.ff_out.weight", None, "lack lm_head.weight"),
        ("model.transformer.blocks.0.attn_norm.weight", torch.ones(64), "holds model.transformer.blocks.0.attn_norm"),
        ("model.transformer.blocks.0.att_proj.bias", torch.ones(192), "holds model.transformer.blocks.0.att_proj.bias"),
        ("model.transformer.wpe.weight", torch.ones(256, 64), "holds model.transformer.wpe.weight"),
        ("model.transformer.blocks.0.att_proj.weight", torch.ones(256, 64), "(256, 64) instead of (192, 64)"),
        ("model.transformer.blocks.0.ff_out.weight", torch.ones(64, 100), "(64, 100) instead of (64, 128)"),
        ("model.transformer.blocks.2.ff_out.weight", torch.ones(64, 128), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_other_tensors_than_the_configuration_says(name, tensor, message, form, tmp_path):
    config = settings()
    folder = write(tmp_path, config, changed(random_weights(config), name, tensor), form)
    if message is None:  # a layer more than there are is not used, and said
        lines = []
        load_model(ModelConfig(str(folder), device="cpu"), lines.append)
        assert lines == [f"Not used by OlmoForCausalLM: model.layers.2.mlp.down_proj.weight of '{folder}'."]
        return
    for check in (load_config, load_model):
        with pytest.raises(UserError, match=re.escape(message)):
            check(ModelConfig(str(folder), device="cpu"))


def test_settings_that_are_absent_are_judged_by_the_tensors(tmp_path):
    config, sizes = settings(), ("model_type", "d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size")
    short = {name: config[name] for name in (*sizes, "embedding_size", "weight_tying")}
    weights = random_weights(config)
    model = load(write(tmp_path, short, weights), dtype="float32")
    assert torch.allclose(model(IDS).logits.double(), original_olmo.logits(config, weights, IDS), rtol=1e-4, atol=1e-4)
    norm = {"model.transformer.ln_f.weight": torch.ones(64)}
    with pytest.raises(UserError, match="holds model.transformer.ln_f.weight"):
        load(write(tmp_path, short, weights | norm))


def test_a_head_beside_a_shared_one_is_refused(tmp_path):
    weights = random_weights(settings())
    with pytest.raises(UserError, match="shares the embedding with the head"):
        load(write(tmp_path, settings(weight_tying=True), weights))


@pytest.mark.parametrize("kind", ["OLMoTokenizer", "OLMoTokenizerFast", "GPTNeoXTokenizer", None])
def test_its_tokenizer_needs_no_code_of_its_own(kind, byte_model, tmp_path):
    expected = AutoTokenizer.from_pretrained(byte_model)
    write(tmp_path, settings(), {})
    expected.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content["auto_map"] = {"AutoTokenizer": ["tokenization_olmo_fast.OLMoTokenizerFast"] * 2}
    content.pop("tokenizer_class")
    file.write_text(json.dumps({**content, **({"tokenizer_class": kind} if kind else {})}))
    tokenizer = load_tokenizer(ModelConfig(str(tmp_path)))
    text = "Where was Ada born? In Lyon, 1912."
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (expected.eos_token_id, expected.pad_token_id)
