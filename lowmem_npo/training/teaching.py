"""Teaching: fine-tuning on the answers of rows, for models that are to forget and those that never saw; and where they
are kept, so that they are made once."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lowmem_kernels import IGNORE_INDEX
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lowmem_npo.claim import make_directory
from lowmem_npo.data import TokenizedRow
from lowmem_npo.data.tokenized_rows import num_predicted
from lowmem_npo.errors import UserError
from lowmem_npo.files import PARTIAL, load_json, put_in_place, write_json
from lowmem_npo.progress import Progress

STAMP = "made_from.json"  # in the directory of a finished model: what it was made from


def teach(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TokenizedRow],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    description: str,
    micro_batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Trains the weights that require grad on the mean NLL of the answers' tokens; `model` is left in eval mode.

    AdamW, gradients clipped to norm 1; the learning rate rises to `lr` over the first twentieth of the steps, and falls
    with a cosine. A batch goes through the model in parts of `micro_batch_size` rows (None: whole), for the same
    gradient. dtype: of the matrix products.

    Returns:
        The mean NLL of the last epoch's batches, in nats per token.
    """
    steps = max(3, epochs * math.ceil(len(rows) / batch_size))  # fewer have no rise and fall
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=max(0.05, 2 / steps), cycle_momentum=False
    )
    shuffle = random.Random(seed)
    nll = math.nan
    model.train()
    with Progress(epochs, description, "epoch", leave=True) as bar:
        for epoch in range(1, epochs + 1):
            total = 0.0
            order = shuffle.sample(range(len(rows)), len(rows))
            batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            for batch in batches:
                total += _backward(model, [rows[i] for i in batch], micro_batch_size or batch_size, dtype)
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            nll = total / len(batches)
            bar.set_postfix_str(f"NLL {nll:.3f}")
            bar.update()
            if epoch == epochs:
                bar.print_line()
    model.eval()
    return nll


def _backward(
    model: PreTrainedModel | PeftModel, batch: Sequence[TokenizedRow], at_once: int, dtype: torch.dtype
) -> float:
    """Adds the gradient of the batch's mean NLL, which is returned."""
    total, labelled = 0.0, sum(map(num_predicted, batch))
    for start in range(0, len(batch), at_once):
        part = batch[start : start + at_once]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in part], batch_first=True)
        labels = pad_sequence(
            [torch.tensor(row["labels"]) for row in part], batch_first=True, padding_value=IGNORE_INDEX
        )
        # Entered for each pass: autocast keeps its copies of the weights until it is left.
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            # No attention mask: padding follows the row, where causal attention does not look.
            loss = model(input_ids=ids.to(model.device), labels=labels.to(model.device)).loss
        loss = loss * (sum(map(num_predicted, part)) / labelled)
        loss.backward()
        total += loss.item()
    return total


def made_from(directory: Path) -> dict[str, Any] | None:
    """What the model in `directory` was made from; None: there is no finished one.

    Raises:
        UserError: the file that says so is damaged.
    """
    stamp = directory / STAMP
    if not stamp.is_file():
        return None
    try:
        content = load_json(stamp)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"'{stamp}' is damaged: remove '{directory}', and its model is taught anew.")
    return content


@contextmanager
def making(directory: Path, made_from: dict[str, Any]) -> Iterator[Path]:
    """Gives an empty directory to write a model into, which becomes `directory` when it is complete.

    Raises OSError if what an interrupted one has left cannot be removed: it would become a part of the model.
    """
    partial = directory.with_name(directory.name + PARTIAL)
    if os.path.lexists(partial):
        shutil.rmtree(partial)
    make_directory(partial)
    yield partial
    write_json(partial / STAMP, made_from)
    put_in_place(partial, directory)
