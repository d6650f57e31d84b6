"""A model of full size without a network: its configuration is bundled, its weights are random, its loading is real."""

from __future__ import annotations

import json
import struct
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoConfig, PretrainedConfig

from lowmem_npo.model.known_configs import known_config, known_names

SMALL = OlmoConfig(  # to try a benchmark on a CPU
    vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
SAVED = Path(tempfile.gettempdir()) / "random-models"  # kept, for all benchmarks that need the same model
SHARD = 4 * 2**30  # bytes per file


def save_random_model(name: str, folder: Path, filled: int | None = None) -> Path:
    """The directory in `folder` of a bfloat16 model `name` ("small", or a bundled one); written only if missing.

    Args:
        filled: only the first `filled` bytes of each tensor are random; the rest are zeros, which most file systems
            store as holes. Default: all.

    Raises:
        ValueError: no configuration of that name is bundled.
    """
    directory = folder / (name.replace("/", "--") + ("" if filled is None else "--mostly-zeros"))
    if not (directory / "config.json").exists():
        config = SMALL if name == "small" else known_config(name)
        if config is None:
            raise ValueError(f"no configuration of {name} is bundled; known are: small, {', '.join(known_names())}")
        directory.mkdir(parents=True, exist_ok=True)
        _write_weights(config, directory, filled)
        config.architectures = [type(_empty(config)).__name__]
        config.dtype = torch.bfloat16
        config.save_pretrained(directory)  # last: it marks the model as complete
    return directory


def _empty(config: PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _write_weights(config: PretrainedConfig, directory: Path, filled: int | None) -> None:
    """Safetensors files, tensor by tensor: at most one tensor is in memory."""
    tensors = dict(_empty(config).named_parameters())  # tied ones once
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD and shards[-1]:
            shards.append({})
        shards[-1][name] = tensor
    torch.manual_seed(0)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, file)
        _write_file(directory / file, shard, filled)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_file(path: Path, tensors: dict[str, Tensor], filled: int | None) -> None:
    ends = list(accumulate(tensor.nbytes for tensor in tensors.values()))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for (name, tensor), end in zip(tensors.items(), ends, strict=True):
        offsets = [end - tensor.nbytes, end]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for tensor, end in zip(tensors.values(), ends, strict=True):
            file.seek(begin + end - tensor.nbytes)
            file.write(_random(tensor, filled).view(torch.uint8).numpy().data)
        file.truncate(begin + ends[-1])


def _random(like: Tensor, filled: int | None) -> Tensor:
    """The first values of a tensor like this one, flat: a norm's weights around 1, all others around 0."""
    count = like.numel() if filled is None else min(like.numel(), filled // like.itemsize)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = 0.02 * torch.randn(count, dtype=torch.bfloat16, device=device)
    return (values + 1 if like.ndim == 1 else values).cpu()
