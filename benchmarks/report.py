"""What a benchmark hands back: a table, the targets with their verdicts, and the raw figures."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Check:
    """One target.

    Attributes:
        quantity: what is measured.
        measured: its value, in the target's unit.
        limit: the largest value that meets the target.
        unit: written after both.
        least: the smallest value that meets it, for a target with two sides.
    """

    quantity: str
    measured: float
    limit: float
    unit: str = ""
    least: float | None = None

    @property
    def is_met(self) -> bool:
        above = self.least is None or self.measured >= self.least
        return above and self.measured <= self.limit

    @property
    def verdict(self) -> str:
        return "met" if self.is_met else "**missed**"

    @property
    def target(self) -> str:
        if self.least is None:
            return f"<= {_short(self.limit)}{self.unit}"
        if self.least == self.limit:
            return f"= {_short(self.limit)}{self.unit}"
        if math.isinf(self.limit):
            return f">= {_short(self.least)}{self.unit}"
        return f"{_short(self.least)} to {_short(self.limit)}{self.unit}"

    def cells(self) -> list[str]:
        shown = f"{_short(self.measured)}{self.unit}"
        return [self.quantity, shown, self.target, self.verdict]


@dataclass
class Report:
    """Result of one benchmark; `text` is GitHub Markdown that also reads well in a terminal."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Title, table, targets and notes."""
        parts = [f"### {self.title}", _table(self.columns, self.rows)]
        if self.checks:
            heading = ["target", "measured", "must be", "verdict"]
            parts.append(_table(heading, [check.cells() for check in self.checks]))
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)

    def save(self, *, quick: bool) -> Path:
        """Write everything to `results/NAME.json`; returns the path."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        checks = [
            {**asdict(check), "target": check.target, "met": check.is_met} for check in self.checks
        ]
        fields = asdict(self) | {"checks": checks, "quick": quick, "machine": machine()}
        path.write_text(json.dumps(fields | {"text": self.text()}, indent=1) + "\n")
        return path


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def main(run: Callable[[bool], Report]) -> None:
    """Command line of one benchmark: `python NAME.py [--quick]`."""
    parser = argparse.ArgumentParser(description=run.__doc__)
    parser.add_argument("--quick", action="store_true", help="few repetitions, a smaller model")
    quick = parser.parse_args().quick
    report = run(quick)
    print(report.text())
    print(f"\n{report.save(quick=quick)}")


def median(values: Iterable[float]) -> float:
    """Middle value."""
    return statistics.median(values)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Quotients of values of the same turn."""
    return [a / b for a, b in zip(over, under, strict=True)]


def mib(num_bytes: float) -> str:
    """Bytes for a reader."""
    return f"{num_bytes / 2**20:.1f} MiB"


def _short(value: float) -> str:
    if isinstance(value, int) or (value == int(value) and abs(value) >= 100):
        return f"{int(value):,}"
    if value and (abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
