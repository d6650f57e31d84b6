"""Kills a command at a given file event, or moment, in a fork of a process that has imported everything; runs it again
until it has ended. Reads one JSON object from standard input, and writes one:

    command: the arguments of the command, without its --output-dir; resumed: those once that holds `first`
    runs: output directory -> numbers of the file events, or moments as fractions of the `seconds` that a whole run
        takes, at which it is killed, one after the other
    -> output directory -> {"events": file events of the last attempt, "seconds": what it took, "codes": the exit codes,
       "errors": what was written to stderr}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod", "shutil.copyfile"}


def is_write(event: str, arguments: tuple) -> bool:
    return event in WRITES or (
        event == "open"
        and isinstance(arguments[2], int)
        and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )


def attempt(arguments: list[str], at: float | None) -> tuple[int, int, str]:
    """(exit code, file events, what it wrote to stderr) of the command in a fork, killed before file event `at`."""
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as counter:
        if (child := os.fork()) == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            events = [0]

            def hook(event: str, details: tuple) -> None:
                if is_write(event, details):
                    if events[0] == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    events[0] += 1
                    os.pwrite(counter.fileno(), str(events[0]).encode(), 0)

            sys.addaudithook(hook)
            from lowmem_npo.cli import main

            code = 70
            try:
                code = main(arguments)
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
        for at in [*moments, None]:
            arguments = job["resumed"] if (Path(out) / job["first"]).exists() else job["command"]
            begun = time.monotonic()
            code, events, errors = attempt(
                [*arguments, "--output-dir", out], at * whole if isinstance(at, float) else at
            )
            codes.append(code)
            written.append(errors[-2000:])
        seconds = time.monotonic() - begun
        results[out] = {"events": events, "seconds": seconds, "codes": codes, "errors": written}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    run()
