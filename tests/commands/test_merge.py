"""`lowmem-npo merge` against PEFT's merge in float64, on real files: shards, types, tied heads, refusals."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import weakref

import pytest
import torch
from helpers.architectures import tiny_config
from helpers.tiny_models import tiny_model
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MixtralConfig

from lowmem_npo.claim import LOCK, claimed
from lowmem_npo.cli import main
from lowmem_npo.config import ModelConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model import load_model, merging
from lowmem_npo.model.checkpoint import INDEX, WHOLE, find_checkpoint
from lowmem_npo.model.continued import continued
from lowmem_npo.model.saved_adapter import load_adapter

IDS = torch.arange(2, 30)[None]


def saved_base(folder, architecture="olmo", dtype=torch.bfloat16, **options):
    model = tiny_model(architecture, dtype=dtype)
    model.save_pretrained(folder, **options)
    return model


def saved_adapter(base, folder, seed=0, scale=0.1, dtype=torch.float32, **options):
    """An adapter of random factors on the model in the directory `base`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if "lora_magnitude" in name or "modules_to_save" in name:
                weight.add_(scale * torch.randn(weight.shape, generator=generator))
            elif "lora_" in name:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    adapted.save_pretrained(folder)
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model.double()(input_ids=IDS, use_cache=False).logits[0]


def in_float32(model):
    with torch.no_grad():
        return model.float()(input_ids=IDS, use_cache=False).logits[0]


def merged_by_peft(base, adapter):
    """The base's stored weights with the adapter, merged by PEFT in float64."""
    model = AutoModelForCausalLM.from_pretrained(base).double()
    return PeftModel.from_pretrained(model, adapter).double().merge_and_unload()


def run(adapter, out, *more):
    return main(["merge", "--adapter", str(adapter), "--output-dir", str(out), *more])


def fails(capsys, code, *messages):
    out, err = capsys.readouterr()
    assert code == 2, out
    assert err.startswith("lowmem-npo merge: ") and len(err.splitlines()) == 1
    assert all(message in err for message in messages), err


@pytest.mark.parametrize("bug", [None, "scale", "transposed", "twice"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ["olmo", "llama", "gemma2"])  # gemma2's head is its embedding
def test_weights_are_the_exact_sum_rounded_once(architecture, dtype, bug, tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    saved_base(base, architecture, dtype)
    adapter = saved_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])  # square: 32 x 32
    exact, added, product = merged_by_peft(base, adapter), merging.Update.applied_to, merging._product
    if bug:
        target, name, broken = {
            "scale": (merging, "_product", lambda layer: product(layer) / 2),  # without alpha / r
            "transposed": (merging, "_product", lambda layer: product(layer).T),
            "twice": (
                merging.Update,
                "applied_to",
                lambda u, w, t: w + added(u, torch.zeros_like(w), t),
            ),  # rounded twice
        }[bug]
        monkeypatch.setattr(target, name, broken)
    assert run(adapter, out, "--dtype", "stored") == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == dtype
    wanted, got = exact.state_dict(), merged.state_dict()
    assert wanted.keys() == got.keys()
    # Rounded once: equal to float64's sum, rounded, but for ties that float32's own rounding decides.
    unequal = sum((wanted[name].to(dtype) != got[name]).sum().item() for name in wanted)
    total = sum(tensor.numel() for tensor in wanted.values())
    if dtype == torch.float32:
        close = all(torch.allclose(wanted[n], got[n].double(), rtol=1e-6, atol=1e-6) for n in wanted)
        assert close is (bug in (None, "twice"))  # in float32 rounding twice is within its own rounding
    else:
        assert (unequal <= 1e-3 * total) is (bug is None)
        near = torch.allclose(logits(merged), logits(exact), rtol=0.05, atol=0.05 * logits(exact).std().item())
        assert near or bug


