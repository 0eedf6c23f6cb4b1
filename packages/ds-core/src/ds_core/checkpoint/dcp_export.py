"""A checkpoint in the format that torch's own distributed checkpoint writes and reads."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from ds_core.checkpoint.export import Exported
from ds_core.checkpoint.lazy import (
    MODEL,
    OPTIMIZER,
    LazyStateDict,
    LazyTensor,
    full_state_dict,
    open_checkpoint,
)
from ds_core.checkpoint.remote import Place
from ds_core.checkpoint.state import path_name
from ds_core.checkpoint.store import find
from ds_core.errors import CheckpointError


def export_dcp(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tag: str | None = None,
    dtype: torch.dtype | None = None,
    exclude_frozen: bool = False,
    optimizer: bool = False,
    model_key: str = MODEL,
    optimizer_key: str = "optim",
) -> Exported:
    """Write a checkpoint as a folder that `torch.distributed.checkpoint.load` reads.

    Its layout is what `get_state_dict` of `torch.distributed.checkpoint.state_dict` returns, so it
    loads into FSDP2, DDP and plain modules at any world size:
    `{model_key: {name: tensor}, optimizer_key: {"state": {name: {...}}, "param_groups": [...]}}`.
    A tied weight is there under each of its names. One tensor at a time is in memory.
    Collective: no.

    Args:
        directory: holds the checkpoints, or is one.
        out: the folder, which must be new or empty.
        tag: which checkpoint. Default: the one that `latest` names.
        dtype: what floating-point weights are converted to. Default: as saved.
        exclude_frozen: leave out the parameters that were not trained.
        optimizer: also write the optimizer's state.
        model_key: key that the weights lie under; `""` for the top level, as torchtitan has them.
        optimizer_key: key that the optimizer's state lies under.

    Raises:
        CheckpointError: if the folder is not empty, or the checkpoint is missing or damaged.

    torch pickles its own metadata and the optimizer's groups, and `torch.distributed.checkpoint`
    unpickles them: load such a folder only where you trust whoever could write to it.
    """
    path, out = find(directory, tag), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; name another one")
    weights = full_state_dict(path, dtype=dtype, exclude_frozen=exclude_frozen)
    above = (model_key,) if model_key else ()
    sources: dict[tuple[str, ...], tuple[LazyStateDict, str]] = {
        (*above, name): (weights, name) for name in weights
    }
    state: dict[str, Any] = {}
    if optimizer:
        moments, groups, by_path = _optimizer(path, optimizer_key)
        sources |= {where: (moments, name) for where, name in by_path.items()}
        state[optimizer_key] = {"state": {}, "param_groups": groups}
    by_name: dict[str, tuple[LazyStateDict, str]] = {}
    for where, (tensors, name) in sources.items():
        meta = torch.empty(tensors.shape(name), dtype=tensors.dtype(name), device="meta")
        _put(state, where, meta)
        by_name[path_name(where)] = (tensors, name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(
            state,
            # A file per tensor: torch's writer keeps all tensors of a file until the file is done.
            storage_writer=dcp.FileSystemWriter(out, single_file_per_rank=False),
            planner=_ReadingPlanner(by_name),
            no_dist=True,
        )
    total = sum(
        torch.Size(tensors.shape(name)).numel() * tensors.dtype(name).itemsize
        for tensors, name in by_name.values()
    )
    files = tuple(sorted(p.name for p in out.iterdir()))
    return Exported(out, files, len(by_name), total)


class _ReadingPlanner(dcp.DefaultSavePlanner):
    """DCP's planner over meta tensors, which are read when their turn to be written comes."""

    def __init__(self, sources: dict[str, tuple[LazyStateDict, str]]) -> None:
        super().__init__()
        self._sources = sources

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self._sources.get(index.fqn)
        return super().lookup_object(index) if found is None else found[0][found[1]]

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self.lookup_object(write_item.index)


def _optimizer(
    path: Place, optimizer_key: str
) -> tuple[LazyStateDict, list[Any], dict[tuple[str, ...], str]]:
    """The optimizer's tensors, its groups as torch writes them, and where each tensor belongs."""
    saved = open_checkpoint(path)
    tensors: dict[str, LazyTensor] = {}
    by_path: dict[tuple[str, ...], str] = {}
    for name, tensor in saved.tensors.items():
        if tensor.path[0] == OPTIMIZER and len(tensor.path) == 3:
            _, key, parameter = (str(part) for part in tensor.path)
            tensors[name] = tensor
            by_path[(optimizer_key, "state", parameter, key)] = name
    if not tensors:
        raise CheckpointError(f"{path} holds no optimizer state; export without it")
    groups = [
        {
            **{key: value for key, value in group.items() if key not in ("names", "params")},
            "params": list(group["names"]),
        }
        for group in saved.values.get("groups", [])
    ]
    return LazyStateDict(tensors), groups, by_path


def _put(state: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        state = state.setdefault(key, {})
    state[path[-1]] = value
