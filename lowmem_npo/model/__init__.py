"""From a name to a frozen (4-bit) model with a LoRA adapter, seen in two ways: as policy and as reference."""

from lowmem_npo.model.adapters import attach_lora, reference_mode
from lowmem_npo.model.head import AnswerHidden, answer_hidden, check_causal, check_head, frozen_head
from lowmem_npo.model.loading import load_model, load_tokenizer
from lowmem_npo.model.names import resolve_name
from lowmem_npo.model.packable import packs_rows
from lowmem_npo.model.precision import compute_autocast

__all__ = [
    "AnswerHidden",
    "answer_hidden",
    "attach_lora",
    "check_causal",
    "check_head",
    "compute_autocast",
    "frozen_head",
    "load_model",
    "load_tokenizer",
    "packs_rows",
    "reference_mode",
    "resolve_name",
]
