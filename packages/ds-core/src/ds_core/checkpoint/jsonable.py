"""Plain values as strict JSON and back: the state of a checkpoint that is not tensors.

Numbers, strings, booleans, None, lists and dictionaries are themselves. Two things that JSON
cannot say are written as a dictionary with one reserved key:

- `{"$float": "nan" | "inf" | "-inf"}` for a float that is not finite;
- `{"$pairs": [[key, value], ...]}` for a dictionary whose keys are not all strings (step numbers,
  say), or that uses a reserved key itself.

Tuples come back as lists. Nothing else is accepted, so reading never runs code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_core.errors import CheckpointError

_FLOAT = "$float"
_PAIRS = "$pairs"
_ALLOWED = "numbers, strings, booleans, None, and lists and dictionaries of these"


def encode(value: Any, name: str) -> Any:
    """`value` as something that `json.dumps(..., allow_nan=False)` writes.

    Args:
        value: the value to save.
        name: what to call it in an error.

    Raises:
        CheckpointError: if a part of it has another type; names the part and the type.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {_FLOAT: repr(number)}
    if isinstance(value, list | tuple):
        return [encode(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return _encode_mapping(value, name)
    kind = type(value)
    raise CheckpointError(
        f"cannot save {name}: got a value of type {kind.__module__}.{kind.__qualname__}. "
        f"A checkpoint holds tensors, and beside them {_ALLOWED}; "
        "turn it into one of these (an object often has a state_dict(), an array a tolist())"
    )


def _encode_mapping(value: Mapping[Any, Any], name: str) -> dict[str, Any]:
    reserved = not value.keys().isdisjoint((_FLOAT, _PAIRS))
    if not reserved and all(isinstance(key, str) for key in value):
        return {str.__str__(key): encode(item, f"{name}.{key}") for key, item in value.items()}
    pairs = []
    for key, item in value.items():
        if not (key is None or isinstance(key, str | int | float)):
            raise CheckpointError(
                f"cannot save {name}: got a dictionary key of type {type(key).__qualname__} "
                f"({key!r}); keys may be strings, numbers, booleans or None"
            )
        pairs.append([encode(key, f"{name} key"), encode(item, f"{name}[{key!r}]")])
    return {_PAIRS: pairs}


def decode(value: Any) -> Any:
    """The value that `encode` was given, from what `json.loads` returned."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT}:
        return float(value[_FLOAT])
    if value.keys() == {_PAIRS}:
        return {decode(key): decode(item) for key, item in value[_PAIRS]}
    return {key: decode(item) for key, item in value.items()}
