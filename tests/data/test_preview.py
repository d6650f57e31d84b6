"""The preview shows the very text of the ids, and marks what is labelled."""

from __future__ import annotations

import re

from lowmem_npo.data.example import Example
from lowmem_npo.data.preview import preview
from lowmem_npo.data.tokenizing import tokenize

EXAMPLES = [
    Example("Who was born in Paris?", "She.", "f.jsonl, line 3", "question/answer"),
    Example(None, "She was born.", "f.jsonl, line 4", "text"),
]


def test_labelled_text_is_marked(bpe_tokenizer):
    rows = tokenize(EXAMPLES, bpe_tokenizer)
    total, prompt = len(rows[0]["input_ids"]), rows[0]["prompt_length"]
    text = preview(rows, bpe_tokenizer, 1, title="forget", color=False)
    assert "Question: Who was born in Paris?\nAnswer:⟦ She.<|endoftext|>⟧" in text
    facts = f"{total} tokens, {prompt} of them prompt, {total - prompt} labelled"
    assert f"forget 1 of 2 (f.jsonl, line 3): {facts}\n" in text
    assert "forget 2 of 2" not in text


def test_spaces_survive_in_every_family(llama_tokenizer):
    rows = tokenize(EXAMPLES, llama_tokenizer)
    text = preview(rows, llama_tokenizer, 2, color=False)
    assert "Answer:⟦ She.</s>⟧" in text
    assert "<s>⟦ She was born.</s>⟧" in text
    for row in rows:
        assert llama_tokenizer.decode(row["input_ids"]) in text.replace("⟦", "").replace("⟧", "")


def test_all_tokens_are_marked_when_all_count(bpe_tokenizer):
    text = preview(tokenize(EXAMPLES[:1], bpe_tokenizer, tokens="all"), bpe_tokenizer, 1, color=False)
    assert "\nQ⟦uestion: Who was born in Paris?\nAnswer: She.<|endoftext|>⟧" in text


def test_the_token_that_nothing_precedes_is_explained(bpe_tokenizer):
    text = preview(tokenize(EXAMPLES, bpe_tokenizer), bpe_tokenizer, 2, color=False)
    assert text.count("the first is not labelled: nothing precedes it") == 1
    assert "\nS⟦he was born.<|endoftext|>⟧" in text


def test_truncation_is_reported(bpe_tokenizer):
    most = len(tokenize(EXAMPLES[:1], bpe_tokenizer)[0]["input_ids"]) - 1
    rows = tokenize(EXAMPLES[:1], bpe_tokenizer, max_length=most)
    text = preview(rows, bpe_tokenizer, 1, title="forget", color=False)
    assert "1 cut off the end" in text
    assert "Answer:⟦ She.⟧" in text
    assert f"forget: 1 row cut to {most} tokens" in text


def test_colours_change_nothing_else(bpe_tokenizer):
    rows = tokenize(EXAMPLES, bpe_tokenizer)
    coloured, plain = (preview(rows, bpe_tokenizer, 2, color=color) for color in (True, False))
    assert "\033[" not in plain
    assert re.sub(r"\033\[\d+m", "", coloured) == plain != coloured
    assert preview(rows, bpe_tokenizer, 2) == plain, "no colours where output is not a terminal"
