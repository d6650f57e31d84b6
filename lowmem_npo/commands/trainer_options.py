"""Options that are fields of `transformers.TrainingArguments`: which there are, and their values.

Importing transformers takes seconds; mistakes are found without it, by reading the source of that class.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, cast

from lowmem_npo.commands.spellings import ALIASES
from lowmem_npo.commands.wording import no_such_option, one_of
from lowmem_npo.errors import UserError
from lowmem_npo.ranges import check_values
from lowmem_npo.training.honoured import HONOURED, RANGES, check_supported, is_unsupported

LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
LISTED = dict.fromkeys(("log_level", "log_level_replica"), LEVELS)  # which the source does not say in one place
TRUTHS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")
NUMBERS = {"int": (int, "a whole number"), "float": (float, "a number")}


def check_flags(arguments: Sequence[str], ours: Sequence[str]) -> None:
    """Raises UserError for a flag that is neither one of `ours` nor a field of `transformers.TrainingArguments`."""
    for argument in arguments:
        flag = argument.replace("--no-", "--", 1)
        if re.match("--[a-zA-Z]", flag) and flag != "--help":
            check_option(flag, argument, ours)


def check_option(flag: str, written: str, ours: Sequence[str]) -> None:
    """The same for the flag of one option, `written` by the user. The nearest name may be one that users know."""
    trainers = [f"--{name.replace('_', '-')}" for name in ("warmup_ratio", *_field_types())]
    if flag not in (*ours, *trainers):
        known = [*ours, *(f"--{alias}" for alias in ALIASES), *trainers]
        raise UserError(no_such_option(written, known, "train --help-all"))


def check_trainer_values(arguments: Sequence[str]) -> None:
    """Raises UserError for a value that its option cannot have, as far as the source says so."""
    types = _field_types()
    for flag, value in _pairs(arguments):
        name = flag[2:].replace("-", "_")
        if name not in HONOURED:
            continue
        kinds = re.findall(r"\w+", types.get(name, ""))
        check_supported(name, value, f"{flag} {value}")
        choices = [choice for choice in _choices(name, kinds) if not is_unsupported(name, choice)]
        if choices and value not in choices:
            raise UserError(one_of(flag, value, choices))
        if kinds[:1] == ["bool"] and value.lower() not in TRUTHS:
            raise UserError(f"{flag} must be true or false, not '{value}'.")
        if kinds and kinds[0] in NUMBERS:
            convert, wanted = NUMBERS[kinds[0]]
            try:
                number = convert(value)
            except ValueError:
                raise UserError(f"{flag} must be {wanted}, not '{value}'.") from None
            check_values({name: number}, RANGES)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(flag, value) of each value; a flag may have several, or none."""
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument
        elif flag:
            yield flag, argument


def trainer_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """The fields that `arguments` set. Raises UserError for an invalid value."""
    if not arguments:
        return {}
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(_explained(message))

    parser = Parser(cast(Any, TrainingArguments), allow_abbrev=False, add_help=False, conflict_handler="resolve")
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what is given
    # transformers 5 takes the ratio as --warmup-steps.
    parser.add_argument("--warmup-ratio", "--warmup_ratio", dest="warmup_steps", type=_ratio, default=argparse.SUPPRESS)
    return vars(parser.parse_args(arguments))


def _explained(message: str) -> str:
    """What argparse says, as a sentence."""
    if stray := re.match("unrecognized arguments: (.*)", message):
        return f"'{stray[1]}' belongs to no option; `lowmem-npo train --help-all` lists them."
    match = re.match(r"argument (--[\w-]+)[^:]*: (.*)", message, re.DOTALL)
    if not match:
        return f"{message}; `lowmem-npo train --help-all` explains the options."
    flag, reason = match[1].replace("_", "-"), match[2]
    if choice := re.match(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", reason):
        return one_of(flag, choice[1], choice[2].replace("'", "").split(", "))
    if value := re.match(r"invalid \w+ value: '(.*)'", reason):
        return f"{flag} cannot be '{value[1]}'; `lowmem-npo train --help-all` says where its values are explained."
    return f"{flag}: {reason}; `lowmem-npo train --help-all` explains the options."


def _ratio(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


@cache
def _source(module: str) -> str:
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.submodule_search_locations
    return Path(package.submodule_search_locations[0], f"{module}.py").read_text(encoding="utf-8")


@cache
def _field_types() -> dict[str, str]:
    """Field -> its annotation."""
    return dict(re.findall(r"^    (\w+): ([^=\n]*)", _source("training_args"), re.MULTILINE))


def _choices(name: str, kinds: Sequence[str]) -> list[str]:
    """The values of a field, of which its annotation names the types; none if it may have any."""
    if name in LISTED:
        return [*LISTED[name]]
    if name == "report_to":
        source = _source("integrations/integration_utils")
        (loggers,) = re.findall(r"(?ms)^INTEGRATION_TO_CALLBACK = \{\n(.*?)^\}", source)
        return ["none", "all", *re.findall(r'"(\w+)":', loggers)]
    return next((values for kind, values in _enumerations().items() if kind in kinds), [])


@cache
def _enumerations() -> dict[str, list[str]]:
    """Enumeration -> its values."""
    return {
        name: re.findall(r'^    [A-Z]\w* = "(.*)"', body, re.MULTILINE)
        for module in ("training_args", "trainer_utils")
        for name, body in re.findall(r"^class (\w+)\(ExplicitEnum\):\n((?:    .*\n|\n)*)", _source(module), re.M)
    }
