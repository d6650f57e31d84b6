"""The reference, cached: each row goes through the original model once, in this run or in an earlier one.

Stored are a log-prob for each forget answer token (4 bytes) and the final hidden state for each retain answer token
(2 d bytes in bf16; the logits would take 2 V). A row's values are those of its first visit, and do not depend on the
rest of its batch: the losses are the live reference's bit for bit, on one thread of a CPU and for rows of some dozen
tokens. Where the sizes of the matrix products decide how they round (shorter rows, more threads, a GPU), that holds for
the first epoch, and the rounding may differ later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowmem_npo.config import ObjectiveConfig
from lowmem_npo.data.batching import RowBatch
from lowmem_npo.data.tokenized_rows import TokenizedRow, num_predicted
from lowmem_npo.errors import UserError
from lowmem_npo.files import shortage
from lowmem_npo.model.layers import causal_lm
from lowmem_npo.sizes import amount
from lowmem_npo.training.reference.answer_file import AnswerFile
from lowmem_npo.training.reference.identity import rows_fingerprint, tokenizer_fingerprint, weights_fingerprint
from lowmem_npo.training.reference.live import LiveReference

logger = logging.getLogger(__name__)


@dataclass
class CachedReference(LiveReference):
    """As `LiveReference`, but its results are stored in `files`, and what is stored there is not run again."""

    files: dict[str, AnswerFile]

    @classmethod
    def open(
        cls,
        live: LiveReference,
        directory: Path,
        forget: Sequence[TokenizedRow],
        retain: Sequence[TokenizedRow] | None,
        tokenizer: PreTrainedTokenizerBase,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> CachedReference:
        """The cache in `directory`, which need not exist: nothing is written before the first batch. names: what the
        files of a part are called if not as it is.

        Raises:
            UserError: the directory holds a cache of another model, other rows or another tokenizer, or a damaged one.
        """
        lm = causal_lm(live.model)
        model = {"model": lm.config.name_or_path or type(lm).__name__, "weights": weights_fingerprint(live.model)}
        model["tokenizer"] = tokenizer_fingerprint(tokenizer)
        parts = _parts(live.objective, forget, retain, lm.config, lm.get_output_embeddings().weight.dtype)
        files = {}
        for name, (rows, width, dtype) in parts.items():
            path, identity = _path(directory, name, names), {**model, "rows": rows_fingerprint(rows)}
            try:
                file = AnswerFile(path, [*map(num_predicted, rows)], width, dtype, identity)
            except (ValueError, OSError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"--reference-dir: '{path}' cannot be used: {reason}; {_REMEDY}.") from error
            if reason := _stale(file, identity):
                raise UserError(f"--reference-dir: '{path}' {reason}; {_REMEDY}.")
            files[name] = file
        return cls(live.model, live.head, live.objective, files)

    def answer_logprobs(self, batch: RowBatch) -> Tensor:
        run = super().answer_logprobs
        return self._stored("forget", batch, lambda: run(batch)[:, None]).squeeze(1)

    def answer_hidden(self, batch: RowBatch) -> Tensor:
        run = super().answer_hidden
        return self._stored("retain", batch, lambda: run(batch))

    def runs(self, forget: Sequence[int] = (), retain: Sequence[int] = ()) -> bool:
        parts = {"forget": forget, "retain": retain}
        missing = {part: () if self._holds(part, rows) else rows for part, rows in parts.items()}
        return super().runs(**missing)

    def answers_of_both(self, batch: RowBatch, forget_rows: int) -> tuple[Tensor, Tensor]:
        """If one part is not stored, both are run: were they to go apart, so would the policy's passes, and a resumed
        run, for which more is stored, would round otherwise."""
        forget, retain = batch.rows[:forget_rows], batch.rows[forget_rows:]
        logprobs, hidden = (self._read(*part, batch.data.device) for part in (("forget", forget), ("retain", retain)))
        if logprobs is not None and hidden is not None:
            return logprobs.squeeze(1), hidden
        logprobs, hidden = super().answers_of_both(batch, forget_rows)
        return self._kept("forget", forget, logprobs[:, None]).squeeze(1), self._kept("retain", retain, hidden)

    def _holds(self, part: str, rows: Sequence[int]) -> bool:
        return part in self.files and self.files[part].holds(rows)

    def _stored(self, part: str, batch: RowBatch, run: Callable[[], Tensor]) -> Tensor:
        if (stored := self._read(part, batch.rows, batch.data.device)) is not None:
            return stored
        return self._kept(part, batch.rows, run())

    def _read(self, part: str, rows: Sequence[int], device: torch.device) -> Tensor | None:
        if (file := self.files.get(part)) is None:
            return None
        try:
            stored = file.read(rows)
        except OSError as error:
            self._go_on_live(part, error)
            return None
        if stored is None:
            return None
        return (stored.pin_memory() if device.type == "cuda" else stored).to(device, non_blocking=True)

    def _kept(self, part: str, rows: Sequence[int], values: Tensor) -> Tensor:
        """Stores `values` of the rows that are not stored yet; returns what is stored of all, which a resumed run reads
        as well: values that were run again, in another batch, may be rounded otherwise."""
        if (file := self.files.get(part)) is None:
            return values
        try:
            if file.write(rows, values):
                return values
        except OSError as error:
            self._go_on_live(part, error)
        stored = self._read(part, rows, values.device)
        return values if stored is None else stored

    def _go_on_live(self, part: str, error: OSError) -> None:
        path = self.files.pop(part).path
        logger.warning(
            "The reference cache '%s' cannot be used any more (%s): the run continues with the live reference. "
            "What is stored there stays valid.", path, error.strerror or error,
        )  # fmt: skip


def check_cache_space(
    objective: ObjectiveConfig,
    forget: Sequence[TokenizedRow],
    retain: Sequence[TokenizedRow] | None,
    config: PretrainedConfig,
    dtype: torch.dtype,
    directory: Path,
    names: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """A line on how large a run's cache will be. Raises UserError if its disk has no room for it. names: as of
    `CachedReference.open`."""
    sizes, missing = [], 0
    for name, (rows, width, part_dtype) in _parts(objective, forget, retain, config, dtype).items():
        size = sum(map(num_predicted, rows)) * width * part_dtype.itemsize + 8 * len(rows)
        sizes.append(f"{name} {amount(size)}")
        missing += 0 if _path(directory, name, names).exists() else size
    if not sizes:
        return "Reference cache: this objective needs no reference, so nothing is stored."
    if short := shortage(directory, missing):
        takes, has = short
        raise UserError(
            f"The reference cache takes {takes}, the disk of '{directory}' has {has} free: give a --reference-dir on "
            "another disk, or use --reference live."
        )
    return f"Reference cache in {directory}: {', '.join(sizes)}; {amount(missing)} of that is new."


_REMEDY = "remove it, choose another --reference-dir, or use --reference live"


def _path(directory: Path, part: str, names: Mapping[str, str]) -> Path:
    return directory / f"{names.get(part, part)}.safetensors"


def _parts(
    objective: ObjectiveConfig,
    forget: Sequence[TokenizedRow],
    retain: Sequence[TokenizedRow] | None,
    config: PretrainedConfig,
    dtype: torch.dtype,
) -> dict[str, tuple[Sequence[TokenizedRow], int, torch.dtype]]:
    """The files that the objective needs: rows, values per answer token, and their type."""
    parts = {}
    if objective.needs_reference is not None:
        parts["forget"] = forget, 1, torch.float32
    if objective.delta > 0 and retain is not None:
        text = config.get_text_config()
        width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size  # OPT's head is narrower than its layers
        parts["retain"] = retain, width, dtype
    return parts


def _stale(file: AnswerFile, identity: dict[str, str]) -> str | None:
    """Why what is stored in `file` is not what the model of `identity` would compute; None: it is."""
    made_by = file.metadata
    if made_by.get("weights") != identity["weights"]:
        before, now = made_by.get("model"), identity["model"]
        names = f" ('{before}', not '{now}')" if before != now else ": same name, other weights or quantisation"
        return f"was made by another model{names}"
    if made_by.get("rows") != identity["rows"]:
        if made_by.get("tokenizer") != identity["tokenizer"]:
            return "was made with another tokenizer"
        return "was made from other rows (other data, --limit, --template, --max-length or --tokens)"
    return None if file.fits else "holds values of another size or type"
