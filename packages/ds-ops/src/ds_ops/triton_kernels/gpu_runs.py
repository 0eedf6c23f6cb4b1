"""On which GPUs a kernel's present source has run: what `nox -s gpu` wrote into result files.

A file `benchmarks/results/<device>-<date>.json` holds, beside what was measured:

    {"device": "NVIDIA H200", "date": "2026-11-21", "kernels": {"rms_norm": "a1b2c3d4e5f6"}}

with the digest (`catalog.digest`) of the source of each op whose tests passed there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ds_ops.triton_kernels import catalog

_HERE = Path(__file__).resolve()
#: Of the repository; an installed package has none.
FOLDER = Path(*_HERE.parts[:-6]) / "benchmarks" / "results"


@dataclass(frozen=True)
class GpuRun:
    """One result file.

    Attributes:
        device, date: where and when.
        kernels: by op, the digest of the source that ran.
    """

    device: str
    date: str
    kernels: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.device}, {self.date}"


def runs(folder: Path = FOLDER) -> list[GpuRun]:
    """What is known of runs on GPUs, the last one first."""
    found = [_read(path) for path in folder.glob("*.json")]
    return sorted((run for run in found if run), key=lambda run: run.date, reverse=True)


def ran_on(op: str, known: Sequence[GpuRun]) -> str:
    """Where the present source of an op's kernel ran last, or why that is not known."""
    digest = catalog.digest(catalog.module(op))
    for run in known:
        if run.kernels.get(op) == digest:
            return f"ran on {run}"
    before = next((run for run in known if op in run.kernels), None)
    if before is not None:
        return f"never run on a GPU at this version; another one ran on {before}"
    return "never run on a GPU"


def record(ops: Iterable[str], device: str, folder: Path = FOLDER) -> Path:
    """Write down that the present sources of these ops' kernels ran today; the file's path.

    What the file of this device and day holds of others stays there.
    """
    date = datetime.now(UTC).date().isoformat()
    path = folder / f"{device.replace(' ', '_')}-{date}.json"
    found: dict[str, Any] = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    kernels = {op: catalog.digest(catalog.module(op)) for op in ops}
    found |= {"device": device, "date": date, "kernels": found.get("kernels", {}) | kernels}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def _read(path: Path) -> GpuRun | None:
    """The run that a file tells of; None for a file of another kind."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return GpuRun(str(found["device"]), str(found["date"]), dict(found["kernels"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
