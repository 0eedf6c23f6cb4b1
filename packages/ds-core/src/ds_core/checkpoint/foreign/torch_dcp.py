"""Checkpoints of torch's own distributed checkpoint: FSDP2, torchtitan, and whoever else uses it.

A folder with a pickled `.metadata` (which file and byte holds which box of which tensor) and
`*.distcp` files, in which each box or value is what `torch.save` made of it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ds_core.checkpoint.boxes import Box
from ds_core.checkpoint.foreign.foreign import Foreign, engine_values, plain
from ds_core.checkpoint.unpickling import Dropped, load_dcp_metadata, load_torch_file
from ds_core.errors import CheckpointError

METADATA_NAME = ".metadata"
_MODEL_KEYS = ("model", "module", "state_dict")
_OPTIMIZER = r"(?:optim|optimizer)\."
_MOMENT = re.compile(_OPTIMIZER + r"state\.(?P<name>.+)\.(?P<key>[^.]+)")
_GROUPS = re.compile(_OPTIMIZER + r"param_groups(?:\.(?P<rest>.+))?")


def looks_like(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of torch's distributed checkpoint."""
    return (folder / METADATA_NAME).is_file()


def open_dcp(folder: Path, *, drop_objects: bool = False) -> Foreign:
    """What a torch distributed checkpoint holds.

    The weights are what lies under a top-level key "model", "module" or "state_dict", or else every
    tensor at the top level; the optimizer's state is what `get_optimizer_state_dict` returns,
    nested or flattened, under "optim" or "optimizer". All else is kept as client state.

    Raises:
        CheckpointError: if a file is missing, damaged, or asks for code.
    """
    metadata: Metadata = load_dcp_metadata(folder / METADATA_NAME)
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
        raise CheckpointError(f"{folder / METADATA_NAME} does not describe a checkpoint")
    found = Foreign("torch distributed checkpoint")
    reader = _Reader(folder, metadata, drop_objects)
    key = _model_key(metadata)
    groups: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            _add_tensor(found, reader, name, entry, key, rest)
        elif match := _GROUPS.fullmatch(name):
            groups[match["rest"] or ""] = reader.value(name)
        else:
            rest[name] = reader.value(name)
    _add_groups(found, groups)
    steps = [t.read() for n, t in found.state.tensors.items() if n.startswith("optimizer.step.")]
    found.state.values["engine"] = engine_values(int(max(steps)) if steps else 0)
    schedule = {n.removeprefix("lr_scheduler."): v for n, v in rest.items() if _is_schedule(n)}
    if schedule:
        found.state.values["lr_scheduler"] = schedule.pop("lr_scheduler", schedule)
    kept = {n: v for n, v in rest.items() if not _is_schedule(n) and not isinstance(v, Dropped)}
    found.add_client(kept)
    for name, value in rest.items():
        if isinstance(value, Dropped):
            found.ignored[name] = f"an object of class {type(value).__name__}"
    return found


