"""The attacker of `--adversary`: what it learns, what the forget gradient under it is, and that every pass meets it."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.small_gpu import SmallGPU
from helpers.tiny_models import tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig
from transformers.pytorch_utils import Conv1D

from lowmem_npo.config import AdapterConfig, MemoryConfig, ModelConfig, OutputConfig, RunConfig
from lowmem_npo.data import TokenizedRows
from lowmem_npo.data.batching import collator
from lowmem_npo.data.example import Example
from lowmem_npo.errors import UserError
from lowmem_npo.memory import streaming
from lowmem_npo.memory.switches import apply_switches
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.model.layers import causal_lm, linear_layers
from lowmem_npo.run_directory import AdapterFiles, RunFiles, check_disk
from lowmem_npo.training.adversary import RANK, ROWS, Adversary, Lesson, attacker_size, check_others, other_rows
from lowmem_npo.training.checkpoints import resume_point
from lowmem_npo.training.layered import LayeredBatches, divide
from lowmem_npo.training.step_rows import StepBatches

FORGET, RETAIN = random_rows(12, seed=1), random_rows(12, seed=2)
RHO = 2.0
PLAIN = {"sliced_float32": False, "gradient_checkpointing": False}
FOUR = {"per_device_train_batch_size": 4}
SPLIT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def trainer_of(folder, architecture="olmo", memory=None, adapter=None, model=None, **settings):
    adapter = {"lora_r": 3, **(adapter or {})}
    model = attach_lora(model or tiny_model(architecture), AdapterConfig(**adapter))
    if memory is not None:
        apply_switches(model, MemoryConfig(**memory), torch.device("cpu"))
    sizes = {"per_device_train_batch_size": 4, "learning_rate": 0.0, "adversary": RHO}
    return make_trainer(model, folder, FORGET, RETAIN, **{**sizes, **settings})


class Dense:
    """The attacker and the gradient under it in float64, from full logits. The attacker is added to the weights
    themselves: that of B is then the gradient of the weight times A. It is the one at work in step `step`, where the
    weights of the model have stayed the same."""

    def __init__(self, trainer, rows=None, step=0):
        self.trainer, self.objective = trainer, trainer.passes.objective
        self.model = _dense_copy(trainer.model)
        names = linear_layers(causal_lm(trainer.model))
        began = trainer.step_batches.attack_began(step)
        factors = trainer.passes.adversary.fresh(began)
        self.a = {name: factor.a.double() for name, factor in zip(names, factors, strict=True)}
        self.b = {}
        for taught in (
            [other_rows(trainer.step_batches, before) for before in range(began, step + 1)] if rows is None else [rows]
        ):
            self.relearn(taught)
        rows, kept = trainer.step_batches.step_rows(step)
        self.forget, self.retain = [FORGET[row] for row in rows], [RETAIN[row] for row in kept]

    def relearn(self, rows):
        model = self.attacked()
        with torch.enable_grad():
            weights = {name: self.weight(model, name).requires_grad_() for name in self.a}
            self.nll = -torch.cat([self.logprobs(model, FORGET[row]) for row in rows]).mean()
            gradients = torch.autograd.grad(self.nll, list(weights.values()), allow_unused=True)
        slopes = {n: _as_linear(model, n, g) @ self.a[n].T for n, g in zip(weights, gradients, strict=True)
                  if g is not None}  # fmt: skip
        norm = sum(slope.square().sum() for slope in slopes.values()).sqrt()
        self.gain = float(RHO * norm)
        self.b = {name: self.b.get(name, 0.0) - RHO * slope / norm for name, slope in slopes.items()}

    def attacked(self, sign=1.0):
        """The model under the attacker."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        for name, b in self.b.items():
            self.weight(model, name).add_(_as_linear(model, name, sign * b @ self.a[name]))
        return model

    def without(self):
        """The gradients of the step if there were no attacker."""
        return dense_step(self.trainer, self.forget, self.retain)[1]

    def expected(self, sign=1.0, reference_under_attack=False):
        """The gradients of the step: the forget term's under the attacker, the retain terms' without it."""
        whole, (_, here) = self.without(), dense_step(self.trainer, self.forget, None)
        attacked = self.attacked(sign)
        for name, p in attacked.named_parameters():
            p.requires_grad_(name in whole)
        beta, loss = self.objective.beta, 0.0
        for row in self.forget:
            original = attacked if reference_under_attack else self.model
            with torch.no_grad(), original.disable_adapter():
                before = self.logprobs(original, row).sum()
            ratio = self.logprobs(attacked, row).sum() - before
            loss = loss - 2 / beta * torch.nn.functional.logsigmoid(-beta * ratio) / len(self.forget)
        loss.backward()
        there = {name: p.grad for name, p in attacked.named_parameters() if p.grad is not None}
        return {name: whole[name] - here[name] + there[name] for name in whole}

    @staticmethod
    def weight(model, name):
        layer = causal_lm(model).get_submodule(name)
        return getattr(layer, "base_layer", layer).weight

    @staticmethod
    def logprobs(model, row):
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0].double()
        places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        return torch.stack([logits[t - 1].log_softmax(-1)[row["labels"][t]] for t in places])


