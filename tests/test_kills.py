"""A command that is killed, at whatever file event or moment, ends in the same bits when it is started again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
SETTINGS = ("--dtype", "float32", "--device", "cpu", "--limit", "6", "--lr", "1e-2", "--max-new-tokens", "4", "--forms",
            "trained", "--eval-rows", "2", "--leaks", "none", "--lora-dropout", "0.1")  # fmt: skip
TRAIN = ("--batch-size", "3", "--max-steps", "4", "--save-steps", "1")
KINDS = {
    "train": ("train", *SETTINGS, *TRAIN),
    "train, layered": ("train", *SETTINGS, *TRAIN, "--layered", "2"),
    "train, stopping": ("train", *SETTINGS, *TRAIN, "--stop-when", "retain-loss+1000", "--eval-every", "1"),
    "train, cached": ("train", *SETTINGS, *TRAIN, "--reference", "cached"),
    "train, own texts": ("train", *SETTINGS, *TRAIN, "--retain", "self:6"),
    "sweep": ("sweep", *SETTINGS, *TRAIN, "--grid", "gamma=0,1", "--seeds", "1", "--reference", "live"),
    "evaluate": ("evaluate", "--device", "cpu", "--limit", "3", "--max-new-tokens", "4"),
    "merge": ("merge", "--dtype", "stored"),
}
FIRST = {"sweep": "sweep_state.json", "evaluate": "settings.json", "merge": "no file"}  # and run.yaml of a run
LOCK_FREE = (
    "*.safetensors",
    "after.json",
    "before.json",
    "evaluations.jsonl",
    "stopping.json",
    "evaluation.json",
    "rows.jsonl",
)


@pytest.fixture(scope="module")
def adapter(byte_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "run"
    (result,) = killed("train", byte_model, None, {folder: []}).values()
    assert result["codes"] == [0], result["errors"]
    return folder


def killed(kind: str, model: Path, adapter: Path | None, runs: dict[Path, list], seconds: float = 0.0) -> dict:
    """What became of each run, by its directory: see tests/helpers/kills.py."""
    name = KINDS[kind][0]
    base = ["--adapter", str(adapter)] if name in ("evaluate", "merge") else ["--model", str(model)]
    command = [*KINDS[kind], *base]
    resumed = command if name == "merge" else [*command, "--resume"]
    job = {"command": command, "resumed": resumed, "first": FIRST.get(name, "run.yaml"), "seconds": seconds}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "kills.py")],
        input=json.dumps(job | {"runs": {str(out): at for out, at in runs.items()}}), text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {Path(out): result for out, result in json.loads(done.stdout).items()}


def bits(out: Path) -> dict[str, str]:
    """What must be the same: weights and measurements, without those of checkpoints that are not the last."""
    files = [
        path
        for pattern in LOCK_FREE
        for path in out.rglob(pattern)
        if not re.search("checkpoint|best|reference", str(path.relative_to(out)))
    ]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_file_events(kind, byte_model, request, tmp_path, full):
    """Short: one after the other in one run of `train`. Full: each by itself, at every file event of every command."""
    if kind != "train" and not full:
        pytest.skip("takes long: bash scripts/test.sh --full")
    adapter = request.getfixturevalue("adapter") if full else None
    whole = killed(kind, byte_model, adapter, {tmp_path / "whole": []})[tmp_path / "whole"]
    assert whole["codes"] == [0], whole["errors"]
    events = whole["events"]
    series = [[at] for at in range(events)] if full else [[2, events // 2]]
    kills = check(kind, byte_model, adapter, tmp_path, series)
    print(f"{kind}: {kills} kills before {'each' if full else 'some'} of {events} file events, the same bits")


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment(kind, byte_model, adapter, tmp_path):
    """A hundred kills: of twenty-five runs, each four times, at whatever moment of the time that one takes."""
    whole = killed(kind, byte_model, adapter, {tmp_path / "whole": []})[tmp_path / "whole"]
    generator = random.Random(kind)
    series = [[generator.uniform(0.01, 0.95) for _ in range(4)] for _ in range(25)]
    kills = check(kind, byte_model, adapter, tmp_path, series, whole["seconds"])
    print(f"{kind}: {kills} kills at random moments of {whole['seconds']:.1f} s, the same bits")
    assert kills > 50  # others came after the end


def check(kind, model, adapter, folder: Path, series: list[list], seconds: float = 0.0) -> int:
    """Runs as often as there are series of kills; all must end in the bits of folder/whole. Returns the kills."""
    expected, kills = bits(folder / "whole"), 0
    for some in range(0, len(series), 10):  # so many are on the disk at once
        runs = {folder / f"run-{i}": series[i] for i in range(some, min(some + 10, len(series)))}
        for out, result in killed(kind, model, adapter, runs, seconds).items():
            said = (runs[out], result["errors"])
            assert result["codes"][-1] == 0 and all(c in (0, -signal.SIGKILL) for c in result["codes"]), said
            assert bits(out) == expected, said
            assert not [path for path in out.rglob("*.partial")], said
            assert not list(out.rglob("damaged-*")), said
            kills += result["codes"].count(-signal.SIGKILL)
            shutil.rmtree(out)
    return kills
