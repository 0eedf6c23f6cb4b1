"""What `ds report` finds out about the machine: processor, memory, limits, devices."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_core import accelerator
from ds_core.launcher.plan import num_cores

#: Instruction sets that matter to speed, as Linux names them.
ISA_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "sve", "sve2", "bf16",
)  # fmt: skip
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Device:
    """One device that this process can see."""

    index: int
    name: str
    total_bytes: int | None
    architecture: str | None


@dataclass(frozen=True)
class Machine:
    """The hardware and its limits, None where they cannot be found out.

    Attributes:
        processor: model of the CPU.
        cores: usable by this process; `all_cores` of the machine.
        isa: instruction sets, of `ISA_FLAGS`; `kernels` is what torch's CPU kernels use.
        numa_nodes: memory domains.
        memory_bytes: of the machine, or of the container if that is less.
        available_bytes: not in use now.
        shm_bytes: size of /dev/shm, through which processes share tensors.
        locked_bytes: how much memory a process may lock (`ulimit -l`); -1 for any amount.
        open_files: how many files a process may open (`ulimit -n`).
        device_kind: "cpu" without an accelerator.
    """

    processor: str
    cores: int
    all_cores: int
    isa: tuple[str, ...]
    kernels: str
    numa_nodes: int | None
    memory_bytes: int | None
    available_bytes: int | None
    shm_bytes: int | None
    locked_bytes: int | None
    open_files: int | None
    device_kind: str
    devices: tuple[Device, ...]


def examine() -> Machine:
    """This machine. Starts nothing and allocates on no device."""
    cpuinfo = _text(Path("/proc/cpuinfo"))
    meminfo = _text(Path("/proc/meminfo"))
    flags = set(_field(cpuinfo, "flags", "Features").split())
    kind, devices = _devices()
    limit = _container_limit()
    total = _kilobytes(meminfo, "MemTotal")
    return Machine(
        processor=_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        cores=num_cores(),
        all_cores=os.cpu_count() or 1,
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        kernels=torch.backends.cpu.get_cpu_capability(),
        numa_nodes=_numa_nodes(),
        memory_bytes=min(filter(None, (total, limit)), default=None),
        available_bytes=_kilobytes(meminfo, "MemAvailable"),
        shm_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        locked_bytes=_limit("RLIMIT_MEMLOCK"),
        open_files=_limit("RLIMIT_NOFILE"),
        device_kind=kind,
        devices=devices,
    )


def cuda_compiler() -> str | None:
    """The release of the CUDA compiler and where it is; None if there is none."""
    program = shutil.which("nvcc") or _nvcc_of_torch()
    if program is None:
        return None
    try:
        told = subprocess.run(
            [program, "-V"], capture_output=True, text=True, check=False, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not start: {error}"
    release = re.search(r"release (\S+?),", told)
    return f"{release[1] if release else 'of unknown release'} ({program})"


def _nvcc_of_torch() -> str | None:
    if torch.version.cuda is None:
        return None
    from torch.utils.cpp_extension import CUDA_HOME

    return None if CUDA_HOME is None else shutil.which("nvcc", path=str(Path(CUDA_HOME, "bin")))


def _devices() -> tuple[str, tuple[Device, ...]]:
    found = accelerator.current()
    if found.kind == "cpu":
        return "cpu", ()
    return found.kind, tuple(_device(found, index) for index in range(found.device_count()))


def _device(found: accelerator.Accelerator, index: int) -> Device:
    module = torch.get_device_module(found.kind)
    described = getattr(module, "get_device_properties", None)
    properties = described(index) if described is not None else None
    total = getattr(properties, "total_memory", None)
    architecture = getattr(properties, "gcnArchName", None)
    if architecture is None and properties is not None and hasattr(properties, "major"):
        architecture = f"sm_{properties.major}{properties.minor}"
    return Device(index, found.name(index), total, architecture)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, *names: str) -> str:
    for name in names:
        if match := re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1].strip()
    return ""


def _kilobytes(meminfo: str, name: str) -> int | None:
    words = _field(meminfo, name).split()
    return int(words[0]) * 1024 if words else None


def _container_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(Path(path)).strip()
        if text.isdigit():
            return int(text)
    return None


def _numa_nodes() -> int | None:
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return len(nodes) or None


def _limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return None
    soft = resource.getrlimit(getattr(resource, name))[0]
    return -1 if soft == resource.RLIM_INFINITY else soft
