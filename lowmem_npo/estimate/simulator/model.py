"""A model from its configuration alone, on the fake GPU: the layers and storages of a loaded one, without data."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import name2qmap, quantize_4bit
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from lowmem_npo.config import ModelConfig
from lowmem_npo.estimate.simulator.gpu import GPU
from lowmem_npo.model.loading import DTYPES, attention_of, quantization_of
from lowmem_npo.model.quantization import quantising


def fake_model(architecture: PretrainedConfig, config: ModelConfig, on_host: bool = False) -> PreTrainedModel:
    """The counterpart of `load_model`. Call it inside `fake_gpu()`.

    A 4-bit layer is bitsandbytes' own, and its weight comes from bitsandbytes' own quantisation; only the class
    `Params4bit`, which cannot hold a fake tensor, is replaced by a plain parameter with the same attributes.
    """
    dtype, attention = DTYPES[config.dtype], attention_of(architecture, config.attn)
    architecture = copy.deepcopy(architecture)  # the quantiser writes its recipe into it
    quantization = quantization_of(architecture, config)
    with _disable_current_modes(), torch.device("meta"), quantising() if quantization else nullcontext():
        model = AutoModelForCausalLM.from_config(architecture, attn_implementation=attention, dtype=dtype)
        if quantization:
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
            quantizer.preprocess_model(model=model, device_map=None)
            quantizer.postprocess_model(model)
            model.hf_quantizer = quantizer
    with (
        mock.patch.dict(name2qmap, {"dynamic": torch.empty(256, device=GPU)}),  # a table that all layers share
        mock.patch.object(
            bnb.functional, "get_4bit_type", lambda *_, **__: torch.empty(16, device=GPU)
        ),  # one per layer
    ):
        _give_storages(model, dtype, torch.device("cpu") if on_host else GPU)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _give_storages(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
                    made[id(parameter)] = _nf4(module, dtype, device)
                else:
                    made[id(parameter)] = nn.Parameter(_empty(parameter, device), requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _empty(buffer, device)


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _nf4(layer: bnb.nn.Linear4bit, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Quantised on the GPU, wherever it is then held; only the tables, which are small, stay there."""
    old: Any = layer.weight  # Params4bit
    dense = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=GPU)
    packed, layer.quant_state = quantize_4bit(
        dense, compress_statistics=old.compress_statistics, quant_type=old.quant_type, quant_storage=old.quant_storage
    )
    state = layer.quant_state
    state.absmax = state.absmax.to(device)
    if state.state2 is not None:
        state.state2.absmax = state.state2.absmax.to(device)
    weight: Any = nn.Parameter(packed.to(device), requires_grad=False)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        setattr(weight, name, getattr(old, name))
    weight.quant_state, weight.bnb_quantized, weight.module = layer.quant_state, True, layer
    return weight
