"""Tiles of MLPs and norms that are not as in Llama; tests/test_architectures.py runs those of every architecture."""

from __future__ import annotations

import torch
from helpers.tiny_models import tiny_model
from torch import nn

from lowmem_npo.memory import float32, tiling


class WritesToItsInput(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mul_(2)).view(*x.shape[:-1], -1)


def test_an_mlp_that_writes_to_its_input_and_to_whose_output_is_added_in_place():
    torch.manual_seed(0)
    mlp = WritesToItsInput(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(2, 6, 4, requires_grad=True)
    gradients = []
    for tiled in (False, True):
        if tiled:
            tiling.tile(mlp, 5)
        (mlp(x * 1).add_(x)).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in mlp.parameters())])
        x.grad = None
        mlp.zero_grad()
    torch.testing.assert_close(*gradients)


class NormOfHeads(nn.Module):
    """As in xLSTM: one weight per column of all heads together."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x, scale=1.0):
        return (x / x.norm(dim=-1, keepdim=True)).reshape(*x.shape[:-2], 8) * self.weight * scale


def test_a_norm_called_otherwise_than_on_rows_runs_as_it_is():
    model = tiny_model("llama")
    heads, plain = NormOfHeads(), NormOfHeads()
    plain.load_state_dict(heads.state_dict())
    model.model.layers[0].heads = heads
    x = torch.randn(2, 20, 2, 4)
    float32.slice_float32(model, rows=7)
    torch.testing.assert_close(heads(x, scale=3.0), plain(x, scale=3.0))
    torch.testing.assert_close(heads(x), plain(x))
