"""On which GPUs a kernel's present source has run: what `nox -s gpu` wrote into result files.

A file `benchmarks/results/<device>-<date>.json` holds, beside what was measured:

    {"device": "NVIDIA H200", "date": "2026-11-21", "kernels": {"rms_norm:triton": "a1b2c3d4e5f6"}}

with the digest of the source of each op and implementation whose tests passed there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ds_ops.cuda_kernels import library as cuda
from ds_ops.triton_kernels import catalog

_HERE = Path(__file__).resolve()
#: Of the repository; an installed package has none.
FOLDER = Path(*_HERE.parts[:-5]) / "benchmarks" / "results"


@dataclass(frozen=True)
class GpuKernel:
    """What computes an op on a GPU.

    Attributes:
        op, implementation: "triton" or "cuda".
        digest: of what it is made from.
    """

    op: str
    implementation: str
    digest: str

    @property
    def key(self) -> str:
        """Its name in a result file."""
        return f"{self.op}:{self.implementation}"


def kernels() -> list[GpuKernel]:
    """Every kernel for GPUs that there is, by op; imports and builds none."""
    found = [GpuKernel(op, "triton", catalog.digest(catalog.module(op))) for op in catalog.OPS]
    found += [GpuKernel(op, "cuda", cuda.digest()[:12]) for op in cuda.ops()]
    return sorted(found, key=lambda kernel: kernel.key)


@dataclass(frozen=True)
class GpuRun:
    """One result file.

    Attributes:
        device, date: where and when.
        kernels: by `GpuKernel.key`, the digest of the source that ran.
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


def ran_on(kernel: GpuKernel, known: Sequence[GpuRun]) -> str:
    """Where the present source of a kernel ran last, or why that is not known."""
    for run in known:
        if run.kernels.get(kernel.key) == kernel.digest:
            return f"ran on {run}"
    before = next((run for run in known if kernel.key in run.kernels), None)
    if before is not None:
        return f"never run on a GPU at this version; another one ran on {before}"
    return "never run on a GPU"


def record(ran: Iterable[GpuKernel], device: str, folder: Path = FOLDER) -> Path:
    """Write down that the present sources of these kernels ran today; the file's path.

    What the file of this device and day holds of others stays there.
    """
    return add({"kernels": {kernel.key: kernel.digest for kernel in ran}}, device, folder)


def add(found: Mapping[str, Any], device: str, folder: Path = FOLDER) -> Path:
    """Add to the file of this device and day, mapping by mapping; the file's path."""
    date = datetime.now(UTC).date().isoformat()
    path = folder / f"{device.replace(' ', '_')}-{date}.json"
    whole: dict[str, Any] = {"kernels": {}}
    if path.exists():
        whole |= json.loads(path.read_text(encoding="utf-8"))
    for name, value in found.items():
        whole[name] = whole.get(name, {}) | value if isinstance(value, Mapping) else value
    whole |= {"device": device, "date": date}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return path


def _read(path: Path) -> GpuRun | None:
    """The run that a file tells of; None for a file of another kind."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return GpuRun(str(found["device"]), str(found["date"]), dict(found["kernels"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
