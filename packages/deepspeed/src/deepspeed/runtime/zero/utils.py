"""Questions about parameters that other packages ask."""

from __future__ import annotations

import torch

from ds_zero import ShardError
from ds_zero.sharded_param import is_sharded

#: What ZeRO raises of its own.
ZeRORuntimeException = ShardError


def is_zero_param(parameter: object) -> bool:
    """Whether it is sharded by stage 3, or was built under `deepspeed.zero.Init`."""
    if not isinstance(parameter, torch.Tensor):
        return False
    return is_sharded(parameter) or hasattr(parameter, "ds_id")