def _dense_copy(model):
    model = copy.deepcopy(model).double().eval()
    lm = model.get_base_model()
    lm.set_attn_implementation("eager")
    if lm._can_set_experts_implementation():
        lm.set_experts_implementation("eager")
    return model


def _as_linear(model, name, weight):
    """(out, in) of what a Conv1D has as (in, out), and back."""
    layer = causal_lm(model).get_submodule(name)
    return weight.T if isinstance(getattr(layer, "base_layer", layer), Conv1D) else weight


RUNS = {
    "no switches": {},
    "plain": {"memory": PLAIN, "joint_pass_tokens": 10_000},  # which is for what it would not be under
    "checkpointing": {"memory": {"sliced_float32": False}},
    "everything": {"memory": {"tile_mlp": 5, "offload_checkpoints": True, "embedding_on_cpu": True}, **SPLIT},
    "upper layers": {"adapter": {"lora_layers": ("1",)}, "memory": {}},
    "streamed": {"adapter": {"lora_layers": ("1",)}, "memory": {"stream_weights": True}},
    "all linear": {"adapter": {"lora_targets": ("all-linear",)}, "padding_free": False},
    "gemma2": {"architecture": "gemma2", "memory": {}},
    "conv1d": {
        "architecture": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "adapter": {"lora_targets": ("c_attn",)},
    },
    "experts": {"architecture": MixtralConfig(num_local_experts=4, num_key_value_heads=2, **SIZES)},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_the_forget_gradient_is_taken_under_an_attacker_who_learnt_other_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "ON_CPU", True)
    dense = Dense(trainer_of(tmp_path / "dense", **{**run, "memory": None}))
    expected, without = dense.expected(), dense.without()
    trainer = trainer_of(tmp_path, **run)
    gradients = step_gradients(trainer)
    assert relative_error(gradients, expected) < 1e-4
    assert relative_error(gradients, without) > 1e-2  # without it they are others
    logged = trainer.state.log_history[0]
    assert logged["adversary_nll"] == pytest.approx(dense.nll.item(), rel=1e-4)
    assert logged["adversary_gain"] == pytest.approx(dense.gain, rel=1e-4)
    hooks = [m for m in trainer.model.modules() if m._forward_hooks or "relearning" in m._parameters]
    assert not hooks  # nothing of it stays on the model
    assert all(p.requires_grad == ("lora_" in name) for name, p in trainer.model.named_parameters())


