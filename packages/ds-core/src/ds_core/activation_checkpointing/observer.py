"""What the section `activation_checkpointing` does to a model in training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ds_core import comm
from ds_core.activation_checkpointing.blocks import CheckpointedBlocks, checkpoint_blocks
from ds_core.activation_checkpointing.host_offload import HostOffload
from ds_core.activation_checkpointing.policy import Policy
from ds_core.activation_checkpointing.section import ActivationCheckpointingSection
from ds_core.activation_checkpointing.stored_inputs import StoredInputs, store_inputs
from ds_core.errors import ConfigError, DsError
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine

logger = logging.getLogger(__name__)


class BlockCheckpointing:
    """Changes the model's blocks when the engine starts, and changes them back when it closes.

    Attributes:
        offload: where the blocks' inputs wait on the host, or None.
    """

    def __init__(self, section: ActivationCheckpointingSection) -> None:
        self._section = section
        self._blocks: CheckpointedBlocks | StoredInputs | None = None
        self.offload = HostOffload() if section.cpu_checkpointing else None

    def on_event(self, engine: Engine, event: Event) -> None:
        """Act on START and CLOSE. Raises ConfigError if the blocks are not there."""
        if event.kind is EventKind.START:
            try:
                self._blocks = self._change(engine)
            except DsError as error:
                raise ConfigError(f"activation_checkpointing.blocks: {error}") from error
        elif event.kind is EventKind.CLOSE and self._blocks is not None:
            self._blocks.remove()
            if self.offload is not None and self.offload.counts.num_sent:
                peak = self.offload.buffers.peak_bytes / 2**20
                logger.info("inputs of blocks took at most %.1f MiB of host memory", peak)

    def _change(self, engine: Engine) -> CheckpointedBlocks | StoredInputs:
        section = self._section
        policy = Policy(
            offload_to_cpu=self.offload or False,
            partition_group=self._partition_group(engine.mesh),
            reuses_buffers=section.contiguous_memory_optimization,
            synchronize=section.synchronize_checkpoint_boundary,
        )
        if section.blocks == "own":
            return store_inputs(engine.module, policy)
        patterns = section.blocks if isinstance(section.blocks, tuple) else None
        return checkpoint_blocks(
            engine.module, patterns, number=section.number_checkpoints, policy=policy
        )

    def _partition_group(self, mesh: comm.Mesh) -> comm.Group | None:
        if not self._section.partition_activations:
            return None
        if mesh.size("tp") == 1:
            logger.warning(
                "activation_checkpointing.partition_activations makes no difference: one rank "
                "along the mesh's tp axis, so no other rank holds the same inputs of blocks"
            )
        return mesh.group("tp")


def from_config(config: Config) -> BlockCheckpointing | None:
    """The observer that the section asks for, if it does."""
    section = config.section("activation_checkpointing")
    if not isinstance(section, ActivationCheckpointingSection) or not section.asks:
        return None
    return BlockCheckpointing(section)
