"""The benchmarks: a set of rows goes to the first that recognises it, so the one for any rows is the last to try."""

from __future__ import annotations

from lowmem_npo.evaluation.benchmarks.contract import Benchmark
from lowmem_npo.evaluation.benchmarks.documents import DOCUMENTS
from lowmem_npo.evaluation.benchmarks.lm_eval import LM_EVAL
from lowmem_npo.evaluation.benchmarks.lume import LUME
from lowmem_npo.evaluation.benchmarks.muse import MUSE
from lowmem_npo.evaluation.benchmarks.plain import PLAIN
from lowmem_npo.evaluation.benchmarks.tofu import TOFU
from lowmem_npo.evaluation.options import combined

BENCHMARKS: tuple[Benchmark, ...] = (LUME, TOFU, MUSE, DOCUMENTS, LM_EVAL, PLAIN)

# The options of all benchmarks; what `lowmem-npo evaluate` has of them.
BenchmarkOptions = combined("BenchmarkOptions", (benchmark.options for benchmark in BENCHMARKS))
