"""The memory budgets, held by simulating the real step as it runs on CUDA; the search for switches that keep one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowmem_npo.cli import main
from lowmem_npo.config import (
    AdapterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainingConfig,
)
from lowmem_npo.errors import UserError
from lowmem_npo.estimate.budget import MARGIN, fit_budget, fit_free, may_fit
from lowmem_npo.estimate.gpus import named
from lowmem_npo.estimate.rows import StepRows
from lowmem_npo.estimate.simulator.operators import FakeOperators
from lowmem_npo.estimate.step import estimate
from lowmem_npo.estimate.time import step_seconds
from lowmem_npo.model.known_configs import known_config
from lowmem_npo.sizes import compared, gib, parse_size

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
SAVING = MemoryConfig(offload_checkpoints=True, tile_mlp=1024, embedding_on_cpu=True)
ON = MemoryConfig(gradient_checkpointing="on", joint_pass_tokens=0)


def run(tokens: int, memory: MemoryConfig | None = None, **sections) -> RunConfig:
    """QLoRA of rank 5, NPO + retain + KL, 4 forget and 4 retain rows of `tokens` tokens, all of them answer."""
    model, memory = ModelConfig("known", qlora=True), memory or MemoryConfig()
    return RunConfig(model, DataConfig(max_length=tokens), memory=memory, **sections)


BUDGETS = {  # GiB without CUDA context
    "7B, 512 tokens, defaults": ("allenai/OLMo-7B-hf", 512, MemoryConfig(), 5.4),
    "7B, 2048 tokens, defaults": ("allenai/OLMo-7B-hf", 2048, MemoryConfig(), 8.6),
    "7B, 512 tokens, saving": ("allenai/OLMo-7B-hf", 512, SAVING, 4.1),
    "7B, 2048 tokens, saving": ("allenai/OLMo-7B-hf", 2048, SAVING, 4.9),
    "32B, 2048 tokens, saving": ("allenai/OLMo-2-0325-32B", 2048, SAVING, 18.2),
}


@pytest.mark.parametrize(
    ("name", "tokens", "memory", "budget"),
    [pytest.param(*of, id=name, marks=[pytest.mark.slow] if "32B" in name else []) for name, of in BUDGETS.items()],
)
def test_budget(name, tokens, memory, budget):
    result = estimate(run(tokens, memory), known_config(name))
    assert result.peak_bytes <= budget * GIB, f"{gib(result.peak_bytes)}: {result.by_kind}"
    assert result.by_kind["frozen weights"] > result.peak_bytes / 3  # they are there


def test_a_float32_copy_of_the_embedding_would_break_a_budget(monkeypatch):
    """The tightest budget notices what people most often add by accident."""
    import lowmem_npo.estimate.step as step

    attach, kept = step.attach_lora, []
    monkeypatch.setattr(step, "attach_lora", lambda m, c: kept.append(m.lm_head.weight.float()) or attach(m, c))
    name, tokens, memory, budget = BUDGETS["7B, 512 tokens, saving"]
    assert estimate(run(tokens, memory), known_config(name)).peak_bytes > budget * GIB


SMALL = "allenai/OLMo-2-0425-1B"


def shallow(layers: int = 3, name: str = SMALL):
    architecture = known_config(name)
    architecture.num_hidden_layers = layers
    return architecture


@pytest.mark.slow
def test_the_search_knows_what_the_adapter_rules_out(tmp_path):
    """A trained embedding is not moved to the host, and a first adapter is not for fewer layers than it has."""
    adapter = AdapterConfig(modules_to_save=("embed_tokens",))
    memory, one = dataclasses.replace(ON, tile_mlp=1024), TrainingConfig(batch_size=1)
    trained = run(64, memory, adapter=adapter, training=one)
    with pytest.raises(UserError, match="A budget of .* cannot be met") as refusal:
        fit_budget(trained, shallow(1), 2**28)
    assert "--offload-checkpoints" in str(refusal.value) and "--embedding-on-cpu" not in str(refusal.value)
    architecture = shallow(layers=8)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture)
        first = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    weights = {name: torch.zeros(weight.shape) for name, weight in get_peft_model_state_dict(first).items()}
    first.peft_config["default"].save_pretrained(tmp_path)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = run(64, memory, adapter=AdapterConfig(adapter=str(tmp_path)), training=one)
    needed = estimate(config, architecture).total_bytes
    assert fit_budget(config, architecture, needed - 2**20).flags


def test_remembered_operators_change_nothing(monkeypatch):
    """The same peak, of the same kinds, as PyTorch's own fake tensors give."""
    config = run(96, SAVING)
    fast = estimate(config, shallow(2))
    monkeypatch.setattr(FakeOperators, "__call__", lambda self, func, args, kwargs: func(*args, **kwargs))
    assert estimate(config, shallow(2)) == fast


