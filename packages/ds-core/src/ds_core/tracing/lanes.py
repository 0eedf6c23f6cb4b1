"""What a trace is made of: slices of time on lanes, one set of lanes per rank."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_core.errors import DsError

#: Lanes of a rank from top to bottom, and the rows that each may take.
LANES: Mapping[str, str] = {
    "step": "steps",
    "phase": "phases",
    "compute": "compute",
    "gather": "gather",
    "reduce": "reduce",
    "other": "other communication",
    "wait": "waiting",
    "host": "host operations",
    "calls": "calls of collectives",
}
_ROWS = 100

#: Lanes on which messages are under way.
COMMUNICATION = ("gather", "reduce", "other")


@dataclass(frozen=True)
class Slice:
    """Something that took time.

    Attributes:
        lane: a key of `LANES`.
        name: what it was.
        begin_us, end_us: on the clock that all ranks share.
        row: slices of one row either nest or do not overlap.
        details: figures and texts by name.
    """

    lane: str
    name: str
    begin_us: float
    end_us: float
    row: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankTrace:
    """The slices of one rank, and where they come from.

    Attributes:
        rank, world_size: global.
        host: name of the machine.
        recording: the same for all ranks of one recording, and for no other.
        slices: in any order.
        has_ops: whether the compute lane holds operations; else phases stand for compute.
    """

    rank: int
    world_size: int
    host: str
    recording: str
    slices: tuple[Slice, ...]
    has_ops: bool = True

    def on(self, *lanes: str) -> Iterator[Slice]:
        """The slices of some lanes."""
        return (each for each in self.slices if each.lane in lanes)

    def events(self) -> Iterator[dict[str, Any]]:
        """The rank as events of the Chrome trace format: one process, one thread per row."""
        yield _meta("process_name", self.rank, 0, {"name": f"rank {self.rank} ({self.host})"})
        yield _meta("process_sort_index", self.rank, 0, {"sort_index": self.rank})
        first = {lane: _ROWS * index for index, lane in enumerate(LANES)}
        for lane, row in sorted({(s.lane, s.row) for s in self.slices}):
            thread = first[lane] + row
            label = LANES[lane] + (f" {row + 1}" if row else "")
            yield _meta("thread_name", self.rank, thread, {"name": label})
            yield _meta("thread_sort_index", self.rank, thread, {"sort_index": thread})
        for each in sorted(self.slices, key=lambda s: (s.begin_us, -s.end_us)):
            yield {
                "ph": "X",
                "cat": each.lane,
                "name": each.name,
                "pid": self.rank,
                "tid": first[each.lane] + each.row,
                "ts": round(each.begin_us, 3),
                "dur": round(max(0.0, each.end_us - each.begin_us), 3),
                "args": dict(each.details),
            }

    def save(self, path: Path) -> None:
        """Write this rank's file, which chrome://tracing and ui.perfetto.dev open by itself too."""
        about = {name: getattr(self, name) for name in _ABOUT}
        _write(path, {"ds_core": about, "traceEvents": list(self.events())})


_ABOUT = ("rank", "world_size", "host", "recording", "has_ops")


def load_rank(path: Path) -> RankTrace:
    """Read a file that `RankTrace.save` wrote. Raises DsError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about = {name: content["ds_core"][name] for name in _ABOUT}
        slices = tuple(
            Slice(
                event["cat"],
                event["name"],
                event["ts"],
                event["ts"] + event["dur"],
                event["tid"] % _ROWS,
                event["args"],
            )
            for event in content["traceEvents"]
            if event["ph"] == "X"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DsError(
            f"{path}: not a rank's trace of ds-core ({type(error).__name__}: {error})"
        ) from error
    return RankTrace(slices=slices, **about)


def load_folder(folder: Path) -> list[RankTrace]:
    """The ranks of one recording, in order; some may be missing.

    Raises DsError if there is none, or if files of several recordings lie there.
    """
    paths = sorted(folder.glob("rank*.json"))
    if not paths:
        raise DsError(
            f"{folder}: no rank*.json in it; record some steps with "
            f'"trace": {{"enabled": true, "output_path": "{folder}"}} in the config'
        )
    ranks = sorted((load_rank(path) for path in paths), key=lambda each: each.rank)
    recordings = {each.recording for each in ranks}
    if len(recordings) > 1:
        raise DsError(
            f"{folder}: files of {len(recordings)} recordings are mixed there (ranks "
            f"{[each.rank for each in ranks]}); keep those of one"
        )
    return ranks


def merge(ranks: Iterable[RankTrace], path: Path) -> None:
    """Write all ranks into one file for ui.perfetto.dev, on one time line."""
    _write(path, {"traceEvents": [event for rank in ranks for event in rank.events()]})


def _meta(name: str, process: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": args}


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    except OSError as error:
        raise DsError(f"trace: cannot write {str(path)!r}: {error}") from error


def rows_of(slices: Iterable[Slice]) -> list[Slice]:
    """The same slices of one lane, on as few rows as keep them from overlapping."""
    ends: list[float] = []
    placed = []
    for each in sorted(slices, key=lambda s: (s.begin_us, s.end_us)):
        row = next((i for i, end in enumerate(ends) if end <= each.begin_us), len(ends))
        row = min(row, _ROWS - 1)
        ends[row : row + 1] = [each.end_us]
        placed.append(Slice(each.lane, each.name, each.begin_us, each.end_us, row, each.details))
    return placed
