"""The account of what this rank sent: bytes and calls by operation, group and caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LedgerRow:
    """Total of one (operation, group, caller)."""

    op: str
    group: str
    caller: str
    num_calls: int
    sent_bytes: int


@dataclass
class Ledger:
    """Counts the payload bytes that this rank sends, exactly as its collectives move them.

    One ledger belongs to one mesh; every group of the mesh writes into it. Headers of the
    wire protocol are not counted (gloo: under 0.2 % at 8 MiB messages).
    """

    _totals: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)

    def record(self, op: str, group: str, caller: str, sent_bytes: int) -> None:
        """Add one call that sends `sent_bytes` from this rank."""
        total = self._totals.setdefault((op, group, caller), [0, 0])
        total[0] += 1
        total[1] += sent_bytes

    def rows(self) -> list[LedgerRow]:
        """Totals, most bytes first."""
        rows = [LedgerRow(*key, *total) for key, total in self._totals.items()]
        return sorted(rows, key=lambda row: -row.sent_bytes)

    def sent_bytes(
        self, *, op: str | None = None, group: str | None = None, caller: str | None = None
    ) -> int:
        """Bytes sent by this rank, filtered by any of operation, group and caller."""
        return sum(row.sent_bytes for row in self._select(op, group, caller))

    def num_calls(
        self, *, op: str | None = None, group: str | None = None, caller: str | None = None
    ) -> int:
        """Calls made by this rank, filtered by any of operation, group and caller."""
        return sum(row.num_calls for row in self._select(op, group, caller))

    def _select(self, op: str | None, group: str | None, caller: str | None) -> list[LedgerRow]:
        return [
            row
            for row in self.rows()
            if op in (None, row.op) and group in (None, row.group) and caller in (None, row.caller)
        ]

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._totals.clear()

    @contextmanager
    def measure(self) -> Iterator[Ledger]:
        """A second ledger that receives only what is sent inside the `with` block."""
        before = {key: list(total) for key, total in self._totals.items()}
        inside = Ledger()
        try:
            yield inside
        finally:
            for key, (calls, sent) in self._totals.items():
                calls_before, sent_before = before.get(key, (0, 0))
                if calls > calls_before:
                    inside._totals[key] = [calls - calls_before, sent - sent_before]
