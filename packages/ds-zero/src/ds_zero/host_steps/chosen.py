"""The one place that says which way of taking a step belongs to which choices of a user."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_core import comm
from ds_zero.host_steps.early_updates import EarlyUpdates
from ds_zero.host_steps.host_step import HostStep
from ds_zero.host_steps.speculative import Speculation
from ds_zero.host_steps.twin_flow import TwinFlow
from ds_zero.host_steps.worker import HostWorker
from ds_zero.host_steps.zenflow import ZenFlow, ZenFlowStep
from ds_zero.offload.homes import Homes
from ds_zero.unit import Unit


def chosen_step(
    optimizer: torch.optim.Optimizer,
    units: list[Unit],
    homes: Homes,
    *,
    group: comm.Group,
    update_in_backward: bool,
    zenflow: ZenFlow | None,
    before_change: Callable[[], None],
) -> HostStep:
    """What takes the steps of a sharded model.

    Args:
        optimizer: the user's, whose groups hold flat shards.
        units: the trained ones.
        homes: where their states live, with the user's `Offload`.
        group: all ranks.
        update_in_backward, zenflow: as `shard` takes them; see `check_combination`.
        before_change: called before a backward changes weights or states.

    Raises ShardError for an optimizer that cannot step in the way that was chosen.
    """
    offload = homes.offload
    if update_in_backward:
        return EarlyUpdates(optimizer, units, homes, before_change)
    if zenflow is not None:
        worker = HostWorker(beside=zenflow.overlap_step)
        return ZenFlowStep(optimizer, units, homes, zenflow, worker)
    if not offload.splits and not offload.speculative:
        return HostStep(optimizer, units, homes)
    beside = homes.leaves_device or offload.splits
    worker = HostWorker(beside=beside and offload.parameters != "nvme")
    twins = TwinFlow(optimizer, units, homes, group, worker) if offload.splits else None
    if offload.speculative:
        return Speculation(optimizer, units, homes, worker, before_change, twins)
    assert twins is not None
    return twins
