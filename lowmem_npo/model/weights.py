"""Whether a checkpoint's weights are those of its architecture, and weights that transformers cannot read by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from lowmem_npo.console import Say, silent
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded
from lowmem_npo.model.checkpoint import Checkpoint, find_checkpoint, lists_tensors, weight_files
from lowmem_npo.model.original_olmo import is_original
from lowmem_npo.model.quantization import is_finite, statistics, stored_quantization
from lowmem_npo.sizes import first_of


def check_directory_weights(name: str, architecture: PretrainedConfig, say: Say = silent) -> None:
    """Raises UserError if `name` is a directory with other weights than those of `architecture`, or what transformers
    raises where it cannot convert them; says which ones are not used.

    transformers loads names and shapes as it will load the weights, on the device that has no data; nothing else is
    read. What cannot be judged so is judged when the weights are loaded: those that are stored quantised, and a
    conversion that needs data.
    """
    folder = expanded(name)
    if not (folder.is_dir() and lists_tensors(folder)) or stored_quantization(architecture):
        return
    stored = find_checkpoint(name).stored().items()
    _check_types(name, {tensor: dtype for tensor, (_, dtype) in stored})
    tensors = {tensor: torch.empty(shape, dtype=dtype, device="meta") for tensor, (shape, dtype) in stored}
    try:
        model, loaded = _load_without_data(architecture, tensors)
    except Exception:
        if _converts_without_data(architecture):
            raise
        return
    check_weights(model, name, loaded, say)


def check_has_weights(name: str) -> None:
    """Raises UserError if `name` is a directory without weights, which is enough to estimate, but not to train."""
    folder = expanded(name)
    if folder.is_dir():
        weight_files(folder, name)


def check_weights(model: PreTrainedModel, name: str, loaded: Mapping[str, Any], say: Say) -> None:
    """Raises UserError for weights that the checkpoint lacks, which are random now; says which ones are not used.

    loaded: what `from_pretrained` reports; tied and derived weights are not among the missing.
    """
    kind, unused = type(model).__name__, loaded["unexpected_keys"]
    others = f" (it has others: {_first(unused)})" if unused else ""
    if missing := loaded["missing_keys"]:
        raise UserError(f"The model '{name}' is not a whole {kind}: its files lack {_first(missing)}{others}.")
    shapes = [f"{key} {tuple(stored)} instead of {tuple(own)}" for key, stored, own in loaded["mismatched_keys"]]
    if shapes:
        raise UserError(f"The weights of '{name}' do not have the shapes of its configuration: {_first(shapes)}.")
    if unused:
        say(f"Not used by {kind}: {_first(unused)} of '{name}'.")


def check_finite(model: PreTrainedModel, name: str, quantised: Collection[str] = ()) -> None:
    """Raises UserError for weights that hold NaN or infinity, on whatever device they are.

    quantised: names of those that did so before they were quantised.
    """
    if damaged := {*quantised, *not_finite(model)}:
        raise UserError(f"The weights of '{name}' are damaged: {_first(damaged)} hold NaN or infinity.")


def not_finite(model: PreTrainedModel) -> list[str]:
    """The names of weights that hold NaN or infinity; of those in 4 bits, whose scales do."""
    parts = [(n, part) for n, w in model.named_parameters() for part in (w, *statistics(w)) if part.is_floating_point()]
    return list(dict.fromkeys(n for n, part in parts if not part.is_meta and not is_finite(part)))


def load_tensors(architecture: PretrainedConfig, tensors: Mapping[str, Any], **options: Any) -> tuple[Any, Any]:
    """The model of `tensors`, and what `from_pretrained` reports.

    Args:
        tensors: name -> a tensor, or whatever gives one for `[...]`: it is read when its turn comes.
        options: of `from_pretrained`.
    """
    with torch.device("meta"):
        like = AutoModelForCausalLM.from_config(architecture)
    kind: Any = type(like)
    return kind.from_pretrained(
        None,
        config=like.config,  # of a part, where the architecture is a larger model's
        state_dict=dict(tensors),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which `check_weights` refuses by name
        **options,
    )


def original_weights(name: str, revision: str | None, architecture: PretrainedConfig) -> Checkpoint | None:
    """The checkpoint, if its tensors are in OLMo's original format, whatever config.json says of them."""
    if architecture.model_type not in ("olmo", "llama") or stored_quantization(architecture):
        return None
    content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    relabelled = content.get("model_type") == "olmo" and expanded(name).is_dir()
    checkpoint = find_checkpoint(name, revision) if relabelled or is_original(content) else None
    return checkpoint if checkpoint is not None and checkpoint.rows else None


def _check_types(name: str, types: Mapping[str, torch.dtype]) -> None:
    """Raises UserError for weights of a quantised model whose config.json does not say so: they would be read as if
    they were the numbers that they stand for."""
    for tensor, dtype in types.items():
        if tensor.endswith(".weight") and not (dtype.is_floating_point and dtype.itemsize > 1):
            raise UserError(
                f"The weights of '{name}' are stored quantised ({tensor} is {str(dtype).removeprefix('torch.')}), but "
                "its config.json does not say how: give the model that they were made from, with --qlora."
            )


def _load_without_data(architecture: PretrainedConfig, tensors: Mapping[str, Any]) -> tuple[Any, Any]:
    with _no_progress_bar():
        return load_tensors(architecture, tensors, device_map={"": "meta"})


def _converts_without_data(architecture: PretrainedConfig) -> bool:
    """Whether the names and shapes of a whole checkpoint, as transformers itself would save it, can be loaded so."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(architecture)
    try:
        _load_without_data(architecture, revert_weight_conversion(whole, whole.state_dict()))
    except Exception:
        return False
    return True


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first(names: Collection[str]) -> str:
    return first_of(sorted(names), 3, ", ")
