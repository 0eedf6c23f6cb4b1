"""Optimizer state before a checkpoint fills it, and the hyperparameters beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from ds_core.errors import CheckpointError
from ds_core.whole_matrices import WholeMatrices

#: Entries of a group that say what computes, and in which format the state was allocated.
_STAYS = (
    "names",
    "params",
    "fused",
    "foreach",
    "fp32_optimizer_states",
    "stochastic_rounding",
)


@runtime_checkable
class PortableState(Protocol):
    """An optimizer that keeps its state packed, and can give and take it element by element.

    Checkpoints and shards then hold it as any optimizer's: cut anywhere, in fp32.
    """

    def portable_state(self, param: torch.Tensor) -> dict[str, Any]:
        """A copy of the state of a parameter: fp32 in its shape, and numbers; empty if none."""

    def load_portable_state(self, param: torch.Tensor, values: Mapping[str, Any]) -> None:
        """Take over what `portable_state` gave; exactly, if the parameter is the same."""


@runtime_checkable
class RandomRounding(Protocol):
    """An optimizer that rounds at random, by numbers that depend on the step and the parameter."""

    def number_parameters(self, numbers: Mapping[torch.Tensor, int]) -> None:
        """Tell parameters apart by these numbers from now on, however they are stepped.

        A run that goes on from a checkpoint rounds as it would have if it numbers them alike.
        """


def number_parameters(
    optimizer: torch.optim.Optimizer, numbers: Mapping[torch.Tensor, int]
) -> None:
    """Number the parameters of an optimizer that rounds at random; of no effect on others."""
    if isinstance(optimizer, RandomRounding):
        optimizer.number_parameters(numbers)


def state_of(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> dict[str, Any]:
    """The state of a parameter, or a copy of it if it is packed; empty before its first step."""
    if isinstance(optimizer, PortableState):
        return optimizer.portable_state(param)
    found: dict[str, Any] = optimizer.state.get(param, {})
    return found


def is_wide(value: object) -> bool:
    """Whether a state has numbers for elements; not one for the whole parameter, as a count has."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


@torch.no_grad()
def devices_of_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], like: torch.Tensor
) -> dict[str, torch.device]:
    """By key, where an optimizer keeps the state tensors of a parameter like `like`, 1-D.

    Asked by a step of one element, for torch has no word for it: counts of steps are on the
    parameter's device for some kernels, and on the CPU for others.
    """
    probe = torch.nn.Parameter(torch.zeros(1, device=like.device, dtype=like.dtype))
    try:
        allocate_state_of(optimizer, group, probe)
        state = optimizer.state.get(probe, {})
        return {k: v.device for k, v in state.items() if isinstance(v, torch.Tensor)}
    finally:
        optimizer.state.pop(probe, None)


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer` the state of its first step, for a checkpoint to fill.

    Whatever state it had is dropped. Takes one step with zero gradients, and undoes what that
    changed: a parameter of which the checkpoint has no state then starts as a new one would.
    """
    optimizer.state.clear()
    # One parameter at a time, so that only one is copied.
    for group in optimizer.param_groups:
        for param in group["params"]:
            allocate_state_of(optimizer, group, param)


@torch.no_grad()
def allocate_state_of(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], param: torch.Tensor
) -> None:
    """As `allocate_state`, of one parameter of a group, or of one that is to come into it."""
    kept = [dict(each) for each in optimizer.param_groups]
    try:
        for each in optimizer.param_groups:
            each["params"] = []
        group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
        if "weight_decay" in group:
            group["weight_decay"] = 0.0  # or it would show in the first moment
        value, param.grad = param.detach().clone(), torch.zeros_like(param)
        group["params"] = [param]
        if isinstance(optimizer, WholeMatrices) and optimizer.is_whole(group):
            # It may be a part of a matrix, of which there is no whole step.
            optimizer.direction(group, param, torch.zeros_like(param))
        else:
            optimizer.step()
        param.grad = None
        param.copy_(value)
    finally:
        for each, before in zip(optimizer.param_groups, kept, strict=True):
            each.update(before)
    own = optimizer.state.get(param, {})
    if torch.is_tensor(own.get("step")):
        own["step"].zero_()


def load_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Restore each group's hyperparameters; kernel and format of the state stay as they are."""
    if len(groups) != len(saved):
        raise CheckpointError(
            f"the optimizer state has {len(saved)} parameter groups, this optimizer {len(groups)}"
        )
    for group, values in zip(groups, saved, strict=True):
        for key, value in values.items():
            if key not in _STAYS:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