class _Reader:
    """Reads tensors and values out of the data files."""

    def __init__(self, folder: Path, metadata: Metadata, drop_objects: bool) -> None:
        self._folder = folder
        self._drop_objects = drop_objects
        self._places: Mapping[MetadataIndex, Any] = metadata.storage_data

    def value(self, name: str) -> Any:
        """A value that is not a tensor."""
        return self._load(MetadataIndex(name))

    def tensor(self, name: str, entry: TensorStorageMetadata) -> torch.Tensor:
        """A whole tensor, from all its boxes."""
        dtype = entry.properties.dtype
        whole = torch.empty(tuple(entry.size), dtype=dtype)
        for number, chunk in enumerate(entry.chunks):
            part = self._load(MetadataIndex(name, chunk.offsets, number))
            target = whole
            for dim, (offset, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(dim, offset, length)
            if not isinstance(part, torch.Tensor) or part.shape != target.shape:
                raise CheckpointError(f"{self._folder}: a box of {name} has another shape")
            target.copy_(part)
        return whole

    def _load(self, where: MetadataIndex) -> Any:
        place = self._places.get(where)
        if place is None:
            raise CheckpointError(f"{self._folder}: {where.fqn} is in no file")
        file = str(place.relative_path)
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise CheckpointError(f"{self._folder}: {where.fqn} is said to be in {file!r}, outside")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(
                f"{self._folder}: {where.fqn} is stored through {place.transform_descriptors}; "
                "only plain storage is read"
            )
        try:
            with open(self._folder / file, "rb") as opened:
                opened.seek(place.offset)
                data = opened.read(place.length)
        except OSError as error:
            raise CheckpointError(f"cannot read {self._folder / file}: {error.strerror}") from error
        what = f"{self._folder / file} ({where.fqn})"
        if len(data) < place.length:
            raise CheckpointError(f"{what} cannot be read, it is damaged: the file is cut off")
        return load_torch_file(io.BytesIO(data), drop_objects=self._drop_objects, what=what)


def _model_key(metadata: Metadata) -> str:
    """The top-level key that the model lies under, with a dot; empty for the top level itself."""
    for key in _MODEL_KEYS:
        if any(name.startswith(f"{key}.") for name in metadata.state_dict_metadata):
            paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
            tops = {str(path[0]) for path in paths.values() if path}
            if not tops or key in tops:
                return f"{key}."
    return ""


def _add_tensor(
    found: Foreign,
    reader: _Reader,
    name: str,
    entry: TensorStorageMetadata,
    key: str,
    rest: dict[str, Any],
) -> None:
    dtype, shape = entry.properties.dtype, tuple(entry.size)
    covered = sum(Box.whole(tuple(chunk.sizes)).numel for chunk in entry.chunks)
    if covered != Box.whole(shape).numel:
        found.missing.append(f"{name}: {covered} of {Box.whole(shape).numel} elements are there")
        return

    def read() -> torch.Tensor:
        return reader.tensor(name, entry)

    if match := _MOMENT.fullmatch(name):
        if match["name"].isdigit():
            found.unexpected.append(
                f"{name}: the optimizer's state is keyed by position, not by name; save what "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict returns"
            )
        elif match["key"] == "step" and not shape:
            found.add_moment("step", match["name"], torch.float32, (), lambda: read().float())
        else:
            found.add_moment(match["key"], match["name"], dtype, shape, read)
    elif name.startswith(key):
        found.add_weight(name.removeprefix(key), dtype, shape, read)
    else:
        rest[name] = read()


def _add_groups(found: Foreign, groups: Mapping[str, Any]) -> None:
    """The optimizer's groups, from the forms in which torch saves them."""
    if not groups:
        return
    listed = groups[""] if isinstance(groups.get(""), list) else _listed_groups(groups, found)
    found.state.values["groups"] = [
        {**plain(group), "names": sorted(map(str, group.get("params", ())))} for group in listed
    ]


def _listed_groups(groups: Mapping[str, Any], found: Foreign) -> list[dict[str, Any]]:
    """Groups whose entries were saved one by one: `0.lr`, or `<parameter>.lr` when flattened."""
    names = {t.path[-1] for t in found.state.tensors.values() if t.path[0] == "model"}
    by_owner: dict[str, dict[str, Any]] = {}
    for dotted, value in groups.items():
        owner, _, setting = dotted.rpartition(".")
        by_owner.setdefault(owner, {})[setting] = value
    if all(owner.isdigit() for owner in by_owner):
        return [by_owner[owner] for owner in sorted(by_owner, key=int)]
    merged: list[dict[str, Any]] = []
    for owner, settings in by_owner.items():
        if owner not in names:
            found.unexpected.append(f"param_groups.{owner}: no parameter has this name")
            continue
        for group in merged:
            if {k: v for k, v in group.items() if k != "params"} == settings:
                group["params"].append(owner)
                break
        else:
            merged.append({**settings, "params": [owner]})
    return merged


def _is_schedule(name: str) -> bool:
    return name == "lr_scheduler" or name.startswith("lr_scheduler.")
