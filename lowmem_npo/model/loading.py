"""From a name or a directory to a frozen causal language model, in bf16 or in 4-bit NF4, and its tokenizer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    core_model_loading,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

from lowmem_npo.config import ModelConfig
from lowmem_npo.console import Say, silent
from lowmem_npo.endings import lacks_memory
from lowmem_npo.errors import UserError, one_line
from lowmem_npo.files import expanded
from lowmem_npo.libraries import hub_problem
from lowmem_npo.model.checkpoint import find_checkpoint
from lowmem_npo.model.layer_by_layer import LayerLoaded, layer_by_layer
from lowmem_npo.model.names import resolve_name
from lowmem_npo.model.original_olmo import is_original, native_config
from lowmem_npo.model.quantization import nf4, one_at_a_time, quantising, stored_quantization, to_host
from lowmem_npo.model.quantized_cache import CacheEntry, check_cached
from lowmem_npo.model.weights import (
    check_directory_weights,
    check_finite,
    check_weights,
    load_tensors,
    original_weights,
)
from lowmem_npo.sources import check_model_name, model_not_here

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def resolve_device(device: str) -> torch.device:
    """The device of this process for "auto", "cpu" or "cuda". Raises UserError for "cuda" where there is no GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU (see `lowmem-npo env`); use --device cpu.")
    return PartialState().device


def load_config(config: ModelConfig, say: Say = silent) -> PretrainedConfig:
    """The model's configuration, after checking that it is a causal language model that can be loaded natively, and, of
    a directory, that its files hold the weights of that model, of which only names and shapes are read. Those
    that the model does not use are reported to `say`; `load_model` reports them as well."""
    name = resolve_name(config.model, config.revision)
    architecture = _architecture(name, config.revision)
    try:
        check_directory_weights(name, architecture, say)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_why_not_loaded(name, config.revision, error)) from error
    return architecture


def _architecture(name: str, revision: str | None) -> PretrainedConfig:
    _check_name(name)
    if (expanded(name) / "adapter_config.json").is_file():
        raise _holds_an_adapter(name)
    try:
        content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        loaded = (
            native_config(content, name)
            if is_original(content)
            else AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        )
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
    try:
        text = loaded.get_text_config()
        text.num_hidden_layers  # noqa: B018
    except (ValueError, AttributeError) as error:  # several decoders (Musicgen), or none of plain layers (BLT)
        raise UserError(
            f"'{name}' is not supported: the configuration of a {loaded.model_type} does not name one decoder and the "
            "number of its layers."
        ) from error
    if getattr(text, "is_causal", None) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise UserError(f"'{name}' is not causal: its config.json has each token see those after it.")
    stored_quantization(loaded)  # raises if it cannot be trained on
    return loaded


def attention_of(architecture: PretrainedConfig, wanted: str) -> str:
    """The attention implementation: `wanted`, or eager in place of SDPA where transformers has none.

    Raises:
        UserError: flash attention, where transformers has none.
    """
    kind = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)])
    if wanted == "flash_attention_2" and not kind._supports_flash_attn:
        raise UserError(f"--attn flash_attention_2: transformers has none for {kind.__name__}; use --attn sdpa.")
    return "eager" if wanted == "sdpa" and not kind._supports_sdpa else wanted


def quantization_of(architecture: PretrainedConfig, config: ModelConfig) -> BitsAndBytesConfig | None:
    """How the linear layers are held in memory: as the checkpoint stores them, else in NF4 with --qlora."""
    dtype = DTYPES[config.dtype]
    stored = stored_quantization(architecture)
    if stored is None:
        return nf4(dtype, config.double_quant != "off") if config.qlora else None
    stored.bnb_4bit_compute_dtype = dtype
    return stored


