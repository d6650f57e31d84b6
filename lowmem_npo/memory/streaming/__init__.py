"""Frozen weights streamed from host memory: the device holds two decoder layers at a time, whatever the model's depth.

The frozen weights are only read. They stay in pinned host memory, each layer's in one contiguous block, and are copied
on a side stream into one of two slots while the layer before computes; nothing is ever copied back. Adapters, norms,
embedding and head stay on the device, and so does what layers share. A host with too little memory reads the layers
from the cache of quantised weights instead, one after the other, into two pinned buffers.

Why not an existing implementation: accelerate's offloading hooks copy tensor by tensor, on the compute stream, and know
nothing of a backward pass through frozen weights; DeepSpeed's ZeRO-3 and FSDP own the training loop, and gather weights
that all ranks train; transformers' and diffusers' group offloading is for inference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from lowmem_kernels.dispatch import has_values
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lowmem_npo.errors import UserError
from lowmem_npo.memory.forwards import replacement
from lowmem_npo.memory.streaming import bus
from lowmem_npo.memory.streaming.blocks import frozen_weights, host_memory
from lowmem_npo.memory.streaming.in_files import FileBlock, MappedFiles
from lowmem_npo.memory.streaming.stream import WeightStream
from lowmem_npo.model.layer_by_layer import LayerLoaded
from lowmem_npo.model.layers import causal_lm, decoder_layers

BLOCK = "_block"  # attribute of a layer: the memory in which its weights lie, until they are streamed
ON_CPU = False  # whether weights may be streamed to a CPU, which is for tests: it has them in its memory anyway


def can_stream_to(device: torch.device) -> bool:
    return device.type == "cuda" or ON_CPU


def check_device(device: torch.device) -> None:
    """Raises UserError where there is no GPU to stream to."""
    if not can_stream_to(device):
        raise UserError("--stream-weights copies weights to a GPU, and this run computes on the CPU: leave it out.")


def into_blocks(device: torch.device) -> LayerLoaded:
    """For `load_model`: each layer's frozen weights go into the block from which they will be copied to `device` as
    soon as they are loaded, so that the host holds the blocks and at most one layer besides."""

    def loaded(lm: PreTrainedModel, layer: nn.Module) -> None:
        (block,) = frozen_weights(lm, [layer])
        vars(layer)[BLOCK] = memory = host_memory(block.size, pinned=device.type == "cuda")
        block.move_into(memory)

    return loaded


def stream_weights(model: PreTrainedModel | PeftModel, device: torch.device, in_file: bool = False) -> None:
    """Keeps the frozen weights of the decoder layers in host memory, from which they visit `device`. All else
    stays where it is (`move_the_rest`). A streamed parameter holds its values only while its layer computes
    (`present`).

    Args:
        in_file: the weights stay in the files that they are mapped from, and are read whenever they are needed.

    Raises:
        UserError: the layers have no weights of their own, the host's memory cannot be pinned, or the files are gone.
    """
    lm = causal_lm(model)
    layers = decoder_layers(lm)
    blocks = frozen_weights(lm, layers)
    if not any(block.size for block in blocks):
        raise UserError(f"--stream-weights: the layers of {type(lm).__name__} have no frozen weights of their own.")
    head = lm.get_output_embeddings().weight
    if head.is_meta:
        return  # it was only to be seen whether the switch fits
    simulated = not has_values(head)
    pinned = device.type == "cuda" and not simulated
    sizes = [max((block.size for block in blocks[place::2]), default=0) for place in (0, 1)]
    way, memory = bus.bus_to(device, simulated), list[Any]()
    if in_file and not simulated:  # a simulation counts the blocks, and says what is left of them
        files = MappedFiles()
        memory = [FileBlock(block, files) for block in blocks]
        way = bus.StagedBus(way, (host_memory(max(sizes), pinned), host_memory(max(sizes), pinned)))
    else:
        for layer, block in zip(layers, blocks, strict=True):
            there = vars(layer).pop(BLOCK, None)
            if there is None or not block.lies_in(there):
                block.move_into(there := host_memory(block.size, pinned))
            memory.append(there)
    slots = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    stream = WeightStream(memory, slots, way)
    streamed = set()
    for index, (layer, block) in enumerate(zip(layers, blocks, strict=True)):
        parameter: Any
        for parameter in block.replace_in(slots[index % 2]):
            parameter.present = partial(stream.visit, index)
            streamed.add(id(parameter))
        layer.forward = StreamedForward(layer.forward, stream, index)
    own: Any = model  # DDP must not make one process's slots those of another
    own._ddp_params_and_buffers_to_ignore = [name for name, p in model.named_parameters() if id(p) in streamed]


def move_the_rest(lm: PreTrainedModel, device: torch.device) -> None:
    """Brings to `device` what is not streamed: adapters, norms, embeddings, the head, tables."""
    if not lm.get_output_embeddings().weight.is_meta:
        nn.Module.to(lm, device)
        vars(lm)["hf_device_map"] = {"": device}  # where accelerate looks before 4-bit training


def weight_stream(model: PreTrainedModel | PeftModel) -> WeightStream | None:
    """What streams the weights of `model`, if they are."""
    forwards = (replacement(layer, StreamedForward) for layer in decoder_layers(model))
    return next((forward.stream for forward in forwards if forward is not None), None)


def is_streamed(parameter: Tensor) -> bool:
    """Whether `parameter` lies in a slot."""
    return hasattr(parameter, "present")


def present(parameter: Tensor) -> Tensor:
    """`parameter`, with its values: for whoever reads a weight outside of its layer's computation. They stay until
    another layer is visited."""
    if is_streamed(parameter):
        cast(Any, parameter).present()
    return parameter


class StreamedForward:
    """Replaces a layer's `forward`: the layer's weights are there when it computes, and again when the gradient of its
    result arrives."""

    def __init__(self, forward: Callable[..., Any], stream: WeightStream, layer: int) -> None:
        self.forward, self.stream, self.layer = forward, stream, layer
        self.__signature__ = inspect.signature(forward)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.stream.visit(self.layer)
        result = self.forward(*args, **options)
        if torch.is_grad_enabled():
            for part in tree_leaves(result):
                if isinstance(part, Tensor) and part.requires_grad:
                    part.register_hook(self._gradient_arrives)
        return result

    def _gradient_arrives(self, gradient: Tensor) -> None:
        self.stream.visit(self.layer)
