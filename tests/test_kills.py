"""A command that is killed, or whose disk fails, at whatever file event or moment, ends in the same bits when it is
started again."""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
FORGET = str(ROOT / "lowmem_npo" / "data" / "bundled" / "forget.jsonl")
SETTINGS = ("--dtype", "float32", "--device", "cpu", "--limit", "6", "--lr", "1e-2", "--max-new-tokens", "4", "--forms",
            "trained", "--eval-rows", "2", "--leaks", "none", "--lora-dropout", "0.1")  # fmt: skip
TRAIN = ("--batch-size", "3", "--max-steps", "4", "--save-steps", "1")
KINDS = {
    "train": ("train", *SETTINGS, *TRAIN),
    "train, layered": ("train", *SETTINGS, *TRAIN, "--layered", "2"),
    "train, stopping": ("train", *SETTINGS, *TRAIN, "--stop-when", "retain-loss+1000", "--eval-every", "1"),
    "train, cached": ("train", *SETTINGS, *TRAIN, "--reference", "cached"),
    "train, own texts": ("train", *SETTINGS, *TRAIN, "--forget", FORGET, "--retain", "self:6"),
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
    (result,) = started("train", byte_model, None, {folder: []}).values()
    assert result["codes"] == [0], result["errors"]
    return folder


@dataclass
class Command:
    """A command of which nothing keeps, and what comes of it."""

    kind: str
    model: Path
    adapter: Path | None
    bits: dict[str, str]
    events: int  # of files
    seconds: float

    def failing(self, runs: dict[Path, list]) -> dict[Path, dict]:
        """What became of each run, by its directory: see tests/helpers/kills.py."""
        return started(self.kind, self.model, self.adapter, runs, self.seconds)


@pytest.fixture(scope="module")
def command(byte_model, request, tmp_path_factory, full) -> Callable[[str], Command]:
    @cache
    def of(kind: str) -> Command:
        if kind != "train" and not full:
            pytest.skip("takes long: bash scripts/test.sh --full")
        adapter = request.getfixturevalue("adapter") if KINDS[kind][0] in ("evaluate", "merge") else None
        out = tmp_path_factory.mktemp("whole") / "run"
        result = started(kind, byte_model, adapter, {out: []})[out]
        assert result["codes"] == [0], result["errors"]
        return Command(kind, byte_model, adapter, bits(out), result["events"], result["seconds"])

    return of


def started(kind: str, model: Path, adapter: Path | None, runs: dict[Path, list], seconds: float = 0.0) -> dict:
    name = KINDS[kind][0]
    base = ["--model", str(model)] if adapter is None else ["--adapter", str(adapter)]
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
def test_killed_at_file_events(kind, command, tmp_path, full):
    """Short: one after the other in one run of `train`. Full: each by itself, at every file event of every command."""
    whole = command(kind)
    series = [[at] for at in range(whole.events)] if full else [[2, whole.events // 2]]
    kills = check(whole, tmp_path, [[("kill", at) for at in own] for own in series])
    print(f"{kind}: {kills} kills before {'each' if full else 'some'} of {whole.events} file events, the same bits")


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment(kind, command, tmp_path):
    """A hundred kills: of twenty-five runs, each four times, at whatever moment of the time that one takes."""
    whole, generator = command(kind), random.Random(kind)
    kills = check(whole, tmp_path, [[("kill", generator.uniform(0.01, 0.95)) for _ in range(4)] for _ in range(25)])
    print(f"{kind}: {kills} kills at random moments of {whole.seconds:.1f} s, the same bits")
    assert kills > 50  # others came after the end


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fails(kind, command, own_disk, full):
    """From some file event on it has no more room, takes no more writes, or its directory is gone. The command ends
    with a sentence, or needs the disk no more; then it goes on, or begins anew without a directory."""
    whole = command(kind)
    some = [("full", whole.events // 2), ("read-only", 9), ("gone", whole.events // 3)]
    if full:
        some = [(how, at) for how in ("full", "read-only", "gone") for at in range(whole.events)]
    check(whole, own_disk, [[one] for one in some])
    print(f"{kind}: {len(some)} times a disk that fails from a file event on, the same bits")


@pytest.fixture
def own_disk(tmp_path) -> Iterator[Path]:
    """A file system in memory of 100 MiB, where that may be mounted; else a directory, in which writing is simulated to
    fail."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], capture_output=True)
    yield folder
    if mounted.returncode == 0:
        subprocess.run(["umount", "--lazy", folder], check=True)


def check(whole: Command, folder: Path, series: list[list]) -> int:
    """Runs the command as often as there are series of what happens to it; every time it ends in the bits of a whole
    run, and leaves nothing half-made. Returns how often it was killed."""
    kills = 0
    for first in range(0, len(series), 10):  # so many are on the disk at once
        runs = {folder / f"run-{i}": series[i] for i in range(first, min(first + 10, len(series)))}
        for out, result in whole.failing(runs).items():
            said = (runs[out], result["codes"], result["errors"])
            *failed, last = zip(result["codes"], result["errors"], strict=True)
            assert last[0] == 0 and bits(out) == whole.bits, said
            for (how, _), (code, error) in zip(runs[out], failed, strict=True):
                assert code in ((0, -signal.SIGKILL) if how == "kill" else (0, 2)), said
                *_, sentence = ["", *error.strip().splitlines()]
                assert "Traceback" not in error, said
                assert code != 2 or re.match(rf"lowmem-npo {KINDS[whole.kind][0]}: .*\.$", sentence), said
                kills += code == -signal.SIGKILL
            assert not [*out.rglob("*.partial"), *out.rglob("damaged-*")], said
            shutil.rmtree(out)
    return kills
