"""Activation checkpointing: a layer's activations are recomputed in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from transformers import PreTrainedModel

from lowmem_npo.errors import UserError
from lowmem_npo.memory.offload import CheckpointOffload


def enable_checkpointing(model: PreTrainedModel, offload: bool = False) -> None:
    """Checkpoints every decoder layer, non-reentrant: works with frozen inputs, keeps autocast, allows no_grad.

    Transformers also makes the embedding's output require grad, which only reentrant checkpointing needs; this is
    undone, so that no gradient is computed below the lowest adapter.

    Args:
        offload: keep the layers' inputs in host memory until the backward pass (`CheckpointOffload`).
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot recompute its layers: use --no-gradient-checkpointing.")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
    if offload:
        checkpoint = CheckpointOffload().checkpoint
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                vars(module)["_gradient_checkpointing_func"] = checkpoint
