"""`--adversary RHO`: the forget term is computed against an attacker who teaches the model other forget rows again.

    min over w of  L_forget(w + a)  +  the retain terms at w,        a = -rho * g / |g|

The attacker is a LoRA adapter of rank `RANK` on every linear layer, with a random A and B = 0, which takes one step: g
is the gradient, with respect to all B together, of the NLL of `ROWS` forget rows that are not in the optimiser step,
and a its step of length rho. What is forgotten only as long as nobody teaches any of it again is no minimum. The
reference of the forget term, and the retain terms, are the model's without the attacker.

With `--adversary-steps` an attacker goes on: it takes such a step before each of several optimiser steps, from where it
stands, while the model moves too. It is taught rows of one half of what is being forgotten, and these steps take rows
of the other (`layered.py`), as whoever relearns a part attacks the rest. It costs no further pass.

Meta-learning against an attacker's fine-tuning steps is that of Tamirisa et al. 2024, "Tamper-Resistant Safeguards for
Open-Weight LLMs", to first order (no gradient passes through the attacker's steps) and with one of them in each
optimiser step, whose length is fixed as in sharpness-aware minimisation (Foret et al. 2021). It costs a forward and
backward pass of `ROWS` rows in every step, and rank `RANK` more of memory: A, and B of one that takes a single step, in
the type in which the model computes; in that pass B and its gradient in float32. B of one that goes on stays so.

The attacker is a function of the seed, the step and the weights: a resumed run meets the same, however a step is split.
One that goes on is kept in checkpoints.
It stands on the layers in hooks, so that whatever runs a layer again (checkpointing, tiles) runs it with the attacker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from lowmem_kernels.dispatch import has_values
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem_npo.data.batching import Batch, Pick, RowBatch
from lowmem_npo.data.tokenized_rows import KnownByIds, TokenizedRow, TokenizedRows
from lowmem_npo.errors import UserError
from lowmem_npo.files import complete
from lowmem_npo.memory.checkpointing import checkpointing, is_checkpointed
from lowmem_npo.model.layers import causal_lm, decoder_layers, linear_layers
from lowmem_npo.run_directory import AdapterFiles
from lowmem_npo.training.step_rows import StepBatches

RANK, ROWS = 16, 6
CHOICE, FACTORS = 7, 8  # streams of random numbers, beside those of layered.py
PARAMETER = "relearning"  # what B is called in a layer while it is learnt


Collate = Callable[[list[tuple[Pick, TokenizedRow]]], Batch]


class Factors(NamedTuple):
    """The attacker's part in one linear layer: B A is added to its weight."""

    layer: nn.Module
    a: Tensor  # (RANK, in) in the type in which the model computes
    b: Tensor  # (out, RANK) likewise; float32 while it is learnt, which may go on


class Lesson(NamedTuple):
    """The rows that the attacker is taught before a step."""

    passes: list[RowBatch]  # this process's share, each no larger than a pass of the step
    tokens: int  # answer tokens of all of them, over all processes

    @classmethod
    def of(
        cls, step_batches: StepBatches, step: int, parts: int, rows: Sequence[TokenizedRow], collate: Collate
    ) -> Lesson:
        """parts: into which a micro-batch is divided. rows: all forget rows, with their true answers. collate: makes a
        batch of some."""
        chosen, processes = other_rows(step_batches, step, rows), step_batches.world_size
        own = np.array_split(chosen, processes)[step_batches.rank]  # whatever the others divide their passes into
        size = math.ceil(step_batches.batch_size / (step_batches.micro_batches * parts * processes))
        shares = np.array_split(own, max(1, math.ceil(len(own) / size)))
        batches = [collate([(Pick("forget", row), rows[row]) for row in share.tolist()])["forget"] for share in shares]
        tokens = RowBatch.of([rows[row] for row in chosen], pack=False).num_answers
        return cls([batch for batch in batches if batch], tokens)


