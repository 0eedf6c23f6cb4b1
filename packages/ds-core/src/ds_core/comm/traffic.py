"""How long collectives take, how fast they are, and who is late: a table per operation and size.

    traffic = comm.Traffic(mesh.ledger)      # collects from now on
    ...
    print(traffic.summary(mesh.group("dp")).table())      # collective; traffic.rows() is not
    traffic.stop()

Bandwidths are those of NCCL's own benchmarks (nccl-tests, doc/PERFORMANCE.md): the algorithm
bandwidth is the size of the message by its time; the bus bandwidth multiplies it by what the
operation must move per byte of message, so that it compares with the hardware whatever the number
of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ds_core.comm.group import Group
from ds_core.comm.ledger import Ledger, Span, watch_all
from ds_core.comm.objects import all_gather_object

logger = logging.getLogger(__name__)


@dataclass
class TrafficRow:
    """All collectives of one operation, group and message size, on one rank.

    Attributes:
        op: operation.
        group: name of the group.
        group_size: its ranks.
        message_bytes: size of one message.
        caller: what they were for; empty where callers are not kept apart.
        num_calls: how many.
        sent_bytes: payload that this rank sent, all calls together.
        latency_s: time from call to completion, all calls together.
        waited_s: the part of it that somebody waited, all calls together.
    """

    op: str
    group: str
    group_size: int
    message_bytes: int
    caller: str = ""
    num_calls: int = 0
    sent_bytes: int = 0
    latency_s: float = 0.0
    waited_s: float = 0.0

    @property
    def mean_latency_s(self) -> float:
        """Time from call to completion of one."""
        return self.latency_s / self.num_calls

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes of message per second."""
        return self.message_bytes * self.num_calls / self.latency_s if self.latency_s else 0.0

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second that each rank's link carries at least."""
        return self.algorithm_bandwidth * bus_factor(self.op, self.group_size)

    def add(self, span: Span) -> None:
        """Count one more."""
        self.num_calls += 1
        self.sent_bytes += span.sent_bytes
        self.latency_s += (span.done_ns - span.issued_ns) / 1e9
        self.waited_s += max(span.done_ns - span.waited_ns, 0) / 1e9


def bus_factor(op: str, group_size: int) -> float:
    """Bytes over a rank's link per byte of message, the least that the operation can do with."""
    if op == "all_reduce":
        return 2 * (group_size - 1) / group_size
    if op.startswith(("all_gather", "reduce_scatter", "all_to_all")) or op in ("gather", "scatter"):
        return (group_size - 1) / group_size
    return 1.0


class Traffic:
    """Collects what a ledger's collectives take, until `stop`.

    Args:
        ledger: that of the mesh; None: every ledger of this process, those made later too.
        ops: only these operations; None: all.
        by_caller: keep callers apart.
        verbose: log each collective as it completes, at level INFO.
        synchronize: on a GPU, wait for the device at each collective: true times, no overlap.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        *,
        ops: Collection[str] | None = None,
        by_caller: bool = False,
        verbose: bool = False,
        synchronize: bool = True,
    ) -> None:
        self._ops, self._by_caller, self._verbose = ops, by_caller, verbose
        self._rows: dict[tuple[str, str, int, str], TrafficRow] = {}
        watch = watch_all if ledger is None else ledger.watch
        self.stop: Callable[[], None] = watch(self._take, synchronize=synchronize)

    def _take(self, span: Span) -> None:
        if self._ops is not None and span.op not in self._ops:
            return
        caller = span.caller if self._by_caller else ""
        key = (span.op, span.group, span.message_bytes, caller)
        row = self._rows.get(key)
        if row is None:
            row = TrafficRow(span.op, span.group, span.group_size, span.message_bytes, caller)
            self._rows[key] = row
        row.add(span)
        if self._verbose:
            seconds = (span.done_ns - span.issued_ns) / 1e9
            logger.info(
                "%s of %s in %s: %s in %.3f ms",
                *(span.op, span.caller or "the caller", span.group),
                *(told_bytes(span.message_bytes), seconds * 1e3),
            )

    def rows(self) -> list[TrafficRow]:
        """What this rank saw, most time first."""
        return sorted(self._rows.values(), key=lambda row: -row.latency_s)

    def reset(self) -> None:
        """Forget everything collected so far."""
        self._rows.clear()

    def summary(self, group: Group) -> TrafficSummary:
        """What all ranks of `group` saw, side by side. Collective over `group`."""
        everybody = all_gather_object(self.rows(), group, caller="traffic summary")
        return TrafficSummary(dict(zip(group.ranks, everybody, strict=True)))


@dataclass(frozen=True)
class Straggling:
    """How late ranks were at the collectives of one row.

    A rank that arrives last waits least: what the others took longer is what they waited for it.

    Attributes:
        last_rank: global rank that arrived last, over all calls.
        least_s: time that it took, from call to completion: the transfer itself.
        most_s: time that the rank took that waited most.
    """

    last_rank: int
    least_s: float
    most_s: float

    @property
    def lost_s(self) -> float:
        """Time that the earliest rank lost by waiting for the last."""
        return self.most_s - self.least_s


@dataclass(frozen=True)
class TrafficSummary:
    """Rows of several ranks; `by_rank` is keyed by global rank."""

    by_rank: dict[int, list[TrafficRow]] = field(default_factory=dict)

    def rows(self) -> list[tuple[TrafficRow, Straggling | None]]:
        """The rows of the lowest rank; with two ranks or more, who was late at each."""
        first = min(self.by_rank)
        found = []
        for row in self.by_rank[first]:
            same = {
                rank: other.latency_s
                for rank, rows in self.by_rank.items()
                for other in rows
                if _key(other) == _key(row)
            }
            straggling = None
            if len(same) > 1:
                last = min(same, key=lambda rank: same[rank])
                straggling = Straggling(last, same[last], max(same.values()))
            found.append((row, straggling))
        return found

    def table(self) -> str:
        """The rows as text, one line each."""
        head = ["operation", "group", "message", "calls", "sent", "total ms", "mean ms"]
        head += ["waited ms", "algbw", "busbw", "last rank", "lost ms"]
        lines = [head]
        for row, late in self.rows():
            name = f"{row.op} ({row.caller})" if row.caller else row.op
            lines.append(
                [
                    *(name, f"{row.group} x{row.group_size}", told_bytes(row.message_bytes)),
                    *(str(row.num_calls), told_bytes(row.sent_bytes)),
                    *(f"{1e3 * row.latency_s:.2f}", f"{1e3 * row.mean_latency_s:.3f}"),
                    f"{1e3 * row.waited_s:.2f}",
                    *(_told_rate(row.algorithm_bandwidth), _told_rate(row.bus_bandwidth)),
                    *((str(late.last_rank), f"{1e3 * late.lost_s:.2f}") if late else ("-", "-")),
                ]
            )
        return _aligned(lines)


def told_bytes(number: float) -> str:
    """ "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")


def _told_rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s else "-"


def _key(row: TrafficRow) -> tuple[str, str, int, str]:
    return row.op, row.group, row.message_bytes, row.caller


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first two to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
