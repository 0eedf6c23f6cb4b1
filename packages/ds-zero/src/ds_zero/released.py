"""What is left of a sharding when training has ended and nobody asked for the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ds_core.seams import change_freely
from ds_zero.sharded_param import OWNER, show_class

if TYPE_CHECKING:
    from ds_zero.gather import GatherRuntime
    from ds_zero.offload.homes import Homes
    from ds_zero.unit import Unit


class Released:
    """The parts of the parameters on this rank, which `GatheredParameters` makes whole.

    Each parameter keeps it alive, until `ds_zero.shard` takes the parameters over or the model
    goes.

    Args:
        units: of the model; those at stage 3 are sharded.
        gather: what gathers them, without hooks.
        homes: where parts live that are not on the device.
    """

    def __init__(self, units: list[Unit], gather: GatherRuntime, homes: Homes) -> None:
        self.units, self._gather, self._homes = units, gather, homes
        #: Whole values of the parameters of one unit, of those that are taken one by one.
        self._values: dict[int, torch.Tensor] = {}
        self._num_left = sum(len(unit.params) for unit in units if unit.stage == 3)
        for unit in units:
            for param in unit.params if unit.stage == 3 else ():
                param.__dict__[OWNER] = self._get

    def _get(self) -> Released:
        return self

    def before_change(self) -> None:
        """See `ds_core.seams.Sharding`: nobody reads beside the program."""
        change_freely()

    @contextmanager
    def hold_units(self, units: list[Unit]) -> Iterator[None]:
        """Hold some units on every rank inside the block. Collective."""
        with self._gather.hold([unit for unit in units if unit.stage == 3]):
            yield

    @torch.no_grad()
    def take(self, param: nn.Parameter) -> torch.Tensor:
        """The whole value of a parameter, which is sharded no more. Collective.

        Gathers a unit when its first parameter is asked for; the others' values wait.
        """
        if id(param) not in self._values:
            unit = self.units[param._ds_zero_unit]  # type: ignore[attr-defined]
            with self.hold_units([unit]):
                self._values = {id(each): each.detach().clone() for each in unit.params}
        value = self._values.pop(id(param))
        del param.__dict__[OWNER]
        show_class(param)
        param.data = value
        self._num_left -= 1
        if self._num_left == 0:
            self._homes.close()
        return value


def released(param: nn.Parameter) -> Released | None:
    """What keeps the parts of a parameter since training has ended; None in training."""
    reference = getattr(param, OWNER, None)
    owner = None if reference is None else reference()
    return owner if isinstance(owner, Released) else None
