"""Giving memory back that nothing uses any more."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Frees what only refers to itself by now, and gives back what the allocator keeps. To be called once a model is
    dropped, before another one is loaded: 4-bit weights and their layers, and layers whose forward a memory switch has
    replaced, are cycles, and Python does not collect those because a GPU is full. Not in an `except` clause: the
    error's traceback holds what it went through."""
    gc.collect()
    torch.cuda.empty_cache()
