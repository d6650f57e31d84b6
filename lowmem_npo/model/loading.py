"""From a name or a directory to a frozen causal language model, in bf16 or in 4-bit NF4, and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from lowmem_npo.config import ModelConfig
from lowmem_npo.console import Say, silent
from lowmem_npo.errors import UserError
from lowmem_npo.libraries import hub_problem
from lowmem_npo.model.checkpoint import Checkpoint, find_checkpoint, lists_tensors
from lowmem_npo.model.names import resolve_name
from lowmem_npo.model.original_olmo import is_original, native_config
from lowmem_npo.model.quantization import quantising, quantization_of, stored_quantization

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def resolve_device(device: str) -> torch.device:
    """The device of this process for "auto", "cpu" or "cuda". Raises UserError for "cuda" where there is no GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU (see `lowmem-npo env`); use --device cpu.")
    return PartialState().device


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration, after checking that it is a causal language model that can be loaded natively."""
    name, _ = resolve_name(config.model, config.revision)
    loaded = _read_config(name, config.revision)
    if not stored_quantization(loaded):
        _check_files(name, loaded)
    return loaded


def _read_config(name: str, revision: str | None) -> PretrainedConfig:
    _check_directory(name)
    try:
        content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        if is_original(content):
            return native_config(content, name)
        loaded = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_why_not_loaded(name, revision, error)) from error
    architectures = loaded.architectures or []
    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures) or not architectures
    if type(loaded) not in MODEL_FOR_CAUSAL_LM_MAPPING or not causal:
        kind = ", ".join(architectures) or loaded.model_type
        raise UserError(f"'{name}' is not a causal language model but {kind}: give an ...ForCausalLM model.")
    if loaded.model_type == "rwkv":
        raise UserError(f"'{name}' is an RWKV, which rescales its weights, but no adapter on them: give another model.")
    stored_quantization(loaded)  # raises if it cannot be trained on
    return loaded


def _check_files(name: str, architecture: PretrainedConfig) -> None:
    """Raises UserError for a directory whose weights are not those of its architecture: transformers loads their names
    and shapes as it will load the weights, on the device that has no data. Nothing else is read."""
    folder = Path(name).expanduser()
    if not (folder.is_dir() and lists_tensors(folder)):
        return
    stored = find_checkpoint(name).stored()
    tensors = {tensor: torch.empty(shape, dtype=dtype, device="meta") for tensor, (shape, dtype) in stored.items()}
    try:
        with _no_progress_bar():
            model, loaded_weights = _load_tensors(architecture, tensors, device_map={"": "meta"})
    except Exception:  # a conversion that needs data says nothing about the weights
        return
    _check_weights(model, name, loaded_weights, silent)


def _load_tensors(architecture: PretrainedConfig, tensors: Mapping[str, Any], **options: Any) -> tuple[Any, Any]:
    """The model of `tensors`, anything that gives a tensor for `[...]`, and what `from_pretrained` reports."""
    with torch.device("meta"):
        like = AutoModelForCausalLM.from_config(architecture)
    kind: Any = type(like)
    return kind.from_pretrained(
        None,
        config=like.config,  # of a part, where the architecture is a larger model's
        state_dict=dict(tensors),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which `_check_weights` refuses by name
        **options,
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _original_weights(name: str, architecture: PretrainedConfig, revision: str | None) -> Checkpoint | None:
    """The files, if their tensors are in OLMo's original format, whatever config.json says of them."""
    if architecture.model_type not in ("olmo", "llama") or stored_quantization(architecture):
        return None
    content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    local = Path(name).expanduser().is_dir() and content.get("model_type") == "olmo"
    checkpoint = find_checkpoint(name, revision) if local or is_original(content) else None
    return checkpoint if checkpoint is not None and checkpoint.rows else None


def attention_of(architecture: PretrainedConfig, wanted: str) -> str:
    """The attention implementation: `wanted`, or eager in place of SDPA where transformers has none.

    Raises:
        UserError: flash attention, where transformers has none.
    """
    kind = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)])
    if wanted == "flash_attention_2" and not kind._supports_flash_attn:
        raise UserError(f"--attn flash_attention_2: transformers has none for {kind.__name__}; use --attn sdpa.")
    return "eager" if wanted == "sdpa" and not kind._supports_sdpa else wanted


