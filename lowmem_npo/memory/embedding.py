"""The input embedding in host memory: a batch needs only a few hundred of its tens of thousands of rows."""

from __future__ import annotations

from typing import Any, cast

import torch
from lowmem_kernels.dispatch import has_values
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_npo.errors import UserError
from lowmem_npo.memory.streaming.in_files import MappedFiles


def embedding_to_host(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """Moves the input embedding to host memory; the rows a batch needs are copied to the device that uses them. An
    adapter on it stays on the device.

    Args:
        device: the model's, if it is not there yet.

    Raises:
        UserError: the embedding is tied to the output head, which must stay on the device, or is itself trained.
    """
    embedding, head = cast(nn.Embedding, model.get_input_embeddings()), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise UserError(
            f"--embedding-on-cpu: {type(model).__name__} shares its input embedding with the output head, which must "
            "stay on the GPU: leave the option out."
        )
    layer: Any = embedding
    frozen: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if any(parameter.requires_grad for parameter in frozen.parameters()):
        raise UserError("--embedding-on-cpu keeps a frozen embedding, but this one is trained: leave the option out.")
    if frozen is layer:
        model.set_input_embeddings(HostEmbedding(frozen, device))
    else:
        layer.base_layer = HostEmbedding(frozen, device)


class HostEmbedding(nn.Module):
    """`embedding`, kept on the host, as a module of the device it came from.

    It lies in memory, and is not left in a mapped file. It is not a submodule, nor its weight a parameter, of this
    module: `model.to(device)` leaves it where it is, and `model.device` does not see it.
    """

    embedding: nn.Embedding

    def __init__(self, embedding: nn.Embedding, device: torch.device | None = None) -> None:
        super().__init__()
        self.device = device or embedding.weight.device
        vars(self)["embedding"] = embedding if embedding.weight.is_meta else embedding.to("cpu")
        if has_values(embedding.weight) and embedding.weight in MappedFiles():
            embedding.weight.data = embedding.weight.detach().clone()

    def __getattr__(self, name: str) -> Any:
        """Its weight and settings, which adapters and transformers look at, are the embedding's."""
        return getattr(vars(self)["embedding"], name)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, d) on the device of `input_ids`."""
        rows = self.embedding(input_ids.cpu())
        if input_ids.is_cuda and torch.cuda.is_initialized():  # pinned, so that the copy does not hold up the CPU
            rows = rows.pin_memory()
        return rows.to(input_ids.device, non_blocking=True)
