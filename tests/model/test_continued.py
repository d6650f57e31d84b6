"""A second adapter on a frozen first: the reference is the base with the first, and what is saved holds both."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import pytest
import torch
from helpers.architectures import tiny_config
from helpers.dense_step import make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import CONFIGS, states, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GPT2Config

from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model, reference_mode
from lowmem_npo.model.adapters import (
    adapter_size,
    adapter_weights,
    check_lora,
    extra_adapter,
    original_model,
    restore_adapter,
)
from lowmem_npo.model.continued import FIRST
from lowmem_npo.model.saved_adapter import load_adapter
from lowmem_npo.training.reference.identity import weights_fingerprint

FORGET, RETAIN = random_rows(3, seed=1), random_rows(3, seed=2)
GPT2 = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
CASES = {  # the architecture, and what its first adapter is
    "plain": ("llama", {}),
    "other layers, ranks and scales": (
        "llama",
        {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "rank_pattern": {"q_proj": 4}, "lora_dropout": 0.5,
         "alpha_pattern": {"down_proj": 9}, "use_rslora": True},
    ),
    "a pattern": ("gemma2", {"target_modules": r".*layers\.0\..*(up|v)_proj"}),
    "transposed": (GPT2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
}  # fmt: skip


def saved_first(folder, architecture="llama", **options) -> str:
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(tiny_model(architecture), LoraConfig(**{**settings, **options}))
    randomise(adapted, "lora_")
    adapted.save_pretrained(folder)
    return str(folder)


def randomise(model, part, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if part in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def continuing(folder, architecture="llama", **options):
    targets = ("c_attn",) if architecture is GPT2 else ("q_proj", "v_proj")
    return AdapterConfig(**{"adapter": folder, "lora_r": 3, "lora_alpha": 4, "lora_targets": targets, **options})


def independent_step(run, merged):
    """Loss and gradients in float64, of the formulas in docs/architecture.md: the reference is `merged`, an ordinary
    model, and the policy is `merged` with the products of the second adapter's factors added to its weights."""
    scale, transposed = 4 / 3, "GPT2" in type(merged).__name__
    factors = {n: p.detach().double().requires_grad_() for n, p in run.model.named_parameters() if p.requires_grad}
    weights = dict(merged.named_parameters())
    for name, a in factors.items():
        if ".lora_A." in name:
            product = scale * factors[name.replace("lora_A", "lora_B")] @ a
            layer = name.removeprefix("base_model.model.").partition(".lora_A")[0] + ".weight"
            weights[layer] = weights[layer] + (product.T if transposed else product)

    def table(row, of):
        ids = torch.tensor([row["input_ids"]])
        logits = functional_call(merged, of, kwargs={"input_ids": ids, "use_cache": False}).logits[0]
        answer = [t for t in range(len(row["labels"])) if row["labels"][t] != -100]
        chosen = logits[[t - 1 for t in answer]].log_softmax(-1)
        return chosen, chosen[torch.arange(len(answer)), torch.tensor(row["labels"])[answer]]

    loss, nll, kl, count = 0.0, 0.0, 0.0, 0
    beta, original = run.passes.objective.beta, dict(merged.named_parameters())
    for row in FORGET:
        ratio = table(row, weights)[1].sum() - table(row, original)[1].sum()
        loss = loss - 2 / beta * torch.nn.functional.logsigmoid(-beta * ratio) / len(FORGET)
    for row in RETAIN:
        (p, own), (q, _) = table(row, weights), table(row, original)
        nll, kl, count = nll - own.sum(), kl + (p.exp() * (p - q)).sum(), count + len(own)
    loss = loss + run.passes.objective.gamma * nll / count + run.passes.objective.delta * kl / count
    loss.backward()
    return loss.item(), {name: factor.grad for name, factor in factors.items()}


