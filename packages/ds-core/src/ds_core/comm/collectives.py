"""Collectives over a `Group`: optimal in bytes, counted, and explicit about who failed.

gloo's own reduce-scatter moves as much as a full all-reduce. Here reduce-scatter on gloo is an
all-to-all and a sum in fp32, and all-gather is direct messages: each rank sends to each other rank
only what that rank lacks, which is the optimal (N-1)/N of the tensor. Other backends (NCCL, ...)
use their own collectives, which are optimal already.

Every function returns a `Pending` when `async_op` is true, else None once complete.
Collective: all ranks of `group` must call, with equal shapes and dtypes, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_core.comm.direct import exchange_parts
from ds_core.comm.group import Group
from ds_core.comm.pending import Finish, Pending, run
from ds_core.comm.reduction import all_reduce_options, backend_op, reduce_in_rank_order
from ds_core.errors import CommError

# On gloo, below this one collective costs less than the handshakes of N-1 direct messages; above,
# the copy of its own part that gloo makes costs more. Both move the same bytes.
_SMALL_BYTES = 1 << 16


def all_gather(
    out: torch.Tensor,
    shard: torch.Tensor,
    group: Group,
    *,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Fill `out` with every rank's `shard`, in rank order.

    out: `[N * S]` contiguous; shard: `[S]`, same dtype; it may be this rank's slice of `out`,
    in which case nothing is copied locally. Sends (N-1) * S elements.
    """
    size = shard.numel()
    check_fit(out.numel() == size * group.size, "all_gather", caller, group, out, shard)
    own = out[group.rank * size : (group.rank + 1) * size]
    if own.data_ptr() != shard.data_ptr():
        own.copy_(shard)
    whole = group.size * size * shard.element_size()
    sent = whole - size * shard.element_size()
    # What can be polled while it is waited for can also be checked.
    direct = group.backend == "gloo" and sent >= _SMALL_BYTES and group.check is None

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        if not direct:
            return [group.pg._allgather_base(out, own)], None
        parts = out.view(group.size, size)
        return exchange_parts(group, lambda peer: own, lambda peer: parts[peer]), None

    return run(
        "all_gather",
        group,
        caller,
        start,
        async_op,
        tensors=shard,
        sent_bytes=sent,
        message_bytes=whole,
        direct=direct,
        empty=size == 0,
    )


