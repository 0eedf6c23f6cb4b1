"""Training to the end of everybody's data when ranks have different numbers of batches.

    batches = comm.UnevenBatches(loader, mesh.group("dp"))
    for batch, weight in batches:
        loss = model(batch).mean() * weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

A rank whose data has ended goes on with its last batch at weight 0, so that it takes part in every
collective of the step, whatever the sharding; the weights of the others make up for it. Gradients
are therefore those of plain PyTorch on the union of the batches that are left, and the loop ends on
all ranks after the same step, when nobody has data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ds_core.comm.collectives import all_reduce
from ds_core.comm.group import Group
from ds_core.comm.objects import all_gather_object, broadcast_object
from ds_core.comm.pending import Pending
from ds_core.errors import CommError

_CALLER = "who still has data"


class WeightedBatch(NamedTuple):
    """A batch, and the factor of its loss under which the average over all ranks is right."""

    batch: Any
    weight: float


class UnevenBatches(Iterator[WeightedBatch]):
    """This rank's batches, and then its last one at weight 0 until no rank has any left.

    Reads one step ahead, so that asking who still has data overlaps the step before; costs an
    all-reduce of 8 bytes per step. Dropout, batch statistics and counters of the model do see the
    batches of weight 0.

    Args:
        batches: this rank's; iterated once.
        group: ranks that share the model: the mesh's "dp".
        accumulation: batches per optimizer step; the last step of a rank may have fewer.
        size_of: how much a batch counts beside others, such as its samples; default: 1 each. The
            loss of a batch must be the mean over what is counted.

    Raises CommError if no rank has any batch. Collective: construction, and each step.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        group: Group,
        *,
        accumulation: int = 1,
        size_of: Callable[[Any], float] | None = None,
    ) -> None:
        if accumulation < 1:
            raise CommError(f"UnevenBatches: accumulation: got {accumulation}, expected 1 or more")
        self._source, self._group = iter(batches), group
        self._accumulation, self._size_of = accumulation, size_of
        self._shadow: Any = None
        self._ready: list[WeightedBatch] = []
        self._next: list[Any] = []
        self._total = torch.zeros(1, dtype=torch.float64, device=group.control_device())
        self._pending: Pending | None = None
        self._fetch()
        self._share_shadow()
        if not self.any_left:
            raise CommError(f"UnevenBatches: no rank of group {group.name!r} has any batch")

    def __next__(self) -> WeightedBatch:
        if not self._ready:
            if not self.any_left:
                raise StopIteration
            self._begin_step()
        return self._ready.pop(0)

    @property
    def any_left(self) -> bool:
        """Whether another batch follows, on all ranks alike."""
        return bool(self._ready) or self._total_of_next() > 0

    def _begin_step(self) -> None:
        """Weigh the step that was agreed on, and ask about the one after it."""
        total, batches = self._total_of_next(), self._next
        # Gradients are averaged over ranks and micro-batches; this makes it one over what counts.
        scale = self._group.size * self._accumulation / total
        self._ready = [WeightedBatch(batch, scale * self._size(batch)) for batch in batches]
        missing = self._accumulation - len(batches)
        self._ready += [WeightedBatch(self._shadow, 0.0)] * missing
        self._fetch()

    def _fetch(self) -> None:
        """Take the next step's batches, and start asking how much all ranks have."""
        self._next = []
        for batch in self._source:
            self._next.append(batch)
            if len(self._next) == self._accumulation:
                break
        if self._next:
            self._shadow = self._next[-1]
        self._total.fill_(sum(self._size(batch) for batch in self._next))
        self._pending = all_reduce(self._total, self._group, caller=_CALLER, async_op=True)

    def _total_of_next(self) -> float:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return float(self._total)

    def _share_shadow(self) -> None:
        """A rank that has no batch at all needs one of another's to go through the motions."""
        has_some = all_gather_object(bool(self._next), self._group, caller=_CALLER)
        if any(has_some) and not all(has_some):
            source = has_some.index(True)
            shared = broadcast_object(self._shadow, self._group, source=source, caller=_CALLER)
            if not self._next:
                self._shadow = shared

    def _size(self, batch: Any) -> float:
        return 1.0 if self._size_of is None else float(self._size_of(batch))
