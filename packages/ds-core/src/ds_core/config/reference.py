"""Every key that a config may hold, read off the models: the only source of the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_core._values import describe, shown
from ds_core.config.explaining import section_class
from ds_core.config.loading import registered_sections
from ds_core.config.root import Config
from ds_core.config.section import Section, takes_auto
from ds_core.config.unsupported import UNSUPPORTED


class Key(NamedTuple):
    """One key of the config.

    Attributes:
        path: such as "zero_optimization.stage".
        allowed: its type and range in words.
        default: as JSON shows it; empty for a section.
        unit: of a number, such as "elements"; empty if it has none.
        owner: the package that honours it, such as "ds-zero".
        meaning: what it does.
    """

    path: str
    allowed: str
    default: str
    unit: str
    owner: str
    meaning: str


class RefusedKey(NamedTuple):
    """A key of DeepSpeed that is refused: why, and what to use instead."""

    path: str
    owner: str
    reason: str


def reference(sections: Mapping[str, type[Section]] | None = None) -> list[Key]:
    """Every key, ds-core's own first, then section by section.

    Args:
        sections: models of further top-level sections by key; default: those of the installed
            packages.
    """
    models = registered_sections() if sections is None else sections
    keys = list(_keys(Config, "", "ds-core"))
    for name, model in models.items():
        owner = _distribution(model)
        keys.append(Key(name, "an object", "", "", owner, _first_line(model)))
        keys += _keys(model, f"{name}.", owner)
    return keys


def refused(sections: Mapping[str, type[Section]] | None = None) -> list[RefusedKey]:
    """Every key that DeepSpeed has and that is refused by name, with the reason."""
    models = registered_sections() if sections is None else sections
    keys = [RefusedKey(key, "ds-core", UNSUPPORTED[key].reason) for key in UNSUPPORTED]
    keys += [RefusedKey(path, "ds-core", why) for path, why in _removed(Config, "")]
    for name, model in models.items():
        owner = _distribution(model)
        keys += [RefusedKey(path, owner, why) for path, why in _removed(model, f"{name}.")]
    return [key for key in keys if key.path not in models]


def as_markdown() -> str:
    """The whole reference as a page: a table per section, then the refused keys."""
    keys = reference()
    tops = {key.path.partition(".")[0]: key for key in reversed(keys)}
    grouped = {name: [k for k in keys if k.path.startswith(f"{name}.")] for name in sorted(tops)}
    single = [key for key in keys if not grouped[key.path.partition(".")[0]]]
    lines = ["## Keys at the top level", "", *_table(single)]
    for name, inside in grouped.items():
        if inside:
            top = tops[name]
            lines += ["", f"## {name}", "", f"{_cell(top.meaning)} Owner: {top.owner}.", ""]
            lines += _table(inside)
    lines += ["", "## Keys of DeepSpeed that are refused", ""]
    lines += ["| key | owner | why, and what to use instead |", "|---|---|---|"]
    lines += [f"| `{k.path}` | {k.owner} | {_cell(k.reason)} |" for k in refused()]
    return "\n".join(lines) + "\n"


def _table(keys: list[Key]) -> Iterator[str]:
    yield "| key | value | default | unit | owner | meaning |"
    yield "|---|---|---|---|---|---|"
    for key in keys:
        default = f"`{_cell(key.default)}`" if key.default else ""
        cells = (f"`{key.path}`", _cell(key.allowed), default, key.unit, key.owner)
        yield f"| {' | '.join(cells)} | {_cell(key.meaning)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _keys(model: type[BaseModel], prefix: str, owner: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        inner = section_class(field.annotation)
        default = "" if inner and field.default is not None else _default(field)
        allowed = describe(field.annotation, field.metadata)
        if takes_auto(field):
            allowed += ' or "auto"'
        meaning = field.description or ""
        yield Key(f"{prefix}{name}", allowed, default, _unit(field), owner, meaning)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}{_per_item(field)}.", owner)


def _removed(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    if issubclass(model, Section):
        yield from ((f"{prefix}{key}", why) for key, why in model.removed.items())
    for name, field in model.model_fields.items():
        inner = section_class(field.annotation)
        if inner is not None:
            yield from _removed(inner, f"{prefix}{name}{_per_item(field)}.")


def _per_item(field: FieldInfo) -> str:
    """How the path goes on into what a list or a mapping of sections holds."""
    text = str(field.annotation)
    return ".NAME" if "dict[" in text or "Mapping[" in text else "[]" if "tuple[" in text else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else shown(value)


def _unit(field: FieldInfo) -> str:
    extra: Any = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _distribution(model: type[BaseModel]) -> str:
    package = model.__module__.partition(".")[0]
    # An editable installation does not say which modules it has.
    return packages_distributions().get(package, [package.replace("_", "-")])[0]
