"""From flags and YAML to a `RunConfig`.

tyro parses our own flags, `transformers.HfArgumentParser` those of `TrainingArguments`. A configuration file holds the
same flags, one a line: they are put before those on the command line, so that one parser reads both and the command
line wins.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from lowmem_npo.commands.trainer_options import check_flags, check_option, check_trainer_values, trainer_arguments
from lowmem_npo.commands.wording import no_such_option, one_of
from lowmem_npo.config import SECTIONS, TILE_ROWS, RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.contract import LeakTest
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS, WHILE_TRAINING, leak_tests
from lowmem_npo.ranges import check_values, shortened
from lowmem_npo.recipes import OPTIONS as RECIPE_OPTIONS
from lowmem_npo.recipes import RECIPES, value_in, with_recipe
from lowmem_npo.run_directory import RunFiles
from lowmem_npo.settings_file import read_settings
from lowmem_npo.sources import (
    check_adapter_name,
    check_data_is_here,
    check_data_name,
    check_model_is_here,
    check_model_name,
    data_names,
)

# The options of the short help.
COMMON = {
    "Model and data": ("model", "qlora", "forget", "retain", "holdout", "output_dir"),
    "Training": (
        *("forget_term", "beta", "gamma", "delta", "epochs", "lr", "batch_size"),
        *("lora_r", "lora_targets", "recipe", "seed"),
    ),
    "Memory": ("max_length", "micro_batch_size", "memory_budget"),
    "Before and after": ("preview", "dry_run", "resume", "stop_when", "eval_rows", "leaks"),
}
# Names that users know from TRL and transformers, and ours.
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
    "lora-modules-to-save": "modules-to-save",
    "resume-from-checkpoint": "resume",
    "max-seq-length": "max-length",
    "activation-checkpointing": "gradient-checkpointing",
    "budget": "memory-budget",
}
SOURCES = ("--forget", "--retain", "--holdout", "--members", "--nonmembers")  # which take several files
# The value of a flag that is given without one.
WITHOUT_VALUE = {"--tile-mlp": str(TILE_ROWS), "--gradient-checkpointing": "on", "--double-quant": "on"}
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")
NONE = ("none", "null", "off", "no", "false")  # of a number that may be left out
AUTOMATIC = ("--gradient-checkpointing", "--double-quant")  # auto, on or off; also spelled as switches are


def parse_run(arguments: Sequence[str], command: str, more_flags: Sequence[str] = ()) -> RunConfig:
    """The run that `arguments` describe; prints the help and exits if --help is among them.

    more_flags: those of the command itself, which are not among `arguments`; a misspelled one is recognised.

    Raises:
        UserError: an unreadable configuration file, an unknown flag (the nearest known one is suggested), an invalid
            value. tyro itself exits with code 2 on a malformed value of one of our flags.
    """
    typed = join_sources(_canonical(arguments))
    path, typed = _take_config(typed)
    if path is None and command == "train":
        path = _settings_to_resume(typed)
    ours = [flag for section in SECTIONS.values() for flag in flags_of(section)] + [*more_flags]
    flags = (_flags_of_file(path, ours) if path else []) + typed
    if any(flag in flags for flag in ("-h", "--help")):
        print(short_help(command))
        raise SystemExit(0)
    if "--help-all" in flags:
        flags = ["--help"]
    check_flags(flags, ours)
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
    _settle_accumulation(sections, trainer_args, explicit="--batch-size" in flags)
    given = {flag.replace("--no-", "--", 1)[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    return with_recipe(RunConfig(**sections, trainer_args=trainer_args, explicit=frozenset(given)))


def parse(kind: type, arguments: Sequence[str], command: str, **options: Any) -> Any:
    """What tyro makes of the command line; a mistake in it, which tyro explains in a box, is a UserError."""
    messages = io.StringIO()
    try:
        with redirect_stderr(messages):
            return tyro.cli(kind, args=list(arguments), prog=f"lowmem-npo {command}", **options)
    except SystemExit as ended:
        if not ended.code:
            raise
    known = [] if options.get("return_unknown_args") else flags_of(kind)
    raise UserError(_explained(messages.getvalue(), known, command))


def _explained(box: str, flags: Sequence[str], command: str) -> str:
    """What tyro says in a box (a title, then parts between rules), as a sentence.

    flags: all that there are; none if others may be given.
    """
    parts = re.split(r"^[│| ]*(?:[─-]{4,}|╰).*$", box.partition("\n")[2], flags=re.MULTILINE)
    parts = [part for part in parts if part.strip("│| \n")]
    texts = [" ".join(line.strip("│| ") for line in part.splitlines()).strip() for part in parts]
    for text in texts:
        if flags and text.startswith("Unrecognized options:"):
            words = re.split("[ ,]+", text.partition(": ")[2])
            if wrong := [word for word in words if word.startswith("--")]:
                return no_such_option(wrong[0], flags, f"{command} --help")
            return f"'{shortened(words[0])}' belongs to no option; `lowmem-npo {command} --help` lists them."
    sentence = texts[0] if texts else "the options cannot be read"
    if sentence.startswith("Missing from"):
        names = re.findall(r"^[│|]? {5,6}(?! )(\S+)", parts[0], re.MULTILINE)
        sentence = f"{' and '.join(names)} must be given"
    elif match := re.match(r"Missing value for argument '(\S+)'", sentence):
        sentence = f"{match[1]} needs a value"
    elif match := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", sentence):
        choices = match[3].replace("'", "").rstrip(",").split(", ")
        if "None" in choices:  # of an option that may be left out, in no order
            choices = sorted({*choices} - {"None"})
        return one_of(match[2], match[1], choices)
    elif match := re.match(r"Error parsing (\S+): no type matching INT\|\{(\w+)\} .*from \['(.*?)'\]", sentence):
        sentence = f"{match[1]} must be a whole number or {match[2]}, not '{match[3]}'"
    elif match := re.match(r"Error parsing (\S+): .*\b(int|float)\b[^']*'(.*)'$", sentence):
        sentence = f"{match[1]} must be {'a whole number' if match[2] == 'int' else 'a number'}, not '{match[3]}'"
    return f"{shortened(sentence.rstrip('.'))}; `lowmem-npo {command} --help` explains the options."


def flags_of(kind: Any) -> list[str]:
    """The flags of a dataclass, and of its sections."""
    flags: list[str] = []
    for f in dataclasses.fields(kind):
        flags += flags_of(f.type) if dataclasses.is_dataclass(f.type) else [f"--{f.name.replace('_', '-')}"]
    return flags


def check_names(model: str | None, *sources: str | None) -> None:
    """Raises UserError for a model or data that cannot be meant, before the libraries are loaded that would find out.

    sources: of data; those that are not named are None.
    """
    if model is not None:
        check_model_name(model)
    for source in filter(None, sources):
        for name in data_names(source):
            check_data_name(name)


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


def short_help(command: str) -> str:
    """The options that most runs need, a sentence each."""
    lines = [
        f"usage: lowmem-npo {command} --model NAME_OR_DIR [--forget FILE] [--retain FILE] [--output-dir DIR] [OPTIONS]",
        "",
        "Make a model forget one dataset and keep another. Writes the adapter, a before/after table and a report.",
    ]
    for title, names in COMMON.items():
        lines += ["", title]
        for section in SECTIONS.values():
            texts = field_docstrings(section)
            for f in dataclasses.fields(section):
                if f.name in names:
                    sentence = re.split(r"(?<!al)[.;]\s", texts[f.name])[0].rstrip(".")
                    sentence = re.sub(r" \([^()]* et al\. \d+\)", "", sentence)  # sources are in the long one
                    default = (
                        f" (default: {f.default})" if isinstance(f.default, (str, float, int)) and f.default else ""
                    )
                    flag = f"  --{f.name.replace('_', '-')}"
                    lines += textwrap.wrap(f"{flag:<20} {sentence}{default}", 96, subsequent_indent=" " * 21)
    return "\n".join([*lines, "", f"lowmem-npo {command} --help-all explains every option; so does docs/options.md."])


@cache
def run_options() -> type:
    """A dataclass with a field per section, for tyro: each section is a box of the help, flags have no prefix."""
    fields: list[tuple] = []
    tests = tuple(test for test in LEAK_TESTS if not test.loads_models)
    for name, section in SECTIONS.items():
        section = with_help(section, tests)
        required = any(
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            for f in dataclasses.fields(section)
        )
        fields.append((name, section) if required else (name, section, dataclasses.field(default_factory=section)))
    flat = dataclasses.make_dataclass("Run", fields)
    flat.__doc__ = (
        "Make a model forget one dataset and keep another. Writes the adapter, a before/after table and a report.\n\n"
        "--config RUN.YAML reads the same options from a file; flags override it. The fields of "
        "transformers.TrainingArguments that have an effect are flags too (--warmup-steps or --warmup-ratio, "
        "--logging-steps, --lr-scheduler-type, --save-steps, ...). TRL's spellings are accepted: "
        + ", ".join(f"--{a}" for a in ALIASES)
        + "."
    )
    return flat


@cache
def with_help(config: type, leak_tests: tuple[LeakTest, ...] = ()) -> Any:
    """The dataclass `config` for tyro: each field's docstring is its help text, and that of --leaks lists the tests.

    tyro reads docstrings by itself, but keeps their line breaks.
    """
    help_texts = field_docstrings(config)
    if "leaks" in help_texts:
        listed = [f"{t.name}{' (after only)' if t.after_only else ''}: {t.summary}" for t in leak_tests]
        help_texts["leaks"] += f" The tests are {'; '.join(listed)}."
    hints = get_type_hints(config, include_extras=True)
    fields = [
        (f.name, Annotated[hints[f.name], _shown(f, hints[f.name], help_texts.get(f.name))], _like(f))
        for f in dataclasses.fields(config)
    ]
    described = dataclasses.make_dataclass(config.__name__, fields)
    described.__doc__ = config.__doc__
    return described


def _shown(field: dataclasses.Field, hint: Any, text: str | None) -> Any:
    """An option in the help: a value that may be left out is shown as its type alone, without a default of None."""
    positional = get_origin(hint) is Annotated and tyro.conf.Positional in hint.__metadata__
    kinds = [_bare(kind) for kind in get_args(hint) if kind is not type(None)]
    optional = type(None) in get_args(hint) and len(kinds) == 1
    metavar = field.name.upper() if positional else None
    if optional and kinds[0] in (str, int, float):
        metavar = kinds[0].__name__.upper()
    elif optional and get_origin(kinds[0]) is Literal:
        metavar = f"{{{','.join(get_args(kinds[0]))}}}"
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="" if field.default in (None, ()) else None)


def _bare(kind: Any) -> Any:
    """A type without its range."""
    return kind.__origin__ if get_origin(kind) is Annotated else kind


def _like(field: dataclasses.Field) -> Any:
    return dataclasses.field(default=field.default, default_factory=field.default_factory, kw_only=field.kw_only)


def field_docstrings(config: type) -> dict[str, str]:
    """Field -> the docstring below it, on one line; that of its nearest definition if it is inherited."""
    docstrings: dict[str, str] = {}
    for parent in reversed(config.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        try:
            source = inspect.getsource(parent)
        except OSError:  # made by make_dataclass, whose fields come from its bases or have no docstrings
            continue
        (definition,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.ClassDef)
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docstrings[name] = " ".join(text.split())
    return docstrings


def _canonical(arguments: Sequence[str]) -> list[str]:
    """--some_flag=x becomes --some-flag x, aliases become our names, `--qlora true` becomes --qlora, `--layered none`
    --layered None, and a flag of `WITHOUT_VALUE` gets its value."""
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
        if (switch := last.replace("--no-", "--", 1)) in AUTOMATIC and switch != last:
            result[-1:] = [switch, "off"]
        if len(result) > 1 and result[-2] in AUTOMATIC and last in TRUE + FALSE:
            result[-1] = "on" if last in TRUE else "off"
        if len(result) > 1 and result[-2][2:] in switches and result[-2].startswith("--") and last in TRUE + FALSE:
            switch = result[-2][2:]
            result[-2:] = [f"--{switch}" if last in TRUE else f"--no-{switch}"]
        if len(result) > 1 and last in NONE and result[-2] in _optional_numbers():
            result[-1] = "None"
    for at in range(len(result) - 1, -1, -1):
        if result[at] in WITHOUT_VALUE and (at + 1 == len(result) or result[at + 1].startswith("--")):
            result.insert(at + 1, WITHOUT_VALUE[result[at]])
    return result


@cache
def _optional_numbers() -> frozenset[str]:
    """The flags of numbers that may be left out."""
    hints = {name: hint for section in SECTIONS.values() for name, hint in get_type_hints(section).items()}
    optional = (name for name, hint in hints.items() if {*get_args(hint)} in ({int, type(None)}, {float, type(None)}))
    return frozenset(f"--{name.replace('_', '-')}" for name in optional)


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    if "--config" not in arguments:
        return None, arguments
    at = arguments.index("--config")
    if at + 1 >= len(arguments):
        raise UserError("--config needs the path of a YAML file.")
    check_values({"config": arguments[at + 1]}, {"config": str})
    return Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]


def _settings_to_resume(flags: Sequence[str]) -> Path | None:
    """The settings of the run in --output-dir that --resume continues, where no flag says which model it trains.

    Raises:
        UserError: they are damaged.
    """
    directories = [value for flag, value in pairwise(flags) if flag == "--output-dir"]
    if "--resume" not in flags or not directories or {"--model", "--adapter", "-h", "--help", "--help-all"} & {*flags}:
        return None
    run = RunFiles(Path(directories[-1]))
    if not run.run_yaml.is_file():
        return None
    run.began()  # says what to do where it is damaged
    return run.run_yaml


def _flags_of_file(path: Path, ours: Sequence[str]) -> list[str]:
    try:
        settings = read_settings(path)
    except OSError as error:
        raise UserError(f"--config: cannot read '{path}': {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"--config: '{path}' cannot be used: {error}.") from error
    flags: list[str] = []
    recipe, several = str(settings.get("recipe")), _lists()
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
            own = tuple(value) if isinstance(value, list) else value
            if recipe in RECIPES and not isinstance(value, bool) and own == value_in(recipe, option):
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
    return join_sources(_canonical(flags))


def _lists() -> list[str]:
    """The flags that take several values."""
    kinds = [item for section in SECTIONS.values() for item in get_type_hints(section).items()]
    return [f"--{name.replace('_', '-')}" for name, kind in kinds if get_origin(kind) is tuple]


def join_sources(arguments: Sequence[str]) -> list[str]:
    """`--forget a.txt b.txt`, which a shell makes of `--forget *.txt`, becomes `--forget a.txt,b.txt`."""
    result: list[str] = []
    for argument in arguments:
        value = not argument.startswith("--")
        if value and len(result) > 1 and result[-2] in SOURCES and not result[-1].startswith("--"):
            result[-1] += f",{argument}"
        else:
            result.append(argument)
    return result


def _settle_accumulation(sections: dict[str, Any], trainer_args: dict[str, Any], explicit: bool) -> None:
    """--gradient-accumulation-steps N as in TRL: a step is N micro-batches of --per-device-train-batch-size rows."""
    steps = trainer_args.pop("gradient_accumulation_steps", None)
    if steps is None:
        return
    training = sections["training"]
    if training.micro_batch_size is None or explicit:
        raise UserError(
            "--gradient-accumulation-steps needs --per-device-train-batch-size, and no --batch-size; or give "
            "--batch-size (forget rows per step) and --micro-batch-size (rows at once)."
        )
    from accelerate import PartialState

    rows = training.micro_batch_size * int(steps) * PartialState().num_processes
    sections["training"] = dataclasses.replace(training, batch_size=rows)
