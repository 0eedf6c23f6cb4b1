"""Waiting for all ranks of a group."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ds_core.comm import board
from ds_core.comm.group import Group
from ds_core.comm.pending import run
from ds_core.errors import CommError


def barrier(group: Group, *, caller: str = "") -> None:
    """Return once every rank of the group has arrived. Collective."""

    def start() -> tuple[Sequence[Any], None]:
        assert group.pg is not None
        return [group.pg.barrier()], None

    run("barrier", group, caller, start, False)


def monitored_barrier(group: Group, *, timeout_s: float = 30.0, caller: str = "") -> None:
    """Return once every rank of the group has arrived, or raise naming those that have not.

    Goes through the rendezvous store, so it works whatever state the backend is in; slower than
    `barrier`, and meant for places where ranks may be missing: start-up, or around a suspect.

    Raises CommError after `timeout_s` seconds with the ranks that have not come. The barrier may
    be called again by those that did come and those that were late. Collective.
    """
    if group.size == 1:
        return
    group.num_barriers += 1
    prefix = f"ds_core/barrier/{group.lane_name}/{group.ranks[0]}"
    here = f"{prefix}/{group.num_barriers}"
    mine = f"{here}/{group.rank}"
    deadline = time.monotonic() + timeout_s
    missing = {rank: f"{here}/{rank}" for rank in range(group.size) if rank != group.rank}
    try:
        board.ask(lambda store: store.set(mine, ""), timeout_s)
        while missing:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            missing = board.ask(functools.partial(_absent, missing, left), left + 1)
    except Exception as error:
        raise CommError(_told(group, caller, f"the rendezvous store fails: {error}")) from error
    if missing:
        ranks = ", ".join(str(group.ranks[rank]) for rank in missing)
        late = f"rank {ranks} did not arrive within {timeout_s:g} s"
        raise CommError(_told(group, caller, late))
    if group.num_barriers > 1:
        # Everybody is here, so everybody has left the barrier before.
        dist.distributed_c10d._get_default_store().delete_key(
            f"{prefix}/{group.num_barriers - 1}/{group.rank}"
        )


def _absent(missing: dict[int, str], within_s: float, store: Any) -> dict[int, str]:
    """Those of `missing` that are not there, once the first is, or the time is over."""
    with suppress(RuntimeError):
        store.wait([next(iter(missing.values()))], timedelta(seconds=within_s))
    return {rank: key for rank, key in missing.items() if not store.check([key])}


def _told(group: Group, caller: str, what: str) -> str:
    return (
        f"monitored_barrier of {caller or 'the caller'} in group {group.name!r} (ranks "
        f"{list(group.ranks)}) failed on rank {group.ranks[group.rank]}: {what}"
    )
