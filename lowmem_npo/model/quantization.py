"""Four-bit weights: the recipe of QLoRA (Dettmers et al. 2023), and checkpoints that are stored so already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.base import HfQuantizer

from lowmem_npo.errors import UserError
from lowmem_npo.model.layers import read_as_weights


def nf4(dtype: torch.dtype, double_quant: bool = True) -> BitsAndBytesConfig:
    """NF4 weights, with `double_quant` of scales that are quantised in turn, dequantised to `dtype` to compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def stored_quantization(architecture: PretrainedConfig) -> BitsAndBytesConfig | None:
    """How the checkpoint itself is quantised, if it is.

    Raises:
        UserError: in a way that cannot be trained on here.
    """
    holders = (architecture, architecture.get_text_config())
    stored = next((found for holder in holders if (found := getattr(holder, "quantization_config", None))), None)
    if stored is None:
        return None
    settings = dict(stored if isinstance(stored, dict) else stored.to_dict())
    if settings.get("load_in_4bit"):
        return BitsAndBytesConfig.from_dict(settings)
    method = str(settings.get("quant_method", "8 bits"))
    raise UserError(
        f"The weights of '{architecture.name_or_path}' are stored quantised ({method.lower()}), and cannot be trained "
        "on here: give the model that they were made from, with --qlora."
    )


@contextmanager
def one_at_a_time(is_wanted: bool = True) -> Iterator[list[str]]:
    """Inside, transformers reads each tensor when its turn comes, and does not convert many of them ahead, if that
    `is_wanted`. Yields the names of damaged ones, of which it sees none."""
    with mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"} if is_wanted else {}):
        yield []


@contextmanager
def quantising(on: torch.device | None = None) -> Iterator[list[str]]:
    """Inside, transformers builds and loads models so that all their linear layers are quantised, one at a time. Yields
    the names of those that held NaN or infinity: of 4 bits each is some number.

    on: the device that quantises them, if they are loaded into host memory, where it would take hours. They stay there
    until whoever is called with their layer moves them, or `to_host`.

    It replaces `nn.Linear` only: Falcon's own class, which computes the same, would stay as it is. It replaces layers
    whose weight the model multiplies itself, which 4-bit weights cannot be. Of weights that are stored quantised,
    transformers would read ahead.
    """
    left_as_they_are, quantise = HfQuantizer.get_modules_to_not_convert, Bnb4bitQuantize.convert
    damaged: list[str] = []

    def left(model: PreTrainedModel, *args: Any, **kwargs: Any) -> list[str]:
        return [*left_as_they_are(model, *args, **kwargs), *read_as_weights(model)]

    def checked(self: Bnb4bitQuantize, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if weight.is_meta:
                continue
            if on is not None:
                weight = input_dict[name] = weight.to(on)
            if not is_finite(weight):
                damaged.append(name)
        return quantise(self, input_dict, *args, **kwargs)

    with (
        mock.patch.object(Bnb4bitQuantize, "convert", checked),
        mock.patch.object(HfQuantizer, "get_modules_to_not_convert", staticmethod(left)),
        mock.patch("transformers.models.falcon.modeling_falcon.FalconLinear", nn.Linear),
        mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
    ):
        yield damaged


def to_host(model: nn.Module) -> None:
    """Brings what is left of 4-bit weights on the device that has quantised them into host memory."""
    weight: Any
    for weight in model.parameters():
        if isinstance(weight, bnb.nn.Params4bit):
            weight.data = weight.data.cpu()
            weight.quant_state.to(weight.device)


def is_finite(weight: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity, as an empty one does. Its least and its largest number show it:
    without a copy, unless they have 8 bits, and, of bf16 on a CPU, in a fortieth of the time that a sum takes."""
    if not weight.numel():
        return True
    if weight.is_floating_point() and weight.itemsize == 1:  # PyTorch does not compare those; bf16 holds each of them
        weight = weight.to(torch.bfloat16)
    return bool(torch.stack(weight.detach().aminmax()).isfinite().all())


def statistics(weight: Any) -> list[Tensor]:
    """The scales of a 4-bit weight, which are of no finite numbers if it is damaged; none of another one."""
    state = getattr(weight, "quant_state", None)
    parts = [] if state is None else [state.absmax, state.offset, getattr(state.state2, "absmax", None)]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
