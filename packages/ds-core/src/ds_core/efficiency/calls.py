"""Changing what a call of a module does, without a wrapper around it and without new names.

The module gets a subclass of its own class whose `__call__` goes through our functions; forward,
hooks, parameters and `isinstance` stay as they are, so checkpoints, sharding and activation
checkpointing notice nothing. A call that is left out is left out with its hooks: nobody waits for a
sharded block, though one that was used a pass ago may have been gathered ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ds_core.errors import DsError

#: Takes the call that it changes, and its arguments.
CallChange = Callable[..., Any]

_CHANGES = "_ds_core_call_changes"


def change_call(module: nn.Module, change: CallChange) -> Callable[[], None]:
    """Let calls of `module` go through `change(call, *args, **kwargs)`; returns what ends that.

    The change that was made last is called first.
    """
    changes = module.__dict__.get(_CHANGES)
    if changes is None:
        changes = []
        object.__setattr__(module, _CHANGES, changes)
        kind: Any = type(module)
        module.__class__ = _changeable(kind)
    changes.append(change)

    def restore() -> None:
        changes.remove(change)
        if not changes:
            object.__delattr__(module, _CHANGES)
            module.__class__ = type(module).__mro__[1]

    return restore


@functools.cache
def _changeable(base: Any) -> type[nn.Module]:
    """A subclass whose calls go through the instance's changes; one for each class of module."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = functools.partial(base.__call__, self)
        for change in self.__dict__[_CHANGES]:
            inner = functools.partial(change, inner)
        return inner(*args, **kwargs)

    names = {"__call__": call, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), names)


def repeated_blocks(model: nn.Module, count: int | None = None) -> list[nn.Module]:
    """The blocks of the model's only repeated stack: a list of modules of one class.

    count: how many there must be; None: any number from two on. Raises DsError, naming the stacks
    that there are, if none or several fit.
    """
    stacks = {
        name: list(module.children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(child).__qualname__ for child in module.children()}) == 1
        and len(list(module.children())) >= 2
    }
    # A stack inside the block of another one is not what is meant.
    outer = {
        name: blocks
        for name, blocks in stacks.items()
        if not any(other != name and name.startswith(f"{other}.") for other in stacks)
    }
    fitting = [blocks for blocks in outer.values() if count in (None, len(blocks))]
    if len(fitting) != 1:
        told = ", ".join(f"{name or 'the model'} of {len(b)}" for name, b in outer.items())
        raise DsError(
            f"{type(model).__name__}: expected one repeated stack of "
            f"{'blocks' if count is None else f'{count} blocks'}, found {told or 'none'}; name the "
            f"blocks in Python and pass the observer to initialize(observers=)"
        )
    return fitting[0]
