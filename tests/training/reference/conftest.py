from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import pytest


@pytest.fixture
def files_no_larger_than():
    """A context manager: a real limit of the operating system on the size of files that this process writes, beyond
    which writing fails as on a full disk."""
    return _files_no_larger_than


@contextlib.contextmanager
def _files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
