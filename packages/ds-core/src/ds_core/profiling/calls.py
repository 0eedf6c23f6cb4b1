"""Which module is at work at a moment: in a forward, in a recomputation, or in a backward.

Forwards are seen by hooks on the modules. A backward runs no module: but autograd numbers its nodes
in the order in which forward made them, so the number of the node at work tells in which module's
forward it was made. Nothing is attached to a tensor, and no gradient passes through anything new.

One case is beyond this: what *reentrant* checkpointing differentiates on an accelerator is numbered
by another thread, and may be told of another module; sums over the model stay right.
"""

from __future__ import annotations

import enum
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class Phase(enum.Enum):
    """What a computation is part of."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"  # a forward again, in backward, for activations that were not kept
    BACKWARD = "backward"


#: Where work belongs that is done in no module of the model.
OUTSIDE = -1


@dataclass
class _Call:
    index: int
    phase: Phase
    began_s: float


@dataclass
class _Thread:
    """What one thread runs, and to whom the autograd nodes belong that it has made."""

    stack: list[_Call] = field(default_factory=list)
    # From each number on, nodes belong to the module beside it.
    first_numbers: list[int] = field(default_factory=lambda: [0])
    owners: list[int] = field(default_factory=lambda: [OUTSIDE])


class Calls:
    """Follows the calls of a model's modules between `start` and `stop`.

    Args:
        modules: those that are followed; elsewhere they are told by their place in this list.
        synchronize: waits for the device, so that a module's time is that of its kernels.

    Attributes:
        counts: calls of each module, by phase.
        seconds: time within each module, with what it calls, by phase.
    """

    def __init__(self, modules: list[nn.Module], synchronize: Callable[[], None]) -> None:
        self._modules = modules
        self._synchronize = synchronize
        self._threads: dict[int, _Thread] = {}
        self._home = 0
        self._with_graph: dict[int, bool] = {}
        self._handles: list[Any] = []
        self.counts = {phase: [0] * len(modules) for phase in Phase}
        self.seconds = {phase: [0.0] * len(modules) for phase in Phase}

    def start(self) -> None:
        """Install the hooks; forwards are expected in this thread."""
        self._home = threading.get_ident()
        for index, module in enumerate(self._modules):
            self._handles.append(
                module.register_forward_pre_hook(self._entering(index), prepend=True)
            )
            self._handles.append(
                module.register_forward_hook(self._leaving(index), always_call=True)
            )

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._synchronize()
            phase = Phase.RECOMPUTE if _in_backward() else Phase.FORWARD
            thread = self._thread()
            thread.stack.append(_Call(index, phase, time.perf_counter()))
            self._mark_innermost(thread)

        return torch._disable_dynamo(enter)

    def _leaving(self, index: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            thread = self._thread()
            if all(call.index != index for call in thread.stack):
                return  # it was entered before the start
            self._synchronize()
            now = time.perf_counter()
            while thread.stack:
                call = thread.stack.pop()
                if call.index == index:
                    break
            self.counts[call.phase][index] += 1
            is_outermost = all(outer.index != index for outer in thread.stack)
            if is_outermost:
                self.seconds[call.phase][index] += now - call.began_s
            self._mark_innermost(thread)

        return torch._disable_dynamo(leave)

    def _thread(self) -> _Thread:
        return self._threads.setdefault(threading.get_ident(), _Thread())

    @staticmethod
    def _mark(thread: _Thread, owner: int, number: int) -> None:
        """Autograd nodes of this thread from that number on belong to a module."""
        thread.first_numbers.append(number)
        thread.owners.append(owner)

    def _mark_innermost(self, thread: _Thread) -> None:
        owner = thread.stack[-1].index if thread.stack else OUTSIDE
        self._mark(thread, owner, torch._C._autograd._get_sequence_nr())

    def current(self) -> tuple[Phase, int]:
        """The phase and the module (or `OUTSIDE`) of an operation that is dispatched now."""
        task = torch._C._current_graph_task_id()
        thread = self._thread()
        if task == -1:
            return Phase.FORWARD, thread.stack[-1].index if thread.stack else OUTSIDE
        if thread.stack and thread.stack[-1].phase is Phase.RECOMPUTE:
            return Phase.RECOMPUTE, thread.stack[-1].index
        records = torch.is_grad_enabled()
        # A backward that is itself differentiated records from its first operation on; another
        # records only where it runs a piece of forward again.
        with_graph = self._with_graph.setdefault(task, records)
        owner = self._owner(torch._C._current_autograd_node())
        if not records or with_graph:
            return Phase.BACKWARD, owner
        if owner != thread.owners[-1]:
            # A checkpointed function that is no module. Reentrant checkpointing runs a backward of
            # its own through the nodes made now; that of this operation is there already.
            self._mark(thread, owner, torch._C._autograd._get_sequence_nr() - 1)
        return Phase.RECOMPUTE, owner

    def _owner(self, node: Any) -> int:
        """The module in whose forward an autograd node was made."""
        if node is None:
            return OUTSIDE
        # Numbers are counted per thread, and forwards run in the thread that started this.
        made = self._threads.get(self._home)
        number = node._sequence_nr()
        if made is None or number >= torch.iinfo(torch.int64).max:  # a leaf's accumulation
            return OUTSIDE
        return made.owners[bisect_right(made.first_numbers, number) - 1]


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