class Adversary:
    """An attacker on `model`, whose step has the length `rho`.

    device: where the model computes. goes_on: whether it may take more than one step.
    """

    def __init__(self, model: PeftModel, rho: float, seed: int, device: torch.device, *, goes_on: bool = False) -> None:
        self.model, self.rho, self.seed, self.device, self.goes_on = model, rho, seed, device, goes_on
        self.factors: list[Factors] = []
        self.began = 0  # the step of the run before which it took its first one
        self.is_summed = False  # whether all processes have waited for a gradient that is not yet made use of
        self._layers = linear_layers(causal_lm(model))
        self._is_away = False

    def relearn(self, step: int, add_gradients: Callable[[], bool], began: int | None = None) -> Tensor:
        """Takes the attacker's step, before global step `step` of the run.

        A gradient that is not finite leaves it where it stands; the loss says so.

        began: the step before which it took its first one. Default: this is the first.
        add_gradients: adds the gradients of the loss that the attacker lowers, over all processes, to those of the
            model's parameters: of these, only the attacker's require any. Returns whether the processes have summed
            them, so that it cannot be repeated.

        Returns:
            () float32: how much lower that loss is at the end of the step, to first order.
        """
        self.began = step if began is None else began
        if self.began == step:
            self.factors = []
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Until its gradient is whole, the attacker is as it was: the step may have to be repeated.
        factors = [Factors(layer, a, nn.Parameter(b)) for layer, a, b in self.factors] or self.fresh(self.began)
        for p in trained:
            p.requires_grad_(False)
        for layer, _, b in factors:
            layer.register_parameter(PARAMETER, cast(nn.Parameter, b))  # tiles ask a module for its parameters
        try:
            with self._acting(factors), _checkpointed_throughout(self.model):
                self.is_summed = add_gradients()
        finally:
            for layer, _, _ in factors:
                delattr(layer, PARAMETER)
            for p in trained:
                p.requires_grad_(True)
        norm = torch.stack([b.grad.square().sum() for _, _, b in factors if b.grad is not None]).sum().sqrt()
        # Where there is no slope, no direction is the worst.
        scale = torch.where(norm.isfinite(), -self.rho / norm.clamp(min=1e-30), 0.0)
        self.factors = []
        while factors:  # what is used up is freed
            layer, a, b = factors.pop(0)
            if b.grad is not None:
                b = b.grad.nan_to_num_(posinf=0.0, neginf=0.0).mul_(scale).add_(b.detach())
            elif not self.goes_on:  # a layer that did not run, such as an expert's: it stays as it is
                continue
            self.factors.append(Factors(layer, a, b.detach() if self.goes_on else b.to(a.dtype)))
        self.is_summed = False
        return self.rho * norm

    def save(self, files: AdapterFiles) -> None:
        """Keeps in a checkpoint what the attacker has learnt."""
        learnt = {name: factor.b.cpu() for name, factor in zip(self._layers, self.factors, strict=True)}
        with complete(files.adversary) as file:
            save_file(learnt, file, metadata={"began": str(self.began)})

    def resume(self, files: AdapterFiles, began: int) -> None:
        """Goes on as in a checkpoint, if that kept the attacker that took its first step before step `began`: another
        has been taught what this one spares."""
        if not files.adversary.exists():
            return
        with safe_open(files.adversary, "pt") as file:
            if int(file.metadata()["began"]) != began:
                return
            self.began = began
            # Into memory of its own: what lies anywhere in a file, a CPU may multiply in another order.
            self.factors = [
                Factors(layer, a, b.detach().copy_(file.get_tensor(name)))
                for name, (layer, a, b) in zip(self._layers, self.fresh(self.began), strict=True)
            ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the attacker is at work in the passes of the model, and has no gradient."""
        with self._acting(self.factors):
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside, even within `in_place`, it is not."""
        self._is_away = True
        try:
            yield
        finally:
            self._is_away = False

    def fresh(self, step: int) -> list[Factors]:
        """One that has learnt nothing: A as PEFT draws it, uniform within 1 / sqrt(in); B = 0."""
        head = causal_lm(self.model).get_output_embeddings().weight
        random, factors = None, []
        if has_values(head):
            seeds = np.random.SeedSequence([self.seed, FACTORS, step]).generate_state(2)
            random = torch.Generator(self.device).manual_seed(int(seeds[0]) << 31 ^ int(seeds[1]))
        for layer in self._layers.values():
            inputs, outputs = _sizes(layer)
            a = torch.empty(RANK, inputs, dtype=head.dtype, device=self.device)
            a.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=random)
            b = nn.Parameter(torch.zeros(outputs, RANK, dtype=torch.float32, device=self.device))
            factors.append(Factors(layer, a, b))
        return factors

    @contextmanager
    def _acting(self, factors: Sequence[Factors]) -> Iterator[None]:
        handles = [layer.register_forward_hook(partial(self._add, a, b)) for layer, a, b in factors]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
        if self._is_away:
            return None
        x: Tensor = args[0]
        return result + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)).to(result.dtype)


