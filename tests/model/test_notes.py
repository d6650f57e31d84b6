"""What a configuration alone tells: attention without SDPA, experts that stay bf16, weights that are 4-bit already. The
same in training, its dry run and the estimate."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from helpers.tiny_models import SIZES, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPTJConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoConfig,
)

from lowmem_npo.cli import main
from lowmem_npo.config import ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate import report
from lowmem_npo.estimate.step import Estimate
from lowmem_npo.model import load_model
from lowmem_npo.model.loading import attention_of

SMALL = SIZES | {"intermediate_size": 64, "hidden_size": 64}
WITHOUT_SDPA = {
    "gemma2": lambda v: Gemma2Config(vocab_size=v, head_dim=16, **SIZES),
    "gpt_oss": lambda v: GptOssConfig(vocab_size=v, head_dim=16, num_local_experts=4, **SIZES),
    "gptj": lambda v: GPTJConfig(vocab_size=v, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=128),
    "bloom": lambda v: BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=2),
}


def save(config, folder, byte_model, **options):
    """A random model beside the byte tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def output(capsys, command, model, *options):
    code = main([command, "--model", str(model), *map(str, options)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("kind", WITHOUT_SDPA)
def test_models_without_sdpa_use_eager(kind, byte_model, tmp_path, capsys, monkeypatch):
    """By default, said in one line; asked for another implementation, no line."""
    config = WITHOUT_SDPA[kind](258)
    if AutoModelForCausalLM.from_config(config)._supports_sdpa:
        pytest.skip(f"transformers {transformers.__version__} has it for {kind}")
    model = save(config, tmp_path / "model", byte_model)
    targets = {"gptj": ["q_proj"], "bloom": ["query_key_value"]}.get(kind, ["q_proj", "v_proj"])
    data = ["--device", "cpu", "--max-steps", 1, "--eval-rows", 0, "--output-dir", tmp_path / "out", "--limit", 2]
    line = f"transformers has no SDPA attention for {kind}: --attn eager is used"
    for command, options in (
        ("train", [*data, "--dry-run"]), ("train", [*data, "--batch-size", 1]), ("estimate", ["--max-length", 32]),
    ):  # fmt: skip
        if (kind, command) == ("gpt_oss", "estimate"):
            # Of experts it needs CUDA's operators.
            monkeypatch.setattr(report, "estimate", lambda *_: Estimate(0, 0, {}, 0))
        code, out, err = output(capsys, command, model, *options, "--lora-targets", *targets)
        assert code == 0 and out.count(line) == 1, (command, options, err)
    _, out, _ = output(capsys, "train", model, *data, "--dry-run", "--attn", "eager")
    assert line not in out


def test_flash_attention_that_transformers_does_not_have():
    with pytest.raises(UserError, match="has none for BloomForCausalLM"):
        attention_of(BloomConfig(), "flash_attention_2")
    assert attention_of(OlmoConfig(), "flash_attention_2") == "flash_attention_2"


def test_experts_stay_in_bf16_and_it_is_said(byte_model, tmp_path, capsys, monkeypatch):
    """Two layers of four experts with three matrices of 64 x 64: 192 KiB of bf16 that is not a linear layer."""
    model = save(MixtralConfig(vocab_size=258, num_local_experts=4, **SMALL), tmp_path / "model", byte_model)
    loaded = load_model(ModelConfig(str(model), qlora=True, device="cpu"))
    experts = [p for name, p in loaded.named_parameters() if "experts" in name]
    assert {p.dtype for p in experts} == {torch.bfloat16} and sum(p.nbytes for p in experts) == 2 * 4 * 3 * 64 * 64 * 2
    monkeypatch.setattr(report, "estimate", lambda *_: Estimate(0, 0, {}, 0))
    for command, more in (
        ("train", ["--device", "cpu", "--output-dir", tmp_path / "out", "--dry-run"]),
        ("estimate", []),
    ):
        code, out, err = output(capsys, command, model, *more, "--qlora")
        assert code == 0 and "--qlora leaves the experts in bf16 (0.00 GiB)" in out, err
        assert "leaves the experts" not in output(capsys, command, model, *more)[1]


def test_linear_layers_of_a_class_of_their_own_are_quantised(byte_model, tmp_path, capsys):
    """Falcon's, which transformers leaves as they are: four in each of two layers."""
    falcon = FalconConfig(vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model, frozen = save(falcon, tmp_path / "model", byte_model), []
    loaded = load_model(ModelConfig(str(model), qlora=True, device="cpu"))
    assert sum(isinstance(module, Linear4bit) for module in loaded.modules()) == 8
    for more in ([], ["--qlora"]):
        options = ["--lora-targets", "all-linear", "--max-length", 16, "--json", *more]
        code, out, err = output(capsys, "estimate", model, *options)
        assert code == 0, err
        frozen.append(json.loads(out)["by_kind"]["frozen_weights"])
    assert frozen[1] < 0.6 * frozen[0]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_checkpoint_in_4_bits_stays_as_it_is(kind, double, byte_model, tmp_path, capsys):
    folder, stored = tmp_path / "stored", tmp_path / "model"
    save(OlmoConfig(vocab_size=258, tie_word_embeddings=False, **SMALL), folder, byte_model)
    recipe = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=recipe).save_pretrained(stored)
    AutoTokenizer.from_pretrained(folder).save_pretrained(stored)
    lines: list[str] = []
    model = load_model(ModelConfig(str(stored), device="cpu"), lines.append)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7 and lines == []
    for layer in layers:
        state = layer.weight.quant_state
        assert state.quant_type == kind and state.nested is double and layer.compute_dtype == torch.bfloat16
    note = f"The weights are stored in 4 bits ({kind}) and stay so."
    train = ["--device", "cpu", "--max-steps", 1, "--eval-rows", 0, "--limit", 2, "--batch-size", 1]
    code, out, err = output(capsys, "train", stored, *train, "--output-dir", tmp_path / "out")
    assert code == 0 and note in out, err
    frozen = {}
    for name, path, more in (("stored", stored, []), ("bf16", folder, []), ("qlora", folder, ["--qlora"])):
        code, out, err = output(capsys, "estimate", path, "--max-length", 16, "--json", *more)
        assert code == 0, err
        frozen[name] = json.loads(out)["by_kind"]["frozen_weights"]
        assert json.loads(out)["notes"] == ([note] if name == "stored" else [])
    assert frozen["stored"] < 0.8 * frozen["bf16"]
    assert (frozen["stored"] == frozen["qlora"]) is double


@pytest.mark.parametrize(
    "stored, method",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes"),
    ],
)
def test_other_quantised_checkpoints_are_refused(stored, method, byte_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    for command, options in (("train", ["--dry-run"]), ("train", ["--qlora"]), ("estimate", []), ("evaluate", [])):
        code, _, err = output(capsys, command, tmp_path, *options)
        assert code == 2 and f"are stored quantised ({method}), and cannot be trained on here" in err, err
