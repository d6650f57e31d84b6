"""Answers read off the likelihoods: the most likely token after each true one, of rows together and one by one."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_step import random_rows, word_tokenizer
from helpers.tiny_models import CONFIGS, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from lowmem_npo.evaluation.answers import evaluate_answers
from lowmem_npo.evaluation.scoring import generation, token_scores
from lowmem_npo.evaluation.scoring.forced import forced_answers
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers


@pytest.mark.parametrize("architecture", ["olmo", "gemma2", "granite"])  # plain, with a softcap, scaled
def test_against_dense_logits(architecture, monkeypatch):
    monkeypatch.setattr(token_scores, "VOCABULARY", 7)
    monkeypatch.setattr(token_scores, "TOKENS", 5)
    model, rows = tiny_model(architecture), random_rows(9, seed=3)
    rows[0] = {"input_ids": rows[0]["input_ids"], "labels": rows[0]["input_ids"], "prompt_length": 0}
    lengths = [len(row["input_ids"]) - max(1, row["prompt_length"]) for row in rows]
    lengths[0] = 2  # of plain text, the last tokens
    answers = forced_answers(model, word_tokenizer(), rows, lengths, batch_size=4, progress=False)
    reference, ended = model.double(), 0
    for row, length, answer in zip(rows, lengths, answers, strict=True):
        logits = reference(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, -1 - length :]
        cut = row["input_ids"][-1] != 1  # t1 ends an answer; without it, one token more tells whether the model would
        expected = logits[: length + cut].argmax(-1).tolist()
        stop = expected.index(1) if 1 in expected else len(expected)
        ended += stop < length
        assert answer == expected[:stop]
    assert CONFIGS[architecture] and any(answers)


def test_a_greedy_answer_is_read_off_whole(monkeypatch):
    """Of a row whose answer is what the model writes: the same tokens, its end included. Where it is cut short, without
    an end, the model goes on, and so does what is read off: neither is an exact match, though white space is all that
    follows."""
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    prompts = [Prompt(row["input_ids"][:3], 6) for row in random_rows(4, seed=5)]
    written = greedy_answers(model, tokenizer, prompts, progress=False)
    pairs = [(p.ids, ids) for p, ids in zip(prompts, written, strict=True) if ids]
    rows = [{"input_ids": [*a, *b], "labels": [*a, *b], "prompt_length": len(a)} for a, b in pairs]
    read = forced_answers(model, tokenizer, rows, [len(b) for _, b in pairs], progress=False)
    assert [ids[: len(b)] for ids, (_, b) in zip(read, pairs, strict=True)] == [b for _, b in pairs] and len(read) > 1
    kept = [(a, b[:2]) for a, b in pairs if len(b) > 3]
    rows = [{"input_ids": [*a, *b], "labels": [*a, *b], "prompt_length": len(a)} for a, b in kept]
    for text in (str, lambda ids: " ".join("x" if at < 2 else " " for at, _ in enumerate(ids))):
        with monkeypatch.context() as patch:
            if text is not str:
                patch.setattr(generation, "text_of", lambda tokenizer, ids, text=text: text(ids))
            of_ends = [
                evaluate_answers(model, tokenizer, rows, max_new_tokens=length, generate=False, progress=False).summary
                for length in (6, 2)
            ]
        assert [of_end.exact_match for of_end in of_ends] == [0.0, 1.0] and of_ends[0].rows > 1
    for length in (6, 2):
        by_writing, by_reading = (
            evaluate_answers(model, tokenizer, rows, max_new_tokens=length, generate=written, progress=False).summary
            for written in (True, False)
        )
        assert by_writing.exact_match == by_reading.exact_match


def test_no_token_beyond_the_learnt_positions_is_asked_for():
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    model, row = GPT2LMHeadModel(config).eval(), {"input_ids": [*range(3, 67)], "labels": [], "prompt_length": 3}
    (read,) = forced_answers(model, word_tokenizer(), [row], [5], progress=False)
    assert len(read) <= 5
