"""Modules whose names live elsewhere: found on first use, so that importing costs nothing.

Every module of this package says in one table where each of its names lives in ds_core, ds_ops or
ds_zero, and for names that are not provided what to use instead. Such a name can be imported, or
the `import` lines of a program that never uses it would fail; whatever is done with it raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deepspeed._absent import reason_for
from deepspeed._stand_in import not_provided


def names_of(
    module: str,
    homes: Mapping[str, str],
    *,
    submodules: Iterable[str] = (),
    missing: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` (PEP 562) of a module.

    Args:
        module: its `__name__`.
        homes: "package.module:name", or "package.module" for a module, of each name.
        submodules: found as attributes without an import of their own.
        missing: what to use instead of each name that is not provided.
    """
    children, absent = frozenset(submodules), missing or {}

    def getattr_(name: str) -> Any:
        if name in homes:
            home, _, attribute = homes[name].partition(":")
            found = importlib.import_module(home)
            return getattr(found, attribute) if attribute else found
        if name in children:
            return importlib.import_module(f"{module}.{name}")
        if name in absent:
            return not_provided(f"{module}.{name}", absent[name])
        if reason_for(f"{module}.{name}") is not None:
            return importlib.import_module(f"{module}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_, lambda: sorted({*homes, *children, *absent})
