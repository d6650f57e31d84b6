"""DoRA, rank-stabilised LoRA, targets by pattern, modules trained whole: identity at first, then dense gradients."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import CONFIGS, states, tiny_model
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM, GPT2Config

from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.memory import fused
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model, reference_mode
from lowmem_npo.model.adapters import adapter_size, check_lora, extra_adapter
from lowmem_npo.model.saved_adapter import load_adapter
from lowmem_npo.training.reference.identity import weights_fingerprint

FORGET, RETAIN = random_rows(3, seed=1), random_rows(3, seed=2)
GPT2 = GPT2Config(
    vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1, bos_token_id=0, eos_token_id=1
)
UPPER = {"lora_layers": ("1",)}
KINDS = {  # the architecture, what is given, and how many modules run once for policy and reference
    "dora": ("llama", {"use_dora": True, "lora_targets": ("all-linear",), **UPPER}, 2),
    "dora, transposed": (GPT2, {"use_dora": True, "lora_targets": ("c_attn",)}, 1),
    "rslora": ("olmo2", {"use_rslora": True, "use_dora": True}, 1),
    "a pattern": ("llama", {"lora_targets": (r".*layers\.1\..*(up|down)_proj",)}, 2),
    "norms": ("gemma2", {"modules_to_save": ("norm",), **UPPER}, 1),
    "the last norm": ("olmo2", {"modules_to_save": ("model.norm",), **UPPER}, 2),
    "an mlp": ("llama", {"modules_to_save": ("layers.1.mlp",), "use_rslora": True, **UPPER}, 2),
    "a layer": ("llama", {"modules_to_save": ("layers.1",), "lora_targets": (r".*layers\.0\..*q_proj",)}, 1),
    "the embedding": ("llama", {"modules_to_save": ("embed_tokens",), **UPPER}, 0),
    "positions": (GPT2, {"modules_to_save": ("wpe",), "lora_targets": ("c_attn",), **UPPER}, 0),
}


def disturb(model):
    """Everything that is trained has moved away from where it begins."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_identity_and_hides_the_original(kind, dtype):
    architecture, options, _ = KINDS[kind]
    base = tiny_model(architecture, dtype=dtype)
    plain, weights = states(base), {name: p.clone() for name, p in base.named_parameters()}
    model = attach_lora(base, AdapterConfig(lora_r=3, **options))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(states(model), plain)
    fingerprint = weights_fingerprint(model)
    disturb(model)
    assert not torch.allclose(states(model), plain, rtol=1e-3, atol=1e-3)
    with reference_mode(model):
        assert torch.equal(states(model), plain)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = states(model)
    with extra_adapter(model, 2, 0):
        assert torch.equal(states(model), moved)
    assert torch.equal(states(model), moved)
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert weights_fingerprint(model) == fingerprint
    frozen = {n.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", ""): p
              for n, p in model.named_parameters() if not p.requires_grad}  # fmt: skip
    assert all(torch.equal(frozen[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("memory", [{"gradient_checkpointing": False, "sliced_float32": False}, {"tile_mlp": 5}])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_dense_float64(kind, memory, tmp_path):
    architecture, options, shared = KINDS[kind]
    model = attach_lora(tiny_model(architecture), AdapterConfig(lora_r=3, **options))
    apply_switches(model, MemoryConfig(**memory))
    disturb(model)
    run = make_trainer(model, tmp_path, FORGET, RETAIN)
    loss, expected = dense_step(run, FORGET, RETAIN)
    assert relative_error(step_gradients(run), expected) < 5e-6
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert len(run.passes.prefix.modules) == shared


@pytest.mark.parametrize("kind", [kind for kind, (_, options, _) in KINDS.items() if "modules_to_save" in options])
def test_trained_copies_in_float32_of_a_bfloat16_model_have_gradients(kind, tmp_path, monkeypatch):
    """Their weights are rounded for each pass; what recomputes a norm or an MLP in the backward pass finds those."""
    monkeypatch.setattr(fused, "ENGINE", "torch")  # norms as on a GPU
    architecture, options, _ = KINDS[kind]
    gradients = []
    for memory in ({"gradient_checkpointing": False, "sliced_float32": False}, {"tile_mlp": 5}):
        model = attach_lora(tiny_model(architecture, dtype=torch.bfloat16), AdapterConfig(lora_r=3, **options))
        apply_switches(model, MemoryConfig(**memory))
        disturb(model)
        gradients.append(step_gradients(make_trainer(model, tmp_path, FORGET, RETAIN)))
    plain, mine = gradients
    assert mine.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.norm() > 0 and (mine[name] - gradient).norm() < 0.1 * gradient.norm(), name


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ("norm", "embed_tokens")}])
def test_four_bit_layers(options, tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    model = load_model(ModelConfig(str(base), qlora=True, dtype="float32", device="cpu"))
    dense = AutoModelForCausalLM.from_pretrained(base)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense.get_submodule(name).weight.data = whole
    plain = states(model)
    runs = [
        make_trainer(
            attach_lora(lm.requires_grad_(False), AdapterConfig(lora_r=3, **options)), tmp_path, FORGET, RETAIN
        )
        for lm in (model, dense)
    ]
    with reference_mode(runs[0].model):
        assert torch.equal(states(runs[0].model), plain)
    mine = {name: p for name, p in runs[0].model.named_parameters() if p.requires_grad}
    for name, parameter in runs[1].model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, mine[name]) if "lora_A" not in name else None
            parameter.data.copy_(mine[name])
    loss, expected = dense_step(runs[1], FORGET, RETAIN)
    assert relative_error(step_gradients(runs[0]), expected) < 1e-4
    assert runs[0].state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    "architecture, options, quantized, message",
    [
        ("llama", {"modules_to_save": ("lm_head",)}, False, "the output head is in it"),
        ("llama", {"modules_to_save": ("model.nrom",)}, False, "matches no module of this LlamaForCausalLM"),
        ("gemma2", {"modules_to_save": ("embed_tokens",)}, False, "shares its input embedding with the output head"),
        ("llama", {"modules_to_save": ("down_proj",)}, True, "are held in 4 bits"),
        ("llama", {"modules_to_save": ("self_attn",)}, False, "No modules were targeted"),
        ("llama", {"modules_to_save": ("layers",)}, False, "is a list of modules, not one"),
        ("llama", {"lora_targets": (r".*lm_(head|tail)",)}, False, "that is the output head"),
        ("llama", {"lora_targets": (r".*layers\.9\..*",)}, False, "matches no layer of this LlamaForCausalLM"),
        ("llama", {"lora_targets": (r".*norm",)}, False, "PEFT cannot adapt these"),
        ("llama", {"lora_targets": (r".*(",)}, False, "is no regular expression"),
        ("llama", {"lora_targets": ("q_proj", r".*v_proj")}, False, "stands alone"),
        ("llama", {"lora_targets": (r".*v_proj",), "lora_layers": ("1",)}, False, "goes with names"),
    ],
)
def test_what_is_refused_before_weights_are_loaded(architecture, options, quantized, message):
    with pytest.raises(UserError, match=message):
        check_lora(CONFIGS[architecture](97), AdapterConfig(**options), quantized)


