"""Tensors of a checkpoint that transformers may keep in float32 in a model of smaller numbers, such as the biases by
which experts are chosen: rounded, they become ties. (Some it keeps so beside float16 alone, and rounds them itself.)"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key


def kept_in_float32(architecture: PretrainedConfig, tensors: Iterable[str]) -> set[str]:
    """Those of `tensors`, named as a checkpoint names them, that the model's class may keep so."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(architecture)
    patterns = sorted({*model._keep_in_fp32_modules, *model._keep_in_fp32_modules_strict})
    if not patterns:
        return set()
    kept, _, _ = build_glob_alternation(list[WeightRenaming | WeightConverter | str](patterns))
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    names = {tensor: rename_source_key(tensor, renamings, converters, prefix, own)[0] for tensor in tensors}
    return {tensor for tensor, name in names.items() if kept.search(name)}
