"""Measuring fairly on a noisy machine, and the table that every benchmark prints.

Candidates are compared only within one run, in which each is called once per round in an order
that rotates, so that whatever disturbs the machine disturbs all of them. A row states the fastest
call of each: what the code can do; medians show what the machine let it do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ds_ops._version import __version__
from ds_ops.native import library, processor, sources

#: Measures for about that many seconds per row, and yields rows as they are ready.
Rows = Callable[[float], Iterator["Row"]]

#: Calls shorter than this are repeated within a round: the clock and the call cost time as well.
_SHORTEST_S = 50e-6


@dataclass(frozen=True)
class Timing:
    """How long one call took, in seconds, over all rounds."""

    min_s: float
    median_s: float
    p10_s: float
    p90_s: float
    rounds: int

    @property
    def ms(self) -> float:
        """The fastest call, in milliseconds."""
        return self.min_s * 1e3


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
) -> dict[str, Timing]:
    """How long each candidate takes, measured side by side.

    Args:
        candidates: calls by name, with arguments and outputs of their own.
        seconds: for all of them together, after one call of each to warm up.
        min_rounds: even if that takes longer.
    """
    repeats = {name: _repeats(call) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while order and (rounds < min_rounds or time.perf_counter() < deadline):
        for name in order:
            samples[name].append(_seconds(candidates[name], repeats[name]))
        order.append(order.pop(0))
        rounds += 1
    return {name: timing_of(found) for name, found in samples.items()}


def _repeats(call: Callable[[], object]) -> int:
    """How often to call it per round; the first call, which may build or allocate, is not one."""
    call()
    fastest = min(_seconds(call, 1) for _ in range(2))
    return 1 if fastest >= _SHORTEST_S else int(_SHORTEST_S / max(fastest, 1e-7)) + 1


def _seconds(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def timing_of(samples: list[float]) -> Timing:
    """What a number of calls took, in seconds each."""
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]

    return Timing(ordered[0], at(0.5), at(0.1), at(0.9), len(ordered))


@dataclass(frozen=True)
class Row:
    """One op at one size beside its floor and one peer.

    Attributes:
        op, shape, dtype: as "rms_norm", "2048x4096", "bf16".
        ms: the fastest call.
        floor_ms: the least that this machine could need, measured in the same run.
        peer, peer_ms: who else computes it, and how fast, in the same run.
        error: relative to float64; None where nothing is computed.
        max_x_floor, min_x_peer: what must be reached.
        threads: of torch.
        median_ms: of all calls.
        note: whatever a reader of the row must know.
    """

    op: str
    shape: str
    dtype: str
    ms: float
    floor_ms: float | None = None
    peer: str = ""
    peer_ms: float | None = None
    error: float | None = None
    max_x_floor: float | None = None
    min_x_peer: float | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    median_ms: float | None = None
    note: str = ""

    @property
    def x_floor(self) -> float | None:
        """How many times as long as the floor; 1 is the best there is."""
        return self.ms / self.floor_ms if self.floor_ms else None

    @property
    def x_peer(self) -> float | None:
        """How many times as fast as the peer."""
        return self.peer_ms / self.ms if self.peer_ms is not None else None

    @property
    def missed(self) -> list[str]:
        """Targets that this row does not reach."""
        found = []
        if self.max_x_floor is not None and (self.x_floor or 0.0) > self.max_x_floor:
            found.append(f"x floor <= {self.max_x_floor:g}")
        if self.min_x_peer is not None and (self.x_peer or 0.0) < self.min_x_peer:
            found.append(f"x peer >= {self.min_x_peer:g}")
        return found

    def as_dict(self) -> dict[str, object]:
        """All of it, for JSON."""
        own = dataclasses.asdict(self)
        return own | {"x_floor": self.x_floor, "x_peer": self.x_peer, "missed": self.missed}


def row(
    op: str,
    shape: str,
    dtype: torch.dtype | str,
    timings: Mapping[str, Timing],
    *,
    peer: str = "",
    ours: str = "ours",
    floor: str = "floor",
    floor_ms: float | None = None,
    error: float | None = None,
    max_x_floor: float | None = None,
    min_x_peer: float | None = None,
    note: str = "",
) -> Row:
    """A row from what `interleave` found.

    Args:
        timings: with entries of the names `ours`, and, where there is one, `floor` and `peer`.
        floor_ms: where the floor was not among the candidates.
    """
    measured = timings.get(floor)
    other = timings.get(peer)
    return Row(
        op,
        shape,
        short_dtype(dtype),
        timings[ours].ms,
        floor_ms=measured.ms if measured else floor_ms,
        peer=peer,
        peer_ms=other.ms if other else None,
        error=error,
        max_x_floor=max_x_floor,
        min_x_peer=min_x_peer,
        median_ms=timings[ours].median_s * 1e3,
        note=note,
    )


def short_dtype(dtype: torch.dtype | str) -> str:
    """Such as "bf16" for torch.bfloat16."""
    told = str(dtype).removeprefix("torch.")
    return told.replace("bfloat", "bf").replace("float", "fp")


# --- Printing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a figure means nothing without."""

    ds_ops: str
    torch: str
    cpu: str
    isa: str
    sources: str
    load: float

    def __str__(self) -> str:
        return (
            f"ds-ops {self.ds_ops} (sources {self.sources}), torch {self.torch}, {self.cpu}, "
            f"{self.isa}, load {self.load:.1f}"
        )


