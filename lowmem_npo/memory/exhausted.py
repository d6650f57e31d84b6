"""What to do when the memory of a GPU runs out: fewer rows go through the model at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_npo.endings import is_out_of_memory
from lowmem_npo.memory.release import release_memory
from lowmem_npo.model.layers import causal_lm

logger = logging.getLogger(__name__)
T = TypeVar("T")
_room: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # rows at once, of models for which it ran out


class RandomState(NamedTuple):
    """Of the generators that a pass may draw from, for dropout."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def if_fits(run: Callable[[], T]) -> T | None:
    """`run()`; None where memory runs out for it, and what it had allocated is free again."""
    try:
        return run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return None


def as_fits(model: PreTrainedModel | PeftModel, rows: int, run: Callable[[int], T]) -> T:
    """`run(n)`, which sends so many of its rows through `model` at once; again with half as many, and with the same
    random numbers, while memory runs out. Later calls begin with what fitted. A warning says so, once for a model.

    Raises:
        torch.OutOfMemoryError: a single row is too much.
    """
    lm, begun = causal_lm(model), RandomState.now()
    at_once = max(1, min(rows, _room.get(lm, rows)))
    while True:
        try:
            return run(at_once)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if at_once == 1:
                raise torch.OutOfMemoryError(str(error)) from error
        release_memory()
        begun.restore()
        at_once //= 2
        if lm not in _room:
            logger.warning(
                "The GPU ran out of memory while measuring: from here on fewer rows go through the model at once, "
                "which changes figures by rounding alone, and samples by chance."
            )
        _room[lm] = at_once


def in_parts(
    model: PreTrainedModel | PeftModel, batch: Sequence[int], run: Callable[[Sequence[int]], T]
) -> list[tuple[Sequence[int], T]]:
    """`run` of the rows `batch`, or of parts of it that memory has room for: each with its result."""

    def parts(at_once: int) -> list[tuple[Sequence[int], T]]:
        shares = (batch[start : start + at_once] for start in range(0, len(batch), at_once))
        return [(share, run(share)) for share in shares]

    return as_fits(model, len(batch), parts)
