"""Who computes an op: every implementation that is installed, and the choice among them."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from functools import cache, lru_cache
from typing import Any

import torch

from ds_core import plugins
from ds_core.errors import OpError
from ds_core.seams.op import Implementation, Op

logger = logging.getLogger(__name__)

REFERENCE = "reference"


@lru_cache(maxsize=1)
def catalog() -> dict[str, Op]:
    """Every op of ds-core by name: one module of this package each."""
    package = importlib.import_module("ds_core.ops")
    found: dict[str, Op] = {}
    for module in pkgutil.iter_modules(package.__path__):
        op = getattr(importlib.import_module(f"ds_core.ops.{module.name}"), "OP", None)
        if isinstance(op, Op):
            found[op.name] = op
    return found


@lru_cache(maxsize=1)
def _implementations() -> tuple[Implementation, ...]:
    """What installed packages offer: each entry point is a callable that lists implementations."""
    found: list[Implementation] = []
    for name in sorted(plugins.registered("ops")):
        found += plugins.load("ops", name)()
    return tuple(found)


def available(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Implementations of an op, best first, each with why it cannot run there, or None."""
    _known(name)
    rows = {
        impl.name: impl.unavailable(device, dtype) for impl in _implementations() if impl.op == name
    }
    rows[REFERENCE] = None
    return rows


@cache
def select(name: str, device: torch.device, dtype: torch.dtype, impl: str | None = None) -> Any:
    """The callable that computes op `name` for tensors of such a device and dtype.

    Args:
        impl: which implementation; None: the first that can run, the reference at last.

    Raises OpError if there is no such op or implementation, or if it cannot run there.
    """
    op = _known(name)
    rows = available(name, device, dtype)
    if impl is not None:
        if impl not in rows:
            raise OpError(f"op {name!r}: no implementation {impl!r}; there are {', '.join(rows)}")
        if rows[impl] is not None:
            raise OpError(f"op {name!r}: {impl!r} cannot run on {device.type}: {rows[impl]}")
        chosen = impl
    else:
        chosen = next(row for row, reason in rows.items() if reason is None)
        logger.info("op %s on %s, %s: %s", name, device.type, dtype, chosen)
    if chosen == REFERENCE:
        return op.reference
    return next(i for i in _implementations() if i.op == name and i.name == chosen)


def run(name: str, x: torch.Tensor, *args: Any, impl: str | None = None, **kwargs: Any) -> Any:
    """Compute op `name` on its arguments, the first of which decides device and dtype."""
    return select(name, x.device, x.dtype, impl)(x, *args, **kwargs)


def _known(name: str) -> Op:
    ops = catalog()
    if name not in ops:
        raise OpError(f"there is no op {name!r}; there are {', '.join(sorted(ops))}")
    return ops[name]
