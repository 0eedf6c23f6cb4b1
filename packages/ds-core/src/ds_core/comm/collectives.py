"""Collectives over a `Group`: optimal in bytes, counted, and explicit about who failed.

gloo's own reduce-scatter moves as much as a full all-reduce. Here reduce-scatter on gloo is an
all-to-all and a sum in fp32, and all-gather is direct messages: each rank sends to each other rank
only what that rank lacks, which is the optimal (N-1)/N of the tensor. Other backends (NCCL, ...)
use their own collectives, which are optimal already.

Every function returns a `Pending` when `async_op` is true, else None once complete.
Collective: all ranks of `group` must call, with equal shapes and dtypes, in the same order.
"""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ds_core.comm.group import Group
from ds_core.comm.ledger import Span
from ds_core.errors import CommError

# On gloo, below this one collective costs less than the handshakes of N-1 direct messages; above,
# the copy of its own part that gloo makes costs more. Both move the same bytes.
_SMALL_BYTES = 1 << 16

#: How often a rank that waits asks whether others have reported a failure.
NEWS_S = 1.0

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


class Pending:
    """A collective under way; `wait()` completes it. Waiting twice is harmless."""

    __slots__ = ("_caller", "_finish", "_group", "_op", "_works")

    def __init__(
        self,
        op: str,
        group: Group,
        caller: str,
        works: Sequence[Any],
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._op, self._group, self._caller = op, group, caller
        self._works: Sequence[Any] = works
        self._finish = finish

    def is_complete(self) -> bool:
        """Whether `wait` would return at once.

        Direct messages on gloo cannot tell before they are waited for, and count as incomplete.
        """
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Block until the result is in place (on a GPU: until the current stream will see it).

        Raises CommError naming operation, group, caller and the ranks that stopped answering.
        """
        works, self._works = self._works, ()
        try:
            for work in works:
                if len(works) == 1 and self._op not in ("send", "recv"):
                    _wait_for_collective(work, self._group)
                else:
                    work.wait()
        except RuntimeError as error:
            raise _failure(self._op, self._group, self._caller, error) from error
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class _Watched(Pending):
    """A pending collective whose completion is told to the ledger's listeners."""

    __slots__ = ("_done_ns", "_issued_ns", "_sent_bytes")

    def __init__(
        self,
        op: str,
        group: Group,
        caller: str,
        works: Sequence[Any],
        finish: Callable[[], None] | None,
        sent_bytes: int,
        issued_ns: int,
    ) -> None:
        super().__init__(op, group, caller, works, finish)
        self._sent_bytes, self._issued_ns = sent_bytes, issued_ns
        self._done_ns = 0
        if len(works) == 1 and group.backend == "gloo" and op not in ("send", "recv"):
            works[0].get_future().add_done_callback(self._note_done)

    def _note_done(self, future: Any) -> None:
        self._done_ns = time.perf_counter_ns()

    def wait(self) -> None:
        if not self._works:
            return
        waited_ns = time.perf_counter_ns()
        super().wait()
        span = Span(
            self._op,
            self._group.name,
            self._caller,
            self._group.size,
            self._sent_bytes,
            self._issued_ns,
            waited_ns,
            self._done_ns or time.perf_counter_ns(),
        )
        for listener in self._group.ledger.listeners:
            listener(span)


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
    _check(out.numel() == size * group.size, "all_gather", caller, group, out, shard)
    own = out[group.rank * size : (group.rank + 1) * size]
    if own.data_ptr() != shard.data_ptr():
        own.copy_(shard)
    sent = (group.size - 1) * size * shard.element_size()

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        if group.backend != "gloo" or sent < _SMALL_BYTES:
            return [group.pg._allgather_base(out, own)], None
        tag, parts = group.next_tag(), out.view(group.size, size)
        return _exchange(group, tag, lambda peer: own, lambda peer: parts[peer]), None

    return _run("all_gather", group, caller, sent, start, async_op, empty=size == 0)


def reduce_scatter(
    out: torch.Tensor,
    full: torch.Tensor,
    group: Group,
    *,
    accumulate: bool = False,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Put into `out` this rank's 1/N of the sum of every rank's `full`, added in fp32.

    full: `[N * S]` contiguous, unchanged unless `out` is this rank's slice of it; out: `[S]`, any
    float dtype. With `accumulate`, the sum is added to `out`. The order of addition is by rank,
    whoever computes it. Sends (N-1) * S elements.
    """
    size = full.numel() // max(group.size, 1)
    _check(out.numel() * group.size == full.numel(), "reduce_scatter", caller, group, out, full)
    parts = full.view(group.size, size)
    own = parts[group.rank]
    in_place = own.data_ptr() == out.data_ptr()
    if group.size == 1:
        if not in_place:
            out.add_(own) if accumulate else out.copy_(own)
        return Pending("reduce_scatter", group, caller, ()) if async_op else None
    sent = (group.size - 1) * size * full.element_size()
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
            _sum_in_rank_order(out, received, home, accumulate)

        return [work], finish

    def start_native() -> tuple[Sequence[Any], Callable[[], None] | None]:
        assert group.pg is not None
        target = out if direct else torch.empty_like(own)
        work = group.pg._reduce_scatter_base(target, full, dist.ReduceScatterOptions())

        def finish() -> None:
            if accumulate:
                out.add_(target)
            elif target is not out:
                out.copy_(target)

        return [work], finish

    start = start_exchange if group.backend == "gloo" else start_native
    return _run("reduce_scatter", group, caller, sent, start, async_op, empty=size == 0)


def all_reduce(
    tensor: torch.Tensor,
    group: Group,
    *,
    op: str = "sum",
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Replace `tensor` (contiguous) by its sum, max or min over the ranks.

    Sends 2 (N-1)/N of the tensor.
    """
    if op not in _REDUCE_OPS:
        raise CommError(
            f"all_reduce of {caller or 'the caller'}: op: got {op!r}, expected one of "
            f"{', '.join(_REDUCE_OPS)}"
        )
    sent = 2 * (group.size - 1) * tensor.numel() * tensor.element_size() // group.size

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(_REDUCE_OPS[op])
        return [group.pg.allreduce([tensor], options)], None

    return _run("all_reduce", group, caller, sent, start, async_op, empty=tensor.numel() == 0)


def all_to_all(
    out: torch.Tensor,
    full: torch.Tensor,
    group: Group,
    *,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Send the r-th 1/N of `full` to rank r; `out` receives one part of each rank, in rank order.

    out, full: `[N * S]` contiguous, same dtype, not overlapping. Sends (N-1)/N of `full`.
    """
    _check(out.numel() == full.numel(), "all_to_all", caller, group, out, full)
    size = full.numel() // group.size
    _check(size * group.size == full.numel(), "all_to_all", caller, group, out, full)
    parts_in, parts_out = full.view(group.size, size), out.view(group.size, size)
    parts_out[group.rank].copy_(parts_in[group.rank])
    sent = (group.size - 1) * size * full.element_size()

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        if group.backend != "gloo":
            return [group.pg.alltoall_base(out, full, [], [])], None
        tag = group.next_tag()
        return _exchange(group, tag, lambda p: parts_in[p], lambda p: parts_out[p]), None

    return _run("all_to_all", group, caller, sent, start, async_op, empty=size == 0)


def broadcast(
    tensor: torch.Tensor,
    group: Group,
    *,
    source: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Replace `tensor` (contiguous) by that of rank `source` of the group.

    The source is charged with (N-1) tensors, the least that must leave it in total.
    """
    sent = tensor.numel() * tensor.element_size() * (group.size - 1)

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        options = dist.BroadcastOptions()
        options.rootRank = source
        return [group.pg.broadcast([tensor], options)], None

    return _run("broadcast", group, caller, sent if group.rank == source else 0, start, async_op)


def send(
    tensor: torch.Tensor,
    group: Group,
    *,
    to: int,
    tag: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Send `tensor` to rank `to` of the group, which must call `recv`."""

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        return [group.pg.send([tensor], to, tag)], None

    return _run("send", group, caller, tensor.numel() * tensor.element_size(), start, async_op)


def recv(
    tensor: torch.Tensor,
    group: Group,
    *,
    source: int,
    tag: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Receive into `tensor` what rank `source` of the group sends."""

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        return [group.pg.recv([tensor], source, tag)], None

    return _run("recv", group, caller, 0, start, async_op)


def barrier(group: Group, *, caller: str = "") -> None:
    """Return once every rank of the group has arrived."""

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        return [group.pg.barrier()], None

    _run("barrier", group, caller, 0, start, False)


def all_gather_object(value: Any, group: Group, *, caller: str = "") -> list[Any]:
    """Every rank's `value`, in rank order. For control information: it is pickled, not counted."""
    if group.size == 1:
        return [value]
    device = group.control_device()
    mine = _pickled(value)
    sizes = torch.zeros(group.size, dtype=torch.int64, device=device)
    own_size = torch.tensor([mine.numel()], device=device)
    everybody: list[torch.Tensor] = []

    def gather(pg: dist.ProcessGroup) -> None:
        _wait_for_collective(pg._allgather_base(sizes, own_size), group)
        longest = int(sizes.max())
        padded = F.pad(mine, (0, longest - mine.numel())).to(device)
        out = torch.empty(group.size * longest, dtype=torch.uint8, device=device)
        _wait_for_collective(pg._allgather_base(out, padded), group)
        everybody.extend(out.view(group.size, longest).cpu())

    _run_control("all_gather_object", group, caller, gather)
    return [
        pickle.loads(data[:size].numpy().tobytes())
        for data, size in zip(everybody, sizes.tolist(), strict=True)
    ]


def broadcast_object(value: Any, group: Group, *, source: int = 0, caller: str = "") -> Any:
    """The `value` of rank `source` of the group. For control information, as above."""
    if group.size == 1:
        return value
    device = group.control_device()
    data = _pickled(value) if group.rank == source else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([data.numel()], device=device)
    options = dist.BroadcastOptions()
    options.rootRank = source
    received: list[torch.Tensor] = []

    def pass_on(pg: dist.ProcessGroup) -> None:
        _wait_for_collective(pg.broadcast([size], options), group)
        out = data.new_empty(int(size)) if group.rank != source else data
        out = out.to(device)
        _wait_for_collective(pg.broadcast([out], options), group)
        received.append(out.cpu())

    _run_control("broadcast_object", group, caller, pass_on)
    return value if group.rank == source else pickle.loads(received[0].numpy().tobytes())


def _pickled(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _run_control(
    op: str, group: Group, caller: str, body: Callable[[dist.ProcessGroup], None]
) -> None:
    assert group.pg is not None
    try:
        body(group.pg)
    except RuntimeError as error:
        raise _failure(op, group, caller, error) from error


def _wait_for_collective(work: Any, group: Group) -> None:
    """Wait for the backend, or until another rank reports that it has given up.

    gloo passes data on from rank to rank: one that is no neighbour of a dead rank would otherwise
    wait until its neighbours are gone as well, and be taken for dead itself.
    """
    if group.backend != "gloo":
        work.wait()
        return
    while True:
        try:
            work.wait(timedelta(seconds=NEWS_S))
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # what it ended with, which may be success just after the time
                return
        if group.failed_elsewhere():
            raise RuntimeError("another rank has given up")


def _exchange(
    group: Group,
    tag: int,
    outgoing: Callable[[int], torch.Tensor],
    incoming: Callable[[int], torch.Tensor],
) -> list[Any]:
    """Start sending one tensor to, and receiving one from, every other rank of a gloo group."""
    pg = group.pg
    assert pg is not None
    peers = [(group.rank + step) % group.size for step in range(1, group.size)]
    # Receives first, so that what arrives has a place to land. Peers in rotation, so that
    # not all ranks send to the same one first.
    works: list[Any] = [pg.recv([incoming(peer)], peer, tag) for peer in reversed(peers)]
    works += [pg.send([outgoing(peer)], peer, tag) for peer in peers]
    return works


def _sum_in_rank_order(
    out: torch.Tensor, parts: list[torch.Tensor], home: torch.Tensor, accumulate: bool
) -> None:
    """out = [out +] parts[0] + parts[1] + ..., in fp32 where the parts are less precise.

    `home` holds the running sum of parts that are fp32.
    """
    if parts[0].dtype in _LOW_PRECISION:
        total = parts[0].float().add_(parts[1])
    else:
        total = torch.add(parts[0], parts[1], out=home)
    for part in parts[2:]:
        total.add_(part)
    if accumulate:
        out.add_(total)
    elif total.data_ptr() != out.data_ptr():
        out.copy_(total)


def _run(
    op: str,
    group: Group,
    caller: str,
    sent_bytes: int,
    start: Callable[[], tuple[Sequence[Any], Callable[[], None] | None]],
    async_op: bool,
    empty: bool = False,
) -> Pending | None:
    if group.size == 1 or empty:
        return Pending(op, group, caller, ()) if async_op else None
    ledger = group.ledger
    issued_ns = time.perf_counter_ns() if ledger.listeners else 0
    try:
        works, finish = start()
    except RuntimeError as error:
        raise _failure(op, group, caller, error) from error
    ledger.record(op, group.name, caller, sent_bytes)
    if issued_ns:
        pending: Pending = _Watched(op, group, caller, works, finish, sent_bytes, issued_ns)
    else:
        pending = Pending(op, group, caller, works, finish)
    if async_op:
        return pending
    pending.wait()
    return None


def _failure(op: str, group: Group, caller: str, error: RuntimeError) -> CommError:
    cause = _plain(str(error)) or type(error).__name__
    silent = group.silent_ranks(cause)
    who = (
        f"rank {', '.join(map(str, silent))} stopped answering"
        if silent
        else "every rank is alive, so their order, shapes or dtypes of operations differ"
    )
    return CommError(
        f"{op} of {caller or 'the caller'} in group {group.name!r} (ranks "
        f"{list(group.ranks)}) failed on rank {group.ranks[group.rank]}: {who} ({cause})"
    )


def _plain(message: str) -> str:
    """What the backend said, without its source location and its advice."""
    first = message.strip().partition("\n")[0]
    first = re.sub(r"^\[\S*\.(cc|cpp|h):\d+\]\s*", "", first)
    return first.partition(" This is typically caused by")[0].rstrip(". ")


def _check(
    condition: bool, op: str, caller: str, group: Group, one: torch.Tensor, other: torch.Tensor
) -> None:
    if not condition:
        raise CommError(
            f"{op} of {caller or 'the caller'}: {list(one.shape)} and {list(other.shape)} do not "
            f"fit a group of {group.size} ranks"
        )
