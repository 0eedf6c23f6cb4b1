"""What `ds report` finds: versions, devices, packages, ops, and what hurts."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_core import _env
from ds_core.cli.installed import (
    SUITE,
    Installable,
    Provided,
    installable,
    place_of,
    provided,
    version_of,
)
from ds_core.cli.machine import Machine, cuda_compiler, examine
from ds_core.cli.offload_report import OffloadRow, offload_rows
from ds_core.cli.ops_report import OpRow, advice, op_rows, summary, tool_facts
from ds_core.cli.report_warnings import warnings_of
from ds_core.cli.tables import table
from ds_core.launcher.environment import is_secret
from ds_core.quantities import told_bytes

#: Distributions beside the suite's whose version explains how a job behaves.
_OTHERS = ("triton", "numpy", "pydantic", "transformers", "flash-attn", "deepspeed")
#: Beginnings of the environment variables that change what a job does.
_PREFIXES = (
    "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "ZE_", "NCCL_", "TORCH_", "PYTORCH_", "GLOO_", "OMP_",
    "MKL_", "KMP_", "TRITON_", "DS_", "SLURM_JOB", "SLURM_NTASKS", "MASTER_",
)  # fmt: skip
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LD_PRELOAD", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows, as plain data.

    Attributes:
        versions: of the interpreter, torch and what it is built with.
        machine: processor, memory, limits, devices.
        backends: torch.distributed backends and whether this build of torch has them.
        installed: versions of the suite's packages that are installed.
        others: versions of other packages that matter.
        places: the folders of torch and of those that are installed.
        provided: what packages register on each seam, and what of it is broken.
        ops: who computes each op here.
        build_tools: what kernels are built with, and for what.
        offload: what steps on the host, and what moves tensors to and from disk.
        installable: what could be installed.
        environment: the variables of effect that are set.
        warnings: what hurts.
    """

    versions: dict[str, str]
    machine: Machine
    backends: dict[str, bool]
    installed: dict[str, str]
    others: dict[str, str]
    places: dict[str, str]
    provided: list[Provided]
    ops: list[OpRow]
    build_tools: dict[str, str]
    offload: list[OffloadRow]
    installable: list[Installable]
    environment: dict[str, str]
    warnings: list[str]

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def collect() -> Findings:
    """Look at this process's environment. Starts nothing and allocates on no device."""
    machine, rows, ops, environment = examine(), provided(), op_rows(), _environment(_env.whole())
    own, others = _installed(SUITE), _installed(dict.fromkeys(_OTHERS, ""))
    named = ("torch", *own, *others)
    return Findings(
        versions=_versions(),
        machine=machine,
        backends=_backends(),
        installed=own,
        others=others,
        places={name: place for name in named if (place := place_of(name)) is not None},
        provided=rows,
        ops=ops,
        build_tools=_build_tools(),
        offload=offload_rows(),
        installable=installable(),
        environment=environment,
        warnings=warnings_of(machine, rows, ops, environment),
    )


def render(findings: Findings) -> str:
    """The findings as text for a terminal or an issue."""
    parts = [table("Versions", findings.versions.items())]
    parts.append(table("Machine", _machine_rows(findings).items()))
    packages = {**findings.installed, **findings.others}
    places = findings.places
    rows = [(name, version, places.get(name, "")) for name, version in packages.items()]
    parts.append(table("Packages", rows))
    parts.append(
        table(
            "Provided by packages",
            [
                (f"{row.seam}: {row.name}", row.package, "broken" if row.problem else "")
                for row in findings.provided
            ],
        )
    )
    told = [("", text) for text in advice(findings.ops)]
    parts.append(table("Ops", [*told, *summary(findings.ops), ("more", "ds ops report")]))
    if findings.build_tools:
        parts.append(table("Kernels are built with", findings.build_tools.items()))
    told_offload = [(row.what, row.chosen, row.reason) for row in findings.offload]
    parts.append(table("Offload (the host's part)", told_offload))
    if findings.installable:
        could = [(row.name, row.purpose, row.command) for row in findings.installable]
        parts.append(table("Could be installed", could))
    if findings.environment:
        parts.append(table("Environment", findings.environment.items()))
    if findings.warnings:
        parts.append(table("Warnings", [("!", text) for text in findings.warnings]))
    return "\n".join(part for part in parts if part)


def _versions() -> dict[str, str]:
    built_for = {
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "XPU": torch.version.xpu,
    }
    toolkit = ", ".join(f"{name} {version}" for name, version in built_for.items() if version)
    versions = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "torch": f"{torch.__version__} (built for {toolkit or 'CPU'})",
    }
    if dist.is_available() and dist.is_nccl_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    nvcc = cuda_compiler()
    if nvcc is not None:
        versions["nvcc"] = nvcc
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return versions


def _build_tools() -> dict[str, str]:
    """What the packages with kernels tell, without what the report has elsewhere."""
    return {name: text for name, text in tool_facts().items() if name != "torch"}


def _machine_rows(findings: Findings) -> dict[str, str]:
    machine = findings.machine
    backends = ", ".join(name for name, has in findings.backends.items() if has) or "none"
    numa = f", {machine.numa_nodes} NUMA nodes" if (machine.numa_nodes or 1) > 1 else ""
    locked = machine.locked_bytes
    rows = {
        "processor": machine.processor,
        "cores": f"{machine.cores} usable of {machine.all_cores}{numa}",
        "instructions": f"{' '.join(machine.isa) or 'unknown'}; torch uses {machine.kernels}",
        "memory": f"{_told(machine.memory_bytes)}, {_told(machine.available_bytes)} available",
        "/dev/shm": _told(machine.shm_bytes),
        "limits": (
            f"lock {'any' if locked == -1 else _told(locked)} memory, "
            f"open {'any' if machine.open_files == -1 else machine.open_files} files"
        ),
        "devices": machine.device_kind if not machine.devices else "",
        "distributed": backends,
    }
    for device in machine.devices:
        told = [device.name, _told(device.total_bytes), device.architecture or ""]
        rows[f"{machine.device_kind}:{device.index}"] = ", ".join(filter(None, told))
    return {name: text for name, text in rows.items() if text}


def _told(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else told_bytes(num_bytes)


def _installed(names: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name in names if (version := version_of(name)) is not None}


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(variables.items())
        if (name.startswith(_PREFIXES) or name in _NAMES) and not is_secret(name)
    }


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
