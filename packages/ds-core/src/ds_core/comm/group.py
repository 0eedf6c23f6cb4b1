"""A process group with a name, an account, and a place in the order of its collectives."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_core.comm.ledger import Ledger
from ds_core.comm.new_group import new_process_group
from ds_core.comm.process_groups import backend_of, timeout_of

if TYPE_CHECKING:
    from ds_core.comm.sequence import SequenceCheck

# Tags from here on are those of collectives, smaller ones those of single messages: 14 bits of
# both say the size, so that messages of different sizes never meet.
_FIRST_TAG = 1 << 30
_SIZE_BITS = 14
_SEQUENCE_BITS = 30 - _SIZE_BITS

#: Tags of callers are below this.
MAX_TAG = 1 << 15


#: Every group whose object still exists.
_groups: weakref.WeakSet[Group] = weakref.WeakSet()


def let_go_of_process_groups() -> None:
    """For the end of the program: no group of ours keeps torch's alive, and with it threads."""
    for group in list(_groups):
        group.pg = None


class Group:
    """Ranks that communicate, in order; `rank` and `size` are relative to the group.

    Args:
        name: what errors and the ledger call it, such as "dp".
        ranks: global ranks, ascending in the group's own order.
        pg: torch's process group, or None for a group of one that needs no communication.
        ledger: account that every collective of this group writes into.

    Attributes:
        timeout: after which a collective that cannot complete is an error; None: not known.
        num_started: collectives of this group that this rank has begun.
        num_barriers: monitored barriers likewise.
        check: what compares the ranks' order of collectives, or None (`Mesh.check_collectives`).
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        pg: dist.ProcessGroup | None,
        ledger: Ledger,
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.pg = pg
        self.ledger = ledger
        self.size = len(self.ranks)
        self.rank = 0 if pg is None else dist.get_rank(pg)
        self.backend = "none" if pg is None else backend_of(pg)
        self.timeout = None if pg is None else timeout_of(pg)
        self.num_started = 0
        self.check: SequenceCheck | None = None
        self.num_barriers = 0
        self._num_lanes = 0
        self._sequence = 0
        _groups.add(self)

    def __repr__(self) -> str:
        return f"Group({self.name!r}, ranks={list(self.ranks)}, backend={self.backend!r})"

    def lane(self, purpose: str) -> Group:
        """The same ranks with an order of operations of their own.

        Collectives of two lanes need not be issued in the same relative order on all ranks.
        `purpose` is for the name that errors and the ledger show. Collective: all ranks of the
        group must call, in the same order.
        """
        name = f"{self.name} ({purpose})"
        pg = self.pg
        if pg is not None:
            options = {"timeout": self.timeout, "use_local_synchronization": True}
            pg = new_process_group(self.ranks, f"making {name}", **options)
        lane = Group(name, self.ranks, pg, self.ledger)
        self._num_lanes += 1
        if self.check is not None:
            lane.check = self.check.of_lane(lane, self._num_lanes)
        return lane

    @property
    def lane_name(self) -> str:
        """What tells the order of operations of this group from others, equal on its ranks."""
        return f"{self.pg.group_name if self.pg is not None else 'none'}/{self.name}"

    def set_timeout(self, timeout: timedelta) -> None:
        """Have collectives that cannot complete end after `timeout`, where the backend can."""
        if self.pg is not None and self.backend != "fake":
            dist.distributed_c10d._set_pg_timeout(timeout, self.pg)
            self.timeout = timeout

    def next_tag(self) -> int:
        """Tag of the next exchange: equal on all ranks, distinct from recent ones and callers'."""
        self._sequence = (self._sequence + 1) % (1 << _SEQUENCE_BITS)
        return _FIRST_TAG | self._sequence << _SIZE_BITS

    def control_device(self) -> torch.device:
        """Device on which small control messages of this group must live."""
        if self.backend in ("gloo", "none", "fake"):
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator


def message_tag(tag: int, num_bytes: int) -> int:
    """The tag of a single message of this size that its caller tags `tag`."""
    return sized_tag(tag << _SIZE_BITS, num_bytes)


def sized_tag(tag: int, num_bytes: int) -> int:
    """The tag of a part of this size in the exchange that `tag` begins.

    Ranks that expect parts of other sizes wait for them in vain; gloo would end the process of a
    rank that receives more than it asked for.
    """
    folded = num_bytes ^ num_bytes >> _SIZE_BITS ^ num_bytes >> 2 * _SIZE_BITS
    return tag | folded & ((1 << _SIZE_BITS) - 1)
