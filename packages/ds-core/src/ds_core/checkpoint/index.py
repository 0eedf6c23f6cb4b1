"""`index.json`: what a checkpoint holds and where; written last, so it marks completeness.

    {"crc32": 1234567890,                    of the value of "index", as canonical JSON
     "index": {
       "format": "ds-checkpoint", "version": 1, "block_bytes": 262144,
       "files": {"rank_00000.safetensors": {"bytes": 4096}},
       "tensors": {"model.blocks.0.attn.qkv.weight": {
         "path": ["model", "blocks.0.attn.qkv.weight"],     keys that lead to it in the nested state
         "dtype": "F32", "shape": [96, 32],
         "boxes": [{"offsets": [0, 0], "lengths": [48, 32], "file": "rank_00000.safetensors",
                    "entry": "model.blocks.0.attn.qkv.weight|0,0", "start": 512, "crc32": [...]}]}},
       "state": {"trainer.step": {"path": ["trainer", "step"], "value": 7}},
       "writer": {"world_size": 2, "saved_at": "2026-01-31T12:00:00+00:00", ...}}}

`start` is the byte in the file, `crc32` one checksum per block of `block_bytes` of the box, and
`value` is encoded as `ds_core.checkpoint.jsonable` says.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch

from ds_core.checkpoint.boxes import Box
from ds_core.checkpoint.data_file import BLOCK_BYTES, dtype_code, dtype_of
from ds_core.checkpoint.files import reason
from ds_core.checkpoint.remote import Place
from ds_core.errors import CheckpointError

INDEX_NAME = "index.json"
_FORMAT = "ds-checkpoint"
_VERSION = 1

#: Keys that lead from the top of a nested state to a value: strings, or list positions.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor, and the bytes of a file that hold it."""

    box: Box
    file: str
    entry: str
    start: int
    crc32: tuple[int, ...]


@dataclass
class TensorRecord:
    """A tensor of the checkpoint; its boxes are disjoint and cover it."""

    path: KeyPath
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: list[StoredBox] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * self.dtype.itemsize


@dataclass(frozen=True)
class StateRecord:
    """A value that is not a tensor, encoded as `jsonable` says."""

    path: KeyPath
    value: Any


@dataclass
class Index:
    """All that a checkpoint holds, by fully qualified name, and the size of each data file.

    Attributes:
        writer: who wrote it: number of ranks, versions, time. For people; reading ignores it.
    """

    files: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    state: dict[str, StateRecord] = field(default_factory=dict)
    writer: dict[str, Any] = field(default_factory=dict)

    def check_coverage(self) -> None:
        """Raise CheckpointError if the boxes of a tensor do not add up to all its elements."""
        for name, record in self.tensors.items():
            numel = Box.whole(record.shape).numel
            covered = sum(stored.box.numel for stored in record.boxes)
            if covered != numel:
                raise CheckpointError(
                    f"{name}: the boxes that ranks hold add up to {covered} of its {numel} "
                    f"elements (shape {list(record.shape)}); every element must be held by a rank"
                )

    def to_bytes(self) -> bytes:
        """The text of `index.json`."""
        body = {
            "format": _FORMAT,
            "version": _VERSION,
            "block_bytes": BLOCK_BYTES,
            "files": {name: {"bytes": size} for name, size in self.files.items()},
            "tensors": {name: _tensor_json(name, rec) for name, rec in self.tensors.items()},
            "state": {n: {"path": list(r.path), "value": r.value} for n, r in self.state.items()},
            "writer": self.writer,
        }
        return json.dumps({"crc32": _checksum(body), "index": body}, allow_nan=False).encode()

    @classmethod
    def read(cls, directory: Place) -> Index:
        """The index of a checkpoint.

        Raises:
            CheckpointError: if it is missing, damaged, or of another format or version.
        """
        path = directory / INDEX_NAME
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{directory} holds no complete checkpoint: cannot read {INDEX_NAME} "
                f"({reason(error)}). It is written last, so a save that did not "
                "finish, or is still going on, has none"
            ) from error
        try:
            document = json.loads(text)
            body = document["index"]
            if document["crc32"] != _checksum(body):
                raise ValueError("its checksum does not match")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Load another checkpoint") from error
        if body.get("format") != _FORMAT or body.get("version") != _VERSION:
            raise CheckpointError(
                f"{path}: got format {body.get('format')!r} version {body.get('version')!r}, "
                f"this release reads {_FORMAT!r} version {_VERSION}; upgrade ds-core"
            )
        try:
            return cls._from_body(body)
        except (ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            raise CheckpointError(f"{path} is malformed: {error!r}") from error

    @classmethod
    def _from_body(cls, body: Mapping[str, Any]) -> Index:
        if body["block_bytes"] != BLOCK_BYTES:
            raise ValueError(f"block_bytes: got {body['block_bytes']}, expected {BLOCK_BYTES}")
        files = {_plain_name(name): int(info["bytes"]) for name, info in body["files"].items()}
        tensors = {name: _tensor_record(raw, files) for name, raw in body["tensors"].items()}
        state = {n: StateRecord(tuple(r["path"]), r["value"]) for n, r in body["state"].items()}
        return cls(files, tensors, state, dict(body.get("writer", {})))


def entry_name(name: str, box: Box) -> str:
    """The name of a box in its file, such as `model.weight|128,0` (`model.scale|` for a scalar)."""
    return f"{name}|{','.join(map(str, box.offsets))}"


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _tensor_json(name: str, record: TensorRecord) -> dict[str, Any]:
    return {
        "path": list(record.path),
        "dtype": dtype_code(record.dtype, name),
        "shape": list(record.shape),
        "boxes": [
            {
                "offsets": list(stored.box.offsets),
                "lengths": list(stored.box.lengths),
                "file": stored.file,
                "entry": stored.entry,
                "start": stored.start,
                "crc32": list(stored.crc32),
            }
            for stored in record.boxes
        ],
    }


def _tensor_record(raw: Mapping[str, Any], files: Mapping[str, int]) -> TensorRecord:
    shape = tuple(raw["shape"])
    record = TensorRecord(tuple(raw["path"]), dtype_of(raw["dtype"]), shape)
    for item in raw["boxes"]:
        box = Box(tuple(item["offsets"]), tuple(item["lengths"]))
        if not box.fits(shape):
            raise ValueError(f"{box} does not fit into shape {list(shape)}")
        if item["file"] not in files:
            raise ValueError(f"file {item['file']!r} is not listed")
        crc32 = tuple(item["crc32"])
        if len(crc32) != -(-box.numel * record.dtype.itemsize // BLOCK_BYTES):
            raise ValueError(f"{item['entry']!r} has {len(crc32)} checksums")
        record.boxes.append(StoredBox(box, item["file"], item["entry"], item["start"], crc32))
    return record


def _plain_name(name: str) -> str:
    """`name`, if it cannot lead out of the checkpoint's directory."""
    if PurePath(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not a plain file name")
    return name
