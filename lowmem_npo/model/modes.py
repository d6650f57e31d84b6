"""Train and eval mode: the frozen base computes as in eval mode in every pass; only an adapter can have dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn


def parts(model: nn.Module) -> list[nn.Module]:
    """What `model.modules()` yields, `model` itself included, layer upon layer: for the passes of a step, each of which
    goes through them several times. PyTorch's own walk hands every module up through a generator for each level above
    it, and makes its name: that takes several times as long."""
    seen = {model: None}
    queue = [model]
    for module in queue:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen[child] = None
                queue.append(child)
    return queue


def train_adapter(model: nn.Module) -> None:
    """Puts `model` into eval mode, except where an adapter has dropout.

    Published configurations have dropout, or noise in a router, from pretraining. Neither belongs to the adapter, and
    the reference would be another model than the policy, each micro-batch yet another.
    """
    with_dropout = set[nn.Module]()
    for module in parts(model):
        if isinstance(module, LoraLayer):
            dropouts = [m for m in module.lora_dropout.values() if not isinstance(m, nn.Identity)]
            with_dropout.update([module, *dropouts] if dropouts else ())  # DoRA asks the adapted layer
        if module.training != (module in with_dropout):  # to set it everywhere, as `eval` does, takes ten times as long
            module.training = module in with_dropout


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether running `module` again gives another result, unless the random state is the same."""
    return any(part.training for part in parts(module))


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, all of `model` is in eval mode; on leaving, every module's own mode is restored."""
    return switched([module for module in parts(model) if module.training], "training", False)


@contextmanager
def switched(modules: Sequence[nn.Module], name: str, to: bool) -> Iterator[None]:
    """Inside, the attribute `name` of `modules` is `to`; before and after it is the opposite."""
    for module in modules:
        setattr(module, name, to)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, not to)
