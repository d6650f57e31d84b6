"""What `lowmem-npo merge` cannot merge is one sentence, before anything is written."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from helpers.architectures import tiny_config
from helpers.merges import fails, merge, saved_adapter, saved_base
from helpers.tiny_models import tiny_model
from peft import LoraConfig
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_npo.cli import main
from lowmem_npo.errors import UserError
from lowmem_npo.model import merging
from lowmem_npo.model.checkpoint import INDEX
from lowmem_npo.model.continued import continued
from lowmem_npo.model.saved_adapter import load_adapter


def test_a_trained_module_that_is_tied_or_missing(tmp_path, capsys):
    saved_base(tmp_path / "base", "gemma2", torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", modules_to_save=["embed_tokens"])
    capsys.readouterr()  # what saving has shown
    fails(capsys, merge(adapter, tmp_path / "out"), "changes model.embed_tokens, which the base shares")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", modules_to_save=["model.norm"])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stored.pop("base_model.model.model.norm.weight")
    merging.save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    fails(capsys, merge(adapter, tmp_path / "out"), "is not whole: it lacks model.norm.weight")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"init_lora_weights": "pissa"}, "a base that its start has changed"),
        ({"kasa_config": KasaConfig()}, "a base that its start has changed"),
        ({"monteclora_config": MontecloraConfig()}, "sampled factors"),
        ({"velora_config": VeloraConfig()}, "compressed inputs"),
    ],
)
def test_what_is_more_than_lora_is_refused(options, message, tmp_path, capsys):
    saved_base(tmp_path / "base", dtype=torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    fails(capsys, merge(adapter, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_embedding_beside_its_adapter_must_be_the_bases(tmp_path, capsys):
    saved_base(tmp_path / "base", dtype=torch.float32)
    adapter = tmp_path / "adapter"
    saved_adapter(tmp_path / "base", adapter, target_modules=["embed_tokens"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.base_layer.weight"][3] += 1
    merging.save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    fails(capsys, merge(adapter, tmp_path / "out"), "embed_tokens.base_layer.weight, which is not a factor")
    del weights["base_model.model.model.embed_tokens.lora_embedding_B"]
    del weights["base_model.model.model.embed_tokens.base_layer.weight"]
    merging.save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    fails(capsys, merge(adapter, tmp_path / "out"), "is not whole: it lacks", "lora_embedding_B")


def test_a_head_shared_with_the_embedding_is_refused(tmp_path, capsys):
    saved_base(tmp_path / "base", "gemma2", torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["lm_head"])
    capsys.readouterr()  # progress
    fails(capsys, merge(adapter, tmp_path / "out"), "lm_head, which the base shares with another layer")


def test_adapters_of_several_layers_on_one_weight_are_refused(tmp_path, capsys):
    """Zamba's hybrid layers have one attention in common, and each an adapter of its own on it."""
    saved_base(tmp_path / "base", tiny_config("zamba", 97), torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    capsys.readouterr()  # progress
    fails(capsys, merge(adapter, tmp_path / "out"), "q_proj, which the base shares with another layer")


def test_other_bases_and_damaged_files(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    saved_base(base)
    saved_adapter(base, adapter)
    shutil.copytree(base, tmp_path / "copy")
    capsys.readouterr()  # what transformers says of tiny models
    fails(capsys, merge(adapter, tmp_path / "out", "--model", str(tmp_path / "copy")), "was trained on", "--any-base")
    assert merge(adapter, tmp_path / "out", "--model", str(tmp_path / "copy"), "--any-base") == 0
    capsys.readouterr()  # progress
    fails(capsys, merge(adapter, tmp_path / "out"), "holds other files")
    fails(capsys, merge(adapter, base / "config.json"), "is a file")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.tex").write_text("")
    fails(capsys, merge(adapter, tmp_path / "new"), "in the way")
    fails(capsys, merge(base, tmp_path / "new"), "holds no adapter")
    wide = tmp_path / "wide"
    saved_base(wide, "llama", max_shard_size="12KB")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    fails(capsys, merge(adapter, tmp_path / "new2", "--model", str(wide), "--any-base"), "are quantised")
    (wide / "config.json").write_text(json.dumps(config))
    next(iter(wide.glob("*-of-*.safetensors"))).unlink()
    fails(capsys, merge(adapter, tmp_path / "new2", "--model", str(wide), "--any-base"), "is incomplete")
    (wide / INDEX).write_text("{}")
    fails(capsys, merge(adapter, tmp_path / "new2", "--model", str(wide), "--any-base"), "has no weight_map")
    for file in wide.glob("model*"):
        file.unlink()
    fails(
        capsys, merge(adapter, tmp_path / "new2", "--model", str(wide), "--any-base"), "has no weights in safetensors"
    )
    gone, empty = str(tmp_path / "gone"), str(tmp_path / "new.partial")
    fails(capsys, merge(adapter, tmp_path / "new2", "--model", gone, "--any-base"), f"There is no directory '{gone}'")
    fails(
        capsys, merge(adapter, tmp_path / "new2", "--model", empty, "--any-base"), "holds no model: there is no config"
    )
    (adapter / "adapter_config.json").write_text(
        json.dumps({**json.loads((adapter / "adapter_config.json").read_text()), "peft_type": "IA3"})
    )
    fails(capsys, merge(adapter, tmp_path / "new2"), "IA3")


@pytest.mark.parametrize("base_name", ["", " ", None, 7])
def test_an_adapter_that_names_no_base(base_name, byte_model, tmp_path, capsys, monkeypatch):
    """ "" as a path is the working directory: whatever model is there is not the adapter's."""
    adapter = saved_adapter(byte_model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base_name}))
    monkeypatch.chdir(byte_model)
    for command, more in (("merge", ()), ("evaluate", ("--limit", "1", "--device", "cpu"))):
        out = str(tmp_path / command)
        assert main([command, "--adapter", adapter, "--output-dir", out, *more]) == 2
        assert "does not name the model that it was trained on: give --model" in capsys.readouterr().err
        assert main([command, "--adapter", adapter, "--output-dir", out, "--model", str(byte_model), *more]) == 0
    assert merge(adapter, tmp_path / "any", "--model", str(byte_model), "--any-base") == 0


