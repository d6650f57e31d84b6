"""Figures under open-unlearning's names, against its definitions written out on dense float64 logits."""

from __future__ import annotations

import json
import zlib
from contextlib import nullcontext
from dataclasses import replace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from helpers.architectures import tiny_config
from helpers.dense_step import random_rows, word_tokenizer
from helpers.tiny_models import CONFIGS, tiny_model
from lowmem_kernels import FrozenHead
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer

from lowmem_npo.config import AdapterConfig, ModelConfig
from lowmem_npo.data import Example, Rows, Template, tokenize
from lowmem_npo.estimate.simulator.storages import StorageCounter
from lowmem_npo.evaluation.benchmarks.muse import FORGOTTEN, KEPT, TAUGHT, VERBATIM, MuseAnswer
from lowmem_npo.evaluation.benchmarks.tofu import TofuAnswer, TofuScores, TofuSet, measure_tofu, score_tofu, tofu_rows
from lowmem_npo.evaluation.open_unlearning import (
    _standard,
    exact_memorization,
    extraction_strength,
    gradient_figure,
    muse_figures,
    privleak,
    reference_figure,
    retained_min_k,
    tofu_figures,
    token_figures,
)
from lowmem_npo.evaluation.scoring.gradient_norms import gradient_norms
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.evaluation.scoring.token_scores import TokenScores, token_scores, vocabulary_statistics
from lowmem_npo.memory.checkpointing import enable_checkpointing, is_checkpointed
from lowmem_npo.model import attach_lora, load_model
from lowmem_npo.model.layers import causal_lm, decoder_layers


