"""A checkpoint's weights as files of torch.save, for programs that read no safetensors."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import torch

from ds_core.checkpoint.export import MAX_SHARD_BYTES, Exported, cut_into_files, nbytes_of
from ds_core.checkpoint.files import replace_atomically, write_all
from ds_core.checkpoint.lazy import LazyStateDict
from ds_core.errors import CheckpointError

_STEM = "pytorch_model"


def export_torch(
    state: LazyStateDict,
    out: str | os.PathLike[str],
    *,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Exported:
    """Write a state dict as `pytorch_model.bin`, or as parts of it with an index in JSON.

    A tied weight is one tensor in the file under each of its names, where they are in the same
    file. One file at a time is in memory.

    Args:
        state: what to write.
        out: the folder; created.
        max_shard_bytes: largest file, unless a single tensor is larger; None: one file.
        overwrite: whether weights of torch that are in the folder already are replaced.

    Raises CheckpointError if the folder has such weights already.
    """
    folder = Path(out)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes: got {max_shard_bytes}, expected at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted([*folder.glob(f"{_STEM}*.bin"), *folder.glob(f"{_STEM}.bin.index.json")])
    if old and not overwrite:
        raise CheckpointError(
            f"{folder} already has weights ({old[0].name}); name another folder, or remove them"
        )
    for path in old:
        path.unlink()
    parts = [list(state)] if max_shard_bytes is None else cut_into_files(state, max_shard_bytes)
    count = len(parts)
    names = [f"{_STEM}-{i + 1:05d}-of-{count:05d}.bin" for i in range(count)]
    if count == 1:
        names = [f"{_STEM}.bin"]
    for name, members in zip(names, parts, strict=True):
        with replace_atomically(folder / name) as file:
            # torch.save takes each write to be a whole one, which is true of buffered files alone.
            buffered = io.BufferedWriter(file)
            torch.save(_read(state, members), buffered)
            buffered.flush()
            buffered.detach()
    total = sum(nbytes_of(state, name) for name in state)
    if count > 1:
        weights = {each: name for name, part in zip(names, parts, strict=True) for each in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        names.append(f"{_STEM}.bin.index.json")
        with replace_atomically(folder / names[-1]) as file:
            write_all(file, json.dumps(index, indent=2).encode())
    return Exported(folder, tuple(names), len(state), total)


def _read(state: LazyStateDict, names: list[str]) -> dict[str, torch.Tensor]:
    """Some tensors, each with a storage of its own, and a tied one once."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        kept = state.aliases.get(name)
        if kept in found:
            found[name] = found[str(kept)]
            continue
        tensor = state[name]
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
        found[name] = tensor.clone() if is_view else tensor
    return found
