"""`--sam RHO`: the forget gradient is taken where the forget loss is worst nearby, not where the weights are.

    min over w of  max over |e| <= rho of L_forget(w + e)  +  the retain terms at w

Sharpness-aware minimisation (Foret et al. 2021: e = rho * g / |g| to first order, g being the gradient at w), of the
forget loss alone as Fan et al. 2025 have it, "Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware
Minimization Perspective". Forgetting that holds in all of a neighbourhood is undone less easily by a few steps of
fine-tuning.

It costs a second forward and backward pass of the forget rows, of which the reference runs once, and two copies of the
adapter's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Neighbour:
    """The point at the distance `rho` from the trained weights at which a loss is worst, to first order."""

    def __init__(self, model: nn.Module, rho: float) -> None:
        self.model, self.rho = model, rho
        self.is_summed = False  # whether all processes have waited for a gradient that is not yet made use of
        self._away: list[tuple[nn.Parameter, Tensor]] = []

    def find(self, add_gradients: Callable[[], bool]) -> None:
        """add_gradients: adds the loss's gradients, of all micro-batches and processes, to those of the weights, which
        are left as they were. Returns whether the processes have summed them, so that it cannot be repeated."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        self.is_summed = add_gradients()
        gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        norm = torch.stack([g.float().square().sum() for _, g in gradients]).sum().sqrt() if gradients else None
        # Where there is no slope, no direction is the worst.
        self._away = [] if norm is None else [(p, g * (self.rho / norm.clamp(min=1e-30))) for p, g in gradients]
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient
        self.is_summed = False

    @contextmanager
    def there(self) -> Iterator[None]:
        """Inside, the weights are the neighbour's; afterwards their own, to the bit."""
        own = [p.detach().clone() for p, _ in self._away]
        with torch.no_grad():
            for p, away in self._away:
                p.add_(away)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), weight in zip(self._away, own, strict=True):
                    p.copy_(weight)
