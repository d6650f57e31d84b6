"""A second adapter on a first, which is frozen: the model to forget from is the base with the first adapter.

Both are active in the policy, the first alone in the reference. What is saved is one adapter that any PEFT program
loads, their factors side by side, which is exact:

    s1 B1 A1 + s2 B2 A2 = s2 (s1/s2 B1 | B2) (A1 ; A2)
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lowmem_kernels.dispatch import has_values
from peft import LoraConfig, LoraModel, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_npo.claim import make_directory
from lowmem_npo.errors import UserError, one_line
from lowmem_npo.files import expanded
from lowmem_npo.model.layers import adapted_layer
from lowmem_npo.model.modes import switched
from lowmem_npo.model.saved_adapter import (
    FIRST_RANKS,
    check_finite,
    check_stored_patterns,
    copy_weights,
    more_than_lora,
    stored_lora,
)
from lowmem_npo.run_directory import AdapterFiles

# PEFT looks for these within the names of weights. The second is the one that others know: it is trained.
FIRST, SECOND = "adapter_before", "default"


class ContinuedModel(PeftModelForCausalLM):
    """A model with two LoRA adapters, saved as one."""

    def first_alone(self) -> None:
        """The second adapter is switched off."""
        self._tuner.set_adapter([FIRST], inference_mode=True)

    def both(self) -> None:
        """Both adapters are active; the second one requires grad."""
        self._tuner.set_adapter([SECOND, FIRST])  # in this order: the second adds exactly 0 at first
        for name, parameter in self.named_parameters():
            if f".{FIRST}" in name:
                parameter.requires_grad_(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the base alone, as in every `PeftModel`."""
        try:
            with super().disable_adapter():
                yield
        finally:
            self.both()

    def save_pretrained(self, save_directory: str, is_main_process: bool = True, **options: Any) -> None:  # type: ignore[override]
        """Writes both adapters as one, in PEFT's format."""
        if not is_main_process:
            return
        files = AdapterFiles(Path(save_directory))
        make_directory(files.path)
        self.joined_config().save_pretrained(str(files.path))
        first = {name: layer.r[FIRST] for name, layer in self._layers.items() if FIRST in layer.r}
        save_file(self.joined_weights(), files.weights, metadata={"format": "pt", FIRST_RANKS: json.dumps(first)})

    def weights(self, adapter: str) -> dict[str, Tensor]:
        """Those of one adapter, under PEFT's names."""
        own = {name: parameter for name, parameter in self.named_parameters() if f".{adapter}" in name}
        return get_peft_model_state_dict(self, own, adapter_name=adapter, save_embedding_layers=False)

    def joined_weights(self) -> dict[str, Tensor]:
        """Both adapters as one, on the CPU, under PEFT's names."""
        first, second = self.weights(FIRST), self.weights(SECOND)
        joined = {}
        for name in sorted({**first, **second}):
            parts = [weights[name].detach().cpu() for weights in (first, second) if name in weights]
            if (rank_dim := _rank_dim(name)) == 1 and name in first:
                layer = adapted_layer(name)
                parts[0] = parts[0].float() * (self._layers[layer].scaling[FIRST] / self._scale)
            joined[name] = (parts[0] if rank_dim is None else torch.cat(parts, rank_dim)).contiguous()
        return joined

    def joined_config(self) -> LoraConfig:
        """The configuration of both adapters as one: each layer's rank is the sum of theirs, all scales are equal."""
        ranks = {name: sum(layer.r.values()) for name, layer in self._layers.items()}
        ((common, _),) = Counter(ranks.values()).most_common(1)
        own = cast(LoraConfig, self.peft_config[SECOND])
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=cast(str, self.get_base_model().name_or_path),
            revision=own.revision,
            inference_mode=True,
            target_modules=sorted(ranks),
            r=common,
            lora_alpha=self._scale * common,
            lora_dropout=own.lora_dropout,
            rank_pattern={name: rank for name, rank in ranks.items() if rank != common},
            alpha_pattern={name: self._scale * rank for name, rank in ranks.items() if rank != common},
            fan_in_fan_out=any(getattr(layer, "fan_in_fan_out", False) for layer in self._layers.values()),
            modules_to_save=own.modules_to_save,
        )

    def restore(self, joined: dict[str, Tensor]) -> None:
        """Gives the second adapter its part of what `joined_weights` returned, bit for bit."""
        weights, second = {}, self.weights(SECOND)
        for name, own in second.items():
            dim, whole = _rank_dim(name), joined[name]
            if dim is not None:  # the last ranks
                whole = whole.narrow(dim, whole.shape[dim] - own.shape[dim], own.shape[dim])
            weights[name] = whole
        copy_weights(weights, second)

    @property
    def _tuner(self) -> LoraModel:
        return cast(LoraModel, self.base_model)

    @property
    def _layers(self) -> dict[str, Any]:
        return {name: m for name, m in self.get_base_model().named_modules() if isinstance(m, LoraLayer)}

    @property
    def _scale(self) -> float:
        return next(layer.scaling[SECOND] for layer in self._layers.values() if SECOND in layer.scaling)


