"""A real instruct model: what is labelled is what it would say, in the form it was taught."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.data import Example, Template, tokenize

QA = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
]
EXAMPLES = [Example(question, answer, "here", "question/answer") for question, answer in QA]


@pytest.fixture(scope="module")
def model(instruct_model):
    return AutoModelForCausalLM.from_pretrained(instruct_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(instruct_model):
    return AutoTokenizer.from_pretrained(instruct_model)


@pytest.fixture(scope="module")
def published(instruct_model, tmp_path_factory):
    """The same tokenizer in the layout of Gemma 3 and Phi 3: EOS is another token, the end of turn is named nowhere."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(instruct_model / name, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def nll(model, row):
    """Of each labelled token."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    of_all = -model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return of_all[labels != -100]


def test_every_labelled_token_is_one_that_the_model_can_say(model, tokenizer, published):
    assert "<|im_end|>" not in published.all_special_tokens
    ours, theirs = tokenize(EXAMPLES, tokenizer), tokenize(EXAMPLES, published)
    assert list(ours) == list(theirs)
    for row, (_, answer) in zip(theirs, QA, strict=True):
        assert published.decode(row["input_ids"][row["prompt_length"] :]) == answer + "<|im_end|>"
    assert torch.cat([nll(model, row) for row in theirs]).mean() < 2


def test_questions_are_asked_in_the_form_that_the_model_knows(model, tokenizer):
    chat = torch.cat([nll(model, row) for row in tokenize(EXAMPLES, tokenizer)]).mean()
    plain = torch.cat([nll(model, row) for row in tokenize(EXAMPLES, tokenizer, template=Template("plain"))]).mean()
    assert chat < plain
    prompt = tokenize(EXAMPLES, tokenizer)[0]
    ids = torch.tensor([prompt["input_ids"][: prompt["prompt_length"]]])
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
