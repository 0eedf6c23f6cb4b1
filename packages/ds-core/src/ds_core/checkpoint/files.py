"""File operations that survive a crash: every write is synced before it becomes visible."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ds_core.checkpoint.remote import Place, RemotePath


@contextlib.contextmanager
def create_synced(path: Place) -> Iterator[BinaryIO]:
    """A new file open for writing (an old one is emptied); its bytes are on disk on return."""
    if isinstance(path, RemotePath):
        with path.create() as upload:
            yield upload
        return
    with open(path, "wb", buffering=0) as raw:
        yield raw
        os.fsync(raw.fileno())


@contextlib.contextmanager
def replace_atomically(path: Place) -> Iterator[BinaryIO]:
    """A file that appears at `path`, whole and on disk, when the block ends without an error."""
    if isinstance(path, RemotePath):
        content = io.BytesIO()
        yield content
        path.put(content.getvalue())
        return
    # Always the same name: what a crash leaves is overwritten the next time.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with create_synced(temporary) as raw:
            yield raw
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_all(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`: an unbuffered file may take only a part of it at a time."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]


def read_exactly(file: BinaryIO, start: int, count: int) -> bytearray:
    """Bytes `[start, start + count)` of the file; fewer if it ends before."""
    data = bytearray(count)
    view = memoryview(data)
    file.seek(start)
    done = 0
    while done < count:
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            view.release()
            del data[done:]
            return data
        done += got
    return data


def sync_directory(path: Path) -> None:
    """Put the names in a directory on disk: a rename is durable only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename, durably. A directory may replace an empty one only; a file replaces a file."""
    os.rename(source, target)
    sync_directory(target.parent)


def remove_tree(path: Place) -> None:
    """Delete a directory and all that it holds."""
    if isinstance(path, RemotePath):
        path.remove_tree()
    else:
        shutil.rmtree(path)


def open_to_read(path: Place) -> BinaryIO:
    """A file for `read_exactly`, unbuffered."""
    return path.open_to_read() if isinstance(path, RemotePath) else open(path, "rb", buffering=0)


def size_of(path: Place) -> int:
    """Bytes of a file."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def modified_s(path: Place) -> float:
    """When a file was written, in seconds since 1970."""
    return path.modified_s() if isinstance(path, RemotePath) else path.stat().st_mtime


def reason(error: OSError) -> str:
    """What the system says of an error; not every file system says more than its kind."""
    return error.strerror or type(error).__name__
