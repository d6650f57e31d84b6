"""What reference values depend on, as hashes: a cache made by another model or from other rows must not be used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowmem_npo.data.tokenized_rows import TokenizedRow, TokenizedRows
from lowmem_npo.memory.streaming import present
from lowmem_npo.model.continued import FIRST, SECOND
from lowmem_npo.model.layers import causal_lm

# What the reference does not have: a parameter of the adapter that is trained, or a module that is trained whole.
_TRAINED = re.compile(rf"\.(lora_\w+|modules_to_save)\.{SECOND}(\.|$)")
CHUNK = 2**22  # elements summed at a time
SAMPLES = 256


def weights_fingerprint(model: PeftModel) -> str:
    """A hash of the frozen weights as they are in memory, those of an adapter that is continued among them: names,
    shapes, types, quantisation, contents.

    Of a tensor's contents, the sum of all its 32-bit words and `SAMPLES` of them: any training, merging or other
    rounding changes it. Where the weights were loaded from does not matter.
    """
    digest = hashlib.sha256()
    # Contents first: a streamed weight holds them only when its turn has come.
    frozen = [(name, tuple(t.shape), t.dtype, _contents(t.detach())) for name, t in _frozen(model)]
    for name, shape, dtype, contents in sorted(frozen, key=lambda part: part[0]):
        digest.update(f"{name} {shape} {dtype}".encode())
        digest.update(contents)
    return digest.hexdigest()


def rows_fingerprint(rows: Sequence[TokenizedRow]) -> str:
    """A hash of all ids and labels."""
    return rows.fingerprint if isinstance(rows, TokenizedRows) else TokenizedRows(list(rows), [], 0).fingerprint


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()


def _frozen(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    lm = causal_lm(model)
    module: Any = lm.get_input_embeddings()
    embedding = getattr(module, "original_module", module).weight  # not the copy that is trained whole
    yield "input embedding", embedding  # by this name, wherever it is
    for name, parameter in lm.named_parameters():
        if _TRAINED.search(name) or parameter is embedding:
            continue
        name = name.replace(".base_layer", "").replace(".original_module", "")
        yield name, present(parameter)
        state = getattr(parameter, "quant_state", None)  # bitsandbytes keeps the scales of 4-bit weights here
        if state is not None:
            for key, value in state.as_dict().items():
                yield f"{name} {key}", value if isinstance(value, Tensor) else torch.tensor(list(repr(value).encode()))
    for name, buffer in lm.named_buffers():
        if not _TRAINED.search(name):
            yield name.replace(".original_module", ""), buffer
    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer) and FIRST in module.scaling:
            yield f"{name} scale", torch.tensor(float(module.scaling[FIRST]))


def _contents(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1).view(torch.uint8)
    words = flat[: flat.numel() // 4 * 4].view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in words.split(CHUNK):
        total += part.sum(dtype=torch.int64)
    samples = words[:: max(1, words.numel() // SAMPLES)].cpu()
    return total.cpu().numpy().tobytes() + samples.numpy().tobytes() + flat[words.numel() * 4 :].cpu().numpy().tobytes()
