"""What a device can do, for estimates: the makers' published figures.

Bandwidths are per device and direction, in bytes per second; arithmetic is dense, without
sparsity. Any of them can be overridden, and measured figures are always better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ds_core import _values
from ds_core.errors import PlanError

GIB = 2**30
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class DeviceSpec:
    """One kind of device and the links around it.

    Attributes:
        name: what the command line calls it.
        memory_bytes: its memory, as its driver reports it.
        flops_16bit: operations per second in bf16 or fp16 matrix products.
        flops_32bit: the same in fp32, as torch computes by default (no TF32).
        memory_bandwidth: bytes per second of its memory.
        intra_bandwidth: bytes per second that it sends to the devices of its node.
        inter_bandwidth: bytes per second that it sends to other nodes: its share of the network
            cards.
        bf16_is_fast: whether bf16 is faster than fp32.
    """

    name: str
    memory_bytes: int
    flops_16bit: float
    flops_32bit: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    bf16_is_fast: bool = True

    def flops(self, itemsize: int) -> float:
        """Operations per second on numbers of `itemsize` bytes."""
        return self.flops_16bit if itemsize <= 2 else self.flops_32bit

    def with_overrides(self, **changes: float | None) -> DeviceSpec:
        """The same device with the figures that are given and not None."""
        given = {key: value for key, value in changes.items() if value is not None}
        for key, value in given.items():
            if not 0 < value < math.inf:
                raise PlanError(f"{key}: got {value:g}, expected a number above 0")
        if "memory_bytes" in given:
            given["memory_bytes"] = int(given["memory_bytes"])
        return replace(self, **given)  # type: ignore[arg-type]


def _gpu(
    name: str,
    gib: int,
    tflops: tuple[float, float],
    hbm_tb: float,
    intra_gb: float,
    inter_gb: float,
) -> DeviceSpec:
    return DeviceSpec(
        name,
        gib * GIB,
        tflops[0] * TERA,
        tflops[1] * TERA,
        hbm_tb * TERA,
        intra_gb * GIGA,
        inter_gb * GIGA,
    )


#: NVLink or Infinity Fabric of the usual server within a node, PCIe where there is neither; one
#: 400 Gbit/s (older: 200 Gbit/s) network card per device between nodes, cards without a usual
#: server 100 Gbit/s for all, counted per device.
DEVICES: Mapping[str, DeviceSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _gpu("v100", 31, (125, 15.7), 0.90, 150, 12.5),
            _gpu("a100", 79, (312, 19.5), 2.04, 300, 25),
            _gpu("a100-40g", 39, (312, 19.5), 1.56, 300, 25),
            _gpu("h100", 79, (989, 67), 3.35, 450, 50),
            _gpu("h200", 139, (989, 67), 4.8, 450, 50),
            _gpu("b200", 178, (2250, 75), 8.0, 900, 50),
            # One of the two dies, which are devices of their own.
            _gpu("mi250x", 64, (191, 23.9), 1.6, 100, 12.5),
            _gpu("mi300x", 191, (1307, 163), 5.3, 448, 50),
            _gpu("l40s", 44, (362, 91.6), 0.864, 32, 25),
            _gpu("a10", 22, (125, 31.2), 0.60, 32, 3.1),
            _gpu("t4", 14, (65, 8.1), 0.32, 16, 3.1),
            _gpu("3090", 23, (71, 35.6), 0.936, 32, 1.25),
            _gpu("4090", 23, (165, 82.6), 1.008, 32, 1.25),
            # One process of a server's socket: the slowest that a user would train on.
            DeviceSpec(
                "cpu", 64 * GIB, 0.2 * TERA, 0.2 * TERA, 20 * GIGA, 2 * GIGA, 1 * GIGA, False
            ),
        )
    }
)


def find_device(name: str) -> DeviceSpec:
    """The device of that name, in any case. Raises PlanError naming the nearest one."""
    key = name.lower().replace("_", "-").removeprefix("nvidia-").removeprefix("amd-")
    if key in DEVICES:
        return DEVICES[key]
    hint = _values.nearest(key, DEVICES)
    guess = f"; did you mean {hint}? Known" if hint else "; known"
    raise PlanError(
        f"--gpu: got {name!r}{guess} are {', '.join(DEVICES)}; for another one, take the "
        f"most similar and override its figures (--memory-gib, --tflops, --intra-gbps, "
        f"--inter-gbps)"
    )
