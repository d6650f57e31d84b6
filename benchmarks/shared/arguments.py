"""Numbers of a command line that can be meant."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """At least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def minutes(text: str) -> float:
    """At least 0, in which nothing more begins."""
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{number:g} is not at least 0")
    return number
