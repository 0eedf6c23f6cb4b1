"""Models made in a dtype and on a device, or on none ("meta")."""

from __future__ import annotations

from types import TracebackType

import torch


class OnDevice:
    """Inside its block new tensors have this dtype, if they are floating-point, and this device.

        with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
            model = Model()

    A dtype or device that the code inside names itself stays as it is.

    Args:
        dtype: of floating-point tensors.
        device: "meta" for tensors without memory.
        enabled: False: the block changes nothing.
    """

    def __init__(
        self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True
    ) -> None:
        self.dtype, self.device, self.enabled = dtype, device, enabled

    def __enter__(self) -> None:
        if self.enabled:
            self._before = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            self._on = torch.device(self.device)
            self._on.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.enabled:
            self._on.__exit__(kind, error, traceback)
            torch.set_default_dtype(self._before)
