"""The options as dataclasses that tyro parses, and what their help says."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from lowmem_npo.commands.spellings import ALIASES
from lowmem_npo.config import SECTIONS
from lowmem_npo.evaluation.leaks.contract import LeakTest
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS

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


def optional_numbers(kind: Any) -> list[str]:
    """The flags of those numbers that may be left out, of a dataclass and of its sections."""
    may_be_none = {int, type(None)}, {float, type(None)}
    return [flag for flag, hint in _typed_flags(kind) if {*get_args(hint)} in may_be_none]


def switches_of(kind: Any) -> list[str]:
    """The flags that take no value, of a dataclass and of its sections."""
    return [flag for flag, hint in _typed_flags(kind) if hint is bool]


def _typed_flags(kind: Any) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _typed_flags(hint)
        else:
            yield f"--{name.replace('_', '-')}", hint


def flags_of(kind: Any) -> list[str]:
    """The flags of a dataclass, and of its sections."""
    flags: list[str] = []
    for f in dataclasses.fields(kind):
        flags += flags_of(f.type) if dataclasses.is_dataclass(f.type) else [f"--{f.name.replace('_', '-')}"]
    return flags
