"""The config section `progressive_layer_drop`."""

from __future__ import annotations

from pydantic import Field

from ds_core.config.section import Section


class ProgressiveLayerDropSection(Section):
    """Leave out whole blocks at random, the deeper the more often, more as training goes on."""

    enabled: bool = Field(default=False, description="Whether blocks are left out.")
    theta: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of steps in which the deepest block is kept, in the end; 1 keeps all.",
    )
    gamma: float = Field(
        default=0.001,
        ge=0,
        description="How fast it falls from 1 to theta: by exp(-gamma t) after t steps.",
        json_schema_extra={"unit": "1/steps"},
    )
