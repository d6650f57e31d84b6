"""One optimiser step: its gradients, what it never makes, and that no split of it changes anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.dense_step import dense_step, make_trainer, random_rows, relative_error, step_gradients
from helpers.tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_npo.config import AdapterConfig
from lowmem_npo.memory.checkpointing import enable_checkpointing
from lowmem_npo.model import attach_lora

OBJECTIVES = {
    "default": {},
    "token": {"normalization": "token"},
    "length, reversed KL": {"normalization": "length", "kl_direction": "reference-policy"},
    "only forget": {"gamma": 0.0, "delta": 0.0},
    "only KL": {"gamma": 0.0, "delta": 2.0},
    "no KL": {"delta": 0.0},
    "ga": {"forget_term": "ga"},
    "simnpo": {"forget_term": "simnpo", "beta": 2.5, "simnpo_margin": 0.1},
    "idk": {"forget_term": "idk"},
    "wga": {"forget_term": "wga", "wga_beta": 0.3},
    "satimp": {"forget_term": "satimp", "satimp_beta1": 0.3, "satimp_beta2": 2.0},
    "jensun": {"forget_term": "jensun", "gamma": 0.0, "delta": 0.0},
}


@pytest.fixture(scope="module")
def rows():
    return random_rows(4, seed=1), random_rows(4, seed=2)


@pytest.mark.parametrize("architecture", ["olmo", "llama", "gemma2", "granite"])
def test_gradients_of_every_architecture_are_the_dense_float64_ones(architecture, rows, tmp_path):
    check_gradients(architecture, rows, tmp_path, {})


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_gradients_of_every_objective_are_the_dense_float64_ones(objective, rows, tmp_path):
    check_gradients("olmo", rows, tmp_path, objective)


@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}])
def test_gradients_of_a_preferred_answer_are_the_dense_float64_ones(split, rows, tmp_path):
    """Each forget row with an answer of its own, which is longer or shorter; a mix-up of pairs is noticed."""
    forget, retain = rows
    others = random_rows(4, seed=3)
    settings = {"forget_term": "dpo", "beta": 0.3}
    trainer = make_trainer(tiny_model("olmo"), tmp_path, forget, retain, others, **settings, **split)
    loss, expected = dense_step(trainer, forget, retain, others)
    with torch.no_grad():
        tables = [trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1) for row in forget]
    of_answers = [
        -table[t - 1, row["labels"][t]].item()
        for table, row in zip(tables, forget, strict=True)
        for t in range(1, len(row["labels"]))
        if row["labels"][t] != -100
    ]
    gradients = step_gradients(trainer)
    assert relative_error(gradients, expected) < 2e-5
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["forget_nll"] == pytest.approx(sum(of_answers) / len(of_answers), rel=1e-4)  # of no other answers
    _, mixed = dense_step(trainer, forget, retain, others[1:] + others[:1])
    assert relative_error(gradients, mixed) > 1e-3


@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}])
def test_the_forget_gradient_of_sam_is_the_neighbours(split, rows, tmp_path):
    """In dense float64: the whole step's forget gradient finds the neighbour, at which it is taken anew; the retain
    terms' is of the weights themselves, which are left where they were."""
    forget, retain = rows
    trainer = make_trainer(tiny_model("olmo"), tmp_path, forget, retain, sam=0.05, learning_rate=0.0, **split)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    own = {name: p.detach().clone() for name, p in trained.items()}
    loss, whole = dense_step(trainer, forget, retain)
    loss_here, here = dense_step(trainer, forget, None)
    norm = sum(g.square().sum() for g in here.values()).sqrt()
    with torch.no_grad():
        for name, p in trained.items():
            p.add_(0.05 * here[name] / norm)
    loss_there, there = dense_step(trainer, forget, None)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(own[name])
    expected = {name: whole[name] - here[name] + there[name] for name in whole}
    gradients = step_gradients(trainer)
    assert relative_error(gradients, expected) < 1e-4
    assert relative_error(gradients, whole) > 1e-2  # without it they are others
    assert all(torch.equal(p, own[name]) for name, p in trained.items())
    logged = trainer.state.log_history[0]  # the pass that finds the neighbour does not count
    assert logged["forget_loss"] == pytest.approx(loss_there, rel=1e-4)
    assert logged["loss"] == pytest.approx(loss - loss_here + loss_there, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"normalization": "token"}, {"adversary": 0.5}, {"forget_term": "ga"},
                                      {"lora_layers": ("1",)}], ids=str)  # fmt: skip
