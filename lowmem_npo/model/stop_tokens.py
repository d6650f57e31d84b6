"""The tokens at which a model's own configuration stops generation, known before its weights are loaded."""

from __future__ import annotations

from transformers import GenerationConfig, PretrainedConfig

from lowmem_npo.config import ModelConfig
from lowmem_npo.model.names import resolve_name


def stop_tokens(config: ModelConfig, loaded: PretrainedConfig) -> frozenset[int]:
    """The EOS ids of generation_config.json, or of `loaded`, the model's configuration, where there is none."""
    name = resolve_name(config.model, config.revision)
    try:
        ids = GenerationConfig.from_pretrained(name, revision=config.revision or "main").eos_token_id
    except (OSError, ValueError):
        ids = getattr(loaded, "eos_token_id", None)
    return frozenset(i for i in end_ids(ids) if isinstance(i, int) and i >= 0)


def end_ids(eos_token_id: int | list[int] | None) -> list[int]:
    """What a configuration has under this name: none, one or several."""
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return [i for i in ids if i is not None]
