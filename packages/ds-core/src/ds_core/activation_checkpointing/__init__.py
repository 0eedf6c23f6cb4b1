"""Activation checkpointing: keep a block's inputs, and compute the rest again in backward.

from ds_core.activation_checkpointing import checkpoint, checkpoint_blocks

hidden = checkpoint(block, hidden, mask)      # in a model's forward
checkpoint_blocks(model)                      # or for all its repeated blocks, from outside
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core._lazy import lazy_names

if TYPE_CHECKING:
    from ds_core.activation_checkpointing.blocks import CheckpointedBlocks, checkpoint_blocks
    from ds_core.activation_checkpointing.policy import Policy, checkpoint
    from ds_core.activation_checkpointing.rng_states import RngStates

__all__ = ["CheckpointedBlocks", "Policy", "RngStates", "checkpoint", "checkpoint_blocks"]

# Reading a config imports the section beside these, and must stay light.
_LAZY = {
    "CheckpointedBlocks": "blocks",
    "Policy": "policy",
    "RngStates": "rng_states",
    "checkpoint": "policy",
    "checkpoint_blocks": "blocks",
}

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
