"""What the model thinks of every answer token, against dense float64 logits; small differences of large numbers."""

from __future__ import annotations

import dataclasses
from decimal import Decimal, localcontext

import pytest
import torch
from helpers.dense_step import random_rows
from helpers.tiny_models import CONFIGS, tiny_model
from lowmem_kernels import FrozenHead

from lowmem_npo.config import AdapterConfig
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.leaks.fine_tuning import fine_tune
from lowmem_npo.evaluation.scoring import token_scores as module
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.evaluation.scoring.token_scores import token_scores, vocabulary_statistics
from lowmem_npo.model import attach_lora, packs_rows
from lowmem_npo.model.adapters import extra_adapter


def dense(logits, targets):
    """logprob, standard, greedy, deviation from full float64 logits (N, V), by their definitions."""
    logp = logits.double().log_softmax(-1)
    p, own = logp.exp(), logp[torch.arange(len(targets)), targets]
    mean = (p * logp).sum(-1)
    spread = (p * (logp - mean[:, None]).square()).sum(-1).sqrt()
    return own, (own - mean) / spread, logits.argmax(-1) == targets, spread


@pytest.mark.parametrize("chunk", [7, 97, 4096])
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_rows_against_dense_logits(architecture, chunk, monkeypatch):
    """Every architecture's head, in one chunk of the vocabulary or several; rows of unequal length together."""
    monkeypatch.setattr(module, "VOCABULARY", chunk)
    monkeypatch.setattr(module, "TOKENS", 5)
    model, rows = tiny_model(architecture), random_rows(9, seed=3)
    rows[0] = {"input_ids": rows[0]["input_ids"], "labels": rows[0]["input_ids"], "prompt_length": 0}
    found = token_scores(model, rows, batch_size=4, progress=False)
    reference = model.double()
    for row, scores in zip(rows, found, strict=True):
        ids, start = torch.tensor(row["input_ids"]), max(1, row["prompt_length"])
        logits = reference(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]
        own, standard, greedy, deviation = dense(logits, ids[start:])
        torch.testing.assert_close(torch.tensor(scores.logprobs).double(), own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(scores.standard).double(), standard, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.tensor(scores.deviation).double(), deviation, rtol=1e-3, atol=1e-5)
        assert scores.greedy == greedy.tolist()
        assert scores.nll == pytest.approx(-float(own.mean()), rel=1e-4)


def test_scores_and_attacks_run_on_rows_without_padding():
    model, rows, passes = tiny_model("llama"), random_rows(3, seed=4), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, result: passes.append(tuple(args[0].shape)))
    tokens = [len(row["input_ids"]) for row in rows]
    packs_rows(model)  # tries the model once
    passes.clear()
    token_scores(model, rows, progress=False)
    answer_likelihoods(model, rows, progress=False)
    with extra_adapter(attacked := attach_lora(model, AdapterConfig()), 2, seed=0):
        next(fine_tune(attacked, rows, steps=1, lr=1e-3, batch_size=3, seed=0, progress=False))
    assert len(set(tokens)) > 1 and passes == [(1, sum(tokens))] * 3


