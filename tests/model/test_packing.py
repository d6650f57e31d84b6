"""Rows packed into one pass are the rows alone; which models can take them; and what would go wrong is noticed.

tests/test_architectures.py compares the gradients of packed and padded steps in every architecture.
"""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.architectures import random_model, tiny_config
from helpers.dense_step import random_rows
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface

from lowmem_npo.data import RowBatch
from lowmem_npo.memory.checkpointing import enable_checkpointing
from lowmem_npo.model import answer_hidden, packable, packing, packs_rows
from lowmem_npo.model.known_configs import known_config, known_names

ROWS = random_rows(4, seed=3, longest=30)  # some longer than every window
PACKED = RowBatch.of(ROWS, pack=True)


def model_of(architecture: str, attention: str = "sdpa"):
    model = random_model(tiny_config(architecture, 97))
    model.config._attn_implementation = attention
    return model


def alone(model) -> torch.Tensor:
    return torch.cat([answer_hidden(model, RowBatch.of([row], pack=False)).hidden for row in ROWS])


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of a token, relative to its state."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["olmo", "gpt2", "mistral", "llama4_text", "gpt_oss", "opt"])
@torch.no_grad()
def test_a_packed_row_is_the_row_alone(architecture, attention):
    """Learned positions, windows, chunks, attention sinks."""
    attention = "eager" if architecture == "gpt_oss" else attention
    model = model_of(architecture, attention)
    expected = alone(model)
    assert packs_rows(model)
    assert error(answer_hidden(model, PACKED).hidden, expected) < 1e-5
    assert torch.equal(alone(model), expected), "rows that are not packed are computed as before"


def test_what_a_layer_keeps_is_as_large_as_the_real_tokens():
    """And attention sees one row at a time: nothing of size tokens x tokens."""
    model, seen = model_of("olmo"), []
    assert packs_rows(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, *args, **how: seen.append(q.shape) or scaled_dot_product_attention(q, *args, **how),
        )
        answer_hidden(model, PACKED)
    of_rows = [torch.Size([1, 4, length, 8]) for length in PACKED.lengths]
    assert seen == 2 * [*of_rows, torch.Size([1, sum(PACKED.lengths), 32])]


@pytest.mark.parametrize("architecture", ["olmo", "qwen3"])
def test_where_pytorch_has_one_call_for_all_rows_it_gets_what_they_are(architecture, monkeypatch):
    """With a stand-in for the call, which needs a GPU; fewer key heads in Qwen3, with and without support for them."""
    calls, causal = [], {"window_size_left": -1, "window_size_right": 0}

    def one_call(query, key, value, ends, key_ends, longest, longest_key, *how, scale, **window):
        assert how == (0.0, True, False) and window == causal
        assert ends is key_ends and longest == longest_key == max(PACKED.lengths) and ends.dtype == torch.int32
        calls.append((query.shape, key.shape[1]))
        rows = zip(
            *(t.transpose(0, 1).tensor_split(ends[1:-1].long(), dim=1) for t in (query, key, value)), strict=True
        )
        done = [scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=True) for row in rows]
        return torch.cat(done, dim=1).transpose(0, 1), None, None, None, None

    model = model_of(architecture)
    expected = alone(model)
    assert packs_rows(model)
    monkeypatch.setattr(packing, "_in_one_call", lambda *args: True)
    monkeypatch.setattr(packing, "flash", one_call)
    for shares_heads in (True, False):
        monkeypatch.setattr(packing, "SHARES_HEADS", shares_heads)
        assert error(answer_hidden(model, PACKED).hidden, expected) < 1e-5
    states = torch.Size([sum(PACKED.lengths), 4, 8])
    heads = model.config.num_key_value_heads
    assert calls == 2 * [(states, heads)] + 2 * [(states, 4)]


class Calls(TorchDispatchMode):
    """The calls of flash attention's operators, with the values of their arguments, or shapes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_flash_attention" in func.name():
            by_name = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            self.calls.append(
                (func.name(), {n: tuple(v.shape) if isinstance(v, torch.Tensor) else v for n, v in by_name.items()})
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(packing.flash is None, reason="this PyTorch has none for rows of any length")
def test_the_operator_gets_what_pytorchs_own_way_to_it_gives_it():
    """`varlen_attn` itself, opened, on tensors without values: the same operators and arguments, both ways."""
    from torch.nn.attention import varlen

    def states(*shape):
        return torch.empty(*shape, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)

    ends = torch.zeros(4, dtype=torch.int32, device="meta")
    rows = ends, ends, 9, 9
    with Calls() as theirs, torch.no_grad():
        q, k, v = (states(20, 4) for _ in range(3))
        out, sums, state = varlen._varlen_attn._init_fn(q, k, v, *rows, True, 0.125, [-1, 0])
        varlen._varlen_attn_backward._init_fn(out, q, k, v, out, sums, *rows, True, state, 0.125, [-1, 0])
    with Calls() as ours:
        q, k, v = (states(1, 4, 20) for _ in range(3))
        attended = packing._attend_at_once(q, k, v, ends, 9, 0.125)
        attended.backward(torch.empty_like(attended))
    unused = {"seqused_k", "block_table", "num_splits", "unused"}
    for (name, given), (own_name, own) in zip(theirs.calls, ours.calls, strict=True):
        assert name == own_name and attended.shape == (1, 20, 4, 64) and q.grad.shape == q.shape
        assert {n: v for n, v in given.items() if n not in unused} == {n: v for n, v in own.items() if n not in unused}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("architecture", ["olmo", "qwen3"])
def test_one_call_for_all_rows_on_a_gpu(architecture, monkeypatch):
    """States and gradients are those of row by row, to bfloat16's rounding."""
    model = model_of(architecture).to("cuda", torch.bfloat16)
    assert packs_rows(model)
    results, calls, one_call = [], [], packing.flash
    monkeypatch.setattr(packing, "flash", lambda *args, **how: calls.append(args) or one_call(*args, **how))
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(packing, "_in_one_call", lambda *args: False)
        model.zero_grad()
        states = answer_hidden(model, PACKED.to("cuda")).hidden.float()
        states.square().sum().backward()
        results.append((states.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.float()))
    assert len(calls) == 2
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()


