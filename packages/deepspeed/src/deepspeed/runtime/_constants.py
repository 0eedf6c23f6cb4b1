"""Constants and types by the original's names, which programs compare with and annotate by."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

#: Makes an optimizer of parameters, or of groups of them.
DeepSpeedOptimizerCallable = Callable[[Any], Optimizer]
#: Makes a schedule of an optimizer.
DeepSpeedSchedulerCallable = Callable[[Optimizer], Any]

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
MEMORY_OPT_ALLREDUCE_SIZE = 500_000_000
ROUTE_TRAIN, ROUTE_EVAL, ROUTE_PREDICT = "train", "eval", "predict"

#: Whether triton can be imported; there is none for CPUs or ROCm as far as the original uses it.
HAS_TRITON = torch.version.hip is None and importlib.util.find_spec("triton") is not None

ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER = "adagrad", "adam", "adamw"
LAMB_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER = "lamb", "lion", "muon"
#: Names of "optimizer.type", in lower case, that the configuration builds itself.
DEEPSPEED_OPTIMIZERS = [
    *(ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER),
    *(LAMB_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER),
]

#: Those of other modules of the original too.
OPTIMIZER_NAMES = (
    *("ADAGRAD_OPTIMIZER", "ADAM_OPTIMIZER", "ADAMW_OPTIMIZER", "DEEPSPEED_OPTIMIZERS"),
    *("LAMB_OPTIMIZER", "LION_OPTIMIZER", "MUON_OPTIMIZER"),
)
