"""A base in OLMo's original format through every command, beside its native conversion: the same numbers."""

import json
import shutil

import pytest
import torch
from helpers.original_olmo import native_weights, random_weights, settings, write
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoConfig

from lowmem_npo.cli import main

CONFIG = settings(embedding_size=320, vocab_size=258, n_kv_heads=2, clip_qkv=8.0)


@pytest.fixture(scope="module")
def bases(byte_model, tmp_path_factory):
    """Two directories with the same model and tokenizer: "original", in two files, and "native"."""
    folder, weights = tmp_path_factory.mktemp("bases"), random_weights(CONFIG)
    original = write(folder / "original", CONFIG, weights, shards=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_model / name, original / name)
    settings_file = original / "tokenizer_config.json"
    content = json.loads(settings_file.read_text()) | {
        "tokenizer_class": "OLMoTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_olmo_fast.OLMoTokenizerFast"]},
    }
    settings_file.write_text(json.dumps(content))
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(folder / "native")
    OlmoConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, clip_qkv=8.0, pad_token_id=0, eos_token_id=1,
        architectures=["OlmoForCausalLM"],
    ).save_pretrained(folder / "native")  # fmt: skip
    native = {name: tensor.contiguous() for name, tensor in native_weights(CONFIG, weights).items()}
    save_file(native, folder / "native" / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_train_evaluate_and_merge(bases, tmp_path, capsys):
    def run(command, name, *options):
        assert main([command, *map(str, options)]) == 0, (command, name, capsys.readouterr().err)
        return capsys.readouterr().out

    adapters, logits = {}, {}
    for name in ("original", "native"):
        model, out = ("--model", bases / name, "--qlora", "--device", "cpu"), tmp_path / name
        training = ("--max-steps", 2, "--eval-rows", 2, "--max-length", 128, "--output-dir", out)
        assert "Dry run: data, model and disk are fine" in run("train", name, *model, *training, "--dry-run")
        run("train", name, *model, *training)
        adapters[name] = load_file(out / "adapter_model.safetensors")
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bases / name)
        run(
            "evaluate", name, "--adapter", out, "--qlora", "--device", "cpu", "--limit", 2, "--output-dir", out / "eval"
        )
        run("merge", name, "--adapter", out, "--output-dir", tmp_path / f"{name} merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} merged").eval()
        assert (merged.config.model_type, merged.dtype) == ("olmo", torch.bfloat16)
        logits[name] = merged(torch.arange(2, 40)[None]).logits
    ours, theirs = adapters["original"], adapters["native"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(ours[key].any() for key in ours if "lora_B" in key)
    assert torch.equal(logits["original"], logits["native"])
    scores = [json.loads((tmp_path / name / "eval" / "evaluation.json").read_text()) for name in adapters]
    assert scores[0]["answers"] == scores[1]["answers"]
    merged = tmp_path / "original merged"
    assert sorted(path.name for path in merged.glob("*model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip
    tokenizer, expected = (AutoTokenizer.from_pretrained(folder) for folder in (merged, bases / "native"))
    assert tokenizer("Lyon, 1912")["input_ids"] == expected("Lyon, 1912")["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


def test_estimate(bases, capsys):
    estimates = {}
    for name in ("original", "native"):
        assert main(["estimate", "--model", str(bases / name), "--max-length", "64", "--json"]) == 0
        estimates[name] = json.loads(capsys.readouterr().out)
        assert estimates[name].pop("model") == str(bases / name)
    assert estimates["original"] == estimates["native"]


def test_a_revision_of_an_original_repository_is_its_own(capsys, monkeypatch):
    """Its native conversion has no such revision."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    options = ("--model", "allenai/OLMo-7B", "--revision", "step1000-tokens4B", "--dry-run", "--output-dir", "unused")
    assert main(["train", *options]) == 2
    assert "The model 'allenai/OLMo-7B' at revision 'step1000-tokens4B' is not on" in capsys.readouterr().err
