"""Whether rows fit the model: its positions and its embedding, both known before any weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.console import Say, silent
from lowmem_npo.data.tokenized_rows import TokenizedRows
from lowmem_npo.endings import tried
from lowmem_npo.errors import UserError

POSITIONS = re.compile(r"(^|\.)(wpe|positions_embed|embed_positions|position_embeddings)$")


@dataclass(frozen=True)
class Fit:
    """What a model can take: ids below `vocabulary`, and rows of at most `positions` tokens (None: of any length).
    made_for: the longest text that its rotary positions are made for, where that is known."""

    vocabulary: int
    positions: int | None
    made_for: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Fit:
        """Read from the modules, whose weights may be on the meta device."""
        within = model.get_input_embeddings().modules()  # it may have an adapter, and be kept on the host
        rows = next(module.num_embeddings for module in within if hasattr(module, "num_embeddings"))
        return cls(cast(int, rows), min(_positions(model), default=None), _made_for(model.config))

    def check(
        self, where: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, shorten: str | None = None
    ) -> None:
        """Raises UserError for a row, from the place `where`, that the model cannot take.

        shorten: what to do about one that is too long; None: what can be done about the row of a file.
        """
        if (highest := max(ids)) >= self.vocabulary:
            token = str(tokenizer.convert_ids_to_tokens(highest))
            raise UserError(f"{where} has the token {self._beyond(token, highest)}")
        if self.positions is not None and len(ids) > self.positions:
            shorten = shorten or f"give --max-length {self.positions}, or remove the row"
            raise UserError(
                f"{where} has {len(ids)} tokens, but the model has learnt only {self.positions} positions: {shorten}."
            )

    def remark(self, longest: int) -> str | None:
        """What to say of rows of up to `longest` tokens that the model can take, and may not understand."""
        if self.made_for is None or longest <= self.made_for:
            return None
        return (
            f"The longest row has {longest:,} tokens, and the model was made for texts of up to {self.made_for:,} (its "
            "max_position_embeddings): what comes after them it may read and write badly."
        )

    def check_padding(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError for a padding token beyond the embedding."""
        if (pad := tokenizer.pad_token_id) is not None and pad >= self.vocabulary:
            raise UserError(f"The tokenizer has the padding token {self._beyond(tokenizer.pad_token, pad)}")

    def padding(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """An id for places that no token sees: the tokenizer's padding token, where the model has it. A script's may
        have been added to the tokenizer alone, and is looked up in the embedding all the same."""
        pad = tokenizer.pad_token_id
        return pad if pad is not None and 0 <= pad < self.vocabulary else 0

    def _beyond(self, token: str, number: int) -> str:
        return (
            f"{token!r} of id {number}, but the model's embedding has only {self.vocabulary} tokens: give the model "
            "the tokenizer that it came with, or resize its embedding to this one."
        )


def known_fit(architecture: PretrainedConfig) -> Fit | None:
    """From the configuration alone; None for one that only loading completes."""
    with tried(), torch.device("meta"):  # whatever the architecture's own code raises
        return Fit.of(AutoModelForCausalLM.from_config(architecture))
    return None


def positions_of(architecture: PretrainedConfig) -> Callable[[], int | None]:
    """What says for how many tokens a model has positions, learnt or made for, None if for any; found once, when it is
    asked."""

    @cache
    def positions() -> int | None:
        fit = known_fit(architecture)
        return min(filter(None, (fit.positions, fit.made_for)), default=None) if fit else None

    return positions


def check_fit(
    architecture: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    parts: Iterable[TokenizedRows | None],
    say: Say = silent,
) -> None:
    """Raises UserError for a row that is longer than the positions that the model has learnt, and for a token or a
    padding token beyond its embedding; says if rows are longer than those that the model was made for."""
    if (fit := known_fit(architecture)) is None:
        return
    fit.check_padding(tokenizer)
    longest = 0
    for rows in filter(None, parts):
        for row, example in zip(rows, rows.examples, strict=True):
            fit.check(example.where, row["input_ids"], tokenizer)
            longest = max(longest, len(row["input_ids"]))
    if (remark := fit.remark(longest)) is not None:
        say(remark)


def _made_for(config: PretrainedConfig) -> int | None:
    """How long the texts are that rotary positions are made for, as they are scaled: where a configuration has both the
    length before scaling and the factor, or only one of them, the most that it can mean."""
    config = config.get_text_config()
    named, rotary = (getattr(config, name, None) for name in ("max_position_embeddings", "rope_parameters"))
    if not named or not rotary or getattr(config, "alibi", False):
        return None
    kinds = rotary.values() if all(isinstance(kind, dict) for kind in rotary.values()) else [rotary]  # of layers
    scaled = [(kind.get("original_max_position_embeddings") or named) * (kind.get("factor") or 1) for kind in kinds]
    return int(max(named, *scaled))


def _positions(model: PreTrainedModel) -> Iterator[int]:
    """How many positions each table of them has, if there are any: rotary and relative ones know no end."""
    config = model.config
    named = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITIONS.search(name) and not re.search("vision|image|audio", name):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            yield min(module.num_embeddings - first, named or module.num_embeddings)
        # Sines and rotary angles that CTRL, GPT-J and CodeGen look up.
        for table in (getattr(module, kind, None) for kind in ("pos_encoding", "embed_positions")):
            if isinstance(table, torch.Tensor):
                yield len(table)
    if config.model_type == "mpt":  # its linear biases are made for so many
        yield config.max_seq_len
