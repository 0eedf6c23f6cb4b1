"""File operations that survive a crash: every write is synced before it becomes visible."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def create_synced(path: Path) -> Iterator[BinaryIO]:
    """A new file open for writing (an old one is emptied); its bytes are on disk on return."""
    with open(path, "wb", buffering=0) as raw:
        yield raw
        os.fsync(raw.fileno())


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path`, whole and on disk, when the block ends without an error."""
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


def remove_tree(path: Path) -> None:
    """Delete a directory and all that it holds."""
    shutil.rmtree(path)
