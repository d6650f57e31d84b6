"""Where reference values come from: the original model, which is the policy's own network with its adapters off."""

from lowmem_npo.training.reference.cached import CachedReference, check_cache_space
from lowmem_npo.training.reference.live import LiveReference

__all__ = ["CachedReference", "LiveReference", "check_cache_space"]
