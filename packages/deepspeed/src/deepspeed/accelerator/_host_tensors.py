"""How an accelerator makes tensors: of a type by its old name, and in page-locked memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ds_core.accelerator import Accelerator
from ds_core.errors import DsError


def _tensor_class(name: str, dtype: torch.dtype) -> property:
    """The property that makes tensors of a dtype on the accelerator, as torch's class does."""

    def made(self: HostTensors) -> Callable[..., Any]:
        if self._is_cpu:
            cls: Callable[..., Any] = getattr(torch, name)
            return cls
        return partial(torch.tensor, dtype=dtype, device=self.core.kind)

    return property(made, doc=f"Makes tensors of {dtype} on this device.")


class HostTensors:
    """The part of an accelerator that makes tensors."""

    core: Accelerator

    BFloat16Tensor = _tensor_class("BFloat16Tensor", torch.bfloat16)
    ByteTensor = _tensor_class("ByteTensor", torch.uint8)
    DoubleTensor = _tensor_class("DoubleTensor", torch.float64)
    FloatTensor = _tensor_class("FloatTensor", torch.float32)
    HalfTensor = _tensor_class("HalfTensor", torch.float16)
    IntTensor = _tensor_class("IntTensor", torch.int32)
    LongTensor = _tensor_class("LongTensor", torch.int64)

    @property
    def _is_cpu(self) -> bool:
        return self.core.kind == "cpu"

    def pin_memory(
        self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True
    ) -> torch.Tensor:
        """A copy of a tensor of the CPU in page-locked memory; on a CPU the tensor itself.

        make_copy: whether the values are copied as well; match_shape makes no difference.
        """
        if self._is_cpu or make_copy:
            return self.core.pin_memory(tensor)
        return torch.empty_like(tensor, pin_memory=True)

    def pin_empty(
        self, *size: int | Sequence[int], dtype: torch.dtype, device: Any = "cpu"
    ) -> torch.Tensor:
        """A tensor of the host without values, in page-locked memory if there is a device."""
        if torch.device(device).type != "cpu":
            raise DsError(f"pin_empty: device: got {device!r}, expected 'cpu': only memory of the "
                          f"host is page-locked")  # fmt: skip
        given: Any = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
        return torch.empty(tuple(given), dtype=dtype, pin_memory=not self._is_cpu)

    def pin_empty_like(
        self, tensor: torch.Tensor, device: Any = "cpu", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """`pin_empty` of the shape of a tensor, and of its dtype unless another is given."""
        return self.pin_empty(*tensor.shape, dtype=dtype or tensor.dtype, device=device)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in page-locked memory."""
        return not self._is_cpu and tensor.is_pinned()

    def unpin_memory(self, tensor: torch.Tensor) -> None:
        """Nothing: torch frees page-locked memory with the tensor."""

    def pin_memory_alignment(self) -> int:
        """1: any address will do."""
        return 1

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        """False: memory of others is not page-locked here; make it with `pin_empty`."""
        return False

    def unregister_host_memory(self, address: int) -> None:
        """Nothing, as nothing was registered."""

    def prefer_triton_grouped_mm(self) -> bool:
        """False: grouped products are torch's."""
        return False