def test_whole_modules_on_a_base_in_four_bits(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    attach_lora(tiny_model("llama"), AdapterConfig(modules_to_save=("down_proj", "norm"))).save_pretrained(
        str(tmp_path / "adapter")
    )
    base = ModelConfig(str(tmp_path / "base"), qlora=True, device="cpu")
    with pytest.raises(UserError, match=r"whole modules \(down_proj\) that this LlamaForCausalLM holds in 4 bits"):
        load_adapter(load_model(base), str(tmp_path / "adapter"))
    attach_lora(tiny_model("llama"), AdapterConfig(modules_to_save=("norm",))).save_pretrained(str(tmp_path / "norms"))
    assert load_adapter(load_model(base), str(tmp_path / "norms"))


STARTS = [
    {},
    *({"init_lora_weights": start} for start in (False, "gaussian", "eva", "orthogonal", "mica", "olora", "pissa")),
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    {"kasa_config": KasaConfig()},
]


@pytest.mark.parametrize("start", STARTS, ids=lambda start: str(next(iter(start.values()), True)).split("(")[0])
def test_an_adapter_whose_start_has_changed_the_base_is_refused(start, tmp_path):
    """It is right on the changed base alone, which nobody has saved."""
    base, config = tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **start)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    ids = torch.arange(2, 20)[None]
    if "lora_ga_config" in start:
        preprocess_loraga(base, config, lambda: base(input_ids=ids, labels=ids).loss.backward())
    adapted = get_peft_model(base, config)
    disturb(adapted)
    weights = {name.replace(".base_layer", ""): weight for name, weight in adapted.get_base_model().named_parameters()}
    is_changed = any(not torch.equal(weights[name], weight) for name, weight in before.items() if name in weights)
    adapted.save_pretrained(str(tmp_path))
    if is_changed:
        with pytest.raises(UserError, match="belongs to a base that its start has changed"):
            load_adapter(tiny_model("llama"), str(tmp_path))
    else:
        assert torch.equal(states(load_adapter(tiny_model("llama"), str(tmp_path))), states(adapted.eval()))


def test_how_many_weights_there_are():
    config = CONFIGS["llama"](97)
    lora = 2 * 2 * 5 * (32 + 32)
    assert adapter_size(check_lora(config, AdapterConfig())) == (lora, lora)
    dora = lora + 2 * 2 * 32
    assert adapter_size(check_lora(config, AdapterConfig(use_dora=True))) == (dora, dora)
    within = AdapterConfig(modules_to_save=("mlp", "q_proj"), lora_targets=("all-linear",))  # which get no LoRA
    assert adapter_size(check_lora(config, within))[0] == 2 * (3 * 5 * 64 + 32 * 32 + 3 * 32 * 48)
    whole = lora + 97 * 32
    embedding = AdapterConfig(modules_to_save=("embed_tokens",))
    assert adapter_size(check_lora(config, embedding)) == (whole, whole)
