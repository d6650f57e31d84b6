"""Which values an option may have: its type, with the bounds of annotated-types, which pydantic checks.

The bounds keep a typing error from being a run: beyond them float32 overflows, or no machine has the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Interval, MinLen

from lowmem_npo.errors import UserError

MOST, LARGEST = 2**31 - 1, 1e6
SHOWN = 200  # characters of a text in a message

Count = Annotated[int, Interval(ge=1, le=MOST)]
CountOrNone = Annotated[int, Interval(ge=0, le=MOST)]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]  # as NumPy takes it
Positive = Annotated[float, Interval(gt=0, le=LARGEST)]
PositiveOrZero = Annotated[float, Interval(ge=0, le=LARGEST)]
Finite = Annotated[float, Interval(ge=-LARGEST, le=LARGEST)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
Probability = Annotated[float, Interval(ge=0, lt=1)]
MaybeEmpty = Annotated[str, MinLen(0)]  # a text; any other may not be empty
Automatic = Literal["auto", "on", "off"]  # auto is decided before the model is loaded, and recorded as what it became

KINDS = {"int": "a whole number", "float": "a number", "string": "text", "bool": "true or false", "tuple": "a list",
         "list": "a list", "dict": "an object"}  # fmt: skip


@dataclass
class Checked:
    """Options whose values are checked against their types when they are made."""

    def __post_init__(self) -> None:
        check_fields(self)


def on_or_off(value: Any) -> Any:
    """True and False, as YAML reads on and off, in words; any other value as it is."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def check_fields(options: Any, section: type | None = None) -> None:
    """Raises UserError for the first field of a dataclass whose value is not of its type, or out of its range.

    section: the class whose fields are checked, if `options` is of one that inherits it.
    """
    hints = field_types(section or type(options))
    check_values({name: getattr(options, name) for name in hints}, hints)


def check_values(
    values: Mapping[str, Any],
    types: Mapping[str, Any],
    spelled: Callable[[str], str] = lambda name: f"--{name.replace('_', '-')}",
) -> None:
    """Raises UserError for the first of `values` that its type does not allow; it names the flag, or what `spelled`
    makes of the name."""
    from pydantic import ValidationError  # late: --help checks nothing

    for name, value in values.items():
        if name not in types:
            continue
        try:
            _validator(types[name])(value)
        except ValidationError as error:
            raise UserError(f"{spelled(name)} must be {wanted(error)}, not {shown(value)}.") from None


def shown(value: Any) -> str:
    """A value for a message, on one line, however long it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**64:
        return f"a number of {value.bit_length()} bits"  # Python writes none of more than 4300 digits
    return shortened(str(value) if isinstance(value, (int, float)) else repr(value))


def shortened(text: str) -> str:
    """A text for a message, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


@cache
def field_types(section: type) -> dict[str, Any]:
    """The fields of a dataclass with their types and ranges."""
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@cache
def _validator(kind: Any) -> Callable[[Any], Any]:
    from pydantic import ConfigDict, TypeAdapter

    # A text that is empty is a shell's variable that was not set: --forget "" would be all of the directory.
    text = ConfigDict(str_strip_whitespace=True, str_min_length=1)
    return TypeAdapter(kind, config=text | ConfigDict(strict=True, allow_inf_nan=False)).validate_python


def wanted(error: Any) -> str:
    """What pydantic misses, in words."""
    first = error.errors(include_url=False)[0]
    bounds = first.get("ctx", {})
    match first["type"]:
        case "greater_than" if bounds["gt"] == 0:
            return "a positive number"
        case "greater_than_equal" if bounds["ge"] == 0 and isinstance(bounds["ge"], float):
            return "0 or a positive number"
        case "greater_than_equal":
            return f"at least {bounds['ge']:g}"
        case "less_than":
            return f"less than {bounds['lt']:g}"
        case "less_than_equal":
            return f"at most {bounds['le']:,g}" if isinstance(bounds["le"], float) else f"at most {bounds['le']:,}"
        case "finite_number":
            return "a finite number"
        case "string_too_short":
            return "a text that is not empty"
        case "too_short" if bounds["min_length"] == 1:
            return "a list that is not empty"
        case "string_unicode":
            return "UTF-8 text"
        case "literal_error":
            return f"one of {bounds['expected'].replace(' or ', ', ')}".replace("'", "")
        case kind:
            return KINDS.get(kind.partition("_")[0], first["msg"])