def continued(model: PreTrainedModel, folder: str, second: LoraConfig) -> ContinuedModel:
    """`model` with the frozen adapter of `folder` and a new one, `second`, which starts as the identity.

    Raises:
        UserError: the adapter in `folder` is more than LoRA, or does not fit the model; `second` adapts experts.
        ValueError: from PEFT, about `second`.
    """
    misfit = f"The adapter in '{folder}' does not fit this {type(model).__name__}: it belongs to another model"
    first = first_config(folder)
    check_stored_patterns(folder, model)
    try:
        adapted = ContinuedModel(model, first, adapter_name=FIRST)
    except (ValueError, TypeError) as error:  # no layer of its names
        raise UserError(f"{misfit} ({one_line(error, 200)}).") from error
    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise UserError(
            f"The adapter in '{folder}' changes the output head, which must stay frozen for the fused losses: merge it "
            "(`lowmem-npo merge`), and train on the merged model without --adapter."
        )
    own = adapted.weights(FIRST)
    file = AdapterFiles(expanded(folder)).weights
    with safe_open(file, framework="pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    differing = [name for name, weight in own.items() if shapes.get(name) != tuple(weight.shape)]
    differing += [name for name in shapes if ".lora_" in name and name not in own]
    if differing:
        raise UserError(f"{misfit} ({len(differing)} weights differ, {min(differing)} among them).")
    if has_values(next(iter(own.values()))):
        check_finite(folder)
        weights = load_file(file)
        copy_weights({name: weights[name] for name in own}, own)
    adapted.add_adapter(SECOND, second)
    if any(isinstance(module, ParamWrapper) for module in adapted.modules()):
        raise UserError(
            f"--adapter: the experts of this {type(model).__name__} cannot have an adapter beside another one: name "
            "other layers with --lora-targets, or merge the adapter (`lowmem-npo merge`) and train on the merged model."
        )
    adapted.set_adapter(SECOND)  # the one that PeftModel itself asks about
    adapted.both()
    return adapted


@contextmanager
def first_of_two(model: PeftModel, ranks: Mapping[str, int]) -> Iterator[None]:
    """Inside, `model`, with an adapter that a `ContinuedModel` saved, has the first of the two alone.

    ranks: layer -> how many of its ranks are the first one's, as `load_adapter` leaves them.
    """
    whole: list[tuple[nn.Parameter, Tensor, int]] = []
    of_second: list[nn.Module] = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and name in ranks:
            factor = cast(Any, module.lora_B or module.lora_embedding_B)[SECOND]
            weight = factor if isinstance(factor, nn.Parameter) else factor.weight  # (out, ranks)
            whole.append((weight, weight.data, ranks[name]))
        elif isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)) and not module.disable_adapters:
            of_second.append(cast(nn.Module, module))
    try:
        for weight, data, rank in whole:
            weight.data = data.clone()
            weight.data[:, rank:] = 0
        with switched(of_second, "_disable_adapters", True):
            yield
    finally:
        for weight, data, _ in whole:
            weight.data = data


def first_config(folder: str) -> LoraConfig:
    """The configuration of the adapter in `folder`, which is to be continued.

    Raises UserError if it is more than the two factors of each layer, so that a second adapter does not add to it.
    """
    config, extras = stored_lora(folder), more_than_lora(folder)
    if config.target_parameters:
        extras.append("factors of experts (target_parameters)")
    if extras:
        raise UserError(
            f"The adapter in '{folder}' has {extras[0]}, to which no other adapter can add: merge it into its base "
            "(`lowmem-npo merge`, or PEFT's merge_and_unload), and train on the merged model without --adapter."
        )
    return dataclasses.replace(config, lora_dropout=0.0, init_lora_weights=True, inference_mode=True)


def _rank_dim(name: str) -> int | None:
    """Along which dimension of this weight its ranks are."""
    if ".lora_A" in name or ".lora_embedding_A" in name:
        return 0
    return 1 if ".lora_B" in name or ".lora_embedding_B" in name else None