def test_sam_runs_the_reference_once_and_has_the_gradients_of_one_that_runs_twice(settings, tmp_path):
    """In two steps of two micro-batches; the layers below the adapters, where there are any, are run all the same."""
    forget, retain = random_rows(8, seed=1), random_rows(8, seed=2)
    settings = {"sam": 0.05, "max_steps": 2, "gradient_accumulation_steps": 2, **settings}
    adapter = AdapterConfig(lora_r=3, lora_layers=settings.pop("lora_layers", ()))

    class Forgetful(dict):
        def __setitem__(self, rows, reference):
            pass

    def run(folder, kept):
        model = attach_lora(tiny_model("olmo"), adapter)
        trainer = make_trainer(model, tmp_path / folder, forget, retain, per_device_train_batch_size=2, **settings)
        assert len(trainer.passes.prefix.modules) == (2 if adapter.lora_layers else 1)
        trainer.passes.kept, passes, logprobs = kept, [], trainer.passes.reference.answer_logprobs
        trainer.passes.reference.answer_logprobs = lambda batch: passes.append(batch) or logprobs(batch)
        trainer.train()
        assert not trainer.passes.kept
        return len(passes), {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}

    (once, own), (twice, expected) = run("once", {}), run("twice", Forgetful())
    assert (once, twice) == ((0, 0) if "forget_term" in settings else (4, 8))
    assert all(torch.equal(own[name], expected[name]) for name in expected)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("passes", [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
                                    {"joint_pass_tokens": 10**6}], ids=["split", "joint"])  # fmt: skip
