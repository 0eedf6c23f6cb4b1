"""Asynchronous file I/O behind ds-core's seam `TensorFiles`."""

from __future__ import annotations

import torch

from ds_ops.aio.buffers import aligned_empty
from ds_ops.aio.engine import AsyncIO
from ds_ops.aio.file import AsyncFile

#: Bytes in flight that keep an NVMe disk busy: 32 pieces of 1 MiB.
_DEPTH, _BLOCK = 32, 1 << 20


class DirectFiles:
    """Files that share one `AsyncIO`: a `ds_core.seams.TensorFiles`."""

    def __init__(self) -> None:
        self._io = AsyncIO(queue_depth=_DEPTH, block_bytes=_BLOCK)
        self.name = f"ds_ops: {self._io.name}"

    def open(self, path: str) -> AsyncFile:
        """See `TensorFiles.open`."""
        return AsyncFile(path, "rw", engine=self._io)

    def empty(self, size: int) -> torch.Tensor:
        """See `TensorFiles.empty`."""
        return aligned_empty(size)

    def close(self) -> None:
        """See `TensorFiles.close`."""
        self._io.close()


def open_files() -> DirectFiles:
    """Entry point of `ds_core.tensor_files`."""
    return DirectFiles()
