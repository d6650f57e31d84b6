"""What is minimised: the terms of the loss and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from lowmem_npo.errors import UserError
from lowmem_npo.forget_terms import custom_term, reference_of
from lowmem_npo.ranges import Checked, Count, Finite, Positive, PositiveOrZero, check_fields

FORGET_TERMS = ("npo", "ga", "simnpo", "idk", "wga", "satimp", "jensun", "dpo")  # beside those that others bring
REFUSING_TERMS = ("idk", "jensun")  # which teach --refusal
PREFERRING_TERMS = ("dpo",)  # which prefer another answer to the forgotten one
Normalization = Literal["sequence", "token", "length"]
KLDirection = Literal["policy-reference", "reference-policy"]
ForgetLevel = Literal["none", "holdout"]


def may_prefer(term: str) -> bool:
    """Whether a forget term may look at other answers: one that prefers them, or one that is not ours."""
    return term in PREFERRING_TERMS or term not in FORGET_TERMS


@dataclass
class ObjectiveConfig(Checked):
    """Objective: L = L_forget + gamma * NLL(retain) + delta * KL(retain)."""

    forget_term: str = "npo"
    """npo (Zhang et al. 2024), ga (gradient ascent), simnpo (Fan et al. 2024), idk (NLL of a refusal), wga (weighted
    gradient ascent, Wang et al. 2025), satimp (Yang et al. 2025), jensun (Jensen-Shannon divergence to a refusal, Singh
    et al. 2025), dpo (another answer is preferred, see --alternative-column), or one that an installed package
    brings."""
    beta: Annotated[float, Interval(ge=1e-6, le=1e6)] = 0.5
    """Inverse temperature of npo, simnpo and dpo: smaller is closer to gradient ascent."""
    gamma: PositiveOrZero = 1.0
    """Weight of the retain cross-entropy. 0: not computed."""
    delta: PositiveOrZero = 0.5
    """Weight of the KL to the original model on retain answers, over the whole vocabulary. 0: not computed."""
    normalization: Normalization = "sequence"
    """npo on the sum over the answer's tokens (sequence), on each token (token), or on its mean (length)."""
    kl_direction: KLDirection = "policy-reference"
    """KL(policy || reference), or the reverse as in TOFU and open-unlearning."""
    forget_level: ForgetLevel = "none"
    """holdout: a forget row is pushed no further than a row of the holdout of its rank, by NLL per token under the
    original model. Half of the holdout sets the levels, the other half is what the run is measured by."""
    sam: Positive | None = None
    """Sharpness-aware forgetting (Fan et al. 2025): take the forget gradient at the distance RHO from the weights where
    the forget loss is worst, such as 0.05. A second pass over the forget rows in every step, but for the reference."""
    adversary: Positive | None = None
    """Adversarial forgetting: before each step an attacker, a LoRA of rank 16 on every linear layer, takes one step of
    length RHO, such as 1, to learn six other forget rows again, and the forget term is computed with it in place. A
    pass over six more rows in every step."""
    adversary_steps: Count | None = None
    """How many of these steps an attacker takes, one before each optimiser step, until a fresh one begins (default: 1).
    With more than 1 it is taught rows of one half, and those of the other half are forgotten meanwhile; then the halves
    change places. It costs no further pass; what an attacker has learnt is kept in float32, and in checkpoints. Fewer
    where a run, or a stage of --layered, is too short for two attackers."""
    simnpo_margin: Finite = 0.0
    """Reward margin of simnpo (its paper's gamma)."""
    wga_beta: PositiveOrZero = 1.0
    """wga weighs each token's ascent by its probability to this power: larger spares what is unlikely already."""
    satimp_beta1: PositiveOrZero = 5.0
    """satimp weighs each token's ascent by p^beta1 (1 - p)^beta2: how much it spares what is unlikely already."""
    satimp_beta2: PositiveOrZero = 1.0
    """How much satimp spares what the model is sure of: words that any answer would have there."""

    def __post_init__(self) -> None:
        check_fields(self, ObjectiveConfig)
        custom_term(self.forget_term, FORGET_TERMS)  # raises if there is none
        if self.forget_level != "none" and self.forget_term in REFUSING_TERMS:
            raise UserError(
                f"--forget-level is a level of the forgotten answers, and {self.forget_term} trains on a refusal: "
                "leave one of them out."
            )

    @property
    def needs_retain(self) -> bool:
        """Whether any term looks at retain rows."""
        return self.gamma > 0 or self.delta > 0

    @property
    def needs_reference(self) -> Literal["sequence", "token"] | None:
        """What the forget term needs of the original model: "sequence" (B,) sums, "token" (N,) log-probs, or None."""
        if (custom := custom_term(self.forget_term, FORGET_TERMS)) is not None:
            return reference_of(custom)
        if self.forget_term not in ("npo", "dpo"):
            return None
        return "token" if (self.forget_term, self.normalization) == ("npo", "token") else "sequence"

    @property
    def parts_go_apart(self) -> str | None:
        """Which options keep forget and retain rows from sharing a pass; None: they may, see --joint-pass-tokens."""
        if not self.needs_retain:
            return "--gamma 0 and --delta 0"
        elsewhere = [f"--{name}" for name in ("adversary", "sam") if getattr(self, name) is not None]
        if elsewhere:  # the forget gradient is not taken at the weights
            return " and ".join(elsewhere)
        if (self.needs_reference is None) != (self.delta == 0):  # together, both would run the reference
            return f"--forget-term {self.forget_term} and --delta {self.delta:g}: only one part needs a reference"
        return None

    @property
    def attack_steps(self) -> int:
        """How many steps an attacker takes; 0: there is none."""
        return 0 if self.adversary is None else self.adversary_steps or 1
