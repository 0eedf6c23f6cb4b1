"""Who computes an op: every implementation that is installed, and the choice among them.

The choice is made once per op and kind of device, the highest priority first, among those that
can run. Three things override it:

* `DS_OPS_IMPL="rms_norm=torch,*=reference"` in the environment, for the whole process;
* `with ops.use(rms_norm="torch"):` for a block;
* `ops.run("rms_norm", ..., impl="torch")` for a call.

What is named so and cannot run is an error. So is an implementation that should build and does
not: it is never passed over. One that is meant for such a device and cannot exist here (no
compiler) is passed over with a warning, once, or refused with `DS_OPS_FALLBACK=error`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from ds_core import _env, _values, plugins
from ds_core.errors import OpError
from ds_core.ops import library
from ds_core.ops.reference import Reference
from ds_core.seams.op import Implementation, Op

logger = logging.getLogger(__name__)

_PACKAGE = "ds_core.ops"
#: Names and namespaces of the ops that are operators of torch.
_defined: set[tuple[str, str]] = set()
#: What `use` has put in place of the choice: implementation by op, "*" for all others.
_used: dict[str, str] = {}


def catalog() -> dict[str, Op]:
    """Every op of ds-core by name."""
    return {name: get(name) for name in names()}


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The names of all ops, sorted."""
    package = importlib.import_module(_PACKAGE)
    found: list[str] = []
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{_PACKAGE}.{module.name}")
        found += [op.name for op in getattr(loaded, "OPS", ())]
    return tuple(sorted(found))


@cache
def get(name: str) -> Op:
    """The op of that name. Raises OpError if there is none."""
    for module in _homes(name):
        for op in getattr(importlib.import_module(module), "OPS", ()):
            if op.name == name:
                found: Op = op
                return found
    raise OpError(_no_op(name))


def _no_op(name: str) -> str:
    """That there is no such op, and which was meant, or which there are."""
    guess = _values.nearest(name, names())
    if guess is None:
        return f"there is no op {name!r}; there are {', '.join(names())}"
    return f"there is no op {name!r}; did you mean {guess}? `ds ops report` shows all"


