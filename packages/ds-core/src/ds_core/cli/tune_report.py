"""A search's result as text for people and as JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from ds_core.cli.plan_report import shown_seconds
from ds_core.cli.tables import table
from ds_core.tuning.records import BEST, RESULTS
from ds_core.tuning.tuner import TuningResult


def render(result: TuningResult, output: Path | None) -> str:
    """What was tried, the best first, and where the best config is."""
    rows = [
        (
            row.point,
            f"{row.samples_per_second:,.1f}" if row.samples_per_second else "failed",
            shown_seconds(row.step_s) if row.step_s else "",
            str(row.steps),
            row.reason,
        )
        for row in sorted(
            result.records, key=lambda row: (-row.rung, -(row.samples_per_second or 0.0))
        )
    ]
    header = ("point", "samples/s", "step", "steps", "")
    told = [table("Runs, the finalists first", rows, header)]
    reasons = Counter(reason.partition(":")[0] for reason in result.excluded.values())
    for reason, count in reasons.items():
        told.append(f"not run: {count} point{'s' if count > 1 else ''}: {reason}\n")
    told.append(
        f"best: {result.best_point.key}: {result.samples_per_second:,.1f} samples/s "
        f"({len(result.records)} runs, {result.num_points} points)\n"
        f"config: {output or result.folder / BEST}\nresults: {result.folder / RESULTS}\n"
    )
    return "".join(told)


def as_json(result: TuningResult, output: Path | None) -> str:
    """The same for programs."""
    told = {
        "best": result.best,
        "best_point": dict(result.best_point.values),
        "samples_per_second": result.samples_per_second,
        "config": str(output or result.folder / BEST),
        "runs": [asdict(row) for row in result.records],
        "not_run": dict(result.excluded),
    }
    return json.dumps(told, indent=2)
