"""Kills a command at a given file event, or moment, in a fork of a process that has imported everything; runs it again
until it has ended. Or lets its disk fail from that event on, and has it in order before the next attempt. Reads one
JSON object from standard input, and writes one:

    command: the arguments of the command, without its --output-dir; resumed: those once that holds `first`
    runs: output directory -> [how, at], one after the other
        how: "kill"; "full", the disk has no room; "read-only", it takes no more writes; "gone", no directory is there
        at: the number of a file event, or, if a fraction, of the `seconds` that a whole run takes
    -> output directory -> {"events": file events of the last attempt, "seconds": what it took, "codes": the exit codes,
       "errors": what was written to stderr}
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod", "shutil.copyfile"}


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
        self.ballast, self.aside = out.parent / "ballast", out.parent / f"{out.name}-gone"

    def begin(self) -> None:
        self.fails = True
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "gone" and self.out.is_dir():
            self.out.rename(self.aside)
        if self.how == "full" and os.path.ismount(self.out.parent):
            disk = os.statvfs(self.out.parent)
            with self.ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize)

    def check(self, path: object) -> None:
        """Raises what the operation raises, unless the disk does so itself."""
        inside = str(path).startswith(str(self.out))
        if self.how == "read-only" and inside:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        if self.how == "full" and inside and not self.ballast.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def end(self) -> None:
        """Puts the disk in order."""
        self.ballast.unlink(missing_ok=True)
        if self.aside.exists():
            shutil.rmtree(self.aside)


def attempt(arguments: list[str], at: float | None, failing: Failing) -> tuple[int, int, str]:
    """(exit code, file events, what it wrote to stderr) of the command in a fork, where the disk fails from file event
    `at` on, or which is killed before it."""
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
                    if events[0] == at:
                        failing.begin()
                    events[0] += 1
                    os.pwrite(counter.fileno(), str(events[0]).encode(), 0)
                    if failing.fails and event not in ("os.remove", "os.rmdir"):
                        failing.check(details[1] if event in ("os.rename", "os.link") else details[0])
                finally:
                    within[0] = False

            sys.addaudithook(hook)
            from lowmem_npo.cli import main

            code = 70
            try:
                code = main(arguments)
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
        return os.waitstatus_to_exitcode(status), int(counter.read() or 0), errors.read().decode(errors="replace")


def run() -> None:
    job = json.load(sys.stdin)
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    from lowmem_npo.commands.evaluate.run import evaluate  # noqa: F401
    from lowmem_npo.commands.merge.run import merge  # noqa: F401
    from lowmem_npo.commands.sweep.runs import sweep  # noqa: F401

    results, whole = {}, job.get("seconds", 0.0)
    for out, moments in job["runs"].items():
        codes, written = [], []
        for how, at in [*moments, ("kill", None)]:
            arguments = job["resumed"] if (Path(out) / job["first"]).exists() else job["command"]
            begun = time.monotonic()
            failing = Failing(how, Path(out))
            moment = at * whole if isinstance(at, float) else at
            code, events, errors = attempt([*arguments, "--output-dir", out], moment, failing)
            failing.end()
            codes.append(code)
            written.append(errors[-2000:])
        seconds = time.monotonic() - begun
        results[out] = {"events": events, "seconds": seconds, "codes": codes, "errors": written}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    run()
