"""The layout of several tensors in one flat buffer that is cut evenly over ranks: integers only.

    |<------------------------ numel, a multiple of num_shards ------------------------->|
    | slot 0 ...... gap | slot 1 .. | slot 2 ............ gap | .... padding to the end .. |
    |<------ shard of rank 0 ------>|<------ shard of rank 1 ------>|<----- rank 2 ------>|

Slots start at multiples of `align`, so that kernels find them aligned; shard boundaries fall
anywhere in a slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One tensor's place: elements [offset, offset + numel) of the flat buffer."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Piece:
    """The part of one slot that lies in one shard.

    Attributes:
        slot: whose part it is.
        start, stop: range in the row-major flattening of the slot's own tensor.
        offset: where the part begins in the shard.
    """

    slot: Slot
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class FlatLayout:
    """Slots of a flat buffer and its division into equal shards."""

    slots: tuple[Slot, ...]
    numel: int
    num_shards: int

    @classmethod
    def pack(
        cls, tensors: Iterable[tuple[str, tuple[int, ...]]], *, num_shards: int = 1, align: int = 1
    ) -> FlatLayout:
        """Lay out (name, shape) pairs in order; `align` in elements, for slots and shards alike."""
        slots: list[Slot] = []
        end = 0
        for name, shape in tensors:
            slot = Slot(name, tuple(shape), -(-end // align) * align)
            slots.append(slot)
            end = slot.end
        step = align * num_shards
        return cls(tuple(slots), -(-end // step) * step, num_shards)

    @property
    def shard_numel(self) -> int:
        """Elements of one shard, padding included."""
        return self.numel // self.num_shards

    @property
    def padding(self) -> int:
        """Elements of the buffer that belong to no slot."""
        return self.numel - sum(slot.numel for slot in self.slots)

    def gaps(self) -> list[tuple[int, int]]:
        """Ranges [start, stop) of the buffer that belong to no slot."""
        edges = [0, *(edge for slot in self.slots for edge in (slot.offset, slot.end)), self.numel]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]

    def pieces(self, shard: int) -> list[Piece]:
        """The parts of slots that lie in shard number `shard`, in order; empty parts left out."""
        low, high = shard * self.shard_numel, (shard + 1) * self.shard_numel
        found = []
        for slot in self.slots:
            start, stop = max(slot.offset, low), min(slot.end, high)
            if start < stop:
                found.append(Piece(slot, start - slot.offset, stop - slot.offset, start - low))
        return found
