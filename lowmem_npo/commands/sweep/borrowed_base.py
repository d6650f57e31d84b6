"""A base model that one run after another borrows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from lowmem_npo.memory.release import release_memory


@contextmanager
def borrowed(base: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`base` for one run; afterwards it is as it was loaded, whatever the run did to it.

    A run puts an adapter into the modules, replaces forwards (memory switches), sets flags and hooks, changes the
    configuration, and may move the embedding. None of it changes the values of the frozen weights. So every module gets
    its attributes back, and the adapter, which nothing refers to any more, is freed.
    """
    device = base.device
    embedding = base.get_input_embeddings()
    modules = [(module, _attributes(module)) for module in base.modules()]
    holders = [holder for holder in (base.config, getattr(base, "generation_config", None)) if holder is not None]
    settings = [(holder, copy.deepcopy(vars(holder))) for holder in holders]
    try:
        yield base
    finally:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for holder, values in settings:
            vars(holder).clear()
            vars(holder).update(values)
        embedding.to(device)
        base.eval()
        release_memory()  # a trainer refers to itself


def _attributes(module: torch.nn.Module) -> dict[str, object]:
    """The module's own attributes; the tables of its submodules, parameters, buffers and hooks are copied, but not what
    is in them."""

    return {name: copy.copy(v) if isinstance(v, (dict, list, set)) else v for name, v in vars(module).items()}
