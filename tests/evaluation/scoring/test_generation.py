"""Greedy answers of many prompts at once, against a loop that keeps no cache and pads nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.architectures import random_model, tiny_config
from helpers.tiny_models import tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, OlmoConfig

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring import generation
from lowmem_npo.evaluation.scoring.batching import batches, cache_tokens
from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers, sampled_answers

EOS = 1


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Lengths that differ by an order of magnitude, so that a wrong mask or position would show."""
    random = torch.Generator().manual_seed(3)
    sizes = [(3, 6), (31, 12), (1, 4), (17, 1), (9, 12), (30, 9), (4, 7), (22, 12)]
    return [Prompt(torch.randint(2, 97, (length,), generator=random).tolist(), new) for length, new in sizes]


def one_at_a_time(model, prompt: Prompt) -> list[int]:
    """The definition: the most likely token behind everything so far, again and again."""
    ids, answer = list(prompt.ids), []
    with torch.no_grad():
        while len(answer) < prompt.max_new_tokens:
            token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            if token == EOS:
                break
            answer.append(token)
            ids.append(token)
    return answer


@pytest.mark.parametrize("architecture", ["olmo", "llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_batch_says_what_each_prompt_says_alone(architecture, batch_size, tokenizer, prompts):
    model = tiny_model(architecture)
    alone = [one_at_a_time(model, prompt) for prompt in prompts]
    assert len({tuple(answer) for answer in alone}) > 4  # not all the same, or any mix-up would pass
    assert greedy_answers(model, tokenizer, prompts, batch_size=batch_size, progress=False) == alone


@pytest.mark.parametrize("architecture", ["gpt2", "mpt"])
def test_no_answer_goes_beyond_the_learnt_positions(architecture, tokenizer, prompts):
    """The longest prompts have room for fewer tokens than they may take; none may make another's answer fail."""
    torch.manual_seed(0)
    sizes = {"n_positions": 34, "n_embd": 32, "n_layer": 2, "n_head": 2}
    if architecture == "mpt":
        sizes = {"max_seq_len": 34, "d_model": 32, "n_layers": 2, "n_heads": 2}
    config = AutoConfig.for_model(architecture, vocab_size=97, bos_token_id=0, eos_token_id=EOS, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    room = [replace(prompt, max_new_tokens=min(prompt.max_new_tokens, 35 - len(prompt.ids))) for prompt in prompts]
    assert room != prompts
    alone = [one_at_a_time(model, prompt) for prompt in room]
    assert greedy_answers(model, tokenizer, prompts, batch_size=8, progress=False) == alone
    with pytest.raises(UserError, match="A prompt has 35 tokens, but the model has learnt only 34 positions"):
        greedy_answers(model, tokenizer, [Prompt([5] * 35, 1)], progress=False)


@pytest.mark.parametrize("architecture", ["minimax", "rwkv", "bamba"])
def test_prompts_are_padded_only_where_a_recurrent_model_masks_it(architecture, tokenizer, prompts, monkeypatch):
    model = random_model(tiny_config(architecture, 97))
    alone = [one_at_a_time(model, prompt) for prompt in prompts]
    assert greedy_answers(model, tokenizer, prompts, progress=False) == alone
    monkeypatch.setattr(generation, "_masks_padding", lambda *_: True)
    assert (greedy_answers(model, tokenizer, prompts, progress=False) == alone) == (architecture == "bamba")


def test_padding_on_the_wrong_side_is_noticed(tokenizer, prompts, monkeypatch):
    """The check above is sharp: right padding, and a mask that says nothing, both change answers."""
    model = tiny_model()
    alone = [one_at_a_time(model, prompt) for prompt in prompts]
    generate = type(model).generate

    def unmasked(self, input_ids, attention_mask, **kwargs):
        return generate(self, input_ids=input_ids, attention_mask=torch.ones_like(attention_mask), **kwargs)

    def right_padded(self, input_ids, attention_mask, **kwargs):
        order = attention_mask.argsort(dim=1, descending=True, stable=True)
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        return generate(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    for broken in (unmasked, right_padded):
        monkeypatch.setattr(type(model), "generate", broken)
        assert greedy_answers(model, tokenizer, prompts, batch_size=8, progress=False) != alone


def test_answers_end_before_the_end_of_sequence(tokenizer, prompts):
    """A model that always says EOS answers nothing; one whose configuration names another stop obeys it too."""
    model = tiny_model()
    free = greedy_answers(model, tokenizer, prompts, progress=False)
    spoken = free[1]
    stop = spoken[3]
    model.generation_config.eos_token_id = [EOS, stop]
    stopped = greedy_answers(model, tokenizer, prompts, progress=False)
    assert stopped[1] == spoken[: spoken.index(stop)]
    assert all(stop not in answer for answer in stopped)


@pytest.mark.parametrize(
    "template, ends",
    [
        ("{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}", True),
        ("{% for m in messages %}<|end|>{{ m['content'] }}\n{% endfor %}", False),  # opens turns, ends none
        ("{{ raise_exception('no such conversation') }}", False),
        (None, False),
    ],
)
def test_answers_end_with_the_turn(template, ends, byte_model, prompts):
    """An end of turn that is special in tokenizer.json alone, as in Gemma, Llama 3 and Phi 3."""
    tokenizer, model = AutoTokenizer.from_pretrained(byte_model), tiny_model()
    spoken = greedy_answers(model, tokenizer, prompts, progress=False)[1]
    stop, cut = spoken[3], spoken[: spoken.index(spoken[3])]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    (text,) = (text for text, number in backend["model"]["vocab"].items() if number == stop)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(text, special=True)])
    tokenizer.chat_template = template and template.replace("<|end|>", text)
    assert stop not in tokenizer.all_special_ids  # which tokenizer.json alone does not fill
    answer = greedy_answers(model, tokenizer, prompts, progress=False)[1]
    assert answer == (cut if ends else spoken)


# What published models' generation_config.json holds, and what else it can hold.
PUBLISHED = {
    "sampling": {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "repetition_penalty": 5.0, "max_length": 3},
    "lengths": {"no_repeat_ngram_size": 1, "min_length": 40, "min_new_tokens": 9, "num_beams": 3, "max_time": 1e-9},
    "suppressed": {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7], "bad_words_ids": [[8]]},
    "forced": {"forced_bos_token_id": 5, "forced_eos_token_id": 6, "exponential_decay_length_penalty": [1, 9.0]},
    "biases": {"sequence_bias": [[[5], -50.0]], "encoder_repetition_penalty": 4.0, "guidance_scale": 3.0},
    "watermark": {"watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash", "greenlist_ratio": 0.1}},
    "truncation": {"do_sample": True, "min_p": 0.5, "typical_p": 0.2, "epsilon_cutoff": 0.3, "eta_cutoff": 0.3},
    "other ways": {"penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3, "cache_implementation": "static"},
    "other results": {
        "do_sample": True,
        "return_dict_in_generate": True,
        "output_scores": True,
        "num_return_sequences": 2,
    },
    "stop strings": {"stop_strings": ["e", "</s>"], "use_cache": False},
}


@pytest.mark.parametrize("settings", [*PUBLISHED.values(), None], ids=[*PUBLISHED, "no settings at all"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_published_settings_do_not_change_what_is_measured(settings, adapted, tokenizer, prompts):
    """Greedy answers are the most likely ones, and samples those of the whole distribution."""
    model = tiny_model()
    subject = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])) if adapted else model
    model.generation_config = GenerationConfig(eos_token_id=EOS)
    sampling = {"samples": 3, "temperature": 0.7, "progress": False}
    plain = (
        greedy_answers(model, tokenizer, prompts, progress=False),
        sampled_answers(model, tokenizer, prompts, **sampling),
    )
    if settings is None:
        model.generation_config = published = None
    else:
        model.generation_config = published = GenerationConfig(eos_token_id=EOS, **settings)
        before = published.to_dict()
    assert greedy_answers(subject, tokenizer, prompts, progress=False) == plain[0]
    assert sampled_answers(subject, tokenizer, prompts, **sampling) == plain[1]
    assert model.generation_config is published
    assert published is None or published.to_dict() == before


