"""All weights of an adapter arrive, also where transformers renames, in old checkpoints, what now has such a name."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.architectures import EXPERTS, HEADS, random_model
from helpers.rows import write_rows
from helpers.saved_adapters import same_adapter
from helpers.tiny_models import SIZES, states, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lowmem_npo.cli import main
from lowmem_npo.config import AdapterConfig, ModelConfig
from lowmem_npo.console import silent
from lowmem_npo.errors import UserError
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.model.adapters import adapter_weights, restore_adapter
from lowmem_npo.model.saved_adapter import load_adapter
from lowmem_npo.run_directory import AdapterFiles, RunFiles

LAGUNA = {
    **HEADS, **EXPERTS, "num_key_value_heads": 4, "sliding_window": 16, "shared_expert_intermediate_size": 24,
    "layer_types": ["full_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
INKLING = {
    **HEADS, **EXPERTS, "sliding_window": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "layer_types": ["hybrid_sliding", "hybrid"],
}  # fmt: skip
KINDS = {  # architecture, its sizes, the adapter
    "laguna": ("laguna", LAGUNA, {}),
    "inkling": ("inkling2_text", INKLING, {}),
    "renamed": ("llama", {}, {}),
    "renamed, dora": ("llama", {}, {"use_dora": True}),
    "renamed, whole modules": ("llama", {}, {"modules_to_save": ("norm", "layers.1.mlp.up_proj"),
                                             "lora_targets": ("gate_proj",)}),
    "experts": ("dots1", {**HEADS, **EXPERTS, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
                          "first_k_dense_replace": 1, "n_shared_experts": 1},
                {"lora_targets": ("gate_proj", "up_proj", "down_proj")}),
}  # fmt: skip


def config_of(architecture, sizes, vocabulary=97):
    if architecture not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False}
    return AutoConfig.for_model(architecture, vocab_size=vocabulary, **tokens, **{**SIZES, **sizes})


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """A configuration, and what its adapter is. A Llama is renamed by patterns that fit the new names as well."""
    architecture, sizes, adapter = KINDS[request.param]
    if "renamed" in request.param:
        names = ("self_attn.q_proj.", "mlp.gate_proj.", "mlp.up_proj.")
        conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the table
        table = conversion_mapping._checkpoint_conversion_mapping_cache
        monkeypatch.setitem(table, "llama", [WeightRenaming(name.replace("proj", "pro"), name) for name in names])
    return config_of(architecture, sizes), {"lora_r": 3, "lora_targets": ("all-linear",), **adapter}


def disturb(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_arrive(kind, dtype, tmp_path):
    config, adapter = kind
    model = attach_lora(tiny_model(config, dtype=dtype), AdapterConfig(**adapter))
    disturb(model)
    before, saved = trained(model), {name: weight.clone() for name, weight in adapter_weights(model).items()}
    model.save_pretrained(str(tmp_path))
    disturb(model, seed=8)
    restore_adapter(model, saved)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(model).items())

    loaded = load_adapter(tiny_model(config, dtype=dtype), str(tmp_path))
    weights = adapter_weights(loaded)
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], weight.to(weights[name].dtype)) for name, weight in saved.items())


@pytest.mark.parametrize("kind", ["laguna", "inkling", "renamed"], indirect=True)
def test_of_a_continued_adapter_too(kind, tmp_path):
    config, adapter = kind
    first = attach_lora(tiny_model(config), AdapterConfig(**adapter))
    disturb(first)
    first.save_pretrained(str(tmp_path))
    model = attach_lora(tiny_model(config), AdapterConfig(**adapter, adapter=str(tmp_path)))
    assert torch.equal(states(model), states(first))
    disturb(model)
    before, saved = trained(model), adapter_weights(model)
    disturb(model, seed=8)
    restore_adapter(model, saved)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(model).items())


def test_what_would_not_arrive_is_an_error(tmp_path):
    """Also where PEFT has other names for it, or PyTorch would repeat a row of it."""
    config = LlamaConfig(vocab_size=97, **SIZES)
    model = attach_lora(tiny_model(config), AdapterConfig(lora_r=3))
    model.save_pretrained(str(tmp_path))
    file = AdapterFiles(tmp_path).weights
    whole = load_file(file)
    name = min(name for name in whole if "lora_A" in name)
    others = {
        "1 weights have no counterpart": {n: w for n, w in whole.items() if n != name},
        "2 weights have no counterpart": {**{n: w for n, w in whole.items() if n != name}, f"{name}.": whole[name]},
        "1 weights have another shape": {**whole, name: whole[name][:1].clone()},
    }
    for message, weights in others.items():
        with pytest.raises(ValueError, match=message):
            restore_adapter(model, weights)
        save_file(weights, file)
        with pytest.raises(UserError, match="does not fit"):
            load_adapter(tiny_model(config), str(tmp_path))


def test_a_run_resumes_to_the_bit_and_merges(byte_model, tmp_path):
    """Laguna, through the commands: its shared experts were left as they begin."""
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    base = tmp_path / "base"
    random_model(config_of("laguna", LAGUNA, len(tokenizer))).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for part in ("forget", "retain"):
        write_rows(tmp_path / f"{part}.jsonl", [{"question": f"{part} {i}?", "answer": f"{i * i}."} for i in range(4)])

    def run(folder, *more):
        options = {"model": base, "dtype": "float32", "device": "cpu", "forget": tmp_path / "forget.jsonl",
                   "retain": tmp_path / "retain.jsonl", "batch-size": 2, "eval-rows": 0, "lr": 1e-2,
                   "lora-targets": "all-linear", "max-steps": 3, "save-steps": 1}  # fmt: skip
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        assert main(["train", *given, "--output-dir", str(folder), *more]) == 0

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole)
    run(cut)
    RunFiles(cut).weights.unlink()
    for file in (cut / "checkpoint-3").iterdir():
        file.unlink()
    (cut / "checkpoint-3").rmdir()
    run(cut, "--resume")
    assert same_adapter(whole, cut)

    assert main(["merge", "--adapter", str(whole), "--output-dir", str(tmp_path / "merged"), "--dtype", "stored"]) == 0
    ids = torch.arange(3, 15)[None]

    @torch.no_grad()
    def logits(model):
        return model(input_ids=ids, use_cache=False).logits

    original = load_model(ModelConfig(str(base), dtype="float32", device="cpu"), silent)
    plain, adapted = logits(original), logits(load_adapter(original, str(whole)))
    merged = logits(load_model(ModelConfig(str(tmp_path / "merged"), dtype="float32", device="cpu"), silent))
    assert (merged - adapted).norm() < 1e-4 * (adapted - plain).norm()
