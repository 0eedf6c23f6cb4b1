"""What an operation with async_op=True returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_core.comm import Pending


class Handle:
    """An operation under way, as torch.distributed shows it.

    Args:
        pending: the operation; None: it is done, and so is `finish`.
        finish: what is left to do once it is.
    """

    def __init__(self, pending: Pending | None, finish: Callable[[], None] | None = None) -> None:
        self._pending, self._finish = pending, finish

    def wait(self, timeout: Any = None) -> bool:
        """Return True once the result is in place; raises CommError if it cannot be.

        timeout: makes no difference; a collective gives up as its group was told to.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would return at once, as far as the backend tells."""
        return self._pending is None or self._pending.is_complete()


def finished(
    pending: Pending | None, async_op: bool, finish: Callable[[], None] | None = None
) -> Handle | None:
    """The handle of an operation with async_op, else None after its end."""
    handle = Handle(pending, finish)
    if async_op:
        return handle
    handle.wait()
    return None
