"""What is wrong with the files of a checkpoint, compared with its index."""

from __future__ import annotations

from collections.abc import Collection

from ds_core.checkpoint.box_reader import BoxReader
from ds_core.checkpoint.boxes import Box, overlapping
from ds_core.checkpoint.data_file import dtype_code, read_header
from ds_core.checkpoint.index import Index, StoredBox, TensorRecord
from ds_core.checkpoint.remote import Place
from ds_core.errors import CheckpointError


def uncovered(index: Index) -> list[str]:
    """The tensors whose boxes do not hold every element exactly once, and why; reads no file."""
    return [text for name in index.tensors if (text := _coverage(name, index.tensors[name]))]


def damage(path: Place, index: Index, names: Collection[str]) -> tuple[list[str], int]:
    """What is wrong with some data files, and the bytes that were read to find it.

    Every box is read and compared with its checksums, every header with the index.

    Args:
        path: the checkpoint.
        index: its index.
        names: of the files.
    """
    problems = []
    with BoxReader(path, index) as boxes:
        for name, stored in _by_file(index).items():
            if name in names:
                problems += _problems(boxes, name, stored)
        return problems, boxes.bytes_read


def damaged(path: Place, problems: Collection[str]) -> CheckpointError:
    """The error that lists them."""
    return CheckpointError(f"{path} is damaged:\n" + "\n".join(f"- {p}" for p in problems))


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
