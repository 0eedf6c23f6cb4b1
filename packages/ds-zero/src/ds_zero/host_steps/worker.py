"""A thread for the steps that the host takes while something else goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class HostWorker:
    """Runs what it is given, one after the other, in a thread of its own, or at once.

    Args:
        beside: whether in a thread; false where the caller has nothing to do meanwhile.
    """

    def __init__(self, *, beside: bool) -> None:
        self._pool: ThreadPoolExecutor | None = None
        if beside:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ds-zero-host-step")

    def start(self, work: Callable[[], None]) -> Future[None]:
        """Begin `work`, without autograd; `result()` of what this returns raises its error."""
        if self._pool is not None:
            return self._pool.submit(_without_autograd, work)
        done: Future[None] = Future()
        try:
            _without_autograd(work)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done

    def close(self) -> None:
        """Wait for what was begun, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()


def _without_autograd(work: Callable[[], None]) -> None:
    with torch.no_grad():  # which is a setting of each thread
        work()