def test_samples_are_of_the_whole_distribution(tokenizer):
    """The shares of the first token are the model's probabilities, whatever cut-offs the model was published with."""
    model, count = tiny_model(), 4000
    model.generation_config = GenerationConfig(eos_token_id=EOS, do_sample=True, min_p=0.5, top_k=3, top_p=0.3)
    with torch.no_grad():
        expected = model.double()(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    model.float()
    (answers,) = sampled_answers(
        model, tokenizer, [Prompt([5, 6, 7], 1)], samples=count, batch_size=count, progress=False
    )
    tokens = torch.tensor([answer[0] if answer else EOS for answer in answers])
    shares = tokens.bincount(minlength=97) / count
    assert (shares - expected).abs().max() < 4 * 0.5 / count**0.5
    assert (shares > 0).sum() > 0.9 * (expected > 5 / count).sum() > 3


def test_the_model_is_given_back_as_it_came(tokenizer, prompts):
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.model.layers[0].eval()  # a caller's own choice, which .train() would overrule
    model.config.use_cache = False
    flags = [module.training for module in model.modules()]
    saved = model.generation_config.to_dict()

    answers = greedy_answers(model, tokenizer, prompts, progress=False)
    assert [module.training for module in model.modules()] == flags
    assert model.config.use_cache is False and model.is_gradient_checkpointing
    assert model.generation_config.to_dict() == saved
    assert answers == greedy_answers(tiny_model(), tokenizer, prompts, progress=False)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    model.generate = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        greedy_answers(model, tokenizer, prompts, progress=False)
    assert [module.training for module in model.modules()] == flags


def test_the_cache_is_used(tokenizer, monkeypatch):
    """After the prompt, one token at a time goes through the model: quadratic generation would be a silent waste."""
    model, widths = tiny_model(), []
    forward = type(model).forward

    def watched(self, input_ids=None, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    model.config.use_cache = False
    greedy_answers(model, tokenizer, [Prompt([5, 6, 7], 4), Prompt([8], 4)], progress=False)
    assert widths[0] == 3 and set(widths[1:]) == {1}


class WeightsByRow(TorchDispatchMode):
    """Products of every row's states with weights of its own, (rows, d) and (rows, d, vocabulary)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.seen = vocabulary, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen += function is torch.ops.aten.bmm.default and arguments[1].shape[-1] == self.vocabulary
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("architecture", ["olmo", "llama", "gemma2"])
def test_the_heads_weights_are_not_copied_for_every_row(architecture, tokenizer, prompts):
    """As PyTorch does with states that are not side by side, such as the last of several prompts."""
    model = tiny_model(architecture)
    with WeightsByRow(model.config.vocab_size) as products:
        greedy_answers(model, tokenizer, prompts, progress=False)
    assert products.seen == 0
    with WeightsByRow(model.config.vocab_size) as products, torch.no_grad():
        model(input_ids=torch.ones(2, 5, dtype=torch.long), logits_to_keep=1)
    assert products.seen == 1  # it would be seen


def test_batches_hold_every_row_once_and_keep_their_bounds():
    random = torch.Generator().manual_seed(0)
    lengths = [tuple(pair) for pair in torch.randint(1, 200, (97, 2), generator=random).tolist()] + [(5000, 1)]
    seen = []
    for batch in batches(lengths, batch_size=7, max_batch_tokens=1000):
        padded = max(lengths[i][0] for i in batch) + max(lengths[i][1] for i in batch)
        assert len(batch) <= 7 and (len(batch) == 1 or len(batch) * padded <= 1000)
        seen += batch
    assert sorted(seen) == list(range(98))
    assert list(batches([])) == []


def test_the_cache_bounds_a_batch():
    """OLMo-7B in bf16 keeps 0.5 MiB of keys and values per token, so 2048 tokens; models with fewer heads keep more."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        olmo = AutoModelForCausalLM.from_config(OlmoConfig(vocab_size=50304, **sizes), dtype=torch.bfloat16)
        grouped = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=128, num_key_value_heads=8, **sizes), dtype=torch.float32
        )
    assert cache_tokens(olmo) == 2048
    assert cache_tokens(grouped) == 2048 * 32 // 8 // 2
    assert cache_tokens(tiny_model("gemma2")) == 2**30 // (2 * 2 * 4 * 8 * 4)
    mixed = random_model(tiny_config("gemma4_text", 97))  # whose layers differ
    heads = [layer.num_key_value_heads * layer.head_dim for layer in mixed.config.per_layer_config]
    assert heads[0] != heads[1] and cache_tokens(mixed) == 2**30 // (2 * sum(heads) * 4)