def test_shards_keep_their_names_and_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    saved_base(base, max_shard_size="12KB")
    others = {"tokenizer_config.json": "{}", "merges.txt": "", "thesis.txt": "private"}
    for name, text in others.items():
        (base / name).write_text(text)
    adapter = saved_adapter(base, tmp_path / "adapter")
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 3
    written, alive, real = {}, [], merging.save_file

    def save(tensors, path, **options):
        assert not [one for one in alive if one() is not None]  # the shards before are freed
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        written[path.name] = set(tensors)
        real(tensors, path, **options)

    monkeypatch.setattr(merging, "save_file", save)
    assert run(adapter, out) == 0
    assert sorted(written) == files
    for file, names in written.items():
        with safe_open(base / file, framework="pt") as before, safe_open(out / file, framework="pt") as after:
            assert set(before.keys()) == set(after.keys()) == names
            assert after.metadata() == {"format": "pt"}
    index = json.loads((out / INDEX).read_text())
    assert index == json.loads((base / INDEX).read_text())
    present = {path.name for path in out.iterdir()}
    assert present >= {"config.json", "generation_config.json", "tokenizer_config.json", "merges.txt"}
    assert "thesis.txt" not in present
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    exact = merged_by_peft(base, adapter)
    assert torch.allclose(logits(merged), logits(exact), atol=0.05 * logits(exact).std().item(), rtol=0.05)


def test_the_tokenizer_comes_along(byte_model, tmp_path):
    adapter = saved_adapter(byte_model, tmp_path / "adapter")
    assert run(adapter, tmp_path / "out") == 0
    text = "Where was she born?"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (byte_model, tmp_path / "out")]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"  # stored as float32, merged as bf16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # whoever reads one reads all


