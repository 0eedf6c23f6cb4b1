"""Where the text comes from: files and folders, or the source of Python's standard library."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import ExampleError

#: Folders in that of the standard library which are not it, its tests, or data written as Python.
NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    | {"encodings", "pydoc_data"}
)
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, and texts that are never trained on.

    Attributes:
        train, heldout: one string per file.
        summary: what was read, held out and left out, for the reader.
    """

    train: list[str]
    heldout: list[str]
    summary: str


def read(paths: Sequence[str] | None, max_bytes: int | None = None) -> Corpus:
    """Read text files, the text files in folders, or (None) the standard library's source.

    The last 5% of each file are held out. A file that is named itself must be text; among the files
    of a folder, those that are not are left out, and hidden ones too. With `max_bytes`, some of the
    files, the same ones every time.

    Raises ExampleError for a path that is missing, empty, unreadable, or not text.
    """
    if paths is None:
        texts, skipped = _library()
        source = "the standard library's source"
    else:
        texts, skipped = _named(paths)
        source = ", ".join(paths)
    total = sum(map(_num_bytes, texts))
    random.Random(0).shuffle(texts)
    texts = list(_up_to(texts, max_bytes)) if max_bytes else texts
    train, heldout = _split(texts)
    kept = sum(map(_num_bytes, texts))
    parts = [f"{source}: {len(texts)} files, {kept / 1e6:.2f} MB"]
    if kept < total:
        parts[0] += f" of {total / 1e6:.2f} MB (--max-mb)"
    held = sum(map(_num_bytes, heldout))
    parts.append(f"held out: the last {HELD_OUT_PERCENT}% of each, {held / 1e6:.2f} MB")
    if skipped:
        named = ", ".join(map(str, skipped[:3])) + (", ..." if len(skipped) > 3 else "")
        parts.append(f"left out as not text: {len(skipped)} ({named})")
    return Corpus(train, heldout, "; ".join(parts))


def _library() -> tuple[list[str], list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not NOT_LIBRARY.intersection(path.relative_to(root).parts)
    ]
    texts, skipped = _readable(files)
    if not texts:
        raise ExampleError(
            f"the standard library's source is not at {root} (a Python without it); give your own "
            f"text with --data FILE_OR_FOLDER"
        )
    return texts, skipped


def _named(paths: Sequence[str]) -> tuple[list[str], list[Path]]:
    texts: list[str] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found, left_out = _readable(_visible_files(path))
            if not found:
                raise ExampleError(
                    f"--data: folder {str(path)!r} has no text file that is not empty"
                )
            texts += found
            skipped += left_out
        elif path.is_file():
            texts.append(_text_of(path))
        else:
            kind = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise ExampleError(f"--data: {str(path)!r} {kind}")
    return texts, skipped


def _visible_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]


def _readable(files: Iterable[Path]) -> tuple[list[str], list[Path]]:
    """Texts of a folder's files that have any, and the files that are not text."""
    texts: list[str] = []
    skipped: list[Path] = []
    for path in files:
        text = _decoded(_bytes_of(path))
        if isinstance(text, str):
            texts += [text] if text.strip() else []
        else:
            skipped.append(path)
    return texts, skipped


def _text_of(path: Path) -> str:
    text = _decoded(_bytes_of(path))
    if not isinstance(text, str):
        raise ExampleError(
            f"--data: {str(path)!r} is not UTF-8 text: byte {text.value:#04x} at offset "
            f"{text.offset}; convert it, or leave it out"
        )
    if not text.strip():
        raise ExampleError(f"--data: {str(path)!r} is empty")
    return text


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExampleError(f"--data: cannot read {str(path)!r}: {error.strerror}") from error


@dataclass(frozen=True)
class _BadByte:
    value: int
    offset: int


def _decoded(data: bytes) -> str | _BadByte:
    """The text, or the first byte that no text has."""
    nul = data.find(0)
    if nul >= 0:
        return _BadByte(0, nul)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return _BadByte(data[error.start], error.start)


def _up_to(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Texts in order until `max_bytes` are full; the last one is cut."""
    for text in texts:
        data = text.encode()
        if len(data) >= max_bytes:
            yield data[:max_bytes].decode(errors="ignore")
            return
        yield text
        max_bytes -= len(data)


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """The beginnings of texts, and their ends."""
    cuts = [len(text) - len(text) * HELD_OUT_PERCENT // 100 for text in texts]
    train = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    heldout = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    return train, heldout


def _num_bytes(text: str) -> int:
    return len(text.encode())
