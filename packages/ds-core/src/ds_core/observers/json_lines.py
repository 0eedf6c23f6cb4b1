"""Metrics of every step as one JSON object per line, written by rank 0."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ds_core.errors import DsError
from ds_core.observers.throughput import Throughput
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.engine import Engine

_KINDS = {EventKind.START, EventKind.STEP_END, EventKind.CHECKPOINT}


class JsonLines:
    """Appends to a file, flushed line by line, so that a crash loses nothing.

    Each line has "event" and "step"; steps also have loss, lr, grad_norm, skipped, step_s,
    samples_per_s, sent_bytes_per_step and memory_bytes of rank 0. A figure that is not finite is
    written as a string, because JSON has no NaN.

    Args:
        path: appended to; its folder is created.
        rank: global rank of this process; only 0 writes.
        breakdown: also write the seconds of each phase of a step.

    Raises DsError if the file cannot be opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, rank: int = 0, breakdown: bool = False
    ) -> None:
        self._file: IO[str] | None = None
        self._throughput = Throughput(breakdown=breakdown)
        if rank != 0:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise DsError(f"metrics.jsonl: cannot write {os.fspath(path)!r}: {error}") from error

    def __del__(self) -> None:
        # An engine that is dropped without `close()` leaves the file to us.
        if self._file is not None:
            self._file.close()

    def on_event(self, engine: Engine, event: Event) -> None:
        """Write one line for the start, each step, and each checkpoint."""
        if self._file is None:
            return
        if event.kind is EventKind.CLOSE:
            self._file.close()
            self._file = None
            return
        self._throughput.note(engine, event)
        if event.kind not in _KINDS:
            return
        line: dict[str, Any] = {"event": event.kind.value, "step": event.step}
        line.update({key: _plain(value) for key, value in event.values.items()})
        if event.kind is EventKind.STEP_END:
            line.update(self._throughput.read(engine, event.step))
            line["memory_bytes"] = sum(
                size for kind, size in engine.memory().items() if kind != "padding"
            )
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
