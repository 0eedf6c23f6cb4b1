"""Parameter shards that are elsewhere between uses: in host memory, or on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ds_core.seams import TensorFile, Transfer
from ds_zero.offload.buffers import BufferPool
from ds_zero.offload.crossing import SideStream, host_empty


class ShardHome(Protocol):
    """Where one unit's shard lives while the unit is not whole."""

    def ahead(self) -> None:
        """The shard is wanted soon: begin to fetch it, if there is room."""

    def fetch_into(self, shard: torch.Tensor) -> None:
        """Fill `shard`, which has memory, with its values."""

    def store(self, shard: torch.Tensor) -> None:
        """Keep the values of `shard`, which may be freed once this returns."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A copy of some elements in host memory; from any thread, while nothing is stored."""

    def write(self, start: int, values: torch.Tensor) -> None:
        """Replace the elements from `start` on."""


class HostShard:
    """Lives in host memory, beside an accelerator."""

    def __init__(self, shard: torch.Tensor, side: SideStream, *, pin: bool) -> None:
        self._side = side
        #: `[numel]`: the values; an optimizer on the CPU may write them here.
        self.host = host_empty(shard.numel(), shard.dtype, pin=pin)
        self.store(shard)

    def ahead(self) -> None:
        """Nothing to prepare: the copy itself runs beside the program."""

    def fetch_into(self, shard: torch.Tensor) -> None:
        """See `ShardHome.fetch_into`."""
        self._side.copy(shard, self.host).join()

    def store(self, shard: torch.Tensor) -> None:
        """See `ShardHome.store`."""
        if shard.data_ptr() != self.host.data_ptr():
            self._side.copy(self.host, shard).wait()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """See `ShardHome.read`."""
        return self.host[start:stop].clone()

    def write(self, start: int, values: torch.Tensor) -> None:
        """See `ShardHome.write`."""
        self.host[start : start + values.numel()].copy_(values)


class DiskShard:
    """Lives in a file.

    Args:
        shard: its first values.
        file: holds the shards of all units of this rank.
        offset: of this one, in bytes.
        pool: memory that transfers go through.
    """

    def __init__(
        self, shard: torch.Tensor, file: TensorFile, offset: int, pool: BufferPool
    ) -> None:
        self._file, self._offset, self._pool = file, offset, pool
        self._bytes, self._dtype = shard.nbytes, shard.dtype
        self._buffer: torch.Tensor | None = None
        self._transfer: Transfer | None = None
        # Whether the transfer under way is a write.
        self._writes = False
        self.bytes_read = self.bytes_written = 0
        self.store(shard)

    def ahead(self) -> None:
        """See `ShardHome.ahead`."""
        if self._transfer is not None or self._bytes == 0:
            return
        buffer = self._pool.take(self._bytes, owner=self, wait=False)
        if buffer is not None:
            self._begin_read(buffer)

    def _begin_read(self, buffer: torch.Tensor) -> None:
        self._buffer, self._writes = buffer, False
        self._transfer = self._file.read(buffer[: self._bytes], self._offset)
        self.bytes_read += self._bytes

    def fetch_into(self, shard: torch.Tensor) -> None:
        """See `ShardHome.fetch_into`."""
        if self._bytes == 0:
            return
        if self._transfer is None:
            buffer = self._pool.take(self._bytes, owner=self)
            assert buffer is not None
            self._begin_read(buffer)
        assert self._transfer is not None
        assert self._buffer is not None
        self._transfer.wait()  # of a write: what is being written is what is wanted
        shard.copy_(self._buffer[: self._bytes].view(self._dtype))
        self.vacate()

    def store(self, shard: torch.Tensor) -> None:
        """See `ShardHome.store`."""
        self.vacate()
        if self._bytes == 0:
            return
        buffer = self._pool.take(self._bytes, owner=self)
        assert buffer is not None
        self._buffer, self._writes = buffer, True
        buffer[: self._bytes].view(self._dtype).copy_(shard)
        self._transfer = self._file.write(buffer[: self._bytes], self._offset)
        self.bytes_written += self._bytes

    def read(self, start: int, stop: int) -> torch.Tensor:
        """See `ShardHome.read`."""
        transfer = self._transfer
        if transfer is not None and self._writes:
            transfer.wait()
        found = torch.empty(stop - start, dtype=self._dtype)
        self._file.read(found, self._offset + start * self._dtype.itemsize).wait()
        return found

    def write(self, start: int, values: torch.Tensor) -> None:
        """See `ShardHome.write`."""
        self.vacate()
        own = values.to("cpu", self._dtype).contiguous()
        self._file.write(own, self._offset + start * self._dtype.itemsize).wait()

    def is_writing(self) -> bool:
        """Whether its buffer comes free without anybody's doing (`BufferPool`'s question)."""
        return self._writes and self._transfer is not None

    def is_written(self) -> bool:
        """Whether that is the case by now."""
        return self._transfer is None or self._transfer.done()

    def vacate(self) -> None:
        """Wait for what is under way and give the buffer back."""
        if self._transfer is None:
            return
        transfer, self._transfer = self._transfer, None
        buffer, self._buffer = self._buffer, None
        try:
            transfer.wait()
        finally:
            assert buffer is not None
            self._pool.give(buffer)


@contextmanager
def memory_of(flat: torch.Tensor) -> Iterator[None]:
    """Memory for a buffer that has none, inside the block."""
    storage = flat.untyped_storage()
    storage.resize_(flat.nbytes)
    try:
        yield
    finally:
        storage.resize_(0)