def test_an_adapter_of_other_shapes_or_layers(tmp_path, capsys):
    saved_base(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter")
    for change, message in (({"hidden_size": 16}, "does not fit"), ({"num_hidden_layers": 1}, "but the base has no")):
        config = tiny_model("olmo").config
        for name, value in change.items():
            setattr(config, name, value)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        fails(capsys, merge(adapter, tmp_path / "out", "--model", str(tmp_path / "other"), "--any-base"), message)
        shutil.rmtree(tmp_path / "other")


def test_an_adapter_that_is_no_numbers_is_refused(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    saved_base(base)
    saved_adapter(base, adapter)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    damaged = sorted(weights)[3]
    weights[damaged][0, 0] = torch.nan
    save_file(weights, file)
    message = f"1 of its {len(weights)} weights hold NaN or infinity, {damaged} among them"
    fails(capsys, merge(adapter, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="hold NaN or infinity"):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with pytest.raises(UserError, match="hold NaN or infinity"):
        continued(AutoModelForCausalLM.from_pretrained(base), str(adapter), LoraConfig(target_modules=["q_proj"]))


def test_a_configuration_that_is_none_is_named(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    saved_base(base)
    saved_adapter(base, adapter)
    file = adapter / "adapter_config.json"
    whole = json.loads(file.read_text())
    for field, value, message in (
        ("r", "x", "r must be a whole number, not 'x'"),
        ("r", 0, "r must be at least 1, not 0"),
        ("lora_alpha", math.nan, "lora_alpha must be a finite number, not nan"),
        ("alpha_pattern", {"q_proj": math.inf}, "alpha_pattern must be a finite number"),
        ("target_modules", 5, "target_modules must be text, not 5"),
        ("use_rslora", "yes", "use_rslora must be true or false, not 'yes'"),
        ("init_lora_weights", "loftq", "is not valid: `loftq_config` must be specified"),
    ):
        file.write_text(json.dumps(whole | {field: value}))
        fails(capsys, merge(adapter, tmp_path / "out"), message)
    file.write_text("[" * 100_000)
    fails(capsys, merge(adapter, tmp_path / "out"), "is not valid JSON")


def test_a_sum_that_is_no_number_is_refused(tmp_path, capsys):
    """Both factors are finite, their product is not."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    saved_base(base)
    saved_adapter(base, adapter, scale=1e25)
    fails(capsys, merge(adapter, tmp_path / "out"), "would hold NaN or infinity in the merged model")
    assert not (tmp_path / "out").exists()
