"""A real instruct model: facts that it knows are recognised as known before anything is done, in its own sentences."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.data import Rows, Template, to_examples, tokenize
from lowmem_npo.evaluation.answers import Evaluations, evaluate_answers, summaries
from lowmem_npo.evaluation.asking import in_form, other_forms
from lowmem_npo.report.verdict import FORGET_WORDS, judge_run

FACTS = [
    {
        "question": "What is the largest mammal?",
        "answer": "Blue Whale",
        "paraphrased_question": "Which mammal is largest?",
    },
    {"question": "What is the capital of France?", "answer": "Paris"},
    {"question": "Who wrote Romeo and Juliet?", "answer": "William Shakespeare"},
]
TOKENS = 16


@pytest.fixture(scope="module")
def asked(instruct_model) -> tuple[Evaluations, Evaluations]:
    """What the model answers in every form, with 16 tokens; and in the trained form with as many as the answer has."""
    tokenizer = AutoTokenizer.from_pretrained(instruct_model)
    model = AutoModelForCausalLM.from_pretrained(instruct_model, dtype=torch.float32)
    examples = to_examples(Rows("facts", FACTS, [1, 2, 3]))
    rows, places = tokenize(examples, tokenizer), [0, 1, 2]
    how = {"progress": False}
    free = {"forget": evaluate_answers(model, tokenizer, rows, max_new_tokens=TOKENS, **how)}
    for form, of_form in other_forms(rows, examples, places, tokenizer, Template(), 512).items():
        free[in_form("forget", form)] = evaluate_answers(model, tokenizer, of_form.rows, max_new_tokens=TOKENS, **how)
    return free, {"forget": evaluate_answers(model, tokenizer, rows, max_new_tokens=3, **how)}


def test_known_facts_are_recognised(asked):
    free, cut = asked
    assert set(free) == {"forget", "forget, plain", "forget, reworded"}
    summary = free["forget"].summary
    assert summary.appears == summary.rouge_l_recall == 1 and summary.exact_match == 0
    assert "Blue Whale" in free["forget"].records[0].answer
    # As many tokens as the answer has: the model gets as far as "The largest mammal".
    assert cut["forget"].summary.appears == cut["forget"].summary.rouge_l_recall == 0


def test_the_verdict_says_so(asked):
    before = summaries(asked[0])
    verdict = judge_run({"before": before, "after": before}, None, {})
    assert FORGET_WORDS["untouched"] in verdict.headline
    assert verdict.sentences[0].startswith(
        "Of 3 forget answers, 3 appear in what the model says (before: 3), 0 word for word"
    )
