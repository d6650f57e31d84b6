"""The command line: a dictionary from command to function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import lowmem_npo
from lowmem_npo.errors import UserError


def _train(arguments: Sequence[str]) -> None:
    from lowmem_npo.cli.train import main

    main(arguments)


def _sweep(arguments: Sequence[str]) -> None:
    from lowmem_npo.cli.sweep import main

    main(arguments)


def _demo(arguments: Sequence[str]) -> None:
    from lowmem_npo.cli.demo import main

    main(arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    from lowmem_npo.cli.evaluate import main

    main(arguments)


def _merge(arguments: Sequence[str]) -> None:
    from lowmem_npo.cli.merge import main

    main(arguments)


def _report(arguments: Sequence[str]) -> None:
    from lowmem_npo.cli.report import main

    main(arguments)


def _estimate(arguments: Sequence[str]) -> None:
    from lowmem_npo.cli.estimate import main

    main(arguments)


def _env(arguments: Sequence[str]) -> None:
    from lowmem_npo.cli.env import main

    main(arguments)


# Each imports its command only when it runs, so that `--help` answers at once.
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "make a model forget: adapter, metrics, before/after table"),
    "sweep": (_sweep, "train over a grid of settings and seeds: mean and standard deviation as table and picture"),
    "demo": (_demo, "the whole job on a small model trained here, with the gold standard (about 3 minutes on 2 cores)"),
    "evaluate": (_evaluate, "what a model has forgotten and kept: LUME and TOFU scores, leak tests, MMLU"),
    "merge": (_merge, "work an adapter into its base model's weights, file by file on the CPU"),
    "report": (_report, "write a run's report anew, with what was evaluated since; prove that rows were forgotten"),
    "estimate": (_estimate, "the memory a run takes, before it starts; with --budget the switches that make it fit"),
    "env": (_env, "versions, GPU and memory, for bug reports"),
}


def usage() -> str:
    lines = ["usage: lowmem-npo COMMAND [OPTIONS]", "", "Make a language model forget chosen data, on one GPU.", ""]
    lines += [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    lines += ["", "lowmem-npo COMMAND --help explains a command; lowmem-npo --version prints the version."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 2 something the user can mend (said in one sentence), 130 interrupted."""
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
        COMMANDS[command][0](rest)
    except UserError as error:
        print(f"lowmem-npo {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lowmem-npo {command}: interrupted; `--resume` continues a training run.", file=sys.stderr)
        return 130
    return 0
