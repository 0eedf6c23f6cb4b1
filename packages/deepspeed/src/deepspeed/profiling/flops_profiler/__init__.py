"""The FLOPS profiler by the original's methods."""

from __future__ import annotations

from deepspeed._names import names_of
from deepspeed.profiling.flops_profiler._table import HOMES, MISSING

__getattr__, __dir__ = names_of(__name__, HOMES, submodules=("profiler",), missing=MISSING)
