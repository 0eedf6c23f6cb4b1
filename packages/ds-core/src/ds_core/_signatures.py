"""Checking what a config passes to a class before the class sees it.

`optimizer.params` and `scheduler.params` go to constructors of torch or of ds-core. Their
signatures are the truth about which keys exist and what they may be.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from ds_core._values import accepts, coerce, describe, mismatch, unknown_key

#: A key below the section, such as "params.lr", and what is wrong with it.
Problem = tuple[str, str]


def parameters(cls: type, *, hidden: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """The keyword parameters of `cls` by name, annotations resolved, without those in `hidden`."""
    constructor: Any = inspect.getattr_static(cls, "__init__")
    try:
        hints = get_type_hints(constructor)
    except (NameError, TypeError):
        # An annotation that exists for type checkers only: the default's type still tells.
        hints = {}
    found = {}
    for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
        if name in hidden or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        found[name] = parameter.replace(annotation=_annotation(parameter, hints.get(name)))
    return found


def check(
    cls: type,
    params: Mapping[str, Any],
    *,
    hidden: Collection[str] = (),
    also: Collection[str] = (),
) -> list[Problem]:
    """Every reason why `cls(**params)` would fail, judged by its signature.

    Args:
        cls: the class to construct.
        params: what the config gives it.
        hidden: parameters of `cls` that the config may not give.
        also: further keys that the caller accepts; they are not checked here.
    """
    known = parameters(cls, hidden=hidden)
    problems = []
    for key, value in params.items():
        if key in also:
            continue
        if key not in known:
            problems.append((f"params.{key}", unknown_key(key, {*known, *also})))
        elif not accepts(known[key].annotation, value):
            expected = describe(known[key].annotation)
            problems.append((f"params.{key}", mismatch(value, expected)))
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in params:
            expected = describe(parameter.annotation)
            problems.append((f"params.{key}", f"missing; {cls.__name__} needs {expected}"))
    return problems


def coerced(cls: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` that passed `check`, with integral floats and lists as the signature wants them."""
    known = parameters(cls)
    return {
        key: coerce(value, known[key].annotation) if key in known else value
        for key, value in params.items()
    }


def defaults(cls: type, *, hidden: Collection[str] = ()) -> dict[str, Any]:
    """The default of every parameter of `cls` that has one."""
    known = parameters(cls, hidden=hidden)
    return {key: p.default for key, p in known.items() if p.default is not p.empty}


def _annotation(parameter: inspect.Parameter, hint: Any) -> Any:
    if hint is not None:
        return hint
    default = parameter.default
    if isinstance(default, (bool, int, float, str)):
        return type(default)
    return Any
