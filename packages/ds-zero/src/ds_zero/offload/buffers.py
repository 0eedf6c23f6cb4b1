"""A bounded number of buffers that transfers to and from disk share."""

from __future__ import annotations

from typing import Protocol

import torch

from ds_core.seams import TensorFiles


class Tenant(Protocol):
    """Whoever holds a buffer."""

    def is_writing(self) -> bool:
        """Whether it holds the buffer only until a write is done."""

    def is_written(self) -> bool:
        """Whether that write is over."""

    def vacate(self) -> None:
        """Wait for that write and give the buffer back."""


class BufferPool:
    """Lends buffers of bytes; the next one waits for a write once all are lent.

    Where nobody writes there is nothing to wait for, and one more buffer is made; it goes when it
    comes back. So the bound holds for a step, which writes what it has updated, and a caller
    who wants many pieces at once gets them.

    Args:
        files: whose memory suits transfers.
        count: buffers that are kept.
    """

    def __init__(self, files: TensorFiles, count: int) -> None:
        self._files, self._count = files, count
        self._free: list[torch.Tensor] = []
        self._lent: list[tuple[torch.Tensor, Tenant]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, lent or not."""
        return sum(b.nbytes for b in self._free) + sum(b.nbytes for b, _ in self._lent)

    def take(self, size: int, *, owner: Tenant, wait: bool = True) -> torch.Tensor | None:
        """A buffer of at least `size` bytes; without `wait`, None if there is no room now."""
        if not self._free and len(self._lent) >= self._count:
            for _, tenant in self._lent:
                if tenant.is_writing() and (wait or tenant.is_written()):
                    tenant.vacate()
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
