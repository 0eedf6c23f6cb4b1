"""A bounded number of buffers that transfers to and from disk share."""

from __future__ import annotations

import threading
from contextlib import suppress

import torch

from ds_core.seams import TensorFile, TensorFiles, Transfer

#: Places in files begin at multiples of this many bytes, which direct transfers ask for.
PAGE_BYTES = 4096


def whole_pages(nbytes: int) -> int:
    """So many bytes, up to the next page."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class BufferPool:
    """Lends buffers of bytes; the next one waits for a write once all are lent.

    Where nobody writes there is nothing to wait for, and one more buffer is made; it goes when it
    comes back. So the bound holds for a step, which writes what it has updated, and a caller
    who wants many pieces at once gets them.

    Args:
        files: whose memory suits transfers.
        count: buffers that are kept.

    Attributes:
        lock: held by whoever uses the pool or a `Staging` of it: the thread that writes a
            checkpoint reads beside the program.
        failed: parties whose last write did not reach its file.
    """

    def __init__(self, files: TensorFiles, count: int) -> None:
        self._files, self._count = files, count
        self.lock = threading.RLock()
        self.failed: list[Staging] = []
        self._free: list[torch.Tensor] = []
        self._lent: list[tuple[torch.Tensor, Staging]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, lent or not."""
        return sum(b.nbytes for b in self._free) + sum(b.nbytes for b, _ in self._lent)

    def take(self, size: int, *, owner: Staging, wait: bool = True) -> torch.Tensor | None:
        """A buffer of at least `size` bytes; without `wait`, None if there is no room now."""
        if not self._free and len(self._lent) >= self._count:
            for _, holder in self._lent:
                if holder.is_writing and (wait or holder.is_done):
                    holder.vacate()
                    break
        if not self._free and len(self._lent) >= self._count and not wait:
            return None
        fitting = [buffer for buffer in self._free if buffer.nbytes >= size]
        if fitting:
            buffer = min(fitting, key=lambda each: each.nbytes)
            self._free = [each for each in self._free if each is not buffer]
        else:
            if self._free and len(self._free) + len(self._lent) >= self._count:
                self._free.pop()  # too small: a larger one takes its place
            buffer = self._files.empty(size)
        self._lent.append((buffer, owner))
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        self._lent = [pair for pair in self._lent if pair[0] is not buffer]
        if len(self._free) + len(self._lent) < self._count:
            self._free.append(buffer)

    def clear(self) -> None:
        """Free the buffers that nobody has."""
        self._free.clear()


class Staging:
    """One party's buffer of a pool, and the transfer between it and a file that is under way.

    A write that fails leaves bytes of before in the file, which must not be taken for those that
    were meant: whatever would read them raises the error of the write, again and again, until other
    values are written, or `rescue` is called. The buffer stays, for it is all that is left of them.

    Attributes:
        buffer: what it holds now, of at least the size that it took; None if nothing.
    """

    def __init__(self, file: TensorFile, pool: BufferPool) -> None:
        self._file, self._pool = file, pool
        self.buffer: torch.Tensor | None = None
        self._transfer: Transfer | None = None
        self._writes = False
        self._error: BaseException | None = None

    @property
    def error(self) -> BaseException | None:
        """Why the last write failed, if it did; it may not be known before it was waited for."""
        return self._error

    @property
    def is_reading(self) -> bool:
        """Whether a read has begun that nobody has waited for."""
        return self._transfer is not None and not self._writes

    @property
    def is_writing(self) -> bool:
        """Whether it holds its buffer only until a write is done."""
        return self._transfer is not None and self._writes

    @property
    def is_done(self) -> bool:
        """Whether nothing is under way."""
        return self._transfer is None or self._transfer.done()

    def take(self, size: int, *, wait: bool = True) -> bool:
        """Get a buffer, if it has none; without `wait`, False if there is no room now."""
        if self.buffer is None:
            self.buffer = self._pool.take(size, owner=self, wait=wait)
        return self.buffer is not None

    def read(self, size: int, offset: int) -> None:
        """Begin to fill the buffer from the file."""
        self._raise_error()
        self._transfer, self._writes = self._file.read(self._first(size), offset), False

    def write(self, size: int, offset: int) -> None:
        """Begin to write the buffer to the file."""
        self.rescue()
        self._transfer, self._writes = self._file.write(self._first(size), offset), True

    def arrive(self) -> None:
        """Wait for what is under way; the buffer stays, unless it could not be filled.

        Raises the OSError of what failed.
        """
        self._raise_error()
        if self._transfer is None:
            return
        try:
            self._transfer.wait()
        except OSError as error:
            self._transfer = None
            if self._writes:
                self._error = error
                self._pool.failed.append(self)
            else:
                self._give_back()
            raise
        self._transfer = None

    def vacate(self) -> None:
        """Wait for what is under way and give the buffer back. Raises as `arrive` does."""
        self.arrive()
        self._give_back()

    def rescue(self) -> None:
        """Forget that a write failed: what the buffer holds, or is about to, counts."""
        if self._error is not None:
            self._error = None
            self._pool.failed = [each for each in self._pool.failed if each is not self]

    def drop(self) -> None:
        """Wait for what is under way and give the buffer back, whatever has failed."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            with suppress(OSError):
                transfer.wait()
        self.rescue()
        self._give_back()

    def _give_back(self) -> None:
        buffer, self.buffer = self.buffer, None
        if buffer is not None:
            self._pool.give(buffer)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _first(self, size: int) -> torch.Tensor:
        assert self.buffer is not None
        return self.buffer[:size]
