"""`consolidate`: the model of a checkpoint as one ordinary safetensors file."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ds_core.checkpoint.box_reader import BoxReader
from ds_core.checkpoint.boxes import Box
from ds_core.checkpoint.data_file import Entry, write_data_file
from ds_core.checkpoint.files import replace_atomically
from ds_core.checkpoint.index import Index, TensorRecord
from ds_core.checkpoint.store import find
from ds_core.errors import CheckpointError


def consolidate(
    directory: str | os.PathLike[str],
    tag: str | None,
    out_file: str | os.PathLike[str],
    *,
    prefix: str = "model.",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the tensors under a prefix into one safetensors file and return its path.

    The file has full tensors under the model's own names, as Hugging Face's libraries read them.
    One tensor at a time is in memory; every byte is verified; the file appears when complete.
    Collective: no; needs neither the model nor a device.

    Args:
        directory: holds the checkpoints.
        tag: which one; None for the one that `latest` names.
        out_file: the file; its directory is created, an old file is replaced.
        prefix: which tensors, and what to cut off their names. `""` for all, under full names.
        dtype: what to convert floating-point tensors to. Default: as saved.

    Raises:
        CheckpointError: if no tensor has the prefix (lists the prefixes there are), or the
            checkpoint is missing or damaged.
    """
    path, out_file = find(directory, tag), Path(out_file)
    index = Index.read(path)
    index.check_coverage()
    records = [(n, rec) for n, rec in index.tensors.items() if n.startswith(prefix)]
    if not records:
        tops = sorted({name.split(".")[0] + "." for name in index.tensors})
        raise CheckpointError(
            f"{path}: no tensor's name starts with {prefix!r}; prefixes are {', '.join(tops)}"
        )
    entries = [
        Entry(name.removeprefix(prefix), _exported_dtype(record, dtype), record.shape)
        for name, record in records
    ]
    order = sorted(range(len(entries)), key=lambda i: -entries[i].dtype.itemsize)  # aligns them
    out_file.parent.mkdir(parents=True, exist_ok=True)
    with BoxReader(path, index) as boxes, replace_atomically(out_file) as file:
        write_data_file(
            file,
            [entries[i] for i in order],
            lambda i: _assemble(boxes, records[order[i]][1]).to(entries[order[i]].dtype),
        )
    return out_file


def _exported_dtype(record: TensorRecord, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not record.dtype.is_floating_point:
        return record.dtype
    return dtype


def _assemble(boxes: BoxReader, record: TensorRecord) -> torch.Tensor:
    """The whole tensor, from its boxes, on the CPU."""
    whole = torch.empty(record.shape, dtype=record.dtype)
    for stored in record.boxes:
        target = whole
        for dim, length in enumerate(stored.box.lengths):
            target = target.narrow(dim, stored.box.offsets[dim], length)
        boxes.copy(record, stored, Box.whole(stored.box.lengths), target)
    return whole
