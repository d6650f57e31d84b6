"""Options that a run leaves unused, because what would use them is off: each is said in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from lowmem_npo.config import FORGET_TERMS, PREFERRING_TERMS, REFUSING_TERMS, SECTIONS, RunConfig

# Option -> the forget terms that use it. One that an installed package brings may use any.
OF_TERMS = {
    "refusal": REFUSING_TERMS,
    "alternative_column": PREFERRING_TERMS,
    "alternatives": PREFERRING_TERMS,
    "beta": ("npo", "simnpo", "dpo"),
    "normalization": ("npo",),
    "simnpo_margin": ("simnpo",),
    "wga_beta": ("wga",),
    "satimp_beta1": ("satimp",),
    "satimp_beta2": ("satimp",),
}


def idle_options(settings: Mapping[str, Any]) -> dict[str, str]:
    """Options that make no difference to an adapter, by the settings of its run, as run.yaml holds them; and without
    what each of them has none."""
    term, gamma, delta = (settings.get(name) for name in ("forget_term", "gamma", "delta"))
    of_terms = OF_TERMS if term in FORGET_TERMS else {}
    idle = {name: f"--forget-term {term}" for name, terms in of_terms.items() if term not in terms}
    if settings.get("layered") is None:
        idle |= {"layered_weight": "no --layered", "group_column": "no --layered, but on the p-values of leak tests"}
    elif settings["layered"] == 2:
        idle["layered_weight"] = "--layered 2, whose second stage is the last, which shows all rows alike"
    if settings.get("adversary") is None:
        idle["adversary_steps"] = "no --adversary"
    if not settings.get("qlora"):
        idle["double_quant"] = "no --qlora"
    if not delta:
        idle["kl_direction"] = "--delta 0"
    if not (gamma or delta):
        idle["retain_batch_size"] = "--gamma 0 and --delta 0"
    if settings.get("forget") is None:
        own = "no --forget, whose bundled rows have columns of their own"
        idle |= dict.fromkeys(("answer_column", "prompt_column"), own)
    return idle


def idle_in(config: RunConfig) -> dict[str, str]:
    """The same of a run, and the options of how it is computed that make no difference to that."""
    apart = config.objective.parts_go_apart
    return idle_options(config.flat()) | ({} if apart is None else {"joint_pass_tokens": apart})


def without_idle_options(config: RunConfig) -> RunConfig:
    """The same run, with the defaults of the options that make no difference in it."""
    idle = idle_in(config)
    for section in SECTIONS:
        options = getattr(config, section)
        defaults = {f.name: f.default for f in fields(options) if f.name in idle}
        config = replace(config, **{section: replace(options, **defaults)})
    return config


def remarks_on_idle_options(config: RunConfig) -> list[str]:
    """A line for each option that has another value than its default, which makes no difference in this run."""
    idle = idle_in(config)
    if config.memory.joint_pass_tokens == 0:  # which asks for what there is
        idle.pop("joint_pass_tokens", None)
    idle.pop("group_column", None)  # p-values go by it, be they of the adapter's `evaluate`
    if config.model.double_quant == "on":  # which auto becomes, whatever the weights are
        idle.pop("double_quant", None)
    sections = [getattr(config, name) for name in SECTIONS]
    given = {f.name for section in sections for f in fields(section) if getattr(section, f.name) != f.default}
    return [f"--{name.replace('_', '-')} has no effect with {why}." for name, why in idle.items() if name in given]
