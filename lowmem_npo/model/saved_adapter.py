"""An adapter loaded from its directory onto the model it was trained on, and onto no other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, cast

import torch
from annotated_types import Interval
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lowmem_npo.console import Say
from lowmem_npo.endings import lacks_memory
from lowmem_npo.errors import UserError, one_line
from lowmem_npo.files import expanded, file_sha256, load_json
from lowmem_npo.model.names import resolve_name
from lowmem_npo.model.patterns import check_patterns
from lowmem_npo.model.saved_modules import in_four_bits
from lowmem_npo.ranges import Count, Finite, check_values, shortened, shown
from lowmem_npo.run_directory import (
    AdapterFiles,
    RunFiles,
    from_here,
    no_adapter,
    places_from_here,
    places_of,
    run_of_adapter,
)
from lowmem_npo.sources import check_adapter_name, is_path

# What an adapter may hold beside the two factors of its layers: configuration field -> description. PEFT marks those of
# its variants of LoRA, whatever its version has.
EXTRAS = {
    field.name: f"more than LoRA ({field.name})"
    for field in fields(LoraConfig)
    if field.metadata.get("is_lora_variant")
} | {
    "use_dora": "DoRA magnitudes",
    "modules_to_save": "whole modules (modules_to_save)",
    "lora_bias": "biases (lora_bias)",
    "trainable_token_indices": "trained embedding rows (trainable_token_indices)",
    "layer_replication": "repeated layers (layer_replication)",
    "alora_invocation_tokens": "an activation by tokens (aLoRA)",
    "arrow_config": "a routing between adapters (Arrow)",
    "use_qalora": "pooled inputs (QALoRA)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
    "monteclora_config": "sampled factors (MonteCLoRA)",
    "velora_config": "compressed inputs (VeLoRA)",
}
# In the metadata of an adapter's weights: JSON, layer -> how many of its ranks, the first of them, are those of the
# adapter that the run went on from.
FIRST_RANKS = "first_ranks"
# Where adapters begin (init_lora_weights) without a change of the base. From others PEFT subtracts their beginning.
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Of a LoRA adapter's configuration, what PEFT takes as it comes.
LAYERS = str | list[str] | None
TYPES = {
    "r": Count, "lora_alpha": Finite, "lora_dropout": Annotated[float, Interval(ge=0, le=1)],
    "rank_pattern": dict[str, Count] | None, "alpha_pattern": dict[str, Finite] | None, "use_rslora": bool,
    "use_dora": bool, "target_modules": LAYERS, "exclude_modules": LAYERS, "layers_pattern": LAYERS,
    "layers_to_transform": int | list[int] | None, "modules_to_save": list[str] | None, "revision": str | None,
}  # fmt: skip


def base_of_adapter(folder: str) -> str:
    """The name or directory of the model that the adapter in `folder` was trained on.

    Raises UserError if `folder` holds no adapter, or one that names no model, or a directory that is not here.
    """
    base = _named_base(folder)
    if base is None:
        raise UserError(f"The adapter in '{folder}' does not name the model that it was trained on: give --model.")
    run = run_of_adapter(folder)
    if not expanded(base).is_dir() and (is_path(base) or _was_directory(run)):
        places = dict.fromkeys([expanded(base).absolute(), *places_of(run, settings_of_run(folder), base)])
        looked = " and not ".join(f"in '{place}'" for place in places)
        raise UserError(
            f"The adapter in '{folder}' was trained on the model in the directory '{base}', which is not there (not "
            f"{looked}): say with --model where it is now."
        )
    return base


def revision_of_adapter(folder: str) -> str | None:
    """The branch, tag or commit of the base model that the adapter in `folder` was trained on, if one was named."""
    return _configuration(folder).get("revision")


def resolve_base(
    adapter: str, model: str | None, revision: str | None, any_base: bool, say: Say
) -> tuple[str, str | None]:
    """The name and the revision of the base that `adapter` is put on: what is given, or what it was trained on.

    any_base: it may be another than the one that it was trained on.

    Raises:
        UserError: no LoRA adapter there, or no base named.
    """
    of_adapter = stored_lora(adapter).revision
    revision = revision or (None if any_base else of_adapter)
    return resolve_name(model or base_of_adapter(adapter), revision, say), revision


def stored_lora(folder: str) -> LoraConfig:
    """The configuration of the LoRA adapter in `folder`.

    Raises UserError if there is none, one of another kind, or one that is right only on a base which is not saved.
    """
    content = _configuration(folder)
    if (kind := content["peft_type"]) != "LORA":
        raise UserError(f"The adapter in '{folder}' is {shown(kind)}, not LoRA: nothing else is supported here.")
    try:
        config = LoraConfig.from_pretrained(str(expanded(folder)))
    except (TypeError, ValueError) as error:  # fields that do not go together
        raise UserError(
            f"The configuration of the adapter in '{folder}' is not valid: {shortened(str(error))}"
        ) from error
    if (start := _changes_the_base(content)) is not None:
        raise UserError(
            f"The adapter in '{folder}' belongs to a base that its start has changed ({start}): merge it in the "
            "program that trained it (PEFT's merge_and_unload), and use the merged model."
        )
    return config


def check_stored_patterns(folder: str, model: PreTrainedModel) -> None:
    """Raises UserError if the adapter in `folder` names its layers, their ranks or scales by a regular expression that
    takes too long on those of `model`."""
    content = _configuration(folder)
    named = [content.get(field) for field in ("target_modules", "exclude_modules", "layers_pattern")]
    named += [list(content.get(field) or ()) for field in ("rank_pattern", "alpha_pattern")]
    patterns = [text for one in named for text in ([one] if isinstance(one, str) else one or ())]
    names = [name for name, _ in model.named_modules()]
    check_patterns(map(str, patterns), names, f"The adapter in '{folder}' has the pattern")


def more_than_lora(folder: str, allowed: Collection[str] = ()) -> list[str]:
    """What the LoRA adapter in `folder` holds beside the two factors of its layers, described; `EXTRAS` that are
    `allowed` are left out."""
    content = _configuration(folder)
    extras = [text for field, text in EXTRAS.items() if content.get(field) and field not in allowed]
    if content.get("bias", "none") != "none":
        extras.append(f"biases (bias: {content['bias']})")
    return extras


def settings_of_run(folder: str) -> dict[str, Any]:
    """run.yaml of the run that left the adapter in `folder`, the run's directory or a checkpoint in it, what it names
    found from here; empty where there is none. Raises UserError where it is damaged: figures of rows that are written
    otherwise than in training would mislead."""
    run = run_of_adapter(folder)
    if not run.run_yaml.is_file():
        return {}
    return places_from_here(run, run.settings())


def check_base(folder: str, model_name: str) -> None:
    """Raises UserError if the adapter in `folder` names another model than `model_name` (original OLMo names resolved)
    as the one that it was trained on."""
    base, given = resolve_name(_named_base(folder) or model_name), resolve_name(model_name)
    if _place(base) != _place(given):
        raise UserError(
            f"The adapter in '{folder}' was trained on '{base}', not on '{given}': give --model {shlex.quote(base)}, "
            "or --any-base if both are the same weights."
        )


def load_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """`model` with the frozen adapter of `folder`, and as its `first_ranks` what FIRST_RANKS tells of it, if anything.

    Raises UserError if a weight has no counterpart or another shape, or as `stored_lora` does.
    """
    stored_lora(folder)
    check_finite(folder)
    misfit = f"The adapter in '{folder}' does not fit this {type(model).__name__}: it belongs to another model"
    if names := in_four_bits(model, _configuration(folder).get("modules_to_save") or ()):
        raise UserError(
            f"The adapter in '{folder}' has whole modules ({', '.join(names)}) that this {type(model).__name__} holds "
            "in 4 bits: use it without --qlora, or merge it."
        )
    check_stored_patterns(folder, model)
    file = AdapterFiles(expanded(folder)).weights
    try:
        adapted = PeftModel.from_pretrained(model, str(expanded(folder)))
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        copied = set(adapted.state_dict())  # PEFT stores an embedding with an adapter on it as well
        copy_weights({name: weight for name, weight in load_file(file).items() if name not in copied}, own)
    except (RuntimeError, ValueError) as error:  # other shapes; no layer of the adapter's names
        if lacks_memory(error):
            raise
        raise UserError(f"{misfit} ({one_line(error, 200)}).") from error
    adapted.active_peft_config.base_model_name_or_path = model.name_or_path  # PEFT would look for the named one
    with safe_open(file, framework="pt") as stored:
        cast(Any, adapted).first_ranks = json.loads((stored.metadata() or {}).get(FIRST_RANKS, "{}"))
    return adapted.eval()


@torch.no_grad()
def copy_weights(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copies the weights `stored` of an adapter into a model's `own`, each into that of its name.

    PEFT does not do it for every architecture: it renames what transformers renames in checkpoints of older versions.
    Where such a pattern also fits the new name, as in Laguna's shared experts, the weight gets a name that no layer
    has, and is left out without an error.

    Raises ValueError if a name is in one of them alone, or a shape differs.
    """
    if unmatched := stored.keys() ^ own.keys():
        raise ValueError(f"{len(unmatched)} weights have no counterpart, {min(unmatched)} among them")
    if other := [name for name, weight in own.items() if weight.shape != stored[name].shape]:
        raise ValueError(f"{len(other)} weights have another shape, {min(other)} among them")
    for name, weight in own.items():
        weight.copy_(stored[name])


