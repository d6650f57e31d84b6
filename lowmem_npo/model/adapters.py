"""LoRA adapters: the trained weights. With them switched off, the same network is the reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper, dora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_npo.config import AdapterConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model.continued import FIRST, ContinuedModel, continued, first_of_two
from lowmem_npo.model.layers import PEFT_PREFIX, all_linear, causal_lm, decoder_layers, linear_layers, taken_for_experts
from lowmem_npo.model.modes import eval_mode, parts, switched
from lowmem_npo.model.patterns import check_patterns
from lowmem_npo.model.saved_adapter import copy_weights
from lowmem_npo.model.saved_modules import check_saved_modules, train_in_float32

EXTRA = "extra"  # name of the temporary adapter


def attach_lora(model: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """Adds a LoRA adapter (Hu et al. 2021) that starts as the identity; only its weights, in float32, require grad.

    Its layers take their input as it is, without PEFT's float32 copy of it: a bf16 model runs inside
    `compute_autocast`, which casts the adapter's small matrices instead. DoRA (Liu et al. 2024) needs that copy.

    Raises:
        UserError: a target matches no linear layer (the candidates are listed) or the output head, there are fewer
            decoder layers than `lora_layers` names, a module to save cannot be trained, or `config.adapter` cannot be
            continued on this model.
    """
    lora = _lora_config(model, config)
    candidates = _candidates(model)
    try:
        if config.adapter is None:
            adapted = cast(PeftModel, get_peft_model(model, lora))
        else:
            adapted = continued(model, config.adapter, lora)
    except ValueError as error:  # a norm, a whole block; a layer that `lora_layers` leaves out
        reason = str(error).splitlines()[0].split(". ")[0].rstrip("(")
        raise UserError(
            f"--lora-targets {' '.join(config.lora_targets)}: PEFT cannot adapt these ({reason}); {candidates}."
        ) from error
    _save_no_embedding(adapted)
    model.disable_input_require_grads()  # they serve reentrant checkpointing, and cost gradients below the adapters
    _keep_input_dtype(adapted)
    _exact_magnitudes(adapted)
    train_in_float32(adapted)
    return adapted


def check_lora(architecture: PretrainedConfig, config: AdapterConfig, quantized: bool = False) -> PeftModel:
    """Raises, before any weight is loaded, what `attach_lora` and `decoder_layers` would raise; returns the model that
    the first would, without data.

    quantized: the linear layers will be held in 4 bits.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager")
        if quantized:
            check_saved_modules(model, config.modules_to_save, quantized=True)
        decoder_layers(model)
        return attach_lora(model, config)


def adapter_size(model: PeftModel) -> tuple[int, int]:
    """How many weights of the adapter are trained, and how many are saved, with those that it goes on from."""
    trained, _ = model.get_nb_trainable_parameters()
    first = [p.numel() for name, p in model.named_parameters() if f".{FIRST}" in name]
    return trained, trained + sum(first)


def shared_layers(model: PeftModel) -> list[str]:
    """The names of layers that the adapter changes and whose weights another layer of the base has as well: a tied
    embedding, Zamba's attention. Beside its base such an adapter works, but it cannot be merged into those weights."""
    places = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    changed: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            changed[name] = [adapted_weight(module)]
        elif isinstance(module, ModulesToSaveWrapper):
            changed[name] = list(module.original_module.parameters())
    shared = [name for name, weights in changed.items() if any(places[id(weight)] > 1 for weight in weights)]
    return [name.removeprefix(PEFT_PREFIX) for name in shared]


def note_on_experts(model: PeftModel, config: AdapterConfig) -> str | None:
    """A line on layers of `model` that have no adapter though `all-linear` sounds so, since its experts are tensors of
    their own, or PEFT takes the names of others for theirs; or on other layers that have none beside experts named as
    they are. None where there are no such."""
    lm = causal_lm(model)
    taken = taken_for_experts(lm, linear_layers(lm))
    kind, given = type(lm).__name__, f"LoRA on {' '.join(config.lora_targets)}"
    if config.lora_targets == ("all-linear",):
        none = any(p.ndim > 2 and "expert" in name for name, p in lm.named_parameters())
        if taken:
            own = ", which are no linear layers and have no adapter either" if none else ""
            named = ", ".join(sorted(taken))
            return f"{given} leaves out {named}: PEFT takes these names for the experts of a {kind}{own}."
        return f"{given} leaves out the experts of a {kind}, which are no linear layers." if none else None
    if taken and any(isinstance(module, ParamWrapper) for module in model.modules()):
        return f"{given} is an adapter on each of the experts of a {kind}, and on no other layers of these names."
    return None


def adapted_weight(layer: Any) -> torch.nn.Parameter:
    """What the factors of a `LoraLayer` are added to."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


@contextmanager
def original_model(model: nn.Module) -> Iterator[None]:
    """Inside, `model`, a `PeftModel` or a part of one, is what training began with: the base, with the adapter that was
    continued if there is one (which a part does not know)."""
    if isinstance(model, ContinuedModel):
        model.first_alone()
        try:
            yield
        finally:
            model.both()
        return
    if ranks := getattr(model, "first_ranks", None):
        with first_of_two(cast(PeftModel, model), ranks):
            yield
        return
    # PEFT's own `disable_adapter` looks through the model five times and prints every layer, in each step.
    adapted = [m for m in parts(model) if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    with switched([module for module in adapted if not module.disable_adapters], "_disable_adapters", True):
        yield


@contextmanager
def reference_mode(model: nn.Module) -> Iterator[None]:
    """Inside, `model`, or a part, is the original, in eval mode and without gradients; all is restored on leaving."""
    with eval_mode(model), torch.no_grad(), original_model(model):
        yield


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """The adapter as it is saved, under PEFT's names."""
    if isinstance(model, ContinuedModel):
        return model.joined_weights()
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def restore_adapter(model: PeftModel, weights: dict[str, Tensor]) -> None:
    """Gives the adapter the `weights` that were saved of it."""
    if isinstance(model, ContinuedModel):
        model.restore(weights)
    else:
        copy_weights(weights, adapter_weights(model))


