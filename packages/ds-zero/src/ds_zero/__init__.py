"""ZeRO: optimizer state, gradients and parameters of a model, sharded over data-parallel ranks."""

import logging

from ds_zero._version import __version__
from ds_zero.access import GatheredParameters, local_numel, local_part
from ds_zero.api import shard
from ds_zero.errors import ShardError
from ds_zero.host_steps.zenflow import ZenFlow
from ds_zero.init import Init
from ds_zero.memory import estimate_memory
from ds_zero.memory_plan import MemoryPlan
from ds_zero.offload import Offload
from ds_zero.optimizer import ZeroOptimizer
from ds_zero.plan import is_leaf, mark_leaf
from ds_zero.preflight import memory_plan
from ds_zero.pretrained import load_pretrained
from ds_zero.tiled_compute import TiledMLP, tiled_loss, tiled_mlp
from ds_zero.tiled_linear import TiledLinear, TiledLinearReturnBias

# Silent unless the program sets up logging, or the config's `log_level` asks for messages.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "GatheredParameters",
    "Init",
    "MemoryPlan",
    "Offload",
    "ShardError",
    "TiledLinear",
    "TiledLinearReturnBias",
    "TiledMLP",
    "ZenFlow",
    "ZeroOptimizer",
    "__version__",
    "estimate_memory",
    "is_leaf",
    "memory_plan",
    "load_pretrained",
    "local_numel",
    "local_part",
    "mark_leaf",
    "shard",
    "tiled_loss",
    "tiled_mlp",
]
