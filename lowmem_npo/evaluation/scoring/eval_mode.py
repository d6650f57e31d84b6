"""Evaluation borrows a model that is being trained, and gives it back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowmem_npo.model.modes import eval_mode
from lowmem_npo.progress import Progress


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own train/eval flag is put back on leaving.

    Gradient checkpointing needs no switch of its own: without gradients nothing is recomputed, and the KV cache works.
    """
    with eval_mode(model), torch.no_grad():
        yield


def progress_bar(rows: int, description: str, wanted: bool) -> Progress:
    """How many rows have been measured; on a terminal it is gone when it is done."""
    return Progress(rows, description, "row", wanted=wanted)
