"""How a command talks to its user: through a function that takes a line, `print` unless somebody listens otherwise."""

from collections.abc import Callable

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Says nothing: for processes beside the main one."""
