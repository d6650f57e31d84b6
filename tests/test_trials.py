"""What is tried of a model: memory that runs out meanwhile says nothing about it, and nothing is remembered of that."""

from __future__ import annotations

from itertools import count
from pkgutil import resolve_name

import pytest
import torch
from helpers.tiny_models import CONFIGS, tiny_model
from torch import nn

from lowmem_npo.config import AdapterConfig
from lowmem_npo.data.fit import known_fit
from lowmem_npo.endings import tried
from lowmem_npo.memory import fused, fused_rotary
from lowmem_npo.memory.lock_step import LockStep
from lowmem_npo.memory.prefix import SharedPrefix
from lowmem_npo.model import attach_lora, layers, packs_rows
from lowmem_npo.model.packable import LENGTHS
from lowmem_npo.model.trial import trial_model

OF_MACHINE = [torch.OutOfMemoryError("CUDA"), RuntimeError("CUDA driver error: out of memory"), MemoryError()]
if hasattr(torch, "AcceleratorError"):
    OF_MACHINE.append(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


class Affine(nn.Linear):
    __module__ = "transformers.models.made"


class Double(nn.Module):
    """An activation of several operators."""

    def forward(self, x):
        return x * torch.sigmoid(x)


def rotated(q, k, cos, sin):
    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    return turned(q), turned(k)


def rotary():
    x, table = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
    return fused_rotary.rotary_form(rotated, [x, x], table, table)


def upper():
    return attach_lora(tiny_model("llama"), AdapterConfig(lora_r=2, lora_layers=("1",)))


# name -> what is called in the trial, its first call there that fails, and the trial, which succeeds otherwise
TRIALS = {
    "packed rows": ("lowmem_npo.model.packable._states", len(LENGTHS), lambda: packs_rows(tiny_model("llama"))),
    "a small copy": ("lowmem_npo.model.trial._random_model", 0, lambda: trial_model(CONFIGS["llama"](97))),
    "a shared prefix": ("lowmem_npo.memory.prefix.answer_hidden", 1, lambda: SharedPrefix(upper()).modules),
    "lock-step": (
        "lowmem_npo.memory.lock_step.answer_hidden", 2,
        lambda: LockStep.where_it_fits(model := upper(), SharedPrefix(model)),
    ),
    "a linear layer": ("torch.nn.Linear.forward", 0, lambda: layers._is_affine(Affine(8, 4))),
    "an activation": ("torch.sigmoid", 1, lambda: fused.activation_form(Double())),
    "a rotary embedding": ("torch.cat", 0, rotary),
    "positions": ("lowmem_npo.data.fit.Fit.of", 0, lambda: known_fit(CONFIGS["llama"](97))),
}  # fmt: skip


@pytest.mark.parametrize("error", OF_MACHINE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", TRIALS)
def test_a_failure_of_the_machine_is_raised_and_not_remembered(name, error, monkeypatch):
    where, first, trial = TRIALS[name]
    run, calls = resolve_name(where), count()

    def fails(*args, **kwargs):
        if next(calls) >= first:
            raise error
        return run(*args, **kwargs)

    for remembers in (fused, fused_rotary):
        monkeypatch.setattr(remembers, "_known", {})
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(where, fails)
        trial()
    assert trial()


def test_other_errors_are_suppressed_and_only_those_that_are_named():
    with tried():
        raise KeyError("x")
    with tried(RuntimeError, ValueError):
        raise ValueError("x")
    with pytest.raises(KeyError), tried(RuntimeError, ValueError):
        raise KeyError("x")
