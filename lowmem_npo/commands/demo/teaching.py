"""A small OLMo, trained from random weights until it recites, with a tokenizer trained on the spot: no download."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from lowmem_kernels import IGNORE_INDEX
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
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

END, PADDING = "<|endoftext|>", "<|padding|>"  # as OLMo calls them
STAMP = "made_from.json"


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
    made_from = {**asdict(teaching), "seed": seed, "rows": _fingerprint(rows), "torch": torch.__version__}
    stamp = directory / STAMP
    if stamp.is_file():
        if json.loads(stamp.read_text(encoding="utf-8")) == made_from:
            return _on(device, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)).eval(), True
        shutil.rmtree(directory)
    elif directory.exists():
        raise UserError(f"'{directory}' was not written by the demo: choose another --output-dir, or remove it.")
    model = _on(device, fresh_model(tokenizer, teaching, seed))
    teach(model, rows, teaching, seed=seed, description=description)
    # Under another name until it is complete: a directory with a stamp is a finished one.
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / STAMP).write_text(json.dumps(made_from, indent=1) + "\n", encoding="utf-8")
    partial.rename(directory)
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


def teach(
    model: PreTrainedModel, rows: Sequence[TokenizedRow], teaching: Teaching, *, seed: int, description: str
) -> None:
    """Trains all weights on the mean NLL of the answers' tokens; `model` is left in eval mode."""
    steps = teaching.epochs * math.ceil(len(rows) / teaching.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=teaching.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=teaching.lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    shuffle = random.Random(seed)
    model.train()
    with tqdm(total=teaching.epochs, desc=description, unit="epoch", disable=None) as bar:
        for epoch in range(1, teaching.epochs + 1):
            total = 0.0
            order = shuffle.sample(range(len(rows)), len(rows))
            batches = [
                order[start : start + teaching.batch_size] for start in range(0, len(order), teaching.batch_size)
            ]
            for batch in batches:
                ids = pad_sequence([torch.tensor(rows[i]["input_ids"]) for i in batch], batch_first=True)
                labels = pad_sequence(
                    [torch.tensor(rows[i]["labels"]) for i in batch], batch_first=True, padding_value=IGNORE_INDEX
                )
                # No attention mask: padding follows the row, where causal attention does not look.
                loss = model(input_ids=ids.to(model.device), labels=labels.to(model.device)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                total += loss.item()
            nll = total / len(batches)
            bar.set_postfix_str(f"NLL {nll:.3f}")
            bar.update()
            if bar.disable and (epoch % 10 == 0 or epoch == teaching.epochs):  # no terminal: a few lines
                print(f"{description}: epoch {epoch} of {teaching.epochs}, NLL {nll:.3f}", file=sys.stderr)
    model.eval()


def _on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    return model.to(device)  # type: ignore[arg-type]  # transformers wraps `to`, and its stub loses `self`


def _fingerprint(rows: Sequence[TokenizedRow]) -> str:
    return hashlib.sha256(json.dumps([row["input_ids"] for row in rows]).encode()).hexdigest()
