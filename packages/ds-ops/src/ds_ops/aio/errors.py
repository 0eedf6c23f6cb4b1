"""The error of asynchronous file I/O: where in which file, why, and what to do."""

from __future__ import annotations

import errno
import os
from typing import Any

from ds_core.errors import DsError

#: Reasons that the message says itself.
_SAID = (errno.ENODATA, errno.ETIMEDOUT)
#: What a user can do, by errno.
_REMEDIES = {
    errno.ENOENT: 'check the path, or open with mode "w" or "rw", which create the file',
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
    errno.EISDIR: "give the path of a file",
    errno.EROFS: "the file system is mounted read-only; give a path on another one",
    errno.EDQUOT: "the user's quota is used up; free space or raise it",
    errno.EFBIG: "a file may not be so large: raise `ulimit -f`, or use another file system",
    errno.EIO: "the device failed: see dmesg",
    errno.EMFILE: "too many open files: raise `ulimit -n`, or close some",
    errno.ENODATA: "the file is shorter than what was asked: check offset and shape",
    errno.EBADF: "open the file again",
    errno.ESTALE: "the file was removed on the server: open it again",
    errno.ENOMEM: "there is no memory for the transfer: lower block_bytes or queue_depth",
}


class AsyncFileError(DsError, OSError):
    """A file cannot be opened, read or written.

    Attributes:
        errno: the system's number for the reason; ENODATA: the file is too short.
        path: of the file.
        offset: where in the file, in bytes; None if it is about the whole file.
    """

    def __init__(
        self, number: int, path: str, what: str, *, offset: int | None = None, remedy: str = ""
    ) -> None:
        self.path, self.offset = path, offset
        self._arguments = (number, path, what, offset, remedy)
        where = "" if offset is None else f" at offset {offset}"
        name = errno.errorcode.get(number, str(number))
        reason = "" if number in _SAID else f": {os.strerror(number)} ({name})"
        advice = remedy or _remedy(number, path)
        super().__init__(
            number, f"{path}: {what}{where}{reason}" + (f"; {advice}" if advice else "")
        )
        self.filename = path

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._arguments


def _rebuild(number: int, path: str, what: str, offset: int | None, remedy: str) -> AsyncFileError:
    return AsyncFileError(number, path, what, offset=offset, remedy=remedy)


def _remedy(number: int, path: str) -> str:
    if number != errno.ENOSPC:
        return _REMEDIES.get(number, "")
    try:
        found = os.statvfs(path)
    except OSError:
        return "free space on its file system"
    free = found.f_bavail * found.f_frsize
    return f"its file system has {free / 2**20:.1f} MiB free; free space, or use another one"