def _homes(name: str) -> Iterator[str]:
    """Modules in which an op may be: that of its name, without imports of others, then all."""
    stem = f"{_PACKAGE}.{name.removesuffix('_').removesuffix('_backward')}"
    if importlib.util.find_spec(stem) is not None:
        yield stem
    package = importlib.import_module(_PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        yield f"{_PACKAGE}.{module.name}"


@lru_cache(maxsize=1)
def _installed() -> tuple[Implementation, ...]:
    """What installed packages offer: each entry point is a callable that lists implementations."""
    found: list[Implementation] = []
    for name in sorted(plugins.registered("ops")):
        found += plugins.load("ops", name)()
    return tuple(found)


def implementations(name: str) -> list[Implementation]:
    """The implementations of an op, the one that is preferred first, the reference last."""
    op = get(name)
    own = [impl for impl in _installed() if impl.op == name]
    return [*sorted(own, key=lambda impl: -impl.priority), Reference(op)]


def available(name: str, device_type: str) -> dict[str, str | None]:
    """Implementations of an op, best first, each with why it cannot run there, or None."""
    return {impl.name: _reason(impl, device_type) for impl in implementations(name)}


def _reason(impl: Implementation, device_type: str) -> str | None:
    if not _is_for(impl, device_type):
        return f"for {', '.join(impl.devices)} only"
    return impl.unavailable(device_type)


def _is_for(impl: Implementation, device_type: str) -> bool:
    return not impl.devices or device_type in impl.devices


@dataclass(frozen=True)
class Choice:
    """Who computes an op on a kind of device.

    Attributes:
        implementation: that was chosen.
        passed: better ones that are meant for such devices and cannot run here, each with why.
        rest: those that compute, in this order, the calls that it does not take; none if it was
            asked for by name.
    """

    implementation: Implementation
    passed: Mapping[str, str]
    rest: tuple[Implementation, ...] = ()

    def for_call(self, args: tuple[Any, ...]) -> Implementation:
        """Who computes a call with these arguments. Raises OpError if none takes it."""
        reasons = []
        for candidate in (self.implementation, *self.rest):
            reason = _refusal(candidate, args)
            if reason is None:
                return candidate
            reasons.append(f"{candidate.name}: {reason}")
        name = self.implementation.op
        raise OpError(
            f"op {name!r} does not take these arguments by {'; '.join(reasons)}; name another of "
            f"its implementations, such as DS_OPS_IMPL={name}=reference, or none"
        )


def _refusal(impl: Implementation, args: tuple[Any, ...]) -> str | None:
    """Why an implementation does not take a call, or None."""
    refuses = impl.partly()
    return None if refuses is None else refuses(*args)


def choose(name: str, device_type: str, impl: str | None = None) -> Choice:
    """Who would compute op `name` on such devices, without saying or binding anything.

    Args:
        impl: which implementation; None: what DS_OPS_IMPL names, else the best that can run.

    Raises OpError if there is no such op or implementation, or if it cannot run there, and if
    DS_OPS_IMPL names an op that does not exist.
    """
    offered = implementations(name)
    table = _env.ops_implementations()
    if unknown := table.keys() - {"*", *(names() if table else ())}:
        raise OpError(f"DS_OPS_IMPL: {_no_op(min(unknown))}")
    asked = impl or _named(table, name)
    if asked is not None:
        return Choice(_by_name(name, device_type, asked, offered), {})
    passed: dict[str, str] = {}
    able: list[Implementation] = []
    for candidate in offered:
        if not _is_for(candidate, device_type):
            continue
        reason = candidate.unavailable(device_type)
        if reason is None:
            able.append(candidate)
            if candidate.partly() is None:
                break
        else:
            passed[candidate.name] = reason
    candidate = able[0]
    if passed and _env.ops_fallback() == "error":
        told = "; ".join(f"{other}: {reason}" for other, reason in passed.items())
        raise OpError(
            f"op {name!r} on {device_type}: {told}; DS_OPS_FALLBACK=error forbids to use "
            f"{candidate.name!r} in its place: mend that, or name it by "
            f"DS_OPS_IMPL={name}={candidate.name}"
        )
    return Choice(candidate, passed, tuple(able[1:]))


def select(name: str, device_type: str, impl: str | None = None) -> Implementation:
    """As `choose`, once per op and kind of device: says what was chosen, and warns if it is slow.

    Raises OpError as `choose` does.
    """
    return _selected(name, device_type, impl).implementation


@cache
def _selected(name: str, device_type: str, impl: str | None = None) -> Choice:
    chosen = choose(name, device_type, impl)
    by = ", else ".join(each.name for each in (chosen.implementation, *chosen.rest))
    logger.info("op %s on %s: %s", name, device_type, by)
    for other, reason in chosen.passed.items():
        _warn_once(device_type, f"{other}: {reason}")
    return chosen


def _bind(name: str, namespace: str, device_type: str, impl: str | None) -> None:
    """Register the kernel of an op; where several share its calls, one that asks who takes each."""
    chosen = _selected(name, device_type, impl)
    if impl is not None or chosen.implementation.partly() is None:
        chosen.implementation.bind(namespace, device_type)
        return

    def shared(*args: Any) -> Any:
        return _call(name, library.namespace_of(chosen.for_call(args).name), args)

    library.bind_python(name, namespace, device_type, shared)


def _by_name(
    name: str, device_type: str, asked: str, offered: list[Implementation]
) -> Implementation:
    for candidate in offered:
        if candidate.name == asked:
            reason = _reason(candidate, device_type)
            if reason is not None:
                raise OpError(f"op {name!r}: {asked!r} cannot run on {device_type}: {reason}")
            return candidate
    there = ", ".join(candidate.name for candidate in offered)
    raise OpError(f"op {name!r}: no implementation {asked!r}; there are {there}")


@cache
def _warn_once(device_type: str, reason: str) -> None:
    """Say once, not per op, why something faster is not used.

    A warning, not a line in a log: a program that does not set up logging would fall back silently.
    """
    warnings.warn(
        f"ops on {device_type} run slower than they could: {reason} (see `ds ops report`)",
        RuntimeWarning,
        stacklevel=2,
    )


def _named(table: Mapping[str, str], name: str) -> str | None:
    return table.get(name, table.get("*"))


# --- Defining and calling -------------------------------------------------------------------------


def run(name: str, *args: Any, impl: str | None = None) -> Any:
    """Compute op `name`.

    Args:
        args: its arguments, as its schema has them; the first tensor decides the device.
        impl: by which implementation; None: by the one that was chosen.
    """
    named = impl or (_named(_used, name) if _used else None)
    if named is not None:
        _selected(name, library.device_type_of(args), named).for_call(args)
    return _call(name, library.namespace_of(named), args)


def _call(name: str, namespace: str, args: tuple[Any, ...]) -> Any:
    define(name, namespace)
    return getattr(getattr(torch.ops, namespace), name).default(*args)


def define(name: str, namespace: str = library.NAMESPACE) -> bool:
    """Make op `name` an operator of torch in a namespace, unless it is one; always true."""
    if (name, namespace) in _defined:
        return True
    impl = namespace.removeprefix(library.NAMESPACE).removeprefix("_") or None

    def bind(op: str, namespace: str, device_type: str) -> None:
        _bind(op, namespace, device_type, impl)

    def trace(op: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        return _selected(op, library.device_type_of(args), impl).for_call(args).traced()

    def call(op: str, *args: Any) -> Any:
        # A gradient that the named implementation does not have is computed by the chosen one.
        own = impl is None or any(
            other.name == impl and _refusal(other, args) is None for other in implementations(op)
        )
        return _call(op, namespace if own else library.NAMESPACE, args)

    with library.lock:
        if (name, namespace) not in _defined:
            library.define(get(name), namespace, bind, trace, call)
            _defined.add((name, namespace))
    return True


# What `torch.compiler.assume_constant_result` does, without its import of torch._dynamo: the call
# is made while a function is compiled, which may be the first to use an op, and leaves no trace.
vars(define)["_dynamo_marked_constant"] = True


@contextlib.contextmanager
def use(**named: str) -> Iterator[None]:
    """Inside the block, compute ops by the implementations named: `use(rms_norm="torch")`.

    For the whole process, not one thread of it. Raises OpError for a name that does not exist;
    an implementation that cannot run on a device is an error of the call.
    """
    for name, impl in named.items():
        offered = [candidate.name for candidate in implementations(name)]
        if impl not in offered:
            there = ", ".join(offered)
            raise OpError(f"ops.use: op {name!r} has no implementation {impl!r}; there are {there}")
    before = dict(_used)
    _used.update(named)
    try:
        yield
    finally:
        _used.clear()
        _used.update(before)
