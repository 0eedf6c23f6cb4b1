"""Activation checkpointing: keep a block's inputs, and compute the rest again in backward.

from ds_core.activation_checkpointing import checkpoint, checkpoint_blocks, store_inputs

hidden = checkpoint(block, hidden, mask)      # in a model's forward
checkpoint_blocks(model)                      # or for all its repeated blocks, from outside
store_inputs(model)                           # or keep what it checkpoints itself on the host
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core._lazy import lazy_names

if TYPE_CHECKING:
    from ds_core.activation_checkpointing.blocks import CheckpointedBlocks, checkpoint_blocks
    from ds_core.activation_checkpointing.host_offload import HostOffload
    from ds_core.activation_checkpointing.policy import Policy, checkpoint
    from ds_core.activation_checkpointing.rng_states import RngStates, model_parallel_seed
    from ds_core.activation_checkpointing.stored_inputs import StoredInputs, store_inputs

__all__ = [
    "CheckpointedBlocks",
    "HostOffload",
    "Policy",
    "RngStates",
    "StoredInputs",
    "checkpoint",
    "checkpoint_blocks",
    "model_parallel_seed",
    "store_inputs",
]

# Reading a config imports the section beside these, and must stay light.
_LAZY = {
    "CheckpointedBlocks": "blocks",
    "HostOffload": "host_offload",
    "Policy": "policy",
    "RngStates": "rng_states",
    "StoredInputs": "stored_inputs",
    "checkpoint": "policy",
    "checkpoint_blocks": "blocks",
    "model_parallel_seed": "rng_states",
    "store_inputs": "stored_inputs",
}

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
