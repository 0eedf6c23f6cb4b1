"""The GPUs that kernels are made for, and which of them a device is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

from ds_core.errors import OpError
from ds_ops import _env


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: as compilers call it.
        backend, arch, warp_size: as Triton calls it.
        shared: bytes of shared memory that one program can have.
        matrix: what its fastest instruction for products of matrices is called in assembly.
        also: other architectures that run its configs.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int
    matrix: str
    also: tuple[str, ...] = ()


#: Configs of sm_80 also run on sm_86, sm_89 and sm_120, which have 99 KiB, not its 163.
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("sm_80", "cuda", 80, 32, 101_376, "mma.sync", ("sm_86", "sm_89", "sm_120")),
            Target("sm_90", "cuda", 90, 32, 232_448, "wgmma.mma_async"),
            Target("sm_100", "cuda", 100, 32, 232_448, "tcgen05.mma", ("sm_103",)),
            Target("gfx942", "hip", "gfx942", 64, 65_536, "v_mfma", ("gfx90a", "gfx950")),
        )
    }
)

#: Of every target: the fastest instruction for products of matrices.
MATRIX: Mapping[str, str] = MappingProxyType({name: t.matrix for name, t in TARGETS.items()})

#: Whose configs Triton's interpreter takes.
INTERPRETED = TARGETS["sm_80"]


def of_architecture(name: str) -> Target | None:
    """The target whose configs run on an architecture such as "sm_89"; None if there is none."""
    for target in TARGETS.values():
        if name == target.name or name in target.also:
            return target
    return None


@cache
def architecture(device_type: str, index: int | None = None) -> str | None:
    """What a device is called, such as "sm_90" or "gfx942"; None if there is no such device."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def unavailable(device_type: str) -> str | None:
    """Why no kernel can run on such devices here, or None."""
    if device_type == "cpu":
        return None if _env.triton_interprets() else "for GPUs"
    name = architecture(device_type)
    if name is None:
        return f"torch finds no {device_type} device"
    if of_architecture(name) is None:
        known = [also for target in TARGETS.values() for also in (target.name, *target.also)]
        return f"for {', '.join(known)}; this is {name}"
    return None


def of_device(device: torch.device) -> Target:
    """The target that a device is. Raises OpError for one that no kernel is made for."""
    if device.type == "cpu" and _env.triton_interprets():
        return INTERPRETED
    name = architecture(device.type, device.index)
    target = of_architecture(name) if name else None
    if target is None:
        raise OpError(
            f"no kernel in Triton is made for {device} ({name or 'no such device here'}); there "
            f"are kernels for {', '.join(TARGETS)}"
        )
    return target


@cache
def processors(device: torch.device) -> int:
    """How many programs a device runs at a time, one per multiprocessor."""
    if device.type == "cpu":
        return 2  # more than one, for the interpreter's sake
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
