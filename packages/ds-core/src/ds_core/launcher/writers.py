"""How output reaches the terminal: as it comes, or in whole lines behind a prefix."""

from __future__ import annotations

import os
from typing import BinaryIO


class Writer:
    """Writes to a terminal at once.

    Once nobody reads it any more, as after `| head`, what is written goes nowhere: a job goes on.
    """

    def __init__(self, target: BinaryIO) -> None:
        self._target = target

    def write(self, data: bytes) -> None:
        if not data:
            return
        try:
            self._target.write(data)
            self._target.flush()
        except BrokenPipeError:
            # The stream keeps what it could not write, and would fail again at its end.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._target.fileno())

    def close(self) -> None:
        """Write what is left."""


class LineWriter(Writer):
    """Writes whole lines, each behind a prefix: those of several sources must not mix."""

    def __init__(self, target: BinaryIO, prefix: bytes) -> None:
        super().__init__(target)
        self._prefix = prefix
        self._partial = b""

    def write(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        super().write(b"".join(self._prefix + line + b"\n" for line in lines))

    def close(self) -> None:
        if self._partial:
            super().write(self._prefix + self._partial + b"\n")
            self._partial = b""
