"""Storage for `torch.distributed.checkpoint` in safetensors files and a JSON index, no pickle.

    dcp.save(state, storage_writer=SafetensorsWriter("step10"))
    dcp.load(state, storage_reader=SafetensorsReader("step10"))

Each rank writes one `rank_00000.safetensors`, with one entry per box that it holds; then the
coordinator writes `index.json`. Values that are not tensors go into the index as JSON.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ds_core._version import __version__
from ds_core.checkpoint import jsonable
from ds_core.checkpoint.box_reader import BlockPart, BoxReader
from ds_core.checkpoint.boxes import Box
from ds_core.checkpoint.data_file import Entry, dtype_code, write_data_file
from ds_core.checkpoint.files import create_synced, replace_atomically, size_of, write_all
from ds_core.checkpoint.index import (
    INDEX_NAME,
    Index,
    KeyPath,
    StateRecord,
    StoredBox,
    TensorRecord,
    entry_name,
)
from ds_core.checkpoint.remote import Place, as_place
from ds_core.checkpoint.sharded import OneAtATime, is_lazy
from ds_core.errors import CheckpointError


def data_file_name(number: int, suffix: str = "") -> str:
    """The name of the file that a rank writes."""
    return f"rank_{number:05d}{suffix}.safetensors"


class SafetensorsWriter(StorageWriter):
    """Writes a checkpoint into a directory; hand it to `torch.distributed.checkpoint.save`.

    The checkpoint is complete when `save` returns, and not loadable before: the index is written
    last. `ds_core.checkpoint.save` adds what a training job wants: atomic replacement, tags, and
    the `latest` pointer.

    Args:
        path: the checkpoint's directory, on a file system that all ranks share; it is created.
        overwrite: False: a checkpoint that is there already is an error. True: it is deleted
            before the first byte is written, so a crash leaves neither.

    Any planner that derives from `DefaultSavePlanner` works. Values that are not tensors must be
    what `ds_core.checkpoint.jsonable` accepts; anything else is a CheckpointError.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        super().__init__()
        self.path = as_place(path)
        self.overwrite = overwrite

    @property
    def checkpoint_id(self) -> Place:
        """The directory, under the name that DCP logs it by."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start over, in another directory if one is given."""
        if checkpoint_id is not None:
            self.path = as_place(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Create the directory (on the coordinator)."""
        if not kwargs.get("use_collectives", True):
            raise CheckpointError(
                "SafetensorsWriter: use_collectives=False is not possible: "
                "the index of a checkpoint lists the boxes of all ranks"
            )
        if not is_coordinator:
            return
        if (self.path / INDEX_NAME).exists() and not self.overwrite:
            raise CheckpointError(
                f"{self.path} already holds a checkpoint; write to another directory, pass "
                "overwrite=True, or use ds_core.checkpoint.save, which replaces it atomically"
            )
        with _as_checkpoint_errors(f"cannot create {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The same plan, once it is certain that every dtype can be stored."""
        return check_dtypes(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give every rank its file name; remove what is to be overwritten."""
        with _as_checkpoint_errors(f"cannot overwrite {self.path}"):
            (self.path / INDEX_NAME).unlink(missing_ok=True)
            files: list[Place] = list(self.path.iterdir())
            for old in files:
                if old.name.startswith("rank_") and old.name.endswith(".safetensors"):
                    old.unlink()
        return [replace(plan, storage_data=data_file_name(n)) for n, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, sync it, and report where each box went."""
        tensors = [item for item in plan.items if _has_bytes(item)]
        held = held_state(planner)
        # Largest items first keeps every entry aligned, which safetensors' own readers like. What
        # is lazy goes first among equals, so that its owner need not hold it still for long.
        tensors.sort(key=lambda i: (-_entry(i).dtype.itemsize, not is_lazy(held.get(i.index.fqn))))
        values = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        with _as_checkpoint_errors(f"cannot write {self.path / str(plan.storage_data)}"):
            results = self._write_tensors(plan.storage_data, tensors, planner)
            results += [_encode_value(item, planner) for item in values]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_tensors(
        self, file_name: str, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        if not items:
            return []
        entries = [_entry(item) for item in items]
        # An object store has no folders, so there is nothing to see before the first file.
        if isinstance(self.path, Path) and not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} was created by the coordinator but is not visible from this rank; "
                "a checkpoint directory must be on a file system that all ranks share"
            )
        with create_synced(self.path / file_name) as file, OneAtATime(held_state(planner)) as turn:

            def resolve(i: int) -> torch.Tensor:
                turn.to(items[i].index.fqn)
                return resolved(items[i], planner)

            stored = write_data_file(file, entries, resolve)
        boxes = [
            StoredBox(_box(item), file_name, entry.name, at.start, at.crc32)
            for item, entry, at in zip(items, entries, stored, strict=True)
        ]
        return [
            WriteResult(item.index, at.nbytes, box)
            for item, at, box in zip(items, stored, boxes, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index (on the coordinator), after all ranks have written their files."""
        index = _build_index(metadata, [result for of_rank in results for result in of_rank])
        index.check_coverage()
        index.writer = writer_facts(len(results))
        with _as_checkpoint_errors(f"cannot write {self.path / INDEX_NAME}"):
            for name, size in index.files.items():
                self._check_size(name, size)
            with replace_atomically(self.path / INDEX_NAME) as file:
                write_all(file, index.to_bytes())

    def _check_size(self, name: str, expected: int) -> None:
        size = size_of(self.path / name)
        if size != expected:
            raise CheckpointError(
                f"{self.path / name} has {size} bytes after {expected} were written to it: "
                "the disk is full or the file system is faulty"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the id is a local path, or a URL that fsspec can open."""
        try:
            as_place(checkpoint_id)
        except CheckpointError:
            return False
        return True

    def storage_meta(self) -> StorageMeta | None:
        """What planners may know of the storage: the directory."""
        return StorageMeta(checkpoint_id=str(self.path))


class SafetensorsReader(StorageReader):
    """Reads a checkpoint that `SafetensorsWriter` wrote, for `torch.distributed.checkpoint.load`.

    A rank reads only the boxes that intersect what it holds, and of these only the blocks that it
    needs; every block is verified. Each value is converted to the dtype and device of the tensor
    that it is loaded into. Nothing that comes from disk is unpickled.

    Args:
        path: the checkpoint's directory.
        exact: whether a rank reads only the bytes that it holds. It cannot verify the blocks of
            which it reads a part; the caller does, as `ds_core.checkpoint.load`, from `parts`.

    Attributes:
        bytes_read: bytes read from data files so far.
        parts: parts of blocks that were read and are to be verified, if `exact`.
    """

    def __init__(self, path: str | os.PathLike[str], *, exact: bool = False) -> None:
        super().__init__()
        self.path = as_place(path)
        self.exact = exact
        self.bytes_read = 0
        self.parts: list[BlockPart] = []
        self._index: Index | None = None

    @property
    def checkpoint_id(self) -> Place:
        """The directory, under the name that DCP logs it by."""
        return self.path

    @property
    def index(self) -> Index:
        """What the checkpoint holds; read on first use. Raises CheckpointError if damaged."""
        if self._index is None:
            self._index = Index.read(self.path)
        return self._index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start over, with another checkpoint if one is given."""
        if checkpoint_id is not None:
            self.path = as_place(checkpoint_id)
        self._index = None
        self.bytes_read = 0
        self.parts = []

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in DCP's terms; `planner_data` maps each name to its path in nested dicts."""
        tensors = {name: _tensor_metadata(rec) for name, rec in self.index.tensors.items()}
        values = {name: BytesStorageMetadata() for name in self.index.state}
        paths = {name: record.path for name, record in self.index.tensors.items()}
        paths |= {name: record.path for name, record in self.index.state.items()}
        return Metadata(state_dict_metadata={**tensors, **values}, planner_data=paths)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to prepare: the index is read by `read_metadata`."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The same plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The same plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors and values that the plan asks for."""
        tensors = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._value_bytes(item.storage_index.fqn))
            else:
                tensors.append((self._find(item.storage_index), item))
        # In storage order: files are opened once each and read forwards.
        held = held_state(planner)
        lazy = {name for name in held if is_lazy(held[name])}
        if lazy:  # what no box holds would be written back as it comes
            self.index.check_coverage()
        tensors.sort(key=lambda pair: _reading_order(pair[0], pair[1], lazy))
        with (
            BoxReader(self.path, self.index, exact=self.exact) as boxes,
            OneAtATime(held, fill=True) as turn,
        ):
            for stored, item in tensors:
                turn.to(item.storage_index.fqn)
                self._read_tensor(boxes, stored, item, planner)
            self.bytes_read += boxes.bytes_read
            self.parts += boxes.parts
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_tensor(
        self, boxes: BoxReader, stored: StoredBox, item: ReadItem, planner: LoadPlanner
    ) -> None:
        target = planner.resolve_tensor(item).detach()
        wanted = Box(tuple(item.storage_offsets), tuple(item.lengths))
        boxes.copy(self.index.tensors[item.storage_index.fqn], stored, wanted, target)
        planner.commit_tensor(item, target)

    def _find(self, where: MetadataIndex) -> StoredBox:
        boxes = self.index.tensors[where.fqn].boxes
        hint = where.index
        if hint is not None and hint < len(boxes) and boxes[hint].box.offsets == where.offset:
            return boxes[hint]
        for stored in boxes:
            if stored.box.offsets == where.offset:
                return stored
        raise CheckpointError(f"{self.path}: {where.fqn} has no box at {where.offset}")

    def _value_bytes(self, name: str) -> io.BytesIO:
        """A value in the form that DCP's planners expect: what `torch.save` makes of it.

        Planners call `torch.load` on it. That is safe: the bytes are made here, in memory, from
        numbers, strings, lists and dictionaries that came out of a JSON text.
        """
        buffer = io.BytesIO()
        torch.save(jsonable.decode(self.index.state[name].value), buffer)
        buffer.seek(0)
        return buffer

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the id is a directory with an index."""
        return (as_place(checkpoint_id) / INDEX_NAME).is_file()


def check_dtypes(plan: SavePlan) -> SavePlan:
    """The plan. Raises CheckpointError if it has a tensor of a dtype that cannot be stored."""
    for item in plan.items:
        if item.tensor_data is not None:
            dtype_code(item.tensor_data.properties.dtype, item.index.fqn)
    return plan


def held_state(planner: SavePlanner | LoadPlanner) -> Mapping[str, Any]:
    """The state that a planner hands out, by name, as far as it tells."""
    held = getattr(planner, "state_dict", None)
    return held if isinstance(held, Mapping) else {}


def _reading_order(
    stored: StoredBox, item: ReadItem, lazy: Collection[str]
) -> tuple[str, str, int]:
    """In the order of storage, but all that belongs to a lazy tensor together."""
    name = item.storage_index.fqn
    return (name if name in lazy else "", stored.file, stored.start)


def writer_facts(world_size: int) -> dict[str, Any]:
    """What an index says about who wrote it."""
    return {
        "world_size": world_size,
        "ds_core": __version__,
        "torch": torch.__version__,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextlib.contextmanager
def _as_checkpoint_errors(what: str) -> Iterator[None]:
    """Turn any error into a CheckpointError: DCP pickles it for the other ranks, who wait for it.

    An error that cannot be pickled would leave them waiting.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


def _box(item: WriteItem) -> Box:
    if item.tensor_data is None:
        raise CheckpointError(f"{item.index.fqn}: the plan does not say which part to write")
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _entry(item: WriteItem) -> Entry:
    box = _box(item)
    if item.tensor_data is None:
        raise CheckpointError(f"{item.index.fqn}: the plan does not say what to write")
    dtype = item.tensor_data.properties.dtype
    return Entry(entry_name(item.index.fqn, box), dtype, box.lengths)


def _has_bytes(item: WriteItem) -> bool:
    """Whether an item is to be written: not a value, and not the empty shard of a tensor that
    has elements elsewhere (a DTensor with fewer rows than ranks)."""
    if item.tensor_data is None:
        return False
    return _box(item).numel > 0 or item.tensor_data.size.numel() == 0


def resolved(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    """The tensor that an item is about, with the shape of its box."""
    data = planner.resolve_data(item)
    if not isinstance(data, torch.Tensor):
        raise CheckpointError(
            f"{item.index.fqn}: {type(planner).__name__} resolved it to {type(data).__name__}, "
            "expected a tensor"
        )
    return data


def _encode_value(item: WriteItem, planner: SavePlanner) -> WriteResult:
    """The JSON form of a value. `planner.resolve_data` would pickle it, so it is looked up."""
    name = item.index.fqn
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise CheckpointError(
            f"cannot save {name}: {type(planner).__name__} hands values over as pickled bytes; "
            "use a planner that derives from DefaultSavePlanner"
        )
    value = jsonable.encode(lookup(item.index), name)
    return WriteResult(item.index, 0, StateRecord((name,), value))


def _build_index(metadata: Metadata, results: list[WriteResult]) -> Index:
    data = metadata.planner_data
    paths: Mapping[str, KeyPath] = data if isinstance(data, Mapping) else {}
    index = Index()
    for name, meta in metadata.state_dict_metadata.items():
        if isinstance(meta, TensorStorageMetadata):
            path = tuple(paths.get(name, (name,)))
            index.tensors[name] = TensorRecord(path, meta.properties.dtype, tuple(meta.size))
    for result in results:
        name, stored = result.index.fqn, result.storage_data
        if isinstance(stored, StateRecord):
            path = tuple(paths.get(name, stored.path))
            index.state[name] = StateRecord(path, stored.value)
            continue
        index.tensors[name].boxes.append(stored)
        # Entries fill a file without gaps, so the end of the last one is its size.
        end = stored.start + result.size_in_bytes
        index.files[stored.file] = max(end, index.files.get(stored.file, 0))
    for record in index.tensors.values():
        record.boxes.sort(key=lambda stored: stored.box.offsets)
    return index


def _tensor_metadata(record: TensorRecord) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=record.dtype),
        size=torch.Size(record.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(stored.box.offsets), torch.Size(stored.box.lengths))
            for stored in record.boxes
        ],
    )
