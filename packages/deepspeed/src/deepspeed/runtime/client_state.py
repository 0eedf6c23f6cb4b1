"""What a program saves beside its model: anything, in a checkpoint that holds JSON and tensors."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ds_core.errors import CheckpointError

logger = logging.getLogger("DeepSpeed")

#: Marks a value that is not JSON: torch's own format, as text.
_PACKED = "__torch_save__"


def packed(state: Mapping[Any, Any]) -> dict[str, Any]:
    """`state` as JSON: what is not JSON already becomes text.

    Warns of objects that `unpacked` will refuse. Keys become strings.
    """
    return {str(key): _packed_value(str(key), value) for key, value in state.items()}


def _packed_value(key: str, value: Any) -> Any:
    if _is_json(value):
        return value
    buffer = io.BytesIO()
    torch.save(value, buffer)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(_rewound(buffer))
    if unsafe:
        logger.warning(
            "client_state[%r] holds objects of %s: before it can be loaded again, the program must "
            "allow them with torch.serialization.add_safe_globals([...])",
            key, ", ".join(sorted(unsafe)),
        )  # fmt: skip
    return {_PACKED: base64.b64encode(buffer.getvalue()).decode("ascii")}


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `packed` was given, with strings for keys.

    Raises CheckpointError for objects of classes that the program has not allowed: running code
    that a file names is for the program to decide.
    """
    return {key: _unpacked_value(key, value) for key, value in state.items()}


def _unpacked_value(key: str, value: Any) -> Any:
    if not isinstance(value, Mapping) or set(value) != {_PACKED}:
        return value
    content = io.BytesIO(base64.b64decode(value[_PACKED]))
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(_rewound(content))
        raise CheckpointError(
            f"client_state[{key!r}] holds objects of {', '.join(sorted(unsafe)) or 'some class'}, "
            f"which loading would run code for; allow their classes with "
            f"torch.serialization.add_safe_globals([...]) before load_checkpoint"
        ) from error


def _rewound(buffer: io.BytesIO) -> Any:
    buffer.seek(0)
    return buffer


def _is_json(value: Any) -> bool:
    """Whether a value is the same after it was written as JSON and read again."""
    if value is None or isinstance(value, bool | int | str):
        return type(value) in (type(None), bool, int, str)
    if isinstance(value, float):
        return type(value) is float and json.loads(json.dumps(value)) == value
    if type(value) is list:
        return all(_is_json(item) for item in value)
    if type(value) is dict:
        return all(type(key) is str and _is_json(item) for key, item in value.items())
    return False