def header() -> Header:
    """Versions, processor, instruction set, sources and load of this moment; builds the library."""
    return Header(
        __version__,
        torch.__version__,
        f"{processor.name()} x{os.cpu_count()}",
        library.isa(),
        sources.digest()[:12],
        os.getloadavg()[0],
    )


_COLUMNS = ("op", "shape", "dtype", "thr", "ms", "floor ms", "x floor", "peer", "peer ms", "x peer")


class Table:
    """Rows as text, each line complete as soon as its row is."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.rows: list[Row] = []

    def begin(self, head: Header) -> None:
        """Write what the figures depend on, and the columns' names."""
        self._write(f"{head}\n")
        self._write(self._line((*_COLUMNS, "error", "")) + "\n")

    def add(self, new: Row) -> None:
        """Write one row."""
        self.rows.append(new)
        remark = "; ".join(
            [*(f"MISSED {target}" for target in new.missed), *([new.note] if new.note else [])]
        )
        cells = (
            *(new.op, new.shape, new.dtype, str(new.threads)),
            *(_number(new.ms), _number(new.floor_ms), _ratio(new.x_floor)),
            *(new.peer, _number(new.peer_ms), _ratio(new.x_peer)),
            "" if new.error is None else f"{new.error:.1e}",
            remark,
        )
        self._write(self._line(cells) + "\n")

    @staticmethod
    def _line(cells: Iterable[str]) -> str:
        widths = (26, 22, 6, 3, 9, 9, 7, 26, 9, 7, 8, 0)
        left = (0, 1, 2, 7, 11)
        padded = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return " ".join(padded).rstrip()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def run(
    families: Mapping[str, Rows],
    *,
    seconds: float = 1.0,
    as_json: bool = False,
    only: str = "",
) -> list[Row]:
    """Measure families, and write a table or JSON as rows come.

    Args:
        families: `rows` by name.
        seconds: per row.
        only: rows whose op contains it; the others are measured but not shown.
    """
    head = header()
    table = Table(_print if not as_json else (lambda text: None))
    table.begin(head)
    found: dict[str, list[dict[str, object]]] = {}
    for name, rows in families.items():
        for each in rows(seconds):
            if only in each.op:
                table.add(each)
                found.setdefault(name, []).append(each.as_dict())
    if as_json:
        _print(json.dumps({"header": dataclasses.asdict(head), "families": found}, indent=2) + "\n")
    return table.rows


def _print(text: str) -> None:
    """Each row when it is ready, also into a pipe."""
    sys.stdout.write(text)
    sys.stdout.flush()


def main(rows: Rows, arguments: Sequence[str] | None = None) -> None:
    """The command line of one family's module. Exits with 1 if `--check` finds a target missed."""
    parser = argparse.ArgumentParser(description="Every row: ours, floor and peer interleaved.")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it is")
    parser.add_argument("--only", default="", help="rows whose op contains this")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    found = run({"": rows}, seconds=given.seconds, as_json=given.json, only=given.only)
    if given.check and any(each.missed for each in found):
        sys.exit(1)
