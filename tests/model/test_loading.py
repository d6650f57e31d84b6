"""A model from its directory, in 4 bits and as it was saved."""

import json
import os
import re
import shutil

import bitsandbytes
import peft
import pytest
import torch
from helpers.architectures import random_model, tiny_config
from helpers.tiny_models import states, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, OlmoConfig
from transformers.core_model_loading import MergeModulelist
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize

from lowmem_npo.cli import main
from lowmem_npo.config import AdapterConfig, ModelConfig
from lowmem_npo.console import silent
from lowmem_npo.endings import failure
from lowmem_npo.errors import UserError
from lowmem_npo.model import attach_lora, checkpoint, load_model
from lowmem_npo.model.loading import load_config
from lowmem_npo.model.quantization import is_finite, quantising
from lowmem_npo.model.saved_adapter import load_adapter
from lowmem_npo.model.weights import not_finite


def original():
    """Layers of whole blocks of 64 weights: bitsandbytes 0.50 dequantises narrower ones wrongly on AVX-512."""
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=130, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    original().save_pretrained(folder)
    return folder


def test_qlora_is_nf4_doubly_quantised_with_a_bf16_head(saved):
    model = load_model(ModelConfig(str(saved), qlora=True, device="cpu"))
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        state = layer.weight.quant_state
        assert state.quant_type == "nf4" and state.nested and layer.compute_dtype == torch.bfloat16
        assert layer.weight.dtype == torch.uint8
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not any(p.dtype == torch.float32 for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    exact = load_model(ModelConfig(str(saved), device="cpu"))
    with torch.no_grad():
        difference = (states(model) - states(exact)).float().norm() / states(exact).float().norm()
    assert 0.001 < difference < 0.3  # quantised, and still the same model


def test_without_qlora_weights_are_what_was_saved(saved):
    model = load_model(ModelConfig(str(saved), device="cpu"))
    expected = original()
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


def rewritten(folder, model, change):
    """The directory of `model`, its weights changed."""
    model.save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def mixtral():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(
        MixtralConfig(vocab_size=97, num_local_experts=2, num_key_value_heads=2, **sizes)
    )


def other_format(weights):
    return {f"model.transformer.{name.removeprefix('model.')}": tensor for name, tensor in weights.items()}


def without(weights, part):
    return {name: tensor for name, tensor in weights.items() if part not in name}


WRONG = [
    ("a layer", original, lambda w: without(w, "layers.1.mlp.up_proj"), "lack model.layers.1.mlp.up_proj.weight."),
    ("head", original, lambda w: without(w, "lm_head"), "lack lm_head.weight."),
    ("prefix", original, lambda w: {f"module.{n}": t for n, t in w.items()}, "it has others: module.lm_head.weight"),
    ("other format", original, other_format, "it has others: model.transformer.embed_tokens.weight"),
    ("shape", original, lambda w: {**w, "lm_head.weight": w["lm_head.weight"][1:]}, "(129, 64) instead of (130, 64)"),
    ("expert", mixtral, lambda w: without(w, "experts.1.w2"),
     "model.layers.0.mlp.experts.down_proj (1, 32, 32) instead of"),
    ("type", original, lambda w: {**w, "model.embed_tokens.weight": w["model.embed_tokens.weight"].char()},
     "stored quantised (model.embed_tokens.weight is int8), but its config.json does not say how"),
    ("half an expert", mixtral, lambda w: without(w, "experts.1.w1"), "some of its experts are missing"),
]  # fmt: skip


@pytest.mark.parametrize("qlora", [False, True])
@pytest.mark.parametrize("name, make, change, message", WRONG)
def test_weights_that_would_be_random_are_refused(name, make, change, message, qlora, tmp_path):
    folder = rewritten(tmp_path, make(), change)
    with pytest.raises(UserError, match=re.escape(message)):
        load_model(ModelConfig(str(folder), qlora=qlora, device="cpu"))


def in_old_files(folder):
    """The same weights as PyTorch saved them before there was safetensors, in two files."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
    for file, of_file in files.items():
        torch.save({name: weights[name] for name in of_file}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, of_file in files.items() for name in of_file}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name, make, change, message", WRONG)
def test_they_are_refused_before_weights_are_read(name, make, change, message, old, tmp_path):
    folder = rewritten(tmp_path, make(), change)
    if old:
        in_old_files(folder)
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(ModelConfig(str(folder)))


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_a_dry_run_and_an_estimate_refuse_them(command, saved, byte_model, tmp_path, capsys):
    folder = shutil.copytree(byte_model, tmp_path / "model")
    options = ["--dry-run", "--output-dir", str(tmp_path / "out")] if command == "train" else []
    assert main([command, "--model", str(folder), *options]) == 0
    weights = without(load_file(folder / "model.safetensors"), "layers.1.mlp.up_proj")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main([command, "--model", str(folder), *options]) == 2
    assert "its files lack model.layers.1.mlp.up_proj.weight." in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    assert main([command, "--model", str(folder), *options]) == 2
    assert f"The weights in '{folder / 'model.safetensors'}' are damaged: " in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert main([command, "--model", str(folder), *options]) == (2 if command == "train" else 0)  # it needs no weights
    assert ("has no weights in safetensors" in capsys.readouterr().err) == (command == "train")
    (folder / "adapter_config.json").write_text("{}")
    assert main([command, "--model", str(folder), *options]) == 2
    assert "holds an adapter beside the model" in capsys.readouterr().err


@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize(
    "architecture",
    ["bloom", "deepseek_v3", "falcon_h1", "gemma3n_text", "gpt2", "gpt_neo", "gpt_oss", "jamba", "llama4_text",
     "mamba2", "minimax", "mixtral", "olmo", "opt", "phimoe", "qwen3_next", "recurrent_gemma", "zamba2"],
)  # fmt: skip
def test_whole_checkpoints_are_not_refused(architecture, with_prefix, tmp_path):
    """Shared weights, experts in many tensors, a base model's names."""
    model = random_model(tiny_config(architecture, 97))
    prefix = "" if with_prefix else f"{model.base_model_prefix}."
    folder = rewritten(tmp_path, model, lambda weights: {name.removeprefix(prefix): w for name, w in weights.items()})
    load_config(ModelConfig(str(folder)))
    load_model(ModelConfig(str(folder), device="cpu", attn="eager"))


def test_tied_weights_are_not_missed_and_unused_ones_are_reported(tmp_path):
    lines = []
    tied = rewritten(tmp_path / "tied", tiny_model("gemma2"), dict)
    load_model(ModelConfig(str(tied), device="cpu", attn="eager"), lines.append)
    assert lines == []
    more = rewritten(tmp_path / "more", original(), lambda w: {**w, "value_head.weight": torch.ones(3)})
    load_model(ModelConfig(str(more), device="cpu"), lines.append)
    assert lines == [f"Not used by OlmoForCausalLM: value_head.weight of '{more}'."]
    assert load_config(ModelConfig(model=str(more)), lines.append) and lines[0] == lines[1]  # a dry run's


def test_4_bit_loading_reads_one_tensor_at_a_time(saved, monkeypatch):
    """Transformers would read ahead of weights that are stored quantised; without quantisation it may."""
    seen, real = [], AutoModelForCausalLM.from_pretrained

    def watched(*args, **options):
        seen.append(os.environ.get("HF_DEACTIVATE_ASYNC_LOAD"))
        return real(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    for qlora in (True, False):
        load_model(ModelConfig(str(saved), qlora=qlora, device="cpu"))
    assert seen == ["1", None] and "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_a_weight_is_moved_to_what_quantises_it_from_a_list_or_by_itself():
    model, name = tiny_model("llama"), "model.layers.0.self_attn.q_proj.weight"
    four_bits = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    four_bits.source_cls = torch.nn.Linear
    model.model.layers[0].self_attn.q_proj = four_bits
    convert, weight = Bnb4bitQuantize(None), torch.randn(64, 64)
    with quantising(torch.device("cpu")) as damaged:
        converted = [convert.convert({name: given}, model=model)[name] for given in ([weight], weight)]
    for made in converted:
        stored = bitsandbytes.functional.dequantize_4bit(made.data, made.quant_state)
        assert 0 < (stored - weight).norm() < 0.15 * weight.norm()
    assert damaged == []


@pytest.fixture
def runs_out(monkeypatch):
    """(owner, name, error, at): from call `at` of that method on, memory has run out. Returns the list of its calls."""

    def plant(owner, name, error, at):
        real, calls = getattr(owner, name), []

        def fails(*args, **options):
            calls.append(name)
            if len(calls) >= at:
                raise error
            return real(*args, **options)

        monkeypatch.setattr(owner, name, fails)
        return calls

    return plant


GPU_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")
HOST_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize("error", [GPU_MEMORY, HOST_MEMORY])
@pytest.mark.parametrize("owner, name, at", [
    (bitsandbytes.nn.Params4bit, "_quantize", 6),
    (Bnb4bitDeserialize, "convert", 3),
    (MergeModulelist, "convert", 6),  # the first four are without data, by `check_directory_weights`
])  # fmt: skip
def test_memory_that_runs_out_while_a_weight_is_converted_ends_loading(
    owner, name, at, error, runs_out, saved, tmp_path
):
    """transformers would note it of this weight, try all others, and call the model's weights damaged."""
    config = ModelConfig(str(saved), qlora=owner is not MergeModulelist, device="cpu")
    if owner is not bitsandbytes.nn.Params4bit:
        stored = load_model(config) if owner is Bnb4bitDeserialize else mixtral()
        stored.save_pretrained(tmp_path)
        config = ModelConfig(str(tmp_path), device="cpu")
    calls = runs_out(owner, name, error, at)
    with pytest.raises(type(error)) as raised:
        load_model(config)
    assert raised.value is error and len(calls) == at


@pytest.mark.parametrize(
    "owner, name", [(checkpoint, "safe_open"), (checkpoint.torch, "load"), (AutoConfig, "from_pretrained")]
)
def test_memory_that_runs_out_for_a_file_does_not_make_it_damaged(owner, name, runs_out, saved, tmp_path):
    if name == "load":
        torch.save(load_file(saved / "model.safetensors"), tmp_path / "pytorch_model.bin")
        shutil.copy(saved / "config.json", tmp_path)
        saved = tmp_path
    runs_out(owner, name, RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), 1)
    with pytest.raises(RuntimeError, match="mmap") as raised:
        load_config(ModelConfig(str(saved)))
    assert failure(raised.value) == "the machine ran out of memory"


def test_a_command_says_that_memory_ran_out_while_the_model_was_loaded(byte_model, runs_out, tmp_path, capsys):
    runs_out(bitsandbytes.nn.Params4bit, "_quantize", GPU_MEMORY, 6)
    options = ["--model", byte_model, "--qlora", "--device", "cpu", "--limit", 2, "--output-dir", tmp_path / "out"]
    assert main(["evaluate", *map(str, options)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lowmem-npo evaluate: the GPU ran out of memory: ") and last.endswith("nothing was written.")


def test_memory_that_runs_out_for_an_adapter_does_not_make_it_another_models(runs_out, tmp_path):
    attach_lora(tiny_model("llama"), AdapterConfig()).save_pretrained(tmp_path)
    runs_out(peft.PeftModel, "load_adapter", GPU_MEMORY, 1)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(tiny_model("llama"), str(tmp_path))


def test_an_rwkv_is_refused(tmp_path):
    """Its layers are rescaled in eval mode, in place and without their adapters."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}))
    with pytest.raises(UserError, match="is an RWKV, which rescales its weights"):
        load_config(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("kind", ["blt", "musicgen"])
def test_a_model_without_one_decoder_is_refused(kind, tmp_path):
    parts = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"}  # of a Musicgen
    content = {name: {"model_type": part} for name, part in parts.items()} if kind == "musicgen" else {}
    content |= {"model_type": kind, "architectures": ["AForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"the configuration of a {kind} does not name one decoder"):
        load_config(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("setting", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_a_model_that_is_not_causal_is_refused_by_its_configuration(setting, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(UserError, match="is not causal: its config.json has each token see those after it"):
        load_config(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("content", ["cut", "", "<html>Not found</html>"])
def test_old_files_that_pytorch_did_not_write_are_refused_before_they_are_loaded(content, byte_model, tmp_path):
    """They were "cannot be loaded: 101" after a dry run that had found nothing."""
    folder = shutil.copytree(byte_model, tmp_path / "model")
    file, weights = folder / "pytorch_model.bin", load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, file, _use_new_zipfile_serialization=False)  # as PyTorch did before 1.6
    load_config(ModelConfig(str(folder)))
    torch.save(weights, file)
    load_config(ModelConfig(str(folder)))
    file.write_bytes(file.read_bytes()[:5000] if content == "cut" else content.encode())
    with pytest.raises(UserError, match="pytorch_model.bin' are damaged: it is in none of PyTorch's formats"):
        load_config(ModelConfig(str(folder)))


def test_weights_that_are_no_numbers_are_named_before_anything_is_measured(byte_model, tmp_path, capsys):
    """Of a token that no check looks at: the rows that have it were measured, and gave no likelihood."""
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(weights):
        weights["model.embed_tokens.weight"][200, 3] = torch.nan
        weights[name][0, 0] = torch.inf
        return weights

    folder = shutil.copytree(byte_model, tmp_path / "model")
    rewritten(folder, AutoModelForCausalLM.from_pretrained(byte_model), damage)
    where = ["--model", str(folder), "--dtype", "float32", "--output-dir", str(tmp_path / "run")]
    assert main(["train", *where, "--max-steps", "1", "--limit", "4"]) == 2
    message = f"are damaged: model.embed_tokens.weight, {name} hold NaN or infinity"
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "before.json").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_were_no_numbers_before_they_got_four_bits_are_named(value, byte_model, tmp_path):
    """Of 4 bits every one is a number, whatever it was."""
    names = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}

    def damage(weights):
        for name in names:
            weights[name][3, 5] = value
        return weights

    folder = shutil.copytree(byte_model, tmp_path / "model")
    rewritten(folder, AutoModelForCausalLM.from_pretrained(byte_model), damage)
    with pytest.raises(UserError, match=f"are damaged: {', '.join(sorted(names))} hold NaN or infinity"):
        load_model(ModelConfig(str(folder), qlora=True, device="cpu"), silent)


@pytest.mark.parametrize("double_quant", ["on", "off"])
def test_four_bits_with_scales_that_are_no_numbers_are_named(double_quant, byte_model, tmp_path):
    config = ModelConfig(str(byte_model), qlora=True, device="cpu", double_quant=double_quant)
    load_model(config, silent).save_pretrained(tmp_path)
    load_model(ModelConfig(str(tmp_path), device="cpu"), silent)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    weights[f"{name}.{'nested_absmax' if double_quant == 'on' else 'absmax'}"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"are damaged: {name} hold NaN or infinity"):
        load_model(ModelConfig(str(tmp_path), device="cpu"), silent)


def test_large_weights_are_numbers():
    """Their sum is not. Nor does PyTorch find the largest number of none, or of 8-bit ones."""
    assert is_finite(torch.empty(0, 3))
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16):
        ends = torch.tensor([torch.finfo(dtype).min, 0.0, torch.finfo(dtype).max]).to(dtype)
        assert is_finite(ends) and not is_finite(torch.tensor([0.0, torch.nan]).to(dtype))
    assert not is_finite(torch.tensor([torch.inf]).to(torch.float8_e5m2))
    model = tiny_model("olmo")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    assert not_finite(model) == []
    model.lm_head.weight.data[5, 5] = -torch.inf
    assert not_finite(model) == ["lm_head.weight"]
