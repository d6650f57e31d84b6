"""Answers read off the likelihoods: the most likely token after each true one, of rows together and one by one."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_step import random_rows, word_tokenizer
from helpers.tiny_models import CONFIGS, tiny_model

from lowmem_npo.evaluation.scoring import token_scores
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
        logits = reference(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, -1 - length : -1]
        expected = logits.argmax(-1).tolist()
        stop = expected.index(1) if 1 in expected else length  # t1 ends an answer
        ended += stop < length
        assert answer == expected[:stop]
    assert CONFIGS[architecture] and any(answers)


def test_a_greedy_answer_is_read_off_whole():
    """Of a row whose answer is what the model writes: the same tokens, its end included."""
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    prompts = [Prompt(row["input_ids"][:3], 6) for row in random_rows(4, seed=5)]
    written = greedy_answers(model, tokenizer, prompts, progress=False)
    pairs = [(p.ids, ids) for p, ids in zip(prompts, written, strict=True) if ids]
    rows = [{"input_ids": [*a, *b], "labels": [*a, *b], "prompt_length": len(a)} for a, b in pairs]
    read = forced_answers(model, tokenizer, rows, [len(b) for _, b in pairs], progress=False)
    assert read == [b for _, b in pairs] and len(read) > 1
