"""The LOSS attack: AUC by hand, the documents' loss against dense float64, and documents that cannot be attacked."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.data import Rows
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks.documents import DOCUMENTS, documents, examples_of, membership
from lowmem_npo.evaluation.scoring.likelihood import answer_likelihoods


@pytest.mark.parametrize(
    "members, nonmembers, auc",
    [
        ([1.0, 2.0], [3.0, 4.0], 1.0),  # members have the lower loss: remembered
        ([3.0, 4.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [2.0, 4.0], 3 / 4),  # 3 of 4 pairs in order
        ([2.0], [2.0, 1.0, 3.0], 1 / 2),  # a tie counts half: (1/2 + 0 + 1) / 3
    ],
)
def test_auc(members, nonmembers, auc):
    score = membership(members, nonmembers)
    assert score.auc == pytest.approx(auc)
    assert (score.members, score.nonmembers, score.all_equal) == (len(members), len(nonmembers), False)


def test_what_an_auc_means():
    low, high = [1.0 + n / 100 for n in range(6)], [2.0 + n / 100 for n in range(6)]
    assert "remembered" in membership(low, high).meaning
    assert "over-forgetting" in membership(high, low).meaning
    assert "chance alone" in membership([1.0], [2.0]).meaning
    assert "coin" in membership([1.0, 4.0], [2.0, 3.0]).meaning
    same = membership([2.0, 2.0], [2.0])
    assert same.auc == 0.5 and same.all_equal and "says nothing" in same.meaning


def test_passages_of_one_document_are_one():
    low, high = [1.0 + n / 100 for n in range(12)], [2.0 + n / 100 for n in range(12)]
    documents = {"members": [n // 6 for n in range(12)], "nonmembers": [n // 3 for n in range(12)]}
    score = membership(low, high, groups=documents)
    assert (score.auc, score.members, score.nonmembers) == (1.0, 12, 12) and "remembered" in membership(
        low, high
    ).meaning
    assert (score.member_groups, score.nonmember_groups, score.group_auc) == (2, 4, 1.0)
    assert "chance alone" in score.meaning and "12 texts of 2 members and 12 of 4 non-members" in score.meaning
    alone = {name: [*range(12)] for name in documents}
    assert membership(low, high, groups=alone) == membership(low, high)
    assert "member_groups" not in DOCUMENTS.to_json(membership(low, high))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number(bad):
    with pytest.raises(UserError, match="not a finite number"):
        membership([1.0, bad], [2.0])


def dense_loss(model, text_ids):
    """Mean over tokens 1.. of -log p, from the model's own logits in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([text_ids])).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(text_ids[1:])))


@pytest.mark.parametrize("broken", [None, "prompt", "end"])
def test_loss_of_whole_documents(byte_model, broken, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    model = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32).eval()
    rows = Rows("m.jsonl", [{"id": "1", "document": "A whole document."}, {"id": "2", "document": "Another"}])
    found = documents(examples_of(rows), tokenizer)
    if broken == "prompt":
        found = [{**row, "prompt_length": 4} for row in found]
    if broken == "end":
        found = [{**row, "input_ids": [*row["input_ids"], tokenizer.eos_token_id]} for row in found]
    ours = [score.nll for score in answer_likelihoods(model, found, progress=False)]
    dense = [dense_loss(model, tokenizer(row["document"]).input_ids) for row in rows.rows]
    assert (ours == pytest.approx(dense, rel=1e-5)) is (broken is None)


def test_which_text_is_the_document(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)

    def text(row):
        return tokenizer.decode(documents(examples_of(Rows("m.jsonl", [row])), tokenizer)[0]["input_ids"])

    assert text({"document": "All of it.", "text": "not this"}) == "All of it."
    assert text({"text": "All of it."}) == "All of it."
    assert text({"id": "1sc1", "input": "She was born", "output": "in Rome."}) == "She was born in Rome."
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    assert text({"messages": turns}) == "Who?\nNobody."


def test_a_document_begins_once_and_has_no_end(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model, bos_token="<pad>")
    around = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A <eos>", special_tokens=around)
    assert tokenizer.decode(tokenizer("She.").input_ids) == "<pad>She.<eos>"
    for text in ("She.", "<pad>She."):
        (row,) = documents(examples_of(Rows("m.jsonl", [{"document": text}])), tokenizer)
        assert tokenizer.decode(row["input_ids"]) == "<pad>She."


def test_a_document_of_one_token(byte_model):
    with pytest.raises(UserError, match="m.jsonl, line 7 is a text of a single token"):
        documents(examples_of(Rows("m.jsonl", [{"document": "x"}], [7])), AutoTokenizer.from_pretrained(byte_model))
