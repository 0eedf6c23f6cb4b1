"""From what a program of DeepSpeed passes as a configuration to one that ds_core takes."""

from __future__ import annotations

import base64
import binascii
import importlib
import importlib.util
import json
import logging
import math
import os
import types
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from deepspeed.runtime.config_table import (
    HOW_NOT_WHICH,
    LEFT_OUT,
    READ_BY_KEY,
    RENAMED,
    SWITCHES,
    VALUES,
)
from ds_core import plugins
from ds_core.config import Config, Section
from ds_core.config.loading import registered_sections
from ds_core.config.unsupported import UNSUPPORTED
from ds_core.errors import ConfigError

logger = logging.getLogger("DeepSpeed")

_TRUE = frozenset(("true", "t", "yes", "y", "on", "1"))
_FALSE = frozenset(("false", "f", "no", "n", "off", "0"))
_OTHER_NAMES = {"bfloat16": "bf16"}


def read_config(source: Any) -> dict[str, Any]:
    """The configuration as the program wrote it: the dict itself, or what a file or text holds.

    Args:
        source: a dict, the path of a JSON file, or JSON as URL-safe base64.

    Raises ConfigError if it is neither, or a key is given twice.
    """
    if isinstance(source, dict):
        return source
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"config: got {type(source).__name__}, expected a dict, the path of a JSON file, or "
            f"JSON as URL-safe base64"
        )
    if os.path.exists(source):
        with open(source, encoding="utf-8-sig") as file:
            return _parsed(file.read(), os.fspath(source))
    try:
        text = base64.urlsafe_b64decode(os.fspath(source)).decode("utf-8")
    except (binascii.Error, ValueError):
        raise ConfigError(
            f"config: got {os.fspath(source)!r}, which is no existing file and no base64; expected "
            f"a dict, the path of a JSON file, or JSON as URL-safe base64"
        ) from None
    return _parsed(text, "config")


