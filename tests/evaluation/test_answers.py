"""The five numbers per row, against dense float64 logits and against values worked out by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from helpers.tiny_models import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lowmem_npo.config import OutputConfig
from lowmem_npo.data import Example, tokenize
from lowmem_npo.evaluation.answer_table import scope
from lowmem_npo.evaluation.answers import (
    AnswerEvaluation,
    AnswerRecord,
    AnswerSummary,
    answer_length,
    choose_rows,
    evaluate_answers,
    in_sentences_of_its_own,
    read_answers,
    save_answers,
)
from lowmem_npo.evaluation.scoring import generation, likelihood
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods
from lowmem_npo.records import record_of

PAIRS = [
    ("Who sails?", "Anna does"),
    ("Where?", "In the small harbour behind the lighthouse"),
    ("A much longer question about a boat, so that rows differ", "No"),
    ("When was it, then?", "In May 1931"),
]


@pytest.fixture(scope="module")
def rows(tokenizer):
    return tokenize([Example(prompt, answer, "here", "question/answer") for prompt, answer in PAIRS], tokenizer)


def test_what_was_written_is_kept_beside_the_answer(byte_model, tokenizer, rows, monkeypatch):
    """White space and special tokens are among it; `fluency` asks of them. Files that people read have the text
    alone."""
    said = [" Anna does ", "\n\nOh", "", "No<pad>"]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in said]
    monkeypatch.setattr(generation, "greedy_answers", lambda *args, **options: ids)
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    records = evaluate_answers(model, tokenizer, rows, progress=False).records
    assert [record.ids for record in records] == ids
    assert [record.answer for record in records] == ["Anna does", "Oh", "", "No"] and records[0].exact_match
    read = [record_of(AnswerRecord, record.to_json()) for record in records]
    assert read == records and not any(record.ids for record in read)


def dense_nlls(model, rows) -> list[float]:
    """From full float64 logits, row by row, no padding, written without the code under test."""
    means = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logprobs = model.double()(input_ids=ids[None]).logits[0].log_softmax(-1)
        first = max(row["prompt_length"], 1)
        means.append(-sum(logprobs[at - 1, ids[at]].item() for at in range(first, len(ids))) / (len(ids) - first))
    return means


@pytest.mark.parametrize("architecture", ["olmo", "llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_nll_and_probability_equal_dense_float64(architecture, batch_size, rows):
    found = answer_likelihoods(tiny_model(architecture, 258), rows, batch_size=batch_size, progress=False)
    expected = dense_nlls(tiny_model(architecture, 258), rows)
    assert [score.nll for score in found] == pytest.approx(expected, rel=2e-5)
    assert [score.probability for score in found] == pytest.approx([math.exp(-nll) for nll in expected], rel=1e-4)
    answer_bytes = [len(answer.encode()) + 1 for _, answer in PAIRS]  # the space before it is labelled too; and EOS
    assert [score.tokens for score in found] == [count + 1 for count in answer_bytes]


@pytest.mark.parametrize("bug", ["eos left out", "prompt counted", "shifted by one"])
def test_wrong_labels_would_be_noticed(bug, rows, monkeypatch):
    right = likelihood.after_prompt

    def wrong(row):
        labels = right(row)
        if bug == "eos left out":
            return [*labels[:-1], -100]
        return row["input_ids"] if bug == "prompt counted" else labels[-1:] + labels[:-1]

    monkeypatch.setattr(likelihood, "after_prompt", wrong)
    found = [score.nll for score in answer_likelihoods(tiny_model("olmo", 258), rows, progress=False)]
    assert found != pytest.approx(dense_nlls(tiny_model("olmo", 258), rows), rel=1e-3)


def test_rows_trained_on_all_tokens_are_measured_on_their_answers(tokenizer, rows):
    """`--tokens all` changes what is trained, not what is measured."""
    examples = [Example(prompt, answer, "here", "question/answer") for prompt, answer in PAIRS]
    everything = tokenize(examples, tokenizer, tokens="all")
    model = tiny_model("olmo", 258)
    assert answer_likelihoods(model, everything, progress=False) == answer_likelihoods(model, rows, progress=False)


def test_adapters_count_and_can_be_switched_off(rows):
    base = dense_nlls(tiny_model("olmo", 258), rows)
    model = get_peft_model(tiny_model("olmo", 258), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted = [score.nll for score in answer_likelihoods(model, rows, progress=False)]
    assert adapted == pytest.approx(dense_nlls(model, rows), rel=2e-5) and adapted != pytest.approx(base, rel=1e-2)
    with model.float().disable_adapter():
        assert [score.nll for score in answer_likelihoods(model, rows, progress=False)] == pytest.approx(base, rel=2e-5)


@pytest.fixture
def evaluated(tokenizer, rows, monkeypatch):
    """evaluate_answers of a model that says what it is told to say."""

    def evaluate(said: list[str]) -> list[AnswerRecord]:
        given = {}

        def scripted(model, tokenizer, prompts, **kwargs):
            given["prompts"] = prompts
            return [tokenizer(text)["input_ids"] for text in said]

        monkeypatch.setattr(generation, "greedy_answers", scripted)
        found = evaluate_answers(tiny_model("olmo", 258), tokenizer, rows, progress=False)
        evaluate.prompts = given["prompts"]
        return found.records

    return evaluate


def test_rouge_and_exact_match_by_hand(evaluated):
    records = evaluated(
        [
            " Anna does \n",  # white space around it does not count
            "in the big harbours of light",  # of the 7 words "in the", "harbour" (stemmed) are there, in order
            "no",  # ROUGE lower-cases, exact match does not
            "",
        ]
    )
    assert [record.exact_match for record in records] == [True, False, False, False]
    assert [record.appears for record in records] == [True, False, True, False]
    assert [record.rouge_l_recall for record in records] == pytest.approx([1, 3 / 7, 1, 0])
    assert [record.reference for record in records] == [answer for _, answer in PAIRS]
    assert records[0].prompt == "Question: Who sails?\nAnswer:"


def test_recall_not_precision(evaluated):
    """A long-winded answer that holds the whole truth has recited it."""
    records = evaluated(["well I think Anna surely does all of that"] * 4)
    assert records[0].rouge_l_recall == 1 and records[0].exact_match is False
    assert records[0].appears is False  # in order, but not in one piece
    records = evaluated(["Well, as far as I know, ANNA does all of that."] * 4)
    assert records[0].appears and not records[0].exact_match


def test_prompts_are_the_training_rows_own_ids(evaluated, rows):
    evaluated(["x"] * 4)
    for prompt, row in zip(evaluated.prompts, rows, strict=True):
        length = row["labels"].count(-100)
        assert list(prompt.ids) == row["input_ids"][:length] == row["input_ids"][: row["prompt_length"]]
        assert prompt.max_new_tokens == 64  # enough for some introduction, whatever the answer's own length


def test_how_long_an_answer_may_be():
    def rows_of(*lengths):
        return [{"input_ids": [5] * (3 + n), "labels": [5] * (3 + n), "prompt_length": 3} for n in lengths]

    for lengths, wanted, expected in (
        ((2,), None, 64),
        ((2, 48), None, 64),
        ((2, 49), None, 65),  # 16 more than the longest
        ((2, 239), None, 255),
        ((2, 900), None, 256),
        ((2, 900), 7, 7),
        ((2,), 900, 900),
    ):
        assert answer_length(rows_of(*lengths), wanted) == expected
    text = [{"input_ids": [5] * 200, "labels": [5] * 200, "prompt_length": 0}]  # its second half is asked for
    assert answer_length(text, None) == 116


def test_a_model_that_recites_has_nothing_left_to_win(tokenizer, rows):
    """And one that goes on where the answer ends has not given it word for word."""
    records = evaluate_answers(Reciter(rows, tokenizer), tokenizer, rows, progress=False).records
    assert all(record.exact_match and record.rouge_l_recall == 1 for record in records)
    babbler = evaluate_answers(Reciter(rows, tokenizer, stops=False), tokenizer, rows, progress=False)
    assert babbler.summary.exact_match == 0 and babbler.summary.rouge_l_recall == babbler.summary.appears == 1


def test_an_answer_after_an_introduction_counts(tokenizer, rows):
    """With as many tokens as the true answer has, only the introduction would come."""
    model = Reciter(rows, tokenizer, introduction="As far as I know:")
    free = evaluate_answers(model, tokenizer, rows, progress=False)
    assert free.summary.appears == free.summary.rouge_l_recall == 1 and free.summary.exact_match == 0
    assert free.summary.max_new_tokens == 64
    short = evaluate_answers(model, tokenizer, rows, max_new_tokens=10, progress=False)
    assert short.summary.appears == 0 and short.summary.max_new_tokens == 10


def Reciter(rows, tokenizer, stops: bool = True, introduction: str = ""):
    """A real model whose `generate` continues every prompt with its row's answer; with or without the EOS, and after
    some introduction."""
    model = tiny_model("olmo", 258)
    after = {tuple(row["input_ids"][: row["prompt_length"]]): row["input_ids"][row["prompt_length"] :] for row in rows}

    def generate(input_ids, attention_mask, generation_config, **kwargs):
        tails = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            answer = tokenizer(introduction)["input_ids"] + after[tuple(ids[mask.bool()].tolist())]
            if not stops:
                answer[-1] = tokenizer("!")["input_ids"][0]
            tails.append((answer + [tokenizer.pad_token_id] * 99)[: generation_config.max_new_tokens])
        return torch.cat([input_ids, torch.tensor(tails)], dim=1)

    model.generate = generate
    return model


def test_plain_text_is_continued_from_its_middle(tokenizer, monkeypatch):
    texts = ["The tide comes in twice a day", "Gulls"]
    rows = tokenize([Example(None, text, "here", "text") for text in texts], tokenizer)
    given = []
    monkeypatch.setattr(generation, "greedy_answers", lambda m, t, prompts, **k: given.extend(prompts) or [[]] * 2)
    found = evaluate_answers(tiny_model("olmo", 258), tokenizer, rows, progress=False)
    assert [tokenizer.decode(prompt.ids) for prompt in given] == ["The tide comes ", "Gul"]
    assert [record.reference for record in found.records] == ["in twice a day", "ls"]
    expected = dense_nlls(tiny_model("olmo", 258), rows)  # of the whole text but its first token
    assert [record.nll for record in found.records] == pytest.approx(expected, rel=2e-5)


def test_long_answers_are_compared_up_to_the_cap(tokenizer, rows):
    model = Reciter(rows, tokenizer)
    found = evaluate_answers(model, tokenizer, rows, max_new_tokens=10, progress=False)
    record = found.records[1]
    assert record.reference == record.answer == "In the sm" and record.exact_match  # the space before it is a token
    longer = [row["input_ids"][row["prompt_length"] :] for row in rows]
    number = sum(len(answer) > 11 for answer in longer)  # with the EOS
    assert record.cut and found.summary.cut == number == sum(record.cut for record in found.records) < len(rows)
    said = scope({"after": {"forget": found.summary, "forget, plain": found.summary}})
    assert said.endswith(f"tokens, compared with the beginning of {number} longer true answers.")
    whole = evaluate_answers(model, tokenizer, rows, progress=False)
    assert whole.summary.cut == 0 and "longer" not in scope({"after": {"forget": whole.summary}})


def test_the_summary_by_hand():
    def record(tokens, nll, rouge, exact):
        return AnswerRecord(0, "", "", "", tokens, nll, math.exp(-nll), rouge, exact, appears=True)

    summary = AnswerSummary.of([record(1, 2.0, 0.5, True), record(3, 4.0, 0.0, False)], 9, max_new_tokens=64)
    assert summary.nll == pytest.approx((1 * 2 + 3 * 4) / 4)  # a mean over tokens
    assert summary.probability == pytest.approx((math.exp(-2) + math.exp(-4)) / 2)  # over rows
    assert (summary.rouge_l_recall, summary.exact_match, summary.appears) == (0.25, 0.5, 1)
    assert summary.max_new_tokens == 64
    assert (summary.rows, summary.rows_in_set, summary.tokens) == (2, 9, 4)


def test_the_error_of_a_change_is_that_of_its_rows():
    def measured(*recalls):
        records = [AnswerRecord(i, "", "", "", 1, 1, 0.5, recall, False, False) for i, recall in enumerate(recalls)]
        return AnswerEvaluation(AnswerSummary.of(records, len(records), 64), records)

    before, after = measured(0.2, 0.6, 1.0, 0.9), measured(0.1, 0.6, 0.7)  # changes of -0.1, 0 and -0.3
    errors = after.errors_of_change(before)
    assert errors["rouge_l_recall"] == pytest.approx(((0.1 / 3) ** 2 + (0.4 / 3) ** 2 + (0.5 / 3) ** 2) ** 0.5 / 6**0.5)
    assert math.isnan(measured(math.nan, 0.1).errors_of_change(before)["rouge_l_recall"])
    assert measured(1e308, 0.1).errors_of_change(before)["rouge_l_recall"] == math.inf  # from a file edited by hand
    assert errors["probability"] == 0 and measured(0.1).errors_of_change(before) == {}


def test_the_error_of_a_mean_over_tokens_is_that_of_rows_of_their_lengths():
    """What a long answer does by chance is most of it."""
    draw = random.Random(0)
    lengths = [5] * 20 + [600] * 4

    def measured(scatter):
        likelihoods = [3 + draw.gauss(0, scatter) for _ in lengths]
        records = [
            AnswerRecord(i, "", "", "", tokens, nll, 0.05, 0.2, False, False)
            for i, (tokens, nll) in enumerate(zip(lengths, likelihoods, strict=True))
        ]
        return AnswerEvaluation(AnswerSummary.of(records, len(records), 64), records)

    before = measured(0.0)
    afters = [measured(1.0) for _ in range(300)]
    scatter = stdev(after.summary.nll - before.summary.nll for after in afters)
    squares = [after.errors_of_change(before)["nll"] ** 2 for after in afters]
    assert scatter**2 == pytest.approx(fmean(squares), rel=0.5)
    assert fmean(squares) > 0.2, "as of four rows; all of one weight would have 1/24"


def test_sentences_of_its_own_are_remarked_on():
    def remark(*answers):
        records = [AnswerRecord(0, "", "Rome", text, 1, 1.0, 0.4, 1.0, False, "Rome" in text) for text in answers]
        return in_sentences_of_its_own({"forget": AnswerEvaluation(AnswerSummary.of(records, 4, 64), records)})

    assert "says 2 of 4 forget answers in sentences of its own" in remark("It is Rome.", "Oh, Rome", "Rome!", "Paris")
    assert remark("It is Rome.", "Rome, of course", "Paris") is None  # as many as the row has them
    records = [AnswerRecord(0, "", text, "It is Rome.", 1, 1, 0.4, 1, False, True) for text in ("Rome", "It is Rome.")]
    summary = AnswerSummary.of(records, 2, 64)
    assert in_sentences_of_its_own({"forget": AnswerEvaluation(summary, records)}) is None  # the sentence is a row, too
    assert remark("Paris") is None and in_sentences_of_its_own({}) is None


def test_the_same_rows_are_drawn_before_and_after():
    assert choose_rows(100, 10, 5) == choose_rows(100, 10, 5) != choose_rows(100, 10, 6)
    assert choose_rows(100, 10, 5) == sorted(set(choose_rows(100, 10, 5)))
    assert choose_rows(4, None, 0) == choose_rows(4, 4, 0) == choose_rows(4, 9, 0) == [0, 1, 2, 3]


def test_nothing_to_score_is_an_error(tokenizer, rows):
    with pytest.raises(ValueError, match="no row"):
        evaluate_answers(tiny_model("olmo", 258), tokenizer, rows.rows[:0], progress=False)


def test_what_was_saved_is_read_and_what_is_damaged_or_was_measured_otherwise_is_measured_again(
    tokenizer, rows, tmp_path
):
    before = {"forget": evaluate_answers(Reciter(rows, tokenizer), tokenizer, rows, progress=False)}
    save_answers(path := tmp_path / "before.json", before)
    assert read_answers(path) == before
    output = OutputConfig(eval_rows=4)
    assert read_answers(path, output) == before
    assert not read_answers(path, OutputConfig(eval_rows=3)) and not read_answers(
        path, replace(output, max_new_tokens=9)
    )
    assert read_answers(path, replace(output, max_new_tokens=64)) == before
    whole = path.read_text(encoding="utf-8")
    for damaged in ("", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"forget": {"summary": 7}}'):
        path.write_text(damaged, encoding="utf-8")
        assert read_answers(path, output) == {}
    for name in ("appears", "max_new_tokens"):
        content = json.loads(whole)
        del content["forget"]["summary"][name]
        path.write_text(json.dumps(content), encoding="utf-8")
        assert read_answers(path, output) == {}
        with pytest.raises(ValueError, match=f"^{name} is missing"):
            read_answers(path)
