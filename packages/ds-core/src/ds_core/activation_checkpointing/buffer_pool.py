"""Buffers of bytes that are used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock

import torch


class BufferPool:
    """Buffers of exact sizes; those that nobody uses wait, up to a number, to be used again.

    Args:
        allocate: makes a buffer, `[n]` of uint8, of n bytes.
        max_free: buffers that wait; beyond it the one that has waited longest is freed.

    Attributes:
        used_bytes: in buffers that are taken.
        peak_bytes: the most that taken and waiting buffers have held together.
        num_allocated: buffers that were made.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor], max_free: int) -> None:
        self._allocate, self._max_free = allocate, max_free
        self._free: list[torch.Tensor] = []
        # Python may end an owner, which gives its buffer back, at any point of `take`: what
        # comes then waits here.
        self._returned: deque[torch.Tensor] = deque()
        self._lock = Lock()
        self.used_bytes = self.peak_bytes = self.num_allocated = 0

    @property
    def held_bytes(self) -> int:
        """In buffers taken and waiting."""
        return self.used_bytes + sum(map(torch.Tensor.numel, self._free))

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer of so many bytes, of any content: the one of this size that waits, or a new."""
        with self._lock:
            self._sort_in()
            buffer = next((each for each in self._free if each.numel() == num_bytes), None)
            if buffer is None:
                buffer = self._allocate(num_bytes)
                self.num_allocated += 1
            else:
                self._free = [each for each in self._free if each is not buffer]
            self.used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back; from any thread, at any time."""
        self._returned.append(buffer)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            self.used_bytes -= buffer.numel()
            self._free.append(buffer)
        del self._free[: max(0, len(self._free) - self._max_free)]