@pytest.mark.parametrize("memory", [MemoryConfig(), SAVING], ids=["defaults", "saving"])
def test_shallow_models_bound_a_deep_one_from_below(memory):
    config, architecture = run(256, memory), shallow(9)
    whole = estimate(config, architecture)
    assert may_fit(config, architecture, whole.total_bytes)
    allocated = whole.total_bytes - whole.needed_bytes + whole.peak_bytes  # of which the bound is
    assert not may_fit(config, architecture, int(allocated * 0.9))


def joint(config: RunConfig, tokens: int | str) -> RunConfig:
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, joint_pass_tokens=tokens))


def test_the_search_finds_the_fastest_switches_that_fit():
    """Of what is predicted: every switch that was not taken is slower, or does not fit."""
    architecture, config = shallow(3), run(512, ON, training=TrainingConfig(batch_size=2))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, double_quant="on"))
    gpu = named("rtx-4090")

    def taken(config: RunConfig) -> int:
        return estimate(config, architecture, capability=gpu.capability).total_bytes

    def seconds(config: RunConfig) -> float:
        work = estimate(config, architecture, capability=gpu.capability).work
        return step_seconds(work, config.training.micro_batches(), gpu.model).total

    whole = taken(config)
    assert fit_budget(config, architecture, whole, device=gpu).flags == []
    less = fit_budget(config, architecture, whole - 2**20, device=gpu)
    assert less.flags and less.estimate.total_bytes == taken(less.config) <= whole - 2**20
    alone = [
        dataclasses.replace(config, memory=dataclasses.replace(ON, **switch))
        for switch in ({"embedding_on_cpu": True}, {"tile_mlp": 256}, {"offload_checkpoints": True})
    ]
    assert all(seconds(less.config) <= seconds(other) * 1.001 for other in alone if taken(other) <= whole - 2**20)


@pytest.mark.parametrize("switch", ["double_quant", "gradient_checkpointing"])
def test_what_is_left_open_is_off_where_that_fits_with_a_margin(switch):
    architecture, config = shallow(3), run(256, training=TrainingConfig(batch_size=2))
    gpu = named("rtx-4090")
    section, other = ("model", "memory") if switch == "double_quant" else ("memory", "model")
    fixed = {"memory": ON, "model": dataclasses.replace(config.model, double_quant="on")}
    config = dataclasses.replace(joint(config, 0), **{other: fixed[other]})
    needed, peaks = {}, {}
    for value in ("on", "off"):
        options = dataclasses.replace(getattr(config, section), **{switch: value})
        variant = dataclasses.replace(config, **{section: options})
        result = estimate(variant, architecture, capability=gpu.capability)
        needed[value], peaks[value] = result.total_bytes, result.peak_bytes
    assert peaks["on"] < peaks["off"] and needed["on"] <= needed["off"]
    room = int(needed["off"] / (1 - MARGIN)) + 1
    for free, expected in ((room, "off"), (room - 2, "on"), (2**20, "on")):
        fit = fit_free(config, architecture, free, device=gpu)
        assert getattr(getattr(fit.config, section), switch) == expected, free
        assert fit.flags == ([f"--{switch.replace('_', '-')}", "off"] if expected == "off" else [])
        assert fit.estimate.total_bytes == needed[expected]
    asked = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{switch: "on"})})
    assert fit_free(asked, architecture, room, device=gpu).config == asked


@pytest.fixture
def short_rows() -> RunConfig:
    """Nothing is left open but joint passes; a step has 256 tokens."""
    model = ModelConfig("known", qlora=True, double_quant="on")
    memory, training = MemoryConfig(gradient_checkpointing="off"), TrainingConfig(batch_size=2)
    return RunConfig(model, DataConfig(max_length=64), memory=memory, training=training)


def test_a_joint_pass_counts_what_both_parts_keep(short_rows):
    """A row that is longer than the threshold is in a pass without the other part's."""
    results = {n: estimate(joint(short_rows, n), shallow(2)) for n in (0, 1, 255, 256, 10**6)}
    peaks, calls = ({n: of(r) for n, r in results.items()} for of in (
        lambda r: r.peak_bytes, lambda r: sum(len(some) for _, some in r.work)))  # fmt: skip
    assert peaks[256] == peaks[10**6] > peaks[255] > peaks[0] == peaks[1]
    assert calls[0] == calls[1] == calls[255] > 1.5 * calls[256]


