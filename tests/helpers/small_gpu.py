"""A GPU that runs out of memory, simulated: passes of more than so many tokens fail as they do there."""

from __future__ import annotations

import torch


class SmallGPU:
    """Lets a pass of more than `most` tokens fail, in the last layer: its forward pass, or the backward pass of those
    that have one. Before pass number `first` there is more room."""

    def __init__(
        self, trainer, most: int, where: str = "forward", first: int = 0, error: RuntimeError | None = None
    ) -> None:
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")
        self.most, self.where, self.first = most, where, first
        self.passes: list[int] = []  # their tokens
        trainer.model.get_base_model().model.layers[-1].register_forward_hook(self._hook)

    def _hook(self, module, args, output):
        if not output.requires_grad:
            return output
        self.passes.append(output.shape[:-1].numel())
        fails = self.passes[-1] > self.most and len(self.passes) > self.first
        if fails and self.where == "forward":
            raise self.error
        return FailsBackward.apply(output) if fails else output


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")
