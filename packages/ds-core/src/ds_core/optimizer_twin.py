"""A second handle on an optimizer, so that two threads can step different parameters of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from ds_core.errors import OptimizerError


@contextmanager
def twin_of(
    optimizer: Optimizer, groups: Sequence[dict[str, Any]] | None = None
) -> Iterator[Optimizer]:
    """An optimizer with the same state and hyperparameters, whose groups hold no parameter yet.

    What the caller puts into its groups belongs to the twin alone, and so does what a step keeps
    to be rolled back. Raises OptimizerError after a step that wrote into its groups: it keeps
    numbers there for all parameters together, so they cannot be stepped part by part.

    Args:
        optimizer: the original.
        groups: with the hyperparameters to use, from `noted_groups`; default: the present ones.
    """
    cls: Any = type(optimizer)
    if "__copy__" in dir(cls):
        twin = copy.copy(optimizer)
    else:
        # Not by way of `__setstate__`, which prepares an optimizer that was pickled.
        twin = cls.__new__(cls)
        twin.__dict__.update(vars(optimizer))
    for name in [name for name in vars(twin) if callable(getattr(cls, name, None))]:
        del twin.__dict__[name]  # a schedule's own `step`, bound to the original
    twin.param_groups = [{**group, "params": []} for group in groups or optimizer.param_groups]
    before = [_values(group) for group in twin.param_groups]
    yield twin
    for group, values in zip(twin.param_groups, before, strict=True):
        now = _values(group)
        changed = [key for key in now if key not in values or now[key] is not values[key]]
        if changed:
            raise OptimizerError(
                f"{type(optimizer).__name__} keeps {changed[0]!r} in its parameter groups and "
                f"changes it in a step, so one step cannot be taken in parts by two threads; leave "
                f"out speculative steps and a split between device and host"
            )


def noted_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The present hyperparameters, for a step that is taken later; schedules may go on."""
    return [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in _values(group).items()}
        for group in optimizer.param_groups
    ]


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The present values of every group, to be compared later; tensors as numbers."""
    return [
        {key: _number(value) for key, value in _values(group).items()}
        for group in optimizer.param_groups
    ]


def _values(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
