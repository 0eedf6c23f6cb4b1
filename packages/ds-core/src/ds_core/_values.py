"""What a JSON value may be, in words and in checks: shared by the config and the factories.

Type annotations are the only statement of what is allowed; messages, checks and the two lenient
conversions (5e8 for an integer, a JSON list for a tuple) all read them. Nothing here needs
pydantic, so that building an optimizer does not import it.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_NUMBER_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_PLURALS = {"an integer": "integers", "a number": "numbers", "a string": "strings"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_MAX_SHOWN = 60


def shown(value: object) -> str:
    """`value` as it would stand in a JSON file, cut to one short piece of a line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that a misspelt one most likely means, or None if nothing is near."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def unknown_key(key: str, valid: Collection[str]) -> str:
    """What to say about a key that nobody knows, given the keys that are known there."""
    guess = nearest(key, valid)
    if guess is not None:
        return f"unknown key; did you mean {guess}?"
    if not valid:
        return "unknown key; none is allowed here"
    return f"unknown key; valid here: {', '.join(sorted(valid))}"


def mismatch(value: object, expected: str) -> str:
    """What to say about a value of a wrong type or out of range."""
    if value == "auto":
        return f'got "auto", which only Hugging Face\'s Trainer fills in; expected {expected}'
    return f"got {shown(value)}, expected {expected}"


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type annotation in words: `Literal[0, 1]` is "one of 0, 1"."""
    base, extra = _unwrap(annotation)
    bounds = _bounds((*metadata, *extra))
    if base in _NUMBER_WORDS:
        return _NUMBER_WORDS[base] + bounds
    if base is None or base is types.NoneType:
        return "null"
    origin, arguments = get_origin(base), get_args(base)
    if origin is Literal:
        choices = ", ".join(shown(choice).strip('"') for choice in arguments)
        return f"one of {choices}" if len(arguments) > 1 else shown(arguments[0])
    if _is_union(base):
        words = [describe(member, metadata) for member in arguments if _is_json(member)]
        return " or ".join(dict.fromkeys(words))
    if _is_list(base):
        items = [member for member in arguments if member is not Ellipsis]
        item = describe(items[0]) if items else ""
        length = f"{len(items)} " if origin is tuple and Ellipsis not in arguments else ""
        return f"a list of {length}{_PLURALS.get(item, 'values' if not item else 'items: ' + item)}"
    return "an object"


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` wants it where JSON cannot say so: 5e8 as an int, a list as a tuple.

    Raises TypeError for a bool where `Literal` names integers only: to Python, true is 1.
    """
    base, _ = _unwrap(annotation)
    members = get_args(base) if _is_union(base) else (base,)
    if isinstance(value, bool) and _is_int_literal_only(members):
        raise TypeError("a bool is not a number")
    if isinstance(value, float) and value.is_integer() and not _has(members, float):
        return int(value) if any(_allows_int(member) for member in members) else value
    if isinstance(value, (list, tuple)):
        sequence = next((member for member in members if _is_list(member)), None)
        return value if sequence is None else _coerce_items(value, sequence)
    return value


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a JSON value fits an annotation; what JSON cannot express (a tensor) never does."""
    base, _ = _unwrap(annotation)
    if base is Any:
        return True
    if base is None or base is types.NoneType:
        return value is None
    if base is bool:
        return isinstance(value, bool)
    if base is float:
        return _is_number(value) and _is_finite(value)
    if base is int:
        return _is_number(value) and (isinstance(value, int) or value.is_integer())
    if base is str:
        return isinstance(value, str)
    origin, arguments = get_origin(base), get_args(base)
    if origin is Literal:
        return any(choice == value and type(choice) is type(value) for choice in arguments)
    if _is_union(base):
        return any(accepts(member, value) for member in arguments)
    if _is_list(base):
        return isinstance(value, (list, tuple)) and _items_fit(value, origin, arguments)
    return (origin or base) in (dict, Mapping) and isinstance(value, Mapping)


def _coerce_items(value: list[Any] | tuple[Any, ...], annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    kinds = [kind for kind in arguments if kind is not Ellipsis] or [Any]
    padded = kinds + [kinds[-1]] * (len(value) - len(kinds))
    items = [coerce(item, kind) for item, kind in zip(value, padded, strict=False)]
    items += list(value[len(items) :])
    return tuple(items) if origin is tuple else items


def _items_fit(value: list[Any] | tuple[Any, ...], origin: Any, arguments: tuple[Any, ...]) -> bool:
    if not arguments:
        return True
    if origin is tuple and Ellipsis not in arguments:
        return len(value) == len(arguments) and all(
            accepts(kind, item) for kind, item in zip(arguments, value, strict=True)
        )
    return all(accepts(arguments[0], item) for item in value)


def _unwrap(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(annotation) is Annotated:
        base, *metadata = get_args(annotation)
        return base, tuple(metadata)
    return annotation, ()


def _bounds(metadata: Iterable[Any]) -> str:
    found = []
    for entry in metadata:
        for part in (entry, *getattr(entry, "metadata", ())):
            for name, sign in _BOUNDS:
                limit = getattr(part, name, None)
                if limit is not None:
                    found.append(f"{sign} {limit}")
    return " " + " and ".join(found) if found else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False  # an integer beyond the range of floats


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _is_list(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    if not isinstance(origin, type) or origin in (str, bytes, dict):
        return False
    return issubclass(origin, Iterable) and not issubclass(origin, Mapping) and _plain(origin)


def _plain(origin: type) -> bool:
    # Tensors are iterable too, but no JSON list is one.
    return origin.__module__ in ("builtins", "collections.abc", "typing")


def _is_json(annotation: Any) -> bool:
    base, _ = _unwrap(annotation)
    return get_origin(base) is not Callable and base is not Callable and not _is_torch(base)


def _is_torch(base: Any) -> bool:
    return str(getattr(base, "__module__", "")).split(".")[0] == "torch"


def _has(members: Iterable[Any], kind: type) -> bool:
    return any(_unwrap(member)[0] is kind for member in members)


def _is_int_literal_only(members: Iterable[Any]) -> bool:
    choices: list[Any] = []
    for member in members:
        base, _ = _unwrap(member)
        if base is bool:
            return False
        choices += get_args(base) if get_origin(base) is Literal else ()
    return bool(choices) and not any(isinstance(choice, bool) for choice in choices)


def _allows_int(member: Any) -> bool:
    base, _ = _unwrap(member)
    if get_origin(base) is Literal:
        return any(isinstance(choice, int) for choice in get_args(base))
    return base is int
