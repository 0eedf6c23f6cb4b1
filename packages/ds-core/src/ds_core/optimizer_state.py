"""Optimizer state before a checkpoint fills it, and the hyperparameters beside it."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.errors import CheckpointError


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Make `optimizer` allocate the state that a checkpoint will fill.

    Takes one step with zero gradients and zero learning rate, and undoes what it changed.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    everything = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
        group["params"] = []
    # One parameter at a time, so that only one is copied.
    for group, params in zip(optimizer.param_groups, everything, strict=True):
        for param in params:
            before, param.grad = param.detach().clone(), torch.zeros_like(param)
            group["params"] = [param]
            optimizer.step()
            param.grad = None
            param.copy_(before)
        group["params"] = []
    for group, rate, params in zip(optimizer.param_groups, rates, everything, strict=True):
        group["lr"], group["params"] = rate, params


def load_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Restore each group's hyperparameters; which kernel computes them stays as it is."""
    if len(groups) != len(saved):
        raise CheckpointError(
            f"the optimizer state has {len(saved)} parameter groups, this optimizer {len(groups)}"
        )
    for group, values in zip(groups, saved, strict=True):
        for key, value in values.items():
            if key not in ("names", "params", "fused", "foreach"):
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
