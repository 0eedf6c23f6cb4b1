"""Checksummed blocks that several ranks read parts of, and verify together.

A checksum covers a block of a stored box. A rank that holds only a part of a block reads only that
part, computes the checksum of it, and leaves the verdict to all ranks together: the checksum of a
block follows from those of its parts, whoever read them. So no rank reads a byte that it does not
hold, and yet every byte that is used is verified.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ds_core.checkpoint.box_reader import BlockPart, BoxReader
from ds_core.checkpoint.data_file import BLOCK_BYTES
from ds_core.checkpoint.index import Index, StoredBox, TensorRecord
from ds_core.checkpoint.ranks import Ranks
from ds_core.checkpoint.remote import Place


class _Block(NamedTuple):
    """A block that nobody read whole: its box, and its parts, without repetitions."""

    record: TensorRecord
    stored: StoredBox
    number: int
    parts: list[BlockPart]


def verify_together(
    ranks: Ranks, what: str, directory: Place, index: Index, own: Sequence[BlockPart]
) -> int:
    """Verify the blocks of which ranks read parts; returns the bytes that this took to read.

    That is none if the ranks together read whole blocks, as they do when they load whole tensors.
    Of other blocks, the lowest rank that needs some reads all.
    Collective. `what` says what is being done, for the error.

    Args:
        ranks: who loads.
        directory: where the data files are.
        index: the checkpoint's index.
        own: the parts that this rank read.

    Raises:
        CheckpointError: on every rank, if a block is damaged.
    """
    by_rank = ranks.gather(what, lambda: list(own))
    first_reader: dict[tuple[str, int, int], int] = {}
    for rank, theirs in enumerate(by_rank):
        for part in theirs:
            first_reader.setdefault(part.block_key, rank)
    mine = {key for key, rank in first_reader.items() if rank == ranks.rank}
    parts = (part for theirs in by_rank for part in theirs if part.block_key in mine)
    return ranks.each(what, lambda: _verify(directory, index, _blocks(index, parts)))


def _blocks(index: Index, parts: Iterable[BlockPart]) -> list[_Block]:
    by_key: dict[tuple[str, int, int], set[BlockPart]] = {}
    for part in parts:
        by_key.setdefault(part.block_key, set()).add(part)
    boxes = {}
    if by_key:
        boxes = {
            (stored.file, stored.start): (record, stored)
            for record in index.tensors.values()
            for stored in record.boxes
            if stored.box.numel  # one without bytes begins where the next one does
        }
    return [
        _Block(*boxes[file, start], number, sorted(found, key=lambda part: part.low))
        for (file, start, number), found in by_key.items()
    ]


def _verify(directory: Place, index: Index, blocks: list[_Block]) -> int:
    with BoxReader(directory, index) as boxes:
        for record, stored, number, parts in blocks:
            total = stored.box.numel * record.dtype.itemsize
            low, high = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, total)
            found = joined_checksum(parts, high - low)
            if found is None:
                data = boxes.read(record, stored, low, high)
                if any(zlib.crc32(data[part.low : part.high]) != part.crc32 for part in parts):
                    raise boxes.damage(stored, number)
            elif found != stored.crc32[number]:
                raise boxes.damage(stored, number)
        return boxes.bytes_read


def joined_checksum(parts: Sequence[BlockPart], size: int) -> int | None:
    """The CRC-32 of a block of `size` bytes, from those of its parts, in their order.

    None if they leave a gap or overlap: it would then say nothing of some of them.
    """
    reached = checksum = 0
    for part in parts:
        if part.low != reached:
            return None
        reached, checksum = part.high, _append(checksum, part.crc32, part.high - part.low)
    return checksum if reached == size else None


def _append(first: int, second: int, count: int) -> int:
    """The CRC-32 of two texts one after the other, from theirs; the second has `count` bytes.

    A CRC is an affine function of the state that it starts from: crc(B, s) = M s + crc(B, 0), where
    M depends on the length of B only, so that zeros of that length give M s.
    """
    zeros = bytes(count)
    return zlib.crc32(zeros, first) ^ zlib.crc32(zeros) ^ second
