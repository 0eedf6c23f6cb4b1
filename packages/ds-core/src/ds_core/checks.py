"""What must hold of a model and its optimizer before they are trained together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_core.errors import DsError


def check_model(model: Any, error: type[DsError] = DsError, *, trains: bool = True) -> None:
    """Raise `error` unless `model` is a module with values that nobody wraps.

    trains: whether some of it must be trainable.
    """
    if not isinstance(model, nn.Module):
        raise error(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise error(
            "model: it is wrapped in DistributedDataParallel, which averages gradients too; pass "
            "the module inside it, ddp.module"
        )
    parameters = dict(model.named_parameters())
    for name, param in parameters.items():
        if param.is_meta:
            raise error(
                f"model: parameter {name!r} is on the meta device and has no values; materialize "
                f"it first, or build the model under ds_zero.Init()"
            )
    if trains and not any(param.requires_grad for param in parameters.values()):
        raise error(
            f"model: {type(model).__name__} has no trainable parameter ({len(parameters)} frozen); "
            f"set requires_grad on what should be trained"
        )


def check_optimizer(model: nn.Module, optimizer: Any, error: type[DsError] = DsError) -> None:
    """Raise `error` unless `optimizer` holds every trainable parameter of `model`, and no other."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise error(
            f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer that was "
            f"built on the model's parameters"
        )
    named = dict(model.named_parameters())
    known, held = {id(param) for param in named.values()}, set()
    for index, group in enumerate(optimizer.param_groups):
        for place, param in enumerate(group["params"]):
            held.add(id(param))
            if id(param) not in known:
                raise error(
                    f"optimizer: parameter {place} of group {index}, of shape "
                    f"{list(param.shape)}, is not a parameter of the model; build the optimizer "
                    f"on model.parameters() of the model that is trained"
                )
    missing = [name for name, p in named.items() if p.requires_grad and id(p) not in held]
    if missing:
        raise error(
            f"optimizer: it lacks {len(missing)} trainable parameters of the model, the first is "
            f"{missing[0]!r}; add them to a group or freeze them with requires_grad_(False)"
        )