@pytest.mark.parametrize("memory", [{"gradient_checkpointing": False}, {"tile_mlp": 5}], ids=["plain", "tiled"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_dense_float64_with_the_merged_model_as_reference(case, memory, tmp_path):
    architecture, options = CASES[case]
    memory = {} if architecture is GPT2 and "tile_mlp" in memory else memory
    folder = saved_first(tmp_path / "first", architecture, **options)
    model = attach_lora(tiny_model(architecture), continuing(folder, architecture, lora_layers=("1",)))
    apply_switches(model, MemoryConfig(**memory))
    run = make_trainer(model, tmp_path / "run", FORGET, RETAIN)
    merged = PeftModel.from_pretrained(tiny_model(architecture).double(), folder).double().merge_and_unload()
    loss, expected = independent_step(run, merged.requires_grad_(False))
    assert relative_error(step_gradients(run), expected) < 5e-6
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert len(run.passes.prefix.modules) == 2  # the first adapter is frozen: what is below the second is shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_and_what_is_trained(dtype, tmp_path):
    folder = saved_first(tmp_path / "first", lora_dropout=0.5)  # of no effect now: the first adapter is frozen
    plain = states(tiny_model("llama", dtype=dtype))
    first = PeftModel.from_pretrained(tiny_model("llama", dtype=dtype), folder)
    model = attach_lora(tiny_model("llama", dtype=dtype), continuing(folder))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all(".default." in name for name in trained)
    assert torch.equal(states(model), states(first.eval())) and not torch.allclose(states(model), plain)
    run = make_trainer(model, tmp_path / "run", FORGET, RETAIN)
    for name, parameter in model.named_parameters():
        if name in trained and "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    run.train()
    log = run.state.log_history[0]
    assert log["forget_loss"] == pytest.approx(2 / run.passes.objective.beta * math.log(2), abs=1e-5)
    assert log["forget_log_ratio"] == pytest.approx(0, abs=1e-5) and log["retain_kl"] == 0
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    before = load_file(f"{folder}/adapter_model.safetensors")
    for name, weight in before.items():  # not trained, not even by weight decay
        parameter = model.get_parameter(name.replace(".weight", f".{FIRST}.weight"))
        assert torch.equal(parameter, weight)


def test_four_bit_layers(tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    folder = saved_first(tmp_path / "first")
    model = load_model(ModelConfig(str(base), qlora=True, dtype="float32", device="cpu"))
    run = make_trainer(attach_lora(model, continuing(folder)), tmp_path / "run", FORGET, RETAIN)
    dense = AutoModelForCausalLM.from_pretrained(base).double()
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense.get_submodule(name.removesuffix(".base_layer")).weight.data = whole.double()
    merged = PeftModel.from_pretrained(dense, folder).double().merge_and_unload().requires_grad_(False)
    loss, expected = independent_step(run, merged.eval())
    assert relative_error(step_gradients(run), expected) < 1e-4
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_one_adapter_that_peft_loads(case, tmp_path):
    architecture, options = CASES[case]
    model = attach_lora(
        tiny_model(architecture), continuing(saved_first(tmp_path / "first", architecture, **options), architecture)
    )
    original = states(model)
    randomise(model, ".lora_B.default")
    model.save_pretrained(str(tmp_path / "both"))
    again = load_adapter(tiny_model(architecture), str(tmp_path / "both"))
    with original_model(again):  # the base with the first adapter, also where the first one's files are gone
        torch.testing.assert_close(states(again), original, rtol=1e-5, atol=2e-6)
    loaded = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "both").eval()
    assert torch.equal(states(again), states(loaded))
    assert list(loaded.peft_config) == ["default"] and not (tmp_path / "both" / FIRST).exists()
    torch.testing.assert_close(states(loaded), states(model), rtol=1e-5, atol=2e-6)
    assert not torch.allclose(states(model), states(tiny_model(architecture)), atol=1e-2)

    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    saved = adapter_weights(model)
    randomise(model, ".default", seed=8)
    restore_adapter(model, saved)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in trained.items())


def test_modules_that_are_trained_whole_go_with_it(tmp_path):
    config = continuing(saved_first(tmp_path / "first"), modules_to_save=("model.norm",))
    model = attach_lora(tiny_model("llama"), config)
    original = states(model)
    randomise(model, "modules_to_save")
    assert not torch.allclose(states(model), original)
    with reference_mode(model):
        assert torch.equal(states(model), original)
    model.save_pretrained(str(tmp_path / "both"))
    loaded = load_adapter(tiny_model("llama"), str(tmp_path / "both"))
    torch.testing.assert_close(states(loaded), states(model), rtol=1e-5, atol=1e-6)
    with original_model(loaded):
        torch.testing.assert_close(states(loaded), original, rtol=1e-5, atol=1e-6)


def test_the_original_the_base_and_an_extra_adapter(tmp_path):
    folder = saved_first(tmp_path / "first")
    model = attach_lora(tiny_model("llama"), continuing(folder))
    original, base = states(model), states(tiny_model("llama"))
    randomise(model, ".lora_B.default")
    policy, trained = states(model), {name for name, p in model.named_parameters() if p.requires_grad}
    for context, expected in ((original_model, original), (lambda m: m.disable_adapter(), base)):
        with context(model):
            torch.testing.assert_close(states(model), expected, rtol=0, atol=1e-6)
        assert torch.equal(states(model), policy)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with extra_adapter(model, 2, 0):
        assert torch.equal(states(model), policy)
    assert torch.equal(states(model), policy)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_the_reference_is_named_after_both_models(tmp_path):
    """The key of the cached reference: the first adapter's weights and scale count, the second's do not."""
    prints = []
    for name, options in {"a": {}, "b": {"lora_alpha": 5}, "c": {"r": 3}, "again": {}}.items():
        model = attach_lora(tiny_model("llama"), continuing(saved_first(tmp_path / name, **options)))
        randomise(model, ".default", seed=len(prints))
        prints.append(weights_fingerprint(model))
    plain = weights_fingerprint(attach_lora(tiny_model("llama"), AdapterConfig()))
    assert len({*prints, plain}) == 4 and prints[0] == prints[3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "DoRA magnitudes.*no other adapter can add: merge it"),
        ({"modules_to_save": ["norm"]}, "whole modules.*no other adapter can add: merge it"),
        ({"bias": "lora_only"}, "biases.*no other adapter can add: merge it"),
        ({"init_lora_weights": "pissa"}, "a base that its start has changed.*use the merged model"),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"], "r": 3}, None),
    ],
)
def test_what_cannot_be_continued_is_refused_before_weights_are_loaded(options, message, tmp_path):
    folder = saved_first(tmp_path / "first", **options)
    config, lora = CONFIGS["llama"](97), continuing(folder)
    if message is None:
        trained, held = adapter_size(check_lora(config, lora))
        assert (trained, held) == (2 * 2 * 3 * 64, 2 * 2 * 3 * 64 + 3 * 64)
        return
    with pytest.raises(UserError, match=message):
        check_lora(config, lora)


