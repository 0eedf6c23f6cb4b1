"""Values, gradients and optimizer states of single parameters, whole or this rank's part.

The optimizer behind a parameter is found from the parameter itself, at all stages. A parameter
that no engine trains has none: None is returned for what it would hold. Every function for full
values is collective, at stage 3 and below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from deepspeed._names import names_of
from deepspeed._parameter_attributes import owner_of
from ds_core.errors import DsError
from ds_core.seams import FullValues
from ds_zero import ShardError, ZeroOptimizer

_INNER = "it is an inner part of the original; use the safe_get_* and safe_set_* functions"

__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing=dict.fromkeys(
        (
            *("fragment_address", "tensor_fragment", "get_hp_fragment_mapping", "link_hp_params"),
            *("get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad"),
            *("get_hp_fragment", "map_to_flat_opt_states", "lazy_init_hp_params_optimizer_state"),
        ),
        _INNER,
    ),
)


def safe_get_full_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """The most precise value, in fp32 (a master copy, where there is one)."""
    found = _full(param)
    if found is None:
        return None
    return found[0].full_parameter(found[1]).to(torch.float32, copy=True)


def safe_set_full_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite it, and what the model computes with."""
    found = _full(param)
    if found is not None:
        found[0].set_full_parameter(found[1], value)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """A state such as "exp_avg", in fp32. Raises a DsError if the optimizer has none such."""
    found = _full(param)
    if found is None:
        return None
    return found[0].full_optimizer_state(found[1], optim_state_key).float()


def safe_set_full_optimizer_state(
    param: nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Overwrite such a state."""
    found = _full(param)
    if found is not None:
        found[0].set_full_optimizer_state(found[1], optim_state_key, value)


def safe_get_full_grad(param: nn.Parameter) -> torch.Tensor | None:
    """The averaged gradient, between backward and step; None before a backward.

    With fp16 it is multiplied by the loss scale. In fp32, unless autograd's own is still there.
    """
    if param.grad is not None:
        return param.grad
    found = _full(param)
    gradient = None if found is None else found[0].full_gradient(found[1])
    return None if gradient is None else gradient.float()


def safe_set_full_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite the averaged gradient, between backward and step."""
    if param.grad is not None:
        with torch.no_grad():
            param.grad.copy_(value)
        return
    found = _full(param)
    if found is not None:
        found[0].set_full_gradient(found[1], value)


def safe_update_full_grad_vectorized(
    param_list: Iterable[nn.Parameter],
    update_func: Callable[[torch.Tensor, nn.Parameter], torch.Tensor],
) -> None:
    """Replace the gradient of each parameter by `update_func(gradient, param)`."""
    for param in param_list:
        gradient = safe_get_full_grad(param) if param.requires_grad else None
        if gradient is not None:
            safe_set_full_grad(param, update_func(gradient, param))


def safe_get_local_fp32_param(param: nn.Parameter) -> torch.Tensor:
    """This rank's part of the most precise value: 1-D, maybe empty. Stage 3."""
    return _sharded(param).local_value(param, "parameter")


def safe_get_local_grad(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the averaged gradient. Stage 3."""
    return _sharded(param).local_value(param, "gradient")


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor:
    """This rank's part of a state such as "exp_avg". Stage 3."""
    return _sharded(param).local_value(param, optim_state_key)


def safe_set_local_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite this rank's part of a parameter, with as many numbers. Stage 3."""
    _sharded(param).set_local_value(param, "parameter", value)


def safe_set_local_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite this rank's part of the averaged gradient. Stage 3."""
    _sharded(param).set_local_value(param, "gradient", value)


def safe_set_local_optimizer_state(
    param: nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Overwrite this rank's part of a state. Stage 3."""
    _sharded(param).set_local_value(param, optim_state_key, value)


def _full(param: nn.Parameter) -> tuple[FullValues, Any] | None:
    """Who holds the values of `param`, and how they call it."""
    found = owner_of(param)
    if found is None:
        return None
    owner, name = found
    if not isinstance(owner, FullValues):
        raise DsError(
            f"{name!r} is held by {type(owner).__name__}, which gives no full values; a sharding "
            f"needs the methods of ds_core.seams.FullValues for that"
        )
    return owner, name


def _sharded(param: nn.Parameter) -> ZeroOptimizer:
    found = owner_of(param)
    if found is None or not isinstance(found[0], ZeroOptimizer) or found[0].stage != 3:
        raise ShardError(
            "safe_get_local_*, safe_set_local_*: this parameter is not sharded by stage 3; use "
            "the functions for full values"
        )
    return found[0]
