"""Units that are updated one after the other, and shown to the model while the next one is."""

from __future__ import annotations

from ds_core import comm
from ds_zero.unit import Unit
from ds_zero.wholeness import Attempts


class Publishing(Attempts):
    """Updates units and publishes them.

    After an error this rank updates nothing any more, but goes on to publish, since the others do,
    and would wait for it in vain. They hear of the error when they next agree on something.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[comm.Pending] = []

    def publish(self, unit: Unit) -> None:
        """Begin to show a unit to the model. Collective."""
        pending = unit.publish()
        if pending is not None:
            self._pending.append(pending)

    def finish(self) -> None:
        """Wait until the model has all of them. Raises the error of the work."""
        while self._pending:
            self._pending.pop(0).wait()
        if self.error is not None:
            raise self.error
