"""Weights without a training state: safetensors and `torch.save` files, in one or many parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from ds_core.checkpoint.boxes import Box
from ds_core.checkpoint.data_file import dtype_of, read_header
from ds_core.checkpoint.files import read_exactly
from ds_core.checkpoint.foreign.foreign import Foreign, same_storage
from ds_core.checkpoint.unpickling import Dropped, load_torch_file
from ds_core.errors import CheckpointError

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_NESTED_UNDER = ("state_dict", "model_state_dict", "model", "module")


def looks_like(source: Path) -> bool:
    """Whether a file or folder holds weights in one of these forms."""
    return bool(_parts(source))


def open_weights(source: Path, *, drop_objects: bool = False) -> Foreign:
    """The weights of a file, or of a folder as Hugging Face's libraries write it.

    Raises:
        CheckpointError: if a part is missing, damaged or asks for code, or two parts hold a tensor
            of one name.
    """
    parts, listed = _parts(source), _weight_map(source)
    if not parts:
        raise CheckpointError(
            f"{source} holds no weights: expected .safetensors, {', '.join(_TORCH_SUFFIXES)}"
        )
    found = Foreign("safetensors" if parts[0].suffix == ".safetensors" else "torch state dict")
    for part in parts:
        if part.suffix == ".safetensors":
            _add_safetensors(found, part)
        else:
            _add_torch(found, part, drop_objects)
    held = {str(tensor.path[-1]) for tensor in found.state.tensors.values()}
    found.missing += [
        f"{n}: named in the index" for n in listed if n not in held | set(found.aliases)
    ]
    if listed:
        found.unexpected += [f"{name}: not named in the index" for name in held - set(listed)]
    return found


def _parts(source: Path) -> list[Path]:
    """The files that hold the weights, the safetensors ones if there are both kinds."""
    if source.is_file():
        is_known = source.suffix in (".safetensors", *_TORCH_SUFFIXES)
        return [source] if is_known else []
    index = _index_file(source)
    if index is not None:
        named = sorted(set(_weight_map(source).values()))
        return [source / name for name in named]
    for suffix in (".safetensors", *_TORCH_SUFFIXES):
        if files := sorted(source.glob(f"*{suffix}")):
            return files
    return []


def _index_file(source: Path) -> Path | None:
    if not source.is_dir():
        return None
    for pattern in ("*.safetensors.index.json", "*.bin.index.json"):
        if found := sorted(source.glob(pattern)):
            return found[0]
    return None


def _weight_map(source: Path) -> dict[str, str]:
    index = _index_file(source)
    if index is None:
        return {}
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    for file in weight_map.values():
        if PurePath(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is not a plain file name")
    return weight_map


def _add_safetensors(found: Foreign, path: Path) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            header, data_start = read_header(file)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    notes = header.pop("__metadata__", {})
    for name, entry in header.items():
        try:
            dtype, shape = dtype_of(entry["dtype"]), tuple(entry["shape"])
            start, stop = (data_start + offset for offset in entry["data_offsets"])
            if stop - start != Box.whole(shape).numel * dtype.itemsize or stop > size:
                raise ValueError(f"bytes [{start}, {stop}) of a file of {size}")
        except (KeyError, TypeError, ValueError, CheckpointError) as error:
            raise CheckpointError(f"{path} is damaged or cut off at {name}: {error}") from error
        read_flat = _reader(path, start, dtype)
        found.add_weight(name, dtype, shape, _whole(read_flat, shape), read_flat)
    # `safetensors.torch.save_model` keeps one of several tied weights and notes the others so.
    found.aliases |= {k: v for k, v in notes.items() if v in header and k not in header}


def _reader(path: Path, start: int, dtype: torch.dtype) -> Callable[[int, int], torch.Tensor]:
    """Reads elements `[first, last)` of a tensor whose bytes begin at `start` of a file."""

    def read(first: int, last: int) -> torch.Tensor:
        count = (last - first) * dtype.itemsize
        with open(path, "rb", buffering=0) as file:
            data = read_exactly(file, start + first * dtype.itemsize, count)
        if len(data) < count:
            raise CheckpointError(f"{path} is cut off")
        if not data:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype)

    return read


def _whole(
    read_flat: Callable[[int, int], torch.Tensor], shape: tuple[int, ...]
) -> Callable[[], torch.Tensor]:
    return lambda: read_flat(0, Box.whole(shape).numel).view(shape)


def _add_torch(found: Foreign, path: Path, drop_objects: bool) -> None:
    if not path.exists():
        raise CheckpointError(f"cannot read {path}: No such file or directory")
    content: Any = load_torch_file(path, drop_objects=drop_objects)
    outer: Mapping[str, Any] = {}
    for key in _NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            outer, content = content, content[key]
            found.add_client({str(k): v for k, v in outer.items() if k != key})
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict")
    seen: dict[str, torch.Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Dropped):
            found.ignored[str(name)] = f"an object of class {type(value).__name__}"
            continue
        if not isinstance(value, torch.Tensor):
            found.unexpected.append(f"{name}: a {type(value).__name__}, not a tensor")
            continue
        tied = next((other for other in seen if same_storage(seen[other], value)), None)
        if tied is not None:
            found.aliases[str(name)] = tied
            continue
        seen[str(name)] = value
        found.add_tensor(str(name), value)
