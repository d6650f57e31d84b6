"""4-bit loading goes tensor by tensor: the host never holds the model in bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.original_olmo import random_weights, settings, write
from transformers import AutoModelForCausalLM, OlmoConfig

ROOT = Path(__file__).resolve().parents[2]

# Anonymous memory only: mapped files are the kernel's to drop.
LOAD = """
import json, sys, threading, time
import torch, bitsandbytes
from lowmem_npo.config import ModelConfig
from lowmem_npo.model import load_model
from lowmem_npo.model.checkpoint import find_checkpoint

def used():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    while watching:
        peak[0] = max(peak[0], used())
        time.sleep(0.001)

small, folder = ModelConfig(sys.argv[1], qlora=True, device="cpu"), sys.argv[2]
load_model(small)  # what the libraries take at first use
peaks = {}
largest = torch.randn(2048, 512).bfloat16()
for name, load in {
    "one tensor": lambda: [  # more than once, so that whoever watches sees it
        bitsandbytes.nn.Params4bit(largest.clone(), quant_type="nf4").to("cpu").shape for _ in range(9)
    ],
    "ours": lambda: load_model(ModelConfig(folder, qlora=True, device="cpu")),
    "bf16 first": lambda: [tensor[...].bfloat16().clone() for tensor in find_checkpoint(folder).unread().values()],
}.items():
    before, peak, watching = used(), [0], True
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        loaded = load()
    finally:
        watching = False
        thread.join()
    peaks[name] = peak[0] - before
    if name == "ours":
        weights = [w for w in loaded.parameters() if w.dtype == torch.uint8]
        peaks["4-bit"] = sum(w.nbytes + w.quant_state.absmax.nbytes for w in weights)
    del loaded
print(json.dumps(peaks))
"""


def native(folder):
    config = OlmoConfig(vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=10,
                        num_attention_heads=8, pad_token_id=0, eos_token_id=1)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
    model.save_pretrained(folder, max_shard_size="16MB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return sum(p.nbytes for p in model.parameters())


def original_olmo(folder):
    config = settings(vocab_size=1000, embedding_size=1000, d_model=512, mlp_hidden_size=4096, n_layers=10, n_heads=8)
    weights = random_weights(config)
    write(folder, config, weights)
    return sum(tensor.numel() * 2 for tensor in weights.values())


@pytest.mark.parametrize(
    "make", [native, pytest.param(original_olmo, id="original OLMo in one float32 file", marks=pytest.mark.slow)]
)
def test_the_peak_is_the_final_size_and_one_tensor(make, byte_model, tmp_path):
    in_bf16 = make(tmp_path)
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system at once
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", LOAD, byte_model, tmp_path], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    peaks = json.loads(result.stdout.splitlines()[-1])
    allowed = peaks["4-bit"] + peaks["one tensor"] + 8 * 2**20  # with what bitsandbytes takes to quantise it
    assert peaks["ours"] < allowed, peaks
    assert peaks["bf16 first"] > 0.9 * in_bf16 > allowed, peaks  # the other way is recognised
