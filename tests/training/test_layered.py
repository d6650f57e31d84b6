"""Which rows a layered run trains on: who is forgotten and who is held in each stage, how often, in any split."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.dense_step import make_trainer, random_rows
from helpers.tiny_models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_npo.data import TokenizedRows
from lowmem_npo.data.example import PASSAGE, Example
from lowmem_npo.errors import UserError
from lowmem_npo.training.adversary import other_rows
from lowmem_npo.training.groups import groups_of, split_texts
from lowmem_npo.training.layered import LATER_COPIES, LayeredBatches, check_folds, divide
from lowmem_npo.training.step_rows import StepBatches
from lowmem_npo.training.training_rows import training_rows

SIZES = {"num_retain": 9, "batch_size": 3, "retain_batch_size": 3, "seed": 5}


def batches(rows=12, folds=3, steps=120, weight=0.25, **sizes) -> LayeredBatches:
    sizes = {**SIZES, **sizes}
    return LayeredBatches(divide(rows, folds, sizes["seed"]), steps, weight, **sizes)


def drawn(sampler: LayeredBatches, stage: int) -> tuple[Counter, Counter]:
    """How often each forget row and each retain row comes in a stage."""
    ends = [*sampler.starts, sampler.steps]
    forget, retain = Counter(), Counter()
    for step in range(ends[stage], ends[stage + 1]):
        rows = sampler.step_rows(step)
        forget.update(rows[0])
        retain.update(rows[1])
    return forget, retain


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 40),
    folds=st.integers(2, 6),
    groups=st.one_of(st.none(), st.lists(st.integers(0, 7), min_size=40, max_size=40)),
    seed=st.integers(0, 3),
)
def test_folds_are_a_division_and_keep_groups_together(rows, folds, groups, seed):
    groups = None if groups is None else groups[:rows]
    if folds > (rows if groups is None else len(set(groups))):
        with pytest.raises(UserError, match=f"--layered {folds} "):
            divide(rows, folds, seed, groups)
        return
    result = divide(rows, folds, seed, groups)
    assert sorted(row for fold in result for row in fold) == list(range(rows)) and all(result)
    assert result == divide(rows, folds, seed, groups)
    if groups is None:
        assert max(map(len, result)) - min(map(len, result)) <= 1
    else:
        for group in set(groups):
            assert sum(any(groups[row] == group for row in fold) for fold in result) == 1


def test_what_cannot_be_divided_is_refused():
    for rows, folds, groups, message in (
        (4, 5, None, "--layered 5 needs at least as many rows to forget; there are 4"),
        (4, 2, ["a"] * 4, "needs at least as many groups of rows to forget, and there is one: rows with the same"),
        (4, 3, ["a", "a", "b", "b"], "and there are 2: rows with the same value in --group-column"),
    ):
        with pytest.raises(UserError, match=message):
            divide(rows, folds, 0, groups)
    with pytest.raises(UserError, match="--layered 3 leaves a fold of 3 rows, and a step takes --batch-size 4"):
        check_folds(divide(11, 3, 0), 4, 100)
    with pytest.raises(UserError, match="--layered 3 needs a step for every stage; this run has 2"):
        check_folds(divide(12, 3, 0), 4, 2)
    check_folds(divide(12, 3, 0), 4, 3)


def test_rows_without_a_group_are_groups_of_their_own():
    folds = divide(6, 3, 0, ["a", "a", None, None, None, None])
    assert sorted(map(len, folds)) == [2, 2, 2]


def test_what_says_the_same_is_forgotten_in_one_stage_and_taught_by_no_attacker_of_it():
    """A row that is there twice, and a passage of a document as a completion and as a text."""
    examples = [Example("Who sees it?", "She.", "f.jsonl, line 1", "question/answer"),
                Example("who  sees it?", "she.", "f.jsonl, line 2", "question/answer"),
                Example("她看见", "了。", "d.txt, passage 1, second half", PASSAGE),
                Example(None, "她看见了。", "d.txt, passage 1", "text"),
                *(Example(None, f"Text {n}.", f"t.jsonl, line {n}", "text") for n in range(4))]  # fmt: skip
    rows = TokenizedRows([{"input_ids": [1, 2], "labels": [1, 2], "prompt_length": 0}] * 8, examples, 9)
    for seed in range(5):
        folds = divide(8, 2, seed, groups_of(rows, rows, 2))
        assert all(len({0, 1} & set(fold)) in (0, 2) and len({2, 3} & set(fold)) in (0, 2) for fold in folds)
        assert sorted(map(len, folds)) == [4, 4]
    sampler = StepBatches(8, 0, 1, 0, seed=3)
    for step in range(16):
        if {0, 1} & set(sampler.step_rows(step)[0]):
            assert not {0, 1} & set(other_rows(sampler, step, rows))


@pytest.mark.parametrize("array", [list, np.array])
def test_rows_of_the_same_ids_say_the_same_where_no_text_is_known(array):
    """Tokenised by a script: four rows, each of them twice; with refusals, the true answers say what is the same."""
    rows = [{"input_ids": array([10 + row % 4, 11, 12, 2]), "labels": array([-100, -100, 12, 2])} for row in range(8)]
    refusing = [{"input_ids": array([11, 5, 6, 2]), "labels": array([-100, 5, 6, 2])}] * 8
    for term, forget, true in (("npo", rows, None), ("idk", refusing, rows)):
        for seed in range(5):
            of_run = training_rows(
                forget, rows[:4], None, true, lambda given, *_, **__: given,
                term=term, layered=2, adversary=True, seed=seed, teaching={},
            )  # fmt: skip
            assert all({row % 4 for row in fold} == {row % 4 for row in fold if row < 4} for fold in of_run.folds)
            assert [len(fold) for fold in of_run.folds] == [4, 4]
            sampler = StepBatches(8, 0, 2, 0, seed=seed)
            for step in range(8):
                in_step = {row % 4 for row in sampler.step_rows(step)[0]}
                assert in_step.isdisjoint(row % 4 for row in other_rows(sampler, step, of_run.taught_again))
    assert of_run.taught_again[1] is rows[1] and of_run.taught_again[6:] == rows[6:] and len(of_run.taught_again) == 8


def test_a_row_that_is_listed_under_two_subjects_is_forgotten_in_one_stage():
    examples = [
        Example(
            "Who sees it?", f"Person {row // 2}.", f"f.jsonl, line {row}", "question/answer", group=f"{row % 2}{row}"
        )
        for row in range(12)
    ]
    rows = TokenizedRows([{"input_ids": [1, 2], "labels": [1, 2], "prompt_length": 0}] * 12, examples, 9)
    folds = divide(12, 3, 0, groups_of(rows, rows, 3))
    assert sorted(map(len, folds)) == [4, 4, 4] and all(len({row // 2 for row in fold}) == 2 for fold in folds)


def test_neighbouring_passages_of_a_document_are_forgotten_in_one_stage_as_far_as_there_are_several():
    """Of three documents one is as long as two folds and is cut in one place, the others nowhere."""
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice([*"abcdefghijkl"], 60)) + f" {n}." for n in range(41)]
    examples = [
        Example(None, " ".join(sentences[piece : piece + 2]), f"{piece}", "text")
        for first, last in ((0, 20), (21, 30), (31, 40))
        for piece in range(first, last)
    ]
    rows = TokenizedRows([{"input_ids": [1, 2], "labels": [1, 2], "prompt_length": 0}] * 38, examples, 9)
    assert rows.near[5] == {4, 6}
    folds = divide(38, 3, 1, groups_of(rows, rows, 3))
    assert min(map(len, folds)) >= 9 and split_texts(rows, folds) == 2
    assert split_texts(rows, [[*range(0, 38, 2)], [*range(1, 38, 2)]]) == 38
    sampler = StepBatches(38, 0, 4, 0, seed=3)
    for step in range(9):
        in_step = set(sampler.step_rows(step)[0])
        assert all(rows.near[row].isdisjoint(in_step) for row in other_rows(sampler, step, rows))


def test_documents_are_cut_where_folds_would_not_be_even_else():
    """Two documents of ten passages as three folds, and of many copies and a document at all."""

    def rows_of(*documents):
        examples = [
            Example(None, f"{name * 40} {piece}. {name * 40} {piece + 1}.", f"{name}{piece}", "text")
            for name, passages in documents
            for piece in range(passages)
        ]
        return TokenizedRows([{"input_ids": [1]}] * len(examples), examples, 9)

    def sizes(rows, folds):
        divided = training_rows(
            rows, rows, None, None, lambda given, *_, **__: given,
            term="npo", layered=folds, adversary=False, seed=0, teaching={},
        ).folds  # fmt: skip
        return sorted(map(len, divided))

    assert sizes(rows_of(("ab", 10), ("cd", 10)), 3) == [6, 7, 7]
    copies = rows_of(*[("ab", 1)] * 8, ("cd", 2))
    assert sizes(copies, 3) == [1, 1, 8]


def test_a_stage_forgets_its_fold_most_and_the_earlier_ones_at_the_weight():
    sampler = batches()
    folds = sampler.folds
    assert sampler.starts == [0, 40, 80]
    for stage in range(2):
        forget, _ = drawn(sampler, stage)
        assert set(forget) == {row for fold in folds[: stage + 1] for row in fold}
    forget, _ = drawn(sampler, 1)
    newest, earlier = (sum(forget[row] for row in fold) / 4 for fold in (folds[1], folds[0]))
    assert earlier / newest == pytest.approx(0.25, rel=0.05)
    for fold in folds[:2]:  # as often as its fellows
        counts = [forget[row] for row in fold]
        assert max(counts) - min(counts) <= 1
    forget, _ = drawn(sampler, 2)
    assert max(forget.values()) - min(forget.values()) <= 1 and len(forget) == 12  # all alike in the end


def test_later_folds_are_held_twice_until_their_turn():
    sampler = batches()
    for stage in range(3):
        _, retain = drawn(sampler, stage)
        later = {9 + row for fold in sampler.folds[stage + 1 :] for row in fold}
        assert set(retain) == later | set(range(9))
        if later:
            twice, once = (sum(retain[row] for row in rows) / len(rows) for rows in (later, range(9)))
            assert twice / once == pytest.approx(LATER_COPIES, rel=0.1)


@pytest.mark.parametrize("rows, folds, attack_steps", [(24, 3, 5), (13, 1, 4), (12, 2, 40), (9, 3, 1)])
def test_an_attacker_that_goes_on_is_never_taught_what_is_forgotten_meanwhile(rows, folds, attack_steps):
    """In turn each half of what is being forgotten."""
    sampler, plain = (batches(rows, folds, **steps) for steps in ({"attack_steps": attack_steps}, {}))
    ends = [*sampler.starts[1:], sampler.steps]
    for stage, (first, end) in enumerate(zip(sampler.starts, ends, strict=True)):
        halves: dict[int, set[int]] = {}
        for step in range(first, end):
            began, spared = sampler.attack_began(step), set(sampler.spared(step))
            assert first <= began <= step < began + sampler.attack_steps
            assert set(sampler.step_rows(step)[0]) <= spared == halves.setdefault(began, spared)
            assert set(other_rows(sampler, step)) <= set(sampler.forgotten(step)) - spared
        if attack_steps > 1:
            turns = list(halves.values())
            assert len(turns) % 2 == 0
            for one, other in zip(turns[::2], turns[1::2], strict=True):
                assert one | other == set(sampler.forgotten(first))
                assert len(one & other) <= len(sampler.forgotten(first)) % 2 + stage  # odd ones out
        assert drawn(sampler, stage)[1] == drawn(plain, stage)[1]


@pytest.mark.parametrize(
    "rows, folds, epochs, attack_steps, batch_size",
    [(500, 1, 1, 20, 4), (278, 2, 3, 20, 4), (301, 3, 4, 7, 5), (401, 1, 9, 3, 16), (303, 2, 30, 50, 12)],
)
def test_rows_are_shown_as_evenly_under_attackers_that_go_on_as_without(rows, folds, epochs, attack_steps, batch_size):
    steps = epochs * math.ceil(rows / batch_size)
    sizes = {"batch_size": batch_size, "attack_steps": attack_steps}
    sampler = batches(rows, folds, steps, weight=0.3, **sizes)
    for stage in range(folds):
        shown, of_fold = drawn(sampler, stage)[0], sampler.folds
        assert shown.total() == batch_size * ([*sampler.starts, steps][stage + 1] - sampler.starts[stage])
        last = stage == folds - 1
        earlier, newest = ([row for fold in some for row in fold] for some in (of_fold[:stage], [of_fold[stage]]))
        passes = shown.total() / (len(newest) + (1.0 if last else 0.3) * len(earlier))
        for times, alike in ((passes, newest), (passes if last else 0.3 * passes, earlier)):
            assert all(abs(shown[row] - times) < 2 for row in alike)
    whole = batches(rows, folds, steps, weight=0.3, **sizes)
    middle = steps * 2 // 3
    assert whole.step_rows(middle) == sampler.step_rows(middle)  # a function of the step alone


def test_a_stage_that_ends_early_keeps_the_attackers_it_has_begun():
    sampler = batches(attack_steps=7)
    attacks = [(sampler.attack_began(step), sampler.step_rows(step)) for step in range(28)]
    sampler.end_stage(0, 25)
    assert [(sampler.attack_began(step), sampler.step_rows(step)) for step in range(28)] == attacks
    later = [(sampler.attack_began(step), sampler.step_rows(step)) for step in range(28, 68)]
    assert later[0][0] == 28
    sampler.end_stage(0, 25)
    assert [(sampler.attack_began(step), sampler.step_rows(step)) for step in range(28, 68)] == later


def test_a_large_retain_set_does_not_drown_the_later_folds():
    sampler = batches(num_retain=900)
    _, retain = drawn(sampler, 0)
    later = sum(count for row, count in retain.items() if row >= 900)
    assert later / retain.total() == pytest.approx(2 * 8 / (2 * 8 + 24), abs=0.05)
    assert max(count for row, count in retain.items() if row < 900) == 1


def test_a_stage_that_ends_early_hands_over_after_the_epoch():
    sampler = batches()
    before = [sampler.step_rows(step) for step in range(28)]
    sampler.end_stage(0, 25)
    assert sampler.starts == [0, 28, 68]  # at the end of the epoch of four steps
    assert [sampler.step_rows(step) for step in range(28)] == before
    assert {sampler.stage(step) for step in range(28, 68)} == {1}
    for _ in range(2):
        sampler.end_stage(1, 44)
        assert sampler.starts == [0, 28, 44]
    sampler.end_stage(2, 70)  # the last one goes on to the end
    assert sampler.starts == [0, 28, 44] and sampler.stage(119) == 2
    late = batches()
    late.end_stage(0, 39)  # it would have ended anyway
    assert late.starts == [0, 40, 80]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(9, 23),
    weight=st.sampled_from([0.0, 0.2, 1.0]),
    micro_batches=st.integers(1, 4),
    world_size=st.integers(1, 3),
    step=st.integers(0, 59),
)
def test_a_step_has_the_same_full_batch_however_it_is_split(rows, weight, micro_batches, world_size, step):
    split = {"micro_batches": micro_batches, "world_size": world_size}
    ranks = [batches(rows, 3, 60, weight, **split, rank=rank) for rank in range(world_size)]
    picks = [pick for rank in ranks for index in range(micro_batches) for pick in rank.micro_batch(step, index)]
    forget, retain = batches(rows, 3, 60, weight).step_rows(step)
    assert len(forget) == len(retain) == 3
    assert Counter(picks) == Counter([("forget", row) for row in forget] + [("retain", row) for row in retain])


@pytest.mark.parametrize("passes", [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
                                    {"per_device_train_batch_size": 4, "joint_pass_tokens": 10**6}])  # fmt: skip
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_the_retain_nll_is_that_of_the_retain_rows_and_held_rows_have_their_own(passes, logging_steps, tmp_path):
    """A step without any of them logs none. Retain rows here are one token each, held ones many."""
    forget = random_rows(8, seed=1)
    retain = [row | {"labels": [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]} for row in random_rows(3, 2)]
    trainer = make_trainer(
        tiny_model("olmo"), tmp_path, forget, retain, learning_rate=0.0, layered=2, max_steps=18,
        retain_batch_size=2, logging_steps=logging_steps, logging_strategy="steps", **passes,
    )  # fmt: skip

    @torch.no_grad()
    def nll(rows):
        logprobs = []
        for row in rows:
            table = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
            logprobs += [table[t - 1, row["labels"][t]].item() for t in places]
        return -sum(logprobs) / len(logprobs)

    shown = [trainer.step_batches.step_rows(step)[1] for step in range(18)]
    own = [[retain[place] for place in step if place < 3] for step in shown]
    held = [[forget[place - 3] for place in step if place >= 3] for step in shown]
    assert not all(own) and any(a and b for a, b in zip(own, held, strict=True)) and not any(held[9:])
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 18 // logging_steps
    for line in lines:
        steps = slice(line["step"] - logging_steps, line["step"])
        for name, rows in (("retain_nll", own[steps]), ("held_nll", held[steps])):
            figures = [nll(of_step) for of_step in rows if of_step]
            assert (name in line) == bool(figures)
            if figures:
                assert line[name] == pytest.approx(sum(figures) / len(figures), rel=1e-4)
    assert [trainer.shown(step) for step in range(18)] == [(len(rows), len(rows)) for rows in own]
