"""What the benchmarks' options accept."""

from __future__ import annotations

import argparse
import difflib


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
    from lowmem_npo.model.known_configs import known_config, known_names  # late: the kernels' benchmark needs no PEFT

    if known_config(text) is None:
        near = difflib.get_close_matches(text, known_names(), n=1)
        meant = f"; did you mean {near[0]}?" if near else f": {', '.join(known_names())}"
        raise argparse.ArgumentTypeError(f"no configuration of {text} is bundled{meant}")
    return text


def bundled_or_small(text: str) -> str:
    """The same, or "small", with which a benchmark is tried on a CPU."""
    return text if text == "small" else bundled_model(text)
