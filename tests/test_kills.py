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
    assert killed("train", byte_model, folder, None, [])["codes"] == [0]
    return folder


def killed(kind: str, model: Path, out: Path, adapter: Path | None, at: list) -> dict:
    name = KINDS[kind][0]
    base = ["--adapter", str(adapter)] if name in ("evaluate", "merge") else ["--model", str(model)]
    command = [*KINDS[kind], *base, "--output-dir", str(out)]
    resumed = command if name == "merge" else [*command, "--resume"]
    job = {"command": command, "resumed": resumed, "first": str(out / FIRST.get(name, "run.yaml")), "at": at}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "kills.py")], input=json.dumps(job), text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


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
    whole = killed(kind, byte_model, tmp_path / "whole", adapter, [])
    assert whole["codes"] == [0], whole["errors"]
    expected, events = bits(tmp_path / "whole"), whole["events"]
    series = [[at] for at in range(events)] if full else [[2, events // 2]]
    for at in series:
        result = killed(kind, byte_model, tmp_path / "run", adapter, at)
        assert result["codes"][-1] == 0, (at, result["errors"])
        assert all(code in (0, -signal.SIGKILL) for code in result["codes"]), (at, result["errors"])
        assert bits(tmp_path / "run") == expected, at
        left = [path for path in tmp_path.rglob("*.partial") if "damaged-" not in str(path)]
        assert not left, at
        shutil.rmtree(tmp_path / "run")
    print(f"{kind}: killed before each of {len(series) if full else 2} of {events} file events, the same bits")


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment(kind, byte_model, adapter, tmp_path):
    """A hundred kills, as many at once as one run takes."""
    generator, kills = random.Random(kind), 0
    assert killed(kind, byte_model, tmp_path / "whole", adapter, [])["codes"] == [0]
    expected = bits(tmp_path / "whole")
    while kills < 100:
        result = killed(kind, byte_model, tmp_path / "run", adapter, [generator.uniform(0.05, 3) for _ in range(5)])
        kills += sum(code == -signal.SIGKILL for code in result["codes"])
        assert result["codes"][-1] == 0 and bits(tmp_path / "run") == expected, result["errors"]
        shutil.rmtree(tmp_path / "run")
    print(f"{kind}: {kills} kills at random moments, the same bits")