def other_rows(step_batches: StepBatches, step: int, rows: Sequence[TokenizedRow] = ()) -> list[int]:
    """The forget rows that the attacker is taught before global step `step`: at most `ROWS`, ascending, of those that
    are being forgotten at that time, none of which is in the step, or in any under the same attacker.

    rows: all of them, with their true answers. Nor, if there are any others, are they rows that share text with these,
    or at least none that say the same.
    """
    spared = set(step_batches.spared(step))
    others = [row for row in step_batches.forgotten(step) if row not in spared]
    if isinstance(rows, TokenizedRows | KnownByIds):
        known = {rows.facts[row] for row in spared}
        others = [row for row in others if rows.facts[row] not in known] or others
        others = [row for row in others if spared.isdisjoint(rows.near.get(row, ()))] or others
    random = np.random.default_rng([step_batches.seed, CHOICE, step])
    return sorted(random.permutation(others)[:ROWS].tolist())


def attacker_size(model: PeftModel) -> int:
    """How many weights of an attacker on `model` a checkpoint holds."""
    return sum(RANK * _sizes(layer)[1] for layer in linear_layers(causal_lm(model)).values())


def check_others(
    forget_rows: int, folds: Sequence[Sequence[int]] | None, batch_size: int, attack_steps: int = 1
) -> None:
    """Raises a UserError where a step takes all rows that are being forgotten, so that none is left to be taught; where
    an attacker goes on for several, all of the half that is its."""
    stages = len(folds) if folds else 1
    least, first = (min(map(len, folds)), len(folds[0])) if folds else (forget_rows, forget_rows)

    def advice(most: int, otherwise: str) -> str:
        """most: how many rows a step may take."""
        ways = [f"lower --batch-size to {most}{' or less' if most > 1 else ''}"] if most else []
        ways += ["lower --layered"] if stages > 2 else ["do without --layered"] if stages == 2 else []
        return _advice(*(ways or ["name more rows"]), otherwise)

    if attack_steps > 1 and first > 1 and least // 2 < batch_size:
        rows = f"forget rows in the smallest fold of --layered {stages}" if folds else "forget rows"
        otherwise = "give --adversary-steps 1" if first > batch_size else "forget without an attacker"
        raise UserError(
            "--adversary-steps forgets one half while the other is taught, and a step takes more rows than that: "
            f"--batch-size {batch_size}, {rows}: {least}. {advice(least // 2, otherwise)}"
        )
    if first <= batch_size:
        rows = f"forget rows in the first fold of --layered {stages}" if folds else "forget rows"
        raise UserError(
            f"--adversary teaches forget rows that are not in the step, and there are none: --batch-size {batch_size}, "
            f"{rows}: {first}. {advice(first - 1, 'forget without an attacker')}"
        )


def _advice(*ways: str) -> str:
    """A sentence that names them; two at least."""
    text = f"{', '.join(ways[:-1])}, or {ways[-1]}."
    return text[0].upper() + text[1:]


def _sizes(layer: Any) -> tuple[int, int]:
    """The inputs and outputs of a linear layer, with or without an adapter, whatever its weight is stored as."""
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def _checkpointed_throughout(model: PeftModel) -> Any:
    """Inside, where layers are recomputed, so are those below the lowest adapter: the attacker needs their gradient."""
    lm = causal_lm(model)
    return checkpointing(lm) if any(map(is_checkpointed, decoder_layers(lm))) else nullcontext()
