"""The config section `activation_checkpointing`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ds_core.config import Section
from ds_core.config.section import Only, refusal


class ActivationCheckpointingSection(Section):
    """Which blocks of the model are computed again in backward, and how.

    A model that calls `checkpoint` in its own forward needs none of this.
    """

    blocks: Literal["repeated"] | tuple[str, ...] | None = Field(
        default=None,
        description='"repeated": the blocks of the model\'s repeated stacks; or patterns of '
        'qualified names, such as ["encoder.layers.*"]; null: none, unless number_checkpoints is '
        "given.",
    )
    number_checkpoints: int | None = Field(
        default=None,
        ge=1,
        description="How many of the blocks, spread evenly; null, or more than there are: all.",
    )
    cpu_checkpointing: bool = Field(
        default=False,
        description="Whether the inputs of the blocks wait in host memory. The copies do not "
        "overlap with compute.",
    )
    synchronize_checkpoint_boundary: bool = Field(
        default=False, description="Whether the device is waited for before and after each block."
    )
    partition_activations: Annotated[
        bool,
        Only(
            False,
            because="it splits inputs of blocks over tensor-parallel ranks, which ds-pipe will "
            "bring; use cpu_checkpointing to hold less on the device",
        ),
    ] = Field(default=False, description="Only false: every rank keeps its own inputs of blocks.")
    contiguous_memory_optimization: Annotated[
        bool,
        Only(
            False,
            because="torch's allocator does this for all memory: set "
            "PYTORCH_ALLOC_CONF=expandable_segments:True",
        ),
    ] = Field(default=False, description="Only false: the allocator avoids fragments.")
    profile: Annotated[
        bool,
        Only(
            False,
            because='"flops_profiler" shows forward, recomputation and backward of every module',
        ),
    ] = Field(default=False, description="Only false: the FLOPS profiler tells it.")

    @property
    def asks(self) -> bool:
        """Whether blocks are to be changed."""
        return bool(self.blocks) or self.number_checkpoints is not None

    @model_validator(mode="after")
    def _has_blocks(self) -> Self:
        for key in ("cpu_checkpointing", "synchronize_checkpoint_boundary"):
            if getattr(self, key) and not self.asks:
                raise refusal(
                    f'{key}: got true, but no blocks are chosen: add "blocks": "repeated" (what a '
                    f"model checkpoints in its own forward is set there, with "
                    f"ds_core.activation_checkpointing.Policy)"
                )
        return self
