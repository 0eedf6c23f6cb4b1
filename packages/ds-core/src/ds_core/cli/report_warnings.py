"""What `ds report` warns of: things that are allowed, and hurt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from ds_core.cli.dropin import dropin_problems
from ds_core.cli.installed import Provided, duplicates, range_problems
from ds_core.cli.machine import Machine
from ds_core.cli.ops_report import OpRow

#: Below this, data loader workers and NCCL run out of shared memory.
_SMALL_SHM_BYTES = 2**30
_SMALL_LOCK_BYTES = 64 * 2**20
_FEW_FILES = 4096


def warnings_of(
    machine: Machine,
    provided: list[Provided],
    ops: list[OpRow],
    environment: Mapping[str, str],
) -> list[str]:
    """Everything that is likely to hurt, each with what to do about it."""
    found = [
        *duplicates(),
        *dropin_problems(),
        *range_problems(),
        *_limits(machine),
        *_torch_build(machine, environment),
    ]
    found += [f"{row.package or row.seam}: {row.problem}" for row in provided if row.problem]
    found += [f"ops: {row.problem}" for row in ops if row.problem]
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        found.append("RANK is set and WORLD_SIZE is not: unset it, or start with `ds run`")
    return list(dict.fromkeys(found))


def _limits(machine: Machine) -> list[str]:
    found = []
    if machine.shm_bytes is not None and machine.shm_bytes < _SMALL_SHM_BYTES:
        found.append(
            f"/dev/shm has {machine.shm_bytes >> 20} MiB: data loader workers and NCCL pass data "
            "through it and die with a bus error when it is full; in Docker give --shm-size=8g or "
            "--ipc=host, in Kubernetes mount an emptyDir of medium Memory there"
        )
    has_devices = machine.device_kind != "cpu"
    if has_devices and 0 <= (machine.locked_bytes or -1) < _SMALL_LOCK_BYTES:
        found.append(
            f"a process may lock {(machine.locked_bytes or 0) >> 10} KiB of memory (ulimit -l): "
            "RDMA networks need more; set `ulimit -l unlimited`, in Docker --ulimit memlock=-1"
        )
    if machine.open_files is not None and 0 <= machine.open_files < _FEW_FILES:
        found.append(
            f"a process may open {machine.open_files} files (ulimit -n): many ranks and data "
            "loader workers need more; set `ulimit -n 65536`"
        )
    return found


def _torch_build(machine: Machine, environment: Mapping[str, str]) -> list[str]:
    found = []
    if not dist.is_available():
        found.append("this build of torch has no torch.distributed: only one process can train")
    built_for = torch.version.cuda or torch.version.hip
    if built_for and machine.device_kind == "cpu":
        hidden = environment.get("CUDA_VISIBLE_DEVICES")
        reason = (
            f"CUDA_VISIBLE_DEVICES={hidden!r} hides them"
            if hidden is not None
            else "no driver, no device, or a container that was not given them (--gpus all)"
        )
        found.append(f"torch is built for GPUs ({built_for}) but sees none: {reason}")
    if machine.device_kind == "cuda":
        supported = set(torch.cuda.get_arch_list())
        for device in machine.devices:
            if torch.version.cuda and device.architecture and supported:
                major = device.architecture.rstrip("0123456789") + device.architecture[3:-1]
                if not any(name.startswith(major) for name in supported):
                    found.append(
                        f"{device.name} is {device.architecture}, torch is built for "
                        f"{', '.join(sorted(supported))}: install a torch built for it"
                    )
    return found
