"""How a parameter finds the optimizer that shards it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ds_zero.sharded_param import OWNER
from ds_zero.unit import Unit

if TYPE_CHECKING:
    from ds_zero.optimizer import ZeroOptimizer


def own(optimizer: ZeroOptimizer) -> None:
    """Let the parameters of all its units find an optimizer."""
    reference = weakref.ref(optimizer)
    for unit in optimizer.units:
        for param in unit.params:
            setattr(param, OWNER, reference)
            param._ds_zero_unit = unit.index  # type: ignore[attr-defined]


def disown(units: Iterable[Unit]) -> None:
    """Nobody shards their parameters any more."""
    for unit in units:
        for param in unit.params:
            param.__dict__.pop(OWNER, None)


def owners_of(params: Iterable[nn.Parameter]) -> dict[int, tuple[ZeroOptimizer, list[Unit]]]:
    """The sharding optimizers behind `params`, each with the units concerned, in unit order."""
    found: dict[int, tuple[ZeroOptimizer, list[Unit]]] = {}
    for param in params:
        reference = getattr(param, OWNER, None)
        owner = None if reference is None else reference()
        if owner is None:
            continue
        unit = owner.units[param._ds_zero_unit]  # type: ignore[attr-defined]
        units = found.setdefault(id(owner), (owner, []))[1]
        if unit not in units:
            units.append(unit)
    for _, units in found.values():
        units.sort(key=lambda unit: unit.index)
    return found
