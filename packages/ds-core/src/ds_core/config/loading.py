"""From a JSON document to a `Config`: every problem of the document in one error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ds_core import _values, lr_schedules, optimizers, plugins
from ds_core.config import batch, formats, low_precision, problems
from ds_core.config.document import Document, read
from ds_core.config.root import Config, Origin
from ds_core.config.section import Section
from ds_core.config.sections import Bf16Section, OptimizerSection, SchedulerSection
from ds_core.config.unsupported import UNSUPPORTED
from ds_core.errors import ConfigError, PluginError

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_NO_BATCH = (
    'train_batch_size: got "auto", which only Hugging Face\'s Trainer fills in; give it or '
    "train_micro_batch_size_per_gpu"
)
#: Other spellings of ds-core's keys that DeepSpeed accepts.
_ALIASES = {"bfloat16": "bf16"}


def load(
    source: Mapping[str, Any] | str | os.PathLike[str],
    *,
    world_size: int = 1,
    sections: Mapping[str, type[Section]] | None = None,
) -> Config:
    """The complete, consistent config that a mapping or a JSON file describes.

    Args:
        source: a mapping, or the path of a JSON file.
        world_size: data-parallel ranks, against which the batch sizes are solved.
        sections: models of further top-level sections by key; default: those of the installed
            packages.

    Raises ConfigError naming every key that is unknown, misspelt, of a wrong type, inconsistent,
    not supported, or of a package that is not installed, all at once.
    """
    if not isinstance(world_size, int) or world_size < 1:
        raise ConfigError(f"world_size: got {world_size!r}, expected an integer >= 1")
    document = read(source)
    models = registered_sections() if sections is None else dict(sections)
    return _Loader(document, models, world_size).config()


def registered_sections() -> dict[str, type[Section]]:
    """The section models of the installed packages by top-level key.

    Raises PluginError if one clashes with a key of ds-core, or is no `Section`.
    """
    models = {}
    for name in sorted(plugins.registered("config")):
        model = plugins.load("config", name)
        if not (isinstance(model, type) and issubclass(model, Section)):
            raise PluginError(
                f"ds_core.config: {name!r} is {model!r}, expected a class derived from "
                f"ds_core.config.Section; report it to the package that registers it"
            )
        if name in Config.model_fields:
            raise PluginError(
                f"ds_core.config: {name!r} is a key of ds-core itself and cannot be registered; "
                f"uninstall the package that does ({model.__module__})"
            )
        models[name] = model
    return models


class _Loader:
    """One pass over a document, collecting what is wrong with it."""

    def __init__(
        self, document: Document, models: Mapping[str, type[Section]], world_size: int
    ) -> None:
        self._document = document
        self._models = models
        self._world_size = world_size
        self._problems = list(document.problems)
        self._origins: dict[str, Origin] = {}
        self._own: dict[str, Any] = {}
        self._foreign: dict[str, Any] = {}

    def config(self) -> Config:
        """The config. Raises ConfigError with all problems of the document."""
        self._sort_keys()
        sections = self._build_sections()
        self._choose_low_precision()
        self._check_factory("optimizer", OptimizerSection, optimizers.problems)
        self._check_factory("scheduler", SchedulerSection, lr_schedules.problems)
        self._apply_batch_policies(sections)
        self._solve_batch()
        config = self._build_root()
        if config is not None:
            self._problems += formats.conflicts(
                config.bf16, config.fp16, config.torch_autocast, config.data_types
            )
        if self._problems or config is None:
            raise problems.fail(self._problems, self._document.name)
        config._sections.update(sections)
        config._origins.update(self._origins)
        return config

    def _sort_keys(self) -> None:
        """Tell ds-core's keys from those of packages; refuse all others."""
        for key, value in self._document.data.items():
            name = _ALIASES.get(key, key)
            if name != key and name in self._document.data:
                self._problems.append(
                    f"{key}: another name of {name}, which is given too; keep one"
                )
            elif name in Config.model_fields:
                self._own[name] = value
                self._note_origins(name, value)
            elif key in self._models:
                self._foreign[key] = value
                self._note_origins(key, value)
            elif not (key in UNSUPPORTED and UNSUPPORTED[key].is_off(value)):
                self._problems.append(f"{key}: {self._why_not(key)}")

    def _why_not(self, key: str) -> str:
        """Why a top-level key cannot be honoured, and what to do."""
        providers = plugins.KNOWN_PROVIDERS["config"]
        if key in providers:
            package = providers[key]
            return (
                f"section {key} belongs to {package}, which is not installed: pip install {package}"
            )
        if key in UNSUPPORTED:
            return UNSUPPORTED[key].reason
        valid = {*Config.model_fields, *self._models}
        hint = _values.nearest(key, {*valid, *providers, *UNSUPPORTED})
        return f"unknown key; did you mean {hint}?" if hint else _values.unknown_key(key, valid)

    def _note_origins(self, path: str, value: Any) -> None:
        self._origins[path] = "auto" if value == "auto" else "file"
        if isinstance(value, dict):
            for key, item in value.items():
                self._note_origins(f"{path}.{key}", item)

    def _build_sections(self) -> dict[str, Section]:
        built = {}
        for name, model in self._models.items():
            try:
                built[name] = model.model_validate(self._foreign.get(name, {}))
            except ValidationError as error:
                self._problems += problems.translate(error, model, (name,))
        return built

    def _choose_low_precision(self) -> None:
        """Complete the optimizer's params by what the bf16 section says of states and rounding."""
        try:
            bf16 = Bf16Section.model_validate(self._own.get("bf16", {}))
            optimizer = OptimizerSection.model_validate(self._own.get("optimizer"))
        except ValidationError:
            return  # absent, or reported with the other keys of ds-core
        derived, found = low_precision.params_for(bf16, optimizer.type, optimizer.params)
        self._problems += found
        if derived:
            params = {**optimizer.params, **derived}
            self._own["optimizer"] = {**optimizer.model_dump(exclude_unset=True), "params": params}
            self._origins.update((f"optimizer.params.{key}", "derived") for key in derived)

    def _check_factory(self, key: str, model: type[Section], find: optimizers.Finder) -> None:
        """Check `type` and `params` against the class they name, if the section is well formed."""
        try:
            section = model.model_validate(self._own.get(key))
        except ValidationError:
            return  # absent, or reported with the other keys of ds-core
        if isinstance(section, (OptimizerSection, SchedulerSection)):
            found = find(section.type, section.params)
            self._problems += [f"{key}.{path}: {message}" for path, message in found]

    def _apply_batch_policies(self, sections: Mapping[str, Section]) -> None:
        """Let a section that chooses the batch (elasticity) fill in the corners."""
        for name, section in sections.items():
            if not isinstance(section, batch.BatchPolicy):
                continue
            try:
                chosen = section.solve_batch(self._world_size)
            except ConfigError as error:
                self._problems.append(str(error))
                chosen = batch.Batch(self._world_size, 1, 1)
            if chosen is None:
                continue
            given = [key for key in _BATCH_KEYS if self._own.get(key) not in (None, "auto")]
            if given and not section.overrules:
                self._problems.append(
                    f"{', '.join(given)}: given, but {name} chooses the batch; remove "
                    f"{'it' if len(given) == 1 else 'them'}, or disable {name}"
                )
            corners = (chosen.train, chosen.micro, chosen.steps)
            for key, corner in zip(_BATCH_KEYS, corners, strict=True):
                self._own[key] = corner
                self._origins[key] = "derived"

    def _solve_batch(self) -> None:
        """Fill in the missing corners of the batch triangle."""
        given = [self._own.pop(key, None) for key in _BATCH_KEYS]
        corners = [_corner(value) for value in given]
        if any(
            corner is None and value not in (None, "auto")
            for corner, value in _pairs(corners, given)
        ):
            # Malformed: let the model say so, and keep it from calling the others missing.
            corners = [1 if v in (None, "auto") else v for v in given]
        else:
            try:
                solved = batch.solve(*corners, world_size=self._world_size)
                corners = [solved.train, solved.micro, solved.steps]
            except ConfigError as error:
                is_left_to_others = "auto" in given and corners[:2] == [None, None]
                self._problems.append(_NO_BATCH if is_left_to_others else str(error))
                corners = [1, 1, 1]
        for key, value, corner in zip(_BATCH_KEYS, given, corners, strict=True):
            self._own[key] = corner
            if value is None:
                self._origins[key] = "derived"

    def _build_root(self) -> Config | None:
        try:
            return Config.model_validate(self._own)
        except ValidationError as error:
            self._problems += problems.translate(error, Config)
            return None


def _corner(value: Any) -> int | None:
    """A corner of the batch triangle as a positive integer, None if it is not one."""
    if not _values.accepts(int, value) or value <= 0:
        return None
    return int(value)


def _pairs(corners: list[int | None], given: list[Any]) -> zip[tuple[int | None, Any]]:
    return zip(corners, given, strict=True)
