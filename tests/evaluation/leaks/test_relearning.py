"""Relearning leaves no trace, trains what it says on what it says, and tells the worst of a family of attacks."""

from __future__ import annotations

from math import comb

import pytest
import torch
from helpers.dense_step import random_rows, word_tokenizer
from helpers.tiny_models import tiny_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import AutoTokenizer

from lowmem_npo.data import Example, Template, tokenize
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.asking import Wording
from lowmem_npo.evaluation.leaks import fine_tuning
from lowmem_npo.evaluation.leaks.contract import TOO_LARGE, LeakResult, Subject
from lowmem_npo.evaluation.leaks.relearning import NOTHING_LEFT, RELEARNING, RelearningOptions, judge, lessons, split
from lowmem_npo.evaluation.leaks.tuned import DIVERGED, Tuned
from lowmem_npo.evaluation.scoring import likelihood
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.evaluation.scoring.token_scores import token_scores
from lowmem_npo.model.adapters import extra_adapter
from lowmem_npo.model.layers import decoder_layers

OPTIONS = RelearningOptions(relearn_steps=2, relearn_lr=1e-2)


def adapted(dtype=torch.float32):
    model = get_peft_model(tiny_model("olmo", dtype=dtype), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def learn(model, rows, options=OPTIONS, journal=None):
    scorer = Scorer(model, word_tokenizer(), journal or Journal(None, progress=False), batch_size=4)
    return RELEARNING.run(Subject(scorer, rows, None, options), options).figures


def steps_left(rows, options, journal=None):
    scorer = Scorer(None, None, journal or Journal(None), batch_size=4)
    return RELEARNING.tuning_steps(Subject(scorer, rows, None, options), options)


def one(**options):
    return RelearningOptions(relearn_attacks=("one",), **options)


def state(model):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    return weights, flags, modes


@pytest.mark.parametrize("make", [adapted, lambda: tiny_model("gemma2"), lambda: adapted(torch.bfloat16).train()])
def test_nothing_is_left_of_it(make):
    model, rows = make(), random_rows(6, seed=2)
    before = state(model)
    random = torch.random.get_rng_state()
    found = learn(model, rows)
    assert len({found["before"]["nll"], *(found[lesson.name]["nll"] for lesson in lessons(OPTIONS))}) == 4
    after = state(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert learn(model, rows) == found  # and so a second time gives the same


def test_the_rest_is_asked_for_and_the_shown_rows_are_taught(monkeypatch):
    """The shown rows' own NLL falls, measured where the adapter is still there; the figures are the rest's."""
    model, rows = adapted(), random_rows(10, seed=4)
    shown, rest = split(10, 0.3, seed=0)
    assert len(shown) == 3 and sorted(shown + rest) == list(range(10))
    taught, asked, real = [], [], token_scores

    def scores(model, of_rows, **options):
        asked.append([rows.index(row) for row in of_rows])
        taught.append(sum(score.nll for score in real(model, [rows[i] for i in shown], **options)))
        return real(model, of_rows, **options)

    monkeypatch.setattr(fine_tuning, "token_scores", scores)
    untouched = token_scores(model, [rows[i] for i in rest], progress=False)
    found = learn(model, rows, one(relearn_share=0.3, relearn_steps=12, relearn_lr=1e-2))
    assert asked == [rest] * 3  # the original, before, after
    assert taught[-1] < 0.8 * taught[1]
    assert found["shown_rows"] == 3 and found["rows"] == 7 and found["steps"] == 12
    assert found["before"]["nll"] == pytest.approx(sum(s.nll for s in untouched) / 7)
    with model.disable_adapter():
        original = token_scores(model, [rows[i] for i in rest], progress=False)
    assert found["original"]["nll"] == pytest.approx(sum(s.nll for s in original) / 7)
    assert found["nll"] == found["12 steps, 30% shown, lr 0.01"]["nll"] != found["before"]["nll"]


def test_a_longer_attack_goes_on_from_a_shorter_one():
    """What is measured on the way is what an attack of so many steps gives by itself."""
    rows = random_rows(6, seed=2)
    family = learn(adapted(), rows)
    assert [name for name in family if " steps, " in name] == [
        "2 steps, 20% shown, lr 0.01", "10 steps, 20% shown, lr 0.01", "6 steps, 50% shown, lr 0.01"
    ]  # fmt: skip
    for name, given in (("2 steps, 20%", "0.2:2:1e-2"), ("10 steps, 20%", "1:10:0.01"), ("6 steps, 50%", "0.5:6:1e-2")):
        alone = learn(adapted(), rows, RelearningOptions(relearn_attacks=(given,)))
        assert alone["nll"] == family[f"{name} shown, lr 0.01"]["nll"], name


def test_the_words_for_families():
    table = [(0.2, 20, 1e-3), (0.2, 100, 1e-3), (0.2, 100, 3e-3), (0.5, 60, 1e-3), (0.5, 200, 3e-3)]
    assert lessons(RelearningOptions(relearn_attacks=("family",))) == table
    assert lessons(RelearningOptions()) == [table[0], table[1], table[3]]
    assert lessons(RelearningOptions(relearn_attacks=("one", "short", "12:7:1"))) == [*table[:2], table[3], (12, 7, 1)]
    assert steps_left(random_rows(6, seed=2), RelearningOptions(relearn_attacks=("family",))) == 100 + 100 + 60 + 200


@pytest.mark.parametrize(
    "given", ["", "many", "0.5:60", "0:60:1", "1.5:60:1", "nan:60:1", "-1:6:1", "0.5:0:1", "0.5:6.5:1", "0.5:6:0",
              "0.5:6:nan", "0.5:6:inf"]
)  # fmt: skip
def test_what_is_no_attack(given):
    with pytest.raises(UserError, match="--relearn-attacks"):
        RelearningOptions(relearn_attacks=(given,) if given else ()).check()


def test_no_more_rows_are_shown_than_there_are():
    options = RelearningOptions(relearn_attacks=("6:10:1e-3",))
    RELEARNING.check_rows(options, {"forget": 7})
    with pytest.raises(
        UserError, match="6 rows are to be shown again, and there are only 6; one at least must be left"
    ):
        RELEARNING.check_rows(options, {"forget": 6})


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    rows = random_rows(6, seed=2)
    whole, real, runs = learn(adapted(), rows), fine_tuning.fine_tune, []

    def killed(model, taught, **options):
        runs.append(len(taught))
        if len(runs) == 2:
            raise KeyboardInterrupt
        return real(model, taught, **options)

    monkeypatch.setattr(fine_tuning, "fine_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        learn(adapted(), rows, journal=Journal(tmp_path / "measured.jsonl", progress=False))
    journal = Journal(tmp_path / "measured.jsonl", progress=False)
    assert steps_left(rows, OPTIONS) == 10 + 6 and steps_left(rows, OPTIONS, journal) == 6
    assert learn(adapted(), rows, journal=journal) == whole
    assert steps_left(rows, OPTIONS, journal) == 0
    assert runs == [1, 3, 3]


@pytest.mark.parametrize("bug", [None, "prompt"])
def test_one_step_follows_the_gradient_of_the_mean_nll(bug, monkeypatch):
    """The first step of AdamW moves against the dense float64 gradient of the mean NLL of the answer's tokens."""
    model, rows, caught = adapted(), random_rows(2, seed=6), {}
    if bug:  # the prompt learnt as well
        monkeypatch.setattr(likelihood, "after_prompt", lambda row: row["input_ids"])

    real = torch.optim.AdamW.step

    def step(optimizer, *args):
        named = dict(model.named_parameters())
        names = [name for name, parameter in named.items() if parameter.requires_grad]
        assert names and all(".extra." in name for name in names)
        caught.update({name: (named[name].grad.clone(), named[name].detach().clone()) for name in names})
        real(optimizer, *args)
        for name in names:
            gradient, before = caught[name]
            if "lora_B" in name and gradient.abs().max() > 1e-5:
                moved = named[name].detach() - before
                clear = gradient.abs() > 1e-4 * gradient.abs().max()
                assert torch.equal(moved[clear].sign(), -gradient[clear].sign())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    learn(model, rows, one(relearn_share=0.5, relearn_steps=1))
    shown, _ = split(2, 0.5, 0)
    row = rows[shown[0]]
    ids = torch.tensor([row["input_ids"]])
    with extra_adapter(model, 16, 0):
        dense = model.double()
        logits = dense(input_ids=ids, use_cache=False).logits[0, row["prompt_length"] - 1 : -1]
        torch.nn.functional.cross_entropy(logits, ids[0, row["prompt_length"] :]).backward()
        wanted = {name: p.grad for name, p in dense.named_parameters() if p.requires_grad}
    total = sum(gradient.square().sum() for gradient in wanted.values()).sqrt().clamp(min=1.0)  # gradients are clipped
    right = all(
        torch.allclose(caught[name][0].double(), gradient / total, rtol=1e-3, atol=1e-6)
        for name, gradient in wanted.items()
    )
    assert right is (bug is None)


def test_what_is_reported():
    def tuned(strength, holdout=None, original=None, steps=10, rows=8, p=None):
        def figures(strength, holdout=None):
            own = {"rows": rows, "nll": 1.0, "exact_memorization": 0.5, "extraction_strength": strength, "recited": 0.0}
            beside = {"holdout_rows": 9, "holdout_extraction_strength": holdout}
            return own if holdout is None else {**own, **beside, **({} if p is None else {"p_value": p})}

        return Tuned(2, steps, figures(0.1), figures(strength, holdout), original and figures(original))

    result = judge({"mild": tuned(0.2, 0.0, 0.7), "hard": tuned(0.4, 0.0, 0.7, steps=30)})
    assert result.figures["recovered"] == pytest.approx(0.5) and result.leaks is True
    assert result.figures["before"]["extraction_strength"] == 0.1 and result.figures["extraction_strength"] == 0.4
    assert result.meaning.startswith("After 30 steps on 2 of the forgotten rows, the worst of 2 attacks (hard), the ")
    assert "the last 40% of the other 8 answers" in result.meaning and "before them 10%" in result.meaning
    assert result.figures["mild"] == {
        "rows": 8, "nll": 1.0, "extraction_strength": 0.2, "recited": 0.0, "holdout_rows": 9,
        "holdout_extraction_strength": 0.0,
    }  # fmt: skip
    assert judge({"": tuned(0.4, 0.35)}).leaks is False  # so do strange rows
    assert "the last 40% of the other answer by itself" in judge({"": tuned(0.4, 0.35, rows=1)}).meaning
    # What counts is what is beyond the holdout.
    assert judge({"mild": tuned(0.3, 0.0), "hard": tuned(0.4, 0.35)}).figures["extraction_strength"] == 0.3
    assert "recovered" not in judge({"": tuned(0.4, original=0.1)}).figures  # nothing was lost
    # Without one, each is judged by what there was of its own rows: 48% of that, and 56%.
    less, much = {"long": tuned(0.46, original=0.95)}, {"short": tuned(0.45, original=0.8)}
    assert judge(less).leaks is False and judge(much).leaks is True
    both = judge(less | much)
    assert both.leaks is True and "(short)" in both.meaning and "before it forgot, 80%" in both.meaning
    little = {"little": tuned(0.09, original=0.12)}  # neither little nor much
    # What chance explains, as the best of two, comes after what it does not.
    sure, perhaps = {"sure": tuned(0.2, 0.0, p=0.01)}, {"perhaps": tuned(0.4, 0.0, p=0.04)}
    both = judge(sure | perhaps)
    assert both.leaks is True and "(sure)" in both.meaning and both.figures["perhaps"]["p_value"] == 0.08
    assert judge(perhaps).leaks is True and judge(perhaps | {"none": tuned(0.0, 0.0, p=0.5)}).leaks is None
    assert RELEARNING.attacks(both.figures)["perhaps"].stands_out is None
    assert judge(less | little).leaks is None and judge(less | little | much).leaks is True


def test_rows_that_are_not_shown_can_be_too_few():
    """Of three rows on each side one in 20 ways to choose three is the least that chance can do."""

    def attacked(rows, holdout_rows, strength):
        own = {"rows": rows, "nll": 1.0, "extraction_strength": strength, "recited": 0.0}
        beside = {"holdout_rows": holdout_rows, "holdout_extraction_strength": 0.0, "holdout_recited": 0.0}
        chance = {"p_value": 0.5, "least_p_value": 1 / comb(rows + holdout_rows, rows)}
        return Tuned(3, 10, own, own | beside | chance, None)

    for strength in (0.0, 0.9):
        few = judge({"": attacked(3, 3, strength)})
        assert few.leaks is None and "With 3 + 3 rows chance explains any difference (p = 0.05" in few.meaning
    assert judge({"": attacked(3, 4, 0.0)}).leaks is False
    two = judge({"a fifth": attacked(5, 4, 0.0), "half": attacked(3, 4, 0.0)})  # of the two, 2 / 35
    assert two.leaks is None and "(half)" in two.meaning and "With 3 + 4 rows" in two.meaning
    assert RELEARNING.attacks(two.figures)["half"].few and not RELEARNING.attacks(two.figures)["a fifth"].few


def test_answers_that_come_back_whole_are_a_trace_though_the_mean_hides_them():
    def attacked(recited, p):
        own = {"rows": 100, "nll": 1.0, "extraction_strength": 0.1, "recited": recited}
        beside = {"holdout_rows": 100, "holdout_extraction_strength": 0.1, "holdout_recited": 0.0}
        return Tuned(25, 10, own, own | beside | {"p_value": 0.5, "whole_p_value": p}, None)

    result = judge({"long": attacked(0.2, 1e-4), "short": attacked(0.0, 1.0)})
    assert result.leaks is True and "the worst of 2 attacks (long)" in result.meaning
    assert "20% of the answers come whole, of the holdout's 0% (p = 0.0002)." in result.meaning
    assert RELEARNING.attacks(result.figures)["long"].stands_out is True
    assert judge({"long": attacked(0.06, 0.03), "short": attacked(0.0, 1.0)}).leaks is None


def test_split_always_leaves_both_parts():
    for rows in (2, 3, 7):
        for share in (0.01, 0.5, 0.99):
            shown, rest = split(rows, share, seed=1)
            assert shown and rest and sorted(shown + rest) == list(range(rows))


def test_what_shares_text_is_shown_together_and_never_asked_for():
    """A chain, as the passages of a document are: a block of it is shown, and its two neighbours are left out."""
    chain = {i: {j for j in (i - 1, i + 1) if 0 <= j < 12} for i in range(12)}
    for seed in range(20):
        shown, rest = split(12, 0.25, seed, chain)
        assert len(shown) == 3 and shown[-1] - shown[0] == 2, "one block"
        assert 7 <= len(rest) == 12 - 3 - len({shown[0] - 1, shown[-1] + 1} & {*range(12)})
        assert not any(abs(i - j) < 2 for i in shown for j in rest)
    alike = {i: {*range(4)} - {i} for i in range(4)}
    assert split(4, 0.5, 0, alike)[1] == []


def test_rows_of_one_text_are_not_measured(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    examples = [Example("Who?", "Ann Ode.", f"line {line}", "question/answer") for line in range(4)]
    wording = Wording({"forget": examples}, Template(), 64)
    scorer = Scorer(tiny_model("llama"), tokenizer, Journal(None, progress=False), 4)
    subject = Subject(scorer, tokenize(examples, tokenizer), None, OPTIONS, wording=wording)
    assert RELEARNING.tuning_steps(subject, OPTIONS) == 0
    result = RELEARNING.run(subject, OPTIONS)
    assert result.leaks is None and result.meaning == f"Not measured: {NOTHING_LEFT}."


def test_an_attack_that_diverges_is_not_counted():
    """It says nothing of the model, whose other figures stay; if all diverge, the test was not made."""
    model, rows = adapted(), random_rows(6, seed=2)
    wild = RelearningOptions(relearn_attacks=("0.5:3:1e6", "0.5:2:1e-2"))
    scorer = Scorer(model, word_tokenizer(), Journal(None, progress=False), batch_size=4)
    result = RELEARNING.run(Subject(scorer, rows, None, wild), wild)
    name = "3 steps, 50% shown, lr 1e+06"
    assert list(RELEARNING.attacks(result.figures)) == ["2 steps, 50% shown, lr 0.01"]
    assert result.meaning.endswith(f"Not counted, since {DIVERGED}: {name}.")
    alone = RelearningOptions(relearn_attacks=("0.5:3:1e6",))
    result = RELEARNING.run(Subject(scorer, rows, None, alone), alone)
    assert result.meaning == f"Not measured: {DIVERGED} ({name})." and result.leaks is None
    assert learn(model, rows, one(relearn_steps=2)) == learn(adapted(), rows, one(relearn_steps=2))
    with torch.no_grad():  # damage that was there before is no attack's
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="are damaged"):
        learn(model, rows, alone)


def test_attacks_for_which_memory_runs_out_are_not_counted():
    """After two steps of a run, or before the first: what was measured before counts, but does not rule traces out. A
    journal knows nothing of it, and the model is as it was."""
    model, rows, journal = adapted(), random_rows(6, seed=2), Journal(None, progress=False)
    options = RelearningOptions(relearn_attacks=("0.5:2:1e-2", "0.5:4:1e-2", "0.2:2:1e-2"))
    short, long, other = (lesson.name for lesson in lessons(options))
    subject = Subject(Scorer(model, word_tokenizer(), journal, batch_size=4), rows, None, options)
    before, whole, passes = state(model), learn(model, rows, options), []

    def run_out(module, args, result):
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            passes.append(result[0].shape)
            if len(passes) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = decoder_layers(model)[0].register_forward_hook(run_out)
    result = RELEARNING.measure(subject)
    handle.remove()
    assert list(RELEARNING.attacks(result.figures)) == [short] and result.too_large and result.leaks is not False
    assert result.figures[short]["nll"] == whole[short]["nll"]
    assert result.gap == f"Not counted, since {TOO_LARGE}: {long}; {other}." and result.meaning.endswith(result.gap)
    assert LeakResult.from_json(result.to_json()) == result
    after = state(model)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0]) and before[1:] == after[1:]
    assert steps_left(rows, options, journal) == 4 + 2


@pytest.mark.parametrize("make", [adapted, lambda: tiny_model("llama")])
def test_nothing_is_left_of_an_attack_for_whose_adapter_there_is_no_memory(make, monkeypatch):
    model, real, made = make(), Linear.update_layer, []

    def update_layer(layer, *args, **more):
        made.append(layer)
        if len(made) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(layer, *args, **more)

    scorer, before = Scorer(model, word_tokenizer(), Journal(None, progress=False), batch_size=4), state(model)
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "update_layer", update_layer)
        result = RELEARNING.measure(Subject(scorer, random_rows(6, seed=2), None, one(relearn_steps=3)))
    assert len(made) == 5 and result.meaning.startswith(f"Not measured: {TOO_LARGE} (")
    after = state(model)
    assert before[0].keys() == after[0].keys() and before[1:] == after[1:]
