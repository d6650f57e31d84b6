"""Whether an earlier evaluation is of the model that its figures stand for, by what the settings.json of both hold.

An adapter is compared with its base, which is known by its weights. A merged model has others than it had before, and a
gold model has others, too: of those only architecture and size can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem_npo.evaluation.comparing import changed
from lowmem_npo.evaluation.directory import THE_ADAPTER, THE_BASE, THE_SIZE


def another_base(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Both models in words, where an adapter is evaluated now and its base is known to be another model than the one
    measured earlier; else None."""
    digests = now.get("digests", {})
    if THE_ADAPTER not in digests or not (changed(THE_BASE, earlier, digests) or another_size(earlier, now)):
        return None
    return _both(earlier, now)


def another_size(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Both models in words, where they are known to be of other architectures or sizes; else None."""
    return _both(earlier, now) if changed(THE_SIZE, earlier, now.get("digests", {})) else None


def _both(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{_named(earlier)}, and here it is {_named(now)}"


def _named(settings: Mapping[str, Any]) -> str:
    """A model by its name, or by that of the adapter on it, and by its size where that was recorded."""
    name, adapter, size = settings.get("model"), settings.get("adapter"), settings.get("digests", {}).get(THE_SIZE)
    named = f"'{name}'" if name else f"the base of '{adapter}'" if adapter else "a model without a name"
    return f"{named} ({size})" if size else named
