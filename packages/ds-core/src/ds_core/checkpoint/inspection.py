"""`inspect`: what a checkpoint holds, from its index alone; no tensor is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_core.checkpoint import tags
from ds_core.checkpoint.importing import kind_of
from ds_core.checkpoint.index import Index, TensorRecord
from ds_core.checkpoint.remote import Place
from ds_core.checkpoint.store import find, read_state
from ds_core.errors import CheckpointError


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint.

    Attributes:
        name: such as "model.blocks.0.weight".
        kind: "parameters", "buffers", "optimizer exp_avg" and so on.
        dtype: such as "float32".
        shape: of the whole tensor.
        num_bytes: its size.
        num_boxes: the pieces in which it is stored.
        files: the data files that hold them.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    num_boxes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        path: its folder.
        tags: of the complete checkpoints beside it, oldest first.
        latest: the tag that loads by default, if one is named.
        step: optimizer steps before it was saved, if an `Engine` saved it.
        writer: ranks that wrote it, versions and time.
        sharding: how the state was split and in which number formats, in words.
        tensors: all of them, by name.
        bytes_by_kind: size of the tensors by what they are.
        groups: settings of each of the optimizer's groups, and how many parameters it has.
        client_state: the caller's own values.
        aliases: further names of tied weights.
        frozen: parameters that were not trained.
        files: size of each data file.
    """

    path: Place
    tags: tuple[str, ...]
    latest: str | None
    step: int | None
    writer: Mapping[str, Any]
    sharding: str | None
    tensors: Mapping[str, TensorFacts]
    bytes_by_kind: Mapping[str, int]
    groups: tuple[Mapping[str, Any], ...] = ()
    client_state: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)


def inspect(directory: str | os.PathLike[str], tag: str | None = None) -> Inspection:
    """What a checkpoint holds. Reads its index; neither tensors nor the model are needed.

    Collective: no.

    Args:
        directory: holds the checkpoints, or is one.
        tag: which one. Default: the one that `latest` names.

    Raises:
        CheckpointError: if there is none, or its index is damaged.
    """
    path = find(directory, tag)
    index = Index.read(path)
    state = read_state(path)
    about: Mapping[str, Any] = state.get("about", {})
    buffers = set(about.get("buffers", ()))
    tensors = {name: _facts(name, record, buffers) for name, record in index.tensors.items()}
    total: dict[str, int] = {}
    for facts in tensors.values():
        total[facts.kind] = total.get(facts.kind, 0) + facts.num_bytes
    told = [about[key] for key in ("sharding", "precision") if key in about]
    client = dict(state.get("client", {}))
    client |= {
        name.removeprefix("client."): f"tensor of shape {list(record.shape)}"
        for name, record in index.tensors.items()
        if record.path[0] == "client"
    }
    return Inspection(
        path=path,
        tags=tuple(tags.tags(path.parent)),
        latest=_latest(path.parent),
        step=state.get("engine", {}).get("global_step"),
        writer=index.writer,
        sharding="; ".join(told) or None,
        tensors=tensors,
        bytes_by_kind=total,
        groups=tuple(_group(group) for group in state.get("groups", ())),
        client_state=client,
        aliases=dict(about.get("aliases", {})),
        frozen=tuple(about.get("frozen", ())),
        files=dict(index.files),
    )


def _facts(name: str, record: TensorRecord, buffers: set[str]) -> TensorFacts:
    return TensorFacts(
        name=name,
        kind=kind_of(record.path, buffers),
        dtype=str(record.dtype).removeprefix("torch."),
        shape=record.shape,
        num_bytes=record.nbytes,
        num_boxes=len(record.boxes),
        files=tuple(sorted({stored.file for stored in record.boxes})),
    )


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in group.items() if key != "names" and value is not None}
    return {"num_parameters": len(group.get("names", ())), **settings}


def _latest(directory: Place) -> str | None:
    try:
        return tags.latest(directory)
    except CheckpointError:
        return None
