"""How likely the original model finds what is said: dense float64 without the adapter, and who is not asked."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.dense_step import word_tokenizer
from helpers.rows import write_rows
from helpers.tiny_models import tiny_model
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowmem_npo.cli import main
from lowmem_npo.config import AdapterConfig
from lowmem_npo.evaluation.fluency import fluency, fluency_text
from lowmem_npo.evaluation.scoring.journal import Journal
from lowmem_npo.evaluation.scoring.scorer import Scorer
from lowmem_npo.model import attach_lora


def changed(base):
    """The model with an adapter that changes it."""
    model = attach_lora(base, AdapterConfig(lora_r=2, lora_targets=("all-linear",)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def dense_nll(base, prompt, answer):
    """Mean -log p of the answer's tokens, of full float64 logits."""
    with torch.no_grad():
        logp = base(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return -logp[at, torch.tensor(answer)].mean().item()


def test_it_is_the_original_models_nll_of_each_answer():
    """Also of one that is nothing but special tokens, 1 and 2, which no text tells."""
    base = tiny_model()
    said = [([5, 6], [7, 8, 9]), ([5], []), ([6, 7, 8], [2, 2, 1, 2])]
    expected = [dense_nll(base, prompt, answer) for prompt, answer in said if answer]
    model = changed(base)
    ids = torch.tensor([said[0][0]])
    adapted = model(ids).logits
    figures = fluency(Scorer(model, word_tokenizer(), Journal(None, progress=False), 8), "forget", said)
    assert figures == {"rows": 2, "silent": 1, "nll": pytest.approx(sum(expected) / 2, rel=1e-5)}
    assert torch.equal(model(ids).logits, adapted)  # the adapter is on again
    assert fluency_text({"forget": figures}).startswith(f"forget: NLL {figures['nll']:.3f}")


def test_an_answer_that_fills_the_learnt_positions():
    """Its last token is written in the last of them, and has none of its own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=2, eos_token_id=1)
    base = AutoModelForCausalLM.from_config(config).eval()
    model, prompts = changed(base), [[5, 6, 7], list(range(5, 21))]
    scorer = Scorer(model, word_tokenizer(), Journal(None, progress=False), 8)
    answers = [one.ids for one in scorer.continuations("x", prompts, 64)]
    assert [len(ids) for ids in answers] == [14, 1]
    figures = fluency(scorer, "forget", list(zip(prompts, answers, strict=True)))
    with model.disable_adapter():
        expected = dense_nll(model, prompts[0], answers[0][:13])
    assert figures == {"rows": 1, "silent": 0, "nll": pytest.approx(expected, rel=1e-5)}


TOFU = [{"question": f"Who is {n}?", "answer": "Ada.", "perturbed_answer": ["Bo."]} for n in "ab"]
LUME = [{"id": f"{n}qa0", "input": f"Where is {n}?", "output": "Rome", "task": "Task1"} for n in "ab"]
PLAIN = [{"question": f"Who is {n}?", "answer": "Ada."} for n in "ab"]


@pytest.mark.parametrize(
    "rows, prompt, tokens",
    [
        (TOFU, lambda row: f"Question: {row['question']}\nAnswer:", 200),
        (LUME, lambda row: row["input"], 256),
        (PLAIN, lambda row: f"Question: {row['question']}\nAnswer:", 64),
    ],
    ids=["tofu", "lume", "plain"],
)
def test_of_the_very_tokens_that_the_model_wrote(rows, prompt, tokens, byte_model, tmp_path):
    """Of bytes that are no characters, as a random model writes them, a text has others."""
    base = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32)
    torch.manual_seed(0)
    changed(base).save_pretrained(tmp_path / "adapter")
    options = ["--forget", write_rows(tmp_path / "forget.jsonl", rows), "--device", "cpu", "--dtype", "float32"]
    assert main(["evaluate", "--adapter", str(tmp_path / "adapter"), "--model", str(byte_model), *options]) == 0
    folder = tmp_path / "adapter" / "evaluation"
    found = json.loads((folder / "evaluation.json").read_text())["fluency"]["forget"]
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    base = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected, retold = [], []
    for row in rows:
        ids = tokenizer(prompt(row), return_tensors="pt").input_ids
        with torch.no_grad():
            mask = torch.ones_like(ids)
            whole = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)[0]
        answer = [token for token in whole[ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
        with model.disable_adapter():
            expected.append(dense_nll(model, ids[0].tolist(), answer))
        retold.append(tokenizer(tokenizer.decode(answer, skip_special_tokens=True)).input_ids == answer)
    assert not all(retold)
    assert found == {"rows": 2, "silent": 0, "nll": pytest.approx(sum(expected) / 2, rel=1e-4)}
    assert '"ids"' not in (folder / "rows.jsonl").read_text()


def test_without_an_adapter_there_is_no_original_to_ask(byte_model):
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    assert fluency(Scorer(model, tokenizer, Journal(None), 8), "forget", [([1, 2], [3])]) is None
    assert "NLL –" in fluency_text({"forget": {"rows": 0, "silent": 2, "nll": None}})
