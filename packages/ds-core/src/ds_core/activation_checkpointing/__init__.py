"""Activation checkpointing: keep a block's inputs, and compute the rest again in backward.

from ds_core.activation_checkpointing import checkpoint, checkpoint_blocks

hidden = checkpoint(block, hidden, mask)      # in a model's forward
checkpoint_blocks(model)                      # or for all its repeated blocks, from outside
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_core.activation_checkpointing.blocks import CheckpointedBlocks, checkpoint_blocks
    from ds_core.activation_checkpointing.policy import Policy, checkpoint
    from ds_core.activation_checkpointing.rng_states import RngStates

__all__ = ["CheckpointedBlocks", "Policy", "RngStates", "checkpoint", "checkpoint_blocks"]

# Reading a config imports the section beside these, and must stay light.
_LAZY = {
    "CheckpointedBlocks": "ds_core.activation_checkpointing.blocks",
    "Policy": "ds_core.activation_checkpointing.policy",
    "RngStates": "ds_core.activation_checkpointing.rng_states",
    "checkpoint": "ds_core.activation_checkpointing.policy",
    "checkpoint_blocks": "ds_core.activation_checkpointing.blocks",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
