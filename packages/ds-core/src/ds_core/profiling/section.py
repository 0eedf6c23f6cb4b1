"""The config section `flops_profiler`."""

from __future__ import annotations

from pydantic import Field

from ds_core.config import Section


class FlopsProfilerSection(Section):
    """Counts the operations of one training step, module by module."""

    enabled: bool = Field(default=False, description="Whether a step is profiled.")
    recompute_fwd_factor: float = Field(
        default=0.0,
        ge=0,
        description="Makes no difference: recomputed forwards are counted as they happen.",
    )
    profile_step: int = Field(
        default=1,
        ge=0,
        description="Optimizer steps before the one that is profiled. The one after it is timed "
        "without the profiler, for the operations per second.",
        json_schema_extra={"unit": "steps"},
    )
    module_depth: int = Field(
        default=-1, ge=-1, description="Deepest level of modules that is shown; -1 shows all."
    )
    top_modules: int = Field(
        default=1, ge=0, description="How many of the largest modules of each level are named."
    )
    detailed: bool = Field(default=True, description="Whether the tree of all modules is shown.")
    output_file: str | None = Field(
        default=None,
        description="File that gets the report; null: rank 0 writes it to standard error.",
    )
