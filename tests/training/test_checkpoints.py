"""A run resumes from what is whole: whatever is damaged, its adapter is the uninterrupted run's, bit by bit."""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.rows import write_rows
from helpers.saved_adapters import same_adapter
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints

from lowmem_npo.cli import main
from lowmem_npo.run_directory import AdapterFiles, RunFiles
from lowmem_npo.stop_conditions import parse_conditions
from lowmem_npo.training.checkpoints import write_digest
from lowmem_npo.training.early_stopping import Stopping

FILES = ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt",
         "rng_state.pth")  # fmt: skip


Run = Callable[..., int]


@pytest.fixture(scope="module")
def run(byte_model, tmp_path_factory) -> Run:
    """Four steps; dropout and a schedule, so that random numbers, moments and schedule all count."""
    data = tmp_path_factory.mktemp("data")
    for part in ("forget", "retain"):
        rows = [{"question": f"{part} {i}?", "answer": f"No {i * i}."} for i in range(6)]
        write_rows(data / f"{part}.jsonl", rows)
    settings = [
        "--model", byte_model, "--dtype", "float32", "--device", "cpu", "--forget", data / "forget.jsonl",
        "--retain", data / "retain.jsonl", "--batch-size", 3, "--eval-rows", 0, "--lr", 1e-2, "--lora-dropout", 0.3,
        "--max-steps", 4, "--lr-scheduler-type", "cosine", "--warmup-steps", 2, "--save-steps", 1,
        "--save-total-limit", 9,
    ]  # fmt: skip
    return lambda folder, *more: main(["train", *map(str, settings), "--output-dir", str(folder), *more])


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    return folder


