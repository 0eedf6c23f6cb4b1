"""Operations, parameters and times of a model, on ds_core.profiling."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(__name__, {}, submodules=("flops_profiler",))
