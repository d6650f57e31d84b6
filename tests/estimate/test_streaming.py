"""Streamed weights in the estimate: budgets, copies and the time that they take, the search, host memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from lowmem_npo.cli import main
from lowmem_npo.config import DataConfig, MemoryConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainingConfig
from lowmem_npo.errors import UserError
from lowmem_npo.estimate import host
from lowmem_npo.estimate.budget import fit_budget, fit_free
from lowmem_npo.estimate.gpus import named
from lowmem_npo.estimate.report import Report
from lowmem_npo.estimate.rows import StepRows
from lowmem_npo.estimate.simulator.work import ARRIVAL, Operation
from lowmem_npo.estimate.step import Estimate, estimate
from lowmem_npo.estimate.time import RunTime, Seconds, seconds
from lowmem_npo.libraries import ALLOCATOR_SETTINGS
from lowmem_npo.memory import streaming
from lowmem_npo.model import load_model
from lowmem_npo.model.known_configs import known_config
from lowmem_npo.model.quantized_cache import CacheEntry
from lowmem_npo.model.trial import of_depth

GIB = 2**30
LLAMA = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def run(tokens: int, tile: int = 1024, **memory) -> RunConfig:
    """QLoRA of rank 5, 4 forget and 4 retain rows of `tokens` tokens, streamed, with all other switches."""
    switches = {"stream_weights": True, "embedding_on_cpu": True, "offload_checkpoints": True, "tile_mlp": tile}
    memory = MemoryConfig(**{**switches, **memory})
    return RunConfig(ModelConfig("known", qlora=True), DataConfig(max_length=tokens), memory=memory)


BUDGETS = {  # GiB without CUDA context: of the peak, and of what the allocator needs for it
    "7B, 2048 tokens": ("allenai/OLMo-7B-hf", run(2048), 2.0, 1.6),
    "32B, 2048 tokens": ("allenai/OLMo-2-0325-32B", run(2048, tile=256), 2.6, 2.7),
    "70B, 2048 tokens": ("meta-llama/Llama-3.1-70B", run(2048), 6.0, 4.9),
    "70B, 512 tokens": ("meta-llama/Llama-3.1-70B", run(512), 4.5, 4.0),
}
FEW, MORE = 3, 4  # layers: each more takes what its adapter takes, and nothing else


@pytest.mark.parametrize(("name", "config", "budget", "needed"), BUDGETS.values(), ids=list(BUDGETS))
def test_budget(name, config, budget, needed, full, monkeypatch):
    monkeypatch.setenv(ALLOCATOR_SETTINGS[0], "expandable_segments:True")  # as every command has it
    architecture = known_config(name)
    few, more = (estimate(config, of_depth(architecture, depth)) for depth in (FEW, MORE))
    of_layer = (more.peak_bytes - few.peak_bytes) // (MORE - FEW)
    peak = few.peak_bytes + (architecture.num_hidden_layers - FEW) * of_layer
    assert peak <= budget * GIB and few.by_kind["slots"] > 0
    grown = {kind for kind in more.by_kind if more.by_kind[kind] != few.by_kind[kind]}
    assert grown == {"adapter", "frozen weights"}
    assert more.by_kind["frozen weights"] - few.by_kind["frozen weights"] < 2**17  # norms, and the tables of 4 bits
    if full:
        whole = estimate(config, architecture)
        assert whole.peak_bytes == peak and whole.needed_bytes <= needed * GIB


# -- copies ---------------------------------------------------------------------------------------------------------


def test_copies_of_a_step_are_those_of_the_real_one():
    """Both parts go through six layers twice; the first pass finds empty slots, the others two layers."""
    config = RunConfig(ModelConfig("tiny"), DataConfig(max_length=16), memory=MemoryConfig(stream_weights=True))
    simulated = estimate(config, LLAMA)
    block = simulated.by_kind["slots"] // 2
    assert simulated.copied_bytes // block == (6 + 4) + (4 + 4)
    assert simulated.host_bytes >= 6 * block
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.bfloat16)
    assert simulated.weights_bytes == sum(p.nbytes for p in whole.parameters()) > simulated.streamed_bytes
    resident = estimate(replace(config, memory=MemoryConfig()), LLAMA)
    assert resident.by_kind["slots"] == 0 and resident.copied_bytes < block


def test_what_an_attacker_copies_counts_once_in_a_step_of_several_micro_batches():
    data, memory = DataConfig(max_length=16), MemoryConfig(stream_weights=True)
    training = TrainingConfig(batch_size=2, micro_batch_size=1)
    plain = estimate(RunConfig(ModelConfig("tiny"), data, memory=memory, training=training), LLAMA)
    attacked = estimate(
        RunConfig(
            ModelConfig("tiny"), data, memory=memory, training=training, objective=ObjectiveConfig(adversary=1.0)
        ),
        LLAMA,
    )
    block = plain.by_kind["slots"] // 2
    assert plain.copied_once_bytes < block <= attacked.copied_once_bytes // 8  # at least a pass, and back
    assert attacked.copied_bytes < plain.copied_bytes + 6 * block  # in which that is not counted again
    more = attacked.copied_in_step(3) - attacked.copied_in_step(2)
    assert more == attacked.copied_bytes and plain.copied_in_step(2) == 2 * plain.copied_bytes + plain.copied_once_bytes


COPY, KERNEL = Operation("copy", bytes=int(0.8 * 32e9), part="to GPU"), Operation("kernel", bytes=int(0.8 * 1008e9))


def test_what_waits_for_a_copy_and_what_runs_beside_it():
    """A copy and a kernel of a second each."""
    gpu = named("rtx-4090").model
    ahead = [ARRIVAL, COPY, KERNEL] * 5  # the next layer's weights come while a layer computes
    assert seconds([COPY, *ahead], gpu).total == pytest.approx(6.0, rel=0.01)
    in_time = [COPY, ARRIVAL, KERNEL] * 5
    assert seconds(in_time, gpu).total == pytest.approx(10.0, rel=0.01)
    away = Operation("copy", bytes=COPY.bytes, part="to host")  # the other direction of the bus
    assert seconds([COPY, away, ARRIVAL, KERNEL], gpu).total == pytest.approx(2.0, rel=0.01)
    assert seconds(in_time, gpu).copies == pytest.approx(5.0) and seconds([away], gpu).copies == 0


@pytest.mark.parametrize(("tokens", "double_quant"), [(64, "on"), (512, "off")])
def test_the_search_counts_the_copies_of_streamed_weights(tokens, double_quant):
    """Scales that are not quantised make the blocks larger: dear where a step waits for the bus, cheap where the GPU
    computes. A model of one layer copies next to nothing, and shows neither."""
    config = RunConfig(
        ModelConfig("known", qlora=True), DataConfig(max_length=tokens),
        memory=MemoryConfig(stream_weights=True, gradient_checkpointing="on", joint_pass_tokens=0),
    )  # fmt: skip
    architecture, device = of_depth(known_config("meta-llama/Llama-3.1-70B"), 6), named("rtx-4090")
    assert fit_free(config, architecture, 24 * GIB, device=device).config.model.double_quant == double_quant


DECIDED = ("--gradient-checkpointing", "on", "--joint-pass-tokens", "0", "--batch-size", "1", "--max-length", "96")


def test_the_estimate_says_what_is_copied_and_which_of_the_two_bounds(byte_model, capsys):
    options = ["--model", str(byte_model), "--dtype", "float32", "--gpu", "rtx-4090", *DECIDED]
    assert main(["estimate", *options, "--stream-weights"]) == 0
    text = capsys.readouterr().out
    assert "  slots  " in text and "copied from it to the GPU in a step" in text
    bus = RunTime(Seconds(2.0, 1.0, 0.5, 1.9), Seconds(2.0, 1.0, 0.5, 1.9), None).lines("x")
    assert "the GPU waits for the bus" in bus[0] and "computing 1.00 s, of copies to the GPU, beside it, 1.90" in bus[1]


# -- budgets --------------------------------------------------------------------------------------------------------


def test_weights_are_streamed_for_a_budget_that_nothing_else_meets():
    """With smaller tiles than resident weights stop at, as OLMo-2-32B needs it for 2.6 GiB."""
    wide = LlamaConfig(**{**LLAMA.to_dict(), "intermediate_size": 4096, "num_hidden_layers": 2})
    memory = replace(run(2048, joint_pass_tokens=0, gradient_checkpointing="on").memory, stream_weights=False)
    config = RunConfig(ModelConfig("x"), DataConfig(max_length=2048), training=TrainingConfig(batch_size=1))

    def of_tile(tile: int | None, streamed: bool = False) -> RunConfig:
        return replace(config, memory=replace(memory, tile_mlp=tile, stream_weights=streamed))

    configs = (of_tile(1024), of_tile(1024, True), of_tile(256, True))
    resident, large, small = (estimate(each, wide).total_bytes for each in configs)
    assert small < large < resident and fit_budget(of_tile(1024), wide, resident).flags == []
    fit = fit_budget(of_tile(None), wide, small)
    assert fit.flags == ["--tile-mlp", "256", "--stream-weights"] and fit.estimate.total_bytes == small
    with pytest.raises(UserError, match=r"the smallest that works is .* \(with --tile-mlp 256 --stream-weights\)"):
        fit_budget(of_tile(None), wide, int(0.9 * small))


def test_host_memory_is_checked_and_said_before_anything_is_loaded(byte_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streaming, "ON_CPU", True)
    monkeypatch.setattr(host, "available_memory", lambda: 1000)
    options = ["train", "--model", str(byte_model), "--device", "cpu", "--max-steps", "1", "--limit", "2", *DECIDED]
    options += ["--offload-checkpoints", "--tile-mlp", "16", "--embedding-on-cpu"]
    options += ["--stream-weights", "--memory-budget", "20GiB", "--output-dir", str(tmp_path / "run"), "--dry-run"]
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert "Streamed weights: 0.0" in out and "of host memory (available: 0.00 GiB)" in out
    assert "--stream-weights keeps the weights in host memory, which takes" in err


@pytest.mark.parametrize("streams", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_budget_that_streams_nothing_needs_no_place_to_stream_from(
    streams, byte_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(streaming, "ON_CPU", True)
    options = ["train", "--model", str(byte_model), "--device", "cpu", "--max-steps", "1", "--limit", "2", *DECIDED]
    options += ["--qlora", "--double-quant", "on", "--quantized-cache", str(tmp_path / "cache"), "--dry-run"]
    options += ["--stream-from", "cache", "--memory-budget", "20GiB", "--output-dir", str(tmp_path / "run")]
    assert main([*options, *(["--stream-weights"] if streams else [])]) == 0
    assert ("Streamed weights:" in capsys.readouterr().out) == streams


def test_a_host_with_too_little_memory_reads_the_cache(tmp_path, monkeypatch):
    """By the memory that there is, unless --stream-from says where; at the speed of the disk, tried where it can be."""
    tiny_model("olmo2", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    cache = tmp_path / "cache"
    model = ModelConfig(str(tmp_path / "model"), qlora=True, device="cpu", quantized_cache=str(cache))
    figures = Estimate(0, 0, {}, host_bytes=1000 * GIB, streamed_bytes=990 * GIB, largest_block_bytes=2 * GIB)
    figures = replace(figures, weights_bytes=995 * GIB)  # embedding and head, too

    def decided(gib: int, model=model, source="auto", **settings):
        monkeypatch.setattr(host, "available_memory", lambda: gib * GIB)
        config = RunConfig(model, memory=MemoryConfig(stream_weights=True, stream_from=source))
        given = replace(figures, **settings)
        return host.streaming_host(config.model, config.memory.stream_from, given, copied=4 * 10**9)

    few = {"streamed_bytes": 1000, "weights_bytes": 1000, "largest_block_bytes": 10, "host_bytes": 10 * GIB}
    assert not decided(1001).in_file and not decided(5, source="memory").in_file
    assert decided(1001, source="cache", **few).in_file
    with pytest.raises(
        UserError, match=r"the weights take 995.00 GiB, and .* are free in '.*', from where they are to"
    ):
        decided(20).check()
    config = RunConfig(model, memory=MemoryConfig(stream_weights=True, stream_from="cache"))
    estimated = Report("x", "4-bit NF4", config, StepRows((), ()), None, figures, None, None, [], [])
    assert "a run on this host would end here: --quantized-cache: the weights take 995.00 GiB" in estimated.text()
    read = decided(9, **few)
    assert read.in_file and read.needed == 10 * GIB - 1000 + 20 and not read.measured and read.read_seconds == 2.0
    assert read.lines()[1].startswith("This host reads the weights from --quantized-cache in every pass, 2.0 s of a st")
    with pytest.raises(
        UserError, match="--stream-weights from --quantized-cache takes 10.00 GiB of host memory, and 9"
    ):
        read.check()
    with pytest.raises(UserError, match=r"read them from a disk \(--qlora --quantized-cache DIR\)"):
        decided(5, replace(model, quantized_cache=None)).check()
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):  # each process keeps its own copy
        with monkeypatch.context() as launcher:
            launcher.setenv(name, "2")
            assert decided(2001).needed == 2000 * GIB and decided(19, **few).in_file
    load_model(model, lambda line: None)
    tried = decided(9, **few)
    tries, read_rate = [], CacheEntry.read_rate
    monkeypatch.setattr(CacheEntry, "read_rate", lambda entry: tries.append(entry) or read_rate(entry))
    again = replace(estimated, estimate=replace(figures, **few))
    assert "GB/s (measured)" in again.text() and len(tries) == 1
    assert tried.measured and tried.read_seconds == 4e9 / tried.disk_rate and "GB/s (measured)" in tried.lines()[1]
