"""A sweep of real runs: each is bit for bit that of `train`; failures, resumption, figures and files."""

from __future__ import annotations

import csv
import errno
import gc
import json
import os
import re
import shlex
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from helpers.loaded_models import loads_watched
from helpers.saved_adapters import same_adapter, weights
from helpers.taught_model import LIMIT
from matplotlib import image
from transformers import AutoConfig, AutoModelForCausalLM

import lowmem_npo.commands.sweep.runs as sweep_run
from lowmem_npo.cli import main
from lowmem_npo.commands.arguments import parse_run
from lowmem_npo.commands.sweep.borrowed_base import borrowed
from lowmem_npo.commands.train.plan import read_inputs
from lowmem_npo.commands.train.run import train
from lowmem_npo.config import ModelConfig
from lowmem_npo.console import silent
from lowmem_npo.estimate.automatic import Simulation, workload_of
from lowmem_npo.memory import streaming
from lowmem_npo.model import load_model
from lowmem_npo.run_directory import RunDirectory
from lowmem_npo.training.trainer import NPOTrainer

# Runs that change the model in different ways: tiled MLPs or not; the embedding moves in all.
SWITCHES = "tile-mlp=16,"


def options(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--dtype", "float32", "--device", "cpu", "--limit", str(LIMIT), "--max-steps", "3"),
        *("--lora-targets", "all-linear", "--lr", "5e-3", "--save-strategy", "no", "--eval-rows", "3"),
        *("--lora-dropout", "0.1", "--embedding-on-cpu", "--leaks", "none", "--output-dir", str(folder), *more),
    ]


def swept(model: Path, folder: Path, *more: str) -> int:
    try:
        return main(["sweep", *options(model, folder), *more])
    except SystemExit as stop:
        return stop.code


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs left the same adapter and measured the same, to the bit."""
    measured = [[(folder / f"{stage}.json").read_text() for stage in ("before", "after")] for folder in (one, other)]
    return same_adapter(one, other) and measured[0] == measured[1]


@pytest.fixture(scope="module")
def live_sweep(taught_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "live"
    arguments = ["--reference", "live", "--seeds", "1,2", "--grid", SWITCHES, "delta=0.5"]
    assert swept(taught_model, folder, *arguments) == 0
    return folder


def alone(model: Path, folder: Path, place: str, *more: str) -> Path:
    """The sweep's run at `place`, made by `train`."""
    seed = place.rpartition("-")[2]
    tiled = ["--tile-mlp", "16"] if "tile-mlp=16" in place else []
    settings = ("--delta", "0.5", "--seed", seed, "--reference", "live", *tiled, *more)
    config = parse_run(options(model, folder, *settings), "train")
    train(config, say=lambda line: None)
    return folder


PLACES = [f"tile-mlp={tile}_delta=0.5/seed-{seed}" for tile in ("16", "default") for seed in (1, 2)]


@pytest.mark.parametrize("place", PLACES)
def test_each_run_is_bit_for_bit_that_of_train(place, live_sweep, taught_model, tmp_path):
    assert same_run(live_sweep / place, alone(taught_model, tmp_path / "alone", place))


def test_the_runs_differ_from_one_another(live_sweep):
    """Otherwise the test above could not detect a mix-up."""
    assert not same_run(live_sweep / PLACES[0], live_sweep / PLACES[1])


def test_a_base_that_is_not_restored_is_noticed(taught_model, tmp_path, monkeypatch):
    """With a bug planted: the first run's adapters stay in the second run's model."""
    from contextlib import nullcontext

    monkeypatch.setattr(sweep_run, "borrowed", nullcontext)
    grid = ["--grid", "lora-targets=all-linear,q_proj", "delta=0.5"]
    swept(taught_model, tmp_path / "o", "--reference", "live", "--seeds", "1", *grid)
    place = "lora-targets=q_proj_delta=0.5/seed-1"
    if (tmp_path / "o" / place / "after.json").exists():
        expected = alone(taught_model, tmp_path / "alone", place, "--lora-targets", "q_proj")
        adapters = weights(tmp_path / "o" / place), weights(expected)
        assert adapters[0].keys() != adapters[1].keys() or not same_run(tmp_path / "o" / place, expected)


