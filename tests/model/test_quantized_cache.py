"""The cache of quantised weights: the same model from it, and nothing from what is not whole or not its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from helpers.tiny_models import tiny_model
from transformers import PreTrainedModel

from lowmem_npo.claim import LOCK
from lowmem_npo.config import AdapterConfig, ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.files import PARTIAL
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.model.loading import cache_entry, local_cache_entry
from lowmem_npo.model.quantized_cache import IDENTITY
from lowmem_npo.training.reference.identity import weights_fingerprint


@pytest.fixture
def model(tmp_path) -> Path:
    return saved(tmp_path / "model", seed=0)


def saved(folder: Path, seed: int) -> Path:
    tiny_model("olmo2", dtype=torch.bfloat16, seed=seed).save_pretrained(folder)
    return folder


def configured(model: Path, cache: Path | None, **options) -> ModelConfig:
    return ModelConfig(str(model), qlora=True, device="cpu", quantized_cache=cache and str(cache), **options)


def loaded(model: Path, cache: Path | None, **options) -> tuple[PreTrainedModel, str]:
    """The model, and what was said."""
    lines: list[str] = []
    return load_model(configured(model, cache, **options), lines.append), " ".join(lines)


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


def test_what_a_killed_process_left_beside_it_is_removed(model, tmp_path):
    """It was killed once the entry was in its place."""
    loaded(model, cache := tmp_path / "cache")
    (entry,) = cache.iterdir()
    left = cache / f"{entry.name}.partial"
    left.mkdir()
    (left / LOCK).write_text("")
    loaded(model, cache)
    assert [*cache.iterdir()] == [entry]


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


def test_an_entry_of_other_weights_or_a_damaged_one_is_refused(model, tmp_path, byte_model):
    cache = tmp_path / "cache"
    loaded(model, cache)
    (entry,) = cache.iterdir()
    identity, damaged = entry / IDENTITY, "was made from other weights or another quantisation, or is damaged: remove"
    content = identity.read_text()
    identity.write_text(content.replace("nf4", "fp4"))
    with pytest.raises(UserError, match=damaged):
        loaded(model, cache)
    identity.write_text(content)
    weights = entry / "model-00001.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])  # a disk that was full, a copy that was cut short
    for load in (loaded, lambda *where: local_cache_entry(configured(*where))):  # the latter before anything is loaded
        with pytest.raises(UserError, match=damaged):
            load(model, cache)
    weights.write_bytes(b"\xff" * len(whole))
    with pytest.raises(UserError, match="--quantized-cache: '.*' cannot be read: remove it, or leave the option out"):
        loaded(model, cache)
    shutil.rmtree(entry)
    assert "are kept in" in loaded(model, cache)[1]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("in_file", [False, True], ids=["in memory", "in the file"])
def test_on_a_full_disk_nothing_half_written_counts(in_file, model, tmp_path):
    """In memory, the run goes on without; if its weights were to stay in the files, it cannot."""
    cache, said = tmp_path / "cache", list[str]()
    with files_of_at_most(4096), pytest.raises(UserError) if in_file else nullcontext() as raised:
        load_model(configured(model, cache), said.append, on_host=in_file, in_file=in_file)
    said += [str(raised.value)] if in_file else []
    assert "--quantized-cache: the weights are not kept (" in said[-1] and "File too large" in said[-1]
    assert not cache.exists() or not list(cache.iterdir())
    assert "are kept in" in loaded(model, cache)[1]


def test_a_disk_without_room_for_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_npo.files.free_bytes", lambda path: 10)
    _, said = loaded(model, tmp_path / "cache")
    assert "the weights are not kept" in said and "10 bytes are free" in said and not (tmp_path / "cache").exists()


def test_two_runs_write_it_at_once(model, tmp_path):
    """The second does without, or waits if its weights are to stay there. What a killed run leaves is removed."""
    cache, options = tmp_path / "cache", {"on_host": True, "in_file": True}
    entry = cache_entry(configured(model, cache))
    partial = entry.path.with_name(entry.path.name + PARTIAL)
    with entry.being_written(print):
        _, said = loaded(model, cache)
        assert "the weights are not kept: another run is writing" in said
        with pytest.raises(UserError, match="another run is writing"):
            load_model(configured(model, cache), **options)
    assert not partial.exists() and not entry.exists()
    (partial / "entry").mkdir(parents=True)
    (partial / "entry" / "model-00000.safetensors").write_bytes(b"half")
    (partial / LOCK).write_text("{}")
    assert "are kept in" in loaded(model, cache)[1] and entry.exists() and not partial.exists()


def test_another_run_has_written_it_meanwhile(model, tmp_path):
    """Between the look for it and the lock: its entry stays."""
    cache, said = tmp_path / "cache", list[str]()
    mine = load_model(configured(model, None), said.append)
    entry = cache_entry(configured(model, cache))
    loaded(model, cache)
    before = (entry.path / IDENTITY).stat().st_mtime_ns
    entry.keep(mine, said.append)
    assert "are kept in" in said[-1] and (entry.path / IDENTITY).stat().st_mtime_ns == before


def test_a_directory_that_cannot_be_written(model, tmp_path, monkeypatch):
    """Refused before anything is loaded, unless the weights are there already."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--quantized-cache '.*/file/cache': '.*/file' is a file: choose a directory"):
        local_cache_entry(configured(model, tmp_path / "file" / "cache"))
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    if os.geteuid() == 0:  # whom no permission holds
        monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))
    config = configured(model, cache)
    with pytest.raises(UserError, match="--quantized-cache: '.*' cannot be written, and does not hold these weights"):
        local_cache_entry(config)
    cache.chmod(0o700)
    loaded(model, cache)
    cache.chmod(0o500)
    assert local_cache_entry(config).exists() and "come from" in loaded(model, cache)[1]


def test_without_4_bits_there_is_nothing_to_keep(model, tmp_path):
    with pytest.raises(UserError, match="--quantized-cache keeps 4-bit weights: give --qlora, or leave it out"):
        ModelConfig(str(model), quantized_cache="x")
    stored, _ = loaded(model, None)
    stored.save_pretrained(tmp_path / "stored")
    with pytest.raises(UserError, match="are stored in 4 bits already: leave it out"):
        loaded(tmp_path / "stored", tmp_path / "cache")
    with pytest.raises(UserError, match="are stored in 4 bits already: leave it out"):  # so says a dry run
        local_cache_entry(configured(tmp_path / "stored", tmp_path / "cache"))


def test_held_on_the_host_for_streaming(model, tmp_path):
    for _ in range(2):
        kept = load_model(configured(model, tmp_path / "cache"), lambda line: None, on_host=True)
    assert fingerprint(kept) == fingerprint(loaded(model, None)[0])