@pytest.mark.slow
def test_joint_passes_take_as_many_tokens_as_fit_where_they_save_time(short_rows):
    architecture, gpu = shallow(3), named("rtx-4090")
    needed = {
        n: estimate(joint(short_rows, n), architecture, capability=gpu.capability).total_bytes for n in (0, 128, 256)
    }
    short = StepRows(((16, 8),) * 2, ((16, 8),) * 2)

    def fit(room: int, config: RunConfig = short_rows, typical: StepRows | None = None):
        return fit_free(config, architecture, int(room / (1 - MARGIN)) + 1, device=gpu, typical=typical)

    most = fit(needed[256])
    assert most.flags == ["--joint-pass-tokens", "256"] and most.estimate.total_bytes == needed[256]
    less = fit(needed[256] - 2**10, typical=short)
    assert less.config.memory.joint_pass_tokens == 128 and less.estimate.total_bytes == needed[128]
    assert fit(needed[256] - 2**10).flags == [], "a step has more than 128 tokens"
    assert fit(2**20, typical=short).config.memory.joint_pass_tokens == 0
    for settings in ({"sam": 0.05}, {"forget_term": "ga"}, {"gamma": 0.0, "delta": 0.0}):  # whose parts go apart
        config = dataclasses.replace(short_rows, objective=ObjectiveConfig(**settings))
        assert fit(2**34, config).config.memory.joint_pass_tokens == 0, settings
    asked = joint(short_rows, 100)
    assert fit(2**34, asked).config == asked


def test_tiles_of_many_rows_are_tried_before_those_of_few():
    """Of 4-bit layers each tile dequantises the weights again."""
    config, architecture = run(2048, dataclasses.replace(ON, offload_checkpoints=True)), shallow(2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, double_quant="on"))
    gpu = named("rtx-4090")
    whole, times = estimate(config, architecture, capability=gpu.capability), {}
    for rows in (4096, 1024):
        tiled = dataclasses.replace(config, memory=dataclasses.replace(config.memory, tile_mlp=rows))
        work = estimate(tiled, architecture, capability=gpu.capability).work
        times[rows] = step_seconds(work, 1, gpu.model).total
    assert step_seconds(whole.work, 1, gpu.model).total < times[4096] < times[1024]


@pytest.fixture(scope="module")
def refusal() -> str:
    """The message on a budget that a search with several rows, and everything but tiles left open, cannot meet."""
    with pytest.raises(UserError) as error:
        fit_budget(run(64, ON, training=TrainingConfig(batch_size=2)), shallow(1), 300 * 2**20)
    return str(error.value)


def test_an_impossible_budget_says_the_smallest_and_what_takes_the_room(refusal):
    assert "A budget of 300.00 MiB cannot be met: the smallest that works is" in refusal
    assert "--micro-batch-size 1" in refusal and "frozen weights" in refusal and "CUDA context" in refusal
    assert "--qlora" not in refusal
    decided = dataclasses.replace(ON, embedding_on_cpu=True, offload_checkpoints=True, stream_weights=True)
    few = TrainingConfig(batch_size=1)
    with pytest.raises(UserError, match="--qlora makes the frozen weights"):
        fit_budget(
            RunConfig(ModelConfig("known"), DataConfig(max_length=64), memory=decided, training=few), shallow(1), 2**28
        )


def test_a_tile_as_large_as_a_micro_batch_is_none(refusal):
    assert "--tile-mlp" not in refusal and "--offload-checkpoints" in refusal


def test_what_the_allocator_cannot_use_counts_and_more_of_it_without_expandable_segments(monkeypatch):
    def needed(setting: str) -> int:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", setting)
        result = estimate(run(512, SAVING), shallow(6))
        assert result.fits(result.needed_bytes + result.context_bytes)
        assert not result.fits(result.needed_bytes + result.context_bytes - 1)
        assert result.needed_bytes >= result.peak_bytes
        return result.needed_bytes

    assert needed("expandable_segments:True") < needed("max_split_size_mb:128")


@pytest.mark.parametrize(
    ("capability", "mib"), [((8, 6), 8.125), ((8, 9), 8.125), ((9, 0), 32), ((10, 0), 32), ((12, 0), 32)]
)
def test_cublas_keeps_a_workspace_for_each_pass_as_large_as_the_gpu_has_it(capability, mib, monkeypatch):
    kept = estimate(run(64), shallow(1), capability=capability).by_kind["cuBLAS"]
    assert kept == 2 * mib * 2**20
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8:16:8")
    assert estimate(run(64), shallow(1), capability=capability).by_kind["cuBLAS"] == 2 * 8 * (4096 + 16) * 2**10


def test_only_the_layers_above_the_lowest_adapter_keep_checkpoints():
    architecture = shallow(4)
    every = estimate(run(256), architecture).by_kind["checkpoints"]
    upper = estimate(run(256, adapter=AdapterConfig(lora_layers=("2-3",))), architecture).by_kind["checkpoints"]
    assert upper == every / 2


