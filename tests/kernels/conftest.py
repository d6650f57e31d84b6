"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are first imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["torch"])
def engine(request) -> str:
    """Every engine in turn."""
    return request.param
