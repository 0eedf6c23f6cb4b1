"""Collectives on several tensors at once, in one message per dtype.

The tensors are packed into one buffer, which costs a copy and saves the latency of a message for
each. The ledger counts them as the operation itself. Each returns a `Pending` when `async_op` is
true, else None once complete. Collective: equal shapes and dtypes on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ds_core.comm.collectives import all_gather, all_reduce, check_fit, reduce_scatter
from ds_core.comm.group import Group
from ds_core.comm.pending import Pending
from ds_core.errors import CommError


class _Several(Pending):
    """Several collectives that are waited for together."""

    __slots__ = ("_parts",)

    def __init__(self, op: str, group: Group, caller: str, unpack: Callable[[], None]) -> None:
        super().__init__(op, group, caller, (), unpack)
        self._parts: list[Pending] = []

    def add(self, pending: Pending | None) -> None:
        if pending is not None:
            self._parts.append(pending)

    def is_complete(self) -> bool:
        return all(part.is_complete() for part in self._parts)

    def wait(self) -> None:
        for part in self._parts:
            part.wait()
        super().wait()


def all_reduce_coalesced(
    tensors: Sequence[torch.Tensor],
    group: Group,
    *,
    op: str = "sum",
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Replace every tensor by its reduction over the ranks. op: see `all_reduce`."""
    runs = _by_dtype(tensors)
    flats = [torch.cat([tensors[i].reshape(-1) for i in run]) for run in runs]

    def unpack() -> None:
        for run, flat in zip(runs, flats, strict=True):
            pieces = flat.split([tensors[i].numel() for i in run])
            for i, piece in zip(run, pieces, strict=True):
                tensors[i].copy_(piece.view(tensors[i].shape))

    several = _Several("all_reduce", group, caller, unpack)
    for flat in flats:
        several.add(all_reduce(flat, group, op=op, caller=caller, async_op=True))
    return _finished(several, async_op)


def all_gather_coalesced(
    outs: Sequence[torch.Tensor],
    shards: Sequence[torch.Tensor],
    group: Group,
    *,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Fill each `outs[i]` with every rank's `shards[i]`, in rank order.

    outs[i]: `[N * S_i]`; shards[i]: `[S_i]`, same dtype.
    """
    _check_pairs("all_gather_coalesced", outs, shards, group, caller)
    runs = _by_dtype(shards)
    flats = [torch.cat([shards[i].reshape(-1) for i in run]) for run in runs]
    wholes = [flat.new_empty(group.size * flat.numel()) for flat in flats]

    def unpack() -> None:
        for run, whole in zip(runs, wholes, strict=True):
            pieces = whole.view(group.size, -1).split([shards[i].numel() for i in run], dim=1)
            for i, piece in zip(run, pieces, strict=True):
                outs[i].view(group.size, -1).copy_(piece)

    several = _Several("all_gather", group, caller, unpack)
    for whole, flat in zip(wholes, flats, strict=True):
        several.add(all_gather(whole, flat, group, caller=caller, async_op=True))
    return _finished(several, async_op)


def reduce_scatter_coalesced(
    outs: Sequence[torch.Tensor],
    fulls: Sequence[torch.Tensor],
    group: Group,
    *,
    op: str = "sum",
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Put into each `outs[i]` this rank's 1/N of the reduction of every rank's `fulls[i]`.

    fulls[i]: `[N * S_i]`, unchanged; outs[i]: `[S_i]`. op: see `all_reduce`.
    """
    _check_pairs("reduce_scatter_coalesced", fulls, outs, group, caller)
    runs = _by_dtype(fulls)
    flats = [
        torch.cat([fulls[i].reshape(group.size, -1) for i in run], dim=1).view(-1) for run in runs
    ]
    owns = [flat.new_empty(flat.numel() // group.size) for flat in flats]

    def unpack() -> None:
        for run, own in zip(runs, owns, strict=True):
            pieces = own.split([outs[i].numel() for i in run])
            for i, piece in zip(run, pieces, strict=True):
                outs[i].copy_(piece.view(outs[i].shape))

    several = _Several("reduce_scatter", group, caller, unpack)
    for own, flat in zip(owns, flats, strict=True):
        several.add(reduce_scatter(own, flat, group, op=op, caller=caller, async_op=True))
    return _finished(several, async_op)


def _by_dtype(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Indices of the tensors of each dtype and device, in order of first appearance."""
    runs: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, tensor in enumerate(tensors):
        runs.setdefault((tensor.dtype, tensor.device), []).append(index)
    return list(runs.values())


def _check_pairs(
    op: str,
    wholes: Sequence[torch.Tensor],
    shards: Sequence[torch.Tensor],
    group: Group,
    caller: str,
) -> None:
    if len(wholes) != len(shards):
        raise CommError(
            f"{op} of {caller or 'the caller'}: got {len(wholes)} whole tensors and "
            f"{len(shards)} shards, expected as many"
        )
    for whole, shard in zip(wholes, shards, strict=True):
        check_fit(whole.numel() == shard.numel() * group.size, op, caller, group, whole, shard)


def _finished(several: _Several, async_op: bool) -> Pending | None:
    if async_op:
        return several
    several.wait()
    return None
