"""Whole runs of `lowmem-npo train` with streamed weights: on less device memory than the model has, with the results of
resident weights."""

from __future__ import annotations

import json
import re
import shutil
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
from lowmem_npo.estimate import generation, host
from lowmem_npo.estimate.simulator.storages import StorageCounter
from lowmem_npo.evaluation.benchmarks.contract import Benchmark
from lowmem_npo.evaluation.benchmarks.lume import LUME
from lowmem_npo.memory import host_room, streaming


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


@pytest.fixture(scope="module")
def runs(small_model, tmp_path_factory) -> Path:
    """Two runs with --qlora, of resident weights and of streamed ones, and the cache of the latter."""
    folder = tmp_path_factory.mktemp("runs")
    train(small_model, folder / "resident", "--qlora")
    cache = ("--quantized-cache", str(folder / "cache"), "--stream-from", "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "ON_CPU", True)
        train(small_model, folder / "streamed", "--qlora", "--stream-weights", *cache)
    return folder


def test_a_run_of_4_bits_from_files_is_that_of_resident_weights(runs):
    assert results(runs / "streamed") == results(runs / "resident")


def test_a_run_of_bf16_is_that_of_resident_weights(small_model, tmp_path, monkeypatch):
    more = ("--reference", "live", *SHORT)
    train(small_model, tmp_path / "resident", *more)
    monkeypatch.setattr(streaming, "ON_CPU", True)
    train(small_model, tmp_path / "streamed", "--stream-weights", *more)
    assert results(tmp_path / "streamed") == results(tmp_path / "resident")


# -- what is asked of the model that such a run leaves ----------------------------------------------------------------

SOURCES = {"blocks": (), "files": ("--stream-from", "cache")}


@pytest.fixture
def streams(runs, monkeypatch):
    """The options of weights that are streamed from a source."""
    monkeypatch.setattr(streaming, "ON_CPU", True)
    return lambda source: ["--stream-weights", "--quantized-cache", str(runs / "cache"), *SOURCES[source]]


def figures_of(folder: Path) -> tuple:
    content = json.loads((folder / "evaluation.json").read_text())
    return content, (folder / "rows.jsonl").read_text()


@pytest.fixture(scope="module")
def evaluated(runs) -> tuple:
    """What `evaluate` measures of resident weights."""
    assert main(["evaluate", *measured(runs), "--output-dir", str(runs / "evaluated")]) == 0
    return figures_of(runs / "evaluated")


def measured(runs: Path) -> list[str]:
    options = ["--adapter", str(runs / "streamed"), "--device", "cpu", "--qlora", "--limit", "3", "--max-length", "64"]
    options += ["--max-new-tokens", "3", "--batch-size", "2", "--mia-gradnorm", "--forms", "trained"]
    return [*options, "--leaks", "extraction", "membership", "sampling", "quantization"]


@pytest.mark.parametrize("source", SOURCES)
def test_an_evaluation_is_that_of_resident_weights(source, runs, streams, evaluated, late, tmp_path, capsys):
    """Answers and leak tests, gradients of the weights themselves and models that a test loads among them."""
    assert main(["evaluate", *measured(runs), *streams(source), "--output-dir", str(tmp_path / "x")]) == 0
    assert figures_of(tmp_path / "x") == evaluated and late.copies > 100
    printed = capsys.readouterr().out
    assert "copied to the GPU in a pass." in printed and "Writing the measured answers takes about" in printed
    assert "How long leak tests will take is not predicted." in printed
    assert ("This host reads the weights from --quantized-cache" in printed) == (source == "files")


def test_answers_that_would_take_hours_are_read_off_the_likelihoods(runs, streams, tmp_path, monkeypatch, capsys):
    """As `train` does; a benchmark that goes by written answers is refused where they are not to be written."""
    monkeypatch.setattr(generation, "MOST_HOURS", 0.0)
    options = ["evaluate", "--adapter", str(runs / "streamed"), "--device", "cpu", "--qlora", "--limit", "2"]
    assert main([*options, *streams("blocks"), "--output-dir", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    assert "they are read off the likelihoods instead (--generate-answers on writes them)" in printed
    assert main([*options, "--generate-answers", "off", "--output-dir", str(tmp_path / "y")]) == 0
    assert figures_of(tmp_path / "x") == figures_of(tmp_path / "y")
    assert not any(of["generated"] for of in figures_of(tmp_path / "x")[0]["answers"].values())
    monkeypatch.setattr(generation, "MOST_HOURS", 1.0)  # of another disk
    assert main([*options, *streams("blocks"), "--output-dir", str(tmp_path / "x"), "--resume"]) == 0
    assert figures_of(tmp_path / "x") == figures_of(tmp_path / "y"), "it does not go on as it began"
    rows = tmp_path / "lume.jsonl"
    rows.write_text(json.dumps({"id": "asc1", "input": "A", "output": "b", "task": "Task1"}) + "\n")
    given = ["--forget", str(rows), "--generate-answers", "off", "--output-dir", str(tmp_path / "z")]
    assert main([*options, *given]) == 2
    assert "--generate-answers off: 'LUME" in capsys.readouterr().err
    monkeypatch.setattr(type(LUME), "written", Benchmark.written)  # which a benchmark may forget
    assert main([*options, *given]) == 0
    assert "forget: LUME, SemEval-2025 Task 4 was not measured: the model would have" in capsys.readouterr().out


def test_questions_are_answered_as_by_resident_weights(runs, streams, tmp_path, capsys):
    """Also where they are drawn, and more are drawn together."""
    (tmp_path / "questions.txt").write_text("Who?\nWhere was he born, and when?\n" * 9)
    options = ["ask", str(runs / "streamed"), "--device", "cpu", "--max-new-tokens", "5", "--temperature", "1"]
    options += ["--file", str(tmp_path / "questions.txt"), "--json"]
    assert main(options) == 0
    expected = capsys.readouterr().out
    for source in SOURCES:
        assert main([*options, "--qlora", *streams(source)]) == 0
        answers, said = capsys.readouterr()
        assert answers == expected and "Every token of an answer takes" in said


def test_a_merged_model_is_measured_as_its_run_was_trained(runs, tmp_path, late, monkeypatch, capsys):
    def merged(run: str) -> str:
        options = ["--adapter", str(runs / run), "--output-dir", str(tmp_path / run), "--device", "cpu"]
        assert main(["merge", *options, "--base-weights", "whole", "--quantize-check"]) == 0
        return capsys.readouterr().out.replace(run, "")

    expected = merged("resident")
    assert not late.copies
    monkeypatch.setattr(streaming, "ON_CPU", True)
    streamed = (
        " --stream-weights",
        f" --quantized-cache {runs / 'cache'} --stream-from cache",
    )  # in the command for tests
    assert re.sub("|".join(streamed), "", told := merged("streamed")) == expected and late.copies
    assert all(options in told for options in streamed)
    monkeypatch.setattr(host_room, "available_memory", lambda: 1000)
    shutil.rmtree(tmp_path / "streamed")
    assert "Not measured: the merged model takes" in merged("streamed")


def test_what_cannot_be_streamed_is_said_before_anything_is_loaded(runs, streams, tmp_path, monkeypatch, capsys):
    commands = {
        "evaluate": ["--adapter", str(runs / "streamed"), "--dry-run", "--output-dir", str(tmp_path / "x")],
        "ask": [str(runs / "streamed"), "Who?"],
    }

    def said(command: str, *more: str) -> str:
        assert main([command, *commands[command], "--device", "cpu", *more]) == 2
        return capsys.readouterr().err

    for command in commands:
        streamed = ("--qlora", *streams("blocks"))
        assert "--stream-from cache reads the weights from the files of --quantized-cache DIR" in said(
            command, "--stream-weights", "--stream-from", "cache"
        )
        assert "--stream-from says where --stream-weights keeps" in said(command, "--stream-from", "memory")
        with monkeypatch.context() as patch:
            patch.setattr(host, "available_memory", lambda: 1000)
            assert "--stream-weights from --quantized-cache takes" in said(command, *streamed)
            in_memory = ("--stream-weights", "--stream-from", "memory")
            assert "--stream-weights keeps the weights in host memory, which takes" in said(command, *in_memory)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "ON_CPU", False)
            assert "and this run computes on the CPU: leave it out." in said(command, *streamed)
    assert not (tmp_path / "x").exists()


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
