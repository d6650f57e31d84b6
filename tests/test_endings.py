"""Runs that end before their end: what they say, and that they go on to the same bits."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.saved_adapters import same_adapter
from safetensors import SafetensorError

from lowmem_npo.cli import main
from lowmem_npo.endings import Interrupted, failure
from lowmem_npo.run_directory import RunFiles, step_of
from lowmem_npo.training.metrics import read_metrics
from lowmem_npo.training.preemption import HEARD, Preemption

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
SETTINGS = ("--dtype", "float32", "--device", "cpu", "--eval-rows", "0", "--batch-size", "3", "--limit", "9",
            "--max-steps", "12", "--lr", "1e-2", "--lora-dropout", "0.1")  # fmt: skip


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    return ["train", "--model", str(model), *SETTINGS, "--output-dir", str(folder), *more]


def start(model: Path, folder: Path, *more: str, by: tuple[str, ...] = ("-m", "lowmem_npo"), **options):
    command = [sys.executable, *by, *arguments(model, folder, *more)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture(scope="module")
def whole(byte_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(byte_model, folder)) == 0
    return folder


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_job_that_is_ended_saves_first(number, code, byte_model, whole, tmp_path):
    def as_started_from_a_shell() -> None:  # in the background, as tests may run, some are ignored, and so by a run
        signal.signal(number, signal.SIG_DFL)

    folder = tmp_path / "run"
    waits = (str(ROOT / "tests" / "helpers" / "waiting.py"), "3")
    run = start(byte_model, folder, "--save-strategy", "no", by=waits, preexec_fn=as_started_from_a_shell)
    deadline = time.monotonic() + 300
    metrics = RunFiles(folder).metrics
    while not (metrics.exists() and len(read_metrics(metrics)) >= 2):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(number)
    _, error = run.communicate(timeout=300)
    (checkpoint,) = RunFiles(folder).checkpoints()
    last = error.splitlines()[-1]
    by = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert run.returncode == code and by in last and f"goes on from '{checkpoint}'" in last
    assert step_of(checkpoint) == 3 and (HEARD in error) == (number == signal.SIGINT)
    assert "Traceback" not in error and not RunFiles(folder).weights.exists()
    assert main(arguments(byte_model, folder, "--save-strategy", "no", "--resume")) == 0
    assert same_adapter(folder, whole)


def test_a_second_signal_ends_a_run_at_once(capfd):
    preemption = Preemption()
    with pytest.raises(Interrupted, match="interrupted"):  # it does not train yet
        preemption.hear(signal.SIGINT, None)
    preemption.on_train_begin(None, None, None)
    preemption.hear(signal.SIGINT, None)
    assert HEARD in capfd.readouterr().err
    with pytest.raises(Interrupted) as ended:
        preemption.hear(signal.SIGINT, None)
    assert ended.value.code == 130


@pytest.mark.parametrize(
    "where, left", [("read_inputs", "nothing was written"), ("_train", "--resume starts it again")]
)
def test_an_interrupted_run_says_what_is_left(where, left, byte_model, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lowmem_npo.commands.train.run.{where}", interrupted)
    assert main(arguments(byte_model, tmp_path / "run")) == 130
    error = capsys.readouterr().err
    assert "lowmem-npo train: interrupted; " in error and left in error
    assert (tmp_path / "run").exists() == (where == "_train")


@pytest.mark.parametrize("command, where, first", [
    ("evaluate", "evaluate.run.plan_evaluation", "settings.json"),
    ("sweep --seeds 1", "sweep.runs._sweep_claimed", "sweep_state.json"),
])  # fmt: skip
@pytest.mark.parametrize("what", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device", "/x")])
def test_resuming_is_advised_where_something_was_written(command, where, first, what, byte_model, tmp_path, capsys,
                                                         monkeypatch):  # fmt: skip
    """By this command: what another has left there is no reason."""
    out, nothing, writes = tmp_path / "out", "nothing was written", iter((False, True, False))

    def ends(*_, **__):
        if next(writes):
            out.mkdir(exist_ok=True)
            (out / first).write_text("{}")
        raise what

    monkeypatch.setattr(f"lowmem_npo.commands.{where}", ends)
    said = "interrupted; " if isinstance(what, KeyboardInterrupt) else "'/x': No space left on device; "
    goes_on = "the same command with --resume goes on from what it has written"
    for left in (nothing, goes_on, nothing):
        assert main([*command.split(), "--model", str(byte_model), "--output-dir", str(out)]) in (130, 2)
        assert capsys.readouterr().err == f"lowmem-npo {command.split()[0]}: {said}{left}.\n"


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "'/x/y': No space left on device"),
    (SafetensorError("I/O error: No space left"), "a file of weights could not be read or written (I/O error"),
    (
        RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing"),
        "perhaps because the disk is full; ",
    ),
    (MemoryError(), "the machine ran out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the machine ran out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "the GPU ran out of memory"),
    (RuntimeError("CUDA error: out of memory"), "the GPU ran out of memory"),
    (RuntimeError("CUDA driver error: out of memory"), "the GPU ran out of memory"),  # of expandable segments
]


@pytest.mark.parametrize("number", range(len(FAILURES)))
def test_what_the_machine_fails_is_a_sentence(number, byte_model, tmp_path, capsys, monkeypatch):
    error, words = FAILURES[number]

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("lowmem_npo.training.trainer.NPOTrainer.training_step", fails)
    assert main(arguments(byte_model, tmp_path / "run")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lowmem-npo train: ") and words in last and "--resume starts it again" in last


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("shape"), BrokenPipeError(errno.EPIPE, "x"), KeyError(1)]
)
def test_a_bug_is_not_taken_for_the_machine(error):
    assert failure(error) is None


@pytest.mark.parametrize("size", [pytest.param(4000, marks=pytest.mark.slow), 100])
def test_a_disk_that_takes_no_more(size, byte_model, whole, tmp_path, full):
    """Here every file of more than `size` bytes fails, as on a full disk: the weights, or the first file already."""
    if size == 100 and not full:
        pytest.skip("takes long: bash scripts/test.sh --full")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    run = start(
        byte_model, tmp_path / "run", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit))
    )
    _, error = run.communicate(timeout=300)
    assert run.returncode == 2 and "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("lowmem-npo train: ") and ("--resume" in last or "nothing was written" in last)
    again = ("--resume",) if RunFiles(tmp_path / "run").run_yaml.exists() else ()
    assert main(arguments(byte_model, tmp_path / "run", *again)) == 0
    assert same_adapter(tmp_path / "run", whole)
