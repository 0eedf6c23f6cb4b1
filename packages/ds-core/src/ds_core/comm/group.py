"""A process group with a name, an account, and knowledge of who stopped answering."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_core.comm.ledger import Ledger

#: How long the ranks that saw a collective fail wait for the others to say that they live.
ROLL_CALL_S = 3.0

# Tags from here on are those of collectives, smaller ones the callers' own.
_FIRST_TAG = 1 << 30


class Group:
    """Ranks that communicate, in order; `rank` and `size` are relative to the group.

    Args:
        name: what errors and the ledger call it, such as "dp".
        ranks: global ranks, ascending in the group's own order.
        pg: torch's process group, or None for a group of one that needs no communication.
        ledger: account that every collective of this group writes into.
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
        self.backend = "none" if pg is None else _backend_of(pg)
        self._sequence = 0

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
            ranks = list(self.ranks)
            pg = dist.new_group(ranks, timeout=_timeout_of(pg), use_local_synchronization=True)
        return Group(name, self.ranks, pg, self.ledger)

    def next_tag(self) -> int:
        """Tag of the next exchange: equal on all ranks, distinct from recent ones and callers'."""
        self._sequence = (self._sequence + 1) % (1 << 20)
        return _FIRST_TAG + self._sequence

    def control_device(self) -> torch.device:
        """Device on which small control messages of this group must live."""
        if self.backend in ("gloo", "none", "fake"):
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator

    def failed_elsewhere(self) -> bool:
        """Whether another rank of the group has reported that a collective failed there."""
        mine = dist.get_rank()
        try:
            store: Any = dist.distributed_c10d._get_default_store()
            return any(store.check([_alive(rank)]) for rank in self.ranks if rank != mine)
        except Exception:
            return True  # the store is gone, and with it the rank that hosts it

    def silent_ranks(self, failure: str) -> list[int]:
        """Global ranks that do not report, after a failed collective, that they are alive.

        Every rank that catches the failure leaves a note in the rendezvous store and waits
        up to `ROLL_CALL_S` seconds for the others' notes. Raises nothing: if the store itself
        is gone, the rank that hosts it (0) is the silent one.
        """
        mine = dist.get_rank()
        missing = set(self.ranks) - {mine}
        try:
            store: Any = dist.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=ROLL_CALL_S))
            store.set(_alive(mine), failure)
            deadline = time.monotonic() + ROLL_CALL_S
            while missing and time.monotonic() < deadline:
                missing = {r for r in missing if not store.check([_alive(r)])}
                time.sleep(0.05)
        except Exception:
            return [0] if mine != 0 else sorted(missing)
        return sorted(missing)


def _alive(rank: int) -> str:
    return f"ds_core/alive/{rank}"


def _backend_of(pg: dist.ProcessGroup) -> str:
    name = str(dist.get_backend(pg)).lower()
    return name if ":" not in name else name.split(":")[-1]


def _timeout_of(pg: dist.ProcessGroup) -> timedelta | None:
    """The timeout of a group's backend; None where it does not tell."""
    device = pg._device_types[0] if pg._device_types else torch.device("cpu")
    options = getattr(pg._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None
