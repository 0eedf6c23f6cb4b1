"""A checkpoint's weights as ordinary safetensors files, as Hugging Face's libraries read them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ds_core.checkpoint.data_file import Entry, write_data_file
from ds_core.checkpoint.files import replace_atomically, write_all
from ds_core.checkpoint.lazy import (
    MODEL,
    OPTIMIZER,
    LazyStateDict,
    frozen_names,
    full_state_dict,
    open_checkpoint,
)
from ds_core.checkpoint.remote import Place
from ds_core.checkpoint.store import find
from ds_core.errors import CheckpointError

#: What Hugging Face's libraries write per file when they are not told otherwise.
MAX_SHARD_BYTES = 5 * 10**9


class Exported(NamedTuple):
    """What an export wrote."""

    path: Path
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int


def consolidate(
    directory: str | os.PathLike[str],
    tag: str | None,
    out_file: str | os.PathLike[str],
    *,
    prefix: str = f"{MODEL}.",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the tensors under a prefix into one safetensors file and return its path.

    The file has full tensors under the model's own names, as Hugging Face's libraries read them.
    One tensor at a time is in memory; every byte is verified; the file appears when complete.
    Collective: no; needs neither the model nor a device.

    Args:
        directory: holds the checkpoints, or is one.
        tag: which one; None for the one that `latest` names.
        out_file: the file; its directory is created, an old file is replaced.
        prefix: which tensors, and what to cut off their names. `""` for all, under full names.
        dtype: what to convert floating-point tensors to. Default: as saved.

    Raises:
        CheckpointError: if no tensor has the prefix (lists the prefixes there are), or the
            checkpoint is missing or damaged.
    """
    state = full_state_dict(directory, tag, prefix=prefix, dtype=dtype, aliases=False)
    out_file = Path(out_file)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    _write(out_file, state, list(state), {})
    return out_file


def export_safetensors(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tag: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    exclude_frozen: bool = False,
    aliases: bool = True,
    optimizer: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write the weights of a checkpoint as a folder that Hugging Face's libraries load.

    `model.safetensors`, or `model-00001-of-00002.safetensors` and so on with
    `model.safetensors.index.json`, which is written last. One tensor at a time is in memory and
    every byte is verified.
    Collective: no; needs neither the model nor a device.

    Args:
        directory: holds the checkpoints, or is one.
        out: the folder; created. Other files in it, such as `config.json`, stay.
        tag: which checkpoint. Default: the one that `latest` names.
        dtype: what floating-point tensors are converted to. Default: as saved.
        max_shard_bytes: largest file, unless a single tensor is larger.
        exclude_frozen: leave out the parameters that were not trained.
        aliases: whether a tied weight is written under each of its names. If False it is written
            once, and the header tells the other names as `safetensors.torch.load_model` reads them.
        optimizer: also write the optimizer's tensors, as `optimizer.safetensors` in the same way
            with names such as `exp_avg.blocks.0.weight`, and its groups as `optimizer.json`.
        overwrite: whether weights that are in the folder already are replaced.

    Raises:
        CheckpointError: if the folder has weights already, or the checkpoint is missing or damaged.
    """
    path, out = find(directory, tag), Path(out)
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes: got {max_shard_bytes}, expected at least 1")
    model = full_state_dict(path, dtype=dtype, exclude_frozen=exclude_frozen, aliases=aliases)
    dropped = {} if aliases else full_state_dict(path, exclude_frozen=exclude_frozen).aliases
    extra = _optimizer(path, exclude_frozen=exclude_frozen) if optimizer else None
    _make_room(out, overwrite=overwrite)  # not before it is known that there is something to write
    parts = [_write_sharded(out, "model", model, max_shard_bytes, dropped)]
    if extra is not None:
        state, groups = extra
        parts.append(_write_sharded(out, "optimizer", state, max_shard_bytes, {}))
        with replace_atomically(out / "optimizer.json") as file:
            write_all(file, json.dumps({"groups": groups}, indent=2).encode())
    return Exported(
        out,
        tuple(name for part in parts for name in part.files),
        sum(part.num_tensors for part in parts),
        sum(part.num_bytes for part in parts),
    )


def write_weights(
    out: Path,
    state: LazyStateDict,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dropped: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a state dict as `export_safetensors` does, each tensor read once, when its turn comes.

    Args:
        out: the folder; created.
        state: what to write.
        max_shard_bytes: largest file, unless a single tensor is larger.
        dropped: further names of some tensors, for the header.
        overwrite: whether weights that are in the folder already are replaced.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes: got {max_shard_bytes}, expected at least 1")
    _make_room(out, overwrite=overwrite)
    return _write_sharded(out, "model", state, max_shard_bytes, dropped or {})


def _optimizer(path: Place, *, exclude_frozen: bool) -> tuple[LazyStateDict, list[object]]:
    state = open_checkpoint(path)
    if exclude_frozen:
        frozen_names(path, state.values.get("about", {}))  # they have no optimizer state
    prefix = f"{OPTIMIZER}."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.tensors.items()
        if name.startswith(prefix)
    }
    if not tensors:
        raise CheckpointError(f"{path} holds no optimizer state; export without it")
    return LazyStateDict(tensors), state.values.get("groups", [])


def _make_room(out: Path, *, overwrite: bool) -> None:
    """Create the folder; remove or refuse old weights, which a loader might prefer to ours."""
    out.mkdir(parents=True, exist_ok=True)
    patterns = ("model*.safetensors", "model.safetensors.index.json", "optimizer*.safetensors*")
    old = sorted(path for pattern in patterns for path in out.glob(pattern))
    if old and not overwrite:
        raise CheckpointError(
            f"{out} already has weights ({old[0].name}); name another folder, or overwrite "
            f"them (--overwrite)"
        )
    for path in old:
        path.unlink()


def _write_sharded(
    out: Path, stem: str, state: LazyStateDict, max_bytes: int, dropped: Mapping[str, str]
) -> Exported:
    shards = cut_into_files(state, max_bytes)
    count = len(shards)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    for name, members in zip(names, shards, strict=True):
        own = {alias: kept for alias, kept in dropped.items() if kept in members}
        _write(out / name, state, members, own)
    total = sum(nbytes_of(state, name) for name in state)
    if count > 1:
        weight_map = {
            member: name for name, members in zip(names, shards, strict=True) for member in members
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        names.append(f"{stem}.safetensors.index.json")
        with replace_atomically(out / names[-1]) as file:
            write_all(file, json.dumps(index, indent=2).encode())
    return Exported(out, tuple(names), len(state), total)


def cut_into_files(state: LazyStateDict, max_bytes: int) -> list[list[str]]:
    """The names of a state dict in their order, so many bytes to a file, or one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in state:
        size = nbytes_of(state, name)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def nbytes_of(state: LazyStateDict, name: str) -> int:
    """Bytes of a tensor as it will be written; reads nothing."""
    return Entry(name, state.dtype(name), state.shape(name)).nbytes


def _write(
    out_file: Path, state: LazyStateDict, names: Sequence[str], metadata: Mapping[str, str]
) -> None:
    entries = [Entry(name, state.dtype(name), state.shape(name)) for name in names]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)  # aligns them
    with replace_atomically(out_file) as file:
        write_data_file(file, entries, lambda i: state[entries[i].name], metadata=metadata)
