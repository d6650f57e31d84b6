"""The cache of quantised weights: the same model from it, and nothing from what is not whole or not its own."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from helpers.tiny_models import tiny_model
from transformers import PreTrainedModel

from lowmem_npo.config import AdapterConfig, ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.model.quantized_cache import IDENTITY
from lowmem_npo.training.reference.identity import weights_fingerprint


@pytest.fixture
def model(tmp_path) -> Path:
    return saved(tmp_path / "model", seed=0)


def saved(folder: Path, seed: int) -> Path:
    tiny_model("olmo2", dtype=torch.bfloat16, seed=seed).save_pretrained(folder)
    return folder


def loaded(model: Path, cache: Path | None, **options) -> tuple[PreTrainedModel, str]:
    """The model, and what was said."""
    lines: list[str] = []
    config = ModelConfig(str(model), qlora=True, device="cpu", quantized_cache=cache and str(cache), **options)
    return load_model(config, lines.append), " ".join(lines)


def fingerprint(model: PreTrainedModel) -> str:
    return weights_fingerprint(attach_lora(model, AdapterConfig()))


@pytest.mark.parametrize("double_quant", ["on", "off"])
def test_the_second_run_has_the_same_weights_and_quantises_nothing(double_quant, model, tmp_path, monkeypatch):
    plain, _ = loaded(model, None, double_quant=double_quant)
    first, said = loaded(model, tmp_path / "cache", double_quant=double_quant)
    assert "the 4-bit weights (0.00 GiB) are kept in" in said
    monkeypatch.setattr(bnb.functional, "quantize_4bit", None)
    second, said = loaded(model, tmp_path / "cache", double_quant=double_quant)
    assert "The 4-bit weights come from" in said and second.config.name_or_path == str(model)
    assert second.config.use_cache is False and not second.training
    assert not any(parameter.requires_grad for parameter in second.parameters())
    assert fingerprint(second) == fingerprint(first) == fingerprint(plain)


def test_other_weights_and_another_recipe_have_entries_of_their_own(model, tmp_path):
    cache = tmp_path / "cache"
    first, _ = loaded(model, cache)
    for other in ({"double_quant": "off"}, {"dtype": "float32"}):
        loaded(model, cache, **other)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    corrected, said = loaded(model, cache)
    assert "are kept in" in said and corrected.config.rms_norm_eps == 0.5
    saved(model, seed=1)  # the same directory
    changed, said = loaded(model, cache)
    assert "are kept in" in said and fingerprint(changed) != fingerprint(first)
    assert len(list(cache.iterdir())) == 5


def test_an_entry_of_other_weights_or_a_damaged_one_is_refused(model, tmp_path):
    cache = tmp_path / "cache"
    loaded(model, cache)
    (entry,) = cache.iterdir()
    weights, identity = entry / "model.safetensors", entry / IDENTITY
    content = identity.read_text()
    identity.write_text(content.replace("nf4", "fp4"))
    with pytest.raises(UserError, match="was made from other weights or another quantisation, or is damaged: remove"):
        loaded(model, cache)
    identity.write_text(content)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="--quantized-cache: '.*' cannot be read: remove it"):
        loaded(model, cache)
    shutil.rmtree(entry)
    assert "are kept in" in loaded(model, cache)[1]


@pytest.mark.parametrize("kind", ["full while writing", "no room"])
def test_on_a_full_disk_nothing_half_written_counts(kind, model, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def fill(self, folder, **options):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    if kind == "no room":
        monkeypatch.setattr("lowmem_npo.model.quantized_cache.free_bytes", lambda path: 10)
    else:
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill)
    first, said = loaded(model, cache)
    reason = "0.00 GiB are free" if kind == "no room" else "No space left on device"
    assert "the weights are not kept" in said and reason in said and not list(cache.iterdir())
    monkeypatch.undo()
    assert "are kept in" in loaded(model, cache)[1]


def test_without_4_bits_there_is_nothing_to_keep(model, tmp_path):
    with pytest.raises(UserError, match="--quantized-cache keeps 4-bit weights: give --qlora, or leave it out"):
        ModelConfig(str(model), quantized_cache="x")
    stored, _ = loaded(model, None)
    stored.save_pretrained(tmp_path / "stored")
    with pytest.raises(UserError, match="are stored in 4 bits already: leave it out"):
        loaded(tmp_path / "stored", tmp_path / "cache")


def test_held_on_the_host_for_streaming(model, tmp_path):
    for _ in range(2):
        config = ModelConfig(str(model), qlora=True, device="cpu", quantized_cache=str(tmp_path / "cache"))
        kept = load_model(config, lambda line: None, on_host=True)
    assert fingerprint(kept) == fingerprint(loaded(model, None)[0])
