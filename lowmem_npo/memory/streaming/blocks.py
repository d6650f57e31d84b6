"""A decoder layer's frozen weights, one after the other in a block of memory, and as parameters that lie in a slot."""

from __future__ import annotations

import copy
import math
import mmap
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from lowmem_kernels.dispatch import has_values
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from lowmem_npo.errors import UserError
from lowmem_npo.sizes import gib

ALIGNMENT = 256  # bytes: kernels read weights in vectors, as from the start of an allocation
OF_FOUR_BITS = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized", "module")


class Weight(NamedTuple):
    """A parameter and the modules that hold it: several where it is tied within a layer."""

    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]

    @property
    def tensors(self) -> list[Tensor]:
        """What is copied: its values and, of a 4-bit weight, the statistics of its blocks."""
        state = getattr(self.parameter, "quant_state", None)
        if state is None:
            return [self.parameter.detach()]
        nested = [] if state.state2 is None else [state.state2.absmax]
        return [self.parameter.detach(), state.absmax, *nested]


class Block:
    """One layer's weights: where each tensor lies in a block of `size` bytes."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = weights
        self.offsets: list[int] = []
        self.size = 0
        for tensor in self.tensors():
            self.offsets.append(self.size)
            self.size += math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT

    def tensors(self) -> Iterator[Tensor]:
        """In the order of `offsets`."""
        return (tensor for weight in self.weights for tensor in weight.tensors)

    def _views(self, memory: Tensor) -> Iterator[Tensor]:
        """Each tensor as it lies in `memory`, with a version counter of its own: autograd must not take a copy into a
        slot for a change of what it has saved."""
        for tensor, start in zip(self.tensors(), self.offsets, strict=True):
            part = memory[start : start + tensor.numel() * tensor.element_size()]
            yield part.view(tensor.dtype).view(tensor.shape).data

    def lies_in(self, memory: Tensor) -> bool:
        """Whether `move_into(memory)` would change nothing."""
        start = memory.data_ptr()
        own = [(tensor.untyped_storage()._cdata, tensor.data_ptr() - start) for tensor in self.tensors()]
        return memory.numel() == self.size and own == [(memory.untyped_storage()._cdata, at) for at in self.offsets]

    def move_into(self, memory: Tensor) -> None:
        """Copies the weights into `memory`, and frees where they were: from then on the parameters lie there."""
        views = iter(list(self._views(memory)))
        for weight in self.weights:
            own = weight.tensors
            lying = [next(views).copy_(tensor) for tensor in own]
            if has_values(weight.parameter):
                weight.parameter.data = lying[0]
                state = getattr(weight.parameter, "quant_state", None)
                if state is not None:
                    state.absmax = lying[1]
                    if state.state2 is not None:
                        state.state2.absmax = lying[2]

    def replace_in(self, slot: Tensor) -> list[nn.Parameter]:
        """Gives the modules parameters that lie in `slot`, and returns these. Those before are left as they are."""
        views, replaced = iter(list(self._views(slot))), []
        for weight in self.weights:
            lying = [next(views) for _ in weight.tensors]
            parameter = _like(weight.parameter, lying)
            for module, name in weight.places:
                module._parameters[name] = parameter
                vars(module)["_apply"] = Unmoved(module, name)
                if hasattr(module, "quant_state"):
                    vars(module)["quant_state"] = getattr(parameter, "quant_state", None)
            replaced.append(parameter)
        return replaced


def _like(old: nn.Parameter, lying: Sequence[Tensor]) -> nn.Parameter:
    """`old` with the tensors `lying` in place of its own."""
    four_bits = isinstance(old, bnb.nn.Params4bit)
    new: Any = Tensor._make_subclass(type(old), lying[0], False) if four_bits else nn.Parameter(lying[0], False)
    for name in OF_FOUR_BITS:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    state = getattr(old, "quant_state", None)
    if state is not None:
        new.quant_state = copy.copy(state)
        new.quant_state.absmax = lying[1]
        if state.state2 is not None:
            new.quant_state.state2 = copy.copy(state.state2)
            new.quant_state.state2.absmax = lying[2]
        new.quant_state.to(lying[0].device)  # its tables
    return new


class Unmoved:
    """Replaces a module's `_apply`, by which `Module.to` moves and converts: the parameter `name` stays in its slot. A
    copy of it elsewhere would never be filled again (accelerate moves models from "cpu" to "cpu:0")."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.others = module, name, module._apply

    def __call__(self, fn: Any, recurse: bool = True) -> nn.Module:
        before = self.module._parameters
        self.module._parameters = {name: p for name, p in before.items() if name != self.name}
        try:
            self.others(fn, recurse)
        finally:
            self.module._parameters = before | self.module._parameters  # in the order of before
        return self.module