def reduce_scatter(
    out: torch.Tensor,
    full: torch.Tensor,
    group: Group,
    *,
    op: str = "sum",
    accumulate: bool = False,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Put into `out` this rank's 1/N of the sum of every rank's `full`, added in fp32.

    full: `[N * S]` contiguous, unchanged unless `out` is this rank's slice of it; out: `[S]`, any
    float dtype. With `accumulate`, the result is added to `out`. op: see `all_reduce`. The order
    of addition is by rank, whoever computes it. Sends (N-1) * S elements.
    """
    backend = backend_op(op, "reduce_scatter", caller, full.dtype)
    size = full.numel() // max(group.size, 1)
    fits = out.numel() * group.size == full.numel()
    check_fit(fits, "reduce_scatter", caller, group, out, full)
    parts = full.view(group.size, size)
    own = parts[group.rank]
    in_place = own.data_ptr() == out.data_ptr()
    if group.size == 1:
        if not in_place:
            out.add_(own) if accumulate else out.copy_(own)
        return Pending("reduce_scatter", group, caller, ()) if async_op else None
    whole = group.size * size * full.element_size()
    direct = out.dtype == full.dtype and not accumulate and not in_place

    def start_exchange() -> tuple[Sequence[Any], Callable[[], None]]:
        assert group.pg is not None
        # At either end of the buffer what goes to others is contiguous without this rank's own
        # part, which then needs no copy; with two ranks the part that comes in lands in the
        # result itself, and no temporary memory is needed at all.
        first, last = group.rank == 0, group.rank == group.size - 1
        skips_own = first or last
        splits = [size] * group.size
        outgoing = full
        if skips_own:
            splits[group.rank] = 0
            outgoing = full[size:] if first else full[:-size]
        incoming = out if direct and group.size == 2 else full.new_empty(sum(splits))
        work = group.pg.alltoall_base(incoming, outgoing, splits, splits)

        def finish() -> None:
            received = list(incoming.view(-1, size))
            if skips_own:
                received.insert(group.rank, own)
            # The running sum may be where no part lies that is added later, and not in `full`.
            in_out = out.dtype == full.dtype and not accumulate
            if in_place and group.rank >= 2:
                in_out = False
            home = out if in_out else received[1 if first else 0]
            reduce_in_rank_order(out, received, home, op=op, accumulate=accumulate)

        return [work], finish

    def start_native() -> tuple[Sequence[Any], Callable[[], None]]:
        assert group.pg is not None
        target = out if direct else torch.empty_like(own)
        options = dist.ReduceScatterOptions()
        options.reduceOp = backend
        work = group.pg._reduce_scatter_base(target, full, options)

        def finish() -> None:
            if op == "mean":
                target.div_(group.size)
            if accumulate:
                out.add_(target)
            elif target is not out:
                out.copy_(target)

        return [work], finish

    return run(
        "reduce_scatter",
        group,
        caller,
        start_exchange if group.backend == "gloo" else start_native,
        async_op,
        tensors=full,
        detail=op,
        sent_bytes=whole - size * full.element_size(),
        message_bytes=whole,
        empty=size == 0,
    )


def all_reduce(
    tensor: torch.Tensor,
    group: Group,
    *,
    op: str = "sum",
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Replace `tensor` (contiguous) by its reduction over the ranks.

    op: "sum", "mean", "max", "min", "product", or of integers "bitwise_and", "bitwise_or",
    "bitwise_xor" where the backend has them (gloo does, NCCL does not). Sends 2 (N-1)/N of the
    tensor.
    """
    backend_op(op, "all_reduce", caller, tensor.dtype)
    options = all_reduce_options(op)
    numel = tensor.numel()
    whole = numel * tensor.element_size()

    def start() -> tuple[Sequence[Any], Finish]:
        assert group.pg is not None
        work = group.pg.allreduce([tensor], options)
        return [work], (lambda: _divide(tensor, group.size)) if op == "mean" else None

    return run(
        "all_reduce",
        group,
        caller,
        start,
        async_op,
        tensors=tensor,
        detail=op,
        sent_bytes=2 * (group.size - 1) * whole // group.size,
        message_bytes=whole,
        empty=numel == 0,
    )


def all_to_all(
    out: torch.Tensor,
    full: torch.Tensor,
    group: Group,
    *,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Send the r-th 1/N of `full` to rank r; `out` receives one part of each rank, in rank order.

    out, full: `[N * S]` contiguous, same dtype, not overlapping. Sends (N-1)/N of `full`. For
    parts of different sizes: `all_to_all_uneven`.
    """
    check_fit(out.numel() == full.numel(), "all_to_all", caller, group, out, full)
    size = full.numel() // group.size
    check_fit(size * group.size == full.numel(), "all_to_all", caller, group, out, full)
    parts_in, parts_out = full.view(group.size, size), out.view(group.size, size)
    direct = group.backend == "gloo" and group.check is None
    if direct or group.size == 1:
        parts_out[group.rank].copy_(parts_in[group.rank])
    whole = full.numel() * full.element_size()

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        if not direct:
            return [group.pg.alltoall_base(out, full, [], [])], None
        return exchange_parts(group, lambda p: parts_in[p], lambda p: parts_out[p]), None

    return run(
        "all_to_all",
        group,
        caller,
        start,
        async_op,
        tensors=full,
        sent_bytes=(group.size - 1) * size * full.element_size(),
        message_bytes=whole,
        direct=direct,
        empty=size == 0,
    )


def check_fit(
    condition: bool, op: str, caller: str, group: Group, one: torch.Tensor, other: torch.Tensor
) -> None:
    """Raise CommError unless two tensors fit each other and the group."""
    if not condition:
        raise CommError(
            f"{op} of {caller or 'the caller'}: {list(one.shape)} and {list(other.shape)} do not "
            f"fit a group of {group.size} ranks"
        )


def _divide(tensor: torch.Tensor, divisor: int) -> None:
    with torch.no_grad():
        tensor.div_(divisor)
