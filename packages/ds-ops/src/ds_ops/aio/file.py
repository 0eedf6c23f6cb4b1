"""A file that is read and written by tensors, asynchronously."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ds_core.errors import OpError
from ds_ops.aio.channel import Channel, Verb
from ds_ops.aio.engine import AsyncIO, EngineName
from ds_ops.aio.errors import AsyncFileError
from ds_ops.aio.opening import allocate, open_file
from ds_ops.aio.staging import Stage
from ds_ops.aio.tensors import check_offset, check_tensor, mark_written
from ds_ops.aio.token import Token, Transfer

logger = logging.getLogger(__name__)

#: Tokens of a file by the order of their beginning: it keeps them, and they their tensors.
_Tokens = dict[int, Token]


class AsyncFile:
    """A file whose reads and writes go on while the program does something else.

        with ds_ops.AsyncFile("states.bin", "rw") as file:
            token = file.write(tensor, offset=4096)
            ...
            token.wait()

    Any dense tensor goes to any offset; the file holds exactly the bytes of the tensors. Whole
    pages go around the page cache (O_DIRECT); parts of pages at either end go through it, so no
    byte beside a request is touched, also when neighbours are written at the same time. Requests
    that overlap have no order among each other: wait for one before beginning the other.

    Tensors on a device go through pinned memory. CPU tensors that are not aligned as the device
    asks (all of torch.empty) are copied through aligned memory; `ds_ops.aio.aligned_empty` makes
    tensors that are not.

    An error is raised by `wait` of its token, and if nobody waits, by `wait_all` or `close`.

    Args:
        path: of the file.
        mode: "r": read a file that exists; "w": write, from an empty file; "rw": both, keeping
            what is there; the last two create the file.
        engine: an `AsyncIO` to share, or the name of one for this file alone.
        queue_depth, block_bytes, threads: of that engine, as for `AsyncIO`; not with a shared one.
        direct: False: all goes through the page cache.

    Attributes:
        path, mode, engine: as given.

    Raises AsyncFileError if it cannot be opened, OpError for other arguments.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: str = "r",
        *,
        engine: AsyncIO | EngineName = "auto",
        queue_depth: int | None = None,
        block_bytes: int | None = None,
        threads: int | None = None,
        direct: bool = True,
    ) -> None:
        self.path, self.mode = os.fspath(path), mode
        given = {"queue_depth": queue_depth, "block_bytes": block_bytes, "threads": threads}
        settings: dict[str, Any] = {k: value for k, value in given.items() if value is not None}
        if isinstance(engine, AsyncIO) and settings:
            raise OpError(
                f"AsyncFile: {', '.join(settings)}: given by the shared engine; leave out"
            )
        self._owns_engine = not isinstance(engine, AsyncIO)
        self.engine = engine if isinstance(engine, AsyncIO) else AsyncIO(engine, **settings)
        self.engine.check_process()
        try:
            self._opened = open_file(self.path, mode, direct)
        except BaseException:
            if self._owns_engine:
                self.engine.close()
            raise
        self._channel = Channel(self.path, self._opened, self.engine)
        self._tokens: _Tokens = {}
        self._numbers = itertools.count()
        self._failed: list[Token] = []
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(
            self, _abandon, self._channel, self._tokens, self._failed
        )
        self.engine.adopt(self)

    # --- Reading and writing ----------------------------------------------------------------------

    def read(self, tensor: torch.Tensor, offset: int = 0) -> Token:
        """Begin to fill a tensor with the bytes from `offset` on.

        Args:
            tensor: dense and contiguous, any dtype and device; written in place.
            offset: in bytes.

        Raises (or the token's `wait` does) AsyncFileError, with errno ENODATA if the file ends
        before the tensor is full.
        """
        token = self._begin("read", tensor, offset)
        mark_written(tensor)
        return token

    def write(self, tensor: torch.Tensor, offset: int = 0) -> Token:
        """Begin to write a tensor's bytes from `offset` on; the file grows if it must.

        It is in the file when the token is done, and on the device after `fsync`.

        Args:
            tensor: dense and contiguous, any dtype and device; must not change until it is done.
            offset: in bytes.
        """
        return self._begin("write", tensor, offset)

    def read_sync(self, tensor: torch.Tensor, offset: int = 0) -> int:
        """Fill a tensor, and return the number of its bytes."""
        return self.read(tensor, offset).wait()

    def write_sync(self, tensor: torch.Tensor, offset: int = 0) -> int:
        """Write a tensor, and return the number of its bytes."""
        return self.write(tensor, offset).wait()

    def _begin(self, verb: Verb, tensor: torch.Tensor, offset: int) -> Token:
        check_tensor(f"AsyncFile.{verb}", tensor)
        check_offset(f"AsyncFile.{verb}", offset)
        self._check_mode(verb)
        what = f"{verb} of {tensor.nbytes} bytes"
        with self._lock:
            self._check_open()
            self.engine.check_usable()
            self._reap()
            begin: Callable[[Verb, torch.Tensor, int], Transfer] = self._channel.begin
            if tensor.device.type != "cpu":
                begin = self.engine.stage(tensor.device, Stage).begin_on(self._channel)
            token = Token(begin(verb, tensor, offset), what, self.path, tensor.nbytes)
            self._tokens[next(self._numbers)] = token
        return token

    def _check_mode(self, verb: str) -> None:
        if verb == "read" and self.mode == "w":
            raise OpError(f'AsyncFile.read: {self.path} is open with mode "w"; open it with "rw"')
        if verb == "write" and self.mode == "r":
            raise OpError(f'AsyncFile.write: {self.path} is open with mode "r"; open it with "rw"')

    # --- Waiting ----------------------------------------------------------------------------------

    def wait_all(self) -> None:
        """Wait for everything that was begun.

        Raises the first AsyncFileError of which no `wait` has told yet; the others are in its
        notes.
        """
        self.settle()
        with self._lock:
            failed = [token for token in self._failed if not token.observed]
            self._failed.clear()
        for token in failed:
            token.observed = True
        errors = [token.error for token in failed if token.error is not None]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"also: {other}")
            raise errors[0]

    def settle(self) -> None:
        """Wait for everything that was begun; its errors stay for `wait_all` and `close`."""
        self.engine.check_process()
        _settle(self._tokens, self._failed, self._lock)

    @property
    def pending(self) -> int:
        """Requests under way."""
        with self._lock:
            self._reap(all_of_them=True)
            return len(self._tokens)

    def _reap(self, *, all_of_them: bool = False) -> None:
        """Let go of tokens that are done, the oldest first."""
        for number, token in list(self._tokens.items()):
            if token.done():
                _let_go(self._tokens, self._failed, number)
            elif not all_of_them:
                return

    # --- The file ---------------------------------------------------------------------------------

    @property
    def direct(self) -> bool:
        """Whether whole pages go around the page cache."""
        return self._opened.direct >= 0 and self._opened.refusal is None

    @property
    def why_buffered(self) -> str | None:
        """Why `direct` is False; None if it is True."""
        return self._opened.refusal

    @property
    def alignment(self) -> int:
        """Offsets that are multiples of it, in bytes, make transfers that need no extra work."""
        return self._opened.alignment

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def size(self) -> int:
        """Bytes in the file now."""
        self._check_open()
        return os.fstat(self._opened.buffered).st_size

    def preallocate(self, size: int) -> None:
        """Reserve space so that the file has at least `size` bytes, zeros where it grew.

        Writes then meet no full disk, and several at once make a file grow no slower than one.
        """
        self._call("preallocate", "w", lambda file: allocate(file, size), size)

    def truncate(self, size: int) -> None:
        """Give the file exactly `size` bytes, after waiting for what is under way."""
        self.settle()
        self._call("truncate", "w", lambda file: os.ftruncate(file, size), size)

    def fsync(self) -> None:
        """Wait for what is under way, and until the device has it. Raises as `wait_all` does."""
        self.wait_all()
        self._call("fsync", "r", os.fsync, 0)

    def _call(self, name: str, needs: str, call: Any, size: int) -> None:
        check_offset(f"AsyncFile.{name}", size)
        if needs == "w":
            self._check_mode("write")
        self._check_open()
        while True:
            try:
                if size or name == "truncate" or name == "fsync":
                    call(self._opened.buffered)
                return
            except InterruptedError:
                continue
            except OSError as error:
                number = error.errno or errno.EIO
                what = name if name == "fsync" else f"{name} to {size} bytes"
                raise AsyncFileError(number, self.path, f"{what} failed") from None

    def close(self) -> None:
        """Wait for everything that was begun, then close. Closing twice is fine.

        Raises as `wait_all` does, after closing.
        """
        if self.closed:
            return
        try:
            self.wait_all()
        finally:
            self._finalizer.detach()
            self._opened.close()
            if self._owns_engine:
                self.engine.close()

    def _check_open(self) -> None:
        self.engine.check_process()
        if self.closed:
            raise AsyncFileError(errno.EBADF, self.path, "the AsyncFile is closed")

    def __enter__(self) -> AsyncFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # the error that ends the block says more than those of its requests
            with contextlib.suppress(AsyncFileError):
                self.close()

    def __repr__(self) -> str:
        how = "closed" if self.closed else "direct" if self.direct else "buffered"
        return f"AsyncFile({self.path!r}, {self.mode!r}, {self.engine.name}, {how})"


def _let_go(tokens: _Tokens, failed: list[Token], number: int) -> None:
    token = tokens.pop(number, None)
    if token is not None and token.error is not None and not token.observed:
        failed.append(token)


def _settle(tokens: _Tokens, failed: list[Token], lock: Any) -> None:
    """Wait for all tokens."""
    while tokens:
        for number, token in list(tokens.items()):
            while not token.settle(0.2):
                pass
            with lock:
                _let_go(tokens, failed, number)


def _abandon(channel: Channel, tokens: _Tokens, failed: list[Token]) -> None:
    """A file that nobody closed: wait for its requests, and log the errors that nobody saw."""
    try:
        channel.engine.check_process()
    except OpError:  # in a forked child; the parent has the requests
        return
    _settle(tokens, failed, contextlib.nullcontext())
    channel.opened.close()
    for token in failed:
        if not token.observed:
            logger.error("%s was not closed, and lost an error: %s", channel.path, token.error)
