"""What files hold that the tool has written: checked where it is read, since any of them may have been edited by hand,
cut off, or come from another tool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from annotated_types import Interval
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from lowmem_npo.ranges import field_types, shown, wanted

T = TypeVar("T")
Amount = Annotated[FiniteFloat, Interval(ge=0)]  # of anything, however much


def record_of(kind: type[T], content: Any) -> T:
    """An object of the dataclass `kind`, made of what a JSON file holds of it.

    Raises ValueError, naming the field, for one that is missing or unknown, or whose value is not of its type.
    """
    dataclass, none = cast(Any, kind), dataclasses.MISSING
    types = field_types(dataclass)
    optional = {f.name for f in dataclasses.fields(dataclass) if (f.default, f.default_factory) != (none, none)}
    check_record(content, types, optional)
    if unknown := content.keys() - types.keys():
        raise ValueError(f"{min(unknown)} is not known in this version")
    return kind(**content)


def check_record(content: Any, types: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Raises ValueError, naming the key, unless `content`, of a JSON file, is an object with values of these types;
    those of `optional` may be missing, and others be there."""
    check_value(content, dict[str, Any])
    for name, kind in types.items():
        if name in content:
            check_value(content[name], kind, name)
        elif name not in optional:
            raise ValueError(f"{name} is missing")


def check_value(value: Any, kind: Any, name: str = "it") -> None:
    """Raises ValueError unless `value`, called `name`, is of the type `kind`."""
    try:
        _validator(kind)(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([name, *(str(part) for part in first["loc"])])
        raise ValueError(f"{place} must be {wanted(error)}, not {shown(first['input'])}") from None


@cache
def _validator(kind: Any) -> Callable[..., Any]:
    return TypeAdapter(kind).validate_python
