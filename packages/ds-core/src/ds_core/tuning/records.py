"""The results of a search as a file: what was tried, what came of it, and the best config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.json"
BEST = "best_config.json"


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        point: the choice, as text.
        steps: measured steps.
        rung: 0 for a first look, 1 and up for finalists.
        step_s: median seconds of an optimizer step; None if it failed.
        samples_per_second: of all ranks; None if it failed.
        reason: why it failed, empty if it did not.
        predicted_step_s: what the planner said.
    """

    point: str
    steps: int
    rung: int
    step_s: float | None
    samples_per_second: float | None
    reason: str
    predicted_step_s: float


class Records:
    """The runs of a search, each on disk as soon as it has ended.

    Args:
        folder: where results.json and best_config.json go.
        identity: what the search is about; results of another one are not taken up.
        keep: whether to take up what is there.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, keep: bool) -> None:
        self._file = folder / RESULTS
        self._identity = dict(identity)
        self.rows: list[Record] = []
        self._earlier: list[Record] = []
        folder.mkdir(parents=True, exist_ok=True)
        if keep and self._file.exists():
            found = json.loads(self._file.read_text(encoding="utf-8"))
            if found.get("search") == json.loads(json.dumps(self._identity)):
                self._earlier = [Record(**row) for row in found["runs"]]

    def earlier(self, point: str, steps: int, rung: int) -> Record | None:
        """The result of the same run in an earlier, interrupted search; each is taken up once."""
        for index, row in enumerate(self._earlier):
            if (row.point, row.steps, row.rung) == (point, steps, rung):
                return self._earlier.pop(index)
        return None

    def add(self, record: Record) -> None:
        """Write a run down."""
        self.rows.append(record)
        text = {"search": self._identity, "runs": [asdict(row) for row in self.rows]}
        _write(self._file, text)


def write_best(file: Path, config: Mapping[str, Any]) -> None:
    """Write the best config, ready to use."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, config)


def _write(file: Path, value: Mapping[str, Any]) -> None:
    """Replace a file at once: a reader, or an interrupted search, never sees half of it."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)
