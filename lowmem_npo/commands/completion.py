"""`lowmem-npo completion`: a script with which a shell completes commands, options, their choices and file names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import tyro

from lowmem_npo.cli import COMMANDS
from lowmem_npo.commands.arguments import parse
from lowmem_npo.commands.help_texts import run_options, with_help
from lowmem_npo.libraries import quiet_libraries

Shell = Literal["bash", "zsh", "fish"]


@dataclasses.dataclass
class Completion:
    """Print a script that completes commands, options, their choices and file names in a shell.

    bash: lowmem-npo completion bash > ~/.local/share/bash-completion/completions/lowmem-npo. zsh: the same into a file
    _lowmem-npo in a directory of fpath. fish: into ~/.config/fish/completions/lowmem-npo.fish. Print it again after an
    update.
    """

    shell: tyro.conf.Positional[Shell]
    """Which shell."""


def main(arguments: Sequence[str]) -> None:
    options = parse(with_help(Completion), arguments, "completion")
    quiet_libraries()
    with suppress(SystemExit):  # with which tyro ends, as after --help
        tyro.extras.subcommand_cli_from_dict(
            command_lines(),
            prog="lowmem-npo",
            args=["--tyro-write-completion", options.shell, "-"],
            config=(tyro.conf.OmitArgPrefixes,),
        )


def command_lines() -> dict[str, Callable[..., Any]]:
    """Command -> a dataclass with its options."""
    from lowmem_npo.commands.ask import AskOptions
    from lowmem_npo.commands.data import DataCommand
    from lowmem_npo.commands.demo import Demo
    from lowmem_npo.commands.env import Env
    from lowmem_npo.commands.estimate import EstimateOptions
    from lowmem_npo.commands.merge.options import MergeConfig
    from lowmem_npo.commands.report import Report
    from lowmem_npo.commands.schema import SchemaOptions
    from lowmem_npo.commands.sweep.evaluation import SweepEvaluationOptions
    from lowmem_npo.commands.sweep.options import GridOptions, TeachingOptions
    from lowmem_npo.evaluation.settings import EvaluationConfig
    from lowmem_npo.training.honoured import HONOURED

    theirs = {name: "Of transformers.TrainingArguments." for name in sorted(HONOURED | {"warmup_ratio"})}
    training = {"config": "YAML file with options, as run.yaml.", **theirs}
    budget = {"budget": "GPU memory, such as 24GiB.", **training}
    lines = {
        "data": with_help(DataCommand),
        "train": _and_more(training),
        "sweep": _and_more(training, GridOptions, TeachingOptions, SweepEvaluationOptions),
        "demo": with_help(Demo),
        "evaluate": with_help(EvaluationConfig),
        "ask": with_help(AskOptions),
        "merge": with_help(MergeConfig),
        "report": with_help(Report),
        "estimate": _and_more(budget, EstimateOptions),
        "schema": with_help(SchemaOptions),
        "completion": with_help(Completion),
        "env": with_help(Env),
    }
    for name, line in lines.items():
        line.__doc__ = COMMANDS[name]
    return lines


def _and_more(added: dict[str, str], *kinds: type) -> type:
    """The options of a run with those of `kinds`, and further ones that take a word, by name and help text."""
    fields = [
        (name, Annotated[str | None, tyro.conf.arg(help=text)], dataclasses.field(default=None))
        for name, text in added.items()
    ]
    return dataclasses.make_dataclass("Run", fields, bases=(*map(with_help, kinds), run_options()))
