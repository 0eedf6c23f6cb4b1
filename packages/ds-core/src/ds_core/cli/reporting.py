"""What `ds report` finds: the machine, torch, the suite's packages, and who provides what."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import get_args

import torch
import torch.distributed as dist

from ds_core import plugins
from ds_core.cli.tables import table
from ds_core.launcher.plan import num_cores

#: The packages of the suite and what each is for.
SUITE: Mapping[str, str] = {
    "ds-core": "engine, config, collectives, checkpoints, launcher",
    "ds-zero": "ZeRO 1-3, offload to CPU and NVMe",
    "ds-ops": "fast kernels and optimizers, asynchronous file I/O",
    "ds-comm": "compressed optimizers and collectives",
    "ds-pipe": "pipeline, tensor and sequence parallelism",
    "ds-moe": "mixture of experts",
    "ds-inference": "serving and generation",
    "ds-compress": "quantization, pruning, distillation",
}


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows, as plain data.

    Attributes:
        system: facts of the machine and the interpreter by name.
        device: kind of accelerator ("cpu" without one) and the name of each device.
        backends: torch.distributed backends and whether this build of torch has them.
        installed: versions of the suite's packages that are installed.
        available: what the packages that are not installed are for.
        provided: per seam, the registered names and where each comes from.
    """

    system: dict[str, str]
    device: dict[str, str | list[str]]
    backends: dict[str, bool]
    installed: dict[str, str]
    available: dict[str, str]
    provided: dict[str, dict[str, str]]

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def collect() -> Findings:
    """Look at this process's environment. Starts nothing and allocates on no device."""
    installed = {name: version for name in SUITE if (version := _version(name)) is not None}
    return Findings(
        system=_system(),
        device=_device(),
        backends=_backends(),
        installed=installed,
        available={name: what for name, what in SUITE.items() if name not in installed},
        provided={seam: _entries(seam) for seam in get_args(plugins.Seam)},
    )


def render(findings: Findings) -> str:
    """The findings as text for a terminal or an issue."""
    kind, names = findings.device["kind"], findings.device["names"]
    device = str(kind) if not names else f"{kind}: {', '.join(names)}"
    backends = ", ".join(name for name, has in findings.backends.items() if has) or "none"
    machine = {**findings.system, "devices": device, "distributed": backends}
    provided = [
        (seam, name, origin)
        for seam, entries in findings.provided.items()
        for name, origin in entries.items()
    ]
    parts = [table("System", machine.items()), table("Packages", findings.installed.items())]
    if provided:
        parts.append(table("Provided by packages", provided))
    if findings.available:
        parts.append(table("Not installed", findings.available.items()))
    return "\n".join(parts)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _system() -> dict[str, str]:
    built_for = {
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "XPU": torch.version.xpu,
    }
    toolkit = ", ".join(f"{name} {version}" for name, version in built_for.items() if version)
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": f"{num_cores()} usable of {os.cpu_count()}",
        "torch": f"{torch.__version__} (built for {toolkit or 'CPU'})",
    }


def _device() -> dict[str, str | list[str]]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return {"kind": "cpu", "names": []}
    module = torch.get_device_module(accelerator)
    count = torch.accelerator.device_count()
    named = getattr(module, "get_device_name", None)
    names = [named(index) if named else f"{accelerator.type}:{index}" for index in range(count)]
    return {"kind": accelerator.type, "names": names}


def _backends() -> dict[str, bool]:
    if not dist.is_available():
        return {}
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "ucc": dist.is_ucc_available(),
        "xccl": dist.is_xccl_available(),
    }


def _entries(seam: plugins.Seam) -> dict[str, str]:
    return {
        name: f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        for name, entry in sorted(plugins.registered(seam).items())
    }
