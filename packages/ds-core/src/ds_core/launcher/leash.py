"""How the launcher on one host reaches its agents on the others, when no signal can.

The agent's stdin is a pipe whose other end the launcher holds, through ssh. It sends a beat every
few seconds. When the pipe ends, or falls silent after it spoke, the launcher or the connection is
gone, and the agent ends its part of the job.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

BEAT = b"\n"
BEAT_INTERVAL_S = 5.0
#: Silence after which a launcher that did beat is taken for dead.
SILENCE_S = 120.0


class Leash:
    """Watches stdin in a thread, and calls `on_end` once when it ends or falls silent.

    The processes of the job get an empty stdin, so that none of them reads the beats.
    """

    def __init__(self, on_end: Callable[[], None], *, silence_s: float = SILENCE_S) -> None:
        self._on_end = on_end
        self._silence_s = silence_s
        self._pipe = os.dup(0)
        os.set_inheritable(self._pipe, False)
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        os.close(empty)
        self._thread = threading.Thread(target=self._watch, name="ds-run-leash", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        has_beaten = False
        last = time.monotonic()
        while True:
            ready, _, _ = select.select([self._pipe], [], [], 1.0)
            if ready:
                if not _read(self._pipe):
                    break
                has_beaten, last = True, time.monotonic()
            elif has_beaten and time.monotonic() - last > self._silence_s:
                break
        self._on_end()


def hang_up() -> None:
    """End this process's job as the end of its terminal would."""
    os.kill(os.getpid(), signal.SIGHUP)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 4096)
    except OSError:
        return b""
