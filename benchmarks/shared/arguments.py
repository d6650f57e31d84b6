"""What the benchmarks' options accept."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """At least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def minutes(text: str) -> float:
    """At least 0; nothing more begins after that many."""
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{number:g} is not at least 0")
    return number


def bundled_model(text: str) -> str:
    """A model whose configuration is bundled."""
    from lowmem_npo.commands.wording import one_of  # late: the kernels' benchmark needs no PEFT
    from lowmem_npo.model.known_configs import known_config, known_names

    if known_config(text) is None:
        raise argparse.ArgumentTypeError(one_of("it", text, known_names()))
    return text


def bundled_or_small(text: str) -> str:
    """The same, or "small", with which a benchmark is tried on a CPU."""
    return text if text == "small" else bundled_model(text)
