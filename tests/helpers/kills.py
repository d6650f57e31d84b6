"""Kills a command at a given file event, or moment, in a fork of a process that has imported everything; runs it again
until it has ended. Reads one JSON object from standard input, and writes one:

    command: the arguments of the command; resumed: those once its directory holds `first`; first: a path
    at: numbers of the file events, or seconds if they are fractions, at which it is killed, one after the other
    -> {"events": file events of the last attempt, "codes": the exit codes, "errors": what was written to stderr}
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

    codes, written = [], []
    for at in [*job["at"], None]:
        arguments = job["resumed"] if Path(job["first"]).exists() else job["command"]
        code, events, errors = attempt(arguments, at)
        codes.append(code)
        written.append(errors[-2000:])
    json.dump({"events": events, "codes": codes, "errors": written}, sys.stdout)


if __name__ == "__main__":
    run()
