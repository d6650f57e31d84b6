"""Modules that are trained whole beside the adapter (PEFT's modules_to_save), and their originals."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lowmem_npo.errors import UserError

COLLECTIONS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def check_saved_modules(model: PreTrainedModel, names: Collection[str], quantized: bool = False) -> None:
    """Raises UserError for a name in `names` that matches no module (PEFT compares the ends of full names), or one that
    cannot be trained: the output head, what shares its weights, and layers that are in 4 bits.

    quantized: linear layers will be.
    """
    head: Any = model.get_output_embeddings()
    frozen = {id(parameter) for parameter in head.parameters()}
    for name in names:
        matches = [module for full, module in model.named_modules() if full.endswith(name)]
        if not matches:
            raise UserError(f"--modules-to-save {name} matches no module of this {type(model).__name__}.")
        if any(isinstance(module, COLLECTIONS) for module in matches):
            raise UserError(f"--modules-to-save {name} is a list of modules, not one: name what is in it.")
        parts = [part for module in matches for part in module.modules()]
        parameters = [parameter for module in matches for parameter in module.parameters()]
        if any(part is head for part in parts):
            raise UserError(
                f"--modules-to-save {name}: the output head is in it, which must stay frozen for the fused losses."
            )
        if any(id(parameter) in frozen for parameter in parameters):
            raise UserError(
                f"--modules-to-save {name}: this {type(model).__name__} shares its input embedding with the output "
                "head, which must stay frozen for the fused losses."
            )
        linear = quantized and any(isinstance(part, nn.Linear) for part in parts)
        if linear or in_four_bits(model, [name]):
            raise UserError(
                f"--modules-to-save {name}: its layers are held in 4 bits, which cannot be trained; leave it out, or "
                "--qlora."
            )


def in_four_bits(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Those of `names` that match modules whose weights are held quantised."""
    return [
        name
        for name in names
        if not all(
            parameter.is_floating_point()
            for full, module in model.named_modules()
            if full.endswith(name)
            for parameter in module.parameters()
        )
    ]


def train_in_float32(adapted: PeftModel) -> None:
    """Holds the trained copies in float32, as the adapter is; they compute in the type of their originals."""
    wrapper: Any
    for wrapper in [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]:
        dtype = next((p.dtype for p in wrapper.original_module.parameters()), torch.float32)
        for copy in wrapper.modules_to_save.values():
            copy.float()
        if dtype != torch.float32:
            wrapper.forward = RoundedForward(wrapper, dtype)


class RoundedForward:
    """Replaces a wrapper's `forward`: the float32 weights of its trained copy are rounded to `dtype` in each pass, so
    that the copy computes as its original does."""

    def __init__(self, wrapper: ModulesToSaveWrapper, dtype: torch.dtype) -> None:
        self.wrapper, self.forward, self.dtype = wrapper, wrapper.forward, dtype

    def __call__(self, *args: Any, **options: Any) -> Any:
        wrapper: Any = self.wrapper
        names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
        if wrapper.disable_adapters or not names:
            return self.forward(*args, **options)
        copy = wrapper.modules_to_save[names[0]]
        rounded = {name: parameter.to(self.dtype) for name, parameter in copy.named_parameters()}
        return functional_call(copy, rounded, args, options)