EXPERTS = ("gate_proj", "up_proj", "down_proj")  # what PEFT takes to mean them


def test_experts_keep_to_one_adapter(tmp_path):
    """PEFT adds up the products of several, which rounds otherwise than one: step 1 would not be the identity."""
    config = tiny_config("dots1", 97)
    folder = saved_first(tmp_path / "first", config, target_modules=["q_proj", "v_proj"])
    with pytest.raises(UserError, match="the experts of this Dots1ForCausalLM cannot have an adapter beside another"):
        check_lora(config, continuing(folder, lora_targets=EXPERTS))
    model = attach_lora(tiny_model(config), continuing(folder))
    randomise(model, ".lora_B.default")
    model.save_pretrained(str(tmp_path / "both"))
    loaded = PeftModel.from_pretrained(tiny_model(config), tmp_path / "both").eval()
    torch.testing.assert_close(states(loaded), states(model), rtol=1e-5, atol=2e-6)
    experts = saved_first(tmp_path / "experts", config, target_modules=list(EXPERTS))
    with pytest.raises(UserError, match="has factors of experts .*merge it"):
        check_lora(config, continuing(experts))


def test_an_adapter_on_the_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="changes the output head, which must stay frozen"):
        check_lora(
            CONFIGS["llama"](97), continuing(saved_first(tmp_path / "first", target_modules=["lm_head", "q_proj"]))
        )


def test_an_adapter_for_another_model_is_refused(tmp_path):
    other = CONFIGS["llama"](97)
    other.intermediate_size = 64
    with pytest.raises(UserError, match=r"does not fit this LlamaForCausalLM: .*4 weights differ"):
        check_lora(other, continuing(saved_first(tmp_path / "first", target_modules=["down_proj", "up_proj"])))
    with pytest.raises(UserError, match="does not fit this LlamaForCausalLM"):
        folder = saved_first(tmp_path / "gpt2", GPT2, target_modules=["c_attn"])
        check_lora(CONFIGS["llama"](97), continuing(folder))
    with pytest.raises(UserError, match="There is no directory"):
        check_lora(CONFIGS["llama"](97), continuing(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="--use-dora scales the base's own weights"):
        AdapterConfig(adapter="x", use_dora=True)


def test_layers_named_like_an_adapter(tmp_path):
    """PEFT finds an adapter's weights by its name within theirs."""

    def renamed():
        model = tiny_model("llama")
        for layer in model.model.layers:
            layer.mlp.default_proj, layer.mlp.first_proj = layer.mlp.up_proj, layer.mlp.down_proj
            del layer.mlp.up_proj, layer.mlp.down_proj
            layer.mlp.forward = lambda x, m=layer.mlp: m.first_proj(m.act_fn(m.gate_proj(x)) * m.default_proj(x))
        return model

    targets = ("default_proj", "first_proj")
    first = attach_lora(renamed(), AdapterConfig(lora_r=2, lora_targets=targets))
    randomise(first, "lora_B")
    first.save_pretrained(str(tmp_path / "first"))
    model = attach_lora(renamed(), continuing(str(tmp_path / "first"), lora_targets=targets))
    assert len([name for name, p in model.named_parameters() if p.requires_grad]) == 8
    torch.testing.assert_close(states(model), states(first), rtol=1e-5, atol=1e-6)
    randomise(model, ".lora_B.default", seed=9)
    model.save_pretrained(str(tmp_path / "both"))
    both = PeftModel.from_pretrained(renamed(), tmp_path / "both").eval()
    torch.testing.assert_close(states(both), states(model), rtol=1e-5, atol=2e-6)
