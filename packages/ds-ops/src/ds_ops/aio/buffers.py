"""Memory that direct transfers take as it is."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

from ds_core.errors import OpError


def aligned_empty(shape: int | Sequence[int], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """A CPU tensor that begins at a page, not initialized by us.

    `AsyncFile` reads and writes it without a copy, which a tensor of torch.empty needs: that is
    aligned to 64 bytes, and devices ask for 512 or more. Large ones are on huge pages where the
    kernel offers them, which makes transfers cheaper and faster; finding those can take the kernel
    a second per GiB where memory is fragmented, so keep such tensors and use them again.

    Args:
        shape: as for torch.empty.
        dtype: of its elements.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(size < 0 for size in sizes):
        raise OpError(f"aligned_empty: shape: got {sizes}, expected sizes of at least 0")
    count = math.prod(sizes)
    if count == 0:
        return torch.empty(sizes, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: ordinary pages do as well
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(sizes)