def load_model(config: ModelConfig, say: Say = print) -> PreTrainedModel:
    """The frozen base model on its device, in eval mode. Weights of the checkpoint that it does not use are reported.

    With `qlora`, transformers reads, moves and quantises one tensor at a time straight from the mapped files, so that
    host and device never hold more than the final model and one tensor (tests/model/test_loading_memory.py).

    Args:
        config: `qlora` quantises every linear layer but the head to NF4; embeddings, norms and head stay in `dtype`.

    Raises:
        UserError: not a causal LM, not found, no network, bf16 or flash-attention where they cannot run, weights that
            the checkpoint lacks.
    """
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    _check_can_run(config, device)
    name, _ = resolve_name(config.model, config.revision)
    loaded_config = _read_config(name, config.revision)
    quantization = quantization_of(loaded_config, config.qlora, dtype)
    loading = quantising() if quantization else nullcontext()
    if quantization and stored_quantization(loaded_config):  # its own recipe, but for the type that it computes in
        loaded_config.quantization_config, quantization = quantization.to_dict(), None
    model: PreTrainedModel
    auto_model: Any = AutoModelForCausalLM  # whose type has no loading info
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention_of(loaded_config, config.attn),
        "quantization_config": quantization,
        "device_map": {"": device},
    }
    try:
        original = _original_weights(name, loaded_config, config.revision)
        with loading:
            if original is not None:
                model, loaded_weights = _load_tensors(loaded_config, original.unread(), **options)
                model.name_or_path = model.config.name_or_path = name
            else:
                model, loaded_weights = auto_model.from_pretrained(
                    name,
                    config=loaded_config,
                    revision=config.revision,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # which `_check_weights` refuses by name
                    **options,
                )
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(_why_not_loaded(name, config.revision, error)) from error
    _check_weights(model, name, loaded_weights, say)
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # a 4-bit layer of bitsandbytes: on such CPUs it would be
            layer.support_avx512bf16_for_cpu = False  # repacked in its first eval pass, and have no gradient after
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a padding token (its EOS if it has none)."""
    name, _ = resolve_name(config.model, config.revision)
    _check_directory(name)
    try:
        content, _ = PretrainedConfig.get_config_dict(name, revision=config.revision)
        # the original format names a class of its own, which is this one
        auto_tokenizer: Any = PreTrainedTokenizerFast if is_original(content) else AutoTokenizer
        tokenizer = auto_tokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(_why_not_loaded(name, config.revision, error, what="tokenizer")) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of '{name}' has no end-of-sequence token, so answers could not end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_weights(model: PreTrainedModel, name: str, info: Mapping[str, Any], say: Say) -> None:
    """Raises UserError for weights that the checkpoint lacks, which are random now; says which ones are not used.

    info: what `from_pretrained` reports; tied and derived weights are not among the missing.
    """
    kind, unused = type(model).__name__, info["unexpected_keys"]
    others = f" (it has others: {_first(unused)})" if unused else ""
    if missing := info["missing_keys"]:
        raise UserError(f"The model '{name}' is not a whole {kind}: its files lack {_first(missing)}{others}.")
    shapes = [f"{key} {tuple(stored)} instead of {tuple(own)}" for key, stored, own in info["mismatched_keys"]]
    if shapes:
        raise UserError(f"The weights of '{name}' do not have the shapes of its configuration: {_first(shapes)}.")
    if unused:
        say(f"Not used by {kind}: {_first(unused)} of '{name}'.")


def _first(names: Collection[str]) -> str:
    """Three of them in full, the others counted."""
    first, more = ", ".join(sorted(names)[:3]), len(names) - 3
    return f"{first} and {more} more" if more > 0 else first


def _check_can_run(config: ModelConfig, device: torch.device) -> None:
    if config.attn == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "--attn flash_attention_2: flash-attn is not installed for this GPU; "
            "pip install 'lowmem-npo[flash]' (needs a CUDA toolchain), or use --attn sdpa."
        )
    if device.type == "cuda" and config.dtype == "bf16":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                gpu = torch.cuda.get_device_name(device)
                raise UserError(f"{gpu} has no bf16 arithmetic (it needs compute capability 8.0): use --dtype float32.")


def _check_directory(name: str) -> None:
    """What looks like a path must be a model directory: a typo should not be looked up on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        config_file = path / "config.json"
        if not config_file.is_file():
            raise UserError(f"The directory '{name}' holds no model: there is no config.json in it.")
        try:
            json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise UserError(f"'{config_file}' is not valid JSON: {error}.") from error
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"There is no directory '{name}': give a model directory, or a hub name such as allenai/OLMo-1B-hf."
        )
    else:
        hub_problem()


def _why_not_loaded(name: str, revision: str | None, error: Exception, what: str = "model") -> str:
    """One sentence for each of the many ways in which loading fails; the hub's own message ends it."""
    where = f"{what} '{name}'" + (f" at revision '{revision}'" if revision else "")
    reason = " ".join(str(error).split())
    lowered = reason.lower()
    if "trust_remote_code" in lowered or "custom code" in lowered:
        return f"The {where} needs code from its repository, which is never run here: use a native conversion of it."
    if "gated" in lowered or "401" in lowered or "403" in lowered:
        return f"The {where} is gated or private: accept its licence on the hub and log in with `hf auth login`."
    offline = ("couldn't connect", "offline", "connection", "resolve", "cached files", "max retries", "timed out")
    if any(sign in lowered for sign in offline) and not Path(name).is_dir():
        return (
            f"The {where} is not on this machine and the hub cannot be reached: check the network, "
            f"or give a local directory. ({hub_problem() or reason})"
        )
    if "automatic conversion of the weights" in lowered:  # of experts, which are stored one by one, into one tensor
        return f"The {where} cannot be loaded: the weights of some of its experts are missing or damaged."
    if isinstance(error, ImportError):
        return f"The {where} needs a package that is missing: {reason[:300]}"
    return f"The {where} cannot be loaded: {reason[:400]}"
