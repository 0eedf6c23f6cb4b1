"""All-reduce between the processes of one host, through memory that all of them have mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ds_core import comm
from ds_core.errors import CommError, OpError
from ds_ops.native import library

_NAME = "SharedMemoryAllReduce"
_FOLDER = Path("/dev/shm")
_MOST_RANKS = 8
#: As FloatType in csrc/common/float_type.h counts them.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: What the C++ functions return.
_DONE, _AGAIN, _FAILED, _DIFFERS = range(4)
#: How long they wait before they return, so that signals and dead ranks are seen.
_SLICE_NS = 50_000_000
#: Why all ranks have given up; the rank it is about is added.
_TIMEOUT, _DEATH, _CLOSED, _DIFFERENCE, _INTERRUPT = (reason << 8 for reason in range(1, 6))
#: Looks at another rank's counter before sleeping: some 20 us.
_SPINS = 500


class _Peer(NamedTuple):
    """What the ranks tell one another of themselves."""

    host: str
    pid_namespace: str
    pid: int


class SharedMemoryAllReduce:
    """Sums tensors of 2 to 8 ranks on one host, without a network or a kernel call in between.

        reducer = ds_ops.SharedMemoryAllReduce(group)
        reducer.all_reduce_(tensor)     # every rank: the same call in the same order
        reducer.close()

    Sums are made in fp32 in the order of ranks and rounded once: every rank gets the same bits,
    the same as any other time. Nothing stays in /dev/shm: the name is removed as soon as all ranks
    have mapped the memory.

    A rank that does not come, or has died, is an error on every other rank, and on the one that
    comes late; after an error the object can only be closed.

    Args:
        group: a `ds_core.comm.Group` or a process group of torch, all on this host. Collective:
            all ranks must make the object, and with the same arguments.
        max_bytes: of the buffer that a message passes through; longer ones go in turns. The memory
            is about (2 + 1 / ranks) * ranks * max_bytes.
        timeout_s: how long a call waits for a rank.

    Raises OpError if the ranks are not on one host or /dev/shm is too small.
    """

    def __init__(
        self,
        group: comm.Group | dist.ProcessGroup,
        *,
        max_bytes: int = 1 << 20,
        timeout_s: float = 60.0,
    ) -> None:
        if not 1024 <= max_bytes <= 1 << 32:
            raise OpError(f"{_NAME}: max_bytes: got {max_bytes}, expected 1024 to 2^32")
        if not timeout_s > 0:
            raise OpError(f"{_NAME}: timeout_s: got {timeout_s}, expected more than 0")
        pg = group.pg if isinstance(group, comm.Group) else group
        self.size = 1 if pg is None else pg.size()
        self.rank = 0 if pg is None else pg.rank()
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._view: int | None = None
        self._segment: mmap.mmap | None = None
        self._watches: dict[int, int] = {}
        self._error = ""
        self._is_closed = False
        if self.size > _MOST_RANKS:
            raise OpError(f"{_NAME}: group: got {self.size} ranks, expected at most {_MOST_RANKS}")
        if pg is None or self.size == 1:
            return
        peers = _gathered(_this_process(), pg)
        _check_same_host(peers)
        buffer_bytes = -(-max_bytes // 128) * 128
        self._segment = _map_segment(_lib().ds_shm_bytes(self.size, buffer_bytes), pg)
        self._base = ctypes.c_char.from_buffer(self._segment)
        self._watches = _watch(peers, self.rank)
        spins = _SPINS if len(os.sched_getaffinity(0)) >= self.size else 0
        address = ctypes.addressof(self._base)
        self._view = _lib().ds_shm_open(address, buffer_bytes, self.size, self.rank, spins)

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by the sum over ranks; returns it.

        tensor: any shape, fp32, bf16 or fp16, contiguous, on the CPU. Collective: all ranks must
        call, with the same number of elements and dtype.

        Raises OpError for a tensor that does not fit, CommError (naming the rank) if one does not
        come within the time, has died or closed, or brings another size or dtype: what `tensor`
        holds is then undefined.
        """
        if not self._lock.acquire(blocking=False):
            raise OpError(f"{_NAME}: another thread is in all_reduce_; calls must have one order")
        try:
            self._check(tensor)
            if self._view is not None:
                self._reduce(tensor)
        finally:
            self._lock.release()
        return tensor

    def close(self) -> None:
        """Give the memory back; the other ranks' next call is an error unless they close too.

        Raises OpError while another thread is in all_reduce_.
        """
        if not self._lock.acquire(blocking=False):  # it works on the memory
            raise OpError(f"{_NAME}: another thread is in all_reduce_; close it after that")
        try:
            self._close()
        finally:
            self._lock.release()

    def _close(self) -> None:
        self._is_closed = True
        if os.getpid() != self._pid:  # a forked child's: the parent is the rank, and goes on
            self._view = None
        if self._view is not None:
            _lib().ds_shm_close(self._view)
            self._view = None
        if self._segment is not None:
            del self._base  # a mapping that something points into cannot be closed
            self._segment.close()
            self._segment = None
        for descriptor in self._watches.values():
            os.close(descriptor)
        self._watches = {}

    def __enter__(self) -> SharedMemoryAllReduce:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_segment", None) is not None:
            self.close()

    def _check(self, tensor: torch.Tensor) -> None:
        if self._is_closed:
            raise OpError(f"{_NAME}: it is closed")
        if os.getpid() != self._pid:
            raise OpError(
                f"{_NAME}: made in process {self._pid}, which is the rank, and used in its forked "
                f"child {os.getpid()}; make one in each process that is a rank"
            )
        if self._error:
            raise CommError(f"{self._error}; make a new one")
        if tensor.device.type != "cpu":
            raise OpError(f"{_NAME}: tensor: on {tensor.device}, expected the CPU")
        if tensor.dtype not in _TYPES:
            told = ", ".join(map(str, _TYPES))
            raise OpError(f"{_NAME}: tensor: got {tensor.dtype}, expected one of {told}")
        if not tensor.is_contiguous() or tensor.layout is not torch.strided:
            raise OpError(
                f"{_NAME}: tensor: not contiguous (strides {tensor.stride()}); reduce a "
                f".contiguous() copy"
            )

    def _reduce(self, tensor: torch.Tensor) -> None:
        arguments = (self._view, tensor.data_ptr(), tensor.numel(), _TYPES[tensor.dtype], _SLICE_NS)
        reduce = _lib().ds_shm_all_reduce
        deadline = time.monotonic() + self._timeout_s
        waited_for = -1
        try:
            while (outcome := reduce(*arguments)) == _AGAIN:
                missing = _lib().ds_shm_waiting_for(self._view)
                if missing != waited_for:  # others may have come late, one after the other
                    waited_for, deadline = missing, time.monotonic() + self._timeout_s
                self._look_after(missing, deadline)
        except CommError:
            raise
        except BaseException:  # such as Ctrl-C: the others must not wait for this rank
            self._give_up(_INTERRUPT, self.rank)
            raise
        if outcome == _DIFFERS:
            other = _lib().ds_shm_waiting_for(self._view)
            self._fail(self._told(self._give_up(_DIFFERENCE, other)))
        if outcome == _FAILED:
            self._fail(self._told(_lib().ds_shm_failure(self._view)))

    def _look_after(self, missing: int, deadline: float) -> None:
        """Give up, on every rank, if one cannot come any more."""
        if _has_ended(self._watches.get(missing)):
            self._fail(self._told(self._give_up(_DEATH, missing)))
        if _lib().ds_shm_has_closed(self._view, missing):
            self._fail(self._told(self._give_up(_CLOSED, missing)))
        if time.monotonic() > deadline:
            self._fail(self._told(self._give_up(_TIMEOUT, missing)))

    def _give_up(self, reason: int, rank: int) -> int:
        """Make every rank's call an error; returns the first reason that any rank had."""
        return int(_lib().ds_shm_fail(self._view, reason | rank))

    def _told(self, failure: int) -> str:
        rank = failure & 0xFF
        who = f"rank {rank}" + (" (this rank)" if rank == self.rank else "")
        brought = (f"rank {other} {self._message(other)}" for other in range(self.size))
        return {
            _TIMEOUT: f"{who} did not come within {self._timeout_s:g} s",
            _DEATH: f"the process of {who} has ended",
            _CLOSED: f"{who} has closed it",
            _DIFFERENCE: f"ranks bring different tensors: {', '.join(brought)}",
            _INTERRUPT: f"{who} was interrupted",
        }[failure & ~0xFF]

    def _fail(self, what: str) -> None:
        self._error = f"{_NAME} of {self.size} ranks, on rank {self.rank}: {what}"
        raise CommError(self._error)

    def _message(self, rank: int) -> str:
        size, kind = ctypes.c_int64(), ctypes.c_int64()
        _lib().ds_shm_message(self._view, rank, ctypes.byref(size), ctypes.byref(kind))
        return f"{size.value} bytes of {list(_TYPES)[kind.value]}"


