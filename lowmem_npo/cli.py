"""The command line: the table of commands, and the exit codes."""

from __future__ import annotations

import difflib
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import lowmem_npo
from lowmem_npo.endings import Interrupted, failure, handled, interrupt
from lowmem_npo.errors import UserError
from lowmem_npo.libraries import expand_segments, prepare_console

# Command -> a line of help. `lowmem-npo X` is `main(arguments)` of lowmem_npo/commands/X.py (or X/), which is imported
# only when it runs, so that `lowmem-npo --help` answers at once.
COMMANDS = {
    "data": "look at data as a run would read it: columns, lengths, duplicates, overlap, what the model says of it",
    "train": "make a model forget: writes an adapter, a before/after table and a report",
    "sweep": "train over a grid of settings and seeds: mean and standard deviation, as a table and a picture",
    "demo": "do the whole job on a small model, and compare with a gold standard (about 3 minutes on 2 cores)",
    "evaluate": "measure what a model has forgotten and kept: LUME and TOFU scores, leak tests, MMLU",
    "ask": "ask the original model and the one that has forgotten, and see both answers",
    "merge": "merge an adapter into its base model's weights, on the CPU, one file at a time",
    "report": "rewrite a run's report, with later evaluations; prove that rows were among those forgotten",
    "estimate": "predict the memory of a run before it starts; with --budget, find the switches that make it fit",
    "schema": "print the JSON Schema of a configuration file, by which editors complete and check it",
    "completion": "print a script that completes commands and options in bash, zsh or fish",
    "env": "print versions, GPU and memory, for bug reports",
}


def usage() -> str:
    lines = ["usage: lowmem-npo COMMAND [OPTIONS]", "", "Make a language model forget chosen data, on one GPU.", ""]
    lines += [f"  {name:<10} {line}" for name, line in COMMANDS.items()]
    lines += ["", "lowmem-npo COMMAND --help explains a command; lowmem-npo --version prints the version."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 success, 1 a check of the command failed (it exits by itself), 2 something that
    the user can fix (reported in one sentence), 130 interrupted (143 by SIGTERM, 129 by SIGHUP), 141 the output's
    reader, such as `head`, has gone."""
    prepare_console()
    expand_segments()
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            _printed(sys.stdout.flush)
    except _Unprinted as error:
        _discard_stdout()
        if isinstance(error.why, BrokenPipeError):
            return 141
        _print_error(f"lowmem-npo: what it prints cannot be written: {error.why.strerror or error.why}.")
        return 2


class _Unprinted(Exception):
    """What a command prints cannot be written."""

    def __init__(self, why: OSError) -> None:
        super().__init__(str(why))
        self.why = why


def _printed(write: Callable[..., Any], *words: str) -> None:
    try:
        write(*words)
    except OSError as error:
        raise _Unprinted(error) from error


def _reader_has_gone() -> bool:
    """Whether stdout or stderr leads into a pipe or socket that nobody reads any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # it is no file, or closed
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _discard_stdout() -> None:
    """What Python still writes as it ends leads nowhere."""
    with suppress(OSError, ValueError):  # it is no file, or closed
        number = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def _run(arguments: Sequence[str]) -> int:
    """The exit code of the command that `arguments` begin with."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _printed(print, usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        _printed(print, f"lowmem-npo {lowmem_npo.__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"did you mean {near[0]}? The commands" if near else "the commands"
        _print_error(f"lowmem-npo: there is no command '{command}'; {meant} are {', '.join(COMMANDS)}.")
        return 2

    def ended(why: object, code: int) -> int:
        _print_error(f"lowmem-npo {command}: {why}")
        return code

    for argument in rest:
        if argument != argument.encode("utf-8", "ignore").decode("utf-8"):  # it could be written into no file
            return ended(f"{argument!r} is not UTF-8 text: rename the file, or use a UTF-8 locale (LC_ALL=C.UTF-8).", 2)
    try:
        with handled(interrupt):
            importlib.import_module(f"lowmem_npo.commands.{command}").main(rest)
    except UserError as error:
        return ended(error, 2)
    except KeyboardInterrupt:
        return ended(Interrupted(signal.SIGINT), 130)
    except Interrupted as error:
        return ended(error, error.code)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise _Unprinted(error) from error
        if (what := failure(error)) is None:
            raise
        return ended(f"{what}.", 2)
    return 0


def _print_error(line: str) -> None:
    with suppress(OSError):  # the disk behind it is full: the exit code is right all the same
        print(line, file=sys.stderr)
