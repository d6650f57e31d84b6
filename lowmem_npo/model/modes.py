"""Train and eval mode: the frozen base computes as in eval mode in every pass; only an adapter can have dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn


def train_adapter(model: nn.Module) -> None:
    """Puts `model` into eval mode, except where an adapter has dropout.

    Published configurations have dropout, or noise in a router, from pretraining. Neither belongs to the adapter, and
    the reference would be another model than the policy, each micro-batch yet another.
    """
    with_dropout = set[nn.Module]()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            dropouts = [m for m in module.lora_dropout.values() if not isinstance(m, nn.Identity)]
            with_dropout.update([module, *dropouts] if dropouts else ())  # DoRA asks the adapted layer
        if module.training != (module in with_dropout):  # to set it everywhere, as `eval` does, takes ten times as long
            module.training = module in with_dropout


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether running `module` again gives another result, unless the random state is the same."""
    return any(part.training for part in module.modules())


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, all of `model` is in eval mode; on leaving, every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
