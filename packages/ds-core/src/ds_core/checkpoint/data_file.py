"""The safetensors file format, written as a stream that is synced and checksummed as it goes.

A file is an 8-byte little-endian length, a JSON header `{name: {dtype, shape, data_offsets}}`, and
the raw row-major bytes. The safetensors package reads what is written here; it is not used for
writing, because it wants all tensors at once and computes no checksums.

Checksums are CRC-32 of consecutive blocks of `BLOCK_BYTES`, counted from the start of each entry,
so that a reader who needs only a part can verify every byte that it uses.
Source: https://huggingface.co/docs/safetensors, section "Format".
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import torch

from ds_core.checkpoint.boxes import Box
from ds_core.checkpoint.files import read_exactly, write_all
from ds_core.errors import CheckpointError

#: Bytes under one checksum. Small enough that reading a block for a part of it costs little.
BLOCK_BYTES = 256 * 1024
#: Bytes that are copied from a device, or read, at a time: a multiple of BLOCK_BYTES.
PIECE_BYTES = 64 * BLOCK_BYTES
#: The format's own limit; a longer header is a damaged file.
_MAX_HEADER_BYTES = 100_000_000

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in _DTYPES.items()}


def dtype_code(dtype: torch.dtype, name: str) -> str:
    """The format's name of a dtype, such as `"BF16"`.

    Raises:
        CheckpointError: if the format has none; names the tensor.
    """
    if dtype not in _CODES:
        raise CheckpointError(
            f"cannot save {name}: safetensors has no {dtype}; "
            f"it stores {', '.join(str(known).removeprefix('torch.') for known in _CODES)}"
        )
    return _CODES[dtype]


def dtype_of(code: str) -> torch.dtype:
    """The dtype that a code of the format means. Raises CheckpointError for an unknown one."""
    if code not in _DTYPES:
        raise CheckpointError(f"unknown dtype {code!r}; known are {', '.join(_DTYPES)}")
    return _DTYPES[code]


class Entry(NamedTuple):
    """A tensor that a file is to hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * self.dtype.itemsize


class Stored(NamedTuple):
    """Where an entry's bytes are in its file, and the CRC-32 of each of their blocks."""

    start: int
    nbytes: int
    crc32: tuple[int, ...]


def write_data_file(
    file: BinaryIO,
    entries: Sequence[Entry],
    resolve: Callable[[int], torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> list[Stored]:
    """Write a whole safetensors file and return where each entry went.

    Args:
        file: open for writing, empty, unbuffered.
        entries: what to write, in file order.
        resolve: called once per index into `entries`, in order, when its bytes are needed. The
            tensor may be on any device and need not be contiguous. At most `PIECE_BYTES` of it
            are copied to the host at a time.
        metadata: texts for the header beside `{"format": "pt"}`.

    Raises:
        CheckpointError: if a resolved tensor has another dtype or shape than its entry.
    """
    header = _encode_header(entries, metadata or {})
    write_all(file, header)
    with ThreadPoolExecutor(1, "ds-core-checksums") as helper:  # starts no thread unless used
        return _write_entries(file, len(header), entries, resolve, helper)


def _write_entries(
    file: BinaryIO,
    start: int,
    entries: Sequence[Entry],
    resolve: Callable[[int], torch.Tensor],
    helper: Executor,
) -> list[Stored]:
    stored = []
    for i, entry in enumerate(entries):
        tensor = resolve(i)
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"cannot save {entry.name}: planned as {entry.dtype} {list(entry.shape)}, "
                f"but the tensor to write is {tensor.dtype} {list(tensor.shape)}"
            )
        crc32: list[int] = []
        for piece in _byte_pieces(tensor):
            crc32 += _write_piece(file, piece, helper)
        stored.append(Stored(start, entry.nbytes, tuple(crc32)))
        start += entry.nbytes
    return stored


def _write_piece(file: BinaryIO, piece: memoryview, helper: Executor) -> list[int]:
    """Write it, and return the checksums of its blocks, computed meanwhile."""
    if len(piece) < 4 * BLOCK_BYTES:  # to hand it to a thread would take longer
        write_all(file, piece)
        return block_checksums(piece)
    checksums = helper.submit(block_checksums, piece)
    write_all(file, piece)
    return checksums.result()


def _encode_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    # "pt" is what transformers looks for before it loads a file.
    header: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": dtype_code(entry.dtype, entry.name),
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return struct.pack("<Q", len(text)) + text


def _byte_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's row-major bytes, `PIECE_BYTES` at a time (the last may be shorter)."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    step = PIECE_BYTES // tensor.dtype.itemsize
    for i in range(0, flat.numel(), step):
        piece = flat[i : i + step].cpu().contiguous()
        yield memoryview(piece.view(torch.uint8).numpy())  # type: ignore[arg-type]


def block_checksums(data: bytes | bytearray | memoryview) -> list[int]:
    """CRC-32 of each `BLOCK_BYTES` of `data`; the last block may be shorter."""
    view = memoryview(data)
    return [zlib.crc32(view[i : i + BLOCK_BYTES]) for i in range(0, len(view), BLOCK_BYTES)]


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset at which its data starts.

    Raises:
        CheckpointError: if the file is too short for it or it is not JSON.
    """
    prefix = read_exactly(file, 0, 8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError("not a safetensors file: it does not start with a header's length")
    text = read_exactly(file, 8, length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"its safetensors header is damaged: {error}") from error
    if len(text) < length or not isinstance(header, dict):
        raise CheckpointError("its safetensors header is cut off")
    return header, 8 + length
