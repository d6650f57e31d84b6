"""Forget terms that others bring, beside those of training/objective.py, by name.

They are functions `term(objective, policy, reference, totals)` that return the term's share of the step's loss, as
`lowmem_npo.training.objective.forget_loss` does. An attribute `needs_reference` of the function says what it wants of
the original model: "sequence" (the default), "token", or None.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.metadata import entry_points
from typing import Any

from lowmem_npo.errors import UserError

GROUP = "lowmem_npo.forget_terms"  # of the entry points that installed packages declare
REFERENCES = ("sequence", "token", None)

Term = Callable[[Any, Any, Any, Any], Any]
_registered: dict[str, Term] = {}


def register(term: Term, built_in: Collection[str]) -> str:
    """Makes `term` known in this process, by its own name, which is returned.

    Raises:
        UserError: not a function with a name of its own, or with an unknown `needs_reference`.
    """
    name = getattr(term, "__name__", "")
    if not callable(term) or not name.isidentifier() or name in built_in:
        raise UserError(f"forget_term is {term!r}: give a function with a name of its own, not {', '.join(built_in)}.")
    if reference_of(term) not in REFERENCES:
        raise UserError(f"{name}.needs_reference is {reference_of(term)!r}; it must be one of {REFERENCES}.")
    _registered[name] = term
    return name


def custom_term(name: str, built_in: Collection[str]) -> Term | None:
    """The function that others bring under this name; None for one of `built_in`.

    Raises:
        UserError: there is no such term, or its package cannot be imported.
    """
    if name in built_in:
        return None
    if name not in _registered:
        installed = {point.name: point for point in entry_points(group=GROUP)}
        if name not in installed:
            known = ", ".join([*built_in, *_registered, *installed])
            raise UserError(f"--forget-term must be one of {known}, not {name!r}.")
        try:
            _registered[name] = installed[name].load()
        except Exception as error:  # whatever another package raises
            raise UserError(f"--forget-term {name}: {installed[name].value} cannot be imported: {error}.") from error
    return _registered[name]


def reference_of(term: Term) -> Any:
    """What `term` wants of the original model."""
    return getattr(term, "needs_reference", "sequence")
