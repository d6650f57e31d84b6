"""Forget and retain rows in one pass: the gradients and figures of two, with half of the passes."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import tiny_model
from lowmem_kernels import dispatch

from lowmem_npo.config import AdapterConfig
from lowmem_npo.data import ForgetRetain, Pick, RowBatch, collator
from lowmem_npo.model import attach_lora

FORGET, RETAIN, OTHERS = (random_rows(4, seed=seed) for seed in (1, 2, 3))
TOKENS = sum(len(row["input_ids"]) for row in FORGET + RETAIN)
FIGURES = {"loss", "forget_loss", "forget_nll", "forget_log_ratio", "retain_nll", "retain_kl"}


@pytest.fixture
def passes(monkeypatch):
    """The rows of each pass through the decoder, with and without gradient."""
    import lowmem_npo.model.head as head

    run, seen = head.final_states, {True: [], False: []}
    monkeypatch.setattr(
        head, "final_states", lambda lm, batch: seen[torch.is_grad_enabled()].append(len(batch)) or run(lm, batch)
    )
    return seen


def test_rows_share_a_pass_up_to_a_number_of_tokens():
    dataset = ForgetRetain(FORGET, RETAIN)
    items = [dataset[Pick(part, row)] for part in ("retain", "forget") for row in (2, 0)]
    tokens = sum(len(row["input_ids"]) for _, row in items)
    apart, together = (collator(0, pack=True, joint_tokens=limit)(items) for limit in (tokens - 1, tokens))
    assert apart["both"] is None
    both: RowBatch = together["both"]
    assert both.rows == (2, 0, 2, 0) and both.answers == together["forget"].answers + together["retain"].answers
    assert both.targets.tolist() == together["forget"].targets.tolist() + together["retain"].targets.tolist()
    assert collator(0, joint_tokens=10**6)(items[:2])["both"] is None, "there is nothing to forget in it"
    padded = collator(0, joint_tokens=tokens)(items)
    assert padded["both"] is None, "padding counts where there is some"


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalization": "token"}, {"forget_term": "ga", "delta": 0.0}, {"forget_term": "dpo"}],
    ids=["default", "token", "without a reference", "dpo"],
)
@pytest.mark.parametrize("layers", [(), ("1",)], ids=["all layers", "above a shared prefix"])
def test_gradients_and_figures_are_those_of_two_passes(settings, layers, passes, tmp_path):
    others = OTHERS if settings.get("forget_term") == "dpo" else None
    runs = []
    for tokens in (0, 10**6):
        model = attach_lora(tiny_model("olmo"), AdapterConfig(lora_r=3, lora_layers=layers))
        trainer = make_trainer(
            model, tmp_path / str(tokens), FORGET, RETAIN, others, joint_pass_tokens=tokens, **settings
        )
        loss, expected = dense_step(trainer, FORGET, RETAIN, others)
        [seen.clear() for seen in passes.values()]
        runs.append((step_gradients(trainer), trainer.state.log_history[0], {k: list(v) for k, v in passes.items()}))
    (gradients, log, apart), (joint, joint_log, together) = runs
    assert relative_error(joint, gradients) < 1e-5 and relative_error(joint, expected) < 2e-5
    assert joint_log["loss"] == pytest.approx(loss, rel=1e-5)
    for name in joint_log.keys() & FIGURES:
        assert joint_log[name] == pytest.approx(log[name], rel=1e-5, abs=1e-6), name
    assert len(apart[True]) == 2 and together[True] == [sum(apart[True])]
    assert together[False] == ([] if settings.get("delta") == 0.0 else together[True])


@pytest.mark.parametrize("tokens", [0, 10**6], ids=["two passes", "one"])
def test_no_pass_looks_at_its_targets(tokens, tmp_path, monkeypatch):
    """A GPU would wait for the host in each micro-batch; they were checked with the rows."""
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN, joint_pass_tokens=tokens)
    monkeypatch.setattr(dispatch, "_kept_rows", lambda *_: 1 / 0)
    assert step_gradients(trainer)


def test_parts_of_which_one_needs_a_reference_go_apart(passes, tmp_path):
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN, forget_term="ga", joint_pass_tokens=10**6)
    _, expected = dense_step(trainer, FORGET, RETAIN)
    [seen.clear() for seen in passes.values()]
    assert relative_error(step_gradients(trainer), expected) < 2e-5
    assert passes == {True: [4, 4], False: [4]}


def test_a_forget_gradient_that_is_taken_at_a_neighbour_shares_no_pass(passes, tmp_path):
    trainer = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN, sam=0.05, joint_pass_tokens=10**6)
    step_gradients(trainer)
    assert passes[True] == [4, 4, 4] and trainer.passes.objective.parts_go_apart == "--sam"


def test_a_joint_pass_fills_the_cache_and_reads_it(passes, tmp_path):
    """What is stored does not decide which passes the policy makes: a resumed run makes those of the whole one."""
    settings = {"joint_pass_tokens": 10**6, "learning_rate": 0.0, "reference_dir": str(tmp_path / "reference")}

    def step(retain):
        trainer = make_trainer(tiny_model("olmo"), tmp_path / "run", FORGET, retain, **settings)
        [seen.clear() for seen in passes.values()]
        return step_gradients(trainer)

    stored = step(RETAIN)
    assert passes == {True: [8], False: [8]}
    read = step(RETAIN)
    assert passes == {True: [8], False: []}
    assert all(torch.equal(read[name], stored[name]) for name in stored)
    (tmp_path / "reference" / "retain.safetensors").unlink()
    mixed = step(RETAIN)
    assert passes == {True: [8], False: [8]}
    assert all(torch.equal(mixed[name], stored[name]) for name in stored)


def test_a_mix_up_of_the_parts_would_be_noticed(monkeypatch, tmp_path):
    from lowmem_npo.model.head import AnswerHidden

    right = AnswerHidden.split
    monkeypatch.setattr(AnswerHidden, "split", lambda answers, count: right(answers, count - 1))
    broken = make_trainer(tiny_model("olmo"), tmp_path, FORGET, RETAIN, joint_pass_tokens=10**6, normalization="token")
    expected = dense_step(broken, FORGET, RETAIN)[1]
    assert relative_error(step_gradients(broken), expected) > 1e-2
