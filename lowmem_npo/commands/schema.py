"""`lowmem-npo schema`: the JSON Schema of a run's configuration, by which editors complete and check it.

It is made from what the command line is made from: the sections' types, defaults and docstrings, and the fields of
transformers.TrainingArguments that have an effect. A number's range is found by asking the section's own checks.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lowmem_npo.commands.arguments import parse_options
from lowmem_npo.commands.help_texts import field_docstrings
from lowmem_npo.commands.spellings import ALIASES, AUTOMATIC, SOURCES
from lowmem_npo.config import FORGET_TERMS, SECTIONS
from lowmem_npo.errors import UserError
from lowmem_npo.libraries import quiet_libraries

SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string"}
Schema = dict[str, Any]


@dataclasses.dataclass
class SchemaOptions:
    """Print the JSON Schema of a configuration file, as `lowmem-npo train --config` reads it, and every run writes its
    run.yaml.

    Write it to a file with `lowmem-npo schema > run.schema.json`. Editors with a YAML language server then complete and
    check every file that begins with this line:

    # yaml-language-server: $schema=run.schema.json
    """


def main(arguments: Sequence[str]) -> None:
    parse_options(SchemaOptions, arguments, "schema")
    quiet_libraries()
    print(json.dumps(run_schema(), indent=2, ensure_ascii=False))


def run_schema() -> Schema:
    """The schema (draft 2020-12) of a configuration file with the names that run.yaml has, and TRL's spellings."""
    properties: dict[str, Schema] = {}
    for section in SECTIONS.values():
        properties |= _section(section)
    for alias, name in ALIASES.items():
        own = name.replace("-", "_")
        spelled = {key: value for key, value in properties[own].items() if key != "default"}
        properties[alias.replace("-", "_")] = {**spelled, "description": f"Another spelling of {own}."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of lowmem-npo train",
        "type": "object",
        "additionalProperties": False,
        "properties": {**_training_arguments(), **properties},
    }


def _section(section: type) -> dict[str, Schema]:
    """Field -> its schema."""
    texts, hints = field_docstrings(section), get_type_hints(section)
    schemas = {}
    for field in dataclasses.fields(section):
        schema = _of_type(hints[field.name], partial(_range, section, field.name))
        if f"--{field.name}" in SOURCES:  # several files
            schema["anyOf"].append({"type": "array", "items": {"type": "string"}})
        if f"--{field.name.replace('_', '-')}" in AUTOMATIC:
            schema["enum"] += [True, False]  # as YAML reads on and off
        if field.name == "forget_term":
            schema = {"anyOf": [{"enum": list(FORGET_TERMS)}, schema]}  # or one that a package brings
        schema["description"] = texts[field.name]
        if field.default is not dataclasses.MISSING:
            schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        schemas[field.name] = schema
    return schemas


def _training_arguments() -> dict[str, Schema]:
    """The same of those of transformers' that have an effect."""
    from transformers import TrainingArguments

    from lowmem_npo.training.honoured import HONOURED

    hints = get_type_hints(TrainingArguments)
    schemas = {}
    for field in dataclasses.fields(TrainingArguments):
        if field.name in HONOURED:
            schema = _of_type(hints[field.name])
            schema["description"] = " ".join(
                str(field.metadata.get("help", "Of transformers.TrainingArguments.")).split()
            )
            schemas[field.name] = schema
    ratio = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
    return schemas | {"warmup_ratio": {**ratio, "description": "Share of the steps that warm up."}}


def _of_type(hint: Any, limits: Callable[[type], Schema] = lambda kind: {}) -> Schema:
    """The schema of a type, as the file writes it; limits: the range of a number of that kind."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of_type(part, limits) for part in parts]}
    if origin is Literal:
        return {"enum": list(parts)}
    if hint is type(None):
        return {"type": "null"}
    if hint in SCALARS:
        return {"type": SCALARS[hint], **(limits(hint) if hint in (int, float) else {})}
    if origin in (tuple, list):  # a single one may stand alone
        item = {"type": ["string", "integer"]}
        return {"anyOf": [{"type": "array", "items": item}, item, {"type": "null"}]}
    if origin is dict or hint is dict:
        return {"type": "object"}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    return {}


def _range(section: type, name: str, kind: type) -> Schema:
    """The least value of a number that the section's own checks let pass."""
    if _refused(section, name, kind(0)):
        return {"minimum": 1} if kind is int else {"exclusiveMinimum": 0}
    return {"minimum": 0} if _refused(section, name, kind(-1)) else {}


def _refused(section: type, name: str, value: float) -> bool:
    required = {f.name: "" for f in dataclasses.fields(section) if f.default is dataclasses.MISSING}
    try:
        section(**required, **{name: value})
    except UserError as error:
        return f"--{name.replace('_', '-')} must be" in str(error)
    return False
