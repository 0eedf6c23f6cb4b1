"""How the output of ranks reaches the terminal while the job runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ds_core.launcher.tracebacks import TRACEBACK
from ds_core.launcher.writers import LineWriter, Writer

if TYPE_CHECKING:
    from ds_core.launcher.plan import Show
    from ds_core.launcher.rank_logs import RankLogs

#: How long a traceback is held back: a process that dies of it is gone by then.
HOLD_S = 3.0
POLL_S = 0.05


class Follower:
    """Copies what ranks write to the terminal while the job runs.

    A traceback is held back for a moment: if the process dies of it, the report at the end
    decides whether it is shown, so that the cause of a failure is read last, and once.

    Args:
        logs: where the output of each rank is.
        stdout, stderr: where it is copied to.
        show: whose output is: local rank 0's ("node"), that of the job's rank 0 if it is here
            ("job"), or that of all local ranks, each line with its rank ("all").
    """

    def __init__(
        self, logs: RankLogs, stdout: BinaryIO, stderr: BinaryIO, *, show: Show = "node"
    ) -> None:
        self._logs = logs
        self._targets = (stdout, stderr)
        self._show: Show = show
        self._tails: dict[int, tuple[_Tail, _Tail]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ds-run-follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> dict[int, bytes]:
        """Copy the rest. Returns the traceback that each local rank ended with and was held."""
        self._stopped.set()
        self._thread.join()
        self._copy()
        held = {}
        for local_rank, tails in self._tails.items():
            for tail in tails:
                tail.close()
            if tails[1].held:
                held[local_rank] = tails[1].prefixed_held
        return held

    def show_now(self, data: bytes) -> None:
        """Write to the terminal's stderr what was held."""
        self._targets[1].write(data)
        self._targets[1].flush()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._copy()

    def _copy(self) -> None:
        for local_rank in sorted(self._logs.stderr):
            if not self._logs.is_shown(local_rank, self._show):
                continue
            if local_rank not in self._tails:
                prefix = f"[rank {self._logs.rank[local_rank]}] " if self._show == "all" else ""
                self._tails[local_rank] = (
                    _Tail(self._targets[0], prefix.encode(), holds_traceback=False),
                    _Tail(self._targets[1], prefix.encode(), holds_traceback=True),
                )
            out, err = self._tails[local_rank]
            out.copy_from(self._logs.stdout[local_rank])
            err.copy_from(self._logs.stderr[local_rank])


class _Tail:
    """The end of a growing file, and where it is copied to."""

    def __init__(self, target: BinaryIO, prefix: bytes, *, holds_traceback: bool) -> None:
        self._writer = LineWriter(target, prefix) if prefix else Writer(target)
        self._prefix = prefix
        self._holds_traceback = holds_traceback
        self._path: Path | None = None
        self._source: BinaryIO | None = None
        self._held_since = 0.0
        self.held = b""

    @property
    def prefixed_held(self) -> bytes:
        return b"".join(self._prefix + line for line in self.held.splitlines(keepends=True))

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
        self._writer.write(new)

    def close(self) -> None:
        self._writer.close()
        if self._source is not None:
            self._source.close()

    def _release(self) -> None:
        self._writer.write(self.held)
        self.held = b""
