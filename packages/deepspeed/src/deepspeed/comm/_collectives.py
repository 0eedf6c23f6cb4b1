"""torch.distributed's collectives by their own signatures, done by ds_core.comm.

Groups are torch's, ranks (src, dst) global ones. A rank that is not in the group takes no part, and
gets None. The ledger counts with the `log_name` that the program gives as caller. `prof` and
`debug`, which the original takes for its log, make no difference: `configure` sets the log up.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from deepspeed.comm._groups import ProcessGroup, group_of, rank_in
from deepspeed.comm._handle import Handle, finished
from deepspeed.comm.reduce_op import ReduceOp, name_of
from ds_core import comm
from ds_core.errors import CommError

Tensor = torch.Tensor
#: Who the ledger says a collective was for, where the program gives no name.
PROGRAM = "program"


@torch.no_grad()
def all_reduce(
    tensor: Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Replace `tensor` by its reduction over the ranks."""
    ours = group_of(group)
    if ours is None:
        return None
    word = name_of(op)
    return finished(
        comm.all_reduce(tensor, ours, op=word, caller=log_name, async_op=async_op), async_op
    )


def inference_all_reduce(
    tensor: Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """The same as `all_reduce`."""
    return all_reduce(tensor, op, group, async_op, prof, log_name, debug)


@torch.no_grad()
def all_reduce_coalesced(
    tensors: Sequence[Tensor],
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Replace every tensor by its reduction over the ranks, in one message per dtype."""
    ours = group_of(group)
    if ours is None:
        return None
    word = name_of(op)
    return finished(
        comm.all_reduce_coalesced(tensors, ours, op=word, caller=log_name, async_op=async_op),
        async_op,
    )


@torch.no_grad()
def broadcast(
    tensor: Tensor,
    src: int,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Replace `tensor` by that of global rank `src`."""
    ours = group_of(group)
    if ours is None:
        return None
    source = rank_in(ours, src, "broadcast")
    return finished(
        comm.broadcast(tensor, ours, source=source, caller=log_name, async_op=async_op), async_op
    )


@torch.no_grad()
def reduce(
    tensor: Tensor,
    dst: int,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Replace `tensor` of global rank `dst` by the reduction over the ranks."""
    ours = group_of(group)
    if ours is None:
        return None
    to, word = rank_in(ours, dst, "reduce"), name_of(op)
    return finished(
        comm.reduce(tensor, ours, to=to, op=word, caller=log_name, async_op=async_op), async_op
    )


@torch.no_grad()
def all_gather(
    tensor_list: Sequence[Tensor],
    tensor: Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Fill `tensor_list[r]` with the `tensor` of rank r, whatever the size of each."""
    ours = group_of(group)
    if ours is None:
        return None
    return finished(
        comm.all_gather_uneven(tensor_list, tensor, ours, caller=log_name, async_op=async_op),
        async_op,
    )


@torch.no_grad()
def all_gather_into_tensor(
    output_tensor: Tensor,
    tensor: Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Fill `output_tensor` with every rank's `tensor`, in rank order."""
    ours = group_of(group)
    if ours is None:
        return None
    out, shard = output_tensor.view(-1), tensor.reshape(-1)
    return finished(comm.all_gather(out, shard, ours, caller=log_name, async_op=async_op), async_op)


def allgather_fn(
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    debug: object = None,
) -> Handle | None:
    """The same as `all_gather_into_tensor`."""
    return all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


@torch.no_grad()
def all_gather_coalesced(
    output_tensors: Sequence[Tensor],
    input_tensors: Sequence[Tensor],
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> Handle | None:
    """`all_gather_into_tensor` for each pair, in one message per dtype."""
    ours = group_of(group)
    if ours is None:
        return None
    pending = comm.all_gather_coalesced(
        output_tensors, input_tensors, ours, caller=PROGRAM, async_op=async_op
    )
    return finished(pending, async_op)


@torch.no_grad()
def reduce_scatter(
    output: Tensor,
    input_list: Sequence[Tensor],
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Put into `output` the reduction of every rank's `input_list[rank]`, added in rank order."""
    ours = group_of(group)
    if ours is None:
        return None
    word = name_of(op)
    pending = comm.reduce_scatter_uneven(
        output, input_list, ours, op=word, caller=log_name, async_op=async_op
    )
    return finished(pending, async_op)


@torch.no_grad()
def reduce_scatter_tensor(
    output_tensor: Tensor,
    tensor: Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Put into `output_tensor` this rank's 1/N of the reduction of every rank's `tensor`."""
    ours = group_of(group)
    if ours is None:
        return None
    out, full, word = output_tensor.view(-1), tensor.reshape(-1), name_of(op)
    return finished(
        comm.reduce_scatter(out, full, ours, op=word, caller=log_name, async_op=async_op), async_op
    )


def reduce_scatter_fn(
    output_tensor: Tensor,
    tensor: Tensor,
    op: Any = ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    debug: object = None,
) -> Handle | None:
    """The same as `reduce_scatter_tensor`."""
    return reduce_scatter_tensor(output_tensor, tensor, op, group, async_op)


@torch.no_grad()
def all_to_all_single(
    output: Tensor,
    tensor: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Send rows of `tensor` to each rank, and receive theirs into `output`, in rank order.

    Split sizes are in rows; none: equal ones.
    """
    ours = group_of(group)
    if ours is None:
        return None
    if not output_split_sizes and not input_split_sizes:
        out, full = output.view(-1), tensor.reshape(-1)
        pending = comm.all_to_all(out, full, ours, caller=log_name, async_op=async_op)
    else:
        pending = comm.all_to_all_uneven(
            output,
            tensor.contiguous(),
            ours,
            recv_sizes=output_split_sizes or _even(output, ours.size),
            send_sizes=input_split_sizes or _even(tensor, ours.size),
            caller=log_name,
            async_op=async_op,
        )
    return finished(pending, async_op)


@torch.no_grad()
def all_to_all(
    output_tensor_list: Sequence[Tensor],
    input_tensor_list: Sequence[Tensor],
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Send `input_tensor_list[r]` to rank r, and receive `output_tensor_list[r]` from it."""
    ours = group_of(group)
    if ours is None:
        return None
    full = torch.cat([tensor.reshape(-1) for tensor in input_tensor_list])
    sizes = [tensor.numel() for tensor in output_tensor_list]
    out = full.new_empty(sum(sizes))
    pending = comm.all_to_all_uneven(
        out,
        full,
        ours,
        recv_sizes=sizes,
        send_sizes=[tensor.numel() for tensor in input_tensor_list],
        caller=log_name,
        async_op=async_op,
    )

    def unpack() -> None:
        _copy_parts(output_tensor_list, out.split(sizes))

    return finished(pending, async_op, unpack)


@torch.no_grad()
def gather(
    tensor: Tensor,
    gather_list: Sequence[Tensor] | None = None,
    dst: int = 0,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Fill `gather_list[r]` of global rank `dst` with the `tensor` of rank r."""
    ours = group_of(group)
    if ours is None:
        return None
    to, out = rank_in(ours, dst, "gather"), None
    if ours.rank == to:
        parts = _required(gather_list, "gather", "gather_list", dst, ours.size)
        out = tensor.new_empty((ours.size, *tensor.shape))
    pending = comm.gather(out, tensor, ours, to=to, caller=log_name, async_op=async_op)

    def unpack() -> None:
        if out is not None:
            _copy_parts(parts, out)

    return finished(pending, async_op, unpack)


@torch.no_grad()
def scatter(
    tensor: Tensor,
    scatter_list: Sequence[Tensor] | None = None,
    src: int = 0,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Put into `tensor` the item of `scatter_list` of global rank `src` that is this rank's."""
    ours = group_of(group)
    if ours is None:
        return None
    source, full = rank_in(ours, src, "scatter"), None
    if ours.rank == source:
        parts = _required(scatter_list, "scatter", "scatter_list", src, ours.size)
        full = torch.stack(list(parts))
    return finished(
        comm.scatter(tensor, full, ours, source=source, caller=log_name, async_op=async_op),
        async_op,
    )


def barrier(
    group: ProcessGroup | None = None,
    async_op: bool = False,
    device_ids: object = None,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Return once every rank of the group has arrived; with async_op, the handle's `wait` does."""
    ours = group_of(group)
    if ours is None:
        return None
    if not async_op:
        comm.barrier(ours, caller=log_name)
        return None
    # What needs something of every rank ends when all have arrived.
    token = torch.zeros(1, device=ours.control_device())
    return Handle(comm.all_reduce(token, ours, caller=log_name, async_op=True))


def monitored_barrier(
    group: ProcessGroup | None = None,
    timeout: timedelta | None = None,
    wait_all_ranks: bool = False,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> None:
    """Return once every rank has arrived, or raise CommError naming all that have not."""
    ours = group_of(group)
    if ours is not None:
        limit = timeout or ours.timeout or timedelta(seconds=30)
        comm.monitored_barrier(ours, timeout_s=limit.total_seconds(), caller=log_name)


def broadcast_object_list(
    object_list: list[Any],
    src: int,
    group: ProcessGroup | None = None,
    device: object = None,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> None:
    """Replace the items of `object_list` by those of global rank `src`."""
    ours = group_of(group)
    if ours is not None:
        source = rank_in(ours, src, "broadcast_object_list")
        found = comm.broadcast_object(object_list, ours, source=source, caller=log_name)
        object_list[:] = found


def all_gather_object(
    object_list: list[Any],
    obj: Any,
    group: ProcessGroup | None = None,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> None:
    """Replace the items of `object_list` by the `obj` of every rank."""
    ours = group_of(group)
    if ours is not None:
        object_list[:] = comm.all_gather_object(obj, ours, caller=log_name)


def has_all_gather_into_tensor() -> bool:
    """True."""
    return True


def has_reduce_scatter_tensor() -> bool:
    """True."""
    return True


def has_all_reduce_coalesced() -> bool:
    """True."""
    return True


def has_coalescing_manager() -> bool:
    """True: all_gather_coalesced and all_reduce_coalesced send one message per dtype."""
    return True


def _even(tensor: Tensor, size: int) -> list[int]:
    return [tensor.shape[0] // size] * size


def _required(
    parts: Sequence[Tensor] | None, operation: str, name: str, rank: int, size: int
) -> Sequence[Tensor]:
    if parts is None or len(parts) != size:
        got = "None" if parts is None else f"{len(parts)} tensors"
        raise CommError(
            f"{operation}: {name}: got {got} on rank {rank}, expected {size} tensors, one per rank"
        )
    return parts


def _copy_parts(targets: Sequence[Tensor], parts: Any) -> None:
    with torch.no_grad():
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part.view(target.shape))
