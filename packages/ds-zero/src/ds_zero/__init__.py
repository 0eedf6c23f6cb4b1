"""ZeRO: optimizer state, gradients and parameters of a model, sharded over data-parallel ranks."""

import logging

from ds_zero._version import __version__
from ds_zero.access import GatheredParameters
from ds_zero.api import shard
from ds_zero.errors import ShardError
from ds_zero.init import Init
from ds_zero.memory import estimate_memory
from ds_zero.offload import Offload
from ds_zero.offload.zenflow import ZenFlow
from ds_zero.optimizer import ZeroOptimizer

# Silent unless the program sets up logging, or the config's `log_level` asks for messages.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "GatheredParameters",
    "Init",
    "Offload",
    "ShardError",
    "ZenFlow",
    "ZeroOptimizer",
    "__version__",
    "estimate_memory",
    "shard",
]
