"""Leak tests: what a model that has forgotten may still give away, without a retrained model to compare it with.

    extraction    how much of the answers greedy decoding still writes
    sampling      how much of them comes in the best of several samples
    membership    whether their likelihoods tell that they were once taught
    relearning    how fast the rest comes back when a few of them are taught again
    quantization  whether they return when the adapter is merged, or the weights are rounded to 4 bits

Each is one file; its result is a dict of figures with `meaning`, one sentence, and `leaks`: True, False, or None where
that cannot be told.
"""

from lowmem_npo.evaluation.leaks.measure import IN_MEMORY, TESTS, measure_leaks

__all__ = ["IN_MEMORY", "TESTS", "measure_leaks"]
