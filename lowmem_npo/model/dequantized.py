"""A base model's weights as a QLoRA run computed with them: quantised to NF4 and dequantised, a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lowmem_npo.errors import UserError
from lowmem_npo.model.checkpoint import Checkpoint
from lowmem_npo.model.quantization import is_finite, nf4, quantising


@dataclass(frozen=True)
class DequantizedBase:
    """The tensors of a checkpoint as `load_model` with `qlora` would compute with them: those that it holds in 4 bits
    are rounded to NF4, the others come as they are.

    recipe: how they are quantised. rounded: names of the tensors; True for those that are stored transposed.
    """

    recipe: BitsAndBytesConfig
    rounded: Mapping[str, bool]

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype, double_quant: bool = True) -> DequantizedBase:
        """dtype: in which the weights were quantised, and are dequantised: the run's own, as `double_quant` is.

        Raises UserError for a layer that the checkpoint stores in parts.
        """
        architecture, recipe = checkpoint.configuration(), nf4(dtype, double_quant)
        with torch.device("meta"), quantising():
            whole = AutoModelForCausalLM.from_config(architecture)
            model: Any = AutoModelForCausalLM.from_config(architecture)
            AutoHfQuantizer.from_config(recipe, pre_quantized=False).preprocess_model(model=model, device_map=None)
        rounded = {}
        for name, layer in model.named_modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                kind: Any = layer.source_cls
                parameter = f"{name}.weight"
                tensor = checkpoint.name_of(parameter) or _renamed(whole, parameter, checkpoint)
                rounded[tensor] = issubclass(kind, Conv1D)
        return cls(recipe, rounded)

    def __call__(self, name: str, stored: Tensor) -> Tensor:
        """The tensor `name`, which is `stored` so, as the run computed with it."""
        if name not in self.rounded or not is_finite(stored):  # 4 bits would make a number of what is none
            return stored
        weight = stored.T if self.rounded[name] else stored
        packed, state = quantize_4bit(
            weight.to(self.recipe.bnb_4bit_compute_dtype).contiguous(),
            compress_statistics=self.recipe.bnb_4bit_use_double_quant,
            quant_type=self.recipe.bnb_4bit_quant_type,
        )
        dequantized = dequantize_4bit(packed, state)
        return dequantized.T if self.rounded[name] else dequantized


def _renamed(model: Any, parameter: str, checkpoint: Checkpoint) -> str:
    """The tensor that `parameter` is stored as under another name."""
    parts = revert_weight_conversion(model, {parameter: model.get_parameter(parameter)})
    names = [checkpoint.name_of(part) for part in parts]
    if len(names) != 1 or names[0] is None:
        raise UserError(
            f"--base-weights dequantized: the base stores {parameter} in parts, which QLoRA quantises as a whole; "
            "merge into the whole weights."
        )
    return names[0]