def reciting_model(rows):
    """A tiny model that has learnt some of `rows`, so that memorisation is neither nothing nor everything."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        for row in rows:
            labels = torch.tensor([row["labels"]])
            model(input_ids=torch.tensor([row["input_ids"]]), labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


def by_hand(model, sets, tokenizer):
    """The functions of its src/evals/metrics, on full float64 logits."""
    model, found = model.double(), {}
    attacks = {name: {part: [] for part in sets} for name in ("loss", "min_k", "min_k_plus_plus", "zlib")}
    memorized, strengths = [], []
    for part, rows in sets.items():
        for row in rows:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            logp = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)[:-1]
            own = logp.gather(1, ids[1:, None])[:, 0]
            loss = -own[labels[1:] != -100].mean().item()
            places = (labels != -100).nonzero()[:, 0][:-1] - 1  # the prediction of EOS is left out
            vocabulary, tokens = logp[places], own[places].numpy()
            mu = (vocabulary.exp() * vocabulary).sum(-1)
            sigma = ((vocabulary.exp() * vocabulary.square()).sum(-1) - mu.square()).clamp(min=1e-6)
            standard = ((torch.tensor(tokens) - mu) / sigma.sqrt()).numpy()
            k = max(1, int(len(tokens) * 0.4))
            text = tokenizer.decode(ids[labels != -100].tolist(), skip_special_tokens=True)
            attacks["loss"][part].append(loss)
            attacks["zlib"][part].append(loss / len(zlib.compress(text.encode("utf-8"))))
            attacks["min_k"][part].append(-np.mean(np.sort(tokens)[:k]) if len(tokens) else 0)
            attacks["min_k_plus_plus"][part].append(-np.mean(np.sort(standard)[:k]) if len(tokens) else 0)
            if part == "forget":
                predicted, true = vocabulary.argmax(-1), ids[places + 1]
                if len(true):
                    memorized.append((predicted == true).double().mean().item())
                k = 0
                for k in range(len(true)):
                    if torch.equal(predicted[k:], true[k:]):
                        break
                strengths.append(1 - k / len(true) if len(true) else 0)
    for name, scores in attacks.items():
        labels = [0] * len(scores["forget"]) + [1] * len(scores["holdout"])
        found[f"mia_{name}"] = roc_auc_score(labels, scores["forget"] + scores["holdout"])
    return found | {"exact_memorization": np.mean(memorized), "extraction_strength": np.mean(strengths)}


def test_figures_are_those_of_its_definitions():
    rows = random_rows(16, seed=4)
    tokenizer = word_tokenizer()
    for row in rows:  # as rows are: the last token is EOS
        row["input_ids"], row["labels"] = [*row["input_ids"], 1], [*row["labels"], 1]
    only_eos = {"input_ids": [5, 6, 1], "labels": [-100, -100, 1], "prompt_length": 2}
    sets = {"forget": [*rows[:8], only_eos], "holdout": rows[8:]}
    model = reciting_model(rows[:5])
    scores = {name: token_scores(model, of_set, progress=False) for name, of_set in sets.items()}
    figures = token_figures(scores, sets, tokenizer)
    expected = by_hand(model, sets, tokenizer)
    assert figures.pop("privleak") == pytest.approx(((1 - expected["mia_min_k"]) - 0.5) / 0.5 * 100)
    assert figures == pytest.approx(expected, rel=1e-4)
    assert 0.2 < figures["extraction_strength"] < 0.9 and figures["mia_min_k"] > 0.6  # nothing is trivial
    with_eos = {name: [_doubled(one) for one in of_set] for name, of_set in scores.items()}
    assert token_figures(with_eos, sets, tokenizer) != pytest.approx(figures, rel=1e-4)  # EOS counted: noticed
    forget_alone = token_figures({"forget": scores["forget"]}, sets, tokenizer)
    assert set(forget_alone) == {"exact_memorization", "extraction_strength"}


ALL_LINEAR = AdapterConfig(lora_r=4, lora_targets=("all-linear",))


def model_of(architecture):
    return tiny_model(architecture if architecture in CONFIGS else tiny_config(architecture, 97))


def norms_by_hand(model, rows):
    """Its gradient norm, on full float64 logits and every gradient of the model at once."""
    model, norms = model.double().requires_grad_(True), []
    model.config._experts_implementation = "eager"  # the only one in float64
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logp = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)[:-1]
        places = (labels != -100).nonzero()[:, 0][:-1] - 1
        model.zero_grad()
        (-logp.gather(1, ids[1:, None])[places, 0].mean()).backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).mean().item())
    return norms


@pytest.mark.parametrize(
    ("architecture", "adapter", "std"),
    [
        ("gemma2", None, 0),
        ("llama", {"use_dora": True, "modules_to_save": ("norm",)}, 0.3),
        ("deepseek_v3", {}, 0.3),
        ("zamba2", {}, 0),
    ],
)
def test_gradient_norms_are_those_of_the_merged_model(architecture, adapter, std):
    """gemma2: a tied head, softcap and norms of its own; deepseek_v3: adapted experts; zamba2: layers with weights in
    common, into which only an adapter that adds nothing can be merged."""
    rows = random_rows(3, seed=4)
    rows = [{**row, "input_ids": [*row["input_ids"], 1], "labels": [*row["labels"], 1]} for row in rows]
    model = model_of(architecture)
    if adapter is not None:
        model = attach_lora(model, replace(ALL_LINEAR, **adapter))
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=std)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    norms = gradient_norms(model, rows)
    for name, p in model.named_parameters():
        assert p.grad is None and p.requires_grad == before[name][0] and torch.equal(p, before[name][1])
    merged = model.merge_and_unload() if adapter is not None else model
    assert norms == pytest.approx(norms_by_hand(merged, rows), rel=1e-4)
    left = next(p.grad for p in merged.float().parameters() if p.grad is not None)  # by hand; it is not to count
    assert left.abs().sum() > 0 and gradient_norms(merged, rows) == pytest.approx(norms, rel=1e-4)
    only_eos = {"input_ids": [5, 6, 1], "labels": [-100, -100, 1], "prompt_length": 2}
    assert gradient_norms(merged, [only_eos]) == [None]
    assert gradient_figure({"forget": [1.0, 3.0, None], "holdout": [2.0]}) == 0.5
    assert gradient_figure({"forget": [None], "holdout": [2.0]}) is None


@pytest.mark.parametrize("architecture", ["llama", "zamba2"])
def test_gradient_norms_of_a_4_bit_model_are_those_of_what_it_computes(architecture, tmp_path):
    rows = random_rows(2, seed=4)
    model_of(architecture).save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path), qlora=True, dtype="float32", device="cpu"))
    norms = gradient_norms(model, rows)
    plain, layers = model_of(architecture), dict(model.named_modules())
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layers[name], bnb.nn.Linear4bit):
                weight = layers[name].weight
                layer.weight.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    assert norms == pytest.approx(norms_by_hand(plain, rows), rel=1e-4)
    assert norms != pytest.approx(norms_by_hand(model_of(architecture), rows), rel=1e-3)
    assert gradient_norms(attach_lora(model, ALL_LINEAR), rows) == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("architecture", ["olmo", "zamba2"])
def test_gradient_norms_are_the_same_whether_or_not_layers_are_recomputed(architecture, tmp_path, monkeypatch):
    rows = random_rows(2, seed=4)
    model_of(architecture).save_pretrained(tmp_path)
    models = [load_model(ModelConfig(str(tmp_path), qlora=qlora, device="cpu")) for qlora in (False, True)]
    models.append(attach_lora(model_of(architecture), replace(ALL_LINEAR, use_dora=True)))
    recomputed = [gradient_norms(model, rows) for model in models]
    with monkeypatch.context() as patch:
        patch.setattr("lowmem_npo.evaluation.scoring.gradient_norms.checkpointing", lambda lm: nullcontext())
        assert recomputed == [pytest.approx(gradient_norms(model, rows), rel=1e-6) for model in models]
    for model in models:
        assert not any(map(is_checkpointed, decoder_layers(model)))
        enable_checkpointing(causal_lm(model))  # by whoever trains it
    assert recomputed == [pytest.approx(gradient_norms(model, rows), rel=1e-6) for model in models]


@pytest.mark.parametrize("qlora", [False, True])
def test_memory_for_gradient_norms(qlora, tmp_path):
    """Each layer more keeps its input, one float32 state of each token, and beside that hardly anything; the largest
    gradient has no copy in float32."""

    def peak(tokens: int, layers: int, vocabulary: int) -> int:
        config = CONFIGS["llama"](vocabulary)
        config.num_hidden_layers = layers
        tiny_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
        model = load_model(ModelConfig(str(tmp_path), qlora=qlora, device="cpu", attn="eager"))
        ids = [5] * (tokens - 2) + [7, 1]
        row = {"input_ids": ids, "labels": [-100] * (tokens - 2) + [7, 1], "prompt_length": tokens - 2}
        gradient_norms(model, [row])  # what is made once
        with StorageCounter("cpu") as counter:
            counter.mark([*model.parameters(), *model.buffers()], "before")
            counter.restart_peak()
            before = counter.live
            gradient_norms(model, [row])
        return counter.peak - before

    state = 100 * CONFIGS["llama"](97).hidden_size * 4
    assert peak(100, 12, 97) - peak(100, 4, 97) < 8 * 1.5 * state
    embedding = 50_000 * CONFIGS["llama"](97).hidden_size * 2
    assert 2 * embedding < peak(4, 2, 50_000) < 2.2 * embedding  # as the product gives it, and as the weight lies


def test_the_loss_beside_a_reference_model_by_hand():
    scores = {"forget": [row(True), row(True)], "holdout": [row(True)]}  # each with an NLL of 1
    assert reference_figure(scores, {"forget": [1.5, 0.5], "holdout": [1.0]}) == 0.5
    assert reference_figure(scores, {"forget": [1.5, 1.5], "holdout": [1.0]}) == 1


def test_a_model_that_is_certain_of_other_tokens():
    """As gradient ascent ends, with NLLs of hundreds of nats: beside a logit that is 800 above all others no spread is
    left, and theirs is taken as 1e-6. The forgotten answer is far below what was expected, not at it."""
    head, hidden = FrozenHead(torch.tensor([[800.0], [0.0]])), torch.ones(3, 1)

    def scored(*tokens):
        return TokenScores(*(x.tolist() for x in vocabulary_statistics(hidden, head, torch.tensor(tokens))))

    scores = {"forget": [scored(1, 1, 0)], "holdout": [scored(0, 0, 0)]}
    assert _standard(scores["forget"][0]) == pytest.approx([-800 / 1e-3, -800 / 1e-3, 0])
    rows = {name: [{"input_ids": [5, 6, 7, 1], "prompt_length": 1}] for name in scores}
    assert token_figures(scores, rows, word_tokenizer())["mia_min_k_plus_plus"] == 0


def _doubled(row: TokenScores) -> TokenScores:
    """The row with its last token twice, of which only one is then left out."""
    return TokenScores(*([*column, column[-1]] for column in (row.logprobs, row.standard, row.greedy, row.deviation)))


def row(*greedy: bool) -> TokenScores:
    return TokenScores([-1.0] * len(greedy), [0.0] * len(greedy), list(greedy), [1.0] * len(greedy))


def test_of_a_text_the_first_token_is_not_among_its_bytes():
    """Theirs labels it no more than a prompt: nothing precedes it."""
    scores = {name: [row(True, True)] for name in ("forget", "holdout")}
    rows = {"forget": [{"input_ids": [5, 7, 1], "prompt_length": 0}],
            "holdout": [{"input_ids": [5, 7, 1], "prompt_length": 1}]}  # fmt: skip
    assert token_figures(scores, rows, word_tokenizer())["mia_zlib"] == 0.5


def test_memorisation_by_hand():
    """The last of each is EOS, which does not count."""
    assert extraction_strength(row(True, True, False)) == 1
    assert extraction_strength(row(True, False, True, True, False)) == 0.5
    assert extraction_strength(row(True, False, True)) == 0.5  # theirs: not even the last token, and still 1 / tokens
    assert extraction_strength(row(True)) == 0
    assert exact_memorization(row(True, False, True, True)) == pytest.approx(2 / 3)
    assert exact_memorization(row(True)) is None


def test_privleak_by_hand():
    assert privleak(0.5, 0.5) == 0
    assert privleak(1.0, 0.5) == pytest.approx(-100)  # all are recognised
    assert privleak(0.0, 0.6) == pytest.approx((1 - 0.4) / 0.4 * 100)


def test_tofu_under_its_names():
    of_set = TofuSet(2, 0.1, 0.2, 0.3, [1.0, 2.0])
    scores = TofuScores({"forget": of_set, "real authors": of_set}, None, 0.7)
    assert tofu_figures(scores, {}, word_tokenizer()) == {
        "forget_Q_A_Prob": 0.1, "forget_Q_A_ROUGE": 0.2, "forget_truth_ratio": 0.3,
        "ra_Q_A_Prob_normalised": 0.1, "ra_Q_A_ROUGE": 0.2, "ra_Truth_Ratio": 0.3,
        "forget_quality": 0.7,
    }  # fmt: skip
    assert tofu_figures(None, {}, word_tokenizer()) == {}


def test_how_much_of_other_answers_comes_by_hand():
    """ROUGE-L recall in the greedy answer "Anna sails": words of each, of these those that came; a row's averaged."""
    texts = [
        ({"paraphrased_answer": ["It is Anna", "Anna"], "perturbed_answer": ["Ida sails", "Oslo"]},
         (1 / 3 + 1) / 2, (1 / 2 + 0) / 2),
        ({"perturbed_answer": ["Anna did n't"]}, 2 / 2, 1 / 3),  # in other words: the answer; a wrong one is cleaned up
    ]  # fmt: skip
    rows = [{"question": "Who?", "answer": "Anna sails", **row} for row, *_ in texts]
    parsed = tofu_rows(Rows("rows", rows), "forget")
    answers = [TofuAnswer(row, 1.0, (1.0,), (1.0,), "Anna sails") for row in parsed]
    of_set = score_tofu("forget", answers, word_tokenizer())
    scores = TofuScores({"forget": of_set, "retain": of_set}, None, None)
    figures = tofu_figures(scores, {"forget": answers, "retain": answers}, word_tokenizer())
    assert figures["forget_Q_A_PARA_ROUGE"] == pytest.approx(np.mean([reworded for _, reworded, _ in texts]))
    assert figures["forget_Q_A_PERT_ROUGE"] == pytest.approx(np.mean([wrong for *_, wrong in texts]))
    assert "retain_Q_A_PARA_ROUGE" not in figures  # nor is it there


