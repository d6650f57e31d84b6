"""TOFU's scores against values worked out by hand, and its likelihoods against dense float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.dense_step import word_tokenizer
from helpers.rows import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.data import Example, Rows, Template, read_rows
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks import tofu
from lowmem_npo.evaluation.benchmarks.tofu import (
    FORGET,
    REAL_AUTHORS,
    RETAIN,
    WORLD_FACTS,
    TofuAnswer,
    TofuRow,
    TofuSet,
    forget_quality,
    model_utility,
    retained_truth_ratios,
    score_tofu,
    tofu_rows,
)


def answer(probability, paraphrased, perturbed, text="the big cat", generation="a big cat sat"):
    """An answer to which the model gives these length-normalised probabilities."""
    row = TofuRow(Example("Who?", text, "f, row 1", "question/answer"), (text,), ("x",) * len(perturbed))
    nll = [-math.log(p) for p in (probability, paraphrased, *perturbed)]
    return TofuAnswer(row, nll[0], (nll[1],), tuple(nll[2:]), generation)


# Truth ratios: sqrt(0.1 * 0.4) / 0.8 = 1/4 and sqrt(0.2 * 0.8) / 0.2 = 2
ANSWERS = [answer(0.5, 0.8, [0.1, 0.4]), answer(0.25, 0.2, [0.2, 0.8], text="one two", generation="")]


@pytest.mark.parametrize(
    "name, probability, truth_ratio",
    [
        (FORGET, (0.5 + 0.25) / 2, (1 / 4 + 1 / 2) / 2),  # min(R, 1/R)
        (RETAIN, (0.5 + 0.25) / 2, (3 / 4 + 0) / 2),  # max(0, 1 - R)
        (REAL_AUTHORS, (0.5 / (0.5 + 0.5) + 0.25 / (0.25 + 1.0)) / 2, (3 / 4 + 0) / 2),
        (WORLD_FACTS, (0.5 + 0.2) / 2, (3 / 4 + 0) / 2),
    ],
)
def test_scores_of_a_set(name, probability, truth_ratio):
    scores = score_tofu(name, ANSWERS, word_tokenizer())
    assert scores.truth_ratios == pytest.approx([1 / 4, 2])
    assert scores.probability == pytest.approx(probability)
    assert scores.truth_ratio == pytest.approx(truth_ratio)
    assert scores.rouge_l_recall == pytest.approx((2 / 3 + 0) / 2)  # "big cat" of three words; nothing of two


def test_rouge_is_of_texts_in_which_spaces_are_cleaned_up():
    """As transformers 4 decodes both for open-unlearning: to rouge-score they are other words else."""
    apart, together = "I do n't know, it 's Paris .", "I don't know, it's Paris."
    for text, generation in ((apart, together), (together, apart), (apart, apart)):
        row = answer(0.5, 0.8, [0.1], text=text, generation=generation)
        assert score_tofu(FORGET, [row], word_tokenizer()).rouge_l_recall == 1


def test_model_utility_is_the_harmonic_mean_of_nine():
    sets = {name: TofuSet(1, 0.5, 0.25, 1.0, []) for name in (RETAIN, REAL_AUTHORS, WORLD_FACTS)}
    assert model_utility(sets) == pytest.approx(9 / (3 * (2 + 4 + 1)))
    forgotten = TofuSet(1, 0.0, 0.0, 0.0, [])
    assert model_utility({**sets, FORGET: forgotten}) == pytest.approx(3 / 7)  # forget plays no part
    assert model_utility({**sets, RETAIN: TofuSet(1, 0.0, 0.25, 1.0, [])}) == 0
    assert model_utility({RETAIN: sets[RETAIN], REAL_AUTHORS: sets[REAL_AUTHORS]}) is None


def test_forget_quality():
    same = [0.1, 0.2, 0.3, 0.4]
    assert forget_quality(same, list(same)) == pytest.approx(1.0)
    # Two samples of 4 that do not overlap: 2 of the C(8, 4) = 70 orders are as extreme.
    assert forget_quality(same, [1.1, 1.2, 1.3, 1.4]) == pytest.approx(2 / 70)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("fmean", lambda values: sum(values)),
        ("TINY", 1.0),
        ("_probability_among_options", lambda answer: math.exp(-answer.nll)),
        ("OUTSIDE", (WORLD_FACTS,)),
    ],
)
def test_a_planted_bug_is_noticed(monkeypatch, name, broken):
    wanted = score_tofu("real authors", ANSWERS, word_tokenizer())
    monkeypatch.setattr(tofu, name, broken)
    found = score_tofu("real authors", ANSWERS, word_tokenizer())
    assert (found.probability, found.truth_ratio) != pytest.approx((wanted.probability, wanted.truth_ratio), rel=1e-3)


def test_a_retained_models_log(tmp_path):
    ours, theirs, neither = (tmp_path / name for name in ("evaluation.json", "TOFU_EVAL.json", "other.json"))
    ours.write_text(json.dumps({"tofu": {"sets": {"forget": {"truth_ratios": [0.5, 2]}}}}))
    theirs.write_text(json.dumps({"forget_truth_ratio": {"value_by_index": {"0": {"score": 0.5}, "1": {"score": 2}}}}))
    assert retained_truth_ratios(str(ours)) == retained_truth_ratios(str(theirs)) == [0.5, 2.0]
    broken = [{"tofu": {"sets": {"forget": {"truth_ratios": ratios}}}} for ratios in ([], "0.5", ["0.5"], [math.nan])]
    broken += [[], {"tofu": None}]
    for content, said in (*((json.dumps(one), "truth ratios") for one in broken), ("{", "not valid JSON")):
        neither.write_text(content)
        with pytest.raises(UserError, match=said):
            retained_truth_ratios(str(neither))
    with pytest.raises(UserError, match="cannot be read"):
        retained_truth_ratios(str(tmp_path / "absent.json"))


def test_rows(shared_data):
    for file, rows, wrong in (
        ("forget05_perturbed", 200, 5), ("retain_perturbed", 400, 5),
        ("real_authors_perturbed", 100, 3), ("world_facts_perturbed", 117, 3),
    ):  # fmt: skip
        found = tofu_rows(read_rows(str(shared_data / "tofu" / f"{file}.json")), FORGET)
        assert len(found) == rows and {len(row.perturbed) for row in found} == {wrong}
        assert all(len(row.paraphrased) == (wrong == 5) for row in found[:20])
    assert tofu_rows(read_rows(str(shared_data / "tofu" / "forget05.json")), FORGET) == []
    for bad in (None, [], "wrong", ["wrong", " "]):
        with pytest.raises(UserError, match="f, row 1: perturbed_answer"):
            tofu_rows(Rows("f", [{"question": "q", "answer": "a", "perturbed_answer": bad}]), FORGET)


@pytest.mark.parametrize(
    "value, wanted",
    [(["b", "c"], ("b", "c")), ('["b", "c"]', ("b", "c")), ("b", ("b",)),
     ("", ()), (None, ()), (math.nan, ()), ([], ())],
)  # fmt: skip
def test_an_answer_in_other_words_is_a_text_or_a_list_or_missing(value, wanted):
    row = {"question": "q", "answer": "a", "perturbed_answer": ["x"], "paraphrased_answer": value}
    assert tofu_rows(Rows("f", [row]), RETAIN)[0].paraphrased == wanted
    with pytest.raises(UserError, match="row 1: paraphrased_answer is a number, not text"):
        tofu_rows(Rows("f", [row | {"paraphrased_answer": 7}]), RETAIN)


def dense_nll(model, tokenizer, question, text):
    """Mean -log p of the answer and EOS, from the model's own logits in float64."""
    prompt = tokenizer(f"Question: {question}\nAnswer:").input_ids
    ids = tokenizer(f"Question: {question}\nAnswer: {text}").input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return float(losses[len(prompt) - 1 :].mean())