@cache
def _lib() -> ctypes.CDLL:
    """The library with the signatures of what is called here."""
    found = library.load()
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    longs = ctypes.POINTER(long)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ds_shm_bytes": (long, [number, long]),
        "ds_shm_open": (pointer, [pointer, long, number, number, number]),
        "ds_shm_close": (None, [pointer]),
        "ds_shm_all_reduce": (number, [pointer, pointer, long, number, long]),
        "ds_shm_waiting_for": (number, [pointer]),
        "ds_shm_message": (None, [pointer, number, longs, longs]),
        "ds_shm_has_closed": (number, [pointer, number]),
        "ds_shm_fail": (ctypes.c_uint32, [pointer, ctypes.c_uint32]),
        "ds_shm_failure": (ctypes.c_uint32, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


# --- Meeting --------------------------------------------------------------------------------------


def _gathered(value: Any, pg: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * pg.size()
    dist.all_gather_object(found, value, group=pg)
    return found


def _this_process() -> _Peer:
    return _Peer(_host(), os.readlink("/proc/self/ns/pid"), os.getpid())


def _host() -> str:
    """Names this boot of this machine, which containers on it share."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        boot = ""
    return boot or socket.gethostname()


def _check_same_host(peers: Sequence[_Peer]) -> None:
    for rank, peer in enumerate(peers):
        if peer.host != peers[0].host:
            raise OpError(
                f"{_NAME}: group: ranks 0 and {rank} are on different hosts; make one per host, "
                f"of a group of its ranks"
            )


def _map_segment(size: int, pg: dist.ProcessGroup) -> mmap.mmap:
    """The same memory, all zeros, on every rank, without a name. Collective.

    Raises OpError on every rank if it cannot be made or mapped on one.
    """
    path, problem = None, ""
    if pg.rank() == 0:
        path = _FOLDER / f"ds-ops-{os.getpid()}-{secrets.token_hex(8)}"
        problem = _create(path, size)
    path, problem = _gathered((path, problem), pg)[0]
    segment = None
    if not problem:
        segment, problem = _map(path, size)
    problems = _gathered(problem, pg)
    if pg.rank() == 0 and path is not None:
        path.unlink(missing_ok=True)
    for rank, told in enumerate(problems):
        if told:
            raise OpError(f"{_NAME}: rank {rank}: {told}")
    assert segment is not None
    return segment


def _create(path: Path, size: int) -> str:
    """Make a file of zeros with all its memory; returns what is wrong, if anything."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return f"cannot make a file in {_FOLDER}: {error.strerror}"
    try:
        # Without its memory the first access beyond what there is would kill the process.
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        path.unlink()
        free = os.statvfs(_FOLDER)
        return (
            f"{_FOLDER} cannot hold {size} bytes ({free.f_bavail * free.f_frsize} are free): "
            f"{error.strerror}; give it more (docker run --shm-size, mount -o remount,size=), or "
            f"a smaller max_bytes"
        )
    finally:
        os.close(descriptor)
    return ""


def _map(path: Path, size: int) -> tuple[mmap.mmap | None, str]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            return mmap.mmap(descriptor, size), ""
        finally:
            os.close(descriptor)
    except OSError as error:
        return None, (
            f"cannot map {path}: {error.strerror}; all ranks must have the same user and "
            f"{_FOLDER} (containers: --ipc=host, or one container)"
        )


# --- Noticing the end of a rank -------------------------------------------------------------------


def _watch(peers: Sequence[_Peer], rank: int) -> dict[int, int]:
    """Descriptors that become readable when the process of a rank ends, where that can be had.

    Where not (another container, an old kernel), a rank that has died is noticed by the timeout.
    """
    found: dict[int, int] = {}
    for other, peer in enumerate(peers):
        if other == rank or peer.pid_namespace != peers[rank].pid_namespace:
            continue
        try:
            found[other] = os.pidfd_open(peer.pid)
        except OSError:
            continue
    return found


def _has_ended(descriptor: int | None) -> bool:
    if descriptor is None:
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