def test_what_is_logged_is_what_its_names_say(normalization, passes, rows, tmp_path):
    """NLL and KL per answer token, and the mean log-ratio of an answer, from full logits."""
    trainer = make_trainer(
        tiny_model("olmo"), tmp_path, *rows, step_batch_size=4, normalization=normalization, **passes
    )

    @torch.no_grad()
    def tables(row):  # of policy and original, and the answer's tokens
        places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        ids, at = torch.tensor([row["input_ids"]]), [t - 1 for t in places]
        policy = trainer.model(input_ids=ids).logits[0, at].double().log_softmax(-1)
        with trainer.model.disable_adapter():
            original = trainer.model(input_ids=ids).logits[0, at].double().log_softmax(-1)
        return policy, original, torch.tensor([row["labels"][t] for t in places])[:, None]

    forget, retain = ([tables(row) for row in of_part] for of_part in rows)
    nll = {name: -torch.cat([p.gather(1, ids) for p, _, ids in of_part]).mean().item()
           for name, of_part in (("forget_nll", forget), ("retain_nll", retain))}  # fmt: skip
    ratios = [(p.gather(1, ids) - q.gather(1, ids)).sum().item() for p, q, ids in forget]
    kl = torch.cat([(p.exp() * (p - q)).sum(1) for p, q, _ in retain]).mean().item()
    trainer.train()
    expected = nll | {"forget_log_ratio": sum(ratios) / len(ratios), "retain_kl": kl}
    logged = trainer.state.log_history[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("term", ["forget", "retain", "kl"])
def test_gradients_of_each_term_alone(term, rows, tmp_path):
    """Alone, so that a wrong small term cannot hide behind a large one: a near-zero NPO weight leaves the other two."""
    settings = {
        "forget": {"gamma": 0.0, "delta": 0.0},
        "retain": {"gamma": 1e6, "delta": 0.0},
        "kl": {"gamma": 0.0, "delta": 1e6},
    }[term]
    check_gradients("olmo", rows, tmp_path, settings)


def check_gradients(architecture, rows, folder, settings):
    forget, retain = rows
    trainer = make_trainer(tiny_model(architecture), folder, forget, retain, **settings)
    enable_checkpointing(trainer.model.get_base_model())
    loss, expected = dense_step(trainer, forget, retain if trainer.passes.objective.needs_retain else None)
    assert relative_error(step_gradients(trainer), expected) < 2e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_wrong_gradient_would_be_noticed(rows, tmp_path):
    """The same comparison fails for a slightly wrong beta and for a dropped softcap."""
    forget, retain = rows
    trainer = make_trainer(tiny_model("olmo"), tmp_path / "a", forget, retain)
    _, expected = dense_step(trainer, forget, retain)
    trainer.passes.objective.beta *= 1.01
    assert relative_error(step_gradients(trainer), expected) > 1e-4

    trainer = make_trainer(tiny_model("gemma2"), tmp_path / "b", forget, retain)
    _, expected = dense_step(trainer, forget, retain)
    passes = trainer.passes
    passes.head = passes.reference.head = replace(passes.head, softcap=None)
    assert relative_error(step_gradients(trainer), expected) > 1e-3


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operator's result has."""

    def __init__(self):
        super().__init__()
        self.elements, self.shape = 0, ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.elements:
                self.elements, self.shape = leaf.numel(), tuple(leaf.shape)
        return result


@pytest.mark.parametrize("vocabulary", [50304, 1000])
def test_no_tensor_is_as_large_as_the_logits(vocabulary, tmp_path):
    forget, retain = random_rows(12, 3, vocabulary), random_rows(12, 4, vocabulary)
    trainer = make_trainer(tiny_model("olmo", vocabulary), tmp_path, forget, retain)
    tokens = [sum(label != -100 for row in part for label in row["labels"][1:]) for part in (forget, retain)]
    logits = min(tokens) * vocabulary
    with LargestTensor() as largest:
        trainer.train()
    assert largest.elements < logits, f"{largest.shape} has as many elements as {tokens} x {vocabulary} logits"
    assert largest.elements > 0

    with LargestTensor() as largest:  # the dense form is caught
        batch = trainer.data_collator([trainer.train_dataset[pick] for pick in next(iter(trainer.step_batches))])
        trainer.model(input_ids=batch["retain"].input_ids, use_cache=False).logits.log_softmax(-1)
    assert largest.elements >= logits


@pytest.mark.parametrize("objective", ["default", "token", "ga"])
def test_micro_batches_do_not_change_the_gradient(objective, tmp_path):
    forget, retain = random_rows(8, 5), random_rows(8, 6)
    steps = {}
    for size, count in ((8, 1), (4, 2), (2, 4), (3, 3)):
        trainer = make_trainer(
            tiny_model("olmo"),
            tmp_path / str(size),
            forget,
            retain,
            step_batch_size=8,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            **OBJECTIVES[objective],
        )
        steps[size] = step_gradients(trainer), trainer.state.log_history[0]
    whole, log = steps.pop(8)
    for gradients, other in steps.values():
        assert relative_error(gradients, whole) < 1e-5
        for name in ("loss", "forget_loss", "forget_nll", "retain_nll", "retain_kl"):
            assert other[name] == pytest.approx(log[name], rel=1e-5)


def test_what_is_clipped_is_the_gradient_of_the_whole_step(rows, tmp_path):
    forget, retain = rows
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tiny_model("olmo"), tmp_path, forget, retain, max_grad_norm=0.05, **split)
    _, whole = dense_step(trainer, forget, retain)
    norm = float(sum(g.square().sum() for g in whole.values()).sqrt())
    clipped = {name: g * 0.05 / norm for name, g in whole.items()}
    assert relative_error(step_gradients(trainer), clipped) < 2e-5
    assert norm > 0.1 and trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_mean_of_means_would_be_noticed(tmp_path, monkeypatch):
    """The Trainer's default, dividing by each micro-batch's own counts, fails the same comparison."""
    import lowmem_npo.training.trainer as module

    forget, retain = random_rows(8, 5), random_rows(8, 6)
    whole = step_gradients(make_trainer(tiny_model("olmo"), tmp_path / "whole", forget, retain, step_batch_size=8))
    trainer = make_trainer(
        tiny_model("olmo"),
        tmp_path / "split",
        forget,
        retain,
        step_batch_size=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    right = module.NPOTrainer.training_step

    def own_means(self, model, inputs, totals):
        forget, retain = inputs["forget"], inputs["retain"]
        own = module.StepTotals(len(forget) * 2, forget.num_answers * 2, retain.num_answers * 2)
        return right(self, model, inputs, own)

    monkeypatch.setattr(module.NPOTrainer, "training_step", own_means)
    assert relative_error(step_gradients(trainer), whole) > 1e-3


def test_the_adapter_alone_learns(rows, tmp_path):
    trainer = make_trainer(tiny_model("olmo"), tmp_path, *rows, learning_rate=1e-2, max_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)


def test_no_gradient_below_the_lowest_adapter(rows, tmp_path):
    """Checkpointing must not make the embedding's output require grad: nothing below the adapters has a gradient."""
    model = tiny_model("olmo")
    enable_checkpointing(model)
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, output: embedded.append(output.requires_grad))
    make_trainer(model, tmp_path, *rows).train()
    assert embedded and not any(embedded)


def test_attention_does_not_plan_anew_for_every_length(rows, tmp_path):
    """As cuDNN's would on a GPU."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_trainer(tiny_model("olmo"), tmp_path, *rows).train()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
