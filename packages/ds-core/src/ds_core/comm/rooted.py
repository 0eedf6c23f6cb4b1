"""Collectives with one rank at their root: broadcast, reduce, gather, scatter.

What is counted is what must leave each rank: (N-1) tensors or shards from the source of a
broadcast or scatter, one tensor or shard from every rank but the receiver of a reduce or gather.
Each returns a `Pending` when `async_op` is true, else None once complete. Collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_core.comm.collectives import check_fit
from ds_core.comm.group import Group
from ds_core.comm.pending import Finish, Pending, run
from ds_core.comm.reduction import backend_op
from ds_core.errors import CommError


def broadcast(
    tensor: torch.Tensor,
    group: Group,
    *,
    source: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Replace `tensor` (contiguous) by that of rank `source` of the group."""
    _check_root("broadcast", "source", source, group, caller)
    size = tensor.numel() * tensor.element_size()

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        options = dist.BroadcastOptions()
        options.rootRank = source
        return [group.pg.broadcast([tensor], options)], None

    return run(
        "broadcast",
        group,
        caller,
        start,
        async_op,
        tensors=tensor,
        detail=f"source {source}",
        sent_bytes=size * (group.size - 1) if group.rank == source else 0,
        message_bytes=size,
    )


def reduce(
    tensor: torch.Tensor,
    group: Group,
    *,
    to: int = 0,
    op: str = "sum",
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Replace `tensor` (contiguous) on rank `to` of the group by its reduction over the ranks.

    Elsewhere it is unchanged. op: see `all_reduce`.
    """
    _check_root("reduce", "to", to, group, caller)
    backend = backend_op(op, "reduce", caller, tensor.dtype)
    is_root = group.rank == to

    def start() -> tuple[Sequence[Any], Finish]:
        assert group.pg is not None
        options = dist.ReduceOptions()
        options.rootRank, options.reduceOp = to, backend
        # gloo keeps its running sums in the tensors of all ranks.
        scratch = tensor.clone() if group.backend == "gloo" and not is_root else tensor
        work = group.pg.reduce([scratch], options)
        divides = op == "mean" and is_root
        return [work], (lambda: _divide(tensor, group.size)) if divides else None

    size = tensor.numel() * tensor.element_size()
    return run(
        "reduce",
        group,
        caller,
        start,
        async_op,
        tensors=tensor,
        detail=f"{op} to {to}",
        sent_bytes=0 if is_root else size,
        message_bytes=size,
        empty=size == 0,
    )


def gather(
    out: torch.Tensor | None,
    shard: torch.Tensor,
    group: Group,
    *,
    to: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Fill `out` of rank `to` of the group with every rank's `shard`, in rank order.

    shard: `[S]` contiguous; out: `[N * S]` contiguous, same dtype, on rank `to`; else ignored.
    """
    _check_root("gather", "to", to, group, caller)
    shard_bytes = shard.numel() * shard.element_size()
    parts: list[torch.Tensor] = []
    if group.rank == to:
        out = _present(out, "gather", "out", to, caller)
        check_fit(out.numel() == shard.numel() * group.size, "gather", caller, group, out, shard)
        parts = list(out.view(group.size, *shard.shape).unbind())
        if group.size == 1:
            parts[0].copy_(shard)

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        options = dist.GatherOptions()
        options.rootRank = to
        return [group.pg.gather([parts] if parts else [], [shard], options)], None

    return run(
        "gather",
        group,
        caller,
        start,
        async_op,
        tensors=shard,
        detail=f"to {to}",
        sent_bytes=0 if group.rank == to else shard_bytes,
        message_bytes=shard_bytes * group.size,
        empty=shard_bytes == 0,
    )


def scatter(
    out: torch.Tensor,
    full: torch.Tensor | None,
    group: Group,
    *,
    source: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Put into `out` this rank's 1/N of `full` of rank `source` of the group.

    out: `[S]` contiguous; full: `[N * S]` contiguous, same dtype, on rank `source`; else ignored.
    """
    _check_root("scatter", "source", source, group, caller)
    shard_bytes = out.numel() * out.element_size()
    parts: list[torch.Tensor] = []
    if group.rank == source:
        full = _present(full, "scatter", "full", source, caller)
        check_fit(full.numel() == out.numel() * group.size, "scatter", caller, group, out, full)
        parts = list(full.view(group.size, *out.shape).unbind())
        if group.size == 1:
            out.copy_(parts[0])

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        options = dist.ScatterOptions()
        options.rootRank = source
        return [group.pg.scatter([out], [parts] if parts else [], options)], None

    return run(
        "scatter",
        group,
        caller,
        start,
        async_op,
        tensors=out,
        detail=f"source {source}",
        sent_bytes=shard_bytes * (group.size - 1) if group.rank == source else 0,
        message_bytes=shard_bytes * group.size,
        empty=shard_bytes == 0,
    )


def _check_root(op: str, name: str, root: int, group: Group, caller: str) -> None:
    if not 0 <= root < group.size:
        raise CommError(
            f"{op} of {caller or 'the caller'}: {name}: got {root}, expected a rank of the group, "
            f"0 to {group.size - 1}"
        )


def _present(
    tensor: torch.Tensor | None, op: str, name: str, root: int, caller: str
) -> torch.Tensor:
    if tensor is None:
        raise CommError(
            f"{op} of {caller or 'the caller'}: {name}: got None on rank {root}, which must pass "
            f"a tensor"
        )
    return tensor


def _divide(tensor: torch.Tensor, divisor: int) -> None:
    with torch.no_grad():
        tensor.div_(divisor)
