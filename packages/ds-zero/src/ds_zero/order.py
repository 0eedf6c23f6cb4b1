"""In which order a pass gathers units: agreed by all ranks, replayed, and mended when it changes.

A gather is a collective, so all ranks must issue the same ones in the same order, even where
their models branch differently. Each pass (a forward, or its backward) follows a plan: the units
in the order in which the last such pass used them. A rank that needs a unit which the plan still
has ahead issues everything up to it (and drops what it does not need). A rank that needs one which
the plan does not have ahead finishes the plan and then negotiates: all ranks say which unit they
want, gather the union, and go on until every rank is done. After such a pass the ranks merge
what they used into the next plan. The only cost while nothing changes is one exchange of a
single integer per pass.

Integers and callables only: no tensor, no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

DONE = -1
DONE_WITH_UNUSED = -2

#: Attempts to drop unused units from a plan before the plan is kept as it is.
MAX_SHRINKS = 3


@dataclass
class Plan:
    """Units in the order in which one kind of pass gathers them."""

    units: list[int] = field(default_factory=list)
    num_shrinks: int = 0


class GatherOrder:
    """Decides, on every rank alike, which gather is issued next.

    Args:
        issue: starts the gather of one unit; called in the same order on all ranks.
        exchange: gives one integer to all ranks and returns everybody's.
        share: gives a list of integers to all ranks and returns everybody's.
    """

    def __init__(
        self,
        issue: Callable[[int], None],
        exchange: Callable[[int], list[int]],
        share: Callable[[list[int]], list[list[int]]],
    ) -> None:
        self._issue, self._exchange, self._share = issue, exchange, share
        self._plans: dict[Hashable, Plan] = {}
        self._plan = Plan()
        self._cursor = 0
        self._used: list[int] = []
        self._negotiated = False
        self.active = False

    def begin(self, key: Hashable) -> None:
        """Start a pass. `key` tells kinds of passes apart: the mode and the call's signature."""
        self._plan = self._plans.setdefault(key, Plan())
        self._cursor, self._used, self._negotiated = 0, [], False
        self.active = True

    def need(self, unit: int) -> None:
        """Issue the gather of `unit`, after all those that other ranks expect before it."""
        self._used.append(unit)
        try:
            position = self._plan.units.index(unit, self._cursor)
        except ValueError:
            self._finish_plan()
            self._negotiate(unit)
        else:
            self._walk_to(position + 1)

    def note(self, unit: int) -> None:
        """Record the use of a unit that `ahead` has already issued."""
        self._used.append(unit)

    def upcoming(self, count: int) -> list[int]:
        """The next units of the plan that are not issued, `count` at most."""
        return self._plan.units[self._cursor : self._cursor + count] if self.active else []

    def ahead(self) -> int | None:
        """Issue the plan's next gather before it is needed; its unit, or None at the end."""
        for unit in self.upcoming(1):
            self._walk_to(self._cursor + 1)
            return unit
        return None

    def end(self) -> None:
        """Finish the pass: serve the ranks that still need something, then revise the plan."""
        self._finish_plan()
        may_shrink = len(self._used) < len(self._plan.units)
        may_shrink = may_shrink and self._plan.num_shrinks < MAX_SHRINKS
        everybody = self._negotiate(DONE_WITH_UNUSED if may_shrink else DONE)
        self.active = False
        shrinks = all(answer == DONE_WITH_UNUSED for answer in everybody)
        if not self._negotiated and not shrinks:
            return
        self._plan.units = merge(self._share(self._used))
        self._plan.num_shrinks += shrinks

    def abandon(self) -> None:
        """Give up a pass that an exception ended; its plan stays as it was."""
        self.active = False

    def _walk_to(self, stop: int) -> None:
        while self._cursor < stop:
            self._cursor += 1
            self._issue(self._plan.units[self._cursor - 1])

    def _finish_plan(self) -> None:
        self._walk_to(len(self._plan.units))

    def _negotiate(self, want: int) -> list[int]:
        """Gather what anybody wants; with a unit as `want` one round, else until all are done."""
        while True:
            answers = self._exchange(want)
            wanted = sorted({unit for unit in answers if unit >= 0})
            for unit in wanted:
                self._negotiated = True
                self._issue(unit)
            if want >= 0 or not wanted:
                return answers


def merge(traces: list[list[int]]) -> list[int]:
    """One order that contains every trace's units, each trace's own order kept where possible.

    Starts from the first trace; units that only another one has are placed after the unit that
    precedes them there.
    """
    merged = list(traces[0])
    for trace in traces[1:]:
        cursor = 0
        for unit in trace:
            try:
                cursor = merged.index(unit, cursor) + 1
            except ValueError:
                merged.insert(cursor, unit)
                cursor += 1
    return merged
