"""CPU memory that is never paged out: what accelerators and O_DIRECT copy from and to fastest."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Sequence
from functools import cache

import torch

from ds_core.errors import OpError

_NAME = "pinned_empty"


def pinned_empty(
    shape: int | Sequence[int], dtype: torch.dtype = torch.float32, *, accelerator: bool = True
) -> torch.Tensor:
    """An uninitialised CPU tensor in page-locked memory, which is freed with the tensor.

    Where there is an accelerator, it is torch's pinned memory, known to the driver: copies to the
    device run beside the program. Elsewhere whole pages are mapped and locked (`mlock`), so that
    they stay in memory; `tensor.is_pinned()` is then False, because no driver knows them. Either
    way the data begin at a page.

    A process forked from this one must not touch such a tensor: its pages are not in the child
    (`MADV_DONTFORK`), which would end with a segmentation fault. Hand the child a copy.

    Args:
        shape: dimensions, all 0 or more.
        dtype: any of torch's.
        accelerator: False: lock pages even where there is an accelerator.

    Raises OpError if the memory cannot be had or locked: the message has the limit, the need and
    how to raise it.
    """
    sizes = torch.Size((shape,) if isinstance(shape, int) else shape)
    if any(size < 0 for size in sizes):
        raise OpError(f"{_NAME}: shape: got {list(sizes)}, expected no negative dimension")
    if accelerator and torch.accelerator.is_available():
        return torch.empty(sizes, dtype=dtype, pin_memory=True)
    count = sizes.numel()
    if count == 0:
        return torch.empty(sizes, dtype=dtype)
    pages = _locked_pages(count * dtype.itemsize)
    # The tensor keeps the mapping alive, whose end unmaps it and with that gives up the lock.
    return torch.frombuffer(pages, dtype=dtype, count=count).view(sizes)


def _locked_pages(size: int) -> mmap.mmap:
    """A private mapping of `size` bytes, locked."""
    if size >= 1 << 63:
        raise OpError(f"{_NAME}: shape: {size} bytes are more than can be addressed")
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise OpError(f"{_NAME}: cannot map {size} bytes: {error}") from error
    # What a child shares with its parent after a fork is copied when written: a lock is not for it.
    pages.madvise(mmap.MADV_DONTFORK)
    start = ctypes.c_char.from_buffer(pages)
    failed = _mlock()(ctypes.addressof(start), size)
    number = ctypes.get_errno()
    del start  # a mapping that something points into cannot be closed
    if failed:
        pages.close()
        raise OpError(_problem(size, number))
    return pages


@cache
def _mlock() -> ctypes._NamedFuncPointer:
    found = ctypes.CDLL(None, use_errno=True).mlock
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return found


def _problem(size: int, number: int) -> str:
    soft, hard = (_kib(limit) for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK))
    needed = _kib(size)
    told = f"{_NAME}: cannot lock {needed} of memory: {os.strerror(number)}"
    if number not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        return told
    return (
        f"{told}; the limit of this process is {soft} (RLIMIT_MEMLOCK; hard limit {hard}), of "
        f"which {_kib(_locked_bytes())} are used. Raise it: `ulimit -l {-(-size // 1024)}` or more "
        f"in the shell, `memlock` in /etc/security/limits.conf, docker run --ulimit memlock=-1"
    )


def _kib(size: int) -> str:
    return "unlimited" if size == resource.RLIM_INFINITY else f"{-(-size // 1024)} KiB"


def _locked_bytes() -> int:
    """What this process has locked."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("VmLck:")]
    except OSError:
        return 0
    return int(lines[0].split()[1]) * 1024 if lines else 0
