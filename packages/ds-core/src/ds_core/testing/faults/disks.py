"""Disks that are full: a small file system in memory, and what fills one up."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: str | os.PathLike[str], num_bytes: int) -> Iterator[bool]:
    """Have `folder`, which is empty, be a file system of its own with so many bytes.

    Yields whether it is: mounting needs rights that a process may not have (root, on Linux), and
    then the folder stays what it was; `file_size_limit` is the next best thing.
    """
    size, is_mounted = f"size={num_bytes}", False
    if shutil.which("mount") and shutil.which("umount"):
        command = ["mount", "-t", "tmpfs", "-o", size, "ds-small-disk", os.fspath(folder)]
        is_mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            # Lazily: a process that is about to end may still have a file open.
            subprocess.run(["umount", "-l", os.fspath(folder)], check=True, capture_output=True)


def fill_disk(folder: str | os.PathLike[str], num_bytes_left: int) -> Path:
    """Write one file that leaves so many bytes, to whole pages, of the disk of `folder`.

    Returns the file; removing it makes room again.
    """
    path = Path(folder, ".filler")
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - num_bytes_left))
    return path
