"""Reference and policy together in each layer: the losses and gradients of passes apart, to the bit.

Streamed weights are used in lock-step: tests/memory/streaming compares their steps, with all other switches, with those
of resident weights, and counts what is copied. tests/test_architectures.py compares every architecture's gradients.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.architectures import tiny_config
from helpers.dense_step import VOCABULARY, dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import tiny_model

from lowmem_npo.config import AdapterConfig, DataConfig, MemoryConfig, ModelConfig, RunConfig
from lowmem_npo.estimate.step import estimate
from lowmem_npo.memory import lock_step
from lowmem_npo.memory.lock_step import LockStep, can_lock_step
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora

FORGET, RETAIN = random_rows(4, seed=1), random_rows(4, seed=2)


def trainer(folder: Path, together: bool, architecture="olmo", adapter=None, memory=None, **settings):
    torch.manual_seed(5)
    own = {"lora_r": 3, "lora_targets": ("all-linear",), **(adapter or {})}
    model = attach_lora(tiny_model(architecture), AdapterConfig(**own))
    apply_switches(model, MemoryConfig(**(memory or {})))
    run = make_trainer(model, folder / str(together), FORGET, RETAIN, max_steps=2, **settings)
    assert run.passes.lock_step is None, "weights that stay where they are do not need it"
    if together:
        run.passes.lock_step = LockStep.where_it_fits(model, run.passes.prefix)
        assert run.passes.lock_step is not None
    torch.manual_seed(7)  # dropout
    return run


STEPS = {
    "dropout": {"adapter": {"lora_dropout": 0.5}},
    "a cache is filled": {"reference_dir": "reference"},
    "one part needs a reference": {"forget_term": "ga", "memory": {"gradient_checkpointing": "off"}},
}


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_steps_are_those_of_passes_apart_to_the_bit(step, tmp_path):
    results = []
    for together in (False, True):
        folder = {"reference_dir": str(tmp_path / f"cache-{together}")} if "reference_dir" in step else {}
        run = trainer(tmp_path, together, **{**step, **folder})
        gradients = step_gradients(run)
        figures = [{k: v for k, v in log.items() if "_" in k or k == "loss"} for log in run.state.log_history[:2]]
        results.append((gradients, figures))
    (apart, figures), (joint, own_figures) = results
    assert apart.keys() == joint.keys() and all(torch.equal(apart[name], joint[name]) for name in apart)
    assert figures == own_figures and "retain_kl" in figures[1]


@pytest.mark.parametrize("lowest", [0, 1])
def test_each_layer_is_run_by_both_before_the_next(lowest, tmp_path):
    """And what is below the adapters once; a layer is recomputed for the policy alone."""
    adapter = {"lora_layers": tuple(str(index) for index in range(lowest, 2))}
    run = trainer(tmp_path, True, "llama", adapter, joint_pass_tokens=10**6, learning_rate=0.0)
    _, expected = dense_step(run, FORGET, RETAIN)
    seen: list[str] = []
    for index, layer in enumerate(run.model.get_base_model().model.layers):
        is_off = (lambda m: m.disable_adapters) if index >= lowest else (lambda m: False)
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda m, args, i=index, is_off=is_off: seen.append(f"{i}{'R' if is_off(m) else 'P'}")
        )
    assert relative_error(step_gradients(run), expected) < 2e-5
    assert seen[:4] == (["0P", "1P", "1R", "1P"] if lowest else ["0P", "0R", "1P", "1R"])


def test_a_reference_that_meets_the_policy_would_be_noticed(tmp_path, monkeypatch):
    """Here it enters each layer with the policy's states."""
    monkeypatch.setattr(lock_step._Memory, "states", property(lambda memory: None, lambda memory, states: None), False)
    monkeypatch.setattr(LockStep, "_suffices", lambda *_: True)
    run = trainer(tmp_path, True, learning_rate=0.0)
    _, expected = dense_step(run, FORGET, RETAIN)
    assert relative_error(step_gradients(run), expected) > 1e-3


SHARED_KEYS = {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention"] * 2}
WHERE_NOT = {
    "upper layers read the keys of lower ones": ("gemma3n_text", SHARED_KEYS, ("q_proj", "v_proj")),
    "a layer before the decoder's has an adapter": ("opt", {"word_embed_proj_dim": 16}, ("all-linear",)),
}


@pytest.mark.parametrize("architecture, changes, targets", WHERE_NOT.values(), ids=list(WHERE_NOT))
def test_where_the_reference_keeps_to_itself(architecture, changes, targets, tmp_path):
    config = tiny_config(architecture, VOCABULARY)
    for name, value in changes.items():
        setattr(config, name, value)
    model = attach_lora(tiny_model(config), AdapterConfig(lora_r=3, lora_targets=targets))
    run = make_trainer(model, tmp_path, FORGET, RETAIN)
    assert LockStep.where_it_fits(model, run.passes.prefix) is None
    assert can_lock_step(tiny_config("olmo", VOCABULARY), "sdpa")
    if architecture == "opt":  # as an estimate sees it: from the places of the adapters
        assert LockStep.where_it_fits(model.to("meta"), run.passes.prefix) is None
    else:
        assert not can_lock_step(config, "sdpa")
        settings = RunConfig(ModelConfig("tiny"), DataConfig(max_length=16), memory=MemoryConfig(stream_weights=True))
        sections = [name for name, _ in estimate(settings, config).work]
        assert "reference" in sections, sections


def test_a_side_state_that_bf16_would_hide(monkeypatch):
    """The policy moves the reference by 1e-4 of its states."""
    config = tiny_config("olmo", VOCABULARY)
    assert can_lock_step(config, "sdpa")
    lock_step._can_lock_step.cache_clear()
    layer = type(tiny_model(config).model.layers[0])
    right, seen = layer.forward, []

    def leaks(self, hidden_states, *args, **options):
        result = right(self, hidden_states, *args, **options)
        seen.append(result.detach())
        return result + 1e-4 * (seen[-2] if len(seen) > 1 else 0)

    monkeypatch.setattr(layer, "forward", leaks)
    assert not can_lock_step(config, "sdpa")
    lock_step._can_lock_step.cache_clear()


def test_a_pass_that_ends_in_its_middle_leaves_the_model_as_it_was(tmp_path):
    run = trainer(tmp_path, True)
    layers = run.model.get_base_model().model.layers
    before = [vars(layer).get("forward") for layer in layers]
    with pytest.raises(RuntimeError, match="inside"), run.passes.lock_step.passes():
        assert [vars(layer).get("forward") for layer in layers] != before
        raise RuntimeError("inside")
    assert [vars(layer).get("forward") for layer in layers] == before
