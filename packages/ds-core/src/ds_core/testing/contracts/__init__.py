"""Tests that every implementation of a seam must pass, as base classes to inherit from.

    from ds_core.testing.contracts import ShardingContract

    def stage2(model, optimizer, *, mesh, precision):
        return ds_zero.shard(model, optimizer, stage=2, mesh=mesh, precision=precision)

    class TestStage2(ShardingContract):
        factory = staticmethod(stage2)

A factory is a function at the top level of the test's module, because it also runs in the worker
processes of `ds_core.testing.run_ranks`. What an implementation promises beyond or below the
ordinary (a lossy transport's error, the worlds it runs at) is a class attribute.

Needs pytest.
"""

from ds_core.testing.contracts.observer import ObserverContract
from ds_core.testing.contracts.op import OpContract
from ds_core.testing.contracts.runner import RunnerContract
from ds_core.testing.contracts.sharding import ShardingContract
from ds_core.testing.contracts.tensor_files import TensorFilesContract
from ds_core.testing.contracts.transport import TransportContract

__all__ = [
    "ObserverContract",
    "OpContract",
    "RunnerContract",
    "ShardingContract",
    "TensorFilesContract",
    "TransportContract",
]
