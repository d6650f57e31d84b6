"""A command that is killed, or whose disk fails, at whatever file event or moment, ends in the same bits when it is
started again."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from lowmem_npo.cli import main

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


@dataclass
class Command:
    """A command, and what comes of it if nothing keeps it."""

    kind: str
    model: Path
    adapter: Path | None
    bits: dict[str, str]
    events: int  # of files
    seconds: float

    def failing(self, folder: Path, **what) -> list[dict]:
        """What became of it in folder/run each time: see tests/helpers/kills.py."""
        return started(self.kind, self.model, self.adapter, folder / "run", seconds=self.seconds, **what)


@pytest.fixture(scope="module")
def command(byte_model, tmp_path_factory, full) -> Callable[[str], Command]:
    @cache
    def adapter() -> Path:
        folder = tmp_path_factory.mktemp("adapter") / "run"
        assert main(["train", *SETTINGS, *TRAIN, "--model", str(byte_model), "--output-dir", str(folder)]) == 0
        return folder

    @cache
    def of(kind: str) -> Command:
        if kind != "train" and not full:
            pytest.skip("takes long: bash scripts/test.sh --full")
        made = adapter() if KINDS[kind][0] in ("evaluate", "merge") else None
        (result,) = started(kind, byte_model, made, tmp_path_factory.mktemp("whole") / "run", series=[[]])
        assert result["codes"] == [0], result["errors"]
        return Command(kind, byte_model, made, result["bits"], result["events"], result["seconds"])

    return of


def started(kind: str, model: Path, adapter: Path | None, out: Path, **what) -> list[dict]:
    name = KINDS[kind][0]
    base = ["--model", str(model)] if adapter is None else ["--adapter", str(adapter)]
    command = [*KINDS[kind], *base]
    resumed = command if name == "merge" else [*command, "--resume"]
    job = {"command": command, "resumed": resumed, "first": FIRST.get(name, "run.yaml"), "out": str(out)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "kills.py")],
        input=json.dumps(job | what), text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_file_events(kind, command, own_disk, full):
    """Short: one after the other in one run of `train`. Full: before every file event of every command."""
    whole = command(kind)
    if not full:
        kills = check(whole, own_disk, [[("kill", 2), ("kill", whole.events // 2)]])
        return print(f"{kind}: {kills} kills at file events, the same bits")
    events, states = check_every_event(whole, own_disk, "kill")
    print(f"{kind}: killed before each of {events} file events, which leaves {states} states: the same bits")


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment(kind, command, own_disk):
    """A hundred kills and more: of runs that are each killed up to four times, at whatever moments."""
    whole, generator, kills, runs = command(kind), random.Random(kind), 0, 0
    while kills < 100:
        kills += check(whole, own_disk, [[("kill", generator.uniform(0.01, 0.95)) for _ in range(4)] for _ in range(9)])
        runs += 9
    print(f"{kind}: {kills} kills at random moments of {whole.seconds:.1f} s in {runs} runs, the same bits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fails(kind, command, own_disk, full):
    """From some file event on it has no more room, takes no more writes, or its directory is gone. The command ends
    with a sentence, or needs the disk no more; then it goes on, or begins anew without a directory."""
    whole = command(kind)
    if not full:
        check(whole, own_disk, [[("full", whole.events // 2)], [("read-only", 9)], [("gone", whole.events // 3)]])
        return print(f"{kind}: 3 times a disk that fails from a file event on, the same bits")
    events, states = check_every_event(whole, own_disk, "full", "read-only", "gone")
    print(f"{kind}: a disk that fails from each of {events} file events on, full, read-only and gone, which leaves "
          f"{states} states: the same bits")  # fmt: skip


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
    """Runs the command as often as there are series of what happens to it; returns how often it was killed."""
    results = whole.failing(folder, series=series)
    for moments, result in zip(series, results, strict=True):
        check_ended(whole, moments, result)
    return sum(result["codes"].count(-signal.SIGKILL) for result in results)


def check_every_event(whole: Command, folder: Path, *ways: str) -> tuple[int, int]:
    """One of the ways from each file event of a run on; returns how many events there are, and how many states of the
    disk they leave."""
    undisturbed, *results = whole.failing(folder, every_event=ways)
    for result in (undisturbed, *results):
        for way, event, code, errors in result["before"] or [("", 0, 0, "")]:
            again = result | {"codes": [code, *result["codes"]], "errors": [errors, *result["errors"]]}
            check_ended(whole, [(way, event)], again)
    seen = sorted((event, way) for result in results for way, event, _, _ in result["before"])
    assert seen == sorted((event, way) for event in range(undisturbed["events"]) for way in ways)
    assert abs(undisturbed["events"] - whole.events) < 5
    return undisturbed["events"], len(results)


def check_ended(whole: Command, moments: list, result: dict) -> None:
    """It ended in the bits of a whole run, and left nothing half-made; each time before, in a sentence."""
    said = (moments, result)
    is_merge = KINDS[whole.kind][0] == "merge"  # which refuses to go on where it was complete before
    attempts = [
        (0 if is_merge and "holds other files" in error else code, error)
        for code, error in zip(result["codes"], result["errors"], strict=True)
    ]
    *failed, last = attempts
    assert last[0] == 0 and result["bits"] == whole.bits and not result["left"], said
    for (how, _), (code, error) in zip(moments, failed, strict=True):
        assert code in ((0, -signal.SIGKILL) if how == "kill" else (0, 2)), said
        *_, sentence = ["", *error.strip().splitlines()]
        assert "Traceback" not in error, said
        assert code != 2 or re.match(rf"lowmem-npo {KINDS[whole.kind][0]}: .*\.$", sentence), said
