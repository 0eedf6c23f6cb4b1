"""pydantic's validation errors in the words of the config: path, value, what is allowed."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ds_core._values import describe, mismatch, shown, unknown_key
from ds_core.config.section import Section, takes_auto
from ds_core.errors import ConfigError


class _Place(NamedTuple):
    """Where an error is: its path in the JSON and what the model says about it."""

    path: str
    owner: type[BaseModel] | None
    field: FieldInfo | None
    annotation: Any


def translate(
    error: ValidationError, model: type[BaseModel], prefix: Iterable[str] = ()
) -> list[str]:
    """One line per wrong place of the input, each starting with the path of the key.

    Args:
        error: what validating against `model` raised.
        model: the class that was validated against.
        prefix: keys that lead from the top of the config to `model`.
    """
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        place = _locate(model, detail["loc"], tuple(prefix))
        # A union reports one error per member; they are one problem for the reader.
        lines.setdefault(place.path, f"{place.path}: {_message(dict(detail), place)}")
    return list(lines.values())


def fail(problems: list[str], source: str | None) -> ConfigError:
    """The error that lists all problems of one config, one a line."""
    where = f"{source}: " if source else ""
    if len(problems) == 1:
        return ConfigError(where + problems[0])
    listing = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(f"{where or 'config: '}{len(problems)} problems{listing}")


def _message(detail: Mapping[str, Any], place: _Place) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "refused":
        return str(detail["ctx"]["message"])
    if kind == "extra_forbidden":
        return _unknown(place)
    if kind == "missing":
        return f"missing; expected {_expected(place)}"
    if kind == "value_error":
        return str(detail["msg"]).removeprefix("Value error, ")
    if kind == "invalid_key":
        return f"keys are strings in JSON, got {shown(value)}"
    return mismatch(value, _expected(place))


def _unknown(place: _Place) -> str:
    key = place.path.rpartition(".")[2]
    owner = place.owner
    if owner is None:
        return unknown_key(key, ())
    removed = owner.removed if issubclass(owner, Section) else {}
    return removed.get(key) or unknown_key(key, owner.model_fields)


def _expected(place: _Place) -> str:
    if place.field is None:
        return describe(place.annotation)
    auto = ' or "auto"' if takes_auto(place.field) else ""
    return describe(place.annotation, place.field.metadata) + auto


def _locate(
    model: type[BaseModel], location: tuple[int | str, ...], prefix: tuple[str, ...]
) -> _Place:
    path = ".".join(prefix)
    owner: type[BaseModel] | None = None
    field: FieldInfo | None = None
    annotation: Any = model
    for part in location:
        inner = _container(annotation)
        if isinstance(part, int) and get_origin(inner) in (list, tuple):
            path, field = f"{path}[{part}]", None
            annotation = get_args(inner)[0]
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            path, owner = _join(path, str(part)), inner
            field = inner.model_fields.get(str(part))
            annotation = field.annotation if field else Any
        elif get_origin(inner) is dict:
            path, field = _join(path, str(part)), None
            annotation = get_args(inner)[1]
        else:
            break  # the rest names a member of a union, not a key
    return _Place(path, owner, field, annotation)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _container(annotation: Any) -> Any:
    """The one member of an optional or annotated type that can hold further keys."""
    if get_origin(annotation) is Annotated:
        return _container(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [_container(member) for member in get_args(annotation)]
        holders = [m for m in members if get_origin(m) or hasattr(m, "model_fields")]
        return holders[0] if holders else annotation
    return annotation
