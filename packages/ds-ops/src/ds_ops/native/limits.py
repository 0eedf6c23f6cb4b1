"""What this machine permits a process: io_uring, memory that may be locked."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys

#: The same on every kind of processor, as all system calls since 2019.
_IO_URING_SETUP = 425
_PARAMETERS_BYTES = 120


def io_uring() -> str | None:
    """Why io_uring cannot be used here, or None: asks the kernel for a ring, and gives it back."""
    if sys.platform != "linux":
        return "this is not Linux"
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(_PARAMETERS_BYTES)
    ring = libc.syscall(ctypes.c_long(_IO_URING_SETUP), ctypes.c_uint(1), parameters)
    if ring >= 0:
        os.close(ring)
        return None
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        return "the kernel has none, or a container's seccomp profile hides it"
    if code in (errno.EPERM, errno.EACCES):
        return (
            "not permitted, by kernel.io_uring_disabled or a container's seccomp profile; threads "
            "do the same work"
        )
    return os.strerror(code)


def lockable_memory() -> str:
    """How much memory a process may lock: `ulimit -l`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:g} MiB"
