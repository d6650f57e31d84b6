"""`--recipe`: options that belong together, under one name. An option that is given itself wins.

What a recipe is made of is measured (docs/options.md); it names only options whose defaults are the paper's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from lowmem_npo.config import SECTIONS, RunConfig
from lowmem_npo.errors import UserError

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults
    "lasting": {
        "layered": 2,
        "adversary": 1.0,
        "adversary_steps": 20,
        "lora_targets": ("all-linear",),
        "lora_r": 16,
        "lora_alpha": 64.0,
    },
}
OPTIONS = tuple(dict.fromkeys(name for recipe in RECIPES.values() for name in recipe))
# Option -> its section, and its default.
PLACES = {f.name: (section, f.default) for section, kind in SECTIONS.items() for f in fields(kind)}


def with_recipe(config: RunConfig) -> RunConfig:
    """`config` with the options of its recipe, but for those that were given or have another value than the default.

    Raises:
        UserError: an option of the recipe does not go with the others.
    """
    recipe = config.training.recipe
    for name, value in RECIPES[recipe].items():
        section, default = PLACES[name]
        options = getattr(config, section)
        if name in config.explicit or getattr(options, name) != default or _is_idle(name, config):
            continue
        with named_in_errors(config):
            config = replace(config, **{section: replace(options, **{name: value})})
    return config


@contextmanager
def named_in_errors(config: RunConfig) -> Iterator[None]:
    """Inside, an error about an option that nobody gave, because the recipe sets it, names the recipe."""
    recipe = config.training.recipe
    try:
        yield
    except UserError as error:
        ours = "|".join(name.replace("_", "-") for name in RECIPES[recipe] if name not in config.explicit)
        if ours and re.search(rf"--({ours})(?![\w-])", str(error)):
            raise UserError(f"--recipe {recipe}: {error}") from error
        raise


def remark(config: RunConfig) -> str | None:
    """A line on what the recipe has set, and on the given options that win over it; None if it says nothing."""
    recipe = config.training.recipe
    values = {name: getattr(getattr(config, PLACES[name][0]), name) for name in OPTIONS if not _is_idle(name, config)}
    ours = {name: value_in(recipe, name) for name in values}
    kept = [_flag(name, value) for name, value in ours.items() if value == values[name] and name in RECIPES[recipe]]
    given = [_flag(name, value) for name, value in values.items() if value != ours[name]]
    if not kept and not (given and "recipe" in config.explicit):
        return None
    text = f"Recipe {recipe}: {' '.join(kept) or ('nothing' if RECIPES[recipe] else 'the defaults')}"
    return f"{text}; {' '.join(given)} as given, which wins." if given else f"{text}."


def value_in(recipe: str, name: str) -> Any:
    """What one of `OPTIONS` is under a recipe, if nobody gives it."""
    return RECIPES[recipe].get(name, PLACES[name][1])


def _flag(name: str, value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) else " ".join(value) if isinstance(value, tuple) else value
    flag = f"--{name.replace('_', '-')}"
    return f"no {flag}" if value is None else f"{flag} {shown}"


def _is_idle(name: str, config: RunConfig) -> bool:
    """Whether nothing would use the option, because another one is switched off."""
    return name == "adversary_steps" and config.objective.adversary is None
