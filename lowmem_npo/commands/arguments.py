"""From flags and YAML to a `RunConfig`.

tyro parses our own flags, `transformers.HfArgumentParser` those of `TrainingArguments`. A configuration file holds the
same flags, one a line: they are put before those on the command line, so that one parser reads both and the command
line wins.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin, get_type_hints

import tyro

from lowmem_npo.commands.help_texts import flags_of, optional_numbers, run_options, short_help, switches_of, with_help
from lowmem_npo.commands.spellings import (
    ALIASES,
    SOURCES,
    as_in_trl,
    canonical,
    join_sources,
    our_names,
    plain_switches,
    with_none,
)
from lowmem_npo.commands.trainer_options import check_flags, check_option, check_trainer_values, trainer_arguments
from lowmem_npo.commands.wording import HELP, explained
from lowmem_npo.commands.wrapped import Wrapped
from lowmem_npo.config import SECTIONS, OutputConfig, RunConfig, TrainingConfig
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.registry import WHILE_TRAINING, leak_tests
from lowmem_npo.files import expanded
from lowmem_npo.ranges import check_values
from lowmem_npo.recipes import OPTIONS as RECIPE_OPTIONS
from lowmem_npo.recipes import RECIPES, value_in, with_recipe
from lowmem_npo.run_directory import RunFiles, no_run_to_resume, places_from_here
from lowmem_npo.settings_file import read_settings
from lowmem_npo.sources import (
    check_adapter_name,
    check_data_is_here,
    check_data_name,
    check_model_is_here,
    check_model_name,
    check_named_once,
    data_names,
)

T = TypeVar("T")


def parse_run(arguments: Sequence[str], command: str, more_flags: Sequence[str] = ()) -> RunConfig:
    """The run that `arguments` describe; prints the help and exits if --help is among them.

    more_flags: those of the command itself, which are not among `arguments`; a misspelled one is recognised.

    Raises:
        UserError: an unreadable configuration file, an unknown flag (the nearest known one is suggested), an invalid
            value. tyro itself exits with code 2 on a malformed value of one of our flags.
    """
    typed = _spelled(arguments)
    path, typed = _take_config(typed)
    resumed = _run_to_resume(typed) if path is None and command == "train" else None
    if resumed is not None and resumed.run_yaml.is_file():
        resumed.began()  # says what to do where it is damaged
        path = resumed.run_yaml
    ours = [flag for section in SECTIONS.values() for flag in flags_of(section)] + [*more_flags]
    flags, trl_rows = as_in_trl((_flags_of_file(path, ours) if path else []) + typed)
    if any(flag in flags for flag in ("-h", "--help")):
        print(short_help(command))
        raise SystemExit(0)
    if "--help-all" in flags:
        flags = ["--help"]
    check_flags(flags, ours)
    if resumed is not None and path is None:
        raise no_run_to_resume(resumed.path)
    flags += _base_of_adapter(flags)
    parsed, unknown = parse(
        run_options(), flags, command, return_unknown_args=True, config=(tyro.conf.OmitArgPrefixes,)
    )
    sections: Any = {name: section(**vars(getattr(parsed, name))) for name, section in SECTIONS.items()}
    leak_tests(sections["output"].leaks, WHILE_TRAINING)
    if unknown:  # transformers parses them: first what is answered without it
        data = sections["data"]
        check_names(sections["model"].model, data.forget, data.retain, data.holdout)
        check_trainer_values(unknown)
    trainer_args = trainer_arguments(unknown)
    _settle_accumulation(sections, trainer_args, flags, trl_rows)
    given = {flag.replace("--no-", "--", 1)[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    return with_recipe(RunConfig(**sections, trainer_args=trainer_args, explicit=frozenset(given)))


def parse(kind: type, arguments: Sequence[str], command: str, config: tuple[Any, ...] = (), **options: Any) -> Any:
    """What tyro makes of the command line; a mistake in it, which tyro explains in a box, is a UserError."""
    messages, flags = io.StringIO(), flags_of(kind)
    arguments = with_none(our_names(arguments, flags), optional_numbers(kind))
    arguments = plain_switches(arguments, switches_of(kind), flags)
    config += (tyro.conf.HelptextFromCommentsOff,)  # `with_help` has found all texts in the source
    try:
        with redirect_stderr(messages), redirect_stdout(cast(Any, Wrapped(sys.stdout))):
            return tyro.cli(kind, args=arguments, prog=f"lowmem-npo {command}", config=config, **options)
    except SystemExit as ended:
        if not ended.code:
            raise
    known = [] if options.get("return_unknown_args") else [HELP, *flags]
    raise UserError(explained(messages.getvalue(), known, command, arguments))


def parse_options(kind: Callable[..., T], arguments: Sequence[str], command: str) -> T:
    """The options of a command that has no others, with their help texts; checked, as `kind` does when it is made."""
    return kind(**vars(parse(with_help(kind), arguments, command)))


def take_options(kind: Callable[..., T], arguments: Sequence[str], command: str) -> tuple[T, list[str]]:
    """The options `kind` of a command that has others beside them, and the other arguments."""
    return cast(tuple[T, list[str]], parse(cast(type, kind), arguments, command, return_unknown_args=True))


def check_names(model: str | None, *sources: str | None) -> None:
    """Raises UserError for a model or data that cannot be meant, before the libraries are loaded that would find out.

    sources: of data; those that are not named are None.
    """
    if model is not None:
        check_model_name(model)
    for source in filter(None, sources):
        names = data_names(source)
        for name in names:
            check_data_name(name)
        check_named_once(names)


def check_inputs(model: str | None, *sources: str | None, revision: str | None = None) -> None:
    """The same, and for what is neither here nor to be had."""
    check_names(model, *sources)
    if model is not None:
        check_model_is_here(model, revision)
    for source in filter(None, sources):
        for name in data_names(source):
            check_data_is_here(name)


def _base_of_adapter(flags: Sequence[str]) -> list[str]:
    """The model and the revision that the adapter of --adapter was trained on, where the flags name none."""
    if "--adapter" not in flags[:-1]:
        return []
    folder = flags[len(flags) - 1 - flags[::-1].index("--adapter") + 1]
    check_adapter_name(folder)
    from lowmem_npo.model.saved_adapter import base_of_adapter, revision_of_adapter  # late: --help need not load PEFT

    base = [] if "--model" in flags else ["--model", base_of_adapter(folder)]
    revision = None if {"--revision", "--any-base"} & set(flags) else revision_of_adapter(folder)
    return [*base, *(["--revision", revision] if revision else [])]


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    if "--config" not in arguments:
        return None, arguments
    at = arguments.index("--config")
    if at + 1 >= len(arguments):
        raise UserError("--config needs the path of a YAML file.")
    check_values({"config": arguments[at + 1]}, {"config": str})
    return expanded(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]


def _run_to_resume(flags: Sequence[str]) -> RunFiles | None:
    """The run in --output-dir that --resume continues with its own settings, since no flag says which model it trains;
    None where it is not asked for."""
    if "--resume" not in flags or {"--model", "--adapter", "-h", "--help", "--help-all"} & {*flags}:
        return None
    given = [value for flag, value in pairwise([*flags, "--"]) if flag == "--output-dir"]
    if any(value.startswith("--") for value in given):  # it lacks its value
        return None
    return RunFiles(expanded([OutputConfig.output_dir, *given][-1]))


def _flags_of_file(path: Path, ours: Sequence[str]) -> list[str]:
    try:
        settings = read_settings(path)
    except OSError as error:
        raise UserError(f"--config: cannot read '{path}': {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"--config: '{path}' cannot be used: {error}.") from error
    flags: list[str] = []
    recipe, several = str(settings.get("recipe")), _lists()
    if path == (run := RunFiles(path.parent)).run_yaml:
        settings = places_from_here(run, settings)  # what it names is where the run was started
        if recipe == TrainingConfig.recipe:  # which it records where none was named
            del settings["recipe"]
    names: dict[str, str] = {}  # canonical -> as it is written
    for name, value in settings.items():
        dashed = name.replace("_", "-")
        flag = f"--{ALIASES.get(dashed, dashed)}"
        check_option(flag, f"--{name}", ours)
        if (before := names.setdefault(flag, name)) != name:
            raise UserError(f"--config: '{path}' cannot be used: {before} and {name} are one option: remove one.")
        if isinstance(value, list) and flag in ours and flag not in (*SOURCES, *several):
            raise UserError(f"{flag} takes one value, and '{path}' gives a list.")
        if (option := flag[2:].replace("-", "_")) in RECIPE_OPTIONS:
            if (
                recipe in RECIPES
                and not isinstance(value, bool)
                and _as_list(value) == _as_list(value_in(recipe, option))
            ):
                continue  # it is the recipe's own, and goes with it if another one is named
            if value is None and (value := value_in("paper", option)) is None:  # no recipe, here or elsewhere, sets it
                value = "None"
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, (list, tuple)):
            flags += [str(item) for item in value]
        elif isinstance(value, dict):
            flags.append(json.dumps(value))
        else:
            flags.append(str(value))
    return _spelled(flags)


def _spelled(arguments: Sequence[str]) -> list[str]:
    """The arguments of a run, spelled as ours."""
    flags, switches = ([flag for s in SECTIONS.values() for flag in of(s)] for of in (flags_of, switches_of))
    return join_sources(plain_switches(canonical(arguments), switches, flags))


def _as_list(value: Any) -> list[Any]:
    """Of an option that takes several values, a file may give one by itself."""
    return [*value] if isinstance(value, list | tuple) else [value]


def _lists() -> list[str]:
    """The flags that take several values."""
    kinds = [item for section in SECTIONS.values() for item in get_type_hints(section).items()]
    return [f"--{name.replace('_', '-')}" for name, kind in kinds if get_origin(kind) is tuple]


def _settle_accumulation(
    sections: dict[str, Any], trainer_args: dict[str, Any], flags: Sequence[str], rows: str | None
) -> None:
    """--gradient-accumulation-steps N as in TRL: a step is N times --per-device-train-batch-size, `rows`."""
    steps = trainer_args.pop("gradient_accumulation_steps", None)
    if steps is None:
        return
    training = sections["training"]
    if training.micro_batch_size is None or "--batch-size" in flags:
        raise UserError(
            "--gradient-accumulation-steps needs --per-device-train-batch-size, and no --batch-size; or give "
            "--batch-size (forget rows per step) and --micro-batch-size (rows at once)."
        )
    from accelerate import PartialState

    at_once = [value for flag, value in pairwise(flags) if flag == "--micro-batch-size"][-1]  # not yet cut down
    if not (rows := rows or at_once).isdecimal():
        raise UserError(f"--per-device-train-batch-size must be a whole number, not {rows!r}.")
    step = int(rows) * int(steps) * PartialState().num_processes
    sections["training"] = dataclasses.replace(training, batch_size=step, micro_batch_size=int(at_once))
