"""Folders and files on the file systems of fsspec, such as `s3://bucket/run` and `memory://run`.

A `RemotePath` has the part of `pathlib.Path`'s interface that checkpoints need. Object stores have
no rename and no fsync: a file is there, whole, once its upload has ended, and not before.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ds_core.errors import CheckpointError

#: Bytes that an upload collects before it sends them: 10,000 parts of S3 make 312 GiB per file.
_PART_BYTES = 32 * 1024 * 1024


class RemotePath(os.PathLike[str]):
    """A name on a file system of fsspec; credentials come from where that file system has them.

    Args:
        url: such as `"s3://bucket/run"`. fsspec's configuration files and the environment say what
            else its file system needs to know.

    Raises:
        CheckpointError: if fsspec, or the package for this kind of URL, is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self._fs, self._path = _file_system(self.url)

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __reduce__(self) -> tuple[type[RemotePath], tuple[str]]:
        return RemotePath, (self.url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self._path).rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder that this lies in."""
        return RemotePath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether there is a file or folder of this name."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path))

    def is_file(self) -> bool:
        """Whether there is a file of this name."""
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(self._path))

    def is_dir(self) -> bool:
        """Whether there is a folder of this name; in an object store, a file below it."""
        self._fs.invalidate_cache()
        return bool(self._fs.isdir(self._path))

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in the folder."""
        self._fs.invalidate_cache()
        for found in self._fs.ls(self._path, detail=False):
            name = str(found).rstrip("/").rpartition("/")[2]
            if name and str(found).rstrip("/") != str(self._path).rstrip("/"):
                yield self / name

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Make the folder, where the file system has folders."""
        self._fs.makedirs(self._path, exist_ok=exist_ok)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file."""
        try:
            self._fs.rm_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Delete the folder and all that it holds."""
        self._fs.rm(self._path, recursive=True)

    def read_bytes(self) -> bytes:
        """All of the file."""
        return bytes(self._fs.cat_file(self._path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of the file, as text."""
        return self.read_bytes().decode(encoding)

    def put(self, content: bytes) -> None:
        """Write a small file in one request: readers see the old one, or all of the new."""
        self._fs.pipe_file(self._path, content)

    def create(self) -> BinaryIO:
        """A new file, open for writing; it is there once it has been closed."""
        return cast(BinaryIO, self._fs.open(self._path, "wb", block_size=_PART_BYTES))

    def open_to_read(self) -> BinaryIO:
        """The file, for `seek` and `readinto`; each read is a request of its own."""
        return cast(BinaryIO, _Ranges(self._fs, self._path))

    def size(self) -> int:
        """Bytes of the file."""
        self._fs.invalidate_cache()
        return int(self._fs.info(self._path)["size"])

    def modified_s(self) -> float:
        """When it was written, in seconds since 1970; 0 where the file system keeps no times."""
        try:
            return float(self._fs.modified(self._path).timestamp())
        except NotImplementedError:
            return 0.0


#: Where checkpoints are.
Place = Path | RemotePath


def as_place(directory: str | os.PathLike[str]) -> Place:
    """What a caller named: a local path, or a URL of fsspec (`file://` is a local path too).

    Raises:
        CheckpointError: if the URL cannot be served, or a URL was turned into a `Path`.
    """
    if isinstance(directory, RemotePath):
        return directory
    text = os.fspath(directory)
    scheme, separator, rest = text.partition("://")
    if separator:
        return Path(rest) if scheme in ("file", "local") else RemotePath(text)
    if isinstance(directory, Path) and re.match(r"[a-z][a-z0-9]+:/", text):
        raise CheckpointError(
            f"{text}: a URL that has become a Path has lost a slash; pass it as a string, "
            f"such as {text.replace(':/', '://', 1)!r}"
        )
    return Path(text)


class _Ranges(io.RawIOBase):
    """Reads of ranges of a remote file, none of which is read ahead or kept."""

    def __init__(self, fs: Any, path: str) -> None:
        super().__init__()
        self._fs, self._path, self._at = fs, path, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation("only absolute positions")
        self._at = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        found = self._fs.cat_file(self._path, start=self._at, end=self._at + len(buffer))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise CheckpointError(
            f"{url}: URLs need fsspec, which is not installed: pip install 'ds-core[fsspec]'"
        ) from error
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # no package for it, or no such protocol
        raise CheckpointError(f"{url}: fsspec cannot open this URL: {error}") from error
    return fs, path
