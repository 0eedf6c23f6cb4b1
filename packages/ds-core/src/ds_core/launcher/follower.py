"""How rank 0's output reaches the terminal while the job runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ds_core.launcher.tracebacks import TRACEBACK

if TYPE_CHECKING:
    from ds_core.launcher.rank_logs import RankLogs

#: How long a traceback is held back: a process that dies of it is gone by then.
HOLD_S = 3.0
POLL_S = 0.05


class Follower:
    """Copies what local rank 0 writes to the terminal while the job runs.

    A traceback is held back for a moment: if the process dies of it, the report at the end
    decides whether it is shown, so that the cause of a failure is read last, and once.
    """

    def __init__(self, logs: RankLogs, stdout: BinaryIO, stderr: BinaryIO) -> None:
        self._logs = logs
        self._tails = (_Tail(stdout, holds_traceback=False), _Tail(stderr, holds_traceback=True))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ds-run-follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> bytes:
        """Copy the rest. Returns the traceback that was held back, if rank 0 ended with one."""
        self._stopped.set()
        self._thread.join()
        self._copy()
        for tail in self._tails:
            tail.close()
        return self._tails[1].held

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._copy()

    def _copy(self) -> None:
        for tail, files in zip(self._tails, (self._logs.stdout, self._logs.stderr), strict=True):
            if 0 in files:
                tail.copy_from(files[0])


class _Tail:
    """The end of a growing file, and where it is copied to."""

    def __init__(self, target: BinaryIO, *, holds_traceback: bool) -> None:
        self._target = target
        self._holds_traceback = holds_traceback
        self._path: Path | None = None
        self._source: BinaryIO | None = None
        self._held_since = 0.0
        self.held = b""

    def copy_from(self, path: Path) -> None:
        """Copy what is new in `path`, which differs from the last one after a restart."""
        if path != self._path:
            self._release()
            self.close()
            self._path, self._source = path, path.open("rb")
        assert self._source is not None  # opened with the path
        new = self._source.read()
        if self.held:
            self.held += new
            if time.monotonic() - self._held_since > HOLD_S:
                self._release()
            return
        found = TRACEBACK.search(new) if self._holds_traceback else None
        if found is not None:
            self.held, new = new[found.start() :], new[: found.start()]
            self._held_since = time.monotonic()
        self._write(new)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()

    def _release(self) -> None:
        self._write(self.held)
        self.held = b""

    def _write(self, data: bytes) -> None:
        if data:
            self._target.write(data)
            self._target.flush()
