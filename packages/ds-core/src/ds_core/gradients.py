"""Gradients on their way: from autograd into flat buckets, averaged over ranks while backward runs.

A bucket's reduction starts when its last gradient has come, in an order that is fixed on all
ranks: a bucket that is complete waits for those before it. What is still missing when backward ends
(parameters that were not used, branches that differ between ranks) counts as zero, so every rank
issues the same reductions whatever its own backward touched.

One reduction is under way at a time, so that the memory of one is free before the next but one
needs it. Where a backward also gathers parameters, waiting could be for ever: this rank for a
reduction that another one starts only at its end, and that one for a gather that this rank starts
only later. So such a wait has an end, and the next one is a quarter as long: all of them together
cost a moment once, and a single slow message does not give the memory away for good.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from ds_core import comm

#: How long a backward that also gathers waits for a reduction before it goes on without it.
PATIENCE_S = 2.0


class Bucket(Protocol):
    """Parameters whose gradients are reduced in one message."""

    index: int
    params: list[nn.Parameter]
    group: comm.Group

    def write_gradient(self, position: int, gradient: torch.Tensor, factor: float) -> None:
        """Take in `factor * gradient` of the parameter at `position`."""

    def start_reduce(self) -> comm.Pending:
        """Start summing over the group what was taken in. Collective."""

    def finish_reduce(self) -> None:
        """The sum is complete."""


B = TypeVar("B", bound=Bucket)


class GradientReducer(Generic[B]):
    """Collects and averages the gradients of one model.

    Args:
        buckets: every trainable parameter in exactly one.
        ensure_begun: tells the watch over backwards that one is under way.
        bucket_done: called when all gradients of a bucket have come in a backward.
        gathers_meanwhile: whether backward also waits for gathers of parameters.
    """

    def __init__(
        self,
        buckets: list[B],
        ensure_begun: Callable[[], None],
        bucket_done: Callable[[B], None],
        *,
        gathers_meanwhile: bool = False,
    ) -> None:
        self._buckets = buckets
        self._by_index = {bucket.index: bucket for bucket in buckets}
        self._order = list(reversed(buckets))
        self._ensure_begun, self._bucket_done = ensure_begun, bucket_done
        self._missing: dict[int, int] = {}
        self._completed: list[int] = []
        self._next = 0
        self._in_flight: deque[tuple[B, comm.Pending]] = deque()
        self._patience_s = PATIENCE_S if gathers_meanwhile else float("inf")
        #: Whether backwards reduce; if not, gradients only accumulate locally.
        self.sync = True
        # Whether gradients wait that only accumulated locally.
        self._is_local = False
        self._order_agreed = False
        self._handles: list[Any] = []
        here = weakref.ref(self)
        for bucket in buckets:
            for position, param in enumerate(bucket.params):
                self._handles.append(_on_gradient(param, here, bucket.index, position))
        self.begin()

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only accumulate locally, in full-size gradients."""
        before, self.sync = self.sync, False
        try:
            yield
        finally:
            self.sync = before

    def begin(self) -> None:
        """A backward begins: no gradient of it has come."""
        self._drain()  # an exception may have ended the last one in the middle
        self._missing = {bucket.index: len(bucket.params) for bucket in self._buckets}
        self._completed, self._next = [], 0

    def receive(self, index: int, position: int, param: nn.Parameter) -> None:
        """Take over the gradient that autograd has just finished for one parameter."""
        self._ensure_begun()
        gradient, param.grad = param.grad, None
        if gradient is None:
            return
        bucket, missing = self._by_index[index], self._missing[index] - 1
        if missing < 0:
            self._drain()  # it comes late, and its bucket may be on its way
        bucket.write_gradient(position, gradient, 1.0 / bucket.group.size)
        self._missing[index] = missing
        if missing == 0:
            self._completed.append(index)
            self._bucket_done(bucket)
            if self.sync:
                self._launch_complete()

    def _launch_complete(self) -> None:
        while self._next < len(self._order):
            if self._missing[self._order[self._next].index] > 0:
                return
            self._launch(self._order[self._next])

    def _launch(self, bucket: B) -> None:
        self._make_room()
        self._next += 1
        self._in_flight.append((bucket, bucket.start_reduce()))

    def _make_room(self) -> None:
        """Finish what is under way, unless that takes longer than patience lasts."""
        if self._patience_s == float("inf"):
            self._drain()
            return
        deadline = time.monotonic() + self._patience_s
        while self._in_flight:
            if self._in_flight[0][1].is_complete():
                self._finish_first()
            elif time.monotonic() >= deadline:
                self._patience_s /= 4
                return
            else:
                time.sleep(1e-4)

    def _drain(self) -> None:
        while self._in_flight:
            self._finish_first()

    def _finish_first(self) -> None:
        bucket, pending = self._in_flight.popleft()
        pending.wait()
        bucket.finish_reduce()

    def finish(self) -> None:
        """Backward has ended: reduce what has not been, and wait for all of it."""
        if not self.sync:
            self._is_local = True
            return
        self._is_local = False
        while self._next < len(self._order):
            self._launch(self._order[self._next])
        self._drain()
        self._agree_on_order()
        self._reduce_late()

    def settle(self) -> None:
        """Before a step: reduce what only accumulated locally. Collective if it did."""
        if not self._is_local:
            return
        self._is_local, self._next = False, 0
        while self._next < len(self._order):
            self._launch(self._order[self._next])
        self._drain()

    def forget(self) -> None:
        """Drop the gradients that wait, and those that a broken backward left on their way."""
        self._drain()
        self._is_local = False

    def _reduce_late(self) -> None:
        """Gradients that came after their bucket was reduced (a parameter in two nested backwards).

        All ranks run the same nested backwards, so all of them find the same buckets here.
        """
        for bucket in self._order:
            if self._missing[bucket.index] < 0:
                pending = bucket.start_reduce()
                pending.wait()
                bucket.finish_reduce()

    def _agree_on_order(self) -> None:
        """After the first backward: reduce in the order in which rank 0's gradients came."""
        if self._order_agreed or not self._buckets:
            return
        group = self._buckets[0].group
        order = comm.broadcast_object(self._completed, group, caller="gradient order")
        position = {index: place for place, index in enumerate(order)}
        self._order.sort(key=lambda bucket: position.get(bucket.index, len(position)))
        self._order_agreed = True


def vector_norm(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm of a flat gradient, computed in fp32 or better."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=wide)


def _on_gradient(
    param: nn.Parameter,
    here: Callable[[], GradientReducer[B] | None],
    index: int,
    position: int,
) -> Any:
    def received(param: nn.Parameter) -> None:
        reducer = here()
        if reducer is not None:
            reducer.receive(index, position, param)

    return param.register_post_accumulate_grad_hook(torch._disable_dynamo(received))
