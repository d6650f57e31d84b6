"""The weights that an adapter is merged into are, bit for bit, those that a QLoRA run computes with."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from helpers.architectures import tiny_config
from helpers.tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from lowmem_npo.config import ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model import load_model
from lowmem_npo.model.checkpoint import find_checkpoint
from lowmem_npo.model.dequantized import DequantizedBase
from lowmem_npo.model.loading import DTYPES
from lowmem_npo.model.merging import write_merged
from lowmem_npo.model.quantization import nf4

IDS = torch.arange(2, 30)[None]
DTYPE = ["bf16", "float32"]


def saved(folder, architecture, dtype=torch.float32):
    config = architecture if architecture in ("olmo", "llama", "gemma2") else tiny_config(architecture, 97)
    tiny_model(config, dtype=dtype).save_pretrained(folder, max_shard_size="20KB")
    return find_checkpoint(str(folder))


# gemma2: a head that is its embedding; gpt2: transposed weights, and names without a prefix; mixtral: experts, which
# stay whole; mamba: layers that are read as weights; falcon: linear layers of its own class.
@pytest.mark.parametrize("dtype", DTYPE)
@pytest.mark.parametrize("architecture", ["olmo", "gemma2", "gpt2", "mixtral", "mamba", "falcon"])
def test_they_are_those_of_the_loaded_model(architecture, dtype, tmp_path):
    checkpoint = saved(tmp_path, architecture)
    loaded = load_model(ModelConfig(str(tmp_path), qlora=True, dtype=dtype, device="cpu"))
    base, computed = DequantizedBase.of(checkpoint, DTYPES[dtype]), {}
    for name, layer in loaded.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            computed[checkpoint.name_of(f"{name}.weight")] = weight.T if architecture == "gpt2" else weight
    assert base.rounded.keys() == computed.keys() and computed
    for name, weight in computed.items():
        own = base(name, checkpoint.tensor(name))
        assert own.dtype == DTYPES[dtype] and torch.equal(own, weight)
        assert not torch.equal(own.float(), checkpoint.tensor(name).float())  # rounded
    for name in set(checkpoint.tensors()) - set(computed):
        assert torch.equal(base(name, checkpoint.tensor(name)), checkpoint.tensor(name))


def test_a_simpler_recipe_is_noticed(tmp_path):
    """Scales that are not quantised in turn give other weights: the comparison above would fail."""
    checkpoint = saved(tmp_path, "llama")
    base = DequantizedBase.of(checkpoint, torch.float32)
    name = next(iter(base.rounded))
    own = base(name, checkpoint.tensor(name))
    base.recipe.bnb_4bit_use_double_quant = False
    assert not torch.equal(base(name, checkpoint.tensor(name)), own)


def test_written_out_they_compute_the_same(tmp_path):
    checkpoint, out = saved(tmp_path / "base", "llama"), tmp_path / "out"
    out.mkdir()
    write_merged(checkpoint, {}, out, None, DequantizedBase.of(checkpoint, torch.float32), progress=False)
    four_bits = load_model(ModelConfig(str(tmp_path / "base"), qlora=True, dtype="float32", device="cpu"))
    models = [AutoModelForCausalLM.from_pretrained(out), four_bits]
    with torch.no_grad():
        written, computed = (model(input_ids=IDS, use_cache=False).logits for model in models)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=IDS, use_cache=False).logits
    scale = computed.std().item()
    assert torch.allclose(written, computed, rtol=0, atol=1e-4 * scale)
    assert not torch.allclose(whole, computed, rtol=0, atol=1e-2 * scale)


def test_a_layer_that_is_stored_in_parts_is_refused(tmp_path, monkeypatch):
    checkpoint = saved(tmp_path, "llama")
    monkeypatch.setattr("lowmem_npo.model.dequantized.revert_weight_conversion", lambda model, parts: {"a": 1, "b": 1})
    monkeypatch.setattr(type(checkpoint), "name_of", lambda self, name: None)
    with pytest.raises(UserError, match="stores model.layers.0.self_attn.q_proj.weight in parts"):
        DequantizedBase.of(checkpoint, torch.float32)


def test_what_is_no_number_stays_none():
    """A merge refuses it; 4 bits would have made one of it."""
    weight = torch.ones(4, 64)
    weight[2, 3] = torch.nan
    base = DequantizedBase(nf4(torch.float32), {"w": False})
    assert base("w", torch.ones(4, 64)).isfinite().all() and base("w", weight).isnan().any()