def test_rank_stabilised_scale(tmp_path):
    saved_base(tmp_path / "base", dtype=torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", use_rslora=True)
    assert run(adapter, tmp_path / "out", "--dtype", "stored") == 0
    exact = merged_by_peft(tmp_path / "base", adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(exact), rtol=1e-4, atol=1e-4)


def test_layers_with_transposed_weights(tmp_path):
    """GPT-2: (inputs, outputs), and tensor names without "transformer.", or, in one layer, with it twice."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    renamed = {
        f"transformer.{name}" if ".h.1." in name else name.removeprefix("transformer."): value
        for name, value in model.state_dict().items()
    }
    renamed.pop("lm_head.weight")
    merging.save_file(renamed, tmp_path / "base" / WHOLE, metadata={"format": "pt"})
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    assert run(adapter, tmp_path / "out", "--dtype", "stored") == 0
    exact = merged_by_peft(tmp_path / "base", adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(exact), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(model), rtol=1e-2, atol=1e-2)


GPT2 = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)


@pytest.mark.parametrize(
    "architecture, options",
    [
        ("llama", {"use_dora": True}),
        ("llama", {"use_dora": True, "use_rslora": True, "target_modules": ["embed_tokens", "o_proj", "up_proj"]}),
        (GPT2, {"use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("llama", {"modules_to_save": ["norm"]}),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"], "use_dora": True}),
        ("gemma2", {"modules_to_save": ["layers.0.mlp"], "target_modules": ["q_proj"]}),
        (GPT2, {"modules_to_save": ["wpe", "ln_f"], "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (None, {"modules_to_save": ["layers.0.mlp"], "target_modules": ["q_proj"]}),
    ],
    ids=["dora", "dora, embedding", "dora, transposed", "norms", "head, embedding", "mlp", "positions", "experts"],
)
def test_dora_and_modules_trained_whole_as_peft_merges_them(architecture, options, tmp_path, capsys):
    torch.manual_seed(0)
    saved_base(tmp_path / "base", architecture or MIXTRAL, torch.float32, max_shard_size="20KB")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    assert run(adapter, tmp_path / "out", "--dtype", "stored") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = merged_by_peft(tmp_path / "base", adapter).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert merged.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(merged[name].double(), wanted[name], rtol=1e-5, atol=1e-6)
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert f"The adapter changes {len(changed)} of" in capsys.readouterr().out or architecture is None
    if "modules_to_save" in options:  # the trained weights themselves, and not a rounding of them
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        for name, weight in stored.items():
            if ".lora_" not in name and architecture is not None:
                assert torch.equal(merged[name.removeprefix("base_model.model.")], weight)


def test_a_trained_module_that_is_tied_or_missing(tmp_path, capsys):
    saved_base(tmp_path / "base", "gemma2", torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", modules_to_save=["embed_tokens"])
    fails(capsys, run(adapter, tmp_path / "out"), "changes model.embed_tokens, which the base shares")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", modules_to_save=["model.norm"])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stored.pop("base_model.model.model.norm.weight")
    merging.save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    fails(capsys, run(adapter, tmp_path / "out"), "is not whole: it lacks model.norm.weight")


@pytest.mark.parametrize(
    "options, message",
    [({"bias": "lora_only"}, "bias: lora_only"), ({"init_lora_weights": "pissa"}, "a base that its start has changed")],
)
def test_what_is_more_than_lora_is_refused(options, message, tmp_path, capsys):
    saved_base(tmp_path / "base", dtype=torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    fails(capsys, run(adapter, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


MIXTRAL = MixtralConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=3, bos_token_id=None, eos_token_id=1,
)  # fmt: skip


@pytest.mark.parametrize(
    "config, options",
    [
        (None, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
        (None, {"target_modules": ["embed_tokens", "q_proj"]}),  # PEFT stores the embedding as well
        (None, {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"}),
        (MIXTRAL, {"target_modules": "all-linear"}),  # experts: one parameter, stored one by one
        (MIXTRAL, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
    ids=["patterns", "embedding", "regex", "experts", "some experts"],
)
def test_whatever_is_a_product_of_two_factors(config, options, tmp_path):
    """Ranks by layer, embeddings and experts: PEFT's own merge, and the base's own files."""
    base, out = tmp_path / "base", tmp_path / "out"
    torch.manual_seed(0)
    model = tiny_model() if config is None else AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base)
    adapter = saved_adapter(base, tmp_path / "adapter", **options)
    assert run(adapter, out, "--dtype", "stored") == 0
    exact = in_float32(merged_by_peft(base, adapter))  # PyTorch multiplies experts in float32 at most
    merged = in_float32(AutoModelForCausalLM.from_pretrained(out))
    assert torch.allclose(merged, exact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, in_float32(model), rtol=1e-2, atol=1e-2)
    with safe_open(base / "model.safetensors", "pt") as before, safe_open(out / "model.safetensors", "pt") as after:
        assert set(before.keys()) == set(after.keys())
        changed = {name for name in before.keys() if not torch.equal(before.get_tensor(name), after.get_tensor(name))}  # noqa: SIM118
    if options.get("target_modules") == "all-linear":
        assert sum("experts" in name for name in changed) == 2 * 3 * 3
    loaded = load_adapter(load_model(ModelConfig(str(base), dtype="float32", device="cpu")), adapter)
    assert torch.allclose(in_float32(loaded), exact, rtol=1e-4, atol=1e-4)


def test_an_embedding_beside_its_adapter_must_be_the_bases(tmp_path, capsys):
    saved_base(tmp_path / "base", dtype=torch.float32)
    adapter = tmp_path / "adapter"
    saved_adapter(tmp_path / "base", adapter, target_modules=["embed_tokens"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.base_layer.weight"][3] += 1
    merging.save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    fails(capsys, run(adapter, tmp_path / "out"), "embed_tokens.base_layer.weight, which is not a factor")
    del weights["base_model.model.model.embed_tokens.lora_embedding_B"]
    del weights["base_model.model.model.embed_tokens.base_layer.weight"]
    merging.save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    fails(capsys, run(adapter, tmp_path / "out"), "is not whole: it lacks", "lora_embedding_B")


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("architecture", ["olmo", "gemma2"])  # the head of gemma2 is its embedding, and stored twice
def test_checkpoints_of_pytorch_itself(architecture, shards, tmp_path):
    base, old, out = tmp_path / "base", tmp_path / "old", tmp_path / "out"
    model = saved_base(base, architecture, torch.bfloat16)
    adapter = saved_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    old.mkdir()
    shutil.copyfile(base / "config.json", old / "config.json")
    weights = model.state_dict()
    if shards:
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(weights)}
        for file in set(files.values()):
            torch.save({name: weight for name, weight in weights.items() if files[name] == file}, old / file)
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, old / "pytorch_model.bin")
    assert run(adapter, out, "--model", str(old), "--any-base", "--dtype", "stored") == 0
    assert run(adapter, tmp_path / "expected", "--dtype", "stored") == 0
    merged, expected = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (out, tmp_path / "expected"))
    assert merged.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(w, expected.state_dict()[name]) for name, w in merged.state_dict().items())
    written = sorted(path.name for path in out.iterdir() if "model" in path.name)
    assert written == (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
                       if shards else ["model.safetensors"])  # fmt: skip


def test_a_head_shared_with_the_embedding_is_refused(tmp_path, capsys):
    saved_base(tmp_path / "base", "gemma2", torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["lm_head"])
    capsys.readouterr()  # progress
    fails(capsys, run(adapter, tmp_path / "out"), "lm_head, which the base shares with another layer")


def test_adapters_of_several_layers_on_one_weight_are_refused(tmp_path, capsys):
    """Zamba's hybrid layers have one attention in common, and each an adapter of its own on it."""
    saved_base(tmp_path / "base", tiny_config("zamba", 97), torch.float32)
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    capsys.readouterr()  # progress
    fails(capsys, run(adapter, tmp_path / "out"), "q_proj, which the base shares with another layer")


def test_what_an_interrupted_merge_leaves_is_in_nobodys_way(tmp_path, capsys, monkeypatch):
    saved_base(tmp_path / "base")
    adapter, partial = saved_adapter(tmp_path / "base", tmp_path / "adapter"), tmp_path / "out.partial"
    capsys.readouterr()  # progress
    with claimed(partial):
        fails(capsys, run(adapter, tmp_path / "out"), "in use by process")
    (partial / "nested").mkdir(parents=True)
    for name in (LOCK, "model.safetensors", "nested/file"):  # of a merge that was killed
        (partial / name).write_text("")
    assert run(adapter, tmp_path / "out") == 0
    assert not partial.exists() and not {LOCK, "nested"} & {file.name for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("lowmem_npo.commands.merge.run.merged_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(adapter, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_other_bases_and_damaged_files(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    saved_base(base)
    saved_adapter(base, adapter)
    shutil.copytree(base, tmp_path / "copy")
    fails(capsys, run(adapter, tmp_path / "out", "--model", str(tmp_path / "copy")), "was trained on", "--any-base")
    assert run(adapter, tmp_path / "out", "--model", str(tmp_path / "copy"), "--any-base") == 0
    fails(capsys, run(adapter, tmp_path / "out"), "holds other files")
    fails(capsys, run(adapter, base / "config.json"), "is a file")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.tex").write_text("")
    fails(capsys, run(adapter, tmp_path / "new"), "in the way")
    fails(capsys, run(base, tmp_path / "new"), "holds no adapter")
    wide = tmp_path / "wide"
    saved_base(wide, "llama", max_shard_size="12KB")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    fails(capsys, run(adapter, tmp_path / "new2", "--model", str(wide), "--any-base"), "are quantised")
    (wide / "config.json").write_text(json.dumps(config))
    next(iter(wide.glob("*-of-*.safetensors"))).unlink()
    fails(capsys, run(adapter, tmp_path / "new2", "--model", str(wide), "--any-base"), "is incomplete")
    (wide / INDEX).write_text("{}")
    fails(capsys, run(adapter, tmp_path / "new2", "--model", str(wide), "--any-base"), "has no weight_map")
    for file in wide.glob("model*"):
        file.unlink()
    fails(capsys, run(adapter, tmp_path / "new2", "--model", str(wide), "--any-base"), "has no weights in safetensors")
    gone, empty = str(tmp_path / "gone"), str(tmp_path / "new.partial")
    fails(capsys, run(adapter, tmp_path / "new2", "--model", gone, "--any-base"), f"There is no directory '{gone}'")
    fails(capsys, run(adapter, tmp_path / "new2", "--model", empty, "--any-base"), "holds no model: there is no config")
    (adapter / "adapter_config.json").write_text(
        json.dumps({**json.loads((adapter / "adapter_config.json").read_text()), "peft_type": "IA3"})
    )
    fails(capsys, run(adapter, tmp_path / "new2"), "IA3")


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
    assert run(adapter, tmp_path / "any", "--model", str(byte_model), "--any-base") == 0


def test_an_adapter_of_other_shapes_or_layers(tmp_path, capsys):
    saved_base(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter")
    for change, message in (({"hidden_size": 16}, "does not fit"), ({"num_hidden_layers": 1}, "but the base has no")):
        config = tiny_model("olmo").config
        for name, value in change.items():
            setattr(config, name, value)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        fails(capsys, run(adapter, tmp_path / "out", "--model", str(tmp_path / "other"), "--any-base"), message)
        shutil.rmtree(tmp_path / "other")


def test_a_full_disk_and_an_interruption(tmp_path, capsys, monkeypatch):
    saved_base(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        fails(capsys, run(adapter, tmp_path / "out"), "has 1.0 MiB free")
    assert not (tmp_path / "out").exists()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(merging, "save_file", interrupted)
        assert run(adapter, tmp_path / "out") == 130
    assert not list(tmp_path.glob("out*"))
    assert run(adapter, tmp_path / "out") == 0


def test_bytes_are_counted_before_they_are_written(tmp_path):
    saved_base(tmp_path / "base", dtype=torch.float32, max_shard_size="12KB")
    checkpoint = find_checkpoint(str(tmp_path / "base"))
    for dtype in (torch.bfloat16, None):
        out = tmp_path / str(dtype)
        out.mkdir()
        merging.write_merged(checkpoint, {}, out, dtype, progress=False)
        files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert 0 <= files - checkpoint.bytes_as(dtype) < 2000 * len(checkpoint.shards)
        assert not math.isclose(checkpoint.bytes_as(torch.bfloat16), checkpoint.bytes_as(None))


def test_the_card_names_base_and_adapter_and_what_was_found(small_demo, tmp_path):
    run_directory = small_demo[0].directory / "unlearned"
    assert run(run_directory, tmp_path / "out") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    weights = (run_directory / "adapter_model.safetensors").read_bytes()
    headline = json.loads((run_directory / "report.json").read_text())["verdict"]["headline"]
    assert headline in card.content and hashlib.sha256(weights).hexdigest() in card.content
    assert card.data.library_name == "transformers" and "`base`" in card.content
    assert "Not checked: whether forgotten text returns" in card.content
    assert str(run_directory.parent) not in card.content


def test_an_adapter_of_no_run_gets_a_card_as_well(tmp_path):
    saved_base(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter")
    assert run(adapter, tmp_path / "out") == 0
    assert "Nothing is known of what the adapter forgets" in (tmp_path / "out" / "README.md").read_text()


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
    fails(capsys, run(adapter, tmp_path / "out"), message)
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
        fails(capsys, run(adapter, tmp_path / "out"), message)
    file.write_text("[" * 100_000)
    fails(capsys, run(adapter, tmp_path / "out"), "is not valid JSON")


def test_a_sum_that_is_no_number_is_refused(tmp_path, capsys):
    """Both factors are finite, their product is not."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    saved_base(base)
    saved_adapter(base, adapter, scale=1e25)
    fails(capsys, run(adapter, tmp_path / "out"), "would hold NaN or infinity in the merged model")
    assert not (tmp_path / "out").exists()
