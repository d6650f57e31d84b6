"""A model of full size without a network: its configuration is bundled, its weights are random, its loading is real."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OlmoConfig

from lowmem_npo.model.known_configs import known_config, known_names

SMALL = OlmoConfig(  # for trying a benchmark out on a CPU
    vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def save_random_model(name: str, folder: Path) -> Path:
    """The directory in `folder` of a bfloat16 model `name` ("small", or a bundled one); made only if it is missing.

    Raises ValueError for a name without a bundled configuration.
    """
    directory = folder / name.replace("/", "--")
    if not (directory / "config.json").exists():
        config = SMALL if name == "small" else known_config(name)
        if config is None:
            raise ValueError(f"no configuration of {name} is bundled; known are small, {', '.join(known_names())}")
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(directory)
    return directory
