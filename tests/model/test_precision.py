"""The number type in which the model computes."""

import torch
from helpers.tiny_models import tiny_model

from lowmem_npo.model import compute_autocast


def test_compute_autocast_follows_the_model():
    with compute_autocast(tiny_model()):
        assert not torch.is_autocast_enabled("cpu")
    with compute_autocast(tiny_model(dtype=torch.bfloat16)):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
