"""LoRA adapters: the trained weights. With them switched off, the same network is the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_npo.config import AdapterConfig
from lowmem_npo.errors import UserError
from lowmem_npo.model.layers import causal_lm, decoder_layers
from lowmem_npo.model.modes import eval_mode

EXTRA = "extra"  # name of the temporary adapter


def attach_lora(model: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """Adds a LoRA adapter (Hu et al. 2021) that starts as the identity; only its weights, in float32, require grad.

    Its layers take their input as it is, without PEFT's float32 copy of it: a bf16 model runs inside
    `compute_autocast`, which casts the adapter's small matrices instead.

    Raises:
        UserError: a target matches no linear layer (the candidates are listed) or the output head, or there are fewer
            decoder layers than `lora_layers` names.
    """
    targets = _checked_targets(model, config.lora_targets)
    if config.layers is not None:
        count = len(decoder_layers(model))
        if config.layers[-1] >= count:
            raise UserError(f"--lora-layers names layer {config.layers[-1]}, but the model's layers are 0-{count - 1}.")
        if targets == "all-linear":  # PEFT takes layer numbers only with names
            targets = linear_layer_names(model)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats, whatever its annotation says
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        layers_to_transform=config.layers,
        bias="none",
    )
    candidates = _candidates(model)
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:  # a norm, a whole block; a layer that `lora_layers` leaves out
        reason = str(error).splitlines()[0].split(". ")[0].rstrip("(")
        raise UserError(
            f"--lora-targets {' '.join(config.lora_targets)}: PEFT cannot adapt these ({reason}); {candidates}."
        ) from error
    _save_no_embedding(adapted)
    model.disable_input_require_grads()  # they serve reentrant checkpointing, and cost gradients below the adapters
    _keep_input_dtype(adapted)
    return adapted


def check_lora(architecture: PretrainedConfig, config: AdapterConfig) -> None:
    """Raises, before any weight is loaded, what `attach_lora` would raise."""
    with torch.device("meta"):
        attach_lora(AutoModelForCausalLM.from_config(architecture, attn_implementation="eager"), config)


@contextmanager
def reference_mode(model: PeftModel) -> Iterator[None]:
    """Inside, `model` is the original model: adapters off, eval mode, no gradients; all is restored on leaving."""
    with eval_mode(model), torch.no_grad(), model.disable_adapter():
        yield


@contextmanager
def extra_adapter(model: PreTrainedModel | PeftModel, rank: int, seed: int) -> Iterator[None]:
    """Inside, every linear layer but the head has one more LoRA adapter, which starts as the identity and alone
    requires grad. On leaving it is removed and everything is restored."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            adapted, active = model, model.active_adapters
            model.add_adapter(EXTRA, config)
        else:
            adapted, active = cast(PeftModel, get_peft_model(model, config, adapter_name=EXTRA)), []
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
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def linear_layer_names(model: PreTrainedModel) -> list[str]:
    """Last name parts of the linear layers that can have an adapter: q_proj, down_proj, ...; never the head."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, _conv1d())
    return sorted(
        {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, kinds) and m is not head}
    )


def _save_no_embedding(model: PeftModel) -> None:
    """PEFT saves a copy of the embedding where config.json, which it reads for that, has another vocabulary than the
    model, as it has in OLMo's original format: there the embedding is longer than the vocabulary."""
    own: Any = model
    own.save_pretrained = partial(own.save_pretrained, save_embedding_layers=False)


def _keep_input_dtype(adapted: PeftModel) -> None:
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def _unwrap(lm: PreTrainedModel) -> None:
    """Puts the linear layers back that are left in a wrapper without any adapter."""
    for name, module in list(lm.named_modules()):
        if isinstance(module, LoraLayer) and not module.lora_A:
            parent, _, child = name.rpartition(".")
            setattr(lm.get_submodule(parent), child, module.get_base_layer())


def _conv1d() -> type:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    return Conv1D


def _checked_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> str | list[str]:
    if targets == ("all-linear",):
        return "all-linear"
    head = model.get_output_embeddings()
    for target in targets:
        matches = [m for name, m in model.named_modules() if name == target or name.endswith("." + target)]
        if any(m is head for m in matches):
            raise UserError(
                f"--lora-targets {target}: that is the output head, which must stay frozen for the fused losses."
            )
        if not matches:
            raise UserError(
                f"--lora-targets {target} matches no layer of this {type(model).__name__}; {_candidates(model)}."
            )
    return list(targets)


def _candidates(model: PreTrainedModel) -> str:
    return f"its linear layers are: {', '.join(linear_layer_names(model))} (or all-linear)"
