"""What can go wrong with this example's own inputs, told to all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ds_core import comm
from ds_core.errors import DsError

T = TypeVar("T")


class ExampleError(DsError):
    """An input of the example cannot be used; rank 0 has said so, or is about to."""


def on_rank_0(action: Callable[[], T], group: comm.Group) -> T:
    """What `action` returns on rank 0, on every rank; the others wait for it.

    Raises ExampleError on every rank if it raises a DsError there, so that no rank is left
    waiting. Collective.
    """
    outcome: tuple[T | None, str | None] = (None, None)
    if group.rank == 0:
        try:
            outcome = action(), None
        except DsError as error:
            outcome = None, str(error)
    value, problem = comm.broadcast_object(outcome, group, caller="example")
    if problem is not None:
        raise ExampleError(problem)
    return value
