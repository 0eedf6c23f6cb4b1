"""Which parameters are trained, from what a program passes as optimizer and as parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ds_core.errors import DsError

logger = logging.getLogger("DeepSpeed")

_Groups = list[dict[str, Any]]


def optimizer_of(
    model: nn.Module, optimizer: Any, model_parameters: Any
) -> tuple[torch.optim.Optimizer | None, _Groups | None]:
    """The optimizer that a program passes or makes, and the groups for one that is built for it.

    Args:
        model: whose parameters are trained, unless others are given.
        optimizer: a torch optimizer, or a callable that makes one of a list of parameters.
        model_parameters: any iterable of parameters, of (name, parameter) pairs or of groups.
    """
    if optimizer is None:
        given = None if model_parameters is None else as_list(model_parameters)
        groups = given if given and isinstance(given[0], dict) else None
        return None, groups
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise DsError(
                f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer or a "
                f"callable that makes one of the parameters"
            )
        parameters = model.parameters() if model_parameters is None else model_parameters
        optimizer = optimizer(as_list(parameters))
    kept = [group for group in optimizer.param_groups if len(group["params"])]
    optimizer.param_groups[:] = kept
    return optimizer, None


def as_list(model_parameters: Any) -> list[Any]:
    """What a program passes as parameters, once. Raises DsError if it is empty."""
    if isinstance(model_parameters, nn.Module):
        model_parameters = model_parameters.parameters()
    if isinstance(model_parameters, Mapping):
        model_parameters = [model_parameters]
    found = list(model_parameters)
    if not found:
        raise DsError(
            "model_parameters: got none; a generator such as model.parameters() can be read once, "
            "so make a new one for each call, and see that some parameter requires a gradient"
        )
    return found


def settle_trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    groups: _Groups | None,
    model_parameters: Any,
) -> None:
    """Freeze parameters of the model that nobody was asked to train, and say so.

    They are not updated either way; frozen, they need no gradients and no states.
    """
    if optimizer is not None:
        wanted = _in_groups(optimizer.param_groups)
    elif groups is not None:
        wanted = _in_groups(groups)
    elif model_parameters is not None:
        wanted = {id(p[1] if isinstance(p, tuple) else p) for p in as_list(model_parameters)}
    else:
        return
    left = [
        (name, param)
        for name, param in model.named_parameters()
        if param.requires_grad and id(param) not in wanted
    ]
    for _, param in left:
        param.requires_grad_(False)
    if left:
        logger.warning(
            "%d parameters of the model are not among those to be trained, the first is %s: they "
            "are frozen",
            len(left), left[0][0],
        )  # fmt: skip


def _in_groups(groups: Iterable[Mapping[str, Any]]) -> set[int]:
    found: set[int] = set()
    for group in groups:
        held = group["params"]
        held = [held] if isinstance(held, torch.Tensor) else held
        found.update(id(p[1] if isinstance(p, tuple) else p) for p in held)
    return found