def test_an_attacker_may_go_on_for_several_steps(tmp_path):
    """The third step of the second attacker, at the same weights; the step after it meets a fresh one."""
    dense = Dense(trainer_of(tmp_path / "dense", adversary_steps=3, max_steps=6), step=5)
    settings = {"adversary_steps": 3, "memory": {"tile_mlp": 5}}
    trainers = {steps: trainer_of(tmp_path / str(steps), **settings, max_steps=steps) for steps in (6, 7)}
    gradients = {steps: step_gradients(trainer) for steps, trainer in trainers.items()}
    assert relative_error(gradients[6], expected := dense.expected()) < 1e-4
    logged = trainers[6].state.log_history
    assert logged[5]["adversary_nll"] == pytest.approx(dense.nll.item(), rel=1e-4)
    assert logged[5]["adversary_gain"] == pytest.approx(dense.gain, rel=1e-4)
    for wrong in (dense.without(), gradients[7]):
        assert relative_error(wrong, expected) > 1e-2
    dense.b = {name: b / 3 for name, b in dense.b.items()}  # one that does not go on is about as far
    assert relative_error(dense.expected(), expected) > 1e-2
    assert trainers[7].passes.adversary.began == 6
    assert "stage" not in logged[0]  # of --layered


def test_a_lesson_that_is_not_finite_leaves_an_attacker_as_it_was(tmp_path):
    trainer = trainer_of(tmp_path, adversary_steps=3, max_steps=6)
    adversary, teach = trainer.passes.adversary, trainer.forget_point.add_lesson_gradients

    def lesson(factor=1.0):
        rows = Lesson.of(trainer.step_batches, 0, 1, trainer._rows.taught_again, trainer.data_collator)
        teach(rows, {})
        for layer in linear_layers(causal_lm(trainer.model)).values():
            layer.relearning.grad.mul_(factor)
        return False

    adversary.relearn(0, lesson)
    learnt = [factor.b.clone() for factor in adversary.factors]
    assert any(b.any() for b in learnt)
    for factor in (float("nan"), float("inf")):
        assert not adversary.relearn(1, partial(lesson, factor), began=0).isfinite()  # so that the step does not count
        assert all(map(torch.equal, learnt, (factor.b for factor in adversary.factors)))
    adversary.relearn(2, lesson, began=0)
    assert all(factor.b.isfinite().all() for factor in adversary.factors)
    assert not all(map(torch.equal, learnt, (factor.b for factor in adversary.factors)))


