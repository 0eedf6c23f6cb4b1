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

    blocks: Literal["repeated", "own"] | tuple[str, ...] | None = Field(
        default=None,
        description='"repeated": the blocks of the model\'s repeated stacks; or patterns of '
        'qualified names, such as ["encoder.layers.*"]; "own": the layers that a model of '
        "transformers checkpoints itself, whose inputs are then stored as the other keys say; "
        "null: none, unless number_checkpoints is given.",
    )
    number_checkpoints: int | None = Field(
        default=None,
        ge=1,
        description="How many of the blocks, spread evenly; null, or more than there are: all.",
    )
    cpu_checkpointing: bool = Field(
        default=False,
        description="Whether the inputs of the blocks wait in pinned host memory, copied while "
        "blocks are computed, and brought back one block ahead; on a CPU they are there already.",
    )
    synchronize_checkpoint_boundary: bool = Field(
        default=False, description="Whether the device is waited for before and after each block."
    )
    partition_activations: bool = Field(
        default=False,
        description="Whether each rank of the mesh's tp axis keeps 1/N of the inputs of the "
        "blocks, which must be the same on all of them; gathered before a block is computed again. "
        "With one rank along tp it makes no difference, and a warning says so.",
    )
    contiguous_memory_optimization: bool = Field(
        default=False,
        description="Whether the parts that partition_activations keeps on the device lie in "
        "buffers that are used from step to step, so that they do not scatter its free memory.",
    )
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
        keys = ("cpu_checkpointing", "partition_activations", "synchronize_checkpoint_boundary")
        for key in keys:
            if getattr(self, key) and not self.asks:
                raise refusal(
                    f'{key}: got true, but no blocks are chosen: add "blocks": "repeated", or '
                    f'"own" for a model of transformers that checkpoints by itself (what a model '
                    f"checkpoints in its own forward is set there, with "
                    f"ds_core.activation_checkpointing.Policy)"
                )
        if self.contiguous_memory_optimization and not self.partition_activations:
            raise refusal(
                "contiguous_memory_optimization: got true, but without partition_activations the "
                "inputs of blocks lie where the model made them: add that, or set "
                "PYTORCH_ALLOC_CONF=expandable_segments:True for all memory"
            )
        if self.blocks == "own":
            self._check_own()
        return self

    def _check_own(self) -> None:
        if not self.cpu_checkpointing and not self.partition_activations:
            raise refusal(
                'blocks: got "own", but nothing is to be done with their inputs: add '
                "cpu_checkpointing or partition_activations, or remove it"
            )
        for key in ("number_checkpoints", "synchronize_checkpoint_boundary"):
            if getattr(self, key):
                raise refusal(
                    f'{key}: cannot be given with "blocks": "own": the model itself chooses and '
                    f'computes its layers; remove one of them, or use "repeated" and switch the '
                    f"model's own checkpointing off"
                )