@pytest.mark.parametrize("qlora", [False, True])
def test_a_borrowed_base_is_restored(qlora, taught_model):
    from lowmem_npo.config import AdapterConfig, MemoryConfig
    from lowmem_npo.memory.switches import apply_switches
    from lowmem_npo.model import attach_lora

    base = load_model(ModelConfig(str(taught_model), qlora=qlora, dtype="float32", device="cpu"))
    names, values = [n for n, _ in base.named_modules()], {n: p.clone() for n, p in base.named_parameters()}
    attributes = {n: set(vars(m)) for n, m in base.named_modules()}
    config = base.config.to_dict()
    with borrowed(base):
        everything = MemoryConfig(tile_mlp=8, embedding_on_cpu=True, offload_checkpoints=True)
        apply_switches(attach_lora(base, AdapterConfig(lora_targets=("all-linear",))), everything)
        base.config.use_cache = True
        assert [n for n, _ in base.named_modules()] != names
    assert [n for n, _ in base.named_modules()] == names and base.config.to_dict() == config
    assert {n: set(vars(m)) for n, m in base.named_modules()} == attributes
    assert not any("forward" in vars(m) or getattr(m, "gradient_checkpointing", False) for m in base.modules())
    assert not any(p.requires_grad for p in base.parameters()) and not base.training
    assert all(torch.equal(p, values[n]) for n, p in base.named_parameters())


def test_one_reference_serves_all(taught_model, tmp_path):
    """Written by the first run, read by the second, as in two runs of `train` with the same --reference-dir."""
    assert swept(taught_model, tmp_path / "o", "--seeds", "1,2", "--grid", "delta=0.5") == 0
    stored = sorted(path.name for path in (tmp_path / "o" / "reference").iterdir())
    assert stored == ["forget.safetensors", "retain.safetensors"]
    assert not list((tmp_path / "o").glob("delta*/seed-*/reference"))
    for seed in ("1", "2"):
        given = ["--delta", "0.5", "--seed", seed, "--reference", "cached", "--reference-dir", str(tmp_path / "ref")]
        train(parse_run(options(taught_model, tmp_path / seed, *given), "train"), say=lambda line: None)
        assert same_run(tmp_path / "o" / "delta=0.5" / f"seed-{seed}", tmp_path / seed)


def test_the_figures(live_sweep):
    result = json.loads((live_sweep / "sweep.json").read_text())
    assert [c["name"] for c in result["configurations"]] == ["tile-mlp=16_delta=0.5", "tile-mlp=default_delta=0.5"]
    for configuration in result["configurations"]:
        for part in ("forget", "retain"):
            values = [
                json.loads((live_sweep / configuration["name"] / f"seed-{seed}" / "after.json").read_text())[part]
                for seed in configuration["seeds"]
            ]
            nlls = [value["summary"]["nll"] for value in values]
            figure = configuration["figures"][f"{part}_nll"]
            assert figure["values"] == nlls and figure["mean"] == pytest.approx(fmean(nlls))
            assert figure["sd"] == pytest.approx(stdev(nlls)) and figure["sd"] > 0
            assert f"{fmean(nlls):.3f} ± {stdev(nlls):.3f}" in (live_sweep / "sweep.md").read_text()
    originals = {(live_sweep / place / "before.json").read_text() for place in PLACES[2:]}
    assert len(originals) == 1, "every seed is measured on the same rows"
    lines = list(csv.DictReader((live_sweep / "sweep.csv").open()))
    assert [line["seed"] for line in lines] == ["1", "2", "1", "2"] and lines[0]["tile-mlp"] == "16"
    assert all(float(line["retain_nll"]) > 0 and line["status"] == "done" for line in lines)
    height, width = image.imread(live_sweep / "sweep.png").shape[:2]
    assert width > 1000 and height > 200


