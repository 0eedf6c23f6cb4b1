"""The config section `eigenvalue`."""

from __future__ import annotations

from pydantic import Field

from ds_core.config import Section


class EigenvalueSection(Section):
    """Watches the sharpest curvature of the loss, block by block, while training."""

    enabled: bool = Field(default=False, description="Whether eigenvalues are measured.")
    verbose: bool = Field(
        default=False, description="Whether each value is also logged, at level INFO."
    )
    max_iter: int = Field(
        default=100,
        ge=1,
        description="Iterations per block at most; each costs about one backward.",
    )
    tol: float = Field(
        default=1e-2, gt=0, description="Relative change of a value at which it has converged."
    )
    stability: float = Field(
        default=1e-6, ge=0, description="Added to lengths that are divided by."
    )
    gas_boundary_resolution: int = Field(
        default=1,
        ge=1,
        description="Optimizer steps between two measurements.",
        json_schema_extra={"unit": "steps"},
    )
    layer_name: str | None = Field(
        default=None,
        description="Qualified name of the list of blocks, such as bert.encoder.layer; null: the "
        "model's repeated blocks.",
    )
    layer_num: int = Field(
        default=0, ge=0, description="How many of the blocks, from the first; 0: all."
    )
