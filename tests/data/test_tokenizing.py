"""Ids and labels, with the real OLMo tokenizer on real rows and with tokenizers of the other families."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem_kernels import IGNORE_INDEX
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from lowmem_npo import progress
from lowmem_npo.data import tokenizing
from lowmem_npo.data.example import Example
from lowmem_npo.data.reading import read_rows
from lowmem_npo.data.schemas import to_examples
from lowmem_npo.data.templates import Template
from lowmem_npo.data.tokenizing import decode, tokenize
from lowmem_npo.errors import UserError

REAL = {"lume/forget_train.jsonl": None, "lume/retain_validation.jsonl": None, "tofu/forget05.json": 100}


def pair(prompt, answer, schema="input/output", line=1):
    return Example(prompt, answer, f"f.jsonl, line {line}", schema)


def answer_ids(row):
    return row["input_ids"][row["prompt_length"] :]


def check_boundary(tokenizer, examples, rows):
    """Text, prompt and labels of every row, stated without the code under test."""
    assert len(rows) == len(examples) > 0
    for example, row in zip(examples, rows, strict=True):
        prompt = example.prompt if "input" in example.schema else f"Question: {example.prompt}\nAnswer:"
        ids, length = row["input_ids"], row["prompt_length"]
        assert ids[:length] == tokenizer(prompt).input_ids, "the prompt is not what generation starts from"
        assert tokenizer.decode(ids) == f"{prompt} {example.answer}<|endoftext|>", "a space is lost or doubled"
        assert row["labels"] == [IGNORE_INDEX] * length + ids[length:]
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("file", REAL)
def test_real_rows_keep_their_text_and_their_prompt(shared_data, olmo_tokenizer, file):
    examples = to_examples(read_rows(str(shared_data / file), limit=REAL[file]))
    check_boundary(olmo_tokenizer, examples, tokenize(examples, olmo_tokenizer))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda self, example: (example.prompt, example.answer),
        lambda self, example: (example.prompt + " ", " " + example.answer),
        lambda self, example: (example.prompt + " ", example.answer),
    ],
    ids=["space lost", "space doubled", "space with the prompt"],
)
def test_the_check_sees_a_wrong_space(shared_data, olmo_tokenizer, monkeypatch, wrong):
    examples = to_examples(read_rows(str(shared_data / "lume/forget_train.jsonl"), limit=5))
    check_boundary(olmo_tokenizer, examples, tokenize(examples, olmo_tokenizer))
    monkeypatch.setattr(Template, "render", wrong)
    with pytest.raises(AssertionError):
        check_boundary(olmo_tokenizer, examples, tokenize(examples, olmo_tokenizer))


def test_the_space_is_part_of_the_answers_first_token(olmo_tokenizer):
    row = tokenize([pair("The capital of France is ", "Paris")], olmo_tokenizer)[0]
    assert olmo_tokenizer.convert_ids_to_tokens(answer_ids(row)) == ["ĠParis", "<|endoftext|>"]


words = st.text(st.sampled_from("aeinst .,?!'\"-\n\t12é東😀"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=200, deadline=None)
@given(prompt=words, answer=words)
def test_any_text_joined_as_it_stands_comes_back(olmo_tokenizer, prompt, answer):
    row = tokenize([pair(prompt, answer, "prompt/completion")], olmo_tokenizer)[0]
    assert olmo_tokenizer.decode(row["input_ids"]) == prompt + answer + "<|endoftext|>"
    assert row["input_ids"][: row["prompt_length"]] == olmo_tokenizer(prompt.rstrip(" \t")).input_ids


def test_a_token_never_straddles_the_boundary(olmo_tokenizer):
    joined = olmo_tokenizer("hello").input_ids
    row = tokenize([pair("hel", "lo", "prompt/completion")], olmo_tokenizer)[0]
    assert len(joined) == 1, "the word is one token, across the boundary"
    assert row["input_ids"][: row["prompt_length"]] == olmo_tokenizer("hel").input_ids
    assert olmo_tokenizer.decode(row["input_ids"]) == "hello<|endoftext|>"


@pytest.mark.parametrize(
    ("prompt", "answer", "schema", "text"),
    [
        ("What is the capital?", "Paris", "input/output", "What is the capital? Paris"),
        ("What is the capital?\n", "Paris", "input/output", "What is the capital?\nParis"),
        ("un", "able", "prompt/completion", "unable"),
        ("What", "?!", "prompt/completion", "What?!"),
        ("capital", "東", "prompt/completion", "capital東"),
    ],
)
def test_sentencepiece_style_tokenizers_gain_no_space(llama_tokenizer, prompt, answer, schema, text):
    row = tokenize([pair(prompt, answer, schema)], llama_tokenizer)[0]
    assert llama_tokenizer.decode(row["input_ids"]) == f"<s> {text}</s>"
    assert row["input_ids"][: row["prompt_length"]] == llama_tokenizer(prompt).input_ids
    assert row["input_ids"].count(llama_tokenizer.bos_token_id) == 1
    assert row["labels"][-1] == llama_tokenizer.eos_token_id


def test_tokenising_the_answer_by_itself_would_double_the_space(llama_tokenizer):
    """Why the answer is taken from the joined text: the obvious way is wrong for this family."""
    apart = llama_tokenizer("the capital?").input_ids + llama_tokenizer(" Paris", add_special_tokens=False).input_ids
    assert llama_tokenizer.decode(apart) == "<s> the capital?  Paris"


def test_a_tokenizer_that_appends_eos_does_not_end_the_prompt(llama_tokenizer):
    backend = Tokenizer.from_str(llama_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    appending = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert appending("What is").input_ids[-1] == appending.eos_token_id
    for example in (pair("What is", "this"), Example(None, "this", "f", "text")):
        assert tokenize([example], appending)[0] == tokenize([example], llama_tokenizer)[0]


def test_all_tokens_are_labelled_but_the_first(bpe_tokenizer):
    row = tokenize([pair("She was", "born")], bpe_tokenizer, tokens="all")[0]
    assert row["labels"] == [IGNORE_INDEX, *row["input_ids"][1:]]
    assert row["prompt_length"] == len(bpe_tokenizer("She was").input_ids)


def test_text_is_labelled_but_for_the_token_that_nothing_precedes(bpe_tokenizer, llama_tokenizer):
    text = Example(None, "She was born", "f.jsonl, line 1", "text")
    for tokenizer in (bpe_tokenizer, llama_tokenizer):
        row = tokenize([text], tokenizer)[0]
        assert row["input_ids"] == [*tokenizer("She was born").input_ids, tokenizer.eos_token_id]
        assert row["labels"] == [IGNORE_INDEX, *row["input_ids"][1:]]
        assert row["prompt_length"] == 0


def test_a_text_of_which_nothing_is_learnt_is_refused(bpe_tokenizer, llama_tokenizer):
    """Its end alone would be: a run would say that the model recites it, or has forgotten it."""
    word, more = (Example(None, text, "f.jsonl, line 2", "text") for text in ("a", "a a"))
    assert tokenize([more], bpe_tokenizer).num_labels == 3
    for text in (word, replace(word, continues=True)):
        with pytest.raises(UserError, match="^f.jsonl, line 2 is a text of a single token"):
            tokenize([more, text], bpe_tokenizer)
        assert len(tokenize([more, text], bpe_tokenizer, drop_too_long=True)) == 1  # of rows that nobody chose
    assert tokenize([word], llama_tokenizer).num_labels > 1  # after a BOS
    assert tokenize([more], bpe_tokenizer).report("forget") == [
        "forget: 1 row, 4 tokens, 3 of them labelled; the longest row has 4"
    ]


def test_truncation_takes_the_answers_tail_and_is_counted(bpe_tokenizer):
    examples = [pair("She was", "born in the old town"), pair("She was", "born")]
    whole = tokenize(examples, bpe_tokenizer)
    lengths = [len(row["input_ids"]) for row in whole]
    cut = tokenize(examples, bpe_tokenizer, max_length=lengths[1])
    assert lengths[0] > lengths[1]
    assert cut[0]["input_ids"] == whole[0]["input_ids"][: lengths[1]]
    assert cut[0]["labels"] == whole[0]["labels"][: lengths[1]]
    assert cut[1] == whole[1]
    assert (cut.cut, cut.num_truncated) == ([lengths[0] - lengths[1], 0], 1)
    assert whole.num_truncated == 0
    assert len(whole.report("forget")) == 1
    report = cut.report("forget")[1]
    assert f"1 row cut to {lengths[1]} tokens, losing the last {lengths[0] - lengths[1]} tokens" in report
    assert f"--max-length {lengths[0]} would keep all" in report


def test_no_more_tokens_are_advised_than_the_model_has_positions_for(bpe_tokenizer):
    examples = [pair("She was", "born"), pair("She was", "born in the old town"), pair("She was", "born " * 50)]
    first, second, third = (len(row["input_ids"]) for row in tokenize(examples, bpe_tokenizer))

    def advice(positions):
        cut = tokenize(examples, bpe_tokenizer, max_length=first, positions=lambda: positions)
        return cut.report("forget")[1].split("; ")[1]

    assert advice(None) == advice(third) == f"--max-length {third} would keep all"
    most = f"--max-length {second}, the most that the model has positions for, would keep 1 of the 2 whole"
    assert advice(second) == most
    assert advice(first) == f"the model has positions for {first} tokens, so that none is kept by a longer --max-length"
    long = [pair("She was " * 20, "born")]
    with pytest.raises(UserError, match="and the model has positions for 9 tokens; shorten the prompts"):
        tokenize(long, bpe_tokenizer, max_length=8, positions=lambda: 9)
    with pytest.raises(UserError, match="or more, or remove these rows"):
        tokenize(long, bpe_tokenizer, max_length=8, positions=lambda: 900)


def test_an_answer_that_truncation_removes_is_refused(bpe_tokenizer):
    examples = [pair("She was", "born", line=1), pair("She was born in the", "old town", line=2)]
    prompt = len(bpe_tokenizer("She was born in the").input_ids)
    assert tokenize(examples, bpe_tokenizer, max_length=prompt + 1).num_labels > 0
    with pytest.raises(UserError) as error:
        tokenize(examples, bpe_tokenizer, max_length=prompt)
    assert f"f.jsonl, line 2 (prompt of {prompt} tokens)" in str(error.value)
    assert "line 1" not in str(error.value)
    needed = int(str(error.value).split("give --max-length ")[1].split()[0])
    assert tokenize(examples, bpe_tokenizer, max_length=needed).num_labels > 0


def test_counts(bpe_tokenizer):
    rows = tokenize([pair("She was", "born"), pair("She was", "born in the old town")], bpe_tokenizer)
    assert rows.num_tokens == sum(len(row["input_ids"]) for row in rows)
    assert rows.num_labels == rows.num_tokens - 2 * len(bpe_tokenizer("She was").input_ids)
    assert rows.longest == len(rows[1]["input_ids"])


def test_fingerprints_follow_ids_and_labels(bpe_tokenizer):
    examples = [pair("She was", "born"), pair("He was", "born")]

    def fingerprint(examples, **options):
        return tokenize(examples, bpe_tokenizer, **options).fingerprint

    same = fingerprint(list(examples))
    assert fingerprint(examples) == same
    others = [
        fingerprint(examples[::-1]),
        fingerprint(examples[:1]),
        fingerprint(examples, tokens="all"),
        fingerprint(examples, template=Template("{prompt}:")),
    ]
    assert len({same, *others}) == 5


def test_what_cannot_be_tokenised_is_refused(olmo_tokenizer):
    with pytest.raises(UserError, match="answer, all"):
        tokenize([pair("a", "b")], olmo_tokenizer, tokens="some")
    combining = pair("caf" + "e", "\u0301 au lait", "prompt/completion")  # the tokenizer joins e and its accent
    with pytest.raises(UserError, match=r"f\.jsonl, line 1: the tokenizer cannot write this answer"):
        tokenize([combining], olmo_tokenizer)
    with pytest.raises(UserError, match="no EOS token"):
        tokenize([pair("a", "b")], PreTrainedTokenizerFast(tokenizer_object=olmo_tokenizer.backend_tokenizer))


@pytest.mark.parametrize(
    ("example", "template", "text"),
    [
        (
            Example("Who?", "She.", "here", "question/answer"),
            "<s>[INST] {prompt} [/INST]",
            "<s>[INST] Who? [/INST] She.</s>",
        ),
        (Example("Who?", "She.</s>", "here", "question/answer"), "{prompt}", "<s> Who? She.</s>"),
        (Example("<s>Who?", " She.</s>\n", "here", "prompt/completion"), None, "<s>Who? She.</s>"),
        (Example(None, "<s>She.</s>", "here", "text"), None, "<s>She.</s>"),
        (Example("<s>Who?", "She.", "here", "question/answer"), "plain", "<s> Question: Who?\nAnswer: She.</s>"),
        (Example("Who?", "She.", "here", "question/answer"), "{prompt}", None),
        (Example("Is </s> an end?", "Yes, </s> is.", "here", "question/answer"), "{prompt}", None),
    ],
)
def test_special_tokens_that_the_row_or_the_template_brings_are_written_once(llama_tokenizer, example, template, text):
    rows = tokenize([example], llama_tokenizer, template=Template(template or "auto"))
    ids = rows[0]["input_ids"]
    assert (ids.count(1), ids[0], ids[-1]) == (1, 1, 2) and ids[-2] != 2
    assert rows.repeated == (text is not None)
    if text is not None:
        assert decode(llama_tokenizer, ids).replace(" ", "") == text.replace(" ", "")
        assert "1 row with special tokens" in rows.report("forget")[1]


def test_many_rows_say_how_far_they_are(olmo_tokenizer, monkeypatch, capsys):
    examples = [pair("2 + 2 =", "4")] * 3
    tokenize(examples, olmo_tokenizer)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tokenizing, "DELAY", 0)
    monkeypatch.setattr(progress, "SECONDS", 0)
    tokenize(examples, olmo_tokenizer)
    assert "tokenising, row 2 of 3" in capsys.readouterr().err
