"""Imported first by a benchmark that runs as a script: its imports then come from this checkout, and PyTorch allocates
GPU memory, and libraries are as quiet, as in a run.

Python puts a script's own folder first on sys.path. There kernels.py would pass for the Hugging Face package `kernels`,
which transformers and bitsandbytes look for.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]

from lowmem_npo.libraries import expand_segments, prepare_console  # noqa: E402

prepare_console()
expand_segments()
