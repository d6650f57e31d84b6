"""The command line: a table of commands, and what its exit codes mean."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import lowmem_npo
from lowmem_npo.errors import UserError

# Command -> one line of help. `lowmem-npo X` is `main(arguments)` of lowmem_npo/commands/X.py (or X/), imported only
# when it runs, so that `--help` answers at once.
COMMANDS = {
    "train": "make a model forget: adapter, metrics, before/after table",
    "sweep": "train over a grid of settings and seeds: mean and standard deviation as table and picture",
    "demo": "the whole job on a small model trained here, with the gold standard (about 3 minutes on 2 cores)",
    "evaluate": "what a model has forgotten and kept: LUME and TOFU scores, leak tests, MMLU",
    "merge": "work an adapter into its base model's weights, file by file on the CPU",
    "report": "write a run's report again, with what was evaluated since; prove that rows were forgotten",
    "estimate": "the memory a run takes, before it starts; with --budget the switches that make it fit",
    "env": "versions, GPU and memory, for bug reports",
}


def usage() -> str:
    lines = ["usage: lowmem-npo COMMAND [OPTIONS]", "", "Make a language model forget chosen data, on one GPU.", ""]
    lines += [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    lines += ["", "lowmem-npo COMMAND --help explains a command; lowmem-npo --version prints the version."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 a check of the command failed (it exits by itself), 2 something the user
    can fix (said in one sentence), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"lowmem-npo {lowmem_npo.__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"lowmem-npo: there is no command '{command}'; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        importlib.import_module(f"lowmem_npo.commands.{command}").main(rest)
    except UserError as error:
        print(f"lowmem-npo {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lowmem-npo {command}: interrupted; `--resume` continues a training run.", file=sys.stderr)
        return 130
    return 0
