"""The model of an engine as safetensors files, written while it is sharded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_core import comm
from ds_core.buffers import persistent_buffers
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from ds_core.checkpoint.lazy import LazyTensor
    from ds_core.engine import Engine


def save_model(
    engine: Engine,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    exclude_frozen: bool,
    overwrite: bool,
) -> str:
    """See `Engine.save_model`."""
    group = engine.mesh.group("dp")
    failure: str | None = None
    if group.rank == 0:
        try:
            _write(engine, Path(path), group, dtype, max_shard_bytes, exclude_frozen, overwrite)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        comm.broadcast_object(None, group, caller="save_model")
    else:
        # Rank 0 says which parameter it is about to write; all of them gather it.
        while (name := comm.broadcast_object(None, group, caller="save_model")) is not None:
            engine.sharding.full_parameter(name)
    failure = comm.broadcast_object(failure, group, caller="save_model")
    if failure is not None:
        raise CheckpointError(f"save_model: cannot write {os.fspath(path)!r}: {failure}")
    return os.fspath(path)


def _write(
    engine: Engine,
    path: Path,
    group: comm.Group,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    exclude_frozen: bool,
    overwrite: bool,
) -> None:
    from ds_core.checkpoint.export import write_weights
    from ds_core.checkpoint.lazy import LazyStateDict

    first_names: dict[int, str] = {}
    tensors: dict[str, LazyTensor] = {}
    aliases: dict[str, str] = {}
    for name, param in engine.module.named_parameters(remove_duplicate=False):
        if exclude_frozen and not param.requires_grad:
            continue
        first = first_names.setdefault(id(param), name)
        if first == name:
            tensors[name] = _gathered(engine, name, param, group)
        else:
            aliases[name] = first
    for name, buffer in persistent_buffers(engine.module):
        tensors.setdefault(name, _present(name, buffer))
    write_weights(
        path,
        LazyStateDict(tensors, dtype=dtype),
        max_shard_bytes=max_shard_bytes,
        dropped=aliases,
        overwrite=overwrite,
    )


def _gathered(engine: Engine, name: str, param: torch.Tensor, group: comm.Group) -> LazyTensor:
    """A parameter that all ranks gather when it is read."""
    from ds_core.checkpoint.lazy import LazyTensor

    def read() -> torch.Tensor:
        comm.broadcast_object(name, group, caller="save_model")
        value: Any = engine.sharding.full_parameter(name)
        return value.detach().cpu()

    # The most precise copy is read, and converted to the dtype that is stated here or asked for.
    return LazyTensor(("model", name), param.dtype, tuple(param.shape), read)


def _present(name: str, buffer: torch.Tensor) -> LazyTensor:
    from ds_core.checkpoint.lazy import in_memory

    return in_memory(("model", name), buffer.detach())
