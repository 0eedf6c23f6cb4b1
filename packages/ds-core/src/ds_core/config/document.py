"""Reading a config from a JSON file or a mapping, before anything in it is judged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ds_core._values import shown
from ds_core.errors import ConfigError


@dataclass(frozen=True)
class Document:
    """A config as it was written.

    Attributes:
        name: the file, for messages; None for a mapping.
        data: plain dicts, lists and values, shared with nobody.
        problems: what is wrong with the writing itself: keys given twice.
    """

    name: str | None
    data: dict[str, Any]
    problems: list[str] = field(default_factory=list)


class _Pairs(dict[str, Any]):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = sorted({name for name in names if names.count(name) > 1})


def read(source: Mapping[str, Any] | str | os.PathLike[str]) -> Document:
    """The document that `source` holds.

    Args:
        source: a mapping, or the path of a JSON file (UTF-8).

    Raises ConfigError if the file cannot be read, is not JSON (with line and column), or does not
    hold an object.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if isinstance(source, str) and source.lstrip().startswith("{"):
        raise ConfigError(
            "config: got JSON text, expected a path or a mapping; use json.loads(text)"
        )
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"config: got {type(source).__name__}, expected a mapping or the path of a JSON file"
        )
    return _from_file(Path(source))


def _from_mapping(source: Mapping[str, Any]) -> Document:
    problems: list[str] = []
    data = _plain(source, "", problems)
    return Document(None, data, problems)


def _from_file(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a config is a mapping or a JSON file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    data = _parse(text, path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {shown(data)}, expected a JSON object")
    problems: list[str] = []
    return Document(str(path), _plain(data, "", problems), problems)


def _parse(text: str, path: Path) -> Any:
    def refuse_constant(name: str) -> NoReturn:
        raise ConfigError(f"{path}: {name} is not JSON; write a finite number")

    try:
        return json.loads(text, object_pairs_hook=_Pairs, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        hint = _syntax_hint(text, error.pos)
        raise ConfigError(f"{where}: not valid JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a config") from None


def _syntax_hint(text: str, position: int) -> str:
    here, before = text[position : position + 2], text[:position].rstrip()
    if not text.strip():
        return " (the file is empty)"
    if here.startswith("#") or here in ("//", "/*"):
        return " (JSON has no comments)"
    if here[:1] in ("}", "]") and before.endswith(","):
        return " (a comma before the closing bracket)"
    if here.startswith("'"):
        return " (strings take double quotes)"
    if here[:1] in ("T", "F", "N"):
        return " (JSON writes true, false, null)"
    return ""


def _plain(value: Any, path: str, problems: list[str]) -> Any:
    """A copy in plain dicts and lists, noting keys that are repeated or are not strings."""
    if isinstance(value, Mapping):
        for name in getattr(value, "repeated", ()):
            problems.append(f"{_join(path, name)}: given more than once; keep one of them")
        copy = {}
        for key, item in value.items():
            if isinstance(key, str):
                copy[key] = _plain(item, _join(path, key), problems)
            else:
                where = path or "config"
                problems.append(f"{where}: keys are strings in JSON, got {shown(key)}")
        return copy
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