def test_probabilities_of_other_answers_by_hand(byte_model):
    """On dense float64 logits: exp of the mean log-probability of each answer's tokens, a row's wrong ones averaged."""
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    model = tiny_model("llama", vocabulary=len(tokenizer))
    wrong = [["Nobody.", "Oslo, said Ida"], ["Ida"], ["No", "Yes", "Both"]]
    rows = [{"question": f"Who {n}?", "answer": f"It is Anna {n}", "paraphrased_answer": [f"Anna, {n} times", "Anna"],
             "perturbed_answer": texts} for n, texts in enumerate(wrong)]  # fmt: skip
    parsed = tofu_rows(Rows("rows", rows), "forget")
    scorer = Scorer(model, tokenizer, Journal(None, progress=False), 4)
    answers = measure_tofu(scorer, "forget", parsed, Template(), 128)
    scores = TofuScores({name: score_tofu(name, answers, tokenizer) for name in ("forget", "world facts")}, None, None)
    figures = tofu_figures(scores, {"forget": answers, "world facts": answers}, tokenizer)
    model = model.double()

    def probability(question, answer):
        ((row),) = tokenize([Example(question, answer, "here", "question/answer")], tokenizer)
        ids = torch.tensor(row["input_ids"])
        logp = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        return logp[row["prompt_length"] - 1 :].mean().exp().item()

    own = np.mean([probability(row["question"], row["answer"]) for row in rows])
    other = np.mean([probability(row["question"], text) for row in rows for text in row["paraphrased_answer"]])
    wrong = [np.mean([probability(row["question"], text) for text in row["perturbed_answer"]]) for row in rows]
    assert figures["forget_Q_A_Prob"] == pytest.approx(own, rel=1e-4)
    assert figures["forget_Q_A_PARA_Prob"] == pytest.approx(other, rel=1e-4)
    assert figures["forget_Q_A_PERT_Prob"] == figures["wf_Q_A_PERT_Prob"] == pytest.approx(np.mean(wrong), rel=1e-4)
    assert figures["wf_Q_A_Prob"] == pytest.approx(own, rel=1e-4) and "wf_Q_A_PARA_Prob" not in figures
    assert len({own, other, np.mean(wrong)}) == 3


