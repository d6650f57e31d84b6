"""What is shared with the command line tells its users what to give; a script's are told it by a script's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lowmem_npo.errors import UserError

NAMES = {"batch-size": "step_batch_size"}  # option -> argument of NPOConfig, where it has another name
OF_ROWS = ("prompt-column", "answer-column", "template")  # options that are arguments of functions
FUNCTIONS = "lowmem_npo.data.to_examples and lowmem_npo.data.tokenize take what NPOConfig has not"


@contextmanager
def in_script_words() -> Iterator[None]:
    """Inside, an error that names options names the arguments that they are in a script, `max_length=24`."""
    try:
        yield
    except UserError as error:
        text = str(error)
        options = re.findall(r"--([a-z][a-z-]*)", text)
        if not options:
            raise
        text = re.sub(r"--([a-z][a-z-]*)(?: (\d[\d.e-]*(?<!\.)))?", _argument, text)
        if set(options) & set(OF_ROWS):
            text = f"{text.rstrip('.')}; {FUNCTIONS}."
        raise UserError(text) from error


def _argument(option: re.Match[str]) -> str:
    name = NAMES.get(option[1], option[1].replace("-", "_"))
    return name if option[2] is None else f"{name}={option[2]}"
