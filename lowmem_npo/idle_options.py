"""Options that a run leaves unused, because what would use them is off: each is said in a sentence."""

from __future__ import annotations

from dataclasses import fields

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


def concerns(option: str, term: str | None) -> bool:
    """Whether a forget term uses an option."""
    return term not in FORGET_TERMS or term in OF_TERMS.get(option, FORGET_TERMS)


def remarks_on_idle_options(config: RunConfig) -> list[str]:
    """A line for each option that has another value than its default, which makes no difference in this run."""
    term, data, training = config.objective.forget_term, config.data, config.training
    joint, apart = config.memory.joint_pass_tokens, config.objective.parts_go_apart
    idle = {name: f"--forget-term {term}" for name in OF_TERMS if not concerns(name, term)} | {
        name: without
        for name, without, used in (
            ("group_column", "no --layered", training.layered is not None),
            ("layered_weight", "no --layered", training.layered is not None),
            ("adversary_steps", "no --adversary", config.objective.adversary is not None),
            ("kl_direction", "--delta 0", config.objective.delta > 0),
            ("joint_pass_tokens", apart, joint == 0 or apart is None),
            ("retain_batch_size", "--gamma 0 and --delta 0", config.objective.needs_retain),
            ("answer_column", "no --forget, whose bundled rows have columns of their own", data.forget is not None),
            ("prompt_column", "no --forget, whose bundled rows have columns of their own", data.forget is not None),
        )
        if not used
    }
    sections = [getattr(config, name) for name in SECTIONS]
    given = {f.name for section in sections for f in fields(section) if getattr(section, f.name) != f.default}
    return [f"--{name.replace('_', '-')} has no effect with {why}." for name, why in idle.items() if name in given]
