"""Gradients on their way: from autograd into the twin, and averaged over ranks while backward runs.

A unit's reduction starts when its last gradient has come, in an order that is fixed on all ranks:
a unit that is complete waits for those before it. What is still missing when backward ends
(parameters that were not used, branches that differ between ranks) counts as zero, so every rank
issues the same reductions whatever its own backward touched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ds_core import comm
from torch import nn

from ds_zero.unit import Unit


class GradientReducer:
    """Collects and averages the gradients of the trainable units of one model.

    Args:
        units: the trainable units.
        ensure_begun: tells the watch over backwards that one is under way.
        unit_done: called when all gradients of a unit have come in a backward.
    """

    def __init__(
        self,
        units: list[Unit],
        ensure_begun: Callable[[], None],
        unit_done: Callable[[Unit], None],
    ) -> None:
        self._units = units
        self._order = list(reversed(units))
        self._ensure_begun, self._unit_done = ensure_begun, unit_done
        self._missing: dict[int, int] = {}
        self._completed: list[int] = []
        self._next = 0
        self._in_flight: tuple[Unit, comm.Pending] | None = None
        self._sync = True
        self._order_agreed = False
        self._handles: list[Any] = []
        here = weakref.ref(self)
        for unit in units:
            for position, param in enumerate(unit.params):
                self._handles.append(_on_gradient(param, here, unit, position))
        self.begin()

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only accumulate locally, in full-size gradients."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def begin(self) -> None:
        """A backward begins: no gradient of it has come."""
        self._missing = {unit.index: len(unit.params) for unit in self._units}
        self._completed, self._next = [], 0

    def receive(self, unit: Unit, position: int, param: nn.Parameter) -> None:
        """Take over the gradient that autograd has just finished for one parameter."""
        self._ensure_begun()
        gradient, param.grad = param.grad, None
        if gradient is None:
            return
        unit.write_gradient(position, gradient, 1.0 / unit.group.size)
        self._missing[unit.index] -= 1
        if self._missing[unit.index] == 0:
            self._completed.append(unit.index)
            self._unit_done(unit)
            if self._sync:
                self._launch_complete()

    def _launch_complete(self) -> None:
        while self._next < len(self._order):
            if self._missing[self._order[self._next].index] > 0:
                return
            self._launch(self._order[self._next])

    def _launch(self, unit: Unit) -> None:
        # One reduction at a time: its twin is freed before the next but one is allocated.
        self._drain()
        self._next += 1
        self._in_flight = (unit, unit.start_reduce())

    def _drain(self) -> None:
        if self._in_flight is not None:
            unit, pending = self._in_flight
            self._in_flight = None
            pending.wait()
            unit.finish_reduce()

    def finish(self) -> None:
        """Backward has ended: reduce what has not been, and wait for all of it."""
        if not self._sync:
            return
        while self._next < len(self._order):
            self._launch(self._order[self._next])
        self._drain()
        self._agree_on_order()
        self._reduce_late()

    def _reduce_late(self) -> None:
        """Gradients that came after their unit was reduced (a parameter in two nested backwards).

        All ranks run the same nested backwards, so all of them find the same units here.
        """
        for unit in self._order:
            if self._missing[unit.index] < 0:
                pending = unit.start_reduce()
                pending.wait()
                unit.finish_reduce()

    def _agree_on_order(self) -> None:
        """After the first backward: reduce in the order in which rank 0's gradients came."""
        if self._order_agreed or not self._units:
            return
        group = self._units[0].group
        order = comm.broadcast_object(self._completed, group, caller="gradient order")
        position = {index: place for place, index in enumerate(order)}
        self._order.sort(key=lambda unit: position.get(unit.index, len(position)))
        self._order_agreed = True


def _on_gradient(
    param: nn.Parameter,
    here: Callable[[], GradientReducer | None],
    unit: Unit,
    position: int,
) -> Any:
    weak = weakref.ref(unit)

    def received(param: nn.Parameter) -> None:
        reducer, unit = here(), weak()
        if reducer is not None and unit is not None:
            reducer.receive(unit, position, param)

    return param.register_post_accumulate_grad_hook(torch._disable_dynamo(received))
