"""Has the other ranks know when a rank is held up by its data loader.

A loader that is stuck (a file system that hangs, a deadlock of workers) makes its rank miss the
next collective. The others can only see that it does not come; this says why.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from ds_core.comm import board

#: How long a batch may take before the others are told; nothing else follows from it.
LATE_S = 3.0
POLL_S = 0.5


class LoaderWatch:
    """Watches the thread that made it, from another thread, while it waits for a batch.

    Costs two assignments per batch. Does nothing without other ranks.

    Args:
        what: the dataset, for the message.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._watched = threading.get_ident()
        self._since: float | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if dist.is_initialized() and dist.get_world_size() > 1:
            threading.Thread(target=self._run, daemon=True, name="ds-core-loader-watch").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._since = None
        self._ended.set()

    def begin(self) -> None:
        """A batch is waited for from now on."""
        self._since = time.monotonic()

    def end(self) -> None:
        """It has come."""
        self._since = None

    def _run(self) -> None:
        told: float | None = None
        while not self._ended.wait(POLL_S):
            since = self._since
            if told is not None and since != told:
                told = None
                self._tell("")
            if since is not None and told is None and time.monotonic() - since > LATE_S:
                told = since
                self._tell(
                    f"it waits for its data loader, which has given no batch of {self._what} for "
                    f"more than {LATE_S:g} s and is in {self._place()}"
                )

    def _tell(self, text: str) -> None:
        # The store is gone at the end of a job, and whoever asks there is told of that.
        with suppress(Exception):
            board.tell_whereabouts(dist.get_rank(), text)

    def _place(self) -> str:
        """Where the watched thread is: file, line and function."""
        frame = sys._current_frames().get(self._watched)
        if frame is None:
            return "a thread that has ended"
        code = frame.f_code
        return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