def small_problem(scale, seed=0):
    """Float32 hidden states and head whose float32 product is exact, so that only what follows it is tested."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-3, 4, (40, 8), generator=generator).float()
    weight = torch.randint(-3, 4, (60, 8), generator=generator).float() * scale
    return hidden, FrozenHead(weight), torch.randint(0, 60, (40,), generator=generator)


real_merge = module._merge
BUGS = {
    "means of other origins": lambda one, other: with_fourth(real_merge(one, other), one[3] / 2 + other[3] / 2),
    "no spread between chunks": lambda one, other: (*real_merge(one, other)[:4], (one[4] + other[4]) / 2),
    "the last of equals": lambda one, other: (
        (merged := real_merge(one, other))[0], torch.where(other[0] >= one[0], other[1], one[1]), *merged[2:]
    ),
}  # fmt: skip


def with_fourth(merged, value):
    return (*merged[:3], value, merged[4])


def exactly(logits, targets):
    """`dense` with fifty digits, row by row."""
    found = []
    with localcontext() as context:
        context.prec = 50
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
            z = [Decimal(value) for value in row]
            log_sum = sum(value.exp() for value in z).ln()
            p = [(value - log_sum).exp() for value in z]
            mean = sum(share * value for share, value in zip(p, z, strict=True))
            variance = sum(share * (value - mean) ** 2 for share, value in zip(p, z, strict=True))
            spread, greedy = variance.sqrt(), row.index(max(row)) == target
            found.append((z[target] - log_sum, (z[target] - mean) / (spread or Decimal(1)), greedy, spread))
    columns = zip(*found, strict=True)
    return [torch.tensor([float(value) for value in column], dtype=torch.float64) for column in columns]


@pytest.mark.parametrize("bug", [None, *BUGS])
@pytest.mark.parametrize("scale", [0.0625, 1.0, 4.0])  # from nearly uniform to nearly certain
def test_numbers_to_many_digits(scale, bug, monkeypatch):
    hidden, head, targets = small_problem(scale)
    hidden[0], targets[0] = 0, 0  # all logits equal: the first token is the greedy one, and there is no spread
    expected = exactly(hidden.double() @ head.weight.double().T, targets)
    monkeypatch.setattr(module, "VOCABULARY", 16)
    if bug:
        monkeypatch.setattr(module, "_merge", BUGS[bug])
    found = vocabulary_statistics(hidden, head, targets)
    pairs = zip(found, expected, strict=True)
    assert all(torch.allclose(x.double(), y, rtol=1e-9, atol=1e-13) for x, y in pairs) is (bug is None)


def test_certainty_does_not_cancel():
    """p of the token 1 - 1e-12, where the textbook E[z^2] - E[z]^2 of the logits has no digits left."""
    weight = torch.tensor([[28.0], [0.0], [0.0]])
    _, standard, greedy, _ = vocabulary_statistics(torch.ones(1, 1), FrozenHead(weight), torch.tensor([0]))
    rest = 2 * torch.tensor(-28.0, dtype=torch.float64).exp()  # odds of the others; both 28 below
    wanted = (rest / (1 + rest)) * 28 / (28 * rest.sqrt() / (1 + rest))
    assert greedy.item() and standard.item() == pytest.approx(float(wanted), rel=1e-9)
    z = (torch.ones(1, 1) @ weight.T).double()
    p = z.softmax(-1)
    mean = (p * z).sum()
    textbook = (z[0, 0] - mean) / ((p * z.square()).sum() - mean.square()).clamp(min=1e-30).sqrt()
    assert float(textbook) != pytest.approx(float(wanted), rel=1e-6)


def test_all_of_the_mass_on_one_token():
    weight = torch.tensor([[5000.0], [0.0]])
    for target, sign in ((0, 0), (1, -1)):
        scores = vocabulary_statistics(torch.ones(1, 1), FrozenHead(weight), torch.tensor([target]))
        assert all(x.double().isfinite().all() for x in scores)
        assert scores[1].sign().item() == sign


def test_no_rows_and_broken_weights():
    model = tiny_model("llama")
    assert token_scores(model, [], progress=False) == []
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="row [12] of 'answers' no finite likelihood"):
        token_scores(model, random_rows(2, seed=0), progress=False)


def test_no_logits_sized_tensor(monkeypatch):
    """The largest tensor made is one tile, whatever the vocabulary."""
    sizes = []
    real = module._logits
    monkeypatch.setattr(module, "TOKENS", 8)
    monkeypatch.setattr(module, "VOCABULARY", 50)
    monkeypatch.setattr(module, "_logits", lambda *args: (tile := real(*args), sizes.append(tuple(tile.shape)))[0])
    hidden, head, targets = small_problem(1.0)
    vocabulary_statistics(hidden, dataclasses.replace(head, weight=head.weight.repeat(9, 1)), targets)
    assert set(sizes) == {(8, 50), (8, 40)} and len(sizes) == 5 * 11
