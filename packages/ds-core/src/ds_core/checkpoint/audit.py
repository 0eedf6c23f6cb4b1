"""`verify`: read all of a checkpoint and compare it with its index."""

from __future__ import annotations

import os
from typing import NamedTuple

from ds_core.checkpoint.damage import damage, damaged, uncovered
from ds_core.checkpoint.index import Index
from ds_core.checkpoint.remote import Place
from ds_core.checkpoint.retention import being_read
from ds_core.checkpoint.store import find


class Verified(NamedTuple):
    """What `verify` found to be in order."""

    path: Place
    num_files: int
    num_tensors: int
    num_bytes: int


def verify(directory: str | os.PathLike[str], tag: str | None = None) -> Verified:
    """Check every byte of a checkpoint: sizes, headers, coverage and checksums.

    Collective: no; one process reads all files.

    Args:
        directory: holds the checkpoints.
        tag: which one. Default: the one that `latest` names.

    Raises:
        CheckpointError: if anything is wrong; lists every file, tensor and box that is.
    """
    path = find(directory, tag)
    with being_read(path):
        index = Index.read(path)
        found, num_bytes = damage(path, index, index.files)
    if problems := uncovered(index) + found:
        raise damaged(path, problems)
    return Verified(path, len(index.files), len(index.tensors), num_bytes)
