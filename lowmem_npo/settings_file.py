"""Settings in YAML: lines of `name: value`, with lists and small objects as values, and nothing else that YAML has.

What it has besides (references, tags, sets, dates) is never meant in a run's settings, and can take a minute and all
memory to read: nine levels of references are a thousand million values. So the text is looked through before anything
is made of it.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import yaml

from lowmem_npo.errors import one_line
from lowmem_npo.files import read_at_most

MOST_BYTES, MOST_LEVELS = 2**20, 6
NO_SETTINGS = "it must hold lines of the form `name: value`, as the run.yaml of a run does"


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file, by name.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds anything else; the message is a clause that begins with "it" or with a line.
    """
    content = read_at_most(path, MOST_BYTES)
    if len(content) > MOST_BYTES:
        raise ValueError("it has more than 1 MiB, which no settings have")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    try:
        _look_through(text)
        settings = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{_line(error.problem_mark)} is not valid YAML ({error.problem or error.context})") from error
    except yaml.YAMLError as error:  # of a character that is none
        raise ValueError(f"it is not valid YAML ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise ValueError(NO_SETTINGS)
    return {str(name): value for name, value in settings.items()}


def _look_through(text: str) -> None:
    """Raises ValueError for the first thing that settings do not have."""
    levels, is_name, names = 0, False, set[str]()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = _line(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"{line} has a reference (& or *): write the value out")
        if tag := getattr(event, "tag", None):
            raise ValueError(f"{line} has a tag ({tag[:40]}): write the plain value")
        if isinstance(event, yaml.DocumentStartEvent) and names:
            raise ValueError(f"{line} begins a second document: keep one")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if levels == 0 and not isinstance(event, yaml.MappingStartEvent):
                raise ValueError(NO_SETTINGS)
            if levels == 1 and is_name:
                if not isinstance(event, yaml.ScalarEvent):
                    raise ValueError(f"{line}: a list or an object cannot be a name")
                if event.value in names:
                    raise ValueError(f"{line} has {event.value[:40]} again: remove one of the two")
                names.add(event.value)
            elif isinstance(event, yaml.ScalarEvent):
                _check_value(event, line)
        if isinstance(event, yaml.CollectionStartEvent):
            levels += 1
            if levels > MOST_LEVELS:
                raise ValueError(f"{line} goes more than {MOST_LEVELS} levels deep, which no settings do")
        elif isinstance(event, yaml.CollectionEndEvent):
            levels -= 1
        if levels == 1:  # names and values alternate
            is_name = not is_name


def _check_value(event: yaml.ScalarEvent, line: str) -> None:
    """Raises ValueError for what YAML makes no value of, and for a date."""
    loader = yaml.SafeLoader("")
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, event.value, event.implicit), event.value)
    try:
        value = loader.construct_object(node)
    except (ValueError, OverflowError) as error:  # the 31st of February, 5,000 digits
        raise ValueError(
            f"{line}: {event.value[:40]!r} would be a number or a date, but is none: put it in quotes"
        ) from error
    if isinstance(value, datetime.date):
        raise ValueError(f"{line}: {event.value} would be a date: put it in quotes")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and re.match(r"[-+]?(0[\d_xb]|.*:)", event.value):  # 010 is 8 in YAML, and 1:30 is 90
        raise ValueError(f"{line}: {event.value[:40]} would be {value}: write it so, or put it in quotes")


def _line(mark: Any) -> str:
    return "it" if mark is None else f"line {mark.line + 1}"