@contextmanager
def extra_adapter(model: PreTrainedModel | PeftModel, rank: int, seed: int) -> Iterator[None]:
    """Inside, all of `all_linear` have one more LoRA adapter, which starts as the identity and alone
    requires grad. On leaving it is removed and everything is restored."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        adapted, active = _with_extra(model, rank, seed)
        tuner, lm = cast(LoraModel, adapted.base_model), causal_lm(adapted)
        tuner.set_adapter([*active, EXTRA])
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(f".{EXTRA}." in name)
        _keep_input_dtype(adapted)
        lm.disable_input_require_grads()
        try:
            yield
        finally:
            if isinstance(model, PeftModel):
                tuner.set_adapter(active)
                model.delete_adapter(EXTRA)
                _unwrap(lm)
            else:
                tuner.unload()
    finally:
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _with_extra(model: PreTrainedModel | PeftModel, rank: int, seed: int) -> tuple[PeftModel, list[str]]:
    """The model with the extra adapter, and which were active before. Where memory runs out halfway, nothing stays."""
    lm = causal_lm(model)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(all_linear(lm)))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if not isinstance(model, PeftModel):
                return cast(PeftModel, get_peft_model(model, config, adapter_name=EXTRA)), []
            active = list(model.active_adapters)
            model.add_adapter(EXTRA, config)
            return model, active
    except RuntimeError:
        for module in list(lm.modules()):
            if isinstance(module, LoraLayer):
                module.delete_adapter(EXTRA)
        _unwrap(lm)
        raise


def linear_layer_names(model: PreTrainedModel) -> list[str]:
    """Last name parts of the linear layers that can have an adapter: q_proj, down_proj, ...; never the head."""
    return sorted({name.rpartition(".")[2] for name in all_linear(model)})


def _save_no_embedding(model: PeftModel) -> None:
    """PEFT saves a copy of the embedding where config.json, which it reads for that, has another vocabulary than the
    model, as it has in OLMo's original format: there the embedding is longer than the vocabulary."""
    own: Any = model
    own.save_pretrained = partial(own.save_pretrained, save_embedding_layers=False)


def _keep_input_dtype(adapted: PeftModel) -> None:
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = bool(module.lora_magnitude_vector)


@torch.no_grad()
def _exact_magnitudes(adapted: PeftModel) -> None:
    """DoRA's magnitudes as the float32 norms that they are divided by: PEFT rounds them to the type of the base, so
    that the adapter would not start as the identity."""
    magnitude: Any
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for magnitude in module.lora_magnitude_vector.values():
                weight = dora.dequantize_module_weight(module.get_base_layer()).float()
                zero = weight.new_zeros(())
                magnitude.weight.copy_(magnitude.get_weight_norm(weight, zero, scaling=1).view_as(magnitude.weight))


def _unwrap(lm: PreTrainedModel) -> None:
    """Puts the linear layers back that are left in a wrapper without any adapter."""
    for name, module in list(lm.named_modules()):
        if isinstance(module, LoraLayer) and not module.lora_A:
            parent, _, child = name.rpartition(".")
            setattr(lm.get_submodule(parent), child, module.get_base_layer())


def _lora_config(model: PreTrainedModel, config: AdapterConfig) -> LoraConfig:
    check_saved_modules(model, config.modules_to_save)
    targets = _checked_targets(model, config)
    layers = config.layers
    if layers is not None:
        own = decoder_layers(model)
        if layers[-1] >= len(own):
            raise UserError(f"--lora-layers names layer {layers[-1]}, but the model's layers are 0-{len(own) - 1}.")
        if config.lora_targets == ("all-linear",):
            inside = {module for layer in layers for module in own[layer].modules()}
            targets = [name for name, module in all_linear(model).items() if module in inside]
            layers = None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats, whatever its annotation says
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        layers_to_transform=layers,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=list(config.modules_to_save) or None,
        bias="none",
    )


def _checked_targets(model: PreTrainedModel, config: AdapterConfig) -> str | list[str]:
    if config.lora_targets == ("all-linear",):
        return list(all_linear(model))
    head, adaptable = model.get_output_embeddings(), linear_layers(model).values()
    pattern = config.target_pattern
    check_patterns([pattern or ""], [name for name, _ in model.named_modules()], "--lora-targets")
    for target in config.lora_targets:
        matches = [
            m
            for name, m in model.named_modules()
            if (re.fullmatch(pattern, name) if pattern else name == target or name.endswith("." + target))
        ]
        if any(m is head for m in matches):
            raise UserError(
                f"--lora-targets {target}: that is the output head, which must stay frozen for the fused losses."
            )
        if any(isinstance(m, torch.nn.Linear) and m not in adaptable for m in matches):
            raise UserError(
                f"--lora-targets {target}: no adapter can be there, since {type(model).__name__} reads the weights of "
                f"these layers itself, or chooses experts by them; {_candidates(model)}."
            )
        if not matches:
            raise UserError(
                f"--lora-targets {target} matches no layer of this {type(model).__name__}; {_candidates(model)}."
            )
    return pattern or list(config.lora_targets)


def _candidates(model: PreTrainedModel) -> str:
    return f"its linear layers are: {', '.join(linear_layer_names(model))} (or all-linear)"
