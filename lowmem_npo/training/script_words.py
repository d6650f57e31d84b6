"""What is shared with the command line tells its users what to give; a script's are told it by a script's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from lowmem_npo.config import AdapterConfig
from lowmem_npo.errors import UserError

# Option -> argument, where it has another name.
NAMES = {"batch-size": "step_batch_size", "lr": "learning_rate", "epochs": "num_train_epochs"}
# Arguments of functions.
OF_ROWS = ("prompt_column", "answer_column", "alternative_column", "paraphrase_column", "template")
FUNCTIONS = "lowmem_npo.data.to_examples and lowmem_npo.data.tokenize take what NPOConfig has not"
OPTION = re.compile(r"(?<![^\s(])--([a-z][a-z-]*[a-z])\b(?: (\d[\d.e-]*(?<!\.)))?")


@contextmanager
def in_script_words(args: Any) -> Iterator[None]:
    """Inside, an error is in `script_words`. args: the script's `NPOConfig`."""
    try:
        yield
    except UserError as error:
        if (text := script_words(str(error), args)) == str(error):
            raise
        raise UserError(text) from error


def script_words(text: str, args: Any) -> str:
    """A text that names options, with the arguments that they are in a script, such as `max_length=24`. What is none of
    these is left as it is.

    args: the script's `NPOConfig`.
    """
    arguments = {field.name for config in (args, AdapterConfig) for field in fields(config)} | set(OF_ROWS)
    used = set[str]()

    def named(option: re.Match[str]) -> str:
        name = NAMES.get(option[1], option[1].replace("-", "_"))
        if name not in arguments:
            return option[0]
        used.add(name)
        return name if option[2] is None else f"{name}={option[2]}"

    text = OPTION.sub(named, text)
    return f"{text.rstrip('.')}; {FUNCTIONS}." if used & set(OF_ROWS) else text
