"""Full parameters for a while: to read them, or to edit them on one rank for all."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import nn

from ds_core import comm
from ds_zero import state
from ds_zero.errors import ShardError
from ds_zero.init import record_of
from ds_zero.owners import owners_of


class GatheredParameters:
    """Context manager inside which sharded parameters hold their full values.

        with ds_zero.GatheredParameters(model.head.parameters(), modifier_rank=0):
            if rank == 0:
                model.head.weight.zero_()

    Args:
        params: a parameter or several; ones that are not sharded are left alone.
        modifier_rank: rank (in the sharding group) whose edits are kept, on all ranks and in the
            master copy. None: edits are lost at stage 3.
        enabled: if False, do nothing.

    Gathers the whole units of the parameters. Collective: all ranks enter and leave.
    """

    def __init__(
        self,
        params: nn.Parameter | Iterable[nn.Parameter],
        modifier_rank: int | None = None,
        *,
        enabled: bool = True,
    ) -> None:
        chosen = [params] if isinstance(params, nn.Parameter) else list(params)
        self._params = chosen if enabled else []
        self._modifier = modifier_rank
        self._stack = ExitStack()
        self._owners = owners_of(self._params)
        # In the order of all ranks, which need not name the parameters in the same one.
        found = {id(p): (record, p) for p in self._params if (record := record_of(p)) is not None}
        self._records = sorted(found.values(), key=lambda each: each[0].index)
        groups = [units[0].group for _, units in self._owners.values()]
        for group in [*groups, *(record.owner.group for record, _ in self._records)]:
            if modifier_rank is not None and not 0 <= modifier_rank < group.size:
                raise ShardError(
                    f"GatheredParameters: modifier_rank={modifier_rank} is outside "
                    f"0..{group.size - 1}"
                )

    def __enter__(self) -> GatheredParameters:
        for owner, units in self._owners.values():
            self._stack.enter_context(owner.hold_units(units))
        for record, param in self._records:
            record.owner.hold([param])
            self._stack.callback(record.owner.let_go, [param])
        return self

    def adopt_edits(self) -> None:
        """Keep what this rank made of its own part of the parameters, which are still whole."""
        for _, units in self._owners.values():
            for unit in units:
                unit.adopt_full()
        for record, param in self._records:
            record.store(param)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._modifier is not None:
            self._keep_edits(self._modifier)
        self._stack.close()

    @torch.no_grad()
    def _keep_edits(self, source: int) -> None:
        for owner, units in self._owners.values():
            owner.before_change()
            for unit in units:
                comm.broadcast(unit.full, unit.group, source=source, caller=unit.name)
                unit.adopt_full()
        for record, param in self._records:
            value = param.detach().contiguous()
            comm.broadcast(value, record.owner.group, source=source, caller="Init")
            record.store(value)


def local_part(param: nn.Parameter) -> torch.Tensor:
    """This rank's part of a sharded parameter, 1-D and maybe empty; all of one that is not.

    In the dtype that the model computes in, and a view where that part is in memory: writing to it
    changes the parameter. `ZeroOptimizer.local_value` has the master copy.
    """
    record = record_of(param)
    if record is not None:
        return record.own
    for _, units in owners_of([param]).values():
        position = next(at for at, each in enumerate(units[0].params) if each is param)
        if units[0].stage == 3:
            return state.local_shard(units[0], position)
    return param.detach().reshape(-1)


def local_numel(param: nn.Parameter) -> int:
    """How many numbers of a parameter this rank holds between uses."""
    record = record_of(param)
    if record is not None:
        return record.own.numel()
    for _, units in owners_of([param]).values():
        unit = units[0]
        name = next(each.name for each in unit.specs if each.param is param)
        if unit.stage == 3:
            parts = unit.layout.pieces(unit.group.rank)
            return sum(part.stop - part.start for part in parts if part.slot.name == name)
    return param.numel()
