"""The engine: what moves bytes for any number of files, with a bounded number in flight."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
import weakref
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from ds_core.errors import OpError
from ds_ops.aio.native import Counters, functions
from ds_ops.aio.probe import gds_refusal, io_uring_refusal

if TYPE_CHECKING:
    from ds_ops.aio.file import AsyncFile
    from ds_ops.aio.staging import Stage

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "io_uring", "threads", "gds"]

_KINDS = {"io_uring": 0, "threads": 1}
_MAX_DEPTH, _MAX_THREADS, _MAX_BLOCK = 4096, 256, 1 << 30
_MIN_BLOCK = 4096
_COUNTERS = (
    *("bytes", "pieces", "buffered_bytes", "bounced_bytes", "continued"),
    "peak_in_flight",
)


class Outcome(NamedTuple):
    """How a request ended; the fields are those of ds_aio_finish."""

    error: int
    error_offset: int
    end_of_file: int
    direct_refused: int


class AsyncIO:
    """Moves bytes between memory and files, up to `queue_depth` pieces at a time.

    Files are opened on it with `AsyncFile(path, engine=this)`; several files share its depth, so
    one engine bounds what a program has in flight. Safe to use from several threads. After a
    fork, a child needs an engine of its own.

    Args:
        engine: "io_uring"; "threads"; "auto": io_uring where the kernel permits it, and threads
            with a logged reason where it does not.
        queue_depth: pieces in flight at most.
        block_bytes: of a piece, about.
        threads: of the engine "threads", where each moves one piece at a time; default:
            queue_depth, but at most 16. io_uring needs one thread, whatever is given.

    Attributes:
        name: "io_uring" or "threads".
        reason: why "auto" did not choose io_uring, else None.

    Raises OpError for arguments that make no sense and for an engine that cannot run here,
    BuildError if the C++ library does not build.
    """

    def __init__(
        self,
        engine: EngineName = "auto",
        *,
        queue_depth: int = 32,
        block_bytes: int = 1 << 20,
        threads: int | None = None,
    ) -> None:
        if engine == "gds":
            raise OpError(f'AsyncIO: engine "gds" cannot run here: {gds_refusal()}')
        if engine not in ("auto", *_KINDS):
            raise OpError(
                f'engine: got {engine!r}, expected "auto", "io_uring", "threads" or "gds"'
            )
        _check_range("queue_depth", queue_depth, 1, _MAX_DEPTH)
        _check_range("block_bytes", block_bytes, _MIN_BLOCK, _MAX_BLOCK)
        if threads is not None:
            _check_range("threads", threads, 1, _MAX_THREADS)
        self.block_bytes = block_bytes
        self.reason: str | None = None
        self._functions = functions()
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a file may be collected, and wait, inside of it
        self._is_closing = False
        self._waiting = 0  # threads that are inside the library's wait
        self._files: weakref.WeakSet[AsyncFile] = weakref.WeakSet()
        self._stages: dict[object, Stage] = {}
        self.name, self.queue_depth, self._handle = self._open(
            engine, queue_depth, threads or min(queue_depth, 16)
        )
        self._finalizer = weakref.finalize(self, _close, self._functions, self._handle, self._pid)

    def _open(self, engine: EngineName, depth: int, threads: int) -> tuple[str, int, int]:
        if engine != "threads":
            handle, number = self._try("io_uring", depth)
            if handle:
                return "io_uring", depth, handle
            reason = io_uring_refusal(number)
            if engine == "io_uring":
                raise OpError(
                    f'AsyncIO: engine "io_uring" cannot run here: {reason}; or use "threads"'
                )
            self.reason = reason
            _tell_once(reason)
        handle, number = self._try("threads", threads)
        if not handle:
            raise OpError(
                f"AsyncIO: {threads} threads cannot be started: {os.strerror(number)}; give fewer, "
                f"or raise ulimit -u"
            )
        return "threads", threads, handle

    def _try(self, name: str, depth: int) -> tuple[int, int]:
        number = ctypes.c_int()
        handle = self._functions.ds_aio_open(
            _KINDS[name], depth, self.block_bytes, ctypes.byref(number)
        )
        return handle or 0, number.value

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return not self._finalizer.alive

    def counters(self) -> dict[str, int]:
        """What it has done so far.

        bytes and pieces moved; buffered_bytes: of them through the page cache; bounced_bytes: of
        them through a copy, since the memory was not aligned; continued: pieces that went on
        after a short transfer; peak_in_flight: the most pieces at a time.
        """
        found = Counters()
        with self._lock:
            self._check_usable()
            self._functions.ds_aio_counters(self._handle, ctypes.byref(found))
        return {name: getattr(found, name) for name in _COUNTERS}

    def close(self) -> None:
        """Wait for every request of every file on it, then end its threads.

        Errors of requests stay with their tokens and files. Closing twice is fine.
        """
        if self.closed or os.getpid() != self._pid:
            return
        self._is_closing = True  # or threads that go on and on would keep it open
        while not self.closed:
            for file in list(self._files):
                file.settle()
            for stage in list(self._stages.values()):
                stage.close()
            with self._lock:
                if self._waiting == 0:  # nobody works on what is freed here
                    self._finalizer()
                    return
            time.sleep(0.001)

    def __enter__(self) -> AsyncIO:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"depth {self.queue_depth}"
        return f"AsyncIO({self.name}, {state}, {self.block_bytes} B blocks)"

    # --- For files --------------------------------------------------------------------------------

    def adopt(self, file: AsyncFile) -> None:
        """Settle the file's requests when this engine is closed."""
        self._files.add(file)

    def submit(
        self, target: tuple[int, int, int, int], writes: bool, address: int, size: int, offset: int
    ) -> int:
        """Begin a request; its handle. The memory and the target's files must stay.

        Args:
            target: descriptors with and without O_DIRECT, alignment of offsets and of memory.
        """
        with self._lock:
            self._check_usable()
            handle = self._functions.ds_aio_submit(
                self._handle, *target, int(writes), address, size, offset
            )
        if not handle:
            raise OpError(f"AsyncIO: {size} bytes at offset {offset}: more than a file can hold")
        return int(handle)

    def wait(self, request: int, seconds: float) -> bool:
        """Whether a request is done, after waiting up to so long."""
        with self._lock:
            if self.closed:
                return True  # closing has finished every request
            self._waiting += 1
        try:
            return bool(self._functions.ds_aio_wait(self._handle, request, seconds))
        finally:
            with self._lock:
                self._waiting -= 1

    def finish(self, request: int) -> Outcome:
        """How a request that is done went; its handle is void then."""
        result = (ctypes.c_int64 * 4)()
        self._functions.ds_aio_finish(request, result)
        return Outcome(*result)

    def stage(self, device: object, make: type[Stage]) -> Stage:
        """Its pinned buffers for tensors of a device, made at first use."""
        with self._lock:
            self._check_usable()
            if device not in self._stages:
                self._stages[device] = make(self, device)
            return self._stages[device]

    def check_process(self) -> None:
        """Raise OpError in a forked child: the threads of the engine are not there."""
        if os.getpid() != self._pid:
            raise OpError(
                f"AsyncIO: made in process {self._pid} and used in its forked child "
                f"{os.getpid()}, where its threads do not exist; make an engine and open files "
                f"after the fork"
            )

    def check_usable(self) -> None:
        """Raise OpError unless transfers can be begun: what a stage has begun ends in any case."""
        self._check_usable()
        if self._is_closing:
            raise OpError("AsyncIO: it is closed; make another one")

    def _check_usable(self) -> None:
        self.check_process()
        if self.closed:
            raise OpError("AsyncIO: it is closed; make another one")


def _close(library: ctypes.CDLL, handle: int, pid: int) -> None:
    if os.getpid() == pid:
        library.ds_aio_close(handle)


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise OpError(f"AsyncIO: {name}: got {value!r}, expected an integer in [{least}, {most}]")


@cache
def _tell_once(reason: str) -> None:
    logger.warning("file I/O runs on threads: no io_uring here: %s (`ds io engines`)", reason)
