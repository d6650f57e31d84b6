"""The input embedding in host memory: a batch needs only a few hundred of its tens of thousands of rows."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_npo.errors import UserError


def embedding_to_host(model: PreTrainedModel) -> None:
    """Moves the input embedding to host memory; the rows a batch needs are copied to the device that uses them.

    Raises:
        UserError: the embedding is tied to the output head, which must stay on the device.
    """
    embedding, head = cast(nn.Embedding, model.get_input_embeddings()), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise UserError(
            f"--embedding-on-cpu: {type(model).__name__} shares its input embedding with the output head, which must "
            "stay on the GPU: leave the option out."
        )
    model.set_input_embeddings(HostEmbedding(embedding))


class HostEmbedding(nn.Module):
    """`embedding`, kept on the host, as a module of the device it came from.

    The embedding is not a submodule, nor its weight a parameter, of this module: `model.to(device)` leaves it where it
    is, and `model.device` does not see it.
    """

    embedding: nn.Embedding

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.device = embedding.weight.device
        vars(self)["embedding"] = embedding.to("cpu")

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, d) on the device of `input_ids`."""
        rows = self.embedding(input_ids.cpu())
        if input_ids.is_cuda and torch.cuda.is_initialized():  # pinned, so that the copy does not hold up the CPU
            rows = rows.pin_memory()
        return rows.to(input_ids.device, non_blocking=True)
