"""Which engines can run here, and why the others cannot; nothing is built to find out."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from pathlib import Path

_SETUP = 425  # io_uring_setup(2), on every processor
_CUFILE = ("libcufile.so.0", "libcufile.so")


def engines() -> dict[str, str | None]:
    """Every engine by name, each with why it cannot be used here, or None."""
    return {"io_uring": _io_uring(), "threads": None, "gds": gds_refusal()}


def _io_uring() -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = (ctypes.c_uint8 * 120)()
    file = libc.syscall(ctypes.c_long(_SETUP), ctypes.c_long(2), parameters)
    if file < 0:
        return io_uring_refusal(ctypes.get_errno())
    os.close(file)
    return None


def io_uring_refusal(number: int) -> str:
    """Why there is no io_uring, as a sentence, from the errno with which it was refused."""
    name = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
    if number == errno.ENOSYS:
        return f"{name}: the kernel is older than Linux 5.6, or a sandbox hides io_uring"
    if number in (errno.EPERM, errno.EACCES):
        return f"{name}: {_forbidden()}"
    if number == errno.ENOMEM:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // 1024} KiB"
        return f"{name}: its rings count as locked memory, whose limit is {shown}; raise ulimit -l"
    return name


def _forbidden() -> str:
    try:
        setting = Path("/proc/sys/kernel/io_uring_disabled").read_text(encoding="ascii").strip()
    except OSError:
        setting = ""
    if setting in ("1", "2"):
        return f"the administrator forbids it (sysctl kernel.io_uring_disabled={setting})"
    return "a sandbox forbids it, as Docker's default seccomp profile does"


def gds_refusal() -> str:
    """Why tensors of a GPU do not go to the disk directly."""
    for name in _CUFILE:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return (
            f"{name} is installed, but ds-ops has no path through it yet; tensors of a GPU go "
            f"through pinned memory with the other engines"
        )
    return (
        f"{_CUFILE[0]} (NVIDIA GPUDirect Storage) is not installed; tensors of a GPU go through "
        f"pinned memory with the other engines"
    )