def test_recomputed_layers_know_their_rows():
    model = model_of("mistral")
    assert packs_rows(model)
    model.requires_grad_(True)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model)
        answer_hidden(model, PACKED).hidden.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


# -- who can take packed rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, why", [("mamba", "state"), ("lfm2", "convolution"), ("bloom", "ALiBi")])
def test_a_model_that_mixes_rows_is_left_as_it_is(architecture, why, caplog):
    attention = "eager" if architecture in ("mamba", "bloom") else "sdpa"
    model = model_of(architecture, attention)
    with caplog.at_level(logging.INFO):
        assert not packs_rows(model) and not packs_rows(model)
    assert model.config._attn_implementation == attention
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lowmem_npo")]
    assert said == [packable.padding_note(architecture)]
    if architecture == "bloom":
        with pytest.raises(ValueError, match="BloomForCausalLM cannot take packed rows"):
            answer_hidden(model, PACKED)


@pytest.mark.parametrize("name", known_names())
def test_every_model_whose_configuration_is_bundled_is_packed(name):
    """The embedding of OLMo's padding token, with which a row that is tried begins, is 0, and so are its states."""
    assert packable.packable(known_config(name), "sdpa")


def rows_run_into_each_other(attend_with):
    def attend(module, query, key, value, mask, **how):
        return attend_with(module)(module, query, key, value, None, **how)

    return attend


def positions_run_on(batch):
    return torch.arange(sum(batch.lengths))[None] if batch.packed else None


PLANTED = {
    "rows run into each other": ("olmo", "attention"),
    "positions run on": ("gpt2", "positions"),
    "the last row is cut from its beginning": ("olmo", "boundaries"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_noticed(bug, monkeypatch):
    architecture, where = PLANTED[bug]
    assert packs_rows(model_of(architecture))
    packable._packable.cache_clear()
    if where == "attention":
        broken = rows_run_into_each_other(lambda module: packing.sdpa_attention_forward)
        monkeypatch.setitem(AttentionInterface._global_mapping, packing.BY_ROWS["sdpa"], broken)
    elif where == "positions":
        monkeypatch.setattr(RowBatch, "position_ids", property(positions_run_on))
    else:
        right = packing._packed
        monkeypatch.setattr(
            packing, "_packed", lambda lengths: right((*lengths[:-2], lengths[-2] - 1, lengths[-1] + 1))
        )
    assert not packs_rows(model_of(architecture))
    packable._packable.cache_clear()


def test_a_model_that_differs_from_its_architecture_is_judged_by_itself(monkeypatch):
    """A layer of somebody else's that mixes tokens, as a kernel from the hub might."""
    model = model_of("olmo")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.cumsum(1))
    assert packable.packable(model.config, "sdpa") and not packs_rows(model)


# -- flash attention --------------------------------------------------------------------------------------------------


def flash(module, query, key, value, mask, scaling=None, **how):
    """What kernels for packed rows compute, from the rows' boundaries alone."""
    assert mask is None
    done = torch.empty_like(query)
    ends = how["cu_seq_lens_q"]
    assert ends.dtype == torch.int32 and torch.equal(ends, how["cu_seq_lens_k"])
    assert how["max_length_q"] == how["max_length_k"] == int(ends.diff().max())
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        row = [states[:, :, start:end] for states in (query, key, value)]
        done[:, :, start:end] = scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=True)
    return done.transpose(1, 2), None


@torch.no_grad()
def test_flash_attention_gets_the_boundaries_of_rows(monkeypatch):
    model = model_of("olmo")
    expected = alone(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_stand_in", lambda **_: None)
    model.config._attn_implementation = "flash_stand_in"
    assert packing.take_rows(model) and model.config._attn_implementation == "flash_stand_in"
    assert error(answer_hidden(model, PACKED).hidden, expected) < 1e-5
