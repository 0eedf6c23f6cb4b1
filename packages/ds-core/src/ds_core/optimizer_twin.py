"""A second handle on an optimizer, so that two threads can step different parameters of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from ds_core.errors import OptimizerError


@contextmanager
def twin_of(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer with the same state and hyperparameters, whose groups hold no parameter yet.

    What the caller puts into its groups belongs to the twin alone, and so does what a step keeps
    to be rolled back. Raises OptimizerError after a step that wrote into its groups: it keeps
    numbers there for all parameters together, so they cannot be stepped part by part.
    """
    twin = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        # A method of the instance, as schedulers put there, belongs to the original.
        if name not in vars(twin) and not callable(getattr(type(optimizer), name, None)):
            setattr(twin, name, value)
    twin.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
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
