"""The config section "trace"."""

from __future__ import annotations

from pydantic import Field

from ds_core.config import Section


class TraceSection(Section):
    """A time line of some steps: compute, gathers, reductions and waits of every rank."""

    enabled: bool = Field(
        default=False, description="Whether a window of steps is recorded, once per run."
    )
    start_step: int = Field(
        default=3,
        ge=0,
        description="Steps of this run before the window.",
        json_schema_extra={"unit": "steps"},
    )
    num_steps: int = Field(
        default=2,
        ge=1,
        description="Steps that are recorded.",
        json_schema_extra={"unit": "steps"},
    )
    output_path: str = Field(
        default="trace",
        description="Folder for rank*.json of each rank, and trace.json of all for "
        "ui.perfetto.dev; `ds trace summary` and `ds trace plot` read it.",
    )
    ops: bool = Field(
        default=True,
        description="Whether torch's operations are recorded too, which slows these steps; "
        "without, phases stand for compute.",
    )
    shapes: bool = Field(
        default=False, description="Whether the shapes of their inputs are recorded."
    )
