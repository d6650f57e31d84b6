"""The adapter: its size, and the layers that get one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from lowmem_npo.errors import UserError
from lowmem_npo.ranges import Checked, Positive, Probability


@dataclass
class AdapterConfig(Checked):
    """Adapter: the LoRA weights, the only ones that are trained."""

    adapter: str | None = None
    """Directory of an adapter to go on from: a second request to forget. The original model is then the base with that
    adapter, and the one that is saved holds both. Without --model, the base is the one that it was trained on."""
    any_base: bool = False
    """Accept an --adapter of another base model, or of one that is not known to have the same weights."""
    lora_r: Annotated[int, Interval(ge=1, le=2**16)] = 5
    """Rank."""
    lora_alpha: Positive = 5.0
    """Scale: the update is multiplied by alpha / r."""
    lora_dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter, or all-linear, or one regular expression that the full names
    match, such as '.*layers\\.[0-7]\\..*_proj'."""
    lora_layers: tuple[str, ...] = ()
    """Decoder layers, counted from 0, that get an adapter, such as 16-31 or 0 4 8-11. Default: all. Layers below the
    lowest of them need no gradient and run once for policy and reference together."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: the update is multiplied by alpha / sqrt(r)."""
    use_dora: bool = False
    """DoRA: the magnitude of each row of a weight is trained beside its direction. Takes more memory."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained whole, in float32, such as norm; any but the output head."""

    def __post_init__(self) -> None:
        self.lora_targets = (self.lora_targets,) if isinstance(self.lora_targets, str) else tuple(self.lora_targets)
        layers = (self.lora_layers,) if isinstance(self.lora_layers, (str, int)) else self.lora_layers
        self.lora_layers = tuple(str(layer) for layer in layers)
        saved = self.modules_to_save
        self.modules_to_save = (saved,) if isinstance(saved, str) else tuple(saved)
        super().__post_init__()
        _ = self.layers  # malformed ones raise here
        if not self.lora_targets:
            raise UserError("--lora-targets is empty: name at least one linear layer, or all-linear.")
        if self.target_pattern is not None and self.lora_layers:
            raise UserError("--lora-layers goes with names: write the layers into the pattern of --lora-targets.")
        if self.adapter is not None and self.use_dora:
            raise UserError(
                "--use-dora scales the base's own weights, to which --adapter has added: merge that adapter "
                "(`lowmem-npo merge`), and train on the merged model."
            )
        if self.any_base and self.adapter is None:
            raise UserError("--any-base is about the base of an --adapter: give both, or none.")

    @property
    def may_name_layers(self) -> bool:
        """Whether what is adapted may depend on the number of layers."""
        return bool(self.lora_layers or self.target_pattern or self.modules_to_save or self.adapter)

    @property
    def target_pattern(self) -> str | None:
        """`lora_targets`, if it is a regular expression: what no name of a module can be."""
        patterns = [target for target in self.lora_targets if not re.fullmatch(r"[\w.-]+", target)]
        if not patterns:
            return None
        if len(self.lora_targets) > 1:
            raise UserError(f"--lora-targets {patterns[0]}: a regular expression stands alone; alternatives are (a|b).")
        try:
            re.compile(patterns[0])
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"--lora-targets {patterns[0][:200]} is no regular expression: {error}.") from error
        return patterns[0]

    @property
    def layers(self) -> list[int] | None:
        """`lora_layers` as numbers, each once, lowest first; None: all."""
        numbers: set[int] = set()
        for spec in (part for given in self.lora_layers for part in given.replace(",", " ").split()):
            first, dash, last = spec.partition("-")
            last = last if dash else first
            if not (re.fullmatch(r"\d{1,4}", first) and re.fullmatch(r"\d{1,4}", last) and int(first) <= int(last)):
                raise UserError(f"--lora-layers {spec}: give layer numbers from 0, or ranges such as 16-31.")
            numbers.update(range(int(first), int(last) + 1))
        return sorted(numbers) or None
