"""Collectives whose parts have different sizes on different ranks.

Each returns a `Pending` when `async_op` is true, else None once complete. Collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_core.comm.collectives import check_fit
from ds_core.comm.direct import exchange_parts
from ds_core.comm.failure import Call, sequence_differs
from ds_core.comm.group import Group
from ds_core.comm.pending import Finish, Pending, run, wait_for_collective
from ds_core.comm.reduction import backend_op, reduce_in_rank_order
from ds_core.errors import CommError


def all_gather_uneven(
    outs: Sequence[torch.Tensor],
    shard: torch.Tensor,
    group: Group,
    *,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Fill `outs[r]` with the shard of rank r, whatever the size of each.

    outs: one contiguous tensor per rank, sizes equal on all ranks; shard: as many elements as
    `outs[rank]`, which it may be. Sends (N-1) shards.
    """
    _check_count("all_gather_uneven", outs, group, caller)
    own = outs[group.rank]
    check_fit(own.numel() == shard.numel(), "all_gather_uneven", caller, group, own, shard)
    if own.data_ptr() != shard.data_ptr():
        own.copy_(shard.view_as(own))
    direct = group.backend == "gloo" and group.check is None

    def start() -> tuple[Sequence[Any], None]:
        if direct:
            return exchange_parts(group, lambda peer: own, lambda peer: outs[peer]), None
        assert group.pg is not None
        works = []
        for source, part in enumerate(outs):
            options = dist.BroadcastOptions()
            options.rootRank = source
            if part.numel():
                works.append(group.pg.broadcast([part], options))
        return works, None

    return run(
        "all_gather_uneven",
        group,
        caller,
        start,
        async_op,
        tensors=list(outs),
        sent_bytes=(group.size - 1) * own.nbytes,
        message_bytes=sum(part.nbytes for part in outs),
        direct=direct,
        empty=all(part.numel() == 0 for part in outs),
    )


