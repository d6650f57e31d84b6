"""The switches of `MemoryConfig` that change how a model computes, in the order in which they build on each other."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lowmem_npo.config import MemoryConfig, ModelConfig, StreamOptions
from lowmem_npo.console import Say
from lowmem_npo.memory.adapted_linear import join_adapters
from lowmem_npo.memory.checkpointing import enable_checkpointing
from lowmem_npo.memory.embedding import embedding_to_host
from lowmem_npo.memory.float32 import slice_float32
from lowmem_npo.memory.streaming import into_blocks, move_the_rest, stream_weights
from lowmem_npo.memory.tiling import tile_mlps
from lowmem_npo.model import load_model
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.loading import resolve_device


def load_base(model: ModelConfig, memory: StreamOptions, say: Say) -> PreTrainedModel:
    """The model where its weights will be used, or from where `apply_switches` or `stream_layers` will have them
    streamed.

    Raises:
        UserError: as for `load_model`.
    """
    if not memory.stream_weights:
        return load_model(model, say)
    in_file, layer_loaded = memory.stream_from == "cache", into_blocks(resolve_device(model.device))
    return load_model(model, say, on_host=True, layer_loaded=layer_loaded, in_file=in_file)


def stream_layers(model: PreTrainedModel | PeftModel, config: StreamOptions, device: torch.device) -> None:
    """Brings a model that is only asked, not trained, to `device`, its layers streamed as `config` says; does nothing
    if it does not say so.

    Raises:
        UserError: as for `stream_weights`.
    """
    if config.stream_weights:
        stream_weights(model, device, in_file=config.stream_from == "cache")
        move_the_rest(causal_lm(model), device)


def apply_switches(model: PeftModel, config: MemoryConfig, device: torch.device | None = None) -> None:
    """Makes the model inside `model` compute as `config` says; loss and gradients stay the same up to rounding.

    Args:
        device: where it computes, if that is not where it is: streamed weights are loaded into host memory.

    Raises:
        UserError: a switch does not fit this architecture; the message names it.
    """
    lm = causal_lm(model)
    device = device or lm.device
    join_adapters(lm)
    if config.stream_weights:
        stream_weights(model, device, in_file=config.stream_from == "cache")
    if config.embedding_on_cpu:
        embedding_to_host(lm, device)
    if config.stream_weights:
        move_the_rest(lm, device)
    if config.sliced_float32:  # before the MLPs, whose tiles run what is inside them and the norms that follow
        slice_float32(lm)
    if config.tile_mlp is not None:
        tile_mlps(lm, config.tile_mlp)
    if config.recomputes_layers:
        enable_checkpointing(lm, offload=config.offload_checkpoints)
