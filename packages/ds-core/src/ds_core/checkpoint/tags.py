"""The directory that holds a job's checkpoints: one subdirectory per tag, and `latest`.

    checkpoints/latest                 a text file: the tag of the newest complete checkpoint
    checkpoints/step10/                a checkpoint
    checkpoints/step20.tmp-1f0c9a2b/   one that is being written, or whose save was interrupted
    checkpoints/step10.old-77aa01c3/   one that a newer step10 is about to replace

A checkpoint is renamed into place when it is complete. One that exists already is first renamed
aside; if the job dies between the two renames, the old one is found there.
"""

from __future__ import annotations

import logging
import re
import uuid
from pathlib import Path

from ds_core.checkpoint.files import remove_tree, rename, replace_atomically, write_all
from ds_core.checkpoint.index import INDEX_NAME
from ds_core.errors import CheckpointError

logger = logging.getLogger(__name__)

LATEST_NAME = "latest"
_TEMPORARY = ".tmp-"
_ASIDE = ".old-"
_DATA_FILE = re.compile(r"rank_\d{5,}\.safetensors")


def checked_tag(tag: str) -> str:
    """`tag`, if it can name a checkpoint. Raises CheckpointError otherwise."""
    reserved = tag == LATEST_NAME or any(mark in tag for mark in (_TEMPORARY, _ASIDE))
    if not tag or tag.startswith(".") or reserved or any(c in tag for c in "/\\\0\n"):
        raise CheckpointError(
            f"tag: got {tag!r}, expected the name of a directory: not empty, no slash, no leading "
            f"dot, not {LATEST_NAME!r}, and without {_TEMPORARY!r} or {_ASIDE!r}"
        )
    return tag


def tags(directory: Path) -> list[str]:
    """The tags of the complete checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    times: dict[str, float] = {}
    for path in directory.iterdir():
        if _is_complete(path) and _TEMPORARY not in path.name:
            tag = path.name.split(_ASIDE)[0]
            times[tag] = max(times.get(tag, 0.0), (path / INDEX_NAME).stat().st_mtime)
    return sorted(times, key=lambda tag: (times[tag], tag))


def latest(directory: Path) -> str:
    """The tag that the `latest` file names.

    Raises:
        CheckpointError: if the directory or the file is missing, or the file names no tag; lists
            the tags that exist.
    """
    _check_directory(directory)
    path = directory / LATEST_NAME
    try:
        tag = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no file {LATEST_NAME!r}, so there is no newest checkpoint; "
            f"{_known(directory)}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {_known(directory)}") from error
    try:
        return checked_tag(tag)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}; {_known(directory)}") from error


def find(directory: Path, tag: str) -> Path:
    """The directory of a complete checkpoint.

    Raises:
        CheckpointError: if there is none with this tag; lists the tags that exist.
    """
    _check_directory(directory)
    path = directory / checked_tag(tag)
    if _is_complete(path):
        return path
    for aside in sorted(_siblings(directory, tag, _ASIDE)):
        if _is_complete(aside):
            logger.warning("%s was being replaced when its job died; using %s", path, aside)
            return aside
    state = "is not complete" if path.exists() else "does not exist"
    raise CheckpointError(f"checkpoint {tag!r} {state} in {directory}; {_known(directory)}")


def begin(directory: Path, tag: str) -> Path:
    """The path under which a new checkpoint is to be written; what a dead save left is removed.

    Raises:
        CheckpointError: if something that is no checkpoint has the name of the tag.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / tag
    if target.exists() and not _is_complete(target) and not _is_remainder(target):
        raise CheckpointError(
            f"{target} exists and is not a checkpoint of this format, so it is not replaced; "
            "use another tag or directory, or remove it"
        )
    leftovers = _siblings(directory, tag, _TEMPORARY)
    if target.exists():  # else a copy that is aside is the only one
        leftovers += _siblings(directory, tag, _ASIDE)
    for dead in leftovers:
        discard(dead)
    return directory / f"{tag}{_TEMPORARY}{uuid.uuid4().hex[:8]}"


def commit(temporary: Path, directory: Path, tag: str) -> Path:
    """Rename a complete checkpoint to its tag, durably; remove what it replaces."""
    target = directory / tag
    if target.exists():
        rename(target, directory / f"{tag}{_ASIDE}{uuid.uuid4().hex[:8]}")
    rename(temporary, target)
    for replaced in _siblings(directory, tag, _ASIDE):
        discard(replaced)
    return target


def point_latest(directory: Path, tag: str) -> None:
    """Make `latest` name the tag, atomically."""
    with replace_atomically(directory / LATEST_NAME) as file:
        write_all(file, f"{tag}\n".encode())


def discard(path: Path) -> None:
    """Remove a directory that nobody needs; one that cannot be removed is only logged."""
    try:
        # Without its index it is no checkpoint, however far the deletion gets.
        (path / INDEX_NAME).unlink(missing_ok=True)
        remove_tree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)


def _check_directory(directory: Path) -> None:
    if directory.is_file():
        raise CheckpointError(
            f"{directory} is a file, not a folder of checkpoints; one of another format is read by "
            "`ds checkpoint import`"
        )
    if not directory.is_dir():
        raise CheckpointError(
            f"checkpoint directory {directory} does not exist; check the path, "
            "or save a checkpoint first"
        )


def _known(directory: Path) -> str:
    known = tags(directory)
    if not known:
        return "it holds no complete checkpoint"
    shown = ", ".join(known[-8:])
    return f"its checkpoints are {shown}" + (f" and {len(known) - 8} older" * (len(known) > 8))


def _is_complete(path: Path) -> bool:
    return (path / INDEX_NAME).is_file()


def _is_remainder(path: Path) -> bool:
    """Whether a folder holds nothing, or what is left of a checkpoint that has lost its index."""
    return path.is_dir() and all(_DATA_FILE.fullmatch(entry.name) for entry in path.iterdir())


def _siblings(directory: Path, tag: str, mark: str) -> list[Path]:
    return [path for path in directory.iterdir() if path.name.startswith(tag + mark)]
