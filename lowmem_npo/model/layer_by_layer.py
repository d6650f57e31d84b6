"""Loading a model layer by layer: what is to be done with a decoder layer is done as soon as all of it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn
from transformers import PreTrainedModel, core_model_loading

from lowmem_npo.model.layers import decoder_layers

LayerLoaded = Callable[[PreTrainedModel, nn.Module], None]
"""Called with the model, of which the layers that follow have no data yet, and a layer. It may move the layer's weights
elsewhere, but must leave the parameters in place."""


@contextmanager
def layer_by_layer(loaded: LayerLoaded) -> Iterator[None]:
    """Inside, `from_pretrained` calls `loaded` once for each decoder layer whose weights are all in the checkpoint.

    transformers sets one parameter after the other, in the order of their names; a layer is complete when it has none
    left without data. One that shares weights with another layer gets them at the end, and is left out.
    """
    set_one = core_model_loading.set_param_for_module
    done, layers = set[int](), set[int]()

    def watched(model: PreTrainedModel, target_name: str, *args: Any, **kwargs: Any) -> Any:
        result = set_one(model, target_name, *args, **kwargs)
        if not layers:
            layers.update(map(id, decoder_layers(model)))
        layer = _layer_of(model, target_name, layers)
        if layer is not None and id(layer) not in done and not any(p.is_meta for p in layer.parameters()):
            done.add(id(layer))
            loaded(model, layer.requires_grad_(False))
        return result

    with mock.patch.object(core_model_loading, "set_param_for_module", watched):
        yield


def _layer_of(model: PreTrainedModel, parameter: str, layers: set[int]) -> nn.Module | None:
    """The one of the decoder layers, given by their ids, that `parameter` is in, if it is in one."""
    module: nn.Module = model
    for name in parameter.split(".")[:-1]:
        module = getattr(module, name)
        if id(module) in layers:
            return module
    return None
