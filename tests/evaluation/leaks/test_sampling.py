"""Samples: the right distribution, seeded, none of the caller's random numbers; the best recall by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_step import random_rows, word_tokenizer
from helpers.tiny_models import tiny_model
from scipy.stats import fisher_exact
from transformers import TopKLogitsWarper

from lowmem_npo.data import Rows, to_examples, tokenize
from lowmem_npo.evaluation.leaks.sampling import SAMPLING, Best, SamplingOptions, best_samples, judge
from lowmem_npo.evaluation.leaks.worst import worst_attack
from lowmem_npo.evaluation.scoring import generation
from lowmem_npo.evaluation.scoring.generation import Prompt, sampled_answers
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Reference, Scorer


def test_best_recall_by_hand():
    answers = [Reference("She was born in Rome", cut=True), Reference("Blue"), Reference("東京です")]
    samples = [["Rome", "she was burning in Rome", ""], ["red", "I think BLUE."], ["はい、東京です。", "京都です"]]
    assert best_samples(answers, samples) == [
        (4 / 5, "she was burning in Rome", False, True, None),
        (1, "I think BLUE.", True, False, None),
        (1, "はい、東京です。", True, False, None),
    ]


def test_the_verdict_stands_on_the_holdout():
    options = SamplingOptions(leak_samples=8, leak_temperature=0.7)

    def judged(forget, holdout, before=None):
        sets = [
            None if of_set is None else [Best(recall, "", recall == 1) for recall in of_set]
            for of_set in (forget, holdout)
        ]
        return judge(*sets, options, 64, before)

    assert judged([1.0, 0.5] * 3, [0.2, 0.3]).leaks is True
    chance = judged([1.0, 0.1] * 2, [0.2, 0.3] * 2)
    assert chance.leaks is None and "4 of the forget set and 4 of the holdout" in chance.meaning
    assert judged([0.3, 0.2] * 2, [0.2, 0.3] * 2).leaks is False
    few = judged([0.3, 0.2], [0.2, 0.3])
    assert few.leaks is None and "With 2 + 2 rows chance explains any difference" in few.meaning
    assert judged([0.3, 0.2], None).leaks is None
    figures = judged([1.0, 0.5], [0.25, 0.25]).figures
    assert (figures["samples"], figures["temperature"], figures["max_new_tokens"]) == (8, 0.7, 64)
    assert (figures["best_rouge_l_recall"], figures["whole"]) == (0.75, 0.5)
    assert (figures["holdout_best_rouge_l_recall"], figures["holdout_whole"]) == (0.25, 0)
    for recall, leaks in ((0.3, True), (0.2, False)):  # of 0.5 before
        result = judged([recall, recall], None, before=0.5)
        assert result.leaks is leaks and result.against_before and "before it forgot, 50%" in result.meaning
    assert not judged([1.0], [0.2], before=0.5).against_before  # a holdout says more


def test_answers_that_come_whole_are_a_trace_though_the_mean_hides_them():
    def judged(whole, of_holdout=0):
        said = [[Best(0.5, "", place < count) for place in range(100)] for count in (whole, of_holdout)]
        return judge(*said, SamplingOptions(), 64)

    ten = judged(10)
    assert ten.leaks is True and ten.figures["whole_p_value"] == pytest.approx(fisher(10, 0), rel=1e-9)
    assert ten.meaning.endswith("explains: 10% of the answers come whole, of the holdout's 0% (p = 0.00077).")
    assert judged(5).leaks is False and judged(16, 10).leaks is None and judged(15, 10).leaks is False
    assert SAMPLING.attacks(ten.figures)[""].stands_out is True


def test_a_holdout_that_the_model_knows_shows_nothing():
    """Words in common are natural, whole answers are not; above nearly all there is no room."""

    def judged(recall, whole):
        said = [Best(recall, "", place < whole) for place in range(20)]
        return judge(said, said, SamplingOptions(), 64)

    assert judged(0.8, 10).leaks is False
    known = judged(0.8, 11)
    assert known.leaks is None and "The model says much of the holdout, 55% word for word" in known.meaning
    high = judged(0.95, 0)
    assert high.leaks is None
    assert high.meaning.endswith("figure is one which nothing can be more than 0.1 above, so nothing is shown.")


def said(whole, rows, cut=False):
    return [Best(0.5, "", place < whole, cut) for place in range(rows)]


def test_an_answer_of_which_only_the_beginning_was_looked_for_did_not_come_whole():
    """30 of 40 are longer, and their beginnings come; of the ten others one does, and of the holdout half."""
    forget, holdout = [*said(30, 30, cut=True), *said(1, 10)], [*said(20, 20, cut=True), *said(10, 20)]
    result = judge(forget, holdout, SamplingOptions(), 4)
    assert result.figures["whole"] == 0.1 and result.figures["holdout_whole"] == 0.5
    assert (result.figures["cut"], result.figures["holdout_cut"]) == (30, 20)
    assert "10% of the 10 uncut answers come whole" in result.meaning
    cut = "Of 30 of 40 forgotten answers and 20 of 40 of the holdout's only the beginning was looked for (--max-length"
    assert f" {cut}, --max-new-tokens)." in result.meaning
    assert result.leaks is False and "word for word" not in result.meaning, "half is not too much"
    attack = SAMPLING.attacks(result.figures)[""]
    assert (attack.rows, attack.whole.rows, attack.whole.beginnings) == (40, 10, 0)
    (alone,) = SAMPLING.attacks(judge(forget, None, SamplingOptions(), 4).figures).values()
    assert alone.value == 0.1


def test_where_all_answers_are_longer_their_beginnings_are_called_so():
    result = judge(said(20, 30, cut=True), said(5, 30, cut=True), SamplingOptions(), 4)
    assert "67% of the beginnings of 30 longer answers come whole" in result.meaning and result.leaks is True
    assert "67% of the beginnings of longer answers come whole, of the holdout's 17%" in result.meaning
    assert "holds 50% of the beginning of a forgotten answer" in result.meaning
    known = judge(said(20, 30, cut=True), said(21, 30, cut=True), SamplingOptions(), 4)
    assert known.leaks is None and "word for word" not in known.meaning
    assert "Of the holdout 70% of such beginnings come whole, too" in known.meaning
    assert "of answers that the model never saw, 50%, whose beginnings come whole." in worst(known).sentence
    alone = judge(said(20, 30, cut=True), None, SamplingOptions(), 4)
    assert "67% of the beginnings of longer answers then come whole" in worst(alone).sentence
    mixed = judge([*said(5, 10), *said(20, 20, cut=True)], said(0, 30, cut=True), SamplingOptions(), 4)
    assert mixed.figures["whole"] == pytest.approx(25 / 30), "beginnings are compared with beginnings"
    assert "of the answers and the beginnings of 20 longer answers come whole" in mixed.meaning


def worst(result):
    return worst_attack({"sampling": result})


def test_which_true_answers_are_longer_than_an_answer_or_a_row_could_be(tokenizer):
    row = {"question": "What?", "answer": "The tide comes in twice a day, and so it does where she lives."}
    examples = to_examples(Rows("rows", [{"question": "Who?", "answer": "Anna"}, row]))
    rows = tokenize(examples, tokenizer)
    scorer = Scorer(None, tokenizer, Journal(None), 4)
    whole, begun = (scorer.references(rows, length) for length in (256, 6))
    assert whole == [("Anna", False), (row["answer"], False)]
    assert begun[0] == whole[0] and begun[1].cut and row["answer"].startswith(begun[1].text) and begun[1].text
    of_short_rows = scorer.references(tokenize(examples, tokenizer, max_length=rows.longest - 10), 256)
    assert of_short_rows == [("Anna", False), (row["answer"][:-9], True)], "its EOS is cut, too"


def fisher(whole, of_holdout, rows=100):
    return fisher_exact([[whole, rows - whole], [of_holdout, rows - of_holdout]], alternative="greater").pvalue


def first_token_law(model, prompt, temperature):
    logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize("bug", [None, "cut off", "temperature", "one seed"])
def test_samples_follow_the_whole_distribution(bug, monkeypatch):
    """Frequencies of 2000 first tokens of each of two prompts, against the model's own probabilities."""
    model, prompts, drawn = tiny_model("llama"), [[5, 9, 40], [7, 3]], 2000
    with torch.no_grad():
        laws = [first_token_law(model, prompt, 0.4) for prompt in prompts]
    if bug:
        real = generation.GumbelNoise
        wrong = {
            "cut off": lambda *how: lambda ids, scores: real(*how)(ids, TopKLogitsWarper(50)(ids, scores)),
            "temperature": lambda seeds, temperature: real(seeds, 1.0),
            "one seed": lambda seeds, temperature: real([0] * len(seeds), temperature),
        }
        monkeypatch.setattr(generation, "GumbelNoise", wrong[bug])
    # A stop token gives an empty answer; it is counted as the token that it is.
    answers = sampled_answers(
        model, word_tokenizer(), [Prompt(ids, 1) for ids in prompts],
        samples=drawn, temperature=0.4, seed=3, progress=False,
    )  # fmt: skip
    off = []
    for law, row in zip(laws, answers, strict=True):
        assert len(row) == drawn
        counts = torch.bincount(torch.tensor([ids[0] if ids else 1 for ids in row]), minlength=97).double()
        expected = law * drawn
        assert not [t for t in range(97) if counts[t] and law[t] < 1e-9]
        off.append(float(((counts - expected).square() / expected).sum()) / 96)  # chi-square per degree of freedom
    assert all(value < 1.6 for value in off) is (bug is None), off  # 96 degrees: 1.6 has a p-value of 2e-4


def test_the_same_seed_the_same_samples():
    model, prompts = tiny_model("llama"), [Prompt([5, 9], 6), Prompt([8], 4), Prompt([3, 4, 5], 6)]
    state = torch.random.get_rng_state()
    one, two, other = (
        sampled_answers(model, word_tokenizer(), prompts, samples=3, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(row) for row in one] == [3, 3, 3]
    assert all(len(ids) <= prompt.max_new_tokens for row, prompt in zip(one, prompts, strict=True) for ids in row)


def test_an_interrupted_sampling_goes_on_with_the_same_samples(tmp_path, monkeypatch):
    model, rows = tiny_model("llama"), random_rows(6, seed=1)

    def samples(journal, batch_size=4):
        return Scorer(model, word_tokenizer(), journal, batch_size).samples("s", rows, 2, 1.0, 5, 6)

    whole = samples(Journal(None))
    assert samples(Journal(tmp_path / "half.jsonl")) == whole
    assert samples(Journal(None), 6) == samples(Journal(None), 1) == whole, "they depend on the batch"
    lines = (tmp_path / "half.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 1
    (tmp_path / "half.jsonl").write_text(lines[0])
    assert samples(Journal(tmp_path / "half.jsonl")) == whole
