"""How much memory the jobs' tensors take."""

from __future__ import annotations

import gc
from pathlib import Path
from types import TracebackType

import torch


def tensor_bytes() -> int:
    """Bytes of all tensors that this process holds, shared storages once."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Peak:
    """Context manager: the most resident memory at any moment, over what there was before.

    Of Linux; files that are mapped into memory count where they are read.
    """

    def __enter__(self) -> Peak:
        gc.collect()
        # Forget the peak so far: see proc(5).
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bytes = _status("VmHWM") - self._before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
