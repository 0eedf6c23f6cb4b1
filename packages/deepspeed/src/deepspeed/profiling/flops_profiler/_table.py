"""Where the names of this package live."""

from __future__ import annotations

_HERE = "deepspeed.profiling.flops_profiler._profiler"

HOMES = {
    "get_model_profile": "ds_core.profiling:get_model_profile",
    **{
        name: f"{_HERE}:{name}"
        for name in (
            *("FlopsProfiler", "number_to_string", "flops_to_string", "macs_to_string"),
            *("bytes_to_string", "params_to_string", "duration_to_string"),
        )
    },
}

MISSING = dict.fromkeys(
    ("get_module_flops", "get_module_macs", "get_module_duration", "wrapFunc"),
    "use FlopsProfiler(model).profile, whose modules have their figures",
)
