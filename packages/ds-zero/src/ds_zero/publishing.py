"""Units that are updated one after the other, and shown to the model while the next one is."""

from __future__ import annotations

from collections.abc import Callable

from ds_core import comm
from ds_zero.unit import Unit


class Publishing:
    """Updates units and publishes them.

    After an error this rank updates nothing any more, but goes on to publish, since the others do,
    and would wait for it in vain. They hear of the error when they next agree on something.
    """

    def __init__(self) -> None:
        self._pending: list[comm.Pending] = []
        self._error: Exception | None = None

    def attempt(self, work: Callable[[], object]) -> None:
        """Do some work, unless there was an error before."""
        if self._error is not None:
            return
        try:
            work()
        except Exception as error:
            self._error = error

    def publish(self, unit: Unit) -> None:
        """Begin to show a unit to the model. Collective."""
        pending = unit.publish()
        if pending is not None:
            self._pending.append(pending)

    def finish(self) -> None:
        """Wait until the model has all of them. Raises the error of the work."""
        while self._pending:
            self._pending.pop(0).wait()
        if self._error is not None:
            raise self._error
