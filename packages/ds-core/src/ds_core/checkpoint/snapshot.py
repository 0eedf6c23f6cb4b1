"""A copy of what a rank is to write, in host memory that is used again by the next copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)

from ds_core.checkpoint.sharded import FlatShard, is_lazy
from ds_core.checkpoint.storage import held_state, resolved
from ds_core.errors import CheckpointError

#: Page-locked memory comes in powers of two, so much of it in chunks of this many bytes.
_CHUNK_BYTES = 256 * 1024 * 1024
_ALIGNMENT = 64


class HostBuffers:
    """Host memory that copies are laid out in; it grows to the largest and is kept.

    Args:
        pinned: whether it is page-locked, which a device copies to without help of the processor.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._chunks: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def lay_out(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """A piece of memory of each size, `[size]` bytes, valid until the next call."""
        rounded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        chunk_bytes = min(_CHUNK_BYTES, sum(rounded))
        pieces: list[torch.Tensor] = []
        chunk, used = -1, 0
        for size, room in zip(sizes, rounded, strict=True):
            if chunk < 0 or used + room > self._chunks[chunk].nbytes:
                chunk, used = chunk + 1, 0
                self._provide(chunk, max(room, chunk_bytes))
            pieces.append(self._chunks[chunk][used : used + size])
            used += room
        del self._chunks[chunk + 1 :]
        return pieces

    def _provide(self, chunk: int, nbytes: int) -> None:
        if chunk < len(self._chunks):
            if self._chunks[chunk].nbytes >= nbytes:
                return
            del self._chunks[chunk]  # before the larger one is allocated
        fresh = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        self._chunks.insert(chunk, fresh)


class Snapshot(SavePlanner):
    """What the items of a plan were when it was made; `SafetensorsWriter` writes from it.

    Tensors are copied; values are too; lazy shards are not, they are read when they are written.

    Args:
        items: what this rank writes.
        planner: hands out the live tensors and values.
        buffers: where the copies go; one snapshot at a time uses them.

    Attributes:
        nbytes: of the tensors that were copied.
        has_lazy: whether some are still to be read.
    """

    def __init__(self, items: SavePlan, planner: SavePlanner, buffers: HostBuffers) -> None:
        live = held_state(planner)
        self._copies: dict[tuple[str, torch.Size | None], torch.Tensor] = {}
        self._values: dict[str, Any] = {}
        self.state_dict: dict[str, Any] = {}  # the lazy ones, where the writer looks for them
        sources: list[tuple[MetadataIndex, torch.Tensor]] = []
        for item in items.items:
            held = live.get(item.index.fqn)
            if item.type == WriteItemType.BYTE_IO:
                self._values[item.index.fqn] = copy.deepcopy(held)
            elif isinstance(held, FlatShard) and is_lazy(held):
                self.state_dict[item.index.fqn] = held
            else:
                sources.append((item.index, resolved(item, planner)))
        self.has_lazy = bool(self.state_dict)
        self.nbytes = sum(source.nbytes for _, source in sources)
        self._copy(sources, buffers)

    def _copy(
        self, sources: list[tuple[MetadataIndex, torch.Tensor]], buffers: HostBuffers
    ) -> None:
        room = buffers.lay_out([source.nbytes for _, source in sources])
        devices = set()
        with torch.no_grad():
            for (index, source), memory in zip(sources, room, strict=True):
                target = memory.view(source.dtype).view(source.shape)
                target.copy_(source, non_blocking=True)
                self._copies[index.fqn, index.offset] = target
                devices.add(source.device)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.current_stream(device).synchronize()

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The copy of an item; of a lazy shard, which must be open, its elements."""
        index = write_item.index
        if index.fqn in self.state_dict:
            found: torch.Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
            return found
        return self._copies[index.fqn, index.offset]

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The copy of a value."""
        return self._values[index.fqn]

    # A snapshot is made of a plan, so that it plans nothing.

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        raise _planned_already()

    def create_local_plan(self) -> SavePlan:
        raise _planned_already()

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        raise _planned_already()

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise _planned_already()


def _planned_already() -> CheckpointError:
    return CheckpointError("a snapshot is of a plan that is made; plan with the state itself")