@pytest.fixture
def cut(whole, tmp_path):
    """The run as it was when it was killed after its third checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    RunFiles(folder).weights.unlink()
    shutil.rmtree(folder / "checkpoint-4")
    return folder


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbled(file: Path) -> None:
    """One bit of the content, which no format's structure shows; nor does torch.load look at its file's checksums."""
    content = bytearray(file.read_bytes())
    at = len(content) - 100
    if file.suffix != ".safetensors":
        with zipfile.ZipFile(file) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        lengths = struct.unpack_from("<HH", content, largest.header_offset + 26)  # of the record's name and extra field
        at = largest.header_offset + 30 + sum(lengths) + largest.file_size // 2
    content[at] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def of_another_step(file: Path) -> None:
    shutil.copy(file.parents[1] / "checkpoint-1" / file.name, file)


def without_moments(file: Path) -> None:
    torch.save({**torch.load(file), "state": {}}, file)


DAMAGES = [(name, missing) for name in FILES] + [(name, truncated) for name in FILES[:4]]
DAMAGES += [(name, garbled) for name in FILES[2:]] + [("optimizer.pt", empty), ("optimizer.pt", without_moments)]
DAMAGES += [(name, of_another_step) for name in FILES[2:]]
DAMAGES += [("checkpoint.sha256", missing), ("checkpoint.sha256", truncated)]  # by which damaged numbers are seen


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(name, damage, whole, cut, run, capsys):
    damage(cut / "checkpoint-3" / name)
    assert run(cut, "--resume") == 0
    printed = capsys.readouterr()
    assert f"checkpoint-3 is not whole: {name} is " in printed.out
    assert "continues from checkpoint-2" in printed.out and "Traceback" not in printed.err
    assert same_adapter(cut, whole)
    assert {p.name for p in cut.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3, 4)}
    assert "damaged-checkpoint-3 removed: the run is complete without." in printed.out
    assert not (cut / "damaged-checkpoint-3").exists()


def test_a_checkpoint_for_which_memory_ran_out_is_not_called_damaged(cut, run, capsys, monkeypatch):
    """It would be removed in the end."""

    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", no_memory)
        assert run(cut, "--resume") == 2
    assert "the machine ran out of memory" in capsys.readouterr().err and not list(cut.glob("damaged-*"))


def test_half_a_checkpoint_costs_no_whole_one(whole, cut, run, capsys):
    """The Trainer was killed while it removed the oldest, whose date is then the latest."""
    missing(cut / "checkpoint-1" / "optimizer.pt")
    assert run(cut, "--resume") == 0
    printed = capsys.readouterr().out
    assert "checkpoint-1 is not whole: optimizer.pt is missing" in printed and "continues from checkpoint-3" in printed
    rotate_checkpoints(cut, 2, use_mtime=True)
    assert {path.name for path in cut.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_without_a_whole_checkpoint_it_starts_from_the_beginning(whole, cut, run, capsys):
    for checkpoint in cut.glob("checkpoint-*"):
        missing(checkpoint / "optimizer.pt")
    (cut / "checkpoint-2-copy").mkdir()
    (cut / "checkpoint-9").write_text("a file")
    assert run(cut, "--resume") == 0
    assert "no whole checkpoint, so the run starts from its beginning" in capsys.readouterr().out
    assert same_adapter(cut, whole)


def test_the_weights_of_another_adapter_do_not_count(whole, cut, run, capsys):
    """Other names, which PEFT would pass over, and other shapes, be they hashed."""
    for step, change in ((3, lambda name, weight: (f"x{name}", weight)), (2, lambda name, weight: (name, weight[:1]))):
        files = AdapterFiles(cut / f"checkpoint-{step}")
        save_file(dict(change(*item) for item in load_file(files.weights).items()), files.weights)
        write_digest(files)
    assert run(cut, "--resume") == 0
    assert "continues from checkpoint-1" in capsys.readouterr().out
    assert same_adapter(cut, whole)


def test_checkpoints_without_state_end_a_run_but_do_not_continue_one(whole, tmp_path, run, capsys):
    """--save-only-model; the weights are kept, whether they can be resumed or not."""
    folder = tmp_path / "run"
    assert run(folder, "--save-only-model", "true") == 0
    (folder / "adapter_model.safetensors").unlink()
    capsys.readouterr()
    assert run(folder, "--save-only-model", "true", "--resume") == 0
    assert "is not whole" not in capsys.readouterr().out and same_adapter(folder, whole)
    (folder / "adapter_model.safetensors").unlink()
    missing(folder / "checkpoint-4" / "trainer_state.json")
    assert run(folder, "--save-only-model", "true", "--resume") == 0
    assert "optimizer.pt is missing" in capsys.readouterr().out and same_adapter(folder, whole)


MEASURES = ("--stop-when", "retain-loss+1000", "--eval-every", "1", "--eval-rows", "2", "--leaks", "extraction")


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured") / "run"
    assert run(folder, *MEASURES) == 0
    return folder


def test_the_best_adapter_so_far_belongs_to_a_checkpoint(run, measured, tmp_path, capsys):
    """Under --stop-when; each checkpoint has its own."""
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    RunFiles(folder).weights.unlink()
    best = RunFiles(folder).best
    assert {file.name for file in best.iterdir()} == {f"step-{step}.safetensors" for step in (1, 2, 3, 4)}
    truncated(best / "step-4.safetensors")
    missing(best / "step-3.safetensors")
    assert run(folder, *MEASURES, "--resume") == 0
    printed = capsys.readouterr().out
    for step in (4, 3):
        assert f"checkpoint-{step} is not whole: step-{step}.safetensors, the best adapter until then" in printed
    assert "continues from checkpoint-2" in printed and same_adapter(folder, measured)


@pytest.mark.parametrize("content", ["", "model: [m", "- a", "\x00"])
def test_a_damaged_run_yaml_is_named(content, cut, run, capsys):
    RunFiles(cut).run_yaml.write_text(content)
    assert run(cut, "--resume") == 2
    error = capsys.readouterr().err
    assert "run.yaml' is damaged" in error and "Traceback" not in error


@pytest.mark.parametrize("content", ["", "[]\n", "[" * 100_000, "{}", '{"step": 0, "epoch": 0.0, "forget_nll": [1]}'])
def test_no_run_goes_on_from_damaged_evaluations(content, tmp_path):
    path = RunFiles(tmp_path).stop_evaluations
    path.write_text(content)
    stopping = Stopping(parse_conditions(["retain-loss+1000"]), torch.nn.Linear(1, 1), {}, tmp_path)
    assert re.search(f"^{path.name} (is damaged|lacks what)", stopping.damage(1))


@pytest.mark.parametrize("name", ["before.json", "leaks.json", "evaluations.jsonl"])
def test_damaged_measurements_are_made_again(name, run, measured, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    RunFiles(folder).weights.unlink()
    truncated(folder / name)
    assert run(folder, *MEASURES, "--resume") == 0
    assert "Traceback" not in capsys.readouterr().err
    assert (folder / name).read_text() == (measured / name).read_text()
