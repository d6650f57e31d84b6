"""The decoder's layers, wherever an architecture keeps them."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lowmem_npo.errors import UserError


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The list of transformer layers, lowest first.

    Raises:
        UserError: no list of as many layers as the configuration names.
    """
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    count = lm.config.get_text_config().num_hidden_layers
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"The decoder layers of {type(lm).__name__} were not found ({count} in its configuration).")
