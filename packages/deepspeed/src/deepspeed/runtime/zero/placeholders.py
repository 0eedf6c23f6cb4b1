"""What `state_dict()` of a sharded model gives on the ranks that save nothing."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


def give_placeholders(model: nn.Module) -> None:
    """Let `state_dict()` give empty tensors for parameters that are away, on all ranks but 0.

    Libraries gather the weights to rank 0, and then have every rank save: those that got none
    ask the model, and write nothing. On rank 0, where it would be written, it stays an error.
    """
    if dist.get_rank() == 0:
        return
    for module in model.modules():
        if any(_is_away(param) for param in module._parameters.values()):
            module._save_to_state_dict = MethodType(_save_to_state_dict, module)  # type: ignore[method-assign]


def _is_away(param: Any) -> bool:
    status = getattr(param, "ds_status", ZeroParamStatus.AVAILABLE)
    return status is not None and status != ZeroParamStatus.AVAILABLE


def _save_to_state_dict(
    self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool
) -> None:
    own = self._parameters
    shown = {
        name: torch.empty(0, dtype=param.dtype) if param is not None and _is_away(param) else param
        for name, param in own.items()
    }
    # Not by assignment: the module would register what is no parameter.
    self.__dict__["_parameters"] = own if keep_vars else shown
    try:
        type(self)._save_to_state_dict(self, destination, prefix, keep_vars)
    finally:
        self.__dict__["_parameters"] = own
