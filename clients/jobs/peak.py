"""How much memory the jobs' tensors take."""

from __future__ import annotations

import gc
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile


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
    """Context manager: the most bytes of tensors at any moment, over what there was before.

    By what torch's allocator for the CPU reports; what is mapped from a file is not in it.
    """

    def __enter__(self) -> Peak:
        gc.collect()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        events = self._profile.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        held = self.bytes = 0
        for _, change in sorted(changes, key=lambda each: each[0]):
            held += change
            self.bytes = max(self.bytes, held)
