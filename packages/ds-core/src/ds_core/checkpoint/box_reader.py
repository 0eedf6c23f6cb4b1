"""Reads boxes out of the data files of a checkpoint, and compares them with their checksums."""

from __future__ import annotations

import contextlib
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch

from ds_core.checkpoint.boxes import Box, cut_reads
from ds_core.checkpoint.data_file import BLOCK_BYTES, PIECE_BYTES
from ds_core.checkpoint.files import open_to_read, read_exactly, reason, size_of
from ds_core.checkpoint.index import Index, StoredBox, TensorRecord
from ds_core.checkpoint.remote import Place
from ds_core.errors import CheckpointError

_MAX_OPEN_FILES = 64


class BlockPart(NamedTuple):
    """A part of a checksummed block that was read without the rest of it.

    Attributes:
        file, start: the stored box: its file, and its first byte there.
        number: which of its blocks.
        low, high: the bytes of the block that were read, counted from its beginning.
        crc32: their checksum.
    """

    file: str
    start: int
    number: int
    low: int
    high: int
    crc32: int

    @property
    def block_key(self) -> tuple[str, int, int]:
        """Which block of the checkpoint it is a part of."""
        return self.file, self.start, self.number


class BoxReader:
    """Verified reads from the data files of one checkpoint; a context manager.

    A checkpoint of many ranks has more files than a process may open, so only the few that were
    used last stay open.

    Args:
        directory: where the files are.
        index: the checkpoint's index.
        exact: whether only what is asked for is read. Blocks of which that is a part are then not
            verified, but listed in `parts`. Else reads are widened to whole blocks of
            `BLOCK_BYTES`, the unit of a checksum.

    Attributes:
        bytes_read: bytes read from data files so far.
        parts: the parts of blocks that are to be verified, as `block_parts` does.
    """

    def __init__(self, directory: Place, index: Index, *, exact: bool = False) -> None:
        self.directory = directory
        self.index = index
        self.bytes_read = 0
        self.parts: list[BlockPart] = []
        self._exact = exact
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def __enter__(self) -> BoxReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are open."""
        while self._files:
            self._files.popitem()[1].close()

    def copy(
        self, record: TensorRecord, stored: StoredBox, wanted: Box, target: torch.Tensor
    ) -> None:
        """Copy a part of a stored box into a tensor, converting to its dtype and device.

        Args:
            record: the tensor that the box is of.
            stored: the box.
            wanted: a block of it, with offsets relative to it.
            target: of shape `wanted.lengths`; may be a view.

        Raises:
            CheckpointError: if the file is missing, has another size than was saved, or a
                checksum does not match.
        """
        itemsize = record.dtype.itemsize
        reads = cut_reads(
            stored.box.lengths,
            wanted,
            max_gap=BLOCK_BYTES // itemsize,
            max_numel=PIECE_BYTES // itemsize,
        )
        for read in reads:
            flat = self._elements(record, stored, read.start, Box.whole(read.shape).numel)
            source = _narrow(flat.view(read.shape), read.crop)
            slot = target[read.at]
            if read.shape:
                slot = slot.narrow(0, read.row, read.shape[0])
            slot.copy_(source)

    def check(self, record: TensorRecord, stored: StoredBox) -> None:
        """Read a whole box and verify it. Raises CheckpointError as `copy` does."""
        box_bytes = stored.box.numel * record.dtype.itemsize
        for low in range(0, box_bytes, PIECE_BYTES):
            self.read(record, stored, low, min(low + PIECE_BYTES, box_bytes))

    def read(self, record: TensorRecord, stored: StoredBox, low: int, high: int) -> bytearray:
        """Bytes `[low, high)` of a box, compared with its checksums. Raises as `copy` does."""
        with self._reading(stored) as file:
            data = read_exactly(file, stored.start + low, high - low)
        self.bytes_read += len(data)
        if len(data) != high - low:
            raise self.damage(stored, (low + len(data)) // BLOCK_BYTES)
        self._verify(stored, stored.box.numel * record.dtype.itemsize, low, memoryview(data))
        return data

    def damage(self, stored: StoredBox, number: int) -> CheckpointError:
        """The error for a block of a box whose bytes are not those that were saved."""
        offsets, lengths = list(stored.box.offsets), list(stored.box.lengths)
        return CheckpointError(
            f"{self.directory / stored.file} is damaged: the bytes of {stored.entry!r} do not "
            "match the checksum that was saved with them "
            f"(tensor {stored.entry.rpartition('|')[0]!r}, box of {lengths} at {offsets}, in the "
            f"{BLOCK_BYTES} bytes from byte {stored.start + number * BLOCK_BYTES} of the file). "
            "Load another checkpoint"
        )

    def open(self, name: str) -> BinaryIO:
        """The data file of that name, for reading; closed by this object.

        Raises:
            CheckpointError: if it cannot be opened or does not have the size that was saved.
        """
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        path, expected = self.directory / name, self.index.files[name]
        try:
            file, size = open_to_read(path), size_of(path)
        except OSError as error:
            raise CheckpointError(
                f"cannot open {path}: {reason(error)}. The checkpoint is incomplete"
            ) from error
        self._files[name] = file
        if len(self._files) > _MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        if size != expected:
            raise CheckpointError(
                f"{path} is {'truncated' if size < expected else 'damaged'}: it has {size} bytes, "
                f"{expected} were saved. Load another checkpoint"
            )
        return file

    def _elements(
        self, record: TensorRecord, stored: StoredBox, start: int, count: int
    ) -> torch.Tensor:
        """`[count]` elements of a box, from flat index `start`, on the CPU."""
        itemsize = record.dtype.itemsize
        box_bytes = stored.box.numel * itemsize
        low, high = start * itemsize, (start + count) * itemsize
        if not self._exact:
            low -= low % BLOCK_BYTES
            high = min(-(-high // BLOCK_BYTES) * BLOCK_BYTES, box_bytes)
        raw = torch.frombuffer(self.read(record, stored, low, high), dtype=torch.uint8)
        return raw.view(record.dtype)[start - low // itemsize :][:count]

    def _verify(self, stored: StoredBox, box_bytes: int, low: int, data: memoryview) -> None:
        """Compare whole blocks with their checksums, note parts of blocks.

        Args:
            box_bytes: bytes of the whole box.
            low: where `data` begins in it.
        """
        high = low + len(data)
        for number in range(low // BLOCK_BYTES, -(-high // BLOCK_BYTES)):
            first, last = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, box_bytes)
            start, stop = max(first, low), min(last, high)
            found = zlib.crc32(data[start - low : stop - low])
            if (start, stop) != (first, last):
                part = (number, start - first, stop - first, found)
                self.parts.append(BlockPart(stored.file, stored.start, *part))
            elif found != stored.crc32[number]:
                raise self.damage(stored, number)

    @contextlib.contextmanager
    def _reading(self, stored: StoredBox) -> Iterator[BinaryIO]:
        file = self.open(stored.file)
        try:
            yield file
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self.directory / stored.file}: {reason(error)}"
            ) from error


def _narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor
