"""Answers, greedy or sampled, many prompts at a time, padded on the left; as of one prompt alone, but for rounding."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from lowmem_npo.data.fit import Fit
from lowmem_npo.data.templates import end_of_turn
from lowmem_npo.evaluation.scoring.batching import BATCH_SIZE, batches, cache_tokens
from lowmem_npo.evaluation.scoring.eval_mode import evaluating, progress_bar
from lowmem_npo.memory.exhausted import in_parts
from lowmem_npo.model import compute_autocast
from lowmem_npo.model.head import few_tokens
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.model.stop_tokens import end_ids


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, and how many new tokens may follow them (the end-of-sequence token included).
    seed: of a continuation that is drawn."""

    ids: Sequence[int]
    max_new_tokens: int
    seed: int = 0


class GumbelNoise(LogitsProcessor):
    """Makes the largest score that of a token drawn from the distribution at `temperature` (Gumbel-max: Maddison et al.
    2014, "A* sampling", eq. 1). Each row's noise is from a generator of its own, whatever rows are beside it."""

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.seeds, self.temperature = seeds, temperature
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (rows, vocabulary) float32."""
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        exponential = torch.empty_like(scores)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self.temperature - exponential.log()  # minus the logarithm of one is standard Gumbel


def greedy_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = BATCH_SIZE,
    description: str = "greedy answers",
    progress: bool = True,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, in the order of `prompts`.

    Answers end before the first end-of-sequence token (the tokenizer's, any the model itself names, or the one that
    ends a turn in the chat template) or after their own `max_new_tokens`. At most `batch_size` prompts are continued
    together, fewer when they are long. A model that has learnt only so many positions says no more than they hold.
    streamer: gets the tokens as they come, of a single prompt.
    """
    settings = {"streamer": streamer}
    return _answers(model, tokenizer, prompts, settings, batch_size, description, progress)


