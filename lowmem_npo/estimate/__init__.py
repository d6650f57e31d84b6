"""How much memory a run will take, and which settings make it fit, before anything is loaded."""

from lowmem_npo.estimate.budget import Fit, fit_budget
from lowmem_npo.estimate.step import KINDS, Estimate, StepRows, estimate

__all__ = ["KINDS", "Estimate", "Fit", "StepRows", "estimate", "fit_budget"]
