"""Parameter shards that are elsewhere between uses: in host memory, or on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from ds_core.seams import TensorFile
from ds_zero.offload.buffers import BufferPool, Staging
from ds_zero.offload.crossing import SideStream, host_empty


class ShardHome(Protocol):
    """Where one unit's shard lives while the unit is not whole."""

    def ahead(self) -> None:
        """The shard is wanted soon: begin to fetch it, if there is room."""

    def fetch_into(self, shard: torch.Tensor) -> None:
        """Fill `shard`, which has memory, with its values."""

    def store(self, shard: torch.Tensor) -> None:
        """Keep the values of `shard`, which may be freed once this returns."""


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
        self._file, self._offset = file, offset
        self._staging, self._lock = Staging(file, pool), pool.lock
        self._bytes, self._dtype = shard.nbytes, shard.dtype
        self.bytes_read = self.bytes_written = 0
        self.store(shard)

    def ahead(self) -> None:
        """See `ShardHome.ahead`."""
        with self._lock:
            if self._staging.error is None:  # or whoever wants the shard is told
                self._begin_read(wait=False)

    def _begin_read(self, *, wait: bool) -> None:
        """Begin to read, unless the values are in the buffer or on their way already."""
        if self._staging.buffer is not None or self._bytes == 0:
            return
        if self._staging.take(self._bytes, wait=wait):
            self._staging.read(self._bytes, self._offset)
            self.bytes_read += self._bytes

    def fetch_into(self, shard: torch.Tensor) -> None:
        """See `ShardHome.fetch_into`."""
        if self._bytes == 0:
            return
        with self._lock:
            self._begin_read(wait=True)
            self._staging.arrive()  # of a write: what is being written is what is wanted
            shard.copy_(self._values())
            self._staging.vacate()

    def store(self, shard: torch.Tensor) -> None:
        """See `ShardHome.store`."""
        if self._bytes == 0:
            return
        with self._lock:
            if self._staging.error is None:  # of the values before, which are wanted no more
                self._staging.vacate()
            self._staging.take(self._bytes)
            self._values().copy_(shard)
            self._write()

    def _write(self) -> None:
        self._staging.write(self._bytes, self._offset)
        self.bytes_written += self._bytes

    def _values(self) -> torch.Tensor:
        assert self._staging.buffer is not None
        return self._staging.buffer[: self._bytes].view(self._dtype)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A copy of some elements; from any thread, while nothing is stored."""
        self.settle()
        found = torch.empty(stop - start, dtype=self._dtype)
        self._file.read(found, self._offset + start * self._dtype.itemsize).wait()
        return found

    def write(self, start: int, values: torch.Tensor) -> None:
        """Replace the elements from `start` on."""
        own = values.to("cpu", self._dtype).contiguous()
        with self._lock:
            self._staging.vacate()
            self._file.write(own, self._offset + start * self._dtype.itemsize).wait()

    def rescue(self) -> None:
        """Write once more what could not be written; for who is about to replace the values."""
        with self._lock:
            with suppress(OSError):
                self._staging.arrive()
            if self._staging.error is not None:
                self._write()

    def settle(self) -> None:
        """Wait for a write that is under way. Raises the OSError of one that failed."""
        with self._lock:
            if self._staging.is_writing or self._staging.error is not None:
                self._staging.vacate()

    def close(self) -> None:
        """Wait for whatever is under way, of which nobody wants to know any more."""
        with self._lock:
            self._staging.drop()


@contextmanager
def memory_of(flat: torch.Tensor) -> Iterator[None]:
    """Memory for a buffer that has none, inside the block."""
    storage = flat.untyped_storage()
    storage.resize_(flat.nbytes)
    try:
        yield
    finally:
        storage.resize_(0)
