"""Whether rows fit the model: its positions and its embedding, both known before any weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.data.tokenizing import TokenizedRows
from lowmem_npo.errors import UserError

POSITIONS = re.compile(r"(^|\.)(wpe|positions_embed|embed_positions|position_embeddings)$")


def check_fit(
    architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, parts: Iterable[TokenizedRows | None]
) -> None:
    """Raises UserError for a row that is longer than the positions that the model has learnt, and for a token or a
    padding token beyond its embedding."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture)
    except Exception:  # a configuration that only loading completes
        return
    limit = min(_positions(model), default=None)
    vocabulary = model.get_input_embeddings().num_embeddings
    if (pad := tokenizer.pad_token_id) is not None and pad >= vocabulary:
        raise UserError(
            f"The padding token {tokenizer.pad_token!r} has id {pad}, but the model's embedding has only {vocabulary} "
            "tokens: give the model the tokenizer that it came with, or resize its embedding to this one."
        )
    for rows in filter(None, parts):
        for row, example in zip(rows, rows.examples, strict=True):
            length, highest = len(row["input_ids"]), max(row["input_ids"])
            if highest >= vocabulary:
                raise UserError(
                    f"{example.where} has the token {tokenizer.convert_ids_to_tokens(highest)!r} of id {highest}, but "
                    f"the model's embedding has only {vocabulary} tokens: give the model the tokenizer that it came "
                    "with, or resize its embedding to this one."
                )
            if limit is not None and length > limit:
                raise UserError(
                    f"{example.where} has {length} tokens, but the model has learnt only {limit} positions: give "
                    f"--max-length {limit}, or remove the row."
                )


def _positions(model: PreTrainedModel) -> Iterator[int]:
    """How many positions each table of them has, if there are any: rotary and relative ones know no end."""
    named = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITIONS.search(name) and not re.search("vision|image|audio", name):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            yield min(module.num_embeddings - first, named or module.num_embeddings)
    for name, table in model.named_buffers():
        if name.endswith(".embed_positions"):  # GPT-J and CodeGen look their rotary angles up
            yield len(table)
