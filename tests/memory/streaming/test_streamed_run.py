"""Whole runs of `lowmem-npo train` with streamed weights: on less device memory than the model has, with the results of
resident weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import SIZES, tiny_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig

from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.train import run as train_run
from lowmem_npo.commands.train.measuring import rows_at_once
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.simulator.storages import StorageCounter
from lowmem_npo.memory import streaming


@pytest.fixture(scope="module")
def small_model(byte_model, tmp_path_factory) -> Path:
    return saved(byte_model, tmp_path_factory.mktemp("small"), hidden_size=64, num_hidden_layers=5)


@pytest.fixture(scope="module")
def large_model(byte_model, tmp_path_factory) -> Path:
    """18 MiB in bf16, nearly all of it in its layers."""
    sizes = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 20}
    return saved(byte_model, tmp_path_factory.mktemp("large"), **sizes)


def saved(byte_model: Path, folder: Path, **sizes: int) -> Path:
    """A random Llama with the tokenizer of bytes."""
    config = LlamaConfig(vocab_size=258, tie_word_embeddings=False, **{**SIZES, **sizes})
    tiny_model(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(folder)
    return folder


def train(model: Path, folder: Path, *more: str):
    options = ["--model", str(model), "--device", "cpu", "--limit", "4", "--max-steps", "2", "--max-length", "96"]
    options += ["--lr", "1e-2", "--eval-rows", "1", "--max-new-tokens", "4", "--output-dir", str(folder), *more]
    return train_run.train(parse_run(options, "train"), lambda line: None)


SHORT = ("--limit", "2", "--max-steps", "1", "--max-new-tokens", "2", "--forms", "trained", "--leaks", "none")


def results(folder: Path) -> tuple:
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    answers = [(folder / f"{stage}.json").read_text() for stage in ("before", "after")]
    return losses, answers, {n: w.tolist() for n, w in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("more", [("--qlora",), ("--reference", "live")], ids=["4 bits, from files", "bf16"])
def test_a_run_is_that_of_resident_weights(more, small_model, tmp_path, monkeypatch):
    train(small_model, tmp_path / "resident", *more)
    monkeypatch.setattr(streaming, "ON_CPU", True)
    source = ("--quantized-cache", str(tmp_path / "cache"), "--stream-from", "cache") if "--qlora" in more else ()
    train(small_model, tmp_path / "streamed", "--stream-weights", *source, *more)
    assert results(tmp_path / "streamed") == results(tmp_path / "resident")


class Device(StorageCounter):
    """All memory but the blocks on the host; more than its limit is an error."""

    def __init__(self, limit: int) -> None:
        super().__init__("cpu")
        self.limit, self.host = limit, set[int]()

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.untyped_storage()._cdata not in self.host:
            super()._see(tensor)
        if self.live > self.limit:
            raise torch.OutOfMemoryError(f"{self.live} bytes on a device of {self.limit}")


def test_a_model_larger_than_the_device(large_model, tmp_path, monkeypatch):
    """From where the layers are in their blocks to the end of the run, all passes included."""
    size = (large_model / "model.safetensors").stat().st_size // 2  # of float32, loaded in bf16
    device, make = Device(limit=size // 2), streaming.host_memory

    def on_host(size: int, pinned: bool) -> torch.Tensor:
        memory = make(size, pinned)
        device.host.add(memory.untyped_storage()._cdata)
        return memory

    monkeypatch.setattr(streaming, "ON_CPU", True)
    monkeypatch.setattr(streaming, "host_memory", on_host)
    apply = train_run.apply_switches

    def then_count(model, *args):
        apply(model, *args)
        device.__enter__()
        for tensor in (*model.parameters(), *model.buffers()):
            device._see(tensor)

    monkeypatch.setattr(train_run, "apply_switches", then_count)
    try:
        run = train(large_model, tmp_path, "--stream-weights", "--tile-mlp", "64", "--gradient-checkpointing", *SHORT)
    finally:
        device.__exit__(None, None, None)
    assert run.optimizer_steps == 1
    assert device.peak <= device.limit < size


def test_refused_without_a_gpu(small_model, tmp_path):
    with pytest.raises(UserError, match="--stream-weights copies weights to a GPU, and this run computes on the CPU"):
        train(small_model, tmp_path / "run", "--stream-weights")
    assert not (tmp_path / "run").exists()


def test_a_sweep_lends_its_base_to_evaluations(small_model, tmp_path, capsys):
    options = ["--model", str(small_model), "--device", "cpu", "--stream-weights", "--output-dir", str(tmp_path / "x")]
    assert main(["sweep", *options, "--grid", "beta=0.1,0.5"]) == 2
    assert "--stream-weights is an option of single runs" in capsys.readouterr().err


def test_all_measured_rows_share_the_passes_that_stream_the_weights():
    options = ["--model", "x", "--eval-rows", "32", "--eval-batch-size", "4"]
    assert rows_at_once(parse_run(options, "train")) == 4
    assert rows_at_once(parse_run([*options, "--stream-weights"], "train")) == 32
