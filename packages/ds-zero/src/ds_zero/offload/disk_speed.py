"""How fast the disk of a swap file is, found by a short write and read before training."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from ds_core.quantities import told_bytes
from ds_core.seams import TensorFile, TensorFiles, Transfer
from ds_zero.errors import ShardError
from ds_zero.room import Room, least

logger = logging.getLogger(__name__)

#: Bytes that are written and read; a smaller swap file is not worth the time.
PROBE_BYTES = 64 << 20
_CHUNK_BYTES = 8 << 20


def tell_speed(
    files: TensorFiles, opened: TensorFile, folder: str, nbytes: int, room: Room
) -> None:
    """Log how fast the disk of `folder` writes and reads, or why that was not measured.

    Args:
        files: gives memory that transfers take as it is.
        opened: a file there, whose first bytes nobody needs yet.
        folder: for the message.
        nbytes: of the swap file to be.
        room: what is free.

    Raises ShardError if the disk does not take, or give back, what is written.
    """
    free = least(dict(room.disks).get(folder), room.file)
    reason = None
    if nbytes < PROBE_BYTES:
        reason = f"the swap file has only {told_bytes(nbytes)}"
    elif free is not None and free < PROBE_BYTES:
        reason = f"only {told_bytes(free)} are free"
    if reason is not None:
        logger.info("disk of %r: speed not measured: %s", folder, reason)
        return
    try:
        written, read = _measured(files, opened)
    except OSError as error:
        raise ShardError(
            f"offload: folder {folder!r}: {error}; check the disk, or give another folder"
        ) from error
    how = "around" if opened.why_buffered is None else "through"
    logger.info(
        "disk of %r: writes %s/s, reads %s/s (%s, %s, %s the page cache)",
        folder,
        told_bytes(PROBE_BYTES / written),
        told_bytes(PROBE_BYTES / read),
        told_bytes(PROBE_BYTES),
        files.name,
        how,
    )


def _measured(files: TensorFiles, opened: TensorFile) -> tuple[float, float]:
    """Seconds to write and to read `PROBE_BYTES`, all of it in flight at once."""
    chunk = files.empty(_CHUNK_BYTES)
    chunk.copy_(torch.arange(_CHUNK_BYTES, dtype=torch.int32).to(torch.uint8))
    offsets = range(0, PROBE_BYTES, _CHUNK_BYTES)
    opened.preallocate(PROBE_BYTES)
    start = time.perf_counter()
    _wait([opened.write(chunk, offset) for offset in offsets])
    middle = time.perf_counter()
    targets = [files.empty(_CHUNK_BYTES) for _ in offsets]
    _wait([opened.read(target, at) for target, at in zip(targets, offsets, strict=True)])
    end = time.perf_counter()
    for target, at in zip(targets, offsets, strict=True):
        if not torch.equal(target, chunk):
            raise OSError(f"what was read at byte {at} is not what was written")
    return middle - start, end - middle


def _wait(transfers: Sequence[Transfer]) -> None:
    for transfer in transfers:
        transfer.wait()
