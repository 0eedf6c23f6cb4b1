"""Writing a checkpoint one tensor at a time, by one process that holds none of them."""

from __future__ import annotations

import os
from typing import Any

from ds_core.checkpoint import tags
from ds_core.checkpoint.boxes import Box
from ds_core.checkpoint.data_file import Entry, dtype_code, write_data_file
from ds_core.checkpoint.files import create_synced, replace_atomically, write_all
from ds_core.checkpoint.index import (
    INDEX_NAME,
    Index,
    StateRecord,
    StoredBox,
    TensorRecord,
    entry_name,
)
from ds_core.checkpoint.lazy import LazyState, LazyTensor, in_memory
from ds_core.checkpoint.remote import Place, as_place
from ds_core.checkpoint.state import flatten
from ds_core.checkpoint.storage import data_file_name, writer_facts

#: A new file is begun after this many bytes, so that several readers find several files.
MAX_FILE_BYTES = 5 * 10**9


def save_lazy(
    directory: str | os.PathLike[str],
    tag: str,
    state: LazyState,
    *,
    facts: dict[str, Any] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Place:
    """Write a checkpoint as `save` does, reading each tensor when its turn comes.

    Atomic as `save` is; `latest` names it afterwards. One tensor at a time is in memory.
    Collective: no.

    Args:
        directory: holds the checkpoints; created.
        tag: name of this one; an old one of that name is replaced.
        state: what to write.
        facts: what the index says about where it comes from, beside who wrote it.
        max_file_bytes: largest data file, unless a single tensor is larger.

    Raises:
        CheckpointError: if a tensor cannot be read or a value cannot be saved; nothing is left.
    """
    place = as_place(directory)
    values = flatten(state.values)
    tensors = dict(state.tensors)
    for name, tensor in values.tensors.items():
        tensors[name] = in_memory(values.paths[name], tensor)
    index = Index(writer={**writer_facts(1), **(facts or {})})
    for name, value in values.encoded_values().items():
        index.state[name] = StateRecord(values.paths[name], value)
    for name, lazy in tensors.items():
        dtype_code(lazy.dtype, name)
        index.tensors[name] = TensorRecord(lazy.path, lazy.dtype, lazy.shape)
    draft = tags.begin(place, tags.checked_tag(tag))
    try:
        for number, members in enumerate(_files(tensors, max_file_bytes)):
            _write_file(draft.path, data_file_name(number, draft.suffix), members, tensors, index)
        index.check_coverage()
        with replace_atomically(draft.path / INDEX_NAME) as file:
            write_all(file, index.to_bytes())
        target = tags.commit(draft, place, tag)
    except BaseException:
        draft.discard()
        raise
    tags.point_latest(place, tag)
    return target


def _files(tensors: dict[str, LazyTensor], max_bytes: int) -> list[list[str]]:
    files: list[list[str]] = []
    filled = max_bytes
    for name, tensor in tensors.items():
        if not files or filled + tensor.nbytes > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += tensor.nbytes
    return files


def _write_file(
    folder: Place, name: str, members: list[str], tensors: dict[str, LazyTensor], index: Index
) -> None:
    members = sorted(members, key=lambda member: -tensors[member].dtype.itemsize)  # aligned
    whole = {member: Box.whole(tensors[member].shape) for member in members}
    entries = [
        Entry(entry_name(member, whole[member]), tensors[member].dtype, tensors[member].shape)
        for member in members
    ]
    with create_synced(folder / name) as file:
        stored = write_data_file(file, entries, lambda i: tensors[members[i]].read())
    index.files[name] = stored[-1].start + stored[-1].nbytes
    for member, entry, at in zip(members, entries, stored, strict=True):
        box = StoredBox(whole[member], name, entry.name, at.start, at.crc32)
        index.tensors[member].boxes.append(box)
