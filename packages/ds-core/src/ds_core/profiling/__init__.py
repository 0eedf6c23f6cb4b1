"""Floating-point operations, parameters and times of a model, module by module.

from ds_core.profiling import FlopsProfiler, get_model_profile

flops, macs, params = get_model_profile(model, (1, 3, 224, 224), as_string=False)

with FlopsProfiler(model) as profiler:
    loss_of(model(batch)).backward()
print(profiler.profile().text())
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core._lazy import lazy_names

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
    "FlopsProfiler": "profiler",
    "ModuleProfile": "profile",
    "Phase": "calls",
    "Profile": "profile",
    "get_model_profile": "model_profile",
    "profile_model": "model_profile",
}

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
