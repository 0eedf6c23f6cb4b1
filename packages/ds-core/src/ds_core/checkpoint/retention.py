"""Which checkpoints stay: the newest few, the one that `latest` names, and any that is in use."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ds_core.checkpoint import tags
from ds_core.checkpoint.files import rename
from ds_core.checkpoint.index import INDEX_NAME
from ds_core.checkpoint.remote import Place
from ds_core.errors import CheckpointError

logger = logging.getLogger(__name__)


def checked_keep_last(keep_last: int | None) -> int | None:
    """`keep_last`, if it is a number of checkpoints. Raises CheckpointError otherwise."""
    if keep_last is not None and (isinstance(keep_last, bool) or keep_last < 1):
        raise CheckpointError(
            f"keep_last: got {keep_last!r}, expected at least 1, or None to delete none"
        )
    return keep_last


def prune(directory: Place, keep_last: int) -> list[str]:
    """Delete all complete checkpoints of a directory but the newest; returns their tags.

    Left alone are also the one that `latest` names, one whose tag is being written anew, and one
    that somebody reads (`being_read`): its turn comes with the next save. A checkpoint is first
    renamed, so that it is there or not, never half; on a file system of fsspec its index goes
    first. What cannot be deleted is logged, for the save is done.
    Collective: no; one process calls.

    Args:
        directory: holds the checkpoints.
        keep_last: how many to keep, at least 1.
    """
    deleted: list[str] = []
    try:
        for leftover in tags.condemned(directory):
            tags.discard(leftover)
        in_order = tags.tags(directory)
        kept = {*in_order[-keep_last:], _pointed_to(directory)}
        for tag in in_order:
            spared = tag in kept or tags.is_being_written(directory, tag)
            if not spared and _delete(directory, tag):
                deleted.append(tag)
    except (OSError, CheckpointError) as error:
        logger.warning("cannot delete old checkpoints in %s: %s", directory, error)
    return deleted


def _pointed_to(directory: Place) -> str | None:
    try:
        return tags.latest(directory)
    except CheckpointError:
        return None


def _delete(directory: Place, tag: str) -> bool:
    path = tags.find(directory, tag)
    if not isinstance(path, Path) or not isinstance(directory, Path):
        tags.discard(path)
        return True
    doomed = directory / tags.condemned_name(tag)
    with open(path / INDEX_NAME, "rb") as index:
        if not _lock(index.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        rename(path, doomed)
    tags.discard(doomed)
    return True


@contextlib.contextmanager
def being_read(path: Place) -> Iterator[None]:
    """While the block runs, no `prune` of any process deletes this checkpoint.

    A shared lock (`flock`) on its index, which ends with the process that holds it. On a file
    system that has no locks, and on those of fsspec, nothing is locked: there, a checkpoint that
    is deleted while it is read is an error of the reader.

    Raises:
        CheckpointError: if it was deleted after it was found.
    """
    if not isinstance(path, Path):
        yield
        return
    try:
        index = open(path / INDEX_NAME, "rb")  # noqa: SIM115  closed below
    except OSError:
        yield  # whoever reads the index says what is wrong with it
        return
    with index:
        _lock(index.fileno(), fcntl.LOCK_SH)
        try:
            same = os.path.samestat(os.stat(path / INDEX_NAME), os.fstat(index.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise CheckpointError(
                f"{path} was deleted or replaced when it was about to be read; load again"
            )
        yield


def _lock(descriptor: int, kind: int) -> bool:
    """Whether the lock was had. True also where the file system has none."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("the checkpoint's file system has no locks: %s", error)
    return True
