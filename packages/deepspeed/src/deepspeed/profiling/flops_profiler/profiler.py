"""The names of deepspeed.profiling.flops_profiler again, where the original defines them."""

from __future__ import annotations

from deepspeed._names import names_of
from deepspeed.profiling.flops_profiler._table import HOMES, MISSING

__getattr__, __dir__ = names_of(__name__, HOMES, missing=MISSING)
