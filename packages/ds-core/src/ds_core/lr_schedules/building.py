"""From the config's `scheduler` section to a schedule: DeepSpeed's five, and torch's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ds_core import _signatures, _values
from ds_core._signatures import Problem
from ds_core.errors import ConfigError
from ds_core.lr_schedules.one_cycle import OneCycle
from ds_core.lr_schedules.range_test import LRRangeTest
from ds_core.lr_schedules.schedule import Schedule
from ds_core.lr_schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR
from ds_core.optimizers import Choice

_HIDDEN = ("optimizer", "last_epoch")
_PASS_OBJECT = "build it and pass it to initialize(lr_scheduler=)"
#: Schedules of torch that a config cannot describe or a step without a metric cannot drive.
_REFUSED_TYPES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("LambdaLR", "MultiplicativeLR"), f"takes functions, which JSON has not; {_PASS_OBJECT}"
        ),
        **dict.fromkeys(
            ("SequentialLR", "ChainedScheduler"), f"takes other schedules; {_PASS_OBJECT}"
        ),
        "ReduceLROnPlateau": "needs a validation metric at every step; step it in your own loop",
    }
)

_OWN: tuple[type[Schedule], ...] = (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)


def build(choice: Choice, optimizer: Optimizer) -> LRScheduler:
    """The schedule that a config names, over the groups of `optimizer`.

    Args:
        choice: the scheduler section.
        optimizer: its groups' learning rates are set to the schedule's first.

    Raises ConfigError if the type is unknown or the class refuses its arguments.
    """
    found = problems(choice.type, choice.params)
    if found:
        listing = "; ".join(f"scheduler.{key}: {message}" for key, message in found)
        raise ConfigError(listing)
    cls = _classes()[choice.type.lower()]
    try:
        return cls(optimizer, **_signatures.coerced(cls, choice.params))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler.params: {cls.__name__} refuses them: {error}") from error


def problems(type_name: str, params: Mapping[str, Any]) -> list[Problem]:
    """What keeps `build` from honouring a type and its params; keys are relative to the section."""
    name = type_name.lower()
    refused = {key.lower(): reason for key, reason in _REFUSED_TYPES.items()}
    if name in refused:
        return [("type", f"{type_name}: {refused[name]}")]
    classes = _classes()
    if name not in classes:
        valid = [cls.__name__ for cls in classes.values()]
        guess = _values.nearest(type_name, valid)
        hint = f"; did you mean {guess}?" if guess else ""
        expected = f"one of {', '.join(valid)}"
        return [("type", f"{_values.mismatch(type_name, expected)}{hint}")]
    return _signatures.check(classes[name], params, hidden=_HIDDEN)


def effective_params(type_name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` completed by the defaults of the schedule that they configure."""
    cls = _classes()[type_name.lower()]
    return {**_signatures.defaults(cls, hidden=_HIDDEN), **_signatures.coerced(cls, params)}


def _classes() -> dict[str, Any]:
    """The schedules that a config can name, by lower-case name; DeepSpeed's first."""
    found: dict[str, Any] = {cls.__name__.lower(): cls for cls in _OWN}
    for name in lr_scheduler.__all__:
        cls = getattr(lr_scheduler, name)
        is_schedule = (
            inspect.isclass(cls) and issubclass(cls, LRScheduler) and cls is not LRScheduler
        )
        if is_schedule and name not in _REFUSED_TYPES:
            found.setdefault(name.lower(), cls)
    return found
