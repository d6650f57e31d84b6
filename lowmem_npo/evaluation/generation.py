"""Greedy answers, many prompts at a time: left padding, KV cache, the same text as one prompt at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.evaluation.batching import BATCH_SIZE, batches
from lowmem_npo.evaluation.mode import evaluating, progress_bar
from lowmem_npo.model import compute_autocast


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, and how many new tokens may follow them (the end-of-sequence token included)."""

    ids: Sequence[int]
    max_new_tokens: int


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = BATCH_SIZE,
    description: str = "greedy answers",
    progress: bool = True,
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, in the order of `prompts`.

    Answers end before the first end-of-sequence token (the tokenizer's, or any the model itself names) or after their
    own `max_new_tokens`. At most `batch_size` prompts are continued together, fewer when they are long.
    """
    stops = _stop_ids(model, tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), compute_autocast(model), progress_bar(len(prompts), description, progress) as bar:
        for batch in batches([(len(prompt.ids), prompt.max_new_tokens) for prompt in prompts], batch_size):
            continuations = _continue(model, tokenizer, [prompts[i] for i in batch], stops)
            for i, ids in zip(batch, continuations, strict=True):
                ids = ids[: prompts[i].max_new_tokens]
                end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
                answers[i] = ids[:end]
            bar.update(len(batch))
    return answers


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], stops: list[int]
) -> list[list[int]]:
    width = max(len(prompt.ids) for prompt in prompts)
    # Padding is masked, so any id would do; not every tokenizer has one of its own.
    pad = next((token for token in [tokenizer.pad_token_id, *stops] if token is not None), 0)
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        attention_mask[row, width - len(prompt.ids) :] = 1
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        # Written out, because whatever is left open is taken from the model's own generation_config.json, where
        # published models keep sampling settings and repetition penalties.
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            max_new_tokens=max(prompt.max_new_tokens for prompt in prompts),
            eos_token_id=stops,
            pad_token_id=pad,
            use_cache=True,
        ),
    )
    return output[:, width:].tolist()


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in [tokenizer.eos_token_id, *of_model] if token is not None})