def frozen_weights(lm: nn.Module, layers: Iterable[nn.Module]) -> list[Block]:
    """A block for each layer: its frozen matrices. Its norms and biases are small, and stay; so does every part of an
    adapter, and what another part of the model has, too (tied or shared weights)."""
    layers = list(layers)
    # Of each parameter, in how many layers it is, and once more if it is outside of them.
    owners = Counter(id(p) for layer in layers for p in set(layer.parameters()))
    in_layers = {module for layer in layers for module in layer.modules()}
    owners.update({id(p) for m in lm.modules() if m not in in_layers for p in m.parameters(recurse=False)})
    return [Block(list(_weights(layer, owners))) for layer in layers]


def _weights(layer: nn.Module, owners: Counter[int]) -> Iterator[Weight]:
    of_adapters = {id(p) for module in layer.modules() for p in _of_adapter(module)}
    weights: dict[int, Weight] = {}
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad or id(parameter) in of_adapters:
                continue
            if owners[id(parameter)] > 1 or parameter.ndim < 2 or not parameter.numel():
                continue
            weights.setdefault(id(parameter), Weight(parameter, [])).places.append((module, name))
    return iter(weights.values())


def _of_adapter(module: Any) -> Iterator[nn.Parameter]:
    if isinstance(module, BaseTunerLayer):
        for name in module.adapter_layer_names:
            part = getattr(module, name, None)
            if isinstance(part, (nn.Module, nn.ParameterDict)):
                yield from part.parameters()
    elif isinstance(module, ModulesToSaveWrapper):
        yield from module.modules_to_save.parameters()


class _Pages(mmap.mmap):
    """Whole pages of memory, given back to the operating system at once. Pinned ones are unpinned before."""

    pinned_at: int | None = None

    def __del__(self) -> None:
        if self.pinned_at is not None and not sys.is_finalizing():
            torch.cuda.synchronize()  # a copy may be under way
            torch.cuda.cudart().cudaHostUnregister(self.pinned_at)


def host_memory(size: int, pinned: bool) -> Tensor:
    """(size,) uint8 in host memory. Pinned, a GPU can copy it while it computes.

    PyTorch's own pinned memory is rounded up to a power of two, which for the layers of a large model is gigabytes.
    What `malloc` gives need not begin with a page, and no page can be pinned twice; nor does what is freed there
    always go back to the operating system. Where the system has huge pages, they are used: giving and pinning gigabytes
    in pages of 4 KiB takes seconds each. Processes that are forked, such as those of --dataloader-num-workers, do not
    get pinned pages: else one that is written to after a fork would be copied on write, and the GPU would go on reading
    the old one, which was pinned.

    Raises:
        UserError: the operating system gives or pins no more.
    """
    memory = torch.empty(0, dtype=torch.uint8, device="cpu")
    if not size or not has_values(memory):  # nothing, or only to be counted
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    try:
        pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_more(size) from error
    with suppress(AttributeError, OSError):  # a system that does not know them, or has none
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if pinned:
        with suppress(AttributeError):  # Linux alone knows it
            pages.madvise(mmap.MADV_DONTFORK)
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)) != 0:
            raise _no_more(size)
        pages.pinned_at = memory.data_ptr()
    return memory


def _no_more(size: int) -> UserError:
    return UserError(
        f"--stream-weights: the operating system gives or pins no more host memory ({gib(size)} were wanted): free "
        "some, raise the limit (`ulimit -l`), or give --quantized-cache and --stream-from cache."
    )
