"""What all ranks must know of a backward before they take a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ds_core import comm
from ds_core.gradients import vector_norm
from ds_zero.unit import Unit


class Agreement:
    """What all ranks know after a backward: the gradient norm, and which parameters were used."""

    def __init__(self, norm: torch.Tensor | None, used: dict[int, list[bool]]) -> None:
        self.norm, self.used = norm, used


def agree(
    units: list[Unit], *, with_norm: bool, squares: Mapping[int, torch.Tensor] | None = None
) -> Agreement:
    """Exchange the ranks' squared gradient norms and the parameters that each of them used.

    squares: by unit, squared norms that are known already; the others are of what is here.
    """
    norm_squared = torch.zeros((), dtype=torch.float64)
    used: dict[int, list[bool]] = {}
    for group in {id(unit.group): unit.group for unit in units}.values():
        members = [unit for unit in units if unit.group is group]
        local = torch.zeros(1, dtype=torch.float64, device=members[0].full.device)
        for unit in members if with_norm else ():
            known = (squares or {}).get(unit.index)
            if known is not None:
                local += known.to(local.device)
            elif unit.has_grad:
                unit.settle_gradient()
                local += vector_norm(unit.grad).double().square_().to(local.device)
        flags = torch.tensor([flag for unit in members for flag in unit.used], dtype=torch.float64)
        mine = torch.cat([local, flags.to(local.device)])
        everybody = torch.empty(group.size * mine.numel(), dtype=mine.dtype, device=mine.device)
        comm.all_gather(everybody, mine, group, caller="gradient norm")
        total = everybody.view(group.size, -1).sum(0).cpu()
        norm_squared += total[0]
        anywhere = iter((total[1:] > 0).tolist())
        for unit in members:
            used[unit.index] = [next(anywhere) for _ in unit.params]
    return Agreement(norm_squared.sqrt() if with_norm else None, used)
