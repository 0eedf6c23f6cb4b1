"""Files of tensors: the engine that an installed package brings, or a pool of threads."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ds_core import plugins
from ds_core.errors import TensorFileError
from ds_core.seams.tensor_files import TensorFile, TensorFiles, Transfer

#: Transfers at a time of the pool: more keep a disk no busier through the page cache.
_THREADS = 4
#: Bytes of one call to the kernel, which takes at most 2 GiB.
_CALL_BYTES = 64 << 20


def open_tensor_files() -> TensorFiles:
    """The engine of the first installed package that has one (ds-ops), else `ThreadedFiles`."""
    for name in sorted(plugins.registered("tensor_files")):
        found: TensorFiles = plugins.load("tensor_files", name)()
        return found
    return ThreadedFiles()


class ThreadedFiles:
    """Reads and writes through the page cache, in threads of Python's own pool.

    Works everywhere and needs no compiler; ds-ops goes around the page cache and is faster.
    """

    name = "ds_core: threads, through the page cache"

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ds_core.tensor_files")

    def open(self, path: str) -> TensorFile:
        """See `TensorFiles.open`."""
        return _ThreadedFile(path, self._pool)

    def empty(self, size: int) -> torch.Tensor:
        """See `TensorFiles.empty`."""
        return torch.empty(size, dtype=torch.uint8)

    def close(self) -> None:
        """See `TensorFiles.close`."""
        self._pool.shutdown()


class _Pending:
    """A `Transfer` in a thread."""

    def __init__(self, future: Future[int]) -> None:
        self._future = future

    def wait(self) -> int:
        return self._future.result()

    def done(self) -> bool:
        return self._future.done()


class _ThreadedFile:
    """A `TensorFile` of `ThreadedFiles`."""

    why_buffered = "ds-ops is not installed, which goes around the page cache: pip install ds-ops"

    def __init__(self, path: str, pool: ThreadPoolExecutor) -> None:
        self._path, self._pool = path, pool
        self._under_way: list[_Pending] = []
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            message = f"cannot open: {error.strerror}"
            raise TensorFileError(error.errno or errno.EIO, message, path) from error

    def read(self, tensor: torch.Tensor, offset: int = 0) -> Transfer:
        return self._begin(self._read, tensor, offset)

    def write(self, tensor: torch.Tensor, offset: int = 0) -> Transfer:
        return self._begin(self._write, tensor, offset)

    def _begin(
        self, move: Callable[[memoryview, int], int], tensor: torch.Tensor, offset: int
    ) -> Transfer:
        array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
        view = memoryview(array)  # which keeps the tensor's memory
        self._under_way = [each for each in self._under_way if not each.done()]
        pending = _Pending(self._pool.submit(move, view, offset))
        self._under_way.append(pending)
        return pending

    def _read(self, view: memoryview, offset: int) -> int:
        at = 0
        while at < len(view):
            count = self._call(os.preadv, [view[at : at + _CALL_BYTES]], offset + at)
            if count == 0:
                message = f"ends at byte {offset + at}, where {len(view) - at} more were expected"
                raise TensorFileError(errno.ENODATA, message, self._path)
            at += count
        return at

    def _write(self, view: memoryview, offset: int) -> int:
        at = 0
        while at < len(view):
            at += self._call(os.pwritev, [view[at : at + _CALL_BYTES]], offset + at)
        return at

    def _call(self, call: Any, views: list[memoryview], offset: int) -> int:
        try:
            return int(call(self._file, views, offset))
        except OSError as error:
            message = f"{call.__name__} of {len(views[0])} bytes at {offset}: {error.strerror}"
            raise TensorFileError(error.errno or errno.EIO, message, self._path) from error

    def preallocate(self, size: int) -> None:
        missing = size - os.fstat(self._file).st_size
        if missing <= 0:
            return
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            message = f"cannot reserve {size} bytes: {error.strerror}"
            raise TensorFileError(error.errno or errno.EIO, message, self._path) from error

    def close(self) -> None:
        for pending in self._under_way:
            pending._future.exception()
        self._under_way.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
