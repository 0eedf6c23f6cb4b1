"""The device that this process computes on, over `torch.accelerator`; a CPU is a device too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_core import plugins
from ds_core.errors import DsError


@dataclass(frozen=True)
class Accelerator:
    """A kind of device and what it can do; no device is touched until it is asked for.

    Attributes:
        kind: torch's device type, such as "cuda", "xpu" or "cpu".
    """

    kind: str

    def device(self) -> torch.device:
        """The device that this process uses: the current one of its kind."""
        if self.kind == "cpu":
            return torch.device("cpu")
        return torch.device(self.kind, torch.accelerator.current_device_index())

    def device_count(self) -> int:
        """Devices of this kind that this process can see."""
        return 1 if self.kind == "cpu" else torch.accelerator.device_count()

    def synchronize(self) -> None:
        """Wait until everything that was queued on the device is done."""
        if self.kind != "cpu":
            torch.accelerator.synchronize()

    def memory_allocated(self) -> int:
        """Bytes that torch's allocator holds in tensors on the device; 0 on a CPU."""
        return 0 if self.kind == "cpu" else int(torch.accelerator.memory_allocated())

    def peak_memory(self) -> int:
        """Largest `memory_allocated` so far, in bytes; 0 on a CPU."""
        return 0 if self.kind == "cpu" else int(torch.accelerator.max_memory_allocated())

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether a matrix product in `dtype` runs on the device at all."""
        try:
            x = torch.ones(8, 8, dtype=dtype, device=self.device())
            torch.mm(x, x)
        except (RuntimeError, TypeError):
            return False
        return True

    def computes_fast(self, dtype: torch.dtype) -> bool:
        """Whether the device has arithmetic units for `dtype`: it is then no slower than fp32."""
        if self.kind == "cuda":
            return dtype is torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
        if self.kind != "cpu":
            return self.supports(dtype)
        capability: Callable[[], bool] | None = {
            torch.bfloat16: torch.cpu._is_avx512_bf16_supported,
            torch.float16: lambda: False,
        }.get(dtype)
        return dtype is torch.float32 or bool(capability and capability())


def current() -> Accelerator:
    """The accelerator of this process: torch's own, one that a package registers, or the CPU.

    A package adds a kind of device through the entry-point group `ds_core.accelerators`: a
    callable that returns an `Accelerator` where its device is present, else None.
    """
    for name in sorted(plugins.registered("accelerators")):
        found: Any = plugins.load("accelerators", name)()
        if isinstance(found, Accelerator):
            return found
        if found is not None:
            raise DsError(f"accelerator {name!r} returned {found!r}, not an Accelerator or None")
    device = torch.accelerator.current_accelerator(check_available=True)
    return Accelerator("cpu" if device is None else device.type)
