"""Evaluation borrows a model that is being trained, and gives it back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from lowmem_npo.model.modes import eval_mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own train/eval flag is put back on leaving.

    Gradient checkpointing needs no switch of its own: without gradients nothing is recomputed, and the KV cache works.
    """
    with eval_mode(model), torch.no_grad():
        yield


def progress_bar(rows: int, description: str, wanted: bool) -> tqdm:
    """A bar of rows while measuring, gone when it is done; none where there is no terminal to draw it on."""
    return tqdm(total=rows, desc=description, unit="row", leave=False, disable=None if wanted else True)
