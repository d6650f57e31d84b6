"""`lowmem-npo demo`: the whole job on a small model, with the gold standard to hold it against."""

from lowmem_npo.demo.recipe import Recipe, Teaching
from lowmem_npo.demo.run import DemoResult, run_demo
from lowmem_npo.demo.verdict import Check, judge

__all__ = ["Check", "DemoResult", "Recipe", "Teaching", "judge", "run_demo"]
