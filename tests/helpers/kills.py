"""Kills a command at given file events, or moments, in forks of a process that has run it once: all is imported then,
and an attempt takes a second. Runs it again until it has ended. Or lets its disk fail from an event on, and has it in
order before the next attempt. Reads one JSON object from standard input, and writes one list:

    command: the arguments of the command, without its --output-dir; resumed: those once that holds `first`
    out: the output directory, each time; nothing else is beside it
    series: of [how, at], what happens one after the other, each time anew
        how: "kill"; "full", the disk has no room; "read-only", it takes no more writes; "gone", no directory is there
        at: the number of a file event, or, if a fraction, of the `seconds` that a whole run takes
    every_event: instead of series, each of these ways from every file event on. It happens to forks of one whole run,
        one for each event and way; what they leave on the disk is gone on from once for all that leave the same
    -> of each: {"events": file events of the last attempt, "seconds": what it took, "codes": the exit codes, "errors":
       what was written to stderr, "bits": see there, "left": files half-made}; of every_event also "before": [way,
       event, exit code, stderr] of all that leave what it goes on from
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod", "shutil.copyfile"}
MEASURED = ("*.safetensors", "after.json", "before.json", "evaluations.jsonl", "stopping.json", "evaluation.json",
            "rows.jsonl")  # fmt: skip
ASIDE = "gone"  # the name of a directory that is gone
LINKS, REMOVED = "links", "removed"  # of links to the files, and of the directories, that a fork may remove


def bits(out: Path) -> dict[str, str]:
    """What must be the same: weights and measurements, without those of checkpoints that are not the last."""
    files = [
        path
        for pattern in MEASURED
        for path in out.rglob(pattern)
        if not re.search("checkpoint|best|reference", str(path.relative_to(out)))
    ]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def is_write(event: str, arguments: tuple) -> bool:
    return event in WRITES or (
        event == "open"
        and isinstance(arguments[2], int)
        and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )


class Failing:
    """What happens to the disk of `out` from file event `at` on."""

    def __init__(self, how: str, out: Path) -> None:
        self.how, self.out, self.fails = how, out, False
        self.ballast, self.aside = out.parent / "ballast", out.parent / ASIDE

    def begin(self, _: int) -> None:
        self.fails = True
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "gone" and self.out.is_dir():
            self.out.rename(self.aside)
        if self.how == "full" and os.path.ismount(self.out.parent):
            disk = os.statvfs(self.out.parent)
            with self.ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize)

    def check(self, event: str, path: object) -> None:
        """Raises what the operation raises once it fails, unless the disk does so itself."""
        inside = self.fails and str(path).startswith(str(self.out)) and event not in ("os.remove", "os.rmdir")
        if self.how == "read-only" and inside:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        if self.how == "full" and inside and not self.ballast.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def end(self) -> None:
        """Puts the disk in order."""
        self.check_gone()
        self.ballast.unlink(missing_ok=True)
        if self.aside.exists():
            shutil.rmtree(self.aside)

    def check_gone(self) -> None:
        assert not (self.aside.exists() and self.out.exists()), f"made again: {[*self.out.iterdir()]}"


class EveryEvent:
    """Each way in which a disk fails or a process is killed, from every file event of one run on, in forks of it: what
    they leave of the folder of `out` is copied into `kept`, once for all that leave the same."""

    def __init__(self, ways: list[str], out: Path, kept: Path) -> None:
        self.ways, self.out, self.folder, self.kept = ways, out, out.parent, kept
        self.failing: Failing | None = None  # of such a fork

    def look(self, event: int) -> None:
        if self.failing:
            return
        try:
            self.fork_each(event)
        except OSError as error:  # which the command would take for one of its own
            raise AssertionError(f"looking at event {event}") from error
        if self.failing:
            self.failing.begin(event)

    def fork_each(self, event: int) -> None:
        whole = left = self.keep()
        shutil.copytree(self.folder, self.folder / LINKS, copy_function=os.link)
        for way in self.ways:
            code, errors = -signal.SIGKILL, b""
            if way != "kill":
                failing = Failing(way, self.out)
                with tempfile.TemporaryFile() as file:
                    if (child := os.fork()) == 0:
                        os.dup2(file.fileno(), 2)
                        self.failing = failing
                        return
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    file.seek(0)
                    errors = file.read()
                failing.check_gone()
                failing.ballast.unlink(missing_ok=True)
                left = self.keep()
                self.put_back(failing.aside, self.out)
                for directory in sorted((self.folder / REMOVED).glob("*"), key=lambda path: len(path.name)):
                    self.put_back(directory, Path(unquote(directory.name)))
                if left != whole:
                    self.restore(whole)
            with (left / "before").open("a") as file:
                file.write(json.dumps([way, event, code, errors.decode(errors="replace")[-2000:]]) + "\n")
        shutil.rmtree(self.folder / LINKS)
        shutil.rmtree(self.folder / REMOVED, ignore_errors=True)

    def check(self, event: str, path: object) -> None:
        if self.failing is None:
            return
        if event == "os.rmdir" and (directory := Path(str(path))).is_dir() and not any(directory.iterdir()):
            kept = self.folder / REMOVED / quote(str(directory), safe="")
            if not kept.exists() and not self.failing.aside.exists():  # put back as itself: the run has claimed it
                kept.parent.mkdir(exist_ok=True)
                directory.rename(kept)
                directory.mkdir()
        self.failing.check(event, path)

    def put_back(self, directory: Path, place: Path) -> None:
        if directory.exists():
            shutil.rmtree(place, ignore_errors=True)
            directory.rename(place)

    def keep(self) -> Path:
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if not {ASIDE, LINKS, REMOVED} & {*path.parts}:
                content = path.read_bytes() if path.is_file() and path.name != "lowmem-npo.lock" else b""
                digest.update(repr((str(path), path.stat().st_mode, hashlib.sha256(content).digest())).encode())
        state = self.kept / digest.hexdigest()
        if not state.exists():
            shutil.copytree(self.folder, state / "folder", ignore=shutil.ignore_patterns(ASIDE, LINKS, REMOVED))
        return state

    def restore(self, state: Path) -> None:
        """In place: the run holds files open."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if not (state / "folder" / path.relative_to(self.folder)).exists() and not {LINKS, REMOVED} & {*path.parts}:
                path.rmdir() if path.is_dir() else path.unlink()
        for path in (self.folder / LINKS).rglob("*"):
            there = self.folder / path.relative_to(self.folder / LINKS)
            if path.is_dir():
                there.mkdir(exist_ok=True)
            elif not there.exists() or not there.samefile(path):  # removed, or replaced by another that was renamed
                there.unlink(missing_ok=True)
                there.hardlink_to(path)
        shutil.copytree(state / "folder", self.folder, dirs_exist_ok=True)

    def results(self, ended: Callable[[], dict]) -> list[dict]:
        """What comes of what is left, each time."""
        results = []
        for state in sorted(self.kept.iterdir()):
            if (lines := state / "before").exists():
                self.restore(state)
                before = [json.loads(line) for line in lines.read_text().splitlines()]
                results.append({"before": before} | ended())
        return results


