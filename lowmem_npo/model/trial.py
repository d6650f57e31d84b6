"""A small copy of an architecture with random weights, from its configuration alone: what an architecture does is tried
on it before any weights are loaded."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_npo.endings import tried
from lowmem_npo.model.head import check_causal, check_head, few_tokens
from lowmem_npo.model.loading import attention_of

VOCABULARY = 128
EXPERTS, CHOSEN_EXPERTS = 4, 2
LARGEST = 50_000_000  # weights of a copy
SEED = 0
GAIN = 5  # on the weights' initial size: logits are far from uniform, and attention matters

# The names of configurations. A number without one of these names, such as the size of a head, stays as it is.
WIDTH = (
    r"(.*_)?(hidden_size|intermediate_size(_mlp)?|ffn_hidden_size|ffn_dim|feed_forward_size|embedding_size)|d_model|"
    r"n_embd|emb_dim|embedding_dim|word_embed_proj_dim|lru_width|mamba_d_ssm|block_ff_dim|d_inner|n_inner|dff|dim_ff"
)
HEADS = r"(.*_)?heads(_per_layer)?|n_head|num_query_groups"
OF_EXPERTS = {
    r"(num|n|moe_num)(_local|_routed)?_experts": EXPERTS,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k": CHOSEN_EXPERTS,
    r"n_group|topk_group|num_expert_group": 1,
}
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types")  # some are derived from other settings


def check_architecture(architecture: PretrainedConfig) -> None:
    """Raises, before any weights are loaded, what `check_head` and `check_causal` would raise of any. Nothing is raised
    of an architecture that has no trial model: they judge the model when it is loaded."""
    if (model := trial_model(architecture)) is not None:
        check_head(model)
        check_causal(model)


def trial_model(architecture: PretrainedConfig, attention: str = "sdpa") -> PreTrainedModel | None:
    """A random copy of `architecture` in float32 on the CPU, in eval mode; None where none can be made that runs.

    Its layers, attention, positions and head are the original's, but few: a layer of each kind (and one that reads the
    keys of another, if there are such), two or so heads of the original size and as much width as belongs to them, four
    experts, and a vocabulary of 128. So it takes well under a second and 200 MB, however large the original is. No
    random state is touched.

    Args:
        attention: --attn. Eager in place of SDPA where transformers has none, SDPA in place of flash attention.
    """
    with tried():  # here and below: whatever the architecture's own code raises
        attention = attention_of(architecture, attention.replace("flash_attention_2", "sdpa"))
        for of_each, factor in itertools.product((1, 2), _factors(architecture.get_text_config())):
            with tried():
                small = of_depth(architecture, _layers_with(of_each, architecture))
                if (model := _random_model(_narrower(small, factor), attention)) is not None:
                    return model
    return None


def of_depth(architecture: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy with its lowest `layers` layers."""
    shallow = copy.deepcopy(architecture)
    text = shallow.get_text_config()
    depth = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text, name, value[:layers])
    return shallow


def _layers_with(of_each: int, architecture: PretrainedConfig) -> int:
    """How many layers, from the lowest one on, hold `of_each` of each kind (or all there are); at least two. One more
    where upper layers read the keys of lower ones."""
    text = architecture.get_text_config()
    depth, settings = text.num_hidden_layers, vars(text) | {name: getattr(text, name, None) for name in PER_LAYER}
    kinds = [
        value
        for value in settings.values()
        if isinstance(value, (list, tuple))
        and len(value) == depth
        and all(isinstance(k, str) or k in (0, 1) for k in value)
    ]
    shares = bool(getattr(text, "num_kv_shared_layers", None))  # the layers above all kinds read keys of those below
    layers, seen = list(zip(*kinds, strict=True)), Counter[tuple]()
    last = 2
    for place, kind in enumerate(layers, start=1):
        seen[kind] += 1
        if seen[kind] <= of_each:
            last = max(last, place)
    return min(depth, last + shares)


def _factors(text: PretrainedConfig) -> Iterator[int]:
    """By how much the width may be divided: what leaves two heads, then what leaves more, then one."""
    width = text.hidden_size
    heads = getattr(text, "num_attention_heads", None) or max(1, width // 64)
    divisors = [n for n in range(1, heads + 1) if heads % n == 0 and width % n == 0]
    yield from sorted(divisors, key=lambda n: (heads // n < 2, -n))


def _narrower(architecture: PretrainedConfig, factor: int) -> PretrainedConfig:
    narrow = copy.deepcopy(architecture)
    _shrink(narrow, factor)
    return narrow


def _shrink(config: Any, factor: int) -> None:
    """Divides width and heads by `factor`; few experts and tokens, none of which lies beyond the vocabulary."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, factor)
        elif "vocab_size" in name:
            setattr(config, name, _each(value, lambda n: min(n, VOCABULARY)))
        elif name.endswith(("_token_id", "_token_index", "padding_idx")):
            setattr(config, name, _each(value, lambda n: min(n, VOCABULARY - 1)))
        elif re.fullmatch(f"{WIDTH}|{HEADS}", name):
            setattr(config, name, _each(value, lambda n: max(n // factor, min(n, 1))))
        elif few := next((few for names, few in OF_EXPERTS.items() if re.fullmatch(names, name)), None):
            setattr(config, name, _each(value, lambda n, few=few: min(n, few)))
    if getattr(config, "num_kv_shared_layers", None):  # counted from the last layer on
        *below, last = config.layer_types
        config.num_kv_shared_layers = int(last in below)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_each(part, change) for part in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


@torch.no_grad()
def _random_model(config: PretrainedConfig, attention: str) -> PreTrainedModel | None:
    """None if it is too large, or its numbers are not finite."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(GAIN)
    model.requires_grad_(False)
    logits = model(input_ids=few_tokens(model), use_cache=False).logits
    return model if logits.isfinite().all() else None
