"""`verify`: read all of a checkpoint and compare it with its index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ds_core.checkpoint.box_reader import BoxReader
from ds_core.checkpoint.boxes import Box, overlapping
from ds_core.checkpoint.data_file import dtype_code, read_header
from ds_core.checkpoint.index import Index, StoredBox, TensorRecord
from ds_core.checkpoint.store import find
from ds_core.errors import CheckpointError


class Verified(NamedTuple):
    """What `verify` found to be in order."""

    path: Path
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
        CheckpointError: if anything is wrong; lists every file and box that is.
    """
    path = find(directory, tag)
    index = Index.read(path)
    problems = [text for name in index.tensors if (text := _coverage(name, index.tensors[name]))]
    with BoxReader(path, index) as boxes:
        by_file = _by_file(index)
        for name, stored in by_file.items():
            problems += _problems(boxes, name, stored)
        num_bytes = boxes.bytes_read
    if problems:
        raise CheckpointError(f"{path} is damaged:\n" + "\n".join(f"- {p}" for p in problems))
    return Verified(path, len(by_file), len(index.tensors), num_bytes)


def _coverage(name: str, record: TensorRecord) -> str:
    """Why the boxes do not hold every element of a tensor exactly once; empty if they do."""
    boxes = [stored.box for stored in record.boxes]
    if pair := overlapping(boxes):
        at = " and ".join(f"{list(box.offsets)}+{list(box.lengths)}" for box in pair)
        return f"{name}: its boxes at {at} overlap"
    numel, covered = Box.whole(record.shape).numel, sum(box.numel for box in boxes)
    return "" if covered == numel else f"{name}: {covered} of its {numel} elements are stored"


def _by_file(index: Index) -> dict[str, list[tuple[TensorRecord, StoredBox]]]:
    by_file: dict[str, list[tuple[TensorRecord, StoredBox]]] = {name: [] for name in index.files}
    for record in index.tensors.values():
        for stored in record.boxes:
            by_file[stored.file].append((record, stored))
    for pairs in by_file.values():
        pairs.sort(key=lambda pair: pair[1].start)
    return by_file


def _problems(
    boxes: BoxReader, name: str, pairs: list[tuple[TensorRecord, StoredBox]]
) -> list[str]:
    try:
        header, data_start = read_header(boxes.open(name))
    except CheckpointError as error:
        return [f"{name}: {error}"]
    problems = []
    for record, stored in pairs:
        start = stored.start - data_start
        expected = {
            "dtype": dtype_code(record.dtype, stored.entry),
            "shape": list(stored.box.lengths),
            "data_offsets": [start, start + stored.box.numel * record.dtype.itemsize],
        }
        if header.get(stored.entry) != expected:
            problems.append(
                f"{name}: entry {stored.entry!r} is {header.get(stored.entry)} in the file's "
                f"header, but {expected} in the index"
            )
        try:
            boxes.check(record, stored)
        except CheckpointError as error:
            problems.append(str(error))
    return problems
