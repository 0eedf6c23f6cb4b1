"""The device that this process computes on, over `torch.accelerator`; a CPU is a device too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_core import _env, plugins
from ds_core.errors import DsError


@dataclass(frozen=True)
class Accelerator:
    """A kind of device and what it can do; no device is touched until it is asked for.

    A thin layer over `torch.accelerator` in which a CPU is a device like any other. A package that
    brings a kind of device which torch's generic functions do not serve derives from it and
    overrides what differs.

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

    def reset_peak_memory(self) -> None:
        """Begin `peak_memory` anew from what is held now."""
        if self.kind != "cpu":
            torch.accelerator.reset_peak_memory_stats()

    def free_memory(self) -> tuple[int, int] | None:
        """Free and total bytes of the device as its driver counts them; None on a CPU."""
        if self.kind == "cpu":
            return None
        free, total = torch.accelerator.get_memory_info()
        return int(free), int(total)

    def empty_cache(self) -> None:
        """Give memory that torch's allocator keeps, but nobody uses, back to the device."""
        if self.kind != "cpu":
            torch.accelerator.empty_cache()

    def name(self, index: int = 0) -> str:
        """What the maker calls a device, such as "NVIDIA H100 80GB HBM3"."""
        named = getattr(self._module(), "get_device_name", None)
        return str(named(index)) if named is not None else f"{self.kind}:{index}"

    @property
    def has_streams(self) -> bool:
        """Whether work is queued on streams and ordered by events, so that it can overlap."""
        return self.kind != "cpu"

    def stream(self) -> torch.Stream | None:
        """A new stream of the current device; None on a CPU, where work is done when it is asked
        for."""
        return torch.Stream(self.device()) if self.has_streams else None

    def event(self, *, timed: bool = False) -> torch.Event | None:
        """An event to record on a stream and wait for; None on a CPU. `timed`: it tells times."""
        return torch.Event(self.kind, enable_timing=timed) if self.has_streams else None

    def rng_state(self) -> torch.Tensor:
        """State of the generator of random numbers, `[n]` bytes on the CPU."""
        return torch.get_rng_state() if self.kind == "cpu" else self._module().get_rng_state().cpu()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Go on from a state that `rng_state` returned."""
        if self.kind == "cpu":
            torch.set_rng_state(state)
        else:
            self._module().set_rng_state(state)

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in page-locked host memory, which the device copies from without waiting.

        On a CPU the tensor itself. tensor: on the CPU, any shape and dtype.
        """
        return tensor if self.kind == "cpu" else tensor.pin_memory()

    @property
    def backend(self) -> str:
        """The backend of torch.distributed for tensors on the device: "nccl", "xccl", "gloo"."""
        return str(torch.distributed.get_default_backend_for_device(self.kind))

    @property
    def visible_devices_variable(self) -> str | None:
        """The environment variable that chooses which devices a process sees; None for a CPU."""
        from ds_core.launcher.devices import VISIBLE_VARIABLES

        return VISIBLE_VARIABLES.get(self.kind)

    def _module(self) -> Any:
        """torch's module of this kind of device, such as `torch.cuda`."""
        return torch.get_device_module(self.kind)

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
    callable that returns an `Accelerator` where its device is present, else None. The environment
    variable DS_ACCELERATOR=cpu has the CPU used instead; another kind has to be there.

    Raises DsError if the kind of device that DS_ACCELERATOR names is not there.
    """
    asked = _env.accelerator()
    if asked == "cpu":
        return Accelerator("cpu")
    found = _present()
    if asked is not None and asked != found.kind:
        raise DsError(
            f"DS_ACCELERATOR={asked!r} in the environment, but the device here is {found.kind!r}; "
            f"unset it, or set it to cpu"
        )
    return found


def _present() -> Accelerator:
    for name in sorted(plugins.registered("accelerators")):
        found: Any = plugins.load("accelerators", name)()
        if isinstance(found, Accelerator):
            return found
        if found is not None:
            raise DsError(f"accelerator {name!r} returned {found!r}, not an Accelerator or None")
    device = torch.accelerator.current_accelerator(check_available=True)
    return Accelerator("cpu" if device is None else device.type)
