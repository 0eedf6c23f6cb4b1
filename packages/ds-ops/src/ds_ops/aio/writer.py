"""A file-like object that writes a checkpoint around the page cache while it is made."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import numpy as np

from ds_core.errors import OpError
from ds_ops.aio.buffers import aligned_empty
from ds_ops.aio.engine import AsyncIO, EngineName
from ds_ops.aio.errors import AsyncFileError
from ds_ops.aio.file import AsyncFile
from ds_ops.aio.token import Token

#: The file is lengthened by so many bytes at a time: writes behind its end go one by one.
_GROWTH = 1 << 30
#: A file system that allocates as it is written does so once per transfer: these are large.
_LARGE: Mapping[str, int] = MappingProxyType({"block_bytes": 8 << 20, "queue_depth": 16})


class FastFileWriter(io.RawIOBase, BinaryIO):
    """A file to write to, for torch.save and whatever else takes a binary file.

        with ds_ops.FastFileWriter("model.pt") as file:
            torch.save(model.state_dict(), file)

    What is written is copied into one of a few aligned buffers; a full one goes to the disk, in
    blocks and around the page cache, while the others are filled. An error of the disk is raised by
    the next `write`, `flush`, `seek` or `close`. The file has the length of what was written once
    it is closed, and may be longer before.

    torch.save computes a CRC-32 of every tensor, which takes longer than the disk; after
    `torch.serialization.set_crc32_options(False)` it does not.

    Args:
        path: of the file; what was there is gone.
        buffer_bytes: of each buffer.
        buffers: how many; with 1, nothing is filled while the disk works.
        fsync: close returns when the device has everything.
        engine: an `AsyncIO` to share, or the name of one for this file.

    Raises AsyncFileError if the file cannot be created, OpError for other arguments.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        buffer_bytes: int = 16 << 20,
        buffers: int = 4,
        fsync: bool = False,
        engine: AsyncIO | EngineName = "auto",
    ) -> None:
        super().__init__()
        if buffer_bytes < 1 or buffers < 1:
            raise OpError(
                f"FastFileWriter: buffer_bytes and buffers: got {buffer_bytes} and {buffers}, "
                f"expected at least 1"
            )
        self._engine = None if isinstance(engine, AsyncIO) else AsyncIO(engine, **_LARGE)
        try:
            self._file = AsyncFile(path, "w", engine=self._engine or engine)
        except BaseException:
            self._close_engine()
            raise
        align = self._file.alignment
        self._room = -(-buffer_bytes // align) * align
        self._buffers = [aligned_empty(self._room) for _ in range(buffers)]
        self._views = [buffer.numpy() for buffer in self._buffers]
        self._tokens: list[Token | None] = [None] * buffers
        self._which = 0
        self._begin = 0  # of the current buffer, in the file: where its first byte goes
        self._start = self._end = 0  # what of it is filled
        self._length = 0  # of the file, as far as written
        self._grown = 0
        self._fsync = fsync

    @property
    def file(self) -> AsyncFile:
        """The file below."""
        return self._file

    @property
    def name(self) -> str:
        """The path."""
        return self._file.path

    @property
    def mode(self) -> str:
        """Always "wb"."""
        return "wb"

    # --- io.RawIOBase -----------------------------------------------------------------------------

    def writable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Where the next byte goes."""
        self._check_open()
        return self._begin + self._end

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file, to overwrite it or to leave a gap of zeros."""
        self._check_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}
        if whence not in base or base[whence] + offset < 0:
            raise OpError(f"FastFileWriter.seek: got {offset} with whence {whence}: no such place")
        target = base[whence] + offset
        if target != self.tell():
            self.flush()  # what is under way must not overtake what will overwrite it
            self._place(target)
        return target

    def write(self, data: Any) -> int:
        """Write a bytes-like object; the number of its bytes."""
        self._check_open()
        source = np.frombuffer(data, dtype=np.uint8)
        size, done = source.size, 0
        while done < size:
            count = min(size - done, self._room - self._end)
            into = self._views[self._which]
            into[self._end : self._end + count] = source[done : done + count]
            self._end += count
            done += count
            if self._end == self._room:
                self._send()
        self._length = max(self._length, self.tell())
        return size

    def truncate(self, size: int | None = None) -> int:
        """Give the file a length: that of `tell`, or `size`."""
        self.flush()
        self._length = self.tell() if size is None else size
        self._grown = self._length
        self._file.truncate(self._length)
        return self._length

    def flush(self) -> None:
        """Wait until the file has everything that was written."""
        if self.closed:
            return
        place = self.tell()
        if self._end > self._start:
            self._send()
        self._tokens = [None] * len(self._tokens)
        self._file.wait_all()
        self._place(place)

    def fileno(self) -> int:
        """Not offered: what is written to a descriptor would miss the buffers."""
        raise io.UnsupportedOperation("FastFileWriter: its buffers know nothing of a descriptor")

    def close(self) -> None:
        """Write what is left, give the file its length, and close it. Closing twice is fine."""
        if self.closed:
            return
        try:
            self.flush()
            if self._grown > self._length:
                self._file.truncate(self._length)
            if self._fsync:
                self._file.fsync()
        finally:
            self._buffers.clear()
            self._views.clear()
            super().close()
            try:
                self._file.close()
            finally:
                self._close_engine()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except AsyncFileError as other:  # the error that ends the block is the first one
            if error is not None and error is not other:
                error.add_note(f"also: {other}")

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()

    # --- Buffers ----------------------------------------------------------------------------------

    def _place(self, target: int) -> None:
        """Put the current buffer where it holds `target`; it is empty and free."""
        align = self._file.alignment
        self._begin = target // align * align
        self._start = self._end = target - self._begin

    def _send(self) -> None:
        """Begin to write the current buffer, and go on in the next one."""
        self._grow(self._begin + self._end)
        part = self._buffers[self._which][self._start : self._end]
        self._tokens[self._which] = self._file.write(part, self._begin + self._start)
        self._which = (self._which + 1) % len(self._buffers)
        self._place(self._begin + self._end)  # before an error: what was sent is not sent again
        waited, self._tokens[self._which] = self._tokens[self._which], None
        if waited is not None:
            waited.wait()

    def _grow(self, needed: int) -> None:
        if needed > self._grown and self._room < needed:
            self._grown = needed + _GROWTH
            try:
                self._file.preallocate(self._grown)
            except AsyncFileError as error:
                # What is needed may fit where that much more does not.
                if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                    raise
                self._grown = needed

    def _check_open(self) -> None:
        if self.closed:
            raise AsyncFileError(errno.EBADF, self._file.path, "the FastFileWriter is closed")
