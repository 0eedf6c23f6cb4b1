"""The core of the suite: accelerator, config, mesh and collectives, engine, checkpoints, launcher.

    import ds_core

    engine = ds_core.initialize(model, "ds_config.json", training_data=dataset)
    for _ in range(1000):
        loss = engine.train_batch()

Importing it does no work, and imports nothing else: its parts come in on first use.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ds_core._version import __version__
from ds_core.errors import DsError

if TYPE_CHECKING:
    from ds_core import (
        accelerator,
        checkpoint,
        comm,
        config,
        data,
        efficiency,
        observers,
        ops,
        seams,
    )
    from ds_core.assembly import initialize
    from ds_core.engine import Engine
    from ds_core.precision import LossScale, Precision

# Silent unless the program sets up logging, or the config's `log_level` asks for messages.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "DsError",
    "Engine",
    "LossScale",
    "Precision",
    "__version__",
    "accelerator",
    "checkpoint",
    "comm",
    "config",
    "data",
    "efficiency",
    "initialize",
    "observers",
    "ops",
    "seams",
]

_LAZY = {
    "Engine": "ds_core.engine",
    "LossScale": "ds_core.precision",
    "Precision": "ds_core.precision",
    "initialize": "ds_core.assembly",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in __all__:
        return importlib.import_module(f"ds_core.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
