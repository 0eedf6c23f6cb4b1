"""Full parameters for a while: to read them, or to edit them on one rank for all."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import nn

from ds_core import comm
from ds_zero.errors import ShardError
from ds_zero.init import record_of
from ds_zero.optimizer import owners_of
from ds_zero.sharded_param import is_sharded


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
        for owner, units in self._owners.values():
            size = units[0].group.size
            if modifier_rank is not None and not 0 <= modifier_rank < size:
                raise ShardError(
                    f"GatheredParameters: modifier_rank={modifier_rank} is outside 0..{size - 1}"
                )
            del owner

    def __enter__(self) -> GatheredParameters:
        for owner, units in self._owners.values():
            self._stack.enter_context(owner.hold_units(units))
        for param in self._params:
            if is_sharded(param) and record_of(param) is not None:
                param.data  # touching it makes `Init` gather it  # noqa: B018
        return self

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
        for param in self._params:
            record = record_of(param)
            if record is not None and not is_sharded(param):
                comm.broadcast(param.data, record.owner.group, source=source, caller="Init")
                record.store(param)
