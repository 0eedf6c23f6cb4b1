"""What all ranks must know of a backward before they take a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ds_core import comm
from ds_core.gradients import vector_norm
from ds_zero.unit import Unit
from ds_zero.wholeness import Trouble, raise_together


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a backward.

    Attributes:
        norm: of all gradients, if that was asked for.
        used: by unit, which of its parameters some rank used.
        updated: the most units that a rank has updated already.
    """

    norm: torch.Tensor | None
    used: dict[int, list[bool]]
    updated: int


def agree(
    units: list[Unit],
    *,
    with_norm: bool,
    squares: Mapping[int, torch.Tensor] | None = None,
    updated: torch.Tensor | None = None,
    trouble: Trouble | None = None,
) -> Agreement:
    """Exchange the ranks' squared gradient norms and the parameters that each of them used.

    Args:
        units: the trained ones.
        with_norm: whether the norm is asked for.
        squares: by unit, squared norms that are known already; the others are of what is here.
        updated: how many units this rank has updated already; default: none.
        trouble: why this rank cannot take the step.

    Raises ShardError on every rank if one is in trouble.
    """
    norm_squared = torch.zeros((), dtype=torch.float64)
    used: dict[int, list[bool]] = {}
    most, troubled = 0, list[comm.Group]()
    for group in {id(unit.group): unit.group for unit in units}.values():
        members = [unit for unit in units if unit.group is group]
        device = members[0].full.device
        local = torch.zeros(3, dtype=torch.float64, device=device)
        if trouble is not None:
            local[1] = 1.0
        elif with_norm:
            local[0] = _squared_norm(members, squares or {}, device)
        if updated is not None:
            local[2] = updated
        flags = torch.tensor([flag for unit in members for flag in unit.used], dtype=torch.float64)
        mine = torch.cat([local, flags.to(device)])
        everybody = torch.empty(group.size * mine.numel(), dtype=mine.dtype, device=device)
        comm.all_gather(everybody, mine, group, caller="gradient norm")
        table = everybody.view(group.size, -1).cpu()
        total = table.sum(0)
        norm_squared += total[0]
        most = max(most, int(table[:, 2].max()))
        if total[1] > 0:
            troubled.append(group)
        anywhere = iter((total[3:] > 0).tolist())
        for unit in members:
            used[unit.index] = [next(anywhere) for _ in unit.params]
    if troubled:
        # The largest has all ranks that see one of the others.
        raise_together("step", trouble, max(troubled, key=lambda group: group.size))
    return Agreement(norm_squared.sqrt() if with_norm else None, used, most)


def _squared_norm(
    units: list[Unit], known: Mapping[int, torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Of this rank's part of the gradients, fp64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for unit in units:
        if unit.index in known:
            total += known[unit.index].to(device)
        elif unit.has_grad:
            unit.settle_gradient()
            total += vector_norm(unit.grad).double().square_().to(device)
    return total
