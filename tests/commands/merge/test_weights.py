"""`lowmem-npo merge` writes the weights that PEFT merges in float64, rounded once."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import EXPERTS, HEADS, SIZES
from helpers.merges import IDS, logits, merge, merged_by_peft, saved_adapter, saved_base
from helpers.tiny_models import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, MixtralConfig

from lowmem_npo.config import ModelConfig
from lowmem_npo.model import load_model, merging
from lowmem_npo.model.checkpoint import WHOLE
from lowmem_npo.model.saved_adapter import load_adapter

GPT2 = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
MIXTRAL = MixtralConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=3, bos_token_id=None, eos_token_id=1,
)  # fmt: skip


def in_float32(model):
    with torch.no_grad():
        return model.float()(input_ids=IDS, use_cache=False).logits[0]


@pytest.mark.parametrize("bug", [None, "scale", "transposed", "twice"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ["olmo", "llama", "gemma2"])  # gemma2's head is its embedding
def test_weights_are_the_exact_sum_rounded_once(architecture, dtype, bug, tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    saved_base(base, architecture, dtype)
    adapter = saved_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])  # square: 32 x 32
    exact, added, product = merged_by_peft(base, adapter), merging.Update.applied_to, merging._product
    if bug:
        target, name, broken = {
            "scale": (merging, "_product", lambda layer: product(layer) / 2),  # without alpha / r
            "transposed": (merging, "_product", lambda layer: product(layer).T),
            "twice": (
                merging.Update,
                "applied_to",
                lambda u, w, t: w + added(u, torch.zeros_like(w), t),
            ),  # rounded twice
        }[bug]
        monkeypatch.setattr(target, name, broken)
    assert merge(adapter, out, "--dtype", "stored") == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == dtype
    wanted, got = exact.state_dict(), merged.state_dict()
    assert wanted.keys() == got.keys()
    # Rounded once: equal to float64's sum, rounded, but for ties that float32's own rounding decides.
    unequal = sum((wanted[name].to(dtype) != got[name]).sum().item() for name in wanted)
    total = sum(tensor.numel() for tensor in wanted.values())
    if dtype == torch.float32:
        close = all(torch.allclose(wanted[n], got[n].double(), rtol=1e-6, atol=1e-6) for n in wanted)
        assert close is (bug in (None, "twice"))  # in float32 rounding twice is within its own rounding
    else:
        assert (unequal <= 1e-3 * total) is (bug is None)
        near = torch.allclose(logits(merged), logits(exact), rtol=0.05, atol=0.05 * logits(exact).std().item())
        assert near or bug


@pytest.mark.parametrize("architecture", ["glm4_moe", "hy_v3"])  # the second stores it under another name
def test_what_transformers_keeps_in_float32_is_not_rounded(architecture, tmp_path):
    """Biases by which experts are chosen: bfloat16 would make ties of them."""
    config = AutoConfig.for_model(architecture, vocab_size=97, **SIZES, **EXPERTS, **HEADS)
    model, base, out = tiny_model(config), tmp_path / "base", tmp_path / "out"
    biases = [weight for name, weight in model.state_dict().items() if "e_score_correction_bias" in name]
    for bias in biases:
        bias.copy_(7.5 + 0.001 * torch.arange(len(bias)))
    model.save_pretrained(base)
    assert merge(saved_adapter(base, tmp_path / "adapter", target_modules=["q_proj"]), out) == 0
    merged = load_file(out / WHOLE)
    kept = [weight for weight in merged.values() if weight.dtype == torch.float32]
    assert biases and len(kept) == len(biases) and all(map(torch.equal, kept, biases))
    assert {weight.dtype for weight in merged.values()} == {torch.float32, torch.bfloat16}


def test_rank_stabilised_scale(tmp_path):
    saved_base(tmp_path / "base", dtype=torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", use_rslora=True)
    assert merge(adapter, tmp_path / "out", "--dtype", "stored") == 0
    exact = merged_by_peft(tmp_path / "base", adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(exact), rtol=1e-4, atol=1e-4)


def test_layers_with_transposed_weights(tmp_path):
    """GPT-2: (inputs, outputs), and tensor names without "transformer.", or, in one layer, with it twice."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2).eval()
    model.save_pretrained(tmp_path / "base")
    renamed = {
        f"transformer.{name}" if ".h.1." in name else name.removeprefix("transformer."): value
        for name, value in model.state_dict().items()
    }
    renamed.pop("lm_head.weight")
    merging.save_file(renamed, tmp_path / "base" / WHOLE, metadata={"format": "pt"})
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    assert merge(adapter, tmp_path / "out", "--dtype", "stored") == 0
    exact = merged_by_peft(tmp_path / "base", adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(exact), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(model), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "architecture, options",
    [
        ("llama", {"use_dora": True}),
        ("llama", {"use_dora": True, "use_rslora": True, "target_modules": ["embed_tokens", "o_proj", "up_proj"]}),
        (GPT2, {"use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("llama", {"modules_to_save": ["norm"]}),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"], "use_dora": True}),
        ("gemma2", {"modules_to_save": ["layers.0.mlp"], "target_modules": ["q_proj"]}),
        (GPT2, {"modules_to_save": ["wpe", "ln_f"], "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (None, {"modules_to_save": ["layers.0.mlp"], "target_modules": ["q_proj"]}),
    ],
    ids=["dora", "dora, embedding", "dora, transposed", "norms", "head, embedding", "mlp", "positions", "experts"],
)
def test_dora_and_modules_trained_whole_as_peft_merges_them(architecture, options, tmp_path, capsys):
    torch.manual_seed(0)
    saved_base(tmp_path / "base", architecture or MIXTRAL, torch.float32, max_shard_size="20KB")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    assert merge(adapter, tmp_path / "out", "--dtype", "stored") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = merged_by_peft(tmp_path / "base", adapter).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert merged.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(merged[name].double(), wanted[name], rtol=1e-5, atol=1e-6)
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert f"The adapter changes {len(changed)} of" in capsys.readouterr().out or architecture is None
    if "modules_to_save" in options:  # the trained weights themselves, and not a rounding of them
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        for name, weight in stored.items():
            if ".lora_" not in name and architecture is not None:
                assert torch.equal(merged[name.removeprefix("base_model.model.")], weight)


@pytest.mark.parametrize(
    "config, options",
    [
        (None, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
        (None, {"target_modules": ["embed_tokens", "q_proj"]}),  # PEFT stores the embedding as well
        (None, {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"}),
        (MIXTRAL, {"target_modules": "all-linear"}),  # experts: one parameter, stored one by one
        (MIXTRAL, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
    ids=["patterns", "embedding", "regex", "experts", "some experts"],
)
def test_whatever_is_a_product_of_two_factors(config, options, tmp_path):
    """Ranks by layer, embeddings and experts: PEFT's own merge, and the base's own files."""
    base, out = tmp_path / "base", tmp_path / "out"
    torch.manual_seed(0)
    model = tiny_model() if config is None else AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base)
    adapter = saved_adapter(base, tmp_path / "adapter", **options)
    assert merge(adapter, out, "--dtype", "stored") == 0
    exact = in_float32(merged_by_peft(base, adapter))  # PyTorch multiplies experts in float32 at most
    merged = in_float32(AutoModelForCausalLM.from_pretrained(out))
    assert torch.allclose(merged, exact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, in_float32(model), rtol=1e-2, atol=1e-2)
    with safe_open(base / "model.safetensors", "pt") as before, safe_open(out / "model.safetensors", "pt") as after:
        assert set(before.keys()) == set(after.keys())
        changed = {name for name in before.keys() if not torch.equal(before.get_tensor(name), after.get_tensor(name))}  # noqa: SIM118
    if options.get("target_modules") == "all-linear":
        assert sum("experts" in name for name in changed) == 2 * 3 * 3
    loaded = load_adapter(load_model(ModelConfig(str(base), dtype="float32", device="cpu")), adapter)
    assert torch.allclose(in_float32(loaded), exact, rtol=1e-4, atol=1e-4)
