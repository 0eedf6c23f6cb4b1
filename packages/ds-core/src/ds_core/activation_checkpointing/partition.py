"""Saved tensors split over ranks that would all hold the same."""

from __future__ import annotations

import hashlib
from typing import NamedTuple
from weakref import ref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ds_core import comm
from ds_core.activation_checkpointing.buffer_pool import BufferPool
from ds_core.activation_checkpointing.host_offload import MIN_BYTES, HostOffload
from ds_core.activation_checkpointing.layout import Layout
from ds_core.activation_checkpointing.unmoved import Unmoved
from ds_core.errors import DsError

#: Buffers for shards that wait to be used again.
_MAX_FREE = 1024


class Partition:
    """Keeps 1/N of every tensor, and gathers the whole when it is needed.

    Shards have ceil(n / N) elements; a gather sends (N-1)/N of the tensor per rank. The first
    tensor of each layout is compared over the ranks.

    Args:
        group: ranks whose tensors are the same, such as the "tp" axis of a mesh. All of them call
            every method, in the same order.
        offload: where the shards wait; None: on the device.
        reuses_buffers: whether shards on the device lie in buffers that go from step to step, so
            that what lives long does not lie between what lives shortly.
        min_bytes: smaller tensors are kept whole.

    Source: Rajbhandari et al. 2020, "ZeRO", section 6.1 (P_a).
    """

    def __init__(
        self,
        group: comm.Group,
        offload: HostOffload | None = None,
        *,
        reuses_buffers: bool = False,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        self.group = group
        self._offload, self._reuses_buffers, self._min_bytes = offload, reuses_buffers, min_bytes
        self._buffers: dict[torch.device, BufferPool] = {}
        self._compared: set[Layout] = set()
        self._known = WeakTensorKeyDictionary()

    def pack(self, tensor: torch.Tensor) -> object:
        """What autograd shall keep in place of a tensor: this rank's shard.

        Raises DsError, on all ranks, if they hold different tensors. Collective for the first
        tensor of a layout.
        """
        layout = Layout.of(tensor)
        if layout is None or layout.num_bytes < self._min_bytes:
            return Unmoved.of(tensor)
        flat = layout.flatten(tensor.detach())
        if layout not in self._compared:
            self._compare(layout, flat)
            self._compared.add(layout)
        found = self._known.get(tensor)
        shard: Shard | None = None if found is None else found()
        if shard is not None and shard.version == tensor._version:
            # A tensor that several blocks get, such as a mask, is split once.
            again = None if self._offload is None else self._offload.pack_again(shard.stored)
            return _Ticket(shard, again)
        shard = self._shard(flat, layout, tensor._version)
        if not tensor.requires_grad:
            self._known[tensor] = ref(shard)
        return _Ticket(shard, shard.stored)

    def unpack(self, packed: object) -> torch.Tensor:
        """The tensor that `pack` was given. Collective, for tensors that were split."""
        if isinstance(packed, Unmoved):
            return packed.checked()
        assert isinstance(packed, _Ticket)
        layout, stored = packed.shard.layout, packed.shard.stored
        if self._offload is not None:
            stored = self._offload.unpack(packed.moved)
        assert isinstance(stored, torch.Tensor)
        whole = stored.new_empty(stored.numel() * self.group.size)
        comm.all_gather(whole, stored, self.group, caller="activations")
        return layout.restore(whole.view(layout.dtype)[: layout.numel])

    def _shard(self, flat: torch.Tensor, layout: Layout, version: int) -> Shard:
        size = -(-layout.numel // self.group.size)
        own = flat[self.group.rank * size : (self.group.rank + 1) * size]
        pool = self._pool(flat.device)
        if pool is None:
            part = flat.new_empty(size)
        else:
            part = pool.take(size * layout.dtype.itemsize).view(layout.dtype)
        part[: own.numel()].copy_(own)
        part[own.numel() :].zero_()
        content = part.view(torch.uint8)
        stored = content if self._offload is None else self._offload.pack(content)
        return Shard(layout, version, stored, pool)

    def _pool(self, device: torch.device) -> BufferPool | None:
        if not self._reuses_buffers or self._offload is not None:
            return None
        if device not in self._buffers:

            def allocate(num_bytes: int) -> torch.Tensor:
                return torch.empty(num_bytes, dtype=torch.uint8, device=device)

            self._buffers[device] = BufferPool(allocate, _MAX_FREE)
        return self._buffers[device]

    def _compare(self, layout: Layout, flat: torch.Tensor) -> None:
        content = flat.view(torch.uint8).cpu().numpy().tobytes()
        mine = (tuple(layout), hashlib.sha256(content).hexdigest())
        everybody = comm.all_gather_object(mine, self.group, caller="check of activations")
        if any(theirs != mine for theirs in everybody):
            told = "; ".join(
                f"rank {rank}: {list(theirs[0][0])} with strides {list(theirs[0][1])}, content "
                f"{theirs[1][:8]}"
                for rank, theirs in zip(self.group.ranks, everybody, strict=True)
            )
            raise DsError(
                f"partition of activations: ranks of the group {self.group.name!r} hold different "
                f"inputs of a checkpointed block ({told}); they can only share what is the same on "
                f"all of them: give the tensor-parallel group, or do not partition"
            )


class Shard:
    """This rank's part of a tensor.

    Attributes:
        layout: of the whole tensor.
        version: how often that had been changed in place.
        stored: this rank's elements as bytes, padded with zeros; or what `HostOffload.pack` made
            of them.
    """

    def __init__(
        self, layout: Layout, version: int, stored: object, pool: BufferPool | None
    ) -> None:
        self.layout, self.version, self.stored, self._pool = layout, version, stored, pool

    def __del__(self) -> None:
        if self._pool is not None and isinstance(self.stored, torch.Tensor):
            self._pool.give(self.stored)


class _Ticket(NamedTuple):
    shard: Shard
    moved: object