def load_model(
    config: ModelConfig,
    say: Say = print,
    on_host: bool = False,
    layer_loaded: LayerLoaded | None = None,
    in_file: bool = False,
) -> PreTrainedModel:
    """The frozen base model on its device, in eval mode. Weights of the checkpoint that it does not use are reported.

    With `qlora`, transformers reads, moves and quantises one tensor at a time straight from the mapped files, so that
    host and device never hold more than the final model and one tensor (tests/model/test_loading_memory.py).

    Args:
        config: `qlora` quantises every linear layer but the head to NF4; embeddings, norms and head stay in `dtype`.
        on_host: leave it in host memory, from which its weights will be streamed; the device only quantises.
        layer_loaded: called with each decoder layer once it is whole: in host memory, but for 4-bit weights that a GPU
            has quantised, which are still there.
        in_file: leave the decoder layers in the files of the quantised cache, mapped; needs one. Of several processes,
            one makes it while the others wait.

    Raises:
        UserError: not a causal LM, not found, no network, bf16 or flash-attention where they cannot run, weights that
            the checkpoint lacks.
    """
    check_can_run(config, resolve_device(config.device))
    entry = cache_entry(config)
    with PartialState().main_process_first() if in_file else nullcontext():
        if entry is not None and entry.exists():
            entry.clear_up()
            return _from_cache(entry, config, say, on_host, None if in_file else layer_loaded)
        if not in_file:
            model = _load(config, say, on_host, layer_loaded)
            if entry is not None:
                entry.keep(model, say)
            return model
        assert entry is not None, "the configuration names a cache"
        with entry.being_written(say) as writer:
            model = _load(config, say, True, writer.map_layer)
            writer.finish(model)
        return model


def local_cache_entry(config: ModelConfig, architecture: PretrainedConfig | None = None) -> CacheEntry | None:
    """`cache_entry`, but that nothing is downloaded; None also where the weights are not on this machine yet.

    architecture: the model's, if it is known, by which weights that are still to be downloaded are judged, too.

    Raises:
        UserError: as it does, and if the entry is damaged, or could not be written.
    """
    if config.quantized_cache is None:
        return None
    if architecture is not None:
        check_cached(architecture, stored_quantization(architecture))
    name = resolve_name(config.model, config.revision)
    if not expanded(name).is_dir():
        try:
            find_checkpoint(name, config.revision, local=True)
        except UserError:  # they are still to be downloaded, or some of them
            return None
    entry = cache_entry(config)
    if entry is not None and not entry.exists():
        entry.check_writable()
    return entry


def cache_entry(config: ModelConfig) -> CacheEntry | None:
    """Where the model's weights are, or will be, kept in --quantized-cache; None without it. A model of the hub is
    downloaded.

    Raises:
        UserError: the weights are stored in 4 bits already, or the cache is a file.
    """
    if config.quantized_cache is None:
        return None
    name = resolve_name(config.model, config.revision)
    architecture = _architecture(name, config.revision)
    check_cached(architecture, stored_quantization(architecture))
    recipe = quantization_of(architecture, config)
    assert recipe is not None, "the configuration has asked for 4 bits"
    return CacheEntry(CacheEntry.folder(config.quantized_cache), name, config.revision, recipe.to_dict())


