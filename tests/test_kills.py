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
    "train, quantized": ("train", *SETTINGS, *TRAIN, "--qlora"),  # with a cache beside its directory
    "train, own texts": ("train", *SETTINGS, *TRAIN, "--forget", FORGET, "--retain", "self:6"),
    "sweep": ("sweep", *SETTINGS, *TRAIN, "--grid", "gamma=0,1", "--seeds", "1", "--reference", "live"),
    "evaluate": ("evaluate", "--device", "cpu", "--limit", "3", "--max-new-tokens", "4"),
    "merge": ("merge", "--dtype", "stored"),
}
WAYS = ("kill", "full", "read-only", "gone")
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
def command(byte_model, tmp_path_factory) -> Callable[[str], Command]:
    @cache
    def adapter() -> Path:
        folder = tmp_path_factory.mktemp("adapter") / "run"
        assert main(["train", *SETTINGS, *TRAIN, "--model", str(byte_model), "--output-dir", str(folder)]) == 0
        return folder

    @cache
    def of(kind: str) -> Command:
        made = adapter() if KINDS[kind][0] in ("evaluate", "merge") else None
        (result,) = started(kind, byte_model, made, tmp_path_factory.mktemp("whole") / "run", series=[[]])
        assert result["codes"] == [0], result["errors"]
        return Command(kind, byte_model, made, result["bits"], result["events"], result["seconds"])

    return of


def started(kind: str, model: Path, adapter: Path | None, out: Path, **what) -> list[dict]:
    name = KINDS[kind][0]
    base = ["--model", str(model)] if adapter is None else ["--adapter", str(adapter)]
    if "--qlora" in KINDS[kind]:
        base += ["--quantized-cache", f"{out}-cache"]
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


def test_killed_at_two_file_events(command, own_disk):
    """One after the other, in one run."""
    whole = command("train")
    print(f"{check(whole, own_disk, [[('kill', 2), ('kill', whole.events // 2)]])} kills at file events, the same bits")


@pytest.mark.slow
def test_a_disk_that_fails(command, own_disk):
    """From some file event on it has no more room, takes no more writes, or its directory is gone. The command ends
    with a sentence, or needs the disk no more; then it goes on, or begins anew without a directory."""
    whole = command("train")
    check(whole, own_disk, [[("full", whole.events // 2)], [("read-only", 9)], [("gone", whole.events // 3)]])


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_event(kind, command, own_disk):
    """The same, of every command, before and from every file event on."""
    whole = command(kind)
    undisturbed, *results = whole.failing(own_disk, every_event=WAYS)
    check_ended(whole, [], undisturbed)
    for result in results:
        for way, event, code, errors in result["before"]:
            again = result | {"codes": [code, *result["codes"]], "errors": [errors, *result["errors"]]}
            check_ended(whole, [(way, event)], again)
    events = undisturbed["events"]
    seen = sorted((event, way) for result in results for way, event, _, _ in result["before"])
    assert seen == sorted((event, way) for event in range(events) for way in WAYS) and abs(events - whole.events) < 5
    print(f"{kind}: killed before each of {events} file events, and a full, read-only or vanished disk from it on, "
          f"which leaves {len(results)} states: the same bits")  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment(kind, command, own_disk):
    """A hundred kills and more: of runs that are each killed up to four times, at whatever moments."""
    whole, generator, kills, runs = command(kind), random.Random(kind), 0, 0
    while kills < 100:
        kills += check(whole, own_disk, [[("kill", generator.uniform(0.01, 0.95)) for _ in range(4)] for _ in range(9)])
        runs += 9
    print(f"{kind}: {kills} kills at random moments of {whole.seconds:.1f} s in {runs} runs, the same bits")


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
