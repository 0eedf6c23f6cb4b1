"""The directory that holds a job's checkpoints: one subdirectory per tag, and `latest`.

    checkpoints/latest                 a text file: the tag of the newest complete checkpoint
    checkpoints/step10/                a checkpoint
    checkpoints/step20.tmp-1f0c9a2b/   one that is being written, or whose save was interrupted
    checkpoints/step10.old-77aa01c3/   one that a newer step10 is about to replace
    checkpoints/step5.del-90b1c2d3/    one that is being deleted

A checkpoint is renamed into place when it is complete. One that exists already is first renamed
aside; if the job dies between the two renames, the old one is found there.

A file system of fsspec need not be able to rename. There the data files of a save have names of its
own (`rank_00000-1f0c9a2b.safetensors`) in the folder of the tag, so that they disturb none that are
there; it becomes a checkpoint, or replaces one, when its index is written, in one request.
"""

from __future__ import annotations

import logging
import re
import uuid
from pathlib import Path
from typing import NamedTuple

from ds_core.checkpoint.files import modified_s, remove_tree, rename, replace_atomically, write_all
from ds_core.checkpoint.index import INDEX_NAME, Index
from ds_core.checkpoint.remote import Place
from ds_core.errors import CheckpointError

logger = logging.getLogger(__name__)

LATEST_NAME = "latest"
_TEMPORARY = ".tmp-"
_ASIDE = ".old-"
_DATA_FILE = re.compile(r"rank_\d{5,}(-[0-9a-f]{8})?\.safetensors")
_DELETED = ".del-"
_MARKS = (_TEMPORARY, _ASIDE, _DELETED)


class Draft(NamedTuple):
    """Where a checkpoint that is being written lies.

    Attributes:
        path: the folder; that of the finished checkpoint where nothing can be renamed.
        suffix: what the names of its data files end in, before `.safetensors`.
    """

    path: Place
    suffix: str = ""

    def discard(self) -> bool:
        """Remove what was written, unless it is a checkpoint by now; whether it is one.

        What cannot be removed is only logged.
        """
        if not self.suffix:
            if not self.path.exists():  # it has been renamed
                return True
            discard(self.path)
            return False
        try:
            if self._is_named_by_index():
                return True
            for path in self.path.iterdir():
                if path.name.endswith(f"{self.suffix}.safetensors"):
                    path.unlink()
        except (OSError, CheckpointError) as error:
            logger.warning("cannot remove what was written to %s: %s", self.path, error)
        return False

    def _is_named_by_index(self) -> bool:
        """Whether the index in the folder is that of this draft.

        Asked of the store, since a request that seemed to fail may have come through.
        """
        if not _is_complete(self.path):
            return False
        mine = f"{self.suffix}.safetensors"
        return any(name.endswith(mine) for name in Index.read(self.path).files)


def checked_tag(tag: str) -> str:
    """`tag`, if it can name a checkpoint. Raises CheckpointError otherwise."""
    reserved = tag == LATEST_NAME or any(mark in tag for mark in _MARKS)
    if not tag or tag.startswith(".") or reserved or any(c in tag for c in "/\\\0\n"):
        raise CheckpointError(
            f"tag: got {tag!r}, expected the name of a directory: not empty, no slash, no leading "
            f"dot, not {LATEST_NAME!r}, and without {_TEMPORARY!r}, {_ASIDE!r} or {_DELETED!r}"
        )
    return tag


