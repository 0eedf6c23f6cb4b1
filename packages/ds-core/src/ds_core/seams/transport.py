"""How a tensor travels in the collectives that a sharding scheme issues."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from ds_core import comm


@runtime_checkable
class Transport(Protocol):
    """The collectives of sharding, with a choice of what goes over the wire.

    Semantics and shapes are those of `ds_core.comm`; a lossy transport states its error. What it
    sends is counted by the group's ledger.
    """

    def all_gather(
        self, out: torch.Tensor, shard: torch.Tensor, group: comm.Group, *, caller: str
    ) -> comm.Pending:
        """Fill `out` with every rank's shard."""

    def reduce_scatter(
        self,
        out: torch.Tensor,
        full: torch.Tensor,
        group: comm.Group,
        *,
        accumulate: bool,
        caller: str,
    ) -> comm.Pending:
        """Put (or add) this rank's part of the sum over ranks into `out`."""

    def all_reduce(self, tensor: torch.Tensor, group: comm.Group, *, caller: str) -> comm.Pending:
        """Replace `tensor` by its sum over ranks."""


class Dense:
    """Every element travels as it is."""

    def all_gather(
        self, out: torch.Tensor, shard: torch.Tensor, group: comm.Group, *, caller: str
    ) -> comm.Pending:
        return _pending(comm.all_gather(out, shard, group, caller=caller, async_op=True))

    def reduce_scatter(
        self,
        out: torch.Tensor,
        full: torch.Tensor,
        group: comm.Group,
        *,
        accumulate: bool,
        caller: str,
    ) -> comm.Pending:
        return _pending(
            comm.reduce_scatter(
                out, full, group, accumulate=accumulate, caller=caller, async_op=True
            )
        )

    def all_reduce(self, tensor: torch.Tensor, group: comm.Group, *, caller: str) -> comm.Pending:
        return _pending(comm.all_reduce(tensor, group, caller=caller, async_op=True))


def _pending(handle: comm.Pending | None) -> comm.Pending:
    assert handle is not None
    return handle
