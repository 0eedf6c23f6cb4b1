"""A request under way."""

from __future__ import annotations

import errno
import threading
import time
from typing import Protocol

from ds_ops.aio.errors import AsyncFileError

#: Python handles Ctrl-C only between calls into C.
_SLICE_S = 0.2


class Transfer(Protocol):
    """What a token waits for. Its methods are never called at the same time."""

    def wait(self, seconds: float) -> bool:
        """Whether all is moved or has failed, after waiting up to so long."""
        ...

    def finish(self) -> AsyncFileError | None:
        """Free what it held, once it is done; why it failed, or None."""
        ...


class Token:
    """A read or write that was begun; it keeps the tensor's memory alive until it is done.

    The tensor must not be changed (of a write) or looked at (of a read) before that.

    Attributes:
        bytes: that it moves.
    """

    def __init__(self, transfer: Transfer, what: str, path: str, size: int) -> None:
        self.bytes = size
        self._transfer: Transfer | None = transfer
        self._what, self._path = what, path
        self._error: AsyncFileError | None = None
        self._lock = threading.Lock()
        #: Whether someone has been told of the error.
        self.observed = False

    def done(self) -> bool:
        """Whether it is over, well or not; `wait` tells which."""
        return self.settle(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it is over; the number of bytes moved.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises AsyncFileError if it failed (again for each call), or with errno ETIMEDOUT if it is
        still under way after `timeout`; it goes on then, and can be waited for again.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _SLICE_S if deadline is None else deadline - time.monotonic()
            if self.settle(max(0.0, min(left, _SLICE_S))):
                break
            if left <= 0:
                what = f"{self._what} is still under way after {timeout} s"
                remedy = "wait again, or longer"
                raise AsyncFileError(errno.ETIMEDOUT, self._path, what, remedy=remedy)
        if self._error is not None:
            self.observed = True
            raise self._error
        return self.bytes

    @property
    def error(self) -> AsyncFileError | None:
        """Why it failed; None while it is under way and when it went well."""
        return self._error

    def settle(self, seconds: float) -> bool:
        """Whether it is over, after waiting up to so long; frees what it held then."""
        begin = time.monotonic()
        if not self._lock.acquire(timeout=seconds):
            return False  # another thread waits for it
        try:
            if self._transfer is None:
                return True
            left = seconds - (time.monotonic() - begin)
            if not self._transfer.wait(max(0.0, left)):
                return False
            ended, self._transfer = self._transfer, None
            self._error = ended.finish()
            return True
        finally:
            self._lock.release()

    def __repr__(self) -> str:
        state = "done" if self.done() else "under way"
        return f"Token({self._what}, {state if self._error is None else 'failed'})"
