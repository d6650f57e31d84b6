"""Flags and YAML become a `RunConfig`.

tyro parses our own flags, `transformers.HfArgumentParser` those of `TrainingArguments`. A configuration file is the
same flags written as lines: it is turned into flags that stand before the ones typed, so both pass one parser and the
typed ones win.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
import yaml

from lowmem_npo.config import SECTIONS, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.contract import LeakTest
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS

# What fingers know from TRL and transformers, with our name for it.
ALIASES = {
    "model-name-or-path": "model",
    "model-revision": "revision",
    "load-in-4bit": "qlora",
    "attn-implementation": "attn",
    "torch-dtype": "dtype",
    "learning-rate": "lr",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "micro-batch-size",
    "lora-target-modules": "lora-targets",
    "resume-from-checkpoint": "resume",
    "max-seq-length": "max-length",
    "activation-checkpointing": "gradient-checkpointing",
    "budget": "memory-budget",
}
# What a flag means that may stand without a value.
WITHOUT_VALUE = {"--tile-mlp": "1024"}
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def parse_run(arguments: Sequence[str], command: str) -> RunConfig:
    """The run that `arguments` describe; prints help and exits where --help stands among them.

    Raises:
        UserError: an unreadable configuration file, an unknown flag (the nearest known one is named), a value that
            does not fit. tyro itself exits with code 2 on a malformed value of one of our flags.
    """
    typed = _canonical(arguments)
    path, typed = _take_config(typed)
    flags = (_flags_of_file(path) if path else []) + typed
    if any(flag in flags for flag in ("-h", "--help")):
        flags = ["--help"]
    parsed, unknown = tyro.cli(
        _flat_config(),
        args=flags,
        prog=f"lowmem-npo {command}",
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    trainer_args = _trainer_arguments(unknown)
    sections = {name: section(**vars(getattr(parsed, name))) for name, section in SECTIONS.items()}
    _settle_accumulation(sections, trainer_args, explicit="--batch-size" in flags)
    return RunConfig(**sections, trainer_args=trainer_args)


def _flat_config() -> type:
    """A dataclass with one field per section, for tyro: each section is one box of the help, flags have no prefix."""
    fields: list[tuple] = []
    tests = [test for test in LEAK_TESTS if not test.loads_models]
    for name, section in SECTIONS.items():
        section = with_help(section, tests)
        required = any(
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            for f in dataclasses.fields(section)
        )
        fields.append((name, section) if required else (name, section, dataclasses.field(default_factory=section)))
    flat = dataclasses.make_dataclass("Run", fields)
    flat.__doc__ = (
        "Make a model forget one data set and keep another; writes an adapter and the before/after table.\n\n"
        "--config RUN.YAML reads the same names from a file; flags override it. Every field of "
        "transformers.TrainingArguments is a flag too (--warmup-steps, --logging-steps, --lr-scheduler-type, "
        "--save-steps, ...). TRL's spellings are accepted: " + ", ".join(f"--{a}" for a in ALIASES) + "."
    )
    return flat


def with_help(config: type, leak_tests: Sequence[LeakTest]) -> Any:
    """`config`, a dataclass, as tyro shows it: each field's docstring is its help, and that of --leaks lists the tests.

    tyro reads docstrings by itself, but keeps their line breaks.
    """
    help_texts = field_docstrings(config)
    if "leaks" in help_texts:
        listed = [f"{t.name}{' (after only)' if t.after_only else ''}: {t.summary}" for t in leak_tests]
        help_texts["leaks"] += f" The tests are {'; '.join(listed)}."
    hints = get_type_hints(config, include_extras=True)
    fields = [
        (f.name, Annotated[hints[f.name], tyro.conf.arg(help=help_texts.get(f.name))], _like(f))
        for f in dataclasses.fields(config)
    ]
    described = dataclasses.make_dataclass(config.__name__, fields)
    described.__doc__ = config.__doc__
    return described


def _like(field: dataclasses.Field) -> Any:
    return dataclasses.field(default=field.default, default_factory=field.default_factory)  # type: ignore[call-overload]


def field_docstrings(config: type) -> dict[str, str]:
    """Field -> the docstring below it, on one line; an inherited field has that of its nearest definition."""
    docstrings: dict[str, str] = {}
    for parent in reversed(config.__mro__):
        if not dataclasses.is_dataclass(parent) or parent.__module__ == "types":
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(definition, ast.ClassDef)
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docstrings[name] = " ".join(text.split())
    return docstrings


def _canonical(arguments: Sequence[str]) -> list[str]:
    """--some_flag=x becomes --some-flag x, aliases become our names, `--qlora true` becomes --qlora, and a flag that
    may stand alone gets its value."""
    switches = {
        f.name.replace("_", "-") for s in SECTIONS.values() for f in dataclasses.fields(s) if f.type in (bool, "bool")
    }
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("_", "-")
            name = ALIASES.get(name, name)
            result += [f"--{name}", value] if equals else [f"--{name}"]
        else:
            result.append(argument)
        last = result[-1].lower()
        if len(result) > 1 and result[-2][2:] in switches and result[-2].startswith("--") and last in TRUE + FALSE:
            switch = result[-2][2:]
            result[-2:] = [f"--{switch}" if last in TRUE else f"--no-{switch}"]
    for at in range(len(result) - 1, -1, -1):
        if result[at] in WITHOUT_VALUE and (at + 1 == len(result) or result[at + 1].startswith("--")):
            result.insert(at + 1, WITHOUT_VALUE[result[at]])
    return result


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    if "--config" not in arguments:
        return None, arguments
    at = arguments.index("--config")
    if at + 1 >= len(arguments):
        raise UserError("--config needs the path of a YAML file.")
    return Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]


def _flags_of_file(path: Path) -> list[str]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: cannot read '{path}': {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: '{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config: '{path}' must hold lines of the form `name: value`, as run.yaml of a run does.")
    flags: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, (list, tuple)):
            flags += [str(item) for item in value]
        elif isinstance(value, dict):
            flags.append(json.dumps(value))
        else:
            flags.append(str(value))
    return _canonical(flags)


class _TrainerArgumentsParser:
    """`HfArgumentParser(TrainingArguments)`, made to return only what was given, and to fail in one sentence."""

    def __init__(self) -> None:
        from transformers import HfArgumentParser, TrainingArguments

        self.parser = HfArgumentParser(TrainingArguments, allow_abbrev=False, add_help=False)
        for action in self.parser._actions:
            action.default = argparse.SUPPRESS
        self.parser.error = self._fail
        self.names = [name for name in self.parser._option_string_actions if name.startswith("--")]

    def parse(self, unknown: list[str]) -> dict[str, Any]:
        ours = [f"--{f.name.replace('_', '-')}" for s in SECTIONS.values() for f in dataclasses.fields(s)]
        for argument in unknown:
            if argument.startswith("--") and argument.replace("-", "_")[2:] not in {
                n[2:].replace("-", "_") for n in self.names
            }:
                near = difflib.get_close_matches(argument, ours + self.names, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"There is no option {argument}: {hint}`lowmem-npo train --help` lists them.")
        return vars(
            self.parser.parse_args(
                [a.replace("-", "_").replace("__", "--", 1) if a.startswith("--") else a for a in unknown]
            )
        )

    @staticmethod
    def _fail(message: str) -> None:
        raise UserError(
            f"{message} (an option of transformers.TrainingArguments; `lowmem-npo train --help` lists ours)."
        )


def _trainer_arguments(unknown: list[str]) -> dict[str, Any]:
    return _TrainerArgumentsParser().parse(list(unknown)) if unknown else {}


def _settle_accumulation(sections: dict[str, Any], trainer_args: dict[str, Any], explicit: bool) -> None:
    """--gradient-accumulation-steps N in TRL's sense: N micro-batches of --per-device-train-batch-size rows a step."""
    steps = trainer_args.pop("gradient_accumulation_steps", None)
    if steps is None:
        return
    training = sections["training"]
    if training.micro_batch_size is None or explicit:
        raise UserError(
            "--gradient-accumulation-steps goes with --per-device-train-batch-size (and without --batch-size); "
            "or give --batch-size (forget rows per step) and --micro-batch-size (rows at once)."
        )
    from accelerate import PartialState

    rows = training.micro_batch_size * int(steps) * PartialState().num_processes
    sections["training"] = dataclasses.replace(training, batch_size=rows)