def test_muse_under_its_names():
    """F of the longest common subsequence of stemmed words, by hand: running and runs are one word."""
    answers = [
        MuseAnswer("p", "she", "she runs far away", "running far", 0.0),  # MUSE cuts the true answer, and they do not
        MuseAnswer("p", "never", "never", "always", 0.0),
        MuseAnswer("p", "do", "do n't", "don't", 0.0),  # theirs are both cleaned up
    ]
    precision, recall = 2 / 2, 2 / 4
    expected = (2 * precision * recall / (precision + recall) + 0 + 1) / 3
    tokenizer = word_tokenizer()
    figures = muse_figures({VERBATIM: answers, TAUGHT: [0.1]}, tokenizer)
    assert figures == {"forget_verbmem_ROUGE": pytest.approx(expected)}
    knowledge = muse_figures({FORGOTTEN: answers, KEPT: answers}, tokenizer)
    assert set(knowledge) == {"forget_knowmem_ROUGE", "retain_knowmem_ROUGE"}
    assert muse_figures({}, tokenizer) == {}


def test_the_retained_models_auc_is_read_from_either_file(tmp_path):
    ours, theirs, neither = (tmp_path / name for name in ("evaluation.json", "TOFU_EVAL.json", "other.json"))
    ours.write_text(json.dumps({"open_unlearning": {"mia_min_k": 0.45}}))
    theirs.write_text(json.dumps({"mia_min_k": {"auc": 0.4, "agg_value": 0.4}}))
    neither.write_text(json.dumps({"rows": {}}))
    assert [retained_min_k(str(path)) for path in (ours, theirs, neither)] == [0.45, 0.4, None]