def _load(config: ModelConfig, say: Say, on_host: bool, layer_loaded: LayerLoaded | None) -> PreTrainedModel:
    """`load_model` without a cache."""
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    name = resolve_name(config.model, config.revision)
    loaded_config = load_config(config)
    quantization = quantization_of(loaded_config, config)
    loading: Any = quantising(device if on_host else None) if quantization else one_at_a_time(on_host)
    each: Any = nullcontext() if layer_loaded is None else layer_by_layer(layer_loaded)
    if quantization and stored_quantization(loaded_config):  # its own recipe, but for the type that it computes in
        loaded_config.quantization_config, quantization = quantization.to_dict(), None
    model: PreTrainedModel
    auto_model: Any = AutoModelForCausalLM  # whose type has no loading info
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention_of(loaded_config, config.attn),
        "quantization_config": quantization,
        "device_map": {"": torch.device("cpu") if on_host else device},
    }
    try:
        original = original_weights(name, config.revision, loaded_config)
        with loading as damaged, each, _lack_of_memory_ends_it():
            if original is not None:
                model, loaded_weights = load_tensors(loaded_config, original.unread(), **options)
                model.name_or_path = model.config.name_or_path = name
                with suppress(OSError):  # there is none
                    revision = config.revision or "main"
                    model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
            else:
                model, loaded_weights = auto_model.from_pretrained(
                    name,
                    config=loaded_config,
                    revision=config.revision,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # which `check_weights` refuses by name
                    **options,
                )
    except UserError:
        raise
    except Exception as error:
        raise UserError(_why_not_loaded(name, config.revision, error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _holds_an_adapter(name)  # on the hub
    check_weights(model, name, loaded_weights, say)
    check_finite(model, name, damaged)
    if on_host:
        to_host(model)
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # a 4-bit layer of bitsandbytes: on such CPUs it would be
            layer.support_avx512bf16_for_cpu = False  # repacked in its first eval pass, and have no gradient after
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _lack_of_memory_ends_it() -> AbstractContextManager[object]:
    """Inside, memory that runs out while transformers converts a weight, as to 4 bits or into a tensor of all experts,
    is raised. transformers notes what fails there, goes on to the next weight, and ends with an error that does not
    say why."""
    noted = core_model_loading.log_conversion_errors

    class Raised:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.noted = noted(*args, **kwargs)

        def __enter__(self) -> None:
            self.noted.__enter__()

        def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool | None:
            return False if error and lacks_memory(error) else self.noted.__exit__(kind, error, trace)

    return mock.patch.object(core_model_loading, "log_conversion_errors", Raised)


def _from_cache(
    entry: CacheEntry, config: ModelConfig, say: Say, on_host: bool, layer_loaded: LayerLoaded | None
) -> PreTrainedModel:
    """The model as it was kept, under its own name."""
    kept = replace(config, model=str(entry.path), revision=None, quantized_cache=None)
    name = resolve_name(config.model, config.revision)
    try:
        model = _load(kept, say, on_host, layer_loaded)
    except UserError as error:
        raise UserError(
            f"--quantized-cache: '{entry.path}' cannot be read: remove it, or leave the option out. ({error})"
        ) from error
    model.name_or_path = model.config.name_or_path = name
    say(f"The 4-bit weights come from {entry.path}.")
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a padding token (its EOS if it has none)."""
    name = resolve_name(config.model, config.revision)
    _check_name(name)
    what = "model"  # as which a name is unknown
    try:
        content, _ = PretrainedConfig.get_config_dict(name, revision=config.revision)
        what = "tokenizer"
        # the original format names a class of its own, which is this one
        auto_tokenizer: Any = PreTrainedTokenizerFast if is_original(content) else AutoTokenizer
        tokenizer = auto_tokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(_why_not_loaded(name, config.revision, error, what)) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of '{name}' has no end-of-sequence token, so answers could not end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_can_run(config: ModelConfig, device: torch.device) -> None:
    """Raises UserError for flash attention that is not installed, or bf16 on a GPU that has none."""
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


def _check_name(name: str) -> None:
    if not check_model_name(name):
        hub_problem()  # before anything is looked up there


def _holds_an_adapter(name: str) -> UserError:
    """transformers would load that adapter with the model, and it would count as the model's weights in training but
    not in merging."""
    return UserError(
        f"'{name}' holds an adapter beside the model (adapter_config.json): move the adapter's files into a directory "
        "of their own, and give that to --adapter if it is to be used."
    )


def _why_not_loaded(name: str, revision: str | None, error: Exception, what: str = "model") -> str:
    """One sentence for each of the many ways in which loading fails; the hub's own message ends it. Raises `error` if
    memory ran out."""
    if lacks_memory(error):
        raise error
    where = f"{what} '{name}'" + (f" at revision '{revision}'" if revision else "")
    reason = one_line(error)
    lowered = reason.lower()
    if "trust_remote_code" in lowered or "custom code" in lowered:
        return f"The {where} needs code from its repository, which is never run here: use a native conversion of it."
    if "gated" in lowered or "401" in lowered or "403" in lowered:
        return f"The {where} is gated or private: accept its licence on the hub and log in with `hf auth login`."
    offline = ("couldn't connect", "offline", "connection", "resolve", "cached files", "max retries", "timed out")
    if any(sign in lowered for sign in offline) and not Path(name).is_dir():
        return model_not_here(where, hub_problem() or reason)
    if "automatic conversion of the weights" in lowered:  # of experts, which are stored one by one, into one tensor
        return f"The {where} cannot be loaded: the weights of some of its experts are missing or damaged."
    if isinstance(error, ImportError):
        return f"The {where} needs a package that is missing: {reason[:300]}"
    return f"The {where} cannot be loaded: {reason[:400]}"
