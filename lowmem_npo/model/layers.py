"""The parts of a model, wherever PEFT or its architecture keeps them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lowmem_npo.endings import tried
from lowmem_npo.errors import UserError

# Layers of this name, in models of these types, get no adapter from PEFT: fused kernels read their weights.
REFUSED_BY_PEFT = {kind: "out_proj" for kind in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")}


PEFT_PREFIX = "base_model.model."  # of all names in a model that PEFT has put an adapter on


def adapted_layer(weight: str) -> str:
    """What the base calls the layer to which this weight of an adapter belongs."""
    return weight.removeprefix(PEFT_PREFIX).partition(".lora_")[0]


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def decoder(lm: PreTrainedModel) -> PreTrainedModel:
    """The model without its head. `base_model` is the model itself where a text model is named as a part of a larger
    one (Llama 4)."""
    return cast(PreTrainedModel, lm.base_model if lm.base_model is not lm else lm.model)


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The list of transformer layers, lowest first.

    Raises:
        UserError: there is no such list, or another beside it.
    """
    lm = causal_lm(model)
    count = lm.config.get_text_config().num_hidden_layers
    lists = [module for module in _outer_lists(decoder(lm)) if len(module)]
    of_layers = [m for m in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in m)]
    counted = (module for module in lists if len(module) == count)
    layers = next(counted, next(iter(of_layers), None))  # LongCat's hold two of what its configuration counts
    if layers is None:
        raise UserError(f"The decoder layers of {type(lm).__name__} were not found ({count} in its configuration).")
    if any(module is not layers for module in of_layers):
        raise UserError(
            f"The decoder layers of {type(lm).__name__} are in {len(of_layers)} stacks: only models with one are "
            "supported."
        )
    return layers


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of modules in `module` that are not a part of another, outermost first."""
    parts = [module]
    for part in parts:
        for child in part.children():
            if isinstance(child, nn.ModuleList):
                yield child
            else:
                parts.append(child)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> linear layer that can have an adapter, whether or not it has one already.

    Not the head, which is frozen; not a layer derived from `nn.Linear` that computes something else (routers of Llama 4
    and PhiMoE); none that is read instead of run, nor one that PEFT refuses. Of these, PEFT takes the names of some for
    a mixture's experts (`taken_for_experts`).
    """
    head, read = model.get_output_embeddings(), set(read_as_weights(model))
    refused = REFUSED_BY_PEFT.get(model.config.model_type)
    return {
        name: module
        for name, module in _linears(model)
        if module is not head and name not in read and name.rpartition(".")[2] != refused and _is_affine(module)
    }


def all_linear(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Those of `linear_layers` to which PEFT gives an adapter if they are its targets."""
    layers = linear_layers(model)
    taken = taken_for_experts(model, layers)
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] not in taken}


def taken_for_experts(model: PreTrainedModel, layers: Iterable[str]) -> set[str]:
    """The last parts of the names of those of `layers` that PEFT takes to mean a mixture's experts, which before
    transformers 5 were layers of such names: as targets they are all of the experts, while the dense MLPs and shared
    experts of a DeepSeek-V3, which are called so as well, get no adapter."""

    def is_taken(name: str) -> bool:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it takes both halves of a fused weight, or none
            return True
        return name not in (config.target_modules or ())

    return {name for name in {layer.rpartition(".")[2] for layer in layers} if is_taken(name)}


def read_as_weights(model: nn.Module) -> list[str]:
    """The names of linear layers whose module multiplies with their weight itself (Mamba's `dt_proj`): they must not be
    quantised, and an adapter on them would have no effect."""
    modules, names = dict(model.named_modules()), []
    for name, _ in _linears(model):
        parent, _, child = name.rpartition(".")
        kind: Any = type(modules[parent])
        source = _source(kind)
        if re.search(rf"self\.{child}\.weight @|linear\([^\n]*self\.{child}\.weight", source):
            names.append(name)
    return names


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers as the architecture has them; an adapter's own belong to it."""
    adapted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{layer}.") for layer in adapted[-1:]):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted.append(name)
            base = module.get_base_layer()
            if isinstance(base, (nn.Linear, Conv1D)):
                yield name, module
        elif isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def _is_affine(layer: Any) -> bool:
    """Whether it returns what `nn.Linear` would; an architecture's own class is tried."""
    if not type(layer).__module__.startswith("transformers.models."):
        return True
    inputs = torch.empty(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    with tried(RuntimeError, ValueError, IndexError), torch.no_grad():
        result = layer(inputs)
        return isinstance(result, Tensor) and result.shape == (1, layer.out_features)
    return False


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