def test_from_files_to_utility_and_quality(byte_model, tmp_path, capsys):
    def rows(who):
        for n in range(3):
            row = {"question": f"{who} {n}?", "answer": f"It is {n}.", "perturbed_answer": [f"It is {n}{n}.", "No."]}
            yield {**row, "paraphrased_answer": f"{n}, that is."}  # which counts on forget and retain

    files = {flag: write_rows(tmp_path / f"{flag[2:]}.jsonl", rows(flag[2:]))
             for flag in ("--forget", "--retain", "--real-authors", "--world-facts")}  # fmt: skip
    log = tmp_path / "retained.json"
    log.write_text(json.dumps({"tofu": {"sets": {"forget": {"truth_ratios": [1e6, 2e6, 3e6]}}}}))
    assert main(["evaluate", "--model", str(byte_model), "--dtype", "float32", "--device", "cpu",
                 *(word for pair in files.items() for word in pair), "--retained-log", str(log), "--limit", "2",
                 "--output-dir", str(tmp_path / "out")]) == 0  # fmt: skip
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tofu"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [line["set"] for line in lines] == [name for name in found["sets"] for _ in range(2)]

    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    model = AutoModelForCausalLM.from_pretrained(byte_model).eval()
    for name in (RETAIN, WORLD_FACTS):
        row = next(line for line in lines if line["set"] == name)
        n = row["answer"][-2]
        right, other, *wrong = (
            dense_nll(model, tokenizer, row["question"], text)
            for text in (row["answer"], f"{n}, that is.", f"It is {n}{n}.", "No.")
        )
        other = other if name == RETAIN else right
        assert row["nll"] == pytest.approx(right, rel=1e-5) and row["perturbed_nll"] == pytest.approx(wrong, rel=1e-5)
        assert row["truth_ratio"] == pytest.approx(math.exp(other - sum(wrong) / 2), rel=1e-4)
    nine = [found["sets"][name][key] for name in (RETAIN, REAL_AUTHORS, WORLD_FACTS)
            for key in ("probability", "rouge_l_recall", "truth_ratio")]  # fmt: skip
    assert found["model_utility"] == pytest.approx(0 if 0 in nine else 9 / sum(1 / x for x in nine))
    assert found["forget_quality"] == pytest.approx(2 / 10)  # 2 values against 3 that lie above: 2 of C(5, 2) orders
    shown = capsys.readouterr().out
    assert "2 of 3 forget rows" in shown and "model utility" in shown and "forget quality" in shown


