"""Everything that is measured, as one JSON object per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from ds_core.errors import DsError
from ds_core.observers.sink import Record, as_plain


class JsonLines:
    """A sink that appends to a file, flushed line by line, so that a crash loses nothing.

    Each line has "event", "step" and "samples"; those of a step also loss, lr, grad_norm, skipped,
    step_s, samples_per_s, sent_bytes_per_step and memory_bytes of rank 0. A figure that is not
    finite is written as a string, because JSON has no NaN.

    Args:
        path: appended to; its folder is created.

    Raises DsError if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file: IO[str] | None = None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise DsError(f"metrics.jsonl: cannot write {os.fspath(path)!r}: {error}") from error

    def __del__(self) -> None:
        # An engine that is dropped without `close()` leaves the file to us.
        self.close()

    def write(self, record: Record) -> None:
        if self._file is None:
            return
        line = {"event": record.kind.value, "step": record.step, "samples": record.samples}
        line.update({key: as_plain(value) for key, value in record.values.items()})
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