def test_a_run_that_could_not_even_begin_is_made_by_resume(byte_model, tmp_path, monkeypatch):
    """The disk is full when it writes its first file: what it has said must not stand in its directory's way."""
    arguments = ("--reference", "live", "--seeds", "1", "--max-steps", "1", "--eval-rows", "1")
    with monkeypatch.context() as full:
        full.setattr(RunDirectory, "begin", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        assert swept(byte_model, tmp_path / "sweep", *arguments) == 2
    assert swept(byte_model, tmp_path / "sweep", *arguments, "--resume") == 0


def raising(error: Exception) -> Callable:
    def fail(*_, **__):
        raise error

    return fail


def test_resume_skips_finished_runs_and_makes_the_others(live_sweep, taught_model, capsys):
    arguments = ["--reference", "live", "--seeds", "1,2", "--grid", SWITCHES, "delta=0.5"]
    kept, again = live_sweep / PLACES[0], live_sweep / PLACES[3]
    before = weights(again)
    stamp = (kept / "adapter_model.safetensors").stat().st_mtime_ns
    (again / "after.json").unlink()
    (again / "adapter_model.safetensors").unlink()  # as if it had been killed before its end
    assert swept(taught_model, live_sweep, *arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert swept(taught_model, live_sweep, *arguments, "--resume") == 0
    assert capsys.readouterr().out.count("done before") == 3
    assert (kept / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert all(torch.equal(before[name], weight) for name, weight in weights(again).items())
    assert swept(taught_model, live_sweep, *arguments, "--resume", "--lr", "1e-3") == 2
    assert "lr was 0.005" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}', "[" * 100_000])
def test_a_damaged_record_of_a_sweep_is_a_sentence(content, taught_model, tmp_path, capsys):
    (tmp_path / "sweep_state.json").write_text(content)
    assert swept(taught_model, tmp_path, "--reference", "live", "--seeds", "1", "--resume") == 2
    error = capsys.readouterr().err
    assert "sweep_state.json' is damaged: write {} into it" in error and "Traceback" not in error


def test_runs_too_short_for_what_was_asked_are_resumed(byte_model, tmp_path, capsys):
    """run.yaml has the attackers' 20 steps, of which three steps of a run have room for one."""
    arguments = ["--grid", "recipe=lasting", "--seeds", "1", "--batch-size", "2"]
    assert swept(byte_model, tmp_path / "sweep", *arguments) == 0
    capsys.readouterr()
    assert swept(byte_model, tmp_path / "sweep", *arguments, "--resume") == 0
    assert "began with other settings" not in capsys.readouterr().err


def test_a_longer_sweep_continues_its_runs(taught_model, tmp_path, capsys):
    arguments = ["--reference", "live", "--seeds", "1", "--grid", "per_device_train_batch_size=2,4"]
    arguments += ["--save-strategy", "steps", "--save-steps", "1"]
    assert swept(taught_model, tmp_path / "o", *arguments) == 0
    longer = [*arguments, "--resume", "--max-steps", "4"]
    assert swept(taught_model, tmp_path / "o", *longer) == 0
    assert "done before" not in capsys.readouterr().out
    for rows in (2, 4):
        place = tmp_path / "o" / f"micro-batch-size={rows}" / "seed-42"  # our name for it
        assert of_step(place) == 4
        assert (place / "report.json").is_file()
    assert swept(taught_model, tmp_path / "o", *longer) == 0
    assert capsys.readouterr().out.count("done before") == 2
    straight = alone(taught_model, tmp_path / "alone", "seed-42", "--max-steps", "4", "--micro-batch-size", "2")
    assert same_run(tmp_path / "o" / "micro-batch-size=2" / "seed-42", straight)
    assert (tmp_path / "o" / "micro-batch-size=2" / "seed-42" / "checkpoint-4").is_dir()


@pytest.mark.slow
def test_runs_of_other_lengths_are_no_configuration(byte_model, tmp_path, capsys):
    """A finished one is neither averaged with shorter ones nor taken for a longer one, however its length is given."""
    given = options(byte_model, tmp_path / "o", "--batch-size", str(LIMIT), "--reference", "live", "--eval-rows", "1")
    given[(at := given.index("--max-steps")) : at + 2] = ["--epochs", "2"]
    assert main(["sweep", *given, "--seeds", "1"]) == 0
    resumed = ["sweep", *given, "--resume", "--seeds", "2"]
    for shorter, message in (
        (["--epochs", "1"], "made with --epochs 2, 2 steps, and --epochs 1 would be 1: give --epochs 2, or another"),
        (["--max-steps", "1"], "and --max-steps 1 would be 1: give --epochs 2 without --max-steps, or another"),
    ):
        for more in ([], ["--dry-run"]):
            assert main([*resumed, *shorter, *more]) == 2
            assert message in capsys.readouterr().err
    assert not (tmp_path / "o" / "as-given" / "seed-43").exists()
    steps = []
    for length in (["--max-steps", "2"], ["--max-steps", "3"]):
        assert main(["sweep", *given, "--resume", "--seeds", "1", *length]) == 0
        steps.append(("done before" in capsys.readouterr().out, of_step(tmp_path / "o" / "as-given" / "seed-42")))
    assert steps == [(True, 2), (False, 3)]
    assert main([*resumed, "--epochs", "1"]) == 2
    assert "was made with --max-steps 3, 3 steps" in capsys.readouterr().err


def of_step(place: Path) -> int:
    return json.loads((place / "audit.json").read_text())["adapter"]["of_step"]


def test_a_diverged_run_is_reported_and_left_out_of_the_means(taught_model, tmp_path, capsys):
    huge = ["--lora-alpha", "1e6", "--max-grad-norm", "0"]
    grid = ["--seeds", "1", "--reference", "live", "--grid", "lr=1e-3,1e6", *huge]
    assert swept(taught_model, tmp_path / "o", *grid) == 1
    result = json.loads((tmp_path / "o" / "sweep.json").read_text())
    assert [c["name"] for c in result["configurations"]] == ["lr=1e-3"]
    assert [run["status"] for run in result["runs"]] == ["done", "failed"]
    assert "diverged" in result["runs"][1]["error"] and "diverged" in capsys.readouterr().out


def test_what_is_next_after_a_sweep(live_sweep, taught_model, capsys):
    """Its end names the runs and a command that works; a command that takes a run says which a sweep has."""
    given = ["--reference", "live", "--seeds", "1,2", "--grid", SWITCHES, "delta=0.5", "--resume"]
    assert swept(taught_model, live_sweep, *given) == 0
    runs = [str(live_sweep / place) for place in PLACES]
    printed = capsys.readouterr().out
    assert f"Runs, each with its report.html and log.txt: {', '.join(runs)}\n" in printed
    command = re.search(r"such as `lowmem-npo (merge .*)`\.", printed)[1]
    assert main(shlex.split(command)) == 0
    refused = f"'{live_sweep}' is a sweep; its runs are {', '.join(runs)}: name one of them."
    folder, model = str(live_sweep), str(taught_model)
    for words in (
        ["report", folder],
        ["ask", folder, "Who?"],
        ["merge", "--adapter", folder, "--output-dir", f"{folder}-merged"],
        ["evaluate", "--adapter", folder],
        ["estimate", "--adapter", folder],
        ["train", "--adapter", folder, "--output-dir", f"{folder}-more"],
        ["train", "--resume", "--output-dir", folder],
        ["train", "--resume", "--model", model, "--output-dir", folder],
    ):
        assert main(words) == 2
        assert capsys.readouterr().err == f"lowmem-npo {words[0]}: {refused}\n"


def test_a_failed_run_does_not_end_the_others(taught_model, tmp_path, capsys):
    arguments = ["--reference", "live", "--seeds", "1,2", "--grid", "lora-targets=nonsense,q_proj"]
    assert swept(taught_model, tmp_path / "o", *arguments) == 1
    printed = capsys.readouterr().out
    assert "2 of 4 runs failed" in printed and printed.count("nonsense matches no layer") == 4
    result = json.loads((tmp_path / "o" / "sweep.json").read_text())
    assert [c["name"] for c in result["configurations"]] == ["lora-targets=q_proj"]
    assert [run["status"] for run in result["runs"]] == ["failed", "failed", "done", "done"]
    assert "nonsense" in result["runs"][0]["error"]
    assert swept(taught_model, tmp_path / "none", *arguments[:-1], "lora-targets=nonsense") == 2
    assert "No run of the sweep succeeded" in capsys.readouterr().err


def test_what_a_sweep_refuses(taught_model, tmp_path, capsys):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("mine")
    for folder, more, message in (
        ("o", [], "holds other files"),
        ("new", ["--resume"], "there is no sweep"),
        ("new", ["--eval-rows", "0"], "--eval-rows"),
        ("new", ["--preview", "1"], "--preview"),
        ("o/mine.txt", [], "is a file"),
    ):
        assert swept(taught_model, tmp_path / folder, *more) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.slow
def test_a_budget_that_only_streaming_meets_is_refused(byte_model, tmp_path, capsys, monkeypatch):
    """As --stream-weights is, which a sweep has not; said by each run, before any weights load."""
    deep = tmp_path / "deep"  # more layers than the two that streaming keeps
    shutil.copytree(byte_model, deep)
    config = AutoConfig.from_pretrained(byte_model, num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(deep)
    monkeypatch.setattr(streaming, "ON_CPU", True)
    fixed = """
        --batch-size 1 --retain-batch-size 1 --max-length 64 --limit 1 --tile-mlp 16 --offload-checkpoints
        --double-quant on --joint-pass-tokens 0 --reference live --embedding-on-cpu --gradient-checkpointing
    """
    switches = fixed.split()

    def needed(*more: str) -> int:
        config = parse_run(options(deep, tmp_path / "x", *switches, "--memory-budget", "20GiB", *more), "train")
        workload = workload_of(config, read_inputs(config, silent).data)
        return Simulation(config, workload, None).report().estimate.total_bytes

    streamed, resident = needed("--stream-weights"), needed()
    assert streamed < resident
    budget = ["--seeds", "1", *switches, "--memory-budget", f"{(streamed + resident) / 2**21:.6f}MiB"]
    monkeypatch.setattr(sweep_run, "load_model", None)
    assert swept(deep, tmp_path / "o", *budget) == 2
    assert "--stream-weights is an option of single runs: use it with `lowmem-npo train`" in capsys.readouterr().out


def test_stopping_in_a_sweep_is_reported(taught_model, tmp_path):
    grid = ["--grid", "stop-when=,retain-loss+1000", "delta=0.5", "--seeds", "1", "--reference", "live"]
    assert swept(taught_model, tmp_path / "o", *grid) == 0
    plain, stopped = json.loads((tmp_path / "o" / "sweep.json").read_text())["configurations"]
    assert "kept_step" not in plain["figures"] and stopped["figures"]["kept_step"]["values"] == [3]
    assert plain["figures"]["forget_nll"] == stopped["figures"]["forget_nll"], "measuring changes nothing"
    (outcome,) = (tmp_path / "o").glob("*/*/stopping.json")
    for damaged in ("{", "[]", '{"kept": 3}'):
        outcome.write_text(damaged)
        assert swept(taught_model, tmp_path / "o", *grid, "--resume") == 1
        *_, failed = json.loads((tmp_path / "o" / "sweep.json").read_text())["runs"]
        assert "stopping.json' is damaged: restore or remove it" in failed["error"], failed


def test_a_base_is_gone_before_the_next_one_is_loaded(taught_model):
    """4-bit weights and their layers refer to each other."""
    bases, config = sweep_run.Bases(), ModelConfig(str(taught_model), qlora=True, device="cpu")
    with loads_watched(sweep_run) as still_there:
        for double_quant in ("on", "off"):
            bases.loaded(replace(config, double_quant=double_quant))
    assert still_there == [0, 0]


def test_a_failed_run_is_gone_before_the_next_one_trains(taught_model, tmp_path, monkeypatch):
    """The error's traceback holds its trainer until it has been reported."""
    real, trainers = NPOTrainer.training_step, list[weakref.ref]()

    def first_fails(trainer, *args):
        if not trainers:
            trainers.append(weakref.ref(trainer))
            gc.disable()
            raise RuntimeError("CUDA error: out of memory")
        return real(trainer, *args)

    def begins(*args):
        still_there.append(any(trainer() is not None for trainer in trainers))
        return unlearn(*args)

    still_there, unlearn = list[bool](), sweep_run.unlearn
    monkeypatch.setattr(NPOTrainer, "training_step", first_fails)
    monkeypatch.setattr(sweep_run, "unlearn", begins)
    try:
        assert swept(taught_model, tmp_path / "o", "--seeds", "1,2", "--grid", "delta=0.5") == 1
    finally:
        gc.enable()
    assert still_there == [False, False]


def test_runs_of_one_model_load_it_once(taught_model):
    loads = []

    class Counted(sweep_run.Bases):
        def loaded(self, config):
            before = self._model
            model = super().loaded(config)
            loads.append(model is not before)
            return model

    bases, config = Counted(), ModelConfig(str(taught_model), dtype="float32", device="cpu")
    for wanted in (config, replace(config), replace(config, dtype="bf16"), replace(config, dtype="bf16")):
        bases.loaded(wanted)
    assert loads == [True, False, True, False]
