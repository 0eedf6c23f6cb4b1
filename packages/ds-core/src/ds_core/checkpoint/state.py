"""A nested state as tensors and values with legible names, and back.

Names are the keys that lead to a value, joined by dots: the parameter `blocks.0.attn.qkv.weight`
in `{"model": {...}}` is `model.blocks.0.attn.qkv.weight`, its moment in
`{"optimizer": {"exp_avg": {...}}}` is `optimizer.exp_avg.blocks.0.attn.qkv.weight`. Keys may hold
dots themselves, so the index keeps the path beside each name; two paths with one name are an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_core.checkpoint import jsonable
from ds_core.checkpoint.index import KeyPath
from ds_core.errors import CheckpointError


@dataclass
class FlatState:
    """A state by fully qualified name: its tensors, its other values, and the path of each."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, KeyPath] = field(default_factory=dict)

    def encoded_values(self) -> dict[str, Any]:
        """The values as JSON. Raises CheckpointError for one that JSON cannot hold."""
        return {name: jsonable.encode(value, name) for name, value in self.values.items()}

    def checked(self) -> FlatState:
        """Itself. Raises CheckpointError if a tensor is on the meta device, so has no data."""
        meta = [name for name, tensor in self.tensors.items() if tensor.is_meta]
        if meta:
            raise CheckpointError(
                f"{meta[0]} is on the meta device and has no data to save or to load into "
                f"({len(meta)} such tensors); give the model storage first, as with to_empty()"
            )
        return self

    def only(self, parts: Collection[str] | None) -> FlatState:
        """What lies under these top-level keys; all of it for None."""
        if parts is None:
            return self
        paths = {name: path for name, path in self.paths.items() if path[0] in parts}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in paths}
        values = {name: value for name, value in self.values.items() if name in paths}
        return FlatState(tensors, values, paths)


def flatten(state: Mapping[str, Any]) -> FlatState:
    """The tensors and values of a nested state.

    Dictionaries are taken apart; so are lists and tuples that hold tensors. Other lists, empty
    dictionaries, and dictionaries without tensors whose keys are not all strings are values.

    Raises:
        CheckpointError: if the state is not a dictionary, two paths have the same name, or a key
            that leads to a tensor is neither a string nor an integer.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"state: got {type(state).__name__}, expected a dictionary")
    flat = FlatState()
    for key, value in state.items():
        _flatten_into(flat, (_checked(key, ()),), value)
    return flat


def _flatten_into(flat: FlatState, path: KeyPath, value: Any) -> None:
    if isinstance(value, Mapping) and _is_taken_apart(value):
        for key, item in value.items():
            _flatten_into(flat, (*path, _checked(key, path)), item)
    elif isinstance(value, list | tuple) and _holds_tensor(value):
        for i, item in enumerate(value):
            _flatten_into(flat, (*path, i), item)
    else:
        name = path_name(path)
        if name in flat.paths:
            raise CheckpointError(
                f"two entries of the state have the name {name!r}: the paths "
                f"{list(flat.paths[name])} and {list(path)}; rename one of the keys"
            )
        flat.paths[name] = path
        (flat.tensors if isinstance(value, torch.Tensor) else flat.values)[name] = value


def path_name(path: KeyPath) -> str:
    """The fully qualified name of what a path leads to."""
    return ".".join(map(str, path))


def _is_taken_apart(value: Mapping[Any, Any]) -> bool:
    if not value:
        return False
    return all(isinstance(key, str) for key in value) or _holds_tensor(value)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds_tensor, value))


def _checked(key: Any, parents: KeyPath) -> str | int:
    if isinstance(key, str | int):
        return key
    raise CheckpointError(
        f"state{''.join(f'[{k!r}]' for k in parents)}: got a key of type {type(key).__name__} "
        f"({key!r}); keys that lead to tensors must be strings or integers"
    )


def rebuild(
    state: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    values: Iterable[tuple[KeyPath, Any]],
) -> dict[str, Any]:
    """A new nested state like `state`, with tensors and values put in their places.

    Args:
        state: gives the structure, and what neither of the others names.
        tensors: by name; those that `state` holds.
        values: by path. Dictionaries that do not exist are made; so, with positions as keys, are
            lists that held tensors beside values.
    """
    result = _copy(state, (), tensors)
    for path, value in values:
        _put(result, path, value)
    return dict(result)


def _copy(value: Any, path: KeyPath, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return tensors.get(path_name(path), value)
    if isinstance(value, Mapping):
        return {key: _copy(item, (*path, key), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, (*path, i), tensors) for i, item in enumerate(value)]
    return value


def _put(node: Any, path: KeyPath, value: Any) -> Any:
    """`node` with `value` at `path`; a node that cannot have such a child becomes a dictionary."""
    if not path:
        return value
    key, *rest = path
    if isinstance(node, list) and isinstance(key, int):
        node.extend([None] * (key + 1 - len(node)))
        node[key] = _put(node[key], tuple(rest), value)
        return node
    if not isinstance(node, dict):
        node = {}
    node[key] = _put(node.get(key), tuple(rest), value)
    return node