def test_what_a_checkpoint_keeps_of_an_attacker(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path / "one", adversary_steps=2, max_steps=4, save_strategy="steps", save_steps=1)
    trainer.train()
    files = AdapterFiles(tmp_path / "one" / "checkpoint-3")
    kept = load_file(files.adversary)
    assert sum(b.numel() for b in kept.values()) == attacker_size(trainer.model)
    run, lines = RunFiles(tmp_path / "one"), list[str]()
    assert resume_point(run, trainer, 5, lines.append) == str(tmp_path / "one" / "checkpoint-4") and len(lines) == 1
    other = trainer_of(tmp_path / "other", adversary_steps=2, max_steps=4).passes.adversary
    other.resume(files, began=0)  # of a run of another length
    assert not other.factors
    other.resume(files, began=2)
    assert all(torch.equal(kept[name], factor.b) for name, factor in zip(other._layers, other.factors, strict=True))
    # Qwen3-Next's layers went on with other bits where these began elsewhere than all tensors that PyTorch makes.
    assert not any(factor.b.data_ptr() % 64 for factor in other.factors)
    other.factors[0].b[0, 0] = float("nan")
    other.save(files)
    files.digest.unlink()
    resume_point(run, trainer, 5, lines.append)
    damage = "adversary.safetensors is damaged or of another run"
    assert f"--resume: checkpoint-3 is not whole: {damage}. It is damaged-checkpoint-3 now, until" in lines[1]

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20 + 4 * 2**20 - 1))
    config = RunConfig(ModelConfig("model"), output=OutputConfig(output_dir=str(tmp_path)))
    check_disk(config, 0, 0)
    with pytest.raises(UserError, match="the run writes up to"):  # two are kept, and a third comes before one goes
        check_disk(config, 0, 0, 2**20 // 3 + 1)


def test_the_attacker_learns_without_the_adapters_dropout(tmp_path):
    trainer = trainer_of(tmp_path, adapter={"lora_dropout": 0.5})
    dense = Dense(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["adversary_nll"] == pytest.approx(dense.nll.item(), rel=1e-4)
    assert trainer.state.log_history[0]["adversary_gain"] == pytest.approx(dense.gain, rel=1e-4)


def test_mistakes_would_be_noticed(tmp_path, monkeypatch):
    """An attacker who goes the other way, one in the reference, one who learns the step's own rows, and layers that are
    recomputed under another."""
    checkpointed = {"memory": {"sliced_float32": False}}
    dense = Dense(trainer_of(tmp_path / "dense"))
    own = Dense(dense.trainer, rows=dense.trainer.step_batches.step_rows(0)[0])
    gradients = step_gradients(trainer_of(tmp_path / "right", **checkpointed))
    for wrong in (dense.expected(sign=-1.0), dense.expected(reference_under_attack=True), own.expected()):
        assert relative_error(gradients, wrong) > 1e-2
    trainer = trainer_of(tmp_path / "wrong", **checkpointed)

    def weaker_when_recomputed(loss):
        for factors in trainer.passes.adversary.factors:
            factors.b.data.mul_(0.5)
        loss.backward()

    monkeypatch.setattr(trainer.accelerator, "backward", weaker_when_recomputed)
    assert relative_error(step_gradients(trainer), dense.expected()) > 1e-2


def test_with_sam_the_neighbour_is_that_of_the_attacked_loss(tmp_path):
    alone = {"gamma": 0.0, "delta": 0.0}
    dense = Dense(trainer_of(tmp_path / "dense", **alone))
    here = dense.expected()
    norm = sum(g.square().sum() for g in here.values()).sqrt()
    with torch.no_grad():
        for name, p in dense.model.named_parameters():
            if name in here:
                p.add_(0.05 * here[name] / norm)  # the attacker stays that of the weights themselves
    gradients = step_gradients(trainer_of(tmp_path, sam=0.05, **alone))
    assert relative_error(gradients, dense.expected()) < 1e-4
    assert relative_error(gradients, here) > 1e-2


def test_what_a_refusing_term_is_attacked_with_is_the_true_answers(tmp_path):
    refusals = random_rows(12, seed=9)
    tokens = {"forget_term": "idk", "adversary": RHO, "gamma": 0.0, "delta": 0.0}
    with pytest.raises(UserError, match="adversary teaches the true answers, and idk has refusals: give true_dataset"):
        make_trainer(tiny_model(), tmp_path, refusals, None, **tokens)
    trainer = make_trainer(tiny_model(), tmp_path, refusals, None, true_dataset=FORGET, **tokens, **FOUR)
    lesson = Lesson.of(trainer.step_batches, 0, 1, trainer._rows.taught_again, trainer.data_collator)
    taught = [row for batch in lesson.passes for row in batch.rows]
    assert taught == other_rows(trainer.step_batches, 0)
    assert lesson.tokens == sum(len(FORGET[row]["input_ids"]) - FORGET[row]["prompt_length"] for row in taught)


def test_real_four_bit_layers(tmp_path):
    """The attacker on bitsandbytes' own layers is that on their dequantised weights."""
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=False, num_key_value_heads=2, **{**SIZES, "hidden_size": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = load_model(ModelConfig(str(tmp_path / "model"), qlora=True, dtype="float32", device="cpu"))
    trainer = trainer_of(tmp_path, model=model, memory={"tile_mlp": 5})
    plain = load_model(ModelConfig(str(tmp_path / "model"), dtype="float32", device="cpu"))
    four_bit = {name: m for name, m in causal_lm(trainer.model).named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(four_bit) == 2 * 7
    for name, layer in four_bit.items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.get_submodule(name.replace(".base_layer", "")).weight.data.copy_(weight)
    torch.manual_seed(5)
    dense_trainer = trainer_of(tmp_path / "dense", model=plain)
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in dense_trainer.model.named_parameters():
            if name in weights:
                p.copy_(weights[name])
    dense = Dense(dense_trainer)
    gradients = step_gradients(trainer)
    assert relative_error(gradients, dense.expected()) < 1e-4
    assert relative_error(gradients, dense.without()) > 1e-3


def test_a_step_that_runs_out_of_memory_is_repeated_under_the_same_attacker(tmp_path):
    """The second of an attacker, in its lesson, and then in its forget pass: the figures of both are those of the whole
    step."""
    settings = {"adversary_steps": 2, "max_steps": 4}
    whole = trainer_of(tmp_path / "whole", **settings)
    passes = SmallGPU(whole, 10**9).passes
    expected = step_gradients(whole)
    *lesson, forget, _ = passes[12:]
    assert len(lesson) == 2 and forget != max(lesson)
    for most, first in ((max(lesson) - 1, 12), (forget - 1, 14)):
        trainer = trainer_of(tmp_path / str(first), **settings)
        SmallGPU(trainer, most, first=first)
        assert relative_error(step_gradients(trainer), expected) < 1e-5 and trainer.divided.parts > 1
        logged, once = trainer.state.log_history[3], whole.state.log_history[3]
        for name in ("loss", "forget_nll", "adversary_nll", "adversary_gain"):
            assert logged[name] == pytest.approx(once[name], rel=1e-5), name


def batches(rows=12, layered=None, **sizes):
    sizes = {"num_retain": 5, "batch_size": 4, "retain_batch_size": 4, "seed": 3, **sizes}
    if layered is None:
        return StepBatches(rows, **sizes)
    return LayeredBatches(divide(rows, layered, sizes["seed"]), 60, 0.2, **sizes)


def test_the_attacker_learns_rows_that_are_being_forgotten_and_not_in_the_step():
    for sampler in (batches(), batches(23, layered=3), batches(5), batches(9, layered=2, batch_size=3)):
        drawn = set()
        for step in range(60):
            in_step, chosen = set(sampler.step_rows(step)[0]), other_rows(sampler, step)
            others = set(sampler.forgotten(step)) - in_step
            assert len(chosen) == len(set(chosen)) == min(ROWS, len(others)) > 0 and set(chosen) <= others
            assert in_step <= set(sampler.forgotten(step)) and chosen == other_rows(sampler, step)
            drawn |= set(chosen)
        assert len(drawn) == sampler.num_forget  # each of them at some time
    layered = batches(23, layered=3)
    for stage, start in enumerate(layered.starts):
        assert sorted(layered.forgotten(start)) == sorted(row for fold in layered.folds[: stage + 1] for row in fold)


def test_another_form_of_a_row_of_the_step_is_not_another_row():
    def in_two_forms(lines):
        examples = [Example("Who?", f"Person {n % lines}.", f"line {n % lines}", "question/answer") for n in range(12)]
        return TokenizedRows([{"input_ids": [1], "labels": [1], "prompt_length": 0}] * 12, examples, 9)

    sampler = batches()
    rows = in_two_forms(6)
    for step in range(9):
        in_step = {rows.facts[row] for row in sampler.step_rows(step)[0]}
        chosen = other_rows(sampler, step, rows)
        assert chosen and not in_step & {rows.facts[row] for row in chosen}
    assert other_rows(sampler, 0, in_two_forms(2))  # none but other forms: better than no attacker


@pytest.mark.parametrize("split", [(1, 1, 1), (4, 1, 1), (1, 3, 1), (2, 2, 1), (1, 1, 2), (2, 4, 4)])
def test_a_lesson_is_the_same_however_a_step_is_split(split):
    """(micro-batches, processes, parts): together the processes teach its rows once, none in larger passes."""
    micro_batches, processes, parts = split
    collate = collator(0, pack=True)
    lessons = [
        Lesson.of(batches(micro_batches=micro_batches, world_size=processes, rank=rank), 7, parts, FORGET, collate)
        for rank in range(processes)
    ]
    taught = sorted(row for lesson in lessons for batch in lesson.passes for row in batch.rows)
    assert taught == other_rows(batches(), 7)
    largest = -(-4 // (micro_batches * parts * processes))
    assert all(len(batch) <= largest for lesson in lessons for batch in lesson.passes)
    assert {lesson.tokens for lesson in lessons} == {sum(sum(FORGET[row]["labels"][t] != -100
        for t in range(1, len(FORGET[row]["labels"]))) for row in taught)}  # fmt: skip


def test_processes_that_divide_their_passes_unlike_still_share_a_lesson():
    """One has run out of memory, the other not."""
    collate = collator(0, pack=True)
    lessons = [
        Lesson.of(batches(world_size=2, rank=rank), 7, parts, FORGET, collate) for rank, parts in enumerate((4, 1))
    ]
    assert sorted(row for lesson in lessons for batch in lesson.passes for row in batch.rows) == other_rows(
        batches(), 7
    )


def test_each_step_has_a_fresh_attacker_of_the_seed(tmp_path):
    model = attach_lora(tiny_model(), AdapterConfig())
    before = torch.get_rng_state()
    one, again, later = (Adversary(model, RHO, 1, torch.device("cpu")).fresh(step) for step in (0, 0, 1))
    (other,) = (Adversary(model, RHO, 2, torch.device("cpu")).fresh(0),)
    assert torch.equal(torch.get_rng_state(), before)  # it draws from numbers of its own
    for factors in zip(one, again, later, other, strict=True):
        a = [factor.a for factor in factors]
        assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2]) and not torch.equal(a[0], a[3])
        assert a[0].shape[0] == RANK and a[0].abs().max() <= a[0].shape[1] ** -0.5 and not factors[0].b.any()


@pytest.mark.parametrize(
    "rows, layered, message",
    [
        (4, None, "are none: step_batch_size=4, forget rows: 4. Lower step_batch_size"),
        (8, 2, "forget rows in the first fold of layered=2: 4. Lower step_batch_size to 3 or less, do without layered"),
    ],
)
def test_an_attacker_without_other_rows_is_refused(rows, layered, message, tmp_path):
    sizes = {"per_device_train_batch_size": 4, "adversary": 1.0, "layered": layered, "max_steps": 6}
    with pytest.raises(UserError, match=message):
        make_trainer(tiny_model(), tmp_path, FORGET[:rows], RETAIN, **sizes)
    make_trainer(tiny_model(), tmp_path, FORGET[: rows + 2], RETAIN, **sizes)


@pytest.mark.parametrize(
    ("rows", "folds", "batch_size", "message"),
    [
        (1, None, 1, "forget rows: 1. Name more rows, or forget without an attacker."),
        (1, None, 4, "forget rows: 1. Name more rows, or forget without an attacker."),
        (2, None, 2, "forget rows: 2. Lower --batch-size to 1, or forget without an attacker."),
        (8, None, 6, "forget rows: 8. Lower --batch-size to 4 or less, or give --adversary-steps 1."),
        (
            5,
            [[0, 1, 2, 3], [4]],
            1,
            "forget rows in the smallest fold of --layered 2: 1. Do without --layered, or give",
        ),
        (8, [[*range(4)], [*range(4, 8)]], 4, "2: 4. Lower --batch-size to 2 or less, do without --layered, or forget"),
        (5, [[0], [1, 2, 3, 4]], 1, "forget rows in the first fold of --layered 2: 1. Do without --layered, or forget"),
    ],
)
def test_what_to_do_about_too_few_rows(rows, folds, batch_size, message):
    with pytest.raises(UserError, match=message):
        check_others(rows, folds, batch_size, attack_steps=2)
