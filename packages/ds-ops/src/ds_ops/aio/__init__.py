"""Asynchronous file I/O for tensors: many requests in flight, around the page cache.

    with ds_ops.AsyncFile("states.bin", "rw") as file:
        token = file.write(tensor, offset=0)
        ...                       # the disk works meanwhile
        token.wait()

One `AsyncIO` may serve many files, which bounds what they have in flight together. Two engines:
io_uring, where the kernel permits it, and a pool of threads, which works everywhere. `ds io` shows
which one runs here and why, measures both, and finds the best settings.
"""

from __future__ import annotations

from ds_ops.aio.buffers import aligned_empty
from ds_ops.aio.engine import AsyncIO
from ds_ops.aio.errors import AsyncFileError
from ds_ops.aio.file import AsyncFile
from ds_ops.aio.probe import engines
from ds_ops.aio.token import Token
from ds_ops.aio.writer import FastFileWriter

__all__ = [
    "AsyncFile",
    "AsyncFileError",
    "AsyncIO",
    "FastFileWriter",
    "Token",
    "aligned_empty",
    "engines",
]
