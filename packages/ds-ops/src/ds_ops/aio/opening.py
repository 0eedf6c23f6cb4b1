"""Opening a file, with and without O_DIRECT."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from dataclasses import dataclass

from ds_core.errors import OpError
from ds_ops.aio.errors import AsyncFileError
from ds_ops.aio.native import functions

_FLAGS = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "rw": os.O_RDWR | os.O_CREAT,
}
#: Of memory, where the kernel does not say what it asks: no device asks for more.
_UNKNOWN_ALIGNMENT = 4096
#: As in csrc/aio/request.h: a file that asks for more goes through the page cache.
_LARGEST_ALIGNMENT = 1 << 16


@dataclass
class Opened:
    """The descriptors of one file.

    Attributes:
        buffered: through the page cache.
        direct: around it; -1 if that cannot be.
        alignment: of offsets and lengths of direct transfers, in bytes.
        memory_alignment: of addresses.
        refusal: why there is no direct one, else None.
    """

    buffered: int
    direct: int = -1
    alignment: int = mmap.PAGESIZE
    memory_alignment: int = _UNKNOWN_ALIGNMENT
    refusal: str | None = None

    def close(self) -> None:
        """Close both."""
        for file in (self.direct, self.buffered):
            if file >= 0:
                with contextlib.suppress(OSError):
                    os.close(file)
        self.direct = self.buffered = -1


def open_file(path: str, mode: str, direct: bool) -> Opened:
    """Open `path`; direct transfers where asked and possible.

    Raises AsyncFileError if it cannot be opened, OpError for an unknown mode.
    """
    if mode not in _FLAGS:
        raise OpError(f'AsyncFile: mode: got {mode!r}, expected "r", "w" or "rw"')
    flags = _FLAGS[mode] | os.O_CLOEXEC
    try:
        opened = Opened(os.open(path, flags, 0o666))
    except OSError as error:
        raise AsyncFileError(
            error.errno or errno.EIO, path, f'opening with mode "{mode}"'
        ) from None
    try:
        if direct:
            _open_direct(opened, path, flags & ~(os.O_CREAT | os.O_TRUNC))
        else:
            opened.refusal = "direct=False was given"
    except BaseException:
        opened.close()
        raise
    return opened


def _open_direct(opened: Opened, path: str, flags: int) -> None:
    memory, offset = ctypes.c_int64(), ctypes.c_int64()
    told = functions().ds_aio_alignment(opened.buffered, ctypes.byref(memory), ctypes.byref(offset))
    if told == 0 and offset.value == 0:
        opened.refusal = "the file system has no direct transfers"
        return
    if told == 0 and offset.value > _LARGEST_ALIGNMENT:
        opened.refusal = f"the file system wants direct transfers of {offset.value} bytes at least"
        return
    try:
        opened.direct = os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        opened.refusal = f"the file system refuses O_DIRECT: {error.strerror}"
        return
    if not os.path.sameopenfile(opened.direct, opened.buffered):
        raise AsyncFileError(errno.ESTALE, path, "another file took its place while it was opened")
    if told == 0:
        # Whole pages: what is in the page cache and what goes around it never share one.
        opened.alignment = max(offset.value, mmap.PAGESIZE)
        opened.memory_alignment = max(memory.value, 1)


def allocate(file: int, size: int) -> None:
    """Reserve blocks so that the file has at least `size` bytes. Raises OSError.

    Where the file system cannot reserve, the file only gets its length.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while libc.fallocate(file, 0, 0, size) != 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        return
