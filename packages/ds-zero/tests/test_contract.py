"""Every stage is a `Sharding` as the engine, and any other caller, may expect it."""

from __future__ import annotations

import ds_zero
from ds_core.testing import ShardingContract


def stage1(model, optimizer, *, mesh, precision):
    return ds_zero.shard(model, optimizer, stage=1, mesh=mesh, precision=precision)


def stage2(model, optimizer, *, mesh, precision):
    return ds_zero.shard(model, optimizer, stage=2, mesh=mesh, precision=precision)


def stage3(model, optimizer, *, mesh, precision):
    # Units as small as a block, so that several are gathered and freed in each pass.
    return ds_zero.shard(
        model, optimizer, stage=3, mesh=mesh, precision=precision, min_unit_numel=1
    )


class TestStage1(ShardingContract):
    factory = staticmethod(stage1)


class TestStage2(ShardingContract):
    factory = staticmethod(stage2)
    world_sizes = (1, 2, 3)


class TestStage3(ShardingContract):
    factory = staticmethod(stage3)
    world_sizes = (1, 2, 3)