def test_a_gold_model_without_truth_ratios_is_compared_by_what_it_has(byte_model, tmp_path, capsys):
    """As in a sweep that evaluates leak tests alone, on rows that are TOFU's."""
    row = {"question": "Who?", "answer": "It is 1.", "perturbed_answer": ["It is 2.", "No."]}
    forget, log = write_rows(tmp_path / "forget.jsonl", [row]), tmp_path / "gold.json"
    options = ["--model", str(byte_model), "--dtype", "float32", "--device", "cpu", "--forget", str(forget)]
    options += ["--retained-log", str(log), "--output-dir", str(tmp_path / "out")]
    log.write_text("{}")
    assert main(["evaluate", *options]) == 2
    assert "holds no truth ratios of a forget set" in capsys.readouterr().err
    log.write_text(json.dumps({"open_unlearning": {"mia_min_k": 0.4}}))
    assert main(["evaluate", *options]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["tofu"]["forget_quality"] is None and tofu.NO_RATIOS in found["notes"]


def test_sets_without_perturbed_answers(byte_model, tmp_path, capsys):
    plain = write_rows(tmp_path / "plain.jsonl", [{"question": "Who?", "answer": "Me."}])
    options = ["--model", str(byte_model), "--world-facts", plain, "--output-dir", str(tmp_path / "o")]
    assert main(["evaluate", *options]) == 2
    assert "no column perturbed_answer" in capsys.readouterr().err


def test_generation_starts_from_the_prompt_the_likelihood_is_conditioned_on(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    row = TofuRow(Example("Who?", "Me.", "f, row 1", "question/answer"), "Me.", ("You.",))
    (ids,) = tofu.prompt_ids(tokenizer, [row], Template())
    assert tokenizer.decode(ids) == "Question: Who?\nAnswer:"