def sampled_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    temperature: float = 1.0,
    seed: int = 0,
    places: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    description: str = "sampled answers",
    progress: bool = True,
    streamer: BaseStreamer | None = None,
) -> list[list[list[int]]]:
    """`samples` continuations of each prompt, drawn from the whole distribution at `temperature`.

    The same seed gives the same samples to the same prompt in the same place, whichever are drawn together, but for
    rounding; the caller's random numbers are left alone. At most `batch_size` samples, or those of one prompt, are
    drawn together, fewer when memory runs out. places: of the prompts among all; default: 0, 1, ...
    """
    settings = {"temperature": temperature, "streamer": streamer}
    repeated = [
        replace(prompt, seed=Random(f"{seed} {place} {sample}").getrandbits(32))
        for place, prompt in zip(range(len(prompts)) if places is None else places, prompts, strict=True)
        for sample in range(samples)
    ]
    together = samples * max(1, batch_size // samples)
    answers = _answers(model, tokenizer, repeated, settings, together, description, progress)
    return [answers[first : first + samples] for first in range(0, len(answers), samples)]


def _answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Mapping[str, Any],
    batch_size: int,
    description: str,
    progress: bool,
) -> list[list[int]]:
    """An answer to each prompt, cut as `greedy_answers` says."""
    stops, fit = stop_ids(model, tokenizer), Fit.of(causal_lm(model))
    for prompt in prompts:
        fit.check("A prompt", prompt.ids, tokenizer)
    if fit.positions is not None:
        prompts = [replace(p, max_new_tokens=min(p.max_new_tokens, fit.positions - len(p.ids) + 1)) for p in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = [(len(prompt.ids), prompt.max_new_tokens) for prompt in prompts]
    room = cache_tokens(model)

    def continued(chosen: Sequence[int]) -> list[list[int]]:
        return _continue(model, tokenizer, [prompts[i] for i in chosen], settings)

    with evaluating(model), compute_autocast(model), progress_bar(len(prompts), description, progress) as bar:
        together = [list(range(len(prompts)))]
        widths = sorted({len(prompt.ids) for prompt in prompts})
        if batch_size > 1 and len(widths) > 1 and _is_recurrent(model) and not _masks_padding(model, tokenizer):
            together = [[i for i, prompt in enumerate(prompts) if len(prompt.ids) == width] for width in widths]
        bounds = (batch_size, room, fit.positions and fit.positions + 1)
        for batch in ([part[i] for i in b] for part in together for b in batches([lengths[i] for i in part], *bounds)):
            for part, continuations in in_parts(model, batch, continued):
                for i, ids in zip(part, continuations, strict=True):
                    ids = ids[: prompts[i].max_new_tokens]
                    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
                    answers[i] = ids[:end]
            bar.update(len(batch))
    return answers


def _continue(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Mapping[str, Any],
) -> list[list[int]]:
    width = max(len(prompt.ids) for prompt in prompts)
    return _generate(model, tokenizer, prompts, settings)[:, width:].tolist()


def _is_recurrent(model: PreTrainedModel | PeftModel) -> bool:
    """Whether some layers hand on a state, where others attend to tokens that a mask can leave out."""
    lm = causal_lm(model)
    kinds = getattr(lm.config.get_text_config(), "layer_types", None) or ()
    return bool(lm._is_stateful) or "linear_attention" in kinds


def _masks_padding(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a prompt that is padded on the left is continued as without padding. The linear attention of RWKV takes
    the padding in, whatever the mask says; that of MiniMax from the second new token on."""
    few = Prompt(few_tokens(causal_lm(model))[0].tolist(), 4)
    wanted = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    together = [[few], [few, Prompt([*few.ids, *few.ids], 4)]]
    outputs = [_generate(model, tokenizer, prompts, wanted).logits for prompts in together]
    alone, padded = (torch.stack([logits[0] for logits in of_tokens]) for of_tokens in outputs)
    return torch.allclose(padded, alone, rtol=0.0, atol=0.05 * float(alone.abs().max()))  # but for rounding


def _generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Mapping[str, Any],
) -> Any:
    """What `model.generate` returns for `prompts`, padded on the left."""
    width = max(len(prompt.ids) for prompt in prompts)
    longest = max(prompt.max_new_tokens for prompt in prompts)
    settings = dict(settings)
    streamer, temperature = settings.pop("streamer", None), settings.pop("temperature", None)
    noise = [] if temperature is None else [GumbelNoise([prompt.seed for prompt in prompts], temperature)]
    with plain_generation(model, tokenizer, max_new_tokens=longest, **settings) as generation_config:
        input_ids = torch.full((len(prompts), width), cast(int, generation_config.pad_token_id), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            attention_mask[row, width - len(prompt.ids) :] = 1
        return cast(Any, model).generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=generation_config,
            logits_processor=LogitsProcessorList(noise),
            streamer=streamer,
        )


@contextmanager
def plain_generation(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> Iterator[GenerationConfig]:
    """Inside, `model` generates from its own distribution: greedily, with these settings, and until a stop token.

    `generate` takes whatever its configuration leaves open from the model's generation_config.json, where published
    models keep sampling settings, penalties, suppressed tokens, watermarks: all that would change what is measured.
    """
    lm, stops = causal_lm(model), stop_ids(model, tokenizer)
    # Padding is masked, so any id that the model has would do; not every tokenizer has one of its own.
    vocabulary = Fit.of(lm).vocabulary
    pad = next((t for t in [tokenizer.pad_token_id, *stops] if t is not None and t < vocabulary), 0)
    published = lm.generation_config
    defaults = {"do_sample": False, "use_cache": True, "eos_token_id": stops, "pad_token_id": pad}
    lm.generation_config = plain = GenerationConfig(**{**defaults, **settings})
    try:
        with _states_side_by_side(lm):
            yield plain
    finally:
        lm.generation_config = published


@contextmanager
def _states_side_by_side(lm: PreTrainedModel) -> Iterator[None]:
    """Of prompts the head gets the last states alone, a slice of all: there a CPU's matrix product would copy the
    head's weights once for every row, gigabytes for a few."""
    head = lm.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, states: (states[0].contiguous(), *states[1:]))
    try:
        yield
    finally:
        hook.remove()


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The ids as text, special tokens skipped, nothing trimmed."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True))


def stop_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer."""
    published = cast("GenerationConfig | None", model.generation_config)
    of_model = published.eos_token_id if published is not None else None
    stops = [tokenizer.eos_token_id, end_of_turn(tokenizer), *end_ids(of_model)]
    return sorted({token for token in stops if token is not None})
