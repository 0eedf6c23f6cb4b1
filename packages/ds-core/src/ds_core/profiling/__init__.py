"""Floating-point operations, parameters and times of a model, module by module.

from ds_core.profiling import FlopsProfiler, get_model_profile

flops, macs, params = get_model_profile(model, (1, 3, 224, 224), as_string=False)

with FlopsProfiler(model) as profiler:
    loss_of(model(batch)).backward()
print(profiler.profile().text())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_core.profiling.calls import Phase
    from ds_core.profiling.model_profile import get_model_profile, profile_model
    from ds_core.profiling.profile import ModuleProfile, Profile
    from ds_core.profiling.profiler import FlopsProfiler

__all__ = [
    "FlopsProfiler",
    "ModuleProfile",
    "Phase",
    "Profile",
    "get_model_profile",
    "profile_model",
]

# Reading a config imports the section beside these, and must stay light.
_LAZY = {
    "FlopsProfiler": "ds_core.profiling.profiler",
    "ModuleProfile": "ds_core.profiling.profile",
    "Phase": "ds_core.profiling.calls",
    "Profile": "ds_core.profiling.profile",
    "get_model_profile": "ds_core.profiling.model_profile",
    "profile_model": "ds_core.profiling.model_profile",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
