"""What the machine permits is told as it is."""

from __future__ import annotations

import ctypes
import errno
import resource

import pytest

from ds_ops.native import limits


class Kernel:
    """A C library whose system call fails."""

    def __init__(self, code):
        self.code = code

    def syscall(self, *args):
        ctypes.set_errno(self.code)
        return -1


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSYS, "the kernel has none"),
        (errno.EPERM, "not permitted, by kernel.io_uring_disabled"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["none", "forbidden", "memory"],
)
def test_a_refused_ring_is_told_with_its_reason(monkeypatch, code, told):
    monkeypatch.setattr(limits.ctypes, "CDLL", lambda *args, **kwargs: Kernel(code))
    assert told in limits.io_uring()


def test_a_ring_that_was_given_is_given_back():
    first = [limits.io_uring() for _ in range(3)]
    assert len(set(first)) == 1


def test_the_limit_of_locked_memory_is_told(monkeypatch):
    for soft, told in ((8 << 20, "8 MiB"), (resource.RLIM_INFINITY, "unlimited")):
        monkeypatch.setattr(limits.resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        assert limits.lockable_memory() == told
