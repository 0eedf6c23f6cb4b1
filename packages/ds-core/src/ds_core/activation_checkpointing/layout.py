"""How a tensor lies in memory, so that a copy of its bytes can become the same tensor again."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """Shape and strides of a tensor: a recomputation that sees others may round otherwise.

    Attributes:
        shape, strides: of the tensor.
        core: the shape without repetition: dimensions along which it is expanded have size 1.
        dtype: of its elements.
        is_dense: whether the core fills the memory between its first and last element.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    core: tuple[int, ...]
    dtype: torch.dtype
    is_dense: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout | None:
        """The layout of a plain strided tensor; None for what is stored in another way.

        That is: parameters (they stay where they are), subclasses, sparse and empty tensors,
        and views that are conjugated or negated when they are read.
        """
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if not plain or tensor.is_conj() or tensor.is_neg() or tensor.numel() == 0:
            return None
        shape, strides = tuple(tensor.shape), tensor.stride()
        core = tuple(
            1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)
        )
        extent = 1 + sum((n - 1) * stride for n, stride in zip(core, strides, strict=True))
        return cls(shape, strides, core, tensor.dtype, extent == math.prod(core))

    @property
    def numel(self) -> int:
        """Elements of the core."""
        return math.prod(self.core)

    @property
    def num_bytes(self) -> int:
        """Bytes of the core."""
        return self.numel * self.dtype.itemsize

    def flatten(self, tensor: torch.Tensor) -> torch.Tensor:
        """The core's elements, `[numel]`, in the order of memory: a view if it is dense."""
        for dim, (size, own) in enumerate(zip(self.shape, self.core, strict=True)):
            if size != own:
                tensor = tensor.narrow(dim, 0, 1)
        if self.is_dense:
            return tensor.as_strided((self.numel,), (1,))
        return tensor.contiguous().view(-1)

    def restore(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor whose `flatten` gave `flat`: a view of it if it is dense."""
        if self.is_dense:
            core = flat.as_strided(self.core, self.strides)
        else:
            core = flat.new_empty_strided(self.core, self.strides)
            core.copy_(flat.view(self.core))
        return core.expand(self.shape)
