"""Python values between ranks, for control information: pickled, and not counted.

They come from the ranks of this job, which run the same program: nothing else may unpickle.
Collective: all ranks of the group must call, in the same order.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ds_core.comm.group import Group
from ds_core.comm.pending import run_control, wait_for_collective
from ds_core.errors import CommError


def all_gather_object(value: Any, group: Group, *, caller: str = "") -> list[Any]:
    """Every rank's `value`, in rank order."""
    if group.size == 1:
        return [value]
    device = group.control_device()
    mine = _pickled(value)
    everybody: list[Any] = []

    def gather(pg: dist.ProcessGroup) -> None:
        sizes = _all_sizes(mine, group, pg, device)
        longest = max(sizes)
        padded = F.pad(mine, (0, longest - mine.numel())).to(device)
        out = torch.empty(group.size * longest, dtype=torch.uint8, device=device)
        wait_for_collective(pg._allgather_base(out, padded), group)
        parts = out.view(group.size, longest).cpu()
        everybody.extend(_unpickled(part[:size]) for part, size in zip(parts, sizes, strict=True))

    run_control("all_gather_object", group, caller, gather)
    return everybody


def broadcast_object(value: Any, group: Group, *, source: int = 0, caller: str = "") -> Any:
    """The `value` of rank `source` of the group."""
    if group.size == 1:
        return value
    device = group.control_device()
    is_source = group.rank == source
    data = _pickled(value) if is_source else torch.empty(0, dtype=torch.uint8)
    received: list[torch.Tensor] = []

    def pass_on(pg: dist.ProcessGroup) -> None:
        size = torch.tensor([data.numel()], device=device)
        options = dist.BroadcastOptions()
        options.rootRank = source
        wait_for_collective(pg.broadcast([size], options), group)
        out = (data if is_source else data.new_empty(int(size))).to(device)
        wait_for_collective(pg.broadcast([out], options), group)
        received.append(out.cpu())

    run_control("broadcast_object", group, caller, pass_on, f"source {source}")
    return value if is_source else _unpickled(received[0])


def gather_object(value: Any, group: Group, *, to: int = 0, caller: str = "") -> list[Any] | None:
    """Every rank's `value`, in rank order, on rank `to` of the group; None elsewhere."""
    if group.size == 1:
        return [value]
    device = group.control_device()
    mine = _pickled(value)
    everybody: list[Any] = []

    def gather(pg: dist.ProcessGroup) -> None:
        sizes = _all_sizes(mine, group, pg, device)
        longest = max(sizes)
        padded = F.pad(mine, (0, longest - mine.numel())).to(device)
        is_root = group.rank == to
        parts = [torch.empty_like(padded) for _ in sizes] if is_root else []
        options = dist.GatherOptions()
        options.rootRank = to
        wait_for_collective(pg.gather([parts] if parts else [], [padded], options), group)
        everybody.extend(
            _unpickled(part.cpu()[:size]) for part, size in zip(parts, sizes, strict=False)
        )

    run_control("gather_object", group, caller, gather, f"to {to}")
    return everybody if group.rank == to else None


def scatter_object(
    values: Sequence[Any] | None, group: Group, *, source: int = 0, caller: str = ""
) -> Any:
    """The item of `values` of rank `source` of the group that is this rank's.

    values: one per rank, on rank `source`; else ignored.
    """
    is_source = group.rank == source
    if is_source and (values is None or len(values) != group.size):
        got = "None" if values is None else f"{len(values)} values"
        raise CommError(
            f"scatter_object of {caller or 'the caller'}: got {got} on rank {source}, expected one "
            f"for each of the {group.size} ranks"
        )
    if group.size == 1:
        assert values is not None
        return values[0]
    device = group.control_device()
    data = [_pickled(value) for value in values] if is_source and values is not None else []
    received: list[torch.Tensor] = []

    def scatter(pg: dist.ProcessGroup) -> None:
        sizes = torch.tensor([part.numel() for part in data] or [0] * group.size, device=device)
        share = dist.BroadcastOptions()
        share.rootRank = source
        wait_for_collective(pg.broadcast([sizes], share), group)
        longest = int(sizes.max())
        parts = [F.pad(part, (0, longest - part.numel())).to(device) for part in data]
        out = torch.empty(longest, dtype=torch.uint8, device=device)
        options = dist.ScatterOptions()
        options.rootRank = source
        wait_for_collective(pg.scatter([out], [parts] if parts else [], options), group)
        received.append(out.cpu()[: int(sizes[group.rank])])

    run_control("scatter_object", group, caller, scatter, f"source {source}")
    return _unpickled(received[0])


def _all_sizes(
    mine: torch.Tensor, group: Group, pg: dist.ProcessGroup, device: torch.device
) -> list[int]:
    sizes = torch.zeros(group.size, dtype=torch.int64, device=device)
    own_size = torch.tensor([mine.numel()], device=device)
    wait_for_collective(pg._allgather_base(sizes, own_size), group)
    return [int(size) for size in sizes.tolist()]


def _pickled(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpickled(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())