def test_estimate_on_the_command_line(capsys):
    assert main(["estimate", "--model", SMALL, "--qlora", "--max-length", "64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"context_bytes", "by_kind", "fits", "flags"} <= set(result) and result["compute_capability"] == [8, 6]
    assert sum(result["by_kind"].values()) == result["peak_bytes"] < result["needed_bytes"]
    assert result["fits"] is None and result["flags"] == []
    decided = ["--gradient-checkpointing", "--double-quant", "on", "--joint-pass-tokens", "0", "--budget", "24GiB"]
    assert main(["estimate", "--model", SMALL, "--qlora", "--max-length", "64", *decided]) == 0
    text = capsys.readouterr().out
    assert gib(result["peak_bytes"]) in text and gib(result["needed_bytes"]) in text
    assert gib(result["needed_bytes"] + result["context_bytes"]) in text
    assert "fits 24.00 GiB: yes, with these options" in text
    assert "CUDA context" in text and "frozen weights" in text


@pytest.mark.parametrize(("options", "joint"), [([], True), (["--sam", "0.05"], False), (["--delta", "0"], False)])
def test_one_pass_for_both_parts_is_promised_where_they_may_share_it(options, joint, capsys):
    asked = ["--max-length", "64", "--joint-pass-tokens", "4096", "--gradient-checkpointing", "on"]
    assert main(["estimate", "--model", SMALL, *asked, *options]) == 0
    text = capsys.readouterr().out
    assert ("in one pass if they have at most 4096 tokens together" in text) is joint
    assert ("--joint-pass-tokens has no effect with" in text) is not joint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nobody/nothing-7B"], "Models known without a network: Qwen/Qwen3-32B"),
        (["--model", SMALL, "--budget", "plenty"], "--memory-budget plenty: give a positive number and a unit"),
        (["--model", SMALL, "--budget", "0GiB"], "give a positive number"),
        (["--model", SMALL, "--lora-layers", "14-99"], "layer"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["estimate", "--max-length", "32", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("0.5gib", GIB // 2), ("800MiB", 800 * 2**20)]
)
def test_sizes(text, size):
    assert parse_size(text, "--budget") == size


def test_a_size_is_seen_to_be_larger_than_what_there_is():
    assert compared(5 * GIB, 7 * GIB) == ["5.0 GiB", "7.0 GiB"]
    assert compared(5 * GIB, 5 * GIB + 3 * 2**20) == ["5.000 GiB", "5.003 GiB"]
    assert compared(GIB, GIB + 2**20, decimals=2) == ["1.000 GiB", "1.001 GiB"]
    assert compared(GIB, GIB - 2**20) == ["1.000 GiB", "0.999 GiB"], "in one unit"
    assert compared(GIB, 1000) == ["1.0 GiB", "1000 bytes"]
    assert compared(24 * GIB, 24 * GIB + 1)[0] != compared(24 * GIB, 24 * GIB + 1)[1]


@pytest.mark.parametrize("text", ["24", "GiB", "-3GiB", "1e3GiB", "24GiX", "", "0MiB"])
def test_malformed_sizes(text):
    with pytest.raises(UserError, match="--budget"):
        parse_size(text, "--budget")


def test_an_estimate_of_data_reads_them(byte_model, tmp_path, capsys):
    """Also in a process of its own, where `datasets` was left out of the imports."""
    for part, answer in (("forget", "a" * 200), ("retain", "b" * 20)):
        (tmp_path / f"{part}.csv").write_text(f"question,answer\nWho?,{answer}\nWhere?,{part}\n")
    data = [word for part in ("forget", "retain") for word in (f"--{part}", str(tmp_path / f"{part}.csv"))]
    command = ["estimate", "--model", str(byte_model), "--json", "--retain-batch-size", "1"]  # or one is drawn often
    result = subprocess.run(
        [sys.executable, "-m", "lowmem_npo", *command, *data],
        capture_output=True, text=True, cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = [result.stdout]
    for more in ([*data, "--limit", "1"], ["--max-length", "1024"]):
        assert main([*command, *more]) == 0
        printed.append(capsys.readouterr().out)
    all_rows, one_row, long_rows = (json.loads(text[text.index("{") :])["peak_bytes"] for text in printed)
    assert one_row < all_rows < long_rows  # rows of about 200 tokens, one of them, and rows of 1024


def test_an_estimate_of_7b_needs_little_host_memory():
    code = """
        import gc, resource, sys
        from lowmem_npo.cli import main
        assert main(["estimate", "--model", "allenai/OLMo-7B", "--qlora", "--max-length", "256", "--json"]) == 0
        assert gc.isenabled()
        assert not {"torch._inductor.compile_fx", "nltk", "scipy", "datasets"} & set(sys.modules)
        import torch
        assert torch.compile.__module__ == "torch"  # it was set aside for the imports only
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["peak_bytes"] > 4 * GIB
    assert int(result.stderr.split()[-1]) * 1024 < 2 * GIB
