"""Optimizer states on disk: brought to memory piece by piece for a step, and written back.

The states of an optimizer piece (its master weights, if it has its own, and its moments) are one
record: one range of a file, one read, one write. While a record is on disk its tensors keep shape
and dtype, but have no memory; while it is in memory they are views of one buffer. A step goes

    read piece i + 1  |  update piece i  |  write piece i - 1

over a bounded number of buffers, and moves 2 x 12 bytes per parameter for Adam with fp32 master.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", sections 5.1 and 6.3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from ds_core.seams import TensorFile
from ds_zero.offload.buffers import BufferPool, Staging, whole_pages


@dataclass(frozen=True)
class _Field:
    """One tensor of a record: its key, its format, and its bytes in the record."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass
class _Record:
    """The states of one piece, on disk or in memory.

    Attributes:
        staging: its memory while it is there, or on its way.
    """

    tensors: Callable[[], dict[str, torch.Tensor]]
    staging: Staging
    fields: tuple[_Field, ...] = ()
    offset: int = 0
    size: int = 0
    is_here: bool = False


class Swap:
    """The optimizer states of one rank that are on disk; for several threads, in turns.

    Args:
        file: holds them; nobody else writes it.
        pool: memory that they pass through.

    Attributes:
        pool: of that memory.
        bytes_read, bytes_written: so far, of records.
    """

    def __init__(self, file: TensorFile, pool: BufferPool) -> None:
        self._file, self.pool, self._lock = file, pool, pool.lock
        self._records: dict[torch.Tensor, _Record] = {}
        self._upcoming: deque[torch.Tensor] = deque()
        self._end = 0
        # Places in the file, by their size, of records that were forgotten.
        self._vacant: dict[int, list[int]] = {}
        self.bytes_read = self.bytes_written = 0

    def __contains__(self, weights: torch.Tensor) -> bool:
        return weights in self._records

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory that records pass through."""
        return self.pool.nbytes

    # ------------------------------------------------------------------ coming and going

    def adopt(self, weights: torch.Tensor, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Take over the states of a piece, and begin to write them.

        Args:
            weights: the optimizer's parameter.
            tensors: gives what of it is to be on disk, by key; asked anew whenever it goes.
        """
        with self._lock:
            staging = Staging(self._file, self.pool)
            self._records[weights] = _Record(tensors, staging, is_here=True)
            self.put_back(weights)

    def release(self, weights: torch.Tensor, *, rescues: bool = False) -> None:
        """Let go of a piece; it has its tensors in memory of their own from now on.

        rescues: its values are about to be replaced: take what is left of them, and no error.
        """
        with self._lock:
            record = self._records[weights]
            self._upcoming = deque(each for each in self._upcoming if each is not weights)
            if rescues:
                self._rescue(record)
            self.bring(weights)
            del self._records[weights]
            self._vacate_place(record)
            for tensor in record.tensors().values():
                tensor.data = tensor.detach().clone()
            record.staging.vacate()

    def _rescue(self, record: _Record) -> None:
        """Show what is left of a record: what could not be written, or zeros for what is gone."""
        with suppress(OSError):
            if record.staging.is_writing:
                record.staging.arrive()
        if record.staging.error is not None:
            record.staging.rescue()
            self._show(record)
            return
        try:
            if not record.is_here:
                self._begin_read(record, wait=True)
                record.staging.arrive()
        except OSError:
            record.staging.take(record.size)
            assert record.staging.buffer is not None
            record.staging.buffer.zero_()
            self._show(record)

    def expect(self, order: Iterable[torch.Tensor]) -> None:
        """These pieces will be brought, in this order: begin to read the first."""
        with self._lock:
            self._upcoming = deque(order)
            self._read_ahead()

    def read_one_more(self, order: Iterable[torch.Tensor]) -> None:
        """Begin to read the next piece that will be brought.

        order: that of all pieces, looked at only if none is expected yet.
        """
        with self._lock:
            if not self._upcoming:
                self._upcoming = deque(order)
            self._read_ahead(most=1)

    def bring(self, weights: torch.Tensor) -> None:
        """Make the states of a piece present, and begin to read those that come next."""
        with self._lock:
            record = self._records[weights]
            if record.is_here:
                return
            if record.staging.is_writing:
                record.staging.vacate()
            self._begin_read(record, wait=True)
            record.staging.arrive()
            self._show(record)
            while self._upcoming and self._records[self._upcoming[0]].is_here:
                self._upcoming.popleft()
            self._read_ahead()

    def put_back(self, weights: torch.Tensor) -> None:
        """Begin to write the states of a piece; it has no memory from now on."""
        with self._lock:
            record = self._records[weights]
            tensors = record.tensors()
            fields = _laid_out(tensors)
            if fields != record.fields:
                self._move(record, fields)
            record.staging.take(record.size)
            for each in record.fields:
                tensor, place = tensors[each.key], _view(record.staging, each)
                if tensor.data_ptr() != place.data_ptr():
                    place.copy_(tensor)
                _hide(tensor)
            record.is_here = False
            record.staging.write(record.size, record.offset)
            self.bytes_written += sum(each.nbytes for each in record.fields)

    def leave(self, weights: torch.Tensor) -> None:
        """The states of a piece were only read: they lose their memory, and nothing is written."""
        with self._lock:
            record = self._records[weights]
            for tensor in record.tensors().values():
                _hide(tensor)
            record.is_here = False
            record.staging.vacate()

    @contextmanager
    def present(self, weights: torch.Tensor, *, edits: bool) -> Iterator[None]:
        """The states of a piece are in memory inside the block; `edits` to them are kept.

        Another thread waits for the end of the block, or it would find them gone in its own.
        """
        with self._lock:
            record = self._records.get(weights)
            if record is None or record.is_here:
                yield
                return
            self.bring(weights)
            try:
                yield
            finally:
                if edits:
                    self.put_back(weights)
                else:
                    self.leave(weights)

    def settle(self) -> None:
        """Wait for what is being written, and free the buffers. Raises the error of a write."""
        with self._lock:
            for record in self._records.values():
                if record.staging.is_writing or record.staging.error is not None:
                    record.staging.vacate()

    def close(self) -> None:
        """Wait for everything, of which nobody wants to know any more, and close the file."""
        with self._lock:
            for record in self._records.values():
                record.staging.drop()
            self.pool.clear()
            self._file.close()

    # ------------------------------------------------------------------ records

    def _read_ahead(self, most: int | None = None) -> None:
        """Begin to read what comes next, as far as there are buffers; at `most` so many."""
        for weights in self._upcoming:
            if most == 0:
                return
            record = self._records[weights]
            if record.is_here or record.staging.is_reading:
                continue
            if record.staging.error is not None:
                return  # whoever brings it is told
            if record.staging.is_writing or not self._begin_read(record, wait=False):
                return
            most = None if most is None else most - 1

    def _begin_read(self, record: _Record, *, wait: bool) -> bool:
        """Begin to read, if that has not begun; without `wait`, False if there is no room now."""
        if record.staging.is_reading:
            return True
        if not record.staging.take(record.size, wait=wait):
            return False
        record.staging.read(record.size, record.offset)
        self.bytes_read += sum(each.nbytes for each in record.fields)
        return True

    def _show(self, record: _Record) -> None:
        tensors = record.tensors()
        for each in record.fields:
            tensors[each.key].data = _view(record.staging, each)
        record.is_here = True

    def _move(self, record: _Record, fields: tuple[_Field, ...]) -> None:
        """Give a record a new layout, in a new place of the file; its tensors keep their values."""
        for tensor in record.tensors().values():
            if record.staging.buffer is not None:
                tensor.data = tensor.detach().clone()  # it may lie in the buffer
        record.staging.vacate()
        size = max((each.start + each.nbytes for each in fields), default=0)
        record.fields = fields
        if size <= record.size:
            return
        self._vacate_place(record)
        record.size = whole_pages(size)
        if self._vacant.get(record.size):
            record.offset = self._vacant[record.size].pop()
            return
        record.offset = self._end
        self._end += record.size
        self._file.preallocate(self._end)

    def _vacate_place(self, record: _Record) -> None:
        """Its place in the file is for others from now on."""
        if record.size:
            self._vacant.setdefault(record.size, []).append(record.offset)


def _laid_out(tensors: dict[str, torch.Tensor]) -> tuple[_Field, ...]:
    fields, start = [], 0
    for key, tensor in tensors.items():
        numel = tensor.numel()
        nbytes = numel * tensor.element_size()
        fields.append(_Field(key, tensor.dtype, tuple(tensor.shape), start, nbytes))
        start += -(-nbytes // 64) * 64
    return tuple(fields)


def _view(staging: Staging, of: _Field) -> torch.Tensor:
    assert staging.buffer is not None
    return staging.buffer[of.start : of.start + of.nbytes].view(of.dtype).view(of.shape)


def _hide(tensor: torch.Tensor) -> None:
    """Leave a tensor its shape alone; what computes with it gets NaN, or zeros of integers."""
    value = float("nan") if tensor.is_floating_point() else 0
    poison = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    tensor.data = poison.expand(tensor.shape)
