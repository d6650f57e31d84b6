"""What benchmarks and leak tests must declare."""

import pytest

from lowmem_npo.evaluation.benchmarks.contract import Benchmark
from lowmem_npo.evaluation.leaks.contract import LeakTest


def test_a_class_that_leaves_something_open_fails_where_it_is_defined():
    """Not when somebody asks for help, or a report is written."""
    with pytest.raises(TypeError, match="Short has no title and no summary, which Benchmark requires"):

        class Short(Benchmark):
            name = group = "short"

    with pytest.raises(TypeError, match="Silent has no summary and no options and no figures, which LeakTest requires"):

        class Silent(LeakTest):
            name = "silent"