def check_unchanged(folder: str, sha256: str) -> None:
    """Raises UserError unless the weights in `folder` have this hash: called when they are loaded, it tells whether it
    is theirs."""
    if file_sha256(AdapterFiles(expanded(folder)).weights) != sha256:
        raise UserError(
            f"The adapter in '{folder}' has been replaced since the command began: wait until what writes it has "
            "ended, and start again."
        )


def check_finite(folder: str) -> None:
    """Raises UserError if a weight of the adapter in `folder` is no finite number."""
    with safe_open(AdapterFiles(expanded(folder)).weights, framework="pt") as file:
        names = list(file.keys())
        damaged = [name for name in names if not file.get_tensor(name).isfinite().all()]
    if damaged:
        raise UserError(
            f"The adapter in '{folder}' is damaged: {len(damaged)} of its {len(names)} weights hold NaN or infinity, "
            f"{min(damaged)} among them."
        )


def _named_base(folder: str) -> str | None:
    """PEFT leaves null or "" where the model was built from a configuration; "" as a path is the working directory."""
    base, run = _configuration(folder).get("base_model_name_or_path"), settings_of_run(folder)
    if not (isinstance(base, str) and base.strip()):
        return None
    return from_here(run_of_adapter(folder), run, base) if run else base


def _was_directory(run: RunFiles) -> bool:
    """Whether the base of `run` was a directory, as far as that is recorded."""
    try:
        return bool(load_json(run.audit)["model"]["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _changes_the_base(content: dict[str, Any]) -> str | None:
    """How this adapter began, if PEFT has changed the base's weights for that."""
    if content.get("kasa_config"):
        return "KaSA"
    start = content.get("init_lora_weights")
    kept = (start.lower() if isinstance(start, str) else start) in KEEP_THE_BASE
    return None if kept else f"init_lora_weights: {shown(start)}"


def _configuration(folder: str) -> dict[str, Any]:
    """The content of adapter_config.json."""
    check_adapter_name(folder)
    files = AdapterFiles(expanded(folder))
    for file in (files.adapter_config, files.weights):
        if not file.is_file():
            raise no_adapter(folder, file)
    content = load_json(files.adapter_config)
    if not isinstance(content, dict) or "peft_type" not in content:
        raise UserError(f"'{files.adapter_config}' is not the configuration of a PEFT adapter.")
    if content["peft_type"] == "LORA":
        check_values(content, TYPES, lambda name: f"'{files.adapter_config}': {name}")
    return content


def _place(name: str) -> str:
    path = expanded(name)
    return str(path.resolve()) if path.is_dir() else name.strip("/").lower()
