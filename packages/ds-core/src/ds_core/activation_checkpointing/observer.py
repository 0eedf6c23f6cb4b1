"""What the section `activation_checkpointing` does to a model in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core.activation_checkpointing.blocks import CheckpointedBlocks, checkpoint_blocks
from ds_core.activation_checkpointing.policy import Policy
from ds_core.activation_checkpointing.section import ActivationCheckpointingSection
from ds_core.errors import ConfigError, DsError
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine


class BlockCheckpointing:
    """Changes the model's blocks when the engine starts, and changes them back when it closes."""

    def __init__(self, section: ActivationCheckpointingSection) -> None:
        self._section = section
        self._blocks: CheckpointedBlocks | None = None

    def on_event(self, engine: Engine, event: Event) -> None:
        """Act on START and CLOSE. Raises ConfigError if the blocks are not there."""
        if event.kind is EventKind.START:
            patterns = self._section.blocks
            policy = Policy(
                offload_to_cpu=self._section.cpu_checkpointing,
                synchronize=self._section.synchronize_checkpoint_boundary,
            )
            try:
                self._blocks = checkpoint_blocks(
                    engine.module,
                    patterns if isinstance(patterns, tuple) else None,
                    number=self._section.number_checkpoints,
                    policy=policy,
                )
            except DsError as error:
                raise ConfigError(f"activation_checkpointing.blocks: {error}") from error
        elif event.kind is EventKind.CLOSE and self._blocks is not None:
            self._blocks.remove()


def from_config(config: Config) -> BlockCheckpointing | None:
    """The observer that the section asks for, if it does."""
    section = config.section("activation_checkpointing")
    if not isinstance(section, ActivationCheckpointingSection) or not section.asks:
        return None
    return BlockCheckpointing(section)
