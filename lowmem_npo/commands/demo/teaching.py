"""A small OLMo, trained from random weights until it recites, with a tokenizer trained on the spot: no download."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lowmem_npo.commands.demo.recipe import Teaching
from lowmem_npo.data import TokenizedRow
from lowmem_npo.errors import UserError
from lowmem_npo.files import json_sha256
from lowmem_npo.training.teaching import made_from, making, teach

END, PADDING = "<|endoftext|>", "<|padding|>"  # as OLMo calls them


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer like OLMo's, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING)


def taught_model(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    teaching: Teaching,
    *,
    seed: int,
    device: torch.device,
    description: str,
) -> tuple[PreTrainedModel, bool]:
    """A model that recites `rows`, saved with its tokenizer in `directory`; and whether it was there already.

    A model in `directory` is reused only if it was made from the same rows by the same recipe and seed.

    Raises:
        UserError: `directory` holds something that the demo did not write.
    """
    made_of = json_sha256([row["input_ids"] for row in rows])
    wanted = {**asdict(teaching), "seed": seed, "rows": made_of, "torch": torch.__version__}
    earlier = made_from(directory)
    if earlier == wanted:
        return _on(device, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)).eval(), True
    if earlier is not None:
        shutil.rmtree(directory)
    elif directory.exists():
        raise UserError(f"'{directory}' was not written by the demo: choose another --output-dir, or remove it.")
    model = _on(device, fresh_model(tokenizer, teaching, seed))
    teach(
        model,
        rows,
        epochs=teaching.epochs,
        batch_size=teaching.batch_size,
        lr=teaching.lr,
        seed=seed,
        description=description,
    )
    with making(directory, wanted) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return model, False


def fresh_model(tokenizer: PreTrainedTokenizerBase, teaching: Teaching, seed: int) -> PreTrainedModel:
    """A model with random weights, the same for the same seed."""
    config = OlmoConfig(
        vocab_size=len(tokenizer),
        hidden_size=teaching.width,
        intermediate_size=4 * teaching.width,
        num_hidden_layers=teaching.layers,
        num_attention_heads=teaching.heads,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OlmoForCausalLM(config)


def _on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    return model.to(device)  # type: ignore[arg-type]  # transformers wraps `to`, and its stub loses `self`