def attempt(arguments: list[str], at: float | None, begin: Callable, check: Callable) -> tuple[int, int, str]:
    """(exit code, file events, what it wrote to stderr) of the command in a fork.

    at: the seconds after which it is killed, or the file event before which `begin` is called; None: all of them, with
        their numbers. Later ones are checked.
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as counter:
        if (child := os.fork()) == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            events, within = [0], [False]

            def hook(event: str, details: tuple) -> None:
                if within[0] or not is_write(event, details):
                    return
                within[0] = True
                try:
                    if at is None or events[0] == at:
                        begin(events[0])
                    events[0] += 1
                    os.pwrite(counter.fileno(), f"{events[0]:9}".encode(), 0)  # forks count there too
                    check(event, details[1] if event in ("os.rename", "os.link") else details[0])
                finally:
                    within[0] = False

            sys.addaudithook(hook)
            code = 70
            try:
                code = command(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if isinstance(at, float):
            time.sleep(at)
            os.kill(child, signal.SIGKILL)  # still there, ended or not: nobody has waited for it
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        counter.seek(0)
        written = errors.read().decode(errors="replace")[-2000:]
        return os.waitstatus_to_exitcode(status), int(counter.read() or 0), written


def command(arguments: list[str]) -> int:
    from lowmem_npo.cli import main

    return main(arguments)


def nothing(*_: object) -> None:
    pass


class Job:
    def __init__(self, command, resumed, first, out, series=(), seconds=0.0, every_event=()) -> None:
        self.command, self.resumed, self.first, self.out = command, resumed, first, Path(out)
        self.series, self.seconds, self.every_event = series, seconds, every_event

    def results(self) -> list[dict]:
        if self.every_event:
            return self.before_every_event(self.every_event)
        return [self.result(one) for one in self.series]

    def arguments(self) -> list[str]:
        begun = (self.out / self.first).exists()
        return [*(self.resumed if begun else self.command), "--output-dir", str(self.out)]

    def result(self, moments: list) -> dict:
        codes, written = [], []
        for how, at in moments:
            failing = Failing(how, self.out)
            moment = at * self.seconds if isinstance(at, float) else at
            code, _, errors = attempt(self.arguments(), moment, failing.begin, failing.check)
            failing.end()
            codes.append(code)
            written.append(errors)
        return self.ended(codes, written)

    def ended(self, codes: list[int], written: list[str], at=-1, begin=nothing, check=nothing) -> dict:
        """Runs the command to its end, looks at what it has left, and removes that."""
        begun = time.monotonic()
        code, events, errors = attempt(self.arguments(), at, begin, check)
        seconds = time.monotonic() - begun
        left = [str(path) for pattern in ("*.partial", "damaged-*") for path in self.out.parent.rglob(pattern)]
        result = {"events": events, "seconds": seconds, "codes": [*codes, code], "errors": [*written, errors]}
        result |= {"bits": bits(self.out), "left": left}
        self.remove()
        return result

    def remove(self) -> None:
        for path in self.out.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def before_every_event(self, ways: list[str]) -> list[dict]:
        with tempfile.TemporaryDirectory() as kept:
            every = EveryEvent(ways, self.out, Path(kept))
            whole = self.ended([], [], None, every.look, every.check)
            return [whole | {"before": []}, *every.results(lambda: self.ended([], []))]


def run() -> None:
    job = Job(**json.load(sys.stdin))
    import torch
    import tqdm

    from lowmem_npo.report import inline_svg

    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is shared with forks, of which one may be killed while it holds it
    inline_svg._draw = lambda *_, **__: "<svg></svg>"  # touches no file, and takes half of the time
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        printed, sys.stdout = sys.stdout, silence
        code = command([*job.command, "--output-dir", str(Path(folder) / "run")])
        sys.stdout = printed
        assert code == 0
    job.remove()  # what it left beside `out`, such as a cache
    gc.collect()
    gc.freeze()
    json.dump(job.results(), sys.stdout)


if __name__ == "__main__":
    run()
