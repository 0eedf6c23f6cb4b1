"""A config laid open: every effective value with its origin, and the schema of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, Field, create_model

from ds_core import lr_schedules, optimizers
from ds_core.config.loading import registered_sections
from ds_core.config.root import Config, Origin
from ds_core.config.section import Section

_AUTO: dict[str, Any] = {"const": "auto"}


class Row(NamedTuple):
    """One effective value of a config.

    Attributes:
        key: its path, such as "zero_optimization.stage".
        value: what it is, as JSON has it.
        origin: "file", "default", "derived" (arithmetic on other values) or "auto".
        meaning: what it does; empty for what is passed to an optimizer or schedule.
    """

    key: str
    value: Any
    origin: Origin
    meaning: str = ""


def explain(config: Config) -> list[Row]:
    """Every effective value of a config, in the order of its sections.

    Parameters that the optimizer and the schedule take by default are listed too.
    """
    values = config.model_dump(mode="json")
    for key, complete in (
        ("optimizer", optimizers.effective_params),
        ("scheduler", lr_schedules.effective_params),
    ):
        if values[key] is not None:
            values[key]["params"] = complete(values[key]["type"], values[key]["params"])
    return list(_rows(config, values))


def json_schema(sections: Mapping[str, type[Section]] | None = None) -> dict[str, Any]:
    """The JSON Schema of a config file, for editors.

    Args:
        sections: models of further top-level sections by key; default: those of the installed
            packages.
    """
    models = registered_sections() if sections is None else sections
    extra: dict[str, Any] = {
        name: (model, Field(default_factory=model)) for name, model in models.items()
    }
    whole: type[BaseModel] = create_model("Config", __base__=Config, __doc__=None, **extra)
    schema = whole.model_json_schema(mode="validation")
    properties = schema["properties"]
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        properties[key] = _with_choices(properties[key], _AUTO, {"type": "null"})
    properties["bfloat16"] = {**properties["bf16"], "description": "Another name of bf16."}
    schema.pop("required", None)
    schema["anyOf"] = [
        {"required": ["train_batch_size"]},
        {"required": ["train_micro_batch_size_per_gpu"]},
    ]
    schema["title"] = "Training config"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _with_choices(schema: dict[str, Any], *choices: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in schema.items() if k in ("title", "description", "default")}
    value = {k: v for k, v in schema.items() if k not in kept}
    return {**kept, "anyOf": [value, *choices]}


def _rows(config: Config, values: Mapping[str, Any]) -> Iterator[Row]:
    models = {name: type(section) for name, section in config.sections().items()}
    for path, value in _leaves(values, ""):
        yield Row(path, value, config.origin(path), _meaning(path, models))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, list(value) if isinstance(value, tuple) else value


def _meaning(path: str, sections: Mapping[str, type[Section]]) -> str:
    """The description of the field at a path, if it has one."""
    first, *rest = path.split(".")
    model: Any = sections.get(first, Config)
    names = rest if first in sections else [first, *rest]
    description = ""
    for name in names:
        field = getattr(model, "model_fields", {}).get(name)
        if field is None:
            return ""
        description, model = field.description or "", section_class(field.annotation)
    return description


def section_class(annotation: Any) -> type[Section] | None:
    """The section model within an annotation such as `Inner | None` or `dict[str, Inner]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_class(member) for member in get_args(annotation))
    return next((model for model in found if model is not None), None)