def reduce_scatter_uneven(
    out: torch.Tensor,
    parts: Sequence[torch.Tensor],
    group: Group,
    *,
    op: str = "sum",
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Put into `out` the reduction of every rank's `parts[rank]`, whatever the size of each.

    parts: one contiguous tensor per rank, unchanged, sizes equal on all ranks; out: as many
    elements as `parts[rank]`, same dtype, not overlapping. Added in rank order, in fp32 on gloo.
    Sends the parts of the others.
    """
    _check_count("reduce_scatter_uneven", parts, group, caller)
    backend = backend_op(op, "reduce_scatter_uneven", caller, out.dtype)
    own = parts[group.rank]
    check_fit(own.numel() == out.numel(), "reduce_scatter_uneven", caller, group, out, own)
    if group.size == 1:
        out.copy_(own.view_as(out))
    direct = group.backend == "gloo" and group.check is None
    sizes = [part.numel() for part in parts]

    def start_exchange() -> tuple[Sequence[Any], Finish]:
        assert group.pg is not None
        received = list(out.new_empty(group.size, own.numel()))
        if direct:
            received[group.rank] = own.view(-1)
            works = exchange_parts(group, lambda p: parts[p], lambda p: received[p])
        else:
            outgoing = torch.cat([part.view(-1) for part in parts])
            incoming = out.new_empty(group.size * own.numel())
            received = list(incoming.view(group.size, -1))
            splits = [own.numel()] * group.size
            works = [group.pg.alltoall_base(incoming, outgoing, splits, sizes)]

        def finish() -> None:
            if own.numel():
                reduce_in_rank_order(out.view(-1), received, torch.empty_like(received[0]), op=op)

        return works, finish

    def start_native() -> tuple[Sequence[Any], Finish]:
        assert group.pg is not None
        works = []
        # The backend may keep running sums in what it reduces.
        scratch = [part.clone() for part in parts]
        for root, part in enumerate(scratch):
            options = dist.ReduceOptions()
            options.rootRank, options.reduceOp = root, backend
            if part.numel():
                works.append(group.pg.reduce([part], options))

        def finish() -> None:
            mine = scratch[group.rank].view_as(out)
            out.copy_(mine.div_(group.size) if op == "mean" else mine)

        return works, finish

    whole = sum(part.nbytes for part in parts)
    return run(
        "reduce_scatter_uneven",
        group,
        caller,
        start_exchange if group.backend == "gloo" else start_native,
        async_op,
        tensors=list(parts),
        detail=op,
        sent_bytes=whole - own.nbytes,
        message_bytes=whole,
        direct=direct,
        empty=whole == 0,
    )


def all_to_all_uneven(
    out: torch.Tensor,
    full: torch.Tensor,
    group: Group,
    *,
    recv_sizes: Sequence[int],
    send_sizes: Sequence[int],
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Send the first `send_sizes[0]` rows of `full` to rank 0, the next to rank 1, and so on.

    out, full: contiguous, same dtype and row shape, not overlapping; rows are along the first
    dimension. `out` receives `recv_sizes[r]` rows of rank r, in rank order: what rank r sends
    here. Sends all rows but this rank's own.
    """
    name = "all_to_all_uneven"
    _check_sizes(name, "send_sizes", send_sizes, full, group, caller)
    _check_sizes(name, "recv_sizes", recv_sizes, out, group, caller)
    parts_in, parts_out = full.split(list(send_sizes)), out.split(list(recv_sizes))
    own = parts_in[group.rank]
    if own.shape != parts_out[group.rank].shape:
        raise CommError(
            f"{name} of {caller or 'the caller'}: this rank sends itself {list(own.shape)} and "
            f"expects {list(parts_out[group.rank].shape)} of itself"
        )
    direct = group.backend == "gloo" and group.check is None
    if direct or group.size == 1:
        parts_out[group.rank].copy_(own)

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        if group.check is not None:
            _compare_sizes(group, caller, send_sizes, recv_sizes)
        if not direct:
            splits = list(recv_sizes), list(send_sizes)
            return [group.pg.alltoall_base(out, full, *splits)], None
        return exchange_parts(group, lambda p: parts_in[p], lambda p: parts_out[p]), None

    return run(
        name,
        group,
        caller,
        start,
        async_op,
        detail=f"{str(full.dtype).removeprefix('torch.')} rows of {list(full.shape[1:])}",
        sent_bytes=full.nbytes - own.nbytes,
        message_bytes=full.nbytes,
        direct=direct,
    )


def _compare_sizes(
    group: Group, caller: str, send_sizes: Sequence[int], recv_sizes: Sequence[int]
) -> None:
    """With the check on: raise CommError if others send other sizes than are expected here."""
    assert group.pg is not None
    device = group.control_device()
    mine = torch.tensor(list(send_sizes), device=device)
    theirs = torch.empty_like(mine)
    wait_for_collective(group.pg.alltoall_base(theirs, mine, [], []), group)
    for rank, (sent, expected) in enumerate(zip(theirs.tolist(), recv_sizes, strict=True)):
        if sent != expected:
            call = Call("all_to_all_uneven", caller)
            calls = {
                group.ranks[group.rank]: f"expects {expected} rows of rank {group.ranks[rank]}",
                group.ranks[rank]: f"sends {sent} rows",
            }
            raise sequence_differs(call, group.num_started, group, calls)


def _check_count(op: str, tensors: Sequence[torch.Tensor], group: Group, caller: str) -> None:
    if len(tensors) != group.size:
        raise CommError(
            f"{op} of {caller or 'the caller'}: got {len(tensors)} tensors, expected one for each "
            f"of the {group.size} ranks"
        )


def _check_sizes(
    op: str, name: str, sizes: Sequence[int], tensor: torch.Tensor, group: Group, caller: str
) -> None:
    rows = tensor.shape[0] if tensor.dim() else 0
    if len(sizes) != group.size or sum(sizes) != rows or min(sizes, default=0) < 0:
        raise CommError(
            f"{op} of {caller or 'the caller'}: {name}: got {list(sizes)}, expected {group.size} "
            f"sizes that add up to {rows}, the rows of the tensor"
        )
