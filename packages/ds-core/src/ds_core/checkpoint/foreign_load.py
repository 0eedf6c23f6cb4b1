"""A checkpoint of another format, loaded as if it were one of ours."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from ds_core.checkpoint.foreign import deepspeed
from ds_core.checkpoint.importing import ImportReport, import_checkpoint
from ds_core.checkpoint.index import INDEX_NAME
from ds_core.checkpoint.ranks import Ranks
from ds_core.errors import CheckpointError

logger = logging.getLogger(__name__)

#: Files that name the newest checkpoint of a folder; the second is of DeepSpeed's universal format.
_POINTERS = ("latest", "latest_universal")


def deepspeed_folder(directory: str | os.PathLike[str], tag: str | None = None) -> Path | None:
    """The folder of a checkpoint that DeepSpeed wrote, or None if what is there is none of its own.

    Args:
        directory: holds the checkpoints, or is one.
        tag: which one; default: the latest.
    """
    if "://" in os.fspath(directory):
        return None
    base = Path(directory)
    candidates = [base / tag] if tag is not None else [base]
    for pointer in _POINTERS if tag is None else ():
        if (base / pointer).is_file():
            candidates.append(base / (base / pointer).read_text(encoding="utf-8").strip())
    for folder in candidates:
        ours = (folder / INDEX_NAME).is_file()
        if folder.is_dir() and not ours and deepspeed.looks_like(folder):
            return folder
    return None


@contextlib.contextmanager
def as_ours(
    directory: str | os.PathLike[str],
    tag: str | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    optimizer: bool = True,
) -> Iterator[str | None]:
    """The folder of a checkpoint of DeepSpeed in our format, for as long as the block; or None.

    None: what is there is not DeepSpeed's. Rank 0 writes the copy beside the original, or where
    that cannot be written to into the folder for temporary files, which then all ranks must share.
    What can only be read by running code is left out, and without `optimizer` the optimizer's
    states, which are most of the bytes. The copy is gone after the block, and after an error.
    Collective.

    A copy, because a load has each rank read its boxes of tensors by an index with checksums, and
    DeepSpeed's files have neither.

    Raises CheckpointError on every rank if it cannot be read, or there is no room for the copy.
    """
    ranks = Ranks(group)
    what = f"reading {os.fspath(directory)}"
    source = ranks.first(what, lambda: deepspeed_folder(directory, tag))
    if source is None:
        yield None
        return
    scratch = ranks.first(what, lambda: _scratch(source.parent))
    try:
        written = ranks.first(what, lambda: _imported(source, scratch, optimizer))
        yield str(written)
        # Nobody reads any more.
        ranks.each(what, lambda: None)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _scratch(beside: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".import-", dir=beside))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="import-"))


def _imported(source: Path, scratch: Path, optimizer: bool) -> Path:
    # What is missing or strange is judged by the load that follows, which knows the model.
    report = import_checkpoint(
        source,
        scratch,
        tag="imported",
        format="deepspeed",
        drop_objects=True,
        strict=False,
        optimizer=optimizer,
    )
    _tell(source, report)
    path = Path(str(report.path))
    if not path.is_dir():
        raise CheckpointError(f"{source}: its import is not at {path}")
    return path


def _tell(source: Path, report: ImportReport) -> None:
    for text in (*report.missing, *report.unexpected):
        logger.warning("%s: %s", source, text)
    for key, reason in report.ignored.items():
        logger.info("%s: %s is not loaded: %s", source, key, reason)
