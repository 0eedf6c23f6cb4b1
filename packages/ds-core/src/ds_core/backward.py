"""When a backward pass begins and when it has ended, for whoever acts on gradients."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def differentiable_tensors(tree: Any) -> list[torch.Tensor]:
    """Tensors in a nest of containers and dataclasses whose gradient autograd will compute."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_differentiable(tree, note)
    return found


def map_differentiable(tree: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`tree` with `fn` applied to every tensor in it whose gradient autograd will compute.

    Containers and dataclasses that hold none are returned themselves; the others are copied, so
    that the original stays as it is. One tensor in two places is mapped once.
    """
    return _Mapping(fn).of(tree)


class _Mapping:
    """One walk through a tree.

    An object and not nested functions: these would refer to one another, and so keep what they
    have seen, a model's outputs with their graph, until Python next looks for cycles.
    """

    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._fn = fn
        self._done: dict[int, Any] = {}

    def of(self, item: Any) -> Any:
        """What `item` becomes."""
        if id(item) not in self._done:
            self._done[id(item)] = self._mapped(item)
        return self._done[id(item)]

    def _mapped(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return self._fn(item) if item.requires_grad else item
        if isinstance(item, list | tuple):
            return _rebuilt(item, [self.of(entry) for entry in item])
        if isinstance(item, dict):
            changed = {k: new for k, old in item.items() if (new := self.of(old)) is not old}
            if not changed:
                return item
            twin = copy.copy(item)
            for key, value in changed.items():
                twin[key] = value  # not update(), which some mappings forbid
            return twin
        if hasattr(item, "__dataclass_fields__") and not isinstance(item, type):
            values = {name: getattr(item, name) for name in item.__dataclass_fields__}
            changed = {k: new for k, old in values.items() if (new := self.of(old)) is not old}
            if not changed:
                return item
            twin = copy.copy(item)
            for name, value in changed.items():
                object.__setattr__(twin, name, value)  # it may be frozen
            return twin
        return item


def _rebuilt(item: list[Any] | tuple[Any, ...], entries: list[Any]) -> Any:
    if all(new is old for new, old in zip(entries, item, strict=True)):
        return item
    if hasattr(item, "_fields"):  # a named tuple takes its fields one by one
        return type(item)(*entries)
    return type(item)(entries)


class BackwardWatch:
    """Calls `begin` before the first, and `end` after the last, event of each outermost backward.

    The backward of the model's outputs is what begins it, so that nested backwards (reentrant
    activation checkpointing) belong to the outer one. A backward that starts elsewhere begins
    with the first call of `ensure_begun`, from a gradient hook.

    Args:
        model: the root module.
        begin, end: bound methods of the watcher; held weakly, so that it can be freed.
    """

    def __init__(
        self, model: nn.Module, begin: Callable[[], None], end: Callable[[], None]
    ) -> None:
        self._begin = weakref.WeakMethod(begin)
        self._end = weakref.WeakMethod(end)
        self._running = False
        here = weakref.ref(self)

        def enter(module: nn.Module, args: Any) -> None:
            watch = here()
            if watch is not None:
                watch._forget_broken()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            watch = here()
            if watch is not None and not watch._running and torch.is_grad_enabled():
                for tensor in differentiable_tensors(output):
                    tensor.register_hook(begun)

        def begun(_: torch.Tensor) -> None:
            watch = here()
            if watch is not None:
                watch.ensure_begun()

        self._handles = [
            model.register_forward_pre_hook(torch._disable_dynamo(enter), prepend=True),
            model.register_forward_hook(torch._disable_dynamo(leave)),
        ]

    @property
    def running(self) -> bool:
        """Whether a backward is under way."""
        self._forget_broken()
        return self._running

    def ensure_begun(self) -> None:
        """Note that a backward is under way; must be called from within it."""
        if self._running:
            return
        self._running = True
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._finish)
        begin = self._begin()
        if begin is not None:
            begin()

    def _finish(self) -> None:
        self._running = False
        end = self._end()
        if end is not None:
            end()

    def _forget_broken(self) -> None:
        """An exception ended the last backward before its end was announced."""
        if self._running and torch._C._current_graph_task_id() == -1:
            self._running = False

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
