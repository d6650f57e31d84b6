"""Of which architecture and size a model is, by its configuration."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Fields of a configuration, as far as it has them, and what they are called. The vocabulary is not among them: it is
# padded, and grows with tokens that are added.
SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "wide",
    "intermediate_size": "in an MLP",
    "num_local_experts": "experts",
    "num_experts": "experts",
    "n_routed_experts": "experts",
}


def size_of(config: PretrainedConfig) -> str:
    """In words, alike for a model and what was trained or merged of it: as "llama, 16 layers, 2048 wide"."""
    text = config.get_text_config()
    sizes: dict[str, Any] = {field: getattr(text, field, None) for field in SIZES}
    return ", ".join(
        [text.model_type, *(f"{size} {SIZES[field]}" for field, size in sizes.items() if isinstance(size, int))]
    )
