"""The parts of a model, wherever PEFT or its architecture keeps them."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lowmem_npo.errors import UserError


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
        UserError: there is no list of as many layers as the configuration names.
    """
    lm = causal_lm(model)
    count = lm.config.get_text_config().num_hidden_layers
    for module in decoder(lm).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"The decoder layers of {type(lm).__name__} were not found ({count} in its configuration).")
