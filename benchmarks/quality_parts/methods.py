"""What is compared: ways to forget, each as the flags of `lowmem-npo train` beside those that all of them share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """title: in tables. flags: of `lowmem-npo train`; they come last, so they win over those that all share.

    two_models: trained by the plain form instead, whose reference is a second model, on full logits.
    """

    title: str
    flags: tuple[str, ...] = ()
    two_models: bool = False


def method(title: str, flags: str = "", **more: bool) -> Method:
    return Method(title, tuple(flags.split()), **more)


RECIPE = "--layered 2 --adversary 1 --adversary-steps 20 --lora-alpha 64"  # lasting's, beside what all share
LASTING = {
    "npo": method("NPO"),
    "layered": method("layered, 3 folds", "--layered 3"),
    "layered-sam": method("layered, 3 folds, SAM 0.05", "--layered 3 --sam 0.05"),
    "layered-adversary": method("layered, 3 folds, adversary 1", "--layered 3 --adversary 1"),
    "adversary-20": method(
        "layered, 2 folds, adversary 1 of 20 steps", "--layered 2 --adversary 1 --adversary-steps 20"
    ),
    "npo-alpha-64": method("NPO, LoRA α 64", "--lora-alpha 64"),
    "lasting": method("lasting: 2 folds, adversary 1 of 20 steps, LoRA α 64", RECIPE),
    "lasting-gamma-2": method("lasting, γ 2, δ 1", f"{RECIPE} --gamma 2 --delta 1"),
    "level": method("NPO to the level of the holdout", "--forget-level holdout"),
    "layered-level": method("layered, 3 folds, to the level of the holdout", "--layered 3 --forget-level holdout"),
}
LONGER = {
    "npo-20-epochs": method("NPO, 20 epochs", "--epochs 20"),
    "lasting-20-epochs": method("lasting, 20 epochs", f"{RECIPE} --epochs 20"),
}  # as many as are the default, on a real model
PAPER = {
    f"gamma-{gamma:g}-delta-{delta:g}": method(f"NPO, γ {gamma:g}, δ {delta:g}", f"--gamma {gamma} --delta {delta}")
    for gamma, delta in ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
}  # of the paper's four, the one with δ 0.5 is `npo`
BASELINES = {
    "ga": method("GA", "--forget-term ga --gamma 0 --delta 0"),
    "gd": method("GD: GA + retain CE", "--forget-term ga --gamma 1 --delta 0"),
    "kl-min": method("KL-min: GA + retain KL", "--forget-term ga --gamma 0 --delta 1 --kl-direction reference-policy"),
    "npo-two-models": method("NPO + CE + KL, two models, full logits", two_models=True),
    "simnpo": method("SimNPO + retain CE", "--forget-term simnpo --beta 2.5 --gamma 1 --delta 0"),
    "idk": method("IDK: NLL of a refusal + retain CE", "--forget-term idk --gamma 1 --delta 0"),
    "dpo": method(
        "DPO, the refusal preferred, + retain CE", "--forget-term dpo --alternative-column refusal --gamma 1 --delta 0"
    ),
    "npo": method("ours: NPO + CE + KL, one model, fused"),
}