def _parsed(text: str, name: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [key for key, _ in pairs]
        repeated = sorted({key for key in names if names.count(key) > 1})
        if repeated:
            raise ConfigError(f"{name}: {', '.join(repeated)}: given more than once; keep one")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        # The original reads Hjson: JSON with comments.
        if importlib.util.find_spec("hjson") is None:
            raise ConfigError(
                f"{name}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}; comments need "
                f"the package hjson"
            ) from None
        hjson: Any = importlib.import_module("hjson")
        try:
            found = hjson.loads(text, object_pairs_hook=once)
        except ValueError as worse:
            raise ConfigError(f"{name}: not valid JSON or Hjson: {worse}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: got {type(found).__name__}, expected a JSON object")
    return found


def translate(user: Mapping[str, Any], *, num_nodes: int = 1) -> tuple[dict[str, Any], list[str]]:
    """The same configuration without what only DeepSpeed accepts, and a warning for each such key.

    What would change the results is left in, for `ds_core.config.load` to refuse with its reason.

    Args:
        user: as the program wrote it; not changed.
        num_nodes: machines that take part.
    """
    return _Translation(num_nodes).of(user)


class _Translation:
    """One pass over a configuration."""

    def __init__(self, num_nodes: int) -> None:
        self._warnings: list[str] = []
        self._num_nodes = num_nodes
        self._models = registered_sections()

    def of(self, user: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """See `translate`."""
        result: dict[str, Any] = {}
        for key, value in user.items():
            value = VALUES.get(key, {}).get(value, value) if _is_hashable(value) else value
            model = self._model(_OTHER_NAMES.get(key, key))
            if key == "steps_per_print" and isinstance(value, float) and math.isinf(value):
                continue  # never: accelerate's way to say so
            if not self._is_known(key):
                self._leave_out(key, f"unknown key, which DeepSpeed ignores{self._hint(key)}")
            elif self._is_left_out(key, value):
                if not _asks_for_nothing(key, value):
                    self._leave_out(key, LEFT_OUT[key].reason)
            elif key == "zero_optimization" and isinstance(value, bool):
                result[key] = {"stage": int(value)}
                self._note(f'{key}: true or false is deprecated; use {{"stage": {int(value)}}}')
            elif key == "activation_checkpointing" and not _chooses_blocks(value):
                if any(value.values()):
                    self._leave_out(key, HOW_NOT_WHICH)
            elif key in ("optimizer", "scheduler") and not _names_a_type(value):
                self._leave_out(key, "it names no type, and DeepSpeed builds none then")
            elif model is not None and isinstance(value, Mapping):
                result[key] = self._section(key, _OTHER_NAMES.get(key, key), value, model)
            elif model is None and key in Config.model_fields:
                result[key] = _from_text(value, Config.model_fields[key].annotation)
            else:
                result[key] = value
        self._settle_clipping(result)
        self._settle_offload(result)
        self._settle_params(result)
        level = result.get("log_level")
        if isinstance(level, str):
            result["log_level"] = level.lower()
        return result, self._warnings

    def _section(
        self, path: str, name: str, values: Mapping[str, Any], model: type[Section]
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in values.items():
            here, known = f"{path}.{key}", f"{name}.{key}"
            if known in RENAMED:
                new = RENAMED[known].rpartition(".")[2]
                if new in values:
                    raise ConfigError(f"{here}: another name of {new}, which is given too")
                self._note(f"{here}: deprecated or internal name; use {new}")
                key, known = new, RENAMED[known]
            field = model.model_fields.get(key)
            if known in SWITCHES:
                self._switch(here, SWITCHES[known], value, values, result)
            elif self._is_left_out(known, value):
                default = None if field is None else field.get_default()
                if value not in (default, "auto"):
                    self._leave_out(here, LEFT_OUT[known].reason)
            elif field is None and name in READ_BY_KEY and known not in LEFT_OUT:
                self._leave_out(here, "unknown key, which DeepSpeed ignores")
            elif field is None:
                result[key] = value
            elif value == "auto" and (
                key == "enabled" or "auto" not in _literals(field.annotation)
            ):
                continue  # the original's own default, as if the key were absent
            elif isinstance(value, Mapping) and (inner := _inner(field.annotation)) is not None:
                result[key] = self._section(here, known, value, inner)
            else:
                result[key] = _from_text(value, field.annotation)
        return result

    def _switch(
        self, here: str, to: str, value: Any, values: Mapping[str, Any], result: dict[str, Any]
    ) -> None:
        self._note(f'{here}: deprecated; use "{to}": {{"device": "cpu"}}')
        if values.get(to) is not None:
            raise ConfigError(f"{here}: the deprecated form of {to}, which is given too; keep one")
        if value in (True, "true", "True"):
            result[to] = {"device": "cpu"}

    def _settle_clipping(self, result: dict[str, Any]) -> None:
        """A bound below 0 is none: the original clips if it is more than 0."""
        bound = result.get("gradient_clipping")
        if isinstance(bound, int | float) and bound < 0:
            result["gradient_clipping"] = 0.0
            self._note(f"gradient_clipping: {bound} is below 0, so gradients are not clipped")

    def _settle_offload(self, result: dict[str, Any]) -> None:
        """What has nothing to offload at a stage is not looked at by the original."""
        zero = result.get("zero_optimization")
        if not isinstance(zero, dict):
            return
        stage = zero.get("stage", 0)
        for key, least in (("offload_optimizer", 1), ("offload_param", 3), ("zenflow", 1)):
            section = zero.get(key)
            if stage in range(least) and isinstance(section, Mapping):
                if section.get("device") != "none":
                    self._leave_out(
                        f"zero_optimization.{key}", f"at stage {stage} there is nothing to offload"
                    )
                del zero[key]

    def _settle_params(self, result: dict[str, Any]) -> None:
        optimizer = result.get("optimizer")
        params = optimizer.get("params") if isinstance(optimizer, dict) else None
        if isinstance(optimizer, dict) and isinstance(params, Mapping):
            kept = dict(params)
            for key in list(kept):
                path = f"optimizer.params.{key}"
                if path in LEFT_OUT:
                    if kept[key] is not True:
                        self._leave_out(path, LEFT_OUT[path].reason)
                    del kept[key]
            optimizer["params"] = kept

    # ------------------------------------------------------------------ questions

    def _model(self, name: str) -> type[Section] | None:
        if name in self._models:
            return self._models[name]
        field = Config.model_fields.get(name)
        return None if field is None else _inner(field.annotation)

    def _is_known(self, key: str) -> bool:
        providers = plugins.KNOWN_PROVIDERS["config"]
        return any(key in known for known in self._known(providers))

    def _known(self, providers: Mapping[str, str]) -> tuple[Mapping[str, Any], ...]:
        return (
            *(Config.model_fields, self._models, UNSUPPORTED),
            *(providers, LEFT_OUT, _OTHER_NAMES),
        )

    def _hint(self, key: str) -> str:
        everything = [name for known in self._known({}) for name in known if "." not in name]
        close = get_close_matches(key, everything, n=1, cutoff=0.75)
        return f"; did you mean {close[0]}?" if close else ""

    def _is_left_out(self, path: str, value: Any) -> bool:
        if path not in LEFT_OUT or not LEFT_OUT[path].if_value(value):
            return False
        return path != "checkpoint.use_node_local_storage" or value is False or self._num_nodes == 1

    def _leave_out(self, path: str, reason: str) -> None:
        self._note(f"{path}: accepted without effect: {reason}")

    def _note(self, text: str) -> None:
        self._warnings.append(text)


def _asks_for_nothing(key: str, value: Any) -> bool:
    """Whether a top-level value is the default, or switches its feature off."""
    field = Config.model_fields.get(key)
    if field is not None:
        return bool(value == field.get_default())
    return key in UNSUPPORTED and UNSUPPORTED[key].is_off(value)


def _chooses_blocks(value: Any) -> bool:
    """Whether the section says which blocks are computed again, which only ds_core's can."""
    return not isinstance(value, Mapping) or value.get("blocks") is not None


def _names_a_type(value: Any) -> bool:
    return not isinstance(value, Mapping) or value.get("type") is not None


def _is_hashable(value: Any) -> bool:
    return isinstance(value, str | int | float | None)


def _members(annotation: Any) -> list[Any]:
    """The members of a possibly annotated, possibly optional type."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [each for member in get_args(annotation) for each in _members(member)]
    return [annotation]


def _inner(annotation: Any) -> type[Section] | None:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


def _literals(annotation: Any) -> list[Any]:
    return [
        value
        for member in _members(annotation)
        if get_origin(member) is Literal
        for value in get_args(member)
    ]


def _from_text(value: Any, annotation: Any) -> Any:
    """A number or switch that was written as text, or a switch as 0 or 1, as the original takes."""
    members = _members(annotation)
    if isinstance(value, int) and not isinstance(value, bool):
        return bool(value) if bool in members and int not in members and value in (0, 1) else value
    if not isinstance(value, str) or str in members or value in _literals(annotation):
        return value
    if bool in members and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    wants_int = int in members or any(isinstance(each, int) for each in _literals(annotation))
    try:
        number = float(value)
    except ValueError:
        return value
    if wants_int and number.is_integer():
        return int(number)
    return number if float in members else value
