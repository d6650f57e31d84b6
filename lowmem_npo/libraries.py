"""The libraries that a command uses, made quiet and quick: call these before the command does its work."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from unittest import mock

REPORTS_HOME = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")  # what switches that off
HUB_SECONDS = 5  # within which the hub answers
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second one: PyTorch before 2.9


def prepare_console() -> None:
    """For every command, before it imports a library: what the terminal's encoding lacks is printed as an escape, no
    library reports to anybody what is done here; bitsandbytes, which PEFT imports, does not report an optional CPU
    kernel missing, nor Matplotlib fonts that no picture here uses."""
    os.environ.update(dict.fromkeys(REPORTS_HOME, "1"))
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # of `datasets`, which counts local files, too
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("bitsandbytes.backends.cpu.ops", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _open_closed_streams() -> None:
    """What the process was started without (`>&-`) leads nowhere: else the next file that is opened would take its
    place, and what a library prints would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def expand_segments() -> None:
    """PyTorch allocates GPU memory in expandable segments, which waste less of it, unless the user has configured its
    allocator. To be called before PyTorch is imported."""
    if sys.platform == "linux" and not any(os.environ.get(name) for name in ALLOCATOR_SETTINGS):
        os.environ.update(dict.fromkeys(ALLOCATOR_SETTINGS, "expandable_segments:True"))


def segments_expand() -> bool:
    """Whether PyTorch, as it is configured, allocates GPU memory in expandable segments."""
    settings = next(filter(None, map(os.environ.get, ALLOCATOR_SETTINGS)), "")
    return "expandable_segments:True" in settings.replace(" ", "")


def quiet_libraries() -> None:
    """Switches off the libraries' messages that a user cannot act on; the others stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise a warning for every forked data loader
    # PEFT uses a name that transformers has replaced.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    for peft in (
        "Setting `save_embedding_layers`",
        "fan_in_fan_out is set to",
        "The following .*_pattern keys did not",
        "The PEFT config's `base_model_name_or_path` was renamed",  # which base it is we check ourselves
        "Found missing adapter keys",  # we copy all weights ourselves
    ):
        warnings.filterwarnings("ignore", message=peft)
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # its retries; the last failure is reported in one sentence
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def hub_problem() -> str | None:
    """Why the hub cannot be reached; None where it can. To be called before anything is looked up there: the libraries
    then go by their local copies, and do not try again for half a minute, file by file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _no_answer.cache_info().currsize:
        return "HF_HUB_OFFLINE is set"
    if problem := _no_answer():
        constants.HF_HUB_OFFLINE = True
        if datasets := sys.modules.get("datasets"):
            datasets.config.HF_HUB_OFFLINE = True
    return problem


@cache
def _no_answer() -> str | None:
    import huggingface_hub

    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(endpoint, timeout=HUB_SECONDS)
    except Exception as error:  # of whichever HTTP library there is; what is no lack of a connection, others report
        if isinstance(error, OSError) or re.search("Connect|Timeout", type(error).__name__):
            return f"{endpoint}: {str(error) or type(error).__name__}"
    return None


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a process that estimates and then ends: most of its time is spent importing libraries.

    bitsandbytes compiles functions when it is imported, which loads all of PyTorch's compiler; they stay uncompiled,
    since on fake tensors nothing is compiled. transformers loads scipy for the losses of image models, and `datasets`
    for its Trainer to recognise; nothing here needs either. Nor is garbage collected among what is imported, now or
    later.
    """
    import torch
    import transformers.utils

    gc.disable()
    try:
        with (
            mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda function: function)),
            mock.patch.object(transformers.utils, "is_scipy_available", lambda: False),
            mock.patch.object(transformers.utils, "is_datasets_available", lambda: False),
        ):
            yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton, at exit, takes what is frozen for leaked
        gc.enable()