def tags(directory: Place) -> list[str]:
    """The tags of the complete checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    times: dict[str, float] = {}
    for path in directory.iterdir():
        hidden = _TEMPORARY in path.name or _DELETED in path.name
        if not hidden and _is_complete(path):
            tag = path.name.split(_ASIDE)[0]
            times[tag] = max(times.get(tag, 0.0), modified_s(path / INDEX_NAME))
    return sorted(times, key=lambda tag: (times[tag], tag))


def latest(directory: Place) -> str:
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


def find(directory: Place, tag: str) -> Place:
    """The directory of a complete checkpoint.

    Raises:
        CheckpointError: if there is none with this tag; lists the tags that exist.
    """
    _check_directory(directory)
    path = directory / checked_tag(tag)
    if _is_complete(path):
        return path
    for aside in sorted(_siblings(directory, tag, _ASIDE), key=str):
        if _is_complete(aside):
            logger.warning("%s was being replaced when its job died; using %s", path, aside)
            return aside
    state = "does not exist"
    if path.exists() or is_being_written(directory, tag):
        state = "is not complete: it is still being written, or its save was interrupted,"
    raise CheckpointError(f"checkpoint {tag!r} {state} in {directory}; {_known(directory)}")


def begin(directory: Place, tag: str) -> Draft:
    """Where a new checkpoint is to be written, a folder that exists; removes what a dead save left.

    Raises:
        CheckpointError: if something that is no checkpoint has the name of the tag.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / tag
    unique = uuid.uuid4().hex[:8]
    if not isinstance(directory, Path):
        target.mkdir(parents=True, exist_ok=True)
        return Draft(target, f"-{unique}")
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
    temporary = directory / f"{tag}{_TEMPORARY}{unique}"
    temporary.mkdir()
    return Draft(temporary)


def commit(draft: Draft, directory: Place, tag: str) -> Place:
    """Give a complete checkpoint its tag, durably; remove what it replaces."""
    target = directory / tag
    if draft.suffix:
        files: list[Place] = list(target.iterdir())
        for path in files:  # its index is there already, and names none of these
            is_data = path.name.endswith(".safetensors")
            if is_data and not path.name.endswith(f"{draft.suffix}.safetensors"):
                path.unlink(missing_ok=True)
        return target
    assert isinstance(draft.path, Path)
    assert isinstance(target, Path)
    assert isinstance(directory, Path)
    if target.exists():
        rename(target, directory / f"{tag}{_ASIDE}{uuid.uuid4().hex[:8]}")
    rename(draft.path, target)
    for replaced in _siblings(directory, tag, _ASIDE):
        discard(replaced)
    return target


def is_being_written(directory: Place, tag: str) -> bool:
    """Whether a save under this tag has begun and not ended; it may have died."""
    return bool(_siblings(directory, tag, _TEMPORARY))


def condemned_name(tag: str) -> str:
    """A name for a checkpoint that is being deleted, under which nobody finds it."""
    return f"{tag}{_DELETED}{uuid.uuid4().hex[:8]}"


def condemned(directory: Place) -> list[Place]:
    """What deletions that did not end have left."""
    return [path for path in directory.iterdir() if _DELETED in path.name]


def point_latest(directory: Place, tag: str) -> None:
    """Make `latest` name the tag, atomically."""
    with replace_atomically(directory / LATEST_NAME) as file:
        # Without a newline: there are programs that take the whole text for the tag.
        write_all(file, tag.encode())


def discard(path: Place) -> None:
    """Remove a directory that nobody needs; one that cannot be removed is only logged."""
    try:
        # Without its index it is no checkpoint, however far the deletion gets.
        (path / INDEX_NAME).unlink(missing_ok=True)
        remove_tree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)


def _check_directory(directory: Place) -> None:
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


def _known(directory: Place) -> str:
    known = tags(directory)
    if not known:
        return "it holds no complete checkpoint"
    shown = ", ".join(known[-8:])
    return f"its checkpoints are {shown}" + (f" and {len(known) - 8} older" * (len(known) > 8))


def _is_complete(path: Place) -> bool:
    return (path / INDEX_NAME).is_file()


def _is_remainder(path: Place) -> bool:
    """Whether a folder holds nothing, or what is left of a checkpoint that has lost its index."""
    return path.is_dir() and all(_DATA_FILE.fullmatch(entry.name) for entry in path.iterdir())


def _siblings(directory: Place, tag: str, mark: str) -> list[Place]:
    return [path for path in directory.iterdir() if path.name.startswith(tag + mark)]
